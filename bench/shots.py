"""Consistent shots on the embedded model: do shots agree on what no prompt says, and still move?

Every storyboard names a shape and nothing else of its looks; each of its shots has a motion and a
background of its own. Plain sampling of the same prompts and seeds is what a board is compared
with, board by board, since the shots of one are not independent: all intervals count boards. The
ablations are of the first boards: the default switches and what is added to them, and the paper's
switches and what is taken from those; `ablation.keys` are the defaults on those boards alone. In 12
steps and bfloat16, which is quick on a CPU.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kinetiq.bench.figures import Figure
from kinetiq.bench.harness import Bench, BenchOptions, Progress
from kinetiq.bench.measure import time_ratio
from kinetiq.bench.sprites import figure
from kinetiq.clip import Clip
from kinetiq.engine import Engine
from kinetiq.files import check_target, make_folder
from kinetiq.motion_injection import MotionInjection
from kinetiq.sheet import contact_sheet, write_image
from kinetiq.shots import PAPER, ConsistentShots, Shot
from kinetiq.sprites import metrics, world
from kinetiq.sprites.cases import FREE, ShotBoardCase, render_clip, shot_boards
from kinetiq.sprites.reading import ClipReading, read_clips
from kinetiq.sprites.world import Caption, Scene, Sprite

STEPS = 12
QUERIES: dict[str, Any] = {"preserve_until": PAPER["preserve_until"], "flow": True}
NO_QUERIES: dict[str, Any] = {"preserve_until": 0.0, "flow": False}
ABLATIONS: dict[str, dict[str, Any]] = {
    "preservation": QUERIES | {"flow": False},
    "preservation_flow": QUERIES,
    "refinement": {"refine": PAPER["refine"]},
    "keys_of_the_paper": {"keys_window": PAPER["keys_window"]},
    "paper": PAPER,
    "paper.no_queries": PAPER | NO_QUERIES,
    "paper.full_preservation": PAPER | {"preserve_until": 1.0, "flow": False},
    "paper.cond_half": PAPER | {"refine_halves": "cond"},
    "paper.without_keys": PAPER | {"keys_window": (0.0, 0.0)},
    "paper.without_refinement": PAPER | {"refine": 0.0},
    "paper.before": PAPER | {"vanilla": "before"},
}
_SHOWN_BOARDS = 3

Readings = Sequence[Sequence[ClipReading]]  # of the shots of each board


@dataclass(frozen=True)
class Sample:
    """How much is measured.

    Args:
        boards: for the headline.
        shots: of each board.
        ablated: boards, the first of those, for the ablations and for shots with a reference.
        repeats: of the timing.
        warmup: of the timing.
    """

    boards: int
    shots: int
    ablated: int
    repeats: int
    warmup: int


FULL = Sample(boards=30, shots=5, ablated=6, repeats=5, warmup=1)
QUICK = Sample(boards=2, shots=2, ablated=0, repeats=1, warmup=0)


def measure(options: BenchOptions, progress: Progress) -> dict[str, Figure]:
    """Measure boards against plain sampling, what each part is for, and what it all costs."""
    picture = None if options.out is None else _prepare_picture(options.out)
    sample = QUICK if options.quick else FULL
    cases = shot_boards(sample.boards, sample.shots, seed=options.seed)
    few = cases[: sample.ablated]
    with Engine.load("sprites", device=options.device, dtype="bfloat16") as engine:
        boards = [as_board(case) for case in cases]
        plain = _plain_clips(engine, boards, progress, "plain")
        ours = _board_clips(engine, boards, progress, "shots")
        seen = {"ours": _read(ours), "plain": _read(plain)}
        figures = figures_of("shots", seen["ours"], cases)
        figures |= figures_of("shots.plain", seen["plain"], cases)
        figures |= differences(seen["ours"], seen["plain"], cases)
        if picture is not None:
            write_image(_picture(cases, ours, plain), picture)
        if few:
            kept = {name: readings[: len(few)] for name, readings in seen.items()}
            figures |= figures_of("shots.ablation.keys", kept["ours"], few)
            figures |= figures_of("shots.ablation.plain", kept["plain"], few)
            figures |= _ablations(engine, few, progress)
            figures |= _references(engine, few, progress)
        figures |= _costs(engine, cases[0], sample, options.device, progress)
    return figures


def as_board(
    case: ShotBoardCase, shots: Sequence[Shot] | None = None, **switches: Any
) -> ConsistentShots:
    """What a case asks for, with other shots or switches than the default ones."""
    made = shots or [
        Shot(prompt, seed=seed) for prompt, seed in zip(case.prompts, case.seeds, strict=True)
    ]
    return ConsistentShots(case.subject, tuple(made), steps=STEPS, **switches)


def _ablations(
    engine: Engine, cases: Sequence[ShotBoardCase], progress: Progress
) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    for name, switches in ABLATIONS.items():
        boards = [as_board(case, **switches) for case in cases]
        clips = _board_clips(engine, boards, progress, name)
        figures |= figures_of(f"shots.ablation.{name}", _read(clips), cases)
    return figures


def _references(
    engine: Engine, cases: Sequence[ShotBoardCase], progress: Progress
) -> dict[str, Figure]:
    """Shots that take their motion from a reference each; the prompts do not say it."""
    boards = [as_board(case, _steered_shots(case)) for case in cases]
    ours = _board_clips(engine, boards, progress, "references")
    plain = _plain_clips(engine, boards, progress, "plain, references")
    return figures_of("shots.reference", _read(ours), cases) | figures_of(
        "shots.reference_plain", _read(plain), cases
    )


def _steered_shots(case: ShotBoardCase) -> list[Shot]:
    """The shots of a case whose motion comes from references, and from no word of the prompt."""
    return [
        Shot(caption.without_motion().text, MotionInjection(_reference(caption, seed)), seed=seed)
        for caption, seed in zip(case.captions, case.seeds, strict=True)
    ]


def _reference(caption: Caption, seed: int) -> Clip:
    """A clip of another shape that moves as a caption says."""
    rng = np.random.default_rng([seed, 5])
    mention = caption.mentions[0]
    others = [shape for shape in world.SHAPES if shape != mention.shape]
    sprite: Sprite = world.sample_sprite(rng, shape=str(rng.choice(others)), motion=mention.motion)
    return render_clip(Scene((sprite,)))


def _board_clips(
    engine: Engine, boards: Sequence[ConsistentShots], progress: Progress, label: str
) -> list[list[Clip]]:
    made = progress.track(engine.generate_storyboards(boards), label, total=len(boards))
    return [list(board.clips) for board in made]


def _plain_clips(
    engine: Engine, boards: Sequence[ConsistentShots], progress: Progress, label: str
) -> list[list[Clip]]:
    """The shots of each board left alone."""
    requests = [board.requests() for board in boards]
    alone = engine.generate_many([request for board in requests for request in board])
    clips = iter(progress.track(alone, label, total=sum(map(len, requests))))
    return [[next(clips) for _ in board] for board in requests]


def _read(clips: Sequence[Sequence[Clip]]) -> list[list[ClipReading]]:
    readings = iter(read_clips(np.stack([clip.frames for board in clips for clip in board])))
    return [[next(readings) for _ in board] for board in clips]


def figures_of(stem: str, readings: Readings, cases: Sequence[ShotBoardCase]) -> dict[str, Figure]:
    """How far shots agree, and do what their prompts say; means over boards."""
    return {
        f"{stem}.{name}": _mean([score(board, case) for board, case in _each(readings, cases)])
        for name, score in _SCORES.items()
    }


def differences(
    ours: Readings, plain: Readings, cases: Sequence[ShotBoardCase]
) -> dict[str, Figure]:
    """What boards gain and lose against the same shots left alone, board by board."""

    def apart(name: str, sign: float) -> Figure:
        score = _SCORES[name]
        gains = [
            sign * (score(one, case) - score(other, case))
            for one, other, case in zip(ours, plain, cases, strict=True)
        ]
        return _mean(gains, bounds=(-1.0, 1.0))

    return {
        "shots.consistency_gain": apart("consistency", 1.0),
        "shots.motion_drop": apart("motion_accuracy", -1.0),
        "shots.shape_drop": apart("shape_accuracy", -1.0),
        "shots.background_drop": apart("background_accuracy", -1.0),
    }


def _each(
    readings: Readings, cases: Sequence[ShotBoardCase]
) -> list[tuple[Sequence[ClipReading], ShotBoardCase]]:
    return list(zip(readings, cases, strict=True))


def _mean(values: Sequence[float], bounds: tuple[float, float] = (0.0, 1.0)) -> Figure:
    return figure(metrics.mean_with_interval(values, bounds=bounds))


def _agreement(board: Sequence[ClipReading], _: ShotBoardCase, free: Sequence[str] = FREE) -> float:
    return metrics.consistency(board, free)


def _accuracy(
    judge: Callable[[Sequence[ClipReading], Sequence[Caption]], metrics.Interval],
    board: Sequence[ClipReading],
    case: ShotBoardCase,
) -> float:
    return judge(board, case.captions).mean


def _steadiness(board: Sequence[ClipReading], _: ShotBoardCase) -> float:
    return float(np.mean([metrics.frame_consistency(reading) for reading in board]))


_SCORES: Mapping[str, Callable[[Sequence[ClipReading], ShotBoardCase], float]] = {
    "consistency": _agreement,
    "hue_consistency": functools.partial(_agreement, free=("colour",)),
    "texture_consistency": functools.partial(_agreement, free=("texture",)),
    "motion_accuracy": functools.partial(_accuracy, metrics.motion_accuracy),
    "shape_accuracy": functools.partial(_accuracy, metrics.shape_accuracy),
    "background_accuracy": functools.partial(_accuracy, metrics.background_accuracy),
    "frame_consistency": _steadiness,
}


def _costs(
    engine: Engine, case: ShotBoardCase, sample: Sample, device: str, progress: Progress
) -> dict[str, Figure]:
    """Seconds of a board over those of the same shots left alone, in one batch and in turn."""
    ways = {"shots.cost": as_board(case)}
    if sample.ablated:
        ways["shots.cost_paper"] = as_board(case, **PAPER)
        ways["shots.cost_paper_before"] = as_board(case, **PAPER, vanilla="before")
    alone = as_board(case).requests()
    figures = {}
    for name, board in progress.track(ways.items(), "cost", len(ways)):
        figures[name] = time_ratio(
            functools.partial(_exhaust, engine.generate_storyboards, [board]),
            functools.partial(_exhaust, engine.generate_many, alone),
            repeats=sample.repeats,
            warmup=sample.warmup,
            device=device,
        ).figure
    return figures


def _exhaust(generate: Callable[[Any], Any], asked: Any) -> None:
    for _ in generate(asked):
        pass


def _prepare_picture(folder: Path) -> Path:
    """Where the picture goes; what would keep it from being written is said before the work."""
    make_folder(folder, "bench shots")
    check_target(folder / "shots.png", "bench shots")
    return folder / "shots.png"


def _picture(
    cases: Sequence[ShotBoardCase],
    ours: Sequence[Sequence[Clip]],
    plain: Sequence[Sequence[Clip]],
) -> np.ndarray:
    """The first boards: each shot, under it the same shot left alone."""
    shown = list(zip(cases, ours, plain, strict=True))[:_SHOWN_BOARDS]
    return contact_sheet(
        [
            (label + prompt, clip)
            for case, board, alone in shown
            for prompt, *clips in zip(case.prompts, board, alone, strict=True)
            for label, clip in zip(("", "left alone: "), clips, strict=True)
        ]
    )


BENCH = Bench("shots", "how far shots of one subject agree, and what it costs them", measure)
