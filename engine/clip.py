"""Clips: frames of video in memory, read from and written to files.

`Clip.read` takes what people have: videos of any container that FFmpeg opens, animated pictures,
folders of images. What comes back is plain: upright, square pixels, opaque, one constant rate.
Writing never leaves a half-written file under the final name.
"""

import hashlib
import itertools
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from kinetiq.errors import ClipError, KinetiqError, OutputError, RequestError
from kinetiq.files import as_target, check_target, replacing

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
WRITE_SUFFIXES = (".mp4", ".webm", ".gif", ".webp", ".png")
FITS = ("crop", "fit", "stretch")
DEFAULT_FPS = 8.0
MAX_FRAMES = 4096
MAX_BYTES = 4 * 2**30  # of decoded frames; stacking them needs as much again for a moment
_FPS_RANGE = (0.01, 1000.0)
# A frame shown for less than this is slowed down by browsers, some to a tenth of a second.
_LEAST_MILLISECONDS = {".gif": 20, ".webp": 11}
_LOSSLESS_PIXELS = 2**23  # an animated .webp of more pixels than this is compressed with loss
_PALETTE_SAMPLE = 2**19  # pixels that a palette is fitted to
_WRITE = "Clip.write"  # what its errors begin with
_MATROSKA_SEGMENT = b"\x18\x53\x80\x67"


@dataclass(frozen=True, eq=False, repr=False)
class Clip:
    """Frames of video at a constant rate. Equal clips have equal frames and rates.

    Args:
        frames: uint8, [frames, height, width, 3], red green blue; copied unless read-only.
        fps: frames a second, 0.01 to 1000.

    Raises:
        ClipError: `frames` or `fps` is not that.
    """

    frames: np.ndarray
    fps: float

    def __post_init__(self) -> None:
        frames: object = self.frames  # whatever the caller gave
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
            came: object = frames.dtype if isinstance(frames, np.ndarray) else type(frames).__name__
            raise ClipError(
                f"Clip: frames must be a uint8 array, got {came}; Clip.from_array takes floats too"
            )
        _check_shape("Clip: frames", frames.shape)
        if frames.flags.writeable or not frames.flags.c_contiguous:
            frames = _sealed(frames.copy())
        object.__setattr__(self, "frames", frames)
        object.__setattr__(self, "fps", _checked_fps("Clip", self.fps))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Clip):
            return NotImplemented
        return self.fps == other.fps and np.array_equal(self.frames, other.frames)

    def __hash__(self) -> int:
        return hash((self.fingerprint, self.fps))

    def __reduce__(self) -> tuple[type["Clip"], tuple[np.ndarray, float]]:
        return Clip, (self.frames, self.fps)  # a pickled array forgets that it is read-only

    def __repr__(self) -> str:
        return f"Clip({self.num_frames} frames, {self.height}x{self.width}, {self.fps:g} fps)"

    @classmethod
    def read(
        cls,
        path: str | os.PathLike[str],
        *,
        fps: float | None = None,
        max_frames: int = MAX_FRAMES,
        height: int | None = None,
        width: int | None = None,
        fit: str = "crop",
    ) -> "Clip":
        """Read a video, an animated or still picture, or a folder of images.

        Frames come out upright (rotation and mirroring of the file are applied), with square
        pixels, and composed on black where they are transparent. A video of variable rate is
        sampled at its average rate, each frame being the one on screen in the middle of its turn.
        An animated picture is sampled at the rate of its quickest frames, so that a pause at its
        end costs no frame. A folder is read in natural order (2 before 10); files in it that are
        not .png, .jpg, .jpeg, .webp or .bmp are left alone.

        With `height` and `width` every frame is brought to that size as soon as it is decoded: the
        result is that of `resize`, and the memory that of the small clip. A clip of large frames
        that does not fit into memory is read that way.

        Args:
            path: the file or folder.
            fps: the rate of a folder or a still picture, which state none; 8 by default.
            max_frames: read no clip longer than this.
            height: pixels that frames are brought to; with `width` or not at all.
            width: like `height`.
            fit: how they are brought to that size; see `resize`.

        Raises:
            ClipError: the path is missing, empty, damaged, cut short, without pictures, too long,
                too large, or its images differ in size.
            RequestError: `max_frames` or a size is below 1, one of `height` and `width` is missing,
                `fit` is unknown, or `fps` is given for a file with its own rate.
        """
        check_count("Clip.read: max_frames", max_frames)
        if fps is not None:
            _checked_fps("Clip.read", fps)
        if fit not in FITS:
            raise RequestError(f"Clip.read: fit must be one of {', '.join(FITS)}, got {fit!r}")
        if (height is None) != (width is None):
            raise RequestError(
                "Clip.read: height and width must be given together, got "
                f"height={height!r} and width={width!r}"
            )
        size = None
        if height is not None and width is not None:
            check_count("Clip.read: height", height)
            check_count("Clip.read: width", width)
            size = _Size(height, width, fit)
        return _read(path, fps, _Budget(str(path), max_frames, size=size))

    @classmethod
    def from_array(cls, array: np.ndarray | Tensor, fps: float = DEFAULT_FPS) -> "Clip":
        """Make a clip of an array or a tensor, which is copied.

        Args:
            array: [frames, height, width, 3]; uint8, or floating point in [0, 1].
            fps: frames a second.

        Raises:
            ClipError: rank, type, range or rate is not that, or a value is not finite.
        """
        values: object = array
        if isinstance(array, Tensor):
            local = array.detach().cpu()
            values = (local.float() if local.is_floating_point() else local).numpy()
        if not isinstance(values, np.ndarray):
            raise ClipError(
                "Clip.from_array: array must be a NumPy array or a torch tensor, "
                f"got {type(array).__name__}"
            )
        _check_shape("Clip.from_array: array", values.shape)
        if np.issubdtype(values.dtype, np.floating):
            low, high = float(values.min()), float(values.max())  # NaN if any value is
            if not (low >= 0.0 and high <= 1.0):
                raise ClipError(
                    "Clip.from_array: floating point values must be finite and in [0, 1], "
                    f"got {low:g} to {high:g}; clamp or rescale them, or give uint8"
                )
            scaled = values.astype(np.float32) * 255.0
            return cls(np.floor(scaled + 0.5).astype(np.uint8), fps)
        if values.dtype != np.uint8:
            raise ClipError(
                "Clip.from_array: values must be uint8, or floating point in [0, 1], "
                f"got {values.dtype}; convert them"
            )
        return cls(values, fps)

    @property
    def num_frames(self) -> int:
        """Number of frames, at least 1."""
        return int(self.frames.shape[0])

    @property
    def height(self) -> int:
        """Height of a frame in pixels."""
        return int(self.frames.shape[1])

    @property
    def width(self) -> int:
        """Width of a frame in pixels."""
        return int(self.frames.shape[2])

    @property
    def seconds(self) -> float:
        """Duration, the last frame's turn included."""
        return self.num_frames / self.fps

    @property
    def is_still_image(self) -> bool:
        """Whether there is one frame only, hence no motion to speak of."""
        return self.num_frames == 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of shape and content in hexadecimal; the rate does not enter."""
        digest = hashlib.sha256(repr(self.frames.shape).encode())
        digest.update(self.frames.data)
        return digest.hexdigest()

    def resample(self, frames: int) -> "Clip":
        """The same duration in another number of frames.

        The frames are evenly spaced over the whole clip, first and last included; each is the
        nearest frame of this clip in time, never a blend of two, so nothing ghosts. One frame
        keeps the first.

        Raises:
            ClipError: this is a still image and more than one frame is wanted.
            RequestError: `frames` is below 1.
        """
        check_count("Clip.resample: frames", frames)
        if self.is_still_image and frames > 1:
            raise ClipError(
                f"Clip.resample: a clip of {frames} frames needs motion, and a still image (one "
                "frame) has none; give a video"
            )
        chosen = spread(self.num_frames, frames)
        return Clip(_sealed(self.frames[chosen]), self.fps * frames / self.num_frames)

    def resize(self, height: int, width: int, fit: str = "crop") -> "Clip":
        """Frames of another size, smaller or larger (Lanczos, antialiased).

        Args:
            height: new height in pixels.
            width: new width in pixels.
            fit: `crop` fills the frame and cuts what sticks out, equally at both ends; `fit` shows
                everything, centred on black; `stretch` ignores the aspect.

        Raises:
            RequestError: a size is below 1, or `fit` is unknown.
        """
        check_count("Clip.resize: height", height)
        check_count("Clip.resize: width", width)
        if fit not in FITS:
            raise RequestError(f"Clip.resize: fit must be one of {', '.join(FITS)}, got {fit!r}")
        size = _Size(height, width, fit)
        return Clip(_sealed(np.stack([size.bring(frame) for frame in self.frames])), self.fps)

    def mirror(self) -> "Clip":
        """Left and right exchanged."""
        return Clip(_sealed(self.frames[:, :, ::-1].copy()), self.fps)

    def reverse(self) -> "Clip":
        """Backwards in time."""
        return Clip(_sealed(self.frames[::-1].copy()), self.fps)

    def to_tensor(self) -> Tensor:
        """The frames as float32 in [0, 1], [frames, 3, height, width]."""
        planes = np.ascontiguousarray(self.frames.transpose(0, 3, 1, 2))
        return torch.from_numpy(planes).float() / 255.0

    def write(
        self, path: str | os.PathLike[str], *, fps: float | None = None, scale: int = 1
    ) -> None:
        """Write to a file, whose suffix says the format, or to a folder.

        `.mp4` (H.264, or MPEG-4 part 2 where FFmpeg has no H.264 encoder) and `.webm` (VP9) lose a
        little; an odd size gains a row or column that repeats the edge. `.gif` and `.webp` loop for
        ever; a gif of at most 256 colours and a small webp are exact; both hold identical
        neighbours as one longer frame. `.png` takes a clip of one frame. No suffix: a folder of
        00000.png, 00001.png and so on, which must be new or empty. An existing file is replaced.

        Args:
            path: where to; the folder that it is in must exist.
            fps: frames a second, where they should differ from the clip's.
            scale: enlarge by this whole number, pixels staying sharp squares.

        Raises:
            OutputError: unknown suffix, the folder is missing or cannot be written, or the format
                cannot hold the clip.
            RequestError: `scale` or `fps` is out of range.
        """
        check_count("Clip.write: scale", scale)
        rate = self.fps if fps is None else _checked_fps("Clip.write", fps, RequestError)
        target = as_target(path, _WRITE)
        suffix = write_suffix(target)
        check_format(target, frames=self.num_frames, fps=rate)
        frames = self.frames
        if scale > 1:
            frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
        with replacing(target, _WRITE, folder=not suffix) as temporary:
            try:
                _encode(temporary, suffix, frames, rate)
            except (KinetiqError, OSError):
                raise
            except Exception as error:  # encoders say no as they like
                count, height, width, _ = frames.shape
                raise OutputError(
                    f"Clip.write: {suffix or 'a folder of images'} must be able to hold {count} "
                    f"frames of {height}x{width}, and is not: {error}; choose another format, "
                    "size or scale"
                ) from error


def _encode(path: Path, suffix: str, frames: np.ndarray, rate: float) -> None:
    """Write frames to a file, or to a new folder where there is no suffix."""
    if suffix in (".mp4", ".webm"):
        _write_video(path, suffix, frames, rate)
    elif suffix in (".gif", ".webp"):
        _write_animation(path, suffix, frames, rate)
    elif suffix == ".png":
        _write_png(path, frames[0])
    else:
        path.mkdir()
        for index, frame in enumerate(frames):
            _write_png(path / f"{index:05d}.png", frame)


def check_write(
    path: str | os.PathLike[str], *, frames: int | None = None, fps: float | None = None
) -> None:
    """Raise what `Clip.write` would raise for this path, and leave what is there alone.

    For the start of long work, whose result would be lost if it could not be written.

    Args:
        path: where a clip will be written.
        frames: of that clip, where known.
        fps: of that clip, where known.

    Raises:
        OutputError: unknown suffix, the folder is missing or cannot be written, the name is taken
            by what is never replaced, or the format cannot hold such a clip.
    """
    target = as_target(path, _WRITE)
    check_target(target, _WRITE, folder=not write_suffix(target))
    check_format(target, frames=frames, fps=fps)


def check_format(target: Path, *, frames: int | None = None, fps: float | None = None) -> None:
    """Raise unless the format that the suffix says can hold so many frames at such a rate.

    Args:
        target: where a clip will be written; it is not looked at.
        frames: of that clip, where known.
        fps: of that clip, where known.

    Raises:
        OutputError: it cannot.
    """
    suffix = target.suffix.lower()
    if suffix == ".png" and frames is not None and frames > 1:
        raise OutputError(
            f"Clip.write: {target} can hold one frame, got {frames}; write .gif, .webp or .mp4, or "
            "a folder (no suffix)"
        )
    least = _LEAST_MILLISECONDS.get(suffix)
    if least is not None and fps is not None and 1000.0 / fps < least:
        raise OutputError(
            f"Clip.write: {target} can show at most {1000 / least:g} frames a second, got {fps:g}; "
            "give fps=, or write .mp4"
        )


def peek(path: str | os.PathLike[str], frames: int = 2) -> Clip:
    """The first frames of what `Clip.read` would read, without reading what follows.

    For the start of long work: a file that is missing, empty, cut short or no clip is said at
    once, and a still picture is told from a video. Damage further on is not seen, and the rate is
    that of the few frames.

    Args:
        path: the file or folder.
        frames: how many; a shorter clip comes whole.

    Raises:
        ClipError: as `Clip.read`.
        RequestError: `frames` is below 1.
    """
    check_count("peek: frames", frames)
    return _read(path, None, _Budget(str(path), MAX_FRAMES, only=frames))


def spread(available: int, wanted: int) -> np.ndarray:
    """Indices of `wanted` frames evenly spaced over `available`, first and last included."""
    return np.floor(np.linspace(0.0, available - 1.0, wanted) + 0.5).astype(np.int64)


def check_count(what: str, value: object) -> None:
    """Raise a `RequestError` that begins with `what` unless `value` is a whole number >= 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise RequestError(f"{what} must be a whole number of at least 1, got {value!r}")


def write_suffix(target: Path) -> str:
    """The suffix that says the format, "" for a folder."""
    suffix = target.suffix.lower()
    if suffix not in ("", *WRITE_SUFFIXES):
        raise OutputError(
            f"Clip.write: {target} must end in one of {', '.join(WRITE_SUFFIXES)}, or in "
            f"nothing for a folder of images, got {suffix!r}"
        )
    return suffix


def _sealed(frames: np.ndarray) -> np.ndarray:
    frames.flags.writeable = False
    return frames


def _check_shape(what: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        raise ClipError(
            f"{what} must be [frames, height, width, 3] with at least one of each, "
            f"got {list(shape)}"
        )


def _checked_fps(
    where: str, fps: object, error: type[ClipError | RequestError] = ClipError
) -> float:
    low, high = _FPS_RANGE
    number = isinstance(fps, int | float | np.number | Fraction) and not isinstance(fps, bool)
    if not number or not low <= float(fps) <= high:  # type: ignore[arg-type] # a number by now
        raise error(f"{where}: fps must be a number from {low:g} to {high:g}, got {fps!r}")
    return float(fps)  # type: ignore[arg-type] # a number by now


@dataclass(frozen=True)
class _Size:
    """A size that frames are brought to, and how; see `Clip.resize`."""

    height: int
    width: int
    fit: str

    def bring(self, frame: np.ndarray) -> np.ndarray:
        """A frame uint8 [height, width, 3] at this size."""
        from PIL import Image

        height, width = frame.shape[:2]
        across, down = self.width / width, self.height / height
        box = (0.0, 0.0, float(width), float(height))
        inner_height, inner_width = self.height, self.width
        if self.fit == "crop":
            # Rounding can take what is nothing below nothing, and a box must stay in the picture.
            cut_x = max(0.0, (width - self.width / max(across, down)) / 2)
            cut_y = max(0.0, (height - self.height / max(across, down)) / 2)
            box = (cut_x, cut_y, width - cut_x, height - cut_y)
        elif self.fit == "fit":
            inner_height = max(round(height * min(across, down)), 1)
            inner_width = max(round(width * min(across, down)), 1)
        top, left = (self.height - inner_height) // 2, (self.width - inner_width) // 2
        image = Image.fromarray(frame)
        inner = image.resize((inner_width, inner_height), Image.Resampling.LANCZOS, box=box)
        brought = np.zeros((self.height, self.width, 3), np.uint8)
        brought[top : top + inner_height, left : left + inner_width] = np.asarray(inner)
        return brought


class _Budget:
    """What is kept of a clip that is read, and the end of one that would not fit in memory.

    Args:
        name: of the file or folder, in errors.
        max_frames: a longer clip is refused.
        size: what frames are brought to; None leaves them as they are.
        only: read the first frames only, so many; None reads all.
    """

    def __init__(
        self, name: str, max_frames: int, *, size: _Size | None = None, only: int | None = None
    ) -> None:
        self.name = name
        self.max_frames = max_frames
        self.size = size
        self.only = only
        self.shape: tuple[int, ...] | None = None  # of the first frame, as it was decoded

    def check_count(self, count: int) -> None:
        if count > self.max_frames:
            raise ClipError(
                f"Clip.read: {self.name} must have at most {self.max_frames} frames, and has more; "
                "cut it, or raise max_frames"
            )

    def check_bytes(self, count: int, frame: np.ndarray) -> None:
        """Raise unless so many frames like this one fit."""
        if count * frame.nbytes > MAX_BYTES:
            raise ClipError(
                f"Clip.read: {self.name} must fit into {MAX_BYTES / 2**30:g} GiB of frames, and "
                f"{count} of {_in_pixels(frame.shape)} exceed them; read it at a smaller size "
                "(height= and width=), or cut it"
            )

    def add(self, frames: list[np.ndarray], frame: np.ndarray, name: str) -> None:
        """Append `frame`, called `name` in errors, to `frames`."""
        self.check_count(len(frames) + 1)
        if self.shape is None:
            self.shape = frame.shape
        if frame.shape != self.shape:
            raise ClipError(
                f"Clip.read: all frames of {self.name} must have one size, and {name} is of "
                f"{_in_pixels(frame.shape)} where the first is of {_in_pixels(self.shape)}; make "
                "them equal"
            )
        if self.size is not None:
            frame = self.size.bring(frame)
        self.check_bytes(len(frames) + 1, frame)
        frames.append(frame)


def _in_pixels(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]} pixels (height x width)"


def _read(path: str | os.PathLike[str], fps: float | None, budget: _Budget) -> Clip:
    try:
        source = Path(path)
        is_folder, size = source.is_dir(), source.stat().st_size
    except FileNotFoundError as error:
        raise ClipError(f"Clip.read: {path} does not exist; check the path") from error
    except (OSError, TypeError, ValueError) as error:
        raise ClipError(f"Clip.read: {path!r} must be a readable path ({error})") from error
    if not is_folder and size == 0:
        raise ClipError(f"Clip.read: {source} must be a video or a picture, got an empty file")
    try:
        if is_folder:
            return _read_folder(source, fps, budget)
        with source.open("rb") as file:
            return _read_file(file, fps, budget)
    except OSError as error:
        raise ClipError(
            f"Clip.read: {error.filename or source} must be readable ({_reason(error)}); check "
            "its permission"
        ) from error


def _at_constant_rate(
    frames: list[np.ndarray], starts: np.ndarray, seconds: float, fps: float, budget: _Budget
) -> Clip:
    """Sample frames shown from `starts` (seconds, the first 0) on at a constant rate.

    Sampling in the middle of each turn takes every frame exactly once when the rate is constant,
    however roughly the container rounds its times.
    """
    if budget.only is not None:  # the frames themselves are wanted, however they are timed
        return Clip(_sealed(np.stack(frames)), DEFAULT_FPS)
    count = max(round(seconds * fps), 1)
    budget.check_count(count)
    budget.check_bytes(count, frames[0])
    middles = (np.arange(count) + 0.5) / fps
    chosen = np.searchsorted(starts, middles, side="right") - 1
    return Clip(_sealed(np.stack([frames[index] for index in chosen])), fps)


def _read_folder(folder: Path, fps: float | None, budget: _Budget) -> Clip:
    names = [entry for entry in folder.iterdir() if entry.is_file() and entry.name[0] != "."]
    images = [entry for entry in names if entry.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise ClipError(
            f"Clip.read: the folder {folder} must hold images ({', '.join(IMAGE_SUFFIXES)}), got "
            f"{len(names)} files that are none; name a video or another folder"
        )
    budget.check_count(len(images))
    frames: list[np.ndarray] = []
    for path in sorted(images, key=natural_key)[: budget.only]:
        with path.open("rb") as file:
            pictures, _ = _read_picture(file, _Budget(str(path), budget.max_frames))
        if len(pictures) > 1:
            raise ClipError(
                f"Clip.read: each image of {folder} must be a still, and {path.name} has "
                f"{len(pictures)} frames; read that file itself, or take it out"
            )
        budget.add(frames, pictures[0], path.name)
    return Clip(_sealed(np.stack(frames)), DEFAULT_FPS if fps is None else fps)


def natural_key(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    """By which paths are in the order of their names, 2 before 10, whatever their case."""
    parts = re.findall(r"[0-9]+|[^0-9]+", path.name.lower())
    key = [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]
    return key, path.name


def _read_file(file: BinaryIO, fps: float | None, budget: _Budget) -> Clip:
    missing = _missing_bytes(file)
    if missing > 0:
        raise ClipError(
            f"Clip.read: {budget.name} must be whole, and its last {missing} bytes are missing; "
            "copy or download it again"
        )
    if not _is_picture(file.read(16)):
        file.seek(0)
        _refuse_fps(fps, budget)
        return _read_video(file, budget)
    file.seek(0)
    frames, durations = _read_picture(file, budget)
    if len(frames) == 1:
        return Clip(_sealed(frames[0][None].copy()), DEFAULT_FPS if fps is None else fps)
    _refuse_fps(fps, budget)
    seconds = np.asarray(durations) / 1000.0
    starts = np.concatenate([[0.0], np.cumsum(seconds)[:-1]])
    total = float(seconds.sum())
    return _at_constant_rate(frames, starts, total, _picture_rate(seconds), budget)


def _refuse_fps(fps: float | None, budget: _Budget) -> None:
    if fps is not None:
        raise RequestError(
            f"Clip.read: fps is for a folder or a still picture, and {budget.name} has a rate of "
            "its own; leave fps out, and use resample() or Clip(clip.frames, fps)"
        )


def _is_picture(head: bytes) -> bool:
    """Whether PIL should read it: it composes animations and knows cameras' orientation tags."""
    starts = (b"GIF8", b"\x89PNG", b"\xff\xd8\xff", b"BM")
    return head.startswith(starts) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _missing_bytes(file: BinaryIO) -> int:
    """How much longer the file's own headers say that it is; at most 0 where they do not say.

    Demuxers take the end of a cut file for the end of the video, without a word.
    Sources: ISO/IEC 14496-12 section 4.2 (boxes); RFC 8794 section 4 and 6 (EBML lengths).
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(64)
    end = 0
    if head[:4] == b"RIFF":
        end = 8 + int.from_bytes(head[4:8], "little")
    elif head[:4] == b"\x1a\x45\xdf\xa3":
        end = _matroska_end(head)
    elif head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        end = _boxes_end(file, size)
    file.seek(0)
    return end - size


def _matroska_end(head: bytes) -> int:
    length, start = _ebml_length(head, 4)
    segment = start + (length or 0)
    if head[segment : segment + 4] != _MATROSKA_SEGMENT:
        return 0
    length, start = _ebml_length(head, segment + 4)
    return 0 if length is None else start + length  # a recording being streamed states no length


def _ebml_length(data: bytes, at: int) -> tuple[int | None, int]:
    """The length at this place (None: unknown), and where what it measures starts."""
    first = data[at] if at < len(data) else 0
    octets = 9 - first.bit_length()
    if first == 0 or at + octets > len(data):
        return None, at
    value = int.from_bytes(data[at : at + octets], "big") & ((1 << 7 * octets) - 1)
    return (None if value == (1 << 7 * octets) - 1 else value), at + octets


def _boxes_end(file: BinaryIO, size: int) -> int:
    """Where the last of the file's boxes ends."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        length, kind = struct.unpack(">I4s", file.read(8))
        least = 8
        if length == 1 and at + 16 <= size:
            length, least = int.from_bytes(file.read(8), "big"), 16
        if length < least or not kind.isalnum():  # 0: up to the end; else not a box but padding
            return 0
        at += length
    return at


def _read_picture(file: BinaryIO, budget: _Budget) -> tuple[list[np.ndarray], list[float]]:
    """Frames, and milliseconds that each is shown for."""
    from PIL import Image, ImageOps, ImageSequence

    frames: list[np.ndarray] = []
    durations: list[float] = []
    try:
        with Image.open(file) as image:
            for picture in itertools.islice(ImageSequence.Iterator(image), budget.only):
                budget.add(
                    frames, _flatten(ImageOps.exif_transpose(picture)), f"frame {len(frames)}"
                )
                milliseconds = float(picture.info.get("duration", 0.0))
                # browsers show frames that ask for 10 ms or less for 100 ms: old files rely on it
                durations.append(milliseconds if milliseconds > 10.0 else 100.0)
            if image.format == "GIF" and not _ends_well(file):
                raise ClipError(
                    f"Clip.read: {budget.name} must be whole, and ends in the middle after frame "
                    f"{len(frames) - 1}; copy or download it again"
                )
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise ClipError(
            f"Clip.read: {budget.name} must be a picture that can be decoded, and frame "
            f"{len(frames)} cannot ({error}); save it again"
        ) from error
    return frames, durations


def _ends_well(file: BinaryIO) -> bool:
    """Whether a gif has its trailer; some writers pad after it."""
    file.seek(-min(64, file.seek(0, os.SEEK_END)), os.SEEK_END)
    return file.read().rstrip(b"\0").endswith(b";")


def _flatten(image: "Image.Image") -> np.ndarray:
    """uint8 [height, width, 3], composed on black."""
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit grey: convert() would clip it
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.has_transparency_data:
        return _on_black(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _on_black(pixels: np.ndarray) -> np.ndarray:
    """[height, width, 4] with alpha not yet applied, to [height, width, 3]."""
    product = pixels[..., :3].astype(np.uint16) * pixels[..., 3:]
    composed: np.ndarray = ((product + 127) // 255).astype(np.uint8)
    return composed


def _picture_rate(seconds: np.ndarray) -> float:
    """The rate at which the quickest frame is shown once and the others a whole number of times.

    Writers merge identical neighbours and round to a hundredth of a second; this finds the rate
    that they started from.
    """
    turn = float(seconds.min())
    for _ in range(2):  # the second time with the mean turn, which rounding does not bias
        turns = np.maximum(np.round(seconds / turn), 1.0)
        turn = float(seconds.sum() / turns.sum())
    return 1.0 / turn


def _read_video(file: BinaryIO, budget: _Budget) -> Clip:
    import av

    try:
        # no protocol: a playlist posing as a video must not open other files or addresses
        container = av.open(file, options={"protocol_whitelist": "none"})
    except (av.FFmpegError, OSError, ValueError) as error:
        raise ClipError(
            f"Clip.read: {budget.name} must be a video, a picture or a folder of images, and "
            f"cannot be opened as one ({_reason(error)}); it may be cut short or of another kind"
        ) from error
    with container:
        cover = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & cover]
        if not streams:
            held = sorted({s.type for s in container.streams if s.type != "video"})
            raise ClipError(
                f"Clip.read: {budget.name} must hold a video stream, got "
                f"{' and '.join(held) if held else 'nothing'} only; give a file with pictures"
            )
        stream = streams[0]
        frames: list[np.ndarray] = []
        times: list[float | None] = []
        try:
            for frame in itertools.islice(_decode(container, stream, budget), budget.only):
                if frame.is_corrupt:
                    raise ClipError(_damaged(budget, len(frames), "its data is incomplete"))
                pixels = _upright(frame, stream.sample_aspect_ratio, budget)
                budget.add(frames, pixels, f"frame {len(frames)}")
                times.append(frame.time)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise ClipError(_damaged(budget, len(frames), _reason(error))) from error
        declared = stream.average_rate or stream.guessed_rate
    if not frames:
        raise ClipError(
            f"Clip.read: {budget.name} must have at least one frame, got none; it may be cut short"
        )
    return _timed(frames, times, declared, budget)


def _timed(
    frames: list[np.ndarray],
    times: list[float | None],
    declared: Fraction | None,
    budget: _Budget,
) -> Clip:
    """Place decoded frames in time.

    The declared rate is used where the times agree with it, since it is exact where they are
    rounded; where they do not, the times are right: writers of variable rate declare anything,
    durations of frames included, so that the last frame is given an average turn.
    """
    count = len(frames)
    rate = float(declared) if declared else DEFAULT_FPS
    known = [time for time in times if time is not None]
    starts = np.maximum.accumulate(known) - known[0] if known else np.zeros(1)
    if count == 1 or len(known) < count or starts[-1] == 0.0:  # a raw stream carries no times
        return Clip(_sealed(np.stack(frames)), rate)
    seconds = float(starts[-1]) * count / (count - 1)
    if abs(rate * seconds - count) >= 0.5:
        rate = count / seconds
    return _at_constant_rate(frames, starts, seconds, rate, budget)


def _decode(container: Any, stream: Any, budget: _Budget) -> Iterator[Any]:
    """Frames of the stream in order of presentation."""
    import av

    # FFmpeg's own VP8 and VP9 decoders drop the alpha plane, only libvpx reads it
    if stream.metadata.get("alpha_mode") == "1":
        name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
        if name is None or name not in av.codecs_available:
            raise ClipError(
                f"Clip.read: {budget.name} has transparency that needs FFmpeg's libvpx decoder, "
                "which this PyAV lacks; save the video without transparency"
            )
        decoder = av.CodecContext.create(name, "r")
        for packet in container.demux(stream):
            yield from decoder.decode(packet if packet.size else None)
        return
    stream.thread_type = "AUTO"
    yield from container.decode(stream)


def _upright(frame: Any, pixel_aspect: Fraction | None, budget: _Budget) -> np.ndarray:
    """uint8 [height, width, 3] with square pixels, turned as the display matrix says."""
    aspect = float(pixel_aspect) if pixel_aspect else 1.0
    # enlarge the short way, so that no line of the picture is lost
    width, height = round(frame.width * max(aspect, 1.0)), round(frame.height / min(aspect, 1.0))
    has_alpha = any(component.is_alpha for component in frame.format.components)
    has_alpha = has_alpha or frame.format.has_palette
    pixels = frame.to_ndarray(
        format="rgba" if has_alpha else "rgb24", width=max(width, 1), height=max(height, 1)
    )
    if has_alpha:
        pixels = _on_black(pixels)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return np.ascontiguousarray(pixels)
    across, across_down, _, down_across, down = struct.unpack("5i", bytes(matrix)[:20])
    if across_down == down_across == 0:
        flip_x, flip_y = across < 0, down < 0
    elif across == down == 0:
        pixels = pixels.swapaxes(0, 1)
        flip_x, flip_y = down_across < 0, across_down < 0
    else:
        raise ClipError(
            f"Clip.read: {budget.name} must be turned by quarter turns, and its display matrix "
            f"turns it by {math.degrees(math.atan2(across_down, across)):.1f} degrees; re-encode it"
        )
    return np.ascontiguousarray(pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


def _damaged(budget: _Budget, index: int, reason: object) -> str:
    return (
        f"Clip.read: {budget.name} must be a video that can be decoded, and frame {index} cannot "
        f"({reason}); the file is damaged or cut short"
    )


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _write_png(path: Path, frame: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(frame).save(path, format="PNG")


def _write_video(path: Path, suffix: str, frames: np.ndarray, fps: float) -> None:
    import av

    try:
        _encode_video(path, suffix, frames, fps)
    except av.FFmpegError as error:  # not every one is an error of the operating system
        raise OSError(error.errno, error.strerror) from error


def _encode_video(path: Path, suffix: str, frames: np.ndarray, fps: float) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    codec, options = _encoder(suffix)
    rate = Fraction(fps).limit_denominator(1001)  # finds 30000/1001 and the like
    if codec == "mpeg4" and rate.numerator > 65535:  # a field of 16 bits
        rate = Fraction(round(fps))
    height, width = frames.shape[1:3]
    with av.open(str(path), "w", format=suffix[1:]) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_range = ColorRange.MPEG
        for index, frame in enumerate(_even(frames)):
            image = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            image.pts, image.time_base = index, 1 / rate
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))


def _encoder(suffix: str) -> tuple[str, dict[str, str]]:
    import av

    choices = {
        ".mp4": {"libx264": {"crf": "16", "preset": "medium"}, "mpeg4": {"qscale": "2"}},
        ".webm": {"libvpx-vp9": {"crf": "20", "b": "0", "cpu-used": "4", "row-mt": "1"}},
    }[suffix]
    for codec, options in choices.items():
        if codec in av.codecs_available:
            return codec, options
    raise OutputError(
        f"Clip.write: {suffix} needs one of FFmpeg's encoders {', '.join(choices)}, which "
        "this PyAV lacks; write .webp or .gif"
    )


def _even(frames: np.ndarray) -> Iterable[np.ndarray]:
    """Frames with a repeated last row or column where the size is odd: 4:2:0 needs pairs."""
    height, width = frames.shape[1:3]
    for frame in frames:
        yield np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _write_animation(path: Path, suffix: str, frames: np.ndarray, fps: float) -> None:
    from PIL import Image

    if suffix == ".gif":
        durations = _durations(len(frames), fps, unit=10)
        first, *rest = _with_palette(frames)
        settings: dict[str, Any] = {"format": "GIF", "optimize": False, "disposal": 1}
    else:
        durations = _durations(len(frames), fps, unit=1)
        first, *rest = [Image.fromarray(frame) for frame in frames]
        exact = frames[..., 0].size <= _LOSSLESS_PIXELS
        settings = {"format": "WEBP", "lossless": exact, "quality": 90, "method": 4}
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, **settings)


def _durations(count: int, fps: float, *, unit: int) -> list[int]:
    """Milliseconds of each frame in whole units, rounded so that errors do not add up."""
    ends = [round(index * 1000.0 / (fps * unit)) * unit for index in range(count + 1)]
    return [after - before for before, after in itertools.pairwise(ends)]


def _with_palette(frames: np.ndarray) -> "list[Image.Image]":
    """Images of one palette: exact up to 256 colours, else fitted and dithered.

    One palette for the whole clip, since a palette a frame makes still regions flicker.
    """
    from PIL import Image

    codes = frames.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    colours = np.unique(codes)
    if len(colours) <= 256:
        table = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=-1)
        palette = table.astype(np.uint8).tobytes()
        images = []
        for code in codes:
            image = Image.fromarray(np.searchsorted(colours, code).astype(np.uint8))
            image.putpalette(palette)
            images.append(image)
        return images
    pixels = frames.reshape(-1, 3)
    sample = pixels[:: -(-len(pixels) // _PALETTE_SAMPLE)]
    fitted = Image.fromarray(sample[None]).quantize(256, Image.Quantize.MEDIANCUT, kmeans=1)
    return [Image.fromarray(frame).quantize(palette=fitted) for frame in frames]
