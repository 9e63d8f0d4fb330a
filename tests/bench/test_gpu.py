"""The bench of a GPU: what it measures is right on a CPU, and what it does not measure is named."""

import contextlib
import functools
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import attrs
import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

from kinetiq.bench import clips, command, control_costs, device_kernels, device_tests, gpu, kernels
from kinetiq.bench import parts as joining
from kinetiq.bench import subjects as models
from kinetiq.bench.command import make_group
from kinetiq.bench.figures import Figure, load_targets
from kinetiq.bench.harness import Bench, BenchOptions, Progress, Registry
from kinetiq.bench.records import read_records
from kinetiq.bench.steps import Budget, Note, Outcome, Stage, Step, run_stages
from kinetiq.denoiser import EagerDenoiser
from kinetiq.errors import InputError, MissingDependencyError, WorkError
from kinetiq.request import Request

SILENT = Progress()


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def full_size(family):
    """The tiny network of a family as if it were a published one."""
    config = tiny._ANIMATEDIFF if family == "animatediff" else tiny._UNET3D
    text = (5, tiny.CROSS_WIDTH)
    return models.FullSize("tiny", family, config, text, 3, 16, 16, vae=tiny._VAE)


@functools.cache
def subject_of(family="animatediff", dtype=torch.float32):
    return models.full_size_subject(full_size(family), "cpu", dtype)


def apart(got, wanted):
    return float((got - wanted).abs().max() / wanted.abs().max())


# Steps and their budget.


def test_what_cannot_run_is_named_and_the_rest_goes_on():
    clock = Clock()
    seen = []

    def spend(name, seconds, built):
        seen.append((name, built))
        clock.now += seconds
        return {f"a.{name}": Figure(seconds)}

    def broken(_):
        raise ValueError("no luck\nat all")

    def step(name, seconds, takes):
        return Step(name, seconds, functools.partial(spend, name, takes))

    stages = [
        Stage("needy", 1.0, lambda: pytest.fail("built"), [step("needy", 1.0, 1)], gpu=True),
        Stage(
            "good",
            1.0,
            lambda: "good",
            [step("one", 5.0, 4), Step("two", 5.0, broken), step("long", 99.0, 1)],
            gpu=False,
        ),
        Stage("bad", 1.0, lambda: broken(None), [step("of_bad", 1.0, 1)], gpu=False),
        Stage("brief", 1.0, lambda: "brief", [step("brief", 5.0, 5)], gpu=False),
        Stage("late", 1.0, lambda: pytest.fail("built"), [step("late", 2.0, 1)], gpu=False),
    ]
    kept = []

    def keep(outcome, name):
        kept.append((name, sorted(outcome.figures), list(outcome.left)))

    outcome = run_stages(stages, "cpu", Budget(11.0, clock), SILENT, "fake", keep)
    assert kept[:3] == [
        ("good: building", [], ["one", "two", "long", "of_bad", "brief", "late"]),
        ("one", [], ["two", "long", "of_bad", "brief", "late"]),
        ("two", ["a.one"], ["long", "of_bad", "brief", "late"]),
    ]
    assert outcome.left == []
    assert seen == [("one", "good"), ("brief", "brief")]
    assert list(outcome.figures) == ["a.one", "a.brief"]
    assert outcome.unmeasured == {
        "needy": "needs an NVIDIA GPU (the device is cpu)",
        "two": "ValueError: no luck",
        "long": "no time: may take 99 s, 7 s were left",
        "of_bad": "ValueError: no luck",
        "late": "no time: may take 3 s, 2 s were left",
    }
    assert outcome.failed == ["two", "of_bad"]


def test_what_a_step_gave_stays_if_it_breaks_later():
    def run(_):
        yield {"a.one": Figure(1.0)}
        yield Note("a.one", "the last that fitted")
        raise ValueError("no luck")

    stages = [Stage("s", 1.0, lambda: None, [Step("step", 1.0, run)], gpu=False)]
    outcome = run_stages(stages, "cpu", Budget(11.0, Clock()), SILENT, "fake")
    assert outcome.figures == {"a.one": Figure(1.0)} and outcome.failed == ["step"]
    assert outcome.details == {"notes": {"a.one": "the last that fitted"}}


@pytest.fixture
def lose_gpu(monkeypatch):
    """Makes every call to a GPU end as it does after an illegal access, from now on."""

    def lose():
        def broken(*_):
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

        monkeypatch.setattr(torch.cuda, "synchronize", broken)
        monkeypatch.setattr(torch.cuda, "empty_cache", broken)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return lose


ILLEGAL = "RuntimeError: CUDA error: an illegal memory access was encountered"


def test_a_gpu_that_is_lost_ends_the_stages_and_the_rest_is_named(lose_gpu):
    def losing(_):
        lose_gpu()
        return {"a.lost": Figure(1.0)}

    def steps(*names, run=lambda _: {"a.good": Figure(1.0)}):
        return [Step(name, 1.0, run) for name in names]

    first = [*steps("good"), *steps("losing", run=losing), *steps("after")]
    stages = [
        Stage("one", 1.0, lambda: None, first),
        Stage("two", 1.0, lambda: pytest.fail("built"), steps("much after")),
    ]
    outcome = run_stages(stages, "cuda", Budget(60.0, Clock()), SILENT, "fake")
    assert outcome.failed == ["losing"] and outcome.left == []
    why = f"the GPU was lost before: {ILLEGAL}"
    assert outcome.unmeasured == {"losing": ILLEGAL, "after": why, "much after": why}
    assert "a.good" in outcome.figures


# The test suite in a process of its own.

SUITE = """
import os, time, pytest

@pytest.mark.gpu
def test_good(): pass

@pytest.mark.gpu
def test_bad(): assert 1 == 2

@pytest.mark.gpu
def test_skipped(): pytest.skip("no tool")

@pytest.fixture
def broken():
    yield
    raise RuntimeError("torn down")

@pytest.mark.gpu
def test_torn(broken): pass

def test_unmarked(): raise SystemExit("it ran")

@pytest.mark.gpu
def test_last(): {last}

@pytest.mark.gpu
def test_after(): pass
"""


@pytest.fixture
def suite(tmp_path):
    """Runs the marked tests of a checkout whose last but one does something."""

    def run(last, seconds=60.0, files=None):
        root = tmp_path / "checkout"
        (root / "tests").mkdir(parents=True)
        (root / "pyproject.toml").write_text(
            '[tool.pytest.ini_options]\naddopts = "--no-such-plugin-here"\nmarkers = ["gpu: x", "slow: y"]\n'
        )
        for name, text in (files or {"test_it.py": SUITE.format(last=last)}).items():
            (root / "tests" / name).write_text(text)
        outcome = Outcome()
        device_tests.run_selections(
            root, tmp_path, "cuda", Budget(seconds), outcome, SILENT, device_tests.SELECTIONS[:1]
        )
        return outcome

    return run


def test_every_verdict_is_counted(suite, tmp_path):
    outcome = suite(
        "pass",
        files={"test_it.py": SUITE.format(last="pass"), "test_no.py": "import no_such  # mark.gpu"},
    )
    values = {name: figure.value for name, figure in outcome.figures.items()}
    assert values == {
        "gpu.tests.passed": 3,
        "gpu.tests.failed": 3,
        "gpu.tests.skipped": 1,
        "gpu.tests.not_run": 0,
    }
    failed = {v["test"]: v["why"] for v in outcome.details["gpu"]["failed"]}
    assert set(failed) == {
        "tests/test_it.py::test_bad",
        "tests/test_it.py::test_torn",
        "tests/test_no.py",
    }
    assert failed["tests/test_it.py::test_bad"] == "assert 1 == 2"
    assert failed["tests/test_it.py::test_torn"] == "RuntimeError: torn down"
    assert "no_such" in failed["tests/test_no.py"]
    (skipped,) = outcome.details["gpu"]["skipped"]
    assert skipped["why"] == "no tool" and outcome.unmeasured == {}
    assert "1 == 2" in (tmp_path / device_tests.LOG).read_text()


def test_a_run_that_dies_or_takes_too_long_names_what_is_left(suite, tmp_path):
    outcome = suite("os._exit(7)")
    last, after = "tests/test_it.py::test_last", "tests/test_it.py::test_after"
    failed = {v["test"]: v["why"] for v in outcome.details["gpu"]["failed"]}
    assert failed[last] == "the process died here, exit status 7"
    assert outcome.unmeasured == {after: "the process died before this test"}
    assert outcome.figures["gpu.tests.not_run"].value == 1
    assert outcome.figures["gpu.tests.failed"].value == 3


def test_time_ends_a_run_and_all_that_it_started(tmp_path):
    started = tmp_path / "started"
    child = f"import pathlib, time; time.sleep(2); pathlib.Path({str(started)!r}).touch()"
    words = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    with (tmp_path / "log").open("wb") as log:
        status = device_tests.run_in_time([sys.executable, "-c", words], tmp_path, {}, log, 1.0)
    assert status is None
    time.sleep(2.5)
    assert not started.exists()


def test_what_was_killed_within_a_line_keeps_its_other_lines(tmp_path):
    path = tmp_path / "verdicts"
    path.write_text(
        '{"collected": ["a", "b", "c"]}\n{"test": "a", "outcome": "passed", "why": ""}\n'
        '{"test": "a", "outcome": "failed", "why": "x"}\n{"test": "b", "outc'
    )
    collected, verdicts = device_tests.read_verdicts(path)
    assert verdicts == [device_tests.Verdict("a", "failed", "x")]
    assert device_tests.not_run(collected, verdicts) == ["b", "c"]


def test_no_tests_are_no_measurement(suite):
    outcome = suite("", files={"test_it.py": "def test_it(): pass\n"})
    assert outcome.figures == {} and outcome.failed == ["tests: gpu"]
    assert "pytest must find tests in tests, exit status 5" in outcome.unmeasured["tests: gpu"]


def test_tests_leave_time_to_those_of_the_kernels():
    first, kernels, last = device_tests.SELECTIONS
    assert (first.limit(440.0), kernels.limit(220.0), last.limit(44.0)) == (220.0, 176.0, 44.0)
    assert first.limit(50.0) == first.seconds


@pytest.mark.slow
def test_marked_tests_are_all_in_the_files_that_are_read(tmp_path):
    """And the kernels' are first, since all else stands on them."""
    root = device_tests.package_checkout()
    selection = device_tests.SELECTIONS[0]
    files = selection.files(root)
    kernels = [file.startswith("tests/kernels/") for file in files]
    assert kernels[0] and kernels == sorted(kernels, reverse=True)
    words = [sys.executable, "-P", "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    words += ["-o", "addopts=", "--import-mode=importlib", "-m", "gpu and not slow"]
    found = [
        [line for line in done.stdout.splitlines() if "::" in line]
        for done in (
            subprocess.run([*words, *where], cwd=root, capture_output=True, text=True, check=True)
            for where in (["tests"], files)
        )
    ]
    assert found[0]
    assert sorted(found[0]) == sorted(found[1])
    (tmp_path / "tests").mkdir()
    assert selection.files(tmp_path) == ["tests"]


def test_few_tests_are_run_under_the_eye_of_a_tool():
    """Some of each file, and all of them in the seconds of a part."""
    folder = Path(__file__).parents[1]
    found = {
        path: re.search(r'memory_check\(\s*__file__,\s+"([^"]+)"', path.read_text())
        for path in (folder / "kernels").glob("test_*.py")
    }
    asked = {path: match[1] for path, match in found.items() if match}
    assert len(asked) == 5
    for path, expression in asked.items():
        words = [sys.executable, "-P", "-m", "pytest", "--collect-only", "-qq"]
        words += ["-o", "addopts=", "--import-mode=importlib", "-m", "not slow and not gpu"]
        done = subprocess.run(
            [*words, "-p", "no:cacheprovider", "-k", expression, str(path)],
            cwd=folder.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        counted = re.search(r"test_\w+\.py: (\d+)", done.stdout)
        assert 2 <= int(counted[1]) <= 12, (path.name, done.stdout)
    (seconds,) = re.findall(r"MEMORY_CHECK = ([0-9.]+)", (folder / "conftest.py").read_text())
    assert len(asked) * float(seconds) <= gpu.SECONDS["full"]


def test_several_processes_share_the_tests_and_report_to_one_file(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "tests" / "kernels").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\nmarkers = ["gpu: x", "slow: y"]\n'
    )
    lines = ["import os", "def test_bad(): assert 1 == 2", "def test_dies(): os._exit(3)"]
    lines += [f"def test_{number}(): pass" for number in range(6)]
    (tmp_path / "tests" / "kernels" / "test_it.py").write_text("\n".join(lines))
    selection = replace(device_tests.SELECTIONS[1], processes=2)
    outcome = Outcome()
    device_tests.run_selections(
        tmp_path, tmp_path, "cuda", Budget(60.0), outcome, SILENT, [selection]
    )
    values = {name.rpartition(".")[2]: figure.value for name, figure in outcome.figures.items()}
    assert values == {"passed": 6, "failed": 2, "skipped": 0, "not_run": 0}
    failed = {v["test"].rpartition("::")[2]: v["why"] for v in outcome.details["kernels"]["failed"]}
    assert failed["test_bad"] == "assert 1 == 2"
    assert "crashed" in failed["test_dies"]


def test_tests_see_the_gpu_that_was_asked_for(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in device_tests._environment("cuda")
    assert device_tests._environment("cuda:1")["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert device_tests._environment("cuda:1")["CUDA_VISIBLE_DEVICES"] == "5"


# Kernels.


def test_the_most_telling_cases_come_first_and_compile_while_there_is_time():
    plans = device_kernels.in_order(kernels.plan("cuda", quick=False))
    names = [device_kernels.describe(plan) for plan in plans]
    assert len(set(names)) == len(names)
    first = [name for name, plan in zip(names, plans, strict=True) if not plan.uncompiled][:5]
    assert names[:5] == first and all("animatediff" in name for name in first)
    assert names[0] == "kernels: query_attention animatediff_64x64 bf16"
    assert names[-1].endswith("fp16")
    assert "kernels: motion_feature animatediff region backward bf16" in names
    clock, outcome = Clock(), Outcome()
    some = [*plans[:3], plans[-1]]
    seen = []
    for plan in device_kernels.within(some, Budget(57.0, clock), outcome):
        seen.append(plan)
        clock.now += 40.0 if not plan.uncompiled else 9.0
    # 57 s: the first compiles and leaves 16 s for the others, of which the last comes too late.
    assert seen == [
        some[0],
        *(replace(plan, uncompiled=device_kernels._NO_TIME) for plan in some[1:3]),
    ]
    assert outcome.unmeasured == {
        f"{names[1]}, compiled contestants": "no time was left to compile",
        f"{names[2]}, compiled contestants": "no time was left to compile",
        names[-1]: "no time: may take 4 s, 0 s were left",
    }


@pytest.mark.parametrize("seconds", [1.2, 2.5])
def test_in_the_time_of_a_part_each_target_meets_what_is_compiled(seconds):
    plans = device_kernels.in_order(kernels.plan("cuda", quick=False))
    clock, outcome = Clock(), Outcome()
    compiled, seen = set(), set()
    for plan in device_kernels.within(plans, Budget(gpu.SECONDS["full"], clock), outcome):
        seen.add(device_kernels.stem(plan))
        if not plan.uncompiled:
            compiled.add(device_kernels.stem(plan))
        clock.now += seconds if plan.uncompiled else device_kernels._COMPILED
    assert clock.now - 100.0 <= gpu.SECONDS["full"] + device_kernels._CASE
    targets = {name.rpartition(".")[0] for name in load_targets() if ".bf16." in name}
    assert targets <= seen
    firsts = {device_kernels.stem(plan) for plan in plans if not plan.uncompiled}
    assert len(targets & firsts) == 8 and targets & firsts == compiled & targets
    assert "kernels.temporal_block.animatediff_64x64.bf16" in compiled


def test_a_case_gives_figures_and_its_settings_are_sorted(monkeypatch, tmp_path):
    monkeypatch.setattr(device_kernels, "_TIMED", 0.01)
    (plan,) = [p for p in kernels.plan("cpu", quick=True) if p.build.func is kernels.step_case]
    roof = kernels.Roof(1e10, {"fp32": 1e11})
    outcome = Outcome()
    options = BenchOptions(out=tmp_path)

    def run(plans):
        device_kernels.run_plans(
            plans, kernels.Machine("cpu"), roof, options, Budget(60.0), outcome, SILENT
        )

    run([plan])
    assert outcome.figures["kernels.failed"].value == 0
    assert outcome.figures["kernels.guided_step.embedded.fp32.ratio_to_usual"].value > 0
    assert outcome.figures["kernels.roof.copy"].value == 10.0
    assert (tmp_path / "kernels.ndjson").read_text().count("\n") >= 2
    assert outcome.unmeasured == {} and set(outcome.details["launch"]) == {
        "own",
        "taken_over",
        "by_rule",
    }

    def wrong(*given, **named):
        case = kernels.step_case("embedded", *plan.build.args[1:])
        return replace(
            case, ways={**case.ways, kernels.OURS: case.ways[kernels.USUAL], kernels.USUAL: fail}
        )

    def fail():
        raise RuntimeError("too slow")

    wrong.__name__ = kernels.step_case.__name__  # by which a case is described
    run([replace(plan, build=functools.partial(wrong, *plan.build.args))])
    assert outcome.figures["kernels.failed"].value == 1
    assert outcome.failed == ["kernels: guided_step embedded fp32"]


def test_a_gpu_that_is_lost_ends_the_table_and_the_rest_is_named(monkeypatch, tmp_path, lose_gpu):
    plans = kernels.plan("cuda", quick=True)
    ordered = [device_kernels.describe(plan) for plan in device_kernels.in_order(plans)]
    monkeypatch.setattr(kernels, "_write", lambda *_: None)
    kept = []

    def run(plan, *_):
        name = device_kernels.describe(plan)
        if name == ordered[1]:
            raise RuntimeError("no room to build")
        if name == ordered[2]:
            lose_gpu()
            return [kernels.Line("o", "s", "bf16", "sdpa_cudnn", failed="AcceleratorError: x")]
        return []

    def keep(outcome, name):
        kept.append((name, list(outcome.failed), outcome.figures.get("kernels.failed")))

    monkeypatch.setattr(kernels, "run_plan", run)
    outcome = Outcome()
    roof = kernels.Roof(1e10, {"bf16": 1e11})
    options = BenchOptions(device="cuda", out=tmp_path)
    machine = kernels.Machine("cuda")
    device_kernels.run_plans(
        plans, machine, roof, options, Budget(60.0, Clock()), outcome, SILENT, keep
    )
    # What failed is in the books before the next case begins.
    assert kept[2] == (ordered[2], ordered[1:2], Figure(1, n=len(plans)))
    assert outcome.failed == ordered[1:3] and outcome.figures["kernels.failed"].value == 2
    assert outcome.unmeasured[ordered[1]] == "RuntimeError: no room to build"
    assert {outcome.unmeasured[name] for name in ordered[3:]} == {
        f"the GPU was lost before: {ILLEGAL}"
    }
    assert outcome.left == []


def test_a_target_that_lacks_a_contestant_is_named(monkeypatch):
    build = functools.partial(kernels.query_case, kernels.SITES[0], kernels.Inputs("cpu", "bf16"))
    timing = {"seconds": kernels.Timing(1, 1, 1), "times_ours": 1.0, "rounds": (1.0,)}
    line = functools.partial(kernels.Line, "query_attention", "animatediff_64x64", "bf16")
    lines = [line(name, **timing) for name in (kernels.OURS, kernels.USUAL)]
    lines += [line("sdpa_cudnn", skipped="No kernel"), line("flex", skipped="no time")]
    monkeypatch.setattr(kernels, "run_plan", lambda *_: lines)
    outcome = Outcome()
    plans, roof = [kernels.Plan(build, "bf16")], kernels.Roof(1e10, {"bf16": 1e11})
    options = BenchOptions()
    device_kernels.run_plans(
        plans, kernels.Machine("cpu"), roof, options, Budget(60.0, Clock()), outcome, SILENT
    )
    assert outcome.unmeasured == {
        "kernels.query_attention.animatediff_64x64.bf16.ratio_to_best": (
            "needs all other ways, sdpa_cudnn, flex not timed: sdpa_cudnn: No kernel"
        )
    }


def test_a_gpu_that_is_lost_before_the_table_is_no_traceback(monkeypatch):
    def broken(*_):
        raise RuntimeError("no luck")

    monkeypatch.setattr(kernels.Machine, "roof", broken)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    outcome = device_kernels.measure_kernels(BenchOptions(device="cuda"), Budget(9.0), SILENT)
    names = {device_kernels.describe(plan) for plan in kernels.plan("cuda", quick=False)}
    assert names <= set(outcome.failed)


@pytest.mark.parametrize(
    ("message", "too_large"),
    [
        ("CUDA out of memory. Tried to allocate 20 GiB", True),
        ("CUDA error: invalid configuration argument", True),
        ("expected canUse32BitIndexMath to be true", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA error: unspecified launch failure", False),
    ],
)
def test_stock_refuses_by_words_and_not_by_a_fault(message, too_large):
    assert clips.stock_refuses(RuntimeError(message)) == too_large


@pytest.mark.parametrize(
    ("kind", "seconds", "named", "counts"),
    [
        ("CUDA", 1, False, True),
        ("CUDA", 1, True, False),
        ("CPU", 1, False, False),
        ("CUDA", 0, False, False),
    ],
)
def test_time_of_the_gpu_is_that_of_kernels(kind, seconds, named, counts):
    event = SimpleNamespace(
        device_type=SimpleNamespace(name=kind),
        self_device_time_total=seconds,
        is_user_annotation=named,
    )
    assert clips._is_kernel(event) == counts


def test_settings_are_of_their_own_taken_over_or_the_rules():
    one = {"BLOCK": 1}
    table = {
        "first": {"default": {"*": one}, "sm_90": {"d40": one}},
        "second": {"default": {"*": one}, "sm_80": {"*": one}, "sm_86": {"d40": one}},
        "third": {"default": {"*": one}},
    }
    asked = [("first", "d40"), ("first", "d80"), ("second", "d40"), ("third", "x")]
    assert device_kernels.sort_settings(asked, table, "sm_90") == {
        "own": ["first d40"],
        "taken_over": [],
        "by_rule": ["first d80", "second d40", "third x"],
    }
    assert device_kernels.sort_settings(asked, table, "sm_89") == {
        "own": [],
        "taken_over": ["second d40"],
        "by_rule": ["first d40", "first d80", "third x"],
    }


# Full-size models, here tiny ones.


@pytest.mark.parametrize("family", ["animatediff", "unet3d"])
def test_ours_and_stock_sample_the_same_clips(family):
    subject = subject_of(family)
    stock = models.Stock(subject)
    wanted = stock.clips(2, steps=3, latent=True)
    got = torch.stack(subject.sample(subject.resolve(subject.requests(2, steps=3))))
    assert apart(got, wanted) <= 1e-4
    assert apart(got[0], wanted[1]) > 0.1
    theirs = stock.clips(2, steps=3)  # end as ours do: bytes in memory, within one of ours
    ours = [clip.frames for clip in subject.clips(subject.resolve(subject.requests(2, steps=3)))]
    assert theirs.dtype == torch.uint8 and theirs.is_contiguous() and theirs.unique().numel() > 9
    assert (theirs.int() - torch.tensor(np.stack(ours)).int()).abs().max() <= 1
    assert subject.engine.denoiser.attached
    assert subject.flops > 0


def test_no_layer_is_without_a_say():
    fresh = type(tiny.tiny_unet3d())(**tiny._UNET3D)  # its temporal convolutions end in zeros
    assert [n for n, p in fresh.named_parameters() if p.ndim > 1 and not p.any()]
    models.wake(fresh)
    assert not [n for n, p in fresh.named_parameters() if p.ndim > 1 and not p.any()]


def test_a_network_that_is_wrong_is_not_timed(monkeypatch):
    exact = torch.linspace(-1, 1, 9)
    usual = (exact + 1e-3).half()
    models.require_as_good("x", (exact - 2e-3).half(), usual, exact)
    with pytest.raises(
        WorkError, match=r"x: our network must err at most 0\.00\d+ in torch.float16"
    ):
        models.require_as_good("x", (exact + 5e-3).half(), usual, exact)
    with pytest.raises(WorkError, match="errs nan"):
        models.require_as_good("x", torch.full_like(usual, torch.nan), usual, exact)
    predict = EagerDenoiser.predict
    monkeypatch.setattr(EagerDenoiser, "predict", lambda *given: 1.01 * predict(*given))
    with pytest.raises(WorkError, match="tiny: our network must err"):
        models.full_size_subject(full_size("animatediff"), "cpu", torch.float32)


def test_a_compiled_network_that_is_wrong_is_not_timed(monkeypatch):
    """Each of the ways to time one compares it first, in as many rows as it is timed with."""
    subject = subject_of()
    rows = []

    def predict(_, latents, *rest):
        rows.append((len(latents), rest[0].dtype))
        wrong = subject.engine.denoiser.network(latents, *rest[:1], rest[1].repeat_interleave(3, 0))
        return 1.01 * wrong.sample

    monkeypatch.setattr(models.CompiledDenoiser, "predict", predict)
    monkeypatch.setattr(models.Subject, "sample", lambda *_: rows.append("sampled"))
    monkeypatch.setattr(clips, "time_ratio", lambda *_, **__: pytest.fail("timed"))
    monkeypatch.setattr(control_costs, "cost", lambda *_, **__: pytest.fail("timed"))
    bench = clips.Bench(subject, "gpu.tiny", steps=2)
    for time_it, count in (
        (lambda: list(clips.ours_compiled(bench)), 1),
        (lambda: clips.compiled_together(bench, count=4), 4),
        (
            lambda: control_costs.cost_compiled(
                subject, case=control_costs.CASES[1], stem="gpu", repeats=2
            ),
            4,
        ),
    ):
        with pytest.raises(WorkError, match="tiny: our network must err at most"):
            time_it()
        assert rows[-1] == (2 * count, torch.float32)  # the sampler's type, so its plan
        assert subject.engine.denoiser.attached
    with pytest.raises(WorkError, match="must have been compared with stock"):
        replace(subject, check=models.Subject.check).check(None, 1)


def test_clips_that_do_not_fit_together_are_not_timed_in_parts(monkeypatch):
    subject = subject_of()
    counts = iter([0, 1])
    monkeypatch.setattr(models.Subject, "_exhausted", lambda _: next(counts))
    with pytest.raises(WorkError, match="2 clips must fit into memory together"):
        subject.sample(subject.resolve(subject.requests(2, steps=1)))


def test_a_clip_against_stock_and_its_stages(monkeypatch):
    monkeypatch.setattr(
        clips.Machine, "roof", lambda *_: SimpleNamespace(flops_per_second={"fp32": 1e11})
    )
    bench = clips.Bench(subject_of(), "gpu.tiny", steps=2)
    bench.ratios["stock_cudnn"] = Figure(0.001)
    found = clips.against_usual(bench)
    assert "gpu.tiny.ratio_to_stock_best" not in found  # a way that was not timed may be the best
    bench.ratios["stock_compiled"] = Figure(0.5)
    found |= bench.best()
    ours, theirs = (found[f"gpu.tiny.{w}.seconds_per_clip"].value for w in ("eager", "stock"))
    assert found["gpu.tiny.eager.ratio_to_stock"].value == pytest.approx(theirs / ours)
    assert found["gpu.tiny.ratio_to_stock_best"].value == 0.001
    assert found["gpu.tiny.seconds_per_clip"].value == ours
    a_step = found["gpu.tiny.eager.milliseconds_per_step"].value / 1e3
    shares = {"useful_tflops": 1e12, "share_of_roof": 1e11, "share_of_floor": 790e12}
    for name, rate in shares.items():
        assert found[f"gpu.tiny.eager.{name}"].value == pytest.approx(
            bench.subject.flops / a_step / rate
        )
    assert found["gpu.tiny.decode_seconds"].value > 0
    assert "gpu.tiny.eager.peak_memory" not in found  # that of a GPU is asked for


@pytest.mark.parametrize(("family", "speedup"), [("animatediff", 2.0), ("unet3d", 0.5)])
def test_ours_compiled_is_timed_beside_ours_and_the_better_one_counts(
    family, speedup, traced_by_nobody, monkeypatch
):
    subject = subject_of(family)
    bench = clips.Bench(subject, "gpu.tiny", steps=2)
    bench.ratios |= {"stock_cudnn": Figure(4.0), "stock_compiled": Figure(5.0)}
    bench.ratios["stock"] = Figure(3.0, 2.0, 4.0, n=3)
    bench.seconds["eager"] = Figure(7.0)
    monkeypatch.setattr(
        clips.Machine, "roof", lambda *_: SimpleNamespace(flops_per_second={"fp32": 1e11})
    )
    seen = {}

    def timed(eager, ours, **_):
        for name, call in {"eager": eager, "ours": ours}.items():
            predictions.clear()
            call()
            seen[name] = len(predictions)
        taken = SimpleNamespace(p20=1.0, p50=7.0 / speedup, p80=9.0)
        return SimpleNamespace(figure=Figure(speedup, 0.4, 2.5, n=3), baseline=taken, ours=None)

    predictions = []
    predict = EagerDenoiser.predict

    def spy(*given):
        predictions.append(1)
        return predict(*given)

    monkeypatch.setattr(EagerDenoiser, "predict", spy)
    monkeypatch.setattr(clips, "time_ratio", timed)
    (found,) = clips.ours_compiled(bench)
    assert seen == {"eager": 2, "ours": 0}  # compiled ones are not predicted by the eager way
    assert found["gpu.tiny.compiled.compilations"].value == 1
    assert found["gpu.tiny.compiled.same_bits"].value == 1
    assert found["gpu.tiny.compiled.seconds_per_clip"].value == 7.0 / speedup
    assert found["gpu.tiny.compiled.milliseconds_per_step"].value > 0
    assert found["gpu.tiny.seconds_per_clip"].value == (3.5 if speedup > 1 else 7.0)
    wanted = Figure(6.0, 0.8, 10.0, n=3) if speedup > 1 else Figure(3.0, 2.0, 4.0, n=3)
    assert found["gpu.tiny.ratio_to_stock_best"] == wanted
    # The network is the eager one's again, and as right as before.
    assert subject.engine.denoiser.attached
    assert clips.determinism(bench)["gpu.tiny.same_bits"].value == 1
    several = clips.compiled_together(bench, count=2) | clips.together(bench, count=2)
    assert {f"gpu.tiny.{way}batch_2.milliseconds_per_step" for way in ("", "compiled.")} <= set(
        several
    )


def test_the_same_clips_are_sampled_compiled(traced_by_nobody):
    subject = subject_of()
    requests = subject.resolve(subject.requests(2, steps=2))
    wanted = torch.stack(subject.sample(requests))
    with models.compiled(subject) as faster:
        assert apart(torch.stack(faster.sample(requests)), wanted) <= 1e-4
        assert models.compilations(faster) == 1
        with models.eagerly(faster):
            assert torch.equal(torch.stack(faster.sample(requests)), wanted)
        assert models.compilations(faster) == 1


def test_same_bits_are_told_from_others(monkeypatch):
    bench = clips.Bench(subject_of(), "gpu.tiny", steps=2)
    assert clips.determinism(bench)["gpu.tiny.same_bits"].value == 1
    results = iter([[torch.zeros(2)], [torch.tensor([0.0, 1e-30])]])
    monkeypatch.setattr(models.Subject, "sample", lambda *_: next(results))
    assert clips.determinism(bench)["gpu.tiny.same_bits"].value == 0


@pytest.mark.parametrize(("room", "wanted"), [(0, 1), (5, 4), (1000, clips.MOST)])
def test_the_largest_batch_is_the_last_that_runs(monkeypatch, room, wanted):
    clock = Clock()
    monkeypatch.setattr(clips.time, "perf_counter", clock)

    def run(count, steps):
        clock.now += 0.5 * count + 2.0 * count * steps  # the VAE, and the steps
        if count > max(room, 1):
            raise torch.OutOfMemoryError("full")

    bench = clips.Bench(subject_of(), "gpu.tiny", steps=25)
    outcome = Outcome()
    for part in clips.largest(bench, "batch", run, clips.does_not_fit):
        outcome.take(part)
    found = outcome.figures
    assert found["gpu.tiny.batch.clips"].value == wanted
    assert found["gpu.tiny.batch.seconds_per_clip"].value == pytest.approx(0.5 + 2.0 * 25)
    refused = f"{2 * wanted} clips: OutOfMemoryError: full"
    note = f"{wanted} clips fit, and more are not tried" if wanted == clips.MOST else refused
    assert outcome.details == {"notes": {"gpu.tiny.batch.clips": note}}


def test_only_stock_may_refuse_a_batch_for_another_reason(monkeypatch):
    bench = clips.Bench(subject_of(), "gpu.tiny", steps=2)
    error = RuntimeError("an illegal memory access")

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(models.Subject, "clips", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        next(clips.largest_ours(bench))
    error = WorkError("16 clips must fit into memory together, and do not")
    assert "16 clips must fit" in next(clips.largest_ours(bench)).text
    error = WorkError("denoise: a value is not finite")
    with pytest.raises(WorkError, match="not finite"):
        next(clips.largest_ours(bench))
    error = RuntimeError("invalid configuration argument")
    monkeypatch.setattr(models.Stock, "clips", broken)
    assert "2 clips: RuntimeError: invalid conf" in next(clips.largest_stock(bench)).text
    monkeypatch.setattr(clips, "lost", lambda _: "the GPU was lost before")
    with pytest.raises(RuntimeError, match="invalid conf"):  # what fits is not known then
        next(clips.largest_stock(bench))


def test_stock_is_timed_without_what_is_set_up_for_it(monkeypatch):
    subject = subject_of()
    seen = []

    def timed(theirs, ours, *, around_ours, **_):
        with around_ours():
            seen.append(subject.engine.denoiser.attached)
            monkeypatch.setattr(models, "without_ours", lambda _: pytest.fail("set up in the call"))
            theirs()
        seen.append(subject.engine.denoiser.attached)
        ours()
        taken = SimpleNamespace(p20=1.0, p50=1.0, p80=1.0)
        return SimpleNamespace(figure=Figure(1.0), ours=taken, baseline=taken)

    monkeypatch.setattr(clips, "time_ratio", timed)
    bench = clips.Bench(subject, "gpu.tiny", steps=1)
    found = clips.against(bench, "stock", models.Stock(subject))
    assert seen == [False, True] and found["gpu.tiny.eager.ratio_to_stock"].value == 1


def test_kernels_are_told_apart_by_their_names():
    kernels = {
        "_query_attention_kernel": 1.0,
        "triton_poi_fused_add_convolution_gelu_3": 2.0,
        "sm90_xmma_fprop_implicit_gemm_bf16bf16": 4.0,
        "void cutlass::Kernel<gemm>": 8.0,
        "nvjet_hsh_192x192": 16.0,
        "Memcpy DtoD (Device -> Device)": 32.0,
        "void at::native::vectorized_elementwise_kernel<4>": 64.0,
        "void pytorch_flash::flash_fwd_kernel": 128.0,
        "who knows": 256.0,
    }
    assert clips.by_group(kernels.items()) == {
        "other": 256.0,
        "attention": 128.0,
        "stock_pointwise_and_norm": 64.0,
        "copies": 32.0,
        "matrix": 24.0,
        "convolution": 4.0,
        "pointwise_and_norm": 2.0,
        "our_query_attention": 1.0,
    }


def test_a_search_for_what_fits_ends_within_its_step():
    """At the pace that is predicted for ZeroScope: 0.14 s a step, 0.11 s for the VAE."""
    clock = Clock()
    bench = SimpleNamespace(
        subject=SimpleNamespace(device=torch.device("cpu")),
        steps=25,
        stem="x",
        figure=lambda *_, **__: {},
    )

    def run(count, steps):
        clock.now += count * (0.14 * steps + 0.11)

    list(clips.largest(bench, "batch", run, clips.does_not_fit))
    (step,) = [
        step
        for stage in clips.stages(BenchOptions())
        for step in stage.steps
        if step.name == "gpu.zeroscope.fp16: as many clips as fit, ours"
    ]
    assert clock.now - 100.0 <= step.seconds


def test_the_stages_are_those_of_the_issue_and_a_cpu_has_the_embedded_one_alone(monkeypatch):
    stages = clips.stages(BenchOptions())
    names = [step.name for stage in stages for step in stage.steps]
    assert len(set(names)) == len(names)
    assert [stage.name for stage in stages if not stage.gpu] == ["embedded"]
    # All that the headline's ratio is made of fits into the budget, and comes first.
    assert names[:4] == [
        "gpu.animatediff: a clip, ours and stock",
        "gpu.animatediff: a clip, ours compiled, and where its time goes",
        "gpu.animatediff: stock with cuDNN attention, channels last",
        "gpu.animatediff: stock with torch.compile",
    ]
    needed = stages[0].seconds + sum(step.seconds for step in stages[0].steps[:4])
    assert needed <= gpu.SECONDS["full"]
    assert {
        f"gpu.animatediff: {n} clips{way}" for n in (4, 8) for way in ("", ", ours compiled")
    } <= (set(names))
    monkeypatch.setattr(
        clips, "build_embedded", lambda _: clips.Bench(subject_of(), "cpu.embedded", 1)
    )
    outcome = clips.measure_clips(BenchOptions(), Budget(60.0), SILENT)
    small = {step.name for step in stages[1].steps}
    assert set(outcome.unmeasured) == set(names) - small and outcome.failed == []
    assert set(outcome.figures) == {
        "cpu.embedded.seconds_per_clip",
        "cpu.embedded.same_bits",
        "cpu.embedded.batch_8.seconds_per_clip",
        "cpu.embedded.batch_8.milliseconds_per_step",
    }


# Controls.


@pytest.mark.parametrize("case", control_costs.CASES, ids=lambda case: case.name)
def test_every_control_runs_beside_plain_clips(case, monkeypatch):
    subject = subject_of()
    rows = []
    predict = EagerDenoiser.predict

    def spy(denoiser, latents, *rest):
        rows.append(len(latents))
        return predict(denoiser, latents, *rest)

    monkeypatch.setattr(EagerDenoiser, "predict", spy)
    monkeypatch.setattr(control_costs, "time_ratio", lambda ours, plain, **_: (ours(), plain()))
    seen = {}

    def timed(ours, plain, **_):
        for name, call in {"ours": ours, "plain": plain}.items():
            rows.clear()
            call()
            seen[name] = list(rows)
        taken = (SimpleNamespace(p50=seconds) for seconds in (4.0, 2.0))
        return SimpleNamespace(figure=Figure(2.0), ours=next(taken), baseline=next(taken))

    monkeypatch.setattr(control_costs, "time_ratio", timed)
    case = replace(case, steps=min(case.steps, 5))
    found = control_costs.cost(subject, case=case, stem="gpu", repeats=2)
    assert found.pop(f"gpu.{case.name}") == Figure(2.0)
    values = {name: figure.value for name, figure in found.items()}
    floor = case.clips * subject.flops * case.steps / 790e12
    plain = f"gpu.plain.batch_{case.clips}"
    assert values == {
        f"gpu.{case.name}.milliseconds_per_step": 4e3 / case.steps,
        f"gpu.{case.name}.share_of_floor": pytest.approx(floor / 4),
        f"{plain}.milliseconds_per_step": 2e3 / case.steps,
        f"{plain}.share_of_floor": pytest.approx(floor / 2),
    }
    assert seen["plain"] == [2 * case.clips] * 5
    extra = {"query_cost": [1, 1, 0, 0, 0], "injection_cost": [1] * 5}.get(
        case.name.partition(".")[0]
    )
    if extra:
        assert seen["ours"] == [2 * case.clips + more for more in extra]


def test_the_peak_is_not_that_of_the_first_run(monkeypatch):
    """Which compiles, in memory that no later one needs."""
    subject, seen = subject_of(), []
    sample = models.Subject.sample
    spy = lambda *given: (seen.append(id(given[1])), sample(*given))[1]
    monkeypatch.setattr(models.Subject, "sample", spy)

    def peak(call, _):
        before = list(seen)
        call()
        assert seen[-1] in before
        return 2**30

    monkeypatch.setattr(control_costs, "peak_of", peak)
    found = control_costs.cost(subject, case=control_costs.CASES[0], stem="gpu", repeats=1)
    assert found["gpu.query_cost.one_target.peak_memory"].value == 1


def test_a_control_is_timed_compiled(traced_by_nobody, monkeypatch):
    """Two plans, with the control and without it."""
    subject = subject_of()
    seen = []

    def cost(faster, *, case, **_):
        for controls in (case.controls(faster), None):
            faster.sample(faster.resolve(faster.requests(1, controls, steps=case.steps)))
        seen.append(models.compilations(faster))
        return {"a": Figure(1.0)}

    monkeypatch.setattr(control_costs, "cost", cost)
    (case,) = [case for case in control_costs.CASES if case.name == control_costs._COMPILED[0]]
    found = control_costs.cost_compiled(subject, case=case, stem="gpu.compiled", repeats=2)
    assert found == {"a": Figure(1.0)} and seen == [2]
    assert subject.engine.denoiser.attached


def make_agreement(tested):
    trusted = {dtype: subject_of(dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    return control_costs.Agreement(tested or trusted, trusted)


@pytest.mark.parametrize(
    "name",
    [
        *("plain", "query", "query_region", "motion", "motion_region", "embedding", "lora"),
        *("embedding_with_lora", "moft", "moft_region"),
    ],
)
def test_a_device_that_agrees_does(name, monkeypatch):
    monkeypatch.setattr(control_costs, "_SMALL", 0.5)
    found = control_costs.agree(make_agreement(None), name=name)
    assert found["gpu.agreement.disagreeing"].value == 0
    assert found["gpu.agreement.not_compared"].value == len(control_costs.COMPARED) - 1
    assert found[f"gpu.agreement.{name}.fp32"].value == 0
    assert found[f"gpu.agreement.{name}.bf16"].value > 0


def test_every_control_is_compared():
    """Each by itself, and all that a region, another control or other rows change in it."""
    subject = control_costs.embedded_subject("cpu", control_costs.transfer_pairs(1)[0].reference())
    asked = [case.controls(subject) for case in control_costs.COMPARED.values()]
    kinds = {type(one) for one in asked}
    assert kinds == {
        *(type(None), control_costs.QueryInjection, control_costs.MotionInjection),
        *(control_costs.MoftGuidance, control_costs.ConsistentShots, tuple, list),
        *(type(control_costs._embedding(subject)), type(control_costs._lora(subject))),
    }
    in_regions = {type(one) for one in asked if getattr(one, "region", None) is not None}
    assert in_regions == {control_costs.QueryInjection, control_costs.MotionInjection}
    assert any(getattr(one, "regions", ()) for one in asked)


def test_shots_left_alone_are_the_plain_clips():
    """So what consistency changes is known, and sampled by the same model."""
    subject = control_costs.embedded_subject("cpu", control_costs.transfer_pairs(1)[0].reference())
    shots = control_costs._shots(subject)
    shots = attrs.evolve(shots, steps=2)
    alone = attrs.evolve(shots, keys_window=(0.0, 0.0), preserve_until=0.0, flow=False, refine=0.0)
    plain = subject.sample(subject.resolve(subject.requests(2, steps=2)))
    assert apart(torch.stack(subject.sample_shots(alone)), torch.stack(plain)) <= 1e-4
    assert apart(torch.stack(subject.sample_shots(shots)), torch.stack(plain)) > 1e-3


def test_what_compiles_has_its_turn_while_a_part_has_time():
    stages = control_costs.stages(BenchOptions())
    names = [step.name for stage in stages for step in stage.steps]
    assert len(set(names)) == len(names)
    assert {f"gpu.{case.name}" for case in control_costs.CASES} <= set(names)
    assert names[:3] == [
        "gpu.query_cost.one_target",
        "gpu.query_cost.four_targets",
        "gpu.compiled.query_cost.one_target",
    ]
    needed = sum(stage.seconds + sum(s.seconds for s in stage.steps) for stage in stages[:2])
    assert needed <= gpu.SECONDS["full"]


def test_a_device_that_does_not_agree_is_counted(monkeypatch):
    wrong = replace(subject_of(), name="wrong")
    sample = models.Subject.sample

    def off(subject, requests):
        scale = 1.001 if subject.name == "wrong" else 1.0
        return [scale * latents for latents in sample(subject, requests)]

    monkeypatch.setattr(models.Subject, "sample", off)
    state = make_agreement({torch.float32: wrong, torch.bfloat16: subject_of(dtype=torch.bfloat16)})
    found = control_costs.agree(state, name="plain")
    assert found["gpu.agreement.plain.fp32"].value == pytest.approx(1e-3, rel=1e-2)
    assert found["gpu.agreement.disagreeing"] == Figure(1, n=1)


def test_a_half_type_is_judged_by_all_errors_and_not_by_the_largest(monkeypatch):
    """Of the largest one device may have three times the other's by chance, and both be right."""
    exact = torch.full((1, 100), 4.0)
    errors = {name: torch.zeros(1, 100) for name in ("near", "lone", "wide")}
    errors["near"][0, :10] = 0.1
    errors["lone"][0, :1] = 0.3
    errors["wide"] += 0.1
    monkeypatch.setattr(
        control_costs, "_latents", lambda subject, _: exact + errors.get(subject, 0.0)
    )
    for name, wrong in (("lone", 0), ("wide", 1)):
        state = control_costs.Agreement(
            {torch.float32: "exact", torch.bfloat16: name},
            {torch.float32: "exact", torch.bfloat16: "near"},
        )
        found = control_costs.agree(state, name="plain")
        assert found["gpu.agreement.disagreeing"].value == wrong
        size = float(errors[name].norm() / exact.norm())
        assert found["gpu.agreement.plain.bf16"].value == pytest.approx(size)


def test_the_worst_clip_is_judged(monkeypatch):
    """One of eight that is wrong, and seven that are better than they need be."""
    exact = torch.full((8, 100), 4.0)
    good = exact + torch.full((8, 100), 0.1)
    wrong = exact.clone()
    wrong[5] += 0.25
    values = {"exact": exact, "good": good, "wrong": wrong}
    monkeypatch.setattr(control_costs, "_latents", lambda subject, _: values[subject])
    state = control_costs.Agreement(
        {torch.float32: "exact", torch.bfloat16: "wrong"},
        {torch.float32: "exact", torch.bfloat16: "good"},
    )
    assert control_costs.agree(state, name="plain")["gpu.agreement.disagreeing"].value == 1


@pytest.mark.parametrize(("share", "untold"), [(0.9, 1), (1.1, 0)])
def test_a_control_that_changes_less_than_a_half_type_errs_is_untold(monkeypatch, share, untold):
    """It would pass if what makes it another control were forgotten in that type."""
    eps = torch.finfo(torch.bfloat16).eps
    plain = torch.full((1, 100), 4.0)
    exact = {"plain": plain, "query": 1.5 * plain}
    allowed = 2 * 0.05 + eps  # of the region's values
    exact["query_region"] = exact["query"] / (1 - share * allowed)

    def latents(subject, case):
        return exact[case.name] * (1.05 if subject == "half" else 1.0)

    monkeypatch.setattr(control_costs, "_latents", latents)
    types = {torch.float32: "exact", torch.bfloat16: "half"}
    state = control_costs.Agreement(types, types)
    found = control_costs.agree(state, name="query_region")
    assert found["gpu.agreement.untold"] == Figure(untold, n=1)
    assert found["gpu.agreement.disagreeing"].value == 0
    assert control_costs.agree(state, name="query")["gpu.agreement.untold"] == Figure(untold, n=2)


def test_a_control_that_does_nothing_is_not_right(monkeypatch):
    idle = replace(control_costs.COMPARED["query"], controls=lambda _: None)
    monkeypatch.setitem(control_costs.COMPARED, "query", idle)
    state = make_agreement(None)
    assert control_costs.agree(state, name="query")["gpu.agreement.disagreeing"].value == 1
    assert state.disagreeing == ["query"]


def test_random_motions_differ_and_have_a_say():
    subject = subject_of()
    (plain,) = subject.sample(subject.resolve(subject.requests(1, steps=2)))
    makers = (models.random_embedding, models.random_lora)
    for make in makers:
        found = subject.sample(
            subject.resolve(subject.requests(2, [make(subject, 0), make(subject, 1)], steps=2))
        )
        assert apart(found[0], plain) > 1e-4
        (other,) = subject.sample(
            subject.resolve([Request(**REQUEST, control=make(subject, 1), seed=0)])
        )
        assert apart(found[0], other) > 1e-4


REQUEST = {
    "prompt": "a red circle",
    "steps": 2,
    "guidance_scale": 7.5,
    "frames": 3,
    "height": 16,
    "width": 16,
    "sampler": "ddim",
}


# Parts of the bench.


def measure_part(options, progress):
    if options.part == "broken":
        raise WorkError("bench fake: no luck")
    return {
        f"fake.{options.part}": Figure(options.seed + 1.0, 0.5, 9.0, n=2, unit="s"),
        "query.identity_leak": 0.5,
    }


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "find_checkout", lambda: None)
    monkeypatch.chdir(tmp_path)
    bench = Bench("fake", "has parts", measure_part, parts=("one", "two", "broken"))
    monkeypatch.setitem(sys.modules, "fake_bench", SimpleNamespace(BENCH=bench))
    group = make_group(Registry({"fake": "fake_bench"}))

    def run(*words):
        result = CliRunner().invoke(group, ["fake", "--device", "cpu", *words])
        if result.exception is not None:
            assert isinstance(result.exception, SystemExit), result.exception
        return result

    return run


def test_records_of_parts_are_joined(invoke, tmp_path):
    first = invoke("--part", "one", "--out", "d")
    assert first.exit_code == 0 and "fake.two" not in first.stdout
    second = invoke("--part", "two", "--seed", "4", "--out", "d", "--results", "r", "--json")
    whole = json.loads(second.stdout)
    assert whole["figures"] == {"fake.one": 1.0, "query.identity_leak": 0.5, "fake.two": 5.0}
    assert whole["intervals"] == {"fake.one": [0.5, 9.0, 2], "fake.two": [0.5, 9.0, 2]}
    assert whole["missed"] == ["query.identity_leak"]
    assert whole["command"] == (
        "kinetiq bench fake --part one --device cpu && kinetiq bench fake --part two --seed 4 --device cpu"
    )
    (record,) = read_records(tmp_path / "r" / "fake.jsonl")
    assert record.figures == whole["figures"] and record.units == {"fake.one": "s", "fake.two": "s"}
    (alone,) = read_records(tmp_path / "d" / "fake.two.jsonl")
    assert "fake.one" not in alone.figures


def test_merging_measures_nothing_and_a_newer_part_wins(invoke, tmp_path):
    invoke("--part", "one", "--part", "two", "--out", "d")
    invoke("--part", "one", "--seed", "7", "--out", "e")
    for name, year in {"d/fake.one.jsonl": "2001", "e/fake.one.jsonl": "2002"}.items():
        record = read_records(tmp_path / name)[0]
        (tmp_path / name).write_text(
            replace(record, date=f"{year}-01-01T00:00:00+00:00").line + "\n"
        )
    merged = json.loads(invoke("--merge", "e", "--merge", "d", "--json").stdout)
    assert merged["figures"]["fake.one"] == 8.0 and merged["figures"]["fake.two"] == 1.0
    assert invoke("--merge", "nothing").exit_code == 2
    refused = invoke("--merge", "d", "--part", "one")
    assert refused.exit_code == 2 and "--merge must come without --part" in refused.stderr


def test_a_part_that_breaks_does_not_take_the_others_along(invoke):
    result = invoke("--out", "d")
    assert result.exit_code == 0 and "fake.two" in result.stdout
    assert "bench fake: no luck" in result.stderr
    assert invoke("--part", "broken").exit_code == 1
    assert invoke("--part", "three").exit_code == 2


def test_a_folder_that_cannot_be_is_refused_before_anything_is_measured(invoke, tmp_path):
    (tmp_path / "file").touch()
    result = invoke("--part", "broken", "--out", "file/x")
    assert result.exit_code == 2 and "file/x: must be a folder, got:" in result.stderr


def test_records_made_otherwise_are_not_joined(invoke, tmp_path):
    invoke("--part", "one", "--part", "two", "--out", "d")
    path = tmp_path / "d" / "fake.one.jsonl"
    record = read_records(path)[0]
    environment = {
        **record.environment,
        "machine": {**record.environment["machine"], "gpu": "NVIDIA H100"},
    }
    other = replace(record, environment=environment)
    assert list(joining.differences(record, other)) == ["GPU"]
    drivers = [
        replace(
            record,
            environment={**environment, "machine": {**environment["machine"], "driver": driver}},
        )
        for driver in ("580.159.03", "580.159.04", "590.44.01")
    ]
    assert not joining.differences(*drivers[:2])  # of two machines of one kind
    assert list(joining.differences(*drivers[1:])) == ["driver"]
    path.write_text(other.line + "\n")
    with pytest.raises(InputError, match=r"must be made alike to be joined, GPU must be .*H100"):
        joining.merge_folders("fake", [tmp_path / "d"])
    result = invoke("--part", "two", "--out", "d", "--json")
    assert "fake.one" not in json.loads(result.stdout)["figures"]
    assert "one in d is left out: GPU must be None, got NVIDIA H100" in result.stderr


# The bench itself.


def test_what_measured_nothing_says_what_it_lacks(tmp_path, capsys):
    for part in ("tests", "kernels"):
        options = BenchOptions(quick=True, out=tmp_path, part=part)
        with pytest.raises(
            MissingDependencyError, match=f"bench gpu --part {part}: must measure something, .*GPU"
        ):
            gpu.measure(options, SILENT)
        kept = json.loads((tmp_path / f"gpu_{part}.json").read_text())
        assert kept["figures"] == {} and set(kept["unmeasured"].values()) == {
            "needs an NVIDIA GPU (the device is cpu)"
        }
    assert "unmeasured tests: kernels: needs an NVIDIA GPU" in capsys.readouterr().out


def test_parts_that_measured_something_count_what_they_did_not(monkeypatch, capsys):
    outcome = Outcome({"gpu.a": Figure(1.0)}, {f"x{n}": "no time" for n in range(50)}, ["x3"])
    fakes = {"tests": lambda *_: Outcome(unmeasured={"y": "no"}), "clips": lambda *_: outcome}
    monkeypatch.setattr(gpu, "PARTS", fakes)
    figures = gpu.measure(BenchOptions(), SILENT)
    wanted = gpu.wanted_of("clips")
    missing = len(wanted) - 1  # that nothing failed is known
    assert missing > 4
    assert {name: figure.value for name, figure in figures.items()} == {
        "gpu.a": 1.0,
        "gpu.clips.unmeasured": 50 + missing,
        "gpu.clips.failed": 1,
    }
    assert f"and {10 + missing} more, all of them in gpu_clips.json" in capsys.readouterr().out
    assert set(outcome.unmeasured) >= {"gpu.animatediff.seconds_per_clip"}
    monkeypatch.setattr(gpu, "PARTS", {"tests": lambda *_: Outcome()})
    missing = len(gpu.wanted_of("tests")) - 1
    said = f"must measure something, {missing} unmeasured: what it is made of was not measured"
    with pytest.raises(WorkError, match=said):
        gpu.measure(BenchOptions(device="cuda"), SILENT)


def test_each_target_of_a_gpu_belongs_to_one_part():
    belonging = [name for part in gpu.PARTS for name in gpu.wanted_of(part)]
    assert len(set(belonging)) == len(belonging)
    assert {name for name in load_targets() if name.startswith("gpu.")} <= set(belonging)
    assert "kernels.failed" in belonging and "kernels.cpu_worst_ratio" not in belonging
    assert "kernels.frame_attention.cpu_speedup" not in belonging


def test_a_reason_that_is_known_stays(monkeypatch):
    outcome = Outcome({"gpu.agreement.disagreeing": Figure(0)})
    outcome.leave_out(["gpu.query_cost.one_target"], "no time")
    gpu.name_missing("controls", outcome, "cuda")
    assert outcome.unmeasured == {
        "gpu.query_cost.one_target": "no time",
        "gpu.query_cost.four_targets": "what it is made of was not measured",
        "gpu.agreement.not_compared": "what it is made of was not measured",
    }


@pytest.mark.usefixtures("lose_gpu")  # which answers
def test_a_ratio_to_the_best_says_which_way_was_not_timed(monkeypatch):
    steps = [Step("step", 1.0, lambda _: {"gpu.animatediff.eager.ratio_to_stock": Figure(1.2)})]
    stage = Stage("stage", 1.0, lambda: None, steps)
    monkeypatch.setattr(clips, "stages", lambda _: [stage])
    outcome = clips.measure_clips(BenchOptions(device="cuda"), Budget(60.0), SILENT)
    assert outcome.unmeasured.pop("gpu.animatediff.ratio_to_stock_best") == (
        "needs all stock ways, stock_cudnn, stock_compiled was not timed"
    )
    assert set(outcome.unmeasured) == set(clips.ELSEWHERE)


CUT_OFF = """
import sys, time
from pathlib import Path
from kinetiq.bench import command, gpu
from kinetiq.bench.figures import Figure
from kinetiq.bench.harness import Registry
from kinetiq.bench.steps import Stage, Step, run_stages

def measure(options, budget, progress, keep):
    steps = [
        Step("quick", 0.1, lambda _: {"gpu.agreement.disagreeing": Figure(0)}),
        Step("endless", 0.1, lambda _: time.sleep(60)),
        Step("after", 0.1, lambda _: {}),
    ]
    stage = Stage("stage", 0.1, lambda: None, steps, gpu=False)
    return run_stages([stage], options.device, budget, progress, "fake", keep)

gpu.PARTS = {"controls": measure}
gpu._GRACE = 0.5
words = ["gpu", "--part", "controls", "--device", "cpu", "--seconds", "1", "--no-record"]
command.bench([*words, "--out", sys.argv[1]])
"""


def test_a_measurement_that_does_not_end_takes_nothing_along(tmp_path, invoke):
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-P", "-c", CUT_OFF, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 1 and time.perf_counter() - began < 50
    assert "endless: it did not end, and the run was stopped 2 s" in done.stderr
    kept = json.loads((tmp_path / "gpu_controls.json").read_text())
    assert kept["failed"] == ["endless"] and list(kept["figures"]) == ["gpu.agreement.disagreeing"]
    assert kept["unmeasured"]["after"] == "the run was stopped before"
    assert "gpu.query_cost.one_target" in kept["unmeasured"]
    record = joining.merge_folders("gpu", [tmp_path])  # as `--merge` reads it
    assert record.figures == {
        "gpu.agreement.disagreeing": 0,
        "gpu.controls.unmeasured": len(kept["unmeasured"]),
        "gpu.controls.failed": 1,
    }
    assert record.missed == ["gpu.controls.failed"] and "--seconds 1" in record.command


def test_targets_are_of_figures_that_parts_have():
    names = {name for name in load_targets() if name.startswith("gpu.")}
    known = {f"gpu.{part}.failed" for part in ("kernels", "clips", "controls")}
    known |= {f"{selection.stem}.failed" for selection in device_tests.SELECTIONS}
    known |= {f"gpu.{case.name}" for case in control_costs.CASES}
    known |= {f"gpu.agreement.{word}" for word in ("disagreeing", "not_compared", "untold")}
    known |= {f"{selection.stem}.not_run" for selection in device_tests.SELECTIONS}
    known.add("gpu.animatediff.compiled.same_bits")
    for model in (models.ANIMATEDIFF, models.ZEROSCOPE):
        for dtype in (torch.float16, torch.bfloat16):
            stem = clips.stem_of(model, dtype)
            known |= {
                f"{stem}.{w}" for w in ("seconds_per_clip", "ratio_to_stock_best", "same_bits")
            }
    known.add("gpu.embedded.same_bits")
    assert names <= known


@pytest.fixture(scope="module")
def agreement():
    return control_costs.build_agreement("cuda", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", control_costs.COMPARED)
def test_the_engine_on_a_gpu_agrees_with_the_one_on_a_cpu(agreement, name):
    control_costs.agree(agreement, name=name)
    assert name in agreement.compared and name not in agreement.disagreeing


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name",
    [
        "query",  # two plans; each takes a while to compile
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("motion", "embedding", "lora")),
        pytest.param("lora_with_highway", marks=pytest.mark.slow),
    ],
)
def test_compiled_on_a_gpu_agrees_with_the_one_on_a_cpu(agreement, name):
    """With CUDA graphs, in float32, twice the same bits."""
    case = control_costs.COMPARED[name]
    wanted = control_costs._latents(agreement.trusted[torch.float32], case)
    with models.compiled(agreement.tested[torch.float32]) as faster:
        got, again = (control_costs._latents(faster, case) for _ in range(2))
    assert apart(got, wanted) <= 1e-4
    assert torch.equal(got, again)


@pytest.mark.gpu
def test_a_full_size_clip_on_a_gpu():
    bench = clips.build_full_size(models.ANIMATEDIFF, "cuda", torch.float16)
    short = replace(bench, steps=2)
    found = clips.against_usual(short)
    assert found["gpu.animatediff.fp16.eager.peak_memory"].value > 2
    assert clips.determinism(short)["gpu.animatediff.fp16.same_bits"].value == 1
