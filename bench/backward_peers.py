"""The peers of attention's gradients: SDPA's FlashAttention-2 and cuDNN, FlashAttention 2, 3 and 4.

Each gets K and V apart, in the layout that it likes best, and gives dK and dV. Query heads stay in groups, as the
package takes them (``gqa``), or become rows of their KV head by hand (``packed``: no sum over heads is left), which
is a peer of its own, as is a deterministic mode; K and V are never repeated, which could only lose.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .backward import STEP, Competitor, Differentiated, Way, deterministic_algorithms, differentiated
from .inputs import AttentionInputs, Gradients
from .peers import PEERS, SPLITS, Sets, accepted, first_of, sdpa_context, sdpa_inputs, splits_keys

DETERMINISTIC = " deterministic"  # after a peer's name
GROUPINGS = {"gqa": "", "packed": " packed"}  # likewise

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # of [B, H, length, D] each


class AttendWay(NamedTuple):
    label: str
    grouping: str
    layout: str
    attend: Attend
    around: Callable[[], AbstractContextManager] = nullcontext


class GradientPeer(NamedTuple):
    """``ways(inputs, part, deterministic)``; without ``has_mode`` there is no deterministic one to ask for."""

    name: str
    ways: Callable[[AttentionInputs, str, bool], Iterator[AttendWay]]
    has_mode: bool = True

    def absent(self, device: torch.device) -> str | None:
        return _ABSENT[self.name](device)


_ABSENT = {peer.name: peer.absent for peer in PEERS}


# ------------------------------------------------------------------------------------------------- SDPA


def _sdpa_ways(
    inputs: AttentionInputs, part: str, deterministic: bool, backend: SDPBackend | None
) -> Iterator[AttendWay]:
    def attend(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=enable_gqa)

    around = deterministic_algorithms if deterministic else nullcontext
    for grouping in GROUPINGS:
        for layout in ("hnd", "nhd"):
            bound = partial(attend, enable_gqa=grouping == "gqa")
            yield AttendWay(f"{grouping} {layout}", grouping, layout, bound, around)


# -------------------------------------------------------------------------------------- FlashAttention


def _flash_ways(inputs: AttentionInputs, part: str, deterministic: bool, module: str) -> Iterator[AttendWay]:
    """``flash_attn_func`` on [B, length, H, D]; its forward pass may split the keys."""
    package = importlib.import_module(module)
    function = package.flash_attn_func
    if deterministic and not accepted(function, deterministic=True):
        raise NotImplementedError("this release has no deterministic mode")
    mode = {"deterministic": True} if deterministic else {}
    splits = part == STEP and bool(accepted(function, num_splits=2)) and splits_keys(package, inputs)

    def attend(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        return first_of(function(*(x.transpose(1, 2) for x in (q, k, v)), **options)).transpose(1, 2)

    for grouping in GROUPINGS:
        yield AttendWay(grouping, grouping, "nhd", partial(attend, **mode))
        for count in SPLITS if splits else ():
            bound = partial(attend, num_splits=count, **mode)
            yield AttendWay(f"{grouping} num_splits={count}", grouping, "nhd", bound)


# ---------------------------------------------------------------------------------------------- registry

GRADIENT_PEERS = (
    GradientPeer("torch", partial(_sdpa_ways, backend=None), has_mode=False),
    GradientPeer("sdpa-flash", partial(_sdpa_ways, backend=SDPBackend.FLASH_ATTENTION)),
    GradientPeer("sdpa-cudnn", partial(_sdpa_ways, backend=SDPBackend.CUDNN_ATTENTION)),  # refuses the mode, so far
    GradientPeer("fa4", partial(_flash_ways, module="flash_attn.cute")),
    GradientPeer("fa3", partial(_flash_ways, module="flash_attn_interface")),
    GradientPeer("fa2", partial(_flash_ways, module="flash_attn")),
)


class Mode(NamedTuple):
    """What a peer takes part as."""

    name: str
    grouping: str
    deterministic: bool


def modes(peer: GradientPeer) -> list[Mode]:
    both = (False, True) if peer.has_mode else (False,)
    return [
        Mode(peer.name + suffix + DETERMINISTIC * deterministic, grouping, deterministic)
        for grouping, suffix in GROUPINGS.items()
        for deterministic in both
    ]


def competitors(peer: GradientPeer, sets: Sets, upstream: list[Tensor]) -> list[Competitor]:
    """``upstream``: of each set the gradient of its context [Nt, Hq, D]."""

    def ways(part: str, mode: Mode) -> Iterator[Way]:
        for way in peer.ways(sets[0], part, mode.deterministic):
            if way.grouping == mode.grouping:
                yield Way(way.label, lambda part, way=way: _build(way, sets, upstream))

    def facts(mode: Mode) -> dict[str, bool]:
        told = {"deterministic": mode.deterministic, "packed": mode.grouping == "packed"}
        return {name: True for name, holds in told.items() if holds}

    return [Competitor(mode.name, partial(ways, mode=mode), facts=facts(mode)) for mode in modes(peer)]


def _build(way: AttendWay, sets: Sets, upstream: list[Tensor]) -> tuple[list[Differentiated], Callable]:
    heads = sets[0].shape.heads
    every = [_passes(way, *each) for each in zip(sets, upstream, strict=True)]
    return every, partial(_answers, way.grouping, heads.num_q // heads.num_kv)


def _passes(way: AttendWay, inputs: AttentionInputs, upstream: Tensor) -> Differentiated:
    grad = upstream.view_as(inputs.q).unflatten(0, (inputs.shape.batch, -1))
    grad, _, _ = sdpa_inputs(grad, inputs.keys[:, :1], inputs.values[:, :1], way.grouping, way.layout)
    qkv = sdpa_inputs(inputs.query, inputs.keys, inputs.values, way.grouping, way.layout)
    return differentiated(way.attend, qkv, [grad], way.around)


def _answers(grouping: str, heads_per_kv: int, found: tuple[Tensor, ...]) -> Gradients:
    """(context, dQ, dK, dV) as SDPA lays them out -> as the reference does."""
    rows = (sdpa_context([x], grouping, heads_per_kv) for x in found[:2])
    return Gradients(*rows, *(x.transpose(1, 2).flatten(0, 1) for x in found[2:]))
