"""A plan: one prediction at fixed shapes, compiled once, and on a GPU captured and replayed.

A plan has a tensor for each input, and shares those of banks with other plans. A prediction copies
into them what changed, and runs what was compiled; on a GPU that is one CUDA graph, so that Python
and its guards are not run at all. All graphs of a denoiser take their memory from one pool: they
are replayed one after the other, and nothing but the output, which is copied out, has to survive a
replay.
"""

import contextlib
import gc
import logging
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import eval_frame

from kinetiq.attention import Signal
from kinetiq.control_tensors import ControlTensors
from kinetiq.errors import KinetiqError, MissingDependencyError, WorkError
from kinetiq.generation import is_out_of_memory
from kinetiq.plan_inputs import Path, PlanInput, build_controls, build_prompts

Compile = Callable[[torch.fx.GraphModule, list[Tensor]], Callable[..., Any]]
_WARM_UPS = 2  # before a capture: the first compiles and tunes, the second has its memory
_NO_COMPILER = ("InvalidCxxCompiler", "Failed to find C compiler", "CppCompileError")
_LOGS = {logging.Logger.info}  # diffusers says that it forces a size, which is no operation
_ADVICE = "load the model with backend='eager'"


@dataclass(eq=False)
class Compilations:
    """How often PyTorch compiled a graph of ours.

    It counts what Dynamo asks for and not what we expect, so a compilation too many is seen.
    """

    count: int = 0


@dataclass(eq=False)
class Compiler:
    """What Dynamo hands graphs to.

    Dynamo keeps it in a table of its own until `Plan.close`, so it knows no network.

    Args:
        compile: a back end of torch.compile.
        seen: counts.
    """

    compile: Compile
    seen: Compilations

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        """Compile a graph."""
        self.seen.count += 1
        return self.compile(graph, inputs)


class Plan:
    """One prediction at fixed shapes.

    Args:
        network: with our modules in it.
        signal: what these read.
        inputs: by path; see `kinetiq.plan_inputs`.
        text: tokens and width of the prompts, whose keys and values are among the inputs.
        compiler: of torch.compile.
        device: where the network is.
        pool: of CUDA graphs; None on a CPU.

    Raises:
        WorkError: it cannot be compiled or captured.
        MissingDependencyError: a compiler that this needs is not there.
        torch.OutOfMemoryError: memory ran out.
    """

    def __init__(
        self,
        network: Any,
        signal: Signal,
        inputs: Mapping[Path, PlanInput],
        *,
        text: tuple[int, int],
        compiler: Compiler,
        device: torch.device,
        pool: Any = None,
    ) -> None:
        self._inputs = inputs
        self._buffers = {path: kept.buffer for path, kept in inputs.items()}
        latents = self._buffers["latents",]
        self._network, self._signal, self._compiler = network, signal, compiler
        self._controls = build_controls(self._buffers)
        self._prompts = build_prompts(self._buffers)
        self._frames = latents.shape[2]
        # Only its shape is read, since the keys and values are there already.
        self._text = torch.zeros(latents.shape[0], *text, dtype=latents.dtype, device=device)
        # Dynamo keeps what it compiled, up to a limit, with the code object: each plan has its own.
        self._code = _predict.__code__.replace(co_name="plan")
        function = types.FunctionType(self._code, globals())
        self._run = torch.compile(function, fullgraph=True, dynamic=False, backend=compiler)
        self._captured: tuple[torch.cuda.CUDAGraph, Tensor] | None = None  # with its output
        self._device, self._pool = device, pool

    def prepare(self) -> None:
        """Compile, and on a GPU capture; see the class for what may go wrong."""
        before = self._compiler.seen.count
        try:
            with _passing_over_logs():
                if self._pool is None:
                    self._predict()
                else:
                    self._capture()
        except Exception as error:
            raise _explained(error, self.describe()) from error
        made = self._compiler.seen.count - before
        if not made:
            raise WorkError(
                f"compiled: torch.compile must be at work for {self.describe()}, and compiled "
                "nothing; unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE, or " + _ADVICE
            )
        if made > 1:
            raise WorkError(
                f"compiled: torch.compile must compile once for {self.describe()}, compiled {made} "
                f"times, so it takes something for new that is not; {_ADVICE}"
            )

    def run(self, inputs: Mapping[Path, Tensor], rows: int) -> Tensor:
        """The network's output for the first rows; inputs that are not given are zero."""
        for path, kept in self._inputs.items():
            kept.take(inputs.get(path))
        if self._captured is None:
            return self._predict()[:rows]
        graph, output = self._captured
        with torch.cuda.device(self._device):
            graph.replay()
            return output[:rows].clone()

    def close(self) -> None:
        """Let go of what was compiled, in Dynamo's tables too."""
        if self._captured is not None:
            self._captured[0].reset()
        self._captured = None
        eval_frame.reset_code(self._code)  # type: ignore[attr-defined]  # private: nothing public
        for key, known in list(eval_frame.cached_backends.items()):  # forgets but one plan's
            if getattr(known, "compiler_fn", known) is self._compiler:
                del eval_frame.cached_backends[key]
        del self._run

    def describe(self) -> str:
        """The plan in words."""
        rows, channels, frames, height, width = self._buffers["latents",].shape
        kinds = sorted(
            {str(path[0]) for path in self._buffers} - {"latents", "timesteps", "prompt"}
        )
        return (
            f"{rows} rows of {frames} frames of {channels}x{height}x{width} latents in "
            f"{self._buffers['latents',].dtype} with {', '.join(kinds) or 'no controls'}"
        )

    def _predict(self) -> Tensor:
        signal = self._signal
        signal.frames, signal.controls, signal.prompt_keys = (
            self._frames,
            self._controls,
            self._prompts,
        )
        try:
            out: Tensor = self._run(
                self._network,
                signal,
                self._buffers["latents",],
                self._buffers["timesteps",],
                self._text,
            )
        finally:
            signal.controls, signal.prompt_keys = ControlTensors(), None
            signal.before_temporal = {}
        return out

    def _capture(self) -> None:
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()  # of this device: the default one is that of the first
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    self._predict()
            torch.cuda.current_stream().wait_stream(stream)
            gc.collect()  # a graph that is collected during a capture breaks it
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
            ):
                output = self._predict()
            self._captured = graph, output


def _predict(
    network: Any, signal: Signal, latents: Tensor, timesteps: Tensor, text: Tensor
) -> Tensor:
    """What is compiled: the network, whose modules read the signal."""
    signal.before_temporal = {}
    out: Tensor = network(latents, timesteps, text, return_dict=False)[0]
    signal.before_temporal = {}  # else what is written into it would be further outputs
    return out


@contextlib.contextmanager
def _passing_over_logs() -> Iterator[None]:
    """Inside, what a network logs is no operation to Dynamo.

    Before PyTorch 2.13 Dynamo's report on a compilation cannot be written with such a setting, and
    it logs that as an error, with a traceback that keeps the plan in memory.
    """
    logger = logging.getLogger("torch._dynamo.metrics_context")
    unwritten = _Unwritten()
    logger.addFilter(unwritten)
    try:
        with torch._dynamo.config.patch(ignore_logger_methods=_LOGS):  # noqa: SLF001  its name
            yield
    finally:
        logger.removeFilter(unwritten)


class _Unwritten(logging.Filter):
    """Drops what Dynamo logs of a report that is not valid JSON."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, TypeError) and "JSON serializable" in str(error))


def _explained(error: BaseException, plan: str) -> BaseException:
    """What went wrong in the words of our errors; running out of memory stays what it is."""
    for link in _chain(error):
        if isinstance(link, KinetiqError):
            return link
        if is_out_of_memory(link):
            return torch.OutOfMemoryError(str(link))
        said = f"{type(link).__name__}: {link}"
        if any(word in said for word in _NO_COMPILER):
            return MissingDependencyError(
                f"compiled: a working C++ compiler must be there for {plan}, got {_first(link)}; "
                f"install one, such as g++, or {_ADVICE}"
            )
    return WorkError(
        f"compiled: the network must compile for {plan}, got {_first(error)}; {_ADVICE}"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
