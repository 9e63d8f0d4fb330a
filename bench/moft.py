"""MOFT on the embedded model: what its features know of motion, and how well it is steered by them.

What is measured, with plain sampling of the same prompts and seeds beside it:

- The feature itself: whether channels found on other pans are the same, and whether the clip whose
  feature is nearest moves alike. Each picture is shown in every motion, so the clip that looks most
  alike moves otherwise; among clips of other pictures alone, the raw feature may do well too.
- Directions, on prompts that say nothing of motion.
- References, whose looks the prompts contradict, so that what leaks is seen.
- Two regions, drawn around the two shapes that plain sampling shows; where it does not show both
  apart from each other, the halves of the frame. Motions are opposite, across what lies between.
- Drags of what plain sampling shows in its first frame to a place that is free, along one of the
  directions that the model knows, and in a row apart along a diagonal. A clip without the shape
  has missed by a whole width.
- The paper's ablation and its sweep of the share of channels, on references that move straight.

A clip whose latents became NaN or infinite shows nothing, and counts as such. Clips take `STEPS`
steps in bfloat16, which on a CPU is a quarter of the time of the default; of these the published
window guides five. What steers with the published switches as they are takes its 25 steps.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinetiq.bench.figures import Figure
from kinetiq.bench.harness import Bench, BenchOptions, Progress
from kinetiq.bench.sprites import figure
from kinetiq.clip import Clip
from kinetiq.engine import Engine
from kinetiq.errors import NonFiniteError
from kinetiq.moft import (
    AXES,
    DIRECTIONS,
    SHARE,
    STILLS,
    MotionChannels,
    calibrate,
    load_channels,
    middle,
    middle_curve,
    reference_features,
)
from kinetiq.moft_analysis import channel_agreement, strength
from kinetiq.moft_guidance import MoftGuidance, MoftRegion
from kinetiq.request import Request
from kinetiq.sprites import components, metrics, world
from kinetiq.sprites.cases import TransferPair, render_clip, score_transfer, transfer_pairs
from kinetiq.sprites.reading import ClipReading, SpriteReading, read_clips
from kinetiq.sprites.world import Caption, Mention, Scene

GUIDANCE: dict[str, Any] = {}
"""Switches of `MoftGuidance` in which the bench differs from the published ones.

A drag leaves `window` out, and what is no drag `drag_window`.
"""

STEPS = 12
PUBLISHED_STEPS = 25
CLASSES = (*DIRECTIONS, "still")
IDENTITY = {
    "colour": metrics.colour_accuracy,
    "shape": metrics.shape_accuracy,
    "background": metrics.background_accuracy,
}
NOTHING = ClipReading(
    sprites=(),
    frames=components.FRAMES,
    background_hue=0.0,
    background_value=1.0,
    background_colour=None,
    residual=0.0,
)
"""What a clip shows whose latents became NaN or infinite."""

_WAYS = tuple(DIRECTIONS)
_ROWS = 8  # clips whose features are read at a time
_MARGIN = 0.2  # of the frame, which the world's paths keep free
_LONGEST_DRAG = 0.4  # of the width, as the middle of the world's straight paths
_LEAST_ROOM = 0.25  # of the width, as the shortest of them
_LEAST_APART = 0.1  # of the width, for two shapes to have regions of their own
_FARTHEST = 3.0  # in widths: no two places that are read are farther apart
_HALVES = ((0.25, 0.5), (0.75, 0.5))

Point = tuple[float, float]
Readings = list[ClipReading]


@dataclass(frozen=True)
class Sample:
    """How much is measured.

    Args:
        clips: of a headline, at least twice as many as of a row.
        rows: clips of a row of a table.
        pictures: that are shown in every motion.
        calibrations: that the model's own channels are compared with.
        stills: of each calibration.
        shares: of the channels, in the sweep.
    """

    clips: int
    rows: int
    pictures: int
    calibrations: int
    stills: int
    shares: tuple[float, ...]


FULL = Sample(
    clips=64,
    rows=16,
    pictures=12,
    calibrations=2,
    stills=STILLS,
    shares=(0.5, 0.1, 0.05, 0.04, 0.03, 0.01),
)
QUICK = Sample(clips=2, rows=1, pictures=2, calibrations=1, stills=2, shares=(0.01,))


def measure(options: BenchOptions, progress: Progress) -> dict[str, Figure]:
    """Read features in float32, then steer in bfloat16."""
    sample = QUICK if options.quick else FULL
    with Engine.load("sprites", device=options.device) as engine:
        figures = feature_figures(engine, sample, options.seed, progress)
    with Engine.load("sprites", device=options.device, dtype="bfloat16") as engine:
        return figures | steering_figures(engine, sample, options.seed, progress)


# The feature.


def feature_figures(
    engine: Engine, sample: Sample, seed: int, progress: Progress
) -> dict[str, Figure]:
    """How stable the channels are, and what is near to what."""
    checkpoint, denoiser = engine.checkpoint, engine.denoiser
    channels = load_channels(checkpoint, denoiser)
    seeds = range(seed + 1, seed + 1 + sample.calibrations)  # its own were found with seed 0
    others = [
        calibrate(checkpoint, denoiser, stills=sample.stills, seed=one)
        for one in progress.track(seeds, "calibrations")
    ]
    rng = np.random.default_rng([seed, 4])
    pictures = [picture_in_motions(rng) for _ in range(sample.pictures)]
    clips = [render_clip(scene) for picture in pictures for scene in picture]
    features = read_features(engine, clips, channels.tap)
    return channel_figures([channels, *others]) | motion_figures(features, channels)


def read_features(engine: Engine, clips: Sequence[Clip], tap: str) -> Tensor:
    """What a tap makes of clips, [clips, frames, h, w, channels], float32."""
    features = []
    for first in range(0, len(clips), _ROWS):
        latents = torch.stack([engine.encode(clip) for clip in clips[first : first + _ROWS]])
        read = reference_features(engine.checkpoint, engine.denoiser, latents, tap)
        features.append(read.cpu())
    return torch.cat(features)


def picture_in_motions(rng: np.random.Generator) -> list[Scene]:
    """One shape on one background, in each motion of `CLASSES`."""
    sprite = world.sample_sprite(rng, motion="still", room=0.25)
    ground = float(rng.uniform(0.0, 360.0))
    return [
        Scene(
            (replace(sprite, path=replace(sprite.path, motion=motion, travel=_travel(rng))),),
            background_hue=ground,
        )
        for motion in CLASSES
    ]


def _travel(rng: np.random.Generator) -> float:
    return float(rng.uniform(0.25, 0.5))


def channel_figures(found: Sequence[MotionChannels]) -> dict[str, Figure]:
    """How alike channels are that were found on different pans: the worst pair, and each axis."""
    pairs = list(itertools.combinations(found, 2))
    agreements = {
        axis: [channel_agreement(one, other, axis).value for one, other in pairs] for axis in AXES
    }
    figures = {
        "moft.channel_agreement": Figure(min(map(min, agreements.values())), n=len(pairs)),
    }
    for axis, values in agreements.items():
        sets = [(set(a.select(axis).tolist()), set(b.select(axis).tolist())) for a, b in pairs]
        overlaps = [len(a & b) / len(a | b) for a, b in sets]
        figures[f"moft.channel_agreement.{axis}"] = Figure(float(np.mean(values)), n=len(pairs))
        figures[f"moft.channel_jaccard.{axis}"] = Figure(float(np.mean(overlaps)), n=len(pairs))
    return figures


def motion_figures(features: Tensor, channels: MotionChannels) -> dict[str, Figure]:
    """What features know of motion.

    Clips of one picture are not independent, so intervals count pictures.

    Args:
        features: [pictures * classes, frames, h, w, C], the classes of each picture in a row.
        channels: of the model.
    """
    classes, pictures = len(CLASSES), len(features) // len(CLASSES)
    points = {
        "": middle_curve(features, channels.select()),
        "_raw": middle(features).mean((-3, -2)),
    }
    hits = {name: neighbour_hits(point) for name, point in points.items()}
    figures = {f"moft.neighbours{name}": by_picture(hit, pictures) for name, hit in hits.items()}
    figures["moft.neighbours_gain"] = by_picture(hits[""] - hits["_raw"], pictures, low=-1.0)
    if pictures > 1:
        for name, point in points.items():
            hit = neighbour_hits(point, other_pictures=True)
            figures[f"moft.neighbours{name}_of_other_pictures"] = by_picture(hit, pictures)
    curves = middle_curve(features)
    grown = [channels.slopes(curve) for curve in curves]
    right = [
        np.sign(grown[row][axis]) == (-1.0, 1.0)[ways.index(CLASSES[row % classes])]
        for row in range(len(features))
        for axis, ways in AXES.items()
        if CLASSES[row % classes] in ways
    ]
    figures["moft.sign_accuracy"] = by_picture(np.asarray(right, dtype=float), pictures)
    still = torch.arange(len(features)) % classes == CLASSES.index("still")
    left_over = strength(points[""][still]) / strength(points[""][~still])
    figures["moft.still_strength"] = Figure(left_over, n=pictures)
    return figures


def neighbour_hits(points: Tensor, *, other_pictures: bool = False) -> np.ndarray:
    """Whether the clip whose feature is nearest moves alike, [pictures * classes] of 0 or 1.

    Args:
        points: [pictures * classes, ...], the classes of each picture in a row.
        other_pictures: whether only clips of other pictures are neighbours.
    """
    flat = points.flatten(1).double()
    number = torch.arange(len(flat))
    group = number // len(CLASSES) if other_pictures else number
    distance = torch.cdist(flat, flat).masked_fill(group[:, None] == group, math.inf)
    hits: np.ndarray = (distance.argmin(1) % len(CLASSES) == number % len(CLASSES)).numpy()
    return hits.astype(float)


def by_picture(values: np.ndarray, pictures: int, low: float = 0.0) -> Figure:
    """The mean of values of which each picture has as many, in a row."""
    means = values.reshape(pictures, -1).mean(1)
    return figure(metrics.mean_with_interval(means, bounds=(low, 1.0)))


# Steering.


def guidance(**wanted: Any) -> MoftGuidance:
    """The bench's guidance towards what is wanted."""
    left_out = "window" if "points" in wanted else "drag_window"
    switches = {name: value for name, value in GUIDANCE.items() if name != left_out}
    return MoftGuidance(**(switches | wanted))


def steering_figures(
    engine: Engine, sample: Sample, seed: int, progress: Progress
) -> dict[str, Figure]:
    """How clips go where they are steered, and whether they still show what the prompts ask for."""
    pairs = transfer_pairs(sample.clips, seed)
    numbers = [n for n, pair in enumerate(pairs) if pair.sprite.path.motion in _WAYS]
    numbers = numbers[: sample.rows]
    straight = [pairs[number] for number in numbers]
    two = two_shapes(sample.clips, seed)
    captions = [pair.caption for pair in pairs]
    readings: dict[str, Readings] = {}

    def generate(jobs: Mapping[str, Sequence[Request]], label: str) -> None:
        for name in progress.track(jobs, label):
            readings[name] = generate_readings(engine, jobs[name])

    generate(
        {
            "plain": [request_of(pair) for pair in pairs],
            "plain_two": [_request_two(number, caption) for number, caption in enumerate(two)],
        },
        "plain",
    )
    readings["plain_straight"] = [readings["plain"][number] for number in numbers]
    drags = draw_drags(readings["plain"], captions, seed)
    diagonals = draw_drags(readings["plain"], captions, seed, diagonal=True)[: sample.rows]
    layouts = [lay_out(*both) for both in zip(readings["plain_two"], two, strict=True)]
    size = engine.defaults.width
    generate(
        {
            "direction": [
                request_of(pair, guidance(direction=asked(number)))
                for number, pair in enumerate(pairs)
            ],
            "published": [
                request_of(pair, MoftGuidance(direction=asked(number)), steps=PUBLISHED_STEPS)
                for number, pair in enumerate(pairs[: sample.rows])
            ],
            "reference": [request_of(pair, guidance(reference=pair.reference())) for pair in pairs],
            "two": [
                _request_two(number, caption, guidance(regions=layout.regions(size)))
                for number, (caption, layout) in enumerate(zip(two, layouts, strict=True))
            ],
            "drag": [
                request_of(pair, guidance(points=[drag.points(size)]))
                for pair, drag in zip(pairs, drags, strict=True)
            ],
            "diagonal": [
                request_of(pair, guidance(points=[drag.points(size)]))
                for pair, drag in zip(pairs[: sample.rows], diagonals, strict=True)
            ],
        },
        "steered",
    )
    generate(table_requests(straight, sample.shares), "tables")
    every = [reading for several in readings.values() for reading in several]
    return (
        direction_figures(readings, captions)
        | reference_figures(readings, pairs)
        | region_figures(readings, two, layouts)
        | drag_figures(readings, captions, drags, diagonals)
        | table_figures(readings, straight, sample.shares)
        | {"moft.not_finite": figure(_share(reading is NOTHING for reading in every))}
    )


def request_of(pair: TransferPair, control: Any = None, steps: int = STEPS) -> Request:
    """A clip of a pair's prompt and seed."""
    return Request(pair.caption.text, control, seed=pair.seed, steps=steps)


def _request_two(number: int, caption: Caption, control: Any = None) -> Request:
    return Request(caption.text, control, seed=number, steps=STEPS)


def asked(number: int) -> str:
    """The direction that clip `number` is asked to go in; each as often."""
    return _WAYS[number % len(_WAYS)]


def generate_readings(engine: Engine, requests: Sequence[Request]) -> Readings:
    """Generate clips and read back at most two shapes of each.

    What became NaN or infinite is read as `NOTHING`; anything else that goes wrong is raised.
    """
    made = list(engine.generate_many(requests, on_error="return"))
    readings: Readings = [NOTHING] * len(made)
    whole = []
    for place, clip in enumerate(made):
        if isinstance(clip, NonFiniteError):
            continue
        if isinstance(clip, Exception):
            raise clip
        whole.append((place, clip.frames))
    found = read_clips([frames for _, frames in whole], count=2)
    for (place, _), reading in zip(whole, found, strict=True):
        readings[place] = reading
    return readings


def meant(reading: ClipReading, caption: Caption) -> SpriteReading | None:
    """The shape that a caption of one shape means."""
    return metrics.match_sprites(reading, caption)[0]


def goes(sprite: SpriteReading | None, way: str) -> bool:
    """Whether a shape was found and its dominant displacement is `way`."""
    return sprite is not None and sprite.path is not None and metrics.direction(sprite.path) == way


def direction_figures(
    readings: Mapping[str, Readings], captions: Sequence[Caption]
) -> dict[str, Figure]:
    """Directions: those of `asked`."""
    verdicts = {
        name: [
            goes(meant(reading, caption), asked(number))
            for number, (reading, caption) in enumerate(
                zip(readings[name], captions, strict=False)  # the published are fewer
            )
        ]
        for name in ("direction", "plain", "published")
    }
    guided, plain = verdicts["direction"], verdicts["plain"]
    return {
        "moft.direction_accuracy": figure(_share(guided)),
        "moft.plain_direction_accuracy": figure(_share(plain)),
        "moft.published_direction_accuracy": figure(_share(verdicts["published"])),
        "moft.direction_gain": figure(metrics.share_difference(guided, plain, paired=True)),
        **{
            f"moft.direction_accuracy.{way}": figure(_share(guided[place :: len(_WAYS)]))
            for place, way in enumerate(_WAYS)
            if guided[place :: len(_WAYS)]
        },
        **identity_figures("moft", readings["direction"], readings["plain"], captions),
        **{
            f"moft.plain_{name}_accuracy": figure(_share(right))
            for name, right in identities(readings["plain"], captions).items()
        },
    }


def identities(readings: Readings, captions: Sequence[Caption]) -> dict[str, list[bool]]:
    """Which clips show what is asked for: each attribute, and all of them ("identity")."""
    each = {
        name: [
            accuracy([reading], [caption]).mean == 1.0
            for reading, caption in zip(readings, captions, strict=True)
        ]
        for name, accuracy in IDENTITY.items()
    }
    return {"identity": [all(right) for right in zip(*each.values(), strict=True)], **each}


def identity_figures(
    stem: str, guided: Readings, plain: Readings, captions: Sequence[Caption]
) -> dict[str, Figure]:
    """Identity under guidance, and how much less it is than in plain sampling, clip by clip."""
    steered, free = identities(guided, captions), identities(plain, captions)
    accuracies = {f"{stem}.{name}_accuracy": figure(_share(x)) for name, x in steered.items()}
    return accuracies | {
        f"{stem}.{name}_drop": figure(metrics.share_difference(free[name], right, paired=True))
        for name, right in steered.items()
    }


def reference_figures(
    readings: Mapping[str, Readings], pairs: Sequence[TransferPair]
) -> dict[str, Figure]:
    """References: the motion that arrives, and the looks that leak."""
    figures: dict[str, Figure] = {}
    scores = {}
    for stem, name in {"": "reference", "plain_": "plain"}.items():
        scores[name] = score_transfer(readings[name], pairs)
        figures[f"moft.{stem}motion_fidelity"] = figure(scores[name].motion_fidelity)
        figures[f"moft.{stem}identity_leak"] = figure(scores[name].identity_leak)
    steered, free = scores["reference"], scores["plain"]
    gain = np.subtract(steered.fidelities, free.fidelities)
    extra = metrics.share_difference(steered.leaks, free.leaks, paired=True)
    figures["moft.fidelity_gain"] = figure(metrics.mean_with_interval(gain, bounds=(-2.0, 2.0)))
    figures["moft.extra_leak"] = figure(extra)
    captions = [pair.caption for pair in pairs]
    return figures | identity_figures(
        "moft.reference", readings["reference"], readings["plain"], captions
    )


# Two regions.


@dataclass(frozen=True)
class Layout:
    """Two regions and the ways that what is in them is to go.

    Args:
        centres: places are of the region whose centre is nearest, (x, y) in widths.
        ways: of the regions.
        drawn: whether the centres are those of two shapes; they are of halves otherwise.
    """

    centres: tuple[Point, Point]
    ways: tuple[str, str]
    drawn: bool

    def regions(self, size: int) -> tuple[MoftRegion, ...]:
        """The regions of frames of `size`."""
        axis = (np.arange(size) + 0.5) / size
        first, second = (np.hypot(axis - x, axis[:, None] - y) for x, y in self.centres)
        nearer = first <= second
        masks = (nearer, ~nearer)
        return tuple(
            MoftRegion(mask, direction=way) for mask, way in zip(masks, self.ways, strict=True)
        )


def two_shapes(count: int, seed: int) -> list[Caption]:
    """Captions of two shapes of different colours and outlines that say nothing of motion."""
    rng = np.random.default_rng([seed, 5])
    captions = []
    for _ in range(count):
        shapes = rng.permutation(world.SHAPES)[:2]
        colours = rng.permutation(list(world.COLOURS))[:2]
        mentions = tuple(
            Mention(str(shape), str(colour)) for shape, colour in zip(shapes, colours, strict=True)
        )
        captions.append(Caption(mentions, str(rng.choice(list(world.COLOURS)))))
    return captions


def lay_out(reading: ClipReading, caption: Caption) -> Layout:
    """Regions around the two shapes of plain sampling, which are to go past each other."""
    centres, drawn = _HALVES, False
    means = [path.mean(0) for path in _paths(reading, caption) if path is not None]
    if len(means) == 2 and math.dist(*means) >= _LEAST_APART:
        (x0, y0), (x1, y1) = (map(float, mean) for mean in means)
        centres, drawn = ((x0, y0), (x1, y1)), True
    (x0, y0), (x1, y1) = centres
    ways = AXES["vertical" if abs(x1 - x0) >= abs(y1 - y0) else "horizontal"]
    return Layout(centres, (ways[0], ways[1]), drawn)


def _paths(reading: ClipReading, caption: Caption) -> list[np.ndarray | None]:
    """The path of each shape that a caption names."""
    sprites = metrics.match_sprites(reading, caption)
    return [None if sprite is None else sprite.path for sprite in sprites]


def region_figures(
    readings: Mapping[str, Readings], captions: Sequence[Caption], layouts: Sequence[Layout]
) -> dict[str, Figure]:
    """Two regions: the shape of each goes its way. Regions of one clip count as one trial."""
    figures = {"moft.region_drawn": figure(_share(layout.drawn for layout in layouts))}
    for stem, name in {"": "two", "plain_": "plain_two"}.items():
        right = [
            [
                goes(sprite, way)
                for sprite, way in zip(
                    metrics.match_sprites(reading, caption), layout.ways, strict=True
                )
            ]
            for reading, caption, layout in zip(readings[name], captions, layouts, strict=True)
        ]
        shares = [float(np.mean(both)) for both in right]
        figures[f"moft.{stem}region_accuracy"] = figure(
            metrics.mean_with_interval(shares, bounds=(0.0, 1.0))
        )
        figures[f"moft.{stem}region_both_accuracy"] = figure(_share(map(all, right)))
    return figures | identity_figures(
        "moft.region", readings["two"], readings["plain_two"], captions
    )


# Drags.


@dataclass(frozen=True)
class Drag:
    """From where to where a shape is dragged, (x, y) in widths."""

    start: Point
    end: Point

    def points(self, size: int) -> tuple[Point, Point]:
        """Both in pixels of frames of `size`, inside of them."""
        start, end = (
            tuple(min(max(size * place - 0.5, 0.0), size - 1.0) for place in point)
            for point in (self.start, self.end)
        )
        return (start[0], start[1]), (end[0], end[1])


def draw_drags(
    readings: Readings, captions: Sequence[Caption], seed: int, *, diagonal: bool = False
) -> list[Drag]:
    """A drag for each clip, from where its shape is at first; from the middle if there is none."""
    rng = np.random.default_rng([seed, 6, int(diagonal)])
    drags = []
    for reading, caption in zip(readings, captions, strict=True):
        (path,) = _paths(reading, caption)
        start = np.full(2, 0.5) if path is None else path[0].clip(0.0, 1.0)
        drags.append(_draw_drag(rng, start, diagonal=diagonal))
    return drags


def _draw_drag(rng: np.random.Generator, start: np.ndarray, *, diagonal: bool) -> Drag:
    """As far as there is room for, in one of the directions with room enough."""
    signs = [-1.0, 0.0, 1.0]
    ways = [
        np.array(way) / np.linalg.norm(way)
        for way in itertools.product(signs, signs)
        if any(way) and all(way) == diagonal
    ]
    rooms = [_room(start, way) for way in ways]
    free = [place for place, room in enumerate(rooms) if room >= _LEAST_ROOM]
    chosen = int(rng.choice(free))
    end = start + min(rooms[chosen], _LONGEST_DRAG) * ways[chosen]
    return Drag((float(start[0]), float(start[1])), (float(end[0]), float(end[1])))


def _room(start: np.ndarray, way: np.ndarray) -> float:
    """How far it is from a place along a way to the margin."""
    moves = way != 0.0
    edge = np.where(way > 0.0, 1.0 - _MARGIN, _MARGIN)
    return float(((edge - start)[moves] / way[moves]).min())


def drag_figures(
    readings: Mapping[str, Readings],
    captions: Sequence[Caption],
    drags: Sequence[Drag],
    diagonals: Sequence[Drag],
) -> dict[str, Figure]:
    """Drags: how far from its end a shape is at last.

    That is split into how far from the drag's start it was at first, and how much its displacement
    differs from the drag.
    """
    asked_of = {
        "drag": ("drag", drags),
        "plain_drag": ("plain", drags),
        "diagonal_drag": ("diagonal", diagonals),
    }
    figures = {}
    for stem, (name, wanted) in asked_of.items():
        misses = [
            _misses(_paths(reading, caption)[0], drag)
            # A row of the table is of fewer clips.
            for reading, caption, drag in zip(readings[name], captions, wanted, strict=False)
        ]
        columns = zip(
            ("error", "start_error", "displacement_error"), zip(*misses, strict=True), strict=True
        )
        for part, values in columns:
            interval = metrics.mean_with_interval(values, bounds=(0.0, _FARTHEST))
            figures[f"moft.{stem}_{part}"] = figure(interval)
    return figures | identity_figures("moft.drag", readings["drag"], readings["plain"], captions)


def _misses(path: np.ndarray | None, drag: Drag) -> tuple[float, float, float]:
    """By how much a path misses the end of a drag, its start, and its displacement, in widths."""
    if path is None:
        return 1.0, 1.0, 1.0
    first, last = path[0] - drag.start, path[-1] - drag.end
    return float(np.hypot(*last)), float(np.hypot(*first)), float(np.hypot(*(last - first)))


# Tables.


def table_rows(shares: Sequence[float]) -> dict[str, dict[str, Any]]:
    """What each row of references changes."""
    share = GUIDANCE.get("share", SHARE)
    return {
        "ablation.raw": {"feature": "raw"},
        "ablation.content_removed": {"feature": "content_removed"},
        "ablation.moft": {"feature": "moft", "share": share},
        # All channels are the feature before its channels are chosen.
        "share.100": {"feature": "content_removed"},
        **{f"share.{round(100 * one):03d}": {"feature": "moft", "share": one} for one in shares},
    }


def _sources(shares: Sequence[float]) -> dict[str, str]:
    """Of each row of references, the first that changes what it does: its clips are the same."""
    rows = table_rows(shares)
    return {
        row: next(first for first, same in rows.items() if same == switches)
        for row, switches in rows.items()
    }


def table_requests(
    straight: Sequence[TransferPair], shares: Sequence[float]
) -> dict[str, list[Request]]:
    """The clips of the rows: a synthesised target is a direction, the others are references."""
    rows = table_rows(shares)
    requests = {
        row: [
            request_of(pair, guidance(reference=pair.reference(), **rows[row])) for pair in straight
        ]
        for row in dict.fromkeys(_sources(shares).values())
    }
    synthesised = [
        request_of(pair, guidance(direction=pair.sprite.path.motion)) for pair in straight
    ]
    return {**requests, "ablation.synthesised": synthesised}


def table_figures(
    readings: Mapping[str, Readings],
    straight: Sequence[TransferPair],
    shares: Sequence[float],
) -> dict[str, Figure]:
    """The rows of the ablation and of the sweep, with plain sampling of the same prompts."""
    captions = [pair.caption for pair in straight]
    sources = {
        **_sources(shares),
        "ablation.synthesised": "ablation.synthesised",
        "ablation.plain": "plain_straight",
    }
    figures: dict[str, Figure] = {}
    for row, source in sources.items():
        found = readings[source]
        scores = score_transfer(found, straight)
        right = [
            goes(meant(reading, pair.caption), pair.sprite.path.motion)
            for reading, pair in zip(found, straight, strict=True)
        ]
        figures |= {
            f"moft.{row}.direction_accuracy": figure(_share(right)),
            f"moft.{row}.motion_fidelity": figure(scores.motion_fidelity),
            f"moft.{row}.frame_consistency": figure(scores.frame_consistency),
            f"moft.{row}.identity_accuracy": figure(
                _share(identities(found, captions)["identity"])
            ),
        }
    return figures


def _share(verdicts: Iterable[bool]) -> metrics.Interval:
    return metrics.mean_with_interval(list(verdicts))


BENCH = Bench("moft", "what MOFT knows of motion, and how well it steers", measure)
