"""The network that an engine is built from: as it was exported, or with fewer controls."""

import os
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from kinetiq.errors import RequestError
from kinetiq.export.metadata import NetworkMetadata, read_network
from kinetiq.export.network import check_kinds
from kinetiq.export.nodes import DOMAIN
from kinetiq.export.specialisation import keep_controls

_NAMESPACE = "plugin_namespace"


def read_source(
    path: str | os.PathLike[str],
    controls: Collection[str] | None,
    *,
    unusual: Collection[str] = (),
    outputs: Collection[str] | None = None,
) -> tuple[Any, NetworkMetadata]:
    """The `onnx.ModelProto` with only these controls and outputs, and what it is then.

    Args:
        path: an ONNX file of `export_onnx`.
        controls: kinds to keep; None: all that it has, but the unusual.
        unusual: kinds that are kept only where they are asked for.
        outputs: names of those to keep; None: all.

    Raises:
        CheckpointError: the file cannot be used.
        RequestError: it has not all of these kinds or outputs.
    """
    model, metadata = read_network(path)
    if controls is None:
        kinds = tuple(kind for kind in metadata.controls if kind not in unusual)
    else:
        kinds = check_kinds(controls)
    every = [tensor.name for tensor in metadata.outputs]
    unknown = [] if outputs is None else sorted(set(outputs).difference(every))
    if unknown:
        raise RequestError(
            f"export: outputs must be among {', '.join(every)}, got {', '.join(unknown)}"
        )
    if kinds == metadata.controls and outputs is None:
        return model, metadata
    kept = keep_controls(model, kinds, outputs=outputs)
    read, written = (
        {value.name for value in values} for values in (kept.graph.input, kept.graph.output)
    )
    return kept, replace(
        metadata,
        controls=kinds,
        tap=metadata.tap if "features" in written else None,
        inputs=tuple(tensor for tensor in metadata.inputs if tensor.name in read),
        outputs=tuple(tensor for tensor in metadata.outputs if tensor.name in written),
    )


def leave_to_functions(model: Any, names: Collection[str]) -> None:
    """Take from nodes of these names, in place, what lets a parser look for a plugin."""
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type in names:
            others = [given for given in node.attribute if given.name != _NAMESPACE]
            del node.attribute[:]
            node.attribute.extend(others)


def node_names(model: Any) -> set[str]:
    """Names of the nodes of our domain that a network has."""
    return {node.op_type for node in model.graph.node if node.domain == DOMAIN}
