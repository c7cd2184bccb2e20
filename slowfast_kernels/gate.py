"""The gate of a call, as one thing that ops hand to every backend: what kind it is, and its tensors. Kinds:

g = act(state . weight + bias) * factor(warm_up)        kinds "tanh", "linear", "sigmoid"
g =                              factor(warm_up)        kind "none"
g = value *                      factor(warm_up)        kind "given": activated outside
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# What a backend must be able to form, with the codes of GateKind in csrc/params.h.
GATE_CODES = {"tanh": 0, "linear": 1, "none": 2, "given": 3, "sigmoid": 4}
WEIGHTED_GATES = ("tanh", "linear", "sigmoid")  # kinds with a weight and a bias
GATES = (*WEIGHTED_GATES, "none")  # what ``gate=`` takes; "given" follows from ``gate_value``


class Gate(NamedTuple):
    """A validated gate. ``weight`` and ``bias`` belong to weighted kinds alone, ``value`` to "given"."""

    kind: str
    weight: Tensor | None  # [C] or [1, C]
    bias: Tensor | None  # [1]
    warm_up: Tensor | None  # [1]; None: factor 1
    warm_up_tanh: bool  # factor = tanh(warm_up), else warm_up itself
    value: Tensor | None  # [Nt], in the order of text_rows

    @classmethod
    def of(
        cls,
        weight: Tensor | None,
        bias: Tensor | None,
        warm_up: Tensor | None,
        value: Tensor | None = None,
        gate: str = "tanh",
        warm_up_tanh: bool = True,
    ) -> Gate:
        """From an op's arguments, in the order in which the ops carry them."""
        return cls(gate if value is None else "given", weight, bias, warm_up, warm_up_tanh, value)

    @property
    def read_tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """(weight, bias, warm_up, value) as kernels read them."""
        return self.weight, self.bias, self.warm_up, float_value(self.value)


def float_value(value: Tensor | None) -> Tensor | None:
    """A gate's ``value`` as kernels read it: contiguous float32."""
    return None if value is None else value.float().contiguous()
