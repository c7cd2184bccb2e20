"""Which id comes next: every option of generate means what it means in transformers, and a bad one is named."""

from __future__ import annotations

import fractions
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_cases import (  # noqa: F401
    PROMPT_VIDEOS,
    PROMPTS,
    VIDEO,
    features,
    one_thread,
    padded,
    tiny_model,
)
from torch.utils._python_dispatch import TorchDispatchMode

from slowfast_model import DecodeSession, SlowFastConfig, SlowFastForCausalLM
from slowfast_model.sampling import Choice, penalise, prompt_ids_seen, sample

transformers = pytest.importorskip("transformers")
PROMPT = torch.tensor([[1, VIDEO, 2, 3]])
TEXT = torch.tensor([[3, 4, 5, 6, 7, 8]])


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def generated(model, ids=PROMPT, **options):
    videos = features((4, 4)) if VIDEO in ids else None
    return model.generate(ids, videos, **{"max_new_tokens": 6} | options)


def batch():
    ids, mask = padded(PROMPTS)
    return ids, features(*PROMPT_VIDEOS), mask


# ------------------------------------------------------------------------------------------ against transformers


def hf_warped(logits, temperature, top_k, top_p):
    """transformers' own classes, in the order in which its generate applies them."""
    if temperature is not None:
        logits = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        logits = transformers.TopKLogitsWarper(top_k)(None, logits)
    if top_p is not None:
        logits = transformers.TopPLogitsWarper(top_p)(None, logits)
    return logits


@pytest.mark.parametrize("temperature", [None, 0.2, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.8, 1.0])
def test_draws_are_those_of_transformers_warpers_from_the_same_seed(temperature, top_k, top_p, seed, rng):
    logits = 3 * torch.randn(64, 50, generator=rng())
    probs = hf_warped(logits, temperature, top_k, top_p).softmax(-1)
    expected = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    drawn = sample(logits, temperature, top_p, torch.Generator().manual_seed(seed), top_k=top_k)
    assert torch.equal(drawn, expected)


def test_top_k_cuts_before_top_p(rng):
    """Of the two most likely, 0.5 and 0.3, the first alone has 0.625 of what is left; of all it has 0.5."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(500, -1)
    assert sample(logits, top_p=0.6, generator=rng(), top_k=2).unique().tolist() == [0]
    assert sample(logits, top_p=0.6, generator=rng()).unique().tolist() == [0, 1]


def test_top_k_keeps_tokens_as_likely_as_the_last_that_it_keeps(rng):
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0]).expand(500, -1)
    assert sample(logits, generator=rng(), top_k=2).unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("top_p", [1e-9, 1e-20, 5e-324])
def test_a_top_p_too_small_for_any_token_keeps_the_most_likely(top_p, rng):
    logits = torch.randn(20, 30, generator=rng())
    assert torch.equal(sample(logits, top_p=top_p, generator=rng()), logits.argmax(-1))


def test_the_penalty_is_that_of_transformers(rng):
    logits = torch.randn(3, 20, generator=rng())
    ids = torch.tensor([[1, 1, 5], [0, 19, 2], [7, 7, 7]])
    seen = torch.zeros(3, 20, dtype=torch.bool).scatter_(1, ids, True)
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    assert torch.equal(penalise(logits, seen, 1.7), expected)


SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def twins():
    """transformers' Qwen2 and ours, of the same weights."""
    torch.manual_seed(3)
    hf = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    ours = SlowFastForCausalLM(SlowFastConfig.from_official(hf.config.to_dict()), backend="eager").eval()
    ours.load_official_state_dict(hf.state_dict())
    return hf, ours


def hf_ids(hf, **options):
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0} | options
    return hf.generate(TEXT, attention_mask=torch.ones_like(TEXT), **options)[:, TEXT.shape[1] :].tolist()


@pytest.mark.parametrize("penalty", [None, 1.0, 1.2, 3.0, 0.7])
@pytest.mark.parametrize("min_new_tokens", [None, 0, 5])
def test_greedy_ids_of_a_text_are_those_of_transformers_generate(twins, penalty, min_new_tokens):
    hf, ours = twins
    options = {"repetition_penalty": penalty, "min_new_tokens": min_new_tokens}
    free = hf_ids(hf, **options)[0]
    for end in (None, free[2], free[8], [free[4], free[7]]):
        ids = ours.generate(TEXT, max_new_tokens=16, eos_token_id=end, **options)
        assert ids.tolist() == hf_ids(hf, eos_token_id=end, **options)


@pytest.mark.parametrize(
    "options",
    [{"top_k": 0}, {"top_k": 5}, {"top_k": 0, "top_p": 0.7}, {"temperature": 3.0, "top_k": 9, "top_p": 0.9}],
    ids=str,
)
def test_sampled_ids_are_those_of_transformers_generate_from_the_same_seed(twins, options, seed):
    hf, ours = twins
    options = {"do_sample": True, "repetition_penalty": 1.3} | options
    torch.manual_seed(seed)
    expected = hf_ids(hf, **options)
    torch.manual_seed(seed)
    assert ours.generate(TEXT, max_new_tokens=16, **options).tolist() == expected


# ------------------------------------------------------------------------------------------ what a penalty covers


def penalised_by_hand(model, prompt, videos, steps, penalty, seen=()):
    """Greedy ids from runs of the whole sequence; ``seen`` counts from the start, and every generated id."""
    prompt, new = list(prompt), []
    for _ in range(steps):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + new]), videos).logits[:, -1]
        ids = torch.tensor([[*seen, *new]], dtype=torch.int64)
        logits = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
        new.append(int(logits.argmax()))
    return new


def test_the_penalty_of_a_prompt_with_a_video_covers_generated_ids_only(model):
    """As released: such a prompt is embeddings, of which the penalty sees no ids."""
    expected = penalised_by_hand(model, PROMPT[0].tolist(), features((4, 4)), 12, 2.5)
    assert generated(model, max_new_tokens=12, repetition_penalty=2.5).tolist() == [expected]


def test_a_batch_is_penalised_as_its_samples_are_one_by_one(model):
    ids, videos, mask = batch()
    options = {"max_new_tokens": 10, "repetition_penalty": 4.0}
    together = model.generate(ids, videos, mask, **options).tolist()
    left, left_mask = padded(PROMPTS, "left")
    assert model.generate(left, videos, left_mask, **options).tolist() == together
    for prompt, mine, row in zip(PROMPTS, (videos[:2], None, videos[2:]), together, strict=True):
        assert model.generate(torch.tensor([prompt]), mine, **options).tolist() == [row]
        assert row == penalised_by_hand(model, prompt, mine, 10, 4.0, () if VIDEO in prompt else prompt)


def test_a_penalty_takes_effect_and_one_is_none(model):
    plain = generated(model, max_new_tokens=20)
    assert torch.equal(generated(model, max_new_tokens=20, repetition_penalty=1), plain)
    strict = generated(model, max_new_tokens=20, repetition_penalty=1e6)
    assert not torch.equal(strict, plain)
    assert len(set(strict[0].tolist())) > len(set(plain[0].tolist()))


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.uint8])
def test_neither_padding_nor_prompts_with_a_video_are_seen(kind):
    ids = torch.tensor([[0, 0, 5, 6], [5, VIDEO, 6, 7], [VIDEO, 8, 8, 9]], dtype=torch.int32)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]).to(kind)
    seen = prompt_ids_seen(ids, mask, 10)
    assert [row.nonzero().flatten().tolist() for row in seen] == [[5, 6], [], [8, 9]]
    assert prompt_ids_seen(ids[:1], None, 6)[0].nonzero().flatten().tolist() == [0, 5]  # a head smaller than the ids


class NoReadBack(TorchDispatchMode):
    """Fails at an operator that waits for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "_unique2", "item", "equal"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("do_sample", [False, True])
def test_choosing_an_id_never_waits_for_the_device(do_sample, rng):
    options = {"temperature": 0.5, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2, "min_new_tokens": 3}
    choice = Choice.checked(do_sample=do_sample, eos_token_id=[1, 2], generator=rng(), max_new_tokens=8, **options)
    seen, ends = torch.zeros(2, 30, dtype=torch.bool), torch.tensor([1, 2])
    logits = torch.randn(2, 30)
    with NoReadBack():
        assert choice.next(logits, seen, ends, 0).shape == (2,)


def test_logits_of_the_session_are_left_as_they_are(rng):
    logits = torch.randn(2, 30, generator=rng())
    before = logits.clone()
    choice = Choice(True, 0.5, 5, 0.9, 1.2, 3, (1, 2), rng())
    choice.next(logits, torch.ones(2, 30, dtype=torch.bool), torch.tensor([1, 2]), 0)
    assert torch.equal(logits, before)


# ------------------------------------------------------------------------------------------ off


@pytest.mark.parametrize(
    "ignored",
    [
        {"temperature": 0},
        {"temperature": 0.0, "top_p": None},
        {"temperature": None, "top_p": None, "top_k": None},
        {"temperature": 0, "top_k": 0, "top_p": 0},
        {"temperature": float("nan"), "top_p": 7, "top_k": -3},
        {"temperature": "cold", "top_p": True, "top_k": 2.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("do_sample", [False, None])
def test_what_shapes_the_distribution_is_not_read_without_sampling(model, ignored, do_sample):
    assert torch.equal(generated(model, do_sample=do_sample, **ignored), generated(model))


@pytest.mark.parametrize(
    "off",
    [
        {"temperature": None, "top_p": None, "top_k": None, "repetition_penalty": None, "min_new_tokens": None},
        {"temperature": 1, "top_p": 1, "top_k": 0, "repetition_penalty": 1, "min_new_tokens": 0},
        {"top_k": 61},
        {"top_k": 10**30},
    ],
    ids=str,
)
def test_an_option_that_is_off_changes_no_draw(model, off, seed):
    plain, same = (
        generated(model, do_sample=True, generator=torch.Generator().manual_seed(seed), **options)
        for options in ({}, off)
    )
    assert torch.equal(same, plain)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-40, 5e-324])
def test_sampling_near_zero_temperature_is_greedy(model, temperature):
    assert torch.equal(generated(model, do_sample=True, temperature=temperature), generated(model))


@pytest.mark.parametrize("temperature", [1e38, 1e39, 1e308])
def test_at_any_temperature_what_is_ruled_out_stays_so(temperature, rng):
    logits = torch.tensor([5.0, -torch.inf, 0.0, -5.0]).expand(500, -1)
    assert sample(logits, temperature, generator=rng()).unique().tolist() == [0, 2, 3]


# ------------------------------------------------------------------------------------------ ends


END_FORMS = {
    "int": int,
    "numpy integer": np.int64,
    "narrow integer": np.uint8,
    "0-d array": np.array,
    "0-d tensor": torch.tensor,
    "list": lambda i: [i, 60],
    "tuple": lambda i: (i,),
    "set": lambda i: {i},
    "range": lambda i: range(i, i + 1),
    "array": lambda i: np.array([i]),
    "tensor": lambda i: torch.tensor([i, i]),
    "int32 tensor": lambda i: torch.tensor([i], dtype=torch.int32),
    "list of tensors": lambda i: [torch.tensor(i)],
}


@pytest.mark.parametrize("form", END_FORMS)
def test_an_end_may_be_any_integer_or_a_collection_of_them(model, form):
    free = generated(model)[0].tolist()
    ended = generated(model, eos_token_id=END_FORMS[form](free[1]))[0].tolist()
    assert ended == free[: free.index(free[1]) + 1]


@pytest.mark.parametrize("never", [None, [], (), set(), np.array([], dtype=np.int64), torch.tensor([]), 61, 2**40])
def test_without_an_end_that_can_come_generation_takes_every_token(model, never):
    assert torch.equal(generated(model, eos_token_id=never), generated(model))


def test_what_follows_an_end_is_an_id_of_the_vocabulary(model):
    ids, videos, mask = batch()
    free = model.generate(ids, videos, mask, max_new_tokens=8)
    end = int(free[1, 2])
    ended = model.generate(ids, videos, mask, max_new_tokens=8, eos_token_id=[10**9, end])
    assert torch.equal(ended, model.generate(ids, videos, mask, max_new_tokens=8, eos_token_id=end))


def test_no_end_comes_before_min_new_tokens(model):
    free = generated(model)[0].tolist()
    ids = generated(model, eos_token_id=free[0], min_new_tokens=4)[0].tolist()
    assert free[0] not in ids[:4]
    assert generated(model, eos_token_id=free[0], min_new_tokens=0)[0].tolist() == free[:1]


# ------------------------------------------------------------------------------------------ bad values


BAD = {
    "max_new_tokens": [0, -1, 4.0, "4", True, None, float("nan"), torch.tensor([4]), torch.tensor(4.0)],
    "min_new_tokens": [-1, 7, 2.0, "2", True, float("nan")],
    "repetition_penalty": [0, -1.2, float("nan"), float("inf"), True, "1.2", [1.2], torch.tensor([1.2])],
    "eos_token_id": [-1, 2.0, True, "5", b"5", [5, "6"], [[5]], [None], torch.tensor(2.0), torch.tensor([True])],
    "temperature": [0, -1, float("nan"), float("inf"), True, "1", 1j, [1.0]],
    "top_k": [-1, 2.0, True, "5", float("nan"), [5]],
    "top_p": [0, -0.1, 1.01, float("nan"), True, "0.5", [0.5]],
    "do_sample": ["false", "", 2, 0.0, [True]],
    "slow_tokens_in_decode": ["no", None, 2],
    "cuda_graph": ["yes", 2],
    "compile_step": ["yes", None],
    "generator": [3, "cpu"],
    "streamer": [3, "stdout", SimpleNamespace(), print],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values], ids=repr
)
def test_a_bad_value_is_refused_by_name(model, name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got "):
        generated(model, **{"do_sample": True} | {name: value})


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array, torch.tensor], ids=["int64", "uint8", "0-d", "tensor"])
def test_numbers_may_be_numpys_or_tensors_without_a_dimension(model, kind):
    options = {"top_k": 3, "min_new_tokens": 2, "max_new_tokens": 5}
    floats = {"temperature": 2.0, "top_p": 0.9, "repetition_penalty": 1.5}
    plain, same = (
        generated(model, do_sample=sampling, generator=torch.Generator().manual_seed(5), **numbers)
        for sampling, numbers in (
            (True, options | floats),
            (
                np.bool_(True),
                {k: kind(v) for k, v in options.items()} | {k: torch.tensor(v).double() for k, v in floats.items()},
            ),
        )
    )
    assert plain.shape == (1, 5)
    assert torch.equal(same, plain)


def test_a_temperature_may_be_any_real_number(model):
    assert torch.equal(generated(model, do_sample=True, temperature=fractions.Fraction(1, 10**6)), generated(model))


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_the_callers_numbers_are_neither_changed_nor_kept(model, kind):
    count, ends = kind(4), [50]
    generated(model, max_new_tokens=count, eos_token_id=ends)
    assert int(count) == 4
    assert ends == [50]
    session = DecodeSession(model, PROMPT, features((4, 4)), max_new_tokens=count)
    count -= 4
    for _ in range(4):
        session.step(torch.tensor([3]))
    assert session.steps_left == 0
    assert int(count) == 0


# ------------------------------------------------------------------------------------------ streamers


class Recorder:
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        assert not self.ended
        assert value.device.type == "cpu"
        assert value.dtype == torch.int64
        self.values.append(value.tolist())
        value.fill_(-1)  # theirs to keep

    def end(self):
        self.ended += 1


@pytest.mark.parametrize(
    ("prompt", "text"),
    [([5, 6, 7], [5, 6, 7]), ([5, VIDEO, 6, 7], [5, 6, 7]), ([VIDEO], [])],
    ids=["text", "video", "video alone"],
)
def test_a_streamer_gets_the_prompts_text_then_every_id_then_the_end(model, prompt, text):
    ids = torch.tensor([prompt])
    expected, streamer = generated(model, ids), Recorder()
    assert torch.equal(generated(model, ids, streamer=streamer), expected)
    assert streamer.values == [[text], *([i] for i in expected[0].tolist())]
    assert streamer.ended == 1


def test_padding_is_not_streamed(model):
    streamer = Recorder()
    ids, mask = torch.tensor([[0, 0, 5, 6]], dtype=torch.int32), torch.tensor([[0, 0, 1, 1]])
    model.generate(ids, None, mask, max_new_tokens=2, streamer=streamer)
    assert streamer.values[0] == [[5, 6]]


def test_the_end_is_streamed_too(model):
    first, streamer = int(generated(model)[0, 0]), Recorder()
    generated(model, eos_token_id=first, streamer=streamer)
    assert streamer.values[1:] == [[first]]
    assert streamer.ended == 1


class Words:
    """A tokenizer of words that are their ids, as far as a streamer needs one."""

    def decode(self, ids, **options):
        ids = ids if isinstance(ids, list) else [ids]
        assert min(ids, default=0) >= 0
        return "".join(f"{i} " for i in ids)


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_transformers_text_streamer_prints_the_answer(model, skip_prompt, capsys):
    ids = generated(model, streamer=transformers.TextStreamer(Words(), skip_prompt=skip_prompt))[0].tolist()
    prompt = [] if skip_prompt else [1, 2, 3]
    assert capsys.readouterr().out.split() == [str(i) for i in prompt + ids]


def test_a_streamer_follows_one_prompt(model):
    with pytest.raises(ValueError, match="streamer: got a batch of 3"):
        model.generate(*batch(), max_new_tokens=2, streamer=Recorder())
