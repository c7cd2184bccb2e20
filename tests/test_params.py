"""The contract of csrc/params.h and its Python side: the same codes on both, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from slowfast_kernels.gate import GATE_CODES, GATES
from slowfast_kernels.heuristics import FLOAT_DTYPES
from slowfast_kernels.params import DTYPE_CODES

PARAMS = (Path(__file__).resolve().parents[1] / "csrc" / "params.h").read_text()


def enum_codes(name: str) -> dict[str, int]:
    body = re.search(rf"enum class {name} : int32_t {{(.*?)}}", PARAMS, re.S)[1]
    return {key.lower(): int(code) for key, code in re.findall(r"k(\w+) = (\d+)", body)}


def test_gates_have_one_code_in_python_and_cpp():
    assert enum_codes("GateKind") == GATE_CODES
    assert int(re.search(r"kNumGateKinds = (\d+)", PARAMS)[1]) == len(GATE_CODES)
    assert set(GATE_CODES) == {*GATES, "given"}


def test_dtypes_have_one_code_in_python_and_cpp():
    assert enum_codes("DType") == {str(k).removeprefix("torch."): v for k, v in DTYPE_CODES.items()}
    assert set(DTYPE_CODES) == set(FLOAT_DTYPES)


def test_a_kind_of_gate_that_the_build_does_not_know_is_refused():
    from slowfast_kernels._extension import extension

    row = torch.zeros(1, 8)
    pointers = (row.data_ptr(), row.data_ptr(), 0, row.data_ptr(), 0, 0, 0, 0)
    with pytest.raises(ValueError, match="a kind that this build does not know"):
        extension().cpu_gated_mix(*pointers, 0, len(GATE_CODES), False, 1, 0, 8, 8, 8, 0, 1)
