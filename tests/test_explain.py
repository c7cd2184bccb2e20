"""What ``sk.explain`` says of a call, and that it says so without making the call. GPUs are played by stand-ins."""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace

import pytest
import torch
from cases import Shape, Video, make_frames, make_inputs

import slowfast_kernels as sk
from slowfast_kernels import _extension, cpu, cuda
from slowfast_kernels.heuristics.backends import (
    BACKENDS,
    MIX_ROWS_FOR_TRITON,
    OpCall,
    choose_backend,
    unsupported_reason,
)
from slowfast_kernels.heuristics.cuda import hopper_attention_config
from slowfast_kernels.heuristics.triton import triton_attention_config, triton_deal_config, triton_row_config
from slowfast_kernels.ops.explain import FUNCTIONS
from slowfast_kernels.ops.op import OPS

SHAPE = Shape(((2, 600), (3, 500)), (4, 2), 64)
VIDEO = Video((8, 1), (4, 4), 8, 2, 1, 2, 1)
POOL, ATTEND, MIX, FUSED, MERGE = FUNCTIONS  # by name


def arguments_of(op: str, generator, shape: Shape = SHAPE, dtype=torch.float32) -> tuple[tuple, dict]:
    inputs = make_inputs(shape, dtype, "cpu", generator)
    context = torch.zeros(len(inputs.text_rows), *inputs.q.shape[1:], dtype=dtype)
    lse = torch.zeros(context.shape[:2])
    return {
        POOL: ((make_frames(VIDEO, dtype, "cpu", generator), VIDEO.frame_counts, VIDEO.grid), VIDEO.strides),
        ATTEND: (inputs.attention, {}),
        MIX: ((inputs.state, context, inputs.text_rows, *inputs.gating), {}),
        FUSED: (inputs.fused, {}),
        MERGE: ((context, lse, context, lse), {}),
    }[op]


def all_arguments(op: str, arguments, **options) -> dict[str, object]:
    """By their names, with the defaults."""
    bound = inspect.signature(FUNCTIONS[op]).bind(*arguments, **options)
    bound.apply_defaults()
    return bound.arguments


@pytest.fixture(params=FUNCTIONS)
def call(request, rng):
    """(name, arguments, options) of a call of each op."""
    arguments, options = arguments_of(request.param, rng())
    return request.param, arguments, options


@pytest.fixture
def attention(rng):
    return arguments_of(ATTEND, rng())[0]


@pytest.fixture
def hopper(monkeypatch):
    """An H100 with extension and Triton, for calls of CPU tensors: what is asked of it are shapes alone."""
    there = {"cpu": "it takes CPU tensors, got cuda tensors"}
    monkeypatch.setattr(_extension, "unavailable_reason", lambda backend, device: there.get(backend))
    for op in OPS.values():

        def on_gpu(tensors, options, real=op.facts):
            return real(tensors, options)._replace(device_type="cuda", capability=(9, 0), has_sm90_kernels=True)

        monkeypatch.setattr(op, "facts", on_gpu)
    kernels = SimpleNamespace(cuda_cross_attention=None, cuda_gated_mix=None, cuda_merge=None)
    monkeypatch.setattr(cuda, "extension", lambda: kernels)
    monkeypatch.setattr(cuda, "_num_sms", lambda device: 132)
    triton = pytest.importorskip("slowfast_kernels.triton.attention")
    device = SimpleNamespace(num_sms=132, shared_bytes=227 * 1024, dependent_launch=True, prefetch=True)
    monkeypatch.setattr(triton, "describe", lambda device_: device)
    monkeypatch.delenv("SLOWFAST_BACKEND", raising=False)


# ------------------------------------------------------------------------------------------------ which backend


def test_every_op_can_be_explained():
    assert set(FUNCTIONS) == set(OPS)
    assert all(getattr(sk, name) is function for name, function in FUNCTIONS.items())


def test_it_names_the_backend_and_why_the_faster_ones_are_passed_over(call, monkeypatch):
    monkeypatch.delenv("SLOWFAST_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    name, arguments, options = call
    found = sk.explain(name, *arguments, **options)
    choice = choose_backend(
        OPS[name].facts(*OPS[name].bind(all_arguments(name, arguments, **options))),
        {backend: _extension.unavailable_reason(backend, torch.device("cpu")) for backend in BACKENDS},
    )
    assert (found.op, found.backend, dict(found.rejected)) == (name, *choice)
    assert found.backend == "cpu"
    assert set(found.rejected) == set(BACKENDS[: BACKENDS.index(found.backend)])


def test_the_function_may_stand_for_its_name(call):
    name, arguments, options = call
    assert str(sk.explain(FUNCTIONS[name], *arguments, **options)) == str(sk.explain(name, *arguments, **options))


@pytest.mark.parametrize("op", ["attention", sk.warmup, None], ids=["name", "function", "none"])
def test_what_is_no_op_is_refused_with_the_names_of_those_there_are(op):
    with pytest.raises(ValueError, match=r"op: got .*, want one of slowfast_pool, text_cross_attention, gated_res"):
        sk.explain(op)


def test_whoever_asked_for_a_backend_is_named(attention, monkeypatch):
    monkeypatch.setenv("SLOWFAST_BACKEND", "eager")
    assert "SLOWFAST_BACKEND=eager" in sk.explain(ATTEND, *attention).reason
    with sk.use_backend("cpu"):
        assert "use_backend('cpu')" in sk.explain(ATTEND, *attention).reason
        found = sk.explain(ATTEND, *attention, backend="eager")
    assert "backend='eager'" in found.reason
    assert found.rejected["cpu"] == "'eager' was asked for"
    assert set(found.rejected) == {"cuda", "triton", "cpu"}


def test_a_limit_of_the_call_is_named(rng, monkeypatch):
    monkeypatch.delenv("SLOWFAST_BACKEND", raising=False)
    found = sk.explain(ATTEND, *arguments_of(ATTEND, rng(), dtype=torch.float64)[0])
    assert found.backend == "eager"
    assert "float64" in found.rejected["cpu"]


def test_a_large_mix_leaves_for_triton_and_says_from_which_number_of_rows_on(hopper, rng):
    large = Shape(((MIX_ROWS_FOR_TRITON, 1),), (1, 1), 16, 0)
    found = sk.explain(MIX, *arguments_of(MIX, rng(), large)[0])
    assert found.backend == "triton"
    assert str(MIX_ROWS_FOR_TRITON) in found.rejected["cuda"]
    assert found.tiles["block_c"] == triton_row_config(16).block_c
    assert found.grid == (MIX_ROWS_FOR_TRITON,)


# --------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("op", [ATTEND, FUSED])
@pytest.mark.parametrize("num_splits", [0, 6])
def test_on_a_hopper_gpu_the_plan_is_that_of_the_heuristics(op, num_splits, hopper, rng):
    arguments, _ = arguments_of(op, rng(), Shape(((2, 6000), (3, 5000)), (4, 2), 64), torch.bfloat16)
    found = sk.explain(op, *arguments, num_splits=num_splits)
    config = hopper_attention_config(5, 11000, 2, 4, 2, 64, num_splits)
    assert found.backend == "cuda"
    assert {name: found.tiles[name] for name in vars(config)} == vars(config)
    assert (found.tiles["block_m"], found.tiles["block_n"]) == (64 * config.consumers, config.block_n)
    assert found.num_splits == config.cluster_size * config.num_groups
    assert found.grid == config.grid(2)
    assert found.workspace_bytes == (4 * sum(config.workspace(2, 64)) if config.leaves_parts else 0)
    assert config.leaves_parts or num_splits  # one of the two has a workspace


@pytest.mark.parametrize(("op", "num_splits"), [(ATTEND, 0), (ATTEND, 1), (FUSED, 0), (FUSED, 1)])
def test_the_triton_plan_is_that_of_the_heuristics(op, num_splits, hopper, rng):
    arguments, _ = arguments_of(op, rng(), Shape(((2, 6000),), (4, 2), 64), torch.bfloat16)
    found = sk.explain(op, *arguments, num_splits=num_splits, backend="triton")
    config = triton_attention_config(2, 6000, 1, 4, 2, 64, 2, 132, num_splits)
    assert {name: found.tiles[name] for name in vars(config)} == vars(config)
    assert found.num_splits == config.num_splits
    assert found.grid == (config.num_tiles(2, 1, 2), 2, config.num_splits)
    assert (config.num_splits > 1) == (num_splits == 0)
    partials, context = 4 * config.num_splits * 2 * 4 * (64 + 1), 2 * 2 * 4 * 64 * (op == FUSED)
    assert found.workspace_bytes == (partials if config.num_splits > 1 else context)


@pytest.mark.parametrize("op", [ATTEND, FUSED])
@pytest.mark.parametrize("batch", [2, 66])
def test_a_batch_that_triton_may_deal_out_says_so(op, batch, hopper, rng):
    shape = Shape(((1, 100),) * batch, (4, 2), 64)
    found = sk.explain(op, *arguments_of(op, rng(), shape, torch.bfloat16)[0], backend="triton")
    config = triton_attention_config(batch, 100 * batch, batch, 4, 2, 64, 2, 132)
    deal = triton_deal_config(config, batch, 100 * batch, batch, 4, 2, 132)
    assert found.grid == (deal.num_programs,)
    assert found.num_splits == config.num_splits
    assert "deals out" in str(found)
    rows = max(deal.max_parts * config.block_m, config.num_splits * batch * 4)
    context = batch * 4 * (64 * 2 + 4) * (op == FUSED and config.num_splits == 1)
    assert found.workspace_bytes == 4 * (rows * (64 + 1) + 1) + context
    assert (config.num_splits == 1) == (batch == 66)


@pytest.mark.parametrize("op", [ATTEND, FUSED])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_call_without_a_text_row_launches_nothing(op, backend, hopper, rng):
    arguments, _ = arguments_of(op, rng(), Shape(((0, 40),), (4, 2), 64), torch.bfloat16)
    found = sk.explain(op, *arguments, backend=backend)
    assert found.grid is None
    assert "no attention is launched" in str(found)


@pytest.mark.parametrize("num_splits", [0, 3])
def test_on_a_cpu_it_says_splits_threads_and_instruction_set(num_splits, attention):
    found = sk.explain(ATTEND, *attention, num_splits=num_splits, backend="cpu")
    threads = torch.get_num_threads()
    assert found.num_splits == (num_splits or None)
    assert found.tiles["threads"] == threads
    assert found.tiles["isa"] == _extension.extension().cpu_isa()
    assert found.workspace_bytes == (4 * num_splits * 5 * 4 * (64 + 1) if num_splits else None)
    assert ("deals out" in str(found)) == (num_splits == 0)


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu", "eager"])
def test_pooling_says_items_entries_and_tokens(backend, request, rng):
    if backend in ("cuda", "triton"):
        request.getfixturevalue("hopper")
    frames = torch.zeros(6, 16, 8)
    found = sk.explain(POOL, frames, [5, 1], (4, 4), pool_stride=2, temporal_stride=2, backend=backend)
    # Two windows of two frames, a frame in none, and an image, whose 16 tokens all stay.
    assert (found.tiles["items"], found.tiles["entries"]) == (4, 6)
    assert (found.tiles["slow_tokens"], found.tiles["fast_tokens"]) == (5 * 4 + 16, 2 * 4 + 16)


def test_blocks_that_the_device_deals_out_have_no_number_of_splits(hopper, rng):
    arguments, _ = arguments_of(ATTEND, rng(), Shape(((300, 100), (300, 200)), (4, 2), 64, 0), torch.bfloat16)
    end = torch.full((600,), 100, dtype=torch.int32)
    found = sk.explain(ATTEND, *arguments, slow_end=end)
    config = hopper_attention_config(600, 300, 2, 4, 2, 64, 0, selects=True)
    assert config.dealt_ctas > 0
    assert found.grid == (config.dealt_ctas, 1, 1)
    assert found.num_splits is None
    assert "deals out" in str(found)
    assert found.workspace_bytes == 4 * sum(config.workspace(2, 64))


def kernels() -> list[tuple[str, str]]:
    """(op, backend) of every prepared call there is."""
    calls = {op: OpCall(op, "cuda", torch.bfloat16, (9, 0), head_dim=64) for op in FUNCTIONS if op != POOL}
    on = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}
    return [
        (op, backend)
        for backend, device in on.items()
        for op, call in calls.items()
        if unsupported_reason(backend, call._replace(device_type=device)) is None
    ]


@pytest.mark.parametrize(("op", "backend"), kernels())
def test_a_prepared_call_describes_itself(op, backend, request, rng):
    if backend != "cpu":
        request.getfixturevalue("hopper")
    arguments, _ = arguments_of(op, rng(), dtype=torch.bfloat16)
    explained = sk.explain(op, *arguments, backend=backend)
    plan = OPS[op].prepare(*OPS[op].bind(all_arguments(op, arguments, backend=backend))).describe()
    assert {name: getattr(explained, name) for name in vars(plan)} == vars(plan)


# ---------------------------------------------------------------------------------------------------- the route


def test_a_plain_call_goes_directly_and_has_no_backward(call):
    name, arguments, options = call
    found = sk.explain(name, *arguments, **options)
    assert found.route.startswith("directly")
    assert found.backward.startswith("none")


@pytest.mark.parametrize("op", [ATTEND, MIX, POOL, MERGE])
def test_what_autograd_follows_is_a_node_of_its_graph(op, rng):
    arguments, options = arguments_of(op, rng())
    first = arguments[0].clone().requires_grad_()
    found = sk.explain(op, first, *arguments[1:], **options)
    assert found.route.startswith("directly")
    assert "autograd's graph" in found.route
    assert f"autograd follows {OPS[op].tensors._fields[0]}" in found.route
    assert found.backward.startswith(f"{OPS[op].qualified_name}_backward")
    with torch.no_grad():
        assert "autograd" not in sk.explain(op, first, *arguments[1:], **options).route


def test_a_fused_call_that_is_differentiated_is_its_two_parts(rng):
    state, *rest = arguments_of(FUSED, rng())[0]
    found = sk.explain(FUSED, state.requires_grad_(), *rest)
    assert [part.op for part in found.parts] == [ATTEND, MIX]
    assert found.backend == found.parts[0].backend == found.parts[1].backend
    assert found.num_splits == found.parts[0].num_splits
    attend, mix = (part.route for part in found.parts)
    assert attend.startswith("directly")  # q and the slow KV cache ask for no gradient
    assert "autograd follows state" in mix
    for part in found.parts:
        assert part.call in str(found)
    assert not sk.explain(FUSED, state.detach(), *rest).parts


def test_the_mix_of_a_differentiated_query_follows_its_context(rng):
    state, q, *rest = arguments_of(FUSED, rng())[0]
    _, mix = sk.explain(FUSED, state, q.requires_grad_(), *rest).parts
    assert "autograd follows context" in mix.route


def test_under_torch_func_it_is_the_formula_whatever_backend_is_asked_for(attention):
    q, *rest = attention
    seen = []

    def ask(q):
        seen.append(sk.explain(ATTEND, q, *rest, backend="cpu"))
        return q.sum()

    torch.func.grad(ask)(q)
    assert seen[0].backend == "eager"
    assert "formula" in seen[0].route
    assert "transforms" in seen[0].rejected["cpu"]


def test_under_a_dispatch_mode_it_is_the_registered_op(attention):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        found = sk.explain(ATTEND, *attention)
    assert "FlopCounterMode" in found.route
    assert counter.get_total_flops() == 0  # nothing ran


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_of_shapes_alone_run_nowhere(kind, attention):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in attention]
    tensors = fake if kind == "fake" else [x.to("meta") for x in attention]
    found = sk.explain(ATTEND, *tensors)
    assert found.backend is None
    assert "nothing runs" in found.reason
    assert ("FakeTensor" if kind == "fake" else "meta") in found.route


# --------------------------------------------------------------------------------------------- it is not the call


def test_nothing_runs_and_nothing_is_kept(call, monkeypatch):
    name, arguments, options = call
    kernels = [f"cpu_{kernel}" for kernel in ("pool", "cross_attention", "gated_mix", "merge")]
    stand_in = SimpleNamespace(cpu_isa=lambda: "plain", **dict.fromkeys(kernels))  # None cannot be called
    monkeypatch.setattr(cpu, "extension", lambda: stand_in)
    monkeypatch.setattr(OPS[name], "formula", None)
    kept = len(OPS[name].prepared)
    for backend in ("cpu", "eager"):
        assert sk.explain(name, *arguments, **options, backend=backend).backend == backend
    assert len(OPS[name].prepared) == kept


def changed(name: str, value):
    def change(inputs):
        setattr(inputs, name, value(getattr(inputs, name)))

    return change


WRONG = {
    "shape": (changed("slow_kv", lambda x: x[..., 1:]), {}),
    "dtype": (changed("q", lambda x: x.int()), {}),
    "no tensor": (changed("cu_slow", lambda x: x.tolist()), {}),
    "rows": (changed("text_rows", lambda x: x + 1000), {}),
    "prefix sums": (changed("cu_text", lambda x: x * 2), {}),
    "splits": (changed("q", lambda x: x), {"num_splits": 2.5}),
    "scale": (changed("q", lambda x: x), {"softmax_scale": "1"}),
    "backend": (changed("q", lambda x: x), {"backend": "metal"}),
    "limit": (changed("q", lambda x: x), {"backend": "cuda"}),
}


@pytest.mark.parametrize("op", [ATTEND, FUSED])
@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_call_refuses_is_refused_with_the_same_words(op, differentiated, wrong, rng):
    inputs = make_inputs(SHAPE, torch.float32, "cpu", rng())
    change, options = WRONG[wrong]
    change(inputs)
    arguments = inputs.attention if op == ATTEND else inputs.fused
    if differentiated:
        arguments = tuple(
            x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in arguments
        )
    with pytest.raises((ValueError, TypeError, NotImplementedError)) as call:
        FUNCTIONS[op](*arguments, **options)
    with pytest.raises(call.type) as explained:
        sk.explain(op, *arguments, **options)
    assert str(explained.value) == str(call.value)


@pytest.mark.parametrize("wrong", [{"strides": 2}, {"frames": None}], ids=["unknown", "twice"])
def test_arguments_that_the_function_does_not_take_are_a_type_error(wrong):
    with pytest.raises(TypeError, match="slowfast_pool"):
        sk.explain(POOL, torch.zeros(1, 1, 4), [1], (1, 1), **wrong)
    with pytest.raises(TypeError, match="frame_counts"):
        sk.explain(POOL, torch.zeros(1, 1, 4))


# ------------------------------------------------------------------------------------------------------ the text


def test_it_prints_the_call_the_choice_and_the_plan(attention, monkeypatch):
    monkeypatch.delenv("SLOWFAST_BACKEND", raising=False)
    found = sk.explain(ATTEND, *attention, num_splits=3)
    first, *lines = str(found).splitlines()
    assert first.startswith("text_cross_attention(q float32[8, 4, 64], slow_kv float32[1100, 2, 2, 64], ")
    assert "num_splits=3" in first
    begun = [line.split(maxsplit=1)[0] for line in lines]
    assert begun == ["backend", "not", "not", "tiles", "splits", "workspace", "route", "backward"]
    assert found.reason in lines[0]
    assert found.rejected["triton"] in lines[2]


def test_it_cannot_be_changed(attention):
    found = sk.explain(ATTEND, *attention)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.backend = "cuda"
    for mapping in (found.rejected, found.tiles):
        with pytest.raises(TypeError):
            mapping["cuda"] = "no"
