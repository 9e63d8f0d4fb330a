"""The nodes that an exported network has beside standard operators, and what each computes.

A node is an operator of PyTorch while a network is exported, so that it stays whole, and a node
of the ONNX domain `kinetiq` in the file, whose function body is in `kinetiq.export.functions`. It
has no optional inputs: which controls it reads is in its name, and `narrowed` says which node
stands for it where some of them are taken out. What a node computes is what the operators and
helpers of the eager network compute, which it calls.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from kinetiq.kernels.frame_attention import add_motion, frame_attention, mix
from kinetiq.kernels.motion_feature import motion_feature
from kinetiq.kernels.query_attention import query_attention, reduce_leak

DOMAIN = "kinetiq"
DOMAIN_VERSION = 1
KINDS = ("query", "reduced", "deviation", "motion", "lora", "skip")
"""The kinds of control that an exported network can carry; "reduced" needs "query"."""

_LIBRARY = "kinetiq_export"
_QUERY = ("query_row", "query_blend")
_REDUCED = "query_reduced"
_DEVIATION = ("deviation_row", "deviation_blend", "deviation_parts")
_TYPES = {  # of inputs that are not of the network's own type
    "query_row": "int64",
    "query_blend": "float32",
    "query_reduced": "float32",
    "deviation_row": "int64",
    "deviation_blend": "float32",
    "deviation_parts": "float32",
    "slot": "int64",
    "scale": "float32",
    "source": "float32",
    "gain": "float32",
    "channels": "int64",
}


@dataclass(frozen=True)
class Node:
    """One kind of node.

    Args:
        name: in the file, and as an operator of PyTorch.
        operator: what nodes that differ only in their controls have in common.
        controls: the kinds of control that it reads.
        inputs: in order.
        attributes: integers.
        compute: the result for real tensors; attributes are named.
        shape_of: makes an empty result.
    """

    name: str
    operator: str
    controls: frozenset[str]
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]
    compute: Callable[..., Tensor]
    shape_of: Callable[..., Tensor]

    @property
    def types(self) -> Mapping[str, str | None]:
        """The type of each input; None is the network's own."""
        return {name: _TYPES.get(name) for name in self.inputs}

    @property
    def call(self) -> Any:
        """The operator of PyTorch: inputs in order, then attributes in order."""
        return getattr(getattr(torch.ops, _LIBRARY), self.name).default

    def narrowed(self, controls: Collection[str]) -> "Node | None":
        """The node with only some of its controls; None where its first input stands for it."""
        left = self.controls.intersection(controls)
        if "query" not in left:
            left -= {"reduced"}
        for node in NODES.values():
            if node.operator == self.operator and node.controls == left:
                return node
        return None


def _attend_per_frame(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    query_row: Tensor | None = None,
    query_blend: Tensor | None = None,
    query_reduced: Tensor | None = None,
) -> Tensor:
    if query_reduced is not None and query_row is not None and query_blend is not None:
        query = _reduced(query, query_row, query_blend, query_reduced)
        query_row = query_blend = None
    return query_attention(
        query, key, value, heads=heads, query_row=query_row, query_blend=query_blend
    )


def _attend_over_frames(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    query_row: Tensor | None = None,
    query_blend: Tensor | None = None,
    query_reduced: Tensor | None = None,
    **deviation: Any,
) -> Tensor:
    if query_reduced is not None and query_row is not None and query_blend is not None:
        query, key, value = mix(query, key, value, **deviation)
        query = _reduced(query, query_row, query_blend, query_reduced)
        query_row = query_blend = None
        deviation = {}
    return frame_attention(
        query,
        key,
        value,
        heads=heads,
        query_row=query_row,
        query_blend=query_blend,
        **deviation,
    )


def _reduced(query: Tensor, row: Tensor, blend: Tensor, reduced: Tensor) -> Tensor:
    """Queries moved towards those of `row`, on a row's own mean over frames where `reduced`."""
    return torch.lerp(query, reduce_leak(query, row, reduced > 0), blend.to(query.dtype)[..., None])


def _add_motion(own: Tensor, slot: Tensor, scale: Tensor, bank: Tensor) -> Tensor:
    return add_motion(own, slot, scale, bank)


def _add_low_rank(
    projected: Tensor, given: Tensor, slot: Tensor, scale: Tensor, down: Tensor, up: Tensor
) -> Tensor:
    """`projected` + scale · up (down `given`), with each row's slot of `up` and `down`."""
    down, up = down.index_select(0, slot), up.index_select(0, slot)
    rank = given.flatten(1, -2) @ down.transpose(1, 2) * scale.to(given.dtype)[:, None, None]
    return projected + (rank @ up.transpose(1, 2)).view(projected.shape)


def _scale_skip(joined: Tensor, gain: Tensor, *, channels: int) -> Tensor:
    """The last channels of `joined`, a skip connection, times each row's gain."""
    rows = joined.unflatten(0, (len(gain), -1))
    kept, skipped = rows.split([rows.shape[2] - channels, channels], dim=2)
    strength = gain.to(joined.dtype)[:, None, None, None, None]
    return torch.cat([kept, skipped * strength], dim=2).flatten(0, 1)


def _reroute_skip(
    joined: Tensor, before: Tensor, source: Tensor, gain: Tensor, *, channels: int
) -> Tensor:
    """The same for one that starts at `before` by the share `source` of each row."""
    rows = joined.unflatten(0, (len(gain), -1))
    kept, skipped = rows.split([rows.shape[2] - channels, channels], dim=2)
    share, strength = (
        factor.to(joined.dtype)[:, None, None, None, None] for factor in (source, gain)
    )
    skipped = torch.lerp(skipped, before.unflatten(0, (len(gain), -1)), share)
    return torch.cat([kept, skipped * strength], dim=2).flatten(0, 1)


def _like_first(first: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(first, memory_format=torch.contiguous_format)


def _attention(name: str, controls: Collection[str]) -> Node:
    operator = "query_attention" if name.startswith("query_attention") else "frame_attention"
    inputs: tuple[str, ...] = ("query", "key", "value")
    inputs += _QUERY if "query" in controls else ()
    inputs += (_REDUCED,) if "reduced" in controls else ()
    inputs += _DEVIATION if "deviation" in controls else ()
    compute = _attend_per_frame if operator == "query_attention" else _attend_over_frames
    return Node(name, operator, frozenset(controls), inputs, ("heads",), compute, _like_first)


_ALL = (
    Node(
        "query_attention_text",
        "text_attention",
        frozenset(),
        ("query", "key", "value"),
        ("heads",),
        _attend_per_frame,
        _like_first,
    ),
    _attention("query_attention_plain", ()),
    _attention("query_attention", ("query",)),
    _attention("query_attention_reduced", ("query", "reduced")),
    _attention("frame_attention_plain", ()),
    _attention("frame_attention_query", ("query",)),
    _attention("frame_attention_query_reduced", ("query", "reduced")),
    _attention("frame_attention_deviation", ("deviation",)),
    _attention("frame_attention", ("query", "deviation")),
    _attention("frame_attention_reduced", ("query", "reduced", "deviation")),
    Node(
        "motion_feature",
        "motion_feature",
        frozenset(),
        ("x", "channels"),
        (),
        motion_feature,
        lambda x, channels: x.new_empty(*x.shape[:3], channels.shape[0]),
    ),
    Node(
        "motion_addition",
        "motion_addition",
        frozenset({"motion"}),
        ("own", "slot", "scale", "bank"),
        (),
        _add_motion,
        _like_first,
    ),
    Node(
        "low_rank_addition",
        "low_rank_addition",
        frozenset({"lora"}),
        ("projected", "given", "slot", "scale", "down", "up"),
        (),
        _add_low_rank,
        _like_first,
    ),
    Node(
        "skip_scaling",
        "skip_scaling",
        frozenset({"skip"}),
        ("joined", "gain"),
        ("channels",),
        _scale_skip,
        _like_first,
    ),
    Node(
        "skip_rerouting",
        "skip_rerouting",
        frozenset({"skip"}),
        ("joined", "before", "source", "gain"),
        ("channels",),
        _reroute_skip,
        _like_first,
    ),
)
NODES: Mapping[str, Node] = MappingProxyType({node.name: node for node in _ALL})
"""All nodes by name."""


def find_node(operator: str, controls: Collection[str]) -> Node:
    """The node of an operator that reads just these of the controls that it can read."""
    readable = frozenset().union(*(n.controls for n in NODES.values() if n.operator == operator))
    wanted = readable.intersection(controls)
    for node in NODES.values():
        if node.operator == operator and node.controls == wanted:
            return node
    raise KeyError((operator, tuple(wanted)))


def _register(node: Node) -> None:
    """Make a node an operator of PyTorch, which is opaque to export."""
    arguments = [*(f"Tensor {name}" for name in node.inputs)]
    arguments += [f"int {name}" for name in node.attributes]

    def run(*given: Any) -> Tensor:
        tensors = dict(zip(node.inputs, given, strict=False))
        return node.compute(**tensors, **_attributes(node, given))

    def fake(*given: Any) -> Tensor:
        return node.shape_of(*given[: len(node.inputs)])

    operator = torch.library.custom_op(
        f"{_LIBRARY}::{node.name}",
        run,
        mutates_args=(),
        schema=f"({', '.join(arguments)}) -> Tensor",
    )
    operator.register_fake(fake)


def _attributes(node: Node, given: tuple[Any, ...]) -> dict[str, int]:
    return dict(zip(node.attributes, given[len(node.inputs) :], strict=True))


for _node in _ALL:
    _register(_node)
