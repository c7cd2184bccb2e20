"""Backward pass of the gated mix, in Triton: gradients of state and context, and the gate's, which are sums over rows.

Roofline: gradient, state and context are read once and two gradients written once, all at memory speed. The gradient of
the gate's weight is a sum over the text rows: a program takes every so manyth of them, keeps its share in registers
and leaves it in ``partials``; a second kernel adds up the programs' shares, in a fixed order. Rows that are no text
rows, if any, come from a copy of the whole gradient before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call_plan import CallPlan, described
from ..calls import BackwardTensors, MixOptions
from ..gradients import mix_differentiable, mix_needs, mix_partial_stride, new_gradients, row_major
from ..heuristics.triton import triton_mix_backward_config
from ._common import (
    activated,
    before_activation,
    describe,
    factor_of,
    gdc_launch_dependents,
    gdc_wait,
    on_device_of,
    unweighted,
)
from ._launch import Launch
from .gated_mix import copied_or_empty

_SUM_ROWS, _SUM_COLS = 128, 32  # of ``partials`` that a program adds up at a time


@triton.jit(do_not_specialize=["num_text"])
def _gated_mix_backward(
    grad, state, context, text_rows, weight, bias, warm_up, value,  # None: not there, or not read
    grad_state, grad_context, grad_value, partials,  # None: not asked for
    num_text, grad_row_stride, state_row_stride, context_row_stride, partial_stride,
    SUM_WEIGHT: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, GATE: tl.constexpr, TANH_WARM_UP: tl.constexpr,
    NUM_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    cols = tl.arange(0, BLOCK_C)
    is_col = cols < C
    factor, warm_up_slope = 1.0, 1.0
    if warm_up is not None:
        factor = factor_of(warm_up, TANH_WARM_UP)
        if TANH_WARM_UP:
            warm_up_slope = tl.where(num_text > 0, 1 - factor * factor, 0.0)  # of no rows 0, whatever the gate holds
    if weight is not None:
        w = tl.load(weight + cols, mask=is_col, other=0.0).to(tl.float32)
        b = tl.load(bias).to(tl.float32)
    weight_sum = tl.zeros((BLOCK_C,), tl.float32)
    bias_sum, warm_up_sum = 0.0, 0.0
    for text in tl.range(tl.program_id(0), num_text, tl.num_programs(0), num_stages=NUM_STAGES):
        row, text_row = tl.load(text_rows + text).to(tl.int64), tl.cast(text, tl.int64)
        upstream = tl.load(grad + row * grad_row_stride + cols, mask=is_col, other=0.0)
        g = upstream.to(tl.float32)
        if weight is not None:
            x = tl.load(state + row * state_row_stride + cols, mask=is_col, other=0.0).to(tl.float32)
            act = activated(tl.sum(x * w, 0) + b, GATE)
        else:
            act = unweighted(value, text, GATE)
        if grad_context is not None:
            scaled = (g * (act * factor)).to(grad_context.dtype.element_ty)
            tl.store(grad_context + text_row * C + cols, scaled, mask=is_col)
        if context is not None:
            mixed = tl.load(context + text_row * context_row_stride + cols, mask=is_col, other=0.0).to(tl.float32)
            grad_gate = tl.sum(g * mixed, 0)
            grad_act = grad_gate * factor
            warm_up_sum += grad_gate * act
            if grad_value is not None:
                tl.store(grad_value + text, grad_act.to(grad_value.dtype.element_ty))
            if weight is not None:
                grad_pre = before_activation(grad_act, act, GATE)
                bias_sum += grad_pre
                if SUM_WEIGHT:
                    weight_sum += grad_pre * x
                if grad_state is not None:
                    upstream = (g + grad_pre * w).to(grad_state.dtype.element_ty)
        if grad_state is not None:
            tl.store(grad_state + row * C + cols, upstream, mask=is_col)
    if partials is not None:
        mine = partials + tl.program_id(0).to(tl.int64) * partial_stride
        if SUM_WEIGHT:
            tl.store(mine + cols, weight_sum, mask=is_col)
        tl.store(mine + partial_stride - 4, bias_sum)
        tl.store(mine + partial_stride - 3, warm_up_sum * warm_up_slope)


@triton.jit(do_not_specialize=["num_partials"])
def _sum_partials(
    partials, grad_weight, grad_bias, grad_warm_up, num_partials, partial_stride,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in tl.range(0, num_partials, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        is_there = (rows < num_partials)[:, None] & (cols < partial_stride)[None, :]
        places = partials + rows.to(tl.int64)[:, None] * partial_stride + cols[None, :]
        total += tl.load(places, mask=is_there, other=0.0)
    sums = tl.sum(total, 0)
    if grad_weight is not None:
        tl.store(grad_weight + cols, sums.to(grad_weight.dtype.element_ty), mask=cols < C)
    if grad_bias is not None:
        tl.store(grad_bias + cols * 0, sums.to(grad_bias.dtype.element_ty), mask=cols == partial_stride - 4)
    if grad_warm_up is not None:
        tl.store(grad_warm_up + cols * 0, sums.to(grad_warm_up.dtype.element_ty), mask=cols == partial_stride - 3)


def prepare_gated_residual_mix_backward(
    sample: BackwardTensors, options: MixOptions, needs: tuple[bool, ...]
) -> Callable:
    """A function of tensors alike: gradients of state, context, gate_weight, gate_bias, warm_up and gate_value."""
    needs_state, *needs = mix_needs(sample.inputs, needs)
    gate, device = sample.inputs.gate(options), describe(sample.inputs.state.device)
    num_text, channels = sample.inputs.text_rows.shape[0], sample.inputs.state.shape[1]
    dtype_bytes = sample.inputs.state.element_size()
    config = triton_mix_backward_config(num_text, channels, dtype_bytes, device.num_sms, device.shared_bytes)
    partial_stride = mix_partial_stride(channels, needs[1])
    num_floats = config.num_programs * partial_stride if any(needs[1:4]) else 0
    reads_context = (needs_state and gate.weight is not None) or num_floats > 0 or needs[4]
    constants = {
        "SUM_WEIGHT": needs[1], "C": channels, "BLOCK_C": config.block_c, "GATE": gate.kind,
        "TANH_WARM_UP": gate.warm_up_tanh, "NUM_STAGES": config.num_stages, "PDL": device.dependent_launch,
        "num_warps": config.num_warps, "enable_fp_fusion": True,
    }  # fmt: skip
    launch = Launch(_gated_mix_backward, (config.num_programs,), constants)
    sum_constants = {
        "C": channels, "BLOCK_R": _SUM_ROWS, "BLOCK_C": _SUM_COLS, "PDL": device.dependent_launch,
        "num_warps": 8, "enable_fp_fusion": True,
    }  # fmt: skip
    sum_grid = (triton.cdiv(partial_stride, _SUM_COLS),)
    sum_launch = Launch(_sum_partials, sum_grid, sum_constants, waits=device.dependent_launch)

    @described(lambda: CallPlan(tiles=asdict(config), grid=(config.num_programs,), workspace_bytes=4 * num_floats))
    @on_device_of
    def run(tensors: BackwardTensors) -> tuple[Tensor | None, ...]:
        inputs, grad, gate = tensors.inputs, tensors.grads[0], tensors.inputs.gate(options)
        grad_state = copied_or_empty(grad, num_text) if needs_state else None
        gradients = new_gradients(mix_differentiable(inputs)[1:], needs)
        grad_context, grad_weight, grad_bias, grad_warm_up, grad_value = gradients
        partials = torch.empty(num_floats, dtype=torch.float32, device=grad.device) if num_floats else None
        grad = row_major(grad)
        arguments = (
            grad, None if gate.weight is None else inputs.state, inputs.context if reads_context else None,
            inputs.text_rows, *gate.read_tensors, grad_state, grad_context, grad_value, partials,
        )  # fmt: skip
        strides = (grad.stride(0), inputs.state.stride(0), inputs.context.stride(0), partial_stride)
        launch(arguments, (num_text, *strides))
        if partials is not None:
            sums = (partials, grad_weight, grad_bias, grad_warm_up)
            sum_launch(sums, (config.num_programs, partial_stride))
        return grad_state, *gradients

    return run
