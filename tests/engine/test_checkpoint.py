"""Loading: what the stock pipelines load, and words for everything that is wrong."""

import copy
import dataclasses
import fnmatch
import json
import logging
import os
import pickle
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import tiny
import torch
from huggingface_hub import errors as hub_errors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kinetiq import checkpoint as checkpoint_module
from kinetiq.checkpoint import load_checkpoint, resolve_device, resolve_dtype
from kinetiq.errors import CheckpointError, MissingDependencyError, RequestError, WorkError
from kinetiq.model_files import fingerprint_files

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pristine_unet3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny3d"
    return tiny.write_tiny_folder(path, "unet3d", "DPMSolverMultistepScheduler")


@pytest.fixture(scope="module")
def base_and_adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny.write_tiny_base_and_adapter(tmp_path_factory.mktemp("models"))


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(pristine, tmp_path / "model")


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys; None as a value removes the key."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def denoise(unet: Any, *, per_frame_text: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 5, 8, 8, generator=generator)
    text = torch.randn(1, 6, tiny.CROSS_WIDTH, generator=generator)
    unet = copy.deepcopy(unet).eval()  # the stock loader's weights lie where the file has them
    with torch.no_grad():
        text = text.repeat(5, 1, 1) if per_frame_text else text
        return unet(latents, torch.tensor([400]), text).sample


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for the last bits: with several threads they depend on how weights lie in memory."""
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_loads_what_the_animatediff_pipeline_loads(pristine: Path):
    from diffusers import AnimateDiffPipeline

    got, stock = load_checkpoint(pristine), AnimateDiffPipeline.from_pretrained(pristine)
    assert (got.name, got.path, got.family) == ("tiny", pristine, "animatediff")
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(got, name), getattr(stock, name)
        assert type(ours) is type(theirs)
        assert not ours.training
        assert not any(parameter.requires_grad for parameter in ours.parameters())
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    assert got.tokenizer("a red circle").input_ids == stock.tokenizer("a red circle").input_ids
    assert got.scheduler == "DDIMScheduler"
    again = type(stock.scheduler).from_config(dict(got.scheduler_config))
    assert torch.equal(again.alphas_cumprod, stock.scheduler.alphas_cumprod)
    written = json.loads((pristine / "scheduler/scheduler_config.json").read_text())
    assert got.scheduler_config == written
    assert_same(denoise(got.unet, per_frame_text=True), denoise(stock.unet, per_frame_text=True))


def test_loads_what_the_text_to_video_pipeline_loads(pristine_unet3d: Path):
    from diffusers import TextToVideoSDPipeline

    got, stock = (
        load_checkpoint(pristine_unet3d),
        TextToVideoSDPipeline.from_pretrained(pristine_unet3d),
    )
    assert (got.family, got.scheduler) == ("unet3d", "DPMSolverMultistepScheduler")
    assert_same(denoise(got.unet, per_frame_text=False), denoise(stock.unet, per_frame_text=False))


def test_puts_an_adapter_into_an_image_model_as_the_pipeline_does(
    base_and_adapter: tuple[Path, Path],
):
    from diffusers import AnimateDiffPipeline, MotionAdapter

    base, adapter = base_and_adapter
    got = load_checkpoint(base, motion_adapter=adapter)
    stock = AnimateDiffPipeline.from_pretrained(
        base, motion_adapter=MotionAdapter.from_pretrained(adapter)
    )
    assert got.family == "animatediff"
    assert_same(denoise(got.unet, per_frame_text=True), denoise(stock.unet, per_frame_text=True))


def test_reads_a_pipeline_saved_with_its_adapter_beside(
    base_and_adapter: tuple[Path, Path], tmp_path: Path
):
    from diffusers import AnimateDiffPipeline, MotionAdapter

    base, adapter = base_and_adapter
    stock = AnimateDiffPipeline.from_pretrained(
        base, motion_adapter=MotionAdapter.from_pretrained(adapter)
    )
    stock.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert (index["unet"][1], index["motion_adapter"][1]) == ("UNetMotionModel", "MotionAdapter")
    got = load_checkpoint(tmp_path / "saved")
    assert_same(denoise(got.unet, per_frame_text=True), denoise(stock.unet, per_frame_text=True))


def test_a_pickled_adapter_is_converted_where_it_lies(
    base_and_adapter: tuple[Path, Path], tmp_path: Path
):
    base, adapter = base_and_adapter
    whole = shutil.copytree(base, tmp_path / "whole")
    edit_json(whole / "model_index.json", motion_adapter=["diffusers", "MotionAdapter"])
    for path in (tmp_path / "adapter", whole / "motion_adapter"):
        shutil.copytree(adapter, path)
        (path / "diffusion_pytorch_model.safetensors").rename(path / "diffusion_pytorch_model.bin")
    for source, named, told in [
        (base, tmp_path / "adapter", tmp_path / "adapter"),
        (whole, None, whole),
    ]:
        with pytest.raises(CheckpointError, match=f"convert it with `kinetiq convert {told}`$"):
            load_checkpoint(source, motion_adapter=named)
    (tmp_path / "mm.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"motion adapter must be .*MotionAdapter\.from_sing"):
        load_checkpoint(base, motion_adapter=tmp_path / "mm.ckpt")


def test_uses_the_adapter_that_lies_in_the_folder_unless_another_is_named(
    base_and_adapter: tuple[Path, Path], tmp_path: Path
):
    base, adapter = base_and_adapter
    whole = shutil.copytree(base, tmp_path / "whole")
    shutil.copytree(adapter, whole / "motion_adapter")
    edit_json(whole / "model_index.json", motion_adapter=["diffusers", "MotionAdapter"])
    other = tmp_path / "other"
    tiny.tiny_adapter(seed=5).save_pretrained(other)
    wanted = denoise(load_checkpoint(base, motion_adapter=adapter).unet, per_frame_text=True)
    assert_same(denoise(load_checkpoint(whole).unet, per_frame_text=True), wanted)
    named = load_checkpoint(whole, motion_adapter=other)
    other = denoise(named.unet, per_frame_text=True)
    assert (other - wanted).abs().max() > 0.01 * wanted.abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", torch.bfloat16, "float64"])
def test_all_components_get_the_type(pristine: Path, dtype: str | torch.dtype):
    got = load_checkpoint(str(pristine), dtype=dtype)
    wanted = resolve_dtype(dtype)
    assert (got.unet.dtype, got.vae.dtype, got.text_encoder.dtype, got.dtype) == (wanted,) * 4
    assert got.device == torch.device("cpu")


def test_reads_a_variant_and_sharded_weights(folder: Path):
    wanted = load_checkpoint(folder)
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    got = load_checkpoint(folder, variant="fp16")
    assert torch.equal(got.unet.conv_in.weight, wanted.unet.conv_in.weight)
    with pytest.raises(
        CheckpointError,
        match=r"got diffusion_pytorch_model\.fp16\.safetensors; choose with variant=",
    ):
        load_checkpoint(folder)

    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_name(file.name.replace(".fp16", "")))
    (folder / UNET_WEIGHTS).unlink()
    wanted.unet.save_pretrained(folder / "unet", max_shard_size="100KB")
    assert not (folder / UNET_WEIGHTS).exists()
    got = load_checkpoint(folder)
    assert torch.equal(got.unet.conv_out.weight, wanted.unet.conv_out.weight)
    (folder / UNET_WEIGHTS).touch()
    with pytest.raises(CheckpointError, match=r"has both .*; move one away"):
        load_checkpoint(folder)
    (folder / UNET_WEIGHTS).unlink()
    shard = min((folder / "unet").glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        load_checkpoint(folder)


def test_keeps_the_random_state_the_logs_and_the_warnings_as_they_were(
    base_and_adapter: tuple[Path, Path],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    def state() -> list[Any]:
        libraries = (diffusers_logging, transformers_logging)
        return [(lib.get_verbosity(), lib.is_progress_bar_enabled()) for lib in libraries]

    base, adapter = base_and_adapter  # its network is built from scratch, with random weights
    load_checkpoint(base, motion_adapter=adapter)  # whatever the first import says is not ours
    before, drawn, filters = state(), torch.get_rng_state(), list(warnings.filters)
    caplog.set_level(logging.DEBUG)
    capfd.readouterr()
    load_checkpoint(base, motion_adapter=adapter)
    assert (state(), warnings.filters) == (before, filters)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []


def test_a_checkpoint_is_frozen_and_prints_on_a_line(pristine: Path):
    got = load_checkpoint(pristine)
    assert len(repr(got)) < 400 + len(str(pristine))
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.unet = None  # type: ignore[misc]
    with pytest.raises(TypeError):
        got.scheduler_config["beta_start"] = 1.0  # type: ignore[index]


def test_weights_outlive_their_files(folder: Path):
    got = load_checkpoint(folder)
    wanted = denoise(got.unet, per_frame_text=True)
    for file in folder.glob("*/*.safetensors"):
        with file.open("r+b") as stream:
            stream.write(b"\xff" * file.stat().st_size)
    assert_same(denoise(got.unet, per_frame_text=True), wanted)


def test_the_fingerprint_knows_the_content_and_not_the_place(folder: Path, pristine: Path):
    wanted = load_checkpoint(pristine).fingerprint
    assert load_checkpoint(folder, dtype="bfloat16").fingerprint == wanted
    edit_weights(folder / UNET_WEIGHTS, lambda tensors: tensors["conv_in.bias"].add_(1e-3))
    assert load_checkpoint(folder).fingerprint != wanted
    shutil.copy(pristine / UNET_WEIGHTS, folder / UNET_WEIGHTS)
    assert load_checkpoint(folder).fingerprint == wanted
    edit_json(folder / "scheduler/scheduler_config.json", beta_end=0.02)
    assert load_checkpoint(folder).fingerprint != wanted


@given(place=st.integers(0, 2**20 - 1))
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each writes the file anew
)
def test_the_fingerprint_knows_each_weight_of_a_large_file(tmp_path: Path, place: int):
    file = tmp_path / "large.safetensors"
    values = torch.arange(2**20, dtype=torch.float32)
    save_file({"weight": values}, file)
    wanted = fingerprint_files([file])
    assert fingerprint_files([file]) == wanted
    values[place] += 0.5
    save_file({"weight": values}, file)
    assert fingerprint_files([file]) != wanted


def test_the_fingerprint_knows_names_and_folders(tmp_path: Path):
    files = [tmp_path / "unet" / "a.json", tmp_path / "vae" / "a.json", tmp_path / "vae" / "b.json"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(file.name)
    of_each = {fingerprint_files([file]) for file in files}
    assert len(of_each) == 3
    assert fingerprint_files(files) == fingerprint_files(reversed(files))
    assert fingerprint_files(files) not in of_each


def test_a_fingerprint_of_files_that_changed_while_they_were_read_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another file of the same size and time, at the end of a load that read the former one."""
    adapt = checkpoint_module._require_fit

    def replace(*words: object) -> None:
        weights = folder / UNET_WEIGHTS
        before = weights.stat()
        shutil.copy(weights, folder / "copy")
        edit_weights(folder / "copy", lambda tensors: tensors["conv_in.bias"].add_(1e-3))
        os.utime(folder / "copy", ns=(before.st_atime_ns, before.st_mtime_ns))
        (folder / "copy").replace(weights)
        adapt(*words)

    monkeypatch.setattr(checkpoint_module, "_require_fit", replace)
    got = load_checkpoint(folder)
    with pytest.raises(CheckpointError, match="must stay as they were when it was loaded"):
        _ = got.fingerprint


def test_a_fingerprint_of_files_that_have_changed_since_is_refused(folder: Path):
    first, second = load_checkpoint(folder), load_checkpoint(folder)
    wanted = first.fingerprint
    edit_weights(folder / UNET_WEIGHTS, lambda tensors: tensors["conv_in.bias"].add_(1e-3))
    assert first.fingerprint == wanted  # which it was, of what is loaded
    with pytest.raises(CheckpointError, match="must stay as they were when it was loaded"):
        _ = second.fingerprint
    shutil.rmtree(folder / "vae")
    with pytest.raises(CheckpointError, match="must stay as they were when it was loaded"):
        _ = dataclasses.replace(second, unet=first.unet).fingerprint


def test_says_which_options_have_no_meaning(pristine: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        RequestError, match=r"dtype must be float32 or bfloat16 on a CPU, got float16"
    ):
        load_checkpoint(pristine, dtype="fp16")
    with pytest.raises(RequestError, match=r"dtype must be one of float64, float32, .* got 'int8'"):
        load_checkpoint(pristine, dtype="int8")
    with pytest.raises(RequestError, match=r"dtype must be one of .* got torch\.int32"):
        resolve_dtype(torch.int32)
    for device in ("tpu", "mps", "cuda:x", "meta", 1.5):
        with pytest.raises(
            RequestError, match=r"device: must be 'cpu', 'cuda' or 'cuda:<index>', got"
        ):
            load_checkpoint(pristine, device=device)  # type: ignore[arg-type]
    with pytest.raises(
        RequestError, match=r"revision must be left out for the local .* got 'main'"
    ):
        load_checkpoint(pristine, revision="main")
    with pytest.raises(
        RequestError,
        match=r"motion_adapter must be left out for tiny, whose UNetMotionModel already",
    ):
        load_checkpoint(pristine, motion_adapter="somewhere")
    with pytest.raises(RequestError, match=r"model must be a name, a folder or a hub id, got None"):
        load_checkpoint(None)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingDependencyError, match=r"device: 'cuda:0' needs an NVIDIA GPU"):
        load_checkpoint(pristine, device="cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(
        MissingDependencyError,
        match=r"device: must be one of the 2 GPUs of this machine, counted from 0, got 'cuda:2'",
    ):
        resolve_device("cuda:2")


def test_says_that_a_device_is_full(pristine: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("diffusers.UNetMotionModel.to", full)
    with pytest.raises(
        WorkError, match=r"device 'cpu' must have room for the UNetMotionModel of tiny"
    ):
        load_checkpoint(pristine)


def test_says_what_a_source_must_be(pristine: Path, tmp_path: Path):
    for source in ("nothing", "./a/b", "a/b/c", "/no/such/folder", "a\0b", "owner/na me"):
        with pytest.raises(
            CheckpointError,
            match=r"model must be 'sprites', a folder that exists or a hub id 'owner/name', got",
        ):
            load_checkpoint(source)
    with pytest.raises(CheckpointError, match=r"model must be a path that can be read"):
        load_checkpoint("x" * 5000)
    with pytest.raises(
        CheckpointError,
        match=r"got the file .*model\.safetensors; turn a single-file checkpoint into a diffusers "
        r"folder with diffusers' scripts/convert_original_stable_diffusion_to_diffusers\.py, or",
    ):
        load_checkpoint(pristine / TEXT_WEIGHTS)
    with pytest.raises(
        CheckpointError, match=r"model_index\.json must be at .*, and it is missing"
    ):
        load_checkpoint(tmp_path)


def test_the_embedded_model_is_found_in_the_package_or_missed_in_words(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checkpoint_module.importlib.resources, "files", lambda _: tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"embedded model 'sprites' must be at .*checkpoint, and it is missing",
    ):
        load_checkpoint("sprites")
    shutil.copytree(pristine, tmp_path / "checkpoint")
    got = load_checkpoint("sprites")
    assert (got.name, got.path) == ("sprites", tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="a folder that exists"):
        load_checkpoint(Path("sprites"))  # a path is never the embedded model


def test_a_hub_id_downloads_one_variant_of_safe_files(
    pristine: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(pristine)

    def fetched(name: str) -> bool:
        ignored = asked["ignore_patterns"] or []
        wanted = any(fnmatch.fnmatch(name, pattern) for pattern in asked["allow_patterns"])
        return wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    got = load_checkpoint("owner/name", revision="v1", local_files_only=True)
    assert (got.name, got.path) == ("owner/name", pristine)
    assert (asked["repository"], asked["revision"], asked["local_files_only"]) == (
        "owner/name",
        "v1",
        True,
    )
    needed = [str(file.relative_to(pristine)) for file in pristine.rglob("*") if file.is_file()]
    assert all(fetched(name) for name in needed)
    assert fetched("unet/diffusion_pytorch_model-00001-of-00002.safetensors")
    refused = ("unet/diffusion_pytorch_model.bin", "v1-5.ckpt", "v1-5.safetensors", "handler.py",
               "unet/diffusion_pytorch_model.fp16.safetensors", "safety_checker/model.safetensors")  # fmt: skip
    assert not any(fetched(name) for name in refused)
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.fp16\.safetensors, got"):
        load_checkpoint("owner/name", variant="fp16")
    assert fetched("unet/diffusion_pytorch_model.fp16.safetensors")
    assert not fetched("unet/diffusion_pytorch_model.safetensors")


ANSWER: Any = SimpleNamespace(headers={}, request=None)  # the HTTP library differs by hub version


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (hub_errors.GatedRepoError("no", response=ANSWER), "its owner wants terms to be accepted"),
        (hub_errors.RepositoryNotFoundError("no", response=ANSWER), "a repository of the hub, got neither"),
        (hub_errors.RevisionNotFoundError("no", response=ANSWER), "must be a revision that exists"),
        (hub_errors.LocalEntryNotFoundError("no"), "the hub cannot be reached"),
        (hub_errors.OfflineModeIsEnabled("no"), "the hub cannot be reached"),
        (ConnectionError("name resolution"), "that failed: ConnectionError: name resolution"),
    ],
)  # fmt: skip
def test_says_why_a_download_failed(
    failure: Exception, words: str, monkeypatch: pytest.MonkeyPatch
):
    def download(*_: object, **__: object) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=f"model 'owner/name' at revision 'v1' .*{words}"):
        load_checkpoint("owner/name", revision="v1")


def test_a_download_shows_no_bar_when_nobody_watches(
    pristine: Path, monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub.utils import are_progress_bars_disabled

    seen = []

    def download(*_: object, **__: object) -> str:
        seen.append(are_progress_bars_disabled())
        return str(pristine)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for watched in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda watched=watched: watched)
        load_checkpoint("owner/name")
        assert not are_progress_bars_disabled()
    assert seen == [False, True]


def test_says_which_denoisers_are_supported(folder: Path, base_and_adapter: tuple[Path, Path]):
    edit_json(folder / "model_index.json", unet=["diffusers", "FluxTransformer2DModel"])
    with pytest.raises(
        CheckpointError,
        match=r"one of UNetMotionModel, UNet3DConditionModel, or UNet2DConditionModel with a motion adapter, got FluxTransformer2DModel",
    ):
        load_checkpoint(folder)
    with pytest.raises(
        CheckpointError,
        match=r"image model \(UNet2DConditionModel\).* pass a MotionAdapter with --motion-adapter",
    ):
        load_checkpoint(base_and_adapter[0])
    edit_json(
        folder / "model_index.json", unet=None, transformer=["diffusers", "WanTransformer3DModel"]
    )
    with pytest.raises(
        CheckpointError,
        match=r"unet must be named as \[library, class\] in .*model_index\.json, got None",
    ):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("component", "entry", "words"),
    [
        ("vae", ["diffusers", "AutoencoderTiny"], "vae of .* must be a AutoencoderKL, got AutoencoderTiny"),
        ("text_encoder", ["transformers", "T5EncoderModel"], "must be a CLIPTextModel, got T5EncoderModel"),
        ("tokenizer", ["transformers", "T5Tokenizer"], "must be a CLIPTokenizer or CLIPTokenizerFast, got T5Tokenizer"),
        ("scheduler", ["diffusers", "UNetMotionModel"], "must be a scheduler of diffusers, got UNetMotionModel"),
        ("scheduler", "DDIMScheduler", "scheduler must be named as"),
        ("unet", ["diffusers", "UNet3DConditionModel"], "UNet3DConditionModel that was asked for, got UNetMotionModel"),
    ],
)  # fmt: skip
def test_says_which_component_has_the_wrong_class(
    folder: Path, component: str, entry: Any, words: str
):
    edit_json(folder / "model_index.json", **{component: entry})
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(folder)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_says_what_is_missing(folder: Path, component: str):
    weights = next((folder / component).glob("*.safetensors"))
    content = weights.read_bytes()
    weights.unlink()
    with pytest.raises(
        CheckpointError,
        match=rf"{component} must have its weights in {weights}, and no weights are there",
    ):
        load_checkpoint(folder)
    weights.write_bytes(content)
    (folder / component / "config.json").unlink()
    with pytest.raises(
        CheckpointError,
        match=rf"{component} must be at {folder / component / 'config.json'}, and it is missing",
    ):
        load_checkpoint(folder)
    shutil.rmtree(folder / component)
    with pytest.raises(
        CheckpointError,
        match=rf"{component} must be a folder at {folder / component}, and it is missing",
    ):
        load_checkpoint(folder)


def test_says_what_is_missing_of_tokenizer_and_scheduler(folder: Path):
    config = (folder / "scheduler/scheduler_config.json").rename(folder / "kept")
    with pytest.raises(
        CheckpointError, match=r"scheduler must be at .*scheduler_config\.json, and it is missing"
    ):
        load_checkpoint(folder)
    config.rename(folder / "scheduler/scheduler_config.json")
    (folder / "tokenizer/tokenizer.json").unlink()
    (folder / "tokenizer/merges.txt").write_text("\0")
    with pytest.raises(CheckpointError, match=r"tokenizer in .* must be a CLIPTokenizer: "):
        load_checkpoint(folder)
    (folder / "tokenizer/merges.txt").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"tokenizer must have tokenizer\.json, or vocab\.json and merges\.txt",
    ):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("diffusion_pytorch_model.bin", r"convert it with `kinetiq convert {folder}`$"),
        ("diffusion_pytorch_model.fp16.bin", r"convert it with `kinetiq convert {folder}`$"),
        ("pytorch_model.bin", "it has not the name of a UNetMotionModel's weights"),
        ("model.ckpt", "it has not the name of a UNetMotionModel's weights and cannot be conver"),
        ("weights.pt", r"save it with save_pretrained\(folder\)$"),
    ],
)
def test_refuses_a_pickle_without_opening_it(folder: Path, name: str, advice: str):
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(folder / "exploded"),)

    (folder / UNET_WEIGHTS).unlink()
    (folder / "unet" / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(
        CheckpointError,
        match=rf"got {name}, a pickle, which is refused .*{advice.format(folder=folder)}",
    ):
        load_checkpoint(folder)
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, None])
@pytest.mark.parametrize("weights", [UNET_WEIGHTS, TEXT_WEIGHTS])
def test_says_that_weights_are_damaged(folder: Path, weights: str, damage: bytes | None):
    file = folder / weights
    file.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(
        CheckpointError, match=rf"must have a whole safetensors file at {file}, and it is damaged"
    ):
        load_checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\xff\xfe", ""])
@pytest.mark.parametrize(
    "file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]
)
def test_says_that_a_configuration_is_not_json(folder: Path, file: str, text: str):
    (folder / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(
        CheckpointError, match=rf"must be (readable JSON|a JSON object) at {folder / file}"
    ):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("unet/config.json", {"block_out_channels": [16, 16, 32]}, "unet in .* config.json and weights agree"),
        ("unet/config.json", {"block_out_channels": [16, 32]}, "unet in .* config.json and weights agree"),
        ("unet/config.json", {"motion_num_attention_heads": "two"}, "unet in .* config.json and weights agree"),
        ("unet/config.json", {"layers_per_block": 2}, "unet in .* config.json and weights agree"),
        ("unet/config.json", {"use_motion_mid_block": False}, "no weights beyond its config.json, got .* mid_block"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "steep"}, "scheduler in .* must be a DDIMScheduler: .*steep"),
        ("unet/config.json", {"telepathy": 1, "_private": 1}, "only options of UNetMotionModel, got telepathy;"),
        ("text_encoder/config.json", {"hidden_size": 32}, "text_encoder in .* config.json and weights agree"),
        ("text_encoder/config.json", {"num_hidden_layers": 3}, "text_encoder .* must have all weights"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 77}, r"model_max_length in 3\.\.24, got 77"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": None}, r"model_max_length in 3\.\.24, got 1000"),
    ],
)  # fmt: skip
def test_says_that_configuration_and_weights_differ(
    folder: Path, file: str, changes: dict[str, Any], words: str
):
    edit_json(folder / file, **changes)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(folder)


def test_says_which_weight_is_missing(folder: Path):
    edit_weights(folder / UNET_WEIGHTS, lambda tensors: tensors.pop("conv_in.bias"))
    with pytest.raises(
        CheckpointError, match=r"unet .* and 1 are missing, the first is conv_in\.bias"
    ):
        load_checkpoint(folder)


def test_a_text_encoder_may_hold_more_than_its_hidden_states_need(folder: Path):
    wanted = load_checkpoint(folder).text_encoder.state_dict()

    def as_once_saved(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors["text_model." + name.removeprefix("text_model.")] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(tiny.MAX_TOKENS)[None]
        tensors["text_projection.weight"] = torch.ones(tiny.CROSS_WIDTH, tiny.CROSS_WIDTH)

    edit_weights(folder / TEXT_WEIGHTS, as_once_saved)
    got = load_checkpoint(folder).text_encoder.state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_says_which_weight_is_not_finite(folder: Path, value: float):
    edit_weights(
        folder / UNET_WEIGHTS, lambda tensors: tensors["conv_out.bias"].__setitem__(3, value)
    )
    with pytest.raises(
        CheckpointError,
        match=r"finite weights, got NaN or infinity in conv_out\.bias \(as float32\)",
    ):
        load_checkpoint(folder)


def test_says_which_components_do_not_fit_each_other(folder: Path):
    tiny.tiny_vae(latent_channels=8).save_pretrained(folder / "vae")
    with pytest.raises(
        CheckpointError, match=r"unet must read and write the vae's 8 latent channels, got 4 and 4"
    ):
        load_checkpoint(folder)
    tokenizer = load_checkpoint_tokenizer(folder)
    tiny.tiny_text_encoder(tokenizer, hidden_size=32).save_pretrained(folder / "text_encoder")
    with pytest.raises(
        CheckpointError, match=r"unet must read text of the text_encoder's width 32, got 16"
    ):
        load_checkpoint(folder)
    tiny.tiny_text_encoder(tokenizer, vocab_size=600).save_pretrained(folder / "text_encoder")
    tiny.tiny_vae().save_pretrained(folder / "vae")
    with pytest.raises(
        CheckpointError,
        match=rf"tokenizer must know at most the text_encoder's 600 tokens, got {len(tokenizer)}",
    ):
        load_checkpoint(folder)


def load_checkpoint_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder / "tokenizer")


def test_says_that_an_adapter_does_not_fit(base_and_adapter: tuple[Path, Path], tmp_path: Path):
    base, adapter = base_and_adapter
    other = tmp_path / "other"
    for changes in (
        {"block_out_channels": (16, 32)},
        {"block_out_channels": (16, 16, 32)},
        {"motion_layers_per_block": 2},
    ):
        tiny.tiny_adapter(**changes).save_pretrained(other)
        with pytest.raises(
            CheckpointError,
            match=rf"motion adapter {other} must fit the image model {base / 'unet'}: ",
        ):
            load_checkpoint(base, motion_adapter=other)
    with pytest.raises(
        CheckpointError,
        match=r"motion_adapter must be the MotionAdapter that was asked for, got UNet2DConditionModel",
    ):
        load_checkpoint(base, motion_adapter=base / "unet")
    with pytest.raises(
        CheckpointError, match=r"motion adapter must be a folder that exists or a hub id"
    ):
        load_checkpoint(base, motion_adapter="nowhere")
    variant = shutil.copytree(adapter, tmp_path / "variant")
    weights = variant / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    with pytest.raises(
        CheckpointError, match=r"got diffusion_pytorch_model\.fp16\.safetensors; rename one"
    ):
        load_checkpoint(base, motion_adapter=variant)
