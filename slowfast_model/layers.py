"""The parts of a Qwen2 decoder layer that know nothing of slow tokens: RMSNorm, rotary embedding, MLP."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slowfast_kernels.bounded_cache import BoundedCache
from slowfast_kernels.constants import plain_tensors

from .transfer import to_device


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, statistics in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor, product: Callable[[Tensor, Tensor], Tensor] = silu_mul) -> Tensor:
        """``product``: how silu(gate(x)) * up(x) is computed."""
        return self.down_proj(product(self.gate_proj(x), self.up_proj(x)))


Rope = tuple[Tensor, Tensor]  # cos and signed sin, [..., 1, D]: the 1 broadcasts over heads


def _inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    """On the CPU, whatever the default device: a GPU's pow differs in the last bits, which large positions magnify."""
    exponent = torch.arange(0, head_dim, 2, device="cpu", dtype=torch.float32) / head_dim
    return 1.0 / theta**exponent


def rope_at(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rope:
    """Rotation by ``positions`` [...]; angles in float32. The first half of sin is negated for ``apply_rope``."""
    angles = positions[..., None, None].float() * to_device(_inverse_frequencies(head_dim, theta), positions.device)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


_first: BoundedCache[Rope] = BoundedCache(64 * 2**20)  # bytes, over all devices


def first_rope(length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Rope:
    """``rope_at`` of the positions 0..length - 1. No weight is in these tables: they are kept, and not to be written.

    A stream has its own, as another could read them before they are written. Those of a CUDA graph are in its memory
    and not kept; nor are any that would fill the cache alone.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    rounded = 1 << (length - 1).bit_length()
    is_long = 2 * rounded * head_dim * dtype.itemsize > _first.max_bytes
    if is_long or (stream is not None and torch.cuda.is_current_stream_capturing()):
        return rope_at(torch.arange(length, device=device), head_dim, theta, dtype)
    key = (rounded, head_dim, theta, dtype, device, stream)
    tables = _first.get(key)
    if tables is None:
        with plain_tensors():
            tables = rope_at(torch.arange(rounded, device=device), head_dim, theta, dtype)
        tables = _first.put(key, tables, sum(x.nbytes for x in tables))
    cos, sin = tables
    return cos[:length], sin[:length]


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """x [B, L, H, D]; rotating the halves by a roll takes three launches instead of five."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a linear layer returns for activations of ``dtype``: the autocast type where autocast is on."""
    return torch.get_autocast_dtype(device.type) if _is_autocast_on(device) else dtype


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Types are as torch promotes them while the block lasts."""
    return torch.autocast(device.type, enabled=False) if _is_autocast_on(device) else nullcontext()


def _is_autocast_on(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)  # of meta, torch cannot be asked


def weights_dtype(*modules: nn.Module) -> torch.dtype:
    """The dtype of the first weight that is computed with as it is stored: quantised ones are integers, or one byte."""
    weights = (p for module in modules for p in module.parameters())
    dtypes = (p.dtype for p in weights if p.is_floating_point() and p.element_size() > 1)
    return next(dtypes, torch.get_default_dtype())
