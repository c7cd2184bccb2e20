"""A batch of conversations from its prefill on: static caches, the decode step over them, and turns that follow.

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

from .cache import KVCache, NewRows, SlowContext, SlowSlots
from .config import SlowFastConfig
from .decode import cublas_pays, gemv_limit, project
from .layers import Rope, compute_dtype
from .sdpa import without_cudnn_attention
from .tokens import Layout, decode_rows
from .transfer import ON_HOST, to_device

ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Decodes(Protocol):
    """What a session needs of a model: ``SlowFastForCausalLM`` has it."""

    config: SlowFastConfig
    backend: str | None
    model: nn.Module
    lm_head: nn.Module

    def prepare(
        self, input_ids, frame_features, attention_mask, labels, *, held: Sequence[int] | None = None
    ) -> tuple[Tensor, Layout, SlowContext | None]: ...

    def rope(self, length: int, x: Tensor) -> Rope: ...


class DecodeSession:
    """A batch of prompts after its prefill, with the caches, ready to take one token a sample at a time.

    ``logits`` [B, V] are those of the newest token, ``most_likely`` [B] the ids that they choose. ``capture`` turns
    ``step`` into one graph launch. ``extend`` takes the next turn of a conversation.

    >>> from slowfast_model import DecodeSession
    >>> session = DecodeSession(model, input_ids, [features], max_new_tokens=5)
    >>> for _ in range(5):
    ...     token = session.most_likely  # [B], or what another search chooses from session.logits
    ...     logits = session.step(token)
    >>> session.steps_left
    0

    Args:
        model: a SlowFastForCausalLM. Its weights are read at every step.
        input_ids, frame_features, attention_mask: as in its ``forward``.
        max_new_tokens: most steps to come; the caches are sized for them. What ``extend`` brings counts too, a fast
            token of a video as any other.
        slow_tokens_in_decode: as in its ``generate``.
        max_slow_tokens: most slow tokens of a sample, those of the prompt included. The hybrid layers' caches then have
            room for as many of every sample, and stay where they are, as a captured step needs it. None: room for what
            there is; a video that comes by ``extend`` moves them.
        gemv: a step's linear layers run as Triton kernels that read each weight once, with what stands around them
            inside, instead of cuBLAS and PyTorch's ops. None: where they run and are faster, which is up to 32
            prompts, in float32 2 (``gemv_limit`` says why not). Layers with modules that are more than their weights
            are called as ever.

    Raises:
        ValueError, TypeError: as ``SlowFastForCausalLM.forward``; ``max_new_tokens`` or ``max_slow_tokens`` that is no
            integer, or negative; fewer ``max_slow_tokens`` than the prompts have, or any without
            ``slow_tokens_in_decode``; ``gemv=True`` where the kernels can't run.
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
        max_slow_tokens: int | None = None,
        gemv: bool | None = None,
    ) -> None:
        max_new_tokens = as_int("max_new_tokens", max_new_tokens, 0)
        slow_tokens_in_decode = as_bool("slow_tokens_in_decode", slow_tokens_in_decode)
        if max_slow_tokens is not None:
            max_slow_tokens = as_int("max_slow_tokens", max_slow_tokens, 0)
            if not slow_tokens_in_decode:
                raise ValueError(f"max_slow_tokens: got {max_slow_tokens}, want None without slow_tokens_in_decode")
        self._gemv = None if gemv is None else as_bool("gemv", gemv)
        self.model = model
        x, layout, slow = model.prepare(input_ids, frame_features, attention_mask, None)
        config, device = model.config, x.device
        batch, capacity = len(layout.lengths), x.shape[1] + max_new_tokens
        if max_slow_tokens is not None and max(layout.slow_lengths) > max_slow_tokens:
            most = max(layout.slow_lengths)
            raise ValueError(f"max_slow_tokens: got {max_slow_tokens}, want at least {most} (of the prompts' videos)")
        dtype = compute_dtype(x.dtype, x.device)
        heads = (config.num_key_value_heads, config.head_dim)
        self.cache = KVCache(
            config.num_hidden_layers, batch, capacity, *heads, dtype=dtype, device=device, backend=model.backend
        )

        self._cos, self._sin = model.rope(capacity, x)
        prompt_rope = (self._cos[: x.shape[1]], self._sin[: x.shape[1]])
        with without_cudnn_attention(x.shape[1]):
            hidden = model.model(x, prompt_rope, slow, self.cache, model.backend)
        self.cache.step.lay_out(batch, device)
        self.position = to_device(torch.tensor(layout.lengths, **ON_HOST), device)
        last = hidden[torch.arange(batch, device=device), self.position - 1]
        self.logits = model.lm_head(last)

        self._most_likely: Tensor | None = None  # of a captured step

        self._token = torch.zeros(batch, dtype=torch.int64, device=device)
        if self._gemv:
            self._by_gemv(model.model.embed_tokens(self._token))
        self._replay: Callable[[], tuple[Tensor, Tensor]] | None = None  # advances ``position`` too
        self._lengths, self._capacity = layout.lengths, capacity
        self.steps_left = max_new_tokens

        self.slow: SlowContext | None = None
        self._slots: SlowSlots | None = None  # None: no slow token is held, and none will be
        if config.hybrid_layers and slow_tokens_in_decode:
            self._slots = SlowSlots(layout.slow_lengths)
            if max_slow_tokens is not None:
                self._lay_out(SlowSlots(layout.slow_lengths, max_slow_tokens))
            self._attend_in_decode()
        else:
            for layer_cache in self.cache.layers:
                layer_cache.slow_kv = None

    # -------------------------------------------------------------------------------------- slow tokens

    def _lay_out(self, slots: SlowSlots) -> None:
        """Caches of the hybrid layers for ``slots``, with what is held now."""
        held = self._slots.held
        where = to_device(slots.numbers([0] * len(held), held), self.position.device)
        for i in self.model.config.hybrid_layers:
            self.cache.layers[i].lay_out_slow(sum(slots.sizes), where)
        self._slots = slots

    def _attend_in_decode(self) -> None:
        """What a decode step attends of the slow tokens held: the same tensors each time where their room is fixed."""
        device, held = self.position.device, self._slots.held
        if self._slots.room is None:
            self.slow = None
            if any(held):
                rows, cu_text = decode_rows(held, device)
                self.slow = SlowContext(self._slots.sequences(device)[0], rows, cu_text)
            return
        ends = to_device(torch.tensor(held, dtype=torch.int32, **ON_HOST), device)
        if self.slow is None:
            cu_slow, pieces = self._slots.sequences(device)
            every = torch.arange(len(held) + 1, dtype=torch.int32, device=device)
            self.slow = SlowContext(cu_slow, every[:-1], every, slow_end=ends, pieces=pieces)
        else:
            self.slow.slow_end.copy_(ends)

    # -------------------------------------------------------------------------------------- one token

    def _check_dtype(self, x: Tensor) -> None:
        dtype, cached = compute_dtype(x.dtype, x.device), self._cos.dtype
        if dtype != cached:
            raise ValueError(
                f"model: got one that computes in {dtype} now, want {cached}, which the session's caches are in "
                "(was the model cast, or autocast switched, since the session was made?)"
            )

    def _compute(self) -> Tensor:
        model = self.model
        x = model.model.embed_tokens(self._token)
        self._check_dtype(x)
        rope = (self._cos[self.position, None], self._sin[self.position, None])
        self.cache.step.begin(self.position)
        self.cache.step.by_gemv = by_gemv = self._by_gemv(x)
        hidden = model.model(x[:, None], rope, self.slow, self.cache, model.backend)[:, 0]
        return project(model.lm_head, hidden, by_gemv)

    def _by_gemv(self, x: Tensor) -> bool:
        if self._gemv is False or torch.compiler.is_compiling():
            return False
        limit = gemv_limit(x, self.model.backend)
        if self._gemv and limit is not None:
            raise ValueError(f"gemv: {limit}, or gemv=None")
        return limit is None and (self._gemv is True or cublas_pays(x) is None)

    @torch.no_grad()
    def gemv_limit(self) -> str | None:
        """What keeps a step's linear layers from running as GEMV kernels as things stand; None: nothing does.

        Asked of the model's ``backend``, ``use_backend``, SLOWFAST_BACKEND, the device, the dtype and the batch, not of
        each module: one that is more than its weights keeps its own layer from them.
        """
        if self._gemv is False:
            return "got gemv=False, want None or True"
        x = self.model.model.embed_tokens(self._token)
        limit = gemv_limit(x, self.model.backend)
        if limit is None and self._gemv is None:
            limit = cublas_pays(x)
        return limit

    @property
    def most_likely(self) -> Tensor:
        """Ids [B] of the largest logits, which a captured step chooses too (overwritten by the next step)."""
        return self.logits.argmax(-1) if self._most_likely is None else self._most_likely

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
        if self._replay:
            self.logits, self._most_likely = self._replay()
        else:
            self.logits, self._most_likely = self._compute(), None
            self.position += 1
        self.steps_left -= 1
        self._lengths = [length + 1 for length in self._lengths]
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

    # -------------------------------------------------------------------------------------- a turn

    @torch.inference_mode(False)
    @torch.no_grad()
    def extend(
        self,
        input_ids: Tensor,
        frame_features: Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Append the next turn of every sample, text and videos; returns the logits [B, V] of its last token.

        They are those of the whole conversation in one prompt, while no token of it is computed again. That needs a
        model whose text does not see the videos after it: ``config.causal_slow_tokens``, unless text comes alone. (A
        session without ``slow_tokens_in_decode`` takes text alone, which attends no slow token, as its steps do.)

        With ``max_slow_tokens`` a captured step goes on after it. Without, a video moves the slow caches, and the step
        runs uncaptured until ``capture`` is called again.

        >>> from slowfast_model import DecodeSession
        >>> causal = SlowFastConfig(**sizes, **heads, **video, causal_slow_tokens=True)
        >>> session = DecodeSession(SlowFastForCausalLM(causal), input_ids, [features], max_new_tokens=20)
        >>> session.extend(torch.tensor([[5, IMAGE_TOKEN_INDEX, 6]]), [features]).shape
        torch.Size([1, 100])
        >>> session.steps_left  # 2 text rows and 2 fast frames of 2 x 2 tokens came
        10

        Args:
            input_ids, frame_features, attention_mask: as in ``SlowFastForCausalLM.forward``, of as many samples as the
                session has, at least one token each. What a sample generated is in its cache already.

        Raises:
            ValueError, TypeError: as ``forward``; another number of samples; more rows than the caches have room for
                (``max_new_tokens``), or more slow tokens (``max_slow_tokens``); a video where the config or
                ``slow_tokens_in_decode`` allows none; a model that was cast since. The session is as before then.
        """
        batch = len(self._lengths)
        check_dense("input_ids", input_ids, "[B, L]")
        if input_ids.dim() == 2 and len(input_ids) != batch:
            raise ValueError(f"input_ids: got {len(input_ids)} samples, want {batch} (those of the session)")
        if input_ids.device not in (self.position.device, torch.device("cpu")):
            raise ValueError(
                f"input_ids: got a tensor on {input_ids.device}, want {self.position.device} (the session's device) or "
                "the CPU"
            )
        held = [0] * batch if self._slots is None else self._slots.held
        x, layout, context = self.model.prepare(input_ids, frame_features, attention_mask, None, held=held)
        self._check_dtype(x)
        self._check_turn(layout)

        new = NewRows.of(layout.lengths, x.shape[1], x.device)
        caches = [cache.slow_kv for cache in self.cache.layers]
        slots = self._slots
        try:
            slow = self._slow_of_turn(layout, context)
            logits = self._compute_turn(x, new, slow)
        except BaseException:
            self._slots = slots
            for cache, slow_kv in zip(self.cache.layers, caches, strict=True):
                cache.slow_kv = slow_kv
            raise
        self.logits, self._most_likely = logits, None
        self.position += to_device(torch.tensor(layout.lengths, **ON_HOST), x.device)
        self._lengths = [a + b for a, b in zip(self._lengths, layout.lengths, strict=True)]
        self.steps_left = self._capacity - max(self._lengths)
        if context is not None:
            if self._slots.room is None:
                self._replay = None
            self._attend_in_decode()
        return self.logits

    def _check_turn(self, layout: Layout) -> None:
        if any(layout.slow_lengths):
            if not self.model.config.causal_slow_tokens:
                raise ValueError(
                    "frame_features: got a video, want text alone: what came before would have to attend it too "
                    "(but for a model with causal_slow_tokens=True in its config)"
                )
            if self._slots is None and self.model.config.hybrid_layers:
                raise ValueError(
                    "frame_features: got a video, want text alone in a session without slow_tokens_in_decode"
                )
        for b, (rows, length) in enumerate(zip(layout.lengths, self._lengths, strict=True)):
            if length + rows > self._capacity:
                raise ValueError(
                    f"input_ids: got {rows} rows of sample {b} (with its fast tokens), want at most "
                    f"{self._capacity - length}: max_new_tokens sized the caches"
                )
        if self._slots is not None and self._slots.room is not None:
            for b, (count, held) in enumerate(zip(layout.slow_lengths, self._slots.held, strict=True)):
                if count > self._slots.room - held:
                    raise ValueError(
                        f"frame_features: got {count} slow tokens of sample {b}, want at most "
                        f"{self._slots.room - held}: max_slow_tokens sized the caches"
                    )

    def _slow_of_turn(self, layout: Layout, context: SlowContext | None) -> SlowContext | None:
        """What the rows of a turn attend. Makes room for its slow tokens, which ``context`` has."""
        if self._slots is None:
            return None
        device, held = self.position.device, self._slots.held
        slots = self._slots.grown(layout.slow_lengths)
        if slots.room is None and context is not None:
            self._lay_out(slots)
        self._slots = slots
        if not any(slots.held):
            return None
        slow_end = layout.slow_end
        if slots.room is not None and slow_end is None:
            width = layout.source.shape[1]
            ends = to_device(torch.tensor(slots.held, dtype=torch.int32, **ON_HOST), device)
            slow_end = ends[layout.text_rows.long() // width]
        cu_slow, pieces = slots.sequences(device)
        slow = SlowContext(cu_slow, layout.text_rows, layout.cu_text, slow_end=slow_end, pieces=pieces)
        if context is not None:
            slow.tokens, slow.tokens_are_normalised = context.tokens, context.tokens_are_normalised
            slow.slots = to_device(slots.numbers(held, slots.held), device)
        return slow

    def _compute_turn(self, x: Tensor, new: NewRows, slow: SlowContext | None) -> Tensor:
        places = self.position[:, None] + torch.arange(new.width, device=x.device)
        places = places.clamp(max=self._capacity - 1)  # of padding
        self.cache.step.begin(self.position, new)
        hidden = self.model.model(x, (self._cos[places], self._sin[places]), slow, self.cache, self.model.backend)
        return self.model.lm_head(hidden.flatten(0, 1)[new.last.long()])

    # -------------------------------------------------------------------------------------- as a graph

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
        ends = self.cache.step.cu_pieces if op == "text_cross_attention" else self.slow.slow_end
        facts = attention_facts(op, AttentionTensors(q, keys, *[self._token] * 3, slow_end=ends), None)
        return backend_for(facts, q.device, backend)

    @torch.no_grad()
    def capture(self, *, compile_step: bool = False) -> None:
        """Record the step as a CUDA graph. ``compile_step`` first fuses it by torch.compile (about a minute, once),
        which then does what GEMV kernels would.

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
            logits = compute()
            most_likely = logits.argmax(-1)
            self.position += 1  # recorded, not done

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return logits, most_likely

        self._replay = replay
