"""What all groups of the command line share: whatever goes wrong is one line and an exit status.

Exit status 0: done; 1: the work failed; 2: bad input; 130: interrupted.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from kinetiq.errors import InputError, KinetiqError, KinetiqWarning
from kinetiq.generation import is_out_of_memory

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class PlainGroup(click.Group):
    """A group of commands that ends in one line and an exit status, whatever goes wrong."""

    def main(self, *args: Any, **settings: Any) -> NoReturn:
        """As click does, with one line for errors, and 130 for an interrupt."""
        settings["standalone_mode"] = False
        try:
            with _plain_warnings():
                status = super().main(*args, **settings) or 0
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            status = 0
        except click.UsageError as error:
            where = "kinetiq" if error.ctx is None else error.ctx.command_path
            say_error(f"{error.format_message()} (see {where} --help)", where)
            status = 2
        except click.Abort:
            say_error("interrupted")
            status = _INTERRUPTED
        except KinetiqError as error:
            say_error(str(error))
            status = 2 if isinstance(error, InputError) else 1
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not is_out_of_memory(error):
                raise
            say_error(f"memory must suffice, and does not: {error}")
            status = 1
        except OSError as error:
            say_error(f"the operating system refused: {error}")
            status = 1
        sys.exit(status)


def say_error(message: str, where: str = "kinetiq") -> None:
    """Say on standard error what went wrong, in one line whatever breaks the message holds."""
    click.echo(f"{where}: error: {' '.join(message.split())}", err=True)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Say our own warnings in one line; those of other packages only where they were asked for."""
    with warnings.catch_warnings():
        others = warnings.showwarning
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        warnings.simplefilter("always", KinetiqWarning)

        def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
            if issubclass(category, KinetiqWarning):
                click.echo(f"kinetiq: warning: {' '.join(str(message).split())}", err=True)
            else:
                others(message, category, *rest)

        warnings.showwarning = show  # type: ignore[assignment]  # `rest` stands for the others
        yield
