import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import kinetiq as kq
from kinetiq.convert import convert_folder, converted_name, default_target


@pytest.fixture
def pickled(tiny_folder, tmp_path):
    """The tiny model with its weights pickled, one of them in two shards."""
    import shutil

    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder(), folder)
    for path in folder.rglob("*.safetensors"):
        name = {"model": "pytorch_model"}.get(path.stem, path.stem)
        torch.save(load_file(path), path.with_name(name + ".bin"))
        path.unlink()
    return folder


def test_a_pickled_model_is_refused_and_its_conversion_loads(pickled, tiny_folder, tmp_path):
    with pytest.raises(kq.CheckpointError, match="kinetiq convert"):
        kq.Engine.load(pickled)
    seen = []
    written = convert_folder(pickled, tmp_path / "out", seen.append)
    assert len(written) == len(seen) == 3
    options = {"frames": 3, "steps": 2}
    with kq.Engine.load(tmp_path / "out") as engine, kq.Engine.load(tiny_folder()) as other:
        assert engine.generate("a ring", **options) == other.generate("a ring", **options)
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_files_have_the_permissions_of_any_new_file(tmp_path, file_mode):
    source, out = tmp_path / "unet", tmp_path / "out"
    source.mkdir()
    torch.save({"w": torch.ones(2)}, source / "diffusion_pytorch_model.bin")
    (source / "config.json").write_text("{}")
    for file in source.iterdir():
        file.chmod(0o640)
    convert_folder(source, out)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()}
    wanted = ("diffusion_pytorch_model.safetensors", "config.json")
    assert modes == dict.fromkeys(wanted, file_mode)


def test_shards_keep_their_map(tmp_path):
    folder = tmp_path / "unet"
    folder.mkdir()
    for number in (1, 2):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.bin"
        torch.save({f"w{number}": torch.ones(2) * number}, folder / name)
    weight_map = {f"w{n}": f"diffusion_pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)}
    index = {"metadata": {"total_size": 16}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps(index))
    convert_folder(folder, tmp_path / "out")
    said = json.loads(
        (tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    for name, file in said["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "out" / file)[name], torch.ones(2) * int(name[1]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "must be readable JSON"),
        ("[]", "must have a weight_map of weights to file names, and has none"),
        ('{"weight_map": {"w": 3}}', "must have a weight_map of weights to file names"),
        ("\xff", "must be readable JSON"),
    ],
)
def test_a_damaged_map_of_shards(tmp_path, content, words):
    folder = tmp_path / "unet"
    folder.mkdir()
    torch.save({"w": torch.ones(2)}, folder / "diffusion_pytorch_model-00001-of-00001.bin")
    path = folder / "diffusion_pytorch_model.bin.index.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(kq.CheckpointError, match=f"convert: {path} {words}"):
        convert_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_variant_keeps_its_place(tmp_path):
    folder = tmp_path / "unet"
    folder.mkdir()
    name = "diffusion_pytorch_model.fp16-00001-of-00001.bin"
    torch.save({"w": torch.ones(2)}, folder / name)
    (folder / "diffusion_pytorch_model.bin.index.fp16.json").write_text(
        json.dumps({"weight_map": {"w": name}})
    )
    convert_folder(folder, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
    ]


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("pytorch_model.fp16.bin", "model.fp16.safetensors"),
        ("pytorch_model-00001-of-00002.fp16.bin", "model-00001-of-00002.fp16.safetensors"),
        ("diffusion_pytorch_model.ckpt", None),
        ("diffusion_pytorch_model_old.bin", None),
        ("model.bin", None),
        ("optimizer.bin", None),
        ("pytorch_model.bin.index.json", None),
    ],
)
def test_only_what_loaders_read_is_converted(name, new):
    assert converted_name(name) == new


def test_where_a_model_is_converted_to(tmp_path, monkeypatch):
    assert default_target(Path("a/model")) == Path("a/model-safetensors")
    (tmp_path / "model" / "unet").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "model")
    assert default_target(Path()) == tmp_path / "model-safetensors"
    assert default_target(Path("unet/..")) == tmp_path / "model-safetensors"
    with pytest.raises(kq.RequestError, match="--out must be given for /"):
        default_target(Path("/"))


class Malicious:
    def __reduce__(self):
        return (print, ("code of a pickle ran",))


def test_code_in_a_pickle_does_not_run(tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"w": Malicious()}, folder / "pytorch_model.bin")
    with pytest.raises(kq.CheckpointError, match="must be a pickle of plain tensors"):
        convert_folder(folder, tmp_path / "out")
    assert "code of a pickle ran" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "must map names to tensors"), ({"a": 3}, "must map names to tensors")],
)
def test_other_content_is_refused(tmp_path, content, message):
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(kq.CheckpointError, match=message):
        convert_folder(folder, tmp_path / "out")


def test_says_what_is_wrong(tmp_path):
    with pytest.raises(kq.CheckpointError, match="must be a folder of a model"):
        convert_folder(tmp_path / "missing", tmp_path / "out")
    (tmp_path / "one.ckpt").touch()
    with pytest.raises(kq.CheckpointError, match=r"got a file; turn a single-file checkpoint into"):
        convert_folder(tmp_path / "one.ckpt", tmp_path / "out")
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(kq.CheckpointError, match="must hold weights such as"):
        convert_folder(tmp_path, tmp_path / "out")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(kq.CheckpointError, match="must be a pickle of plain tensors"):
        convert_folder(tmp_path, tmp_path.parent / "out")
