import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional

from kinetiq.errors import ClipError, RequestError
from kinetiq.sprites import reading, world
from kinetiq.sprites.reading import read_clip, read_clips
from kinetiq.sprites.world import Path, Scene, Sprite

FRAMES = 8
# Measured on 300 rendered clips: every shape and texture right, hue within 0.1 degree, radius within
# 0.001, path error 0.04 pixel (root mean square over clips) and above 0.13 in one clip only. The
# bounds are for the catalogue below, whose worst clips they leave more than twice.
CLEAN_PIXELS = 0.3
SPOILED_PIXELS = 0.4


def catalogue():
    """One clip of every shape, texture and motion in turn, with hues all round the circle."""
    rng = np.random.default_rng(3)
    triples = itertools.product(world.SHAPES, world.TEXTURES, world.MOTIONS)
    for index, (shape, texture, motion) in enumerate(triples):
        if index % 3 == 0:
            sprite = world.sample_sprite(
                rng, shape=shape, hue=(index * 47.0) % 360.0, texture=texture, motion=motion
            )
            yield Scene((sprite,), background_hue=float(rng.uniform(0, 360)))


def spoil(clips, blur=0.0, noise=0.0):
    """A crude model of a generated clip: Gaussian blur (pixels), then noise, then clipping."""
    if blur:
        kernel = torch.exp(-0.5 * (torch.arange(-6.0, 7.0) / blur) ** 2)
        kernel /= kernel.sum()
        planes = clips.movedim(-1, 2).flatten(0, 2)[:, None]
        planes = functional.pad(planes, (6, 6, 6, 6), mode="replicate")
        planes = functional.conv2d(planes, kernel.view(1, 1, 1, -1))
        planes = functional.conv2d(planes, kernel.view(1, 1, -1, 1))
        shape = (*clips.shape[:2], 3, *clips.shape[2:4])
        clips = planes.view(shape).movedim(2, -1)
    random = torch.Generator().manual_seed(0)
    return (clips + noise * torch.randn(clips.shape, generator=random)).clamp(0.0, 1.0)


@pytest.fixture(scope="module")
def scenes():
    return list(catalogue())


@pytest.fixture(scope="module")
def clips(scenes):
    return world.render(scenes, FRAMES, 32)


def path_error(sprite, truth, frames=FRAMES):
    """Root mean square distance in pixels of 32."""
    apart = sprite.path - truth.path.points(frames)
    return 32 * np.sqrt(np.square(apart).sum(-1).mean())


def test_reads_what_was_rendered(scenes, clips):
    assert len(scenes) == 40
    for scene, read in zip(scenes, read_clips(clips), strict=True):
        (truth,), (sprite,) = scene.sprites, read.sprites
        assert (sprite.shape, sprite.texture) == (truth.shape, truth.texture), truth
        assert world.hue_distance(sprite.hue, truth.hue) < 1
        assert sprite.saturation == pytest.approx(truth.saturation, abs=0.03)
        assert sprite.value == pytest.approx(truth.value, abs=0.03)
        assert sprite.colour == world.colour_name(sprite.hue, 15)
        assert sprite.radius == pytest.approx(truth.radius, abs=0.3 / 32)
        assert path_error(sprite, truth) < CLEAN_PIXELS
        assert sprite.visible.all() and sprite.visible.shape == (FRAMES,)
        assert max(sprite.shape_scores, key=sprite.shape_scores.__getitem__) == truth.shape
        assert sprite.shape_scores[truth.shape] > 0.97
        assert world.hue_distance(read.background_hue, scene.background_hue) < 1
        assert read.background_value == pytest.approx(scene.background_value, abs=0.005)
        assert read.residual < 0.03 and read.frames == FRAMES


@pytest.mark.parametrize(("blur", "noise"), [(0.0, 0.05), (0.8, 0.04), (1.3, 0.05)])
def test_reads_spoiled_clips(scenes, clips, blur, noise):
    reads = read_clips(spoil(clips[::2], blur, noise))
    for scene, read in zip(scenes[::2], reads, strict=True):
        (truth,), (sprite,) = scene.sprites, read.sprites
        assert (sprite.shape, sprite.texture) == (truth.shape, truth.texture), truth
        assert world.hue_distance(sprite.hue, truth.hue) < 5
        assert world.hue_distance(read.background_hue, scene.background_hue) < 5
        assert path_error(sprite, truth) < SPOILED_PIXELS


def test_draws_what_the_world_draws(scenes, clips):
    truth = scenes[7].sprites[0]
    (x, y), (u, v) = truth.path.points(1)[0], truth.texture_phase
    params = torch.tensor([[truth.radius, x, y, 0.01, u, v]], dtype=torch.float32)
    shape = torch.tensor([world.SHAPES.index(truth.shape)])
    texture = torch.tensor([world.TEXTURES.index(truth.texture)])
    with torch.inference_mode():
        cover, bright = reading._draw(shape, texture, params, *reading._pixels())
    white = dataclasses.replace(truth, saturation=0.0, value=1.0)
    on_black = world.render([Scene((white,), background_value=0.0)], 1, 32)[0, 0, ..., 0]
    torch.testing.assert_close(bright.view(32, 32), on_black)
    plain = dataclasses.replace(white, texture="plain")
    on_black = world.render([Scene((plain,), background_value=0.0)], 1, 32)[0, 0, ..., 0]
    torch.testing.assert_close(cover.view(32, 32), on_black)


@pytest.mark.parametrize(("frames", "size"), [(1, 32), (2, 48), (16, 64), (32, 37)])
def test_reads_other_lengths_and_sizes(frames, size):
    truth = Sprite("cross", 200.0, Path("circling", travel=0.3), texture="striped")
    read = read_clip(world.render([Scene((truth,))], frames, size)[0])
    (sprite,) = read.sprites
    assert (sprite.shape, sprite.texture, read.frames) == ("cross", "striped", frames)
    assert sprite.path.shape == (frames, 2)
    for figures in (sprite.frame_hue, sprite.frame_texture, sprite.frame_radius, sprite.visible):
        assert figures.shape == (frames,)
    assert path_error(sprite, truth, frames) < CLEAN_PIXELS


def test_bytes_floats_and_views_read_alike(clips):
    as_bytes = (clips[5] * 255).round().to(torch.uint8)
    frozen = as_bytes.numpy().copy()
    frozen.flags.writeable = False
    kinds = [clips[5], clips[5].numpy(), clips[5].half(), as_bytes, frozen]
    paths = [read_clip(kind).sprites[0].path for kind in kinds]
    for path in paths:
        assert np.abs(path - paths[0]).max() < 0.1 / 32
    backwards = read_clip(frozen[::-1]).sprites[0].path
    assert np.abs(backwards[::-1] - paths[0]).max() < 0.1 / 32


def test_a_clip_does_not_depend_on_its_neighbours(clips):
    together = read_clips(list(clips[:3]))[1].sprites[0]
    alone = read_clip(clips[1]).sprites[0]
    assert np.abs(together.path - alone.path).max() < 1e-4
    assert together.shape_scores == pytest.approx(alone.shape_scores, abs=1e-3)
    assert read_clips(clips[:0]) == [] and read_clips([]) == []


@pytest.mark.parametrize("count", [1, 2])
def test_finds_nothing_where_nothing_is(clips, count):
    random = torch.Generator().manual_seed(1)
    empty = torch.stack(
        [
            torch.full((FRAMES, 32, 32, 3), 0.2),
            torch.zeros(FRAMES, 32, 32, 3),
            torch.rand(FRAMES, 32, 32, 3, generator=random),
            (0.2 + 0.05 * torch.randn(FRAMES, 32, 32, 3, generator=random)).clamp(0, 1),
            clips[0].mean((1, 2), keepdim=True).expand(-1, 32, 32, -1),
        ]
    )
    for read in read_clips(empty, count):
        assert read.sprites == ()
        assert np.isfinite([read.background_hue, read.background_value, read.residual]).all()


def test_frames_without_the_shape_are_not_visible(scenes):
    truth = Sprite("ring", 90.0, Path("right", travel=0.4))
    clip = world.render([Scene((truth,))], FRAMES, 32)[0]
    clip[3] = clip[0, 0, 0]
    (sprite,) = read_clip(clip).sprites
    assert sprite.visible.tolist() == [True] * 3 + [False] + [True] * 4
    assert path_error(sprite, truth) < CLEAN_PIXELS  # interpolated, and the true path is straight


@pytest.mark.parametrize("hidden", [(1, 2, 3, 4, 5, 6), (1, 3, 5), (3, 5)])
def test_a_shape_that_vanishes_for_more_than_a_quarter_has_no_path(hidden):
    """Two frames would be enough to interpolate a run that the clip does not show."""
    truth = Sprite("square", 90.0, Path("right", travel=0.4))
    clip = world.render([Scene((truth,))], FRAMES, 32)[0]
    clip[list(hidden)] = clip[0, 0, 0].clone()
    (sprite,) = read_clip(clip).sprites
    assert sprite.shape == "square"
    assert np.flatnonzero(~sprite.visible).tolist() == list(hidden)
    if len(hidden) > 2:
        assert sprite.path is None
    else:
        assert path_error(sprite, truth) < CLEAN_PIXELS


def blobs(width, flatness=1.0):
    """Round or flat spots without an edge, in 15 places, sizes and colours."""
    rng = np.random.default_rng(7)
    axis = (torch.arange(32) + 0.5) / 32
    clips = []
    for index in range(15):
        sprite = world.sample_sprite(rng, hue=24.0 * index)
        scene = Scene((sprite,), background_hue=float(rng.uniform(0, 360)))
        path = torch.tensor(sprite.path.points(FRAMES), dtype=torch.float32)[..., None, None]
        x, y = axis - path[:, 0], axis[:, None] - path[:, 1]
        turn = torch.tensor(rng.uniform(0, np.pi))
        along, across = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
        size = width * rng.uniform(0.9, 1.1)
        cover = torch.exp(-0.5 * ((along / size) ** 2 + (across / (flatness * size)) ** 2))
        paint = torch.tensor(world._rgb(sprite.hue, 0.9, 0.95))
        ground = world.render([dataclasses.replace(scene, sprites=())], FRAMES, 32)[0]
        clips.append(torch.lerp(ground, paint.expand_as(ground), cover[..., None]))
    return torch.stack(clips)


def naming_figures(clips):
    """What naming a shape is judged by: softness, and the share that the best leaves of the next."""
    figures = []
    for read in read_clips(clips):
        (sprite,) = read.sprites
        best, following = sorted(sprite.shape_scores.values(), reverse=True)[:2]
        figures.append((sprite.softness, (1 - best) / (1 - following), sprite.shape))
    return figures


def test_the_limits_of_a_name_lie_between_shapes_and_what_is_none(clips):
    """Softness tells blobs from shapes, the lead over the next best tells other outlines from them."""
    worst = naming_figures(spoil(clips[::2], blur=1.3, noise=0.05))  # the softest that must be read
    assert max(softness for softness, _, _ in worst) < 0.26 < reading._SOFTEST
    assert max(left for _, left, _ in worst) < 0.78 < reading._LEFT_OF_NEXT
    for width, flatness in ((0.1, 1.0), (0.14, 1.0), (0.14, 0.6)):
        none = naming_figures(blobs(width, flatness))
        assert min(softness for softness, _, _ in none) > 0.32 > reading._SOFTEST
        assert {shape for _, _, shape in none} == {None}
    turn = np.deg2rad(30.0)
    axis = (torch.arange(32) + 0.5) / 32 - 0.5
    x, y = axis, axis[:, None]
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    distance = torch.sqrt(along**2 + (across / 0.55) ** 2) - 0.24
    cover = (0.5 - 0.55 * 32 * distance).clamp(0.0, 1.0)[..., None]
    ellipse = 0.2 + cover * torch.tensor([0.7, 0.1, 0.1])
    ((softness, left, shape),) = naming_figures(ellipse.expand(1, FRAMES, 32, 32, 3))
    assert shape is None and softness < reading._SOFTEST and left > reading._LEFT_OF_NEXT


def test_looking_for_two_shapes_finds_one_where_one_is(clips):
    """Halves of a shape would be shapes that nobody drew."""
    singles = torch.cat(
        [clips[::6], spoil(clips[::6], 0.8, 0.04), spoil(clips[::6], 1.3, 0.05), blobs(0.12)[::3]]
    )
    assert {len(read.sprites) for read in read_clips(singles, count=2)} == {1}


def test_a_grey_shape_has_no_colour_name():
    grey = Sprite("square", 0.0, Path("left"), saturation=0.05)
    (sprite,) = read_clip(world.render([Scene((grey,))], FRAMES, 32)[0]).sprites
    assert sprite.colour is None and sprite.saturation < 0.1


def test_frame_figures_follow_the_frames():
    small, large = (
        Sprite("circle", hue, Path("still"), texture=texture, radius=radius)
        for hue, texture, radius in ((90.0, "plain", 0.2), (135.0, "striped", 0.24))
    )
    clip = torch.cat([world.render([Scene((s,))], 4, 32)[0] for s in (small, large)])
    (sprite,) = read_clip(clip).sprites
    assert sprite.frame_hue == pytest.approx([90] * 4 + [135] * 4, abs=6)
    assert (np.diff(sprite.frame_radius)[[3]] > 0.02).all()
    plain, striped = sprite.frame_texture[:4].mean(), sprite.frame_texture[4:].mean()
    assert striped - plain > 0.2


@pytest.mark.parametrize("hues", [(0.0, 200.0), (120.0, 120.0)], ids=["two hues", "one hue"])
def test_reads_two_shapes(hues):
    one = Sprite("square", hues[0], Path("down", 0.3, centre=(0.25, 0.5)), radius=0.15)
    two = Sprite("circle", hues[1], Path("up", 0.3, centre=(0.75, 0.5)), "dotted", radius=0.16)
    clip = spoil(world.render([Scene((one, two))], FRAMES, 32), blur=0.7, noise=0.03)[0]
    left, right = sorted(read_clip(clip, count=2).sprites, key=lambda s: s.path[0, 0])
    for sprite, truth in ((left, one), (right, two)):
        assert (sprite.shape, sprite.texture) == (truth.shape, truth.texture)
        assert world.hue_distance(sprite.hue, truth.hue) < 5
        assert path_error(sprite, truth) < SPOILED_PIXELS


def test_reads_through_a_crossing():
    behind = Sprite("square", 0.0, Path("right", 0.5), radius=0.17)
    front = Sprite("triangle", 120.0, Path("down", 0.5), radius=0.14)
    (read,) = read_clips(world.render([Scene((behind, front))], FRAMES, 32), count=2)
    for truth in (behind, front):
        sprite = min(read.sprites, key=lambda s: world.hue_distance(s.hue, truth.hue))
        assert sprite.shape == truth.shape
        assert path_error(sprite, truth) < 1.0


BAD_CLIPS = {
    r"frames must be \[frames, size, size, 3\], got \[8, 32, 32\]": torch.zeros(8, 32, 32),
    r"got \[1, 8, 32, 40, 3\]": torch.zeros(8, 32, 40, 3),
    r"got \[1, 8, 32, 32, 4\]": torch.zeros(8, 32, 32, 4),
    r"32 to 64 pixels wide, got 16; resize": torch.zeros(8, 16, 16, 3),
    r"32 to 64 pixels wide, got 65": torch.zeros(8, 65, 65, 3),
    r"1 to 32 frames, got 33": torch.zeros(33, 32, 32, 3),
    r"1 to 32 frames, got 0": torch.zeros(0, 32, 32, 3),
    r"uint8 or floats, got torch\.int64": torch.zeros(8, 32, 32, 3, dtype=torch.int64),
    r"finite, got NaN": torch.full((8, 32, 32, 3), float("nan")),
    r"\[0, 1\], got 0 to 255; clamp": torch.linspace(0, 255, 8)[:, None, None, None].expand(
        8, 32, 32, 3
    ),
    r"array of numbers, got str": "clip.mp4",
    r"array of numbers, got NoneType": None,
}


@pytest.mark.parametrize(("message", "clip"), BAD_CLIPS.items(), ids=range(len(BAD_CLIPS)))
def test_says_what_is_wrong(message, clip):
    with pytest.raises(ClipError, match=message):
        read_clip(clip)


def test_says_what_is_wrong_with_many():
    with pytest.raises(RequestError, match="count must be 1 or 2, got 3"):
        read_clip(torch.zeros(8, 32, 32, 3), count=3)
    uneven = [torch.zeros(8, 32, 32, 3), torch.zeros(7, 32, 32, 3)]
    with pytest.raises(ClipError, match=r"one shape and type, got \[7, 32, 32, 3\]"):
        read_clips(uneven)
    with pytest.raises(ClipError, match=r"\[clips, frames, size, size, 3\], got \[8, 32, 32, 3\]"):
        read_clips(uneven[0])
