"""Lazy load of the compiled module ``slowfast_kernels._C``, and the report of what this machine can run.

Nothing here fails for want of a GPU, nvcc, Triton or the extension: each lack becomes a sentence that says what is
missing and how to get it. torch is imported before ``_C``, so that both share torch's OpenMP runtime.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import re
import sys
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch

from .heuristics.backends import BACKENDS

MIN_CUDA_CAPABILITY = (8, 0)
MIN_TORCH = (2, 6)
MIN_TRITON = (3, 2)
HERE = Path(__file__).resolve().parent  # the copy of the package that is imported


def release(version: str) -> tuple[int, int]:
    """The first two numbers of a version: (2, 13) of "2.13.0+cpu"."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def _too_old(name: str, version: str, oldest: tuple[int, int]) -> str:
    """The sentence to say if ``version`` is below ``oldest``, else an empty one."""
    if release(version) >= oldest:
        return ""
    want = ".".join(map(str, oldest))
    return f"{name} {version} is too old, want {want} or newer: pip install --upgrade '{name}>={want}'"


if _too_old("torch", torch.__version__, MIN_TORCH):
    raise ImportError(_too_old("torch", torch.__version__, MIN_TORCH))

_NEEDS = {
    "cuda": "the extension built with nvcc, a CUDA build of torch, and a GPU of compute capability 8.0 or newer",
    "triton": "triton and a GPU that it supports (on CPU tensors: TRITON_INTERPRET=1, slow, for testing)",
    "cpu": "the extension (a C++17 compiler at install time)",
    "eager": "PyTorch",
}


@dataclass(frozen=True)
class Capability:
    """Whether one backend can run here. True or false as a bool; ``str()`` gives the one-line explanation."""

    backend: str
    available: bool
    needs: str
    detail: str  # what it runs on, or why it can't run and how to get it

    def __bool__(self) -> bool:
        return self.available

    def __str__(self) -> str:
        return f"{'available' if self.available else 'unavailable'}: {self.detail}"


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    how = "build it with `pip install -e .` in the checkout (it needs a C++17 compiler)"
    try:
        module = importlib.import_module("slowfast_kernels._C")
    except ImportError as error:
        return None, f"{_why_not_loaded(error)}; {how}"
    built, here = module.build_info["version"], importlib.import_module("slowfast_kernels").__version__
    if built != here:
        return None, f"the extension {module.__file__} is of version {built}, the package beside it of {here}; {how}"
    params = importlib.import_module("slowfast_kernels.params")
    sizes = {struct.__name__: ctypes.sizeof(struct) for struct in params.STRUCTS}
    if any(sizes[name] != size for name, size in module.struct_sizes.items()):
        return None, f"the extension {module.__file__} was built from another csrc/params.h than this package's; {how}"
    return module, ""


def _why_not_loaded(error: ImportError) -> str:
    """Which copy of the package is imported, and what keeps the extension from it."""
    built = sorted(path.name for path in HERE.glob("_C.*") if path.suffix in (".so", ".pyd"))
    ours = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if ours in built:
        return f"the extension {HERE / ours} does not load ({error})"
    why = f"the extension slowfast_kernels._C is not in the package that is imported, {HERE}"
    if built:
        why += f"; {', '.join(built)} there is for another Python than this one, which looks for {ours}"
    for other in _other_copies():
        if (other / ours).is_file():
            way = f"start Python outside {HERE.parent}, and without it in PYTHONPATH"
            return f"{why}; the copy in {other} has it: to import that one, {way}"
    return why


def _other_copies() -> list[Path]:
    """Folders of the package that this Python would import if it did not find this one first."""
    specs = [PathFinder.find_spec("slowfast_kernels", [entry]) for entry in sys.path]
    finders = (finder for finder in sys.meta_path if finder is not PathFinder and hasattr(finder, "find_spec"))
    specs += [finder.find_spec("slowfast_kernels", None) for finder in finders]  # editable installs have their own
    folders = [Path(spec.origin).resolve().parent for spec in specs if spec and spec.origin]
    return [folder for folder in dict.fromkeys(folders) if folder != HERE]


def extension() -> ModuleType:
    """The compiled module.

    Raises:
        ImportError: it is not built or does not load; the message says how to build it.
    """
    module, reason = _load()
    if module is None:
        raise ImportError(reason)
    return module


def missing_reason() -> str | None:
    """Why there is no extension (not built, does not load, of another version) and how to get it; None: it is there."""
    return _load()[1] or None


@lru_cache(maxsize=1)
def _triton_import_error() -> str:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"triton does not import ({error}); install it with `pip install triton`"
    return _too_old("triton", triton.__version__, MIN_TRITON)


def interpreter_reason() -> str:
    """Why Triton's interpreter does not run here, if it does not; triton itself imports.

    A loop over a range of tensors makes it turn arrays of one element into numbers, which numpy has given up.
    """
    triton, numpy = _version_of("triton"), _version_of("numpy")
    if release(triton) >= (3, 7) or release(numpy) < (2, 4):
        return ""
    return f"the interpreter of triton {triton} does not work with numpy {numpy}; install numpy<2.4 or triton>=3.7"


def _cuda_build_reason() -> str | None:
    """Why the extension has no CUDA kernels, whatever GPU is here."""
    module, reason = _load()
    if module is None:
        return reason
    if not module.build_info["has_cuda"]:
        way = "reinstall it where nvcc is found, or with SLOWFAST_CUDA=1, which takes nvcc from PyPI"
        return f"the extension was built without nvcc ({module.build_info['cuda_left_out']}); {way}"
    return None


def _no_gpu_reason() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.hip is None and torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    return "torch finds no usable GPU (torch.cuda.is_available() is false); check the driver and CUDA_VISIBLE_DEVICES"


def _runs_on(module: ModuleType, major: int, minor: int) -> bool:
    """Whether one of the built code objects can run on compute capability ``major.minor``."""
    for arch in module.build_info["cuda_archs"]:  # "sm_80", "sm_90a", "compute_80"
        kind, _, number = arch.partition("_")
        capability = int(number.rstrip("af"))
        match kind, number[-1] in "af":
            case "sm", True:
                runs = capability == 10 * major + minor
            case "sm", False:
                runs = capability // 10 == major and capability % 10 <= minor
            case "compute", False:
                runs = capability <= 10 * major + minor
            case _:
                raise ValueError(f"cuda_archs: got {arch!r} in the build, want sm_* or compute_*")
        if runs:
            return True
    return False


def _cuda_device_reason(index: int) -> str | None:
    if torch.version.hip is not None:
        return "the CUDA kernels do not run on AMD GPUs; use backend='triton'"
    major, minor = torch.cuda.get_device_capability(index)
    name = f"GPU {index} ({torch.cuda.get_device_name(index)}, sm_{major}{minor})"
    if (major, minor) < MIN_CUDA_CAPABILITY:
        return f"{name} is too old, want sm_80 or newer; use backend='triton' or 'eager'"
    module = extension()
    if not _runs_on(module, major, minor):
        built = ", ".join(module.build_info["cuda_archs"])
        remedy = f"reinstall with SLOWFAST_CUDA_ARCHS={major}{minor}"
        return f"{name} is not among the built architectures ({built}); {remedy}"
    driver, runtime = module.cuda_driver_version(), module.build_info["cuda_runtime"]
    if driver // 1000 < runtime // 1000:
        have, want = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, runtime))
        return f"the driver supports CUDA {have}, the extension was built with {want}; update the driver or rebuild"
    return None


@lru_cache(maxsize=256)
def _reason(backend: str, device_type: str, index: int, interpret: bool) -> str | None:
    match backend:
        case "eager":
            return None
        case "cpu":
            return _load()[1] or None if device_type == "cpu" else f"it takes CPU tensors, got {device_type} tensors"
        case "triton":
            return _triton_import_error() or _triton_device_reason(device_type, interpret)
        case "cuda":
            other = None if device_type == "cuda" else f"it takes CUDA tensors, got {device_type} tensors"
            return _cuda_build_reason() or other or _no_gpu_reason() or _cuda_device_reason(index)
    raise _unknown(backend)


def _triton_device_reason(device_type: str, interpret: bool) -> str | None:
    if device_type == "cpu" and not interpret:
        return "it takes GPU tensors, got CPU tensors; TRITON_INTERPRET=1 runs its interpreter on them (slow)"
    if device_type not in ("cpu", "cuda"):
        return f"it takes CUDA tensors, got {device_type} tensors"
    return (interpreter_reason() or None) if interpret else None


def _unknown(backend: str) -> ValueError:
    return ValueError(f"backend: got {backend!r}, want one of {', '.join(map(repr, BACKENDS))}")


def unavailable_reason(backend: str, device: torch.device) -> str | None:
    """Why ``backend`` cannot run on tensors of ``device``, as the end of a sentence; None if it can.

    Raises:
        ValueError: no backend has that name.
    """
    if backend not in BACKENDS:
        raise _unknown(backend)
    index = -1
    if device.type == "cuda" and torch.cuda.is_available():
        index = torch.cuda.current_device() if device.index is None else device.index
    return _reason(backend, device.type, index, os.environ.get("TRITON_INTERPRET") == "1")


def _detail(backend: str) -> tuple[bool, str]:
    """Whether it is available, and on what or why not."""
    match backend:
        case "eager":
            reason, detail = None, f"torch {torch.__version__}, any device"
        case "cpu":
            reason = unavailable_reason("cpu", torch.device("cpu"))
            detail = reason or f"{extension().cpu_isa()}, {torch.get_num_threads()} threads"
        case "triton":
            reason, detail = _triton_detail()
        case "cuda":
            reason = unavailable_reason("cuda", torch.device("cuda"))
            detail = reason or f"{torch.cuda.get_device_name()}, built for {', '.join(cuda_archs())}"
        case _:
            raise _unknown(backend)
    return reason is None, detail


def _triton_detail() -> tuple[str | None, str]:
    """Why it is unavailable, if it is, and the detail."""
    if torch.cuda.is_available() or _triton_import_error():
        reason = unavailable_reason("triton", torch.device("cuda"))
        return reason, reason or f"triton {_version_of('triton')} on {torch.cuda.get_device_name()}"
    reason = unavailable_reason("triton", torch.device("cpu")) and _no_gpu_reason()
    hint = "; TRITON_INTERPRET=1 runs its interpreter on CPU tensors (slow)"
    return reason, f"{reason}{hint}" if reason else f"triton {_version_of('triton')}, interpreter on CPU tensors"


def capabilities() -> dict[str, Capability]:
    """What this machine can run: backend name -> ``Capability``, fastest backend first."""
    return {name: Capability(name, *_with_needs(name)) for name in BACKENDS}


def _with_needs(backend: str) -> tuple[bool, str, str]:
    available, detail = _detail(backend)
    return available, _NEEDS[backend], detail


def cuda_archs() -> list[str]:
    """Architectures in the extension, such as ``["sm_80", "sm_90a", "compute_80"]``; empty without CUDA kernels."""
    module, _ = _load()
    return list(module.build_info["cuda_archs"]) if module else []


def _version_of(package: str) -> str:
    try:
        return importlib.import_module(package).__version__
    except ImportError:
        return "not installed"


def versions() -> dict[str, str]:
    """Versions and hardware that a bug report or a benchmark row needs."""
    module, _ = _load()
    info = module.build_info if module else {}
    report = {
        "slowfast_kernels": f"{importlib.import_module('slowfast_kernels').__version__}, imported from {HERE}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "platform": f"{platform.system()} {platform.machine()}",
        "compiler at build": info.get("compiler", "none"),
        "nvcc at build": info.get("nvcc") or "none",
        "CUDA archs built": ", ".join(cuda_archs()) or "none",
        "CPU": f"{module.cpu_isa()}, {torch.get_num_threads()} threads" if module else "unknown",
    }
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(gpus):
        major, minor = torch.cuda.get_device_capability(i)
        memory = torch.cuda.get_device_properties(i).total_memory / 2**30
        report[f"GPU {i}"] = f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}, {memory:.0f} GiB"
    if not gpus:
        report["GPU"] = "none"
    return report


def report() -> str:
    """The capability report that ``python -m slowfast_kernels`` prints."""
    lines = ["Backends"]
    for name, capability in capabilities().items():
        lines.append(f"  {name:<8}{capability}")
        lines.append(f"  {'':<8}needs {capability.needs}")
    lines.append("Versions")
    lines += [f"  {key:<20}{value}" for key, value in versions().items()]
    return "\n".join(lines)
