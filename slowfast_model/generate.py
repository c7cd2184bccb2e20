"""Generation: one prefill, then one decode step a token over static caches.

A step is bound by reading the weights once, so a 7B model's floor on 3 TB/s is 5 ms; launched kernel by kernel it takes
ten times that on the host. The step therefore has fixed shapes and keeps every position in tensors, so that a CUDA
graph of it, captured once, replays for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import SelfKVCache, SlowContext
from .layers import compute_dtype
from .tokens import decode_rows

if TYPE_CHECKING:
    from .model import SlowFastForCausalLM


class DecodeSession:
    """A batch of prompts after its prefill, with the caches, ready to take one token a sample at a time.

    ``logits`` [B, V] are those of the newest token. ``capture`` turns ``step`` into one graph launch.
    """

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
        self.model = model
        x, layout, slow = model.prepare(input_ids, frame_features, attention_mask, None)
        config, device = model.config, x.device
        batch, capacity = len(layout.lengths), x.shape[1] + max_new_tokens
        dtype = compute_dtype(model.lm_head.weight)
        heads = (config.num_key_value_heads, config.head_dim)
        self.cache = SelfKVCache(
            config.num_hidden_layers, batch, capacity, *heads, dtype=dtype, device=device, backend=model.backend
        )

        self._cos, self._sin = model.rope(torch.arange(capacity, device=device))
        prompt_rope = (self._cos[: x.shape[1]], self._sin[: x.shape[1]])
        hidden = model.model(x, prompt_rope, slow, self.cache, model.backend)
        self.position = torch.tensor(layout.lengths, device=device)
        last = hidden[torch.arange(batch, device=device), self.position - 1]
        self.logits = model.lm_head(last)

        self.slow = None
        if slow is not None and slow_tokens_in_decode:
            rows, cu_text = decode_rows(layout.slow_lengths, device)
            self.slow = SlowContext(slow.cu_slow, rows, cu_text, kv=slow.kv)
        self._token = torch.zeros(batch, dtype=torch.int64, device=device)
        self._replay: Callable[[], Tensor] | None = None
        self.steps_left = max_new_tokens

    def _compute(self) -> Tensor:
        model = self.model
        rope = (self._cos[self.position, None], self._sin[self.position, None])
        self.cache.begin_step(self.position)
        x = model.model.embed_tokens(self._token)[:, None]
        return model.lm_head(model.model(x, rope, self.slow, self.cache, model.backend)[:, 0])

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """Append ``token`` [B] to every sample; returns the next logits [B, V] (overwritten by the next step).

        Raises:
            ValueError: more steps than ``max_new_tokens``, for which the caches were sized.
        """
        if not self.steps_left:
            raise ValueError("step: got more tokens than max_new_tokens, for which the caches were sized")
        self.steps_left -= 1
        self._token.copy_(token)
        self.logits = self._replay() if self._replay else self._compute()
        self.position += 1
        return self.logits

    @torch.no_grad()
    def capture(self, *, compile_step: bool = False) -> None:
        """Record the step as a CUDA graph. ``compile_step`` first fuses it by torch.compile (about a minute, once).

        Raises:
            ValueError: not on a GPU, or the eager backend, whose cross-attention reads lengths on the host.
        """
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


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Draw ids [B] from softmax(logits / temperature) cut to the fewest tokens whose probability reaches ``top_p``."""
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = probs.sort(-1, descending=True)
        kept = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)  # the most likely token always stays
        return index.gather(-1, torch.multinomial(kept, 1, generator=generator))[:, 0]
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def _check(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, want >= 1")
    if temperature <= 0:
        raise ValueError(f"temperature: got {temperature}, want > 0 (do_sample=False for the most likely token)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, want 0 < top_p <= 1")


@torch.no_grad()
def generate(
    model: SlowFastForCausalLM,
    input_ids: Tensor,
    frame_features: Sequence[Tensor] | None = None,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    eos_token_id: int | Collection[int] | None = None,
    slow_tokens_in_decode: bool = True,
    generator: torch.Generator | None = None,
    cuda_graph: bool | None = None,
    compile_step: bool = False,
) -> Tensor:
    """Continue a batch of prompts, padded on either side.

    Args:
        model: on the device of ``input_ids``.
        input_ids, frame_features, attention_mask: as in ``SlowFastForCausalLM.forward``.
        max_new_tokens: most tokens to add; the caches are sized for it.
        do_sample: draw from the distribution, shaped by ``temperature`` and ``top_p``; else the most likely token.
        eos_token_id: id or ids that end a sample; what follows it repeats the (first) id. None: never ends early.
        slow_tokens_in_decode: generated tokens attend the slow tokens. False: as the released code generates.
        generator: source of randomness of ``do_sample``, on the model's device.
        cuda_graph: replay decode steps from a graph. None: on a GPU, from 16 tokens on, unless the backend is eager.
        compile_step: fuse the captured step by torch.compile first.

    Returns:
        New ids [B, n], int64, n <= max_new_tokens.

    Raises:
        ValueError, TypeError: as ``forward``, and options out of range.
    """
    _check(max_new_tokens, temperature, top_p)
    options = {"max_new_tokens": max_new_tokens, "slow_tokens_in_decode": slow_tokens_in_decode}
    session = DecodeSession(model, input_ids, frame_features, attention_mask, **options)
    if cuda_graph is None:
        cuda_graph = input_ids.device.type == "cuda" and max_new_tokens >= 16 and model.backend != "eager"
    if cuda_graph:
        session.capture(compile_step=compile_step)
    ends = None
    if eos_token_id is not None:
        ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        ends = torch.tensor(ids, device=input_ids.device)
    done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    new = []
    while True:
        token = sample(session.logits, temperature, top_p, generator) if do_sample else session.logits.argmax(-1)
        if ends is not None:
            token = torch.where(done, ends[0], token)
            done |= torch.isin(token, ends)
        new.append(token)
        if len(new) == max_new_tokens or (ends is not None and bool(done.all())):
            return torch.stack(new, 1)
        session.step(token)
