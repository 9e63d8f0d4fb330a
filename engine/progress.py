"""Progress bars on a terminal's standard error; silence anywhere else."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from kinetiq.generation import Progress


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Yield a callback that draws one bar a stage, and erases it at the end of the block."""
    if not sys.stderr.isatty():
        yield lambda _stage, _done, _total: None
        return
    shown = ""

    def report(stage: str, done: int, total: int) -> None:
        nonlocal shown
        filled = round(30 * done / max(total, 1))
        line = f"{stage:<10} [{'#' * filled}{'-' * (30 - filled)}] {done}/{total}"
        click.echo("\r" + line + " " * max(len(shown) - len(line), 0), nl=False, err=True)
        shown = line

    try:
        yield report
    finally:
        click.echo("\r" + " " * len(shown) + "\r", nl=False, err=True)
