import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from kinetiq.bench.figures import Figure
from kinetiq.bench.records import Record, append_record, newest, read_folder, read_records
from kinetiq.errors import InputError, OutputError

RECORD = Record(
    bench="query",
    figures={"query.a": 0.5, "query.b": 2.0},
    targets={"query.a": {"at_least": 0.6}},
    missed=["query.a"],
    environment={"commit": None, "dirty": None, "machine": {}, "versions": {}},
    intervals={"query.a": [0.4, 0.6, 64]},
    quick=False,
    seconds=1.5,
    command="kinetiq bench query",
    date="2025-01-02T03:04:05+00:00",
    units={"query.b": "s"},
)
KEYS = [
    "bench",
    "figures",
    "targets",
    "missed",
    "environment",
    "intervals",
    "quick",
    "seconds",
    "command",
    "date",
]


def change(**entries):
    return json.dumps(json.loads(RECORD.line) | entries)


def test_the_result_has_exactly_the_keys_of_the_contract():
    assert list(RECORD.result) == KEYS


def test_a_record_is_read_back_as_it_was(tmp_path):
    path = append_record(RECORD, tmp_path / "made" / "on demand")
    assert path.name == "query.jsonl"
    assert read_records(path) == [RECORD]


def test_a_figure_comes_with_what_is_known_of_it():
    assert RECORD.figure("query.a") == Figure(0.5, 0.4, 0.6, n=64)
    assert RECORD.figure("query.b") == Figure(2.0, unit="s")


def test_records_are_appended(tmp_path):
    second = replace(RECORD, seconds=2.5)
    append_record(RECORD, tmp_path)
    before = (tmp_path / "query.jsonl").read_bytes()
    append_record(second, tmp_path)
    assert (tmp_path / "query.jsonl").read_bytes().startswith(before)
    assert read_records(tmp_path / "query.jsonl") == [RECORD, second]


def test_runs_side_by_side_do_not_mix_their_lines(tmp_path):
    long = replace(RECORD, command="x" * 20_000)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: append_record(long, tmp_path), range(64)))
    assert read_records(tmp_path / "query.jsonl") == [long] * 64


def test_a_killed_run_costs_only_its_own_line(tmp_path):
    path = append_record(RECORD, tmp_path)
    path.write_bytes(path.read_bytes() + RECORD.line.encode()[:40])
    append_record(RECORD, tmp_path)
    lines = path.read_text().splitlines()
    assert [lines[0], lines[2]] == [RECORD.line] * 2
    with pytest.raises(InputError, match=r"line 2: must be one JSON object.*delete the line"):
        read_records(path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file/query\.jsonl: must be writable, got: "):
        append_record(RECORD, tmp_path / "file")


def test_a_folder_is_read_whole(tmp_path):
    other = replace(RECORD, bench="sprites")
    append_record(RECORD, tmp_path)
    append_record(other, tmp_path)
    (tmp_path / ".gitkeep").touch()
    assert read_folder(tmp_path) == [RECORD, other]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="none: must be a folder of results files"):
        read_folder(tmp_path / "none")


def test_the_newest_is_told_by_its_date():
    """In two zones: the later text is the earlier moment."""
    old = replace(RECORD, date="2025-01-02T12:00:00+09:00")
    new = replace(RECORD, date="2025-01-02T11:00:00+00:00", seconds=2.0)
    assert newest([new, old], "query", quick=False) is new
    assert newest([old, new], "query", quick=False) is new


def test_of_two_runs_within_a_second_the_lower_line_is_newer():
    second = replace(RECORD, seconds=9.0)
    assert newest([RECORD, second], "query", quick=False) is second


def test_the_newest_keeps_benches_and_quick_runs_apart():
    quick = replace(RECORD, quick=True, date="2026-01-01T00:00:00+00:00")
    other = replace(RECORD, bench="sprites", date="2026-01-01T00:00:00+00:00")
    records = [RECORD, quick, other]
    assert newest(records, "query", quick=False) is RECORD
    assert newest(records, "query", quick=True) is quick
    assert newest(records, "sprites", quick=True) is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "must have the keys .*, got list"),
        (change(extra=1), "must have the keys .*extra"),
        ('{"bench": "query"}', r"must have the keys .*, got \['bench'\]"),
        (change(quick=1), "quick must be bool, got int"),
        (change(seconds="1"), "seconds must be int or float, got str"),
        (change(figures={"query.a": "1"}), "figure \"query.a\" must be a finite number, got '1'"),
        (change(figures={"query.a": float("nan")}), 'figure "query.a" must be a finite number'),
        (change(targets={"query.a": {"at_msot": 1}}), 'target "query.a" must be at_least or'),
        (change(intervals={"query.a": [0, 1]}), r'interval "query.a" must be \[low, high, n\]'),
        (change(intervals={"query.a": [0, "1", 2]}), r'interval "query.a" must be \[low, high, n'),
        (change(environment={}), r"environment must have commit, got \[\]"),
        (change(date="yesterday"), 'date must be ISO 8601 .* got "yesterday"'),
        (change(date="2025-01-02T03:04:05"), "date must be ISO 8601 with its offset from UTC"),
    ],
)
def test_says_where_a_line_is_not_a_record(tmp_path, line, message):
    path = tmp_path / "query.jsonl"
    path.write_text(f"{RECORD.line}\n{line}\n")
    with pytest.raises(InputError, match=rf"query\.jsonl, line 2: {message}"):
        read_records(path)
