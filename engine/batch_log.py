"""The log of a batch: a JSON line for each clip that was written, and for each line that failed.

The first line says that it is one, so no other file is taken for a log. A clip's entry has a digest
of what was written. It goes to the disk before the clip has its name, so a file that is there is a
clip of the batch if, and only if, some entry of its name has its digest; in which order entries
came, and whether each of them came to its file, is of no concern.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any

import attrs

from kinetiq.errors import OutputError, RequestError, WorkError

WHERE = "batch"
LOG_NAME = re.compile(r"batch_log(?:_\d+of(\d+))?\.jsonl", re.IGNORECASE)
_FIRST_LINE = b'{"log": "kinetiq batch", "version": 1}\n'


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
        """For `open_log`, with a file that has no buffer: what was said is with the system."""
        self._file = file
        self._broken = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Say what the file is.

        Raises:
            WorkError: it cannot be written, such as on a disk that is full.
        """
        self._write(_FIRST_LINE)

    def add_clip(self, entry: Mapping[str, Any]) -> None:
        """Bring a clip's entry to the disk.

        Raises:
            WorkError: as `start`.
        """
        self._add(entry)
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _unwritable(error.strerror) from error

    def add_failure(self, line: int, error: str) -> None:
        """Write what went wrong with a line of the manifest.

        Raises:
            WorkError: as `start`.
        """
        self._add({"line": line, "error": error})

    def _add(self, entry: Mapping[str, Any]) -> None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._write(json.dumps({**entry, "at": at}).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        with self._lock:  # else a line may come behind half a line, which the next run refuses
            if self._broken:
                raise _unwritable("an entry before was not")
            self._broken = True
            try:
                written = self._file.write(line)
            except OSError as error:
                raise _unwritable(error.strerror) from error
            if written != len(line):
                raise _unwritable(os.strerror(errno.ENOSPC))
            self._broken = False


@contextlib.contextmanager
def open_log(folder: Path, part: Part) -> Iterator[BatchLog]:
    """The log of a part, which no other run has open; a line that was cut short is taken off it.

    Raises:
        OutputError: another run has it, or shares the lines in another way; it is no log, or cannot
            be written.
        WorkError: the disk is full.
    """
    path = folder / f"batch_log{part}.jsonl"
    with contextlib.ExitStack() as stack:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            file = stack.enter_context(os.fdopen(_open(path, flags), "a+b", buffering=0))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.seek(0)
            data = file.read()
            _parse(path, data)
            whole = data.rfind(b"\n") + 1
            if whole != len(data):
                file.truncate(whole)
        except BlockingIOError as error:
            raise OutputError(
                f"{WHERE}: {path} must be of one run at a time, and another is at work on it; "
                "wait for it, or share the manifest with --part"
            ) from error
        except OSError as error:
            raise OutputError(f"{WHERE}: {path} cannot be written ({error.strerror})") from error
        _require_alike(folder, part)
        log = BatchLog(file)
        if not whole:
            log.start()
        yield log


def read_logs(folder: Path) -> dict[PurePosixPath, dict[str, set[str]]]:
    """Of each name that any run of any part wrote to, by content: the fingerprints it was made for.

    Raises:
        OutputError: a log cannot be read, or is none.
    """
    found: dict[PurePosixPath, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in find_logs(folder):
        try:
            with os.fdopen(_open(path, os.O_RDONLY), "rb") as file:
                data = file.read()
        except OSError as error:
            raise OutputError(f"{WHERE}: {path} cannot be read ({error.strerror})") from error
        for entry in _parse(path, data):
            if "error" not in entry:
                found[PurePosixPath(entry["out"])][entry["content"]].add(entry["fingerprint"])
    return found


def find_logs(folder: Path) -> list[Path]:
    """What has the name of a log in a folder.

    Raises:
        OutputError: the folder cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if LOG_NAME.fullmatch(path.name))
    except OSError as error:
        raise OutputError(f"{WHERE}: {folder} cannot be read ({error.strerror})") from error


def _open(path: Path, flags: int) -> int:
    """Open a file that is no link, no pipe and no folder, and wait for nobody.

    Raises:
        OSError: it is one, or cannot be opened.
    """
    try:
        found = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(error.errno, "it must be a file of its own, and is a link") from error
        raise
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise OSError(errno.EINVAL, "it must be a file, and is something else")
    return found


def _require_alike(folder: Path, part: Part) -> None:
    """Raise if a run is at work that shares the lines among another number of parts.

    Raises:
        OutputError: one is, or a log cannot be read.
    """
    for path in find_logs(folder):
        name = LOG_NAME.fullmatch(path.name)
        if name is None or int(name[1] or 1) == part.count:
            continue
        try:
            with os.fdopen(_open(path, os.O_RDONLY), "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"{WHERE}: runs at the same time must share the lines among the same number of "
                f"parts, and one is at work on {path.name}; wait for it"
            ) from error
        except OSError as error:
            raise OutputError(f"{WHERE}: {path} cannot be read ({error.strerror})") from error


def _parse(path: Path, data: bytes) -> list[dict[str, Any]]:
    """The entries of a log, but for a last line that is without its end.

    Raises:
        OutputError: it is none.
    """
    first, *lines = data.rstrip(b"\0").splitlines(keepends=True) or [b""]
    if first not in (_FIRST_LINE, b""):
        raise OutputError(
            f"{WHERE}: {path} must be a log of this command, and is none; move it away"
        )
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    entries = []
    for number, line in enumerate(lines, 2):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not _is_entry(entry):
            raise OutputError(
                f"{WHERE}: {path} must hold a clip or an error in each line, and line {number} is "
                "neither; take it out"
            )
        entries.append(entry)
    return entries


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and any(
        {"line", *keys} <= entry.keys() and all(isinstance(entry[key], str) for key in keys)
        for keys in (("error",), ("out", "content", "fingerprint"))
    )


def _unwritable(reason: object) -> WorkError:
    return WorkError(
        f"{WHERE}: the log cannot be written ({reason}); make room, and start it again"
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
