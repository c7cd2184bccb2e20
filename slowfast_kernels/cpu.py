"""The CPU backend: allocates results and hands filled Params structs to the C++ kernels of ``csrc/cpu``.

Arguments have been validated by ``ops``. float32, bfloat16 and float16 in and out, float32 inside.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import addressof

import torch
from torch import Tensor

from ._extension import extension
from .call_plan import CallPlan, described
from .calls import (
    AttentionOptions,
    AttentionTensors,
    BackwardTensors,
    FusedOptions,
    FusedTensors,
    MergeOptions,
    MergeTensors,
    MixOptions,
    MixTensors,
    PoolCallOptions,
    scale_of,
)
from .gate import float_value
from .gradients import (
    attention_differentiable,
    attention_needs,
    mix_differentiable,
    mix_needs,
    new_gradients,
    new_like,
    row_major,
)
from .params import (
    GATE_SLOTS,
    MERGE_SLOTS,
    MIX_SLOTS,
    CrossAttentionParams,
    Slot,
    address,
    addresses_of,
    attention_backward_params,
    attention_slots,
    copy,
    cross_attention_params,
    fill_attention_backward,
    fill_attention_gradients,
    fill_gated_mix_backward,
    gated_mix_backward_params,
    gated_mix_params,
    kernel_call,
    merge_params,
    pool_backward_params,
    pool_params,
)
from .pool_plan import PoolPlan, describe_pool


def pool(frames: Tensor, plan: PoolPlan, norm_eps: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """frames [F, H * W, C] -> slow [Ns, C], cu_slow, fast [Nf, C], cu_fast (prefix sums int32 [B + 1])."""
    slow, fast = (frames.new_empty(n, frames.shape[2]) for n in (plan.num_slow, plan.num_fast))
    params = pool_params(frames, plan, norm_eps, slow, fast)
    extension().cpu_pool(addressof(params), torch.get_num_threads())
    _, _, cu_slow, cu_fast = plan.tables(frames.device)
    return slow, cu_slow.clone(), fast, cu_fast.clone()


def pool_plan_of(frames: Tensor, plan: PoolPlan) -> CallPlan:
    """Of ``pool``. A unit of work is a row of an item's cells."""
    units = (plan.num_items * plan.cells[0],)
    return describe_pool(plan, units, 8 * frames.shape[2] * torch.get_num_threads(), **_threads())


def _threads() -> dict[str, int | str]:
    return {"threads": torch.get_num_threads(), "isa": extension().cpu_isa()}


def prepare_text_cross_attention(sample: AttentionTensors, options: AttentionOptions) -> Callable:
    """A function of tensors alike: context [Nt, Hq, D] and, if asked, lse [Nt, Hq] float32."""
    params = cross_attention_params(sample, scale_of(sample.q, options.softmax_scale), options.num_splits)
    shape = (sample.text_rows.shape[0], *sample.q.shape[1:])
    slots = (*attention_slots(sample), Slot("context", "context"), Slot("lse", "lse"))
    attend = kernel_call(extension().cpu_cross_attention, AttentionTensors, ("context", "lse"), (params, slots))

    @described(lambda: _attention_plan(params))
    def run(tensors: AttentionTensors, addresses: bytes | None = None) -> tuple[Tensor, Tensor | None]:
        q = tensors.q
        context = q.new_empty(shape)
        lse = q.new_empty(shape[:2], dtype=torch.float32) if options.return_lse else None
        attend(addresses or addresses_of(tensors), context.data_ptr(), address(lse), torch.get_num_threads())
        return context, lse

    return run


def prepare_gated_residual_mix(sample: MixTensors, options: MixOptions) -> Callable:
    """A function of tensors alike: ``g * context`` [Nt, C] added to the text rows of state [rows, C], a new tensor."""
    params = gated_mix_params(*sample[:3], sample.gate(options))
    mix = kernel_call(extension().cpu_gated_mix, MixTensors, ("out", "value"), (params, MIX_SLOTS))

    @described(lambda: CallPlan(tiles=_threads(), workspace_bytes=8 * params.rows))
    def run(tensors: MixTensors, addresses: bytes | None = None) -> Tensor:
        out, value = new_like(tensors.state), float_value(tensors.gate_value)
        mix(addresses or addresses_of(tensors), out.data_ptr(), address(value), torch.get_num_threads())
        return out

    return run


def prepare_cross_attention(sample: FusedTensors, options: FusedOptions) -> Callable:
    """A function of tensors alike: attention, gate and mix in one call; the context never leaves float32."""
    inputs, state = sample.attention, sample.state
    scale = scale_of(inputs.q, options.softmax_scale)
    params = cross_attention_params(inputs, scale, options.num_splits, state, sample.gate(options))
    slots = (*attention_slots(inputs), *GATE_SLOTS, Slot("state", "state"), Slot("out", "out"))
    attend = kernel_call(extension().cpu_cross_attention, FusedTensors, ("out", "value"), (params, slots))
    all_rows_are_text = inputs.text_rows.shape[0] == state.shape[0]

    @described(lambda: _attention_plan(params))
    def run(tensors: FusedTensors, addresses: bytes | None = None) -> Tensor:
        state = tensors.state
        out = new_like(state) if all_rows_are_text else state.clone(memory_format=torch.contiguous_format)
        value = float_value(tensors.gate_value)
        attend(addresses or addresses_of(tensors), out.data_ptr(), address(value), torch.get_num_threads())
        return out

    return run


def prepare_merge_attention(sample: MergeTensors, options: MergeOptions) -> Callable:
    """A function of tensors alike: context [Nt, Hq, D] and lse [Nt, Hq] over the tokens of both sides."""
    params = merge_params(sample)
    merge = kernel_call(extension().cpu_merge, MergeTensors, ("context", "lse"), (params, MERGE_SLOTS))

    @described(lambda: CallPlan(tiles=_threads()))
    def run(tensors: MergeTensors, addresses: bytes | None = None) -> tuple[Tensor, Tensor]:
        context, lse = map(new_like, tensors[:2])
        merge(addresses or addresses_of(tensors), context.data_ptr(), lse.data_ptr(), torch.get_num_threads())
        return context, lse

    return run


_BACKWARD_WORKSPACE = 48 * 2**20  # bytes that partial sums of dQ may take


def prepare_text_cross_attention_backward(
    sample: BackwardTensors, options: AttentionOptions, needs: tuple[bool, ...]
) -> Callable:
    """A function of tensors alike: gradients of q, slow_kv and slow_values, None where ``needs`` is False."""
    inputs: AttentionTensors = sample.inputs
    params = attention_backward_params(inputs, scale_of(inputs.q, options.softmax_scale), _BACKWARD_WORKSPACE)
    kernel = extension().cpu_cross_attention_backward
    needs = attention_needs(inputs, needs)
    has_other_rows = inputs.text_rows.shape[0] < inputs.q.shape[0]
    note = f"a pass over the slow tokens; partial sums of dQ take {_BACKWARD_WORKSPACE} bytes at most"

    @described(lambda: CallPlan(tiles=_threads(), workspace_bytes=None, notes=(note,)))
    def run(tensors: BackwardTensors) -> tuple[Tensor | None, ...]:
        inputs = tensors.inputs
        gradients = new_gradients(attention_differentiable(inputs), needs)
        if gradients[0] is not None and has_other_rows:
            gradients[0].zero_()
        mine = copy(params)
        held = fill_attention_backward(mine, tensors)  # noqa: F841  until the kernel has read it
        fill_attention_gradients(mine, inputs, gradients)
        kernel(addressof(mine), torch.get_num_threads())
        return gradients

    return run


_MIX_ROWS_A_BLOCK, _MIX_BLOCKS = 16, 64  # text rows whose sums are apart, at least; blocks of them, at most


def prepare_gated_residual_mix_backward(
    sample: BackwardTensors, options: MixOptions, needs: tuple[bool, ...]
) -> Callable:
    """A function of tensors alike: gradients of state, context, gate_weight, gate_bias, warm_up and gate_value."""
    inputs: MixTensors = sample.inputs
    needs = mix_needs(inputs, needs)
    num_blocks = min(-(-inputs.text_rows.shape[0] // _MIX_ROWS_A_BLOCK), _MIX_BLOCKS)
    params = gated_mix_backward_params(inputs, inputs.gate(options), needs[2], num_blocks)
    num_floats = max(num_blocks, 1) * params.partial_stride if any(needs[2:5]) else 0
    kernel = extension().cpu_gated_mix_backward

    @described(lambda: CallPlan(tiles=_threads(), workspace_bytes=4 * num_floats + 8 * params.rows))
    def run(tensors: BackwardTensors) -> tuple[Tensor | None, ...]:
        inputs, grad = tensors.inputs, row_major(tensors.grads[0])
        gradients = new_gradients(mix_differentiable(inputs), needs)
        partials = torch.empty(num_floats, dtype=torch.float32, device="cpu") if num_floats else None
        mine, gate = copy(params), inputs.gate(options)
        held = fill_gated_mix_backward(mine, grad, inputs, gate, gradients, partials)  # noqa: F841  as above
        kernel(addressof(mine), torch.get_num_threads())
        return gradients

    return run


def prepare_pool_backward(sample: BackwardTensors, options: PoolCallOptions, needs: tuple[bool, ...]) -> Callable:
    """A function of tensors alike: the gradient of frames, which is needed."""
    plan = options.plan
    kernel = extension().cpu_pool_backward

    def describe() -> CallPlan:
        frames = sample.inputs.frames
        units = (frames.shape[0] * plan.backward_cells[0],)
        return describe_pool(plan, units, 4 * frames.shape[2] * torch.get_num_threads(), **_threads())

    @described(describe)
    def run(tensors: BackwardTensors) -> tuple[Tensor]:
        (frames,) = tensors.inputs
        (grad_frames,) = new_gradients(tensors.inputs, needs)
        grads = [None if x is None else row_major(x) for x in tensors.grads]
        params = pool_backward_params(frames, plan, options.norm_eps, *grads, grad_frames)
        kernel(addressof(params), torch.get_num_threads())
        return (grad_frames,)

    return run


def _attention_plan(params: CrossAttentionParams) -> CallPlan:
    """The workspace is the splits' partial results, and some scratch a thread that depends on the instruction set."""
    if params.num_splits == 0:
        note = "the kernel deals out blocks of rows by the slow tokens that they see, several units a thread"
        return CallPlan(tiles=_threads(), workspace_bytes=None, notes=(note,))
    floats = params.num_splits * params.num_text * params.num_q_heads * (params.head_dim + 1)
    return CallPlan(tiles=_threads(), num_splits=params.num_splits, workspace_bytes=4 * floats)
