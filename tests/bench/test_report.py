from dataclasses import replace

import pytest

from kinetiq.bench.environment import PAGES, find_checkout
from kinetiq.bench.figures import Target
from kinetiq.bench.records import Record, read_folder
from kinetiq.bench.report import compare, render_comparison, render_page, render_result
from kinetiq.errors import InputError

RECORD = Record(
    bench="query",
    figures={"query.fidelity": 0.8734, "query.leak": 0.2, "query.seconds": 2.5},
    targets={"query.fidelity": {"at_least": 0.5}, "query.leak": {"at_most": 0.1}},
    missed=["query.leak"],
    environment={
        "commit": "0123456789abcdef",
        "dirty": False,
        "machine": {"cpu": "Fast CPU", "cores": 2, "ram": 8 * 2**30, "gpu": None},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
    },
    intervals={"query.fidelity": [0.84, 0.905, 64]},
    quick=False,
    seconds=61.23,
    command="kinetiq bench query",
    date="2025-01-02T23:04:05+00:00",
    units={"query.seconds": "s"},
)
TARGETS = {
    "query.fidelity": Target("at_least", 0.5, "It follows."),
    "query.leak": Target("at_most", 0.1, "It must not show."),
}
DRAWN = """\
# Title
<!-- figures: query -->

| figure | value | target | command |
| --- | --- | --- | --- |
| `query.fidelity` | 0.873 (0.84 to 0.905, n = 64) | at least 0.5 | `kinetiq bench query` |
| `query.leak` | 0.2 | at most 0.1 (missed) | `kinetiq bench query` |
| `query.seconds` | 2.5 s | - | `kinetiq bench query` |

Measured at commit 0123456789 on 2025-01-02: Fast CPU, 2 cores, 8 GiB, python 3.11.7, torch 2.13.0.

<!-- /figures -->
After.
"""


def readme(mark="query", between="old\ntext\n"):
    return f"# Title\n<!-- figures: {mark} -->\n{between}<!-- /figures -->\nAfter.\n"


def test_a_block_is_replaced_and_all_else_is_kept():
    assert render_page(readme(), [RECORD]) == DRAWN


def test_drawing_again_changes_nothing():
    assert render_page(DRAWN, [RECORD]) == DRAWN


def test_a_text_without_blocks_is_itself():
    text = "no blocks\r\n\n| a | b |  \nno newline at the end"
    assert render_page(text, []) == text


def test_a_block_may_name_its_figures():
    drawn = render_page(readme("query query.seconds query.fidelity"), [RECORD])
    assert "query.leak" not in drawn
    assert drawn.index("`query.seconds`") < drawn.index("`query.fidelity`")


def test_each_block_has_its_own_bench():
    other = replace(RECORD, bench="cost", figures={"cost.x": 1.0}, targets={}, missed=[])
    drawn = render_page(readme("cost") + readme(), [RECORD, other])
    assert drawn.endswith(DRAWN)
    assert drawn.count("cost.x") == 1


def test_the_newest_full_record_is_drawn():
    quick = replace(RECORD, quick=True, figures={"query.fidelity": 0.1}, date="2026-01-01T00:00Z")
    older = replace(RECORD, figures={"query.fidelity": 0.2}, date="2024-01-01T00:00+00:00")
    assert render_page(readme(), [RECORD, quick, older]) == DRAWN


@pytest.mark.parametrize(
    ("commit", "dirty", "text"),
    [
        ("0123456789abcdef", True, "Measured at commit 0123456789 with local changes on"),
        (None, None, "Measured at no commit on"),
    ],
)
def test_the_footnote_says_what_was_measured(commit, dirty, text):
    record = replace(RECORD, environment=RECORD.environment | {"commit": commit, "dirty": dirty})
    assert text in render_page(readme(), [record])


def test_the_footnote_names_the_gpu():
    machine = RECORD.environment["machine"] | {"gpu": "H200"}
    record = replace(RECORD, environment=RECORD.environment | {"machine": machine})
    assert "8 GiB, H200, python" in render_page(readme(), [record])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (readme("cost"), 'line 2: bench "cost" must have .* full run.*run `kinetiq bench cost`'),
        (readme("query query.x"), 'line 2: a figure must be one of .*query.leak.*got "query.x"'),
        ("a\n<!-- figures: query -->\n", "line 2: the block of figures must be closed"),
        ("a\n\n<!-- /figures -->\n", "line 3: a block of figures must be open here"),
        (
            "<!-- figures: query -->\n<!-- figures: query -->\n<!-- /figures -->",
            "line 2: the block of line 1 must be closed first",
        ),
        ("<!-- figures query -->\n<!-- /figures -->", "line 1: a mark must be .*got '<!-- figures"),
        ("text <!-- figures: query -->", "line 1: a mark must be .*alone on its line"),
        ("<!-- figures: -->", "line 1: a mark must be "),
        ("<!-- / figures -->", "line 1: a mark must be "),
    ],
)
def test_says_which_mark_is_wrong(text, message):
    with pytest.raises(InputError, match=f"README.md {message}"):
        render_page(text, [RECORD])


def test_a_quick_record_alone_does_not_fill_a_block():
    with pytest.raises(InputError, match='bench "query" must have a record of a full run'):
        render_page(readme(), [replace(RECORD, quick=True)])


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_drawn_from_the_records(page):
    root = find_checkout()
    text = (root / page).read_text(encoding="utf-8")
    assert "<!-- figures: " in text
    assert render_page(text, read_folder(root / "bench" / "results")) == text


def test_a_result_is_a_table_with_reasons():
    assert render_result(RECORD, TARGETS).splitlines() == [
        "query",
        "figure          value                          target",
        "query.fidelity  0.873 (0.84 to 0.905, n = 64)  at least 0.5  kept",
        "query.leak      0.2                            at most 0.1   missed",
        "query.seconds   2.5 s",
        "missed query.leak: must be at most 0.1, got 0.2. It must not show.",
        "measured in 61.2 s",
    ]


def test_a_near_miss_is_shown_in_enough_digits():
    record = replace(RECORD, figures={"query.leak": 0.10001}, intervals={}, units={})
    assert "must be at most 0.1, got 0.10001." in render_result(record, TARGETS)


def test_a_quick_result_says_so():
    assert render_result(replace(RECORD, quick=True), TARGETS).startswith("query (quick)\n")


def pair(before, after, before_interval=None, after_interval=None):
    """Records of one figure on both sides."""
    sides = ((before, before_interval), (after, after_interval))
    return [
        replace(
            RECORD,
            figures={} if value is None else {"query.x": value},
            intervals={"query.x": [*interval, 9]} if interval else {},
            units={},
        )
        for value, interval in sides
    ]


def test_compare_divides_after_by_before():
    first, second = pair(2.0, 3.0)
    (only,) = compare([first], [second])
    assert (only.ratio, only.low, only.high, only.within_noise) == (1.5, None, None, None)


def test_compare_bounds_the_ratio_by_both_intervals():
    first, second = pair(2.0, 3.0, (1.6, 2.5), (2.0, 4.0))
    (only,) = compare([first], [second])
    assert (only.low, only.high) == (2.0 / 2.5, 4.0 / 1.6)
    assert only.within_noise is True


@pytest.mark.parametrize(("low", "noise"), [(2.5, True), (2.51, False)])
def test_noise_is_where_intervals_overlap(low, noise):
    first, second = pair(2.0, 3.0, (1.6, 2.5), (low, 4.0))
    assert compare([first], [second])[0].within_noise is noise
    assert compare([second], [first])[0].within_noise is noise


@pytest.mark.parametrize(("before", "after"), [(0.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (None, 1.0)])
def test_there_is_no_ratio_where_it_means_nothing(before, after):
    (only,) = compare([pair(before, after)[0]], [pair(before, after)[1]])
    assert (only.before, only.after, only.ratio) == (before, after, None)


def test_an_interval_that_touches_zero_bounds_no_ratio():
    first, second = pair(2.0, 3.0, (0.0, 2.5), (2.0, 4.0))
    (only,) = compare([first], [second])
    assert (only.ratio, only.low, only.high, only.within_noise) == (1.5, None, None, True)


def test_quick_and_full_runs_are_not_compared():
    quick = replace(RECORD, quick=True)
    with pytest.raises(InputError, match=r"the same bench.*got query and query \(quick\)"):
        compare([RECORD], [quick])
    with pytest.raises(InputError, match=r"got no record and query$"):
        compare([], [RECORD])
    assert {c.quick for c in compare([RECORD, quick], [quick, RECORD])} == {True, False}


def test_a_comparison_is_a_table():
    first, second = pair(2.0, 3.0, (1.6, 2.5), (2.0, 4.0))
    lines = render_comparison(compare([first], [second])).splitlines()
    assert lines[0].split("  ")[0] == "bench"
    assert lines[1].split() == [
        *("query", "query.x", "2", "3"),
        *("1.5", "(0.8", "to", "2.5)", "within", "noise"),
    ]


def test_a_figure_of_one_side_has_dashes():
    first, second = pair(None, 3.0)
    lines = render_comparison(compare([first], [second])).splitlines()
    assert lines[1].split() == ["query", "query.x", "-", "3", "-"]
