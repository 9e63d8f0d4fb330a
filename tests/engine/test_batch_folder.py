"""The folder of a batch: what is made, what is kept, and what a run that was stopped leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from kinetiq import batch_folder
from kinetiq.__main__ import main
from kinetiq.batch_folder import BatchOptions, Part, make_batch
from kinetiq.clip import Clip
from kinetiq.engine import Engine
from kinetiq.errors import NonFiniteError, OutputError, RequestError

THREE = [{"prompt": "a"}, {"prompt": "b", "out": "stars/b.webp"}, {"prompt": "c", "seed": 5}]
NAMES = ["clip_000001.mp4", "stars/b.webp", "clip_000003.mp4"]


class Painter:
    """An engine that paints clips, and tells which prompts it was asked for."""

    defaults = SimpleNamespace(height=16, width=24, frames=4, fps=8.0)

    def __init__(self):
        self.asked = []
        self.loaded = 0
        self.fails_at = None
        self.max_clips = None

    def __enter__(self):
        self.loaded += 1
        return self

    def __exit__(self, *_):
        pass

    def generate_as_completed(self, requests, *, max_clips, progress):
        self.max_clips = max_clips
        for place, request in enumerate(requests):
            self.asked.append(request.prompt)
            progress("denoising", 1, 2)
            if request.prompt == self.fails_at:
                yield place, NonFiniteError("step 3: latents must be finite")
                continue
            frames = np.full((4, 16, 24, 3), 20 * request.seed, np.uint8)
            frames += np.arange(4, dtype=np.uint8)[:, None, None, None]
            yield place, Clip(frames, 8.0)


@pytest.fixture
def painter():
    return Painter()


@pytest.fixture
def make(tmp_path, painter):
    """Make a batch of lines in `out`."""

    def make(lines, model="m", report=lambda _: None, progress=lambda *_: None, **options):
        path = tmp_path / "clips.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return make_batch(
            path,
            tmp_path / "out",
            lambda: painter,
            BatchOptions(**options),
            model={"model": model},
            report=report,
            progress=progress,
        )

    return make


@pytest.fixture
def log(tmp_path):
    """The entries of a log."""

    def log(name="batch_log.jsonl"):
        lines = (tmp_path / "out" / name).read_text().splitlines()
        return [json.loads(line) for line in lines]

    return log


def files(folder):
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith("batch_log")
    }


class TestMaking:
    def test_each_line_becomes_a_clip_and_an_entry(self, make, tmp_path, log):
        assert make(THREE) == {
            "out": str(tmp_path / "out"),
            "made": NAMES,
            "kept": 0,
            "failed": [],
        }
        entries = log()
        assert [entry["out"] for entry in entries] == NAMES
        assert [entry["line"] for entry in entries] == [1, 2, 3]
        assert entries[2]["seed"] == 5
        assert (entries[1]["frames"], entries[1]["height"], entries[1]["width"]) == (4, 16, 24)
        clip = Clip.read(tmp_path / "out" / "stars" / "b.webp")
        assert clip.frames.shape == (4, 16, 24, 3)

    def test_clips_may_be_done_in_another_order(self, make, painter, tmp_path, monkeypatch, log):
        paint = painter.generate_as_completed
        monkeypatch.setattr(
            painter,
            "generate_as_completed",
            lambda requests, **settings: reversed(list(paint(requests, **settings))),
        )
        lines = [{"prompt": "a", "seed": seed, "out": f"{seed}.webp"} for seed in range(3)]
        assert make(lines)["made"] == ["2.webp", "1.webp", "0.webp"]
        for seed in range(3):
            assert Clip.read(tmp_path / "out" / f"{seed}.webp").frames[0, 0, 0, 0] == 20 * seed
        assert [entry["seed"] for entry in log()] == [2, 1, 0]

    def test_scale_enlarges(self, make, tmp_path, log):
        make([{"prompt": "a", "scale": 2, "out": "a.webp"}])
        assert Clip.read(tmp_path / "out" / "a.webp").frames.shape == (4, 32, 48, 3)
        assert log()[0]["height"] == 32

    def test_max_clips_reaches_the_engine(self, make, painter):
        make(THREE, max_clips=3)
        assert painter.max_clips == 3

    def test_progress_counts_clips(self, make):
        seen = []
        make(THREE, progress=lambda *words: seen.append(words))
        assert ("checking", 0, 3) in seen
        assert [stage for stage, *_ in seen if "denoising" in stage] == [
            f"{done}/3 denoising" for done in range(3)
        ]

    def test_controls_get_whole_clips_of_the_size_they_are_needed_at(
        self, make, painter, tmp_path, monkeypatch
    ):
        moving = np.zeros((9, 8, 8, 3), np.uint8)
        for index in range(8):
            moving[index, :, index] = 255
        Clip(moving, 8).write(tmp_path / "good.gif")
        seen = []
        paint = painter.generate_as_completed

        def spy(requests, **settings):
            requests = list(requests)
            seen.extend(requests)
            return paint(iter(requests), **settings)

        monkeypatch.setattr(painter, "generate_as_completed", spy)
        reads = []
        monkeypatch.setattr(
            batch_folder.Clip,
            "read",
            classmethod(lambda _, path, **size: reads.append((path.name, size)) or Clip(moving, 8)),
        )
        shared = {"prompt": "a", "reference": "good.gif"}
        made = make([{**shared, "seed": n} for n in range(4)] + [{**shared, "size": "32x40"}])
        assert made["failed"] == []
        assert reads == [
            ("good.gif", {"height": 16, "width": 24, "fit": "crop"}),
            ("good.gif", {"height": 32, "width": 40, "fit": "crop"}),
        ]
        assert [request.control[0].reference.num_frames for request in seen] == [9] * 5
        assert len({id(request.control[0].reference) for request in seen[:4]}) == 1


class TestFailures:
    def test_lines_that_cannot_be_made_do_not_keep_others_from_it(self, make, painter, log):
        lines = [
            {"prompt": "a", "steps": 0},
            {"prompt": "b"},
            {"seed": 1},
            {"prompt": "c", "reference": "missing.mp4"},
        ]
        said = []
        made = make(lines, report=said.append)
        assert made["made"] == ["clip_000002.mp4"]
        assert [failure["line"] for failure in made["failed"]] == [1, 3, 4]
        assert painter.asked == ["b"]
        assert said == [failure["error"] for failure in made["failed"]]
        assert [entry["error"] for entry in log() if "error" in entry] == said

    def test_what_fails_in_generation_is_said_with_its_line_and_tried_again(self, make, painter):
        painter.fails_at = "b"
        made = make(THREE)
        assert made["made"] == [NAMES[0], NAMES[2]]
        (failure,) = made["failed"]
        assert failure["line"] == 2
        assert failure["error"].endswith("clips.jsonl:2: step 3: latents must be finite")
        painter.fails_at = None
        assert make(THREE)["made"] == [NAMES[1]]

    def test_a_clip_that_is_damaged_further_on_fails_its_line(self, make, monkeypatch, tmp_path):
        moving = np.zeros((9, 8, 8, 3), np.uint8)
        moving[range(8), :, range(8)] = 255
        Clip(moving, 8).write(tmp_path / "good.gif")

        def read(_, path, **__):
            raise batch_folder.InputError(f"{path} is damaged")

        monkeypatch.setattr(batch_folder.Clip, "read", classmethod(read))
        made = make([{"prompt": "a", "reference": "good.gif"}, {"prompt": "b"}])
        assert made["made"] == ["clip_000002.mp4"]
        assert "clips.jsonl:1:" in made["failed"][0]["error"]

    def test_a_format_that_cannot_hold_what_the_model_makes(self, make):
        made = make([{"prompt": "a", "out": "a.png"}])
        assert "can hold one frame, got 4" in made["failed"][0]["error"]

    def test_no_model_is_loaded_for_nothing(self, make, painter):
        make([{"prompt": "a", "steps": 0}])
        assert painter.loaded == 0

    def test_an_empty_manifest_is_said(self, make):
        with pytest.raises(RequestError, match="must hold a clip for this part of it, got none"):
            make([])

    def test_a_disk_that_is_full_ends_the_run(self, make, monkeypatch, tmp_path):
        def write(self, path, **_):
            raise OutputError(f"write: {path} cannot be written (No space left on device)")

        monkeypatch.setattr(Clip, "write", write)
        with pytest.raises(OutputError, match="No space left"):
            make(THREE)
        monkeypatch.undo()
        assert make(THREE)["made"] == NAMES
        assert files(tmp_path / "out").keys() == set(NAMES)


class TestContinuing:
    def test_what_is_there_is_not_made_again(self, make, painter, tmp_path):
        make(THREE)
        before = files(tmp_path / "out")
        assert make(THREE) == {
            "out": str(tmp_path / "out"),
            "made": [],
            "kept": 3,
            "failed": [],
        }
        assert painter.loaded == 1
        assert files(tmp_path / "out") == before

    def test_what_is_missing_is_made(self, make, painter, tmp_path):
        make(THREE)
        (tmp_path / "out" / NAMES[1]).unlink()
        made = make(THREE)
        assert (made["made"], made["kept"]) == ([NAMES[1]], 2)
        assert painter.asked == ["a", "b", "c", "b"]

    def test_lines_may_be_added_and_move(self, make):
        named = [{**line, "out": name} for line, name in zip(THREE, NAMES, strict=True)]
        make(named)
        made = make([{"prompt": "new", "out": "new.gif"}, *reversed(named)])
        assert (made["made"], made["kept"]) == (["new.gif"], 3)

    @pytest.mark.parametrize(
        "change", [{"prompt": "other"}, {"seed": 1}, {"scale": 2}, {"sampler": "euler"}]
    )
    def test_a_line_that_asks_for_something_else_is_refused_or_replaces(
        self, make, change, tmp_path
    ):
        make(THREE)
        before = files(tmp_path / "out")
        changed = [{**THREE[0], **change}, *THREE[1:]]
        made = make(changed)
        assert (made["made"], made["kept"]) == ([], 2)
        assert (
            "holds another clip; choose another name, or replace it" in made["failed"][0]["error"]
        )
        assert files(tmp_path / "out") == before
        made = make(changed, overwrite=True)
        assert (made["made"], made["kept"]) == ([NAMES[0]], 2)
        after = files(tmp_path / "out")
        assert after[NAMES[0]] != before[NAMES[0]]
        assert after[NAMES[1]] == before[NAMES[1]]
        assert make(changed)["kept"] == 3
        assert make(THREE)["failed"]

    def test_another_model_is_another_clip(self, make):
        make(THREE)
        assert len(make(THREE, model="other")["failed"]) == 3

    def test_a_file_that_was_named_and_has_changed_is_another_clip(self, make, tmp_path):
        moving = np.zeros((9, 8, 8, 3), np.uint8)
        moving[range(8), :, range(8)] = 255
        Clip(moving, 8).write(tmp_path / "good.webp")
        lines = [{"prompt": "a", "reference": "good.webp"}]
        assert make(lines)["made"]
        assert make(lines)["kept"] == 1
        Clip(moving[::-1].copy(), 8).write(tmp_path / "good.webp")
        assert "holds another clip" in make(lines)["failed"][0]["error"]

    def test_what_is_no_clip_of_the_batch_is_left_alone(self, make, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / NAMES[0]).write_text("mine")
        made = make(THREE)
        assert "holds none of its clips" in made["failed"][0]["error"]
        assert (tmp_path / "out" / NAMES[0]).read_text() == "mine"

    def test_a_folder_of_images_is_replaced_whole(self, make, tmp_path):
        make([{"prompt": "a", "out": "a", "frames": 8}])
        (tmp_path / "out" / "a" / "00099.png").write_bytes(b"old")
        made = make([{"prompt": "b", "out": "a"}], overwrite=True)
        assert made["made"] == ["a"]
        names = sorted(path.name for path in (tmp_path / "out" / "a").iterdir())
        assert names == [f"0000{number}.png" for number in range(4)]
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "a",
            "batch_log.jsonl",
        ]

    def test_what_is_read_is_not_replaced(self, make, tmp_path):
        moving = np.zeros((9, 8, 8, 3), np.uint8)
        moving[range(8), :, range(8)] = 255
        (tmp_path / "out").mkdir()
        Clip(moving, 8).write(tmp_path / "out" / "good.webp")
        Clip(moving, 8).write(tmp_path / "out" / "frames")
        before = files(tmp_path / "out")
        lines = [
            {"prompt": "a", "reference": "out/good.webp", "out": "good.webp"},
            {"prompt": "b", "reference": "out/frames", "out": "frames/00001.gif"},
        ]
        made = make(lines, overwrite=True)
        assert ["which is read" in failure["error"] for failure in made["failed"]] == [True, True]
        assert files(tmp_path / "out") == before


class TestStops:
    """Of a run that ends anywhere, the next one does the rest."""

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_between_the_log_and_the_clip(self, make, monkeypatch, tmp_path, overwrite):
        """The log is ahead of the folder; what was there before passes for nothing new."""
        changed = [{**line, "seed": 9} for line in THREE] if overwrite else THREE
        if overwrite:
            make(THREE)
        write = Clip.write
        calls = []

        def stop(self, path, **settings):
            calls.append(path)
            if len(calls) == 2:
                raise KeyboardInterrupt
            write(self, path, **settings)

        monkeypatch.setattr(Clip, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            make(changed, overwrite=overwrite, max_clips=1)
        monkeypatch.undo()
        made = make(changed, overwrite=overwrite)
        assert NAMES[1] in made["made"]
        assert NAMES[0] not in made["made"]
        assert files(tmp_path / "out").keys() == set(NAMES)
        assert make(changed)["kept"] == 3

    def test_within_a_line_of_the_log(self, make, tmp_path, log):
        make(THREE)
        path = tmp_path / "out" / "batch_log.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        made = make(THREE, overwrite=True)
        assert (made["made"], made["kept"]) == ([NAMES[2]], 2)
        assert len(log()) == 3

    def test_a_log_that_is_none_is_said(self, make, tmp_path):
        make(THREE)
        (tmp_path / "out" / "batch_log_1of2.jsonl").write_text("[1]\n")
        with pytest.raises(OutputError, match="must be a log of this command"):
            make(THREE)

    def test_a_second_run_at_the_same_time_is_refused(self, make, painter, monkeypatch):
        paint = painter.generate_as_completed

        def inner(requests, **settings):
            with pytest.raises(OutputError, match="another is at work on it"):
                make(THREE)
            return paint(requests, **settings)

        monkeypatch.setattr(painter, "generate_as_completed", inner)
        assert make(THREE)["made"] == NAMES

    def test_a_manifest_with_the_name_of_a_log_is_refused(self, tmp_path, painter):
        path = tmp_path / "batch_log.jsonl"
        path.write_text('{"prompt": "a"}\n')
        with pytest.raises(OutputError, match="must not have the name of this folder's own log"):
            make_batch(path, tmp_path, lambda: painter, BatchOptions(), model={})
        assert path.read_text() == '{"prompt": "a"}\n'


class TestParts:
    def test_they_share_the_lines(self, make, painter, log):
        lines = [{"prompt": str(number)} for number in range(5)]
        assert make(lines, part=Part(2, 3))["made"] == ["clip_000002.mp4", "clip_000005.mp4"]
        assert len(log("batch_log_2of3.jsonl")) == 2
        assert make(lines, part=Part(1, 3))["made"] == ["clip_000001.mp4", "clip_000004.mp4"]
        made = make(lines)
        assert (made["made"], made["kept"]) == (["clip_000003.mp4"], 4)
        assert sorted(painter.asked) == list("01234")

    def test_the_newest_entry_of_all_logs_counts(self, make):
        make([{"prompt": "a"}], part=Part(1, 2))
        make([{"prompt": "b"}], overwrite=True)
        assert make([{"prompt": "b"}])["kept"] == 1
        assert make([{"prompt": "a"}])["failed"]

    @pytest.mark.parametrize("words", ["0/2", "3/2", "1", "1/0", "a/b", "1/2/3", "-1/2"])
    def test_words_that_are_none(self, words):
        with pytest.raises(RequestError, match="--part must be K/N such as 1/4"):
            Part.parse(words)

    def test_words(self):
        assert Part.parse("2/3") == Part(2, 3)


class TestCommand:
    @pytest.fixture
    def run(self, painter, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        seen = {}

        def load(source, **settings):
            seen.update(settings, source=source)
            return painter

        monkeypatch.setattr(Engine, "load", load)

        def run(lines, *words):
            (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            result = CliRunner().invoke(main, ["batch", "m.jsonl", "--out", "out", *words])
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise result.exception
            result.seen = seen
            return result

        return run

    def test_it_says_what_it_did(self, run):
        result = run(THREE)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout == "out: 3 made, 0 there before, 0 failed\n"
        assert run(THREE).stdout == "out: 0 made, 3 there before, 0 failed\n"

    def test_json_is_one_object(self, run):
        result = run(THREE, "--json")
        assert json.loads(result.stdout) == {"out": "out", "made": NAMES, "kept": 0, "failed": []}
        assert result.stdout.count("\n") == 1

    def test_a_failure_is_said_at_once_and_is_the_exit_status(self, run):
        result = run([{"prompt": "a", "steps": 0}, {"prompt": "b"}])
        assert result.exit_code == 1
        assert result.stderr.startswith("kinetiq: failed: m.jsonl:1: steps: must be a whole number")
        assert result.stdout == "out: 1 made, 0 there before, 1 failed\n"

    def test_options_reach_the_model(self, run):
        words = ("--model", "m", "--device", "cpu", "--dtype", "bfloat16", "--backend", "auto")
        seen = run(THREE, *words, "--motion-adapter", "a", "--network", "n", "--trust", "t").seen
        assert seen == {
            "source": "m",
            "motion_adapter": "a",
            "device": "cpu",
            "dtype": "bfloat16",
            "backend": "auto",
            "network": batch_folder.Path("n"),
            "trust": ("t",),
        }

    def test_a_bad_part_is_bad_input(self, run):
        result = run(THREE, "--part", "3/2")
        assert result.exit_code == 2
        assert "batch: --part must be K/N" in result.stderr

    def test_a_device_does_not_make_another_clip_and_a_type_does(self, run):
        run(THREE)
        assert run(THREE, "--device", "cpu").stdout.startswith("out: 0 made, 3 there before")
        assert run(THREE, "--dtype", "bfloat16").exit_code == 1


def test_a_run_that_is_killed_loses_the_clips_in_flight_alone(tmp_path):
    lines = [
        {"prompt": "a ring", "seed": seed, "steps": 4, "out": f"clip_{seed}.webp"}
        for seed in range(5)
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [sys.executable, "-m", "kinetiq", "batch", "m.jsonl", "--out", "out", "--json"]
    out = tmp_path / "out"
    process = subprocess.Popen([*words, "--max-clips", "1"], cwd=tmp_path)
    while not (out / "clip_1.webp").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = files(out)
    whole = {name for name in before if not name.startswith(".")}
    for name in whole:
        assert Clip.read(out / name).num_frames == 8
    done = subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True)
    said = json.loads(done.stdout)
    assert (said["kept"], len(said["made"]), said["failed"]) == (len(whole), 5 - len(whole), [])
    after = files(out)
    assert {name: after[name] for name in whole} == {name: before[name] for name in whole}
    for seed in range(5):
        assert Clip.read(out / f"clip_{seed}.webp").num_frames == 8
