"""The embedded model against its world: does it show, and do, what the prompt says?"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kinetiq.bench.figures import Figure
from kinetiq.bench.harness import Bench, BenchOptions, Progress
from kinetiq.engine import Engine
from kinetiq.request import Request
from kinetiq.sprites import metrics
from kinetiq.sprites.cases import prompt_captions
from kinetiq.sprites.metrics import Interval
from kinetiq.sprites.reading import ClipReading, read_clips
from kinetiq.sprites.world import Caption

ACCURACIES: dict[str, Callable[[Sequence[ClipReading], Sequence[Caption]], Interval]] = {
    "colour": metrics.colour_accuracy,
    "background": metrics.background_accuracy,
    "shape": metrics.shape_accuracy,
    "texture": metrics.texture_accuracy,
    "motion": metrics.motion_accuracy,
    "nearest_motion": metrics.nearest_motion_accuracy,
}
COMPARED = ("colour", "background", "shape", "motion")  # what held-out combinations may cost
_BATCH = 8


def figure(interval: Interval) -> Figure:
    """A metric with its interval, as a bench returns it."""
    return Figure(interval.mean, interval.low, interval.high, n=interval.n)


def measure(options: BenchOptions, progress: Progress) -> dict[str, Figure]:
    """Generate from prompts that name everything; read back what the clips show.

    In bfloat16, which halves the time on a CPU.
    """
    half = 16 if options.quick else 128
    captions = prompt_captions(half, held_out=False, seed=options.seed)
    captions += prompt_captions(half, held_out=True, seed=options.seed)
    with Engine.load("sprites", device=options.device, dtype="bfloat16") as engine:
        readings, seconds = _generate(engine, captions, progress)
    figures = _accuracies("sprites", readings, captions)
    figures |= _accuracies("sprites.heldout", readings[half:], captions[half:])
    figures |= _accuracies_by("shape", readings, captions)
    figures |= _accuracies_by("motion", readings, captions)
    figures |= _heldout_drops(readings, captions, half)
    figures["sprites.frame_consistency"] = figure(
        metrics.mean_with_interval([metrics.frame_consistency(r) for r in readings], bounds=(0, 1))
    )
    figures["sprites.seconds_per_clip"] = Figure(seconds, n=len(captions), unit="s")
    return figures


def _generate(
    engine: Engine, captions: Sequence[Caption], progress: Progress
) -> tuple[list[ClipReading], float]:
    requests = (Request(caption.text, seed=number) for number, caption in enumerate(captions))
    began = time.perf_counter()
    clips = list(
        progress.track(
            engine.generate_many(requests, max_clips=_BATCH), "sprites", total=len(captions)
        )
    )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / len(captions)
    return read_clips(np.stack([clip.frames for clip in clips])), seconds


def _accuracies(
    stem: str, readings: Sequence[ClipReading], captions: Sequence[Caption]
) -> dict[str, Figure]:
    return {
        f"{stem}.{name}_accuracy": figure(accuracy(readings, captions))
        for name, accuracy in ACCURACIES.items()
    }


def _accuracies_by(
    attribute: str, readings: Sequence[ClipReading], captions: Sequence[Caption]
) -> dict[str, Figure]:
    """Accuracy of the clips that were to show each shape, or each motion."""
    rows: dict[str, list[int]] = {}
    for number, caption in enumerate(captions):
        rows.setdefault(getattr(caption.mentions[0], attribute), []).append(number)
    accuracy = ACCURACIES[attribute]
    return {
        f"sprites.{attribute}_accuracy.{named}": figure(
            accuracy([readings[i] for i in chosen], [captions[i] for i in chosen])
        )
        for named, chosen in sorted(rows.items())
    }


def _heldout_drops(
    readings: Sequence[ClipReading], captions: Sequence[Caption], half: int
) -> dict[str, Figure]:
    """How much worse each attribute of held-out combinations is, and the worst of them.

    The largest of four differences is above zero by chance alone; its interval says how far.
    """
    drops = {}
    for name in COMPARED:
        right = [
            ACCURACIES[name]([reading], [caption]).mean == 1.0
            for reading, caption in zip(readings, captions, strict=True)
        ]
        drops[name] = metrics.share_difference(right[:half], right[half:], paired=False)
    worst = max(drops.values(), key=lambda drop: drop.mean)
    figures = {f"sprites.heldout_drop.{name}": figure(drop) for name, drop in drops.items()}
    return figures | {"sprites.heldout_drop": figure(worst)}


BENCH = Bench("sprites", "what the embedded model shows against what the prompt says", measure)
