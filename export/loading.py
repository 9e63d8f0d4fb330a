"""Bringing a model to a back end: exported once, kept in the user's cache, checked when read."""

import contextlib
import importlib.metadata
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from filelock import FileLock, Timeout

from kinetiq.backends import ON_GPU
from kinetiq.checkpoint import Checkpoint, parse_device, resolve_device
from kinetiq.denoiser import Denoiser
from kinetiq.errors import CheckpointError, OutputError, RequestError
from kinetiq.export import onnxruntime_denoiser, openvino_denoiser
from kinetiq.export.cache_key import code_key, options_key
from kinetiq.export.engine_file import NotVouchedForError, require_own_folder
from kinetiq.export.engine_profile import Bounds
from kinetiq.export.engine_rtx import build_rtx_engine, require_target
from kinetiq.export.engine_runtime import open_engine, require_gpu
from kinetiq.export.engine_tensorrt import build_engine, find_gpu
from kinetiq.export.functions import OPSET
from kinetiq.export.gpu import describe_gpu
from kinetiq.export.metadata import NetworkMetadata, precision_of, read_metadata
from kinetiq.export.network import export_onnx
from kinetiq.export.nodes import KINDS
from kinetiq.export.plugin_choice import FUNCTIONS, choose_by_record
from kinetiq.export.specialising_denoiser import SpecialisingDenoiser
from kinetiq.files import make_cache
from kinetiq.taps import DEFAULT_TAP, list_taps

_NAMED = 20  # digits of a fingerprint in the name of a file
_BOUNDS = {"rows": Bounds(1, 2, 16)}  # of a cached engine; clips of more go in several batches
_OUTPUTS = ("prediction",)  # an engine computes all that it has at each step, and nobody reads more
# As `kinetiq.files.replacing` and `kinetiq.export.network` name what they write before its turn.
_TEMPORARY = re.compile(r"\.kinetiq-([0-9a-f]{16}\.tmp|[a-z0-9_]{8})")
_ABANDONED = 3600.0  # seconds after which nobody is at work on a file that was not written to
_Result = TypeVar("_Result")
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
        RequestError: the back end cannot run this, or the network computes in another type than
            the model.
        WorkError: the export or the build failed.
    """
    device = checkpoint.device
    check_machine(backend, device)
    if backend in ON_GPU:
        return _load_engine(backend, checkpoint, network, trust)
    if trust:
        raise RequestError(f"load: trust is for engines of TensorRT, got it with {backend!r}")

    def run(path: Path) -> SpecialisingDenoiser:
        if backend == "onnxruntime":
            return onnxruntime_denoiser.OnnxruntimeDenoiser(path, device)
        return openvino_denoiser.OpenvinoDenoiser(path, device)

    def run_cached(path: Path) -> SpecialisingDenoiser:
        denoiser = run(path)
        found = denoiser.metadata
        said = (found.fingerprint, found.precision, set(found.controls), found.tap)
        wanted = (checkpoint.fingerprint, precision_of(checkpoint.dtype), set(KINDS))
        if said != (*wanted, _kept_tap(checkpoint)):
            raise CheckpointError(
                f"network {path}: must be the model's, in its type, with all controls, as those "
                "that are kept here, and is another"
            )
        return denoiser

    if network is None:
        if backend == "onnxruntime":  # before the model is exported for nothing
            onnxruntime_denoiser.require_support(precision_of(checkpoint.dtype), device)
        return use_cached_network(checkpoint, run_cached)
    _require_same(checkpoint, read_metadata(network), network)
    return run(Path(network))


def use_cached_network(checkpoint: Checkpoint, use: Callable[[Path], _Result]) -> _Result:
    """What is made of the model's export in the user's cache, which is made unless it is there.

    It lies in `$XDG_CACHE_HOME/kinetiq/exports`, or `~/.cache/kinetiq/exports`, by fingerprint,
    precision and what exported it, and carries all kinds of control and the default tap.

    Args:
        checkpoint: the model.
        use: reads it; where it finds it damaged, it is exported once more.

    Raises:
        OutputError: the cache cannot be written.
        WorkError: the export failed.
    """
    cache = _cache("exports")
    precision = precision_of(checkpoint.dtype)
    path = cache / f"{checkpoint.fingerprint[:_NAMED]}-{precision}-opset{OPSET}-{code_key()}.onnx"

    def make() -> None:
        _LOG.warning("exporting %s to %s, once", checkpoint.name, path)
        export_onnx(checkpoint, path, tap=_kept_tap(checkpoint))

    make_cache(cache, "export", " to keep exported networks in")
    return _use_kept(path, make, use)


def _kept_tap(checkpoint: Checkpoint) -> str | None:
    """The tap that is exported to the cache: the default one, where the network has it."""
    return DEFAULT_TAP if DEFAULT_TAP in [tap.name for tap in list_taps(checkpoint.unet)] else None


def use_cached_engine(
    backend: str, checkpoint: Checkpoint, use: Callable[[Path], _Result]
) -> _Result:
    """What is made of the model's engine for its GPU, which is built unless it is in the cache.

    It lies in `$XDG_CACHE_HOME/kinetiq/engines`, or `~/.cache/kinetiq/engines`, by all that decides
    what it is and whether it can run: fingerprint, precision, runtime and its version, the GPU's
    architecture and for full TensorRT its model, what built it, sizes, and which nodes run our
    kernels. It has no features of a tap. For these, or for other sizes, build one and name it.

    Args:
        backend: "tensorrt" or "tensorrt-rtx".
        checkpoint: the model.
        use: opens it; where it finds it damaged, it is built once more.

    Raises:
        MissingDependencyError: the runtime or a GPU is missing.
        NotVouchedForError: the engine in the cache is whole, and nobody vouches for it.
        OutputError: the cache cannot be written, or others can write it.
        RequestError: the runtime builds nothing for this GPU.
        WorkError: the build failed.
    """
    package = require_gpu(backend, checkpoint.device)
    with torch.cuda.device(checkpoint.device):
        target = find_gpu()
        if backend == "tensorrt-rtx":
            require_target(package, target)  # before the model is exported for nothing
        here = backend == "tensorrt"  # whether it is built and timed on the GPU itself
        choice = choose_by_record(target) if here else FUNCTIONS
        parts = (
            checkpoint.fingerprint[:_NAMED],
            precision_of(checkpoint.dtype),
            backend,
            package.__version__,
            target,
            code_key(),
            options_key(
                importlib.metadata.version("triton") if here else None,  # whose kernels it has
                sorted(_BOUNDS.items()),
                choice.operators,
                choice.route,
                describe_gpu() if here else None,
            ),
        )
        path = require_own_folder() / f"{'-'.join(parts)}.engine"

        def build(network: Path) -> None:
            _LOG.warning("building %s for %s, once", path, target)
            if here:
                build_engine(network, path, bounds=_BOUNDS, outputs=_OUTPUTS)
            else:
                build_rtx_engine(network, path, target=target, bounds=_BOUNDS, outputs=_OUTPUTS)

        return _use_kept(path, lambda: use_cached_network(checkpoint, build), use)


def _use_kept(path: Path, make: Callable[[], None], use: Callable[[Path], _Result]) -> _Result:
    """Use a file of our own cache; others that want it at the same time wait for it."""
    if not path.exists():
        with _alone(path):
            if not path.exists():
                make()
    try:
        return use(path)
    except NotVouchedForError:  # what a build cannot mend
        raise
    except CheckpointError as error:
        _LOG.warning("making %s again, since it cannot be used: %s", path, error)
    with _alone(path):
        make()
    return use(path)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Inside, no other process makes the file."""
    lock = FileLock(f"{path}.lock")
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            _LOG.warning("waiting for another process that makes %s", path)
            lock.acquire()
    except OSError as error:
        raise OutputError(
            f"load: {path.parent} must be a folder that can be written, to make {path.name} in: "
            f"{error.strerror}; set XDG_CACHE_HOME to one that can be"
        ) from error
    try:
        _remove_leftovers(path)
        yield
    finally:
        lock.release()


def _remove_leftovers(path: Path) -> None:
    """Remove what makers that were killed have left in the folder of a file whose lock is held.

    Who fills the cache holds a file's lock from before it writes until after. So what was there
    before no other lock was held is nobody's, but for what a user lets be written there by name:
    that has been written to a short while ago.
    """
    found = [one for one in path.parent.iterdir() if _TEMPORARY.fullmatch(one.name)]
    found = [one for one in found if _is_old(one)]
    others = (lock for lock in path.parent.glob("*.lock") if lock.name != f"{path.name}.lock")
    if not found or any(_is_held(lock) for lock in others):
        return
    for one in found:
        _LOG.info("removing %s, which a process that was stopped has left", one)
        if one.is_dir():
            shutil.rmtree(one, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                one.unlink()


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _ABANDONED
    except OSError:  # its maker was done with it
        return False


def _is_held(path: Path) -> bool:
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


def _load_engine(
    backend: str,
    checkpoint: Checkpoint,
    network: str | os.PathLike[str] | None,
    trust: str | Collection[str],
) -> Denoiser:
    def run(path: str | os.PathLike[str]) -> Denoiser:
        denoiser = open_engine(path, trust=trust, device=checkpoint.device, runtime=backend)
        _require_same(checkpoint, denoiser.metadata, path)
        return denoiser

    return use_cached_engine(backend, checkpoint, run) if network is None else run(network)


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
    if metadata.precision != (wanted := precision_of(checkpoint.dtype)):
        advice = f"export it in {wanted}"
        if metadata.precision != "float16" or checkpoint.device.type != "cpu":
            advice = f"load the model with dtype {metadata.precision!r}, or {advice}"
        raise RequestError(
            f"network {network}: its {metadata.precision} must be the model's, got {wanted}; "
            f"{advice}"
        )
