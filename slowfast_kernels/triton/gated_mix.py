"""out[r] = state[r] + g * context[i] on the text rows r = text_rows[i]; every other row is copied. In Triton.

Roofline: state and context are read once and out is written once, all at memory speed. A program holds one text row
in registers, so that the gate's dot product and the mix read it once; rows that are no text rows, if any, come from
a copy of the whole state before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import triton
import triton.language as tl
from torch import Tensor

from ..call_plan import CallPlan, described
from ..calls import MixOptions, MixTensors
from ..gate import Gate
from ..gradients import new_like
from ..heuristics.triton import triton_row_config
from ._common import gate_of, gdc_wait, on_device_of
from ._launch import Launch


@triton.jit
def _gated_mix(
    state, context, text_rows, out, weight, bias, warm_up, value,
    lse,  # of the context's heads [Nt, Hq], or None; a row whose lse is -inf has no context and keeps its state
    state_row_stride, context_row_stride, lse_row_stride,
    C: tl.constexpr, BLOCK_C: tl.constexpr, GATE: tl.constexpr, TANH_WARM_UP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    text = tl.program_id(0).to(tl.int64)
    row = tl.load(text_rows + text).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    is_col = cols < C
    kept = tl.load(state + row * state_row_stride + cols, mask=is_col, other=0.0)
    x = kept.to(tl.float32)
    g = gate_of(x, weight, bias, warm_up, value, text, cols, C, GATE, TANH_WARM_UP)
    if PDL:  # only the context comes from the launch before
        gdc_wait()
    num_read = C
    if lse is not None:
        num_read = tl.where(tl.load(lse + text * lse_row_stride) == float("-inf"), 0, C)
    mixed = tl.load(context + text * context_row_stride + cols, mask=cols < num_read, other=0.0).to(tl.float32)
    mixed = (x + g * mixed).to(out.dtype.element_ty)
    if lse is not None:
        mixed = tl.where(cols < num_read, mixed, kept)
    tl.store(out + row * C + cols, mixed, mask=is_col)


def copied_or_empty(state: Tensor, num_text: int) -> Tensor:
    """Where the mix writes: rows that it will not write already hold the state. Text rows are distinct."""
    out = new_like(state)
    return out if num_text == state.shape[0] else out.copy_(state)


def mix_launch(num_text: int, channels: int, gate: Gate, dependent: bool) -> Launch:
    """Of state, context, text_rows, out, ``gate.read_tensors``, lse; the strides of a row of state, context and lse.

    ``dependent``: the launch before wrote nothing that this one reads but the context (and lse). lse [Nt, Hq] or None:
    a row whose lse is -inf keeps its state, and its context is not read.
    """
    config = triton_row_config(channels)
    constants = {
        "C": channels, "BLOCK_C": config.block_c, "GATE": gate.kind, "TANH_WARM_UP": gate.warm_up_tanh,
        "PDL": dependent, "num_warps": config.num_warps, "enable_fp_fusion": True,
    }  # fmt: skip
    return Launch(_gated_mix, (num_text,), constants, waits=dependent)


def prepare_gated_residual_mix(sample: MixTensors, options: MixOptions) -> Callable:
    """A function of tensors alike: ``g * context`` [Nt, C] added to the text rows of state [rows, C], a new tensor."""
    num_text, channels = sample.text_rows.shape[0], sample.state.shape[1]
    launch = mix_launch(num_text, channels, sample.gate(options), dependent=False)
    numbers = (sample.state.stride(0), sample.context.stride(0), 0)

    @described(lambda: CallPlan(tiles=asdict(triton_row_config(channels)), grid=(num_text,)))
    @on_device_of
    def run(tensors: MixTensors, addresses: bytes | None = None) -> Tensor:
        state, context, text_rows = tensors[:3]
        out = copied_or_empty(state, num_text)
        if num_text:
            launch((state, context, text_rows, out, *tensors.gate(options).read_tensors, None), numbers)
        return out

    return run
