"""Consistent shots: one subject in several clips, each with a motion of its own.

All shots of a board are rows of one batch. Their rows see the subject in the same frame of the
other shots (extended keys and values, weighted by subject masks), which is how they come to agree
on who it is. The paper's network then makes them agree on how it moves as well, so it keeps the
queries of the spatial self-attention to those of the same shots left alone, the vanilla rows: at
first they are those queries (preservation), later the shot's own queries of key frames, moved to
the frames between along the correspondences of the vanilla queries (flow). Refinement draws the
outputs of spatial self-attention at matching patches of the subject together.

`PAPER` are the paper's switches. Its windows are timesteps t of 1000 that are evenly spaced over
the steps, so t is reached when the share 1 - t / 1000 of the steps is taken: keys act at t in
[550, 950], shares 0.05 to 0.45, refinement at [590, 950], shares 0.05 to 0.41, preservation until
t = 750. The defaults are what made shots of the embedded model agree most (bench `shots`): keys at
all steps and nothing else, since there the words of a prompt still say how its shot moves.

Source: "Motion by Queries: Identity-Motion Trade-offs in Text-to-Video Generation",
arXiv:2412.07750, sec. 5 (v1: "Multi-Shot Character Consistency for Text-to-Video Generation").
"""

import re
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from torch import Tensor

from kinetiq.errors import RequestError
from kinetiq.injection import check_share, check_text, injected_steps, one_of
from kinetiq.moft_guidance import MoftGuidance
from kinetiq.query_flow import KeyFrames, place_key_frames
from kinetiq.request import Request, ResolvedRequest
from kinetiq.subject_masks import FindMasks, as_array, fit_masks, is_listed

if TYPE_CHECKING:
    from kinetiq.clip import Clip
    from kinetiq.controls import Control

_MOST_WEIGHT = 1000
PAPER: dict[str, Any] = {
    "keys_window": (0.05, 0.45),
    "preserve_until": 0.25,
    "flow": True,
    "refine": 0.8,
}
"""Switches of `ConsistentShots` as the paper has them, where the defaults differ."""

_SHARED = ("steps", "frames", "height", "width", "guidance_scale", "fps", "sampler", "eta")


def _freeze_window(value: Any) -> Any:
    fits = isinstance(value, Sequence) and not isinstance(value, str)
    return tuple(value) if fits else value


def _check_window(_: object, attribute: Any, value: Any) -> None:
    fits = isinstance(value, tuple) and len(value) == 2
    if fits:
        for share in value:
            check_share(None, attribute, share)
    if not fits or value[0] > value[1]:
        raise RequestError(
            f"{attribute.name}: must be two shares of the steps, 0 to 1, the first not above the "
            f"second, got {value!r}"
        )


def _check_spacing(_: object, attribute: Any, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(
            f"{attribute.name}: must be a whole number of frames, at least 1, got {value!r}"
        )


def _check_weight(_: object, attribute: Any, value: Any) -> None:
    fits = isinstance(value, Real) and not isinstance(value, bool)
    if not fits or not 0 < value <= _MOST_WEIGHT:
        raise RequestError(
            f"{attribute.name}: must be a number above 0, up to {_MOST_WEIGHT}, got {value!r}"
        )


def _check_switch(_: object, attribute: Any, value: object) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{attribute.name}: must be True or False, got {value!r}")


def _freeze_control(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _freeze_masks(value: Any) -> Any:
    """Copy given masks, so that what was asked cannot change; an attrs converter."""
    if isinstance(value, str) or callable(value):
        return value
    if not is_listed(value):
        raise RequestError(
            "masks: must be 'attention', a callable, or a list of one array a shot, got "
            f"{type(value).__name__}"
        )
    frozen = []
    for number, given in enumerate(value, start=1):
        try:
            mask = as_array(given)
        except (TypeError, ValueError) as error:
            raise RequestError(
                f"masks: that of shot {number} must be an array of numbers: {error}"
            ) from error
        mask.flags.writeable = False
        frozen.append(mask)
    return tuple(frozen)


def _same_masks(one: Any, other: Any) -> bool:
    if not isinstance(one, tuple) or not isinstance(other, tuple):
        return bool(one is other or (isinstance(one, str) and one == other))
    return len(one) == len(other) and all(map(np.array_equal, one, other))


@attrs.frozen
class Shot:
    """One shot of a board.

    Args:
        prompt: what the clip shows; it must hold the board's subject.
        control: as in `Request`, but for MOFT guidance: it steers the shot left alone, from which
            the consistent shot takes its motion, and the consistent shot alike.
        seed: of its noise; None: the board's seed plus the shot's number, counted from 0.
        negative_prompt: as in `Request`.
    """

    prompt: str
    control: "Control | Sequence[Control] | None" = attrs.field(
        default=None, converter=_freeze_control
    )
    seed: int | None = None
    negative_prompt: str = ""


def _freeze_shots(value: Any) -> Any:
    fits = isinstance(value, Sequence) and not isinstance(value, str)
    if not fits or not all(isinstance(shot, Shot) for shot in value):
        raise RequestError(f"shots: must be a list of Shot, got {value!r}")
    return tuple(value)


@attrs.frozen(kw_only=True)
class ConsistentShots:
    """Several shots of one subject. What is None is the checkpoint's default.

    Windows and the like are shares of the steps, counted from the first; one that is not empty
    holds at least a step. The first step of a run that finds its masks itself has none to go by,
    so keys and refinement act from the second on unless `masks` are given or `vanilla="before"`.

    Args:
        subject: words that each shot's prompt holds.
        shots: at least two.
        masks: where the subject is: "attention" finds it by the attention that is paid to the
            subject's words; or an array for each shot, [frames, h, w] or [h, w] of any size, 1
            where the subject is, in a list or as one array; or a callable, which is given the
            estimate of the clean frames of each shot, float32 [frames, height, width, 3] in 0 to
            1, and returns such arrays. It is called at each step that needs masks; what it raises
            fails the board, as a `WorkError` of that cause, and no other. Both look at the shots
            left alone, and where those do not run, at the shots themselves.
        keys_window: first and last share of the steps in which shots see each other; (0, 0): none.
        keys_weight: how much a place of another shot counts beside one of the shot's own.
        preserve_until: share of the steps in which queries are those of the shot left alone.
        flow: whether queries are then moved from key frames to those between.
        key_frames: every how many frames one is a key frame; the first and the last always are.
        flow_weight: of the key frame before; "symmetric" by distance, (B - f) / (B - A), or
            "paper", sigmoid((B - f) / (B - A)), which is never below a half.
        refine_window: first and last share of the steps that are refined; (0, 0): none.
        refine: share of the outputs at the matching patches of the other shots, 0: none.
        refine_halves: "both" halves of guidance, or "cond" alone.
        query_halves: likewise of preservation and flow.
        mask_dropout: share of the masks that is left out at random, anew at each step but the
            same for the same seeds.
        vanilla: the shots left alone run "beside" the consistent shots, so that queries are of
            the same noise, and masks and matches of the step before; or "before" them, which keeps
            one feature map of little noise and one mask a shot, which is of the attention at all
            steps until there or of the clean frames estimated there; and then beside them while
            queries are preserved.
        map_at: share of the steps, where `vanilla` is "before", at which the feature map is taken.
        seed: of shots that have none.
        steps: as in `Request`, as are the following, for all shots.
        frames: see `Request`.
        height: see `Request`.
        width: see `Request`.
        guidance_scale: see `Request`.
        fps: see `Request`.
        sampler: see `Request`.
        eta: see `Request`.

    Raises:
        RequestError: an option is out of range, there are fewer than two shots, or a prompt does
            not hold the subject.
    """

    subject: str = attrs.field(kw_only=False)
    shots: tuple[Shot, ...] = attrs.field(kw_only=False, converter=_freeze_shots)
    masks: Any = attrs.field(
        default="attention",
        converter=_freeze_masks,
        eq=attrs.cmp_using(eq=_same_masks),
        hash=False,  # an array has none; equal boards still have equal hashes
    )
    keys_window: tuple[float, float] = attrs.field(
        default=(0.0, 1.0), converter=_freeze_window, validator=_check_window
    )
    keys_weight: float = attrs.field(default=1.0, validator=_check_weight)
    preserve_until: float = attrs.field(default=0.0, validator=check_share)
    flow: bool = attrs.field(default=False, validator=_check_switch)
    key_frames: int = attrs.field(default=4, validator=_check_spacing)
    flow_weight: str = attrs.field(default="symmetric", validator=one_of("symmetric", "paper"))
    refine_window: tuple[float, float] = attrs.field(
        default=(0.05, 0.41), converter=_freeze_window, validator=_check_window
    )
    refine: float = attrs.field(default=0.0, validator=check_share)
    refine_halves: str = attrs.field(default="both", validator=one_of("both", "cond"))
    query_halves: str = attrs.field(default="both", validator=one_of("both", "cond"))
    mask_dropout: float = attrs.field(default=0.0, validator=check_share)
    vanilla: str = attrs.field(default="beside", validator=one_of("beside", "before"))
    map_at: float = attrs.field(default=0.74, validator=check_share)
    seed: int = attrs.field(default=0, validator=attrs.fields(Request).seed.validator)
    steps: int | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    guidance_scale: float | None = None
    fps: float | None = None
    sampler: str | None = None
    eta: float = 0.0

    def __attrs_post_init__(self) -> None:
        """Check what only makes sense together."""
        check_text(None, attrs.fields(ConsistentShots).subject, self.subject)
        if not self.subject.strip():
            raise RequestError("subject: must hold at least one word, got an empty one")
        if len(self.shots) < 2:
            raise RequestError(f"shots: must be at least 2, got {len(self.shots)}")
        for number, request in enumerate(self.requests(), start=1):
            if not has_words(request.prompt, self.subject):
                raise RequestError(
                    f"shots: the prompt of shot {number} must hold the subject {self.subject!r} "
                    f"as words, got {request.prompt!r}"
                )
        if isinstance(self.masks, str) and self.masks != "attention":
            raise RequestError(
                "masks: must be 'attention', a callable, or a list of one array a shot, got "
                f"{self.masks!r}"
            )
        if isinstance(self.masks, tuple) and len(self.masks) != len(self.shots):
            raise RequestError(
                f"masks: must be one array for each of {len(self.shots)} shots, got "
                f"{len(self.masks)}"
            )

    def requests(self) -> tuple[Request, ...]:
        """The shots left alone, each as an ordinary request with the noise it has here.

        Raises:
            RequestError: a shot has no meaning; says which.
        """
        shared = {name: getattr(self, name) for name in _SHARED}
        made = []
        for number, shot in enumerate(self.shots):
            try:
                request = Request(
                    shot.prompt,
                    shot.control,
                    seed=self.seed + number if shot.seed is None else shot.seed,
                    negative_prompt=shot.negative_prompt,
                    **shared,
                )
            except RequestError as error:
                raise RequestError(f"shots: shot {number + 1}: {error}") from error
            # The converter made it a tuple.
            controls: tuple[Any, ...] = request.control  # type: ignore[assignment]
            if any(isinstance(control, MoftGuidance) for control in controls):
                raise RequestError(
                    f"shots: shot {number + 1}: control: must not be MoftGuidance, which moves "
                    "latents that the queries of the shot left alone no longer fit; use an "
                    "injection or a learned motion"
                )
            made.append(request)
        return tuple(made)


@attrs.frozen(eq=False)
class ShotBoard:
    """The shots of a board that is done.

    Args:
        clips: one a shot.
        masks: float32 [shots, frames, h, w] at the latents' size, 0 to 1: where the subject was
            taken to be at the last step that asked; None where none did.
    """

    clips: "tuple[Clip, ...]"
    masks: np.ndarray | None


@attrs.frozen(eq=False)
class ResolvedShots:
    """A board with nothing optional left. Steps are counted from 0, their ends are not included.

    Args:
        requests: of each shot.
        words: where each prompt holds the subject, as positions of text tokens.
        given: masks [shots, frames, h, w] at the latents' size; None where they are found.
        find: finds masks in clean frames; None where `given` are there or attention finds them.
        keys: first step in which shots see each other, and the end of those.
        keys_weight: how much a place of another shot counts.
        refined: likewise of refinement.
        alpha: share that refinement takes over.
        preserved: how many steps queries are those of the shots left alone.
        key_frames: between which queries are moved then; None: they are not.
        queries_conditional_only: whether unconditional rows keep their own queries.
        refine_conditional_only: whether they are not refined.
        mask_dropout: share of the masks that is left out at random.
        map_step: where one map is taken before the shots: the step; else None.
    """

    requests: tuple[ResolvedRequest, ...]
    words: tuple[tuple[int, ...], ...]
    given: Tensor | None
    find: FindMasks | None
    keys: tuple[int, int]
    keys_weight: float
    refined: tuple[int, int]
    alpha: float
    preserved: int
    key_frames: KeyFrames | None
    queries_conditional_only: bool
    refine_conditional_only: bool
    mask_dropout: float
    map_step: int | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """What clips of one batch have in common: frames, latent height, latent width."""
        return self.requests[0].shape

    @property
    def steps(self) -> int:
        """Steps of each shot."""
        return self.requests[0].sampler.steps

    @property
    def most_clips(self) -> int:
        """How many clips step at a time at most, the shots left alone among them."""
        return len(self.requests) * (2 if self.guided_until > 0 else 1)

    @property
    def first_steps(self) -> int:
        """Steps that the shots left alone take before the others."""
        return 0 if self.map_step is None else self.map_step + 1

    @property
    def guided_until(self) -> int:
        """The first step that the shots left alone need not take beside the others."""
        if self.map_step is not None:
            return self.preserved
        # Features of one step are matched at the next.
        mapped = max(self.refined[1] - 1, 0)
        return max(self.preserved, self.steps if self.flows else 0, mapped)

    @property
    def flows(self) -> bool:
        """Whether any step moves queries between key frames."""
        return self.key_frames is not None and self.preserved < self.steps

    @property
    def reads_words(self) -> bool:
        """Whether the attention to the subject's words says where it is."""
        sought = self.given is None and self.find is None
        return sought and max(self.keys[1], self.refined[1]) > 0

    @property
    def reads_features(self) -> bool:
        """Whether feature maps say which patches match."""
        return self.refined[1] > 0 or (self.flows and self.map_step is not None)

    def shares_keys(self, step: int) -> bool:
        """Whether shots see each other at a step, if it is known where the subject is."""
        return self.keys[0] <= step < self.keys[1]

    def refines(self, step: int) -> bool:
        """Whether shots are refined at a step, if it is known where the subject is."""
        return self.refined[0] <= step < self.refined[1]


def resolve_shots(
    shots: ConsistentShots,
    requests: tuple[ResolvedRequest, ...],
    words: tuple[tuple[int, ...], ...],
) -> ResolvedShots:
    """Turn what was asked into data.

    Args:
        shots: what was asked.
        requests: of its shots, resolved.
        words: where their prompts hold the subject.

    Raises:
        RequestError: a mask does not fit the clips.
    """
    steps, shape = requests[0].sampler.steps, requests[0].shape
    given = fit_masks(shots.masks, shape, len(requests)) if isinstance(shots.masks, tuple) else None
    keys = _steps_of(shots.keys_window, steps)
    refined = (0, 0) if shots.refine == 0 else _steps_of(shots.refine_window, steps)
    preserved = injected_steps(shots.preserve_until, steps)
    key_frames = None
    if shots.flow and shots.key_frames > 1:  # else every frame keeps its own queries
        key_frames = place_key_frames(shape[0], shots.key_frames, shots.flow_weight)
    flows = key_frames is not None and preserved < steps
    masks_needed = given is None and max(keys[1], refined[1]) > 0
    mapped = shots.vanilla == "before" and (flows or refined[1] > 0 or masks_needed)
    return ResolvedShots(
        requests=requests,
        words=words,
        given=given,
        find=shots.masks if callable(shots.masks) else None,
        keys=keys,
        keys_weight=float(shots.keys_weight),
        refined=refined,
        alpha=float(shots.refine),
        preserved=preserved,
        key_frames=key_frames,
        queries_conditional_only=shots.query_halves == "cond",
        refine_conditional_only=shots.refine_halves == "cond",
        mask_dropout=float(shots.mask_dropout),
        map_step=min(round(shots.map_at * steps), steps - 1) if mapped else None,
    )


def finds_masks(shots: ConsistentShots, steps: int) -> bool:
    """Whether any of `steps` steps goes by where the subject is, so that a board has masks."""
    refined = (0, 0) if shots.refine == 0 else _steps_of(shots.refine_window, steps)
    until = max(_steps_of(shots.keys_window, steps)[1], refined[1])
    # Beside the shots, what is found at one step is for the next.
    first = 0 if isinstance(shots.masks, tuple) or shots.vanilla == "before" else 1
    return until > first


def _steps_of(window: tuple[float, float], steps: int) -> tuple[int, int]:
    """The first step of a window and its end; (0, 0) for an empty one."""
    if window[0] == window[1]:
        return 0, 0
    first = min(round(window[0] * steps), steps - 1)
    return first, max(first + 1, round(window[1] * steps))


def has_words(text: str, words: str) -> bool:
    """Whether a text holds words in their order, whatever their case and spacing."""
    wanted = r"\s+".join(map(re.escape, words.split()))
    return re.search(rf"(?<!\w){wanted}(?!\w)", text, re.IGNORECASE) is not None
