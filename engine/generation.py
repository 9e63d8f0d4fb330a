"""Sampling: clips join a batch, step together each at its own step, and leave when done.

Three verbs a step: lay out the rows, predict, advance. Clips that are guided have their latents
moved before (`kinetiq.moft_guidance`). Clips of one shape share a batch whatever
their prompts, seeds, step counts, samplers and controls; a clip that ends makes room for the
next one at once (continuous batching). The shots of a board (`kinetiq.shots`) join, step and leave
as one.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar, overload

import attrs
import numpy as np
import torch
from torch import Tensor

from kinetiq.board_run import BoardLatents, BoardRun, DecodeFrames
from kinetiq.clip_run import ClipRun
from kinetiq.control_tensors import KeyValueBank
from kinetiq.denoiser import Denoiser, EagerDenoiser, Watched
from kinetiq.errors import KinetiqError, NonFiniteError, RequestError, ShapeError, WorkError
from kinetiq.inversion import blend_noise
from kinetiq.kernels import guided_step
from kinetiq.moft_guidance import GuidedClip, ResolvedMoftGuidance, guide
from kinetiq.motion_injection import ResolvedMotionInjection
from kinetiq.precision import exact_float32
from kinetiq.profiling import begin, end, span
from kinetiq.query_injection import ResolvedQueryInjection
from kinetiq.recomputation import Recomputation
from kinetiq.request import ResolvedRequest
from kinetiq.rows import (
    Batch,
    BoardState,
    ClipState,
    SourceLevel,
    build_batch,
    join_loras,
    join_motions,
    remember_last,
)
from kinetiq.sampler import step_coefficients
from kinetiq.shots import ResolvedShots
from kinetiq.taps import DEFAULT_TAP

Progress = Callable[[str, int, int], None]
EncodeText = Callable[[str], Tensor]
BuildBatch = Callable[..., Batch]
_Result = TypeVar("_Result")
_Run = TypeVar("_Run", bound="ClipRun | BoardRun")
_Keys = Mapping[int, KeyValueBank]  # by site


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""


Run = ClipRun | BoardRun
_Drawn = tuple[int, ResolvedRequest | ResolvedShots | KinetiqError]
_NO_MEMORY = (  # what is said where PyTorch raises no error of its own for it
    "DefaultCPUAllocator",
    "CUDA error: out of memory",  # of the driver, as in a launch or a capture
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


@attrs.frozen(eq=False)
class _Model:
    """What every step runs on."""

    denoiser: Denoiser
    encode_text: EncodeText
    decode: DecodeFrames
    build: BuildBatch
    device: torch.device
    dtype: torch.dtype


@attrs.define
class _Room:
    """What fits into memory at a time, as far as is known.

    Args:
        clips: that are predicted in a batch.
        guided: clips that are guided in a batch.
        recompute: whether guidance recomputes activations where a request leaves that open.
    """

    clips: int
    guided: int
    recompute: bool = False


@attrs.frozen
class _TooManyRows(Exception):  # noqa: N818  it is caught where batches are made, and never seen
    """A batch has more rows than the denoiser takes."""

    rows: int
    most: int


@overload
def denoise(
    requests: Iterable[tuple[int, ResolvedRequest | KinetiqError]],
    denoiser: Denoiser,
    encode_text: EncodeText,
    *,
    channels: int,
    device: torch.device,
    dtype: torch.dtype,
    max_clips: int,
    decode: DecodeFrames | None = ...,
    progress: Progress = ...,
) -> Iterator[tuple[int, Tensor | KinetiqError]]: ...


@overload
def denoise(
    requests: Iterable[tuple[int, ResolvedRequest | ResolvedShots | KinetiqError] | None],
    denoiser: Denoiser,
    encode_text: EncodeText,
    *,
    channels: int,
    device: torch.device,
    dtype: torch.dtype,
    max_clips: int,
    decode: DecodeFrames | None = ...,
    progress: Progress = ...,
) -> Iterator[tuple[int, Tensor | BoardLatents | KinetiqError]]: ...


def denoise(
    requests: Iterable[tuple[int, ResolvedRequest | ResolvedShots | KinetiqError] | None],
    denoiser: Denoiser,
    encode_text: EncodeText,
    *,
    channels: int,
    device: torch.device,
    dtype: torch.dtype,
    max_clips: int,
    decode: DecodeFrames | None = None,
    progress: Progress = no_progress,
) -> Iterator[tuple[int, Tensor | BoardLatents | KinetiqError]]:
    """Sample clips and yield each as it is done, as (index, latents or what went wrong).

    Args:
        requests: what to sample, drawn as room allows; an error in a request's place is passed on.
            None stands for none at this moment: the next is asked for after another step.
        denoiser: the network.
        encode_text: a prompt to [tokens, width].
        channels: of the latents.
        device: where the network is.
        dtype: what the network computes in; the samples themselves stay float32.
        max_clips: clips in a batch; lowered for clips of one shape when memory runs out, until
            nothing is left to do for the moment. A board that has more is in a batch by itself.
        decode: clean latents [channels, frames, h, w] to float32 [frames, height, width, 3] in 0
            to 1, for boards whose masks are found in frames; without it they fail.
        progress: told of steps done and steps known of.
    """
    waiting = iter(requests)
    upcoming: _Drawn | None = None
    more = True
    running: list[Run] = []
    done_steps = known_steps = 0
    build = functools.partial(
        build_batch,
        sites=len(denoiser.sites),
        join_motions=remember_last(join_motions),
        join_loras=remember_last(join_loras),
        raw_motions=not isinstance(denoiser, EagerDenoiser),
    )
    model = _Model(denoiser, encode_text, decode or _refuse_frames, build, device, dtype)
    rooms: dict[tuple[int, ...], _Room] = {}
    while running or more:
        while more and (not running or _count(running) < rooms[running[0].shape].clips):
            if upcoming is None:
                upcoming, more = _draw(waiting)
            if upcoming is None:
                break
            index, request = upcoming
            if isinstance(request, KinetiqError):
                yield index, request
            elif running and not _joins(request, running, rooms[running[0].shape]):
                break
            else:
                run = _try_start(index, request, encode_text, channels, device)
                if isinstance(run, KinetiqError):
                    yield index, run
                else:
                    rooms.setdefault(run.shape, _Room(clips=max_clips, guided=max_clips))
                    run.range = begin(f"request {index}")
                    running.append(run)
                    known_steps += run.all_steps
            upcoming = None
        if not running:
            rooms.clear()
            continue
        room = rooms[running[0].shape]
        done_steps -= sum(run.taken_steps for run in running)
        # Inference mode is for predictions alone: banks of motions, which are joined here and kept,
        # go into guidance too, where autograd must be able to save them.
        count = _count(running)
        with span(f"step of {count} clips"), torch.inference_mode(False), torch.no_grad():
            failed = _prepare(running, model)
            failed |= _guide([run for run in running if isinstance(run, ClipRun)], model, room)
            failed |= _step([run for run in running if run.index not in failed], model, room)
        done_steps += sum(run.taken_steps for run in running)
        progress("denoising", done_steps, known_steps)
        for run in [run for run in running if run.done or run.index in failed]:
            running.remove(run)
            end(run.range)
            known_steps -= run.all_steps - run.taken_steps
            yield run.index, failed.get(run.index, run.result)


def _draw(waiting: "Iterator[_Drawn | None]") -> "tuple[_Drawn | None, bool]":
    """The next request, if there is one at this moment, and whether there may be others."""
    for drawn in waiting:
        return drawn, True
    return None, False


def _refuse_frames(_: Tensor) -> np.ndarray:
    raise RequestError("masks: a callable needs frames, and nothing here decodes latents")


def _joins(request: ResolvedRequest | ResolvedShots, running: Sequence[Run], room: _Room) -> bool:
    """Whether a request has the shape of what runs, and there is room for it."""
    clips = 1 if isinstance(request, ResolvedRequest) else request.most_clips
    return running[0].shape == request.shape and _count(running) + clips <= room.clips


def _count(runs: Iterable[Run]) -> int:
    """How many clips some runs step."""
    return sum(len(run.clips) for run in runs)


def _try_start(
    index: int,
    request: ResolvedRequest | ResolvedShots,
    encode_text: EncodeText,
    channels: int,
    device: torch.device,
) -> Run | KinetiqError:
    """What `_start` returns, or what goes wrong with it, of which the others know nothing."""
    try:
        return _start(index, request, encode_text, channels, device)
    except KinetiqError as error:
        return error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise
    if device.type == "cuda":
        torch.cuda.empty_cache()
    frames, height, width = request.shape
    return WorkError(
        f"denoise: noise of {frames} frames of {height}x{width} latents must fit in memory, and "
        "does not; ask for fewer frames or a smaller size"
    )


def _start(
    index: int,
    request: ResolvedRequest | ResolvedShots,
    encode_text: EncodeText,
    channels: int,
    device: torch.device,
) -> Run:
    if isinstance(request, ResolvedRequest):
        return _start_clip(index, request, encode_text, channels, device)
    shots = [
        _start_clip(index, shot, encode_text, channels, device, number)
        for number, shot in enumerate(request.requests, start=1)
    ]
    return BoardRun.start(index, request, shots)


def _start_clip(
    index: int,
    request: ResolvedRequest,
    encode_text: EncodeText,
    channels: int,
    device: torch.device,
    shot: int | None = None,
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
        shot=shot,
    )


def _prepare(running: Sequence[Run], model: _Model) -> dict[int, KinetiqError]:
    """Let boards find masks and matches for the next step; return what failed, by index."""
    failed: dict[int, KinetiqError] = {}
    for run in running:
        if isinstance(run, BoardRun):
            error = _board_error(run, functools.partial(run.prepare, model.decode), model.device)
            if error is not None:
                failed[run.index] = error
    return failed


def _board_error(
    run: BoardRun, work: Callable[[], None], device: torch.device
) -> KinetiqError | None:
    """Do something for one board; return what went wrong, which the others do not suffer from."""
    try:
        work()
    except KinetiqError as error:
        return error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    else:
        return None
    # Behind the handler, which would hold on to what did not fit.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return _too_large(run, device)


def _step(runs: Sequence[Run], model: _Model, room: _Room) -> dict[int, KinetiqError]:
    """Advance clips by one step; return what failed, by index."""

    def predict(part: Sequence[Run]) -> tuple[tuple[Tensor, Tensor], list[Watched | None]]:
        return _predict_boards(part, model)

    def advance(
        part: Sequence[Run], done: tuple[tuple[Tensor, Tensor], list[Watched | None]]
    ) -> dict[int, KinetiqError]:
        halves, watched = done
        with span("sampler"):
            broken = _apply([clip for run in part for clip in run.clips], *halves, model.denoiser)
        for run, seen in zip(part, watched, strict=True):
            if not isinstance(run, BoardRun) or run.index in broken:
                continue
            error = _board_error(
                run, functools.partial(run.advance, seen, model.decode), model.device
            )
            if error is not None:
                broken[run.index] = error
        return broken

    failed, room.clips = _in_parts(runs, room.clips, model.device, predict, advance)
    return failed


def _predict_boards(
    part: Sequence[Run], model: _Model
) -> tuple[tuple[Tensor, Tensor], list[Watched | None]]:
    """The network's output for both halves of every clip, and what boards saw of theirs."""
    clips = [clip for run in part for clip in run.clips]
    states = [_state(clip, model.dtype) for clip in clips]
    boards: list[BoardState] = []
    for run in part:
        state = run.state(clips.index(run.clips[0])) if isinstance(run, BoardRun) else None
        boards += [] if state is None else [state]
    batch = _batch(states, model, boards)
    looking = [run for run in part if isinstance(run, BoardRun) and run.watched]
    if not looking:
        return _predict(batch, model), [None] * len(part)
    places = [clips.index(clip) for run in looking for clip in run.watched]
    rows = batch.conditional[torch.tensor(places, device=batch.conditional.device)]
    words = torch.cat([run.words for run in looking]).to(rows.device)
    if not any(run.needs_words for run in looking):
        words = words[:, :0]
    tap = DEFAULT_TAP if any(run.needs_features for run in looking) else ""
    with model.denoiser.watching(rows, words, tap) as watched:
        halves = _predict(batch, model)
    seen: dict[int, Watched] = {}
    start = 0
    for run in looking:
        seen[run.index] = watched.part(
            slice(start, start + len(run.watched)),
            words=run.needs_words,
            features=run.needs_features,
        )
        start += len(run.watched)
    return halves, [seen.get(run.index) for run in part]


def _guide(running: Sequence[ClipRun], model: _Model, room: _Room) -> dict[int, KinetiqError]:
    """Move the latents of the clips that are guided at their step; return what failed, by index."""
    guidances = {run.index: run.guidance for run in running if run.guidance is not None}
    guiding = _Guiding(model, room, guidances)
    runs = [run for run in running if run.index in guidances]
    failed = guiding.find_keys([run for run in runs if guidances[run.index].sites])
    return failed | guiding.move([run for run in runs if run.index not in failed])


@attrs.frozen(eq=False)
class _Guiding:
    """Guides clips at their next step.

    Args:
        model: what it runs on.
        room: what fits into memory.
        guidances: of the clips, by index.
        keys: where they are shared, the keys and values without guidance, by index and by site.
    """

    model: _Model
    room: _Room
    guidances: Mapping[int, ResolvedMoftGuidance]
    keys: dict[int, _Keys] = attrs.field(factory=dict)

    def find_keys(self, runs: Sequence[ClipRun]) -> dict[int, KinetiqError]:
        """Take a step of the clips without guidance, and keep its keys and values."""
        going: list[ClipRun] = []
        ending: list[ClipRun] = []
        for run in runs:
            unguided = _without_guidance(run) if run.unguided is None else run.unguided
            last = not self.guidances[run.index].acts(run.step + 1)
            (ending if last else going).append(unguided)
            run.unguided = None if last else unguided
        device = self.model.device
        failed, self.room.clips = _in_parts(
            going, self.room.clips, device, self._predict_keys, self._advance
        )
        # At the last guided step nothing is wanted but the keys and values: one half, to the tap.
        for tap in dict.fromkeys(self.guidances[run.index].tap for run in ending):
            at_tap = [run for run in ending if self.guidances[run.index].tap == tap]
            broken, self.room.clips = _in_parts(
                at_tap, self.room.clips, device, self._look_for_keys, self._keep
            )
            failed |= broken
        return failed

    def move(self, runs: Sequence[ClipRun]) -> dict[int, KinetiqError]:
        """Let the clips' latents follow their gradients."""
        failed, self.room.guided = _in_parts(
            runs, self.room.guided, self.model.device, self._moved, self._put, self._recompute
        )
        return failed

    def _predict_keys(self, part: Sequence[ClipRun]) -> tuple[tuple[Tensor, Tensor], _Keys]:
        batch = _batch(self._states(part), self.model)
        with self.model.denoiser.keeping(self._sites(part), batch.conditional) as kept:
            return _predict(batch, self.model), kept

    def _advance(
        self, part: Sequence[ClipRun], done: tuple[tuple[Tensor, Tensor], _Keys]
    ) -> dict[int, KinetiqError]:
        halves, kept = done
        self._keep(part, kept)
        return _apply(part, *halves, self.model.denoiser)

    def _look_for_keys(self, part: Sequence[ClipRun]) -> _Keys:
        states = [replace(state, negative_text=None) for state in self._states(part)]
        batch = _batch(states, self.model)
        denoiser, tap = self.model.denoiser, self.guidances[part[0].index].tap
        with (
            span("network"),
            exact_float32(),
            torch.inference_mode(),
            denoiser.keeping(self._sites(part), batch.conditional) as kept,
        ):
            denoiser.features(batch.latents, batch.timesteps, batch.text, batch.controls, tap)
        return kept

    def _keep(self, part: Sequence[ClipRun], kept: _Keys) -> dict[int, KinetiqError]:
        for place, run in enumerate(part):
            own = slice(place, place + 1)
            self.keys[run.index] = {
                site: KeyValueBank(kept[site].key[own], kept[site].value[own])
                for site in self.guidances[run.index].sites
            }
        return {}

    def _sites(self, part: Sequence[ClipRun]) -> set[int]:
        return {site for run in part for site in self.guidances[run.index].sites}

    def _states(self, part: Sequence[ClipRun]) -> list[ClipState]:
        return [_state(run, self.model.dtype) for run in part]

    def _moved(self, part: Sequence[ClipRun]) -> list[tuple[Tensor, int | None]]:
        asked = [self.guidances[run.index].recompute for run in part]
        recompute = True in asked or (self.room.recompute and "auto" in asked)
        denoiser = self.model.denoiser
        recomputation: Callable[[], AbstractContextManager[None]] = nullcontext
        if recompute and isinstance(denoiser, EagerDenoiser):
            recomputation = Recomputation(denoiser, ()).active
        clips = [
            GuidedClip(
                state=state,
                sample=run.sample,
                input_scale=run.request.sampler.row(run.step).input_scale,
                step=run.step,
                guidance=self.guidances[run.index],
                keys_values=self.keys.get(run.index),
            )
            for run, state in zip(part, self._states(part), strict=True)
        ]
        build = functools.partial(_batch, model=self.model)
        return guide(clips, denoiser, build, recomputation=recomputation)

    def _put(
        self, part: Sequence[ClipRun], moved: list[tuple[Tensor, int | None]]
    ) -> dict[int, KinetiqError]:
        broken: dict[int, KinetiqError] = {}
        for run, (sample, iteration) in zip(part, moved, strict=True):
            run.sample = sample
            if iteration is not None:
                guidance = self.guidances[run.index]
                broken[run.index] = NonFiniteError(
                    f"guide: latents must stay finite, got NaN or infinity at step {run.step + 1} "
                    f"of {run.request.sampler.steps}, gradient step {iteration} of "
                    f"{guidance.iterations}, of {run.name}; try "
                    f"a smaller step_size than {guidance.step_size:g}, a smaller weight than "
                    f"{guidance.weight:g}, or another dtype (float32 or bfloat16)"
                )
        return broken

    def _recompute(self, run: ClipRun) -> bool:
        """Recompute from now on, for a clip that does not fit alone; whether that is new."""
        if (
            self.room.recompute
            or self.guidances[run.index].recompute != "auto"
            or not isinstance(self.model.denoiser, EagerDenoiser)
        ):
            return False
        self.room.recompute = True
        return True


def _without_guidance(run: ClipRun) -> ClipRun:
    """The same clip from here on without guidance, with the same noise to come."""
    controls = attrs.evolve(run.request.controls, guidance=None)
    return attrs.evolve(run.copy(), request=attrs.evolve(run.request, controls=controls))


def _in_parts(
    runs: Sequence[_Run],
    size: int,
    device: torch.device,
    work: Callable[[Sequence[_Run]], _Result],
    finish: Callable[[Sequence[_Run], _Result], dict[int, KinetiqError]],
    make_room: Callable[[_Run], bool] = lambda _: False,
) -> tuple[dict[int, KinetiqError], int]:
    """Do something for all clips, in smaller parts where memory or rows of the network run out.

    What the network refuses is parted too, until it is known which clips it refuses: those fail.

    Args:
        runs: clips and boards; a board is never in two parts.
        size: clips in a part, unless one board has more.
        device: where the work is done.
        work: changes no clip, so that it can be done again.
        finish: puts its result into the clips, and says what failed, by index.
        make_room: asked where a clip does not fit alone; whether to try again.

    Returns:
        What failed, by index, and how many clips a part may have from now on.
    """
    failed: dict[int, KinetiqError] = {}
    left = list(runs)
    most = len(left)  # in a part; what is refused says nothing of the steps to come, as `size` does
    while left:
        part = _fitting(left, size)[:most]
        too_many: _TooManyRows | None = None
        refusal: KinetiqError | None = None
        try:
            result = work(part)
        except _TooManyRows as error:
            too_many = error
        except KinetiqError as error:
            refusal = error
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            failed |= finish(part, result)
            left = left[len(part) :]
            continue
        # Behind the handler, which would hold on to what did not fit.
        if refusal is not None and len(part) > 1:
            most = (len(part) + 1) // 2
        elif refusal is not None:
            failed[part[0].index] = refusal
            left = left[1:]
        elif len(part) > 1:
            count = _count(part)
            size = (count + 1) // 2 if too_many is None else _share(count, too_many)
        elif too_many is not None:
            failed[part[0].index] = _too_wide(part[0], too_many)
            left = left[1:]
        elif not make_room(part[0]):
            failed[part[0].index] = _too_large(part[0], device)
            left = left[1:]
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return failed, size


def _fitting(runs: Sequence[_Run], size: int) -> list[_Run]:
    """The first of some runs, as many as have `size` clips at most, at least one."""
    part = list(runs[:1])
    for run in runs[1:]:
        if _count([*part, run]) > size:
            break
        part.append(run)
    return part


def _share(clips: int, too_many: _TooManyRows) -> int:
    """How many of some clips have as many rows as there may be, were all alike."""
    return max(1, min(clips - 1, clips * too_many.most // too_many.rows))


def _too_wide(run: Run, too_many: _TooManyRows) -> ShapeError:
    what = run.name if isinstance(run, ClipRun) else f"the {len(run.shots)} shots of one board"
    return ShapeError(
        f"denoise: {what} must be at most {too_many.most} rows of the network, got "
        f"{too_many.rows}: guidance and each source of a control are rows too; build an engine "
        "with a wider profile"
    )


def _too_large(run: Run, device: torch.device) -> WorkError:
    frames, height, width = run.shape
    size = f"{frames} frames of {height}x{width} latents"
    if isinstance(run, ClipRun):
        return WorkError(
            f"denoise: one clip of {size} must fit in the memory of {device}, and does not; ask "
            "for fewer frames or a smaller size"
        )
    return WorkError(
        f"denoise: the {len(run.shots)} shots of one board, {len(run.clips)} clips of {size} with "
        f"those left alone, must fit in the memory of {device} together, and do not; ask for "
        "fewer shots, fewer frames or a smaller size"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or a library under it could not allocate, on a GPU or on a CPU."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(word in said for word in _NO_MEMORY)


def _batch(states: Sequence[ClipState], model: _Model, boards: Sequence[BoardState] = ()) -> Batch:
    """The rows of some clips and of the sources that they read."""
    prompts = {
        control.source.prompt
        for state in states
        for control in (state.controls.query, state.controls.motion)
        if control is not None
    }
    source_text = {prompt: model.encode_text(prompt).to(model.dtype) for prompt in prompts}
    with span("rows"):
        return model.build(states, source_text, boards=boards)


def _predict(batch: Batch, model: _Model) -> tuple[Tensor, Tensor]:
    """The network's output for the conditional and the unconditional half of every clip.

    Raises:
        _TooManyRows: the denoiser takes fewer rows.
    """
    most, rows = model.denoiser.most_rows, len(batch.latents)
    if most is not None and rows > most:
        raise _TooManyRows(rows, most)
    with span("network"), exact_float32(), torch.inference_mode():
        output = model.denoiser.predict(batch.latents, batch.timesteps, batch.text, batch.controls)
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
            error = NonFiniteError(
                f"denoise: latents must stay finite, got NaN or infinity at step {run.step + 1} of "
                f"{run.request.sampler.steps} of {run.name}; "
                "try another dtype (float32 or bfloat16) or a lower guidance_scale"
            )
            broken.setdefault(run.index, error)  # of a board, the first shot
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
