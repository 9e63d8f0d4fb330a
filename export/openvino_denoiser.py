"""An exported network run by OpenVINO on a CPU.

OpenVINO converts no functions of a model, so they are put in the place of their nodes first. The
precision that it computes in is the network's, and never its own choice: it would take bfloat16
wherever a CPU has it.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinetiq.errors import OutputError, RequestError
from kinetiq.export.metadata import outside_files
from kinetiq.export.openvino_split import split_timesteps
from kinetiq.export.packages import require_packages
from kinetiq.export.specialising_denoiser import SpecialisingDenoiser, explained

_NAME = "openvino"
_FAILURES = (RuntimeError, MemoryError)  # the latter is what its binding makes of std::bad_alloc
_HINTS = {"float32": "f32", "float16": "f32", "bfloat16": "bf16"}  # no CPU is sure to have f16
_ELEMENTS = {"bf16": "BFLOAT16"}  # of onnx.TensorProto, by hint
_TYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
}


class OpenvinoDenoiser(SpecialisingDenoiser):
    """A denoiser that OpenVINO runs.

    Args:
        path: of the exported network.
        device: a CPU.

    Raises:
        CheckpointError: the file is damaged or not ours.
        MissingDependencyError: OpenVINO is missing.
        RequestError: the device is not a CPU.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        place = torch.device(device)
        require_runtime(place)
        super().__init__(path, _NAME, place)

    def compile(self, model: Any, folder: Path) -> Any:
        """What runs a model; see `SpecialisingDenoiser.compile`.

        Raises:
            OutOfMemoryError: of PyTorch; the weights do not fit.
            OutputError: the folder of the weights cannot be written.
            WorkError: OpenVINO refuses the graph.
        """
        import onnx.inliner
        import openvino

        inlined = onnx.inliner.inline_local_functions(model)
        core, hint = openvino.Core(), _HINTS[self.metadata.precision]
        if hint == _HINTS["float32"]:
            return _Program(self._compile(core, inlined, folder, hint))
        split = split_timesteps(inlined, getattr(onnx.TensorProto, _ELEMENTS[hint]))
        return _Program(
            self._compile(core, split.rest, folder, hint),
            self._compile(core, split.embedding, folder, _HINTS["float32"]),
            split.joint,
        )

    def _compile(self, core: Any, model: Any, folder: Path, hint: str) -> Any:
        properties = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            return core.compile_model(self._read(core, model, folder), "CPU", properties)
        except _FAILURES as error:
            raise explained(error, _NAME, "take the network", self.device) from error

    def _read(self, core: Any, model: Any, folder: Path) -> Any:
        data = model.SerializeToString()
        if not outside_files(model):
            return core.read_model(data)
        try:  # outside weights are found beside the file alone, and links to them refused
            with tempfile.NamedTemporaryFile(
                dir=folder, prefix=".kinetiq-", suffix=".onnx"
            ) as file:
                file.write(data)
                file.flush()
                return core.read_model(file.name)
        except OSError as error:
            raise OutputError(
                f"{_NAME}: {folder} must be a folder that can be written, since the graph has to "
                f"lie beside its weights for a moment: {error.strerror}"
            ) from error

    def run(self, inputs: Mapping[str, Tensor], kinds: frozenset[str], output: str) -> Tensor:
        """One output; see `GraphDenoiser.run`.

        Raises:
            OutOfMemoryError: of PyTorch; the batch does not fit.
            WorkError: OpenVINO failed.
        """
        program: _Program = self.program(kinds, output)
        out = torch.empty(self.output_shape(output, inputs), dtype=self._dtype)
        try:
            request = program.start(inputs)
            request.set_tensor(program.compiled.output(0), _share(out))
            request.infer()
        except _FAILURES as error:
            what = f"run the network on inputs of latents {list(inputs['latents'].shape)}"
            raise explained(error, _NAME, what, self.device) from error
        return out

    def run_model(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs; see `SpecialisingDenoiser.run_model`.

        Raises:
            OutOfMemoryError: of PyTorch; the variant does not fit.
            WorkError: OpenVINO failed.
        """
        program: _Program = self.compile(model, self._folder)
        try:
            request = program.start(inputs)
            request.infer()
        except _FAILURES as error:
            raise explained(error, _NAME, "run a variant of the network", self.device) from error
        return {
            name: torch.from_numpy(request.get_tensor(port).data.copy())
            for port in program.compiled.outputs
            for name in port.names
        }


@dataclass(frozen=True)
class _Program:
    """A network, and what embeds its timesteps where that is computed apart."""

    compiled: Any
    embedding: Any = None
    joint: str = ""

    def start(self, inputs: Mapping[str, Tensor]) -> Any:
        """A request that has its inputs."""
        given = {name: _share(tensor) for name, tensor in inputs.items()}
        if self.embedding is not None:
            embedding = _request(self.embedding, given)
            embedding.infer()
            given[self.joint] = embedding.get_tensor(self.embedding.output(0))
        return _request(self.compiled, given)


def _request(compiled: Any, given: Mapping[str, Any]) -> Any:
    """A request of a compiled model with the tensors that it reads."""
    request = compiled.create_infer_request()
    for port in compiled.inputs:
        request.set_tensor(port, given[next(iter(port.names & given.keys()))])
    return request


def require_runtime(device: torch.device) -> None:
    """Raise unless OpenVINO runs networks on a device here.

    Raises:
        MissingDependencyError: it is not installed.
        RequestError: the device is not a CPU.
    """
    require_packages("onnx", "openvino")
    if device.type != "cpu":
        raise RequestError(f"{_NAME}: device must be cpu, got {device}; use backend='onnxruntime'")


def _share(tensor: Tensor) -> Any:
    """A tensor of OpenVINO in the same memory."""
    import openvino

    kind = getattr(openvino.Type, _TYPES[tensor.dtype])
    if tensor.dtype == torch.bfloat16:  # which NumPy does not have
        return openvino.Tensor(tensor.view(torch.int16).numpy(), list(tensor.shape), kind)
    return openvino.Tensor(tensor.numpy(), shared_memory=True)
