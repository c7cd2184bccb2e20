"""Generation: one prefill, then one decode step a token, and the choice of each token."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from slowfast_kernels.numbers import as_bool, as_int

from .sampling import Choice, prompt_ids_seen, sample
from .session import Decodes, DecodeSession
from .tokens import IMAGE_TOKEN_INDEX
from .transfer import ON_HOST, to_device

__all__ = ["DecodeSession", "GenerationMixin", "Streamer", "sample"]

WORTH_A_GRAPH = 16  # tokens: recording takes the time of some steps that are launched kernel by kernel


class Streamer(Protocol):
    """Takes ids as they are generated: ``transformers.TextStreamer`` is one."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


def _can_be_captured(session: DecodeSession) -> bool:
    limit = session.capture_limit()
    if limit is not None and session.is_on_gpu and session.model.backend != "eager":
        warnings.warn(f"generate: decodes without a CUDA graph: {limit}", stacklevel=4)
    return limit is None


def _check_streamer(streamer: Streamer | None, input_ids: Tensor) -> None:
    if streamer is None:
        return
    if not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise TypeError(f"streamer: got {type(streamer).__name__}, want an object with put(ids) and end()")
    if isinstance(input_ids, Tensor) and input_ids.dim() == 2 and len(input_ids) > 1:
        raise ValueError(f"streamer: got a batch of {len(input_ids)}, want one prompt (a streamer follows one text)")


def _prompt_text(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Ids [1, n] of one prompt without padding and without the videos' -200, which no tokenizer can decode."""
    keep = input_ids != IMAGE_TOKEN_INDEX
    if attention_mask is not None:
        keep &= attention_mask.to(keep.device).bool()
    return input_ids[keep][None].long().cpu()


class GenerationMixin:
    """``generate`` for a model that a ``DecodeSession`` can be made of."""

    @torch.no_grad()
    def generate(
        self: Decodes,
        input_ids: Tensor,
        frame_features: Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        min_new_tokens: int | None = None,
        eos_token_id: int | Collection[int] | Tensor | None = None,
        streamer: Streamer | None = None,
        slow_tokens_in_decode: bool = True,
        generator: torch.Generator | None = None,
        cuda_graph: bool | None = None,
        compile_step: bool = False,
    ) -> Tensor:
        """Continue a batch of prompts, padded on either side. Options mean what they mean in transformers' generate.

        None is off for every option. Numbers may be Python's, numpy's or tensors without a dimension, and are read
        once.

        Args:
            input_ids, frame_features, attention_mask: as in ``forward``.
            max_new_tokens: most tokens to add; the caches are sized for it.
            do_sample: draw from the distribution, shaped by ``temperature``, ``top_k`` and ``top_p`` in this order;
                else the most likely token, and these three are not read.
            temperature: > 0; logits are divided by it.
            top_p: 0 < top_p <= 1; draws from the fewest tokens whose probability reaches it.
            top_k: draws from the k most likely tokens. 0, or past the vocabulary: off.
            repetition_penalty: > 0, 1 is off; logits of ids that came before are divided by it, negative ones
                multiplied, also without ``do_sample``. What came before are the generated ids and, for a prompt of text
                alone, the prompt's. The ids of a prompt with a video do not count: the released code hands such a
                prompt on as embeddings, so its penalty (1.2 in the demo) sees generated ids only.
            min_new_tokens: no id of ``eos_token_id`` is chosen before so many tokens.
            eos_token_id: id or ids that end a sample; what follows it repeats the (first) id. None or empty: never ends
                early. An id past the vocabulary never comes.
            streamer: ``put`` gets the prompt's text ids [1, n] (without padding and -200), then ids [1] as they come,
                on the CPU; ``end`` follows the last. For one prompt. Each token then waits for the device.
            slow_tokens_in_decode: generated tokens attend the slow tokens. False: as the released code generates.
            generator: source of randomness of ``do_sample``, on the model's device.
            cuda_graph: replay decode steps from a graph. None: on a GPU, from 16 tokens on, unless
                ``DecodeSession.capture_limit`` names a reason, which a warning tells (but for a model whose ``backend``
                is "eager").
            compile_step: fuse the captured step by torch.compile first, in the place of the GEMV kernels.

        >>> model.generate(input_ids, [features], max_new_tokens=5).shape
        torch.Size([1, 5])

        Returns:
            New ids [B, n], int64, n <= max_new_tokens.

        Raises:
            ValueError, TypeError: as ``forward``, and options of another type or out of range, by name.
        """
        max_new_tokens = as_int("max_new_tokens", max_new_tokens, 1)
        choice = Choice.checked(
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            min_new_tokens=min_new_tokens,
            eos_token_id=eos_token_id,
            generator=generator,
            max_new_tokens=max_new_tokens,
        )
        cuda_graph = None if cuda_graph is None else as_bool("cuda_graph", cuda_graph)
        compile_step = as_bool("compile_step", compile_step)
        _check_streamer(streamer, input_ids)
        options = {"max_new_tokens": max_new_tokens, "slow_tokens_in_decode": slow_tokens_in_decode}
        session = DecodeSession(self, input_ids, frame_features, attention_mask, **options)
        batch, vocab_size = session.logits.shape
        device = session.logits.device
        if cuda_graph is None:
            cuda_graph = max_new_tokens >= WORTH_A_GRAPH and _can_be_captured(session)
        if cuda_graph:
            session.capture(compile_step=compile_step)

        ends = [i for i in choice.ends if i < vocab_size]
        ends = to_device(torch.tensor(ends, **ON_HOST), device) if ends else None
        seen = None
        if choice.repetition_penalty is not None:
            seen = prompt_ids_seen(input_ids, attention_mask, vocab_size).to(device)
        if streamer is not None:
            streamer.put(_prompt_text(input_ids, attention_mask))
        done = torch.zeros(batch, dtype=torch.bool, device=device)
        new: list[Tensor] = []
        while True:
            if choice.is_largest_logit(ends, len(new)):
                token = session.most_likely.clone()  # the next step of a graph writes there
            else:
                token = choice.next(session.logits, seen, ends, len(new))
            if ends is not None:
                token = torch.where(done, ends[0], token)
                done |= torch.isin(token, ends)
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            new.append(token)
            if streamer is not None:
                streamer.put(token.to("cpu", copy=True))
            if len(new) == max_new_tokens or (ends is not None and bool(done.all())):
                break
            session.step(token)
        if streamer is not None:
            streamer.end()
        return torch.stack(new, 1)
