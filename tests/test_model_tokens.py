"""Splicing: where fast tokens go, what kind of token each row is, and which rows attend the slow tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import VIDEO, padded

from slowfast_model.tokens import Prompts, attending_rows, decode_rows, splice

OPTIONS = {"vocab_size": 100}


def lay_out(prompts, videos=(), labels=None, side="right", **options):
    ids, mask = padded(prompts, side)
    return splice(Prompts(ids, mask, labels), videos, **OPTIONS, **options)


def test_a_video_marker_gives_way_to_its_fast_tokens():
    layout = lay_out([[7, VIDEO, 8, 9]], [(3, 20)])
    assert layout.token_types.tolist() == [[1, 3, 3, 3, 1, 1]]
    assert layout.text_ids.tolist() == [7, 8, 9]
    assert layout.source.tolist() == [[0, 3, 4, 5, 1, 2]]  # rows of cat(text, fast)


def test_fast_tokens_of_a_batch_are_taken_in_reading_order():
    layout = lay_out([[1, VIDEO], [VIDEO, 2, VIDEO]], [(1, 5), (2, 6), (3, 7)])
    assert layout.source.tolist() == [[0, 2, 8, 8, 8, 8], [3, 4, 1, 5, 6, 7]]  # 2 texts, 6 fast tokens, zeros


def test_slow_tokens_of_all_videos_of_a_sample_add_up():
    layout = lay_out([[1, VIDEO], [2], [VIDEO, 2, VIDEO]], [(1, 5), (2, 6), (3, 7)])
    assert layout.slow_lengths == [5, 0, 13]
    assert layout.cu_slow.tolist() == [0, 5, 5, 18]


def test_text_rows_of_samples_with_a_video_attend_and_visual_rows_do_not():
    layout = lay_out([[1, VIDEO, 2], [3, 4]], [(2, 9)])
    assert layout.text_rows.tolist() == [0, 3]
    assert layout.cu_text.tolist() == [0, 2, 2]


def test_all_to_media_lets_visual_rows_attend_too_but_not_padding():
    layout = lay_out([[1, VIDEO], [VIDEO, 2, 3]], [(1, 9), (1, 9)], every_row=True)
    assert layout.text_rows.tolist() == [0, 1, 3, 4, 5]


def test_masked_system_text_before_the_first_video_attends_nothing():
    layout = lay_out([[1, 2, VIDEO, 3, VIDEO, 4]], [(1, 9), (1, 9)], mask_system=True)
    assert layout.text_rows.tolist() == [3, 5]


CONVERSATION, CLIPS = [1, 2, VIDEO, 3, VIDEO, 4, 5], [(3, 10), (2, 7)]  # rows: 2 texts, 3 fast, 1 text, 2 fast, 2 texts


@pytest.mark.parametrize("mask_system", [False, True])
def test_causal_text_sees_the_videos_before_it(mask_system):
    layout = lay_out([CONVERSATION], CLIPS, causal=True, mask_system=mask_system)
    assert layout.text_rows.tolist() == [5, 8, 9]
    assert layout.slow_end.tolist() == [10, 17, 17]
    assert layout.slow_end.dtype == torch.int32


def test_a_causal_visual_row_sees_the_videos_before_its_own_and_the_last_one_its_own_too():
    layout = lay_out([CONVERSATION], CLIPS, causal=True, every_row=True)
    assert layout.text_rows.tolist() == [4, 5, 6, 7, 8, 9]
    assert layout.slow_end.tolist() == [10, 10, 10, 17, 17, 17]


def test_causal_rows_count_the_slow_tokens_of_their_own_sample():
    layout = lay_out([[VIDEO, 1], CONVERSATION, [2]], [(1, 5), *CLIPS], causal=True)
    assert layout.cu_text.tolist() == [0, 1, 4, 4]
    assert layout.slow_end.tolist() == [5, 10, 17, 17]
    assert layout.cu_slow.tolist() == [0, 5, 22, 22]


def test_causal_rows_that_see_all_there_is_have_no_ranges():
    """One video a sample: kernels need not look."""
    assert lay_out([[1, VIDEO, 2], [VIDEO, 3]], CLIPS, causal=True).slow_end is None


@pytest.mark.parametrize("options", [{}, {"every_row": True}, {"mask_system": True}])
def test_without_causal_every_row_sees_all_slow_tokens_of_its_sample(options):
    assert lay_out([CONVERSATION, [VIDEO, 1]], [*CLIPS, (1, 5)], **options).slow_end is None


def test_prompts_that_go_on_see_what_is_held():
    layout = lay_out([[1, VIDEO, 2], [3, 4], [5]], [(2, 7)], causal=True, held=[10, 0, 6])
    assert layout.text_rows.tolist() == [0, 3, 8]
    assert layout.slow_end.tolist() == [10, 17, 6]
    assert layout.slow_lengths == [7, 0, 0]  # what is new


@pytest.mark.parametrize("options", [{}, {"every_row": True}, {"mask_system": True}])
def test_text_that_goes_on_sees_what_is_held_by_its_sample_in_every_variant(options):
    layout = lay_out([[1, 2], [3, 4]], held=[10, 0], **options)
    assert layout.text_rows.tolist() == [0, 1]
    assert layout.slow_end is None


def test_padding_on_either_side_gives_one_right_padded_layout():
    prompts, videos = [[1, VIDEO, 2], [3]], [(2, 8)]
    right, left = lay_out(prompts, videos), lay_out(prompts, videos, side="left")
    for field in ("source", "token_types", "text_rows", "cu_text", "attention_mask"):
        assert torch.equal(getattr(right, field), getattr(left, field)), field
    assert right.attention_mask.tolist() == [[True] * 4, [True] + [False] * 3]


def test_labels_move_with_their_tokens_and_mark_responses():
    labels = torch.tensor([[-100, -100, 5, 6]])
    layout = lay_out([[1, VIDEO, 5, 6]], [(2, 8)], labels)
    assert layout.labels.tolist() == [[-100, -100, -100, 5, 6]]
    assert layout.token_types.tolist() == [[1, 3, 3, 2, 2]]


def test_a_sample_may_be_a_video_alone():
    layout = lay_out([[VIDEO]], [(2, 8)])
    assert layout.lengths == [2]
    assert layout.text_rows.tolist() == []


def test_no_row_of_a_sample_without_visual_tokens_attends():
    assert attending_rows(np.array([1, 2, 2]), every_row=True).tolist() == []


def test_a_decode_step_has_one_row_for_each_sample_with_slow_tokens():
    rows, cu_text = decode_rows([4, 0, 9], torch.device("cpu"))
    assert rows.tolist() == [0, 2]
    assert cu_text.tolist() == [0, 1, 1, 2]


PROMPT = st.lists(st.integers(0, 99) | st.just(VIDEO), min_size=1, max_size=9)


@given(st.lists(PROMPT, min_size=1, max_size=4), st.sampled_from(["left", "right"]), st.data())
def test_any_batch_is_laid_out_as_its_samples_written_out(prompts, side, data):
    videos = [data.draw(st.tuples(st.integers(1, 5), st.integers(1, 7))) for p in prompts for i in p if i == VIDEO]
    layout = lay_out(prompts, videos, side=side)
    fast = iter(torch.arange(1000, 1000 + sum(count for count, _ in videos)).tolist())
    rows = torch.tensor([*layout.text_ids, *range(1000, 1000 + sum(count for count, _ in videos)), -1])
    counts, attending = iter(videos), []
    for b, prompt in enumerate(prompts):
        written, slow = [], 0
        for token in prompt:
            count, more = next(counts) if token == VIDEO else (None, 0)
            written += [token] if count is None else [next(fast) for _ in range(count)]
            slow += more
        width = layout.source.shape[1]
        assert rows[layout.source[b]].tolist() == written + [-1] * (width - len(written))
        assert layout.slow_lengths[b] == slow
        attending += [b * width + i for i, token in enumerate(written) if token < 1000 and slow]
    assert layout.text_rows.tolist() == attending


@pytest.mark.parametrize(
    ("prompts", "videos", "message"),
    [
        ([[1, VIDEO]], [], "got 0 videos, want 1"),
        ([[1, 2]], [(1, 1)], "got 1 videos, want 0"),
        ([[1, 100]], [], "got 100, want 0..99"),
        ([[1, -1]], [], "got -1, want 0..99"),
    ],
)
def test_wrong_ids_and_counts_are_refused(prompts, videos, message):
    with pytest.raises(ValueError, match=message):
        lay_out(prompts, videos)


def test_a_sample_without_a_token_is_refused():
    with pytest.raises(ValueError, match="row 1"):
        splice(Prompts(torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 0], [0, 0, 0]])), [], **OPTIONS)


@pytest.mark.parametrize("name", ["attention_mask", "labels"])
def test_a_mask_or_labels_of_another_shape_are_refused(name):
    with pytest.raises(ValueError, match=name):
        Prompts(torch.ones(1, 3, dtype=torch.int64), **{name: torch.ones(1, 4, dtype=torch.int64)})


def test_ids_must_be_integers_in_a_batch():
    with pytest.raises(TypeError, match="input_ids"):
        Prompts(torch.ones(1, 3))
    with pytest.raises(ValueError, match="input_ids"):
        Prompts(torch.ones(3, dtype=torch.int64))
