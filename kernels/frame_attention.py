r"""Attention over the frames at each position, whose motion may come from another row.

    out[r, :, p] = softmax(Q K^T / sqrt(d)) V    over the frames at position p

Three kinds of control change Q, K and V first, in this order, and each is optional:

    x[r] <- x[r] + motion_scale[r] bank[motion_slot[r]]                for x among q, k and v
    x[r] <- x[r] + blend[r] (mean_F(x[r]) + x[s] - mean_F(x[s]) - x[r]),  s = deviation_row[r]
    q[r] <- q[r] + query_blend[r] (q[query_row[r]] - q[r])

The first adds a motion embedding, already projected: W(x + m) = Wx + Wm. The second keeps a row's
own mean over frames and takes the *deviation from that mean* of another row: what does not change
over the frames, which is what a clip shows, stays the row's own; what changes, which is how it
moves, comes from the other row. The third replaces queries, as in `query_attention`.

All tensors stay [rows, frames, tokens, heads * d]: the frames are not moved into the batch. One
program owns all frames of some neighbouring sequences (position and head) of one row, so that
means, deviations, scores and their gradients never leave the chip, and what neighbours share of a
cache line is read once: each element of q, k, v and out crosses memory once (see `cost`). Scores,
softmax and means are in float32.

The motion in an output, less its mean over frames and projected, is `motion_feature` of it: a
projection sums over heads, which no program here holds all of.

Source: query injection, "Motion by Queries", arXiv:2412.07750, sec. 3, here over frames; removal
of the mean over frames, MOFT, arXiv:2405.14864, sec. 3.2; their union is this project's. Motion
embeddings, "Motion Inversion", arXiv:2403.20193, sec. 3.
"""

from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor

from kinetiq.errors import ShapeError
from kinetiq.kernels._compile import CompileCase
from kinetiq.kernels._cost import Cost
from kinetiq.kernels._launch import settings
from kinetiq.kernels._triton import tl, triton
from kinetiq.kernels.query_attention import (
    check_blend,
    check_kind,
    check_rows,
    choose_queries,
    split_head_dim,
)

PARTS = ("q", "k", "v")
Controls = tuple[Tensor | None, ...]  # in the order of `frame_attention`'s arguments
MAX_FRAMES = 128  # all frames of a sequence must fit on the chip
MAX_HEAD_DIM = 256
_TYPES = (torch.float32, torch.float16, torch.bfloat16)  # that a GPU kernel takes
_CACHED = 4096  # frames of all sequences whose scores and output a CPU core's cache keeps
_TILE = 16  # the least side of a product on the matrix units


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
    motion_slot: Tensor | None = None,
    motion_scale: Tensor | None = None,
    query_bank: Tensor | None = None,
    key_bank: Tensor | None = None,
    value_bank: Tensor | None = None,
) -> Tensor:
    """Return attention of each position to itself in all frames.

    Args:
        query: [rows, frames, tokens, heads * d], any strides; on a GPU at most 128 frames and
            d at most 256, in float32, float16 or bfloat16.
        key: like `query`.
        value: like `query`.
        heads: number of attention heads.
        query_row: int64 [rows], whose queries each row uses; None: its own.
        query_blend: [rows] or [rows, frames, tokens], share of the other row's queries; None: 1.
        deviation_row: int64 [rows], whose deviation from the mean over frames each row takes.
        deviation_blend: [rows] or [rows, frames, tokens], share of that deviation; None: 1.
        deviation_parts: [rows, 3], a factor on the blend for q, k and v; None: 1.
        motion_slot: int64 [rows], which slot of the banks is added to each row; 0: none, and
            what a bank holds there is not used.
        motion_scale: [rows], a factor on what is added; None: 1.
        query_bank: [slots, frames, heads * d], added to the queries of all positions.
        key_bank: like `query_bank`, for the keys.
        value_bank: [slots, frames, tokens, heads * d], added to the values.

    Returns:
        [rows, frames, tokens, heads * d], contiguous, the type of `query`.

    Raises:
        ShapeError: a shape, type or device does not match.
    """
    _check(query, key, value, heads)
    _check_controls(query, query_row, query_blend, deviation_row, deviation_blend, deviation_parts)
    _check_motion(query, motion_slot, motion_scale, query_bank, key_bank, value_bank)
    controls = (
        query_row,
        query_blend,
        deviation_row,
        deviation_blend,
        deviation_parts,
        motion_slot,
        motion_scale,
        query_bank,
        key_bank,
        value_bank,
    )
    if query.device.type == "cpu" and not torch.compiler.is_compiling():
        # Here autograd records PyTorch's own operators, and keeps the weights that the operator
        # would compute again in its backward.
        return _attend(*mix(query, key, value, *controls), heads)
    if query.device.type == "cuda":
        _check_kernel(query, heads)
    out: Tensor = _frame_attention(query, key, value, *controls, heads)
    return out


def mix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_row: Tensor | None = None,
    query_blend: Tensor | None = None,
    deviation_row: Tensor | None = None,
    deviation_blend: Tensor | None = None,
    deviation_parts: Tensor | None = None,
    motion_slot: Tensor | None = None,
    motion_scale: Tensor | None = None,
    query_bank: Tensor | None = None,
    key_bank: Tensor | None = None,
    value_bank: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v as the controls of `frame_attention` make them."""
    if motion_slot is not None:
        query, key, value = (
            own if bank is None else add_motion(own, motion_slot, motion_scale, bank)
            for own, bank in zip(
                (query, key, value), (query_bank, key_bank, value_bank), strict=True
            )
        )
    if deviation_row is not None:
        query, key, value = move_deviations(
            (query, key, value), deviation_row, deviation_blend, deviation_parts
        )
    if query_row is not None:
        query = choose_queries(query, query_row, query_blend)
    return query, key, value


def add_motion(
    own: Tensor, motion_slot: Tensor, motion_scale: Tensor | None, bank: Tensor
) -> Tensor:
    """Return `own` plus each row's slot of `bank`, times its scale; slot 0 adds nothing."""
    bias = bank[motion_slot].to(own.dtype)
    if motion_scale is not None:
        bias = bias * _widen(motion_scale.to(own.dtype), bias.ndim)
    bias = torch.where(_widen(motion_slot > 0, bias.ndim), bias, bias.new_zeros(()))
    return own + (bias.unsqueeze(2) if bias.ndim == 3 else bias)


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
        share = _widen(share.to(own.dtype), own.ndim)
        if deviation_parts is not None:
            share = share * _widen(deviation_parts[:, index].to(own.dtype), own.ndim)
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
    motion_slot: Tensor | None = None,
    motion_scale: Tensor | None = None,
    query_bank: Tensor | None = None,
    key_bank: Tensor | None = None,
    value_bank: Tensor | None = None,
) -> Tensor:
    """The definition, in PyTorch. Computes in float32 or wider, returns the type of `query`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = mix(
        query.to(wide),
        key.to(wide),
        value.to(wide),
        query_row,
        query_blend,
        deviation_row,
        deviation_blend,
        deviation_parts,
        motion_slot,
        motion_scale,
        query_bank,
        key_bank,
        value_bank,
    )
    q, k, v = (t.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).permute(0, 3, 1, 2, 4).flatten(-2).to(query.dtype)


def cost(
    rows: int,
    frames: int,
    tokens: int,
    heads: int,
    d: int,
    itemsize: int,
    *,
    backward: bool = False,
) -> Cost:
    """Bytes that must cross memory and operations that must run, whatever the implementation.

    Without controls: what they read of other rows is there already if those rows are attended to.
    Forward reads q, k, v and writes the output in two products; backward reads q, k, v and the
    gradient and writes three gradients in five products, since the weights are not kept.
    """
    elements = rows * frames * tokens * heads * d
    tensors, products = (7, 5) if backward else (4, 2)
    return Cost(bytes=tensors * elements * itemsize, flops=products * 2 * frames * elements)


def _widen(share: Tensor, rank: int) -> Tensor:
    """`share` with axes of size 1 appended until it has `rank` axes."""
    return share.reshape(share.shape + (1,) * (rank - share.ndim))


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Softmax attention over frames on a CPU, by whichever way is quicker here."""
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    direct = query.dtype == torch.float32 and not recorded
    if direct and query.shape[1] >= _TILE:
        return _attend_in_place(query, key, value, heads)
    split = [t.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4) for t in (query, key, value)]
    q, k, v = split  # [rows, tokens, heads, frames, d]
    if direct:
        rows, tokens = q.shape[:2]
        out = F.scaled_dot_product_attention(*(t.flatten(0, 1) for t in split))
        out = out.unflatten(0, (rows, tokens))
    else:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        wide = torch.promote_types(scores.dtype, torch.float32)
        out = scores.softmax(-1, dtype=wide).to(v.dtype) @ v
    return out.permute(0, 3, 1, 2, 4).flatten(-2).contiguous()  # with one head it is a view


def _attend_in_place(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Softmax attention over frames without a permuted copy.

    [frames, tokens * heads, d] is a batch of tokens * heads matrices [frames, d] whose lines lie
    far apart, and a batched product takes it as it is; only the output is written through a
    small buffer. In chunks, so that scores and output are in the cache when they are read again.
    """
    rows, frames, tokens, width = query.shape
    d = width // heads
    out = query.new_empty(query.shape)
    unused = query.new_zeros(()).expand(1, frames, frames)  # baddbmm scales for nothing, bmm cannot
    chunk = max(_CACHED // frames, 1)
    for row in range(rows):
        q, k, v, o = (  # [tokens * heads, frames, d]
            t[row].reshape(frames, tokens * heads, d).transpose(0, 1)
            for t in (query, key, value, out)
        )
        for start in range(0, tokens * heads, chunk):
            part = slice(start, start + chunk)
            scores = torch.baddbmm(unused, q[part], k[part].transpose(1, 2), beta=0, alpha=d**-0.5)
            o[part] = torch.bmm(scores.softmax(-1), v[part])
    return out


# In the kernels below
#   a tensor is (pointer, stride of rows, of frames, of tokens, of channels);
#   an operand is (tensor, bank, motion slots and scales, deviation rows, blends and parts);
#   a place is (token, head, inside, frames, tokens) of BLOCK sequences;
#   `frame` is which frames are wanted of them.
# CHOICE and SHARE say whether queries and deviations are blended per frame and token, not per row.
# Tiles are [BLOCK, frame, WIDTH], with the channels FROM to FROM + WIDTH of each head.


@triton.jit
def _tile(tensor, row, place, frame, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    """What a tensor holds; zero where it holds nothing."""
    token, head, inside, frames, _tokens = place
    channel = FROM + tl.arange(0, WIDTH)
    start = tensor[0] + row * tensor[1] + token * tensor[3] + (head * D) * tensor[4]  # [BLOCK]
    offset = frame[:, None].to(tl.int64) * tensor[2] + channel[None, :].to(tl.int64) * tensor[4]
    known = (frame < frames)[:, None] & (channel < D)[None, :]
    return tl.load(
        start[:, None, None] + offset[None, :, :],
        mask=inside[:, None, None] & known[None, :, :],
        other=0.0,
    )


@triton.jit
def _biased(operand, row, place, frame, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    """An operand's tensor, plus the row's slot of its bank."""
    tensor, bank, motion, _deviation = operand
    own = _tile(tensor, row, place, frame, D, FROM, WIDTH)
    if bank[0] is not None:
        token, head, inside, frames, tokens = place
        slot = tl.load(motion[0] + row)
        some = (token, head, inside & (slot > 0), frames, tokens)
        bias = _tile(bank, slot, some, frame, D, FROM, WIDTH).to(tl.float32)
        if motion[1] is not None:
            bias *= tl.load(motion[1] + row).to(tl.float32)
        own = own.to(tl.float32) + bias
    return own


@triton.jit
def _share(blend_ptr, row, place, frame, PER_TOKEN: tl.constexpr):
    """A row's blend: one number, or [BLOCK, frame, 1]."""
    if PER_TOKEN:
        token, _head, inside, frames, tokens = place
        at = (row * frames + frame[None, :]) * tokens + token[:, None]
        mask = inside[:, None] & (frame < frames)[None, :]
        share = tl.load(blend_ptr + at, mask=mask, other=0.0).to(tl.float32)[:, :, None]
    else:
        share = tl.load(blend_ptr + row).to(tl.float32)
    return share


@triton.jit
def _moved(
    operand, PART: tl.constexpr, row, place, frame,
    D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr,
    FRAMES: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """The same, moved to another row's deviation from its mean over frames."""
    own = _biased(operand, row, place, frame, D, FROM, WIDTH)
    deviation = operand[3]
    if deviation[0] is not None:
        own = own.to(tl.float32)
        source = tl.load(deviation[0] + row)
        other = _biased(operand, source, place, frame, D, FROM, WIDTH).to(tl.float32)
        own_sum, other_sum = tl.sum(own, 1), tl.sum(other, 1)  # [BLOCK, WIDTH]
        if frame.shape[0] != FRAMES:  # the mean is over all frames, not only over those wanted
            own_sum, other_sum = tl.zeros_like(own_sum), tl.zeros_like(other_sum)
            for first in range(0, FRAMES, frame.shape[0]):
                of = first + tl.arange(0, frame.shape[0])
                own_part = _biased(operand, row, place, of, D, FROM, WIDTH)
                other_part = _biased(operand, source, place, of, D, FROM, WIDTH)
                own_sum += tl.sum(own_part.to(tl.float32), 1)
                other_sum += tl.sum(other_part.to(tl.float32), 1)
        change = other + ((own_sum - other_sum) / place[3])[:, None, :] - own
        if deviation[1] is not None:
            change *= _share(deviation[1], row, place, frame, SHARE)
        if deviation[2] is not None:
            change *= tl.load(deviation[2] + row * 3 + PART).to(tl.float32)
        own += change
    return own


@triton.jit
def _chosen(
    operand, choice, row, place, frame,
    D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, FRAMES: tl.constexpr,
    CHOICE: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """The same for queries, and then replaced by another row's."""
    reader = row
    if choice[0] is not None:
        reader = tl.load(choice[0] + row)
    chosen = _moved(operand, 0, reader, place, frame, D, FROM, WIDTH, FRAMES, SHARE)
    if choice[1] is not None:
        own = _moved(operand, 0, row, place, frame, D, FROM, WIDTH, FRAMES, SHARE)
        share = _share(choice[1], row, place, frame, CHOICE)
        chosen = own.to(tl.float32) + share * (chosen.to(tl.float32) - own.to(tl.float32))
    return chosen


@triton.jit
def _put(
    out_ptr, tile, row, place, frame,
    HEADS: tl.constexpr, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store a tile into a contiguous [rows, frames, tokens, heads * d]."""
    token, head, inside, frames, tokens = place
    channel = FROM + tl.arange(0, WIDTH)
    at = ((row * frames + frame[None, :]) * tokens + token[:, None]) * (HEADS * D)
    at = (at + head[:, None] * D)[:, :, None] + channel[None, None, :]
    mask = (inside[:, None] & (frame < frames)[None, :])[:, :, None] & (channel < D)[None, None, :]
    tl.store(out_ptr + at, tile.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _product(left, right):
    """Products of the matrices of two batches; float32 is not rounded to tf32."""
    if left.shape[0] == 1:  # warps share out a matrix only if it is in no batch
        one = tl.dot(
            tl.reshape(left, (left.shape[1], left.shape[2])),
            tl.reshape(right, (right.shape[1], right.shape[2])),
            input_precision="ieee",
        )
        product = tl.expand_dims(one, 0)
    else:
        product = tl.dot(left, right, input_precision="ieee")
    return product


@triton.jit
def _turned(tile):
    """The matrices of a batch, transposed."""
    return tl.trans(tile, 0, 2, 1)


@triton.jit
def _place(frames, tokens, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """The row of this program, and the place of its sequences."""
    tiles = tl.cdiv(tokens * HEADS, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)  # int32 offsets overflow past 2**31 elements
    sequence = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = sequence < tokens * HEADS
    return row, ((sequence // HEADS).to(tl.int64), sequence % HEADS, inside, frames, tokens)


@triton.jit
def _known_scores(scores, frame, frames, SCALE: tl.constexpr):
    """Scores [BLOCK, queries, keys] as powers of two, with those of frames past the last gone."""
    scores = scores * (SCALE * 1.4426950408889634)
    return tl.where((frame < frames)[None, None, :], scores, float("-inf"))


@triton.jit
def _frame_attention_kernel(
    query_ptr, key_ptr, value_ptr, query_row_ptr, query_blend_ptr,
    deviation_row_ptr, deviation_blend_ptr, deviation_parts_ptr,
    motion_slot_ptr, motion_scale_ptr, query_bank_ptr, key_bank_ptr, value_bank_ptr,
    frames, tokens,
    query_by_row, query_by_frame, query_by_token, query_by_channel,
    key_by_row, key_by_frame, key_by_token, key_by_channel,
    value_by_row, value_by_frame, value_by_token, value_by_channel,
    out_ptr,
    HEADS: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    CHOICE: tl.constexpr, SHARE: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, FRAMES: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, place = _place(frames, tokens, HEADS, BLOCK)
    width = tl.full((), HEADS * D, tl.int64)
    query = (query_ptr, query_by_row, query_by_frame, query_by_token, query_by_channel)
    key = (key_ptr, key_by_row, key_by_frame, key_by_token, key_by_channel)
    value = (value_ptr, value_by_row, value_by_frame, value_by_token, value_by_channel)
    query_bank = (query_bank_ptr, frames * width, width, 0, 1)
    key_bank = (key_bank_ptr, frames * width, width, 0, 1)
    value_bank = (value_bank_ptr, frames * tokens * width, tokens * width, width, 1)
    motion = (motion_slot_ptr, motion_scale_ptr)
    deviation = (deviation_row_ptr, deviation_blend_ptr, deviation_parts_ptr)
    choice = (query_row_ptr, query_blend_ptr)
    of_query = (query, query_bank, motion, deviation)
    of_key = (key, key_bank, motion, deviation)
    of_value = (value, value_bank, motion, deviation)
    kind: tl.constexpr = query_ptr.dtype.element_ty

    for first in range(0, FRAMES, PART):
        frame = first + tl.arange(0, PART)
        q = _chosen(of_query, choice, row, place, frame, D, 0, MAIN, FRAMES, CHOICE, SHARE).to(kind)
        out = tl.zeros((BLOCK, PART, MAIN), tl.float32)
        if TAIL:
            q_tail = _chosen(
                of_query, choice, row, place, frame, D, MAIN, TAIL, FRAMES, CHOICE, SHARE
            ).to(kind)
            out_tail = tl.zeros((BLOCK, PART, TAIL), tl.float32)
        top = tl.full((BLOCK, PART), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK, PART), tl.float32)
        for start in range(0, FRAMES, PART):  # once, unless frames are many; a softmax of parts
            of = start + tl.arange(0, PART)
            k = _moved(of_key, 1, row, place, of, D, 0, MAIN, FRAMES, SHARE).to(kind)
            v = _moved(of_value, 2, row, place, of, D, 0, MAIN, FRAMES, SHARE).to(kind)
            scores = _product(q, _turned(k))
            if TAIL:
                k_tail = _moved(of_key, 1, row, place, of, D, MAIN, TAIL, FRAMES, SHARE).to(kind)
                v_tail = _moved(of_value, 2, row, place, of, D, MAIN, TAIL, FRAMES, SHARE).to(kind)
                scores += _product(q_tail, _turned(k_tail))
            scores = _known_scores(scores, of, frames, SCALE)
            higher = tl.maximum(top, tl.max(scores, 2))
            kept = tl.exp2(top - higher)
            weights = tl.exp2(scores - higher[:, :, None])
            total = total * kept + tl.sum(weights, 2)
            weights = weights.to(kind)
            out = out * kept[:, :, None] + _product(weights, v)
            if TAIL:
                out_tail = out_tail * kept[:, :, None] + _product(weights, v_tail)
            top = higher
        _put(out_ptr, out / total[:, :, None], row, place, frame, HEADS, D, 0, MAIN)
        if TAIL:
            _put(out_ptr, out_tail / total[:, :, None], row, place, frame, HEADS, D, MAIN, TAIL)


@triton.jit
def _frame_attention_backward_kernel(
    grad_ptr, query_ptr, key_ptr, value_ptr, query_row_ptr, query_blend_ptr,
    deviation_row_ptr, deviation_blend_ptr, deviation_parts_ptr,
    motion_slot_ptr, motion_scale_ptr, query_bank_ptr, key_bank_ptr, value_bank_ptr,
    frames, tokens,
    grad_by_row, grad_by_frame, grad_by_token, grad_by_channel,
    query_by_row, query_by_frame, query_by_token, query_by_channel,
    key_by_row, key_by_frame, key_by_token, key_by_channel,
    value_by_row, value_by_frame, value_by_token, value_by_channel,
    grad_query_ptr, grad_key_ptr, grad_value_ptr,
    HEADS: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    CHOICE: tl.constexpr, SHARE: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, FRAMES: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, place = _place(frames, tokens, HEADS, BLOCK)
    width = tl.full((), HEADS * D, tl.int64)
    grad = (grad_ptr, grad_by_row, grad_by_frame, grad_by_token, grad_by_channel)
    query = (query_ptr, query_by_row, query_by_frame, query_by_token, query_by_channel)
    key = (key_ptr, key_by_row, key_by_frame, key_by_token, key_by_channel)
    value = (value_ptr, value_by_row, value_by_frame, value_by_token, value_by_channel)
    query_bank = (query_bank_ptr, frames * width, width, 0, 1)
    key_bank = (key_bank_ptr, frames * width, width, 0, 1)
    value_bank = (value_bank_ptr, frames * tokens * width, tokens * width, width, 1)
    motion = (motion_slot_ptr, motion_scale_ptr)
    deviation = (deviation_row_ptr, deviation_blend_ptr, deviation_parts_ptr)
    choice = (query_row_ptr, query_blend_ptr)
    of_query = (query, query_bank, motion, deviation)
    of_key = (key, key_bank, motion, deviation)
    of_value = (value, value_bank, motion, deviation)
    kind: tl.constexpr = query_ptr.dtype.element_ty

    every = tl.arange(0, FRAMES)
    k = _moved(of_key, 1, row, place, every, D, 0, MAIN, FRAMES, SHARE).to(kind)
    v = _moved(of_value, 2, row, place, every, D, 0, MAIN, FRAMES, SHARE).to(kind)
    grad_k = tl.zeros((BLOCK, FRAMES, MAIN), tl.float32)
    grad_v = tl.zeros((BLOCK, FRAMES, MAIN), tl.float32)
    if TAIL:
        k_tail = _moved(of_key, 1, row, place, every, D, MAIN, TAIL, FRAMES, SHARE).to(kind)
        v_tail = _moved(of_value, 2, row, place, every, D, MAIN, TAIL, FRAMES, SHARE).to(kind)
        grad_k_tail = tl.zeros((BLOCK, FRAMES, TAIL), tl.float32)
        grad_v_tail = tl.zeros((BLOCK, FRAMES, TAIL), tl.float32)

    for first in range(0, FRAMES, PART):
        frame = first + tl.arange(0, PART)
        q = _chosen(of_query, choice, row, place, frame, D, 0, MAIN, FRAMES, CHOICE, SHARE).to(kind)
        # Zero past the last frame, and so is what such a query adds to any gradient.
        g = _tile(grad, row, place, frame, D, 0, MAIN).to(kind)
        scores = _product(q, _turned(k))
        grad_weights = _product(g, _turned(v))
        if TAIL:
            q_tail = _chosen(
                of_query, choice, row, place, frame, D, MAIN, TAIL, FRAMES, CHOICE, SHARE
            ).to(kind)
            g_tail = _tile(grad, row, place, frame, D, MAIN, TAIL).to(kind)
            scores += _product(q_tail, _turned(k_tail))
            grad_weights += _product(g_tail, _turned(v_tail))
        scores = _known_scores(scores, every, frames, SCALE)
        weights = tl.exp2(scores - tl.max(scores, 2)[:, :, None])
        weights /= tl.sum(weights, 2)[:, :, None]
        common = tl.sum(weights * grad_weights, 2)[:, :, None]
        grad_scores = (weights * (grad_weights - common) * SCALE).to(kind)
        weights = weights.to(kind)
        _put(grad_query_ptr, _product(grad_scores, k), row, place, frame, HEADS, D, 0, MAIN)
        grad_k += _product(_turned(grad_scores), q)
        grad_v += _product(_turned(weights), g)
        if TAIL:
            grad_q_tail = _product(grad_scores, k_tail)
            _put(grad_query_ptr, grad_q_tail, row, place, frame, HEADS, D, MAIN, TAIL)
            grad_k_tail += _product(_turned(grad_scores), q_tail)
            grad_v_tail += _product(_turned(weights), g_tail)

    _put(grad_key_ptr, grad_k, row, place, every, HEADS, D, 0, MAIN)
    _put(grad_value_ptr, grad_v, row, place, every, HEADS, D, 0, MAIN)
    if TAIL:
        _put(grad_key_ptr, grad_k_tail, row, place, every, HEADS, D, MAIN, TAIL)
        _put(grad_value_ptr, grad_v_tail, row, place, every, HEADS, D, MAIN, TAIL)


def _blocks(
    operator: str, frames: int, d: int, itemsize: int, *, controlled: bool
) -> dict[str, int]:
    """The sizes of a launch, from its settings; with controls a program holds more at a time.

    A batched product gives each warp matrices of its own, so a program takes at least as many
    sequences as it has warps, and TILE bytes of each tensor if that is more. A sequence of more
    than 32 frames, or of more than WHOLE bytes, is too much for one warp: there ONE_WARPS work on
    one sequence, ONE_TILE bytes of each tensor at a time.
    """
    main, tail = split_head_dim(d)
    padded = max(triton.next_power_of_2(frames), _TILE)
    size = padded * (main + tail) * itemsize
    name = f"{operator}_controlled" if controlled else operator
    chosen = settings(name, f"frames{padded}_d{main + tail}")
    tile, whole, one_tile, one_warps = (
        chosen.pop(name) for name in ("TILE", "WHOLE", "ONE_TILE", "ONE_WARPS")
    )
    if padded <= 32 and size <= whole:
        part = padded
        block = max(_power_below(tile // size), chosen["num_warps"])
    else:
        part = min(max(_power_below(one_tile * padded // size), _TILE), padded)
        block, chosen["num_warps"] = 1, one_warps
    return {"MAIN": main, "TAIL": tail, "FRAMES": padded, "PART": part, "BLOCK": block, **chosen}


def _power_below(number: int) -> int:
    """The greatest power of two that is at most `number`, and 1 below that."""
    return 1 << max(number.bit_length() - 1, 0)


def _launch_forward(
    query: Tensor, key: Tensor, value: Tensor, controls: Controls, heads: int, out: Tensor
) -> None:
    """Run one program for each BLOCK sequences of each row; `out` is contiguous."""
    _launch(
        _frame_attention_kernel, "frame_attention", (query, key, value), controls, heads, (out,)
    )


def _launch_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    controls: Controls,
    heads: int,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """The same, for the gradients of the mixed q, k and v; `grads` are contiguous."""
    _launch(
        _frame_attention_backward_kernel,
        "frame_attention_backward",
        (grad, query, key, value),
        controls,
        heads,
        grads,
    )


def _launch(
    kernel,
    operator: str,
    tensors: tuple[Tensor, ...],
    controls: Controls,
    heads: int,
    outs: tuple[Tensor, ...],
) -> None:
    rows, frames, tokens, width = tensors[0].shape
    if not tensors[0].numel():
        return
    blocks = _blocks(
        operator,
        frames,
        width // heads,
        tensors[0].element_size(),
        controlled=any(control is not None for control in controls),
    )
    controls = tuple(t if t is None else t.contiguous() for t in controls)
    _, query_blend, _, deviation_blend, *_ = controls
    grid = (rows * triton.cdiv(tokens * heads, blocks["BLOCK"]),)
    kernel[grid](
        *tensors,
        *controls,
        frames,
        tokens,
        *(stride for tensor in tensors for stride in tensor.stride()),
        *outs,
        HEADS=heads,
        D=width // heads,
        SCALE=(width // heads) ** -0.5,
        CHOICE=query_blend is not None and query_blend.ndim == 3,
        SHARE=deviation_blend is not None and deviation_blend.ndim == 3,
        **blocks,
    )


@torch.library.custom_op("kinetiq::frame_attention", mutates_args=(), device_types="cuda")
def _frame_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_row: Tensor | None,
    query_blend: Tensor | None,
    deviation_row: Tensor | None,
    deviation_blend: Tensor | None,
    deviation_parts: Tensor | None,
    motion_slot: Tensor | None,
    motion_scale: Tensor | None,
    query_bank: Tensor | None,
    key_bank: Tensor | None,
    value_bank: Tensor | None,
    heads: int,
) -> Tensor:
    controls = (
        query_row,
        query_blend,
        deviation_row,
        deviation_blend,
        deviation_parts,
        motion_slot,
        motion_scale,
        query_bank,
        key_bank,
        value_bank,
    )
    out = query.new_empty(query.shape)
    _launch_forward(query, key, value, controls, heads, out)
    return out


@_frame_attention.register_fake
def _(query, *_others):
    return query.new_empty(query.shape)


@_frame_attention.register_kernel("cpu")
def _(query, key, value, *controls_and_heads):
    *controls, heads = controls_and_heads
    return _attend(*mix(query, key, value, *controls), heads)


@torch.library.custom_op("kinetiq::frame_attention_backward", mutates_args=(), device_types="cuda")
def _frame_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_row: Tensor | None,
    query_blend: Tensor | None,
    deviation_row: Tensor | None,
    deviation_blend: Tensor | None,
    deviation_parts: Tensor | None,
    motion_slot: Tensor | None,
    motion_scale: Tensor | None,
    query_bank: Tensor | None,
    key_bank: Tensor | None,
    value_bank: Tensor | None,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v as `mix` leaves them, which it is left to pass on."""
    controls = (
        query_row,
        query_blend,
        deviation_row,
        deviation_blend,
        deviation_parts,
        motion_slot,
        motion_scale,
        query_bank,
        key_bank,
        value_bank,
    )
    grads = (query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape))
    _launch_backward(grad, query, key, value, controls, heads, grads)
    return grads


@_frame_attention_backward.register_fake
def _(_grad, query, key, value, *_others):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


@_frame_attention_backward.register_kernel("cpu")
def _(grad, query, key, value, *controls_and_heads):
    *controls, heads = controls_and_heads
    wide = torch.promote_types(query.dtype, torch.float32)
    g, q, k, v = (  # [rows, tokens, heads, frames, d]
        t.to(wide).unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4)
        for t in (grad, *mix(query, key, value, *controls))
    )
    scale = q.shape[-1] ** -0.5
    weights = (q * scale @ k.transpose(-1, -2)).softmax(-1)
    grad_weights = g @ v.transpose(-1, -2)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * scale
    grads = (grad_scores @ k, grad_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ g)
    return tuple(t.permute(0, 3, 1, 2, 4).flatten(-2).to(query.dtype).contiguous() for t in grads)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    """Gradients of the attention by the kernel, and of what the controls do by PyTorch."""
    tensors = ctx.saved_tensors
    grads = _frame_attention_backward(grad, *tensors, ctx.heads)
    if all(control is None for control in tensors[3:]):
        return *grads, *([None] * (len(tensors) - 2))
    with torch.enable_grad():
        leaves = [
            tensor.detach().requires_grad_() if wanted else tensor
            for tensor, wanted in zip(tensors, ctx.needs_input_grad, strict=False)
        ]
        mixed = [
            (out, of_out)
            for out, of_out in zip(mix(*leaves), grads, strict=True)
            if out.requires_grad
        ]
    wanted = [leaf for leaf, needed in zip(leaves, ctx.needs_input_grad, strict=False) if needed]
    outs, of_outs = zip(*mixed, strict=True)
    found = iter(torch.autograd.grad(outs, wanted, of_outs, allow_unused=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


_frame_attention.register_autograd(_backward, setup_context=_save)


def _launch_case(
    shape: tuple[int, int, int, int, int],
    controlled: bool,
    forward: bool,
    dtype: torch.dtype,
) -> None:
    """One launch on tensors without memory; `controlled` with controls of all kinds."""
    rows, frames, tokens, heads, d = shape
    width = heads * d
    make = partial(torch.empty, dtype=dtype, device="meta")
    grad, query, key, value = (make(rows, frames, tokens, width) for _ in range(4))
    controls: Controls = (None,) * 10
    if controlled:
        row = torch.empty(rows, dtype=torch.int64, device="meta")
        blend = make(rows, dtype=torch.float32)
        bank = make(2, frames, width)
        values = make(2, frames, tokens, width)
        controls = (row, blend, row, blend, make(rows, 3), row, blend, bank, bank, values)
    if forward:
        _launch_forward(query, key, value, controls, heads, grad)
    else:
        _launch_backward(grad, query, key, value, controls, heads, (query, key, value))


def _padded_work(frames: int, d: int) -> float:
    """Multiplications done for each one asked for; both products are frames x frames x d."""
    padded = max(triton.next_power_of_2(frames), _TILE)
    return (padded / frames) ** 2 * sum(split_head_dim(d)) / d


_SHAPES = {  # rows, frames, tokens, heads, d; rows are the halves of guidance
    "animatediff_64x64": (2, 16, 4096, 8, 40),
    "animatediff_32x32": (2, 16, 1024, 8, 80),
    "animatediff_16x16": (2, 16, 256, 8, 160),
    "zeroscope_40x72": (2, 24, 2880, 5, 64),
    "zeroscope_20x36": (2, 24, 720, 10, 64),
    "videocrafter2_40x64": (2, 16, 2560, 5, 64),
    "embedded_16x16": (2, 8, 256, 2, 32),
    "embedded_8x8": (2, 8, 64, 4, 32),
    "longest": (2, 128, 1024, 8, 80),
}
COMPILED = tuple(
    CompileCase(
        "frame_attention",
        f"{name}_controlled" if controlled else name,
        forward,
        partial(_launch_case, shape, controlled, forward),
        _padded_work(shape[1], shape[4]),
    )
    for name, shape in _SHAPES.items()
    for controlled in ((False,) if name == "longest" else (False, True))
    for forward in (True, False)
)


def _check_kernel(query: Tensor, heads: int) -> None:
    """Require what the GPU kernel can hold."""
    frames, d = query.shape[1], query.shape[-1] // heads
    if frames > MAX_FRAMES or d > MAX_HEAD_DIM or query.dtype not in _TYPES:
        raise ShapeError(
            f"frame_attention: on a GPU query must have at most {MAX_FRAMES} frames, d at most "
            f"{MAX_HEAD_DIM} and type float32, float16 or bfloat16, got {frames} frames, d = {d} "
            f"and {query.dtype}"
        )


def _check_controls(
    query: Tensor,
    query_row: Tensor | None,
    query_blend: Tensor | None,
    deviation_row: Tensor | None,
    deviation_blend: Tensor | None,
    deviation_parts: Tensor | None,
) -> None:
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


def _check_motion(
    query: Tensor,
    motion_slot: Tensor | None,
    motion_scale: Tensor | None,
    query_bank: Tensor | None,
    key_bank: Tensor | None,
    value_bank: Tensor | None,
) -> None:
    where = "frame_attention"
    rows, frames, tokens, width = query.shape
    if motion_slot is not None and (
        list(motion_slot.shape) != [rows] or motion_slot.dtype != torch.int64
    ):
        raise ShapeError(
            f"{where}: motion_slot must be int64 [rows = {rows}], "
            f"got {motion_slot.dtype} {list(motion_slot.shape)}"
        )
    if motion_scale is not None and list(motion_scale.shape) != [rows]:
        raise ShapeError(
            f"{where}: motion_scale must be [rows = {rows}], got {list(motion_scale.shape)}"
        )
    banks = {"query_bank": query_bank, "key_bank": key_bank, "value_bank": value_bank}
    given = {name: bank for name, bank in banks.items() if bank is not None}
    if motion_slot is None and (given or motion_scale is not None):
        raise ShapeError(f"{where}: motion_scale and banks need motion_slot, got none")
    if motion_slot is not None and not given:
        raise ShapeError(
            f"{where}: motion_slot needs query_bank, key_bank or value_bank, got motion_slot alone"
        )
    for name, bank in given.items():
        slots = bank.shape[0] if bank.ndim else 0
        places = [tokens] if name == "value_bank" else []
        if slots < 1 or list(bank.shape) != [slots, frames, *places, width]:
            words = "frames, tokens, heads * d" if places else "frames, heads * d"
            raise ShapeError(
                f"{where}: {name} must be [slots, {words}] = [slots, "
                f"{', '.join(map(str, (frames, *places, width)))}], got {list(bank.shape)}"
            )
        check_kind(where, name, bank, query)
        if motion_slot is not None:
            _check_slots(motion_slot, slots)


def _check_slots(motion_slot: Tensor, slots: int) -> None:
    """Require slots that a bank has; on a GPU that is checked when controls are resolved."""
    if motion_slot.device.type != "cpu" or torch.compiler.is_compiling() or not motion_slot.numel():
        return
    low, high = (int(bound) for bound in motion_slot.aminmax())
    if low < 0 or high >= slots:
        raise ShapeError(
            f"frame_attention: motion_slot must have values from 0 to {slots - 1}, "
            f"got {low} to {high}"
        )


def _check(query: Tensor, key: Tensor, value: Tensor, heads: int) -> None:
    if query.ndim != 4 or heads < 1 or query.shape[-1] % heads:
        raise ShapeError(
            f"frame_attention: query must be [rows, frames, tokens, heads * d] with heads = "
            f"{heads}, got {list(query.shape)}"
        )
    if not query.shape[1] or not query.shape[-1]:
        raise ShapeError(
            f"frame_attention: query must have at least one frame and one channel, "
            f"got {list(query.shape)}"
        )
    for name, tensor in {"key": key, "value": value}.items():
        if tensor.shape != query.shape:
            raise ShapeError(
                f"frame_attention: {name} must have the shape of query {list(query.shape)}, "
                f"got {list(tensor.shape)}"
            )
        check_kind("frame_attention", name, tensor, query)
