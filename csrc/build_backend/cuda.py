"""Which nvcc builds the CUDA kernels, and why none does: decided in the same words for the backend and for setup.py.

nvcc comes from a toolkit (PATH, $CUDA_HOME, /usr/local/cuda) or from PyPI's wheels among the packages of the Python
that builds. Where there is neither, the backend asks for the wheels if the driver runs what they build, or if
SLOWFAST_CUDA=1 demands CUDA kernels; SLOWFAST_CUDA=0 never looks and never asks.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SYSTEM_TOOLKIT = Path("/usr/local/cuda")
DRIVER_FILE = Path("/proc/driver/nvidia/version")

# One release for all five: cicc of one and ptxas of another do not speak the same PTX. What stands beside a package
# is a file that only this package brings.
WHEELS_CUDA = (13, 0)
WHEELS_DRIVER = 580  # the first driver that runs CUDA 13
WHEEL_FILES = {
    "nvidia-cuda-nvcc": "bin/nvcc",
    "nvidia-nvvm": "nvvm/bin/cicc",
    "nvidia-cuda-crt": "include/crt/host_config.h",
    "nvidia-cuda-runtime": "lib/libcudart_static.a",
    "nvidia-cuda-cccl": "include/cccl/nv/target",
}
WHEEL_MACHINES = ("x86_64", "aarch64")
WHEELS = [f"{package}=={WHEELS_CUDA[0]}.{WHEELS_CUDA[1]}.*" for package in WHEEL_FILES]
PIP_WHEELS = "pip install " + " ".join(f"'{wheel}'" for wheel in WHEELS)


def wish() -> str:
    """SLOWFAST_CUDA: "auto", "0" or "1"."""
    value = os.environ.get("SLOWFAST_CUDA", "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"SLOWFAST_CUDA: got {value!r}, want auto, 0 or 1")
    return value


# --------------------------------------------------------------------------------------------------------- nvcc


def toolkit_nvcc() -> str | None:
    """nvcc of a CUDA toolkit: from PATH, $CUDA_HOME or /usr/local/cuda, in this order."""
    folders = [os.environ.get("PATH", "")]
    folders += [str(Path(home) / "bin") for home in (os.environ.get("CUDA_HOME"), SYSTEM_TOOLKIT) if home]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def wheel_folders() -> list[Path]:
    """``nvidia/cu13`` and its like among this Python's packages (an isolated build's too) that hold nvcc."""
    found = [nvcc.parents[1] for entry in sys.path for nvcc in Path(entry).glob("nvidia/cu1?/bin/nvcc")]
    return sorted(dict.fromkeys(found), key=lambda folder: folder.name, reverse=True)


def absent_wheels(folder: Path) -> list[str]:
    """The packages that nvcc in ``folder`` still needs: each can be installed without the others."""
    return [package for package, file in WHEEL_FILES.items() if not (folder / file).is_file()]


def find_nvcc() -> str | None:
    """The nvcc that there is, of a toolkit or of a complete set of wheels."""
    complete = (str(folder / "bin" / "nvcc") for folder in wheel_folders() if not absent_wheels(folder))
    return toolkit_nvcc() or next(complete, None)


# ------------------------------------------------------------------------------------------------------- driver


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver of this machine: whether what PyPI's nvcc builds runs on it, and its version in words."""

    runs_wheels: bool
    version: str


def find_driver() -> Driver | None:
    """The driver as its own library, the kernel or nvidia-smi (a container may have only one) tells it."""
    if cuda := _cuda_of_libcuda():
        return Driver(cuda >= WHEELS_CUDA, f"runs CUDA {cuda[0]}.{cuda[1]} at most")
    for text in (_kernel_text(), _smi_text()):
        if found := re.search(r"\b(\d{3,})\.\d+(\.\d+)?\b", text):
            return Driver(int(found[1]) >= WHEELS_DRIVER, f"is {found[0]}")
    return None


def _cuda_of_libcuda() -> tuple[int, int] | None:
    version = ctypes.c_int(0)
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:  # it needs no GPU
            return None
    except (OSError, AttributeError):
        return None
    return (version.value // 1000, version.value % 1000 // 10) if version.value else None


def _kernel_text() -> str:
    try:
        return DRIVER_FILE.read_text()
    except OSError:
        return ""


def _smi_text() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


# ----------------------------------------------------------------------------------------------------- decisions


def wheels_to_ask_for() -> list[str]:
    """The wheels of nvcc, if they are needed, wanted and of use here; else an empty list."""
    if wish() == "0" or find_nvcc() or sys.platform != "linux" or platform.machine() not in WHEEL_MACHINES:
        return []
    driver = find_driver()
    return list(WHEELS) if wish() == "1" or (driver and driver.runs_wheels) else []


def choose_nvcc() -> tuple[str | None, str]:
    """(nvcc, ""), or (None, why the CUDA kernels are left out).

    Raises:
        SystemExit: SLOWFAST_CUDA=1 and there is no nvcc.
    """
    if wish() == "0":
        return None, "SLOWFAST_CUDA=0"
    if nvcc := find_nvcc():
        return nvcc, ""
    if wish() == "1":
        where = "on PATH, in $CUDA_HOME/bin, in /usr/local/cuda/bin or complete among this Python's packages"
        raise SystemExit(f"SLOWFAST_CUDA=1 but nvcc is not {where}; {_way_to_wheels()}")
    driver = find_driver()
    if driver is None:
        return None, "nvcc was not found, and no NVIDIA driver either; SLOWFAST_CUDA=1 builds them all the same"
    if not driver.runs_wheels:
        needs = f"PyPI's nvcc needs driver {WHEELS_DRIVER} or newer (CUDA {WHEELS_CUDA[0]})"
        return None, f"nvcc was not found; the driver {driver.version}, {needs}; an older CUDA toolkit may fit it"
    return None, f"nvcc was not found; {_way_to_wheels()}"


def _way_to_wheels() -> str:
    for folder in wheel_folders():
        return f"{folder} is not complete without {', '.join(absent_wheels(folder))}: {PIP_WHEELS}"
    return f"install a CUDA toolkit, build without --no-build-isolation, or: {PIP_WHEELS}"


# --------------------------------------------------------------------------------------------- facts about nvcc


def release_of(nvcc: str) -> str:
    """Such as "13.0"."""
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def library_folder(nvcc: str) -> Path:
    """Where libcudart_static.a is. PATH may hold only a wrapper of nvcc, so nvcc is asked where it lives."""
    done = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], check=True, capture_output=True, text=True)
    folders = [Path(folder) for folder in re.findall(r'-L([^"\s]+)', done.stderr)]
    for top in re.findall(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE):
        folders += [Path(top) / "lib64", Path(top) / "lib", *sorted(Path(top).glob("targets/*-linux/lib"))]
    for folder in folders:
        if (folder / "libcudart_static.a").is_file():
            return folder.resolve()
    raise SystemExit(f"libcudart_static.a is not in the toolkit of {nvcc}; SLOWFAST_CUDA=0 builds without CUDA kernels")


def check_nvcc(nvcc: str, host_compiler: str, code_flags: str) -> None:
    """A tiny kernel goes through all of nvcc's parts: what they cannot do together is one line, not a hundred.

    Raises:
        SystemExit: the host compiler is not one that nvcc takes, an architecture is unknown to it, a part is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.write_text("#include <cuda_bf16.h>\n__global__ void probe() {}\n")
        command = [nvcc, "-ccbin", host_compiler, *code_flags.split(), "-c", str(source), "-o", f"{source}.o"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr + done.stdout).splitlines() or ["no message"]
        cause = next((line for line in lines if re.search("error|fatal", line)), lines[0]).strip()
        way = "take another compiler (CXX) or nvcc (PATH), or leave the CUDA kernels out with SLOWFAST_CUDA=0"
        raise SystemExit(f"{nvcc} does not work with {host_compiler}: {cause}; {way}")
