"""Which operators run our kernels, by record, and how a record is made."""

import json
import sys
import types
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from one_node import write_one_node

from kinetiq.errors import InputError, RequestError, ShapeError, WorkError
from kinetiq.export import command, plugin_tuning
from kinetiq.export.engine_profile import make_profile
from kinetiq.export.plugin_choice import (
    CHOICE_FILE,
    FUNCTIONS,
    OPERATORS,
    PluginChoice,
    PluginRecord,
    check_operators,
    choice_file,
    choose_by_record,
    measure_choices,
    read_table,
    write_record,
)
from kinetiq.export.plugin_layers import KINDS
from kinetiq.export.plugin_ptx import ROUTES, route_names

ATTENTIONS = ("query_attention", "frame_attention")


def measure(seconds, routes=("old", "new"), operators=ATTENTIONS):
    """The record where choices take these seconds by name; those that it has not fail."""
    asked = []

    def seconds_of(choice):
        asked.append(choice.name)
        if choice.name not in seconds:
            raise WorkError(f"no {choice.name}")
        return seconds[choice.name]

    return measure_choices(operators, routes, seconds_of, {"gpu": "one"}), asked


def test_winners_are_tried_together_and_the_fastest_of_all_is_chosen():
    seconds = {
        "functions": 1.0,
        "query_attention by old": 0.9,
        "frame_attention by old": 0.95,
        "query_attention+frame_attention by old": 0.85,
        "query_attention by new": 0.8,
        "frame_attention by new": 1.1,
    }
    record, asked = measure(seconds)
    assert record.choice == PluginChoice(("query_attention",), "new")
    assert record.seconds == seconds and record.refused == {}
    assert sorted(asked) == sorted(seconds)  # "new" has one winner, which was tried alone
    record, _ = measure(seconds | {"query_attention by new": 0.86})
    assert record.choice == PluginChoice(ATTENTIONS, "old")


def test_a_gain_that_may_be_noise_is_none():
    names = ("query_attention by old", "frame_attention by old")
    record, asked = measure({"functions": 1.0, **dict.fromkeys(names, 0.985)}, routes=("old",))
    assert record.choice == FUNCTIONS
    assert asked == ["functions", *names]


def test_what_cannot_be_built_is_kept_with_its_reason():
    record, _ = measure({"functions": 1.0, "frame_attention by new": 0.5})
    assert record.choice == PluginChoice(("frame_attention",), "new")
    assert set(record.refused) == {
        "query_attention by old",
        "frame_attention by old",
        "query_attention by new",
    }
    assert record.refused["query_attention by old"] == "no query_attention by old"
    with pytest.raises(WorkError, match="no functions"):
        measure({})


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), ShapeError("too wide")])
def test_a_choice_that_does_not_run_costs_no_other_its_result(error):
    def seconds_of(choice):
        if choice.operators == ("frame_attention",):
            raise error
        return 0.5 if choice.operators else 1.0

    record = measure_choices(ATTENTIONS, ("old",), seconds_of, {"gpu": "one"})
    assert record.choice == PluginChoice(("query_attention",), "old")
    assert record.refused == {"frame_attention by old": str(error)}


RECORD = PluginRecord(
    PluginChoice(("query_attention",), "sm_90a"),
    {"functions": 2.0, "query_attention by sm_90a": 1.0},
    {"frame_attention by sm_80": "why"},
    {"gpu": "one"},
)


def test_a_record_is_written_beside_the_others_and_read(tmp_path):
    path = tmp_path / "choice.json"
    write_record(path, "sm_90", RECORD)
    other = replace(RECORD, choice=FUNCTIONS)
    write_record(path, "sm_80", other)
    table = read_table(path)
    assert {"sm_80": other, "sm_90": RECORD}.items() <= table.items()
    assert set(table) == {"sm_80", "sm_90", *read_table(CHOICE_FILE)}
    assert choose_by_record("sm_90", table) == RECORD.choice
    assert choose_by_record("sm_80", table) == FUNCTIONS
    path.write_text(json.dumps({"sm_90": {"choice": {"operators": "all", "route": None}}}))
    with pytest.raises(InputError, match="must be a file of plugin choices"):
        write_record(path, "sm_80", other)


def test_without_a_record_all_operators_are_ours():
    assert choose_by_record("sm_00", {}) == PluginChoice(OPERATORS)
    assert set(OPERATORS) == {kind.operator for kind in KINDS.values()}
    with pytest.raises(RequestError, match=r"plugins must be among .*, got attention, norm$"):
        check_operators(("norm", "attention"))


def test_a_file_that_the_environment_names_is_read_and_written(monkeypatch, tmp_path):
    path = tmp_path / "choice.json"
    write_record(path, "sm_00", RECORD)
    assert choose_by_record("sm_00") == PluginChoice(OPERATORS)
    monkeypatch.setenv("KINETIQ_PLUGINS", str(path))
    assert choose_by_record("sm_00") == RECORD.choice
    assert choice_file() == path
    monkeypatch.setenv("KINETIQ_PLUGINS", str(tmp_path / "none.json"))
    with pytest.raises(InputError, match=r"none.json: must be a file of plugin choices, as `kin"):
        choose_by_record("sm_00")


def check_choices(table):
    """Require of records that they can be followed, and that what they choose was measured."""
    for target, record in table.items():
        assert target in ROUTES
        assert record.choice.route in (None, *route_names(target))
        assert record.choice.name in record.seconds


def test_the_packages_choices_can_be_made():
    check_choices(read_table(CHOICE_FILE))


@pytest.mark.parametrize(
    ("target", "choice"),
    [
        ("sm_00", RECORD.choice),
        ("sm_89", RECORD.choice),  # which has no such route
        ("sm_90", PluginChoice(("query_attention",), "sm_80")),  # which was not measured
    ],
)
def test_choices_that_cannot_be_made_are_found(target, choice):
    check_choices({"sm_90": RECORD})
    with pytest.raises(AssertionError):
        check_choices({target: replace(RECORD, choice=choice)})


class Opened:
    """An engine whose prediction is what it was built for."""

    device = torch.device("cpu")

    def __init__(self, name):
        self.name = name

    def predict(self, given):
        assert given == "inputs"
        return self.name


@pytest.fixture
def gpu(monkeypatch):
    """A GPU on which engines take as long as they are said to, by name of their choice."""
    package = types.ModuleType("tensorrt")
    package.__version__ = "11.4"
    built = []
    seconds = {"functions": 3.0, "query_attention by sm_80": 2.0, "query_attention by sm_90a": 1.0}

    def build(network, path, *, plugins, route, **options):
        assert options.pop("vouched") is False  # it is thrown away
        built.append((PluginChoice(plugins, route).name, options))
        metadata = plugin_tuning.read_source(network, options["controls"])[1]
        profile = make_profile(metadata, options["bounds"] or {})
        return SimpleNamespace(
            checksum=PluginChoice(plugins, route).name,
            record=SimpleNamespace(network=metadata, profile=profile),
        )

    monkeypatch.setattr(plugin_tuning, "load_tensorrt", lambda: package)
    monkeypatch.setattr(plugin_tuning, "find_gpu", lambda: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(plugin_tuning, "build_engine", build)
    monkeypatch.setattr(plugin_tuning, "open_engine", lambda _, trust: Opened(trust))
    monkeypatch.setattr(plugin_tuning, "best_inputs", lambda *_: ("inputs",))
    monkeypatch.setattr(plugin_tuning, "median_seconds", lambda call: seconds[call()])
    return SimpleNamespace(built=built, seconds=seconds)


def test_what_is_measured_goes_where_it_is_read_from(gpu, tmp_path, monkeypatch):
    network, path = tmp_path / "net.onnx", tmp_path / "choice.json"
    write_one_node(network, "query_attention")
    monkeypatch.setenv("KINETIQ_PLUGINS", str(path))
    result = CliRunner().invoke(command.export, ["tune", str(network)])
    assert result.exit_code == 0, result.output
    assert choose_by_record("sm_90") == PluginChoice(("query_attention",), "sm_90a")


def test_the_command_measures_and_writes(gpu, tmp_path):
    network, path = tmp_path / "net.onnx", tmp_path / "choice.json"
    write_one_node(network, "query_attention")
    words = ["tune", str(network), "--path", str(path), "--profile", "rows=2", "--json"]
    result = CliRunner().invoke(command.export, words)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["target"] == "sm_90" and said["seconds"] == gpu.seconds
    record = read_table(path)["sm_90"]
    assert record.choice == PluginChoice(("query_attention",), "sm_90a")
    assert record.measured == {
        "gpu": "a GPU",
        "tensorrt": "11.4",
        "network": "one node",
        "precision": "float16",
    }
    assert [name for name, _ in gpu.built] == list(gpu.seconds)
    assert all(options["bounds"]["rows"].most == 2 for _, options in gpu.built)


def test_a_file_that_cannot_be_written_is_said_before_the_work(gpu, tmp_path):
    write_one_node(tmp_path / "net.onnx", "query_attention")
    words = ["tune", str(tmp_path / "net.onnx"), "--path", str(tmp_path / "no" / "choice.json")]
    result = CliRunner().invoke(command.export, words)
    assert result.exit_code == 2 and "must exist to hold 'choice.json'" in result.stderr
    assert not gpu.built


def test_a_step_is_of_the_best_sizes(tmp_path):
    metadata = write_one_node(tmp_path / "net.onnx", "query_attention")
    own = [replace(metadata.inputs[0], name=n, axes=a) for n, a in (
        ("timesteps", ("rows",)), ("text", ("rows", "text_tokens", 8)),
    )]  # fmt: skip
    metadata = replace(metadata, inputs=(*metadata.inputs, *own))
    profile = make_profile(metadata, {})
    latents, timesteps, text = plugin_tuning.best_inputs(metadata, profile, torch.device("cpu"))
    assert latents.shape == (2, 4, 16, 8, 8) and latents.dtype == torch.float16
    assert timesteps.shape == (2,) and bool((timesteps >= 0).all())
    assert text.shape == (2, 77, 8)


def test_without_tensorrt_it_is_said(tmp_path, monkeypatch):
    write_one_node(tmp_path / "net.onnx", "query_attention")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    result = CliRunner().invoke(command.export, ["tune", str(tmp_path / "net.onnx")])
    assert result.exit_code == 1
    assert "needs TensorRT" in result.stderr and result.stderr.count("\n") == 1
