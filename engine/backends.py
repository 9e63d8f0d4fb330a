"""The back ends that can run a denoiser, by name.

"eager" and "compiled" run the loaded network itself. All others run one that was exported, and are
a part of `kinetiq.export`, which is imported only when one of them is asked for; nothing of the
engine depends on it.
"""

import importlib
import os
from collections.abc import Collection
from typing import TYPE_CHECKING

from kinetiq.errors import RequestError

if TYPE_CHECKING:
    from kinetiq.checkpoint import Checkpoint
    from kinetiq.denoiser import Denoiser

EAGER = "eager"
COMPILED = "compiled"
ATTACHED = (EAGER, COMPILED)  # run the loaded network, with our modules in it
EXPORTED = ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")
BACKENDS = (*ATTACHED, *EXPORTED)
_LOADER = "kinetiq.export.loading"  # by name: the engine must not import what is built on it


def check_backend(
    backend: str, network: str | os.PathLike[str] | None, trust: str | Collection[str]
) -> None:
    """Raise a `RequestError` unless a back end, and what it is to run, have a meaning."""
    if backend not in BACKENDS:
        raise RequestError(f"load: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend in ATTACHED and (network is not None or trust):
        given = "network" if network is not None else "trust"
        raise RequestError(
            f"load: {given} needs a backend that runs an exported network, "
            f"{', '.join(EXPORTED)}, got {backend!r}"
        )


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
