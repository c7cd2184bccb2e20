"""Arguments of a kind that nobody meant: refused by name in one short line, with and without autograd; and calls inside
autocast and traces, which must change no number.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import Shape, make_inputs
from targets import FLOAT32
from test_ops_backward import finite

import slowfast_kernels as sk
from slowfast_kernels.calls import AttentionTensors
from slowfast_kernels.ops import checks

SHAPE = Shape(((2, 5), (3, 4)), (4, 2), 8, 2)
TENSORS = ("state", "q", "slow_kv", "cu_slow", "text_rows", "cu_text", "gate_weight", "gate_bias", "warm_up")


class WithoutText:
    def __repr__(self):
        raise ZeroDivisionError


class RaisingNumber:
    def __index__(self):
        raise KeyError("no number")

    __float__ = __index__


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


NO_DENSE_TENSORS = {
    "numpy": lambda x: x.numpy(),
    "list": lambda x: x.tolist(),
    "class": lambda x: torch.Tensor,
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
    "masked": lambda x: torch.masked.masked_tensor(x, torch.ones_like(x, dtype=torch.bool)),
    "lazy": lambda x: torch.nn.UninitializedParameter(),
    "freed": freed,
}


@pytest.fixture
def inputs():
    return finite(make_inputs(SHAPE, torch.float32, "cpu", torch.Generator().manual_seed(0)))


@pytest.fixture
def calls(inputs):
    """Each op with one argument replaced."""
    frames, context, value = torch.randn(4, 9, 8), torch.randn(5, 32), torch.randn(5)

    def fused(grad=False, backend=None, **changed):
        given = {name: getattr(inputs, name) for name in TENSORS} | changed
        leaf = "state" if "q" in changed else "q"
        if grad:
            given[leaf] = given[leaf].clone().requires_grad_()
        return sk.slowfast_cross_attention(**given, backend=backend)

    def mix(grad=False, backend=None, **changed):
        given = {"context": context, "gate_value": value} | changed
        state = inputs.state.clone().requires_grad_(grad)
        places = (inputs.text_rows, None, None, None)
        return sk.gated_residual_mix(state, given.pop("context"), *places, **given, backend=backend)

    def pool(grad=False, backend=None, **changed):
        given = {"frames": frames, "frame_counts": [4], "grid": (3, 3)} | changed
        if grad and "frames" not in changed:
            given["frames"] = given["frames"].clone().requires_grad_()
        return sk.slowfast_pool(**given, backend=backend).slow

    return {"fused": fused, "mix": mix, "pool": pool}


def refusal(call, name, exception, **arguments):
    with pytest.raises(exception) as caught:
        call(**arguments)
    message = str(caught.value)
    assert message.startswith((f"{name}:", f"{name}["))
    assert "\n" not in message
    assert len(message) < 250


PLACES = [("fused", name) for name in TENSORS] + [("mix", "context"), ("mix", "gate_value"), ("pool", "frames")]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", NO_DENSE_TENSORS)
@pytest.mark.parametrize(("op", "name"), PLACES)
def test_what_is_no_dense_tensor_is_refused_by_name(op, name, kind, grad, calls, inputs):
    """After a good call of the same shapes: what was found for those must not let this one through."""
    calls[op](grad)
    good = getattr(inputs, name, torch.randn({"context": (5, 32), "gate_value": (5,)}.get(name, (4, 9, 8))))
    refusal(calls[op], name, (TypeError, ValueError), grad=grad, **{name: NO_DENSE_TENSORS[kind](good)})


def test_memory_that_was_freed_is_refused_on_every_backend(calls, inputs):
    for backend in ("eager", "cpu"):
        refusal(calls["fused"], "slow_kv", ValueError, slow_kv=freed(inputs.slow_kv), backend=backend)


NO_NAMES = ["", "CPU", 0, False, 1.5, b"cpu", ["cpu"], {"cpu"}, np.array("cpu"), np.array(["cpu"])]
NO_NAMES += [torch.tensor(1), torch.empty(0), torch.empty((), device="meta")]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", ["fused", "mix", "pool"])
def test_a_backend_that_is_no_name_is_refused_by_name(op, grad, calls):
    for wrong in NO_NAMES:
        refusal(calls[op], "backend", ValueError, grad=grad, backend=wrong)
    with pytest.raises(ValueError, match="backend"), sk.use_backend(["cpu"]):
        pass


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", ["fused", "mix"])
def test_a_gate_that_is_no_name_is_refused_by_name(op, grad, calls):
    for wrong in (None, *NO_NAMES):
        refusal(calls[op], "gate", ValueError, grad=grad, gate=wrong)


@pytest.mark.parametrize("grad", [False, True])
def test_numbers_past_64_bits_are_refused_by_name(grad, calls):
    """A registered op, which autograd needs, carries no more."""
    for name in ("sampling_stride", "temporal_stride", "min_fast_frames", "pool_stride"):
        for huge in (2**63, 10**5000, -(10**30)):
            refusal(calls["pool"], name, ValueError, grad=grad, **{name: huge})
    refusal(calls["pool"], "frame_counts", ValueError, grad=grad, frame_counts=[2**64])
    refusal(calls["pool"], "norm_eps", ValueError, grad=grad, norm_eps=10**400)
    refusal(calls["fused"], "softmax_scale", ValueError, grad=grad, softmax_scale=10**400)
    assert torch.isfinite(calls["pool"](grad, min_fast_frames=2**63 - 1)).all()


@pytest.mark.parametrize("wrong", [RaisingNumber(), WithoutText(), np.complex64(1 + 2j), bytearray(b"1")], ids=type)
def test_an_object_that_fails_to_be_a_number_is_refused_by_name(wrong, calls):
    refusal(calls["pool"], "temporal_stride", TypeError, temporal_stride=wrong)
    refusal(calls["pool"], "frame_counts", TypeError, frame_counts=[wrong])
    refusal(calls["pool"], "norm_eps", TypeError, norm_eps=wrong)


@pytest.mark.parametrize("wrong", [{4, 1}, {4: 1}, torch.tensor([4]).to_sparse(), torch.empty(1, device="meta").int()])
def test_counts_without_an_order_or_without_numbers_are_refused_by_name(wrong, calls):
    refusal(calls["pool"], "frame_counts", TypeError, frame_counts=wrong)


def test_a_long_list_is_shortened_in_a_message(calls):
    refusal(calls["pool"], "grid", ValueError, grid=[1] * 1000)


def test_an_option_that_is_differentiated_is_refused(calls):
    """Its derivative would be dropped in silence: options are numbers."""
    learned = torch.tensor(0.3, requires_grad=True)
    refusal(calls["fused"], "softmax_scale", TypeError, softmax_scale=learned)
    refusal(calls["pool"], "norm_eps", TypeError, norm_eps=learned)
    scaled = lambda scale: calls["fused"](softmax_scale=scale).sum()  # noqa: E731
    with pytest.raises(TypeError, match="softmax_scale"):
        torch.func.grad(scaled)(torch.tensor(0.3))
    with pytest.raises(TypeError, match="softmax_scale"):
        torch.func.vmap(scaled)(torch.tensor([0.3, 0.4]))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(TypeError, match="softmax_scale"):
        calls["fused"](softmax_scale=torch.autograd.forward_ad.make_dual(torch.tensor(0.3), torch.tensor(1.0)))
    with torch.no_grad():
        assert torch.equal(calls["fused"](softmax_scale=learned), calls["fused"](softmax_scale=learned.item()))


def test_rows_of_an_empty_state_are_refused_in_words(inputs):
    with pytest.raises(ValueError, match="text_rows: got 5 row indices, want none"):
        sk.gated_residual_mix(inputs.state[:0], inputs.q[:5], inputs.text_rows, *inputs.gating)


def test_warmup_refuses_by_name():
    for name, wrong in {
        "dtype": "float32", "device": "nowhere", "text_rows": [0], "batch_sizes": [-1], "backend": ["cpu"],
    }.items():  # fmt: skip
        refusal(sk.warmup, name, (TypeError, ValueError), **WARMUP | {name: wrong})
    for name in ("num_q_heads", "num_kv_heads", "head_dim"):
        refusal(sk.warmup, name, ValueError, **WARMUP | {name: 0})


WARMUP = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 8, "dtype": torch.float32, "device": "cpu", "text_rows": [1]}


def test_a_registered_op_refuses_a_gate_that_it_does_not_know(inputs):
    arguments = (inputs.state, inputs.q[:5].flatten(1), inputs.text_rows, *inputs.gating, None, "nonsense", True, None)
    with pytest.raises(ValueError, match="gate: got 'nonsense'"):
        torch.ops.slowfast.gated_residual_mix(*arguments)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
def test_a_registered_op_refuses_a_scale_that_is_not_finite(scale, inputs):
    with pytest.raises(ValueError, match="softmax_scale: got"):
        torch.ops.slowfast.text_cross_attention(*AttentionTensors(*inputs.attention), scale, False, 0, None)


# ------------------------------------------------------------------------------------ autocast and traces


def everything(inputs, backend, state, q, frames):
    tokens = sk.slowfast_pool(frames, [4], (3, 3), pool_stride=3, temporal_stride=2, norm_eps=1e-6, backend=backend)
    context = sk.text_cross_attention(q, inputs.slow_kv, *inputs.attention[2:], backend=backend)
    mixed = sk.gated_residual_mix(state, context, inputs.text_rows, *inputs.gating, backend=backend)
    fused = sk.slowfast_cross_attention(state, q, *inputs.fused[2:], backend=backend)
    return torch.cat([x.flatten() for x in (tokens.slow, tokens.fast, context, mixed, fused)])


@pytest.mark.parametrize("target", FLOAT32)
def test_autocast_changes_no_number(target, inputs):
    """Also not in a backward inside it; autocast would multiply in bfloat16 what an op is given in float32."""
    leaves = [x.clone().requires_grad_() for x in (inputs.state, inputs.q, torch.randn(4, 9, 8))]

    def out_and_gradients():
        with torch.no_grad():
            direct = everything(inputs, target.backend, *leaves)
        out = everything(inputs, target.backend, *leaves)
        state, q, frames = (x.detach() for x in leaves)
        _, tangent = torch.func.jvp(lambda x: everything(inputs, target.backend, state, x, frames), (q,), (q,))
        return direct, out, tangent, *torch.autograd.grad(out.sin().sum(), leaves)

    if target.device.type != "cpu":
        pytest.skip("autocast of the CPU")
    plain = out_and_gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = out_and_gradients()
    for x, y in zip(inside, plain, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("target", FLOAT32)
def test_a_trace_records_the_ops(target, inputs):
    """And not the empty memory that a kernel, of which the tracer knows nothing, is about to fill."""
    if target.device.type != "cpu":
        pytest.skip("inputs of the CPU")
    tensors = (inputs.state, inputs.q, torch.randn(4, 9, 8))
    with torch.no_grad():
        traced = torch.jit.trace(lambda *x: everything(inputs, target.backend, *x), tensors, check_trace=False)
        others = [2 * x for x in tensors]
        torch.testing.assert_close(traced(*others), everything(inputs, target.backend, *others))


def test_text_of_an_object_without_one_is_its_type():
    assert checks.describe(WithoutText()) == "WithoutText"
