"""What a user sees of calls that run: log lines, statistics, ranges in a profile, FLOP counts, and one warning."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import Shape, Video, make_frames, make_inputs
from test_torch_integration import registered_calls

import slowfast_kernels as sk
from slowfast_kernels import _extension, flops, observe
from slowfast_kernels.calls import AttentionTensors
from slowfast_kernels.heuristics.backends import OpCall
from slowfast_kernels.ops import dispatch
from slowfast_kernels.ops.dispatch import SignatureCache
from slowfast_kernels.ops.op import OPS

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench is not installed; installed packages keep winning

from bench import shapes

EVEN = Shape(((2, 50), (2, 50)), (4, 2), 16)  # the totals tell each sequence's lengths
VIDEO = Video((6, 1), (4, 4), 8, 2, 1, 2, 1)
HEADS = shapes.Heads(4, 2, 16)


@pytest.fixture
def inputs(rng):
    return make_inputs(EVEN, torch.float32, "cpu", rng())


@pytest.fixture
def calls(inputs, rng):
    """A call of each op as a function of whether its first tensor asks for a gradient."""
    frames = make_frames(VIDEO, torch.float32, "cpu", rng())
    context = torch.zeros(len(inputs.text_rows), inputs.state.shape[1])
    given = {
        "slowfast_pool": (frames, VIDEO.frame_counts, VIDEO.grid),
        "text_cross_attention": inputs.attention,
        "gated_residual_mix": (inputs.state, context, inputs.text_rows, *inputs.gating),
        "slowfast_cross_attention": inputs.fused,
        "merge_attention": (context.view(-1, 4, 16), torch.zeros(len(context), 4)) * 2,
    }

    def call(name: str, differentiated: bool = False):
        first, *rest = given[name]
        options = VIDEO.strides if name == "slowfast_pool" else {}
        return getattr(sk, name)(first.clone().requires_grad_(differentiated), *rest, **options)

    return call


# ------------------------------------------------------------------------------------------------------- log


@pytest.fixture
def log(monkeypatch, caplog):
    """Sets SLOWFAST_LOG's level as the import would, with no call prepared yet; returns the lines so far."""
    for op in OPS.values():
        monkeypatch.setattr(op, "prepared", SignatureCache())
    monkeypatch.setattr(observe, "_said", set())
    monkeypatch.delenv("SLOWFAST_BACKEND", raising=False)
    caplog.set_level(logging.INFO, "slowfast_kernels")

    def lines(level: int | None = None) -> list[str]:
        if level is not None:
            monkeypatch.setattr(observe, "LOG", level)
            monkeypatch.setattr(observe, "IS_ON", level > 0)
        return [record.getMessage() for record in caplog.records if record.name == "slowfast_kernels"]

    return lines


@pytest.mark.parametrize("name", OPS)
def test_a_new_signature_is_one_line_with_shapes_backend_and_reason(name, calls, log):
    log(1)
    for _ in range(3):
        calls(name)
    (line,) = log()
    assert line.startswith(f"{name}(")
    assert "float32[" in line
    assert ": cpu, the fastest that is here and runs this call; not cuda: " in line


def test_another_shape_dtype_option_or_backend_is_another_line(inputs, log):
    log(1)
    q, *rest = inputs.attention
    sk.text_cross_attention(q, *rest)
    sk.text_cross_attention(torch.cat((q, q)), *rest)
    sk.text_cross_attention(q.double(), rest[0].double(), *rest[1:])
    sk.text_cross_attention(q, *rest, num_splits=2)
    with sk.use_backend("eager"):
        sk.text_cross_attention(q, *rest)
    lines = log()
    assert len(lines) == len(set(lines)) == 5
    assert "float64" in lines[2]
    assert ": eager, no kernel here runs this call; " in lines[2]
    assert "num_splits=2" in lines[3]
    assert ": eager, asked for by use_backend('eager'); " in lines[4]


def test_a_signature_that_differs_in_strides_alone_is_not_said_again(inputs, log):
    log(1)
    q, *rest = inputs.attention
    for x in (q, torch.cat((q, q), -1)[..., : q.shape[2]]):
        sk.text_cross_attention(x, *rest)
    assert len(log()) == 1


def test_said_lines_are_kept_within_bounds(log, monkeypatch):
    log(1)
    monkeypatch.setattr(observe, "_MOST_LINES", 4)
    for i in range(20):
        observe.log_once(str(i))
    assert len(observe._said) <= 4


def test_a_compiled_graph_logs_when_it_runs_and_not_when_it_is_traced(inputs, log):
    log(2)
    q, *rest = inputs.attention
    torch._dynamo.reset()
    op = torch.compile(lambda q: sk.text_cross_attention(q, *rest) * 2, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        op(q)
    lines = log()
    assert len([line for line in lines if line.startswith("text_cross_attention(")]) == 1
    assert len([line for line in lines if ": q float32" in line]) == 2


def test_a_backward_pass_and_the_formula_are_lines_too(calls, inputs, log):
    log(1)
    calls("text_cross_attention", differentiated=True).sum().backward()
    q, *rest = inputs.attention
    torch.func.jvp(lambda q: sk.text_cross_attention(q, *rest), (q,), (q,))
    lines = log()
    assert lines[1].startswith("text_cross_attention backward(grad_0 float32[4, 4, 16], ")
    assert ": eager, torch.func or a forward-mode tangent" in lines[2]


def test_level_2_adds_the_statistics_of_every_tensor_of_every_call(calls, inputs, log):
    log(2)
    inputs.slow_kv[1, 0, 1, 2], inputs.slow_kv[3, 1, 0, :4] = float("nan"), float("-inf")
    for _ in range(2):
        calls("slowfast_cross_attention")
    lines = [line for line in log() if not line.startswith("slowfast_cross_attention(")]
    assert len(lines) == 2 * 9
    kv = next(line for line in lines if " slow_kv " in line)
    assert kv.startswith("slowfast_cross_attention: slow_kv float32[100, 2, 2, 16] on cpu: min -inf, max ")
    assert kv.endswith(", NaN 1, Inf 4")
    assert "slowfast_cross_attention: cu_slow int32[3] on cpu: min 0, max 100" in lines


def test_level_2_shows_the_gradients_that_enter_a_backward_pass(calls, log):
    log(2)
    (calls("gated_residual_mix", differentiated=True) * 3).sum().backward()
    assert any(line.startswith("gated_residual_mix backward: grad_0 ") and "min 3, max 3" in line for line in log())


def test_under_a_transform_there_are_no_statistics(inputs, log):
    log(2)
    q, *rest = inputs.attention
    torch.func.grad(lambda q: sk.text_cross_attention(q, *rest).sum())(q)
    assert len(log()) == 1


def test_while_a_cuda_graph_is_captured_nothing_on_the_gpu_is_read(log, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu = SimpleNamespace(is_cuda=True)  # anything asked of it is an AttributeError
    observe.log_statistics("op", ("q",), (on_gpu,))
    assert log() == []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.5, -2.0], "min -2, max 1.5, NaN 0, Inf 0"),
        ([float("nan"), 3.0, float("inf")], "min 3, max inf, NaN 1, Inf 1"),
        ([float("nan")] * 2, "NaN 2 (all), Inf 0"),
        ([], "no elements"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_statistics_leave_nan_out_of_the_extremes(values, text, dtype):
    assert observe.statistics(torch.tensor(values, dtype=dtype).requires_grad_()) == text


def test_statistics_of_indices_are_their_range():
    assert observe.statistics(torch.tensor([3, 0, 2], dtype=torch.int32)) == "min 0, max 3"


def test_nothing_is_logged_when_it_is_off(calls, log):
    for name in OPS:
        calls(name)
    assert log() == []
    call = object()
    assert observe.observed(call, "op", (), "slowfast::op") is call  # and a prepared call is left as it is


POOL_CALL = """
{code}
import torch
import slowfast_kernels as sk
sk.slowfast_pool(torch.ones(2, 4, 8), [2], (2, 2))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", POOL_CALL.format(code=code)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)


def test_the_variable_sends_lines_to_stderr_once_each():
    done = run("import logging; logging.basicConfig()", SLOWFAST_LOG="2")
    first, second = done.stderr.splitlines()
    assert first.startswith("slowfast_kernels: slowfast_pool(frames float32[2, 4, 8] on cpu, ")
    assert second.startswith("slowfast_kernels: slowfast_pool: frames float32[2, 4, 8] on cpu: min 1, max 1, NaN 0")


def test_handlers_of_the_program_take_the_place_of_stderr(monkeypatch):
    logger = logging.Logger("slowfast_kernels")
    handler = logging.NullHandler()
    logger.addHandler(handler)
    monkeypatch.setattr(observe, "logger", logger)
    observe._start_logging()
    assert logger.handlers == [handler]
    assert logger.propagate
    assert logger.isEnabledFor(logging.INFO)


@pytest.mark.parametrize(("value", "level"), [(None, 0), ("", 0), ("0", 0), ("1", 1), ("2", 2)])
def test_a_level_that_is_not_set_is_none(value, level, monkeypatch):
    monkeypatch.delenv("SLOWFAST_LOG", raising=False)
    if value is not None:
        monkeypatch.setenv("SLOWFAST_LOG", value)
    assert observe._setting("SLOWFAST_LOG", 2) == level


def test_a_value_that_means_nothing_is_refused_with_those_that_do(monkeypatch):
    monkeypatch.setenv("SLOWFAST_LOG", "yes")
    with pytest.raises(ValueError, match="SLOWFAST_LOG: got 'yes' in the environment, want one of 0, 1, 2"):
        observe._setting("SLOWFAST_LOG", 2)


# ------------------------------------------------------------------------------------------------------ ranges


def names_in_profile(call) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return [event.name for event in profile.events() if event.name.startswith("slowfast::")]


@pytest.mark.parametrize("name", OPS)
def test_a_direct_call_is_one_range_of_a_profile_under_the_registered_op_s_name(name, calls):
    assert names_in_profile(lambda: calls(name)) == [OPS[name].qualified_name]


@pytest.mark.parametrize("name", ["slowfast_pool", "text_cross_attention", "gated_residual_mix"])
def test_a_registered_call_is_one_range_and_so_is_its_backward_pass(name, calls):
    def step():
        out = calls(name, differentiated=True)
        (out.slow if name == "slowfast_pool" else out).sum().backward()

    registered = OPS[name].qualified_name
    assert names_in_profile(step) == [registered, f"{registered}_backward"]


def test_the_formula_is_a_range_too(inputs):
    q, *rest = inputs.attention
    found = names_in_profile(lambda: torch.func.jvp(lambda q: sk.text_cross_attention(q, *rest), (q,), (q,)))
    assert found == ["slowfast::text_cross_attention"]


def test_no_range_is_made_without_a_profiler(calls, monkeypatch):
    monkeypatch.setattr(torch.autograd.profiler, "record_function", None)  # which cannot be called
    for name in OPS:
        calls(name)


@pytest.fixture
def nvtx(monkeypatch):
    """SLOWFAST_NVTX=1 as the import would set it; the ranges that are open and those that were."""
    state = SimpleNamespace(open=[], seen=[])

    def push(name):
        state.open.append(name)
        state.seen.append(name)

    for op in OPS.values():
        monkeypatch.setattr(op, "prepared", SignatureCache())
    monkeypatch.setattr(observe, "NVTX", True)
    monkeypatch.setattr(observe, "IS_ON", True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", push)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", state.open.pop)
    return state


@pytest.mark.parametrize("name", OPS)
def test_nvtx_ranges_enclose_every_call(name, calls, nvtx):
    for _ in range(2):
        calls(name)
    assert nvtx.seen == [OPS[name].qualified_name] * 2
    assert not nvtx.open


def test_nvtx_ranges_enclose_registered_calls_the_backward_pass_and_the_formula(calls, inputs, nvtx):
    calls("text_cross_attention", differentiated=True).sum().backward()
    q, *rest = inputs.attention
    torch.func.jvp(lambda q: sk.text_cross_attention(q, *rest), (q,), (q,))
    name = "slowfast::text_cross_attention"
    assert nvtx.seen == [name, f"{name}_backward", name]


def test_an_nvtx_range_ends_with_a_call_that_fails(calls, nvtx, monkeypatch):
    def fail(tensors, options):
        raise RuntimeError("inside")

    monkeypatch.setattr(OPS["text_cross_attention"], "formula", fail)
    with sk.use_backend("eager"), pytest.raises(RuntimeError, match="inside"):
        calls("text_cross_attention")
    assert nvtx.seen
    assert not nvtx.open


def test_pytorch_s_own_nvtx_ranges_are_not_doubled(calls, nvtx, monkeypatch):
    monkeypatch.setattr(torch._C._autograd, "_profiler_type", lambda: SimpleNamespace(name="NVTX"))
    calls("text_cross_attention")
    assert nvtx.seen == []


@pytest.mark.parametrize("has_nvtx", [True, False])
def test_a_torch_without_nvtx_is_named_in_a_warning_and_runs_without(has_nvtx, monkeypatch):
    monkeypatch.setenv("SLOWFAST_NVTX", "1")
    monkeypatch.setattr(torch._C, "_nvtx", object(), raising=False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if not has_nvtx:
            monkeypatch.delattr(torch._C, "_nvtx")
        assert observe._nvtx_setting() == has_nvtx
    assert ["without NVTX" in str(warning.message) for warning in seen] == [True] * (not has_nvtx)


# -------------------------------------------------------------------------------------------------- FLOP counts


def count(call) -> dict[str, int]:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return {str(op).removeprefix("slowfast."): n for op, n in counter.get_flop_counts().get("Global", {}).items()}


def attention_cost(fused: bool) -> int:
    shape = shapes.AttentionShape.even(2, 2, 50, HEADS)
    return shapes.attention_cost(shape, "float32", fused).flops


def test_direct_calls_are_counted_by_the_benchmark_s_formulas(calls):
    pool = shapes.PoolShape(VIDEO.frame_counts, VIDEO.grid, VIDEO.channels, *VIDEO[3:])
    norm = 3 * pool.plan.num_slow * VIDEO.channels  # the benchmark's pooling has it, this call does not
    with torch.no_grad():
        assert count(lambda: calls("text_cross_attention")) == {"text_cross_attention": attention_cost(fused=False)}
        assert count(lambda: calls("slowfast_cross_attention")) == {"cross_attention": attention_cost(fused=True)}
        mix = shapes.mix_cost(shapes.MixShape(4, 7, 64), "float32").flops
        assert count(lambda: calls("gated_residual_mix")) == {"gated_residual_mix": mix}
        assert count(lambda: calls("slowfast_pool")) == {"pool": shapes.pool_cost(pool, "float32").flops - norm}


def test_a_training_step_is_counted_forward_and_backward(calls):
    found = count(lambda: calls("slowfast_cross_attention", differentiated=True).sum().backward())
    assert found == {
        "text_cross_attention": attention_cost(fused=False),
        "gated_residual_mix": 4 * 4 * 64,
        "gated_residual_mix_backward": 9 * 4 * 64,
    }
    found = count(lambda: calls("text_cross_attention", differentiated=True).sum().backward())
    assert found["text_cross_attention_backward"] == 2.5 * found["text_cross_attention"]


def test_a_backward_pass_alone_is_counted(calls):
    out = calls("gated_residual_mix", differentiated=True)
    assert count(lambda: out.sum().backward()) == {"gated_residual_mix_backward": 9 * 4 * 64}


def test_every_registered_op_is_counted(rng):
    from targets import Target

    found = {}
    calls = registered_calls(Target("eager", torch.float32, torch.device("cpu")), rng())
    context, lse = torch.ones(3, 4, 16), torch.zeros(3, 4)
    calls["merge_attention"] = (context, lse, context, lse, "eager")
    calls["merge_attention_backward"] = (context, lse, [True] * 4, *calls["merge_attention"])
    for name, arguments in calls.items():
        op = getattr(torch.ops.slowfast, name)
        with torch.no_grad():
            found |= count(partial(op, *arguments))
    assert set(found) == {f"{op.torch_name}{suffix}" for op in OPS.values() for suffix in ("", "_backward")}
    assert all(n > 0 for n in found.values())


def test_arguments_by_name_are_counted(inputs):
    given = AttentionTensors(*inputs.attention)._asdict()
    options = {"softmax_scale": None, "return_lse": False, "num_splits": 0, "backend": None}
    with torch.no_grad():
        found = count(lambda: torch.ops.slowfast.text_cross_attention(**given, **options))
    assert found == {"text_cross_attention": attention_cost(fused=False)}


@pytest.mark.parametrize("gate", ["tanh", "none"])
def test_a_gate_without_a_weight_costs_no_dot_product(gate, inputs):
    context = torch.zeros(4, 64)
    gating = inputs.gating if gate == "tanh" else (None, None, inputs.gating[2])
    state = inputs.state.clone().requires_grad_()
    found = count(lambda: sk.gated_residual_mix(state, context, inputs.text_rows, *gating, gate=gate).sum().backward())
    forward, backward = {"tanh": (4, 9), "none": (2, 3)}[gate]
    assert found == {"gated_residual_mix": forward * 4 * 64, "gated_residual_mix_backward": backward * 4 * 64}


def test_merging_is_counted(calls):
    with torch.no_grad():
        assert count(lambda: calls("merge_attention")) == {"merge_attention": 3 * 4 * 4 * 16}


def test_pooling_counts_additions_of_features_norm_and_windows():
    frames = torch.zeros(5, 16, 8)

    def call(**options):
        sk.slowfast_pool(frames, [4, 1], (4, 4), pool_stride=2, temporal_stride=2, **options)

    features, slow, averaged = 4 * 16 + 16, 4 * 4 + 16, 4 * 4 + 16  # a video's, and the image's
    assert count(call) == {"pool": (features + averaged) * 8}
    assert count(lambda: call(norm_eps=1e-6)) == {"pool": (features + averaged + 3 * slow) * 8}


def test_without_sequences_there_are_no_pairs():
    assert flops.even_pairs(0, 0, 0) == 0
    assert flops.even_pairs(6, 100, 2) == 300


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_counter_may_be_imported_before_the_package_or_after_it(order):
    imports = ["from torch.utils.flop_counter import FlopCounterMode", "import slowfast_kernels as sk"]
    code = "; ".join(imports if order == "before" else imports[::-1])
    code += "; counter = FlopCounterMode(display=False); counter.__enter__(); import atexit"
    code += "; atexit.register(lambda: print(counter.get_total_flops()))"
    assert run(code).stdout.strip() == str(2 * 2 * 4 * 8)  # frames x tokens x channels: added up, and averaged


# ------------------------------------------------------------------------------------------------- the warning


@pytest.fixture
def no_extension(monkeypatch):
    """A package without its extension, in a process that has not warned yet."""
    why = "the extension is not in the package; build it with `pip install .`"
    monkeypatch.setattr(_extension, "_load", lambda: (None, why))
    monkeypatch.setattr(dispatch, "_has_warned", False)
    monkeypatch.delenv("SLOWFAST_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for op in OPS.values():
        monkeypatch.setattr(op, "prepared", SignatureCache())
    caches = (_extension._reason, dispatch._resolve)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_falling_to_eager_for_want_of_the_extension_warns_once_and_says_how_to_build_it(no_extension, calls):
    with pytest.warns(RuntimeWarning, match=r"text_cross_attention .*: the extension is not .*pip install"):
        calls("text_cross_attention")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in OPS:
            calls(name)


def test_nobody_is_warned_of_what_was_asked_for_or_no_extension_could_run(no_extension, calls, inputs, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with sk.use_backend("eager"):
            calls("text_cross_attention")
        q, slow_kv, *rest = inputs.attention
        sk.text_cross_attention(q.double(), slow_kv.double(), *rest)
        sk.explain("text_cross_attention", *inputs.attention)
        monkeypatch.setenv("SLOWFAST_BACKEND", "eager")
        calls("slowfast_pool")


@pytest.mark.parametrize(
    ("capability", "dtype", "warns"),
    [
        ((9, 0), torch.bfloat16, True),
        ((9, 0), torch.float32, False),
        ((8, 0), torch.bfloat16, False),
    ],
)
def test_on_a_gpu_it_warns_where_the_extension_has_a_kernel_for_the_call(no_extension, capability, dtype, warns):
    call = OpCall("text_cross_attention", "cuda", dtype, capability, head_dim=128, has_sm90_kernels=False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        dispatch._warn_of_missing_extension(call)
    assert len(seen) == warns


def test_nobody_is_warned_where_the_extension_is(calls, monkeypatch):
    monkeypatch.setattr(dispatch, "_has_warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch._warn_of_missing_extension(OpCall("slowfast_pool", "cpu", torch.float32))
