"""transformers' own generate in all of its modes: each gives what recomputation from the ids gives."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import (
    FAMILIES,
    PAD,
    VIDEO,
    VOCABULARY,
    batch,
    close,
    close_gates,
    language_model,
    open_gates,
    prompt,
    slow_fast_model,
    twin,
    video,
)
from transformers import DynamicCache, StaticCache, StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from slowfast_model import PatchTower, encode_frames
from slowfast_model.hf import add_slow_fast
from slowfast_model.hf._versions import CACHE

every_family = pytest.mark.parametrize("family", FAMILIES)
NEW = 6
GREEDY = {"do_sample": False, "max_new_tokens": NEW}


def recomputed(model, ids: list[int], features, count: int = NEW, processed=None) -> list[int]:
    """Greedy ids of one prompt, from scratch for every token, without a cache."""
    ids, start = list(ids), len(ids)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), video_features=features or None, use_cache=False).logits[0, -1]
        logits[VIDEO] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[start:]


def new_ids(model, inputs, **options) -> list[list[int]]:
    out = model.generate(**inputs, pad_token_id=PAD, **options)
    out = out if isinstance(out, torch.Tensor) else out.sequences
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def samples(model):
    """Prompts of one video, none and two; their videos; a left-padded batch."""
    videos = [[video(8)], [], [video(3), video(4)]]
    rows = [
        prompt(model, 3, videos[0][0], 4),
        prompt(model, 5),
        prompt(model, 1, videos[2][0], 2, videos[2][1], 2),
    ]
    return rows, videos, batch(rows)


@every_family
@pytest.mark.parametrize("causal", [False, True], ids=["all videos", "causal"])
def test_greedy_in_a_batch_is_each_prompt_recomputed(family, causal):
    model = slow_fast_model(family, causal_slow_tokens=causal)
    rows, videos, inputs = samples(model)
    features = [x for own in videos for x in own]
    want = [recomputed(model, row, own) for row, own in zip(rows, videos, strict=True)]
    assert new_ids(model, inputs, video_features=features, **GREEDY) == want
    assert new_ids(model, inputs, video_features=features, use_cache=False, **GREEDY) == want


@every_family
def test_slow_tokens_change_what_is_generated(family):
    model = slow_fast_model(family)
    _, videos, inputs = samples(model)
    features = [x for own in videos for x in own]
    got = new_ids(model, inputs, video_features=features, **GREEDY)
    close_gates(model)
    assert new_ids(model, inputs, video_features=features, **GREEDY) != got


@every_family
@pytest.mark.parametrize("kind", ["static", "dynamic", "dynamic_full", "users dynamic", "users static"])
def test_every_cache_gives_the_ids_of_recomputation(family, kind):
    model = slow_fast_model(family)
    rows, videos, inputs = samples(model)
    features = [x for own in videos for x in own]
    want = [recomputed(model, row, own) for row, own in zip(rows, videos, strict=True)]
    options = {"cache_implementation": kind}
    config = model.config.text_config
    if kind == "dynamic_full":
        options = {CACHE: DynamicCache()}  # no sliding layers
    if kind == "users dynamic":
        options = {CACHE: DynamicCache(config=config)}
    if kind == "users static":
        options = {CACHE: StaticCache(config, max_cache_len=inputs["input_ids"].shape[1] + NEW + 3)}
    assert new_ids(model, inputs, video_features=features, **options, **GREEDY) == want
    # 4.57 keeps its static cache for the next call, which must not see this one's videos
    if kind == "static":
        text = batch([prompt(model, 4), prompt(model, 7), prompt(model, 2)])
        alone = [recomputed(model, row[mask.bool()].tolist(), None) for row, mask in zip(*text.values(), strict=True)]
        assert new_ids(model, text, **options, **GREEDY) == alone


@every_family
def test_text_alone_generates_as_the_base_model_does(family):
    lm = language_model(family)
    base = twin(lm)
    model = slow_fast_model(lm=lm)
    text = batch([prompt(model, 4), prompt(model, 7)])
    want = base.generate(**text, **GREEDY, pad_token_id=PAD, suppress_tokens=[VIDEO])
    assert torch.equal(model.generate(**text, **GREEDY, pad_token_id=PAD), want)


class Rounded(QuantizedLayer):
    """transformers' quantised layer with the simplest of roundings: 8 bits, a scale a row."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, quantised):
        values, scale = quantised
        return values * scale


def quantised(backend: str, model) -> dict:
    """What ``generate`` is given for a cache of a backend, which must be installed."""
    if backend == "own layers":
        layers = [Rounded(residual_length=4) for _ in range(model.config.text_config.num_hidden_layers)]
        return {CACHE: Cache(layers=layers)}
    absent = {
        "quanto": not is_optimum_quanto_available() and "optimum-quanto is not installed",
        "hqq": not is_hqq_available() and "hqq is not installed",
        "fp8": not hasattr(transformers.cache_utils, "Fp8QuantizedLayer") and "transformers 4.57 has no fp8 cache",
    }[backend]
    if absent:
        pytest.skip(absent)
    groups = {"nbits": 4, "q_group_size": 16, "residual_length": 4}
    settings = {"quanto": groups, "hqq": groups | {"axis_key": 1, "axis_value": 1}, "fp8": {}}[backend]
    return {"cache_implementation": "quantized", "cache_config": {"backend": backend, **settings}}


@pytest.mark.parametrize("backend", ["own layers", "quanto", "hqq", "fp8"])
def test_a_quantised_cache_keeps_the_slow_tokens_exact(backend):
    """A step over its rounded rows is one over those rows in a dynamic cache, whose slow tokens are the same."""
    model = slow_fast_model()
    _, videos, inputs = samples(model)
    given = {"video_features": [x for own in videos for x in own]}
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": PAD}
    cache = getattr(model.generate(**inputs, **given, **options, **quantised(backend, model)), CACHE)
    exact = getattr(model.generate(**inputs, **given, **options), CACHE)
    assert all(torch.equal(cache.videos.kv[index], kv) for index, kv in exact.videos.kv.items())

    def step(behind):
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
        with torch.no_grad():
            return model(torch.tensor([[5], [6], [7]]), mask, **{CACHE: behind}).logits

    rounded = []
    for layer in cache.layers:
        layer.update = lambda *x, update=layer.update, **y: rounded.append(update(*x, **y)) or rounded[-1]
    got = step(cache)
    for layer, (keys, values) in zip(exact.layers, rounded, strict=True):
        assert not torch.equal(keys[:, :, :-1], layer.keys)
        layer.update = lambda *_, keys=keys, values=values, **__: (keys, values)
    close(got, step(exact))
    exact.videos = None
    assert ((got - step(exact)).abs().amax((1, 2)) > 1e-3).tolist() == [True, False, True]


# ---------------------------------------------------------------------------------------------------------- modes


@every_family
@pytest.mark.parametrize("cache", [None, "static"])
def test_beams_give_what_they_give_without_a_cache(family, cache):
    model = slow_fast_model(family)
    rows, videos, inputs = samples(model)
    features = [x for own in videos for x in own]
    options = {"num_beams": 4, "num_return_sequences": 2, **GREEDY}
    want = new_ids(model, inputs, video_features=features, use_cache=False, **options)
    got = new_ids(model, inputs, video_features=features, cache_implementation=cache, **options)
    assert got == want
    assert len(got) == 6
    alone = new_ids(model, batch(rows[2:]), video_features=videos[2], **options)
    assert got[4:] == alone


@every_family
def test_returned_sequences_are_drawn_as_without_a_cache(family):
    model = slow_fast_model(family)
    _, videos, inputs = samples(model)
    features = [x for own in videos for x in own]
    options = {"do_sample": True, "temperature": 0.7, "top_k": 20, "num_return_sequences": 3, "max_new_tokens": NEW}
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        drawn.append(new_ids(model, inputs, video_features=features, use_cache=use_cache, **options))
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 9
    assert len({tuple(row) for row in drawn[0][:3]}) > 1


def test_a_tensor_of_features_serves_beams_too():
    model = slow_fast_model()
    features = torch.stack([video(), video()])
    inputs = batch([prompt(model, 3, features[0], 4), prompt(model, features[1], 2)])
    options = {"num_beams": 3, **GREEDY}
    want = new_ids(model, inputs, video_features=list(features), **options)
    assert new_ids(model, inputs, video_features=features, **options) == want


@every_family
@pytest.mark.parametrize("draft", ["plain", "slow-fast", "itself"])
def test_a_draft_model_changes_nothing(family, draft):
    model = slow_fast_model(family)
    row = prompt(model, 3, features := video(), 4)
    want = recomputed(model, row, [features], 10)
    if draft == "plain":
        assistant = language_model(family)
    elif draft == "slow-fast":
        assistant = slow_fast_model(family, hybrid_layers=(1,))
    else:
        assistant = twin(model)
    options = {"do_sample": False, "max_new_tokens": 10}
    got = new_ids(model, batch([row]), video_features=[features], assistant_model=assistant, **options)
    assert got == [want]


def test_a_draft_of_the_models_own_first_layers_changes_nothing():
    model = slow_fast_model()
    row = prompt(model, 3, features := video(), 4)
    want = recomputed(model, row, [features], 10)
    options = {"do_sample": False, "max_new_tokens": 10, "assistant_early_exit": 2}
    reads = []
    model.hybrid_attentions()[0].cross_attn_kv_proj.register_forward_hook(lambda *_: reads.append(1))
    assert new_ids(model, batch([row]), video_features=[features], **options) == [want]
    assert len(reads) == 2  # the draft once, the model once


def test_a_draft_that_reads_the_video_is_accepted_as_a_whole():
    """Every proposal of a draft equal to the model is right if it has the slow tokens in every round."""
    model = slow_fast_model()
    row = prompt(model, 3, features := video(), 4)
    calls = []
    model.language_model.register_forward_hook(lambda *_: calls.append(1))
    assistant = twin(model)
    assistant.language_model._forward_hooks.clear()
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    options = {"do_sample": False, "max_new_tokens": 15, "assistant_model": assistant}
    new_ids(model, batch([row]), video_features=[features], **options)
    assert len(calls) <= 4


@every_family
def test_prompt_lookup_changes_nothing(family):
    model = slow_fast_model(family)
    row = prompt(model, 3, features := video(), 4)
    row += row[-4:] + row[:3]  # something to look up: what the last token was followed by is the video
    want = recomputed(model, row, [features], 10)
    options = {"do_sample": False, "max_new_tokens": 10, "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    options["eos_token_id"] = VIDEO  # never comes; 4.57 needs one
    (got,) = new_ids(model, batch([row]), video_features=[features], **options)
    assert got[:10] == want
    assert len(got) <= 11  # 4.57 may look up one more than was asked for, for any language model


@every_family
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_from_embeddings_is_that_from_ids(family, cache):
    model = slow_fast_model(family)
    _, videos, inputs = samples(model)
    features = [x for own in videos for x in own]
    want = new_ids(model, inputs, video_features=features, **GREEDY)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    options = {"attention_mask": inputs["attention_mask"], "video_features": features, "pad_token_id": PAD}
    got = model.generate(inputs_embeds=embeddings, cache_implementation=cache, **options, **GREEDY)
    assert got.tolist() == want
    beams = {"num_beams": 2, **GREEDY}
    got = model.generate(inputs_embeds=embeddings, **options, **beams)
    assert got.tolist() == new_ids(model, inputs, video_features=features, **beams)


def test_a_streamer_is_told_every_token():
    class Seen(TextStreamer):
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ended = True

    model = slow_fast_model()
    row = prompt(model, 3, features := video(), 4)
    streamer = Seen()
    got = new_ids(model, batch([row]), video_features=[features], streamer=streamer, **GREEDY)
    assert streamer.ids == row + got[0]
    assert streamer.ended


def test_stopping_criteria_stop():
    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)

    model = slow_fast_model()
    row = prompt(model, 3, features := video(), 4)
    stop = After()
    stop.length = len(row) + 2
    options = {"video_features": [features], "stopping_criteria": StoppingCriteriaList([stop])}
    want = new_ids(model, batch([row]), video_features=[features], **GREEDY)
    assert new_ids(model, batch([row]), **options, **GREEDY) == [want[0][:2]]
    first_end = {"eos_token_id": want[0][0]}
    assert new_ids(model, batch([row]), video_features=[features], **first_end, **GREEDY) == [want[0][:1]]


@every_family
def test_scores_logits_and_hidden_states_are_those_of_recomputation(family):
    model = slow_fast_model(family)
    row = prompt(model, 3, features := video(), 4)
    flags = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    out = model.generate(**batch([row]), video_features=[features], return_dict_in_generate=True, **flags, **GREEDY)
    with torch.no_grad():
        whole = model(out.sequences[:, :-1], video_features=[features], output_hidden_states=True)
    close(torch.stack(out.logits, 1), whole.logits[:, len(row) - 1 :], 1e-4)
    scores = torch.stack(out.scores, 1)
    assert torch.isneginf(scores[..., VIDEO]).all()
    close(scores[..., :VIDEO], whole.logits[:, len(row) - 1 :, :VIDEO], 1e-4)
    last = torch.cat([step[-1][:, -1:] for step in out.hidden_states], 1)
    close(last, whole.hidden_states[-1][:, len(row) - 1 :], 1e-4)
    transitions = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert transitions.shape == (1, NEW)


def test_the_placeholder_is_never_generated():
    model = slow_fast_model()
    features = video()
    with torch.no_grad():
        model.get_output_embeddings().weight[VIDEO] *= 50  # the most likely of all, or the least
    rows = [prompt(model, 3, features, n) for n in (1, 2, 3)]
    for options in (GREEDY, {"do_sample": True, "top_k": 1, "max_new_tokens": NEW}, {"num_beams": 3, **GREEDY}):
        got = new_ids(model, batch(rows), video_features=[features] * 3, **options)
        assert not any(VIDEO in row for row in got)
        assert all(0 <= token < VOCABULARY for row in got for token in row)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_another_attention_may_be_chosen_after_the_plug_in(attention):
    model = slow_fast_model()
    row = prompt(model, 3, features := video(), 4)
    want = recomputed(model, row, [features])
    model.set_attn_implementation(attention)
    assert {a.config._attn_implementation for a in model.hybrid_attentions()} == {attention}
    assert recomputed(model, row, [features]) == want
    if attention != "flex_attention":
        assert new_ids(model, batch([row]), video_features=[features], **GREEDY) == [want]


def test_attentions_are_the_language_models():
    model = slow_fast_model()
    model.set_attn_implementation("eager")
    row = prompt(model, 3, features := video(), 4)
    with torch.no_grad():
        out = model(torch.tensor([row]), video_features=[features], output_attentions=True)
    assert len(out.attentions) == 3
    assert all(x.shape == (1, 4, len(row), len(row)) for x in out.attentions)


def test_frames_are_read_by_the_models_tower():
    lm = language_model()
    model = open_gates(add_slow_fast(lm, 12, (0, 2), vision_tower=PatchTower(12, grid=4), video_token_id=VIDEO))
    frames = [torch.randint(256, (4, 30, 40, 3), dtype=torch.uint8) for _ in range(2)]
    features = [encode_frames(model.vision_tower, x) for x in frames]
    rows = [prompt(model, 3, features[0], 4), prompt(model, 1, features[1], 2)]
    want = new_ids(model, batch(rows), video_features=features, **GREEDY)
    assert new_ids(model, batch(rows), pixel_values_videos=frames, **GREEDY) == want
    assert new_ids(model, batch(rows), pixel_values_videos=torch.stack(frames), num_beams=2, **GREEDY) == new_ids(
        model, batch(rows), video_features=features, num_beams=2, **GREEDY
    )


def test_the_transformers_under_test_is_one_that_is_supported():
    major, minor = map(int, transformers.__version__.split(".")[:2])
    assert (major, minor) >= (4, 57)
