"""Calls with ranges and pieces inside torch.compile and torch.export: one graph, other contents each time it runs."""

from __future__ import annotations

import io

import pytest
import torch
import torch._dynamo.testing
from reach_cases import Reading, int32
from targets import FLOAT32
from torch import Tensor, nn

import slowfast_kernels as sk

ROWS, TOKENS, HEADS, DIM = 9, 50, (4, 2), 64


TARGETS = FLOAT32.without("cuda")  # whose attention takes half precision alone


class Layer(nn.Module):
    """Attention with its log-sum-exps, and the fused op on the same reading."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.gate_weight = nn.Parameter(torch.randn(1, HEADS[0] * DIM) * 0.1)
        self.gate_bias = nn.Parameter(torch.zeros(1))

    def forward(self, q, keys, values, cu_slow, text_rows, cu_text, slow_begin, slow_end, slow_pieces):
        selection = {"slow_begin": slow_begin, "slow_end": slow_end, "slow_pieces": slow_pieces}
        places = (q, (keys, values), cu_slow, text_rows, cu_text)
        context, lse = sk.text_cross_attention(*places, **selection, return_lse=True, backend=self.backend)
        gating = (self.gate_weight, self.gate_bias, None)
        mixed = sk.slowfast_cross_attention(q.flatten(1) * 2, *places, *gating, **selection, backend=self.backend)
        return context + 1, lse.exp().sum(1), mixed


def reading(generator, device) -> Reading:
    """Two sequences of two and three pieces, one shared; random ranges, some of them empty."""
    begin, end = torch.randint(-3, 40, (2, ROWS - 1), generator=generator, device=device).int()
    first = int(torch.randint(5, 20, (), generator=generator, device=device))
    pieces = int32([(30, 45), (first, 25), (30, 45), (49, 50), (0, first)], device)
    rows = torch.randperm(ROWS, generator=generator, device=device)[:-1].int()
    return Reading(int32([0, 2, 5], device), rows, int32([0, 3, ROWS - 1], device), begin, end, pieces)


def arguments(generator, device, requires_grad: bool = False) -> tuple[Tensor, ...]:
    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).requires_grad_(requires_grad)

    cache = (TOKENS, HEADS[1], DIM)
    return (normal(ROWS, HEADS[0], DIM), normal(*cache), normal(*cache), *reading(generator, device))


def other_arguments(count: int, generator, device) -> list[tuple[Tensor, ...]]:
    return [arguments(generator, device) for _ in range(count)]


@pytest.mark.parametrize("target", TARGETS)
def test_one_graph_serves_all_ranges_and_pieces_without_a_break(target, rng):
    layer = Layer(target.backend).to(target.device)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.no_grad():
        for inputs in other_arguments(3, rng(target.device), target.device):
            for got, want in zip(compiled(*inputs), layer(*inputs), strict=True):
                assert torch.equal(got, want)
    assert counter.frame_count == 1


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_flow_through_the_compiled_graph_in_the_layout_given(target, rng):
    layer = Layer(target.backend).to(target.device)
    inputs = arguments(rng(target.device), target.device, requires_grad=True)
    leaves = [*inputs[:3], *layer.parameters()]

    def step(function):
        context, _, mixed = function(*inputs)
        return torch.autograd.grad(context.square().sum() + mixed.square().sum(), leaves)

    torch._dynamo.reset()
    compiled = step(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    for got, want, leaf in zip(compiled, step(layer), leaves, strict=True):
        assert got.shape == leaf.shape
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_an_exported_call_is_saved_loaded_and_runs_with_other_ranges_and_pieces(target, rng):
    layer = Layer(target.backend).to(target.device)
    first, *others = other_arguments(3, rng(target.device), target.device)
    with torch.no_grad():
        exported = torch.export.export(layer, first)
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        program = torch.export.load(file).module()
        for inputs in (first, *others):
            for got, want in zip(program(*inputs), layer(*inputs), strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("target", TARGETS)
def test_a_call_is_exported_for_any_number_of_rows_and_pieces(target, rng):
    layer = Layer(target.backend).to(target.device)
    generator = rng(target.device)
    inputs = arguments(generator, target.device)
    rows, pieces, tokens = (torch.export.Dim(name, min=2, max=1000) for name in ("rows", "pieces", "tokens"))
    shapes = ({}, {0: tokens}, {0: tokens}, {}, {0: rows}, {}, {0: rows}, {0: rows}, {0: pieces})
    with torch.no_grad():
        program = torch.export.export(layer, inputs, dynamic_shapes=shapes).module()
        fewer = list(inputs)
        fewer[1], fewer[2] = inputs[1][:47], inputs[2][:47]
        fewer[3] = int32([0, 1, 3], target.device)
        for i in (4, 6, 7):
            fewer[i] = inputs[i][:5]
        fewer[5] = int32([0, 4, 5], target.device)
        fewer[8] = inputs[8][:3] - 3
        for arguments_ in (inputs, fewer):
            for got, want in zip(program(*arguments_), layer(*arguments_), strict=True):
                assert torch.equal(got, want)
