"""The released towers by themselves: preprocessing as PIL's, layers, sizes, and their place in any model."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import transformers
from ambient import default_type
from families import HYBRID, STRIDES, VIDEO, language_model
from PIL import Image
from released_cases import randomised

from slowfast_model import encode_frames
from slowfast_model.hf import SlowFastVLForConditionalGeneration, add_slow_fast
from slowfast_model.hf.towers import TOWERS, build_tower, tokens_per_frame
from slowfast_model.preprocess import Preprocess

# name, settings, tokens a frame, width
SMALL = {
    "patch": ({"width": 12, "grid": 4, "patch": 6}, 16, 12),
    "convnext": ({"size": 96, "depths": (1, 1, 2, 1), "dims": (4, 6, 8, 12)}, 9, 12),
    "siglip": (
        {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 3}
        | {"image_size": 45, "patch_size": 9},
        25,
        24,
    ),
    "clip": (
        {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 3}
        | {"image_size": 36, "patch_size": 9},
        16,
        24,
    ),
}
every_tower = pytest.mark.parametrize("name", TOWERS)
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def tower_of(name):
    return randomised(build_tower({"name": name, **SMALL[name][0]}))


# ---------------------------------------------------------------------------------------------------- preprocessing


def as_pil(frames, size, keeps_aspect):
    """Levels [n, 3, size, size] of the released code: PIL's bicubic filter, the shorter edge, the centre.

    Rows first, then columns, in two calls: Pillow 13 takes tall pictures the other way round, older ones did not.
    """
    levels = []
    for frame in frames.numpy():
        height, width = frame.shape[:2]
        short = min(height, width)
        new = (int(size * width / short), int(size * height / short)) if keeps_aspect else (size, size)
        rows = Image.fromarray(frame).resize((new[0], height), Image.Resampling.BICUBIC)
        picture = np.asarray(rows.resize(new, Image.Resampling.BICUBIC))
        top, left = ((edge - size) // 2 for edge in picture.shape[:2])
        levels.append(picture[top : top + size, left : left + size])
    return torch.from_numpy(np.stack(levels)).permute(0, 3, 1, 2)


def pictures(height, width):
    """Noise, black and white, and a smooth picture."""
    noise = torch.randint(256, (1, height, width, 3), dtype=torch.uint8)
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 7) * 255, (height, width), mode="bicubic")
    return torch.cat([noise, (noise > 127) * torch.tensor(255, dtype=torch.uint8), smooth_levels(smooth)])


def smooth_levels(smooth):
    return smooth.clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)


def test_pixels_are_float32_whatever_type_is_the_default():
    frames, whole = pictures(20, 30), Preprocess(16, True, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    pixels = whole(frames)
    with default_type(torch.bfloat16):
        again = whole(frames)
    assert pixels.dtype == torch.float32
    assert torch.equal(again, pixels)


@pytest.mark.parametrize("keeps_aspect", [True, False], ids=["shorter_edge", "squeezed"])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(120, 213, 64), (213, 120, 64), (33, 47, 64), (64, 64, 64), (64, 96, 64), (480, 852, 576), (39, 41, 70)],
)
def test_pixels_are_pils_within_two_levels_and_nearly_all_the_same(height, width, size, keeps_aspect):
    frames = pictures(height, width)
    got = Preprocess(size, keeps_aspect, **PLAIN)(frames) * 255
    apart = (got - as_pil(frames, size, keeps_aspect)).abs()
    assert got.shape == (3, 3, size, size)
    assert apart.max() <= 2 + 1e-3
    assert (apart > 0.5).float().mean() < 0.02


@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "SiglipImageProcessor"])
def test_pixels_are_those_of_transformers_processors(kind):
    size = {"shortest_edge": 48} if kind == "CLIPImageProcessor" else {"height": 48, "width": 48}
    crop = {"crop_size": {"height": 48, "width": 48}} if kind == "CLIPImageProcessor" else {}
    made = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    tower = tower_of("clip" if kind == "CLIPImageProcessor" else "siglip")
    rules = tower.preprocess
    frames = pictures(90, 161)
    want = made(size=size, **crop)(list(frames.numpy()), return_tensors="pt")["pixel_values"]
    got = Preprocess(48, rules.keeps_aspect, rules.mean, rules.std)(frames)
    assert (got - want).abs().max() <= (2 / 255) / min(rules.std) + 1e-5
    assert (got - want).abs().mean() < 2e-3


def test_frames_reach_a_tower_in_half_precision_as_whole_levels():
    tower = tower_of("clip").half()
    frames = torch.randint(256, (5, 50, 70, 3), dtype=torch.uint8)
    seen = []
    tower.embeddings.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    features = encode_frames(tower, frames, chunk=2)
    assert [len(x) for x in seen] == [2, 2, 1]
    assert torch.equal(torch.cat(seen), tower.preprocess(frames).half())
    assert features.dtype == torch.float16


# ----------------------------------------------------------------------------------------------------- every tower


@every_tower
@torch.no_grad()
def test_it_can_be_rebuilt_saved_and_loaded_with_any_model(name, tmp_path):
    settings, tokens, width = SMALL[name]
    frames = torch.randint(256, (4, 30, 40, 3), dtype=torch.uint8)
    for tower in (tower_of(name), (name, settings)):
        model = add_slow_fast(language_model(), width, HYBRID, tower, VIDEO, **STRIDES)
        model.save_pretrained(tmp_path)
        again = SlowFastVLForConditionalGeneration.from_pretrained(tmp_path)
        (features,) = again.encode_videos([frames])
        assert torch.equal(features, model.encode_videos([frames])[0])
        assert features.shape == (4, tokens, width)
        assert tokens_per_frame(again.config.vision_tower) == tokens
        assert type(again.vision_tower).__name__ in again._no_split_modules
        assert again.config.vision_tower == model.config.vision_tower


@every_tower
def test_settings_that_it_does_not_take_are_refused(name):
    with pytest.raises(ValueError, match=f"which '{name}' does not take"):
        add_slow_fast(language_model(), 12, HYBRID, (name, {"depth": 3}))


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@torch.no_grad()
def test_the_selected_layer_is_the_librarys_hidden_state(kind):
    config, model = (
        (transformers.SiglipVisionConfig, transformers.SiglipVisionModel)
        if kind == "siglip"
        else (transformers.CLIPVisionConfig, transformers.CLIPVisionModel)
    )
    sizes = SMALL[kind][0]
    library = randomised(model(config(**sizes)))
    pixels = torch.randn(2, 3, sizes["image_size"], sizes["image_size"])
    states = library(pixels, output_hidden_states=True).hidden_states
    inner = getattr(library, "vision_model", library).state_dict()
    for layer in (1, 2, 3, -1, -2, -3):
        tower = build_tower({"name": kind, **sizes, "select_layer": layer}).eval()
        tower.load_state_dict({key: inner[key] for key in tower.state_dict()})
        want = states[layer] if kind == "siglip" else states[layer][:, 1:]
        torch.testing.assert_close(tower(pixels), want, atol=1e-5, rtol=1e-5)
    for layer in (0, 4, -4):
        with pytest.raises(ValueError, match=rf"select_layer: got {layer}, want 1..3 or -3..-1"):
            build_tower({"name": kind, **sizes, "select_layer": layer})


def test_a_size_that_convnext_cannot_cut_is_refused():
    with pytest.raises(ValueError, match="size 100, want a multiple of 32"):
        build_tower({"name": "convnext", "size": 100})


@pytest.mark.parametrize(
    ("module", "message"),
    [("timm", r"needs timm: pip install 'slowfast-kernels\[released\]'"), ("torchvision", "does not fit torch")],
)
def test_without_timm_or_a_torchvision_that_fits_it_says_what_to_install(module, message, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in ("timm", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)

    class Broken:
        """Finds one package, which fails as it does."""

        def find_spec(self, name, path=None, target=None):
            if name == module:
                raise ImportError(f"No module named {module}") if module == "timm" else RuntimeError("no such operator")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ImportError, match=message):
        build_tower({"name": "convnext", **SMALL["convnext"][0]})
