"""Read back what a clip of the sprites world shows, by fitting the renderer to it.

1. The background is the clip's commonest colour.
2. Every frame is resampled about a first guess of the shape's centre, and the mean over frames, the
   portrait, is compared with a bank of portraits of every shape, size, texture and blur.
3. The best few are refined by least squares over radius, place, blur and texture phase. The
   colour is linear in the pixels, so it is solved for rather than searched.
4. With the winner, centre and radius are refined in every frame.
5. Where two shapes are looked for, and one leaves much of the foreground bare, the foreground is
   split and each part is fitted; two are reported where they explain the clip much better than one.

Blur is fitted because a generated clip is softer than a rendered one: crisp edges would take
stripes at half of their contrast for plain, and a soft cross for a circle.

Clips of 33 to 64 pixels are first averaged down to 32. Lengths are in units of the frame's width.
"""

import colorsys
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kinetiq.errors import ClipError, RequestError
from kinetiq.sprites.world import (
    SHAPES,
    TEXTURE_DOT,
    TEXTURE_PERIOD,
    TEXTURE_SHADE,
    TEXTURES,
    colour_name,
    signed_distance,
)

COLOUR_TOLERANCE = 15.0  # degrees; names are rendered within 10, a generated hue may drift by 5
SMALLEST, LARGEST, MOST_FRAMES = 32, 64, 32

_SIZE = 32  # clips are read at this size, which the bank of portraits is drawn for
_CHUNK = 16  # clips fitted together: larger batches leave the processor's cache
_MARGIN = 1  # pixels by which a portrait may be off centre when it meets the bank
_HALF = 12  # pixels from the centre to the edge of the bank's portraits
_RADII = (0.12, 0.14, 0.162, 0.188, 0.215, 0.245, 0.275)
_BLURS = (0.5, 1.2)  # pixels; the mean over frames softens even a crisp clip
_SLIDES = ((1.5, 0.0), (-1.5, 0.0), (0.0, 1.5), (0.0, -1.5))  # pixels
_FINALISTS = 6  # of 15 pairs of shape and texture, refined by least squares
# A parameter row of `_draw`: radius, x, y, blur (standard deviation in pixels), and the texture's
# phase u, v (in periods).
_PARAMETERS = 6
_RADIUS, _X, _Y, _BLUR, _U, _V = range(_PARAMETERS)
_STEP = (0.25 / _SIZE, 0.25 / _SIZE, 0.25 / _SIZE, 0.1, 0.05, 0.05)  # of finite differences
_LOW = (0.05, -0.3, -0.3, 0.1, -8.0, -8.0)
_HIGH = (0.45, 1.3, 1.3, 2.5, 8.0, 8.0)
# A shape is there when it explains this share of the energy that the background leaves around it
# (clean renders 0.99, generated ones above 0.8, uniform noise below 0.2) ...
_EXPLAINED = 0.5
_CONTRAST = 0.15  # ... and differs from the background by this much in its strongest channel.
_FRAME_GAIN = 0.35  # share of the clip's contrast that a frame needs for its shape to be visible
_FRAME_BARE = 0.3  # share of its area that another shape must leave bare, or the place is a guess
_NEAR = 0.1  # a background's pixels differ by less than this
_PALE = 0.2  # saturation under which a hue has no name
_SHARE_OF_SECOND = 0.06  # of the foreground: less is the first shape's edge, not a second shape
# A second shape is looked for where more than this share of the foreground lies over 3 pixels
# outside of the first. Nine pairs of shapes in ten leave more; crisp ellipses and blots, which two
# shapes would fit better than one, leave 0.02 at most ...
_BARE_OF_ONE, _EDGE = 0.03, 3
# ... and is there if two leave less than this share of the energy that one leaves. Two leave 0.57
# at most of a rendered pair, and less than 0.52 of three in four that were blurred by 1.3 pixels;
# halves of a blurred single shape leave more than the whole did.
_LEFT_BY_TWO = 0.8
# A path of which more is unseen is a guess: with 2 of 8 frames interpolated, 0.92 of the hardest
# motion (bouncing) are still told from the others, with 3 of 8 only 0.70.
_SHARE_SEEN = 0.75
# A shape has a name when its outline is no softer than this, in radii, and the next best shape
# leaves clearly more of it unexplained. Rendered clips with a blur of up to 1.3 pixels and noise
# stay below 0.25 and 0.74; Gaussian blobs exceed 0.32, ellipses 0.80.
_SOFTEST = 0.3
_LEFT_OF_NEXT = 0.8


@dataclass(frozen=True, eq=False)
class SpriteReading:
    """One shape as read from a clip.

    Attributes:
        shape: the best of `world.SHAPES`, None where none of them fits well: its outline is softer
            than 0.3 radii, or the next best explains it nearly as well.
        shape_scores: for every shape, the share of energy explained by its best fit (at most 1).
        hue: degrees.
        saturation: 0 to 1.
        value: 0 to 1, of the bright part of the texture.
        colour: name whose centre lies within `COLOUR_TOLERANCE` of the hue, None between names and
            for a shape too pale to have a hue.
        texture: the best of `world.TEXTURES`.
        radius: median over visible frames, in widths.
        softness: blur of the outline (standard deviation) in radii, median over visible frames.
        path: centres [frames, 2] as (x, y) in widths; frames in which the shape is not visible are
            interpolated from the nearest ones. None where it is visible in fewer than three
            quarters of the frames.
        visible: [frames] bool.
        residual: root mean square error of the fitted portrait, in units of brightness.
        frame_hue: degrees, [frames].
        frame_texture: mean darkness of the texture, 0 (plain) to 1, [frames].
        frame_radius: widths, [frames].
    """

    shape: str | None
    shape_scores: dict[str, float]
    hue: float
    saturation: float
    value: float
    colour: str | None
    texture: str
    radius: float
    softness: float
    path: np.ndarray | None
    visible: np.ndarray
    residual: float
    frame_hue: np.ndarray
    frame_texture: np.ndarray
    frame_radius: np.ndarray


@dataclass(frozen=True, eq=False)
class ClipReading:
    """What a clip shows.

    Attributes:
        sprites: the shapes found, the one that covers most first; empty when there is none.
        frames: length of the clip.
        background_hue: degrees.
        background_value: 0 to 1.
        background_colour: name within `COLOUR_TOLERANCE`, or None.
        residual: root mean square difference between the clip and what was read, redrawn.
    """

    sprites: tuple[SpriteReading, ...]
    frames: int
    background_hue: float
    background_value: float
    background_colour: str | None
    residual: float


@dataclass(frozen=True)
class _Fit:
    """Fitted shapes of a batch; `params` holds one row of `_draw` for every frame."""

    shape: Tensor  # [batch] index into SHAPES
    texture: Tensor  # [batch]
    params: Tensor  # [batch, frames, 6]
    shape_scores: Tensor  # [batch, shapes]
    explained: Tensor  # [batch]
    residual: Tensor  # [batch]


def read_clip(frames: np.ndarray | Tensor, count: int = 1) -> ClipReading:
    """Read one clip.

    Args:
        frames: [frames, size, size, 3], uint8 or floats in [0, 1]; 1 to 32 frames of 32 to 64
            pixels.
        count: how many shapes to look for at most, 1 or 2.

    Returns:
        The reading. A clip in which no shape can be found has no sprites; that is not an error.

    Raises:
        ClipError: the shape, type or values of `frames`.
        RequestError: `count` is neither 1 nor 2.
    """
    clip = _as_tensor(frames)
    if clip.ndim != 4:
        raise ClipError(
            f"read_clip: frames must be [frames, size, size, 3], got {list(clip.shape)}"
        )
    return read_clips(clip[None], count)[0]


def read_clips(
    clips: np.ndarray | Tensor | Sequence[np.ndarray] | Sequence[Tensor], count: int = 1
) -> list[ClipReading]:
    """Read many clips of one size and length; each reading is independent of its neighbours.

    Args:
        clips: [clips, frames, size, size, 3], or a sequence of clips; otherwise as `read_clip`.
        count: how many shapes to look for in each clip at most, 1 or 2.

    Raises:
        ClipError: the shape, type or values of `clips`.
        RequestError: `count` is neither 1 nor 2.
    """
    if count not in (1, 2):
        raise RequestError(f"read_clips: count must be 1 or 2, got {count!r}")
    batch = _as_batch(clips)
    if len(batch) == 0:
        return []
    readings = []
    with torch.inference_mode():
        for first in range(0, len(batch), _CHUNK):
            readings += _read(_shrink(_as_float(batch[first : first + _CHUNK])), count)
    return readings


def _as_batch(clips: np.ndarray | Tensor | Sequence[np.ndarray] | Sequence[Tensor]) -> Tensor:
    if isinstance(clips, np.ndarray | Tensor):
        batch = _as_tensor(clips)
    else:
        tensors = [_as_tensor(clip) for clip in clips]
        if not tensors:
            return torch.empty(0)
        kinds = {(tuple(clip.shape), clip.dtype) for clip in tensors}
        if len(kinds) > 1:
            shapes = ", ".join(sorted(f"{list(shape)} {dtype}" for shape, dtype in kinds))
            raise ClipError(f"read_clips: clips must be of one shape and type, got {shapes}")
        batch = torch.stack(tensors)
    shape = list(batch.shape)
    if batch.ndim != 5 or shape[4] != 3 or shape[2] != shape[3]:
        raise ClipError(f"read_clips: clips must be [clips, frames, size, size, 3], got {shape}")
    if not SMALLEST <= shape[2] <= LARGEST:
        raise ClipError(
            f"read_clips: frames must be {SMALLEST} to {LARGEST} pixels wide, got {shape[2]}; "
            "resize the clip first"
        )
    if not 1 <= shape[1] <= MOST_FRAMES:
        raise ClipError(f"read_clips: clips must have 1 to {MOST_FRAMES} frames, got {shape[1]}")
    if batch.dtype != torch.uint8 and not batch.is_floating_point():
        raise ClipError(f"read_clips: clips must be uint8 or floats, got {batch.dtype}")
    return batch


def _as_tensor(values: np.ndarray | Tensor) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    try:
        # A copy, because torch takes neither negative strides nor read-only memory.
        return torch.from_numpy(np.array(values))
    except (TypeError, ValueError) as error:
        raise ClipError(
            f"read_clips: a clip must be an array of numbers, got {type(values).__name__} ({error})"
        ) from error


def _as_float(batch: Tensor) -> Tensor:
    if batch.dtype == torch.uint8:
        return batch.to("cpu", torch.float32) / 255.0
    batch = batch.to("cpu", torch.float32)
    if not batch.isfinite().all():
        raise ClipError("read_clips: values must be finite, got NaN or infinity")
    low, high = batch.min().item(), batch.max().item()
    if low < -1e-3 or high > 1.0 + 1e-3:
        raise ClipError(
            f"read_clips: floats must lie in [0, 1], got {low:.3g} to {high:.3g}; clamp them, "
            "or divide bytes by 255"
        )
    return batch


def _shrink(clips: Tensor) -> Tensor:
    """Clips at the size they are read at, channels before rows: [clips, frames, 3, 32, 32]."""
    planes = clips.movedim(-1, 2)
    if planes.shape[-1] == _SIZE:
        return planes.contiguous()
    flat = functional.interpolate(
        planes.flatten(0, 1), size=(_SIZE, _SIZE), mode="bilinear", antialias=True
    )
    return flat.view(*planes.shape[:2], 3, _SIZE, _SIZE)


def _read(clips: Tensor, count: int) -> list[ClipReading]:
    """Readings of [clips, frames, 3, 32, 32]."""
    background = _background(clips)  # [clips, 3]
    lifted = clips - background[:, None, :, None, None]
    seed = _foreground(lifted)  # [clips, frames, 32, 32]
    whole = torch.ones_like(seed)
    fit = _fit(lifted, background, seed, whole)
    present = seed.flatten(1).sum(1) > 0
    readings = _report(clips, lifted, background, [fit], [whole], [present])
    if count == 1:
        return readings
    bare = _bare_share(fit, seed).tolist()
    rows = [
        index
        for index, alone in enumerate(readings)
        if bare[index] > _BARE_OF_ONE or not alone.sprites
    ]
    if rows:
        some = clips[rows], lifted[rows], background[rows]
        for index, pair in zip(rows, _report(*some, *_fit_pair(*some, seed[rows])), strict=True):
            alone = readings[index]
            if not alone.sprites or pair.residual**2 < _LEFT_BY_TWO * alone.residual**2:
                readings[index] = pair
    return readings


def _bare_share(fit: _Fit, seed: Tensor) -> Tensor:
    """Share of the foreground [clips, frames, 32, 32] that a shape leaves bare, [clips]."""
    near = functional.max_pool2d(_covers(fit), 2 * _EDGE + 1, stride=1, padding=_EDGE)
    total = seed.flatten(1).sum(1).clamp(min=1e-6)
    return (seed * (1.0 - near)).flatten(1).sum(1) / total


def _background(clips: Tensor) -> Tensor:
    """The commonest colour, [clips, 3].

    Shapes cover less than half of a clip, so the median of each channel lies among the
    background's values. The median of the pixels near that is free of the shapes, and unlike a
    mean it is not lifted by noise that was cut off at black.
    """
    pixels = clips.movedim(2, 1).flatten(2)  # [clips, 3, pixels]
    centre = pixels.median(dim=2, keepdim=True).values
    far = (pixels - centre).abs().amax(dim=1, keepdim=True) > _NEAR
    near = pixels.masked_fill(far, torch.nan).nanmedian(dim=2).values
    return torch.where(near.isnan(), centre.squeeze(2), near)


def _foreground(lifted: Tensor) -> Tensor:
    """How far each pixel stands out from background and noise, [clips, frames, 32, 32]."""
    smooth = functional.avg_pool2d(lifted.flatten(0, 1), 3, stride=1, padding=1)
    distance = smooth.view(lifted.shape).square().sum(2).sqrt()
    noise = distance.flatten(1).median(dim=1).values[:, None, None, None]
    return torch.relu(distance - (3.0 * noise).clamp(min=0.08))


def _centroid(weight: Tensor) -> Tensor:
    """Centre of the weight in each frame, [clips, frames, 2].

    A second and a third look keep to a window about the first, so that a speck far away does not
    pull the centre. A frame without weight takes the clip's mean centre.
    """
    axis = (torch.arange(_SIZE) + 0.5) / _SIZE
    whole = weight.sum(1, keepdim=True)
    centre = _weighted_mean(whole, axis, torch.full((*whole.shape[:2], 2), 0.5))
    centre = _weighted_mean(weight, axis, centre.expand(-1, weight.shape[1], -1))
    for _ in range(2):
        near_x = ((axis - centre[..., :1]).abs() < 0.32).float()
        near_y = ((axis - centre[..., 1:]).abs() < 0.32).float()
        centre = _weighted_mean(weight * near_x[..., None, :] * near_y[..., :, None], axis, centre)
    return centre


def _weighted_mean(weight: Tensor, axis: Tensor, otherwise: Tensor) -> Tensor:
    total = weight.sum((-2, -1))
    x = (weight.sum(-2) * axis).sum(-1) / total.clamp(min=1e-6)
    y = (weight.sum(-1) * axis).sum(-1) / total.clamp(min=1e-6)
    return torch.where(total[..., None] > 1e-3, torch.stack([x, y], -1), otherwise)


def _draw(
    shape: Tensor, texture: Tensor, params: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Cover and bright cover (cover times brightness) of shapes, each [rows, points].

    What `world.render` draws, blurred.

    Args:
        shape: index into `SHAPES`, [rows].
        texture: index into `TEXTURES`, [rows].
        params: [rows, 6].
        x: where to draw, in widths, [points] of a square of pixels, row by row.
        y: as `x`.
    """
    radius, centre_x, centre_y, _, phase_u, phase_v = params[..., None].unbind(1)
    across, down = x - centre_x, y - centre_y
    distance = torch.empty_like(across)
    for index, name in enumerate(SHAPES):
        rows = (shape == index).nonzero().squeeze(1)
        if len(rows):
            distance[rows] = signed_distance(name, across[rows], down[rows], radius[rows])
    cover = (0.5 - distance * _SIZE).clamp_(0.0, 1.0)
    bright = cover.clone()
    for index, name in enumerate(TEXTURES):
        rows = (texture == index).nonzero().squeeze(1)
        if name == "plain" or not len(rows):
            continue
        sharp = _SIZE * TEXTURE_PERIOD
        u = (across[rows] / TEXTURE_PERIOD + phase_u[rows]) % 1.0 - 0.5
        if name == "striped":
            dark = 0.5 + sharp * (0.25 - u.abs())
        else:
            v = (down[rows] / TEXTURE_PERIOD + phase_v[rows]) % 1.0 - 0.5
            dark = 0.5 + sharp * (TEXTURE_DOT - torch.hypot(u, v))
        bright[rows] *= 1.0 - (1.0 - TEXTURE_SHADE) * dark.clamp_(0.0, 1.0)
    blurred = _blurred(torch.stack([cover, bright]), params[:, _BLUR])
    return blurred[0], blurred[1]


def _blurred(images: Tensor, deviation: Tensor) -> Tensor:
    """Images [any, rows, points] of a square, smoothed by a Gaussian of each row's deviation."""
    side = math.isqrt(images.shape[-1])
    place = torch.arange(side, dtype=torch.float32)
    apart = (place[:, None] - place).square()
    kernel = torch.exp(-apart / (2.0 * deviation.square())[:, None, None])
    kernel = kernel / kernel.sum(-1, keepdim=True)
    squares = images.view(*images.shape[:-1], side, side)
    return (kernel @ squares @ kernel.mT).flatten(-2)


def _descend(
    residual: Callable[[Tensor], Tensor], start: Tensor, free: Sequence[int], rounds: int
) -> tuple[Tensor, Tensor]:
    """Levenberg-Marquardt by finite differences, for many rows at once.

    Args:
        residual: from parameters [rows, 6] to residuals [rows, values].
        start: [rows, 6].
        free: columns that may change.
        rounds: how many steps.

    Returns:
        The parameters, and their sum of squared residuals [rows].
    """
    step, low, high = (torch.tensor(row) for row in (_STEP, _LOW, _HIGH))
    params, left = start, residual(start)
    energy = left.square().sum(1)
    damping = torch.full_like(energy, 1e-2)
    columns = torch.eye(_PARAMETERS)[list(free)] * step
    identity = torch.eye(len(free))
    for _ in range(rounds):
        slopes = torch.stack([residual(params + column) - left for column in columns], -1)
        gram = slopes.mT @ slopes
        downhill = -(slopes.mT @ left[..., None])
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        floor = 1e-4 * diagonal.amax(-1, keepdim=True) + 1e-9  # a plain shape has no phase
        gram = gram + (damping[:, None] * diagonal + floor)[..., None] * identity
        move = torch.linalg.solve(gram, downhill).squeeze(-1).clamp(-4.0, 4.0)
        trial = torch.maximum(torch.minimum(params + move @ columns, high), low)
        after = residual(trial)
        better = after.square().sum(1) < energy
        params = torch.where(better[:, None], trial, params)
        left = torch.where(better[:, None], after, left)
        energy = left.square().sum(1)
        damping = torch.where(better, damping * 0.3, damping * 6.0).clamp(1e-5, 1e4)
    return params, energy


def _fit(
    lifted: Tensor,
    background: Tensor,
    seed: Tensor,
    owned: Tensor,
    centres: Tensor | None = None,
) -> _Fit:
    """Fit one shape to every clip.

    Args:
        lifted: clips minus their background, [clips, frames, 3, 32, 32].
        background: [clips, 3].
        seed: where the shape roughly is, [clips, frames, 32, 32].
        owned: 0 where a pixel belongs to another shape, else 1; as `seed`.
        centres: first guess, [clips, frames, 2]; by default the centroid of `seed`.
    """
    count = len(lifted)
    centres = _centroid(seed) if centres is None else centres
    portrait, weight = _portrait(lifted, owned, centres)
    shape, texture, start, bank_energy = _compare(portrait, weight, background)
    best, energy, finals = _refine(portrait, weight, background, shape, texture, start)
    # The first winner only has to bring the frames into line for a sharper portrait.
    row = torch.arange(count)
    centred = _refine_frames(
        lifted, background, owned, centres, shape[row, best], texture[row, best], finals[row, best]
    )
    portrait, weight = _portrait(lifted, owned, centred[..., _X : _Y + 1])
    finals = finals.clone()
    finals[..., _X : _Y + 1] = 0.0
    finals = torch.cat([finals, _slid(finals[row, best])], 1)
    shape, texture = (
        torch.cat([index, index[row, best, None].expand(-1, len(_SLIDES))], 1)
        for index in (shape, texture)
    )
    best, energy, finals = _refine(portrait, weight, background, shape, texture, finals)
    shape_of, texture_of = shape[row, best], texture[row, best]
    params = _refine_frames(
        lifted,
        background,
        owned,
        centred[..., _X : _Y + 1],
        shape_of,
        texture_of,
        finals[row, best],
        edges_too=True,
    )
    total = (portrait.square() * weight[:, None]).flatten(1).sum(1).clamp(min=1e-9)
    lowest = bank_energy.clone()  # [clips, shapes]; the bank's word stands for those not refined
    lowest.scatter_reduce_(1, shape, energy, "amin")
    lowest = torch.where(
        torch.arange(len(SHAPES)) == shape_of[:, None], energy[row, best][:, None], lowest
    )
    left = energy[row, best]
    return _Fit(
        shape=shape_of,
        texture=texture_of,
        params=params,
        shape_scores=1.0 - lowest / total[:, None],
        explained=1.0 - left / total,
        residual=(left / (3.0 * weight.flatten(1).sum(1)).clamp(min=1e-6)).sqrt(),
    )


def _slid(params: Tensor) -> Tensor:
    """Starts whose outline lies beside that of `params` [clips, 6] over the same texture.

    Where a dark stripe at the edge is hardly brighter than the background, an outline one stripe
    too far is a local minimum that small steps do not leave.
    """
    slide = torch.tensor(_SLIDES) / _SIZE
    starts = params[:, None].repeat(1, len(slide), 1)
    starts[..., _X : _Y + 1] += slide
    starts[..., _U : _V + 1] += slide / TEXTURE_PERIOD
    return starts


def _portrait(lifted: Tensor, owned: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over frames about the centre [clips, 3, side, side], and weight [clips, side, side].

    Pixels outside of the frame, or of another shape, have no weight.
    """
    count, frames = lifted.shape[:2]
    offset = torch.arange(-_HALF - _MARGIN, _HALF + _MARGIN + 1) / _SIZE
    offset_y, offset_x = torch.meshgrid(offset, offset, indexing="ij")
    places = centres[..., None, None, :] + torch.stack([offset_x, offset_y], -1)
    grid = places * 2.0 - 1.0  # grid_sample counts from -1 to 1
    planes = torch.cat([lifted * owned[:, :, None], owned[:, :, None]], 2)
    seen = functional.grid_sample(planes.flatten(0, 1), grid.flatten(0, 1), align_corners=False)
    total = seen.view(count, frames, 4, *seen.shape[-2:]).sum(1)
    weight = total[:, 3]
    return total[:, :3] / weight.clamp(min=1e-3)[:, None], weight / frames


@functools.cache
def _bank() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Every portrait to compare with: shape, texture, parameters, cover and bright cover."""
    phases = {
        "plain": [(0.0, 0.0)],
        "striped": [(u / 6, 0.0) for u in range(6)],
        "dotted": [(u / 5, v / 5) for u in range(5) for v in range(5)],
    }
    rows = [
        (shape, texture, (radius, 0.0, 0.0, blur, *phase))
        for shape in range(len(SHAPES))
        for texture, name in enumerate(TEXTURES)
        for blur in _BLURS
        for radius in _RADII
        for phase in phases[name]
    ]
    shape = torch.tensor([row[0] for row in rows])
    texture = torch.tensor([row[1] for row in rows])
    params = torch.tensor([row[2] for row in rows])
    x, y = _points(_HALF)
    return shape, texture, params, *_draw(shape, texture, params, x, y)


def _points(half: int) -> tuple[Tensor, Tensor]:
    axis = torch.arange(-half, half + 1) / _SIZE
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x.flatten(), y.flatten()


def _compare(
    portrait: Tensor, weight: Tensor, background: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best pairs of shape and texture of each clip by the bank.

    A portrait shows cover * (brightness * colour - background) per channel; with
    y = portrait + cover * background and A = bright cover, the colour that fits best is
    <A, y> / <A, A> and leaves <y, y> - <A, y>² / <A, A>. All products are matrix products of the
    bank with the portrait at nine offsets.

    Returns:
        Shape and texture [clips, finalists], their parameters [clips, finalists, 6], and the lowest
        energy of every shape [clips, shapes].
    """
    shape, texture, params, cover, bright = _bank()
    count, side = len(portrait), 2 * _HALF + 1
    moves = [(x, y) for y in range(-_MARGIN, _MARGIN + 1) for x in range(-_MARGIN, _MARGIN + 1)]

    def views(image: Tensor) -> Tensor:
        """Windows at every offset, [points, offsets * the rest]."""
        windows = [
            image[..., _MARGIN + y : _MARGIN + y + side, _MARGIN + x : _MARGIN + x + side]
            for x, y in moves
        ]
        return torch.stack(windows).flatten(-2).flatten(0, -2).T

    weighted = portrait * weight[:, None]
    per_channel = (-1, len(moves), count, 3)
    bright_image = (bright @ views(weighted)).view(per_channel)
    cover_image = (cover @ views(weighted)).view(per_channel)
    per_clip = (-1, len(moves), count, 1)
    weights = views(weight)
    bright_cover = ((bright * cover) @ weights).view(per_clip)
    cover_cover = (cover.square() @ weights).view(per_clip)
    bright_bright = (bright.square() @ weights).view(per_clip).clamp(min=1e-6)
    image_image = views(weighted * portrait).sum(0).view(per_channel)
    along = (bright_image + background * bright_cover) / bright_bright
    target = image_image + 2 * background * cover_image + background.square() * cover_cover
    # A colour channel can be neither negative nor brighter than white.
    colour = along.clamp(0.0, 1.0)
    energy = (target - colour * (2 * along - colour) * bright_bright).sum(
        -1
    )  # [bank, moves, clips]
    energy, move = energy.min(1)
    pair = shape * len(TEXTURES) + texture
    best = torch.stack(
        [
            energy.masked_fill((pair != index)[:, None], torch.inf).argmin(0)
            for index in range(len(SHAPES) * len(TEXTURES))
        ]
    )  # [pairs, clips], rows of the bank
    lowest = energy.gather(0, best)
    ranked = lowest.topk(_FINALISTS, dim=0, largest=False).indices
    chosen = best.gather(0, ranked).T  # [clips, finalists]
    offset = torch.tensor(moves) / _SIZE
    start = params[chosen].clone()
    start[..., _X : _Y + 1] = offset[move.T.gather(1, chosen)]
    by_shape = lowest.view(len(SHAPES), len(TEXTURES), count).amin(1).T
    return shape[chosen], texture[chosen], start, by_shape.contiguous()


def _colour(bright: Tensor, target: Tensor, weight: Tensor, highest: float = 1.0) -> Tensor:
    """The colour from 0 to `highest` that explains `target` [rows, 3, points] best, [rows, 3]."""
    weighted = bright * weight
    along = (target * weighted[:, None]).sum(-1)
    return (along / (bright * weighted).sum(-1).clamp(min=1e-6)[:, None]).clamp(0.0, highest)


def _refine(
    portrait: Tensor,
    weight: Tensor,
    background: Tensor,
    shape: Tensor,
    texture: Tensor,
    start: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Refine the finalists: winner [clips], energies and parameters [clips, finalists, ...]."""
    count, finalists = shape.shape
    x, y = _points(_HALF + _MARGIN)
    image = portrait.flatten(2).repeat_interleave(finalists, 0)
    mass = weight.flatten(1).repeat_interleave(finalists, 0)
    root = mass.sqrt()[:, None]
    ground = background.repeat_interleave(finalists, 0)[..., None]
    shapes, textures = shape.flatten(), texture.flatten()

    def residual(params: Tensor) -> Tensor:
        cover, bright = _draw(shapes, textures, params, x, y)
        target = image + ground * cover[:, None]
        colour = _colour(bright, target, mass)
        return ((target - colour[..., None] * bright[:, None]) * root).flatten(1)

    params, energy = _descend(residual, start.flatten(0, 1), range(_PARAMETERS), rounds=6)
    energy = energy.view(count, finalists)
    return energy.argmin(1), energy, params.view(count, finalists, _PARAMETERS)


def _refine_frames(
    lifted: Tensor,
    background: Tensor,
    owned: Tensor,
    centres: Tensor,
    shape: Tensor,
    texture: Tensor,
    portrait_params: Tensor,
    *,
    edges_too: bool = False,
) -> Tensor:
    """Centre of the chosen shape in every frame, [clips, frames, 6].

    With `edges_too` radius and blur as well: the portrait's blur holds that of resampling.
    """
    count, frames = lifted.shape[:2]
    start = portrait_params[:, None].repeat(1, frames, 1)
    start[..., _X : _Y + 1] += centres
    x, y = _pixels()
    image = lifted.flatten(0, 1).flatten(2)
    mass = owned.flatten(0, 1).flatten(1)
    ground = background.repeat_interleave(frames, 0)[..., None]
    shapes, textures = shape.repeat_interleave(frames), texture.repeat_interleave(frames)

    def residual(params: Tensor) -> Tensor:
        cover, bright = _draw(shapes, textures, params, x, y)
        target = image + ground * cover[:, None]
        colour = _colour(bright, target, mass)
        return ((target - colour[..., None] * bright[:, None]) * mass[:, None]).flatten(1)

    free = [_X, _Y, _RADIUS, _BLUR] if edges_too else [_X, _Y]
    params, _ = _descend(residual, start.flatten(0, 1), free, rounds=4)
    return params.view(count, frames, _PARAMETERS)


@functools.cache
def _pixels() -> tuple[Tensor, Tensor]:
    axis = (torch.arange(_SIZE) + 0.5) / _SIZE
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x.flatten(), y.flatten()


def _fit_pair(
    clips: Tensor, lifted: Tensor, background: Tensor, seed: Tensor
) -> tuple[list[_Fit], list[Tensor], list[Tensor]]:
    """Two shapes a clip: fits, owned pixels and presence, of each.

    The foreground is first split by hue, or by place where the hues agree; once both shapes are
    fitted, a pixel belongs to the shape that was drawn over it, and both are fitted again.
    """
    member = torch.stack([_split(clip, weight) for clip, weight in zip(clips, seed, strict=True)])
    share = (member * seed[:, None]).flatten(2).sum(2) / seed.flatten(1).sum(1).clamp(min=1e-6)[
        :, None
    ]
    present = [share[:, k] > _SHARE_OF_SECOND for k in range(2)]
    solid = (seed > 0).float()
    owned = [1.0 - solid * member[:, 1 - k] for k in range(2)]
    fits = [_fit(lifted, background, seed * member[:, k], owned[k]) for k in range(2)]
    cover = [
        _covers(fit) * here[:, None, None, None] for fit, here in zip(fits, present, strict=True)
    ]
    owned = [
        1.0 - (cover[1 - k] - cover[k] * member[:, k]).clamp(0.0, 1.0).round() for k in range(2)
    ]
    fits = [
        _fit(lifted, background, seed, owned[k], fits[k].params[..., _X : _Y + 1]) for k in range(2)
    ]
    return fits, owned, present


def _covers(fit: _Fit) -> Tensor:
    """Cover of the fitted shapes, [clips, frames, 32, 32]."""
    frames = fit.params.shape[1]
    shape, texture = (index.repeat_interleave(frames) for index in (fit.shape, fit.texture))
    cover, _ = _draw(shape, texture, fit.params.flatten(0, 1), *_pixels())
    return cover.view(-1, frames, _SIZE, _SIZE)


def _split(clip: Tensor, weight: Tensor) -> Tensor:
    """Which of two shapes each pixel belongs to, [2, frames, 32, 32] of 0 and 1."""
    if not (weight > 0).any():
        return torch.zeros(2, *weight.shape)
    red, green, blue = clip.unbind(1)
    # The chroma plane: angle is hue, length is saturation times value.
    across = red - 0.5 * (green + blue)
    up = 0.8660254 * (green - blue)
    chroma = torch.hypot(across, up)
    angle = torch.atan2(up, across)
    strength = weight * chroma
    bins = ((angle / (2 * torch.pi) * 36).floor().long() % 36).flatten()
    histogram = torch.zeros(36).scatter_add_(0, bins, strength.flatten())
    smooth = histogram + 0.7 * (histogram.roll(1) + histogram.roll(-1))
    first = int(smooth.argmax())
    apart = (torch.arange(36) - first + 18) % 36 - 18
    second = int(smooth.masked_fill(apart.abs() < 3, -1.0).argmax())
    centres = (torch.tensor([first, second]) + 0.5) * (2 * torch.pi / 36)
    for _ in range(4):
        likeness = torch.cos(angle - centres[:, None, None, None])
        mine = (likeness[0] >= likeness[1]) * strength
        other = (likeness[0] < likeness[1]) * strength
        centres = torch.stack(
            [torch.atan2((m * angle.sin()).sum(), (m * angle.cos()).sum()) for m in (mine, other)]
        )
    gap = float((centres[0] - centres[1] + torch.pi) % (2 * torch.pi) - torch.pi)
    if abs(gap) > np.deg2rad(25.0) and other.sum() > _SHARE_OF_SECOND * strength.sum():
        likeness = torch.cos(angle - centres[:, None, None, None])
        first_one = (likeness[0] >= likeness[1]).float()
        return torch.stack([first_one, 1.0 - first_one])
    return _split_by_place(weight)


def _split_by_place(weight: Tensor) -> Tensor:
    """Two-means over places, each frame starting from the one before it."""
    x, y = (axis.view(_SIZE, _SIZE) for axis in _pixels())
    places = torch.stack([x, y], -1)
    centres: Tensor | None = None
    members = []
    for frame in weight:
        total = frame.sum().clamp(min=1e-6)
        if centres is None:
            mean = (frame[..., None] * places).sum((0, 1)) / total
            offset = places - mean
            spread = torch.einsum("hw,hwi,hwj->ij", frame, offset, offset) / total
            length, axes = torch.linalg.eigh(spread)
            reach = axes[:, 1] * length[1].clamp(min=0.0).sqrt()
            centres = torch.stack([mean - reach, mean + reach])
        for _ in range(6):
            far = (places - centres[:, None, None]).square().sum(-1)
            near = torch.stack([far[0] <= far[1], far[0] > far[1]]).float()
            mass = (near * frame).sum((1, 2))
            moved = torch.einsum("khw,hwi->ki", near * frame, places)
            centres = torch.where(
                mass[:, None] > 1e-3, moved / mass.clamp(min=1e-3)[:, None], centres
            )
        members.append(near)
    return torch.stack(members, 1)


def _report(
    clips: Tensor,
    lifted: Tensor,
    background: Tensor,
    fits: Sequence[_Fit],
    owned: Sequence[Tensor],
    present: Sequence[Tensor],
) -> list[ClipReading]:
    """Colours, visibility and figures a frame of the fitted shapes."""
    count, frames = clips.shape[:2]
    left = lifted.clone()
    found: list[list[tuple[float, SpriteReading]]] = [[] for _ in range(count)]
    for fit, mine, here in zip(fits, owned, present, strict=True):
        shape, texture = (index.repeat_interleave(frames) for index in (fit.shape, fit.texture))
        cover, bright = _draw(shape, texture, fit.params.flatten(0, 1), *_pixels())
        mass = mine.flatten(0, 1).flatten(1)
        ground = background.repeat_interleave(frames, 0)[..., None]
        target = lifted.flatten(0, 1).flatten(2) + ground * cover[:, None]
        # Only their hue is used, which cutting one channel at white would turn: a frame that lacks
        # the clip's dark texture explains itself by an overbright colour.
        frame_colour = _colour(bright, target, mass, highest=math.inf).view(count, frames, 3)
        by_clip = (count, frames, -1)
        colour = _colour(
            bright.view(count, -1),
            target.view(count, frames, 3, -1).movedim(2, 1).flatten(2),
            mass.view(count, -1),
        )
        paint = colour.repeat_interleave(frames, 0)[..., None]
        change = paint * bright[:, None] - ground * cover[:, None]  # what the shape does to a frame
        seen = lifted.flatten(0, 1).flatten(2) * mass[:, None]
        gain = (seen * change).sum((1, 2)) / (change.square() * mass[:, None]).sum((1, 2)).clamp(
            min=1e-6
        )
        area = (cover * mass).sum(1).clamp(min=1e-3)
        bare = area > _FRAME_BARE * cover.sum(1)
        visible = ((gain > _FRAME_GAIN) & bare).view(count, frames)
        darkness = _darkness(target, frame_colour.flatten(0, 1), cover, mass).view(count, frames)
        contrast = (colour - background).abs().amax(1)
        there = here & (fit.explained > _EXPLAINED) & (contrast > _CONTRAST) & visible.any(1)
        shown = there.repeat_interleave(frames)[:, None, None] * visible.flatten()[:, None, None]
        redrawn = (change * shown).view(count, frames, 3, _SIZE, _SIZE)
        left = torch.where(mine[:, :, None] > 0.5, left - redrawn, left)
        size = cover.view(by_clip).sum((1, 2))
        for index in there.nonzero().flatten().tolist():
            sprite = _sprite(
                fit, index, colour[index], frame_colour[index], visible[index], darkness[index]
            )
            found[index].append((float(size[index]), sprite))
    residual = left.square().flatten(1).mean(1).sqrt()
    readings = []
    for index in range(count):
        hue, saturation, value = colorsys.rgb_to_hsv(*background[index].tolist())
        sprites = sorted(found[index], key=lambda entry: entry[0], reverse=True)
        readings.append(
            ClipReading(
                sprites=tuple(sprite for _, sprite in sprites),
                frames=frames,
                background_hue=hue * 360.0,
                background_value=value,
                background_colour=_name(hue * 360.0, saturation),
                residual=float(residual[index]),
            )
        )
    return readings


def _darkness(target: Tensor, colour: Tensor, cover: Tensor, mass: Tensor) -> Tensor:
    """Mean darkness of the texture against its brightest part, 0 to 1, in each frame [rows].

    Args:
        target: covered pixels over black, [rows, 3, points].
        colour: the frame's colour, [rows, 3].
        cover: [rows, points].
        mass: 0 where another shape is on top; as `cover`.
    """
    along = (target * functional.normalize(colour, dim=1)[..., None]).sum(1)
    solid = (cover > 0.8 * cover.amax(1, keepdim=True)) & (mass > 0.5)
    level = (along / cover.clamp(min=1e-3)).masked_fill(~solid, torch.nan)
    brightest = level.nanquantile(0.9, dim=1).clamp(min=1e-3)
    brightness = level.nanmean(1) / brightest
    return ((1.0 - brightness) / (1.0 - TEXTURE_SHADE)).clamp(0.0, 1.0).nan_to_num()


def _sprite(
    fit: _Fit,
    index: int,
    colour: Tensor,
    frame_colour: Tensor,
    visible: Tensor,
    darkness: Tensor,
) -> SpriteReading:
    hue, saturation, value = colorsys.rgb_to_hsv(*colour.tolist())
    seen = visible.numpy()
    params = fit.params[index].double().numpy()
    radius = float(np.median(params[seen, _RADIUS]))
    softness = float(np.median(params[seen, _BLUR])) / _SIZE / radius
    scores = dict(zip(SHAPES, fit.shape_scores[index].tolist(), strict=True))
    return SpriteReading(
        shape=_shape_name(SHAPES[int(fit.shape[index])], scores, softness),
        shape_scores=scores,
        hue=hue * 360.0,
        saturation=saturation,
        value=value,
        colour=_name(hue * 360.0, saturation),
        texture=TEXTURES[int(fit.texture[index])],
        radius=radius,
        softness=softness,
        path=_path(params[:, _X : _Y + 1], seen),
        visible=seen.copy(),
        residual=float(fit.residual[index]),
        frame_hue=np.array([colorsys.rgb_to_hsv(*row)[0] * 360.0 for row in frame_colour.tolist()]),
        frame_texture=darkness.double().numpy().copy(),
        frame_radius=params[:, _RADIUS].copy(),
    )


def _path(centres: np.ndarray, seen: np.ndarray) -> np.ndarray | None:
    if seen.mean() < _SHARE_SEEN:
        return None
    times = np.arange(len(seen))
    columns = [np.interp(times, times[seen], column[seen]) for column in centres.T]
    return np.stack(columns, axis=-1)


def _shape_name(best: str, scores: dict[str, float], softness: float) -> str | None:
    left = 1.0 - scores[best]
    next_left = 1.0 - max(score for shape, score in scores.items() if shape != best)
    return None if softness > _SOFTEST or left > _LEFT_OF_NEXT * next_left else best


def _name(hue: float, saturation: float) -> str | None:
    return colour_name(hue, COLOUR_TOLERANCE) if saturation >= _PALE else None
