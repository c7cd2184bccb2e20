"""Python's side of csrc/params.h: its enums' codes and its structs, field by field, to be filled by name.

A struct crosses to C++ as one address, so that no argument can take its neighbour's place. What is the same for all
calls of a signature is filled once. A call fills a copy with its addresses, since threads share the original: in C++,
by ``kernel_call``, or here (``copy`` and ``ctypes.addressof``), where more than addresses is new.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from ctypes import c_bool, c_float, c_int32, c_int64, c_uint32, c_void_p
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ._extension import extension
from .calls import AttentionTensors, BackwardTensors, FusedTensors, MergeTensors, MixTensors
from .dtypes import DTYPE_CODES
from .gate import GATE_CODES, Gate, float_value
from .gradients import mix_partial_stride
from .pool_plan import PoolPlan

_Struct = TypeVar("_Struct", bound=ctypes.Structure)


def _fields(ctype: type, names: str) -> list[tuple[str, type]]:
    return [(name, ctype) for name in names.split()]


class GateParams(ctypes.Structure):
    _fields_ = [
        *_fields(c_void_p, "weight bias warm_up value"),
        *_fields(c_int32, "dtype kind"),
        ("tanh_warm_up", c_bool),
    ]


class CrossAttentionParams(ctypes.Structure):
    _fields_ = [
        *_fields(c_void_p, "q cu_slow text_rows cu_text context lse state out"),
        ("gate", GateParams),
        *_fields(c_int64, "q_row_stride q_head_stride state_row_stride num_text num_slow"),
        *_fields(c_int32, "batch num_q_heads num_kv_heads head_dim num_splits"),
        ("softmax_scale", c_float),
        ("dtype", c_int32),
        *_fields(c_void_p, "keys values"),
        *_fields(c_int64, "k_token_stride k_head_stride v_token_stride v_head_stride"),
        *_fields(c_void_p, "slow_begin slow_end slow_pieces"),
        ("num_pieces", c_int64),
    ]


class CrossAttentionBackwardParams(ctypes.Structure):
    _fields_ = [
        ("forward", CrossAttentionParams),
        *_fields(c_void_p, "grad_context grad_lse grad_q grad_keys grad_values"),
        *_fields(c_int64, "grad_context_row_stride grad_context_head_stride grad_lse_row_stride grad_lse_head_stride"),
        *_fields(c_int64, "grad_kv_token_stride grad_kv_head_stride workspace_bytes"),
    ]


class GatedMixParams(ctypes.Structure):
    _fields_ = [
        *_fields(c_void_p, "state context text_rows out"),
        ("gate", GateParams),
        *_fields(c_int64, "rows num_text channels state_row_stride context_row_stride"),
        ("dtype", c_int32),
    ]


class GatedMixBackwardParams(ctypes.Structure):
    _fields_ = [
        *_fields(c_void_p, "grad state context text_rows grad_state grad_context grad_weight grad_bias grad_warm_up"),
        *_fields(c_void_p, "grad_value partials"),
        ("gate", GateParams),
        *_fields(c_int64, "rows num_text channels grad_row_stride state_row_stride context_row_stride partial_stride"),
        *_fields(c_int32, "num_blocks value_dtype dtype"),
    ]


class MergeParams(ctypes.Structure):
    _fields_ = [
        *_fields(c_void_p, "context_a lse_a context_b lse_b context lse"),
        *_fields(c_int64, "num_text a_row_stride a_head_stride b_row_stride b_head_stride"),
        *_fields(c_int64, "lse_a_row_stride lse_b_row_stride"),
        *_fields(c_int32, "num_heads head_dim dtype"),
    ]


class PoolParams(ctypes.Structure):
    _fields_ = [
        *_fields(c_void_p, "frames items entries slow fast"),
        *_fields(c_int64, "frame_stride token_stride channels"),
        *_fields(c_int32, "grid_w spatial_stride num_items max_cells_h max_cells_w"),
        ("norm_eps", c_float),
        ("dtype", c_int32),
    ]


class PoolBackwardParams(ctypes.Structure):
    _fields_ = [
        *_fields(c_void_p, "frames frame_table windows grad_slow grad_fast grad_frames"),
        *_fields(c_int64, "frame_stride token_stride slow_row_stride fast_row_stride num_frames channels"),
        *_fields(c_int32, "grid_h grid_w spatial_stride max_cells_h max_cells_w"),
        ("norm_eps", c_float),
        ("dtype", c_int32),
    ]


class SplitPlan(ctypes.Structure):
    """csrc/cuda/cross_attention/launch.h; the launch fills the last three."""

    _fields_ = [
        *_fields(c_int32, "dealt_ctas num_sms share_slots grid_heads grid_groups even_units even_blocks"),
        *_fields(c_int32, "consumers cluster_size num_groups max_tiles whole_units long_blocks"),
        *_fields(c_bool, "kv_evict_first gates_first"),
        *_fields(c_void_p, "partial_out partial_stats partial_gates counters"),
        ("heads_per_kv", c_int32),
        *_fields(c_uint32, "heads_per_kv_reciprocal splits_reciprocal"),
    ]


class BackwardPlan(ctypes.Structure):
    """csrc/cuda/cross_attention/backward.h"""

    _fields_ = [
        *_fields(c_int32, "num_ctas max_tiles max_sums max_groups spread heads_a_row"),
        ("splits_last_round", c_bool),
        *_fields(c_void_p, "tiles sums turns pair_turns pair_parts seen_tokens seeing_tiles masked_tiles row_ranges"),
        ("tile_words", c_int32),
        *_fields(c_void_p, "uses block_uses tile_sequences reach"),
    ]


STRUCTS = (
    GateParams,
    CrossAttentionParams,
    CrossAttentionBackwardParams,
    GatedMixParams,
    GatedMixBackwardParams,
    MergeParams,
    PoolParams,
    PoolBackwardParams,
    SplitPlan,
    BackwardPlan,
)


def copy(struct: _Struct) -> _Struct:
    return type(struct).from_buffer_copy(struct)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def addresses_of(tensors: Sequence[Tensor | None]) -> bytes:
    """As ``kernel_call`` takes them; 0 for None."""
    return array("Q", [address(x) for x in tensors]).tobytes()


class Slot(NamedTuple):
    """A pointer of a struct, by its field ("gate.weight"), and whose address it is: a tensor's of the call, by the name
    that ``calls`` gives it, or of what the call makes. ``behind``: bytes from that address on."""

    field: str
    source: str
    behind: int = 0


def kernel_call(
    kernel: Callable[..., None], tensors: type, made: Sequence[str], *structs: tuple[ctypes.Structure, Sequence[Slot]]
) -> Callable[..., None]:
    """A function of ``addresses_of`` a call's ``tensors``, of an address each for ``made``, and of a last argument.

    It runs ``kernel(address of each struct, last)`` on copies of ``structs``, in which each pointer that has a slot is
    the call's. Where two slots have one field, the later one counts.
    """
    sources = (*tensors._fields, *made)
    slots = [
        (which, _offset(type(struct), slot.field), sources.index(slot.source), slot.behind)
        for which, (struct, its_slots) in enumerate(structs)
        for slot in its_slots
    ]
    blocks = [bytes(struct) for struct, _ in structs]
    return extension().kernel_call(kernel, blocks, slots, len(tensors._fields), len(made))


def _offset(struct: type, field: str) -> int:
    first, _, rest = field.partition(".")
    return getattr(struct, first).offset + (_offset(dict(struct._fields_)[first], rest) if rest else 0)


def _alike(names: str) -> tuple[Slot, ...]:
    return tuple(Slot(name, name) for name in names.split())


GATE_SLOTS = (
    *(Slot(f"gate.{name}", source) for name, source in (("weight", "gate_weight"), ("bias", "gate_bias"))),
    *(Slot(f"gate.{name}", name) for name in ("warm_up", "value")),  # the value as ``float_value`` makes it
)
MIX_SLOTS = (*_alike("state context text_rows out"), *GATE_SLOTS)
MERGE_SLOTS = _alike("context_a lse_a context_b lse_b context lse")


def attention_slots(inputs: AttentionTensors | FusedTensors) -> tuple[Slot, ...]:
    """Of what is read; those of results are the caller's."""
    if inputs.slow_values is not None:
        return _attention_slots(Slot("values", "slow_values"))
    return _attention_slots(Slot("values", "slow_kv", inputs.slow_kv.stride(2) * inputs.slow_kv.element_size()))


@lru_cache(maxsize=64)
def _attention_slots(values: Slot) -> tuple[Slot, ...]:
    names = "q cu_slow text_rows cu_text slow_begin slow_end slow_pieces"
    return *_alike(names), Slot("keys", "slow_kv"), values


def gate_params(gate: Gate) -> GateParams:
    """All but the addresses."""
    dtype = next((x.dtype for x in (gate.weight, gate.bias, gate.warm_up) if x is not None), torch.float32)
    return GateParams(dtype=DTYPE_CODES[dtype], kind=GATE_CODES[gate.kind], tanh_warm_up=gate.warm_up_tanh)


def fill_gate(params: GateParams, gate: Gate) -> Tensor | None:
    """The addresses. A weight is [C] or [1, C], one run of C elements if its last dimension is contiguous.

    Returns what ``value`` points to, to be held until the kernel is launched.
    """
    params.weight, params.bias, params.warm_up = address(gate.weight), address(gate.bias), address(gate.warm_up)
    value = float_value(gate.value)
    params.value = address(value)
    return value


def pool_params(frames: Tensor, plan: PoolPlan, norm_eps: float | None, slow: Tensor, fast: Tensor) -> PoolParams:
    """Of ``pool(frames, plan, norm_eps)`` into ``slow`` and ``fast``, with the plan's tables."""
    items, entries, _, _ = plan.tables(frames.device)
    cells_h, cells_w = plan.cells
    return PoolParams(
        frames=frames.data_ptr(),
        items=items.data_ptr(),
        entries=entries.data_ptr(),
        slow=slow.data_ptr(),
        fast=fast.data_ptr(),
        frame_stride=frames.stride(0),
        token_stride=frames.stride(1),
        channels=frames.shape[2],
        grid_w=plan.grid[1],
        spatial_stride=plan.spatial_stride,
        num_items=plan.num_items,
        max_cells_h=cells_h,
        max_cells_w=cells_w,
        norm_eps=-1.0 if norm_eps is None else norm_eps,
        dtype=DTYPE_CODES[frames.dtype],
    )


def pool_backward_params(
    frames: Tensor,
    plan: PoolPlan,
    norm_eps: float | None,
    grad_slow: Tensor | None,
    grad_fast: Tensor | None,
    grad_frames: Tensor,
) -> PoolBackwardParams:
    """Of the gradient of ``pool(frames, plan, norm_eps)`` into ``grad_frames``, with the plan's tables."""
    frame_table, windows = plan.backward_tables(frames.device)
    cells_h, cells_w = plan.backward_cells
    return PoolBackwardParams(
        frames=frames.data_ptr(),
        frame_table=frame_table.data_ptr(),
        windows=windows.data_ptr(),
        grad_slow=address(grad_slow),
        grad_fast=address(grad_fast),
        grad_frames=grad_frames.data_ptr(),
        frame_stride=frames.stride(0),
        token_stride=frames.stride(1),
        slow_row_stride=0 if grad_slow is None else grad_slow.stride(0),
        fast_row_stride=0 if grad_fast is None else grad_fast.stride(0),
        num_frames=frames.shape[0],
        channels=frames.shape[2],
        grid_h=plan.grid[0],
        grid_w=plan.grid[1],
        spatial_stride=plan.spatial_stride,
        max_cells_h=cells_h,
        max_cells_w=cells_w,
        norm_eps=-1.0 if norm_eps is None else norm_eps,
        dtype=DTYPE_CODES[frames.dtype],
    )


def gated_mix_params(state: Tensor, context: Tensor, text_rows: Tensor, gate: Gate) -> GatedMixParams:
    """All but the addresses."""
    return GatedMixParams(
        gate=gate_params(gate),
        rows=state.shape[0],
        num_text=text_rows.shape[0],
        channels=state.shape[1],
        state_row_stride=state.stride(0),
        context_row_stride=context.stride(0),
        dtype=DTYPE_CODES[state.dtype],
    )


def gated_mix_backward_params(
    inputs: MixTensors, gate: Gate, sums_weight: bool, num_blocks: int
) -> GatedMixBackwardParams:
    """All but the addresses and the stride of the gradient."""
    return GatedMixBackwardParams(
        gate=gate_params(gate),
        rows=inputs.state.shape[0],
        num_text=inputs.text_rows.shape[0],
        channels=inputs.state.shape[1],
        state_row_stride=inputs.state.stride(0),
        context_row_stride=inputs.context.stride(0),
        partial_stride=mix_partial_stride(inputs.state.shape[1], sums_weight),
        num_blocks=num_blocks,
        value_dtype=DTYPE_CODES[torch.float32 if gate.value is None else gate.value.dtype],
        dtype=DTYPE_CODES[inputs.state.dtype],
    )


def fill_gated_mix_backward(
    params: GatedMixBackwardParams,
    grad: Tensor,
    inputs: MixTensors,
    gate: Gate,
    gradients: Sequence[Tensor | None],
    partials: Tensor | None,
) -> Tensor | None:
    """The rest; ``gradients`` in the order of the op's. Returns what ``fill_gate`` returns."""
    params.grad, params.grad_row_stride = grad.data_ptr(), grad.stride(0)
    params.state, params.context = inputs.state.data_ptr(), inputs.context.data_ptr()
    params.text_rows, params.partials = inputs.text_rows.data_ptr(), address(partials)
    state, context, weight, bias, warm_up, value = map(address, gradients)
    params.grad_state, params.grad_context, params.grad_value = state, context, value
    params.grad_weight, params.grad_bias, params.grad_warm_up = weight, bias, warm_up
    return fill_gate(params.gate, gate)


def merge_params(inputs: MergeTensors) -> MergeParams:
    """All but the addresses."""
    num_text, num_heads, head_dim = inputs.context_a.shape
    return MergeParams(
        num_text=num_text,
        a_row_stride=inputs.context_a.stride(0),
        a_head_stride=inputs.context_a.stride(1),
        b_row_stride=inputs.context_b.stride(0),
        b_head_stride=inputs.context_b.stride(1),
        lse_a_row_stride=inputs.lse_a.stride(0),
        lse_b_row_stride=inputs.lse_b.stride(0),
        num_heads=num_heads,
        head_dim=head_dim,
        dtype=DTYPE_CODES[inputs.context_a.dtype],
    )


def cross_attention_params(
    inputs: AttentionTensors,
    softmax_scale: float,
    num_splits: int,
    state: Tensor | None = None,
    gate: Gate | None = None,
) -> CrossAttentionParams:
    """All but the addresses; ``state`` and ``gate`` of the fused op."""
    q, keys, values = inputs.q, inputs.keys, inputs.values
    params = CrossAttentionParams(
        q_row_stride=q.stride(0),
        q_head_stride=q.stride(1),
        k_token_stride=keys.stride(0),
        k_head_stride=keys.stride(1),
        v_token_stride=values.stride(0),
        v_head_stride=values.stride(1),
        num_text=inputs.text_rows.shape[0],
        num_slow=keys.shape[0],
        num_pieces=0 if inputs.slow_pieces is None else inputs.slow_pieces.shape[0],
        batch=inputs.cu_text.shape[0] - 1,
        num_q_heads=q.shape[1],
        num_kv_heads=keys.shape[1],
        head_dim=q.shape[2],
        num_splits=num_splits,
        softmax_scale=softmax_scale,
        dtype=DTYPE_CODES[q.dtype],
    )
    if state is not None:
        params.state_row_stride = state.stride(0)
        params.gate = gate_params(gate)
    return params


def fill_attention(params: CrossAttentionParams, inputs: AttentionTensors) -> None:
    """The addresses of ``inputs``; those of the results are the caller's to fill."""
    for field, source, behind in attention_slots(inputs):
        x = getattr(inputs, source)
        if x is not None:
            setattr(params, field, x.data_ptr() + behind)


def attention_backward_params(
    inputs: AttentionTensors, softmax_scale: float, workspace_bytes: int
) -> CrossAttentionBackwardParams:
    """All but the addresses and the strides of the incoming gradients; those of K and V are written contiguously."""
    _, num_heads, head_dim = inputs.keys.shape
    apart = 2 if inputs.slow_values is None else 1  # K and V of a head are neighbours where both are one tensor
    return CrossAttentionBackwardParams(
        forward=cross_attention_params(inputs, softmax_scale, num_splits=0),
        grad_kv_token_stride=num_heads * apart * head_dim,
        grad_kv_head_stride=apart * head_dim,
        workspace_bytes=workspace_bytes,
    )


def fill_attention_backward(params: CrossAttentionBackwardParams, call: BackwardTensors) -> tuple[Tensor | None, ...]:
    """The addresses of all that is read, and the strides of the incoming gradients.

    Returns what the addresses belong to, to be held until the kernel is launched.
    """
    context, lse = (x if x.is_contiguous() else x.contiguous() for x in call.results)
    grad_context, grad_lse = call.grads
    if grad_context is None:
        grad_context = context.new_zeros(1, 1, context.shape[2]).expand(context.shape)
    elif grad_context.stride(2) != 1:
        grad_context = grad_context.contiguous()
    fill_attention(params.forward, call.inputs)
    params.forward.context, params.forward.lse = context.data_ptr(), lse.data_ptr()
    params.grad_context, params.grad_lse = grad_context.data_ptr(), address(grad_lse)
    params.grad_context_row_stride, params.grad_context_head_stride = grad_context.stride()[:2]
    if grad_lse is not None:
        params.grad_lse_row_stride, params.grad_lse_head_stride = grad_lse.stride()
    return context, lse, grad_context, grad_lse


def fill_attention_gradients(
    params: CrossAttentionBackwardParams, inputs: AttentionTensors, gradients: tuple[Tensor | None, ...]
) -> None:
    """The addresses of what is written: ``gradients`` of q, slow_kv and slow_values, contiguous, or None."""
    grad_q, grad_kv, grad_values = gradients
    params.grad_q, params.grad_keys, params.grad_values = address(grad_q), address(grad_kv), address(grad_values)
    if inputs.slow_values is None and grad_kv is not None:  # dV of a head is behind its dK
        params.grad_values = grad_kv.data_ptr() + inputs.q.shape[2] * inputs.q.element_size()


def take_kv_heads(params: CrossAttentionBackwardParams, first: int, count: int, element: int) -> None:
    """Leaves a call some of its KV heads, from ``first`` on, with their query heads; ``element``: bytes of one of q."""
    forward, heads_per_kv = params.forward, params.forward.num_q_heads // params.forward.num_kv_heads
    head, dim = first * heads_per_kv, forward.head_dim
    for struct, name, offset in (
        (forward, "q", head * forward.q_head_stride * element),
        (forward, "context", head * dim * element),
        (forward, "lse", head * 4),
        (forward, "keys", first * forward.k_head_stride * element),
        (forward, "values", first * forward.v_head_stride * element),
        (params, "grad_context", head * params.grad_context_head_stride * element),
        (params, "grad_lse", head * params.grad_lse_head_stride * 4),
        (params, "grad_q", head * dim * element),
        (params, "grad_keys", first * params.grad_kv_head_stride * element),
        (params, "grad_values", first * params.grad_kv_head_stride * element),
    ):
        begin = getattr(struct, name)
        if begin:  # None: a null pointer
            setattr(struct, name, begin + offset)
    forward.num_q_heads, forward.num_kv_heads = count * heads_per_kv, count
