"""Engines of TensorRT and TensorRT for RTX as denoisers."""

import os
import warnings
import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kinetiq.errors import CheckpointError, KinetiqWarning, RequestError, WorkError
from kinetiq.export.denoiser import CHANNELS, GraphDenoiser
from kinetiq.export.engine_file import EngineFile, read_engine
from kinetiq.export.engine_log import make_log, says_no_room
from kinetiq.export.gpu import Gpu, describe_gpu
from kinetiq.export.nodes import KINDS
from kinetiq.export.packages import load_gpu_runtime

_BANKS = ("motion_slots", "lora_slots", "lora_rank")  # axes of what zeros can fill up
_GRAPHS = 2  # shapes whose launches are kept; each has its own memory for activations


def open_engine(
    path: str | os.PathLike[str],
    *,
    trust: str | Collection[str] = (),
    device: str | torch.device = "cuda",
    runtime: str | None = None,
    graphs: bool = True,
) -> "EngineDenoiser":
    """An engine as a denoiser, on the GPU that it was built for.

    Args:
        path: of the plan; its record lies beside it.
        trust: checksums that the caller vouches for; see `engine_file`.
        device: the GPU.
        runtime: what it must be for, "tensorrt" or "tensorrt-rtx"; None: either.
        graphs: whether launches are captured once for each shape and replayed.

    Raises:
        CheckpointError: the files are damaged, nobody vouches for them, or they were built for
            another runtime, version or GPU.
        MissingDependencyError: the runtime or a GPU is missing.
        RequestError: the device is not a GPU.
        WorkError: the runtime refuses the plan.
    """
    file, plan = read_engine(path, trust=trust)
    if runtime not in (None, file.record.runtime):
        raise CheckpointError(
            f"engine {file.path}: must be for {runtime}, got one for {file.record.runtime}"
        )
    place = torch.device(device)
    package = require_gpu(file.record.runtime, place, f"engine {file.path}")
    place = with_index(place)
    major, minor = torch.cuda.get_device_capability(place)
    check_engine(file, package.__version__, f"sm_{major}{minor}")
    say_what_is_slower(file, describe_gpu(place))
    return EngineDenoiser(file, plan, package, place, graphs=graphs)


def require_gpu(runtime: str, device: torch.device, where: str | None = None) -> Any:
    """The package of a runtime that can run on a device.

    Args:
        runtime: "tensorrt" or "tensorrt-rtx".
        device: a GPU.
        where: what the message of an error begins with; None: the runtime.

    Raises:
        MissingDependencyError: the package, or a GPU, is missing.
        RequestError: the device is not a GPU.
    """
    if device.type != "cuda":
        raise RequestError(f"{where or runtime}: the device must be a GPU, got {device}; name cuda")
    return load_gpu_runtime(
        runtime,
        where or runtime,
        "run the network on a CPU with backend='onnxruntime' or 'openvino'",
    )


def check_engine(file: EngineFile, version: str, architecture: str) -> None:
    """Require the runtime and the GPU that an engine was built for.

    Raises:
        CheckpointError: one of them is another.
    """
    record = file.record
    wrong = []
    if version != record.version:
        wrong.append(f"{record.runtime} {record.version}, got {version}")
    if architecture != record.target:
        wrong.append(f"a GPU of architecture {record.target}, got {architecture}")
    if wrong:
        raise CheckpointError(
            f"engine {file.path}: must run where it was built for, {' and '.join(wrong)}; build it "
            "here with `kinetiq export tensorrt`"
        )


def say_what_is_slower(file: EngineFile, gpu: Gpu) -> None:
    """Warn of an engine that may be slower than one for this GPU could be.

    Args:
        file: the engine.
        gpu: that it is to run on.
    """
    record = file.record
    if record.gpu not in (None, gpu):
        _say(
            f"engine {file.path}: was built on {record.gpu} and runs on {gpu}, where other kernels "
            "may be faster; build it here with `kinetiq export tensorrt`"
        )
    for operator, why in record.left_out.items():
        _say(
            f"engine {file.path}: {operator} runs function bodies in the place of our kernels, in "
            f"part or as a whole: {why}"
        )


def _say(what: str) -> None:
    warnings.warn(what, KinetiqWarning, stacklevel=4)


@dataclass(frozen=True)
class Bound:
    """A context that knows what it reads and writes.

    Args:
        context: of the engine, with the shapes and the addresses of the others.
        inputs: what it reads.
        outputs: what it writes.
        memory: for its activations.
    """

    context: Any
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    memory: Tensor


@dataclass(frozen=True)
class Captured:
    """The launches for inputs of one shape.

    Args:
        graph: of CUDA.
        bound: what the launches read and write, which must stay as it was captured.
        filled: what each input was last filled from, and its version then.
    """

    graph: Any
    bound: Bound
    filled: dict[str, tuple[weakref.ref[Tensor], int]] = field(default_factory=dict)

    def fill(self, given: Mapping[str, Tensor]) -> None:
        """Copy what is not there already; banks of motions are the same at every step."""
        for name, tensor in given.items():
            # Of a tensor of inference mode it cannot be known whether it was changed in place.
            version = -1 if tensor.is_inference() else tensor._version  # noqa: SLF001  no public way
            known, before = self.filled.get(name, (None, -1))
            if known is None or known() is not tensor or not before == version >= 0:
                self.bound.inputs[name].copy_(tensor)
                self.filled[name] = (weakref.ref(tensor), version)


class EngineDenoiser(GraphDenoiser):
    """A `kinetiq.denoiser.Denoiser` that is an engine.

    The engine reads its inputs from PyTorch's memory and writes into it; nothing is copied but
    what a captured graph must find at its own addresses. Memory for activations is PyTorch's too,
    as much as the shapes at hand take, so that a wide profile costs nothing until it is used.

    Args:
        file: what the plan is.
        plan: the engine.
        package: the runtime.
        device: where the engine runs.
        graphs: whether launches are captured and replayed.

    Raises:
        OutOfMemoryError: of PyTorch; the engine does not fit.
        WorkError: the runtime refuses the plan.
    """

    def __init__(
        self,
        file: EngineFile,
        plan: bytes,
        package: Any,
        device: torch.device,
        *,
        graphs: bool,
    ) -> None:
        super().__init__(file.record.network, file.record.runtime, with_index(device))
        self.file = file
        bounds = file.record.profile.bounds
        self.most_rows = bounds["rows"].most
        self.least = {axis: bounds[axis].least for axis in _BANKS if axis in bounds}
        self._outputs = {tensor.name: tensor for tensor in file.record.network.outputs}
        self._package = package
        self._log = make_log(package)
        self._context: Any = None  # of launches that are not captured, once there are any
        self._captured: dict[Any, Captured] | None = {} if graphs else None
        with _on(self.device):
            self._runtime = package.Runtime(self._log)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                raise self._failed(f"{file.record.runtime} must take the plan, and refuses it")

    def wanted(self, kinds: Collection[str]) -> frozenset[str]:
        """All that the engine was built with: its inputs are fixed."""
        return frozenset(self.metadata.controls).union(kinds)

    def advise_on(self, missing: Sequence[str]) -> str:
        """What to do where the engine was built without these kinds of control."""
        kept = self.metadata.controls
        if not set(missing) <= set(KINDS):
            return super().advise_on(missing)
        return (
            f"the engine was built with {', '.join(kept) or 'none'}; build one by `kinetiq export "
            f"tensorrt --controls {','.join((*kept, *missing))}` and name it, or load the model "
            "with backend='eager'"
        )

    def run(
        self,
        inputs: Mapping[str, Tensor],
        kinds: frozenset[str],  # noqa: ARG002  an engine has its kinds from when it was built
        output: str,
    ) -> Tensor:
        """One output; see `GraphDenoiser.run`.

        Raises:
            OutOfMemoryError: of PyTorch; the batch does not fit.
            ShapeError: an input is outside the engine's profile.
            WorkError: the engine failed.
        """
        given = dict(inputs)
        if CHANNELS in self._infos.keys() - given.keys():
            # An engine computes all its outputs, of which nobody reads this one.
            least = self.file.record.profile.bounds[CHANNELS].least
            given[CHANNELS] = torch.zeros(least, dtype=torch.int64, device=self.device)
        for name, tensor in given.items():
            self.file.record.profile.check(self._infos[name], tuple(tensor.shape))
        with _on(self.device):
            self._log.errors = []
            captured = self._captured_for(given)
            if captured is not None:
                captured.fill(given)
                captured.graph.replay()
                return captured.bound.outputs[output].clone()
            if self._context is None:
                self._context = self._make_context()
            bound = self._bind(self._context, given)
            self._launch(bound)
            return bound.outputs[output]

    def _captured_for(self, given: Mapping[str, Tensor]) -> Captured | None:
        """The launches for such inputs, captured now unless they are; None: they cannot be."""
        if self._captured is None:
            return None
        key = tuple((name, tuple(tensor.shape)) for name, tensor in given.items())
        captured = self._captured.pop(key, None)
        if captured is None:
            if len(self._captured) == _GRAPHS:
                del self._captured[next(iter(self._captured))]  # what was used longest ago
            bound = self._warm_up_with_room(given, self._captured)
            try:
                captured = Captured(self._capture(bound), bound)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, WorkError) as error:
                warnings.warn(
                    f"engine {self.file.path}: its launches cannot be captured in a CUDA graph, "
                    f"and are made one by one from now on: {error}",
                    KinetiqWarning,
                    stacklevel=2,
                )
                self._captured = None
                return None
        self._captured[key] = captured
        return captured

    def _warm_up_with_room(self, given: Mapping[str, Tensor], others: dict[Any, Captured]) -> Bound:
        """Warm up; where memory runs out, once more without what was captured for other shapes."""
        try:
            return self._warm_up(given)
        except torch.OutOfMemoryError:
            if not others:
                raise
        others.clear()  # behind the handler, which would hold on to what did not fit
        return self._warm_up(given)

    def _warm_up(self, given: Mapping[str, Tensor]) -> Bound:
        """Run once in a context of its own: what a first run sets up cannot be captured."""
        # Not of inference mode, outside of which its tensors could not be filled again.
        with torch.inference_mode(False), torch.no_grad():
            bound = self._bind(
                self._make_context(), {name: tensor.clone() for name, tensor in given.items()}
            )
        self._launch(bound)
        _wait(self.device)
        return bound

    def _capture(self, bound: Bound) -> Any:
        """A CUDA graph of the launches.

        Raises:
            RuntimeError: CUDA cannot capture them.
            WorkError: the engine says that they cannot be captured, or fails.
        """
        stream = torch.cuda.Stream(self.device)
        if hasattr(bound.context, "is_stream_capturable") and (  # TensorRT for RTX alone
            not bound.context.is_stream_capturable(stream.cuda_stream)
        ):
            raise WorkError(f"{self.file.record.runtime} says so of the shapes at hand")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._launch(bound)
        return graph

    def _make_context(self) -> Any:
        """A context without memory for activations.

        Raises:
            OutOfMemoryError: of PyTorch; what it needs beside them does not fit.
            WorkError: the runtime makes none.
        """
        memory = self._package.ExecutionContextAllocationStrategy.USER_MANAGED
        kernels = getattr(self._package, "DynamicShapesKernelSpecializationStrategy", None)
        if kernels is None:
            context = self._engine.create_execution_context(memory)
        else:  # TensorRT for RTX, which would otherwise exchange kernels after they were captured
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(memory)
            config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER
            context = self._engine.create_execution_context(config)
        if context is None:
            raise self._failed("a context of it must be made, and is not", no_room=True)
        return context

    def _bind(self, context: Any, given: Mapping[str, Tensor]) -> Bound:
        """Tell a context what to read, and give it memory to write into."""
        for name, tensor in given.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise WorkError(
                    f"engine {self.file.path}: {name} must be of a shape that it takes, got "
                    f"{list(tensor.shape)}"
                )
        outputs = {
            name: torch.empty(
                tuple(context.get_tensor_shape(name)),
                dtype=getattr(torch, info.dtype),
                device=self.device,
            )
            for name, info in self._outputs.items()
        }
        for name, tensor in {**given, **outputs}.items():
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise self._failed(f"it must take {name} where it lies, and refuses it")
        size = context.update_device_memory_size_for_shapes()
        memory = torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)
        context.set_device_memory(memory.data_ptr(), size)
        return Bound(context, given, outputs, memory)

    def _launch(self, bound: Bound) -> None:
        """Run on the current stream."""
        if not bound.context.execute_async_v3(_stream_of(self.device)):
            raise self._failed("it must run, and failed")

    def _failed(self, what: str, *, no_room: bool = False) -> Exception:
        """The error to raise, with what the runtime said; PyTorch's own where memory ran out.

        Args:
            what: went wrong.
            no_room: whether memory ran out where the runtime says nothing else.
        """
        said = "; ".join(self._log.errors[-3:])
        words = f"engine {self.file.path}: {what}: {said or 'the runtime does not say why'}"
        if says_no_room(said) or (no_room and not said):
            return torch.OutOfMemoryError(words)
        return WorkError(words)


def with_index(device: torch.device) -> torch.device:
    """The very GPU that a device is now: the current one may be another later."""
    index: int | None = device.index
    if device.type == "cuda" and index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Inside, the device is the current one, on which TensorRT works whatever its arguments say."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
