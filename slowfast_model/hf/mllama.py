"""Llama-3.2-Vision's text cross-attention (transformers' mllama) through ``text_cross_attention``, over its own cache.

There a text row attends, under a dense mask, the used tiles of a window of images; a row that sees no image attends the
whole slab. Here a sample's tokens are read twice, as pieces: the tiles that some row sees, of which a row's window is a
range, and then the whole slab. Shapes are those of the mask; nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

import slowfast_kernels as sk

from ..layers import compute_dtype
from .attention import ReplacedAttention, StandIn, subclass_of

NAME = "slowfast-windows"  # of our function in the AttentionInterface


class MaskedCrossAttention(ReplacedAttention):
    """mllama's cross-attention by our function."""

    def forward(self, *args, **kwargs):
        """The model's own."""
        return StandIn(self, NAME).forward(*args, **kwargs)


def accelerate_cross_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Run the text cross-attention of transformers' mllama through ``text_cross_attention``; returns ``model``.

    Weights, caches and everything else stay its own, and so do its answers. Calls that the op does not serve take the
    attention that the model had: dropout in training, masks that are no windows (looked at outside of torch.compile; in
    it, more than one row a sample), and ``output_attentions``.

    Args:
        model: an MllamaForConditionalGeneration, or a model around one; changed in place.

    Raises:
        ValueError: a model without mllama's cross-attention or without a vision configuration.
        TypeError: no model of transformers.
    """
    from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: got {type(model).__name__}, want a model of transformers")
    vision = getattr(model.config, "vision_config", None)
    layers = [module for module in model.modules() if isinstance(module, MllamaTextCrossAttention)]
    if not layers or vision is None:
        raise ValueError(f"model: got {type(model).__name__}, want an MllamaForConditionalGeneration")
    for attention in layers:
        if not isinstance(attention, MaskedCrossAttention):
            attention.__class__ = subclass_of(type(attention), MaskedCrossAttention)
        attention._tile = (vision.image_size // vision.patch_size) ** 2 + 1  # tokens, the class token among them
    return model


@dataclass
class _Windows:
    """What each row of a batch sees, in tokens of its sample: the op's arguments but for where the samples lie."""

    begin: Tensor  # [B * n] int32
    end: Tensor  # [B * n] int32
    tiles: Tensor  # [B, P, 2] int64: pieces, counted from the sample's first token
    are_exact: bool | None  # None: not looked at
    placed: dict = field(default_factory=dict)  # ``arguments`` that were formed before

    def arguments(self, apart: int, device: torch.device) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """(cu_slow, text_rows, cu_text) and the ranges and pieces; from sample to sample it is ``apart`` tokens."""
        key = (apart, device)
        if key not in self.placed:
            batch, pieces = self.tiles.shape[:2]
            starts = torch.arange(batch, device=self.tiles.device)[:, None, None] * apart
            every = torch.arange(batch + 1, dtype=torch.int32, device=device)
            rows = torch.arange(len(self.begin), dtype=torch.int32, device=device)
            selection = {"slow_begin": self.begin, "slow_end": self.end}
            selection["slow_pieces"] = (self.tiles + starts).flatten(0, 1).int()
            places = (every * pieces, rows, every * (len(rows) // batch))
            self.placed[key] = places, {name: x.to(device) for name, x in selection.items()}
        return self.placed[key]


def _everything(batch: int, rows: int, tokens: int, device: torch.device) -> _Windows:
    """Of no mask: each row sees all."""
    begin = torch.zeros(batch * rows, dtype=torch.int32, device=device)
    return _Windows(begin, torch.full_like(begin, tokens), _whole(batch, tokens, device), True)


def _whole(batch: int, tokens: int, device: torch.device) -> Tensor:
    """[B, 1, 2]: one piece of each sample, all of it."""
    return F.pad(torch.full((batch, 1, 1), tokens, device=device), (1, 0))


def _windows(mask: Tensor, batch: int, rows: int, tokens: int, tile: int, look: bool) -> _Windows | None:
    """Of an additive ``mask`` [B, 1, n, S], 0 on what is seen; None where it says nothing by tiles."""
    device = mask.device
    if tokens % tile or mask.shape[1] != 1 or mask.shape[-1] != tokens:
        return None
    sees = mask[:, 0, :, ::tile] == 0  # [B, n, tiles]
    sees_all = sees.all(-1)
    chosen = sees & ~sees_all[..., None]
    used = chosen.any(1)  # [B, tiles]
    rank = used.long().cumsum(1)  # used tiles up to and with this one
    count = chosen.long().cumsum(2)
    first = ((count == 1) & chosen).long()
    begin = (first * (rank - 1)[:, None]).sum(2)
    end = (chosen.long() * rank[:, None]).amax(2)
    total = rank[:, -1:]
    begin, end = (torch.where(sees_all, x, y * tile) for x, y in ((total * tile, begin), (total * tile + tokens, end)))
    starts = torch.arange(0, tokens, tile, device=device).expand(batch, -1)
    tiles = torch.stack([starts, starts + used.long() * tile], -1)
    exact = None
    if look:
        window = torch.where(sees_all, tokens, count[..., -1] * tile) == end - begin
        in_tiles = (mask[:, 0].unflatten(-1, (-1, tile)) == 0) == sees[..., None]
        hides = (mask[:, 0] == 0) | (mask[:, 0] <= torch.finfo(mask.dtype).min / 2)
        exact = bool(window.all() & in_tiles.all() & hides.all())
    return _Windows(
        begin.flatten().int(), end.flatten().int(), torch.cat([tiles, _whole(batch, tokens, device)], 1), exact
    )


def _as_tokens(keys: Tensor, values: Tensor) -> tuple[tuple[Tensor, Tensor], int]:
    """K and V [B, Hkv, S, D] as slow tokens [Ns, Hkv, D], and how many lie from one sample's first to the next's.

    In place where their strides allow it and no gradient is wanted, as of a cache; virtual tokens may overlap then.
    """
    batch, heads, tokens, dim = keys.shape
    if not (torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)):
        (sample, _, token, one), same = keys.stride(), keys.stride() == values.stride()
        if same and one == 1 and token and sample % token == 0:
            apart = sample // token
            size = ((batch - 1) * apart + tokens, heads, dim)
            strides = (token, keys.stride(1), 1)
            return tuple(x.as_strided(size, strides) for x in (keys, values)), apart
    return tuple(x.transpose(1, 2).flatten(0, 1) for x in (keys, values)), tokens


def attend(module: StandIn, query, key, value, attention_mask, **kwargs):
    """Our function of the interface: query [B, Hq, n, D], key and value [B, Hkv, S, D] -> [B, n, Hq, D]."""
    compiling = torch.compiler.is_compiling()
    batch, _, rows, _ = query.shape
    windows = None
    # Several rows without a mask are causal by sdpa and not by eager: the model's own affair.
    is_plain = not kwargs.get("dropout") and not kwargs.get("output_attentions")
    if is_plain and (rows == 1 or (not compiling and attention_mask is not None)):
        sizes = batch, rows, key.shape[2]
        if attention_mask is None:
            windows = _everything(*sizes, query.device)
        else:
            windows = _remembered(attention_mask, *sizes, module._module._tile, not compiling)
    if windows is None or windows.are_exact is False:
        return module.attend_as_chosen(query, key, value, attention_mask, **kwargs)
    module._has_attended = True
    own_type = compute_dtype(query.dtype, query.device)  # to which autocast brings the arguments of SDPA
    query, key, value = (x.to(own_type) for x in (query, key, value))
    tokens, apart = _as_tokens(key, value)
    places, selection = windows.arguments(apart, query.device)
    context = sk.text_cross_attention(
        query.transpose(1, 2).flatten(0, 1), tokens, *places, **selection, softmax_scale=kwargs.get("scaling")
    )
    return context.unflatten(0, (batch, rows)), None


def _remembered(mask: Tensor, *rest) -> _Windows | None:
    """``_windows``, once a mask: every layer of a forward pass is given the same one."""
    if torch.compiler.is_compiling():
        return _windows(mask, *rest)
    key = (None if mask.is_inference() else mask._version, rest)  # an inference tensor has no version
    found = getattr(mask, "_slowfast_windows", None)
    if found is None or found[0] != key:
        found = mask._slowfast_windows = (key, _windows(mask, *rest))
    return found[1]


AttentionInterface.register(NAME, attend)
