"""How the Hopper attention is cut into CTAs: a function of shapes alone, checked without a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cases import Shape, make_inputs
from hypothesis import given
from hypothesis import strategies as st

from bench.selection import parse_attention
from slowfast_kernels.heuristics.backends import OpCall, choose_backend, unsupported_reason
from slowfast_kernels.heuristics.cuda import (
    HOPPER_CLUSTER_SIZES,
    HOPPER_HEAD_DIMS,
    HopperConfig,
    hopper_attention_backward_config,
    hopper_attention_config,
    hopper_backward_drawback,
    hopper_backward_kv_heads,
    hopper_backward_room,
)
from slowfast_kernels.ops.attention import attention_facts

HALF = OpCall("text_cross_attention", "cuda", torch.bfloat16, (9, 0), head_dim=128)
HOPPER_SMS = (78, 114, 132)  # H20; H100 PCIe; H100 SXM, H200, GH200
EVERYTHING_IS_HERE = dict.fromkeys(("cuda", "triton", "cpu", "eager"))


@given(
    num_text=st.integers(1, 4096),
    num_slow=st.integers(0, 200_000),
    batch=st.integers(1, 32),
    num_kv_heads=st.sampled_from([1, 2, 4, 8]),
    heads_per_kv=st.integers(1, 16),
    head_dim=st.sampled_from(HOPPER_HEAD_DIMS),
    num_sms=st.sampled_from(HOPPER_SMS),
)
def test_every_row_has_a_tile_and_every_cluster_can_be_launched(
    num_text, num_slow, batch, num_kv_heads, heads_per_kv, head_dim, num_sms
):
    heads = num_kv_heads * heads_per_kv
    config = hopper_attention_config(num_text, num_slow, batch, heads, num_kv_heads, head_dim, num_sms=num_sms)
    rows_a_tile = 64 * config.consumers
    assert config.consumers in (1, 2)
    assert config.max_tiles * rows_a_tile >= num_text * heads_per_kv
    assert config.cluster_size in HOPPER_CLUSTER_SIZES
    assert config.num_groups >= 1
    assert all(size >= 0 for size in config.workspace(num_kv_heads, head_dim))
    uneven = config.whole_units or config.long_blocks
    assert not uneven or (config.cluster_size == 1 and config.num_groups > 1)  # the kernel knows no other
    assert config.whole_units < config.max_tiles * num_kv_heads
    blocks = -(-(num_slow // batch) // config.block_n)
    assert config.long_blocks * (config.num_groups - 1) < max(blocks, 1)  # the last group has some left


def test_there_is_a_kernel_for_each_head_dimension_and_no_other():
    sources = Path(__file__).parent.parent.glob("csrc/cuda/cross_attention/sm90_d*.cu")
    assert sorted(path.stem for path in sources) == sorted(f"sm90_d{dim}" for dim in HOPPER_HEAD_DIMS)
    for head_dim in (32, 80, 96, 192, 256, *HOPPER_HEAD_DIMS):
        is_taken = unsupported_reason("cuda", HALF._replace(head_dim=head_dim)) is None
        assert is_taken == (head_dim in HOPPER_HEAD_DIMS)


def test_blocks_are_as_long_as_the_kernel_s():
    traits = (Path(__file__).parent.parent / "csrc/cuda/cross_attention/traits.h").read_text()
    decode, prefill = re.search(r"kBlockN = kConsumers == 1 \? (\d+) : (\d+);", traits).groups()
    assert [HopperConfig(consumers, 1, 1, 1).block_n for consumers in (1, 2)] == [int(decode), int(prefill)]


def test_tiles_are_enough_for_the_worst_distribution_of_rows_over_sequences():
    # 8 sequences, of which 7 have one row: each needs a tile of its own
    config = hopper_attention_config(7 + 200, 8000, 8, 28, 4, 128)
    assert config.max_tiles >= 7 + -(-200 * 7 // (64 * config.consumers))


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 8, 16])
def test_a_fixed_number_of_splits_fixes_what_bits_depend_on(num_splits):
    alone = hopper_attention_config(1, 5184, 1, 28, 4, 128, num_splits)
    in_batch = hopper_attention_config(200, 40_000, 9, 28, 4, 128, num_splits)
    assert alone.cluster_size * alone.num_groups == num_splits
    assert (alone.consumers, alone.cluster_size, alone.num_groups) == (
        in_batch.consumers,
        in_batch.cluster_size,
        in_batch.num_groups,
    )


def test_the_published_shapes_fill_the_gpu_in_one_wave():
    for rows, slow in ((64, 5184), (64, 10368)):
        config = hopper_attention_config(rows, slow, 1, 28, 4, 128)
        assert (config.cluster_size, config.num_groups) == (8, 1)
        full, half = 3 * 4, 4 // 2  # half tiles go two to a cluster
        assert full + half <= 15, "an H100 holds 15 clusters of 8 at once"


QWEN2_7B, QWEN2_HALF_B = (28, 4, 128), (14, 2, 64)
# (text rows, slow tokens, batch), heads -> consumers, cluster size, groups, whole units, blocks of a long group, K and
# V evicted first. What a sweep on an H100 (python -m bench.tune_cuda) left as the choice; another table of times is
# another sweep, and this one then changes with it.
SWEPT = [
    ((1, 324, 1), QWEN2_7B, (1, 8, 1, 0, 0, False)),
    ((1, 1360, 1), QWEN2_7B, (1, 8, 1, 0, 0, False)),
    ((1, 2048, 1), QWEN2_7B, (1, 4, 5, 0, 0, False)),
    ((1, 5184, 1), QWEN2_7B, (1, 4, 5, 0, 0, False)),
    ((1, 98304, 1), QWEN2_7B, (1, 4, 6, 0, 0, True)),  # 201 MB of K and V pass L2 by
    ((4, 20736, 4), QWEN2_7B, (1, 4, 1, 0, 0, False)),
    ((8, 41472, 8), QWEN2_7B, (1, 2, 4, 0, 0, True)),
    ((16, 165888, 16), QWEN2_7B, (1, 2, 2, 0, 0, True)),
    ((8, 16384, 8), QWEN2_7B, (1, 2, 1, 0, 0, False)),
    ((16, 82944, 16), QWEN2_7B, (1, 2, 2, 0, 0, True)),
    ((32, 16384, 8), QWEN2_7B, (1, 4, 1, 0, 0, False)),
    ((64, 16384, 8), QWEN2_7B, (1, 4, 1, 0, 0, False)),
    ((64, 41472, 8), QWEN2_7B, (1, 4, 1, 0, 0, True)),
    ((64, 165888, 8), QWEN2_7B, (1, 1, 3, 0, 0, True)),
    ((96, 24576, 12), QWEN2_7B, (1, 4, 1, 0, 0, False)),
    ((64, 32768, 16), QWEN2_7B, (1, 1, 1, 0, 0, True)),
    ((128, 32768, 16), QWEN2_7B, (1, 1, 1, 0, 0, True)),
    ((192, 49152, 24), QWEN2_7B, (1, 1, 1, 0, 0, True)),
    ((128, 82944, 16), QWEN2_7B, (1, 1, 4, 0, 0, True)),
    ((256, 165888, 32), QWEN2_7B, (1, 1, 2, 0, 0, True)),
    ((64, 5184, 1), QWEN2_7B, (2, 8, 1, 0, 0, False)),
    ((64, 41472, 1), QWEN2_7B, (2, 8, 1, 0, 0, False)),
    ((64, 98304, 1), QWEN2_7B, (2, 1, 10, 0, 83, False)),  # several tiles read it, so it stays in L2
    ((256, 5184, 1), QWEN2_7B, (2, 1, 2, 0, 0, False)),
    ((256, 10368, 1), QWEN2_7B, (2, 1, 3, 0, 36, False)),
    ((512, 82944, 8), QWEN2_7B, (2, 1, 2, 0, 73, False)),
    ((1024, 98304, 1), QWEN2_7B, (2, 1, 2, 132, 578, False)),
    ((1, 5184, 1), QWEN2_HALF_B, (1, 4, 10, 0, 0, False)),
    ((64, 5184, 1), QWEN2_HALF_B, (2, 8, 1, 0, 0, False)),
    ((1024, 10368, 1), QWEN2_HALF_B, (2, 1, 2, 0, 75, False)),
]


@pytest.mark.parametrize(("sizes", "heads", "chosen"), SWEPT)
def test_the_choice_is_that_of_the_sweep_on_an_h100(sizes, heads, chosen):
    config = hopper_attention_config(*sizes, *heads)
    fields = ("consumers", "cluster_size", "num_groups", "whole_units", "long_blocks", "kv_evict_first")
    assert tuple(getattr(config, field) for field in fields) == chosen


@pytest.mark.parametrize("sms", HOPPER_SMS)
def test_many_rows_over_a_long_video_leave_no_sm_idle_for_long(sms):
    """Blocks of the busiest SM against an even share: long groups first, the short ones one after another."""
    for rows, slow in ((256, 10368), (256, 98304), (1024, 98304)):
        config = hopper_attention_config(rows, slow, 1, 28, 4, 128, num_sms=sms)
        blocks, units = -(-slow // config.block_n), config.max_tiles * 4
        split = units - config.whole_units
        assert config.whole_units % sms == 0
        if config.long_blocks:
            long_ctas = split * (config.num_groups - 1)
            assert long_ctas < sms, "the long groups are one wave"
            short = blocks - (config.num_groups - 1) * config.long_blocks
            last = max(config.long_blocks, -(-split // (sms - long_ctas)) * short)
        else:
            last = -(-split * config.num_groups // sms) * -(-blocks // config.num_groups)
        busiest = config.whole_units // sms * blocks + last
        assert busiest * sms <= 1.1 * units * blocks


@given(
    num_text=st.integers(1, 4096),
    num_slow=st.integers(0, 200_000),
    batch=st.integers(2, 300),
    selects=st.booleans(),
    num_sms=st.sampled_from(HOPPER_SMS),
)
def test_a_batch_leaves_room_for_groups_that_uneven_lengths_ask_for(num_text, num_slow, batch, selects, num_sms):
    config = hopper_attention_config(num_text, num_slow, batch, 28, 4, 128, 0, selects, num_sms)
    if (selects and config.consumers == 2) or batch > 256:
        assert config.share_slots == 0
        return
    if config.consumers == 1 and not selects and batch == 2 <= num_text:  # two videos keep the plan for even ones
        assert config.share_slots == 0
        return
    width, heads, layers = config.grid(4)
    assert config.share_slots > 0
    assert config.even_units > 0
    assert layers >= config.num_groups
    assert heads >= 4
    assert heads == 4 or layers == 1, "what is added comes last"
    # a group for each unit, and two even shares of the rest for each
    assert width // config.cluster_size * heads * layers >= config.max_tiles * 4 + config.share_slots // 2
    parts, rows = 2 * config.share_slots, 64 * config.consumers
    out, stats, gates, counters = config.workspace(4, 128)
    assert out >= parts * rows * 128
    assert stats >= parts * rows * 2
    assert gates == 0 if config.gates_first else gates >= parts * config.cluster_size * rows * 3
    assert counters >= parts * (config.cluster_size if config.cluster_size > 1 else config.consumers)


@pytest.mark.parametrize(("num_text", "batch"), [(256, 1), (512, 8)])
def test_uneven_groups_say_of_how_many_blocks_they_are_a_share(num_text, batch):
    config = hopper_attention_config(num_text, 10368 * batch, batch, 28, 4, 128)
    assert 0 < config.long_blocks < config.even_blocks == 81


@pytest.mark.parametrize("sms", HOPPER_SMS)
def test_batches_of_few_rows_over_long_videos_saturate_the_memory(sms):
    for batch in range(5, 65):
        config = hopper_attention_config(8 * batch, 20736 * batch, batch, 28, 4, 128, num_sms=sms)
        ctas = 4 * batch * config.num_groups * config.cluster_size
        assert ctas >= 80 * sms // 132, batch


def test_sequences_that_can_have_no_row_are_not_planned_for():
    alone, beside = (hopper_attention_config(1, 10368 * batch, batch, 28, 4, 128) for batch in (1, 2))
    assert (alone.cluster_size, alone.num_groups) == (beside.cluster_size, beside.num_groups)
    assert beside.even_units == 4, "one row has a tile a KV head, wherever it is"
    assert beside.share_slots > 0, "which of the two it is, and how long, only the device knows"


def test_lengths_that_are_known_are_not_looked_at():
    assert hopper_attention_config(64, 10368, 1, 28, 4, 128).share_slots == 0, "one sequence"
    assert hopper_attention_config(64, 10368, 8, 28, 4, 128, 4).share_slots == 0, "a fixed number of splits"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"capability": (8, 0)}, "9.0"),
        ({"capability": (10, 0)}, "9.0"),
        ({"dtype": torch.float32}, "float32"),
        ({"head_dim": 80}, "80"),
        ({"aligned": False}, "16 bytes"),
        ({"positive_scale": False}, "positive"),
        ({"has_sm90_kernels": False}, "SLOWFAST_CUDA_ARCHS"),
    ],
)
def test_what_it_does_not_take_goes_to_triton_and_the_limit_is_named(change, word):
    call = HALF._replace(**change)
    reason = unsupported_reason("cuda", call)
    assert word in reason
    assert "backend='triton'" in reason
    assert choose_backend(call, EVERYTHING_IS_HERE).backend == "triton"


def test_what_it_takes_goes_to_it():
    assert choose_backend(HALF, EVERYTHING_IS_HERE).backend == "cuda"
    assert choose_backend(HALF._replace(head_dim=64, dtype=torch.float16), EVERYTHING_IS_HERE).backend == "cuda"


@pytest.mark.parametrize(("rows", "chosen"), [(1, "cuda"), (4095, "cuda"), (4096, "triton"), (8192, "triton")])
def test_a_mix_of_4096_rows_or_more_goes_to_triton_where_it_is_faster(rows, chosen):
    call = OpCall("gated_residual_mix", "cuda", torch.bfloat16, (9, 0), num_text=rows)
    assert choose_backend(call, EVERYTHING_IS_HERE).backend == chosen
    assert choose_backend(call, EVERYTHING_IS_HERE | {"triton": "not installed"}).backend == "cuda"


@pytest.mark.parametrize(("rows", "chosen"), [(1, "triton"), (4095, "triton"), (4096, "cuda"), (8192, "cuda")])
def test_gradients_of_a_mix_of_fewer_than_4096_rows_go_to_triton_where_they_are_faster(rows, chosen):
    call = OpCall("gated_residual_mix", "cuda", torch.bfloat16, (9, 0), num_text=rows, backward=True)
    assert choose_backend(call, EVERYTHING_IS_HERE).backend == chosen
    assert choose_backend(call, EVERYTHING_IS_HERE | {"triton": "not installed"}).backend == "cuda"


def test_no_other_op_leaves_cuda_for_the_number_of_its_rows():
    assert choose_backend(HALF._replace(num_text=8192), EVERYTHING_IS_HERE).backend == "cuda"


@given(num_text=st.integers(1, 4096), num_slow=st.integers(0, 200_000), batch=st.integers(1, 80))
def test_ranges_and_pieces_get_plans_that_hold_whatever_rows_see(num_text, num_slow, batch):
    config = hopper_attention_config(num_text, num_slow, batch, 28, 4, 128, selects=True)
    assert not config.long_blocks
    assert not config.whole_units
    if config.dealt_ctas:  # every unit gets a CTA, and there is room for the parts of all
        assert (config.consumers, config.cluster_size) == (2, 1)
        assert config.dealt_ctas >= config.max_tiles * 4
        assert config.num_groups > 1, "a workspace is made"
        out, stats, gates, counters = config.workspace(4, 128)
        assert (out, stats) == (config.dealt_ctas * 128 * 128, config.dealt_ctas * 128 * 2)
        assert gates == (0 if config.gates_first else config.max_tiles * 4 * 128 * 3)
        assert counters == config.dealt_ctas * 2


def test_many_text_rows_have_their_gates_formed_first_unless_splits_fix_a_rows_bits():
    def gates_first(batch: int, num_text: int, num_slow: int, heads: tuple[int, int] = (28, 4), num_splits: int = 0):
        config = hopper_attention_config(batch * num_text, batch * num_slow, batch, *heads, 128, num_splits)
        return config.gates_first

    first = [(32, 64, 2048), (8, 128, 2048), (16, 64, 2048), (4, 128, 20736, (32, 8)), (16, 128, 5184), (32, 128, 5184)]
    assert all(gates_first(*shape) for shape in first)
    within = [(8, 64, 2048), (16, 32, 5184), (8, 64, 10368), (8, 128, 5184), (1, 1024, 10368), (1, 1, 5184)]
    assert not any(gates_first(*shape) for shape in within)
    assert not gates_first(32, 64, 2048, num_splits=1)


def test_a_fixed_number_of_splits_leaves_nothing_to_a_deal():
    assert hopper_attention_config(256, 10368, 1, 28, 4, 128, 4, selects=True) == hopper_attention_config(
        256, 10368, 1, 28, 4, 128, 4
    )


def test_many_rows_that_see_ranges_are_dealt_out_and_few_are_left_to_clusters():
    assert hopper_attention_config(256, 10368, 1, 28, 4, 128, selects=True).dealt_ctas > 0
    assert hopper_attention_config(64, 10368, 1, 28, 4, 128, selects=True).cluster_size == 8


# ------------------------------------------------------------------------------------------------ gradients


@given(
    texts=st.lists(st.integers(0, 300), min_size=1, max_size=32).filter(any),
    num_slow=st.integers(1, 200_000),
    num_kv_heads=st.sampled_from([1, 2, 4, 8]),
    heads_per_kv=st.integers(1, 16),
    head_dim=st.sampled_from(HOPPER_HEAD_DIMS),
    num_sms=st.sampled_from(HOPPER_SMS),
    room=st.integers(0, 128 * 2**20),
)
def test_a_backward_has_room_for_all_rows_however_they_are_distributed(
    texts, num_slow, num_kv_heads, heads_per_kv, head_dim, num_sms, room
):
    sizes = (sum(texts), num_slow, len(texts), num_kv_heads * heads_per_kv, num_kv_heads, head_dim, num_sms, room)
    config = hopper_attention_backward_config(*sizes)
    assert sum(-(-text * heads_per_kv // 64) for text in texts) <= config.max_tiles <= config.max_sums
    assert 1 <= config.num_ctas <= num_sms
    tiles, sums, parts, turns, pair_turns = config.workspace(num_kv_heads, head_dim)
    assert tiles == num_kv_heads * config.max_tiles * (2 * 64 * head_dim * 2 + 2 * 64 * 4)
    assert sums == num_kv_heads * config.max_sums * 64 * head_dim * 4
    assert turns >= 4 * num_kv_heads * config.max_sums
    assert pair_turns >= 16 * (config.num_ctas // 2)
    assert parts == (config.num_ctas // 2 * 4 * 64 * head_dim * 4 if config.splits_last_round else 0)
    assert all(size % 16 == 0 for size in (tiles, sums, parts, turns, pair_turns))
    if config.max_sums > config.max_tiles:  # but for their counters
        assert tiles + sums + parts + turns + pair_turns <= room + 4 * num_kv_heads * config.max_sums


@pytest.mark.parametrize(("batch", "slow"), [(1, 98304), (8, 5184), (32, 648)])
def test_short_videos_of_a_batch_have_sums_for_their_groups(batch, slow):
    """64 rows of 7 heads are 7 row tiles; a CTA begins two after the one before, so four share sums."""
    config = hopper_attention_backward_config(64 * batch, slow * batch, batch, 28, 4, 128, room=128 * 2**20)
    active = min(33, -(-slow // 128))
    assert config.max_sums - config.max_tiles >= batch * (-(-active // 4) - 1) * 7


def test_ctas_of_few_blocks_do_not_wait_for_an_sm_each():
    assert hopper_attention_backward_config(1, 100, 1, 4, 2, 64).num_ctas == 2
    assert hopper_attention_backward_config(64, 10368, 1, 28, 4, 128).num_ctas == 132


def test_blocks_are_halved_where_a_sequence_has_rows_enough():
    assert hopper_attention_backward_config(37, 10368, 1, 28, 4, 128).splits_last_round
    assert not hopper_attention_backward_config(36, 10368, 1, 28, 4, 128).splits_last_round
    assert not hopper_attention_backward_config(37 * 2 - 1, 10368, 2, 28, 4, 128).splits_last_round


@pytest.mark.parametrize("ranges", [False, True])
@pytest.mark.parametrize("pieces", [False, True])
def test_gradients_are_cuda_s_whatever_rows_see_and_wherever_tokens_lie(ranges, pieces):
    inputs = make_inputs(Shape(((2, 2048),), (16, 16), 64), torch.bfloat16, "cpu", torch.Generator()).tensors
    rows = torch.zeros(2, dtype=torch.int32)
    if ranges:
        inputs = inputs._replace(slow_begin=rows, slow_end=rows + 3)
    if pieces:
        inputs = inputs._replace(slow_pieces=torch.tensor([[0, 2048]], dtype=torch.int32))
    facts = attention_facts("text_cross_attention", inputs, None)
    call = facts._replace(device_type="cuda", capability=(9, 0), has_sm90_kernels=True, backward=True)
    assert choose_backend(call, EVERYTHING_IS_HERE).backend == "cuda"


@pytest.mark.parametrize("shape", [(1, 1, 1), (64, 10368, 1), (5 * 37, 40 * 37, 37), (1024, 41472, 2)])
def test_what_rows_see_has_room_for_all_blocks_however_they_are_distributed(shape):
    _, num_slow, batch = shape
    config = hopper_attention_backward_config(*shape, 14, 2, 128)
    rows, tokens, tiles, masked = config.sights(num_slow, batch)
    most_blocks = (batch - 1) + -(-(num_slow - batch + 1) // 128)  # all but one sequence of one token
    assert rows == config.max_tiles * 64 * 8
    assert tokens >= most_blocks * 16
    assert tiles == masked
    assert tiles // 4 >= most_blocks * -(-config.max_tiles // 32)
    assert all(size % 4 == 0 for size in (rows, tokens, tiles))
    assert rows % 16 == 0  # tokens lie behind the rows and are read 16 bytes at a time


@pytest.mark.parametrize("shape", [(1, 1, 1), (64, 10368, 1), (5 * 37, 40 * 37, 37), (1024, 41473, 2)])
def test_what_is_known_of_pieces_has_room_for_all_blocks_and_row_tiles(shape):
    _, num_slow, batch = shape
    config = hopper_attention_backward_config(*shape, 14, 2, 128)
    uses, block_uses, sequences, reach = config.pieces(3, num_slow, batch)
    assert uses == 3 * 16
    assert block_uses >= -(-num_slow // 128) * 32
    assert sequences >= config.max_tiles * 4
    assert reach == 16
    assert all(size % 16 == 0 for size in (uses, block_uses, sequences))


@pytest.mark.parametrize(
    ("batch", "text", "slow", "heads", "kv_heads", "at_once"),
    [
        (1, 64, 10368, 28, 4, 4),
        (4, 256, 10368, 28, 4, 4),
        (1, 1024, 41472, 32, 8, 8),
        (8, 512, 5184, 28, 4, 2),
        (8, 512, 5184, 20, 5, 3),
        (16, 1024, 1296, 32, 8, 1),
        (32, 1024, 64, 28, 4, 0),
    ],
)
def test_gradients_of_many_rows_for_few_slow_tokens_are_of_some_kv_heads_at_a_time_or_go_to_triton(
    batch, text, slow, heads, kv_heads, at_once
):
    query_bytes, slow_bytes = batch * text * heads * 128 * 2, batch * slow * kv_heads * 2 * 128 * 2
    assert hopper_backward_kv_heads(query_bytes, slow_bytes, kv_heads) == at_once
    if at_once:
        config = hopper_attention_backward_config(
            batch * text,
            batch * slow,
            batch,
            heads // kv_heads * at_once,
            at_once,
            128,
            room=hopper_backward_room(query_bytes, slow_bytes),
        )
        beside = 0.15 * (query_bytes + slow_bytes) + 64 * 2**20  # dQ, dK and dV
        assert sum(config.workspace(at_once, 128)) <= beside
    drawback = hopper_backward_drawback(batch * text, batch * slow, batch, heads, kv_heads, 128, in_pieces=False)
    assert ("memory" in (drawback or "")) == (at_once == 0)


MEASURED = {  # on an H100: the faster of two that differ by more than 3%
    "cuda": [
        "1x8x2048", "1x64x3240", "2x64x2048", "2x256x2048", "1x1024x41472@32/8/128", "4x256x5184", "8x64x5184",
        "8x128x2048", "12x64x5184", "8x256x10368", "8x512x5184", "16x8x10368", "16x64x10368", "16x64x5184@32/8/128",
        "16x256x5184", "32x256x5184", "8x64x5184@8/8/64", "8x256x5184@14/2/64",
    ],
    "triton": [
        "1x8x648", "1x64x648", "1x64x2048", "1x256x2048", "2x64x648", "8x8x2048", "8x32x2048", "8x64x648", "8x256x648",
        "16x8x2048", "16x64x2048", "16x64x5184", "16x128x5184", "32x8x648", "32x64x2048", "32x256x2048", "32x64x5184",
        "32x64x2048@32/8/128", "32x64x10368", "1x64x2048@14/2/64", "8x8x2048@14/2/64", "16x64x648@14/2/64",
    ],
}  # fmt: skip


@pytest.mark.parametrize("backend", MEASURED)
def test_gradients_are_of_the_backend_that_was_measured_to_be_faster(backend):
    chosen = {}
    for name in MEASURED[backend]:
        shape = parse_attention(name)
        heads = shape.heads.num_q, shape.heads.num_kv, shape.heads.dim
        sizes = shape.num_text, shape.num_slow, shape.batch, *heads
        call = HALF._replace(backward=True, backward_drawback=hopper_backward_drawback(*sizes, in_pieces=False))
        chosen[name] = choose_backend(call, EVERYTHING_IS_HERE).backend
        assert choose_backend(call, EVERYTHING_IS_HERE | {"triton": "not installed"}).backend == "cuda"
        assert choose_backend(call._replace(backward=False), EVERYTHING_IS_HERE).backend == "cuda"
    assert chosen == dict.fromkeys(MEASURED[backend], backend)


@pytest.mark.parametrize(
    ("sizes", "backend"),
    [
        ((512, 10368, 8), "cuda"),  # eight questions about one video: 473 us, Triton 601
        ((2048, 10368, 32), "cuda"),  # its tokens are as few a question as those of short videos
        ((256, 20736, 4), "cuda"),  # slabs of 5184: 151 us, Triton 157
        ((64, 10368, 1), "cuda"),  # 82 us, Triton 87
        ((512, 5184, 8), "triton"),  # as eight slabs of 648: 97 us, Triton 53; eight questions: 310, 363
        ((512, 2048, 8), "triton"),  # questions: 202 us, Triton 172
        ((64, 2048, 8), "triton"),  # 57 us, Triton 48
        ((4096, 2048, 64), "triton"),  # many questions make it no longer
        ((1024, 82944, 16), "triton"),  # 702 us, Triton 595
        ((2048, 65536, 32), "triton"),  # 965 us, Triton 492
    ],
)
def test_gradients_over_pieces_are_of_the_backend_that_was_measured_to_be_faster(sizes, backend):
    drawback = hopper_backward_drawback(*sizes, 28, 4, 128, in_pieces=True)
    call = HALF._replace(backward=True, backward_drawback=drawback)
    assert choose_backend(call, EVERYTHING_IS_HERE).backend == backend


def test_nothing_to_attend_has_no_drawback():
    for nothing in ((0, 9, 1), (9, 0, 1), (0, 0, 0)):
        assert hopper_backward_drawback(*nothing, 28, 4, 128, in_pieces=False) is None
