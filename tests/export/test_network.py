"""An exported network computes what the eager one does, for any shape and any control."""

import dataclasses
import hashlib

import pytest
import torch
from exported import FAMILIES, TAP, small_checkpoint
from torch._subclasses import FakeTensorMode

onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed")
onnx_ir = pytest.importorskip("onnx_ir", reason="the extra 'export' is not installed")
pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")

import kinetiq as kq  # noqa: E402
from kinetiq.checkpoint import load_checkpoint  # noqa: E402
from kinetiq.denoiser import EagerDenoiser  # noqa: E402
from kinetiq.errors import OutputError, RequestError, ShapeError  # noqa: E402
from kinetiq.export import network  # noqa: E402
from kinetiq.export.check import SLACK, TOLERANCE, check_network  # noqa: E402
from kinetiq.export.example import example_shapes, make_example  # noqa: E402
from kinetiq.export.metadata import read_metadata, read_network  # noqa: E402
from kinetiq.export.network import check_kinds, export_onnx  # noqa: E402
from kinetiq.export.nodes import DOMAIN, KINDS, NODES  # noqa: E402
from kinetiq.export.onnxruntime_denoiser import OnnxruntimeDenoiser  # noqa: E402
from kinetiq.export.openvino_denoiser import OpenvinoDenoiser  # noqa: E402
from kinetiq.export.specialisation import keep_controls  # noqa: E402
from kinetiq.kernels import motion_feature  # noqa: E402

RUNTIMES = {"onnxruntime": OnnxruntimeDenoiser, "openvino": OpenvinoDenoiser}
SINGLE = [("query",), ("query", "reduced"), ("deviation",), ("motion",), ("lora",), ("skip",)]


@pytest.fixture(params=RUNTIMES)
def runtime(request):
    pytest.importorskip(request.param, reason="the extra 'export' is not installed")
    return request.param


def predict(denoiser, example):
    with torch.inference_mode():
        return denoiser.predict(
            example.latents, example.timesteps, example.text, example.controls
        ).float()


def assert_equal_enough(got, expected):
    assert got.shape == expected.shape
    error = float((got - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCE, f"relative error {error:.2e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_control_on_and_off_at_every_shape(family, runtime, exported):
    checkpoint = small_checkpoint(family)
    denoiser = RUNTIMES[runtime](exported(family))
    eager = EagerDenoiser(checkpoint.unet).attach()
    shapes = example_shapes(denoiser.metadata)
    assert len(shapes) >= 3
    plain = {}
    for kinds in [(), *SINGLE, KINDS]:
        for shape in shapes:
            regions = kinds == KINDS or shape is shapes[1]
            example = make_example(
                checkpoint.unet, denoiser.metadata, shape, kinds, regions=regions
            )
            expected = predict(eager, example)
            assert_equal_enough(predict(denoiser, example), expected)
            plain.setdefault(shape, expected)
            if kinds and shape is shapes[1]:  # a control that did nothing would prove nothing
                change = (expected - plain[shape]).abs().max() / expected.abs().max()
                assert change > 100 * TOLERANCE, kinds


@pytest.mark.parametrize("family", FAMILIES)
def test_neutral_controls_change_nothing(family, exported):
    """A graph that carries all kinds, given none of them, is the graph without."""
    checkpoint = small_checkpoint(family)
    denoiser = OnnxruntimeDenoiser(exported(family))
    example = make_example(checkpoint.unet, denoiser.metadata, example_shapes(denoiser.metadata)[1])
    given = (example.latents, example.timesteps, example.text, example.controls)
    kinds = frozenset(KINDS)
    with_all = denoiser.run(denoiser.inputs_of(*given, kinds), kinds, "prediction")
    assert_equal_enough(with_all, predict(denoiser, example))


def test_features_are_those_of_the_tap(runtime, exported):
    checkpoint = small_checkpoint("animatediff")
    denoiser = RUNTIMES[runtime](exported())
    eager = EagerDenoiser(checkpoint.unet).attach()
    for shape in example_shapes(denoiser.metadata):
        example = make_example(checkpoint.unet, denoiser.metadata, shape, KINDS)
        given = (example.latents, example.timesteps, example.text, example.controls, TAP)
        with torch.inference_mode():
            features = eager.features(*given)
            assert_equal_enough(denoiser.features(*given), features)
            chosen = torch.tensor([features.shape[-1] - 1, 0, 2, 0])
            moving = motion_feature(features.flatten(2, 3), chosen)
            got = denoiser.motion(*given, chosen)
        assert got.shape == moving.shape
        assert (got - moving).abs().max() <= TOLERANCE * features.abs().max()


@pytest.mark.parametrize("family", ["animatediff", pytest.param("unet3d", marks=pytest.mark.slow)])
def test_half_precision_errs_no_more_than_twice_as_much_as_eager(family, exported):
    pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    checkpoint = small_checkpoint(family)
    comparisons = list(check_network(exported(family, "float16"), checkpoint))
    assert {one.output for one in comparisons} == {"prediction", "features", "motion"}
    wrong = [one for one in comparisons if not one.passed]
    assert not wrong, wrong
    assert all(one.allowed < 0.1 for one in comparisons), f"{SLACK} times eager's own error"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_errs_no_more_than_twice_as_much_as_eager(family, exported):
    pytest.importorskip("openvino", reason="the extra 'export' is not installed")
    checkpoint = small_checkpoint(family)
    comparisons = list(check_network(exported(family, "bfloat16"), checkpoint))
    assert {one.runtime for one in comparisons} == {"openvino"}
    wrong = [one for one in comparisons if not one.passed]
    assert not wrong, wrong


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_onnxruntime_computes_the_same_with_cuda(family, precision, exported):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA: pip install onnxruntime-gpu")
    comparisons = list(
        check_network(exported(family, precision), small_checkpoint(family), device="cuda")
    )
    assert {one.runtime for one in comparisons} == {"onnxruntime"}
    wrong = [one for one in comparisons if not one.passed]
    assert not wrong, wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_is_valid_and_says_its_axes(family, exported):
    path = exported(family)
    onnx.checker.check_model(path, full_check=True)
    model, metadata = read_network(path)
    graph = {value.name: value for value in model.graph.input}
    assert list(graph) == [info.name for info in metadata.inputs]
    for info in metadata.inputs + metadata.outputs:
        value = graph.get(info.name) or next(
            value for value in model.graph.output if value.name == info.name
        )
        axes = value.type.tensor_type.shape.dim
        assert tuple(axis.dim_param or axis.dim_value for axis in axes) == info.axes, info.name
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 23, DOMAIN: 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_one_node_that_plugins_and_functions_know(family, exported):
    model, metadata = read_network(exported(family))
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    attentions = [node for node in nodes if "attention" in node.op_type]
    assert len(attentions) == len(metadata.sites)
    assert not [node for node in model.graph.node if node.op_type == "Attention"]
    assert {function.name for function in model.functions} == {node.op_type for node in nodes}
    for node in nodes:
        said = {attribute.name: attribute for attribute in node.attribute}
        assert said["plugin_namespace"].s == DOMAIN.encode()
        assert set(said) == {*NODES[node.op_type].attributes, "plugin_namespace"}
    assert not any(node.metadata_props for node in model.graph.node)


def test_a_kind_that_is_taken_out_leaves_neither_nodes_nor_inputs(exported):
    model, metadata = read_network(exported())
    plain = keep_controls(model, (), outputs=("prediction",))
    assert [value.name for value in plain.graph.input] == ["latents", "timesteps", "text"]
    names = {node.op_type for node in plain.graph.node if node.domain == DOMAIN}
    assert names == {"query_attention_plain", "query_attention_text", "frame_attention_plain"}
    onnx.checker.check_model(plain, full_check=True)
    some = keep_controls(model, ("query", "lora"))
    names = {node.op_type for node in some.graph.node if node.domain == DOMAIN}
    assert {"query_attention", "frame_attention_query", "low_rank_addition"} <= names
    assert not [v.name for v in some.graph.input if v.name.startswith(("motion", "skip", "dev"))]
    assert len(metadata.inputs) == len(model.graph.input)  # the model itself is left alone


def test_many_weights_lie_beside_the_file(exported, runtime, tmp_path, monkeypatch):
    metadata = read_metadata(exported())
    monkeypatch.setattr(network, "_INSIDE_BYTES", 0)
    made = network._write(onnx_ir.load(exported()), metadata, tmp_path / "net.onnx")
    assert made.files[0].name == "net.onnx"
    digest = hashlib.sha256(made.files[1].read_bytes()).hexdigest()[:12]
    assert made.files[1].name == f"net.onnx.{digest}.data"  # no other export's has that name
    assert sorted(tmp_path.iterdir()) == sorted(made.files)
    assert made.path.stat().st_size < made.files[1].stat().st_size / 2
    assert read_metadata(made.path) == made.metadata
    inside, beside = (RUNTIMES[runtime](path) for path in (exported(), made.path))
    example = make_example(
        small_checkpoint("animatediff").unet, metadata, example_shapes(metadata)[1], ("query",)
    )
    assert torch.equal(predict(inside, example), predict(beside, example))
    other = network._write(
        onnx_ir.load(exported("unet3d")), read_metadata(exported("unet3d")), made.path
    )
    assert other.files[1] != made.files[1]
    assert sorted(tmp_path.iterdir()) == sorted(other.files)  # nothing is left of the former


def test_who_comes_back_before_the_former_is_removed_keeps_its_weights(
    exported, tmp_path, monkeypatch
):
    monkeypatch.setattr(network, "_INSIDE_BYTES", 0)
    path, look, looks = tmp_path / "net.onnx", network._weights_beside, []

    def write(family):
        source = exported(family)
        return network._write(onnx_ir.load(source), read_metadata(source), path)

    def overtaken(given):
        looks.append(given)
        if len(looks) == 2:  # the second network is there, and the weights of the first still are
            write("animatediff")
        return look(given)

    first = write("animatediff")
    monkeypatch.setattr(network, "_weights_beside", overtaken)
    write("unet3d")
    assert read_metadata(path) == first.metadata


def test_exporting_leaves_the_network_as_it_was(tmp_path):
    checkpoint = small_checkpoint("unet3d")
    before = dict(checkpoint.unet.state_dict(keep_vars=True))
    pointers = {name: tensor.data_ptr() for name, tensor in before.items()}
    modules = {name: type(module) for name, module in checkpoint.unet.named_modules()}
    made = export_onnx(checkpoint, tmp_path / "net.onnx", dtype="float16", controls=())
    after = checkpoint.unet.state_dict(keep_vars=True)
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == pointers
    assert all(after[name] is tensor for name, tensor in before.items())
    assert {name: type(module) for name, module in checkpoint.unet.named_modules()} == modules
    assert made.metadata.controls == () and made.metadata.precision == "float16"
    assert [info.name for info in made.metadata.inputs] == ["latents", "timesteps", "text"]


def test_weights_that_are_views_of_a_file_can_be_cast_and_traced(tiny_folder):
    unet = load_checkpoint(tiny_folder()).unet
    before = dict(unet.named_buffers())
    assert any(buffer._is_view() for buffer in before.values())
    with network.cast_weights(unet, torch.float16):
        cast = dict(unet.named_buffers())
        assert {buffer.dtype for buffer in cast.values()} == {torch.float16}
        assert {weight.dtype for weight in unet.parameters()} == {torch.float16}
        with FakeTensorMode() as fake:
            for tensor in (*cast.values(), *unet.parameters()):
                fake.from_tensor(tensor, static_shapes=True)
    after = dict(unet.named_buffers())
    assert all(after[name] is buffer for name, buffer in before.items())
    assert {tensor.dtype for tensor in (*after.values(), *unet.parameters())} == {torch.float32}


def test_an_engine_that_compiles_is_looked_at_without_compiling(tiny_folder):
    with kq.Engine.load(tiny_folder(), backend="compiled") as engine:
        unet, denoiser = engine.checkpoint.unet, engine.denoiser
        ours = {name: type(module) for name, module in unet.named_modules()}
        with network._stock(engine) as stock:
            assert stock is unet and not denoiser.attached
            assert all("kinetiq" not in type(module).__module__ for module in stock.modules())
        assert {name: type(module) for name, module in unet.named_modules()} == ours
        assert denoiser.attached and denoiser.compilations == 0


def test_what_a_network_cannot_do_is_refused_with_words(exported):
    checkpoint = small_checkpoint("animatediff")
    denoiser = OnnxruntimeDenoiser(exported())
    shape = example_shapes(denoiser.metadata)[1]
    example = make_example(checkpoint.unet, denoiser.metadata, shape, ("query",))
    latents, given = example.latents, (example.timesteps, example.text, example.controls)
    with pytest.raises(ShapeError, match=r"^onnxruntime: latents must be \[rows, 4, frames, h"):
        denoiser.predict(latents[:, :3], *given)
    with pytest.raises(ShapeError, match=r"latents must have at most 32 frames, of .*, got 33$"):
        denoiser.predict(torch.zeros(3, 4, 33, 4, 4), *given)
    with pytest.raises(ShapeError, match=r"must be multiples of 2, got 4x5; ask for another size"):
        denoiser.predict(latents[..., :5], *given)
    with pytest.raises(ShapeError, match=r"must have as many rows, got 2, 3 and 3$"):
        denoiser.predict(latents[:2], *given)
    with pytest.raises(
        RequestError, match=r"got features of mid_block; the network was exported w"
    ):
        denoiser.features(latents, *given, "mid_block")
    with pytest.raises(RequestError, match=r"got gradients of features; load the model with back"):
        denoiser.features(latents.requires_grad_(), *given, TAP)
    with pytest.raises(RequestError, match=r"got gradients of prediction; load the model with b"):
        denoiser.predict(latents, *given)
    with pytest.raises(RequestError, match=r"got gradients of prediction; load the model with b"):
        denoiser.predict(latents.detach(), example.timesteps, example.text.clone().requires_grad_())
    with pytest.raises(RequestError, match=r"got keeping keys and values of sites; load"):
        denoiser.keeping((), torch.zeros(1, dtype=torch.int64))
    shared = dataclasses.replace(example.controls, shared_key=object())
    with pytest.raises(
        RequestError, match=r"got the control shared_key; no exported network carries it; load"
    ):
        denoiser.predict(latents.detach(), example.timesteps, example.text, shared)
    narrow = OnnxruntimeDenoiser(exported())
    narrow.metadata = dataclasses.replace(narrow.metadata, controls=("lora",))
    with pytest.raises(
        RequestError, match=r"with lora; export it with --controls that include que"
    ):
        narrow.predict(latents.detach(), *given)


def test_banks_are_seen_to_change_and_are_not_lost(exported, runtime):
    checkpoint = small_checkpoint("animatediff")
    denoiser = RUNTIMES[runtime](exported())
    shape = example_shapes(denoiser.metadata)[1]
    example = make_example(checkpoint.unet, denoiser.metadata, shape, ("motion",))
    given = (example.latents, example.timesteps, example.text)
    motion = example.controls.motion

    def run(banks):
        moved = dataclasses.replace(motion, banks=banks)
        return denoiser.predict(*given, dataclasses.replace(example.controls, motion=moved))

    with torch.no_grad():
        banks = dict(motion.banks)
        first = run(banks)
        other = {
            site: dataclasses.replace(bank, query_key=-bank.query_key)
            for site, bank in banks.items()
        }
        wanted = run(other)
        assert not torch.equal(first, wanted)
        banks.update(other)  # the same mapping with other banks
        assert torch.equal(run(banks), wanted)
        for bank in banks.values():
            bank.query_key.neg_()  # the same banks with other numbers
        assert torch.equal(run(banks), first)
        site, bank = next(iter(banks.items()))
        projected = dataclasses.replace(bank, query_key=None, projected_query=bank.query_key)
        with pytest.raises(RequestError, match="embedding must be given beside its projections"):
            run({site: projected})
        assert_equal_enough(run({}), denoiser.predict(*given))


def test_options_without_a_meaning_are_refused(tmp_path):
    checkpoint = small_checkpoint("animatediff")
    for options, words in (
        ({"opset": 18}, r"^export: opset must be one of 23, got 18; the functions"),
        ({"dtype": "float64"}, r"^export: dtype must be one of float32, float16, bfloat16, got"),
        ({"controls": ("query", "quary")}, r"^export: controls must be among .*, got quary$"),
        ({"controls": ("reduced",)}, r"^export: the control 'reduced' needs 'query'"),
        ({"tap": "up_blocks.7"}, r"^tap: must be a block of this UNetMotionModel"),
    ):
        with pytest.raises(RequestError, match=words):
            export_onnx(checkpoint, tmp_path / "net.onnx", **options)
    with pytest.raises(OutputError, match=r"^export: the folder .* must exist"):
        export_onnx(checkpoint, tmp_path / "nowhere" / "net.onnx")
    assert check_kinds({"skip", "query"}) == ("query", "skip")
    assert not list(tmp_path.iterdir())


def test_metadata_says_what_the_network_is(exported):
    metadata = read_metadata(exported("unet3d"))
    checkpoint = small_checkpoint("unet3d")
    assert metadata.fingerprint == checkpoint.fingerprint
    assert metadata.sites == EagerDenoiser(checkpoint.unet).sites
    assert (metadata.family, metadata.precision, metadata.tap) == ("unet3d", "float32", TAP)
    assert metadata.controls == KINDS and metadata.multiple == 2
    assert (metadata.positions, read_metadata(exported()).positions) == (None, 32)
    assert {"torch", "onnx", "onnxscript", "kinetiq"} <= metadata.versions.keys()
