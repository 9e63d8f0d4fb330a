"""What each node computes, as a function of standard ONNX operators that the file carries.

A runtime that has no plugin of a node's name runs its function. All use the standard `Attention`,
for which runtimes have fused kernels. Blends are applied as x + blend (y - x), which leaves a row
that reads its own as it is, bit for bit. Functions have no types, so each serves all precisions.

The exporter for `repeat_interleave` stands here too: see `repeat_interleave`.
"""

from collections.abc import Callable
from typing import Any

import torch

from kinetiq.export.nodes import DOMAIN, DOMAIN_VERSION, NODES, Node

OPSET = 23
"""The least opset that has `Attention`."""

_SHAPES = """
    minus_one = Constant <value_ints = [-1]> ()
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
"""
_CHOOSE = """
    chosen_other = Gather <axis = 0> ({own}, query_row)
    chosen_last = Unsqueeze (query_blend, minus_one)
    chosen_share = CastLike (chosen_last, {own})
    chosen_change = Sub (chosen_other, {own})
    chosen_moved = Mul (chosen_share, chosen_change)
    chosen = Add ({own}, chosen_moved)
"""
_CHOOSE_REDUCED = """
    chosen_mean = ReduceMean <keepdims = 1> ({own}, one)
    chosen_row = Gather <axis = 0> ({own}, query_row)
    chosen_row_mean = Gather <axis = 0> (chosen_mean, query_row)
    chosen_offset = Sub (chosen_mean, chosen_row_mean)
    chosen_axes = Constant <value_ints = [1, 2, 3]> ()
    chosen_wide = Unsqueeze (query_reduced, chosen_axes)
    chosen_kept = CastLike (chosen_wide, {own})
    chosen_lift = Mul (chosen_kept, chosen_offset)
    chosen_other = Add (chosen_row, chosen_lift)
    chosen_last = Unsqueeze (query_blend, minus_one)
    chosen_share = CastLike (chosen_last, {own})
    chosen_change = Sub (chosen_other, {own})
    chosen_moved = Mul (chosen_share, chosen_change)
    chosen = Add ({own}, chosen_moved)
"""
_DEVIATE = """
    {own}_index = Constant <value_ints = [{part}]> ()
    {own}_part = Gather <axis = 1> (deviation_parts, {own}_index)
    {own}_part_wide = Unsqueeze ({own}_part, minus_one)
    {own}_amount = Mul (deviation_blend, {own}_part_wide)
    {own}_amount_last = Unsqueeze ({own}_amount, minus_one)
    {own}_share = CastLike ({own}_amount_last, {own})
    {own}_mean = ReduceMean <keepdims = 1> ({own}, one)
    {own}_deviation = Sub ({own}, {own}_mean)
    {own}_other = Gather <axis = 0> ({own}_deviation, deviation_row)
    {own}_change = Sub ({own}_other, {own}_deviation)
    {own}_moved = Mul ({own}_share, {own}_change)
    {own}_deviated = Add ({own}, {own}_moved)
"""
_PER_FRAME = """
    shape = Shape (query)
    sizes = Shape <start = 2> (query)
    flat = Concat <axis = 0> (minus_one, sizes)
    key_sizes = Shape <start = 2> (key)
    key_flat = Concat <axis = 0> (minus_one, key_sizes)
    flat_query = Reshape ({query}, flat)
    flat_key = Reshape (key, key_flat)
    flat_value = Reshape (value, key_flat)
    attended = Attention <q_num_heads: int = @heads, kv_num_heads: int = @heads>
        (flat_query, flat_key, flat_value)
    out = Reshape (attended, shape)
"""
_PER_ROW = """
    shape = Shape (query)
    channels = Shape <start = 3> (query)
    flat = Concat <axis = 0> (zero, minus_one, channels)
    flat_query = Reshape (query, flat)
    flat_key = Squeeze (key, one)
    flat_value = Squeeze (value, one)
    attended = Attention <q_num_heads: int = @heads, kv_num_heads: int = @heads>
        (flat_query, flat_key, flat_value)
    out = Reshape (attended, shape)
"""
_OVER_FRAMES = """
    turned_query = Transpose <perm = [0, 2, 1, 3]> ({query})
    turned_key = Transpose <perm = [0, 2, 1, 3]> ({key})
    turned_value = Transpose <perm = [0, 2, 1, 3]> ({value})
    shape = Shape (turned_query)
    sizes = Shape <start = 2> (turned_query)
    flat = Concat <axis = 0> (minus_one, sizes)
    flat_query = Reshape (turned_query, flat)
    flat_key = Reshape (turned_key, flat)
    flat_value = Reshape (turned_value, flat)
    attended = Attention <q_num_heads: int = @heads, kv_num_heads: int = @heads>
        (flat_query, flat_key, flat_value)
    turned = Reshape (attended, shape)
    out = Transpose <perm = [0, 2, 1, 3]> (turned)
"""
_FEATURE = """
    chosen = Gather <axis = 3> (x, channels)
    mean = ReduceMean <keepdims = 1> (chosen, one)
    out = Sub (chosen, mean)
"""
_MOTION = """
    axes = Constant <value_ints = [1, 2, 3]> ()
    bias = Gather <axis = 0> (bank, slot)
    nothing = Constant <value_int = 0> ()
    used = Greater (slot, nothing)
    used_wide = Unsqueeze (used, axes)
    silence = Constant <value_float = 0.0> ()
    bias_wide = Cast <to = 1> (bias)
    bias_used = Where (used_wide, bias_wide, silence)
    scale_used = Where (used, scale, silence)
    scale_wide = Unsqueeze (scale_used, axes)
    scaled = Mul (bias_used, scale_wide)
    own_wide = Cast <to = 1> (own)
    sum = Add (own_wide, scaled)
    out = CastLike (sum, own)
"""
_LOW_RANK = """
    width = Shape <start = 3> (given)
    flat = Concat <axis = 0> (zero, minus_one, width)
    flat_given = Reshape (given, flat)
    row_down = Gather <axis = 0> (down, slot)
    row_up = Gather <axis = 0> (up, slot)
    turned_down = Transpose <perm = [0, 2, 1]> (row_down)
    turned_up = Transpose <perm = [0, 2, 1]> (row_up)
    axes = Constant <value_ints = [1, 2]> ()
    scale_wide = Unsqueeze (scale, axes)
    scale_like = CastLike (scale_wide, given)
    product = MatMul (flat_given, turned_down)
    rank = Mul (product, scale_like)
    change = MatMul (rank, turned_up)
    shape = Shape (projected)
    shaped = Reshape (change, shape)
    out = Add (projected, shaped)
"""
_SPLIT = """
    shape = Shape (joined)
    rows = Shape (gain)
    inner = Shape <start = 1> (joined)
    by_row = Concat <axis = 0> (rows, minus_one, inner)
    joined_rows = Reshape (joined, by_row)
    skip_channels = Constant <value_int: int = @channels> ()
    width = Reshape (skip_channels, one)
    all_channels = Shape <start = 1, end = 2> (joined)
    kept_channels = Sub (all_channels, width)
    lengths = Concat <axis = 0> (kept_channels, width)
    kept, skipped = Split <axis = 2> (joined_rows, lengths)
    axes = Constant <value_ints = [1, 2, 3, 4]> ()
    gain_wide = Unsqueeze (gain, axes)
    strength = CastLike (gain_wide, joined)
"""
_JOIN = """
    stronger = Mul ({skipped}, strength)
    both = Concat <axis = 2> (kept, stronger)
    out = Reshape (both, shape)
"""
_REROUTE = """
    before_inner = Shape <start = 1> (before)
    before_shape = Concat <axis = 0> (rows, minus_one, before_inner)
    before_rows = Reshape (before, before_shape)
    source_wide = Unsqueeze (source, axes)
    share = CastLike (source_wide, joined)
    change = Sub (before_rows, skipped)
    moved = Mul (share, change)
    rerouted = Add (skipped, moved)
"""


def function_of(node: Node) -> Any:
    """The `onnx.FunctionProto` of a node."""
    import onnx.parser

    attributes = ", ".join((*node.attributes, "plugin_namespace"))
    text = (
        f'<opset_import: ["": {OPSET}], domain: "{DOMAIN}">\n'
        f"{node.name} <{attributes}> ({', '.join(node.inputs)}) => (out) {{{_SHAPES}{_body(node)}}}"
    )
    function = onnx.parser.parse_function(text)
    _drop_unused(function)
    return function


def _body(node: Node) -> str:
    if node.operator == "query_attention":
        return _choice(node, "query") + _PER_FRAME.format(query=_chosen(node, "query"))
    if node.operator == "frame_attention":
        return _over_frames(node)
    return {
        "text_attention": _PER_ROW,
        "motion_feature": _FEATURE,
        "motion_addition": _MOTION,
        "low_rank_addition": _LOW_RANK,
        "skip_scaling": _SPLIT + _JOIN.format(skipped="skipped"),
        "skip_rerouting": _SPLIT + _REROUTE + _JOIN.format(skipped="rerouted"),
    }[node.operator]


def _over_frames(node: Node) -> str:
    """Deviations move before queries are chosen, as in `frame_attention`."""
    names = {name: name for name in ("query", "key", "value")}
    deviated = ""
    if "deviation" in node.controls:
        for part, own in enumerate(names):
            deviated += _DEVIATE.format(own=own, part=part)
        names = {name: f"{name}_deviated" for name in names}
    choice = _choice(node, names["query"])
    names["query"] = _chosen(node, names["query"])
    return deviated + choice + _OVER_FRAMES.format(**names)


def _choice(node: Node, own: str) -> str:
    if "query" not in node.controls:
        return ""
    return (_CHOOSE_REDUCED if "reduced" in node.controls else _CHOOSE).format(own=own)


def _chosen(node: Node, own: str) -> str:
    return "chosen" if "query" in node.controls else own


def _drop_unused(function: Any) -> None:
    """Take constants out that the body does not read."""
    read = {name for node in function.node for name in node.input}
    for node in list(function.node):
        if node.op_type == "Constant" and node.output[0] not in read:
            function.node.remove(node)


def translations() -> dict[Any, Callable[..., Any]]:
    """How the exporter writes our operators, and the one that it writes wrongly."""
    table = {node.call: _translation(node) for node in NODES.values()}
    return {**table, torch.ops.aten.repeat_interleave.self_int: repeat_interleave}


def _translation(node: Node) -> Callable[..., Any]:
    """Write an operator as one node, whose function is attached to the model afterwards."""
    import onnx
    from onnxscript import values

    kinds = onnx.defs.OpSchema
    own = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    fixed = {"int64": "tensor(int64)", "float32": "tensor(float)"}
    schema = kinds(
        node.name,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[
            kinds.FormalParameter(name, "T" if kind is None else fixed[kind])
            for name, kind in node.types.items()
        ],
        outputs=[kinds.FormalParameter("out", "T")],
        attributes=[
            *(kinds.Attribute(name, kinds.AttrType.INT, "") for name in node.attributes),
            kinds.Attribute("plugin_namespace", kinds.AttrType.STRING, ""),
        ],
        type_constraints=[("T", own, "")],
    )
    operator = values.Op(values.Opset(DOMAIN, DOMAIN_VERSION), node.name, schema)

    def write(*given: Any) -> Any:
        tensors, attributes = given[: len(node.inputs)], given[len(node.inputs) :]
        return operator(
            *tensors,
            **dict(zip(node.attributes, attributes, strict=True)),
            plugin_namespace=DOMAIN,
        )

    return write


def repeat_interleave(
    tensor: Any, repeats: Any, dim: int | None = None, output_size: object = None
) -> Any:
    """Write `aten::repeat_interleave.self_int`.

    onnxscript 0.7.2 gives `Expand` the repeats before the axis where `dim` is 0 and the number of
    repeats is not known, so more than one row comes out wrong. To drop once a release writes
    [rows, repeats, ...].
    """
    from onnxscript import opset18

    op: Any = opset18  # its types are those of single tensors

    rank = len(tensor.shape)
    axis = 0 if dim is None else dim % rank
    known = isinstance(repeats, int)
    count = (
        op.Constant(value_ints=[repeats])
        if known
        else op.Reshape(repeats, op.Constant(value_ints=[-1]))
    )
    ones = [
        op.Constant(value_ints=[1] * length) for length in (axis + 1, rank - axis - 1) if length
    ]
    target = op.Concat(ones[0], count, *ones[1:], axis=0)
    repeated = op.Expand(op.Unsqueeze(tensor, op.Constant(value_ints=[axis + 1])), target)
    sizes = [op.Constant(value_ints=[-1])]
    if axis:
        sizes.insert(0, op.Shape(tensor, start=0, end=axis))
    if axis + 1 < rank:
        sizes.append(op.Shape(tensor, start=axis + 1))
    return op.Reshape(repeated, op.Concat(*sizes, axis=0) if len(sizes) > 1 else sizes[0])
