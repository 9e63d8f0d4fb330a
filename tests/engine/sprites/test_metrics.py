import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetiq.errors import RequestError, ShapeError
from kinetiq.sprites import metrics, world
from kinetiq.sprites.metrics import Interval
from kinetiq.sprites.reading import read_clip, read_clips
from kinetiq.sprites.world import Caption, Mention, Path, Scene, Sprite

FRAMES = 8
SEEDS = st.integers(0, 2**32 - 1)
MOVING = [motion for motion in world.MOTIONS if motion != "still"]


def full_caption(scene):
    """Says everything that can be said; hues of `scenes` all have names."""
    mentions = tuple(
        Mention(s.shape, world.colour_name(s.hue), s.texture, s.path.motion) for s in scene.sprites
    )
    return Caption(mentions, world.colour_name(scene.background_hue))


def draw_scenes(count):
    rng = np.random.default_rng(5)
    colours = list(world.COLOURS)
    return [
        Scene(
            (
                world.sample_sprite(
                    rng,
                    shape=world.SHAPES[i % 5],
                    hue=world.sample_named_hue(rng, colours[i % 8]),
                    texture=world.TEXTURES[i % 3],
                    motion=world.MOTIONS[(i + i // 8) % 8],
                ),
            ),
            background_hue=world.sample_named_hue(rng, colours[(i + 3) % 8]),
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes(24)


@pytest.fixture(scope="module")
def readings(scenes):
    return read_clips(world.render(scenes, FRAMES, 32))


@pytest.fixture(scope="module")
def captions(scenes):
    return [full_caption(scene) for scene in scenes]


@pytest.fixture(scope="module")
def empty():
    return read_clip(torch.full((FRAMES, 32, 32, 3), 0.2))


def sprite_of(**changes):
    given = {"shape": "circle", "hue": 0.0, "path": Path("left"), "texture": "plain"}
    return Sprite(**(given | changes))


def read(*sprites, **background):
    clip = world.render([Scene(sprites, **background)], FRAMES, 32)[0]
    return read_clip(clip, count=len(sprites))


ACCURACIES = {
    name: getattr(metrics, f"{name}_accuracy")
    for name in ("shape", "colour", "texture", "motion", "background", "direction")
}


@pytest.mark.parametrize("name", ACCURACIES)
def test_everything_is_right_on_clips_that_follow_their_captions(name, readings, captions):
    score = ACCURACIES[name](readings, captions)
    assert score.mean == 1.0
    directed = sum(c.mentions[0].motion in metrics.DIRECTIONS for c in captions)
    assert score.n == (directed if name == "direction" else len(readings))


@pytest.mark.parametrize("name", ACCURACIES)
def test_nothing_is_right_on_captions_that_say_another(name, readings, captions):
    following = {
        "shape": world.SHAPES,
        "colour": list(world.COLOURS),
        "texture": world.TEXTURES,
        "motion": world.MOTIONS,
    }
    after = lambda kinds, word: kinds[(kinds.index(word) + 1) % len(kinds)]
    if name == "background":
        colours = list(world.COLOURS)
        wrong = [dataclasses.replace(c, background=after(colours, c.background)) for c in captions]
    else:
        attribute = "motion" if name == "direction" else name
        wrong = [
            Caption(
                (
                    dataclasses.replace(
                        c.mentions[0],
                        **{
                            attribute: after(
                                following[attribute], getattr(c.mentions[0], attribute)
                            )
                        },
                    ),
                )
            )
            for c in captions
        ]
    assert ACCURACIES[name](readings, wrong).mean == 0.0


@pytest.mark.parametrize("name", [name for name in ACCURACIES if name != "background"])
def test_a_clip_without_a_shape_is_wrong_and_counts(name, captions, empty):
    score = ACCURACIES[name]([empty] * len(captions), captions)
    assert score.mean == 0.0 and score.n > 0


@pytest.mark.parametrize("name", ACCURACIES)
def test_says_when_there_is_nothing_to_be_right_about(name, readings):
    silent = [Caption((Mention(),))] * len(readings)
    where = f"{name}_accuracy: at least one caption must name a .*, got none in {len(readings)}"
    with pytest.raises(RequestError, match=where):
        ACCURACIES[name](readings, silent)
    with pytest.raises(ShapeError, match=f"captions must be as many as the clips, {len(readings)}"):
        ACCURACIES[name](readings, silent[1:])


def test_each_metric_falls_with_what_it_measures(scenes, captions):
    """Recoloured, reshaped, retextured and shuffled clips lose their own score and no other."""
    some, asked = scenes[:8], captions[:8]
    change = lambda **to: [
        dataclasses.replace(s, sprites=(dataclasses.replace(s.sprites[0], **to),)) for s in some
    ]
    spoiled = {
        "colour": change(hue=22.5),  # between two names
        "shape": change(shape="ring"),
        "texture": change(texture="dotted"),
        "motion": change(path=Path("still")),
    }
    for name, changed in spoiled.items():
        read_back = read_clips(world.render(changed, FRAMES, 32))
        for other in spoiled:
            score = ACCURACIES[other](read_back, asked).mean
            assert (score < 0.5) == (name == other), (name, other, score)
    order = torch.tensor([3, 6, 0, 5, 2, 7, 1, 4])
    shuffled = read_clips(world.render(some, FRAMES, 32)[:, order])
    assert ACCURACIES["motion"](shuffled, asked).mean < 0.5
    assert ACCURACIES["shape"](shuffled, asked).mean == 1.0


def test_attributes_must_belong_to_the_same_shape():
    red_circle = Sprite("circle", 0.0, Path("up", centre=(0.25, 0.5)), radius=0.16)
    blue_square = Sprite("square", 225.0, Path("down", centre=(0.75, 0.5)), radius=0.16)
    readings = [read(red_circle, blue_square)]
    right = [Caption((Mention("square", "blue", None, "down"), Mention("circle", "red")))]
    swapped = [Caption((Mention("square", "red", None, "down"), Mention("circle", "blue")))]
    for name in ("shape", "colour", "motion", "direction"):
        assert ACCURACIES[name](readings, right).mean == 1.0
    assert ACCURACIES["shape"](readings, swapped).mean == 1.0
    assert ACCURACIES["colour"](readings, swapped).mean == 0.0
    missing = [dataclasses.replace(readings[0], sprites=readings[0].sprites[:1])]
    assert ACCURACIES["shape"](missing, right).mean == 0.0


# Measured on 1,600 paths with a reading error of 0.1 pixel: every one right at 8 frames, 0.98 at 5.
@pytest.mark.parametrize("motion", world.MOTIONS)
def test_motions_are_told_apart(motion):
    rng = np.random.default_rng(0)
    for _ in range(40):
        path = world.sample_path(rng, motion, span=rng.choice([0.8, 1.0])).points(FRAMES)
        name, scores = metrics.classify_motion(path + rng.normal(0, 0.1 / 32, path.shape))
        assert name == motion, scores
        assert set(scores) == set(world.MOTIONS)
        assert all(0 < score <= 1 for score in scores.values())


def test_a_path_that_fits_no_motion_has_no_name():
    rng = np.random.default_rng(1)
    walks = [np.cumsum(rng.normal(0, 2 / 32, (FRAMES, 2)), axis=0) for _ in range(100)]
    names = [metrics.classify_motion(walk)[0] for walk in walks]
    assert names.count(None) >= 97  # 99 in 100 leave more than a tenth
    for motion in MOVING:  # an error of half a pixel must not cost a motion its name
        for _ in range(10):
            path = world.sample_path(rng, motion).points(FRAMES)
            read_path = path + rng.normal(0, 0.5 / 32 / math.sqrt(2), path.shape)
            assert metrics.classify_motion(read_path)[0] == motion


def test_a_background_must_be_dark(readings):
    asked = [Caption((), readings[0].background_colour)]
    lit = lambda value: [dataclasses.replace(readings[0], background_value=value)]
    assert metrics.background_accuracy(lit(0.28), asked).mean == 1.0
    assert metrics.background_accuracy(lit(0.42), asked).mean == 1.0
    assert metrics.background_accuracy(lit(0.43), asked).mean == 0.0
    bright = world.render([Scene((sprite_of(),), 225.0, 0.8, 0.6)], FRAMES, 32)[0]
    read_back = [read_clip(bright)]
    assert read_back[0].background_colour == "blue"
    assert metrics.background_accuracy(read_back, [Caption((), "blue")]).mean == 0.0


def test_the_nearest_motion_is_told_of_paths_too_rough_for_a_name():
    rng = np.random.default_rng(2)
    captions, readings = [], []
    for motion in world.MOTIONS:
        rough = 0.0 if motion == "still" else 2 / 32
        for _ in range(8):
            path = world.sample_path(rng, motion).points(FRAMES)
            path += rng.normal(0, rough / math.sqrt(2), path.shape)
            readings.append(SimpleNamespace(sprites=(SimpleNamespace(path=path),)))
            captions.append(Caption((Mention(motion=motion),)))
    nearest = metrics.nearest_motion_accuracy(readings, captions).mean
    assert nearest >= 0.9
    assert metrics.motion_accuracy(readings, captions).mean <= 0.8
    lost = [SimpleNamespace(sprites=(SimpleNamespace(path=None),))] * len(captions)
    assert metrics.nearest_motion_accuracy(lost, captions).mean == 0.0


def test_a_shape_that_vanishes_has_no_motion():
    clip = world.render([Scene((sprite_of(path=Path("right")),))], FRAMES, 32)[0]
    clip[1:7] = clip[0, 0, 0]
    readings, asked = [read_clip(clip)], [Caption((Mention("circle", motion="right"),))]
    assert metrics.shape_accuracy(readings, asked).mean == 1.0
    assert metrics.motion_accuracy(readings, asked).mean == 0.0
    assert metrics.direction_accuracy(readings, asked).mean == 0.0
    path = metrics.first_path(readings[0])
    assert metrics.path_fidelity(path, Path("right").points(FRAMES)) == 0.0
    clip[:] = clip[3]
    clip[[0, 7]] = world.render([Scene((sprite_of(path=Path("still")),))], 2, 32)[0]
    asked = [Caption((Mention("circle", motion="still"),))]
    assert metrics.motion_accuracy([read_clip(clip)], asked).mean == 0.0


@given(SEEDS, st.sampled_from(MOVING))
@settings(max_examples=60, deadline=None)
def test_fidelity_oracles(seed, motion):
    path = world.sample_path(np.random.default_rng(seed), motion).points(FRAMES)
    fidelity = metrics.path_fidelity
    assert fidelity(path, path) == pytest.approx(1)
    assert fidelity(path + np.array([0.1, -0.05]), path) == pytest.approx(1)  # place does not count
    half = path.mean(0) + 0.5 * (path - path.mean(0))
    assert fidelity(half, path) == pytest.approx(0.5)
    assert fidelity(path, half) == pytest.approx(0.5)
    assert fidelity(1 - path, path) == pytest.approx(-1)


@given(SEEDS, st.sampled_from(MOVING), st.sampled_from(MOVING))
@settings(max_examples=60, deadline=None)
def test_fidelity_is_symmetric_and_bounded(seed, first, second):
    rng = np.random.default_rng(seed)
    one, two = (world.sample_path(rng, motion).points(FRAMES) for motion in (first, second))
    value = metrics.path_fidelity(one, two)
    assert value == pytest.approx(metrics.path_fidelity(two, one))
    assert -1 <= value <= 1
    for change in (metrics.mirror_path, metrics.reverse_path):
        assert metrics.path_fidelity(change(one), change(two)) == pytest.approx(value)
        assert change(change(one)) == pytest.approx(one)


def test_mirrored_and_reversed_clips_are_read_as_such(scenes, readings):
    clips = world.render(scenes[:6], FRAMES, 32)
    mirrored, backwards = read_clips(clips.flip(3)), read_clips(clips.flip(1))
    for read_back, change in ((mirrored, metrics.mirror_path), (backwards, metrics.reverse_path)):
        wanted = [change(metrics.first_path(reading)) for reading in readings[:6]]
        got = [metrics.first_path(reading) for reading in read_back]
        assert metrics.motion_fidelity(got, wanted).per_clip.min() > 0.98


def test_fidelity_of_still_and_missing_clips():
    moving, still = Path("left").points(FRAMES), Path("still").points(FRAMES)
    trembling = still + np.random.default_rng(0).normal(0, 0.2 / 32, still.shape)
    result = metrics.motion_fidelity(
        [moving, trembling, still, moving, None, None],
        [moving, still, moving, still, moving, still],
    )
    assert result.per_clip == pytest.approx([1, 1, 0, 0, 0, 0])
    assert result.mean.mean == pytest.approx(2 / 6) and result.mean.n == 6


def test_read_fidelity_of_rendered_clips_is_one(scenes, readings):
    truth = [scene.sprites[0].path.points(FRAMES) for scene in scenes]
    result = metrics.motion_fidelity([metrics.first_path(r) for r in readings], truth)
    assert result.per_clip.min() > 0.98
    shuffled = [truth[(i + 1) % len(truth)] for i in range(len(truth))]
    assert metrics.motion_fidelity(truth, shuffled).mean.mean < 0.4


def test_stillness_does_not_depend_on_length():
    noise = np.random.default_rng(0).normal(0, 0.15 / 32, (32, 2))
    assert all(metrics.is_still(noise[:frames]) for frames in (1, 2, 8, 32))
    shortest = Path("bouncing", travel=0.16)
    assert not any(metrics.is_still(shortest.points(frames)) for frames in (8, 16, 32))


def test_directions():
    assert metrics.direction(Path("circling").points(FRAMES)) is None
    assert metrics.direction(Path("still").points(FRAMES)) is None
    assert metrics.direction(Path("zigzagging", heading=-1.0).points(FRAMES)) == "left"
    assert metrics.direction(np.array([[0.2, 0.2], [0.5, 0.9]])) == "down"


def test_identity_leak():
    reference = sprite_of(shape="ring", hue=130.0, texture="striped")
    asked = Caption((Mention("circle", "red", "plain"),))
    leak = lambda sprite, caption=asked: (
        metrics.identity_leak([read(sprite)], [reference], [caption]).mean
    )
    assert leak(sprite_of()) == 0
    assert leak(sprite_of(shape="ring")) == 1
    assert leak(sprite_of(texture="striped")) == 1
    assert leak(sprite_of(hue=140.0)) == 1
    assert leak(sprite_of(hue=150.0)) == 0  # wrong, but not the reference's
    assert leak(sprite_of(shape="ring"), Caption((Mention(None, "red"),))) == 0  # left open
    assert leak(sprite_of(), Caption((Mention("square"),))) == 0


def test_a_copy_of_the_reference_beside_what_was_asked_for_is_a_leak():
    reference = sprite_of(
        shape="square", hue=225.0, texture="striped", path=Path("up", 0.3, centre=(0.75, 0.5))
    )
    own = sprite_of(path=Path("down", 0.3, centre=(0.25, 0.5)))
    asked = [Caption((Mention("circle", "red", "plain"),))]
    clip = world.render([Scene((own, reference))], FRAMES, 32)[0]
    alone = world.render([Scene((own,))], FRAMES, 32)[0]
    leak = lambda frames: metrics.identity_leak([read_clip(frames, 2)], [reference], asked).mean
    assert leak(clip) == 1 and leak(alone) == 0
    reading = read_clip(clip, 2)
    assert len(reading.sprites) == 2
    (meant,) = metrics.match_sprites(reading, asked[0])  # whichever of the two is larger
    assert (meant.shape, meant.colour) == ("circle", "red")
    assert metrics.colour_accuracy([reading], asked).mean == 1.0


def test_a_shape_without_a_name_is_nobodys():
    nameless = [dataclasses.replace(read(sprite_of()).sprites[0], shape=None)]
    shot = dataclasses.replace(read(sprite_of()), sprites=tuple(nameless))
    asked = [Caption((Mention("square"),))]
    assert metrics.identity_leak([shot], [sprite_of(shape="ring")], asked).mean == 0
    with pytest.raises(RequestError, match="at least one prompt must name"):
        metrics.identity_leak([shot], nameless, asked)  # nothing is known of the reference
    assert metrics.shape_accuracy([shot], [Caption((Mention("circle"),))]).mean == 0.0
    assert metrics.consistency([shot, shot], ["shape"]) == 0


def test_identity_leak_counts_what_it_can_judge(empty):
    reference = sprite_of(shape="ring")
    another, same = Caption((Mention("circle"),)), Caption((Mention("ring"),))
    clips = [read(sprite_of()), read(sprite_of(shape="ring")), empty]
    result = metrics.identity_leak(clips, [reference] * 3, [another, same, another])
    assert (result.mean, result.n) == (0.5, 2)  # the empty clip leaks, the ring was asked for
    with pytest.raises(RequestError, match="identity_leak: at least one prompt must name"):
        metrics.identity_leak(clips, [reference] * 3, [same] * 3)
    with pytest.raises(ShapeError, match="references must be as many as the clips, 3, got 1"):
        metrics.identity_leak(clips, [reference], [same] * 3)


def test_consistency(empty):
    shots = [
        read(sprite_of(hue=0.0)),
        read(sprite_of(hue=12.0, path=Path("up"))),
        read(sprite_of(hue=24.0, texture="dotted"), background_hue=90.0),
    ]
    assert metrics.consistency(shots) == pytest.approx(1 / 3)
    assert metrics.consistency(shots, ["shape"]) == 1
    assert metrics.consistency(shots, ["colour"]) == pytest.approx(2 / 3)
    assert metrics.consistency(shots, ["background"]) == pytest.approx(1 / 3)
    assert metrics.consistency([*shots[:2], empty], ["shape"]) == pytest.approx(1 / 3)
    with pytest.raises(RequestError, match="shots must be at least 2, got 1"):
        metrics.consistency(shots[:1])
    with pytest.raises(RequestError, match=r"free must name some of shape, .*, got size"):
        metrics.consistency(shots, ["size", "shape"])
    with pytest.raises(RequestError, match="got nothing"):
        metrics.consistency(shots, [])


def test_frame_consistency(scenes, readings, empty):
    # Clean clips measure 0.98 at worst: the pixels that stripes fill change with their place.
    assert min(metrics.frame_consistency(reading) for reading in readings) > 0.97
    assert metrics.frame_consistency(empty) == 0
    sprites = [sprite_of(hue=hue, radius=r) for hue, r in ((0.0, 0.2), (120.0, 0.25))]
    one, other = world.render([Scene((sprite,)) for sprite in sprites], FRAMES, 32)
    flicker = torch.stack([(one, other)[t % 2][t] for t in range(FRAMES)])
    # Hue changes by 120 / 180 and radius by 0.05 / 0.225 at every step: a third of 0.67 and 0.22.
    assert metrics.frame_consistency(read_clip(flicker)) == pytest.approx(0.7, abs=0.06)
    gone = one.clone()
    gone[2] = gone[5] = gone[0, 0, 0]
    assert metrics.frame_consistency(read_clip(gone)) == pytest.approx(3 / 7, abs=0.02)
    assert metrics.frame_consistency(read_clip(one[:1])) == 1


def test_known_intervals():
    # Wilson 1927 for 8 of 10; Student's quantile for 2 degrees of freedom is 4.3027.
    proportion = metrics.mean_with_interval([True] * 8 + [False] * 2)
    assert (proportion.low, proportion.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    mean = metrics.mean_with_interval([1.0, 2.0, 3.0])
    assert mean.high - mean.mean == pytest.approx(4.30265 / math.sqrt(3), rel=1e-4)
    assert metrics.mean_with_interval([True] * 5).low == pytest.approx(0.5655, abs=1e-4)
    assert metrics.mean_with_interval([0.3], bounds=(-1, 1)) == Interval(0.3, -1, 1, 1)


@pytest.mark.parametrize(
    ("freedom", "probability", "quantile"),
    [(1, 0.975, 12.7062), (5, 0.95, 2.01505), (30, 0.995, 2.74999), (1000, 0.975, 1.96234)],
)
def test_student_quantiles(freedom, probability, quantile):
    assert metrics._student(probability, freedom) == pytest.approx(quantile, rel=1e-4)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    trials = 1500  # the share that holds then errs by 0.0056 (one standard deviation)
    normal = [metrics.mean_with_interval(rng.normal(0.4, 1, 6)) for _ in range(trials)]
    held = np.mean([i.low <= 0.4 <= i.high for i in normal])
    assert held == pytest.approx(0.95, abs=0.02)
    shares = [metrics.mean_with_interval(rng.uniform(size=40) < 0.8) for _ in range(trials)]
    held = np.mean([i.low <= 0.8 <= i.high for i in shares])
    assert held == pytest.approx(0.95, abs=0.03)  # a proportion is discrete


def test_known_differences_of_shares():
    # Newcombe 1998, Stat. Med. 17: 56 of 70 against 48 of 80, and of 50 pairs 36 both, 12 the first
    # alone, 2 the second alone.
    of = lambda right, count: [True] * right + [False] * (count - right)
    independent = metrics.share_difference(of(56, 70), of(48, 80), paired=False)
    assert independent.mean == pytest.approx(0.2)
    assert (independent.low, independent.high) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert independent.n == 70
    one, two = of(48, 50), [True] * 36 + [False] * 12 + [True] * 2
    pairs = metrics.share_difference(one, two, paired=True)
    assert (pairs.mean, pairs.n) == (pytest.approx(0.2), 50)
    assert (pairs.low, pairs.high) == pytest.approx((0.0569, 0.3404), abs=1e-4)
    same = metrics.share_difference([True] * 8, [True] * 8, paired=True)
    assert same.low < same.mean == 0.0 < same.high  # honest where all agree
    halves = [True, False] * 32
    alike = metrics.share_difference(halves, halves, paired=True)
    opposed = metrics.share_difference(halves, halves[::-1], paired=True)
    assert alike.high - alike.low < 0.2 * (opposed.high - opposed.low)


@pytest.mark.parametrize("paired", [True, False])
def test_differences_hold_the_truth_as_often_as_they_say(paired):
    rng = np.random.default_rng(2)
    held, trials = 0, 600  # the share that holds errs by 0.009 (one standard deviation)
    for _ in range(trials):
        luck = rng.uniform(size=(64, 2))
        one, two = luck[:, 0] < 0.9, luck[:, 0 if paired else 1] < 0.8
        found = metrics.share_difference(one, two, paired=paired)
        held += found.low <= 0.1 <= found.high
    assert held / trials > 0.93


def test_says_what_is_wrong_with_differences():
    with pytest.raises(RequestError, match="share_difference: first must be booleans, got float64"):
        metrics.share_difference([0.5], [True], paired=False)
    with pytest.raises(ShapeError, match="pairs must be complete, got 1 and 2 verdicts"):
        metrics.share_difference([True], [True, False], paired=True)
    with pytest.raises(RequestError, match="at least one number"):
        metrics.share_difference([], [True], paired=False)


@given(st.lists(st.booleans(), min_size=1, max_size=50), st.floats(0.5, 0.99))
def test_a_proportion_lies_in_its_interval(values, confidence):
    found = metrics.mean_with_interval(values, confidence)
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert found.n == len(values)
    assert found.high - found.low > 0  # honest where all agree


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: metrics.mean_with_interval([]),
            RequestError,
            r"at least one number, got shape \[0\]",
        ),
        (lambda: metrics.mean_with_interval([1.0], 1.0), RequestError, "between 0 and 1, got 1"),
        (lambda: metrics.mean_with_interval([1.0, math.nan]), RequestError, "finite, got NaN"),
        (
            lambda: metrics.displacements(np.zeros((8, 3))),
            ShapeError,
            r"\[frames, 2\], got \[8, 3\]",
        ),
        (lambda: metrics.mirror_path(np.zeros((0, 2))), ShapeError, r"got \[0, 2\]"),
        (
            lambda: metrics.is_still(np.full((4, 2), np.nan)),
            ShapeError,
            "is_still: path must be finite",
        ),
        (
            lambda: metrics.path_fidelity(np.zeros((8, 2)), np.zeros((7, 2))),
            ShapeError,
            "as many frames, got 8 and 7",
        ),
        (lambda: metrics.motion_fidelity([None], []), ShapeError, "references must be as many"),
        (lambda: metrics.motion_fidelity([], []), RequestError, "at least one number"),
        (lambda: metrics.classify_motion(np.zeros((2, 2))), ShapeError, "at least 3 frames, got 2"),
    ],
)
def test_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()
