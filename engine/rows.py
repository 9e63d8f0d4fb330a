"""One step's batch: which rows the denoiser sees, and the control tensors that join them.

Every clip has a conditional row, and an unconditional one if it is guided. Clips whose controls
act at this step read source rows; equal sources at equal timesteps are one row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from kinetiq.control_tensors import (
    ControlTensors,
    DeviationControl,
    FlowControl,
    LoraBank,
    LoraControl,
    MotionBank,
    MotionControl,
    PatchMatches,
    PreserveControl,
    QueryControl,
    RefineControl,
    SharedKeyControl,
    SkipControl,
    no_injection,
)
from kinetiq.controls import ResolvedControls
from kinetiq.motion_embedding import ResolvedMotionEmbedding
from kinetiq.motion_injection import ResolvedMotionInjection
from kinetiq.motion_lora import ResolvedMotionLora
from kinetiq.query_flow import KeyFrames
from kinetiq.query_injection import ResolvedQueryInjection
from kinetiq.refinement import other_shots
from kinetiq.source import ResolvedSource


class SourceLevel(NamedTuple):
    """How noisy a source row is: signal · clean latents + noise · unit noise, at a timestep."""

    timestep: float
    signal: float
    noise: float


@dataclass(frozen=True)
class ClipState:
    """A clip as the batch sees it at one step.

    Args:
        latents: network input of its own rows, [channels, frames, h, w].
        timestep: what the network is told.
        text: [tokens, width] of the prompt.
        negative_text: like `text`, or None where the clip is not guided.
        controls: the controls that act at this step.
        query_level: of the source row of query injection; None where it does not act.
        motion_level: of that of motion injection, likewise.
    """

    latents: Tensor
    timestep: float
    text: Tensor
    negative_text: Tensor | None
    controls: ResolvedControls
    query_level: SourceLevel | None = None
    motion_level: SourceLevel | None = None


@dataclass(frozen=True)
class BoardState:
    """How the shots of one board see each other at one step; clips by their place in the batch.

    Args:
        shots: the clips that are to agree.
        vanilla: the same shots left alone, or () where they do not run.
        masks: [shots, frames, h, w], how much each place counts for the others; None: nothing.
        preserves: whether queries at spatial sites are those of `vanilla`.
        key_frames: between which queries are moved; None: they are not.
        flow: by tokens of a site, what is where in the key frames, as in `FlowControl`; None: the
            queries of `vanilla` tell.
        refine: by tokens of a site, the matching patches of the other shots; None: no refinement.
        queries_conditional_only: whether the unconditional rows keep their own queries.
        refine_conditional_only: whether the unconditional rows are not refined.
    """

    shots: tuple[int, ...]
    vanilla: tuple[int, ...] = ()
    masks: Tensor | None = None
    preserves: bool = False
    key_frames: KeyFrames | None = None
    flow: Mapping[int, Tensor] | None = None
    refine: Mapping[int, PatchMatches] | None = None
    queries_conditional_only: bool = False
    refine_conditional_only: bool = False


@dataclass(frozen=True)
class Batch:
    """What the denoiser is given at one step, and which rows belong to which clip.

    Args:
        latents: [rows, channels, frames, h, w].
        timesteps: [rows].
        text: [rows, tokens, width].
        controls: one entry a row.
        conditional: [clips], row of each clip's conditional half.
        unconditional: [clips], row of the other half; the conditional row where not guided.
    """

    latents: Tensor
    timesteps: Tensor
    text: Tensor
    controls: ControlTensors
    conditional: Tensor
    unconditional: Tensor


def join_motions(
    embeddings: tuple[ResolvedMotionEmbedding, ...], raw: bool = False
) -> dict[int, MotionBank]:
    """The banks of several embeddings, the first at slot 1; slot 0 is zero.

    Args:
        embeddings: in the order of their slots.
        raw: whether the embeddings themselves are wanted beside their projections.
    """
    joined = _join_banks([embedding.banks for embedding in embeddings], _PROJECTED)
    if not raw:
        return joined
    themselves = _join_banks([embedding.raw() for embedding in embeddings], _RAW)
    return {
        site: replace(bank, **{part: getattr(themselves[site], part) for part in _RAW})
        for site, bank in joined.items()
    }


def _join_banks(
    given: Sequence[Mapping[int, MotionBank]], parts: Sequence[str]
) -> dict[int, MotionBank]:
    """Some parts of several motions' banks, stacked."""
    joined = {}
    for site in sorted({site for banks in given for site in banks}):
        banks = [banks.get(site) for banks in given]
        joined[site] = MotionBank(
            **{part: _stack_any([_part(bank, part) for bank in banks]) for part in parts}
        )
    return joined


def join_loras(loras: tuple[ResolvedMotionLora, ...]) -> dict[str, LoraBank]:
    """The banks of several LoRAs, the first at slot 1; slot 0 is zero.

    Smaller ranks are filled up with zeros, which add nothing.
    """
    joined = {}
    for path in sorted({path for lora in loras for path in lora.banks}):
        banks = [lora.banks.get(path) for lora in loras]
        rank = max(bank.down.shape[1] for bank in banks if bank is not None)
        joined[path] = LoraBank(
            down=_stack([None if b is None else _fill(b.down, 1, rank) for b in banks]),
            up=_stack([None if b is None else _fill(b.up, 2, rank) for b in banks]),
        )
    return joined


_RAW = ("query_key", "value")
_PROJECTED = ("projected_query", "projected_key", "projected_value")
_Banks = TypeVar("_Banks")
JoinMotions = Callable[[tuple[ResolvedMotionEmbedding, ...], bool], Mapping[int, MotionBank]]
JoinLoras = Callable[[tuple[ResolvedMotionLora, ...]], Mapping[str, LoraBank]]


def remember_last(join: Callable[..., _Banks]) -> Callable[..., _Banks]:
    """`join_motions` or `join_loras` that keeps the last banks for motions of the same keys.

    The same motions come as other objects where other clips of a batch have them.
    """
    last: tuple[Any, Any] = None, None

    def remembering(motions: tuple[Any, ...], *rest: object) -> _Banks:
        nonlocal last
        wanted = (*(motion.key for motion in motions), *rest)
        if last[0] != wanted:
            last = None, None  # two sets of banks are never held
            last = wanted, join(motions, *rest)
        banks: _Banks = last[1]
        return banks

    return remembering


def build_batch(
    clips: Sequence[ClipState],
    source_text: dict[str, Tensor],
    sites: int,
    join_motions: JoinMotions = join_motions,
    join_loras: JoinLoras = join_loras,
    boards: Sequence[BoardState] = (),
    raw_motions: bool = False,
) -> Batch:
    """Lay the clips and their sources out as rows.

    Args:
        clips: clips of one shape.
        source_text: encoded prompt of each source prompt that is used.
        sites: how many sites the network has.
        join_motions: makes the banks of the embeddings in use; one that remembers the last ones
            saves making them again at each step.
        join_loras: likewise for the LoRAs.
        boards: which of the clips are shots of boards.
        raw_motions: whether embeddings are wanted beside their projections even where no LoRA of
            the batch changes what they go through.
    """
    latents: list[Tensor] = []
    timesteps: list[float] = []
    text: list[Tensor] = []
    halves: list[tuple[int, int]] = []
    for clip in clips:
        first = len(latents)
        prompts = [clip.text] if clip.negative_text is None else [clip.text, clip.negative_text]
        latents += [clip.latents] * len(prompts)
        timesteps += [clip.timestep] * len(prompts)
        text += prompts
        halves.append((first, first + len(prompts) - 1))
    source_rows: dict[tuple[str, SourceLevel], int] = {}
    reads: list[tuple[int | None, int | None]] = []
    for clip in clips:
        found: list[int | None] = []
        for control, level in (
            (clip.controls.query, clip.query_level),
            (clip.controls.motion, clip.motion_level),
        ):
            if control is None or level is None:
                found.append(None)
                continue
            key = (control.source.key, level)
            if key not in source_rows:
                source_rows[key] = len(latents)
                latents.append(_noised(control.source, level, clip.latents))
                timesteps.append(level.timestep)
                text.append(source_text[control.source.prompt])
            found.append(source_rows[key])
        reads.append((found[0], found[1]))
    device = latents[0].device
    joined = _join(clips, halves, reads, len(latents), sites, device)
    raw = raw_motions or any(clip.controls.lora is not None for clip in clips)
    return Batch(
        latents=torch.stack(latents),
        timesteps=torch.tensor(timesteps, dtype=torch.float32, device=device),
        text=torch.stack(text),
        controls=replace(
            joined,
            motion=_motion_control(clips, halves, len(latents), device, join_motions, raw),
            lora=_lora_control(clips, halves, len(latents), device, join_loras),
            skip=_skip_control(clips, halves, len(latents), device),
            shared_key=_shared_key_control(boards, halves, latents, device),
            preserve=_preserve_control(boards, halves, device),
            flow=_flow_controls(boards, halves, device),
            refine=_refine_controls(boards, halves, device),
        ),
        conditional=torch.tensor([half[0] for half in halves], device=device),
        unconditional=torch.tensor([half[1] for half in halves], device=device),
    )


def _noised(source: ResolvedSource, level: SourceLevel, like: Tensor) -> Tensor:
    noise = source.noise(level.timestep).to(source.latents)
    return (level.signal * source.latents + level.noise * noise).to(like)


def _join(
    clips: Sequence[ClipState],
    halves: Sequence[tuple[int, int]],
    reads: Sequence[tuple[int | None, int | None]],
    rows: int,
    sites: int,
    device: torch.device,
) -> ControlTensors:
    queries, motions = [], []
    for clip, half, (query_source, motion_source) in zip(clips, halves, reads, strict=True):
        if clip.controls.query is not None and query_source is not None:
            readers = _readers(half, clip.controls.query.conditional_only)
            queries.append((clip.controls.query, readers, query_source))
        if clip.controls.motion is not None and motion_source is not None:
            readers = _readers(half, clip.controls.motion.conditional_only)
            motions.append((clip.controls.motion, readers, motion_source))
    shape = clips[0].latents.shape[1:]
    return ControlTensors(
        query=_query_control(queries, rows, sites, shape, device) if queries else None,
        deviation=_deviation_control(motions, rows, sites, shape, device) if motions else None,
    )


def _readers(half: tuple[int, int], conditional_only: bool) -> list[int]:
    return [half[0]] if conditional_only else sorted(set(half))


def _query_control(
    queries: list[tuple[ResolvedQueryInjection, list[int], int]],
    rows: int,
    sites: int,
    shape: torch.Size,
    device: torch.device,
) -> QueryControl:
    row = no_injection(sites, rows)
    regional = any(isinstance(control.blend, Tensor) for control, _, _ in queries)
    blend = torch.ones(rows, *shape) if regional else torch.ones(rows)
    reduced = torch.zeros(rows, dtype=torch.bool)
    for control, readers, source in queries:
        chosen = torch.tensor(control.sites)
        for reader in readers:
            row[chosen, reader] = source
            blend[reader] = control.blend
            reduced[reader] = control.reduced
    return QueryControl(
        row.to(device),
        blend.to(device),
        reduced.to(device) if bool(reduced.any()) else None,
    )


def _deviation_control(
    motions: list[tuple[ResolvedMotionInjection, list[int], int]],
    rows: int,
    sites: int,
    shape: torch.Size,
    device: torch.device,
) -> DeviationControl:
    row = no_injection(sites, rows)
    blend = torch.zeros(sites, rows)
    parts = torch.ones(rows, 3)
    regional = any(control.region is not None for control, _, _ in motions)
    region = torch.ones(rows, *shape) if regional else None
    for control, readers, source in motions:
        chosen = torch.tensor(control.sites)
        for reader in readers:
            row[chosen, reader] = source
            blend[chosen, reader] = control.blend
            parts[reader] = torch.tensor(control.parts)
            if region is not None and control.region is not None:
                region[reader] = control.region
    return DeviationControl(
        row.to(device),
        blend.to(device),
        parts.to(device),
        None if region is None else region.to(device),
    )


def _motion_control(
    clips: Sequence[ClipState],
    halves: Sequence[tuple[int, int]],
    rows: int,
    device: torch.device,
    join: JoinMotions,
    raw: bool,
) -> MotionControl | None:
    used = [(clip.controls.embedding, half) for clip, half in zip(clips, halves, strict=True)]
    slot, scale, motions = _slots([(motion, half) for motion, half in used if motion], rows)
    if not motions:
        return None
    return MotionControl(slot.to(device), scale.to(device), join(motions, raw))


def _lora_control(
    clips: Sequence[ClipState],
    halves: Sequence[tuple[int, int]],
    rows: int,
    device: torch.device,
    join: JoinLoras,
) -> LoraControl | None:
    used = [(clip.controls.lora, half) for clip, half in zip(clips, halves, strict=True)]
    slot, scale, loras = _slots([(lora, half) for lora, half in used if lora], rows)
    if not loras:
        return None
    return LoraControl(slot.to(device), scale.to(device), join(loras))


def _skip_control(
    clips: Sequence[ClipState],
    halves: Sequence[tuple[int, int]],
    rows: int,
    device: torch.device,
) -> SkipControl | None:
    used = [
        (clip.controls.lora.highway, _readers(half, clip.controls.lora.conditional_only))
        for clip, half in zip(clips, halves, strict=True)
        if clip.controls.lora is not None and clip.controls.lora.highway is not None
    ]
    if not used:
        return None
    skips = len(used[0][0].gain)
    source, gain = torch.zeros(skips, rows), torch.ones(skips, rows)
    for highway, readers in used:
        for reader in readers:
            source[:, reader] = torch.tensor(highway.source)
            gain[:, reader] = torch.tensor(highway.gain)
    return SkipControl(source.to(device), gain.to(device))


def _preserve_control(
    boards: Sequence[BoardState], halves: Sequence[tuple[int, int]], device: torch.device
) -> PreserveControl | None:
    pairs = [
        pair
        for board in boards
        if board.preserves
        for pair in zip(
            _query_rows(board, board.shots, halves),
            _query_rows(board, board.vanilla, halves),
            strict=True,
        )
    ]
    if not pairs:
        return None
    readers, guides = torch.tensor(pairs, device=device).T
    return PreserveControl(readers, guides)


def _query_rows(
    board: BoardState, clips: Sequence[int], halves: Sequence[tuple[int, int]]
) -> list[int]:
    """The rows of some clips of a board whose queries are changed, or tell how."""
    return [row for clip in clips for row in _readers(halves[clip], board.queries_conditional_only)]


def _shared_key_control(
    boards: Sequence[BoardState],
    halves: Sequence[tuple[int, int]],
    latents: Sequence[Tensor],
    device: torch.device,
) -> SharedKeyControl | None:
    seeing = [(board, board.masks) for board in boards if board.masks is not None]
    if not seeing:
        return None
    readers = sorted(
        {halves[shot][half] for board, _ in seeing for shot in board.shots for half in (0, 1)}
    )
    place = {row: number for number, row in enumerate(readers)}
    further = max(len(board.shots) for board, _ in seeing) - 1
    rows = torch.arange(len(readers))[:, None].repeat(1, further)
    mask = torch.ones(len(readers), *latents[0].shape[1:], device=device)
    for board, masks in seeing:
        for shot, theirs in enumerate(other_shots(len(board.shots)).tolist()):
            for half in (0, 1):
                reader = place[halves[board.shots[shot]][half]]
                rows[reader, : len(theirs)] = torch.tensor(
                    [place[halves[board.shots[other]][half]] for other in theirs]
                )
                mask[reader] = masks[shot]
    alone = [row for row in range(len(latents)) if row not in place]
    return SharedKeyControl(
        torch.tensor(readers, device=device),
        torch.tensor(alone, dtype=torch.int64, device=device),
        rows.to(device),
        mask,
    )


def _flow_controls(
    boards: Sequence[BoardState],
    halves: Sequence[tuple[int, int]],
    device: torch.device,
) -> tuple[FlowControl, ...]:
    controls = []
    for board in boards:
        if board.key_frames is None:
            continue
        keys = board.key_frames.to(device)
        frames = (keys.before, keys.after, keys.share)
        readers = torch.tensor(_query_rows(board, board.shots, halves), device=device)
        if board.flow is None:
            guides = torch.tensor(_query_rows(board, board.vanilla, halves), device=device)
            controls.append(FlowControl(readers, guides, *frames))
            continue
        each = len(readers) // len(board.shots)
        matches = {
            tokens: found.to(device).repeat_interleave(each, dim=0)
            for tokens, found in board.flow.items()
        }
        controls.append(FlowControl(readers, None, *frames, matches))
    return tuple(controls)


def _refine_controls(
    boards: Sequence[BoardState], halves: Sequence[tuple[int, int]], device: torch.device
) -> tuple[RefineControl, ...]:
    controls = []
    for board in boards:
        if board.refine is None:
            continue
        theirs = other_shots(len(board.shots))
        readers, others, shots = [], [], []
        for shot, clip in enumerate(board.shots):
            for reader in _readers(halves[clip], board.refine_conditional_only):
                half = halves[clip].index(reader)
                readers.append(reader)
                others.append([halves[board.shots[other]][half] for other in theirs[shot]])
                shots.append(shot)
        chosen = torch.tensor(shots, device=device)
        controls.append(
            RefineControl(
                torch.tensor(readers, device=device),
                torch.tensor(others, device=device),
                {
                    tokens: PatchMatches(found.token[chosen], found.share[chosen])
                    for tokens, found in board.refine.items()
                },
            )
        )
    return tuple(controls)


def _slots(used: Sequence[tuple[Any, tuple[int, int]]], rows: int) -> tuple[Tensor, Tensor, Any]:
    """The slot and the scale of each row, and what is in the slots from 1 on, each once.

    Slots are in the order of keys, so that the order of clips makes no other banks.
    """
    slot, scale = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)
    kept = {learned.key: learned for learned, _ in used}
    place = {key: number for number, key in enumerate(sorted(kept), start=1)}
    for learned, half in used:
        for reader in _readers(half, learned.conditional_only):
            slot[reader] = place[learned.key]
            scale[reader] = learned.scale
    return slot, scale, tuple(kept[key] for key in place)


def _part(bank: MotionBank | None, part: str) -> Tensor | None:
    return None if bank is None else getattr(bank, part)


def _stack_any(parts: Sequence[Tensor | None]) -> Tensor | None:
    return _stack(parts) if any(part is not None for part in parts) else None


def _stack(parts: Sequence[Tensor | None]) -> Tensor:
    """Banks of one slot each behind a slot of zeros, zeros where one has no such part."""
    none = torch.zeros_like(next(part for part in parts if part is not None))
    return torch.cat([none, *(none if part is None else part for part in parts)])


def _fill(bank: Tensor, axis: int, rank: int) -> Tensor:
    """A bank with zeros up to `rank`."""
    missing = list(bank.shape)
    missing[axis] = rank - bank.shape[axis]
    return torch.cat([bank, bank.new_zeros(missing)], dim=axis)
