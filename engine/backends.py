"""The back ends that can run a denoiser, by name.

"eager" and "compiled" run the loaded network itself. Those of `EXPORTED` run one that was exported,
and are a part of `kinetiq.export`, which is imported only when one of them is asked for; nothing of
the engine depends on it. "auto" is none of them, but the one that `kinetiq.backend_choice` chooses.
"""

import importlib
import os
from collections.abc import Collection
from typing import TYPE_CHECKING

from kinetiq.errors import RequestError

if TYPE_CHECKING:
    import torch

    from kinetiq.checkpoint import Checkpoint
    from kinetiq.denoiser import Denoiser

EAGER = "eager"
COMPILED = "compiled"
AUTO = "auto"
ON_GPU = ("tensorrt", "tensorrt-rtx")  # which run nowhere else
EXPORTED = ("onnxruntime", "openvino", *ON_GPU)
BACKENDS = (EAGER, COMPILED, *EXPORTED)
_LOADER = "kinetiq.export.loading"  # by name: the engine must not import what is built on it


def check_backend(
    backend: str, network: str | os.PathLike[str] | None, trust: str | Collection[str]
) -> None:
    """Raise a `RequestError` unless a back end, and what it is to run, have a meaning."""
    if backend not in (*BACKENDS, AUTO):
        raise RequestError(
            f"load: backend must be one of {', '.join(BACKENDS)}, or {AUTO}, got {backend!r}"
        )
    if backend not in EXPORTED and (network is not None or trust):
        given = "network" if network is not None else "trust"
        raise RequestError(
            f"load: {given} needs a backend that runs an exported network, "
            f"{', '.join(EXPORTED)}, got {backend!r}"
        )


def usual_device(backend: str) -> str:
    """The device that a back end runs on where none is asked for."""
    return "cuda" if backend in ON_GPU else "cpu"


def check_machine(backend: str, device: "str | torch.device") -> None:
    """Raise, before a model is loaded, unless a back end of `EXPORTED` can run here.

    Raises:
        MissingDependencyError: a package or a device is missing.
        RequestError: it does not run on such a device.
    """
    importlib.import_module(_LOADER).check_machine(backend, device)


def attach_denoiser(backend: str, checkpoint: "Checkpoint") -> "Denoiser":
    """The denoiser of a back end that runs the loaded network, with our modules in it."""
    if backend == EAGER:
        from kinetiq.denoiser import EagerDenoiser

        return EagerDenoiser(checkpoint.unet).attach()
    from kinetiq.compiled import CompiledDenoiser  # loads PyTorch's compiler

    return CompiledDenoiser(checkpoint.unet).attach()


def load_exported(
    backend: str,
    checkpoint: "Checkpoint",
    network: str | os.PathLike[str] | None,
    trust: str | Collection[str],
) -> "Denoiser":
    """The denoiser of a back end of `EXPORTED`; see `kinetiq.export.loading`."""
    denoiser: Denoiser = importlib.import_module(_LOADER).load_denoiser(
        backend, checkpoint, network=network, trust=trust
    )
    return denoiser
