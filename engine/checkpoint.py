"""Load a diffusers pipeline folder: the embedded one, a local one or one from a hub.

All three go through the same code. Each component is loaded by its own stock class from
safetensors only; a pickle can run code, so it is never opened. What the stock loaders let pass
with a line in a log (a weight that is missing and drawn at random, a key of the configuration
that nobody reads) is an error here, and so is a weight that is not finite.
"""

import contextlib
import functools
import importlib
import importlib.resources
import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from kinetiq.convert import converted_name, single_file_advice
from kinetiq.errors import CheckpointError, MissingDependencyError, RequestError, WorkError
from kinetiq.families import FAMILIES
from kinetiq.model_files import ModelFiles

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
"""Names of the number types that a checkpoint can be loaded in."""

SETTINGS = "kinetiq.json"
"""Name of the file in a model's folder that says what a request may leave out."""

_BASE_UNET = "UNet2DConditionModel"
_UNETS = {family.network: family.name for family in FAMILIES.values()}
_LIBRARIES = {
    **dict.fromkeys((*_UNETS, _BASE_UNET, "AutoencoderKL", "MotionAdapter"), "diffusers"),
    **dict.fromkeys(("CLIPTextModel", "CLIPTokenizer", "CLIPTokenizerFast"), "transformers"),
}
_FOLDERS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "motion_adapter")
_SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A loaded text-to-video model, in evaluation mode and without gradients.

    Args:
        name: what the user asked for: "sprites", a hub id, or the folder's name.
        path: the folder that it was read from.
        family: a name of `kinetiq.families.FAMILIES`.
        unet: UNetMotionModel or UNet3DConditionModel.
        vae: AutoencoderKL.
        text_encoder: CLIPTextModel.
        tokenizer: CLIPTokenizer.
        scheduler: class name of the diffusers scheduler.
        scheduler_config: what its scheduler_config.json says, read-only, once the stock class has
            accepted it. `dict(scheduler_config)` is what `from_config` of any scheduler takes.
        identify: what makes the fingerprint, when it is asked for; see `kinetiq.model_files`.
    """

    name: str
    path: Path | None
    family: str
    unet: Any = field(repr=False)
    vae: Any = field(repr=False)
    text_encoder: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    scheduler: str
    scheduler_config: Mapping[str, Any] = field(repr=False)
    identify: Callable[[], str] = field(repr=False)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hexadecimal digest that tells checkpoints apart.

        It is the same wherever they lie, and whatever the device and the number type.

        Raises:
            CheckpointError: the files are no longer what was loaded.
        """
        return self.identify()

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        device: torch.device = self.unet.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The number type of the denoiser, the VAE and the text encoder."""
        dtype: torch.dtype = self.unet.dtype
        return dtype


def load_checkpoint(
    source: str | Path,
    *,
    motion_adapter: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    half_on_cpu: bool = False,
) -> Checkpoint:
    """Load a diffusers text-to-video pipeline.

    Args:
        source: "sprites" (the embedded model), a folder with a model_index.json, or a hub id
            "owner/name". A folder that exists wins over a hub id of the same name.
        motion_adapter: folder or hub id of a diffusers MotionAdapter, where `source` is an image
            model (SD 1.5). An adapter that lies in the folder of an image model is used without
            being named; the one named here wins.
        device: "cpu", "cuda" or "cuda:<index>".
        dtype: a value or a key of `DTYPES`, for all components; None is float32. float16 is
            refused on a CPU unless `half_on_cpu`.
        variant: of the weights files, as in "fp16" for `model.fp16.safetensors`.
        revision: branch, tag or commit of a hub repository.
        local_files_only: use what is downloaded already and leave the network alone.
        half_on_cpu: take float16 on a CPU too, for what is exported or compared.

    Raises:
        CheckpointError: the source, a component or a weights file is missing, cannot be read or
            does not fit; or the download failed.
        RequestError: an option, or a combination of options, has no meaning.
        MissingDependencyError: the device is not there.
    """
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    if device.type == "cpu" and dtype == torch.float16 and not half_on_cpu:
        raise RequestError(
            "load: dtype must be float32 or bfloat16 on a CPU, got float16 (slow and imprecise "
            "there); pass one of them, or device='cuda'"
        )
    found = _find(source, motion_adapter, variant, revision, local_files_only)
    folder, name, parts = found.folder, found.name, found.parts
    files = found.look_at_files()
    # Stock classes draw random weights before they read the file's: the caller's state is kept.
    with _quiet(), torch.random.fork_rng(devices=[]):
        loaded = {part.name: part.load(dtype) for part in parts}
        tokenizer = _load_tokenizer(folder / "tokenizer", found.tokenizer)
        scheduler_config = _load_scheduler_config(folder, found.scheduler)
        unet = loaded["unet"]
        if "motion_adapter" in loaded:
            unet = _inflate(unet, loaded["motion_adapter"], parts)
    vae, text_encoder = loaded["vae"], loaded["text_encoder"]
    _require_fit(folder, unet, vae, text_encoder, tokenizer)
    for module in (unet, vae, text_encoder):
        try:
            module.to(device).eval().requires_grad_(False)
        except torch.OutOfMemoryError as error:
            raise WorkError(
                f"load: device {str(device)!r} must have room for the {type(module).__name__} of "
                f"{name}, and its memory is full; free some, or load a smaller dtype than {dtype}"
            ) from error
    return Checkpoint(
        name=name,
        path=folder,
        family=_UNETS[type(unet).__name__],
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=found.scheduler,
        scheduler_config=scheduler_config,
        identify=files.fingerprint,
    )


def find_local_model(
    source: str | Path, motion_adapter: str | Path | None = None
) -> "ModelSource | None":
    """Where a model lies that `load_checkpoint` would not look for on a hub; None if it would.

    Args:
        source: as `load_checkpoint` takes it.
        motion_adapter: likewise.

    Raises:
        CheckpointError: the folder is not of a model.
        RequestError: a motion adapter is given to a model that has motion modules.
    """
    asked = [source] if motion_adapter is None else [source, motion_adapter]
    if not all(one == "sprites" or _is_folder(one) for one in asked):
        return None
    return _find(source, motion_adapter, None, None, local_files_only=True)


def embedded_folder() -> Path:
    """The folder of the embedded model "sprites".

    Raises:
        CheckpointError: the package was installed without it.
    """
    folder = Path(str(importlib.resources.files("kinetiq.sprites") / "checkpoint"))
    if not folder.is_dir():
        raise CheckpointError(
            f"load: the embedded model 'sprites' must be at {folder}, and it is missing; install "
            "the package again, or train it with kinetiq.sprites.training"
        )
    return folder


def parse_device(device: str | torch.device) -> torch.device:
    """The device that `device` names, whether it is there or not.

    Raises:
        RequestError: it is neither a CPU nor a CUDA device.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise RequestError(
            f"device: must be 'cpu', 'cuda' or 'cuda:<index>', got {device!r}"
        ) from error
    if found.type not in ("cpu", "cuda"):
        raise RequestError(f"device: must be 'cpu', 'cuda' or 'cuda:<index>', got {str(found)!r}")
    return found


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that `device` names.

    Raises:
        RequestError: it is neither a CPU nor a CUDA device.
        MissingDependencyError: it is a CUDA device that this machine or this PyTorch lacks.
    """
    found = parse_device(device)
    if found.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise MissingDependencyError(
            f"device: {str(found)!r} needs an NVIDIA GPU and a PyTorch built for CUDA, and "
            "torch.cuda.is_available() is False; pass device='cpu'"
        )
    if (found.index or 0) >= torch.cuda.device_count():
        raise MissingDependencyError(
            f"device: must be one of the {torch.cuda.device_count()} GPUs of this machine, "
            f"counted from 0, got {str(found)!r}"
        )
    return found


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """The number type that `dtype` names; None is float32.

    Raises:
        RequestError: it is not in `DTYPES`.
    """
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise RequestError(f"load: dtype must be one of {_listed(DTYPES)}, got {dtype!r}")


@dataclass(frozen=True)
class ModelSource:
    """Where all of a model lies, and which stock classes read it.

    Args:
        name: what the user asked for: "sprites", a hub id, or the folder's name.
        folder: that holds it.
        parts: its components with weights.
        tokenizer: a class name.
        scheduler: likewise, of diffusers.
    """

    name: str
    folder: Path
    parts: "tuple[_Part, ...]"
    tokenizer: str
    scheduler: str

    def look_at_files(self) -> ModelFiles:
        """What its network and its other parts are read from, as it is now.

        Raises:
            CheckpointError: a configuration, weights or the tokenizer are missing.
        """
        _read_json(self.folder / _SCHEDULER_CONFIG, "scheduler")
        files = [file for part in self.parts for file in part.files()]
        files += _tokenizer_files(self.folder / "tokenizer")
        return ModelFiles.look_at(self.name, [*files, self.folder / _SCHEDULER_CONFIG])

    def look_at_settings(self) -> ModelFiles:
        """What says which parts it has, and how it is used, as it is now."""
        return ModelFiles.look_at(
            self.name, [self.folder / name for name in ("model_index.json", SETTINGS)]
        )

    def read_settings(self) -> dict[str, Any]:
        """What its `kinetiq.json` says, if there is one.

        Raises:
            CheckpointError: it cannot be read.
        """
        path = self.folder / SETTINGS
        return _read_json(path, "settings") if path.exists() else {}


@dataclass(frozen=True)
class _Part:
    """A component with weights: where it lies and which stock class reads it."""

    name: str
    folder: Path
    class_name: str
    variant: str | None
    given: Path  # the folder that the user named, or that was downloaded: the model's or its own

    def load(self, dtype: torch.dtype) -> Any:
        """The module on the CPU, every weight of the configuration read and finite."""
        config = self._config()
        for file in self._weights():
            _require_readable(file, self.name)
        library = _LIBRARIES[self.class_name]
        stock = getattr(importlib.import_module(library), self.class_name)
        options: dict[str, Any] = {"dtype": dtype}
        if library == "diffusers":
            self._require_known_keys(config, stock)
            # The alternative needs a package that is no dependency of ours.
            options = {"torch_dtype": dtype, "low_cpu_mem_usage": False}
        try:
            module, info = stock.from_pretrained(
                self.folder,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                variant=self.variant,
                **options,
            )
        # Whatever a stock class raises at this point, it is the folder that it cannot read.
        except Exception as error:
            raise CheckpointError(
                f"load: {self.name} in {self.folder} must be a {self.class_name} whose config.json "
                f"and weights agree: {_first_lines(error)}"
            ) from error
        self._require_complete(info)
        self._require_finite(module)
        _detach_from_file(module)
        return module

    def files(self) -> list[Path]:
        """Configuration and weights files, all of which are there."""
        self._config()
        return [self.folder / "config.json", *self._weights()]

    def _config(self) -> dict[str, Any]:
        if not self.folder.is_dir():
            raise CheckpointError(
                f"load: {self.name} must be a folder at {self.folder}, and it is missing"
            )
        config = _read_json(self.folder / "config.json", self.name)
        came = config.get("_class_name", self.class_name)
        if came != self.class_name:
            raise CheckpointError(
                f"load: {self.name} must be the {self.class_name} that was asked for, got {came} "
                f"in {self.folder / 'config.json'}"
            )
        return config

    def _weights(self) -> list[Path]:
        """The safetensors files that the stock class will read."""
        stem = self._stem()
        dotted = "" if self.variant is None else f".{self.variant}"
        single = self.folder / f"{stem}{dotted}.safetensors"
        shards = self.folder / f"{stem}.safetensors.index{dotted}.json"
        if single.is_file() and shards.is_file():  # of which libraries choose differently
            raise CheckpointError(
                f"load: {self.name} must have its weights once, and {self.folder} has both "
                f"{single.name} and {shards.name}; move one away"
            )
        if single.is_file():
            return [single]
        if not shards.is_file():
            raise CheckpointError(self._missing_weights(single))
        names = _read_json(shards, self.name).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise CheckpointError(
                f"load: {self.name} must have a weight_map of file names in {shards}, got none"
            )
        files = [self.folder / file for file in sorted(set(names.values()))]
        for file in files:
            if not file.is_file():
                raise CheckpointError(
                    f"load: {self.name} must have all the files that {shards.name} names, and "
                    f"{file} is missing"
                )
        return files

    def _stem(self) -> str:
        """What the names of the weights files begin with."""
        library = _LIBRARIES[self.class_name]
        return "model" if library == "transformers" else "diffusion_pytorch_model"

    def _missing_weights(self, wanted: Path) -> str:
        here = sorted(self.folder.iterdir())
        others = [file.name for file in here if file.suffix == ".safetensors"]
        pickles = [file.name for file in here if file.suffix in _PICKLES]
        message = f"load: {self.name} must have its weights in {wanted}, "
        if others:
            # The variant of a model says nothing about the adapter that is put into it.
            choose = "rename one" if self.name == "motion_adapter" else "choose with variant="
            return f"{message}got {', '.join(others)}; {choose}"
        if pickles:
            refusal = (
                f"{message}got {', '.join(pickles)}, a pickle, which is refused because opening it "
                "can run any code; "
            )
            if any((converted_name(name) or "").startswith(self._stem()) for name in pickles):
                return f"{refusal}convert it with `kinetiq convert {self.given}`"
            return (
                f"{refusal}it has not the name of a {self.class_name}'s weights and cannot be "
                "converted here: load it with the code that wrote it, and save it with "
                "save_pretrained(folder)"
            )
        return (
            f"{message}and no weights are there; a repository that has them as .bin only must be "
            "downloaded by hand and converted with `kinetiq convert <folder>`"
        )

    def _require_known_keys(self, config: Mapping[str, Any], stock: Any) -> None:
        known = inspect.signature(stock.__init__).parameters
        unknown = [key for key in config if key not in known and not key.startswith("_")]
        if unknown:
            raise CheckpointError(
                f"load: {self.folder / 'config.json'} must hold only options of {self.class_name}, "
                f"got {_listed(unknown)}; if they mean nothing for the weights, take them out"
            )

    def _require_complete(self, info: Mapping[str, Any]) -> None:
        missing = sorted(info["missing_keys"])
        if missing:
            raise CheckpointError(
                f"load: {self.name} in {self.folder} must have all weights of its config.json, and "
                f"{len(missing)} are missing, the first is {missing[0]}"
            )
        # A text encoder is often saved with its projection or its position numbers, which its
        # hidden states do not depend on. Elsewhere a weight without a place is another network.
        unexpected = sorted(info["unexpected_keys"])
        if unexpected and self.name != "text_encoder":
            raise CheckpointError(
                f"load: {self.name} in {self.folder} must have no weights beyond its config.json, "
                f"got {len(unexpected)} of them, the first is {unexpected[0]}"
            )

    def _require_finite(self, module: nn.Module) -> None:
        for name, tensor in module.state_dict().items():
            # Least and greatest value in one pass and without a mask: both carry NaN along.
            if tensor.is_floating_point() and tensor.numel():
                least, greatest = torch.aminmax(tensor)
                if not (least.isfinite() and greatest.isfinite()):
                    raise CheckpointError(
                        f"load: {self.name} in {self.folder} must have finite weights, got NaN or "
                        f"infinity in {name} (as {str(tensor.dtype).removeprefix('torch.')})"
                    )


def _find(
    source: str | Path,
    motion_adapter: str | Path | None,
    variant: str | None,
    revision: str | None,
    local_files_only: bool,
) -> ModelSource:
    """Where a model lies, downloaded if need be, of classes that can be loaded."""
    folder, name = _locate(source, "model", variant, revision, local_files_only)
    index = _read_json(folder / "model_index.json", "model_index.json")
    unet_class = _class_of(index, "unet", folder)
    if unet_class not in (*_UNETS, _BASE_UNET):
        raise CheckpointError(
            f"load: unet of {folder} must be one of {_listed(_UNETS)}, or {_BASE_UNET} with a "
            f"motion adapter, got {unet_class}"
        )
    if motion_adapter is not None and unet_class in _UNETS:
        raise RequestError(
            f"load: motion_adapter must be left out for {name}, whose {unet_class} already holds "
            "its motion modules"
        )
    classes = {"unet": unet_class}
    classes |= {each: _require_class(index, each, folder) for each in ("vae", "text_encoder")}
    parts = [_Part(each, folder / each, kind, variant, folder) for each, kind in classes.items()]
    if unet_class == _BASE_UNET:
        parts.append(
            _locate_adapter(index, folder, motion_adapter, variant, revision, local_files_only)
        )
    return ModelSource(
        name,
        folder,
        tuple(parts),
        _require_class(index, "tokenizer", folder),
        _class_of(index, "scheduler", folder),
    )


def _locate(
    source: object,
    what: str,
    variant: str | None,
    revision: str | None,
    local_files_only: bool,
) -> tuple[Path, str]:
    """The folder of a model or a motion adapter, downloaded if need be, and its name."""
    if not isinstance(source, str | Path) or source == "":
        raise RequestError(f"load: {what} must be a name, a folder or a hub id, got {source!r}")
    if source == "sprites" and what == "model":
        _require_local(source, revision)
        return embedded_folder(), "sprites"
    try:
        folder = Path(source).expanduser()
        exists, is_folder = folder.exists(), folder.is_dir()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"load: {what} must be a path that can be read: {error}") from error
    if is_folder:
        _require_local(source, revision)
        return folder, folder.resolve().name
    if exists:
        raise CheckpointError(
            f"load: {what} must be a folder in the layout of diffusers, got the file {folder}; "
            f"{single_file_advice(what)}"
        )
    if isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII):
        return _download(source, what, variant, revision, local_files_only), source
    words = "'sprites', " if what == "model" else ""
    raise CheckpointError(
        f"load: {what} must be {words}a folder that exists or a hub id 'owner/name', got "
        f"{str(source)!r}"
    )


def _is_folder(source: str | Path) -> bool:
    try:
        return Path(source).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # a name that none can have, or of an unknown user
        return False


def _require_local(source: str | Path, revision: str | None) -> None:
    if revision is not None:
        raise RequestError(
            f"load: revision must be left out for the local {str(source)!r}, got {revision!r}; "
            "only a hub repository has revisions"
        )


def _download(
    repository: str, what: str, variant: str | None, revision: str | None, local_files_only: bool
) -> Path:
    """Fetch the files of one variant of a hub repository: safetensors, json and txt only."""
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    prefixes = [f"{folder}/" for folder in _FOLDERS] if what == "model" else [""]
    weights = f"*.{variant}*.safetensors" if variant else "*.safetensors"
    patterns = ["model_index.json"]
    patterns += [prefix + kind for prefix in prefixes for kind in ("*.json", "*.txt", weights)]
    asked = f"{repository!r}" + (f" at revision {revision!r}" if revision else "")
    hide_bars = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hide_bars:
        disable_progress_bars()
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=None if variant else ["*.*.safetensors"],
            local_files_only=local_files_only,
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"load: {what} {asked} must be open to you, and its owner wants terms to be accepted "
            "first; accept them on its page and log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"load: {what} {asked} must be a revision that exists, and the hub does not know it"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"load: {what} {asked} must be a folder that exists or a repository of the hub, got "
            "neither; if it is private, log in with `hf auth login`"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"load: {what} {asked} must be a folder that exists, or on this machine already when "
            "the hub cannot be reached or must not be (local_files_only, offline mode); connect "
            "once, or give a folder"
        ) from error
    # The kinds of failure of a network are open-ended, and each HTTP library has its own.
    except Exception as error:
        raise CheckpointError(
            f"load: {what} {asked} must be downloaded, and that failed: "
            f"{type(error).__name__}: {_first_lines(error)}"
        ) from error
    finally:
        if hide_bars:
            enable_progress_bars()
    return Path(folder)


def _locate_adapter(
    index: Mapping[str, Any],
    folder: Path,
    motion_adapter: str | Path | None,
    variant: str | None,
    revision: str | None,
    local_files_only: bool,
) -> _Part:
    if motion_adapter is None:
        if index.get("motion_adapter") in (None, [None, None]):
            raise CheckpointError(
                f"load: {folder} holds an image model ({_BASE_UNET}), which must be given motion; "
                "pass a MotionAdapter with --motion-adapter (motion_adapter=)"
            )
        _require_class(index, "motion_adapter", folder)
        return _Part("motion_adapter", folder / "motion_adapter", "MotionAdapter", variant, folder)
    # Variant and revision were asked of the image model.
    where, _ = _locate(motion_adapter, "motion adapter", None, None, local_files_only)
    return _Part("motion_adapter", where, "MotionAdapter", None, where)


def _class_of(index: Mapping[str, Any], component: str, folder: Path) -> str:
    """The class that model_index.json gives for `component`."""
    entry = index.get(component)
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
        raise CheckpointError(
            f"load: {component} must be named as [library, class] in {folder / 'model_index.json'},"
            f" got {entry!r}"
        )
    return entry[1]


def _require_class(index: Mapping[str, Any], component: str, folder: Path) -> str:
    wanted = {
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "motion_adapter": ("MotionAdapter",),
    }[component]
    came = _class_of(index, component, folder)
    if came not in wanted:
        raise CheckpointError(
            f"load: {component} of {folder} must be a {' or '.join(wanted)}, got {came}"
        )
    return came


def _tokenizer_files(folder: Path) -> list[Path]:
    whole, halves = folder / "tokenizer.json", (folder / "vocab.json", folder / "merges.txt")
    if not whole.is_file() and not all(file.is_file() for file in halves):
        raise CheckpointError(
            f"load: tokenizer must have tokenizer.json, or vocab.json and merges.txt, in {folder}"
        )
    return [file for file in folder.iterdir() if file.suffix in (".json", ".txt")]


def _load_tokenizer(folder: Path, class_name: str) -> Any:
    stock = getattr(importlib.import_module(_LIBRARIES[class_name]), class_name)
    try:
        return stock.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as in _Part.load
        raise CheckpointError(
            f"load: tokenizer in {folder} must be a {class_name}: {_first_lines(error)}"
        ) from error


def _load_scheduler_config(model: Path, class_name: str) -> Mapping[str, Any]:
    import diffusers

    config = _read_json(model / _SCHEDULER_CONFIG, "scheduler")
    folder = model / "scheduler"
    stock = getattr(diffusers, class_name, None)
    if not (isinstance(stock, type) and issubclass(stock, diffusers.SchedulerMixin)):
        raise CheckpointError(
            f"load: scheduler in {folder} must be a scheduler of diffusers, got {class_name}"
        )
    try:
        stock.from_pretrained(folder, local_files_only=True)  # type: ignore[attr-defined]
    except Exception as error:  # as in _Part.load
        raise CheckpointError(
            f"load: scheduler in {folder} must be a {class_name}: {_first_lines(error)}"
        ) from error
    return MappingProxyType(config)


def _inflate(unet: Any, adapter: Any, parts: Iterable[_Part]) -> Any:
    """A UNetMotionModel of an image denoiser and the motion modules of an adapter."""
    from diffusers import UNetMotionModel

    folders = {part.name: part.folder for part in parts}
    try:
        return UNetMotionModel.from_unet2d(unet, adapter)
    except Exception as error:  # as in _Part.load
        raise CheckpointError(
            f"load: motion adapter {folders['motion_adapter']} must fit the image model "
            f"{folders['unet']}: {_first_lines(error)}"
        ) from error


def _require_fit(folder: Path, unet: Any, vae: Any, text_encoder: Any, tokenizer: Any) -> None:
    """Raise unless the components of `folder` fit each other."""
    width = text_encoder.config.hidden_size
    widths = unet.config.cross_attention_dim
    tokens, positions = tokenizer.model_max_length, text_encoder.config.max_position_embeddings
    words = len(tokenizer)
    channels = vae.config.latent_channels
    problem = None
    if any(came != width for came in (widths if isinstance(widths, tuple | list) else [widths])):
        problem = f"unet must read text of the text_encoder's width {width}, got {widths}"
    elif (unet.config.in_channels, unet.config.out_channels) != (channels, channels):
        came = f"{unet.config.in_channels} and {unet.config.out_channels}"
        problem = f"unet must read and write the vae's {channels} latent channels, got {came}"
    elif unet.config.get("addition_embed_type") or unet.config.get("encoder_hid_dim_type"):
        problem = "unet must be conditioned on time and text alone, got an extra embedding (SDXL?)"
    elif not 2 < tokens <= positions:
        problem = f"tokenizer must have model_max_length in 3..{positions}, got {tokens}"
    elif words > text_encoder.config.vocab_size:
        known = text_encoder.config.vocab_size
        problem = f"tokenizer must know at most the text_encoder's {known} tokens, got {words}"
    if problem:
        raise CheckpointError(f"load: {folder}: {problem}")


def _detach_from_file(module: nn.Module) -> None:
    """Give the weights memory of their own.

    They are mapped from the file: whoever overwrites it would change or kill the running model,
    and the length of its header would decide their alignment, and with it the last bits of what
    they compute.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()


def _require_readable(file: Path, component: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):  # checks the header against the file's size
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"load: {component} must have a whole safetensors file at {file}, and it is damaged or "
            f"cut short ({error}); fetch it again"
        ) from error


def _read_json(file: Path, component: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"load: {component} must be at {file}, and it is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"load: {component} must be readable JSON at {file}: {error}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"load: {component} must be a JSON object at {file}, got {type(content).__name__}"
        )
    return content


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep diffusers, transformers and Python's warnings silent inside the block."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    former = [(lib, lib.get_verbosity(), lib.is_progress_bar_enabled()) for lib in libraries]
    for library in libraries:
        library.set_verbosity(library.CRITICAL)
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, verbosity, shown in former:
            library.set_verbosity(verbosity)
            if shown:
                library.enable_progress_bar()


def _first_lines(error: BaseException) -> str:
    """What a stock class has to say, without the pages that may follow."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + " ..."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
