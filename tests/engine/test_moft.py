"""The motion feature, the channels that carry motion, and the files that they are kept in."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from safetensors.torch import load_file, save_file

import kinetiq as kq
from kinetiq import moft as module
from kinetiq.engine import Engine
from kinetiq.moft import (
    AXES,
    DIRECTIONS,
    TRAVEL,
    Knots,
    MotionChannels,
    align,
    calibrate,
    channels_file,
    channels_of_pans,
    draw_texture,
    load_channels,
    middle,
    middle_area,
    middle_curve,
    moft,
    pan,
    principal_components,
    read_channels,
    reference_feature,
    reference_features,
    slope,
    sprite_pan,
    store_channels,
    write_channels,
)
from kinetiq.sampler import build_sampler_table
from kinetiq.sprites.world import Path as Way
from kinetiq.sprites.world import Scene, Sprite
from kinetiq.taps import Tap, find_tap


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The feature.


def test_the_feature_is_what_changes_in_the_channels():
    x = random(2, 5, 3, 4, 6, dtype=torch.float64)
    chosen = torch.tensor([4, 1])
    got = moft(x, chosen)
    for row in range(2):
        for i, channel in enumerate(chosen.tolist()):
            wanted = x[row, ..., channel] - x[row, ..., channel].mean(0)
            torch.testing.assert_close(got[row, ..., i], wanted, rtol=0, atol=1e-14)
    assert torch.equal(moft(x[0], chosen), got[0])  # a clip alone
    assert moft(x).shape == x.shape


def test_a_region_gives_means_over_it():
    x = random(2, 5, 3, 4, 6, dtype=torch.float64)
    mask = torch.zeros(2, 3, 4)
    mask[0, 1, 2] = 1.0
    mask[1, :, 0] = 0.5
    got, whole = moft(x, region=mask), moft(x)
    torch.testing.assert_close(got[0], whole[0, :, 1, 2])
    torch.testing.assert_close(got[1], whole[1, :, :, 0].mean(1))
    torch.testing.assert_close(moft(x[1], region=mask[1]), got[1])


def test_a_clip_whose_frames_are_alike_has_none():
    still = 1e3 * random(1, 3, 4, 6).expand(8, -1, -1, -1)
    bound = len(still) * torch.finfo(torch.float32).eps * still.abs().max()  # of a sum's rounding
    assert moft(still).abs().max() <= bound


def test_the_feature_takes_strides_and_passes_a_gradient():
    x = random(2, 6, 5, 3, 4, dtype=torch.float64).movedim(1, -1).requires_grad_()
    assert not x.is_contiguous()
    wanted = random(2, 5, 3, 4, 1, dtype=torch.float64, seed=1)
    (moft(x, torch.tensor([2])) * wanted).sum().backward()
    torch.testing.assert_close(x.grad[..., 2:3], wanted - wanted.mean(1, keepdim=True))
    assert not x.grad[..., [0, 1, 3, 4, 5]].any()


def test_the_area_of_the_middle_gives_its_mean():
    x = random(5, 7, 6, 3, dtype=torch.float64)
    area = middle_area(7, 6)
    torch.testing.assert_close(moft(x, region=area), middle_curve(x))
    assert middle_area(1, 1).all()


@pytest.mark.parametrize(
    ("shape", "region", "message"),
    [
        (
            (3, 4, 6),
            None,
            r"^moft: features must be \[..., frames, h, w, channels\], got \[3, 4, 6\]$",
        ),
        ((5, 3, 4, 6), (4, 3), r"^moft: region must be \[..., h, w\] = \[3, 4\], got \[4, 3\]$"),
        ((2, 5, 3, 4, 6), (3, 3, 4), r"= \[2, 3, 4\], got \[3, 3, 4\]$"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape, region, message):
    with pytest.raises(kq.ShapeError, match=message):
        moft(torch.zeros(shape), region=None if region is None else torch.zeros(region))


def test_aligning_is_bilinear_over_the_map():
    x = random(2, 5, 3, 4, 6)
    got = align(x, 7, 9)
    for row in range(2):
        wanted = F.interpolate(x[row].permute(0, 3, 1, 2), (7, 9), mode="bilinear")
        torch.testing.assert_close(got[row], wanted.permute(0, 2, 3, 1))
    assert align(x, 3, 4) is x
    torch.testing.assert_close(align(x[0], 7, 9), got[0])


def test_the_middle_is_half_of_each_side():
    x = random(2, 5, 9, 4, 6)
    assert torch.equal(middle(x), x[:, :, 2:6, 1:3])
    assert torch.equal(middle(x[..., :1, :1, :]), x[..., :1, :1, :])
    chosen = torch.tensor([3, 0])
    torch.testing.assert_close(
        middle_curve(x, chosen), moft(x)[:, :, 2:6, 1:3][..., chosen].mean((2, 3))
    )


# Reading the feature of a reference.


class ConstantNoise:
    """A network that always takes the same for noise, so that inversion is exact."""

    def __init__(self, noise):
        self.noise, self.told, self.read = noise, [], []

    def predict(self, latents, timesteps, *_):  # noqa: ARG002  a denoiser's signature
        self.told.append(timesteps.tolist())
        return self.noise

    def features(self, latents, timesteps, _, __, tap):
        self.read.append((latents, timesteps.tolist(), tap))
        return latents.movedim(1, -1)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tiny.write_tiny_folder(tmp_path_factory.mktemp("moft") / "model")
    (folder / "kinetiq.json").write_text('{"frames": 4, "height": 16, "width": 16}')
    made = Engine.load(folder)
    yield made
    made.close()


def test_the_reference_is_inverted_to_little_noise_and_no_further(engine):
    checkpoint = engine.checkpoint
    clean, noise = random(2, 4, 3, 8, 8), random(2, 4, 3, 8, 8, seed=1)
    denoiser = ConstantNoise(noise)
    heard = []
    got = reference_features(
        checkpoint, denoiser, clean, "mid_block", progress=lambda *one: heard.append(one)
    )
    table = build_sampler_table("ddim", checkpoint.scheduler_config, 25)
    last = np.abs(table.timestep - 200).argmin()
    assert abs(table.timestep[last] - 200) < 20
    walked = table.timestep[: last - 1 : -1]
    assert denoiser.told == [[step, step] for step in walked]
    assert heard == [("inverting", done + 1, len(walked)) for done in range(len(walked))]
    ((latents, timesteps, tap),) = denoiser.read
    assert timesteps == [table.timestep[last]] * 2 and tap == "mid_block"
    row = table.row(int(last))
    exact = row.source_signal * clean.double() + row.source_noise * noise.double()
    # Each of the steps back rounds a few times.
    bound = 8 * len(walked) * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (latents - exact).abs().max() <= bound
    assert torch.equal(got, latents.movedim(1, -1))


@pytest.mark.parametrize(("depth", "steps"), [(0.0, 1), (1.0, 25)])
def test_the_depth_says_how_far_back(engine, depth, steps):
    denoiser = ConstantNoise(torch.zeros(1, 4, 3, 8, 8))
    reference_feature(engine.checkpoint, denoiser, random(4, 3, 8, 8), depth=depth)
    assert len(denoiser.told) == steps


def test_a_clip_is_read_as_among_others(engine):
    given = random(2, 4, 4, 8, 8)
    both = reference_features(engine.checkpoint, engine.denoiser, given)
    alone = reference_feature(engine.checkpoint, engine.denoiser, given[1])
    assert both.shape == (2, 4, 8, 8, 32) and both.dtype == torch.float32
    assert not both.requires_grad and not both.is_inference()
    assert (alone - both[1]).abs().max() <= 1e-4 * both.abs().max()


class Tight:
    """A denoiser that runs out of memory where it is given more than `room` clips."""

    def __init__(self, denoiser, room):
        self.denoiser, self.room, self.seen = denoiser, room, []

    def predict(self, latents, *given):
        self.seen.append(len(latents))
        if len(latents) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        return self.denoiser.predict(latents, *given)

    def features(self, *given):
        return self.denoiser.features(*given)


def test_memory_that_runs_out_halves_the_clips(engine):
    given = random(5, 4, 4, 8, 8)
    wanted = reference_features(engine.checkpoint, engine.denoiser, given)
    tight = Tight(engine.denoiser, 2)
    got = reference_features(engine.checkpoint, tight, given)
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    steps = len(tight.seen[2:]) // 3
    assert tight.seen == [5, 3, *[2] * steps, *[2] * steps, *[1] * steps]


def test_a_clip_that_does_not_fit_alone_is_not_tried_again(engine):
    tight = Tight(engine.denoiser, 0)
    with pytest.raises(torch.OutOfMemoryError):
        reference_features(engine.checkpoint, tight, random(2, 4, 4, 8, 8))
    assert tight.seen == [2, 1]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (random(1, 4, 3, 8, 8) * math.inf, r"at step 1 of \d+ of the inversion; try another dtype"),
        (None, r"at the output of up_blocks.1; try another dtype"),
    ],
)
def test_what_is_not_finite_is_named(engine, broken, message):
    denoiser = ConstantNoise(torch.zeros(1, 4, 3, 8, 8) if broken is None else broken)
    if broken is None:
        denoiser.features = lambda *_: torch.full((1, 3, 8, 8, 32), math.nan)
    with pytest.raises(
        kq.NonFiniteError, match=rf"^moft: features must be finite, got .* {message}"
    ):
        reference_features(engine.checkpoint, denoiser, random(1, 4, 3, 8, 8))


def test_bad_options_of_reading_are_refused(engine):
    with pytest.raises(kq.RequestError, match=r"^moft: depth must be from 0 to 1, got 1.5$"):
        reference_features(engine.checkpoint, engine.denoiser, random(1, 4, 3, 8, 8), depth=1.5)
    with pytest.raises(
        kq.ShapeError, match=r"^moft: latents must be \[clips, .*got \[4, 3, 8, 8\]$"
    ):
        reference_features(engine.checkpoint, engine.denoiser, random(4, 3, 8, 8))
    with pytest.raises(kq.RequestError, match=r"^tap: must be a block"):
        reference_features(engine.checkpoint, engine.denoiser, random(1, 4, 3, 8, 8), "up")


# Channels, from pans whose features are known.

WIDTH, FRAMES = 40, 5
CHECKPOINT = SimpleNamespace(family="animatediff", name="known", fingerprint="f" * 64)
TAP = Tap("up_blocks.1", WIDTH)
COMMON = random(WIDTH, seed=9)
TRUE = dict(zip(AXES, torch.linalg.qr(random(WIDTH, 2)).Q.T, strict=True))


def known_pans(noise=1e-4, sign=1.0, common=5.0, seed=3):
    """Curves that run along `TRUE` in time, up in the second direction of an axis.

    What all pans have in common is stronger, and must not be taken for motion.
    """
    time = torch.linspace(-1.0, 1.0, FRAMES)[:, None]
    pans = {}
    for axis, pair in AXES.items():
        for direction, way in zip(pair, (-sign, sign), strict=True):
            clips = noise * random(3, FRAMES, WIDTH, seed=seed) + way * time * TRUE[axis]
            clips = clips + common * time.square() * COMMON
            pans[direction] = clips - clips.mean(1, keepdim=True)
            seed += 1
    return pans


@pytest.fixture(scope="module")
def channels():
    return channels_of_pans(CHECKPOINT, TAP, known_pans())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_loadings_are_the_component_of_pans_with_its_sign(sign):
    found = channels_of_pans(CHECKPOINT, TAP, known_pans(sign=sign))
    for axis in AXES:
        assert float(found.loadings[axis] @ (sign * TRUE[axis])) > 0.999
        assert float(found.loadings[axis].norm()) == pytest.approx(1.0)
        assert found.spread[axis] > 0.98
    assert (found.family, found.checkpoint, found.tap) == ("animatediff", "known", "up_blocks.1")
    assert found.fingerprint == CHECKPOINT.fingerprint
    assert found.width == WIDTH


def test_principal_components_are_those_of_the_singular_values():
    samples = random(50, 7, dtype=torch.float64) * torch.arange(1.0, 8.0, dtype=torch.float64) + 9
    components, shares = principal_components(samples, 3)
    _, values, vectors = torch.linalg.svd(samples - samples.mean(0), full_matrices=False)
    torch.testing.assert_close((components.T @ vectors[:3].T).abs(), torch.eye(3).double())
    torch.testing.assert_close(shares, (values**2 / (values**2).sum())[:3])
    assert not principal_components(torch.ones(5, 4))[1].any()


def test_the_slope_is_that_of_a_line():
    curve = torch.linspace(2.0, 5.0, 7, dtype=torch.float64)
    assert float(slope(curve)) == pytest.approx(3.0)
    assert slope(torch.stack([curve, -curve], dim=1)).tolist() == pytest.approx([3.0, -3.0])


def test_the_largest_loadings_are_selected(channels):
    for axis in AXES:
        wanted = TRUE[axis].abs().argsort(descending=True)[:4].tolist()
        got = channels.select(axis, 0.1)
        assert got.dtype == torch.int64
        assert got.tolist() == wanted
        assert channels.select(axis, 1e-6).tolist() == wanted[:1]  # never none
        assert sorted(channels.select(axis, 1.0).tolist()) == list(range(WIDTH))
    both = channels.select(share=0.1).tolist()
    assert set(both) == {
        *channels.select("horizontal", 0.1).tolist(),
        *channels.select("vertical", 0.1).tolist(),
    }
    assert len(both) == len(set(both))
    assert channels.select(("vertical",), 0.1).tolist() == channels.select("vertical", 0.1).tolist()
    assert len(channels.select("horizontal")) == round(0.04 * WIDTH)


@pytest.mark.parametrize(
    ("axes", "share", "message"),
    [
        ("sideways", 0.1, r"^channels: axes must be of horizontal, vertical, got 'sideways'$"),
        ((), 0.1, r"got \(\)$"),
        ("vertical", 0.0, r"^channels: share must be above 0 and at most 1, got 0.0$"),
        ("vertical", 1.1, r"got 1.1$"),
        ("vertical", math.nan, r"got nan$"),
        ("vertical", "much", r"got 'much'$"),
    ],
)
def test_bad_selections_are_refused(channels, axes, share, message):
    with pytest.raises(kq.RequestError, match=message):
        channels.select(axes, share)


def test_features_that_are_the_same_in_all_pans_are_refused():
    pans = {direction: random(2, FRAMES, WIDTH) for direction in DIRECTIONS}
    with pytest.raises(
        kq.CheckpointError, match=r"^moft: up_blocks.1 of known must tell .* left from"
    ):
        channels_of_pans(CHECKPOINT, TAP, pans)


# Synthesis.


def test_synthesis_goes_straight_from_one_extreme_to_the_other():
    curve = torch.tensor([[0.0, 3.0], [-1.0, 2.0], [5.0, 0.0], [4.0, 1.0], [4.5, 1.0]])
    pans = known_pans()
    pans["up"] = curve[None].expand(2, -1, -1)
    pans["down"] = -pans["up"]
    for direction in ("left", "right"):
        pans[direction] = pans[direction][..., :2]
    found = channels_of_pans(CHECKPOINT, Tap("up_blocks.1", 2), pans)
    torch.testing.assert_close(found.knots["up"].time, torch.tensor([[0.25, 0.0], [0.5, 0.5]]))
    torch.testing.assert_close(found.knots["up"].value, torch.tensor([[-1.0, 3.0], [5.0, 0.0]]))
    straight = torch.tensor([[-1.0, 3.0], [-1.0, 1.5], [5.0, 0.0], [5.0, 0.0], [5.0, 0.0]])
    wanted = straight - straight.mean(0)
    torch.testing.assert_close(found.synthesise("up", 5), wanted)
    torch.testing.assert_close(found.synthesise("up", 5, speed=0.5), wanted / 2)
    torch.testing.assert_close(found.synthesise("down", 5), -wanted)
    assert found.synthesise("up", 9)[::2].diff(dim=0).allclose(straight.diff(dim=0))


def test_a_channel_that_does_not_run_is_level():
    level = Knots(torch.zeros(2, 3), torch.full((2, 3), 4.0))
    knots = dict.fromkeys(DIRECTIONS, level)
    still = MotionChannels("animatediff", "", "", "mid_block", {}, {}, knots)
    assert not still.synthesise("left", 6).any()


def test_a_way_is_its_parts(channels):
    pans = {name: channels.synthesise(name, 8) for name in DIRECTIONS}
    torch.testing.assert_close(channels.synthesise_way(TRAVEL, 0.0, 8), pans["right"])
    torch.testing.assert_close(
        channels.synthesise_way(-TRAVEL / 2, -2 * TRAVEL, 8), pans["left"] / 2 + 2 * pans["up"]
    )
    assert not channels.synthesise_way(0.0, 0.0, 8).any()


def test_slopes_are_counted_in_pans():
    channels = channels_of_pans(CHECKPOINT, TAP, known_pans(common=0.0))
    right, up = channels.synthesise("right", 8), channels.synthesise("up", 8)
    across, down = channels.slopes(0.5 * right).values()
    assert across == pytest.approx(0.5, abs=1e-3) and abs(down) < 1e-3
    assert channels.slopes(up)["vertical"] == pytest.approx(-1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("direction", "frames", "message"),
    [
        ("north", 8, r"^direction: must be one of left, right, up, down, got 'north'$"),
        ("left", 1, r"^frames: must be at least 2 to move, got 1$"),
    ],
)
def test_bad_syntheses_are_refused(channels, direction, frames, message):
    with pytest.raises(kq.RequestError, match=message):
        channels.synthesise(direction, frames)


# Pans.


@pytest.mark.parametrize(("frames", "height", "width"), [(4, 10, 20), (5, 7, 11)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_pan_moves_the_picture_a_constant_way(direction, frames, height, width):
    x, y = map(int, DIRECTIONS[direction])
    across, down = (max(1, round(TRAVEL * side / (frames - 1))) for side in (width, height))
    image = torch.arange(3.0 * 40 * 60).reshape(40, 60, 3)
    got = pan(image, direction, frames, height, width)
    assert got.shape == (frames, height, width, 3)
    for before, after in itertools.pairwise(got):
        moved = torch.roll(before, (y * down, x * across), dims=(0, 1))
        inner = slice(down, -down), slice(across, -across)  # what did not come in from outside
        assert torch.equal(after[inner], moved[inner])


def test_a_pan_fits_into_the_smallest_picture():
    frames, side = 4, 10
    room = side + 3 * round(TRAVEL * side / 3)
    image = torch.rand(room, room, 3)
    for direction in DIRECTIONS:
        assert pan(image, direction, frames, side, side).shape == (frames, side, side, 3)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_sprite_is_panned_about_its_place(direction):
    scene = Scene((Sprite("circle", 0.0, Way("still", centre=(0.5, 0.45)), radius=0.1),))
    clip = sprite_pan(scene, direction, 5, 40)
    red = clip.frames[..., 0].astype(float)
    red -= red.min()
    grid = (np.arange(40) + 0.5) / 40
    centre = np.stack(
        [(red.sum(1) @ grid) / red.sum((1, 2)), (red.sum(2) @ grid) / red.sum((1, 2))], axis=1
    )
    x, y = DIRECTIONS[direction]
    wanted = np.array([0.5, 0.45]) + np.linspace(-0.5, 0.5, 5)[:, None] * TRAVEL * np.array([x, y])
    assert np.abs(centre - wanted).max() < 0.01


def test_textures_are_pictures():
    first, again = (draw_texture(np.random.default_rng(1), 24, 36) for _ in range(2))
    assert first.shape == (24, 36, 3) and torch.equal(first, again)
    assert float(first.min()) >= 0.0 and float(first.max()) <= 1.0
    assert float(first.std()) > 0.1


# Calibration of a whole model, and its files.


def test_a_model_is_calibrated_on_its_pans(engine):
    heard = []
    found = calibrate(
        engine.checkpoint, engine.denoiser, stills=1, progress=lambda *one: heard.append(one)
    )
    assert found.width == 32 and found.tap == "up_blocks.1"
    assert found.fingerprint == engine.checkpoint.fingerprint
    assert heard == [("calibrating", done, 4) for done in range(5)]
    again = calibrate(engine.checkpoint, engine.denoiser, stills=1)
    for axis in AXES:
        assert torch.equal(found.loadings[axis], again.loadings[axis])
        pans = [found.synthesise(direction, 4) @ found.loadings[axis] for direction in AXES[axis]]
        assert float(slope(pans[1] - pans[0])) > 0.0


def test_given_pictures_are_panned(engine, monkeypatch):
    seen = []
    encode = Engine.encode
    monkeypatch.setattr(
        Engine, "encode", lambda self, clip: seen.append(clip) or encode(self, clip)
    )
    picture = np.zeros((44, 88, 3), np.uint8)
    picture[:, 42:46, 0] = 255  # an upright line, over a level edge
    picture[22:, :, 1] = 255
    found = calibrate(
        engine.checkpoint,
        engine.denoiser,
        "mid_block",
        pictures=[kq.Clip.from_array(picture[None])],
    )
    assert found.tap == "mid_block"
    assert [clip.frames.shape for clip in seen] == [(4, 16, 16, 3)] * 4
    left, right, up, down = (clip.frames[..., 0].mean(1).argmax(-1) for clip in seen)
    assert (np.diff(left) < 0).all() and (np.diff(right) > 0).all()
    assert (up == up[0]).all() and (down == down[0]).all()


def test_nothing_to_pan_is_refused(engine):
    with pytest.raises(
        kq.RequestError, match=r"^moft: calibration must have at least 1 still .* got 0"
    ):
        calibrate(engine.checkpoint, engine.denoiser, pictures=[])


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kinetiq" / "moft"


def same(one, other):
    plain = ("family", "checkpoint", "fingerprint", "tap")
    assert [getattr(one, name) for name in plain] == [getattr(other, name) for name in plain]
    for axis in AXES:
        assert torch.equal(one.loadings[axis], other.loadings[axis])
        assert one.spread[axis] == pytest.approx(other.spread[axis])
    for direction in DIRECTIONS:
        assert torch.equal(one.knots[direction].time, other.knots[direction].time)
        assert torch.equal(one.knots[direction].value, other.knots[direction].value)


def test_channels_are_found_once_and_kept(engine, cache, monkeypatch):
    monkeypatch.setattr(module, "STILLS", 1)
    found = load_channels(engine.checkpoint, engine.denoiser)
    (kept,) = cache.iterdir()
    assert kept == channels_file(engine.checkpoint, find_tap(engine.checkpoint.unet))
    assert engine.checkpoint.fingerprint.startswith(kept.name.partition("-")[0])
    monkeypatch.setattr(module, "calibrate", None)  # must not be needed
    same(load_channels(engine.checkpoint, engine.denoiser, "up_blocks.1"), found)


def test_a_file_of_channels_is_read_as_it_was_written(channels, tmp_path, file_mode):
    path = tmp_path / "one.safetensors"
    write_channels(path, channels)
    same(read_channels(path, CHECKPOINT, TAP), channels)
    assert path.stat().st_mode & 0o777 == file_mode


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "must be a file of motion channels: .*No such file"),
        (lambda path: path.write_bytes(b"none"), "must be a file of motion channels: "),
        (
            lambda path: resave(path, {"fingerprint": "0"}),
            "must have the fingerprint 'ffff.*got '0'",
        ),
        (
            lambda path: resave(path, {"tap": "mid_block"}),
            "must have the tap 'up_blocks.1'.* got 'mid",
        ),
        (lambda path: resave(path, {"format": "other"}), "must have the format .* got 'other'"),
        (
            lambda path: resave(path, {}, drop="time.up"),
            r"time.up of .* numbers \[2, 40\], got None",
        ),
        (
            lambda path: resave(path, {}, put={"loadings.vertical": torch.zeros(3)}),
            r"loadings.vertical of .* must be finite numbers \[40\], got \[3\]",
        ),
        (
            lambda path: resave(path, {}, put={"value.left": torch.full((2, 40), math.nan)}),
            r"value.left of .* must be finite numbers",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(channels, tmp_path, change, message):
    path = tmp_path / "one.safetensors"
    write_channels(path, channels)
    change(path)
    with pytest.raises(kq.CheckpointError, match=rf"^moft: .*{message}.*make it again with"):
        read_channels(path, CHECKPOINT, TAP)


def resave(path, said, drop=None, put=None):
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items() if name != drop}
    metadata = {"format": module.FORMAT, "fingerprint": CHECKPOINT.fingerprint, "tap": TAP.name}
    save_file(tensors | (put or {}), path, metadata=metadata | said)


def test_a_cache_that_cannot_be_written_is_said_before_the_work(engine, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(module, "calibrate", None)  # must not be reached
    with pytest.raises(kq.OutputError, match=r"^moft: .*must be a folder .*set XDG_CACHE_HOME"):
        store_channels(engine.checkpoint, engine.denoiser)
