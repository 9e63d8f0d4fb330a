"""The folder of a batch: the clips of a manifest, and a log that says what each of them is.

A run that was stopped, however, is continued: it loses the clips in flight, makes what is missing,
and nothing twice. A line of the log goes to the disk before its clip has its name, so of a file
that is there the last line about it says what it is.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import attrs

from kinetiq.clip import Clip, check_format, check_write, peek
from kinetiq.clip_options import Readers, read_motions, read_region
from kinetiq.errors import InputError, KinetiqError, OutputError, RequestError
from kinetiq.files import make_folder, remove
from kinetiq.generation import Progress, no_progress
from kinetiq.manifest import BadLine, ManifestLine, read_manifest
from kinetiq.named_files import content_digest
from kinetiq.request import Request

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from kinetiq.engine import Engine

_BATCH = "batch"
_LOG_NAME = re.compile(r"batch_log(_\d+of\d+)?\.jsonl")
_KEPT_CLIPS = 16  # references that are in memory whole
_KEPT_STARTS = 256  # first frames of references
_KEPT_MOTIONS = 16


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
                f"batch: --part must be K/N such as 1/4, K from 1 to N, got {words!r}"
            )
        return cls(int(found[1]), int(found[2]))

    @property
    def log_name(self) -> str:
        """The name of its log."""
        return (
            f"batch_log_{self.number}of{self.count}.jsonl" if self.count > 1 else "batch_log.jsonl"
        )


@attrs.frozen
class BatchOptions:
    """How a manifest is made.

    Args:
        part: the lines that are made.
        max_clips: clips in a batch of the network.
        overwrite: replace clips that are not what their line asks for.
    """

    part: Part = Part()
    max_clips: int = 8
    overwrite: bool = False


@attrs.frozen
class _Task:
    """A line that is to be made."""

    line: ManifestLine
    fingerprint: str
    target: Path


def make_batch(
    manifest: Path,
    out: Path,
    load: "Callable[[], AbstractContextManager[Engine]]",
    options: BatchOptions,
    *,
    model: Mapping[str, Any],
    report: Callable[[str], None] = lambda _: None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Make what is missing of a manifest's clips.

    Args:
        manifest: the file; see `kinetiq.manifest`.
        out: the folder of the batch.
        load: loads the model; it is not asked where nothing is to be made.
        options: how.
        model: what says which model `load` loads.
        report: told what is wrong with a line, when it is found.
        progress: told how far the work is.

    Returns:
        "out"; "made", the names of the clips that were made; "kept", how many were there; and
        "failed", of each line that failed "line" and "error".

    Raises:
        InputError: the manifest cannot be read or holds nothing, the folder cannot be written, or
            another run is at work on the same part of it.
        WorkError: the model does not load.
    """
    lines = [
        line
        for place, line in enumerate(read_manifest(manifest))
        if place % options.part.count == options.part.number - 1
    ]
    if not lines:
        raise RequestError(f"{manifest}: must hold a clip for this part of it, got none")
    make_folder(out, _BATCH)
    _require_elsewhere(manifest, out)
    with _open_log(out / options.part.log_name) as log:
        run = _Run(out, log, dict(model), options, report)
        pending = run.sort(lines, _read_logs(out), progress)
        if pending:
            with load() as engine:
                run.make(pending, engine, progress)
        return {"out": str(out), "made": run.made, "kept": run.kept, "failed": run.failed}


class _Run:
    """One run over the lines of a part, and what has come of it so far."""

    def __init__(
        self,
        out: Path,
        log: IO[bytes],
        model: Mapping[str, Any],
        options: BatchOptions,
        report: Callable[[str], None],
    ) -> None:
        self.made: list[str] = []
        self.kept = 0
        self.failed: list[dict[str, Any]] = []
        self._out = out
        self._log = log
        self._model = model
        self._options = options
        self._report = report
        self._digest = functools.cache(content_digest)
        self._readers = Readers(
            functools.lru_cache(_KEPT_STARTS)(peek),
            functools.lru_cache(_KEPT_MOTIONS)(read_motions),
            functools.lru_cache(_KEPT_CLIPS)(read_region),
        )
        self._read = functools.lru_cache(_KEPT_CLIPS)(Clip.read)

    def sort(
        self,
        lines: Sequence[ManifestLine | BadLine],
        known: Mapping[str, str],
        progress: Progress,
    ) -> list[_Task]:
        """Take out what is there and what cannot be made; the rest is to be made.

        All lines are looked at before a model loads, so that mistakes are said at once.
        """
        tasks: list[_Task] = []
        for done, line in enumerate(lines):
            progress("checking", done, len(lines))
            if isinstance(line, BadLine):
                self._fail(line.number, line.error)
                continue
            try:
                line.plan(self._readers)
                task = _Task(line, self._fingerprint(line), self._out / line.out)
                if self._is_made(task, known):
                    self.kept += 1
                else:
                    tasks.append(task)
            except InputError as error:
                self._fail(line.number, error)
        reads = {path.resolve() for task in tasks for path in task.line.asked.named_files}
        return [task for task in tasks if self._may_be_written(task, known, reads)]

    def make(self, tasks: list[_Task], engine: "Engine", progress: Progress) -> None:
        """Generate and write; lines that fail do not keep others from it.

        Clips are written by another thread, beside the next ones' generation.
        """
        drawn: list[_Task] = []
        writing: deque[Future[None]] = deque()
        done = 0

        def requests() -> Iterator[Request]:
            nonlocal done
            for task in tasks:
                try:
                    request = self._request(task, engine)
                except InputError as error:
                    self._fail(task.line.number, error)
                    done += 1
                    continue
                drawn.append(task)
                yield request

        def within(stage: str, steps: int, total: int) -> None:
            progress(f"{done}/{len(tasks)} {stage}", steps, total)

        # In the order in which they are done: one that waited for its turn would be lost in a kill.
        results = engine.generate_as_completed(
            requests(), max_clips=self._options.max_clips, progress=within
        )
        with ThreadPoolExecutor(max_workers=1) as writer:
            for place, result in results:
                task = drawn[place]
                done += 1
                if isinstance(result, KinetiqError):
                    self._fail(task.line.number, task.line.locate(result))
                    continue
                writing.append(writer.submit(self._write, task, result))
                while len(writing) > self._options.max_clips:
                    writing.popleft().result()
            for written in writing:
                written.result()

    def _request(self, task: _Task, engine: "Engine") -> Request:
        asked, defaults = task.line.asked, engine.defaults
        plan = task.line.plan(self._readers)
        with task.line.located():
            check_format(
                task.target, frames=asked.frames or defaults.frames, fps=asked.fps or defaults.fps
            )
            controls = plan.read_controls(defaults, self._read)
        return Request.from_options(asked.prompt, {**plan.options, "control": controls})

    def _write(self, task: _Task, clip: Clip) -> None:
        scale = task.line.asked.scale
        if task.target.exists():  # first of all, or it would pass for what the log says next
            remove(task.target, _BATCH)
        self._append(
            {
                "out": str(task.line.out),
                "line": task.line.number,
                "fingerprint": task.fingerprint,
                "frames": clip.num_frames,
                "height": clip.height * scale,
                "width": clip.width * scale,
                "fps": clip.fps,
                "seed": task.line.asked.seed,
            }
        )
        clip.write(task.target, scale=scale)
        self.made.append(str(task.line.out))

    def _fingerprint(self, line: ManifestLine) -> str:
        """What lines have in common that ask for the same clip, 64 hexadecimal digits."""
        named = [self._digest(path) for path in line.asked.named_files]
        said = json.dumps([dict(line.said), named, dict(self._model)], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()

    def _is_made(self, task: _Task, known: Mapping[str, str]) -> bool:
        return task.target.exists() and known.get(str(task.line.out)) == task.fingerprint

    def _may_be_written(self, task: _Task, known: Mapping[str, str], reads: set[Path]) -> bool:
        """Whether a clip's place is free; if not, its line has failed."""
        target, overwrite = task.target, self._options.overwrite
        try:
            with task.line.located():
                _require_unread(target, reads)
                if target.exists() and not overwrite:
                    holds = "another clip" if str(task.line.out) in known else "none of its clips"
                    raise OutputError(
                        f"out: {target} must be free or hold the clip that this line asks for, and "
                        f"holds {holds}; choose another name, or replace it with --overwrite"
                    )
                make_folder(target.parent, "out")
                if not target.exists():
                    check_write(target)
        except InputError as error:
            self._fail(task.line.number, error)
            return False
        return True

    def _fail(self, number: int, error: KinetiqError) -> None:
        self.failed.append({"line": number, "error": str(error)})
        self._append(self.failed[-1])
        self._report(str(error))

    def _append(self, entry: Mapping[str, Any]) -> None:
        """Bring a line of the log to the disk."""
        at = datetime.now(UTC).isoformat(timespec="microseconds")
        self._log.write(json.dumps({**entry, "at": at}).encode() + b"\n")
        self._log.flush()
        os.fsync(self._log.fileno())


@contextlib.contextmanager
def _open_log(path: Path) -> Iterator[IO[bytes]]:
    """A log to append to, which no other run has open; a line that was cut short is taken off it.

    Raises:
        OutputError: another run has it, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            log = stack.enter_context(path.open("a+b"))
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            log.seek(0)
            log.truncate(log.read().rfind(b"\n") + 1)
        except BlockingIOError as error:
            raise OutputError(
                f"{_BATCH}: {path} must be of one run at a time, and another is at work on it; "
                "wait for it, or share the manifest with --part"
            ) from error
        except OSError as error:
            raise OutputError(f"{_BATCH}: {path} cannot be written ({error.strerror})") from error
        yield log


def _read_logs(out: Path) -> dict[str, str]:
    """Of each clip that some run of any part wrote, the fingerprint of what it last was.

    Raises:
        OutputError: a log cannot be read, or is none.
    """
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(out.iterdir()):
        if not _LOG_NAME.fullmatch(path.name):
            continue
        try:
            *lines, _ = path.read_bytes().split(b"\n")  # what is last is empty, or being written
            for entry in map(json.loads, lines):
                if "error" not in entry:
                    said = entry["at"], entry["fingerprint"]
                    found[entry["out"]] = max(said, found.get(entry["out"], said))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise OutputError(
                f"{_BATCH}: {path} must be a log of this command, and cannot be read as one "
                f"({error}); move it away"
            ) from error
    return {name: fingerprint for name, (_, fingerprint) in found.items()}


def _require_elsewhere(manifest: Path, out: Path) -> None:
    """Raise if the manifest has the name of a log of the batch."""
    if manifest.resolve().parent == out.resolve() and _LOG_NAME.fullmatch(manifest.name):
        raise OutputError(
            f"{_BATCH}: {manifest} must not have the name of this folder's own log; rename it"
        )


def _require_unread(target: Path, reads: Iterable[Path]) -> None:
    """Raise if what is to be written is what is read, or lies in it."""
    resolved = target.resolve()
    for read in reads:
        if read.is_relative_to(resolved) or resolved.parent == read:
            raise OutputError(f"out: {target} must not be a part of {read}, which is read")
