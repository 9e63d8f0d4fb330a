r"""Classifier-free guidance and the sampler's update, with coefficients per row.

    m     = uncond + g (cond - uncond)
    next  = a x + b m + c former + s noise
    clean = p x + q m

`clean` is the sampler's estimate of the clean latents and `former` that of the step before, so
the update is a linear multistep method with one step of memory. Each clip has its own
coefficients: clips at different steps, or of different samplers, share one call.

Source: Ho & Salimans, "Classifier-Free Diffusion Guidance", arXiv:2207.12598, eq. 6; the samplers
are in `kinetiq.sampler`.
"""

from torch import Tensor

from kinetiq.errors import ShapeError


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
        sample: [clips, ...], float32.
        conditional: like `sample`, the network's output for the prompt.
        unconditional: like `sample`, its output for the negative prompt; pass `conditional` for a
            clip without guidance.
        former: like `sample`, the clean estimate of the step before; zeros at the first step.
        noise: like `sample`, unit noise; zeros where the step adds none.
        guidance_scale: [clips]; 1 is no guidance.
        coefficients: [clips, 6]: a, b, c, s, p, q of the formula above.

    Raises:
        ShapeError: a shape does not match.
    """
    if sample.ndim == 0:
        raise ShapeError("guided_step: sample must be [clips, ...], got []")
    tensors = {
        "conditional": conditional,
        "unconditional": unconditional,
        "former": former,
        "noise": noise,
    }
    for name, tensor in tensors.items():
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
    return guided_step_reference(
        sample, conditional, unconditional, former, noise, guidance_scale, coefficients
    )


def guided_step_reference(
    sample: Tensor,
    conditional: Tensor,
    unconditional: Tensor,
    former: Tensor,
    noise: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor]:
    """The definition, in PyTorch; computes in the type of `sample`."""
    spread = [1] * (sample.ndim - 1)
    scale = guidance_scale.to(sample.dtype).reshape(-1, *spread)
    a, b, c, s, p, q = coefficients.to(sample.dtype).reshape(-1, 6, *spread).unbind(1)
    output = unconditional + scale * (conditional - unconditional)
    return a * sample + b * output + c * former + s * noise, p * sample + q * output
