"""An exported network run by onnxruntime, on a CPU or with CUDA.

Tensors are handed over where they lie: onnxruntime reads PyTorch's memory and writes into it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinetiq.errors import MissingDependencyError, RequestError
from kinetiq.export.packages import require_packages
from kinetiq.export.specialising_denoiser import SpecialisingDenoiser, explained

_NAME = "onnxruntime"
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ELEMENTS = {  # onnx.TensorProto.DataType
    torch.float32: 1,
    torch.int64: 7,
    torch.float16: 10,
    torch.bfloat16: 16,
}


class OnnxruntimeDenoiser(SpecialisingDenoiser):
    """A denoiser that onnxruntime runs.

    Args:
        path: of the exported network.
        device: a CPU or a CUDA device.

    Raises:
        CheckpointError: the file is damaged or not ours.
        MissingDependencyError: onnxruntime, or its CUDA provider, is missing.
        RequestError: onnxruntime cannot run this precision there.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        place = torch.device(device)
        require_runtime(place)
        super().__init__(path, _NAME, place)
        require_support(self.metadata.precision, place)

    def compile(self, model: Any, folder: Path) -> Any:
        """A session; see `SpecialisingDenoiser.compile`.

        Raises:
            MissingDependencyError: the provider of the device cannot be used.
            OutOfMemoryError: of PyTorch; the weights do not fit.
            WorkError: onnxruntime refuses the graph.
        """
        onnxruntime = load_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # what it says as an error we say, with what to do
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder)
        )
        try:
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=[provider_of(self.device)]
            )
        except Exception as error:  # onnxruntime's own classes share no base of their own
            raise explained(error, _NAME, "take the network", self.device) from error
        check_session(session, self.device)
        return session

    def run(self, inputs: Mapping[str, Tensor], kinds: frozenset[str], output: str) -> Tensor:
        """One output; see `GraphDenoiser.run`.

        Raises:
            OutOfMemoryError: of PyTorch; the batch does not fit.
            WorkError: onnxruntime failed.
        """
        session = self.program(kinds, output)
        out = torch.empty(self.output_shape(output, inputs), dtype=self._dtype, device=self.device)
        binding = session.io_binding()
        for value in session.get_inputs():
            tensor = inputs[value.name]
            binding.bind_input(value.name, *_place(tensor))
        binding.bind_output(output, *_place(out))
        self._wait()
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's own classes share no base of their own
            what = f"run the network on inputs of latents {list(inputs['latents'].shape)}"
            raise explained(error, _NAME, what, self.device) from error
        binding.synchronize_outputs()
        return out

    def run_model(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs; see `SpecialisingDenoiser.run_model`.

        Raises:
            OutOfMemoryError: of PyTorch; the variant does not fit.
            WorkError: onnxruntime failed.
        """
        session = self.compile(model, self._folder)
        given = {value.name: inputs[value.name].cpu().numpy() for value in session.get_inputs()}
        names = [value.name for value in session.get_outputs()]
        try:
            outputs = session.run(names, given)
        except Exception as error:  # onnxruntime's own classes share no base of their own
            raise explained(error, _NAME, "run a variant of the network", self.device) from error
        return dict(zip(names, map(torch.from_numpy, outputs), strict=True))

    def _wait(self) -> None:
        """Finish what PyTorch was asked, since onnxruntime's stream does not wait for it."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def require_runtime(device: torch.device) -> None:
    """Raise unless onnxruntime runs networks on a device here.

    Raises:
        MissingDependencyError: it, or its CUDA provider, is missing.
        RequestError: the device is neither a CPU nor a CUDA device.
    """
    require_packages("onnx", "onnxruntime")
    _require_provider(device)


def require_support(precision: str, device: torch.device) -> None:
    """Raise a `RequestError` unless onnxruntime runs a precision on a device."""
    if precision == "bfloat16" and device.type == "cpu":
        raise RequestError(
            f"{_NAME}: dtype must be one that it computes in on a CPU, got bfloat16; take float32, "
            "or use backend='openvino'"
        )


def _place(tensor: Tensor) -> tuple[str, int, int, tuple[int, ...], int]:
    """How onnxruntime is told of a tensor: device, index, type, shape, address."""
    kind = _ELEMENTS[tensor.dtype]
    return (
        tensor.device.type,
        tensor.device.index or 0,
        kind,
        tuple(tensor.shape),
        tensor.data_ptr(),
    )


def provider_of(device: torch.device) -> tuple[str, dict[str, Any]]:
    """The provider of a device, and its options."""
    name = _PROVIDERS[device.type]
    if device.type == "cpu":
        return name, {}
    return name, {
        "device_id": device.index or 0,
        "use_tf32": 0,  # with which float32 would err by a thousandth
        "arena_extend_strategy": "kSameAsRequested",  # PyTorch has memory beside it
        "cudnn_conv_algo_search": "HEURISTIC",  # the usual search takes long at every new shape
    }


def check_session(session: Any, device: torch.device) -> None:
    """Require that a session runs on a device, now and later.

    Raises:
        MissingDependencyError: onnxruntime took another provider, as it does where the wanted one
            cannot be loaded.
    """
    session.disable_fallback()  # else a failed run is repeated on a CPU, and so are all behind it
    wanted, found = _PROVIDERS[device.type], session.get_providers()
    if wanted not in found:
        raise MissingDependencyError(
            f"{_NAME}: {wanted} must be usable for {device}, and onnxruntime took "
            f"{', '.join(found)}; install the CUDA and the cuDNN that this onnxruntime-gpu is "
            "built for"
        )


def load_onnxruntime() -> Any:
    """The package, told not to report what is done with it."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    return onnxruntime


def _require_provider(device: torch.device) -> None:
    onnxruntime = load_onnxruntime()
    wanted = _PROVIDERS.get(device.type)
    if wanted is None:
        raise RequestError(f"{_NAME}: device must be cpu or cuda, got {device}")
    if wanted not in onnxruntime.get_available_providers():
        raise MissingDependencyError(
            f"{_NAME}: {wanted} must be there for {device}, and this build has "
            f"{', '.join(onnxruntime.get_available_providers())}: "
            "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
        )
