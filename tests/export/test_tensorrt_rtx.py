"""Engines of TensorRT for RTX, which are built here without a GPU."""

import importlib.util
from dataclasses import replace

import pytest
import tiny
import torch
from exported import small_checkpoint
from one_node import write_one_node

from kinetiq.checkpoint import load_checkpoint
from kinetiq.errors import CheckpointError, RequestError, WorkError
from kinetiq.export import engine_builder
from kinetiq.export.engine_file import read_engine
from kinetiq.export.engine_profile import Bounds
from kinetiq.export.engine_rtx import build_rtx_engine
from kinetiq.export.network import export_onnx
from kinetiq.export.nodes import KINDS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason='TensorRT for RTX is not installed: pip install ".[rtx]"',
)

SIZES = {
    "rows": Bounds(1, 2, 4),
    "frames": Bounds(1, 8, 16),
    "height": Bounds(4, 8, 16),
    "width": Bounds(4, 8, 16),
}
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_120")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_each_attention_becomes_one_kernel(tmp_path, precision, target):
    # All but this name is one node: bodies are alike in the attention that they have inside.
    network = tmp_path / "net.onnx"
    metadata = write_one_node(network, "frame_attention", precision=precision, d=40)
    built = build_rtx_engine(network, tmp_path / "net.engine", target=target, bounds=SIZES)
    found, plan = read_engine(tmp_path / "net.engine")
    assert found == built
    assert len(plan) > 1000
    record = built.record
    assert (record.runtime, record.target, record.plugins) == ("tensorrt-rtx", target, ())
    assert record.network == metadata
    assert record.attentions == record.fused == 1
    assert record.profile.bounds["tokens_0"] == Bounds(16, 64, 256)


@pytest.mark.parametrize(
    "name", ["query_attention_text", "query_attention", "query_attention_reduced", "motion_feature"]
)
def test_each_body_is_parsed_and_built(tmp_path, name):
    network = tmp_path / "net.onnx"
    write_one_node(network, name)
    built = build_rtx_engine(network, tmp_path / "net.engine", target="sm_89", bounds=SIZES)
    attends = int(name != "motion_feature")
    assert (built.record.attentions, built.record.fused or 0) == (attends, attends)


def test_controls_that_are_left_out(tmp_path):
    network = tmp_path / "net.onnx"
    write_one_node(network, "query_attention_reduced")
    path = tmp_path / "net.engine"
    built = build_rtx_engine(
        network, path, target="sm_89", bounds=SIZES, controls=["query"]
    ).record.network
    assert built.controls == ("query",)
    names = {tensor.name for tensor in built.inputs}
    assert "query_row" in names and "query_reduced" not in names


@pytest.mark.parametrize(("precision", "d"), [("float32", 32), ("float16", 8)])
def test_what_no_single_kernel_does_may_be_several(tmp_path, precision, d):
    network = tmp_path / "net.onnx"
    write_one_node(network, "query_attention_plain", precision=precision, d=d)
    built = build_rtx_engine(network, tmp_path / "net.engine", target="sm_89", bounds=SIZES)
    assert (built.record.attentions, built.record.fused) == (0, 0)


def test_a_kernel_that_is_missing_fails_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_builder, "_LEAST_FUSED", 1)
    network = tmp_path / "net.onnx"
    write_one_node(network, "query_attention_plain", d=8)
    with pytest.raises(WorkError, match=r"tensorrt_rtx must build .*net.onnx: .*dedicated kernel"):
        build_rtx_engine(network, tmp_path / "net.engine", target="sm_89", bounds=SIZES)
    assert not (tmp_path / "net.engine").exists()


def test_what_cannot_be_built(tmp_path):
    network, engine = tmp_path / "net.onnx", tmp_path / "net.engine"
    write_one_node(network, "query_attention_plain", precision="bfloat16")
    with pytest.raises(RequestError, match=r"builds for .*sm_89.*, got 'sm_90'; full TensorRT"):
        build_rtx_engine(network, engine, target="sm_90")
    with pytest.raises(RequestError, match=r"builds for .*sm_120.*, got 'rtx'$"):
        build_rtx_engine(network, engine, target="rtx")
    with pytest.raises(RequestError, match=r"sm_75 has no bfloat16 .* dtype float16"):
        build_rtx_engine(network, engine, target="sm_75")
    with pytest.raises(RequestError, match=r"controls must be among"):
        build_rtx_engine(network, engine, target="sm_89", controls=["query"])
    network.write_bytes(network.read_bytes().replace(b"one_node", b"two_node"))
    with pytest.raises(CheckpointError, match="its checksum must be"):
        build_rtx_engine(network, engine, target="sm_89")


@pytest.mark.slow
def test_a_network_with_all_controls(tmp_path, exported):
    # In float32, where no attention is one kernel, but every node and input is there.
    network = exported("animatediff", "float32")
    sizes = SIZES | {"text_tokens": Bounds(1, 8, tiny.MAX_TOKENS)}
    built = build_rtx_engine(network, tmp_path / "a.engine", target="sm_89", bounds=sizes)
    assert built.record.network.controls == KINDS
    assert built.record.attentions == 0
    assert "motion_tokens_1" in built.record.profile.bounds


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", [*tiny.NETWORKS, "sprites"])
def test_a_network_for_each_target(tmp_path, family, precision):
    folder = family
    if family != "sprites":
        heads = {"attention_head_dim": 16} if family == "unet3d" else {}
        folder = tiny.write_tiny_folder(tmp_path / "model", family, unet_overrides=heads)
    checkpoint = load_checkpoint(folder)
    network = tmp_path / "net.onnx"
    sites = export_onnx(checkpoint, network, dtype=precision).metadata.sites
    attentions = [checkpoint.unet.get_submodule(site.name) for site in sites]
    # Heads of fewer than 16 columns have no kernel that does a whole attention.
    expected = sum(one.to_q.out_features // one.heads >= 16 for one in attentions)
    assert expected
    for target in TARGETS:
        path = tmp_path / f"{target}.engine"
        record = build_rtx_engine(network, path, target=target, bounds=SIZES).record
        assert record.attentions == record.fused == expected


@pytest.mark.slow
def test_the_full_size_network(tmp_path):
    """Takes minutes and 10 GB of memory."""
    from diffusers import UNetMotionModel

    with torch.device("meta"):
        unet = UNetMotionModel(cross_attention_dim=768).half()
    unet = unet.to_empty(device="cpu")
    for parameter in unet.parameters():  # weights that are alike would be stored once
        parameter.data.uniform_(-0.02, 0.02)
    checkpoint = replace(small_checkpoint("animatediff"), unet=unet)
    export_onnx(checkpoint, tmp_path / "net.onnx")
    sizes = {
        "rows": Bounds(1, 2, 2),
        "frames": Bounds(8, 16, 16),
        "height": Bounds(32, 64, 64),
        "width": Bounds(32, 64, 64),
    }
    path = tmp_path / "net.engine"
    record = build_rtx_engine(tmp_path / "net.onnx", path, target="sm_89", bounds=sizes).record
    assert record.attentions == record.fused == 16 + 16 + 42  # spatial, of the prompt, temporal
