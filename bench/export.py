"""What export costs, and whether and how fast exported networks run, all on a CPU.

The embedded model generates the same clips on every runtime: a plain one, one under each injection,
and a batch in which all differ. In float32 the error of its latents against eager PyTorch counts;
in narrower types the same over the error that eager PyTorch makes in that type. A step is timed in
turn with eager PyTorch of the same precision, once its result is seen to be right: of the embedded
network for a clip with guidance, of the full-size one for a single row of 8 frames of 256x256. Both
take one thread, and then two; a figure without a number of threads is the worse of the two.

Everything runs on the CPU, whatever the device. The full-size network takes 5.3 GB in a temporary
folder, and in float32 about four times as much memory; of the runtimes one at a time is loaded.
Engines of TensorRT for RTX are built where it is installed, for GPUs that need not be here.
"""

import contextlib
import functools
import gc
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from kinetiq.backends import EAGER
from kinetiq.bench.figures import Figure
from kinetiq.bench.harness import Bench, BenchOptions, Progress
from kinetiq.bench.measure import TimeRatio, peak_memory, time_ratio
from kinetiq.bench.subjects import (
    ANIMATEDIFF,
    FullSize,
    full_size_subject,
    require_as_good,
)
from kinetiq.checkpoint import Checkpoint, load_checkpoint
from kinetiq.clip import Clip
from kinetiq.denoiser import NO_CONTROLS, Denoiser, EagerDenoiser
from kinetiq.engine import Engine
from kinetiq.errors import WorkError
from kinetiq.export.check import installed_runtimes
from kinetiq.export.engine_rtx import PACKAGE as RTX
from kinetiq.export.engine_rtx import build_rtx_engine
from kinetiq.export.loading import load_denoiser
from kinetiq.export.network import ExportedNetwork, export_onnx
from kinetiq.export.onnxruntime_denoiser import OnnxruntimeDenoiser
from kinetiq.export.openvino_denoiser import OpenvinoDenoiser
from kinetiq.families import FAMILIES
from kinetiq.motion_injection import MotionInjection
from kinetiq.query_injection import QueryInjection
from kinetiq.request import Request
from kinetiq.sprites.cases import transfer_pairs
from kinetiq.text import encode_prompts

RUNTIMES: dict[str, Callable[[Path], Denoiser]] = {
    "onnxruntime": OnnxruntimeDenoiser,
    "openvino": OpenvinoDenoiser,
}
WORDS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
FUSED_IN = ("float16", "bfloat16")  # in float32 no attention is one kernel
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_120")
FULL_SIZE = replace(ANIMATEDIFF, frames=8, height=256, width=256)
_FULL_SIZE_IN = ("float32", "bfloat16")
_FULL_SIZE_REPEATS = 3  # pairs, of which each takes up to a minute
_THREADS = (1, 2)
_PROMPT = "a red circle"
_TIMESTEP = 500
_GIGABYTE = 1e9
_FULL_SIZE_TARGET = "sm_89"
_NETWORK = "network.onnx"
_SECONDS = "seconds"  # file in which a measured process leaves its time
_BUILT = "built.json"  # file in which a build leaves seconds, fused attentions, and all of them


@dataclass(frozen=True)
class Sample:
    """How much is measured.

    Args:
        precisions: of the embedded network, float32 first.
        steps: of each clip; None: the model's own.
        repeats: of the timing.
        whole: also the engines for GPUs and the full-size network.
    """

    precisions: tuple[str, ...]
    steps: int | None
    repeats: int
    whole: bool


FULL = Sample(tuple(WORDS), None, repeats=9, whole=True)
QUICK = Sample(("float32",), 3, repeats=3, whole=False)


@dataclass(frozen=True, eq=False)
class Step:
    """Inputs of one prediction, in float32.

    Args:
        latents: [rows, channels, frames, h, w].
        text: [rows, tokens, width].
    """

    latents: Tensor
    text: Tensor

    def predict(self, denoiser: Denoiser, precision: str) -> Tensor:
        """What a network of this precision makes of them, in its type."""
        dtype: torch.dtype = getattr(torch, precision)
        timesteps = torch.full((len(self.latents),), _TIMESTEP)
        with torch.inference_mode():
            return denoiser.predict(
                self.latents.to(dtype), timesteps, self.text.to(dtype), NO_CONTROLS
            )


@dataclass(frozen=True, eq=False)
class Answers:
    """What an engine makes of the clips and of the step.

    Args:
        latents: of each clip.
        prediction: of the step.
    """

    latents: list[Tensor]
    prediction: Tensor


def measure(options: BenchOptions, progress: Progress) -> dict[str, Figure]:
    """Measure the embedded model, then engines for GPUs, then the full-size network."""
    sample = QUICK if options.quick else FULL
    figures: dict[str, Figure] = {}
    with TemporaryDirectory(prefix="kinetiq-") as name:
        folder = Path(name)
        figures |= embedded_figures("sprites", sample, folder, progress)
        if sample.whole and importlib.util.find_spec(RTX) is not None:
            figures |= fused_figures(folder, progress)
    if sample.whole:
        figures |= full_size_cost(FULL_SIZE)
        figures |= full_size_figures(FULL_SIZE, progress)
    return figures


def embedded_figures(
    source: str | Path, sample: Sample, folder: Path, progress: Progress
) -> dict[str, Figure]:
    """Seconds of the export, and errors and step times of all runtimes.

    The exports stay in `folder` under `network_file`.

    Args:
        source: of the model.
        sample: how much is measured.
        folder: for the exports.
        progress: shows the precisions.

    Raises:
        WorkError: a step on a runtime is not right.
    """
    figures: dict[str, Figure] = {}
    batches = make_batches(transfer_pairs(1)[0].reference(), sample.steps)
    with load_engine(source, "float32") as engine:
        step = embedded_step(engine)
    exact: Answers | None = None
    for precision in progress.track(sample.precisions, "embedded"):
        network = network_file(folder, precision)
        with load_engine(source, precision) as eager:
            seconds = time_export(eager, network)
            if exact is None:
                figures["export.seconds"] = Figure(seconds, n=1, unit="s")
            usual = answer(eager, batches, step)
            exact = usual if exact is None else exact
            for runtime in supported_runtimes(precision):
                name = f"{runtime}_{WORDS[precision]}"
                with load_engine(source, precision, runtime, network) as engine:
                    ours = answer(engine, batches, step)
                figures |= error_figures(name, ours, usual, exact)
                trial = Trial(
                    name,
                    functools.partial(RUNTIMES[runtime], network),
                    eager.denoiser,
                    step,
                    precision,
                    usual.prediction,
                    exact.prediction,
                )
                figures |= trial.figures("export.embedded", sample.repeats)
    return figures


def load_engine(
    source: str | Path, precision: str, backend: str = EAGER, network: Path | None = None
) -> Engine:
    """A model on a CPU, in float16 too, which `Engine.load` refuses there."""
    checkpoint = load_checkpoint(source, dtype=precision, half_on_cpu=True)
    if backend == EAGER:
        return Engine(checkpoint, EagerDenoiser(checkpoint.unet).attach())
    denoiser = load_denoiser(backend, checkpoint, network=network)
    return Engine(checkpoint, denoiser, backend=backend)


def network_file(folder: Path, precision: str) -> Path:
    """Where the embedded network of a precision lies."""
    return folder / f"embedded-{WORDS[precision]}.onnx"


def make_batches(reference: Clip, steps: int | None) -> list[list[Request]]:
    """Clips of one prompt that are generated together, batch by batch."""
    controls = (None, QueryInjection(reference), MotionInjection(reference))

    def clip(seed: int, control: Any) -> Request:
        return Request(_PROMPT, control, seed=seed, steps=steps)

    alone = [[clip(0, control)] for control in controls]
    return [*alone, [clip(seed, control) for seed, control in enumerate(controls, 1)]]


def embedded_step(engine: Engine) -> Step:
    """The inputs of a step of one clip with guidance, at the model's own size."""
    defaults, scale = engine.defaults, engine.vae_scale
    channels = engine.checkpoint.unet.config.in_channels
    shape = channels, defaults.frames, defaults.height // scale, defaults.width // scale
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    text = encode_prompts(engine.checkpoint, [_PROMPT, ""])
    return Step(torch.stack([latents, latents]), text)


def answer(engine: Engine, batches: Sequence[Sequence[Request]], step: Step) -> Answers:
    """Generate the clips and predict the step."""
    latents = [clip for batch in batches for clip in engine.generate_latents(batch)]
    precision = str(engine.checkpoint.dtype).removeprefix("torch.")
    return Answers(latents, step.predict(engine.denoiser, precision))


def error_figures(name: str, ours: Answers, usual: Answers, exact: Answers) -> dict[str, Figure]:
    """The error of ours in float32; else the same over that of eager PyTorch in the type.

    Raises:
        WorkError: eager PyTorch makes no error in a narrower type, which nothing can be.
    """
    error, clips = worst_error(ours.latents, exact.latents), len(exact.latents)
    if usual is exact:
        return {f"export.{name}.latent_error": Figure(error, n=clips)}
    allowed = worst_error(usual.latents, exact.latents)
    if not allowed > 0:
        raise WorkError(f"bench export: eager must err in the type of {name}, errs {allowed}")
    return {f"export.{name}.error_ratio": Figure(error / allowed, n=clips)}


def worst_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest distance from what is exact, by its largest value; the worst of all clips."""
    errors = [
        (one.double() - other.double()).abs().max() / other.double().abs().max()
        for one, other in zip(got, exact, strict=True)
    ]
    return float(torch.stack(errors).max())  # not a number where one is not


def supported_runtimes(precision: str) -> tuple[str, ...]:
    """The runtimes that run a precision on a CPU; those that do not are named as left out."""
    found = installed_runtimes(precision)
    for name in RUNTIMES:
        if name not in found:
            print(f"bench export: {name} is left out, since it runs no {precision} on a CPU")  # noqa: T201  goes to standard error
    return found


@dataclass(frozen=True, eq=False)
class Trial:
    """A step on a runtime, against eager PyTorch of the same precision.

    Args:
        name: of the runtime and the precision.
        open: makes the runtime's denoiser, with as many threads as PyTorch has then.
        eager: has run before.
        step: that is timed.
        precision: of both.
        usual: what eager makes of it.
        exact: what eager makes of it in float32.
    """

    name: str
    open: Callable[[], Denoiser]
    eager: Denoiser
    step: Step
    precision: str
    usual: Tensor
    exact: Tensor

    def figures(self, prefix: str, repeats: int) -> dict[str, Figure]:
        """The ratio for each number of threads, and the worst of them.

        Raises:
            WorkError: the step is not right.
        """
        ratios = {count: self._ratio(count, repeats) for count in thread_counts()}
        worst = max(ratios.values(), key=lambda ratio: ratio.ratio)
        return {
            f"{prefix}.{self.name}.ratio": worst.figure,
            **{
                f"{prefix}.threads_{count}.{self.name}.ratio": ratio.figure
                for count, ratio in ratios.items()
            },
        }

    def _ratio(self, threads: int, repeats: int) -> TimeRatio:
        with using_threads(threads):
            denoiser = self.open()
            ours = self.step.predict(denoiser, self.precision)
            require_as_good(self.name, ours, self.usual, self.exact)
            return time_ratio(
                functools.partial(self.step.predict, denoiser, self.precision),
                functools.partial(self.step.predict, self.eager, self.precision),
                repeats=repeats,
                warmup=0,
            )


def thread_counts() -> tuple[int, ...]:
    """Numbers of threads that are measured, those that the machine has cores for."""
    return tuple(count for count in _THREADS if count <= (os.cpu_count() or 1))


@contextlib.contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Inside, PyTorch has this number of threads, and what is compiled then as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fused_figures(folder: Path, progress: Progress) -> dict[str, Figure]:
    """Attentions of the embedded network that are one kernel, over all; the worse of two types.

    Args:
        folder: where `embedded_figures` left the exports.
        progress: shows the targets.

    Raises:
        WorkError: the build does not say how many attentions it fused.
    """
    figures = {}
    for target in progress.track(TARGETS, "engines"):
        shares = []
        for precision in FUSED_IN:
            path = folder / f"{target}-{precision}.engine"
            record = build_rtx_engine(network_file(folder, precision), path, target=target).record
            shares.append(_fused_share(record.fused, record.attentions, f"{target} in {precision}"))
            path.unlink()
        figures[f"export.attentions_fused.{target}"] = Figure(min(shares), n=len(shares))
    return figures


def _fused_share(fused: int | None, attentions: int, what: str) -> float:
    if fused is None or not attentions:
        raise WorkError(
            f"bench export: the build for {what} must say how many of its attentions are fused, "
            f"got {fused} of {attentions}"
        )
    return fused / attentions


def full_size_cost(model: FullSize) -> dict[str, Figure]:
    """Seconds and memory of an export in float16, and of an RTX's engine that is built from it.

    Each happens in a process of its own, whose whole peak counts.
    """
    with TemporaryDirectory(prefix="kinetiq-") as name:
        folder = Path(name)
        memory = peak_memory(
            functools.partial(random_checkpoint, model.family, dict(model.config), torch.float16),
            functools.partial(_export_apart, folder),
        )
        seconds = float((folder / _SECONDS).read_text(encoding="ascii"))
        figures = {
            "export.full_size.seconds": Figure(seconds, n=1, unit="s"),
            "export.full_size.peak_gigabytes": Figure(memory.peak / _GIGABYTE, n=1, unit="GB"),
        }
        if importlib.util.find_spec(RTX) is not None:
            figures |= full_size_engine(folder)
    return figures


def full_size_engine(folder: Path) -> dict[str, Figure]:
    """What it takes to build an engine from the export in a folder, and its fused attentions.

    Raises:
        WorkError: the build failed, or does not say how many attentions it fused.
    """
    memory = peak_memory(functools.partial(Path, folder), _build_apart)
    seconds, fused, attentions = json.loads((folder / _BUILT).read_text(encoding="ascii"))
    share = _fused_share(fused, attentions, f"{_FULL_SIZE_TARGET} at full size")
    return {
        "export.full_size.engine_seconds": Figure(seconds, n=1, unit="s"),
        "export.full_size.engine_peak_gigabytes": Figure(memory.peak / _GIGABYTE, n=1, unit="GB"),
        "export.full_size.attentions_fused": Figure(share, n=attentions),
    }


def random_checkpoint(family: str, config: dict[str, Any], dtype: torch.dtype) -> Checkpoint:
    """A network of a family with random weights, and nothing beside it."""
    import diffusers

    torch.manual_seed(0)
    network = getattr(diffusers, FAMILIES[family].network)(**config)
    network.eval().requires_grad_(False)
    nn.Module.to(network, dtype)  # diffusers' own warns of layers that it has none of
    return Checkpoint(
        name=family,
        path=None,
        family=family,
        unet=network,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        scheduler="DDIMScheduler",
        scheduler_config=MappingProxyType({}),
        identify=lambda: "random",
    )


def time_export(source: Checkpoint | Engine, path: Path) -> float:
    """Seconds of an export with all controls, the first use of its packages included."""
    began = time.perf_counter()
    export_onnx(source, path)
    return time.perf_counter() - began


def _export_apart(folder: Path, checkpoint: Checkpoint) -> None:
    seconds = time_export(checkpoint, folder / _NETWORK)
    (folder / _SECONDS).write_text(str(seconds), encoding="ascii")


def _build_apart(folder: Path) -> None:
    began = time.perf_counter()
    record = build_rtx_engine(
        folder / _NETWORK, folder / "network.engine", target=_FULL_SIZE_TARGET
    ).record
    said = [time.perf_counter() - began, record.fused, record.attentions]
    (folder / _BUILT).write_text(json.dumps(said), encoding="ascii")


def full_size_figures(model: FullSize, progress: Progress) -> dict[str, Figure]:
    """Step times of all runtimes against eager PyTorch of the same precision.

    Raises:
        WorkError: a step on a runtime is not right.
    """
    figures: dict[str, Figure] = {}
    exact: Tensor | None = None
    for precision in progress.track(_FULL_SIZE_IN, "full size"):
        with TemporaryDirectory(prefix="kinetiq-") as folder:
            found, usual = _full_size_ratios(model, precision, Path(folder), exact)
        figures |= found
        exact = usual if exact is None else exact
        gc.collect()  # networks refer to themselves, and the next one needs the room
    return figures


def _full_size_ratios(
    model: FullSize, precision: str, folder: Path, exact: Tensor | None
) -> tuple[dict[str, Figure], Tensor]:
    """The ratios of each runtime, and what eager PyTorch predicts."""
    subject = full_size_subject(model, "cpu", getattr(torch, precision))
    network: ExportedNetwork = export_onnx(subject.engine, folder / _NETWORK)
    eager, step = subject.engine.denoiser, _full_size_step(model)
    usual = step.predict(eager, precision)
    figures: dict[str, Figure] = {}
    for runtime in supported_runtimes(precision):
        trial = Trial(
            f"{runtime}_{WORDS[precision]}",
            functools.partial(RUNTIMES[runtime], network.path),
            eager,
            step,
            precision,
            usual,
            usual if exact is None else exact,
        )
        figures |= trial.figures("export", _FULL_SIZE_REPEATS)
        gc.collect()  # before the next one is loaded
    return figures, usual


def _full_size_step(model: FullSize) -> Step:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn((1, *model.latents), generator=generator)
    return Step(latents, torch.randn((1, *model.text), generator=generator))


BENCH = Bench(
    "export",
    "what an export costs, and exported networks against eager PyTorch on a CPU",
    measure,
    needs=("onnx", "onnxscript", "onnxruntime", "openvino"),
)
