"""What is kept between calls: one prepared call a signature, so many of them, and what a signature tells apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cases import Shape, make_inputs

import slowfast_kernels as sk
from slowfast_kernels import _extension, cpu
from slowfast_kernels.calls import (
    AttentionOptions,
    AttentionTensors,
    BackwardTensors,
    FusedOptions,
    FusedTensors,
    MergeOptions,
    MergeTensors,
    MixOptions,
    MixTensors,
)
from slowfast_kernels.ops import attention, fused, gated_mix, op
from slowfast_kernels.ops.dispatch import SignatureCache, signature
from slowfast_kernels.params import CrossAttentionParams, GatedMixParams, MergeParams, addresses_of

SHAPE = Shape(((2, 5), (3, 8)), dim=64)


@pytest.fixture
def inputs(rng):
    return make_inputs(SHAPE, torch.float32, "cpu", rng())


@pytest.fixture
def prepared(monkeypatch):
    """The calls of text_cross_attention that were prepared, not served by an earlier one; none is kept from before."""
    attends, seen = attention._OP, []
    real = attends.prepare

    def prepare(tensors, options):
        seen.append((tensors, options))
        return real(tensors, options)

    monkeypatch.setattr(attends, "prepare", prepare)
    monkeypatch.setattr(attends, "prepared", SignatureCache())
    return seen


def moved(x: torch.Tensor, elements: int) -> torch.Tensor:
    """The same values, strides and shape, ``elements`` behind a multiple of 16 bytes."""
    storage = x.new_zeros(x.numel() + 16)
    first = -storage.data_ptr() // x.element_size() % (16 // x.element_size()) + elements
    return storage[first : first + x.numel()].view(x.shape).copy_(x)


# ------------------------------------------------------------------------------------------------ what is kept


def test_a_call_of_the_same_signature_is_prepared_once(inputs, prepared):
    for _ in range(3):
        sk.text_cross_attention(*inputs.attention)
    assert len(prepared) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"softmax_scale": 0.5},
        {"return_lse": True},
        {"num_splits": 2},
        {"backend": "eager"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_option_is_part_of_the_signature(change, inputs, prepared):
    plain = sk.text_cross_attention(*inputs.attention)
    changed = sk.text_cross_attention(*inputs.attention, **change)
    assert len(prepared) == 2
    if "softmax_scale" in change:
        assert not torch.equal(plain, changed)


def test_the_backend_of_a_block_is_part_of_the_signature(inputs, prepared):
    sk.text_cross_attention(*inputs.attention)
    with sk.use_backend("eager"):
        sk.text_cross_attention(*inputs.attention)
    assert len(prepared) == 2


def test_strides_are_part_of_the_signature(inputs, prepared):
    q, *rest = inputs.attention
    wider = torch.zeros(*q.shape[:2], 2 * q.shape[2])[..., : q.shape[2]].copy_(q)
    expected = sk.text_cross_attention(q, *rest)
    assert torch.equal(sk.text_cross_attention(wider, *rest), expected)
    assert len(prepared) == 2


@pytest.mark.parametrize("which", range(2), ids=["q", "slow_kv"])
def test_where_memory_begins_is_part_of_the_signature_by_multiples_of_16_bytes(which, inputs, prepared):
    for elements in (0, 1, 4, 2):  # of 4 bytes: twice on a multiple, twice beside one
        arguments = list(inputs.attention)
        arguments[which] = moved(arguments[which], elements)
        sk.text_cross_attention(*arguments)
    assert len(prepared) == 2


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_prepared_call_reads_the_tensors_of_the_call_and_not_those_that_it_was_prepared_with(backend, rng):
    generator = rng()
    first, second = (make_inputs(SHAPE, torch.float32, "cpu", generator) for _ in range(2))
    sk.slowfast_cross_attention(*first.fused, backend=backend)
    found = sk.slowfast_cross_attention(*second.fused, backend=backend)
    expected = sk.slowfast_cross_attention(*(x.double() if x.is_floating_point() else x for x in second.fused))
    rows = second.text_rows.long()
    torch.testing.assert_close(found[rows], expected[rows].float())


@pytest.mark.parametrize(
    ("name", "kernel", "params", "field"),
    [
        ("text_cross_attention", "cpu_cross_attention", CrossAttentionParams, "context"),
        ("cross_attention", "cpu_cross_attention", CrossAttentionParams, "out"),
        ("gated_residual_mix", "cpu_gated_mix", GatedMixParams, "out"),
        ("merge_attention", "cpu_merge", MergeParams, "context"),
    ],
)
def test_a_call_leaves_one_of_another_thread_alone(name, kernel, params, field, inputs, monkeypatch):
    """Kernels run without Python's lock: here a second call begins while the first one's kernel is about to read."""
    context = inputs.q[inputs.text_rows.long()]
    lse = torch.zeros(context.shape[:2])
    tensors, options = {
        "text_cross_attention": (inputs.tensors, AttentionOptions(None, False, 0, "cpu")),
        "cross_attention": (
            FusedTensors(inputs.state, *inputs.tensors, *inputs.gating, None),
            FusedOptions(None, 0, "tanh", True, "cpu"),
        ),
        "gated_residual_mix": (
            MixTensors(inputs.state, context.flatten(1), inputs.text_rows, *inputs.gating, None),
            MixOptions("tanh", True, "cpu"),
        ),
        "merge_attention": (MergeTensors(context, lse, context, lse), MergeOptions("cpu")),
    }[name]
    written = []

    def reads_late(address: int, _: int) -> None:
        mine = getattr(params.from_address(address), field)
        written.append(mine)
        if len(written) == 1:
            run(tensors)
        assert getattr(params.from_address(address), field) == mine

    monkeypatch.setattr(cpu, "extension", lambda: SimpleNamespace(**{kernel: reads_late}))
    run = getattr(cpu, f"prepare_{name}")(tensors, options)
    kept = run(tensors)
    assert len(set(written)) == 2, kept


def test_a_cpu_s_splits_follow_the_threads_of_each_call(inputs, prepared, monkeypatch):
    seen = []
    stand_in = SimpleNamespace(cpu_cross_attention=lambda params, threads: seen.append(threads))
    monkeypatch.setattr(cpu, "extension", lambda: stand_in)
    for threads in (3, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        sk.text_cross_attention(*inputs.attention, backend="cpu")
    assert len(prepared) == 1
    assert seen == [3, 5]


def test_so_many_signatures_are_kept_and_calls_beyond_them_answer_as_before(inputs, monkeypatch):
    monkeypatch.setattr(SignatureCache, "SIZE", 4)
    monkeypatch.setattr(attention._OP, "prepared", SignatureCache())
    first = sk.text_cross_attention(*inputs.attention)
    for scale in range(1, 20):
        sk.text_cross_attention(*inputs.attention, softmax_scale=float(scale))
        assert 1 <= len(attention._OP.prepared) <= 4
    assert torch.equal(sk.text_cross_attention(*inputs.attention), first)


def test_a_cache_is_bounded_in_everyday_use():
    assert SignatureCache.SIZE <= 4096


# ------------------------------------------------------------------------------------ what each call looks at afresh


def test_data_is_looked_at_in_every_call(inputs):
    sk.text_cross_attention(*inputs.attention)
    inputs.cu_text[1] = 100
    with pytest.raises(ValueError, match="cu_text"):
        sk.text_cross_attention(*inputs.attention)


def test_data_is_looked_at_under_a_transform(inputs):
    inputs.cu_text[1] = 100
    q, *rest = inputs.attention
    with pytest.raises(ValueError, match="cu_text"):
        torch.func.jvp(lambda q: sk.text_cross_attention(q, *rest), (q,), (q,))


def test_arguments_are_checked_under_a_transform(inputs):
    q, slow_kv, *rest = inputs.attention
    with pytest.raises(ValueError, match="slow_kv"):
        torch.func.jvp(lambda q: sk.text_cross_attention(q, slow_kv[..., :1], *rest), (q,), (q,))


@pytest.mark.parametrize(("debug", "reads"), [(None, False), ("0", False), ("1", True)])
def test_data_on_a_gpu_is_looked_at_when_debugging_alone(debug, reads, monkeypatch):
    monkeypatch.delenv("SLOWFAST_DEBUG", raising=False)
    if debug is not None:
        monkeypatch.setenv("SLOWFAST_DEBUG", debug)
    assert attention.checks.reads_device_data(torch.empty(0, device="meta")) == reads  # as on any other device
    assert attention.checks.reads_device_data(torch.empty(0))


def test_data_on_a_gpu_is_looked_at_in_the_calls_that_debug(monkeypatch):
    on_gpu = [
        torch.empty(4, 6, device="meta"),
        *[torch.empty(4, device="meta")] * 2,
        *[None] * 4,
    ]  # as any other device
    passes = gated_mix._OP._quick_check(MixTensors(*on_gpu))
    for debug, skipped in ((None, True), ("1", False), ("0", True)):
        monkeypatch.delenv("SLOWFAST_DEBUG", raising=False)
        if debug is not None:
            monkeypatch.setenv("SLOWFAST_DEBUG", debug)
        assert passes(b"") == skipped


@pytest.mark.parametrize("missing", [None, "not here"])
def test_without_the_extension_data_on_a_cpu_is_looked_at_in_python(missing, monkeypatch):
    monkeypatch.setattr(op, "missing_reason", lambda: missing)
    tensors = MixTensors(torch.ones(4, 6), torch.ones(4, 6), torch.arange(4, dtype=torch.int32), *[None] * 4)
    assert gated_mix._OP._quick_check(tensors)(addresses_of(tensors)) == (missing is None)


def test_of_what_has_no_signature_nothing_is_kept(inputs, prepared, monkeypatch):
    monkeypatch.setattr(op, "signature", lambda tensors: None)
    monkeypatch.setattr(op, "read_plain", lambda tensors: None)
    for _ in range(2):
        sk.text_cross_attention(*inputs.attention, backend="eager")
    assert len(prepared) == 2


def test_of_gradients_without_a_signature_nothing_is_kept(inputs, monkeypatch):
    tensors, made = AttentionTensors(*inputs.attention), []
    results = sk.text_cross_attention(*inputs.attention, return_lse=True, backend="eager")
    call = BackwardTensors((torch.ones_like(results[0]), None), results, tensors)
    prepare = attention._OP._prepare_backward
    monkeypatch.setattr(attention._OP, "_prepare_backward", lambda *given: made.append(given) or prepare(*given))
    monkeypatch.setattr(op, "signature", lambda tensors: None)
    for _ in range(2):
        attention._OP.run_backward(call, AttentionOptions(None, True, 0, "eager"), (True, True, False))
    assert len(made) == 2


# ----------------------------------------------------------------------------------- what the choice of a backend sees


def facts(inputs, scale: float | None = None, **changes):
    tensors = AttentionTensors(*inputs.attention)._replace(**changes)
    return attention.attention_facts("text_cross_attention", tensors, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["q", "slow_kv"])
def test_rows_and_beginnings_on_multiples_of_16_bytes_are_aligned(name, dtype, rng):
    inputs = make_inputs(SHAPE, dtype, "cpu", rng())
    x, unit = getattr(inputs, name), 16 // dtype.itemsize
    assert facts(inputs, **{name: moved(x, 0)}).aligned
    assert facts(inputs, **{name: moved(x, unit)}).aligned
    for elements in (1, unit // 2):
        assert not facts(inputs, **{name: moved(x, elements)}).aligned
    for between, aligned in ((unit, True), (unit // 2, False), (1, False)):  # elements between two rows
        apart = torch.zeros(*x.shape[:-1], x.shape[-1] + between, dtype=dtype)[..., : x.shape[-1]]
        assert facts(inputs, **{name: apart}).aligned == aligned


def test_a_row_that_stands_for_many_is_not_aligned(inputs):
    assert not facts(inputs, q=inputs.q[:1].expand_as(inputs.q)).aligned


@pytest.mark.parametrize("name", ["state", "gate_weight"])
def test_the_fused_op_looks_at_the_state_and_the_gate_s_weight_too(name, inputs):
    tensors = FusedTensors(**{field: getattr(inputs, field, None) for field in FusedTensors._fields})
    options = FusedOptions(None, 0, "tanh", True, None)
    assert fused._OP.facts(tensors, options).aligned
    assert not fused._OP.facts(tensors._replace(**{name: moved(getattr(tensors, name), 1)}), options).aligned


@pytest.mark.parametrize(("scale", "positive"), [(None, True), (1e-3, True), (0.0, False), (-1.0, False)])
def test_a_scale_of_zero_or_less_is_told_apart(scale, positive, inputs):
    assert facts(inputs, scale).positive_scale == positive


@pytest.mark.parametrize(("archs", "has"), [(["sm_80", "sm_90a"], True), (["sm_80", "compute_80"], False), ([], False)])
def test_on_a_gpu_the_hopper_kernel_is_there_if_it_was_built(archs, has, inputs, monkeypatch):
    monkeypatch.setattr(_extension, "cuda_archs", lambda: archs)
    monkeypatch.setattr(attention, "compute_capability", lambda device: (9, 0))

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    assert facts(inputs, q=inputs.q.as_subclass(OnGpu)).has_sm90_kernels == has


# -------------------------------------------------------------------------------------------------- signatures


def test_a_signature_tells_shapes_strides_dtypes_and_beginnings_apart():
    x = torch.zeros(4, 8)
    others = [x[:2], x.t(), x.half(), moved(x, 1), torch.zeros(4, 16)[:, ::2], torch.zeros(4, 8, device="meta")]
    found = {signature((y,))[0] for y in (x, *others)}
    assert len(found) == 1 + len(others)
    assert signature((torch.ones(4, 8),))[0] == signature((x,))[0]


def test_what_has_no_signature_is_left_to_the_checks():
    assert signature((torch.zeros(2), "text")) is None
    assert signature((torch.zeros(2, 2).to_sparse(),)) is None
