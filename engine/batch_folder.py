"""The folder of a batch: the clips of a manifest, and a log that says what each of them is.

A run that was stopped, however, is continued: it loses the clips in flight, makes what is missing,
and nothing twice. A clip is encoded in a folder of the run's own, and moved to its name when it is
whole and its entry is in the log; see `kinetiq.batch_log` and `kinetiq.batch_staging`. What is not
a clip of the batch is never replaced.
"""

import errno
import functools
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import attrs

from kinetiq.batch_log import (
    WHERE,
    BatchLog,
    Part,
    digest_clip,
    find_logs,
    open_log,
    read_logs,
)
from kinetiq.batch_staging import Staging, open_staging
from kinetiq.checkpoint import find_local_model, resolve_dtype
from kinetiq.clip import Clip, check_format, peek
from kinetiq.clip_options import Readers, parse_motion, read_motions, read_region
from kinetiq.errors import ClipError, InputError, KinetiqError, OutputError, RequestError, WorkError
from kinetiq.files import as_target, make_folder
from kinetiq.generation import Progress, no_progress
from kinetiq.manifest import BadLine, ManifestLine, read_manifest
from kinetiq.model_files import ModelFiles
from kinetiq.named_files import content_digest, is_there, list_inside, stamp_file
from kinetiq.request import Request

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from kinetiq.engine import Engine

_KEPT_CLIPS = 16  # references that are in memory whole, at the size of clips
_KEPT_STARTS = 16  # first frames of references, at their own size
_KEPT_REGIONS = 4
_KEPT_MOTIONS = 16
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # no other clip could be written


@attrs.frozen
class BatchOptions:
    """How a manifest is made.

    Args:
        part: the lines that are made.
        max_clips: clips in a batch of the network.
        overwrite: replace clips of the batch that are not what their line asks for.
    """

    part: Part = attrs.field(factory=Part)
    max_clips: int = 8
    overwrite: bool = False


@attrs.frozen
class BatchModel:
    """What tells a model from others, so that their clips are not taken for its own.

    Args:
        said: the contents of its folders, or else its ids, and the type of its numbers.
        files: what is read of it; none where it comes from a hub.
    """

    said: Mapping[str, Any]
    files: tuple[ModelFiles, ...] = ()

    @classmethod
    def describe(cls, model: str, motion_adapter: str | None, dtype: str | None) -> "BatchModel":
        """The model of such options, as `kinetiq.checkpoint.load_checkpoint` takes them.

        Raises:
            CheckpointError: a folder is not of a model.
            RequestError: an option has no meaning.
        """
        found = find_local_model(model, motion_adapter)
        said: dict[str, Any] = {"dtype": str(resolve_dtype(dtype))}
        if found is None:
            return cls({**said, "model": model, "motion_adapter": motion_adapter})
        files, settings = found.look_at_files(), found.look_at_settings()
        said |= {"scheduler": found.scheduler, "settings": found.read_settings()}
        return cls({**said, "files": files.fingerprint()}, (files, settings))


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
    describe: Callable[[], BatchModel],
    report: Callable[[str], None] = lambda _: None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Make what is missing of a manifest's clips.

    Args:
        manifest: the file; see `kinetiq.manifest`.
        out: the folder of the batch.
        load: loads the model; it is not asked where nothing is to be made.
        options: how.
        describe: says which model `load` loads.
        report: told what is wrong with a line, when it is found.
        progress: told how far the work is.

    Returns:
        "out"; "made", the names of the clips that were made; "kept", how many were there; and
        "failed", of each line that failed "line" and "error".

    Raises:
        InputError: the manifest cannot be read or holds nothing, the folder cannot be written, or
            another run is at work on the same part of it.
        WorkError: the model does not load, or the disk is full.
    """
    lines = list(read_manifest(manifest))
    if not lines:
        raise RequestError(f"{manifest}: must hold a line that says a clip, got none")
    make_folder(out, WHERE)
    _require_elsewhere(manifest, out)
    own = lines[options.part.number - 1 :: options.part.count]
    with open_log(out, options.part) as log:
        known = read_logs(out)
        contents = {content for each in known.values() for content in each}
        with open_staging(out, contents) as staging:
            progress("reading the model", 0, 1)
            model = describe()
            run = _Run(out, staging, log, known, model, options, report)
            pending = run.sort(own, _named_files(lines), progress)
            if pending:
                with load() as engine:
                    for files in model.files:
                        files.require_unchanged()
                    run.make(pending, engine, progress)
        return {"out": str(out), "made": run.made, "kept": run.kept, "failed": run.failed}


class _Run:
    """One run over the lines of a part, and what has come of it so far."""

    def __init__(
        self,
        out: Path,
        staging: Staging,
        log: BatchLog,
        known: dict[PurePosixPath, dict[str, set[str]]],
        model: BatchModel,
        options: BatchOptions,
        report: Callable[[str], None],
    ) -> None:
        self.made: list[str] = []
        self.kept = 0
        self.failed: list[dict[str, Any]] = []
        self._out, self._staging, self._log = out, staging, log
        self._model = model
        self._options = options
        self._report = report
        self._known = known
        self._digests: dict[Path, tuple[object, str]] = {}
        self._readers = Readers(
            _remember(_KEPT_STARTS, peek, lambda path: [path]),
            _remember(_KEPT_MOTIONS, read_motions, _motion_files),
            _remember(_KEPT_REGIONS, read_region, lambda path: [path]),
        )
        self._read = _remember(_KEPT_CLIPS, Clip.read, lambda path: [path])

    def sort(
        self, lines: Sequence[ManifestLine | BadLine], reads: set[Path], progress: Progress
    ) -> list[_Task]:
        """Take out what is there and what cannot be made; the rest is to be made.

        All lines are looked at before a model loads, so that mistakes are said at once.

        Args:
            lines: of this run.
            reads: what any line of the manifest reads, resolved.
            progress: told of ("checking", done, total).
        """
        above = {parent for path in reads for parent in path.parents}
        tasks: list[_Task] = []
        for done, line in enumerate(lines):
            progress("checking", done, len(lines))
            if isinstance(line, BadLine):
                self._fail(line.number, line.error)
                continue
            try:
                with line.located():
                    asked = line.asked
                    asked.request_options()
                    target = as_target(self._out / line.out, "out")
                    check_format(target, frames=asked.frames, fps=asked.fps)
                    task = _Task(line, self._fingerprint(line), target)
                    asked.plan(self._readers)
                    if task.fingerprint in self._holds(task):
                        self.kept += 1
                        continue
                    self._require_writable(task, reads, above)
                tasks.append(task)
            except InputError as error:
                self._fail(line.number, error)
        return tasks

    def make(self, tasks: list[_Task], engine: "Engine", progress: Progress) -> None:
        """Generate and write; lines that fail do not keep others from it.

        Clips are written by another thread, beside the next ones' generation.

        Raises:
            WorkError: nothing more can be written.
        """
        drawn: list[_Task] = []
        writing: deque[Future[None]] = deque()
        done = 0

        def requests() -> Iterator[Request]:
            nonlocal done
            for task in tasks:
                try:
                    with task.line.located():
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
                # A disk that is full ends it at once, and clips do not pile up in memory.
                while writing and (writing[0].done() or len(writing) > self._options.max_clips):
                    writing.popleft().result()
            for written in writing:
                written.result()

    def _request(self, task: _Task, engine: "Engine") -> Request:
        asked, defaults = task.line.asked, engine.defaults
        check_format(
            task.target, frames=asked.frames or defaults.frames, fps=asked.fps or defaults.fps
        )
        named = asked.named_files
        before = [_stamp(path) for path in named]
        plan = asked.plan(self._readers)
        controls = plan.read_controls(defaults, self._read)
        same = self._fingerprint(task.line) == task.fingerprint
        if not same or before != [_stamp(path) for path in named]:
            raise ClipError("a file that it names has changed since this run began; start it again")
        return Request.from_options(asked.prompt, {**plan.options, "control": controls})

    def _write(self, task: _Task, clip: Clip) -> None:
        """Encode a clip, say in the log what it is, and let it have its name, in this order."""
        asked = task.line.asked
        try:
            with task.line.located():
                staged = self._staging.encode(clip, task.target, asked.scale)
                self._log.add_clip(
                    {
                        "out": str(task.line.out),
                        "line": task.line.number,
                        "fingerprint": task.fingerprint,
                        "content": digest_clip(staged),
                        "frames": clip.num_frames,
                        "height": clip.height * asked.scale,
                        "width": clip.width * asked.scale,
                        "fps": clip.fps,
                        "seed": asked.seed,
                    }
                )
                self._place(staged, task)
        except InputError as error:
            if _is_full(error):
                raise WorkError(
                    f"{WHERE}: {error}; {len(self.made)} clips were made: make room, and start it "
                    "again"
                ) from error
            self._fail(task.line.number, error)

    def _place(self, staged: Path, task: _Task) -> None:
        """Give a clip its name, which may have been taken since the run began."""
        if not self._staging.place(staged, task.target):
            if not self._holds(task):
                self._known = read_logs(self._out)  # another run may have made it
            if task.fingerprint not in self._holds(task):
                self._require_free(task)
                known = self._known[task.line.out]
                if not self._staging.replace(
                    staged, task.target, lambda former: digest_clip(former) in known
                ):
                    raise OutputError(
                        f"out: {task.target} must hold the clip of this batch that was to be "
                        "replaced, and holds something else by now; choose another name, or move "
                        "it away"
                    )
        self.made.append(str(task.line.out))

    def _fingerprint(self, line: ManifestLine) -> str:
        """What lines have in common that ask for the same clip, 64 hexadecimal digits."""
        said = json.dumps(
            [line.asked.content(self._digest), dict(self._model.said)], sort_keys=True
        )
        return hashlib.sha256(said.encode()).hexdigest()

    def _digest(self, path: Path) -> str:
        """Of a file's content, taken anew when it is another file or was written to."""
        stamp = _stamp(path)
        known = self._digests.get(path)
        if known is None or known[0] != stamp:
            known = self._digests[path] = (stamp, content_digest(path))
        return known[1]

    def _holds(self, task: _Task) -> Collection[str]:
        """The fingerprints of the clip of the batch that has a line's name; none: there is none."""
        known = self._known.get(task.line.out)
        if known is None or not is_there(task.target):
            return ()
        try:
            return known.get(digest_clip(task.target), ())
        except OSError as error:
            raise OutputError(f"out: {task.target} cannot be read ({error.strerror})") from error

    def _require_writable(self, task: _Task, reads: set[Path], above: set[Path]) -> None:
        """Raise unless a clip may take its name, and nothing that is read is there."""
        resolved = _resolve(task.target)
        if resolved in reads or resolved in above or resolved.parent in reads:
            raise OutputError(f"out: {task.target} must not be where the manifest reads")
        self._require_free(task)
        make_folder(task.target.parent, "out")
        try:
            alike = task.target.parent.stat().st_dev == self._out.stat().st_dev
        except OSError as error:
            raise OutputError(f"out: {task.target} cannot be written: {error.strerror}") from error
        if not alike:
            raise OutputError(
                f"out: {task.target.parent} must be on the disk of {self._out}, and is on another; "
                "choose another name, or make a batch there"
            )

    def _require_free(self, task: _Task) -> None:
        """Raise unless nothing has a clip's name, or a clip of the batch that may be replaced."""
        try:
            task.target.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:  # such as of a name that is too long
            raise OutputError(f"out: {task.target} cannot be written: {error.strerror}") from error
        if not self._holds(task):
            raise OutputError(
                f"out: {task.target} must be free or hold a clip of this batch, and holds "
                "something else; choose another name, or move it away"
            )
        if not self._options.overwrite:
            raise OutputError(
                f"out: {task.target} must be free or hold the clip that this line asks for, and "
                "holds another clip of this batch; choose another name, or replace it with "
                "--overwrite"
            )

    def _fail(self, number: int, error: KinetiqError) -> None:
        self.failed.append({"line": number, "error": str(error)})
        self._log.add_failure(number, str(error))
        self._report(str(error))


def _is_full(error: InputError) -> bool:
    """Whether an error is of the disk, and so of all clips that follow."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return True
        cause = cause.__cause__
    return False


def _remember(
    most: int, read: Callable[..., Any], name_files: Callable[..., Collection[Path]]
) -> Callable[..., Any]:
    """A reader that reads once what it is asked for again, while the files stay as they are.

    Args:
        most: results that are kept.
        read: takes what can be hashed.
        name_files: of what `read` takes without a name, the files that it reads.
    """

    @functools.lru_cache(most)
    def remembered(stamps: object, words: tuple[Any, ...], settings: tuple[Any, ...]) -> Any:
        return read(*words, **dict(settings))

    def reading(*words: Any, **settings: Any) -> Any:
        stamps = tuple(map(_stamp, name_files(*words)))
        return remembered(stamps, words, tuple(sorted(settings.items())))

    return reading


def _motion_files(asked: tuple[str, ...], given: tuple[str, ...], folder: Path) -> list[Path]:
    """What `read_motions` reads."""
    return [parse_motion(words, folder)[1] for words in asked]


def _stamp(path: Path) -> object:
    """What changes when a file, or one in a folder, is written to."""
    try:
        if path.is_dir():
            inside = [each for each in list_inside(path) if each.is_file()]
            return tuple((each.name, stamp_file(each)) for each in inside)
        return stamp_file(path)
    except OSError as error:
        raise ClipError(f"{path} must be a file that can be read: {error.strerror}") from error


def _resolve(path: Path) -> Path:
    """Where a path leads; as far as one comes where links go round in a circle."""
    return Path(os.path.realpath(path))


def _named_files(lines: Sequence[ManifestLine | BadLine]) -> set[Path]:
    """What any line reads, resolved; lines that have no meaning are said when it is their turn."""
    found = {_resolve(line.path) for line in lines if isinstance(line, ManifestLine)}
    for line in lines:
        if isinstance(line, ManifestLine):
            with suppress(InputError):
                found |= {_resolve(path) for path in line.asked.named_files}
    return found


def _require_elsewhere(manifest: Path, out: Path) -> None:
    """Raise if the manifest is what a log of the batch is, or would be."""
    for path in find_logs(out):
        with suppress(OSError):  # a link that leads nowhere
            if path.samefile(manifest):
                raise OutputError(
                    f"{WHERE}: {manifest} must not have the name of this folder's own log; "
                    f"rename {path.name}"
                )
