"""The bench of MOFT: what its figures mean, on features and clips that are made up."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kinetiq.bench import moft
from kinetiq.bench.harness import BenchOptions, Progress
from kinetiq.clip import Clip
from kinetiq.engine import Engine
from kinetiq.errors import NonFiniteError, RequestError
from kinetiq.moft import AXES, DIRECTIONS, STILLS, Knots, MotionChannels
from kinetiq.sprites import world
from kinetiq.sprites.cases import transfer_pairs
from kinetiq.sprites.reading import read_clips

FRAMES, WIDTH = 8, 32
SHARES = (0.04, 0.01)  # reading clips takes most of the time here
SAMPLE = moft.Sample(clips=4, rows=2, pictures=2, calibrations=2, stills=3, shares=SHARES)
SMALL = moft.Sample(clips=2, rows=1, pictures=1, calibrations=1, stills=1, shares=SHARES)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The feature.


def known_channels(seed=0):
    """Channels whose axes are at right angles; pans run straight along them."""
    axes = torch.linalg.qr(random(WIDTH, 2, seed=seed)).Q.T
    loadings = dict(zip(AXES, axes, strict=True))
    knots = {}
    for axis, pair in AXES.items():
        for direction, way in zip(pair, (-1.0, 1.0), strict=True):
            ends = torch.stack([-way * loadings[axis], way * loadings[axis]])
            knots[direction] = Knots(torch.tensor([[0.0], [1.0]]).expand(2, WIDTH), ends)
    spread = dict.fromkeys(AXES, 0.9)
    return MotionChannels("animatediff", "known", "f", "up_blocks.1", loadings, spread, knots)


def known_features(channels, pictures=3, looks=10.0):
    """What a picture shows, at every frame alike, and the motion of its class."""
    clips = []
    for picture, motion in itertools.product(range(pictures), moft.CLASSES):
        shown = looks * random(1, 4, 4, WIDTH, seed=picture)
        moved = torch.zeros(FRAMES, WIDTH)
        if motion in DIRECTIONS:
            moved = channels.synthesise(motion, FRAMES, 1.0 + 0.1 * picture)
        clips.append(shown + moved[:, None, None])
    return torch.stack(clips)


def test_neighbours_are_those_of_motion_where_the_feature_is_motion():
    channels = known_channels()
    figures = moft.motion_figures(known_features(channels), channels)
    value = {name: figure.value for name, figure in figures.items()}
    assert value["moft.neighbours"] == value["moft.sign_accuracy"] == 1.0
    assert value["moft.neighbours_raw"] == 0.0  # the nearest shows the same, and moves otherwise
    assert value["moft.neighbours_gain"] == 1.0
    # Of two pictures that differ, the looks are as far from each other in all motions.
    assert value["moft.neighbours_of_other_pictures"] == 1.0
    assert value["moft.neighbours_raw_of_other_pictures"] == 1.0
    assert value["moft.still_strength"] < 1e-5
    assert figures["moft.neighbours"].n == 3  # pictures are independent, their clips are not


def test_features_that_know_nothing_have_no_good_figures():
    channels = known_channels()
    blind = known_features(channels).roll(1, dims=0)  # of the class before
    figures = moft.motion_figures(blind, channels)
    assert figures["moft.sign_accuracy"].value <= 0.25
    assert figures["moft.still_strength"].value > 0.5
    mixed = blind[torch.randperm(len(blind), generator=torch.Generator().manual_seed(0))]
    assert moft.motion_figures(mixed, channels)["moft.neighbours"].value < 0.6


def test_without_looks_both_features_find_the_motion():
    channels = known_channels()
    figures = moft.motion_figures(known_features(channels, looks=0.0), channels)
    assert figures["moft.neighbours_raw"].value == figures["moft.neighbours"].value == 1.0
    assert figures["moft.neighbours_gain"].value == 0.0


def test_channels_of_other_pans_are_compared_pair_by_pair():
    same = moft.channel_figures([known_channels()] * 3)
    assert [figure.value for figure in same.values()] == pytest.approx([1.0] * 5)
    assert {figure.n for figure in same.values()} == {3}
    other = moft.channel_figures([known_channels(), known_channels(), known_channels(3)])
    worst, means = other["moft.channel_agreement"].value, []
    for axis in AXES:
        means.append(other[f"moft.channel_agreement.{axis}"].value)
        assert other[f"moft.channel_jaccard.{axis}"].value < 0.75
    assert worst < min(means)


def test_the_features_are_of_pictures_in_every_motion_and_of_other_pans(monkeypatch):
    channels, seeds, encoded = known_channels(), [], []

    def calibrate(_, __, *, stills, seed):
        seeds.append((stills, seed))
        return known_channels()

    def features(_, __, latents, tap):
        assert tap == channels.tap
        return known_features(channels, looks=1.0)[: len(latents)]

    engine = SimpleNamespace(
        checkpoint=None, denoiser=None, encode=lambda clip: encoded.append(clip) or torch.zeros(1)
    )
    monkeypatch.setattr(moft, "load_channels", lambda *_: channels)
    monkeypatch.setattr(moft, "calibrate", calibrate)
    monkeypatch.setattr(moft, "reference_features", features)
    figures = moft.feature_figures(engine, SAMPLE, 0, Progress())
    assert seeds == [(3, 1), (3, 2)]  # the model's own were found with seed 0
    assert figures["moft.channel_agreement"].n == 3
    assert len(encoded) == 2 * len(moft.CLASSES)
    readings = read_clips(np.stack([clip.frames for clip in encoded]))
    for picture in range(2):
        own = readings[5 * picture : 5 * picture + 5]
        ways = [moft.metrics.direction(reading.sprites[0].path) for reading in own]
        assert ways == [*DIRECTIONS, None]
        assert len({reading.sprites[0].shape for reading in own}) == 1


@pytest.mark.slow
def test_the_embedded_model_knows_motion():
    """And by the same channels, whatever pans these are found on."""
    sample = replace(SAMPLE, pictures=8, calibrations=1, stills=STILLS)
    with Engine.load("sprites") as engine:
        figures = moft.feature_figures(engine, sample, 0, Progress())
    found = {name.removeprefix("moft."): figure.value for name, figure in figures.items()}
    assert found["channel_agreement"] >= 0.8
    assert found["sign_accuracy"] >= 0.9
    assert found["neighbours"] >= 0.9
    assert found["neighbours_gain"] >= 0.3
    assert found["still_strength"] <= 0.2


# Steering.


class Track:
    """A path of the world that goes where it is told."""

    def __init__(self, points):
        self._points = np.asarray(points, dtype=float)

    def points(self, frames, *_):
        assert frames == len(self._points)
        return self._points


def line(start, end):
    return Track(np.linspace(start, end, FRAMES))


def straight(way, centre=(0.5, 0.5), travel=0.36):
    across = travel / 2 * np.array(DIRECTIONS[way])
    return line(np.array(centre) - across, np.array(centre) + across)


def wanted_paths(control, count):
    """Where the shapes go under a control; what no one steers goes left."""
    places = [(0.5, 0.5)] if count == 1 else [(0.25, 0.3), (0.75, 0.7)]
    if control is None:
        return [straight("left", place, 0.2) for place in places]
    if control.direction is not None:
        return [straight(control.direction)]
    if control.reference is not None:
        (reading,) = read_clips(control.reference.frames[None])
        return [Track(reading.sprites[0].path)]
    if control.points:
        (drag,) = control.points
        start, end = ((np.array(point) + 0.5) / WIDTH for point in drag)
        return [line(start, end)]
    for region, (x, y) in zip(control.regions, places, strict=True):
        assert region.mask[int(y * WIDTH), int(x * WIDTH)] == 1
    return [straight(r.direction, p, 0.3) for r, p in zip(control.regions, places, strict=True)]


class Painter:
    """An engine that draws what the prompt says and moves it as it is steered."""

    defaults = SimpleNamespace(width=WIDTH)

    def __init__(self, obeys=True, colour=None, breaks=()):
        self.requests, self.obeys, self.colour, self.breaks = [], obeys, colour, breaks

    def generate_many(self, requests, *, on_error):
        assert on_error == "return"
        for request in requests:
            self.requests.append(request)
            control = request.control[0] if request.control else None
            if request.seed in self.breaks and control is not None:
                yield NonFiniteError("guide: latents must stay finite")
                continue
            yield self.draw(request.prompt, control if self.obeys else None, control is not None)

    def draw(self, prompt, control, steered):
        said, _, ground = prompt.partition(" on a dark ")
        paths = wanted_paths(control, 1 + said.count(" and "))
        sprites = []
        for phrase, path in zip(said.split(" and "), paths, strict=True):
            words = phrase.split()
            known = {
                name: next((word for word in words if word in kinds), None)
                for name, kinds in {
                    "shape": world.SHAPES,
                    "colour": world.COLOURS,
                    "texture": world.TEXTURES,
                }.items()
            }
            colour = self.colour(known["colour"]) if self.colour and steered else known["colour"]
            sprites.append(
                world.Sprite(
                    known["shape"],
                    world.COLOURS[colour],
                    path,
                    texture=known["texture"] or "plain",
                    radius=0.22 if len(paths) == 1 else 0.16,
                )
            )
        scene = world.Scene(tuple(sprites), world.COLOURS[ground.split()[0]])
        return Clip.from_array(world.render([scene], FRAMES, WIDTH)[0])


def steer(painter, sample):
    figures = moft.steering_figures(painter, sample, 0, Progress())
    return figures, {name: figure.value for name, figure in figures.items()}


@pytest.fixture(scope="module")
def obeyed():
    painter = Painter()
    return painter, *steer(painter, SAMPLE)


def test_who_goes_where_he_is_steered_has_all_figures_right(obeyed):
    _, figures, value = obeyed
    for name in ("direction", "region", "region_both", "published_direction", "identity"):
        assert value[f"moft.{name}_accuracy"] == 1.0
    assert value["moft.plain_direction_accuracy"] == 0.25  # of four directions, all go left
    assert value["moft.direction_gain"] == 0.75
    assert value["moft.motion_fidelity"] > 0.95
    assert value["moft.drag_error"] < 0.02 and value["moft.diagonal_drag_error"] < 0.02
    assert value["moft.identity_drop"] == value["moft.reference.identity_drop"] == 0.0
    assert value["moft.not_finite"] == 0.0
    assert value["moft.region_drawn"] == 1.0
    assert figures["moft.region_accuracy"].n == 4  # clips, since both regions are of one
    for row in ("ablation.raw", "ablation.synthesised", "share.001", "share.100"):
        assert value[f"moft.{row}.direction_accuracy"] == 1.0
        assert figures[f"moft.{row}.direction_accuracy"].n == 2
    assert value["moft.ablation.plain.direction_accuracy"] == 0.5  # references go left and right


def test_plain_sampling_is_measured_by_the_same_rules(obeyed):
    _, _, value = obeyed
    assert value["moft.plain_identity_accuracy"] == 1.0
    assert value["moft.plain_motion_fidelity"] < 0.3
    assert value["moft.fidelity_gain"] > 0.5
    assert value["moft.plain_region_accuracy"] <= 0.5
    assert value["moft.plain_drag_error"] > 0.2
    assert value["moft.plain_drag_start_error"] < 0.02  # a drag begins where plain sampling does


def test_every_clip_is_generated_once_with_the_steps_that_are_said(obeyed):
    painter, _, _ = obeyed
    counts = {moft.STEPS: 0, moft.PUBLISHED_STEPS: 0}
    for request in painter.requests:
        counts[request.steps] += 1
    rows = 5  # raw, content removed (and share 1), moft (and share 0.04), synthesised, share 0.01
    assert counts == {moft.STEPS: 6 * 4 + 2 + 2 * rows, moft.PUBLISHED_STEPS: 2}
    published = [r.control[0] for r in painter.requests if r.steps == moft.PUBLISHED_STEPS]
    assert published == [moft.MoftGuidance(direction=way) for way in ("left", "right")]


def test_who_does_not_obey_is_seen():
    _, value = steer(Painter(obeys=False), SMALL)
    assert value["moft.direction_accuracy"] == value["moft.plain_direction_accuracy"] == 0.5
    assert value["moft.direction_gain"] == value["moft.fidelity_gain"] == 0.0
    assert value["moft.drag_error"] == value["moft.plain_drag_error"] > 0.05
    assert value["moft.region_accuracy"] == value["moft.plain_region_accuracy"]


def test_who_spoils_the_looks_or_breaks_is_seen():
    names = list(world.COLOURS)
    other = lambda colour: names[(names.index(colour) + 3) % len(names)]
    figures, value = steer(Painter(colour=other, breaks=[1]), SMALL)
    assert value["moft.identity_drop"] == value["moft.colour_drop"] == 1.0
    assert value["moft.shape_drop"] == 0.5  # of the clip that broke, which shows nothing
    assert value["moft.direction_accuracy"] == 0.5
    assert 0 < value["moft.not_finite"] < 0.5
    # 0.5 of a miss by a whole width, for the clip that shows nothing.
    assert value["moft.drag_error"] == pytest.approx(0.5, abs=0.02)
    assert figures["moft.drag_error"].n == 2


def test_what_else_goes_wrong_is_not_taken_for_a_clip():
    class Refuses:
        def generate_many(self, *_, **__):
            yield RequestError("direction: must be one of left, right, up, down")

    with pytest.raises(RequestError, match=r"^direction:"):
        moft.generate_readings(Refuses(), [None])


# What is asked for.


def test_the_switches_are_those_of_the_bench(monkeypatch):
    assert moft.guidance(direction="up") == moft.MoftGuidance(direction="up", **moft.GUIDANCE)
    switches = {"weight": 3.0, "window": (0.0, 0.5), "drag_window": (0.9, 0.5, 0.1), "share": 0.1}
    monkeypatch.setattr(moft, "GUIDANCE", switches)
    up, drag = moft.guidance(direction="up"), moft.guidance(points=[((1, 1), (2, 2))])
    assert (up.weight, up.window) == (3.0, (0.0, 0.5))
    assert (drag.weight, drag.drag_window) == (3.0, (0.9, 0.5, 0.1))
    pair = transfer_pairs(1)[0]
    requests = moft.table_requests([pair], moft.FULL.shares)
    assert {"ablation.moft", "share.004"} <= set(requests)  # no longer the same
    assert "share.010" not in requests and "share.100" not in requests
    assert requests["ablation.raw"][0].control[0].feature == "raw"
    assert requests["share.004"][0].control[0].share == 0.04
    assert requests["ablation.synthesised"][0].control[0].direction == pair.sprite.path.motion


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_drag_goes_where_there_is_room(diagonal):
    rng = np.random.default_rng(0)
    ways = set()
    for _ in range(200):
        start = rng.uniform(0.0, 1.0, 2)
        drag = moft._draw_drag(rng, start, diagonal=diagonal)
        moved = np.subtract(drag.end, drag.start)
        length = float(np.hypot(*moved))
        assert 0.25 <= length <= 0.4 + 1e-9
        assert (np.abs(moved) > 1e-9).all() == diagonal
        inside = np.abs(np.subtract(drag.end, 0.5)) <= 0.3 + 1e-9
        assert inside[np.abs(moved) > 1e-9].all()
        ways.add(tuple(np.sign(np.round(moved, 6))))
        pixels = drag.points(WIDTH)
        for point, pixel in zip((drag.start, drag.end), pixels, strict=True):
            for place, number in zip(point, pixel, strict=True):
                assert 0 <= number <= WIDTH - 1
                assert number == pytest.approx(np.clip(place * WIDTH - 0.5, 0, WIDTH - 1))
    assert len(ways) == 4


def test_regions_are_drawn_around_two_shapes_that_go_past_each_other():
    caption = moft.two_shapes(1, 0)[0]
    first, second = caption.mentions
    assert first.shape != second.shape and first.colour != second.colour

    def reading(places):
        sprites = tuple(
            world.Sprite(
                m.shape, world.COLOURS[m.colour], straight("left", place, 0.1), radius=0.14
            )
            for m, place in zip(caption.mentions, places, strict=False)
        )
        clip = world.render(
            [world.Scene(sprites, world.COLOURS[caption.background])], FRAMES, WIDTH
        )
        return read_clips(clip.numpy(), count=2)[0]

    layout = moft.lay_out(reading([(0.75, 0.5), (0.25, 0.55)]), caption)
    assert layout.drawn and layout.ways == ("up", "down")
    one, other = layout.regions(WIDTH)
    assert one.direction == "up" and other.direction == "down"
    assert ((one.mask + other.mask) == 1).all()
    assert one.mask[16, 24] == 1 and other.mask[16, 8] == 1  # [y, x]
    above = moft.lay_out(reading([(0.5, 0.25), (0.45, 0.75)]), caption)
    assert above.ways == ("left", "right") and above.regions(WIDTH)[0].mask[4, 16] == 1
    alone = moft.lay_out(reading([(0.5, 0.5)]), caption)
    assert not alone.drawn and alone.ways == ("up", "down")
    assert (alone.regions(WIDTH)[0].mask[:, :16] == 1).all()


def test_a_missing_shape_misses_by_a_width():
    drag = moft.Drag((0.2, 0.5), (0.6, 0.5))
    assert moft._misses(None, drag) == (1.0, 1.0, 1.0)
    shifted = line((0.2, 0.8), (0.6, 0.8)).points(FRAMES)
    assert moft._misses(shifted, drag) == pytest.approx((0.3, 0.3, 0.0))
    short = line((0.2, 0.5), (0.4, 0.5)).points(FRAMES)
    assert moft._misses(short, drag) == pytest.approx((0.2, 0.0, 0.2))


def test_quick_is_small(monkeypatch):
    seen = []

    class Engine:
        @classmethod
        def load(cls, *_, **options):
            seen.append(options.get("dtype"))
            return cls()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(moft, "Engine", Engine)
    for part in ("feature", "steering"):
        monkeypatch.setattr(
            moft, f"{part}_figures", lambda _, sample, *__: {"moft.clips": seen.append(sample)}
        )
    moft.measure(BenchOptions(quick=True), Progress())
    assert seen == [None, moft.QUICK, "bfloat16", moft.QUICK]
    moft.measure(BenchOptions(), Progress())
    assert seen[-1] == moft.FULL and moft.FULL.clips == 64
