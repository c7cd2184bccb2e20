"""Llama-3.2-Vision with its text cross-attention through our op: its own logits, gradients and generated ids."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import close, language_model
from transformers import MllamaConfig, MllamaForConditionalGeneration, StaticCache
from transformers.cache_utils import StaticLayer

from slowfast_model.hf import accelerate_cross_attention
from slowfast_model.hf._versions import CACHE
from slowfast_model.hf.mllama import MaskedCrossAttention, _remembered

IMAGE, TILES = 97, 3  # the token's id; tiles that an image has room for
LENGTH = 12


def tiny_model() -> MllamaForConditionalGeneration:
    """Two cross-attention layers of five, their gates open."""
    text = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "pad_token_id": 0}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1, 3], "eos_token_id": None}
    text |= {"rope_scaling": {"rope_type": "default"}, "bos_token_id": 1, "max_position_embeddings": 128}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 8, "patch_size": 4, "max_num_tiles": TILES}
    vision |= {"vision_output_dim": 32, "intermediate_layers_indices": [0]}
    vision |= {"supported_aspect_ratios": [[1, 1], [1, 2], [1, 3]]}
    model = MllamaForConditionalGeneration(
        MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name or "projector" in name:
                scale = 1.2 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
                parameter.add_(torch.randn_like(parameter) * scale)
    return model.eval()


# Of each prompt: where its images stand in the text, and how many tiles of each are used.
PROMPTS = {
    "one image": ({1: 2},),
    "windows move on": ({0: 3, 4: 1, 8: 2},),
    "a batch: one late, none, two from the start": ({5: 1}, {}, {0: 2, 6: 3}),
}


def inputs_of(prompts) -> dict[str, torch.Tensor]:
    """As the processor makes them: a row sees the last image before it, and those next to that."""
    batch, images = len(prompts), max(map(len, prompts))
    ids = torch.randint(3, IMAGE - 1, (batch, LENGTH))
    mask = torch.zeros(batch, LENGTH, images, TILES, dtype=torch.long)
    tiles = torch.zeros(batch, images, TILES, dtype=torch.long)
    for b, places in enumerate(prompts):
        for i, (place, used) in enumerate(places.items()):
            following = list(places)[i + 1] if i + 1 < len(places) else LENGTH
            ids[b, place] = IMAGE
            tiles[b, i, :used] = 1
            mask[b, place:following, i, :used] = 1
    tiles[..., 0] = 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch, images, TILES, 3, 8, 8),
        "aspect_ratio_ids": tiles.sum(-1),
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": mask,
    }


@pytest.fixture(params=PROMPTS.values(), ids=PROMPTS)
def inputs(request):
    return inputs_of(request.param)


@pytest.fixture
def pair():
    """A model as it is, and one with our op."""
    model = tiny_model()
    ours = accelerate_cross_attention(copy.deepcopy(model))
    return model, ours


class Calls:
    """Counts calls of the op, and keeps the types that it computed in."""

    def __init__(self, monkeypatch):
        import slowfast_model.hf.mllama as ours

        self.count, self.types, inner = 0, set(), ours.sk.text_cross_attention

        def counted(q, *args, **kwargs):
            self.count += 1
            self.types.add(q.dtype)
            return inner(q, *args, **kwargs)

        monkeypatch.setattr(ours.sk, "text_cross_attention", counted)


@pytest.fixture
def calls(monkeypatch) -> Calls:
    return Calls(monkeypatch)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_logits_are_its_own(pair, inputs, attention, use_cache, calls):
    model, ours = pair
    for one in pair:
        one.set_attn_implementation(attention)
    with torch.no_grad():
        close(ours(**inputs, use_cache=use_cache).logits, model(**inputs, use_cache=use_cache).logits)
    assert calls.count == 2


def test_logits_in_inference_mode_are_its_own(pair, inputs, calls):
    model, ours = pair
    with torch.inference_mode():
        close(ours(**inputs).logits, model(**inputs).logits)
    assert calls.count == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_as_it_is_for_its_own(pair, inputs, dtype, calls):
    model, ours = pair
    exact = model(**inputs).logits
    with torch.autocast("cpu", dtype=dtype):
        own, got = model(**inputs).logits, ours(**inputs).logits
    assert got.dtype == own.dtype
    assert calls.types == {dtype}, "as SDPA is cast"
    assert (got - exact).abs().max() < 2 * (own - exact).abs().max()
    assert calls.count == 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_without_a_mask_are_its_own(pair, inputs, attention):
    """By sdpa rows are then causal over tiles, by eager they see all of them."""
    del inputs["cross_attention_mask"]
    for one in pair:
        one.set_attn_implementation(attention)
    with torch.no_grad():
        close(*(model(**inputs).logits for model in reversed(pair)))


def test_gradients_are_its_own(pair, inputs, calls):
    found = []
    for model in pair:
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert calls.count == 2
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        close(gradient, found[0][name])


OPTIONS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sequences": {"do_sample": True, "num_return_sequences": 2, "temperature": 0.8},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_generated_ids_are_its_own(pair, inputs, options, calls):
    found = []
    for model in pair:
        torch.manual_seed(1)
        found.append(model.generate(**inputs, max_new_tokens=5, pad_token_id=0, **options))
    assert torch.equal(*found)
    assert calls.count == 2 * 5


@pytest.mark.skipif(CACHE == "past_key_values", reason="4.57 has no static cache of its cross-attention")
def test_a_static_cache_is_read_too(pair, inputs, calls):
    options = {"max_new_tokens": 5, "pad_token_id": 0, "do_sample": False, "cache_implementation": "static"}
    assert torch.equal(*(model.generate(**inputs, **options) for model in pair))
    assert calls.count == 2 * 5


@pytest.mark.skipif(CACHE == "past_key_values", reason="4.57 has no static cache of its cross-attention")
def test_a_compiled_step_over_a_static_cache_is_one_graph(pair, calls):
    inputs = inputs_of(PROMPTS["a batch: one late, none, two from the start"])
    tiles = inputs["cross_attention_mask"][0, 0].numel()
    cache = StaticCache(config=pair[1].config.text_config, max_cache_len=LENGTH + 2)
    for index in (1, 3):
        cache.layers[index] = StaticLayer(max_cache_len=tiles * 5)  # 4 patches and a class token
    ids, mask = inputs.pop("input_ids"), inputs.pop("cross_attention_mask")
    step = torch.compile(pair[1].forward, fullgraph=True, backend="eager")
    token = ids[:, :1]
    rest = {"position_ids": torch.full((3, 1), LENGTH), "cross_attention_mask": mask[:, -1:].clone()}
    with torch.no_grad():
        pair[1](ids, cross_attention_mask=mask, cache=cache, **inputs)
        got = step(token, cache=cache, **rest).logits
        assert calls.count == 4
        del inputs["attention_mask"]
        whole = torch.cat([ids, token], 1)
        want = pair[0](whole, cross_attention_mask=torch.cat([mask, mask[:, -1:]], 1), use_cache=False, **inputs)
    close(got[:, -1], want.logits[:, -1], 1e-4)
    torch.compiler.reset()


def test_its_cache_is_read_in_place(pair, calls, monkeypatch):
    """After the prefill no K and V are laid out again."""
    import slowfast_model.hf.mllama as ours

    model = pair[1]
    seen = []
    inner = ours._as_tokens

    def looked_at(keys, values):
        tokens, apart = inner(keys, values)
        seen.append(tokens[0].data_ptr() == keys.data_ptr())
        return tokens, apart

    monkeypatch.setattr(ours, "_as_tokens", looked_at)
    model.generate(**inputs_of(PROMPTS["windows move on"]), max_new_tokens=4, pad_token_id=0, do_sample=False)
    assert seen == [True] * 8


def test_arguments_are_formed_once_for_all_layers_whose_samples_lie_alike():
    mask = torch.zeros(2, 1, 3, 10)
    mask[1, :, :2, 5:] = torch.finfo(mask.dtype).min
    windows = _remembered(mask, 2, 3, 10, 5, True)
    assert _remembered(mask, 2, 3, 10, 5, True) is windows
    close_by, apart = (windows.arguments(tokens, mask.device) for tokens in (10, 16))
    assert windows.arguments(10, mask.device) is close_by
    # Both samples: the tiles that some row sees by itself, and the whole slab.
    of_first = [[0, 0], [5, 5], [0, 10]]
    for (places, selection), begin in ((close_by, 10), (apart, 16)):
        of_second = [[begin, begin + 5], [begin + 5, begin + 5], [begin, begin + 10]]
        assert selection["slow_pieces"].tolist() == of_first + of_second
        assert [x.tolist() for x in places] == [[0, 3, 6], [0, 1, 2, 3, 4, 5], [0, 3, 6]]


def test_text_alone_does_not_attend(pair, calls):
    ids = torch.randint(3, IMAGE - 1, (2, 6))
    with torch.no_grad():
        assert torch.equal(*(model(ids).logits for model in pair))
    assert not calls.count


def test_a_mask_that_is_no_window_takes_its_own_attention(pair, calls):
    inputs = inputs_of(PROMPTS["windows move on"])
    inputs["cross_attention_mask"][:, 6, 0] = inputs["cross_attention_mask"][:, 0, 0]
    inputs["cross_attention_mask"][:, 6, 1] = 0  # the first and the last image without the one between
    inputs["cross_attention_mask"][:, 6, 2] = inputs["cross_attention_mask"][:, 9, 2]
    with torch.no_grad():
        close(*(model(**inputs).logits for model in reversed(pair)))
    assert not calls.count


def test_a_model_that_was_saved_or_copied(pair, tmp_path, calls):
    model, ours = pair
    inputs = inputs_of(PROMPTS["one image"])
    with torch.no_grad():
        want = model(**inputs).logits
        for one in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            close(one(**inputs).logits, want)
        assert calls.count == 4
        ours.save_pretrained(tmp_path)
        close(MllamaForConditionalGeneration.from_pretrained(tmp_path)(**inputs).logits, want)
    assert accelerate_cross_attention(ours) is ours
    assert sum(isinstance(module, MaskedCrossAttention) for module in ours.modules()) == 2


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="model: got Qwen2ForCausalLM, want an MllamaForConditionalGeneration"):
        accelerate_cross_attention(language_model())
    with pytest.raises(TypeError, match="model: got Linear"):
        accelerate_cross_attention(torch.nn.Linear(1, 1))
