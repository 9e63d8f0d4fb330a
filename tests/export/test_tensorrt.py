"""Engines of full TensorRT as far as they go without it, and engines as denoisers."""

import ctypes
import sys
import types
from dataclasses import replace

import onnx
import pytest
import torch
from one_node import make_metadata, write_one_node

from kinetiq.errors import (
    CheckpointError,
    MissingDependencyError,
    RequestError,
    ShapeError,
    WorkError,
)
from kinetiq.export import engine_source, engine_tensorrt
from kinetiq.export.engine_file import FORMAT, EngineRecord, write_engine
from kinetiq.export.engine_profile import Bounds, Profile, make_profile
from kinetiq.export.engine_runtime import EngineDenoiser, check_engine, open_engine
from kinetiq.export.metadata import TensorInfo
from kinetiq.export.plugin_choice import OPERATORS
from kinetiq.export.plugin_layers import KINDS

LATENTS = TensorInfo("latents", "float32", ("rows", 4, "frames", "height", "width"))
INPUTS = (
    LATENTS,
    TensorInfo("timesteps", "float32", ("rows",)),
    TensorInfo("text", "float32", ("rows", "text_tokens", 8)),
)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@needs_no_gpu
def test_all_that_is_missing_is_named(tmp_path, monkeypatch):
    network = tmp_path / "net.onnx"
    write_one_node(network, "query_attention")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    words = r'needs TensorRT.*pip install "\.\[tensorrt\]"; and an NVIDIA GPU.*--rtx --target'
    with pytest.raises(MissingDependencyError, match=words):
        engine_tensorrt.build_engine(network, tmp_path / "net.engine")
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    with pytest.raises(MissingDependencyError, match=r"export: needs an NVIDIA GPU"):
        engine_tensorrt.build_engine(network, tmp_path / "net.engine")


def frames_up_to(most):
    return Profile({"frames": Bounds(1, most, most)})


@pytest.mark.parametrize(
    ("frames", "absent"),
    [
        (32, set()),
        (33, {"frame_attention", "frame_attention_deviation"}),
        (129, {kind.name for kind in KINDS.values() if kind.operator == "frame_attention"}),
    ],
)
def test_a_plugin_is_one_kernel(frames, absent):
    names = {*KINDS, "motion_addition"}
    chosen = engine_tensorrt.choose_nodes(names, frames_up_to(frames))
    # motion_feature holds all frames as well
    absent = absent | ({"motion_feature"} if frames > 128 else set())
    assert chosen == set(KINDS) - absent
    asked = engine_tensorrt.choose_nodes({"query_attention"}, frames_up_to(8), OPERATORS)
    assert asked == {"query_attention"}
    some = engine_tensorrt.choose_nodes(names, frames_up_to(frames), ("query_attention",))
    assert some == {name for name in KINDS if name.startswith("query_attention")}
    assert engine_tensorrt.choose_nodes(names, frames_up_to(frames), ()) == set()
    if frames > 128:
        with pytest.raises(RequestError, match=r"frame_attention must be one kernel .* 129 frames"):
            engine_tensorrt.choose_nodes(names, frames_up_to(frames), ("frame_attention",))
    for wrong in (("motion_addition",), "query_attention"):
        with pytest.raises(RequestError, match=r"plugins must be among query_attention, frame_"):
            engine_tensorrt.choose_nodes(names, frames_up_to(frames), wrong)


def test_nodes_that_are_left_to_their_functions(tmp_path):
    write_one_node(tmp_path / "net.onnx", "query_attention")
    model, _ = engine_source.read_source(tmp_path / "net.onnx", None)
    engine_source.leave_to_functions(model, {"frame_attention"})
    (node,) = [node for node in model.graph.node if node.domain]
    assert {given.name for given in node.attribute} == {"heads", "plugin_namespace"}
    engine_source.leave_to_functions(model, {"query_attention"})
    assert [given.name for given in node.attribute] == ["heads"]
    onnx.checker.check_model(model, full_check=True)


class Context:
    """Takes addresses, and doubles the latents in its own memory; the prediction is smaller."""

    def __init__(self, log):
        self.log, self.shapes, self.addresses = log, {}, {}

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return self.log.accepts

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def get_tensor_shape(self, name):
        assert name == "prediction"
        return self.shapes["latents"]

    def execute_async_v3(self, stream):
        self.log.runs.append((dict(self.shapes), dict(self.addresses), stream))
        count = torch.Size(self.shapes["latents"]).numel()
        read, write = (
            torch.frombuffer(
                (ctypes.c_float * count).from_address(self.addresses[name]), dtype=torch.float32
            )
            for name in ("latents", "prediction")
        )
        write.copy_(2 * read)
        return self.log.works


class Package:
    """The part of TensorRT that runs engines."""

    __name__, __version__ = "tensorrt", "11.4"

    def __init__(self):
        self.runs, self.accepts, self.works, self.plans = [], True, True, []
        self.Logger = types.SimpleNamespace
        self.Logger = type("Logger", (), {"WARNING": 0, "__init__": lambda *_: None})

    def Runtime(self, _):  # noqa: N802  TensorRT's word
        def deserialize(plan):
            self.plans.append(plan)
            engine = types.SimpleNamespace(create_execution_context=lambda: Context(self))
            return engine if plan == b"plan" else None

        return types.SimpleNamespace(deserialize_cuda_engine=deserialize)


def make_record(**changes):
    metadata = make_metadata(INPUTS, (replace(LATENTS, name="prediction"),), "float32")
    given = {
        "format": FORMAT,
        "kinetiq": "0.1.0",
        "runtime": "tensorrt",
        "version": "11.4",
        "target": "sm_90",
        "profile": make_profile(metadata, {"height": Bounds(2, 4, 4), "width": Bounds(2, 4, 4)}),
        "network": metadata,
        "plugins": (),
        "route": None,
        "attentions": 0,
        "fused": 0,
    }
    return EngineRecord(**{**given, **changes})


@pytest.fixture
def file(tmp_path):
    return write_engine(tmp_path / "net.engine", b"plan", make_record())


@pytest.fixture
def package():
    return Package()


def make_denoiser(file, package, plan=b"plan"):
    return EngineDenoiser(file, plan, package, torch.device("cpu"), graphs=False)


def test_an_engine_predicts_in_place(file, package, cpu_rng):
    denoiser = make_denoiser(file, package)
    for rows, frames in ((2, 3), (1, 16)):
        latents = torch.randn(rows, 4, frames, 4, 2, generator=cpu_rng)
        text = torch.randn(rows, 5, 8, generator=cpu_rng)
        got = denoiser.predict(latents, torch.ones(rows), text)
        torch.testing.assert_close(got, 2 * latents, rtol=0, atol=0)
        shapes, addresses, _ = package.runs[-1]
        assert shapes["text"] == (rows, 5, 8)
        assert addresses["latents"] == latents.data_ptr()
        assert addresses["text"] == text.data_ptr()
        assert addresses["prediction"] == got.data_ptr()


def test_a_shape_outside_the_profile(file, package):
    denoiser = make_denoiser(file, package)
    with pytest.raises(
        ShapeError, match=r"latents must be \[rows 1 to 4, 4, frames 1 to 32, height 2 to 4"
    ):
        denoiser.predict(torch.zeros(5, 4, 8, 4, 4), torch.ones(5), torch.zeros(5, 5, 8))
    assert not package.runs


def test_an_engine_that_refuses(file, package):
    with pytest.raises(WorkError, match="must take the plan, and refuses it"):
        make_denoiser(file, package, b"other")
    given = (torch.zeros(1, 4, 8, 4, 4), torch.ones(1), torch.zeros(1, 5, 8))
    denoiser = make_denoiser(file, package)
    package.works = False
    with pytest.raises(WorkError, match="must run, and failed"):
        denoiser.predict(*given)
    package.accepts = False
    with pytest.raises(WorkError, match="latents must be of a shape that it takes"):
        denoiser.predict(*given)


def test_an_engine_runs_where_it_was_built_for(file):
    check_engine(file, "11.4", "sm_90")
    with pytest.raises(CheckpointError, match=r"tensorrt 11\.4, got 10\.14; build it here"):
        check_engine(file, "10.14", "sm_90")
    with pytest.raises(CheckpointError, match=r"a GPU of architecture sm_90, got sm_89"):
        check_engine(file, "11.4", "sm_89")
    with pytest.raises(CheckpointError, match=r"11\.4, got 11\.5 and a GPU of architecture sm_90"):
        check_engine(file, "11.5", "sm_80")


@needs_no_gpu
def test_opening_an_engine_without_what_it_needs(file, package, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    words = r'^engine .*net\.engine: needs TensorRT, .*pip install "\.\[tensorrt\]"; and an NVIDIA'
    with pytest.raises(MissingDependencyError, match=words):
        open_engine(file.path)
    monkeypatch.setitem(sys.modules, "tensorrt", package)
    with pytest.raises(RequestError, match="the device must be a GPU, got cpu"):
        open_engine(file.path, device="cpu")
    with pytest.raises(
        MissingDependencyError, match=r"needs an NVIDIA GPU .*backend='onnxruntime'"
    ):
        open_engine(file.path)
    with pytest.raises(CheckpointError, match=r"must be for tensorrt-rtx, got one for tensorrt$"):
        open_engine(file.path, runtime="tensorrt-rtx")
    assert not package.plans
