"""How well generated clips of the sprites world did what was asked.

Every metric is a pure function of readings (`kinetiq.sprites.reading`), captions and paths. A clip
in which nothing was found counts as wrong; it is never dropped, or a method that destroys half of
its clips would look better for it. Captions that do not say the attribute in question do not
count, since there is nothing to be right about.

A path is an array [frames, 2] of centres (x, y) in widths of the frame, y downwards.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, permutations
from statistics import NormalDist
from typing import Protocol

import numpy as np

from kinetiq.errors import RequestError, ShapeError
from kinetiq.sprites.reading import COLOUR_TOLERANCE, ClipReading, SpriteReading
from kinetiq.sprites.world import COLOURS, MOTIONS, Caption, Mention, Path, hue_distance

# A path is still when its centres lie within half a pixel of 32 (root mean square) of their mean.
# Readings err by 0.1 pixel, by 0.3 at worst, and the shortest sampled motion (a bounce of 0.16)
# spreads over 1.5 pixels. A spread does not grow with the number of frames, as the length does
# that reading noise adds up to.
STILL_SPREAD = 0.5 / 32
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
# Backgrounds are rendered with a value of up to 0.28; half as much again is still called dark, as
# hues of up to half as much again as are rendered under a name still bear it.
LIGHTEST_DARK = 0.42
FREE_ATTRIBUTES = ("shape", "colour", "texture", "background")

_TRAVEL = (0.12, 0.7)  # sampled paths travel 0.19 to 0.5; what travels less is hardly a motion
_PHASES = 64
# A motion has a name when its best fit leaves at most this share of the path's spread (mean
# squares). Of paths read with an error of 0.5 pixel, which is more than any spoiled clip has, all
# leave less (0.09 at most); of random walks 99 in 100 leave more.
_LEFT_BY_MOTION = 0.1
_STRONGEST_TEXTURE = 0.5  # mean darkness of stripes, the darkest texture


class Looks(Protocol):
    """What `world.Sprite` and `reading.SpriteReading` both tell of a shape."""

    @property
    def shape(self) -> str | None: ...  # noqa: D102
    @property
    def hue(self) -> float: ...  # noqa: D102
    @property
    def texture(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Interval:
    """A mean, the interval that holds the true one with the stated confidence, and the count."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, eq=False)
class Fidelity:
    """`motion_fidelity` of every clip, [clips], and their mean."""

    per_clip: np.ndarray
    mean: Interval


def mean_with_interval(
    values: Sequence[float] | Sequence[bool] | np.ndarray,
    confidence: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """Mean of independent values, with its confidence interval.

    Booleans are a proportion and get Wilson's score interval (Wilson 1927, J. Am. Stat. Assoc. 22),
    which stays honest at 0 and at 1. Anything else gets Student's t interval, mean ± t·s/√n. One
    value alone says nothing about its spread: its interval is `bounds`.

    Args:
        values: one for each independent trial; all bool for a proportion.
        confidence: between 0 and 1.
        bounds: range that the mean cannot leave; the interval is cut there.

    Raises:
        RequestError: no values, a value that is not finite, or a confidence outside of (0, 1).
    """
    sample = np.asarray(values)
    if sample.ndim != 1 or sample.size == 0:
        raise RequestError(
            "mean_with_interval: values must be a list of at least one number, "
            f"got shape {list(sample.shape)}"
        )
    if not 0.0 < confidence < 1.0:
        raise RequestError(
            f"mean_with_interval: confidence must lie between 0 and 1, got {confidence:g}"
        )
    count, two_sided = sample.size, 0.5 + confidence / 2
    if sample.dtype == bool:
        share, z = float(sample.mean()), NormalDist().inv_cdf(two_sided)
        scale = 1.0 + z * z / count
        middle = (share + z * z / (2 * count)) / scale
        half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / scale
        # In exact arithmetic the interval holds the share and stays within 0 and 1.
        low, high = max(min(middle - half, share), 0.0), min(max(middle + half, share), 1.0)
        return Interval(share, low, high, count)
    sample = sample.astype(np.float64)
    if not np.isfinite(sample).all():
        raise RequestError("mean_with_interval: values must be finite, got NaN or infinity")
    mean = float(sample.mean())
    if count == 1:
        return Interval(mean, *bounds, 1)
    half = _student(two_sided, count - 1) * float(sample.std(ddof=1)) / math.sqrt(count)
    return Interval(mean, max(mean - half, bounds[0]), min(mean + half, bounds[1]), count)


@cache
def _student(probability: float, freedom: int) -> float:
    """Quantile of Student's t by integrating its density over the angle atan(t/√freedom)."""
    if freedom > 2000:  # differs from the normal quantile by less than 0.1 %
        return NormalDist().inv_cdf(probability)
    angle = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
    density = np.cos(angle).clip(0.0) ** (freedom - 1)
    below = np.cumsum(density) - 0.5 * density
    return math.sqrt(freedom) * math.tan(float(np.interp(probability * below[-1], below, angle)))


def share_difference(first: Sequence[bool], second: Sequence[bool], *, paired: bool) -> Interval:
    """Share of `first` minus share of `second`, with its 95 % interval, -1 to 1.

    Newcombe's hybrid score interval: the distances of both shares p to their Wilson limits l and u,
    low = d - √((p₁ - l₁)² - 2φ(p₁ - l₁)(u₂ - p₂) + (u₂ - p₂)²), high likewise, which stays honest
    where all agree. φ is the correlation of pairs, with his correction for continuity, and 0 for
    independent samples.

    Args:
        first: one verdict for each trial.
        second: as `first`; as many where `paired`.
        paired: whether verdicts of the same place belong to the same trial.

    Returns:
        The difference; n is the smaller count.

    Raises:
        RequestError: one of them is empty, or not of booleans.
        ShapeError: `paired` and not as many.

    Source: Newcombe 1998, Stat. Med. 17, pages 873 (independent) and 2635 (paired), method 10.
    """
    one, two = np.asarray(first), np.asarray(second)
    for name, sample in (("first", one), ("second", two)):
        if sample.size and sample.dtype != bool:
            raise RequestError(
                f"share_difference: {name} must be booleans, got {sample.dtype.name}"
            )
    if paired and len(one) != len(two):
        raise ShapeError(
            f"share_difference: pairs must be complete, got {len(one)} and {len(two)} verdicts"
        )
    a, b = mean_with_interval(one), mean_with_interval(two)
    correlation = _pair_correlation(one, two) if paired else 0.0
    reach = [
        math.sqrt(max(x * x - 2.0 * correlation * x * y + y * y, 0.0))
        for x, y in ((a.mean - a.low, b.high - b.mean), (a.high - a.mean, b.mean - b.low))
    ]
    difference = a.mean - b.mean
    return Interval(
        difference,
        max(difference - reach[0], -1.0),
        min(difference + reach[1], 1.0),
        min(a.n, b.n),
    )


def _pair_correlation(one: np.ndarray, two: np.ndarray) -> float:
    """φ of a 2x2 table; a positive one is corrected for continuity, so that it is never 1."""
    both, neither = int((one & two).sum()), int((~one & ~two).sum())
    only_one, only_two = int((one & ~two).sum()), int((~one & two).sum())
    margins = (both + only_one) * (neither + only_two) * (both + only_two) * (neither + only_one)
    if margins == 0:
        return 0.0
    excess = float(both * neither - only_one * only_two)
    if excess > 0:
        excess = max(excess - len(one) / 2, 0.0)
    return excess / math.sqrt(margins)


def displacements(path: np.ndarray) -> np.ndarray:
    """Steps between frames, d_t = p_(t+1) - p_t, [frames - 1, 2] in widths.

    Raises:
        ShapeError: `path` is not [frames, 2] or not finite.
    """
    steps: np.ndarray = np.diff(_checked(path, "displacements"), axis=0)
    return steps


def mirror_path(path: np.ndarray) -> np.ndarray:
    """The path as seen in a mirror: x becomes 1 - x."""
    x, y = _checked(path, "mirror_path").T
    return np.stack([1.0 - x, y], axis=-1)


def reverse_path(path: np.ndarray) -> np.ndarray:
    """The path walked backwards in time."""
    return _checked(path, "reverse_path")[::-1].copy()


def is_still(path: np.ndarray) -> bool:
    """Whether the centres lie within `STILL_SPREAD` of their mean, root mean square."""
    points = _checked(path, "is_still")
    return bool(np.square(points - points.mean(axis=0)).sum(1).mean() < STILL_SPREAD**2)


def path_fidelity(path: np.ndarray | None, reference: np.ndarray) -> float:
    """Σ d·d_ref / max(Σ|d|², Σ|d_ref|²) of one clip, -1 to 1.

    1 only for the same motion in direction and size; half of the size gives 0.5, the opposite
    direction -1. Both still: 1. One still: 0. None, a clip in which no shape was found: 0.

    Raises:
        ShapeError: a path is not [frames, 2], or they differ in length.
    """
    target = displacements(reference)
    if path is None:
        return 0.0
    steps = displacements(path)
    if steps.shape != target.shape:
        raise ShapeError(
            "path_fidelity: both paths must have as many frames, got "
            f"{len(steps) + 1} and {len(target) + 1}"
        )
    still = is_still(path), is_still(reference)
    if any(still):
        return float(all(still))
    largest = max(float(np.square(steps).sum()), float(np.square(target).sum()))
    return float((steps * target).sum()) / largest


def motion_fidelity(
    paths: Sequence[np.ndarray | None], references: Sequence[np.ndarray]
) -> Fidelity:
    """`path_fidelity` of every clip and its mean, -1 to 1.

    Args:
        paths: of the generated clips; None where no shape was found, which counts 0.
        references: the paths wanted, as many.

    Raises:
        ShapeError: the lists or two paths differ in length.
        RequestError: the lists are empty.
    """
    _as_many("motion_fidelity", "references", references, paths)
    each = np.array(
        [path_fidelity(path, wanted) for path, wanted in zip(paths, references, strict=True)]
    )
    return Fidelity(each, mean_with_interval(each, bounds=(-1.0, 1.0)))


def first_path(reading: ClipReading) -> np.ndarray | None:
    """Path of the clip's main shape, None where nothing was found, or not in most frames."""
    return reading.sprites[0].path if reading.sprites else None


def shape_accuracy(readings: Sequence[ClipReading], captions: Sequence[Caption]) -> Interval:
    """Share of clips that show every shape their caption names, 0 to 1."""
    return _accuracy("shape_accuracy", "shape", readings, captions, _shape_is_right)


def colour_accuracy(readings: Sequence[ClipReading], captions: Sequence[Caption]) -> Interval:
    """Share of clips whose hues lie within 15 degrees of the colours named, 0 to 1."""
    return _accuracy("colour_accuracy", "colour", readings, captions, _colour_is_right)


def texture_accuracy(readings: Sequence[ClipReading], captions: Sequence[Caption]) -> Interval:
    """Share of clips that show every texture their caption names, 0 to 1."""
    return _accuracy("texture_accuracy", "texture", readings, captions, _texture_is_right)


def motion_accuracy(readings: Sequence[ClipReading], captions: Sequence[Caption]) -> Interval:
    """Share of clips whose paths are of the kinds named (`classify_motion`), 0 to 1."""
    return _accuracy("motion_accuracy", "motion", readings, captions, _motion_is_right)


def nearest_motion_accuracy(
    readings: Sequence[ClipReading], captions: Sequence[Caption]
) -> Interval:
    """Like `motion_accuracy`, of the closest motion however rough the path is, 0 to 1.

    The difference between the two is what paths lack in precision and not in kind. A path of noise
    is close to something too, so by chance this is higher than `motion_accuracy` would be.
    """
    return _accuracy("nearest_motion_accuracy", "motion", readings, captions, _nearest_is_right)


def direction_accuracy(readings: Sequence[ClipReading], captions: Sequence[Caption]) -> Interval:
    """Share of clips that head where asked, of the captions that name left, right, up or down.

    The direction of a path is the one of the four that its whole displacement, from first frame to
    last, has most of; a path that is still has none.
    """
    directed = [
        replace(
            caption,
            mentions=tuple(
                mention if mention.motion in DIRECTIONS else replace(mention, motion=None)
                for mention in caption.mentions
            ),
        )
        for caption in captions
    ]
    return _accuracy("direction_accuracy", "motion", readings, directed, _direction_is_right)


def background_accuracy(readings: Sequence[ClipReading], captions: Sequence[Caption]) -> Interval:
    """Share of clips whose background is dark and within 15 degrees of the colour named, 0 to 1.

    Dark is a value (the strongest channel) of at most `LIGHTEST_DARK`.

    Raises:
        ShapeError: the lists differ in length.
        RequestError: no caption names a background.
    """
    _as_many("background_accuracy", "captions", captions, readings)
    right = [
        reading.background_colour == caption.background
        and reading.background_value <= LIGHTEST_DARK
        for reading, caption in zip(readings, captions, strict=True)
        if caption.background is not None
    ]
    return _share("background_accuracy", "background", right, len(captions))


def identity_leak(
    readings: Sequence[ClipReading], references: Sequence[Looks], captions: Sequence[Caption]
) -> Interval:
    """Share of clips with the reference's hue, texture or shape where the prompt names another.

    Only clips whose prompt names another colour, texture or shape than the reference's count; with
    several mentions, each of them must, or the look may be what was left open. A hue leaks when it
    lies within 15 degrees of the reference's and is not a colour asked for. A clip in which nothing
    was found counts as a leak: destroying the clip must not pay. Every shape that was read is
    judged, so a copy of the reference beside the shape asked for is a leak if `readings` were made
    with `count=2`.

    Args:
        readings: of the generated clips, with as many shapes as were found in them.
        references: the shape of each reference clip, rendered or read.
        captions: the prompts.

    Raises:
        ShapeError: the lists differ in length.
        RequestError: no prompt names anything other than its reference shows.
    """
    _as_many("identity_leak", "captions", captions, readings)
    _as_many("identity_leak", "references", references, readings)
    leaks = [
        _leaks(reading, reference, caption)
        for reading, reference, caption in zip(readings, references, captions, strict=True)
        if _names_another(reference, caption)
    ]
    if not leaks:
        raise RequestError(
            "identity_leak: at least one prompt must name a colour, texture or shape that its "
            f"reference does not show, got none in {len(captions)}"
        )
    return mean_with_interval(leaks)


def _names_another(reference: Looks, caption: Caption) -> bool:
    return any(_others(reference, caption).values())


def _others(reference: Looks, caption: Caption) -> dict[str, bool]:
    """For each attribute, whether every mention names it, and none as the reference has it."""
    mentions = caption.mentions
    return {
        "shape": bool(mentions)
        and reference.shape is not None
        and all(m.shape not in (None, reference.shape) for m in mentions),
        "texture": bool(mentions)
        and all(m.texture not in (None, reference.texture) for m in mentions),
        "colour": bool(mentions)
        and all(
            m.colour is not None
            and hue_distance(reference.hue, COLOURS[m.colour]) > COLOUR_TOLERANCE
            for m in mentions
        ),
    }


def _leaks(reading: ClipReading, reference: Looks, caption: Caption) -> bool:
    others = _others(reference, caption)
    asked = {mention.colour for mention in caption.mentions}
    return not reading.sprites or any(
        (others["shape"] and sprite.shape == reference.shape)
        or (others["texture"] and sprite.texture == reference.texture)
        or (
            others["colour"]
            and hue_distance(sprite.hue, reference.hue) <= COLOUR_TOLERANCE
            and (sprite.colour is None or sprite.colour not in asked)
        )
        for sprite in reading.sprites
    )


def consistency(
    shots: Sequence[ClipReading], free: Collection[str] = ("shape", "colour", "texture")
) -> float:
    """Share of pairs of shots whose free attributes all agree, 0 to 1.

    Textures agree when equal, shapes when equal and not None, colours and backgrounds when their
    hues lie within 15 degrees. A pair agrees with nothing when a shot shows no shape. Pairs of one
    set are not independent, so an interval belongs over sets: `mean_with_interval` of their
    consistencies.

    Args:
        shots: readings of the shots of one subject, at least two.
        free: the attributes that the prompts left open, of `FREE_ATTRIBUTES`.

    Raises:
        RequestError: fewer than two shots, or an unknown or missing attribute.
    """
    unknown = sorted(set(free) - set(FREE_ATTRIBUTES))
    if unknown or not free:
        raise RequestError(
            f"consistency: free must name some of {', '.join(FREE_ATTRIBUTES)}, "
            f"got {', '.join(unknown) or 'nothing'}"
        )
    if len(shots) < 2:
        raise RequestError(f"consistency: shots must be at least 2, got {len(shots)}")
    pairs = [_agree(one, other, free) for one, other in combinations(shots, 2)]
    return float(np.mean(pairs))


def _agree(one: ClipReading, other: ClipReading, free: Collection[str]) -> bool:
    if not one.sprites or not other.sprites:
        return False
    first, second = one.sprites[0], other.sprites[0]
    agreement = {
        "shape": first.shape is not None and first.shape == second.shape,
        "colour": hue_distance(first.hue, second.hue) <= COLOUR_TOLERANCE,
        "texture": first.texture == second.texture,
        "background": hue_distance(one.background_hue, other.background_hue) <= COLOUR_TOLERANCE,
    }
    return all(agreement[name] for name in free)


def frame_consistency(reading: ClipReading) -> float:
    """1 minus the mean change of hue, texture and size between frames, 0 to 1.

    Per pair of neighbouring frames, the mean of: change of hue / 180 degrees, change of the
    texture's darkness / 0.5 (that of stripes), change of radius / mean radius; each at most 1. A
    pair with a frame in which the shape is not visible counts as a full change. The shapes of a
    clip are averaged. One frame: 1. Nothing found: 0.
    """
    if not reading.sprites:
        return 0.0
    return float(np.mean([_steadiness(sprite) for sprite in reading.sprites]))


def _steadiness(sprite: SpriteReading) -> float:
    if len(sprite.visible) < 2:
        return 1.0
    turns = np.abs((np.diff(sprite.frame_hue) + 180.0) % 360.0 - 180.0) / 180.0
    shades = np.abs(np.diff(sprite.frame_texture)) / _STRONGEST_TEXTURE
    sizes = np.abs(np.diff(sprite.frame_radius)) / sprite.radius
    change = np.stack([turns, shades, sizes]).clip(0.0, 1.0).mean(axis=0)
    both = sprite.visible[1:] & sprite.visible[:-1]
    return float(1.0 - np.where(both, change, 1.0).mean())


def classify_motion(path: np.ndarray) -> tuple[str | None, dict[str, float]]:
    """Which of `world.MOTIONS` a path shows, by least squares.

    Every motion's path is fitted over centre, travel (0.12 to 0.7), phase and heading; the closest
    wins. A path that `is_still` is still. A path of which the closest leaves more than a tenth of
    the mean squared distance from its own mean is none of them.

    Returns:
        The motion or None, and for every motion the score 1 / (1 + e / `STILL_SPREAD`), 0 to 1,
        where e is the root mean square distance that its best fit leaves, in widths. A still path
        may be close to other motions too; the name is the decision.

    Raises:
        ShapeError: `path` is not [frames, 2], or has fewer than 3 frames, which every motion fits.
    """
    points = _checked(path, "classify_motion")
    if len(points) < 3:
        raise ShapeError(f"classify_motion: path must have at least 3 frames, got {len(points)}")
    around = points - points.mean(axis=0)
    scores, errors = {}, {}
    for motion in MOTIONS:
        shapes = _templates(motion, len(points))  # [candidates, frames, 2], of unit travel
        size = np.square(shapes).sum((1, 2))
        along = (shapes * around).sum((1, 2)) / np.maximum(size, 1e-12)
        travel = along.clip(*_TRAVEL)[:, None, None]
        errors[motion] = float(np.square(around - travel * shapes).sum(2).mean(1).min())
        scores[motion] = 1.0 / (1.0 + math.sqrt(errors[motion]) / STILL_SPREAD)
    closest = _nearest(points, scores)
    if closest == "still":
        return "still", scores
    spread = float(np.square(around).sum(1).mean())
    return (closest if errors[closest] <= _LEFT_BY_MOTION * spread else None), scores


def _nearest(points: np.ndarray, scores: dict[str, float]) -> str:
    """The motion of the best score; still alone where the path is."""
    if is_still(points):
        return "still"
    return max((motion for motion in MOTIONS if motion != "still"), key=scores.__getitem__)


@cache
def _templates(motion: str, frames: int) -> np.ndarray:
    """Paths of unit travel about their mean, over phases and headings."""
    periodic = motion in {"circling", "zigzagging", "bouncing"}
    phases = np.arange(_PHASES) / _PHASES if periodic else np.zeros(1)
    headings = (-1.0, 1.0) if periodic else (1.0,)
    paths = np.stack(
        [
            Path(motion, travel=1.0, phase=float(phase), heading=heading).points(frames)
            for phase in phases
            for heading in headings
        ]
    )
    centred: np.ndarray = paths - paths.mean(axis=1, keepdims=True)
    return centred


def _shape_is_right(sprite: SpriteReading, named: str) -> bool:
    return sprite.shape == named


def _colour_is_right(sprite: SpriteReading, named: str) -> bool:
    return sprite.colour == named


def _texture_is_right(sprite: SpriteReading, named: str) -> bool:
    return sprite.texture == named


def _motion_is_right(sprite: SpriteReading, named: str) -> bool:
    return sprite.path is not None and classify_motion(sprite.path)[0] == named


def _nearest_is_right(sprite: SpriteReading, named: str) -> bool:
    if sprite.path is None:
        return False
    return _nearest(sprite.path, classify_motion(sprite.path)[1]) == named


def _direction_is_right(sprite: SpriteReading, named: str) -> bool:
    return sprite.path is not None and direction(sprite.path) == named


def direction(path: np.ndarray) -> str | None:
    """Which of the four directions the displacement from first to last frame has most of.

    None for a path that ends so near to its beginning that a straight run of that length would be
    still: its spread is its length / √12.
    """
    points = _checked(path, "direction")
    whole = points[-1] - points[0]
    if float(np.hypot(*whole)) < math.sqrt(12.0) * STILL_SPREAD:
        return None
    return max(DIRECTIONS, key=lambda name: float(np.dot(DIRECTIONS[name], whole)))


def match_sprites(reading: ClipReading, caption: Caption) -> tuple[SpriteReading | None, ...]:
    """For each mention of `caption`, the shape that it means.

    The clip's shapes are given to the mentions so that as many of the attributes named as possible
    are right; of equals, the largest come first. A mention for which no shape is left gets None.
    """
    count = len(caption.mentions)
    sprites: list[SpriteReading | None] = list(reading.sprites)
    sprites += [None] * (count - len(sprites))
    return max(permutations(sprites, count), key=lambda order: _agreement(order, caption.mentions))


def _agreement(sprites: Sequence[SpriteReading | None], mentions: Sequence[Mention]) -> int:
    return sum(
        right(sprite, named)
        for sprite, mention in zip(sprites, mentions, strict=True)
        for attribute, right in _JUDGES.items()
        if sprite is not None and (named := getattr(mention, attribute)) is not None
    )


_JUDGES: dict[str, Callable[[SpriteReading, str], bool]] = {
    "shape": _shape_is_right,
    "colour": _colour_is_right,
    "texture": _texture_is_right,
    "motion": _motion_is_right,
}


def _accuracy(
    where: str,
    attribute: str,
    readings: Sequence[ClipReading],
    captions: Sequence[Caption],
    right: Callable[[SpriteReading, str], bool],
) -> Interval:
    """Share of the clips whose caption says `attribute` that show it for every mention.

    Raises:
        ShapeError: the lists differ in length.
        RequestError: no caption says the attribute.
    """
    _as_many(where, "captions", captions, readings)
    verdicts = []
    for reading, caption in zip(readings, captions, strict=True):
        named = [getattr(mention, attribute) for mention in caption.mentions]
        if any(named):
            sprites = match_sprites(reading, caption)
            verdicts.append(
                all(
                    sprite is not None and right(sprite, value)
                    for sprite, value in zip(sprites, named, strict=True)
                    if value is not None
                )
            )
    return _share(where, attribute, verdicts, len(captions))


def _share(where: str, attribute: str, verdicts: Sequence[bool], count: int) -> Interval:
    if not verdicts:
        raise RequestError(
            f"{where}: at least one caption must name a {attribute}, got none in {count}"
        )
    return mean_with_interval(verdicts)


def _as_many(where: str, name: str, values: Sequence[object], clips: Sequence[object]) -> None:
    if len(values) != len(clips):
        raise ShapeError(
            f"{where}: {name} must be as many as the clips, {len(clips)}, got {len(values)}"
        )


def _checked(path: np.ndarray, where: str) -> np.ndarray:
    points = np.asarray(path, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0:
        raise ShapeError(f"{where}: path must be [frames, 2], got {list(points.shape)}")
    if not np.isfinite(points).all():
        raise ShapeError(f"{where}: path must be finite, got NaN or infinity")
    return points
