"""Peers whose rows see parts of the slow tokens: SDPA under a dense mask, and flex_attention under a block mask.

Masks are made once, outside the timed region, in every form that a kernel may like: boolean, and added to the scores.
FlashAttention is not here: its own functions know causal and sliding windows, not a boundary of each row's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .inputs import AttentionInputs, visible
from .peers import SDPA_WAYS, Sets, peer_variant, sdpa_context, sdpa_inputs
from .runner import Variant


class Prefixes(NamedTuple):
    """Text row i of a sequence sees its tokens 0 .. end[i] - 1; every sequence alike."""

    end: Tensor  # [n]
    tokens: int


class MaskedPeer(NamedTuple):
    name: str
    absent: Callable[[torch.device], str | None]
    variants: Callable[[Sets, Tensor, Prefixes], Iterator[Variant]]


def _heads_per_kv(inputs: AttentionInputs) -> int:
    return inputs.shape.heads.num_q // inputs.shape.heads.num_kv


# ------------------------------------------------------------------------------------------------- SDPA


def _mask(prefixes: Prefixes, grouping: str, form: str, heads_per_kv: int, dtype: torch.dtype) -> Tensor:
    """[rows, tokens] as ``sdpa_inputs`` orders rows of that grouping."""
    sees = visible(torch.zeros_like(prefixes.end), prefixes.end, prefixes.tokens)
    if grouping == "packed":
        sees = sees.repeat_interleave(heads_per_kv, 0)
    if form == "boolean":
        return sees
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, -torch.inf)


def _sdpa_variants(
    sets: Sets, reference: Tensor, prefixes: Prefixes, backend: SDPBackend | None, ways: tuple[str, ...]
) -> Iterator[Variant]:
    heads_per_kv = _heads_per_kv(sets[0])

    def variant(way: str, form: str) -> Variant:
        grouping, layout = way.split()
        masks: list[Tensor] = []  # one for all input sets, made when the first is bound

        def bind(inputs: AttentionInputs) -> Callable[[], list[Tensor]]:
            if inputs is sets[0]:
                masks[:] = [_mask(prefixes, grouping, form, heads_per_kv, inputs.q.dtype)]
            qkv = sdpa_inputs(inputs.query, inputs.keys, inputs.values, grouping, layout)
            attend = partial(
                F.scaled_dot_product_attention, *qkv, attn_mask=masks[0], enable_gqa=grouping == "gqa"
            )  # fmt: skip

            def call_on_backend() -> list[Tensor]:
                with sdpa_kernel(backend):
                    return [attend()]

            return (lambda: [attend()]) if backend is None else call_on_backend

        to_context = partial(sdpa_context, grouping=grouping, heads_per_kv=heads_per_kv)
        return peer_variant(f"{way} {form}", sets, reference, bind, to_context)

    for way in ways:
        for form in ("boolean", "added"):
            yield variant(way, form)


# ------------------------------------------------------------------------------------------------- flex

_TUNED = "max-autotune-no-cudagraphs"


def _flex_variants(sets: Sets, reference: Tensor, prefixes: Prefixes, tuned: bool) -> Iterator[Variant]:
    """Rows of a group's heads packed, or heads in groups; Inductor's choice of tiles, and the best of its sweep.

    Boundaries are looked up, as a model has them: as data.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    heads_per_kv, end = _heads_per_kv(sets[0]), prefixes.end

    def variant(grouping: str, mode: str | None) -> Variant:
        packed = heads_per_kv if grouping == "packed" else 1
        made: list = []  # the block mask and the compiled function, for all input sets

        def sees(batch, head, row, token):
            return token < end[row // packed]

        def bind(inputs: AttentionInputs) -> Callable[[], list[Tensor]]:
            if inputs is sets[0]:
                torch.compiler.reset()
                rows = len(end) * packed
                block_mask = create_block_mask(sees, None, None, rows, prefixes.tokens, device=end.device)
                made[:] = [block_mask, torch.compile(flex_attention, dynamic=False, mode=mode)]
            block_mask, compiled = made
            q, k, v = sdpa_inputs(inputs.query, inputs.keys, inputs.values, grouping, "hnd")
            return lambda: [compiled(q, k, v, block_mask=block_mask, enable_gqa=grouping == "gqa")]

        to_context = partial(sdpa_context, grouping=grouping, heads_per_kv=heads_per_kv)
        return peer_variant(f"{grouping} {mode or 'default'}", sets, reference, bind, to_context)

    yield variant("packed", None)
    yield variant("gqa", None)
    if tuned:
        yield variant("packed", _TUNED)  # which reads K and V once for all heads of a group


# ---------------------------------------------------------------------------------------------- registry


def _needs_gpu(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a GPU"


def _on_cpu_only(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "on a GPU each SDPA backend is its own peer"


def masked_peers(tuned: bool) -> list[MaskedPeer]:
    """``tuned``: let flex_attention sweep its tiles, for half a minute a shape."""
    sdpa = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    choice = partial(_sdpa_variants, backend=None, ways=("gqa hnd", "packed hnd"))
    return [
        MaskedPeer("torch", _on_cpu_only, choice),
        *(
            MaskedPeer(f"sdpa-{name}", _needs_gpu, partial(_sdpa_variants, backend=backend, ways=SDPA_WAYS[backend]))
            for name, backend in sdpa.items()
        ),
        MaskedPeer("flex", _needs_gpu, partial(_flex_variants, tuned=tuned)),
    ]
