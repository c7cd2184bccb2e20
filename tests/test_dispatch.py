"""Which backend runs a call, how a caller chooses, and what is said when the choice cannot run."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from cases import Shape, Video, make_frames, make_inputs
from targets import ALL, UNAVAILABLE

import slowfast_kernels as sk
from slowfast_kernels import _extension, eager
from slowfast_kernels.heuristics.backends import BACKENDS, OpCall, choose_backend, unsupported_reason
from slowfast_kernels.ops import dispatch, pool

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
OPS = [
    sk.slowfast_pool,
    sk.text_cross_attention,
    sk.gated_residual_mix,
    sk.slowfast_cross_attention,
    sk.merge_attention,
]


def missing(*backends: str) -> dict[str, str | None]:
    return {b: f"no {b} here" if b in backends else None for b in BACKENDS}


def call(op: str, device: str, dtype: torch.dtype, head_dim: int = 128) -> OpCall:
    capability = (9, 0) if device == "cuda" else None
    return OpCall(op, device, dtype, capability, head_dim=head_dim, num_text=64)


# ------------------------------------------------------------------------------------- automatic choice

ATTEND, FUSED, POOL, MIX = "text_cross_attention", "slowfast_cross_attention", "slowfast_pool", "gated_residual_mix"
CHOICES = [
    # the call, backends that are not here, chosen
    (call(POOL, "cuda", BF16), (), "cuda"),
    (call(POOL, "cuda", F32), ("cuda",), "triton"),
    (call(POOL, "cuda", F16), ("cuda", "triton"), "eager"),
    (call(POOL, "cpu", BF16), (), "cpu"),
    (call(POOL, "cpu", F32), ("cuda", "cpu"), "eager"),
    (call(POOL, "cpu", F64), (), "eager"),
    (call(MIX, "cuda", BF16), (), "cuda"),
    (call(MIX, "cuda", BF16), ("cuda",), "triton"),
    (call(MIX, "cpu", F16), ("cuda", "triton"), "cpu"),
    (call(ATTEND, "cpu", F32), ("cuda", "triton"), "cpu"),
    (call(ATTEND, "cpu", F32), ("cuda", "triton", "cpu"), "eager"),
    (call(ATTEND, "cuda", F64), (), "eager"),
    (call(ATTEND, "cuda", BF16, 128), (), "cuda"),
    (call(ATTEND, "cuda", F16, 64), (), "cuda"),
    (call(ATTEND, "cuda", BF16, 128), ("cuda",), "triton"),
    (call(ATTEND, "cuda", BF16, 80), (), "triton"),
    (call(ATTEND, "cuda", F32, 128), (), "triton"),
    (call(ATTEND, "cuda", BF16, 128)._replace(capability=(8, 0)), (), "triton"),
    (call(ATTEND, "cuda", BF16, 128)._replace(capability=(10, 0)), (), "triton"),
    (call(ATTEND, "cuda", BF16, 128)._replace(aligned=False), (), "triton"),
    (call(ATTEND, "cuda", BF16, 288), (), "eager"),
    (call(FUSED, "cuda", BF16, 128), (), "cuda"),
    (call(FUSED, "cuda", F16, 288), (), "eager"),
    (call(FUSED, "cuda", F32), ("cuda", "triton"), "eager"),
    (call(FUSED, "cpu", BF16, 288), (), "cpu"),
]


@pytest.mark.parametrize(("op_call", "absent", "chosen"), CHOICES)
def test_the_fastest_backend_that_supports_the_call_is_chosen(op_call, absent, chosen):
    assert choose_backend(op_call, missing(*absent)).backend == chosen


def test_a_choice_says_why_faster_backends_were_passed_over():
    choice = choose_backend(call("slowfast_pool", "cpu", F32), missing("cuda"))
    assert choice.rejected["cuda"] == "no cuda here"
    assert "by name" in choice.rejected["triton"]  # its interpreter is for testing
    assert "eager" not in choice.rejected


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu"])
def test_a_limit_names_what_came_and_the_way_out(backend):
    reason = unsupported_reason(backend, call("text_cross_attention", "cpu" if backend == "cpu" else "cuda", F64))
    assert "float64" in reason
    assert "backend='eager'" in reason


@pytest.mark.parametrize("op", [ATTEND, FUSED])
def test_bfloat16_attention_is_refused_in_tritons_interpreter(op):
    """It answers with errors of 1e8; pooling and mixing, which multiply no matrices, are right there."""
    reason = unsupported_reason("triton", call(op, "cpu", BF16))
    assert "interpreter" in reason
    assert "bfloat16" in reason
    for fine in (call(op, "cuda", BF16), call(op, "cpu", F16), call("slowfast_pool", "cpu", BF16)):
        assert unsupported_reason("triton", fine) is None


# --------------------------------------------------------------------------------- asking for a backend


@pytest.fixture
def chosen(monkeypatch):
    """Runs a tiny call and returns the names of the backends that served it, all here played by eager."""
    served = []

    def fake_module(name: str):
        served.append(name)
        return eager

    monkeypatch.setattr(_extension, "unavailable_reason", lambda backend, device: None)
    monkeypatch.setattr(dispatch, "unsupported_reason", lambda backend, call: None)
    monkeypatch.setattr(pool, "backend_module", fake_module)
    monkeypatch.delenv("SLOWFAST_BACKEND", raising=False)

    def run(**options) -> str:
        dispatch._resolve.cache_clear()
        sk.slowfast_pool(torch.ones(1, 1, 4), [1], (1, 1), **options)
        return served.pop()

    yield run
    dispatch._resolve.cache_clear()


def test_the_argument_wins_over_use_backend_and_use_backend_over_the_environment(chosen, monkeypatch):
    monkeypatch.setenv("SLOWFAST_BACKEND", "eager")
    assert chosen() == "eager"
    with sk.use_backend("triton"):
        assert chosen() == "triton"
        assert chosen(backend="cuda") == "cuda"
    assert chosen() == "eager"


def test_use_backend_nests_and_ends_with_its_block(chosen):
    with sk.use_backend("triton"):
        with sk.use_backend("eager"):
            assert chosen() == "eager"
        assert chosen() == "triton"
    with pytest.raises(RuntimeError, match="inside"), sk.use_backend("triton"):
        raise RuntimeError("inside")
    assert chosen() == "cpu"


def test_an_empty_environment_variable_means_automatic(chosen, monkeypatch):
    monkeypatch.setenv("SLOWFAST_BACKEND", "")
    assert chosen() == "cpu"


@pytest.mark.parametrize("how", ["argument", "block", "environment"])
def test_an_unknown_backend_is_named_with_the_known_ones(how, monkeypatch):
    def ask():
        if how == "argument":
            sk.slowfast_pool(torch.ones(1, 1, 4), [1], (1, 1), backend="metal")
        elif how == "block":
            sk.use_backend("metal").__enter__()
        else:
            monkeypatch.setenv("SLOWFAST_BACKEND", "metal")
            sk.slowfast_pool(torch.ones(1, 1, 4), [1], (1, 1))

    with pytest.raises(ValueError, match=r"backend: got 'metal', want one of cuda, triton, cpu, eager"):
        ask()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_gpu_backend_on_cpu_tensors_raises_and_names_the_limit(op, backend, rng, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = make_inputs(Shape(((2, 5),)), F32, "cpu", rng())
    context = torch.zeros(len(inputs.text_rows), inputs.state.shape[1])
    arguments = {
        sk.slowfast_pool: (make_frames(Video((2,), (2, 2)), F32, "cpu", rng()), [2], (2, 2)),
        sk.text_cross_attention: inputs.attention,
        sk.gated_residual_mix: (inputs.state, context, inputs.text_rows, *inputs.gating),
        sk.slowfast_cross_attention: inputs.fused,
        sk.merge_attention: (torch.ones(2, 3, 4), torch.ones(2, 3)) * 2,
    }[op]
    op(*arguments)  # a call that was served before must not be remembered for another backend
    with pytest.raises(NotImplementedError, match=f"backend='{backend}' cannot run {op.__name__}: .+"):
        op(*arguments, backend=backend)
    with sk.use_backend(backend), pytest.raises(NotImplementedError, match=f"backend='{backend}'"):
        op(*arguments)


def test_float64_on_a_kernel_backend_raises_and_points_to_eager(rng):
    inputs = make_inputs(Shape(((2, 5),)), F64, "cpu", rng())
    with pytest.raises(NotImplementedError, match=r"float64.*backend='eager'"):
        sk.text_cross_attention(*inputs.attention, backend="cpu")


# ------------------------------------------------------------------------------------ capability report


def test_backends_says_for_each_backend_whether_it_runs_what_it_needs_and_why_not():
    found = sk.backends()
    assert list(found) == ["cuda", "triton", "cpu", "eager"]
    assert found["eager"]
    for capability in found.values():
        assert capability.needs
        assert str(capability).startswith("available: " if capability else "unavailable: ")
    if not torch.cuda.is_available():
        assert not found["cuda"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_suite_covers_the_backend(backend, hidden_cases):
    if backend in UNAVAILABLE and backend != "cpu":
        pytest.skip(f"{UNAVAILABLE[backend]}; hides {hidden_cases.get(backend, 0)} cases of the tests collected here")
    assert sk.backends()[backend]
    assert any(param.values[0].backend == backend for param in ALL)


def test_the_report_names_every_backend_and_the_versions():
    done = subprocess.run([sys.executable, "-m", "slowfast_kernels"], capture_output=True, text=True, check=True)
    for word in (*BACKENDS, "available", "needs", "torch", torch.__version__, "nvcc"):
        assert word in done.stdout


BLOCKED = textwrap.dedent(
    """
    import sys

    for name in ("triton", "slowfast_kernels._C"):
        sys.modules[name] = None  # an import of it fails, and find_spec finds nothing
    import torch
    import slowfast_kernels as sk
    import slowfast_kernels.__main__

    found = sk.backends()
    assert not found["cpu"] and "pip install" in str(found["cpu"]), str(found["cpu"])
    assert not found["triton"] and "pip install triton" in str(found["triton"]), str(found["triton"])
    assert not found["cuda"] and found["eager"]
    pooled = sk.slowfast_pool(torch.ones(2, 4, 8), [2], (2, 2), temporal_stride=2)
    assert pooled.fast.shape == (4, 8)
    for name in ("cpu", "triton"):
        try:
            sk.slowfast_pool(torch.ones(2, 4, 8), [2], (2, 2), backend=name)
        except NotImplementedError as error:
            assert "pip install" in str(error), error
        else:
            raise SystemExit(f"{name} ran")
    print("all there is")
    """
)


def test_everything_works_on_eager_without_triton_and_without_the_extension():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all there is\n")


def test_importing_the_package_loads_neither_triton_nor_the_extension():
    code = "import sys, slowfast_kernels; print([m for m in sys.modules if m in ('triton', 'slowfast_kernels._C')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------- docstrings

PUBLIC = [*OPS, sk.use_backend]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_docstrings_describe_exactly_the_arguments_there_are(op):
    doc = inspect.getdoc(op)
    section = doc.split("Args:\n")[1].split("\n\n")[0]
    entries = re.findall(r"^    (\w+(?:, \w+)*):", section, re.MULTILINE)
    described = [name for entry in entries for name in entry.split(", ")]
    signature = list(inspect.signature(op).parameters)
    assert sorted(described) == sorted(signature)
    for part in ("Returns:", "Raises:"):
        assert part in doc


def test_every_public_name_is_documented():
    for name in sk.__all__:
        assert inspect.getdoc(getattr(sk, name)), name
