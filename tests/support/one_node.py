"""Exported networks of one node of ours, written by hand: quick to build an engine from."""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from kinetiq.export.functions import OPSET, function_of
from kinetiq.export.metadata import (
    FORMAT,
    KEY,
    NetworkMetadata,
    TensorInfo,
    checksum_of,
    encode_metadata,
)
from kinetiq.export.nodes import DOMAIN, DOMAIN_VERSION, KINDS, NODES

TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
}
_PLACES = ("rows", "frames", "tokens_0")
_AXES = {
    "query_row": ("rows",),
    "query_blend": _PLACES,
    "query_reduced": ("rows",),
    "deviation_row": ("rows",),
    "deviation_blend": _PLACES,
    "deviation_parts": ("rows", 3),
    "channels": ("feature_channels",),
}


def make_metadata(
    inputs: tuple[TensorInfo, ...],
    outputs: tuple[TensorInfo, ...],
    precision: str = "float16",
    controls: tuple[str, ...] = (),
) -> NetworkMetadata:
    return NetworkMetadata(
        format=FORMAT,
        checkpoint="one node",
        fingerprint="0" * 64,
        family="animatediff",
        precision=precision,
        opset=OPSET,
        controls=controls,
        tap=None,
        levels=1,
        positions=None,
        sites=(),
        inputs=inputs,
        outputs=outputs,
        versions={},
        checksum="",
    )


def write_one_node(
    path: Path, name: str, *, precision: str = "float16", heads: int = 2, d: int = 32
) -> NetworkMetadata:
    """A network that returns its latents, and what one node makes of other inputs."""
    node, width = NODES[name], heads * d
    axes = dict.fromkeys(node.inputs, (*_PLACES, width)) | _AXES
    if name.endswith("text"):
        axes |= dict.fromkeys(("key", "value"), ("rows", 1, "text_tokens", width))
    latents = TensorInfo("latents", precision, ("rows", 4, "frames", "height", "width"))
    inputs = (
        latents,
        *(TensorInfo(key, node.types[key] or precision, axes[key]) for key in node.inputs),
    )
    last = "feature_channels" if name == "motion_feature" else width
    outputs = (
        TensorInfo("prediction", precision, latents.axes),
        TensorInfo("out", precision, (*_PLACES, last)),
    )
    attributes = dict.fromkeys(node.attributes, heads)
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["latents"], ["prediction"]),
            helper.make_node(
                name,
                list(node.inputs),
                ["out"],
                domain=DOMAIN,
                plugin_namespace=DOMAIN,
                **attributes,
            ),
        ],
        "one_node",
        [helper.make_tensor_value_info(t.name, TYPES[t.dtype], t.axes) for t in inputs],
        [helper.make_tensor_value_info(t.name, TYPES[t.dtype], t.axes) for t in outputs],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)],
        functions=[function_of(node)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    controls = tuple(kind for kind in KINDS if kind in node.controls)
    metadata = make_metadata(inputs, outputs, precision, controls)
    metadata = type(metadata)(
        **{**vars(metadata), "checksum": checksum_of(model, metadata, path.parent)}
    )
    model.metadata_props.add(key=KEY, value=encode_metadata(metadata))
    path.write_bytes(model.SerializeToString())
    return metadata
