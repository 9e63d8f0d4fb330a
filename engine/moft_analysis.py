"""What a network knows of a clip's motion, in figures and pictures.

The motion feature (see `kinetiq.moft`) is shown in three ways: its first three principal components
over all channels as red, green and blue; its component along each axis of the motion channels; and
the curves of the motion channels over the frames, as means over regions.

A component along an axis grows over the frames in pans along the second direction of that axis, so
its slope says where a region goes. Slopes are given in pans: at 1 the component changes as in a pan
by `kinetiq.moft.TRAVEL` of the frame, at -1 as in one the other way. Pans are read in the middle
half of the frame, and so is a clip where no region is asked for.

Whether the channels can be trusted is told by how alike those are that were found on other pans;
`kinetiq bench moft` measures what else the feature knows.

Source: Xiao et al., "Video Diffusion Models are Training-free Motion Interpreter and Controller",
arXiv:2405.14864, sec. 3.2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor

from kinetiq.clip import Clip
from kinetiq.engine import Engine
from kinetiq.errors import ClipError, RequestError
from kinetiq.files import replacing
from kinetiq.generation import Progress, no_progress
from kinetiq.injection import resolve_region
from kinetiq.moft import (
    AXES,
    DEPTH,
    SHARE,
    TRAVEL,
    MotionChannels,
    align,
    load_channels,
    middle_area,
    moft,
    principal_components,
    reference_feature,
    require_share,
)
from kinetiq.request import Request

PICTURE = "moft.png"
REPORT = "moft.json"
MIDDLE = "middle"
COUNTED_FROM = 16
"""Channels of a set from which on its agreement with another is their overlap."""

ANY_PROMPT = "any"  # a request must have one; features are read without
_COLOURS = 3


@dataclass(frozen=True, eq=False)
class RegionMotion:
    """The motion of one region.

    Args:
        name: of the region.
        share: of the positions that it has, 0 to 1.
        curves: [frames, motion channels], float32: means over the region.
        components: for each axis, [frames]: likewise, along the axis.
        slopes: for each axis, the slope of its component, in pans.
    """

    name: str
    share: float
    curves: Tensor
    components: Mapping[str, Tensor]
    slopes: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class MoftAnalysis:
    """What was found, and of what.

    Args:
        channels: the motion channels of the model.
        share: of the channels that are kept, for each axis.
        reference: `Clip.fingerprint` of the clip.
        shown: [frames, height, width, 3], the clip as the model was given it, uint8.
        colours: [frames, h, w, 3], the first principal components, each over its own range, 0 to 1.
        explained: share of the variance that each of these has.
        maps: for each axis, [frames, h, w], the component along it.
        regions: the middle, or those that were asked for.
    """

    channels: MotionChannels
    share: float
    reference: str
    shown: Any
    colours: Tensor
    explained: tuple[float, ...]
    maps: Mapping[str, Tensor]
    regions: tuple[RegionMotion, ...]

    @property
    def selected(self) -> Mapping[str, Tensor]:
        """The motion channels of each axis, the largest loadings first."""
        return {axis: self.channels.select(axis, self.share) for axis in AXES}


def analyze_moft(
    engine: Engine,
    reference: Clip,
    regions: Mapping[str, Any] | None = None,
    *,
    tap: str | None = None,
    share: float = SHARE,
    depth: float = DEPTH,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    progress: Progress = no_progress,
) -> MoftAnalysis:
    """Read the motion feature of a clip.

    Args:
        engine: with the model.
        reference: is brought to the size.
        regions: masks by name, [height, width] or [frames, height, width] of any size, 1 where the
            region is, with something of it in every frame; a mask that is None, or no regions:
            the middle half of the frame, where the pans are read that slopes are counted in. A mask
            should hug what moves and its path: the more it holds of what stands still, the smaller
            its slopes.
        tap: where features are read (`kinetiq.taps`); None: `DEFAULT_TAP`.
        share: of the channels that are kept, for each axis.
        depth: share of the timesteps at which features are read.
        frames: the model's default if None, as are the next two.
        height: pixels.
        width: pixels.
        progress: told of ("calibrating" or "inverting", done, total).

    Raises:
        RequestError: an option has no meaning for this model, or a region is empty.
        ClipError: the reference is a still image.
        CheckpointError: the model's motion channels cannot be used; see `load_channels`.
        NonFiniteError: a feature is not finite.
    """
    if reference.is_still_image:
        raise ClipError(
            "analyze: the reference must have at least 2 frames, got a still image; give a clip "
            "that moves"
        )
    require_share(share)
    options = {"frames": frames, "height": height, "width": width}
    asked = engine.resolve(Request.from_options(ANY_PROMPT, options))
    if asked.frames < 2:
        raise RequestError(f"analyze: frames must be at least 2 to move, got {asked.frames}")
    size = (asked.latent_height * engine.vae_scale, asked.latent_width * engine.vae_scale)
    clip = reference.resample(asked.frames).resize(*size)
    masks = {
        name: _read_mask(name, mask, (asked.frames, *size))
        for name, mask in (regions or {MIDDLE: None}).items()
    }
    channels = load_channels(engine.checkpoint, engine.denoiser, tap, progress=progress)
    selected = channels.select(share=share)
    latents = engine.encode(clip)
    feature = reference_feature(
        engine.checkpoint, engine.denoiser, latents, channels.tap, depth=depth, progress=progress
    )
    moved = moft(feature).cpu()
    colours, explained = content_free_colours(moved)
    maps = {axis: moved @ channels.loadings[axis] for axis in AXES}
    return MoftAnalysis(
        channels=channels,
        share=share,
        reference=reference.fingerprint,
        shown=clip.frames,
        colours=colours,
        explained=explained,
        maps=maps,
        regions=tuple(
            _region_motion(name, mask, moved, channels, selected) for name, mask in masks.items()
        ),
    )


def content_free_colours(moved: Tensor) -> tuple[Tensor, tuple[float, ...]]:
    """The first three principal components of a motion feature, as colours.

    Args:
        moved: [frames, h, w, channels], with content removed.

    Returns:
        [frames, h, w, 3], each over its own range, 0 to 1 (a half where it does not vary), and the
        share of the variance that each has.
    """
    components, shares = principal_components(moved.flatten(0, -2), _COLOURS)
    values = moved.double() @ components
    values = F.pad(values, (0, _COLOURS - values.shape[-1]))  # of fewer channels than colours
    # Both ways from zero alike, so that what does not move is grey.
    largest = values.abs().amax((0, 1, 2)).clamp_min(torch.finfo(values.dtype).tiny)
    return (0.5 + 0.5 * values / largest).float(), tuple(shares.tolist())


def _read_mask(name: str, mask: Any, shape: tuple[int, int, int]) -> Tensor | None:
    region = resolve_region(mask, shape)
    if region is None:
        return None
    empty = [frame for frame, there in enumerate(region.flatten(1).any(1).tolist()) if not there]
    if empty:
        raise RequestError(
            f"region: {name} must hold at least one place in every frame, got none in frame "
            f"{empty[0]}, counted from 0"
        )
    return region


def _region_motion(
    name: str, mask: Tensor | None, moved: Tensor, channels: MotionChannels, selected: Tensor
) -> RegionMotion:
    """Means of a motion feature [frames, h, w, channels] over a mask [frames, h', w']."""
    frames, height, width = moved.shape[:3]
    if mask is None:
        here = middle_area(height, width).expand(frames, 1, -1, -1)
    else:
        here = F.interpolate(mask[:, None].float(), (height, width), mode="area")
    here = here[:, 0, ..., None]
    mean = (moved * here).sum((1, 2)) / here.sum((1, 2))
    return RegionMotion(
        name=name,
        share=float(here.mean()),
        curves=mean[:, selected],
        components={axis: mean @ channels.loadings[axis] for axis in AXES},
        slopes=channels.slopes(mean),
    )


def strength(moved: Tensor) -> float:
    """Root mean square of a motion feature of any shape: 0 for one of a clip that stands still."""
    return float(moved.double().square().mean().sqrt())


@dataclass(frozen=True)
class Agreement:
    """How alike the channels of an axis are that were found on different pans.

    Args:
        measure: "jaccard", the overlap of the two sets, where they have at least `COUNTED_FROM`
            channels; "rank", the rank correlation of the loadings, where they have fewer.
        value: 1 if they are the same.
    """

    measure: str
    value: float


def channel_agreement(
    one: MotionChannels, other: MotionChannels, axis: str, share: float = SHARE
) -> Agreement:
    """Compare the channels of one axis that two calibrations of one model found."""
    first, second = (set(channels.select(axis, share).tolist()) for channels in (one, other))
    if len(first) >= COUNTED_FROM:
        return Agreement("jaccard", len(first & second) / len(first | second))
    ranks = torch.stack(
        [channels.loadings[axis].argsort().argsort().double() for channels in (one, other)]
    )
    return Agreement("rank", float(torch.corrcoef(ranks)[0, 1]))


def as_json(analysis: MoftAnalysis) -> dict[str, Any]:
    """All figures; of the maps, what they come to in each region."""
    channels, share = analysis.channels, analysis.share
    return {
        **channels_json(channels, share),
        "reference": analysis.reference,
        "frames": len(analysis.colours),
        "map": list(analysis.colours.shape[1:3]),
        "colour_variance": list(analysis.explained),
        "regions": [
            {
                "name": region.name,
                "share": region.share,
                "slopes": dict(region.slopes),
                "components": {axis: c.tolist() for axis, c in region.components.items()},
                "curves": {
                    str(channel): curve.tolist()
                    for channel, curve in zip(
                        channels.select(share=share).tolist(), region.curves.T, strict=True
                    )
                },
            }
            for region in analysis.regions
        ],
    }


def channels_json(channels: MotionChannels, share: float) -> dict[str, Any]:
    """Which channels carry motion, with their loadings."""
    chosen = {axis: channels.select(axis, share) for axis in AXES}
    return {
        "model": channels.checkpoint,
        "tap": channels.tap,
        "width": channels.width,
        "channel_share": share,
        "axes": {
            axis: {
                "channels": indices.tolist(),
                "loadings": channels.loadings[axis][indices].tolist(),
                "component_share": channels.spread[axis],
            }
            for axis, indices in chosen.items()
        },
    }


def describe(analysis: MoftAnalysis) -> str:
    """The figures in words for a terminal."""
    lines = [
        f"Motion feature over {len(analysis.colours)} frames; {_slope_words()}",
        "",
        *_table(analysis.regions),
        "",
        describe_channels(analysis.channels, analysis.share),
    ]
    return "\n".join(lines)


def describe_channels(channels: MotionChannels, share: float) -> str:
    """Which channels carry motion, in words for a terminal."""
    lines = [f"Motion channels of {channels.checkpoint} at {channels.tap}, of {channels.width}:"]
    for axis in AXES:
        chosen = ", ".join(map(str, channels.select(axis, share).tolist()))
        told = f"{channels.spread[axis]:.0%} of what tells {' from '.join(AXES[axis])}"
        lines.append(f"{axis:<10}  {chosen} (one component has {told})")
    return "\n".join(lines)


def _slope_words() -> str:
    back, forth = (" or ".join(ways) for ways in zip(*AXES.values(), strict=True))
    return (
        f"a slope of 1 is that of a pan {forth} by {TRAVEL:g} of the frame in its middle, "
        f"of -1 one {back}"
    )


def _table(regions: Sequence[RegionMotion]) -> list[str]:
    widest = max(len(region.name) for region in regions)
    return [
        f"{region.name.ljust(widest)}  "
        + "  ".join(f"{axis} {slope:+.2f}" for axis, slope in region.slopes.items())
        for region in regions
    ]


def _headline(analysis: MoftAnalysis) -> str:
    return (
        f"Motion feature of {analysis.channels.checkpoint} at {analysis.channels.tap} over "
        f"{len(analysis.colours)} frames"
    )


def draw(analysis: MoftAnalysis, path: Path) -> None:
    """Draw the clip, its components as colours and along the axes, and the curves, as a PNG.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    frames, regions = len(analysis.colours), analysis.regions
    figure = Figure(
        figsize=(max(7.0, 0.85 * frames + 1.2), 4.4 + 2.2 * len(regions)), layout="constrained"
    )
    figure.suptitle(_headline(analysis), fontsize=11)
    parts: Any = figure.subfigures(2, 1, height_ratios=[4.2, 2.2 * len(regions)])
    _draw_maps(parts[0], analysis)
    grid = parts[1].subplots(len(regions), 2, squeeze=False, width_ratios=[1, 1])
    for row, region in zip(grid, regions, strict=True):
        _draw_components(row[0], region)
        _draw_curves(row[1], region, analysis)
    for cell in grid[-1]:
        cell.set_xlabel("frame", fontsize=9)
    with replacing(path, "analyze") as temporary:
        figure.savefig(temporary, dpi=130, format="png")


_AXIS_COLOURS = {"horizontal": "#1f6f8b", "vertical": "#c2452d"}


def _draw_maps(part: Any, analysis: MoftAnalysis) -> None:
    """A row of frames each: the clip, the colours, and the component along each axis.

    What is read at the tap's size is brought to that of the clip, to lie where the clip shows it.
    """
    size = analysis.shown.shape[1:3]
    named = [("clip", analysis.shown), ("components", align(analysis.colours, *size).numpy())]
    named += [
        (axis, align(field[..., None], *size)[..., 0].numpy())
        for axis, field in analysis.maps.items()
    ]
    grid = part.subplots(len(named), len(analysis.colours), squeeze=False)
    for row, (name, pictures) in zip(grid, named, strict=True):
        shades = {}
        if name in AXES:
            largest = float(abs(pictures).max()) or 1.0
            shades = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}
        for cell, picture in zip(row, pictures, strict=True):
            cell.imshow(picture, interpolation="nearest", **shades)
            cell.set_xticks([])
            cell.set_yticks([])
        row[0].set_ylabel(name, fontsize=8)


def _draw_components(cell: Any, region: RegionMotion) -> None:
    for axis, component in region.components.items():
        words = f"{axis}, slope {region.slopes[axis]:+.2f} pans"
        cell.plot(component.numpy(), color=_AXIS_COLOURS[axis], label=words)
    cell.set_title(f"{region.name}: along the axes", fontsize=9)
    cell.legend(fontsize=7, frameon=False)
    _plain_frame(cell)


def _draw_curves(cell: Any, region: RegionMotion, analysis: MoftAnalysis) -> None:
    """The motion channels, those of both axes in the colour of the first."""
    chosen = analysis.channels.select(share=analysis.share).tolist()
    horizontal = analysis.selected["horizontal"].tolist()
    for channel, curve in zip(chosen, region.curves.T, strict=True):
        colour = _AXIS_COLOURS["horizontal" if channel in horizontal else "vertical"]
        cell.plot(curve.numpy(), color=colour, linewidth=0.9, alpha=0.7)
    cell.set_title(f"{region.name}: {len(chosen)} motion channels", fontsize=9)
    _plain_frame(cell)


def _plain_frame(cell: Any) -> None:
    cell.spines[["top", "right"]].set_visible(False)
    cell.axhline(0.0, color="#888888", linewidth=0.6)
    cell.tick_params(labelsize=7)
