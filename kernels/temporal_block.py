r"""Normalisation, attention over the frames and projection of one temporal layer, with residual.

    n = LayerNorm(x) + position[f]
    q = n Wq^T + scale bank_q[slot, f],  k likewise,  v = n Wv^T + scale bank_v[slot, f, p]
    y = x + softmax(q k^T / sqrt(d)) v Wo^T + bias        over the frames at each position

`x` is [rows, frames, tokens, channels]; weights are those of `torch.nn.Linear`, [out, in]. The
banks hold motion embeddings that are projected already: W(n + m) = Wn + Wm. Statistics, scores,
softmax and sums are in float32.

One program owns all frames of a few positions, and does everything for them: `x` comes from
memory once, and y goes there once; what lies between stays in the cache. The positions of a
program share one square of scores, of which only the blocks on the diagonal are used: that
square is small, and the matrix units want sides of 16 and more. A value that is not finite
therefore spoils the positions beside it as well, though never another row.

Rows that read other rows (`query_row`, `deviation_row`) take the separate operators. So does, in
here, what a program cannot hold without spilling: more than 32 frames, which is the most that a
motion module has positions for, or a head dim above 80, which only coarse images have.
Where the kernel pays is data for each GPU: see `wins`.

A CPU does the same for as many positions at a time as its cache holds.

The gradient is that of the separate operators, computed again from `x`. A kernel of its own would
have to hold q, k, v and their gradients for all heads, since the gradient of `x` sums over heads
and that of a weight over all positions: it would be the same products in worse tiles.

Source: Guo et al., "AnimateDiff", arXiv:2307.04725, sec. 4.2; motion embeddings, Wang et al.,
"Motion Inversion", arXiv:2403.20193, sec. 3.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor

from kinetiq.errors import ShapeError
from kinetiq.kernels._autograd import differentiate, keep_types, make_room
from kinetiq.kernels._checks import check_heads, check_tensor, check_type
from kinetiq.kernels._compile import NVIDIA, CompileCase
from kinetiq.kernels._cost import Cost
from kinetiq.kernels._launch import architecture, file_entries, pretend, settings
from kinetiq.kernels._triton import tl, triton
from kinetiq.kernels.frame_attention import (
    CACHED,
    CONTROLS,
    attend_on_cpu,
    check_motion,
    frame_attention,
    frame_attention_reference,
)
from kinetiq.kernels.query_attention import is_recorded, split_head_dim

MAX_FRAMES = 128  # all frames of a position must fit on the chip, in the separate operators too
MAX_HEAD_DIM = 256
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}  # on a GPU
_CONTROLS_OF_ROWS = CONTROLS.index("motion_slot")  # before those of motion, and not used here
_MOST_EPS = torch.finfo(torch.float32).max
_LONGEST = 32  # frames; beyond, q, k, v and scores of one position fill the registers
_WIDEST = 80  # columns of a head; beyond, two tiles of each of q, k and v do
_TILE = 16  # the least side of a product on the matrix units


def temporal_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    heads: int,
    position: Tensor | None = None,
    motion_slot: Tensor | None = None,
    motion_scale: Tensor | None = None,
    query_bank: Tensor | None = None,
    key_bank: Tensor | None = None,
    value_bank: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Return `x` plus one layer of self-attention over the frames of each position.

    Args:
        x: [rows, frames, tokens, channels], any strides; on a GPU at most 128 frames, in float32,
            float16 or bfloat16.
        norm_weight: [channels], of the layer normalisation.
        norm_bias: [channels], likewise.
        query_weight: [channels, channels], as in `torch.nn.Linear`.
        key_weight: likewise.
        value_weight: likewise.
        out_weight: likewise, of the projection after attention.
        out_bias: [channels].
        heads: number of attention heads; channels = heads * d.
        position: [at least frames, channels], floating, added after the normalisation; None:
            nothing.
        motion_slot: int64 [rows], which slot of the banks is added; 0: none.
        motion_scale: [rows], a factor on what is added; None: 1.
        query_bank: [slots, frames, channels], added to the queries of all positions.
        key_bank: like `query_bank`, for the keys.
        value_bank: [slots, frames, tokens, channels], added to the values.
        eps: added to the variance; at least 0.

    Returns:
        [rows, frames, tokens, channels], contiguous, the type of `x`.

    Raises:
        ShapeError: a shape, type or device does not match, `eps` is negative, or a slot that is on
            the CPU is out of range; one on a GPU is not looked at, and reads memory of others if it
            is wrong: it must be checked where it is made.
    """
    _check(x, norm_weight, norm_bias, heads, position, eps)
    width = x.shape[-1]
    for name, weight in {
        "query_weight": query_weight,
        "key_weight": key_weight,
        "value_weight": value_weight,
        "out_weight": out_weight,
    }.items():
        _check_like(x, name, weight, [width, width])
    _check_like(x, "out_bias", out_bias, [width])
    check_motion(
        "temporal_block",
        x,
        motion_slot,
        motion_scale,
        query_bank=query_bank,
        key_bank=key_bank,
        value_bank=value_bank,
    )
    inputs = (
        x,
        norm_weight,
        norm_bias,
        query_weight,
        key_weight,
        value_weight,
        out_weight,
        out_bias,
        position,
        motion_slot,
        motion_scale,
        query_bank,
        key_bank,
        value_bank,
    )
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        if not is_recorded(*inputs):
            return _by_positions(*inputs, heads, eps)
        # Here autograd records PyTorch's own operators, so that nothing is computed twice.
        return _separate(*inputs, heads, eps, attend=_attend)
    y: Tensor = _temporal_block(*inputs, heads, eps)
    return y


def wins(
    rows: int,
    frames: int,
    tokens: int,
    heads: int,
    d: int,
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Return whether the kernel was measured to beat the separate operators on that GPU.

    `launch.json` says under "temporal_block_wins", for an architecture and a key such as
    "frames16_heads8_d40_fp16", from how many POSITIONS (rows times tokens) on it does; 0: never.
    What was not measured on this very architecture is False: nothing is taken from a relative.
    On any other device it is False too.
    """
    if device.type != "cuda":
        return False
    if dtype not in _NAMES:
        return False
    least = _least_positions(f"frames{frames}_heads{heads}_d{d}_{_NAMES[dtype]}", device)
    return 0 < least <= rows * tokens


def _least_positions(key: str, device: torch.device) -> int:
    index: int | None = device.index
    with torch.cuda.device(-1 if index is None else index):  # -1: no change
        measured = file_entries("temporal_block_wins").get(architecture(), {})
    return measured.get(key, {"POSITIONS": 0})["POSITIONS"]


# A graph is compiled for the GPU that is there, and its tracer can read no file. This is all that
# `torch.compiler.assume_constant_result` does, but for loading the whole compiler (torch 2.13).
_least_positions._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001


def temporal_block_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    heads: int,
    position: Tensor | None = None,
    motion_slot: Tensor | None = None,
    motion_scale: Tensor | None = None,
    query_bank: Tensor | None = None,
    key_bank: Tensor | None = None,
    value_bank: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The definition, in PyTorch. Computes in float32 or wider, returns the type of `x`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    own = x.to(wide)
    variance, mean = torch.var_mean(own, dim=-1, correction=0, keepdim=True)
    normed = (own - mean) * torch.rsqrt(variance + eps)
    normed = normed * norm_weight.to(wide) + norm_bias.to(wide)
    if position is not None:
        normed = normed + position[: x.shape[1], None].to(wide)
    query, key, value = (
        normed @ weight.to(wide).T for weight in (query_weight, key_weight, value_weight)
    )
    banks = [None if bank is None else bank.to(wide) for bank in (query_bank, key_bank, value_bank)]
    attended = frame_attention_reference(
        query,
        key,
        value,
        heads=heads,
        motion_slot=motion_slot,
        motion_scale=motion_scale,
        query_bank=banks[0],
        key_bank=banks[1],
        value_bank=banks[2],
    )
    return (own + attended @ out_weight.to(wide).T + out_bias.to(wide)).to(x.dtype)


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
    """Each tensor crosses memory once, without motion embeddings.

    Forward reads `x` and the weights and writes y, in four projections and two products over the
    frames. Backward reads the gradient as well and writes those of `x` and of the weights; three
    projections and the weights' product are computed again, beside the eight and five of the
    gradients.
    """
    width = heads * d
    elements = rows * frames * tokens * width
    weights = 4 * width * width + 3 * width
    if backward:
        moved = 3 * elements + 2 * weights + frames * width
        return Cost(bytes=itemsize * moved, flops=elements * 2 * (11 * width + 6 * frames))
    moved = 2 * elements + weights + frames * width
    return Cost(bytes=itemsize * moved, flops=elements * 2 * (4 * width + 2 * frames))


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over channels.

    On a CPU PyTorch adds up the gradients of weight and bias in their own type, over all positions
    (torch 2.13), which leaves one digit of them in bfloat16: where they are wanted it gets float32.
    """
    trained = weight.requires_grad or bias.requires_grad
    if x.device.type != "cpu" or not trained:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return normed.to(x.dtype)


def _separate(*inputs: Any, attend: Callable[..., Tensor]) -> Tensor:
    """The same by the separate operators, of which `attend` is the attention."""
    x, norm_weight, norm_bias, *weights, out_weight, out_bias, position = inputs[:9]
    *motion, heads, eps = inputs[9:]
    with keep_types(x):
        normed = _norm(x, norm_weight, norm_bias, eps)
        if position is not None:
            normed = normed + position[: x.shape[1], None].to(normed.dtype)
        attended = attend(*(F.linear(normed, weight) for weight in weights), *motion, heads)
        y: Tensor = x + F.linear(attended, out_weight, out_bias)
        return y.contiguous()


def _attend(query: Tensor, key: Tensor, value: Tensor, *motion_and_heads: Any) -> Tensor:
    """By PyTorch's own operators, where autograd records them."""
    *motion, heads = motion_and_heads
    motion_slot, motion_scale, query_bank, key_bank, value_bank = motion
    return frame_attention(
        query,
        key,
        value,
        heads=heads,
        motion_slot=motion_slot,
        motion_scale=motion_scale,
        query_bank=query_bank,
        key_bank=key_bank,
        value_bank=value_bank,
    )


def _attend_unchecked(query: Tensor, key: Tensor, value: Tensor, *motion_and_heads: Any) -> Tensor:
    """As one operator: values of indices are not looked at, so that it can be traced."""
    out: Tensor = torch.ops.kinetiq.frame_attention(
        query, key, value, *[None] * _CONTROLS_OF_ROWS, *motion_and_heads
    )
    return out


def _by_positions(*inputs: Any) -> Tensor:
    """The same on a CPU where autograd records nothing: a few positions at a time, from x to y.

    What lies between stays in the cache, where the separate operators would write ten tensors of
    the size of `x` to memory, and sums go in place.
    """
    x, norm_weight, norm_bias, *weights, out_weight, out_bias, position = inputs[:9]
    slots, scales, *banks, heads, eps = inputs[9:]
    rows, frames, tokens, width = x.shape
    moved = [] if slots is None else slots.tolist()
    shares = [1.0] * rows if scales is None else scales.tolist()
    wide = torch.promote_types(x.dtype, torch.float32)  # a share may be beyond float16

    def some(start: int, end: int) -> Tensor:
        own = x[:, :, start:end]
        normed = F.layer_norm(own, (width,), norm_weight, norm_bias, eps)
        if position is not None:
            normed += position[:frames, None].to(normed.dtype)
        query, key, value = (F.linear(normed, weight) for weight in weights)
        for part, bank in zip((query, key, value), banks, strict=True):
            if bank is not None:
                bias = bank.unsqueeze(2) if bank.ndim == 3 else bank[:, :, start:end]
                for row, slot, share in zip(part, moved, shares, strict=True):
                    if slot > 0:
                        row.add_(bias[slot].to(wide), alpha=share)
        out = F.linear(attend_on_cpu(query, key, value, heads), out_weight, out_bias)
        return out.add_(own)

    few = max(CACHED // max(rows * frames * width, 1), 1)
    with keep_types(x):
        if x.numel() and tokens <= few:
            return some(0, tokens)
        y = make_room((x, norm_weight, norm_bias, *weights, out_weight, out_bias), x.shape)
        for start in range(0, tokens if y.numel() else 0, few):
            y[:, :, start : start + few] = some(start, start + few)
    return y


@triton.jit
def _normed(
    x_ptr, norm_weight_ptr, norm_bias_ptr, position_ptr, rows, frame, mean, rstd, first, mask,
    width, x_channel, CHANNELS: tl.constexpr,
):  # fmt: skip
    """CHANNELS channels of what is projected, [ROWS, CHANNELS]; zero past the last one."""
    channel = first + tl.arange(0, CHANNELS)
    inside = channel < width
    known = mask[:, None] & inside[None, :]
    x = tl.load(
        x_ptr + rows[:, None] + channel[None, :].to(tl.int64) * x_channel, mask=known, other=0.0
    )
    weight = tl.load(norm_weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    n = (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    if position_ptr is not None:
        at = position_ptr + frame[:, None] * width + channel[None, :]
        n += tl.load(at, mask=known, other=0.0).to(tl.float32)
    return n.to(x_ptr.dtype.element_ty)


@triton.jit
def _weights(weight_ptr, out, out_limit, first, width, CHANNELS: tl.constexpr):
    """Transposed weights of some outputs, [CHANNELS, outputs]."""
    channel = first + tl.arange(0, CHANNELS)
    at = weight_ptr + out[None, :] * width + channel[:, None]
    mask = (out < out_limit)[None, :] & (channel < width)[:, None]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _bias(bank_ptr, slot, scale, at, mask):
    """The row's slot of a bank; slot 0 is none, whatever the bank holds there."""
    return scale * tl.load(bank_ptr + at, mask=mask & (slot > 0), other=0.0).to(tl.float32)


@triton.jit
def _temporal_block_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    query_weight_ptr,
    key_weight_ptr,
    value_weight_ptr,
    out_weight_ptr,
    out_bias_ptr,
    position_ptr,
    slot_ptr,
    scale_ptr,
    query_bank_ptr,
    key_bank_ptr,
    value_bank_ptr,
    frames,
    tokens,
    width,
    heads,
    x_row,
    x_frame,
    x_token,
    x_channel,
    blocks,
    attended_ptr,
    y_ptr,
    EPS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    FRAMES: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
):
    """One program: all frames of TOKENS positions of one row; line t * FRAMES + f of each tile."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    line = tl.arange(0, TOKENS * FRAMES)
    frame = (line % FRAMES).to(tl.int64)
    token = (program % blocks) * TOKENS + line // FRAMES
    mask = (frame < frames) & (token < tokens)  # [TOKENS * FRAMES]
    rows = row * x_row + frame * x_frame + token * x_token
    place = ((row * frames + frame) * tokens + token) * width

    total = tl.zeros([TOKENS * FRAMES], dtype=tl.float32)
    for first in range(0, width, CHANNELS):
        channel = first + tl.arange(0, CHANNELS).to(tl.int64)
        known = mask[:, None] & (channel < width)[None, :]
        at = x_ptr + rows[:, None] + channel[None, :] * x_channel
        total += tl.sum(tl.load(at, mask=known, other=0.0).to(tl.float32), axis=1)
    mean = total / width
    total = tl.zeros([TOKENS * FRAMES], dtype=tl.float32)
    for first in range(0, width, CHANNELS):
        channel = first + tl.arange(0, CHANNELS).to(tl.int64)
        known = mask[:, None] & (channel < width)[None, :]
        at = x_ptr + rows[:, None] + channel[None, :] * x_channel
        centred = tl.load(at, mask=known, other=0.0).to(tl.float32) - mean[:, None]
        total += tl.sum(tl.where(known, centred * centred, 0.0), axis=1)
    rstd = tl.rsqrt(tl.where(mask, total / width + EPS, 1.0))  # no line varies, and EPS may be 0

    slot = 0
    scale = 1.0
    if slot_ptr is not None:
        slot = tl.load(slot_ptr + row)
        if scale_ptr is not None:  # that of no slot may be anything, and 0 * inf is NaN
            scale = tl.load(scale_ptr + row, mask=slot > 0, other=0.0).to(tl.float32)

    kind = x_ptr.dtype.element_ty
    usable = (line[:, None] // FRAMES == line[None, :] // FRAMES) & (frame < frames)[None, :]
    for head in range(heads):
        main = tl.arange(0, MAIN)
        q = tl.zeros([TOKENS * FRAMES, MAIN], dtype=tl.float32)
        k = tl.zeros([TOKENS * FRAMES, MAIN], dtype=tl.float32)
        v = tl.zeros([TOKENS * FRAMES, MAIN], dtype=tl.float32)
        out = head * D + main
        limit = head * D + D
        if TAIL > 0:
            rest = head * D + MAIN + tl.arange(0, TAIL)
            q_rest = tl.zeros([TOKENS * FRAMES, TAIL], dtype=tl.float32)
            k_rest = tl.zeros([TOKENS * FRAMES, TAIL], dtype=tl.float32)
            v_rest = tl.zeros([TOKENS * FRAMES, TAIL], dtype=tl.float32)
        for first in range(0, width, CHANNELS):
            n = _normed(
                x_ptr, norm_weight_ptr, norm_bias_ptr, position_ptr, rows, frame, mean, rstd,
                first, mask, width, x_channel, CHANNELS,
            )  # fmt: skip
            part = _weights(query_weight_ptr, out, limit, first, width, CHANNELS)
            q = tl.dot(n, part, q, input_precision="ieee")
            part = _weights(key_weight_ptr, out, limit, first, width, CHANNELS)
            k = tl.dot(n, part, k, input_precision="ieee")
            part = _weights(value_weight_ptr, out, limit, first, width, CHANNELS)
            v = tl.dot(n, part, v, input_precision="ieee")
            if TAIL > 0:
                part = _weights(query_weight_ptr, rest, limit, first, width, CHANNELS)
                q_rest = tl.dot(n, part, q_rest, input_precision="ieee")
                part = _weights(key_weight_ptr, rest, limit, first, width, CHANNELS)
                k_rest = tl.dot(n, part, k_rest, input_precision="ieee")
                part = _weights(value_weight_ptr, rest, limit, first, width, CHANNELS)
                v_rest = tl.dot(n, part, v_rest, input_precision="ieee")
        of_frame = (slot * frames + frame) * width
        of_token = ((slot * frames + frame) * tokens + token) * width
        there = mask[:, None] & (out < limit)[None, :]
        if query_bank_ptr is not None:
            q += _bias(query_bank_ptr, slot, scale, of_frame[:, None] + out[None, :], there)
        if key_bank_ptr is not None:
            k += _bias(key_bank_ptr, slot, scale, of_frame[:, None] + out[None, :], there)
        if value_bank_ptr is not None:
            v += _bias(value_bank_ptr, slot, scale, of_token[:, None] + out[None, :], there)
        scores = tl.dot(q.to(kind), tl.trans(k.to(kind)), input_precision="ieee")
        if TAIL > 0:
            more = mask[:, None] & (rest < limit)[None, :]
            if query_bank_ptr is not None:
                at = of_frame[:, None] + rest[None, :]
                q_rest += _bias(query_bank_ptr, slot, scale, at, more)
            if key_bank_ptr is not None:
                at = of_frame[:, None] + rest[None, :]
                k_rest += _bias(key_bank_ptr, slot, scale, at, more)
            if value_bank_ptr is not None:
                at = of_token[:, None] + rest[None, :]
                v_rest += _bias(value_bank_ptr, slot, scale, at, more)
            k_turned = tl.trans(k_rest.to(kind))
            scores = tl.dot(q_rest.to(kind), k_turned, scores, input_precision="ieee")
        scores = tl.where(usable, scores * (D**-0.5), float("-inf"))
        scores = tl.exp(scores - tl.max(scores, axis=1)[:, None])
        scores = (scores / tl.sum(scores, axis=1)[:, None]).to(kind)
        a = tl.dot(scores, v.to(kind), input_precision="ieee").to(kind)
        tl.store(attended_ptr + place[:, None] + out[None, :], a, mask=there)
        if TAIL > 0:
            a = tl.dot(scores, v_rest.to(kind), input_precision="ieee").to(kind)
            tl.store(attended_ptr + place[:, None] + rest[None, :], a, mask=more)

    tl.debug_barrier()  # what the program's other threads have stored is read from here on
    for first_out in range(0, width, OUT):
        out = first_out + tl.arange(0, OUT)
        y = tl.zeros([TOKENS * FRAMES, OUT], dtype=tl.float32)
        for first in range(0, width, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            known = mask[:, None] & (channel < width)[None, :]
            a = tl.load(attended_ptr + place[:, None] + channel[None, :], mask=known, other=0.0)
            part = _weights(out_weight_ptr, out, width, first, width, CHANNELS)
            y = tl.dot(a, part, y, input_precision="ieee")
        there = mask[:, None] & (out < width)[None, :]
        at = x_ptr + rows[:, None] + out[None, :].to(tl.int64) * x_channel
        y += tl.load(at, mask=there, other=0.0).to(tl.float32)
        y += tl.load(out_bias_ptr + out, mask=out < width, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + place[:, None] + out[None, :], y.to(kind), mask=there)


def _launch(x: Tensor, *others: Any) -> None:
    """Fill the last of `others`, y, contiguous like `x`; before it are the operator's arguments."""
    *tensors, heads, eps, y = others
    if y.numel() == 0:
        return
    rows, frames, tokens, width = x.shape
    d = width // heads
    with torch.cuda.device_of(x):  # of the current device are the settings and the launch
        sizes = _sizes(frames, d, x.dtype)
        blocks = triton.cdiv(tokens, sizes["TOKENS"])
        _temporal_block_kernel[(rows * blocks,)](
            x,
            *(None if tensor is None else tensor.contiguous() for tensor in tensors),
            frames,
            tokens,
            width,
            heads,
            *x.stride(),
            blocks,
            torch.empty_like(y),
            y,
            EPS=eps,
            D=d,
            **sizes,
        )


def _sizes(frames: int, d: int, dtype: torch.dtype) -> dict[str, int]:
    """The sizes of a launch, from its settings: ROWS lines of frames and positions a program."""
    main, tail = split_head_dim(d)
    # Products in float32 run off the matrix units, and take small tiles on every GPU.
    name = "temporal_block_fp32" if dtype == torch.float32 else "temporal_block"
    chosen = settings(name, f"d{main + tail}")
    padded = triton.next_power_of_2(frames)
    step = max(chosen.pop("ROWS") // padded, _TILE // padded, 1)
    return {"MAIN": main, "TAIL": tail, "FRAMES": padded, "TOKENS": step, **chosen}


def _holds(frames: int, d: int) -> bool:
    """Whether a program of the kernel can hold one position: q, k, v and scores of one head."""
    return frames <= _LONGEST and sum(split_head_dim(d)) <= _WIDEST


_TENSORS = (
    "x",
    "norm_weight",
    "norm_bias",
    "query_weight",
    "key_weight",
    "value_weight",
    "out_weight",
    "out_bias",
)
_OPTIONAL = ("position", *CONTROLS[_CONTROLS_OF_ROWS:])
_SCHEMA = ", ".join(
    (
        *(f"Tensor {name}" for name in _TENSORS),
        *(f"Tensor? {name}" for name in _OPTIONAL),
        "int heads",
        "float eps",
    )
)


@torch.library.custom_op(
    "kinetiq::temporal_block",
    mutates_args=(),
    device_types="cuda",
    schema=f"({_SCHEMA}) -> Tensor",
)
def _temporal_block(x, *others):
    *_, heads, _eps = others
    if not _holds(x.shape[1], x.shape[-1] // heads):
        return _separate(x, *others, attend=_attend_unchecked)
    y = x.new_empty(x.shape)
    _launch(x, *others, y)
    return y


@_temporal_block.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@_temporal_block.register_kernel("cpu")
def _(x: Tensor, *others: Any) -> Tensor:
    # A graph that was compiled or exported comes here with slots that nobody has looked at.
    slots, scales, *banks = others[len(_TENSORS) : -2]  # x is none of the others
    names = _OPTIONAL[3:]
    check_motion("temporal_block", x, slots, scales, **dict(zip(names, banks, strict=True)))
    return _by_positions(x, *others)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.heads, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    """Of the separate operators, which are run again; what needs no gradient is not computed."""
    tensors = ctx.saved_tensors
    needed = ctx.needs_input_grad[: len(tensors)]

    def run(*given):
        return _separate(*given, ctx.heads, ctx.eps, attend=_attend_unchecked)

    return *differentiate(run, tensors, needed, grad), None, None


_temporal_block.register_autograd(_backward, setup_context=_save)


def _check(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    heads: int,
    position: Tensor | None,
    eps: object,
) -> None:
    check_tensor("temporal_block", "x", x)
    check_heads("temporal_block", heads)
    if x.ndim != 4 or min(x.shape[1:]) < 1 or x.shape[-1] % heads:
        raise ShapeError(
            f"temporal_block: x must be [rows, frames, tokens, heads * d] with heads = {heads} "
            f"and at least one frame and token, got {list(x.shape)}"
        )
    check_type("temporal_block", "x", x)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps <= _MOST_EPS:
        raise ShapeError(
            f"temporal_block: eps must be a number of at least 0 that float32 holds, got {eps!r}"
        )
    if x.device.type == "cuda":
        _check_kernel(x, heads)
    width = x.shape[-1]
    _check_like(x, "norm_weight", norm_weight, [width])
    _check_like(x, "norm_bias", norm_bias, [width])
    if position is not None:
        check_tensor("temporal_block", "position", position)
        fits = position.ndim == 2 and position.shape[0] >= x.shape[1]
        if not fits or position.shape[1] != width or position.device != x.device:
            raise ShapeError(
                f"temporal_block: position must be [{x.shape[1]} frames or more, {width}] on "
                f"{x.device}, got {list(position.shape)} on {position.device}"
            )
        check_type("temporal_block", "position", position)


def _check_like(x: Tensor, name: str, tensor: Tensor, shape: list[int]) -> None:
    check_tensor("temporal_block", name, tensor)
    if list(tensor.shape) != shape or tensor.dtype != x.dtype or tensor.device != x.device:
        raise ShapeError(
            f"temporal_block: {name} must be {shape} in {x.dtype} on {x.device} like x, "
            f"got {list(tensor.shape)} in {tensor.dtype} on {tensor.device}"
        )


def _check_kernel(x: Tensor, heads: int) -> None:
    """Require what the GPU kernels can hold."""
    frames, d = x.shape[1], x.shape[-1] // heads
    if frames > MAX_FRAMES or d > MAX_HEAD_DIM or x.dtype not in _NAMES:
        raise ShapeError(
            f"temporal_block: on a GPU x must have at most {MAX_FRAMES} frames, d at most "
            f"{MAX_HEAD_DIM} and type float32, float16 or bfloat16, got {frames} frames, d = {d} "
            f"and {x.dtype}"
        )


_SHAPES = {  # rows, frames, tokens, heads, d
    "animatediff_64x64": (2, 16, 64 * 64, 8, 40),
    "animatediff_32x32": (2, 16, 32 * 32, 8, 80),
    "zeroscope_72x40": (2, 24, 72 * 40, 5, 64),
    "zeroscope_36x20": (2, 24, 36 * 20, 10, 64),
    "videocrafter2_64x40": (2, 16, 64 * 40, 5, 64),
    "videocrafter2_32x20": (2, 16, 32 * 20, 10, 64),
    "embedded_16x16": (2, 8, 16 * 16, 2, 32),
    **{f"longest_d{d}": (2, _LONGEST, 32 * 32, 8, d) for d in (32, 40, 64, _WIDEST)},
}


def _case(shape: str) -> CompileCase:
    """The launch at one production shape, with a motion embedding."""

    def launch(dtype: torch.dtype) -> None:
        rows, frames, tokens, heads, d = _SHAPES[shape]
        width = heads * d
        empty = functools.partial(torch.empty, dtype=dtype, device="meta")
        x = empty(rows, frames, tokens, width)
        matrix, slots = empty(width, width), empty(rows, dtype=torch.int64)
        inputs: list[Any] = [x, empty(width), empty(width), *[matrix] * 4, empty(width)]
        inputs += [empty(32, width), slots, empty(rows, dtype=torch.float32)]
        inputs += [empty(4, frames, width), empty(4, frames, width)]
        inputs += [empty(4, frames, tokens, width), heads, 1e-5, empty(x.shape)]
        _launch(*inputs)

    d = _SHAPES[shape][4]
    head = sum(split_head_dim(d)) / d
    count_padded = functools.partial(_padded_work, *_SHAPES[shape])
    return CompileCase("temporal_block", shape, True, launch, count_padded, head)


def _padded_work(rows: int, frames: int, tokens: int, heads: int, d: int) -> float:
    """Multiplications done for each one asked for, with the settings under which that is most.

    Head dims are padded to at most 48/40, as everywhere, but for the last projection, whose width
    is that of all heads. Frames are padded to a power of two, and a program multiplies the queries
    of all its positions with the keys of all of them, of which each position wants its own: at 16
    frames and head dim 40 that makes 1.24 of all products.
    """
    width = heads * d
    wanted = frames * tokens * width * (4 * width + 2 * frames)
    most = 0
    for target in NVIDIA:
        with pretend(target):
            sizes = _sizes(frames, d, torch.float16)
        lines, columns = sizes["TOKENS"] * sizes["FRAMES"], heads * (sizes["MAIN"] + sizes["TAIL"])
        read, written = (-(-width // sizes[name]) * sizes[name] for name in ("CHANNELS", "OUT"))
        done = lines * (3 * read * columns + 2 * lines * columns + read * written)
        most = max(most, -(-tokens // sizes["TOKENS"]) * done)
    return most / wanted


COMPILED = tuple(_case(shape) for shape in _SHAPES)
