"""On a GPU: what stands between a layer's products as kernels of one launch, alone and in a prefill."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from elementwise_cases import check_add_rms_norm, check_rotate, check_scale_columns, check_silu_mul
from fused_cases import FUSED, answered, unfused
from model_cases import PROMPT_VIDEOS, PROMPTS, features, padded, tiny_model
from targets import HAS_GPU

from slowfast_kernels.triton import elementwise
from slowfast_model import DecodeSession

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="torch finds no GPU")]

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@DTYPES
@pytest.mark.parametrize("heads", [(28, 4, 128), (14, 2, 64), (5, 1, 12), (24, 8, 256), (1, 1, 2)], ids=str)
@pytest.mark.parametrize(("batch", "length", "room"), [(1, 1360, 1400), (3, 77, 77), (2, 1, 5), (2, 600, None)])
def test_q_and_k_are_turned_and_fill_a_cache(batch, length, room, heads, dtype, rng):
    check_rotate(batch, length, heads, room, dtype, rng("cuda"))


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (2, 680, 3584), (3, 77, 1001), (7, 20_000)], ids=str)
def test_a_sum_and_its_norm(shape, dtype, rng):
    check_add_rms_norm(shape, dtype, rng("cuda"))


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (3, 333, 1001), (1, 1360, 18944)], ids=str)
def test_silu_times_up(shape, dtype, rng):
    check_silu_mul(shape, dtype, rng("cuda"))


def test_more_than_2_to_the_31_products(rng):
    gate = torch.full((2**31 + 4096,), 2.0, dtype=torch.bfloat16, device="cuda")
    got = elementwise.silu_mul(gate, gate)
    assert bool((got[[0, -1]] == torch.nn.functional.silu(gate[:1]) * 2).all())


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (1024, 3584), (77, 1001), (3, 40_000)], ids=str)
def test_columns_are_scaled(shape, dtype, rng):
    check_scale_columns(*shape, dtype, rng("cuda"))


def batch(dtype: torch.dtype) -> tuple:
    ids, mask = (x.cuda() for x in padded(PROMPTS))
    return ids, [x.to(dtype) for x in features(*PROMPT_VIDEOS, device="cuda")], mask


@DTYPES
@torch.no_grad()
def test_a_prefill_is_as_accurate_as_pytorch_s(dtype, monkeypatch):
    """Against the same weights in float64, and with no more than the ops' own launches."""
    model = tiny_model(None, "cuda").to(dtype)
    launched = answered(monkeypatch, elementwise, FUSED)

    def prefilled(of=model, kind=dtype) -> list[torch.Tensor]:
        session = DecodeSession(of, *batch(kind), max_new_tokens=3)
        return [of(*batch(kind)).logits, session.logits, *(layer.kv for layer in session.cache.layers)]

    got = prefilled()
    layers, hybrid = len(model.model.layers), sum(layer.is_hybrid for layer in model.model.layers)
    each = 2 * layers
    assert Counter(launched) == {"rotate": each, "add_rms_norm": each, "silu_mul": each, "scale_columns": 2 * hybrid}
    with unfused(monkeypatch):
        plain = prefilled()
    exact = prefilled(tiny_model("eager", "cuda").to(dtype).double(), torch.float64)
    for a, b, want in zip(got, plain, exact, strict=True):
        assert (a - want).norm() <= 2 * (b - want).norm() + 1e-6 * want.norm()


@torch.no_grad()
def test_weights_that_change_between_prefills_are_seen():
    model = tiny_model(None, "cuda").to(torch.bfloat16)
    before = model(*batch(torch.bfloat16)).logits
    for layer in model.model.layers:
        layer.input_layernorm.weight.data.mul_(-1.5)
    after = model(*batch(torch.bfloat16)).logits
    assert not torch.allclose(before, after)
    fresh = tiny_model(None, "cuda").to(torch.bfloat16)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(*batch(torch.bfloat16)).logits, after)


@torch.no_grad()
def test_another_stream_makes_no_difference():
    model = tiny_model(None, "cuda").to(torch.bfloat16)
    expected = model(*batch(torch.bfloat16)).logits
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = model(*batch(torch.bfloat16)).logits
    stream.synchronize()
    assert torch.equal(got, expected)
