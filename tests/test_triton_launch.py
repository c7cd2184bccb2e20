"""What is kept of a Triton launch: which calls share it, which do not, and what the driver is handed.

A pretended driver takes the launches of kernels that are compiled for a GPU that is not here; it is the same whether
Triton's own way or ours leads to it, so the two are compared argument by argument, with whichever Triton is installed.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from triton_launches import NUM_SMS, SHARED_BYTES, VERSION, compiled, pretend_driver, triton

from slowfast_kernels.calls import (
    AttentionOptions,
    AttentionTensors,
    BackwardTensors,
    FusedOptions,
    FusedTensors,
    MergeOptions,
    MergeTensors,
    MixOptions,
    MixTensors,
    PoolCallOptions,
    PoolTensors,
)


@pytest.fixture
def driver(monkeypatch):
    return pretend_driver(monkeypatch)


@pytest.fixture
def through_triton(monkeypatch):
    """The names of kernels that were launched in Triton's own way."""
    names, real = [], triton.runtime.jit.JITFunction.run

    def run(kernel, *args, **kwargs):
        names.append(kernel.__name__)
        return real(kernel, *args, **kwargs)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    return names


def addresses(arguments):
    return [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]


# ------------------------------------------------------------------------------------------ what the driver is handed


def numbers(count: int, *more: int) -> torch.Tensor:
    return torch.tensor([count, *more], dtype=torch.int32)


def attention_tensors(num_slow=48):
    q, slow_kv = torch.zeros(1, 2, 64).half(), torch.zeros(num_slow, 1, 2, 64).half()
    return AttentionTensors(q, slow_kv, numbers(0, num_slow), numbers(0), numbers(0, 1))


def batch_tensors(batch):
    """So many sequences of one block each, save the last."""
    num_slow = 40 * 64
    q, slow_kv = torch.zeros(batch, 2, 64).half(), torch.zeros(num_slow, 1, 2, 64).half()
    begins = numbers(*range(batch))
    return AttentionTensors(
        q, slow_kv, numbers(*range(0, 64 * batch, 64), num_slow), begins, numbers(*range(batch + 1))
    )


def plain(num_splits, tensors=None):
    tensors = tensors or attention_tensors()
    return "text_cross_attention", tensors, AttentionOptions(None, True, num_splits, "triton")


GATING = (torch.zeros(128).half(), torch.zeros(1).half(), torch.zeros(1).half(), None)


def fused(num_splits, tensors=None):
    tensors = tensors or attention_tensors()
    tensors = FusedTensors(torch.zeros(len(tensors.q), 128).half(), *tensors, *GATING)
    return "cross_attention", tensors, FusedOptions(None, num_splits, "tanh", True, "triton")


def mix():
    return (
        "gated_residual_mix",
        MixTensors(*torch.zeros(2, 1, 128).half(), numbers(0), *GATING),
        MixOptions("tanh", True, "triton"),
    )


def merge():
    context, lse = torch.zeros(1, 2, 64).half(), torch.zeros(1, 2)
    return "merge_attention", MergeTensors(context, lse, context, lse), MergeOptions("triton")


def pool():
    options = PoolCallOptions((2,), (4, 4), 2, 1, 1, 1, 1, 1e-6, "triton")
    return "pool", PoolTensors(torch.zeros(2, 16, 64).half()), options


def mix_gradients():
    _, tensors, options = mix()
    return "gated_residual_mix_backward", BackwardTensors((torch.zeros(1, 128).half(),), (), tensors), options


def pool_gradients():
    _, tensors, options = pool()
    grads = tuple(torch.zeros(n, 64).half() for n in (options.plan.num_slow, options.plan.num_fast))
    return "pool_backward", BackwardTensors(grads, (), tensors), options


def prepared(name, tensors, options):
    """The function of tensors that the backend has for such a call."""
    from slowfast_kernels import triton as backend

    if name == "pool":
        return lambda tensors: backend.pool(*tensors, options.plan, options.norm_eps)
    needs = ((True,) * 6,) if name.endswith("_backward") else ()
    return getattr(backend, f"prepare_{name}")(tensors, options, *needs)


OPS = {
    "attention": (lambda: plain(1), ["_attention"]),
    "attention in parts": (lambda: plain(2), ["_attention", "_combine"]),
    "batch": (lambda: plain(0, batch_tensors(2)), ["_attention", "_combine"]),
    "fused batch": (lambda: fused(0, batch_tensors(2)), ["_attention", "_combine"]),
    "fused batch in a wave": (lambda: fused(0, batch_tensors(40)), ["_attention", "_combine", "_gated_mix"]),
    "fused": (lambda: fused(1), ["_attention", "_gated_mix"]),
    "fused in parts": (lambda: fused(2), ["_attention", "_combine"]),
    "mix": (mix, ["_gated_mix"]),
    "merge": (merge, ["_merge"]),
    "pool": (pool, ["_pool"]),
    "mix's gradients": (mix_gradients, ["_gated_mix_backward", "_sum_partials"]),
    "pool's gradients": (pool_gradients, ["_pool_backward"]),
}


@pytest.fixture
def seen(monkeypatch):
    """Launches as the ops ask for them: (launch, tensors, numbers)."""
    from slowfast_kernels.triton import _common, attention, gated_mix_backward
    from slowfast_kernels.triton._launch import Launch

    device = _common.Device(NUM_SMS[90], SHARED_BYTES[90], _common.HAS_DEPENDENT_LAUNCH, prefetch=True)
    for module in (attention, gated_mix_backward):
        monkeypatch.setattr(module, "describe", lambda _: device)
    asked, real = [], Launch.__call__

    def call(launch, tensors, numbers=()):
        asked.append((launch, tensors, numbers))
        real(launch, tensors, numbers)

    monkeypatch.setattr(Launch, "__call__", call)
    return asked


@compiled
@pytest.mark.parametrize("op", OPS)
def test_a_later_launch_hands_the_driver_what_triton_hands_it(op, driver, through_triton, seen):
    make, names = OPS[op]
    name, tensors, options = make()
    prepared(name, tensors, options)(tensors)
    assert [kernel for kernel, _ in driver.launches] == through_triton == names
    first, driver.launches[:] = list(driver.launches), []
    for launch, arguments, values in list(seen):
        launch(arguments, values)
    assert through_triton == names, "Triton binds nothing anew"
    for (kernel, expected), (again, found) in zip(first, driver.launches, strict=True):
        assert again == kernel
        assert addresses(found[9:]) == addresses(expected[9:])
        assert found[:6] == expected[:6], "grid, stream, binary and its attributes"
        assert found[7:9] == expected[7:9], "hooks"


# ------------------------------------------------------------------------------------------------ what shares a launch


class Compiled(triton.compiler.CompiledKernel):
    """What a kernel of two tensors, a number and a constant was compiled to, before or from Triton 3.3 on."""

    def __init__(self, backend="cuda", signature=("x", "out", "n")):
        self.module = None
        self.metadata = SimpleNamespace(target=SimpleNamespace(backend=backend))
        self.src = SimpleNamespace(signature=dict.fromkeys(signature))
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid, arguments))


class Kernel:
    """``compiled``: what the next launch through Triton gives back."""

    def __init__(self, compiled):
        self.compiled, self.launches, self.pre_run_hooks = compiled, [], []

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.launches.append((grid, arguments, constants))
            return self.compiled

        return run


class Argument(SimpleNamespace):
    """A tensor as a launch sees it."""

    def __init__(self, address, device=0):
        super().__init__(address=address, device=torch.device("cuda", device))

    def data_ptr(self):
        return self.address


X, OUT = Argument(1024), Argument(2048)


@pytest.fixture
def kernel():
    return Kernel(Compiled())


@pytest.fixture
def launch(kernel):
    from slowfast_kernels.triton._launch import Launch

    return Launch(kernel, (3, 2), {"C": 64, "num_warps": 4})


def test_the_first_call_goes_through_triton_and_later_ones_do_not(kernel, launch):
    launch((X, OUT), (5,))
    assert kernel.launches == [((3, 2, 1), (X, OUT, 5), {"C": 64, "num_warps": 4})]
    launch((Argument(4096), None), (5,))  # through Triton: there was a second tensor
    launch((Argument(8192), Argument(16)), (5,))
    assert len(kernel.launches) == 2
    assert kernel.compiled.launches == [((3, 2, 1), (8192, 16, 5))]


def test_constants_go_along_where_triton_takes_them(kernel, launch):
    kernel.compiled = Compiled(signature=("x", "out", "n", "C"))
    for _ in range(2):
        launch((X, OUT), (5,))
    assert kernel.compiled.launches == [((3, 2, 1), (1024, 2048, 5, 64))]


def test_a_dependent_launch_is_asked_for(kernel):
    from slowfast_kernels.triton._launch import Launch

    Launch(kernel, (1,), {"C": 64}, waits=True)((X, OUT), (5,))
    assert kernel.launches == [((1, 1, 1), (X, OUT, 5), {"C": 64, "launch_pdl": True})]


@pytest.mark.parametrize(
    ("tensors", "numbers"),
    [
        ((Argument(1032), OUT), (5,)),
        ((X, Argument(2050)), (5,)),
        ((X, None), (5,)),
        ((X, OUT), (16,)),
        ((X, OUT), (1,)),
        ((X, OUT), (None,)),
        ((Argument(1024, device=1), Argument(2048, device=1)), (5,)),
    ],
    ids=["x is not aligned", "out is not aligned", "no out", "16", "1", "no number", "another device"],
)
def test_what_triton_may_compile_by_is_asked_of_triton(tensors, numbers, kernel, launch):
    launch((X, OUT), (5,))
    usual, kernel.compiled = kernel.compiled, Compiled()
    for _ in range(2):
        launch(tensors, numbers)
    assert len(kernel.launches) == 2
    assert len(kernel.compiled.launches) == 1
    launch((X, OUT), (5,))
    assert usual.launches == [((3, 2, 1), (1024, 2048, 5))]
    assert len(kernel.launches) == 2


@pytest.mark.skipif(VERSION < (3, 4), reason="Triton has no knobs yet")
@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("runtime", "debug", True),
        ("compilation", "instrumentation_mode", "consan"),
        ("compilation", "fpsan_homomorphic_casts", True),
    ],
)
def test_a_setting_that_triton_compiles_by_is_asked_of_triton(group, name, value, kernel, launch, monkeypatch):
    knobs = getattr(triton.knobs, group)
    if not hasattr(knobs, name):
        pytest.skip(f"triton {triton.__version__} has no such setting")
    launch((X, OUT), (5,))
    with monkeypatch.context() as changed:
        changed.setattr(knobs, name, value)
        launch((X, OUT), (5,))
        assert len(kernel.launches) == 2
    launch((X, OUT), (5,))
    assert len(kernel.launches) == 2


@pytest.mark.skipif(VERSION >= (3, 4), reason="knobs.runtime.debug")
def test_triton_debug_is_asked_of_triton(kernel, launch, monkeypatch):
    launch((X, OUT), (5,))
    monkeypatch.setenv("TRITON_DEBUG", "1")
    launch((X, OUT), (5,))
    assert len(kernel.launches) == 2


def test_hooks_before_a_run_see_every_launch(kernel, launch):
    launch((X, OUT), (5,))
    kernel.pre_run_hooks.append(print)
    for _ in range(2):
        launch((X, OUT), (5,))
    assert len(kernel.launches) == 3
    kernel.pre_run_hooks.clear()
    launch((X, OUT), (5,))
    assert len(kernel.launches) == 3


def test_a_hook_into_the_compiler_s_stages_sees_every_launch(kernel, launch, monkeypatch):
    if VERSION < (3, 4) or not hasattr(triton.knobs.runtime, "add_stages_inspection_hook"):
        pytest.skip(f"triton {triton.__version__} has no such hook")
    launch((X, OUT), (5,))
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", lambda: ("", ""))
    for _ in range(2):
        launch((X, OUT), (5,))
    assert len(kernel.launches) == 3


@pytest.mark.parametrize(
    "compiled", [None, object(), Compiled(backend="hip")], ids=["interpreted", "not compiled yet", "of another vendor"]
)
def test_what_cannot_be_kept_goes_through_triton_every_time(compiled, kernel, launch):
    kernel.compiled = compiled
    for _ in range(3):
        launch((X, OUT), (5,))
    assert len(kernel.launches) == 3


def test_so_many_compiled_forms_are_kept(launch):
    from slowfast_kernels.triton._launch import _MOST

    for n in range(3 * _MOST):
        launch((X, OUT), (n,))
        assert 1 <= len(launch._kept) <= _MOST


@compiled
def test_stream_and_hooks_are_those_of_the_launch(driver, seen):
    name, tensors, options = mix()
    run = prepared(name, tensors, options)
    run(tensors)
    driver.stream = 2
    run(tensors)
    assert [arguments[3] for _, arguments in driver.launches] == [1, 2]
