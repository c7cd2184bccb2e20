"""Later turns of a conversation on the cache of the first, and what is done to a cache: the videos follow it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import FAMILIES, PAD, VIDEO, batch, close, language_model, prompt, slow_fast_model, video
from test_generate import GREEDY, recomputed
from transformers import DynamicCache, StaticCache

from slowfast_model.hf._versions import CACHE, OTHER_CACHE
from slowfast_model.hf.videos import held_by

every_family = pytest.mark.parametrize("family", FAMILIES)


def first_turn(model, rows, features, cache=None):
    """(ids [B, L] and mask of the conversation so far, its cache)."""
    inputs = batch(rows)
    given = {} if cache is None else {CACHE: cache}
    out = model.generate(
        **inputs, video_features=features, pad_token_id=PAD, return_dict_in_generate=True, **given, **GREEDY
    )
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(rows), GREEDY["max_new_tokens"], dtype=torch.long)], 1)
    return out.sequences, mask, getattr(out, CACHE)


def second_turn(model, ids, mask, rows, features, cache, name=CACHE):
    """New ids of the second turn, of which ``rows`` is what the user adds to each sample."""
    more = batch(rows)
    ids = torch.cat([ids, more["input_ids"]], 1)
    mask = torch.cat([mask, more["attention_mask"]], 1)
    options = {name: cache, "video_features": features}
    out = model.generate(ids, attention_mask=mask, pad_token_id=PAD, **options, **GREEDY)
    return ids, mask, out[:, ids.shape[1] :].tolist()


def from_scratch(model, ids, mask, videos):
    return [recomputed(model, row[keep.bool()].tolist(), own) for row, keep, own in zip(ids, mask, videos, strict=True)]


def caches(model, kind):
    return StaticCache(model.config.text_config, max_cache_len=80) if kind == "static" else None


@every_family
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", [CACHE, OTHER_CACHE])
def test_a_turn_of_text_goes_on_from_the_cache(family, kind, name):
    model = slow_fast_model(family)
    videos = [[video()], [], [video(3), video(4)]]
    rows = [prompt(model, 2, *videos[0], 3), prompt(model, 4), prompt(model, *videos[2], 2)]
    features = [x for own in videos for x in own]
    ids, mask, cache = first_turn(model, rows, features, caches(model, kind))
    turn = [prompt(model, 3), prompt(model, 3), prompt(model, 3)]
    ids, mask, got = second_turn(model, ids, mask, turn, None, cache, name)
    assert got == from_scratch(model, ids, mask, videos)


@pytest.mark.parametrize("first", [True, False], ids=["autocast first", "autocast later"])
@pytest.mark.parametrize("shows", ["text", "a video"])
def test_autocast_may_be_on_in_one_turn_alone(first, shows):
    model = slow_fast_model(causal_slow_tokens=True)
    videos = [video()] + [video(4)] * (shows == "a video")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=first):
        ids, mask, cache = first_turn(model, [prompt(model, 2, videos[0], 3)], videos[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not first):
        ids, mask, (got,) = second_turn(model, ids, mask, [prompt(model, 4, *videos[1:], 5)], videos[1:] or None, cache)
    assert len(got) == GREEDY["max_new_tokens"]


def test_a_static_cache_whose_first_row_is_padded_goes_on():
    """4.57 counts a static cache's length in its first row."""
    model = slow_fast_model()
    short, long = video(3), video()
    cache = caches(model, "static")
    ids, mask, cache = first_turn(model, [prompt(model, 1, short, 2), prompt(model, 4, long, 3)], [short, long], cache)
    ids, mask, got = second_turn(model, ids, mask, [prompt(model, 3)] * 2, None, cache)
    assert got == from_scratch(model, ids, mask, [[short], [long]])


@pytest.mark.parametrize("draft", ["plain", "slow-fast", "early exit", "prompt lookup"])
def test_a_draft_changes_nothing_in_a_later_turn(draft):
    """None of them has a cache then, nor the videos of the turns before."""
    model = slow_fast_model(causal_slow_tokens=True)
    old, new = video(), video(3)
    ids, _, cache = first_turn(model, [prompt(model, 2, old, 3)], [old])
    options = {
        "plain": lambda: {"assistant_model": language_model()},
        "slow-fast": lambda: {"assistant_model": slow_fast_model("llama", hybrid_layers=(1,))},
        "early exit": lambda: {"assistant_early_exit": 2},
        "prompt lookup": lambda: {"prompt_lookup_num_tokens": 3, "eos_token_id": VIDEO},  # never comes; 4.57 needs one
    }[draft]()
    for turn, videos in (([3], [old]), ([1, new, 2], [old, new])):
        ids = torch.cat([ids, torch.tensor([prompt(model, *turn)])], 1)
        features = [x for x in turn if isinstance(x, torch.Tensor)] or None
        given = {CACHE: copy.deepcopy(cache), "video_features": features, "pad_token_id": PAD, **options}
        got = model.generate(ids, attention_mask=torch.ones_like(ids), **given, **GREEDY)
        assert got[0, ids.shape[1] :].tolist() == recomputed(model, ids[0].tolist(), videos)


def turns_of_videos(model, kind, texts):
    """Two turns of three conversations; ``texts``: text tokens in each sample's second turn."""
    first, second = [[video()], [], [video(3)]], [[], [video(5)], [video(2), video(3)]]
    rows = [prompt(model, 2, *first[0], 3), prompt(model, 4), prompt(model, *first[2], 2)]
    ids, mask, cache = first_turn(model, rows, [x for own in first for x in own], caches(model, kind))
    turn = [prompt(model, 1, *own, text - 1) for own, text in zip(second, texts, strict=True)]
    ids, mask, got = second_turn(model, ids, mask, turn, [x for own in second for x in own], cache)
    assert got == from_scratch(model, ids, mask, [a + b for a, b in zip(first, second, strict=True)])


@every_family
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_turn_with_new_videos_goes_on_from_the_cache(family, kind):
    """Turns of one length: transformers counts padding within a conversation into a sliding window."""
    turns_of_videos(slow_fast_model(family, causal_slow_tokens=True), kind, (11, 7, 3))


@pytest.mark.parametrize("family", [name for name in FAMILIES if "sliding_window" not in FAMILIES[name][1]])
def test_turns_of_several_lengths_go_on_from_the_cache(family):
    turns_of_videos(slow_fast_model(family, causal_slow_tokens=True), "dynamic", (3, 5, 2))


def test_three_turns_of_one_conversation():
    model = slow_fast_model(causal_slow_tokens=True)
    videos = [video(), video(4), video(2)]
    ids, mask, cache = first_turn(model, [prompt(model, 2, videos[0], 3)], videos[:1])
    for count in (1, 2):
        more = batch([prompt(model, 1, videos[count], 2)])
        ids, mask = torch.cat([ids, more["input_ids"]], 1), torch.cat([mask, more["attention_mask"]], 1)
        out = model.generate(
            ids,
            attention_mask=mask,
            **{CACHE: cache},
            video_features=videos[count : count + 1],
            return_dict_in_generate=True,
            **GREEDY,
        )
        assert out.sequences[0, ids.shape[1] :].tolist() == recomputed(model, ids[0].tolist(), videos[: count + 1])
        mask = torch.cat([mask, torch.ones(1, out.sequences.shape[1] - ids.shape[1], dtype=torch.long)], 1)
        ids, cache = out.sequences, getattr(out, CACHE)


@pytest.mark.parametrize("first", ["a video", "text"])
def test_a_new_video_needs_causal_slow_tokens(first):
    model = slow_fast_model()
    features = video()
    videos = [features] if first == "a video" else []
    ids, mask, cache = first_turn(model, [prompt(model, 2, *videos, 3)], videos)
    with pytest.raises(ValueError, match="causal_slow_tokens"):
        second_turn(model, ids, mask, [prompt(model, 1, features, 2)], [features], cache)


def test_a_cache_without_its_slow_tokens_is_an_error():
    model = slow_fast_model()
    features = video()
    ids, mask, cache = first_turn(model, [prompt(model, 2, features, 3)], [features])
    bare = DynamicCache(config=model.config.text_config)
    for index, layer in enumerate(cache.layers):
        bare.update(layer.keys, layer.values, index)
    with pytest.raises(ValueError, match=f"{CACHE}: got a cache without the slow tokens"):
        second_turn(model, ids, mask, [prompt(model, 3)], None, bare)
    cache.videos = None
    with pytest.raises(ValueError, match=f"{CACHE}: got a cache without the slow tokens"):
        second_turn(model, ids, mask, [prompt(model, 3)], None, cache)


def test_forward_goes_on_from_a_cache_with_the_new_ids_alone():
    model = slow_fast_model(causal_slow_tokens=True)
    videos = [video(), video(3)]
    rows = [prompt(model, 2, videos[0], 3), prompt(model, 1, videos[1], 2), prompt(model, 4)]
    whole = torch.tensor([[token for row in rows for token in row]])
    with torch.no_grad():
        want = model(whole, video_features=videos).logits
        out = model(torch.tensor([rows[0]]), video_features=videos[:1], use_cache=True)
        got = [out.logits]
        for row, new in ((rows[1], videos[1:]), (rows[2], None)):
            out = model(torch.tensor([row]), video_features=new, **{CACHE: getattr(out, CACHE)})
            got.append(out.logits)
    close(torch.cat(got, 1), want, 1e-4)


# ------------------------------------------------------------------------------------- what is done to a cache


def conversation(model):
    """A batch of three, its videos, and the cache of its prefill."""
    videos = [[video()], [], [video(3), video(4)]]
    rows = [prompt(model, 3, *videos[0], 4), prompt(model, 5), prompt(model, 1, videos[2][0], 2, videos[2][1], 2)]
    inputs = batch(rows, "left")
    with torch.no_grad():
        out = model(**inputs, video_features=[x for own in videos for x in own], use_cache=True)
    return inputs, videos, getattr(out, CACHE)


def continued(model, inputs, cache, more):
    """Logits of new rows behind a cache."""
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    with torch.no_grad():
        return model(more, mask, **{CACHE: cache}).logits


def alone(model, inputs, videos, more):
    """The same, sample by sample from scratch."""
    found = []
    for ids, mask, own, new in zip(inputs["input_ids"], inputs["attention_mask"], videos, more, strict=True):
        row = torch.cat([ids[mask.bool()], new])[None]
        with torch.no_grad():
            found.append(model(row, video_features=own or None).logits[0, -len(new) :])
    return torch.stack(found)


@every_family
def test_reordered_repeated_and_selected_rows_keep_their_videos(family):
    model = slow_fast_model(family)
    inputs, videos, cache = conversation(model)
    ways = {
        "reordered": (torch.tensor([2, 0, 1]), lambda c: c.reorder_cache(torch.tensor([2, 0, 1]))),
        "repeated": (torch.tensor([0, 0, 1, 1, 2, 2]), lambda c: c.batch_repeat_interleave(2)),
        "selected": (torch.tensor([2, 2, 0]), lambda c: c.batch_select_indices(torch.tensor([2, 2, 0]))),
    }
    for name, (rows, change) in ways.items():
        taken = {key: x[rows] for key, x in inputs.items()}
        for length in (3, 1):
            more = torch.randint(3, VIDEO - 1, (len(rows), length))
            changed = copy.deepcopy(cache)
            change(changed)
            got = continued(model, taken, changed, more)
            close(got, alone(model, taken, [videos[row] for row in rows], more), 1e-4), name


@pytest.mark.parametrize("keep", [2, 7, 11, 12, 13, 15])
def test_a_cache_cropped_to_before_a_video_does_not_show_it(keep):
    """Of 3 text rows, 8 fast tokens, 1 text row, 4 fast tokens, 1 text row."""
    model = slow_fast_model(causal_slow_tokens=True)
    videos = [video(8), video(3)]
    ids = torch.tensor([prompt(model, 3, videos[0], 1, videos[1], 1)])
    more = torch.randint(3, VIDEO - 1, (1, 3))
    with torch.no_grad():
        cache = getattr(model(ids, video_features=videos, use_cache=True), CACHE)
        cache.crop(keep - ids.shape[1])
        assert cache.get_seq_length() == keep
        assert int(cache.videos.total) == (0 if keep < 11 else 8 * 4)
        got = model(more, **{CACHE: copy.deepcopy(cache)}).logits
        first = getattr(model(ids[:, :11], video_features=videos[:1], use_cache=True), CACHE)
        if keep < 11:
            first.videos = None  # rows of a video that is not complete have seen no slow token
            first.crop(keep - 11)
        elif keep > 11:  # the rows after it, with what they had seen
            rows = [(layer.keys, layer.values) for layer in cache.layers]
            for layer, (keys, values) in zip(first.layers, rows, strict=True):
                layer.keys, layer.values = keys, values
        close(got, model(more, **{CACHE: first}).logits, 1e-5)


def test_a_new_video_goes_where_a_cropped_one_was():
    model = slow_fast_model(causal_slow_tokens=True)
    kept, gone, new = video(8), video(3), video(2)
    text = prompt(model, 3, kept, 1)
    ids = torch.tensor([text + prompt(model, gone, 2)])
    turn = torch.tensor([prompt(model, 1, new, 3)])
    with torch.no_grad():
        cache = getattr(model(ids, video_features=[kept, gone], use_cache=True), CACHE)
        cache.crop(len(text) - ids.shape[1])
        got = model(turn, video_features=[new], **{CACHE: cache}).logits
        want = model(torch.cat([torch.tensor([text]), turn], 1), video_features=[kept, new]).logits
    close(got, want[:, len(text) :], 1e-4)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copied_cache_has_the_videos(how):
    model = slow_fast_model()
    inputs, videos, cache = conversation(model)
    assert isinstance(cache, DynamicCache)
    more = torch.randint(3, VIDEO - 1, (3, 2))
    other = how(cache)
    want = alone(model, inputs, videos, more)
    close(continued(model, inputs, other, more), want, 1e-4)
    close(continued(model, inputs, cache, more), want, 1e-4)


def test_a_cache_that_is_reset_is_empty():
    model = slow_fast_model()
    features = video()
    cache = StaticCache(model.config.text_config, max_cache_len=40)
    *_, cache = first_turn(model, [prompt(model, 2, features, 3)], [features], cache)
    cache.reset()
    row = prompt(model, 5)
    out = model.generate(**batch([row]), **{CACHE: cache}, **GREEDY)
    assert out[0, 5:].tolist() == recomputed(model, row, None)


@pytest.mark.parametrize("again", ["eager", "compiled"])
def test_a_cache_that_a_compiled_call_filled_is_empty_after_its_reset(again):
    torch.compiler.reset()
    model = slow_fast_model()
    cache = StaticCache(config=model.config.text_config, max_cache_len=40)
    features, other = video(), video()
    ids, text = torch.tensor([prompt(model, 2, features, 3)]), torch.tensor([prompt(model, 6)])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    second = compiled if again == "compiled" else model

    def place(rows):
        return {CACHE: cache} if CACHE == "cache" else {CACHE: cache, "cache_position": torch.arange(rows.shape[1])}

    with torch.no_grad():
        compiled(ids, video_features=[features], **place(ids))
        cache.reset()
        assert held_by(cache) is None
        close(second(text, **place(text)).logits, model(text).logits)
        cache.reset()
        close(second(ids, video_features=[other], **place(ids)).logits, model(ids, video_features=[other]).logits)
        assert cache.videos.total.tolist() == [32]


@pytest.mark.parametrize(
    ("name", "argument", "rows", "copied"),
    [
        ("reorder_cache", torch.tensor([1, 0]), [1, 0], False),
        ("batch_select_indices", torch.tensor([1, 1]), [1, 1], False),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1], True),
    ],
)
def test_videos_follow_the_rows_of_a_cache_that_a_compiled_call_filled(name, argument, rows, copied):
    torch.compiler.reset()
    model = slow_fast_model()
    cache, features = DynamicCache(config=model.config.text_config), video()
    inputs = batch([prompt(model, 2, features, 3), prompt(model, 13)])
    with torch.no_grad():
        torch.compile(model, backend="eager")(**inputs, video_features=[features], **{CACHE: cache})
    if copied:
        cache = pickle.loads(pickle.dumps(cache))
    getattr(cache, name)(argument)
    assert cache.videos.total.tolist() == [32 * (row == 0) for row in rows]
    more = torch.randint(3, VIDEO - 1, (len(rows), 2))
    videos = [[features] if row == 0 else [] for row in rows]
    taken = {key: x[rows] for key, x in inputs.items()}
    close(continued(model, taken, cache, more), alone(model, taken, videos, more), 1e-4)
