"""without_cudnn_attention: cuDNN is left out while a block lasts, and the user's choice of backends is as it was."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from model_cases import tiny_model
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from slowfast_model import DecodeSession, sdpa
from slowfast_model.sdpa import MANY_ROWS, without_cudnn_attention

ALL = (True, True, True, True)
WITHOUT = (False, True, True, True)


def flags() -> tuple[bool, ...]:
    """Whether cuDNN, flash, efficient and math are enabled."""
    asked = (cuda.cudnn_sdp_enabled, cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled)
    return tuple(enabled() for enabled in asked)


@pytest.fixture(autouse=True)
def all_enabled():
    fused = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel([*fused, SDPBackend.MATH]):
        yield


def test_cudnn_alone_is_left_out_and_comes_back():
    with without_cudnn_attention():
        assert flags() == WITHOUT
    assert flags() == ALL


def test_an_error_gives_it_back():
    with pytest.raises(ValueError, match="no more"), without_cudnn_attention():
        raise ValueError("no more")
    assert flags() == ALL


def test_a_function_is_a_block():
    assert without_cudnn_attention()(flags)() == WITHOUT
    assert flags() == ALL


def test_an_inner_block_ends_without_giving_it_back():
    with without_cudnn_attention():
        with without_cudnn_attention():
            assert flags() == WITHOUT
        assert flags() == WITHOUT
    assert flags() == ALL


def test_of_blocks_that_overlap_the_last_to_end_gives_it_back():
    first, second = without_cudnn_attention(), without_cudnn_attention()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert flags() == WITHOUT
    second.__exit__(None, None, None)
    assert flags() == ALL


def test_threads_leave_the_flags_as_they_were():
    def enter():
        for _ in range(200):
            with without_cudnn_attention():
                seen.add(flags())

    seen: set = set()
    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {WITHOUT}
    assert flags() == ALL


def test_what_the_user_disabled_stays_disabled():
    cuda.enable_cudnn_sdp(False)
    with without_cudnn_attention():
        assert flags() == WITHOUT
    assert flags() == WITHOUT


def test_a_user_who_disabled_math_does_without_cudnn_too():
    cuda.enable_math_sdp(False)
    with without_cudnn_attention():
        assert flags() == (False, True, True, False)
    assert flags() == (True, True, True, False)


@pytest.mark.parametrize("also", [[], [SDPBackend.FLASH_ATTENTION], [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]])
def test_a_user_who_left_cudnn_calls_that_no_other_takes_keeps_it(also):
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *also]):
        before = flags()
        with without_cudnn_attention():
            assert flags() == before
        assert flags() == before
    assert flags() == ALL


def test_a_choice_within_a_block_is_the_users_too():
    with without_cudnn_attention():
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]), without_cudnn_attention():
            assert flags() == (True, False, False, False)
        assert flags() == WITHOUT
    assert flags() == ALL


def test_a_prompt_of_many_rows_is_worth_a_plan():
    with without_cudnn_attention(MANY_ROWS):
        assert flags() == ALL
    with without_cudnn_attention(MANY_ROWS - 1):
        assert flags() == WITHOUT


def test_a_session_s_prefill_and_no_other_call_does_without_cudnn(monkeypatch):
    attention, seen = F.scaled_dot_product_attention, []

    def recorded(*args, **options):
        seen.append(flags())
        return attention(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    model, ids = tiny_model(), torch.tensor([[1, 2, 3]])
    monkeypatch.setattr(sdpa, "MANY_ROWS", 3)
    DecodeSession(model, ids, max_new_tokens=1)
    assert set(seen) == {ALL}
    seen.clear()
    monkeypatch.setattr(sdpa, "MANY_ROWS", 4)
    session = DecodeSession(model, ids, max_new_tokens=1)
    assert set(seen) == {WITHOUT}
    seen.clear()
    session.step(session.most_likely)  # over the static cache, by "eager": one shape
    model(ids)
    assert set(seen) == {ALL}
