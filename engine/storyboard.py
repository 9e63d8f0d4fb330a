"""Storyboards: a YAML file that says the shots of one subject.

    subject: ring
    seed: 7
    shots:
      - prompt: a ring moving left on a dark blue background
      - prompt: a ring on a dark red background
        reference: zigzag.mp4
      - prompt: a ring on a dark green background
        motion: dance.safetensors
        scale: 0.8

Beside `subject` and `shots`, the keys of the file are the options of `ConsistentShots`, with `size`
(HEIGHTxWIDTH) for its height and width. Files that it names are looked for beside it. Whatever is
wrong is said with the file, the line and the key. Plain values are read as YAML 1.2 has it, so that
`no` is a word and `010` is ten.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import attrs
import numpy as np
import yaml

from kinetiq.clip import Clip, peek
from kinetiq.errors import InputError, RequestError
from kinetiq.motion_embedding import MotionEmbedding
from kinetiq.motion_file import read_info
from kinetiq.motion_injection import MotionInjection
from kinetiq.motion_lora import MotionLora
from kinetiq.named_files import content_digest, is_there, list_inside
from kinetiq.query_injection import QueryInjection
from kinetiq.sampler import resolve_sampler
from kinetiq.shots import ConsistentShots, Shot

if TYPE_CHECKING:
    from kinetiq.controls import Control

METHODS = {  # of a shot with a reference; the first by default
    "injection": (MotionInjection,),
    "queries": (QueryInjection,),
    "both": (QueryInjection, MotionInjection),
}
ATTENTION = "attention"  # where masks come from unless they are given
_SHOT_OPTIONS = ("seed", "negative_prompt")
_NEEDS = {"method": "reference", "until": "reference", "scale": "motion"}
_OF_ALL = ("size", "frames")  # a shot may say them too, and all must agree
_SHOT_KEYS = ("prompt", *_SHOT_OPTIONS, "reference", "motion", *_NEEDS, *_OF_ALL)
_OPTIONS = tuple(
    field.name
    for field in attrs.fields(ConsistentShots)
    if field.name not in ("subject", "shots", "masks", "height", "width")
)
_BOARD_KEYS = ("subject", "shots", "size", "masks", *_OPTIONS)
_SAID_AS = {"height": "size", "width": "size"}  # what messages call it, and the file

_MOST_BYTES = 2**20  # a person wrote it
_DEEPEST = 8  # lists and mappings within each other
_LONGEST_SHOWN = 60
_NULL = re.compile("~|null|Null|NULL|")
_TRUTH = re.compile("true|True|TRUE|false|False|FALSE")
_WHOLE = re.compile("[-+]?[0-9]{1,30}")
_DECIMAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SIZE = re.compile("([0-9]{1,6})[xX]([0-9]{1,6})")
# How `ConsistentShots` and the engine begin what they say of an option.
_OF_PROMPT = re.compile(r"shots: the (prompt) of shot (\d+) (must .*)", re.DOTALL)
_OF_SHOT = re.compile(r"shots: shot (\d+): (\w+): (.*)", re.DOTALL)
_OF_OPTION = re.compile(r"(\w+): (.*)", re.DOTALL)


@attrs.frozen
class Entry:
    """A value, and the line that it or its key is on.

    Args:
        value: text, a number, a truth value or None; a list of entries; or entries by key.
        line: counted from 1.
    """

    value: Any
    line: int

    @property
    def plain(self) -> Any:
        """The value with everything in it, without lines."""
        if isinstance(self.value, list):
            return [entry.plain for entry in self.value]
        if isinstance(self.value, dict):
            return {key: entry.plain for key, entry in self.value.items()}
        return self.value

    @property
    def shown(self) -> str:
        """The value in a message."""
        words = repr(self.plain)
        return words if len(words) <= _LONGEST_SHOWN else words[: _LONGEST_SHOWN - 3] + "..."


_Entries = Mapping[str, Entry]


@attrs.frozen(eq=False)
class Storyboard:
    """A storyboard that was read: all that it says has a meaning, and what it names is there.

    Args:
        path: the file.
        entries: what it says.
    """

    path: Path
    entries: _Entries

    @classmethod
    def read(cls, path: Path) -> "Storyboard":
        """Read a storyboard, and the beginnings of the clips that it names.

        Raises:
            InputError: the file, or one that it names, is missing or damaged, or it asks for what
                has no meaning: FILE:LINE: KEY: what must be, what came.
        """
        board = cls(path, _read_entries(path))
        board.build(peek)
        return board

    def build(self, read: Callable[[Path], Clip], *, seed: int | None = None) -> ConsistentShots:
        """What is asked for.

        Args:
            read: reads a reference.
            seed: in place of the storyboard's.

        Raises:
            InputError: see `read`.
        """
        self._require_keys(self.entries, _BOARD_KEYS, "a storyboard", 1)
        listed = self._list_shots()
        options = {key: self.entries[key].plain for key in _OPTIONS if key in self.entries}
        options |= self._agreed(listed)
        if seed is not None:
            options["seed"] = seed
        if "sampler" in options:
            with self.located("sampler"):
                resolve_sampler(options["sampler"])
        if "masks" in self.entries:
            options["masks"] = self._read_masks(self.entries["masks"])
        shots = [self._build_shot(shot, read) for shot in listed]
        with self.located("shots"):
            return ConsistentShots(self.entries["subject"].plain, tuple(shots), **options)

    @property
    def fingerprint(self) -> str:
        """What storyboards have in common that ask for the same, 64 hexadecimal digits.

        It is of all that the file says, however it is laid out, and of the contents of all files
        that it names.
        """
        said = json.dumps(Entry(dict(self.entries), 1).plain, sort_keys=True)
        parts = [said, *map(content_digest, self._read_files())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @contextlib.contextmanager
    def located(self, key: str, said: _Entries | None = None) -> Iterator[None]:
        """Within the block, errors of what was given get the file, a line and a key.

        They are those that the message begins with; else those of `key`.

        Args:
            key: what the block is about.
            said: the shot that it is about; None: the storyboard.
        """
        try:
            yield
        except InputError as error:
            located = self._locate(str(error), said or self.entries, key)
            raise type(error)(located) from error

    def _locate(self, message: str, said: _Entries, default: str) -> str:
        key, rest, places = default, message, [said, self.entries]
        if found := _OF_PROMPT.fullmatch(message):
            key, rest = found[1], found[3]
            places = [self._shot(int(found[2]))]
        elif found := _OF_SHOT.fullmatch(message):
            key, rest = found[2], found[3]
            places = [self._shot(int(found[1])), self.entries]
        elif found := _OF_OPTION.fullmatch(message):
            key, rest = found[1], found[2]
        key = _SAID_AS.get(key, key)
        for place in places:
            if key in place:
                return self._say(place[key].line, key, rest)
        line = next((place[default].line for place in places if default in place), 1)
        return self._say(line, default, message.removeprefix(f"{default}: "))

    def _shot(self, number: int) -> _Entries:
        shot: _Entries = self.entries["shots"].value[number - 1].value
        return shot

    def _say(self, line: int, key: str, message: str) -> str:
        return f"{self.path}:{line}: {key if key.isprintable() else repr(key)}: {message}"

    def _fail(self, line: int, key: str, message: str) -> NoReturn:
        raise RequestError(self._say(line, key, message))

    def _require_keys(
        self, said: _Entries, known: Sequence[str], what: str, line: int, needed: int = 2
    ) -> None:
        """Raise unless all keys are known and have values, and the first `needed` are there."""
        for key, entry in said.items():
            if key not in known:
                self._fail(
                    entry.line,
                    key,
                    f"must be a key of {what}, got an unknown one; keys are {', '.join(known)}",
                )
            if entry.value is None:
                self._fail(entry.line, key, "must have a value, got none")
        for key in known[:needed]:
            if key not in said:
                self._fail(line, key, f"must be a key of {what}, got none")

    def _list_shots(self) -> list[_Entries]:
        entry = self.entries["shots"]
        if not isinstance(entry.value, list):
            self._fail(entry.line, "shots", f"must be a list of shots, got {entry.shown}")
        for shot in entry.value:
            if not isinstance(shot.value, dict):
                self._fail(
                    shot.line, "shots", f"must each have keys such as prompt, got {shot.shown}"
                )
            self._require_keys(shot.value, _SHOT_KEYS, "each shot", shot.line, needed=1)
        return [shot.value for shot in entry.value]

    def _agreed(self, listed: Sequence[_Entries]) -> dict[str, Any]:
        """Size and frames, which the storyboard or shots say, and all that say them alike."""
        options: dict[str, Any] = {}
        for key in _OF_ALL:
            said = [place[key] for place in (self.entries, *listed) if key in place]
            for entry in said:
                if entry.plain != said[0].plain:
                    self._fail(
                        entry.line,
                        key,
                        f"must be {said[0].shown} as in line {said[0].line}, since all shots are "
                        f"rows of one batch, got {entry.shown}",
                    )
            if said and key == "frames":
                options["frames"] = said[0].plain
            elif said:
                options["height"], options["width"] = self._parse_size(said[0])
        return options

    def _parse_size(self, entry: Entry) -> tuple[int, int]:
        found = _SIZE.fullmatch(entry.value) if isinstance(entry.value, str) else None
        if found is None:
            self._fail(
                entry.line, "size", f"must be HEIGHTxWIDTH such as 320x512, got {entry.shown}"
            )
        return int(found[1]), int(found[2])

    def _build_shot(self, said: _Entries, read: Callable[[Path], Clip]) -> Shot:
        for key, owner in _NEEDS.items():
            if key in said and owner not in said:
                self._fail(said[key].line, key, f"must come with {owner}, got none")
        controls: list[Control] = []
        if "reference" in said:
            controls += self._injections(said, read)
        if "motion" in said:
            path = self._file(said["motion"], "motion")
            with self.located("motion", said):
                kind = MotionLora if read_info(path).kind == "lora" else MotionEmbedding
                switches = {"scale": said["scale"].plain} if "scale" in said else {}
                controls.append(kind.read(path, **switches))
        options = {key: said[key].plain for key in _SHOT_OPTIONS if key in said}
        return Shot(said["prompt"].plain, tuple(controls), **options)

    def _injections(self, said: _Entries, read: Callable[[Path], Clip]) -> "list[Control]":
        method = said["method"].plain if "method" in said else next(iter(METHODS))
        if not isinstance(method, str) or method not in METHODS:
            entry = said["method"]
            self._fail(
                entry.line, "method", f"must be one of {', '.join(METHODS)}, got {entry.shown}"
            )
        path = self._file(said["reference"], "reference")
        switches = {"until": said["until"].plain} if "until" in said else {}
        with self.located("reference", said):
            clip = read(path)
            return [kind(clip, **switches) for kind in METHODS[method]]

    def _read_masks(self, entry: Entry) -> str | list[np.ndarray]:
        if entry.value == ATTENTION:
            return ATTENTION
        if isinstance(entry.value, list):
            paths = [self._file(each, "masks") for each in entry.value]
        else:
            folder = self._file(entry, "masks")
            if not folder.is_dir():
                self._fail(
                    entry.line,
                    "masks",
                    f"must be {ATTENTION}, a folder of one mask a shot, or a list of them, got "
                    f"{entry.shown}",
                )
            with self.located("masks"):
                paths = list_inside(folder)
        with self.located("masks"):
            return [read_mask(path) for path in paths]

    def _file(self, entry: Entry, key: str) -> Path:
        """A file or a folder that is named and is there."""
        path = self.path.parent / entry.value if isinstance(entry.value, str) else None
        if not entry.value or path is None or not is_there(path):
            self._fail(
                entry.line,
                key,
                f"must be a file or folder that is there, beside {self.path.name}, got "
                f"{entry.shown}",
            )
        return path

    @property
    def named_files(self) -> list[Path]:
        """All files and folders that are named, in the order of the file, the masks last."""
        return [*self._clips_and_motions(), *self._named_masks()]

    def _read_files(self) -> list[Path]:
        """The same with the masks in a folder in its place."""
        masks = self._named_masks()
        if "masks" in self.entries and not isinstance(self.entries["masks"].value, list):
            masks = [mask for folder in masks for mask in list_inside(folder)]
        return [*self._clips_and_motions(), *masks]

    def _clips_and_motions(self) -> list[Path]:
        named = [
            shot.value[key]
            for shot in self.entries["shots"].value
            for key in ("reference", "motion")
            if key in shot.value
        ]
        return [self.path.parent / entry.plain for entry in named]

    def _named_masks(self) -> list[Path]:
        entry = self.entries.get("masks")
        if entry is None or entry.value == ATTENTION:
            return []
        listed = entry.value if isinstance(entry.value, list) else [entry]
        return [self.path.parent / each.plain for each in listed]


def read_mask(path: Path) -> np.ndarray:
    """How bright a picture or a clip is, 0 to 1: [height, width], or [frames, height, width].

    Raises:
        ClipError: it cannot be read.
    """
    grey: np.ndarray = Clip.read(path).frames.astype(np.float32).mean(axis=-1) / 255.0
    return grey[0] if len(grey) == 1 else grey


def _read_entries(path: Path) -> _Entries:
    """What a file says, a mapping.

    Raises:
        RequestError: it is missing, too large, no text, no YAML, or says a key twice.
    """
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise RequestError(
                f"{path}: must be a storyboard of at most {_MOST_BYTES} bytes, got {size}"
            )
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RequestError(f"{path}: must be a storyboard that can be read: {reason}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{path}:{line}: must be text in UTF-8, got other bytes") from error
    try:
        return _Reader(path, text).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RequestError(
            f"{path}:{mark.line + 1}: must be YAML, got what is none: {error.problem}"
        ) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RequestError(
            f"{path}:{line}: must be YAML, got the character {chr(error.character)!r}"
        ) from error


class _Reader:
    """Entries of the events of a YAML text."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._events = iter(yaml.parse(text, Loader=yaml.SafeLoader))

    def document(self) -> _Entries:
        """The one mapping that the text is."""
        next(self._events)  # the stream starts
        event = next(self._events)
        if isinstance(event, yaml.StreamEndEvent):
            self._fail(event, "must have keys such as subject and shots, got an empty file")
        entry = self._entry(next(self._events), 1)
        if not isinstance(entry.value, dict):
            self._fail(event, f"must have keys such as subject and shots, got {entry.shown}")
        next(self._events)  # the document ends
        event = next(self._events)
        if not isinstance(event, yaml.StreamEndEvent):
            self._fail(event, "must be one document, got a second one")
        return entry.value

    def _entry(self, event: Any, depth: int) -> Entry:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            self._fail(event, f"must say what it means in full, got the alias *{event.anchor}")
        if event.tag is not None:
            self._fail(event, f"must have plain values, got one with the tag {event.tag}")
        if depth > _DEEPEST:
            self._fail(event, f"must nest at most {_DEEPEST} lists and keys, got more")
        if isinstance(event, yaml.ScalarEvent):
            return Entry(_scalar(event.value) if event.implicit[0] else event.value, line)
        if isinstance(event, yaml.SequenceStartEvent):
            return Entry([self._entry(item, depth + 1) for item in self._until_end()], line)
        return Entry(self._mapping(depth), line)

    def _mapping(self, depth: int) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for event in self._until_end():
            line = event.start_mark.line + 1
            if not isinstance(event, yaml.ScalarEvent):
                self._fail(event, "must have words as keys, got a list or a mapping")
            key = event.value
            if key in found:
                raise RequestError(
                    f"{self._path}:{line}: {key}: must be said once, got it in line "
                    f"{found[key].line} too"
                )
            value = self._entry(next(self._events), depth + 1)
            found[key] = Entry(value.value, line)
        return found

    def _until_end(self) -> Iterator[Any]:
        for event in self._events:
            if isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
                return
            yield event

    def _fail(self, event: Any, message: str) -> NoReturn:
        raise RequestError(f"{self._path}:{event.start_mark.line + 1}: {message}")


def _scalar(text: str) -> Any:
    """What a plain scalar means in the core schema of YAML 1.2 (section 10.3.2)."""
    if _NULL.fullmatch(text):
        return None
    if _TRUTH.fullmatch(text):
        return text.lower() == "true"
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _DECIMAL.fullmatch(text) else text
