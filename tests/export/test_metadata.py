"""An exported file is read only if it is what was written, weights included."""

import json
from dataclasses import replace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed")

from kinetiq.errors import CheckpointError  # noqa: E402
from kinetiq.export.metadata import (  # noqa: E402
    FORMAT,
    KEY,
    NetworkMetadata,
    TensorInfo,
    checksum_of,
    decode_metadata,
    encode_metadata,
    level_tokens,
    read_metadata,
    tap_level,
)
from kinetiq.families import Site, SiteKind  # noqa: E402

METADATA = NetworkMetadata(
    format=FORMAT,
    checkpoint="sprites",
    fingerprint="ab" * 32,
    family="animatediff",
    precision="float32",
    opset=23,
    controls=("query", "skip"),
    tap=None,
    levels=3,
    positions=32,
    sites=(Site("mid_block.attn1", SiteKind.SPATIAL, "mid", 16),),
    inputs=(TensorInfo("x", "float32", ("rows", 4)),),
    outputs=(TensorInfo("y", "float32", ("rows", 4)),),
    versions={"torch": "2"},
    checksum="",
)


def write(folder):
    """A model of one addition whose weights lie beside it, with right metadata."""
    weights = onnx.numpy_helper.from_array(np.ones((64, 4), np.float32), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "w"], ["y"])],
        "small",
        [onnx.helper.make_tensor_value_info("x", 1, ["rows", 4])],
        [onnx.helper.make_tensor_value_info("y", 1, ["rows", 4])],
        [weights],
    )
    path = folder / "net.onnx"
    onnx.save(
        onnx.helper.make_model(graph),
        path,
        save_as_external_data=True,
        location="net.onnx.data",
        size_threshold=0,
    )
    model = onnx.load(path, load_external_data=False)
    metadata = replace(METADATA, checksum=checksum_of(model, METADATA, folder))
    model.metadata_props.add(key=KEY, value=encode_metadata(metadata))
    path.write_bytes(model.SerializeToString())
    return path, metadata


def test_what_was_written_is_read(tmp_path):
    path, metadata = write(tmp_path)
    assert read_metadata(path) == metadata
    assert read_metadata(str(path)).sites[0].kind is SiteKind.SPATIAL


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("checkpoint", None, "checkpoint must be str, got None"),
        ("fingerprint", 5, "fingerprint must be str, got 5"),
        ("opset", "23", "opset must be int, got '23'"),
        ("controls", [5], "controls must be str, got 5"),
        ("controls", 5, "not iterable"),
        ("tap", 5, r"tap must be str \| None, got 5"),
        ("tap", "up_blocks.x", "'x'"),
        ("levels", "3", "levels must be int, got '3'"),
        ("levels", True, "levels must be int, got True"),
        ("levels", 0, "levels must be from 1 to 16, got 0"),
        ("levels", 10**9, "levels must be from 1 to 16, got 1000000000"),
        ("positions", 0, "positions must be at least 1, got 0"),
        ("positions", 1.5, r"positions must be int \| None, got 1.5"),
        ("sites", [{"name": 5, "kind": "spatial", "place": "mid", "width": 16}], "name must be st"),
        ("sites", [5], "not a mapping"),
        ("inputs", [{"name": "x", "dtype": "float32", "axes": [1.5]}], r"axes must be str \| int"),
        ("outputs", [{"name": 5, "dtype": "float32", "axes": []}], "name must be str, got 5"),
        ("versions", [], "versions must be .*Mapping.*, got "),
        ("versions", {"torch": 2}, r"versions\.torch must be str, got 2"),
        ("checksum", ["a"], r"checksum must be str, got \['a'\]"),
    ],
)
def test_metadata_of_other_types_is_refused(name, value, words):
    said = json.loads(encode_metadata(METADATA)) | {name: value}
    with pytest.raises(CheckpointError, match=rf"^net: its metadata must be .*{words}.* again$"):
        decode_metadata(json.dumps(said), "net")


def test_metadata_of_endless_depth_is_refused():
    with pytest.raises(CheckpointError, match=r"^net: its metadata must be .* again$"):
        decode_metadata("[" * 100_000, "net")


@pytest.mark.parametrize("path", ["a\0b", "", "/", 5, None, "\ud800"])
def test_what_is_no_path_of_a_network_is_refused(path):
    with pytest.raises(CheckpointError, match=r"^network: must be the path of a file, got "):
        read_metadata(path)


def test_a_folder_and_what_is_missing_are_no_networks(tmp_path):
    for path, words in ((tmp_path, "Is a directory"), (tmp_path / "no.onnx", "No such file or")):
        with pytest.raises(CheckpointError, match=rf"cannot be read: {words}.*; name the file"):
            read_metadata(path)


def edit(path, change):
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.graph.node[0], "op_type", "Mul"),
        lambda model: setattr(model.opset_import[0], "version", 22),
        lambda model: setattr(model.graph.initializer[0].external_data[1], "value", "16"),
        lambda model: model.functions.add(name="f", domain="kinetiq"),
        lambda model: setattr(
            model.metadata_props[0],
            "value",
            model.metadata_props[0].value.replace('"levels":3', '"levels":4'),
        ),
    ],
    ids=["node", "opset", "offset", "function", "metadata"],
)
def test_a_changed_file_is_refused(tmp_path, change):
    path, _ = write(tmp_path)
    edit(path, change)
    with pytest.raises(CheckpointError, match=r"(its checksum must be|are cut off)"):
        read_metadata(path)


def test_changed_missing_or_shorter_weights_are_refused(tmp_path):
    path, _ = write(tmp_path)
    weights = tmp_path / "net.onnx.data"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(
        CheckpointError, match=r"^network .*: its checksum must be .*, got .* again$"
    ):
        read_metadata(path)
    weights.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"its weights net.onnx.data are cut off"):
        read_metadata(path)
    weights.unlink()
    with pytest.raises(
        CheckpointError, match=r"its weights net.onnx.data must lie beside it: No s"
    ):
        read_metadata(path)


def test_weights_in_another_folder_are_never_opened(tmp_path):
    path, _ = write(tmp_path)
    edit(
        path,
        lambda m: setattr(m.graph.initializer[0].external_data[0], "value", "../secret"),
    )
    with pytest.raises(
        CheckpointError, match=r"weights must lie beside it, got '../secret' for 'w'"
    ):
        read_metadata(path)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [(2, None, "'0' and ''"), (1, "-1", "'-1' and '1024'"), (2, "x", "'0' and 'x'")],
)
def test_weights_that_do_not_say_where_they_are_are_refused(tmp_path, place, value, words):
    path, _ = write(tmp_path)

    def change(model):
        entries = model.graph.initializer[0].external_data
        if value is None:
            del entries[place]
        else:
            entries[place].value = value

    edit(path, change)
    with pytest.raises(
        CheckpointError, match=rf"'w' must say its offset and its length .*, got {words}; export"
    ):
        read_metadata(path)


def outside_tensor():
    tensor = onnx.TensorProto(name="t", data_type=1, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value="../secret")
    return tensor


def in_a_node(model):
    model.graph.node.add(op_type="Constant", output=["c"]).attribute.add(
        name="value", type=onnx.AttributeProto.TENSOR
    ).t.CopyFrom(outside_tensor())


def in_a_graph(model):
    branch = model.graph.node.add(op_type="If", input=["x"], output=["c"]).attribute.add(
        name="then_branch", type=onnx.AttributeProto.GRAPH
    )
    branch.g.initializer.append(outside_tensor())


def in_a_function(model):
    function = model.functions.add(name="f", domain="kinetiq")
    function.node.add(op_type="Constant", output=["c"]).attribute.add(
        name="values", type=onnx.AttributeProto.TENSORS
    ).tensors.append(outside_tensor())


@pytest.mark.parametrize("change", [in_a_node, in_a_graph, in_a_function])
def test_weights_that_no_checksum_covers_are_refused(tmp_path, change):
    path, _ = write(tmp_path)
    edit(path, change)
    with pytest.raises(CheckpointError, match=r"only initialisers of its graph may lie beside it"):
        read_metadata(path)


def test_foreign_and_broken_files_are_refused(tmp_path):
    path = tmp_path / "net.onnx"
    with pytest.raises(CheckpointError, match=r"^network .*net.onnx: cannot be read: No such file"):
        read_metadata(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(
        CheckpointError,
        match=r"must be an ONNX file, and cannot be parsed; it may be cut off, or be an engine "
        r"whose record net.onnx.\*.json is not beside it$",
    ):
        read_metadata(path)
    foreign = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    path.write_bytes(foreign.SerializeToString())
    with pytest.raises(CheckpointError, match=r"got an ONNX file without its metadata$"):
        read_metadata(path)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", json.dumps({"format": FORMAT}), json.dumps({"format": FORMAT, "x": 2})],
)
def test_metadata_that_is_none_is_refused(text):
    with pytest.raises(CheckpointError, match=r"^here: its metadata must be what"):
        decode_metadata(text, "here")


def test_another_format_is_named():
    said = json.loads(encode_metadata(METADATA)) | {"format": 7}
    with pytest.raises(
        CheckpointError, match=r"^here: must be an exported network of format 2, got 7"
    ):
        decode_metadata(json.dumps(said), "here")


def test_what_another_version_knows_is_named():
    said = json.loads(encode_metadata(METADATA))
    other = [{**said["inputs"][0], "dtype": "float8"}]
    for change, words in (
        ({"family": "wan"}, "its family must be of animatediff, .*, got wan; use the version"),
        ({"precision": "int4"}, "its precision must be of float32, .*, got int4; use"),
        ({"inputs": other}, "its inputs and outputs must be of float32, .*, got float8; use"),
    ):
        with pytest.raises(CheckpointError, match=f"^here: {words}"):
            decode_metadata(json.dumps(said | change), "here")


def test_levels():
    assert [level_tokens(9, 4, level) for level in range(4)] == [36, 10, 3, 2]
    assert [tap_level(f"up_blocks.{n}", 4) for n in range(4)] == [2, 1, 0, 0]
    assert [tap_level(f"down_blocks.{n}", 4) for n in range(4)] == [1, 2, 3, 3]
    assert tap_level("mid_block", 4) == 3
