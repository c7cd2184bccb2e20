"""Released checkpoints under transformers: what is computed, which keys are read, vocabularies, dtypes, saving."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from released_cases import (
    CONFIG,
    DIMS,
    TOWER,
    VOCABULARY,
    clip,
    convnext,
    language_weights,
    siglip,
    stored_convnext,
    stored_transformer,
    write,
    write_tokenizer,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from slowfast_model import SlowFastConfig, SlowFastForCausalLM
from slowfast_model.hf import SlowFastVLConfig, SlowFastVLForConditionalGeneration, SlowFastVLProcessor, released
from slowfast_model.hf._versions import OFFLOADS_STATE_DICTS

VIDEO = VOCABULARY  # the placeholder, behind the tokenizer's tokens


def hidden_state(model, pixels):
    return model(pixels, output_hidden_states=True).hidden_states[-2]


# what mm_vision_tower says, the library's model, its stored weights, its features of pixels
TOWERS = {
    "convnext": (
        {"mm_vision_tower": "convnext-64"},
        convnext,
        stored_convnext,
        lambda model, pixels: (
            model.forward_intermediates(pixels, [3], norm=False, intermediates_only=True)[0].flatten(2).transpose(1, 2)
        ),
    ),
    "siglip": (
        {"mm_vision_tower": "google/siglip-base-patch16-224", "mm_hidden_size": 36},
        lambda: siglip(hidden_size=36, num_attention_heads=12),
        stored_transformer,
        hidden_state,
    ),
    "clip": (
        {"mm_vision_tower": "openai/clip-vit-base-patch16", "mm_hidden_size": 48},
        clip,
        stored_transformer,
        lambda model, pixels: hidden_state(model, pixels)[:, 1:],
    ),
}
every_tower = pytest.mark.parametrize("tower", TOWERS)


def frames(count=4):
    return torch.randint(256, (count, 90, 160, 3), dtype=torch.uint8)


def load(directory, **options):
    return SlowFastVLForConditionalGeneration.from_pretrained(directory, **{"dtype": torch.float32} | options)


def prompt(model, clip, marker=None):
    """Ids with placeholders, and as the reference model takes them."""
    marker = model.config.video_token_id if marker is None else marker
    count = model.config.num_fast_tokens(len(clip), model.encode_videos([clip[:1]])[0].shape[1])
    return torch.tensor([[5, 6, *[marker] * count, 7, 8, 9]]), torch.tensor([[5, 6, -200, 7, 8, 9]])


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """With a ConvNeXt; tests that change it copy it."""
    torch.manual_seed(3)
    return write(tmp_path_factory.mktemp("released"), stored_convnext(convnext()))


def changed(directory, target, change) -> Path:
    """A copy whose state dict ``change`` has changed in place."""
    target.mkdir(exist_ok=True)
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors")
    for file in directory.iterdir():
        if file.name != "model.safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    return target


# ------------------------------------------------------------------------------------------------- what is computed


@every_tower
@torch.no_grad()
def test_features_logits_and_ids_are_those_of_the_reference_on_the_same_files(tower, tmp_path):
    names, make, stored, features_of = TOWERS[tower]
    library = make()
    write(tmp_path, stored(library), vocab_size=VOCABULARY, **names)
    model, reference = load(tmp_path), SlowFastForCausalLM.from_pretrained(tmp_path)
    video = frames()
    (features,) = model.encode_videos([video])
    want = features_of(library, model.vision_tower.preprocess(video))
    torch.testing.assert_close(features, want, atol=1e-5, rtol=1e-5)
    ids, official = prompt(model, video)
    got = model(ids, pixel_values_videos=[video]).logits
    torch.testing.assert_close(
        got[..., :VOCABULARY], reference(official, frame_features=[want]).logits, atol=2e-5, rtol=1e-5
    )
    new = model.generate(ids, pixel_values_videos=[video], max_new_tokens=8, do_sample=False, eos_token_id=None)
    want_ids = reference.generate(official, frame_features=[want], max_new_tokens=8)
    assert torch.equal(new[:, ids.shape[1] :], want_ids)


@torch.no_grad()
def test_outputs_of_the_released_code_are_reproduced_from_its_weights(tmp_path):
    file = Path(__file__).resolve().parents[1] / "golden_data.py"
    spec = importlib.util.spec_from_file_location("golden_data", file)
    golden_data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden_data)
    tensors, sidecar = golden_data.load("model_video1")
    weights = {k.removeprefix("weight."): x.contiguous() for k, x in tensors.items() if k.startswith("weight.")}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(sidecar["hf_config"]))
    model = load(tmp_path, vision_tower=False)
    features = tensors["in.images.0"].flatten(2).transpose(1, 2)
    (ids,) = tensors["gen.input_ids"].tolist()
    at = ids.index(-200)
    count = model.config.num_fast_tokens(*features.shape[:2])
    ids = torch.tensor([[*ids[:at], *[model.config.video_token_id] * count, *ids[at + 1 :]]])
    options = {"max_new_tokens": tensors["gen.attending_ids"].shape[1], "do_sample": False, "eos_token_id": None}
    out = model.generate(ids, video_features=[features], output_logits=True, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences[:, ids.shape[1] :], tensors["gen.attending_ids"])
    logits = torch.stack(out.logits, 1)[..., : len(weights["lm_head.weight"])]
    torch.testing.assert_close(logits, tensors["gen.attending_logits"], atol=2e-4, rtol=0)


def test_float16_is_the_type_unless_another_is_named(directory):
    model = SlowFastVLForConditionalGeneration.from_pretrained(directory)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert load(directory, dtype="bfloat16", vision_tower=False).dtype == torch.bfloat16
    assert load(directory, dtype=None, torch_dtype=torch.float64, vision_tower=False).dtype == torch.float64
    video = frames(1)
    (half,), (exact,) = model.encode_videos([video]), load(directory).encode_videos([video])
    assert half.dtype == torch.float16
    assert (half - exact).abs().max() < 0.02 * exact.abs().max()


@torch.no_grad()
def test_a_device_map_with_layers_on_the_disk(directory, tmp_path):
    model = load(directory, vision_tower=False)
    ids, features = torch.tensor([[5, *[VIDEO] * 2, 6]]), torch.randn(4, 4, DIMS[-1])
    want = model(ids, video_features=[features]).logits
    places = {"language_model.model.layers.0": "disk", "language_model.model.layers.3": "disk"}
    rest = ("mm_projector", "language_model.lm_head")
    rest += tuple(f"language_model.model.{x}" for x in ("embed_tokens", "layers.1", "layers.2", "norm", "rotary_emb"))
    places |= dict.fromkeys(rest, "cpu")
    if not OFFLOADS_STATE_DICTS:
        with pytest.raises(ValueError, match=r"device_map: got 'disk'.*save_pretrained it once"):
            load(directory, vision_tower=False, device_map=places, offload_folder=tmp_path)
        model.save_pretrained(tmp_path / "own")
        placed = SlowFastVLForConditionalGeneration.from_pretrained(
            tmp_path / "own", device_map=places, offload_folder=tmp_path
        )
    else:
        placed = load(directory, vision_tower=False, device_map=places, offload_folder=tmp_path)
    assert placed.hybrid_attentions()[0].cross_attn_kv_proj.weight.is_meta
    torch.testing.assert_close(placed(ids, video_features=[features]).logits, want, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ what is read


def test_missing_keys_are_listed_by_their_stored_names(directory, tmp_path):
    gone = [
        "model.layers.2.self_attn.cross_attn_warm_up_gate",
        "model.mm_projector.2.bias",
        TOWER + "stages.2.blocks.29.weight",
        "lm_head.weight",
    ]
    changed(directory, tmp_path, lambda weights: [weights.pop(key) for key in gone])
    with pytest.raises(ValueError, match="4 keys missing") as raised:
        load(tmp_path)
    assert all(key in str(raised.value) for key in gone)


def test_keys_that_nothing_reads_are_listed(directory, tmp_path):
    extra = [
        "model.image_newline",
        "model.layers.1.self_attn.cross_attn_warm_up_gate",  # no hybrid layer
        TOWER + "stages.3.blocks.3.weight",
        "model.vision_tower.other.weight",
    ]
    changed(directory, tmp_path, lambda weights: weights.update({key: torch.zeros(1) for key in extra}))
    with pytest.raises(ValueError, match="4 keys unexpected") as raised:
        load(tmp_path)
    assert all(key in str(raised.value) for key in extra)


def test_layers_behind_the_selected_one_are_known_and_others_not(tmp_path):
    names, make, stored, _ = TOWERS["siglip"]
    write(tmp_path / "whole", stored(make()), mm_vision_select_layer=-4, **names)
    assert len(load(tmp_path / "whole").vision_tower.encoder.layers) == 9
    beyond = f"{TOWER}vision_model.encoder.layers.12.layer_norm1.bias"
    changed(tmp_path / "whole", tmp_path / "more", lambda weights: weights.update({beyond: torch.zeros(36)}))
    with pytest.raises(ValueError, match=r"1 keys unexpected: .*layers.12.layer_norm1"):
        load(tmp_path / "more")


def test_shapes_are_compared_by_name(directory, tmp_path):
    def change(weights):
        weights["model.norm.weight"] = torch.zeros(33)
        weights["lm_head.weight"] = torch.zeros(300, 31)
        weights[TOWER + "stages.3.blocks.1.weight"] = torch.zeros(5)

    changed(directory, tmp_path, change)
    with pytest.raises(ValueError, match="3 keys of another shape") as raised:
        load(tmp_path)
    assert "model.norm.weight [33] (want [32])" in str(raised.value)
    assert f"{TOWER}stages.3.blocks.1.weight [5] (want [{DIMS[-1]}])" in str(raised.value)


def test_quantised_weights_are_refused(directory, tmp_path):
    def change(weights):
        weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)

    with pytest.raises(ValueError, match=r"norm.weight \(torch.int8\), want floating point"):
        load(changed(directory, tmp_path, change))


def test_a_checkpoint_in_shards(directory, tmp_path):
    weights = load_file(directory / "model.safetensors")
    keys = sorted(weights)
    shards = {f"model-0000{i}-of-00002.safetensors": keys[i - 1 :: 2] for i in (1, 2)}
    for name, members in shards.items():
        save_file({key: weights[key] for key in members}, tmp_path / name)
    index = {"metadata": {}, "weight_map": {key: name for name, members in shards.items() for key in members}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(tmp_path)
    state, other = (load(where, vision_tower=False).state_dict() for where in (directory, tmp_path))
    assert all(torch.equal(state[key], other[key]) for key in state)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mm_use_im_start_end", True, "mm_use_im_start_end: got True"),
        ("mm_patch_merge_type", "spatial_unpad", "mm_patch_merge_type: got 'spatial_unpad'"),
        ("mm_vision_select_feature", "cls_patch", "mm_vision_select_feature: got 'cls_patch'"),
        ("mm_vision_tower", "eva-clip-336", "mm_vision_tower: got 'eva-clip-336', want 'convnext-576'"),
        ("mm_vision_tower", "google/siglip-giant-patch16-384", "want 'convnext-576'"),
        ("mm_vision_tower", "laion/clip-vit-base-patch16", "want 'convnext-576'"),
    ],
)
def test_a_setting_that_is_not_implemented_is_refused_by_its_key_and_file(directory, tmp_path, key, value, message):
    changed(directory, tmp_path, lambda weights: None)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {key: value}))
    with pytest.raises(ValueError, match="config.json: .*" + message):
        load(tmp_path)


# ---------------------------------------------------------------------------------------------------- the vocabulary


@pytest.mark.parametrize("rows", [VOCABULARY - 2, VOCABULARY, 300], ids=["fewer", "as_many", "more"])
@torch.no_grad()
def test_the_vocabulary_is_the_tokenizers_and_the_placeholder(rows, tmp_path):
    weights = language_weights(CONFIG | {"vocab_size": rows})
    write(tmp_path, {}, weights, vocab_size=300)  # config.json may say another number
    model = load(tmp_path, vision_tower=False)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert len(embedding) == len(head) == model.config.text_config.vocab_size == model.vocab_size == VOCABULARY + 1
    assert model.config.video_token_id == VIDEO
    known = min(rows, VOCABULARY)
    for stored, loaded in ((weights["model.embed_tokens.weight"], embedding), (weights["lm_head.weight"], head)):
        assert torch.equal(loaded[:known], stored[:known])
        if rows <= VOCABULARY:
            torch.testing.assert_close(loaded[known:], stored.mean(0).expand(VOCABULARY + 1 - known, -1))
    ids = model.generate(torch.tensor([[5, 6, 7]]), do_sample=True, max_new_tokens=40, eos_token_id=None)
    assert (ids != VIDEO).all()


def test_a_tokenizer_that_has_the_placeholder_keeps_its_id(directory, tmp_path):
    changed(directory, tmp_path, lambda weights: None)
    write_tokenizer(tmp_path, "<image>", "<other>")
    model, processor = load(tmp_path, vision_tower=False), SlowFastVLProcessor.from_pretrained(tmp_path)
    assert model.config.video_token_id == VOCABULARY
    assert model.vocab_size == VOCABULARY + 2
    assert processor.video_token == "<image>"


def test_without_a_tokenizer_the_placeholder_follows_the_stored_rows(directory, tmp_path):
    changed(directory, tmp_path, lambda weights: None)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    model = load(tmp_path, vision_tower=False)
    assert (model.config.video_token_id, model.vocab_size) == (300, 301)
    with pytest.raises(ValueError, match="want the tokenizer's files"):
        SlowFastVLProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_embeddings_are_read_from_either_key(kept, tmp_path):
    weights = language_weights(CONFIG)
    shared = weights.pop("lm_head.weight")
    weights.pop("model.embed_tokens.weight")
    write(tmp_path, {}, weights | {kept: shared}, tie_word_embeddings=True)
    model = load(tmp_path, vision_tower=False)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[:VOCABULARY], shared[:VOCABULARY])


# --------------------------------------------------------------------------------------------- towers kept elsewhere


@pytest.mark.parametrize("two_sided", [False, True])
@torch.no_grad()
def test_a_tower_whose_weights_are_elsewhere_is_read_from_a_directory(two_sided, tmp_path):
    import transformers

    names = {"mm_vision_tower": "google/siglip-so400m-patch14-384", "mm_hidden_size": 32}
    write(tmp_path / "model", {}, **names)
    with pytest.raises(ValueError, match=r"no weights of the siglip tower .*vision_tower=DIRECTORY"):
        load(tmp_path / "model")
    vision = siglip()
    if two_sided:
        text = {"hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        parts = {"text_config": text | {"vocab_size": 9}, "vision_config": vision.config.to_dict()}
        whole = transformers.SiglipModel(transformers.SiglipConfig(**parts))
        whole.vision_model.load_state_dict(getattr(vision, "vision_model", vision).state_dict())
        whole.save_pretrained(tmp_path / "tower")
    else:
        vision.save_pretrained(tmp_path / "tower")
    model = load(tmp_path / "model", vision_tower=tmp_path / "tower")
    video = frames(2)
    want = hidden_state(vision, model.vision_tower.preprocess(video))
    torch.testing.assert_close(model.encode_videos([video])[0], want, atol=1e-5, rtol=1e-5)
    write(tmp_path / "local", {}, **names | {"mm_vision_tower": str(tmp_path / "tower")})
    assert torch.equal(load(tmp_path / "local").encode_videos([video])[0], model.encode_videos([video])[0])


def test_a_checkpoints_own_tower_goes_before_a_directorys(tmp_path):
    names, make, stored, _ = TOWERS["clip"]
    inside, outside = make(), make()
    outside.save_pretrained(tmp_path / "tower")
    write(tmp_path / "model", stored(inside), **names)
    model = load(tmp_path / "model", vision_tower=str(tmp_path / "tower"))
    want = stored(inside)[f"{TOWER}vision_model.pre_layrnorm.weight"]
    assert torch.equal(model.vision_tower.pre_layrnorm.weight, want)


def test_without_its_tower_a_model_takes_features(directory):
    model = load(directory, vision_tower=False)
    assert not hasattr(model, "vision_tower")
    assert model.config.vision_tower is None
    ids = torch.tensor([[5, *[VIDEO] * 2, 6]])
    assert model(ids, video_features=[torch.randn(4, 4, DIMS[-1])]).logits.isfinite().all()
    with pytest.raises(ValueError, match="no vision tower"):
        model.encode_videos([frames()])


def test_a_directory_that_is_no_tower_and_arguments_of_another_kind(directory, tmp_path):
    with pytest.raises(ValueError, match=r"without config.json"):
        load(directory, vision_tower=tmp_path)
    with pytest.raises(ValueError, match=r"model_type 'llava_qwen_slow_fast', want a SigLIP or a CLIP"):
        load(directory, vision_tower=directory)
    with pytest.raises(TypeError, match="vision_tower: got True"):
        load(directory, vision_tower=True)
    load(directory, vision_tower=False).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="not a released one"):
        load(tmp_path, vision_tower=False)


# ----------------------------------------------------------------------------------------- around transformers' own


@every_tower
@torch.no_grad()
def test_it_is_saved_and_loaded_in_our_own_format(tower, tmp_path):
    names, make, stored, _ = TOWERS[tower]
    write(tmp_path, stored(make()), **names)
    model, video = load(tmp_path), frames()
    ids, _ = prompt(model, video)
    model.save_pretrained(tmp_path / "own")
    SlowFastVLProcessor.from_pretrained(tmp_path).save_pretrained(tmp_path / "own")
    again, report = SlowFastVLForConditionalGeneration.from_pretrained(tmp_path / "own", output_loading_info=True)
    assert not any(report.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    want = model(ids, pixel_values_videos=[video]).logits
    assert torch.equal(again(ids, pixel_values_videos=[video]).logits, want)
    talk = [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "What?"}]}]
    made = [
        SlowFastVLProcessor.from_pretrained(where).apply_chat_template(talk, tokenize=True)
        for where in (tmp_path, tmp_path / "own")
    ]
    assert made[0] == made[1]


def test_transformers_auto_classes_know_a_released_directory(directory):
    config = AutoConfig.from_pretrained(directory)
    assert type(config) is SlowFastVLConfig
    assert (config.video_token_id, config.vision_tower["dims"]) == (VIDEO, list(DIMS))
    assert type(AutoProcessor.from_pretrained(directory)) is SlowFastVLProcessor
    model = AutoModelForImageTextToText.from_pretrained(directory, vision_tower=False, min_fast_frames=4)
    assert type(model) is SlowFastVLForConditionalGeneration
    assert model.config.min_fast_frames == 4
    other = load(directory, vision_tower=False, fast_token_temporal_stride=3)
    assert other.config.fast_token_temporal_stride == 3


def test_a_hubs_name_says_where_to_get_the_directory():
    for kind in (SlowFastVLConfig, released.ReleasedConfig):
        with pytest.raises(ValueError, match="snapshot_download"):
            kind.from_dict(CONFIG)


def test_its_generation_config_is_the_models(directory, tmp_path):
    assert load(directory, vision_tower=False).generation_config.eos_token_id == CONFIG["eos_token_id"]
    changed(directory, tmp_path, lambda weights: None)
    written = {"eos_token_id": [258, 256], "pad_token_id": 256, "repetition_penalty": 1.05}
    (tmp_path / "generation_config.json").write_text(json.dumps(written))
    model, info = load(tmp_path, vision_tower=False, output_loading_info=True)
    assert {key: getattr(model.generation_config, key) for key in written} == written
    assert not info["missing_keys"]


# ------------------------------------------------------------------------------------------------------ the real one

SEVEN_B = CONFIG | {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "mm_vision_tower": "convnext-576",
    "mm_hidden_size": 3072,
    "cross_attn_every_n_layers": 8,
    "cross_attn_max_layer_depth": 28,
    "fast_token_temporal_stride": 4,
    "min_fast_frames": 16,
}


def seven_b_shapes():
    """Of the reference model and of timm's own tower, without memory."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        weights = SlowFastForCausalLM(SlowFastConfig.from_official(SEVEN_B)).state_dict()
        weights |= stored_convnext(timm.create_model("convnext_xxlarge"))
    return {key: tuple(x.shape) for key, x in weights.items()}


def test_the_key_list_and_the_shapes_of_the_7b_model_are_read_whole(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(SEVEN_B))
    shapes = seven_b_shapes()
    assert len(shapes) == 339 + 4 * 5 + 4 + 378 + 2  # Qwen2-7B, hybrid layers, projector, ConvNeXt-XXL, its classifier
    monkeypatch.setattr(released, "read_shapes", lambda path: shapes)
    found = released.read_released(tmp_path)
    xxl = {"size": 576, "depths": [3, 4, 30, 3], "dims": [384, 768, 1536, 3072]}
    assert found.config.vision_tower == {"name": "convnext", **xxl}
    assert found.config.hybrid_layers == [0, 8, 16, 24]
    assert found.config.num_fast_tokens(64, 324) == 1296
    assert found.config.video_token_id == 152064
    assert released.num_frames(found.config) == 64

    class AllKeysFitError(Exception):
        pass

    def no_file(path):
        raise AllKeysFitError

    monkeypatch.setattr(released, "read_safetensors", no_file)
    with pytest.raises(AllKeysFitError):
        load(tmp_path)
    del shapes[TOWER + "stages.2.blocks.29.weight"]
    with pytest.raises(ValueError, match=r"1 keys missing: .*stages.2.blocks.29.weight"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("strides", "frames"), [((4, 1), 64), ((6, 1), 96), ((4, 2), 128)], ids=["64-s1t4", "96-s1t6", "128-s2t4"]
)
def test_the_three_released_models_have_1296_fast_tokens(strides, frames):
    keys = ("fast_token_temporal_stride", "fast_token_temporal_sampling_stride")
    strides = dict(zip(keys, strides, strict=True)) | {"min_fast_frames": 16, "mm_video_pooling_stride": 2}
    config = SlowFastVLConfig(mm_hidden_size=3072, vision_tower={"name": "convnext"}, **strides)
    assert released.num_frames(config) == frames
    assert config.num_fast_tokens(frames, 324) == 1296
