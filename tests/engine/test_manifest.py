"""Files of JSON lines, each of which says one clip."""

import json
import os
from pathlib import Path, PurePosixPath

import click
import numpy as np
import pytest

from kinetiq.__main__ import generate
from kinetiq.clip import Clip
from kinetiq.clip_options import ClipOptions
from kinetiq.errors import InputError, NonFiniteError, OutputError, RequestError
from kinetiq.manifest import BadLine, ManifestLine, read_manifest
from kinetiq.options import backend_options, clip_options, network_options, source_options

VALUES = {  # one of each option of a clip, as JSON has it
    "prompt": "a red circle -- left",
    "reference": "good.gif",
    "control": "both",
    "until": 0.25,
    "sites": "temporal",
    "reduce_leak": True,
    "parts": "qk",
    "halves": "cond",
    "moft": "good.gif",
    "direction": "left",
    "speed": 2,
    "drag": ["1,2:3,4", "5,6:7,8"],
    "region": ["mask.png:right"],
    "moft_weight": 3.5,
    "moft_step_size": 0.25,
    "moft_window": "0.1,0.2",
    "moft_tap": "up_blocks.0",
    "fit": "stretch",
    "motion": ["dance.safetensors", "-0.5*zoom.safetensors"],
    "motion_scale": -1.5,
    "value_scale": 1e-3,
    "debias": "mean",
    "noise_prior": 0.5,
    "highway": "released",
    "beta": 1.25,
    "negative_prompt": "-",
    "seed": 12345678901234567890,
    "steps": 3,
    "guidance": 7.5,
    "sampler": "euler",
    "eta": 0.5,
    "frames": 8,
    "size": "16x24",
    "fps": 12.5,
    "scale": 4,
}


@pytest.fixture
def read(tmp_path):
    """Read a manifest of these lines, each text or what becomes JSON."""

    def read(*lines, name="clips.jsonl"):
        path = tmp_path / name
        words = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(words) + "\n")
        return list(read_manifest(path))

    return read


@pytest.fixture
def failure(read, tmp_path):
    """What is wrong with a line, behind the manifest's path and the line's number."""

    def failure(line):
        (bad,) = read("", line)
        assert isinstance(bad, BadLine)
        assert bad.number == 2
        start = f"{tmp_path / 'clips.jsonl'}:2: "
        assert str(bad.error).startswith(start)
        return str(bad.error).removeprefix(start)

    return failure


def options_of(decorate):
    """The options that a decorator gives a command."""
    return {parameter.name for parameter in click.command(decorate(lambda **_: None)).params}


class TestKeys:
    def test_they_are_all_options_of_generate_that_are_of_the_clip(self):
        elsewhere = {"out", "as_json"}
        for decorate in (source_options, backend_options, network_options):
            elsewhere |= options_of(decorate)
        of_clip = {parameter.name for parameter in generate.params} - elsewhere
        assert options_of(clip_options) == of_clip
        plural = {"drag": "drags", "region": "regions", "motion": "motions"}
        assert {plural.get(key, key) for key in VALUES} == of_clip

    def test_each_means_what_it_means_to_generate(self, read, tmp_path):
        (line,) = read(VALUES)
        words = []
        for key, value in VALUES.items():
            option = f"--{key.replace('_', '-')}"
            if value is True:
                words.append(option)
            else:
                words += [
                    word
                    for each in (value if isinstance(value, list) else [value])
                    for word in (option, str(each))
                ]
        said = generate.make_context("generate", ["--out", "x.mp4", *words]).params
        elsewhere = {*options_of(source_options), *options_of(backend_options)}
        elsewhere |= {*options_of(network_options), "out", "as_json"}
        of_clip = {name: value for name, value in said.items() if name not in elsewhere}
        assert line.asked == ClipOptions(**of_clip, folder=tmp_path)

    def test_what_is_left_out_has_its_default(self, read, tmp_path):
        (line,) = read({"prompt": "a ring"})
        assert line.asked == ClipOptions(prompt="a ring", folder=tmp_path)

    def test_dashes_may_stay(self, read):
        plain, dashed = read(
            {"prompt": "a", "moft_weight": 2}, {"prompt": "a", "moft-weight": 2, "out": "b.gif"}
        )
        assert plain.asked == dashed.asked

    def test_one_text_will_do_for_a_list(self, read):
        (line,) = read({"prompt": "a", "motion": "dance.safetensors"})
        assert line.asked.motions == ("dance.safetensors",)

    def test_a_flag_that_is_false_is_not_said(self, read):
        (line,) = read({"prompt": "a", "reduce_leak": False})
        assert line.asked.reduce_leak is None


class TestLines:
    def test_empty_ones_count_and_say_nothing(self, read):
        first, second = read("", {"prompt": "a"}, "   ", {"prompt": "b"})
        assert (first.number, second.number) == (2, 4)

    def test_names_are_the_numbers_of_lines(self, read):
        first, second, third = read(
            {"prompt": "a"}, {"prompt": "b", "out": "stars/b.webm"}, {"prompt": "c"}
        )
        assert first.out == PurePosixPath("clip_000001.mp4")
        assert second.out == PurePosixPath("stars/b.webm")
        assert third.out == PurePosixPath("clip_000003.mp4")

    def test_bad_ones_leave_the_others_alone(self, read):
        first, bad, last = read({"prompt": "a"}, "{", {"prompt": "c"})
        assert isinstance(first, ManifestLine)
        assert isinstance(bad, BadLine)
        assert isinstance(last, ManifestLine)

    def test_a_mark_of_utf_8_and_a_last_line_without_an_end_are_read(self, tmp_path):
        path = tmp_path / "clips.jsonl"
        path.write_bytes(b'\xef\xbb\xbf{"prompt": "\xc3\xa9"}')
        (line,) = read_manifest(path)
        assert line.asked.prompt == "é"

    def test_one_that_is_too_long_leaves_the_others_alone(self, tmp_path):
        path = tmp_path / "clips.jsonl"
        long = b'{"prompt": "' + b"a" * (3 * 2**20) + b'"}\n'
        path.write_bytes(long + b'{"prompt": "b"}\n' + long[:-1])
        first, line, last = read_manifest(path)
        assert "clips.jsonl:1: must be a line of at most 1048576 bytes, got more" in str(
            first.error
        )
        assert (line.number, line.asked.prompt) == (2, "b")
        assert last.number == 3

    def test_a_line_of_as_many_bytes_as_may_be_is_read(self, tmp_path):
        path = tmp_path / "clips.jsonl"
        text = b'{"prompt": "a"}'
        other = b'{"prompt": "b", "out": "b.mp4"}'
        path.write_bytes(text + b" " * (2**20 - len(text) - 1) + b"\n" + other)
        assert [line.number for line in read_manifest(path)] == [1, 2]
        assert all(isinstance(line, ManifestLine) for line in read_manifest(path))

    def test_files_of_a_pipe_are_looked_for_where_one_is(self):
        reading, writing = os.pipe()
        os.write(writing, b'{"prompt": "a", "reference": "good.gif"}')
        os.close(writing)
        (line,) = read_manifest(Path(f"/dev/fd/{reading}"))
        os.close(reading)
        assert line.asked.named_files == (Path("good.gif"),)

    def test_what_tables_write_is_read(self, read, tmp_path):
        (line,) = read(
            '{"prompt": "a", "seed": 7.0, "guidance": 2.5, "until": null, "motion": null}'
        )
        assert line.asked == ClipOptions(prompt="a", seed=7, guidance=2.5, folder=tmp_path)

    @pytest.mark.parametrize("name", ["missing.jsonl", "."])
    def test_a_file_that_cannot_be_read_is_said(self, tmp_path, name):
        with pytest.raises(RequestError, match="must be a manifest that can be read"):
            list(read_manifest(tmp_path / name))


class TestMistakes:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "must be a JSON object, got what is none: Expecting property name"),
            ("[1]", 'must be a JSON object such as {"prompt": "a ring"}, got [1]'),
            ("null", 'must be a JSON object such as {"prompt": "a ring"}, got null'),
            ("[" * 5000, "must hold plain values, got ones far within others"),
            ('{"prompt": "a", "seed": NaN}', "must hold finite numbers, got NaN"),
            ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "must be a JSON object, got what"),
            ('{"prompt": "a", "prompt": "a"}', '"prompt" must be said once, got it twice'),
            (
                '{"prompt": "a", "moft-tap": "x", "moft_tap": "x"}',
                '"moft_tap" must be said once, got it twice',
            ),
            ({}, "Missing option '--prompt'"),
            ({"prompt": "a", "model": "sprites"}, "keys must be among out, prompt, reference"),
            ({"prompt": None}, "Missing option '--prompt'"),
            (
                {"prompt": "a", "motion": [None]},
                "motion: must be text, or a list of texts, got null",
            ),
            ({"prompt": "a", "reference": "a\0b"}, "reference: must be text without other"),
            ('{"prompt": "a", "moft": "a\\ud800"}', "moft: must be text without other characters"),
            ({"prompt": "a", "steps": True}, "steps: must be text or a number, got true"),
            ({"prompt": "a", "steps": [3]}, "steps: must be text or a number, got [3]"),
            ({"prompt": "a", "steps": 1.5}, "Invalid value for '--steps'"),
            ({"prompt": "a", "control": "none at all"}, "Invalid value for '--control'"),
            (
                {"prompt": "a", "motion": [1, {}]},
                "motion: must be text, or a list of texts, got {}",
            ),
            (
                {"prompt": "a", "reduce_leak": "yes"},
                'reduce_leak: must be true or false, got "yes"',
            ),
            ({"prompt": "a", "scale": 65}, "Invalid value for '--scale'"),
            ({"prompt": "a", "out": 3}, "out: must be the name of a clip's file, got 3"),
            ({"prompt": "a", "out": ""}, 'out: must be the name of a clip\'s file, got ""'),
            ({"prompt": "a", "out": "a\nb.mp4"}, "out: must be the name of a clip's file"),
            ({"prompt": "a", "out": "/a.mp4"}, "out: must be a path inside the folder"),
            ({"prompt": "a", "out": "b/../../a.mp4"}, "out: must be a path inside the folder"),
            ({"prompt": "a", "out": "."}, "out: must be a path inside the folder"),
            ({"prompt": "a", "out": ".Kinetiq-batch/a.mp4"}, "out: must not be a name that this"),
            ({"prompt": "a", "out": "b/.kinetiq-1/a.mp4"}, "out: must not be a name that this"),
            ({"prompt": "a", "out": "Batch_log.jsonl/a.mp4"}, "out: must not be a name that this"),
            ({"prompt": "a", "out": "batch_log_1of2.jsonl"}, "out: must not be a name that this"),
            ({"prompt": "a", "out": "a.avi"}, "Clip.write: a.avi must end in one of .mp4"),
        ],
    )
    def test_they_are_said_with_their_place(self, failure, line, message):
        assert failure(line).startswith(message)

    def test_a_key_that_is_nearly_right_is_hinted_at(self, failure):
        assert failure({"prompt": "a", "sead": 1}).endswith("got \"sead\"; did you mean 'seed'?")

    def test_other_bytes_than_text(self, tmp_path):
        path = tmp_path / "clips.jsonl"
        path.write_bytes(b'{"prompt": "\xff"}\n')
        (bad,) = read_manifest(path)
        assert "clips.jsonl:1: must be text in UTF-8, got other bytes" in str(bad.error)

    @pytest.mark.parametrize(
        ("first", "second", "name"),
        [
            ("a.mp4", "a.mp4", "a.mp4"),
            ("b", "b/a.mp4", "b"),
            ("b/a.mp4", "b", "b"),
            ("b/c/a.mp4", "b", "b"),
            ("clip_000002.mp4", None, "clip_000002.mp4"),
        ],
    )
    def test_no_two_clips_have_one_name(self, read, first, second, name):
        out = {} if second is None else {"out": second}
        line, bad = read({"prompt": "a", "out": first}, {"prompt": "b", **out})
        assert isinstance(line, ManifestLine)
        assert f":2: out: must be a name of its own, got {name!r} in line 1 too" in str(bad.error)

    def test_clips_of_one_folder_are_not_in_each_other(self, read):
        lines = read({"prompt": "a", "out": "b/a.mp4"}, {"prompt": "b", "out": "b/c.mp4"})
        assert [type(line) for line in lines] == [ManifestLine, ManifestLine]


class TestPlans:
    @pytest.mark.parametrize(
        ("said", "message"),
        [
            ({"steps": 0}, "steps: must be a whole number from 1 to 1000, got 0"),
            ({"control": "motion"}, "--control motion needs --reference, got none"),
            ({"reference": "missing.mp4"}, "missing.mp4 does not exist"),
            ({"motion": "missing.safetensors"}, "missing.safetensors"),
            ({"motion": "x" * 300}, "must be a motion's file, and is not there"),
            ({"reference": "x" * 300}, "xxx"),
        ],
    )
    def test_what_has_no_meaning_is_said_with_its_place(self, read, said, message):
        (line,) = read({"prompt": "a", **said})
        with pytest.raises(InputError) as caught, line.located():
            line.asked.plan()
        start, _, rest = str(caught.value).partition("clips.jsonl:1: ")
        assert start
        assert message in rest
        assert "generate:" not in rest

    @pytest.mark.parametrize("kind", [OutputError, RequestError, NonFiniteError])
    def test_errors_keep_their_class(self, read, kind):
        (line,) = read({"prompt": "a"})
        assert type(line.locate(kind("what"))) is kind

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ({"seed": 7}, {"seed": "7"}),
            ({"seed": 0}, {}),
            ({"eta": 0}, {}),
            ({"reduce_leak": False}, {}),
            ({"motion": []}, {}),
            ({"guidance": 7}, {"guidance": 7.0}),
            ({"drag": "1,2:3,4"}, {"drag": ["1,2:3,4"]}),
            ({"reference": "a.gif"}, {"reference": "./a.gif"}),
            ({"motion": "a"}, {"motion": "1.0*a"}),
        ],
    )
    def test_what_asks_for_the_same_clip_has_the_same_content(self, read, one, other):
        first, second = (
            line.asked.content(lambda path: f"content of {path.name}")
            for line in read({"prompt": "a", **one}, {"prompt": "a", **other})
        )
        assert first == second

    def test_content_is_of_all_options_and_all_files(self, read, tmp_path):
        for name in ("mask.png", "other.png", "good.gif"):
            Clip(np.full((1, 8, 8, 3), 255, np.uint8), 8).write(tmp_path / name)
        base = {**VALUES, "region": ["mask.png:right", "other.png:good.gif"], "moft": "moft.gif"}
        changes = {
            key: value + 1 if isinstance(value, int | float) else f"{value}x"
            for key, value in base.items()
        }
        changes |= {"control": "query", "halves": "both", "direction": "up", "fit": "fit"}
        changes |= {"debias": "none", "highway": "none", "drag": ["0,0:1,1"], "motion": ["-x"]}
        changes |= {"reduce_leak": False, "region": ["mask.png:left", "other.png:good.gif"]}

        def content(said, changed=""):
            (line,) = read(said)
            return line.asked.content(lambda path: f"{path.name} {path.name == changed}")

        whole = content(base)
        for key, value in changes.items():
            assert content({**base, key: value}) != whole, key
        for name in ("good.gif", "moft.gif", "mask.png", "other.png", "dance.safetensors"):
            assert content(base, name) != whole, name

    def test_files_are_looked_for_beside_the_manifest(self, read, tmp_path, monkeypatch):
        moving = np.zeros((4, 8, 8, 3), np.uint8)
        moving[range(4), :, range(4)] = 255
        Clip(moving, 8).write(tmp_path / "good.gif")
        Clip(np.full((1, 8, 8, 3), 255, np.uint8), 8).write(tmp_path / "-mask.png")
        monkeypatch.chdir("/")
        (line,) = read(
            {
                "prompt": "a",
                "reference": "good.gif",
                "moft": str(tmp_path / "good.gif"),
                "control": "query",
                "region": "-mask.png",
                "motion": ["0.5*dance.safetensors", "-zoom.safetensors"],
            }
        )
        named = ["good.gif", "good.gif", "-mask.png", "dance.safetensors", "zoom.safetensors"]
        assert list(line.asked.named_files) == [tmp_path / name for name in named]
        (line,) = read({"prompt": "a", "reference": "good.gif", "region": "-mask.png"})
        (control,) = line.asked.plan().controls
        assert control.region.shape == (8, 8)

    def test_files_of_regions_with_motions_are_named(self, read, tmp_path):
        for name in ("mask.png", "other.png", "good.gif"):
            frames = 1 if name.endswith("png") else 4
            Clip(np.full((frames, 8, 8, 3), 255, np.uint8), 8).write(tmp_path / name)
        (line,) = read({"prompt": "a", "region": ["mask.png:right", "other.png:good.gif"]})
        named = {Path(path).name for path in line.asked.named_files}
        assert named == {"mask.png", "other.png", "good.gif"}
