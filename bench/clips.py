"""Seconds a clip and peak memory: AnimateDiff, ZeroScope and the embedded model.

A clip is guided, has 25 steps, is decoded by the VAE, and ends as bytes in the CPU's memory; what
happens once a prompt or a reference is left out, and so is compiling, whose seconds are a figure of
their own. Ours, run eagerly, and the stock pipeline of diffusers are timed in turn on the same
network and VAE, after a prediction of ours was compared with float32; so are ours compiled and ours
eagerly. Larger batches, for which 25 steps would take minutes, run 5 of them; their seconds are
those of 25 (five times the steps, and the VAE once).

`seconds_per_clip` and `ratio_to_stock_best` are of the better way of ours; those of one way have
its name before them. The ratio of ours compiled to stock is the product of the two that were timed
in turn, and to the best stock way there is one only once all of `STOCK_WAYS` were timed. Memory is
the most that PyTorch held during a clip: what lies in the pool of a CUDA graph counts as free in
what it says is in use. `gpu.animatediff.seconds_per_clip` is of bfloat16, where a figure of float16
has "fp16" in its name. `share_of_roof` is of the matrix rate that is measured beside it,
`share_of_floor` of the time that the operations take at 790 TFLOP/s, which an H200 was seen to
reach.
"""

import functools
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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
from kinetiq.bench.measure import Around, Timing, time_ratio
from kinetiq.bench.steps import (
    Budget,
    Found,
    Keep,
    Note,
    Outcome,
    Stage,
    Step,
    free_memory,
    in_short,
    lost,
    run_stages,
)
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
from kinetiq.generation import is_out_of_memory
from kinetiq.request import ResolvedRequest
from kinetiq.sprites.cases import transfer_pairs

STEPS = 25
PART_STEPS = 5  # of a larger batch
MOST = 16  # clips that are tried together: a step of all of them takes seconds
BATCHES = (4, 8)
H200_RATE = 790e12  # operations a second in bfloat16
_REPEATS = 3
_GIB = 2**30
_KINDS = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_HEADLINE = torch.bfloat16
STOCK_WAYS = ("stock", "stock_cudnn", "stock_compiled")
ELSEWHERE: Mapping[str, str] = {  # what the figures of a part leave open, and why
    "gpu.animatediff.fp16: stock with cuDNN attention, or anything compiled": (
        "the headline has these ways, in bfloat16"
    ),
    "gpu.zeroscope: bfloat16": "float16 is measured, which its weights are published in",
    "gpu.zeroscope: stock with cuDNN attention, or compiled": "the headline has the stock ways",
    "gpu.zeroscope: 4 and 8 clips": "as many as fit are measured",
}
_BUILD = 45.0
_COMPILE = 130.0  # a full-size network, and clips of it
_PROFILED = 30  # lines of the profiler's table
_PROFILED_STEPS = 2
_OURS = ("query_attention", "frame_attention", "temporal_block", "guided_step")
_GROUPS: Mapping[str, tuple[str, ...]] = {  # words in names of kernels, the first that fits
    **{f"our_{name}": (f"_{name}_kernel",) for name in _OURS},
    # Before convolutions: Inductor names what it fuses after the operators around it.
    "pointwise_and_norm": ("triton_poi", "triton_red", "triton_per"),
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "convolution": ("conv", "fprop", "dgrad"),
    "copies": ("memcpy", "memset", "copy_kernel", "catarray", "nchwtonhwc", "nhwctonchw"),
    "matrix": ("gemm", "nvjet", "cutlass", "cublas", "splitk", "triton_tem"),
    "stock_pointwise_and_norm": ("elementwise", "norm", "reduce", "softmax"),
}


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
        if self.ratios.keys() >= set(STOCK_WAYS):  # else the best of them may not be among these
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


def measure_clips(
    options: BenchOptions, budget: Budget, progress: Progress, keep: Keep = lambda *_: None
) -> Outcome:
    """Measure all models that this device can run."""
    outcome = run_stages(stages(options), options.device, budget, progress, "clips", keep)
    if options.device.startswith("cuda"):
        for name, why in ELSEWHERE.items():
            outcome.leave_out([name], f"not part of the bench: {why}")
    stem = stem_of(ANIMATEDIFF, _HEADLINE)
    missing = [w for w in STOCK_WAYS if f"{stem}.eager.ratio_to_{w}" not in outcome.figures]
    if missing and len(missing) < len(STOCK_WAYS):
        why = f"needs all stock ways, {', '.join(missing)} was not timed"
        outcome.leave_out([f"{stem}.ratio_to_stock_best"], why)
    return outcome


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
            Step(f"{stem}: as many clips as fit, ours", 130.0, largest_ours),
            Step(f"{stem}: as many clips as fit, stock", 130.0, largest_stock),
        ]

    headline = stem_of(ANIMATEDIFF, _HEADLINE)
    main = [
        Step(f"{headline}: a clip, ours and stock", 45.0, against_usual),
        Step(
            f"{headline}: a clip, ours compiled, and where its time goes",
            _COMPILE + 20.0,
            functools.partial(ours_compiled, folder=out),
        ),
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
        stage(ANIMATEDIFF, _HEADLINE, *main),
        Stage("embedded", 10.0, functools.partial(build_embedded, device), small, gpu=False),
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
        subject.check(subject.engine.denoiser, count)
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


def ours_compiled(bench: Bench, folder: Path | None = None) -> Iterator[Found]:
    """A clip of ours compiled and one run eagerly, in turn; then the compiled one by its stages.

    Then where its time goes; what the profiler saw goes into the folder.
    """
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
        subject.check(subject.engine.denoiser, 1)
        found |= bench.figure("compiled.same_bits", same_bits(subject, requests), n=2)
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
        yield found | _memory(bench, "compiled.peak", peak) | bench.best()
        if device.type == "cuda":
            yield profile(bench, subject, folder)


def against_cudnn(bench: Bench) -> dict[str, Figure]:
    """The same against stock with cuDNN's attention and channels last."""
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]

    stock = Stock(bench.subject)

    @contextmanager
    def tuned() -> Iterator[None]:
        checkpoint = bench.subject.engine.checkpoint
        parts: tuple[nn.Module, ...] = (checkpoint.unet, checkpoint.vae)
        for part in parts:
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        try:
            with stock.borrowing(), sdpa_kernel(order, set_priority=True):
                yield
        finally:
            for part in parts:
                part.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    return against(bench, "stock_cudnn", stock, tuned)


def against_compiled(bench: Bench) -> dict[str, Figure]:
    """The same against stock whose network is compiled as a whole."""
    network = torch.compile(bench.subject.engine.checkpoint.unet, dynamic=False)
    try:
        return against(bench, "stock_compiled", Stock(bench.subject, network))
    finally:
        torch.compiler.reset()


def against(
    bench: Bench, way: str, stock: Stock, around: Around | None = None
) -> dict[str, Figure]:
    """A clip of ours and one of a stock way, timed in turn.

    Args:
        bench: what is measured.
        way: what the stock way's figures are called.
        stock: it.
        around: what is set up around it, untimed; our modules are out of its network inside.
    """
    subject = bench.subject
    around = around or stock.borrowing
    requests = subject.resolve(subject.requests(1, steps=bench.steps))
    theirs = stock.prepared(1, steps=bench.steps)

    def ours() -> object:
        return subject.clips(requests)

    # What compiles or tries algorithms does so at first, in memory that no later clip needs.
    subject.clips(subject.resolve(subject.requests(1, steps=1)))
    peaks = {"ours": peak_of(ours, subject.device)}
    with around():
        stock.prepared(1, steps=1)()
        peaks[way] = peak_of(theirs, subject.device)
    ratio = time_ratio(
        theirs,
        ours,
        repeats=_REPEATS,
        warmup=0,
        device=str(subject.device),
        around_ours=around,
    )
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
    return bench.figure("same_bits", same_bits(subject, requests), n=2)


def same_bits(subject: Subject, requests: list[ResolvedRequest]) -> float:
    """1 if the first clip comes out bit for bit the same twice, else 0."""
    first, second = (subject.sample(requests)[0] for _ in range(2))
    return float(torch.equal(first, second))


def largest_ours(bench: Bench) -> Iterator[Found]:
    """As many clips together as fit, ours."""
    return largest(bench, "batch", _run_of(bench.subject), does_not_fit)


def largest_stock(bench: Bench) -> Iterator[Found]:
    """As many clips together as the stock pipeline runs; its kernels refuse large launches too."""
    stock = Stock(bench.subject)

    def run(count: int, steps: int) -> object:
        return stock.clips(count, steps=steps)

    return largest(bench, "stock_batch", run, stock_refuses)


def largest(
    bench: Bench,
    word: str,
    run: Callable[[int, int], object],
    ends: Callable[[Exception], bool],
) -> Iterator[Found]:
    """Double the batch until one step of it does not run; then time the last one that did.

    Args:
        bench: what is measured.
        word: of the figures.
        run: so many clips of so many steps.
        ends: whether an error only says that a batch is too large.
    """
    device = bench.subject.device
    count = 1
    while count < MOST:
        if why := refusal(functools.partial(run, 2 * count, 1), device, ends):
            yield Note(f"{bench.stem}.{word}.clips", f"{2 * count} clips: {why}")
            break
        count *= 2
    else:
        yield Note(f"{bench.stem}.{word}.clips", f"{MOST} clips fit, and more are not tried")
    yield bench.figure(f"{word}.clips", count)
    yield sampled_together(bench, word, count, run)


def sampled_together(
    bench: Bench, word: str, count: int, run: Callable[[int, int], object]
) -> dict[str, Figure]:
    """Seconds a clip, milliseconds a step of all of them, and peak memory; see `largest`."""
    device = bench.subject.device
    # The first call may compile, which needs memory of its own: the peak is that of a later one.
    short, _ = timed(lambda: run(count, 1), 1, device)
    whole, peak = timed(lambda: run(count, 1 + PART_STEPS), 1, device)
    a_step = (whole.p50 - short.p50) / PART_STEPS
    seconds = short.p50 + (bench.steps - 1) * a_step
    found = bench.figure(f"{word}.seconds_per_clip", seconds / count, "s", n=1)
    found |= bench.figure(f"{word}.milliseconds_per_step", 1e3 * a_step, "ms", n=1)
    return found | _memory(bench, f"{word}.peak", peak)


def refusal(
    call: Callable[[], object], device: torch.device, ends: Callable[[Exception], bool]
) -> str:
    """Why a call does not run, empty if it does; errors that do not end a search are raised.

    Nor does one of a GPU that answers nothing any more: what was too large is not known then.
    """
    try:
        call()
        synchronise(device)
    except (RuntimeError, KinetiqError) as error:
        if not ends(error) or lost(str(device)):
            raise
        return in_short(error)
    finally:
        free_memory(str(device))
    return ""


def stock_refuses(error: Exception) -> bool:
    """Whether stock says that a batch is too large: by memory, or by a launch that is none.

    Any other error of CUDA is a fault, after which the GPU answers nothing more.
    """
    launch = ("invalid configuration argument", "invalid argument")
    return is_out_of_memory(error) or (
        isinstance(error, RuntimeError)
        and ("CUDA error" not in str(error) or any(words in str(error) for words in launch))
    )


def does_not_fit(error: Exception) -> bool:
    """Whether clips of ours were too many for the memory, by PyTorch's words or by ours."""
    return is_out_of_memory(error) or (isinstance(error, WorkError) and "must fit in" in str(error))


def profile(bench: Bench, subject: Subject, folder: Path | None) -> dict[str, Figure]:
    """Where the GPU's time goes in two steps: by groups of kernels, and the share of the top.

    Args:
        bench: what is measured.
        subject: the way of ours that is looked at.
        folder: for the trace and a table of kernels.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    requests = subject.resolve(subject.requests(1, steps=_PROFILED_STEPS))
    subject.sample(requests)
    with profiling(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        subject.sample(requests)
        synchronise(subject.device)
    events = profiler.key_averages()
    kernels = {event.key: event.self_device_time_total for event in events if _is_kernel(event)}
    total = sum(kernels.values())
    if not total:
        raise WorkError("bench gpu: the profiler must see kernels, saw none; is CUPTI there?")
    if folder is not None:
        table = events.table(
            sort_by="self_device_time_total", row_limit=_PROFILED, max_name_column_width=90
        )
        write_text(folder / "profile.txt", table, "bench gpu")
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    found = bench.figure("longest_kernel_share", max(kernels.values()) / total, n=1)
    for group, microseconds in by_group(kernels.items()).items():
        a_step = microseconds / 1e3 / _PROFILED_STEPS
        found |= bench.figure(f"profile.{group}.milliseconds_per_step", a_step, "ms", n=1)
    return found


def by_group(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Time of kernels by what they do, told by their names, the longest first."""
    found: dict[str, float] = {}
    for name, taken in kernels:
        lower = name.lower()
        fitting = (group for group, words in _GROUPS.items() if any(w in lower for w in words))
        group = next(fitting, "other")
        found[group] = found.get(group, 0.0) + taken
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _is_kernel(event: Any) -> bool:
    """Operators on the CPU, and ranges that were named, are charged with the time once more."""
    named = getattr(event, "is_user_annotation", False)
    return bool(event.device_type.name == "CUDA" and event.self_device_time_total > 0 and not named)


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
    """Bytes of GPU memory that PyTorch held at most during a call, weights included; 0 on a CPU.

    Activations of a captured graph lie in its pool and are not in use between replays nor within
    one, so bytes in use would leave them out.
    """
    if device.type != "cuda":
        call()
        return 0
    synchronise(device)
    gc.collect()
    torch.cuda.empty_cache()  # else what earlier calls have freed would count
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronise(device)
    return torch.cuda.max_memory_reserved(device)


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_figure(timing: Timing, n: int) -> Figure:
    """The median, with the spread of the rounds in the place of an interval."""
    return Figure(timing.p50, timing.p20, timing.p80, n=n, unit="s")


def _memory(bench: Bench, name: str, peak: int) -> dict[str, Figure]:
    return bench.figure(f"{name}_memory", peak / _GIB, "GiB") if peak else {}
