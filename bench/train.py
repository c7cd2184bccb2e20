"""One optimizer step of a whole model: forward, backward, AdamW; with gradient checkpointing and without.

Contenders train one model in turns (A B C D A ...): ours, the eager formulas, the released code's sequence of
operations in the hybrid layers, and the same model with its hybrid layers switched off, to which the others add the
slow path: that difference is taken turn by turn. Wall time of a step; beside it, from the profiler, how long its
kernels keep a GPU busy. A row tells the peak memory over weights, optimizer and batch, and what each hybrid layer saves
for the backward pass. On a GPU the model has the shape of Qwen2-1.5B, on a CPU a tiny one; weights are random in both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .backward import peak_bytes
from .layer import official_cross_attention, official_norm
from .model import make_model
from .runner import Contender, Runner, Variant, relative_error
from .selection import train_shapes
from .shapes import TrainShape, train_cost
from .timing import kernel_lane, wall_lane

OP = "train"
BASE = "no slow path"
CHECKPOINTING = " checkpointing"  # after a shape's name
TURNS = 20  # at most; a quick run takes a third
BUDGET_S = 4.0  # of one contender
PROFILED = 3  # steps of each
LEARNING_RATE = 1e-6  # weights stay what they are but for this


class Way(NamedTuple):
    """How a contender trains the model."""

    who: str
    kind: str
    backend: str | None = None
    is_official: bool = False
    has_slow_path: bool = True


EAGER = Way("eager", "ours", backend="eager")
WAYS = (
    Way("auto", "ours"),
    EAGER,
    Way("official", "peer", is_official=True),
    Way(BASE, "base", has_slow_path=False),
)


class Training:
    """A model, its optimizer and one batch."""

    def __init__(self, shape: TrainShape, dtype: str, device: torch.device) -> None:
        from slowfast_model import IMAGE_TOKEN_INDEX

        with torch.no_grad():
            self.model = make_model(shape.model, dtype, device, tie_word_embeddings=True).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=device.type == "cuda"
        )
        text = shape.model.text
        self.ids = torch.randint(shape.model.vocab, (shape.batch, text + 1), device=device)
        self.ids[:, min(8, text)] = IMAGE_TOKEN_INDEX
        self.labels = self.ids.masked_fill(self.ids < 0, -100)
        self.features = [
            torch.randn(shape.model.vision_size, device=device, dtype=getattr(torch, dtype)) for _ in range(shape.batch)
        ]

    @property
    def hybrid_layers(self) -> list[nn.Module]:
        return [self.model.model.layers[i] for i in self.model.config.hybrid_layers]

    @contextmanager
    def as_in(self, way: Way, checkpointing: bool) -> Iterator[None]:
        """The model as a contender trains it."""
        self.model.backend, self.model.model.gradient_checkpointing = way.backend, checkpointing
        for layer in self.hybrid_layers:
            layer.is_hybrid = way.has_slow_path
            if way.is_official:
                layer.forward = partial(official_decoder_layer, layer)
        try:
            yield
        finally:
            self.model.backend, self.model.model.gradient_checkpointing = None, False
            for layer in self.hybrid_layers:
                layer.is_hybrid = True
                vars(layer).pop("forward", None)

    def loss(self) -> Tensor:
        return self.model(self.ids, self.features, labels=self.labels).loss

    def step(self, way: Way, checkpointing: bool) -> Tensor:
        """The loss before it."""
        with torch.enable_grad(), self.as_in(way, checkpointing):
            loss = self.loss()
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def gradients(self, way: Way, checkpointing: bool) -> tuple[Tensor, ...]:
        """Of matrices: what projects queries, K and V, and the projector, which the pooling's gradient reaches.

        Biases and gates are sums over all rows, of which little may be left: how exact one of them comes out is chance.
        """
        with torch.enable_grad(), self.as_in(way, checkpointing):
            self.loss().backward()
        named = dict(self.model.named_parameters())
        found = tuple(
            torch.cat([x.grad.flatten() for name, x in named.items() if part in name and x.dim() == 2])
            for part in ("q_proj", "cross_attn_kv_proj", "mm_projector.")
        )
        self.optimizer.zero_grad()
        return found

    def error(self, way: Way, checkpointing: bool) -> float:
        """Of its gradients, in units of twice the eager formulas' own against a wider dtype."""
        wide, dtype = copy.copy(self), torch.promote_types(self.features[0].dtype, torch.float32)
        dtype = torch.float64 if dtype == self.features[0].dtype else dtype
        wide.model, wide.features = copy.deepcopy(self.model).to(dtype), [x.to(dtype) for x in self.features]
        exact = wide.gradients(EAGER, True)

        found, eager = self.gradients(way, checkpointing), self.gradients(EAGER, False)
        return max(
            relative_error(x, z) / (2 * relative_error(y, z)) for x, y, z in zip(found, eager, exact, strict=True)
        )

    def saved_bytes(self, way: Way) -> list[int]:
        """What each hybrid layer keeps for its backward pass, beside parameters and what layers before it keep."""
        seen = {x.untyped_storage().data_ptr() for x in self.model.parameters()}
        saved = dict.fromkeys(self.model.model.layers, 0)
        with torch.enable_grad(), self.as_in(way, False):
            for layer in saved:
                layer.forward = partial(self._watched, layer, layer.forward, seen, saved)
            try:
                loss = self.loss()  # held, and with it all that is saved: no address is used twice
            finally:
                for layer in saved:
                    del layer.forward
            del loss
        return [saved[layer] for layer in self.hybrid_layers]

    @staticmethod
    def _watched(
        layer: nn.Module, forward: Callable, seen: set[int], saved: dict[nn.Module, int], *arguments
    ) -> Tensor:
        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                saved[layer] += storage.nbytes()
            return x.detach()  # x itself could be of a cycle that is never freed

        with saved_tensors_hooks(pack, lambda x: x):
            return forward(*arguments)


def official_decoder_layer(layer: nn.Module, x: Tensor, rope, slow, cache=None, backend=None) -> Tensor:
    """A hybrid layer the way the released code goes about it: ``layer.official_cross_attention`` says how."""
    attention = layer.self_attn
    tokens = official_norm(slow.tokens, layer.input_layernorm.weight)
    kv = attention.cross_attn_kv_proj(tokens).view(len(x), -1, attention.num_kv_heads, 2, attention.head_dim)
    is_text = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    is_text.view(-1)[slow.text_rows.long()] = True
    state, query = attention.attend(layer.input_layernorm(x), rope, cache)
    (gate,) = attention.cross_attn_gate_proj
    gating = gate.weight, gate.bias, attention.cross_attn_warm_up_gate
    x = x + attention.o_proj(official_cross_attention(state, query, kv, is_text, *gating))
    return x + layer.mlp(layer.post_attention_layernorm(x))


class Step(NamedTuple):
    """A contender's step: the call that is timed."""

    training: Training
    way: Way
    checkpointing: bool

    def __call__(self) -> Tensor:
        return self.training.step(self.way, self.checkpointing)

    def error(self) -> float:
        """``Training.error``; of the base, which has no slow path to be wrong, whether its loss is finite."""
        if not self.way.has_slow_path:
            return 0.0 if bool(self().isfinite()) else float("inf")
        return self.training.error(self.way, self.checkpointing)


def observe(call: Step) -> dict[str, object]:
    facts: dict[str, object] = {}
    if not call.checkpointing:
        facts["saved_bytes"] = call.training.saved_bytes(call.way)
    if call.training.ids.is_cuda:
        call()  # the optimizer's state and the libraries' workspaces are there from the first step on
        facts["held_bytes"], facts["peak_bytes"] = torch.cuda.memory_allocated(), peak_bytes(call)
    return facts


def run(runner: Runner) -> None:
    dtype = runner.dtypes[0]
    for shape in train_shapes(runner.shapes, not runner.is_gpu):
        _run_shape(runner, shape, dtype)


def _run_shape(runner: Runner, shape: TrainShape, dtype: str) -> None:
    ways = [way for way in WAYS if way.kind != "peer" or runner.wants_peer(way.who)]
    points = [(OP, "", False), (OP, CHECKPOINTING, True), *[(f"{OP}-gpu", "", False)] * runner.is_gpu]
    points = [
        point
        for point in points
        if not all(runner.is_done(point[0], shape.name + point[1], dtype, way.who) for way in ways)
    ]
    if not points:
        return
    training = Training(shape, dtype, runner.device)
    short = 3 if runner.quick else 1
    wall = partial(wall_lane, device=runner.device, budget_s=BUDGET_S / short, most=TURNS // short)
    for op, suffix, checkpointing in points:
        contenders = [_contender(Step(training, way, checkpointing), shape, dtype) for way in ways]
        lane, watch = (wall, observe) if op == OP else (partial(kernel_lane, turns=PROFILED), None)
        runner.compare(op, shape.name + suffix, dtype, contenders, base=BASE, lane=lane, observe=watch)


def _contender(step: Step, shape: TrainShape, dtype: str) -> Contender:
    way, cost = step.way, train_cost(shape, dtype, step.way.has_slow_path)
    variant = Variant("", lambda: ([step], step.error))
    facts = {"slow_tokens": shape.batch * shape.model.num_slow}
    return Contender(way.who, [variant], cost, way.kind, tolerance=1.0, facts=facts)
