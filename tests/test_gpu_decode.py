"""On a GPU: decode steps whose linear layers are GEMV kernels, alone, in a model, in a CUDA graph."""

from __future__ import annotations

import pytest
import reference
import torch
from gemv_cases import INSIDE, check_gated_up, check_linear, check_rotated_qkv, draw
from model_cases import PROMPT_VIDEOS, PROMPTS, features, padded, tiny_model
from targets import HAS_GPU

from slowfast_kernels.dtypes import KERNEL_DTYPES
from slowfast_kernels.triton import _common, gemv
from slowfast_kernels.triton.gemv import Projection
from slowfast_model import DecodeSession
from slowfast_model.decode import cublas_pays

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="torch finds no GPU")]

DTYPES = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
# Each pair is kernels of its own, which take seconds to compile.
ROWS_AND_DTYPES = pytest.mark.parametrize(
    ("rows", "dtype"),
    [
        *((rows, torch.bfloat16) for rows in (1, 2, 3, 8, 17, 32)),
        *((rows, torch.float32) for rows in (1, 7, 32)),
        *((rows, torch.float16) for rows in (1, 2, 16)),
    ],
    ids=str,
)
HIDDEN, INNER, HEADS = 3584, 18944, (28, 4, 128)  # of a 7B


@ROWS_AND_DTYPES
@pytest.mark.parametrize("inside", INSIDE)
def test_a_linear_layer(inside, rows, dtype, rng):
    check_linear(inside, rows, HIDDEN, HIDDEN, dtype, rng("cuda"))
    check_linear(inside, rows, 1000, 777, dtype, rng("cuda"))


@ROWS_AND_DTYPES
def test_a_long_linear_layer(rows, dtype, rng):
    check_linear("residual", rows, INNER, HIDDEN, dtype, rng("cuda"))


@ROWS_AND_DTYPES
def test_silu_times_up(rows, dtype, rng):
    check_gated_up(rows, HIDDEN, INNER, dtype, rng("cuda"))
    check_gated_up(rows, 1000, 777, dtype, rng("cuda"))


@ROWS_AND_DTYPES
@pytest.mark.parametrize("has_bias", [True, False])
def test_q_is_turned_and_k_and_v_go_to_their_slots(has_bias, rows, dtype, rng):
    check_rotated_qkv(has_bias, rows, HIDDEN, HEADS, dtype, rng("cuda"))
    check_rotated_qkv(has_bias, rows, 1000, (6, 2, 12), dtype, rng("cuda"))


def test_weights_of_more_than_2_to_the_31_elements(rng):
    generator, outputs = rng("cuda"), 2**31 // HIDDEN + 1000
    x = draw(generator, torch.bfloat16, 1, HIDDEN)
    weight = torch.zeros(outputs, HIDDEN, dtype=torch.bfloat16, device="cuda")
    weight[-8:] = draw(generator, torch.bfloat16, 8, HIDDEN, scale=HIDDEN**-0.5)
    got = gemv.linear(x, Projection(weight))
    assert not got[:, :-8].any()
    reference.assert_accurate(got[:, -8:], x @ weight[-8:].T, x.double() @ weight[-8:].double().T)


# ------------------------------------------------------------------------------------------- in a model


def sessions(*gemv: bool | None, dtype: torch.dtype = torch.bfloat16) -> tuple:
    """A model, and a session of it for each ``gemv``: two videos, an image and text alone in the prompts."""
    model = tiny_model(None, "cuda").to(dtype)
    ids, mask = (x.cuda() for x in padded(PROMPTS))
    videos = [x.to(dtype) for x in features(*PROMPT_VIDEOS, device="cuda")]
    return model, *(DecodeSession(model, ids, videos, mask, max_new_tokens=8, gemv=each) for each in gemv)


@torch.no_grad()
def test_a_step_takes_the_kernels_of_itself():
    model, several = sessions(None)
    assert several.gemv_limit() == cublas_pays(model.model.embed_tokens(several.most_likely))
    ids = torch.tensor([[1, 2], [3, 4]], device="cuda")
    assert DecodeSession(model, ids, max_new_tokens=1).gemv_limit() is None


@DTYPES
@torch.no_grad()
def test_a_step_is_as_accurate_as_pytorch_s(dtype):
    """Against the same weights in float64, on the path that has no kernel."""
    _, ours, other = sessions(True, False, dtype=dtype)
    exact_model = tiny_model("eager", "cuda").to(dtype).double()
    ids, mask = (x.cuda() for x in padded(PROMPTS))
    videos = [x.to(dtype).double() for x in features(*PROMPT_VIDEOS, device="cuda")]
    exact = DecodeSession(exact_model, ids, videos, mask, max_new_tokens=8)
    for _ in range(3):
        token = exact.most_likely
        got, plain, want = ours.step(token), other.step(token), exact.step(token)
        assert (got - want).norm() <= 2 * (plain - want).norm() + 1e-6 * want.norm()


@DTYPES
@torch.no_grad()
def test_a_captured_step_gives_the_same_bits_and_ids(dtype):
    _, plain, captured = sessions(True, True, dtype=dtype)
    captured.capture()
    for _ in range(8):
        token = plain.most_likely
        expected = plain.step(token).clone()
        assert reference.same_bits(captured.step(token), expected)
        assert torch.equal(captured.most_likely, expected.argmax(-1))
        assert torch.equal(captured.position, plain.position)


@torch.no_grad()
def test_weights_that_change_after_capture_are_seen():
    model, plain, captured = sessions(True, True)
    captured.capture()
    token = plain.most_likely
    captured.step(token), plain.step(token)
    layers = model.model.layers
    for layer in layers:
        layer.self_attn.q_proj.weight.data.mul_(-1)
        layer.self_attn.v_proj.bias.data.add_(0.5)
        layer.input_layernorm.weight.data.add_(1)
        layer.mlp.up_proj.load_state_dict({"weight": layer.mlp.gate_proj.weight.clone()})
    model.lm_head.weight.data.mul_(0.5)
    before = plain.logits.clone()
    expected = plain.step(token)
    assert not torch.allclose(expected, before, atol=0.1)
    assert reference.same_bits(captured.step(token), expected)


@torch.no_grad()
@pytest.mark.parametrize("in_graph", [False, True])
def test_dependent_launches_change_no_bit(in_graph, monkeypatch):
    if not _common.describe(torch.device("cuda")).dependent_launch:
        pytest.skip("this GPU or this Triton has no dependent launch")
    _, dependent, independent = sessions(True, True)
    tokens, found = [dependent.most_likely.clone()], []
    if in_graph:
        dependent.capture()
    for _ in range(8):
        found.append(dependent.step(tokens[-1]).clone())
        tokens.append(found[-1].argmax(-1))
    device = _common.describe(torch.device("cuda"))
    without = type(device)(device.num_sms, device.shared_bytes, dependent_launch=False, prefetch=device.prefetch)
    monkeypatch.setattr(gemv, "describe", lambda _: without)
    if in_graph:
        independent.capture()
    for token, expected in zip(tokens, found, strict=False):
        assert reference.same_bits(independent.step(token), expected)


@torch.no_grad()
def test_a_generation_goes_on_alike_with_and_without_the_kernels():
    """In float32, whose logits are far enough apart for the same ids."""
    _, ours, other = sessions(True, False, dtype=torch.float32)
    ours.capture()
    for _ in range(8):
        token = other.most_likely.clone()
        torch.testing.assert_close(ours.step(token), other.step(token), atol=1e-4, rtol=1e-4)
