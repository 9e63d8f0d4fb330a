"""Turn a model folder with pickled weights into one with safetensors.

A pickle can run any code when it is read, so Kinetiq reads none when it generates. Here they are
read once, by PyTorch's reader of plain tensors (`weights_only=True`), which runs no code.
"""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinetiq.clip import replacing
from kinetiq.errors import CheckpointError

_NAMES = {"diffusion_pytorch_model": "diffusion_pytorch_model", "pytorch_model": "model"}
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
        CheckpointError: `source` is not such a folder, holds no pickled weights, or a file holds
            anything but tensors.
        OutputError: `out` cannot be written.
    """
    if not source.is_dir():
        raise CheckpointError(f"convert: {source} must be a folder of a model, and is not there")
    pickles = sorted(path for path in source.rglob("*.bin") if _new_name(path) is not None)
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
                target = target.with_name(str(_new_name(path)))
                target.parent.mkdir(parents=True, exist_ok=True)
                _save(_read_tensors(path), target)
                written.append(target.relative_to(temporary))
            elif path.name.endswith(".bin.index.json"):
                _convert_index(path, target)
            elif path.suffix in _KEPT:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    return written


def _new_name(path: Path) -> str | None:
    """The name of the safetensors file; None where the file is not a model's weights."""
    for old, new in _NAMES.items():
        if path.name.startswith(old) and path.suffix == ".bin":
            return new + path.name.removeprefix(old).removesuffix(".bin") + ".safetensors"
    return None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"convert: {path} must be a pickle of plain tensors, which can be read without running "
            f"its code, and is not ({reason})"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"convert: {path} must map names to tensors, and holds other things")
    return content


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    # Cloned, because tensors that share memory have no place in a safetensors file.
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, path, {"format": "pt"})


def _convert_index(path: Path, target: Path) -> None:
    """The map of a sharded model's weights to its files, with the files' new names."""
    index = json.loads(path.read_text())
    index["weight_map"] = {
        name: _new_name(Path(file)) or file for name, file in index["weight_map"].items()
    }
    name = str(_new_name(Path(path.name.removesuffix(".index.json")))) + ".index.json"
    target.with_name(name).write_text(json.dumps(index, indent=2) + "\n")
