"""MOFT read at other taps than up block 1: what a temporal attention adds, and other up blocks.

At each tap its own channels are calibrated. Features of a tap are larger or smaller than those of
another, and the gradient of a squared difference grows with their square, so the loss is weighted
by the mean square of up block 1's pans over that of the tap's; the figure `weight` is that factor.
References move straight, as in the ablation of bench `moft`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kinetiq.bench.figures import Figure
from kinetiq.bench.harness import Bench, BenchOptions, Progress
from kinetiq.bench.moft import (
    CLASSES,
    STEPS,
    Readings,
    by_picture,
    generate_readings,
    goes,
    guidance,
    identities,
    meant,
    neighbour_hits,
    picture_in_motions,
    read_features,
    request_of,
)
from kinetiq.bench.sprites import figure
from kinetiq.engine import Engine
from kinetiq.families import SiteKind
from kinetiq.moft import DIRECTIONS, MotionChannels, load_channels, middle_curve
from kinetiq.moft_guidance import MoftGuidance
from kinetiq.sprites import metrics
from kinetiq.sprites.cases import TransferPair, render_clip, score_transfer, transfer_pairs
from kinetiq.taps import DEFAULT_TAP


@dataclass(frozen=True)
class Sample:
    """How much is measured.

    Args:
        clips: steered at each tap.
        pictures: that are shown in every motion.
        taps: at most so many.
    """

    clips: int
    pictures: int
    taps: int


FULL = Sample(clips=16, pictures=12, taps=8)
QUICK = Sample(clips=1, pictures=2, taps=2)


def choose_taps(engine: Engine) -> dict[str, str]:
    """Module paths by the names of their figures: up blocks, and attentions of up block 1."""
    attentions = [
        site.name
        for site in engine.denoiser.sites
        if site.kind is SiteKind.TEMPORAL and site.name.startswith(f"{DEFAULT_TAP}.")
    ]
    others = [f"up_blocks.{number}" for number in (0, 2)]
    return {
        "block_1": DEFAULT_TAP,
        "last_attention": attentions[-1],
        "first_attention": attentions[0],
        **{f"block_{name[-1]}": name for name in others},
    }


def measure(options: BenchOptions, progress: Progress) -> dict[str, Figure]:
    """Read features in float32, then steer in bfloat16."""
    sample = QUICK if options.quick else FULL
    found: dict[str, MotionChannels] = {}
    figures: dict[str, Figure] = {}
    with Engine.load("sprites", device=options.device) as engine:
        taps = dict(list(choose_taps(engine).items())[: sample.taps])
        for name, tap in progress.track(taps.items(), "features", len(taps)):
            found[name] = load_channels(engine.checkpoint, engine.denoiser, tap)
            figures |= neighbour_figures(engine, name, found[name], sample, options.seed)
    pairs = [p for p in transfer_pairs(64, options.seed) if p.sprite.path.motion in DIRECTIONS]
    pairs = pairs[: sample.clips]
    with Engine.load("sprites", device=options.device, dtype="bfloat16") as engine:
        for name, channels in progress.track(found.items(), "steered", len(found)):
            weight = pan_strength(found["block_1"]) / pan_strength(channels)
            figures[f"moft_taps.{name}.weight"] = Figure(weight)
            requests = [
                request_of(pair, steering(pair, channels.tap, weight), steps=STEPS)
                for pair in pairs
            ]
            figures |= steered_figures(name, generate_readings(engine, requests), pairs)
    return figures


def steering(pair: TransferPair, tap: str, factor: float) -> MoftGuidance:
    """The bench's guidance towards a pair's reference, read at a tap."""
    usual = guidance(reference=pair.reference())
    return guidance(reference=pair.reference(), tap=tap, weight=factor * usual.weight)


def pan_strength(channels: MotionChannels) -> float:
    """The mean square of a tap's pans in the channels that are compared."""
    chosen = channels.select()
    pans = [channels.synthesise(direction, 8)[:, chosen] for direction in DIRECTIONS]
    return float(torch.stack(pans).square().mean())


def neighbour_figures(
    engine: Engine, name: str, channels: MotionChannels, sample: Sample, seed: int
) -> dict[str, Figure]:
    """Whether the clip whose feature is nearest moves alike."""
    rng = np.random.default_rng([seed, 4])
    clips = [
        render_clip(scene) for _ in range(sample.pictures) for scene in picture_in_motions(rng)
    ]  # the classes of each picture in a row
    features = read_features(engine, clips, channels.tap)
    points = middle_curve(features, channels.select())
    hits = neighbour_hits(points)
    return {f"moft_taps.{name}.neighbours": by_picture(hits, len(hits) // len(CLASSES))}


def steered_figures(
    name: str, readings: Readings, pairs: Sequence[TransferPair]
) -> Mapping[str, Figure]:
    """How clips move like their references, and whether they show what the prompts ask for."""
    captions = [pair.caption for pair in pairs]
    right = [
        goes(meant(reading, pair.caption), pair.sprite.path.motion)
        for reading, pair in zip(readings, pairs, strict=True)
    ]
    shown = identities(readings, captions)["identity"]
    return {
        f"moft_taps.{name}.motion_fidelity": figure(
            score_transfer(readings, pairs).motion_fidelity
        ),
        f"moft_taps.{name}.direction_accuracy": figure(metrics.mean_with_interval(right)),
        f"moft_taps.{name}.identity_accuracy": figure(metrics.mean_with_interval(list(shown))),
    }


BENCH = Bench("moft_taps", "MOFT read at temporal attentions and other blocks", measure)
