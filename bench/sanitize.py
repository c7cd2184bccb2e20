"""A covering set of small CUDA calls, to be run under compute-sanitizer:

    compute-sanitizer --tool memcheck python -m bench.sanitize     (also racecheck, synccheck, initcheck)
    compute-sanitizer --tool initcheck python -m bench.sanitize forward     (or backward: attention's gradients alone)

Every way that the Hopper attention cuts a call (one and two consumers, half tiles paired and alone, clusters of 1 to
8, groups, whole units and uneven groups, shares of uneven sequences, blocks dealt out, gates formed first), both head
dimensions and half dtypes, ragged batches with empty sequences; ranges, pieces, K and V apart, merging; its gradients;
pool and mix.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import product

import torch

import slowfast_kernels as sk
from slowfast_kernels import cuda
from slowfast_kernels.calls import AttentionTensors, FusedTensors
from slowfast_kernels.gate import WEIGHTED_GATES, Gate
from slowfast_kernels.heuristics.cuda import HopperConfig, hopper_attention_config

RAGGED = (((1, 70), (3, 0), (0, 40), (2, 33)), ((30, 400), (7, 180), (1, 5)))
# Lengths that the device shares out: rows of question and of decode, beside sequences with nothing to do.
UNEVEN = (((24, 1380), (1, 60), (0, 300), (40, 0), (3, 200)), ((1, 1500), (1, 0), (0, 90), (1, 70), (2, 650)))
SHARED = (
    (HopperConfig(2, 1, 1, 8, share_slots=16, even_units=20), HopperConfig(2, 4, 1, 8, share_slots=30, even_units=20)),
    (HopperConfig(1, 1, 1, 6, share_slots=60, even_units=10), HopperConfig(1, 2, 1, 6, share_slots=60, even_units=10)),
)


def attention(sequences, heads, head_dim, dtype, config=None, fused=True) -> None:
    make = {"device": "cuda", "dtype": dtype}
    texts, slows = zip(*sequences, strict=True)
    rows, slow = sum(texts), sum(slows)

    def prefix(counts):
        return torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32, device="cuda")

    q = torch.randn(rows + 2, heads[0], head_dim, **make)
    kv = torch.randn(slow, heads[1], 2, head_dim, **make)
    index = torch.arange(rows, dtype=torch.int32, device="cuda") + 1
    state = torch.randn(rows + 2, heads[0] * head_dim, **make)
    gate = [torch.randn(n, **make) for n in (heads[0] * head_dim, 1, 1)]
    gates = [
        *(Gate.of(*gate, gate=kind) for kind in WEIGHTED_GATES),
        Gate.of(None, None, gate[2], torch.randn(rows, **make)),
        Gate.of(None, None, None, gate="none"),
    ]
    context = torch.empty(rows, heads[0], head_dim, **make)
    lse = torch.empty(rows, heads[0], device="cuda")
    places = (prefix(slows), index, prefix(texts))
    for kind in gates if fused else (None,):
        tensors = AttentionTensors(q, kv, *places)
        if kind is not None:
            tensors = FusedTensors.of(state, tensors, kind)
        attend = cuda.Attention(tensors, gate=kind, config=config)
        attend(tensors, context=context, lse=lse, out=state.clone())
    torch.cuda.synchronize()
    assert context.isfinite().all()


def selection(texts, head_dim, pair, in_pieces, num_splits, ranged=True, gradients=False) -> None:
    """Rows that see a window, everything or nothing, of one run of tokens or of pieces that two sequences share."""
    make = {"device": "cuda", "dtype": torch.bfloat16}
    rows, slow = sum(texts), 900

    def integers(*values):
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    kv = torch.randn(slow, 2, 2, head_dim, **make)
    cache = (kv[:, :, 0].contiguous(), kv[:, :, 1].transpose(0, 1).contiguous().transpose(0, 1)) if pair else kv
    ends = integers(*((17 * i) % 700 for i in range(rows)))
    ranges = {"slow_begin": (ends - 200) * (ends % 2), "slow_end": ends} if ranged else {}
    cu_slow = integers(0, 600, slow)
    if in_pieces == "many":
        begins = integers(*range(0, 800, 4)).unsqueeze(1)
        cu_slow, ranges["slow_pieces"] = integers(0, 190, 200), torch.cat([begins, begins + 3], 1)
    elif in_pieces:
        cu_slow = integers(0, 3, 5)
        ranges["slow_pieces"] = integers(800, 900, 0, 1, 130, 571, 0, 0, 800, 900).view(-1, 2)
    q, state = torch.randn(rows, 14, head_dim, **make), torch.randn(rows, 14 * head_dim, **make)
    gate = [torch.randn(n, **make) for n in (14 * head_dim, 1, 1)]
    places = (torch.arange(rows, dtype=torch.int32, device="cuda"), integers(0, texts[0], rows))
    options = ranges | {"num_splits": num_splits, "backend": "cuda"}
    if gradients:
        differentiable = [x.detach().requires_grad_() for x in (q, *(cache if pair else (cache,)))]
        mine, *cached = differentiable
        attended = sk.text_cross_attention(mine, tuple(cached) if pair else cached[0], cu_slow, *places, **options)
        finite = torch.autograd.grad(attended, differentiable, attended.detach())
    else:
        found = sk.text_cross_attention(q, cache, cu_slow, *places, **options, return_lse=True)
        sk.slowfast_cross_attention(state, q, cache, cu_slow, *places, *gate, **options)
        sk.merge_attention(*found, *found, backend="cuda")
        finite = found[:1]  # the log-sum-exp of a row that sees nothing is not
    torch.cuda.synchronize()
    assert all(x.isfinite().all() for x in finite)


def selections(gradients: bool) -> None:
    for rows, pair, pieces, splits in product((1, 40), (False, True), (False, True), (0, 3)):
        selection((rows, 3), 64 if pair else 128, pair, pieces, splits, gradients=gradients)
    selection((150, 3), 128, False, True, 0, gradients=gradients)  # dealt out
    for rows in (1, 40):
        selection((rows, 3), 128, False, "many", 3, ranged=False, gradients=gradients)


def attention_gradients(sequences, heads, head_dim, dtype) -> None:
    """Of everything and of single ones; a last round of halves, where there are rows enough."""
    texts, slows = zip(*sequences, strict=True)

    def prefix(counts):
        return torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32, device="cuda")

    q = torch.randn(sum(texts) + 2, heads[0], head_dim, device="cuda", dtype=dtype)
    kv = torch.randn(sum(slows), heads[1], 2, head_dim, device="cuda", dtype=dtype)
    index = torch.arange(sum(texts), dtype=torch.int32, device="cuda") + 1
    for needed in ((q, kv), (q,), (kv,)):
        for x in (q, kv):
            x.requires_grad_(any(x is each for each in needed))
        context = sk.text_cross_attention(q, kv, prefix(slows), index, prefix(texts), backend="cuda")
        found = torch.autograd.grad(context, needed, context.detach())
        torch.cuda.synchronize()
        assert all(x.isfinite().all() for x in found)


def pool_and_mix() -> None:
    """And their backward passes: in vectors, one channel at a time, of everything and of single gradients."""
    for channels, norm_eps in product((96, 95), (1e-6, None)):
        strides = {"pool_stride": 2, "temporal_stride": 4, "min_fast_frames": 3}
        frames = torch.randn(14, 49, channels, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        pooled = sk.slowfast_pool(frames, [8, 1, 5], (7, 7), **strides, norm_eps=norm_eps, backend="cuda")
        torch.autograd.grad((pooled.slow, pooled.fast), frames, (pooled.slow.detach(), pooled.fast.detach()))
    index = torch.tensor([3, 0, 7], dtype=torch.int32, device="cuda")
    for channels, rows in product((96, 95), (20, 3)):
        state = torch.randn(rows, channels, device="cuda", dtype=torch.bfloat16)
        context, places = torch.randn_like(state[:3]), index % rows if rows == 20 else index[:3].argsort().int()
        weight, *scalars = (torch.randn(n, device="cuda", dtype=torch.bfloat16) for n in (channels, 1, 1))
        value = torch.randn(3, device="cuda")
        for gating, gate in (
            ((weight, *scalars), {"gate": "tanh"}),
            ((weight, *scalars), {"gate": "sigmoid"}),
            ((None, None, scalars[1]), {"gate": "none"}),
            ((None, None, None), {"gate_value": value}),
        ):
            inputs = [x for x in (state, context, *gating, gate.get("gate_value")) if x is not None]
            for needed in (inputs, *([x] for x in inputs)):
                for x in inputs:
                    x.requires_grad_(any(x is each for each in needed))
                out = sk.gated_residual_mix(state, context, places, *gating, **gate, backend="cuda")
                torch.autograd.grad(out, needed, out.detach())


def forward() -> None:
    for dtype, head_dim, sequences in product((torch.bfloat16, torch.float16), (64, 128), RAGGED):
        attention(sequences, (14, 2), head_dim, dtype, fused=dtype == torch.bfloat16)
    for cluster, groups in ((1, 1), (1, 3), (2, 2), (4, 1), (8, 1)):
        attention(((1, 1500),), (28, 4), 128, torch.bfloat16, HopperConfig(1, cluster, groups, 1))
    for cluster, groups in ((1, 1), (2, 2), (8, 1), (1, 3)):
        config = HopperConfig(2, cluster, groups, 2)
        attention(((24, 1900),), (14, 2), 128, torch.bfloat16, config)  # 168 rows: a full tile and a half one
        attention(((24, 1900),), (14, 2), 128, torch.bfloat16, replace(config, gates_first=True))
    for groups, whole, length in ((5, 0, 0), (3, 0, 5), (2, 2, 7)):
        config = HopperConfig(2, 1, groups, 2, whole_units=whole, long_blocks=length)
        attention(((24, 1900),), (14, 2), 128, torch.bfloat16, config)
    for splits in (1, 2, 7, 8):
        config = hopper_attention_config(40, 900, 2, 8, 8, 64, splits)
        attention(((39, 500), (1, 400)), (8, 8), 64, torch.bfloat16, config)
    for head_dim, (sequences, configs) in product((64, 128), zip(UNEVEN, SHARED, strict=True)):
        for config in configs:
            attention(sequences, (14, 2), head_dim, torch.bfloat16, config)
    selections(gradients=False)
    pool_and_mix()


def backward() -> None:
    """Attention's. initcheck does not see what TMA adds to sums of dQ, and reports that they are read."""
    selections(gradients=True)
    for dtype, head_dim, sequences in product((torch.bfloat16, torch.float16), (64, 128), RAGGED):
        attention_gradients(sequences, (14, 2), head_dim, dtype)
    attention_gradients(((40, 1500),), (14, 2), 128, torch.bfloat16)


def main() -> None:
    sets = {"forward": forward, "backward": backward}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", nargs="?", choices=sets, help="default both")
    chosen = parser.parse_args().set
    torch.manual_seed(0)
    for make_calls in [sets[chosen]] if chosen else sets.values():
        make_calls()
    torch.cuda.synchronize()
    print("all calls made")


if __name__ == "__main__":
    main()
