"""Which nvcc builds the CUDA kernels, when PyPI's is asked for, and what is said where there is none.

The machine is a fake: a folder with what a test puts there. ``SLOWFAST_TEST_NVCC=1`` also builds with PyPI's nvcc for
real (minutes, some 100 MB), with this machine's own toolkit out of sight.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    return importlib.import_module("build_backend")


class Machine:
    """A machine without nvcc and driver, to which a test adds."""

    def __init__(self, folder: Path, cuda, monkeypatch):
        self.folder, self.cuda, self.monkeypatch = folder, cuda, monkeypatch
        for name in ("SLOWFAST_CUDA", "CUDA_HOME"):
            monkeypatch.delenv(name, raising=False)
        (folder / "path").mkdir()
        monkeypatch.setenv("PATH", str(folder / "path"))
        monkeypatch.setattr(cuda, "SYSTEM_TOOLKIT", folder / "system")
        monkeypatch.setattr(cuda, "DRIVER_FILE", folder / "driver")
        monkeypatch.setattr(cuda.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(sys, "path", [*sys.path, str(folder / "site")])
        self.libcuda(None)

    def executable(self, path: str, text: str = "#!/bin/sh\n") -> str:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
        return str(file)

    def cuda_home(self) -> str:
        self.monkeypatch.setenv("CUDA_HOME", str(self.folder / "home"))
        return self.executable("home/bin/nvcc")

    def wheels(self, without: str = "", toolkit: str = "cu13") -> str:
        for package, file in self.cuda.WHEEL_FILES.items():
            if package != without:
                self.executable(f"site/nvidia/{toolkit}/{file}")
        return str(self.folder / f"site/nvidia/{toolkit}/bin/nvcc")

    def libcuda(self, version: int | None) -> None:
        """The driver's library says that it runs CUDA ``version``; None: there is no such library."""

        def load(name: str):
            if version is None:
                raise OSError(f"{name}: cannot open shared object file")

            def get(pointer) -> int:
                pointer._obj.value = version
                return 0

            return SimpleNamespace(cuDriverGetVersion=get)

        self.monkeypatch.setattr(self.cuda.ctypes, "CDLL", load)


@pytest.fixture
def machine(backend, monkeypatch, tmp_path) -> Machine:
    return Machine(tmp_path, backend.cuda, monkeypatch)


# -------------------------------------------------------------------------------------------- where nvcc is found


def test_nvcc_is_taken_from_the_path_before_cuda_home_before_the_system_before_wheels(machine):
    places = [
        machine.executable("path/nvcc"),
        machine.cuda_home(),
        machine.executable("system/bin/nvcc"),
        machine.wheels(),
    ]
    for nvcc in places:
        assert machine.cuda.choose_nvcc() == (nvcc, "")
        Path(nvcc).unlink()
    assert machine.cuda.choose_nvcc()[0] is None


def test_the_newest_toolkit_among_the_packages_is_taken(machine):
    machine.wheels(toolkit="cu12")
    newest = machine.wheels(toolkit="cu14")
    machine.wheels(toolkit="cu13")
    assert machine.cuda.find_nvcc() == newest


@pytest.mark.parametrize("package", ["nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl"])
def test_packages_that_lack_a_part_are_not_taken_and_the_part_is_named(machine, package):
    machine.wheels(without=package)
    machine.libcuda(13000)
    nvcc, why = machine.cuda.choose_nvcc()
    assert nvcc is None
    assert f"nvidia/cu13 is not complete without {package}: pip install" in why


def test_nvcc_is_left_alone_when_cuda_is_switched_off(machine, monkeypatch):
    machine.executable("path/nvcc")
    monkeypatch.setenv("SLOWFAST_CUDA", "0")
    assert machine.cuda.choose_nvcc() == (None, "SLOWFAST_CUDA=0")


def test_cuda_that_is_demanded_and_not_there_is_an_error_with_the_packages_to_install(machine, monkeypatch):
    monkeypatch.setenv("SLOWFAST_CUDA", "1")
    with pytest.raises(SystemExit, match="SLOWFAST_CUDA=1 but nvcc is not on PATH") as error:
        machine.cuda.choose_nvcc()
    for wheel in machine.cuda.WHEELS:
        assert f"'{wheel}'" in str(error.value)


def test_a_wrong_setting_is_named_with_what_is_wanted(machine, monkeypatch):
    monkeypatch.setenv("SLOWFAST_CUDA", "yes")
    for ask in (machine.cuda.choose_nvcc, machine.cuda.wheels_to_ask_for):
        with pytest.raises(SystemExit, match="SLOWFAST_CUDA: got 'yes', want auto, 0 or 1"):
            ask()


# ------------------------------------------------------------------------------------- when PyPI's nvcc is asked for


@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"])
@pytest.mark.parametrize(
    ("wish", "driver", "asked"),
    [
        (None, None, False),
        (None, 12090, False),
        (None, 13000, True),
        (None, 13040, True),
        (None, 14000, True),
        ("auto", 13000, True),
        ("1", None, True),
        ("1", 12040, True),
        ("0", 13000, False),
    ],
)
def test_nvcc_is_asked_for_where_the_driver_runs_what_it_builds_or_cuda_is_demanded(
    backend, machine, monkeypatch, hook, wish, driver, asked
):
    monkeypatch.setattr(backend.build_meta, hook, lambda settings: ["of setuptools"])
    machine.libcuda(driver)
    if wish is not None:
        monkeypatch.setenv("SLOWFAST_CUDA", wish)
    assert getattr(backend, hook)() == ["of setuptools", *(machine.cuda.WHEELS if asked else [])]


@pytest.mark.parametrize("wish", ["auto", "1"])
def test_nothing_is_asked_for_where_there_is_a_toolkit(machine, monkeypatch, wish):
    machine.libcuda(13000)
    machine.cuda_home()
    monkeypatch.setenv("SLOWFAST_CUDA", wish)
    assert machine.cuda.wheels_to_ask_for() == []


def test_nothing_is_asked_for_on_a_machine_that_the_wheels_are_not_made_for(machine, monkeypatch):
    machine.libcuda(13000)
    monkeypatch.setattr(machine.cuda.platform, "machine", lambda: "ppc64le")
    assert machine.cuda.wheels_to_ask_for() == []


def test_the_wheels_are_of_one_release(machine):
    assert {wheel.partition("==")[2] for wheel in machine.cuda.WHEELS} == {"13.0.*"}


# --------------------------------------------------------------------------------------------------- the driver


KERNEL = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Jul  1 2025\nGCC version:  gcc version 12.2.0\n"
OPEN_KERNEL = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder@U22)\n"


@pytest.mark.parametrize("text", [KERNEL, OPEN_KERNEL])
@pytest.mark.parametrize(("version", "runs"), [("550.54.15", False), ("575.57", False), ("580.65.06", True)])
def test_the_kernel_tells_the_driver_where_its_library_is_out_of_sight(machine, text, version, runs):
    machine.cuda.DRIVER_FILE.write_text(text.format(version))
    assert machine.cuda.find_driver() == machine.cuda.Driver(runs, f"is {version}")


@pytest.mark.parametrize(("version", "runs"), [("570.124.06", False), ("590.48.01", True)])
def test_nvidia_smi_tells_the_driver_where_nothing_else_does(machine, version, runs):
    machine.executable("path/nvidia-smi", f"#!/bin/sh\necho {version}\necho {version}\n")
    assert machine.cuda.find_driver() == machine.cuda.Driver(runs, f"is {version}")


def test_a_driver_library_without_a_driver_is_no_driver(machine):
    machine.libcuda(0)
    assert machine.cuda.find_driver() is None


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        (None, "no NVIDIA driver either; SLOWFAST_CUDA=1 builds them all the same"),
        (12040, "the driver runs CUDA 12.4 at most, PyPI's nvcc needs driver 580 or newer"),
        (13000, "build without --no-build-isolation, or: pip install 'nvidia-cuda-nvcc==13.0.*'"),
    ],
)
def test_kernels_that_are_left_out_come_with_the_cause_and_the_way_out(machine, driver, said):
    machine.libcuda(driver)
    nvcc, why = machine.cuda.choose_nvcc()
    assert nvcc is None
    assert said in why
    assert "\n" not in why


# ------------------------------------------------------------------------------------------------ facts about nvcc


@pytest.mark.parametrize("library", ["lib64", "lib", "targets/x86_64-linux/lib", "elsewhere"])
def test_the_runtime_is_found_in_every_layout_of_a_toolkit(machine, library):
    top, elsewhere = machine.folder / "toolkit", machine.folder / "toolkit/elsewhere"
    said = f'#$ TOP={top}/bin/..\n#$ LIBRARIES=  "-L{top}/absent" "-L{elsewhere}"\n'
    (top / "bin").mkdir(parents=True)
    nvcc = machine.executable("path/nvcc", f"#!/bin/sh\n/bin/cat >&2 <<'end'\n{said}end\n")
    with pytest.raises(SystemExit, match=r"libcudart_static.a is not in the toolkit of .*SLOWFAST_CUDA=0"):
        machine.cuda.library_folder(nvcc)
    machine.executable(f"toolkit/{library}/libcudart_static.a")
    assert machine.cuda.library_folder(nvcc) == top / library


@pytest.mark.parametrize(
    "message",
    [
        "host_config.h:139:2: error: #error -- unsupported GNU version! gcc versions later than 15 are not supported!",
        "ptxas /tmp/probe.ptx, line 9; fatal   : Unsupported .version 9.5; current version is '9.0'",
        "nvcc fatal   : Unsupported gpu architecture 'compute_120'",
        "cuda_fp16.h:4504:10: fatal error: nv/target: No such file or directory",
    ],
)
def test_what_nvcc_cannot_do_is_one_line_before_anything_is_compiled(machine, message):
    nvcc = machine.executable(
        "path/nvcc", f'#!/bin/sh\necho In file included from probe.cu >&2\necho "{message}" >&2\nexit 1\n'
    )
    with pytest.raises(SystemExit) as error:
        machine.cuda.check_nvcc(nvcc, "g++-99", "-gencode arch=compute_80,code=sm_80")
    assert str(error.value).startswith(
        f"{nvcc} does not work with g++-99: {message}; take another compiler (CXX) or nvcc (PATH)"
    )
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------- setuptools


@pytest.mark.parametrize(
    ("stub", "said"),
    [
        ("__version__ = '65.5.0'", "setuptools 65.5.0 is too old to build this package, want 77 or newer: pip install"),
        ("raise ImportError('none here')", "setuptools is needed to build: pip install 'setuptools>=77'"),
    ],
)
@pytest.mark.parametrize("start", ["import build_backend", "import runpy; runpy.run_path('setup.py')"])
def test_a_setuptools_that_does_not_do_is_one_line(tmp_path, stub, said, start):
    (tmp_path / "setuptools.py").write_text(stub + "\n")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, 'csrc']; {start}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------- the real thing


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("SLOWFAST_TEST_NVCC") != "1", reason="SLOWFAST_TEST_NVCC=1 builds with PyPI's nvcc")
@pytest.mark.parametrize("how", ["wheel", "sdist", "editable"])
def test_the_nvcc_of_pypi_builds_the_cuda_kernels(how, tmp_path):
    """pip in an isolated build, with a driver and without a toolkit; this machine's own is mounted over."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "golden", "results")
    source = shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignored)
    (tmp_path / "empty").mkdir()
    library = "int cuDriverGetVersion(int *version) { *version = 13000; return 0; }"
    subprocess.run(
        ["gcc", "-shared", "-x", "c", "-", "-o", tmp_path / "libcuda.so.1"], input=library, text=True, check=True
    )
    if how == "sdist":
        command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path]
        subprocess.run(command, cwd=source, check=True)
        source = next(tmp_path.glob("*.tar.gz"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-v", "-w", tmp_path, source]
    if how == "editable":
        subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
        pip = [tmp_path / "venv/bin/python", "-m", "pip", "install", "--no-deps", "-v", "--editable", source]
    toolkit = Path("/usr/local/cuda").resolve()
    hide = ["unshare", "--mount", "sh", "-c", f'mount --bind {tmp_path}/empty {toolkit} && exec "$@"', "hide"]
    folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if not (Path(folder) / "nvcc").exists()]
    environment = os.environ | {"PATH": os.pathsep.join(folders), "LD_LIBRARY_PATH": str(tmp_path), "CUDA_HOME": ""}
    command = [*(hide if toolkit.is_dir() else []), *pip]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}  # pip tells what a backend says in either
    done = subprocess.run(command, env=environment, **streams, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:]
    assert re.search("CUDA kernels are built with .*/nvidia/cu13/bin/nvcc", done.stdout)
    folder = source
    if how != "editable":
        folder = tmp_path / "unpacked"
        zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(folder)
    code = "from slowfast_kernels._extension import extension; print(extension().build_info['cuda_archs'])"
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "sm_90a" in done.stdout
