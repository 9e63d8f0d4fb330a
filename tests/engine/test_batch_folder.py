"""The folder of a batch: what is made, what is kept, and what a run that was stopped leaves."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from kinetiq import batch_folder, batch_log, batch_staging, clip
from kinetiq.__main__ import main
from kinetiq.batch_folder import BatchModel, BatchOptions, make_batch
from kinetiq.batch_log import BatchLog, Part
from kinetiq.batch_staging import Staging
from kinetiq.checkpoint import embedded_folder
from kinetiq.clip import Clip
from kinetiq.engine import Engine
from kinetiq.errors import (
    CheckpointError,
    NonFiniteError,
    OutputError,
    RequestError,
    WorkError,
)
from kinetiq.files import replacing
from kinetiq.named_files import content_digest

THREE = [{"prompt": "a"}, {"prompt": "b", "out": "stars/b.webp"}, {"prompt": "c", "seed": 5}]
NAMES = ["clip_000001.mp4", "stars/b.webp", "clip_000003.mp4"]


MIXED = [{"prompt": name, "out": name} for name in ("a.webp", "b", "c.webp")]


def stopped(patched, where, name, nth, after=False):
    """The n-th call of something ends the run, as a signal would, before or after its work."""
    real, calls = getattr(where, name), []

    def stop(*words, **settings):
        if len(calls) == nth - 1 and not after:
            raise KeyboardInterrupt
        result = real(*words, **settings)
        calls.append(words)  # those that did not fail
        if len(calls) == nth:
            raise KeyboardInterrupt
        return result

    patched.setattr(where, name, stop)


POINTS = {
    "before encoding": lambda patched, nth: stopped(patched, Staging, "encode", nth),
    "after encoding": lambda patched, nth: stopped(patched, Staging, "encode", nth, True),
    "before the log": lambda patched, nth: stopped(patched, BatchLog, "add_clip", nth),
    "after the log": lambda patched, nth: stopped(patched, BatchLog, "add_clip", nth, True),
    "before a name": lambda patched, nth: stopped(patched, batch_staging, "_move", nth),
    "after a name": lambda patched, nth: stopped(patched, batch_staging, "_move", nth, True),
}


class Painter:
    """An engine that paints clips, and tells which prompts it was asked for."""

    defaults = SimpleNamespace(height=16, width=24, frames=4, fps=8.0)

    def __init__(self):
        self.asked = []
        self.loaded = 0
        self.fails_at = None
        self.max_clips = None
        self.wide = {}

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
            if request.prompt in self.wide:
                yield place, self.wide[request.prompt]
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

    def make(
        lines,
        model="m",
        wide=types.MappingProxyType({}),
        report=lambda _: None,
        progress=lambda *_: None,
        load=None,
        describe=None,
        **options,
    ):
        painter.wide = wide
        path = tmp_path / "clips.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return make_batch(
            path,
            tmp_path / "out",
            load or (lambda: painter),
            BatchOptions(**options),
            describe=describe or (lambda: BatchModel({"model": model})),
            report=report,
            progress=progress,
        )

    return make


@pytest.fixture
def log(tmp_path):
    """The entries of a log."""

    def log(name="batch_log.jsonl"):
        first, *lines = (tmp_path / "out" / name).read_text().splitlines()
        assert json.loads(first) == {"log": "kinetiq batch", "version": 1}
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

    def test_clips_do_not_pile_up_where_writing_is_slow(self, make, painter, monkeypatch):
        encode, written, waiting = Staging.encode, [], []

        def slowly(self, clip, target, scale):
            time.sleep(0.03)
            waiting.append(len(painter.asked) - len(written))
            written.append(target)
            return encode(self, clip, target, scale)

        monkeypatch.setattr(Staging, "encode", slowly)
        make([{"prompt": "a", "seed": seed} for seed in range(10)], max_clips=1)
        assert max(waiting) <= 4  # drawn, handed over, waiting, being written

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

    @pytest.mark.parametrize("fps", [0, -1, "1e-400", 1e-300, 1e300])
    @pytest.mark.parametrize("out", ["a.gif", "a.webp", "a.mp4"])
    def test_a_rate_that_is_none_fails_its_line(self, make, out, fps):
        made = make([{"prompt": "a", "fps": fps, "out": out}, {"prompt": "b"}])
        assert made["made"] == [NAMES[0].replace("1", "2")]
        assert "fps: must be" in made["failed"][0]["error"]

    def test_no_model_is_loaded_for_nothing(self, make, painter):
        make([{"prompt": "a", "steps": 0}])
        assert painter.loaded == 0

    def test_an_empty_manifest_is_said(self, make):
        with pytest.raises(RequestError, match="must hold a line that says a clip, got none"):
            make([])

    @pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EROFS"])
    def test_a_disk_that_is_full_ends_the_run(self, make, monkeypatch, tmp_path, name):
        write = Clip.write

        def full(self, path, **settings):
            if self.frames[0, 0, 0, 0] == 100:  # the third's
                with replacing(path, "write"):
                    raise OSError(getattr(errno, name), "no room")
            write(self, path, **settings)

        monkeypatch.setattr(Clip, "write", full)
        with pytest.raises(WorkError, match=r"no room.*; 2 clips were made: make room, and"):
            make(THREE)
        monkeypatch.undo()
        assert files(tmp_path / "out").keys() == set(NAMES[:2])
        assert make(THREE)["made"] == NAMES[2:]

    def test_a_clip_that_its_format_cannot_hold_does_not_keep_others_from_it(self, make, log):
        """A webp is at most 16,383 pixels wide, which nobody can tell before it is encoded."""
        lines = [
            {"prompt": "a"},
            {"prompt": "b", "out": "b.webp", "size": "16x264", "scale": 64},
            {"prompt": "c"},
        ]
        painted = np.zeros((1, 1, 16400, 3), np.uint8)
        made = make(lines, wide={"b": Clip(painted, 8.0)})
        assert made["made"] == [NAMES[0], NAMES[2]]
        (failure,) = made["failed"]
        assert failure["line"] == 2
        assert (
            "clips.jsonl:2: Clip.write: .webp must be able to hold 1 frames of 64x1049600"
            in failure["error"]
        )
        assert [entry["line"] for entry in log() if "error" in entry] == [2]
        assert len(make(lines, wide={"b": Clip(painted, 8.0)})["failed"]) == 1

    def test_a_clip_that_cannot_be_encoded_leaves_what_it_was_to_replace(self, make, tmp_path):
        make([{"prompt": "a", "out": "a.webp"}])
        before = files(tmp_path / "out")
        lines = [{"prompt": "b", "out": "a.webp", "scale": 2}]
        wide = {"b": Clip(np.zeros((1, 1, 16000, 3), np.uint8), 8.0)}
        assert make(lines, overwrite=True, wide=wide)["failed"]
        assert files(tmp_path / "out") == before

    @pytest.mark.parametrize("out", ["x" * 300 + ".mp4", "/".join(["x" * 200] * 30) + ".mp4"])
    def test_a_name_that_no_file_can_have_fails_its_line(self, make, out, painter):
        made = make([{"prompt": "a", "out": out}, {"prompt": "b"}])
        assert made["made"] == [NAMES[0].replace("1", "2")]
        assert made["failed"][0]["error"].endswith("File name too long")
        assert painter.asked == ["b"]

    def test_a_folder_that_goes_away_fails_its_line(self, make, painter, monkeypatch, tmp_path):
        paint = painter.generate_as_completed

        def inner(requests, **settings):
            requests = list(requests)
            (tmp_path / "out" / "stars").rmdir()
            return paint(requests, **settings)

        monkeypatch.setattr(painter, "generate_as_completed", inner)
        made = make(THREE)
        assert made["made"] == [NAMES[0], NAMES[2]]
        assert "clips.jsonl:2: out: " in made["failed"][0]["error"]
        monkeypatch.undo()
        assert make(THREE)["made"] == [NAMES[1]]


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
        assert "holds another clip of this batch; choose another" in made["failed"][0]["error"]
        assert files(tmp_path / "out") == before
        made = make(changed, overwrite=True)
        assert (made["made"], made["kept"]) == ([NAMES[0]], 2)
        after = files(tmp_path / "out")
        assert after[NAMES[0]][0] != before[NAMES[0]][0]
        assert after[NAMES[1]] == before[NAMES[1]]
        assert make(changed)["kept"] == 3

    def test_clips_of_one_content_are_either(self, make):
        """The same frames, asked for in other words: what is there may pass for both."""
        lines = [{"prompt": "a", "out": "a.webp"}]
        make(lines)
        other = [{"prompt": "b", "out": "a.webp"}]  # which the engine of these tests paints alike
        assert make(other, overwrite=True)["made"] == ["a.webp"]
        assert make(other)["kept"] == 1

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

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_what_is_no_clip_of_the_batch_is_left_alone(self, make, tmp_path, overwrite):
        out = tmp_path / "out"
        make(THREE)
        (out / NAMES[0]).write_text("mine")  # under a name that the log knows
        (out / "thesis" / "chapter").mkdir(parents=True)
        (out / "thesis" / "chapter" / "one.tex").write_text("mine")
        (tmp_path / "elsewhere").mkdir()
        (out / "link").symlink_to(tmp_path / "elsewhere")
        (out / "broken.gif").symlink_to(tmp_path / "nowhere")
        (out / "empty").mkdir()
        before = files(out)
        names = ["thesis", "stars", "link", "broken.gif", "empty", "thesis/chapter"]
        lines = [THREE[0], *({"prompt": "x", "out": name} for name in names)]
        for one in lines:
            made = make([one], overwrite=overwrite)
            assert (
                "and holds something else; choose another name, or move"
                in made["failed"][0]["error"]
            )
            assert "--overwrite" not in made["failed"][0]["error"]
        assert files(out) == before
        assert (out / "link").is_symlink() and (out / "broken.gif").is_symlink()

    def test_what_comes_to_a_name_while_a_run_is_at_work_is_left_alone(
        self, make, painter, monkeypatch, tmp_path
    ):
        paint = painter.generate_as_completed
        out = tmp_path / "out"

        def inner(requests, **settings):
            requests = list(requests)
            (out / "notes").mkdir()
            (out / "notes" / "mine.txt").write_text("mine")
            (out / NAMES[1]).write_text("mine")
            return paint(requests, **settings)

        monkeypatch.setattr(painter, "generate_as_completed", inner)
        made = make([*THREE, {"prompt": "d", "out": "notes"}], overwrite=True)
        assert made["made"] == [NAMES[0], NAMES[2]]
        assert [failure["line"] for failure in made["failed"]] == [2, 4]
        assert (out / NAMES[1]).read_text() == (out / "notes" / "mine.txt").read_text() == "mine"

    @pytest.mark.parametrize("spoil", [lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"x")])
    def test_a_file_that_is_not_what_was_written_is_not_taken_for_it(self, make, spoil, tmp_path):
        make(THREE)
        spoil(tmp_path / "out" / NAMES[1])
        made = make(THREE)
        assert (made["made"], made["kept"], len(made["failed"])) == ([], 2, 1)

    def test_a_folder_of_images_is_replaced_whole_or_not_at_all(self, make, tmp_path):
        out = tmp_path / "out"
        make([{"prompt": "a", "out": "a", "frames": 8}])
        assert make([{"prompt": "a", "out": "a", "frames": 8}])["kept"] == 1
        (out / "a" / "00099.png").write_bytes(b"mine")
        before = files(out)
        made = make([{"prompt": "b", "out": "a", "seed": 3}], overwrite=True)
        assert "holds something else" in made["failed"][0]["error"]
        assert files(out) == before
        (out / "a" / "00099.png").unlink()
        (out / "a" / "00003.png").rename(out / "a" / "mine.png")
        assert make([{"prompt": "a", "out": "a", "frames": 8}])["failed"]
        (out / "a" / "mine.png").rename(out / "a" / "00003.png")
        assert make([{"prompt": "b", "out": "a", "seed": 3}], overwrite=True)["made"] == ["a"]
        names = sorted(path.name for path in (out / "a").iterdir())
        assert names == [f"0000{number}.png" for number in range(4)]
        assert sorted(path.name for path in out.iterdir()) == ["a", "batch_log.jsonl"]

    def test_what_is_read_is_not_replaced(self, make, tmp_path):
        """By any line of the manifest, also one that is made already or of another part."""
        out = tmp_path / "out"
        make([{"prompt": "a", "out": "good.webp"}, {"prompt": "a", "out": "frames"}])
        kept = {"prompt": "k", "reference": "out/good.webp", "out": "k.webp"}
        assert make([kept])["made"] == ["k.webp"]
        before = files(out)
        changed = [
            {"prompt": "b", "seed": 3, "out": "good.webp"},
            kept,
            {"prompt": "b", "out": "frames/00001.gif"},
            {"prompt": "c", "reference": "out/frames", "out": "c.webp"},
        ]
        made = make(changed, overwrite=True, part=Part(1, 2))
        assert ["where the manifest reads" in f["error"] for f in made["failed"]] == [True, True]
        after = files(out)
        assert {name: after[name] for name in before} == before
        region = {**kept, "region": "out/frames/00001.png", "out": "r.webp"}
        made = make([{"prompt": "b", "seed": 3, "out": "frames"}, region], overwrite=True)
        assert [failure["line"] for failure in made["failed"]] == [1]
        assert "where the manifest reads" in made["failed"][0]["error"]

    def test_a_file_that_changes_while_a_run_is_at_work_fails_its_line(
        self, make, painter, monkeypatch, tmp_path
    ):
        moving = np.zeros((9, 8, 8, 3), np.uint8)
        moving[range(8), :, range(8)] = 255
        Clip(moving, 8).write(tmp_path / "good.webp")
        paint = painter.generate_as_completed

        def inner(requests, **settings):
            first = next(requests)
            Clip(moving[::-1].copy(), 8).write(tmp_path / "good.webp")
            return paint(itertools.chain([first], requests), **settings)

        monkeypatch.setattr(painter, "generate_as_completed", inner)
        lines = [{"prompt": "a", "reference": "good.webp", "seed": seed} for seed in range(2)]
        made = make(lines)
        assert made["made"] == [NAMES[0]]
        assert "clips.jsonl:2: a file that it names has changed" in made["failed"][0]["error"]


class TestStops:
    """Of a run that ends anywhere, the next one does the rest."""

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("nth", [1, 2, 3])
    @pytest.mark.parametrize("point", POINTS)
    def test_anywhere(self, make, monkeypatch, tmp_path, point, nth, overwrite):
        """Each name has the former clip, the new one, or nothing; never another or a part."""
        out = tmp_path / "out"
        former = [{**line, "seed": 1} for line in MIXED]
        lines = [{**line, "seed": 9} for line in MIXED]
        if overwrite:
            make(former)
        with monkeypatch.context() as patched:
            POINTS[point](patched, nth)
            with pytest.raises(KeyboardInterrupt):
                make(lines, overwrite=overwrite, max_clips=1)
        shades = {}
        for line in MIXED:
            if (out / line["out"]).exists():
                clip = Clip.read(out / line["out"])
                assert clip.num_frames == 4
                shades[line["out"]] = round(int(clip.frames[0, 0, 0, 0]) / 20)
        assert set(shades.values()) <= ({1, 9} if overwrite else {9})
        made = make(lines, overwrite=overwrite)
        assert made["failed"] == []
        assert made["kept"] == sum(shade == 9 for shade in shades.values())
        assert {name.partition("/")[0] for name in files(out)} == {"a.webp", "b", "c.webp"}
        for line in MIXED:
            assert round(int(Clip.read(out / line["out"]).frames[0, 0, 0, 0]) / 20) == 9
        assert make(lines)["kept"] == 3

    def test_what_a_killed_run_has_left_is_taken_away(self, make, tmp_path):
        """Whatever part it had; not what a run at work has, nor what is no such folder."""
        out = tmp_path / "out"
        make([{"prompt": "a", "seed": 2, "out": "a.webp"}])
        clip = (out / "a.webp").read_bytes()

        def leave(name, locked=True, **files):
            folder = out / name
            folder.mkdir()
            if locked:
                (folder / "run.lock").touch()
            for file, content in files.items():
                (folder / file).write_bytes(content)
            return folder

        killed = leave(".kinetiq-batch-1", clip=b"half")
        replacing = leave(".kinetiq-batch-2", former=clip)
        mine = leave(".kinetiq-batch-mine", locked=False, thesis=b"mine")
        moved = leave(".kinetiq-batch-3", former=b"mine")
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "run.lock").touch()
        (out / ".kinetiq-batch-4").symlink_to(tmp_path / "elsewhere")
        with batch_staging.open_staging(out, ()):
            make(THREE)
            assert len(list(out.glob(".kinetiq-batch-*"))) == 4
        assert not killed.exists()
        assert not replacing.exists()
        assert (mine / "thesis").read_bytes() == (moved / "former").read_bytes() == b"mine"
        assert (tmp_path / "elsewhere" / "run.lock").exists()

    def test_within_a_line_of_the_log(self, make, tmp_path, log):
        """It is cut off; its clip, which comes after it, was not written."""
        make(THREE)
        path = tmp_path / "out" / "batch_log.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
        (tmp_path / "out" / NAMES[2]).unlink()
        made = make(THREE)
        assert (made["made"], made["kept"]) == ([NAMES[2]], 2)
        assert len(log()) == 3

    def test_a_clip_is_in_the_log_and_on_the_disk_before_it_has_its_name(self, make, monkeypatch):
        """What a loss of power may leave is what a kill may leave."""
        said = []
        for where, name in ((os, "fsync"), (os, "link"), (Path, "rename")):
            real = getattr(where, name)
            monkeypatch.setattr(
                where,
                name,
                lambda *words, name=name, real=real, **rest: (
                    said.append(name) or real(*words, **rest)
                ),
            )
        make([{"prompt": "a"}])
        assert said[-3:] == ["fsync", "fsync", "link"]  # the clip's, the log's
        make([{"prompt": "a", "out": "a"}])
        assert said[-7:] == ["fsync"] * 6 + ["rename"]  # each picture's, the folder's, the log's

    @pytest.mark.parametrize(
        "text", ["mine", '{"a": 1}', "[1]\n", '{"line": 1}\n', "{\n", '{"line": 1', "{"]
    )
    def test_a_file_of_that_name_that_is_no_log_is_left_alone(self, make, tmp_path, text):
        (tmp_path / "out").mkdir()
        path = tmp_path / "out" / "batch_log.jsonl"
        path.write_text(text)
        with pytest.raises(OutputError, match="must be a log of this command, and is none"):
            make(THREE)
        assert path.read_text() == text

    @pytest.mark.parametrize("line", ["{", "[" * 100_000, '{"line": 1}', '{"out": 1, "line": 2}'])
    def test_a_line_that_is_no_entry_is_said(self, make, tmp_path, line):
        make(THREE)
        path = tmp_path / "out" / "batch_log.jsonl"
        path.write_text(f"{path.read_text()}{line}\n")
        with pytest.raises(OutputError, match="and line 5 is neither; take it out"):
            make(THREE)

    @pytest.mark.parametrize("name", ["batch_log.jsonl", "batch_log_1of2.jsonl"])
    @pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
    def test_what_is_no_file_is_no_log(self, make, tmp_path, name, kind):
        out = tmp_path / "out"
        make(THREE)
        kept = tmp_path / "mine"
        kept.write_bytes((out / "batch_log.jsonl").read_bytes())
        (out / name).unlink(missing_ok=True)
        if kind == "link":
            (out / name).symlink_to(kept)
        elif kind == "pipe":
            os.mkfifo(out / name)
        else:
            (out / name).mkdir()
        before = kept.read_bytes()
        with pytest.raises(OutputError, match=rf"{name} cannot be (read|written) \("):
            make(THREE)
        assert kept.read_bytes() == before

    def test_what_a_loss_of_power_leaves_of_a_log(self, make, tmp_path, log):
        """Zeros, where its length came to the disk and the last lines did not."""
        make(THREE)
        path = tmp_path / "out" / "batch_log.jsonl"
        path.write_bytes(path.read_bytes() + bytes(100))
        assert make(THREE)["kept"] == 3
        assert len(log()) == 3
        path.write_bytes(bytes(39))
        assert len(make(THREE)["failed"]) == 3

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

    def test_one_that_shares_the_lines_in_another_way_is_refused(self, make, painter, monkeypatch):
        """They would work on the same lines."""
        paint = painter.generate_as_completed

        def inner(requests, **settings):
            for part in (Part(), Part(1, 3), Part(3, 3)):
                with pytest.raises(OutputError, match="among the same number of parts"):
                    make(THREE, part=part)
            monkeypatch.setattr(painter, "generate_as_completed", paint)
            assert make(THREE, part=Part(2, 2))["made"] == [NAMES[1]]
            return paint(requests, **settings)

        monkeypatch.setattr(painter, "generate_as_completed", inner)
        assert make(THREE, part=Part(1, 2))["made"] == [NAMES[0], NAMES[2]]
        assert make(THREE)["kept"] == 3

    @pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
    def test_a_manifest_that_a_log_leads_to_is_refused(self, tmp_path, painter, link):
        path = tmp_path / "m.jsonl"
        path.write_text('{"prompt": "a"}\n')
        (tmp_path / "out").mkdir()
        link(tmp_path / "out" / "batch_log_1of2.jsonl", path)
        with pytest.raises(OutputError, match="must not have the name of this folder's own log"):
            make_batch(path, tmp_path / "out", lambda: painter, BatchOptions(), describe=BatchModel)
        assert path.read_text() == '{"prompt": "a"}\n'

    def test_a_manifest_with_the_name_of_a_log_is_refused(self, tmp_path, painter):
        path = tmp_path / "batch_log.jsonl"
        path.write_text('{"prompt": "a"}\n')
        with pytest.raises(OutputError, match="must not have the name of this folder's own log"):
            make_batch(path, tmp_path, lambda: painter, BatchOptions(), describe=BatchModel)
        assert path.read_text() == '{"prompt": "a"}\n'


class TestNames:
    """What has a clip's name when the clip is done, is asked at that moment and not before."""

    @pytest.fixture
    def arrive(self, monkeypatch):
        """Let something happen right before the n-th move of a file or a folder to a name."""

        def arrive(happen, nth=1):
            move, calls = batch_staging._move, []

            def moving(path, target):
                calls.append(target)
                if len(calls) == nth:
                    happen(target)
                move(path, target)

            monkeypatch.setattr(batch_staging, "_move", moving)

        return arrive

    @pytest.mark.parametrize("out", ["a.webp", "a"])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_what_comes_at_the_last_moment_stays(self, make, arrive, tmp_path, out, overwrite):
        def happen(target):
            if out == "a":
                target.mkdir()
                (target / "thesis").write_text("mine")
            else:
                target.write_text("mine")

        arrive(happen)
        made = make([{"prompt": "a", "out": out}, {"prompt": "b"}], overwrite=overwrite)
        assert made["made"] == ["clip_000002.mp4"]
        assert "holds something else" in made["failed"][0]["error"]
        target = tmp_path / "out" / out
        assert (target / "thesis" if out == "a" else target).read_text() == "mine"
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            out,
            "batch_log.jsonl",
            "clip_000002.mp4",
        ]

    @pytest.mark.parametrize("out", ["a.webp", "a"])
    def test_what_was_changed_before_it_was_to_go_comes_back(
        self, make, monkeypatch, tmp_path, out
    ):
        """Between the look at what is to be replaced and its move somebody writes to it."""
        make([{"prompt": "a", "out": out}])
        target = tmp_path / "out" / out
        mine = target / "00000.png" if out == "a" else target
        replace = Staging.replace

        def replacing(*words):
            mine.write_text("mine")
            return replace(*words)

        monkeypatch.setattr(Staging, "replace", replacing)
        made = make([{"prompt": "a", "seed": 3, "out": out}], overwrite=True)
        assert "holds something else by now" in made["failed"][0]["error"]
        assert mine.read_text() == "mine"

    @pytest.mark.parametrize("out", ["a.webp", "a"])
    def test_a_clip_that_cannot_be_replaced_comes_back(self, make, arrive, tmp_path, out):
        make([{"prompt": "a", "out": out}])
        before = files(tmp_path / "out")

        def happen(_):
            raise PermissionError(errno.EACCES, "not here")

        arrive(happen, nth=2)
        made = make([{"prompt": "a", "seed": 3, "out": out}], overwrite=True)
        assert made["failed"][0]["error"].endswith(f"out/{out} cannot be written (not here)")
        assert files(tmp_path / "out") == before

    def test_what_cannot_come_back_is_kept_and_said(self, make, arrive, tmp_path):
        make([{"prompt": "a", "out": "a.webp"}])
        clip = (tmp_path / "out" / "a.webp").read_bytes()
        arrive(lambda target: target.write_text("mine"), nth=2)
        with pytest.raises(WorkError, match="must take back what was there before, and cannot"):
            make([{"prompt": "a", "seed": 3, "out": "a.webp"}], overwrite=True)
        (former,) = (tmp_path / "out").glob(".kinetiq-batch-*/former")
        assert former.read_bytes() == clip
        assert (tmp_path / "out" / "a.webp").read_text() == "mine"

    def test_a_file_system_without_links(self, make, monkeypatch, tmp_path):
        def link(*_, **__):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", link)
        assert make(THREE)["made"] == NAMES
        (tmp_path / "out" / NAMES[0]).write_text("mine")
        assert len(make(THREE)["failed"]) == 1

    def test_a_clip_that_another_run_made_meanwhile_is_as_good(self, make, arrive, tmp_path):
        out = tmp_path / "out"
        line = {"prompt": "a", "out": "a.webp"}

        def happen(target):
            log = (out / "batch_log.jsonl").read_text().splitlines()
            entry = json.loads(log[-1])
            target.write_bytes(b"made by another")
            entry["content"] = batch_folder.digest_clip(target)
            (out / "batch_log_3of4.jsonl").write_text(f"{log[0]}\n{json.dumps(entry)}\n")

        arrive(happen)
        assert make([line])["failed"] == []
        assert (out / "a.webp").read_bytes() == b"made by another"

    def test_another_disk_is_said_before_a_clip_is_made(self, make, painter, monkeypatch, tmp_path):
        stat = os.stat
        stars = tmp_path / "out" / "stars"

        def elsewhere(path, **settings):
            found = stat(path, **settings)
            if str(path) != str(stars):
                return found
            return os.stat_result((found[0], found[1], 0, *found[3:]))

        monkeypatch.setattr(Path, "stat", elsewhere)
        made = make(THREE)
        assert "stars must be on the disk of" in made["failed"][0]["error"]
        assert painter.asked == ["a", "c"]

    def test_links_in_a_circle_fail_their_lines(self, make, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "stars").symlink_to("stars")
        (tmp_path / "circle.mp4").symlink_to("circle.mp4")
        made = make([*THREE, {"prompt": "a", "reference": "circle.mp4"}])
        assert made["made"] == [NAMES[0], NAMES[2]]
        assert [failure["line"] for failure in made["failed"]] == [2, 4]


class TestWriting:
    """Whatever an encoder, the log or the disk says, it is said in words."""

    @pytest.mark.parametrize("error", [OverflowError("too long"), KeyError("no codec")])
    def test_encoders_may_say_no_as_they_like(self, make, monkeypatch, error):
        def refuse(*_):
            raise error

        monkeypatch.setattr(clip, "_write_animation", refuse)
        made = make(THREE)
        assert made["made"] == [NAMES[0], NAMES[2]]
        assert f"is not: {error}; choose another format" in made["failed"][0]["error"]

    def test_messages_name_the_clip_and_not_where_it_was_made(self, make, monkeypatch, tmp_path):
        def refuse(_, path, **__):
            raise OutputError(f"write: {path} cannot be written")

        monkeypatch.setattr(Clip, "write", refuse)
        (failure,) = make([{"prompt": "a"}])["failed"]
        assert failure["error"].endswith(f"write: {tmp_path}/out/{NAMES[0]} cannot be written")

    @pytest.mark.parametrize("name", ["write", "fsync"])
    def test_a_log_that_cannot_be_written_ends_the_run_in_words(
        self, make, monkeypatch, tmp_path, name
    ):
        def full(*_):
            raise OSError(errno.ENOSPC, "no room")

        if name == "fsync":
            monkeypatch.setattr(batch_log.os, "fsync", full)
            monkeypatch.setattr(batch_staging, "_sync", lambda _: None)
        else:
            start = BatchLog.__init__
            monkeypatch.setattr(
                BatchLog,
                "__init__",
                lambda self, _: start(self, types.SimpleNamespace(write=full)),
            )
        with pytest.raises(WorkError, match=r"the log cannot be written \(no room\); make room"):
            make(THREE)
        monkeypatch.undo()
        assert files(tmp_path / "out") == {}
        assert make(THREE)["made"] == NAMES

    def test_nothing_is_written_behind_half_a_line(self, make, painter, monkeypatch, tmp_path):
        """Where a disk is full for a moment, and clips wait to be written."""
        start = BatchLog.__init__

        def cut(self, file):
            calls = []

            def write(line):
                calls.append(line)
                return file.write(line[: len(line) // 2] if len(calls) == 2 else line)

            start(self, types.SimpleNamespace(write=write, fileno=file.fileno))

        def inner(requests, **settings):
            return iter(list(paint(requests, **settings)))

        paint = painter.generate_as_completed
        monkeypatch.setattr(painter, "generate_as_completed", inner)
        monkeypatch.setattr(BatchLog, "__init__", cut)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "batch_log.jsonl").write_text(
            '{"log": "kinetiq batch", "version": 1}\n'
        )
        with pytest.raises(WorkError, match="the log cannot be written"):
            make(THREE)
        monkeypatch.undo()
        assert make(THREE)["made"] == NAMES[1:]

    def test_a_disk_that_is_full_is_seen_before_more_is_made(self, make, painter, monkeypatch):
        def full(*_, **__):
            raise OutputError("no room") from OSError(errno.ENOSPC, "no room")

        monkeypatch.setattr(Clip, "write", full)
        paint = painter.generate_as_completed

        def slowly(requests, **settings):
            for each in paint(requests, **settings):
                yield each
                time.sleep(0.05)

        monkeypatch.setattr(painter, "generate_as_completed", slowly)
        with pytest.raises(WorkError, match="make room"):
            make([{"prompt": "a", "seed": seed} for seed in range(9)])
        assert len(painter.asked) <= 3


class TestReading:
    """What is read is what the fingerprint says, whatever happens to files meanwhile."""

    @pytest.fixture
    def reference(self, tmp_path):
        """Write a clip, with the time that a copy might keep."""

        def write(shade):
            frames = np.full((9, 8, 8, 3), shade, np.uint8)
            frames[range(8), :, range(8)] = 255
            Clip(frames, 8).write(tmp_path / "new.gif")
            os.utime(tmp_path / "new.gif", ns=(10**9, 10**9))
            (tmp_path / "new.gif").replace(tmp_path / "good.gif")

        return write

    def test_a_file_that_changed_after_it_was_read_is_read_again(
        self, make, monkeypatch, reference
    ):
        """Though it has the size and the time of the former one."""
        reference(10)
        seen, peek = [], batch_folder.peek

        def peeking(path):
            clip = peek(path)
            seen.append(int(clip.frames[0, 0, -1, 0]))
            if len(seen) == 1:
                reference(99)
            return clip

        monkeypatch.setattr(batch_folder, "peek", peeking)
        line = {"prompt": "a", "reference": "good.gif"}
        made = make([line, {**line, "seed": 1}])
        assert seen == [10, 99]
        assert ["has changed since" in failure["error"] for failure in made["failed"]] == [True]
        assert made["made"] == ["clip_000002.mp4"]

    @pytest.mark.parametrize(
        ("names", "renamed"),
        [
            (["start.png", "1.png", "2.png"], ["0.png", "1.png", "2.png"]),
            (["B.png", "a.png", "c.png"], ["a.png", "b.png", "c.png"]),
            (["A.png", "a.png", "b.png"], ["a.png", "A.png", "b.png"]),
            (["01.png", "1.png", "2.png"], ["1.png", "01.png", "2.png"]),
        ],
    )
    def test_other_names_that_change_the_order_of_pictures_make_another_clip(
        self, tmp_path, names, renamed
    ):
        """And the same order makes the same clip."""
        digests, orders = [], []
        for each, folder in ((names, tmp_path / "one"), (renamed, tmp_path / "other")):
            folder.mkdir()
            for shade, name in enumerate(each):
                Clip(np.full((1, 8, 8, 3), shade, np.uint8), 8).write(folder / name)
            digests.append(content_digest(folder))
            orders.append(Clip.read(folder).frames[:, 0, 0, 0].tolist())
        assert (digests[0] == digests[1]) == (orders[0] == orders[1])

    @pytest.mark.parametrize("kind", ["pipe", "device"])
    def test_what_may_never_end_is_no_file(self, make, tmp_path, kind):
        path = Path("/dev/zero")
        if kind == "pipe":
            path = tmp_path / "pipe.gif"
            os.mkfifo(path)
        lines = [
            {"prompt": "a", key: f"{path}{more}"}
            for key, more in (("reference", ""), ("motion", ""), ("region", ":left"))
        ]
        made = make([*lines, {"prompt": "b"}])
        assert made["made"] == ["clip_000004.mp4"]
        assert ["must be a file or a folder" in f["error"] for f in made["failed"]] == [True] * 3

    def test_one_that_changes_there_and_back_while_it_is_read(self, make, monkeypatch, reference):
        reference(10)
        read = Clip.read

        def reading(_, path, **settings):
            reference(99)
            clip = read(path, **settings)
            reference(10)
            return clip

        monkeypatch.setattr(batch_folder.Clip, "read", classmethod(reading))
        made = make([{"prompt": "a", "reference": "good.gif"}])
        assert "has changed since" in made["failed"][0]["error"]


class TestModels:
    @pytest.fixture
    def folder(self, tmp_path):
        return shutil.copytree(embedded_folder(), tmp_path / "model")

    def describe(self, model, motion_adapter=None, dtype=None):
        return BatchModel.describe(str(model), motion_adapter, dtype).said

    def test_a_model_is_what_is_read_of_its_folder_wherever_it_lies(self, folder, tmp_path):
        said = self.describe(folder)
        assert self.describe("sprites") == said
        assert self.describe(folder, dtype="float32") == said
        assert self.describe(folder, dtype="bfloat16") != said
        (folder / "README.md").write_text("new")
        (folder / "unet" / ".hidden.json").write_text("new")
        (folder / "clips").mkdir()
        (folder / "clips" / "clip.mp4").write_text("new")
        assert self.describe(folder) == said
        moved = tmp_path / "elsewhere"
        (folder / "unet").rename(moved)
        (folder / "unet").symlink_to(moved)
        assert self.describe(folder) == said
        with (moved / "diffusion_pytorch_model.safetensors").open("r+b") as file:
            file.seek(234_567)
            before = file.read(1)
            file.seek(234_567)
            file.write(bytes([before[0] ^ 1]))
        assert self.describe(folder) != said

    def test_another_scheduler_is_another_model(self, folder):
        said = self.describe(folder)
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"][1] = "EulerDiscreteScheduler"
        (folder / "model_index.json").write_text(json.dumps(index))
        assert self.describe(folder) != said

    def test_other_settings_are_another_model(self, folder):
        """What a line leaves out is what they say."""
        said = self.describe(folder)
        settings = json.loads((folder / "kinetiq.json").read_text())
        (folder / "kinetiq.json").write_text(json.dumps({**settings, "steps": 5}))
        assert self.describe(folder) != said
        (folder / "kinetiq.json").unlink()
        assert self.describe(folder)["settings"] == {}

    @pytest.mark.parametrize("name", ["unet/config.json", "kinetiq.json", "model_index.json"])
    def test_all_that_is_read_must_stay(self, folder, name):
        described = BatchModel.describe(str(folder), None, None)
        for files in described.files:
            files.require_unchanged()
        (folder / name).unlink()
        (changed,) = (files for files in described.files if folder / name in files.stamps)
        with pytest.raises(CheckpointError, match="must stay as they were"):
            changed.require_unchanged()

    def test_one_of_a_hub_is_its_id(self):
        assert self.describe("some/model") != self.describe("some/other")
        assert self.describe("some/model", "an/adapter") != self.describe("some/model")

    def test_a_folder_that_is_no_model_is_said_after_the_manifest_was_read(self, tmp_path, painter):
        (tmp_path / "m.jsonl").write_text("")
        (tmp_path / "model").mkdir()

        def describe():
            return BatchModel.describe(str(tmp_path / "model"), None, None)

        def run():
            make_batch(
                tmp_path / "m.jsonl",
                tmp_path / "out",
                lambda: painter,
                BatchOptions(),
                describe=describe,
            )

        with pytest.raises(RequestError, match="must hold a line"):
            run()
        (tmp_path / "m.jsonl").write_text('{"prompt": "a"}')
        with pytest.raises(CheckpointError, match="model_index"):
            run()

    def test_one_that_changes_before_it_is_loaded_is_refused(self, make, folder):
        def load():
            config = folder / "unet" / "config.json"
            config.write_bytes(config.read_bytes())
            return Painter()

        with pytest.raises(CheckpointError, match="must stay as they were"):
            make(THREE, load=load, describe=lambda: BatchModel.describe(str(folder), None, None))


class TestParts:
    def test_they_share_the_lines(self, make, painter, log):
        lines = [{"prompt": str(number)} for number in range(5)]
        assert make(lines, part=Part(2, 3))["made"] == ["clip_000002.mp4", "clip_000005.mp4"]
        assert len(log("batch_log_2of3.jsonl")) == 2
        assert make(lines, part=Part(1, 3))["made"] == ["clip_000001.mp4", "clip_000004.mp4"]
        made = make(lines)
        assert (made["made"], made["kept"]) == (["clip_000003.mp4"], 4)
        assert sorted(painter.asked) == list("01234")

    def test_it_is_what_is_there_that_counts_and_not_when_it_was_said(self, make, tmp_path):
        one, other = ([{"prompt": "a", "seed": seed, "out": "a.webp"}] for seed in (1, 2))
        make(one, part=Part(1, 2))
        make(other, overwrite=True)
        assert make(other)["kept"] == 1
        assert make(one)["failed"]
        logs = sorted((tmp_path / "out").glob("batch_log*"))
        for path in logs:  # as if the clock had run backwards
            first, *lines = path.read_bytes().splitlines(keepends=True)
            path.write_bytes(b"".join([first, *reversed(lines)]))
        assert make(other)["kept"] == 1
        assert make(one, overwrite=True)["made"] == ["a.webp"]
        assert make(one)["kept"] == 1

    def test_a_part_without_lines_has_nothing_to_do(self, make):
        assert make(THREE, part=Part(4, 4)) | {"out": ""} == {
            "out": "",
            "made": [],
            "kept": 0,
            "failed": [],
        }

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
