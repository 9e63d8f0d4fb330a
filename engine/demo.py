"""`kinetiq demo`: one reference, three subjects, both methods, measured."""

import json
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from kinetiq.clip import Clip, replacing
from kinetiq.engine import Engine
from kinetiq.errors import OutputError
from kinetiq.generation import Progress, no_progress
from kinetiq.motion_injection import MotionInjection
from kinetiq.query_injection import QueryInjection
from kinetiq.request import Request
from kinetiq.sheet import contact_sheet, side_by_side, write_image
from kinetiq.sprites import metrics
from kinetiq.sprites.cases import render_clip
from kinetiq.sprites.reading import read_clips
from kinetiq.sprites.world import COLOURS, Caption, Mention, Path as SpritePath, Scene, Sprite

SCALE = 8
REFERENCE = Scene(
    (Sprite("square", COLOURS["green"], SpritePath("zigzagging", 0.5), radius=0.2),),
    background_hue=COLOURS["purple"],
)
CAPTIONS = (
    Caption((Mention("circle", "red"),), "blue"),
    Caption((Mention("ring", "gold"),), "green"),
    Caption((Mention("cross", "pink", "striped"),), "cyan"),
)


@attrs.frozen
class Way:
    """One column of the demo: plain generation, or a method of steering it."""

    key: str
    title: str
    control: Any


def run_demo(
    engine: Engine,
    out: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    until: float | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Generate, measure and write everything to `out`; return what report.json says.

    Raises:
        OutputError: `out` cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"demo: {out} must be a folder that can be written: {error}") from error
    reference = render_clip(REFERENCE, engine.defaults.frames, engine.defaults.height)
    given = {} if until is None else {"until": until}
    ways = (
        Way("plain", "no control", None),
        Way("motion", "motion injection", MotionInjection(reference, **given)),
        Way("query", "query injection", QueryInjection(reference, **given)),
    )
    jobs = [(way, caption) for caption in CAPTIONS for way in ways]
    requests = [
        Request(
            caption.text, way.control, seed=seed, steps=steps, guidance_scale=guidance_scale
        )
        for way, caption in jobs
    ]
    clips = list(engine.generate_many(requests, max_clips=len(requests), progress=progress))
    report = {
        "model": engine.checkpoint.name,
        "reference": "a green square zigzagging on a dark purple background",
        "clips": [
            _measure(way, caption, clip, reference)
            for (way, caption), clip in zip(jobs, clips, strict=True)
        ],
    }
    _write(out, reference, list(zip(jobs, clips, strict=True)), report)
    report["out"] = str(out)
    return report


def describe(report: dict[str, Any]) -> str:
    """The report as lines for a person."""
    lines = [f"reference: {report['reference']}", ""]
    width = max(len(clip["prompt"]) for clip in report["clips"])
    for clip in report["clips"]:
        said = "colour right" if clip["colour_right"] else f"colour {clip['colour'] or 'unclear'}"
        lines.append(
            f"{clip['prompt']:<{width}}  {clip['control']:<16}  "
            f"motion fidelity {clip['motion_fidelity']:+.2f}  {said}"
        )
    lines += [
        "",
        "Motion fidelity is 1 for the reference's path, 0 for no relation, -1 for the opposite.",
        f"Clips, side-by-side.gif, sheet.png and report.json are in {report['out']}",
    ]
    return "\n".join(lines)


def _measure(way: Way, caption: Caption, clip: Clip, reference: Clip) -> dict[str, Any]:
    reading, wanted = read_clips(np.stack([clip.frames, reference.resample(clip.num_frames).frames]))
    path = metrics.first_path(reading)
    colour = reading.sprites[0].colour if reading.sprites else None
    return {
        "file": _file_name(way, caption),
        "prompt": caption.text,
        "control": way.title,
        "motion_fidelity": round(metrics.path_fidelity(path, wanted.sprites[0].path), 3),
        "colour": colour,
        "colour_right": colour == caption.mentions[0].colour,
    }


def _write(out: Path, reference: Clip, made: list[Any], report: dict[str, Any]) -> None:
    rows = [("reference", reference)]
    rows += [(f"{way.title}: {caption.text}", clip) for (way, caption), clip in made]
    reference.write(out / "reference.mp4", scale=SCALE)
    for (way, caption), clip in made:
        clip.write(out / _file_name(way, caption), scale=SCALE)
    side_by_side(rows, columns=len(CAPTIONS) + 1).write(out / "side-by-side.gif")
    write_image(contact_sheet(rows), out / "sheet.png")
    with replacing(out / "report.json", "demo") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")


def _file_name(way: Way, caption: Caption) -> str:
    mention = caption.mentions[0]
    return f"{mention.colour}-{mention.shape}-{way.key}.mp4"
