"""From records to what backend="auto" chooses by."""

import json
from dataclasses import replace
from pathlib import Path

from click.testing import CliRunner

from kinetiq.backend_choice import RATIOS_FILE
from kinetiq.bench import command
from kinetiq.bench.backends import draw_ratios, render_ratios
from kinetiq.bench.records import Record, append_record, read_folder

ROOT = Path(__file__).parents[2]
FIGURES = {
    "export.onnxruntime_fp32.latent_error": 5e-6,
    "export.openvino_fp32.latent_error": 2e-4,
    "export.openvino_bf16.error_ratio": 1.1,
    "export.onnxruntime_fp32.ratio": 0.5,
    "export.threads_1.onnxruntime_fp32.ratio": 0.45,
    "export.threads_2.onnxruntime_fp32.ratio": 0.5,
    "export.embedded.onnxruntime_fp32.ratio": 0.6,
    "export.openvino_fp32.ratio": 0.4,
    "export.openvino_bf16.ratio": 0.7,
    "export.onnxruntime_bf16.ratio": 0.1,  # whose error has no figure
    "export.onnxruntime_fp16.error_ratio": 1.0,
    "export.onnxruntime_fp16.ratio": 0.1,  # in which nothing runs on a CPU
}
RECORD = Record(
    bench="export",
    figures=FIGURES,
    targets={
        "export.onnxruntime_fp32.latent_error": {"at_most": 1e-4},
        "export.openvino_fp32.latent_error": {"at_most": 1e-4},
        "export.openvino_bf16.error_ratio": {"at_most": 2},
        "export.onnxruntime_fp16.error_ratio": {"at_most": 2},
    },
    missed=["export.openvino_fp32.latent_error"],
    environment={"commit": None, "dirty": None, "machine": {"cpu_kind": "new"}, "versions": {}},
    intervals={"export.embedded.onnxruntime_fp32.ratio": [0.5, 0.625, 9]},
    quick=False,
    seconds=1.0,
    command="kinetiq bench export",
    date="2025-01-02T00:00:00+00:00",
    units={},
)
DRAWN = {"new": {"float32": {"onnxruntime": 0.625}, "bfloat16": {"openvino": 0.7}}}


def on(kind, **changes):
    machine = {} if kind is None else {"cpu_kind": kind}
    return replace(RECORD, environment={**RECORD.environment, "machine": machine}, **changes)


def test_the_worst_ratio_of_what_is_exact():
    assert draw_ratios([RECORD]) == DRAWN


def test_of_each_kind_the_newest_full_run_counts():
    figures = FIGURES | {"export.embedded.onnxruntime_fp32.ratio": 0.9}
    later = "2025-01-03T00:00:00+00:00"
    others = [
        on("old"),
        on("new", quick=True, date=later, figures=figures),
        on("new", bench="query", date=later, figures=figures),
        on(None, date=later, figures=figures),
    ]
    assert draw_ratios([RECORD, *others]) == DRAWN | {"old": DRAWN["new"]}
    newer = on("new", date=later, figures=figures, intervals={})
    assert draw_ratios([newer, RECORD])["new"]["float32"] == {"onnxruntime": 0.9}
    assert draw_ratios([]) == {}


def test_an_error_without_a_target_proves_nothing():
    assert draw_ratios([on("new", targets={})]) == {"new": {}}


def test_the_packages_data_agrees_with_the_records():
    drawn = render_ratios(draw_ratios(read_folder(ROOT / "bench" / "results")))
    assert RATIOS_FILE.read_text() == drawn, "run `kinetiq bench backends`"


def test_the_command_draws_checks_and_says_so(tmp_path):
    append_record(RECORD, tmp_path / "results")
    words = ["backends", "--results", str(tmp_path / "results"), "--path", str(tmp_path / "a.json")]
    run = lambda *more: CliRunner().invoke(command.bench, [*words, *more])
    result = run("--check")
    assert result.exit_code == 1 and not (tmp_path / "a.json").exists()
    assert "must agree with the records, but differs" in result.stderr
    result = run()
    assert result.exit_code == 0 and "drawn from" in result.stdout
    assert json.loads((tmp_path / "a.json").read_text()) == DRAWN
    result = run("--check")
    assert result.exit_code == 0 and "agrees with the records" in result.stdout
    (tmp_path / "a.json").write_text("{}\n")
    assert run("--check").exit_code == 1
    assert (tmp_path / "a.json").read_text() == "{}\n"


def test_outside_a_checkout_the_records_are_named(monkeypatch):
    monkeypatch.setattr(command, "find_checkout", lambda: None)
    result = CliRunner().invoke(command.bench, ["backends"])
    assert result.exit_code == 2
    assert "must run in a checkout, found none; name the folder with --results" in result.stderr
