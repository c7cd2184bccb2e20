"""What ran the benchmark: GPU or CPU, clocks, versions, commit. Every result file carries it.

GPU properties come from cuda-python's driver bindings and clocks from its NVML bindings, read only; either may be
absent (no driver, an old cuda-python), and then the report says so instead of guessing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def git_commit() -> str:
    """Short commit of the checkout, with ``+`` if the tree has changes; outside one, $GIT_COMMIT or "unknown"."""

    def git(*args: str) -> str:
        result = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=30)
        return result.stdout.strip() if result.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        commit += "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return commit or os.environ.get("GIT_COMMIT", "unknown")


# -------------------------------------------------------------------------------------------------- CPU


def cpu_name() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        return match[1].strip() if match else platform.processor()
    except OSError:
        return platform.processor() or platform.machine()


def _cpu_cache_bytes() -> int:
    """Size of the largest cache, for rotating inputs; 32 MiB where the kernel doesn't say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if match:
            sizes.append(int(match[1]) << (10 if match[2] == "K" else 20))
    return max(sizes, default=32 << 20)


# -------------------------------------------------------------------------------------------------- GPU

_ATTRIBUTES = {
    "sms": "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT",
    "l2_bytes": "CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE",
    "shared_bytes_per_block": "CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN",
    "max_sm_clock_khz": "CU_DEVICE_ATTRIBUTE_CLOCK_RATE",
    "max_memory_clock_khz": "CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE",
    "memory_bus_bits": "CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH",
}


def gpu_properties(index: int = 0) -> dict[str, int | str]:
    """Driver's properties of a GPU through cuda-python; ``{"unavailable": why}`` without it."""
    try:
        from cuda.bindings import driver

        def call(result):
            status, *values = result
            if status != driver.CUresult.CUDA_SUCCESS:
                raise RuntimeError(str(status))
            return values[0] if values else None

        call(driver.cuInit(0))
        device = call(driver.cuDeviceGet(index))
        properties: dict[str, int | str] = {"cuda_driver_api": call(driver.cuDriverGetVersion())}
        for name, attribute in _ATTRIBUTES.items():
            properties[name] = int(
                call(driver.cuDeviceGetAttribute(getattr(driver.CUdevice_attribute, attribute), device))
            )
        return properties
    except Exception as error:  # no package, no driver, a refusing driver: none may stop a benchmark
        return {"unavailable": f"cuda-python: {type(error).__name__}: {error}"}


def gpu_clocks(index: int = 0) -> dict[str, int | str]:
    """Current clocks (MHz), power (W) and temperature (C) through NVML; ``{"unavailable": why}`` without it."""
    try:
        from cuda.bindings import nvml

        nvml.init_v2()
        try:
            handle = nvml.device_get_handle_by_index_v2(index)
            return {
                "driver": str(nvml.system_get_driver_version()),
                "sm_mhz": int(nvml.device_get_clock_info(handle, nvml.ClockType.CLOCK_SM)),
                "memory_mhz": int(nvml.device_get_clock_info(handle, nvml.ClockType.CLOCK_MEM)),
                "max_sm_mhz": int(nvml.device_get_max_clock_info(handle, nvml.ClockType.CLOCK_SM)),
                "power_w": round(nvml.device_get_power_usage(handle) / 1000),
            }
        finally:
            nvml.shutdown()
    except Exception as error:
        return {"unavailable": f"NVML: {type(error).__name__}: {error}"}


def _driver_version() -> str:
    """NVML's answer, else the kernel module's own file."""
    clocks = gpu_clocks()
    if "driver" in clocks:
        return str(clocks["driver"])
    try:
        match = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
        return match[1] if match else "unknown"
    except OSError:
        return "none"


def cache_bytes(device: torch.device) -> int:
    """Last-level cache that a cold timing has to stream through."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return _cpu_cache_bytes()


def describe(device: torch.device) -> dict:
    """The meta record of a result file."""
    meta = {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{cpu_name()}, {torch.get_num_threads()} threads",
        "device_type": device.type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cuda": torch.version.cuda or "none",
        "driver": _driver_version() if device.type == "cuda" else "none",
        "python": platform.python_version(),
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cache_bytes": cache_bytes(device),
    }
    if device.type == "cuda":
        index = device.index or 0
        meta["gpu"] = gpu_properties(index)
        meta["clocks_at_start"] = gpu_clocks(index)
    return meta
