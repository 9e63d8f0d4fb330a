"""Taking kinds of control out of an exported network, so that they cost nothing.

A kind of control that no row of a batch uses is neutral in the graph with all kinds, but its nodes
run. Here each node that reads it becomes the node that does not (see `kinetiq.export.nodes`), or
vanishes where that is the identity; then what nobody reads any more is dropped, inputs included.
Weights are not touched, so that all graphs of a network share them.
"""

from collections.abc import Collection
from typing import Any

from kinetiq.errors import RequestError
from kinetiq.export.functions import function_of
from kinetiq.export.nodes import DOMAIN, NODES, Node


def keep_controls(
    model: Any, controls: Collection[str], *, outputs: Collection[str] | None = None
) -> Any:
    """The model with only these kinds of control.

    Args:
        model: an `onnx.ModelProto` of `export_onnx`; it is left as it is.
        controls: kinds to keep, all of which it has.
        outputs: names of those to keep; what only the others need is dropped. None: all.

    Returns:
        A model that names the same outside weights, without metadata, whose checksum it would not
        have.

    Raises:
        RequestError: the model does not have one of these kinds.
    """
    out = type(model)()
    out.CopyFrom(model)
    del out.metadata_props[:]
    del out.graph.value_info[:]  # shapes of what may be gone; runtimes infer them again
    _require_kinds(out, controls)
    replaced: dict[str, str] = {}
    nodes = []
    for node in out.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = replaced.get(name, name)
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        known = NODES[node.op_type]
        narrow = known.narrowed(controls)
        if narrow is None:
            replaced[node.output[0]] = node.input[0]
            continue
        _narrow(node, known, narrow)
        nodes.append(node)
    _keep_reachable(
        out.graph,
        nodes,
        [value for value in out.graph.output if outputs is None or value.name in outputs],
    )
    used = sorted({node.op_type for node in out.graph.node if node.domain == DOMAIN})
    del out.functions[:]
    out.functions.extend(function_of(NODES[name]) for name in used)
    return out


def _require_kinds(model: Any, controls: Collection[str]) -> None:
    carried = {
        kind
        for node in model.graph.node
        if node.domain == DOMAIN
        for kind in NODES[node.op_type].controls
    }
    missing = sorted(set(controls) - carried)
    if missing:
        raise RequestError(
            f"network: controls must be among those that it was exported with, "
            f"{', '.join(sorted(carried)) or 'none'}, got {', '.join(missing)}"
        )


def _narrow(node: Any, known: Node, narrow: Node) -> None:
    """Turn a node of the graph into one that reads fewer controls."""
    given = dict(zip(known.inputs, node.input, strict=True))
    node.op_type = narrow.name
    del node.input[:]
    node.input.extend(given[name] for name in narrow.inputs)


def _keep_reachable(graph: Any, nodes: list[Any], outputs: list[Any]) -> None:
    """Leave only what the outputs depend on; nodes are in the order in which they run."""
    wanted = {value.name for value in outputs}
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    parts = {
        "node": kept[::-1],
        "input": [value for value in graph.input if value.name in wanted],
        "initializer": [tensor for tensor in graph.initializer if tensor.name in wanted],
        "output": outputs,
    }
    for name, values in parts.items():
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        field = getattr(graph, name)
        del field[:]
        field.extend(copies)
