"""Building and packaging: what setup.py decides, what is in the sdist and the wheel, and that both work.

The sdist is made from a copy of the checkout, the wheel from the unpacked sdist, without nvcc; once for the whole run.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
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
    for name in ("SLOWFAST_CUDA_ARCHS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
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
        ("SLOWFAST_CUDA_ARCHS", "hopper", "cuda_archs", "got 'hopper', want compute capabilities"),
        ("SLOWFAST_CUDA_ARCHS", "75", "cuda_archs", "got '75', want 80 or newer"),
        ("SLOWFAST_CUDA_ARCHS", ";", "cuda_archs", "SLOWFAST_CUDA_ARCHS is empty"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_wanted(setup_py, monkeypatch, name, value, function, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=re.escape(message)):
        setup_py[function]()


def test_a_compiler_that_is_not_there_is_one_line_with_the_way_out(setup_py, monkeypatch):
    monkeypatch.setenv("CXX", "ccache no-such-compiler -m64")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        SystemExit, match=r"^no C\+\+ compiler: ccache is not on PATH; install it, or name another one in CXX"
    ):
        setup_py["compiler"]()


@pytest.mark.parametrize("command", ["g++-13", "ccache g++-13", "g++-13 -m64", "ccache g++-13 -m64"])
def test_nvcc_is_told_the_compiler_without_launcher_and_flags(setup_py, command):
    assert setup_py["host_compiler"](command) == "g++-13"


def test_python_without_its_header_is_one_line(setup_py, monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(SystemExit, match=rf"^Python.h is not in {tmp_path}; install Python's development files"):
        setup_py["python_include"]()


@pytest.mark.parametrize("package", ["pybind11", "ninja"])
def test_a_build_without_isolation_names_the_package_that_it_lacks(setup_py, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setenv("PATH", "")
    function = {"pybind11": "stable_pybind11_include", "ninja": "find_ninja"}[package]
    with pytest.raises(SystemExit, match=f"^{package} is needed to build: pip install"):
        setup_py[function]()


@pytest.mark.parametrize("text", ["plain", "a 'quoted' \"one\"", "$HOME and \\\\"])
def test_a_string_reaches_the_compiler_through_ninja_and_the_shell(setup_py, text, tmp_path):
    source, ninja = tmp_path / "a.c", tmp_path / "build.ninja"
    source.write_text("#include <stdio.h>\nint main() { puts(TEXT); }\n")
    flag = setup_py["define_string"]("TEXT", text)
    ninja.write_text(f"rule c\n  command = gcc {flag} a.c -o a && ./a > out\nbuild out: c a.c\n")
    run([setup_py["find_ninja"]()], tmp_path)
    assert (tmp_path / "out").read_text() == text + "\n"


def test_the_version_is_said_once(setup_py):
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.*)"$', text, re.MULTILINE)[1] == sk.__version__


# --------------------------------------------------------------------------------------------- sdist and wheel


@pytest.mark.slow
def test_the_sdist_has_every_source_that_the_build_reads(built):
    wanted = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.is_file() and path.suffix != ".pyc"}
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
def test_a_build_that_fails_ends_with_a_line_instead_of_a_stack_trace(built):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "out"]
    environment = os.environ | {"SLOWFAST_CUDA": "0", "CXX": "false"}
    with FileLock(f"{built}.lock"):
        done = subprocess.run(
            command, cwd=built / "source", env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr.endswith(
        "slowfast-kernels: the extension does not compile; the compiler's own message is above\n"
    )
    assert "Traceback" not in done.stderr


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


# ------------------------------------------------------------------------------------------------- the Makefile


@pytest.mark.parametrize(
    ("torch", "requirements", "lines"),
    [
        ("2.6.0+cpu", ["numpy"], ["triton==3.2.0", "numpy<2.4"]),
        ("2.7.0", ['triton==3.3.0; platform_system == "Linux"'], ["triton==3.3.0", "numpy<2.4"]),
        ("2.12.1", [], ["triton==3.7.0"]),
        ("2.14.1", ["filelock", 'triton==3.8.0; platform_system == "Linux"'], ["triton==3.8.0"]),
        ("2.13.0+cpu", ["filelock"], ["triton==3.9.0"]),
        ("2.99.0", ["filelock"], []),
    ],
)
def test_what_fits_a_torch_is_its_own_word_or_else_the_triton_it_was_tested_with(torch, requirements, lines):
    assert runpy.run_path(str(ROOT / ".ci" / "fitting.py"))["constraints"](torch, requirements) == lines
