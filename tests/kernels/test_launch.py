"""The launch file that is in use: what is wrong with one is said in words, and only when it is used."""

import json
import os
import subprocess
import sys

import pytest

from kinetiq.errors import InputError
from kinetiq.kernels._launch import LAUNCH_FILE, file_entries, read_table, settings


@pytest.fixture
def table():
    """What the package's file says."""
    return json.loads(LAUNCH_FILE.read_text(encoding="utf-8"))


def change(table, place, entry):
    table["guided_step"][place] = entry
    return table


def test_the_packages_own_and_a_copy_of_it_are_right(table, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(table))
    assert read_table(path) == read_table(LAUNCH_FILE) == table


@pytest.mark.parametrize(
    ("place", "entry", "message"),
    [
        ("sm_90a", {"*": {"BLOCK": 64, "num_warps": 4}}, "must be for default, sm_<number> or"),
        ("sm_90", {"*": {"BLOCK": 64}}, "must have BLOCK, num_warps, got BLOCK;"),
        ("sm_90", {"*": {"BLOCK": 64, "num_warps": 4, "x": 1}}, "got BLOCK, num_warps, x;"),
        (
            "sm_90",
            {"*": {"BLOCK": 48, "num_warps": 4}},
            "must have a power of two as BLOCK, got 48",
        ),
        ("sm_90", {"*": {"BLOCK": 0, "num_warps": 4}}, "must have a power of two as BLOCK, got 0"),
        ("sm_90", {"*": {"BLOCK": 64, "num_warps": -4}}, "a power of two as num_warps, got -4"),
        ("sm_90", {"*": {"BLOCK": True, "num_warps": 4}}, "operator → architecture → key"),
        ("sm_90", {"*": {"BLOCK": "64", "num_warps": 4}}, "operator → architecture → key"),
    ],
)
def test_what_no_operator_can_have_is_said(table, tmp_path, place, entry, message):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(change(table, place, entry)))
    with pytest.raises(InputError) as caught:
        read_table(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "write one by `kinetiq bench tune --path FILE`" in str(caught.value)


@pytest.mark.parametrize(
    ("operator", "key", "entry", "message"),
    [
        ("other", "*", {"BLOCK": 64}, "operators must be among frame_attention, "),
        ("temporal_block_wins", "*", {}, "must have POSITIONS, got ;"),
        (
            "temporal_block_wins",
            "*",
            {"POSITIONS": -1},
            "a number of positions as POSITIONS, got -1",
        ),
        (
            "query_attention",
            "d40",
            {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 0},
            "a number above 0 as num_stages, got 0",
        ),
    ],
)
def test_each_operator_has_its_own_settings(table, tmp_path, operator, key, entry, message):
    table.setdefault(operator, {})["sm_90"] = {key: entry}
    path = tmp_path / "own.json"
    path.write_text(json.dumps(table))
    with pytest.raises(InputError) as caught:
        read_table(path)
    assert message in str(caught.value)


def test_an_operator_that_the_file_leaves_out_is_said_where_it_is_launched(
    table, tmp_path, monkeypatch
):
    from kinetiq.kernels import _launch

    path = tmp_path / "own.json"
    path.write_text(json.dumps({"guided_step": table["guided_step"]}))
    monkeypatch.setenv("KINETIQ_LAUNCH", str(path))
    for kept in (_launch._table, _launch._settings):
        kept.cache_clear()
    try:
        assert file_entries("query_attention") == {}
        said = (
            r'own\.json: must have settings of "query_attention" for "d40" .* write a whole file by'
        )
        with pytest.raises(InputError, match=said):
            settings("query_attention", "d40")
    finally:
        for kept in (_launch._table, _launch._settings):
            kept.cache_clear()


@pytest.mark.parametrize("words", [["--version"], ["doctor", "--json"], ["bench", "list"]])
def test_a_file_that_is_none_spoils_no_command_that_launches_nothing(tmp_path, words):
    environment = os.environ | {"KINETIQ_LAUNCH": str(tmp_path / "none.json")}
    program = "import sys; from kinetiq.__main__ import main; sys.argv[0] = 'kinetiq'; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_operators_are_imported_without_the_compiler_of_pytorch():
    """It takes longer than all the rest of a command that needs no network."""
    program = "import sys, kinetiq.kernels; print('torch._dynamo' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
