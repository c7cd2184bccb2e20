"""Shapes of ``bench mllama``: text rows of a Llama-3.2-Vision over images' tokens, and the least work of a call."""

from __future__ import annotations

from dataclasses import dataclass, replace

from slowfast_kernels import flops

from .shapes import BYTES, HEADS, Cost, Heads


@dataclass(frozen=True)
class MllamaShape:
    """A Llama-3.2-Vision with ``images`` images of ``tiles`` tiles each and ``text`` rows, which see all of them."""

    text: int
    images: int
    hidden: int
    intermediate: int
    layers: int
    cross_layers: tuple[int, ...]
    heads: Heads
    vocab: int
    image_size: int = 560
    patch: int = 14
    tiles: int = 4

    @property
    def name(self) -> str:
        return f"{self.text}x{self.images}i"

    @property
    def num_vision(self) -> int:
        """Tokens; a tile has one beside its patches."""
        return self.images * self.tiles * ((self.image_size // self.patch) ** 2 + 1)


def mllama_cost(shape: MllamaShape, dtype: str, decode: bool) -> Cost:
    """Prefill of the text rows, or one decoded token after them; keys and values of the images are made at prefill."""
    size, heads, channels = BYTES[dtype], shape.heads, shape.hidden
    width, cross = heads.num_kv * heads.dim, len(shape.cross_layers)
    own = shape.layers - cross
    row_weights = shape.layers * channels * (2 * heads.channels + 3 * shape.intermediate) + own * channels * 2 * width
    image_weights = cross * channels * 2 * width
    new = 1 if decode else shape.text
    pairs = shape.text if decode else shape.text * (shape.text + 1) // 2
    attended = flops.attention(pairs, heads.num_q, heads.dim) * own
    attended += flops.attention(new * shape.num_vision, heads.num_q, heads.dim) * cross
    work = 2.0 * (new * row_weights + channels * shape.vocab) + attended
    read = (row_weights + channels * shape.vocab) * size
    written = new * 2 * width * size * own
    if decode:
        read += (shape.text * own + shape.num_vision * cross) * 2 * width * size
    else:
        work += 2.0 * shape.num_vision * image_weights
        read += (image_weights + shape.num_vision * channels) * size
        written += shape.num_vision * 2 * width * size * cross
    return Cost(work, read, written)


LLAMA_3_2_VISION_11B = MllamaShape(256, 1, 4096, 14336, 40, (3, 8, 13, 18, 23, 28, 33, 38), HEADS["Llama-3-8B"], 128256)
MLLAMA: list[MllamaShape] = [LLAMA_3_2_VISION_11B, replace(LLAMA_3_2_VISION_11B, images=4)]
MLLAMA_ON_CPU: list[MllamaShape] = [
    MllamaShape(24, 2, 64, 96, 4, (1, 3), Heads(4, 2, 16), 512, image_size=32, patch=4, tiles=2)
]
