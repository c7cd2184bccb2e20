"""From a batch of prompts to the expanded, right-padded layout that the decoder runs on, in Python and index tensors.

Every -200 in a prompt gives way to its video's fast tokens. The layout says where each row's embedding comes from, what
kind of token it is, and which rows attend the slow tokens. Padding of the input, on either side, is dropped here, so
that the decoder needs no padding mask: with padding on the right, causality hides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from slowfast_kernels.ops.checks import check_dense

from .transfer import ON_HOST, Download, to_device

IMAGE_TOKEN_INDEX = -200
IGNORE_INDEX = -100
PROMPT, RESPONSE, VISUAL, PADDING = 1, 2, 3, 4  # the released code's token types
ID_DTYPES = (torch.int64, torch.int32)
MASK_DTYPES = (torch.bool, *ID_DTYPES, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Layout:
    """B samples of L' rows. Index tensors are on the model's device."""

    text_ids: Tensor  # [n] ids of all text tokens, sample by sample
    source: Tensor  # [B, L'] row of cat(text embeddings, fast tokens, one zero row)
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

    def selected(self) -> tuple[list[Tensor], list[Tensor]]:
        """Ids and labels of each sample without padding, on the CPU. Waits for them and for nothing queued since."""
        return _selected(*self._download.wait())


def _selected(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> tuple[list, list]:
    ids = input_ids.long()
    keep = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else _mask(attention_mask)
    targets = torch.full_like(ids, IGNORE_INDEX) if labels is None else labels.long()
    for b, row in enumerate(keep):
        if not row.any():
            raise ValueError(f"attention_mask: got no selected token in row {b}, want at least one")
    return [row[k] for row, k in zip(ids, keep, strict=True)], [row[k] for row, k in zip(targets, keep, strict=True)]


def _mask(mask: Tensor) -> Tensor:
    """Integers 0 and 1 as bool."""
    keep = mask.bool()
    wrong = mask[mask != keep]
    if len(wrong):
        raise ValueError(f"attention_mask: got {int(wrong[0])}, want 1 on tokens and 0 on padding")
    return keep


def _check_values(samples: list[Tensor], targets: list[Tensor], vocab_size: int, num_videos: int) -> None:
    flat, wanted = torch.cat(samples), torch.cat(targets)
    text = flat != IMAGE_TOKEN_INDEX
    markers = int((~text).sum())
    if markers != num_videos:
        raise ValueError(
            f"frame_features: got {num_videos} videos, want {markers} (one for each {IMAGE_TOKEN_INDEX} in input_ids "
            "that attention_mask selects)"
        )
    wrong = flat[((flat < 0) | (flat >= vocab_size)) & text]
    if len(wrong):
        raise ValueError(f"input_ids: got {int(wrong[0])}, want 0..{vocab_size - 1} or {IMAGE_TOKEN_INDEX} for a video")
    # not read where a video stands: labels are often copied from the ids
    wrong = wanted[((wanted < 0) | (wanted >= vocab_size)) & (wanted != IGNORE_INDEX) & text]
    if len(wrong):
        raise ValueError(f"labels: got {int(wrong[0])}, want 0..{vocab_size - 1} or {IGNORE_INDEX} for no target")


def _prefix_sums(counts: Sequence[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor([0, *counts], **ON_HOST).cumsum(0).int(), device)


def attending_rows(
    token_types: Tensor, *, every_row: bool = False, mask_system: bool = False, slow_end: Tensor | None = None
) -> Tensor:
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
            attends &= visual.cumsum(0) > 0
    return attends.nonzero().flatten()


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
    device = prompts.device

    num_text = sum(int((ids != IMAGE_TOKEN_INDEX).sum()) for ids in samples)
    next_text, next_fast, next_video = 0, num_text, 0
    sources, types, new_labels, slow_lengths, attending, ends = [], [], [], [], [], []
    whole = True  # every row that attends sees all slow tokens of its sample
    for ids, target, before in zip(samples, targets, held or [0] * len(samples), strict=True):
        markers = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
        source, kind, label, seen = [], [], [], []
        slow, start = before, 0
        for end in [*markers, len(ids)]:
            text = target[start:end]
            source.append(torch.arange(next_text, next_text + len(text), **ON_HOST))
            kind.append(torch.where(text == IGNORE_INDEX, PROMPT, RESPONSE))
            label.append(text)
            seen.append(torch.full((len(text),), slow, **ON_HOST))
            next_text, start = next_text + len(text), end + 1
            if end < len(ids):
                num_fast, num_slow = videos[next_video]
                source.append(torch.arange(next_fast, next_fast + num_fast, **ON_HOST))
                kind.append(torch.full((num_fast,), VISUAL, **ON_HOST))
                label.append(torch.full((num_fast,), IGNORE_INDEX, **ON_HOST))
                seen.append(torch.full((num_fast,), slow, **ON_HOST))
                seen[-1][-1:] += num_slow
                next_fast, next_video, slow = next_fast + num_fast, next_video + 1, slow + num_slow
        kind = torch.cat(kind)
        slow_end = torch.cat(seen) if causal else torch.full_like(kind, slow)
        limit = slow_end if causal or held is not None else None
        rows = attending_rows(kind, every_row=every_row, mask_system=mask_system, slow_end=limit)
        sources.append(torch.cat(source))
        types.append(kind)
        new_labels.append(torch.cat(label))
        slow_lengths.append(slow - before)
        attending.append(rows)
        ends.append(slow_end[rows])
        whole &= bool((ends[-1] == slow).all())

    width = max(map(len, types))
    padded_labels = pad_sequence(new_labels, batch_first=True, padding_value=IGNORE_INDEX)
    rows = torch.cat([rows + b * width for b, rows in enumerate(attending)])
    text_ids = torch.cat([ids[ids != IMAGE_TOKEN_INDEX] for ids in samples])
    return Layout(
        text_ids=to_device(text_ids, device),
        source=to_device(pad_sequence(sources, batch_first=True, padding_value=next_fast), device),
        token_types=to_device(pad_sequence(types, batch_first=True, padding_value=PADDING), device),
        labels=to_device(padded_labels, device) if prompts.has_labels else None,
        lengths=[len(kind) for kind in types],
        slow_lengths=slow_lengths,
        cu_slow=_prefix_sums(slow_lengths, device),
        text_rows=to_device(rows.int(), device),
        cu_text=_prefix_sums([len(rows) for rows in attending], device),
        slow_end=None if whole else to_device(torch.cat(ends).int(), device),
    )


def decode_rows(slow_lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """text_rows and cu_text of a decode step: one row a sample, which attends if the sample has slow tokens."""
    attends = [int(count > 0) for count in slow_lengths]
    rows = torch.tensor([b for b, yes in enumerate(attends) if yes], dtype=torch.int32, **ON_HOST)
    return to_device(rows, device), _prefix_sums(attends, device)
