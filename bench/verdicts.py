"""A plugin of pytest that writes each test's verdict to a file as soon as it is known.

`pytest -p kinetiq.bench.verdicts --verdicts=FILE` writes one JSON object a line: first the tests
that were collected, then what became of each. So a run that is killed has left its part, and what
it did not come to can be named.
"""

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: Any) -> None:
    """Add `--verdicts`."""
    parser.addoption("--verdicts", metavar="FILE", help="write verdicts, one a line")


def pytest_configure(config: Any) -> None:
    """Begin to write, if asked to."""
    path = config.getoption("verdicts")
    if path and not hasattr(config, "workerinput"):  # workers of xdist report to who writes
        config.pluginmanager.register(Verdicts(Path(path)), "kinetiq-verdicts")


class Verdicts:
    """Writes verdicts to a file, which begins empty."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", buffering=1)  # each line is out at once
        self._collected = False

    def pytest_collection_finish(self, session: Any) -> None:
        """Say which tests will run."""
        self._say_collected([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Say which tests will run, once: all workers collect the same."""
        self._say_collected(ids)

    def pytest_collectreport(self, report: Any) -> None:
        """Say what could not be collected."""
        if report.failed:
            self._write(test=report.nodeid, outcome="failed", why=_why(report))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Say what became of a test: of its body, and of what is around it if that is not well."""
        if report.when == "call" or report.outcome != "passed":
            self._write(test=report.nodeid, outcome=report.outcome, why=_why(report))

    def pytest_unconfigure(self) -> None:
        """Close the file."""
        self._file.close()

    def _say_collected(self, tests: list[str]) -> None:
        if tests and not self._collected:
            self._write(collected=tests)
            self._collected = True

    def _write(self, **entry: object) -> None:
        self._file.write(json.dumps(entry) + "\n")


def _why(report: Any) -> str:
    """The reason of a skip, or the line at which a failure ends; empty for a passed test."""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return str(crash.message).strip().partition("\n")[0]
    text = "" if report.outcome == "passed" else report.longreprtext
    return text.strip().rpartition("\n")[2]
