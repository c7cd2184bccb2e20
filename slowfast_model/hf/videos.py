"""Which slow tokens each row of a call reads, in index tensors of fixed shapes, and what a cache keeps of videos.

Every row of a batch attends; one that must not (padding, fast tokens, text alone) gets an empty range, so that no shape
depends on data. Slow tokens lie in one run over the batch, video after video; a sample's are pieces of it: those that
its cache held, and what is new. Beams and repeated sequences share the pieces of their sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from ..config import SlowFastConfig


@dataclass(frozen=True)
class NewVideos:
    """Where the videos of a call lie, of B samples of L rows."""

    first: Tensor  # [B] int64: the first slow token of each sample, in reading order over the batch
    seen: Tensor  # [B, L] int64: slow tokens of the sample's videos that are complete at each row
    fast: Tensor  # [B, L] int64: the fast token of each row that is a placeholder, in reading order

    @classmethod
    def of(cls, placeholders: Tensor, counts: Sequence[tuple[int, int]], repeats: int = 1) -> NewVideos:
        """``placeholders`` [B, L] bool: rows of fast tokens. ``counts``: (fast, slow) tokens of each video.

        ``repeats``: every sample stands so many times in a row and has its videos once.

        Raises:
            ValueError: placeholders that are not those of the videos, sample by sample (not while compiling).
        """
        own = placeholders[::repeats]
        device = own.device
        up_to = own.flatten().cumsum(0).view(own.shape)
        fast_ends = torch.tensor([0, *accumulate(fast for fast, _ in counts)], device=device)
        slow_ends = torch.tensor([0, *accumulate(slow for _, slow in counts)], device=device)
        if not torch.compiler.is_compiling():
            _check_counts(up_to[:, -1].tolist(), fast_ends.tolist())
        complete = torch.searchsorted(fast_ends[1:].contiguous(), up_to, right=True)
        slow = slow_ends[complete]
        first = F.pad(slow[:-1, -1], (1, 0))
        found = (first, slow - first[:, None], (up_to - 1).clamp(min=0))
        return cls(*(x if repeats == 1 else x.repeat_interleave(repeats, 0) for x in found))


def _check_counts(up_to: list[int], fast_ends: list[int]) -> None:
    """``up_to``: placeholders up to the end of each sample; ``fast_ends``: of each video, 0 first."""
    if up_to[-1] != fast_ends[-1]:
        raise ValueError(
            f"video_features: got {len(fast_ends) - 1} videos, which {fast_ends[-1]} video_token_id stand for, want "
            f"{up_to[-1]} (the number in input_ids; config.num_fast_tokens says how many stand for a video)"
        )
    for sample, count in enumerate(up_to):
        if count not in fast_ends:
            raise ValueError(
                f"input_ids: got {count} video_token_id up to the end of sample {sample}, want all of a video in one "
                f"sample: one of {', '.join(map(str, fast_ends))} (config.num_fast_tokens of each)"
            )


@dataclass
class HeldVideos:
    """What a cache keeps of the videos of its B rows. ``kv`` is shared by rows; the rest follows them."""

    pieces: Tensor  # [B, P, 2] int64: begin and end in ``kv`` of what each row reads, in order
    total: Tensor  # [B] int64: slow tokens that a new row sees
    seen: Tensor  # [B, n] int64: slow tokens of complete videos at each of the first n cached rows; ``total`` after
    kv: dict[int, Tensor] = field(default_factory=dict)  # of each hybrid layer: [Ns, Hkv, 2, D]

    @property
    def num_slow(self) -> int:
        """Slow tokens in ``kv``."""
        return next((len(kv) for kv in self.kv.values()), 0)

    def rows(self, indices: Tensor) -> HeldVideos:
        """Of these rows, in this order."""
        taken = (x.index_select(0, indices.to(x.device)) for x in (self.pieces, self.total, self.seen))
        return HeldVideos(*taken, self.kv)

    def repeated(self, repeats: int) -> HeldVideos:
        """Every row so many times."""
        taken = (x.repeat_interleave(repeats, 0) for x in (self.pieces, self.total, self.seen))
        return HeldVideos(*taken, self.kv)

    def cropped(self, length: int) -> HeldVideos:
        """As it was when ``length`` rows were cached: a video that was not complete then is gone."""
        if length >= self.seen.shape[1]:
            return self
        total = self.seen[:, length - 1] if length else torch.zeros_like(self.total)
        begin, end = self.pieces.unbind(-1)
        sizes = end - begin
        kept = (total[:, None] - (sizes.cumsum(1) - sizes)).clamp(min=0).minimum(sizes)
        return HeldVideos(torch.stack([begin, begin + kept], -1), total, self.seen[:, :length], self.kv)

    @staticmethod
    def after(held: HeldVideos | None, new: NewVideos, past_length: int) -> HeldVideos:
        """``held`` and the videos of a call, whose first row is number ``past_length``; layers add their K and V."""
        total, offset = new.seen[:, -1], 0 if held is None else held.num_slow
        piece = torch.stack([offset + new.first, offset + new.first + total], -1)[:, None]
        if held is None:
            return HeldVideos(piece, total, F.pad(new.seen, (past_length, 0)))  # K and V: none yet
        since = held.total[:, None].expand(-1, max(past_length - held.seen.shape[1], 0))
        seen = torch.cat([held.seen, since, held.total[:, None] + new.seen], 1)
        return HeldVideos(torch.cat([held.pieces, piece], 1), held.total + total, seen)


# ----------------------------------------------------------------------------------------------- what rows read


class Keeper:
    """Where layers put K and V. No dataclass and no dict: fully_shard copies those when it casts a layer's inputs."""

    def __init__(self, kv: dict[int, Tensor]) -> None:
        self.kv = kv


@dataclass
class SlowReading:
    """What the hybrid layers of one call read: the index arguments of ``slowfast_cross_attention``, and the tokens.

    It travels through the decoder as a keyword argument. Rows are those of the flattened batch, all of them.
    """

    cu_pieces: Tensor  # [B + 1] int32
    pieces: Tensor  # [B * P, 2] int32
    rows: Tensor  # [B * L] int32
    cu_rows: Tensor  # [B + 1] int32
    begin: Tensor  # [B * L] int32
    end: Tensor  # [B * L] int32
    tokens: Tensor | None = None  # [Ns, C]: new slow tokens, before a layer's norm
    tokens_are_normalised: bool = False  # each layer has its norm's weight left to multiply
    held: dict[int, Tensor] = field(default_factory=dict)  # K and V of older ones, by layer
    keep: Keeper | None = None  # where a layer puts K and V of all; nothing of this call reads it

    @classmethod
    def of(cls, pieces: Tensor, begin: Tensor, end: Tensor, **rest) -> SlowReading:
        """``pieces`` [B, P, 2], ``begin`` and ``end`` [B, L], all of int64."""
        batch, length = begin.shape
        every = torch.arange(batch + 1, device=begin.device, dtype=torch.int32)
        rows = torch.arange(batch * length, device=begin.device, dtype=torch.int32)
        ranges = (begin.flatten().int(), end.flatten().int())
        return cls(every * pieces.shape[1], pieces.flatten(0, 1).int(), rows, every * length, *ranges, **rest)

    def on(self, device: torch.device) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """(cu_slow, text_rows, cu_text) and the ranges and pieces, as the op names them."""
        places = (self.cu_pieces, self.rows, self.cu_rows)
        ranges = {"slow_begin": self.begin, "slow_end": self.end, "slow_pieces": self.pieces}
        return tuple(x.to(device) for x in places), {name: x.to(device) for name, x in ranges.items()}


def ranges(
    config: SlowFastConfig,
    seen: Tensor,
    before: Tensor | None,
    valid: Tensor,
    placeholders: Tensor,
    restarts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Begin and end [B, L] of the slow tokens that each row sees, counted in its sample.

    Args:
        config: who attends what.
        seen: [B, L], as in NewVideos.
        before: [B], slow tokens that the cache holds for each sample; None: there is no cache of videos.
        valid: [B, L] bool, False on padding.
        placeholders: [B, L] bool, rows of fast tokens.
        restarts: [B, L] bool, rows that begin another packed sample, which shares nothing with the one before it. None:
            there are none.
    """
    begin, end = torch.zeros_like(seen), seen[:, -1:].expand_as(seen)
    visual = placeholders.cumsum(1)
    if restarts is not None:
        begin, end = _of_own_segment(restarts, seen)
        visual = visual - _at_segment_start(restarts, visual - placeholders.long())
    attends = valid
    if not config.updates_every_row:
        attends = attends & ~placeholders
        if config.masks_system_text and not config.causal_slow_tokens and before is None:
            attends = attends & (visual > 0)
    if config.causal_slow_tokens:
        end = seen
    if before is not None:
        end = end + before[:, None]
    return begin, torch.where(attends, end, begin)


def _at_segment_start(restarts: Tensor, values: Tensor) -> Tensor:
    """Of ``values`` [B, L], which do not fall along a row, the one where each row's segment began; 0 in the first."""
    return torch.where(restarts, values, 0).cummax(1).values


def _of_own_segment(restarts: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Slow tokens complete before and at the end of the packed sample that each row belongs to."""
    before = F.pad(seen[:, :-1], (1, 0))
    begin = _at_segment_start(restarts, before)
    total = seen[:, -1:]
    ends = torch.cat([torch.where(restarts, before, total)[:, 1:], total], 1)
    return begin, ends.flip(1).cummin(1).values.flip(1)


def packed(
    position_ids: Tensor, attention_mask: Tensor | None, valid: Tensor, use_cache: bool | None
) -> tuple[Tensor | None, Tensor | None, bool | None]:
    """Where packed samples begin [B, L], and the mask and ``use_cache`` with which transformers keeps them apart."""
    if position_ids.dim() != 2 or not (attention_mask is None or attention_mask.dim() == 2):
        return None, attention_mask, use_cache
    goes_on = position_ids[:, 1:] == position_ids[:, :-1] + 1
    restarts = torch.cat([torch.zeros_like(valid[:, :1]), ~goes_on.to(valid.device).expand(len(valid), -1)], 1)
    if torch.compiler.is_compiling():
        return (restarts if attention_mask is None else None), attention_mask, use_cache
    if not bool(restarts.any()) or not bool(valid.all()):
        return None, attention_mask, use_cache
    return restarts, None, False


# ------------------------------------------------------------------------------------------------------ caches


class _Carrier:
    """Mixed into the class of a cache that carries videos: what is done to its rows is done to theirs."""

    videos: HeldVideos | None = None

    def reset(self):
        super().reset()
        self.videos = None

    def reorder_cache(self, beam_idx: Tensor):
        super().reorder_cache(beam_idx)
        if self.videos is not None:
            self.videos = self.videos.rows(beam_idx)

    def batch_select_indices(self, indices: Tensor):
        super().batch_select_indices(indices)
        if self.videos is not None:
            rows = torch.arange(len(self.videos.total), device=indices.device)[indices]  # a mask is an index too
            self.videos = self.videos.rows(rows)

    def batch_repeat_interleave(self, repeats: int):
        super().batch_repeat_interleave(repeats)
        if self.videos is not None:
            self.videos = self.videos.repeated(repeats)

    def crop(self, tokens: int):
        """``tokens`` means another thing in every version of transformers; what it did is the same."""
        super().crop(tokens)
        if self.videos is not None:
            self.videos = self.videos.cropped(int(self.get_seq_length()))

    def __reduce_ex__(self, protocol):
        return _new_carrier, (self._plain_class,), self.__dict__


def _new_carrier(plain_class: type[Cache]) -> Cache:
    made = carrier_class(plain_class)
    return made.__new__(made)


_CARRIERS: dict[type[Cache], type[Cache]] = {}


def carrier_class(plain_class: type[Cache]) -> type[Cache]:
    """The subclass of a class of caches that carries videos; the same one each time, and its instances pickle."""
    if plain_class not in _CARRIERS:
        names = {"_plain_class": plain_class, "__doc__": plain_class.__doc__, "__module__": plain_class.__module__}
        _CARRIERS[plain_class] = type(plain_class.__name__, (_Carrier, plain_class), names)
    return _CARRIERS[plain_class]


DynamicVideoCache = carrier_class(DynamicCache)


def carry_videos(cache: Cache) -> None:
    """Let a cache of any class carry videos: it becomes an instance of its class's ``carrier_class``.

    While compiling, which cannot change a class, it does so when a method is called that videos must hear of.
    """
    if isinstance(cache, _Carrier):
        return
    if torch.compiler.is_compiling():
        for name in _HEARD:
            setattr(cache, name, partial(_call_as_carrier, cache, name))
        return
    for name in _HEARD:
        vars(cache).pop(name, None)
    cache.__class__ = carrier_class(type(cache))


_HEARD = ("reset", "reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop")  # of _Carrier


def _call_as_carrier(cache: Cache, name: str, *args, **kwargs):
    carry_videos(cache)
    return getattr(cache, name)(*args, **kwargs)


def fix_addresses(videos: HeldVideos) -> None:
    """Let compiled decode steps read what a cache keeps of videos where it lies.

    A CUDA graph copies its inputs, K and V of all slow tokens at every step, but for those that are marked; where they
    lie elsewhere after another prefill, the graph is recorded again. transformers marks its static caches alike.
    """
    for tensor in (videos.pieces, videos.total, *videos.kv.values()):
        torch._dynamo.mark_static_address(tensor, guard=False)


def held_by(cache: Cache | None) -> HeldVideos | None:
    """The videos that a cache carries."""
    return getattr(cache, "videos", None)


def cached_length(cache: Cache | None) -> int:
    """Rows that a cache holds; it waits for the device where the cache counts there."""
    return 0 if cache is None else int(cache.get_seq_length())
