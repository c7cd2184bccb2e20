"""Shapes that must work and inputs for them, with poison wherever an op must not look."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import pytest
import torch
from torch import Generator, Tensor

from slowfast_kernels.calls import AttentionTensors
from slowfast_kernels.gate import GATE_CODES, GATES, WEIGHTED_GATES

LAYOUTS = ("contiguous", "strided", "heads_first")


class Shape(NamedTuple):
    """(text rows, slow tokens) of each sequence; ``other_rows`` are rows of q and state that are no text rows."""

    sequences: tuple[tuple[int, int], ...]
    heads: tuple[int, int] = (4, 2)  # Hq, Hkv
    dim: int = 64
    other_rows: int = 3

    @property
    def rows(self) -> int:
        return sum(text for text, _ in self.sequences) + self.other_rows

    def __str__(self) -> str:
        lengths = "_".join(f"{text}x{slow}" for text, slow in self.sequences)
        return f"{lengths}-h{self.heads[0]}kv{self.heads[1]}-d{self.dim}-other{self.other_rows}"


SHAPES = [
    Shape(((1, 1),), other_rows=0),
    Shape(((1, 300),), (28, 4), 128, 0),  # decode of the 7B model
    Shape(((1, 50), (1, 31), (1, 0), (1, 77)), (14, 2), 64, 0),  # ragged batched decode, one without a video
    Shape(((5, 70),), (28, 4), 64),
    Shape(((0, 40), (3, 0), (6, 33), (0, 0), (2, 1))),  # every kind of empty
    Shape(((0, 0),)),
    Shape(((0, 9), (0, 4)), other_rows=5),  # no text row at all
    Shape(((4, 0), (2, 0))),  # no slow token at all
    Shape(((1, 65), (130, 3)), (2, 1), 64),  # more rows than a tile
    Shape(((3, 129),), (16, 16), 32),
    Shape(((3, 40),), (16, 1), 64),
    Shape(((2, 37),), (15, 5), 80),
    Shape(((2, 37), (1, 20)), (6, 3), 96),
    Shape(((3, 45),), (2, 2), 256),
    Shape(((4, 21),), (3, 1), 7),
    Shape(((4, 21),), (1, 1), 1),
    Shape(((2, 19),), (8, 8), 128),
    Shape(((2, 19),), (12, 2), 100),
]
RAGGED = Shape(((3, 40), (0, 7), (1, 65), (5, 0), (4, 130)), (8, 2), 64, 4)


@dataclass
class Inputs:
    """Arguments of the ops, on one device and in one dtype."""

    state: Tensor
    q: Tensor
    slow_kv: Tensor
    cu_slow: Tensor
    text_rows: Tensor
    cu_text: Tensor
    gate_weight: Tensor
    gate_bias: Tensor
    warm_up: Tensor | None

    @property
    def attention(self) -> tuple[Tensor, ...]:
        return self.q, self.slow_kv, self.cu_slow, self.text_rows, self.cu_text

    @property
    def tensors(self) -> AttentionTensors:
        return AttentionTensors(*self.attention)

    @property
    def gating(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.gate_weight, self.gate_bias, self.warm_up

    @property
    def fused(self) -> tuple[Tensor | None, ...]:
        return self.state, *self.attention, *self.gating

    @property
    def other_rows(self) -> Tensor:
        """Rows of q and state that are no text rows."""
        is_other = torch.ones(len(self.q), dtype=torch.bool, device=self.q.device)
        is_other[self.text_rows.long()] = False
        return is_other.nonzero().flatten()

    def sequence(self, b: int) -> Inputs:
        """Sequence ``b`` alone, a batch of one."""
        slow, text = (cu[b : b + 2].tolist() for cu in (self.cu_slow, self.cu_text))
        alone = {"device": self.q.device, "dtype": torch.int32}
        return replace(
            self,
            slow_kv=self.slow_kv[slow[0] : slow[1]],
            cu_slow=torch.tensor([0, slow[1] - slow[0]], **alone),
            text_rows=self.text_rows[text[0] : text[1]],
            cu_text=torch.tensor([0, text[1] - text[0]], **alone),
        )


def poison(x: Tensor) -> Tensor:
    """Fill with NaN, +Inf and -Inf in turn."""
    bad = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=x.dtype, device=x.device)
    return x.copy_(bad.repeat(-(-x.numel() // 3))[: x.numel()].reshape(x.shape))


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values under other strides; around a strided view lies poison. The last dimension stays contiguous."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, want one of {LAYOUTS}")
    if layout == "strided":
        storage = poison(x.new_zeros([n + 3 for n in x.shape[:-1]] + [x.shape[-1] + 8]))
        view = storage[(*(slice(1, n + 1) for n in x.shape[:-1]), slice(8, None))]
        return view.copy_(x)
    if layout == "heads_first" and x.dim() > 2:
        order = (*range(1, x.dim() - 1), 0, x.dim() - 1)
        back = (x.dim() - 2, *range(x.dim() - 2), x.dim() - 1)
        return x.permute(order).contiguous().permute(back)
    return x


def make_inputs(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: Generator,
    layout: str = "contiguous",
    gate_dtype: torch.dtype | None = None,
) -> Inputs:
    """Standard normal inputs; text rows in random order; rows that are no text rows hold NaN and Inf."""

    def normal(*size: int, scale: float = 1.0, into: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * scale).to(into)

    def prefix_sums(counts: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)

    (num_q, num_kv), channels = shape.heads, shape.heads[0] * shape.dim
    text = [n for n, _ in shape.sequences]
    slow = [n for _, n in shape.sequences]
    order = torch.randperm(shape.rows, generator=generator, device=device).int()
    q, state = normal(shape.rows, num_q, shape.dim), normal(shape.rows, channels)
    for x in (q, state):
        x[order[sum(text) :].long()] = poison(x.new_zeros(shape.other_rows, *x.shape[1:]))
    gate_dtype = gate_dtype or dtype
    return Inputs(
        state=_laid_out(state, layout),
        q=_laid_out(q, layout),
        slow_kv=_laid_out(normal(sum(slow), num_kv, 2, shape.dim), layout),
        cu_slow=prefix_sums(slow),
        text_rows=order[: sum(text)].clone(),
        cu_text=prefix_sums(text),
        gate_weight=normal(1, channels, scale=channels**-0.5, into=gate_dtype),
        gate_bias=normal(1, scale=0.3, into=gate_dtype),
        warm_up=torch.full((1,), 0.7, dtype=gate_dtype, device=device),
    )


class Video(NamedTuple):
    """One call of ``slowfast_pool``."""

    frame_counts: tuple[int, ...]
    grid: tuple[int, int]
    channels: int = 16
    pool_stride: int = 1
    sampling_stride: int = 1
    temporal_stride: int = 1
    spatial_stride: int = 1
    min_fast_frames: int = 1

    @property
    def strides(self) -> dict[str, int]:
        return dict(zip(self._fields[3:], self[3:], strict=True))

    def __str__(self) -> str:
        counts = "_".join(map(str, self.frame_counts))
        strides = f"p{self.pool_stride}s{self.sampling_stride}t{self.temporal_stride}x{self.spatial_stride}"
        return f"{counts}-{self.grid[0]}x{self.grid[1]}-{strides}min{self.min_fast_frames}-c{self.channels}"


VIDEOS = [
    Video((1,), (1, 1)),
    Video((4,), (4, 4)),
    Video((8,), (4, 4), 64, 2, 1, 4, 1),  # as the released models pool
    Video((8, 1, 5), (5, 5), 24, 2, 1, 4, 2),  # an image between videos; odd rows and columns are dropped
    Video((1, 1), (3, 7), 8, 4, 3, 2, 2),  # images need no square grid
    Video((9,), (6, 6), 100, 1, 2, 2, 3),
    Video((17,), (4, 4), 7, 2, 2, 4, 2, 3),  # adaptive windows
    Video((7, 3), (4, 4), 1, 1, 1, 3, 1, 2),  # overlapping windows
    Video((3,), (9, 9), 256, 3, 1, 5, 2),  # fewer frames than the stride
    Video((13,), (2, 2), 40, 2, 3, 1, 1, 5),
    Video((6,), (7, 7), 520, 1, 1, 2, 7),
    Video((3,), (11, 11), 12, 5, 1, 2, 2),  # a stride past those that Triton unrolls
]


def make_frames(
    video: Video, dtype: torch.dtype, device: torch.device | str, generator: Generator, layout: str = "contiguous"
) -> Tensor:
    size = (sum(video.frame_counts), video.grid[0] * video.grid[1], video.channels)
    frames = torch.randn(size, generator=generator, device=device).to(dtype)
    return _laid_out(frames, layout)


GATE_WAYS = (*GATES, "given")  # how a gate can be formed


def gate_of(way: str, inputs: Inputs, generator: Generator) -> tuple[tuple[Tensor | None, ...], dict]:
    """(gate_weight, gate_bias, warm_up) and options of a call whose gate is formed that way."""
    if way in WEIGHTED_GATES:
        return inputs.gating, {"gate": way}
    without = (None, None, inputs.warm_up)
    if way == "none":
        return without, {"gate": way}
    assert way == "given"
    device, dtype = inputs.state.device, inputs.gate_bias.dtype
    value = torch.randn(len(inputs.text_rows), generator=generator, device=device).to(dtype)
    return without, {"gate_value": value}


def list_unknown_gate(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """``kind`` is on the lists of gates from here on, as a new one would be before a backend has its formula."""
    for module in [module for name, module in sys.modules.items() if name.startswith("slowfast_kernels.")]:
        for name in ("GATES", "WEIGHTED_GATES"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, (*getattr(module, name), kind))
    monkeypatch.setitem(GATE_CODES, kind, len(GATE_CODES))


def said(error: BaseException) -> str:
    """What an error and those that it was raised from say: Triton's compiler puts the call first, the cause behind."""
    causes = said(error.__cause__) if error.__cause__ else ""
    return f"{error}\n{causes}"


def add_ramp(inputs: Inputs, rise: float) -> None:
    """Scores of even heads gain up to ``rise`` along the slow tokens, those of odd heads lose as much."""
    dim = inputs.q.shape[2]
    heads = torch.arange(inputs.q.shape[1], device=inputs.q.device)
    inputs.q[..., 0] = torch.where(heads % 2 == 0, dim**0.5, -(dim**0.5)).to(inputs.q.dtype)
    ramp = torch.linspace(0, rise, len(inputs.slow_kv), device=inputs.q.device)
    inputs.slow_kv[:, :, 0, 0] = ramp[:, None].to(inputs.q.dtype)
