"""`kinetiq analyze moft`, as a user meets it."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from PIL import Image

from kinetiq import moft
from kinetiq.__main__ import main
from kinetiq.clip import Clip
from kinetiq.engine import Engine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.write_tiny_folder(tmp_path_factory.mktemp("moft") / "model")
    (folder / "kinetiq.json").write_text('{"frames": 4, "height": 16, "width": 16}')
    return folder


@pytest.fixture(scope="module")
def kept(model, tmp_path_factory):
    """A cache folder with the model's motion channels in it."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch, Engine.load(model) as engine:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setattr(moft, "STILLS", 1)
        moft.store_channels(engine.checkpoint, engine.denoiser)
    return cache


@pytest.fixture
def run(monkeypatch, tmp_path, model, kept):
    """Run `analyze moft` on the tiny model in a folder with a clip and masks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    rng = np.random.default_rng(0)
    Clip.from_array(rng.integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)).write("clip.webp")
    mask = np.zeros((16, 16), np.uint8)
    Image.fromarray(mask).save("black.png")
    mask[:, :8] = 255
    Image.fromarray(mask).save("left.png")
    frames = np.zeros((4, 16, 16, 3), np.uint8)
    frames[1:, :, :8] = 255
    Clip.from_array(frames).write("late.webp")

    def invoke(*words):
        result = CliRunner().invoke(main, ("analyze", "moft", "--model", str(model), *words))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


def test_a_clip_is_shown_in_words_figures_and_pictures(run, kept):
    before = {entry: entry.stat().st_mtime_ns for entry in (kept / "kinetiq").rglob("*")}
    result = run(
        *("--reference", "clip.webp", "--region", "left.png", "--share", "0.1", "--out", "shown")
    )
    assert result.exit_code == 0, result.output
    assert "left.png  horizontal " in result.output
    assert "moft.png and moft.json are in shown" in result.output
    said = json.loads(Path("shown/moft.json").read_text())
    assert [(region["name"], region["share"]) for region in said["regions"]] == [("left.png", 0.5)]
    assert said["channel_share"] == 0.1 and len(said["axes"]["vertical"]["channels"]) == 3
    with Image.open("shown/moft.png") as picture:
        picture.load()
    assert {entry: entry.stat().st_mtime_ns for entry in (kept / "kinetiq").rglob("*")} == before


def test_json_is_all_that_is_printed(run):
    result = run("--reference", "clip.webp", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.output)
    assert [region["name"] for region in said["regions"]] == ["middle"]
    assert said["tap"] == "up_blocks.1"


def test_channels_are_found_again_on_pictures(run, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save("picture.png")
    words = ("--calibrate", "--pictures", "picture.png", "--tap", "mid_block", "--json")
    result = run(*words)
    assert result.exit_code == 0, result.output
    said = json.loads(result.output)
    assert (said["tap"], said["width"]) == ("mid_block", 32)
    assert len(list((tmp_path / "kinetiq" / "moft").glob("*-mid_block.safetensors"))) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "moft needs --reference or --calibrate, got neither"),
        (("--calibrate", "--region", "left.png"), "--region needs --reference, got none"),
        (("--calibrate", "--share", "0.1"), "--share needs --reference, got none"),
        (("--calibrate", "--out", "o"), "--out needs --reference, got none"),
        (("--calibrate", "--frames", "4"), "--frames needs --reference, got none"),
        (("--calibrate", "--size", "16x16"), "--size needs --reference, got none"),
        (("--calibrate", "--fit", "crop"), "--fit needs --reference, got none"),
        (("--reference", "clip.webp", "--pictures", "left.png"), "--pictures needs --calibrate"),
        (("--reference", "left.png"), "left.png must have at least 2 frames, got 1"),
        (("--reference", "none.mp4"), "none.mp4"),
        (("--reference", "clip.webp", "--region", "black.png"), "analyze: --region must be white"),
        (("--reference", "clip.webp", "--region", "clip.webp", "--frames", "3"), "region: must be"),
        (
            ("--reference", "clip.webp", "--region", "late.webp", "--json"),
            "region: late.webp must hold at least one place in every frame, got none in frame 0",
        ),
        (("--reference", "clip.webp", "--tap", "conv_out"), "tap: must be a block of this UNet"),
        (("--reference", "clip.webp", "--share", "2"), "channels: share must be above 0"),
        (("--reference", "clip.webp", "--frames", "1"), "frames must be at least 2"),
        (("--reference", "clip.webp", "--size", "15x16"), "height: must be a multiple of 2"),
        (("--reference", "clip.webp", "--size", "much"), "--size must be HEIGHTxWIDTH"),
        (("--calibrate", "--tap", "up"), "tap: must be a block of this UNet"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, words, message):
    result = run(*words)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not Path("o").exists()
