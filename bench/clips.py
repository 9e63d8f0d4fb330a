"""Seconds a clip and peak memory: AnimateDiff, ZeroScope and the embedded model.

A clip is guided, has 25 steps and is decoded by the VAE; what happens once a prompt or a reference
is left out, and so is compiling, whose seconds are a figure of their own. Ours, run eagerly, and
the stock pipeline of diffusers are timed in turn on the same network and VAE, after a prediction of
ours was compared with float32; so are ours compiled and ours eagerly. Larger batches, for which 25
steps would take minutes, run 5 of them; their seconds are those of 25 (five times the steps, and
the VAE once).

`seconds_per_clip` and `ratio_to_stock_best` are of the better way of ours; those of one way have
its name before them. The ratio of ours compiled to stock is the product of the two that were timed
in turn. `gpu.animatediff.seconds_per_clip` is of bfloat16, where a figure of float16 has "fp16" in
its name. `share_of_roof` is of the matrix rate that is measured beside it, `share_of_floor` of the
time that the operations take at 790 TFLOP/s, which an H200 was seen to reach.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kinetiq.bench.figures import Figure
from kinetiq.bench.harness import BenchOptions, Progress
from kinetiq.bench.kernels import Machine
from kinetiq.bench.kernels import _flush_buffer as flush_buffer
from kinetiq.bench.measure import Timing, time_ratio
from kinetiq.bench.steps import Budget, Outcome, Stage, Step, free_memory, run_stages
from kinetiq.bench.subjects import (
    ANIMATEDIFF,
    ZEROSCOPE,
    FullSize,
    Stock,
    Subject,
    compilations,
    compiled,
    eagerly,
    embedded_subject,
    full_size_subject,
)
from kinetiq.errors import KinetiqError, WorkError
from kinetiq.files import write_text
from kinetiq.sprites.cases import transfer_pairs

STEPS = 25
PART_STEPS = 5  # of a larger batch
MOST = 32  # clips that are tried together
BATCHES = (4, 8)
H200_RATE = 790e12  # operations a second in bfloat16
_REPEATS = 3
_GIB = 2**30
_KINDS = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_HEADLINE = torch.bfloat16
_BUILD = 45.0
_COMPILE = 130.0  # a full-size network, and clips of it
_PROFILED = 30  # lines of the profiler's table


@dataclass(eq=False)
class Bench:
    """A subject being measured, and how it compares with stock so far.

    Args:
        subject: what is measured, run eagerly.
        stem: of its figures.
        steps: of a clip.
        seconds: of a clip, by the way of ours.
        ratios: by the stock way: its time over ours, run eagerly.
        speedup: the time of ours eagerly over ours compiled; 1 while that was not measured.
    """

    subject: Subject
    stem: str
    steps: int = STEPS
    seconds: dict[str, Figure] = field(default_factory=dict)
    ratios: dict[str, Figure] = field(default_factory=dict)
    speedup: Figure = Figure(1.0)  # noqa: RUF009  frozen, so safe to share

    def figure(
        self, name: str, value: float, unit: str = "", n: int | None = None
    ) -> dict[str, Figure]:
        """One figure by its whole name."""
        return {f"{self.stem}.{name}": Figure(value, unit=unit, n=n)}

    def best(self) -> dict[str, Figure]:
        """The better way of ours, and how it compares with the best stock way."""
        found = {}
        if self.seconds:
            quickest = min(self.seconds.values(), key=lambda figure: figure.value)
            found[f"{self.stem}.seconds_per_clip"] = quickest
        if self.ratios:
            ratio = min(self.ratios.values(), key=lambda figure: figure.value)
            if self.speedup.value > 1:
                ratio = product(ratio, self.speedup)
            found[f"{self.stem}.ratio_to_stock_best"] = ratio
        return found


def product(first: Figure, second: Figure) -> Figure:
    """The product of two ratios, between those of their lower and of their upper ends."""
    ends = [
        None if None in pair else pair[0] * pair[1]  # type: ignore[operator]  # neither is None
        for pair in ((first.low, second.low), (first.high, second.high))
    ]
    low, high = ends if None not in ends else (None, None)
    return Figure(first.value * second.value, low, high, n=first.n)


def measure_clips(options: BenchOptions, budget: Budget, progress: Progress) -> Outcome:
    """Measure all models that this device can run."""
    return run_stages(stages(options), options.device, budget, progress, "clips")


def stages(options: BenchOptions) -> list[Stage]:
    """What there is to measure, the most wanted first."""
    device, out = options.device, options.out

    def stage(model: FullSize, dtype: torch.dtype, *steps: Step, name: str = "") -> Stage:
        build = functools.partial(build_full_size, model, device, dtype)
        return Stage(f"{model.name} {_KINDS[dtype]}{name}", _BUILD, build, steps)

    def several(model: FullSize, dtype: torch.dtype) -> list[Step]:
        stem = stem_of(model, dtype)
        return [
            Step(f"{stem}: a clip, ours and stock", 45.0, against_usual),
            Step(f"{stem}: same bits run to run", 10.0, determinism),
            Step(f"{stem}: as many clips as fit, ours", 60.0, largest_ours),
            Step(f"{stem}: as many clips as fit, stock", 60.0, largest_stock),
        ]

    headline = stem_of(ANIMATEDIFF, _HEADLINE)
    where_time_goes = functools.partial(profile, folder=out)
    main = [
        Step(f"{headline}: a clip, ours and stock", 45.0, against_usual),
        Step(f"{headline}: a clip, ours compiled", _COMPILE, ours_compiled),
        Step(f"{headline}: where time goes", 20.0, where_time_goes),
        Step(f"{headline}: stock with cuDNN attention, channels last", 45.0, against_cudnn),
        Step(f"{headline}: stock with torch.compile", _COMPILE, against_compiled),
        *(
            Step(f"{headline}: {count} clips", 30.0, functools.partial(together, count=count))
            for count in BATCHES
        ),
    ]
    small = [
        Step("embedded: a clip", 10.0, one_clip),
        Step("embedded: same bits run to run", 5.0, determinism),
        Step("embedded: eight clips", 15.0, functools.partial(together, count=8)),
    ]

    def batches(model: FullSize, dtype: torch.dtype, *counts: int) -> list[Step]:
        return [
            Step(
                f"{stem_of(model, dtype)}: {count} clips, ours compiled",
                _COMPILE,
                functools.partial(compiled_together, count=count),
            )
            for count in counts
        ]

    if options.quick:
        main, small = main[:1], small[:1]
    late = " compiled"  # what compiles takes minutes, so all of it but the headline comes last
    return [
        Stage("embedded", 10.0, functools.partial(build_embedded, device), small, gpu=False),
        stage(ANIMATEDIFF, _HEADLINE, *main),
        stage(ZEROSCOPE, torch.float16, *several(ZEROSCOPE, torch.float16)),
        stage(ANIMATEDIFF, torch.float16, *several(ANIMATEDIFF, torch.float16)),
        stage(ANIMATEDIFF, _HEADLINE, *batches(ANIMATEDIFF, _HEADLINE, *BATCHES), name=late),
        stage(ZEROSCOPE, torch.float16, *batches(ZEROSCOPE, torch.float16, 1), name=late),
    ]


def stem_of(model: FullSize, dtype: torch.dtype) -> str:
    """The first words of a model's figures; those of the headline's type are left out."""
    kind = "" if dtype == _HEADLINE else f".{_KINDS[dtype]}"
    return f"gpu.{model.name}{kind}"


def build_full_size(model: FullSize, device: str, dtype: torch.dtype) -> Bench:
    """A full-size model on a device."""
    return Bench(full_size_subject(model, device, dtype), stem_of(model, dtype))


def build_embedded(device: str) -> Bench:
    """The embedded model, in float32; on a CPU its figures say so."""
    kind = "gpu" if device.startswith("cuda") else "cpu"
    subject = embedded_subject(device, transfer_pairs(1)[0].reference())
    return Bench(subject, f"{kind}.embedded")


def one_clip(bench: Bench) -> dict[str, Figure]:
    """Seconds of one clip of ours, and its peak memory."""
    requests = bench.subject.resolve(bench.subject.requests(1, steps=bench.steps))
    taken, peak = timed(lambda: bench.subject.clips(requests), _REPEATS, bench.subject.device)
    found = {f"{bench.stem}.seconds_per_clip": seconds_figure(taken, _REPEATS)}
    return found | _memory(bench, "peak", peak)


def together(bench: Bench, *, count: int) -> dict[str, Figure]:
    """Seconds a clip and peak memory of several that are sampled together, run eagerly."""
    return sampled_together(bench, f"batch_{count}", count, _run_of(bench.subject))


def compiled_together(bench: Bench, *, count: int) -> dict[str, Figure]:
    """The same, compiled; what it takes to compile is left out."""
    with compiled(bench.subject) as subject:
        return sampled_together(bench, f"compiled.batch_{count}", count, _run_of(subject))


def _run_of(subject: Subject) -> Callable[[int, int], object]:
    return lambda count, steps: subject.clips(subject.resolve(subject.requests(count, steps=steps)))


def against_usual(bench: Bench) -> dict[str, Figure]:
    """A clip of ours and of the stock pipeline as it comes, in turn; then ours by its stages."""
    found = against(bench, "stock", Stock(bench.subject))
    subject = bench.subject
    latents, *_ = subject.sample(subject.resolve(subject.requests(1, steps=1)))
    decoded, _ = timed(lambda: subject.engine.decode(latents, 8.0), 1, subject.device)
    found |= bench.figure("decode_seconds", decoded.p50, "s", n=1)
    return found | stages_of(bench, "eager", subject)


def stages_of(bench: Bench, way: str, subject: Subject) -> dict[str, Figure]:
    """A step of one way of ours, its memory, and how far it is from what the GPU can do."""
    requests = subject.resolve(subject.requests(1, steps=bench.steps))
    steps, peak = timed(lambda: subject.sample(requests), 1, subject.device)
    a_step = steps.p50 / bench.steps
    found = bench.figure(f"{way}.milliseconds_per_step", 1e3 * a_step, "ms", n=1)
    found |= _memory(bench, f"{way}.sampling_peak", peak)
    if subject.flops:
        kind = _KINDS.get(subject.dtype, "fp32")
        rate = Machine(str(subject.device)).roof([kind]).flops_per_second[kind]
        flush_buffer.cache_clear()  # which would count as memory of the next clip
        found |= bench.figure(f"{way}.useful_tflops", subject.flops / a_step / 1e12, "TFLOP/s")
        found |= bench.figure(f"{way}.share_of_roof", subject.flops / a_step / rate)
        found |= bench.figure(f"{way}.share_of_floor", subject.flops / a_step / H200_RATE)
    return found


def ours_compiled(bench: Bench) -> dict[str, Figure]:
    """A clip of ours compiled and one run eagerly, in turn; then the compiled one by its stages."""
    with compiled(bench.subject) as subject:
        requests = subject.resolve(subject.requests(1, steps=bench.steps))

        def eager() -> None:
            with eagerly(subject):
                subject.clips(requests)

        device = subject.device
        synchronise(device)
        began = time.perf_counter()
        subject.sample(subject.resolve(subject.requests(1, steps=1)))
        synchronise(device)
        found = bench.figure("compiled.first_step_seconds", time.perf_counter() - began, "s", n=1)
        peak = peak_of(lambda: subject.clips(requests), device)
        ratio = time_ratio(
            eager, lambda: subject.clips(requests), repeats=_REPEATS, warmup=0, device=str(device)
        )
        found |= stages_of(bench, "compiled", subject)
        found |= bench.figure("compiled.compilations", compilations(subject))
    bench.speedup = ratio.figure
    bench.seconds["compiled"] = seconds_figure(ratio.baseline, _REPEATS)
    found[f"{bench.stem}.compiled.seconds_per_clip"] = bench.seconds["compiled"]
    found[f"{bench.stem}.speedup_by_compiling"] = bench.speedup
    return found | _memory(bench, "compiled.peak", peak) | bench.best()


def against_cudnn(bench: Bench) -> dict[str, Figure]:
    """The same against stock with cuDNN's attention and channels last."""
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]

    @contextmanager
    def tuned() -> Iterator[None]:
        checkpoint = bench.subject.engine.checkpoint
        parts: tuple[nn.Module, ...] = (checkpoint.unet, checkpoint.vae)
        for part in parts:
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        try:
            with sdpa_kernel(order, set_priority=True):
                yield
        finally:
            for part in parts:
                part.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    return against(bench, "stock_cudnn", Stock(bench.subject), tuned)


def against_compiled(bench: Bench) -> dict[str, Figure]:
    """The same against stock whose network is compiled as a whole."""
    network = torch.compile(bench.subject.engine.checkpoint.unet, dynamic=False)
    try:
        return against(bench, "stock_compiled", Stock(bench.subject, network))
    finally:
        torch.compiler.reset()


def against(
    bench: Bench, way: str, stock: Stock, around: Callable[[], Any] = nullcontext
) -> dict[str, Figure]:
    """A clip of ours and one of a stock way, timed in turn.

    Args:
        bench: what is measured.
        way: what the stock way's figures are called.
        stock: it.
        around: what it needs around it.
    """
    subject = bench.subject
    requests = subject.resolve(subject.requests(1, steps=bench.steps))
    peaks: dict[str, int] = {}

    def ours() -> None:
        subject.clips(requests)

    def theirs() -> None:
        with around():
            stock.clips(1, steps=bench.steps)

    for name, call in {"ours": ours, way: theirs}.items():
        peaks[name] = peak_of(call, subject.device)
    ratio = time_ratio(theirs, ours, repeats=_REPEATS, warmup=0, device=str(subject.device))
    bench.ratios[way] = ratio.figure
    bench.seconds["eager"] = seconds_figure(ratio.baseline, _REPEATS)
    found = {
        f"{bench.stem}.eager.seconds_per_clip": bench.seconds["eager"],
        f"{bench.stem}.{way}.seconds_per_clip": seconds_figure(ratio.ours, _REPEATS),
        f"{bench.stem}.eager.ratio_to_{way}": ratio.figure,
    }
    found |= _memory(bench, "eager.peak", peaks["ours"])
    return found | _memory(bench, f"{way}.peak", peaks[way]) | bench.best()


def determinism(bench: Bench) -> dict[str, Figure]:
    """Whether the same request gives the same bits again: 1 or 0."""
    subject = bench.subject
    requests = subject.resolve(subject.requests(1, steps=bench.steps))
    first, second = (subject.sample(requests)[0] for _ in range(2))
    return bench.figure("same_bits", float(torch.equal(first, second)), n=2)


def largest_ours(bench: Bench) -> dict[str, Figure]:
    """As many clips together as fit, ours."""
    return largest(bench, "batch", _run_of(bench.subject))


def largest_stock(bench: Bench) -> dict[str, Figure]:
    """As many clips together as fit the stock pipeline."""
    stock = Stock(bench.subject)
    return largest(bench, "stock_batch", lambda count, steps: stock.clips(count, steps=steps))


def largest(bench: Bench, word: str, run: Callable[[int, int], object]) -> dict[str, Figure]:
    """Double the batch until one step of it does not run; then time the last one that did.

    Args:
        bench: what is measured.
        word: of the figures.
        run: so many clips of so many steps.
    """
    device = bench.subject.device
    count = 1
    while count < MOST and runs(functools.partial(run, 2 * count, 1), device):
        count *= 2
    return bench.figure(f"{word}.clips", count) | sampled_together(bench, word, count, run)


def sampled_together(
    bench: Bench, word: str, count: int, run: Callable[[int, int], object]
) -> dict[str, Figure]:
    """Seconds a clip, milliseconds a step of all of them, and peak memory; see `largest`."""
    device = bench.subject.device
    short, _ = timed(lambda: run(count, 1), 1, device)
    whole, peak = timed(lambda: run(count, 1 + PART_STEPS), 1, device)
    a_step = (whole.p50 - short.p50) / PART_STEPS
    seconds = short.p50 + (bench.steps - 1) * a_step
    found = bench.figure(f"{word}.seconds_per_clip", seconds / count, "s", n=1)
    found |= bench.figure(f"{word}.milliseconds_per_step", 1e3 * a_step, "ms", n=1)
    return found | _memory(bench, f"{word}.peak", peak)


def runs(call: Callable[[], object], device: torch.device) -> bool:
    """Whether it runs; memory may run out, and stock kernels refuse large launches."""
    try:
        call()
        synchronise(device)
    except (RuntimeError, KinetiqError) as error:
        print(f"bench gpu: the next larger batch does not run: {error}"[:300])  # noqa: T201
        return False
    finally:
        free_memory(str(device))
    return True


def profile(bench: Bench, folder: Path | None) -> dict[str, Figure]:
    """Where the GPU's time goes in two steps: a table in the folder, and the share of the top."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    subject = bench.subject
    requests = subject.resolve(subject.requests(1, steps=2))
    subject.sample(requests)
    with profiling(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        subject.sample(requests)
        synchronise(subject.device)
    events = profiler.key_averages()
    kernels = [event for event in events if event.self_device_time_total > 0]
    total = sum(event.self_device_time_total for event in kernels)
    if not total:
        raise WorkError("bench gpu: the profiler must see kernels, saw none; is CUPTI there?")
    if folder is not None:
        table = events.table(
            sort_by="self_device_time_total", row_limit=_PROFILED, max_name_column_width=90
        )
        write_text(folder / "profile.txt", table, "bench gpu")
    top = max(event.self_device_time_total for event in kernels)
    return bench.figure("longest_kernel_share", top / total, n=1)


def timed(call: Callable[[], object], repeats: int, device: torch.device) -> tuple[Timing, int]:
    """Seconds of a call after one that is not timed, and the peak of that one in bytes."""
    peak = peak_of(call, device)
    taken = []
    for _ in range(repeats):
        synchronise(device)
        began = time.perf_counter()
        call()
        synchronise(device)
        taken.append(time.perf_counter() - began)
    quantiles = torch.tensor(taken, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return Timing(*quantiles.tolist()), peak


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Bytes of GPU memory in use at most during a call, weights included; 0 on a CPU."""
    if device.type != "cuda":
        call()
        return 0
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device)


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_figure(timing: Timing, n: int) -> Figure:
    """The median, with the spread of the rounds in the place of an interval."""
    return Figure(timing.p50, timing.p20, timing.p80, n=n, unit="s")


def _memory(bench: Bench, name: str, peak: int) -> dict[str, Figure]:
    return bench.figure(f"{name}_memory", peak / _GIB, "GiB") if peak else {}
