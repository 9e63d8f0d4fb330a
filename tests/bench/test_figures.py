import json
import math

import numpy as np
import pytest

from kinetiq.bench.figures import (
    Figure,
    Target,
    format_figure,
    format_number,
    load_targets,
    missed_targets,
)
from kinetiq.errors import InputError, NonFiniteError

AT_LEAST, AT_MOST = Target("at_least", 0.5, "Why."), Target("at_most", 0.5, "Why.")


def write(tmp_path, entries):
    path = tmp_path / "targets.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return path


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.87349, "0.873"),
        (-0.87351, "-0.874"),
        (0.5, "0.5"),
        (12.345, "12.3"),
        (999.6, "1,000"),
        (12345.0, "12,300"),
        (8e9, "8e+09"),
        (0.000012345, "1.23e-05"),
    ],
)
def test_numbers_have_three_significant_digits(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Figure(0.8734), "0.873"),
        (Figure(0.8734, 0.84, 0.905), "0.873 (0.84 to 0.905)"),
        (Figure(0.8734, n=64), "0.873 (n = 64)"),
        (Figure(2.1, 1.9, 2.3, n=20, unit="s"), "2.1 s (1.9 to 2.3, n = 20)"),
        (Figure(0.0, 0.0, 0.0, n=1), "0 (0 to 0, n = 1)"),
    ],
)
def test_figures_show_their_interval_n_and_unit(figure, text):
    assert format_figure(figure) == text


@pytest.mark.parametrize("field", ["value", "low", "high"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_figure_is_finite(field, bad):
    numbers = {"value": 0.0, "low": -1.0, "high": 1.0, field: bad}
    with pytest.raises(NonFiniteError, match=f"figure: {field} must be finite, got {bad}"):
        Figure(**numbers)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"low": 0.1}, "low and high must be given together, got 0.1 and None"),
        ({"high": 0.1}, "low and high must be given together, got None and 0.1"),
        ({"low": 0.2, "high": 0.1}, "low must be at most high, got 0.2 and 0.1"),
        ({"n": 0}, "n must be at least 1, got 0"),
    ],
)
def test_an_interval_has_two_ends_and_n_counts(fields, message):
    with pytest.raises(InputError, match=message):
        Figure(0.15, **fields)


def test_a_numpy_number_becomes_a_float():
    """json refuses NumPy's float32."""
    figure = Figure(np.float32(0.5), np.float32(0.25), np.float32(0.75))
    assert [type(x) for x in (figure.value, figure.low, figure.high)] == [float] * 3


@pytest.mark.parametrize(
    ("target", "value", "missed"),
    [
        (AT_LEAST, 0.5, False),
        (AT_LEAST, 0.4999999, True),
        (AT_LEAST, 0.6, False),
        (AT_MOST, 0.5, False),
        (AT_MOST, 0.5000001, True),
        (AT_MOST, 0.4, False),
    ],
)
def test_a_figure_that_equals_its_bound_keeps_it(target, value, missed):
    assert target.is_missed_by(value) is missed


def test_missed_targets_ignore_figures_without_one():
    figures = {"a.low": 0.1, "a.free": -9.0, "a.high": 0.9}
    targets = {"a.low": AT_LEAST, "a.high": AT_MOST, "a.unmeasured": AT_LEAST}
    assert missed_targets(figures, targets) == ["a.low", "a.high"]


def test_the_packaged_targets_load():
    targets = load_targets()
    assert targets["query_cost.one_target"].kind == "at_most"
    assert targets["query_cost.one_target"].bound == 1.22
    assert targets["query.motion_fidelity"].kind == "at_least"
    assert all(target.why.endswith(".") for target in targets.values())


def test_targets_are_read(tmp_path):
    path = write(tmp_path, {"a.b": {"at_most": 3, "why": "Because."}})
    assert load_targets(path) == {"a.b": Target("at_most", 3.0, "Because.")}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"Query": {"at_most": 1, "why": "w"}}, 'must be lower-case words joined by dots.*"Query"'),
        ({"query": {"at_most": 1, "why": "w"}}, 'must be lower-case words joined by dots.*"query"'),
        ({"a.b": {"at_msot": 1, "why": "w"}}, r'target "a.b": keys must be .* got \[\'at_msot\'\]'),
        ({"a.b": {"at_most": 1, "why": "w", "n": 1}}, r"keys must be .* got \['n'\]"),
        ({"a.b": {"why": "w"}}, r"must have one of at_least and at_most, got \[\]"),
        ({"a.b": {"at_most": 1, "at_least": 0, "why": "w"}}, "must have one of .* got .*at_least"),
        ({"a.b": {"at_most": "1", "why": "w"}}, "at_most must be a finite number, got '1'"),
        ({"a.b": {"at_most": True, "why": "w"}}, "at_most must be a finite number, got True"),
        ('{"a.b": {"at_most": NaN, "why": "w"}}', "at_most must be a finite number, got nan"),
        ({"a.b": {"at_most": 1}}, "why must be a sentence, got None"),
        ({"a.b": {"at_most": 1, "why": " "}}, "why must be a sentence, got ' '"),
        ({"a.b": 1}, 'target "a.b": must be a JSON object, got int'),
        ([], "must hold one JSON object, got list"),
        ("{", "must be a JSON file of targets, got: "),
        ('{"a.b": {"at_most": 1, "why": "w"}, "a.b": {}}', '"a.b" is given twice'),
    ],
)
def test_says_what_is_wrong_with_targets(tmp_path, entries, message):
    with pytest.raises(InputError, match=message):
        load_targets(write(tmp_path, entries))


def test_says_that_a_file_of_targets_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: must be a JSON file of targets"):
        load_targets(tmp_path / "none.json")
