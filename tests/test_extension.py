"""The report's sentences about what keeps a part from running: the extension, a version, a neighbour's version."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import slowfast_kernels as sk
from slowfast_kernels import _extension

OURS = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the package as a fresh clone has it: without an extension."""
    folder = tmp_path / "checkout" / "slowfast_kernels"
    shutil.copytree(Path(sk.__file__).parent, folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def cpu_line(folder: Path, **environment: str) -> str:
    """What the report says of the cpu backend to someone who starts Python in ``folder``."""
    command = [sys.executable, "-m", "slowfast_kernels"]
    environment = os.environ | {"PYTHONPATH": ""} | environment
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return next(line for line in done.stdout.splitlines() if line.startswith("  cpu "))


def test_in_a_checkout_beside_an_installed_copy_the_report_says_which_is_imported_and_which_has_the_extension(
    checkout, tmp_path
):
    installed = tmp_path / "site" / "slowfast_kernels"
    shutil.copytree(checkout, installed)
    (installed / OURS).touch()
    said = cpu_line(checkout.parent, PYTHONPATH=str(installed.parent))
    assert f"not in the package that is imported, {checkout}" in said
    assert f"the copy in {installed} has it" in said
    assert f"start Python outside {checkout.parent}" in said
    assert "`pip install -e .` in the checkout" in said  # without -e it would be built for the other copy again


def test_an_extension_for_another_python_is_named(checkout):
    (checkout / "_C.cpython-38-other.so").touch()
    said = cpu_line(checkout.parent)
    assert f"_C.cpython-38-other.so there is for another Python than this one, which looks for {OURS}" in said
    assert "pip install" in said


def test_an_extension_that_does_not_load_is_named_with_the_cause(checkout):
    (checkout / OURS).write_bytes(b"not a library")
    assert f"the extension {checkout / OURS} does not load (" in cpu_line(checkout.parent)


def test_an_extension_of_another_version_is_not_used(monkeypatch):
    monkeypatch.setattr(sk, "__version__", "9.9.9")
    module, why = _extension._load.__wrapped__()
    assert module is None
    assert "the package beside it of 9.9.9" in why


@pytest.mark.parametrize(
    ("name", "version", "oldest", "said"),
    [
        ("torch", "2.5.1+cu124", (2, 6), "torch 2.5.1+cu124 is too old, want 2.6 or newer: pip install"),
        ("torch", "2.13.0a0+git1234", (2, 6), ""),
        ("triton", "3.1.0", (3, 2), "triton 3.1.0 is too old, want 3.2 or newer: pip install"),
        ("triton", "3.2.0", (3, 2), ""),
    ],
)
def test_versions_are_compared_as_numbers(name, version, oldest, said):
    found = _extension._too_old(name, version, oldest)
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_a_torch_that_is_too_old_is_one_sentence_at_import():
    code = "import torch; torch.__version__ = '2.5.1'; import slowfast_kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: torch 2.5.1 is too old, want 2.6 or newer" in done.stderr


@pytest.mark.parametrize(
    ("versions", "runs"),
    [
        ({"triton": "3.5.1", "numpy": "2.4.6"}, False),
        ({"triton": "3.5.1", "numpy": "2.3.5"}, True),
        ({"triton": "3.7.0", "numpy": "2.4.6"}, True),
    ],
)
def test_an_interpreter_that_does_not_work_with_numpy_is_refused(monkeypatch, versions, runs):
    pytest.importorskip("triton")
    monkeypatch.setattr(_extension, "_version_of", versions.get)
    said = _extension._reason.__wrapped__("triton", "cpu", -1, True)
    assert said is None if runs else "install numpy<2.4 or triton>=3.7" in said


def test_a_backend_that_is_on_the_list_alone_is_refused(monkeypatch):
    monkeypatch.setattr(_extension, "BACKENDS", (*_extension.BACKENDS, "metal"))
    with pytest.raises(ValueError, match="metal"):
        _extension.unavailable_reason("metal", torch.device("cpu"))
    with pytest.raises(ValueError, match="metal"):
        _extension.capabilities()


def test_the_host_calls_no_function_of_the_gpu_s():
    """What nvcc leaves of one for the host ends the process, and nvcc does not always say that the host calls it."""
    from slowfast_kernels import _C

    command = ["nm", "--dynamic", "--undefined-only", _C.__file__]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not any(name.partition("@")[0] == "exit" for name in symbols)
