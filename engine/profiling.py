"""Named ranges for NVIDIA's profilers; nothing at all where nvtx or a profiler is missing."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def span(name: str) -> AbstractContextManager[Any]:
    """A range around the block, shown by Nsight Systems as `name` in the domain kinetiq.

    Inside `torch.compile` and `torch.export` the range is left out, since it is not an operation.
    """
    if torch.compiler.is_compiling():  # asked first, since `_nvtx` is not for Dynamo to trace
        return nullcontext()
    nvtx = _nvtx()
    if nvtx is None:
        return nullcontext()
    context: AbstractContextManager[Any] = nvtx.annotate(name, domain="kinetiq")
    return context


def begin(name: str) -> Any:
    """Start a range that `end` closes, for what does not nest, such as requests of one batch."""
    nvtx = _nvtx()
    return None if nvtx is None else nvtx.start_range(name, domain="kinetiq")


def end(handle: Any) -> None:
    """Close a range of `begin`."""
    nvtx = _nvtx()
    if nvtx is not None and handle is not None:
        nvtx.end_range(handle)


@functools.cache
def _nvtx() -> Any:
    try:
        import nvtx
    except ImportError:  # nvtx has wheels for Linux and Windows only
        return None
    return nvtx if nvtx.enabled() else None
