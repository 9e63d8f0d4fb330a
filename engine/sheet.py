"""Pictures of clips: contact sheets of frames, and grids of clips that move side by side.

Both are opaque cards of one dark grey with light labels, and every frame has a thin edge of middle
grey, so that they read the same on a dark page and on a light one, whatever the frames show.
"""

import math
import os
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kinetiq.clip import Clip, check_count, spread
from kinetiq.errors import ClipError, OutputError, RequestError
from kinetiq.files import as_target, replacing

if TYPE_CHECKING:
    from PIL import ImageFont

_CARD = (24, 26, 31)
_EDGE = (92, 96, 106)
_TEXT = (228, 230, 235)
_MARGIN = 14  # around the card
_GAP = 6  # between frames of a row
_CELL_GAP = 14  # between clips of a grid, and between rows of a sheet
_TEXT_SIZE = 15
_LINE = 20  # height of a line of text
_LABEL_GAP = 4  # between a label and its frames
_LABEL_LINES = 3
_SHEET_SIDE = (96, 176)  # a frame's longer side where no scale is given: at least, at most
_GRID_SIDE = (160, 320)
_PLAIN_MARKS = {
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{RIGHTWARDS ARROW}": "->",
    "\N{LEFT SINGLE QUOTATION MARK}": "'",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT DOUBLE QUOTATION MARK}": '"',
    "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
}
_WRITE_SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def contact_sheet(
    rows: Sequence[tuple[str, Clip]], *, columns: int = 8, scale: int | None = None
) -> np.ndarray:
    """A picture with one row of evenly spaced frames per clip, each under its label.

    A clip of fewer frames than `columns` shows each of them once. A label is wrapped to the width
    of the sheet, one of more than three lines ends in an ellipsis, and letters outside ASCII are
    replaced, which Pillow's own font lacks.

    Args:
        rows: label and clip of each row; an empty label takes no space.
        columns: frames in a row.
        scale: enlarge frames by this whole number, pixels staying sharp; by default small frames
            are enlarged and large ones made smaller.

    Returns:
        uint8, [height, width, 3].

    Raises:
        RequestError: there is no row, or an argument is out of range.
    """
    _check_pairs("contact_sheet: rows", rows)
    check_count("contact_sheet: columns", columns)
    shown = [
        (label, _sized(_pick(clip, columns), scale, _SHEET_SIDE, "contact_sheet"))
        for label, clip in rows
    ]
    width = max(*(len(frames) * _pitch(frames) - _GAP for _, frames in shown), _least_width())
    font = _font()
    blocks = []
    for label, frames in shown:
        lines = _wrap(label, width, font)
        top = _label_height(len(lines))
        block = np.empty((top + frames.shape[1] + 2, width, 3), np.uint8)
        block[:] = _CARD
        _draw_lines(block, lines, font)
        for index, frame in enumerate(frames):
            _place(block, frame, top, index * _pitch(frames))
        blocks.append(block)
    return _card(_stack(blocks))


def side_by_side(
    clips: Sequence[tuple[str, Clip]], *, columns: int | None = None, scale: int | None = None
) -> Clip:
    """One clip that shows several, each under its label, in a grid; made for a looping picture.

    It plays at the rate of the first clip: frame k of the grid is frame k of every clip.

    Args:
        clips: label and clip of each cell, row by row; all of one number of frames.
        columns: cells in a row; by default up to four are in one row, more in a near square.
        scale: enlarge frames by this whole number, pixels staying sharp; by default small frames
            are enlarged and large ones made smaller.

    Raises:
        ClipError: the clips differ in their number of frames.
        RequestError: there is no clip, or an argument is out of range.
    """
    _check_pairs("side_by_side: clips", clips)
    if columns is not None:
        check_count("side_by_side: columns", columns)
    first = clips[0][1]
    for label, clip in clips:
        if clip.num_frames != first.num_frames:
            raise ClipError(
                f"side_by_side: all clips must have {first.num_frames} frames as the first has, "
                f"and {label!r} has {clip.num_frames}; use resample({first.num_frames})"
            )
    shown = [
        (label, _sized(clip.frames, scale, _GRID_SIDE, "side_by_side")) for label, clip in clips
    ]
    across = columns or (len(shown) if len(shown) <= 4 else math.ceil(math.sqrt(len(shown))))
    across = min(across, len(shown))
    width = max(*(frames.shape[2] + 2 for _, frames in shown), _least_width())
    font = _font()
    lines = [_wrap(label, width, font) for label, _ in shown]
    bands = []
    for start in range(0, len(shown), across):
        here = range(start, min(start + across, len(shown)))
        top = _label_height(max(len(lines[index]) for index in here))
        height = top + max(shown[index][1].shape[1] for index in here) + 2
        size = (first.num_frames, height, across * (width + _CELL_GAP) - _CELL_GAP, 3)
        band = np.empty(size, np.uint8)
        band[:] = _CARD
        for index in here:
            left = (index - start) * (width + _CELL_GAP)
            frames = shown[index][1]
            # a short label sits on its frames, not at the height of the longest of the band
            space = top - _label_height(len(lines[index]))
            _draw_lines(band[0, space:, left : left + width], lines[index], font)
            band[:, :top, left : left + width] = band[0, :top, left : left + width]
            _place(band, frames, top, left)
        bands.append(band)
    return Clip(_card(_stack(bands)), first.fps)


def write_image(array: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write a picture as .png, .jpg or .webp (without loss); it has its name only once whole.

    Args:
        array: uint8, [height, width, 3].
        path: where to; the folder that it is in must exist.

    Raises:
        ClipError: `array` is not a picture.
        OutputError: the suffix is unknown, or the path cannot be written.
    """
    from PIL import Image

    given: object = array  # whatever the caller gave
    is_array = isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.size > 0
    if not is_array or array.ndim != 3 or array.shape[2] != 3:
        came = (
            f"{given.dtype} {list(given.shape)}" if isinstance(given, np.ndarray) else repr(given)
        )
        raise ClipError(f"write_image: array must be uint8 [height, width, 3], got {came}")
    suffix = as_target(path, "write_image").suffix.lower()
    if suffix not in _WRITE_SUFFIXES:
        raise OutputError(
            f"write_image: {path} must end in one of {', '.join(_WRITE_SUFFIXES)}, got {suffix!r}"
        )
    with replacing(path, "write_image") as temporary:
        options = {".webp": {"lossless": True}, ".png": {}}.get(suffix, {"quality": 95})
        Image.fromarray(array).save(temporary, format=_WRITE_SUFFIXES[suffix], **options)


def _check_pairs(what: str, pairs: object) -> None:
    if not isinstance(pairs, Sequence) or isinstance(pairs, str) or not pairs:
        raise RequestError(f"{what} must be pairs of label and clip, at least one, got {pairs!r}")
    for index, pair in enumerate(pairs):
        fine = isinstance(pair, tuple | list) and len(pair) == 2
        if not fine or not isinstance(pair[0], str) or not isinstance(pair[1], Clip):
            raise RequestError(
                f"{what} must be pairs (label, Clip), and number {index} is {pair!r}"
            )


def _pick(clip: Clip, columns: int) -> np.ndarray:
    chosen: np.ndarray = clip.frames[spread(clip.num_frames, min(columns, clip.num_frames))]
    return chosen


def _sized(frames: np.ndarray, scale: int | None, side: tuple[int, int], where: str) -> np.ndarray:
    """Frames at the size that they are shown at; without `scale`, `side` bounds the longer side."""
    if scale is not None:
        check_count(f"{where}: scale", scale)
        times = scale
    else:
        least, most = side
        longer = max(frames.shape[1:3])
        if longer > most:
            height, width = (max(round(n * most / longer), 1) for n in frames.shape[1:3])
            return Clip(frames, 1.0).resize(height, width, "stretch").frames
        times = max(-(-least // longer), 1)
    return frames.repeat(times, axis=1).repeat(times, axis=2)


def _pitch(frames: np.ndarray) -> int:
    """From the left of one frame of a row to the left of the next."""
    return int(frames.shape[2]) + 2 + _GAP


def _least_width() -> int:
    """A card is wide enough for a dozen letters, however small its frames."""
    return 8 * _TEXT_SIZE


def _label_height(lines: int) -> int:
    return lines * _LINE + _LABEL_GAP if lines else 0


def _place(block: np.ndarray, frames: np.ndarray, top: int, left: int) -> None:
    """Draw frames [..., height, width, 3] with an edge of one pixel around them."""
    height, width = frames.shape[-3:-1]
    block[..., top : top + height + 2, left : left + width + 2, :] = _EDGE
    block[..., top + 1 : top + 1 + height, left + 1 : left + 1 + width, :] = frames


def _stack(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Blocks [..., height, width, 3] one below the other."""
    parts = []
    for block in blocks:
        gap = np.empty((*block.shape[:-3], _CELL_GAP, *block.shape[-2:]), np.uint8)
        gap[:] = _CARD
        parts += [gap, block]
    return np.concatenate(parts[1:], axis=-3)


def _card(content: np.ndarray) -> np.ndarray:
    """Content with a margin."""
    *before, height, width, _ = content.shape
    card = np.empty((*before, height + 2 * _MARGIN, width + 2 * _MARGIN, 3), np.uint8)
    card[:] = _CARD
    card[..., _MARGIN : _MARGIN + height, _MARGIN : _MARGIN + width, :] = content
    return card


def _font() -> "ImageFont.FreeTypeFont | ImageFont.ImageFont":
    from PIL import ImageFont

    return ImageFont.load_default(size=_TEXT_SIZE)


def _wrap(
    label: str, width: int, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont"
) -> list[str]:
    """Lines no wider than `width` pixels; a word that is too long for a line is broken."""
    lines: list[str] = []
    line = ""
    for word in _plain(label).split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        line = word
        while font.getlength(line) > width:
            fits = _fitting(line, width, font)
            lines.append(line[:fits])
            line = line[fits:]
    if line:
        lines.append(line)
    if len(lines) > _LABEL_LINES:
        last = lines[_LABEL_LINES - 1]
        while font.getlength(last + "...") > width:
            last = last[:-1]
        lines = [*lines[: _LABEL_LINES - 1], last.rstrip() + "..."]
    return lines


def _plain(text: str) -> str:
    """Text in ASCII, all that Pillow's own font can draw: accents go, the rest becomes "?"."""
    for mark, plain in _PLAIN_MARKS.items():
        text = text.replace(mark, plain)
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return bare.encode("ascii", "replace").decode("ascii")


def _fitting(text: str, width: int, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont") -> int:
    """How many letters from the start fit, at least one."""
    count = len(text)
    while count > 1 and font.getlength(text[:count]) > width:
        count -= 1
    return count


def _draw_lines(
    block: np.ndarray,
    lines: Sequence[str],
    font: "ImageFont.FreeTypeFont | ImageFont.ImageFont",
) -> None:
    """Write lines at the top left of a block [height, width, 3], in place."""
    from PIL import Image, ImageDraw

    if not lines:
        return
    image = Image.fromarray(np.ascontiguousarray(block[: len(lines) * _LINE]))
    draw = ImageDraw.Draw(image)
    for index, line in enumerate(lines):
        draw.text((0, index * _LINE + 1), line, fill=_TEXT, font=font)
    block[: len(lines) * _LINE] = np.asarray(image)
