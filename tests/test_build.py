"""Building and packaging: what setup.py decides, what is in the sdist and the wheel, and that both work.

The sdist is made from a copy of the checkout, the wheel from the unpacked sdist, without nvcc; once for the whole run.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
from filelock import FileLock

import slowfast_kernels as sk

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = "CUDA kernels are left out"


@pytest.fixture
def setup_py(monkeypatch):
    """The names that setup.py defines."""
    for name in ("SLOWFAST_CUDA", "SLOWFAST_CUDA_ARCHS", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def run(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def build_extension(folder: Path) -> str:
    return run([sys.executable, "setup.py", "build_ext", "--build-lib", "out"], folder, SLOWFAST_CUDA="0")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, `source` (the sdist unpacked), the wheel, `wheel` (unpacked) and `build.log`."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers: the first one builds
    folder = shared / "built"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            ignored = shutil.ignore_patterns(
                ".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "golden", "results"
            )
            shutil.copytree(ROOT, folder / "checkout", ignore=ignored)
            run([sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(folder)], folder / "checkout")
            with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
                archive.extractall(folder, filter="data")
            next(path for path in folder.glob("slowfast_kernels-*") if path.is_dir()).rename(folder / "source")
            pip = [
                sys.executable,
                "-m",
                "pip",
                "wheel",
                "-v",
                "--no-build-isolation",
                "--no-deps",
                "-w",
                str(folder),
                ".",
            ]
            (folder / "build.log").write_text(run(pip, folder / "source", SLOWFAST_CUDA="0"))
            with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
                archive.extractall(folder / "wheel")
            (folder / "done").touch()
    return folder


# ------------------------------------------------------------------------------------------------- decisions


def test_nvcc_is_left_alone_when_cuda_is_switched_off(setup_py, monkeypatch):
    monkeypatch.setenv("SLOWFAST_CUDA", "0")
    assert setup_py["find_nvcc"]() is None


def test_nvcc_is_found_in_cuda_home_when_it_is_not_on_the_path(setup_py, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_py["find_nvcc"]() == str(nvcc)


def test_cuda_that_is_demanded_and_not_there_is_an_error(setup_py, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *arguments, **options: None)
    assert setup_py["find_nvcc"]() is None
    monkeypatch.setenv("SLOWFAST_CUDA", "1")
    with pytest.raises(SystemExit, match="SLOWFAST_CUDA=1 but nvcc is not on PATH"):
        setup_py["find_nvcc"]()


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        (None, ["sm_80", "sm_90a", "compute_80"]),
        ("8.0;9.0", ["sm_80", "sm_90", "compute_90"]),
        ("90a", ["sm_90a"]),
        ("80,86;100", ["sm_80", "sm_86", "sm_100", "compute_100"]),
    ],
)
def test_architectures_become_code_and_the_highest_portable_one_ptx(setup_py, monkeypatch, text, codes):
    if text:
        monkeypatch.setenv("SLOWFAST_CUDA_ARCHS", text)
    assert setup_py["code_objects"](setup_py["cuda_archs"]()) == codes


@pytest.mark.parametrize(
    ("name", "value", "function", "message"),
    [
        ("SLOWFAST_CUDA", "yes", "find_nvcc", "got 'yes', want auto, 0 or 1"),
        ("SLOWFAST_CUDA_ARCHS", "hopper", "cuda_archs", "got 'hopper', want compute capabilities"),
        ("SLOWFAST_CUDA_ARCHS", "75", "cuda_archs", "got '75', want 80 or newer"),
        ("SLOWFAST_CUDA_ARCHS", ";", "cuda_archs", "SLOWFAST_CUDA_ARCHS is empty"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_wanted(setup_py, monkeypatch, name, value, function, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=re.escape(message)):
        setup_py[function]()


def test_the_version_is_said_once(setup_py):
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.*)"$', text, re.MULTILINE)[1] == sk.__version__


# --------------------------------------------------------------------------------------------- sdist and wheel


@pytest.mark.slow
def test_the_sdist_has_every_source_that_the_build_reads(built):
    wanted = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    wanted |= {Path("setup.py"), Path("pyproject.toml")}
    assert {str(path) for path in wanted if not (built / "source" / path).is_file()} == set()


@pytest.mark.slow
def test_a_build_without_nvcc_says_in_one_line_that_cuda_is_left_out(built):
    assert (built / "build.log").read_text().count(LEFT_OUT) == 1


@pytest.mark.slow
def test_the_wheel_holds_the_two_packages_and_nothing_else(built):
    top = {path.name for path in (built / "wheel").iterdir()}
    assert top == {"slowfast_kernels", "slowfast_model", f"slowfast_kernels-{sk.__version__}.dist-info"}
    assert len(list((built / "wheel" / "slowfast_kernels").glob("_C.*.so"))) == 1


@pytest.mark.slow
def test_the_wheel_runs_and_reports_what_it_was_built_with(built):
    code = """
import torch, slowfast_kernels as sk
from slowfast_kernels._extension import extension
assert sk.__file__.startswith({!r}), sk.__file__
info = extension().build_info
assert info["version"] == sk.__version__ and not info["has_cuda"] and info["cuda_archs"] == [], info
assert "built without nvcc" in str(sk.backends()["cuda"]), sk.backends()["cuda"]
pooled = sk.slowfast_pool(torch.ones(2, 4, 8), [2], (2, 2), temporal_stride=2, backend="cpu")
assert pooled.fast.eq(1).all() and pooled.fast.shape == (4, 8)
""".format(str(built / "wheel"))
    run([sys.executable, "-c", code], built, PYTHONPATH=str(built / "wheel"))


@pytest.mark.slow
def test_an_unchanged_rebuild_compiles_nothing(built):
    with FileLock(f"{built}.lock"):
        build_extension(built / "source")  # from the wheel's objects, which lie under build/
        assert "ninja: no work to do" in build_extension(built / "source")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) lists the symbols")
def test_no_code_of_an_instruction_set_can_be_linked_into_another(built):
    """A weak symbol (an inline function of the standard library, say) compiled with AVX-512 could serve every level."""
    objects = list((built / "source" / "build").rglob("kernels.*.o"))
    assert objects
    for path in objects:
        symbols = run(["nm", "--defined-only", str(path)], built)
        assert not re.findall(r" [WVu] .*", symbols), path


def test_torch_and_the_extension_share_one_openmp_runtime():
    """Two runtimes in a process mean two pools of threads that fight for the cores."""
    code = """
import torch, slowfast_kernels as sk
torch.ones(300, 300) @ torch.ones(300, 300)
sk.slowfast_pool(torch.ones(64, 64, 64), [64], (8, 8), backend="cpu")
names = ("libgomp", "libomp", "libiomp")
print(len({line.split()[-1] for line in open("/proc/self/maps") if any(name in line for name in names)}))
"""
    if not Path("/proc/self/maps").exists():
        pytest.skip("the mapped libraries are read from /proc")
    assert run([sys.executable, "-c", code], ROOT) == "1\n"
