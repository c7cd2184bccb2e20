"""From a batch of prompts to the expanded, right-padded layout that the decoder runs on, in Python and index tensors.

Every -200 in a prompt gives way to its video's fast tokens. The layout says where each row's embedding comes from, what
kind of token it is, and which rows attend the slow tokens. Padding of the input, on either side, is dropped here, so
that the decoder needs no padding mask: with padding on the right, causality hides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from slowfast_kernels.ops.checks import check_dense

from .transfer import Download, upload

IMAGE_TOKEN_INDEX = -200
IGNORE_INDEX = -100
PROMPT, RESPONSE, VISUAL, PADDING = 1, 2, 3, 4  # the released code's token types
ID_DTYPES = (torch.int64, torch.int32)
MASK_DTYPES = (torch.bool, *ID_DTYPES, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Layout:
    """B samples of L' rows. Index tensors are on the model's device."""

    text_ids: Tensor  # [n] ids of all text tokens, sample by sample
    source: Tensor  # [B, L'] row of cat(text embeddings, fast tokens, one zero row for padding)
    token_types: Tensor  # [B, L'] PROMPT, RESPONSE, VISUAL or PADDING
    labels: Tensor | None  # [B, L'] IGNORE_INDEX on visual and padding rows
    lengths: list[int]  # valid rows of each sample
    slow_lengths: list[int]  # slow tokens of each sample
    cu_slow: Tensor  # [B + 1] int32
    text_rows: Tensor  # [Nt] int32: rows of the flattened layout that attend slow tokens
    cu_text: Tensor  # [B + 1] int32
    slow_end: Tensor | None  # [Nt] int32: each sees so many slow tokens of its sample. None: each sees all

    @property
    def attention_mask(self) -> Tensor:
        """[B, L'] bool, True on valid rows."""
        return self.token_types != PADDING


def _check_batch(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, device: torch.device) -> None:
    """Everything but values: tensors of one shape, of integers, that can be read."""
    given = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    given = {name: x for name, x in given.items() if x is not None or name == "input_ids"}
    for name, x in given.items():
        check_dense(name, x, "[B, L]")
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids: got shape {list(input_ids.shape)}, want [B, L] with at least one token a sample")
    for name, x in given.items():
        if x.shape != input_ids.shape:
            raise ValueError(
                f"{name}: got shape {list(x.shape)}, want {list(input_ids.shape)} (the shape of input_ids)"
            )
        if name == "attention_mask":
            if x.dtype not in MASK_DTYPES:
                raise TypeError(
                    f"attention_mask: got {x.dtype}, want bool or integers: True or 1 on tokens, False or 0 on padding "
                    "(an additive mask means the reverse)"
                )
        elif x.dtype not in ID_DTYPES:
            raise TypeError(f"{name}: got {x.dtype}, want int64 or int32")
        if x.device.type != "cpu" and (x.device.type == "meta" or x.device != device):
            raise ValueError(f"{name}: got a tensor on {x.device}, want it on the model's device or on the CPU")


class Prompts:
    """A batch of prompts whose values come to the host while its GPU goes on. On a CPU they are there.

    Args:
        input_ids: [B, L] int64 or int32; -200 stands for a video or an image. Any number of them a sample, or none.
        attention_mask: [B, L] bool or integers, 1 on tokens and 0 on padding, wherever it is. None: no padding.
        labels: [B, L] int64 or int32 token ids, -100 where there is no target; not read on padding and on -200. None:
            no targets, every text token is a prompt token.
        device: where they are laid out, the model's. The others are there or on the CPU. None: where the ids are.

    Raises:
        ValueError: shapes that differ, another device.
        TypeError: not a dense tensor; ids or labels that are not int64 or int32; a floating (additive) mask.
    """

    def __init__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.device, self.has_labels = device or input_ids.device, labels is not None
        _check_batch(input_ids, attention_mask, labels, self.device)
        self._download = Download(input_ids, attention_mask, labels)

    def selected(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Ids and labels int64 of each sample without padding. Waits for them and for nothing queued since."""
        return _selected(*self._download.wait())


def _selected(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> tuple[list, list]:
    ids = _values(input_ids).astype(np.int64, copy=False)
    targets = np.full_like(ids, IGNORE_INDEX) if labels is None else _values(labels).astype(np.int64, copy=False)
    if attention_mask is None:
        return list(ids), list(targets)
    keep = _mask(_values(attention_mask))
    for b, row in enumerate(keep):
        if not row.any():
            raise ValueError(f"attention_mask: got no selected token in row {b}, want at least one")
    return [row[k] for row, k in zip(ids, keep, strict=True)], [row[k] for row, k in zip(targets, keep, strict=True)]


def _values(x: Tensor) -> np.ndarray:
    """Those of the host. A wrapper, a function transform's or a subclass, has no memory, but can be listed."""
    if type(x) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(x):
        return x.numpy()
    return np.array(x.tolist())


def _mask(mask: np.ndarray) -> np.ndarray:
    """Integers 0 and 1 as bool."""
    keep = mask.astype(bool)
    wrong = mask[mask != keep]
    if len(wrong):
        raise ValueError(f"attention_mask: got {wrong[0]}, want 1 on tokens and 0 on padding")
    return keep


def _check_values(samples: list[np.ndarray], targets: list[np.ndarray], vocab_size: int, num_videos: int) -> None:
    flat, wanted = np.concatenate(samples), np.concatenate(targets)
    text = flat != IMAGE_TOKEN_INDEX
    markers = int((~text).sum())
    if markers != num_videos:
        raise ValueError(
            f"frame_features: got {num_videos} videos, want {markers} (one for each {IMAGE_TOKEN_INDEX} in input_ids "
            "that attention_mask selects)"
        )
    wrong = flat[((flat < 0) | (flat >= vocab_size)) & text]
    if len(wrong):
        raise ValueError(f"input_ids: got {wrong[0]}, want 0..{vocab_size - 1} or {IMAGE_TOKEN_INDEX} for a video")
    # not read where a video stands: labels are often copied from the ids
    wrong = wanted[((wanted < 0) | (wanted >= vocab_size)) & (wanted != IGNORE_INDEX) & text]
    if len(wrong):
        raise ValueError(f"labels: got {wrong[0]}, want 0..{vocab_size - 1} or {IGNORE_INDEX} for no target")


def _prefix_sums(counts: Sequence[int]) -> np.ndarray:
    return np.array([0, *accumulate(counts)], np.int32)


def attending_rows(
    token_types: np.ndarray, *, every_row: bool = False, mask_system: bool = False, slow_end: np.ndarray | None = None
) -> np.ndarray:
    """Rows of one sample, token types [n], that attend its slow tokens; none if it has no visual token.

    ``slow_end`` [n]: how many slow tokens are there for each row; rows without any attend none. It says more than
    ``mask_system``, which then does not matter.
    """
    visual = token_types == VISUAL
    attends = token_types != PADDING
    attends &= visual.any() if slow_end is None else slow_end > 0
    if not every_row:
        attends &= ~visual
        if mask_system and slow_end is None:
            attends &= visual.cumsum() > 0
    return attends.nonzero()[0]


def splice(
    prompts: Prompts,
    videos: Sequence[tuple[int, int]],
    *,
    vocab_size: int,
    every_row: bool = False,
    mask_system: bool = False,
    causal: bool = False,
    held: Sequence[int] | None = None,
) -> Layout:
    """Lay out a batch, or what goes on from one.

    Args:
        prompts: the batch.
        videos: (fast tokens, slow tokens) of each video, in reading order over the batch.
        every_row: all-to-media; visual rows attend slow tokens too.
        mask_system: text before a sample's first visual token attends nothing.
        causal: text sees the slow tokens of videos before it, as visual rows do (where these attend at all); a video's
            last fast token sees its own too. False: every row sees those of all videos.
        held: slow tokens that each sample has from before these prompts, which go on from there. None: a beginning.

    Raises:
        ValueError: a sample with no token, an id or a label outside the vocabulary, a mask of values other than 0 and
            1, a number of videos that is not the number of -200.
    """
    samples, targets = prompts.selected()
    _check_values(samples, targets, vocab_size, len(videos))
    counts = np.array(videos, np.int64).reshape(-1, 2)

    is_video = [ids == IMAGE_TOKEN_INDEX for ids in samples]
    text_ids = np.concatenate([ids[~video] for ids, video in zip(samples, is_video, strict=True)])
    next_text, next_fast, next_video = 0, len(text_ids), 0
    sources, types, new_labels, slow_lengths, attending, ends = [], [], [], [], [], []
    whole = True  # every row that attends sees all slow tokens of its sample
    for video, target, before in zip(is_video, targets, held or [0] * len(samples), strict=True):
        num_fast, num_slow = counts[next_video : next_video + int(video.sum())].T
        rows, new = np.ones_like(target), np.zeros_like(target)  # rows and slow tokens that a token gives way to
        rows[video], new[video] = num_fast, num_slow
        visual = video.repeat(rows)
        label = np.where(video, IGNORE_INDEX, target).repeat(rows)
        kind = np.where(label == IGNORE_INDEX, PROMPT, RESPONSE)
        kind[visual] = VISUAL
        end_text, end_fast = next_text + len(video) - len(num_fast), next_fast + int(num_fast.sum())
        source = np.empty_like(label)
        source[~visual], source[visual] = np.arange(next_text, end_text), np.arange(next_fast, end_fast)
        next_text, next_fast, next_video = end_text, end_fast, next_video + len(num_fast)
        slow = before + int(num_slow.sum())
        if causal:
            slow_end = (before + new.cumsum() - new).repeat(rows)
            slow_end[rows.cumsum()[video] - 1] += num_slow  # a video's last row sees its own
        else:
            slow_end = np.full_like(kind, slow)
        limit = slow_end if causal or held is not None else None
        attends = attending_rows(kind, every_row=every_row, mask_system=mask_system, slow_end=limit)
        sources.append(source)
        types.append(kind)
        new_labels.append(label)
        slow_lengths.append(slow - before)
        attending.append(attends)
        ends.append(slow_end[attends])
        whole &= bool((ends[-1] == slow).all())

    width = max(map(len, types))
    arrays = {
        "text_ids": text_ids,
        "source": _padded(sources, next_fast),
        "token_types": _padded(types, PADDING),
        "labels": _padded(new_labels, IGNORE_INDEX) if prompts.has_labels else None,
        "cu_slow": _prefix_sums(slow_lengths),
        "text_rows": np.concatenate([rows + b * width for b, rows in enumerate(attending)]).astype(np.int32),
        "cu_text": _prefix_sums([len(rows) for rows in attending]),
        "slow_end": None if whole else np.concatenate(ends).astype(np.int32),
    }
    index_tensors = dict(zip(arrays, upload(arrays.values(), prompts.device), strict=True))
    return Layout(lengths=[len(kind) for kind in types], slow_lengths=slow_lengths, **index_tensors)


def _padded(samples: list[np.ndarray], value: int) -> np.ndarray:
    """[B, most], with ``value`` behind the shorter ones."""
    whole = np.full((len(samples), max(map(len, samples))), value)
    for row, sample in zip(whole, samples, strict=True):
        row[: len(sample)] = sample
    return whole


def decode_rows(slow_lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """text_rows and cu_text of a decode step: one row a sample, which attends if the sample has slow tokens."""
    attends = [int(count > 0) for count in slow_lengths]
    rows = np.array([b for b, yes in enumerate(attends) if yes], np.int32)
    return tuple(upload([rows, _prefix_sums(attends)], device))
