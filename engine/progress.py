"""Progress bars on a terminal's standard error; silence anywhere else."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from kinetiq.generation import Progress, no_progress

_BAR = 30  # columns of a full bar, where the terminal has room for them


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Yield a callback that draws one bar, of the stage under way; erased at the end of the block.

    Where standard error is not a terminal nothing is drawn, so that logs and pipes stay clean.
    """
    if not sys.stderr.isatty():
        yield no_progress
        return
    shown = 0

    def report(stage: str, done: int, total: int) -> None:
        nonlocal shown
        line = draw_bar(stage, done, total, shutil.get_terminal_size().columns)
        click.echo("\r" + line.ljust(shown), nl=False, err=True)
        shown = len(line)

    try:
        yield report
    finally:
        click.echo("\r" + " " * shown + "\r", nl=False, err=True)


def say_above_bar(line: str) -> None:
    """Write a line to standard error over the bar that may stand there; it is drawn again."""
    if sys.stderr.isatty():
        line = "\r" + line.ljust(shutil.get_terminal_size().columns - 1)
    click.echo(line, err=True)


def draw_bar(stage: str, done: int, total: int, columns: int) -> str:
    """One line that fits a terminal of so many columns, a narrow one without the bar."""
    label, count = f"{stage:<9} ", f" {done}/{total}"
    width = min(_BAR, columns - 1 - len(label) - len(count) - len("[]"))
    if width < 1:
        return (label + count.strip())[: columns - 1]
    filled = width * done // max(total, 1)
    return f"{label}[{'#' * filled}{'-' * (width - filled)}]{count}"
