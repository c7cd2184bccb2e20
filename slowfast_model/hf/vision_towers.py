"""The towers of the released code: timm's ConvNeXt-XXL, and the SigLIP and CLIP vision models of transformers.

Each takes pixels [n, 3, size, size] and returns features [n, H*W, width]; its ``preprocess`` makes the pixels of uint8
frames as the released code does, on their device. ``settings`` are its arguments, from which it can be built again. Of
the libraries' models only what the features need is kept: no head, no layer behind the selected one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from slowfast_kernels.numbers import as_int

from ..preprocess import Preprocess

OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CONVNEXT_STRIDE = 32  # pixels to a token


def _timm():
    try:
        import timm
    except ImportError as error:
        raise ImportError("vision_tower: 'convnext' needs timm: pip install 'slowfast-kernels[released]'") from error
    except RuntimeError as error:  # of torchvision, which timm imports
        raise ImportError(
            f"vision_tower: 'convnext' needs timm, whose torchvision does not fit torch {torch.__version__} ({error}); "
            "install the torchvision of torch's own index"
        ) from error
    return timm


class ConvNextTower(nn.Module):
    """The last stage of timm's ``convnext_xxlarge``, without its final norm: (size / 32)^2 tokens a frame.

    Frames: shorter edge to ``size``, bicubic; the centre; OpenAI's mean and standard deviation. ``depths`` and
    ``dims`` of the four stages are ConvNeXt-XXL's.
    """

    def __init__(
        self,
        size: int = 576,
        depths: Sequence[int] = (3, 4, 30, 3),
        dims: Sequence[int] = (384, 768, 1536, 3072),
    ) -> None:
        super().__init__()
        size = as_int("size", size, 1)
        if size % CONVNEXT_STRIDE:
            raise ValueError(f"vision_tower: got size {size}, want a multiple of {CONVNEXT_STRIDE}")
        self.settings = {"size": size, "depths": list(depths), "dims": list(dims)}
        self.preprocess = Preprocess(size, keeps_aspect=True, **OPENAI)
        model = _timm().create_model("convnext_xxlarge", num_classes=0, depths=tuple(depths), dims=tuple(dims))
        self.stem, self.stages = model.stem, model.stages

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [n, 3, size, size] -> [n, (size / 32)^2, dims[-1]]."""
        return self.stages(self.stem(pixels)).flatten(2).transpose(1, 2)


class TransformerTower(nn.Module):
    """``hidden_states[select_layer]`` of a vision transformer, without a class token: as LLaVA selects features."""

    def __init__(self, model: nn.Module, select_layer: int) -> None:
        super().__init__()
        inner = getattr(model, "vision_model", model)  # of 4.57
        num_layers = len(inner.encoder.layers)
        used = layers_used(select_layer, num_layers)
        self.embeddings, self.encoder = inner.embeddings, inner.encoder
        self.encoder.layers = self.encoder.layers[:used]
        if hasattr(inner, "pre_layrnorm"):
            self.pre_layrnorm = inner.pre_layrnorm

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [n, 3, image_size, image_size] -> [n, (image_size // patch_size)^2, hidden_size]."""
        hidden = self.embeddings(pixels)
        if hasattr(self, "pre_layrnorm"):
            hidden = self.pre_layrnorm(hidden)
        features = self.encoder(inputs_embeds=hidden).last_hidden_state
        return features[:, 1:] if hasattr(self.embeddings, "class_embedding") else features


def layers_used(select_layer: int, num_layers: int) -> int:
    """How many of its layers ``hidden_states[select_layer]`` needs, which begin with the embeddings.

    Raises:
        ValueError: a layer that there is not.
    """
    layer = as_int("select_layer", select_layer)
    used = layer if layer >= 0 else num_layers + 1 + layer
    if not 1 <= used <= num_layers:
        raise ValueError(f"select_layer: got {layer}, want 1..{num_layers} or {-num_layers}..-1")
    return used


class SiglipTower(TransformerTower):
    """All patches of a ``SiglipVisionModel``; frames are squeezed to a square, bicubic, and brought to -1..1.

    Arguments but ``select_layer``: of ``SiglipVisionConfig``; the defaults are so400m's.
    """

    def __init__(
        self,
        hidden_size: int = 1152,
        intermediate_size: int = 4304,
        num_hidden_layers: int = 27,
        num_attention_heads: int = 16,
        image_size: int = 384,
        patch_size: int = 14,
        select_layer: int = -2,
        hidden_act: str = "gelu_pytorch_tanh",
        layer_norm_eps: float = 1e-6,
    ) -> None:
        sizes = {
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "image_size": image_size,
            "patch_size": patch_size,
            "hidden_act": hidden_act,
            "layer_norm_eps": layer_norm_eps,
        }
        super().__init__(SiglipVisionModel(SiglipVisionConfig(**sizes)), select_layer)
        self.settings = sizes | {"select_layer": select_layer}
        self.preprocess = Preprocess(image_size, keeps_aspect=False, **HALVES)


class ClipTower(TransformerTower):
    """The patches of a ``CLIPVisionModel``, without the class token; frames as for ConvNeXt.

    Arguments but ``select_layer``: of ``CLIPVisionConfig``; the defaults: openai/clip-vit-large-patch14-336's.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        image_size: int = 336,
        patch_size: int = 14,
        select_layer: int = -2,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
    ) -> None:
        sizes = {
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "image_size": image_size,
            "patch_size": patch_size,
            "hidden_act": hidden_act,
            "layer_norm_eps": layer_norm_eps,
        }
        super().__init__(CLIPVisionModel(CLIPVisionConfig(**sizes)), select_layer)
        self.settings = sizes | {"select_layer": select_layer}
        self.preprocess = Preprocess(image_size, keeps_aspect=True, **OPENAI)
