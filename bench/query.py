"""Motion transfer on the embedded model: how much motion arrives, how much identity leaks.

Every setting is measured on pairs of a reference and a prompt that names another colour, texture,
shape and background and says nothing of motion, in ten steps, so that each tenth of `until` is a
step, and in bfloat16, which halves the time on a CPU. There the curves are of every second tenth
and of a quarter of the pairs: few points that say something. The best setting of a method is the
variant and `until` with the largest fidelity minus leak. All headlines are measured on the same
pairs, which chose none of them, and are compared pair by pair: with plain sampling, and the leak-
reduced queries with the ordinary ones at the points of their curves that are nearest in fidelity.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kinetiq.bench.figures import Figure
from kinetiq.bench.harness import Bench, BenchOptions, Progress
from kinetiq.bench.sprites import figure
from kinetiq.clip import Clip
from kinetiq.engine import Engine
from kinetiq.errors import MissingDependencyError, OutputError
from kinetiq.files import check_target, replacing
from kinetiq.motion_injection import MotionInjection
from kinetiq.query_injection import QueryInjection
from kinetiq.sprites import metrics
from kinetiq.sprites.cases import (
    TransferPair,
    TransferScores,
    score_transfer,
    transfer,
    transfer_pairs,
)

STEPS = 10
CURVE_PAIRS_ON_CPU = 16
ALL_TENTHS = tuple(range(1, 11))
TENTHS_ON_CPU = (2, 4, 6, 8, 10)
Controls = Callable[[Clip], list[Any]]


@dataclass(frozen=True)
class Variant:
    """One way of steering, as a function of `until`."""

    name: str
    title: str
    build: Callable[[Clip, float], list[Any]]


def _query(reference: Clip, until: float, **options: Any) -> list[Any]:
    return [QueryInjection(reference, until=until, **options)]


def _motion(reference: Clip, until: float, **options: Any) -> list[Any]:
    return [MotionInjection(reference, until=until, **options)]


def _parts(parts: str) -> Callable[[Clip, float], list[Any]]:
    return functools.partial(_motion, parts=parts)


def _motion_and_queries(reference: Clip, until: float, **options: Any) -> list[Any]:
    queries = _query(reference, until, sites="spatial", **options)
    return _motion(reference, until, **options) + queries


CURVES = (
    Variant("query.spatial", "queries, spatial (the paper)", _query),
    Variant("query.temporal", "queries, temporal", functools.partial(_query, sites="temporal")),
    Variant("query.both", "queries, both", functools.partial(_query, sites="both")),
    Variant(
        "query.leak_reduced",
        "queries, both, leak-reduced",
        functools.partial(_query, sites="both", reduce_leak=True),
    ),
    Variant("injection.qkv", "motion injection", _motion),
    Variant(
        "injection.inverted_noise",
        "motion injection, half of the reference's noise",
        functools.partial(_motion, noise_prior=0.5),
    ),
)
PARTS = (
    *(
        Variant(f"injection.{parts}", f"motion injection, {parts}", _parts(parts))
        for parts in ("q", "k", "v", "qk")
    ),
    Variant("injection.half", "motion injection, blend 0.5", functools.partial(_motion, blend=0.5)),
    Variant(
        "injection.own_prompt",
        "motion injection, source told the clip's prompt",
        functools.partial(_motion, source_prompt=None),
    ),
    Variant("injection.with_queries", "motion injection and spatial queries", _motion_and_queries),
    Variant(
        "injection.own_prompt_with_queries",
        "the same, source told the clip's prompt",
        functools.partial(_motion_and_queries, source_prompt=None),
    ),
    Variant(
        "injection.ahead",
        "motion injection, source never noisier than half way",
        functools.partial(_motion, source_from=0.5),
    ),
    Variant(
        "injection.cond", "motion injection, cond half", functools.partial(_motion, halves="cond")
    ),
)


def measure(options: BenchOptions, progress: Progress) -> dict[str, Figure]:
    """Measure the headline settings, the curves over `until`, and motion injection's parts."""
    picture = None if options.out is None else _prepare_picture(options.out)
    pairs = transfer_pairs(8 if options.quick else 64, seed=options.seed)
    on_gpu = options.device.startswith("cuda")
    tenths = (4, 10) if options.quick else ALL_TENTHS if on_gpu else TENTHS_ON_CPU
    curves = {f"{v.name}.until_{tenth:02d}": _at(v, tenth) for v in CURVES for tenth in tenths}
    curve_pairs = pairs if on_gpu else pairs[:CURVE_PAIRS_ON_CPU]
    settings = {"curve.plain": _plain, **curves, **{v.name: _at(v, 10) for v in PARTS}}
    with Engine.load("sprites", device=options.device, dtype="bfloat16") as engine:

        def score(controls: Controls, chosen: Sequence[TransferPair]) -> TransferScores:
            return score_transfer(transfer(engine, chosen, controls, steps=STEPS), chosen)

        scores = {
            name: score(controls, curve_pairs)
            for name, controls in progress.track(settings.items(), "curves", len(settings))
        }
        # The best of many is lucky, so it is measured again on pairs that did not choose it.
        others = transfer_pairs(len(pairs), seed=options.seed + 1)
        both, leak_reduced = nearest_in_fidelity("query.both", "query.leak_reduced", scores)
        chosen = {
            "plain": "curve.plain",
            "paper": "query.spatial.until_04",
            "query": best_of("query", scores),
            "injection": best_of("injection", scores),
            "both": both,
            "leak_reduced": leak_reduced,
        }
        names = list(dict.fromkeys(chosen.values()))  # two headlines may be of one setting
        measured = {
            name: score(settings[name], others)
            for name in progress.track(names, "headline", len(names))
        }
    heads = {head: measured[name] for head, name in chosen.items()}
    if picture is not None:
        draw(scores, tenths, picture)
    figures = _figures(scores, heads) | _differences(heads)
    for name in names:  # the name says which setting a headline is of
        figures[f"{name}.headline_fidelity"] = figure(measured[name].motion_fidelity)
    return figures


def _prepare_picture(folder: Path) -> Path:
    """Where the picture goes; what would keep it from being drawn is said before the work."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingDependencyError(
            'bench query: --out draws with matplotlib; install it with pip install ".[plots]"'
        ) from error
    mpl.use("Agg")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"bench query: {folder} must be a folder: {error}") from error
    check_target(folder / "query.png")
    return folder / "query.png"


def best_of(method: str, scores: Mapping[str, TransferScores]) -> str:
    """The setting of a method with the best trade-off: fidelity minus leak."""
    candidates = [name for name in scores if name.startswith(method + ".")]
    return max(
        candidates,
        key=lambda name: scores[name].motion_fidelity.mean - scores[name].identity_leak.mean,
    )


def nearest_in_fidelity(
    one: str, other: str, scores: Mapping[str, TransferScores]
) -> tuple[str, str]:
    """The points of two curves whose fidelities differ least, of those that steer.

    A point steers when it has half of the fidelity that both curves reach: curves all meet where
    nothing is steered, and to compare them there says nothing.
    """
    points = {
        stem: {
            name: score.motion_fidelity.mean
            for name, score in scores.items()
            if name.startswith(stem + ".until_")
        }
        for stem in (one, other)
    }
    reach = min(max(curve.values()) for curve in points.values())
    candidates = [
        (abs(first - second), -first, name, opposite)
        for name, first in points[one].items()
        for opposite, second in points[other].items()
        if min(first, second) >= min(reach, reach / 2)
    ]
    _, _, name, opposite = min(candidates)
    return name, opposite


def draw(scores: Mapping[str, TransferScores], tenths: Sequence[int], path: Path) -> None:
    """Draw motion fidelity and identity leak over `until`, a line for each variant."""
    from matplotlib import pyplot as plt

    plain = scores["curve.plain"]
    untils = [0.0, *(tenth / 10 for tenth in tenths)]
    figure_, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharex=True)
    measures: dict[str, Callable[[TransferScores], metrics.Interval]] = {
        "motion fidelity (1: the reference's path)": lambda score: score.motion_fidelity,
        "identity leak (share of clips that show the reference's looks)": lambda score: (
            score.identity_leak
        ),
    }
    for axes, (label, read) in zip(panels, measures.items(), strict=True):
        for variant in CURVES:
            curve = [plain, *(scores[f"{variant.name}.until_{tenth:02d}"] for tenth in tenths)]
            means = [read(point).mean for point in curve]
            axes.plot(untils, means, marker="o", markersize=4, label=variant.title)
        axes.axhline(read(plain).mean, color="black", linestyle=":", label="plain")
        axes.set_xlabel("until (share of the steps that are steered)")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure_.legend(handles, labels, loc="lower center", ncols=3, fontsize=9, frameon=False)
    figure_.suptitle(f"Motion and identity of a transfer, n = {plain.motion_fidelity.n} a point")
    figure_.tight_layout(rect=(0, 0.12, 1, 1))
    with replacing(path, "bench query") as temporary:
        figure_.savefig(temporary, dpi=110, format="png")
    plt.close(figure_)


def _plain(_: Clip) -> list[Any]:
    return []


def _at(variant: Variant, tenth: int) -> Controls:
    return lambda clip: variant.build(clip, tenth / 10)


def _figures(
    scores: Mapping[str, TransferScores], heads: Mapping[str, TransferScores]
) -> dict[str, Figure]:
    stems = {"query": "query.", "injection": "injection."}
    figures: dict[str, Figure] = {}
    for head, score in heads.items():
        stem = stems.get(head, f"query.{head}_")
        fidelity = "fidelity" if stem.endswith("_") else "motion_fidelity"
        leak = "leak" if stem.endswith("_") else "identity_leak"
        figures[stem + fidelity] = figure(score.motion_fidelity)
        figures[stem + leak] = figure(score.identity_leak)
        figures[stem + "colour_accuracy"] = figure(score.colour_accuracy)
        figures[stem + "shape_accuracy"] = figure(score.shape_accuracy)
        figures[stem + "background_accuracy"] = figure(score.background_accuracy)
        figures[stem + "frame_consistency"] = figure(score.frame_consistency)
    for name, score in scores.items():
        figures[f"{name}.motion_fidelity"] = figure(score.motion_fidelity)
        figures[f"{name}.identity_leak"] = figure(score.identity_leak)
        figures[f"{name}.colour_accuracy"] = figure(score.colour_accuracy)
    return figures


def _differences(heads: Mapping[str, TransferScores]) -> dict[str, Figure]:
    """What a headline costs, pair by pair, against what it is compared with."""
    plain, both, reduced = heads["plain"], heads["both"], heads["leak_reduced"]
    figures: dict[str, Figure] = {}
    for method in ("query", "injection"):
        drop = metrics.share_difference(
            plain.colours_right, heads[method].colours_right, paired=True
        )
        extra = metrics.share_difference(heads[method].leaks, plain.leaks, paired=True)
        figures[f"{method}.colour_drop"] = figure(drop)
        figures[f"{method}.extra_leak"] = figure(extra)
    extra = metrics.share_difference(reduced.leaks, both.leaks, paired=True)
    gains = np.subtract(reduced.fidelities, both.fidelities)
    gain = metrics.mean_with_interval(gains, bounds=(-2.0, 2.0))
    figures["query.leak_reduced_extra_leak"] = figure(extra)
    figures["query.leak_reduced_extra_fidelity"] = figure(gain)
    return figures


BENCH = Bench("query", "motion and identity of a transfer, by method and by until", measure)
