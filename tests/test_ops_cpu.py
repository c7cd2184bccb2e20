"""The cpu backend in every form that it can take: instruction sets and numbers of threads."""

import os
import subprocess
import sys

import pytest
import reference
import torch
from cases import RAGGED, VIDEOS, make_frames, make_inputs
from child import run_tests

import slowfast_kernels as sk

FILES = ["test_ops_attention.py", "test_ops_fused.py", "test_ops_gated_mix.py", "test_ops_pool.py", "test_ops_fuzz.py"]


@pytest.mark.slow
@pytest.mark.parametrize("level", ["plain", "avx2", "avx512"])
def test_the_ops_pass_with_every_instruction_set(level):
    code = "from slowfast_kernels._extension import extension; print(extension().cpu_isa())"
    environment = os.environ | {"SLOWFAST_CPU_ISA": level}
    probe = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(probe.stderr.splitlines()[-1])
    assert probe.stdout.strip() == level
    run_tests(FILES, 250, "cpu", SLOWFAST_CPU_ISA=level, SLOWFAST_EXAMPLES="4", SLOWFAST_FUZZ="12")


def test_an_unknown_instruction_set_is_named_with_those_there_are():
    environment = os.environ | {"SLOWFAST_CPU_ISA": "mmx"}
    code = "from slowfast_kernels._extension import extension; extension().cpu_isa()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "ValueError: SLOWFAST_CPU_ISA: got 'mmx', want one that this CPU has" in done.stderr
    assert "plain" in done.stderr


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [2, 3, 13])
def test_the_number_of_threads_changes_no_bit(count, threads, rng):
    """With the splits fixed; the automatic number of splits may follow the number of threads."""
    inputs = make_inputs(RAGGED, torch.bfloat16, "cpu", rng())
    frames = make_frames(VIDEOS[3], torch.bfloat16, "cpu", rng())

    def run():
        fused = sk.slowfast_cross_attention(*inputs.fused, num_splits=3, backend="cpu")
        counts, grid = list(VIDEOS[3].frame_counts), VIDEOS[3].grid
        pooled = sk.slowfast_pool(frames, counts, grid, **VIDEOS[3].strides, norm_eps=1e-6, backend="cpu")
        return fused, pooled.slow, pooled.fast

    threads(1)
    expected = run()
    threads(count)
    for _ in range(5):
        assert all(reference.same_bits(x, y) for x, y in zip(run(), expected, strict=True))
