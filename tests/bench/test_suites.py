"""The benchmark suites run; their times are taken with `--benchmark-enable`."""

import subprocess
import sys

import link


def test_every_suite_runs():
    # In a process of its own: collecting the suites imports their folder under the name `bench`.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/suites"],
        check=False,
        cwd=link.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "17 passed" in done.stdout
