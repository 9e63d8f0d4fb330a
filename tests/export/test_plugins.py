"""Plugins, hosted by NVIDIA's own package: shapes, types, kernels and what they are passed."""

import importlib
import importlib.util
import json
import sys
from contextlib import nullcontext
from dataclasses import replace

import driver
import fake_tensorrt
import pytest
import torch
from click.testing import CliRunner
from closeness import assert_as_good_as
from one_node import write_one_node

from kinetiq.errors import KinetiqWarning, MissingDependencyError, RequestError, WorkError
from kinetiq.export import command, engine_tensorrt, plugins
from kinetiq.export.engine_file import read_engine
from kinetiq.export.engine_profile import Bounds
from kinetiq.export.engine_tensorrt import build_engine, find_gpu
from kinetiq.export.gpu import Gpu
from kinetiq.export.plugin_choice import PluginChoice
from kinetiq.export.plugin_compiler import PluginCompiler
from kinetiq.export.plugin_launch import TACTICS
from kinetiq.export.plugin_layers import KINDS
from kinetiq.export.plugin_ptx import PLAIN_SHARED, ROUTES, find_route, parameters
from kinetiq.kernels.frame_attention import frame_attention_reference
from kinetiq.kernels.motion_feature import motion_feature_reference
from kinetiq.kernels.query_attention import query_attention_reference

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_bindings") is None,
    reason="NVIDIA's plugin package is not installed: pip install tensorrt-cu13-bindings",
)
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU nothing is interpreted"
)

HEADS, D = 2, 24  # two tiles of a head
ROWS, FRAMES, TOKENS, TEXT, CHOSEN = 3, 5, 18, 7, 3
MOST = {ROWS: 4, FRAMES: 8, TOKENS: 32, TEXT: 9, CHOSEN: 4}  # what a profile would allow
TYPES = {"FLOAT": torch.float32, "HALF": torch.float16}
REFERENCES = {
    "query_attention": query_attention_reference,
    "frame_attention": frame_attention_reference,
}


@pytest.fixture(scope="module")
def tensorrt():
    with fake_tensorrt.hosted() as (core, package):
        registered = set(plugins._registered)
        plugins._registered.clear()
        plugins.register_plugins(package)
        yield core
        plugins._registered.clear()
        plugins._registered.update(registered)


@pytest.fixture(scope="module")
def compiler():
    with PluginCompiler(find_route("sm_80")) as compiler:
        yield compiler


def draw(kind, dtype, rng):
    """Inputs of a node, by name; every row reads another one."""
    width = HEADS * D
    activation = lambda *size: torch.randn(*size, width, generator=rng).to(dtype)
    keys = (ROWS, 1, TEXT) if kind.name == "query_attention_text" else (ROWS, FRAMES, TOKENS)
    every = {
        "query": activation(ROWS, FRAMES, TOKENS),
        "key": activation(*keys),
        "value": activation(*keys),
        "query_row": torch.tensor([2, 0, 0]),
        "query_blend": torch.rand(ROWS, FRAMES, TOKENS, generator=rng),
        "deviation_row": torch.tensor([1, 2, 0]),
        "deviation_blend": torch.rand(ROWS, FRAMES, TOKENS, generator=rng),
        "deviation_parts": torch.rand(ROWS, 3, generator=rng),
        "x": activation(ROWS, FRAMES, TOKENS),
        "channels": torch.tensor([40, 3, 3]),
    }
    return {name: every[name] for name in kind.inputs}


def as_given(name, tensor):
    """The input as TensorRT knows it: only widths, and lengths of 1 and of parts, are fixed."""
    names = {
        torch.float32: "FLOAT", torch.float16: "HALF", torch.int64: "INT64", torch.bfloat16: "BF16",
    }  # fmt: skip
    fixed = {HEADS * D, 1} | ({3} if name == "deviation_parts" else set())
    most = [None if length in fixed else MOST[length] for length in tensor.shape]
    if name == "deviation_parts":
        most[0] = MOST[ROWS]
    return fake_tensorrt.Given(names[tensor.dtype], tuple(tensor.shape), tuple(most))


def build(core, compiler, kind, inputs, *, shared_bytes=PLAIN_SHARED, **options):
    given = [as_given(name, tensor) for name, tensor in inputs.items()]
    attributes = dict.fromkeys(kind.attributes, HEADS)
    with plugins.compiling(compiler, shared_bytes):
        return fake_tensorrt.build_layer(core, kind.name, attributes, given, **options)


def find_kernel(compiler, built):
    return {known.name: known for known in compiler._known.values()}[built.name]


def run_as_tensorrt(compiler, kind, inputs, built):
    """Launch the kernel, interpreted, with the pointers and integers that TensorRT passes."""
    kernel = find_kernel(compiler, built)
    module = importlib.import_module(f"kinetiq.kernels.{kind.operator}")
    function = getattr(module, kernel.function)
    out = torch.full(built.shapes[0], float("nan"), dtype=next(iter(inputs.values())).dtype)
    passed = iter([*inputs.values(), *built.integers, out])
    arguments = [
        kernel.constants[name] if name in kernel.constants else next(passed)
        for name in function.arg_names
    ]
    assert next(passed, None) is None
    function[built.grid](*arguments)
    return out


def reference(kind, inputs, dtype):
    if kind.operator == "motion_feature":
        return motion_feature_reference(inputs["x"].to(dtype), inputs["channels"])
    given = {name: t.to(dtype) if t.ndim == 4 else t for name, t in inputs.items()}
    return REFERENCES[kind.operator](**given, heads=HEADS)


@interpreted
@pytest.mark.parametrize("element", TYPES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_the_embedded_kernel_with_what_tensorrt_passes(tensorrt, compiler, kind, element, cpu_rng):
    dtype = TYPES[element]
    inputs = draw(kind, dtype, cpu_rng)
    built = build(tensorrt, compiler, kind, inputs)

    exact = reference(kind, inputs, torch.float64)
    assert built.shapes == [tuple(exact.shape)]
    assert [found.name for found in built.types] == [element]
    pointers = ["u64"] * len(inputs)
    entry = (built.name, [*pointers, *["u32"] * len(built.integers), "u64"])
    assert parameters(built.ptx) == entry
    assert built.combinations == 1
    assert built.shared_bytes <= PLAIN_SHARED

    got = run_as_tensorrt(compiler, kind, inputs, built)
    assert_as_good_as(got, reference(kind, inputs, dtype), exact)


def test_tactics_that_are_alike_or_too_large_are_left_out(tensorrt, compiler, cpu_rng):
    kind = KINDS["query_attention_plain"]
    inputs = draw(kind, torch.float16, cpu_rng)
    built = build(tensorrt, compiler, kind, inputs)
    # with 16 keys at a time or without loads ahead it is another kernel
    assert built.tactics == list(TACTICS)
    sizes = {
        tactic: build(tensorrt, compiler, kind, inputs, tactic=tactic).shared_bytes
        for tactic in built.tactics
    }
    assert sizes[3] < sizes[2] < sizes[1]
    few = build(tensorrt, compiler, kind, inputs, shared_bytes=sizes[2])
    assert few.tactics == [2, 3]
    words = rf"at most 1 bytes of shared memory, got {sizes[3]} at the least"
    with pytest.raises(RequestError, match=words):
        build(tensorrt, compiler, kind, inputs, shared_bytes=1)
    frames = KINDS["frame_attention_plain"]  # whose settings have neither
    inputs = draw(frames, torch.float16, cpu_rng)
    assert build(tensorrt, compiler, frames, inputs).tactics == [1]


def test_why_a_layer_has_no_kernel_is_kept(tensorrt, compiler, cpu_rng):
    kind = KINDS["query_attention_plain"]
    inputs = draw(kind, torch.float16, cpu_rng)
    given = [as_given(name, tensor) for name, tensor in inputs.items()]
    with plugins.compiling(compiler, shared_bytes=1) as compilation, pytest.raises(RequestError):
        fake_tensorrt.build_layer(tensorrt, kind.name, {"heads": HEADS}, given)
    assert [type(failure.error) for failure in compilation.failures] == [RequestError]
    with pytest.raises(WorkError, match="must be built by `kinetiq export tensorrt`"):
        fake_tensorrt.build_layer(tensorrt, kind.name, {"heads": HEADS}, given)


def test_a_type_that_kernels_do_not_take(tensorrt, compiler):
    given = [fake_tensorrt.Given("INT8", (2, 2, 2, 8), (None,) * 4)] * 3
    with plugins.compiling(compiler), pytest.raises(RequestError, match=r"query of .* got INT8"):
        fake_tensorrt.build_layer(tensorrt, "query_attention_plain", {"heads": 1}, given)


def test_a_single_frame_that_tensorrt_does_not_know(tensorrt, compiler, cpu_rng):
    kind = KINDS["query_attention_text"]
    inputs = draw(kind, torch.float16, cpu_rng)
    known = build(tensorrt, compiler, kind, inputs)
    given = [as_given(name, tensor) for name, tensor in inputs.items()]
    unknown = [replace(one, most=(one.most[0], MOST[FRAMES], *one.most[2:])) for one in given]
    with plugins.compiling(compiler):
        found = fake_tensorrt.build_layer(tensorrt, kind.name, {"heads": HEADS}, unknown)
    assert (found.ptx, found.integers) == (known.ptx, known.integers)


def test_a_width_that_may_change(tensorrt, compiler):
    given = [fake_tensorrt.Given("HALF", (2, 2, 2, 8), (None, None, None, 16))] * 3
    with (
        plugins.compiling(compiler),
        pytest.raises(RequestError, match=r"width of query .* be known"),
    ):
        fake_tensorrt.build_layer(tensorrt, "query_attention_plain", {"heads": 1}, given)


def test_plugins_are_registered_once(tensorrt):
    names = {name for name, _, namespace in tensorrt.get_plugin_registry().creators}
    assert names == set(KINDS)
    plugins.register_plugins(None)  # nothing is left to register


@interpreted
@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_python_runs_a_layer(tensorrt, kind, cpu_rng, monkeypatch):
    inputs = draw(kind, torch.float32, cpu_rng)
    exact = reference(kind, inputs, torch.float64)
    out = torch.full(exact.shape, float("nan"))
    known = {tensor.data_ptr(): tensor for tensor in (*inputs.values(), out)}
    streams = []
    monkeypatch.setattr(plugins, "_view", lambda tensor: known[tensor.data_ptr])
    monkeypatch.setattr(plugins, "_on_stream", lambda one: nullcontext(streams.append(one)))
    attributes = dict.fromkeys(kind.attributes, HEADS)
    fake_tensorrt.run_layer(tensorrt, kind.name, attributes, inputs.values(), out)
    assert streams == [7]
    assert_as_good_as(out, reference(kind, inputs, torch.float32), exact)


@pytest.fixture
def gpu(tensorrt, monkeypatch, tmp_path):
    """TensorRT, and a GPU for it, that builds nothing but plugins."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(engine_tensorrt, "load_tensorrt", lambda: tensorrt)
    monkeypatch.setattr(engine_tensorrt, "find_gpu", lambda: "sm_90")
    monkeypatch.setattr(engine_tensorrt, "describe_gpu", lambda: Gpu("a GPU", 132))
    tensorrt.built.clear()
    return tensorrt


def test_an_engine_has_our_kernels_inside(gpu, tmp_path):
    network, path = tmp_path / "net.onnx", tmp_path / "net.engine"
    metadata = write_one_node(network, "query_attention")
    record = build_engine(network, path).record
    assert (record.plugins, record.route, record.target, record.runtime) == (
        ("query_attention",),
        "sm_80",
        "sm_90",
        "tensorrt",
    )
    assert record.gpu == Gpu("a GPU", 132)
    assert record.network == metadata
    (built,) = gpu.built
    assert ".target sm_80\n" in built.ptx  # the route that every later GPU takes

    gpu.built.clear()
    assert build_engine(network, path, route="sm_90a").record.route == "sm_90a"
    assert ".target sm_90a\n" in gpu.built[0].ptx
    assert "wgmma" in gpu.built[0].ptx  # the architecture's own instructions

    gpu.built.clear()
    record = build_engine(network, path, plugins=["frame_attention"]).record
    assert (record.plugins, record.route, gpu.built) == ((), None, [])


def test_what_is_recorded_of_a_gpu_is_what_it_gets(gpu, tmp_path, monkeypatch):
    network, path = tmp_path / "net.onnx", tmp_path / "net.engine"
    write_one_node(network, "query_attention")
    for choice, plugins_inside in (
        (PluginChoice(("query_attention",), "sm_90a"), ("query_attention",)),
        (PluginChoice(("frame_attention",), "sm_80"), ()),
        (PluginChoice(()), ()),
    ):
        monkeypatch.setattr(engine_tensorrt, "choose_by_record", lambda _, choice=choice: choice)
        record = build_engine(network, path).record
        assert record.plugins == plugins_inside
        assert record.route == (choice.route if plugins_inside else None)
        # What is asked for wins over what is recorded.
        asked = build_engine(network, path, plugins=["query_attention"], route="sm_80").record
        assert (asked.plugins, asked.route) == (("query_attention",), "sm_80")


def test_the_command_builds_what_it_is_told(gpu, tmp_path):
    network = tmp_path / "net.onnx"
    write_one_node(network, "query_attention")

    def build(*words):
        result = CliRunner().invoke(command.export, ["tensorrt", str(network), "--json", *words])
        assert result.exit_code == 0, result.output
        said = json.loads(result.stdout)
        return said["plugins"], said["route"]

    assert build() == (["query_attention"], "sm_80")
    assert build("--plugin", "none") == ([], None)
    assert build("--plugin", "all", "--route", "sm_90a") == (["query_attention"], "sm_90a")
    assert build("--plugin", "motion_feature", "--plugin", "frame_attention") == ([], None)
    for words, status, message in (
        (("--plugin", "none", "--plugin", "all"), 2, "must stand alone"),
        (("--plugin", "attention"), 2, "plugins must be among query_attention, frame_attention"),
        (("--route", "sm_86"), 2, "the route to sm_90 must be one of sm_80, sm_90a, got 'sm_86'"),
        (("--plugin", "all", "--shared-bytes", "1"), 2, "at most 1 bytes of shared memory"),
    ):
        result = CliRunner().invoke(command.export, ["tensorrt", str(network), *words])
        assert result.exit_code == status, result.output
        assert message in result.stderr and result.stderr.count("\n") == 1


def test_the_command_says_the_checksum_to_vouch_with(gpu, tmp_path):
    network = tmp_path / "net.onnx"
    write_one_node(network, "query_attention")
    for words in ((), ("--json",)):
        result = CliRunner().invoke(command.export, ["tensorrt", str(network), *words])
        checksum = read_engine(tmp_path / "net.engine")[0].checksum
        assert result.exit_code == 0, result.output
        if words:
            assert json.loads(result.stdout)["checksum"] == checksum
        else:
            last = result.stdout.splitlines()[-1]
            assert last == f"checksum, to vouch for it elsewhere: {checksum}"


def test_an_engine_has_the_outputs_that_are_asked_for(gpu, tmp_path):
    network, path = tmp_path / "net.onnx", tmp_path / "net.engine"
    write_one_node(network, "query_attention")
    record = build_engine(network, path, controls=["query"], outputs=["prediction"]).record
    assert [tensor.name for tensor in record.network.outputs] == ["prediction"]
    assert (record.plugins, gpu.built) == ((), [])  # of which nobody reads anything


def test_queries_that_no_kernel_makes_are_left_out(gpu, tmp_path):
    network, path = tmp_path / "net.onnx", tmp_path / "net.engine"
    write_one_node(network, "query_attention_reduced")
    record = build_engine(network, path).record
    assert (record.network.controls, record.plugins) == (("query",), ("query_attention",))
    record = build_engine(network, path, controls=["query", "reduced"]).record
    assert (record.network.controls, record.plugins) == (("query", "reduced"), ())


def test_why_an_engine_has_not_been_built(gpu, tmp_path, monkeypatch):
    network = tmp_path / "net.onnx"
    write_one_node(network, "query_attention")
    for error, words in (
        (None, "at most 1 bytes of shared memory"),
        (
            ValueError("a width"),
            r"query_attention must be a plugin .* failed: ValueError\('a width'",
        ),
    ):
        if error:  # not ours, but a fault: it is told too, though TensorRT swallows it
            monkeypatch.setattr(plugins, "describe_layer", raise_error(error))
        with pytest.raises(RequestError if error is None else WorkError, match=words):
            build_engine(
                network, tmp_path / "net.engine", plugins=["query_attention"], shared_bytes=1
            )
        assert not (tmp_path / "net.engine").exists()


def raise_error(error):
    def fail(*_, **__):
        raise error

    return fail


def test_an_operator_without_a_kernel_is_left_out_where_nobody_named_it(gpu, tmp_path):
    network, path = tmp_path / "net.onnx", tmp_path / "net.engine"
    write_one_node(network, "query_attention")
    gpu.configs.clear()
    with pytest.warns(KinetiqWarning, match="query_attention is left to its function body: .* 1 b"):
        record = build_engine(network, path, shared_bytes=1).record
    assert (record.plugins, record.route, gpu.built) == ((), None, [])
    assert len(gpu.configs) == 2
    assert "at most 1 bytes of shared memory" in record.left_out["query_attention"]
    assert read_engine(path)[0].record == record


def test_nodes_of_more_frames_than_a_kernel_holds_are_said(gpu, tmp_path):
    network, path = tmp_path / "net.onnx", tmp_path / "net.engine"
    write_one_node(network, "frame_attention_deviation")
    record = build_engine(network, path).record
    assert (record.plugins, record.left_out) == (("frame_attention_deviation",), {})
    words = "frame_attention_deviation must be one kernel of at most 32 frames, and the profile has"
    with pytest.warns(KinetiqWarning, match=words):
        record = build_engine(network, path, bounds={"frames": Bounds(1, 16, 33)}).record
    assert (record.plugins, record.route) == ((), None)
    assert words in record.left_out["frame_attention"]


def test_a_fault_that_is_no_plugins_is_not_tried_again(gpu, tmp_path, monkeypatch):
    write_one_node(tmp_path / "net.onnx", "query_attention")
    gpu.configs.clear()
    monkeypatch.setattr(fake_tensorrt, "build_layer", raise_error(MemoryError()))
    with pytest.raises(WorkError, match=r"tensorrt must build .*: a plugin failed"):
        build_engine(tmp_path / "net.onnx", tmp_path / "net.engine")
    assert len(gpu.configs) == 1


@pytest.mark.parametrize("target", ["sm_75", "sm_70"])
def test_a_gpu_without_a_route_runs_function_bodies(gpu, tmp_path, monkeypatch, target):
    network, path = tmp_path / "net.onnx", tmp_path / "net.engine"
    write_one_node(network, "query_attention")
    monkeypatch.setattr(engine_tensorrt, "find_gpu", lambda: target)
    assert build_engine(network, path, plugins=()).record.plugins == ()
    with pytest.warns(KinetiqWarning, match=f"no kernel of ours is made for {target}"):
        record = build_engine(network, path).record
    assert record.left_out == {"query_attention": f"no kernel of ours is made for {target}"}
    assert (record.plugins, record.route, record.target) == ((), None, target)
    with pytest.raises(RequestError, match=f"target must be one of sm_80, .*, got '{target}'"):
        build_engine(network, path, plugins=["query_attention"])


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_float32_is_not_multiplied_in_fewer_bits(gpu, tmp_path, precision):
    write_one_node(tmp_path / "net.onnx", "query_attention", precision=precision)
    gpu.configs.clear()
    build_engine(tmp_path / "net.onnx", tmp_path / "net.engine", plugins=())
    (config,) = gpu.configs
    assert config.get_flag(gpu.BuilderFlag.TF32) is (precision != "float32")


def test_bounds_that_the_builder_refuses(gpu, tmp_path, monkeypatch):
    write_one_node(tmp_path / "net.onnx", "query_attention")
    profile, config = fake_tensorrt._Profile, fake_tensorrt._Config
    with monkeypatch.context() as patched:
        patched.setattr(profile, "set_shape", raise_error(ValueError("no such shape")))
        with pytest.raises(WorkError, match=r"take the bounds of latents, .*: no such shape; ask"):
            build_engine(tmp_path / "net.onnx", tmp_path / "net.engine", plugins=())
    monkeypatch.setattr(config, "add_optimization_profile", lambda *_: -1)
    with pytest.raises(WorkError, match="must take the bounds of the profile, and refuses them"):
        build_engine(tmp_path / "net.onnx", tmp_path / "net.engine", plugins=())


def test_a_tensorrt_that_is_too_old_is_named(gpu, tmp_path, monkeypatch):
    write_one_node(tmp_path / "net.onnx", "query_attention")
    words = r"our kernels need TensorRT 11\.4 or newer, got 11\.4 \(.*\.\[tensorrt\]"
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "tensorrt.plugin", None)
        with pytest.raises(MissingDependencyError, match=words):
            build_engine(tmp_path / "net.onnx", tmp_path / "net.engine")
    with monkeypatch.context() as patched:
        patched.setattr(gpu, "__version__", "10.14.1.48")  # which has all that is looked for
        with pytest.raises(MissingDependencyError, match=r"11\.4 or newer, got 10\.14\.1\.48: pip"):
            build_engine(tmp_path / "net.onnx", tmp_path / "net.engine")
    monkeypatch.setattr(gpu, "NetworkDefinitionCreationFlag", gpu.ProfilingVerbosity)
    with pytest.raises(MissingDependencyError, match=words):
        build_engine(tmp_path / "net.onnx", tmp_path / "net.engine")


def test_a_registration_that_failed_can_be_tried_again(tensorrt, monkeypatch):
    package, name = tensorrt.plugin, "query_attention"
    plugins._forget(package, KINDS[name])
    plugins._registered.discard(name)
    with monkeypatch.context() as patched:
        patched.setattr(package, "autotune", raise_error(RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            plugins.register_plugins(package)
    assert name not in plugins._registered
    plugins.register_plugins(package)
    assert name in plugins._registered


@pytest.mark.gpu
@pytest.mark.parametrize("element", [*TYPES, "BF16"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_the_driver_runs_the_embedded_kernel(tensorrt, kind, element, cpu_rng):
    """By every route to the GPU at hand, with no more than TensorRT gives."""
    dtype = (TYPES | {"BF16": torch.bfloat16})[element]
    inputs = {name: t.cuda() for name, t in draw(kind, dtype, cpu_rng).items()}
    exact, plain = (reference(kind, inputs, t) for t in (torch.float64, dtype))
    for route in ROUTES[find_gpu()]:
        with PluginCompiler(route) as compiler:
            built = build(tensorrt, compiler, kind, inputs)
            out = torch.full(built.shapes[0], float("nan"), dtype=dtype, device="cuda")
            driver.launch(built, [*inputs.values()], out)
        assert_as_good_as(out, plain, exact)
