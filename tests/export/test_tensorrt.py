"""Engines of full TensorRT as far as they go without it, and engines as denoisers."""

import contextlib
import ctypes
import enum
import functools
import sys
import types
from dataclasses import replace

import fake_tensorrt
import onnx
import pytest
import torch
from one_node import make_metadata, write_one_node

from kinetiq.control_tensors import (
    ControlTensors,
    LoraBank,
    LoraControl,
    MotionBank,
    MotionControl,
    QueryControl,
)
from kinetiq.errors import (
    CheckpointError,
    InputError,
    KinetiqWarning,
    MissingDependencyError,
    RequestError,
    ShapeError,
    WorkError,
)
from kinetiq.export import (
    engine_builder,
    engine_log,
    engine_runtime,
    engine_source,
    engine_tensorrt,
)
from kinetiq.export.engine_file import FORMAT, EngineRecord, write_engine
from kinetiq.export.engine_profile import Bounds, Profile, make_profile
from kinetiq.export.engine_runtime import EngineDenoiser, check_engine, open_engine
from kinetiq.export.gpu import Gpu
from kinetiq.export.metadata import TensorInfo, read_metadata
from kinetiq.export.plugin_choice import OPERATORS
from kinetiq.export.plugin_layers import KINDS
from kinetiq.families import Site, SiteKind
from kinetiq.generation import is_out_of_memory

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


class ReachedError(Exception):
    """The builder was."""


@pytest.mark.parametrize("route", [None, "portable"])
def test_the_record_of_this_gpu_is_read_only_where_it_is_asked(tmp_path, monkeypatch, route):
    """`export tune` builds with and without plugins to make the file that is named."""
    monkeypatch.setenv("KINETIQ_PLUGINS", str(tmp_path / "new.json"))

    def reach(*_, **__):
        raise ReachedError

    for name, stub in (
        ("load_tensorrt", lambda: None),
        ("find_gpu", lambda: "sm_90"),
        ("read_source", lambda *_, **__: (None, None)),
        ("make_profile", lambda *_: None),
        ("node_names", lambda _: set()),
        ("choose_nodes", lambda *_: set()),
        ("too_long", lambda *_: {}),
        ("find_route", lambda *_: None),
        ("leave_to_functions", lambda *_: None),
        ("build_plan", reach),
    ):
        monkeypatch.setattr(engine_tensorrt, name, stub)
    build = functools.partial(engine_tensorrt.build_engine, "net.onnx", tmp_path / "net.engine")
    with pytest.raises(ReachedError):
        build(plugins=(), route=route)
    with pytest.raises(InputError, match=r"new\.json"):
        build(route=route)


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


def test_outputs_that_are_dropped_cost_nothing(tmp_path, exported):
    model, metadata = engine_source.read_source(exported(), None, outputs=("prediction",))
    assert [value.name for value in model.graph.output] == ["prediction"]
    assert [tensor.name for tensor in metadata.outputs] == ["prediction"]
    assert [value.name for value in model.graph.input] == [one.name for one in metadata.inputs]
    assert "feature_channels" not in {tensor.name for tensor in metadata.inputs}
    assert metadata.tap is None and metadata.controls == read_metadata(exported()).controls
    assert "motion_feature" not in engine_source.node_names(model)
    with pytest.raises(RequestError, match=r"outputs must be among prediction, .*, got feelings$"):
        engine_source.read_source(exported(), None, outputs=("feelings",))


class Context:
    """Takes addresses, and doubles the latents in its own memory; the prediction is smaller."""

    def __init__(self, log):
        self.log, self.shapes, self.addresses = log, {}, {}

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return self.log.accepts

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return name != self.log.unaddressable

    def update_device_memory_size_for_shapes(self):
        return torch.Size(self.shapes["latents"]).numel()

    def set_device_memory(self, address, size):
        assert address
        self.memory = size

    def get_tensor_shape(self, name):
        assert name == "prediction"
        return self.shapes["latents"]

    def execute_async_v3(self, stream):
        assert self.log.inside
        assert self.memory == torch.Size(self.shapes["latents"]).numel()
        self.log.runs.append((dict(self.shapes), dict(self.addresses), stream))
        if self.log.says:
            self.log.logger.log(self.log.ILogger.ERROR, self.log.says)
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
        self.contexts, self.has_contexts, self.unaddressable, self.says = 0, True, None, ""
        self.inside = False  # whether the engine's device is the current one
        self.ILogger = fake_tensorrt._Logger
        self.ExecutionContextAllocationStrategy = enum.Enum("Strategy", ["STATIC", "USER_MANAGED"])

    def Runtime(self, logger):  # noqa: N802  TensorRT's word
        self.logger = logger

        def create(strategy):
            assert strategy is self.ExecutionContextAllocationStrategy.USER_MANAGED
            self.contexts += 1
            return Context(self) if self.has_contexts else None

        def deserialize(plan):
            assert self.inside
            self.plans.append(plan)
            return (
                types.SimpleNamespace(create_execution_context=create) if plan == b"plan" else None
            )

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
def package(monkeypatch):
    package = Package()

    @contextlib.contextmanager
    def enter(device):
        assert device == torch.device("cpu") and not package.inside
        package.inside = True
        try:
            yield
        finally:
            package.inside = False

    monkeypatch.setattr(engine_runtime, "_on", enter)
    return package


def make_denoiser(file, package, plan=b"plan", *, graphs=False):
    return EngineDenoiser(file, plan, package, torch.device("cpu"), graphs=graphs)


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


BANKED = (
    *INPUTS,
    TensorInfo("motion_slot", "int64", ("rows",)),
    TensorInfo("motion_scale", "float32", ("rows",)),
    TensorInfo("motion.a.value", "float32", ("motion_slots", "frames", "motion_tokens_0", 8)),
    TensorInfo("lora_slot", "int64", ("rows",)),
    TensorInfo("lora_scale", "float32", ("rows",)),
    TensorInfo("lora.a.down", "float32", ("lora_slots", "lora_rank", 8)),
    TensorInfo("lora.a.up", "float32", ("lora_slots", 8, "lora_rank")),
    TensorInfo("feature_channels", "int64", ("feature_channels",)),
)


def test_banks_are_filled_up_to_the_least_of_the_profile(tmp_path, package):
    metadata = replace(
        make_metadata(BANKED, (replace(LATENTS, name="prediction"),), "float32"),
        controls=("motion", "lora"),
        sites=(Site("a", SiteKind.TEMPORAL, "mid", 8),),
    )
    asked = {"motion_slots": 3, "lora_slots": 2, "lora_rank": 16, "feature_channels": 64}
    bounds = {axis: Bounds(least, least, 64) for axis, least in asked.items()}
    record = make_record(network=metadata, profile=make_profile(metadata, bounds))
    denoiser = make_denoiser(write_engine(tmp_path / "a.engine", b"plan", record), package)
    latents, timesteps, text = torch.zeros(1, 4, 2, 4, 4), torch.ones(1), torch.zeros(1, 5, 8)
    denoiser.predict(latents, timesteps, text)
    shapes, *_ = package.runs[-1]
    assert shapes["motion.a.value"] == (3, 2, 1, 8)
    assert (shapes["lora.a.down"], shapes["lora.a.up"]) == ((2, 16, 8), (2, 8, 16))
    assert shapes["feature_channels"] == (64,)
    controls = ControlTensors(
        motion=MotionControl(
            torch.ones(1, dtype=torch.int64),
            torch.ones(1),
            {0: MotionBank(value=torch.ones(2, 2, 16, 8))},
        ),
        lora=LoraControl(
            torch.ones(1, dtype=torch.int64),
            torch.ones(1),
            {"a": LoraBank(down=torch.ones(3, 8, 8), up=torch.ones(3, 8, 8))},
        ),
    )
    given = denoiser.inputs_of(latents, timesteps, text, controls, ("motion", "lora"))
    value = given["motion.a.value"]
    assert value.shape == (3, 2, 16, 8) and bool((value[:2] == 1).all()) and not value[2].any()
    up = given["lora.a.up"]
    assert up.shape == (3, 8, 16) and bool((up[..., :8] == 1).all()) and not up[..., 8:].any()


def test_a_shape_outside_the_profile(file, package):
    denoiser = make_denoiser(file, package)
    with pytest.raises(
        ShapeError, match=r"latents must be \[rows 1 to 4, 4, frames 1 to 32, height 2 to 4"
    ):
        denoiser.predict(torch.zeros(5, 4, 8, 4, 4), torch.ones(5), torch.zeros(5, 5, 8))
    assert not package.runs


def test_a_control_that_an_engine_was_built_without(file, package):
    record = replace(file.record, network=replace(file.record.network, controls=("query", "lora")))
    denoiser = make_denoiser(replace(file, record=record), package)
    row, full = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1)
    controls = ControlTensors(query=QueryControl(row=row, blend=full[None], reduced=full))
    with pytest.raises(
        RequestError,
        match=r"got the control reduced; the engine was built with query, lora; build one by "
        r"`kinetiq export tensorrt --controls query,lora,reduced` and name it",
    ):
        denoiser.predict(torch.zeros(1, 4, 8, 4, 4), full, torch.zeros(1, 5, 8), controls)
    assert not package.runs


def test_an_engine_that_refuses(file, package):
    with pytest.raises(WorkError, match="must take the plan, and refuses it"):
        make_denoiser(file, package, b"other")
    given = (torch.zeros(1, 4, 8, 4, 4), torch.ones(1), torch.zeros(1, 5, 8))
    denoiser = make_denoiser(file, package)
    for name in ("text", "prediction"):
        package.unaddressable = name
        with pytest.raises(WorkError, match=f"it must take {name} where it lies, and refuses it"):
            denoiser.predict(*given)
    package.unaddressable, package.works = None, False
    with pytest.raises(WorkError, match=r"must run, and failed: the runtime does not say why$"):
        denoiser.predict(*given)
    package.says = "IExecutionContext: broken"
    with pytest.raises(WorkError, match=r"must run, and failed: IExecutionContext: broken$"):
        denoiser.predict(*given)
    package.accepts = False
    with pytest.raises(WorkError, match="latents must be of a shape that it takes"):
        denoiser.predict(*given)


@pytest.mark.parametrize(
    "says",
    [
        "[executionContext.cpp] Error Code 2: OutOfMemory (Requested size was 1 bytes.)",
        "Requested amount of GPU memory (1 bytes) could not be allocated.",
        "Cuda Runtime (out of memory)",
    ],
)
def test_memory_that_runs_out_is_said_as_pytorch_says_it(file, package, says):
    given = (torch.zeros(1, 4, 8, 4, 4), torch.ones(1), torch.zeros(1, 5, 8))
    denoiser = make_denoiser(file, package)
    package.works, package.says = False, says
    with pytest.raises(torch.OutOfMemoryError, match="must run, and failed: ") as caught:
        denoiser.predict(*given)
    assert is_out_of_memory(caught.value)  # so that the batch is split
    package.has_contexts, package.says = False, ""
    with pytest.raises(torch.OutOfMemoryError, match="a context of it must be made, and is not"):
        make_denoiser(file, package).predict(*given)


def test_a_context_is_made_when_it_is_needed(file, package):
    denoiser = make_denoiser(file, package)
    assert package.contexts == 0
    for _ in range(2):
        denoiser.predict(torch.zeros(1, 4, 8, 4, 4), torch.ones(1), torch.zeros(1, 5, 8))
    assert package.contexts == 1


def test_a_batch_is_as_wide_as_the_profile(file, package):
    assert make_denoiser(file, package).most_rows == 4


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs that keep what is launched while they are captured, and launch it again."""
    state = types.SimpleNamespace(made=[], open=None, error=None, modes=[])

    class Graph:
        def __init__(self):
            self.launches = []
            state.made.append(self)

        def replay(self):
            for launch in self.launches:
                launch()

    @contextlib.contextmanager
    def capture(graph, *, stream, capture_error_mode):
        state.modes.append(capture_error_mode)
        if state.error:
            raise state.error
        state.open = graph
        yield
        state.open = None

    execute = Context.execute_async_v3

    def record(context, stream):
        if state.open is None:
            return execute(context, stream)
        state.open.launches.append(lambda: execute(context, stream))
        return True

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: types.SimpleNamespace(cuda_stream=5))
    monkeypatch.setattr(Context, "execute_async_v3", record)
    return state


def draw(rows, rng, frames=3):
    latents = torch.randn(rows, 4, frames, 4, 2, generator=rng)
    return latents, torch.ones(rows), torch.randn(rows, 5, 8, generator=rng)


def test_launches_are_captured_once_for_a_shape_and_replayed(file, package, graphs, cpu_rng):
    denoiser = make_denoiser(file, package, graphs=True)
    for rows in (1, 2, 1, 2, 1):
        given = draw(rows, cpu_rng)
        got = denoiser.predict(*given)
        torch.testing.assert_close(got, 2 * given[0], rtol=0, atol=0)
    assert len(graphs.made) == package.contexts == 2
    assert graphs.modes == ["thread_local"] * 2  # what other threads do is no error
    _, addresses, _ = package.runs[-1]
    assert addresses["latents"] != given[0].data_ptr()  # a graph has addresses of its own
    # The one that was used longest ago makes room for a third.
    denoiser.predict(*draw(3, cpu_rng))
    denoiser.predict(*draw(1, cpu_rng))
    assert len(graphs.made) == 3
    denoiser.predict(*draw(2, cpu_rng))
    assert len(graphs.made) == 4
    assert denoiser._context is None  # nothing was launched without a graph


def test_a_captured_context_is_not_touched_again(file, package, graphs, cpu_rng, monkeypatch):
    denoiser = make_denoiser(file, package, graphs=True)
    bound = []
    monkeypatch.setattr(
        Context, "set_input_shape", lambda self, name, shape: bound.append(name) or
        self.shapes.update({name: shape}) is None
    )  # fmt: skip
    for _ in range(3):
        denoiser.predict(*draw(2, cpu_rng))
    assert sorted(bound) == ["latents", "text", "timesteps"]  # once, before the warm-up


def test_what_did_not_change_is_not_copied_again(file, package, graphs, cpu_rng):
    denoiser = make_denoiser(file, package, graphs=True)
    latents, timesteps, text = draw(1, cpu_rng)
    denoiser.predict(latents, timesteps, text)
    (captured,) = denoiser._captured.values()
    captured.bound.inputs["latents"].zero_()
    assert not denoiser.predict(latents, timesteps, text).any()  # it was not filled again
    latents.mul_(2)
    got = denoiser.predict(latents, timesteps, text)
    torch.testing.assert_close(got, 2 * latents, rtol=0, atol=0)
    other = latents.clone()
    captured.bound.inputs["latents"].zero_()
    assert denoiser.predict(other, timesteps, text).any()
    with torch.inference_mode():  # in which a change in place leaves no trace
        latents = torch.ones_like(latents)
        denoiser.predict(latents, timesteps, text)
        latents.mul_(3)
        got = denoiser.predict(latents, timesteps, text)
    torch.testing.assert_close(got, torch.full_like(got, 6.0), rtol=0, atol=0)


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted"), None])
def test_where_nothing_can_be_captured_launches_are_made_one_by_one(
    file, package, graphs, cpu_rng, error, monkeypatch
):
    graphs.error = error
    if error is None:  # TensorRT for RTX says it beforehand
        monkeypatch.setattr(Context, "is_stream_capturable", lambda *_: False, raising=False)
    denoiser = make_denoiser(file, package, graphs=True)
    every = [draw(rows, cpu_rng) for rows in (1, 2, 1)]
    with pytest.warns(KinetiqWarning, match=r"cannot be captured in a CUDA graph, .*: "):
        results = [denoiser.predict(*every[0])]
    results += [denoiser.predict(*given) for given in every[1:]]  # a second warning would fail
    for given, got in zip(every, results, strict=True):
        torch.testing.assert_close(got, 2 * given[0], rtol=0, atol=0)


def test_what_was_captured_makes_room(file, package, graphs, cpu_rng, monkeypatch):
    denoiser = make_denoiser(file, package, graphs=True)
    denoiser.predict(*draw(1, cpu_rng))
    bind, failures = EngineDenoiser._bind, [torch.OutOfMemoryError("full")]

    def fail_once(*given):
        if failures:
            raise failures.pop()
        return bind(*given)

    monkeypatch.setattr(EngineDenoiser, "_bind", fail_once)
    assert denoiser.predict(*draw(2, cpu_rng)).any()
    assert len(denoiser._captured) == 1
    failures += [torch.OutOfMemoryError("full")] * 2
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        denoiser.predict(*draw(1, cpu_rng))


def test_tensorrt_for_rtx_has_all_its_kernels_before_they_are_captured(file, package):
    made, config = [], types.SimpleNamespace()
    config.set_execution_context_allocation_strategy = made.append
    package.DynamicShapesKernelSpecializationStrategy = enum.Enum("S", ["LAZY", "EAGER"])
    denoiser = make_denoiser(file, package)
    denoiser._engine = types.SimpleNamespace(
        create_runtime_config=lambda: config,
        create_execution_context=lambda given: Context(package) if given is config else None,
    )
    denoiser.predict(torch.zeros(1, 4, 8, 4, 4), torch.ones(1), torch.zeros(1, 5, 8))
    assert config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
    assert [strategy.name for strategy in made] == ["USER_MANAGED"]


def test_a_gpu_is_named_by_its_number(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: contextlib.nullcontext(entered.append(device))
    )
    assert engine_runtime.with_index(torch.device("cuda")) == torch.device("cuda", 1)
    assert engine_runtime.with_index(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert engine_runtime.with_index(torch.device("cpu")) == torch.device("cpu")
    with engine_runtime._on(torch.device("cuda", 1)), engine_runtime._on(torch.device("cpu")):
        pass
    assert entered == [torch.device("cuda", 1)]


def test_an_engine_runs_where_it_was_built_for(file):
    check_engine(file, "11.4", "sm_90")
    with pytest.raises(CheckpointError, match=r"tensorrt 11\.4, got 10\.14; build it here"):
        check_engine(file, "10.14", "sm_90")
    with pytest.raises(CheckpointError, match=r"a GPU of architecture sm_90, got sm_89"):
        check_engine(file, "11.4", "sm_89")
    with pytest.raises(CheckpointError, match=r"11\.4, got 11\.5 and a GPU of architecture sm_90"):
        check_engine(file, "11.5", "sm_80")


def test_what_makes_an_engine_slower_is_said_whenever_it_is_opened(file):
    large, small = Gpu("large", 82), Gpu("small", 16)
    engine_runtime.say_what_is_slower(file, small)  # built without a GPU, and nothing left out
    own = replace(file, record=make_record(gpu=large))
    engine_runtime.say_what_is_slower(own, large)
    with pytest.warns(KinetiqWarning, match=r"built on large of 82 multi.* runs on small of 16 mu"):
        engine_runtime.say_what_is_slower(own, small)
    without = replace(file, record=make_record(left_out={"frame_attention": "too wide"}))
    with pytest.warns(KinetiqWarning, match=r"frame_attention runs function bodies .*: too wide$"):
        engine_runtime.say_what_is_slower(without, small)


def test_opening_says_what_is_slower(file, package, monkeypatch):
    said = []
    monkeypatch.setattr(engine_runtime, "require_gpu", lambda *_: package)
    monkeypatch.setattr(engine_runtime, "with_index", lambda _: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(engine_runtime, "describe_gpu", lambda _: "a GPU")
    monkeypatch.setattr(engine_runtime, "say_what_is_slower", lambda *given: said.append(given))
    open_engine(file.path)
    assert said == [(file, "a GPU")]


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


def make_layer(package, kind, dtype=None, d=64):
    """A layer as the binding returns it: of the base class, with an attention where it is one."""
    query = types.SimpleNamespace(shape=(2, 8, 64, d), dtype=dtype)
    attention = types.SimpleNamespace(get_input=lambda _: query, decomposable=False)
    layer = package.ILayer()
    layer.type, layer.attention = kind, attention
    return layer


def test_attentions_that_no_kernel_does_alone_may_be_several():
    kinds = enum.Enum("LayerType", ["ATTENTION_INPUT", "SHUFFLE"])
    base = type("ILayer", (), {})
    package = types.SimpleNamespace(
        LayerType=kinds,
        ILayer=base,
        IAttentionInputLayer=type("IAttentionInputLayer", (base,), {}),
        float32="float32",
    )
    given = {
        "wide": make_layer(package, kinds.ATTENTION_INPUT, "float16", 16),
        "unknown": make_layer(package, kinds.ATTENTION_INPUT, "bfloat16", -1),
        "narrow": make_layer(package, kinds.ATTENTION_INPUT, "float16", 8),
        "float32": make_layer(package, kinds.ATTENTION_INPUT, "float32"),
        "other": make_layer(package, kinds.SHUFFLE, "float32"),
    }
    layers = list(given.values())
    network = types.SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)
    assert engine_builder.allow_parts(package, network) == 2
    several = {name for name, layer in given.items() if layer.attention.decomposable}
    assert several == {"narrow", "float32"}
    assert isinstance(given["wide"], package.IAttentionInputLayer)
    assert not isinstance(given["other"], package.IAttentionInputLayer)


def test_fused_kernels_are_counted_in_what_the_builder_says():
    log = engine_log.make_log(types.SimpleNamespace(ILogger=fake_tensorrt._Logger))
    assert engine_builder.count_fused(log.layers) is None
    name = f"sm80{engine_builder.FUSED}_x"
    layers = f"Layers:\nName: {name}, Type: a\nName: other, TacticName: {name}\nName: b{name}\n"
    log.log(fake_tensorrt._Logger.VERBOSE, layers)
    assert engine_builder.count_fused(log.layers) == 2
    for number in range(20):
        log.log(fake_tensorrt._Logger.ERROR, str(number))
    assert log.errors == [str(number) for number in range(4, 20)]  # the last of them
