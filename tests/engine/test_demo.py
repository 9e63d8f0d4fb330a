import json
from types import SimpleNamespace

import pytest
from PIL import Image

from kinetiq import demo
from kinetiq.clip import Clip
from kinetiq.demo import DemoOptions, check_folder, describe, run_demo
from kinetiq.engine import Defaults, Engine
from kinetiq.errors import OutputError, RequestError

CLIP_KEYS = [
    *("file", "prompt", "control", "until", "motion_fidelity"),
    *("colour_right", "shape_right", "background_right"),
]


@pytest.fixture(scope="module")
def engine():
    with Engine.load("sprites") as engine:
        yield engine


@pytest.fixture(scope="module")
def made(engine, tmp_path_factory):
    """The folder and the report of a demo of one step, in a folder with a former one."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    out.mkdir(parents=True)
    (out / "report.json").write_text("of a former demo")
    stages = []
    options = DemoOptions(seed=3, steps=1, until=0.5)
    report = run_demo(engine, out, options, progress=lambda *told: stages.append(told))
    assert ("denoising", 9, 9) in stages
    return out, report


def test_report_says_what_was_done_and_measured(made):
    out, report = made
    assert json.loads((out / "report.json").read_text()) == report
    assert list(report) == [
        *("model", "seed", "steps", "guidance_scale"),
        *("frames", "height", "width", "fps", "reference", "clips"),
    ]
    assert [report[key] for key in ("frames", "height", "width", "fps")] == [8, 32, 32, 8.0]
    assert (report["model"], report["seed"], report["steps"]) == ("sprites", 3, 1)
    assert report["guidance_scale"] > 1
    assert report["reference"] == "a green square zigzagging on a dark purple background"
    assert len({(clip["prompt"], clip["control"]) for clip in report["clips"]}) == 9
    for clip in report["clips"]:
        assert list(clip) == CLIP_KEYS
        assert clip["until"] == (None if clip["control"] == "no control" else 0.5)
        assert -1.0 <= clip["motion_fidelity"] <= 1.0
        assert {type(clip[key]) for key in CLIP_KEYS[5:]} == {bool}


def test_every_file_is_there_and_nothing_else(made, engine):
    out, report = made
    videos = ["reference.mp4", *(clip["file"] for clip in report["clips"])]
    expected = {*videos, "side-by-side.gif", "sheet.png", "report.json"}
    assert {path.name for path in out.iterdir()} == expected
    for name in videos:
        clip = Clip.read(out / name)
        assert (clip.num_frames, clip.height) == (engine.defaults.frames, 224)
        assert clip.fps == pytest.approx(engine.defaults.fps)
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.size[1] > 1000


def test_the_grid_has_a_row_a_prompt_and_loops(made, engine):
    with Image.open(made[0] / "side-by-side.gif") as grid:
        assert grid.info["loop"] == 0 and grid.n_frames == engine.defaults.frames
        width, height = grid.size
    assert 4 * 224 < width < 5 * 224 and 3 * 224 < height < 4 * 224


class Mimic:
    """An engine whose clips are its references, or still where there is none."""

    defaults = Defaults(frames=8, height=32, width=32, steps=2, guidance_scale=3.0, fps=8.0)
    checkpoint = SimpleNamespace(name="mimic")

    def __init__(self):
        self.requests = []

    def generate_many(self, requests, **_):
        self.requests += requests
        moving = next(request.control[0].reference for request in requests if request.control)
        still = Clip(moving.frames[:1].repeat(moving.num_frames, axis=0), moving.fps)
        return [moving if request.control else still for request in requests]


@pytest.fixture
def mimic(monkeypatch):
    monkeypatch.setattr(demo, "CAPTIONS", demo.CAPTIONS[:1])
    return Mimic()


def test_another_shape_and_rate(mimic, tmp_path, monkeypatch):
    """The reference has the shape and the rate of the clips, and its path that many points."""
    written = []
    monkeypatch.setattr(demo, "_write", lambda _, reference, *__: written.append(reference))
    report = run_demo(mimic, tmp_path, DemoOptions(seed=5, frames=12, size=48, fps=20))
    assert [report[key] for key in ("frames", "height", "width", "fps")] == [12, 48, 48, 20]
    assert written[0].frames.shape == (12, 48, 48, 3) and written[0].fps == 20
    for request in mimic.requests:
        assert (request.frames, request.height, request.width) == (12, 48, 48)
        assert (request.fps, request.seed, request.steps) == (20, 5, 2)
        assert all(control.reference == written[0] for control in request.control)
    assert report["clips"][0]["motion_fidelity"] == 0.0
    assert all(clip["motion_fidelity"] > 0.95 for clip in report["clips"][1:])


def test_a_demo_that_is_cut_off_leaves_no_report(mimic, tmp_path, monkeypatch):
    """A former report must not stand beside new clips."""
    (tmp_path / "report.json").write_text("of a former demo")

    def fail(*_, **__):
        raise OutputError("no space left")

    monkeypatch.setattr(demo, "side_by_side", fail)
    with pytest.raises(OutputError, match="no space left"):
        run_demo(mimic, tmp_path, DemoOptions())
    assert (tmp_path / "reference.mp4").exists() and not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(("frames", "size"), [(8, 32), (32, 32), (16, 64)])
def test_the_reference_measures_as_itself(frames, size):
    """The figures are about clips: a clip that is the reference moves like it and is as prompted."""
    reference = demo.render_clip(demo.REFERENCE, frames, size)
    (reading,) = demo.read_clips([reference.frames])
    caption = demo.Caption((demo.Mention("square", "green"),), "purple")
    entry = demo._measure(demo.Way("plain", "no control", None), caption, reading)
    assert entry["motion_fidelity"] > 0.95
    assert entry["colour_right"] and entry["shape_right"] and entry["background_right"]
    wrong = demo._measure(demo.Way("plain", "", None), demo.CAPTIONS[0], reading)
    assert not (wrong["colour_right"] or wrong["shape_right"] or wrong["background_right"])


def test_description_groups_by_prompt():
    entry = {"prompt": "a red circle", "control": "no control", "motion_fidelity": 0.256}
    flags = {"colour_right": True, "shape_right": False, "background_right": True}
    other = {"prompt": "a ring", "control": "query injection", "motion_fidelity": -1.0}
    report = {
        "reference": "a square",
        "clips": [entry | flags, other | dict.fromkeys(flags, False)],
    }
    assert describe(report).splitlines()[:7] == [
        "reference: a square",
        "",
        "a red circle",
        "  no control        motion fidelity +0.26   as prompted: colour, background",
        "",
        "a ring",
        "  query injection   motion fidelity -1.00   as prompted: nothing",
    ]


def test_options_out_of_range_leave_nothing_behind(engine, tmp_path):
    with pytest.raises(RequestError, match=r"height: must be a multiple of 2 for sprites, got 33"):
        run_demo(engine, tmp_path / "new", DemoOptions(size=33))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"until": 3}, "until: must be a number from 0 to 1, got 3"),
        ({"steps": 0}, "steps: must be a whole number from 1 to 1000, got 0"),
        ({"frames": 1}, "demo: frames must be 2 to 32, whose motion can be read back, got 1"),
        ({"frames": 33}, "demo: frames must be 2 to 32, whose motion can be read back, got 33"),
        ({"size": 16}, "demo: size must be 32 to 64 pixels, at which clips can be read back"),
        ({"size": 66}, "demo: size must be 32 to 64 pixels, at which clips can be read back"),
        ({"fps": 0}, "fps: must be a number from 0.1 to 240, got 0"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(RequestError, match=words):
        DemoOptions(**options)


def test_a_rate_that_the_gif_cannot_show():
    with pytest.raises(OutputError, match=r"side-by-side\.gif can show at most 50 frames a second"):
        DemoOptions(fps=51)


def test_a_folder_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(OutputError, match=r"demo: .* must be a folder .* \(.*file is a file\)"):
            check_folder(path)
    with pytest.raises(OutputError, match="File name too long"):
        check_folder(tmp_path / ("n" * 300))
    check_folder(tmp_path / "new" / "folder")
    check_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    monkeypatch.setattr(demo.os, "access", lambda *_: False)  # root may write everything
    with pytest.raises(OutputError, match=r"cannot be written\); choose another with --out"):
        check_folder(tmp_path / "new")
