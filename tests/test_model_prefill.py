"""A prefill's two orders of pooling and of projecting K and V give the same; the rule takes the one with less to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from model_cases import PROMPT_VIDEOS, PROMPTS, features, one_thread, padded, tiny_model  # noqa: F401
from prefill_cases import MIXED, assert_as_exact, either_order, every_target, tokens
from torch import nn

import slowfast_kernels as sk
from slowfast_model import DecodeSession
from slowfast_model.prefill import pools_first, projects_at_once, use_order

PROJECTORS = {
    "linear": {"mm_projector_type": "linear"},
    "two_layers": {},
    "three_layers": {"mm_projector_type": "mlp3x_gelu"},
    "stride_3": {"mm_video_pooling_stride": 3, "min_fast_frames": 3, "fast_token_temporal_sampling_stride": 2},
    "fast_spatial_stride": {"fast_token_spatial_stride": 2},
}


@pytest.fixture
def pool_calls(monkeypatch):
    """What each call of the pooling was given: (shape, options)."""
    calls = []
    pool = sk.slowfast_pool

    def record(frames, *args, **options):
        calls.append((tuple(frames.shape), options))
        return pool(frames, *args, **options)

    monkeypatch.setattr(sk, "slowfast_pool", record)
    return calls


# ------------------------------------------------------------------------------------------ pooling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", PROJECTORS.values(), ids=PROJECTORS)
@torch.no_grad()
def test_pooling_first_is_as_exact_as_projecting_first(changes, dtype):
    """Errors against float64 from the same numbers, as norms: at most 2 times those of the other order."""
    model, videos = tiny_model(**changes).to(dtype), [x.to(dtype) for x in features(*MIXED)]
    found = {first: tokens(model, videos, pool_first=first) for first in (False, True)}
    exact = tokens(model.double(), [x.double() for x in videos], pool_first=False)
    assert found[True][2] == found[False][2] == exact[2]
    assert_as_exact(found[True], found[False], exact, dtype)


@every_target
@either_order
@torch.no_grad()
def test_either_order_gives_the_models_logits(first, target):
    model = tiny_model(target.backend, target.device)
    ids, mask = (x.to(target.device) for x in padded(PROMPTS))
    videos = features(*PROMPT_VIDEOS, device=target.device)
    with use_order(pool_first=first):
        found = model(ids, videos, mask).logits
    model.backend = "eager"
    with use_order(pool_first=False):
        torch.testing.assert_close(found, model(ids, videos, mask).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", PROJECTORS.values(), ids=PROJECTORS)
def test_gradients_are_those_of_the_other_order(changes):
    def gradients(first):
        model = tiny_model(**changes).double()
        videos = [x.double().requires_grad_() for x in features(*MIXED)]
        slow, fast, _ = tokens(model, videos, norm_eps=None, pool_first=first)
        (slow.pow(2).sum() + fast.pow(3).sum()).backward()
        return [x.grad for x in (*model.model.mm_projector.parameters(), *videos)]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_pooling_first_leaves_the_last_linear_layer_the_slow_tokens_alone(monkeypatch, pool_calls):
    rows = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, *args: rows.append(len(x)) or linear(x, *args))
    tokens(tiny_model(), features((4, 4)), pool_first=True)
    assert rows == [4 * 16, 4 * 4]
    (first, spatial), (second, temporal) = pool_calls
    assert (first, second) == ((4, 16, 32), (4, 4, 32))
    assert (spatial["pool_stride"], spatial["norm_eps"]) == (2, None)
    assert (temporal["pool_stride"], temporal["norm_eps"]) == (1, 1e-6)


def _hooked(projector):
    projector[-1].register_forward_hook(lambda *_: None)


def _wrapped(projector):
    projector[-1] = nn.Sequential(projector[-1])


def _hooked_whole(projector):
    projector.register_forward_hook(lambda *_: None)


def _ends_with_another_layer(projector):
    projector.append(nn.GELU())


@pytest.mark.parametrize("change", [_hooked, _wrapped, _hooked_whole, _ends_with_another_layer])
@torch.no_grad()
def test_a_projector_that_does_not_end_with_a_plain_linear_layer_is_called_whole(change, pool_calls):
    model, videos = tiny_model(), features(*MIXED)
    change(model.model.mm_projector)
    for a, b in zip(*(tokens(model, videos, pool_first=first)[:2] for first in (True, False)), strict=True):
        assert torch.equal(a, b)
    assert [options["norm_eps"] for _, options in pool_calls] == [1e-6] * len(pool_calls)


@pytest.mark.parametrize(
    ("changes", "shapes"),
    [
        ({"mm_video_pooling_stride": 1}, MIXED),
        ({}, ((1, 4), (1, 6))),
        ({"mm_projector_type": "identity", "mm_hidden_size": 32}, MIXED),
    ],
    ids=["no_pooling", "images", "no_layer"],
)
@torch.no_grad()
def test_where_there_is_nothing_to_save_the_projector_is_called_whole(changes, shapes, pool_calls):
    tokens(tiny_model(**changes), features(*shapes, width=changes.get("mm_hidden_size", 12)), pool_first=True)
    assert [options["norm_eps"] for _, options in pool_calls] == [1e-6] * len(pool_calls)


@pytest.mark.parametrize(
    ("before", "after", "stride", "dtype", "device", "first"),
    [
        (3584, 3584, 2, torch.bfloat16, "cuda", True),  # of the 7B model: 5376 FLOP for each byte more
        (896, 896, 2, torch.float32, "cuda", True),
        (64, 64, 2, torch.bfloat16, "cuda", False),
        (64, 64, 2, torch.float32, "cpu", True),
        (8, 8, 2, torch.float32, "cpu", False),
        (64, 64, 8, torch.bfloat16, "cuda", True),
    ],
)
def test_frames_are_pooled_first_where_that_saves_more_products_than_it_moves_bytes(
    before, after, stride, dtype, device, first
):
    x = SimpleNamespace(device=torch.device(device), element_size=lambda: dtype.itemsize)
    assert pools_first(before, after, stride, x) == first
    with use_order(pool_first=not first):
        assert pools_first(before, after, stride, x) != first
    assert pools_first(before, after, stride, x) == first


# ------------------------------------------------------------------------------------------ keys and values


def session(model, target, **options):
    ids, mask = (x.to(target.device) for x in padded(PROMPTS))
    return DecodeSession(model, ids, features(*PROMPT_VIDEOS, device=target.device), mask, max_new_tokens=4, **options)


def goes_on(model, target, **options):
    """Logits of a prefill and of two steps after it."""
    found = session(model, target, **options)
    return [found.logits, *(found.step(torch.arange(3, device=target.device)).clone() for _ in range(2))]


@every_target
@pytest.mark.parametrize("room", [None, 200])
@torch.no_grad()
def test_one_product_of_all_layers_gives_each_its_keys_and_values(room, target):
    model = tiny_model(target.backend, target.device)
    with use_order(one_kv_product=False):
        apart = goes_on(model, target, max_slow_tokens=room)
    with use_order(one_kv_product=True):
        once = goes_on(model, target, max_slow_tokens=room)
    for a, b in zip(once, apart, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_caches_of_one_product_are_views_of_it_and_nothing_is_copied():
    here = SimpleNamespace(device=torch.device("cpu"))
    with use_order(one_kv_product=True):
        caches = [x.slow_kv for x in session(tiny_model("cpu"), here).cache.layers]
    held = [x for x in caches if x is not None]
    assert len(held) == 2
    assert len({x.untyped_storage().data_ptr() for x in held}) == 1
    assert held[0].stride(0) == 2 * held[0][0].numel()


@pytest.mark.parametrize("once", [False, True], ids=["each_layer", "one_product"])
@torch.no_grad()
def test_weights_that_change_between_prefills_are_folded_afresh(once):
    model, (ids, mask), videos = tiny_model(), padded(PROMPTS), features(*PROMPT_VIDEOS)
    with use_order(one_kv_product=once):
        before = model(ids, videos, mask).logits
        for layer in model.config.hybrid_layers:
            model.model.layers[layer].input_layernorm.weight.data.mul_(1.5)
            model.model.layers[layer].self_attn.cross_attn_kv_proj.weight.data.mul_(0.7)
        found = model(ids, videos, mask).logits
    assert (found - before).abs().max() > 1e-2
    with torch.enable_grad():  # training calls the modules
        torch.testing.assert_close(found, model(ids, videos, mask).logits.detach(), atol=1e-4, rtol=1e-4)


def _hook(layer):
    layer.self_attn.cross_attn_kv_proj.register_forward_hook(lambda *_: None)


def _no_bias(layer):
    layer.self_attn.cross_attn_kv_proj.bias = None


def _shard(layer):
    """As FSDP leaves a parameter between calls."""
    weight = layer.input_layernorm.weight
    whole, part = weight.data.clone(), weight.data[:5].clone()

    def becomes(x):
        return lambda *_: setattr(weight, "data", x)

    layer.register_forward_pre_hook(becomes(whole))
    layer.register_forward_hook(becomes(part))
    weight.data = part


def _cast_late(layer):
    """As layerwise casting does: what the weights are is known in the layer's call alone, of whole shape before."""
    proj = layer.self_attn.cross_attn_kv_proj
    kept = proj.weight.data

    def scale(*_):
        proj.weight.data = kept * 1.5

    layer.self_attn.register_forward_pre_hook(scale)
    layer.register_forward_hook(lambda *_: setattr(proj.weight, "data", kept))


@pytest.mark.parametrize("change", [_hook, _no_bias, _shard, _cast_late])
@torch.no_grad()
def test_a_layer_whose_weights_cannot_be_read_from_outside_makes_its_own(change):
    ids, mask = padded(PROMPTS)
    videos, found = features(*PROMPT_VIDEOS), []
    for once in (False, True):
        model = tiny_model()
        change(model.model.layers[2])
        with use_order(one_kv_product=once):
            found.append(model(ids, videos, mask).logits)
    assert torch.equal(*found)


def test_one_product_is_for_few_tokens_on_a_gpu():
    def tokens(count, device):
        return SimpleNamespace(device=torch.device(device), shape=(count, 3584))

    assert projects_at_once(tokens(1024, "cuda"), 4)
    assert not projects_at_once(tokens(8192, "cuda"), 4)  # one layer's product fills the GPU
    assert not projects_at_once(tokens(1024, "cuda"), 1)
    assert not projects_at_once(tokens(1024, "cpu"), 4)
    with use_order(one_kv_product=True):
        assert projects_at_once(tokens(8192, "cpu"), 4)
        assert not projects_at_once(tokens(8192, "cpu"), 1)
