"""How the next id is chosen from logits: penalty, ends, temperature, top_k and top_p, in transformers' order.

Everything runs on the logits' device without a read back, so that a replayed decode step is followed by launches only:
elementwise passes over [B, V] in float32, and for ``top_p`` a sort of the vocabulary: little beside the weights' read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from slowfast_kernels.numbers import as_bool, as_float, as_int

from .tokens import IMAGE_TOKEN_INDEX


@dataclass(frozen=True)
class Choice:
    """The options of one ``generate`` call, checked: None (or an empty tuple, or 0) where an option is off."""

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    min_new_tokens: int = 0
    ends: tuple[int, ...] = ()
    generator: torch.Generator | None = None

    @classmethod
    def checked(
        cls,
        *,
        do_sample: object,
        temperature: object,
        top_k: object,
        top_p: object,
        repetition_penalty: object,
        min_new_tokens: object,
        eos_token_id: object,
        generator: object,
        max_new_tokens: int,
    ) -> Choice:
        """The options as ``generate`` documents them; what shapes the distribution is not read unless it is drawn from.

        Raises:
            TypeError, ValueError: an option of another type, or out of range, by name.
        """
        options: dict = {}
        if repetition_penalty is not None:
            penalty = _above_zero("repetition_penalty", repetition_penalty)
            options["repetition_penalty"] = None if penalty == 1 else penalty
        if min_new_tokens is not None:
            options["min_new_tokens"] = as_int("min_new_tokens", min_new_tokens, 0)
            if options["min_new_tokens"] > max_new_tokens:
                raise ValueError(
                    f"min_new_tokens: got {options['min_new_tokens']}, want at most max_new_tokens ({max_new_tokens})"
                )
        options["ends"] = end_ids(eos_token_id)
        if do_sample is None or not as_bool("do_sample", do_sample):
            return cls(**options)
        if temperature is not None:
            want = "> 0 (do_sample=False for the most likely token)"
            options["temperature"] = _above_zero("temperature", temperature, want)
        if top_k is not None:
            options["top_k"] = as_int("top_k", top_k, 0, "an integer >= 0 (0: off)") or None
        if top_p is not None:
            options["top_p"] = _above_zero("top_p", top_p, "0 < top_p <= 1")
            if options["top_p"] > 1:
                raise ValueError(f"top_p: got {options['top_p']}, want 0 < top_p <= 1")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: got {type(generator).__name__}, want a torch.Generator or None")
        return cls(do_sample=True, generator=generator, **options)

    def is_largest_logit(self, ends: Tensor | None, count: int) -> bool:
        """Whether ``next`` is the largest logit's id, as a captured step has found it."""
        keeps_from_ending = ends is not None and count < self.min_new_tokens
        return not (self.do_sample or self.repetition_penalty is not None or keeps_from_ending)

    def next(self, logits: Tensor, seen: Tensor | None, ends: Tensor | None, count: int) -> Tensor:
        """Ids [B] from ``logits`` [B, V]; ``seen`` [B, V] is penalised, ``count`` ids were generated before."""
        if seen is not None:
            logits = penalise(logits.float(), seen, self.repetition_penalty)
        if ends is not None and count < self.min_new_tokens:
            logits = logits.index_fill(1, ends, -torch.inf)
        if not self.do_sample:
            return logits.argmax(-1)
        return sample(logits, self.temperature, self.top_p, self.generator, top_k=self.top_k)


def _above_zero(name: str, value: object, want: str = "a number > 0") -> float:
    number = as_float(name, value, want)
    if number <= 0:
        raise ValueError(f"{name}: got {number}, want {want}")
    return number


def end_ids(eos_token_id: object) -> tuple[int, ...]:
    """Ids that end a sample, from any integer, a collection or a tensor of them, or None; empty: nothing ends it.

    Raises:
        TypeError, ValueError: what is no integer, or negative.
    """
    want = "an id >= 0, or a list, set or tensor of them"
    if eos_token_id is None:
        return ()
    if hasattr(eos_token_id, "ndim"):  # of numpy or torch
        items = eos_token_id.tolist() if eos_token_id.ndim else [eos_token_id]
    elif isinstance(eos_token_id, Iterable) and not isinstance(eos_token_id, str | bytes):
        items = eos_token_id
    else:
        items = [eos_token_id]
    return tuple(as_int("eos_token_id", item, 0, want) for item in items)


def prompt_ids_seen(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> Tensor:
    """[B, vocab_size] bool: the ids that a prompt without a video holds. Padding and prompts with a video: none."""
    counted = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        counted = attention_mask.to(input_ids.device).bool()
    has_video = (counted & (input_ids == IMAGE_TOKEN_INDEX)).any(1, keepdim=True)
    # one slot more takes what does not count
    slots = input_ids.long().clamp(max=vocab_size).masked_fill(~counted | has_video, vocab_size)
    seen = torch.zeros(len(input_ids), vocab_size + 1, dtype=torch.bool, device=input_ids.device)
    return seen.scatter_(1, slots, True)[:, :vocab_size]


def penalise(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Scores [B, V] with those of ``seen`` ids made less likely: divided by the penalty, or multiplied if negative."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def sample(
    logits: Tensor,
    temperature: float | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    *,
    top_k: int | None = None,
) -> Tensor:
    """Draw ids [B] from softmax(logits / temperature), [B, V], cut to ``top_k`` tokens, then to ``top_p``. None is off.

    ``top_k`` keeps the k most likely tokens and all that are as likely as the last of them; ``top_p`` the fewest whose
    probability, among those, reaches it. The most likely token always stays.
    """
    scores = logits.float()
    if temperature is not None:
        if temperature < 1e-30:  # quotients would leave float32's range
            scores = scores - scores.amax(-1, keepdim=True)
        scores = scores / min(max(temperature, 1e-37), 1e37)  # and so would the divisor
    if top_k is not None and top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, index = scores.sort(-1)
        dropped = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[:, -1] = False
        scores = scores.masked_fill(dropped.scatter(1, index, dropped), -torch.inf)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
