"""Launches of the Triton backend, recorded instead of run, and compiled ahead of time for GPUs that are not here.

The recorder runs the backend on meta tensors and keeps each launch, so that exactly what a GPU would run is compiled.
The pretended driver lets Triton compile and launch by itself, on tensors of the CPU, and keeps what it is handed.
"""

import zlib

import pytest
import torch
from targets import INTERPRETER, interpreted  # noqa: F401  the mark: for those who import ``compiled`` too

triton = pytest.importorskip("triton")

compiled = pytest.mark.skipif(INTERPRETER, reason="TRITON_INTERPRET=1: there is no compiler")

HALF = torch.bfloat16
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # that a program may use
NUM_SMS = {80: 108, 90: 132, 100: 148}
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    int: "i32",
    float: "fp32",
}


class Launch:
    """One recorded ``kernel[grid](*args, **kwargs)``, specialised as Triton's launcher specialises it."""

    def __init__(self, kernel, args, kwargs):
        names = kernel.arg_names
        values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        self.kernel, self.options = kernel, {k: v for k, v in kwargs.items() if k not in names}
        self.signature, self.constants, self.attributes = {}, {}, {}
        for i, parameter in enumerate(kernel.params):
            name, value = parameter.name, values[parameter.name]
            special = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
                self.signature[name], self.constants[name] = "constexpr", value
                continue
            if hasattr(value, "block_shape"):
                self.signature[name] = f"tensordesc<{TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
                continue
            is_tensor = isinstance(value, torch.Tensor)
            self.signature[name] = TYPES[value.dtype] if is_tensor else TYPES[type(value)]
            if is_tensor or (special and type(value) is int and value % 16 == 0):
                self.attributes[(i,)] = [["tt.divisibility", 16]]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def compile(self, arch: int):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, attributes = self.signature, self.attributes
        if VERSION < (3, 3):  # constants are in no signature there, and attributes have a class
            from triton.backends.compiler import AttrsDescriptor

            signature = {name: kind for name, kind in signature.items() if kind != "constexpr"}
            attributes = AttrsDescriptor.from_hints({index: 16 for (index,) in attributes})
        source = ASTSource(self.kernel, signature, self.constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=self.options)


def meta(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def index(n: int) -> torch.Tensor:
    return meta(n, dtype=torch.int32)


def recorder(monkeypatch: pytest.MonkeyPatch):
    """recorder(...)(arch) -> the list that launches of the Triton backend are then kept in instead of being run."""
    from slowfast_kernels.triton import attention, attention_backward, gated_mix_backward, gemv
    from slowfast_kernels.triton._common import HAS_DEPENDENT_LAUNCH, Device

    launches = []

    def run(kernel, *args, grid, warmup, **kwargs):
        assert all(extent >= 1 for extent in grid)
        launches.append(Launch(kernel, args, kwargs))

    def start(arch: int) -> list[Launch]:
        device = Device(NUM_SMS[arch], SHARED_BYTES[arch], HAS_DEPENDENT_LAUNCH and arch >= 90, prefetch=True)
        for module in (attention, attention_backward, gated_mix_backward, gemv):
            monkeypatch.setattr(module, "describe", lambda _: device)
        monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
        return launches

    return start


def round_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts bfloat16 off, and takes its bits for integers in products: from here on as a GPU."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        return torch.tensor(data).bfloat16().view(torch.int16).numpy()

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
        return dot(self, a, b, *rest)

    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


class Driver:
    """Triton's of a GPU of sm_90. ``launches``: (kernel's name, what its launcher was called with)."""

    DEVICE = 77  # of no machine: what is compiled for it is found by no real launch

    def __init__(self):
        self.launches, self.stream, self.utils = [], 1, self

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.DEVICE

    def get_current_stream(self, device):
        assert device == self.DEVICE
        return self.stream

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED_BYTES[90], "multiprocessor_count": NUM_SMS[90]}

    def load_binary(self, name, kernel, shared, device):
        handle = (None, zlib.crc32(kernel), 0, 0)
        return handle if VERSION < (3, 4) else (*handle, 1024)

    def launcher_cls(self, source, metadata):
        return lambda *arguments: self.launches.append((source.fn.__name__, arguments))


def pretend_driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    from triton.runtime.driver import driver as config

    pretended = Driver()
    monkeypatch.setattr(config, "_active" if hasattr(config, "_active") else "active", pretended)
    return pretended


def skip_unknown(arch: int) -> None:
    """Where the ptxas that Triton brings does not know a GPU."""
    if arch == 100 and VERSION < (3, 3):
        pytest.skip(f"the ptxas of triton {triton.__version__} knows no sm_100")


def compile_all(launches: list[Launch], arch: int):
    """Every distinct launch, compiled down to SASS, within the limits of its GPU."""
    for launch in launches:
        kernel = launch.compile(arch)
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED_BYTES[arch]
        yield launch, kernel
