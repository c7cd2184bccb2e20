"""The transformers plug-in's suite, apart from the other: `make test-hf` runs it on each of HF_VERSIONS."""

from __future__ import annotations

import os
import random
import zlib

import pytest
import shared_with_tests  # noqa: F401
import torch
import torchvision_beside_cpu_torch  # noqa: F401

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure(config):
    os.environ.setdefault("SLOWFAST_TEST_SEED", str(random.SystemRandom().randrange(2**31)))  # workers inherit it
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_report_header():
    import transformers

    return f"slowfast: transformers {transformers.__version__}, SLOWFAST_TEST_SEED={os.environ['SLOWFAST_TEST_SEED']}"


def pytest_collection_modifyitems(items):
    """Longest first, so that parallel workers end together."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def norms_unknown() -> None:
    """As in a new process: the first model of a kind may be one that is loaded in half precision, on no device."""
    from slowfast_model.hf import norms  # transformers is imported after the above is set

    norms._asked.cache_clear()


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """A number of this test in this run; what is drawn without a generator is drawn from it."""
    number = zlib.crc32(f"{os.environ['SLOWFAST_TEST_SEED']} {request.node.nodeid}".encode())
    torch.manual_seed(number)
    return number
