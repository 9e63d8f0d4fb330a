"""Motion LoRAs on the embedded model, and what each idea of the paper takes from the leak.

A LoRA of all projections of the temporal transformers, of their keys alone (TAP), that with skip
connections that start before the temporal transformers (AH), and that with the untouched network
in the later steps (PLI): the ablation of "Separate Motion from Appearance" (arXiv:2501.16714),
with the fidelity beside the leak. Less of a LoRA moves less and leaks less, so each is generated at
several scales, and two are compared where both move alike: of the scales whose fidelities are
within `EQUAL` of each other at those that move most, or at the nearest ones where none are. How
far apart these are, and how much they move, are figures too. Intervals count references, since
clips that share a learned LoRA are not independent.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import attrs
import numpy as np

from kinetiq.bench.figures import Figure
from kinetiq.bench.harness import Bench, BenchOptions, Progress
from kinetiq.bench.learned import (
    Motion,
    controls_by_reference,
    learn,
    mean_by_reference,
    motion_folder,
)
from kinetiq.bench.sprites import figure
from kinetiq.engine import Engine
from kinetiq.motion_training import LoraOptions
from kinetiq.sprites.cases import TransferScores, score_transfer, transfer, transfer_groups

STEPS = 10
OPTIONS = LoraOptions(previews=0)
SCALES = (0.5, 0.75, 1.0, 1.25)
COMPARED = ("all", "k", "k_highway")
EQUAL = 0.05  # between fidelities that count as equal


@dataclass(frozen=True)
class Variant:
    """One row of the ablation: what is learned, and how it is used."""

    name: str
    target: str
    switches: Mapping[str, Any]


VARIANTS = (
    Variant("all", "all", {}),
    Variant("k", "k", {}),
    Variant("k_highway", "k", {"highway": "all"}),
    Variant("k_highway_phase", "k", {"highway": "all", "until": 0.5}),
)


def measure(options: BenchOptions, progress: Progress) -> dict[str, Figure]:
    """Learn a LoRA a reference and target, and generate with every variant."""
    references, prompts = (2, 2) if options.quick else (8, 4)
    groups = transfer_groups(references, prompts, seed=options.seed)
    pairs = [pair for group in groups for pair in group]
    targets = list(dict.fromkeys(variant.target for variant in VARIANTS))
    jobs = [(target, group[0]) for target in targets for group in groups]
    learned: dict[str, list[tuple[Any, Motion]]] = {target: [] for target in targets}
    with Engine.load("sprites", device=options.device) as engine:
        for target, pair in progress.track(jobs, "learning"):
            motion, _ = learn(engine, pair, replace(OPTIONS, target=target), motion_folder())
            learned[target].append((pair, motion))
    scores: dict[str, TransferScores] = {}
    with Engine.load("sprites", device=options.device, dtype="bfloat16") as engine:

        def score(control: Any) -> TransferScores:
            return score_transfer(transfer(engine, pairs, control, steps=STEPS), pairs)

        scores["plain"] = score(lambda _: None)
        noise = functools.partial(_change, switches={"scale": 0.0})
        scores["noise_only"] = score(controls_by_reference(learned["k"], noise))
        settings = [
            (variant, scale)
            for variant in VARIANTS
            for scale in (SCALES if variant.name in COMPARED else (1.0,))
        ]
        for variant, scale in progress.track(settings, "generating"):
            change = functools.partial(_change, switches={**variant.switches, "scale": scale})
            name = f"{variant.name}.scale_{round(100 * scale):03d}"
            scores[name] = score(controls_by_reference(learned[variant.target], change))
    return figures_of(scores, prompts)


def _change(motion: Motion, switches: Mapping[str, Any]) -> Motion:
    return attrs.evolve(motion, **switches)


def figures_of(scores: Mapping[str, TransferScores], prompts: int) -> dict[str, Figure]:
    """The figures of every setting, and the variants at scale 1 beside each other.

    Args:
        scores: by setting; clips are `prompts` in a row of each reference.
        prompts: of each reference.
    """
    figures: dict[str, Figure] = {}
    full = {v.name: scores[f"{v.name}.scale_100"] for v in VARIANTS}
    for name, score in {**scores, **full}.items():
        leaks = [float(leak) for leak in score.leaks]
        figures |= {
            f"lora.{name}.motion_fidelity": mean_by_reference(
                score.fidelities, prompts, bounds=(-1.0, 1.0)
            ),
            f"lora.{name}.identity_leak": mean_by_reference(leaks, prompts, bounds=(0.0, 1.0)),
            f"lora.{name}.colour_accuracy": figure(score.colour_accuracy),
            f"lora.{name}.shape_accuracy": figure(score.shape_accuracy),
        }
    for better, worse in (("k", "all"), ("k_highway", "k")):
        one, other = settings_to_compare(scores, better, worse)
        saved = np.asarray(scores[other].leaks, float) - np.asarray(scores[one].leaks, float)
        reached = [scores[name].motion_fidelity.mean for name in (one, other)]
        figures |= {
            f"lora.{better}_leak_saved": mean_by_reference(
                saved.tolist(), prompts, bounds=(-1.0, 1.0)
            ),
            f"lora.{better}_fidelity_gap_where_compared": Figure(abs(reached[0] - reached[1])),
            f"lora.{better}_fidelity_where_compared": Figure(min(reached)),
            f"lora.{better}_scale_where_compared": Figure(_scale(one)),
            f"lora.{better}_other_scale_where_compared": Figure(_scale(other)),
        }
    return figures


def settings_to_compare(
    scores: Mapping[str, TransferScores], better: str, worse: str
) -> tuple[str, str]:
    """The settings of two variants at which they are compared; see the top of this file."""

    def settings(stem: str) -> Sequence[str]:
        return [name for name in scores if name.startswith(f"{stem}.scale_")]

    def fidelity(name: str) -> float:
        return scores[name].motion_fidelity.mean

    pairs = list(itertools.product(settings(better), settings(worse)))
    gaps = {pair: abs(fidelity(pair[0]) - fidelity(pair[1])) for pair in pairs}
    equal = [pair for pair in pairs if gaps[pair] <= EQUAL]
    if equal:
        return max(equal, key=lambda pair: min(map(fidelity, pair)))
    return min(pairs, key=gaps.__getitem__)


def _scale(setting: str) -> float:
    return int(setting.rpartition("_")[2]) / 100


BENCH = Bench("lora", "motion and identity under motion LoRAs: all, TAP, AH, PLI", measure)
