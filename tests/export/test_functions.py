"""The function body of each node computes what the node's own definition does."""

import functools
import warnings
import zlib

import numpy as np
import pytest
import torch
from closeness import assert_as_good_as

onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")

from kinetiq.export.functions import OPSET, function_of, translations  # noqa: E402
from kinetiq.export.nodes import DOMAIN, KINDS, NODES, find_node  # noqa: E402

HEADS = 2
SHAPES = {  # rows, frames, positions, channels of a head
    "one": (1, 1, 1, 1),
    "odd": (3, 5, 7, 3),
    "wide": (2, 4, 33, 40),
}
TYPES = {"float32": torch.float32, "float16": torch.float16}
ELEMENTS = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.int64: onnx.TensorProto.INT64,
}
TOKENS, RANK, SLOTS, SKIPPED = 6, 2, 3, 2


def draw(node, shape, dtype):
    """Inputs of a node, by name, with controls that are neither neutral nor alike in all rows."""
    rows, frames, positions, d = shape
    width = HEADS * d
    generator = torch.Generator().manual_seed(zlib.crc32(f"{node.name} {shape}".encode()))
    normal = functools.partial(torch.randn, generator=generator)
    uniform = functools.partial(torch.rand, generator=generator)
    text = node.operator == "text_attention"
    keys = (rows, 1, TOKENS, width) if text else (rows, frames, positions, width)
    joined = (rows * frames, 5, positions, 2)
    sizes = {
        "query": (rows, frames, positions, width),
        "key": keys,
        "value": keys,
        "x": (rows, frames, positions, width),
        "own": (rows, frames, positions, width),
        "bank": (SLOTS, frames, 1 if rows == 3 else positions, width),
        "projected": (rows, frames, positions, width + 1),
        "given": (rows, frames, positions, width),
        "down": (SLOTS, RANK, width),
        "up": (SLOTS, width + 1, RANK),
        "joined": joined,
        "before": (joined[0], SKIPPED, *joined[2:]),
    }
    turned = (torch.arange(rows) + 1) % rows
    controls = {
        "query_row": turned,
        "deviation_row": turned.flip(0),
        "query_blend": uniform(rows, frames, positions),
        "deviation_blend": uniform(rows, frames, positions),
        "deviation_parts": uniform(rows, 3),
        "query_reduced": (torch.arange(rows) % 2 == 0).float(),
        "slot": torch.arange(rows) % SLOTS,
        "scale": normal(rows),
        "source": uniform(rows),
        "gain": 1 + uniform(rows),
        "channels": torch.tensor([width - 1, 0]),
    }
    return {
        name: controls[name] if name in controls else normal(sizes[name]).to(dtype)
        for name in node.inputs
    }


def settings(node):
    known = {"heads": HEADS, "channels": SKIPPED}
    return {name: known[name] for name in node.attributes}


def model_of(node, inputs):
    """A model of one node; `inputs` say its types and ranks."""
    kind = ELEMENTS[inputs[node.inputs[0]].dtype]
    dynamic = {name: [None] * tensor.ndim for name, tensor in inputs.items()}
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node(
                node.name,
                node.inputs,
                ["out"],
                domain=DOMAIN,
                plugin_namespace=DOMAIN,
                **settings(node),
            )
        ],
        "one_node",
        [
            onnx.helper.make_tensor_value_info(name, ELEMENTS[inputs[name].dtype], axes)
            for name, axes in dynamic.items()
        ],
        [onnx.helper.make_tensor_value_info("out", kind, dynamic[node.inputs[0]])],
    )
    model = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, 1)],
        functions=[function_of(node)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def run(node, inputs):
    session = onnxruntime.InferenceSession(
        model_of(node, inputs).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    given = {name: tensor.numpy() for name, tensor in inputs.items()}
    return torch.from_numpy(np.asarray(session.run(None, given)[0]))


def defined(node, inputs, dtype):
    given = {
        name: tensor.to(dtype) if node.types[name] is None else tensor
        for name, tensor in inputs.items()
    }
    return node.compute(**given, **settings(node))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NODES)
def test_function_agrees_with_the_definition(name, shape, dtype):
    node = NODES[name]
    inputs = draw(node, SHAPES[shape], TYPES[dtype])
    got = run(node, inputs)
    exact = defined(node, inputs, torch.float64)
    naive = defined(node, inputs, TYPES[dtype])
    assert_as_good_as(got, naive, exact, slack=4.0, name=name)


@pytest.mark.parametrize("name", [node.name for node in NODES.values() if node.controls])
def test_neutral_controls_leave_the_narrower_node(name):
    """With each row reading itself, or nothing added, a node is the one without controls."""
    node = NODES[name]
    inputs = draw(node, SHAPES["odd"], torch.float32)
    rows = SHAPES["odd"][0]
    neutral = {
        "query_row": torch.arange(rows),
        "deviation_row": torch.arange(rows),
        "slot": torch.zeros(rows, dtype=torch.int64),
        "scale": torch.full((rows,), float("nan"))
        if name == "motion_addition"
        else torch.zeros(rows),
        "source": torch.zeros(rows),
        "gain": torch.ones(rows),
    }
    inputs |= {key: value for key, value in neutral.items() if key in inputs}
    narrow = node.narrowed(())
    if narrow is None:
        expected = inputs[node.inputs[0]]
    else:
        expected = run(narrow, {key: inputs[key] for key in narrow.inputs})
    assert torch.equal(run(node, inputs), expected)


def test_a_motion_that_is_not_used_may_hold_anything():
    node = NODES["motion_addition"]
    inputs = draw(node, SHAPES["odd"], torch.float32)
    inputs["bank"][0] = float("nan")
    assert inputs["slot"][0] == 0
    assert torch.equal(run(node, inputs)[0], inputs["own"][0])


def test_nodes_are_found_by_what_they_read():
    assert find_node("frame_attention", KINDS).name == "frame_attention_reduced"
    assert find_node("frame_attention", ("deviation", "lora")).name == "frame_attention_deviation"
    assert NODES["frame_attention_reduced"].narrowed(("query",)).name == "frame_attention_query"
    assert NODES["frame_attention_reduced"].narrowed(("reduced",)).name == "frame_attention_plain"
    assert NODES["skip_scaling"].narrowed(("query",)) is None


class _Repeat(torch.nn.Module):
    def __init__(self, axis):
        super().__init__()
        self.axis = axis

    def forward(self, values, counted):
        return values.repeat_interleave(counted.shape[0], dim=self.axis)


@pytest.mark.parametrize("axis", [0, 1])
def test_repeats_of_a_number_that_is_not_known_are_in_order(axis, tmp_path):
    pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")
    path = tmp_path / "repeat.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of names it deprecates itself
        program = torch.onnx.export(
            _Repeat(axis),
            (torch.zeros(2, 3, 4), torch.zeros(5)),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: "rows"}, {0: "frames"}),
            custom_translation_table=translations(),
            verbose=False,
        )
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    for rows, frames in ((1, 4), (3, 3), (3, 2)):
        values = torch.randn(rows, 3, 4, generator=torch.Generator().manual_seed(rows))
        given = dict(zip(names, (values.numpy(), np.zeros(frames, np.float32)), strict=True))
        expected = values.repeat_interleave(frames, dim=axis)
        assert torch.equal(torch.from_numpy(session.run(None, given)[0]), expected)
