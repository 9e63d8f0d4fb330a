import json
import re
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from kinetiq.bench import command
from kinetiq.bench.command import make_group
from kinetiq.bench.figures import Figure
from kinetiq.bench.harness import Bench, Registry
from kinetiq.bench.records import read_records
from kinetiq.errors import RequestError, WorkError

KEYS = [
    *("bench", "figures", "targets", "missed", "environment"),
    *("intervals", "quick", "seconds", "command", "date"),
]


def measure_good(options, progress):
    print("chatter")
    for _ in progress.track(range(2), "good"):
        pass
    leak = 0.2 if options.quick else 0.05
    return {"query.motion_fidelity": Figure(0.75, 0.7, 0.8, n=8), "query.identity_leak": leak}


def measure_broken(options, progress):
    raise RuntimeError("out of luck")


FAKES = {
    "good": Bench("good", "works well", measure_good),
    "broken": Bench("broken", "never works", measure_broken),
    "needy": Bench("needy", "wants a GPU", measure_good, needs=("gpu",)),
}


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    """Run `kinetiq bench ...` with fake benches, outside any checkout."""
    monkeypatch.setattr(command, "find_checkout", lambda: None)
    monkeypatch.chdir(tmp_path)

    def run(*words, names=tuple(FAKES)):
        for name in names:
            module = SimpleNamespace(BENCH=FAKES.get(name))
            monkeypatch.setitem(sys.modules, f"fake_{name}", module)
        group = make_group(Registry({name: f"fake_{name}" for name in names}))
        result = CliRunner().invoke(group, list(words))
        if result.exception is not None:
            assert isinstance(result.exception, SystemExit), result.exception
        return result

    return run


def test_json_is_the_only_thing_on_standard_output(invoke):
    result = invoke("good", "--json", "--device", "cpu")
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    assert list(printed) == KEYS
    assert printed["figures"] == {"query.motion_fidelity": 0.75, "query.identity_leak": 0.05}
    assert printed["targets"] == {
        "query.motion_fidelity": {"at_least": 0.5},
        "query.identity_leak": {"at_most": 0.1},
    }
    assert printed["intervals"] == {"query.motion_fidelity": [0.7, 0.8, 8]}
    assert printed["missed"] == []
    assert "chatter" in result.stderr


def test_a_missed_target_is_marked_and_no_error(invoke):
    result = invoke("good", "--quick")
    assert result.exit_code == 0
    assert "good (quick)" in result.stdout
    assert "missed query.identity_leak: must be at most 0.1, got 0.2. Keys" in result.stdout
    assert json.loads(invoke("good", "--quick", "--json").stdout)["missed"] == [
        "query.identity_leak"
    ]


def test_no_progress_where_standard_error_is_no_terminal(invoke):
    assert invoke("good", "--no-record").stderr == "chatter\n"


def test_each_run_appends_a_record(invoke, tmp_path):
    for seed in ("0", "3"):
        result = invoke("good", "--seed", seed, "--device", "cpu", "--results", "made")
        assert result.exit_code == 0
        assert "recorded in made/good.jsonl" in result.stderr
    records = read_records(tmp_path / "made" / "good.jsonl")
    assert [record.command for record in records] == [
        "kinetiq bench good --device cpu",
        "kinetiq bench good --seed 3 --device cpu",
    ]


def test_a_checkout_keeps_the_records(invoke, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "find_checkout", lambda: tmp_path)
    invoke("good", "--quick")
    (record,) = read_records(tmp_path / "bench" / "results" / "good.jsonl")
    assert record.quick and record.command == "kinetiq bench good --quick"


def test_no_record_writes_nothing(invoke, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "find_checkout", lambda: tmp_path)
    assert invoke("good", "--no-record").exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_the_run_says_that_it_is_not_recorded(invoke):
    result = invoke("good")
    assert result.exit_code == 0
    assert "not recorded: bench: records need a checkout or a folder" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["nope"],
            'bench: error: NAME must be one of good, broken, needy, all, .*list.*, got "nope"',
        ),
        (["good", "--nope"], "No such option"),
        (["good", "--seed", "-1"], "-1 is not in the range"),
        (["good", "--device", "tpu"], "device: must be 'cpu', 'cuda' or 'cuda:<index>', got 'tpu'"),
        (["good", "--record"], "records need a checkout or a folder, found none"),
        (["good", "--no-record", "--results", "x"], "--results must come without --no-record"),
        (["good", "--results", "file/x"], "file/x: must be a folder, got: "),
        (["readme"], "must run in a checkout, found none; name --results and --page"),
        (["compare", "a", "b"], "a: must be a file of records, got: "),
    ],
)
def test_bad_input_ends_with_2_and_words(invoke, tmp_path, words, message):
    (tmp_path / "file").touch()
    result = invoke(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.search(message, result.stderr), result.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "kinetiq: error: bench broken: must finish, got RuntimeError"),
        ("needy", "kinetiq: error: bench needy: needs an NVIDIA GPU (the device is cpu)"),
        (
            "absent",
            'kinetiq: error: bench absent: fake_absent must expose BENCH with name="absent"',
        ),
    ],
)
def test_what_cannot_be_measured_ends_with_1(invoke, tmp_path, name, message):
    result = invoke(
        name, "--json", "--device", "cpu", "--results", "made", names=("broken", "needy", "absent")
    )
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in result.stderr
    assert not list(tmp_path.rglob("*.jsonl"))


def test_all_measures_what_it_can(invoke, tmp_path):
    result = invoke("all", "--json", "--device", "cpu", "--results", "made")
    assert result.exit_code == 1
    printed = json.loads(result.stdout)
    assert list(printed) == ["benches", "skipped", "failed"]
    assert list(printed["benches"]) == ["good"] and list(printed["benches"]["good"]) == KEYS
    assert printed["skipped"] == {"needy": "needs an NVIDIA GPU (the device is cpu)"}
    assert "out of luck" in printed["failed"]["broken"]
    assert "measured 1, skipped 1, failed 1" in result.stderr
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["good.jsonl"]


def test_all_is_fine_when_a_bench_is_skipped(invoke):
    result = invoke("all", "--device", "cpu", names=("good", "needy"))
    assert result.exit_code == 0
    assert "query.motion_fidelity" in result.stdout
    assert "needy skipped: needs an NVIDIA GPU" in result.stderr


def test_all_fails_when_nothing_was_measured(invoke):
    assert invoke("all", "--device", "cpu", names=("needy",)).exit_code == 1


def test_a_full_disk_does_not_lose_the_result(invoke, monkeypatch):
    def fail(record, folder):
        raise command.OutputError("disk: must have room, it is full")

    monkeypatch.setattr(command, "append_record", fail)
    result = invoke("good", "--json", "--results", "made")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["bench"] == "good"
    assert "disk: must have room" in result.stderr


def test_help_lists_benches_with_their_summaries(invoke):
    result = invoke("--help", names=("good", "absent"))
    assert result.exit_code == 0
    assert "works well" in result.stdout
    assert "cannot run here: bench absent" in result.stdout
    for name in ("all", "list", "readme", "backends", "compare"):
        assert f"  {name} " in result.stdout


def test_list_shows_needs(invoke):
    lines = invoke("list").stdout.splitlines()
    assert lines[0].split() == ["bench", "summary", "needs"]
    assert lines[1].split() == ["good", "works", "well"]
    assert lines[3].split() == ["needy", "wants", "a", "GPU", "gpu"]
    listed = json.loads(invoke("list", "--json").stdout)["benches"]
    assert listed[0] == {"bench": "good", "summary": "works well", "needs": []}
    assert listed[2]["needs"] == ["gpu"]


def test_no_bench_has_the_name_of_a_command():
    own = {"all", "list", "readme", "backends", "compare", "tune"}
    assert set(command.bench.commands) == own
    assert not own & set(command.BENCHES.modules)


@pytest.fixture
def drawn(invoke, tmp_path):
    """A folder with a record and a README that awaits it; the words that point there."""
    invoke("good", "--results", "made")
    text = "# Title\n<!-- figures: good -->\n<!-- /figures -->\n"
    (tmp_path / "README.md").write_text(text)
    return ["readme", "--results", "made", "--page", "README.md"]


def test_check_tells_and_changes_nothing(invoke, drawn, tmp_path):
    before = (tmp_path / "README.md").read_bytes()
    result = invoke(*drawn, "--check")
    assert result.exit_code == 1
    assert "+| `query.identity_leak` | 0.05 | at most 0.1 | `kinetiq bench good` |" in result.stdout
    assert "must agree with the records, but differs" in result.stderr
    assert (tmp_path / "README.md").read_bytes() == before


def test_readme_is_drawn_in_place(invoke, drawn, tmp_path):
    assert invoke(*drawn).exit_code == 0
    text = (tmp_path / "README.md").read_text()
    assert "| `query.motion_fidelity` | 0.75 (0.7 to 0.8, n = 8) | at least 0.5 |" in text
    assert invoke(*drawn, "--check").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "made"]


def test_a_readme_without_its_record_is_bad_input(invoke, drawn, tmp_path):
    (tmp_path / "README.md").write_text("<!-- figures: query -->\n<!-- /figures -->\n")
    result = invoke(*drawn, "--check")
    assert result.exit_code == 2
    assert 'bench "query" must have a record of a full run' in result.stderr


def test_compare_prints_ratios(invoke):
    invoke("good", "--results", "a")
    invoke("good", "--results", "b")
    result = invoke("compare", "a/good.jsonl", "b/good.jsonl")
    assert result.exit_code == 0
    assert "1 (0.875 to 1.14)  within noise" in result.stdout
    listed = json.loads(invoke("compare", "a/good.jsonl", "b/good.jsonl", "--json").stdout)
    assert [item["ratio"] for item in listed["comparisons"]] == [1.0, 1.0]


@pytest.mark.parametrize(("error", "status"), [(RequestError, 2), (WorkError, 1)])
def test_errors_of_ours_end_in_one_line(invoke, monkeypatch, error, status):
    def fail(name):
        raise error("somewhere: something")

    monkeypatch.setattr(command, "choose_device", fail)
    result = invoke("good")
    assert (result.exit_code, result.stderr) == (status, "kinetiq: error: somewhere: something\n")
