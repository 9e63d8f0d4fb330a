"""Parity: whether back ends compute what the reference does, and which node differs first.

The reference is the eager network. Each back end is given the same inputs, drawn from a seed; see
`kinetiq.export.example`. Equal is: in float32, 1e-4 of the largest value; in float16 and bfloat16,
at most twice the error that eager PyTorch makes in that type against float32.
"""

import contextlib
import importlib.util
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kinetiq.checkpoint import Checkpoint
from kinetiq.denoiser import EagerDenoiser
from kinetiq.errors import CheckpointError, MissingDependencyError, RequestError
from kinetiq.export.denoiser import CHANNELS, GraphDenoiser
from kinetiq.export.engine_profile import Profile
from kinetiq.export.engine_runtime import open_engine
from kinetiq.export.example import (
    BankSizes,
    Example,
    ExampleShape,
    cast_example,
    example_shapes,
    make_example,
)
from kinetiq.export.graph import NetworkGraph
from kinetiq.export.metadata import NetworkMetadata, read_metadata, read_network
from kinetiq.export.network import cast_weights
from kinetiq.export.nodes import DOMAIN, NODES
from kinetiq.export.onnxruntime_denoiser import OnnxruntimeDenoiser
from kinetiq.export.openvino_denoiser import OpenvinoDenoiser
from kinetiq.export.specialisation import keep_controls
from kinetiq.export.specialising_denoiser import SpecialisingDenoiser
from kinetiq.kernels import motion_feature
from kinetiq.taps import find_tap

TOLERANCE = 1e-4  # of the largest value, in float32
SLACK = 2.0  # times eager's own error, in narrower types
_OUTPUTS = ("prediction", "features", "motion")
_CHOSEN = 3  # channels of the tap whose motion is compared
_FLOAT = 1  # onnx.TensorProto.FLOAT
_RUNTIMES: Mapping[str, Callable[[Path, torch.device], SpecialisingDenoiser]] = {
    "onnxruntime": OnnxruntimeDenoiser,
    "openvino": OpenvinoDenoiser,
}


@dataclass(frozen=True)
class Comparison:
    """One output of one back end at one shape.

    Args:
        runtime: its name.
        output: "prediction", "features" or "motion".
        shape: of the batch.
        controls: the kinds that acted.
        max_error: largest distance from the reference in float32.
        relative_error: the same by the largest value of the reference; for "motion" by that of the
            features, since it is a difference of them.
        allowed: what the relative error may be.
    """

    runtime: str
    output: str
    shape: ExampleShape
    controls: tuple[str, ...]
    max_error: float
    relative_error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance; not a number is not."""
        return self.relative_error <= self.allowed


def installed_runtimes(precision: str, device: torch.device | str = "cpu") -> tuple[str, ...]:
    """The runtimes here that run a network of this precision on a device."""
    if torch.device(device).type != "cpu":
        found = ["onnxruntime"]
    elif precision == "bfloat16":
        found = ["openvino"]
    else:
        found = list(_RUNTIMES)
    return tuple(name for name in found if importlib.util.find_spec(name) is not None)


def check_network(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint,
    *,
    runtimes: Collection[str] | None = None,
    shapes: Collection[ExampleShape] | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Comparison]:
    """Compare a network with its model, under each runtime, shape, and with and without controls.

    Args:
        path: of the network.
        checkpoint: the model, loaded in float32 on a CPU.
        runtimes: "onnxruntime", "openvino"; None: those that are installed.
        shapes: of batches; None: those of `example_shapes`.
        device: that the runtimes run on.

    Raises:
        CheckpointError: the network is damaged, or another model's.
        MissingDependencyError: no runtime is installed, or the device is missing.
        RequestError: a runtime is not known, or cannot run this.
    """
    metadata = read_metadata(path)
    _require_same(path, metadata, checkpoint)
    names = installed_runtimes(metadata.precision, device) if runtimes is None else tuple(runtimes)
    if not names:
        raise MissingDependencyError(
            f"check: needs onnxruntime or openvino to run {metadata.precision}, and none is "
            'installed: pip install ".[export]"'
        )
    denoisers = {name: _open(name, path, device) for name in names}
    every = example_shapes(metadata) if shapes is None else shapes
    yield from _compare_all(checkpoint, metadata, every, denoisers)


def check_engine_file(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint,
    *,
    trust: str | Collection[str] = (),
    device: torch.device | str = "cuda",
) -> Iterator[Comparison]:
    """Compare an engine with its model, at three shapes of its profile.

    Args:
        path: of the plan.
        checkpoint: the model, loaded in float32 on a CPU.
        trust: checksums that the caller vouches for.
        device: the GPU.

    Raises:
        CheckpointError: see `engine_runtime.open_engine`; or it is another model's.
        MissingDependencyError: the runtime or a GPU is missing.
    """
    denoiser = open_engine(path, trust=trust, device=device)
    _require_same(path, denoiser.metadata, checkpoint)
    profile = denoiser.file.record.profile
    shapes = [shape_inside(shape, profile) for shape in example_shapes(denoiser.metadata)]
    denoisers = {denoiser.file.record.runtime: denoiser}
    banks = banks_inside(BankSizes(), profile)
    chosen = profile.bounds.get(CHANNELS)
    count = _CHOSEN if chosen is None else min(max(_CHOSEN, chosen.least), chosen.most)
    yield from _compare_all(checkpoint, denoiser.metadata, shapes, denoisers, banks, count)


def shape_inside(shape: ExampleShape, profile: Profile) -> ExampleShape:
    """The shape inside a profile that is nearest."""
    nearest = {
        axis: min(max(length, profile.bounds[axis].least), profile.bounds[axis].most)
        for axis, length in asdict(shape).items()
    }
    return ExampleShape(**nearest)


def banks_inside(sizes: BankSizes, profile: Profile) -> BankSizes:
    """The banks inside a profile that are nearest; it may know of none."""
    nearest = {
        axis: min(max(length, profile.bounds[axis].least), profile.bounds[axis].most)
        for axis, length in asdict(sizes).items()
        if axis in profile.bounds
    }
    return replace(sizes, **nearest)


def _require_same(
    path: str | os.PathLike[str], metadata: NetworkMetadata, checkpoint: Checkpoint
) -> None:
    if metadata.fingerprint != checkpoint.fingerprint:
        raise CheckpointError(
            f"check: {path} must be an export of {checkpoint.name}, "
            f"got one of {metadata.checkpoint} with another fingerprint; give the model that it "
            "was exported from, as it was then"
        )


def _open(
    name: str, path: str | os.PathLike[str], device: torch.device | str
) -> SpecialisingDenoiser:
    if name not in _RUNTIMES:
        raise RequestError(f"check: runtimes must be among {', '.join(_RUNTIMES)}, got {name!r}")
    return _RUNTIMES[name](Path(path), torch.device(device))


def _compare_all(
    checkpoint: Checkpoint,
    metadata: NetworkMetadata,
    shapes: Collection[ExampleShape],
    denoisers: Mapping[str, GraphDenoiser],
    banks: BankSizes = BankSizes(),  # noqa: B008  it is frozen
    chosen: int = _CHOSEN,
) -> Iterator[Comparison]:
    channels = _choose_channels(metadata, chosen)
    for shape in shapes:
        for kinds in ((), metadata.controls) if metadata.controls else ((),):
            example = make_example(checkpoint.unet, metadata, shape, kinds, banks=banks)
            found = _compare(checkpoint.unet, metadata, example, channels, denoisers)
            for output, name, (most, relative), allowed in found:
                yield Comparison(name, output, shape, kinds, most, relative, allowed)


def count_comparisons(metadata: NetworkMetadata) -> int:
    """How many comparisons there are of a network, under one runtime at the usual shapes."""
    outputs = 1 if metadata.tap is None else len(_OUTPUTS)
    return len(example_shapes(metadata)) * (2 if metadata.controls else 1) * outputs


def _choose_channels(metadata: NetworkMetadata, count: int) -> Tensor | None:
    """Channels of the tap whose motion is compared, from the last to the first; None: no tap."""
    if metadata.tap is None:
        return None
    axes = next(info.axes for info in metadata.outputs if info.name == "features")
    return torch.linspace(int(axes[-1]) - 1, 0, count).round().long()


def _compare(
    network: Any,
    metadata: NetworkMetadata,
    example: Example,
    channels: Tensor | None,
    denoisers: Mapping[str, GraphDenoiser],
) -> Iterator[tuple[str, str, tuple[float, float], float]]:
    """Of every output and back end its two errors, and what the second may be."""
    dtype: torch.dtype = getattr(torch, metadata.precision)
    scale = 0.0
    for output in ("prediction",) if metadata.tap is None else _OUTPUTS:
        asked = partial(_ask, output=output, tap=metadata.tap, channels=channels)
        with _eager(network) as denoiser:
            exact = asked(denoiser, example)
        if output != "motion":  # a difference of the features that were compared before it
            scale = float(exact.abs().max())
        allowed = TOLERANCE
        if dtype != torch.float32:
            with cast_weights(network, dtype), _eager(network) as denoiser:
                narrow = asked(denoiser, cast_example(example, dtype))
            allowed = max(TOLERANCE, SLACK * _error(narrow, exact, scale)[1])
        for name, tested in denoisers.items():
            got = asked(tested, cast_example(example, dtype))
            yield output, name, _error(got, exact, scale), allowed


def _ask(
    denoiser: EagerDenoiser | GraphDenoiser,
    example: Example,
    *,
    output: str,
    tap: str | None,
    channels: Tensor | None,
) -> Tensor:
    given = (example.latents, example.timesteps, example.text, example.controls)
    with torch.inference_mode():
        if output == "prediction" or tap is None or channels is None:
            got = denoiser.predict(*given)
        elif output == "features":
            got = denoiser.features(*given, tap)
        elif isinstance(denoiser, EagerDenoiser):
            got = motion_feature(denoiser.features(*given, tap).flatten(2, 3), channels)
        else:
            got = denoiser.motion(*given, tap, channels)
    return got.float().cpu()


def _error(got: Tensor, exact: Tensor, scale: float) -> tuple[float, float]:
    most = float((got - exact).abs().max())
    return most, most / scale


@dataclass(frozen=True)
class NodeDifference:
    """The first of our nodes whose output is not what the reference computes.

    Args:
        runtime: its name.
        node: name of the node in the graph.
        kind: of node, a name of `kinetiq.export.nodes.NODES`.
        number: how many of our nodes run before it.
        relative_error: largest distance from the reference by the largest value of the node's.
        allowed: what it may be.
    """

    runtime: str
    node: str
    kind: str
    number: int
    relative_error: float
    allowed: float


def find_first_difference(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint,
    runtime: str,
    *,
    shape: ExampleShape | None = None,
    device: torch.device | str = "cpu",
    allowed: float = TOLERANCE,
) -> NodeDifference | None:
    """Compare what each of our nodes returns, in the order in which they run, with all controls.

    The nodes are the attentions and whatever a control changes, so the place of a fault is known
    to within one attention site.

    Args:
        path: of a network in float32.
        checkpoint: the model, loaded in float32 on a CPU.
        runtime: "onnxruntime" or "openvino".
        shape: of the batch; None: the second of `example_shapes`.
        device: that the runtime runs on.
        allowed: relative error of a node.

    Returns:
        The first node beyond `allowed`, or None.

    Raises:
        CheckpointError: the network is damaged, or not of this model.
        RequestError: the network is not in float32, or the runtime is not known.
    """
    model, metadata = read_network(path)
    require_nodes(metadata)
    _require_same(path, metadata, checkpoint)
    used = example_shapes(metadata)[1] if shape is None else shape
    example = make_example(checkpoint.unet, metadata, used, metadata.controls)
    denoiser = _open(runtime, path, device)
    kinds = frozenset(metadata.controls)
    inputs = denoiser.inputs_of(
        example.latents, example.timesteps, example.text, example.controls, kinds
    )
    on_cpu = {name: tensor.cpu() for name, tensor in inputs.items()}
    expected = _record_nodes(checkpoint.unet, metadata, on_cpu)
    cut = keep_controls(model, kinds, outputs=("prediction",))
    nodes = [node for node in cut.graph.node if node.domain == DOMAIN]
    for node in nodes:
        cut.graph.output.add(name=node.output[0]).type.tensor_type.elem_type = _FLOAT
    got = denoiser.run_model(cut, inputs)
    turns: dict[str, Iterator[Tensor]] = {kind: iter(kept) for kind, kept in expected.items()}
    for number, node in enumerate(nodes):
        exact = next(turns[node.op_type])
        _, relative = _error(got[node.output[0]], exact, float(exact.abs().max()))
        if not relative <= allowed:
            return NodeDifference(runtime, node.name, node.op_type, number, relative, allowed)
    return None


def require_nodes(metadata: NetworkMetadata) -> None:
    """Raise a `RequestError` unless nodes of the network can be compared one by one."""
    if metadata.precision != "float32":
        raise RequestError(
            f"check: nodes are compared in float32, got a network in {metadata.precision}; export "
            "it with dtype float32"
        )


def _record_nodes(
    network: Any, metadata: NetworkMetadata, inputs: Mapping[str, Tensor]
) -> Mapping[str, list[Tensor]]:
    """What PyTorch computes at each of our nodes, by kind of node, in the order of the calls."""
    tap = None if metadata.tap is None else find_tap(network, metadata.tap)
    given = dict(inputs)
    own = tuple(given.pop(name) for name in ("latents", "timesteps", "text"))
    given[CHANNELS] = torch.zeros(1, dtype=torch.int64)
    recorder = _Recorder()
    with NetworkGraph(network, metadata.controls, tap) as graph, torch.no_grad(), recorder:
        graph(*own, given)
    return recorder.kept


class _Recorder(TorchDispatchMode):
    """Keeps what our nodes return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: dict[str, list[Tensor]] = defaultdict(list)
        self._names = {node.call: name for name, node in NODES.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self._names:
            self.kept[self._names[func]].append(out)
        return out


@contextlib.contextmanager
def _eager(network: Any) -> Iterator[EagerDenoiser]:
    denoiser = EagerDenoiser(network).attach()
    try:
        yield denoiser
    finally:
        denoiser.detach()
