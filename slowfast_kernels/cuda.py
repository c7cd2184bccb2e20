"""The hand-written CUDA kernels (csrc/cuda): results are allocated here, filled structs go to the extension.

Tensors come validated (see ``ops``). A launch goes to the current stream of the tensors' device, with that device
current; nothing syncs, so every call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import addressof
from dataclasses import asdict, replace

import torch
from torch import Tensor

from ._extension import extension
from .call_plan import CallPlan, described, nothing_to_attend
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
    attention_bytes,
    scale_of,
)
from .gate import WEIGHTED_GATES, Gate, float_value
from .gradients import (
    attention_differentiable,
    attention_needs,
    mix_differentiable,
    mix_needs,
    new_gradients,
    new_like,
    row_major,
    zero_attention_gradients,
)
from .heuristics.cuda import (
    HopperBackwardConfig,
    HopperConfig,
    cuda_mix_backward_blocks,
    hopper_attention_backward_config,
    hopper_attention_config,
    hopper_backward_kv_heads,
    hopper_backward_room,
)
from .params import (
    GATE_SLOTS,
    MERGE_SLOTS,
    MIX_SLOTS,
    BackwardPlan,
    Slot,
    SplitPlan,
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
    take_kv_heads,
)
from .pool_plan import PoolPlan, describe_pool


def _launch(function: Callable[..., None], device: torch.device, *arguments: bytes | int) -> None:
    """``function(*arguments, stream)``"""
    stream = torch._C._cuda_getCurrentRawStream(device.index)  # a tenth of current_stream(device).cuda_stream
    if device.index == torch._C._cuda_getDevice():  # the context manager costs microseconds
        function(*arguments, stream)
    else:
        with torch.cuda.device(device):
            function(*arguments, stream)


def _launch_structs(function: Callable[..., None], device: torch.device, *structs) -> None:
    _launch(function, device, *map(addressof, structs))


def launch_pool(frames: Tensor, plan: PoolPlan, norm_eps: float | None, slow: Tensor, fast: Tensor) -> None:
    """The kernel of ``pool`` alone, into contiguous slow [Ns, C] and fast [Nf, C]."""
    _launch_structs(extension().cuda_pool, frames.device, pool_params(frames, plan, norm_eps, slow, fast))


def pool(frames: Tensor, plan: PoolPlan, norm_eps: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """frames [F, H * W, C] -> slow [Ns, C], cu_slow, fast [Nf, C], cu_fast (prefix sums int32 [B + 1])."""
    slow, fast = (frames.new_empty(n, frames.shape[2]) for n in (plan.num_slow, plan.num_fast))
    launch_pool(frames, plan, norm_eps, slow, fast)
    _, _, cu_slow, cu_fast = plan.tables(frames.device)
    return slow, cu_slow.clone(), fast, cu_fast.clone()


def pool_plan_of(frames: Tensor, plan: PoolPlan) -> CallPlan:
    """Of ``pool``. Its grid is what the GPU holds at once, at most a CTA a cell."""
    return describe_pool(plan)


def prepare_gated_residual_mix(sample: MixTensors, options: MixOptions) -> Callable:
    """A function of tensors alike: ``g * context`` [Nt, C] added to the text rows of state [rows, C], a new tensor."""
    params, device = gated_mix_params(*sample[:3], sample.gate(options)), sample.state.device
    mix = kernel_call(extension().cuda_gated_mix, MixTensors, ("out", "value"), (params, MIX_SLOTS))

    @described(CallPlan)
    def run(tensors: MixTensors, addresses: bytes | None = None) -> Tensor:
        out, value = new_like(tensors.state), float_value(tensors.gate_value)
        _launch(mix, device, addresses or addresses_of(tensors), out.data_ptr(), address(value))
        return out

    return run


def prepare_gated_residual_mix_backward(
    sample: BackwardTensors, options: MixOptions, needs: tuple[bool, ...]
) -> Callable:
    """A function of tensors alike: gradients of state, context, gate_weight, gate_bias, warm_up and gate_value."""
    inputs, device = sample.inputs, sample.inputs.state.device
    needs = mix_needs(inputs, needs)
    rows = inputs.state if needs[0] else inputs.text_rows  # rows without text have no other gradient
    num_blocks = cuda_mix_backward_blocks(rows.shape[0], _num_sms(device))
    params = gated_mix_backward_params(inputs, inputs.gate(options), needs[2], num_blocks)
    num_floats = num_blocks * params.partial_stride if any(needs[2:5]) else 0
    kernel = extension().cuda_gated_mix_backward

    @described(lambda: CallPlan(grid=(num_blocks,), workspace_bytes=4 * num_floats))
    def run(tensors: BackwardTensors) -> tuple[Tensor | None, ...]:
        inputs, grad = tensors.inputs, row_major(tensors.grads[0])
        gradients = new_gradients(mix_differentiable(inputs), needs)
        partials = torch.empty(num_floats, dtype=torch.float32, device=device) if num_floats else None
        mine, gate = copy(params), inputs.gate(options)
        held = fill_gated_mix_backward(mine, grad, inputs, gate, gradients, partials)  # noqa: F841  until it is launched
        _launch_structs(kernel, device, mine)
        return gradients

    return run


def prepare_pool_backward(sample: BackwardTensors, options: PoolCallOptions, needs: tuple[bool, ...]) -> Callable:
    """A function of tensors alike: the gradient of frames, which is needed."""
    plan, device = options.plan, sample.inputs.frames.device
    kernel = extension().cuda_pool_backward

    @described(lambda: describe_pool(plan))
    def run(tensors: BackwardTensors) -> tuple[Tensor | None]:
        (frames,) = tensors.inputs
        grad_frames = torch.empty(frames.shape, dtype=frames.dtype, device=frames.device)
        grads = [None if x is None else row_major(x) for x in tensors.grads]
        _launch_structs(kernel, device, pool_backward_params(frames, plan, options.norm_eps, *grads, grad_frames))
        return (grad_frames,)

    return run


def prepare_merge_attention(sample: MergeTensors, options: MergeOptions) -> Callable:
    """A function of tensors alike: context [Nt, Hq, D] and lse [Nt, Hq] over the tokens of both sides."""
    params, device = merge_params(sample), sample.context_a.device
    merge = kernel_call(extension().cuda_merge, MergeTensors, ("context", "lse"), (params, MERGE_SLOTS))

    @described(CallPlan)
    def run(tensors: MergeTensors, addresses: bytes | None = None) -> tuple[Tensor, Tensor]:
        context, lse = map(new_like, tensors[:2])
        _launch(merge, device, addresses or addresses_of(tensors), context.data_ptr(), lse.data_ptr())
        return context, lse

    return run


def prepare_text_cross_attention(sample: AttentionTensors, options: AttentionOptions) -> Callable:
    """A function of tensors alike: context [Nt, Hq, D] and, if asked, lse [Nt, Hq] float32."""
    shape = (sample.text_rows.shape[0], *sample.q.shape[1:])
    is_empty, has_slow = shape[0] == 0, sample.slow_kv.shape[0] > 0
    attend = None if is_empty or not has_slow else Attention(sample, options.softmax_scale, options.num_splits)

    @described(nothing_to_attend if attend is None else attend.describe)
    def run(tensors: AttentionTensors, addresses: bytes | None = None) -> tuple[Tensor, Tensor | None]:
        q = tensors.q
        context = q.new_empty(shape)
        lse = q.new_empty(shape[:2], dtype=torch.float32) if options.return_lse else None
        if attend is not None:
            attend(tensors, addresses, context=context, lse=lse)
        elif not has_slow:
            context.zero_()
            if lse is not None:
                lse.fill_(float("-inf"))
        return context, lse

    return run


def prepare_text_cross_attention_backward(
    sample: BackwardTensors, options: AttentionOptions, needs: tuple[bool, ...]
) -> Callable:
    """A function of tensors alike: gradients of q, slow_kv and slow_values, None where ``needs`` says so."""
    inputs = sample.inputs
    is_empty = 0 in (len(x) for x in (inputs.text_rows, inputs.slow_kv, inputs.slow_pieces) if x is not None)
    if is_empty or all(grad is None for grad in sample.grads):

        @described(nothing_to_attend)
        def zeros(tensors: BackwardTensors) -> tuple[Tensor | None, ...]:
            return zero_attention_gradients(tensors.inputs, needs)

        return zeros
    backward = AttentionBackward(inputs, options.softmax_scale, needs)
    return described(backward.describe)(backward)


def prepare_cross_attention(sample: FusedTensors, options: FusedOptions) -> Callable:
    """A function of tensors alike: attention, gate and mix in one launch, or gates in one before
    (``HopperConfig.gates_first``). Where there are rows without text, a copy of ``state`` goes before.
    """
    num_text = sample.text_rows.shape[0]
    if num_text == 0 or sample.slow_kv.shape[0] == 0:

        @described(nothing_to_attend)
        def as_it_is(tensors: FusedTensors, addresses: bytes | None = None) -> Tensor:
            return tensors.state.clone(memory_format=torch.contiguous_format)

        return as_it_is
    attend = Attention(sample, options.softmax_scale, options.num_splits, sample.gate(options))
    copies_rows = num_text != sample.state.shape[0]  # else every row is a text row: they are distinct

    @described(attend.describe)
    def run(tensors: FusedTensors, addresses: bytes | None = None) -> Tensor:
        state = tensors.state
        out = new_like(state)
        if copies_rows:
            out.copy_(state)
        attend(tensors, addresses, out=out)
        return out

    return run


class Attention:
    """The Hopper attention of calls alike: how it is cut, and its arguments but for the addresses.

    ``gate``: of the fused op's tensors; ``config`` overrides the heuristics, for tests and tuning. There is at least
    one text row and one slow token.
    """

    def __init__(
        self,
        sample: AttentionTensors | FusedTensors,
        softmax_scale: float | None = None,
        num_splits: int = 0,
        gate: Gate | None = None,
        config: HopperConfig | None = None,
    ):
        q, slow_kv, text_rows, batch = sample.q, sample.slow_kv, sample.text_rows, sample.cu_text.shape[0] - 1
        num_kv_heads, head_dim = slow_kv.shape[1], q.shape[2]
        self.device, num_sms = q.device, _num_sms(q.device)
        # All rows of one sequence see the same blocks of its pieces, as they do of one run.
        has_ranges = sample.slow_begin is not None or sample.slow_end is not None
        config = config or hopper_attention_config(
            text_rows.shape[0],
            slow_kv.shape[0],
            batch,
            q.shape[1],
            num_kv_heads,
            head_dim,
            num_splits,
            has_ranges or (sample.slow_pieces is not None and batch > 1),
            num_sms,
        )
        if config.gates_first and (gate is None or gate.kind not in WEIGHTED_GATES):  # there is nothing to form
            config = replace(config, gates_first=False)
        self.config = config
        splits = config.cluster_size * config.num_groups
        self.num_gates = text_rows.shape[0] if config.gates_first else 0
        self.is_fused = isinstance(sample, FusedTensors)
        inputs, state = (sample.attention, sample.state) if self.is_fused else (sample, None)
        self.params = cross_attention_params(inputs, scale_of(q, softmax_scale), splits, state, gate)
        _, grid_heads, grid_groups = config.grid(num_kv_heads)
        self.plan = SplitPlan(
            **asdict(config),
            num_sms=num_sms if config.dealt_ctas else 0,
            grid_heads=grid_heads,
            grid_groups=grid_groups,
        )
        self.workspace = config.workspace(num_kv_heads, head_dim) if config.leaves_parts else None
        self.has_pieces = sample.slow_pieces is not None
        self.call = self._kernel_call(sample)

    def _kernel_call(self, sample: AttentionTensors | FusedTensors) -> Callable[..., None]:
        made = ["context", "lse", "out", "value"]
        slots = [*attention_slots(sample), *(Slot(name, name) for name in made[:3])]
        if self.is_fused:
            slots += [Slot("state", "state"), *GATE_SLOTS]
        if self.has_pieces:
            made.append("aligned_pieces")
            slots.append(Slot("slow_pieces", "aligned_pieces"))
        parts = []
        if self.workspace is not None:
            made += ["workspace", "counters"]
            out_size, stats_size, _, _ = self.workspace
            places = {"partial_out": 0, "partial_stats": out_size, "partial_gates": out_size + stats_size}
            parts = [Slot(name, "workspace", 4 * floats) for name, floats in places.items()]
            parts.append(Slot("counters", "counters"))
        if self.num_gates:
            made.append("gates")
            parts.append(Slot("partial_gates", "gates"))
        structs = (self.params, slots), (self.plan, parts)
        return kernel_call(extension().cuda_cross_attention, type(sample), made, *structs)

    def describe(self) -> CallPlan:
        config, notes = self.config, []
        if config.gates_first:
            notes.append("a launch before forms the gates")
        if config.dealt_ctas:
            notes.append("the device deals out blocks by what rows see")
        return CallPlan(
            tiles={"block_m": 64 * config.consumers, "block_n": config.block_n, **asdict(config)},
            num_splits=None if config.dealt_ctas else config.cluster_size * config.num_groups,
            grid=config.grid(self.params.num_kv_heads),
            workspace_bytes=4 * (sum(self.workspace or ()) + self.num_gates),
            notes=tuple(notes),
        )

    def __call__(
        self,
        tensors: AttentionTensors | FusedTensors,
        addresses: bytes | None = None,
        *,
        context: Tensor | None = None,
        lse: Tensor | None = None,
        out: Tensor | None = None,
    ) -> None:
        """Into ``context`` and ``lse``, and into ``out`` where the tensors are the fused op's."""
        value = float_value(tensors.gate_value) if self.is_fused else None
        made = [address(context), address(lse), address(out), address(value)]
        if self.has_pieces:
            pieces = tensors.slow_pieces
            if pieces.data_ptr() % 8:  # the kernel loads a piece's begin and end at once
                pieces = pieces.clone()
            made.append(pieces.data_ptr())
        if self.workspace is not None:
            *sizes, num_counters = self.workspace
            floats = torch.empty(sum(sizes), dtype=torch.float32, device=self.device)
            made += [floats.data_ptr(), _counters(self.device, num_counters).data_ptr()]
        if self.num_gates:
            gates = torch.empty(self.num_gates, dtype=torch.float32, device=self.device)
            made.append(gates.data_ptr())
        _launch(self.call, self.device, addresses or addresses_of(tensors), *made)


# Fields of BackwardPlan, in the order of the sizes that HopperBackwardConfig's methods give.
_WORKSPACE = ("tiles", "sums", "pair_parts", "turns", "pair_turns")
_OF_PIECES = ("uses", "block_uses", "tile_sequences", "reach")
_OF_SIGHTS = ("row_ranges", "seen_tokens", "seeing_tiles", "masked_tiles")


class AttentionBackward:
    """The gradients of Hopper attention calls alike.

    ``needs``: of q, slow_kv and slow_values. ``config`` and ``kv_heads`` (of a launch) override the heuristics, for
    tests and tuning. There is at least one text row and one slow token.
    """

    def __init__(
        self,
        sample: AttentionTensors,
        softmax_scale: float | None,
        needs: tuple[bool, ...],
        config: HopperBackwardConfig | None = None,
        kv_heads: int | None = None,
    ):
        q, slow_kv, num_text = sample.q, sample.slow_kv, sample.text_rows.shape[0]
        self.device, self.element = q.device, q.element_size()
        self.needs = attention_needs(sample, needs)
        self.num_kv_heads = slow_kv.shape[1]
        of_rows_and_tokens = attention_bytes(sample)
        fitting = hopper_backward_kv_heads(*of_rows_and_tokens, self.num_kv_heads)
        self.kv_heads = kv_heads or max(1, fitting)  # of a launch; the last may have fewer
        self.config = config = config or hopper_attention_backward_config(
            num_text,
            slow_kv.shape[0],
            sample.cu_text.shape[0] - 1,
            self.kv_heads * (q.shape[1] // self.num_kv_heads),
            self.kv_heads,
            q.shape[2],
            _num_sms(q.device),
            hopper_backward_room(*of_rows_and_tokens),
            sample.slow_pieces is not None,
        )
        self.has_other_rows = num_text != q.shape[0]  # text rows are distinct
        self.params = attention_backward_params(sample, scale_of(q, softmax_scale), workspace_bytes=0)
        self.plan = BackwardPlan(**asdict(config), tile_words=config.tile_words, heads_a_row=q.shape[1])
        sizes = slow_kv.shape[0], sample.cu_text.shape[0] - 1
        self.places = dict(zip(_WORKSPACE, config.workspace(self.kv_heads, q.shape[2]), strict=True))
        if sample.slow_pieces is not None:
            self.places |= zip(_OF_PIECES, config.pieces(sample.slow_pieces.shape[0], *sizes), strict=True)
        if sample.selects:
            self.places |= zip(_OF_SIGHTS, config.sights(*sizes), strict=True)
        self.kernel = extension().cuda_cross_attention_backward

    def describe(self) -> CallPlan:
        return CallPlan(
            tiles={"block_m": 64, "block_n": 128, "kv_heads": self.kv_heads, **asdict(self.config)},
            grid=(self.config.num_ctas,),
            workspace_bytes=self.workspace_bytes,
        )

    @property
    def workspace_bytes(self) -> int:
        return sum(self.places.values())

    def __call__(self, tensors: BackwardTensors) -> tuple[Tensor | None, ...]:
        inputs, (grad_context, grad_lse) = tensors.inputs, tensors.grads
        gradients = new_gradients(attention_differentiable(inputs), self.needs)
        if gradients[0] is not None and self.has_other_rows:
            gradients[0].zero_()
        if grad_context is not None:
            tensors = tensors._replace(grads=(_aligned_rows(grad_context), grad_lse))
        params, plan = copy(self.params), copy(self.plan)
        held = fill_attention_backward(params, tensors)  # noqa: F841  until the kernels are launched
        fill_attention_gradients(params, inputs, gradients)
        workspace = torch.empty(self.workspace_bytes // 4, dtype=torch.float32, device=self.device)
        begin = workspace.data_ptr()
        for name, size in self.places.items():
            setattr(plan, name, begin)
            begin += size
        for first in range(0, self.num_kv_heads, self.kv_heads):  # each uses the workspace again
            mine = copy(params)
            take_kv_heads(mine, first, min(self.kv_heads, self.num_kv_heads - first), self.element)
            _launch_structs(self.kernel, self.device, mine, plan)
        return gradients


def _aligned_rows(x: Tensor) -> Tensor:
    """[Nt, Hq, D] whose rows of D can be read 16 bytes at a time: itself, where it is so."""
    unit = 16 // x.element_size()
    is_aligned = x.stride(2) == 1 and x.stride(0) % unit == 0 and x.stride(1) % unit == 0 and x.data_ptr() % 16 == 0
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)


def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


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
