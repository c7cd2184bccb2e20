"""The contract of csrc/params.h and its Python side: the same codes and the same fields on both, and no other."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from cases import Shape, make_inputs

from slowfast_kernels import params
from slowfast_kernels._extension import extension
from slowfast_kernels.calls import BackwardTensors
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


@pytest.mark.parametrize("apart", [False, True])
def test_some_kv_heads_of_a_backward_call_begin_where_their_tensors_do(apart):
    inputs = make_inputs(Shape(((3, 20), (2, 9)), (8, 4), 16, 2), torch.bfloat16, "cpu", torch.Generator()).tensors
    if apart:
        inputs = inputs._replace(slow_kv=inputs.slow_kv[:, :, 0], slow_values=inputs.slow_kv[:, :, 1].contiguous())
    keys, values = inputs.keys, inputs.slow_values if apart else inputs.slow_kv[:, :, 1]
    context, lse = torch.zeros(5, 8, 16).bfloat16(), torch.zeros(5, 8)
    grads = torch.zeros(8, 5, 16).bfloat16().transpose(0, 1), torch.zeros(8, 5).t()
    grad_q, grad_kv, grad_values = torch.zeros_like(inputs.q), torch.zeros(29, 4, 2 - apart, 16).bfloat16(), None
    if apart:
        grad_kv, grad_values = grad_kv[:, :, 0], grad_kv.clone()[:, :, 0]
    made = params.attention_backward_params(inputs, 1.0, 0)
    held = params.fill_attention_backward(made, BackwardTensors(grads, (context, lse), inputs))
    params.fill_attention_gradients(made, inputs, (grad_q, grad_kv, grad_values))
    params.take_kv_heads(made, 1, 2, 2)
    assert (made.forward.num_q_heads, made.forward.num_kv_heads) == (4, 2)
    wanted = {"q": inputs.q, "context": context, "lse": lse, "grad_context": grads[0], "grad_lse": grads[1]}
    found = {name: getattr(made.forward if hasattr(made.forward, name) else made, name) for name in wanted}
    assert found == {name: x[:, 2:].data_ptr() for name, x in wanted.items()}
    assert made.grad_q == grad_q[:, 2:].data_ptr()
    assert (made.forward.keys, made.forward.values) == (keys[:, 1:].data_ptr(), values[:, 1:].data_ptr())
    of_values = grad_values[:, 1:] if apart else grad_kv[:, 1:, 1]
    assert (made.grad_keys, made.grad_values) == (grad_kv[:, 1:].data_ptr(), of_values.data_ptr())
    del held


def test_what_a_call_does_not_have_stays_a_null_pointer():
    made = params.CrossAttentionBackwardParams(forward=params.CrossAttentionParams(num_q_heads=8, num_kv_heads=4))
    params.take_kv_heads(made, 2, 2, 2)
    assert made.grad_lse is None
    assert made.forward.q is None
