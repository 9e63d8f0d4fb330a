"""What export needs beyond the core packages."""

import importlib
import importlib.util
import re
from typing import Any

import torch

from kinetiq.errors import MissingDependencyError

_GPU_RUNTIMES = {  # runtime → (what it is called, the extra that brings it)
    "tensorrt": ("TensorRT", "tensorrt"),
    "tensorrt-rtx": ("TensorRT for RTX", "rtx"),
}


def require_packages(*names: str) -> None:
    """Raise a `MissingDependencyError` unless all packages are there."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f'export: needs {", ".join(missing)}, and it is not installed: pip install ".[export]"'
        )


def is_older(version: str, than: str) -> bool:
    """Whether a version comes before another, by the numbers that it begins with."""

    def numbers(text: str) -> list[int]:
        found = re.match(r"\d+(\.\d+)*", text)
        return [int(number) for number in found[0].split(".")] if found else []

    return numbers(version) < numbers(than)


def load_gpu_runtime(runtime: str, where: str, without_gpu: str | None = None) -> Any:
    """The package of TensorRT or of TensorRT for RTX.

    Args:
        runtime: "tensorrt" or "tensorrt-rtx".
        where: what the message of an error begins with.
        without_gpu: what to do on a machine without a GPU; None: no GPU is needed.

    Raises:
        MissingDependencyError: it, or a GPU that is needed, is missing; the message names all that
            is.
    """
    words, extra = _GPU_RUNTIMES[runtime]
    module = runtime.replace("-", "_")
    missing, package = [], None
    try:
        package = importlib.import_module(module)
    except ImportError as error:
        missing.append(
            f'{words}, and {module} cannot be imported ({error}): pip install ".[{extra}]"'
        )
    if without_gpu is not None and not torch.cuda.is_available():
        missing.append(f"an NVIDIA GPU that PyTorch can use; {without_gpu}")
    if missing:
        raise MissingDependencyError(f"{where}: needs {'; and '.join(missing)}")
    return package
