"""The table of kernels: what is timed, what is refused, and how figures come of it."""

import contextlib
import functools
import itertools
import json
from dataclasses import replace

import pytest
import torch

from kinetiq.bench import kernels as bench
from kinetiq.bench.figures import check_name, load_targets
from kinetiq.bench.harness import BenchOptions, Progress
from kinetiq.bench.kernels import OURS, USUAL, Inputs, Line, Machine, Plan, Roof, Site, Timing
from kinetiq.errors import OutputError, WorkError
from kinetiq.kernels._cost import Cost

TINY = Site("tiny", 3, 70, 2, 8)
CPU = Machine("cpu")
ROOF = Roof(1e10, {"fp32": 1e10})
INPUTS = Inputs("cpu", "fp32", seed=1)
BUILDERS = {
    "query": functools.partial(bench.query_case, TINY, INPUTS),
    "query backward": functools.partial(bench.query_case, TINY, INPUTS, backward=True),
    "query injected": functools.partial(bench.query_case, TINY, INPUTS, injected=True),
    "query prompt": functools.partial(bench.query_case, TINY, INPUTS, keys=5),
    **{
        "query " + " ".join(kind): functools.partial(bench.query_case, TINY, INPUTS, **kind)
        for kind in bench._QUERY_KINDS
    },
    **{
        "frame " + " ".join(map(str, kind.values())): functools.partial(
            bench.frame_case, TINY, INPUTS, **kind
        )
        for kind in bench._FRAME_KINDS
    },
    "frame": functools.partial(bench.frame_case, TINY, INPUTS),
    "frame backward": functools.partial(bench.frame_case, TINY, INPUTS, backward=True),
    "block": functools.partial(bench.block_case, TINY, INPUTS),
    "step": functools.partial(bench.step_case, "tiny", (2, 4, 3, 5, 5), INPUTS),
} | {
    f"feature {kind}{' backward' * backward}": functools.partial(
        bench.feature_case, TINY, kind, INPUTS, backward=backward
    )
    for kind in ("all", "channels", "projection", "region")
    for backward in (False, True)
}


def run(case, **options):
    return {line.contestant: line for line in bench.run_case(case, CPU, ROOF, **options)}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_every_contestant_is_timed_or_named(build):
    """All ways agree with float64: one that does not would be skipped as wrong."""
    case = build()
    lines = run(case, seconds=0, uncompiled="for want of time")
    assert list(lines) == list(case.ways)
    for name, line in lines.items():
        if name in bench.COMPILED_ONES:
            assert line.skipped == "for want of time"
        elif name in ("sdpa_cudnn", "sdpa_efficient"):  # there are none for a CPU
            assert line.skipped.startswith("RuntimeError: ")
        else:
            assert not line.skipped, line
            middle = line.seconds.p50
            assert line.seconds.p20 <= middle <= line.seconds.p80
            assert line.useful_tflops == pytest.approx(case.cost.flops / middle / 1e12)
            assert line.gigabytes_per_second == pytest.approx(case.cost.bytes / middle / 1e9)
            floor = max(case.cost.flops, case.cost.bytes) / 1e10
            assert line.share_of_roof == pytest.approx(floor / middle)
            assert line.times_ours == pytest.approx(middle / lines[OURS].seconds.p50)
    figures = bench.figures_of(list(lines.values()))
    separate = {"ratio_to_separate"} if case.operator == "temporal_block" else set()
    assert {name.removeprefix(case.name + ".") for name in figures} == separate | {
        *("ratio_to_best", "ratio_to_usual", "share_of_roof", "useful_tflops")
    }


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_compiled_contestants_agree_too(build):
    torch.compiler.reset()
    lines = run(build(), seconds=0)
    assert not [line for line in lines.values() if line.skipped and "sdpa" not in line.contestant]


def wrong(function):
    """A contestant's preparation, its first output moved by more than a rounding."""

    def prepare():
        call = function()

        def moved():
            first, *rest = call()
            return first + 1e-4, *rest

        return moved

    return prepare


def test_nothing_is_timed_that_is_wrong():
    case = BUILDERS["query"]()
    off = {**case.ways, "sdpa_math": wrong(case.ways["sdpa_math"])}
    lines = run(replace(case, ways=off), seconds=0, uncompiled="no")
    assert lines["sdpa_math"].skipped.startswith("wrong: errs 0.0001, allowed ")
    off = {**case.ways, OURS: wrong(case.ways[OURS])}
    assert_failed(replace(case, ways=off), OURS, "wrong: errs 0.0001, allowed")
    off = {**case.ways, USUAL: wrong(case.ways[USUAL])}  # by which the others are judged
    assert_failed(replace(case, ways=off), USUAL, "the usual way must err at most 32 units")
    off = {**case.ways, OURS: unlaunchable}
    assert_failed(replace(case, ways=off), OURS, "OutOfResourcesError: shared memory")


class OutOfResourcesError(Exception):
    """As a launcher says it, which is no `RuntimeError`."""


def unlaunchable():
    raise OutOfResourcesError("shared memory\nand more")


def assert_failed(case, contestant, message):
    """One line says who is to blame, nothing is timed, and no figure comes of it."""
    (line,) = bench.run_case(case, CPU, ROOF, seconds=0, uncompiled="no")
    assert line.contestant == contestant and message in line.failed and "\n" not in line.failed
    assert line.seconds is None and bench.figures_of([line]) == {}


@pytest.mark.parametrize("name", ["query", "query backward", "frame", "block", "feature all"])
def test_all_of_a_result_is_compared(name):
    """A mistake past the part that float64 judges, in the last position of the last head."""
    case = BUILDERS[name]()
    usual = case.ways[USUAL]()()
    gate = bench.Gate(case, usual)
    assert gate.complaint(usual) == ""
    for output in range(len(usual)):
        off = [tensor.clone() for tensor in usual]
        off[output][-1, -1, -1, -1] += 0.01
        assert not any(bench.errors(case, off, case.part(usual))), "the part must not see it"
        assert gate.complaint(tuple(off)).startswith("wrong: differs from the usual way by 0.01")
    (whole, *rest) = usual
    assert gate.complaint((whole[..., :1], *rest)).startswith("wrong: ")


def test_a_judge_that_is_not_finite_judges_nothing():
    case = BUILDERS["query"]()
    (out,) = case.ways[USUAL]()()
    out[-1, -1, -1, -1] = float("inf")  # outside of the part
    with pytest.raises(WorkError, match=r"tiny\.fp32: the usual way's result must be finite"):
        bench.Gate(case, (out,))


def test_a_result_that_is_not_finite_is_wrong():
    case = BUILDERS["frame"]()
    gate = bench.Gate(case, case.ways[USUAL]()())
    (out,) = case.ways[OURS]()()
    assert gate.complaint((out,)) == ""
    out[0, 0, 0, 0] = float("nan")
    assert gate.complaint((out,)).startswith("wrong: errs inf")


def test_contestants_are_timed_in_turn():
    ticks, order = itertools.count(), []
    runs = {name: functools.partial(order.append, name) for name in "ab"}
    clock = lambda: float(next(ticks))
    times = CPU.time(runs, seconds=0, clock=clock)
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3}  # as few rounds as there may be
    assert "".join(order) == "ab" + "ab" + "ba" + "ba"  # the first round is not kept
    assert len(CPU.time(runs, seconds=1e9, clock=clock)["a"]) == 50
    assert 3 < len(CPU.time(runs, seconds=30, clock=clock)["a"]) < 10  # five ticks a round


def line(name, seconds, ours=1.0, **more):
    timing = Timing(seconds, seconds, seconds)
    rounds = (seconds,) * 5
    words = {"seconds": timing, "times_ours": seconds / ours, "rounds": rounds, **more}
    return Line("query_attention", "tiny", "bf16", name, **words)


def test_ratios_by_hand():
    """Above 1 ours is the faster; the best other is the fastest one that was timed."""
    lines = [
        line(OURS, 1.0, share_of_roof=0.4, useful_tflops=7.0),
        line(USUAL, 3.0),
        line("sdpa_flash", 1.5),
        line(bench.COMPILED, 2.0),
        Line("query_attention", "tiny", "bf16", "sdpa_math", skipped="too large"),
        line("flex", 2.5),
    ]
    figures = bench.figures_of([*lines, line(bench.SEPARATE, 1.2)])
    stem = "kernels.query_attention.tiny.bf16."
    wanted = {"ratio_to_best": 1.5, "ratio_to_usual": 3.0, "ratio_to_compiled": 2.0}
    wanted |= {"share_of_roof": 0.4, "useful_tflops": 7.0, "ratio_to_separate": 1.2}
    assert {name: figure.value for name, figure in figures.items()} == {
        stem + name: value for name, value in wanted.items()
    }
    best = figures[stem + "ratio_to_best"]
    assert (best.low, best.high, best.n) == (1.5, 1.5, 5)
    lines.append(line(bench.COMPILED_USUAL, 1.75))  # the bar is the faster of the two
    assert bench.figures_of(lines)[stem + "ratio_to_compiled"].value == 1.75
    slow = replace(lines[0], rounds=(1.0, 1.0, 1.0, 2.0, 2.0))
    best = bench.figures_of([slow, *lines[1:]])[stem + "ratio_to_best"]
    assert (best.low, best.value, best.high) == (0.75, 1.5, 1.5)


@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "flex"])
def test_without_one_that_may_be_the_best_there_is_no_ratio_to_it(name):
    lines = [line(OURS, 1.0), line(USUAL, 3.0), line("flex", 2.0)]
    missing = Line("query_attention", "tiny", "bf16", name, skipped="not here")
    lines = [one for one in lines if one.contestant != name] + [missing]
    stem = "kernels.query_attention.tiny.bf16."
    figures = bench.figures_of(lines)
    assert f"{stem}ratio_to_best" not in figures
    assert figures[f"{stem}ratio_to_best_timed"].value == (3.0 if name == "flex" else 2.0)
    assert bench.untimed_rivals(lines) == [missing]
    in_float32 = [replace(one, element="fp32") for one in lines]
    assert "kernels.query_attention.tiny.fp32.ratio_to_best" in bench.figures_of(in_float32)


def test_what_was_not_compiled_may_be_the_best_where_nothing_attends():
    lines = [line(OURS, 1.0), line(USUAL, 3.0)]
    lines.append(Line("query_attention", "tiny", "bf16", bench.COMPILED, skipped="no time"))
    assert [one.contestant for one in bench.untimed_rivals(lines)] == [bench.COMPILED]


def test_ways_that_write_all_scores_are_left_out_where_those_are_large(names_on_a_gpu):
    large, small = (Site("tiny", 2, tokens, 8, 40) for tokens in (16384, 64))
    inputs = Inputs("meta", "bf16")
    refused = []
    for site, backward in ((large, False), (large, True), (small, True)):
        ways = bench.query_case(site, inputs, backward=backward).ways
        said = [
            n for n, way in ways.items() if getattr(way, "__qualname__", "")[:10] == "_too_large"
        ]
        refused.append(said)
    assert refused == [["sdpa_math"], ["sdpa_math", bench.COMPILED], []]
    with pytest.raises(WorkError, match=r"writes all scores, 34\.4 GB in float32"):
        bench.query_case(large, inputs).ways["sdpa_math"]()


@pytest.fixture
def names_on_a_gpu(monkeypatch):
    """Every case of a GPU, built from tensors without memory."""

    def start(inputs):
        kind = bench.TYPES[inputs.element]
        return lambda *shape, dtype=kind: torch.empty(shape, dtype=dtype, device="meta")

    monkeypatch.setattr(Inputs, "start", start)
    groups = bench.builders(Inputs("meta", "bf16"))
    return [
        build().name for models in groups.values() for builds in models.values() for build in builds
    ]


def test_every_model_and_bound_is_measured(names_on_a_gpu):
    names = names_on_a_gpu
    assert len(names) == len(set(names))
    for operator in ("query_attention", "frame_attention", "motion_feature", "guided_step"):
        for model in ("animatediff", "zeroscope", "videocrafter2", "embedded"):
            assert any(n.startswith(f"kernels.{operator}.{model}") for n in names), (
                operator,
                model,
            )
    assert any("_backward." in name and "query_attention" in name for name in names)
    figures = {"kernels.frame_attention.cpu_speedup", "kernels.cpu_worst_ratio", "kernels.failed"}
    for name in names:
        check_name(name, "test")
        figures |= {
            f"{name}.{figure}"
            for figure in ("ratio_to_best", "ratio_to_usual", "ratio_to_compiled")
        }
        figures |= {f"{name}.share_of_roof", f"{name}.useful_tflops"}
    bounds = {name for name in load_targets() if name.startswith("kernels.")}
    assert len(bounds) > 5 and bounds <= figures


def test_what_takes_part_where():
    gpu, cpu = bench.plan("cuda", quick=False), bench.plan("cpu", quick=False)
    later = "compiled for a model's first case only"
    assert {(p.element, p.uncompiled) for p in gpu} == {
        ("bf16", ""),
        ("bf16", later),
        ("fp16", "compiled for bf16 only"),
    }
    assert {(p.element, p.uncompiled) for p in cpu} == {("fp32", ""), ("fp32", later)}
    sites = [p.build.args[0] for p in cpu if p.build.func is bench.frame_case]
    assert {site.frames for site in sites if "positions" in site.name} == {16, 32, 128}
    # Once for each of five operators and four models, and where the ratio to the best has a target.
    counts = [sum(not p.uncompiled for p in plans) for plans in (gpu, cpu)]
    assert counts == [22, 20]
    compiled = {bench.stem(p.build, p.element) for p in gpu if not p.uncompiled}
    wanted = {name.rpartition(".")[0] for name in load_targets() if name.endswith("ratio_to_best")}
    assert len(wanted) == 4 and wanted <= compiled
    for device, full in (("cuda", gpu), ("cpu", cpu)):
        quick = bench.plan(device, quick=True)
        assert {p.uncompiled for p in quick} == {"not in a quick run"}
        assert 10 < len(quick) < len(full) / 2


def test_measures_writes_and_tells(tmp_path, monkeypatch, capsys):
    speedup = replace(TINY, name=bench.SPEEDUP.name)
    builds = [BUILDERS["step"], functools.partial(bench.frame_case, speedup, INPUTS)]
    plans = [Plan(build, "fp32", "no | time") for build in builds]
    monkeypatch.setattr(bench, "plan", lambda *_, **__: plans)
    monkeypatch.setattr(Machine, "roof", lambda *_: ROOF)
    options = BenchOptions(quick=True, out=tmp_path / "new")
    figures = bench.measure(options, Progress())
    assert figures["kernels.roof.copy"].value == 10.0
    same = "kernels.frame_attention.16_frames_1024_positions.fp32.ratio_to_usual"
    assert figures["kernels.frame_attention.cpu_speedup"] == figures[same]
    ratios = [f for name, f in figures.items() if name.endswith(".ratio_to_usual")]
    worst = min(ratios, key=lambda figure: figure.high)  # as good as each may be
    assert figures["kernels.cpu_worst_ratio"] == worst
    assert worst.high < max(figure.high for figure in ratios)
    assert "skipped: no / time" in capsys.readouterr().out
    rows = json.loads((tmp_path / "new" / "kernels.json").read_text())
    assert [row["operator"] for row in rows].count("guided_step") == 3
    table = (tmp_path / "new" / "kernels.md").read_text().splitlines()
    assert len(table) == 2 + len(rows)
    assert all(row.count("|") == 12 for row in table)
    log = (tmp_path / "new" / "kernels.ndjson").read_text().splitlines()
    assert [json.loads(line) for line in log] == rows
    assert figures["kernels.failed"].value == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file: must be a folder"):
        bench.measure(replace(options, out=tmp_path / "file"), Progress())


def test_one_that_fails_is_counted_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    case = BUILDERS["step"]()
    bad = replace(case, shape="bad", ways={**case.ways, OURS: unlaunchable})
    plans = [Plan(build, "fp32", "no") for build in (lambda: bad, BUILDERS["step"])]
    monkeypatch.setattr(bench, "plan", lambda *_, **__: plans)
    monkeypatch.setattr(Machine, "roof", lambda *_: ROOF)
    figures = bench.measure(BenchOptions(quick=True, out=tmp_path), Progress())
    assert (figures["kernels.failed"].value, figures["kernels.failed"].n) == (1, 2)
    assert f"{case.name}.ratio_to_usual" in figures
    assert not any(".bad." in name for name in figures)
    assert "failed: OutOfResourcesError: shared memory" in capsys.readouterr().out
    first, *_ = (tmp_path / "kernels.ndjson").read_text().splitlines()
    assert json.loads(first)["failed"] == "OutOfResourcesError: shared memory"


def test_the_contestant_that_loses_the_gpu_is_to_blame(monkeypatch):
    case = BUILDERS["step"]()
    never = lambda: pytest.fail("it came after")
    ways = {OURS: case.ways[OURS], USUAL: case.ways[USUAL], "bad": unlaunchable, "next": never}
    monkeypatch.setattr(bench, "lost", lambda _: "the GPU was lost before")
    (found,) = bench.run_case(replace(case, ways=ways), CPU, ROOF, seconds=0.01)
    assert (found.contestant, found.failed) == ("bad", "OutOfResourcesError: shared memory")
    runs = bench._run_all([Plan(lambda: case, "fp32", "no")] * 2, CPU, ROOF, 0.01)
    assert next(runs)[0].contestant == OURS
    with pytest.raises(WorkError, match="the GPU must answer to go on, got: the GPU was lost"):
        next(runs)


def test_a_killed_run_has_left_its_part(tmp_path, monkeypatch):
    def killed():
        raise KeyboardInterrupt

    plans = [Plan(build, "fp32", "no") for build in (BUILDERS["step"], killed)]
    monkeypatch.setattr(bench, "plan", lambda *_, **__: plans)
    monkeypatch.setattr(Machine, "roof", lambda *_: ROOF)
    with pytest.raises(KeyboardInterrupt):
        bench.measure(BenchOptions(quick=True, out=tmp_path), Progress())
    log = (tmp_path / "kernels.ndjson").read_text().splitlines()
    assert [json.loads(line)["contestant"] for line in log] == [OURS, USUAL, bench.COMPILED]
    assert not (tmp_path / "kernels.json").exists()


def test_a_gpu_that_is_asked_for_is_the_current_one(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def current(device):
        entered.append(device)
        yield
        entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(bench, "_measure", lambda *_: entered.append("measured") or {})
    bench.measure(BenchOptions(device="cuda:1"), Progress())
    bench.measure(BenchOptions(device="cpu"), Progress())
    assert entered == ["cuda:1", "measured", "left", "measured"]


def test_the_roof_is_measured(monkeypatch):
    """A copy reads and writes each byte; a product of square matrices takes 2 n³ operations."""
    monkeypatch.setattr(Machine, "time", lambda *_, **__: {"copy": [0.5], "fp32": [0.25]})
    roof = CPU.roof(["fp32"])
    assert roof.bytes_per_second == 2 * 2**27 / 0.5
    assert roof.flops_per_second == {"fp32": 2 * 1024**3 / 0.25}
    assert roof.seconds(Cost(bytes=2**28, flops=0), "fp32") == 0.5
    assert roof.seconds(Cost(bytes=0, flops=2**31), "fp32") == 0.25


def test_every_contestant_comes_first_and_after_every_other():
    runs = dict.fromkeys("abc")
    orders = ["".join(bench._in_turn(runs, turn)) for turn in range(7)]
    assert orders == ["abc", "cba", "bca", "acb", "cab", "bac", "abc"]
