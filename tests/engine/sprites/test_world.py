import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetiq.sprites import world
from kinetiq.sprites.reading import COLOUR_TOLERANCE
from kinetiq.sprites.world import Caption, Mention, Path, Scene, Sprite

SEEDS = st.integers(0, 2**32 - 1)


def scenes(count, seed=0, **options):
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng, **options) for _ in range(count)]


def test_rendering_is_deterministic_and_in_range():
    drawn = world.render(scenes(20), frames=8, size=32)
    again = world.render(scenes(20), frames=8, size=32)
    assert drawn.shape == (20, 8, 32, 32, 3) and drawn.dtype == torch.float32
    assert torch.equal(drawn, again)
    assert drawn.min() >= 0 and drawn.max() <= 1


def test_a_scene_does_not_depend_on_its_neighbours():
    many = scenes(12)
    together = world.render(many, frames=4, size=32)
    alone = torch.cat([world.render([scene], frames=4, size=32) for scene in many])
    assert torch.equal(together, alone)


def test_background_where_no_shape_is():
    scene = Scene((Sprite("circle", 0.0, Path("still"), radius=0.2),), background_hue=120.0)
    drawn = world.render([scene], frames=1, size=32)[0, 0]
    empty = world.render([Scene((), background_hue=120.0)], frames=1, size=32)[0, 0]
    axis = (torch.arange(32) + 0.5) / 32 - 0.5
    far = torch.hypot(axis[:, None], axis[None, :]) > 0.2 + 1 / 32
    assert torch.equal(drawn[far], empty[far])
    assert (drawn[~far] - empty[~far]).abs().amax() > 0.5
    assert empty[0, 0, 1] == pytest.approx(scene.background_value)


def test_the_last_sprite_is_on_top():
    below, above = (Sprite("square", hue, Path("still")) for hue in (0.0, 120.0))
    centre = world.render([Scene((below, above))], frames=1, size=32)[0, 0, 16, 16]
    assert centre.argmax() == 1


def test_moving_the_path_moves_the_picture():
    sprite = Sprite("triangle", 90.0, Path("left", centre=(0.5, 0.5)), texture="dotted")
    moved = dataclasses.replace(sprite, path=Path("left", centre=(0.5 + 4 / 32, 0.5 - 2 / 32)))
    one, other = world.render([Scene((sprite,)), Scene((moved,))], frames=3, size=32)
    assert torch.allclose(one.roll((-2, 4), (1, 2))[:, 4:-4, 6:-6], other[:, 4:-4, 6:-6], atol=1e-5)


def test_a_pan_is_one_more_displacement():
    still = Scene((Sprite("ring", 10.0, Path("still", centre=(0.3, 0.5))),), pan=(0.4, 0.0))
    right = Scene((Sprite("ring", 10.0, Path("right", 0.4, centre=(0.5, 0.5))),))
    one, other = world.render([still, right], frames=5, size=32)
    assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("texture", world.TEXTURES)
def test_texture_darkens_by_its_shade(texture):
    sprite = Sprite("square", 0.0, Path("still"), texture=texture, radius=0.4, saturation=1.0)
    red = world.render([Scene((sprite,))], frames=1, size=64)[0, 0, 12:52, 12:52, 0]
    assert red.max().item() == pytest.approx(sprite.value)
    darkest = 1.0 if texture == "plain" else world.TEXTURE_SHADE
    assert red.min().item() == pytest.approx(darkest * sprite.value)


def test_shapes_of_one_radius_have_similar_areas():
    axis = (torch.arange(256) + 0.5) / 256 - 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    radius = torch.tensor(0.25)
    areas = {
        shape: (world.signed_distance(shape, x, y, radius) < 0).float().mean().item()
        for shape in world.SHAPES
    }
    exact = {
        "circle": np.pi,
        "square": 4 * 0.88**2,
        "triangle": 3 * np.sqrt(3) * 0.6**2,  # the smallest, 0.6 of the circle
        "ring": 4 * np.pi * 0.75 * 0.3,
        "cross": 8 * 1.05 * 0.36 - 4 * 0.36**2,
    }
    for shape, area in areas.items():
        assert area == pytest.approx(exact[shape] * 0.25**2, rel=0.02), shape
        assert 0.59 < exact[shape] / np.pi <= 1.0


def test_an_unknown_shape_is_named():
    with pytest.raises(ValueError, match=r"signed_distance: shape must be one of circle.*'star'"):
        world.signed_distance("star", torch.zeros(1), torch.zeros(1), torch.ones(1))


@given(SEEDS, st.sampled_from(world.MOTIONS), st.integers(2, 32))
@settings(max_examples=60, deadline=None)
def test_paths_stay_inside(seed, motion, frames):
    points = world.sample_path(np.random.default_rng(seed), motion).points(frames)
    assert points.shape == (frames, 2)
    assert points.min() > 0.19 and points.max() < 0.81


def test_paths_are_what_their_names_say():
    points = {motion: Path(motion, travel=0.4).points(9) for motion in world.MOTIONS}
    whole = {motion: path[-1] - path[0] for motion, path in points.items()}
    assert whole["left"] == pytest.approx([-0.4, 0]) and whole["right"] == pytest.approx([0.4, 0])
    assert whole["up"] == pytest.approx([0, -0.4]) and whole["down"] == pytest.approx([0, 0.4])
    assert whole["circling"] == pytest.approx([0, 0])
    assert np.hypot(*(points["circling"] - 0.5).T) == pytest.approx(0.2)
    assert whole["zigzagging"][0] == pytest.approx(0.4)
    assert (np.sign(np.diff(points["zigzagging"][:, 1])) == [-1, -1, 1, 1, -1, -1, 1, 1]).all()
    assert np.ptp(points["bouncing"], axis=0) == pytest.approx([0, 0.4])
    assert np.ptp(points["still"]) == 0


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_one_frame_is_a_path_too(motion):
    assert np.isfinite(Path(motion).points(1)).all()


def test_held_out_combinations_are_fixed_and_about_an_eighth():
    grid = itertools.product(world.SHAPES, world.COLOURS, world.MOTIONS)
    held = [combination for combination in grid if world.is_held_out(*combination)]
    assert len(held) == 36  # of 320; the checkpoint was trained without these very combinations
    assert held[0] == ("circle", "red", "right")
    assert not world.is_held_out("circle", None, "left")


def test_training_scenes_hold_nothing_out():
    for scene in scenes(400):
        for sprite in scene.sprites:
            seen = world.colour_name(sprite.hue, COLOUR_TOLERANCE)  # as a reader names it
            assert not world.is_held_out(sprite.shape, seen, sprite.path.motion)


def test_captions_are_true():
    rng = np.random.default_rng(0)
    said = 0
    for scene in scenes(300, seed=1):
        caption = world.sample_caption(rng, scene)
        for mention, sprite in zip(caption.mentions, scene.sprites, strict=True):
            assert mention.shape in (None, sprite.shape)
            assert mention.texture in (None, sprite.texture)
            assert mention.motion in (None, sprite.path.motion)
            if mention.colour is not None:
                said += 1
                assert world.hue_distance(sprite.hue, world.COLOURS[mention.colour]) <= 10
        if caption.background is not None:
            assert world.hue_distance(scene.background_hue, world.COLOURS[caption.background]) <= 10
    assert 50 < said < 250  # both said and left out


def test_half_of_the_captions_say_all_and_the_others_half_of_it():
    rng = np.random.default_rng(5)
    named = dataclasses.replace(
        Scene((Sprite("ring", 0.0, Path("left")),)), background_hue=world.COLOURS["blue"]
    )
    said = []
    for _ in range(600):
        caption = world.sample_caption(rng, named)
        mention = caption.mentions[0]
        parts = (mention.shape, mention.colour, mention.texture, mention.motion, caption.background)
        said.append(sum(part is not None for part in parts))
    # All five with 1/2 + 1/2 * 1/32, four with 1/2 * 5/32: within four standard errors of 600.
    assert abs(said.count(5) / 600 - 33 / 64) < 4 * (33 / 64 * 31 / 64 / 600) ** 0.5
    assert abs(said.count(4) / 600 - 5 / 64) < 4 * (5 / 64 * 59 / 64 / 600) ** 0.5


def test_half_of_the_paths_stay_near_the_middle():
    centres = [scene.sprites[0].path.centre for scene in scenes(400, seed=2)]
    away = np.abs(np.asarray(centres) - 0.5).max(axis=1)
    assert 0.4 < (away < 0.075).mean() < 0.8  # a quarter of 0.3, the most that a path may be away
    assert away.max() > 0.15


def test_a_single_frame_is_the_clip_at_its_moment():
    rng = np.random.default_rng(1)
    some = [world.sample_scene(rng) for _ in range(6)]
    clips = world.render(some, 9, 32)
    for frame in (0, 3, 8):
        single = world.render(some, 1, 32, [frame / 8] * len(some))
        torch.testing.assert_close(single[:, 0], clips[:, frame])
    panned = [dataclasses.replace(scene, pan=(0.2, 0.1)) for scene in some]
    clips = world.render(panned, 5, 32)
    torch.testing.assert_close(world.render(panned, 1, 32, [0.25] * 6)[:, 0], clips[:, 1])


def test_caption_text():
    full = Caption((Mention("ring", "red", "striped", "still"), Mention(motion="left")), "blue")
    expected = "a red striped ring standing still and a shape moving left on a dark blue background"
    assert full.text == expected


def test_colour_names():
    assert [world.colour_name(hue) for hue in (0, 355, 10, 10.5, 22.5, 325)] == [
        "red",
        "red",
        "red",
        None,
        None,
        "pink",
    ]


@given(st.floats(-720, 720), st.floats(-720, 720))
def test_hue_distance_is_a_distance_on_the_circle(a, b):
    apart = world.hue_distance(a, b)
    assert 0 <= apart <= 180
    assert apart == pytest.approx(world.hue_distance(b, a), abs=1e-6)
    assert apart == pytest.approx(world.hue_distance(a + 360, b), abs=1e-6)


def test_without_variety_a_word_of_motion_is_one_path():
    alike = scenes(64, two_share=0.0, variety=0.0)
    paths = {scene.sprites[0].path for scene in alike}
    assert len(paths) == len({path.motion for path in paths}) == len(world.MOTIONS)
    sprites = {dataclasses.replace(s.sprites[0], path=Path("still")) for s in alike}
    looks = {(sprite.shape, sprite.hue, sprite.texture, sprite.radius) for sprite in sprites}
    assert len(looks) == len({scene.background_hue for scene in alike}) == 1


def test_variety_widens_what_a_word_stands_for():
    def spread(variety):
        drawn = scenes(200, two_share=0.0, variety=variety)
        runs = [s.sprites[0].path for s in drawn if s.sprites[0].path.motion == "left"]
        return np.std([path.travel for path in runs]), np.std([path.centre for path in runs])

    narrow, half, wide = (spread(variety) for variety in (0.0, 0.5, 1.0))
    assert all(a < b < c for a, b, c in zip(narrow, half, wide, strict=True))


@pytest.mark.parametrize("variety", [0.0, 0.5, 1.0])
def test_variety_decides_how_often_captions_leave_out(variety):
    rng = np.random.default_rng(2)
    drawn = scenes(400, two_share=0.0)
    complete = [
        all((mention.shape, mention.texture, mention.motion))
        for scene in drawn
        for mention in world.sample_caption(rng, scene, variety).mentions
    ]
    expected = 1 - 0.5 * variety + 0.5 * variety * 0.5**3
    assert np.mean(complete) == pytest.approx(expected, abs=4 * 0.5 / 400**0.5)
