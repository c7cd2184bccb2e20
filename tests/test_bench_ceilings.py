"""The ceilings that rows are held to: the best of several codes, in bytes and operations of what they did."""

from __future__ import annotations

import pytest
import torch

from bench import ceilings
from bench.timing import Timing

CPU = torch.device("cpu")
BYTES = 4 * 2**25  # of the buffer that a CPU reads and copies


@pytest.fixture
def clock(monkeypatch):
    """Gives the calls that are timed these many microseconds, in their order; each is made once, so that it works."""

    def of(*p20_us: float) -> None:
        left = iter(p20_us)

        def time_calls(calls, device, budget_s):
            for call in calls:
                call()
            us = next(left)
            return Timing(median_us=1e9, p20_us=us, p80_us=1e9, samples=3, method="clock")

        monkeypatch.setattr(ceilings, "time_calls", time_calls)

    return of


def test_bandwidths_are_those_of_the_fastest_reader_and_copier_and_a_copy_counts_both_ways(clock):
    clock(30, 10, 20, 50, 40)  # three readers, two copiers
    read, copy = ceilings._bandwidths(CPU, 0.0)
    assert read == pytest.approx(BYTES / 10 / 1e3)
    assert copy == pytest.approx(2 * BYTES / 40 / 1e3)


def test_a_gemm_counts_a_multiplication_and_an_addition(clock):
    clock(1000)
    assert ceilings._gemm_tflops(CPU, "float32", 0.0) == pytest.approx(2 * 1536**3 / 1000 / 1e6)


def test_every_dtype_has_its_own_rate(clock):
    clock(30, 10, 20, 50, 40, 1000, 500)
    measured = ceilings.measure(CPU, ["float32", "bfloat16"])
    assert measured.gemm_tflops["bfloat16"] == pytest.approx(2 * measured.gemm_tflops["float32"], rel=1e-2)
