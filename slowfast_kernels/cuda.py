"""The hand-written CUDA kernels (csrc/cuda): outputs are allocated here, pointers and strides go to the extension.

Tensors come validated (see ``ops``). A launch goes to the current stream of the tensors' device, with that device
current; nothing syncs, so every call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._extension import extension
from .gate import Gate
from .heuristics import hopper_attention_config
from .params import DTYPE_CODES, NO_GATE, gate_arguments
from .pool_plan import PoolPlan


def _launch(function: Callable[..., None], device: torch.device, *arguments) -> None:
    stream = torch._C._cuda_getCurrentRawStream(device.index)  # a tenth of current_stream(device).cuda_stream
    if device.index == torch._C._cuda_getDevice():  # the context manager costs microseconds
        function(*arguments, stream)
    else:
        with torch.cuda.device(device):
            function(*arguments, stream)


def launch_pool(frames: Tensor, plan: PoolPlan, norm_eps: float | None, slow: Tensor, fast: Tensor) -> None:
    """The kernel of ``pool`` alone, into contiguous slow [Ns, C] and fast [Nf, C]."""
    items, entries, _, _ = plan.tables(frames.device)
    _launch(
        extension().cuda_pool,
        frames.device,
        frames.data_ptr(),
        items.data_ptr(),
        entries.data_ptr(),
        slow.data_ptr(),
        fast.data_ptr(),
        frames.stride(0),
        frames.stride(1),
        frames.shape[2],
        plan.grid[1],
        plan.spatial_stride,
        plan.num_items,
        *plan.cells,
        -1.0 if norm_eps is None else norm_eps,
        DTYPE_CODES[frames.dtype],
    )


def pool(frames: Tensor, plan: PoolPlan, norm_eps: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """frames [F, H * W, C] -> slow [Ns, C], cu_slow, fast [Nf, C], cu_fast (prefix sums int32 [B + 1])."""
    slow, fast = (frames.new_empty(n, frames.shape[2]) for n in (plan.num_slow, plan.num_fast))
    launch_pool(frames, plan, norm_eps, slow, fast)
    _, _, cu_slow, cu_fast = plan.tables(frames.device)
    return slow, cu_slow.clone(), fast, cu_fast.clone()


def gated_residual_mix(
    state: Tensor,
    context: Tensor,
    text_rows: Tensor,
    gate: Gate,
) -> Tensor:
    """state [rows, C] with ``g * context`` [Nt, C] added on the text rows; a new tensor."""
    rows, channels = state.shape
    out, value = state.new_empty(rows, channels), gate.float_value
    _launch(
        extension().cuda_gated_mix,
        state.device,
        state.data_ptr(),
        context.data_ptr(),
        text_rows.data_ptr(),
        out.data_ptr(),
        *gate_arguments(gate, value),
        rows,
        text_rows.shape[0],
        channels,
        state.stride(0),
        context.stride(0),
        DTYPE_CODES[state.dtype],
    )
    return out


def text_cross_attention(
    q: Tensor,
    slow_kv: Tensor,
    cu_slow: Tensor,
    text_rows: Tensor,
    cu_text: Tensor,
    softmax_scale: float,
    return_lse: bool,
    num_splits: int,
) -> tuple[Tensor, Tensor | None]:
    """context [Nt, Hq, D] and, if asked, lse [Nt, Hq] float32."""
    num_text, heads = text_rows.shape[0], q.shape[1]
    context = q.new_empty(num_text, heads, q.shape[2])
    lse = q.new_empty(num_text, heads, dtype=torch.float32) if return_lse else None
    if slow_kv.shape[0] == 0:
        return context.zero_(), lse.fill_(float("-inf")) if return_lse else None
    _attend(q, slow_kv, cu_slow, text_rows, cu_text, softmax_scale, num_splits, context=context, lse=lse)
    return context, lse


def slowfast_cross_attention(
    state: Tensor,
    q: Tensor,
    slow_kv: Tensor,
    cu_slow: Tensor,
    text_rows: Tensor,
    cu_text: Tensor,
    gate: Gate,
    softmax_scale: float,
    num_splits: int,
) -> Tensor:
    """Attention, gate and mix in one launch; where there are rows without text, a copy of ``state`` goes before it."""
    if slow_kv.shape[0] == 0 or text_rows.shape[0] == 0:
        return state.clone(memory_format=torch.contiguous_format)
    out = torch.empty(state.shape, dtype=state.dtype, device=state.device)
    if text_rows.shape[0] != state.shape[0]:  # else every row is a text row: they are distinct
        out.copy_(state)
    mix = (state, out, gate)
    _attend(q, slow_kv, cu_slow, text_rows, cu_text, softmax_scale, num_splits, mix=mix)
    return out


def _attend(
    q, slow_kv, cu_slow, text_rows, cu_text, softmax_scale, num_splits, *, context=None, lse=None, mix=None, config=None
) -> None:
    device = q.device
    num_text, num_slow, batch = text_rows.shape[0], slow_kv.shape[0], cu_text.shape[0] - 1
    heads, kv_heads, head_dim = q.shape[1], slow_kv.shape[1], q.shape[2]
    if num_text == 0:
        return
    if config is None:
        config = hopper_attention_config(num_text, num_slow, batch, heads, kv_heads, head_dim, num_splits)
    partial_out = partial_stats = partial_gates = counters = 0
    if config.num_groups > 1:
        out_size, stats_size, gates_size, num_counters = config.workspace(kv_heads, head_dim)
        workspace = torch.empty(out_size + stats_size + gates_size, dtype=torch.float32, device=device)
        partial_out = workspace.data_ptr()
        partial_stats = partial_out + 4 * out_size
        partial_gates = partial_stats + 4 * stats_size
        counters = _counters(device, num_counters).data_ptr()
    mix_arguments, state_stride = (0, 0, *NO_GATE), 0
    if mix is not None:
        state, out, gate = mix
        value = gate.float_value
        mix_arguments = (state.data_ptr(), out.data_ptr(), *gate_arguments(gate, value))
        state_stride = state.stride(0)
    _launch(
        extension().cuda_cross_attention,
        device,
        q.data_ptr(),
        slow_kv.data_ptr(),
        cu_slow.data_ptr(),
        text_rows.data_ptr(),
        cu_text.data_ptr(),
        0 if context is None else context.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        *mix_arguments,
        q.stride(0),
        q.stride(1),
        *slow_kv.stride()[:3],
        state_stride,
        num_text,
        num_slow,
        batch,
        heads,
        kv_heads,
        head_dim,
        softmax_scale,
        DTYPE_CODES[q.dtype],
        config.consumers,
        config.cluster_size,
        config.num_groups,
        config.max_tiles,
        config.whole_units,
        config.long_blocks,
        config.kv_evict_first,
        partial_out,
        partial_stats,
        partial_gates,
        counters,
    )


class _Counters:
    """Arrival counters of one device: zero before and after every launch, so that nothing has to clear them.

    A stream's launches follow one another and share a slice of the arena. A launch that is being captured into a CUDA
    graph gets a slice of its own, for graphs may be replayed on any stream.
    """

    SIZE = 2**20
    STREAM_SLICE = 4096

    def __init__(self, device: torch.device):
        self.arena = torch.zeros(self.SIZE, dtype=torch.int32, device=device)
        self.used = 0
        self.streams: dict[int, Tensor] = {}

    def take(self, count: int) -> Tensor:
        if self.used + count > self.SIZE:  # a graph that takes its own keeps it zero by clearing it at every replay
            return torch.zeros(count, dtype=torch.int32, device=self.arena.device)
        self.used += count
        return self.arena[self.used - count : self.used]

    def of_stream(self, stream: int, count: int) -> Tensor:
        counters = self.streams.get(stream)
        if counters is None or counters.shape[0] < count:
            counters = self.take(max(count, self.STREAM_SLICE))
            self.streams[stream] = counters
        return counters


_counters_of_device: dict[int, _Counters] = {}


def _counters(device: torch.device, count: int) -> Tensor:
    capturing = torch.cuda.is_current_stream_capturing()
    counters = _counters_of_device.get(device.index)
    if counters is None:
        if capturing:  # an arena made here would be zeroed by the replay, not now
            return torch.zeros(count, dtype=torch.int32, device=device)
        counters = _counters_of_device[device.index] = _Counters(device)
    if capturing:
        return counters.take(count)
    return counters.of_stream(torch._C._cuda_getCurrentRawStream(device.index), count)
