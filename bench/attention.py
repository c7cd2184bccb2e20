"""Attention over slow tokens: our backends run the fused op (attention, gate, mix), peers attention alone.

Floor: at decode the bytes of the slow KV cache over the read bandwidth; from about 64 text rows of 28 heads on, the
matrix products. A second, stricter check of ours runs with state = 0, where the output is g * context and nothing hides
an error of the attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

import slowfast_kernels as sk

from .inputs import AttentionInputs, make_inputs, reference_context, reference_mixed
from .peers import PEERS
from .registry import ATTENTION
from .runner import Contender, Runner, Variant, relative_error
from .selection import parse_attention, select, swept_batches
from .shapes import AttentionShape, attention_cost

OP, SWEEP = "attention", "batches"
ALONE = "attention alone"  # ours without gate and mix, as the peers are; by the backend that is chosen
HOST_SHAPE = AttentionShape.even(1, 1, 256)  # so little work that the host alone sets the pace


def fused_call(inputs: AttentionInputs, backend: str, state: torch.Tensor | None = None):
    state = inputs.state if state is None else state
    return partial(
        sk.slowfast_cross_attention,
        state,
        *inputs.attention,
        inputs.gate_weight,
        inputs.gate_bias,
        inputs.warm_up,
        backend=backend,
    )


def fused_error(inputs: AttentionInputs, backend: str, context: torch.Tensor) -> float:
    """The larger of the errors with the random state and with state = 0."""
    mixed = relative_error(fused_call(inputs, backend)(), reference_mixed(inputs, context))
    zero = torch.zeros_like(inputs.state)
    gate = torch.tanh(inputs.gate_bias.float()) * torch.tanh(inputs.warm_up.float())
    alone = relative_error(fused_call(inputs, backend, zero)(), gate * context.flatten(1))
    return max(mixed, alone)


def our_backends(runner: Runner, op: str) -> list[str]:
    """Backends of this machine for the run's device; the others become rows that say why."""
    from slowfast_kernels import _extension

    usable = []
    for name in sk.backends():
        reason = _extension.unavailable_reason(name, runner.device)
        if name == "triton" and not runner.is_gpu:
            reason = "needs a GPU (its interpreter on a CPU is for testing)"
        if reason is None:
            usable.append(name)
        else:
            runner.absent(op, name, reason, kind="ours")
    return usable


def run(runner: Runner) -> None:
    shapes = select(ATTENTION, runner.shapes, parse_attention, not runner.is_gpu)
    if not shapes:
        return
    backends = our_backends(runner, OP)
    _run_shapes(runner, OP, shapes, backends)
    for dtype in runner.dtypes[:1]:
        _run_host(runner, dtype, backends)


def run_sweep(runner: Runner) -> None:
    """The same for a sweep of batches, where it is asked for, and beside it our attention alone."""
    shapes = swept_batches(runner.shapes)
    if not shapes:
        return
    backends = [name for name in our_backends(runner, SWEEP) if name != "eager"]  # which takes seconds of each
    _run_shapes(runner, SWEEP, shapes, backends)


def _run_shapes(runner: Runner, op: str, shapes: Sequence[AttentionShape], backends: list[str]) -> None:
    peers = runner.present(op, PEERS)
    for shape in shapes:
        for dtype in runner.dtypes:
            _run_shape(runner, op, shape, dtype, backends, peers)


def _run_shape(runner: Runner, op: str, shape: AttentionShape, dtype: str, backends: list[str], peers: list) -> None:
    names = [*backends, *(peer.name for peer in peers)]
    if all(runner.is_done(op, shape.name, dtype, name) for name in names):
        return
    sets = make_inputs(shape, dtype, runner.device, runner.journal.meta["cache_bytes"])
    context = reference_context(sets[0])
    fused, alone = attention_cost(shape, dtype, fused=True), attention_cost(shape, dtype, fused=False)

    def ours(backend: str) -> Contender:
        def build():
            return [fused_call(x, backend) for x in sets], lambda: fused_error(sets[0], backend, context)

        # eager asks the host for the lengths of the sequences, so no graph can hold it
        return Contender(backend, [Variant("", build)], fused, "ours", capturable=backend != "eager")

    contenders = [ours(backend) for backend in backends]
    if op == SWEEP:
        calls = [partial(sk.text_cross_attention, *x.attention) for x in sets]
        variant = Variant("", lambda: (calls, lambda: relative_error(calls[0](), context)))
        contenders.append(Contender(ALONE, [variant], alone, "base"))
    contenders += [Contender(peer.name, peer.variants(sets, context), alone) for peer in peers]
    runner.compare(op, shape.name, dtype, contenders, sustained=True)


def _run_host(runner: Runner, dtype: str, backends: list[str]) -> None:
    inputs = make_inputs(HOST_SHAPE, dtype, runner.device, 0)[0]
    for backend in backends:
        if runner.is_gpu and backend == "eager":
            continue  # it waits for the device: there is no host time apart from the device's
        runner.host("host", "slowfast_cross_attention", dtype, backend, fused_call(inputs, backend))
