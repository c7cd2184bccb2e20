"""Attention whose rows see parts of the slow tokens: growing prefixes, as causal video has them, and videos in pieces.

Prefixes: text row i of n sees (i + 1) / n of its video. Ours is held to what its own calls without ranges and with
empty ones take (``verdicts``), and to peers under masks. Pieces: a video in pieces that lie backwards with holes
between, held to one range with as many blocks of tokens, turn by turn. All rows are attention alone.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import slowfast_kernels as sk
from slowfast_kernels import flops
from slowfast_kernels.heuristics.cuda import hopper_attention_config

from .attention import our_backends
from .inputs import AttentionInputs, make_inputs, prefix_sums, reference_context
from .masked_peers import MaskedPeer, Prefixes, masked_peers
from .peers import Sets
from .registry import PIECES, RANGES
from .runner import Contender, Runner, Variant, relative_error
from .selection import parse_attention, select
from .shapes import AttentionShape, Cost, attention_cost
from .verdicts import EMPTY, FULL, ONE_RANGE, beside

BLOCK = 128  # tokens; pieces are counted in whole ones
PIECE_LENGTHS = (1296, 128)  # 16 frames of 9 x 9 tokens, which end within a block; one block


def run(runner: Runner) -> None:
    on_cpu = not runner.is_gpu
    prefixes = select(RANGES, runner.shapes, parse_attention, on_cpu)
    if prefixes:
        _run_prefixes(runner, prefixes)
    pieces = [shape for shape in select(PIECES, runner.shapes, parse_attention, on_cpu) if shape.batch == 1]
    if pieces:
        backends = our_backends(runner, "pieces")
        for shape in pieces:
            for dtype in runner.dtypes:
                for length in (shape.num_slow, *(n for n in PIECE_LENGTHS if n < shape.num_slow)):
                    _run_pieces(runner, shape, dtype, length, backends)


# --------------------------------------------------------------------------------------- growing prefixes


def prefix_ends(text: int, slow: int, device: torch.device) -> Tensor:
    """int32 [n]: row i sees (i + 1) / n of ``slow`` tokens."""
    return (torch.arange(1, text + 1, device=device) * slow // text).int()


def seen_share(end: list[int], tokens: int, heads_per_kv: int, tile: tuple[int, int]) -> float:
    """Of the pairs (tile of packed rows, block of tokens) of a sequence, those in which some row sees a token.

    ``end`` grows, so a tile sees what its last row does.
    """
    tile_rows, block = tile
    packed = len(end) * heads_per_kv
    last_rows = [(min(first + tile_rows, packed) - 1) // heads_per_kv for first in range(0, packed, tile_rows)]
    return sum(-(-end[row] // block) for row in last_rows) / (len(last_rows) * -(-tokens // block))


def tile_of(backend: str, inputs: AttentionInputs) -> tuple[int, int] | None:
    """(packed rows, tokens) that the backend's kernel works on at once; None where no table of ours says so."""
    shape = inputs.shape
    heads = shape.heads
    match backend:
        case "cuda":
            sizes = (shape.num_text, shape.num_slow, shape.batch, heads.num_q, heads.num_kv, heads.dim)
            config = hopper_attention_config(*sizes, selects=True)
            return 64 * config.consumers, config.block_n
        case "triton":
            from slowfast_kernels.calls import AttentionTensors
            from slowfast_kernels.triton.attention import Attention

            config = Attention(AttentionTensors(*inputs.attention)).config
            return config.block_m, config.block_n
        case "cpu":
            return 48, 48  # with AVX-512: csrc/cpu/isa/attention.h
    return None


def _ours(who: str, backend: str, sets: Sets, want: Tensor, cost: Cost, **selection: Tensor) -> Contender:
    """``who`` other than ``backend``: a row that the backend's own is held to."""

    def build():
        calls = [partial(sk.text_cross_attention, *x.attention, **selection, backend=backend) for x in sets]
        return calls, lambda: relative_error(calls[0](), want)

    kind = "ours" if who == backend else "base"
    return Contender(who, [Variant("", build)], cost, kind, capturable=backend != "eager")


def _run_prefixes(runner: Runner, shapes: list[AttentionShape]) -> None:
    backends = our_backends(runner, "ranges")
    peers = runner.present("ranges", masked_peers(tuned=not runner.quick))
    for shape in shapes:
        for dtype in runner.dtypes:
            _run_prefixes_of(runner, shape, dtype, backends, peers)


def _run_prefixes_of(
    runner: Runner, shape: AttentionShape, dtype: str, backends: list[str], peers: list[MaskedPeer]
) -> None:
    names = [*backends, *(peer.name for peer in peers)]
    if all(runner.is_done("ranges", shape.name, dtype, name) for name in names):
        return
    sets = make_inputs(shape, dtype, runner.device, runner.journal.meta["cache_bytes"])
    prefixes = Prefixes(prefix_ends(shape.text[0], shape.slow[0], runner.device), shape.slow[0])
    end = prefixes.end.repeat(shape.batch)
    nothing = torch.zeros_like(end)
    all_seen, seen = reference_context(sets[0]), reference_context(sets[0], nothing, end)
    full_cost = attention_cost(shape, dtype, fused=False)
    cost = replace(full_cost, flops=float(flops.attention(int(end.sum()), shape.heads.num_q, shape.heads.dim)))
    empty_cost = Cost(0, 0, full_cost.written)

    contenders = []
    for backend in backends:
        ours = _ours(backend, backend, sets, seen, cost, slow_end=end)
        contenders.append(ours._replace(facts=_share_of_pairs(backend, sets[0], prefixes)))
        if backend != "eager":  # which skips nothing
            no_context = torch.zeros_like(seen)
            contenders.append(_ours(beside(backend, FULL), backend, sets, all_seen, full_cost))
            contenders.append(_ours(beside(backend, EMPTY), backend, sets, no_context, empty_cost, slow_end=nothing))
    contenders += [Contender(peer.name, peer.variants(sets, seen, prefixes), cost) for peer in peers]
    runner.compare("ranges", shape.name, dtype, contenders)


def _share_of_pairs(backend: str, inputs: AttentionInputs, prefixes: Prefixes) -> dict[str, float]:
    tile = tile_of(backend, inputs)
    if tile is None:
        return {}
    heads = inputs.shape.heads
    share = seen_share(prefixes.end.tolist(), prefixes.tokens, heads.num_q // heads.num_kv, tile)
    return {"share": share, "tile_rows": tile[0], "block_tokens": tile[1]}


# --------------------------------------------------------------------------------------------- pieces


def lay_backwards(tokens: int, length: int) -> tuple[list[tuple[int, int]], int]:
    """Pieces of ``length`` tokens, the first at the end of a slab, each in whole blocks of its own; the slab's size."""
    lengths = [length] * (tokens // length) + [tokens % length] * bool(tokens % length)
    slab = sum(-(-n // BLOCK) * BLOCK for n in lengths)
    pieces, last = [], slab
    for n in lengths:
        first = last - -(-n // BLOCK) * BLOCK
        pieces.append((first, first + n))
        last = first
    return pieces, slab


def _run_pieces(runner: Runner, shape: AttentionShape, dtype: str, length: int, backends: list[str]) -> None:
    pieces, slab = lay_backwards(shape.num_slow, length)
    name = f"{shape.name} in {len(pieces)} of {length}"

    def is_done(backend: str) -> bool:
        return all(runner.is_done("pieces", name, dtype, who) for who in (backend, beside(backend, ONE_RANGE)))

    backends = [backend for backend in backends if backend != "eager" and not is_done(backend)]
    if not backends:
        return
    one_range = AttentionShape.even(1, shape.num_text, slab, shape.heads)
    sets = make_inputs(one_range, dtype, runner.device, runner.journal.meta["cache_bytes"])
    whole = reference_context(sets[0])
    gathered = torch.cat([sets[0].slow_kv[begin:end] for begin, end in pieces])
    want = reference_context(replace(sets[0], shape=shape, slow_kv=gathered))
    bounds = torch.tensor(pieces, dtype=torch.int32, device=runner.device)
    in_pieces = [replace(x, cu_slow=prefix_sums((len(pieces),), runner.device)) for x in sets]
    costs = [attention_cost(of, dtype, fused=False) for of in (shape, one_range)]
    for backend in backends:
        contenders = [
            _ours(backend, backend, in_pieces, want, costs[0], slow_pieces=bounds),
            _ours(beside(backend, ONE_RANGE), backend, sets, whole, costs[1]),
        ]
        runner.compare("pieces", name, dtype, contenders)
