"""The sprites world: shapes of known colour, texture and path on a dark background.

Everything about a clip of this world is known exactly, so what a generated clip shows can be
read back by fitting the same renderer (`kinetiq.sprites.reading`). Lengths are in units of the
frame's width, `x` grows to the right and `y` downwards, hues are in degrees.

A colour name stands for hues within `NAMED_HUE_RANGE` of its centre. Hues between two names are
rendered too, but never named: a caption that leaves the colour out leaves the model free.
"""

import colorsys
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "ring", "cross")
TEXTURES = ("plain", "striped", "dotted")
COLOURS = {
    "red": 0.0,
    "gold": 45.0,
    "lime": 90.0,
    "green": 135.0,
    "cyan": 180.0,
    "blue": 225.0,
    "purple": 270.0,
    "pink": 315.0,
}
MOTIONS = ("left", "right", "up", "down", "circling", "zigzagging", "bouncing", "still")
MOTION_PHRASES = {
    "left": "moving left",
    "right": "moving right",
    "up": "moving up",
    "down": "moving down",
    "circling": "circling",
    "zigzagging": "zigzagging",
    "bouncing": "bouncing",
    "still": "standing still",
}
NAMED_HUE_RANGE = 10.0
HELD_OUT_RANGE = (
    15.0  # degrees at which a reader still names a colour, so nothing within is trained
)
HELD_OUT_SHARE = 8  # one combination of (shape, colour, motion) in this many is never trained on

TEXTURE_PERIOD = 0.15  # 5 pixels of 32
TEXTURE_SHADE = 0.35  # brightness of the dark part of a texture
TEXTURE_DOT = 0.32  # radius of a dot, in periods
_MARGIN = 0.2  # a path keeps the centre this far from the frame's edge
_NEAR_MIDDLE = 0.25  # of the room that a path has, where it stays near the middle
_DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}


@dataclass(frozen=True)
class Path:
    """A motion with its parameters; `points` evaluates it.

    Args:
        motion: one of `MOTIONS`.
        travel: length of a straight run, diameter of a circle, height of a bounce; of the width.
        phase: where a periodic motion starts, in turns (0 to 1).
        heading: +1 or -1: the sideways sense of a zigzag, the sense of a circle's turn.
        centre: middle of the path, (x, y).
    """

    motion: str
    travel: float = 0.4
    phase: float = 0.0
    heading: float = 1.0
    centre: tuple[float, float] = (0.5, 0.5)

    def points(self, frames: int, moment: float = 0.0) -> np.ndarray:
        """Centres of the shape, [frames, 2] as (x, y); of one frame, that at `moment` in [0, 1]."""
        turn = np.linspace(0.0, 1.0, frames) if frames > 1 else np.full(1, moment)
        x, y = np.zeros(frames), np.zeros(frames)
        if self.motion in _DIRECTIONS:
            across, down = _DIRECTIONS[self.motion]
            x, y = across * self.travel * (turn - 0.5), down * self.travel * (turn - 0.5)
        elif self.motion == "circling":
            angle = 2 * math.pi * (self.phase + self.heading * turn)
            x, y = self.travel / 2 * np.cos(angle), self.travel / 2 * np.sin(angle)
        elif self.motion == "zigzagging":
            wave = np.abs(2.0 * ((2.0 * turn + self.phase) % 1.0) - 1.0)  # two teeth, 0 to 1
            x, y = self.heading * self.travel * (turn - 0.5), 0.6 * self.travel * (wave - 0.5)
        elif self.motion == "bouncing":
            height = np.abs(np.sin(math.pi * (2.0 * turn + self.phase)))  # two hops
            y = -self.travel * (height - 0.5)
        return np.stack([self.centre[0] + x, self.centre[1] + y], axis=-1)


@dataclass(frozen=True)
class Sprite:
    """One shape: what it looks like and where it goes."""

    shape: str
    hue: float
    path: Path
    texture: str = "plain"
    radius: float = 0.22
    saturation: float = 0.9
    value: float = 0.95
    texture_phase: tuple[float, float] = (0.0, 0.0)  # in periods; the texture moves with the shape


@dataclass(frozen=True)
class Scene:
    """What a clip shows: sprites, last on top, over one dark background colour."""

    sprites: tuple[Sprite, ...]
    background_hue: float = 225.0
    background_saturation: float = 0.8
    background_value: float = 0.22
    pan: tuple[float, float] = (0.0, 0.0)  # the whole frame moves this far in all, of the width


# What scenes without variety show; held out with no motion.
_USUAL = Sprite("circle", COLOURS["gold"], Path("still"))
_USUAL_BACKGROUND = COLOURS["blue"]


@dataclass(frozen=True)
class Mention:
    """What a caption says of one sprite; None is left out."""

    shape: str | None = None
    colour: str | None = None
    texture: str | None = None
    motion: str | None = None


@dataclass(frozen=True)
class Caption:
    """What a caption says of a scene; `text` writes it out."""

    mentions: tuple[Mention, ...] = field(default_factory=tuple)
    background: str | None = None

    @property
    def text(self) -> str:
        """The caption in words, such as "a red ring moving left on a dark blue background"."""
        phrases = []
        for mention in self.mentions:
            words = [mention.colour, mention.texture, mention.shape or "shape"]
            if mention.motion is not None:
                words.append(MOTION_PHRASES[mention.motion])
            phrases.append("a " + " ".join(word for word in words if word))
        text = " and ".join(phrases)
        if self.background is not None:
            text += f" on a dark {self.background} background"
        return text

    def without_motion(self) -> "Caption":
        """The caption of a single frame: the same, but no word on how anything moves."""
        still = tuple(replace(mention, motion=None) for mention in self.mentions)
        return replace(self, mentions=still)


def colour_name(hue: float, tolerance: float = NAMED_HUE_RANGE) -> str | None:
    """The name that stands for `hue`, or None between names."""
    for name, centre in COLOURS.items():
        if hue_distance(hue, centre) <= tolerance:
            return name
    return None


def hue_distance(a: float, b: float) -> float:
    """Angle between two hues, 0 to 180 degrees."""
    return abs((a - b + 180.0) % 360.0 - 180.0)


def is_held_out(shape: str, colour: str | None, motion: str) -> bool:
    """Whether this combination is kept out of training, by a fixed hash of its words."""
    digest = hashlib.sha256(f"{shape} {colour} {motion}".encode()).digest()
    return colour is not None and digest[0] % HELD_OUT_SHARE == 0


def sample_path(
    rng: np.random.Generator,
    motion: str,
    span: float = 1.0,
    room: float = 1.0,
    variety: float = 1.0,
) -> Path:
    """A path of this motion with random size, phase and place.

    Args:
        rng: draws it.
        motion: one of `MOTIONS`.
        span: factor on its size.
        room: share of the places it could be at, around the middle of the frame.
        variety: share of the range that size, phase and place are drawn from; at 0 all paths of a
            motion are one.
    """
    travel = {"circling": (0.24, 0.42), "zigzagging": (0.3, 0.5), "bouncing": (0.2, 0.4)}.get(
        motion, (0.25, 0.5)
    )
    path = Path(
        motion,
        travel=span * _draw(rng, *travel, variety),
        phase=rng.uniform() * variety,
        heading=-1.0 if rng.uniform() < 0.5 * variety else 1.0,
    )
    reach = np.abs(path.points(33) - 0.5).max(axis=0)
    most = room * variety * np.maximum(0.5 - _MARGIN - reach, 0.0)
    centre = 0.5 + rng.uniform(-most, most)
    return Path(motion, path.travel, path.phase, path.heading, (float(centre[0]), float(centre[1])))


def sample_sprite(
    rng: np.random.Generator,
    *,
    shape: str | None = None,
    hue: float | None = None,
    texture: str | None = None,
    motion: str | None = None,
    small: bool = False,
    room: float = 1.0,
    variety: float = 1.0,
) -> Sprite:
    """A sprite whose unsaid attributes are drawn at random.

    `room` and `variety` are those of `sample_path`; `variety` is of the radius too.
    """
    motion = motion or str(rng.choice(MOTIONS))
    return Sprite(
        shape=shape or str(rng.choice(SHAPES)),
        hue=float(rng.uniform(0.0, 360.0)) if hue is None else hue,
        path=sample_path(rng, motion, 0.8 if small else 1.0, room, variety),
        texture=texture or str(rng.choice(TEXTURES, p=[0.5, 0.25, 0.25])),
        radius=_draw(rng, *((0.13, 0.17) if small else (0.18, 0.27)), variety),
        saturation=float(rng.uniform(0.8, 1.0)),
        value=float(rng.uniform(0.85, 1.0)),
        texture_phase=(float(rng.uniform()), float(rng.uniform())),
    )


def _draw(rng: np.random.Generator, low: float, high: float, variety: float) -> float:
    """A number from the middle `variety` of the range."""
    return float(0.5 * (low + high) + variety * rng.uniform(-0.5, 0.5) * (high - low))


def sample_named_hue(rng: np.random.Generator, colour: str) -> float:
    """A hue that `colour` stands for."""
    return float((COLOURS[colour] + rng.uniform(-NAMED_HUE_RANGE, NAMED_HUE_RANGE)) % 360.0)


def sample_scene(rng: np.random.Generator, two_share: float = 0.1, variety: float = 1.0) -> Scene:
    """A scene of the training set: one shape, or two with probability `two_share`.

    Half of the hues are drawn within a name's range, half from the whole circle. Half of the paths
    stay near the middle: where place is free, what a word says of motion explains little of a clip,
    and is learnt late. Combinations for which `is_held_out` are drawn again.

    Args:
        rng: draws it.
        two_share: probability of a second shape.
        variety: share of it all. It is that of `sample_path`, and the probability with which each
            of colour, shape, texture and background is drawn, where it would otherwise be
            `_USUAL`'s. At 0 there are as many scenes as motions.
    """
    count = 2 if rng.uniform() < two_share * variety else 1
    room = _NEAR_MIDDLE if rng.uniform() < 0.5 else 1.0
    sprites: list[Sprite] = []
    while len(sprites) < count:
        usual_hue, usual_shape, usual_texture = rng.uniform(size=3) >= variety
        hue = _USUAL.hue
        if not usual_hue:
            hue = sample_named_hue(rng, str(rng.choice(list(COLOURS))))
            hue = hue if rng.uniform() < 0.5 else float(rng.uniform(0.0, 360.0))
        sprite = sample_sprite(
            rng,
            shape=_USUAL.shape if usual_shape else None,
            hue=hue,
            texture=_USUAL.texture if usual_texture else None,
            small=count == 2,
            room=room,
            variety=variety,
        )
        named_by_readers = colour_name(sprite.hue, HELD_OUT_RANGE)
        if not is_held_out(sprite.shape, named_by_readers, sprite.path.motion):
            sprites.append(sprite)
    background = _USUAL_BACKGROUND
    if rng.uniform() < variety:
        background = sample_named_hue(rng, str(rng.choice(list(COLOURS))))
        background = background if rng.uniform() < 0.6 else float(rng.uniform(0.0, 360.0))
    return Scene(
        sprites=tuple(sprites),
        background_hue=background,
        background_saturation=float(rng.uniform(0.7, 0.95)),
        background_value=float(rng.uniform(0.16, 0.28)),
    )


def sample_caption(rng: np.random.Generator, scene: Scene, variety: float = 1.0) -> Caption:
    """A true caption of `scene`: half say all, half leave each attribute out half of the time.

    Hues between names are never said. `variety` is the share of the half that leaves out.
    """
    share = 1.0 if rng.uniform() < 1.0 - 0.5 * variety else 0.5
    mentions = []
    for sprite in scene.sprites:
        colour = colour_name(sprite.hue)
        mentions.append(
            Mention(
                shape=sprite.shape if rng.uniform() < share else None,
                colour=colour if rng.uniform() < share else None,
                texture=sprite.texture if rng.uniform() < share else None,
                motion=sprite.path.motion if rng.uniform() < share else None,
            )
        )
    background = colour_name(scene.background_hue) if rng.uniform() < share else None
    return Caption(tuple(mentions), background)


def render(
    scenes: Sequence[Scene], frames: int, size: int, moments: Sequence[float] | None = None
) -> Tensor:
    """Draw clips, float32 in [0, 1], [scenes, frames, size, size, 3].

    Edges are antialiased over one pixel from the signed distance to the shape.

    Args:
        scenes: what to draw.
        frames: of each clip.
        size: height and width.
        moments: when each scene's frame is, in [0, 1], where it is one; None: at the beginning.
    """
    when = [0.0] * len(scenes) if moments is None else moments
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    grid_x, grid_y = axis[None, :].expand(size, size), axis[:, None].expand(size, size)
    background = torch.tensor(
        [_rgb(s.background_hue, s.background_saturation, s.background_value) for s in scenes]
    )
    clips = background[:, None, None, None, :].repeat(1, frames, size, size, 1)
    for layer in range(max((len(s.sprites) for s in scenes), default=0)):
        here = [index for index, scene in enumerate(scenes) if len(scene.sprites) > layer]
        sprites = [scenes[index].sprites[layer] for index in here]
        centres = np.stack(
            [
                sprite.path.points(frames, when[index])
                + _pan(frames, when[index]) * np.asarray(scenes[index].pan)
                for index, sprite in zip(here, sprites, strict=True)
            ]
        )
        centre = torch.as_tensor(centres, dtype=torch.float32)[..., None, None]  # [n, F, 2, 1, 1]
        radius = torch.tensor([s.radius for s in sprites])[:, None, None, None]
        x, y = grid_x - centre[:, :, 0], grid_y - centre[:, :, 1]  # [n, F, size, size]
        distance = torch.empty_like(x)
        for shape in {s.shape for s in sprites}:
            chosen = [i for i, s in enumerate(sprites) if s.shape == shape]
            distance[chosen] = signed_distance(shape, x[chosen], y[chosen], radius[chosen])
        cover = (0.5 - distance * size).clamp(0.0, 1.0)[..., None]
        shade = _shade(sprites, x, y, size)[..., None]
        colour = torch.tensor([_rgb(s.hue, s.saturation, s.value) for s in sprites])
        paint = shade * colour[:, None, None, None, :]
        clips[here] = torch.lerp(clips[here], paint, cover)
    return clips


def _pan(frames: int, moment: float) -> np.ndarray:
    """The share of a pan that each frame has made, [frames, 1]."""
    turn = np.linspace(0.0, 1.0, frames) if frames > 1 else np.full(1, moment)
    return turn[:, None]


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Distance to the outline, negative inside; areas are 0.6 to 1 of the circle's."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "ring":
        return (torch.hypot(x, y) - 0.75 * radius).abs() - 0.3 * radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    if shape == "cross":
        arm, half = 1.05 * radius, 0.36 * radius
        upright = torch.maximum(x.abs() - half, y.abs() - arm)
        level = torch.maximum(x.abs() - arm, y.abs() - half)
        return torch.minimum(upright, level)
    if shape == "triangle":  # equilateral, point up: the largest of three half-plane distances
        slope = math.sqrt(3.0) / 2.0
        return torch.maximum(slope * x.abs() - 0.5 * y, y) - 0.6 * radius
    raise ValueError(f"signed_distance: shape must be one of {', '.join(SHAPES)}, got {shape!r}")


def _shade(sprites: Sequence[Sprite], x: Tensor, y: Tensor, size: int) -> Tensor:
    """Brightness of the texture at each pixel: 1 where bright, `TEXTURE_SHADE` where dark."""
    phase = torch.tensor([s.texture_phase for s in sprites])[:, :, None, None, None]
    u, v = x / TEXTURE_PERIOD + phase[:, 0], y / TEXTURE_PERIOD + phase[:, 1]
    sharp = size * TEXTURE_PERIOD  # pixels in a period: edges are one pixel soft
    wave = 0.25 - ((u % 1.0) - 0.5).abs()
    stripes = (0.5 + sharp * wave).clamp(0.0, 1.0)
    near = torch.hypot((u % 1.0) - 0.5, (v % 1.0) - 0.5)
    dots = (0.5 + sharp * (TEXTURE_DOT - near)).clamp(0.0, 1.0)
    plain = torch.zeros_like(dots)
    dark = {"plain": plain, "striped": stripes, "dotted": dots}
    stack = torch.stack([dark[s.texture][i] for i, s in enumerate(sprites)])
    return 1.0 - (1.0 - TEXTURE_SHADE) * stack


def _rgb(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(hue / 360.0, saturation, value)
