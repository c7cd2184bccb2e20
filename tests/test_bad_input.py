"""Bad input raises a specific error naming the argument, what came and what is wanted; nothing is cast or skipped."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from cases import Shape, make_inputs
from targets import DEVICE, HAS_GPU

import slowfast_kernels as sk
from slowfast_kernels.gate import GATES
from slowfast_kernels.ops import checks

I32 = torch.int32


def arguments() -> dict:
    """Keyword arguments of slowfast_cross_attention that are right: two sequences, C = 4 * 16."""
    inputs = make_inputs(Shape(((2, 5), (3, 4)), (4, 2), 16, 2), torch.float32, "cpu", torch.Generator().manual_seed(0))
    return {name: getattr(inputs, name) for name in inputs.__dataclass_fields__}


def without_contiguous_rows(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def cu(*values):
    return torch.tensor(values, dtype=I32)


# argument, its bad value (from the good one), exception, words of the message: what came, what is wanted
ATTENTION = [
    ("q", lambda q: q.flatten(1), ValueError, ["float32[7, 64]", "[rows, Hq, D]"]),
    ("q", lambda q: q.tolist(), TypeError, ["list", "tensor", "[rows, Hq, D]"]),
    ("q", lambda q: q.int(), TypeError, ["int32", "float32, bfloat16 or float16"]),
    ("q", without_contiguous_rows, ValueError, ["last-dimension stride 4", "want 1", ".contiguous()"]),
    ("q", lambda q: q[:, :3], ValueError, ["float32[7, 3, 16]", "multiple of slow_kv's 2"]),
    ("q", lambda q: q[..., :8], ValueError, ["slow_kv", "[Ns, Hkv, 2, 8]"]),
    ("slow_kv", lambda kv: kv.flatten(2), ValueError, ["float32[9, 2, 32]", "[Ns, Hkv, 2, D]"]),
    ("slow_kv", lambda kv: kv.transpose(1, 2)[:, :, :1], ValueError, ["float32[9, 2, 1, 16]", "interleaved"]),
    ("slow_kv", lambda kv: torch.cat((kv, kv), 1).transpose(1, 2), ValueError, ["[9, 2, 4, 16]", ".transpose(1, 2)"]),
    ("slow_kv", lambda kv: kv.bfloat16(), TypeError, ["bfloat16", "want torch.float32 (the dtype of q)"]),
    ("slow_kv", without_contiguous_rows, ValueError, ["last-dimension stride 2", "want 1"]),
    ("slow_kv", lambda kv: kv.to("meta"), ValueError, ["on meta", "want cpu (the device of q)"]),
    ("slow_kv", lambda kv: kv[:, :0], ValueError, ["multiple of slow_kv's 0"]),
    ("cu_slow", lambda x: x.long(), TypeError, ["int64", "int32"]),
    ("cu_slow", lambda x: x[None], ValueError, ["int32[1, 3]", "[B + 1]"]),
    ("cu_slow", lambda x: cu(0, 5, 8), ValueError, ["0..8", "want 0..9", "slow tokens"]),
    ("cu_slow", lambda x: cu(1, 5, 9), ValueError, ["1..9", "want 0..9"]),
    ("cu_slow", lambda x: cu(0, 12, 9), ValueError, ["12 then 9 at index 1", "non-decreasing"]),
    ("cu_slow", lambda x: x.to("meta"), ValueError, ["on meta", "want cpu"]),
    ("cu_text", lambda x: cu(0, 5), ValueError, ["int32[2]", "as many entries as cu_slow", "3"]),
    ("cu_text", lambda x: cu(0, 2, 6), ValueError, ["0..6", "want 0..5", "text_rows"]),
    ("cu_text", lambda x: cu(0, 6, 5), ValueError, ["6 then 5", "non-decreasing"]),
    ("cu_text", lambda x: x.float(), TypeError, ["float32", "int32"]),
    ("text_rows", lambda x: x.long(), TypeError, ["int64", "int32"]),
    ("text_rows", lambda x: cu(0, 1, 2, 3, 7), ValueError, ["0..7", "want 0..6", "rows of q"]),
    ("text_rows", lambda x: cu(-1, 1, 2, 3, 4), ValueError, ["-1..4", "want 0..6"]),
    ("text_rows", lambda x: cu(0, 1, 2, 3, 3), ValueError, ["repeated row index", "distinct"]),
    ("num_splits", lambda _: -1, ValueError, ["-1", "0 (automatic)"]),
    ("num_splits", lambda _: 10**9, ValueError, ["1000000000", "65535"]),
    ("num_splits", lambda _: 2.5, TypeError, ["float 2.5", "an integer"]),
    ("softmax_scale", lambda _: "1", TypeError, ["str '1'", "a number"]),
    ("softmax_scale", lambda _: float("nan"), ValueError, ["nan", "finite"]),
    ("q", lambda q: q.numpy(), TypeError, ["numpy float32[7, 4, 16]", "a tensor"]),
    ("slow_kv", lambda kv: kv.to_sparse(), TypeError, ["sparse_coo", "to_dense"]),
]
GATING = [
    ("gate_weight", lambda w: w[:, :63], ValueError, ["float32[1, 63]", "[64] or [1, 64]"]),
    ("gate_weight", lambda w: w.expand(2, 64), ValueError, ["float32[2, 64]", "[64] or [1, 64]"]),
    ("gate_weight", lambda w: w.half(), TypeError, ["float16", "torch.float32 (the dtype of state)"]),
    ("gate_weight", lambda w: w.to("meta"), ValueError, ["on meta", "want cpu"]),
    ("gate_weight", lambda w: torch.ones(1, 128)[:, ::2], ValueError, ["last-dimension stride 2", "want 1"]),
    ("gate_bias", lambda b: b.double(), TypeError, ["float64", "the dtype of gate_weight"]),
    ("gate_bias", lambda b: b.expand(2).contiguous(), ValueError, ["float32[2]", "[1]"]),
    ("gate_bias", lambda b: None, TypeError, ["None", "tensor"]),
    ("warm_up", lambda w: w.half(), TypeError, ["float16", "the dtype of gate_weight"]),
    ("warm_up", lambda w: 0.5, TypeError, ["0.5", "tensor"]),
    ("gate", lambda _: "relu", ValueError, ["'relu'", *map(repr, GATES)]),
    ("gate_weight", lambda _: None, TypeError, ["None", "[64] or [1, 64]"]),
    ("gate_value", lambda _: torch.ones(5), ValueError, ["gate_weight", "want None", "gate_value takes its place"]),
    ("gate", lambda _: "none", ValueError, ["gate_weight", "want None", "gate='none' has no weight"]),
    ("warm_up_tanh", lambda _: "no", TypeError, ["str 'no'", "an integer"]),
    ("warm_up_tanh", lambda _: 2, ValueError, ["int 2", "True or False"]),
]
STATE = [
    ("state", lambda s: s[:, :48], ValueError, ["float32[7, 48]", "[7, 64]", "Hq * D"]),
    ("state", lambda s: s[:5], ValueError, ["float32[5, 64]", "[7, 64]"]),
    ("state", lambda s: s.half(), TypeError, ["float16", "float32 (the dtype of q)"]),
    ("state", lambda s: s[None], ValueError, ["float32[1, 7, 64]", "[rows, Hq * D]"]),
]


def ids(case):
    return None if callable(case) or isinstance(case, list | type) else str(case)


def assert_refused(op, good, bad, name, exception, words):
    """``bad`` replaces arguments of a call that is right, after that call has been made and remembered."""
    op(**good)
    with pytest.raises(exception) as caught:
        op(**good | bad)
    message = str(caught.value)
    missing = [word for word in (name, *words) if word not in message]
    assert type(caught.value) is exception
    assert not missing, f"{message!r} does not say {missing}"


@pytest.mark.parametrize(("name", "spoil", "exception", "words"), ATTENTION + GATING + STATE, ids=ids)
def test_cross_attention_refuses(name, spoil, exception, words):
    good = arguments() | {"backend": "eager"}
    expected = "slow_kv" if "slow_kv" in words else name
    assert_refused(sk.slowfast_cross_attention, good, {name: spoil(good.get(name))}, expected, exception, words)


@pytest.mark.parametrize(("name", "spoil", "exception", "words"), ATTENTION, ids=ids)
def test_attention_alone_refuses_the_same(name, spoil, exception, words):
    good = {key: arguments()[key] for key in ("q", "slow_kv", "cu_slow", "text_rows", "cu_text")}
    good["backend"] = "eager"
    expected = "slow_kv" if "slow_kv" in words else name
    assert_refused(sk.text_cross_attention, good, {name: spoil(good.get(name))}, expected, exception, words)


MIX = [
    ("state", lambda s: s[None], ValueError, ["float32[1, 7, 64]", "[rows, C]"]),
    ("state", lambda s: s.int(), TypeError, ["int32", "float32, bfloat16 or float16"]),
    ("state", without_contiguous_rows, ValueError, ["last-dimension stride 7", "want 1"]),
    ("context", lambda c: c[:, :32], ValueError, ["float32[5, 32]", "[5, 64]"]),
    ("context", lambda c: c[:4], ValueError, ["float32[4, 64]", "[5, 64]"]),
    ("context", lambda c: c.half(), TypeError, ["float16", "the dtype of state"]),
    ("context", lambda c: c[None, None], ValueError, ["float32[1, 1, 5, 64]", "[Nt, Hq, D]"]),
    ("context", lambda c: None, TypeError, ["None", "tensor"]),
    ("text_rows", lambda x: cu(0, 1, 2, 3, 7), ValueError, ["0..7", "want 0..6", "rows of state"]),
    ("text_rows", lambda x: cu(0, 1, 1, 3, 4), ValueError, ["repeated row index", "distinct"]),
    ("text_rows", lambda x: x.long(), TypeError, ["int64", "int32"]),
]


WITHOUT_WEIGHT = [
    ("gate_value", lambda v: v[:4], ValueError, ["float32[4]", "shape [5]"]),
    ("gate_value", lambda v: v[:, None], ValueError, ["float32[5, 1]", "shape [5]"]),
    ("gate_value", lambda v: v.half(), TypeError, ["float16", "the dtype of state) or float32"]),
    ("gate_value", lambda v: v.to("meta"), ValueError, ["on meta", "want cpu"]),
    ("gate_value", lambda v: v.tolist(), TypeError, ["list", "a tensor [5]"]),
    ("gate_bias", lambda _: torch.zeros(1), ValueError, ["float32[1]", "want None"]),
    ("warm_up", lambda w: w.double(), TypeError, ["float64", "the dtype of state) or float32"]),
]


@pytest.mark.parametrize(("name", "spoil", "exception", "words"), WITHOUT_WEIGHT, ids=ids)
def test_a_call_without_a_gate_weight_refuses(name, spoil, exception, words):
    without = {"gate_weight": None, "gate_bias": None, "gate_value": torch.ones(5)}
    good = arguments() | without | {"backend": "eager"}
    assert_refused(sk.slowfast_cross_attention, good, {name: spoil(good[name])}, name, exception, words)


@pytest.mark.parametrize(("name", "spoil", "exception", "words"), MIX + GATING, ids=ids)
def test_gated_mix_refuses(name, spoil, exception, words):
    good = {key: arguments()[key] for key in ("state", "text_rows", "gate_weight", "gate_bias", "warm_up")}
    good |= {"context": torch.zeros(5, 64), "backend": "eager"}
    assert_refused(sk.gated_residual_mix, good, {name: spoil(good.get(name))}, name, exception, words)


POOL = [
    ("frames", lambda f: f[0], ValueError, ["float32[9, 8]", "[sum(frame_counts), H*W, C]"]),
    ("frames", lambda f: f.int(), TypeError, ["int32", "float32, bfloat16 or float16"]),
    ("frames", without_contiguous_rows, ValueError, ["last-dimension stride 9", "want 1"]),
    ("frames", lambda f: f[:3], ValueError, ["float32[3, 9, 8]", "4 frames"]),
    ("frames", lambda f: f[:, :8], ValueError, ["float32[4, 8, 8]", "9 tokens a frame"]),
    ("frames", lambda f: f[..., :0], ValueError, ["float32[4, 9, 0]", "at least one channel"]),
    ("frame_counts", lambda _: [], ValueError, ["empty list", "one frame count a video"]),
    ("frame_counts", lambda _: [4, 0], ValueError, ["frame_counts[1]", "got 0", "want >= 1"]),
    ("frame_counts", lambda _: [-4], ValueError, ["frame_counts[0]", "got -4", "want >= 1"]),
    ("grid", lambda _: (9,), ValueError, ["[9]", "(H, W)"]),
    ("grid", lambda _: (1, 9), ValueError, ["(1, 9)", "4 frames", "H == W"]),
    ("grid", lambda _: (0, 9), ValueError, ["(0, 9)", ">= 1"]),
    ("pool_stride", lambda _: 4, ValueError, ["got 4", "want <= the grid (3, 3)"]),
    ("pool_stride", lambda _: 0, ValueError, ["got 0", "want >= 1"]),
    ("sampling_stride", lambda _: 0, ValueError, ["got 0", "want >= 1"]),
    ("temporal_stride", lambda _: -1, ValueError, ["got -1", "want >= 1"]),
    ("spatial_stride", lambda _: 4, ValueError, ["got 4", "slow grid (3, 3)"]),
    ("min_fast_frames", lambda _: 0, ValueError, ["got 0", "want >= 1"]),
    ("norm_eps", lambda _: -1e-6, ValueError, ["-1e-06", ">= 0 or None"]),
]


@pytest.mark.parametrize(("name", "spoil", "exception", "words"), POOL, ids=ids)
def test_pool_refuses(name, spoil, exception, words):
    good = {"frames": torch.zeros(4, 9, 8), "frame_counts": [4], "grid": (3, 3), "backend": "eager"}
    assert_refused(sk.slowfast_pool, good, {name: spoil(good.get(name))}, name, exception, words)


def test_a_spatial_stride_larger_than_the_pooled_grid_is_refused():
    with pytest.raises(ValueError, match=re.escape("spatial_stride: got 2, want <= the slow grid (1, 1)")):
        sk.slowfast_pool(torch.zeros(4, 9, 8), [4], (3, 3), pool_stride=2, spatial_stride=2)


def test_a_refusal_under_autograd_is_the_same():
    options = arguments()
    options["q"] = options["q"].bfloat16().requires_grad_()
    with pytest.raises(TypeError, match=r"slow_kv: got torch\.float32, want torch\.bfloat16"):
        sk.slowfast_cross_attention(**options)


# ----------------------------------------------------- checks that read data: on a GPU only if asked for


@pytest.mark.parametrize(
    ("device", "debug", "reads"),
    [("cpu", "", True), ("cpu", "1", True), ("cuda", "", False), ("cuda", "1", True), ("cuda", "0", False)],
)
def test_device_data_is_read_on_a_gpu_only_under_slowfast_debug(device, debug, reads, monkeypatch):
    monkeypatch.setenv("SLOWFAST_DEBUG", debug)
    assert checks.reads_device_data(SimpleNamespace(is_cpu=device == "cpu")) == reads


@pytest.mark.parametrize("op", [sk.slowfast_cross_attention, sk.text_cross_attention, sk.gated_residual_mix])
def test_every_op_leaves_data_unread_where_it_must_not_sync(op, monkeypatch):
    monkeypatch.setattr(checks, "reads_device_data", lambda x: False)
    for name in ("check_prefix_sums", "check_rows"):
        monkeypatch.setattr(checks, name, lambda *args: pytest.fail("device data was read"))
    good = arguments()
    if op is sk.gated_residual_mix:
        rest = {key: good[key] for key in ("state", "text_rows", "gate_weight", "gate_bias", "warm_up")}
        op(context=torch.zeros(5, 64), **rest, backend="eager")
    elif op is sk.text_cross_attention:
        op(*(good[key] for key in ("q", "slow_kv", "cu_slow", "text_rows", "cu_text")), backend="eager")
    else:
        op(**good, backend="eager")


DATA = [case for case in ATTENTION if case[0] in ("cu_slow", "text_rows")]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="torch finds no GPU")
@pytest.mark.parametrize(("name", "spoil", "exception", "words"), DATA, ids=ids)
def test_the_same_refusals_on_a_gpu_under_slowfast_debug(name, spoil, exception, words, monkeypatch):
    monkeypatch.setenv("SLOWFAST_DEBUG", "1")
    good = {key: value.to(DEVICE) for key, value in arguments().items()}
    bad = spoil(arguments()[name])
    bad = bad if bad.is_meta else bad.to(DEVICE)
    words = [word.replace("want cpu", "want cuda") for word in words]
    assert_refused(sk.slowfast_cross_attention, good, {name: bad}, name, exception, words)
