"""Bringing a model to a back end: exported once, kept in the user's cache, checked when read."""

import logging
import os
from collections.abc import Collection
from pathlib import Path

import torch

from kinetiq.backends import ON_GPU
from kinetiq.checkpoint import Checkpoint, parse_device, resolve_device
from kinetiq.denoiser import Denoiser
from kinetiq.errors import CheckpointError, RequestError
from kinetiq.export import onnxruntime_denoiser, openvino_denoiser
from kinetiq.export.engine_profile import Bounds
from kinetiq.export.engine_rtx import build_rtx_engine
from kinetiq.export.engine_runtime import open_engine, require_gpu
from kinetiq.export.engine_tensorrt import build_engine, find_gpu
from kinetiq.export.functions import OPSET
from kinetiq.export.metadata import NetworkMetadata, precision_of, read_metadata
from kinetiq.export.network import export_onnx
from kinetiq.families import FAMILIES
from kinetiq.files import make_cache
from kinetiq.taps import DEFAULT_TAP, list_taps

_NAMED = 20  # digits of a fingerprint in the name of a file
_LOG = logging.getLogger(__name__)


def check_machine(backend: str, device: str | torch.device) -> None:
    """Raise, before a model is loaded for it, unless a back end can run here.

    Raises:
        MissingDependencyError: a package or a device is missing.
        RequestError: the back end does not run on such a device.
    """
    if backend in ON_GPU:
        require_gpu(backend, parse_device(device))
    elif backend == "onnxruntime":
        onnxruntime_denoiser.require_runtime(resolve_device(device))
    else:
        openvino_denoiser.require_runtime(resolve_device(device))


def load_denoiser(
    backend: str,
    checkpoint: Checkpoint,
    *,
    network: str | os.PathLike[str] | None = None,
    trust: str | Collection[str] = (),
) -> Denoiser:
    """The denoiser of a model on a back end.

    Args:
        backend: "onnxruntime", "openvino", "tensorrt" or "tensorrt-rtx".
        checkpoint: the model.
        network: an exported network, or an engine for the TensorRTs. None: the model is exported
            to the user's cache, once for each precision, and an engine is built there, once for
            each kind of GPU and version of the runtime.
        trust: checksums of engines that the caller vouches for.

    Raises:
        CheckpointError: the network is damaged, or another model's.
        MissingDependencyError: a package or a device is missing.
        OutputError: the cache cannot be written.
        RequestError: the back end cannot run this.
        WorkError: the export or the build failed.
    """
    device = checkpoint.device
    check_machine(backend, device)
    if backend in ON_GPU:
        return _load_engine(backend, checkpoint, network, trust)
    if trust:
        raise RequestError(f"load: trust is for engines of TensorRT, got it with {backend!r}")
    if backend == "onnxruntime":
        onnxruntime_denoiser.require_support(precision_of(checkpoint.dtype), device)
        path = _require_network(checkpoint, network)
        return onnxruntime_denoiser.OnnxruntimeDenoiser(path, device)
    path = _require_network(checkpoint, network)
    return openvino_denoiser.OpenvinoDenoiser(path, device)


def cached_network(checkpoint: Checkpoint) -> Path:
    """The model's export in the user's cache, made now unless it is there.

    It lies in `$XDG_CACHE_HOME/kinetiq/exports`, or `~/.cache/kinetiq/exports`, by fingerprint
    and precision, and carries all kinds of control and the default tap.

    Raises:
        OutputError: the cache cannot be written.
    """
    cache = _cache("exports")
    precision = precision_of(checkpoint.dtype)
    path = cache / f"{checkpoint.fingerprint[:_NAMED]}-{precision}-opset{OPSET}.onnx"
    if not path.exists():
        make_cache(cache, "export", " to keep exported networks in")
        _LOG.warning("exporting %s to %s, once", checkpoint.name, path)
        taps = [tap.name for tap in list_taps(checkpoint.unet)]
        export_onnx(checkpoint, path, tap=DEFAULT_TAP if DEFAULT_TAP in taps else None)
    return path


def _require_network(checkpoint: Checkpoint, network: str | os.PathLike[str] | None) -> Path:
    """The network that is to run, which must be an export of the model."""
    if network is None:
        return cached_network(checkpoint)
    _require_same(checkpoint, read_metadata(network), network)
    return Path(network)


def cached_engine(backend: str, checkpoint: Checkpoint) -> Path:
    """The engine of a model for the GPU that it is on, built now unless it is in the user's cache.

    It lies in `$XDG_CACHE_HOME/kinetiq/engines`, or `~/.cache/kinetiq/engines`, by all that decides
    whether it can run: fingerprint, precision, runtime and its version, and the GPU's architecture.
    It takes the sizes of `engine_profile.make_profile`; for others build one and name it.

    Raises:
        MissingDependencyError: the runtime or a GPU is missing.
        OutputError: the cache cannot be written.
        RequestError: the runtime builds nothing for this GPU.
        WorkError: the build failed.
    """
    version = require_gpu(backend, checkpoint.device).__version__
    cache, precision = _cache("engines"), precision_of(checkpoint.dtype)
    with torch.cuda.device(checkpoint.device):
        target = find_gpu()
        name = f"{checkpoint.fingerprint[:_NAMED]}-{precision}-{backend}-{version}-{target}.engine"
        path = cache / name
        if not path.exists():
            network = cached_network(checkpoint)
            make_cache(cache, "engine", " to keep engines in")
            _LOG.warning("building %s for %s, once", path, target)
            if backend == "tensorrt":
                build_engine(network, path, bounds=_bounds(checkpoint))
            else:
                build_rtx_engine(network, path, target=target, bounds=_bounds(checkpoint))
    return path


def _bounds(checkpoint: Checkpoint) -> dict[str, Bounds]:
    """No more frames than the network knows positions of, where that is fewer than is usual."""
    usual = FAMILIES[checkpoint.family].frames
    known = getattr(checkpoint.unet.config, "motion_max_seq_length", None) or 2 * usual
    return {"frames": Bounds(1, min(usual, known), min(2 * usual, known))}


def _load_engine(
    backend: str,
    checkpoint: Checkpoint,
    network: str | os.PathLike[str] | None,
    trust: str | Collection[str],
) -> Denoiser:
    path = cached_engine(backend, checkpoint) if network is None else network
    denoiser = open_engine(path, trust=trust, device=checkpoint.device, runtime=backend)
    _require_same(checkpoint, denoiser.metadata, path)
    return denoiser


def _cache(part: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "kinetiq" / part


def _require_same(
    checkpoint: Checkpoint, metadata: NetworkMetadata, network: str | os.PathLike[str]
) -> None:
    if metadata.fingerprint != checkpoint.fingerprint:
        raise CheckpointError(
            f"network {network}: must be an export of {checkpoint.name}, fingerprint "
            f"{checkpoint.fingerprint[:_NAMED]}, got one of {metadata.checkpoint}, "
            f"{metadata.fingerprint[:_NAMED]}"
        )
