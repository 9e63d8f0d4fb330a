"""Turn a model folder with pickled weights into one with safetensors.

A pickle can run any code when it is read, so Kinetiq reads none when it generates. Here they are
read once, by PyTorch's reader of plain tensors (`weights_only=True`), which runs no code.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinetiq.errors import CheckpointError, RequestError
from kinetiq.files import replacing, write_tensors

# as diffusers and transformers name them: stem, variant, shard, and the older place of a variant
_PICKLED = re.compile(
    r"(diffusion_pytorch_model|pytorch_model)((?:\.\w+)?(?:-\d{5}-of-\d{5})?(?:\.\w+)?)\.bin"
)
_INDEX = re.compile(r"(.+\.bin)(\.index(?:\.\w+)?\.json)")
_STEMS = {"diffusion_pytorch_model": "diffusion_pytorch_model", "pytorch_model": "model"}
_KEPT = (".json", ".txt", ".safetensors", ".model")


def convert_folder(
    source: Path, out: Path, report: Callable[[str], None] = lambda _: None
) -> list[Path]:
    """Copy a diffusers folder to `out` with its pickled weights as safetensors.

    Args:
        source: a folder with a model_index.json, or one component's folder.
        out: a new or empty folder.
        report: told of each file that is converted.

    Returns:
        The weights files that were written, relative to `out`.

    Raises:
        CheckpointError: `source` is not such a folder, holds no pickled weights, a file holds
            anything but tensors, or the map of shards is damaged.
        OutputError: `out` cannot be written.
    """
    if source.is_file():
        raise CheckpointError(
            f"convert: {source} must be a folder of a model, got a file; {single_file_advice()}"
        )
    if not source.is_dir():
        raise CheckpointError(f"convert: {source} must be a folder of a model, and is not there")
    pickles = sorted(path for path in source.rglob("*.bin") if converted_name(path.name))
    if not pickles:
        raise CheckpointError(
            f"convert: {source} must hold weights such as diffusion_pytorch_model.bin or "
            "pytorch_model.bin, got none"
        )
    written = []
    with replacing(out, "convert", folder=True) as temporary:
        for path in sorted(source.rglob("*")):
            target = temporary / path.relative_to(source)
            if path.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            elif path in pickles:
                report(str(path.relative_to(source)))
                target = target.with_name(converted_name(path.name) or path.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                _save(_read_tensors(path), target)
                written.append(target.relative_to(temporary))
            elif index_name := _converted_index_name(path.name):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.with_name(index_name).write_text(_convert_index(path), encoding="utf-8")
            elif path.suffix in _KEPT:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    return written


def default_target(source: Path) -> Path:
    """Where `source` is converted to unless it is said: beside it, "-safetensors" at the end.

    Raises:
        RequestError: `source` has no name to add to.
    """
    named = source.resolve() if source.name in ("", "..") else source
    if not named.name:
        raise RequestError(f"convert: --out must be given for {source}, which has no name")
    return named.with_name(named.name + "-safetensors")


def converted_name(name: str) -> str | None:
    """The name that a pickled weights file has as safetensors; None where loaders read no such."""
    found = _PICKLED.fullmatch(name)
    return None if found is None else f"{_STEMS[found[1]]}{found[2]}.safetensors"


def single_file_advice(what: str = "model") -> str:
    """What to do with a "model", or a "motion adapter", that is a single file."""
    if what == "motion adapter":
        return (
            "turn it into a diffusers folder with "
            "diffusers.MotionAdapter.from_single_file(file).save_pretrained(folder)"
        )
    return (
        "turn a single-file checkpoint into a diffusers folder with diffusers' "
        "scripts/convert_original_stable_diffusion_to_diffusers.py, or with "
        "StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)"
    )


def _converted_index_name(name: str) -> str | None:
    """The new name of the map of a sharded model; None where the file is none."""
    found = _INDEX.fullmatch(name)
    stem = None if found is None else converted_name(found[1])
    return None if found is None or stem is None else stem + found[2]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a reader of foreign bytes may raise has no end
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"convert: {path} must be a pickle of plain tensors, which can be read without running "
            f"its code, and is not ({reason})"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"convert: {path} must map names to tensors, and holds other things")
    return content


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    # Cloned, because tensors that share memory have no place in a safetensors file.
    whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, whole, {"format": "pt"})


def _convert_index(path: Path) -> str:
    """The map of a sharded model's weights to its files, with the files' new names."""
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"convert: {path} must be readable JSON: {error}") from error
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise CheckpointError(
            f"convert: {path} must have a weight_map of weights to file names, and has none"
        )
    index["weight_map"] = {name: converted_name(file) or file for name, file in names.items()}
    return json.dumps(index, indent=2) + "\n"
