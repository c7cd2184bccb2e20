"""K and V read where another library keeps them: transformers' static cache, [B, Hkv, S, D] with room to spare."""

from __future__ import annotations

import pytest
import torch
from reach_cases import DIM, HEADS, Reading, between, dense_attention, int32, static_cache_tokens
from targets import ALL
from torch import Tensor

import slowfast_kernels as sk

transformers = pytest.importorskip("transformers", reason="the cache is transformers'")

CAPACITY, FILLED, TEXT = 40, 33, 3
# Of each sequence's cache, what is not padding: on the left, on the right, none, all of it.
KEPT = ((5, 33), (0, 20), (0, 33), (9, 9))


def filled_cache(target, generator):
    """A layer of a static cache after a prefill of FILLED tokens and a decoded one; NaN beyond."""
    sizes = {"hidden_size": HEADS[0] * DIM, "num_attention_heads": HEADS[0], "num_key_value_heads": HEADS[1]}
    config = transformers.Qwen2Config(**sizes, num_hidden_layers=1)
    cache = transformers.StaticCache(config, max_cache_len=CAPACITY)
    for length in (FILLED - 1, 1):
        size = (2, len(KEPT), HEADS[1], length, DIM)
        new = torch.randn(size, generator=generator, device=target.device).to(target.dtype)
        cache.update(*new, layer_idx=0)
    layer = cache.layers[0]
    for x in (layer.keys, layer.values):
        x[:, :, FILLED:] = float("nan")
    return layer


def reading_of_cache(target) -> Reading:
    starts = torch.arange(len(KEPT), device=target.device)[:, None] * HEADS[1] * CAPACITY
    pieces = (starts + torch.tensor(KEPT, device=target.device)).int()
    count = torch.arange(len(KEPT) + 1, device=target.device).int()
    rows = torch.arange(len(KEPT) * TEXT, device=target.device).int()
    return Reading(count, rows, count * TEXT, slow_pieces=pieces)


def queries(target, generator) -> Tensor:
    size = (len(KEPT), TEXT, HEADS[0], DIM)
    return torch.randn(size, generator=generator, device=target.device).to(target.dtype)


def expected(q: Tensor, layer, kept: Tensor) -> Tensor:
    sees = between(kept[:, :1].expand(-1, TEXT), kept[:, 1:].expand(-1, TEXT), FILLED)
    keys, values = (x[:, :, :FILLED].transpose(1, 2) for x in (layer.keys, layer.values))
    return dense_attention(q, keys, values, sees, DIM**-0.5).flatten(0, 1)


@pytest.mark.parametrize("target", ALL)
def test_a_static_cache_is_read_in_place(target, rng):
    generator = rng(target.device)
    layer, q, reading = filled_cache(target, generator), queries(target, generator), reading_of_cache(target)
    kv = tuple(static_cache_tokens(x) for x in (layer.keys, layer.values))
    assert [x.data_ptr() for x in kv] == [layer.keys.data_ptr(), layer.values.data_ptr()]
    context = target.run(sk.text_cross_attention, q.flatten(0, 1), kv, *reading.places, **reading.selection)
    want = expected(q, layer, int32(KEPT, target.device))
    tolerance = 1e-5 if target.dtype == torch.float32 else 4 * torch.finfo(target.dtype).eps
    assert (context.double() - want).abs().max() <= tolerance * float(want.abs().max())
    assert not context[-TEXT:].any()  # the last sequence keeps nothing


@pytest.mark.parametrize("target", ALL)
def test_what_is_written_to_the_cache_later_is_seen_by_the_same_views_and_longer_pieces(target, rng):
    generator = rng(target.device)
    layer, q, reading = filled_cache(target, generator), queries(target, generator), reading_of_cache(target)
    kv = tuple(static_cache_tokens(x) for x in (layer.keys, layer.values))
    before = target.run(sk.text_cross_attention, q.flatten(0, 1), kv, *reading.places, **reading.selection)
    new = torch.randn(2, len(KEPT), HEADS[1], 1, DIM, generator=generator, device=target.device)
    layer.update(*new.to(target.dtype))
    same = target.run(sk.text_cross_attention, q.flatten(0, 1), kv, *reading.places, **reading.selection)
    assert torch.equal(same, before)
    reading.slow_pieces[2, 1] += 1  # the third sequence takes the new token in
    after = target.run(sk.text_cross_attention, q.flatten(0, 1), kv, *reading.places, **reading.selection)
    changed = (after != before).flatten(1).any(1).unflatten(0, (len(KEPT), TEXT)).any(1)
    assert changed.tolist() == [False, False, True, False]
