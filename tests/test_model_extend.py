"""DecodeSession.extend: a turn that is appended gives what the whole conversation gives in one prompt."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import MODEL_TARGETS, VIDEO, features, one_thread, padded, tiny_model  # noqa: F401

from slowfast_model import DecodeSession
from slowfast_model.cache import NewRows, SlowSlots
from slowfast_model.config import IMPLEMENTATIONS

every_target = pytest.mark.parametrize("target", MODEL_TARGETS)
fixed_or_exact = pytest.mark.parametrize("room", [None, 90], ids=["exact", "fixed"])
CLOSE = {"atol": 1e-4, "rtol": 1e-4}

# Turns of a conversation: of each sample, a prompt and the (frames, side) of its videos.
CONVERSATIONS = {
    "text": [[([3, VIDEO, 5], [(5, 4)])], [([6, 7], [])]],
    "a video": [[([3, VIDEO, 5], [(5, 4)])], [([6, VIDEO, 7], [(4, 6)])]],
    "two videos": [[([3, VIDEO, 5], [(2, 4)])], [([VIDEO, 6, VIDEO], [(3, 4), (4, 6)])]],
    "an image": [[([3, VIDEO, 5], [(5, 4)])], [([VIDEO, 7], [(1, 6)])]],
    "the first video": [[([3, 4], [])], [([5, VIDEO, 7], [(5, 4)])]],
    "text after text": [[([3, 4], [])], [([5], [])]],
    "three turns": [[([3, VIDEO], [(2, 4)])], [([5, VIDEO, 7], [(3, 4)])], [([8], [])], [([VIDEO], [(1, 4)])]],
    "a ragged batch": [
        [([3, 4, VIDEO, 5], [(5, 4)]), ([8, 9], []), ([VIDEO, 12, VIDEO], [(1, 6), (2, 4)])],
        [([6], []), ([10, VIDEO, 11], [(3, 4)]), ([VIDEO, 1, 2, VIDEO, 13], [(2, 6), (3, 4)])],
        [([VIDEO, 6], [(2, 4)]), ([10, 14, 15], []), ([16], [])],
    ],
}
every_conversation = pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=list(CONVERSATIONS))


def causal_model(target=None, backend="eager", **changes):
    where = (backend, "cpu") if target is None else (target.backend, target.device)
    return tiny_model(*where, **{"causal_slow_tokens": True} | changes)


def call(turn, side="right", device="cpu"):
    """input_ids, frame_features and attention_mask of a turn."""
    ids, mask = padded([prompt for prompt, _ in turn], side)
    videos = [clip for _, shapes in turn for shape in shapes for clip in features(shape, device=device)]
    return ids.to(device), videos, mask.to(device)


def in_one(turns):
    """All turns as one."""
    samples = zip(*turns, strict=True)
    return [tuple([x for part in parts for x in part] for parts in zip(*sample, strict=True)) for sample in samples]


def prefilled(model, turn, device="cpu", **options):
    return DecodeSession(model, *call(turn, device=device), **{"max_new_tokens": 80} | options)


def assert_goes_on_alike(session, expected, steps=2):
    torch.testing.assert_close(session.logits, expected.logits, **CLOSE)
    for _ in range(steps):
        token = expected.logits.argmax(-1)
        torch.testing.assert_close(session.step(token), expected.step(token), **CLOSE)


# ------------------------------------------------------------------------------------------ the same answers


@every_target
@fixed_or_exact
@every_conversation
def test_turns_give_what_one_prompt_gives(turns, room, target):
    model = causal_model(target)
    session = prefilled(model, turns[0], target.device, max_slow_tokens=room)
    for turn in turns[1:]:
        logits = session.extend(*call(turn, device=target.device))
        assert logits is session.logits
    whole = prefilled(model, in_one(turns), target.device)
    out = model(*call(in_one(turns), device=target.device))
    last = out.logits[torch.arange(len(out.logits)), out.attention_mask.sum(1) - 1]
    torch.testing.assert_close(session.logits, last, **CLOSE)
    assert_goes_on_alike(session, whole)


@fixed_or_exact
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_turns_give_what_one_prompt_gives_in_every_implementation(implementation, room):
    turns = CONVERSATIONS["a ragged batch"]
    model = causal_model(cross_attn_implementation=implementation)
    session = prefilled(model, turns[0], max_slow_tokens=room)
    for turn in turns[1:]:
        session.extend(*call(turn))
    assert_goes_on_alike(session, prefilled(model, in_one(turns)))


PROMPT = st.lists(st.integers(1, 60) | st.just(VIDEO), min_size=1, max_size=4)


@given(st.data())
@settings(max_examples=15)
def test_any_turns_give_what_one_prompt_gives(data):
    """Drawn: samples, turns, sizes of videos, padding, the implementation, room, and how many tokens are between."""
    draw = data.draw
    sizes = st.tuples(st.integers(1, 3), st.sampled_from([2, 4, 6]))
    num_samples, num_turns = draw(st.integers(1, 3)), draw(st.integers(2, 3))
    prompts = [[draw(PROMPT) for _ in range(num_samples)] for _ in range(num_turns)]
    turns = [[(prompt, [draw(sizes) for i in prompt if i == VIDEO]) for prompt in turn] for turn in prompts]
    model = causal_model(cross_attn_implementation=draw(st.sampled_from(list(IMPLEMENTATIONS))))
    session = prefilled(model, turns[0], max_new_tokens=200, max_slow_tokens=draw(st.sampled_from([None, 400])))
    said = turns[:1]
    for turn in turns[1:]:
        answers = [[] for _ in range(num_samples)]
        for _ in range(draw(st.integers(0, 2))):
            token = session.logits.argmax(-1)
            session.step(token)
            for answer, new in zip(answers, token.tolist(), strict=True):
                answer.append(new)
        session.extend(*call(turn, draw(st.sampled_from(["left", "right"]))))
        said += [[(answer, []) for answer in answers], turn]
    assert_goes_on_alike(session, prefilled(model, in_one(said)))


def test_turns_padded_on_the_left_give_the_same():
    turns = CONVERSATIONS["a ragged batch"]
    model = causal_model()
    right, left = (prefilled(model, turns[0]) for _ in range(2))
    assert torch.equal(left.extend(*call(turns[1], "left")), right.extend(*call(turns[1])))
    assert_goes_on_alike(left, right)


def test_a_turn_without_padding_needs_no_mask():
    turns = CONVERSATIONS["a video"]
    model = causal_model()
    with_mask, without = (prefilled(model, turns[0]) for _ in range(2))
    assert torch.equal(without.extend(*call(turns[1])[:2]), with_mask.extend(*call(turns[1])))


@fixed_or_exact
def test_what_was_generated_between_turns_counts(room):
    """As if the answers had been in the prompt."""
    first, second = CONVERSATIONS["a ragged batch"][:2]
    model = causal_model()
    session = prefilled(model, first, max_slow_tokens=room)
    answer = []
    for _ in range(3):
        answer.append(session.logits.argmax(-1))
        session.step(answer[-1])
    session.extend(*call(second))
    said = [([int(token[b]) for token in answer], []) for b in range(3)]
    assert_goes_on_alike(session, prefilled(model, in_one([first, said, second])))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_text_may_follow_as_released_too(implementation):
    first = CONVERSATIONS["a ragged batch"][0]
    text = [([6], []), ([10, 11], []), ([1, 2, 13], [])]
    model = causal_model(causal_slow_tokens=False, cross_attn_implementation=implementation)
    session = prefilled(model, first)
    session.extend(*call(text))
    assert_goes_on_alike(session, prefilled(model, in_one([first, text])))


def test_text_may_follow_in_a_session_whose_steps_attend_no_slow_token():
    first, text = CONVERSATIONS["text"]
    session, stepped = (prefilled(causal_model(), first, slow_tokens_in_decode=False) for _ in range(2))
    for token in text[0][0]:
        expected = stepped.step(torch.tensor([token]))
    torch.testing.assert_close(session.extend(*call(text)), expected, **CLOSE)


def test_a_model_without_hybrid_layers_takes_turns():
    turns = CONVERSATIONS["a ragged batch"]
    model = causal_model(cross_attn_every_n_layers=0)
    session = prefilled(model, turns[0])
    session.extend(*call(turns[1]))
    assert_goes_on_alike(session, prefilled(model, in_one(turns[:2])))


def test_a_model_that_chooses_its_kernels_takes_turns():
    turns = CONVERSATIONS["a ragged batch"]
    model = causal_model(backend=None)
    session = prefilled(model, turns[0])
    session.extend(*call(turns[1]))
    assert_goes_on_alike(session, prefilled(model, in_one(turns[:2])))


@pytest.mark.parametrize("inside", [(True, False), (False, True)], ids=["made in it", "extended in it"])
def test_a_session_may_be_made_and_extended_in_different_modes(inside):
    first, second = CONVERSATIONS["a video"]
    model = causal_model()
    with torch.inference_mode(inside[0]):
        session = prefilled(model, first)
    with torch.inference_mode(inside[1]):
        session.extend(*call(second))
        session.step(torch.tensor([3]))
    expected = prefilled(model, in_one([first, second]))
    expected.step(torch.tensor([3]))
    assert_goes_on_alike(session, expected)


def test_gradients_are_not_recorded():
    first, second = CONVERSATIONS["a video"]
    assert not prefilled(causal_model().train(), first).extend(*call(second)).requires_grad


# ------------------------------------------------------------------------------------------ the caches


def test_what_was_computed_is_not_computed_again():
    first, second = CONVERSATIONS["a video"]
    model = causal_model()
    session = prefilled(model, first)
    rows = []
    model.model.layers[1].register_forward_hook(lambda _module, inputs, _output: rows.append(inputs[0].shape[1]))
    session.extend(*call(second))
    assert rows == [2 + 2 * 9]  # two texts, and two fast frames of 3 x 3 tokens


def slow_caches(session):
    return [session.cache.layers[i].slow_kv for i in session.model.config.hybrid_layers]


def addresses(session):
    slow = session.slow
    tensors = [slow.cu_slow, slow.text_rows, slow.cu_text, slow.slow_end, slow.pieces, session.position]
    return [x.data_ptr() for x in (*tensors, *slow_caches(session), *(cache.kv for cache in session.cache.layers))]


@pytest.mark.parametrize("name", ["a ragged batch", "the first video"])
def test_fixed_room_keeps_every_address_that_a_step_reads(name):
    turns = CONVERSATIONS[name]
    session = prefilled(causal_model(), turns[0], max_slow_tokens=90)
    before = addresses(session)
    shapes = [x.shape for x in slow_caches(session)]
    for turn in turns[1:]:
        session.extend(*call(turn))
        session.step(torch.ones(len(turn), dtype=torch.int64))
    assert addresses(session) == before
    assert [x.shape for x in slow_caches(session)] == shapes


def test_exact_room_is_what_there_is():
    turns = CONVERSATIONS["a ragged batch"]
    session = prefilled(causal_model(), turns[0])
    assert [len(x) for x in slow_caches(session)] == [20 + 36 + 8] * 2
    session.extend(*call(turns[1]))
    assert [len(x) for x in slow_caches(session)] == [20 + 12 + 36 + 8 + 18 + 12] * 2


@fixed_or_exact
def test_a_recorded_step_lasts_as_long_as_its_addresses(room):
    first, second = CONVERSATIONS["a video"]
    session = prefilled(causal_model(), first, max_slow_tokens=room)
    session._replay = replay = session._compute  # what a graph would do
    session.extend(*call([([5], [])]))
    assert session._replay == replay  # text moves nothing
    session.extend(*call(second))
    assert session._replay == (None if room is None else replay)


def test_an_extended_session_frees_its_caches_at_once():
    first, second = CONVERSATIONS["a video"]
    session = prefilled(causal_model(), first)
    before = [weakref.ref(x) for x in slow_caches(session)]
    gc.disable()
    try:
        session.extend(*call(second))
        assert not [x for x in before if x() is not None]
        caches = [weakref.ref(x) for x in (*slow_caches(session), *(cache.kv for cache in session.cache.layers))]
        del session
        assert not [x for x in caches if x() is not None]
    finally:
        gc.enable()


def test_steps_left_are_those_of_the_longest_sample():
    model = causal_model()
    session = DecodeSession(model, *call([([1, 2, 3], []), ([4], [])]), max_new_tokens=6)
    session.extend(*call([([5], []), ([6, 7, 8, 9], [])]))  # 4 and 5 of 9 positions
    assert session.steps_left == 4
    session.extend(*call([([5, 6, 7, 8, 9], []), ([6], [])]))
    assert session.steps_left == 0


# ------------------------------------------------------------------------------------------ refusals


def too_many_rows(turn):
    return call([([5] * 81, [])])


def too_many_fast_tokens(turn):
    return call([([VIDEO, *[5] * 78], [(5, 4)])])


def two_samples(turn):
    return call(turn * 2)


def a_video_too_few(turn):
    return call(turn)[:1]


def a_video_too_many(turn):
    ids, videos, mask = call(turn)
    return ids, videos * 2, mask


def an_id_past_the_vocabulary(turn):
    return call([([61], [])])


def nothing_but_padding(turn):
    return torch.tensor([[5, 6]]), None, torch.tensor([[0, 0]])


def a_list(turn):
    return ([[5, 6]],)


def ids_elsewhere(turn):
    return (torch.tensor([[5, 6]], device="meta"),)


def ids_in_a_row(turn):
    return (torch.tensor([5, 6]),)


def floating_ids(turn):
    return (torch.tensor([[5.0]]),)


def features_elsewhere(turn):
    ids, videos, mask = call(turn)
    return ids, [x.to("meta") for x in videos], mask


def features_of_another_type(turn):
    ids, videos, mask = call(turn)
    return ids, [x.double() for x in videos], mask


def more_slow_tokens_than_room(turn):
    return call([([VIDEO, VIDEO], [(5, 6), (8, 4)])])  # 45 + 32 beside the 20 that are held


BAD_TURNS = {
    too_many_rows: "input_ids: got 81 rows of sample 0",
    too_many_fast_tokens: "input_ids: got 86 rows of sample 0",
    two_samples: "input_ids: got 2 samples, want 1",
    a_video_too_few: "frame_features: got 0 videos, want 1",
    a_video_too_many: "frame_features: got 2 videos, want 1",
    an_id_past_the_vocabulary: "input_ids: got 61",
    nothing_but_padding: "attention_mask: got no selected token in row 0",
    a_list: "input_ids: got ",
    ids_elsewhere: "input_ids: got a tensor on meta",
    ids_in_a_row: "input_ids: got shape",
    floating_ids: r"input_ids: got torch\.float32",
    features_elsewhere: "frame_features.*meta",
    features_of_another_type: r"frame_features.*torch\.float64",
    more_slow_tokens_than_room: "frame_features: got 77 slow tokens of sample 0, want at most 70: max_slow_tokens",
}


def assert_refused(session, fresh, arguments, message, error=(TypeError, ValueError)):
    """And everything is as it was: the next turn gives what it gives in a session that was asked nothing."""
    with pytest.raises(error, match=f"^{message}"):
        session.extend(*arguments)
    assert session.steps_left == fresh.steps_left
    token = torch.tensor([7])
    assert torch.equal(session.step(token), fresh.step(token))
    turn = call([([6, 7], [])])
    if session.model.config.causal_slow_tokens:
        turn = call(CONVERSATIONS["a video"][1])
    assert torch.equal(session.extend(*turn), fresh.extend(*turn))


@pytest.mark.parametrize(("bad", "message"), BAD_TURNS.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_bad_turn_is_refused_and_leaves_the_session_as_it_was(bad, message):
    first, second = CONVERSATIONS["a video"]
    model = causal_model()
    session, fresh = (prefilled(model, first, max_slow_tokens=90) for _ in range(2))
    assert_refused(session, fresh, bad(second), message)


def test_a_video_needs_a_causal_model():
    first, second = CONVERSATIONS["a video"]
    session, fresh = (prefilled(causal_model(causal_slow_tokens=False), first) for _ in range(2))
    assert_refused(session, fresh, call(second), r"frame_features: got a video, .*causal_slow_tokens=True", ValueError)


def test_a_video_needs_steps_that_attend_slow_tokens():
    first, second = CONVERSATIONS["a video"]
    session = prefilled(causal_model(), first, slow_tokens_in_decode=False)
    with pytest.raises(ValueError, match=r"^frame_features: got a video, .*slow_tokens_in_decode"):
        session.extend(*call(second))


def test_a_model_that_was_cast_since_is_refused():
    first, _ = CONVERSATIONS["a video"]
    session = prefilled(causal_model(), first)
    session.model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"^model: got one that computes in torch\.bfloat16 now"):
        session.extend(torch.tensor([[5, 6]]))


@fixed_or_exact
def test_a_turn_that_fails_half_way_leaves_the_session_as_it_was(room):
    first, second = CONVERSATIONS["a video"]
    model = causal_model()
    session, fresh = (prefilled(model, first, max_slow_tokens=room) for _ in range(2))

    def fail(*_):
        raise RuntimeError("half way")

    hook = model.model.layers[-1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="half way"):
        session.extend(*call(second))
    hook.remove()
    assert session.steps_left == fresh.steps_left
    token = torch.tensor([7])
    assert torch.equal(session.step(token), fresh.step(token))
    assert torch.equal(session.extend(*call(second)), fresh.extend(*call(second)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "max_slow_tokens: got -1"),
        (2.0, r"max_slow_tokens: got float 2\.0"),
        (19, "max_slow_tokens: got 19, want at least 20"),
    ],
)
def test_a_wrong_room_is_refused(value, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        prefilled(causal_model(), CONVERSATIONS["text"][0], max_slow_tokens=value)


def test_room_for_slow_tokens_that_nothing_attends_is_refused():
    with pytest.raises(ValueError, match=r"^max_slow_tokens: got 90, want None without slow_tokens_in_decode"):
        prefilled(causal_model(), CONVERSATIONS["text"][0], max_slow_tokens=90, slow_tokens_in_decode=False)


# ------------------------------------------------------------------------------------------ graphs


@pytest.mark.parametrize(("backend", "room"), [(None, 90), ("eager", None)])
def test_a_turn_is_one_graph_without_a_break(backend, room):
    turns = CONVERSATIONS["a ragged batch"]
    model = causal_model(backend=backend, num_hidden_layers=1)
    plain, compiled = (prefilled(model, turns[0], max_slow_tokens=room) for _ in range(2))
    torch._dynamo.reset()
    compiled._compute_turn = torch.compile(compiled._compute_turn, fullgraph=True, backend="eager")
    for turn in turns[1:]:
        torch.testing.assert_close(compiled.extend(*call(turn)), plain.extend(*call(turn)), atol=1e-5, rtol=1e-5)
    assert_goes_on_alike(compiled, plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("name", ["a video", "the first video", "a ragged batch"])
def test_a_captured_step_goes_on_after_a_turn(name):
    turns = CONVERSATIONS[name]
    model = causal_model(backend=None).cuda()
    plain, captured = (prefilled(model, turns[0], "cuda", max_slow_tokens=90) for _ in range(2))
    captured.capture()
    for turn in turns[1:]:
        logits = plain.extend(*call(turn, device="cuda"))
        assert torch.equal(captured.extend(*call(turn, device="cuda")), logits)
        for _ in range(2):
            token = plain.logits.argmax(-1)
            assert torch.equal(captured.step(token), plain.step(token))
    assert captured._replay is not None


# ------------------------------------------------------------------------------------------ where things lie


def test_exact_slots_lie_one_after_another():
    slots = SlowSlots([3, 0, 2])
    cu_slow, pieces = slots.sequences(torch.device("cpu"))
    assert (cu_slow.tolist(), pieces) == ([0, 3, 3, 5], None)
    assert slots.grown([1, 2, 0]).numbers(slots.held, [4, 2, 2]).tolist() == [3, 4, 5]


def test_fixed_slots_are_a_piece_a_sample():
    slots = SlowSlots([3, 0, 2], room=10)
    cu_slow, pieces = slots.sequences(torch.device("cpu"))
    assert cu_slow.tolist() == [0, 1, 2, 3]
    assert pieces.tolist() == [[0, 10], [10, 20], [20, 30]]
    assert slots.numbers([0, 0, 0], slots.held).tolist() == [0, 1, 2, 20, 21]


def test_new_rows_are_the_first_of_each_sample():
    new = NewRows.of([2, 1, 3], 3, torch.device("cpu"))
    assert new.rows.tolist() == [0, 1, 3, 6, 7, 8]
    assert new.cu_rows.tolist() == [0, 2, 3, 6]
    assert new.last.tolist() == [1, 3, 8]
