"""What the host does around a CUDA launch: counters, workspaces, streams; with stand-ins for GPU and kernels."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from cases import Shape, gate_of, make_inputs

from slowfast_kernels import cuda
from slowfast_kernels.calls import (
    AttentionOptions,
    AttentionTensors,
    BackwardTensors,
    FusedOptions,
    FusedTensors,
    MixOptions,
    MixTensors,
    PoolCallOptions,
    PoolTensors,
    attention_bytes,
)
from slowfast_kernels.gate import Gate
from slowfast_kernels.heuristics.cuda import HopperConfig, cuda_mix_backward_blocks
from slowfast_kernels.params import (
    BackwardPlan,
    CrossAttentionBackwardParams,
    CrossAttentionParams,
    GatedMixBackwardParams,
    GatedMixParams,
    PoolBackwardParams,
    SplitPlan,
)

CPU = torch.device("cpu")
GPUS = [SimpleNamespace(index=i, type="cuda") for i in range(2)]  # the stand-ins' memory is the host's


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that keeps what it is told: ``stream``, ``capturing``, and the launches (function, structs, stream)."""
    state = SimpleNamespace(stream=7, capturing=False, current=0, launches=[], entered=[])
    zeros, empty = torch.zeros, torch.empty
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **kind: zeros(*size, **kind))
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **kind: empty(*size, **kind))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    streams = {0: lambda: state.stream, 1: lambda: 100 + state.stream}
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: streams[index](), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: state.current, raising=False)

    @contextmanager
    def on(device):
        state.entered.append(device.index)
        yield

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(cuda, "_counters_of_device", {})
    monkeypatch.setattr(cuda._Counters, "SIZE", 2000)
    monkeypatch.setattr(cuda._Counters, "STREAM_SLICE", 100)
    return state


def places(counters: torch.Tensor) -> set[int]:
    return set(range(counters.data_ptr(), counters.data_ptr() + 4 * len(counters), 4))


# ---------------------------------------------------------------------------------------------------- counters


def test_launches_of_a_stream_share_their_counters_which_are_zero(gpu):
    first, second = (cuda._counters(GPUS[0], 30) for _ in range(2))
    assert first.data_ptr() == second.data_ptr()
    assert len(first) >= 30
    assert not first.any()


def test_streams_have_counters_of_their_own(gpu):
    first = cuda._counters(GPUS[0], 30)
    gpu.stream = 8
    second = cuda._counters(GPUS[0], 30)
    assert not places(first) & places(second)
    gpu.stream = 7
    assert cuda._counters(GPUS[0], 30).data_ptr() == first.data_ptr()


def test_devices_have_counters_of_their_own(gpu):
    first, second = (cuda._counters(device, 30) for device in GPUS)
    assert not places(first) & places(second)
    assert set(cuda._counters_of_device) == {0, 1}


def test_counters_grow_with_the_launch_and_stay_grown(gpu):
    small = cuda._counters(GPUS[0], 30)
    large = cuda._counters(GPUS[0], 500)
    assert len(large) >= 500
    assert not places(small) & places(large)  # a launch before may still be using its own
    assert cuda._counters(GPUS[0], 30).data_ptr() == large.data_ptr()


def test_a_captured_launch_has_counters_that_no_other_has(gpu):
    of_stream = cuda._counters(GPUS[0], 30)
    gpu.capturing = True
    captured = [cuda._counters(GPUS[0], 30) for _ in range(3)]
    gpu.capturing = False
    found = [places(x) for x in (of_stream, *captured, cuda._counters(GPUS[0], 500))]
    assert all(len(x) >= 30 for x in captured)
    assert sum(map(len, found)) == len(set.union(*found))


def test_an_arena_that_is_full_hands_out_memory_of_its_own(gpu):
    cuda._counters(GPUS[0], 30)
    gpu.capturing = True
    captured = [cuda._counters(GPUS[0], 900) for _ in range(4)]  # two fit
    found = [places(x) for x in captured]
    assert all(len(x) == 900 for x in captured)
    assert sum(map(len, found)) == len(set.union(*found))
    arena = places(cuda._counters_of_device[0].arena)
    assert [bool(x & arena) for x in found] == [True, True, False, False]


def test_no_arena_is_made_while_a_graph_is_captured(gpu):
    """It would be zeroed by the graph's replay, not before a launch on another stream."""
    gpu.capturing = True
    assert len(cuda._counters(GPUS[0], 30)) >= 30
    assert not cuda._counters_of_device


# --------------------------------------------------------------------------------------------------- launches


@pytest.mark.parametrize(("current", "entered"), [(0, []), (1, [0])])
def test_a_kernel_starts_on_its_device_s_own_stream(gpu, current, entered):
    """Making a device current that is so already would cost microseconds."""
    gpu.current, gpu.stream = current, 11
    cuda._launch(lambda *arguments: gpu.launches.append(arguments), GPUS[0], b"addresses", 3)
    assert gpu.launches == [(b"addresses", 3, 11)]
    assert gpu.entered == entered


@pytest.fixture
def launched(monkeypatch):
    """The structs of each launch, instead of the launch; and the tensors that torch.empty made for it."""
    seen = []

    def kernel(*structs: type[ctypes.Structure]):
        def launch(*arguments: int) -> None:
            *addresses, _ = arguments
            seen.append(
                [struct.from_buffer_copy(struct.from_address(x)) for struct, x in zip(structs, addresses, strict=True)]
            )

        return launch

    kernels = {
        "cuda_cross_attention": kernel(CrossAttentionParams, SplitPlan),
        "cuda_cross_attention_backward": kernel(CrossAttentionBackwardParams, BackwardPlan),
        "cuda_gated_mix": kernel(GatedMixParams),
        "cuda_gated_mix_backward": kernel(GatedMixBackwardParams),
        "cuda_pool_backward": kernel(PoolBackwardParams),
    }
    monkeypatch.setattr(cuda, "extension", lambda: SimpleNamespace(**kernels))
    monkeypatch.setattr(cuda, "_launch", lambda function, device, *arguments: function(*arguments, 0))
    monkeypatch.setattr(cuda, "_num_sms", lambda device: 132)
    monkeypatch.setattr(cuda, "_counters", lambda device, count: torch.zeros(count, dtype=torch.int32))
    return seen


@pytest.fixture
def made(monkeypatch):
    """What ``torch.empty`` makes from here on."""
    found, empty = [], torch.empty

    def record(*size, **kind):
        found.append(empty(*size, **kind))
        return found[-1]

    monkeypatch.setattr(torch, "empty", record)
    return found


@pytest.fixture
def inputs(rng):
    return make_inputs(Shape(((24, 400),), (14, 2), 64, other_rows=3), torch.bfloat16, CPU, rng())


def attention_of(inputs, config: HopperConfig) -> tuple[cuda.Attention, AttentionTensors]:
    tensors = AttentionTensors(*inputs.attention)
    return cuda.Attention(tensors, config=config), tensors


def test_the_parts_of_a_workspace_follow_one_another_and_fill_it(inputs, launched, made):
    config = HopperConfig(2, 1, 3, 2)
    attend, tensors = attention_of(inputs, config)
    attend(tensors)
    (_, plan), (workspace,) = launched[0], made
    out, stats, gates, _ = config.workspace(2, 64)
    assert plan.partial_out == workspace.data_ptr()
    assert plan.partial_stats - plan.partial_out == 4 * out
    assert plan.partial_gates - plan.partial_stats == 4 * stats
    assert workspace.numel() == out + stats + gates


def test_a_launch_has_a_plan_of_its_own(inputs, launched):
    """A graph that is replayed while another launch is prepared reads its own addresses."""
    attend, tensors = attention_of(inputs, HopperConfig(2, 1, 3, 2))
    attend(tensors)
    assert attend.plan.partial_out is None
    assert attend.plan.counters is None


def test_without_groups_there_is_no_workspace(inputs, launched):
    attend, tensors = attention_of(inputs, HopperConfig(2, 4, 1, 2))
    attend(tensors)
    assert launched[0][1].partial_out is None


@pytest.mark.parametrize("groups", [1, 3])
def test_gates_that_come_first_have_a_place_for_each_text_row(inputs, launched, made, groups):
    config = HopperConfig(2, 1, groups, 2, gates_first=True)
    gate = Gate.of(*inputs.gating)
    tensors = FusedTensors.of(inputs.state, AttentionTensors(*inputs.attention), gate)
    attend = cuda.Attention(tensors, gate=gate, config=config)
    attend(tensors, out=inputs.state.clone())
    ((params, plan),) = launched
    assert plan.gates_first
    assert params.gate.weight == inputs.gate_weight.data_ptr()
    *_, gates = made
    assert plan.partial_gates == gates.data_ptr()
    assert (gates.shape, gates.dtype) == ((24,), torch.float32)
    assert attend.describe().workspace_bytes == sum(4 * x.numel() for x in made) + 4 * (config.workspace(2, 64)[3])
    assert "a launch before forms the gates" in attend.describe().notes


@pytest.mark.parametrize("way", ["none", "given", "attention alone"])
def test_gates_without_a_weight_are_not_formed_first(inputs, launched, rng, way):
    config = HopperConfig(2, 1, 1, 2, gates_first=True)
    gate, tensors = None, AttentionTensors(*inputs.attention)
    if way != "attention alone":
        gating, options = gate_of(way, inputs, rng())
        gate = Gate.of(*gating, **{"value" if name == "gate_value" else name: x for name, x in options.items()})
        tensors = FusedTensors.of(inputs.state, tensors, gate)
    attend = cuda.Attention(tensors, gate=gate, config=config)
    attend(tensors, out=inputs.state.clone())
    assert not launched[0][1].gates_first
    assert launched[0][1].partial_gates is None
    assert attend.describe().notes == ()


def test_the_kernel_is_told_how_it_is_cut(inputs, launched):
    config = HopperConfig(2, 1, 3, 2, whole_units=1, long_blocks=5, kv_evict_first=True)
    attend, tensors = attention_of(inputs, config)
    attend(tensors)
    plan = launched[0][1]
    given = {name: getattr(plan, name) for name in HopperConfig.__dataclass_fields__}
    assert given == {name: getattr(config, name) for name in given}
    clustered, tensors = attention_of(inputs, HopperConfig(2, 4, 3, 2))
    clustered(tensors)
    assert launched[1][0].num_splits == 12


def test_a_launch_is_given_the_arguments_of_the_call(inputs, launched):
    attend, tensors = attention_of(inputs, HopperConfig(2, 1, 1, 2))
    context, lse = torch.zeros(24, 14, 64), torch.zeros(24, 14)
    attend(tensors, context=context, lse=lse)
    params = launched[0][0]
    for name in ("q", "keys", "values", "cu_slow", "text_rows", "cu_text"):
        assert getattr(params, name) == getattr(tensors, name).data_ptr()
    assert (params.context, params.lse) == (context.data_ptr(), lse.data_ptr())
    assert (params.state, params.out) == (None, None)
    assert (params.num_text, params.num_slow, params.batch, params.head_dim) == (24, 400, 1, 64)
    assert params.softmax_scale == pytest.approx(64**-0.5)
    assert isinstance(params, CrossAttentionParams)
    assert isinstance(launched[0][1], SplitPlan)


def test_one_sequence_in_pieces_is_cut_as_one_run_and_ranges_or_several_are_dealt_out(rng, launched):
    def config_of(sequences, **selection):
        given = make_inputs(Shape(sequences, (14, 2), 64, 0), torch.bfloat16, CPU, rng())
        return cuda.Attention(given.tensors._replace(**selection)).config

    one, two = ((300, 900),), ((300, 900), (300, 900))
    pieces = torch.tensor([[0, 500], [600, 900]], dtype=torch.int32)
    ends = torch.full((300,), 800, dtype=torch.int32)
    assert config_of(one, slow_pieces=pieces) == config_of(one)
    assert config_of(one, slow_pieces=pieces, slow_end=ends).dealt_ctas > 0
    assert config_of(one, slow_begin=ends).dealt_ctas > 0
    assert config_of(two, slow_pieces=pieces).dealt_ctas > 0
    assert config_of(two).dealt_ctas == 0


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_pieces_are_where_the_kernel_can_load_two_numbers_at_once(inputs, launched, monkeypatch, offset):
    found = []

    def kernel(params: int, plan: int, stream: int) -> None:
        begin = CrossAttentionParams.from_address(params).slow_pieces
        found.append((begin % 8, (ctypes.c_int32 * 4).from_address(begin)[:]))

    monkeypatch.setattr(cuda, "extension", lambda: SimpleNamespace(cuda_cross_attention=kernel))
    pieces = torch.zeros(8, dtype=torch.int32)[offset : offset + 4].view(2, 2)
    pieces.copy_(torch.tensor([[0, 300], [100, 400]]))
    tensors = inputs.tensors._replace(slow_pieces=pieces, cu_slow=torch.tensor([0, 2], dtype=torch.int32))
    cuda.Attention(tensors)(tensors)
    assert found == [(0, [0, 300, 100, 400])]


# -------------------------------------------------------------------------------------- what no kernel is asked for


FUSED = FusedOptions(None, 0, "tanh", True, "cuda")


def fused_tensors(inputs) -> FusedTensors:
    return FusedTensors(**{name: getattr(inputs, name, None) for name in FusedTensors._fields})


def test_the_fused_op_copies_rows_that_are_no_text_rows_before_the_launch(inputs, launched):
    tensors = fused_tensors(inputs)
    out = cuda.prepare_cross_attention(tensors, FUSED)(tensors)
    rows = inputs.other_rows
    assert torch.equal(out[rows].view(torch.int16), inputs.state[rows].view(torch.int16))
    assert len(launched) == 1
    assert launched[0][0].out == out.data_ptr()


def test_the_fused_op_copies_nothing_where_every_row_is_a_text_row(rng, launched):
    tensors = fused_tensors(make_inputs(Shape(((9, 40),), other_rows=0), torch.bfloat16, CPU, rng()))
    out = cuda.prepare_cross_attention(tensors, FUSED)(tensors)
    assert out.isnan().all()  # as torch.empty left it: the kernel writes every row


@pytest.mark.parametrize("sequences", [((3, 0), (2, 0)), ((0, 4),)], ids=["no slow token", "no text row"])
def test_without_anything_to_attend_the_fused_op_gives_a_copy_of_the_state(sequences, rng, launched):
    tensors = fused_tensors(make_inputs(Shape(sequences), torch.bfloat16, CPU, rng()))
    out = cuda.prepare_cross_attention(tensors, FUSED)(tensors)
    assert torch.equal(out.view(torch.int16), tensors.state.view(torch.int16))
    assert out.data_ptr() != tensors.state.data_ptr()
    assert not launched


def test_without_slow_tokens_the_context_is_zero_and_lse_minus_infinity(rng, launched):
    tensors = AttentionTensors(*make_inputs(Shape(((3, 0), (2, 0))), torch.bfloat16, CPU, rng()).attention)
    context, lse = cuda.prepare_text_cross_attention(tensors, AttentionOptions(None, True, 0, "cuda"))(tensors)
    assert not context.any()
    assert (lse == -torch.inf).all()
    assert not launched


# ------------------------------------------------------------------------------------------- attention's backward


SIDES = [(), ("slow_begin",), ("slow_end",), ("slow_begin", "slow_end")]


@pytest.mark.parametrize("given", [*SIDES, ("slow_pieces",), ("slow_pieces", "slow_end")], ids=str)
def test_what_rows_see_has_its_place_in_the_workspace_where_they_do_not_see_all(given, inputs, launched, monkeypatch):
    selection = {name: torch.zeros(24, dtype=torch.int32) for name in given if name != "slow_pieces"}
    if "slow_pieces" in given:
        selection["slow_pieces"] = torch.tensor([[0, 100], [50, 400], [7, 8]], dtype=torch.int32)
    tensors = inputs.tensors._replace(**selection)
    context, lse = torch.zeros(24, 14, 64, dtype=torch.bfloat16), torch.zeros(24, 14)
    backward = cuda.AttentionBackward(tensors, None, (True, True, False))
    made, empty = [], torch.empty

    def record(*size, **kind):
        made.append(empty(*size, **kind))
        return made[-1]

    monkeypatch.setattr(torch, "empty", record)
    backward(BackwardTensors((context, lse), (context, lse), tensors))
    (params, plan), (workspace,) = launched[0], made
    assert workspace.nbytes == backward.describe().workspace_bytes
    for name in ("slow_begin", "slow_end", "slow_pieces"):
        assert (getattr(params.forward, name) is not None) == (name in given)
    pieces = (plan.uses, plan.block_uses, plan.tile_sequences, plan.reach)
    sights = (plan.row_ranges, plan.seen_tokens, plan.seeing_tiles, plan.masked_tiles)
    *_, pair_turns = backward.config.workspace(2, 64)
    places, sizes = [plan.pair_turns], [pair_turns]
    if "slow_pieces" in given:
        places += pieces
        sizes += backward.config.pieces(3, 400, 1)
    else:
        assert pieces == (None,) * 4
    if given:
        places += sights
        sizes += backward.config.sights(400, 1)
    else:
        assert sights == (None,) * 4
        return
    end = workspace.data_ptr() + workspace.nbytes
    assert [b - a for a, b in pairwise((*places, end))] == sizes
    assert plan.tile_words * 32 >= plan.max_tiles
    assert all(place % 16 == workspace.data_ptr() % 16 for place in places[:-2])  # loads of 16 bytes


def test_gradients_of_sequences_without_pieces_are_zero(inputs, launched):
    tensors = inputs.tensors._replace(slow_pieces=torch.empty(0, 2, dtype=torch.int32))
    call = BackwardTensors((torch.ones(24, 14, 64, dtype=torch.bfloat16), None), (), tensors)
    options, needs = AttentionOptions(None, True, 0, "cuda"), (True, True, False)
    grad_q, grad_kv, _ = cuda.prepare_text_cross_attention_backward(call, options, needs)(call)
    assert (grad_q.shape, grad_kv.shape) == (tensors.q.shape, tensors.slow_kv.shape)
    assert not grad_q.any()
    assert not grad_kv.any()
    assert not launched


def test_further_sums_have_the_room_that_the_whole_call_leaves(inputs, launched, monkeypatch):
    asked = []
    monkeypatch.setattr(cuda, "hopper_backward_room", lambda *sizes: asked.append(sizes) or 0)
    config = cuda.AttentionBackward(inputs.tensors, None, (True, True, False), kv_heads=1).config
    assert config.max_sums == config.max_tiles
    assert asked == [attention_bytes(inputs.tensors)]


def test_further_sums_over_pieces_are_of_all_row_tiles(inputs, launched):
    """A video in 40 sequences: as many groups as there may be want sums of the rows of all."""
    pieces = torch.tensor([[0, 400]] * 40, dtype=torch.int32)
    cu_text = torch.tensor([0] * 40 + [24], dtype=torch.int32)
    tensors = inputs.tensors._replace(slow_pieces=pieces, cu_slow=torch.arange(41, dtype=torch.int32), cu_text=cu_text)
    config = cuda.AttentionBackward(tensors, None, (True, True, False)).config
    assert config.max_sums == config.max_groups * config.max_tiles


# ------------------------------------------------------------------------------------------- the mix's backward

SUMS = ("gate_weight", "gate_bias", "warm_up")
IN_STRUCT = ("grad_state", "grad_context", "grad_weight", "grad_bias", "grad_warm_up", "grad_value")
DIFFERENTIABLE = ("state", "context", *SUMS, "gate_value")


def mix_backward(inputs, names, grad=None) -> tuple[torch.Tensor | None, ...]:
    context = torch.ones(len(inputs.text_rows), inputs.state.shape[1], dtype=inputs.state.dtype)
    tensors = MixTensors(inputs.state, context, inputs.text_rows, *inputs.gating, None)
    call = BackwardTensors((inputs.state if grad is None else grad,), (), tensors)
    needs = tuple(name in names for name in DIFFERENTIABLE)
    return cuda.prepare_gated_residual_mix_backward(call, MixOptions("tanh", True, "cuda"), needs)(call)


@pytest.mark.parametrize("names", [("state",), ("context",), ("gate_weight",), ("gate_bias", "state"), DIFFERENTIABLE])
def test_the_mix_s_backward_is_told_what_to_write_and_nothing_else(names, inputs, launched):
    found = mix_backward(inputs, names)
    ((params,),) = launched
    for name, field, gradient in zip(DIFFERENTIABLE, IN_STRUCT, found, strict=True):
        is_there = name in names and name != "gate_value"  # the call has none
        assert (gradient is not None) == is_there
        assert getattr(params, field) == (gradient.data_ptr() if is_there else None)
    assert (params.partials is not None) == bool(set(SUMS) & set(names))
    assert params.partial_stride == 4 + (inputs.state.shape[1] if "gate_weight" in names else 0)


def test_the_mix_s_backward_takes_text_rows_alone_where_the_state_needs_no_gradient(inputs, launched):
    for names in (("context",), ("state",)):
        mix_backward(inputs, names)
    assert [params.num_blocks for (params,) in launched] == [24, 27]


def test_a_gradient_with_rows_of_any_stride_is_read_where_it_is(inputs, launched):
    base = torch.ones(64, 2 * inputs.state.shape[1], dtype=inputs.state.dtype)
    padded, one_row = base[:27, : inputs.state.shape[1]], base[:1, : inputs.state.shape[1]].expand_as(inputs.state)
    for grad in (padded, one_row, inputs.state.T.contiguous().T):
        mix_backward(inputs, ("state",), grad)
    padded_params, one_row_params, transposed = (params for (params,) in launched)
    assert (padded_params.grad, padded_params.grad_row_stride) == (base.data_ptr(), base.shape[1])
    assert (one_row_params.grad, one_row_params.grad_row_stride) == (base.data_ptr(), 0)
    assert transposed.grad_row_stride == inputs.state.shape[1]  # of a copy


@pytest.mark.parametrize("rows", [0, 1, 131, 528, 3168, 8192, 10**6])
def test_no_block_of_the_mix_s_backward_has_more_rows_than_it_has_room_for(rows):
    blocks = cuda_mix_backward_blocks(rows, 132)
    assert blocks >= 1
    assert -(-rows // blocks) <= 2048
    assert blocks <= max(1, rows)


def test_the_pooling_s_backward_is_given_addresses_and_strides_of_what_there_is(rng, launched):
    options = PoolCallOptions((3, 1), (4, 4), 2, 1, 1, 1, 1, 1e-5, "cuda")
    frames = torch.ones(4, 16, 24)[:, :, 8:16]
    grad_fast = torch.ones(1, 8).expand(options.plan.num_fast, 8)
    call = BackwardTensors((None, grad_fast), (), PoolTensors(frames))
    (found,) = cuda.prepare_pool_backward(call, options, (True,))(call)
    ((params,),) = launched
    assert (params.grad_slow, params.grad_fast, params.fast_row_stride) == (None, grad_fast.data_ptr(), 0)
    assert (params.grad_frames, params.frames) == (found.data_ptr(), frames.data_ptr())
    assert (params.frame_stride, params.token_stride) == (16 * 24, 24)
    assert (params.max_cells_h, params.max_cells_w) == (4, 4)  # of the image
