"""One step's batch: which rows the denoiser sees, and the control tensors that join them.

Every clip has a conditional row, and an unconditional one if it is guided. Clips whose controls
act at this step read source rows; equal sources at equal timesteps are one row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinetiq.control_tensors import (
    ControlTensors,
    DeviationControl,
    QueryControl,
    no_injection,
)
from kinetiq.controls import ResolvedControls
from kinetiq.motion_injection import ResolvedMotionInjection
from kinetiq.query_injection import ResolvedQueryInjection
from kinetiq.source import ResolvedSource


@dataclass(frozen=True)
class ClipState:
    """A clip as the batch sees it at one step.

    Args:
        latents: network input of its own rows, [channels, frames, h, w].
        timestep: what the network is told.
        source_scale: (signal, noise) of clean latents noised to this step.
        text: [tokens, width] of the prompt.
        negative_text: like `text`, or None where the clip is not guided.
        controls: the controls that act at this step.
    """

    latents: Tensor
    timestep: float
    source_scale: tuple[float, float]
    text: Tensor
    negative_text: Tensor | None
    controls: ResolvedControls


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


def build_batch(clips: Sequence[ClipState], source_text: dict[str, Tensor], sites: int) -> Batch:
    """Lay the clips and their sources out as rows.

    Args:
        clips: clips of one shape.
        source_text: encoded prompt of each source prompt that is used.
        sites: how many sites the network has.
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
    source_rows: dict[tuple[str, float, tuple[float, float]], int] = {}
    reads: list[tuple[int | None, int | None]] = []
    for clip in clips:
        found: list[int | None] = []
        for control in (clip.controls.query, clip.controls.motion):
            if control is None:
                found.append(None)
                continue
            key = (control.source.key, clip.timestep, clip.source_scale)
            if key not in source_rows:
                source_rows[key] = len(latents)
                latents.append(_noised(control.source, clip).to(clip.latents))
                timesteps.append(clip.timestep)
                text.append(source_text[control.source.prompt])
            found.append(source_rows[key])
        reads.append((found[0], found[1]))
    device = latents[0].device
    return Batch(
        latents=torch.stack(latents),
        timesteps=torch.tensor(timesteps, dtype=torch.float32, device=device),
        text=torch.stack(text),
        controls=_join(clips, halves, reads, len(latents), sites, device),
        conditional=torch.tensor([half[0] for half in halves], device=device),
        unconditional=torch.tensor([half[1] for half in halves], device=device),
    )


def _noised(source: ResolvedSource, clip: ClipState) -> Tensor:
    signal, noise = clip.source_scale
    return signal * source.latents + noise * source.noise(clip.timestep).to(source.latents)


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
