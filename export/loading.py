"""Bringing a model to a back end: exported once, kept in the user's cache, checked when read."""

import os
from collections.abc import Collection
from pathlib import Path

from kinetiq.checkpoint import Checkpoint
from kinetiq.denoiser import Denoiser
from kinetiq.errors import CheckpointError, RequestError
from kinetiq.export import onnxruntime_denoiser, openvino_denoiser
from kinetiq.export.engine_runtime import open_engine
from kinetiq.export.functions import OPSET
from kinetiq.export.metadata import NetworkMetadata, precision_of, read_metadata
from kinetiq.export.network import export_onnx
from kinetiq.files import make_cache
from kinetiq.taps import DEFAULT_TAP, list_taps

_NAMED = 20  # digits of a fingerprint in the name of a file


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
            to the user's cache, once for each precision; an engine has to be built before.
        trust: checksums of engines that the caller vouches for.

    Raises:
        CheckpointError: the network is damaged, or another model's.
        MissingDependencyError: a package or a device is missing.
        OutputError: the cache cannot be written.
        RequestError: the back end cannot run this.
    """
    if backend in ("tensorrt", "tensorrt-rtx"):
        return _load_engine(backend, checkpoint, network, trust)
    if trust:
        raise RequestError(f"load: trust is for engines of TensorRT, got it with {backend!r}")
    device = checkpoint.device
    if backend == "onnxruntime":
        onnxruntime_denoiser.require_support(precision_of(checkpoint.dtype), device)
        path = _require_network(checkpoint, network)
        return onnxruntime_denoiser.OnnxruntimeDenoiser(path, device)
    openvino_denoiser.require_support(device)
    path = _require_network(checkpoint, network)
    return openvino_denoiser.OpenvinoDenoiser(path, device)


def cached_network(checkpoint: Checkpoint) -> Path:
    """The model's export in the user's cache, made now unless it is there.

    It lies in `$XDG_CACHE_HOME/kinetiq/exports`, or `~/.cache/kinetiq/exports`, by fingerprint
    and precision, and carries all kinds of control and the default tap.

    Raises:
        OutputError: the cache cannot be written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kinetiq" / "exports"
    precision = precision_of(checkpoint.dtype)
    path = cache / f"{checkpoint.fingerprint[:_NAMED]}-{precision}-opset{OPSET}.onnx"
    if not path.exists():
        make_cache(cache, "export", " to keep exported networks in")
        taps = [tap.name for tap in list_taps(checkpoint.unet)]
        export_onnx(checkpoint, path, tap=DEFAULT_TAP if DEFAULT_TAP in taps else None)
    return path


def _require_network(checkpoint: Checkpoint, network: str | os.PathLike[str] | None) -> Path:
    """The network that is to run, which must be an export of the model."""
    if network is None:
        return cached_network(checkpoint)
    _require_same(checkpoint, read_metadata(network), network)
    return Path(network)


def _load_engine(
    backend: str,
    checkpoint: Checkpoint,
    network: str | os.PathLike[str] | None,
    trust: str | Collection[str],
) -> Denoiser:
    if network is None:
        target = " --rtx --target sm_89" if backend == "tensorrt-rtx" else ""
        raise RequestError(
            f"load: backend {backend!r} needs network, an engine for this GPU, got none; build it: "
            f"kinetiq export onnx {checkpoint.name} --out net.onnx && "
            f"kinetiq export tensorrt net.onnx{target}"
        )
    denoiser = open_engine(network, trust=trust, device=checkpoint.device)
    _require_same(checkpoint, denoiser.metadata, network)
    return denoiser


def _require_same(
    checkpoint: Checkpoint, metadata: NetworkMetadata, network: str | os.PathLike[str]
) -> None:
    if metadata.fingerprint != checkpoint.fingerprint:
        raise CheckpointError(
            f"network {network}: must be an export of {checkpoint.name}, fingerprint "
            f"{checkpoint.fingerprint[:_NAMED]}, got one of {metadata.checkpoint}, "
            f"{metadata.fingerprint[:_NAMED]}"
        )
