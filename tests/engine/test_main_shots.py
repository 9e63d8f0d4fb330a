"""`kinetiq shots`, as a user meets it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from kinetiq import board_folder
from kinetiq.__main__ import main
from kinetiq.clip import Clip
from kinetiq.engine import Engine
from kinetiq.errors import NonFiniteError, OutputError, RequestError
from kinetiq.shots import ShotBoard

BOARD = """\
subject: ring
seed: 3
shots:
  - prompt: a ring moving left on a dark blue background
  - prompt: a ring standing still on a dark red background
    reference: clip.webp
  - prompt: a ring bouncing on a dark green background
"""
CLIPS = ["shot_01.mp4", "shot_02.mp4", "shot_03.mp4"]


class Painter:
    """An engine whose clips tell their seed and whether they were made together."""

    defaults = SimpleNamespace(height=16, width=24, frames=4, steps=10)

    def __init__(self):
        self.asked = []
        self.masks = np.zeros((3, 4, 4, 6), np.float32)
        self.masks[:, :, 1:3, 2:4] = [[[[1.0]]], [[[0.5]]], [[[0.25]]]]
        self.fails_at = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def paint(self, shade):
        frames = np.full((4, 16, 24, 3), shade, np.uint8)
        frames[:, :, :8] += np.arange(4, dtype=np.uint8)[:, None, None, None] * 9
        return Clip.from_array(frames, 8.0)

    def generate_storyboards(self, boards, **_):
        for board in boards:
            self.asked.append(("together", [request.seed for request in board.requests()]))
            self.board = board
            clips = [self.paint(200 - 9 * request.seed) for request in board.requests()]
            yield ShotBoard(tuple(clips), self.masks)

    def generate_many(self, requests, **_):
        self.asked.append(("plain", [request.seed for request in requests]))
        for number, request in enumerate(requests):
            if number == self.fails_at:
                raise NonFiniteError("step 3: must be finite")
            yield self.paint(60 + 9 * request.seed)


@pytest.fixture
def painter(monkeypatch):
    made = Painter()
    monkeypatch.setattr(Engine, "load", lambda *_, **__: made)
    return made


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run `shots` in a folder with a storyboard and a clip."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Clip.from_array(rng.integers(0, 255, (4, 20, 20, 3), dtype=np.uint8)).write("clip.webp")
    Path("board.yaml").write_text(BOARD)

    def invoke(*words, board="board.yaml", out="out"):
        result = CliRunner().invoke(main, ("shots", board, "--out", out, *words))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


def files(folder="out"):
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def shade(name, pixel=(0, 0, 20)):
    return int(Clip.read(f"out/{name}").frames[pixel].mean())


def test_shots_are_written_with_a_sheet_that_shows_them(run, painter):
    result = run()
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "out/shot_01.mp4: a ring moving left on a dark blue background",
        "out/shot_02.mp4: a ring standing still on a dark red background",
        "out/shot_03.mp4: a ring bouncing on a dark green background",
        "out/sheet.png shows them",
    ]
    assert set(files()) == {*CLIPS, "sheet.png", "board.json"}
    assert painter.asked == [("together", [3, 4, 5])]
    for name, seed in zip(CLIPS, (3, 4, 5), strict=True):
        assert abs(shade(name) - (200 - 9 * seed)) <= 3
    reference = painter.board.shots[1].control[0].reference
    assert (reference.num_frames, reference.height, reference.width) == (4, 16, 24)
    sheet = np.asarray(Image.open("out/sheet.png"))
    for seed in (3, 4, 5):  # a row of four frames of each
        row = (sheet == 200 - 9 * seed).all(axis=-1)
        assert row.any(axis=1).sum() >= 60 and row.any(axis=0).sum() >= 4 * 60


def test_what_is_there_is_not_made_again(run, painter):
    run()
    before = files()
    result = run()
    assert result.output.splitlines()[-1] == "All of it was there; --overwrite makes it again"
    assert files() == before and len(painter.asked) == 1
    # A run that was stopped: one shot is missing, and the sheet, which is written last.
    Path("out/shot_02.mp4").unlink()
    Path("out/sheet.png").unlink()
    said = json.loads(run("--json").output)
    assert said["made"] == ["shot_02.mp4", "sheet.png"]
    assert len(painter.asked) == 2
    after = files()
    assert {name for name in before if after[name] != before[name]} >= {"shot_02.mp4", "sheet.png"}
    assert all(after[name] == before[name] for name in ("shot_01.mp4", "shot_03.mp4"))
    # Where the sheet alone is missing, no model loads.
    picture = Path("out/sheet.png").read_bytes()
    Path("out/sheet.png").unlink()
    assert json.loads(run("--json").output)["made"] == ["sheet.png"]
    assert len(painter.asked) == 2
    assert np.asarray(Image.open("out/sheet.png")).shape[:2] == _size(picture)


def _size(picture):
    Path("former.png").write_bytes(picture)
    return np.asarray(Image.open("former.png")).shape[:2]


def test_a_network_makes_the_same_board_twice(run, tiny_folder):
    words = ("--model", str(tiny_folder("animatediff")), "--save-masks", "--plain")
    with Path("board.yaml").open("a") as board:
        board.write("steps: 2\nframes: 4\nsize: 16x16\nkeys_window: [0, 1]\n")
    said = json.loads(run("--json", *words).output)
    assert len(said["made"]) == 10
    first = {name: Path("out", name).read_bytes() for name in files() if name != "board.json"}
    for name in ("shot_01.mp4", "plain_02.mp4"):
        Path("out", name).unlink()
    made = json.loads(run("--json", *words).output)["made"]
    assert made == ["shot_01.mp4", "plain_02.mp4", "sheet.png"]
    again = {name: Path("out", name).read_bytes() for name in first}
    changed = {name for name in first if first[name] != again[name]}
    assert changed <= {"sheet.png", "plain_02.mp4"}  # which had neighbours in its batch before
    assert np.any(Clip.read("out/shot_01.mp4").frames != Clip.read("out/plain_01.mp4").frames)


@pytest.mark.parametrize("words", [(), ("--overwrite",)])
def test_a_run_that_is_killed_while_it_writes_is_continued(run, painter, monkeypatch, words):
    if words:
        run(*words, board="board.yaml")
        Path("board.yaml").write_text(BOARD.replace("left", "right"))
    write, written = Clip.write, []

    def killed(clip, path):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path)
        write(clip, path)

    monkeypatch.setattr(Clip, "write", killed)
    result = run(*words)
    assert result.exit_code == 130
    assert set(files()) == {"shot_01.mp4", "board.json"}  # nothing half-written, nothing former
    before = files()
    monkeypatch.setattr(Clip, "write", write)
    said = json.loads(run("--json").output)
    assert said["made"] == ["shot_02.mp4", "shot_03.mp4", "sheet.png"]
    assert files()["shot_01.mp4"] == before["shot_01.mp4"]
    assert set(files()) == {*CLIPS, "sheet.png", "board.json"}


def test_what_cannot_be_written_is_no_fault_of_the_storyboard(run, painter, monkeypatch):
    def full(*_):
        raise OutputError("Clip.write: out/shot_01.mp4 cannot be written (disk full)")

    monkeypatch.setattr(Clip, "write", full)
    result = run()
    assert result.exit_code == 2
    assert result.output == (
        "kinetiq: error: Clip.write: out/shot_01.mp4 cannot be written (disk full)\n"
    )


def test_plain_shots_are_made_beside_and_one_by_one(run, painter):
    run()
    painter.fails_at = 2
    result = run("--plain")
    assert result.exit_code == 1 and "must be finite" in result.output
    assert {"plain_01.mp4", "plain_02.mp4"} < set(files()) and "plain_03.mp4" not in files()
    before = files()
    painter.fails_at = None
    result = run("--plain", "--json")
    said = json.loads(result.output)
    assert said["made"] == ["plain_03.mp4", "sheet.png"]
    assert [shot["plain"] for shot in said["shots"]] == [f"plain_0{n}.mp4" for n in (1, 2, 3)]
    assert painter.asked[1:] == [("plain", [3, 4, 5]), ("plain", [5])]
    assert all(files()[name] == before[name] for name in (*CLIPS, "plain_01.mp4"))
    assert abs(shade("plain_03.mp4") - (60 + 9 * 5)) <= 3
    sheet = np.asarray(Image.open("out/sheet.png"))
    assert (sheet == 60 + 9 * 5).all(axis=-1).any()
    assert np.abs(sheet.astype(int) - (200 - 9 * 4)).max(axis=-1).min() <= 3  # read back from mp4


def test_masks_are_images_that_a_storyboard_reads(run, painter):
    said = json.loads(run("--save-masks", "--json").output)
    assert [shot["masks"] for shot in said["shots"]] == [f"masks/shot_0{n}" for n in (1, 2, 3)]
    assert Clip.read("out/masks/shot_01").frames.shape == (4, 16, 24, 3)
    with Path("board.yaml").open("a") as board:
        board.write("masks: out/masks\n")
    run(out="again")
    large = painter.masks.repeat(4, axis=2).repeat(4, axis=3)
    np.testing.assert_allclose(painter.board.masks, large, atol=0.5 / 255)


@pytest.mark.parametrize(
    ("extra", "loads"),
    [("keys_window: [0, 0]\n", 0), ("steps: 1\n", 0), ("keys_window: [0, 0.1]\n", 1)],
)
def test_masks_of_a_board_that_looks_for_nothing_are_refused_before_work(
    run, painter, monkeypatch, extra, loads
):
    """Before a model loads, where the storyboard tells; else once its number of steps is known."""
    loaded = []
    monkeypatch.setattr(Engine, "load", lambda *_, **__: loaded.append(1) or painter)
    with Path("board.yaml").open("a") as board:
        board.write(extra)
    result = run("--save-masks")
    assert result.exit_code == 2
    assert "--save-masks must go with a board that looks for its subject" in result.output
    assert len(loaded) == loads
    assert painter.asked == []


def test_a_backend_that_cannot_is_said_before_anything_is_loaded(run, monkeypatch):
    monkeypatch.setattr(Engine, "load", None)
    result = run("--backend", "openvino")
    assert result.exit_code == 2
    assert "backend must be 'eager' for ConsistentShots" in result.output
    assert not Path("out").exists()


def test_the_best_backend_for_shots_is_the_one_that_takes_them(run, painter, monkeypatch, caplog):
    loads = []
    monkeypatch.setattr(Engine, "load", lambda *_, **how: loads.append(how["backend"]) or painter)
    assert run("--backend", "auto").exit_code == 0
    assert loads == ["eager"]
    assert caplog.messages == [
        "back end eager: shots look into the network, which no other back end is sure to take"
    ]


@pytest.mark.parametrize(
    ("masks", "shot"),
    [
        ("masks: out/masks\n", ""),
        ("masks: [out/masks/shot_01, out/masks/shot_02]\n", ""),
        ("", "    reference: out/shot_01.mp4\n"),
    ],
)
def test_what_a_storyboard_reads_is_never_replaced(run, painter, masks, shot):
    run("--save-masks")
    text = BOARD + shot
    if masks:  # of two shots, so that the list fits
        text = (
            text.replace("  - prompt: a ring bouncing on a dark green background\n", shot) + masks
        )
        shutil.rmtree("out/masks/shot_03")
    Path("other.yaml").write_text(text)
    before = files()
    result = run("--overwrite", board="other.yaml")
    assert result.exit_code == 2
    assert "which the storyboard names, since it is to be written" in result.output
    assert files() == before
    assert len(painter.asked) == 1


def test_masks_asked_for_later_are_made_and_shots_stay(run, painter):
    run()
    before = files()
    assert json.loads(run("--save-masks", "--json").output)["made"] == [
        *(f"masks/shot_0{n}" for n in (1, 2, 3)),
        "sheet.png",
    ]
    assert all(files()[name] == before[name] for name in CLIPS)


def test_another_board_is_not_mixed_in(run, painter):
    run()
    before = files()
    Path("other.yaml").write_text(BOARD.replace("left", "right"))
    for words, board in (
        ((), "other.yaml"),
        (("--seed", "9"), "board.yaml"),
        (("--scale", "2"), "board.yaml"),
        (("--dtype", "bfloat16"), "board.yaml"),
    ):
        result = run(*words, board=board)
        assert result.exit_code == 2
        assert "shots: out must be a folder without a board, or with a part" in result.output
    assert files() == before
    Path("out/board.json").write_text("[]")
    assert run().exit_code == 2
    Path("out/board.json").unlink()
    assert run().exit_code == 2  # clips of nobody knows what
    Path("else").mkdir()
    Path("else/notes.txt").write_text("mine")
    assert run(out="else").exit_code == 0
    assert Path("else/notes.txt").read_text() == "mine"


def test_overwrite_replaces_a_board_with_all_that_belongs_to_it(run, painter):
    run("--plain", "--save-masks")
    Path("out/mine.mp4").write_bytes(b"mine")
    two = "".join(BOARD.splitlines(keepends=True)[:-1])
    Path("other.yaml").write_text(two)
    painter.masks = painter.masks[:2]
    result = run("--overwrite", "--seed", "9", "--scale", "3", board="other.yaml")
    assert result.exit_code == 0, result.output
    assert set(files()) == {"shot_01.mp4", "shot_02.mp4", "sheet.png", "board.json", "mine.mp4"}
    shots = json.loads(Path("out/board.json").read_bytes())["shots"]
    assert [set(shot) for shot in shots] == [{"file", "prompt", "seed"}] * 2
    assert painter.asked[-1] == ("together", [9, 10])
    assert Clip.read("out/shot_01.mp4").frames.shape[1:3] == (48, 72)
    assert abs(shade("shot_01.mp4", (0, 0, 60)) - (200 - 9 * 9)) <= 3


def test_a_board_that_failed_leaves_what_was_there(run, painter, monkeypatch):
    run()
    before = files()

    def fail(*_, **__):
        raise RequestError("shots: shot 2: frames: must be at most 32, got 400")
        yield

    monkeypatch.setattr(Painter, "generate_storyboards", fail)
    result = run("--overwrite")
    assert result.exit_code == 2
    assert "board.yaml:3: shots: shot 2: frames: must be at most 32" in result.output
    assert files() == before


def test_one_name_a_shot_however_many(tmp_path):
    folder = board_folder.BoardFolder(tmp_path)
    assert [folder.shot(n).name for n in (9, 10, 100)] == [
        "shot_09.mp4",
        "shot_10.mp4",
        "shot_100.mp4",
    ]
    folder.shot(100).write_bytes(b"")
    assert list(folder.entries()) == [folder.shot(100)]


@pytest.mark.parametrize(
    ("extra", "words", "message"),
    [
        ("colour: red\n", (), "board.yaml:8: colour: must be a key of a storyboard"),
        ("  - prompt: a square\n", (), "board.yaml:8: prompt: must hold the subject 'ring'"),
        ("    size: 16x16\nsize: 32x32\n", (), "board.yaml:8: size: must be '32x32' as in line 9"),
        ("subject: ring\n", (), "board.yaml:8: subject: must be said once"),
        ("", ("--seed", "-1"), "Invalid value for '--seed'"),
        ("seed: 3\n", ("--scale", "0"), "Invalid value for '--scale'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, monkeypatch, extra, words, message):
    monkeypatch.setattr(Engine, "load", None)  # it is said before a model loads
    with Path("board.yaml").open("a") as board:
        board.write(extra)
    result = run(*words)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not Path("out").exists()


def test_a_file_in_the_place_of_the_folder_is_said(run, painter):
    Path("out").write_text("mine")
    result = run()
    assert result.exit_code == 2 and "shots: out must be a folder" in result.output
    assert painter.asked == []
    assert run(board="none.yaml", out="o").exit_code == 2
    assert "none.yaml: must be a storyboard that can be read" in run(board="none.yaml").output
