"""Generation: caches change nothing, batches are their samples, and options do what they say."""

from __future__ import annotations

import gc
import re
import weakref
from types import SimpleNamespace

import golden_data
import pytest
import torch
from model_cases import (  # noqa: F401
    MODEL_TARGETS,
    PROMPT_VIDEOS,
    PROMPTS,
    VIDEO,
    GoldenModel,
    features,
    one_thread,
    padded,
    tiny_model,
)

import slowfast_kernels as sk
from slowfast_model import DecodeSession
from slowfast_model.sampling import sample

every_target = pytest.mark.parametrize("target", MODEL_TARGETS)


def batch(device="cpu", side="right"):
    ids, mask = (x.to(device) for x in padded(PROMPTS, side))
    return ids, features(*PROMPT_VIDEOS, device=device), mask


# ------------------------------------------------------------------------------------------ the released ids


@every_target
@pytest.mark.parametrize("name", golden_data.names("model_"))
@pytest.mark.parametrize("mode", ["attending", "official"])
def test_greedy_ids_are_the_released_ones_in_both_decode_modes(name, mode, target):
    golden = GoldenModel.load(name, target.backend, target.device)
    expected = golden[f"gen.{mode}_ids"]
    ids = golden.model.generate(
        golden["gen.input_ids"],
        golden.features,
        golden["gen.attention_mask"],
        max_new_tokens=expected.shape[1],
        slow_tokens_in_decode=mode == "attending",
    )
    assert torch.equal(ids, expected)


# ------------------------------------------------------------------------------------------ caches


@every_target
@torch.no_grad()
def test_cached_logits_equal_a_run_of_the_whole_sequence(target):
    model = tiny_model(target.backend, target.device)
    ids, videos, mask = batch(target.device)
    session = DecodeSession(model, ids, videos, mask, max_new_tokens=5)
    prompts, logits = [list(prompt) for prompt in PROMPTS], session.logits
    for _ in range(5):
        again, again_mask = (x.to(target.device) for x in padded(prompts))
        out = model(again, videos, again_mask)
        last = out.logits[torch.arange(3), out.attention_mask.sum(1) - 1]
        torch.testing.assert_close(logits, last, atol=1e-4, rtol=1e-4)
        token = logits.argmax(-1)
        for prompt, new in zip(prompts, token.tolist(), strict=True):
            prompt.append(new)
        logits = session.step(token)


@every_target
@torch.no_grad()
def test_a_batch_generates_what_its_samples_generate_one_by_one(target):
    model = tiny_model(target.backend, target.device)
    ids, videos, mask = batch(target.device)
    together = model.generate(ids, videos, mask, max_new_tokens=8)
    for b, (prompt, mine) in enumerate(zip(PROMPTS, (videos[:2], None, videos[2:]), strict=True)):
        alone = model.generate(torch.tensor([prompt], device=target.device), mine, max_new_tokens=8)
        assert together[b].tolist() == alone[0].tolist()


@every_target
@torch.no_grad()
def test_prompts_padded_on_the_left_generate_the_same(target):
    model = tiny_model(target.backend, target.device)
    right, left = (model.generate(*batch(target.device, side), max_new_tokens=6) for side in ("right", "left"))
    assert torch.equal(right, left)


def slow_caches(session):
    """The slow KV caches by layer."""
    return {i: cache.slow_kv for i, cache in enumerate(session.cache.layers) if cache.slow_kv is not None}


@torch.no_grad()
def test_slow_tokens_are_read_from_the_cache_while_decoding():
    """The same prefill, but other slow values afterwards: later logits must change."""
    model = tiny_model()
    session = DecodeSession(model, torch.tensor([[1, VIDEO, 2]]), features((4, 4)), max_new_tokens=2)
    for kv in slow_caches(session).values():
        kv[:, :, 1] += 1
    changed = session.step(torch.tensor([3])).clone()
    fresh = DecodeSession(model, torch.tensor([[1, VIDEO, 2]]), features((4, 4)), max_new_tokens=2)
    assert (changed - fresh.step(torch.tensor([3]))).abs().max() > 1e-2


@torch.no_grad()
def test_the_slow_cache_is_written_once_in_the_checkpoints_interleaved_layout():
    model = tiny_model()
    session = DecodeSession(model, torch.tensor([[1, VIDEO, 2]]), features((4, 4)), max_new_tokens=3)
    assert tuple(slow_caches(session)) == model.config.hybrid_layers
    before = {layer: (kv.data_ptr(), kv.clone()) for layer, kv in slow_caches(session).items()}
    session.step(torch.tensor([3]))
    for layer, (pointer, kv) in before.items():
        assert slow_caches(session)[layer].data_ptr() == pointer
        assert torch.equal(slow_caches(session)[layer], kv)
        assert kv.shape == (16, 2, 2, 8)  # [Ns, Hkv, 2, D]
    assert session.slow.tokens is None


@torch.no_grad()
def test_without_slow_tokens_in_decode_the_session_keeps_none():
    options = {"max_new_tokens": 3, "slow_tokens_in_decode": False}
    session = DecodeSession(tiny_model(), torch.tensor([[1, VIDEO, 2]]), features((4, 4)), **options)
    assert session.slow is None
    assert not slow_caches(session)


@torch.no_grad()
def test_a_session_refuses_more_steps_than_its_caches_hold():
    session = DecodeSession(tiny_model(), torch.tensor([[1, 2]]), max_new_tokens=1)
    session.step(torch.tensor([3]))
    with pytest.raises(ValueError, match="max_new_tokens"):
        session.step(torch.tensor([3]))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("videos", [(), ((4, 4),)], ids=["text", "video"])
def test_a_session_refuses_a_model_that_was_cast_since(dtype, videos):
    prompt, token = torch.tensor([[1, VIDEO, 2] if videos else [1, 2]]), torch.tensor([3])
    session, fresh = (DecodeSession(tiny_model(), prompt, features(*videos), max_new_tokens=1) for _ in range(2))
    session.model.to(dtype)
    with pytest.raises(ValueError, match=rf"^model: got one that computes in {dtype} now, want torch\.float32"):
        session.step(token)
    session.model.float().load_state_dict(fresh.model.state_dict())
    assert torch.equal(session.step(token), fresh.step(token))


BAD_IDS = {
    "past the vocabulary": torch.tensor([3, 61]),
    "negative": torch.tensor([3, -1]),
    "a video": torch.tensor([VIDEO, 3]),
    "too few": torch.tensor([3]),
    "too many": torch.tensor([3, 3, 3]),
    "a column": torch.tensor([[3], [3]]),
    "no dimension": torch.tensor(3),
    "floating": torch.tensor([3.0, 3.0]),
    "bool": torch.tensor([True, False]),
    "complex": torch.tensor([3j, 3j]),
    "on another device": torch.tensor([3, 3], device="meta"),
    "sparse": torch.tensor([3, 3]).to_sparse(),
    "a list": [3, 3],
    "a number": 3,
    "nothing": None,
}


@torch.no_grad()
@pytest.mark.parametrize("ids", BAD_IDS.values(), ids=list(BAD_IDS))
def test_a_step_refuses_bad_ids_and_leaves_the_session_as_it_was(ids):
    session, fresh = (DecodeSession(tiny_model(), torch.tensor([[1, 2], [3, 4]]), max_new_tokens=1) for _ in range(2))
    with pytest.raises((TypeError, ValueError), match=r"^token: got "):
        session.step(ids)
    good = torch.tensor([5, 6])
    assert torch.equal(session.step(good), fresh.step(good))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_a_step_takes_ids_of_any_integer_type(dtype):
    session, fresh = (DecodeSession(tiny_model(), torch.tensor([[1, 2], [3, 4]]), max_new_tokens=1) for _ in range(2))
    ids = torch.tensor([60, 0])
    assert torch.equal(session.step(ids.to(dtype)), fresh.step(ids))


@pytest.mark.parametrize("count", [-1, 2.0, True, "2", None, torch.tensor([2])])
def test_a_session_refuses_a_count_that_is_none(count):
    with pytest.raises((TypeError, ValueError), match=r"^max_new_tokens: got "):
        DecodeSession(tiny_model(), torch.tensor([[1, 2]]), max_new_tokens=count)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@torch.no_grad()
def test_a_step_looks_at_ids_on_a_gpu_only_when_debugging(monkeypatch):
    session = DecodeSession(tiny_model(None, "cuda"), torch.tensor([[1, 2]], device="cuda"), max_new_tokens=2)
    with pytest.raises(ValueError, match="token: got a tensor on cpu, want cuda"):
        session.step(torch.tensor([3]))
    monkeypatch.setenv("SLOWFAST_DEBUG", "1")
    with pytest.raises(ValueError, match="token: got id 61"):
        session.step(torch.tensor([61], device="cuda"))


@torch.no_grad()
def test_a_finished_session_frees_its_caches_at_once():
    session = DecodeSession(tiny_model(), torch.tensor([[1, VIDEO, 2]]), features((4, 4)), max_new_tokens=3)
    session.step(torch.tensor([3]))
    caches = [weakref.ref(kv) for kv in (*(c.kv for c in session.cache.layers), *slow_caches(session).values())]
    gc.disable()  # no cycle may keep them until the next collection
    try:
        del session
        assert not [kv for kv in caches if kv() is not None]
    finally:
        gc.enable()


@torch.no_grad()
def test_generation_works_in_inference_mode_and_in_training_mode():
    model = tiny_model().train()
    ids, videos, mask = batch()
    expected = model.generate(ids, videos, mask, max_new_tokens=4)
    with torch.inference_mode():
        assert torch.equal(model.eval().generate(ids, videos, mask, max_new_tokens=4), expected)


@pytest.mark.parametrize("inside", [(True, False), (False, True)], ids=["made in it", "stepped in it"])
def test_a_session_may_be_made_and_stepped_in_different_modes(inside):
    model, token = tiny_model(), torch.tensor([3, 4, 5])
    with torch.inference_mode(inside[0]):
        session = DecodeSession(model, *batch(), max_new_tokens=2)
    with torch.inference_mode(inside[1]):
        session.step(token)
        logits = session.step(token)
    fresh = DecodeSession(model, *batch(), max_new_tokens=2)
    fresh.step(token)
    assert torch.equal(logits, fresh.step(token))


# ------------------------------------------------------------------------------------------ the step as a graph


@every_target
@torch.no_grad()
def test_the_decode_step_is_one_graph_without_a_break_or_a_second_compilation(target):
    model = tiny_model(target.backend, target.device)
    sessions = [DecodeSession(model, *batch(target.device), max_new_tokens=4) for _ in range(2)]
    torch._dynamo.reset()
    compiled = torch.compile(sessions[1]._compute, fullgraph=True, dynamic=False, backend="eager")
    sessions[1]._compute = compiled
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            token = sessions[0].logits.argmax(-1)
            expected = sessions[0].step(token)
            torch.testing.assert_close(sessions[1].step(token), expected, atol=1e-5, rtol=1e-5)


def test_capture_needs_a_gpu():
    session = DecodeSession(tiny_model(), torch.tensor([[1, 2]]), max_new_tokens=1)
    with pytest.raises(ValueError, match="CUDA"):
        session.capture()


def as_on_a_gpu(session):
    """A session whose step is asked as if its position were on a GPU; every tensor is still here."""
    session.position = SimpleNamespace(device=torch.device("cuda"), is_cpu=False)
    return session


def video_session(**options):
    prompt = torch.tensor([[1, VIDEO, 2]])
    model = tiny_model(options.pop("backend", None)).to(options.pop("dtype", torch.float32))
    videos = [x.to(model.lm_head.weight.dtype) for x in features((4, 4))]
    return as_on_a_gpu(DecodeSession(model, prompt, videos, max_new_tokens=20, **options))


def asked_of_the_model(monkeypatch):
    return video_session(backend="eager").capture_limit()


def asked_by_use_backend(monkeypatch):
    session = video_session()
    with sk.use_backend("eager"):
        return session.capture_limit()


def asked_by_the_environment(monkeypatch):
    session = video_session()
    monkeypatch.setenv("SLOWFAST_BACKEND", "eager")
    return session.capture_limit()


def no_kernel_takes_it(monkeypatch):
    return video_session(dtype=torch.float64).capture_limit()


@pytest.mark.parametrize(
    ("limit_of", "cause"),
    [
        (asked_of_the_model, "asked for by name"),
        (asked_by_use_backend, "asked for by name"),
        (asked_by_the_environment, "asked for by name"),
        (no_kernel_takes_it, r"no other takes torch\.float64 at head dimension 8 here"),
    ],
)
def test_a_step_that_would_run_on_eager_cannot_be_captured(limit_of, cause, monkeypatch):
    monkeypatch.delenv("SLOWFAST_BACKEND", raising=False)
    expected = rf"^got \w+_attention on backend 'eager' \({cause}\), .* want another backend"
    assert re.match(expected, limit_of(monkeypatch))


def test_what_the_model_asks_for_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("SLOWFAST_BACKEND", "eager")
    assert video_session(backend="cpu").capture_limit() is None


@pytest.mark.parametrize("options", [{}, {"backend": "cpu"}, {"backend": "eager", "slow_tokens_in_decode": False}])
def test_nothing_keeps_a_step_of_kernels_or_of_pytorchs_attention_from_capture(options, monkeypatch):
    monkeypatch.delenv("SLOWFAST_BACKEND", raising=False)
    monkeypatch.delenv("SLOWFAST_DEBUG", raising=False)
    assert video_session(**options).capture_limit() is None


def test_a_session_that_attends_in_decode_by_eager_alone_is_limited_by_its_own_cache():
    """Without slow tokens the LM's own cache is left, which ``use_backend`` reaches too."""
    session = video_session(slow_tokens_in_decode=False)
    with sk.use_backend("eager"):
        assert session.capture_limit().startswith("got text_cross_attention on backend 'eager'")


def test_checks_that_read_the_device_keep_a_step_from_capture(monkeypatch):
    session = video_session(backend="cpu")
    monkeypatch.setenv("SLOWFAST_DEBUG", "1")
    assert "SLOWFAST_DEBUG=1" in session.capture_limit()
    with pytest.raises(ValueError, match=r"^capture: got SLOWFAST_DEBUG=1"):
        session.capture()


def test_capture_says_what_keeps_it():
    session = video_session()
    with sk.use_backend("eager"), pytest.raises(ValueError, match=r"^capture: got text_cross_attention on"):
        session.capture()


@pytest.fixture
def captured(monkeypatch):
    """Sessions that ``generate`` asked to capture, each as if it were on a GPU."""
    asked, limit = [], DecodeSession.capture_limit

    def as_if(session):
        position = session.position
        try:
            return limit(as_on_a_gpu(session))
        finally:
            session.position = position

    monkeypatch.delenv("SLOWFAST_BACKEND", raising=False)
    monkeypatch.setattr(DecodeSession, "capture_limit", as_if)
    monkeypatch.setattr(DecodeSession, "is_on_gpu", True)
    monkeypatch.setattr(DecodeSession, "capture", lambda session, compile_step: asked.append(compile_step))
    return asked


@pytest.mark.parametrize(("tokens", "times"), [(15, 0), (16, 1)])
def test_generation_records_its_steps_where_that_pays(tokens, times, captured):
    tiny_model(None).generate(torch.tensor([[1, 2]]), max_new_tokens=tokens)
    assert len(captured) == times


def test_generation_that_cannot_be_recorded_runs_and_says_why(captured):
    model, prompt = tiny_model(None), torch.tensor([[1, 2]])
    expected = model.generate(prompt, max_new_tokens=16, cuda_graph=False)
    with sk.use_backend("eager"), pytest.warns(UserWarning, match=r"without a CUDA graph: got text_cross_attention on"):
        assert torch.equal(model.generate(prompt, max_new_tokens=16), expected)
    assert not captured


def test_generation_by_a_model_of_eager_says_nothing(captured, recwarn):
    tiny_model("eager").generate(torch.tensor([[1, VIDEO, 2]]), features((4, 4)), max_new_tokens=16)
    assert not captured
    assert not recwarn.list


def test_capture_needs_a_step_to_record():
    session = DecodeSession(tiny_model(), torch.tensor([[1, 2]]), max_new_tokens=0)
    with pytest.raises(ValueError, match="capture: got a session at its end"):
        session.capture()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_captured_step_gives_the_same_logits(dtype):
    model = tiny_model(None, "cuda").to(dtype)
    ids, videos, mask = batch("cuda")
    videos = [x.to(dtype) for x in videos]
    plain, captured = (DecodeSession(model, ids, videos, mask, max_new_tokens=8) for _ in range(2))
    captured.capture()
    token = plain.logits.argmax(-1)
    for _ in range(8):
        expected = plain.step(token).clone()
        assert torch.equal(captured.step(token), expected)
        token = expected.argmax(-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@torch.no_grad()
def test_generation_by_graph_gives_the_same_ids():
    model = tiny_model(None, "cuda")
    prompt = batch("cuda")
    plain, graph = (model.generate(*prompt, max_new_tokens=20, cuda_graph=choice) for choice in (False, True))
    assert torch.equal(plain, graph)


# ------------------------------------------------------------------------------------------ ending and sampling


@torch.no_grad()
def test_a_sample_that_ends_repeats_its_end_and_the_rest_go_on():
    model = tiny_model()
    ids, videos, mask = batch()
    free = model.generate(ids, videos, mask, max_new_tokens=8)
    end = int(free[1, 2])
    ended = model.generate(ids, videos, mask, max_new_tokens=8, eos_token_id=end)
    for row, full in zip(ended.tolist(), free.tolist(), strict=True):
        stop = full.index(end) if end in full else len(full)
        assert row[:stop] == full[:stop][: len(row)]
        assert set(row[stop:]) <= {end}


@torch.no_grad()
def test_of_several_ends_the_first_fills_the_rows_that_have_ended():
    model = tiny_model()
    ids, videos, mask = batch()
    free = model.generate(ids, videos, mask, max_new_tokens=6)
    first = next(i for i in range(61) if i not in free)  # an end that nothing generates
    end = int(free[1, 1])
    ended = model.generate(ids, videos, mask, max_new_tokens=6, eos_token_id=[first, end])[1].tolist()
    stop = free[1].tolist().index(end)
    assert ended == [*free[1, : stop + 1].tolist(), *[first] * (len(ended) - stop - 1)]
    assert first in ended


@torch.no_grad()
def test_generation_stops_when_every_sample_has_ended():
    model = tiny_model()
    prompt = torch.tensor([[1, 2, 3]])
    free = model.generate(prompt, max_new_tokens=6)[0].tolist()
    ended = model.generate(prompt, max_new_tokens=6, eos_token_id=[60, free[1]])[0].tolist()
    assert ended == free[: free.index(free[1]) + 1]


@torch.no_grad()
def test_sampling_follows_the_generator(seed):
    model = tiny_model()
    ids, videos, mask = batch()

    def draw(number):
        generator = torch.Generator().manual_seed(number)
        return model.generate(
            ids, videos, mask, max_new_tokens=12, do_sample=True, temperature=5.0, generator=generator
        )

    assert torch.equal(draw(seed), draw(seed))
    assert not torch.equal(draw(seed), draw(seed + 1))


@torch.no_grad()
@pytest.mark.parametrize("option", [{"temperature": 1e-4}, {"top_p": 1e-6}])
def test_cold_or_narrow_sampling_is_greedy(option):
    model = tiny_model()
    ids, videos, mask = batch()
    greedy = model.generate(ids, videos, mask, max_new_tokens=6)
    assert torch.equal(model.generate(ids, videos, mask, max_new_tokens=6, do_sample=True, **option), greedy)


def test_top_p_draws_from_the_fewest_tokens_that_reach_it(rng):
    probs = torch.tensor([0.4, 0.05, 0.3, 0.25])
    draws = sample(probs.log().expand(4000, -1), 1.0, 0.65, rng())
    share = draws.bincount(minlength=4) / 4000
    torch.testing.assert_close(share, torch.tensor([4 / 7, 0, 3 / 7, 0]), atol=0.05, rtol=0)


def test_temperature_sharpens_the_distribution(rng):
    draws = sample(torch.tensor([1.0, 0.0]).expand(4000, -1), 0.5, 1.0, rng())
    assert abs(draws.float().mean().item() - 1 / (1 + torch.tensor(2.0).exp().item())) < 0.05


@pytest.mark.parametrize(
    "option",
    [{"max_new_tokens": 0}, {"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}],
    ids=lambda option: "-".join(map(str, *option.items())),
)
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        tiny_model().generate(torch.tensor([[1, 2]]), **{"max_new_tokens": 2, "do_sample": True} | option)
