r"""Attention within a frame whose queries may come from another row.

    out[r] = softmax(Q[r] K[r]^T / sqrt(d)) V[r],    Q[r] = q[r] + blend[r] (q[query_row[r]] - q[r])

Rows are elements of the denoiser's batch. With `query_row[r] = r` a row uses its own queries; with
another row's index it looks at its own keys and values through that row's eyes, which is how
queries carry motion from a reference to a target.

Source: "Motion by Queries", arXiv:2412.07750, sec. 3 (query injection).
"""

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor

from kinetiq.errors import ShapeError

_SMALL = 128  # keys; below it, and in bf16 at any length, the products beat the fused CPU kernel


def query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    query_row: Tensor | None = None,
    query_blend: Tensor | None = None,
) -> Tensor:
    """Return attention of each frame to its own keys, with queries chosen per row.

    Args:
        query: [rows, frames, tokens, heads * d], any strides.
        key: [rows, frames, keys, heads * d]; `frames` may be 1 where all frames share keys.
        value: like `key`.
        heads: number of attention heads.
        query_row: int64 [rows], whose queries each row uses; None: its own.
        query_blend: [rows] or [rows, frames, tokens], the share of the other row's queries;
            None: all of them.

    Returns:
        [rows, frames, tokens, heads * d], contiguous, the type of `query`.

    Raises:
        ShapeError: a shape does not match.
    """
    _check(query, key, value, heads, query_row, query_blend)
    if query_row is not None:
        query = choose_queries(query, query_row, query_blend)
    rows, frames, tokens, width = query.shape
    if key.shape[1] == 1:  # keys shared by all frames: fold the frames into the tokens
        query = query.reshape(rows, 1, frames * tokens, width)
    q, k, v = (
        t.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value)
    )
    out = _attend(q, k, v)
    return out.transpose(1, 2).reshape(rows, frames, tokens, width)


def choose_queries(query: Tensor, query_row: Tensor, query_blend: Tensor | None = None) -> Tensor:
    """Return `query` with each row's queries moved towards those of `query_row`."""
    chosen = query[query_row]
    if query_blend is None:
        return chosen
    blend = query_blend.to(query.dtype)
    blend = blend.reshape(*blend.shape, *([1] * (query.ndim - blend.ndim)))
    return torch.lerp(query, chosen, blend)


def reduce_leak(query: Tensor, query_row: Tensor, reduced: Tensor) -> Tensor:
    """Return the queries of `query_row`, on the row's own mean over frames where `reduced`.

    Where `reduced` [rows] is true the result is mean_F(q[r]) + q[s] - mean_F(q[s]) with
    s = query_row[r]: the other row's motion without what its queries say of what it shows.
    """
    mean = query.mean(1, keepdim=True)
    on_own_mean = mean + (query - mean)[query_row]
    return torch.where(reduced.reshape(-1, 1, 1, 1), on_own_mean, query[query_row])


def query_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    query_row: Tensor | None = None,
    query_blend: Tensor | None = None,
) -> Tensor:
    """The definition, in PyTorch. Computes in float32 or wider, returns the type of `query`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (t.to(wide) for t in (query, key, value))
    if query_row is not None:
        q = choose_queries(q, query_row, query_blend)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(2, 3) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(2, 3).flatten(-2).to(query.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention over [batch, heads, tokens, d], by whichever way is quicker here."""
    if query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value)
    if min(query.shape[-2], key.shape[-2]) >= _SMALL:
        if query.dtype == torch.bfloat16 and query.requires_grad:
            q, k, v = query.float(), key.float(), value.float()
            return F.scaled_dot_product_attention(q, k, v).to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value)
    if query.dtype == torch.float32 and not query.requires_grad:
        return F.scaled_dot_product_attention(query, key, value)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide).to(value.dtype) @ value


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    query_row: Tensor | None,
    query_blend: Tensor | None,
) -> None:
    where = "query_attention"
    if query.ndim != 4 or heads < 1 or query.shape[-1] % heads:
        raise ShapeError(
            f"{where}: query must be [rows, frames, tokens, heads * d] with heads = {heads}, "
            f"got {list(query.shape)}"
        )
    rows, frames, tokens, width = query.shape
    for name, tensor in {"key": key, "value": value}.items():
        if tensor.ndim != 4 or tensor.shape[0] != rows or tensor.shape[-1] != width:
            raise ShapeError(
                f"{where}: {name} must be [rows = {rows}, frames or 1, keys, {width}] to match "
                f"query {list(query.shape)}, got {list(tensor.shape)}"
            )
        if tensor.shape[1] not in (1, frames):
            raise ShapeError(
                f"{where}: {name} must have {frames} frames or 1, got {tensor.shape[1]}"
            )
        check_kind(where, name, tensor, query)
    if key.shape != value.shape:
        raise ShapeError(
            f"{where}: key and value must have one shape, got {list(key.shape)} and "
            f"{list(value.shape)}"
        )
    check_rows(where, "query_row", query_row, rows)
    check_blend(where, "query_blend", query_blend, (rows, frames, tokens))
    if query_blend is not None and query_row is None:
        raise ShapeError(f"{where}: query_blend needs query_row, got query_blend alone")


def check_kind(where: str, name: str, tensor: Tensor, query: Tensor) -> None:
    """Require `tensor` to have the type of `query` and to be on its device."""
    if tensor.dtype != query.dtype or tensor.device != query.device:
        raise ShapeError(
            f"{where}: {name} must be {query.dtype} on {query.device} like query, "
            f"got {tensor.dtype} on {tensor.device}"
        )


def check_rows(where: str, name: str, index: Tensor | None, rows: int) -> None:
    """Require `index` to be int64 [rows]; values are checked when controls are resolved."""
    if index is not None and (list(index.shape) != [rows] or index.dtype != torch.int64):
        raise ShapeError(
            f"{where}: {name} must be int64 [rows = {rows}], got {index.dtype} {list(index.shape)}"
        )


def check_blend(where: str, name: str, blend: Tensor | None, full: tuple[int, int, int]) -> None:
    """Require `blend` to be [rows] or [rows, frames, tokens]."""
    if blend is not None and tuple(blend.shape) not in (full[:1], full):
        raise ShapeError(
            f"{where}: {name} must be [rows] or [rows, frames, tokens] = {list(full)}, "
            f"got {list(blend.shape)}"
        )
