"""MOFT: the motion feature of a clip, and the channels of a network that carry motion.

With x[f, p] the features of a tap at frame f and position p, the motion feature is what is left of
them without their mean over frames, in a few channels:

    m[f, p] = (x[f, p] - mean_F x[:, p])[channels]

What all frames show alike falls to the mean; what is left is led by motion. Which channels carry
it is found once for a checkpoint, on pans: still images behind a window that moves a constant way
each frame. In the middle of the map the mean of m, over positions and over pans of one direction,
is a curve over the frames, [frames, channels]. Half the difference of the curves to the left and
to the right is what tells the two apart; the loadings of its first principal component, one a
channel, are the axis "horizontal". Pans up and down give "vertical". The channels of the largest
loadings are kept.

The released code takes the component of single positions at the first frame of a few pans, whose
pictures fill the frame. Where shapes move over plain ground, that component says whether a shape
is there, and not where it goes; means over positions and pictures, and their difference, leave
only what the direction decides.

Features are read at little noise: a clip is inverted (DDIM, empty prompt, no guidance) to about a
fifth of the timesteps, and the network is run there as far as the tap.

A direction without a clip is synthesised from the pans. For each channel, the curve of that
direction has its least and its greatest value at some frame; what is synthesised is the straight
line between these two, and stays at each of them before and behind.

Directions are those in which the picture moves: in a pan to the right all that is seen goes right.

Source: Xiao et al., "Video Diffusion Models are Training-free Motion Interpreter and Controller",
arXiv:2405.14864, sec. 3.2 (feature and channels) and 3.3 (synthesis).
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor

from kinetiq.checkpoint import Checkpoint, embedded_folder
from kinetiq.clip import Clip
from kinetiq.denoiser import NO_CONTROLS, Denoiser
from kinetiq.errors import (
    CheckpointError,
    NonFiniteError,
    RequestError,
    ShapeError,
)
from kinetiq.files import check_target, make_cache, replacing, write_tensors
from kinetiq.inversion import step_back
from kinetiq.kernels import motion_feature
from kinetiq.motion_losses import read_diffusion
from kinetiq.precision import exact_float32
from kinetiq.sampler import SamplerRow, build_sampler_table
from kinetiq.sprites import world
from kinetiq.sprites.world import Scene
from kinetiq.taps import DEFAULT_TAP, Tap, find_tap
from kinetiq.text import encode_prompts

if TYPE_CHECKING:
    from kinetiq.engine import Engine

DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
"""Where each direction goes, as (x to the right, y downwards)."""

AXES = {"horizontal": ("left", "right"), "vertical": ("up", "down")}
"""The directions that each axis tells apart; along the second its component grows."""

SHARE = 0.04
"""Of the channels that are kept."""

TRAVEL = 0.4
"""How far a pan moves from the first frame to the last, as a share of the side it moves along."""

STEPS = 25
"""Of the sampler whose steps are taken back."""

DEPTH = 0.2
"""At which share of the timesteps features are read."""

STILLS = 16
"""Still images that are panned, each in all directions."""

EMBEDDED = "sprites"
FORMAT = "kinetiq motion channels 1"
_MIDDLE = 2  # the middle of a map is one part in this many of each side
_ROWS = 8  # clips that the network is given at a time
_SHAPES = 6  # on a picture that is drawn to be panned
_NAMED = 20  # digits of a fingerprint in the name of a file


@attrs.frozen(eq=False)
class Knots:
    """The two corners of each channel's curve in pans of one direction.

    Args:
        time: [2, channels], shares of the clip, 0 to 1; the first is not later than the second.
        value: [2, channels], the least and the greatest value of the channel, in the order of
            their times.
    """

    time: Tensor
    value: Tensor


@attrs.frozen(eq=False)
class MotionChannels:
    """Which channels of a tap carry motion, and how they run in pans.

    Args:
        family: of the network.
        checkpoint: name of the model.
        fingerprint: of the model; see `kinetiq.checkpoint.Checkpoint`.
        tap: module path of the block.
        loadings: for each axis, [channels], float32: of the first principal component, of unit
            length. The sign is such that the component grows along the second direction of `AXES`.
        spread: for each axis, the share that the component has in what tells its pans apart.
        knots: for each direction.
    """

    family: str
    checkpoint: str
    fingerprint: str
    tap: str
    loadings: Mapping[str, Tensor]
    spread: Mapping[str, float]
    knots: Mapping[str, Knots]

    @property
    def width(self) -> int:
        """How many channels the tap has."""
        return len(self.loadings["horizontal"])

    def select(self, axes: str | Sequence[str] = tuple(AXES), share: float = SHARE) -> Tensor:
        """The channels with the largest loadings, by size, of one axis or of several.

        Args:
            axes: of `AXES`; where the direction is not known, both.
            share: of the channels, for each axis; at least one is kept.

        Returns:
            int64 [K], each channel once.

        Raises:
            RequestError: an axis is unknown, or the share is not above 0 and at most 1.
        """
        wanted = (axes,) if isinstance(axes, str) else tuple(axes)
        if not wanted or not set(wanted) <= set(AXES):
            raise RequestError(f"channels: axes must be of {', '.join(AXES)}, got {axes!r}")
        require_share(share)
        count = max(1, round(share * self.width))
        ranked = [
            self.loadings[axis].abs().argsort(descending=True, stable=True) for axis in wanted
        ]
        chosen = [int(channel) for order in ranked for channel in order[:count]]
        return torch.tensor(list(dict.fromkeys(chosen)))

    def synthesise(self, direction: str, frames: int, speed: float = 1.0) -> Tensor:
        """The curves of a motion in one direction, over all channels.

        Args:
            direction: of `DIRECTIONS`.
            frames: of the clip, at least 2.
            speed: a factor; at 1 the picture goes `TRAVEL` of its side in the clip.

        Returns:
            [frames, channels], float32, with zero mean over frames.

        Raises:
            RequestError: the direction is unknown, or there are too few frames.
        """
        if direction not in DIRECTIONS:
            raise RequestError(
                f"direction: must be one of {', '.join(DIRECTIONS)}, got {direction!r}"
            )
        if frames < 2:
            raise RequestError(f"frames: must be at least 2 to move, got {frames}")
        return speed * _run(self.knots[direction], frames)

    def synthesise_way(self, x: float, y: float, frames: int) -> Tensor:
        """The curves of a motion by (x, y) shares of the sides in the clip; see `synthesise`."""
        along = "right" if x >= 0 else "left"
        down = "down" if y >= 0 else "up"
        across = self.synthesise(along, frames, abs(x) / TRAVEL)
        return across + self.synthesise(down, frames, abs(y) / TRAVEL)

    def slopes(self, curve: Tensor) -> dict[str, float]:
        """How a curve over all channels, [frames, channels], grows along each axis, in pans.

        Of a mean over the middle, as pans were read, 1 is a pan along the second direction of
        `AXES`, -1 one along the first.
        """
        grown = {}
        for axis, (back, forth) in AXES.items():
            pans = self.synthesise(forth, len(curve)) - self.synthesise(back, len(curve))
            loading = self.loadings[axis].to(curve)
            grown[axis] = float(slope(curve @ loading) / slope(pans.to(curve) @ loading) * 2)
        return grown


def _run(knots: Knots, frames: int) -> Tensor:
    """The straight lines between knots, [frames, channels], with zero mean over frames."""
    time = torch.linspace(0.0, 1.0, frames)[:, None]
    first, last = knots.time
    # A channel that does not change has both knots at one time.
    done = ((time - first) / (last - first)).clamp(0.0, 1.0).nan_to_num()
    curve = torch.lerp(knots.value[0], knots.value[1], done)
    return curve - curve.mean(0)


def require_share(share: object) -> None:
    """Raise a `RequestError` unless this is a share of channels that can be kept."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise RequestError(f"channels: share must be above 0 and at most 1, got {share!r}")


def moft(features: Tensor, channels: Tensor | None = None, region: Tensor | None = None) -> Tensor:
    """The motion feature of features; see the top of this file.

    Args:
        features: [..., frames, h, w, C], any strides.
        channels: int64 [K], on their device; None keeps all.
        region: weights of a mean over positions, [h, w], or [..., h, w] with the features' leading
            sizes; where they add up to zero the mean is zero.

    Returns:
        [..., frames, h, w, K], or with a region [..., frames, K].

    Raises:
        ShapeError: the features, the channels or the region do not fit.
    """
    if features.ndim < 4:
        raise ShapeError(
            f"moft: features must be [..., frames, h, w, channels], got {list(features.shape)}"
        )
    lead, (frames, height, width) = features.shape[:-4], features.shape[-4:-1]
    if region is not None:
        if tuple(region.shape) not in ((height, width), (*lead, height, width)):
            raise ShapeError(
                f"moft: region must be [..., h, w] = {[*lead, height, width]}, got "
                f"{list(region.shape)}"
            )
        region = region.flatten(-2)
        region = region if region.ndim == 1 else region.flatten(0, -2)
    rows = features.flatten(-3, -2).reshape(-1, frames, height * width, features.shape[-1])
    moved = motion_feature(rows, channels, region=region)
    if region is not None:
        return moved.reshape(*lead, frames, moved.shape[-1])
    return moved.reshape(*lead, frames, height, width, moved.shape[-1])


def middle(features: Tensor) -> Tensor:
    """The middle half, in height and in width, of features [..., h, w, channels]; a view."""
    for axis in (-3, -2):
        side = features.shape[axis]
        kept = max(1, side // _MIDDLE)
        features = features.narrow(axis, (side - kept) // 2, kept)
    return features


def middle_area(height: int, width: int) -> Tensor:
    """Weights of a mean over what `middle` keeps: [h, w] on the CPU, 1 there and 0 elsewhere."""
    area = torch.zeros(height, width)
    middle(area[..., None]).fill_(1.0)
    return area


def middle_curve(features: Tensor, channels: Tensor | None = None) -> Tensor:
    """The motion feature as a mean over the middle of the map.

    Args:
        features: [..., frames, h, w, C].
        channels: int64 [K], on their device; None keeps all.

    Returns:
        [..., frames, K].
    """
    return moft(middle(features), channels).mean((-3, -2))


def align(feature: Tensor, height: int, width: int) -> Tensor:
    """A feature [..., h, w, C] at another size, bilinear; the same tensor where it has it."""
    if tuple(feature.shape[-3:-1]) == (height, width):
        return feature
    maps = feature.flatten(0, -4).movedim(-1, 1)
    brought = F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
    return brought.movedim(1, -1).reshape(*feature.shape[:-3], height, width, feature.shape[-1])


@torch.no_grad()
def reference_features(
    checkpoint: Checkpoint,
    denoiser: Denoiser,
    latents: Tensor,
    tap: str | None = None,
    *,
    depth: float = DEPTH,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Tensor:
    """What the tap makes of clips at little noise.

    DDIM of `STEPS` steps is taken back from the clean latents to the step whose timestep is nearest
    to `depth`, and no further; there the network is run to the tap. Where memory runs out, fewer
    clips are read at a time.

    Args:
        checkpoint: the model.
        denoiser: runs its network.
        latents: clean and scaled, [clips, channels, frames, h, w].
        tap: where features are read (`kinetiq.taps`); None: `DEFAULT_TAP`.
        depth: share of the timesteps, 0 to 1.
        progress: told of ("inverting", done, total).

    Returns:
        [clips, frames, h, w, channels] at the size of the tap, float32.

    Raises:
        RequestError: the network has no such tap, or `depth` is not from 0 to 1.
        ShapeError: the latents have another rank.
        NonFiniteError: the samples or the features are not finite; it says the step.
    """
    if not 0.0 <= depth <= 1.0:
        raise RequestError(f"moft: depth must be from 0 to 1, got {depth!r}")
    if latents.ndim != 5:
        raise ShapeError(
            f"moft: latents must be [clips, channels, frames, h, w], got {list(latents.shape)}"
        )
    found = find_tap(checkpoint.unet, tap)
    rows = _rows_back(checkpoint, depth)
    text = encode_prompts(checkpoint, [""]).to(latents.device, checkpoint.dtype)

    def read(part: Tensor) -> Tensor:
        return _read_features(checkpoint, denoiser, part, text, rows, found, progress)

    return _in_parts(latents, read)


@exact_float32()
def _read_features(
    checkpoint: Checkpoint,
    denoiser: Denoiser,
    latents: Tensor,
    text: Tensor,
    rows: Sequence[SamplerRow],
    tap: Tap,
    progress: Callable[[str, int, int], None],
) -> Tensor:
    """Take `rows` back from clean latents, and run the network to the tap."""
    text = text.expand(len(latents), -1, -1)
    sample = latents.float()
    for done, row in enumerate(rows, start=1):
        timestep = torch.full((len(sample),), row.timestep, device=sample.device)
        output = denoiser.predict(sample.to(checkpoint.dtype), timestep, text, NO_CONTROLS)
        sample = step_back(row, sample, output.float())
        _require_finite(sample, f"step {done} of {len(rows)} of the inversion")
        progress("inverting", done, len(rows))
    given = sample.to(checkpoint.dtype)
    features = denoiser.features(given, timestep, text, NO_CONTROLS, tap.name).float()
    _require_finite(features, f"the output of {tap.name}")
    return features


def _in_parts(latents: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
    """What `read` makes of all clips, in smaller parts where memory runs out.

    A clip that does not fit alone raises what the allocation raised.
    """
    from kinetiq.generation import is_out_of_memory  # not above: it loads guidance, which loads us

    made, left, size = [], latents, len(latents)
    while len(left):
        part = left[:size]
        try:
            made.append(read(part))
        except RuntimeError as error:
            if len(part) == 1 or not is_out_of_memory(error):
                raise
        else:
            left = left[len(part) :]
            continue
        # Behind the handler, which would hold on to what did not fit.
        size = (len(part) + 1) // 2
        if latents.is_cuda:
            torch.cuda.empty_cache()
    return torch.cat(made) if len(made) > 1 else made[0]


def reference_feature(
    checkpoint: Checkpoint,
    denoiser: Denoiser,
    latents: Tensor,
    tap: str | None = None,
    *,
    depth: float = DEPTH,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Tensor:
    """`reference_features` of one clip: [channels, frames, h, w] to [frames, h, w, channels]."""
    features = reference_features(
        checkpoint, denoiser, latents[None], tap, depth=depth, progress=progress
    )
    return features[0]


def _rows_back(checkpoint: Checkpoint, depth: float) -> list[SamplerRow]:
    """The steps of the sampler that are taken back, the last first; at least one."""
    config = checkpoint.scheduler_config
    table = build_sampler_table("ddim", config, STEPS)
    wanted = depth * read_diffusion(checkpoint.scheduler, config).timesteps
    nearest = int(np.abs(table.timestep - wanted).argmin())
    return [table.row(index) for index in range(table.steps - 1, nearest - 1, -1)]


def _require_finite(values: Tensor, where: str) -> None:
    if not bool(values.isfinite().all()):
        raise NonFiniteError(
            f"moft: features must be finite, got NaN or infinity at {where}; try another dtype "
            "(float32 or bfloat16)"
        )


def calibrate(
    checkpoint: Checkpoint,
    denoiser: Denoiser,
    tap: str | None = None,
    *,
    pictures: Sequence[Clip] | None = None,
    stills: int = STILLS,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> MotionChannels:
    """Find the motion channels of a checkpoint on pans; see the top of this file.

    Args:
        checkpoint: the model.
        denoiser: runs its network.
        tap: where features are read (`kinetiq.taps`); None: `DEFAULT_TAP`.
        pictures: still images to pan, the first frame of each; None: they are drawn, for the
            embedded model from its own world, for others as smooth textures with shapes.
        stills: how many are drawn.
        seed: of what is drawn.
        progress: told of ("calibrating", done, total).

    Raises:
        RequestError: the network has no such tap, or there is nothing to pan.
        CheckpointError: the network makes nothing of the direction of pans.
        NonFiniteError: a feature is not finite.
    """
    from kinetiq.engine import Engine  # not above: the engine itself loads motion channels

    found = find_tap(checkpoint.unet, tap)
    engine = Engine(checkpoint, denoiser)
    pans = _draw_pans(engine, pictures, stills, seed)
    total = sum(map(len, pans.values()))
    parts: dict[str, list[Tensor]] = {direction: [] for direction in pans}
    done = 0
    progress("calibrating", done, total)
    for direction, clips in pans.items():
        for first in range(0, len(clips), _ROWS):
            part = clips[first : first + _ROWS]
            latents = torch.stack([engine.encode(clip) for clip in part])
            features = reference_features(checkpoint, denoiser, latents, found.name)
            parts[direction].append(middle_curve(features).cpu())
            done += len(part)
            progress("calibrating", done, total)
    return channels_of_pans(checkpoint, found, {way: torch.cat(c) for way, c in parts.items()})


def channels_of_pans(
    checkpoint: Checkpoint, tap: Tap, curves: Mapping[str, Tensor]
) -> MotionChannels:
    """The motion channels, given what pans make of the middle of the map.

    Args:
        checkpoint: the model.
        tap: where features were read.
        curves: for each of `DIRECTIONS`, [clips, frames, channels]: `middle_curve` of its pans.

    Raises:
        CheckpointError: the curves do not change with the direction.
    """
    means = {direction: clips.double().mean(0) for direction, clips in curves.items()}
    knots = {direction: _find_knots(means[direction]) for direction in DIRECTIONS}
    loadings, spread = {}, {}
    for axis, (back, forth) in AXES.items():
        apart = (means[forth] - means[back]) / 2
        components, shares = principal_components(apart)
        component = components[:, 0]
        # Of the synthesised curves, which slopes are compared with.
        pans = _run(knots[forth], len(apart)) - _run(knots[back], len(apart))
        grows = float(slope(pans.double() @ component))
        if grows == 0.0:
            raise CheckpointError(
                f"moft: {tap.name} of {checkpoint.name} must tell pans {back} from pans {forth}, "
                "and its features are the same in both; choose another tap or other pictures"
            )
        loadings[axis] = (component if grows > 0 else -component).float()
        spread[axis] = float(shares[0])
    return MotionChannels(
        family=checkpoint.family,
        checkpoint=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        tap=tap.name,
        loadings=MappingProxyType(loadings),
        spread=MappingProxyType(spread),
        knots=MappingProxyType(knots),
    )


def principal_components(samples: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """The directions in which samples vary most.

    Args:
        samples: [samples, channels].
        count: of components.

    Returns:
        [channels, count], each of unit length, and the share of the variance that each has,
        [count], zero where nothing varies; both float64.
    """
    centred = samples.double() - samples.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.mT @ centred / len(samples))
    values = values.flip(0).clamp_min(0.0)
    total = values.sum()
    shares = torch.where(total > 0.0, values / total, torch.zeros_like(values))
    return vectors.flip(1)[:, :count], shares[:count]


def slope(curve: Tensor) -> Tensor:
    """Of the straight line through [frames, ...], in its units a clip; 0 is level."""
    time = torch.linspace(-0.5, 0.5, len(curve), dtype=curve.dtype, device=curve.device)
    line: Tensor = torch.tensordot(time, curve, dims=1) / time.square().sum()
    return line


def _find_knots(curve: Tensor) -> Knots:
    """Where each channel of [frames, channels] is least and greatest."""
    low, high = curve.min(0), curve.max(0)
    places = torch.stack([low.indices, high.indices])
    values = torch.stack([low.values, high.values])
    places, order = places.sort(dim=0, stable=True)
    return Knots((places / (len(curve) - 1)).float(), values.gather(0, order).float())


def _draw_pans(
    engine: "Engine", pictures: Sequence[Clip] | None, stills: int, seed: int
) -> dict[str, list[Clip]]:
    """Clips of each direction, at the checkpoint's own size."""
    defaults = engine.defaults
    frames, height, width = defaults.frames, defaults.height, defaults.width
    count = stills if pictures is None else len(pictures)
    if count < 1 or frames < 2:
        raise RequestError(
            f"moft: calibration must have at least 1 still and 2 frames, got {count} and {frames}"
        )
    rng = np.random.default_rng([seed, 7])
    if pictures is None and engine.checkpoint.name == EMBEDDED:
        sprites = [_draw_sprite(rng) for _ in range(stills)]
        return {
            direction: [sprite_pan(scene, direction, frames, height) for scene in sprites]
            for direction in DIRECTIONS
        }
    room = [side + _pan_step(side, frames) * (frames - 1) for side in (height, width)]
    if pictures is None:
        images = [draw_texture(rng, *room) for _ in range(stills)]
    else:
        images = [
            picture.resize(room[0], room[1]).to_tensor()[0].permute(1, 2, 0) for picture in pictures
        ]
    return {
        direction: [
            Clip.from_array(pan(image, direction, frames, height, width)) for image in images
        ]
        for direction in DIRECTIONS
    }


def _pan_step(side: int, frames: int) -> int:
    """Pixels a frame, so that a pan goes about `TRAVEL` of the side."""
    return max(1, round(TRAVEL * side / (frames - 1)))


def pan(image: Tensor, direction: str, frames: int, height: int, width: int) -> Tensor:
    """A window that moves over an image a constant number of pixels a frame.

    The window goes against the direction, so that the picture in it goes along. Across, it stays in
    the middle.

    Args:
        image: [H, W, 3], larger than the window by at least a pan.
        direction: of `DIRECTIONS`.
        frames: of the clip.
        height: of the window.
        width: likewise.

    Returns:
        [frames, height, width, 3].
    """
    x, y = DIRECTIONS[direction]
    steps = int(x) * _pan_step(width, frames), int(y) * _pan_step(height, frames)
    left, top = (
        (whole - side + step * (frames - 1)) // 2
        for whole, side, step in zip(
            (image.shape[1], image.shape[0]), (width, height), steps, strict=True
        )
    )
    return torch.stack(
        [
            image[top - frame * steps[1] :, left - frame * steps[0] :][:height, :width]
            for frame in range(frames)
        ]
    )


def draw_texture(rng: np.random.Generator, height: int, width: int) -> Tensor:
    """A picture of smooth random colours with shapes on it, [height, width, 3] in [0, 1]."""
    image = torch.zeros(1, 3, height, width)
    for cells in (2, 4, 8, 16):  # coarse to fine, each half as strong
        grid = torch.as_tensor(rng.standard_normal((1, 3, cells + 1, cells + 1)), dtype=image.dtype)
        image += F.interpolate(grid, (height, width), mode="bicubic", align_corners=True) / cells
    picture = torch.sigmoid(3.0 * image)[0].permute(1, 2, 0)
    side = min(height, width)
    down, across = torch.arange(height)[:, None] + 0.5, torch.arange(width)[None, :] + 0.5
    for _ in range(_SHAPES):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        radius = torch.tensor(rng.uniform(0.05, 0.15) * side)
        shape = world.SHAPES[int(rng.integers(len(world.SHAPES)))]
        distance = world.signed_distance(shape, across - x, down - y, radius)
        cover = (0.5 - distance).clamp(0.0, 1.0)[..., None].float()
        picture = torch.lerp(picture, torch.as_tensor(rng.uniform(size=3)).float(), cover)
    return picture


def _draw_sprite(rng: np.random.Generator) -> Scene:
    """A still scene of the embedded world, its shape near the middle."""
    sprite = world.sample_sprite(rng, motion="still", room=0.25)
    return Scene((sprite,), background_hue=float(rng.uniform(0.0, 360.0)))


def sprite_pan(scene: Scene, direction: str, frames: int, size: int) -> Clip:
    """A still scene of the embedded world, panned; halfway it is where the scene has it."""
    x, y = DIRECTIONS[direction]
    moved = (TRAVEL * x, TRAVEL * y)
    sprites = tuple(
        replace(
            sprite,
            path=replace(
                sprite.path,
                centre=(sprite.path.centre[0] - moved[0] / 2, sprite.path.centre[1] - moved[1] / 2),
            ),
        )
        for sprite in scene.sprites
    )
    panned = replace(scene, sprites=sprites, pan=moved)
    return Clip.from_array(world.render([panned], frames, size)[0])


def load_channels(
    checkpoint: Checkpoint,
    denoiser: Denoiser,
    tap: str | None = None,
    *,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> MotionChannels:
    """The motion channels of a checkpoint: its file's, or found now and kept in that file.

    The embedded model brings those of the default tap along. Others are kept in the user's cache
    folder, by fingerprint: `$XDG_CACHE_HOME/kinetiq/moft`, or `~/.cache/kinetiq/moft`.

    Args:
        checkpoint: the model.
        denoiser: runs its network.
        tap: where features are read (`kinetiq.taps`); None: `DEFAULT_TAP`.
        progress: told of ("calibrating", done, total).

    Raises:
        RequestError: the network has no such tap.
        CheckpointError: the file is damaged or was made for another model.
        OutputError: the file cannot be written.
        NonFiniteError: a feature is not finite.
    """
    found = find_tap(checkpoint.unet, tap)
    path = channels_file(checkpoint, found)
    if _is_shipped(checkpoint, found) or path.exists():
        return read_channels(path, checkpoint, found)
    return store_channels(checkpoint, denoiser, tap, progress=progress)


def store_channels(
    checkpoint: Checkpoint,
    denoiser: Denoiser,
    tap: str | None = None,
    *,
    pictures: Sequence[Clip] | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> MotionChannels:
    """Find the motion channels of a checkpoint and put them where `load_channels` looks.

    The arguments and what is raised are those of `calibrate`; besides,

    Raises:
        OutputError: the file cannot be written.
    """
    path = channels_file(checkpoint, find_tap(checkpoint.unet, tap))
    make_cache(path.parent, "moft", " to keep motion channels in")
    check_target(path, "moft")
    channels = calibrate(checkpoint, denoiser, tap, pictures=pictures, progress=progress)
    write_channels(path, channels)
    return channels


def channels_file(checkpoint: Checkpoint, tap: Tap) -> Path:
    """Where the motion channels of a checkpoint are kept."""
    if _is_shipped(checkpoint, tap):
        return embedded_folder() / "moft" / f"{tap.name}.safetensors"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = f"{checkpoint.fingerprint[:_NAMED]}-{tap.name}.safetensors"
    return Path(cache) / "kinetiq" / "moft" / name


def _is_shipped(checkpoint: Checkpoint, tap: Tap) -> bool:
    return checkpoint.name == EMBEDDED and tap.name == DEFAULT_TAP


def write_channels(path: str | os.PathLike[str], channels: MotionChannels) -> None:
    """Write motion channels; the file carries its name only when it is whole.

    Raises:
        OutputError: the path cannot be written.
    """
    tensors = {f"loadings.{axis}": loading for axis, loading in channels.loadings.items()}
    tensors |= {f"spread.{axis}": torch.tensor(share) for axis, share in channels.spread.items()}
    for direction, knots in channels.knots.items():
        tensors |= {f"time.{direction}": knots.time, f"value.{direction}": knots.value}
    said = {
        "format": FORMAT,
        "family": channels.family,
        "checkpoint": channels.checkpoint,
        "fingerprint": channels.fingerprint,
        "tap": channels.tap,
    }
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path, "moft") as temporary:
        write_tensors(temporary, whole, said)


def read_channels(path: str | os.PathLike[str], checkpoint: Checkpoint, tap: Tap) -> MotionChannels:
    """Read motion channels that were made for this checkpoint and this tap.

    Raises:
        CheckpointError: the file is missing, damaged, or of another model or tap.
    """
    from safetensors import SafetensorError, safe_open

    again = "make it again with `kinetiq analyze moft --calibrate`"
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"moft: {path} must be a file of motion channels: {error}; {again}"
        ) from error
    wanted = {"format": FORMAT, "fingerprint": checkpoint.fingerprint, "tap": tap.name}
    for key, value in wanted.items():
        if said.get(key) != value:
            raise CheckpointError(
                f"moft: {path} must have the {key} {value!r}, since motion channels fit one model "
                f"alone, got {said.get(key)!r}; {again}"
            )
    shapes: dict[str, tuple[int, ...]] = {f"spread.{axis}": () for axis in AXES}
    shapes |= {f"loadings.{axis}": (tap.channels,) for axis in AXES}
    for direction in DIRECTIONS:
        shapes |= {f"{part}.{direction}": (2, tap.channels) for part in ("time", "value")}
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape) != shape or not bool(tensor.isfinite().all()):
            came = None if tensor is None else list(tensor.shape)
            raise CheckpointError(
                f"moft: {name} of {path} must be finite numbers {list(shape)}, got {came}; {again}"
            )
    return MotionChannels(
        family=checkpoint.family,
        checkpoint=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        tap=tap.name,
        loadings=MappingProxyType({axis: tensors[f"loadings.{axis}"] for axis in AXES}),
        spread=MappingProxyType({axis: float(tensors[f"spread.{axis}"]) for axis in AXES}),
        knots=MappingProxyType(
            {d: Knots(tensors[f"time.{d}"], tensors[f"value.{d}"]) for d in DIRECTIONS}
        ),
    )
