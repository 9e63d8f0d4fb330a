"""Storyboards as files: what they say, and what is said of bad ones."""

import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kinetiq import storyboard
from kinetiq.clip import Clip, peek
from kinetiq.errors import ClipError, InputError, RequestError
from kinetiq.motion_injection import MotionInjection
from kinetiq.query_injection import QueryInjection
from kinetiq.shots import ConsistentShots, Shot
from kinetiq.storyboard import Storyboard

PLAIN = """\
subject: ring
shots:
  - prompt: a ring moving left
  - prompt: a ring standing still
"""


def noise(frames=4, seed=0):
    rng = np.random.default_rng(seed)
    return Clip.from_array(rng.integers(0, 255, (frames, 16, 16, 3), dtype=np.uint8))


@pytest.fixture
def read(tmp_path):
    """Read a storyboard from a folder that has a clip, a still picture and masks."""
    noise().write(tmp_path / "clip.webp")
    (tmp_path / "masks").mkdir()
    for number, side in ((2, 4), (10, 8)):
        mask = np.zeros((16, 16), np.uint8)
        mask[:side] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / f"shot_{number}.png")
    Image.fromarray(mask).save(tmp_path / "still.png")
    (tmp_path / "masks" / ".hidden").write_text("no mask")
    (tmp_path / "notes.txt").write_text("no clip")

    def make(text):
        path = tmp_path / "board.yaml"
        path.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
        return Storyboard.read(path)

    return make


def test_a_plain_storyboard_asks_for_the_defaults(read):
    expected = ConsistentShots(
        "ring", (Shot("a ring moving left", ()), Shot("a ring standing still", ()))
    )
    assert read(PLAIN).build(peek) == expected


def test_every_option_of_a_board_can_be_said_and_arrives(read):
    said = {
        "keys_window": "[0.1, 0.3]",
        "keys_weight": 2.5,
        "preserve_until": 0.5,
        "flow": "true",
        "key_frames": 3,
        "flow_weight": "paper",
        "refine_window": "[0, 1]",
        "refine": 0.25,
        "refine_halves": "cond",
        "query_halves": "cond",
        "mask_dropout": 0.5,
        "vanilla": "before",
        "map_at": 0.6,
        "seed": 12,
        "steps": 6,
        "frames": 4,
        "guidance_scale": "5e0",
        "fps": 12.5,
        "sampler": "dpm++2m",
        "eta": 0,
    }
    assert set(said) == set(storyboard._OPTIONS)
    lines = "".join(f"{key}: {value}\n" for key, value in said.items())
    made = read(PLAIN + lines + "size: 24x32\n").build(peek)
    wanted = said | {"keys_window": (0.1, 0.3), "refine_window": (0, 1)}
    wanted |= {"flow": True, "guidance_scale": 5.0, "height": 24, "width": 32}
    assert {key: getattr(made, key) for key in wanted} == wanted
    default = ConsistentShots("ring", made.shots)
    assert all(getattr(default, key) != wanted[key] for key in wanted if key != "eta")


def test_a_shot_carries_its_own_seed_words_and_motion(read, tmp_path):
    board = read("""\
        subject: ring
        shots:
          - {prompt: a ring, seed: 9, negative_prompt: blur, reference: clip.webp}
          - prompt: a ring
            reference: clip.webp
            method: queries
            until: 0.7
          - prompt: a ring
            reference: clip.webp
            method: both
    """)
    one, two, three = board.build(Clip.read).shots
    clip = Clip.read(tmp_path / "clip.webp")
    assert (one.seed, one.negative_prompt) == (9, "blur")
    assert one.control == (MotionInjection(clip),)
    assert two.control == (QueryInjection(clip, until=0.7),)
    assert three.control == (QueryInjection(clip), MotionInjection(clip))


def test_a_motion_file_is_read_with_its_scale(read, tmp_path, monkeypatch):
    seen = []

    class Motion:
        @classmethod
        def read(cls, path, **switches):
            seen.append((cls, path, switches))
            return MotionInjection(noise())

    class Lora(Motion):
        pass

    (tmp_path / "one.safetensors").write_bytes(b"1")
    (tmp_path / "two.safetensors").write_bytes(b"2")
    kinds = {"one.safetensors": "embedding", "two.safetensors": "lora"}

    class Info:
        def __init__(self, path):
            self.kind = kinds[path.name]

    monkeypatch.setattr(storyboard, "MotionEmbedding", Motion)
    monkeypatch.setattr(storyboard, "MotionLora", Lora)
    monkeypatch.setattr(storyboard, "read_info", Info)
    board = read("""\
        subject: ring
        shots:
          - {prompt: a ring, motion: one.safetensors, scale: -0.5}
          - {prompt: a ring, motion: two.safetensors}
    """)
    assert seen == [
        (Motion, tmp_path / "one.safetensors", {"scale": -0.5}),
        (Lora, tmp_path / "two.safetensors", {}),
    ]
    assert all(shot.control == (MotionInjection(noise()),) for shot in board.build(peek).shots)


@pytest.mark.parametrize("said", ["masks", "[masks/shot_2.png, masks/shot_10.png]"])
def test_masks_come_from_a_folder_in_natural_order_or_a_list(read, said):
    masks = read(PLAIN + f"masks: {said}\n").build(peek).masks
    assert [mask.shape for mask in masks] == [(16, 16)] * 2
    assert [float(mask.mean()) for mask in masks] == [0.25, 0.5]


def test_masks_may_move_and_attention_is_the_default(read):
    masks = read(PLAIN + "masks: [clip.webp, still.png]\n").build(peek).masks
    assert [mask.shape for mask in masks] == [(4, 16, 16), (16, 16)]
    assert read(PLAIN + "masks: attention\n").build(peek).masks == "attention"


def test_sizes_and_frames_of_shots_are_one(read):
    board = read("""\
        subject: ring
        shots:
          - {prompt: a ring, size: 16x24, frames: 5}
          - {prompt: a ring, size: 16x24, frames: 5}
          - prompt: a ring
    """)
    made = board.build(peek)
    assert (made.height, made.width, made.frames) == (16, 24, 5)


def test_plain_values_are_those_of_yaml_1_2():
    scalars = {
        "010": 10,
        "-3": -3,
        "1e3": 1000.0,
        ".5": 0.5,
        "1.": 1.0,
        "no": "no",
        "on": "on",
        "12:30:45": "12:30:45",
        "0x1F": "0x1F",
        "1_000": "1_000",
        "2001-01-01": "2001-01-01",
        ".inf": ".inf",
        ".": ".",
        "TRUE": True,
        "false": False,
        "~": None,
        "": None,
    }
    for text, value in scalars.items():
        found = storyboard._scalar(text)
        assert found == value and type(found) is type(value), text


def test_quoted_numbers_are_words(read):
    assert read(PLAIN.replace("a ring standing still", '"a ring 7"')).build(peek).shots[1] == Shot(
        "a ring 7", ()
    )
    with pytest.raises(RequestError, match=r"board.yaml:5: seed: must be a whole number"):
        read(PLAIN + 'seed: "7"\n')


# What is wrong, after the last line of what is said; the line and the key that are to be named.
BAD = {
    "unknown key": (PLAIN + "colour: red\n", 5, "colour: must be a key of a storyboard"),
    "unknown key of a shot": (PLAIN + "    sed: 3\n", 5, "sed: must be a key of each shot"),
    "no subject": ("shots:\n  - prompt: a\n", 1, "subject: must be a key of a storyboard"),
    "no shots": ("subject: ring\n", 1, "shots: must be a key of a storyboard, got none"),
    "no prompt": ("subject: a\nshots:\n  - prompt: a\n  - seed: 3\n", 4, "prompt: must be a key"),
    "one shot": ("subject: a\nshots:\n  - prompt: a\n", 2, "shots: must be at least 2, got 1"),
    "no shot": ("subject: a\nshots: []\n", 2, "shots: must be at least 2, got 0"),
    "shots no list": ("subject: a\nshots: a ring\n", 2, "shots: must be a list of shots, got"),
    "a shot no mapping": ("subject: a\nshots:\n- prompt: a\n- a\n", 4, "shots: must each have"),
    "subject not in a prompt": (
        PLAIN.replace("ring standing", "square standing"),
        4,
        "prompt: must hold the subject 'ring' as words, got 'a square standing still'",
    ),
    "subject only within a word": (
        PLAIN.replace("a ring moving", "bring moving"),
        3,
        "prompt: must hold the subject",
    ),
    "empty subject": (PLAIN.replace("ring\n", '" "\n', 1), 1, "subject: must hold at least"),
    "subject a number": (PLAIN.replace("ring\n", "3\n", 1), 1, "subject: must be text, got int"),
    "prompt a list": (PLAIN.replace("a ring moving left", "[a]"), 3, "prompt: must be text, got l"),
    "prompt empty": (PLAIN.replace("a ring moving left", '""'), 3, "prompt: must hold at least"),
    "half a character": (
        PLAIN.replace("a ring moving left", r'"a ring \ud800"'),
        3,
        "prompt: must be valid Unicode",
    ),
    "no value": (PLAIN + "seed:\n", 5, "seed: must have a value, got none"),
    "no value of a shot": (PLAIN + "    seed:\n", 5, "seed: must have a value, got none"),
    "sizes differ": (
        PLAIN + "    size: 32x32\nsize: 16x16\n",
        5,
        "size: must be '16x16' as in line 6, since all shots are rows of one batch, got '32x32'",
    ),
    "sizes of shots differ": (
        PLAIN.replace("left\n", "left\n    size: 16x16\n") + "    size: 32x32\n",
        6,
        "size: must be '16x16' as in line 4",
    ),
    "frames differ": (PLAIN + "    frames: 4\nframes: 5\n", 5, "frames: must be 5 as in line 6"),
    "size no size": (PLAIN + "size: 32\n", 5, "size: must be HEIGHTxWIDTH such as 320x512, got 32"),
    "size too small": (PLAIN + "size: 2x32\n", 5, "size: must be a whole number from 8"),
    "steps a word": (PLAIN + "steps: many\n", 5, "steps: must be a whole number from 1"),
    "steps true": (PLAIN + "steps: true\n", 5, "steps: must be a whole number from 1"),
    "seed below 0": (PLAIN + "seed: -1\n", 5, "seed: must be a whole number from 0"),
    "seed a list": (PLAIN + "seed: [1]\n", 5, "seed: must be a whole number from 0"),
    "seed of a shot": (PLAIN + "    seed: 1.5\n", 5, "seed: must be a whole number from 0"),
    "negative prompt": (PLAIN + "    negative_prompt: 3\n", 5, "negative_prompt: must be text"),
    "share too large": (PLAIN + "preserve_until: 2\n", 5, "preserve_until: must be a number from"),
    "infinite": (PLAIN + "preserve_until: 1e999\n", 5, "preserve_until: must be a number from"),
    "window": (PLAIN + "keys_window: [0.5, 0.1]\n", 5, "keys_window: must be two shares"),
    "window of words": (PLAIN + "keys_window: [a, b]\n", 5, "keys_window: must be a number from"),
    "flow no truth": (PLAIN + "flow: no\n", 5, "flow: must be True or False, got 'no'"),
    "unknown sampler": (PLAIN + "sampler: best\n", 5, "sampler: must be one of ddim, "),
    "sampler a list": (PLAIN + "sampler: [ddim]\n", 5, "sampler: must be one of ddim, "),
    "reference missing": (
        PLAIN + "    reference: none.mp4\n",
        5,
        "reference: must be a file or folder that is there, beside board.yaml, got 'none.mp4'",
    ),
    "reference empty": (PLAIN + '    reference: ""\n', 5, "reference: must be a file or folder"),
    "reference a number": (PLAIN + "    reference: 3\n", 5, "reference: must be a file or folder"),
    "reference no name": (PLAIN + '    reference: "a\\0b"\n', 5, "reference: must be a file or"),
    "reference too long": (PLAIN + f"    reference: {'a' * 5000}\n", 5, "reference: must be a"),
    "reference no clip": (PLAIN + "    reference: notes.txt\n", 5, "reference: "),
    "reference still": (PLAIN + "    reference: still.png\n", 5, "reference: must have at least 2"),
    "unknown method": (
        PLAIN + "    reference: clip.webp\n    method: magic\n",
        6,
        "method: must be one of injection, queries, both, got 'magic'",
    ),
    "method a list": (PLAIN + "    reference: clip.webp\n    method: []\n", 6, "method: must be"),
    "until": (PLAIN + "    reference: clip.webp\n    until: 2\n", 6, "until: must be a number fr"),
    "method alone": (PLAIN + "    method: both\n", 5, "method: must come with reference, got none"),
    "until alone": (PLAIN + "    until: 0.5\n", 5, "until: must come with reference, got none"),
    "scale alone": (PLAIN + "    scale: 0.5\n", 5, "scale: must come with motion, got none"),
    "motion missing": (PLAIN + "    motion: a.safetensors\n", 5, "motion: must be a file or f"),
    "motion no motion": (PLAIN + "    motion: notes.txt\n", 5, "motion: "),
    "masks missing": (PLAIN + "masks: nowhere\n", 5, "masks: must be a file or folder"),
    "masks a file": (PLAIN + "masks: still.png\n", 5, "masks: must be attention, a folder of one"),
    "masks a number": (PLAIN + "masks: 3\n", 5, "masks: must be a file or folder that is there"),
    "masks too few": (PLAIN + "masks: [still.png]\n", 5, "masks: must be one array for each of 2"),
    "masks no picture": (PLAIN + "masks: [still.png, notes.txt]\n", 5, "masks: "),
    "key twice": (PLAIN + "subject: ring\n", 5, "subject: must be said once, got it in line 1 too"),
    "key of a shot twice": (PLAIN + "    prompt: b\n", 5, "prompt: must be said once, got it in"),
    "a mapping as a key": (PLAIN + "{a: b}: c\n", 5, "must have words as keys"),
    "alias": ("subject: &a ring\nshots: *a\n", 2, "must say what it means in full, got the alias"),
    "recursive": ("subject: ring\nshots: &a [*a, *a]\n", 2, "must say what it means in full"),
    "tag": ("subject: !!python/object:os.system ring\n", 1, "must have plain values, got one with"),
    "deep": ("subject: " + "[" * 3000 + "]" * 3000, 1, "must nest at most 8 lists and keys"),
    "two documents": (PLAIN + "---\n" + PLAIN, 5, "must be one document, got a second one"),
    "empty": ("", 1, "must have keys such as subject and shots, got an empty file"),
    "comments alone": ("# nothing\n", 2, "must have keys such as subject and shots, got an empty"),
    "a list": ("- a\n- b\n", 1, "must have keys such as subject and shots, got ['a', 'b']"),
    "no YAML": (PLAIN + "  seed: 3\n", 5, "must be YAML, got what is none: "),
    "not closed": ("subject: ring\nshots: [a\n", 3, "must be YAML, got what is none: "),
    "a tab": ("subject: ring\n\tshots: 3\n", 2, "must be YAML, got what is none: "),
    "a control character": ("subject: ring\nshots: \x07\n", 2, "must be YAML, got the character"),
    "bytes": (b"subject: ring\nshots: \xff\n", 2, "must be text in UTF-8, got other bytes"),
    "a key with a break": (PLAIN + '"a\\nb": 3\n', 5, r"'a\nb': must be a key of a storyboard"),
}


@pytest.mark.parametrize(("text", "line", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_file_line_and_key(read, tmp_path, text, line, message):
    with pytest.raises(InputError) as caught:
        read(text)
    assert str(caught.value).startswith(f"{tmp_path / 'board.yaml'}:{line}: {message}")


def test_a_missing_or_huge_storyboard_is_said(tmp_path):
    with pytest.raises(RequestError, match=r"none.yaml: must be a storyboard that can be read"):
        Storyboard.read(tmp_path / "none.yaml")
    with pytest.raises(RequestError, match=r"must be a storyboard that can be read: Is a dir"):
        Storyboard.read(tmp_path)
    with pytest.raises(RequestError, match="must be a storyboard that can be read"):
        Storyboard.read(Path("a\0b"))
    (tmp_path / "huge.yaml").write_bytes(b"#" * 2**21)
    with pytest.raises(RequestError, match="must be a storyboard of at most 1048576 bytes"):
        Storyboard.read(tmp_path / "huge.yaml")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(max_size=80) | st.text("[]{}:-, \n&*!|>'\"a~", max_size=40))
def test_any_text_is_bad_input_and_no_traceback(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="replace", newline="")
    with pytest.raises(RequestError, match=r"any.yaml:\d+: "):
        Storyboard.read(path)


def test_errors_of_later_work_get_a_line_too(read):
    board = read(PLAIN + "    seed: 4\nsize: 15x16\n")
    path = board.path
    for message, expected in {
        "height: must be a multiple of 2, got 15": "6: size: must be a multiple of 2, got 15",
        "shots: shot 2: seed: must be other": "5: seed: must be other",
        "shots: shot 1: width: must be more": "6: size: must be more",
        "steps: must be fewer": "2: shots: steps: must be fewer",
        "somewhere: something": "2: shots: somewhere: something",
        "shots: shot 2: prompt: the 75 tokens": "4: prompt: the 75 tokens",
        "shots: shot 1: sampler: must go": "2: shots: shot 1: sampler: must go",
    }.items():
        with pytest.raises(ClipError) as caught, board.located("shots"):
            raise ClipError(message)
        assert str(caught.value) == f"{path}:{expected}"
    with pytest.raises(ValueError, match=r"^bug$"), board.located("shots"):
        raise ValueError("bug")


def test_a_fingerprint_is_of_what_is_said_and_of_the_files(read, tmp_path):
    text = PLAIN + "    reference: clip.webp\nmasks: masks\n"
    first = read(text).fingerprint
    assert len(first) == 64
    assert read("# a comment\n" + text.replace("moving left", "moving left  ")).fingerprint == first
    assert read(text.replace("left", "right")).fingerprint != first
    Image.fromarray(np.full((16, 16), 9, np.uint8)).save(tmp_path / "masks" / "shot_2.png")
    changed = read(text).fingerprint
    assert changed != first
    (tmp_path / "masks" / ".DS_Store").write_text("of a file manager")
    assert read(text).fingerprint == changed
    noise(seed=1).write(tmp_path / "clip.webp")
    assert read(text).fingerprint not in (first, changed)


def test_a_fingerprint_is_of_what_is_read_of_a_folder(read, tmp_path):
    noise().write(tmp_path / "frames")
    text = PLAIN + "    reference: frames\n"
    first = read(text).fingerprint
    (tmp_path / "frames" / "out").mkdir()
    (tmp_path / "frames" / "out" / "sheet.png").write_text("made of it")
    (tmp_path / "frames" / "notes.txt").write_text("mine")
    assert read(text).fingerprint == first
    (tmp_path / "frames" / "00003.png").unlink()
    assert read(text).fingerprint != first


def test_what_cannot_be_read_is_bad_input(read, tmp_path, monkeypatch):
    board = read(PLAIN + "masks: masks\n")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as context:
        context.setattr(Path, "iterdir", refuse)
        with pytest.raises(ClipError, match=r"board.yaml:5: masks: .*masks must be a folder that"):
            board.build(peek)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ClipError, match=r"shot_2.png must be a file that can be read: Permission"):
        assert board.fingerprint
