"""Which GPUs the extension runs on: architectures, driver and age, with stand-ins for machines that are not here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from slowfast_kernels import _extension


@pytest.fixture
def machine(monkeypatch):
    """Plays a machine: the compute capabilities of its GPUs, and what the extension was built into.

    Returns a function (backend, device) of what then keeps the one from the other.
    """

    def of(*gpus, archs=("sm_80",), runtime=13000, driver=13000, has_cuda=True, hip=None, current=0):
        def capability(index):
            assert hip is None, "asked an AMD GPU for its compute capability"
            return gpus[index]

        info = {
            "has_cuda": has_cuda,
            "cuda_archs": archs,
            "cuda_runtime": runtime,
            "cuda_left_out": "nvcc was not found",
        }
        module = SimpleNamespace(build_info=info, cuda_driver_version=lambda: driver)
        monkeypatch.setattr(_extension, "_load", lambda: (module, ""))
        monkeypatch.setattr(torch.version, "hip", hip)
        for name, stand_in in {
            "is_available": lambda: bool(gpus),
            "get_device_capability": capability,
            "get_device_name": lambda index: f"a GPU of {gpus[index]}",
            "current_device": lambda: current,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        _extension._reason.cache_clear()
        return lambda backend, device: _extension.unavailable_reason(backend, torch.device(device))

    yield of
    _extension._reason.cache_clear()


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["sm_80"], (8, 0), True),
        (["sm_80"], (8, 9), True),  # a newer one of the same generation
        (["sm_86"], (8, 0), False),  # an older one
        (["sm_80"], (9, 0), False),  # the next generation
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 0), True),
        (["sm_100a"], (10, 3), False),  # code for one GPU alone
        (["sm_80", "sm_90a"], (9, 0), True),
        (["sm_80", "sm_90a"], (10, 0), False),
        (["sm_80", "sm_90a", "compute_80"], (10, 0), True),  # PTX, compiled by the driver
        (["sm_90a", "compute_90"], (12, 0), True),
        (["sm_90a", "compute_90"], (8, 0), False),  # PTX for newer ones
    ],
)
def test_code_objects_run_on_the_gpus_that_cuda_runs_them_on(machine, archs, capability, runs):
    reason = machine(capability, archs=archs)("cuda", "cuda:0")
    if runs:
        assert reason is None
        return
    assert f"is not among the built architectures ({', '.join(archs)})" in reason
    assert f"SLOWFAST_CUDA_ARCHS={capability[0]}{capability[1]}" in reason


def test_a_gpu_too_old_for_the_kernels_is_refused_whatever_was_built(machine):
    reason = machine((7, 5), archs=["sm_75", "compute_75"])("cuda", "cuda:0")
    assert "sm_75) is too old, want sm_80 or newer; use backend='triton' or 'eager'" in reason


@pytest.mark.parametrize(
    ("driver", "runtime", "runs"),
    [(13000, 13000, True), (13010, 13000, True), (12080, 13000, False), (12020, 12080, True), (11080, 12000, False)],
)
def test_a_driver_runs_what_a_runtime_of_its_major_version_or_an_older_one_built(machine, driver, runtime, runs):
    reason = machine((8, 0), driver=driver, runtime=runtime)("cuda", "cuda:0")
    assert (reason is None) == runs
    if not runs:
        have, want = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, runtime))
        assert f"the driver supports CUDA {have}, the extension was built with {want}" in reason


def test_an_amd_gpu_goes_to_triton_and_is_asked_nothing(machine):
    assert "AMD GPUs; use backend='triton'" in machine((9, 0), hip="6.2")("cuda", "cuda:0")


def test_an_extension_without_cuda_kernels_says_why_and_the_way_to_them(machine):
    reason = machine((9, 0), has_cuda=False)("cuda", "cuda:0")
    assert "built without nvcc (nvcc was not found)" in reason
    assert "SLOWFAST_CUDA=1" in reason


def test_each_gpu_is_judged_by_itself_and_a_device_without_a_number_is_the_current_one(machine):
    why = machine((7, 5), (8, 0), current=1)
    assert why("cuda", "cuda") is None
    assert why("cuda", "cuda:1") is None
    assert "too old" in why("cuda", "cuda:0")


def test_without_a_gpu_the_report_names_what_lacks_the_build_of_torch_or_the_driver(machine, monkeypatch):
    why = machine()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in why("cuda", "cuda:0")
    _extension._reason.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "check the driver and CUDA_VISIBLE_DEVICES" in why("cuda", "cuda:0")


@pytest.mark.parametrize(
    ("backend", "device", "said"),
    [
        ("cuda", "cpu", "it takes CUDA tensors, got cpu tensors"),
        ("cuda", "meta", "it takes CUDA tensors, got meta tensors"),
        ("cpu", "cuda:0", "it takes CPU tensors, got cuda tensors"),
        ("cpu", "meta", "it takes CPU tensors, got meta tensors"),
        ("triton", "cpu", "it takes GPU tensors, got CPU tensors; TRITON_INTERPRET=1"),
        ("triton", "meta", "it takes CUDA tensors, got meta tensors"),
    ],
)
def test_a_backend_names_the_devices_that_it_takes(machine, backend, device, said):
    if backend == "triton":
        pytest.importorskip("triton")
    assert said in machine((9, 0), archs=["sm_90a"])(backend, device)


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_other_backends_ask_neither_the_driver_nor_the_architectures(machine, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    assert machine((7, 5), driver=10000)(backend, "cuda:0") is None
