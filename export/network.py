"""Exporting a network to one ONNX file."""

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import tempfile
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kinetiq.checkpoint import Checkpoint
from kinetiq.denoiser import EagerDenoiser
from kinetiq.engine import Engine
from kinetiq.errors import RequestError, WorkError
from kinetiq.export.functions import OPSET, function_of, translations
from kinetiq.export.graph import NetworkGraph
from kinetiq.export.metadata import (
    FORMAT,
    KEY,
    NetworkMetadata,
    TensorInfo,
    checksum_of,
    encode_metadata,
    level_tokens,
    outside_files,
    precision_of,
)
from kinetiq.export.nodes import DOMAIN, DOMAIN_VERSION, KINDS, NODES
from kinetiq.export.packages import require_packages
from kinetiq.files import check_target, replacing
from kinetiq.taps import DEFAULT_TAP, find_tap

OPSETS = (OPSET,)
"""The opsets that a network can be exported with; 23 is the first with `Attention`."""

PACKAGES = ("kinetiq", "torch", "diffusers", "onnx", "onnx-ir", "onnxscript")
"""Those whose versions decide what an export is."""

_INSIDE_BYTES = 1 << 26  # of weights; a network with more keeps them in a file beside it
_EXAMPLE = {  # sizes while the graph is recorded; none alike, and none 0 or 1
    "rows": 2,
    "frames": 3,
    "text_tokens": 5,
    "motion_slots": 4,
    "lora_slots": 6,
    "lora_rank": 7,
    "feature_channels": 8,
}
_DATA = ".data"
_NAMED = 12  # digits of the digest in the name of a file of weights


@dataclass(frozen=True)
class ExportedNetwork:
    """A network that was exported.

    Args:
        path: of the ONNX file.
        metadata: what the file says of itself.
        files: all that belong to it, the ONNX file first.
    """

    path: Path
    metadata: NetworkMetadata
    files: tuple[Path, ...]


def export_onnx(
    source: Checkpoint | Engine,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    opset: int = OPSET,
    tap: str | None = None,
    controls: Collection[str] = KINDS,
) -> ExportedNetwork:
    """Write the denoiser of a model as an ONNX file with all controls as inputs.

    Rows, frames, height, width, tokens of the prompt, slots and ranks may be of any size when it
    runs; height and width are multiples of the network's own. Weights of more than 64 MiB lie in
    a second file beside it, named after `path` and what is in it, so that two exports to one path
    cannot mix.

    Args:
        source: a loaded model.
        path: the file; it carries its name only when it is whole.
        dtype: "float32", "float16" or "bfloat16"; None is the model's.
        opset: version of the standard operators, one of `OPSETS`.
        tap: a block whose features are returned as well, for `Denoiser.features`.
        controls: kinds of control, of `KINDS`; "reduced" needs "query".

    Raises:
        RequestError: an option has no meaning.
        CheckpointError: the network has parts that no back end supports.
        OutputError: the file cannot be written.
        MissingDependencyError: a package is missing.
        WorkError: the exporter failed.
    """
    checkpoint = source.checkpoint if isinstance(source, Engine) else source
    kinds = check_kinds(controls)
    if opset not in OPSETS:
        raise RequestError(
            f"export: opset must be one of {', '.join(map(str, OPSETS))}, got {opset!r}; "
            "the functions of our nodes are written in it, and older ones have no Attention"
        )
    precision = precision_of(checkpoint.dtype if dtype is None else dtype)
    found = None if tap is None else find_tap(checkpoint.unet, tap)
    if found is not None and found.is_attention:
        raise RequestError(f"export: tap must be a block, such as {DEFAULT_TAP}, got {tap!r}")
    require_packages("onnx", "onnx_ir", "onnxscript")
    check_target(path, "export")
    with (
        _stock(source) as network,
        cast_weights(network, getattr(torch, precision)),
        NetworkGraph(network, kinds, found) as graph,
    ):
        inputs, outputs = graph.list_inputs(precision), graph.list_outputs(precision)
        model = _record(graph, inputs, outputs, opset)
        metadata = NetworkMetadata(
            format=FORMAT,
            checkpoint=checkpoint.name,
            fingerprint=checkpoint.fingerprint,
            family=checkpoint.family,
            precision=precision,
            opset=opset,
            controls=kinds,
            tap=tap,
            levels=graph.levels,
            positions=getattr(checkpoint.unet.config, "motion_max_seq_length", None),
            sites=graph.sites,
            inputs=inputs,
            outputs=outputs,
            versions={name: importlib.metadata.version(name) for name in PACKAGES},
            checksum="",
        )
        return _write(model, metadata, Path(path))


def check_kinds(controls: Collection[str]) -> tuple[str, ...]:
    """Kinds of control in the order of `KINDS`.

    Raises:
        RequestError: one is not known, or needs another.
    """
    unknown = sorted(set(controls) - set(KINDS))
    if isinstance(controls, str) or unknown:
        raise RequestError(
            f"export: controls must be among {', '.join(KINDS)}, "
            f"got {controls if isinstance(controls, str) else ', '.join(unknown)}"
        )
    if "reduced" in controls and "query" not in controls:
        raise RequestError("export: the control 'reduced' needs 'query', got 'reduced' without it")
    return tuple(kind for kind in KINDS if kind in controls)


def example_sizes(levels: int, height: int = 2, width: int = 3) -> dict[str, int]:
    """A size for each named axis; height and width are in the network's multiples."""
    multiple = 2 ** (levels - 1)
    height, width = height * multiple, width * multiple
    tokens = {level: level_tokens(height, width, level) for level in range(levels)}
    return {
        **_EXAMPLE,
        "height": height,
        "width": width,
        **{f"tokens_{level}": count for level, count in tokens.items()},
        **{f"motion_tokens_{level}": count for level, count in tokens.items()},
    }


@contextlib.contextmanager
def _stock(source: Checkpoint | Engine) -> Iterator[Any]:
    """The network with its stock modules, once our own were found to support it."""
    own = source.denoiser if isinstance(source, Engine) else None
    attached = own if isinstance(own, EagerDenoiser) and own.attached else None
    if attached is not None:
        attached.detach()
    # Another than the engine's, whose back end may compile what is only to be looked at.
    probed = EagerDenoiser((source.checkpoint if isinstance(source, Engine) else source).unet)
    try:
        _probe(probed.attach())
        yield probed.detach()
    finally:
        probed.detach()
        if attached is not None:
            attached.attach()


def _probe(denoiser: EagerDenoiser) -> None:
    """Let our modules refuse what they do not support; shapes alone are computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    network = denoiser.network
    graph = NetworkGraph(network, ())
    example = _example_inputs(
        graph.list_inputs(str(network.dtype).removeprefix("torch.")),
        example_sizes(graph.levels),
        network.device,
    )
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.inference_mode():
        latents, timesteps, text = map(fake.from_tensor, example.values())
        denoiser.predict(latents, timesteps, text)


@contextlib.contextmanager
def cast_weights(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let the weights be of another type; behind the block they are the very ones they were."""
    weights = [(one, one.data) for one in network.parameters() if one.is_floating_point()]
    # Where one of these is a view, as of the file that it was read from, what it is a view of
    # would keep its type, and tracing refuses that: so another tensor takes its place.
    buffers = [
        (module, name, buffer)
        for module in network.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point()
    ]
    try:
        for weight, data in weights:
            weight.data = data.to(dtype)
        for module, name, buffer in buffers:
            setattr(module, name, buffer.to(dtype))
        yield
    finally:
        for weight, data in weights:
            weight.data = data
        for module, name, buffer in buffers:
            setattr(module, name, buffer)


def _example_inputs(
    inputs: tuple[TensorInfo, ...], sizes: dict[str, int], device: torch.device
) -> dict[str, Tensor]:
    """Zeros of each input's shape."""
    return {
        tensor.name: torch.zeros(
            [sizes[axis] if isinstance(axis, str) else axis for axis in tensor.axes],
            dtype=getattr(torch, tensor.dtype),
            device=device,
        )
        for tensor in inputs
    }


def _record(
    graph: NetworkGraph,
    inputs: tuple[TensorInfo, ...],
    outputs: tuple[TensorInfo, ...],
    opset: int,
) -> Any:
    """The `onnx_ir.Model` of the network, with the functions of its nodes."""
    import onnx_ir

    example = _example_inputs(inputs, example_sizes(graph.levels), graph.network.device)
    own = ("latents", "timesteps", "text")
    axes = {
        tensor.name: {
            place: axis for place, axis in enumerate(tensor.axes) if isinstance(axis, str)
        }
        for tensor in inputs
        if tensor.name in own
    }
    given = {name: tensor for name, tensor in example.items() if name not in own}
    try:
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                graph.eval(),
                tuple(example[name] for name in own),
                kwargs={"controls": given},
                dynamo=True,
                opset_version=opset,
                # Controls reach nodes whose results do not have their shapes, so that nothing of
                # the graph depends on these; hundreds of unknown sizes would take minutes.
                dynamic_shapes={**axes, "controls": dict.fromkeys(given)},
                input_names=[tensor.name for tensor in inputs],
                output_names=[tensor.name for tensor in outputs],
                custom_translation_table=translations(),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise WorkError(f"export: the exporter of PyTorch failed: {error}") from error
    model = program.model
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, which were most of the graph
        for value in node.outputs:
            value.shape = None  # in the exporter's own names of axes; runtimes infer it
    for values, infos in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, info in zip(values, infos, strict=True):
            value.name, value.shape = info.name, onnx_ir.Shape(info.axes)
    used = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    for name in sorted(used):
        function = onnx_ir.serde.deserialize_function(function_of(NODES[name]))
        model.functions[(DOMAIN, name, "")] = function
    model.opset_imports[DOMAIN] = DOMAIN_VERSION
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings of its own deprecated names and of absent packages."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _write(model: Any, metadata: NetworkMetadata, path: Path) -> ExportedNetwork:
    """Write the model, and its weights beside it if they are many, and find its checksum."""
    import onnx
    import onnx_ir

    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    beside = f"{path.name}{_DATA}" if weights > _INSIDE_BYTES else None
    with (
        replacing(path, "export") as final,
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".kinetiq-") as folder,
    ):
        written = Path(folder) / path.name
        onnx_ir.save(model, written, external_data=beside)
        proto = onnx.load(written, load_external_data=False)
        name_by_content(proto, written)
        metadata = replace(metadata, checksum=checksum_of(proto, metadata, written.parent))
        del proto.metadata_props[:]
        proto.metadata_props.add(key=KEY, value=encode_metadata(metadata))
        final.write_bytes(proto.SerializeToString())
        files = outside_files(proto)
        former = _weights_beside(path) - set(files)
        for name in files:
            (Path(folder) / name).replace(path.with_name(name))
    # Another may have written meanwhile: what is there now keeps its weights.
    for name in former - _weights_beside(path):
        path.with_name(name).unlink(missing_ok=True)
    return ExportedNetwork(path, metadata, (path, *(path.with_name(name) for name in files)))


def name_by_content(proto: Any, path: Path) -> None:
    """Name the file that holds a model's outside weights after what is in it.

    Args:
        proto: an `onnx.ModelProto`; it is told the name.
        path: of the model, beside which the file lies.
    """
    for name in outside_files(proto):
        with path.with_name(name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        given = f"{path.name}.{digest[:_NAMED]}{_DATA}"
        path.with_name(name).rename(path.with_name(given))
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if (entry.key, entry.value) == ("location", name):
                    entry.value = given


def _weights_beside(path: Path) -> set[str]:
    """Files of weights that an export to this path made and that the network there reads."""
    if not path.exists():
        return set()
    import onnx

    try:
        names = outside_files(onnx.load(path, load_external_data=False))
    except Exception:  # whatever is there is replaced; protobuf's class differs
        return set()
    return {name for name in names if name.startswith(f"{path.name}.") and name.endswith(_DATA)}
