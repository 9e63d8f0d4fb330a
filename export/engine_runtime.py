"""Engines of TensorRT and TensorRT for RTX as denoisers."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinetiq.errors import CheckpointError, RequestError, WorkError
from kinetiq.export.denoiser import GraphDenoiser
from kinetiq.export.engine_file import EngineFile, read_engine
from kinetiq.export.packages import load_gpu_runtime

_CHANNELS = "feature_channels"
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
    major, minor = torch.cuda.get_device_capability(place)
    check_engine(file, package.__version__, f"sm_{major}{minor}")
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


@dataclass(frozen=True)
class Captured:
    """The launches for inputs of one shape.

    Args:
        graph: of CUDA.
        context: of the engine, which must stay as it was captured.
        inputs: what the launches read.
        outputs: what they write.
    """

    graph: Any
    context: Any
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


class EngineDenoiser(GraphDenoiser):
    """A `kinetiq.denoiser.Denoiser` that is an engine.

    The engine reads its inputs from PyTorch's memory and writes into it; nothing is copied but
    what a captured graph must find at its own addresses.

    Args:
        file: what the plan is.
        plan: the engine.
        package: the runtime.
        device: where the engine runs.
        graphs: whether launches are captured and replayed.
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
        super().__init__(file.record.network, file.record.runtime, device)
        self.file = file
        self._outputs = {tensor.name: tensor for tensor in file.record.network.outputs}
        self._runtime = package.Runtime(package.Logger(package.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise WorkError(
                f"engine {file.path}: {file.record.runtime} must take the plan, and refuses it; "
                "its own log says why"
            )
        self._context = self._engine.create_execution_context()
        self._captured: dict[Any, Captured] | None = {} if graphs else None

    def wanted(self, kinds: Collection[str]) -> frozenset[str]:
        """All that the engine was built with: its inputs are fixed."""
        return frozenset(self.metadata.controls).union(kinds)

    def run(
        self,
        inputs: Mapping[str, Tensor],
        kinds: frozenset[str],  # noqa: ARG002  an engine has its kinds from when it was built
        output: str,
    ) -> Tensor:
        """One output; see `GraphDenoiser.run`.

        Raises:
            ShapeError: an input is outside the engine's profile.
            WorkError: the engine failed.
        """
        given = dict(inputs)
        if _CHANNELS in self._infos:  # an engine computes all its outputs; this one nobody reads
            given[_CHANNELS] = torch.zeros(1, dtype=torch.int64, device=self.device)
        for name, tensor in given.items():
            self.file.record.profile.check(self._infos[name], tuple(tensor.shape))
        if self._captured is None:
            return self._enqueue(self._context, given)[output]
        key = tuple((name, tuple(tensor.shape)) for name, tensor in given.items())
        captured = self._captured.pop(key, None)
        if captured is None:
            if len(self._captured) == _GRAPHS:
                del self._captured[next(iter(self._captured))]  # what was used longest ago
            captured = self._capture(given)
        self._captured[key] = captured
        for name, tensor in given.items():
            captured.inputs[name].copy_(tensor)
        captured.graph.replay()
        return captured.outputs[output].clone()

    def _enqueue(self, context: Any, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on the current stream, from and into PyTorch's memory."""
        for name, tensor in given.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise WorkError(
                    f"engine {self.file.path}: {name} must be of a shape that it takes, got "
                    f"{list(tensor.shape)}"
                )
            context.set_tensor_address(name, tensor.data_ptr())
        outputs = {}
        for name, info in self._outputs.items():
            shape, dtype = tuple(context.get_tensor_shape(name)), getattr(torch, info.dtype)
            outputs[name] = torch.empty(shape, dtype=dtype, device=self.device)
            context.set_tensor_address(name, outputs[name].data_ptr())
        if not context.execute_async_v3(_stream_of(self.device)):
            raise WorkError(f"engine {self.file.path}: must run, and failed; its log says why")
        return outputs

    def _capture(self, given: Mapping[str, Tensor]) -> Captured:
        context = self._engine.create_execution_context()
        held = {name: tensor.clone() for name, tensor in given.items()}
        self._enqueue(context, held)  # what a first run sets up cannot be captured
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph):
            outputs = self._enqueue(context, held)
        return Captured(graph, context, held, outputs)


def _stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
