"""Motion embeddings on the embedded model: what they carry, what they leak, what noise alone does.

Each reference's motion is learned once, with the prompt that says all of the reference. Clips are
then generated from prompts that name another colour, texture, shape and background and say nothing
of motion. Noise found by inversion has the reference's motion in it already, so what an embedding
adds is the difference to the same noise without one. Clips of one reference share what was learned,
so intervals count references, not clips. Motions are learned by the default options, whose time is
the figure.
"""

import functools
from collections.abc import Mapping, Sequence
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
    mean_by_reference,
    motion_folder,
    paths_of,
)
from kinetiq.bench.sprites import figure
from kinetiq.engine import Engine
from kinetiq.motion_training import EmbeddingOptions
from kinetiq.sprites import metrics
from kinetiq.sprites.cases import (
    TransferPair,
    TransferScores,
    score_transfer,
    transfer,
    transfer_groups,
)
from kinetiq.sprites.reading import ClipReading

STEPS = 10
OPTIONS = EmbeddingOptions(previews=0)
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
    references, prompts = (2, 2) if options.quick else (8, 4)
    groups = transfer_groups(references, prompts, seed=options.seed)
    pairs = [pair for group in groups for pair in group]
    folder = motion_folder()
    with Engine.load("sprites", device=options.device) as engine:
        motions: list[tuple[TransferPair, Motion]] = []
        seconds: list[float] = []
        for group in progress.track(groups, "learning"):
            motion, spent = learn(engine, group[0], OPTIONS, folder)
            motions.append((group[0], motion))
            seconds += [] if spent is None else [spent]
    with Engine.load("sprites", device=options.device, dtype="bfloat16") as engine:
        generate = functools.partial(transfer, engine, pairs, steps=STEPS)
        readings = {"plain": generate(lambda _: None)}
        for way in progress.track(WAYS, "generating"):
            change = functools.partial(_change, switches=WAYS[way])
            readings[way] = generate(controls_by_reference(motions, change))
        readings["negated"] = generate(controls_by_reference(motions, _negate))
    figures = figures_of(readings, pairs, prompts)
    if seconds:
        figures["embedding.training_seconds"] = Figure(
            float(np.median(seconds)), n=len(seconds), unit="s"
        )
    return figures


def _change(motion: Motion, switches: dict[str, Any]) -> Motion:
    return attrs.evolve(motion, **switches)


def _negate(motion: Motion) -> Motion:
    return -motion


def figures_of(
    readings: Mapping[str, Sequence[ClipReading]], pairs: Sequence[TransferPair], prompts: int
) -> dict[str, Figure]:
    """The figures of all ways; `pairs` are `prompts` in a row of each reference."""
    scores = {way: score_transfer(reading, pairs) for way, reading in readings.items()}
    mean = functools.partial(mean_by_reference, prompts=prompts)
    figures: dict[str, Figure] = {}
    for way, score in scores.items():
        stem = "embedding" if way == "difference" else f"embedding.{way}"
        figures |= {
            f"{stem}.motion_fidelity": mean(score.fidelities, bounds=(-1.0, 1.0)),
            f"{stem}.identity_leak": mean([float(x) for x in score.leaks], bounds=(0.0, 1.0)),
            f"{stem}.colour_accuracy": figure(score.colour_accuracy),
            f"{stem}.shape_accuracy": figure(score.shape_accuracy),
        }
    figures["embedding.noise_only_fidelity"] = figures["embedding.noise_only.motion_fidelity"]
    figures["embedding.identity_leak_raw"] = figures["embedding.none.identity_leak"]

    def difference(one: Sequence[Any], other: Sequence[Any]) -> Figure:
        apart = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
        return mean(apart.tolist(), bounds=(-2.0, 2.0))

    plain, ours = scores["plain"], scores["difference"]
    figures["embedding.gain_over_noise"] = difference(
        ours.fidelities, scores["noise_only"].fidelities
    )
    figures["embedding.leak_saved"] = difference(scores["none"].leaks, ours.leaks)
    figures["embedding.colour_drop"] = difference(plain.colours_right, ours.colours_right)
    figures["embedding.shape_drop"] = difference(
        _shapes_right(readings["plain"], pairs), _shapes_right(readings["difference"], pairs)
    )
    return figures | _moving(readings, scores, pairs, prompts)


def _shapes_right(readings: Sequence[ClipReading], pairs: Sequence[TransferPair]) -> list[bool]:
    return [
        metrics.shape_accuracy([reading], [pair.caption]).mean == 1.0
        for reading, pair in zip(readings, pairs, strict=True)
    ]


def _moving(
    readings: Mapping[str, Sequence[ClipReading]],
    scores: Mapping[str, TransferScores],
    pairs: Sequence[TransferPair],
    prompts: int,
) -> dict[str, Figure]:
    """Of what moves: negation, half of the scale, and straight paths, as a camera's are."""
    mean = functools.partial(mean_by_reference, prompts=prompts)
    moving = [i for i, pair in enumerate(pairs) if pair.sprite.path.motion != "still"]
    chosen = [pairs[i] for i in moving]
    kept = {way: [reading[i] for i in moving] for way, reading in readings.items()}
    opposite = fidelity_to(kept["negated"], chosen, -1.0)
    figures = {
        # Negation brings no noise of its own, so it is compared with the embedding without it.
        "embedding.negated_opposite_fidelity": mean(opposite.per_clip.tolist(), bounds=(-1.0, 1.0)),
        "embedding.without_noise_moving_fidelity": mean(
            [scores["without_noise"].fidelities[i] for i in moving], bounds=(-1.0, 1.0)
        ),
        "embedding.moving_fidelity": mean(
            [scores["difference"].fidelities[i] for i in moving], bounds=(-1.0, 1.0)
        ),
    }
    straight = [i for i, pair in enumerate(pairs) if pair.sprite.path.motion in STRAIGHT]
    for way, name in {"drop": "camera", "noise_only": "camera_noise_only"}.items():
        figures[f"embedding.{name}_fidelity"] = mean(
            [scores[way].fidelities[i] for i in straight], bounds=(-1.0, 1.0)
        )
    paths = zip(*(paths_of(kept[way], chosen) for way in ("difference", "half")), strict=True)
    both = [(full, half) for full, half in paths if full is not None and half is not None]
    if both:
        full, half = (sum(map(displacement, column)) for column in zip(*both, strict=True))
        figures["embedding.half_scale_displacement"] = Figure(half / max(full, 1e-9), n=len(both))
    return figures


BENCH = Bench("embedding", "motion and identity under motion embeddings", measure)
