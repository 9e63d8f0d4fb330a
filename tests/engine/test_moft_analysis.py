"""What is shown of a clip's motion, and the measures of how far it can be trusted."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import kinetiq as kq
from kinetiq import drawing, moft_analysis
from kinetiq.checkpoint import load_checkpoint
from kinetiq.drawing import prepare_folder
from kinetiq.moft import (
    AXES,
    DIRECTIONS,
    Knots,
    MotionChannels,
    align,
    load_channels,
    moft,
    reference_feature,
    slope,
    sprite_pan,
)
from kinetiq.moft_analysis import (
    PICTURE,
    REPORT,
    analyze_moft,
    as_json,
    channel_agreement,
    content_free_colours,
    describe,
    draw,
    strength,
)
from kinetiq.sprites.world import Scene, sample_sprite
from kinetiq.taps import find_tap


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def known_channels(width=32, seed=0):
    """Motion channels without a calibration; pans run straight along the loadings."""
    loadings = dict(zip(AXES, torch.linalg.qr(random(width, 2, seed=seed)).Q.T, strict=True))
    knots = {}
    for axis, pair in AXES.items():
        for direction, way in zip(pair, (-1.0, 1.0), strict=True):
            ends = torch.stack([-way * loadings[axis], way * loadings[axis]])
            knots[direction] = Knots(torch.tensor([[0.0], [1.0]]).expand(2, width), ends)
    spread = dict.fromkeys(AXES, 0.9)
    return MotionChannels("animatediff", "known", "f", "up_blocks.1", loadings, spread, knots)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    import tiny

    with kq.Engine.load(tiny.write_tiny_folder(tmp_path_factory.mktemp("moft") / "model")) as made:
        yield made


@pytest.fixture
def channels(monkeypatch):
    """Channels that the analysis is given instead of a calibration."""
    known, asked = known_channels(), []
    monkeypatch.setattr(
        moft_analysis, "load_channels", lambda *given, **_: asked.append(given) or known
    )
    return known


@pytest.fixture
def reference():
    rng = np.random.default_rng(0)
    return kq.Clip.from_array(rng.integers(0, 255, (4, 16, 16, 3), dtype=np.uint8))


@pytest.fixture
def analysis(engine, channels, reference):
    left, moving = np.zeros((16, 16)), np.zeros((4, 16, 16))
    left[:, :8] = 1.0
    for frame in range(4):
        moving[frame, :, 4 * frame : 4 * frame + 4] = 0.5
    regions = {"left": left, "moving": moving}
    return analyze_moft(engine, reference, regions, frames=4, height=16, width=16, share=0.1)


def test_it_shows_the_feature_of_the_reference(engine, channels, reference, analysis):
    latents = engine.encode(reference)
    wanted = moft(reference_feature(engine.checkpoint, engine.denoiser, latents))
    for axis in AXES:
        field = wanted @ channels.loadings[axis]
        assert (analysis.maps[axis] - field).abs().max() <= 1e-4 * field.abs().max()
    assert analysis.shown.shape == (4, 16, 16, 3)
    assert analysis.reference == reference.fingerprint
    assert {name: len(chosen) for name, chosen in analysis.selected.items()} == dict.fromkeys(
        AXES, 3
    )
    left, moving = analysis.regions
    selected = channels.select(share=0.1)
    mean = wanted[:, :, :4].mean((1, 2))
    torch.testing.assert_close(left.curves, mean[:, selected], rtol=1e-3, atol=1e-4)
    for axis in AXES:
        torch.testing.assert_close(
            left.components[axis], mean @ channels.loadings[axis], rtol=1e-3, atol=1e-4
        )
        assert left.slopes[axis] == pytest.approx(channels.slopes(mean)[axis], rel=1e-2, abs=1e-3)
    followed = torch.stack([wanted[f, :, 2 * f : 2 * f + 2].mean((0, 1)) for f in range(4)])
    torch.testing.assert_close(moving.curves, followed[:, selected], rtol=1e-3, atol=1e-4)
    assert (left.name, left.share, moving.share) == ("left", 0.5, 0.125)


def test_the_middle_is_the_region_that_is_not_said(engine, channels, reference):
    found = analyze_moft(engine, reference, frames=4, height=16, width=16)
    ((region),) = found.regions
    assert (region.name, region.share) == ("middle", 0.25)
    for axis in AXES:
        torch.testing.assert_close(
            region.components[axis],
            found.maps[axis][:, 2:6, 2:6].mean((1, 2)),
            rtol=1e-3,
            atol=1e-5,
        )


def test_colours_are_principal_components_about_grey():
    axes = torch.linalg.qr(random(12, 4)).Q
    values = random(5, 3, 4, 4) * torch.tensor([50.0, 10.0, 2.0, 0.01])
    values = values - values.mean((0, 1, 2))
    colours, explained = content_free_colours(values @ axes.T)
    assert colours.shape == (5, 3, 4, 3)
    assert sum(explained) == pytest.approx(1.0, abs=1e-3)
    assert list(explained) == sorted(explained, reverse=True)
    for component in range(3):
        shown = 2 * colours[..., component].flatten() - 1
        assert float(shown.abs().max()) == pytest.approx(1.0)
        fits = [
            abs(float(torch.corrcoef(torch.stack([shown, v.flatten()]))[0, 1]))
            for v in values.movedim(-1, 0)
        ]
        assert max(fits) > 0.95
    still, explained = content_free_colours(torch.zeros(5, 3, 4, 12))
    assert torch.equal(still, torch.full((5, 3, 4, 3), 0.5)) and not any(explained)
    few, _ = content_free_colours(random(5, 3, 4, 2))
    assert torch.equal(few[..., 2], torch.full((5, 3, 4), 0.5))


def test_the_report_holds_all_figures(analysis, channels):
    said = json.loads(json.dumps(as_json(analysis)))
    assert (said["model"], said["tap"], said["width"]) == ("known", "up_blocks.1", 32)
    assert (said["frames"], said["map"], said["channel_share"]) == (4, [8, 8], 0.1)
    for axis in AXES:
        chosen = channels.select(axis, 0.1)
        assert said["axes"][axis]["channels"] == chosen.tolist()
        assert said["axes"][axis]["loadings"] == channels.loadings[axis][chosen].tolist()
    assert [region["name"] for region in said["regions"]] == ["left", "moving"]
    curves = said["regions"][0]["curves"]
    assert list(map(int, curves)) == channels.select(share=0.1).tolist()
    assert list(curves.values()) == analysis.regions[0].curves.T.tolist()
    words = describe(analysis)
    for region in analysis.regions:
        assert f"{region.name:<6}  horizontal {region.slopes['horizontal']:+.2f}" in words
    assert "Motion channels of known at up_blocks.1, of 32:" in words
    assert (
        "1 is that of a pan right or down by 0.4 of the frame in its middle, of -1 one left or up"
        in words
    )


def test_it_is_drawn(analysis, tmp_path):
    prepare_folder(tmp_path / "new", (PICTURE, REPORT))
    draw(analysis, tmp_path / "new" / "moft.png")
    with Image.open(tmp_path / "new" / "moft.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 500
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["moft.png"]


def test_what_is_drawn_of_the_tap_lies_where_the_clip_shows_it(analysis):
    from matplotlib.figure import Figure

    part = Figure()
    moft_analysis._draw_maps(part, analysis)
    pictures = [image.get_array() for cell in part.axes for image in cell.get_images()]
    assert len(pictures) == 4 * 4
    assert {picture.shape[:2] for picture in pictures} == {(16, 16)}
    wanted = align(analysis.maps["vertical"][..., None], 16, 16)[-1, ..., 0]
    np.testing.assert_array_equal(pictures[-1], wanted.numpy())


def test_what_keeps_it_from_being_drawn_is_said_first(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(kq.OutputError, match=r"^analyze: .*file must be a folder"):
        prepare_folder(tmp_path / "file", (PICTURE, REPORT))
    monkeypatch.setattr(drawing, "find_spec", lambda _: None)
    with pytest.raises(kq.MissingDependencyError, match=r"draws with matplotlib"):
        prepare_folder(tmp_path / "other", (PICTURE, REPORT))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("frames", "region", "options", "error", "message"),
    [
        (
            1,
            None,
            {},
            kq.ClipError,
            r"^analyze: the reference must have at least 2 frames, got a still",
        ),
        (
            4,
            None,
            {"frames": 1},
            kq.RequestError,
            r"^analyze: frames must be at least 2 to move, got 1",
        ),
        (4, np.zeros((16, 16)), {}, kq.RequestError, r"^region: must hold at least one place"),
        (
            4,
            np.stack([np.ones((16, 16))] * 2 + [np.zeros((16, 16))] * 2),
            {},
            kq.RequestError,
            r"^region: here must hold .* in every frame, got none in frame 2, counted from 0",
        ),
        (4, np.ones((5, 16, 16)), {}, kq.RequestError, r"^region: must be .*\[frames = 4"),
        (4, None, {"tap": "up"}, kq.RequestError, r"^tap: must be a block"),
        (4, None, {"share": 0.0}, kq.RequestError, r"^channels: share must be above 0"),
    ],
)
def test_bad_input_is_refused(engine, frames, region, options, error, message):
    clip = kq.Clip.from_array(np.zeros((frames, 16, 16, 3), np.uint8))
    regions = None if region is None else {"here": region}
    with pytest.raises(error, match=message):
        analyze_moft(engine, clip, regions, **{"frames": 4, "height": 16, "width": 16} | options)


# How far the feature can be trusted.


def test_strength_is_the_root_mean_square():
    assert strength(torch.tensor([3.0, -4.0])) == pytest.approx(12.5**0.5)
    assert strength(torch.zeros(2, 3)) == 0.0


def test_few_channels_agree_by_rank_and_many_by_overlap():
    one, other = known_channels(400), known_channels(400, seed=1)
    assert channel_agreement(one, one, "vertical").value == 1.0
    assert channel_agreement(one, one, "vertical").measure == "jaccard"
    few = channel_agreement(one, other, "vertical", share=15 / 400)
    assert few.measure == "rank" and abs(few.value) < 0.2
    turned = MotionChannels(
        **{
            name: getattr(one, name)
            for name in ("family", "checkpoint", "fingerprint", "tap", "spread", "knots")
        },
        loadings={axis: -loading for axis, loading in one.loadings.items()},
    )
    assert channel_agreement(one, turned, "vertical", share=0.01).value == pytest.approx(-1.0)
    assert channel_agreement(one, turned, "vertical").value == 1.0
    chosen = [set(c.select("horizontal", 0.5).tolist()) for c in (one, other)]
    overlap = channel_agreement(one, other, "horizontal", share=0.5)
    assert overlap.value == len(chosen[0] & chosen[1]) / len(chosen[0] | chosen[1])


# The embedded model.


def test_the_embedded_model_brings_its_channels():
    checkpoint = load_checkpoint("sprites")
    found = load_channels(checkpoint, None)
    assert found.fingerprint == checkpoint.fingerprint
    assert found.width == find_tap(checkpoint.unet).channels
    for axis, (back, forth) in AXES.items():
        assert len(found.select(axis)) == 5
        pans = [found.synthesise(way, 8) @ found.loadings[axis] for way in (back, forth)]
        assert float(slope(pans[0])) < 0.0 < float(slope(pans[1]))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_pan_has_the_slope_of_a_pan(direction):
    """Without a region; of a few pictures together, since each shape has a strength of its own."""
    axis, sign = next(
        (axis, (-1.0, 1.0)[ways.index(direction)])
        for axis, ways in AXES.items()
        if direction in ways
    )
    rng = np.random.default_rng(11)
    scenes = [Scene((sample_sprite(rng, motion="still", room=0.25),)) for _ in range(2)]
    with kq.Engine.load("sprites") as engine:
        pans = [sprite_pan(scene, direction, 8, 32) for scene in scenes]
        slopes = [analyze_moft(engine, pan).regions[0].slopes for pan in pans]
    along = np.mean([slope[axis] for slope in slopes])
    assert 0.5 <= sign * along <= 1.5
    (across,) = (np.mean([slope[other] for slope in slopes]) for other in AXES if other != axis)
    assert abs(across) < 0.3 * abs(along)
