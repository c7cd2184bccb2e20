"""Every peer of the benchmark computes what our ops compute, or says why it takes no part."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench is not installed; installed packages keep winning

from bench import attention, inputs, layer, mix, peers, pool
from bench.shapes import QWEN2_7B, AttentionShape, Heads, MixShape, PoolShape
from slowfast_kernels import eager
from slowfast_kernels.calls import AttentionTensors
from slowfast_kernels.gate import Gate

TINY_HEADS = Heads(4, 2, 16)
EVEN = AttentionShape.even(2, 3, 40, TINY_HEADS)
RAGGED = AttentionShape((3, 1, 5), (40, 17, 33), TINY_HEADS)


def test_every_absent_peer_says_why():
    for peer in peers.PEERS:
        reason = peer.absent(torch.device("cpu"))
        assert reason is None if peer.name == "torch" else reason


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    reason = {peer.name: peer for peer in peers.PEERS}["fa3"].absent(torch.device("cuda"))
    assert "flash_attn_3" in reason


def _attention_inputs(shape):
    sets = inputs.make_inputs(shape, "float32", torch.device("cpu"), 0)
    return sets, inputs.reference_context(sets[0])


@pytest.mark.parametrize("shape", [EVEN, RAGGED], ids=["even", "ragged"])
def test_the_reference_is_the_eager_op(shape):
    (x, *_), context = _attention_inputs(shape)
    tensors = AttentionTensors(x.q, x.slow_kv, x.cu_slow, x.text_rows, x.cu_text)
    want, _ = eager.text_cross_attention(tensors, 16**-0.5)
    torch.testing.assert_close(context, want)
    assert attention.fused_error(x, "eager", context) < 1e-5


@pytest.mark.parametrize("shape", [EVEN, RAGGED], ids=["even", "ragged"])
@pytest.mark.parametrize("way", ["gqa hnd", "gqa nhd", "packed hnd", "packed nhd", "repeated hnd"])
def test_every_way_to_call_sdpa_gives_the_reference(shape, way):
    (variant,) = peers.sdpa_variants(*_attention_inputs(shape), backend=None, ways=(way,))
    _, check = variant.build()
    assert check() < 1e-5


def _dense(q, k, v):
    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True)
    return out.transpose(1, 2)


def _flash_package():
    """The calling conventions of the FlashAttention packages: [B, length, H, D], tuples from some functions."""
    package = types.ModuleType("fake")
    package.flash_attn_func = lambda q, k, v, num_splits=1: (_dense(q, k, v), None)
    package.flash_attn_with_kvcache = lambda q, k_cache, v_cache, num_splits=0, pack_gqa=None: _dense(
        q, k_cache, v_cache
    )

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, pack_gqa=None):
        lengths = (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)
        parts = (x.split(cu.diff().tolist()) for x, cu in zip((q, k, v), lengths, strict=True))
        pairs = zip(*parts, strict=True)
        return torch.cat([_dense(*(x[None] for x in one))[0] for one in pairs])

    package.flash_attn_varlen_func = varlen
    return package


@pytest.mark.parametrize("shape", [EVEN, RAGGED], ids=["even", "ragged"])
@pytest.mark.parametrize(
    ("name", "module"), [("fa2", "flash_attn"), ("fa3", "flash_attn_interface"), ("fa4", "flash_attn.cute")]
)
def test_flash_attention_packages_are_called_their_own_way(monkeypatch, shape, name, module):
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, module, _flash_package())
    peer = {peer.name: peer for peer in peers.PEERS}[name]
    right = 0
    for variant in peer.variants(*_attention_inputs(shape)):
        try:
            _, check = variant.build()
        except NotImplementedError:
            assert not shape.is_even
            continue
        assert check() < 1e-5
        right += 1
    assert right


WORTH_A_TRY = {0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 33, 64}


def _labels(monkeypatch, name: str, module: str, package: types.ModuleType, heads: Heads = QWEN2_7B) -> list[str]:
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, module, package)
    inputs = _attention_inputs(AttentionShape.even(1, 1, 8, heads))
    labels = [variant.label for variant in {p.name: p for p in peers.PEERS}[name].variants(*inputs)]
    assert len(labels) == len(set(labels))
    return labels


@pytest.mark.parametrize(("heads", "packings"), [(QWEN2_7B, ["True", "False"]), (TINY_HEADS, ["True"])])
def test_fa3_sweeps_splits_that_are_no_powers_of_two_too_with_every_packing(monkeypatch, heads, packings):
    labels = _labels(monkeypatch, "fa3", "flash_attn_interface", _flash_package(), heads)
    assert set(labels) == {f"num_splits={n} pack_gqa={pack}" for n in WORTH_A_TRY for pack in packings}


def test_fa2_sweeps_the_same_splits_of_its_decoding_entry_point(monkeypatch):
    labels = _labels(monkeypatch, "fa2", "flash_attn", _flash_package())
    assert set(labels) == {"func", *(f"kvcache num_splits={n}" for n in WORTH_A_TRY)}


def test_fa4_sweeps_the_same_splits_where_its_release_splits_at_all(monkeypatch):
    package = _flash_package()
    labels = _labels(monkeypatch, "fa4", "flash_attn.cute", package)
    assert {label.split()[0] for label in labels} == {f"num_splits={n}" for n in WORTH_A_TRY}

    def refuses(q, k, v, num_splits=1, pack_gqa=None):
        assert num_splits == 1, "not on this GPU"
        return _dense(q, k, v)

    package.flash_attn_func = refuses
    labels = _labels(monkeypatch, "fa4", "flash_attn.cute", package)
    assert {label.split()[0] for label in labels} == {"num_splits=0", "num_splits=1"}


@pytest.mark.parametrize(
    "shape",
    [
        PoolShape((8,), (6, 6), channels=8),
        PoolShape((9,), (7, 7), channels=8, temporal_stride=3),
        PoolShape((9,), (6, 6), channels=8, sampling_stride=2, temporal_stride=1),
        PoolShape((10,), (6, 6), channels=8, sampling_stride=2, temporal_stride=2),
        PoolShape((8, 1, 11), (6, 6), channels=8, temporal_stride=4, min_fast_frames=4, spatial_stride=2),
    ],
    ids=lambda shape: shape.name,
)
@pytest.mark.parametrize("cells", [pool._cells_by_mean, pool._cells_by_avg_pool])
def test_the_pooling_composition_computes_the_op(shape, cells):
    frames = torch.randn(sum(shape.frames), shape.grid[0] * shape.grid[1], shape.channels)
    slow, _, fast, _ = eager.pool(frames, shape.plan, pool.EPS)
    got = pool.torch_pool(frames, shape.plan, pool.window_indices(shape.plan, frames.device), cells)
    torch.testing.assert_close(got, (slow, fast))


def test_the_mix_compositions_compute_the_op():
    state, context, rows, *gate = mix._make(MixShape(5, 9, 32), "float32", torch.device("cpu"))
    want = eager.gated_residual_mix(state, context, rows, Gate.of(*gate))
    for way in (mix.copied_rows, mix.added_rows):
        torch.testing.assert_close(way(state, context, rows.long(), *gate), want)
    state, context, rows, *gate = mix._make(MixShape(6, 6, 32), "float32", torch.device("cpu"))
    want = eager.gated_residual_mix(state, context, rows, Gate.of(*gate))
    torch.testing.assert_close(mix.all_rows(state, context, rows.long(), *gate), want)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_official_sequence_gives_what_the_fused_op_gives(batch):
    made = layer.make_layer_inputs(AttentionShape.even(batch, 3, 20, TINY_HEADS), "float32", torch.device("cpu"), 0)
    x = made.attention
    got = layer.official_layer(made, torch.ones(batch, 3, dtype=torch.bool))
    torch.testing.assert_close(got, inputs.reference_mixed(x, inputs.reference_context(x)), rtol=1e-4, atol=1e-5)
