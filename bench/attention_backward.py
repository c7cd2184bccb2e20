"""Attention and its gradients, forward + backward and the backward pass alone: ours and peers are attention alone.

Floor: 14 Nt Hq D Ns FLOP of a step, of which the backward pass is 10; from about 64 text rows of 28 heads on the bytes
(K and V read, their gradients written) are a third of that. Ours reads and writes K and V interleaved, as the model has
them; peers are given them apart. Every call computes dQ, dK and dV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import slowfast_kernels as sk
from slowfast_kernels.calls import BackwardTensors
from slowfast_kernels.ops.op import OPS

from . import backward
from .attention import our_backends
from .backward import BACKWARD, STEP, Choice, Competitor, Passes, differentiated
from .backward_peers import GRADIENT_PEERS, GradientPeer, competitors, modes
from .inputs import AttentionInputs, Gradients, make_inputs, reference_gradients
from .peers import Sets
from .registry import ATTENTION_BACKWARD
from .runner import Runner
from .selection import parse_attention, select
from .shapes import AttentionShape, attention_backward_cost, attention_cost

NAME = "text_cross_attention"
IN_PARTS = "auto+triton"  # the automatic forward pass, Triton's backward pass


@dataclass(frozen=True, eq=False)
class InParts:
    """Forward and backward pass on backends of their own, which no call of the public function has."""

    given: dict[str, object]
    upstream: Tensor
    forward_backend: str | None
    backward_backend: str

    def forward(self) -> tuple[Sequence[Tensor], object]:
        tensors, options = OPS[NAME].bind(self.given | {"backend": self.forward_backend})
        kept = OPS[NAME].run(tensors, options)
        return kept[:1], kept

    def backward(self, kept: tuple[Tensor, Tensor], again: bool) -> Sequence[Tensor]:
        tensors, options = OPS[NAME].bind(self.given | {"backend": self.backward_backend})
        given = BackwardTensors((self.upstream, None), kept, tensors)
        found = OPS[NAME].run_backward(given, options, (True, True, False))
        return [grad for grad in found if grad is not None]


def run(runner: Runner) -> None:
    shapes = select(ATTENTION_BACKWARD, runner.shapes, parse_attention, not runner.is_gpu)
    if not shapes:
        return
    backends = our_backends(runner, f"attention-{STEP}")
    peers = runner.present(f"attention-{STEP}", GRADIENT_PEERS)
    for shape in shapes:
        for dtype in runner.dtypes:
            _run_shape(runner, shape, dtype, backends, peers)


def _run_shape(
    runner: Runner, shape: AttentionShape, dtype: str, backends: list[str], peers: list[GradientPeer]
) -> None:
    sets = make_inputs(shape, dtype, runner.device, runner.journal.meta["cache_bytes"])
    mine = choices(sets[0], backends)
    names = [choice.who for choice in mine] + [mode.name for peer in peers for mode in modes(peer)]
    if backward.is_done(runner, "attention", shape.name, dtype, names):
        return
    upstream = [torch.randn_like(x.q) for x in sets]
    reference = reference_gradients(sets[0], upstream[0])
    forward_cost, backward_cost = attention_cost(shape, dtype, fused=False), attention_backward_cost(shape, dtype)
    costs = {STEP: forward_cost + backward_cost, BACKWARD: backward_cost}
    against = [ours(choice, sets, upstream) for choice in mine]
    against += [each for peer in peers for each in competitors(peer, sets, upstream)]
    backward.compare(runner, "attention", shape.name, dtype, against, reference, costs)


def choices(inputs: AttentionInputs, backends: list[str]) -> list[Choice]:
    """Ours; where a backend of its own makes the automatic backward pass, Triton's behind the automatic forward too."""
    found = backward.choices(NAME, backends, *inputs.attention)
    auto, triton = found[0], next((choice for choice in found if choice.who == "triton"), None)
    if triton and triton.backward == "triton" and "triton" not in (auto.forward, auto.backward):
        found.insert(1, Choice(IN_PARTS, None, auto.forward, "triton"))
    return found


def ours(choice: Choice, sets: Sets, upstream: list[Tensor]) -> Competitor:
    def every() -> list[Passes]:
        return [_passes(choice, *each) for each in zip(sets, upstream, strict=True)]

    return backward.ours(choice, every, _answers)


def _passes(choice: Choice, inputs: AttentionInputs, upstream: Tensor) -> Passes:
    q, slow_kv, *places = inputs.attention
    if choice.who == IN_PARTS:
        given = backward.named_arguments(NAME, *inputs.attention, return_lse=True)
        return InParts(given, upstream, choice.backend, choice.backward)

    def attend(q: Tensor, slow_kv: Tensor) -> Tensor:
        return sk.text_cross_attention(q, slow_kv, *places, backend=choice.backend)

    return differentiated(attend, (q, slow_kv), [upstream])


def _answers(found: Sequence[Tensor]) -> Gradients:
    context, grad_q, grad_kv = found
    return Gradients(context, grad_q, *grad_kv.unbind(2))
