"""DDIM inversion: the noise from which the sampler makes a given clip, and how noises are joined.

A step of the deterministic sampler is linear in the sample and the network's output at timestep t,

    x' = A x + B m(x, t)

and is taken back with the output at what is known, x', in the place of that at x:

    x = (x' - B m(x', t)) / A

The two outputs differ by a step's change of the sample, so the error falls with the number of
steps; for a network whose output does not depend on the sample there is none. A refinement takes
the output again, at the x just found, which comes closer to what the sampler will do.

Source: Song et al., arXiv:2010.02502, sec. 4.3; the refinement is ReNoise's, arXiv:2403.14602,
sec. 3.2, without its averaging; the blend is MotionDirector's, arXiv:2310.08465.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import attrs
import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor, nn

from kinetiq.denoiser import NO_CONTROLS, Denoiser, EagerDenoiser
from kinetiq.errors import KinetiqWarning, NonFiniteError, RequestError, ShapeError
from kinetiq.precision import exact_float32
from kinetiq.sampler import SamplerRow, SamplerTable, build_sampler_table
from kinetiq.text import TextParts, encode_prompts

INVERSION_STEPS = 50
_HALF = (torch.float16, torch.bfloat16)


class InversionParts(TextParts, Protocol):
    """What of a checkpoint inverting needs."""

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """What scheduler_config.json says."""

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""


@attrs.frozen(eq=False)
class ResolvedNoise:
    """Inverted noise as data for one clip.

    Args:
        noise: [channels, frames, h, w] at the clip's size, of unit variance.
        share: of it in the initial noise, above 0 and at most 1; see `blend_noise`.
    """

    noise: Tensor
    share: float


def invert(
    parts: InversionParts,
    denoiser: Denoiser,
    latents: Tensor,
    *,
    steps: int = INVERSION_STEPS,
    prompt: str = "",
    refinements: int = 0,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Tensor:
    """The noise from which DDIM, without guidance, makes these latents.

    The network runs without controls; the samples are float32 whatever it computes in. Where it is
    one that PyTorch runs in half precision and they do not stay finite, it is inverted once more
    with weights widened to float32, which is said by a `KinetiqWarning`; then it has its own
    weights again, the very tensors.

    Args:
        parts: a checkpoint.
        denoiser: runs its network.
        latents: clean and scaled, [channels, frames, h, w].
        steps: of the inversion.
        prompt: what the network is told.
        refinements: how often the output is taken again in each step; each costs another run of
            the network.
        progress: told of ("inverting", done, total).

    Returns:
        Like `latents`, float32, on their device.

    Raises:
        RequestError: there are too many or too few steps, or less than no refinements.
        ShapeError: `latents` have another rank.
        NonFiniteError: the samples do not stay finite, in float32 neither where that can be tried;
            it says the step.
    """
    if refinements < 0:
        raise RequestError(f"invert: refinements must be at least 0, got {refinements}")
    if latents.ndim != 4:
        raise ShapeError(
            f"invert: latents must be [channels, frames, h, w], got {list(latents.shape)}"
        )
    table = build_sampler_table("ddim", parts.scheduler_config, steps)
    run = partial(_invert, parts, denoiser, latents, table, prompt, refinements, progress)
    try:
        return run(parts.dtype)
    except NonFiniteError as error:
        if parts.dtype not in _HALF or not isinstance(denoiser, EagerDenoiser):
            raise
        warnings.warn(KinetiqWarning(f"{error}; it is inverted once more in float32"), stacklevel=2)
    with _widened(denoiser.network):
        return run(torch.float32)


@exact_float32()
def _invert(
    parts: InversionParts,
    denoiser: Denoiser,
    latents: Tensor,
    table: SamplerTable,
    prompt: str,
    refinements: int,
    progress: Callable[[str, int, int], None],
    dtype: torch.dtype,
) -> Tensor:
    """`invert` by a network that computes in `dtype`."""
    # Not inference mode: training differentiates through what is made from this noise.
    with torch.no_grad():
        text = encode_prompts(parts, [prompt]).to(latents.device, dtype)
        sample = latents.float()
        for done, index in enumerate(reversed(range(table.steps)), start=1):
            row = table.row(index)
            timestep = torch.tensor([row.timestep], device=latents.device)
            after = sample
            for _ in range(1 + refinements):
                given = sample[None].to(dtype)
                output = denoiser.predict(given, timestep, text, NO_CONTROLS)[0].float()
                sample = step_back(row, after, output)
            if not bool(sample.isfinite().all()):
                raise NonFiniteError(
                    f"invert: samples must stay finite, got NaN or infinity at step {done} of "
                    f"{table.steps} in {str(dtype).removeprefix('torch.')}"
                    + ("; try another dtype (float32 or bfloat16)" if dtype in _HALF else "")
                )
            progress("inverting", done, table.steps)
    return sample


@contextmanager
def _widened(network: nn.Module) -> Iterator[None]:
    """Let a network compute in float32 inside the block; behind it, it has its own tensors."""
    own = [(tensor, tensor.data) for tensor in (*network.parameters(), *network.buffers())]
    try:
        for tensor, data in own:
            if data.dtype in _HALF:
                tensor.data = data.float()
        yield
    finally:
        for tensor, data in own:
            tensor.data = data


def step_back(row: SamplerRow, sample: Tensor, output: Tensor) -> Tensor:
    """The sample before a step of DDIM, given that after it and the network's output."""
    kept = row.next_from_sample + row.next_from_clean * row.clean_from_sample
    if kept > 0.0:
        return (sample - row.next_from_clean * row.clean_from_output * output) / kept
    # A last step that keeps only the clean estimate, of a network that predicts it: the noise in
    # the sample is what the network takes for noise.
    noise = (sample - row.source_signal * output) / row.source_noise
    return row.source_signal * sample + row.source_noise * noise


def blend_noise(noise: Tensor, inverted: Tensor, share: float) -> Tensor:
    """sqrt(share) inverted + sqrt(1 - share) noise, of unit variance if both are.

    Raises:
        ShapeError: the two have not the same shape; see `resize_noise`.
        RequestError: `share` is not from 0 to 1.
    """
    if noise.shape != inverted.shape:
        raise ShapeError(
            f"blend_noise: both must have the same shape, got {list(noise.shape)} and "
            f"{list(inverted.shape)}; bring one to the other's with resize_noise"
        )
    if not 0.0 <= share <= 1.0:
        raise RequestError(f"blend_noise: share must be from 0 to 1, got {share!r}")
    return math.sqrt(share) * inverted.to(noise) + math.sqrt(1.0 - share) * noise


def resize_noise(noise: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverted noise [channels, frames, h, w] at (frames, h, w), at unit variance.

    Interpolation, here trilinear, averages, which lowers the variance of noise.

    Raises:
        RequestError: it is the same everywhere, so that it cannot be brought to unit variance.
    """
    if tuple(noise.shape[1:]) != tuple(shape):
        noise = F.interpolate(
            noise[None], size=tuple(shape), mode="trilinear", align_corners=False
        )[0]
    deviation = noise.std(correction=0)
    if not bool(deviation > 0):
        raise RequestError("noise: must vary to be brought to unit variance, got a constant")
    return noise / deviation


def resolve_noise(noise: Tensor | None, share: float, shape: Sequence[int]) -> ResolvedNoise | None:
    """A motion's noise for a clip of (frames, h, w); None where it has none, or wants none."""
    if noise is None or share == 0.0:
        return None
    return ResolvedNoise(resize_noise(noise, shape), share)
