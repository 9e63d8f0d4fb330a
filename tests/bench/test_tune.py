"""The search for launch settings: with a timer of its own, so that no GPU is needed."""

import contextlib
import functools
import importlib
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import weakref
from collections import Counter, defaultdict
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from kinetiq.bench import command, kernels, tune
from kinetiq.bench.harness import Progress
from kinetiq.bench.kernels import Inputs, Machine, Site
from kinetiq.bench.steps import Budget
from kinetiq.bench.tune import GRIDS, Subject, Workload, candidates, search
from kinetiq.errors import InputError, MissingDependencyError, RequestError, WorkError
from kinetiq.kernels import _launch

operators = (
    "guided_step",
    "temporal_block",
    "query_attention",
    "frame_attention",
    "motion_feature",
)
guided, block, query_operator, frame_operator, feature_operator = (
    importlib.import_module(f"kinetiq.kernels.{name}")
    for name in operators  # not the functions
)
ENTRY = ("query_attention_return_gradient", "*")  # whose grid is BLOCK and num_warps
PRESENT = {"BLOCK": 1024, "num_warps": 4}


def workload(name="a", *, timed=True, broken=None, wrong=None):
    """A call whose output says which settings it was prepared with."""

    def prepare():
        settings = _launch.settings(*ENTRY)
        if broken is not None and settings == broken:
            raise RuntimeError("out of resource: shared memory\nand more")
        out = torch.tensor([settings["BLOCK"], settings["num_warps"]])
        return functools.partial(tuple, settings.values()), (out,)

    def complaint(outputs):
        return "wrong: errs 1" if outputs[0].tolist() == list((wrong or {}).values()) else ""

    return Workload(name, lambda: Subject(prepare, complaint), {ENTRY: PRESENT}, timed)


def timer(seconds):
    """A timer by BLOCK and warps, of what `workload` prepared; anything else takes a second."""

    def time(runs):
        return {name: [seconds.get(run(), 1.0)] * 3 for name, run in runs.items()}

    return time


def test_candidates_are_the_grid_over_the_present_settings():
    found = candidates(ENTRY, PRESENT)
    assert len(found) == 3 * 2 - 1 and PRESENT not in found
    assert {"BLOCK": 2048, "num_warps": 8} in found
    present = {"TILE": 8192, "WHOLE": 5120, "ONE_TILE": 1, "ONE_WARPS": 2, "num_warps": 4}
    for settings in candidates(("frame_attention", "frames16_d48"), present):
        assert {name: settings[name] for name in ("WHOLE", "ONE_TILE", "ONE_WARPS")} == {
            "WHOLE": 5120,
            "ONE_TILE": 1,
            "ONE_WARPS": 2,
        }
    with pytest.raises(WorkError, match=r"guided_step \* must have \['BLOCK'\], has"):
        candidates(("guided_step", "*"), {"num_warps": 4})


def test_every_grid_fits_the_launch_file():
    """Every kernel whose settings are in the file has a grid, but for two kinds.

    What float32 has for itself, and the projection beside controls, which no model calls.
    """
    table, tried = _launch._table(), Counter()
    for operator, targets in table.items():
        for keys in targets.values():
            for key, settings in keys.items():
                tried[operator] += len(candidates((operator, key), dict(settings)))
    assert {operator for operator, _ in GRIDS} == {
        operator for operator in tried if tried[operator]
    }
    kernels = {o for o in table if "num_warps" in next(iter(table[o]["default"].values()))}
    left_out = ("_fp32", "_with_motion")
    kernels = {operator for operator in kernels if not operator.endswith(left_out)}
    assert kernels == {operator for operator in tried if tried[operator]}


def test_a_candidate_that_loses_the_gpu_ends_the_search(monkeypatch):
    why = "the GPU was lost before: RuntimeError: an illegal access"
    monkeypatch.setattr(tune, "lost", lambda _: why)
    with pytest.raises(WorkError, match=rf"bench tune: a with BLOCK=512 num_warps=8: {why}"):
        search(ENTRY, [workload(broken={"BLOCK": 512, "num_warps": 8})], timer({}))


def test_what_there_is_no_time_for_stays_and_is_named(tmp_path):
    """An entry whose search was begun and not ended as well."""
    path, now = tmp_path / "launch.json", [0.0]

    def time(runs):
        now[0] += 4.0
        return timer({(512, 8): 0.5})(runs)

    other = (ENTRY[0], "other")
    judges = [replace(workload(), asked={entry: PRESENT}) for entry in (ENTRY, other)]
    budget = Budget(6.0, lambda: now[0])
    outcomes = list(tune.improve(judges, time, path, "sm_90", Progress(), budget))
    assert [outcome.best for outcome in outcomes] == [PRESENT] * 2 and not path.exists()
    assert tune.describe(outcomes[0]) == f"{ENTRY[0]} *: left as it is, no time for it"
    assert now[0] == 8.0  # two candidates of the first entry, and none of the second
    enough = Budget(100.0, lambda: now[0])
    (done,) = tune.improve(judges[:1], time, path, "sm_90", Progress(), enough)
    assert done.searched and path.exists()


def test_an_operator_that_is_not_come_to_is_named(monkeypatch, tmp_path):
    now = [0.0]

    def builds(_machine, operator, _seed):
        build = functools.partial(print, Site(operator, 2, 9, 1, 8))
        return [(element, build) for element in ("bf16", "bf16", "fp32")]

    def survey(build):
        now[0] += 2.0
        return "a", {(build.args[0].name, "*"): PRESENT}

    monkeypatch.setattr(tune, "Budget", lambda seconds: Budget(seconds, lambda: now[0]))
    monkeypatch.setattr(tune, "_builds", builds)
    monkeypatch.setattr(tune, "_survey", survey)
    monkeypatch.setattr(tune, "compilers", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(tune, "Machine", lambda _: SimpleNamespace(time=lambda runs, **_: runs))
    monkeypatch.setattr(tune, "describe_case", lambda _: ["operator", "site"])
    asked = ("guided_step", "motion_feature")
    found = tune.tune("cuda", tmp_path / "x.json", asked, seed=0, progress=Progress(), seconds=3.0)
    assert [(outcome.entry, outcome.searched) for outcome in found] == [
        (("guided_step", "*"), False),
        (("motion_feature", "*"), False),
    ]
    assert now == [4.0]  # two of three cases of the first operator were looked at, none after that


class Pool(Executor):
    """Takes what it is asked for, and answers at once; without an answer it does none of it."""

    def __init__(self, *answers):
        self.asked, self.futures, self.answers, self.down = [], [], list(answers), 0

    def submit(self, *asked):
        self.asked.append(asked)
        future = Future()
        self.futures.append(future)
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, BrokenExecutor):
            raise answer
        if isinstance(answer, Exception):
            future.set_exception(answer)
        elif answer is not None:
            future.set_result(answer)
        return future

    def shutdown(self, *_, **__):
        self.down += 1


def test_all_candidates_are_compiled_before_the_search_for_all_that_ask(tmp_path):
    judges = [
        replace(workload(name), launch=launch, form=form)
        for name, launch, form in (("a", min, "x"), ("b", max, "x"), ("c", sum, "y"))
    ]
    other = replace(workload("d"), asked={("g", "x"): {}}, timed=False, launch=print)
    pool = Pool(*[(1, "")] * 15)
    ahead = tune.Ahead(pool)
    (outcome,) = tune.improve(
        [*judges, other],
        *(timer({}), tmp_path / "x.json", "sm_90", Progress(), tune.ENDLESS, ahead),
    )
    assert outcome.searched and len(outcome.trials) == 5
    assert pool.asked == [
        (tune.compile_launch, launch, {ENTRY: settings}, "sm_90")
        for launch in (min, sum, max)  # of one form the second finds the first's in the cache
        for settings in candidates(ENTRY, PRESENT)
    ]
    assert (ahead.ended, ahead.compiled, ahead.error) == (15, 15, "")


def test_compiling_leaves_half_of_the_time_to_the_search(monkeypatch):
    waited, now = [], [0.0]

    def wait(waiting, seconds):
        waited.append(seconds)
        return SimpleNamespace(done=set())

    monkeypatch.setattr(tune, "wait", wait)
    ahead, budget = tune.Ahead(Pool()), Budget(60.0, lambda: now[0])
    for now[0] in (0.0, 50.0, 60.0):
        ahead.compile([min], [{}], "sm_90", budget)
    ahead.compile([min], [{}], "sm_90", tune.ENDLESS)
    assert waited == [30.0, 5.0, None]
    assert all(future.cancelled() for future in ahead.pool.futures)
    assert ahead.ended == 0  # nothing came to an end, which is no reason to give up


def test_what_cannot_be_compiled_ahead_is_said_once(capsys):
    pool = Pool((2, ""), (1, "PTXASError: no room"), RuntimeError("first\nsecond"), (1, ""))
    ahead = tune.Ahead(pool)
    for launches in ([min, max, sum], [print]):
        ahead.compile(launches, [{}], "sm_90", tune.ENDLESS)
    assert capsys.readouterr().err == "" and pool.down == 0
    for _ in range(2):
        ahead.close()
    said = "bench tune: 2 of 4 launches compiled ahead; first error: PTXASError: no room\n"
    assert capsys.readouterr().err == said and pool.down == 1
    tune.Ahead(Pool()).close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([(1, ""), (0, "E: a"), RuntimeError("b"), (1, "")], "1 of 3 {}: E: a"),
        ([(1, ""), RuntimeError("b"), (0, "E: a"), (1, "")], "1 of 3 {}: RuntimeError: b"),
        ([(1, ""), BrokenExecutor("one died")], "1 of 2 {}: BrokenExecutor: one died"),
    ],
)
def test_processes_of_no_use_are_given_up(capsys, answers, said):
    pool = Pool(*answers)
    ahead = tune.Ahead(pool)
    ahead.compile([min], [{}], "sm_90", tune.ENDLESS)
    assert pool.down == 0
    for _ in range(2):
        ahead.compile([max, sum], [{}], "sm_90", tune.ENDLESS)
    assert pool.down == 1 and ahead.pool is None and len(pool.asked) == min(3, len(answers))
    words = said.format("launches compiled ahead; first error")
    assert capsys.readouterr().err == f"bench tune: {words}\n"


def test_cases_of_one_form_differ_in_positions_alone(monkeypatch):
    monkeypatch.setattr(tune, "_survey", lambda _: ("a", {}))
    forms = [one.form for one in tune.workloads_of(Machine("cpu"), "query_attention")]
    kinds = [
        (element, replace(build.args[0], name="", tokens=0), *sorted(build.keywords.items()))
        for element, build in tune._builds(Machine("cpu"), "query_attention", 0)
    ]
    pairs = set(zip(forms, kinds, strict=True))
    assert len(set(forms)) == len(set(kinds)) == len(pairs) < len(kinds)


ENDING = """
import os, signal, sys, time, torch
from kinetiq.bench import tune

# As from a terminal: what a script starts in the background ignores SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.cuda.mem_get_info = lambda _: (2 * tune._ROOM, 0)
tune._cores = lambda: 2
with tune.compilers("cuda") as ahead:
    ahead.pool.submit(os.write, 1, b"of a compiler").result()
    for _ in range(8):
        ahead.pool.submit(time.sleep, 3600)
    print("begun", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.skipif(os.name == "nt", reason="signals and groups of processes")
@pytest.mark.parametrize("way", ["done", "interrupted", "terminated", "killed"])
def test_no_process_that_compiles_outlives_the_search(way):
    """Busy ones: who has them all holds the pipes open, which therefore must come to their end."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", ENDING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "begun\n"
        numbers = {"interrupted": signal.SIGINT, "terminated": signal.SIGTERM}
        if way == "done":
            process.stdin.write("\n")
        else:
            process.send_signal(numbers.get(way, signal.SIGKILL))
        out, err = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):  # what is to be: none of them is there
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode == 0) == (way == "done"), err
    assert not out and "of a compiler" in err


@pytest.mark.parametrize("operator", tune.OPERATORS)
def test_another_process_can_be_given_the_cases(operator):
    launches = [w[1] for w in tune._builds(Machine("cpu"), operator, 0)]
    again = pickle.loads(pickle.dumps(launches))  # noqa: S301  made a moment ago
    assert [kernels.describe(build) for build in again] == [kernels.describe(b) for b in launches]


def test_what_is_compiled_ahead_is_what_a_launch_finds(tmp_path):
    """By a driver that says it has a GPU, under which nothing has to be compiled again."""
    words = """
import functools, os, pathlib, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from kinetiq.bench import tune
from kinetiq.kernels._compile import find_cases
from kinetiq.kernels._launch import choosing, pretend

class Driver:
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda _: GPUTarget("cuda", 90, 32)

def compiled():
    return len(list(pathlib.Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")))

case = next(c for c in find_cases() if c.operator == "guided_step" and c.forward)
launch = functools.partial(case.launch, torch.float16)
blocks = [{("guided_step", "forward"): {"BLOCK": b, "num_warps": 4}} for b in (512, 2048, 4096)]
for chosen in blocks[:2]:
    print(*tune.compile_launch(launch, chosen, "sm_90"), compiled())
run = JITFunction.run
JITFunction.run = lambda *given, grid, warmup, **more: run(*given, grid=grid, warmup=True, **more)
triton.runtime.driver.set_active(Driver())
for chosen in blocks:
    with pretend("sm_90"), choosing(lambda *asked: chosen.get(asked[:2], asked[2])):
        launch()
    print(compiled())
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", words],
        check=True,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout.split() == [*("1", "1"), *("1", "2"), *("2", "2", "3")]


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize(
    ("memory", "cores", "count"), [(139, 16, 16), (139, 4, 4), (24, 16, 3), (12, 16, 0)]
)
def test_as_many_compile_as_the_gpu_has_room_for(monkeypatch, memory, cores, count, limited):
    """By the memory that is free there, and the cores that are ours where the system tells."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (memory * 2**30, 2**40))
    monkeypatch.setattr(os, "cpu_count", lambda: 64 if limited else cores)
    if limited:
        ours = lambda _: set(range(cores))
        monkeypatch.setattr(os, "sched_getaffinity", ours, raising=False)
    else:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    with tune.compilers("cuda") as ahead:
        assert (ahead.pool._max_workers if ahead else 0) == count


class Launch(torch.autograd.Function):
    """What a public function launches on a GPU, forward and, when it is asked for, backward."""

    @staticmethod
    def forward(ctx, forward, backward, *tensors):
        ctx.backward, ctx.count = backward, len(tensors)
        return forward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        return None, None, *ctx.backward(grad)


@pytest.fixture
def launches_alone(monkeypatch):
    """Operators launch as on a GPU, on tensors without memory, and no kernel runs."""

    def query_attention(query, key, value, *, heads, **controls):
        names = ("query_row", "query_blend", "key_rows")
        others = (*(controls.get(name) for name in names), None, heads)
        statistics = query_operator._empty_statistics(query, heads)

        def forward(*tensors):
            out = torch.empty_like(query)
            query_operator._launch_forward(
                query_operator.Inputs(*tensors, *others), out, statistics
            )
            return out

        def backward(grad):
            inputs = query_operator.Inputs(query, key, value, *others)
            found = query_operator._differentiate(grad, grad, statistics, inputs, True, False)
            return found[:3]

        return Launch.apply(forward, backward, query, key, value)

    def attend_over_frames(*tensors, heads, projection=None, **controls):
        ordered = tuple(controls.get(name) for name in frame_operator.CONTROLS)
        motion = None if projection is None else tensors[0] @ projection

        def forward(*tensors):
            out = torch.empty_like(tensors[0])
            frame_operator._launch_forward(*tensors, ordered, heads, out, projection, motion)
            return out

        def backward(grad):
            grads = tuple(torch.empty_like(grad) for _ in range(3))
            frame_operator._launch_backward(grad, *tensors, ordered, heads, grads)
            return grads

        out = Launch.apply(forward, backward, *tensors)
        return out if motion is None else (out, motion)

    def motion_feature(x, channels=None, projection=None, region=None):
        weights = None if region is None else region[None]

        def forward(x):
            y = feature_operator._empty_result(x, channels, projection, weights)
            feature_operator._launch_forward(x, channels, projection, weights, y)
            return y

        def backward(grad):
            feature_operator._launch_backward(grad, channels, projection, weights, dx := x * 0)
            return (dx,)

        return Launch.apply(forward, backward, x)

    def guided_step(*inputs):
        *tensors, scale, numbers = inputs
        results = (tensors[0] * 0, tensors[0] * 0)
        guided._launch_forward(tuple(tensors), scale, numbers, results)
        return results

    def temporal_block(x, *, heads, **given):
        others = (given.get(name) for name in (*block._TENSORS[1:], *block._OPTIONAL))
        block._launch(x, *others, heads, 1e-5, y := torch.empty_like(x))
        return y

    stand_ins = (query_attention, motion_feature, guided_step, temporal_block)
    for function in stand_ins:
        monkeypatch.setattr(kernels, function.__name__, function)
    for name in ("frame_attention", "frame_attention_with_motion"):
        monkeypatch.setattr(kernels, name, attend_over_frames)
    for module in (query_operator, frame_operator, feature_operator, guided, block):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            if name.startswith("_") and not name.startswith("_check"):
                silent = defaultdict(lambda: lambda *_, **__: None)
                monkeypatch.setattr(module, name, silent)
    start = lambda inputs: (
        lambda *shape, dtype=kernels.TYPES[inputs.element]: torch.empty(
            shape, dtype=dtype, device="meta"
        )
    )
    monkeypatch.setattr(Inputs, "start", start)


def test_every_grid_is_asked_for_by_a_workload(launches_alone):
    """Settings that no workload asks for would stay as they are, however long one tunes."""
    asked = set()
    for models in kernels.builders(Inputs("meta", "bf16"), everywhere=True).values():
        for build in itertools.chain.from_iterable(models.values()):
            asked |= set(tune.asked_by(build().ways[kernels.OURS]))
    named = {entry for entry in GRIDS if entry[1] != "*"}
    met = {entry if entry in named else (entry[0], "*") for entry in asked}
    assert set(GRIDS) <= met
    keys = {key for operator, key in asked if operator == "frame_attention_backward_controlled"}
    assert keys >= {"frames16_d48", "frames16_d80", "frames32_d64"}  # at every site


def test_the_quickest_right_candidate_wins():
    seconds = {(512, 4): 0.5, (2048, 8): 0.8, (512, 8): 0.6}
    outcome = search(ENTRY, [workload()], timer(seconds))
    assert (outcome.best, outcome.score) == ({"BLOCK": 512, "num_warps": 4}, 0.5)
    assert outcome.present == PRESENT and len(outcome.trials) == 5
    bad = {"BLOCK": 512, "num_warps": 4}
    judges = [
        (workload(wrong=bad), "a: wrong: errs 1"),
        (workload(broken=bad), "a: RuntimeError: out of resource: shared memory"),
    ]
    for judge, why in judges:
        outcome = search(ENTRY, [judge], timer(seconds))
        assert outcome.best == {"BLOCK": 512, "num_warps": 8}
        (out,) = [trial for trial in outcome.trials if trial.rejected]
        assert (out.settings, out.rejected, out.score) == (bad, why, None)
    # right in the type that is timed is not enough where another type shares the entry
    outcome = search(ENTRY, [workload(), workload("b", timed=False, wrong=bad)], timer(seconds))
    assert outcome.best == {"BLOCK": 512, "num_warps": 8}


def test_workloads_count_alike_however_long_they_take():
    def time(runs):  # half the time in the short one, one and a half in the long one
        block = runs["candidate"]()[0]
        long = len(seen) >= 5  # candidates, which each have their turn in one before the other
        seen.append(block)
        usual = 100.0 if long else 1.0
        change = 1.5 if long else 0.5
        return {"present": [usual], "candidate": [usual * (change if block == 512 else 1)]}

    seen = []
    outcome = search(ENTRY, [workload("short"), workload("long")], time)
    assert outcome.best["BLOCK"] == 512
    assert outcome.score == pytest.approx((0.5 * 1.5) ** 0.5)


def test_a_gain_that_may_be_noise_changes_nothing():
    outcome = search(ENTRY, [workload()], timer({(512, 4): 0.99}))
    assert (outcome.best, outcome.score) == (PRESENT, 1.0)
    everything = [trial.settings for trial in outcome.trials]
    assert len(everything) == 5


def test_one_case_is_in_memory_at_a_time(monkeypatch):
    alive, most = weakref.WeakSet(), []

    class Tensors:
        pass

    def build(one):
        tensors, subject = Tensors(), one.build()
        alive.add(tensors)
        most.append(len(alive))
        return Subject(lambda: (tensors, subject.prepare())[1], subject.complaint)

    judges = [workload(name) for name in "abc"]
    judges = [replace(one, build=functools.partial(build, one)) for one in judges]
    assert search(ENTRY, judges, timer({})).best == PRESENT
    assert most == [1, 1, 1]
    case = next(iter(kernels.builders(Inputs("cpu", "fp32"))["guided_step"]["embedded"]))
    seen = []
    monkeypatch.setattr(tune, "builders", lambda *_, **__: {"guided_step": {"embedded": [case]}})
    monkeypatch.setattr(tune, "asked_by", lambda make: seen.append(make) or {ENTRY: PRESENT})
    found = tune.workloads_of(Machine("cpu"), "guided_step")
    assert [one.timed for one in found] == [True, False] and len(seen) == 2
    subject = found[1].build()
    assert not subject.complaint(subject.prepare()[1])


def test_memory_that_runs_out_is_no_candidates_fault():
    def prepare():
        if _launch.settings(*ENTRY) != PRESENT:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried")
        return tuple, ()

    judge = replace(workload(), build=lambda: Subject(prepare, lambda _: ""))
    said = r"^bench tune: a: must fit into the GPU's memory, got: CUDA out of memory\.; end"
    with pytest.raises(WorkError, match=said):
        search(ENTRY, [judge], timer({}))


def test_a_better_entry_is_in_the_file_at_once(tmp_path):
    path = tmp_path / "launch.json"
    judges = [workload(), replace(workload("fp32", timed=False), asked={("g", "fp32"): {}})]
    found = tune.improve(judges, timer({(512, 8): 0.5}), path, "sm_90", Progress())
    (outcome,) = found  # an entry that only an untimed workload asks for is left alone
    assert outcome.best == {"BLOCK": 512, "num_warps": 8}
    table, package = json.loads(path.read_text()), _launch.read_table(_launch.LAUNCH_FILE)
    operator, key = ENTRY
    assert table[operator].pop("sm_90") == {key: outcome.best}
    assert table == package
    assert list(tmp_path.iterdir()) == [path]  # nothing half written beside it
    kept = tune.improve([workload()], timer({}), tmp_path / "none.json", "sm_90", Progress())
    assert [outcome.best for outcome in kept] == [PRESENT]
    assert not (tmp_path / "none.json").exists()
    with pytest.raises(WorkError, match="a: must be right before it is tuned, it is wrong"):
        list(tune.improve([workload(wrong=PRESENT)], timer({}), path, "sm_90", Progress()))


def test_the_package_takes_what_was_written(tmp_path, monkeypatch):
    path, best = tmp_path / "own.json", {"BLOCK": 512, "num_warps": 8}
    table = tune.with_entry(tune.load_table(path), ("guided_step", "forward"), "sm_90", best)
    tune.write_table(path, table)
    monkeypatch.setenv("KINETIQ_LAUNCH", str(path))
    for kept in (_launch._table, _launch._settings):
        kept.cache_clear()
    for name, key in (("sm_80", "forward"), ("sm_90", "backward")):
        with _launch.pretend(name):
            assert _launch.settings("guided_step", key) == PRESENT
    with _launch.pretend("sm_90"):
        assert _launch.settings("guided_step", "forward") == best
    monkeypatch.delenv("KINETIQ_LAUNCH")
    for kept in (_launch._table, _launch._settings):
        kept.cache_clear()
    with _launch.pretend("sm_90"):
        assert _launch.settings("guided_step", "forward") == PRESENT


def test_where_a_layer_wins_is_read_from_the_file_that_is_named(tmp_path, monkeypatch):
    path, entry = tmp_path / "own.json", (tune.WINS, "frames16_heads8_d40_bf16")
    table = tune.with_entry(tune.load_table(path), entry, "sm_90", {"POSITIONS": 77})
    tune.write_table(path, table)
    monkeypatch.setenv("KINETIQ_LAUNCH", str(path))
    _launch._table.cache_clear()
    assert _launch.file_entries(tune.WINS)["sm_90"] == {entry[1]: {"POSITIONS": 77}}
    assert tune.load_table(tmp_path / "new.json") == table  # begins as a copy of what is in use
    path.unlink()
    said = (
        r"own\.json: must be a launch file, got: .* or unset KINETIQ_LAUNCH, which names this one$"
    )
    _launch._table.cache_clear()
    with pytest.raises(InputError, match=said):
        _launch.file_entries(tune.WINS)
    _launch._table.cache_clear()


def test_a_file_keeps_its_form(tmp_path):
    path = tmp_path / "launch.json"
    tune.write_table(path, tune.load_table(_launch.LAUNCH_FILE))
    assert path.read_text() == _launch.LAUNCH_FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"f": {"sm_90": {"*": 3}}}', '{"f": {"*": {"B": []}}}']
)
def test_a_file_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "launch.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"launch\.json: must be a launch file"):
        tune.load_table(path)


def trial(positions, score):
    return tune.Trial({"POSITIONS": positions}, score=score)


def test_the_kernel_of_a_layer_wins_from_where_on_it_always_did():
    found = [trial(100, 1.2), trial(400, 0.7), trial(200, 0.9)]
    assert tune.least_winning(found) == 200
    assert tune.least_winning([*found, trial(300, 0.99)]) == 400  # a gain that may be noise is none
    assert tune.least_winning([*found, trial(800, None)]) == 0  # it does not run where it matters
    assert tune.least_winning([*found, trial(50, 0.5)]) == 200  # not below a loss


def test_where_the_kernel_wins_is_in_the_file_at_once(tmp_path, monkeypatch):
    sites = (Site("a", 2, 700, 1, 8), Site("b", 2, 2800, 1, 8), Site("c", 4, 700, 1, 8))
    monkeypatch.setattr(tune, "SITES", (*sites, Site("small", 2, 7, 1, 8)))
    asked = []

    def compare_block(site, inputs, machine, timer, found):
        asked.append((site.name, inputs.element))
        wins = inputs.element == "bf16" and site.rows * site.tokens >= 2800
        return trial(site.rows * site.tokens, 0.5 if wins and site.frames == 2 else 1.5)

    monkeypatch.setattr(tune, "compare_block", compare_block)
    path = tmp_path / "launch.json"
    ask = functools.partial(
        tune.compare_blocks, Machine("cpu"), timer({}), path, "sm_90", {}, 0, Progress()
    )
    outcomes = list(ask())
    assert [(o.entry[1], o.best["POSITIONS"], o.score) for o in outcomes] == [
        ("frames2_heads1_d8_bf16", 2800, 0.5),
        ("frames2_heads1_d8_fp16", 0, 1.0),
        ("frames4_heads1_d8_bf16", 0, 1.0),
        ("frames4_heads1_d8_fp16", 0, 1.0),
    ]
    assert all(o.entry[0] == tune.WINS and o.present == {"POSITIONS": 0} for o in outcomes)
    assert len(asked) == 2 * 3 * 5 and {name for name, _ in asked} == {"a", "b", "c"}
    written = json.loads(path.read_text())[tune.WINS]["sm_90"]
    assert written == {o.entry[1]: o.best for o in outcomes}
    assert [o.present for o in ask()] == [o.best for o in outcomes]


def test_the_kernel_of_a_layer_is_timed_and_checked(monkeypatch, kernel_device):
    """The kernel itself, with settings found a moment ago; a wrong one is out."""
    site, inputs = Site("tiny", 2, 9, 2, 16, rows=1), Inputs(kernel_device, "fp32")
    name, key = "temporal_block_fp32", "d16"
    found = {(name, key): _launch.settings(name, key) | {"CHANNELS": 32}}
    seen, ran = [], []

    def time(runs):
        ran.extend(runs)
        for run in runs.values():
            run()
        return {"separate": [2.0, 2.0], "kernel": [1.0, 1.0]}

    def launch(*arguments):
        def note(operator, key, settings):
            seen.append((operator, key, dict(settings)))
            return settings

        with _launch.choosing(note):
            block._launch(*arguments)

    compare = functools.partial(tune.compare_block, site, inputs, Machine(kernel_device), time)
    monkeypatch.setattr(kernels, "launch_block", launch)
    assert compare(found) == trial(9, 0.5)
    assert ran == ["separate", "kernel"]
    assert (name, key, found[name, key]) in seen
    monkeypatch.setattr(kernels, "launch_block", lambda *arguments: arguments[-1].zero_())
    assert compare(found).rejected.startswith("kernels.temporal_block.tiny.fp32: wrong: errs")

    def refuses(*_):
        raise RuntimeError("out of resource: shared memory\nand more")

    monkeypatch.setattr(kernels, "launch_block", refuses)
    out = compare(found)
    assert out.rejected.endswith("tiny.fp32: RuntimeError: out of resource: shared memory")
    assert out.score is None


def test_a_real_kernel_is_searched(kernel_device, kernel_rng):
    """Each candidate of the kernel runs, and is compared with the reference."""
    tensors = tuple(
        torch.randn(2, 700, generator=kernel_rng, device=kernel_device) for _ in range(5)
    )
    scale, numbers = (
        torch.randn(2, *n, generator=kernel_rng, device=kernel_device) for n in ((), (6,))
    )
    exact = guided.guided_step_reference(*(t.double() for t in (*tensors, scale, numbers)))
    entry = ("guided_step", "forward")
    ran = []

    def call():
        results = (torch.empty_like(tensors[0]), torch.empty_like(tensors[0]))
        guided._launch_forward(tensors, scale, numbers, results)
        return results

    def prepare():
        outputs = call()
        ran.append(_launch.settings(*entry))
        return functools.partial(tuple, ran[-1].values()), outputs

    def complaint(outputs):
        close = (
            torch.allclose(a.double(), b, atol=1e-5) for a, b in zip(outputs, exact, strict=True)
        )
        return "" if all(close) else "wrong"

    asked = tune.asked_by(lambda: call)
    assert asked == {entry: _launch.settings(*entry)}
    judge = Workload("guided_step", lambda: Subject(prepare, complaint), asked)
    outcome = search(entry, [judge], timer({(2048, 2): 0.5}))
    assert outcome.best == {"BLOCK": 2048, "num_warps": 2}
    assert len(ran) == 1 + 11 and not any(trial.rejected for trial in outcome.trials)


def test_without_a_gpu_it_says_so(tmp_path):
    ask = functools.partial(tune.tune, seed=0, progress=Progress())
    with pytest.raises(MissingDependencyError, match="bench tune: needs an NVIDIA GPU"):
        list(ask("cpu", tmp_path / "launch.json", ()))
    with pytest.raises(RequestError, match=r"must be among frame_attention, .* got g"):
        list(ask("cpu", tmp_path / "launch.json", ("g",)))


@pytest.mark.parametrize("seconds", [math.nan, 0.0, -1.0])
def test_a_time_that_is_none_is_refused(tmp_path, seconds):
    found = tune.tune("cuda", tmp_path / "x.json", (), seed=0, progress=Progress(), seconds=seconds)
    with pytest.raises(RequestError, match=r"bench tune: seconds must be above 0, got (nan|-?\d)"):
        next(found)


def test_the_command_refuses_a_time_that_is_no_number():
    result = CliRunner().invoke(command.bench, ["tune", "--device", "cpu", "--seconds", "nan"])
    assert result.exit_code == 2 and "seconds must be above 0, got nan" in result.stderr


def test_a_file_that_is_none_is_refused_before_the_work(monkeypatch, tmp_path):
    begun = []
    monkeypatch.setattr(torch.cuda, "device", begun.append)
    path = tmp_path / "launch.json"
    path.write_text("[]")
    with pytest.raises(InputError, match=r"launch\.json: must be a launch file"):
        next(tune.tune("cuda", path, (), seed=0, progress=Progress()))
    assert not begun and path.read_text() == "[]"


def test_the_command_ends_the_search_that_is_interrupted(monkeypatch):
    ended = []

    def tuned(*_, **__):
        try:
            print("ptxas fatal")  # a compiler, which must not spoil the answers
            yield search(ENTRY, [workload()], timer({}))
        finally:
            ended.append(True)

    def echo(*_, **__):
        assert not ended
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "tune", tuned)
    result = CliRunner().invoke(command.bench, ["tune", "--device", "cpu", "--json"])
    assert json.loads(result.stdout)["outcomes"] and "ptxas fatal" in result.stderr
    ended.clear()
    held = []  # so that the generator is not ended because nobody has it any more
    monkeypatch.setattr(tune, "tune", lambda *a, **k: held.append(tuned(*a, **k)) or held[-1])
    monkeypatch.setattr(tune, "describe", echo)
    result = CliRunner().invoke(command.bench, ["tune", "--device", "cpu"])
    assert result.exit_code == 130 and ended == [True]


def test_the_command(monkeypatch, tmp_path):
    result = CliRunner().invoke(command.bench, ["tune", "--device", "cpu"])
    assert isinstance(result.exception, SystemExit) and result.exit_code == 1
    assert "needs an NVIDIA GPU" in result.stderr and not result.stdout
    seen = []

    def tuned(device, path, operators, *, seed, progress, seconds):
        seen.append((device, path, operators, seed, seconds))
        yield search(
            ENTRY, [workload(wrong={"BLOCK": 512, "num_warps": 4})], timer({(512, 8): 0.5})
        )
        yield search(ENTRY, [workload()], timer({}))

    monkeypatch.setattr(tune, "tune", tuned)
    path = tmp_path / "x.json"
    words = ["tune", "--device", "cpu", "--operator", "guided_step", "--path", str(path)]
    result = CliRunner().invoke(command.bench, words)
    changed, kept = result.stdout.splitlines()
    words_of_it = "BLOCK=512 num_warps=8, 0.50 of the time of BLOCK=1024 num_warps=4"
    assert changed == f"{ENTRY[0]} *: {words_of_it}; 5 tried, 1 of them out"
    assert kept == f"{ENTRY[0]} *: kept BLOCK=1024 num_warps=4; 5 tried, 0 of them out"
    result = CliRunner().invoke(command.bench, [*words, "--json", "--seconds", "9"])
    printed = json.loads(result.stdout)
    assert printed["outcomes"][0]["best"] == {"BLOCK": 512, "num_warps": 8}
    assert seen == [("cpu", path, ("guided_step",), 0, seconds) for seconds in (math.inf, 9.0)]
