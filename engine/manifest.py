"""Manifests: a file of JSON lines, each of which says one clip of many.

    {"prompt": "a red circle on a dark blue background", "reference": "zigzag.mp4", "seed": 7}
    {"prompt": "a blue ring", "motion": ["dance.safetensors", "-0.5*zoom.safetensors"]}
    {"prompt": "a gold star", "direction": "left", "out": "stars/left.webm"}

Keys are the options of `kinetiq generate` that are of the clip, without their dashes, and `out`.
Files that are named are looked for beside the manifest. Whatever is wrong with a line is said with
the file and the line, and is of that line alone.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, NoReturn, TypeVar

import attrs
import click

from kinetiq.batch_log import LOG_NAME
from kinetiq.clip import write_suffix
from kinetiq.clip_options import ClipOptions
from kinetiq.errors import InputError, KinetiqError, RequestError
from kinetiq.options import clip_options

_MOST_BYTES = 2**20  # of a line
_LONGEST_SHOWN = 60

_Error = TypeVar("_Error", bound=KinetiqError)


@attrs.frozen
class ManifestLine:
    """A line that was read; what it asks for has a form, which need not have a meaning.

    Args:
        path: the manifest.
        number: counted from 1, empty lines too.
        asked: the options of the clip.
        out: where the clip goes, from the folder of the batch.
    """

    path: Path
    number: int
    asked: ClipOptions
    out: PurePosixPath

    @contextmanager
    def located(self) -> Iterator[None]:
        """Within the block, errors of what was given get the manifest and the line."""
        try:
            yield
        except InputError as error:
            raise self.locate(error) from error

    def locate(self, error: _Error) -> _Error:
        """The same error with the manifest and the line before it."""
        return _located(error, self.path, self.number)


@attrs.frozen
class BadLine:
    """A line that could not be read.

    Args:
        number: counted from 1.
        error: what is wrong with it.
    """

    number: int
    error: InputError


def read_manifest(path: Path) -> Iterator[ManifestLine | BadLine]:
    """Yield each line that is not empty, or what is wrong with it.

    Raises:
        RequestError: the file cannot be read.
    """
    taken: dict[PurePosixPath, int] = {}  # names of clips, and of the folders that they are in
    folders: dict[PurePosixPath, int] = {}
    try:
        with path.open("rb") as file:
            for number, data in enumerate(_lines(file), 1):
                if not data.strip():
                    continue
                try:
                    if len(data) > _MOST_BYTES:
                        _fail(f"must be a line of at most {_MOST_BYTES} bytes, got more")
                    line = _read_line(path, number, data)
                    _take(line, taken, folders)
                except InputError as error:
                    yield BadLine(number, _located(error, path, number))
                else:
                    yield line
    except OSError as error:
        raise RequestError(
            f"{path}: must be a manifest that can be read: {error.strerror}"
        ) from error


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, but for what they have beyond one byte too many."""
    while data := file.readline(_MOST_BYTES + 1):
        yield data
        while len(data) > _MOST_BYTES and not data.endswith(b"\n"):
            data = file.readline(_MOST_BYTES + 1)


def _located(error: _Error, path: Path, number: int) -> _Error:
    return type(error)(f"{path}:{number}: {str(error).removeprefix('generate: ')}")


def _take(
    line: ManifestLine, taken: dict[PurePosixPath, int], folders: dict[PurePosixPath, int]
) -> None:
    """Raise if another line has the name of this clip, or one of them would lie in the other."""
    above = [parent for parent in line.out.parents if parent.name]
    for path, among in ((line.out, taken), (line.out, folders), *((each, taken) for each in above)):
        if path in among:
            _fail(f"out: must be a name of its own, got {str(path)!r} in line {among[path]} too")
    taken[line.out] = line.number
    folders.update((parent, line.number) for parent in above)


def read_object(data: bytes, encoding: str = "utf-8") -> dict[str, Any]:
    """A JSON object of finite numbers, each of whose keys comes once.

    Raises:
        RequestError: it is none.
    """
    try:
        said = json.loads(
            data.decode(encoding), object_pairs_hook=_require_once, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError as error:
        raise RequestError("must be text in UTF-8, got other bytes") from error
    except RecursionError as error:
        raise RequestError("must hold plain values, got ones far within others") from error
    except ValueError as error:  # no JSON, or a number of thousands of digits
        raise RequestError(f"must be a JSON object, got what is none: {error}") from error
    if not isinstance(said, dict):
        _fail(f'must be a JSON object such as {{"prompt": "a ring"}}, got {_shown(said)}')
    return said


def parse_clip(said: Mapping[str, Any], folder: Path, own: str) -> ClipOptions:
    """The options of a clip that the keys of an object say.

    Args:
        said: the keys and their values.
        folder: what relative paths start from.
        own: a key that there may be beside them and was taken out, for messages.

    Raises:
        RequestError: a key or a value is none.
    """
    try:
        options = _options.main(_words(said, own), standalone_mode=False)
    except click.UsageError as error:
        raise RequestError(error.format_message()) from error
    return ClipOptions(folder=folder, **options)


def _read_line(path: Path, number: int, data: bytes) -> ManifestLine:
    said = read_object(data, "utf-8-sig" if number == 1 else "utf-8")
    out = _parse_out(said.pop("out", f"clip_{number:06d}.mp4"))
    folder = path.parent if path.is_file() else Path()  # a pipe lies beside nothing
    return ManifestLine(path, number, parse_clip(said, folder, "out"), out)


@click.command(add_help_option=False)
@clip_options
def _options(**said: Any) -> dict[str, Any]:
    """Options as the command line reads them."""
    return said


_PARAMETERS = {
    option.removeprefix("--").replace("-", "_"): parameter
    for parameter in _options.params
    if isinstance(parameter, click.Option)
    for option in parameter.opts
}


def _words(said: Mapping[str, Any], own: str) -> list[str]:
    """An object's keys and values as the words of a command."""
    words = []
    for key, value in said.items():
        if value is None:  # as tables write what is not there
            continue
        parameter = _PARAMETERS.get(key)
        if parameter is None:
            known = [own, *_PARAMETERS]
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            _fail(f"keys must be among {', '.join(known)}, got {_shown(key)}{hint}")
        option = parameter.opts[0]
        if parameter.is_flag:
            if not isinstance(value, bool):
                _fail(f"{key}: must be true or false, got {_shown(value)}")
            words += [option] * value
            continue
        values: Sequence[Any] = value if parameter.multiple and isinstance(value, list) else [value]
        for each in values:
            if isinstance(each, bool) or not isinstance(each, str | int | float):
                form = "text, or a list of texts" if parameter.multiple else "text or a number"
                _fail(f"{key}: must be {form}, got {_shown(each)}")
            if isinstance(each, str) and not _is_text(each):
                _fail(f"{key}: must be text without other characters, got {_shown(each)}")
            whole = isinstance(each, float) and each.is_integer()  # as tables write numbers
            words.append(f"{option}={int(each) if whole else each}")
    return words


def _is_text(words: str) -> bool:
    """Whether a file could have such a name: no NUL, and no half of a character."""
    return "\0" not in words and not any("\ud800" <= letter <= "\udfff" for letter in words)


def _parse_out(value: object) -> PurePosixPath:
    """A path below the batch's folder.

    Raises:
        RequestError: it is none, or leads out of the folder.
        OutputError: no clip is written under such a suffix.
    """
    if not isinstance(value, str) or not value or not value.isprintable():
        _fail(f"out: must be the name of a clip's file, got {_shown(value)}")
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or not path.name:
        _fail(f"out: must be a path inside the folder of the batch, got {_shown(value)}")
    if LOG_NAME.fullmatch(path.parts[0]) or any(
        part.casefold().startswith(".kinetiq-") for part in path.parts
    ):
        _fail(f"out: must not be a name that this command uses itself, got {_shown(value)}")
    write_suffix(Path(path))
    return path


def _require_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        name = key.replace("-", "_")
        if name in found:
            _fail(f"{_shown(key)} must be said once, got it twice")
        found[name] = value
    return found


def _refuse_constant(name: str) -> NoReturn:
    _fail(f"must hold finite numbers, got {name}")


def _shown(value: object) -> str:
    words = json.dumps(value)
    return words if len(words) <= _LONGEST_SHOWN else words[: _LONGEST_SHOWN - 3] + "..."


def _fail(message: str) -> NoReturn:
    raise RequestError(message)
