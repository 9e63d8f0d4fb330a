"""`kinetiq demo`: one reference, three subjects, with and without control, measured."""

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from kinetiq.clip import Clip, check_format
from kinetiq.engine import Engine
from kinetiq.errors import OutputError, RequestError
from kinetiq.files import as_target, write_text
from kinetiq.generation import Progress, no_progress
from kinetiq.injection import Injection, check_share
from kinetiq.motion_injection import MotionInjection
from kinetiq.query_injection import QueryInjection
from kinetiq.request import Request
from kinetiq.sheet import contact_sheet, side_by_side, write_image
from kinetiq.sprites import metrics, world
from kinetiq.sprites.cases import render_clip
from kinetiq.sprites.reading import LARGEST, MOST_FRAMES, SMALLEST, ClipReading, read_clips
from kinetiq.sprites.world import COLOURS, Caption, Mention, Scene, Sprite

REFERENCE = Scene(
    (Sprite("square", COLOURS["green"], world.Path("zigzagging", 0.5), radius=0.2),),
    background_hue=COLOURS["purple"],
)
REFERENCE_TEXT = Caption((Mention("square", "green", motion="zigzagging"),), "purple").text
CAPTIONS = (
    Caption((Mention("circle", "red"),), "blue"),
    Caption((Mention("ring", "gold"),), "green"),
    Caption((Mention("cross", "pink", "striped"),), "cyan"),
)
_SHOWN_SIDE = 224  # pixels of a clip in what is written, at least
_OPTIONAL_SHARE: Any = attrs.validators.optional(check_share)
_GRID, _REPORT = "side-by-side.gif", "report.json"


@attrs.frozen(kw_only=True)
class DemoOptions:
    """What a demo is asked for. What is None is the checkpoint's default, or each control's own.

    Args:
        seed: of every clip.
        steps: sampler steps.
        guidance_scale: 1 is none.
        until: share of the steps that are steered.
        frames: frames of each clip, from 2 on, so that there is motion to measure.
        size: height and width in pixels, among those at which clips can be read back.
        fps: frames a second.

    Raises:
        OutputError: `fps` is more than a gif can show.
        RequestError: an option is out of range.
    """

    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    until: float | None = attrs.field(default=None, validator=_OPTIONAL_SHARE)
    frames: int | None = None
    size: int | None = None
    fps: float | None = None

    def __attrs_post_init__(self) -> None:
        self.request("any", None)
        if self.frames is not None and not 2 <= self.frames <= MOST_FRAMES:
            raise RequestError(
                f"demo: frames must be 2 to {MOST_FRAMES}, whose motion can be read back, "
                f"got {self.frames}"
            )
        if self.size is not None and not SMALLEST <= self.size <= LARGEST:
            raise RequestError(
                f"demo: size must be {SMALLEST} to {LARGEST} pixels, at which clips can be read "
                f"back, got {self.size}"
            )
        check_format(Path(_GRID), fps=self.fps)

    def request(self, prompt: str, control: Injection | None) -> Request:
        """One clip of the demo."""
        return Request(
            prompt,
            control,
            seed=self.seed,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            frames=self.frames,
            height=self.size,
            width=self.size,
            fps=self.fps,
        )


@attrs.frozen
class Way:
    """Plain generation, or a method of steering it.

    Args:
        key: in names of files.
        title: for people.
        control: of the requests.
    """

    key: str
    title: str
    control: Injection | None


@attrs.frozen
class Shown:
    """One clip of the demo and what is said of it in the report."""

    way: Way
    caption: Caption
    clip: Clip
    entry: dict[str, Any]


def check_folder(out: Path) -> None:
    """Raise unless `out` is a folder that can be written, or can be made one; nothing is made.

    Raises:
        OutputError: it is neither.
    """
    as_target(out.absolute(), "demo")
    try:
        nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    except OSError as error:
        raise _no_folder(out, error.strerror) from error
    if not nearest.is_dir():
        raise _no_folder(out, f"{nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _no_folder(out, f"{nearest} cannot be written")


def run_demo(
    engine: Engine,
    out: Path,
    options: DemoOptions,
    *,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Generate, measure, and write clips, pictures and report.json to `out`.

    Args:
        engine: with the embedded model, or one of its world: others cannot be measured.
        out: a folder; made if need be, once all clips are there. A former demo in it is replaced.
        options: what is asked for.
        progress: told of steps.

    Returns:
        What report.json says.

    Raises:
        OutputError: `out` cannot be written.
        RequestError: an option is out of range for this model.
    """
    check_folder(out)
    defaults = engine.defaults
    frames, size = options.frames or defaults.frames, options.size or defaults.height
    fps = options.fps or defaults.fps
    asked = attrs.evolve(  # checks what the checkpoint says as well
        options,
        steps=options.steps or defaults.steps,
        guidance_scale=options.guidance_scale or defaults.guidance_scale,
        frames=frames,
        size=size,
        fps=fps,
    )
    reference = Clip(render_clip(REFERENCE, frames, size).frames, fps)
    given: dict[str, Any] = {} if asked.until is None else {"until": asked.until}
    ways = (
        Way("plain", "no control", None),
        Way("motion", "motion injection", MotionInjection(reference, **given)),
        Way("query", "query injection", QueryInjection(reference, **given)),
    )
    jobs = [(way, caption) for caption in CAPTIONS for way in ways]
    requests = [asked.request(caption.text, way.control) for way, caption in jobs]
    clips = list(engine.generate_many(requests, max_clips=len(requests), progress=progress))
    readings = read_clips(np.stack([clip.frames for clip in clips]))
    shown = [
        Shown(way, caption, clip, _measure(way, caption, reading))
        for (way, caption), clip, reading in zip(jobs, clips, readings, strict=True)
    ]
    report = {
        "model": engine.checkpoint.name,
        "seed": asked.seed,
        "steps": asked.steps,
        "guidance_scale": asked.guidance_scale,
        "frames": asked.frames,
        "height": asked.size,
        "width": asked.size,
        "fps": asked.fps,
        "reference": REFERENCE_TEXT,
        "clips": [each.entry for each in shown],
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_folder(out, error.strerror) from error
    _write(out, reference, shown, report)
    return report


def describe(report: dict[str, Any]) -> str:
    """The report as lines for a person."""
    lines = [f"reference: {report['reference']}"]
    for prompt, clips in itertools.groupby(report["clips"], lambda clip: str(clip["prompt"])):
        lines += ["", prompt]
        for clip in clips:
            right = [name for name in ("colour", "shape", "background") if clip[f"{name}_right"]]
            lines.append(
                f"  {clip['control']:<18}motion fidelity {clip['motion_fidelity']:+.2f}   "
                f"as prompted: {', '.join(right) or 'nothing'}"
            )
    lines += [
        "",
        "Motion fidelity is 1 for the reference's motion, 0 for one that has nothing to do with",
        "it, and -1 for the opposite one.",
    ]
    return "\n".join(lines)


def _measure(way: Way, caption: Caption, reading: ClipReading) -> dict[str, Any]:
    path = metrics.first_path(reading)
    wanted = REFERENCE.sprites[0].path.points(reading.frames)
    mention = caption.mentions[0]
    return {
        "file": f"{mention.colour}-{mention.shape}-{way.key}.mp4",
        "prompt": caption.text,
        "control": way.title,
        "until": None if way.control is None else way.control.until,
        "motion_fidelity": round(metrics.path_fidelity(path, wanted), 3),
        "colour_right": metrics.colour_accuracy([reading], [caption]).mean == 1.0,
        "shape_right": metrics.shape_accuracy([reading], [caption]).mean == 1.0,
        "background_right": metrics.background_accuracy([reading], [caption]).mean == 1.0,
    }


def _write(out: Path, reference: Clip, shown: Sequence[Shown], report: dict[str, Any]) -> None:
    """Everything, report.json last and a former one first: where it is, the rest belongs to it."""
    try:
        (out / _REPORT).unlink(missing_ok=True)
    except OSError as error:
        raise _no_folder(out, f"{_REPORT} cannot be replaced: {error.strerror}") from error
    scale = max(-(-_SHOWN_SIDE // reference.height), 1)
    reference.write(out / "reference.mp4", scale=scale)
    for each in shown:
        each.clip.write(out / each.entry["file"], scale=scale)
    grid, across = _grid(reference, shown)
    side_by_side(grid, columns=across, scale=scale).write(out / _GRID)
    rows = [(f"reference: {REFERENCE_TEXT}", reference)]
    for each in shown:
        fidelity = f"motion fidelity {each.entry['motion_fidelity']:+.2f}"
        rows.append((f"{each.caption.text}, {each.way.title}: {fidelity}", each.clip))
    write_image(contact_sheet(rows), out / "sheet.png")
    write_text(out / _REPORT, json.dumps(report, indent=2) + "\n", "demo")


def _grid(reference: Clip, shown: Sequence[Shown]) -> tuple[list[tuple[str, Clip]], int]:
    """Cells of a grid and how many are in a row: for each prompt the reference, then every way."""
    cells: list[tuple[str, Clip]] = []
    for caption in CAPTIONS:
        cells.append(("reference", reference))
        cells += [
            (f"{each.way.title}: {caption.text}", each.clip)
            for each in shown
            if each.caption == caption
        ]
    return cells, len(cells) // len(CAPTIONS)


def _no_folder(out: Path, reason: object) -> OutputError:
    return OutputError(
        f"demo: {out} must be a folder that can be written, and is none ({reason}); choose another "
        "with --out"
    )
