"""What is skipped is counted: cases of backends that are not here, and of modules that are skipped as a whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from skipped import cases_written_in, hidden_by_backend
from targets import Targets, on_gpu

import slowfast_kernels as sk

WRITTEN = """
import pytest

pytest.importorskip("nothing_of_that_name")

@pytest.mark.parametrize("a", [1, 2, 3])
@pytest.mark.parametrize(("b", "c"), [(1, 2), (3, 4)])
@pytest.mark.parametrize("d", ELSEWHERE)
def test_many(a, b, c, d): ...

@pytest.mark.slow
def test_one(): ...

def helper(): ...
"""


def collected(targets, count: int) -> list:
    """``count`` cases of each of the targets that are here."""
    mark = pytest.mark.parametrize("target", targets)
    return [SimpleNamespace(iter_markers=lambda name: [mark.mark]) for _ in range(count * len(targets))]


def test_a_backend_that_is_not_here_hides_as_many_cases_as_it_would_have():
    two_lack_three, all_here = Targets(["eager", "cpu"], {"cuda": 3}), Targets(["eager"], {})
    items = [*collected(two_lack_three, 7), *collected(all_here, 5), *collected(["plain list"], 5)]
    assert hidden_by_backend(items) == {"cuda": 21}


def test_a_list_without_a_backend_does_not_count_it():
    assert Targets([], {"cuda": 1, "triton": 2}).without("cuda").left_out == {"triton": 2}


def test_cases_of_a_file_are_its_tests_times_the_lists_written_in_it(tmp_path):
    file = tmp_path / "test_written.py"
    file.write_text(WRITTEN)
    assert cases_written_in(file) == 3 * 2 + 1


def test_a_module_that_is_skipped_says_how_many_cases_that_hides(tmp_path):
    for name in ("conftest.py", "skipped.py"):
        shutil.copy(Path(__file__).with_name(name), tmp_path)
    (tmp_path / "test_written.py").write_text(WRITTEN)
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "test_written.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "could not import 'nothing_of_that_name'" in done.stdout
    assert "; hides 7 cases or more" in done.stdout


def test_a_gpu_s_cases_are_skipped_one_by_one_where_a_backend_is_not_here():
    for param in on_gpu():
        skipped = [mark.name for mark in param.marks]
        assert skipped == ([] if sk.backends()[param.values[0].backend] else ["skip"])
