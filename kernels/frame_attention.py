r"""Attention over the frames at each position, whose motion may come from another row.

    out[r, :, p] = softmax(Q K^T / sqrt(d)) V    over the frames at position p

`query_row` replaces a row's queries by another row's, as in `query_attention`. `deviation_row`
keeps a row's own mean over frames and takes the *deviation from that mean* of another row:

    x'[r] = x[r] + blend[r] (mean_F(x[r]) + x[s] - mean_F(x[s]) - x[r]),    s = deviation_row[r]

for x among q, k and v. What does not change over the frames, which is what a clip shows, stays
the row's own; what changes, which is how it moves, comes from the other row.

All tensors stay [rows, frames, tokens, heads * d]: the frames are not moved into the batch.

Source: query injection, "Motion by Queries", arXiv:2412.07750, sec. 3, here over frames; removal
of the mean over frames, MOFT, arXiv:2405.14864, sec. 3.2; their union is this project's.
"""

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor

from kinetiq.errors import ShapeError
from kinetiq.kernels.query_attention import check_blend, check_kind, check_rows, choose_queries

PARTS = ("q", "k", "v")


def frame_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    query_row: Tensor | None = None,
    query_blend: Tensor | None = None,
    deviation_row: Tensor | None = None,
    deviation_blend: Tensor | None = None,
    deviation_parts: Tensor | None = None,
) -> Tensor:
    """Return attention of each position to itself in all frames.

    Args:
        query: [rows, frames, tokens, heads * d], any strides.
        key: like `query`.
        value: like `query`.
        heads: number of attention heads.
        query_row: int64 [rows], whose queries each row uses; None: its own.
        query_blend: [rows] or [rows, frames, tokens], share of the other row's queries; None: 1.
        deviation_row: int64 [rows], whose deviation from the mean over frames each row takes.
        deviation_blend: [rows] or [rows, frames, tokens], share of that deviation; None: 1.
        deviation_parts: [rows, 3], a factor on the blend for q, k and v; None: 1.

    Returns:
        [rows, frames, tokens, heads * d], contiguous, the type of `query`.

    Raises:
        ShapeError: a shape does not match.
    """
    _check(query, key, value, heads)
    rows, frames, tokens, _ = query.shape
    check_rows("frame_attention", "query_row", query_row, rows)
    check_rows("frame_attention", "deviation_row", deviation_row, rows)
    check_blend("frame_attention", "query_blend", query_blend, (rows, frames, tokens))
    check_blend("frame_attention", "deviation_blend", deviation_blend, (rows, frames, tokens))
    if deviation_parts is not None and list(deviation_parts.shape) != [rows, 3]:
        raise ShapeError(
            f"frame_attention: deviation_parts must be [rows = {rows}, 3], "
            f"got {list(deviation_parts.shape)}"
        )
    if query_blend is not None and query_row is None:
        raise ShapeError("frame_attention: query_blend needs query_row, got query_blend alone")
    if deviation_row is None and not (deviation_blend is None and deviation_parts is None):
        raise ShapeError(
            "frame_attention: deviation_blend and deviation_parts need deviation_row, got none"
        )
    if deviation_row is not None:
        query, key, value = move_deviations(
            (query, key, value), deviation_row, deviation_blend, deviation_parts
        )
    if query_row is not None:
        query = choose_queries(query, query_row, query_blend)
    return _attend(query, key, value, heads)


def move_deviations(
    parts: tuple[Tensor, Tensor, Tensor],
    deviation_row: Tensor,
    deviation_blend: Tensor | None = None,
    deviation_parts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v with each row's deviation from its mean over frames replaced."""
    moved = []
    for index, own in enumerate(parts):
        mean = own.mean(1, keepdim=True)
        aim = mean + (own - mean)[deviation_row]
        share = own.new_ones(own.shape[:1]) if deviation_blend is None else deviation_blend
        share = share.to(own.dtype).reshape(*share.shape, *([1] * (own.ndim - share.ndim)))
        if deviation_parts is not None:
            share = share * deviation_parts[:, index].to(own.dtype).reshape(-1, 1, 1, 1)
        moved.append(torch.lerp(own, aim, share))
    return moved[0], moved[1], moved[2]


def frame_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    query_row: Tensor | None = None,
    query_blend: Tensor | None = None,
    deviation_row: Tensor | None = None,
    deviation_blend: Tensor | None = None,
    deviation_parts: Tensor | None = None,
) -> Tensor:
    """The definition, in PyTorch. Computes in float32 or wider, returns the type of `query`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (t.to(wide) for t in (query, key, value))
    if deviation_row is not None:
        q, k, v = move_deviations((q, k, v), deviation_row, deviation_blend, deviation_parts)
    if query_row is not None:
        q = choose_queries(q, query_row, query_blend)
    q, k, v = (t.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).permute(0, 3, 1, 2, 4).flatten(-2).to(query.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Softmax attention over frames, by whichever way is quicker here."""
    split = [t.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4) for t in (query, key, value)]
    q, k, v = split  # [rows, tokens, heads, frames, d]
    if q.is_cuda or (q.dtype == torch.float32 and not q.requires_grad):
        rows, tokens = q.shape[:2]
        out = F.scaled_dot_product_attention(*(t.flatten(0, 1) for t in split))
        out = out.unflatten(0, (rows, tokens))
    else:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        wide = torch.promote_types(scores.dtype, torch.float32)
        out = scores.softmax(-1, dtype=wide).to(v.dtype) @ v
    return out.permute(0, 3, 1, 2, 4).flatten(-2).contiguous()  # with one head it is a view


def _check(query: Tensor, key: Tensor, value: Tensor, heads: int) -> None:
    if query.ndim != 4 or heads < 1 or query.shape[-1] % heads:
        raise ShapeError(
            f"frame_attention: query must be [rows, frames, tokens, heads * d] with heads = "
            f"{heads}, got {list(query.shape)}"
        )
    for name, tensor in {"key": key, "value": value}.items():
        if tensor.shape != query.shape:
            raise ShapeError(
                f"frame_attention: {name} must have the shape of query {list(query.shape)}, "
                f"got {list(tensor.shape)}"
            )
        check_kind("frame_attention", name, tensor, query)
