"""Fixed sets of prompts and references on which the embedded model is judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kinetiq.clip import Clip
from kinetiq.errors import RequestError
from kinetiq.generation import Progress, no_progress
from kinetiq.request import Request
from kinetiq.sprites import components, metrics, world
from kinetiq.sprites.metrics import Interval
from kinetiq.sprites.reading import ClipReading, read_clips
from kinetiq.sprites.world import Caption, Mention, Scene, Sprite

if TYPE_CHECKING:
    from kinetiq.engine import Engine

FPS = 8.0
FREE = ("colour", "texture")  # of a storyboard's subject: what no caption of it says


@dataclass(frozen=True)
class TransferPair:
    """A reference and a prompt that names another colour, texture, shape and background.

    The prompt says nothing of motion, so what moves comes from the reference or from chance.
    """

    scene: Scene
    caption: Caption
    seed: int

    @property
    def sprite(self) -> Sprite:
        """What the reference shows."""
        return self.scene.sprites[0]

    def reference(self, frames: int = components.FRAMES, size: int = components.SIZE) -> Clip:
        """The reference clip."""
        return render_clip(self.scene, frames, size)


@dataclass(frozen=True)
class TransferScores:
    """How a set of clips moves like its references and looks like its prompts.

    The last three are of each clip, so that methods can be compared pair by pair.
    """

    motion_fidelity: Interval
    identity_leak: Interval
    colour_accuracy: Interval
    shape_accuracy: Interval
    background_accuracy: Interval
    frame_consistency: Interval
    fidelities: tuple[float, ...]
    leaks: tuple[bool, ...]
    colours_right: tuple[bool, ...]


@dataclass(frozen=True)
class ShotBoardCase:
    """The shots of one subject, of which every caption says the shape and no other look.

    Each shot has a motion and a background of its own, so that what the shots have in common is
    what was left out: `FREE`.
    """

    captions: tuple[Caption, ...]
    seeds: tuple[int, ...]

    @property
    def subject(self) -> str:
        """What all shots show, in words that every caption holds: its shape."""
        return str(self.captions[0].mentions[0].shape)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The captions in words."""
        return tuple(caption.text for caption in self.captions)


def render_clip(scene: Scene, frames: int = components.FRAMES, size: int = components.SIZE) -> Clip:
    """A clip of one scene."""
    return Clip.from_array(world.render([scene], frames, size)[0], FPS)


def transfer_pairs(count: int, seed: int = 0) -> list[TransferPair]:
    """References of every motion in turn, each with a conflicting prompt; all independent."""
    rng = np.random.default_rng([seed, 1])
    pairs: list[TransferPair] = []
    for number in range(count):
        sprite = world.sample_sprite(
            rng,
            hue=world.sample_named_hue(rng, _choice(rng, world.COLOURS)),
            motion=world.MOTIONS[number % len(world.MOTIONS)],
        )
        scene = Scene((sprite,), background_hue=world.COLOURS[_choice(rng, world.COLOURS)])
        pairs.append(_conflicting(rng, scene, number))
    return pairs


def transfer_groups(references: int, prompts: int, seed: int = 0) -> list[list[TransferPair]]:
    """For each of some references, of every motion in turn, several conflicting prompts."""
    groups = []
    for pair in transfer_pairs(references, seed):
        rng = np.random.default_rng([seed, 3, pair.seed])
        group = [_conflicting(rng, pair.scene, prompts * pair.seed + k) for k in range(prompts)]
        groups.append(group)
    return groups


def prompt_captions(count: int, *, held_out: bool, seed: int = 0) -> list[Caption]:
    """Captions that name everything, of combinations that were trained on or held out.

    Both sets hold every shape, colour, texture, motion and background equally often, so that they
    differ in how these are combined and in nothing else: the trained combinations are the held-out
    ones of the same seed with their colours and motions exchanged.

    Raises:
        RequestError: so few captions cannot be rearranged into trained combinations.
    """
    rng = np.random.default_rng([seed, 2])
    captions: list[Caption] = []
    while len(captions) < count:
        motion = world.MOTIONS[len(captions) % len(world.MOTIONS)]
        shape, colour = _choice(rng, world.SHAPES), _choice(rng, world.COLOURS)
        if world.is_held_out(shape, colour, motion):
            mention = Mention(shape, colour, _choice(rng, world.TEXTURES), motion)
            captions.append(Caption((mention,), _choice(rng, world.COLOURS)))
    return captions if held_out else _rearranged(captions, rng)


def shot_boards(count: int, shots: int = 5, seed: int = 0) -> list[ShotBoardCase]:
    """Storyboards of every shape in turn, of which no two shots share a motion or a background.

    Motions are dealt from one pack that is shuffled again when it is used up, so that over all
    boards they come equally often; so are backgrounds.

    Raises:
        RequestError: a board has fewer than two shots, or more than there are motions.
    """
    if not 2 <= shots <= len(world.MOTIONS):
        raise RequestError(
            f"shot_boards: shots must be 2 to {len(world.MOTIONS)}, one motion each, got {shots}"
        )
    rng = np.random.default_rng([seed, 4])
    motions, backgrounds = _Pack(rng, world.MOTIONS), _Pack(rng, tuple(world.COLOURS))
    boards = []
    for number in range(count):
        shape = world.SHAPES[number % len(world.SHAPES)]
        dealt = zip(motions.deal(shots), backgrounds.deal(shots), strict=True)
        captions = tuple(
            Caption((Mention(shape, motion=motion),), background) for motion, background in dealt
        )
        boards.append(ShotBoardCase(captions, tuple(range(number * shots, (number + 1) * shots))))
    return boards


class _Pack:
    """Words that are dealt in random order, each as often as any other, never two alike a hand."""

    def __init__(self, rng: np.random.Generator, words: tuple[str, ...]) -> None:
        self._rng, self._words, self._left = rng, words, list[str]()

    def deal(self, count: int) -> list[str]:
        """The next hand; what the rest of a pack repeats of it waits for the next."""
        hand = self._left[:count]
        if len(hand) == count:
            self._left = self._left[count:]
            return hand
        shuffled = [str(word) for word in self._rng.permutation(self._words)]
        fresh = [word for word in shuffled if word not in hand]
        taken = fresh[: count - len(hand)]
        self._left = [word for word in shuffled if word not in taken]
        return hand + taken


def _conflicting(rng: np.random.Generator, scene: Scene, seed: int) -> TransferPair:
    """A prompt that names nothing of what the scene shows."""
    sprite = scene.sprites[0]
    mention = Mention(
        shape=_choice(rng, set(world.SHAPES) - {sprite.shape}),
        colour=_choice(rng, set(world.COLOURS) - {world.colour_name(sprite.hue)}),
        texture=_choice(rng, set(world.TEXTURES) - {sprite.texture}),
    )
    ground = world.colour_name(scene.background_hue)
    return TransferPair(
        scene, Caption((mention,), _choice(rng, set(world.COLOURS) - {ground})), seed
    )


def _rearranged(captions: Sequence[Caption], rng: np.random.Generator) -> list[Caption]:
    """The same words in combinations that were trained on."""
    mentions = [caption.mentions[0] for caption in captions]
    for _ in range(100 * len(mentions)):
        held = [index for index, mention in enumerate(mentions) if _is_held_out(mention)]
        if not held:
            return [
                replace(caption, mentions=(mention,))
                for caption, mention in zip(captions, mentions, strict=True)
            ]
        attribute = str(rng.choice(["colour", "motion"]))
        one, other = held[0], int(rng.integers(len(mentions)))
        exchanged = [
            replace(mentions[to], **{attribute: getattr(mentions[of], attribute)})
            for to, of in ((one, other), (other, one))
        ]
        if not any(map(_is_held_out, exchanged)):
            mentions[one], mentions[other] = exchanged
    raise RequestError(
        "prompt_captions: held-out combinations must be enough to be rearranged into trained ones, "
        f"got {len(captions)}; ask for 16 or more"
    )


def _is_held_out(mention: Mention) -> bool:
    return world.is_held_out(str(mention.shape), mention.colour, str(mention.motion))


def transfer(
    engine: "Engine",
    pairs: Sequence[TransferPair],
    control: Callable[[Clip], Any],
    *,
    progress: Progress = no_progress,
    **options: Any,
) -> list[ClipReading]:
    """Generate a clip for every pair and read back at most two shapes of each.

    A second shape matters because it may be a copy of the reference's.

    Args:
        engine: with the embedded model.
        pairs: what to transfer to what.
        control: makes the control of a reference; returns None for plain generation.
        progress: told of steps.
        options: of `Request`, such as `steps`.
    """
    requests = [
        Request(pair.caption.text, control(pair.reference()), seed=pair.seed, **options)
        for pair in pairs
    ]
    clips = engine.generate_many(requests, progress=progress)
    return read_clips(np.stack([clip.frames for clip in clips]), count=2)


def score_transfer(
    readings: Sequence[ClipReading], pairs: Sequence[TransferPair]
) -> TransferScores:
    """How the clips move like their references and look like their prompts.

    The path is that of the shape which the prompt means (`metrics.match_sprites`).
    """
    captions = [pair.caption for pair in pairs]
    references = [pair.sprite for pair in pairs]
    frames = readings[0].frames
    meant = [
        metrics.match_sprites(reading, caption)[0]
        for reading, caption in zip(readings, captions, strict=True)
    ]
    fidelity = metrics.motion_fidelity(
        [None if sprite is None else sprite.path for sprite in meant],
        [reference.path.points(frames) for reference in references],
    )
    return TransferScores(
        motion_fidelity=fidelity.mean,
        identity_leak=metrics.identity_leak(readings, references, captions),
        colour_accuracy=metrics.colour_accuracy(readings, captions),
        shape_accuracy=metrics.shape_accuracy(readings, captions),
        background_accuracy=metrics.background_accuracy(readings, captions),
        frame_consistency=metrics.mean_with_interval(
            [metrics.frame_consistency(reading) for reading in readings], bounds=(0.0, 1.0)
        ),
        fidelities=tuple(fidelity.per_clip.tolist()),
        leaks=tuple(
            metrics.identity_leak([reading], [reference], [caption]).mean == 1.0
            for reading, reference, caption in zip(readings, references, captions, strict=True)
        ),
        colours_right=tuple(
            metrics.colour_accuracy([reading], [caption]).mean == 1.0
            for reading, caption in zip(readings, captions, strict=True)
        ),
    )


def _choice(rng: np.random.Generator, values: Any) -> str:
    return str(rng.choice(sorted(values)))
