"""What an op is called with: its tensors and its options, each one named tuple.

The one description of an op's arguments. The registered op's schema, checks, fake, autograd and every backend take
their arguments from here, in this order and by these names; shapes stand in the public functions' docstrings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .gate import Gate
from .pool_plan import PoolOptions, PoolPlan, make_pool_plan


class PoolTensors(NamedTuple):
    frames: Tensor


class PoolCallOptions(NamedTuple):
    frame_counts: Sequence[int]
    grid: Sequence[int]
    pool_stride: int
    sampling_stride: int
    temporal_stride: int
    spatial_stride: int
    min_fast_frames: int
    norm_eps: float | None
    backend: str | None

    @property
    def strides(self) -> PoolOptions:
        return PoolOptions(
            self.pool_stride, self.sampling_stride, self.temporal_stride, self.spatial_stride, self.min_fast_frames
        )

    @property
    def plan(self) -> PoolPlan:
        """Kept by the values of counts, grid and strides."""
        return make_pool_plan(tuple(self.frame_counts), tuple(self.grid), *self.strides)


class AttentionTensors(NamedTuple):
    """``slow_kv`` is K and V [Ns, Hkv, 2, D], or K alone [Ns, Hkv, D] beside ``slow_values``."""

    q: Tensor
    slow_kv: Tensor
    cu_slow: Tensor
    text_rows: Tensor
    cu_text: Tensor
    slow_values: Tensor | None = None
    slow_begin: Tensor | None = None
    slow_end: Tensor | None = None
    slow_pieces: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """[Ns, Hkv, D]"""
        return self.slow_kv[:, :, 0] if self.slow_values is None else self.slow_kv

    @property
    def values(self) -> Tensor:
        """[Ns, Hkv, D]"""
        return self.slow_kv[:, :, 1] if self.slow_values is None else self.slow_values

    @property
    def selects(self) -> bool:
        """A row may see less than all of one run of tokens."""
        return self.slow_begin is not None or self.slow_end is not None or self.slow_pieces is not None


class AttentionOptions(NamedTuple):
    softmax_scale: float | None
    return_lse: bool
    num_splits: int
    backend: str | None


class MixTensors(NamedTuple):
    state: Tensor
    context: Tensor
    text_rows: Tensor
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    warm_up: Tensor | None
    gate_value: Tensor | None

    def gate(self, options: MixOptions | FusedOptions) -> Gate:
        return Gate.of(*self[3:], options.gate, options.warm_up_tanh)


class MixOptions(NamedTuple):
    gate: str
    warm_up_tanh: bool
    backend: str | None


class FusedTensors(NamedTuple):
    state: Tensor
    q: Tensor
    slow_kv: Tensor
    cu_slow: Tensor
    text_rows: Tensor
    cu_text: Tensor
    slow_values: Tensor | None
    slow_begin: Tensor | None
    slow_end: Tensor | None
    slow_pieces: Tensor | None
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    warm_up: Tensor | None
    gate_value: Tensor | None

    @classmethod
    def of(cls, state: Tensor, attention: AttentionTensors, gate: Gate) -> FusedTensors:
        return cls(state, *attention, gate.weight, gate.bias, gate.warm_up, gate.value)

    @property
    def attention(self) -> AttentionTensors:
        return AttentionTensors(*self[1:10])

    @property
    def selects(self) -> bool:
        return self.attention.selects

    def gate(self, options: FusedOptions) -> Gate:
        return Gate.of(*self[10:], options.gate, options.warm_up_tanh)


class FusedOptions(NamedTuple):
    softmax_scale: float | None
    num_splits: int
    gate: str
    warm_up_tanh: bool
    backend: str | None


class MergeTensors(NamedTuple):
    context_a: Tensor
    lse_a: Tensor
    context_b: Tensor
    lse_b: Tensor


class MergeOptions(NamedTuple):
    backend: str | None


class BackwardTensors(NamedTuple):
    """What a backward pass is called with, whatever the op."""

    grads: tuple[Tensor | None, ...]  # of the results that have gradients (``Op.has_gradient``); None: zero
    results: tuple[Tensor | None, ...]  # of the forward pass, those that ``Op.saves``
    inputs: NamedTuple  # the op's tensors


def scale_of(q: Tensor, softmax_scale: float | None) -> float:
    """The factor on q K^T; default 1 / sqrt(D)."""
    return q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale


def attention_bytes(inputs: AttentionTensors) -> tuple[int, int]:
    """Of the text rows of q, and of K and V."""
    q, values = inputs.q, inputs.slow_values
    kv_bytes = inputs.slow_kv.numel() + (0 if values is None else values.numel())
    return inputs.text_rows.shape[0] * q.shape[1] * q.shape[2] * q.element_size(), kv_bytes * q.element_size()


def is_aligned(x: Tensor) -> bool:
    """16-byte rows and base address, as TMA and vector loads need them."""
    unit = 16 // x.element_size()
    return x.data_ptr() % 16 == 0 and all(s > 0 and s % unit == 0 for s in x.stride()[:-1])
