"""Parity checks: a network that differs is found, and so is the node at which it begins."""

import contextlib
import json
import re
import shutil

import pytest
from click.testing import CliRunner
from exported import small_checkpoint

onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed")
pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")
pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
pytest.importorskip("openvino", reason="the extra 'export' is not installed")

from dataclasses import replace  # noqa: E402

from kinetiq.denoiser import EagerDenoiser  # noqa: E402
from kinetiq.errors import CheckpointError, RequestError, WorkError  # noqa: E402
from kinetiq.export import check as check_module  # noqa: E402
from kinetiq.export import command, network  # noqa: E402
from kinetiq.export.check import (  # noqa: E402
    banks_inside,
    check_network,
    find_first_difference,
    installed_runtimes,
)
from kinetiq.export.engine_file import FORMAT, EngineRecord, write_engine  # noqa: E402
from kinetiq.export.engine_profile import Bounds, Profile, make_profile  # noqa: E402
from kinetiq.export.example import BankSizes, example_shapes, make_example  # noqa: E402
from kinetiq.export.metadata import (  # noqa: E402
    KEY,
    checksum_of,
    encode_metadata,
    read_metadata,
    read_network,
)
from kinetiq.export.nodes import DOMAIN, KINDS  # noqa: E402
from kinetiq.kernels import motion_feature  # noqa: E402

FAULT = 7  # which of our nodes is made wrong


@pytest.fixture
def faulty(exported, tmp_path):
    """A network with one wrong node, whose checksum somebody made right; and the node's name."""
    return make_faulty(exported(), tmp_path / "faulty.onnx", "motion_addition")


def make_faulty(network, path, kind):
    model, metadata = read_network(network)
    ours = [node for node in model.graph.node if node.domain == DOMAIN]
    wrong = next(node for node in ours[FAULT:] if node.op_type == kind)
    name, output = wrong.name, wrong.output[0]
    wrong.output[0] = f"{output}.right"
    place = list(model.graph.node).index(wrong)
    model.graph.node.insert(
        place + 1,
        onnx.helper.make_node("Add", [f"{output}.right", f"{output}.right"], [output]),
    )
    del model.metadata_props[:]
    metadata = replace(metadata, checksum=checksum_of(model, metadata, path.parent))
    model.metadata_props.add(key=KEY, value=encode_metadata(metadata))
    path.write_bytes(model.SerializeToString())
    assert read_metadata(path) == metadata
    return path, name


def test_the_first_node_that_differs_is_named(faulty, exported):
    checkpoint = small_checkpoint("animatediff")
    for runtime in ("onnxruntime", "openvino"):
        assert find_first_difference(exported(), checkpoint, runtime) is None
    path, name = faulty
    found = find_first_difference(path, checkpoint, "onnxruntime")
    assert found is not None
    model, _ = read_network(path)
    ours = [node.name for node in model.graph.node if node.domain == DOMAIN]
    # The doubled output is read by the projection's node behind it, the first to come out wrong.
    assert ours.index(name) < ours.index(found.node) <= ours.index(name) + 4
    assert found.relative_error > found.allowed


def test_a_faulty_network_fails_the_check(faulty):
    checkpoint = small_checkpoint("animatediff")
    path, _ = faulty
    shape = example_shapes(read_metadata(path))[1]
    found = list(check_network(path, checkpoint, runtimes=("onnxruntime",), shapes=(shape,)))
    by_controls = {(one.output, bool(one.controls)): one.passed for one in found}
    assert not by_controls["prediction", False] and not by_controls["prediction", True]


def test_what_moves_is_compared_too(exported, tmp_path):
    path = tmp_path / "faulty.onnx"
    make_faulty(exported(), path, "motion_feature")
    shape = example_shapes(read_metadata(path))[1]
    found = check_network(
        path, small_checkpoint("animatediff"), runtimes=("onnxruntime",), shapes=(shape,)
    )
    assert {one.output: one.passed for one in found} == {
        "prediction": True,
        "features": True,
        "motion": False,
    }


def test_what_cannot_be_checked_is_refused(exported):
    checkpoint = small_checkpoint("unet3d")
    with pytest.raises(
        CheckpointError, match=r"^check: .* must be an export of small-unet3d, got one"
    ):
        list(check_network(exported(), checkpoint))
    right = small_checkpoint("animatediff")
    with pytest.raises(
        RequestError, match=r"^check: runtimes must be among onnxruntime, openvino, g"
    ):
        list(check_network(exported(), right, runtimes=("tensorflow",)))
    with pytest.raises(RequestError, match=r"^check: runtimes must be among .*, got 'tensorflow'"):
        find_first_difference(exported(), right, "tensorflow")
    with pytest.raises(CheckpointError, match=r"^check: .* must be an export of small-unet3d, g"):
        find_first_difference(exported(), checkpoint, "onnxruntime")


def test_the_runtimes_of_a_device():
    assert installed_runtimes("float32") == installed_runtimes("float16", "cpu")
    assert installed_runtimes("float32") == ("onnxruntime", "openvino")
    assert installed_runtimes("bfloat16") == ("openvino",)
    assert installed_runtimes("bfloat16", "cuda") == ("onnxruntime",)


@pytest.fixture
def engine(tmp_path, monkeypatch, exported):
    """An engine that is made up: what it predicts is eager's, times its factor."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    metadata = read_metadata(exported())
    bounds = {"rows": Bounds(1, 2, 2), "frames": Bounds(2, 2, 4), "width": Bounds(4, 4, 4)}
    bounds["feature_channels"] = Bounds(1, 1, 2)
    record = EngineRecord(
        format=FORMAT,
        kinetiq="0",
        runtime="tensorrt",
        version="11",
        target="sm_90",
        profile=make_profile(metadata, bounds),
        network=metadata,
        plugins=(),
        route=None,
        attentions=0,
        fused=None,
    )
    file = write_engine(tmp_path / "net.engine", b"plan", record)
    made_up = MadeUpEngine(file)
    monkeypatch.setattr(check_module, "open_engine", lambda *_, **__: made_up)
    return made_up


class MadeUpEngine:
    def __init__(self, file):
        self.file, self.metadata, self.factor, self.shapes = file, file.record.network, 1.0, []
        self._eager = EagerDenoiser(small_checkpoint("animatediff").unet)

    def predict(self, latents, *given):
        self.shapes.append(tuple(latents.shape))
        return self.factor * self._eager.attach().predict(latents, *given)

    def features(self, *given):
        return self._eager.attach().features(*given)

    def motion(self, *given_and_channels):
        *given, channels = given_and_channels
        assert len(channels) == 2  # as many as the profile takes
        return motion_feature(self.features(*given).flatten(2, 3), channels)


def test_an_engine_is_compared_inside_its_profile(engine, monkeypatch):
    monkeypatch.setattr(
        command, "load_checkpoint", lambda *_, **__: small_checkpoint("animatediff")
    )
    path = engine.file.path
    result = run("check", path, "--model", "small")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == 18 and all(line.startswith("ok   tensorrt") for line in lines)
    assert engine.shapes[::2] == [(1, 4, 2, 4, 4), (2, 4, 4, 4, 4), (2, 4, 4, 8, 4)]
    engine.factor = 1 + 2e-4
    result = run("check", path, "--model", "small")
    assert result.exit_code == 1
    assert sum(line.startswith("FAIL tensorrt") for line in result.stdout.splitlines()) == 6
    for words, said in (
        (("--nodes",), "--nodes must be left out for an engine"),
        (("--runtime", "openvino"), "--runtime must be left out for an engine"),
    ):
        result = run("check", path, *words)
        assert result.exit_code == 2 and said in result.stderr


def run(*arguments):
    return CliRunner().invoke(command.export, [*map(str, arguments)])


def test_the_command_says_what_it_compared(exported, faulty, monkeypatch):
    monkeypatch.setattr(
        command, "load_checkpoint", lambda *_, **__: small_checkpoint("animatediff")
    )
    result = run("check", exported(), "--model", "small", "--runtime", "onnxruntime", "--nodes")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == 3 * 2 * 3 + 1  # shapes, controls on and off, outputs; and the nodes
    assert all(line.startswith("ok   onnxruntime") for line in lines[:-1])
    assert lines[-1] == "ok   no node differs in onnxruntime"
    words = ("--model", "small", "--runtime", "onnxruntime", "--nodes", "--json")
    result = run("check", faulty[0], *words)
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert not said["passed"] and said["differing_nodes"][0]["runtime"] == "onnxruntime"


def test_the_command_says_on_a_terminal_what_is_under_way(engine, monkeypatch):
    told = []

    @contextlib.contextmanager
    def bars():
        yield lambda *event: told.append(event)

    monkeypatch.setattr(command, "progress_bars", bars)
    monkeypatch.setattr(
        command, "load_checkpoint", lambda *_, **__: small_checkpoint("animatediff")
    )
    assert run("check", engine.file.path, "--model", "small").exit_code == 0
    assert told == [("loading", 0, 1), *(("comparing", number, 18) for number in range(18))]
    told.clear()
    monkeypatch.setattr(network, "export_onnx", lambda *_, **__: (_ for _ in ()).throw(WorkError))
    run("onnx", "--out", engine.file.path.with_name("net.onnx"))
    assert told == [("loading", 0, 1), ("exporting", 0, 1)]


def test_nodes_of_a_narrower_network_are_refused_before_the_work(exported, monkeypatch):
    monkeypatch.setattr(command, "load_checkpoint", None)  # which would be the work
    result = run("check", exported(precision="float16"), "--nodes")
    assert result.exit_code == 2
    assert "nodes are compared in float32, got a network in float16" in result.stderr


def test_bad_input_is_one_line_and_status_2(tmp_path, exported):
    for arguments, words in (
        (
            ("onnx", "sprites", "--out", tmp_path / "n.onnx", "--controls", "x"),
            "must be among query",
        ),
        (
            ("onnx", "sprites", "--out", tmp_path / "n.onnx", "--dtype", "int8"),
            "dtype must be one of",
        ),
        (
            ("onnx", "sprites", "--out", tmp_path / "n.onnx", "--opset", "17"),
            "opset must be one of",
        ),
        (("check", tmp_path / "missing.onnx"), "cannot be read: No such file"),
        (("tensorrt", exported(), "--out", exported()), "must not replace the network"),
        (("tensorrt", exported().with_suffix(".engine")), "must not replace the network"),
        (("check", exported()), "--model must be the model that"),
        (("check", exported(), "--model", "sprites"), "must be an export of sprites, got one of s"),
        (("tensorrt", exported(), "--plugin", "bogus"), "plugins must be among query_attention"),
        (("tensorrt", exported(), "--plugin", "all", "--plugin", "none"), "must stand alone"),
        (("tensorrt", exported(), "--route", "sm_9"), "route must be one of sm_80, sm_86, sm_89"),
        (("tensorrt", exported(), "--controls", "x"), "controls must be among query, reduced"),
        (("tune", exported(), "--controls", "x"), "controls must be among query, reduced"),
        (("tensorrt", exported(), "--rtx"), "--rtx and --target go together"),
        (("tensorrt", exported(), "--profile", "rows"), "must be AXIS=LEAST:BEST:MOST"),
        (
            ("tensorrt", exported(), "--rtx", "--target", "sm_89", "--plugin", "all"),
            "--plugin is for full TensorRT",
        ),
        (
            ("tensorrt", exported(), "--rtx", "--target", "sm_89", "--shared-bytes", "9"),
            "--shared-bytes is for full TensorRT",
        ),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert words in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_model_is_loaded_by_the_word_of_a_file_only_where_it_is_the_embedded_one(
    exported, monkeypatch
):
    """Whatever lies in a folder of that name, or on the hub, the user has not asked for."""
    loads = []
    monkeypatch.setattr(
        command,
        "load_checkpoint",
        lambda name, **_: loads.append(name) or small_checkpoint("animatediff"),
    )
    monkeypatch.setattr(check_module, "check_network", lambda *_, **__: iter(()))
    assert run("check", exported()).exit_code == 2
    assert loads == []
    metadata = read_metadata(exported())
    monkeypatch.setattr(command, "read_metadata", lambda _: replace(metadata, checkpoint="sprites"))
    assert run("check", exported()).exit_code == 0
    assert run("check", exported(), "--model", "mine").exit_code == 0
    assert loads == ["sprites", "mine"]


def test_a_record_beside_a_network_makes_no_engine_of_it(exported, tmp_path):
    network = tmp_path / "net.onnx"
    shutil.copy(exported(), network)
    (tmp_path / f"net.onnx.{'0' * 16}.json").write_text("{}")
    assert "--model must be" in run("check", network, "--runtime", "onnxruntime").stderr
    network.write_bytes(b"no network")
    assert "the record beside it must be of this plan" in run("check", network).stderr


def test_help_names_every_axis_and_kind_that_can_be_asked_for(exported):
    said = " ".join(run("tensorrt", "--help").stdout.split())
    metadata = read_metadata(exported())
    axes = {axis for info in metadata.inputs for axis in info.axes if isinstance(axis, str)}
    wanted = {axis for axis in axes if not re.search(r"tokens_\d", axis)}
    assert all(word in said for word in (*wanted, *KINDS))


def test_banks_are_inside_a_profile():
    sizes = BankSizes(motion_slots=3, lora_slots=3, lora_rank=2)
    narrow = {"motion_slots": Bounds(1, 1, 1), "lora_rank": Bounds(4, 8, 8)}
    assert banks_inside(sizes, Profile(narrow)) == BankSizes(1, 3, 4)


def test_an_example_has_banks_of_the_sizes_that_it_is_told(exported):
    metadata = read_metadata(exported())
    network, shape = small_checkpoint("animatediff").unet, example_shapes(metadata)[1]
    for sizes in (BankSizes(), BankSizes(1, 2, 3)):
        given = make_example(network, metadata, shape, ("motion", "lora"), banks=sizes).controls
        assert {len(bank.value) for bank in given.motion.banks.values()} == {sizes.motion_slots}
        assert {bank.down.shape[:2] for bank in given.lora.banks.values()} == {
            (sizes.lora_slots, sizes.lora_rank)
        }
        assert int(given.motion.slot.max()) < sizes.motion_slots
        assert int(given.lora.slot.max()) < sizes.lora_slots
