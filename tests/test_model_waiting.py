"""A prefill queues its work and does not wait for the GPU: not for a prompt of the CPU, and once for one of the GPU."""

from __future__ import annotations

import pytest
import torch
from model_cases import PROMPT_VIDEOS, PROMPTS, features, one_thread, padded, tiny_model  # noqa: F401
from pretend_gpu import GPU, Waited, gpu  # noqa: F401

import slowfast_kernels as sk
from slowfast_model import DecodeSession
from slowfast_model.prefill import use_order

OPS = ("slowfast_pool", "slowfast_cross_attention", "text_cross_attention")


@pytest.fixture
def model(gpu, monkeypatch):  # noqa: F811
    """On the pretended GPU; the ops of this package have no host syncs of their own there."""
    for name in OPS:
        op = getattr(sk, name)
        monkeypatch.setattr(sk, name, lambda *args, op=op, **options: gpu.run(op, *args, **options))
    model = tiny_model("cpu")
    gpu.put(model.parameters())
    return model


def batch(gpu, *, of_gpu):  # noqa: F811
    """Ids, features, mask: all on the GPU, or ids and mask on the CPU."""
    ids, mask = padded(PROMPTS)
    videos = features(*PROMPT_VIDEOS)
    gpu.put([*videos, *((ids, mask) if of_gpu else ())])
    return ids, videos, mask


def expected_logits(**options):
    ids, mask = padded(PROMPTS)
    model = tiny_model("cpu")
    return DecodeSession(model, ids, features(*PROMPT_VIDEOS), mask, max_new_tokens=3, **options).logits


@pytest.mark.parametrize("of_gpu", [False, True], ids=["prompt_of_the_cpu", "prompt_of_the_gpu"])
@pytest.mark.parametrize("order", [False, True], ids=["plain_order", "other_order"])
@pytest.mark.parametrize("room", [None, 200])
@torch.no_grad()
def test_a_prefill_waits_for_a_prompt_of_the_gpu_alone(gpu, model, of_gpu, order, room):  # noqa: F811
    call = batch(gpu, of_gpu=of_gpu)
    with use_order(pool_first=order, one_kv_product=order):
        with gpu:
            session = DecodeSession(model, *call, max_new_tokens=3, max_slow_tokens=room)
        assert gpu.calls.count("wait") == of_gpu
        assert torch.equal(session.logits, expected_logits(max_slow_tokens=room))


@pytest.mark.parametrize("first", [False, True], ids=["project_first", "pool_first"])
@torch.no_grad()
def test_between_runs_of_a_long_video_nothing_is_waited_for(gpu, model, first):  # noqa: F811
    call = batch(gpu, of_gpu=False)
    with use_order(pool_first=first, working_bytes=1):
        with gpu:
            session = DecodeSession(model, *call, max_new_tokens=3)
        assert gpu.calls.count("gelu") == 5  # 5 and 4 frames, two runs of each, and the image
        assert gpu.calls.count("wait") == 0
        assert gpu.has(session.logits)
        assert torch.equal(session.logits, expected_logits())


@torch.no_grad()
def test_what_a_prompt_of_the_gpu_is_waited_for_behind_is_queued_after_it(gpu, model):  # noqa: F811
    with gpu:
        DecodeSession(model, *batch(gpu, of_gpu=True), max_new_tokens=3)
    wait = gpu.calls.index("wait")
    assert "gelu" in gpu.calls[:wait]  # the projector
    assert "slowfast_pool" in gpu.calls[:wait]


@pytest.mark.parametrize("of_gpu", [False, True], ids=["prompt_of_the_cpu", "prompt_of_the_gpu"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_forward_pass_with_labels_waits_no_more_often(gpu, model, of_gpu, training):  # noqa: F811
    ids, videos, mask = batch(gpu, of_gpu=of_gpu)
    labels = torch.where(ids < 0, -100, ids)
    if of_gpu:
        gpu.put([labels])
    with gpu, torch.set_grad_enabled(training):
        output = model.train(training)(ids, videos, mask, labels)
    assert gpu.calls.count("wait") == of_gpu
    assert gpu.has(output.loss)
    assert gpu.has(output.attention_mask)


@torch.no_grad()
def test_a_turn_waits_for_its_prompt_alone(gpu, model):  # noqa: F811
    ids, _, mask = call = batch(gpu, of_gpu=True)
    with gpu:
        session = DecodeSession(model, *call, max_new_tokens=30)
        gpu.calls.clear()
        session.extend(torch.where(ids < 0, 5, ids), None, mask)
    assert gpu.calls.count("wait") == 1


def test_values_of_a_prompt_of_the_gpu_are_checked_once_they_are_there(gpu, model):  # noqa: F811
    ids = torch.tensor([[1, 61]])
    gpu.put([ids])
    with gpu, pytest.raises(ValueError, match=r"input_ids: got 61, want 0\.\.60"):
        model(ids)


@torch.no_grad()
def test_a_prompt_of_the_gpu_for_a_model_of_the_cpu_is_refused(gpu):  # noqa: F811
    ids = torch.tensor([[1, 2]])
    gpu.put([ids])
    with gpu, pytest.raises(ValueError, match=r"input_ids: got a tensor on cuda:0, want cpu \(the model's device\)"):
        tiny_model("cpu")(ids)


# ------------------------------------------------------------------------------------------ that it would be seen

WAITS = {
    "reading a value": lambda x: x.sum().item(),
    "a condition": lambda x: bool(x.any()),
    "a list": lambda x: x.tolist(),
    "a blocking copy to the host": lambda x: x.cpu(),
    "to the host": lambda x: x.to("cpu"),
    "where it is not 0": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 1],
    "an index in a list": lambda x: x[[0, 1]],
    "an index of the host": lambda x: x[torch.tensor([0, 1])],
    "a tensor of the host": lambda x: x + torch.ones(3),
    "an upload": lambda x: torch.tensor([1.0], device=x.device),
    "an upload from pageable memory": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "a blocking upload": lambda x: torch.ones(3).pin_memory().to(x.device),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_the_pretended_gpu_sees(gpu, wait):  # noqa: F811
    x = torch.arange(3.0)
    gpu.put([x])
    with gpu, pytest.raises(Waited):
        wait(x)
    with gpu:
        assert (x + 1).device == torch.ones(3, device=x.device).device == GPU


# ------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("of_gpu", [False, True], ids=["prompt_of_the_cpu", "prompt_of_the_gpu"])
@torch.no_grad()
def test_a_prefill_on_a_gpu_makes_no_synchronizing_call(of_gpu):
    """The first prefill of its kind compiles kernels and uploads the pooling's table; the next one is like it."""
    model = tiny_model("triton", "cuda")
    ids, mask = (x.to("cuda" if of_gpu else "cpu") for x in padded(PROMPTS))
    videos = features(*PROMPT_VIDEOS, device="cuda")
    expected = DecodeSession(model, ids, videos, mask, max_new_tokens=3).logits
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = DecodeSession(model, ids, videos, mask, max_new_tokens=3).logits
        model(ids, videos, mask, ids.clamp(min=0).where(ids >= 0, -100))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(logits, expected)
