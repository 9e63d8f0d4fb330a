"""The embedded model against its world: does it show, and do, what the prompt says?"""

import time
from collections.abc import Sequence

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
    figures = {f"sprites.{name}": figure(v) for name, v in _accuracies(readings, captions).items()}
    held_out = _accuracies(readings[half:], captions[half:])
    trained = _accuracies(readings[:half], captions[:half])
    figures |= {f"sprites.heldout.{name}": figure(value) for name, value in held_out.items()}
    drop = max(trained[name].mean - held_out[name].mean for name in trained)
    figures["sprites.heldout_drop"] = Figure(drop, n=half)
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
    readings: Sequence[ClipReading], captions: Sequence[Caption]
) -> dict[str, Interval]:
    return {
        "colour_accuracy": metrics.colour_accuracy(readings, captions),
        "background_accuracy": metrics.background_accuracy(readings, captions),
        "shape_accuracy": metrics.shape_accuracy(readings, captions),
        "texture_accuracy": metrics.texture_accuracy(readings, captions),
        "motion_accuracy": metrics.motion_accuracy(readings, captions),
    }


BENCH = Bench("sprites", "what the embedded model shows against what the prompt says", measure)
