"""`kinetiq generate` with --moft, --direction, --speed, --region and --drag."""

from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from kinetiq import engine as engine_module
from kinetiq.__main__ import main
from kinetiq.clip import Clip
from kinetiq.engine import Engine
from kinetiq.moft import DIRECTIONS, Knots, MotionChannels
from kinetiq.moft_guidance import MoftGuidance, MoftRegion
from kinetiq.motion_injection import MotionInjection


def moving(speed=2):
    array = np.zeros((8, 32, 32, 3), np.uint8)
    for index in range(8):
        array[index, 8:16, speed * index : speed * index + 8] = 255
    return Clip(array, 8)


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """Clips and masks, in the folder where commands run."""
    monkeypatch.chdir(tmp_path)
    moving().write("good.gif")
    moving(1).write("slow.gif")
    Image.new("L", (32, 32), 255).save("still.png")
    for name, columns in {"left": slice(0, 16), "right": slice(16, 32), "black": slice(0)}.items():
        mask = np.zeros((32, 32), np.uint8)
        mask[:, columns] = 255
        Image.fromarray(mask).save(f"{name}.png")
        Image.fromarray(mask).save(f"{name}:up.png")  # a name that looks like a mask with a motion


def invoke(*words):
    words = ["generate", "--prompt", "a red circle", "--out", "out.gif", *words]
    result = CliRunner().invoke(main, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def generate(monkeypatch):
    """Run the command with a model that only notes the controls that it is given."""
    seen = []

    class Loaded:
        defaults = SimpleNamespace(frames=8, height=32, width=32, fps=8.0)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def generate(self, _, control, **__):
            seen.append(control)
            return moving()

    monkeypatch.setattr(Engine, "load", lambda *_, **__: Loaded())

    def run(*words):
        result = invoke(*words)
        assert result.exit_code == 0, result.stderr
        return seen.pop()

    return run


def mask(columns):
    weights = np.zeros((32, 32), np.float32)
    weights[:, columns] = 1.0
    return weights


LEFT, RIGHT = slice(0, 16), slice(16, 32)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--direction left", {"direction": "left"}),
        ("--direction up --speed 0.5", {"direction": "up", "speed": 0.5}),
        ("--moft good.gif", {"reference": moving()}),
        ("--moft good.gif --region left.png", {"reference": moving(), "region": mask(LEFT)}),
        ("--direction up --region left:up.png", {"direction": "up", "region": mask(LEFT)}),
        (
            "--drag 20,30:25.5,30 --drag=-1e0,2:3,4",
            {"points": [((20, 30), (25.5, 30)), ((-1, 2), (3, 4))]},
        ),
        (
            "--moft good.gif --moft-weight 300 --moft-window .1,1 --moft-step-size 0.1",
            {
                "reference": moving(),
                "weight": 300.0,
                "window": (0.1, 1.0),
                "step_size": 0.1,
            },
        ),
        (
            "--drag 2,3:4,5 --moft-window 1,0.5,0",
            {"points": [((2, 3), (4, 5))], "drag_window": (1.0, 0.5, 0.0)},
        ),
        (
            "--region left.png:right --moft-tap mid_block",
            {"regions": [MoftRegion(mask(LEFT), direction="right")], "tap": "mid_block"},
        ),
        (
            "--region left.png:right --region right.png:slow.gif --speed 2",
            {
                "regions": [
                    MoftRegion(mask(LEFT), direction="right", speed=2.0),
                    MoftRegion(mask(RIGHT), reference=moving(1)),
                ]
            },
        ),
    ],
)
def test_options_reach_the_control(generate, words, wanted):
    (control,) = generate(*words.split())
    assert control == MoftGuidance(**wanted)


def test_clips_are_read_whole_and_brought_to_the_size(generate):
    (control,) = generate("--moft", "good.gif", "--size", "16x24", "--fit", "stretch")
    assert control.reference == moving().resize(16, 24, "stretch")
    (control,) = generate("--region", "left.png:slow.gif", "--size", "16x24", "--fit", "fit")
    assert control.regions[0].reference == moving(1).resize(16, 24, "fit")


def test_composes_with_a_reference(generate):
    injection, guidance = generate(
        *("--reference", "good.gif", "--direction", "left", "--region", "left.png")
    )
    assert injection == MotionInjection(moving(), region=mask(LEFT))
    assert guidance == MoftGuidance(direction="left", region=mask(LEFT))
    injection, guidance = generate(
        *("--reference", "good.gif", "--region", "right.png:up", "--region", "left.png")
    )
    assert injection == MotionInjection(moving(), region=mask(LEFT))  # the mask without a motion
    assert guidance == MoftGuidance(regions=[MoftRegion(mask(RIGHT), direction="up")])


def test_without_the_options_there_is_no_guidance(generate):
    assert generate() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--moft absent.gif", "absent.gif does not exist"),
        ("--moft still.png", "reference: must have at least 2 frames to hold motion, got 1"),
        ("--moft good.gif --direction up", "exactly one of reference, direction, regions, points"),
        ("--direction sideways", "'sideways' is not one of"),
        ("--direction up --speed -1", "speed: must be a number from 0 to 100, got -1.0"),
        ("--moft good.gif --speed 2", "speed: must be left out with a reference"),
        ("--speed 2", "--speed acts with --direction or --region MASK:DIRECTION, got none of them"),
        ("--drag 1,2:3,4 --speed 2", "speed: must be left out here, since points say how far"),
        (
            "--moft-weight 2",
            "--moft-weight acts with --moft, --direction, --drag or --region MASK:MOTION, got none",
        ),
        ("--direction up --moft-weight nan", "weight: must be a number of at least 0, got nan"),
        ("--direction up --moft-step-size -1", "step_size: must be a number of at least 0, got -1"),
        ("--direction up --moft-window 0.5,0.1", "window: must be two shares of the steps"),
        (
            "--direction up --moft-window 0,.5,1",
            "must be A,B such as 0.12,0.48 without --drag, got",
        ),
        ("--direction up --moft-window 0,x", "--moft-window must be A,B such as 0.12,0.48"),
        ("--drag 1,2:3,4 --moft-window 0,1", "must be A,B,C such as 0.76,0.72,0.2 with --drag"),
        (
            "--region left.png:good.gif --speed 2",
            "--speed acts with a direction, and each --region has a clip",
        ),
        ("--region left.png", "; or with --moft, --direction or --drag"),
        ("--direction up --region black.png", "must be white where the motion is wanted, and bla"),
        ("--region black.png:up", "must be white where the motion is wanted, and black.png is"),
        ("--region absent.png:up", "absent.png does not exist"),
        ("--region left.png:", "with a motion that is a file or one of left, right, up, down, got"),
        ("--region left.png:sideways", "got 'left.png:sideways'"),
        ("--region :up", "--region must be MASK, or MASK:MOTION"),
        (f"--region left.png:{'x' * 5000}", "--region must be MASK, or MASK:MOTION"),
        ("--region left.png:up --region left.png:down", "must name each mask once, got left.png t"),
        (
            "--direction up --region left.png --region right.png",
            "--region without a motion must come at most once, got left.png and right.png; each",
        ),
        (
            "--region left.png:up --region right.png",
            "region: must be left out here, since regions have masks of their own",
        ),
        ("--drag 20,30", "--drag must be X,Y:X,Y such as 20,30:40,30, got '20,30'"),
        ("--drag 1,2:3,nan", "--drag must be X,Y:X,Y"),
        ("--fit crop --direction up", "--fit needs --reference, got none, and no --moft either"),
    ],
)
def test_says_what_is_wrong_before_a_model_loads(monkeypatch, tmp_path, words, message):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Engine, "load", load)
    result = invoke(*words.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out.gif").exists()


@pytest.fixture
def tiny_model(tiny_folder, monkeypatch):
    width = 32
    times = torch.tensor([0.0, 1.0])[:, None].expand(2, width)
    channels = MotionChannels(
        family="animatediff",
        checkpoint="tiny",
        fingerprint="tiny",
        tap="up_blocks.1",
        loadings=MappingProxyType(dict.fromkeys(("horizontal", "vertical"), torch.ones(width))),
        spread=MappingProxyType({"horizontal": 0.5, "vertical": 0.5}),
        knots=MappingProxyType(
            {way: Knots(times, torch.ones(2, width).cumsum(0)) for way in DIRECTIONS}
        ),
    )
    monkeypatch.setattr(engine_module, "load_channels", lambda *_, **__: channels)
    return ["--model", str(tiny_folder()), "--steps", "2", "--size", "32x32", "--frames", "4"]


def test_a_clip_is_made(tiny_model, tmp_path):
    result = invoke(*tiny_model, "--drag", "4,5:20,5", "--drag", "20,20:20,20")
    assert (result.exit_code, result.stderr) == (0, "")
    assert Clip.read(tmp_path / "out.gif").frames.shape == (4, 32, 32, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--drag 4,5:32,5", "points: must be inside the frame, x from 0 to below 32"),
        (
            "--size 16x16 --region left.png:up",
            "regions: mask 1 of 1: must be [height, width] = [16, 16] of the clip, got [32, 32]",
        ),
        ("--direction left --steps 1", "window: (0.12, 0.48) of 1 steps must hold a step"),
        ("--direction left --frames 1", "frames: must be at least 2 where a motion is given"),
    ],
)
def test_says_what_does_not_fit_the_clip(tiny_model, tmp_path, words, message):
    result = invoke(*tiny_model, *words.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr, result.stderr
    assert not (tmp_path / "out.gif").exists()


@pytest.mark.parametrize(
    ("words", "backend"),
    [
        ("--backend auto --direction left", "eager"),
        ("--backend auto", "auto"),
        ("--backend openvino --direction left", "openvino"),
    ],
)
def test_the_best_backend_for_guidance_is_the_one_that_takes_it(
    generate, monkeypatch, words, backend
):
    load, loads = Engine.load, []
    monkeypatch.setattr(
        Engine, "load", lambda *_, **how: loads.append(how["backend"]) or load(*_, **how)
    )
    generate(*words.split())
    assert loads == [backend]
