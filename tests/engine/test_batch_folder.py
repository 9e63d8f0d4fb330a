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

from kinetiq import batch_folder
from kinetiq.__main__ import main
from kinetiq.batch_folder import BatchOptions, describe_model, make_batch
from kinetiq.batch_log import BatchLog, Part
from kinetiq.checkpoint import embedded_folder
from kinetiq.clip import Clip
from kinetiq.engine import Engine
from kinetiq.errors import NonFiniteError, OutputError, RequestError, WorkError
from kinetiq.files import replacing

THREE = [{"prompt": "a"}, {"prompt": "b", "out": "stars/b.webp"}, {"prompt": "c", "seed": 5}]
NAMES = ["clip_000001.mp4", "stars/b.webp", "clip_000003.mp4"]


MIXED = [{"prompt": name, "out": name} for name in ("a.webp", "b", "c.webp")]


def stopped(patched, where, name, nth, after=False):
    """The n-th call of something ends the run, as a signal would, before or after its work."""
    real, calls = getattr(where, name), []

    def stop(*words, **settings):
        calls.append(words)
        if len(calls) == nth and not after:
            raise KeyboardInterrupt
        result = real(*words, **settings)
        if len(calls) == nth:
            raise KeyboardInterrupt
        return result

    patched.setattr(where, name, stop)


POINTS = {
    "before encoding": lambda patched, nth: stopped(patched, batch_folder, "_encode", nth),
    "after encoding": lambda patched, nth: stopped(patched, batch_folder, "_encode", nth, True),
    "before the log": lambda patched, nth: stopped(patched, BatchLog, "add_clip", nth),
    "after the log": lambda patched, nth: stopped(patched, BatchLog, "add_clip", nth, True),
    "before a name": lambda patched, nth: stopped(patched, Path, "rename", nth),
    "after a name": lambda patched, nth: stopped(patched, Path, "rename", nth, True),
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
        **options,
    ):
        painter.wide = wide
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

    def test_clips_do_not_pile_up_where_writing_is_slow(self, make, painter, monkeypatch):
        encode, written, waiting = batch_folder._encode, [], []

        def slowly(clip, path, scale):
            time.sleep(0.03)
            waiting.append(len(painter.asked) - len(written))
            encode(clip, path, scale)
            written.append(path)

        monkeypatch.setattr(batch_folder, "_encode", slowly)
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
            "clips.jsonl:2: out: .webp must be able to hold 1 frames of 64x1049600"
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
        make(THREE)
        left = tmp_path / "out" / ".kinetiq-batch"
        (left / "old0").mkdir(parents=True)
        (left / "clip.mp4").write_bytes(b"half")
        assert make(THREE)["kept"] == 3
        assert not left.exists()
        make([{"prompt": "a", "out": "a"}])
        (left / "old0").mkdir(parents=True)
        (left / "old0" / "00000.png").write_bytes(b"old")
        (left / "clip").mkdir()
        (left / "clip" / "00099.png").write_bytes(b"half")
        assert make([{"prompt": "a", "seed": 3, "out": "a"}], overwrite=True)["made"] == ["a"]
        assert len(list((tmp_path / "out" / "a").iterdir())) == 4

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
        for name in ("fsync", "rename"):
            real = getattr(os if name == "fsync" else Path, name)
            monkeypatch.setattr(
                os if name == "fsync" else Path,
                name,
                lambda *words, name=name, real=real: said.append(name) or real(*words),
            )
        make([{"prompt": "a"}])
        assert said[-3:] == ["fsync", "fsync", "rename"]  # the clip's, the log's

    @pytest.mark.parametrize("text", ["mine", '{"a": 1}', "[1]\n", '{"line": 1}\n', "{\n", 'x\n{"'])
    def test_a_file_of_that_name_that_is_no_log_is_left_alone(self, make, tmp_path, text):
        (tmp_path / "out").mkdir()
        path = tmp_path / "out" / "batch_log.jsonl"
        path.write_text(text)
        with pytest.raises(OutputError, match="must be a log of this command, and is none"):
            make(THREE)
        assert path.read_text() == text

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


class TestModels:
    @pytest.fixture
    def folder(self, tmp_path):
        path = tmp_path / "model"
        (path / "unet").mkdir(parents=True)
        (path / "model_index.json").write_text("{}")
        (path / "unet" / "weights.safetensors").write_bytes(bytes(5_000_000))
        return path

    def test_a_model_is_what_its_folder_holds_wherever_it_lies(self, folder, tmp_path):
        said = describe_model(str(folder), None, None)
        moved = shutil.copytree(folder, tmp_path / "moved")
        assert describe_model(str(moved), None, "float32") == said
        embedded = describe_model(str(embedded_folder()), None, None)
        assert describe_model("sprites", None, None) == embedded != said
        assert describe_model(str(folder), None, "bfloat16") != said
        assert describe_model(str(folder), str(folder), None) != said
        with (moved / "unet" / "weights.safetensors").open("r+b") as file:
            file.seek(2_345_678)
            file.write(b"1")
        assert describe_model(str(moved), None, None) != said

    def test_one_of_a_hub_is_its_id(self):
        said = [describe_model(name, name, None) for name in ("some/model", "some/other")]
        assert said[0] != said[1]
        assert said[0]["model"] == "some/model"


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
            path.write_bytes(b"".join(reversed(path.read_bytes().splitlines(keepends=True))))
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
