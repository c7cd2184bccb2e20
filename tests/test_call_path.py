"""A call's way in C++: tensors read in one pass, index tensors looked at, structs filled; and that way in Python."""

from __future__ import annotations

import ctypes
import os
import warnings
from itertools import pairwise

import pytest
import torch
from cases import Shape, make_inputs
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import slowfast_kernels as sk
from slowfast_kernels import environment
from slowfast_kernels._extension import extension
from slowfast_kernels.calls import MergeTensors
from slowfast_kernels.ops import checks, dispatch
from slowfast_kernels.params import MERGE_SLOTS, GatedMixParams, MergeParams, Slot, addresses_of, kernel_call


@pytest.fixture(scope="module")
def read():
    found = dispatch.tensor_reader()
    if found is None:
        pytest.skip(f"torch {torch.__version__} has no C API for DLPack (it came with 2.10)")
    return found


@pytest.fixture
def by_parts(monkeypatch):
    """Python alone reads tensors, as before torch 2.10."""
    monkeypatch.setattr(dispatch, "tensor_reader", lambda: None)


# --------------------------------------------------------------------------------------------------- tensor_reader


def freed(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def zeros_without_memory(x: torch.Tensor) -> torch.Tensor:
    return torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device)


class Subclass(torch.Tensor):
    pass


PLAIN = {
    "as it is": lambda x: x,
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "followed": lambda x: x.float().requires_grad_(),
    "transposed": lambda x: x.t(),
    "every second": lambda x: x[:, ::2],
    "of as many columns, without gaps": lambda x: x[:, ::2].contiguous(),
    "some columns": lambda x: x[:, :5],
    "some columns beside a multiple of 16 bytes": lambda x: x[:, 1:],
    "expanded": lambda x: x[:1].expand(5, -1),
    "a stride of a row alone": lambda x: x.as_strided((1, 3), (7, 1)),
    "behind its first element": lambda x: x[1:],
    "without elements": lambda x: x[:0],
    "a number": lambda x: x[0, 0],
    "of many dimensions": lambda x: x.view(1, 1, 4, 1, 2, 1, 3),
    "freed": freed,
    "a lazy clone": torch.Tensor._lazy_clone,
    "in half precision": torch.Tensor.half,
    "of integers": torch.Tensor.int,
    "conjugated": lambda x: x.to(torch.complex64).conj(),
}
NOT_PLAIN = {
    "negated": torch._neg_view,
    "negated integers": lambda x: torch._neg_view(x.int()),
    "zeros without memory": zeros_without_memory,
    "zeros without memory behind their first": lambda x: zeros_without_memory(x)[2:],
    "meta": lambda x: x.to("meta"),
    "subclass": lambda x: x.as_subclass(Subclass),
    "subclass of a parameter": lambda x: torch.nn.Parameter(x.as_subclass(Subclass)),
    "fake": lambda x: FakeTensorMode().from_tensor(x),
    "sparse": torch.Tensor.to_sparse,
    "compressed": torch.Tensor.to_sparse_csr,
    "mkldnn": torch.Tensor.to_mkldnn,
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "quantized": lambda x: torch.quantize_per_tensor(x, 1.0, 0, torch.qint8),
    "uninitialized": lambda x: torch.nn.UninitializedParameter(),
    "numpy": torch.Tensor.numpy,
    "text": lambda x: "text",
}


def example() -> torch.Tensor:
    return torch.arange(24, dtype=torch.float32).view(4, 6)


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_tensor_is_read_as_python_reads_it(kind, read):
    x = PLAIN[kind](example())
    _, addresses = read((None, x))
    assert not dispatch.needs_torch_op(x)
    assert addresses == dispatch._signature_by_parts((None, x))[1] == addresses_of((None, x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_what_pytorch_or_the_checks_must_see_is_not_read(kind, read):
    x = NOT_PLAIN[kind](example())
    assert read((example(), x)) is None
    assert read((x,)) is None


def test_plain_tensors_are_told_apart_where_python_tells_them_apart(read):
    made = [make(example()) for make in PLAIN.values() for _ in range(2)] + [None]
    made += [example().to(dtype) for dtype in (torch.bfloat16, torch.int16, torch.bool, torch.float8_e4m3fn)]
    for x in made:
        for y in made:
            alike = dispatch._signature_by_parts((x,))[0] == dispatch._signature_by_parts((y,))[0]
            assert (read((x,))[0] == read((y,))[0]) == alike


@st.composite
def views(draw) -> torch.Tensor:
    """Of small sizes and strides, so that two are often alike."""
    dims = draw(st.integers(0, 3))
    sizes, strides = (draw(st.lists(st.integers(0, 2), min_size=dims, max_size=dims)) for _ in range(2))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int32, torch.uint8]))
    return torch.zeros(64, dtype=dtype).as_strided(sizes, strides, draw(st.sampled_from([0, 1, 16])))


@given(st.lists(st.none() | views(), max_size=4), st.lists(st.none() | views(), max_size=4))
def test_lists_of_tensors_are_told_apart_where_python_tells_them_apart(read, some, others):
    some, others = tuple(some), tuple(others)
    parts, other_parts = dispatch._signature_by_parts(some), dispatch._signature_by_parts(others)
    found, other_found = read(some), read(others)
    assert (found[0] == other_found[0]) == (parts[0] == other_parts[0])
    assert (found[1], other_found[1]) == (parts[1], other_parts[1])


def test_a_function_mode_sees_what_is_asked_of_tensors(read):
    """As where Python asks; a mode may be what refuses."""

    class Refusing(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            raise ZeroDivisionError

    with Refusing(), pytest.raises(ZeroDivisionError):
        read((torch.zeros(3),))


def test_a_table_of_another_dlpack_is_not_used():
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    table = (ctypes.c_uint64 * 8)(2, *[1] * 7)  # major version 2
    name = b"dlpack_exchange_api"
    for capsule in (new_capsule(ctypes.addressof(table), name, None), new_capsule(1, b"another", None), "text"):
        assert extension().tensor_reader(capsule, torch.Tensor, torch.nn.Parameter) is None
    table[0], table[5] = 1, 0  # major version 1, without the function
    capsule = new_capsule(ctypes.addressof(table), name, None)
    assert extension().tensor_reader(capsule, torch.Tensor, torch.nn.Parameter) is None


def test_a_dispatch_mode_sees_calls_of_plain_tensors():
    seen = []

    class Seeing(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    inputs = make_inputs(Shape(((2, 5),)), torch.float32, "cpu", torch.Generator().manual_seed(0))
    with Seeing():
        sk.text_cross_attention(*inputs.attention)
    assert "slowfast::text_cross_attention" in seen


# --------------------------------------------------------------------------------------------- the same both ways


def outcome(call) -> tuple:
    try:
        return "result", call()
    except Exception as error:
        return type(error), str(error)


def makes(kind: str, x: torch.Tensor) -> bool:
    """There is such a tensor of that shape and dtype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return (PLAIN | NOT_PLAIN)[kind](x) is not None
        except (RuntimeError, IndexError):
            return False


ARGUMENTS = {"state": example(), "context": example(), "text_rows": torch.arange(4, dtype=torch.int32)}
ARGUMENTS |= {"gate_weight": torch.ones(6), "gate_bias": torch.ones(1), "warm_up": torch.ones(1)}
REPLACED = [(kind, name) for kind in (*PLAIN, *NOT_PLAIN) for name in ARGUMENTS if makes(kind, ARGUMENTS[name])]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize(("kind", "name"), REPLACED)
def test_a_call_is_answered_or_refused_as_where_python_reads_its_tensors(kind, name, backend, request):
    given = ARGUMENTS | {name: (PLAIN | NOT_PLAIN)[kind](ARGUMENTS[name])}
    found = outcome(lambda: sk.gated_residual_mix(**given, backend=backend))
    request.getfixturevalue("by_parts")
    expected = outcome(lambda: sk.gated_residual_mix(**given, backend=backend))
    assert found[0] == expected[0]
    if found[0] != "result":
        assert found[1] == expected[1]
    elif found[1].is_meta:
        assert found[1].shape == expected[1].shape
    else:
        assert torch.equal(found[1], expected[1])


def test_a_backward_pass_gives_the_same_bits(request):
    inputs = make_inputs(Shape(((2, 5), (1, 3)), other_rows=0), torch.float32, "cpu", torch.Generator().manual_seed(0))

    def gradients():
        state, q, slow_kv = (x.clone().requires_grad_() for x in (inputs.state, inputs.q, inputs.slow_kv))
        places = (inputs.cu_slow, inputs.text_rows, inputs.cu_text)
        out = sk.slowfast_cross_attention(state, q, slow_kv, *places, *inputs.gating, backend="cpu")
        return torch.autograd.grad(out.square().sum(), (state, q, slow_kv))

    found = gradients()
    request.getfixturevalue("by_parts")
    assert all(map(torch.equal, found, gradients()))


# ----------------------------------------------------------------------------------------------------- environment


def test_a_variable_is_what_the_environment_says_now(monkeypatch):
    variable = environment.Variable("SLOWFAST_OF_A_TEST")
    assert variable.get() is None
    for value in ("cpu", "", "é"):
        monkeypatch.setenv("SLOWFAST_OF_A_TEST", value)
        assert variable.get() == value
    monkeypatch.delenv("SLOWFAST_OF_A_TEST")
    assert variable.get() is None


def test_a_variable_is_found_in_a_mapping_that_stands_in_for_the_environment(monkeypatch):
    monkeypatch.setattr(os, "environ", {"SLOWFAST_BACKEND": "eager"})
    assert environment.BACKEND.get() == "eager"
    assert environment.DEBUG.get() is None


# ----------------------------------------------------------------------------------------------------- index_check


def passes(kind: str, values: list[int], total: int) -> bool:
    x = torch.tensor(values, dtype=torch.int32)
    check = extension().index_check([("rows", 0, 0, 0), (kind, 1, x.numel(), total)])
    return check(addresses_of((None, x)))


INDICES = {
    "prefix_sums": checks.check_prefix_sums,
    "pieces": lambda name, x, *total: checks.check_pieces(name, x.view(-1, 2), *total),
    "rows": checks.check_rows,
}


@given(st.sampled_from(list(INDICES)), st.lists(st.integers(-1, 4), min_size=2, max_size=4), st.integers(0, 4))
def test_indices_pass_where_python_s_checks_pass_and_rows_if_they_ascend(kind, values, total):
    values = values[: len(values) // 2 * 2]
    if kind == "prefix_sums":
        values[0], values[-1] = min(values[0], 0), max(values[-1], total)  # often right
    try:
        INDICES[kind]("x", torch.tensor(values, dtype=torch.int32), "total", total)
        right = True
    except ValueError:
        right = False
    ascend = all(a < b for a, b in pairwise(values))
    assert passes(kind, values, total) == (right and (kind != "rows" or ascend))


@pytest.mark.parametrize(
    ("kind", "values", "total", "right"),
    [
        ("prefix_sums", [0, 2, 2, 5], 5, True),
        ("prefix_sums", [0], 0, True),
        ("prefix_sums", [0, 3, 2, 5], 5, False),
        ("prefix_sums", [1, 2, 5], 5, False),
        ("prefix_sums", [0, 2, 4], 5, False),
        ("pieces", [], 5, True),
        ("pieces", [4, 5, 0, 0], 5, True),
        ("pieces", [0, 1, -1, 2], 5, False),
        ("pieces", [3, 2], 5, False),
        ("pieces", [0, 6], 5, False),
        ("rows", [], 0, True),
        ("rows", [0, 2, 4], 5, True),
        ("rows", [2, 0], 5, False),
        ("rows", [1, 1], 5, False),
        ("rows", [-1, 0], 5, False),
        ("rows", [0, 5], 5, False),
    ],
)
def test_indices_that_are_right_and_wrong(kind, values, total, right):
    assert passes(kind, values, total) == right


def test_indices_without_memory_are_looked_at_in_python():
    assert not extension().index_check([("rows", 0, 2, 5)])(addresses_of((None,)))


def test_index_check_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="columns"):
        extension().index_check([("columns", 0, 1, 1)])
    with pytest.raises(IndexError, match="fewer addresses"):
        extension().index_check([("rows", 1, 1, 1)])(addresses_of((None,)))


def test_rows_in_any_order_are_read_on_a_cpu():
    state, context = example(), torch.ones(2, 6)
    gate = (None, None, None)
    for rows in ([0, 3], [3, 0]):
        out = sk.gated_residual_mix(state, context, torch.tensor(rows, dtype=torch.int32), *gate, gate="none")
        assert torch.equal(out[rows], state[rows] + 1)


# ----------------------------------------------------------------------------------------------------- kernel_call


def recorded(struct: type, seen: list):
    def kernel(*arguments) -> None:
        *addresses, last = arguments
        seen.append(([struct.from_buffer_copy(struct.from_address(x)) for x in addresses], last))

    return kernel


def test_a_kernel_gets_the_structs_with_the_addresses_of_the_call():
    seen, params = [], (MergeParams(num_text=3), MergeParams(num_heads=7))
    merges = [(struct, MERGE_SLOTS) for struct in params]
    call = kernel_call(recorded(MergeParams, seen), MergeTensors, ("context", "lse"), *merges)
    tensors = [torch.zeros(4) for _ in range(6)]
    call(addresses_of(tensors[:4]), *(x.data_ptr() for x in tensors[4:]), "last")
    ((first, second), last) = seen[0]
    assert last == "last"
    assert (first.num_text, second.num_heads) == (3, 7)
    for struct in (first, second):
        assert [getattr(struct, slot.field) for slot in MERGE_SLOTS] == [x.data_ptr() for x in tensors]
    assert params[0].context is None  # each call fills a copy


def test_a_slot_may_lie_behind_an_address_but_not_behind_none():
    seen = []
    slots = [Slot("lse_a", "lse_a", 12), Slot("lse_b", "lse_b", 12), Slot("lse", "context_a"), Slot("lse", "made", 4)]
    call = kernel_call(recorded(MergeParams, seen), MergeTensors, ("made",), (MergeParams(), slots))
    lse = torch.zeros(8)
    call(addresses_of((None, lse, None, None)), 400, 0)
    ((struct,), _) = seen[0]
    assert (struct.lse_a, struct.lse_b, struct.lse) == (lse.data_ptr() + 12, None, 404)  # of two, the later slot counts


def test_a_slot_may_be_a_field_s_own():
    seen = []
    slots = [Slot("gate.warm_up", "made")]
    call = kernel_call(recorded(GatedMixParams, seen), MergeTensors, ("made",), (GatedMixParams(rows=5), slots))
    call(addresses_of([None] * 4), 48, 0)
    ((struct,), _) = seen[0]
    assert (struct.gate.warm_up, struct.gate.weight, struct.rows) == (48, None, 5)


def test_what_a_kernel_raises_comes_through():
    def kernel(*arguments):
        raise ZeroDivisionError("in the kernel")

    call = kernel_call(kernel, MergeTensors, (), (MergeParams(), MERGE_SLOTS[:4]))
    with pytest.raises(ZeroDivisionError, match="in the kernel"):
        call(addresses_of([None] * 4), 0)


def test_a_kernel_s_call_takes_the_addresses_that_it_was_made_for():
    call = kernel_call(recorded(MergeParams, []), MergeTensors, ("context", "lse"), (MergeParams(), MERGE_SLOTS))
    found = addresses_of([None] * 4)
    for arguments in ((found, 1, 2), (found, 1, 2, 3, 4), (found[8:], 1, 2, 3), (found + found, 1, 2, 3)):
        with pytest.raises(TypeError, match="another number of addresses"):
            call(*arguments)
    with pytest.raises(TypeError):
        call(found, "text", 2, 3)


def test_slots_lie_in_their_structs():
    make = extension().kernel_call
    make(print, [bytes(16)], [(0, 8, 0, 0)], 1, 0)
    for slot in ((0, 9, 0, 0), (0, 8, 1, 0), (1, 0, 0, 0), (0, 2**64 - 4, 0, 0)):
        with pytest.raises(IndexError):
            make(print, [bytes(16)], [slot], 1, 0)
    with pytest.raises(ValueError, match="too much"):
        make(print, [bytes(2000)], [], 1, 0)
    with pytest.raises(ValueError, match="too much"):
        make(print, [bytes(8)] * 3, [], 1, 0)
