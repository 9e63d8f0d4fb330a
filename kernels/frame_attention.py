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
softmax and means are in float32. A sequence too long to be held at once is attended to in parts;
deviations are then moved before, by PyTorch's operators, since every part would need the means.

`frame_attention_with_motion` also returns the motion in the output, (out - mean_F(out)) P, the
`motion_feature` of it: there a program takes the heads of its positions one after another, and
what it projects comes from the cache that it has just written through.

Source: query injection, "Motion by Queries", arXiv:2412.07750, sec. 3, here over frames; removal
of the mean over frames, MOFT, arXiv:2405.14864, sec. 3.2; their union is this project's. Motion
embeddings, "Motion Inversion", arXiv:2403.20193, sec. 3.
"""

from collections.abc import Iterator
from functools import partial
from typing import TypedDict, Unpack

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor

from kinetiq.errors import ShapeError
from kinetiq.kernels._autograd import differentiate, keep_types, make_room
from kinetiq.kernels._checks import (
    check_blend,
    check_device,
    check_heads,
    check_kind,
    check_range,
    check_rows,
    check_tensor,
    check_type,
    require_index,
)
from kinetiq.kernels._compile import CompileCase
from kinetiq.kernels._cost import Cost
from kinetiq.kernels._launch import settings
from kinetiq.kernels._triton import tl, triton
from kinetiq.kernels.motion_feature import motion_feature_reference
from kinetiq.kernels.query_attention import is_recorded, split_head_dim, take_rows

PARTS = ("q", "k", "v")
CONTROLS = (  # in the operators' order
    "query_row",
    "query_blend",
    "deviation_row",
    "deviation_blend",
    "deviation_parts",
    "motion_slot",
    "motion_scale",
    "query_bank",
    "key_bank",
    "value_bank",
)
MAX_FRAMES = 128  # all frames of a sequence must fit on the chip
MAX_HEAD_DIM = 256
_WHERE = "frame_attention"
_TYPES = (torch.float32, torch.float16, torch.bfloat16)  # that a GPU kernel takes
CACHED = 2**18  # elements of each of a few tensors that a CPU's cache keeps
_LINE = 16  # channels of float32 that a line of a CPU's cache holds
_MANY = 64  # frames, whose softmax over a last axis fills a CPU's vectors
_TILE = 16  # the least side of a product on the matrix units
_PROJECTED = 32  # channels of the output, and motion channels, that are multiplied at a time

_Ordered = tuple[Tensor | None, ...]  # controls, one for each name in CONTROLS
_UNCONTROLLED: _Ordered = (None,) * len(CONTROLS)


class MotionControls(TypedDict, total=False):
    """Those of the controls of `frame_attention` that add motion; None as if not given."""

    motion_slot: Tensor | None
    motion_scale: Tensor | None
    query_bank: Tensor | None
    key_bank: Tensor | None
    value_bank: Tensor | None


class Controls(MotionControls, total=False):
    """The controls of `frame_attention`, which says what each is; None as if not given."""

    query_row: Tensor | None
    query_blend: Tensor | None
    deviation_row: Tensor | None
    deviation_blend: Tensor | None
    deviation_parts: Tensor | None


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
        ShapeError: a shape, type or device does not match, or a row or slot that is on the CPU is
            out of range; one on a GPU is not looked at, and reads memory of others if it is wrong:
            it must be checked where it is made.
    """
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
    _check(query, key, value, heads, controls)
    if query.device.type == "cpu" and not torch.compiler.is_compiling():
        return attend_on_cpu(*_mix(query, key, value, controls), heads)
    out: Tensor = _frame_attention(query, key, value, *controls, heads)
    return out


def frame_attention_with_motion(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    *,
    heads: int,
    **controls: Unpack[Controls],
) -> tuple[Tensor, Tensor]:
    """Return `frame_attention`, and what changes over the frames of it in motion channels.

        motion[r, f, p] = (out[r, f, p] - mean_F(out[r, :, p])) P

    Args:
        query: like the others, as in `frame_attention`.
        key: likewise.
        value: likewise.
        projection: P, [heads * d, motion channels], of the type and on the device of `query`.
            To see the motion of the projected output out W^T, give W^T P.
        heads: number of attention heads.
        **controls: as in `frame_attention`.

    Returns:
        The output, and its motion [rows, frames, tokens, motion channels], contiguous.

    Raises:
        ShapeError: as in `frame_attention`; rows and slots on a GPU are not looked at here either.
    """
    ordered = _order(controls)
    _check(query, key, value, heads, ordered)
    _check_projection(query, projection)
    if query.device.type == "cpu" and not torch.compiler.is_compiling():
        return _attend_with_motion(query, key, value, projection, ordered, heads)
    out: tuple[Tensor, Tensor] = _frame_attention_with_motion(
        query, key, value, projection, *ordered, heads
    )
    return out


def mix(
    query: Tensor, key: Tensor, value: Tensor, **controls: Unpack[Controls]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v as the controls of `frame_attention` make them."""
    return _mix(query, key, value, _order(controls))


def _mix(
    query: Tensor, key: Tensor, value: Tensor, controls: _Ordered
) -> tuple[Tensor, Tensor, Tensor]:
    query_row, query_blend, deviation_row, deviation_blend, deviation_parts, *motion = controls
    motion_slot, motion_scale, *banks = motion
    if motion_slot is not None:
        query, key, value = (
            own if bank is None else add_motion(own, motion_slot, motion_scale, bank)
            for own, bank in zip((query, key, value), banks, strict=True)
        )
    if deviation_row is not None:
        query, key, value = move_deviations(
            (query, key, value), deviation_row, deviation_blend, deviation_parts
        )
    if query_row is not None:
        query = _blend(query, take_rows(query, query_row), query_blend)
    return query, key, value


def _order(controls: Controls) -> _Ordered:
    unknown = set(controls).difference(CONTROLS)
    if unknown:
        raise TypeError(
            f"frame_attention: controls must be among {', '.join(CONTROLS)}, "
            f"got {', '.join(sorted(unknown))}"
        )
    return tuple(controls.get(name) for name in CONTROLS)  # type: ignore[misc]


def add_motion(
    own: Tensor, motion_slot: Tensor, motion_scale: Tensor | None, bank: Tensor
) -> Tensor:
    """Return `own` plus each row's slot of `bank`, times its scale; slot 0 adds nothing."""
    none = motion_slot <= 0
    # Before the product: a slot that is not used may hold anything, and 0 * NaN is NaN.
    bias = take_rows(bank, motion_slot).to(own.dtype).masked_fill(_widen(none, bank.ndim), 0)
    if motion_scale is not None:
        wide = torch.promote_types(own.dtype, torch.float32)  # a scale may be beyond float16
        scale = motion_scale.to(wide).masked_fill(none, 0)
        bias = bias.to(wide) * _widen(scale, bias.ndim)
    return (own + (bias.unsqueeze(2) if bias.ndim == 3 else bias)).to(own.dtype)


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
        aim = mean + take_rows(own - mean, deviation_row)
        share = deviation_blend
        if deviation_parts is not None:
            part = deviation_parts[:, index]
            share = part if share is None else share * _widen(part, share.ndim)
        moved.append(_blend(own, aim, share))
    return moved[0], moved[1], moved[2]


def frame_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, *, heads: int, **controls: Unpack[Controls]
) -> Tensor:
    """The definition, in PyTorch. Computes in float32 or wider, returns the type of `query`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    mixed = mix(query.to(wide), key.to(wide), value.to(wide), **controls)
    q, k, v = (_by_sequence(t, heads) for t in mixed)
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return _by_frame(weights @ v).to(query.dtype)


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


def _blend(own: Tensor, other: Tensor, share: Tensor | None) -> Tensor:
    """The share of `other` that is asked for, of each row or each frame and token; None: all."""
    if share is None:
        return other
    return torch.lerp(own, other, _widen(share.to(own.dtype), own.ndim))


def _widen(share: Tensor, rank: int) -> Tensor:
    """`share` with axes of size 1 appended until it has `rank` axes."""
    return share.reshape(share.shape + (1,) * (rank - share.ndim))


def _by_sequence(tensor: Tensor, heads: int) -> Tensor:
    """[rows, frames, tokens, heads * d] seen as [rows, tokens, heads, frames, d]."""
    return tensor.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4)


def _by_frame(tensor: Tensor) -> Tensor:
    """The same backwards, contiguous."""
    return tensor.permute(0, 3, 1, 2, 4).flatten(-2).contiguous()  # with one head it is a view


def _attend_with_motion(
    query: Tensor, key: Tensor, value: Tensor, projection: Tensor, controls: _Ordered, heads: int
) -> tuple[Tensor, Tensor]:
    out = attend_on_cpu(*_mix(query, key, value, controls), heads)
    with keep_types(query):
        return out, motion_feature_reference(out, projection=projection)


def attend_on_cpu(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Softmax attention over frames of q, k and v as they are, in float32 or wider."""
    with keep_types(query):
        if is_recorded(query, key, value):
            out: Tensor = _InPlace.apply(  # type: ignore[no-untyped-call]
                query, key, value, heads
            )[0]
        else:
            out, _ = _attend_in_place(query, key, value, heads, keep=False)
        return out


class _InPlace(torch.autograd.Function):
    """Attention over frames without a permuted copy, and its gradient likewise.

    Returns the weights as well, chunk by chunk, since only what is returned may be kept. They are
    not differentiable: where a gradient is recorded itself, it computes them again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, ...]:
        out, weights = _attend_in_place(query, key, value, heads, keep=True)
        return out, *weights

    @staticmethod
    def setup_context(ctx, inputs, outputs) -> None:
        *tensors, ctx.heads = inputs
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)  # of the weights they would be zeros, as many as those
        ctx.save_for_backward(*tensors, *outputs[1:])

    @staticmethod
    def backward(ctx, grad: Tensor | None, *_):
        if grad is None:
            return None, None, None, None
        query, key, value, *weights = ctx.saved_tensors
        kept = None if torch.is_grad_enabled() else weights
        with keep_types(grad):
            return *_differentiate_in_place(grad, query, key, value, ctx.heads, kept), None


def _attend_in_place(
    query: Tensor, key: Tensor, value: Tensor, heads: int, *, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """Softmax attention over frames, chunk by chunk, and the weights of each if they are kept."""
    wide = torch.promote_types(query.dtype, torch.float32)
    out = make_room((query, key, value), query.shape)
    if query.shape[1] >= _MANY and 2 * (query.shape[-1] // heads) < query.shape[1] and not keep:
        # Scores that outweigh what they are made of are not worth writing. PyTorch's fused
        # attention writes none, and is taken for tensors of four axes alone.
        for *own, o in zip(query, key, value, out, strict=True):
            *qkv, place = (t.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for t in (*own, o))
            place.copy_(F.scaled_dot_product_attention(*(t.to(wide) for t in qkv)))
        return out, []
    kept = []
    for *own, o in _chunks((query, key, value, out), heads, recorded=keep):
        q, k, v = (_together(t.to(wide)) for t in own)
        weights = _weights(q, k)
        o.copy_(torch.bmm(weights.mT, v))
        if keep:
            kept.append(weights)
    return out, kept


def _differentiate_in_place(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    kept: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, chunk by chunk; `kept` are the weights of each."""
    wide = torch.promote_types(query.dtype, torch.float32)
    given = (grad, query, key, value)
    of_query = make_room(given, query.shape)
    of_key, of_value = of_query.new_empty(query.shape), of_query.new_empty(query.shape)
    scale = (query.shape[-1] // heads) ** -0.5
    chunks = _chunks((*given, of_query, of_key, of_value), heads, recorded=True)
    for index, (*own, of_q, of_k, of_v) in enumerate(chunks):
        g, q, k, v = (_together(t.to(wide)) for t in own)
        weights = _weights(q, k) if kept is None else kept[index]
        of_scores = _differentiate_weights(g, v, weights)
        of_v.copy_(torch.bmm(weights, g))
        of_k.copy_(_scaled_product(of_scores, q, scale))
        of_q.copy_(_scaled_product(of_scores.mT, k, scale))
    return of_query, of_key, of_value


def _chunks(
    tensors: tuple[Tensor, ...], heads: int, *, recorded: bool = False
) -> Iterator[tuple[Tensor, ...]]:
    """[sequences, frames, d] of each tensor, as many sequences at a time as a cache holds.

    [frames, tokens * heads, d] is a batch of tokens * heads matrices [frames, d] whose lines lie
    far apart, and a batched product takes it as it is; only what it returns has to be copied to
    its place, out of the cache. The gradient takes twice as many tensors and so half as many
    sequences, and must take those whose weights were kept.
    """
    rows, frames, tokens, width = tensors[0].shape
    d = width // heads
    largest = frames * max(d, frames)  # of a sequence: its scores are [frames, frames]
    chunk = max(CACHED // (2 * largest if recorded else largest), 1)
    views = [t.contiguous().view(rows, frames, tokens * heads, d).transpose(1, 2) for t in tensors]
    for row in range(rows):
        for start in range(0, tokens * heads, chunk):
            yield tuple(t[row, start : start + chunk] for t in views)


def _together(tensor: Tensor) -> Tensor:
    """A chunk whose lines lie together if they are short, since a product reads each many times."""
    return tensor.contiguous() if tensor.shape[2] < _LINE else tensor


def _weights(query: Tensor, key: Tensor) -> Tensor:
    """[sequences, keys, queries], which sum to one over the keys.

    The keys come first because softmax over any axis but the last takes whole vectors, where it
    would fill only a part of one with the few frames of a last axis. Where frames are many the
    queries come first in memory, and what is returned is a view.
    """
    many = query.shape[1] >= _MANY
    left, right = (query, key) if many else (key, query)
    scores = _scaled_product(left, right.mT, query.shape[-1] ** -0.5)
    return scores.softmax(2).mT if many else scores.softmax(1)


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """The batched product times a number, at the cost of the product alone."""
    unused = left.new_zeros(()).expand(1, 1, 1)
    return torch.baddbmm(unused, left, right, beta=0, alpha=scale)


def _differentiate_weights(grad: Tensor, value: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the scores, like `weights` and as they are in memory."""
    softmax_backward = torch._softmax_backward_data  # noqa: SLF001  autograd's own, in one pass
    if weights.shape[1] >= _MANY:
        return softmax_backward(torch.bmm(grad, value.mT), weights.mT, 2, value.dtype).mT
    return softmax_backward(torch.bmm(value, grad.mT), weights, 1, value.dtype)


# In the kernels below
#   a tensor is (pointer, stride of rows, of frames, of tokens, of channels);
#   an operand is (tensor, bank, motion slots and scales, deviation rows, blends and parts);
#   a place is (token, head, inside, frames, tokens) of BLOCK sequences;
#   `frame` is which frames are wanted of them.
# CHOICE and SHARE say whether queries and deviations are blended per frame and token, not per row.
# A tile is [BLOCK, frame, WIDTH], with the channels FROM to FROM + WIDTH of each head. The channels
# of a head are in two tiles, MAIN and TAIL wide; where TAIL is 0 the second is the first again.


@triton.jit
def _tile(tensor, row, place, frame, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    """What a tensor holds; zero where it holds nothing."""
    token, head, inside, frames, _tokens = place
    channel = FROM + tl.arange(0, WIDTH)
    start = tensor[0] + row * tensor[1] + token * tensor[3] + head * D * tensor[4]  # [BLOCK]
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
        if motion[1] is not None:  # a scale of no slot may be anything, and 0 * inf is NaN
            bias *= tl.load(motion[1] + row, mask=slot > 0, other=0.0).to(tl.float32)
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
    D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """The same, moved to another row's deviation from its mean; `frame` is then all frames."""
    own = _biased(operand, row, place, frame, D, FROM, WIDTH)
    deviation = operand[3]
    if deviation[0] is not None:
        own = own.to(tl.float32)
        source = tl.load(deviation[0] + row)
        other = _biased(operand, source, place, frame, D, FROM, WIDTH).to(tl.float32)
        # Each is taken off its own mean first, so that what does not change is exactly zero.
        own_mean, other_mean = tl.sum(own, 1) / place[3], tl.sum(other, 1) / place[3]
        change = (own_mean[:, None, :] - own) + (other - other_mean[:, None, :])
        if deviation[1] is not None:
            change *= _share(deviation[1], row, place, frame, SHARE)
        if deviation[2] is not None:
            change *= tl.load(deviation[2] + row * 3 + PART).to(tl.float32)
        own += change
    return own


@triton.jit
def _chosen(
    operand, choice, row, place, frame,
    D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr,
    CHOICE: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """The same for queries, and then replaced by another row's."""
    reader = row
    if choice[0] is not None:
        reader = tl.load(choice[0] + row)
    chosen = _moved(operand, 0, reader, place, frame, D, FROM, WIDTH, SHARE)
    if choice[1] is not None:
        own = _moved(operand, 0, row, place, frame, D, FROM, WIDTH, SHARE)
        share = _share(choice[1], row, place, frame, CHOICE)
        far, near = chosen.to(tl.float32), own.to(tl.float32)
        way = far - near  # as torch.lerp: exact at both ends of finite numbers
        chosen = tl.where(share < 0.5, near + share * way, far - (1.0 - share) * way)
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
    at = (at + (head * D)[:, None])[:, :, None] + channel[None, None, :]
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
    token, head = (sequence // HEADS).to(tl.int64), (sequence % HEADS).to(tl.int64)
    return row, (token, head, inside, frames, tokens)


@triton.jit
def _known_scores(scores, frame, frames, SCALE: tl.constexpr):
    """Scores [BLOCK, queries, keys] as powers of two, with those of frames past the last gone."""
    scores = scores * (SCALE * 1.4426950408889634)
    return tl.where((frame < frames)[None, None, :], scores, float("-inf"))


@triton.jit
def _query_tiles(
    operand, choice, row, place, frame, KIND: tl.constexpr, D: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, CHOICE: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Both tiles of the queries."""
    main = _chosen(operand, choice, row, place, frame, D, 0, MAIN, CHOICE, SHARE).to(KIND)
    tail = main
    if TAIL:
        wide = _chosen(operand, choice, row, place, frame, D, MAIN, TAIL, CHOICE, SHARE)
        tail = wide.to(KIND)
    return main, tail


@triton.jit
def _key_tiles(
    operand, INDEX: tl.constexpr, row, place, frame, KIND: tl.constexpr, D: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Both tiles of the keys (INDEX 1) or values (INDEX 2)."""
    main = _moved(operand, INDEX, row, place, frame, D, 0, MAIN, SHARE).to(KIND)
    tail = main
    if TAIL:
        tail = _moved(operand, INDEX, row, place, frame, D, MAIN, TAIL, SHARE).to(KIND)
    return main, tail


@triton.jit
def _plain_tiles(
    tensor, row, place, frame, KIND: tl.constexpr, D: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Both tiles of a tensor that nothing changes."""
    main = _tile(tensor, row, place, frame, D, 0, MAIN).to(KIND)
    tail = main
    if TAIL:
        tail = _tile(tensor, row, place, frame, D, MAIN, TAIL).to(KIND)
    return main, tail


@triton.jit
def _over_channels(left, right, TAIL: tl.constexpr):
    """Products of each line of one with each line of the other, over all channels of a head."""
    product = _product(left[0], _turned(right[0]))
    if TAIL:
        product += _product(left[1], _turned(right[1]))
    return product


@triton.jit
def _put_tiles(
    out_ptr, main, tail, row, place, frame,
    HEADS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Store both tiles."""
    _put(out_ptr, main, row, place, frame, HEADS, D, 0, MAIN)
    if TAIL:
        _put(out_ptr, tail, row, place, frame, HEADS, D, MAIN, TAIL)


@triton.jit
def _attend_kernel_part(
    of_query, of_key, of_value, choice, row, place, out_ptr,
    KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    CHOICE: tl.constexpr, SHARE: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, FRAMES: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attention of the sequences of one place, PART frames at a time: a softmax of parts."""
    frames = place[3]
    for first in range(0, FRAMES, PART):
        frame = first + tl.arange(0, PART)
        q = _query_tiles(of_query, choice, row, place, frame, KIND, D, MAIN, TAIL, CHOICE, SHARE)
        out = tl.zeros((BLOCK, PART, MAIN), tl.float32)
        out_tail = out
        if TAIL:
            out_tail = tl.zeros((BLOCK, PART, TAIL), tl.float32)
        top = tl.full((BLOCK, PART), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK, PART), tl.float32)
        for start in range(0, FRAMES, PART):  # once, unless frames are many
            of = start + tl.arange(0, PART)
            k = _key_tiles(of_key, 1, row, place, of, KIND, D, MAIN, TAIL, SHARE)
            v = _key_tiles(of_value, 2, row, place, of, KIND, D, MAIN, TAIL, SHARE)
            scores = _known_scores(_over_channels(q, k, TAIL), of, frames, SCALE)
            higher = tl.maximum(top, tl.max(scores, 2))
            kept = tl.exp2(top - higher)
            weights = tl.exp2(scores - higher[:, :, None])
            total = total * kept + tl.sum(weights, 2)
            weights = weights.to(KIND)
            out = out * kept[:, :, None] + _product(weights, v[0])
            if TAIL:
                out_tail = out_tail * kept[:, :, None] + _product(weights, v[1])
            top = higher
        share = 1.0 / total[:, :, None]
        _put_tiles(out_ptr, out * share, out_tail * share, row, place, frame, HEADS, D, MAIN, TAIL)


@triton.jit
def _project(
    out_ptr, projection_ptr, motion_ptr, row, place, channels,
    WIDTH: tl.constexpr, FRAMES: tl.constexpr, BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Store the motion in what this program has stored: its deviation from its mean, projected."""
    token, _head, inside, frames, tokens = place
    frame = tl.arange(0, FRAMES)
    known = inside[:, None] & (frame < frames)[None, :]
    line = (row * frames + frame[None, :]) * tokens + token[:, None]  # [BLOCK, FRAMES]
    for first_out in range(0, channels, OUT):
        to = first_out + tl.arange(0, OUT)
        motion = tl.zeros((BLOCK * FRAMES, OUT), tl.float32)
        for first in range(0, WIDTH, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            mask = known[:, :, None] & (channel < WIDTH)[None, None, :]
            at = line[:, :, None] * WIDTH + channel[None, None, :]
            tile = tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tile -= (tl.sum(tile, 1) / frames)[:, None, :]
            weight = tl.load(
                projection_ptr + channel[:, None].to(tl.int64) * channels + to[None, :],
                mask=(channel < WIDTH)[:, None] & (to < channels)[None, :],
                other=0.0,
            )
            lines = tl.reshape(tile, (BLOCK * FRAMES, CHANNELS)).to(weight.dtype)
            motion += tl.dot(lines, weight, input_precision="ieee")
        tile = tl.reshape(motion, (BLOCK, FRAMES, OUT)).to(motion_ptr.dtype.element_ty)
        mask = known[:, :, None] & (to < channels)[None, None, :]
        tl.store(motion_ptr + line[:, :, None] * channels + to[None, None, :], tile, mask=mask)


@triton.jit
def _frame_attention_kernel(
    query_ptr, key_ptr, value_ptr, query_row_ptr, query_blend_ptr,
    deviation_row_ptr, deviation_blend_ptr, deviation_parts_ptr,
    motion_slot_ptr, motion_scale_ptr, query_bank_ptr, key_bank_ptr, value_bank_ptr,
    projection_ptr, frames, tokens, channels,
    query_by_row, query_by_frame, query_by_token, query_by_channel,
    key_by_row, key_by_frame, key_by_token, key_by_channel,
    value_by_row, value_by_frame, value_by_token, value_by_channel,
    out_ptr, motion_ptr,
    HEADS: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    CHOICE: tl.constexpr, SHARE: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, FRAMES: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK sequences; with a projection, all heads of BLOCK positions in turn."""
    query = (query_ptr, query_by_row, query_by_frame, query_by_token, query_by_channel)
    key = (key_ptr, key_by_row, key_by_frame, key_by_token, key_by_channel)
    value = (value_ptr, value_by_row, value_by_frame, value_by_token, value_by_channel)
    # Written out in both directions: Triton before 3.7 cannot return a tuple that holds None.
    motion = (motion_slot_ptr, motion_scale_ptr)
    deviation = (deviation_row_ptr, deviation_blend_ptr, deviation_parts_ptr)
    width = tl.full((), HEADS * D, tl.int64)
    by_frame, by_slot = frames * width, frames * tokens * width  # of banks, which are contiguous
    of_query = (query, (query_bank_ptr, by_frame, width, 0, 1), motion, deviation)
    of_key = (key, (key_bank_ptr, by_frame, width, 0, 1), motion, deviation)
    of_value = (value, (value_bank_ptr, by_slot, tokens * width, width, 1), motion, deviation)
    choice = (query_row_ptr, query_blend_ptr)
    kind: tl.constexpr = query_ptr.dtype.element_ty
    if projection_ptr is None:
        row, place = _place(frames, tokens, HEADS, BLOCK)
        _attend_kernel_part(
            of_query, of_key, of_value, choice, row, place, out_ptr, kind, HEADS, D, SCALE,
            CHOICE, SHARE, MAIN, TAIL, FRAMES, PART, BLOCK,
        )  # fmt: skip
    else:
        row, place = _place(frames, tokens, 1, BLOCK)
        token, none, inside, _frames, _tokens = place
        for head in range(HEADS):
            of_head = (token, none + head, inside, frames, tokens)
            _attend_kernel_part(
                of_query, of_key, of_value, choice, row, of_head, out_ptr, kind, HEADS, D, SCALE,
                CHOICE, SHARE, MAIN, TAIL, FRAMES, PART, BLOCK,
            )  # fmt: skip
        tl.debug_barrier()  # what the program's other threads have stored is read from here on
        _project(
            out_ptr, projection_ptr, motion_ptr, row, place, channels,
            HEADS * D, FRAMES, BLOCK, CHANNELS, OUT,
        )  # fmt: skip


@triton.jit
def _score_gradients(
    q, g, k, v, of, frames, top, total, common,
    KIND: tl.constexpr, SCALE: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Weights, and gradients of the scores before their scale; `common` is sum(weight dweight)."""
    scores = _known_scores(_over_channels(q, k, TAIL), of, frames, SCALE)
    weights = tl.exp2(scores - top[:, :, None]) / total[:, :, None]
    grad_scores = weights * (_over_channels(g, v, TAIL) - common[:, :, None]) * SCALE
    return weights.to(KIND), grad_scores.to(KIND)


@triton.jit
def _spread_out(part, frame, every):
    """A [BLOCK, PART] of some frames as [BLOCK, FRAMES], zero elsewhere."""
    same = every[None, :, None] == frame[None, None, :]
    return tl.sum(tl.where(same, part[:, None, :], 0.0), 2)


@triton.jit
def _pick_out(whole, frame, every):
    """The [BLOCK, PART] of some frames."""
    same = every[None, :, None] == frame[None, None, :]
    return tl.sum(tl.where(same, whole[:, :, None], 0.0), 1)


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
    """One program: BLOCK sequences at once, or one of them PART frames at a time."""
    row, place = _place(frames, tokens, HEADS, BLOCK)
    grad = (grad_ptr, grad_by_row, grad_by_frame, grad_by_token, grad_by_channel)
    query = (query_ptr, query_by_row, query_by_frame, query_by_token, query_by_channel)
    key = (key_ptr, key_by_row, key_by_frame, key_by_token, key_by_channel)
    value = (value_ptr, value_by_row, value_by_frame, value_by_token, value_by_channel)
    # Written out in both directions: Triton before 3.7 cannot return a tuple that holds None.
    motion = (motion_slot_ptr, motion_scale_ptr)
    deviation = (deviation_row_ptr, deviation_blend_ptr, deviation_parts_ptr)
    width = tl.full((), HEADS * D, tl.int64)
    by_frame, by_slot = frames * width, frames * tokens * width  # of banks, which are contiguous
    of_query = (query, (query_bank_ptr, by_frame, width, 0, 1), motion, deviation)
    of_key = (key, (key_bank_ptr, by_frame, width, 0, 1), motion, deviation)
    of_value = (value, (value_bank_ptr, by_slot, tokens * width, width, 1), motion, deviation)
    choice = (query_row_ptr, query_blend_ptr)
    kind: tl.constexpr = query_ptr.dtype.element_ty
    every = tl.arange(0, FRAMES)

    # The gradient is zero past the last frame, and so is what such a query adds to any gradient.
    if PART == FRAMES:
        q = _query_tiles(of_query, choice, row, place, every, kind, D, MAIN, TAIL, CHOICE, SHARE)
        g = _plain_tiles(grad, row, place, every, kind, D, MAIN, TAIL)
        k = _key_tiles(of_key, 1, row, place, every, kind, D, MAIN, TAIL, SHARE)
        v = _key_tiles(of_value, 2, row, place, every, kind, D, MAIN, TAIL, SHARE)
        scores = _known_scores(_over_channels(q, k, TAIL), every, frames, SCALE)
        weights = tl.exp2(scores - tl.max(scores, 2)[:, :, None])
        weights /= tl.sum(weights, 2)[:, :, None]
        grad_weights = _over_channels(g, v, TAIL)
        common = tl.sum(weights * grad_weights, 2)[:, :, None]
        grad_scores = (weights * (grad_weights - common) * SCALE).to(kind)
        weights = weights.to(kind)
        _put(grad_query_ptr, _product(grad_scores, k[0]), row, place, every, HEADS, D, 0, MAIN)
        by_key, by_weight = _turned(grad_scores), _turned(weights)
        _put(grad_key_ptr, _product(by_key, q[0]), row, place, every, HEADS, D, 0, MAIN)
        _put(grad_value_ptr, _product(by_weight, g[0]), row, place, every, HEADS, D, 0, MAIN)
        if TAIL:
            tile = _product(grad_scores, k[1])
            _put(grad_query_ptr, tile, row, place, every, HEADS, D, MAIN, TAIL)
            _put(grad_key_ptr, _product(by_key, q[1]), row, place, every, HEADS, D, MAIN, TAIL)
            tile = _product(by_weight, g[1])
            _put(grad_value_ptr, tile, row, place, every, HEADS, D, MAIN, TAIL)
    else:
        # Keys, values and their gradients of all frames do not fit on the chip. What each query
        # needs of all keys, three numbers, does: it is gathered for the queries' gradient and kept
        # for that of the keys.
        tops = tl.zeros((BLOCK, FRAMES), tl.float32)
        totals = tl.zeros((BLOCK, FRAMES), tl.float32)
        commons = tl.zeros((BLOCK, FRAMES), tl.float32)
        for first in range(0, FRAMES, PART):
            frame = first + tl.arange(0, PART)
            q = _query_tiles(
                of_query, choice, row, place, frame, kind, D, MAIN, TAIL, CHOICE, SHARE
            )
            g = _plain_tiles(grad, row, place, frame, kind, D, MAIN, TAIL)
            top = tl.full((BLOCK, PART), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK, PART), tl.float32)
            common = tl.zeros((BLOCK, PART), tl.float32)
            for start in range(0, FRAMES, PART):
                of = start + tl.arange(0, PART)
                k = _key_tiles(of_key, 1, row, place, of, kind, D, MAIN, TAIL, SHARE)
                v = _key_tiles(of_value, 2, row, place, of, kind, D, MAIN, TAIL, SHARE)
                scores = _known_scores(_over_channels(q, k, TAIL), of, frames, SCALE)
                higher = tl.maximum(top, tl.max(scores, 2))
                kept = tl.exp2(top - higher)
                weights = tl.exp2(scores - higher[:, :, None])
                total = total * kept + tl.sum(weights, 2)
                common = common * kept + tl.sum(weights * _over_channels(g, v, TAIL), 2)
                top = higher
            common /= total
            tops += _spread_out(top, frame, every)
            totals += _spread_out(total, frame, every)
            commons += _spread_out(common, frame, every)
            grad_q = tl.zeros((BLOCK, PART, MAIN), tl.float32)
            grad_q_tail = grad_q
            if TAIL:
                grad_q_tail = tl.zeros((BLOCK, PART, TAIL), tl.float32)
            for start in range(0, FRAMES, PART):
                of = start + tl.arange(0, PART)
                k = _key_tiles(of_key, 1, row, place, of, kind, D, MAIN, TAIL, SHARE)
                v = _key_tiles(of_value, 2, row, place, of, kind, D, MAIN, TAIL, SHARE)
                _weights, grad_scores = _score_gradients(
                    q, g, k, v, of, frames, top, total, common, kind, SCALE, TAIL
                )
                grad_q += _product(grad_scores, k[0])
                if TAIL:
                    grad_q_tail += _product(grad_scores, k[1])
            _put_tiles(grad_query_ptr, grad_q, grad_q_tail, row, place, frame, HEADS, D, MAIN, TAIL)
        for start in range(0, FRAMES, PART):
            of = start + tl.arange(0, PART)
            k = _key_tiles(of_key, 1, row, place, of, kind, D, MAIN, TAIL, SHARE)
            v = _key_tiles(of_value, 2, row, place, of, kind, D, MAIN, TAIL, SHARE)
            grad_k = tl.zeros((BLOCK, PART, MAIN), tl.float32)
            grad_v = tl.zeros((BLOCK, PART, MAIN), tl.float32)
            grad_k_tail, grad_v_tail = grad_k, grad_v
            if TAIL:
                grad_k_tail = tl.zeros((BLOCK, PART, TAIL), tl.float32)
                grad_v_tail = tl.zeros((BLOCK, PART, TAIL), tl.float32)
            for first in range(0, FRAMES, PART):
                frame = first + tl.arange(0, PART)
                q = _query_tiles(
                    of_query, choice, row, place, frame, kind, D, MAIN, TAIL, CHOICE, SHARE
                )
                g = _plain_tiles(grad, row, place, frame, kind, D, MAIN, TAIL)
                weights, grad_scores = _score_gradients(
                    q, g, k, v, of, frames, _pick_out(tops, frame, every),
                    _pick_out(totals, frame, every), _pick_out(commons, frame, every),
                    kind, SCALE, TAIL,
                )  # fmt: skip
                grad_k += _product(_turned(grad_scores), q[0])
                grad_v += _product(_turned(weights), g[0])
                if TAIL:
                    grad_k_tail += _product(_turned(grad_scores), q[1])
                    grad_v_tail += _product(_turned(weights), g[1])
            _put_tiles(grad_key_ptr, grad_k, grad_k_tail, row, place, of, HEADS, D, MAIN, TAIL)
            _put_tiles(grad_value_ptr, grad_v, grad_v_tail, row, place, of, HEADS, D, MAIN, TAIL)


def _blocks(
    operator: str,
    query: Tensor,
    controls: _Ordered,
    heads: int,
    projection: Tensor | None = None,
) -> dict[str, int]:
    """The sizes of a launch, from its settings; with controls or a projection it holds more.

    A batched product gives each warp matrices of its own, so a program takes at least as many
    sequences as it has warps, and TILE bytes of each tensor if that is more. A sequence of more
    than 32 frames, or of more than WHOLE bytes, is too much for one warp: there ONE_WARPS work on
    one sequence, ONE_TILE bytes of each tensor at a time.
    """
    main, tail = split_head_dim(query.shape[-1] // heads)
    padded = _padded(query.shape[1])
    line = (main + tail) * query.element_size()
    controlled = any(tensor is not None for tensor in controls)
    if controlled and projection is not None:
        name = f"{operator}_controlled_with_motion"
    elif controlled or projection is not None:
        name = f"{operator}_controlled"
    else:
        name = operator
    chosen = settings(name, f"frames{padded}_d{main + tail}")
    tile, whole, one_tile, one_warps = (
        chosen.pop(name) for name in ("TILE", "WHOLE", "ONE_TILE", "ONE_WARPS")
    )
    if padded <= 32 and padded * line <= whole:
        part, block = padded, max(_power_below(tile // (padded * line)), chosen["num_warps"])
    else:
        part, block = min(max(_power_below(one_tile // line), _TILE), padded), 1
        chosen["num_warps"] = one_warps
    return {"MAIN": main, "TAIL": tail, "FRAMES": padded, "PART": part, "BLOCK": block, **chosen}


def _is_mixed_first(controls: _Ordered, blocks: dict[str, int]) -> bool:
    """Whether the mean over frames is not at hand, since a program takes them in parts.

    Each part of the keys would read all frames of two rows again, for each part of the queries.
    """
    moves = controls[CONTROLS.index("deviation_row")] is not None
    return moves and blocks["PART"] < blocks["FRAMES"]


def _padded(frames: int) -> int:
    """How many frames a program takes, of which those past the last count for nothing."""
    return max(triton.next_power_of_2(frames), _TILE)


def _power_below(number: int) -> int:
    """The greatest power of two that is at most `number`, and 1 below that."""
    return 1 << max(number.bit_length() - 1, 0)


def _launch_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    controls: _Ordered,
    heads: int,
    out: Tensor,
    projection: Tensor | None = None,
    motion: Tensor | None = None,
) -> None:
    """Fill `out`, and with a projection `motion`; both are contiguous."""
    if not out.numel():
        return
    rows, frames, tokens, width = query.shape
    channels = 0 if projection is None else projection.shape[1]
    sequences = tokens * heads if projection is None else tokens
    with torch.cuda.device_of(query):  # of the current device are the settings and the launch
        blocks = _blocks("frame_attention", query, controls, heads, projection)
        if _is_mixed_first(controls, blocks):
            mixed = _mix(query, key, value, controls)
            _launch_forward(*mixed, _UNCONTROLLED, heads, out, projection, motion)
            return
        _frame_attention_kernel[(rows * triton.cdiv(sequences, blocks["BLOCK"]),)](
            query,
            key,
            value,
            *_contiguous(controls),
            *_contiguous((projection,)),
            frames,
            tokens,
            channels,
            *query.stride(),
            *key.stride(),
            *value.stride(),
            out,
            motion,
            CHANNELS=_PROJECTED,
            OUT=min(triton.next_power_of_2(max(channels, _TILE)), _PROJECTED),
            **_constants(width, heads, controls),
            **blocks,
        )


def _launch_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    controls: _Ordered,
    heads: int,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fill `grads`, contiguous, with the gradients of q, k and v as the controls make them."""
    if not grad.numel():
        return
    rows, frames, tokens, width = query.shape
    with torch.cuda.device_of(query):
        blocks = _blocks("frame_attention_backward", query, controls, heads)
        if _is_mixed_first(controls, blocks):
            mixed = _mix(query, key, value, controls)
            _launch_backward(grad, *mixed, _UNCONTROLLED, heads, grads)
            return
        _frame_attention_backward_kernel[(rows * triton.cdiv(tokens * heads, blocks["BLOCK"]),)](
            grad,
            query,
            key,
            value,
            *_contiguous(controls),
            frames,
            tokens,
            *grad.stride(),
            *query.stride(),
            *key.stride(),
            *value.stride(),
            *grads,
            **_constants(width, heads, controls),
            **blocks,
        )


def _contiguous(tensors: _Ordered) -> _Ordered:
    return tuple(tensor if tensor is None else tensor.contiguous() for tensor in tensors)


def _constants(width: int, heads: int, controls: _Ordered) -> dict[str, int | float]:
    blends = (controls[CONTROLS.index(name)] for name in ("query_blend", "deviation_blend"))
    choice, share = (blend is not None and blend.ndim == 3 for blend in blends)
    d = width // heads
    return {"HEADS": heads, "D": d, "SCALE": d**-0.5, "CHOICE": choice, "SHARE": share}


_TENSORS = "Tensor query, Tensor key, Tensor value"
_OTHERS = ", ".join((*(f"Tensor? {name}" for name in CONTROLS), "int heads"))


@torch.library.custom_op(
    "kinetiq::frame_attention",
    mutates_args=(),
    device_types="cuda",
    schema=f"({_TENSORS}, {_OTHERS}) -> Tensor",
)
def _frame_attention(query, key, value, *others):
    *controls, heads = others
    out = query.new_empty(query.shape)
    _launch_forward(query, key, value, tuple(controls), heads, out)
    return out


@_frame_attention.register_fake
def _(query, *_others):
    return query.new_empty(query.shape)


@_frame_attention.register_kernel("cpu")
def _(query, key, value, *others):
    *controls, heads = others
    # A graph that was compiled or exported brings rows and slots that nobody has looked at.
    _check(query, key, value, heads, tuple(controls))
    return attend_on_cpu(*_mix(query, key, value, tuple(controls)), heads)


@torch.library.custom_op(
    "kinetiq::frame_attention_with_motion",
    mutates_args=(),
    device_types="cuda",
    schema=f"({_TENSORS}, Tensor projection, {_OTHERS}) -> (Tensor, Tensor)",
)
def _frame_attention_with_motion(query, key, value, projection, *others):
    *controls, heads = others
    out = query.new_empty(query.shape)
    motion = query.new_empty(*query.shape[:3], projection.shape[1])
    _launch_forward(query, key, value, tuple(controls), heads, out, projection, motion)
    return out, motion


@_frame_attention_with_motion.register_fake
def _(query, _key, _value, projection, *_others):
    motion = query.new_empty(*query.shape[:3], projection.shape[1])
    return query.new_empty(query.shape), motion


@_frame_attention_with_motion.register_kernel("cpu")
def _(query, key, value, projection, *others):
    *controls, heads = others
    _check(query, key, value, heads, tuple(controls))
    _check_projection(query, projection)
    return _attend_with_motion(query, key, value, projection, tuple(controls), heads)


@torch.library.custom_op(
    "kinetiq::frame_attention_backward",
    mutates_args=(),
    device_types="cuda",
    schema=f"(Tensor grad, {_TENSORS}, {_OTHERS}) -> (Tensor, Tensor, Tensor)",
)
def _frame_attention_backward(grad, query, key, value, *others):
    """The gradients of q, k and v as `mix` leaves them, which it is left to pass on."""
    *controls, heads = others
    grads = (query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape))
    _launch_backward(grad, query, key, value, tuple(controls), heads, grads)
    return grads


@_frame_attention_backward.register_fake
def _(_grad, query, key, value, *_others):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


@_frame_attention_backward.register_kernel("cpu")
def _(grad, query, key, value, *others):
    *controls, heads = others
    mixed = _mix(query, key, value, tuple(controls))
    with keep_types(query):
        return _differentiate_in_place(grad, *mixed, heads)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    return *_gradients(grad, ctx.saved_tensors, ctx.needs_input_grad, ctx.heads), None


def _save_with_motion(ctx, inputs, output) -> None:
    query, key, value, projection, *controls, ctx.heads = inputs
    ctx.save_for_backward(output[0], projection, query, key, value, *controls)


def _backward_with_motion(ctx, grad: Tensor, grad_motion: Tensor):
    """Motion is linear in the output: its gradient is added to the output's own."""
    out, projection, *tensors = ctx.saved_tensors
    needed = (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[4:])
    of_projection = None
    others: list[Tensor | None] = [None] * len(tensors)
    # In float32, as forward: what stays may be much larger than what moves, and costs no digits.
    wide = torch.promote_types(out.dtype, torch.float32)
    with keep_types(out):
        if ctx.needs_input_grad[3]:
            moving = _centred(out.to(wide)).flatten(0, 2)
            product = moving.mT @ grad_motion.to(wide).flatten(0, 2)
            of_projection = product.to(projection.dtype)
        if any(needed):
            of_motion = _centred(grad_motion.to(wide) @ projection.to(wide).mT)
            grad = (grad + of_motion).to(grad.dtype)
            others = _gradients(grad, tensors, needed, ctx.heads)
    return *others[:3], of_projection, *others[3:], None


def _centred(tensor: Tensor) -> Tensor:
    return tensor - tensor.mean(1, keepdim=True)


def _gradients(grad: Tensor, tensors, needed, heads: int) -> list[Tensor | None]:
    """Of q, k, v and the controls: the attention's by the kernel, the mixture's by PyTorch.

    Where they are to be differentiated themselves it is all by PyTorch, as the kernel cannot be.
    """
    needed = needed[: len(tensors)]
    if torch.is_grad_enabled():

        def attend(query: Tensor, key: Tensor, value: Tensor, *controls: Tensor | None) -> Tensor:
            named: Controls = dict(zip(CONTROLS, controls, strict=True))  # type: ignore[assignment]
            return frame_attention_reference(query, key, value, heads=heads, **named)

        return differentiate(attend, tensors, needed, grad)
    grads = _frame_attention_backward(grad, *tensors, heads)
    if all(control is None for control in tensors[3:]):
        return [*grads, *([None] * len(CONTROLS))]
    return differentiate(lambda q, k, v, *c: _mix(q, k, v, c), tensors, needed, grads)


_frame_attention.register_autograd(_backward, setup_context=_save)
_frame_attention_with_motion.register_autograd(
    _backward_with_motion, setup_context=_save_with_motion
)


def _launch_case(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    *,
    forward: bool,
    controlled: tuple[str, ...] = (),
    regional: bool = False,
    projected: bool = False,
) -> None:
    """One launch on tensors without memory, with the controls that are named.

    Where it is `regional`, blends are per frame and token.
    """
    rows, frames, tokens, heads, d = shape
    width = heads * d
    make = partial(torch.empty, dtype=dtype, device="meta")
    grad, query, key, value = (make(rows, frames, tokens, width) for _ in range(4))
    row = torch.empty(rows, dtype=torch.int64, device="meta")
    blend = make(*shape[: 3 if regional else 1], dtype=torch.float32)
    scale = make(rows, dtype=torch.float32)
    bank = make(2, frames, width)
    values = make(2, frames, tokens, width)
    every = (row, blend, row, blend, make(rows, 3), row, scale, bank, bank, values)
    controls = tuple(
        control if name in controlled else None
        for name, control in zip(CONTROLS, every, strict=True)
    )
    projection = make(width, _MOTION_CHANNELS) if projected else None
    motion = make(rows, frames, tokens, _MOTION_CHANNELS) if projected else None
    if forward:
        _launch_forward(query, key, value, controls, heads, grad, projection, motion)
    else:
        _launch_backward(grad, query, key, value, controls, heads, (query, key, value))


def _padded_frames(frames: int) -> float:
    """Pairs of frames multiplied for each one asked for; both products are frames x frames x d."""
    return (_padded(frames) / frames) ** 2


_SHAPES = {  # rows, frames, tokens, heads, d; rows are the halves of guidance
    "animatediff_64x64": (2, 16, 4096, 8, 40),
    "animatediff_32x32": (2, 16, 1024, 8, 80),
    "animatediff_16x16": (2, 16, 256, 8, 160),
    "animatediff_32x32_of_32_frames": (2, 32, 1024, 8, 80),
    "animatediff_16x16_of_32_frames": (2, 32, 256, 8, 160),
    "zeroscope_40x72": (2, 24, 2880, 5, 64),
    "zeroscope_20x36": (2, 24, 720, 10, 64),
    "videocrafter2_40x64": (2, 16, 2560, 5, 64),
    "embedded_16x16": (2, 8, 256, 2, 32),
    "embedded_8x8": (2, 8, 64, 4, 32),
    "longest": (2, 128, 1024, 8, 80),
    "widest": (2, 128, 64, 2, 256),
}
_LIMITS = ("longest", "widest")  # that must run, though no model has them
_STEERED = (  # of each family the largest, and of AnimateDiff each head dim
    "animatediff_64x64",
    "animatediff_32x32",
    "animatediff_16x16",
    "zeroscope_40x72",
    "videocrafter2_40x64",
    "embedded_16x16",
)
_MOTION_CHANNELS = 64


_IN_PARTS = tuple(name for name in CONTROLS if not name.startswith("deviation"))


def _case(
    name: str,
    *,
    forward: bool = True,
    controlled: bool = False,
    regional: bool = False,
    projected: bool = False,
) -> CompileCase:
    shape = _SHAPES[name]
    controls = () if not controlled else _IN_PARTS if name in _LIMITS else CONTROLS
    launch = partial(
        _launch_case,
        shape,
        forward=forward,
        controlled=controls,
        regional=regional,
        projected=projected,
    )
    full = name + "_controlled" * controlled + "_regional" * regional + "_with_motion" * projected
    frames, d = shape[1], shape[4]
    head = sum(split_head_dim(d)) / d
    return CompileCase(
        "frame_attention", full, forward, launch, lambda: _padded_frames(frames) * head, head
    )


COMPILED = (
    *(
        _case(name, forward=forward, controlled=controlled)
        for controlled in (False, True)
        for name in _SHAPES
        for forward in (True, False)
    ),
    *(
        _case(name, forward=forward, controlled=True, regional=True)
        for name in _STEERED
        for forward in (True, False)
    ),
    *(_case(name, projected=True) for name in _SHAPES),
    *(_case(name, controlled=True, regional=True, projected=True) for name in _STEERED),
)


def _check_controls(query: Tensor, controls: dict[str, Tensor | None]) -> None:
    rows, frames, tokens, _ = query.shape
    for name, control in controls.items():
        check_device(_WHERE, name, control, query)
    for name in ("query_row", "deviation_row"):
        check_rows(_WHERE, name, controls[name], rows)
    for name in ("query_blend", "deviation_blend"):
        check_blend(_WHERE, name, controls[name], (rows, frames, tokens))
    parts = controls["deviation_parts"]
    if parts is not None:
        if list(parts.shape) != [rows, 3]:
            raise ShapeError(
                f"{_WHERE}: deviation_parts must be [rows = {rows}, 3], got {list(parts.shape)}"
            )
        check_type(_WHERE, "deviation_parts", parts)
    if controls["query_blend"] is not None and controls["query_row"] is None:
        raise ShapeError(f"{_WHERE}: query_blend needs query_row, got query_blend alone")
    needy = controls["deviation_blend"] is not None or parts is not None
    if needy and controls["deviation_row"] is None:
        raise ShapeError(
            f"{_WHERE}: deviation_blend and deviation_parts need deviation_row, got none"
        )


def check_motion(
    where: str,
    query: Tensor,
    motion_slot: Tensor | None,
    motion_scale: Tensor | None,
    **banks: Tensor | None,
) -> None:
    """Require slots, scales and banks that can be added to `query` and what goes with it."""
    rows, frames, tokens, width = query.shape
    given = {name: bank for name, bank in banks.items() if bank is not None}
    check_device(where, "motion_slot", motion_slot, query)
    check_device(where, "motion_scale", motion_scale, query)
    if motion_slot is None:
        if given or motion_scale is not None:
            raise ShapeError(f"{where}: motion_scale and banks need motion_slot, got none")
        return
    if not given:
        raise ShapeError(
            f"{where}: motion_slot needs query_bank, key_bank or value_bank, got motion_slot alone"
        )
    require_index(where, "motion_slot", motion_slot, rows)
    if motion_scale is not None:
        if list(motion_scale.shape) != [rows]:
            raise ShapeError(
                f"{where}: motion_scale must be [rows = {rows}], got {list(motion_scale.shape)}"
            )
        check_type(where, "motion_scale", motion_scale)
    for name, bank in given.items():
        check_tensor(where, name, bank)
        slots = bank.shape[0] if bank.ndim else 0
        places = [tokens] if name == "value_bank" else []
        if slots < 1 or list(bank.shape) != [slots, frames, *places, width]:
            words = "frames, tokens, heads * d" if places else "frames, heads * d"
            raise ShapeError(
                f"{where}: {name} must be [slots, {words}] = [slots, "
                f"{', '.join(map(str, (frames, *places, width)))}], got {list(bank.shape)}"
            )
        check_kind(where, name, bank, query)
        check_range(where, "motion_slot", motion_slot, slots)


def _check(query: Tensor, key: Tensor, value: Tensor, heads: int, controls: _Ordered) -> None:
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        check_tensor(_WHERE, name, tensor)
    check_heads(_WHERE, heads)
    if query.ndim != 4 or query.shape[-1] % heads:
        raise ShapeError(
            f"{_WHERE}: query must be [rows, frames, tokens, heads * d] with heads = "
            f"{heads}, got {list(query.shape)}"
        )
    check_type(_WHERE, "query", query)
    if not query.shape[1] or not query.shape[-1]:
        raise ShapeError(
            f"{_WHERE}: query must have at least one frame and one channel, got {list(query.shape)}"
        )
    for name, tensor in {"key": key, "value": value}.items():
        if tensor.shape != query.shape:
            raise ShapeError(
                f"{_WHERE}: {name} must have the shape of query {list(query.shape)}, "
                f"got {list(tensor.shape)}"
            )
        check_kind(_WHERE, name, tensor, query)
    if query.device.type == "cuda":
        _check_kernel(query, heads)
    named = dict(zip(CONTROLS, controls, strict=True))
    _check_controls(query, named)
    motion = {name: named[name] for name in CONTROLS[CONTROLS.index("motion_slot") :]}
    check_motion(_WHERE, query, **motion)


def _check_projection(query: Tensor, projection: Tensor) -> None:
    check_tensor(_WHERE, "projection", projection)
    width = query.shape[-1]
    if projection.ndim != 2 or projection.shape[0] != width or not projection.shape[1]:
        raise ShapeError(
            f"{_WHERE}: projection must be [heads * d = {width}, motion channels], "
            f"got {list(projection.shape)}"
        )
    check_kind(_WHERE, "projection", projection, query)


def _check_kernel(query: Tensor, heads: int) -> None:
    """Require what the GPU kernel can hold."""
    frames, d = query.shape[1], query.shape[-1] // heads
    if frames > MAX_FRAMES or d > MAX_HEAD_DIM or query.dtype not in _TYPES:
        raise ShapeError(
            f"{_WHERE}: on a GPU query must have at most {MAX_FRAMES} frames, d at most "
            f"{MAX_HEAD_DIM} and type float32, float16 or bfloat16, got {frames} frames, d = {d} "
            f"and {query.dtype}"
        )
