"""A batch of prompts between its prefill and its last token: static caches, and the decode step over them.

A step is bound by reading the weights once, so a 7B model's floor on 3 TB/s is 5 ms; launched kernel by kernel it takes
ten times that on the host. The step therefore has fixed shapes and keeps every position in tensors, so that a CUDA
graph of it, captured once, replays for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from slowfast_kernels.calls import AttentionTensors
from slowfast_kernels.numbers import as_bool, as_int
from slowfast_kernels.ops.attention import attention_facts
from slowfast_kernels.ops.checks import check_dense, reads_device_data
from slowfast_kernels.ops.dispatch import backend_for, requested_backend

from .cache import KVCache, SlowContext
from .config import SlowFastConfig
from .layers import Rope, compute_dtype
from .tokens import Layout, decode_rows

ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Decodes(Protocol):
    """What a session needs of a model: ``SlowFastForCausalLM`` has it."""

    config: SlowFastConfig
    backend: str | None
    model: nn.Module
    lm_head: nn.Module

    def prepare(
        self, input_ids, frame_features, attention_mask, labels
    ) -> tuple[Tensor, Layout, SlowContext | None]: ...

    def rope(self, positions: Tensor, dtype: torch.dtype | None = None) -> Rope: ...


class DecodeSession:
    """A batch of prompts after its prefill, with the caches, ready to take one token a sample at a time.

    ``logits`` [B, V] are those of the newest token. ``capture`` turns ``step`` into one graph launch.

    >>> from slowfast_model import DecodeSession
    >>> session = DecodeSession(model, input_ids, [features], max_new_tokens=5)
    >>> for _ in range(5):
    ...     token = session.logits.argmax(-1)  # [B], or what another search chooses
    ...     logits = session.step(token)
    >>> session.steps_left
    0

    Args:
        model: a SlowFastForCausalLM, on the device of ``input_ids``. Its weights are read at every step.
        input_ids, frame_features, attention_mask: as in its ``forward``.
        max_new_tokens: most steps to come; the caches are sized for them.
        slow_tokens_in_decode: as in its ``generate``.

    Raises:
        ValueError, TypeError: as ``SlowFastForCausalLM.forward``; ``max_new_tokens`` that is no integer, or negative.
    """

    @torch.inference_mode(False)  # what is made in that mode could not be written to in a step outside it
    @torch.no_grad()
    def __init__(
        self,
        model: Decodes,
        input_ids: Tensor,
        frame_features: Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        slow_tokens_in_decode: bool = True,
    ) -> None:
        max_new_tokens = as_int("max_new_tokens", max_new_tokens, 0)
        slow_tokens_in_decode = as_bool("slow_tokens_in_decode", slow_tokens_in_decode)
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

    @property
    def is_on_gpu(self) -> bool:
        """Whether there can be a CUDA graph at all."""
        return self.position.device.type == "cuda"

    def capture_limit(self) -> str | None:
        """What keeps the step from being a CUDA graph as things stand, and the way out; None: nothing does.

        A graph cannot record what is read on the host, as the eager backend reads lengths and SLOWFAST_DEBUG=1 indices.
        Which backend would run is asked of the dispatch, for each attention op of the step: the model's ``backend``,
        ``use_backend`` and SLOWFAST_BACKEND count, and so does an op that no kernel here supports.
        """
        if not self.steps_left:
            return "got a session at its end, want a step left (max_new_tokens)"
        if not self.is_on_gpu:
            return f"got a model on {self.position.device}, want a CUDA device"
        if reads_device_data(self.position):
            return "got SLOWFAST_DEBUG=1, under which every op reads its indices back, want it unset"
        asked = []
        if self.cache.step.backend != "eager":  # then it is PyTorch's own attention, which can be recorded
            asked.append(("text_cross_attention", self.cache.step.backend))
        if self.slow is not None:
            asked.append(("slowfast_cross_attention", self.model.backend))
        for op, backend in asked:
            if self._backend_of(op, backend) == "eager":
                cause = "asked for by name"
                if requested_backend(backend) is None:
                    cause = f"no other takes {self._cos.dtype} at head dimension {self._cos.shape[-1]} here"
                return (
                    f"got {op} on backend 'eager' ({cause}), which reads lengths on the host and cannot be recorded; "
                    "want another backend (the model's, use_backend's or SLOWFAST_BACKEND's)"
                )
        return None

    def _backend_of(self, op: str, backend: str | None) -> str:
        """What runs an attention op of the step, whose query is a row a sample of the computed type."""
        keys, batch = self.cache.layers[0].kv.flatten(0, 1), len(self._token)
        q = keys.new_empty(batch, self.model.config.num_attention_heads, keys.shape[-1])
        facts = attention_facts(op, AttentionTensors(q, keys, *[self._token] * 3), None)
        return backend_for(facts, q.device, backend)

    @torch.no_grad()
    def capture(self, *, compile_step: bool = False) -> None:
        """Record the step as a CUDA graph. ``compile_step`` first fuses it by torch.compile (about a minute, once).

        The graph keeps the backends that are chosen now, whatever ``use_backend`` says when it is replayed.

        Raises:
            ValueError: ``capture_limit`` names one: no GPU, an op that would run on the eager backend, no step left.
        """
        limit = self.capture_limit()
        if limit is not None:
            raise ValueError(f"capture: {limit}")
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
