"""VideoChat: every turn on the caches of those before gives what recomputation from the ids gives."""

from __future__ import annotations

import contextlib
import math
import threading

import pytest
import torch
from families import HYBRID, STRIDES, VIDEO, WIDTH, language_model, open_gates, word_tokenizer
from test_generate import recomputed
from test_processor import WORDS, clip, frames  # noqa: F401
from torch._dynamo.testing import CompileCounter
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast

from slowfast_model import PatchTower, encode_frames, load_video
from slowfast_model.hf import SlowFastVLProcessor, VideoChat, add_slow_fast

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} ? {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)  # a turn ends with "?"
USER, ASSISTANT, WHAT, IS, THIS, END, A, CAT = 1, 2, 3, 4, 5, 6, 7, 8  # ids


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for every id, none of which a decoder leaves out but the placeholder, which is never generated."""
    words = [*WORDS, *(f"w{i}" for i in range(len(WORDS), VIDEO)), "<video>"]
    return word_tokenizer({word: i for i, word in enumerate(words)}, ["<video>"])


@pytest.fixture
def make():
    """A chat of a tiny model with a tower, whose gates are open; ``keys`` are its configuration's."""

    def make(chat_options=None, **keys) -> VideoChat:
        keys = {"vision_tower": PatchTower(WIDTH, grid=4, patch=6), "video_token_id": VIDEO} | STRIDES | keys
        model = open_gates(add_slow_fast(language_model(), WIDTH, HYBRID, **keys))
        processor = SlowFastVLProcessor(tokenizer(), model.config, num_frames=8, chat_template=TEMPLATE)
        return VideoChat(model, processor, **({"do_sample": False, "max_new_tokens": 5} | (chat_options or {})))

    return make


def by_hand(chat, ids, videos=(), count=5) -> list[int]:
    """An answer recomputed from all ids of the conversation and all of its videos."""
    return recomputed(chat.model, ids, [encode_frames(chat.model.vision_tower, x) for x in videos], count)


def test_turns_are_what_recomputation_of_the_conversation_gives(make):
    chat = make()
    video = frames(8)
    first = chat.ask("what is this", [video])
    ids = [USER, *[VIDEO] * 8, WHAT, IS, THIS, END, ASSISTANT]
    assert first.ids == by_hand(chat, ids, [video])
    second = chat.ask("a cat")
    ids += [*first.ids, END, USER, A, CAT, END, ASSISTANT]
    assert second.ids == by_hand(chat, ids, [video])
    third = chat.ask("what")
    ids += [*second.ids, END, USER, WHAT, END, ASSISTANT]
    assert third.ids == by_hand(chat, ids, [video])
    assert third.text == chat.processor.decode(third.ids, skip_special_tokens=True)


def test_the_next_turn_reads_its_own_tokens_alone(make):
    chat = make()
    chat.ask("what is this", [frames(8)])
    read = []
    chat.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    answer = chat.ask("a cat")
    assert read == [1 + len([END, USER, A, CAT, END, ASSISTANT]), 1, 1, 1, 1]  # the last token was not cached yet
    assert answer.counts["cached_tokens"] == 8 + 6 + 5


def test_videos_of_later_turns_and_several_in_one(make):
    chat = make(causal_slow_tokens=True)
    one, two, three = frames(8), frames(4), frames(6)
    first = chat.ask("what", [one, two])
    second = chat.ask("a cat")
    third = chat.ask("is this", [three])
    ids = [USER, *[VIDEO] * (8 + 4), WHAT, END, ASSISTANT, *first.ids, END, USER, A, CAT, END, ASSISTANT]
    ids += [*second.ids, END, USER, *[VIDEO] * 4, IS, THIS, END, ASSISTANT]
    assert third.ids == by_hand(chat, ids, [one, two, three])


def test_text_alone_for_a_model_without_a_video_token(make):
    chat = make(video_token_id=None, vision_tower=None)
    assert chat.ask("what is this").counts["fast_tokens"] == 0
    assert chat.ask("a cat").counts["cached_tokens"] == 6 + 5


def test_the_end_of_an_answer_is_the_templates_to_write(make):
    chat = make()
    before = chat.ask("what is this").ids
    end = before[2]
    chat = VideoChat(chat.model, chat.processor, **chat.options, eos_token_id=[VIDEO, end])
    first = chat.ask("what is this")
    assert first.ids == before[: before.index(end) + 1]
    second = chat.ask("a cat")
    want = by_hand(chat, [USER, WHAT, IS, THIS, END, ASSISTANT, *first.ids[:-1], END, USER, A, CAT, END, ASSISTANT])
    ends = [i for i, token in enumerate(want) if token == end]
    assert second.ids == want[: ends[0] + 1 if ends else None]


def test_the_models_own_end_and_length_hold_where_the_user_says_none(make):
    chat = make()
    before = chat.ask("what is this").ids
    model, processor = chat.model, chat.processor
    model.generation_config.eos_token_id = before[2]
    chat = VideoChat(model, processor, do_sample=False)
    assert chat.options["max_new_tokens"] == 512
    first = chat.ask("what is this")
    assert first.ids == before[: before.index(before[2]) + 1]
    chat.options["max_new_tokens"] = 1
    assert chat.ask("a cat").counts["cached_tokens"] == 6 + len(first.ids) - 1
    model.generation_config.eos_token_id, model.generation_config.max_new_tokens = None, 4
    assert VideoChat(model, processor, do_sample=False).ask("what is this").ids == before[:4]


@pytest.mark.slow
def test_a_static_cache_gives_the_same_answers_from_one_compiled_step(make):
    from transformers import CompileConfig

    counter = CompileCounter()
    config = CompileConfig(backend=lambda *graph: counter(*graph), mode=None)  # generate copies all but functions
    config._compile_all_devices = True  # as on a GPU
    torch.compiler.reset()
    chat = make({"static_rows": 64, "compile_config": config}, causal_slow_tokens=True)
    plain = VideoChat(chat.model, chat.processor, do_sample=False, max_new_tokens=5)
    one, two = frames(8), frames(4)
    compiled = []
    for _ in range(2):
        for question, videos in (("what is this", [one]), ("a cat", []), ("is this", [two])):
            assert chat.ask(question, videos).ids == plain.ask(question, videos).ids
            compiled.append(counter.frame_count)
        chat.reset()
        plain.reset()
    assert compiled == [1, 1, 2, 2, 2, 2]  # once more for two videos; another conversation compiles nothing


def test_a_conversation_that_outgrows_its_static_cache_is_told_so(make):
    chat = make({"static_rows": 25})
    first = chat.ask("what is this")
    with pytest.raises(ValueError, match=r"static_rows: got 25, want at least 30 \(11 tokens.* 14 of this .*=5 of"):
        chat.ask("a cat " * 5)
    assert chat.ask("a cat").counts["cached_tokens"] == 6 + len(first.ids)


def test_a_system_message_comes_first(make):
    chat = make({"system": "a cat"})
    for _ in range(2):
        answer = chat.ask("what")
        ids = [0, A, CAT, END, USER, WHAT, END, ASSISTANT]  # no word of the tokenizer's is <system>: it is unknown
        assert answer.ids == by_hand(chat, ids)
        chat.reset()


def test_the_pieces_of_an_answer_are_its_text(make):
    chat = make()
    for question in ("what is this", "a cat"):
        pieces: list[str] = []
        answer = chat.ask(question, on_text=pieces.append)
        assert "".join(pieces) == answer.text
        assert len(pieces) > 1


def test_a_stopped_answer_is_gone_on_from(make):
    chat = make({"max_new_tokens": 40})
    first = chat.ask("what is this", on_text=lambda text: chat.stop())
    assert 1 <= len(first.ids) < 40
    ids = [USER, WHAT, IS, THIS, END, ASSISTANT, *first.ids, END, USER, A, CAT, END, ASSISTANT]
    assert chat.ask("a cat").ids == by_hand(chat, ids, count=40)


def test_progress_of_decoding_and_of_the_tower(make, clip):  # noqa: F811
    heard: list[tuple[str, int, int]] = []
    make().ask("what", [clip, frames(40)], on_progress=lambda *said: heard.append(said))
    assert [x for x in heard if x[0] == "decode_video"] == [("decode_video", n, 12) for n in range(1, 13)]
    assert heard[12:] == [("tower", 8, 48), ("tower", 40, 48), ("tower", 48, 48)]


@pytest.mark.parametrize("settings", [{"num_frames": 4}, {"num_frames": 9, "fps": 5}])
def test_frames_of_a_file_are_sampled_as_load_video_does(make, clip, settings):  # noqa: F811
    taken = load_video(clip, **settings)
    answers = []
    for given in (clip, taken):
        torch.manual_seed(0)  # the same model
        answers.append(make(settings).ask("what", [given]))
    assert answers[0].ids == answers[1].ids
    assert answers[0].counts["frames"] == len(taken)


def test_counts(make):
    chat = make(causal_slow_tokens=True)
    first = chat.ask("what is this", [frames(8), frames(4)])
    assert first.counts == {
        "videos": 2,
        "frames": 12,
        "fast_tokens": 8 + 4,
        "slow_tokens": (8 + 4) * 4,
        "cached_tokens": 0,
        "prompt_tokens": 8 + 4 + 6,
        "new_tokens": 5,
    }
    second = chat.ask("a cat", [frames(4)])
    assert (second.counts["fast_tokens"], second.counts["slow_tokens"]) == (4, 16)
    assert chat.ask("a cat").counts["slow_tokens"] == 0


def test_timings_name_every_stage(make):
    chat = make(causal_slow_tokens=True)
    tower = chat.model.vision_tower
    tower.preprocess = own = lambda x: x.permute(0, 3, 1, 2) / 255
    first = chat.ask("what is this", [frames(8)]).timings
    stages = ["decode_video", "preprocess", "tower", "pool", "kv", "prefill", "token"]
    assert list(first) == [*stages, "tokens_per_second", "peak_memory_bytes"]
    assert all(first[stage] > 0 for stage in stages)
    assert first["peak_memory_bytes"] is None or chat.model.device.type == "cuda"
    assert first["tokens_per_second"] > 0
    second = chat.ask("a cat").timings
    assert second["pool"] == second["kv"] == 0
    assert tower.preprocess is own
    assert "_slow_and_fast" not in vars(chat.model)
    assert not any("slow_kv" in vars(attention) for attention in chat.model.hybrid_attentions())


def test_later_tokens_are_not_slowed_by_what_times_the_first(make):
    chat = make()
    first, *_ = chat.model.hybrid_attentions()
    timed = []
    chat.ask("what", [frames(8)], on_text=lambda text: timed.append("slow_kv" in vars(first)))
    assert timed
    assert not any(timed)


def test_chats_over_one_model_in_two_threads_leave_nothing_on_it(make):
    chat, failed = make(), []
    barrier = threading.Barrier(2)

    def ask(conversation):
        try:
            for _ in range(3):
                barrier.wait(60)
                conversation.reset()
                assert conversation.ask("what", [frames(8)]).timings["kv"] > 0
        except Exception as problem:
            failed.append(problem)

    threads = [threading.Thread(target=ask, args=(x,)) for x in (chat, VideoChat(chat.model, chat.processor))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert "_slow_and_fast" not in vars(chat.model)
    assert not any("slow_kv" in vars(attention) for attention in chat.model.hybrid_attentions())


def test_one_token_alone_has_no_time_of_later_ones(make):
    timings = make({"max_new_tokens": 1}).ask("what").timings
    assert timings["token"] is timings["tokens_per_second"] is None
    assert timings["prefill"] > 0


# ------------------------------------------------------------------------------------------------- backends


def seen_by(chat) -> list[bool]:
    """Whether cuDNN may attend, at each call of the tower and of the language model."""
    seen: list[bool] = []
    for module in (chat.model.vision_tower, chat.model.language_model):
        module.register_forward_pre_hook(lambda *given: seen.append(cuda.cudnn_sdp_enabled()))
    return seen


def test_a_turn_runs_without_cudnns_attention(make):
    chat = make()
    seen = seen_by(chat)
    chat.ask("what is this", [frames(8)])
    chat.ask("a cat")
    assert seen == [False] * (1 + 5 + 5)
    assert cuda.cudnn_sdp_enabled()


def test_steps_over_a_static_cache_have_the_backends_that_the_user_chose(make):
    chat = make({"static_rows": 64})
    seen = seen_by(chat)
    for question, videos in (("what is this", [frames(8)]), ("a cat", [])):
        chat.ask(question, videos)
        assert seen == [False] * (1 + len(videos)) + [True] * 4
        seen.clear()


def test_a_user_who_left_cudnn_alone_keeps_it(make):
    chat = make()
    seen = seen_by(chat)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        with contextlib.suppress(RuntimeError):  # a CPU has no such backend
            chat.ask("what is this", [frames(8)])
        assert cuda.cudnn_sdp_enabled()
        assert not cuda.flash_sdp_enabled()
    assert seen
    assert all(seen)


@pytest.mark.parametrize("settings", [{}, {"static_rows": 64}])
def test_an_error_of_a_turn_gives_cudnn_back(make, settings):
    chat = make(settings)

    def fails(*given):
        raise RuntimeError("no more")

    for module in (chat.model.language_model, chat.model.vision_tower):
        module.register_forward_pre_hook(fails)
        with pytest.raises(RuntimeError, match="no more"):
            chat.ask("what", [frames(8)])
        assert cuda.cudnn_sdp_enabled()


# ------------------------------------------------------------------------------------------------- stopwatch


def test_a_second_belongs_to_one_stage(monkeypatch):
    from slowfast_model.hf import stopwatch

    clock = iter([0.0, 1.0, 3.0, 7.0, 100.0, 101.0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(clock))
    watch = stopwatch.Stopwatch(torch.device("cpu"))
    with watch.stage("outer"), watch.stage("inner"):
        pass
    with watch.stage("inner"):
        pass
    assert watch.seconds == {"inner": 3.0 - 1.0 + 1.0, "outer": 7.0 - 2.0}
    assert math.isclose(sum(watch.seconds.values()), 8.0)


# ----------------------------------------------------------------------------------------------------- errors


def test_an_error_before_the_model_reads_leaves_the_conversation(make):
    chat = make(causal_slow_tokens=True)
    first = chat.ask("what is this", [frames(8)])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4"):
        chat.ask("a cat", ["nowhere.mp4"])
    with pytest.raises(ValueError, match="videos: got 0, want 1"):
        chat.ask("a <video> cat")
    with pytest.raises(TypeError, match=r"videos\[0\]: got torch.float32"):
        chat.ask("a cat", [frames(8).float()])
    assert chat.ask("a cat").counts["cached_tokens"] == 8 + 6 + len(first.ids)


def test_an_error_while_the_model_reads_ends_the_conversation(make):
    chat = make()
    chat.ask("what is this")

    def fails(text):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        chat.ask("a cat", on_text=fails)
    assert "_slow_and_fast" not in vars(chat.model)
    assert chat.ask("what is this").counts["cached_tokens"] == 0


def test_a_video_that_comes_too_late(make):
    chat = make()
    chat.ask("what", [frames(8)])
    with pytest.raises(ValueError, match=r"videos: got one after the first turn.*causal_slow_tokens"):
        chat.ask("what", [frames(8)])
    chat.reset()
    assert chat.ask("what", [frames(8)]).counts["videos"] == 1


def test_a_video_without_a_tower(make):
    with pytest.raises(ValueError, match="videos: got a video, want none: the model has no vision tower"):
        make(vision_tower=None).ask("what", [frames(8)])


def test_a_template_that_leaves_out_answers(make):
    chat = make()
    chat.processor.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    chat.ask("what")
    with pytest.raises(ValueError, match="chat_template: got one that leaves out answers"):
        chat.ask("what")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5,), "question: got int, want a string"),
        (("what", "clip.mp4"), "videos: got str, want a list"),
        (("what", torch.zeros(8, 4, 4, 3)), "videos: got Tensor, want a list"),
    ],
)
def test_arguments_of_another_type(make, arguments, message):
    with pytest.raises(TypeError, match=message):
        make().ask(*arguments)


def test_models_and_processors_of_another_kind(make):
    chat = make()
    with pytest.raises(TypeError, match="model: got Qwen2ForCausalLM, want a SlowFastVLForConditionalGeneration"):
        VideoChat(chat.model.language_model, chat.processor)
    with pytest.raises(TypeError, match="want a SlowFastVLProcessor"):
        VideoChat(chat.model, chat.processor.tokenizer)
    with pytest.raises(ValueError, match="num_frames: got 0"):
        VideoChat(chat.model, chat.processor, num_frames=0)


def test_what_was_saved_is_what_answers(make, tmp_path):
    chat = make()
    video = frames(8)
    want = [chat.ask("what is this", [video]).ids, chat.ask("a cat").ids]
    chat.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="want a processor beside the model"):
        VideoChat.from_pretrained(tmp_path)
    chat.processor.save_pretrained(tmp_path)
    again = VideoChat.from_pretrained(tmp_path, do_sample=False, max_new_tokens=5)
    assert [again.ask("what is this", [video]).ids, again.ask("a cat").ids] == want
    assert VideoChat.from_pretrained(tmp_path, dtype="bfloat16").model.dtype == torch.bfloat16
    chat.model.to(torch.float16).save_pretrained(tmp_path)
    assert VideoChat.from_pretrained(tmp_path).model.dtype == torch.float16
