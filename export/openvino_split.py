"""Cutting the embedding of timesteps off a network, so that it runs in float32.

OpenVINO computes all of a graph in bfloat16 where it is told to compute products so. An angle of
hundreds of radians has no correct digit left in bfloat16, and the network would be told another
timestep.
"""

from dataclasses import dataclass
from typing import Any

_PRODUCTS = ("Gemm", "MatMul")
_TIMESTEPS = "timesteps"


@dataclass(frozen=True)
class SplitNetwork:
    """A network in two parts.

    Args:
        embedding: from timesteps to what the first product of them reads.
        rest: the network behind it, which has that as an input in the place of timesteps.
        joint: name of what the one returns and the other reads.
    """

    embedding: Any
    rest: Any
    joint: str


def split_timesteps(model: Any, element: int) -> SplitNetwork:
    """Cut an `onnx.ModelProto`, without functions, at the first product of its timesteps.

    Args:
        model: left as it is.
        element: type of what is cut, of `onnx.TensorProto`.
    """
    joint = _find_joint(model.graph)
    embedding, rest = type(model)(), type(model)()
    embedding.CopyFrom(model)
    rest.CopyFrom(model)
    del embedding.graph.output[:]
    embedding.graph.output.add(name=joint).type.tensor_type.elem_type = element
    _cut(embedding.graph)
    places = [node for node in rest.graph.node if joint in node.output]
    for node in places:
        rest.graph.node.remove(node)
    given = rest.graph.input.add(name=joint)
    given.type.tensor_type.elem_type = element
    for axis in ("rows", "embedding"):
        given.type.tensor_type.shape.dim.add(dim_param=axis)
    _cut(rest.graph)
    return SplitNetwork(embedding, rest, joint)


def _find_joint(graph: Any) -> str:
    """What the first product that depends on the timesteps multiplies."""
    reached = {_TIMESTEPS}
    for node in graph.node:
        found = reached.intersection(node.input)
        if found and node.op_type in _PRODUCTS:
            return str(node.input[0])
        if found and node.op_type != "Shape":
            reached.update(node.output)
    raise ValueError("the network must multiply an embedding of its timesteps, and does not")


def _cut(graph: Any) -> None:
    """Leave only what the outputs depend on; nodes are in the order in which they run."""
    wanted = {value.name for value in graph.output}
    given = {value.name for value in graph.input}
    kept = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    for field, values in (
        ("node", kept[::-1]),
        ("input", [value for value in graph.input if value.name in wanted & given]),
        ("initializer", [tensor for tensor in graph.initializer if tensor.name in wanted]),
    ):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        part = getattr(graph, field)
        del part[:]
        part.extend(copies)
