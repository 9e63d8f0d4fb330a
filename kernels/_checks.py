"""What the operators require of their tensors, in words."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kinetiq.errors import ShapeError

TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # that can be computed in


def check_tensor(where: str, name: str, given: object) -> None:
    """Require a tensor."""
    if not isinstance(given, Tensor):
        raise ShapeError(f"{where}: {name} must be a tensor, got {given!r}")


def check_type(where: str, name: str, tensor: Tensor) -> None:
    """Require a floating type that PyTorch computes in, which those of eight bits are not."""
    if tensor.dtype not in TYPES:
        raise ShapeError(
            f"{where}: {name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}"
        )


def check_heads(where: str, heads: object) -> None:
    """Require an int above zero."""
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        raise ShapeError(f"{where}: heads must be an int above 0, got {heads!r}")


def check_kind(where: str, name: str, tensor: Tensor, query: Tensor) -> None:
    """Require `tensor` to have the type of `query` and to be on its device."""
    if tensor.dtype != query.dtype or tensor.device != query.device:
        raise ShapeError(
            f"{where}: {name} must be {query.dtype} on {query.device} like query, "
            f"got {tensor.dtype} on {tensor.device}"
        )


def check_device(where: str, name: str, control: Tensor | None, query: Tensor) -> None:
    """Require `control`, if there is one, to be a tensor on the device of `query`."""
    if control is None:
        return
    check_tensor(where, name, control)
    if control.device != query.device:
        raise ShapeError(
            f"{where}: {name} must be on {query.device} like query, got {control.device}; "
            f"move it when it is made, since to move it here would wait for the device"
        )


def check_rows(where: str, name: str, index: Tensor | None, rows: int) -> None:
    """Require `index` to be int64 [rows], with values in range.

    Values on a GPU are not read, since that would wait for it: they are checked when controls are
    resolved.
    """
    if index is not None:
        require_index(where, name, index, rows)
        check_range(where, name, index, rows)


def require_index(where: str, name: str, index: Tensor, rows: int) -> None:
    """Require int64 [rows]."""
    if list(index.shape) != [rows] or index.dtype != torch.int64:
        raise ShapeError(
            f"{where}: {name} must be int64 [rows = {rows}], got {index.dtype} {list(index.shape)}"
        )


def check_range(where: str, name: str, index: Tensor, limit: int) -> None:
    """Require values from 0 to below `limit`, as far as they may be looked at."""
    values = known_values(where, name, index)
    if values and (min(values) < 0 or max(values) >= limit):
        raise ShapeError(
            f"{where}: {name} must have values from 0 to {limit - 1}, "
            f"got {min(values)} to {max(values)}"
        )


def known_values(where: str, name: str, index: Tensor) -> list[int]:
    """The values of an index on a CPU; none on a GPU or in a trace, where nobody may look.

    Raises:
        ShapeError: the index is batched by vmap, so that it has no values to choose rows by.
    """
    if index.device.type != "cpu" or torch.compiler.is_compiling() or index.numel() == 0:
        return []
    if isinstance(index, FakeTensor):
        return []
    try:
        return list(index.flatten().tolist())
    except RuntimeError as error:
        raise ShapeError(
            f"{where}: {name} must hold numbers that can be read, got an index that vmap batches; "
            "give its batch as rows, or make a call for each, instead"
        ) from error


def check_blend(where: str, name: str, blend: Tensor | None, full: tuple[int, int, int]) -> None:
    """Require `blend` to be floating [rows] or [rows, frames, tokens]."""
    if blend is None:
        return
    # Compared one by one: a trace puts no guard on sizes in a tuple.
    if tuple(blend.shape) != full[:1] and tuple(blend.shape) != full:
        raise ShapeError(
            f"{where}: {name} must be [rows] or [rows, frames, tokens] = {list(full)}, "
            f"got {list(blend.shape)}"
        )
    check_type(where, name, blend)
