"""Uneven batches against even ones of as much work, in turns: how well slow tokens are shared out.

Only the device knows the lengths of sequences, so a split made from shapes alone takes them for even. Rows are ours
only: the fused op on either batch.
"""

from __future__ import annotations

from functools import partial

from .attention import fused_call, fused_error, our_backends
from .inputs import make_inputs, reference_context
from .runner import Contender, Runner, Variant
from .selection import ragged_mixes
from .shapes import AttentionShape, RaggedMix, attention_cost
from .verdicts import EVEN, beside

OP = "ragged"


def run(runner: Runner) -> None:
    mixes = ragged_mixes(runner.shapes, not runner.is_gpu)
    if not mixes:
        return
    backends = [name for name in our_backends(runner, OP) if name != "eager"]  # which goes sequence by sequence
    for mix in mixes:
        for dtype in runner.dtypes:
            _run_mix(runner, mix, dtype, backends)


def _run_mix(runner: Runner, mix: RaggedMix, dtype: str, backends: list[str]) -> None:
    def is_done(backend: str) -> bool:
        return all(runner.is_done(OP, mix.name, dtype, who) for who in (backend, beside(backend, EVEN)))

    backends = [backend for backend in backends if not is_done(backend)]
    if not backends:
        return
    batches = []
    for shape, kind in ((mix.mix, "ours"), (mix.even, "base")):
        sets = make_inputs(shape, dtype, runner.device, runner.journal.meta["cache_bytes"])
        batches.append((shape, kind, sets, reference_context(sets[0])))
    for backend in backends:
        contenders = [_contender(backend, dtype, *batch) for batch in batches]
        runner.compare(OP, mix.name, dtype, contenders)


def _contender(backend: str, dtype: str, shape: AttentionShape, kind: str, sets, context) -> Contender:
    def build():
        return [fused_call(x, backend) for x in sets], partial(fused_error, sets[0], backend, context)

    who = backend if kind == "ours" else beside(backend, EVEN)
    variant = Variant(f"{shape.batch} sequences, {shape.num_slow} tokens", build)
    return Contender(who, [variant], attention_cost(shape, dtype, fused=True), kind)
