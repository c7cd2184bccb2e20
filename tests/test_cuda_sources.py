"""Every CUDA source compiles for the architectures it is built for, and its kernels keep their registers.

No GPU is needed, only nvcc. What ptxas says of a file is kept in pytest's cache until a source or nvcc changes.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-O3,-v", f"-I{CSRC}"]
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")

pytestmark = pytest.mark.slow


def builds() -> list[tuple[str, str]]:
    """(source, architecture) as setup.py pairs them: files named sm90 use instructions of sm_90a alone."""
    sources = sorted((CSRC / "cuda").rglob("*.cu"))
    return [(str(s.relative_to(CSRC)), a) for s in sources for a in ("80", "90a") if a == "90a" or "sm90" not in s.name]


@lru_cache(maxsize=1)
def compiler() -> tuple[str, str]:
    """nvcc and its version, or skip."""
    folders = [os.environ.get("PATH", "")]
    folders += [str(Path(home) / "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        pytest.skip("nvcc is not on PATH, in $CUDA_HOME/bin or in /usr/local/cuda/bin")
    return nvcc, subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout


@lru_cache(maxsize=1)
def sources_digest() -> str:
    digest = hashlib.sha256()
    for path in [CSRC / "params.h", *sorted((CSRC / "cuda").rglob("*"))]:
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


@pytest.fixture(params=builds(), ids=lambda build: f"{build[0]}-sm_{build[1]}")
def ptxas_report(request, tmp_path) -> str:
    """What nvcc prints when it compiles one file for one architecture."""
    source, arch = request.param
    nvcc, version = compiler()
    key = hashlib.sha256("".join([source, arch, *FLAGS, version, sources_digest()]).encode()).hexdigest()[:16]
    cache = getattr(request.config, "cache", None)  # pytest may run without one
    folder = cache.mkdir("cuda_sources") if cache else tmp_path
    kept = folder / f"{Path(source).stem}-{arch}-{key}.txt"
    if not kept.exists():
        gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = [nvcc, *FLAGS, gencode, "-cubin", "-o", str(tmp_path / "out.cubin"), str(CSRC / source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{source} does not compile for sm_{arch}:\n{done.stderr}"
        written = tmp_path / "written"
        written.write_text(done.stdout + done.stderr)
        shutil.move(written, kept)
    return kept.read_text()


def test_every_source_compiles_without_warnings_and_no_kernel_spills_registers(ptxas_report):
    assert "warning" not in ptxas_report.lower(), ptxas_report
    kernels = re.findall(r"Function properties for (\S+)\s+(.*)", ptxas_report)
    assert kernels, f"ptxas reported no kernel:\n{ptxas_report}"
    for name, properties in kernels:
        stack, stores, loads = map(int, SPILLS.search(properties).groups())
        assert stores == loads == 0, f"{name} spills registers: {properties}"
        assert stack == 0, f"{name} keeps an array in local memory: {properties}"
