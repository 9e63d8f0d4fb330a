r"""Classifier-free guidance and the sampler's update, with coefficients per row.

    m     = uncond + g (cond - uncond)
    next  = a x + b m + c former + s noise
    clean = p x + q m

`clean` is the sampler's estimate of the clean latents and `former` that of the step before, so
the update is a linear multistep method with one step of memory. Each clip has its own
coefficients: clips at different steps, or of different samplers, share one call.

A program owns a piece of one clip, so that the coefficients are the same for all of it. Each of
the five tensors is read once and each result written once, where PyTorch takes ten passes.
Accumulation is in float32, or in float64 for float64.

Source: Ho & Salimans, "Classifier-Free Diffusion Guidance", arXiv:2207.12598, eq. 6; the samplers
are in `kinetiq.sampler`.
"""

import functools
import math

import torch
from torch import Tensor

from kinetiq.errors import ShapeError
from kinetiq.kernels._checks import check_tensor, check_type
from kinetiq.kernels._compile import CompileCase
from kinetiq.kernels._cost import Cost
from kinetiq.kernels._launch import settings
from kinetiq.kernels._triton import tl, triton


def guided_step(
    sample: Tensor,
    conditional: Tensor,
    unconditional: Tensor,
    former: Tensor,
    noise: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the next sample and the estimate of the clean latents.

    Args:
        sample: [clips, ...], any strides, float32 as a rule; the results have its type.
        conditional: like `sample`, the network's output for the prompt. It and the other tensors
            may each be of another floating type than `sample`.
        unconditional: like `sample`, its output for the negative prompt; pass `conditional` for a
            clip without guidance.
        former: like `sample`, the clean estimate of the step before; zeros at the first step.
        noise: like `sample`, unit noise; zeros where the step adds none.
        guidance_scale: [clips]; 1 is no guidance.
        coefficients: [clips, 6]: a, b, c, s, p, q of the formula above.

    Raises:
        ShapeError: a shape, type or device does not match.
    """
    likewise = {
        "conditional": conditional,
        "unconditional": unconditional,
        "former": former,
        "noise": noise,
    }
    numbers = {"guidance_scale": guidance_scale, "coefficients": coefficients}
    for name, tensor in {"sample": sample, **likewise, **numbers}.items():
        check_tensor("guided_step", name, tensor)
        check_type("guided_step", name, tensor)
    if sample.ndim == 0:
        raise ShapeError("guided_step: sample must be [clips, ...], got []")
    for name, tensor in likewise.items():
        if tensor.shape != sample.shape:
            raise ShapeError(
                f"guided_step: {name} must have the shape of sample {list(sample.shape)}, "
                f"got {list(tensor.shape)}"
            )
    clips = sample.shape[0]
    if list(guidance_scale.shape) != [clips] or list(coefficients.shape) != [clips, 6]:
        raise ShapeError(
            f"guided_step: guidance_scale must be [clips] and coefficients [clips, 6] with clips "
            f"= {clips}, got {list(guidance_scale.shape)} and {list(coefficients.shape)}"
        )
    for name, tensor in {**likewise, **numbers}.items():
        if tensor.device != sample.device:
            raise ShapeError(
                f"guided_step: {name} must be on {sample.device} like sample, got {tensor.device}"
            )
    inputs = (sample, conditional, unconditional, former, noise, guidance_scale, coefficients)
    if sample.device.type == "cpu" and not torch.compiler.is_compiling():
        return _step_on_cpu(*inputs)  # an operator is only overhead there
    following, clean = _guided_step(*inputs)
    return following, clean


def guided_step_reference(
    sample: Tensor,
    conditional: Tensor,
    unconditional: Tensor,
    former: Tensor,
    noise: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor]:
    """The definition, in PyTorch. Computes in float32 or wider, returns the type of `sample`."""
    wide = torch.promote_types(sample.dtype, torch.float32)
    x, conditional, unconditional, former, noise = (
        tensor.to(wide) for tensor in (sample, conditional, unconditional, former, noise)
    )
    spread = [1] * (sample.ndim - 1)
    scale = guidance_scale.to(wide).reshape(-1, *spread)
    a, b, c, s, p, q = coefficients.to(wide).reshape(-1, 6, *spread).unbind(1)
    output = unconditional + scale * (conditional - unconditional)
    following, clean = a * x + b * output + c * former + s * noise, p * x + q * output
    return following.to(sample.dtype), clean.to(sample.dtype)


def _step_on_cpu(
    sample: Tensor,
    conditional: Tensor,
    unconditional: Tensor,
    former: Tensor,
    noise: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same in seven passes, where the reference's sums and products take thirteen."""
    wide = torch.promote_types(sample.dtype, torch.float32)
    x, conditional, unconditional, former, noise = (
        tensor.to(wide) for tensor in (sample, conditional, unconditional, former, noise)
    )
    spread = [1] * (sample.ndim - 1)
    scale = guidance_scale.to(wide).reshape(-1, *spread)
    a, b, c, s, p, q = coefficients.to(wide).reshape(-1, 6, *spread).unbind(1)
    output = torch.lerp(unconditional, conditional, scale)
    following = torch.addcmul(a * x, b, output).addcmul(c, former).addcmul(s, noise)
    clean = torch.addcmul(p * x, q, output)
    return following.to(sample.dtype).contiguous(), clean.to(sample.dtype).contiguous()


def cost(
    clips: int, elements: int, itemsize: int = 4, *, output_itemsize: int | None = None
) -> Cost:
    """Five tensors in, two out, and seven numbers a clip; `elements` are those of one clip.

    Two of the five are the network's output, whose elements may have another size.
    """
    of_output = itemsize if output_itemsize is None else output_itemsize
    moved = (5 * itemsize + 2 * of_output) * clips * elements + 4 * 7 * clips
    return Cost(bytes=moved, flops=13 * clips * elements)


@triton.jit
def _numbers(scale_ptr, coefficients_ptr, clip, WIDE: tl.constexpr):
    """The guidance scale of one clip, and its coefficients a, b, c, s, p and q."""
    scale = tl.load(scale_ptr + clip).to(WIDE)
    first = coefficients_ptr + clip * 6
    a, b, c = tl.load(first), tl.load(first + 1), tl.load(first + 2)
    s, p, q = tl.load(first + 3), tl.load(first + 4), tl.load(first + 5)
    return scale, a.to(WIDE), b.to(WIDE), c.to(WIDE), s.to(WIDE), p.to(WIDE), q.to(WIDE)


@triton.jit
def _piece(ptr, by_clip, clip, element, inside, WIDE: tl.constexpr):
    """Elements of one clip; zero past the last, so that they add nothing to a sum."""
    return tl.load(ptr + clip * by_clip + element, mask=inside, other=0.0).to(WIDE)


@triton.jit
def _guided(wanted, other, scale):
    """As torch.lerp: exact for a scale of 0 and of 1."""
    way = wanted - other
    return tl.where(tl.abs(scale) < 0.5, other + scale * way, wanted - (1.0 - scale) * way)


@triton.jit
def _put(ptr, place, values, inside):
    tl.store(ptr + place, values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _guided_step_kernel(
    sample_ptr,
    conditional_ptr,
    unconditional_ptr,
    former_ptr,
    noise_ptr,
    scale_ptr,
    coefficients_ptr,
    elements,
    blocks,
    x_clip,
    conditional_clip,
    unconditional_clip,
    former_clip,
    noise_clip,
    following_ptr,
    clean_ptr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    clip = program // blocks
    element = (program % blocks) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = element < elements
    scale, a, b, c, s, p, q = _numbers(scale_ptr, coefficients_ptr, clip, WIDE)

    x = _piece(sample_ptr, x_clip, clip, element, inside, WIDE)
    wanted = _piece(conditional_ptr, conditional_clip, clip, element, inside, WIDE)
    other = _piece(unconditional_ptr, unconditional_clip, clip, element, inside, WIDE)
    former = _piece(former_ptr, former_clip, clip, element, inside, WIDE)
    noise = _piece(noise_ptr, noise_clip, clip, element, inside, WIDE)

    output = _guided(wanted, other, scale)
    following = a * x + b * output + c * former + s * noise
    clean = p * x + q * output
    place = clip * elements + element
    _put(following_ptr, place, following, inside)
    _put(clean_ptr, place, clean, inside)


@triton.jit
def _guided_step_backward_kernel(
    sample_ptr,
    conditional_ptr,
    unconditional_ptr,
    former_ptr,
    noise_ptr,
    scale_ptr,
    coefficients_ptr,
    d_following_ptr,
    d_clean_ptr,
    elements,
    blocks,
    x_clip,
    conditional_clip,
    unconditional_clip,
    former_clip,
    noise_clip,
    d_following_clip,
    d_clean_clip,
    d_sample_ptr,
    d_conditional_ptr,
    d_unconditional_ptr,
    d_former_ptr,
    d_noise_ptr,
    sums_ptr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the tensors, and this piece's part of those of scale, a, b, c, s, p and q.

    One whose pointer is None is not computed.
    """
    program = tl.program_id(0).to(tl.int64)
    clip = program // blocks
    element = (program % blocks) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = element < elements
    scale, a, b, c, s, p, q = _numbers(scale_ptr, coefficients_ptr, clip, WIDE)

    following = _piece(d_following_ptr, d_following_clip, clip, element, inside, WIDE)
    clean = _piece(d_clean_ptr, d_clean_clip, clip, element, inside, WIDE)
    output = b * following + q * clean
    place = clip * elements + element
    if d_sample_ptr is not None:
        _put(d_sample_ptr, place, a * following + p * clean, inside)
    if d_conditional_ptr is not None:
        _put(d_conditional_ptr, place, scale * output, inside)
    if d_unconditional_ptr is not None:
        _put(d_unconditional_ptr, place, output - scale * output, inside)
    if d_former_ptr is not None:
        _put(d_former_ptr, place, c * following, inside)
    if d_noise_ptr is not None:
        _put(d_noise_ptr, place, s * following, inside)

    if sums_ptr is not None:
        x = _piece(sample_ptr, x_clip, clip, element, inside, WIDE)
        wanted = _piece(conditional_ptr, conditional_clip, clip, element, inside, WIDE)
        other = _piece(unconditional_ptr, unconditional_clip, clip, element, inside, WIDE)
        former = _piece(former_ptr, former_clip, clip, element, inside, WIDE)
        noise = _piece(noise_ptr, noise_clip, clip, element, inside, WIDE)
        mixed = _guided(wanted, other, scale)
        sums = sums_ptr + program * 7
        tl.store(sums + 0, tl.sum(output * (wanted - other)))
        tl.store(sums + 1, tl.sum(following * x))
        tl.store(sums + 2, tl.sum(following * mixed))
        tl.store(sums + 3, tl.sum(following * former))
        tl.store(sums + 4, tl.sum(following * noise))
        tl.store(sums + 5, tl.sum(clean * x))
        tl.store(sums + 6, tl.sum(clean * mixed))


def _launch_forward(
    tensors: tuple[Tensor, ...], scale: Tensor, coefficients: Tensor, results: tuple[Tensor, ...]
) -> None:
    """Fill `results`, two contiguous tensors like the sample, which is the first of `tensors`."""
    sample = tensors[0]
    if sample.numel() == 0:
        return
    clips, elements = len(sample), sample[0].numel()
    rows = [_by_clip(tensor) for tensor in tensors]
    with torch.cuda.device_of(sample):  # which Triton launches on is the current device
        chosen = settings("guided_step", "forward")
        blocks = triton.cdiv(elements, chosen["BLOCK"])
        _guided_step_kernel[(clips * blocks,)](
            *rows,
            scale.contiguous(),
            coefficients.contiguous(),
            elements,
            blocks,
            *(row.stride(0) for row in rows),
            *results,
            WIDE=_wide(sample),
            **chosen,
        )


def _launch_backward(
    tensors: tuple[Tensor, ...],
    scale: Tensor,
    coefficients: Tensor,
    grads: tuple[Tensor, Tensor],
    results: tuple[Tensor | None, ...],
    numbers_needed: bool,
) -> Tensor | None:
    """Fill `results`, contiguous gradients of `tensors`; one that is None is not computed.

    Returns:
        [clips, 7], gradients of the scale and of the coefficients, float32 or wider; None where
        `numbers_needed` is not set.
    """
    sample = tensors[0]
    wide = torch.promote_types(sample.dtype, torch.float32)
    clips = len(sample)
    empty = functools.partial(torch.empty, dtype=wide, device=sample.device)
    if sample.numel() == 0:
        return empty(clips, 7).zero_() if numbers_needed else None
    elements = sample[0].numel()
    rows = [_by_clip(tensor) for tensor in tensors]
    grad_rows = [_by_clip(grad) for grad in grads]
    with torch.cuda.device_of(sample):
        chosen = settings("guided_step", "backward")
        blocks = triton.cdiv(elements, chosen["BLOCK"])
        sums = empty(clips, blocks, 7) if numbers_needed else None
        _guided_step_backward_kernel[(clips * blocks,)](
            *rows,
            scale.contiguous(),
            coefficients.contiguous(),
            *grad_rows,
            elements,
            blocks,
            *(row.stride(0) for row in (*rows, *grad_rows)),
            *results,
            sums,
            WIDE=_wide(sample),
            **chosen,
        )
    return None if sums is None else sums.sum(1)


def _by_clip(tensor: Tensor) -> Tensor:
    """[clips, elements]; a view where each clip is contiguous, whatever lies between clips."""
    whole = tensor if tensor[0].is_contiguous() else tensor.contiguous()
    return whole.reshape(len(tensor), -1)


def _wide(sample: Tensor) -> tl.dtype:
    return tl.float64 if sample.dtype == torch.float64 else tl.float32


@torch.library.custom_op("kinetiq::guided_step", mutates_args=(), device_types="cuda")
def _guided_step(
    sample: Tensor,
    conditional: Tensor,
    unconditional: Tensor,
    former: Tensor,
    noise: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor]:
    following, clean = sample.new_empty(sample.shape), sample.new_empty(sample.shape)
    tensors = (sample, conditional, unconditional, former, noise)
    _launch_forward(tensors, guidance_scale, coefficients, (following, clean))
    return following, clean


@_guided_step.register_fake
def _(
    sample: Tensor,
    conditional: Tensor,
    unconditional: Tensor,
    former: Tensor,
    noise: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor]:
    return sample.new_empty(sample.shape), sample.new_empty(sample.shape)


@_guided_step.register_kernel("cpu")
def _(
    sample: Tensor,
    conditional: Tensor,
    unconditional: Tensor,
    former: Tensor,
    noise: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor]:
    return _step_on_cpu(
        sample, conditional, unconditional, former, noise, guidance_scale, coefficients
    )


@torch.library.custom_op("kinetiq::guided_step_backward", mutates_args=(), device_types="cuda")
def _guided_step_backward(
    tensors: list[Tensor],
    guidance_scale: Tensor,
    coefficients: Tensor,
    d_following: Tensor,
    d_clean: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of the seven inputs; one that is not needed has no elements."""
    results = _empty_gradients([*tensors, guidance_scale, coefficients], needed)
    wanted = [result if need else None for result, need in zip(results, needed, strict=True)]
    sums = _launch_backward(
        tuple(tensors),
        guidance_scale,
        coefficients,
        (d_following, d_clean),
        tuple(wanted[:5]),
        any(needed[5:]),
    )
    if sums is not None:
        for result, part in zip(wanted[5:], (sums[:, 0], sums[:, 1:]), strict=True):
            if result is not None:
                result.copy_(part)
    return results


def _empty_gradients(tensors: list[Tensor], needed: list[bool]) -> list[Tensor]:
    return [
        tensor.new_empty(tensor.shape if need else 0)
        for tensor, need in zip(tensors, needed, strict=True)
    ]


@_guided_step_backward.register_fake
def _(
    tensors: list[Tensor],
    guidance_scale: Tensor,
    coefficients: Tensor,
    d_following: Tensor,
    d_clean: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    return _empty_gradients([*tensors, guidance_scale, coefficients], needed)


@_guided_step_backward.register_kernel("cpu")
def _(
    tensors: list[Tensor],
    guidance_scale: Tensor,
    coefficients: Tensor,
    d_following: Tensor,
    d_clean: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    x, wanted, other, former, noise = (tensor.to(wide) for tensor in tensors)
    following, clean = d_following.to(wide), d_clean.to(wide)
    spread = [1] * (x.ndim - 1)
    scale = guidance_scale.to(wide).reshape(-1, *spread)
    a, b, c, s, p, q = coefficients.to(wide).reshape(-1, 6, *spread).unbind(1)
    output = b * following + q * clean
    mixed = torch.lerp(other, wanted, scale)

    def of_clip(product: Tensor) -> Tensor:
        return product.reshape(len(x), math.prod(x.shape[1:])).sum(1)

    results = _empty_gradients([*tensors, guidance_scale, coefficients], needed)
    if needed[0]:
        results[0].copy_(a * following + p * clean)
    if needed[1]:
        results[1].copy_(scale * output)
    if needed[2]:
        results[2].copy_(output - scale * output)
    if needed[3]:
        results[3].copy_(c * following)
    if needed[4]:
        results[4].copy_(s * following)
    if needed[5]:
        results[5].copy_(of_clip(output * (wanted - other)))
    if needed[6]:
        products = [following * x, following * mixed, following * former, following * noise]
        products += [clean * x, clean * mixed]
        results[6].copy_(torch.stack([of_clip(product) for product in products], dim=1))
    return results


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_following: Tensor, d_clean: Tensor):
    *tensors, scale, coefficients = ctx.saved_tensors
    needed = list(ctx.needs_input_grad)
    grads = _guided_step_backward(tensors, scale, coefficients, d_following, d_clean, needed)
    return tuple(grad if need else None for grad, need in zip(grads, needed, strict=True))


_guided_step.register_autograd(_backward, setup_context=_save)


_SHAPES = {  # clips, then the latents of one
    "animatediff": (8, 4, 16, 64, 64),
    "zeroscope": (8, 4, 24, 40, 72),
    "videocrafter2": (8, 4, 16, 40, 64),
    "embedded": (8, 4, 8, 16, 16),
}


def _case(shape: str, forward: bool) -> CompileCase:
    """The launch at one production shape: float32 samples, a network's output in `dtype`."""

    def launch(dtype: torch.dtype) -> None:
        size = _SHAPES[shape]
        empty = functools.partial(torch.empty, device="meta")
        sample, former, noise = empty(size), empty(size), empty(size)
        wanted, other = empty(size, dtype=dtype), empty(size, dtype=dtype)
        tensors = (sample, wanted, other, former, noise)
        scale, coefficients = empty(size[0]), empty(size[0], 6)
        pair = (empty(size), empty(size))
        if forward:
            _launch_forward(tensors, scale, coefficients, pair)
        else:
            results = tuple(torch.empty_like(tensor) for tensor in tensors)
            _launch_backward(tensors, scale, coefficients, pair, results, numbers_needed=True)

    return CompileCase("guided_step", shape, forward, launch)


COMPILED = tuple(_case(shape, forward) for shape in _SHAPES for forward in (True, False))
