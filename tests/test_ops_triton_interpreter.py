"""The Triton backend on a machine without a GPU: the same tests under Triton's interpreter.

The interpreter is chosen when triton is imported, hence the child process. It is right in float32 and silently wrong in
bfloat16, so float32 it is; races and shared memory it does not know, and those wait for a GPU.
"""

import pytest
from child import run_tests
from targets import HAS_GPU, INTERPRETER

from slowfast_kernels._extension import interpreter_reason

pytest.importorskip("triton", reason="triton is not installed")
PARTS = {  # what runs, and at least how many tests that must be
    "golden": (["test_golden_ops.py"], 75),
    "attention": (["test_ops_attention.py"], 40),
    "fused": (["test_ops_fused.py", "test_ops_fuzz.py"], 42),
    "rest": (["test_ops_pool.py", "test_ops_gated_mix.py", "test_torch_integration.py"], 95),
    "backward": (["test_ops_backward.py", "test_ops_backward_asked.py"], 50),
    "backward of mix and pool": (["test_ops_backward_mix_pool.py"], 85),
    "visible": (["test_ops_visible.py", "test_ops_merge.py"], 70),
    "tensors": (["test_ops_numbers.py", "test_ops_tensor_kinds.py"], 45),
}


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU, reason="Triton is tested on the GPU itself")
@pytest.mark.skipif(INTERPRETER, reason="this is the child process")
@pytest.mark.skipif(bool(interpreter_reason()), reason=interpreter_reason())
@pytest.mark.parametrize("part", PARTS)
def test_the_suite_passes_under_the_interpreter(part):
    files, at_least = PARTS[part]
    run_tests(files, at_least, "triton", TRITON_INTERPRET="1", SLOWFAST_EXAMPLES="5", SLOWFAST_FUZZ="4")
