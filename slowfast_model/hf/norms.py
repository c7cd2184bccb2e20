"""RMS norms of transformers' models by what they do: ``x / rms(x) * weight``, or Gemma's ``x / rms(x) * (1 + weight)``.

Of such a norm slow tokens need the division alone, once for all hybrid layers; the factor goes into the projection.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..plain import can_be_plain, is_plain


def factor_offset(kind: type[nn.Module]) -> float | None:
    """What a class of norms adds to its weight before it multiplies ``x / rms(x)``. None: it does something else.

    Asked on a small tensor, and known from then on. As models are often made while another type or device is the
    default, or while new parameters go to no device, the tensor and the weight are float32 on the CPU by name.
    """
    try:
        return _asked(kind)
    except Exception:  # whatever a class does that is no such norm; asked again the next time
        return None


@cache
def _asked(kind: type[nn.Module]) -> float | None:
    own = {"dtype": torch.float32, "device": "cpu"}
    weight, x = torch.tensor([[0.5, -0.25, 2.0, 1.5], [3.0, -1.0, 0.25, 2.0]], **own)
    eps = 0.5  # so large that its place counts
    with torch.device("cpu"), torch.no_grad():
        norm = kind(len(weight), eps=eps)
        found, kept = functional_call(norm, {"weight": weight}, (x,)), eps_of(norm)
    if kept != eps or list(norm.state_dict()) != ["weight"]:
        return None
    can_be_plain(kind, ("weight",))
    normalised = F.rms_norm(x, x.shape, eps=eps)
    for offset in (0.0, 1.0):
        if torch.allclose(found, normalised * (offset + weight), rtol=1e-5, atol=1e-6):
            return offset
    return None


def eps_of(norm: nn.Module) -> float | None:
    """Under either of the names that transformers has for it."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def is_bare(norm: nn.Module, offset: float | None) -> bool:
    """Whether ``norm``, of a class with this ``factor_offset``, is that and nothing more: no hook, no other weight."""
    return offset is not None and norm.weight is not None and is_plain(norm, type(norm))


def factor(norm: nn.Module, offset: float) -> Tensor:
    """[C], that ``norm`` multiplies ``x / rms(x)`` by."""
    return norm.weight if offset == 0.0 else norm.weight.float() + offset
