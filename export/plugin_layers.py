"""Layers that TensorRT may run by our kernels, and what it passes to the kernel of each.

TensorRT launches a plugin's kernel with its input pointers, then integers that are expressions of
the shapes, then its output pointers. Our kernels take their arguments in that order. What is
written here beside them is which integer comes from which axis; that it is what the operator's own
launch would have passed is checked whenever a kernel is compiled.

Tensors of a plugin are contiguous, so all strides follow from the lengths of the axes. A length
that cannot change is an integer, and what is made of integers alone is a constant of the kernel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kinetiq.export.nodes import NODES


class Size(Protocol):
    """The length of an axis that may change: TensorRT has expressions of these."""

    def __add__(self, other: int, /) -> "Size":
        """The sum."""
        ...

    def __mul__(self, other: Any, /) -> "Size":  # an integer or another length
        """The product."""
        ...

    def __floordiv__(self, other: int, /) -> "Size":
        """The quotient, rounded down."""
        ...


Length = int | Size
Axes = Mapping[str, Sequence[Length]]  # of each input, by the operator's argument


@dataclass(frozen=True)
class PluginKind:
    """A kind of node that may become a plugin.

    Args:
        name: of the node and of the plugin.
        operator: of `kinetiq.kernels`, whose kernel runs it.
        inputs: which of the operator's arguments the node has, in its order.
        attributes: which further ones; all are integers.
        shared: inputs that have one frame, which is there for all.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]
    shared: frozenset[str] = frozenset()


_OPERATORS = {  # whose kernel runs a node; others have no kernel that does all that they say
    "query_attention_text": "query_attention",
    "query_attention_plain": "query_attention",
    "query_attention": "query_attention",
    "frame_attention_plain": "frame_attention",
    "frame_attention_query": "frame_attention",
    "frame_attention_deviation": "frame_attention",
    "frame_attention": "frame_attention",
    "motion_feature": "motion_feature",
}
_SHARED = {"query_attention_text": frozenset({"key", "value"})}
KINDS: Mapping[str, PluginKind] = {
    name: PluginKind(
        name, operator, NODES[name].inputs, NODES[name].attributes, _SHARED.get(name, frozenset())
    )
    for name, operator in _OPERATORS.items()
}


@dataclass(frozen=True)
class Operand:
    """One input of a layer.

    Args:
        type: "fp32", "fp16", "bf16" or "i64".
        largest: the longest that each axis may be.
        fixed: of each axis, whether it has no other length.
    """

    type: str
    largest: tuple[int, ...]
    fixed: tuple[bool, ...]


@dataclass(frozen=True)
class Layer:
    """One layer, as far as it must be known to compile its kernel.

    Args:
        operator: of `kinetiq.kernels`.
        operands: by the operator's argument, in the order of the node's inputs.
        heads: number of attention heads; 1 for an operator that has none.
    """

    operator: str
    operands: Mapping[str, Operand]
    heads: int = 1


def result_axes(operator: str, axes: Axes) -> list[Length]:
    """The axes of the layer's output."""
    if operator == "motion_feature":
        return [*axes["x"][:3], axes["channels"][0]]
    return list(axes["query"])


def integers(operator: str, axes: Axes, constants: Mapping[str, Any]) -> dict[str, Length]:
    """The integer arguments of an operator's kernel, by name.

    Args:
        operator: of `kinetiq.kernels`.
        axes: the lengths of the inputs' axes.
        constants: block sizes, on which some of the integers depend.
    """
    if operator == "motion_feature":
        return _of_motion_feature(axes, constants)
    return _of_query_attention(axes) if operator == "query_attention" else _of_frame_attention(axes)


def programs(operator: str, axes: Axes, constants: Mapping[str, Any]) -> Length:
    """How many programs a launch has, all on the first axis of its grid."""
    if operator == "motion_feature":
        return _product(axes["x"][0], _of_motion_feature(axes, constants)["blocks"])
    rows, frames, tokens, _ = axes["query"]
    heads = constants["HEADS"]
    if operator == "query_attention":
        return _product(_parts(tokens, constants["BLOCK_M"]), heads, frames, rows)
    return _product(_parts(_product(tokens, heads), constants["BLOCK"]), rows)


def _of_query_attention(axes: Axes) -> dict[str, Length]:
    names = ("row", "frame", "key", "column")
    shared = _is_one(axes["key"][1]) and not _is_one(axes["query"][1])
    return {
        "frames": axes["query"][1],
        "tokens": axes["query"][2],
        "keys": axes["key"][2],
        "entries": 1,  # rows whose keys are seen: the own
        **_strides("query", axes["query"], ("row", "frame", "token", "column")),
        **_strides("key", axes["key"], names, shared=shared),
        **_strides("value", axes["value"], names, shared=shared),
        "mask_by_row": 0,
        "mask_by_frame": 0,
    }


def _of_frame_attention(axes: Axes) -> dict[str, Length]:
    names = ("row", "frame", "token", "channel")
    found: dict[str, Length] = {
        "frames": axes["query"][1],
        "tokens": axes["query"][2],
        "channels": 0,  # of a projection, which a layer does not have
    }
    for tensor in ("query", "key", "value"):
        found |= _strides(tensor, axes[tensor], names)
    return found


def _of_motion_feature(axes: Axes, constants: Mapping[str, Any]) -> dict[str, Length]:
    _, frames, tokens, width = axes["x"]
    chosen = axes["channels"][0]
    elements = _product(tokens, chosen)
    strides = _strides("x", axes["x"], ("row", "frame", "token", "channel"))
    return {
        "frames": frames,
        "elements": elements,
        "chosen": chosen,
        "width": width,
        **{name.replace("_by_", "_"): stride for name, stride in strides.items()},
        "blocks": _parts(elements, constants["BLOCK"]),
    }


def _strides(
    tensor: str, axes: Sequence[Length], names: Sequence[str], *, shared: bool = False
) -> dict[str, Length]:
    """Strides of a contiguous tensor; keys of one frame that are there for all have stride 0."""
    _, frames, places, width = axes
    row, frame, place, column = (f"{tensor}_by_{name}" for name in names)
    return {
        row: _product(frames, places, width),
        frame: 0 if shared else _product(places, width),
        place: width,
        column: 1,
    }


def _is_one(length: Length) -> bool:
    return isinstance(length, int) and length == 1  # another cannot be compared yet


def _product(*factors: Length) -> Length:
    """The product, with the integers last: they cannot be on the left of a length."""
    known = 1
    found: Size | None = None
    for factor in factors:
        if isinstance(factor, int):
            known *= factor
        else:
            found = factor if found is None else found * factor
    return known if found is None else found * known


def _parts(length: Length, size: int) -> Length:
    """How many parts of `size` cover a length."""
    return (length + (size - 1)) // size
