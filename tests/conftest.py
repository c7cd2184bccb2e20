"""What every test shares: poisoned fresh memory, fresh random numbers with a printed seed, small hypothesis budgets."""

from __future__ import annotations

import functools
import os
import random
import zlib

import pytest
import torch
from hypothesis import HealthCheck, settings
from skipped import cases_written_in, hidden_by_backend

settings.register_profile(
    "small",
    max_examples=int(os.environ.get("SLOWFAST_EXAMPLES", "12")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("small")
HIDDEN = pytest.StashKey[dict]()


def pytest_configure(config):
    os.environ.setdefault("SLOWFAST_TEST_SEED", str(random.SystemRandom().randrange(2**31)))  # workers inherit it
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_report_header():
    return f"slowfast: inputs drawn from SLOWFAST_TEST_SEED={os.environ['SLOWFAST_TEST_SEED']}"


def pytest_collection_modifyitems(config, items):
    """Longest first, so that parallel workers end together; they must all have found the same names."""
    changing = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if changing:
        raise pytest.UsageError(f"names that hold an address differ from worker to worker: {changing}")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    config.stash[HIDDEN] = hidden_by_backend(items)


@pytest.fixture
def hidden_cases(request) -> dict[str, int]:
    """Of the tests that this run collected, by backend."""
    return request.config.stash[HIDDEN]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A module that is skipped as a whole says how many cases that hides; its parametrisations are read, not run."""
    report = yield
    if report.skipped and isinstance(collector, pytest.Module):
        path, line, reason = report.longrepr
        report.longrepr = (path, line, f"{reason}; hides {cases_written_in(collector.path)} cases or more")
    return report


def _poisoned(allocate):
    @functools.wraps(allocate)
    def allocate_poisoned(*args, **kwargs):
        out = allocate(*args, **kwargs)
        with torch.no_grad():
            if out.is_floating_point():
                out.fill_(float("nan"))
            elif out.dtype in (torch.int32, torch.int64):
                out.fill_(-0x5EADBEEF)
        return out

    return allocate_poisoned


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch, request):
    """Memory from torch.empty and its kin holds NaN: what a kernel forgets to write, or reads too early, shows."""
    if "benchmark" in request.fixturenames:
        return
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))


@pytest.fixture
def seed(request) -> int:
    """A number of this test in this run: new in every run, the same again under the printed SLOWFAST_TEST_SEED."""
    return zlib.crc32(f"{os.environ['SLOWFAST_TEST_SEED']} {request.node.nodeid}".encode())


@pytest.fixture
def rng(seed):
    """Makes a random generator on a device."""
    return lambda device="cpu": torch.Generator(device).manual_seed(seed)


@pytest.fixture
def journal(tmp_path):
    """Of a benchmark on a machine with ceilings; bench is not imported before a test asks."""
    from bench_cases import new_journal

    return new_journal(tmp_path)


@pytest.fixture
def run(journal):
    """A runner on ``journal`` that measures briefly."""
    from bench_cases import quick_runner

    return quick_runner(journal)


@pytest.fixture
def with_triton(monkeypatch):
    """As on a machine where Triton runs on CPU tensors."""
    from slowfast_model import kernels

    monkeypatch.setattr(kernels, "unavailable_reason", lambda *_: None)
    monkeypatch.delenv("SLOWFAST_BACKEND", raising=False)
