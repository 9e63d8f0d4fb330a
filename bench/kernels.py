"""Each operator against the other ways to compute the same, at production shapes, in one run.

A contestant is timed only after a part of its result was compared with float64 and all of it with
the usual way's, and only if it exists on this machine; what does not run, or is wrong, is named as
skipped. Where that is our own operator, or the usual way by which the others are judged, the case
has failed: that is named and counted, and the next case goes on. The contestants of a case are
timed in turn. On a GPU a round is one replay of a CUDA graph after the L2 cache was overwritten;
on a CPU it is one call.

The roof of a case is what the machine itself takes to move its bytes, or to do its operations,
whichever is slower, at the rates of a copy and of a matrix product that the same run measures. On
a CPU whose cache holds all tensors a share of it can exceed 1.

`ratio_to_best` is there once all who may be the best were timed: else it would look better the less
was measured. `ratio_to_best_timed` is to whoever was.

`kernels.cpu_worst_ratio`, on a CPU, is the ratio to the usual way of the case whose interval ends
lowest: of many ratios the least value is one that was disturbed.

With `--out`, `kernels.ndjson` grows case by case, so that a killed run has left its part; at the
end `kernels.json` and `kernels.md` have every contestant's line.
"""

import contextlib
import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from kinetiq.bench.figures import Figure, load_targets
from kinetiq.bench.harness import Bench, BenchOptions, Progress
from kinetiq.bench.measure import Timing
from kinetiq.bench.steps import free_memory, lost
from kinetiq.errors import OutputError, WorkError
from kinetiq.files import write_text
from kinetiq.kernels import (
    frame_attention,
    guided_step,
    motion_feature,
    query_attention,
    temporal_block,
)
from kinetiq.kernels._compile import TYPES
from kinetiq.kernels._cost import Cost
from kinetiq.kernels.frame_attention import cost as frame_cost
from kinetiq.kernels.frame_attention import (
    frame_attention_reference,
    frame_attention_with_motion,
    mix,
)
from kinetiq.kernels.guided_step import cost as step_cost
from kinetiq.kernels.guided_step import guided_step_reference
from kinetiq.kernels.motion_feature import cost as feature_cost
from kinetiq.kernels.motion_feature import motion_feature_reference
from kinetiq.kernels.query_attention import choose_queries, extend_keys, query_attention_reference
from kinetiq.kernels.query_attention import cost as query_cost
from kinetiq.kernels.temporal_block import _launch as launch_block
from kinetiq.kernels.temporal_block import cost as block_cost
from kinetiq.kernels.temporal_block import temporal_block_reference

Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]
Prepare = Callable[[], Call]
Run = Callable[[], object]
Function = Callable[..., Any]  # of a case's inputs; returns a tensor or several
OURS, USUAL, COMPILED, FLEX = "ours", "usual", "compiled_reference", "flex"
COMPILED_USUAL, SEPARATE = "compiled_usual", "ours_separate"
COMPILED_ONES = (COMPILED, COMPILED_USUAL, FLEX)
MATH = "sdpa_math"
BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    MATH: SDPBackend.MATH,
}
SLACK = {False: 2.0, True: 3.0}  # times the usual way's error, forward and backward
_SANE = 32  # units in the last place of the largest value that the usual way may err
_RESAMPLES = 2000
_ROUNDS = (3, 50)  # at least and at most
_SECONDS = {"quick": 0.8, "cuda": 2.0, "cpu": 4.0}  # that the rounds of one case may take
_SCORES = 2**33  # bytes of scores beyond which a way that writes them all is left out
_EXTREME = 2  # times its part's error that all of a result may err, whose extremes lie further out
_CHECKED = 64  # positions that are compared with float64 where positions do not depend on others
_WEIGHTS = (
    *("norm_weight", "norm_bias", "query_weight", "key_weight", "value_weight"),
    *("out_weight", "out_bias"),
)
_BANKS = ("query_bank", "key_bank", "value_bank")
_EPS = 1e-5  # of a layer normalisation, in PyTorch and in ours
_MOTION = 0.04  # share of the channels that carry motion
_SHARE = 0.75  # of a blend
_OPERATORS = {
    "query_case": "query_attention",
    "frame_case": "frame_attention",
    "block_case": "temporal_block",
    "feature_case": "motion_feature",
    "step_case": "guided_step",
}
_CONTROLLED = ("animatediff_64x64", "embedded_16x16")  # sites with a case for each control
_QUERY_KINDS: tuple[dict[str, Any], ...] = (  # each further control, and the way back of the first
    {"injected": True, "backward": True},
    {"injected": True, "blend": True},
    {"further": 1},
)
_FRAME_KINDS: tuple[dict[str, Any], ...] = (
    {"control": "motion"},
    {"control": "deviation"},
    {"control": "blend"},
    {"control": "epilogue"},
    {"control": "motion", "backward": True},
)


@dataclass(frozen=True)
class Site:
    """One place of a network where an operator is called.

    `rows` are the halves of guidance; query attention adds a source that they may read.
    """

    name: str
    frames: int
    tokens: int
    heads: int
    d: int
    rows: int = 2

    @property
    def width(self) -> int:
        """Channels."""
        return self.heads * self.d


SITES = (
    Site("animatediff_64x64", 16, 4096, 8, 40),
    Site("animatediff_32x32", 16, 1024, 8, 80),
    Site("animatediff_16x16", 16, 256, 8, 160),
    Site("zeroscope_40x72", 24, 2880, 5, 64),
    Site("zeroscope_20x36", 24, 720, 10, 64),
    Site("videocrafter2_40x64", 16, 2560, 5, 64),
    Site("videocrafter2_20x32", 16, 640, 10, 64),
    Site("embedded_16x16", 8, 256, 2, 32),
    Site("embedded_8x8", 8, 64, 4, 32),
)
TAPS = (  # what motion is read from: the output of up block 1; heads * d are its channels
    Site("animatediff", 16, 32 * 32, 1, 1280),
    Site("zeroscope", 24, 20 * 36, 1, 1280),
    Site("videocrafter2", 16, 20 * 32, 1, 1280),
    Site("embedded", 8, 16 * 16, 1, 128),
)
LATENTS = {  # of eight clips
    "animatediff": (8, 4, 16, 64, 64),
    "zeroscope": (8, 4, 24, 40, 72),
    "videocrafter2": (8, 4, 16, 40, 64),
    "embedded": (8, 4, 8, 16, 16),
}
SPEEDUP = Site("16_frames_1024_positions", 16, 1024, 8, 40, rows=1)
LONG = (  # as many frames as motion modules have positions for, and as kernels hold
    Site("32_frames_256_positions", 32, 256, 8, 80, rows=1),
    Site("128_frames_128_positions", 128, 128, 8, 8, rows=1),
)


@dataclass(frozen=True)
class Case:
    """One operator at one shape, and the other ways to compute the same.

    Args:
        operator: name of the operator.
        shape: name of the shape, as in figures.
        element: type of the activations, a key of `TYPES`.
        cost: the least work of one call.
        ways: contestant → what prepares it and returns the call that is timed; `OURS` and `USUAL`
            are always there.
        part: what of the outputs is compared with float64.
        exact: that part in float64.
        backward: whether the outputs are gradients.
    """

    operator: str
    shape: str
    element: str
    cost: Cost
    ways: Mapping[str, Prepare]
    part: Callable[[Outputs], Outputs]
    exact: Call
    backward: bool = False

    @property
    def name(self) -> str:
        """The stem of its figures."""
        return f"kernels.{self.operator}.{self.shape}.{self.element}"


@dataclass(frozen=True)
class Plan:
    """A case to be built when its turn comes, since all cases together fill any memory.

    `uncompiled` is why contestants that are compiled first take no part; empty if they do.
    """

    build: Callable[[], Case]
    element: str
    uncompiled: str = ""


@dataclass(frozen=True)
class Roof:
    """What the machine was seen to do: bytes a second of a copy, operations of a product."""

    bytes_per_second: float
    flops_per_second: Mapping[str, float]

    def seconds(self, cost: Cost, element: str) -> float:
        """The least time of this cost here."""
        return cost.least_seconds(self.bytes_per_second, self.flops_per_second[element])


@dataclass(frozen=True)
class Line:
    """What became of one contestant of one case.

    Args:
        operator: as the case says.
        shape: likewise.
        element: likewise.
        contestant: its name.
        skipped: why it was not timed; empty if it was.
        failed: why none of the case was timed, on the line of the contestant that is to blame.
        seconds: of one call.
        useful_tflops: operations of the cost, which counts no padding, a second.
        gigabytes_per_second: bytes of the cost a second.
        share_of_roof: time that the machine's rates allow, over its time.
        times_ours: its time over ours.
        rounds: seconds of each round.
    """

    operator: str
    shape: str
    element: str
    contestant: str
    skipped: str = ""
    failed: str = ""
    seconds: Timing | None = None
    useful_tflops: float = 0.0
    gigabytes_per_second: float = 0.0
    share_of_roof: float = 0.0
    times_ours: float = 0.0
    rounds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Machine:
    """Where contestants run: prepares calls so that they can be timed, and times them."""

    device: str

    def prepare(self, make: Prepare) -> tuple[Callable[[], object], Outputs]:
        """What is timed, and the outputs that it has filled once."""
        if not self.device.startswith("cuda"):
            call = make()
            return call, call()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # which may still be drawing the inputs
        with torch.cuda.stream(stream):  # where a gradient's forward direction must have run too
            call = make()
            for _ in range(3):  # what is loaded or chosen at first use must not be captured
                call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs = call()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay, outputs

    def time(
        self,
        runs: Mapping[str, Callable[[], object]],
        seconds: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> dict[str, list[float]]:
        """Seconds of each run, round by round; as many rounds as `seconds` allow, in bounds.

        Every second round goes through the runs backwards, and every two rounds begin with another
        run: what runs after another finds its caches, and the same code would else differ by 1 to
        3 % on a CPU.
        """
        measure = self._gpu_round if self.device.startswith("cuda") else _cpu_round
        measure(runs, clock)  # the first one finds caches as no later one does
        least, most = _ROUNDS
        taken: list[dict[str, float]] = []
        end = clock() + seconds
        while len(taken) < least or (len(taken) < most and clock() < end):
            taken.append(measure(_in_turn(runs, len(taken)), clock))
        return {name: [one[name] for one in taken] for name in runs}

    def _gpu_round(
        self, runs: Mapping[str, Callable[[], object]], _: Callable[[], float]
    ) -> dict[str, float]:
        marks = {}
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            _flush_buffer(
                self.device
            ).zero_()  # runs while the next ones are queued: no launch is timed
            start.record()
            run()
            end.record()
            marks[name] = (start, end)
        torch.cuda.synchronize()
        return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in marks.items()}

    def roof(self, elements: Sequence[str]) -> Roof:
        """Measure a copy, and a square matrix product of each type."""
        gpu = self.device.startswith("cuda")
        size, side = (2**30, 8192) if gpu else (2**27, 1024)
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        runs: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
        for element in elements:
            left = torch.randn(side, side, device=self.device).to(TYPES[element])
            runs[element] = functools.partial(torch.mm, left, left)
        times = self.time(runs, seconds=2.0)
        middle = {name: float(np.median(taken)) for name, taken in times.items()}
        rates = {element: 2 * side**3 / middle[element] for element in elements}
        return Roof(2 * size / middle["copy"], rates)


def _in_turn(
    runs: Mapping[str, Callable[[], object]], turn: int
) -> dict[str, Callable[[], object]]:
    """The runs in the order of a round, which is that of the one before it backwards if odd."""
    items = list(runs.items())
    first = turn // 2 % len(items)
    order = items[first:] + items[:first]
    return dict(reversed(order) if turn % 2 else order)


def _cpu_round(
    runs: Mapping[str, Callable[[], object]], clock: Callable[[], float]
) -> dict[str, float]:
    seconds = {}
    for name, run in runs.items():
        start = clock()
        run()
        seconds[name] = clock() - start
    return seconds


@functools.cache
def _flush_buffer(device: str) -> Tensor:
    cache = int(torch.cuda.get_device_properties(device).L2_cache_size)
    return torch.empty(max(4 * cache, 2**28), dtype=torch.uint8, device=device)


@dataclass(frozen=True)
class Inputs:
    """Random tensors of a case."""

    device: str
    element: str
    seed: int = 0

    def start(self) -> Callable[..., Tensor]:
        """What makes the next tensor of a shape, in the case's type unless another is named."""
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def randn(*shape: int, dtype: torch.dtype = TYPES[self.element]) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device).to(dtype)

        return randn


def plan(device: str, *, quick: bool, seed: int = 0) -> list[Plan]:
    """All cases of this device.

    On a GPU all sites, in bf16 and fp16. On a CPU the embedded model as it is, and of the others
    one row, and one frame where attention stays within a frame, in fp32; and attention over many
    frames, whose scores are larger than what they are made of. Compiling takes longer
    than everything else, so contestants that are compiled first take part in the first case of
    each operator and model, and in bf16 on a GPU, where each case whose ratio to the best has a
    target has them too. A quick run has the embedded model, on a GPU
    AnimateDiff's largest site in bf16 as well, and compiles nothing.
    """
    gpu = device.startswith("cuda")
    elements = ("fp32",) if not gpu else ("bf16",) if quick else ("bf16", "fp16")
    plans = []
    for element in elements:
        inputs = Inputs(device, element, seed)
        for models in builders(inputs, quick=quick).values():
            for builds in models.values():
                for place, build in enumerate(builds):
                    later = place and not (gpu and _wants_best(build, element))
                    reason = "compiled for a model's first case only" if later else ""
                    reason = "compiled for bf16 only" if element == "fp16" else reason
                    reason = "not in a quick run" if quick else reason
                    plans.append(Plan(build, element, reason))
    return plans


def describe(build: Callable[[], Case]) -> list[str]:
    """Operator, site and further words of a case, told before it is built."""
    assert isinstance(build, functools.partial)
    site, *rest = build.args
    words = [value for value in rest if isinstance(value, str)]
    for name, value in build.keywords.items():
        if value:
            words.append(name if value is True else f"{name}={value}")
    return [_OPERATORS[build.func.__name__], str(getattr(site, "name", site)), *words]


def stem(build: Callable[[], Case], element: str) -> str:
    """What the figures of a case begin with, told before it is built.

    That is so for all that have targets; a case with controls has them in other words.
    """
    operator, *words = describe(build)
    return f"kernels.{operator}.{'_'.join(words)}.{element}"


def _wants_best(build: Callable[[], Case], element: str) -> bool:
    return f"{stem(build, element)}.ratio_to_best" in load_targets()


def builders(
    inputs: Inputs, *, quick: bool = False, everywhere: bool = False
) -> dict[str, dict[str, list[Callable[[], Case]]]]:
    """What builds the cases: operator → model → builders, the most telling case first.

    Controls have cases at two sites, or `everywhere`, as the search for settings wants.
    """
    gpu = inputs.device != "cpu"
    quick_ones = ("embedded", "animatediff_64x64") if gpu else ("embedded",)
    found: dict[str, dict[str, list[Callable[[], Case]]]] = {
        operator: {model: [] for model in LATENTS}
        for operator in (
            *("query_attention", "frame_attention", "temporal_block"),
            *("motion_feature", "guided_step"),
        )
    }
    for site in SITES:
        if quick and not site.name.startswith(quick_ones):
            continue
        model = site.name.split("_")[0]
        whole = gpu or model == "embedded"
        frame = replace(site, rows=site.rows + 1)  # with a source whose queries may be read
        row = site
        if not whole:
            frame = replace(site, name=f"{site.name}_one_frame", frames=1, rows=1)
            row = replace(site, name=f"{site.name}_one_row", rows=1)
        kinds: list[dict[str, Any]] = [{}, {"backward": True}]
        controlled = whole and (everywhere or (site.name in _CONTROLLED and not quick))
        kinds += [{"injected": True}] if whole else []
        kinds += [{"keys": 77}] if site.name in ("animatediff_64x64", "embedded_16x16") else []
        of_frames = [*kinds[:2], *(_FRAME_KINDS if controlled else ())]
        kinds += _QUERY_KINDS if controlled else ()
        found["query_attention"][model] += [
            functools.partial(query_case, frame, inputs, **kind) for kind in kinds
        ]
        found["frame_attention"][model] += [
            functools.partial(frame_case, row, inputs, **kind) for kind in of_frames
        ]
        if has_block(site):
            found["temporal_block"][model].append(functools.partial(block_case, row, inputs))
    for tap in TAPS:
        if quick and tap.name != "embedded":
            continue
        whole = gpu or tap.name == "embedded"
        row = tap if whole else replace(tap, name=f"{tap.name}_one_row", rows=1)
        every = ("all", "channels", "projection", "region")
        asked = every if tap.name in ("animatediff", "embedded") else ("channels",)
        found["motion_feature"][tap.name] += [
            functools.partial(feature_case, row, way, inputs, backward=backward)
            for way in asked
            for backward in (False, True)
        ]
    for name, latents in LATENTS.items():
        if not quick or name == "embedded":
            found["guided_step"][name].append(functools.partial(step_case, name, latents, inputs))
    if not gpu:
        found["frame_attention"]["animatediff"] += [
            functools.partial(frame_case, site, inputs, backward=backward)
            for site in (SPEEDUP, *LONG)
            for backward in (False, True)
        ]
    return found


def has_block(site: Site) -> bool:
    """Whether a whole temporal layer is a case there: where positions are many, or ours."""
    return site.tokens >= 32 * 20 or site.name == "embedded_16x16"


def query_case(
    site: Site,
    inputs: Inputs,
    *,
    injected: bool = False,
    blend: bool = False,
    further: int = 0,
    keys: int | None = None,
    backward: bool = False,
) -> Case:
    """Attention within a frame.

    Args:
        site: where.
        inputs: of what type and on which device.
        injected: whether all rows read the queries of the last one.
        blend: whether they mix them with their own.
        further: how many other rows' keys each row sees.
        keys: those of a prompt, which the frames share; None: as many as tokens, of each frame.
        backward: whether it is the gradient.
    """
    randn = inputs.start()
    rows, frames = site.rows, site.frames
    shape = (rows, frames, site.tokens, site.width)
    of_keys = shape if keys is None else (rows, 1, keys, site.width)
    given = (randn(*shape), randn(*of_keys), randn(*of_keys))
    grad = randn(*shape) if backward else None
    controls: dict[str, Tensor] = {}
    every_row = torch.arange(rows, device=inputs.device)
    if injected:
        controls["query_row"] = torch.full_like(every_row, rows - 1)
    if blend:
        controls["query_blend"] = torch.full((rows,), _SHARE, device=inputs.device)
    if further:
        others = torch.arange(1, further + 1, device=inputs.device)
        controls["key_rows"] = (every_row[:, None] + others) % rows
    words = {"injected": injected and not blend, "blend": blend, "further": further, "prompt": keys}
    words["backward"] = backward
    ours = functools.partial(query_attention, heads=site.heads, **controls)
    reference = functools.partial(query_attention_reference, heads=site.heads, **controls)
    ways: dict[str, Prepare] = {OURS: timed_way(lambda: ours, given, grad)}
    for word, attend in _attentions(inputs.device).items():
        ways[word] = timed_way(
            functools.partial(_usual_within, attend, site.heads, controls), given, grad
        )
    ways[COMPILED] = timed_way(lambda: _compiled_definition(reference), given, grad)
    scores = rows * frames * site.heads * site.tokens * (keys or (1 + further) * site.tokens) * 4
    if scores > _SCORES:
        ways[MATH] = _too_large(scores)
        if backward:  # which keeps several of them
            ways[COMPILED] = _too_large(scores)
    first = (slice(None), slice(1), slice(None), slice(site.d))  # one frame of one head
    one_head = functools.partial(query_attention_reference, heads=1, **controls)
    return Case(
        "query_attention",
        "_".join([site.name, *(word for word, asked in words.items() if asked)]),
        inputs.element,
        query_cost(
            shape, of_keys, given[0].element_size(), further_rows=further, backward=backward
        ),
        ways,
        lambda outputs: tuple(tensor[first] for tensor in outputs),
        _exact(one_head, given, grad, first),
        backward,
    )


def _too_large(scores: int) -> Prepare:
    """What says that a way is left out: its graph would keep the memory that others need."""

    def prepare() -> Call:
        raise WorkError(f"writes all scores, {scores / 1e9:.1f} GB in float32")

    return prepare


def frame_case(site: Site, inputs: Inputs, *, control: str = "", backward: bool = False) -> Case:
    """Attention over frames; the others get sequences, and move one tensor there and one back.

    `control` is what comes with it, if anything: "motion" embeddings, another row's "deviation", a
    "blend" with its queries, or the "epilogue" that returns the motion in the output. The others
    apply it before or after, by PyTorch's operators.
    """
    randn = inputs.start()
    shape = (site.rows, site.frames, site.tokens, site.width)
    given = (randn(*shape), randn(*shape), randn(*shape))
    grad = randn(*shape) if backward else None
    controls = _frame_controls(control, site, inputs.device, randn)
    projection = None
    if control == "epilogue":
        projection = randn(site.width, math.ceil(_MOTION * site.width)) * site.width**-0.5
    ours: Function = functools.partial(frame_attention, heads=site.heads, **controls)
    if projection is not None:
        ours = functools.partial(
            frame_attention_with_motion, projection=projection, heads=site.heads
        )

    def reference(*tensors: Tensor) -> Outputs:
        """Of all tokens, or of some in another type."""
        kind, tokens = tensors[0].dtype, tensors[0].shape[2]
        known = {
            name: t.to(kind)[:, :, :tokens] if t.ndim == 4 else t.to(kind)
            for name, t in controls.items()
            if t.is_floating_point()
        }
        out = frame_attention_reference(*tensors, heads=site.heads, **{**controls, **known})
        if projection is None:
            return (out,)
        return out, motion_feature_reference(out, projection=projection.to(kind))

    ways: dict[str, Prepare] = {
        OURS: timed_way(lambda: ours, given, grad),
        COMPILED: timed_way(lambda: _compiled_definition(reference), given, grad),
    }
    for word, attend in _attentions(inputs.device).items():
        ways[word] = functools.partial(_over_sequences, attend, site.heads, given, grad)
        if control:
            ways[word] = timed_way(
                functools.partial(_usual_over_frames, attend, site.heads, controls, projection),
                given,
                grad,
            )
    some = (slice(None), slice(None), slice(_CHECKED))
    return Case(
        "frame_attention",
        "_".join([site.name, *([control] * bool(control)), *(["backward"] * backward)]),
        inputs.element,
        frame_cost(*shape[:3], site.heads, site.d, given[0].element_size(), backward=backward),
        ways,
        lambda outputs: tuple(tensor[some] for tensor in outputs),
        _exact(reference, given, grad, some),
        backward,
    )


def _frame_controls(
    control: str, site: Site, device: str, randn: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """The tensors of one kind of control; each row reads the next one."""
    row = torch.arange(1, site.rows + 1, device=device) % site.rows
    share = torch.full((site.rows,), _SHARE, device=device)
    if control == "deviation":
        return {"deviation_row": row, "deviation_blend": share}
    if control == "blend":
        return {"query_row": row, "query_blend": share}
    if control != "motion":
        return {}
    of_frame = (2, site.frames, site.width)
    return {
        "motion_slot": torch.ones_like(row),
        "motion_scale": share,
        "query_bank": randn(*of_frame),
        "key_bank": randn(*of_frame),
        "value_bank": randn(2, site.frames, site.tokens, site.width),
    }


@dataclass(frozen=True)
class Layer:
    """A temporal layer: its input, and what the operators are told by name.

    `banks` are the projected motion embeddings, none for a layer without.
    """

    x: Tensor
    weights: Mapping[str, Tensor]
    heads: int
    position: Tensor
    slots: Tensor
    banks: Mapping[str, Tensor]

    @property
    def motion(self) -> dict[str, Tensor]:
        """What says whose motion is added."""
        return {"motion_slot": self.slots, **self.banks} if self.banks else {}

    def separately(self, x: Tensor) -> Tensor:
        """The separate operators, as the engine runs them where one kernel does not pay."""
        weights = self.weights
        normed = F.layer_norm(x, x.shape[-1:], weights["norm_weight"], weights["norm_bias"])
        normed = normed + self.position[:, None]
        query, key, value = (
            F.linear(normed, weights[f"{name}_weight"]) for name in ("query", "key", "value")
        )
        out = frame_attention(query, key, value, heads=self.heads, **self.motion)
        y: Tensor = x + F.linear(out, weights["out_weight"], weights["out_bias"])
        return y

    def by_kernel(self, x: Tensor) -> Tensor:
        """The kernel itself, whatever the operator would choose."""
        y = torch.empty_like(x)
        motion = {"motion_slot": None, "motion_scale": None, **dict.fromkeys(_BANKS)} | self.motion
        weights = [self.weights[name] for name in _WEIGHTS]
        launch_block(x, *weights, self.position, *motion.values(), self.heads, _EPS, y)
        return y


def make_layer(
    site: Site, inputs: Inputs, *, motion: bool
) -> tuple[Layer, tuple[Tensor, Tensor] | None]:
    """A random layer, and its motion embedding before projection, of frames and of positions."""
    randn = inputs.start()
    rows, frames, tokens, width = site.rows, site.frames, site.tokens, site.width
    x = randn(rows, frames, tokens, width)
    norm, bias = (1 + 0.1 * randn(width), 0.1 * randn(width))
    matrices = [randn(width, width) * width**-0.5 for _ in range(4)]
    position = randn(frames, width)
    of_frame, of_token = randn(frames, width), randn(frames, tokens, width)

    def bank(embedding: Tensor, matrix: Tensor) -> Tensor:
        projected = (embedding.float() @ matrix.float().T).to(x.dtype)
        return torch.stack([torch.zeros_like(projected), projected])

    embeddings = (of_frame, of_frame, of_token) if motion else ()
    banks = {
        name: bank(embedding, matrix)
        for name, embedding, matrix in zip(_BANKS, embeddings, matrices, strict=False)
    }
    values = (norm, bias, *matrices, 0.1 * randn(width))
    weights = dict(zip(_WEIGHTS, values, strict=True))
    slots = torch.ones(rows, dtype=torch.int64, device=inputs.device)
    embedding = (of_frame, of_token) if motion else None
    return Layer(x, weights, site.heads, position, slots, banks), embedding


def block_case(site: Site, inputs: Inputs) -> Case:
    """A temporal layer with a motion embedding; the usual way adds it before the projections."""
    layer, embedding = make_layer(site, inputs, motion=True)
    return layer_case(site, inputs.element, layer, embedding)


def layer_case(
    site: Site, element: str, layer: Layer, embedding: tuple[Tensor, Tensor] | None
) -> Case:
    """What else computes `layer`, and what it is in float64."""
    x, weights = layer.x, layer.weights
    rows, frames, tokens, width = x.shape
    asked: dict[str, Any] = {"heads": site.heads, "position": layer.position}
    given: dict[str, Any] = {**weights, **asked, **layer.motion}
    ours = functools.partial(temporal_block, **given)

    def reference(x: Tensor, motion: Mapping[str, Any] = layer.motion) -> Tensor:
        wide: dict[str, Any] = {name: tensor.to(x.dtype) for name, tensor in weights.items()}
        return temporal_block_reference(x, **wide, **asked, **motion)

    def usual(x: Tensor) -> Tensor:
        normed = F.layer_norm(x, (width,), weights["norm_weight"], weights["norm_bias"])
        normed = normed + layer.position[:, None]
        sequences = normed.permute(0, 2, 1, 3).flatten(0, 1)  # [rows * tokens, frames, width]
        of_value = sequences
        if embedding is not None:
            of_frame, of_token = embedding
            of_value = sequences.unflatten(0, (rows, tokens)) + of_token.transpose(0, 1)
            sequences, of_value = sequences + of_frame, of_value.flatten(0, 1)
        parts = {"query": sequences, "key": sequences, "value": of_value}
        q, k, v = (
            F.linear(part, weights[f"{name}_weight"])
            .unflatten(-1, (site.heads, -1))
            .transpose(1, 2)
            for name, part in parts.items()
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = F.linear(out, weights["out_weight"], weights["out_bias"])
        y: Tensor = x + out.unflatten(0, (rows, tokens)).permute(0, 2, 1, 3)
        return y

    def exact() -> Outputs:
        some = {k: v[:, :, :_CHECKED] if v.ndim == 4 else v for k, v in layer.motion.items()}
        wide = {k: v.double() if v.is_floating_point() else v for k, v in some.items()}
        return (reference(x[:, :, :_CHECKED].double(), wide),)

    return Case(
        "temporal_block",
        site.name,
        element,
        block_cost(rows, frames, tokens, site.heads, site.d, x.element_size()),
        {
            OURS: timed_way(lambda: ours, (x,)),
            SEPARATE: timed_way(lambda: layer.separately, (x,)),
            USUAL: timed_way(lambda: usual, (x,)),
            COMPILED: timed_way(lambda: _compiled_definition(reference), (x,)),
            COMPILED_USUAL: timed_way(lambda: _compiled(usual), (x,)),
        },
        lambda outputs: tuple(tensor[:, :, :_CHECKED] for tensor in outputs),
        exact,
    )


def feature_case(tap: Site, kind: str, inputs: Inputs, *, backward: bool = False) -> Case:
    """What changes over the frames of a tap; `kind` is what is asked for of it."""
    randn = inputs.start()
    x = randn(tap.rows, tap.frames, tap.tokens, tap.width)
    # What all positions share, as a camera makes it: else the mean over a region is all rounding.
    x += torch.linspace(-1, 1, tap.frames, device=x.device, dtype=x.dtype)[:, None, None]
    count = math.ceil(_MOTION * tap.width)
    asked: dict[str, Any] = {}
    if kind == "channels":
        asked["channels"] = torch.arange(count, device=inputs.device) * (tap.width // count)
    if kind == "projection":
        asked["projection"] = randn(tap.width, count) * tap.width**-0.5
    weights = torch.full((1, tap.tokens), 1 / tap.tokens, device=inputs.device)
    region = {"region": weights[0]} if kind == "region" else {}
    ours: Function = functools.partial(motion_feature, **asked, **region)

    def reference(x: Tensor) -> Tensor:
        known = {k: v.to(x.dtype) if k == "projection" else v for k, v in asked.items()}
        return motion_feature_reference(x, weights=weights if region else None, **known)

    def usual(x: Tensor) -> Tensor:
        y = x - x.mean(1, keepdim=True)
        if kind == "channels":
            y = y[..., asked["channels"]]
        if kind == "projection":
            y = y @ asked["projection"]
        # A product is quicker than to weight and add up, and reads what changes once.
        return weights.to(y.dtype) @ y if kind == "region" else y

    places = 1 if kind == "region" else tap.tokens
    results = count if asked else tap.width
    grad = randn(tap.rows, tap.frames, places, results) if backward else None
    chosen = {"chosen": count} if kind == "channels" else {}
    if kind == "projection":
        chosen = {"projected": count}
    cost = feature_cost(
        tap.rows, tap.frames, tap.tokens, tap.width, x.element_size(), **chosen, region=bool(region)
    )
    if grad is not None:  # the gradient is read, and that of every channel written
        cost = replace(cost, bytes=x.element_size() * (x.numel() + grad.numel()))
    ways = {
        OURS: timed_way(lambda: ours, (x,), grad),
        USUAL: timed_way(lambda: usual, (x,), grad),
        COMPILED: timed_way(lambda: _compiled_definition(reference), (x,), grad),
        COMPILED_USUAL: timed_way(lambda: _compiled(usual), (x,), grad),
    }
    return Case(
        "motion_feature",
        f"{tap.name}_{kind}" + ("_backward" if backward else ""),
        inputs.element,
        cost,
        ways,
        lambda outputs: tuple(tensor[:1] for tensor in outputs),
        _exact(reference, (x,), grad, (slice(1),)),
        backward,
    )


def step_case(name: str, latents: tuple[int, ...], inputs: Inputs) -> Case:
    """Guidance and the sampler's update, for a float32 sample and a network's output."""
    randn = inputs.start()
    sample, former, noise = (randn(*latents, dtype=torch.float32) for _ in range(3))
    conditional, unconditional = randn(*latents), randn(*latents)
    scale = 5 + randn(latents[0], dtype=torch.float32)
    numbers = randn(latents[0], 6, dtype=torch.float32)
    given = (sample, conditional, unconditional, former, noise, scale, numbers)

    def usual(x: Tensor, wanted: Tensor, other: Tensor, *rest: Tensor) -> Outputs:
        former, noise, scale, numbers = rest
        spread = [1] * (x.ndim - 1)
        a, b, c, s, p, q = numbers.reshape(-1, 6, *spread).unbind(1)
        mixed = other.float() + scale.reshape(-1, *spread) * (wanted.float() - other.float())
        return a * x + b * mixed + c * former + s * noise, p * x + q * mixed

    return Case(
        "guided_step",
        name,
        inputs.element,
        step_cost(
            latents[0],
            math.prod(latents[1:]),
            sample.element_size(),
            output_itemsize=conditional.element_size(),
        ),
        {
            OURS: timed_way(lambda: guided_step, given),
            USUAL: timed_way(lambda: usual, given),
            COMPILED: timed_way(lambda: _compiled_definition(guided_step_reference), given),
        },
        lambda outputs: outputs,
        _exact(guided_step_reference, given, None, (slice(None),)),
    )


def _attentions(device: str) -> dict[str, Callable[[], Function]]:
    """Ways of scaled dot product attention over [batch, heads, tokens, d]."""

    def by(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out: Tensor = F.scaled_dot_product_attention(query, key, value)
            return out

    ways: dict[str, Callable[[], Function]] = {USUAL: lambda: F.scaled_dot_product_attention}
    for name, backend in BACKENDS.items():
        ways[name] = functools.partial(functools.partial, by, backend)
    ways[FLEX] = lambda: _compiled(flex_attention)
    return ways


def _usual_within(
    attend: Callable[[], Function], heads: int, controls: Mapping[str, Tensor]
) -> Function:
    return functools.partial(_within_frames, attend(), heads, controls)


def _within_frames(
    attend: Function,
    heads: int,
    controls: Mapping[str, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """The usual way: copy what is read of other rows, repeat keys that frames share, attend."""
    if "query_row" in controls:
        query = choose_queries(query, controls["query_row"], controls.get("query_blend"))
    if "key_rows" in controls:
        key, value, _ = extend_keys(key, value, controls["key_rows"])
    rows, frames = query.shape[:2]
    q, k, v = (
        t.expand(-1, frames, -1, -1).flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2)
        for t in (query, key, value)
    )
    out: Tensor = attend(q, k, v).transpose(1, 2).flatten(2).unflatten(0, (rows, frames))
    return out


def _usual_over_frames(
    attend: Callable[[], Function],
    heads: int,
    controls: Mapping[str, Tensor],
    projection: Tensor | None,
) -> Function:
    return functools.partial(_over_frames, attend(), heads, controls, projection)


def _over_frames(
    attend: Function,
    heads: int,
    controls: Any,
    projection: Tensor | None,
    *given: Tensor,
) -> Outputs:
    """The usual way over frames with a control: change q, k and v, move them, attend, move back."""
    query, key, value = given
    rows, _, tokens, _ = query.shape
    q, k, v = (
        t.permute(0, 2, 1, 3).flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2)
        for t in mix(query, key, value, **controls)
    )
    out = attend(q, k, v).transpose(1, 2).flatten(2).unflatten(0, (rows, tokens))
    back: Tensor = out.permute(0, 2, 1, 3).contiguous()
    if projection is None:
        return (back,)
    return back, (back - back.mean(1, keepdim=True)) @ projection


def _over_sequences(
    make: Callable[[], Function], heads: int, given: Outputs, grad: Tensor | None
) -> Call:
    """The usual way over frames, which finds its q, k and v in order: a projection wrote them.

    What it pays for is to bring the hidden states into that order before, and the result back.
    """
    attend = make()
    rows, _, tokens, _ = given[0].shape
    hidden = given[0]
    sequences = [t.permute(0, 2, 1, 3).flatten(0, 1).contiguous() for t in given]

    def forward(*parts: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in parts)
        out = attend(q, k, v).transpose(1, 2).flatten(2).unflatten(0, (rows, tokens))
        back: Tensor = out.permute(0, 2, 1, 3).contiguous()
        return back

    if grad is None:

        def call() -> Outputs:
            with torch.no_grad():
                hidden.permute(0, 2, 1, 3).contiguous()
                return (forward(*sequences),)

        return call

    gradients = timed_way(lambda: forward, tuple(sequences), grad)()

    def back() -> Outputs:
        found = [g.unflatten(0, (rows, tokens)).permute(0, 2, 1, 3) for g in gradients()]
        found[0].contiguous()
        return tuple(found)

    return back


def timed_way(make: Callable[[], Function], given: Outputs, grad: Tensor | None = None) -> Prepare:
    """What prepares a function's call on `given`, or with `grad` the call of its gradient."""

    def prepare() -> Call:
        function = make()
        if grad is None:

            def forward() -> Outputs:
                with torch.no_grad():
                    return _several(function(*given))

            return forward
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        (out,) = _several(function(*leaves))
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    return prepare


def _exact(
    reference: Function, given: Outputs, grad: Tensor | None, part: tuple[slice, ...]
) -> Call:
    """The same by the reference in float64, of a part that does not depend on the rest."""

    def exact() -> Outputs:
        some = tuple(tensor[part].double() for tensor in given)
        return timed_way(lambda: reference, some, None if grad is None else grad[part].double())()()

    return exact


def _several(result: Tensor | Outputs) -> Outputs:
    return (result,) if isinstance(result, Tensor) else result


def _compiled(function: Function) -> Function:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _compiled_definition(reference: Function) -> Function:
    # What torch 2.13 puts in the place of attention over tensors of five axes is wrong by more
    # than the values themselves, so it must not look for attention here.
    options: dict[str, str | int | bool | Callable[..., Any]] = {"pattern_matcher": False}
    return torch.compile(reference, fullgraph=True, dynamic=False, options=options)


def errors(case: Case, outputs: Outputs, exact: Outputs) -> list[float]:
    """Greatest error of the checked part of each output; infinite where one is not finite."""
    found = []
    for got, wanted in zip(case.part(outputs), exact, strict=True):
        worst = (got.double() - wanted).abs().max().item()
        found.append(worst if math.isfinite(worst) else math.inf)
    return found


class Gate:
    """Whether results are right: at most twice as far from float64 as the usual way (gradients 3).

    That is asked of a part. All of a result must agree with the usual way's, whose own error there
    is not known: it may differ by what the two may err together in the part, times how much larger
    the values are elsewhere, times `_EXTREME`.

    Raises:
        WorkError: the usual way is itself far from float64, so that nothing could be judged by it.
    """

    def __init__(self, case: Case, usual: Outputs) -> None:
        self.case, self.usual, self.exact = case, usual, case.exact()
        largest = [_largest(wanted) for wanted in self.exact]
        units = [
            torch.finfo(whole.dtype).eps * value
            for whole, value in zip(usual, largest, strict=True)
        ]
        found = errors(case, usual, self.exact)
        if not all(math.isfinite(_largest(whole)) for whole in usual):
            raise WorkError(
                f"{case.name}: the usual way's result must be finite, got one that is not"
            )
        if any(error > _SANE * unit for error, unit in zip(found, units, strict=True)):
            raise WorkError(
                f"{case.name}: the usual way must err at most {_SANE} units in the last place, "
                f"errs {found} where one unit is {units}"
            )
        slack = SLACK[case.backward]
        self.allowed = [slack * e + u for e, u in zip(found, units, strict=True)]
        self.allowed_to_differ = [
            _EXTREME * max(1.0, _largest(whole) / value if value else 1.0) * (e + allowed)
            for whole, value, e, allowed in zip(usual, largest, found, self.allowed, strict=True)
        ]

    def complaint(self, outputs: Outputs) -> str:
        """What is wrong with `outputs`; empty if nothing is."""
        for error, allowed in zip(
            errors(self.case, outputs, self.exact), self.allowed, strict=True
        ):
            if error > allowed:
                return f"wrong: errs {error:.3g}, allowed {allowed:.3g}"
        for got, usual, allowed in zip(outputs, self.usual, self.allowed_to_differ, strict=True):
            if got.shape != usual.shape:
                return f"wrong: is {list(got.shape)}, must be {list(usual.shape)}"
            differs = _largest(got.double() - usual)
            if differs > allowed:
                return f"wrong: differs from the usual way by {differs:.3g}, allowed {allowed:.3g}"
        return ""


def _largest(tensor: Tensor) -> float:
    """The largest magnitude; infinite where a value is not finite."""
    value = tensor.abs().max().item()
    return value if math.isfinite(value) else math.inf


def run_case(
    case: Case, machine: Machine, roof: Roof, *, seconds: float, uncompiled: str = ""
) -> list[Line]:
    """Prepare all contestants, compare them with float64, and time those that are right.

    Where ours, or the usual way, is wrong or does not run there is one line, which says so.
    """
    empty = functools.partial(Line, case.operator, case.shape, case.element)
    try:
        usual, outputs = machine.prepare(case.ways[USUAL])
        gate = Gate(case, outputs)
    except Exception as error:  # the table of all cases must not stop at one
        return [empty(USUAL, failed=_in_short(error))]
    runs: dict[str, Run] = {USUAL: usual}
    refused: dict[str, str] = {}
    for name, way in {OURS: case.ways[OURS], **case.ways}.items():
        if name in COMPILED_ONES and uncompiled:
            refused[name] = uncompiled
        elif name != USUAL:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they say at length what an error says in short
                runs[name], refused[name] = _try(machine, way, gate)
            if refused[name] and lost(machine.device):
                return [empty(name, failed=refused[name])]
        if refused.get(OURS):
            return [empty(OURS, failed=refused[OURS])]
    skipped = {name: why for name, why in refused.items() if why}
    times = machine.time({name: runs[name] for name in case.ways if name not in skipped}, seconds)
    ours = float(np.median(times[OURS]))
    lines = []
    for name in case.ways:
        if name in skipped:
            lines.append(empty(name, skipped[name]))
            continue
        p20, p50, p80 = (float(value) for value in np.percentile(times[name], [20, 50, 80]))
        lines.append(
            empty(
                name,
                seconds=Timing(p20, p50, p80),
                useful_tflops=case.cost.flops / p50 / 1e12,
                gigabytes_per_second=case.cost.bytes / p50 / 1e9,
                share_of_roof=roof.seconds(case.cost, case.element) / p50,
                times_ours=p50 / ours,
                rounds=tuple(times[name]),
            )
        )
    return lines


def _try(machine: Machine, way: Prepare, gate: Gate) -> tuple[Run, str]:
    """What is timed, and why it must not be; nothing and empty words where there is none."""
    try:
        run, outputs = machine.prepare(way)
        return run, gate.complaint(outputs)
    except Exception as error:  # back ends, compilers and launchers say no as they like
        return _nothing, _in_short(error)


def _nothing() -> None:
    """What stands for a call that could not be prepared, and is never timed."""


def _in_short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def figures_of(lines: Sequence[Line]) -> dict[str, Figure]:
    """The figures of one case; none of one that failed, or could not be built.

    A ratio is the time of the other over ours: above 1, ours is faster. Its interval is a
    bootstrap over the rounds, in which the two were timed in turn. The compiled one is the faster
    of the definition and the usual way: the definition computes in float32, at which a bar falls
    by itself.
    """
    if not lines or any(line.failed for line in lines):
        return {}
    timed = {line.contestant: line for line in lines if line.seconds is not None}
    ours = timed.pop(OURS)
    stem = f"kernels.{ours.operator}.{ours.shape}.{ours.element}"
    separate = timed.pop(SEPARATE, None)
    best = min(timed.values(), key=_by_time)
    rivals = {"best_timed" if untimed_rivals(lines) else "best": best, "usual": timed[USUAL]}
    compiled = [timed[name] for name in (COMPILED, COMPILED_USUAL) if name in timed]
    if compiled:
        rivals["compiled"] = min(compiled, key=_by_time)
    if separate is not None:
        rivals["separate"] = separate
    n = len(ours.rounds)
    figures = {f"{stem}.ratio_to_{word}": _ratio(line, ours) for word, line in rivals.items()}
    figures[f"{stem}.share_of_roof"] = Figure(ours.share_of_roof, n=n)
    figures[f"{stem}.useful_tflops"] = Figure(ours.useful_tflops, n=n, unit="TFLOP/s")
    return figures


def untimed_rivals(lines: Sequence[Line]) -> list[Line]:
    """Those of a case who may be the best and were not timed, in a half type.

    Not among them are, where attention has better ways, those that write all scores. Flash and
    cuDNN take no float32, and a CPU has no cuDNN, so there whoever was timed is all there is.
    """
    names = {line.contestant for line in lines}
    none = {SEPARATE, *((MATH, COMPILED) if FLEX in names else ())}
    return [
        line
        for line in lines
        if line.skipped and line.element != "fp32" and line.contestant not in none
    ]


def _at_best(figure: Figure) -> float:
    """The upper end of its interval: of many ratios the least is one that was disturbed."""
    return figure.value if figure.high is None else figure.high


def _by_time(line: Line) -> float:
    return line.times_ours


def _ratio(other: Line, ours: Line) -> Figure:
    pair = np.array([other.rounds, ours.rounds])  # [2, rounds]
    n = pair.shape[1]
    picks = np.random.default_rng(0).integers(n, size=(_RESAMPLES, n))
    medians = np.median(pair[:, picks], axis=-1)  # [2, resamples]
    low, high = np.percentile(medians[0] / medians[1], [2.5, 97.5])
    return Figure(other.times_ours, float(low), float(high), n=n)


def render(lines: Sequence[Line]) -> str:
    """A Markdown table, one line a contestant."""
    names = ["operator", "shape", "type", "contestant", "p20 µs", "p50 µs", "p80 µs"]
    names += ["useful TFLOP/s", "GB/s", "share of roof", "times ours"]
    rows = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for line in lines:
        words = [line.operator, line.shape, line.element, line.contestant]
        if line.seconds is None:
            why = f"failed: {line.failed}" if line.failed else f"skipped: {line.skipped}"
            words += [why.replace("|", "/"), *[""] * 6]
        else:
            taken = (line.seconds.p20, line.seconds.p50, line.seconds.p80)
            words += [f"{1e6 * seconds:.1f}" for seconds in taken]
            words += [f"{line.useful_tflops:.3g}", f"{line.gigabytes_per_second:.4g}"]
            words += [f"{line.share_of_roof:.2f}", f"{line.times_ours:.2f}"]
        rows.append(f"| {' | '.join(words)} |")
    return "\n".join(rows) + "\n"


def measure(options: BenchOptions, progress: Progress) -> dict[str, Figure]:
    """Time every case of this device, and write the lines where they are wanted."""
    gpu = options.device.startswith("cuda")
    with torch.cuda.device(options.device) if gpu else contextlib.nullcontext():
        return _measure(options, progress)


def _measure(options: BenchOptions, progress: Progress) -> dict[str, Figure]:
    machine = Machine(options.device)
    plans = plan(options.device, quick=options.quick, seed=options.seed)
    elements = sorted({p.element for p in plans})
    roof = machine.roof(elements)
    figures = {"kernels.roof.copy": Figure(roof.bytes_per_second / 1e9, unit="GB/s")}
    for element in elements:
        rate = Figure(roof.flops_per_second[element] / 1e12, unit="TFLOP/s")
        figures[f"kernels.roof.{element}"] = rate
    kind = "cuda" if options.device.startswith("cuda") else "cpu"
    seconds = _SECONDS["quick" if options.quick else kind]
    cases = _run_all(progress.track(plans, "kernels"), machine, roof, seconds)
    lines: list[Line] = []
    for found in _follow(cases, options.out):
        lines += found
        figures |= figures_of(found)
    failed = [line for line in lines if line.failed]
    figures["kernels.failed"] = Figure(len(failed), n=len(plans))
    speedup = f"kernels.frame_attention.{SPEEDUP.name}.fp32.ratio_to_usual"
    if speedup in figures:
        figures["kernels.frame_attention.cpu_speedup"] = figures[speedup]
    usual = [figure for name, figure in figures.items() if name.endswith(".ratio_to_usual")]
    if kind == "cpu" and usual:
        figures["kernels.cpu_worst_ratio"] = min(usual, key=_at_best)
    if options.out is not None:
        _write(options.out, lines)
    print(render(lines))  # noqa: T201  goes to standard error
    return figures


def _run_all(
    plans: Iterable[Plan], machine: Machine, roof: Roof, seconds: float
) -> Iterator[list[Line]]:
    for one in plans:
        yield run_plan(one, machine, roof, seconds)
        free_memory(machine.device)
        if why := lost(machine.device):
            raise WorkError(f"bench kernels: the GPU must answer to go on, got: {why}")


def run_plan(one: Plan, machine: Machine, roof: Roof, seconds: float) -> list[Line]:
    """Build a case, and run it."""
    torch.compiler.reset()  # else its limit of shapes a function sends the next one to eager
    return run_case(one.build(), machine, roof, seconds=seconds, uncompiled=one.uncompiled)


def _follow(cases: Iterable[list[Line]], folder: Path | None) -> Iterator[list[Line]]:
    """The cases; the lines of each are in `kernels.ndjson` as soon as they are known."""
    if folder is None:
        yield from cases
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: must be a folder, got: {error}") from error
    path = folder / "kernels.ndjson"
    _put(path, "w", "")
    for lines in cases:
        _put(path, "a", "".join(json.dumps(asdict(line)) + "\n" for line in lines))
        yield lines


def _put(path: Path, mode: str, text: str) -> None:
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OutputError(f"{path}: must be writable, got: {error}") from error


def _write(folder: Path, lines: Sequence[Line]) -> None:
    rows = [asdict(line) for line in lines]
    write_text(folder / "kernels.json", json.dumps(rows, indent=1) + "\n", "bench kernels")
    write_text(folder / "kernels.md", render(lines), "bench kernels")


BENCH = Bench("kernels", "each operator against the other ways to compute the same", measure)
