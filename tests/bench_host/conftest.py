"""What the stored baseline keeps: medians and the kind of machine, no raw samples and no host name."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # bench is not installed; installed packages keep winning

from bench import device


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(
        cpu=device.cpu_name(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    )


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for result in output_json["benchmarks"]:
        result["stats"].pop("data", None)
    output_json["commit_info"] = {"id": device.git_commit()}
