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
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from ..config import SlowFastConfig
from ..transfer import Download, upload


class Counting:
    """Placeholders [B, L] bool, counted in reading order over the batch.

    The counts at the ends of samples travel to the host, where they are checked, while other work is queued.

    ``repeats``: every sample stands so many times in a row and has its videos once.
    """

    def __init__(self, placeholders: Tensor, repeats: int = 1) -> None:
        self.repeats = repeats
        own = placeholders if repeats == 1 else placeholders[::repeats]
        self.up_to = own.flatten().cumsum(0).view(own.shape)
        self._at_ends = None if torch.compiler.is_compiling() else Download(self.up_to[:, -1])

    def check(self, fast_ends: Sequence[int]) -> None:
        """``fast_ends``: placeholders up to the end of each video, 0 first.

        Raises:
            ValueError: placeholders that are not those of the videos, sample by sample (not while compiling).
        """
        if self._at_ends is not None:
            (at_ends,) = self._at_ends.wait()
            _check_counts(at_ends.tolist(), fast_ends)


@dataclass(frozen=True)
class NewVideos:
    """Where the videos of a call lie, of B samples of L rows."""

    pieces: Tensor  # [B, 2] int32: the slow tokens of each sample from and to, in reading order over the batch
    seen: Tensor  # [B, L] int32: slow tokens of the sample's videos that are complete at each row
    fast: Tensor  # [B, L] int64: the fast token of each row that is a placeholder, in reading order; from -1 on

    @classmethod
    def of(cls, counting: Counting, counts: Sequence[tuple[int, int]]) -> NewVideos:
        """``counts``: (fast, slow) tokens of each video.

        Raises:
            ValueError: as ``Counting.check``.
        """
        fast_ends = [0, *accumulate(fast for fast, _ in counts)]
        slow_ends = [0, *accumulate(slow for _, slow in counts)]
        counting.check(fast_ends)
        last, complete = _upload([end - 1 for end in fast_ends[1:]], slow_ends, counting.up_to.device)
        fast = counting.up_to - 1
        seen = complete[torch.searchsorted(last, fast, right=True)]
        pieces = F.pad(seen[:, -1:], (1, 0))
        if len(seen) > 1:
            pieces[1:, 0] = seen[:-1, -1]
            seen = seen - pieces[:, :1]
        found = (pieces, seen, fast)
        return cls(*(x if counting.repeats == 1 else x.repeat_interleave(counting.repeats, 0) for x in found))


def _upload(wide: list[int], narrow: list[int], device: torch.device) -> Sequence[Tensor]:
    """As int64 and as int32."""
    if torch.compiler.is_compiling():
        return torch.tensor(wide, device=device), torch.tensor(narrow, device=device, dtype=torch.int32)
    return upload([np.array(wide, np.int64), np.array(narrow, np.int32)], device)


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


class Places(NamedTuple):
    """Where the pieces and the rows of samples lie: index arguments of ``slowfast_cross_attention`` of shapes alone."""

    cu_pieces: Tensor  # [B + 1] int32
    rows: Tensor  # [B * L] int32, all of the flattened batch
    cu_rows: Tensor  # [B + 1] int32

    @classmethod
    def of(cls, batch: int, length: int, pieces: int, device: torch.device) -> Places:
        """Of ``batch`` samples of ``length`` rows, which read so many pieces each."""
        every = torch.arange(batch * length + 1, device=device, dtype=torch.int32)
        first = every[: batch + 1]
        return cls(first if pieces == 1 else first * pieces, every[:-1], first if length == 1 else first * length)

    def of_one_row(self) -> Places:
        """Of the same samples, with one row each."""
        batch = len(self.cu_rows) - 1
        if len(self.rows) == batch:
            return self
        return Places(self.cu_pieces, self.rows[:batch], self.rows[: batch + 1])


@dataclass
class HeldVideos:
    """What a cache keeps of the videos of its B rows. ``kv`` is shared by rows; the rest follows them."""

    pieces: Tensor  # [B, P, 2] int32: begin and end in ``kv`` of what each row reads, in order
    total: Tensor  # [B] int32: slow tokens that a new row sees
    seen: Tensor  # [B, n] int32: slow tokens of complete videos at each of the first n cached rows; ``total`` after
    kv: dict[int, Tensor] = field(default_factory=dict)  # of each hybrid layer: [Ns, Hkv, 2, D]
    step: Places | None = None  # those of one new row a sample, which every step reads

    @property
    def num_slow(self) -> int:
        """Slow tokens in ``kv``."""
        return next((len(kv) for kv in self.kv.values()), 0)

    def places(self, length: int) -> Places:
        """Of so many new rows a sample."""
        if length == 1 and self.step is not None:
            return self.step
        return Places.of(len(self.total), length, self.pieces.shape[1], self.pieces.device)

    def rows(self, indices: Tensor) -> HeldVideos:
        """Of these rows, in this order."""
        taken = (x.index_select(0, indices.to(x.device)) for x in (self.pieces, self.total, self.seen))
        return self._with(*taken)

    def repeated(self, repeats: int) -> HeldVideos:
        """Every row so many times."""
        taken = (x.repeat_interleave(repeats, 0) for x in (self.pieces, self.total, self.seen))
        return self._with(*taken)

    def cropped(self, length: int) -> HeldVideos:
        """As it was when ``length`` rows were cached: a video that was not complete then is gone."""
        if length >= self.seen.shape[1]:
            return self
        total = self.seen[:, length - 1].clone() if length else torch.zeros_like(self.total)
        begin, end = self.pieces.unbind(-1)
        sizes = end - begin
        kept = (total[:, None] - (sizes.cumsum(1, dtype=sizes.dtype) - sizes)).clamp(min=0).minimum(sizes)
        return self._with(torch.stack([begin, begin + kept], -1), total, self.seen[:, :length])

    def _with(self, pieces: Tensor, total: Tensor, seen: Tensor) -> HeldVideos:
        changed = HeldVideos(pieces, total, seen, self.kv)
        changed.step = self.step if len(total) == len(self.total) else changed.places(1)
        return changed

    @staticmethod
    def after(held: HeldVideos | None, new: NewVideos, past_length: int) -> HeldVideos:
        """``held`` and the videos of a call, whose first row is number ``past_length``; layers add their K and V."""
        piece, total = new.pieces[:, None], new.seen[:, -1]
        if held is None:  # K and V: none yet
            return HeldVideos(piece, total.clone(), F.pad(new.seen, (past_length, 0)) if past_length else new.seen)
        since = held.total[:, None].expand(-1, max(past_length - held.seen.shape[1], 0))
        seen = torch.cat([held.seen, since, held.total[:, None] + new.seen], 1)
        return HeldVideos(torch.cat([held.pieces, held.num_slow + piece], 1), held.total + total, seen)


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

    places: Places
    pieces: Tensor  # [B * P, 2] int32
    begin: Tensor | None  # [B * L] int32; None: 0
    end: Tensor  # [B * L] int32
    tokens: Tensor | None = None  # [Ns, C]: new slow tokens, before a layer's norm
    tokens_are_normalised: bool = False  # each layer has its norm's weight left to multiply
    held: dict[int, Tensor] = field(default_factory=dict)  # K and V of older ones, by layer
    keep: Keeper | None = None  # where a layer puts K and V of all; nothing of this call reads it

    @classmethod
    def of(cls, videos: HeldVideos, begin: Tensor | None, end: Tensor, **rest) -> SlowReading:
        """``begin`` and ``end`` [B, L] int32, among the tokens that a sample of ``videos`` has."""
        ranges = (None if begin is None else begin.flatten(), end.contiguous().flatten())
        return cls(videos.places(end.shape[1]), videos.pieces.flatten(0, 1), *ranges, **rest)

    def on(self, device: torch.device) -> tuple[Places, dict[str, Tensor | None]]:
        """(cu_slow, text_rows, cu_text) and the ranges and pieces, as the op names them."""
        places, begin, end, pieces = self.places, self.begin, self.end, self.pieces
        if end.device != device:  # a layer on another one
            places, end, pieces = Places(*(x.to(device) for x in places)), end.to(device), pieces.to(device)
            begin = None if begin is None else begin.to(device)
        return places, {"slow_begin": begin, "slow_end": end, "slow_pieces": pieces}


def ranges(
    config: SlowFastConfig,
    seen: Tensor,
    before: Tensor | None,
    valid: Tensor | None,
    placeholders: Tensor,
    restarts: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """Begin (None: 0) and end [B, L] of the slow tokens that each row sees, counted in its sample.

    Args:
        config: who attends what.
        seen: [B, L], as in NewVideos.
        before: [B], slow tokens that the cache holds for each sample; None: there is no cache of videos.
        valid: [B, L] bool, False on padding; None: there is none.
        placeholders: [B, L] bool, rows of fast tokens.
        restarts: [B, L] bool, rows that begin another packed sample, which shares nothing with the one before it. None:
            there are none.
    """
    begin, end = None, seen[:, -1:]
    if restarts is not None:
        begin, end = _of_own_segment(restarts, seen)
    if config.causal_slow_tokens:
        end = seen
    if before is not None:
        end = end + before[:, None]
    blind = None if valid is None else ~valid
    if not config.updates_every_row:
        blind = placeholders if blind is None else blind | placeholders
        if config.masks_system_text and not config.causal_slow_tokens and before is None:
            blind = blind | (_visual(placeholders, restarts) == 0)
    if blind is None:
        return begin, end.expand_as(seen)
    return begin, end.masked_fill(blind, 0) if begin is None else torch.where(blind, begin, end)


def _visual(placeholders: Tensor, restarts: Tensor | None) -> Tensor:
    """[B, L]: placeholders of its sample up to each row."""
    visual = placeholders.cumsum(1)
    return visual if restarts is None else visual - _at_segment_start(restarts, visual - placeholders.long())


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
    position_ids: Tensor, attention_mask: Tensor | None, valid: Tensor | None, use_cache: bool | None, like: Tensor
) -> tuple[Tensor | None, Tensor | None, bool | None]:
    """Where packed samples begin [B, L], and the mask and ``use_cache`` with which transformers keeps them apart.

    ``like``: [B, ...], on the device that rows are told apart on.
    """
    if position_ids.dim() != 2 or not (attention_mask is None or attention_mask.dim() == 2):
        return None, attention_mask, use_cache
    goes_on = position_ids[:, 1:] == position_ids[:, :-1] + 1
    restarts = F.pad(~goes_on.to(like.device).expand(len(like), -1), (1, 0))
    if torch.compiler.is_compiling():
        return (restarts if attention_mask is None else None), attention_mask, use_cache
    if not bool(restarts.any()) or not (valid is None or bool(valid.all())):
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
    for tensor in (videos.pieces, videos.total, *videos.places(1), *videos.kv.values()):
        torch._dynamo.mark_static_address(tensor, guard=False)


def held_by(cache: Cache | None) -> HeldVideos | None:
    """The videos that a cache carries."""
    return getattr(cache, "videos", None)


def cached_length(cache: Cache | None) -> int:
    """Rows that a cache holds; it waits for the device where the cache counts there."""
    return 0 if cache is None else int(cache.get_seq_length())
