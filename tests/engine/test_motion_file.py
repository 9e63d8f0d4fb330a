"""Files of learned motions: what is written is read, and what is none is refused in words."""

import stat

import attrs
import pytest
import torch
from safetensors.torch import save_file

import kinetiq as kq
from kinetiq.families import ANIMATEDIFF, UNET3D
from kinetiq.motion_file import (
    FORMAT,
    MotionInfo,
    check_tensors,
    fingerprint,
    read_info,
    read_motion,
    require_described,
    require_family,
    require_kind,
    require_known,
    require_site,
    require_width,
    take_part,
    write_motion,
)

INFO = MotionInfo(
    kind="embedding",
    family="unet3d",
    frames=4,
    height=8,
    width=12,
    checkpoint="tiny",
    loss="hybrid",
    steps=350,
    prompt='a "red" circle, grün',
    reference="abc",
)
DESCRIPTION = ("target", "rank", "sites", "switches")


@pytest.fixture
def tensors():
    rng = torch.Generator().manual_seed(0)
    return {
        "value.a.b": torch.randn(4, 2, 3, generator=rng),
        "noise": torch.randn(3, generator=rng).half(),
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "dance.safetensors"


def metadata(**changes):
    said = {name: str(value) for name, value in attrs.asdict(INFO).items()}
    return {"format": FORMAT, **said, "sites": '["up.0"]', **changes}


def test_what_is_written_is_read(path, tensors):
    described = attrs.evolve(INFO, sites=("up.0", "up.1"), target="k", rank=4)
    write_motion(path, tensors, described, {"scale": 0.5, "highway": None})
    got, info, switches = read_motion(path)
    assert info == described == read_info(path)
    assert switches == {"scale": 0.5, "highway": None}
    assert info.version == kq.__version__
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in tensors.items())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_tensors_that_share_memory_or_need_gradients_are_written(path, tensors):
    whole = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    write_motion(path, {"a": whole, "b": whole.T, "c": whole[0]}, INFO)
    got = read_motion(path).tensors
    assert torch.equal(got["b"], whole.detach().T) and torch.equal(got["c"], whole.detach()[0])


def test_has_the_permissions_of_any_new_file(path, tensors, file_mode):
    path.touch(mode=0o600)
    write_motion(path, tensors, INFO)
    assert stat.S_IMODE(path.stat().st_mode) == file_mode


def test_what_cannot_be_written_leaves_the_old_file(path, tensors):
    write_motion(path, tensors, INFO)
    before = path.read_bytes()
    with pytest.raises(kq.RequestError, match=r"write: a motion: w must be finite, got NaN or in"):
        write_motion(path, {"w": torch.tensor([0.0, torch.inf])}, INFO)
    with pytest.raises(kq.RequestError, match=r"must end in \.safetensors, got .*dance\.pt"):
        write_motion(path.with_suffix(".pt"), tensors, INFO)
    with pytest.raises(kq.OutputError, match=r"the folder .*absent must exist"):
        write_motion(path.parent / "absent" / path.name, tensors, INFO)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["motion_embed.pt", "lora.bin", "a.ckpt", "b.safetensors"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path, name):
    file = tmp_path / name
    torch.save({"w": torch.ones(2)}, file)
    wanted = rf"must be safetensors, and is a pickle.*: kinetiq convert {file} --out {file.parent}/"
    with pytest.raises(kq.CheckpointError, match=wanted):
        read_motion(file)


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_looks_like_a_pickle_is_read(path, tensors, length):
    write_motion(path, tensors, INFO)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    described = attrs.evolve(INFO, prompt=INFO.prompt + "x" * (length - size))
    write_motion(path, tensors, described)
    assert path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    assert read_info(path) == described


def test_a_damaged_file_is_refused(path, tensors):
    write_motion(path, tensors, INFO)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(
        kq.CheckpointError, match="must be a whole safetensors file, and is damaged"
    ):
        read_motion(path)
    path.write_bytes(b"")
    with pytest.raises(kq.CheckpointError, match="must be a whole safetensors file"):
        read_info(path)


def test_what_is_not_there_or_a_folder_is_refused(tmp_path):
    with pytest.raises(kq.CheckpointError, match="must be a motion's file, and is not there"):
        read_motion(tmp_path / "absent.safetensors")
    with pytest.raises(kq.CheckpointError, match="must be a motion's file, and is a folder"):
        read_motion(tmp_path)


def test_another_safetensors_file_is_refused(path):
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(kq.CheckpointError, match=r"must be a motion that kinetiq wrote .*got 'no'"):
        read_motion(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "song"}, "kind: must be one of embedding, lora, got 'song'"),
        ({"family": "dit"}, "family: must be one of animatediff, unet3d, got 'dit'"),
        ({"frames": "many"}, "frames: must be a whole number of at least 1, got 'many'"),
        ({"frames": "0"}, "frames: must be a whole number of at least 1, got 0"),
        ({"height": "-3"}, "height: must be a whole number of at least 1, got '-3'"),
        ({"steps": "9" * 5000}, "steps: must be a whole number of at least 0"),
        ({"rank": "-1"}, "rank: must be a whole number of at least 0, got '-1'"),
        ({"sites": "[1]"}, r"sites: must be module paths, got \(1,\)"),
        ({"sites": '"up"'}, "sites: must be module paths, got 'up'"),
    ],
)
def test_wrong_metadata_is_refused(path, changes, message):
    save_file({"w": torch.ones(2)}, path, metadata=metadata(**changes))
    with pytest.raises(kq.CheckpointError, match=f"the metadata of .*: {message}"):
        read_motion(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": "up"}, "must say 'sites' as JSON"),
        ({"switches": "[]"}, r"must say 'switches' as a JSON object, got '\[\]'"),
        ({"switches": "{"}, "must say 'switches' as JSON"),
    ],
)
def test_metadata_that_is_no_json_is_refused(path, changes, message):
    save_file({"w": torch.ones(2)}, path, metadata=metadata(**changes))
    with pytest.raises(kq.CheckpointError, match=f"the metadata of .* {message}"):
        read_motion(path)


def test_a_file_of_an_earlier_version_is_read(path):
    said = {name: value for name, value in metadata().items() if name not in DESCRIPTION}
    save_file({"w": torch.ones(2)}, path, metadata=said)
    _, info, switches = read_motion(path)
    assert info == INFO and switches == {}


def test_what_a_file_says_of_its_tensors_must_be_so():
    found = attrs.evolve(INFO, target="k", rank=4, sites=("a", "b"))
    require_described("here", INFO, found)
    require_described("here", found, found)
    for change in ({"target": "v"}, {"rank": 8}, {"sites": ("a",)}):
        with pytest.raises(kq.CheckpointError, match=f"here must .* are: {next(iter(change))} "):
            require_described("here", attrs.evolve(found, **change), found)


def test_missing_metadata_is_refused(path):
    said = metadata()
    del said["loss"]
    save_file({"w": torch.ones(2)}, path, metadata=said)
    with pytest.raises(kq.CheckpointError, match=r"the metadata of .* must say 'loss'"):
        read_motion(path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor([1.0, torch.nan]), "w must be finite, got NaN or infinity"),
        (torch.ones(2, dtype=torch.int64), "w must be of floating point, got torch.int64"),
    ],
)
def test_tensors_that_are_no_numbers_are_refused(path, tensor, message):
    save_file({"w": tensor}, path, metadata=metadata())
    with pytest.raises(kq.CheckpointError, match=message):
        read_motion(path)
    assert read_info(path) == attrs.evolve(INFO, sites=("up.0",))  # reads no tensor


def test_parts_are_told_by_their_names(tensors):
    assert take_part(tensors, "value").keys() == {"a.b"}
    assert take_part(tensors, "noise") == {}
    require_known("x", tensors, ("value", "noise"))
    with pytest.raises(kq.CheckpointError, match=r"must be named value, got 'noise'"):
        require_known("x", tensors, ("value",))
    with pytest.raises(kq.CheckpointError, match=r"must be named value, got 'values\.a'"):
        require_known("x", ["values.a"], ("value",))


def test_what_does_not_fit_is_said():
    require_kind("it", INFO, "embedding")
    require_family(INFO, UNET3D)
    require_site(INFO, "a.b", ["a.b"])
    require_width(INFO, "a.b", 32, 32)
    with pytest.raises(kq.CheckpointError, match=r"it must be a motion of kind 'lora', got 'emb.*"):
        require_kind("it", INFO, "lora")
    with pytest.raises(
        kq.CheckpointError, match=r"the family of the network, animatediff, got unet3d \(tiny\)"
    ):
        require_family(INFO, ANIMATEDIFF)
    with pytest.raises(kq.CheckpointError, match=r"must be in the network, got a\.b, which is not"):
        require_site(INFO, "a.b", ["a"])
    with pytest.raises(
        kq.CheckpointError, match=r"a\.b must be 64 wide, as the network is, got 32"
    ):
        require_width(INFO, "a.b", 32, 64)
    with pytest.raises(kq.RequestError, match="x must hold at least one tensor, got none"):
        check_tensors("x", {}, kq.RequestError)


def test_a_fingerprint_is_of_content_names_and_size(tensors):
    one = fingerprint(tensors, INFO)
    assert one == fingerprint(dict(reversed(tensors.items())), attrs.evolve(INFO, prompt="other"))
    renamed = {"value.a.c" if name == "value.a.b" else name: t for name, t in tensors.items()}
    changed = tensors | {"noise": tensors["noise"] * 2}
    reshaped = tensors | {"value.a.b": tensors["value.a.b"].reshape(2, 4, 3)}
    others = [fingerprint(other, INFO) for other in (renamed, changed, reshaped)]
    others.append(fingerprint(tensors, attrs.evolve(INFO, width=8)))
    others.append(fingerprint(tensors, attrs.evolve(INFO, family="animatediff")))
    assert len({one, *others}) == 6
