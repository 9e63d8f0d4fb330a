r"""MOFT guidance: gradient steps on the latents, towards the motion that is wanted.

In a window of the sampler's steps, before a step is predicted, the network is run on the clip's
latents z up to a tap (`kinetiq.taps`), its features are compared with those wanted, and the
latents follow the gradient, a few times:

    x = features at the tap                                 [frames, h, w, channels]
    m = x minus its mean over frames, motion channels       (`kinetiq.moft`)
    L = mean over frames and channels of (mean_R m - m_wanted)^2     R: a region of the frame
    z <- z - step_size * mask * dL/dz

The size of a synthesised motion is that of pans, read in the middle half of the frame, where they
have their shapes; without a region R is that middle, and the latents are free everywhere. Of a
region that holds much that stands still the mean is smaller than what is wanted, so a mask should
hug the shape and the path that it is to take.

What is wanted comes from a reference clip, or is synthesised for a direction, or both in several
regions, or is a drag of points: first the synthesised motion of the drag's vector, later that the
features D found along the way stay those of its start, with p_f on the straight line from the start
p_1 to the end:

    L = mean over f >= 2 and channels of |D_f(p_f) - stopgrad D_1(p_1)|

z is the network's input: samplers whose sample is scaled for the network take the same step there.
The network runs on the conditional half alone and stops at the tap, or at the end of the temporal
transformer that a tapped attention lies in; what lies behind is not run, and what lies behind the
tap is not differentiated. Other controls of the clip act in that run as they do in its prediction.

Shared keys and values: the spatial self-attention before the tap in the tap's own block uses the
keys and values of the same request without guidance. Until the window begins the two are one clip;
from there the unguided one goes along as a clip of its own, and its keys and values are those of
its own prediction. When the window ends it is dropped.

Source: Xiao et al., "Video Diffusion Models are Training-free Motion Interpreter and Controller",
arXiv:2405.14864, sec. 3.3 and 3.4; where paper and released code differ, the default is the code.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor

from kinetiq.clip import Clip
from kinetiq.control_tensors import KeyValueBank, KeyValueControl
from kinetiq.errors import RequestError
from kinetiq.families import Site, SiteKind
from kinetiq.injection import check_reference, freeze_region, one_of
from kinetiq.kernels import motion_feature
from kinetiq.moft import DIRECTIONS, SHARE, MotionChannels, middle_area
from kinetiq.precision import exact_float32
from kinetiq.profiling import span
from kinetiq.taps import Tap

if TYPE_CHECKING:
    from kinetiq.denoiser import Denoiser
    from kinetiq.rows import Batch, ClipState

WINDOW = (3 / 25, 12 / 25)
DRAG_WINDOW = (19 / 25, 18 / 25, 5 / 25)
_DRAG_REACH = 1 / 8  # of the frame's width: how far from its line a drag moves things
# A loss of some 1e-6 an element has no digits in float16, so its gradient is carried enlarged.
_ENLARGED = {torch.float16: 1024.0}

Point = tuple[float, float]


def _check_reference(instance: object, attribute: Any, value: object) -> None:
    if value is not None:
        check_reference(instance, attribute, value)


def _check_direction(_: object, attribute: Any, value: object) -> None:
    if value is not None and value not in tuple(DIRECTIONS):
        raise RequestError(
            f"{attribute.name}: must be one of {', '.join(DIRECTIONS)}, got {value!r}"
        )


def _number(low: float, high: float = math.inf) -> Any:
    def check(_: object, attribute: Any, value: Any) -> None:
        number = isinstance(value, Real) and not isinstance(value, bool)
        # Compared, not asked with `isfinite`, which whole numbers may be too large for.
        if not number or not low <= value <= min(high, sys.float_info.max):
            said = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise RequestError(f"{attribute.name}: must be a number {said}, got {value!r}")

    return check


def _whole(low: int) -> Any:
    def check(_: object, attribute: Any, value: Any) -> None:
        if value is None and attribute.default is None:
            return
        fits = isinstance(value, Integral) and not isinstance(value, bool)
        if not fits or value < low:
            raise RequestError(
                f"{attribute.name}: must be a whole number of at least {low}, got {value!r}"
            )

    return check


def _flag(_: object, attribute: Any, value: object) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{attribute.name}: must be True or False, got {value!r}")


def _freeze_shares(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _freeze_regions(value: Any) -> tuple["MoftRegion", ...]:
    regions = tuple(value) if isinstance(value, Sequence) else (value,)
    for region in regions:
        if not isinstance(region, MoftRegion):
            raise RequestError(f"regions: must be MoftRegion, got {type(region).__name__}")
    return regions


def _freeze_points(value: Any) -> tuple[tuple[Point, Point], ...]:
    try:
        drags = tuple(
            ((float(x0), float(y0)), (float(x1), float(y1))) for (x0, y0), (x1, y1) in value
        )
    except OverflowError as error:
        raise RequestError("points: must be finite, got a coordinate beyond all floats") from error
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"points: must be a list of ((x0, y0), (x1, y1)) in pixels, got {value!r}"
        ) from error
    if not all(math.isfinite(number) for drag in drags for point in drag for number in point):
        raise RequestError(f"points: must be finite, got {value!r}")
    return drags


@attrs.frozen(kw_only=True)
class MoftRegion:
    """One region of the frame, and the motion that is wanted there: a clip's or a direction.

    Args:
        mask: bool or float [height, width] of the clip that is generated, 1 in the region. It
            should hug the shape and the path that it is to take: what is wanted is the mean motion
            over the mask, which ground that stands still lowers.
        reference: a clip that moves as wanted.
        direction: "left", "right", "up" or "down".
        speed: factor on the synthesised motion of a direction; 0 asks for stillness.
        reference_region: where in the reference its motion is read, a mask of the same size;
            None: the middle half of the frame.

    Raises:
        RequestError: there is not one reference or one direction, or a value is out of range.
    """

    mask: Any = attrs.field(
        kw_only=False,
        converter=freeze_region,
        eq=attrs.cmp_using(eq=np.array_equal),
        hash=False,  # an array has none; equal controls still have equal hashes
    )
    reference: Clip | None = attrs.field(default=None, validator=_check_reference)
    direction: str | None = attrs.field(default=None, validator=_check_direction)
    speed: float = attrs.field(default=1.0, validator=_number(0.0, 100.0))
    reference_region: Any = attrs.field(
        default=None,
        converter=freeze_region,
        eq=attrs.cmp_using(eq=np.array_equal),
        hash=False,
    )

    def __attrs_post_init__(self) -> None:
        if self.mask is None:
            raise RequestError("regions: each must have a mask, got None")
        if (self.reference is None) == (self.direction is None):
            came = "neither" if self.reference is None else "both"
            raise RequestError(
                f"regions: each must have a motion, a reference or a direction, got {came}"
            )
        _check_source(self)


@attrs.frozen(kw_only=True)
class MoftGuidance:
    """Steer with gradients towards a reference's motion, a direction, regions of both, or a drag.

    Exactly one of `reference`, `direction`, `regions` and `points` says what is wanted.

    Args:
        reference: a clip that moves as wanted.
        direction: "left", "right", "up" or "down": everything goes there.
        regions: several `MoftRegion`, each with a motion of its own.
        points: drags, ((x0, y0), (x1, y1)) in pixels of the clip, from where to where.
        speed: factor on the synthesised motion of a direction; 0 asks for stillness.
        region: bool or float mask [height, width] of the clip's size, 1 where the motion is wanted
            and latents may change; it should hug the shape and the path that it is to take. None:
            the motion is compared in the middle half of the frame (where a reference is compared
            by position, everywhere), or for a drag within an eighth of the width of its line, and
            latents may change everywhere.
        reference_region: where in the reference its motion is read, a mask of the same size; None:
            the middle half of the frame.
        window: first and last share of the steps that are guided.
        drag_window: shares of the steps that remain: a drag is guided by motion down to the second,
            by correspondence from below the first down to the third.
        iterations: gradient steps at each guided step; 0 is plain generation.
        step_size: factor on the gradient; 0 is plain generation.
        weight: factor on the loss; the released code has 6 to 10.
        loss: "curve": the region's mean motion is to be the wanted one (the code); "position": the
            motion at each of its positions (the paper).
        metric: "mse", the mean square of the difference, or "cosine", one minus the cosine over
            frames and channels, which leaves the size of the motion open.
        share: of the channels that carry motion.
        feature: "moft"; "content_removed", all channels without their mean over frames; "raw",
            which keeps it. The last two are the paper's ablation.
        guided_frames: how many frames, from the first, take gradients; None: all.
        shared_keys_values: whether guidance uses the keys and values of the clip without guidance.
        tap: module path of the block or of the temporal self-attention whose output is read;
            None: the second up block.
        recompute: whether activations are computed again in the backward pass: True, False, or
            "auto": where a clip does not fit into memory otherwise.

    Raises:
        RequestError: a value, or a combination of them, has no meaning.
    """

    reference: Clip | None = attrs.field(default=None, kw_only=False, validator=_check_reference)
    direction: str | None = attrs.field(default=None, validator=_check_direction)
    regions: tuple[MoftRegion, ...] = attrs.field(default=(), converter=_freeze_regions)
    points: tuple[tuple[Point, Point], ...] = attrs.field(default=(), converter=_freeze_points)
    speed: float = attrs.field(default=1.0, validator=_number(0.0, 100.0))
    region: Any = attrs.field(
        default=None,
        converter=freeze_region,
        eq=attrs.cmp_using(eq=np.array_equal),
        hash=False,
    )
    reference_region: Any = attrs.field(
        default=None,
        converter=freeze_region,
        eq=attrs.cmp_using(eq=np.array_equal),
        hash=False,
    )
    window: tuple[float, float] = attrs.field(default=WINDOW, converter=_freeze_shares)
    drag_window: tuple[float, float, float] = attrs.field(
        default=DRAG_WINDOW, converter=_freeze_shares
    )
    iterations: int = attrs.field(default=2, validator=_whole(0))
    step_size: float = attrs.field(default=0.5, validator=_number(0.0))
    weight: float = attrs.field(default=10.0, validator=_number(0.0))
    loss: str = attrs.field(default="curve", validator=one_of("curve", "position"))
    metric: str = attrs.field(default="mse", validator=one_of("mse", "cosine"))
    share: float = attrs.field(default=SHARE)
    feature: str = attrs.field(default="moft", validator=one_of("moft", "content_removed", "raw"))
    guided_frames: int | None = attrs.field(default=None, validator=_whole(1))
    shared_keys_values: bool = attrs.field(default=True, validator=_flag)
    tap: str | None = attrs.field(default=None)
    recompute: bool | str = attrs.field(default="auto")

    @window.validator
    def _check_window(self, _: object, value: Any) -> None:
        if not _are_shares(value, 2) or not value[0] < value[1]:
            raise RequestError(
                f"window: must be two shares of the steps, 0 to 1, the first below the second, "
                f"got {value!r}"
            )

    @drag_window.validator
    def _check_drag_window(self, _: object, value: Any) -> None:
        if not _are_shares(value, 3) or not value[0] >= value[1] >= value[2]:
            raise RequestError(
                "drag_window: must be three shares of the steps that remain, 1 to 0, none above "
                f"the one before, got {value!r}"
            )

    @share.validator
    def _check_share(self, _: object, value: Any) -> None:
        if not _are_shares((value,), 1) or value == 0:
            raise RequestError(f"share: must be a number above 0 and at most 1, got {value!r}")

    @tap.validator
    def _check_tap(self, _: object, value: object) -> None:
        if value is not None and not isinstance(value, str):
            raise RequestError(f"tap: must be the name of a block, got {type(value).__name__}")

    @recompute.validator
    def _check_recompute(self, _: object, value: object) -> None:
        if not isinstance(value, bool) and value != "auto":
            raise RequestError(f"recompute: must be 'auto', True or False, got {value!r}")

    def __attrs_post_init__(self) -> None:
        wanted = {
            "reference": self.reference is not None,
            "direction": self.direction is not None,
            "regions": bool(self.regions),
            "points": bool(self.points),
        }
        found = [name for name, given in wanted.items() if given]
        if len(found) != 1:
            raise RequestError(
                f"guidance: exactly one of {', '.join(wanted)} must say what motion is wanted, "
                f"got {' and '.join(found) or 'none'}; several motions are several regions"
            )
        _check_source(self)
        sources: tuple[MoftRegion | MoftGuidance, ...] = (self, *self.regions)
        synthesises = bool(self.points) or any(source.direction for source in sources)
        refused = [
            ("region", "regions have masks of their own", self.regions and self.region is not None),
            ("speed", "regions have speeds of their own", self.regions and self.speed != 1.0),
            ("speed", "points say how far they go", self.points and self.speed != 1.0),
            ("window", "points have a drag_window", self.points and self.window != WINDOW),
            (
                "drag_window",
                "only points have one",
                not self.points and self.drag_window != DRAG_WINDOW,
            ),
            (
                "reference_region",
                "loss='position' compares equal places",
                self.loss == "position" and any(s.reference_region is not None for s in sources),
            ),
            (
                "feature",
                "raw features hold what a clip shows, which a direction or a drag does not say",
                self.feature == "raw" and synthesises,
            ),
        ]
        for name, reason, given in refused:
            if given:
                raise RequestError(f"{name}: must be left out here, since {reason}")
        rests = any(source.direction and source.speed == 0.0 for source in sources)
        if self.metric == "cosine" and (rests or any(start == end for start, end in self.points)):
            raise RequestError(
                "metric: must be 'mse' where stillness is wanted, which has no way that a cosine "
                "could compare, got 'cosine' with "
                + ("speed=0" if rests else "a drag to its own start")
            )


def _check_source(source: MoftRegion | MoftGuidance) -> None:
    """Refuse switches of the motion that is not there."""
    if source.reference is None and source.reference_region is not None:
        raise RequestError("reference_region: must be left out without a reference")
    if source.reference is not None and source.speed != 1.0:
        raise RequestError(
            f"speed: must be left out with a reference, which has its own, got {source.speed!r}"
        )


def _are_shares(value: Any, count: int) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == count
        and all(isinstance(one, Real) and not isinstance(one, bool) for one in value)
        and all(0.0 <= one <= 1.0 for one in value)
    )


@attrs.frozen(eq=False)
class MotionTarget:
    """The motion that is wanted in one region.

    Args:
        wanted: [frames, places, channels]; one place stands for all.
        channels: int64, which channels of the features these are; None: all.
        region: [h, w] weights at the latents' size; None: the middle of the map, where the pans
            were read that synthesised motions are made of.
    """

    wanted: Tensor
    channels: Tensor | None
    region: Tensor | None


@attrs.frozen(eq=False)
class ResolvedMoftGuidance:
    """Guidance as data for one clip.

    Args:
        tap: module path of what is read.
        targets: the motions that are wanted.
        paths: [drags, frames, 2], where each dragged point is at each frame, (x, y) as shares of
            the width and the height.
        motion_steps: numbers of the steps that are guided by `targets`.
        drag_steps: likewise by `paths`.
        mask: [frames, h, w] factor on the gradient.
        sites: indices of the sites that are given keys and values; none: they are not shared.
        iterations: gradient steps at each guided step.
        step_size: factor on the gradient.
        weight: factor on the loss.
        per_position: whether positions are compared, not the means of regions.
        metric: "mse" or "cosine".
        feature: "moft", "content_removed" or "raw".
        recompute: True, False or "auto".
    """

    tap: str
    targets: tuple[MotionTarget, ...]
    paths: Tensor
    motion_steps: range
    drag_steps: range
    mask: Tensor
    sites: tuple[int, ...]
    iterations: int
    step_size: float
    weight: float
    per_position: bool
    metric: str
    feature: str
    recompute: bool | str

    def acts(self, step: int) -> bool:
        """Whether anything changes at `step`, counted from 0."""
        moves = self.iterations > 0 and self.step_size > 0.0
        return moves and (step in self.motion_steps or step in self.drag_steps)


def resolve_moft_guidance(
    control: MoftGuidance,
    *,
    shape: tuple[int, int, int],
    size: tuple[int, int],
    steps: int,
    tap: Tap,
    sites: tuple[Site, ...],
    channels_of: Callable[[], MotionChannels],
    features_of: Callable[[Clip], Tensor],
    device: torch.device,
) -> ResolvedMoftGuidance:
    """Turn what was asked into data for one clip.

    Args:
        control: what was asked.
        shape: of the clip's latents, (frames, h, w).
        size: of the clip, (height, width) in pixels.
        steps: of its sampler.
        tap: where features are read.
        sites: the network's.
        channels_of: the model's motion channels at the tap; asked only where they are needed.
        features_of: a reference's features at the tap, [frames, h, w, channels]; likewise.
        device: where the network is.

    Raises:
        RequestError: a mask has another size or is empty, a point is outside the frame, the window
            holds no step, or the tap's block has no keys and values to share.
    """
    frames = shape[0]
    if frames < 2:
        raise RequestError(f"frames: must be at least 2 where a motion is given, got {frames}")
    motion_steps, drag_steps = _steps(control, steps)
    shared = _shared_sites(control, tap, sites)
    areas = [
        None if region is None else _shrunk(region, shape[1:]).to(device)
        for region in _regions(control, size)
    ]
    mask = torch.ones(shape, device=device)
    if control.region is not None:
        mask *= _shrunk(_checked_mask("region", control.region, size), shape[1:]).to(device)
    elif control.regions:
        mask *= torch.stack([area for area in areas if area is not None]).amax(0)
    if control.guided_frames is not None:
        mask[control.guided_frames :] = 0.0
    maker = _TargetMaker(control, frames, size, channels_of, features_of)
    return ResolvedMoftGuidance(
        tap=tap.name,
        targets=tuple(
            MotionTarget(wanted.to(device), None if channels is None else channels.to(device), area)
            for area, (wanted, channels) in zip(areas, maker.targets(), strict=True)
        ),
        paths=_paths(control, frames, size).to(device),
        motion_steps=motion_steps,
        drag_steps=drag_steps,
        mask=mask,
        sites=shared,
        iterations=int(control.iterations),
        step_size=float(control.step_size),
        weight=float(control.weight),
        per_position=control.loss == "position",
        metric=control.metric,
        feature=control.feature,
        recompute=control.recompute,
    )


def _steps(control: MoftGuidance, steps: int) -> tuple[range, range]:
    """The steps that are guided by motion, and those by correspondence.

    With n of N steps taken, N - n remain, so that N remain before the first. Where rounding would
    have it otherwise, a drag whose shares say so still has a step of both, and one left to itself.
    """
    if not control.points:
        first, last = (round(share * steps) for share in control.window)
        if first == last:
            raise RequestError(
                f"window: {control.window} of {steps} steps must hold a step, got none; widen the "
                "window or take more steps"
            )
        return range(first, last), range(0)
    high, middle, low = (round(share * steps) for share in control.drag_window)
    end = max(1, steps - (control.drag_window[2] > 0.0))
    motion = range(min(steps - middle + 1, end))
    both = control.drag_window[0] > control.drag_window[1]
    first = min(steps - high + 1, motion.stop - both)
    return motion, range(first, max(first, min(steps - low + 1, end)))


def _shared_sites(control: MoftGuidance, tap: Tap, sites: tuple[Site, ...]) -> tuple[int, ...]:
    if not control.shared_keys_values:
        return ()
    found = tuple(
        index
        for index, site in enumerate(sites)
        if site.kind is SiteKind.SPATIAL
        and site.name.startswith(f"{tap.block}.")
        and not (tap.is_attention and _layer(site.name, tap) > _layer(tap.name, tap))
    )
    if not found:
        raise RequestError(
            "shared_keys_values: the tap's block must have spatial self-attention, and "
            f"{tap.block} has none; give shared_keys_values=False or another tap"
        )
    return found


def _layer(name: str, tap: Tap) -> int:
    """Which layer of the tap's block a site is in; a layer's spatial site runs first."""
    return int(name.removeprefix(f"{tap.block}.").split(".")[1])


def _regions(control: MoftGuidance, size: tuple[int, int]) -> list[Tensor | None]:
    """Where each target holds, [height, width] in pixels; None: in the middle of the map."""
    if control.regions:
        return [
            _checked_mask(f"regions: mask {number} of {len(control.regions)}", region.mask, size)
            for number, region in enumerate(control.regions, start=1)
        ]
    region = None if control.region is None else _checked_mask("region", control.region, size)
    if not control.points:
        # Positions of a reference are compared one by one, so that all of them have a meaning.
        everywhere = control.reference is not None and control.loss == "position"
        return [torch.ones(size) if region is None and everywhere else region]
    for drag in control.points:
        for x, y in drag:
            if not (0 <= x < size[1] and 0 <= y < size[0]):
                raise RequestError(
                    f"points: must be inside the frame, x from 0 to below {size[1]} and y from 0 "
                    f"to below {size[0]}, got ({x:g}, {y:g})"
                )
    distances = torch.stack([_distance(drag, size) for drag in control.points])
    near = distances <= _DRAG_REACH * size[1]
    if region is None:
        return list(near.float())
    nearest = distances.argmin(0)
    areas = [region * (nearest == number) for number in range(len(control.points))]
    for drag, area, reached in zip(control.points, areas, near, strict=True):
        if not bool(area.any()):
            raise RequestError(
                f"region: must hold places that are nearer to each drag than to the others, and "
                f"holds none for {drag}"
            )
        if not bool(area[reached].any()):
            raise RequestError(
                f"region: must hold places within an eighth of the width of each drag's line, and "
                f"holds none for {drag}"
            )
    return list(areas)


def _distance(drag: tuple[Point, Point], size: tuple[int, int]) -> Tensor:
    """Of each pixel from the line of a drag, [height, width] in pixels."""
    start, end = torch.tensor(drag)
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    place = torch.stack([x, y], dim=-1) - start
    along = end - start
    share = (place @ along / along.dot(along).clamp(min=1e-12)).clamp(0.0, 1.0)
    distance: Tensor = (place - share[..., None] * along).norm(dim=-1)
    return distance


def _checked_mask(what: str, mask: Any, size: tuple[int, int]) -> Tensor:
    """A mask [height, width] as a tensor.

    Raises:
        RequestError: it has another size, is empty, or is out of [0, 1].
    """
    if np.shape(mask) != size:
        raise RequestError(
            f"{what}: must be [height, width] = {list(size)} of the clip, got "
            f"{list(np.shape(mask))}"
        )
    weights = torch.tensor(mask)
    if not bool(((weights >= 0) & (weights <= 1)).all()):
        raise RequestError(f"{what}: must hold numbers from 0 to 1, got others")
    if not bool(weights.any()):
        raise RequestError(f"{what}: must hold at least one place, got an empty one")
    return weights


def _shrunk(mask: Tensor, size: Sequence[int]) -> Tensor:
    """A mask at another size, averaged over the area of each new place."""
    if tuple(mask.shape) == tuple(size):
        return mask
    return F.interpolate(mask[None, None], size=tuple(size), mode="area")[0, 0]


def _area(region: Tensor | None, places: Sequence[int]) -> Tensor:
    """Weights of a mean over the places of a map; without a region, of its middle."""
    height, width = places
    return middle_area(height, width) if region is None else _shrunk(region, places)


def _paths(control: MoftGuidance, frames: int, size: tuple[int, int]) -> Tensor:
    """Where each dragged point is at each frame, in shares of width and height."""
    points = torch.tensor(control.points, dtype=torch.float64).reshape(-1, 2, 2)
    share = torch.linspace(0.0, 1.0, frames, dtype=torch.float64)[:, None]
    pixels = torch.lerp(points[:, :1], points[:, 1:], share)
    return (pixels + 0.5) / torch.tensor([size[1], size[0]])


@attrs.frozen(eq=False)
class _TargetMaker:
    """Makes the motion that each region of a control wants, and its channels."""

    control: MoftGuidance
    frames: int
    size: tuple[int, int]
    channels_of: Callable[[], MotionChannels]
    features_of: Callable[[Clip], Tensor]

    def targets(self) -> list[tuple[Tensor, Tensor | None]]:
        control = self.control
        if control.points:
            return [self._of_drag(drag) for drag in control.points]
        return [self._of(source) for source in control.regions or (control,)]

    def _of(self, source: MoftRegion | MoftGuidance) -> tuple[Tensor, Tensor | None]:
        if source.reference is not None:
            return self._of_reference(source.reference, source.reference_region)
        direction = str(source.direction)
        return self._chosen(
            self.channels_of().synthesise(direction, self.frames, float(source.speed))
        )

    def _of_reference(self, reference: Clip, region: Any) -> tuple[Tensor, Tensor | None]:
        weights = None
        if region is not None:
            weights = _checked_mask("reference_region", region, self.size)
        channels = self._channels()
        features = self.features_of(reference)
        if self.control.loss == "position":
            return measure(features, self.control.feature, channels), channels
        area = _area(weights, features.shape[1:3]).to(features.device)
        return measure(features, self.control.feature, channels, area), channels

    def _of_drag(self, drag: tuple[Point, Point]) -> tuple[Tensor, Tensor | None]:
        (x0, y0), (x1, y1) = drag
        x, y = (x1 - x0) / self.size[1], (y1 - y0) / self.size[0]
        return self._chosen(self.channels_of().synthesise_way(x, y, self.frames))

    def _chosen(self, curve: Tensor) -> tuple[Tensor, Tensor | None]:
        channels = self._channels()
        if channels is not None:
            curve = curve.index_select(1, channels.to(curve.device))
        return curve[:, None], channels

    def _channels(self) -> Tensor | None:
        """Of both axes, so that what is to go along one does not drift along the other."""
        if self.control.feature != "moft":
            return None
        return self.channels_of().select(share=self.control.share)


def measure(
    features: Tensor, feature: str, channels: Tensor | None = None, area: Tensor | None = None
) -> Tensor:
    """What of the features guidance compares, float32 or wider.

    Args:
        features: [frames, h, w, channels].
        feature: "raw" keeps the mean over frames, which the others take away.
        channels: int64, which are wanted; None: all.
        area: [h, w] weights of a mean over the positions; None: each position by itself.

    Returns:
        [frames, h * w or 1, channels].
    """
    x = features.flatten(1, 2)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if feature != "raw":
        weights = None if area is None else area.flatten()
        if channels is not None:
            channels = channels.to(x.device)
        return motion_feature(x[None], channels, region=weights)[0]
    if area is None:
        return x
    weights = area.flatten().to(x)
    return (weights / weights.sum() @ x)[:, None]


def guidance_loss(features: Tensor, guidance: ResolvedMoftGuidance, step: int) -> Tensor:
    """How far the features of one clip are from those wanted at `step`; see the top of this file.

    Args:
        features: [frames, h, w, channels].
        guidance: of the clip.
        step: counted from 0.

    Returns:
        A number, float32 or wider.
    """
    losses = []
    if step in guidance.motion_steps:
        losses += [_motion_loss(features, target, guidance) for target in guidance.targets]
    if step in guidance.drag_steps:
        losses += [_drag_loss(features, path) for path in guidance.paths]
    return guidance.weight * torch.stack(losses).sum()


def _motion_loss(features: Tensor, target: MotionTarget, guidance: ResolvedMoftGuidance) -> Tensor:
    area = _area(target.region, features.shape[1:3]).to(features.device)
    if guidance.per_position:
        got = measure(features, guidance.feature, target.channels)
        weights = (area / area.sum()).flatten().to(got.dtype)
    else:
        got = measure(features, guidance.feature, target.channels, area)
        weights = got.new_ones(1)
    wanted = target.wanted.to(got.dtype)
    if guidance.metric == "cosine":
        # Of frames and channels together: at some frame most motions pass through zero, where a
        # cosine of that frame alone would have no meaning.
        curves = [x.transpose(0, 1).flatten(1) for x in (got, wanted)]
        each = 1.0 - F.cosine_similarity(curves[0], curves[1], dim=1)
    else:
        each = (got - wanted).square().mean((0, 2))
    return each @ weights


def _drag_loss(features: Tensor, path: Tensor) -> Tensor:
    """How far what is at a point's place at each frame is from what is there at the first."""
    x = features.to(torch.promote_types(features.dtype, torch.float32))
    _, height, width, _ = x.shape
    across = _bilinear(path[:, 0].to(x.dtype), width)
    down = _bilinear(path[:, 1].to(x.dtype), height)
    weights = (down[:, :, None] * across[:, None]).flatten(1)  # [frames, h * w]
    # A product, since gathering adds up its gradient in another order every time on some devices.
    found = (weights[:, None] @ x.flatten(1, 2))[:, 0]
    return (found[1:] - found[0].detach()).abs().mean()


def _bilinear(share: Tensor, places: int) -> Tensor:
    """Weights of the places of an axis for positions at a share of it, [positions, places]."""
    place = (share * places - 0.5).clamp(0.0, places - 1.0)
    offset = place[:, None] - torch.arange(places, device=share.device, dtype=share.dtype)
    return (1.0 - offset.abs()).clamp(min=0.0)


@attrs.frozen(eq=False)
class GuidedClip:
    """What guiding one clip at one step is given.

    Args:
        state: the clip as the batch sees it; its latents are replaced.
        sample: [channels, frames, h, w], float32.
        input_scale: the network sees `input_scale` times the sample.
        step: counted from 0.
        guidance: acts at that step.
        keys_values: of the clip without guidance at this step, one slot at each of its sites;
            None: not shared.
    """

    state: "ClipState"
    sample: Tensor
    input_scale: float
    step: int
    guidance: ResolvedMoftGuidance
    keys_values: Mapping[int, KeyValueBank] | None = None


BuildBatch = Callable[[Sequence["ClipState"]], "Batch"]


def guide(
    clips: Sequence[GuidedClip],
    denoiser: "Denoiser",
    build: BuildBatch,
    *,
    recomputation: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[tuple[Tensor, int | None]]:
    """Take the gradient steps of one sampler step, of all clips at once.

    Args:
        clips: of one shape.
        denoiser: the network.
        build: lays clips without an unconditional half out as a batch.
        recomputation: around each forward and backward pass.

    Returns:
        Each clip's new sample, and the iteration, counted from 1, at which it became NaN or
        infinite; None: it is finite.
    """
    samples = [clip.sample for clip in clips]
    broken: list[int | None] = [None] * len(clips)
    for iteration in range(max(clip.guidance.iterations for clip in clips)):
        left = [
            place
            for place, clip in enumerate(clips)
            if broken[place] is None and iteration < clip.guidance.iterations
        ]
        for tap in dict.fromkeys(clips[place].guidance.tap for place in left):
            group = [place for place in left if clips[place].guidance.tap == tap]
            moved = [attrs.evolve(clips[place], sample=samples[place]) for place in group]
            with span(f"guidance of {len(group)} clips"), recomputation():
                gradients = guidance_gradients(moved, denoiser, build)
            for place, clip, gradient in zip(group, moved, gradients, strict=True):
                factor = clip.guidance.step_size / clip.input_scale * clip.guidance.mask
                samples[place] = clip.sample - factor * gradient
                if not bool(samples[place].isfinite().all()):
                    broken[place] = iteration + 1
    return list(zip(samples, broken, strict=True))


def guidance_gradients(
    clips: Sequence[GuidedClip], denoiser: "Denoiser", build: BuildBatch
) -> Tensor:
    """The gradients of the clips' losses by the network's input.

    Args:
        clips: of one shape and one tap.
        denoiser: the network.
        build: see `guide`.

    Returns:
        [clips, channels, frames, h, w], of the type of the samples.
    """
    # Whoever calls this may be in inference mode, whose tensors autograd must not save. What a
    # forward pass is given is made here (stacked, gathered), so it is made of ordinary tensors.
    with exact_float32(), torch.inference_mode(False), torch.enable_grad():
        given = torch.stack([clip.input_scale * clip.sample for clip in clips])
        given = given.detach().requires_grad_()
        states = [
            replace(clip.state, latents=own.to(clip.state.latents.dtype), negative_text=None)
            for clip, own in zip(clips, given, strict=True)
        ]
        batch = build(states)
        features = denoiser.features(
            batch.latents,
            batch.timesteps,
            batch.text,
            replace(batch.controls, key_value=_key_value_control(clips, batch)),
            clips[0].guidance.tap,
        )
        losses = [
            guidance_loss(features[row], clip.guidance, clip.step)
            for row, clip in zip(batch.conditional.tolist(), clips, strict=True)
        ]
        enlarged = _ENLARGED.get(features.dtype, 1.0)
        (gradients,) = torch.autograd.grad(enlarged * torch.stack(losses).sum(), given)
    return gradients / enlarged


def _key_value_control(clips: Sequence[GuidedClip], batch: "Batch") -> KeyValueControl | None:
    given = [
        (row, clip.keys_values)
        for row, clip in zip(batch.conditional.tolist(), clips, strict=True)
        if clip.keys_values is not None
    ]
    if not given:
        return None
    slot = torch.zeros(len(batch.latents), dtype=torch.int64)
    for number, (row, _) in enumerate(given, start=1):
        slot[row] = number
    return KeyValueControl(
        slot.to(batch.latents.device),
        {
            site: KeyValueBank(
                torch.cat([kept[site].key for _, kept in given]),
                torch.cat([kept[site].value for _, kept in given]),
            )
            for site in given[0][1]
        },
    )
