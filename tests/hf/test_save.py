"""Saving, loading, copying and pickling; dtypes, vocabularies, tied weights, devices."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from families import (
    FAMILIES,
    HYBRID,
    STRIDES,
    VIDEO,
    WIDTH,
    close,
    language_model,
    open_gates,
    prompt,
    slow_fast_model,
    video,
)
from torch.nn import Parameter
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, FalconH1Config, MixtralConfig

from slowfast_model import PatchTower
from slowfast_model.hf import SlowFastVLConfig, SlowFastVLForConditionalGeneration, add_slow_fast
from slowfast_model.hf._versions import CACHE

every_family = pytest.mark.parametrize("family", FAMILIES)
newest = pytest.mark.skipif(CACHE == "past_key_values", reason="of the newest transformers, not of 4.57")


def answer(model, inputs):
    ids, features = inputs
    with torch.no_grad():
        return model(ids, video_features=[features]).logits


def inputs_of(model, dtype=torch.float32):
    features = video().to(dtype)
    return torch.tensor([prompt(model, 3, features, 4)]), features


def without_dtype(config):
    """A configuration's dict, as what is written says of which type the weights are."""
    return {k: without_dtype(v) if isinstance(v, dict) else v for k, v in config.items() if k != "dtype"}


@every_family
@pytest.mark.parametrize("loader", [SlowFastVLForConditionalGeneration, AutoModelForImageTextToText])
def test_what_is_saved_is_what_is_loaded(family, loader, tmp_path):
    model = slow_fast_model(family, causal_slow_tokens=True, mm_projector_type="mlp2x_gelu")
    inputs = inputs_of(model)
    model.save_pretrained(tmp_path)
    again, report = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is SlowFastVLForConditionalGeneration
    assert not any(report.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)
    again.set_attn_implementation(model.config._attn_implementation)
    assert torch.equal(answer(again, inputs), answer(model, inputs))
    assert not again.training
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["SlowFastVLForConditionalGeneration"]
    assert written["hybrid_layers"] == list(HYBRID)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, SlowFastVLConfig)
    assert without_dtype(config.to_dict()) == without_dtype(again.config.to_dict())


@every_family
def test_the_released_names_are_in_the_checkpoint(family):
    model = slow_fast_model(family)
    names = {name.split("self_attn.")[1] for name in model.state_dict() if "cross_attn_" in name}
    assert names == {
        *(f"cross_attn_kv_proj.{kind}" for kind in ("weight", "bias")),
        *(f"cross_attn_gate_proj.0.{kind}" for kind in ("weight", "bias")),
        "cross_attn_warm_up_gate",
    }


def test_a_checkpoint_in_shards(tmp_path):
    model = slow_fast_model()
    inputs = inputs_of(model)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = SlowFastVLForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(answer(again, inputs), answer(model, inputs))


def test_weights_that_a_checkpoint_lacks_start_closed(tmp_path):
    from safetensors.torch import load_file, save_file

    model = slow_fast_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {key: value for key, value in load_file(file).items() if key not in model.added_weights()}
    save_file(kept, file, {"format": "pt"})
    again = SlowFastVLForConditionalGeneration.from_pretrained(tmp_path)
    for attention in again.hybrid_attentions():
        assert attention.cross_attn_warm_up_gate.tolist() == [0]
        assert attention.cross_attn_kv_proj.weight.isfinite().all()


@pytest.mark.parametrize("lost", ["layers.2.self_attn.cross_attn_kv_proj.bias", "mm_projector"])
def test_a_checkpoint_that_lacks_some_of_them_is_refused(lost, tmp_path):
    from safetensors.torch import load_file, save_file

    slow_fast_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if lost not in key}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"without .*{lost}"):
        SlowFastVLForConditionalGeneration.from_pretrained(tmp_path)


@newest
def test_a_first_releases_names_do_not_take_what_was_added(tmp_path):
    """In those of sarvam_moe q_proj, k_proj and v_proj are one, and "cross_attn_kv_proj" ends like one of them."""
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    config = AutoConfig.for_model("sarvam_moe", **FAMILIES["llama"][1] | experts)
    model = slow_fast_model(lm=AutoModelForCausalLM.from_config(config).eval())
    inputs = inputs_of(model)
    model.save_pretrained(tmp_path / "first")
    again, report = SlowFastVLForConditionalGeneration.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(report.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(answer(again, inputs), answer(model, inputs))
    again.save_pretrained(tmp_path / "second")
    again = SlowFastVLForConditionalGeneration.from_pretrained(tmp_path / "second")
    assert torch.equal(answer(again, inputs), answer(model, inputs))


@newest
def test_what_a_language_model_derives_is_there_again(tmp_path):
    """Falcon-H1's multipliers, which its decoder makes and no checkpoint holds."""
    own = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
    own |= {"ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9]}
    model = slow_fast_model(lm=AutoModelForCausalLM.from_config(FalconH1Config(**FAMILIES["llama"][1] | own)).eval())
    inputs = inputs_of(model)
    model.save_pretrained(tmp_path)
    again = SlowFastVLForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(answer(again, inputs), answer(model, inputs))


def test_a_language_models_directory_is_refused_with_the_way_out(tmp_path):
    lm = language_model()
    lm.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type: got 'qwen2'.*add_slow_fast"):
        SlowFastVLForConditionalGeneration.from_pretrained(tmp_path)
    model = add_slow_fast(AutoModelForCausalLM.from_pretrained(tmp_path), WIDTH, HYBRID)
    assert isinstance(model, SlowFastVLForConditionalGeneration)


def test_a_tower_is_saved_with_the_model(tmp_path):
    frames = torch.randint(256, (4, 30, 40, 3), dtype=torch.uint8)
    for tower in (PatchTower(WIDTH, grid=4, patch=6), ("patch", {"width": WIDTH, "grid": 4, "patch": 6})):
        model = add_slow_fast(language_model(), WIDTH, HYBRID, vision_tower=tower, video_token_id=VIDEO, **STRIDES)
        features = model.encode_videos([frames])
        model.save_pretrained(tmp_path)
        again = SlowFastVLForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(again.encode_videos([frames])[0], features[0])
    with pytest.raises(ValueError, match="vision_tower: got Linear"):
        add_slow_fast(language_model(), WIDTH, HYBRID, vision_tower=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="vision_tower: got 'eva', want one of patch, convnext, siglip, clip"):
        add_slow_fast(language_model(), WIDTH, HYBRID, vision_tower=("eva", {}))


@every_family
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_computes_the_same_and_shares_nothing(family, how):
    model = slow_fast_model(family)
    inputs = inputs_of(model)
    want = answer(model, inputs)
    other = how(model)
    assert [type(a) for a in other.hybrid_attentions()] == [type(a) for a in model.hybrid_attentions()]
    assert torch.equal(answer(other, inputs), want)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(answer(model, inputs), want)


def test_a_model_goes_through_torch_save(tmp_path):
    model = slow_fast_model()
    inputs = inputs_of(model)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(answer(torch.load(tmp_path / "model.pt", weights_only=False), inputs), answer(model, inputs))


# ------------------------------------------------------------------------------------------------ what is taken over


@pytest.mark.skipif(CACHE == "past_key_values", reason="4.57 has one way to compute experts")
def test_experts_are_computed_as_the_language_model_does(tmp_path):
    sizes = FAMILIES["llama"][1] | {"num_local_experts": 3}
    lm = AutoModelForCausalLM.from_config(MixtralConfig(**sizes))
    chosen = lm.config._experts_implementation
    assert chosen not in (None, "eager")
    model = slow_fast_model(lm=lm)
    assert lm.config._experts_implementation == chosen
    model.save_pretrained(tmp_path)
    loaded = SlowFastVLForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.language_model.config._experts_implementation == chosen


def test_the_language_model_is_taken_over_and_not_copied():
    lm = language_model().train()
    weights = dict(lm.named_parameters())
    model = add_slow_fast(lm, WIDTH, HYBRID)
    assert model.language_model is lm
    assert model.training
    assert all(dict(lm.named_parameters())[name] is weight for name, weight in weights.items())
    assert all(torch.equal(weight, copied) for weight, copied in zip(weights.values(), weights.values(), strict=True))


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family, dtype, tmp_path):
    language_model(family).save_pretrained(tmp_path / "lm")  # .to(dtype) would round rope's frequencies too
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "lm", dtype=dtype)
    model = slow_fast_model(lm=lm)
    assert {p.dtype for p in model.parameters()} == {dtype}
    inputs = inputs_of(model)
    model.set_attn_implementation("eager")
    exact = answer(copy.deepcopy(model).float(), (inputs[0], inputs[1].float()))
    got = answer(model, inputs)
    assert got.dtype == dtype
    assert (got.float() - exact).abs().max() < 40 * torch.finfo(dtype).eps * exact.abs().max()
    ids, features = inputs
    assert model.generate(ids, video_features=[features], max_new_tokens=3, do_sample=False).shape[1] == len(ids[0]) + 3
    model.save_pretrained(tmp_path)
    again = SlowFastVLForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    again.set_attn_implementation(model.config._attn_implementation)
    assert torch.equal(answer(again, inputs), got)
    wide = SlowFastVLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_may_be_of_another_half_type_than_the_weights(weights):
    other = torch.float16 if weights == torch.bfloat16 else torch.bfloat16
    model = slow_fast_model()
    inputs = inputs_of(model)
    exact = answer(model, inputs)
    model = model.to(weights)
    ids, features = inputs
    with torch.autocast("cpu", dtype=other):
        got = answer(model, inputs)
        model(ids, video_features=[features], labels=ids).loss.backward()
    assert (got.float() - exact).abs().max() < 0.1 * exact.abs().max()
    gates = [attention.cross_attn_gate_proj[0].weight.grad for attention in model.hybrid_attentions()]
    assert all(grad.dtype == weights and grad.isfinite().all() and grad.any() for grad in gates)


def test_autocast_computes_in_half_precision():
    model = slow_fast_model()
    inputs = inputs_of(model)
    exact = answer(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = answer(model, inputs)
    assert (got.float() - exact).abs().max() < 0.1 * exact.abs().max()
    assert not torch.equal(got.float(), exact)


@every_family
def test_a_resized_vocabulary(family, tmp_path):
    model = slow_fast_model(family)
    inputs = inputs_of(model)
    before = answer(model, inputs)
    embeddings = model.resize_token_embeddings(VIDEO + 30)
    assert embeddings.num_embeddings == model.config.text_config.vocab_size == model.vocab_size == VIDEO + 30
    after = answer(model, inputs)
    assert after.shape[-1] == VIDEO + 30
    assert torch.equal(after[..., : before.shape[-1]], before)
    labels = inputs[0].clone()
    labels[0, -1] = VIDEO + 20
    assert model(inputs[0], video_features=[inputs[1]], labels=labels).loss.isfinite()
    model.save_pretrained(tmp_path)
    again = SlowFastVLForConditionalGeneration.from_pretrained(tmp_path)
    again.set_attn_implementation(model.config._attn_implementation)
    assert torch.equal(answer(again, inputs), after)


@every_family
@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_stay_tied_and_untied_ones_apart(family, tied, tmp_path):
    model = slow_fast_model(lm=language_model(family, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    for one in (model, SlowFastVLForConditionalGeneration.from_pretrained(tmp_path), copy.deepcopy(model)):
        assert (one.get_input_embeddings().weight is one.get_output_embeddings().weight) is tied
    inputs = inputs_of(model)
    again = SlowFastVLForConditionalGeneration.from_pretrained(tmp_path)
    again.set_attn_implementation(model.config._attn_implementation)
    assert torch.equal(answer(again, inputs), answer(model, inputs))


def test_a_vocabulary_without_a_placeholder_gets_one_later():
    model = add_slow_fast(language_model(), WIDTH, HYBRID, **STRIDES)
    features = video()
    with pytest.raises(ValueError, match="video_token_id is None"):
        model(torch.tensor([[5, 6]]), video_features=[features])
    model.config.video_token_id = VIDEO
    assert answer(model, inputs_of(model)).isfinite().all()


# ------------------------------------------------------------------------------------------ offloaded and quantised


@every_family
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_layers_compute_the_same(family, where, tmp_path):
    """On a CPU every other layer's weights lie on the disk, or in another place of memory, until they are called."""
    from accelerate import cpu_offload, disk_offload

    model = slow_fast_model(family)
    inputs = inputs_of(model)
    want = answer(model, inputs)
    ids = model.generate(inputs[0], video_features=[inputs[1]], max_new_tokens=4, do_sample=False)
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert all(a.cross_attn_kv_proj.weight.is_meta for a in model.hybrid_attentions())
    close(answer(model, inputs), want, 1e-5)
    got = model.generate(inputs[0], video_features=[inputs[1]], max_new_tokens=4, do_sample=False)
    assert torch.equal(got, ids)


@every_family
def test_a_device_map_with_cpu_and_disk(family, tmp_path):
    model = slow_fast_model(family)
    inputs = inputs_of(model)
    want = answer(model, inputs)
    model.save_pretrained(tmp_path)
    tied = {"language_model.lm_head": "cpu"}
    places = {"language_model.model.layers.0": "disk", "language_model.model.layers.1": "cpu"}
    places |= {"language_model.model.layers.2": "disk", "mm_projector": "disk", "language_model.model.norm": "cpu"}
    places |= {"language_model.model.embed_tokens": "cpu", "language_model.model.rotary_emb": "cpu", **tied}
    if hasattr(model.get_decoder(), "rotary_emb_local"):
        places["language_model.model.rotary_emb_local"] = "cpu"
    again = SlowFastVLForConditionalGeneration.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offload"
    )
    again.set_attn_implementation(model.config._attn_implementation)
    assert again.hybrid_attentions()[0].cross_attn_kv_proj.weight.is_meta
    close(answer(again, inputs), want, 1e-5)
    got = again.generate(inputs[0], video_features=[inputs[1]], max_new_tokens=3, do_sample=False)
    want = model.generate(inputs[0], video_features=[inputs[1]], max_new_tokens=3, do_sample=False)
    assert torch.equal(got, want)


def test_an_offloaded_language_model_is_taken_over(tmp_path):
    from accelerate import disk_offload

    lm = language_model()
    plain = add_slow_fast(copy.deepcopy(lm), WIDTH, HYBRID, video_token_id=VIDEO)
    disk_offload(lm, tmp_path, execution_device=torch.device("cpu"))
    model = add_slow_fast(lm, WIDTH, HYBRID, video_token_id=VIDEO)
    for attention, other in zip(model.hybrid_attentions(), plain.hybrid_attentions(), strict=True):
        close(attention.cross_attn_kv_proj.weight, other.cross_attn_kv_proj.weight, 1e-6)
    open_gates(plain)
    open_gates(model)
    inputs = inputs_of(plain)
    close(answer(model, inputs), answer(plain, inputs), 1e-5)
    assert not any(p.is_meta for name, p in model.named_parameters() if "cross_attn" in name or "mm_proj" in name)


def quantised(module):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(module, Int8WeightOnlyConfig())
    return module


def test_int8_weights():
    """The answer is that of the weights that int8 stands for."""
    pytest.importorskip("torchao")
    model = slow_fast_model()
    inputs = inputs_of(model)
    exact = answer(model, inputs)
    rounded = copy.deepcopy(model)
    quantised(model)
    stored = {name: p for name, p in model.named_parameters() if hasattr(p, "dequantize") and type(p) is not Parameter}
    assert {name for name in stored if "cross_attn_kv_proj" in name and name.endswith("weight")}
    with torch.no_grad():
        for name, weight in stored.items():
            rounded.get_parameter(name).copy_(weight.dequantize())
    got = answer(model, inputs)
    close(got, answer(rounded, inputs), 1e-4)
    assert not torch.allclose(got, exact, rtol=0, atol=1e-4)
    ids = model.generate(inputs[0], video_features=[inputs[1]], max_new_tokens=3, do_sample=False)
    assert ids.shape[1] == inputs[0].shape[1] + 3


def test_a_quantised_language_model_is_taken_over():
    pytest.importorskip("torchao")
    lm = quantised(language_model())
    model = add_slow_fast(lm, WIDTH, HYBRID, video_token_id=VIDEO)
    for attention in model.hybrid_attentions():
        x = torch.randn(5, lm.config.hidden_size)
        k, v = attention.cross_attn_kv_proj(x).view(5, -1, 2, attention.head_dim).unbind(2)
        close(k.flatten(1), attention.k_proj(x), 1e-5)
        close(v.flatten(1), attention.v_proj(x), 1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_the_layers(tmp_path):
    model = slow_fast_model()
    inputs = inputs_of(model)
    want = answer(model, inputs)
    model.save_pretrained(tmp_path)
    memory = {0: "100KB", 1: "10GB"}
    again = SlowFastVLForConditionalGeneration.from_pretrained(tmp_path, device_map="auto", max_memory=memory)
    assert {p.device.index for p in again.parameters()} == {0, 1}
    got = answer(again, (inputs[0].cuda(), inputs[1].cuda()))
    close(got.cpu(), want, 1e-3)
