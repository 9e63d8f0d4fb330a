import sys
from types import SimpleNamespace

import pytest

from kinetiq.bench import harness
from kinetiq.bench.figures import Figure, Target
from kinetiq.bench.harness import Bench, BenchOptions, Progress, Registry, run_bench
from kinetiq.errors import MissingDependencyError, NonFiniteError, RequestError, WorkError

TARGETS = {
    "fake.good": Target("at_least", 0.5, "It should."),
    "fake.bad": Target("at_most", 0.5, "It should not."),
    "other.figure": Target("at_most", 0.5, "Not measured here."),
}


def run(measure, needs=(), options=None):
    return run_bench(
        Bench("fake", "a fake", measure, needs),
        options or BenchOptions(),
        targets=TARGETS,
        command="kinetiq bench fake",
        progress=Progress(),
    )


def test_a_run_becomes_a_record():
    figures = {"fake.good": Figure(0.7, 0.6, 0.8, n=9, unit="s"), "fake.bad": 0.6, "fake.free": 1}
    record = run(lambda *_: figures, options=BenchOptions(quick=True))
    assert record.figures == {"fake.good": 0.7, "fake.bad": 0.6, "fake.free": 1.0}
    assert record.targets == {"fake.good": {"at_least": 0.5}, "fake.bad": {"at_most": 0.5}}
    assert record.missed == ["fake.bad"]
    assert record.intervals == {"fake.good": [0.6, 0.8, 9]}
    assert record.units == {"fake.good": "s"}
    assert (record.bench, record.quick, record.command) == ("fake", True, "kinetiq bench fake")
    assert record.environment["device"] == "cpu"
    assert record.date.endswith("+00:00")


def test_n_alone_is_kept():
    record = run(lambda *_: {"fake.good": Figure(0.7, n=9)})
    assert record.intervals == {"fake.good": [None, None, 9]}


def test_a_bench_gets_its_options():
    options = BenchOptions(quick=True, seed=7)
    seen = []
    run(lambda given, _: seen.append(given) or {"fake.good": 1.0}, options=options)
    assert seen == [options]


def test_what_a_bench_prints_goes_to_standard_error(capsys):
    run(lambda *_: print("chatter") or {"fake.good": 1.0})
    assert capsys.readouterr() == ("", "chatter\n")


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({}, "bench fake: must return at least one figure, got none"),
        ({"good": 1.0}, 'InputError .* lower-case words joined by dots.* got "good"'),
        ({"fake.good": "much"}, "must finish, got ValueError"),
    ],
)
def test_says_what_is_wrong_with_figures(figures, message):
    with pytest.raises(WorkError, match=message):
        run(lambda *_: figures)


def test_a_figure_that_is_not_finite_is_named():
    with pytest.raises(NonFiniteError, match=r"bench fake: fake\.good must be finite, got nan"):
        run(lambda *_: {"fake.good": float("nan")})


def test_a_bench_that_breaks_says_where():
    message = r"bench fake: must finish, got KeyError \(test_harness\.py, line \d+\): 'lost'"
    with pytest.raises(WorkError, match=message):
        run(lambda *_: {}["lost"])


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (("gpu",), r"needs an NVIDIA GPU \(the device is cpu\)$"),
        (("no_such_package", "gpu"), "needs the package no_such_package and an NVIDIA GPU"),
    ],
)
def test_an_unmet_need_stops_a_bench_before_it_runs(needs, message):
    with pytest.raises(MissingDependencyError, match=f"bench fake: {message}"):
        run(lambda *_: pytest.fail("it ran"), needs)


def test_met_needs_do_not():
    bench = Bench("fake", "a fake", lambda *_: {}, ("gpu", "torch"))
    assert harness.unmet_needs(bench, "cuda:0") == []


def test_a_registry_imports_what_it_is_asked_for(monkeypatch):
    bench = Bench("fake", "a fake", lambda *_: {})
    monkeypatch.setitem(sys.modules, "fake_bench", SimpleNamespace(BENCH=bench))
    assert Registry({"broken": "no.such", "fake": "fake_bench"}).load("fake") is bench


def test_says_what_is_wrong_with_a_bench(monkeypatch):
    bench = Bench("fake", "a fake", lambda *_: {})
    monkeypatch.setitem(sys.modules, "fake_bench", SimpleNamespace(BENCH=bench))
    registry = Registry({"other": "fake_bench", "empty": "json", "broken": "no_such_module"})
    with pytest.raises(WorkError, match='fake_bench must expose BENCH with name="other"'):
        registry.load("other")
    with pytest.raises(WorkError, match='bench empty: json must expose BENCH with name="empty"'):
        registry.load("empty")
    with pytest.raises(WorkError, match="no_such_module must be importable, got: No module"):
        registry.load("broken")
    with pytest.raises(RequestError, match='must be one of other, empty, broken, got "no"'):
        registry.load("no")


def test_every_packaged_bench_has_a_module_of_its_name():
    assert harness.BENCHES.modules == {
        name: f"kinetiq.bench.{name}" for name in harness.BENCHES.modules
    }


@pytest.mark.parametrize("count", [0, 2])
def test_the_device_is_a_gpu_where_there_is_one(monkeypatch, count):
    monkeypatch.setattr(harness.torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(harness.torch.cuda, "device_count", lambda: count)
    assert harness.choose_device(None) == ("cuda" if count else "cpu")
    assert harness.choose_device("cpu") == "cpu"
    with pytest.raises(
        MissingDependencyError, match="device: .*GPU.*" if count else "'cuda:2' needs"
    ):
        harness.choose_device("cuda:2")
    if count:
        assert harness.choose_device("cuda:1") == "cuda:1"


@pytest.mark.parametrize("asked", ["gpu", "", "mps", "cuda:x", "cuda:-1"])
def test_an_unknown_device_is_refused(asked):
    with pytest.raises(RequestError, match=f"device: must be 'cpu', .*, got '{asked}'"):
        harness.choose_device(asked)


def test_progress_hands_on_every_item_and_is_silent_when_hidden(capsys):
    assert list(Progress().track(iter("abc"), "fake", total=3)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_visible_progress_is_on_standard_error(capsys):
    assert list(Progress(visible=True).track([1, 2], "fake")) == [1, 2]
    out, err = capsys.readouterr()
    assert out == "" and "fake" in err
