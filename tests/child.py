"""Runs a part of this suite in a process of its own, for settings that are read once at import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def run_tests(files: list[str], at_least: int, backend: str, **environment: str) -> None:
    """The tests of ``backend`` in ``files`` pass; there are at least so many of them and none is skipped."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    variables |= {"SLOWFAST_TEST_BACKENDS": backend, "OMP_NUM_THREADS": "1", **environment}
    paths = [str(TESTS / name) for name in files]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"{backend}-", *paths]
    done = subprocess.run(command, env=variables, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    summary = done.stdout.splitlines()[-1]
    assert int(re.search(r"(\d+) passed", summary)[1]) >= at_least, summary
    assert "skipped" not in summary, done.stdout[-4000:]
