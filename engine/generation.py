"""Sampling: clips join a batch, step together each at its own step, and leave when done.

Three verbs a step: lay out the rows, predict, advance. Clips of one shape share a batch whatever
their prompts, seeds, step counts, samplers and controls; a clip that ends makes room for the
next one at once (continuous batching).
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from kinetiq.denoiser import Denoiser
from kinetiq.errors import KinetiqError, NonFiniteError, WorkError
from kinetiq.inversion import blend_noise
from kinetiq.kernels import guided_step
from kinetiq.motion_injection import ResolvedMotionInjection
from kinetiq.profiling import begin, end, span
from kinetiq.query_injection import ResolvedQueryInjection
from kinetiq.request import ResolvedRequest
from kinetiq.rows import (
    Batch,
    ClipState,
    SourceLevel,
    build_batch,
    join_loras,
    join_motions,
)
from kinetiq.sampler import step_coefficients

Progress = Callable[[str, int, int], None]
EncodeText = Callable[[str], Tensor]
BuildBatch = Callable[[Sequence[ClipState], dict[str, Tensor]], Batch]


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""


@attrs.define(eq=False)
class ClipRun:
    """One clip under way.

    Args:
        index: its place among the requests.
        request: what it will be.
        generator: draws the initial noise and the sampler's, in the stock pipelines' order.
        text: [tokens, width] of the prompt.
        negative_text: like `text`, or None where not guided.
        sample: [channels, frames, h, w], float32.
        former: like `sample`, the clean estimate of the step before.
        step: the next step, counted from 0.
        range: its range in the profiler.
    """

    index: int
    request: ResolvedRequest
    generator: torch.Generator
    text: Tensor
    negative_text: Tensor | None
    sample: Tensor
    former: Tensor
    step: int = 0
    range: Any = None

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.step == self.request.sampler.steps


def denoise(
    requests: Iterable[tuple[int, ResolvedRequest | KinetiqError]],
    denoiser: Denoiser,
    encode_text: EncodeText,
    *,
    channels: int,
    device: torch.device,
    dtype: torch.dtype,
    max_clips: int,
    progress: Progress = no_progress,
) -> Iterator[tuple[int, Tensor | KinetiqError]]:
    """Sample clips and yield each as it is done, as (index, latents or what went wrong).

    Args:
        requests: what to sample, drawn as room allows; an error in a request's place is passed on.
        denoiser: the network.
        encode_text: a prompt to [tokens, width].
        channels: of the latents.
        device: where the network is.
        dtype: what the network computes in; the samples themselves stay float32.
        max_clips: clips in a batch; lowered for the rest of the run when memory runs out.
        progress: told of steps done and steps known of.
    """
    waiting = iter(requests)
    upcoming = next(waiting, None)
    running: list[ClipRun] = []
    done_steps = known_steps = 0
    build = functools.partial(
        build_batch,
        sites=len(denoiser.sites),
        join_motions=functools.lru_cache(maxsize=1)(join_motions),
        join_loras=functools.lru_cache(maxsize=1)(join_loras),
    )
    while running or upcoming is not None:
        while upcoming is not None and len(running) < max_clips:
            index, request = upcoming
            if isinstance(request, KinetiqError):
                yield index, request
            elif running and running[0].request.shape != request.shape:
                break
            else:
                running.append(_start(index, request, denoiser, encode_text, channels, device))
                known_steps += request.sampler.steps
            upcoming = next(waiting, None)
        if not running:
            continue
        done_steps -= sum(run.step for run in running)
        with span(f"step of {len(running)} clips"), torch.inference_mode():
            failed, max_clips = _step_or_split(
                running, denoiser, encode_text, build, device, dtype, max_clips
            )
        done_steps += sum(run.step for run in running)
        progress("denoising", done_steps, known_steps)
        for run in [run for run in running if run.done or run.index in failed]:
            running.remove(run)
            end(run.range)
            known_steps -= run.request.sampler.steps - run.step
            yield run.index, failed.get(run.index, run.sample)


def _start(
    index: int,
    request: ResolvedRequest,
    denoiser: Denoiser,
    encode_text: EncodeText,
    channels: int,
    device: torch.device,
) -> ClipRun:
    generator = torch.Generator().manual_seed(request.seed)
    shape = (channels, *request.shape)
    sample = torch.randn(shape, generator=generator)
    if request.controls.noise is not None:
        sample = blend_noise(sample, request.controls.noise.noise, request.controls.noise.share)
    sample = sample * request.sampler.initial_scale
    return ClipRun(
        index=index,
        request=request,
        generator=generator,
        text=encode_text(request.prompt),
        negative_text=encode_text(request.negative_prompt) if request.guided else None,
        sample=sample.to(device),
        former=torch.zeros(shape, device=device),
        range=begin(f"request {index}"),
    )


def _step_or_split(
    running: list[ClipRun],
    denoiser: Denoiser,
    encode_text: EncodeText,
    build: BuildBatch,
    device: torch.device,
    dtype: torch.dtype,
    max_clips: int,
) -> tuple[dict[int, KinetiqError], int]:
    """Advance all clips by one step, in smaller batches where memory runs out.

    Returns:
        What failed, by index, and how many clips a batch may have from now on.
    """
    failed: dict[int, KinetiqError] = {}
    size = min(len(running), max_clips)
    left = list(running)
    while left:
        part = left[:size]
        try:
            halves = _predict(part, denoiser, encode_text, build, dtype)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(part) == 1:
                request = part[0].request
                frames, height, width = request.shape
                failed[part[0].index] = WorkError(
                    f"denoise: one clip of {frames} frames of {height}x{width} latents must fit in "
                    f"the memory of {device}, and does not; ask for fewer frames or a smaller size"
                )
            else:
                size = max_clips = (len(part) + 1) // 2
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
        else:
            with span("sampler"):
                failed |= _apply(part, *halves, denoiser)
        left = left[len(part) :]
    return failed, max_clips


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch could not allocate, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _predict(
    runs: Sequence[ClipRun],
    denoiser: Denoiser,
    encode_text: EncodeText,
    build: BuildBatch,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The network's output for the conditional and the unconditional half of every clip."""
    states = [_state(run, dtype) for run in runs]
    prompts = {
        control.source.prompt
        for state in states
        for control in (state.controls.query, state.controls.motion)
        if control is not None
    }
    source_text = {prompt: encode_text(prompt).to(dtype) for prompt in prompts}
    with span("rows"):
        batch = build(states, source_text)
    with span("network"):
        output = denoiser.predict(batch.latents, batch.timesteps, batch.text, batch.controls)
    return output[batch.conditional], output[batch.unconditional]


def _state(run: ClipRun, dtype: torch.dtype) -> ClipState:
    row = run.request.sampler.row(run.step)
    controls = run.request.controls.active(run.step)
    return ClipState(
        latents=(row.input_scale * run.sample).to(dtype),
        timestep=row.timestep,
        text=run.text.to(dtype),
        negative_text=None if run.negative_text is None else run.negative_text.to(dtype),
        controls=controls,
        query_level=_source_level(run, controls.query),
        motion_level=_source_level(run, controls.motion),
    )


def _source_level(
    run: ClipRun, control: ResolvedQueryInjection | ResolvedMotionInjection | None
) -> SourceLevel | None:
    """How noisy the source row of an injection is: as its reader, or as it will be later."""
    if control is None:
        return None
    row = run.request.sampler.row(max(run.step, control.source_step))
    return SourceLevel(row.timestep, row.source_signal, row.source_noise)


def _apply(
    runs: Sequence[ClipRun], conditional: Tensor, unconditional: Tensor, denoiser: Denoiser
) -> dict[int, KinetiqError]:
    """Take one step of every clip in place; return those that broke."""
    steps = step_coefficients([run.request.sampler for run in runs], [run.step for run in runs])
    coefficients = torch.stack(
        [
            steps.sample,
            steps.output,
            steps.former,
            steps.noise,
            steps.clean_from_sample,
            steps.clean_from_output,
        ],
        dim=1,
    )
    sample = torch.stack([run.sample for run in runs])
    frames_first = denoiser.family.noise_frames_first
    advanced, clean = guided_step(
        sample,
        conditional.float(),
        unconditional.float(),
        torch.stack([run.former for run in runs]),
        torch.stack([_step_noise(run, frames_first) for run in runs]).to(sample.device),
        torch.tensor([run.request.guidance_scale for run in runs]).to(sample.device),
        coefficients.to(sample.device),
    )
    finite = advanced.isfinite().flatten(1).all(1).tolist()
    broken: dict[int, KinetiqError] = {}
    for place, run in enumerate(runs):
        if not finite[place]:
            broken[run.index] = NonFiniteError(
                f"denoise: latents must stay finite, got NaN or infinity at step {run.step + 1} of "
                f"{run.request.sampler.steps} of request {run.index} ({run.request.prompt!r}); "
                "try another dtype (float32 or bfloat16) or a lower guidance_scale"
            )
        run.sample, run.former = advanced[place], clean[place]
        run.step += 1
    return broken


def _step_noise(run: ClipRun, frames_first: bool) -> Tensor:
    """The sampler's noise, drawn in the axis order of the stock pipeline."""
    if not run.request.sampler.row(run.step).draws_noise:
        return torch.zeros(run.sample.shape)
    if not frames_first:
        return torch.randn(run.sample.shape, generator=run.generator)
    channels, frames, height, width = run.sample.shape
    noise = torch.randn((frames, channels, height, width), generator=run.generator)
    return noise.transpose(0, 1)


def in_order(results: Iterable[tuple[int, Any]]) -> Iterator[Any]:
    """Yield results by index, from 0, each as soon as all before it are there."""
    held: dict[int, Any] = {}
    wanted = itertools.count()
    turn = next(wanted)
    for index, result in results:
        held[index] = result
        while turn in held:
            yield held.pop(turn)
            turn = next(wanted)
