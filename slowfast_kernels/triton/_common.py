"""What the Triton ops share: the gate's arithmetic, and the facts about a device that configurations depend on."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..calls import BackwardTensors

# Programmatic dependent launch came to kernels in Triton 3.4, where a kernel that says so does not compile yet: its two
# functions do not know the argument that the compiler of that very release hands them.
_gdc_wait = getattr(tl.extra.cuda, "gdc_wait", None)
HAS_DEPENDENT_LAUNCH = _gdc_wait is not None and "_semantic" in inspect.signature(_gdc_wait).parameters

if HAS_DEPENDENT_LAUNCH:
    gdc_wait, gdc_launch_dependents = _gdc_wait, tl.extra.cuda.gdc_launch_dependents
else:  # kernels name them, but no launch asks for them

    @triton.jit
    def gdc_wait():
        pass

    @triton.jit
    def gdc_launch_dependents():
        pass


try:  # arguments of a kernel that are TMA's tensor maps
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None


@dataclass(frozen=True)
class Device:
    """What ``heuristics`` needs to know of a GPU. The interpreter, with no GPU, gets a small one."""

    num_sms: int
    shared_bytes: int  # that one program may use
    dependent_launch: bool  # programmatic dependent launch: NVIDIA, sm_90 and newer, if Triton has it
    prefetch: bool  # PTX has an instruction that asks L2 for a line: NVIDIA

    @property
    def tensor_maps(self) -> bool:
        """Kernels may take descriptors, through which TMA loads: sm_90 and newer, and a Triton that has them all."""
        return self.dependent_launch and TensorDescriptor is not None


@functools.lru_cache(maxsize=64)
def describe(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(num_sms=2, shared_bytes=99 * 1024, dependent_launch=False, prefetch=False)
    facts = torch.cuda.get_device_properties(device)
    shared = getattr(facts, "shared_memory_per_block_optin", facts.shared_memory_per_block)
    nvidia = torch.version.hip is None
    dependent_launch = HAS_DEPENDENT_LAUNCH and nvidia and facts.major >= 9
    return Device(facts.multi_processor_count, shared, dependent_launch, prefetch=nvidia)


def on_device_of(op):
    """Launch on the device (and its current stream) of the call's first tensor, whatever device is current.

    ``op`` takes a tensor, or the named tuple of a call's tensors, or of its backward pass, first.
    """

    @functools.wraps(op)
    def guarded(tensors, *args, **options):
        first = tensors.inputs if isinstance(tensors, BackwardTensors) else tensors
        first = first[0] if isinstance(first, tuple) else first
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return op(tensors, *args, **options)
        return op(tensors, *args, **options)

    return guarded


@triton.jit
def prefetch(lines):
    """Ask L2 for the 128 bytes at each of these pointers; where ``Device.prefetch``."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def tanh(x):
    """Accurate in relative terms near 0 too (warm-up gates start there), exactly 0 at 0."""
    square = x * x
    series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return tl.where(tl.abs(x) < 0.2, series, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def _weighted(state, weight, bias, cols, C: tl.constexpr):
    w = tl.load(weight + cols, mask=cols < C, other=0.0).to(tl.float32)
    return tl.sum(state * w, 0) + tl.load(bias).to(tl.float32)


@triton.jit
def activated(x, GATE: tl.constexpr):
    """Of the kinds with a weight."""
    if GATE == "tanh":
        act = tanh(x)
    elif GATE == "linear":
        act = x
    else:
        tl.static_assert(GATE == "sigmoid", "a kind of gate that this kernel does not know")
        act = 1 / (1 + tl.exp(-x))
    return act


@triton.jit
def before_activation(grad, act, GATE: tl.constexpr):
    """The gradient of what ``activated`` took, from that of what it gave, ``act``."""
    if GATE == "tanh":
        grad = grad * (1 - act * act)
    elif GATE == "sigmoid":
        grad = grad * (act * (1 - act))
    else:
        tl.static_assert(GATE == "linear", "a kind of gate that this kernel does not know")
    return grad


@triton.jit
def unweighted(value, text, GATE: tl.constexpr):
    """Of the kinds without."""
    if GATE == "none":
        act = 1.0
    else:
        tl.static_assert(GATE == "given", "a kind of gate that this kernel does not know")
        act = tl.load(value + text)
    return act


@triton.jit
def factor_of(warm_up, TANH_WARM_UP: tl.constexpr):
    factor = tl.load(warm_up).to(tl.float32)
    return tanh(factor) if TANH_WARM_UP else factor


@triton.jit
def gate_of(
    state, weight, bias, warm_up, value, text, cols, C: tl.constexpr, GATE: tl.constexpr, TANH_WARM_UP: tl.constexpr
):
    """The gate of text row ``text`` as a float32 scalar; ``state`` is its row in float32, 0 past C. GATE: its kind."""
    if weight is not None:
        g = activated(_weighted(state, weight, bias, cols, C), GATE)
    else:
        g = unweighted(value, text, GATE)
    if warm_up is not None:
        g = g * factor_of(warm_up, TANH_WARM_UP)
    return g
