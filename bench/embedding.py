"""Motion embeddings on the embedded model: what they carry, what they leak, what noise alone does.

Each reference's motion is learned once, with the prompt that says all of the reference. Clips are
then generated from prompts that name another colour, texture, shape and background and say nothing
of motion. Noise found by inversion has the reference's motion in it already, so what an embedding
adds is the difference to the same noise without one.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np

from kinetiq.bench.figures import Figure
from kinetiq.bench.harness import Bench, BenchOptions, Progress
from kinetiq.bench.learned import (
    Motion,
    controls_by_reference,
    displacement,
    fidelity_to,
    learn,
    motion_folder,
    paths_of,
)
from kinetiq.bench.sprites import figure
from kinetiq.engine import Engine
from kinetiq.motion_training import EmbeddingOptions
from kinetiq.sprites import metrics
from kinetiq.sprites.cases import (
    TransferPair,
    score_transfer,
    transfer,
    transfer_groups,
)
from kinetiq.sprites.reading import ClipReading

STEPS = 10
OPTIONS = EmbeddingOptions(steps=150, dtype="bfloat16", previews=0)
STRAIGHT = ("left", "right", "up", "down")  # as a camera moves
WAYS: dict[str, dict[str, Any]] = {
    "difference": {},
    "none": {"debias": "none"},
    "mean": {"debias": "mean"},
    "drop": {"debias": "drop"},
    "noise_only": {"scale": 0.0},
    "without_noise": {"noise_prior": 0.0},
    "half": {"scale": 0.5},
}


def measure(options: BenchOptions, progress: Progress) -> dict[str, Figure]:
    """Learn a motion a reference, and generate with it in every way."""
    groups = transfer_groups(*((2, 2) if options.quick else (8, 4)), seed=options.seed)
    pairs = [pair for group in groups for pair in group]
    folder = motion_folder()
    with Engine.load("sprites", device=options.device) as engine:
        motions, seconds = [], []
        for group in progress.track(groups, "learning"):
            began = time.perf_counter()
            motions.append((group[0], learn(engine, group[0], OPTIONS, folder)))
            seconds.append(time.perf_counter() - began)
    with Engine.load("sprites", device=options.device, dtype="bfloat16") as engine:
        generate = functools.partial(transfer, engine, pairs, steps=STEPS)
        readings = {"plain": generate(lambda _: None)}
        for way in progress.track(WAYS, "generating"):
            change = functools.partial(_change, switches=WAYS[way])
            readings[way] = generate(controls_by_reference(motions, change))
        readings["negated"] = generate(controls_by_reference(motions, _negate))
    figures = _figures(readings, pairs)
    fresh = [spent for spent in seconds if spent > 1]  # the others were read, not learned
    if fresh:
        figures["embedding.training_seconds"] = Figure(
            float(np.median(fresh)), n=len(fresh), unit="s"
        )
    return figures


def _change(motion: Motion, switches: dict[str, Any]) -> Motion:
    return attrs.evolve(motion, **switches)


def _negate(motion: Motion) -> Motion:
    return -motion


def _figures(
    readings: dict[str, list[ClipReading]], pairs: Sequence[TransferPair]
) -> dict[str, Figure]:
    scores = {way: score_transfer(reading, pairs) for way, reading in readings.items()}
    figures: dict[str, Figure] = {}
    for way, score in scores.items():
        stem = "embedding" if way == "difference" else f"embedding.{way}"
        figures |= {
            f"{stem}.motion_fidelity": figure(score.motion_fidelity),
            f"{stem}.identity_leak": figure(score.identity_leak),
            f"{stem}.colour_accuracy": figure(score.colour_accuracy),
            f"{stem}.shape_accuracy": figure(score.shape_accuracy),
        }
    plain, ours, noise = (scores[way] for way in ("plain", "difference", "noise_only"))
    gain = np.subtract(ours.fidelities, noise.fidelities)
    figures["embedding.gain_over_noise"] = figure(
        metrics.mean_with_interval(gain, bounds=(-2.0, 2.0))
    )
    figures["embedding.noise_only_fidelity"] = figure(noise.motion_fidelity)
    figures["embedding.identity_leak_raw"] = figure(scores["none"].identity_leak)
    figures["embedding.leak_saved"] = figure(
        metrics.share_difference(scores["none"].leaks, ours.leaks, paired=True)
    )
    figures["embedding.colour_drop"] = figure(
        metrics.share_difference(plain.colours_right, ours.colours_right, paired=True)
    )
    figures["embedding.shape_drop"] = figure(_shape_drop(readings, pairs))
    straight = [i for i, pair in enumerate(pairs) if pair.sprite.path.motion in STRAIGHT]
    figures["embedding.camera_fidelity"] = figure(
        metrics.mean_with_interval(
            [scores["drop"].fidelities[i] for i in straight], bounds=(-1.0, 1.0)
        )
    )
    return figures | _arithmetic(readings, pairs)


def _shape_drop(
    readings: dict[str, list[ClipReading]], pairs: Sequence[TransferPair]
) -> metrics.Interval:
    right = {
        way: [
            metrics.shape_accuracy([reading], [pair.caption]).mean == 1.0
            for reading, pair in zip(readings[way], pairs, strict=True)
        ]
        for way in ("plain", "difference")
    }
    return metrics.share_difference(right["plain"], right["difference"], paired=True)


def _arithmetic(
    readings: dict[str, list[ClipReading]], pairs: Sequence[TransferPair]
) -> dict[str, Figure]:
    """What negation and half of the scale do to clips whose reference moves."""
    moving = [i for i, pair in enumerate(pairs) if pair.sprite.path.motion != "still"]
    chosen = [pairs[i] for i in moving]
    kept = {
        way: [readings[way][i] for i in moving]
        for way in ("difference", "half", "negated", "without_noise")
    }
    opposite = fidelity_to(kept["negated"], chosen, -1.0)
    # Negation brings no noise of its own, so it is compared with the embedding without it.
    same = fidelity_to(kept["without_noise"], chosen, 1.0)
    full, half = (displacement(paths_of(kept[way], chosen)) for way in ("difference", "half"))
    return {
        "embedding.negated_opposite_fidelity": figure(opposite.mean),
        "embedding.without_noise_moving_fidelity": figure(same.mean),
        "embedding.half_scale_displacement": Figure(
            float(np.sum(half) / max(np.sum(full), 1e-9)), n=len(moving)
        ),
    }


BENCH = Bench("embedding", "motion and identity under motion embeddings", measure)
