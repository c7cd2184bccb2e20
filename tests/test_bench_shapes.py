"""The benchmark's shapes: their names, what they cost, and which a run takes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench is not installed; installed packages keep winning

from bench import registry, selection, shapes
from bench.shapes import AttentionShape, Ceilings, Cost, Heads, MixShape, PoolShape

H100 = Ceilings(read_gbps=3122, copy_gbps=3018, gemm_tflops={"bfloat16": 762})
TINY_HEADS = Heads(4, 2, 16)


@pytest.mark.parametrize(
    "name", ["ATTENTION", "POOL", "MIX", "LAYER", "RAGGED", "RANGES", "PIECES", "ATTENTION_BACKWARD"]
)
def test_a_registry_names_each_shape_once_and_has_some_for_a_cpu(name):
    registered = getattr(registry, name)
    names = [shape.name for shape in registered]
    assert len(names) == len(set(names))
    assert any(shape.on_cpu for shape in registered)


def test_the_registry_covers_the_heads_of_all_published_models():
    assert {shape.heads for shape in registry.ATTENTION} == set(shapes.HEADS.values())


@pytest.mark.parametrize(
    ("batch", "text", "slow", "floor_us"),
    [
        (1, 1, 5184, 3.4),
        (1, 1, 10368, 6.8),
        (1, 1, 98304, 64.5),
        (16, 1, 10368, 109),
        (1, 64, 5184, 6.2),
        (1, 64, 10368, 12.5),
        (1, 256, 10368, 50),
        (8, 64, 10368, 100),
        (1, 64, 98304, 118),
        (1, 256, 98304, 473),
        (1, 1024, 98304, 1893),
    ],
)
def test_attention_floors_are_those_of_the_target_table(batch, text, slow, floor_us):
    shape = AttentionShape.even(batch, text, slow)
    assert shape in registry.ATTENTION
    assert shapes.attention_cost(shape, "bfloat16", fused=False).floor_us(H100, "bfloat16") == pytest.approx(
        floor_us, rel=0.02
    )


def test_the_fused_op_is_charged_for_the_state_it_reads():
    shape = AttentionShape.even(1, 64, 5184)
    alone, fused = (shapes.attention_cost(shape, "bfloat16", fused) for fused in (False, True))
    assert fused.bytes - alone.bytes == (64 + 1) * 3584 * 2
    assert fused.flops > alone.flops


def test_a_sequence_without_text_rows_costs_no_bytes_of_its_slow_tokens():
    cost = shapes.attention_cost(AttentionShape((1, 0), (10, 1000), TINY_HEADS), "float32", fused=False)
    assert cost.read == 10 * 2 * 2 * 16 * 4 + 4 * 16 * 4


def test_pooling_128_frames_moves_the_features_and_both_kinds_of_tokens_once():
    cost = shapes.pool_cost(PoolShape((128,), (18, 18)), "bfloat16")
    assert cost.read == 128 * 324 * 3584 * 2
    assert cost.written == (128 * 81 + 32 * 81) * 3584 * 2


def test_pooling_is_not_charged_for_rows_that_floor_pooling_drops():
    assert shapes.pool_cost(PoolShape((8,), (5, 5), channels=4), "float32").read == 8 * 16 * 4 * 4


@pytest.mark.parametrize(
    ("batch", "text", "slow", "heads", "floor_us"),
    [
        (1, 64, 10368, "28/4/128", 46),
        (1, 256, 10368, "28/4/128", 185),
        (4, 256, 10368, "28/4/128", 740),
        (8, 512, 5184, "28/4/128", 1480),
        (1, 64, 98304, "28/4/128", 439),
        (1, 256, 98304, "28/4/128", 1754),
        (1, 1024, 41472, "32/8/128", 3383),
    ],
)
def test_floors_of_forward_and_backward_are_those_of_the_target_table(batch, text, slow, heads, floor_us):
    shape = selection.parse_attention(f"{batch}x{text}x{slow}@{heads}")
    assert shape in registry.ATTENTION_BACKWARD
    step = shapes.attention_cost(shape, "bfloat16", fused=False) + shapes.attention_backward_cost(shape, "bfloat16")
    ceilings = Ceilings(read_gbps=3122, copy_gbps=3018, gemm_tflops={"bfloat16": 720})
    assert step.floor_us(ceilings, "bfloat16") == pytest.approx(floor_us, rel=0.02)


def test_the_backward_pass_of_attention_reads_k_and_v_and_writes_their_gradients():
    cost = shapes.attention_backward_cost(AttentionShape.even(2, 3, 10, TINY_HEADS), "bfloat16")
    rows, kv = 6 * 4 * 16 * 2, 20 * 2 * 2 * 16 * 2
    assert cost == Cost(10 * 2 * 30 * 4 * 16, kv + 3 * rows + 6 * 4 * 4, kv + rows)  # q, context, its gradient; lse


def test_the_backward_pass_of_pooling_writes_every_feature_and_reads_them_only_through_a_norm():
    shape = PoolShape((8,), (5, 5), channels=4)
    plain, normed = (shapes.pool_backward_cost(shape, "float32", norm) for norm in (False, True))
    assert plain.written == normed.written == 8 * 25 * 4 * 4
    assert plain.read == (8 * 4 + 2 * 4) * 4 * 4
    assert normed.read - plain.read == 8 * 16 * 4 * 4
    assert normed.flops > plain.flops


def test_the_backward_pass_of_the_mix_moves_gradients_on_all_rows_and_state_and_context_on_text_rows():
    cost = shapes.mix_backward_cost(MixShape(64, 1360), "bfloat16")
    assert (cost.read, cost.written) == ((1360 + 128 + 1) * 3584 * 2, (1360 + 64 + 1) * 3584 * 2)


@pytest.mark.parametrize("slow_path", [False, True])
def test_a_training_step_multiplies_by_every_weight_three_times_and_attends_three_and_a_half_times(slow_path):
    model = shapes.ModelShape(2, 64, 100, 3, TINY_HEADS, 500, every=2, text=5, slow_side=3, fast_frames=1)
    shape = shapes.TrainShape(replace(model, vision_channels=48), 7)
    rows, weights = 5 + 9, 64 * (2 * 64 + 2 * 32 + 3 * 100)
    flops = 6 * rows * (3 * weights + 500 * 64) + 2 * 36 * 4 * 48 * 64 + 18 * 6 * 64 * 64
    flops += 14 * (rows * (rows + 1) // 2) * 64 * 3
    if slow_path:
        flops += 14 * 5 * 18 * 64 * 2 + 6 * 18 * 64 * 64 * 2  # two hybrid layers: attention of the text, K and V
    assert shapes.train_cost(shape, "float32", slow_path).flops == 7 * flops


def test_a_video_is_projected_by_two_layers_of_which_the_last_has_the_tokens_that_are_read():
    shape = shapes.ModelShape(2, 64, 100, 3, TINY_HEADS, 500, every=2, slow_side=3, vision_channels=48)
    cost = shapes.vision_cost(shape, "bfloat16", 18)
    assert cost.flops == 2 * (2 * 36 * 48 * 64 + 18 * 64 * 64)
    assert cost.read == 2 * (2 * 36 * 48 + 48 * 64 + 64 * 64)
    assert cost.written == 2 * 18 * 64


def test_mix_moves_state_twice_and_context_once():
    cost = shapes.mix_cost(MixShape(64, 1360), "bfloat16")
    assert (cost.read, cost.written) == ((1360 + 64 + 1) * 3584 * 2, 1360 * 3584 * 2)


def test_a_projection_reads_tokens_and_weight_and_writes_keys_and_values():
    cost = shapes.projection_cost(10, 48, TINY_HEADS, "float32")
    width = 2 * 2 * 16  # K and V of two heads
    assert cost == Cost(2 * 10 * 48 * width, (10 + width) * 48 * 4, 10 * width * 4)


def test_a_floor_is_the_larger_of_arithmetic_and_bytes_and_writing_lowers_the_bandwidth():
    ceilings = Ceilings(read_gbps=100, copy_gbps=50, gemm_tflops={"float32": 1})
    assert Cost(2e6, 0, 0).floor_us(ceilings, "float32") == pytest.approx(2)
    assert Cost(0, 1e6, 0).floor_us(ceilings, "float32") == pytest.approx(10)
    assert Cost(0, 5e5, 5e5).floor_us(ceilings, "float32") == pytest.approx(20)


def test_a_decoded_token_of_the_7b_model_is_bound_by_its_weights():
    shape = registry.QWEN2_7B_MODEL
    cost = shapes.model_cost(shape, "bfloat16", 1360, shape.num_slow, decode=True)
    assert cost.read == pytest.approx(14.2e9, rel=0.03)  # 7.6e9 parameters less the embedding, two bytes each
    assert cost.bytes / H100.read_gbps / 1e3 > cost.flops / H100.gemm_tflops["bfloat16"] / 1e6


@pytest.mark.parametrize(("rows", "slow"), [(7, 0), (7, 50)])
def test_a_prefill_multiplies_by_every_weight_and_attends_earlier_rows(rows, slow):
    shape = shapes.ModelShape(2, 64, 100, 3, TINY_HEADS, 500, every=2, text=5)
    weights = 64 * (2 * 64 + 2 * 32 + 3 * 100)  # q and o, k and v, the MLP
    flops = 2 * (rows * 3 * weights + 500 * 64) + 4 * (rows * (rows + 1) // 2) * 64 * 3
    flops += 4 * 5 * slow * 64 * 2 + 2 * slow * 64 * 64 * 2  # two hybrid layers: attention of the text, K and V
    cost = shapes.model_cost(shape, "float32", rows, slow, decode=False)
    assert cost.flops == flops
    assert cost.read == (3 * weights + 500 * 64 + slow * 64) * 4
    assert cost.written == (rows * 3 + slow * 2) * 64 * 4


def test_slow_tokens_cost_a_small_part_of_what_self_attention_over_them_costs():
    shape = selection.model_shapes(["128"], on_cpu=False)[0]
    base = shapes.model_cost(shape, "bfloat16", shape.text + shape.num_fast, 0, decode=False).flops
    slow_fast = shapes.model_cost(shape, "bfloat16", shape.text + shape.num_fast, shape.num_slow, decode=False).flops
    everything = shapes.model_cost(shape, "bfloat16", shape.text + shape.num_slow, 0, decode=False).flops
    assert 1 < slow_fast / base < 1.04
    assert everything > 7 * base


@pytest.mark.parametrize(
    ("known", "parse", "text", "name"),
    [
        (registry.ATTENTION, selection.parse_attention, "2x3x77", "2x3x77@28/4/128"),
        (registry.ATTENTION, selection.parse_attention, "1x1x9@4/2/16", "1x1x9@4/2/16"),
        (registry.POOL, selection.parse_pool, "7x6x6/p3", "7x6x6/p3/t4@3584"),
        (registry.POOL, selection.parse_pool, "7x6x6/p3/t2@64", "7x6x6/p3/t2@64"),
        (registry.MIX, selection.parse_mix, "3of5@64", "3of5@64"),
        (registry.TRAIN, selection.parse_train, "2x9x8f", "2x9x8f"),
    ],
)
def test_an_explicit_shape_need_not_be_in_the_registry(known, parse, text, name):
    assert [shape.name for shape in selection.select(known, [text], parse, on_cpu=True)] == [name]


@pytest.mark.parametrize(
    ("text", "takers"),
    [
        ("4x3x5", {"attention", "ranges"}),
        ("1x1x8@28/4/128", {"attention", "ranges"}),
        ("2of3", {"mix"}),
        ("2x64x16f", {"train"}),
        ("16", {"attention", "pool", "model", "hf", "decode"}),  # a part of names, and a number of frames
        ("3x1360", {"decode"}),
        ("16 frames", {"model", "hf"}),
        ("24x2i", {"mllama"}),
        ("1x64x*", {"attention", "ranges"}),
        ("28/4", {"attention", "ranges"}),
    ],
)
def test_among_all_benchmarks_a_shape_of_one_is_enough_and_the_others_pass_it_by(text, takers):
    selection.check_shapes([text], selection.OPS)
    chosen = {op: selection.select(known, [text], parse, on_cpu=True) for op, (known, parse) in selection.OPS.items()}
    chosen["model"] = selection.model_shapes([text], on_cpu=True)
    assert {op for op, found in chosen.items() if found} == takers


@pytest.mark.parametrize(
    ("op", "text"),
    [
        *[("attention", text) for text in ("0x1x8", "1x1x8@0/1/8", "1x1x2000000000")],
        *[("pool", text) for text in ("0x4x4", "4x4x4/t0", "4x4x4/p0", "4x0x0")],
        *[("mix", text) for text in ("0of5", "5of0", "5of6@0")],
        *[("model", text) for text in ("0", "-1", "2000000000")],
        *[("decode", text) for text in ("0x8", "8x0")],
        *[("train", text) for text in ("0x1x8f", "1x0x8f", "1x1x0f")],
    ],
)
def test_a_size_that_cannot_be_is_refused_by_name(op, text):
    with pytest.raises(ValueError, match=f"{text}.* want "):
        selection.check_shapes([text], [op])


def test_shapes_are_selected_by_pattern_or_part_of_the_name_even_those_too_large_for_a_cpu():
    def names(text):
        return [s.name for s in selection.select(registry.ATTENTION, [text], selection.parse_attention, on_cpu=True)]

    assert names("1x1024x*") == ["1x1024x98304@28/4/128"]
    assert names("14/2/64") == ["1x1x10368@14/2/64", "1x64x10368@14/2/64"]
    assert names("nothing") == []


def test_gradients_of_attention_have_shapes_of_their_own():
    selection.check_shapes(["8x512x5184*"], ["attention"], backward=True)
    with pytest.raises(ValueError, match="8x512x5184"):
        selection.check_shapes(["8x512x5184*"], ["attention"])
    with pytest.raises(ValueError, match="ragged"):
        selection.check_shapes(["ragged"], ["attention"], backward=True)


def test_training_is_of_the_1_5b_model_on_a_gpu_and_of_a_tiny_one_on_a_cpu():
    (shape,) = selection.train_shapes([], on_cpu=False)
    assert (shape.name, shape.model.num_slow, shape.rows) == ("4x256x128f", 10368, 256 + 1296)
    assert str(shape.model.heads) == "12/2/128"
    assert selection.train_shapes(["1x8x16f"], on_cpu=False)[0].model.layers == 28
    assert selection.train_shapes(["1x8x16f"], on_cpu=True)[0].model.layers == 4


def test_a_cpu_run_keeps_only_the_shapes_that_a_cpu_finishes():
    chosen = selection.select(registry.POOL, [], selection.parse_pool, on_cpu=True)
    assert chosen == [shape for shape in registry.POOL if shape.on_cpu]


def test_an_uneven_batch_is_held_to_an_even_one_of_as_much_work():
    for mix in registry.RAGGED:
        assert not mix.mix.is_even
        assert mix.even.is_even
        assert 0 <= mix.even.num_pairs / mix.mix.num_pairs - 1 < 1e-3 * mix.even.num_text
        assert mix.even.batch == sum(rows > 0 for rows in mix.mix.text)


@pytest.mark.parametrize(
    ("text", "slow", "even"),
    [
        ((1, 1, 1, 1), (98, 2, 0, 0), (4, 1, 25)),
        ((1, 0), (10, 22), (1, 1, 10)),  # what no row attends is no work
        ((6, 2), (10, 5), (2, 4, 9)),  # 70 pairs over 8 rows, rounded up
    ],
)
def test_the_even_batch_has_the_same_sequences_with_rows_and_the_same_pairs(text, slow, even):
    assert shapes.RaggedMix.of("", text, slow).even == AttentionShape.even(*even)


def test_random_mixes_are_the_same_in_every_run():
    again = registry._random_mix(8, 1, 20736)
    assert again in registry.RAGGED


def test_the_sweep_of_batches_runs_only_when_it_is_named():
    assert selection.swept_batches([]) == []
    assert selection.swept_batches(["8x8x2048", "28/4/128", "*"]) == []
    assert selection.swept_batches(["batches"]) == registry.BATCHES
    found = selection.swept_batches(["batches 16x32x5184*"])
    assert [(batch.text, batch.slow) for batch in found] == [((32,) * 16, (5184,) * 16)]
    assert not set(registry.BATCHES) & set(selection.select(registry.ATTENTION, ["batches"], lambda text: None, False))
    selection.check_shapes(["batches"], ["attention"])
    with pytest.raises(ValueError, match="batches"):
        selection.check_shapes(["batches"], ["attention"], backward=True)


def test_the_sweep_has_forty_batches_of_its_own():
    assert len({batch.name for batch in registry.BATCHES}) == 40


def test_uneven_batches_run_only_when_they_are_named():
    assert selection.ragged_mixes([], on_cpu=False) == []
    assert selection.ragged_mixes(["1x1x*", "41472", "*"], on_cpu=False) == []
    assert selection.ragged_mixes(["ragged"], on_cpu=False) == registry.RAGGED
    assert selection.ragged_mixes(["ragged"], on_cpu=True) == [mix for mix in registry.RAGGED if mix.on_cpu]
    assert [mix.label for mix in selection.ragged_mixes(["ragged*x 1296*"], on_cpu=True)] == ["98304 + 3 x 1296 @ 64"]
    selection.check_shapes(["ragged"], ["attention"])
    for op in ("pool", "ranges", "model"):
        with pytest.raises(ValueError, match="ragged"):
            selection.check_shapes(["ragged"], [op])
