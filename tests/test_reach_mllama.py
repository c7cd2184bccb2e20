"""Llama-3.2-Vision's cross-attention, transformers' own layer, with our op as its attention.

A row sees a window of images, and of an image the tiles that are used: pieces of a slab, and a range along them. A row
that sees no image attends the whole slab there, padding tiles too, and is masked later: it reads a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from reach_cases import DIM, HEADS, Reading, dense_attention, int32, static_cache_tokens
from targets import FLOAT32
from torch import Tensor

import slowfast_kernels as sk

transformers = pytest.importorskip("transformers", reason="the layer is transformers'")
modeling = pytest.importorskip("transformers.models.mllama.modeling_mllama", reason="this transformers has no mllama")
processing = pytest.importorskip("transformers.models.mllama.processing_mllama", reason="no mllama")
if not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
    pytest.skip("this transformers' mllama takes no other attention", allow_module_level=True)

TEXT, TOKENS, MAX_TILES = 9, 5, 3  # a prompt's rows; a tile's tokens; tiles that an image has room for
IMAGE = 99  # the token id
# Per prompt: where its images stand in the text, and how many tiles of each are used.
PROMPTS = {
    "one image": ({1: 2},),
    "a window moves on, consecutive images go together": ({0: 3, 1: 1, 5: 2},),
    "a batch: images late, none at all, from the start": ({4: 1, 6: 2}, {}, {0: 2}),
}


class Prompts(NamedTuple):
    """A batch as transformers' processor and model prepare it, and what of it each text row reads."""

    mask: Tensor  # [B, 1, n, S], added to the scores there
    row_mask: Tensor  # [B, 1, n, 1]
    reading: Reading
    num_slow: int  # S of the slab [B, S], padding tiles included

    @property
    def sees(self) -> Tensor:
        """bool [B, n, S]; a row that sees no image has zeros there, and so sees everything."""
        return (self.mask == 0)[:, 0]

    def of_cache(self, sequence_stride: int) -> Reading:
        """The same where sequence b begins ``sequence_stride`` tokens after the one before it."""
        pieces = self.reading.slow_pieces
        sequence = pieces[:, :1] // self.num_slow
        return self.reading._replace(slow_pieces=(pieces + sequence * (sequence_stride - self.num_slow)).int())

    def last_rows(self) -> Prompts:
        """The last row of every prompt, as at decode."""
        reading = self.reading
        is_last = reading.text_rows % TEXT == TEXT - 1
        up_to = torch.cat([is_last.new_zeros(1), is_last]).cumsum(0).int()
        last = reading._replace(
            text_rows=reading.text_rows[is_last] // TEXT,
            cu_text=up_to[reading.cu_text.long()],
            slow_begin=reading.slow_begin[is_last],
            slow_end=reading.slow_end[is_last],
        )
        return Prompts(self.mask[:, :, -1:], self.row_mask[:, :, -1:], last, self.num_slow)


def prepared(prompts: tuple[dict[int, int], ...], device: torch.device) -> Prompts:
    ids = [[IMAGE if i in images else 0 for i in range(TEXT)] for images in prompts]
    token_masks = [processing.get_cross_attention_token_mask(row, IMAGE) for row in ids]
    tiles = [list(images.values()) for images in prompts]
    dense = processing.convert_sparse_cross_attention_mask_to_dense(token_masks, tiles, MAX_TILES, TEXT)
    sees = torch.as_tensor(dense, device=device)  # [B, n, images, tiles]
    mask, row_mask = modeling._prepare_cross_attention_mask(sees.float(), TOKENS, torch.float32)
    return Prompts(mask, row_mask, read_by(sees[..., 0].bool(), tiles), mask.shape[-1])


def read_by(sees: Tensor, tiles: list[list[int]]) -> Reading:
    """Two sequences a prompt: its rows that see images [B, n, images], over the used tiles, and the others.

    The others' sequence is the whole slab, which is one piece.
    """
    batch, text, images = sees.shape
    slab = images * MAX_TILES * TOKENS
    pieces, cu_slow, rows, cu_text, begins, ends = [], [0], [], [0], [], []
    for b in range(batch):
        starts = [b * slab + i * MAX_TILES * TOKENS for i in range(len(tiles[b]))]
        used = [count * TOKENS for count in tiles[b]]
        along = torch.tensor([0, *used]).cumsum(0).tolist()
        pieces += [(start, start + length) for start, length in zip(starts, used, strict=True)]
        cu_slow.append(len(pieces))
        pieces.append((b * slab, (b + 1) * slab))
        cu_slow.append(len(pieces))
        windows = [window.nonzero().flatten().tolist() for window in sees[b]]
        for is_seeing in (True, False):
            mine = [i for i in range(text) if bool(windows[i]) is is_seeing]
            rows += [b * text + i for i in mine]
            cu_text.append(len(rows))
            begins += [along[windows[i][0]] if is_seeing else 0 for i in mine]
            ends += [along[windows[i][-1] + 1] if is_seeing else slab for i in mine]
    return Reading(*(int32(x, sees.device) for x in (cu_slow, rows, cu_text, begins, ends, pieces)))


@pytest.fixture(params=PROMPTS.values(), ids=PROMPTS)
def prompts(request) -> tuple[dict[int, int], ...]:
    return request.param


# ------------------------------------------------------------------------------------- the layer and its attention


def tiny_layer(device: torch.device):
    """A decoder layer of random weights, its gates open."""
    sizes = {"hidden_size": HEADS[0] * DIM, "intermediate_size": 32, "vocab_size": 8, "num_hidden_layers": 1}
    config = modeling.MllamaTextConfig(
        **sizes, num_attention_heads=HEADS[0], num_key_value_heads=HEADS[1], cross_attention_layers=[0], pad_token_id=0
    )
    layer = modeling.MllamaCrossAttentionDecoderLayer(config, layer_idx=0).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    return layer.to(device)


@pytest.fixture
def attending(monkeypatch) -> Callable:
    """``attending(layer, function)`` makes ``function(query, key, value, scale)`` that layer's attention.

    It takes [B, H, length, D] and gives [B, n, Hq, D]; without one the layer has its own.
    """

    def attending(layer, function: Callable | None = None):
        def attend(module, query, key, value, attention_mask, scaling, **options):
            return function(query, key, value, scaling), None

        if function is not None:
            monkeypatch.setitem(modeling.ALL_ATTENTION_FUNCTIONS, "reads-slow-tokens", attend)
        layer.cross_attn.config._attn_implementation = "reads-slow-tokens" if function else "eager"
        return layer

    return attending


def through_op(target, reading: Reading, as_tokens: Callable) -> Callable:
    """``as_tokens(x)``: K or V [B, Hkv, S, D] as slow tokens [Ns, Hkv, D]."""

    def attend(query, key, value, scale):
        batch, _, text, _ = query.shape
        q = query.transpose(1, 2).flatten(0, 1)
        kv = as_tokens(key), as_tokens(value)
        context = target.run(sk.text_cross_attention, q, kv, *reading.places, **reading.selection, softmax_scale=scale)
        return torch.zeros_like(q).index_copy(0, reading.text_rows.long(), context).unflatten(0, (batch, text))

    return attend


def under_dense_mask(sees: Tensor) -> Callable:
    """In float64."""

    def attend(query, key, value, scale):
        q, keys, values = (x.transpose(1, 2) for x in (query, key, value))
        return dense_attention(q, keys, values, sees, scale).to(query.dtype)

    return attend


def flat(x: Tensor) -> Tensor:
    """As the projections left it: [B, S, Hkv, D] in memory."""
    return x.transpose(1, 2).flatten(0, 1)


def states(prompts: Prompts, generator, device) -> tuple[Tensor, Tensor]:
    """Text rows [B, n, C] and vision states [B, S, C]."""
    size = (len(prompts.mask), TEXT + prompts.num_slow, HEADS[0] * DIM)
    return torch.randn(size, generator=generator, device=device).split([TEXT, prompts.num_slow], 1)


def assert_close(got: Tensor, want: Tensor, what: str = "output") -> None:
    got, want = got.detach(), want.detach()
    assert (got - want).abs().max() <= 2e-5 * max(1.0, float(want.abs().max())), what


# ------------------------------------------------------------------------------------------------- what is the same


@pytest.mark.parametrize("target", FLOAT32)
def test_its_decoder_layer_gives_its_own_output_and_gradients(target, prompts, attending, rng):
    batch, layer = prepared(prompts, target.device), tiny_layer(target.device)
    hidden, vision = (x.requires_grad_() for x in states(batch, rng(target.device), target.device))
    upstream = torch.randn(hidden.shape, generator=rng(target.device), device=target.device)
    leaves = {"text": hidden, "vision": vision, **dict(layer.named_parameters())}

    def step(attention: Callable | None) -> tuple[Tensor, dict[str, Tensor]]:
        out = attending(layer, attention)(hidden, vision, batch.mask, None, batch.row_mask)
        gradients = torch.autograd.grad(out, list(leaves.values()), upstream)
        return out, dict(zip(leaves, gradients, strict=True))

    out, gradients = step(through_op(target, batch.reading, flat))
    for other in (None, under_dense_mask(batch.sees)):
        want, wanted = step(other)
        assert_close(out, want)
        for name, gradient in gradients.items():
            assert_close(gradient, wanted[name], f"gradient of {name}")
    assert all(bool(gradient.any()) for gradient in gradients.values())


@pytest.mark.parametrize("target", FLOAT32)
def test_its_static_cache_is_read_in_place_at_prefill_and_decode(target, prompts, attending, rng):
    batch, layer = prepared(prompts, target.device), tiny_layer(target.device)
    hidden, vision = states(batch, rng(target.device), target.device)
    capacity = batch.num_slow + 7
    cache = transformers.StaticCache(layer.cross_attn.config, max_cache_len=capacity)
    reading = batch.of_cache(HEADS[1] * capacity)
    with torch.no_grad():
        own = attending(layer)(hidden, vision, batch.mask, None, batch.row_mask)
        prefilled = attending(layer, through_op(target, reading, static_cache_tokens))(
            hidden, vision, batch.mask, None, batch.row_mask, None, cache
        )
        for x in (cache.layers[0].keys, cache.layers[0].values):
            x[:, :, batch.num_slow :] = float("nan")  # what lies beyond the slab is nobody's business
        last = batch.last_rows()
        reading = last.of_cache(HEADS[1] * capacity)
        decoded = attending(layer, through_op(target, reading, static_cache_tokens))(
            hidden[:, -1:], None, last.mask, None, last.row_mask, None, cache
        )
    assert_close(prefilled, own)
    assert_close(decoded, own[:, -1:])


def test_the_prompts_have_rows_that_see_nothing_tiles_that_are_padding_and_windows_that_move():
    batches = [prepared(prompts, torch.device("cpu")) for prompts in PROMPTS.values()]
    assert {bool(x) for batch in batches for x in batch.row_mask.flatten()} == {False, True}
    for batch in batches:
        begin, end = batch.reading.slow_pieces.unbind(1)
        assert ((end - begin) < batch.num_slow).any()
    assert any((batch.reading.slow_begin > 0).any() for batch in batches)
