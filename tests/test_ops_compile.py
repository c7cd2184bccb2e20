"""slowfast_pool under torch.compile and torch.export: clips of several lengths and grids, one graph where shapes allow.

Its plan depends on frame counts, which a compiler may hold as symbols: shapes of the result are arithmetic on them, and
the plan is made when the graph runs.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch._dynamo.testing
from cases import Shape, make_inputs
from hypothesis import given
from hypothesis import strategies as st
from targets import FLOAT32

import slowfast_kernels as sk
from slowfast_kernels.pool_plan import PoolOptions, make_pool_plan, token_counts


def clip(x, side, backend=None):
    """One video of as many frames as ``x`` has."""
    options = {"pool_stride": 2, "temporal_stride": 2, "norm_eps": 1e-6, "backend": backend}
    pooled = sk.slowfast_pool(x, [x.shape[0]], (side, side), **options)
    return pooled.slow * 2, pooled.fast


def compiled_counter(function, **options):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def frames(length, side, generator, requires_grad=False):
    return torch.randn(length, side * side, 8, generator=generator).requires_grad_(requires_grad)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("target", [x for x in FLOAT32 if x.values[0].device.type == "cpu"])
def test_a_graph_serves_clips_of_any_length(target, dynamic, rng):
    op, counter = compiled_counter(clip, dynamic=dynamic)
    for length in (4, 6, 8, 11, 5):
        x = frames(length, 4, rng())
        for got, want in zip(op(x, 4, target.backend), clip(x, 4, target.backend), strict=True):
            assert torch.equal(got, want)
    assert counter.frame_count <= 2  # the first length, then a symbolic one


@pytest.mark.parametrize("dynamic", [None, True])
def test_grids_and_lengths_may_change_together(dynamic, rng):
    op, counter = compiled_counter(clip, dynamic=dynamic)
    shapes = ((4, 4), (6, 4), (6, 6), (8, 9), (8, 6))
    for length, side in shapes:
        x = frames(length, side, rng())
        for got, want in zip(op(x, side), clip(x, side), strict=True):
            assert torch.equal(got, want)
    assert counter.frame_count <= len(shapes)


def test_gradients_come_through_a_graph_of_symbolic_length(rng):
    op, counter = compiled_counter(clip)
    for length in (4, 6, 9):
        x = frames(length, 4, rng(), requires_grad=True)
        grads = [torch.autograd.grad(sum(y.square().sum() for y in f(x, 4)), x)[0] for f in (op, clip)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count <= 2


def test_frame_counts_may_be_an_argument_of_the_compiled_function(rng):
    op, _ = compiled_counter(lambda x, counts: sk.slowfast_pool(x, counts, (4, 4), temporal_stride=2).fast * 2)
    for counts in ([4], [5], [2, 3], [1, 4, 2], [1]):
        x = frames(sum(counts), 4, rng())
        assert torch.equal(op(x, counts), sk.slowfast_pool(x, counts, (4, 4), temporal_stride=2).fast * 2)


def test_an_exported_program_takes_any_length(rng):
    class Clip(torch.nn.Module):
        def forward(self, x):
            return clip(x, 4)

    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(Clip(), (frames(5, 4, rng()),), dynamic_shapes=({0: length},))
    x = frames(12, 4, rng())
    for got, want in zip(program.module()(x), clip(x, 4), strict=True):
        assert torch.equal(got, want)


@given(
    counts=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    side=st.integers(4, 9),
    strides=st.tuples(*[st.integers(1, n) for n in (4, 9, 9, 1, 40)]),
)
def test_shapes_without_a_plan_are_those_of_the_plan(counts, side, strides):
    plan = make_pool_plan(tuple(counts), (side, side), *strides)
    totals = [token_counts(n, (side, side), PoolOptions(*strides)) for n in counts]
    assert [sum(column) for column in zip(*totals, strict=True)] == [plan.num_slow, plan.num_fast]


def test_shapes_of_images_are_those_of_the_plan():
    for grid, spatial in product(((3, 7), (8, 2)), (1, 2)):
        plan = make_pool_plan((1,), grid, 4, 2, 2, spatial, 3)
        assert token_counts(1, grid, PoolOptions(4, 2, 2, spatial, 3)) == (plan.num_slow, plan.num_fast)


@pytest.mark.parametrize("dynamic", [None, True])
def test_numbers_may_be_arguments_of_the_compiled_function(dynamic, rng):
    def pooled(x, eps, stride):
        return sk.slowfast_pool(x, [4], (4, 4), norm_eps=eps, temporal_stride=stride).slow * 2

    inputs = make_inputs(Shape(((2, 9), (3, 5))), torch.float32, "cpu", rng())

    def attended(q, scale, splits):
        return sk.text_cross_attention(q, *inputs.attention[1:], softmax_scale=scale, num_splits=splits) * 2

    for function, x, calls in (
        (pooled, frames(4, 4, rng()), ((1e-6, 1), (1e-2, 2), (0.5, 3))),
        (attended, inputs.q, ((0.1, 0), (0.2, 2), (0.3, 3))),
    ):
        op, _ = compiled_counter(function, dynamic=dynamic)
        for options in calls:
            torch.testing.assert_close(op(x, *options), function(x, *options))
