r"""The motion in a network's activations: what is left of them without their mean over frames.

    m[r, f, p] = x[r, f, p] - mean_F(x[r, :, p])            what changes over the frames
    y[r, f, p] = m[r, f, p, channels]   or   m[r, f, p] P   the channels that carry motion
    y[r, f]    = sum_p w[r, p] y[r, f, p] / sum_p w[r, p]   optionally, its mean over a region

`x` is [rows, frames, tokens, channels]; P is [channels, K]; w is a weight for each position. Sums
are float32 whatever the input type. The map is linear, and its gradient is its transpose.

A program holds all frames of a few positions, so the mean over frames is local to it and each
element of `x` that is asked for crosses memory once. The mean is taken away before anything is
projected or averaged: activations are large and their changes small, so the other order would
lose the digits that matter.

Source: Xiao et al., "Video Diffusion Models are Training-free Motion Interpreter and Controller",
arXiv:2405.14864, sec. 3.2 and 3.3.
"""

import functools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kinetiq.errors import ShapeError
from kinetiq.kernels._autograd import keep_types
from kinetiq.kernels._checks import check_range, check_tensor
from kinetiq.kernels._compile import CompileCase
from kinetiq.kernels._cost import Cost
from kinetiq.kernels._launch import settings
from kinetiq.kernels._triton import tl, triton

MAX_FRAMES = 128  # on a GPU: all frames of a position must fit on the chip
_TYPES = (torch.float32, torch.float16, torch.bfloat16)  # that a GPU kernel takes
_PROGRAMS = 1024  # that keep any GPU busy; long regions are split until there are as many


def motion_feature(
    x: Tensor,
    channels: Tensor | Sequence[int] | None = None,
    projection: Tensor | None = None,
    region: Tensor | None = None,
) -> Tensor:
    """Return what changes over the frames of `x`, in the channels that are asked for.

    Args:
        x: [rows, frames, tokens, channels], any strides; float32, float16 or bfloat16 (on a CPU
            float64 as well), and on a GPU at most 128 frames.
        channels: K channels to keep, an int64 tensor [K] on the device of `x`, or on a CPU
            integers; a channel may be named twice. The values of a tensor on a GPU are not looked
            at: an index that is out of range gives NaN there.
        projection: [channels, K], of the type and on the device of `x`, instead of `channels`.
        region: [tokens] or [rows, tokens], real weights of a mean over the tokens, on the device
            of `x`; where they add up to zero the mean is zero. No gradient flows to them.

    Returns:
        [rows, frames, tokens, K], contiguous, the type of `x`; with a region there is one token,
        and with neither channels nor projection K is the number of channels.

    Raises:
        ShapeError: a shape, type, device or index does not match.
    """
    _check(x, projection, region)
    index = None
    if channels is not None:
        if projection is not None:
            raise ShapeError("motion_feature: give channels or projection, got both")
        index = _check_channels(channels, x.shape[-1], x.device)
    weights = None
    if region is not None:
        weights = _normalise(region.to(torch.promote_types(x.dtype, torch.float32)))
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # An operator is only overhead here, where autograd can record PyTorch's own.
        return motion_feature_reference(x, index, projection, weights).contiguous()
    y: Tensor = _motion_feature(x, index, projection, weights)
    return y


def motion_feature_reference(
    x: Tensor,
    channels: Tensor | None = None,
    projection: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The definition, in PyTorch. Computes in float32 or wider, returns the type of `x`.

    `weights` is [1 or rows, tokens] and each of its rows adds up to one (or zero).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    with keep_types(x):
        y = (x if channels is None else x.index_select(-1, channels)).to(wide)
        y = y - y.mean(1, keepdim=True)
        if weights is not None:
            shared = len(weights) == 1
            y = (weights if shared else weights[:, None, None]).to(wide) @ y
        if projection is not None:
            y = y @ projection.to(wide)
        return y.to(x.dtype)


def cost(
    rows: int,
    frames: int,
    tokens: int,
    width: int,
    itemsize: int,
    *,
    chosen: int | None = None,
    projected: int | None = None,
    region: bool = False,
) -> Cost:
    """Each element that is asked for is read once, and each result is written once.

    `chosen` is the number of channels kept, `projected` the number projected to.
    """
    kept = width if chosen is None else chosen
    out = kept if projected is None else projected
    places = rows * frames * tokens
    results = places // tokens if region else places
    moved = places * kept + results * out + (0 if projected is None else width * out)
    flops = 2 * places * kept + (2 * places * kept if region else 0)
    flops += 0 if projected is None else 2 * results * width * out
    return Cost(bytes=itemsize * moved + (4 * rows * tokens if region else 0), flops=flops)


@triton.jit
def _centre_kernel(
    x_ptr,
    channels_ptr,
    frames,
    elements,
    chosen,
    width,
    x_row,
    x_frame,
    x_token,
    x_channel,
    blocks,
    y_ptr,
    FLAT: tl.constexpr,
    FRAMES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: all frames of BLOCK elements (token, channel) of one row."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    element = (program % blocks) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    frame = tl.arange(0, FRAMES).to(tl.int64)[:, None]  # [FRAMES, 1]
    inside = element < elements
    known = inside
    if FLAT:  # tokens and channels lie one after the other: no division, whole lines
        place = element * x_channel
    else:
        channel = element % chosen
        if channels_ptr is not None:
            channel = tl.load(channels_ptr + channel, mask=inside, other=0)
            known = inside & (channel >= 0) & (channel < width)
        place = (element // chosen) * x_token + channel * x_channel
    source = x_ptr + row * x_row + frame * x_frame + place[None, :]
    x = tl.load(source, mask=(frame < frames) & known[None, :], other=0.0).to(tl.float32)
    y = x - (tl.sum(x, axis=0) / frames)[None, :]  # [FRAMES, BLOCK]
    y = tl.where(known[None, :], y, float("nan"))
    target = y_ptr + (row * frames + frame) * elements + element[None, :]
    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=(frame < frames) & inside[None, :])


@triton.jit
def _project_kernel(
    x_ptr,
    projection_ptr,
    frames,
    tokens,
    width,
    projected,
    x_row,
    x_frame,
    x_token,
    x_channel,
    p_channel,
    p_out,
    token_blocks,
    out_blocks,
    y_ptr,
    FRAMES: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
):
    """One program: all frames of TOKENS tokens, projected to OUT of the motion channels."""
    program = tl.program_id(0).to(tl.int64)
    out = (program % out_blocks) * OUT + tl.arange(0, OUT)  # [OUT]
    program = program // out_blocks  # neighbours read the same tokens
    row = program // token_blocks
    frame = tl.arange(0, FRAMES).to(tl.int64)[:, None]  # [FRAMES, 1]
    token = ((program % token_blocks) * TOKENS + tl.arange(0, TOKENS))[None, :]  # [1, TOKENS]
    inside = (frame < frames) & (token < tokens)  # [FRAMES, TOKENS]
    source = x_ptr + row * x_row + frame * x_frame + token * x_token
    products = tl.zeros([FRAMES * TOKENS, OUT], dtype=tl.float32)
    for first in range(0, width, CHANNELS):
        channel = first + tl.arange(0, CHANNELS).to(tl.int64)  # [CHANNELS]
        x = tl.load(
            source[:, :, None] + channel[None, None, :] * x_channel,
            mask=inside[:, :, None] & (channel < width)[None, None, :],
            other=0.0,
        ).to(tl.float32)
        x -= (tl.sum(x, axis=0) / frames)[None, :, :]
        part = tl.load(
            projection_ptr + channel[:, None] * p_channel + out[None, :] * p_out,
            mask=(channel < width)[:, None] & (out < projected)[None, :],
            other=0.0,
        )
        x = tl.reshape(x.to(part.dtype), [FRAMES * TOKENS, CHANNELS])
        products = tl.dot(x, part, products, input_precision="ieee")
    place = tl.reshape((row * frames + frame) * tokens + token, [FRAMES * TOKENS])
    wanted = tl.reshape(inside, [FRAMES * TOKENS])[:, None] & (out < projected)[None, :]
    target = y_ptr + place[:, None] * projected + out[None, :]
    tl.store(target, products.to(y_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def _region_kernel(
    x_ptr,
    channels_ptr,
    weights_ptr,
    rows,
    frames,
    tokens,
    chosen,
    width,
    x_row,
    x_frame,
    x_token,
    x_channel,
    w_row,
    w_token,
    split,
    splits,
    blocks,
    y_ptr,
    FRAMES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the weighted sum over `split` tokens, all frames, BLOCK channels of one row."""
    program = tl.program_id(0).to(tl.int64)
    part = program % splits
    row = program // splits // blocks
    k = (program // splits % blocks) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = k < chosen
    channel, known = k, inside
    if channels_ptr is not None:
        channel = tl.load(channels_ptr + k, mask=inside, other=0)
        known = inside & (channel >= 0) & (channel < width)
    frame = tl.arange(0, FRAMES).to(tl.int64)  # [FRAMES]
    source = x_ptr + row * x_row + frame[:, None, None] * x_frame + channel * x_channel
    readable = (frame < frames)[:, None, None] & known[None, None, :]
    sums = tl.zeros([FRAMES, BLOCK], dtype=tl.float32)
    for first in range(0, split, TOKENS):
        token = part * split + first + tl.arange(0, TOKENS)  # split is a multiple of TOKENS
        mine = token < tokens
        x = tl.load(
            source + token[None, :, None] * x_token,
            mask=readable & mine[None, :, None],
            other=0.0,
        ).to(tl.float32)  # [FRAMES, TOKENS, BLOCK]
        x -= (tl.sum(x, axis=0) / frames)[None, :, :]
        weight = tl.load(weights_ptr + row * w_row + token * w_token, mask=mine, other=0.0)
        sums += tl.sum(x * weight[None, :, None], axis=1)
    sums = tl.where(known[None, :], sums, float("nan"))
    target = y_ptr + ((part * rows + row) * frames + frame)[:, None] * chosen + k[None, :]
    tl.store(target, sums, mask=(frame < frames)[:, None] & inside[None, :])


@triton.jit
def _scatter_kernel(
    grad_ptr,
    order_ptr,
    starts_ptr,
    frames,
    tokens,
    width,
    g_row,
    g_frame,
    g_token,
    g_channel,
    token_blocks,
    channel_blocks,
    dx_ptr,
    FRAMES: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One program: the gradient of all frames of TOKENS tokens in CHANNELS channels of one row.

    The places where channel c was put are order[starts[c]:starts[c + 1]].
    """
    program = tl.program_id(0).to(tl.int64)
    # All tiles have the rank of the result from the start: in a loop over loaded bounds, Triton's
    # AMD back end fails on a tile that gains axes there (3.7.1, removal of layout conversions).
    channel = (program % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    program = program // channel_blocks
    row = program // token_blocks
    token = (program % token_blocks) * TOKENS + tl.arange(0, TOKENS)[None, :, None]
    frame = tl.arange(0, FRAMES).to(tl.int64)[:, None, None]
    known = channel < width
    inside = (frame < frames) & (token < tokens)  # [FRAMES, TOKENS, 1]
    start = tl.load(starts_ptr + channel, mask=known, other=0)
    uses = (tl.load(starts_ptr + channel + 1, mask=known, other=0) - start).to(tl.int32)
    source = grad_ptr + row * g_row + frame * g_frame + token * g_token
    dx = tl.zeros([FRAMES, TOKENS, CHANNELS], dtype=tl.float32)
    for use in range(tl.max(uses)):  # once, unless a channel was chosen twice
        used = use < uses  # [1, 1, CHANNELS]
        k = tl.load(order_ptr + start + use, mask=used, other=0)
        dx += tl.load(source + k * g_channel, mask=inside & used, other=0.0).to(tl.float32)
    dx -= (tl.sum(dx, axis=0) / frames)[None, :, :]
    target = dx_ptr + ((row * frames + frame) * tokens + token) * width + channel
    tl.store(target, dx.to(dx_ptr.dtype.element_ty), mask=inside & known)


@triton.jit
def _project_backward_kernel(
    grad_ptr,
    projection_ptr,
    frames,
    tokens,
    width,
    projected,
    g_row,
    g_frame,
    g_token,
    g_out,
    p_channel,
    p_out,
    token_blocks,
    channel_blocks,
    dx_ptr,
    FRAMES: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
):
    """One program: the gradient of all frames of TOKENS tokens in CHANNELS channels."""
    program = tl.program_id(0).to(tl.int64)
    channel = (program % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)  # [CHANNELS]
    program = program // channel_blocks
    row = program // token_blocks
    frame = tl.arange(0, FRAMES).to(tl.int64)[:, None]  # [FRAMES, 1]
    token = ((program % token_blocks) * TOKENS + tl.arange(0, TOKENS))[None, :]  # [1, TOKENS]
    inside = (frame < frames) & (token < tokens)  # [FRAMES, TOKENS]
    source = grad_ptr + row * g_row + frame * g_frame + token * g_token
    products = tl.zeros([FRAMES * TOKENS, CHANNELS], dtype=tl.float32)
    for first in range(0, projected, OUT):
        out = first + tl.arange(0, OUT).to(tl.int64)  # [OUT]
        grad = tl.load(
            source[:, :, None] + out[None, None, :] * g_out,
            mask=inside[:, :, None] & (out < projected)[None, None, :],
            other=0.0,
        ).to(tl.float32)
        grad -= (tl.sum(grad, axis=0) / frames)[None, :, :]
        part = tl.load(
            projection_ptr + out[:, None] * p_out + channel[None, :] * p_channel,
            mask=(out < projected)[:, None] & (channel < width)[None, :],
            other=0.0,
        )
        grad = tl.reshape(grad.to(part.dtype), [FRAMES * TOKENS, OUT])
        products = tl.dot(grad, part, products, input_precision="ieee")
    place = tl.reshape((row * frames + frame) * tokens + token, [FRAMES * TOKENS])
    wanted = tl.reshape(inside, [FRAMES * TOKENS])[:, None] & (channel < width)[None, :]
    target = dx_ptr + place[:, None] * width + channel[None, :]
    tl.store(target, products.to(dx_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def _spread_kernel(
    grad_ptr,
    weights_ptr,
    frames,
    tokens,
    width,
    w_row,
    w_token,
    token_blocks,
    channel_blocks,
    dx_ptr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One program: the gradient of TOKENS tokens in CHANNELS channels of one frame of one row."""
    program = tl.program_id(0).to(tl.int64)
    channel = (program % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)  # [CHANNELS]
    program = program // channel_blocks
    image = program // token_blocks  # row * frames + frame
    token = (program % token_blocks) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    weight = weights_ptr + image // frames * w_row + token * w_token
    weight = tl.load(weight, mask=token < tokens, other=0.0)
    grad = tl.load(grad_ptr + image * width + channel, mask=channel < width, other=0.0)
    dx = (weight[:, None] * grad[None, :]).to(dx_ptr.dtype.element_ty)
    target = dx_ptr + (image * tokens + token)[:, None] * width + channel[None, :]
    tl.store(target, dx, mask=(token < tokens)[:, None] & (channel < width)[None, :])


def _launch_forward(
    x: Tensor,
    channels: Tensor | None,
    projection: Tensor | None,
    weights: Tensor | None,
    y: Tensor,
) -> None:
    """Fill `y`, contiguous [rows, frames, tokens or 1, K]; tensors as in the operator."""
    if y.numel() == 0:
        return
    # Triton launches on the current device.
    with torch.cuda.device_of(x), keep_types(x):
        if weights is not None:
            mean = _launch_region(x, channels, weights)
            mean = mean if projection is None else mean @ projection.float()
            y.copy_(mean[:, :, None])
        elif projection is not None:
            _launch_project(x, projection, y)
        else:
            _launch_centre(x, channels, y)


def _launch_centre(x: Tensor, channels: Tensor | None, y: Tensor) -> None:
    rows, frames, tokens, width = x.shape
    chosen = y.shape[-1]
    elements = tokens * chosen
    flat = channels is None and (tokens == 1 or x.stride(2) == width * x.stride(3))
    padded, block, chosen_settings = _tile("centre" if flat else "gather", frames)
    blocks = triton.cdiv(elements, block)
    _centre_kernel[(rows * blocks,)](
        x,
        channels,
        frames,
        elements,
        chosen,
        width,
        *x.stride(),
        blocks,
        y,
        FLAT=flat,
        FRAMES=padded,
        BLOCK=block,
        **chosen_settings,
    )


def _launch_project(x: Tensor, projection: Tensor, y: Tensor) -> None:
    rows, frames, tokens, width = x.shape
    projected = projection.shape[1]
    sizes = _blocks("project", frames, tokens, width, projected)
    token_blocks = triton.cdiv(tokens, sizes["TOKENS"])
    out_blocks = triton.cdiv(projected, sizes["OUT"])
    _project_kernel[(rows * token_blocks * out_blocks,)](
        x,
        projection,
        frames,
        tokens,
        width,
        projected,
        *x.stride(),
        *projection.stride(),
        token_blocks,
        out_blocks,
        y,
        **sizes,
    )


def _launch_region(x: Tensor, channels: Tensor | None, weights: Tensor) -> Tensor:
    """The weighted mean over tokens: float32 [rows, frames, channels]."""
    rows, frames, tokens, width = x.shape
    chosen = width if channels is None else len(channels)
    sizes = settings("motion_feature", "region")
    padded = triton.next_power_of_2(frames)
    block = min(sizes["BLOCK"], triton.next_power_of_2(chosen))
    step = max(1, sizes.pop("TILE") // (padded * block))
    sizes |= {"BLOCK": block, "FRAMES": padded, "TOKENS": step}
    blocks = triton.cdiv(chosen, block)
    splits = min(triton.cdiv(_PROGRAMS, rows * blocks), triton.cdiv(tokens, step))
    split = triton.cdiv(triton.cdiv(tokens, splits), step) * step
    splits = triton.cdiv(tokens, split)
    sums = torch.empty(splits, rows, frames, chosen, dtype=torch.float32, device=x.device)
    _region_kernel[(rows * blocks * splits,)](
        x,
        channels,
        weights,
        rows,
        frames,
        tokens,
        chosen,
        width,
        *x.stride(),
        *_weight_strides(weights),
        split,
        splits,
        blocks,
        sums,
        **sizes,
    )
    return sums.sum(0)


def _launch_backward(
    grad: Tensor,
    channels: Tensor | None,
    projection: Tensor | None,
    weights: Tensor | None,
    dx: Tensor,
) -> None:
    """Fill `dx`, contiguous like `x`, from `grad`, like `y` with any strides."""
    if dx.numel() == 0:
        return
    with torch.cuda.device_of(dx), keep_types(dx):
        if weights is not None:
            _launch_spread(_grad_of_mean(grad, channels, projection, dx.shape[-1]), weights, dx)
        elif projection is not None:
            _launch_project_backward(grad, projection, dx)
        elif channels is not None:
            _launch_scatter(grad, channels, dx)
        else:
            _launch_centre(grad, None, dx)  # taking a mean away is its own transpose


def _grad_of_mean(
    grad: Tensor, channels: Tensor | None, projection: Tensor | None, width: int
) -> Tensor:
    """The gradient of the weighted mean over tokens, float32 [rows, frames, 1, channels].

    Channels go where they belong by the kernel, which adds those named twice in one order: an
    `index_add` on a GPU does so in any, and its result changes from run to run.
    """
    if channels is None:
        return _back_to_channels(grad, None, projection, width)
    every = torch.empty(*grad.shape[:-1], width, dtype=torch.float32, device=grad.device)
    _launch_scatter(grad, channels, every)
    return every


def _launch_project_backward(grad: Tensor, projection: Tensor, dx: Tensor) -> None:
    rows, frames, tokens, width = dx.shape
    projected = projection.shape[1]
    sizes = _blocks("project_backward", frames, tokens, width, projected)
    token_blocks = triton.cdiv(tokens, sizes["TOKENS"])
    channel_blocks = triton.cdiv(width, sizes["CHANNELS"])
    _project_backward_kernel[(rows * token_blocks * channel_blocks,)](
        grad,
        projection,
        frames,
        tokens,
        width,
        projected,
        *grad.stride(),
        *projection.stride(),
        token_blocks,
        channel_blocks,
        dx,
        **sizes,
    )


def _launch_scatter(grad: Tensor, channels: Tensor, dx: Tensor) -> None:
    rows, frames, tokens, width = dx.shape
    ordered, order = channels.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(width + 1, device=channels.device))
    padded, block, sizes = _tile("scatter", frames)
    sizes |= _square(block, sizes.pop("CHANNELS"), width)
    token_blocks = triton.cdiv(tokens, sizes["TOKENS"])
    channel_blocks = triton.cdiv(width, sizes["CHANNELS"])
    _scatter_kernel[(rows * token_blocks * channel_blocks,)](
        grad,
        order,
        starts,
        frames,
        tokens,
        width,
        *grad.stride(),
        token_blocks,
        channel_blocks,
        dx,
        FRAMES=padded,
        **sizes,
    )


def _launch_spread(grad: Tensor, weights: Tensor, dx: Tensor) -> None:
    """Fill `dx` from `grad`, contiguous [rows, frames, 1, channels]."""
    rows, frames, tokens, width = dx.shape
    sizes = settings("motion_feature", "spread")
    sizes |= _square(sizes.pop("TILE"), sizes.pop("CHANNELS"), width)
    token_blocks = triton.cdiv(tokens, sizes["TOKENS"])
    channel_blocks = triton.cdiv(width, sizes["CHANNELS"])
    _spread_kernel[(rows * frames * token_blocks * channel_blocks,)](
        grad,
        weights,
        frames,
        tokens,
        width,
        *_weight_strides(weights),
        token_blocks,
        channel_blocks,
        dx,
        **sizes,
    )


def _back_to_channels(
    grad: Tensor, channels: Tensor | None, projection: Tensor | None, width: int
) -> Tensor:
    """The gradient of all channels of `x`, float32 or wider; small for a region."""
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    grad = grad - grad.mean(1, keepdim=True)
    if projection is not None:
        return grad @ projection.to(grad.dtype).T
    if channels is not None:
        all_channels = grad.new_zeros(*grad.shape[:-1], width)
        return all_channels.index_add_(-1, channels, grad)
    return grad.contiguous()


def _tile(kernel: str, frames: int) -> tuple[int, int, dict[str, int]]:
    """Padded frames, elements of a block, and the other settings."""
    chosen = settings("motion_feature", kernel)
    padded = triton.next_power_of_2(frames)
    return padded, max(16, chosen.pop("TILE") // padded), chosen


def _square(elements: int, channels: int, width: int) -> dict[str, int]:
    """Sides of a tile of `elements` over tokens and channels.

    A tile has two axes so that no element needs a division to find its token and channel: one
    takes longer than the element's share of the memory's time.
    """
    channels = min(channels, elements, triton.next_power_of_2(width))
    return {"TOKENS": elements // channels, "CHANNELS": channels}


def _blocks(kernel: str, frames: int, tokens: int, width: int, projected: int) -> dict[str, int]:
    """Settings of the two kernels with a matrix product, whose sides are at least 16."""
    chosen = settings("motion_feature", kernel)
    padded = triton.next_power_of_2(frames)
    step = max(1, chosen.pop("ROWS") // padded, 16 // padded)
    chosen["FRAMES"], chosen["TOKENS"] = padded, step
    for name, size in {"CHANNELS": width, "OUT": projected}.items():
        chosen[name] = min(chosen[name], max(16, triton.next_power_of_2(size)))
    return chosen


def _weight_strides(weights: Tensor) -> tuple[int, int]:
    return (0 if len(weights) == 1 else weights.stride(0)), weights.stride(1)


@torch.library.custom_op("kinetiq::motion_feature", mutates_args=(), device_types="cuda")
def _motion_feature(
    x: Tensor, channels: Tensor | None, projection: Tensor | None, weights: Tensor | None
) -> Tensor:
    y = _empty_result(x, channels, projection, weights)
    _launch_forward(x, channels, projection, weights, y)
    return y


def _empty_result(
    x: Tensor, channels: Tensor | None, projection: Tensor | None, weights: Tensor | None
) -> Tensor:
    rows, frames, tokens, width = x.shape
    if channels is not None:
        width = channels.shape[0]
    elif projection is not None:
        width = projection.shape[1]
    return x.new_empty(rows, frames, tokens if weights is None else 1, width)


_motion_feature.register_fake(_empty_result)


@_motion_feature.register_kernel("cpu")
def _(
    x: Tensor, channels: Tensor | None, projection: Tensor | None, weights: Tensor | None
) -> Tensor:
    if channels is not None:  # a graph that was compiled or exported brings any
        _check_channels(channels, x.shape[-1], x.device)
    return motion_feature_reference(x, channels, projection, weights).contiguous()


@torch.library.custom_op("kinetiq::motion_feature_backward", mutates_args=(), device_types="cuda")
def _motion_feature_backward(
    grad: Tensor,
    channels: Tensor | None,
    projection: Tensor | None,
    weights: Tensor | None,
    tokens: int,
    width: int,
) -> Tensor:
    dx = grad.new_empty(*grad.shape[:2], tokens, width)
    _launch_backward(grad, channels, projection, weights, dx)
    return dx


@_motion_feature_backward.register_fake
def _(
    grad: Tensor,
    channels: Tensor | None,
    projection: Tensor | None,
    weights: Tensor | None,
    tokens: int,
    width: int,
) -> Tensor:
    return grad.new_empty(*grad.shape[:2], tokens, width)


@_motion_feature_backward.register_kernel("cpu")
def _(
    grad: Tensor,
    channels: Tensor | None,
    projection: Tensor | None,
    weights: Tensor | None,
    tokens: int,
    width: int,
) -> Tensor:
    with keep_types(grad):
        dx = _back_to_channels(grad, channels, projection, width)
    if weights is not None:
        dx = weights.to(dx.dtype)[:, None, :, None] * dx
    return dx.to(grad.dtype).contiguous()


def _save(ctx, inputs, output) -> None:
    x, channels, projection, weights = inputs
    ctx.shape = x.shape
    x = x if ctx.needs_input_grad[2] else None
    ctx.save_for_backward(x, channels, projection, weights)


def _backward(ctx, grad: Tensor):
    x, channels, projection, weights = ctx.saved_tensors
    dx = dp = None
    if ctx.needs_input_grad[0]:
        tokens, width = ctx.shape[2:]
        dx = _motion_feature_backward(grad, channels, projection, weights, tokens, width)
    if ctx.needs_input_grad[2]:
        with keep_types(grad):
            motion = _motion_feature(x, None, None, weights)
            dp = motion.flatten(0, -2).T @ grad.flatten(0, -2)
    return dx, None, dp, None


_motion_feature.register_autograd(_backward, setup_context=_save)


def _check(x: Tensor, projection: Tensor | None, region: Tensor | None) -> None:
    for name, tensor in {"x": x, "projection": projection, "region": region}.items():
        if tensor is not None or name == "x":
            check_tensor("motion_feature", name, tensor)
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ShapeError(
            f"motion_feature: x must be [rows, frames, tokens, channels] with at least one frame, "
            f"token and channel, got {list(x.shape)}"
        )
    if x.dtype not in _TYPES and (x.is_cuda or x.dtype != torch.float64):
        raise ShapeError(
            f"motion_feature: x must be float32, float16 or bfloat16, got {x.dtype} on {x.device}"
        )
    rows, frames, tokens, width = x.shape
    if x.is_cuda and frames > MAX_FRAMES:
        raise ShapeError(
            f"motion_feature: x must have at most {MAX_FRAMES} frames on a GPU, got {frames}"
        )
    if projection is not None:
        if projection.ndim != 2 or projection.shape[0] != width or projection.shape[1] < 1:
            raise ShapeError(
                f"motion_feature: projection must be [channels = {width}, K], "
                f"got {list(projection.shape)}"
            )
        if projection.dtype != x.dtype or projection.device != x.device:
            raise ShapeError(
                f"motion_feature: projection must be {x.dtype} on {x.device} like x, "
                f"got {projection.dtype} on {projection.device}"
            )
    if region is not None:
        # Compared one by one: a trace puts no guard on sizes in a list.
        shape = list(region.shape)
        fits = shape == [tokens] or shape == [rows, tokens]  # noqa: PLR1714
        if not fits or region.device != x.device:
            raise ShapeError(
                f"motion_feature: region must be [tokens = {tokens}] or [rows = {rows}, tokens] "
                f"on {x.device}, got {list(region.shape)} on {region.device}"
            )
        if region.is_complex():
            raise ShapeError(f"motion_feature: region must hold real numbers, got {region.dtype}")
        if region.requires_grad:
            raise ShapeError(
                "motion_feature: region must not require a gradient, got one that does; detach it"
            )


def _check_channels(channels: Tensor | Sequence[int], width: int, device: torch.device) -> Tensor:
    if not isinstance(channels, Tensor):
        if not isinstance(channels, Iterable):
            raise ShapeError(
                f"motion_feature: channels must be a tensor or integers, got {channels!r}"
            )
        indices = list(channels)
        if not all(type(index) is int for index in indices):
            raise ShapeError(f"motion_feature: channels must be integers, got {indices}")
        if device.type == "cuda":  # the copy would wait for the GPU, and no graph could hold it
            raise ShapeError(
                f"motion_feature: channels must be an int64 tensor on {device} like x, got "
                f"integers; make it once: torch.tensor(channels, device={str(device)!r})"
            )
        index = torch.tensor(indices, dtype=torch.int64, device="cpu")
        return _check_channels(index, width, index.device).to(device)
    if channels.ndim != 1 or len(channels) < 1 or channels.dtype != torch.int64:
        raise ShapeError(
            f"motion_feature: channels must be one or more indices, int64 [K], "
            f"got {channels.dtype} {list(channels.shape)}"
        )
    if channels.device != device:
        raise ShapeError(
            f"motion_feature: channels must be on {device} like x, got {channels.device}"
        )
    check_range("motion_feature", "channels", channels, width)
    return channels


def _normalise(region: Tensor) -> Tensor:
    """[1 or rows, tokens], each row divided by its sum."""
    weights = region if region.ndim == 2 else region[None]
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, math.inf)


# The output of up block 1, where the paper reads its features, with guidance: rows, frames,
# positions, channels; and the number of motion channels, which is 4 % of them.
_SHAPES = {
    "animatediff": (2, 16, 32 * 32, 1280, 51),
    "zeroscope": (2, 24, 36 * 20, 1280, 51),
    "videocrafter2": (2, 16, 32 * 20, 1280, 51),
    "embedded": (2, 8, 16 * 16, 128, 5),
    "longest": (2, MAX_FRAMES, 32 * 32, 1280, 51),
}


def _case(shape: str, kind: str, forward: bool) -> CompileCase:
    """The launch at one production shape; `kind` is what is asked for."""

    def launch(dtype: torch.dtype) -> None:
        rows, frames, tokens, width, motion = _SHAPES[shape]
        empty = functools.partial(torch.empty, dtype=dtype, device="meta")
        channels = empty(motion, dtype=torch.int64) if kind == "channels" else None
        projection = empty(width, motion) if kind == "projection" else None
        weights = empty(1, tokens, dtype=torch.float32) if kind == "region" else None
        x = empty(rows, frames, tokens, width)
        y = _empty_result(x, channels, projection, weights)
        if forward:
            _launch_forward(x, channels, projection, weights, y)
        else:
            _launch_backward(y, channels, projection, weights, x)

    padded_work = 1.0
    if kind == "projection":  # a matrix product's sides are powers of two
        _, frames, _, _, motion = _SHAPES[shape]
        padded_work = triton.next_power_of_2(frames) / frames
        padded_work *= max(16, triton.next_power_of_2(motion)) / motion
    return CompileCase("motion_feature", f"{shape}_{kind}", forward, launch, lambda: padded_work)


COMPILED = tuple(
    _case(shape, kind, forward)
    for shape in _SHAPES
    for kind in ("all", "channels", "projection", "region")
    for forward in (True, False)
)
