"""The account of kernels: what is asked for, how it is counted, and a few that are compiled."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kinetiq.bench import compile as bench
from kinetiq.bench.figures import load_targets
from kinetiq.bench.harness import BenchOptions, Progress
from kinetiq.errors import InputError, OutputError, RequestError, WorkError
from kinetiq.kernels import _compile, _launch
from kinetiq.kernels._compile import Account, CompileCase, Request, find_cases

REQUEST = Request("guided_step", "embedded", True, "fp16", "sm_90")
GOOD = Account(
    REQUEST,
    kernel="_k",
    registers=40,
    shared_bytes=1024,
    warps=4,
    grid=(8,),
    occupancy=0.5,
    dots=1,
    matrix_instructions={"HGMMA": 2},
)
BACKWARD = replace(GOOD, request=replace(REQUEST, forward=False))


# GPUs that are not compiled for, and may be tuned: `bench tune` writes where it runs.
KNOWN = (*_compile.SHARED_LIMITS, "sm_87", "sm_103", "sm_110", "sm_121")


def values(accounts):
    return {name: figure.value for name, figure in bench.count(accounts).items()}


def test_counts_what_is_wrong():
    broken = replace(GOOD, error="PTXASError: no", spill_bytes=0, dots=1, matrix_instructions=None)
    figures = values(
        [
            GOOD,
            replace(GOOD, spill_bytes=8, registers=255),
            replace(GOOD, matrix_instructions={}, occupancy=0.125),
            replace(GOOD, dots=0, matrix_instructions={}, padded_work=1.2, padded_head_dim=1.1),
            replace(BACKWARD, spill_bytes=16),
            broken,
            replace(broken, request=replace(REQUEST, target="gfx942")),
            replace(GOOD, request=replace(REQUEST, target="gfx942"), spill_bytes=8),
        ]
    )
    assert figures["compile.total"] == 6
    assert figures["compile.failed"] == 1
    assert figures["compile.forward_spills"] == 1
    assert figures["compile.without_matrix_units"] == 1
    assert (figures["compile.amd_total"], figures["compile.amd_failed"]) == (2, 1)
    assert figures["compile.guided_step.forward.registers"] == 255
    assert figures["compile.guided_step.forward.occupancy"] == 0.125
    assert figures["compile.guided_step.forward.padded_work"] == 1.2
    assert figures["compile.guided_step.forward.padded_head_dim"] == 1.1
    assert figures["compile.guided_step.backward.padded_head_dim"] == 1.0
    assert figures["compile.guided_step.backward.spill_bytes"] == 16


def test_a_fall_from_whole_warp_groups_is_seen():
    """HMMA instead of HGMMA on sm_90 is a figure, elsewhere it is as it should be."""
    whole = replace(GOOD, request=replace(REQUEST, operator="query_attention", target="sm_90"))
    fallen = replace(whole, dots=2, matrix_instructions={"HMMA": 4})
    elsewhere = [
        replace(fallen, request=replace(fallen.request, **other))
        for other in ({"target": "sm_80"}, {"operator": "frame_attention"}, {"forward": False})
    ]
    whole = replace(whole, dots=2, matrix_instructions={"HGMMA": 4})
    figures = values([whole, fallen, replace(fallen, error="no"), *elsewhere])
    assert figures["compile.query_attention.without_hgmma"] == 1


def test_every_product_must_be_on_the_matrix_units():
    """One of two left to the ordinary units is seen; those of float32 belong there."""
    ordinary = (
        "%q = tt.dot %n, %part, %acc : tensor<64x64xf16, #ttg.dot_op<{opIdx = 0, parent = "
        "#blocked3}>> * tensor<64x128xf16, #ttg.dot_op<{opIdx = 1, parent = #blocked3}>> -> "
        "tensor<64x128xf32, #blocked3> loc(#loc381)\n"
    )
    matrix = ordinary.replace("#blocked3", "#mma")
    hopper = (
        "%k = ttng.warp_group_dot %q, %k, %c : !ttg.memdesc<64x64xf16> -> tensor<64x64xf32, #mma>"
    )
    loads = "%x = tt.load %p : tensor<64x64x!tt.ptr<f16>, #blocked>\n"
    assert _compile.count_ordinary_dots(matrix + hopper + loads) == 0
    assert _compile.count_ordinary_dots(matrix + ordinary + loads + ordinary) == 2
    mixed = replace(GOOD, dots=2, ordinary_dots=1)
    assert mixed.misses_matrix_units and not GOOD.misses_matrix_units
    assert not replace(mixed, request=replace(REQUEST, element="fp32")).misses_matrix_units
    assert not replace(mixed, error="no").misses_matrix_units
    assert values([GOOD, mixed])["compile.without_matrix_units"] == 1
    assert "| 2 HGMMA; 1 on ordinary units |" in bench.render([mixed])


@pytest.mark.parametrize("element", ["fp16", "fp32"])
def test_products_are_found_where_the_compiler_put_them(element):
    """The real thing: float32 has no matrix unit of its precision, float16 has one."""
    request = Request("motion_feature", "embedded_projection", True, element, "sm_80")
    (account,) = _compile.compile_apart([request])
    assert not account.error and account.dots > 0
    assert (account.ordinary_dots > 0) == (element == "fp32")
    assert not account.misses_matrix_units


def test_every_bound_has_a_figure():
    bounds = {name for name in load_targets() if name.startswith("compile.")}
    assert bounds == {
        "compile.failed",
        "compile.forward_spills",
        "compile.without_matrix_units",
        "compile.query_attention.without_hgmma",
    }
    assert bounds <= set(values([GOOD]))


def test_asks_for_every_case_type_and_target():
    cases = find_cases()
    asked = bench.plan(cases, quick=False)
    assert len(asked) == len(set(asked))
    assert len(asked) == len(cases) * (2 * 6 + 1)
    assert {(r.target, r.element) for r in asked if r.target != "gfx942"} == {
        (target, element)
        for target in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
        for element in ("fp16", "bf16")
    }
    operators = {case.operator for case in cases}
    assert operators >= {"frame_attention", "guided_step", "motion_feature", "query_attention"}
    for operator in operators:
        of_it = [case for case in cases if case.operator == operator]
        directions = {True} if operator == "temporal_block" else {True, False}
        assert {case.forward for case in of_it} == directions
        for place in ("animatediff", "zeroscope", "videocrafter2", "embedded"):
            assert any(case.shape.startswith(place) for case in of_it), (operator, place)
    few = bench.plan(cases, quick=True)
    assert 0 < len(few) < 60
    assert {request.operator for request in few} == operators
    assert set(few) < set(asked)


def test_head_dim_40_pads_to_48_at_most():
    found = [c for c in find_cases() if c.shape.startswith("animatediff_64x64")]
    assert found
    of_heads = {case.operator: case.padded_head_dim for case in found}
    attention = ("query_attention", "frame_attention", "temporal_block")
    assert {operator: of_heads[operator] for operator in attention} == dict.fromkeys(attention, 1.2)
    assert max(case.padded_head_dim for case in found) == 48 / 40
    # These tokens fill their tiles; 77 words of a prompt do not, nor do the layers of a block.
    whole = ("query_attention", "frame_attention")
    alone = {
        c.padded_work for c in found if c.operator in whole and not c.shape.endswith("_prompt")
    }
    assert alone == {48 / 40}


def test_padded_work_counts_what_tiles_do_for_nothing():
    """By hand: 77 keys in tiles of 32 are 96, and 45 of 45 queries and keys in one of 64 are 64."""
    found = {(c.shape, c.forward): c for c in find_cases() if c.operator == "query_attention"}
    assert found["animatediff_32x32_prompt", True].padded_head_dim == 1
    assert found["animatediff_32x32_prompt", True].padded_work == 128 / 77  # tiles of 64 keys
    assert found["animatediff_64x64_prompt", True].padded_work == 1.2 * 128 / 77
    assert found["zeroscope_5x9", True].padded_work == (64 / 45) * (64 / 45)
    assert found["embedded_4x4", True].padded_work == 1
    assert found["animatediff_32x32", False].padded_work == 1


LAUNCHES = """
import json, sys, torch
from triton.runtime.jit import JITFunction
from kinetiq.kernels import _compile, _launch
asked = []
def choose(operator, key, found):
    asked.append((operator, key))
    return found
JITFunction.run = lambda *_, **__: None
with _launch.pretend("sm_90"), _launch.choosing(choose):
    for case in _compile.find_cases():
        case.launch(torch.float16)
json.dump(asked, sys.stdout)
"""


def test_every_setting_in_half_precision_is_compiled_for_some_case():
    """What the launch file says of a key is launched by a case, or nobody knows that it fits."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", LAUNCHES],
        check=True,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    asked = {tuple(pair) for pair in json.loads(done.stdout)}
    known = {
        (operator, key)
        for operator, targets in _launch._table().items()
        for keys in targets.values()
        for key in keys
        if key != "*" and not key.endswith("_fp32")
    }
    assert known and known <= asked, known - asked


def test_measures_writes_and_tells(tmp_path, monkeypatch, capsys):
    cases = [case for case in find_cases() if case.operator == "guided_step"]
    monkeypatch.setattr(bench, "find_cases", lambda: cases)

    def compile_apart(requests):
        for request in requests[::-1]:
            bad = "no | way" if request.target == "sm_86" else ""
            yield replace(GOOD, request=request, error=bad)

    monkeypatch.setattr(bench, "compile_apart", compile_apart)
    figures = bench.measure(BenchOptions(out=tmp_path / "new"), Progress())
    assert figures["compile.total"].value == len(cases) * 12
    assert figures["compile.failed"].value == len(cases) * 2
    rows = json.loads((tmp_path / "new" / "compile.json").read_text())
    requests = bench.plan(cases, quick=False)
    assert [Request(**row["request"]) for row in rows] == requests
    table = (tmp_path / "new" / "compile.md").read_text().splitlines()
    assert len(table) == 2 + len(requests)
    log = (tmp_path / "new" / "compile.ndjson").read_text().splitlines()
    assert [json.loads(line) for line in log] != rows  # in the order in which they came
    assert sorted(log) == sorted(json.dumps(row) for row in rows)
    assert all(line.count("|") == 12 for line in table)
    assert "no / way" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file.compile.ndjson: must be writable"):
        bench.measure(BenchOptions(quick=True, out=tmp_path / "file"), Progress())
    monkeypatch.setattr(bench, "find_cases", tuple)
    with pytest.raises(WorkError, match="operators must expose COMPILED, found none"):
        bench.measure(BenchOptions(), Progress())


def test_a_killed_run_has_left_its_part(tmp_path, monkeypatch):
    first, second = REQUEST, replace(REQUEST, forward=False)
    monkeypatch.setattr(bench, "plan", lambda *_, **__: [first, second])

    def dies(requests):
        yield replace(GOOD, request=first)
        raise WorkError("the compiling process must end with 0, got -9")

    def cannot_start(requests):
        yield replace(GOOD, request=first)
        raise FileNotFoundError("no compiler")

    monkeypatch.setattr(bench, "compile_all", dies)
    with pytest.raises(WorkError, match="got -9"):
        bench.measure(BenchOptions(out=tmp_path), Progress())
    monkeypatch.setattr(bench, "compile_all", cannot_start)
    with pytest.raises(FileNotFoundError, match="no compiler"):  # which is no fault of the log
        bench.measure(BenchOptions(out=tmp_path / "other"), Progress())
    (line,) = (tmp_path / "compile.ndjson").read_text().splitlines()
    assert Request(**json.loads(line)["request"]) == first
    assert not (tmp_path / "compile.json").exists()


def test_a_request_without_an_account_is_an_error(monkeypatch):
    """`compile.total` can then be no smaller than the list of what was to be compiled."""
    first, second = REQUEST, replace(REQUEST, forward=False)
    monkeypatch.setattr(bench, "plan", lambda *_, **__: [first, second])
    monkeypatch.setattr(bench, "compile_all", lambda _: [replace(GOOD, request=first)] * 2)
    with pytest.raises(WorkError, match=r"each of 2 requests .* 1 have none, .*forward=False"):
        bench.measure(BenchOptions(), Progress())
    both = [replace(GOOD, request=request) for request in (second, first, first)]
    monkeypatch.setattr(bench, "compile_all", lambda _: both)
    assert bench.measure(BenchOptions(), Progress())["compile.total"].value == 3


def test_work_is_shared_and_failures_come_through(monkeypatch):
    seen = []

    def compile_apart(requests):
        seen.append(requests)
        for request in requests:
            if request.shape == "bad":
                raise WorkError("the compiling process must end with 0, got -9")
            yield replace(GOOD, request=request)

    monkeypatch.setattr(bench, "compile_apart", compile_apart)
    requests = [
        replace(REQUEST, target=target, element=element, shape=shape)
        for target in _compile.NVIDIA
        for element in bench.TYPES
        for shape in ("a", "b")
    ]
    accounts = list(bench.compile_all(requests, workers=5))
    assert {a.request for a in accounts} == set(requests) and len(accounts) == len(requests)
    assert len(seen) == 5
    for target in _compile.NVIDIA:  # a target and type stay in one process
        assert sum(any(r.target == target and r.element == "fp16" for r in s) for s in seen) == 1
    with pytest.raises(WorkError, match="got -9"):
        list(bench.compile_all([*requests, replace(REQUEST, shape="bad")], workers=2))


def test_compiles_in_a_process_of_its_own():
    """The real thing, for the kernel that compiles fastest, and a case that is not there."""
    requests = [REQUEST, replace(REQUEST, target="gfx942"), replace(REQUEST, shape="none such")]
    ours, theirs, unknown = _compile.compile_apart(requests)
    assert (ours.error, ours.spill_bytes, ours.dots, ours.misses_matrix_units) == ("", 0, 0, False)
    assert 8 <= ours.registers <= 64
    assert 0 < ours.occupancy <= 1
    assert ours.grid[0] >= 8
    assert theirs.request.target == "gfx942"
    assert "must have this case" in unknown.error


def test_says_what_is_wrong(monkeypatch):
    with pytest.raises(RequestError, match=r"must be one of sm_80, .* got sm_1 and fp16"):
        list(_compile.compile_apart([replace(REQUEST, target="sm_1")]))
    monkeypatch.setattr(_compile, "_PROGRAM", "raise SystemExit('the end')")
    with pytest.raises(WorkError, match="must end with 0, got 1: the end"):
        list(_compile.compile_apart([REQUEST]))


def test_a_launch_that_fails_is_an_account():
    def nothing(dtype):
        torch.empty(1, dtype=dtype, device="meta")

    def broken(dtype):
        raise ValueError("first line\nsecond line")

    errors = {nothing: "the launch must reach a kernel, got none", broken: "ValueError: first line"}
    for launch, error in errors.items():
        case = CompileCase("guided_step", "embedded", True, launch)
        assert _compile.compile_case(case, REQUEST) == [Account(REQUEST, error=error)]


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "share"),
    [
        ("sm_90", 32, 0, 4, 1.0),  # 16 blocks of 4 warps
        ("sm_90", 255, 0, 8, 8 / 64),  # registers for one block
        ("sm_90", 64, 100 * 1024, 4, 8 / 64),  # shared memory for two
        ("sm_86", 32, 0, 1, 16 / 48),  # no more than 16 blocks
        ("gfx942", 64, 0, 4, None),
    ],
)
def test_occupancy_by_hand(target, registers, shared, warps, share):
    assert _compile.theoretical_occupancy(target, registers, shared, warps) == share


def test_launch_settings_follow_the_architecture(monkeypatch):
    table = {
        "f": {
            "default": {"*": {"B": 1}, "d64": {"B": 2}},
            "sm_80": {"d64": {"B": 3}},
            "sm_86": {"*": {"B": 4}},
            "sm_100": {"*": {"B": 5}},
            "sm_89": {"d8": {"B": 7}},
        },
        "g": {"sm_80": {"*": {"B": 6}}},
    }
    monkeypatch.setattr(_launch, "_table", lambda: table)
    _launch._settings.cache_clear()
    wanted = {
        ("sm_80", "d64"): 3,
        ("sm_80", "*"): 1,
        ("sm_86", "d64"): 4,
        ("sm_87", "d64"): 4,  # the nearest older one of its generation
        ("sm_89", "d8"): 7,
        ("sm_89", "d64"): 4,  # an entry of its own hides no other key
        ("sm_90", "d64"): 2,
        ("sm_90", "d8"): 1,
        ("sm_103", "d8"): 5,
        ("sm_120", "d64"): 2,
        ("gfx942", "d64"): 2,
        ("default", "d64"): 2,
    }
    for (name, key), block in wanted.items():
        with _launch.pretend(name):
            assert _launch.architecture() == name
            found = _launch.settings("f", key)
            assert found == {"B": block}, (name, key)
            found["B"] = 99  # a caller's own copy
            assert _launch.settings("f", key) == {"B": block}
    with (
        _launch.pretend("sm_90"),
        pytest.raises(InputError, match='"g" for "d1" or "\\*" under "sm_90" or "default"'),
    ):
        _launch.settings("g", "d1")
    _launch._settings.cache_clear()


def test_a_chooser_sees_each_launch_and_has_the_say():
    seen = []

    def choose(operator, key, found):
        seen.append((operator, key, dict(found)))
        return found | {"BLOCK": 1}

    usual = _launch.settings("guided_step", "forward")
    with _launch.choosing(choose):
        assert _launch.settings("guided_step", "forward") == usual | {"BLOCK": 1}
    assert seen == [("guided_step", "forward", usual)]
    assert _launch.settings("guided_step", "forward") == usual != usual | {"BLOCK": 1}


def test_the_launch_file_is_whole():
    """Every entry is settings by name, and each operator has what any GPU can take."""
    for operator, targets in _launch._table().items():
        assert "default" in targets, operator
        for target, keys in targets.items():
            assert target == "default" or target in KNOWN
            for key, entry in keys.items():
                place = (operator, target, key)
                assert entry and all(type(value) is int for value in entry.values()), place
                assert entry.get("num_warps", 4) in (1, 2, 4, 8, 16), place


@pytest.mark.slow
def test_the_whole_grid():
    cases = find_cases()
    requests = bench.plan(cases, quick=False)
    accounts = list(bench.compile_all(requests))
    figures = values(accounts)
    assert figures["compile.total"] >= len(cases) * 12
    for name in ("compile.failed", "compile.forward_spills", "compile.without_matrix_units"):
        assert figures[name] == 0, bench.render(
            [a for a in accounts if a.error or a.spill_bytes or a.misses_matrix_units]
        )
    for account in accounts:
        if account.request.shape != "embedded_4x4":  # whose 16 tokens fill no warp group
            assert not bench.misses_hgmma(account), account
