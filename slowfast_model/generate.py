"""Generation: one prefill, then one decode step a token over static caches.

A step is bound by reading the weights once, so a 7B model's floor on 3 TB/s is 5 ms; launched kernel by kernel it takes
ten times that on the host. The step therefore has fixed shapes and keeps every position in tensors, so that a CUDA
graph of it, captured once, replays for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from slowfast_kernels.ops.checks import check_dense, reads_device_data

from .cache import KVCache, SlowContext
from .layers import compute_dtype
from .sampling import Choice, prompt_ids_seen, sample
from .scalars import flag, integer
from .tokens import IMAGE_TOKEN_INDEX, decode_rows

if TYPE_CHECKING:
    from .model import SlowFastForCausalLM

__all__ = ["DecodeSession", "Streamer", "generate", "sample"]

ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Streamer(Protocol):
    """Takes ids as they are generated: ``transformers.TextStreamer`` is one."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


class DecodeSession:
    """A batch of prompts after its prefill, with the caches, ready to take one token a sample at a time.

    ``logits`` [B, V] are those of the newest token. ``capture`` turns ``step`` into one graph launch.

    Raises:
        ValueError, TypeError: as ``SlowFastForCausalLM.forward``; ``max_new_tokens`` that is no integer, or negative.
    """

    @torch.inference_mode(False)  # what is made in that mode could not be written to in a step outside it
    @torch.no_grad()
    def __init__(
        self,
        model: SlowFastForCausalLM,
        input_ids: Tensor,
        frame_features: Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        slow_tokens_in_decode: bool = True,
    ) -> None:
        max_new_tokens = integer("max_new_tokens", max_new_tokens, 0)
        slow_tokens_in_decode = flag("slow_tokens_in_decode", slow_tokens_in_decode)
        self.model = model
        x, layout, slow = model.prepare(input_ids, frame_features, attention_mask, None)
        config, device = model.config, x.device
        batch, capacity = len(layout.lengths), x.shape[1] + max_new_tokens
        dtype = compute_dtype(x.dtype, x.device)
        heads = (config.num_key_value_heads, config.head_dim)
        self.cache = KVCache(
            config.num_hidden_layers, batch, capacity, *heads, dtype=dtype, device=device, backend=model.backend
        )

        self._cos, self._sin = model.rope(torch.arange(capacity, device=device), x.dtype)
        prompt_rope = (self._cos[: x.shape[1]], self._sin[: x.shape[1]])
        hidden = model.model(x, prompt_rope, slow, self.cache, model.backend)
        self.position = torch.tensor(layout.lengths, device=device)
        last = hidden[torch.arange(batch, device=device), self.position - 1]
        self.logits = model.lm_head(last)

        self.slow = None
        if slow is not None and slow_tokens_in_decode:
            rows, cu_text = decode_rows(layout.slow_lengths, device)
            self.slow = SlowContext(slow.cu_slow, rows, cu_text)
        else:
            for layer_cache in self.cache.layers:
                layer_cache.slow_kv = None
        self._token = torch.zeros(batch, dtype=torch.int64, device=device)
        self._replay: Callable[[], Tensor] | None = None
        self.steps_left = max_new_tokens

    def _compute(self) -> Tensor:
        model = self.model
        x = model.model.embed_tokens(self._token)[:, None]
        dtype, cached = compute_dtype(x.dtype, x.device), self._cos.dtype
        if dtype != cached:
            raise ValueError(
                f"model: got one that computes in {dtype} now, want {cached}, which the session's caches are in "
                "(was the model cast, or autocast switched, since the session was made?)"
            )
        rope = (self._cos[self.position, None], self._sin[self.position, None])
        self.cache.step.begin(self.position)
        return model.lm_head(model.model(x, rope, self.slow, self.cache, model.backend)[:, 0])

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """Append ``token`` [B] to every sample; returns the next logits [B, V] (overwritten by the next step).

        Ids out of the vocabulary are found on a CPU, and on a GPU under SLOWFAST_DEBUG=1 (looking at them syncs).

        Raises:
            ValueError: more steps than ``max_new_tokens``, for which the caches were sized; ids of another shape, on
                another device or out of the vocabulary; a model that was cast since. The session is as before then.
            TypeError: ids that are no tensor of integers.
        """
        if not self.steps_left:
            raise ValueError("step: got more tokens than max_new_tokens, for which the caches were sized")
        self._check_ids(token)
        self._token.copy_(token)
        self.logits = self._replay() if self._replay else self._compute()
        self.steps_left -= 1
        self.position += 1
        return self.logits

    def _check_ids(self, token: Tensor) -> None:
        batch, device, vocab_size = len(self._token), self._token.device, self.model.config.vocab_size
        check_dense("token", token, f"[{batch}] of ids")
        if token.dtype not in ID_DTYPES:
            raise TypeError(f"token: got {token.dtype}, want int64 or another integer type")
        if token.shape != (batch,):
            raise ValueError(f"token: got shape {list(token.shape)}, want [{batch}] (one id a sample)")
        if token.device != device:
            raise ValueError(f"token: got a tensor on {token.device}, want {device} (the session's device)")
        if reads_device_data(token):
            wrong = token[(token < 0) | (token >= vocab_size)]
            if len(wrong):
                raise ValueError(f"token: got id {int(wrong[0])}, want 0..{vocab_size - 1}")

    @torch.no_grad()
    def capture(self, *, compile_step: bool = False) -> None:
        """Record the step as a CUDA graph. ``compile_step`` first fuses it by torch.compile (about a minute, once).

        Raises:
            ValueError: not on a GPU, or the eager backend, whose cross-attention reads lengths on the host; no step
                left to record.
        """
        if not self.steps_left:
            raise ValueError("capture: got a session at its end, want a step left (max_new_tokens)")
        if self.position.device.type != "cuda":
            raise ValueError(f"capture: got a model on {self.position.device}, want a CUDA device")
        if self.model.backend == "eager" and self.slow is not None:
            raise ValueError(
                "capture: got backend='eager', whose cross-attention cannot be captured; want another backend"
            )
        compute = torch.compile(self._compute, fullgraph=True, dynamic=False) if compile_step else self._compute
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compile kernels and allocate workspaces before recording; the cache slot is rewritten
                compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = compute()

        def replay() -> Tensor:
            graph.replay()
            return out

        self._replay = replay


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


@torch.no_grad()
def generate(
    model: SlowFastForCausalLM,
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
    """Continue a batch of prompts, padded on either side. The options mean what they mean in transformers' generate.

    None is off for every option. Numbers may be Python's, numpy's or tensors without a dimension; they are read once.

    Args:
        model: on the device of ``input_ids``.
        input_ids, frame_features, attention_mask: as in ``SlowFastForCausalLM.forward``.
        max_new_tokens: most tokens to add; the caches are sized for it.
        do_sample: draw from the distribution, shaped by ``temperature``, ``top_k`` and ``top_p`` in this order; else
            the most likely token, and these three are not read.
        temperature: > 0; logits are divided by it.
        top_p: 0 < top_p <= 1; draws from the fewest tokens whose probability reaches it.
        top_k: draws from the k most likely tokens. 0, or past the vocabulary: off.
        repetition_penalty: > 0, 1 is off; logits of ids that came before are divided by it, negative ones multiplied,
            also without ``do_sample``. What came before are the generated ids and, for a prompt of text alone, the
            prompt's. The ids of a prompt with a video do not count: the released code hands such a prompt on as
            embeddings, so its penalty (1.2 in the demo) sees generated ids only.
        min_new_tokens: no id of ``eos_token_id`` is chosen before so many tokens.
        eos_token_id: id or ids that end a sample; what follows it repeats the (first) id. None or empty: never ends
            early. An id past the vocabulary never comes.
        streamer: ``put`` gets the prompt's text ids [1, n] (without padding and -200), then ids [1] as they come, on
            the CPU; ``end`` follows the last. For one prompt. Each token then waits for the device.
        slow_tokens_in_decode: generated tokens attend the slow tokens. False: as the released code generates.
        generator: source of randomness of ``do_sample``, on the model's device.
        cuda_graph: replay decode steps from a graph. None: on a GPU, from 16 tokens on, unless the backend is eager.
        compile_step: fuse the captured step by torch.compile first.

    Returns:
        New ids [B, n], int64, n <= max_new_tokens.

    Raises:
        ValueError, TypeError: as ``forward``, and options of another type or out of range, by name.
    """
    max_new_tokens = integer("max_new_tokens", max_new_tokens, 1)
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
    cuda_graph = None if cuda_graph is None else flag("cuda_graph", cuda_graph)
    compile_step = flag("compile_step", compile_step)
    _check_streamer(streamer, input_ids)
    options = {"max_new_tokens": max_new_tokens, "slow_tokens_in_decode": slow_tokens_in_decode}
    session = DecodeSession(model, input_ids, frame_features, attention_mask, **options)
    batch, vocab_size = session.logits.shape
    device = session.logits.device
    if cuda_graph is None:
        cuda_graph = device.type == "cuda" and max_new_tokens >= 16 and model.backend != "eager"
    if cuda_graph:
        session.capture(compile_step=compile_step)

    ends = [i for i in choice.ends if i < vocab_size]
    ends = torch.tensor(ends, device=device) if ends else None
    seen = None
    if choice.repetition_penalty is not None:
        seen = prompt_ids_seen(input_ids, attention_mask, vocab_size)
    if streamer is not None:
        streamer.put(_prompt_text(input_ids, attention_mask))
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    new: list[Tensor] = []
    while True:
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
