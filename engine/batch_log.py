"""The log of a batch: a JSON line for each clip that was written, and for each line that failed.

A clip's entry has a digest of what was written. It goes to the disk before the clip has its name,
so a file that is there is a clip of the batch if, and only if, some entry of its name has its
digest; in which order entries came, and whether each of them came to its file, is of no concern.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any

import attrs

from kinetiq.errors import OutputError, RequestError

WHERE = "batch"
LOG_NAME = re.compile(r"batch_log(_\d+of\d+)?\.jsonl")
_STARTS = (b'{"out": "', b'{"line": ')  # of each line of a log


@attrs.frozen
class Part:
    """Which lines a run makes: `number`, `number + count`, and so on, so that several can share.

    Args:
        number: of this part, counted from 1.
        count: of all parts.
    """

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, words: str) -> "Part":
        """The part that K/N says.

        Raises:
            RequestError: it is none.
        """
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", words)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise RequestError(
                f"{WHERE}: --part must be K/N such as 1/4, K from 1 to N, got {words!r}"
            )
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        """Words for names of files; empty where there is one part."""
        return f"_{self.number}of{self.count}" if self.count > 1 else ""


class BatchLog:
    """A log that a run has open; several threads may write to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def add_clip(self, entry: Mapping[str, Any]) -> None:
        """Bring a clip's entry to the disk."""
        self._add(entry)
        os.fsync(self._file.fileno())

    def add_failure(self, line: int, error: str) -> None:
        """Write what went wrong with a line of the manifest."""
        self._add({"line": line, "error": error})

    def _add(self, entry: Mapping[str, Any]) -> None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._file.write(json.dumps({**entry, "at": at}).encode() + b"\n")
        self._file.flush()


@contextlib.contextmanager
def open_log(folder: Path, part: Part) -> Iterator[BatchLog]:
    """The log of a part, which no other run has open; a line that was cut short is taken off it.

    Raises:
        OutputError: another run has it, it is no log, or it cannot be written.
    """
    path = folder / f"batch_log{part}.jsonl"
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("a+b"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.seek(0)
            data = file.read()
            _parse(path, data)
            file.truncate(data.rfind(b"\n") + 1)
        except BlockingIOError as error:
            raise OutputError(
                f"{WHERE}: {path} must be of one run at a time, and another is at work on it; "
                "wait for it, or share the manifest with --part"
            ) from error
        except OSError as error:
            raise OutputError(f"{WHERE}: {path} cannot be written ({error.strerror})") from error
        yield BatchLog(file)


def read_logs(folder: Path) -> dict[PurePosixPath, dict[str, set[str]]]:
    """Of each name that any run of any part wrote to, by content: the fingerprints it was made for.

    Raises:
        OutputError: a log cannot be read, or is none.
    """
    found: dict[PurePosixPath, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in sorted(folder.iterdir()):
        if not LOG_NAME.fullmatch(path.name):
            continue
        try:
            data = path.read_bytes()
        except OSError as error:
            raise OutputError(f"{WHERE}: {path} cannot be read ({error.strerror})") from error
        for entry in _parse(path, data):
            if "error" not in entry:
                found[PurePosixPath(entry["out"])][entry["content"]].add(entry["fingerprint"])
    return found


def _parse(path: Path, data: bytes) -> list[dict[str, Any]]:
    """The entries of a log, but for a last line that is without its end.

    Raises:
        OutputError: it is none.
    """
    *lines, last = data.split(b"\n")
    try:
        entries = [json.loads(line) for line in lines]
    except ValueError:
        entries = [None]
    cut_short = any(last.startswith(start) or start.startswith(last) for start in _STARTS)
    if not cut_short or not all(map(_is_entry, entries)):
        raise OutputError(
            f"{WHERE}: {path} must be a log of this command, and is none; move it away"
        )
    return entries


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and any(
        {"line", *keys} <= entry.keys() and all(isinstance(entry[key], str) for key in keys)
        for keys in (("error",), ("out", "content", "fingerprint"))
    )


def digest_clip(path: Path) -> str:
    """SHA-256 of a clip's file, or of a folder's files with their names; of nothing else "".

    Raises:
        OSError: it cannot be read.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir() or path.is_symlink():
        return ""
    parts = [f"{each.name} {digest_clip(each)}" for each in sorted(path.iterdir())]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
