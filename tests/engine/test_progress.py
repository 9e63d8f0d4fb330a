import io
from contextlib import redirect_stderr

import pytest

from kinetiq.progress import draw_bar, progress_bars, say_above_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def seen(text: str) -> str:
    """What is left on a line after all carriage returns."""
    line: list[str] = []
    for part in text.split("\r"):
        line[: len(part)] = part
    return "".join(line)


def test_draws_one_line_and_erases_it():
    with redirect_stderr(Terminal()) as terminal:
        with progress_bars() as progress:
            progress("denoising", 9, 10)
            assert seen(terminal.getvalue()) == f"denoising [{'#' * 27}---] 9/10"
            progress("load", 1, 2)
            assert seen(terminal.getvalue()).rstrip() == f"load      [{'#' * 15}{'-' * 15}] 1/2"
        assert seen(terminal.getvalue()).strip() == ""
        assert terminal.getvalue().endswith("\r") and "\n" not in terminal.getvalue()


def test_the_line_is_free_again_when_the_work_fails():
    def fail() -> None:
        with progress_bars() as progress:
            progress("denoising", 1, 10)
            raise ValueError

    with redirect_stderr(Terminal()) as terminal, pytest.raises(ValueError, match=r"^$"):
        fail()
    assert "denoising" in terminal.getvalue() and seen(terminal.getvalue()).strip() == ""


def test_silent_where_standard_error_is_no_terminal(capsys):
    with progress_bars() as progress:
        progress("denoising", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_a_line_takes_the_place_of_the_bar_that_is_drawn_again_below():
    with redirect_stderr(Terminal()) as terminal, progress_bars() as progress:
        progress("denoiser", 1, 2)
        say_above_bar("step 1: loss 0.5")
        progress("denoiser", 2, 2)
        above, below = terminal.getvalue().split("\n")
        assert seen(above).rstrip() == "step 1: loss 0.5"
        assert seen(below).rstrip() == f"denoiser  [{'#' * 30}] 2/2"


def test_a_line_goes_as_it_is_where_there_is_no_terminal(capsys):
    say_above_bar("step 1: loss 0.5")
    assert capsys.readouterr() == ("", "step 1: loss 0.5\n")


@pytest.mark.parametrize("columns", [1, 12, 19, 20, 40, 200])
def test_fits_the_terminal(columns):
    lines = [draw_bar("denoising", done, 1000, columns) for done in (0, 500, 1000)]
    assert max(map(len, lines)) < max(columns, 1)
    assert columns < 20 or all(line.startswith("denoising ") for line in lines)


@pytest.mark.parametrize(("done", "full"), [(0, 0), (1, 0), (500, 15), (999, 29), (1000, 30)])
def test_a_bar_is_full_only_at_the_end(done, full):
    assert draw_bar("denoising", done, 1000, 80).count("#") == full


def test_nothing_to_do_is_no_error():
    assert draw_bar("decoding", 0, 0, 80) == f"decoding  [{'-' * 30}] 0/0"
