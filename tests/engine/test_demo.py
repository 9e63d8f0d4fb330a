import json

import pytest
from PIL import Image

from kinetiq import demo
from kinetiq.clip import Clip
from kinetiq.demo import check_folder, describe, run_demo
from kinetiq.engine import Engine
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
    """The folder and the report of a demo of one step."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    stages = []
    report = run_demo(
        engine, out, seed=3, steps=1, until=0.5, progress=lambda *told: stages.append(told)
    )
    assert ("denoising", 9, 9) in stages
    return out, report


def test_report_says_what_was_done_and_measured(made):
    out, report = made
    assert json.loads((out / "report.json").read_text()) == report
    assert list(report) == ["model", "seed", "steps", "guidance_scale", "reference", "clips"]
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


def test_the_reference_measures_as_itself():
    """The figures are about clips: a clip that is the reference moves like it and is as prompted."""
    reference = demo.render_clip(demo.REFERENCE)
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
    with pytest.raises(RequestError, match=r"until: must be a number from 0 to 1, got 3"):
        run_demo(engine, tmp_path / "new", until=3)
    with pytest.raises(RequestError, match=r"steps: must be a whole number"):
        run_demo(engine, tmp_path / "new", steps=0)
    assert list(tmp_path.iterdir()) == []


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
