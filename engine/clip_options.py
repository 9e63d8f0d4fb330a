"""What is said of one clip in words and paths, and the controls that it becomes.

`kinetiq generate` takes the options of one clip, a line of `kinetiq batch` those of another. All
that can be wrong with them is found by `ClipOptions.plan`, before a model is loaded; clips
are read whole once the model says at which size they are needed.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from kinetiq.clip import Clip, peek
from kinetiq.errors import RequestError
from kinetiq.injection import Injection
from kinetiq.learned_motion import default_switches, use_with
from kinetiq.moft_guidance import MoftGuidance, MoftRegion
from kinetiq.motion_embedding import MotionEmbedding
from kinetiq.motion_file import read_info
from kinetiq.motion_injection import MotionInjection
from kinetiq.motion_lora import MotionLora
from kinetiq.named_files import is_there
from kinetiq.options import CONTROLS, DIRECTIONS
from kinetiq.query_injection import QueryInjection
from kinetiq.request import Request

if TYPE_CHECKING:
    from kinetiq.controls import Control, LearnedMotion
    from kinetiq.engine import Defaults

_SHARED = ("until", "halves", "region")
_LEARNED = ("until", "halves", "motion_scale", "noise_prior")
_GUIDING = ("moft_weight", "moft_step_size", "moft_window", "moft_tap")
_SWITCHES = {  # of each kind of control: the options that it takes
    "motion": (*_SHARED, "parts"),
    "query": (*_SHARED, "sites", "reduce_leak"),
    "embedding": (*_LEARNED, "value_scale", "debias"),
    "lora": (*_LEARNED, "highway", "beta"),
    "guidance": ("region", "speed", *_GUIDING),
}
_SITE_WORDS = ("spatial", "temporal", "both")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


@attrs.frozen
class Readers:
    """How files are read; ones that remember read each file once for many clips.

    Args:
        peek: the first frames of a clip.
        motions: see `read_motions`.
        region: see `read_region`.
    """

    peek: Callable[[Path], Clip]
    motions: "Callable[[tuple[str, ...], tuple[str, ...], Path], Mapping[str, LearnedMotion]]"
    region: Callable[[Path], np.ndarray]


@attrs.frozen(kw_only=True)
class ClipOptions:
    """The options of one clip, each None or empty where nothing was said.

    What they mean is said by `kinetiq generate --help`.

    Args:
        folder: what relative paths start from.
    """

    prompt: str
    reference: Path | None = None
    control: str | None = None
    until: float | None = None
    sites: str | None = None
    reduce_leak: bool | None = None
    parts: str | None = None
    halves: str | None = None
    moft: Path | None = None
    direction: str | None = None
    speed: float | None = None
    drags: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    moft_weight: float | None = None
    moft_step_size: float | None = None
    moft_window: str | None = None
    moft_tap: str | None = None
    fit: str | None = None
    motions: tuple[str, ...] = ()
    motion_scale: float | None = None
    value_scale: float | None = None
    debias: str | None = None
    noise_prior: float | None = None
    highway: str | None = None
    beta: float | None = None
    negative_prompt: str = ""
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    eta: float = 0.0
    frames: int | None = None
    size: str | None = None
    fps: float | None = None
    scale: int = 1
    folder: Path = Path()

    def request_options(self) -> dict[str, Any]:
        """The options of `Request` but the control.

        Raises:
            RequestError: one is out of range.
        """
        height, width = parse_size("generate", self.size)
        options: dict[str, Any] = {
            "seed": self.seed,
            "negative_prompt": self.negative_prompt,
            "steps": self.steps,
            "guidance_scale": self.guidance,
            "sampler": self.sampler,
            "eta": self.eta,
            "frames": self.frames,
            "height": height,
            "width": width,
            "fps": self.fps,
        }
        Request.from_options(self.prompt, options)
        return options

    def plan(self, readers: Readers | None = None) -> "ClipPlan":
        """Check all of it, with no more than the first frames of clips.

        Raises:
            InputError: an option has no meaning, or a file is missing or is not what it must be.
        """
        use = readers or Readers(peek, read_motions, read_region)
        options = self.request_options()
        plain, moving = _parse_regions(self.regions, self.folder)
        reference, moft = (
            None if path is None else self.folder / path for path in (self.reference, self.moft)
        )
        clips = [path for path in (reference, moft, *moving.values()) if isinstance(path, Path)]
        if not clips and self.fit is not None:
            raise RequestError("generate: --fit needs --reference, got none, and no --moft either")
        window = self.moft_window
        switches = {
            "until": self.until,
            "sites": self.sites,
            "reduce_leak": self.reduce_leak,
            "parts": self.parts,
            "halves": self.halves,
            "region": plain,
            "speed": self.speed,
            "moft_weight": self.moft_weight,
            "moft_step_size": self.moft_step_size,
            "moft_window": None if window is None else _parse_window(window, bool(self.drags)),
            "moft_tap": self.moft_tap,
            "motion_scale": self.motion_scale,
            "value_scale": self.value_scale,
            "debias": self.debias,
            "noise_prior": self.noise_prior,
            "highway": self.highway,
            "beta": self.beta,
        }
        given: dict[str, Any] = {n: value for n, value in switches.items() if value is not None}
        if self.highway == "none":
            given["highway"] = None
        start = None if reference is None else use.peek(reference)
        learned = use.motions(self.motions, tuple(given), self.folder)
        asked = {
            "reference": None if moft is None else use.peek(moft),
            "direction": self.direction,
            "regions": moving,
            "points": [_parse_drag(drag) for drag in self.drags],
        }
        controls = _build_controls(start, self.control, learned, asked, given, use)
        return ClipPlan(self, options, tuple(controls), reference, moft, moving)

    def content(self, digest: Callable[[Path], str]) -> dict[str, Any]:
        """What options have in common that ask for the same clip, wherever the files lie.

        Args:
            digest: of the content of a file or a folder.

        Raises:
            InputError: words have no meaning, or a file cannot be read.
        """
        plain, moving = _parse_regions(self.regions, self.folder)
        said = attrs.asdict(self, filter=lambda field, _: field.name != "folder")
        for name, path in (("reference", self.reference), ("moft", self.moft)):
            said[name] = None if path is None else digest(self.folder / path)
        said["regions"] = [None if plain is None else digest(plain)] + [
            [digest(mask), digest(motion) if isinstance(motion, Path) else motion]
            for mask, motion in moving.items()
        ]
        weights = (parse_motion(words, self.folder) for words in self.motions)
        said["motions"] = [[weight, digest(path)] for weight, path in weights]
        return said

    @property
    def named_files(self) -> tuple[Path, ...]:
        """All files and folders that are named, each clip, mask and motion.

        Raises:
            RequestError: a region's words have no meaning.
        """
        plain, moving = _parse_regions(self.regions, self.folder)
        said = [self.reference, self.moft, plain, *moving, *moving.values()]
        motions = [parse_motion(words, self.folder)[1] for words in self.motions]
        return tuple(self.folder / path for path in said if isinstance(path, Path)) + tuple(motions)


@attrs.frozen
class ClipPlan:
    """Options of a clip that were checked.

    Args:
        asked: the options.
        options: those of `Request`, but the control.
        controls: what steers; with no more than the first frames of the clips that they name.
        reference: the clip of injections.
        moft: the clip of a guidance.
        moving: of each region with a motion of its own, that motion: a clip or a direction.
    """

    asked: ClipOptions
    options: Mapping[str, Any]
    controls: "tuple[Control, ...]"
    reference: Path | None
    moft: Path | None
    moving: Mapping[Path, Path | str]

    @property
    def reads_clips(self) -> bool:
        """Whether `read_controls` reads any."""
        named = (self.reference, self.moft, *self.moving.values())
        return bool(self.controls) and any(isinstance(path, Path) for path in named)

    @property
    def guided(self) -> bool:
        """Whether gradients steer it."""
        return any(isinstance(control, MoftGuidance) for control in self.controls)

    def read_controls(
        self, defaults: "Defaults", read: Callable[..., Clip] = Clip.read
    ) -> "list[Control]":
        """The controls, their clips read whole at the size that they are needed at.

        Args:
            defaults: of the model.
            read: reads a clip, as `Clip.read` does.

        Raises:
            ClipError: a clip is damaged further on.
        """
        size = {
            "height": self.options["height"] or defaults.height,
            "width": self.options["width"] or defaults.width,
            "fit": self.asked.fit or "crop",
        }
        return [self._whole(control, lambda path: read(path, **size)) for control in self.controls]

    def _whole(self, control: "Control", read: Callable[[Path], Clip]) -> "Control":
        """A control that was made with the first frames of its clips, with all of them."""
        if isinstance(control, Injection) and self.reference is not None:
            return attrs.evolve(control, reference=read(self.reference))
        if not isinstance(control, MoftGuidance):
            return control
        regions = [
            attrs.evolve(region, reference=read(motion)) if isinstance(motion, Path) else region
            for region, motion in zip(control.regions, self.moving.values(), strict=True)
        ]
        whole = None if self.moft is None else read(self.moft)
        return attrs.evolve(control, reference=whole, regions=regions)


def read_motions(
    asked: tuple[str, ...], given: tuple[str, ...] = (), folder: Path = Path()
) -> "dict[str, LearnedMotion]":
    """The sum of the learned motions of each kind, "embedding" or "lora".

    Switches that are `given`, by the names that they have as options, are for the sum, so what
    files say of them does not count, and need not be the same in all.

    Args:
        asked: each [WEIGHT*]FILE.
        given: names of switches.
        folder: what relative paths start from.

    Raises:
        CheckpointError: a file is no motion.
        RequestError: two motions cannot be added up.
    """
    total: dict[str, LearnedMotion] = {}
    for words in asked:
        weight, path = parse_motion(words, folder)
        kind = read_info(path).kind
        made: Any = MotionLora if kind == "lora" else MotionEmbedding
        names = [name.removeprefix("motion_") for name in given if name in _SWITCHES[kind]]
        defaults = default_switches(made)
        motion: Any = use_with(made.read(path), **{name: defaults[name] for name in names})
        before: Any = total.get(kind)
        if isinstance(before, MotionEmbedding):
            shape = before.info
            motion = motion.resample(frames=shape.frames)
            motion = motion.resize(height=shape.height, width=shape.width)
        motion = motion if weight == 1.0 else weight * motion
        total[kind] = motion if before is None else before + motion
    return total


def read_region(path: Path, where: str = "generate") -> np.ndarray:
    """How bright a picture is, 0 to 1: [height, width], or [frames, height, width] of a clip.

    Raises:
        ClipError: it cannot be read.
        RequestError: it is all black.
    """
    clip = Clip.read(path)
    mask: np.ndarray = clip.frames.mean(axis=-1, dtype=np.float32) / 255.0
    if not mask.any():
        raise RequestError(
            f"{where}: --region must be white where the motion is wanted, and {path} is all black"
        )
    return mask[0] if clip.is_still_image else mask


def parse_size(where: str, size: str | None) -> tuple[int | None, int | None]:
    """Height and width of HEIGHTxWIDTH.

    Raises:
        RequestError: it is none; the message begins with `where`.
    """
    if size is None:
        return None, None
    found = re.fullmatch(r"([0-9]{1,6})[xX]([0-9]{1,6})", size)
    if found is None:
        raise RequestError(f"{where}: --size must be HEIGHTxWIDTH such as 320x512, got {size!r}")
    return int(found[1]), int(found[2])


def _build_controls(
    reference: "Clip | None",
    control: str | None,
    learned: "Mapping[str, LearnedMotion]",
    guided: Mapping[str, Any],
    given: Mapping[str, Any],
    use: Readers,
) -> "list[Control]":
    """The controls that were asked for, with the switches `given` to them.

    What `guided` holds says what motion gradients are to follow; its regions are what
    `_parse_regions` made. A clip starts from one noise: that of the first learned motion that has
    any, and a share that is `given` is of that.

    Raises:
        RequestError: a switch belongs to no control that was asked for, or is out of range.
    """
    if reference is None and control not in (None, "none"):
        raise RequestError(f"generate: --control {control} needs --reference, got none")
    chosen = control or ("none" if reference is None else "motion")
    kinds = {"none": (), "both": ("query", "motion")}.get(chosen, (chosen,))
    guiding = ("guidance",) if any(guided.values()) else ()
    _require_takers(given, chosen, (*kinds, *learned, *guiding))
    values = {name: value for name, value in given.items() if name != "region"}
    if "region" in given:
        values["region"] = use.region(given["region"])
    if "sites" in given:
        names = tuple(name.strip() for name in given["sites"].split(","))
        values["sites"] = names[0] if names[0] in _SITE_WORDS and len(names) == 1 else names
    controls: list[Control] = []
    makers = {"motion": MotionInjection, "query": QueryInjection}
    for kind in kinds if reference is not None else ():
        taken = {name: value for name, value in values.items() if name in _SWITCHES[kind]}
        controls.append(makers[kind](reference, **taken))
    noise_is_brought = False
    for kind, motion in learned.items():
        taken = {
            name.removeprefix("motion_"): value
            for name, value in values.items()
            if name in _SWITCHES[kind]
        }
        if motion.noise is None and any(one.noise is not None for one in learned.values()):
            taken.pop("noise_prior", None)  # it is the other's
        elif noise_is_brought:
            taken["noise_prior"] = 0.0
        noise_is_brought |= motion.noise is not None
        controls.append(use_with(motion, **taken))
    if guiding:
        taken = {
            name.removeprefix("moft_"): value
            for name, value in values.items()
            if name in _SWITCHES["guidance"]
        }
        if guided["points"] and "window" in taken:
            taken["drag_window"] = taken.pop("window")
        if guided["regions"] and controls:
            taken.pop("region", None)  # it is theirs: each region of a guidance has its own
        controls.append(_build_guidance(guided, taken, use))
    return controls


def _build_guidance(
    guided: Mapping[str, Any], taken: Mapping[str, Any], use: Readers
) -> MoftGuidance:
    moving: Mapping[Path, Path | str] = guided["regions"]
    if not moving:
        return MoftGuidance(**{**guided, "regions": ()}, **taken)
    taken = dict(taken)
    speed = {"speed": taken.pop("speed")} if "speed" in taken else {}
    if speed and not any(isinstance(motion, str) for motion in moving.values()):
        raise RequestError("generate: --speed acts with a direction, and each --region has a clip")
    regions = [
        MoftRegion(use.region(mask), reference=use.peek(motion))
        if isinstance(motion, Path)
        else MoftRegion(use.region(mask), direction=motion, **speed)
        for mask, motion in moving.items()
    ]
    return MoftGuidance(**{**guided, "regions": regions}, **taken)


def _require_takers(given: Mapping[str, Any], chosen: str, kinds: tuple[str, ...]) -> None:
    """Raise unless each switch that is `given` is one of a control of these kinds."""
    for name in given:
        takers = [kind for kind, switches in _SWITCHES.items() if name in switches]
        if set(takers) & set(kinds):
            continue
        option = f"generate: --{name.replace('_', '-')} acts with"
        if takers == ["guidance"]:
            guides = "--moft, --direction, --drag or --region MASK:MOTION"
            if name == "speed":
                guides = "--direction or --region MASK:DIRECTION"
            raise RequestError(f"{option} {guides}, got none of them")
        steered = [kind for kind in takers if kind in CONTROLS]
        if steered:
            raise RequestError(
                f"{option} a --reference and --control {', '.join(steered)} or both, "
                f"got --control {chosen}"
                + ("; or with --moft, --direction or --drag" if "guidance" in takers else "")
            )
        got = [kind for kind in kinds if kind in ("embedding", "lora")]
        raise RequestError(
            f"{option} a --motion that is of kind {' or '.join(takers)}, "
            f"got {' and '.join(got) or 'no --motion'}"
        )


def parse_motion(words: str, folder: Path) -> tuple[float, Path]:
    """The weight and the file of [WEIGHT*]FILE; a minus before a name that is no file is -1."""
    found = re.fullmatch(rf"({_NUMBER})\s*\*\s*(.+)", words)
    if found is not None:
        return float(found[1]), folder / found[2]
    if words.startswith("-") and not _exists(words, folder):
        return -1.0, folder / words[1:].strip()
    return 1.0, folder / words


def _parse_regions(
    asked: tuple[str, ...], folder: Path
) -> tuple[Path | None, dict[Path, Path | str]]:
    """The mask that comes without a motion, and of each other its clip or its direction.

    Raises:
        RequestError: a motion is neither, a mask comes twice, or two come without a motion.
    """
    plain: Path | None = None
    moving: dict[Path, Path | str] = {}
    for words in asked:
        start, colon, motion = words.rpartition(":")
        if not colon or _exists(words, folder):
            if plain is not None:
                raise RequestError(
                    f"generate: --region without a motion must come at most once, got {plain} and "
                    f"{words}; each further one needs its own, such as {words}:right"
                )
            plain = folder / words
        elif not start or not (motion in DIRECTIONS or _exists(motion, folder)):
            raise RequestError(
                "generate: --region must be MASK, or MASK:MOTION with a motion that is a file or "
                f"one of {', '.join(DIRECTIONS)}, got {words!r}"
            )
        elif folder / start in moving:
            raise RequestError(f"generate: --region must name each mask once, got {start} twice")
        else:
            moving[folder / start] = motion if motion in DIRECTIONS else folder / motion
    return plain, moving


def _exists(words: str, folder: Path) -> bool:
    return bool(words) and is_there(folder / words)


def _parse_drag(words: str) -> tuple[tuple[float, float], tuple[float, float]]:
    point = rf"({_NUMBER}),({_NUMBER})"
    found = re.fullmatch(f"{point}:{point}", words)
    if found is None:
        raise RequestError(f"generate: --drag must be X,Y:X,Y such as 20,30:40,30, got {words!r}")
    x0, y0, x1, y1 = map(float, found.groups())
    return (x0, y0), (x1, y1)


def _parse_window(words: str, drags: bool) -> tuple[float, ...]:
    count, form = (3, "A,B,C such as 0.76,0.72,0.2") if drags else (2, "A,B such as 0.12,0.48")
    shares = words.split(",")
    if len(shares) != count or not all(re.fullmatch(_NUMBER, share) for share in shares):
        of = "with --drag" if drags else "without --drag"
        raise RequestError(f"generate: --moft-window must be {form} {of}, got {words!r}")
    return tuple(map(float, shares))
