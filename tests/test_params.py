"""The contract of csrc/params.h and its Python side: the same codes and the same fields on both, and no other."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from slowfast_kernels import params
from slowfast_kernels._extension import extension
from slowfast_kernels.dtypes import DTYPE_CODES, KERNEL_DTYPES
from slowfast_kernels.gate import GATE_CODES, GATES

CSRC = Path(__file__).resolve().parents[1] / "csrc"
PARAMS = (CSRC / "params.h").read_text()
HEADERS = PARAMS + "".join((CSRC / "cuda" / "cross_attention" / f"{x}.h").read_text() for x in ("launch", "backward"))
CTYPES = {
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "bool": ctypes.c_bool,
    "DType": ctypes.c_int32,
    "GateKind": ctypes.c_int32,
    "GateParams": params.GateParams,
    "CrossAttentionParams": params.CrossAttentionParams,
}


def enum_codes(name: str) -> dict[str, int]:
    body = re.search(rf"enum class {name} : int32_t {{(.*?)}}", PARAMS, re.S)[1]
    return {key.lower(): int(code) for key, code in re.findall(r"k(\w+) = (\d+)", body)}


def struct_fields(name: str) -> list[tuple[str, type]]:
    """(name, ctypes type) of the members that C++ declares, in order."""
    body = re.sub(r"//[^\n]*", "", re.search(rf"struct {name} {{(.*?)\n}};", HEADERS, re.S)[1])
    fields = []
    for declaration in filter(None, map(str.strip, body.split(";"))):
        kind, names = re.fullmatch(r"((?:const )?\w+)\s*(.*)", declaration, re.S).groups()
        for field in re.split(r",\s*", names):
            is_pointer = field.startswith("*")
            fields.append((field.lstrip("* "), ctypes.c_void_p if is_pointer else CTYPES[kind]))
    return fields


def test_gates_have_one_code_in_python_and_cpp():
    assert enum_codes("GateKind") == GATE_CODES
    assert int(re.search(r"kNumGateKinds = (\d+)", PARAMS)[1]) == len(GATE_CODES)
    assert set(GATE_CODES) == {*GATES, "given"}


def test_dtypes_have_one_code_in_python_and_cpp():
    assert enum_codes("DType") == {str(k).removeprefix("torch."): v for k, v in DTYPE_CODES.items()}
    assert int(re.search(r"kNumDTypes = (\d+)", PARAMS)[1]) == len(DTYPE_CODES)
    assert set(DTYPE_CODES) == set(KERNEL_DTYPES)


@pytest.mark.parametrize("struct", params.STRUCTS, ids=lambda struct: struct.__name__)
def test_a_struct_has_the_same_fields_in_python_and_cpp(struct):
    assert list(struct._fields_) == struct_fields(struct.__name__)


@pytest.mark.parametrize("struct", params.STRUCTS, ids=lambda struct: struct.__name__)
def test_a_struct_has_the_size_that_the_build_has(struct):
    sizes = extension().struct_sizes
    if struct.__name__ not in sizes:
        pytest.skip("the extension was built without the Hopper kernels")
    assert ctypes.sizeof(struct) == sizes[struct.__name__]


def test_an_extension_that_was_built_from_another_header_is_refused(monkeypatch):
    from slowfast_kernels import _extension

    monkeypatch.setattr(params, "STRUCTS", (*params.STRUCTS[1:], type("GateParams", (ctypes.Structure,), {})))
    module, why = _extension._load.__wrapped__()
    assert module is None
    assert "was built from another csrc/params.h" in why


@pytest.mark.parametrize(
    ("field", "message"), [("kind", "gate: a kind that this build does not know"), ("dtype", "dtype: a code")]
)
def test_a_code_that_the_build_does_not_know_is_refused(field, message):
    mix = params.GatedMixParams(dtype=1)
    setattr(mix.gate if field == "kind" else mix, field, 99)
    with pytest.raises(ValueError, match=message):
        extension().cpu_gated_mix(ctypes.addressof(mix), 1)
