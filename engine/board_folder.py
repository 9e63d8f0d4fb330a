"""The folder of a board: its shots, the same shots left alone, masks, and a sheet of it all.

A run that was stopped is continued: what is there is not made again. All shots of a board are made
together, so where one is missing they are all generated, and the missing one is written.
"""

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from kinetiq.clip import Clip, peek
from kinetiq.errors import OutputError, RequestError
from kinetiq.files import check_target, make_folder, write_text
from kinetiq.generation import Progress, no_progress
from kinetiq.request import MAX_STEPS
from kinetiq.sheet import contact_sheet, write_image
from kinetiq.shots import ConsistentShots, ShotBoard, finds_masks
from kinetiq.storyboard import Storyboard

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from kinetiq.engine import Engine

_CLIP_NAME = re.compile(r"(shot|plain)_\d{2,}\.mp4")
_MASK_NAME = re.compile(r"shot_\d{2,}")


@attrs.frozen
class BoardOptions:
    """What is written of a board, and how.

    Args:
        plain: the same shots left alone too.
        masks: where the subject was taken to be, in a folder of images a shot, which the key
            `masks` of a storyboard reads.
        overwrite: make everything again, in place of whatever board is there.
        scale: enlarge clips by this whole number.
        seed: in place of the storyboard's.
    """

    plain: bool = False
    masks: bool = False
    overwrite: bool = False
    scale: int = 1
    seed: int | None = None


@attrs.frozen
class BoardFolder:
    """Where each part of a board is; shots are counted from 1."""

    path: Path

    def shot(self, number: int) -> Path:
        """A shot's clip."""
        return self.path / f"shot_{number:02d}.mp4"

    def plain(self, number: int) -> Path:
        """The clip of a shot left alone."""
        return self.path / f"plain_{number:02d}.mp4"

    def mask(self, number: int) -> Path:
        """The folder of a shot's masks, an image a frame."""
        return self.masks / f"shot_{number:02d}"

    @property
    def masks(self) -> Path:
        """The folder of all masks."""
        return self.path / "masks"

    @property
    def sheet(self) -> Path:
        """The picture that shows all clips; written last."""
        return self.path / "sheet.png"

    @property
    def report(self) -> Path:
        """What the board is; written before all clips."""
        return self.path / "board.json"

    def entries(self) -> Iterator[Path]:
        """All clips, folders of masks, and the sheet, that are there, of whatever board."""
        if self.sheet.exists():
            yield self.sheet
        for folder, name in ((self.path, _CLIP_NAME), (self.masks, _MASK_NAME)):
            if folder.is_dir():
                yield from (each for each in folder.iterdir() if name.fullmatch(each.name))


def make_board(
    storyboard: Storyboard,
    out: Path,
    load: "Callable[[], AbstractContextManager[Engine]]",
    options: BoardOptions,
    *,
    model: Mapping[str, Any],
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Make what is missing of a board.

    Args:
        storyboard: what is wanted.
        out: the folder; made if need be.
        load: loads the engine; it is not called where nothing is to be generated.
        options: what is written.
        model: what `load` loads, in plain words; a board of another model is another board.
        progress: told of steps.

    Returns:
        What board.json says, and under "made" the files that were written now.

    Raises:
        InputError: the storyboard has no meaning for this model.
        OutputError: the folder cannot be written, or holds another board.
    """
    folder = BoardFolder(out)
    asked = storyboard.build(peek, seed=options.seed)
    if options.masks:
        _require_masks(asked, asked.steps)
    report = _describe(storyboard, asked, folder, options, model)
    make_folder(out, "shots")
    check_target(folder.report, "shots")
    if not options.overwrite:
        _require_own(folder, report["fingerprint"])
    work = _find_work(folder, len(asked.shots), options)
    if not work.missing:
        return {**report, "made": []}
    former = folder.entries() if options.overwrite else ()
    _require_unread(storyboard, {*former, *work.missing, folder.sheet})
    clips: dict[Path, Clip] = {}
    if work.together or work.plain:
        with load() as engine:
            parts = _generate(engine, storyboard, asked, folder, work, options, progress)
            for path, clip in parts:
                if not clips:
                    _start(folder, report, options)
                clips[path] = clip
                if path in work.missing:
                    make_folder(path.parent, "shots")
                    clip.write(path)
    shown = [
        (f"{number}. {label}{shot['prompt']}", path)
        for number, shot in enumerate(report["shots"], start=1)
        for label, path in (("", folder.shot(number)), ("left alone: ", folder.plain(number)))
        if path.exists()
    ]
    rows = [(label, clips[path] if path in clips else Clip.read(path)) for label, path in shown]
    write_image(contact_sheet(rows), folder.sheet)
    made = [*work.missing, *([] if folder.sheet in work.missing else [folder.sheet])]
    return {**report, "made": [str(path.relative_to(out)) for path in made]}


@attrs.frozen
class _Work:
    """What is to be done.

    Args:
        missing: what is to be written.
        together: whether the shots are generated.
        plain: the shots that are generated alone too, by number.
    """

    missing: tuple[Path, ...]
    together: bool
    plain: tuple[int, ...]


def _find_work(folder: BoardFolder, count: int, options: BoardOptions) -> _Work:
    numbers = range(1, count + 1)

    def missing(*paths: Path) -> list[Path]:
        return [path for path in paths if options.overwrite or not path.exists()]

    made = missing(*map(folder.shot, numbers))
    if options.masks:
        made += missing(*map(folder.mask, numbers))
    plain = [number for number in numbers if options.plain and missing(folder.plain(number))]
    alone = map(folder.plain, plain)
    return _Work((*made, *alone, *missing(folder.sheet)), bool(made), tuple(plain))


def _generate(
    engine: "Engine",
    storyboard: Storyboard,
    asked: ConsistentShots,
    folder: BoardFolder,
    work: _Work,
    options: BoardOptions,
    progress: Progress,
) -> Iterator[tuple[Path, Clip]]:
    """The shots, their masks, and the shots left alone, as far as wanted, each with its path.

    Errors have their place in the storyboard.
    """
    height, width = engine.defaults.height, engine.defaults.width
    read = functools.partial(Clip.read, height=asked.height or height, width=asked.width or width)
    if options.masks:
        _require_masks(asked, asked.steps or engine.defaults.steps)
    shots = storyboard.build(functools.cache(read), seed=options.seed)
    with storyboard.located("shots"):
        if work.together:
            board = next(engine.generate_storyboards([shots], progress=progress))
            for number, clip in enumerate(board.clips, start=1):
                yield folder.shot(number), _enlarged(clip, options.scale)
            if options.masks:
                yield from _mask_clips(board, folder)
        if work.plain:
            requests = shots.requests()
            alone = engine.generate_many(
                [requests[number - 1] for number in work.plain], progress=progress
            )
            for number, clip in zip(work.plain, alone, strict=True):
                yield folder.plain(number), _enlarged(clip, options.scale)


def _mask_clips(board: ShotBoard, folder: BoardFolder) -> Iterator[tuple[Path, Clip]]:
    assert board.masks is not None  # noqa: S101  it was checked that the board finds some
    for number, (clip, mask) in enumerate(zip(board.clips, board.masks, strict=True), start=1):
        yield folder.mask(number), _mask_clip(mask, clip)


def _enlarged(clip: Clip, scale: int) -> Clip:
    return Clip(clip.frames.repeat(scale, axis=1).repeat(scale, axis=2), clip.fps)


def _mask_clip(mask: np.ndarray, clip: Clip) -> Clip:
    """A mask [frames, h, w] as grey frames of the clip's size, each cell a sharp square."""
    rows = np.arange(clip.height) * mask.shape[1] // clip.height
    columns = np.arange(clip.width) * mask.shape[2] // clip.width
    large = mask[:, rows[:, None], columns, None].clip(0.0, 1.0)
    return Clip.from_array(np.broadcast_to(large, (*large.shape[:3], 3)), clip.fps)


def _describe(
    storyboard: Storyboard,
    asked: ConsistentShots,
    folder: BoardFolder,
    options: BoardOptions,
    model: Mapping[str, Any],
) -> dict[str, Any]:
    """What board.json says."""
    stays = not options.overwrite  # what is there
    same = [storyboard.fingerprint, options.seed, options.scale, dict(model)]
    shots = []
    for number, request in enumerate(asked.requests(), start=1):
        entry = {
            "file": folder.shot(number).name,
            "prompt": request.prompt,
            "seed": request.seed,
        }
        if options.plain or (stays and folder.plain(number).exists()):
            entry["plain"] = folder.plain(number).name
        if options.masks or (stays and folder.mask(number).exists()):
            entry["masks"] = str(folder.mask(number).relative_to(folder.path))
        shots.append(entry)
    return {
        "storyboard": str(storyboard.path),
        "subject": asked.subject,
        **model,
        "shots": shots,
        "sheet": folder.sheet.name,
        "fingerprint": hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest(),
    }


def _require_masks(asked: ConsistentShots, steps: int | None) -> None:
    """Raise unless a board finds masks to save; `steps` None: as the model has it, not loaded."""
    if not finds_masks(asked, MAX_STEPS if steps is None else steps):
        raise RequestError(
            "shots: --save-masks must go with a board that looks for its subject, and no step of "
            "this one does; widen keys_window or refine_window"
        )


def _require_unread(storyboard: Storyboard, written: Iterable[Path]) -> None:
    """Raise if what is to be written or replaced is what the storyboard reads."""
    for path in sorted(written):
        target = path.resolve()
        for named in storyboard.named_files:
            read = named.resolve()
            if read.is_relative_to(target) or target.parent == read:
                raise OutputError(
                    f"shots: {path} must not be a part of {named}, which the storyboard names, "
                    "since it is to be written; choose another folder with --out"
                )


def _require_own(folder: BoardFolder, fingerprint: str) -> None:
    """Raise unless the folder holds no board, or a part of this one."""
    if not folder.report.exists() and not any(folder.entries()):
        return
    try:
        said = json.loads(folder.report.read_bytes())
        if said["fingerprint"] == fingerprint:
            return
    except (OSError, ValueError, TypeError, KeyError):  # whatever it is, it is not ours
        pass
    raise OutputError(
        f"shots: {folder.path} must be a folder without a board, or with a part of this one, and "
        "holds another (another storyboard, model or option); choose another with --out, or "
        "replace it with --overwrite"
    )


def _start(folder: BoardFolder, report: Mapping[str, Any], options: BoardOptions) -> None:
    """Write the report; with `overwrite` former entries go before, so that none passes for new."""
    if options.overwrite:
        for path in list(folder.entries()):
            try:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            except OSError as error:
                raise OutputError(f"shots: {path} must be replaceable: {error.strerror}") from error
    write_text(folder.report, json.dumps(report, indent=2) + "\n", "shots")
