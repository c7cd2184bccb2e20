"""On a GPU: CUDA graphs, streams, a second GPU, and calls that never make the host wait."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import reference
import torch
from cases import RAGGED, Shape, Video, make_frames, make_inputs
from targets import HAS_GPU, on_gpu

import slowfast_kernels as sk

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="torch finds no GPU")]
TARGETS = on_gpu()
VIDEO = Video((8, 1, 5), (6, 6), 64, 2, 1, 4, 1)
DECODE = Shape(((1, 500), (1, 320), (1, 0)), (28, 4), 128, 0)
OPS = ["pool", "attention", "mix", "fused", "ranges", "pieces"]
PIECES = 3  # of a sequence
SHAPES = pytest.mark.parametrize("shape", [RAGGED, DECODE], ids=["ragged", "decode"])


class Call:
    """One op with its tensors on the GPU, ready to be run again with other data in the same memory."""

    def __init__(self, target, op: str, shape: Shape, generator, device=None):
        self.target, self.op, self.device = target, op, device or target.device
        self.shape, self.generator = shape, generator
        self.frames = make_frames(VIDEO, target.dtype, self.device, generator)
        self.inputs = make_inputs(shape, target.dtype, self.device, generator)
        self.context = torch.randn(
            len(self.inputs.text_rows), self.inputs.state.shape[1], generator=generator, device=self.device
        ).to(target.dtype)
        self.selection = self.new_selection()
        if op == "pieces":
            batch = len(self.inputs.cu_slow) - 1
            self.inputs.cu_slow = PIECES * torch.arange(batch + 1, dtype=torch.int32, device=self.device)

    def new_selection(self) -> dict[str, torch.Tensor]:
        """Random ranges; random pieces of the whole cache, which may overlap."""

        def integers(*size: int) -> torch.Tensor:
            return torch.randint(-5, 120, size, generator=self.generator, device=self.device, dtype=torch.int32)

        if self.op not in ("ranges", "pieces"):
            return {}
        num_text, num_slow = len(self.inputs.text_rows), len(self.inputs.slow_kv)
        ranges = {"slow_begin": integers(num_text), "slow_end": integers(num_text) * 2}
        if self.op == "ranges":
            return ranges
        pieces = integers((len(self.inputs.cu_text) - 1) * PIECES, 2).clamp(0, num_slow)
        return ranges | {"slow_pieces": pieces.sort(1).values}

    def __call__(self) -> tuple[torch.Tensor, ...]:
        run, inputs = self.target.run, self.inputs
        if self.op == "pool":
            counts = list(VIDEO.frame_counts)
            return run(sk.slowfast_pool, self.frames, counts, VIDEO.grid, **VIDEO.strides, norm_eps=1e-6)
        if self.op == "attention":
            return run(sk.text_cross_attention, *inputs.attention, return_lse=True)
        if self.op == "mix":
            return (run(sk.gated_residual_mix, inputs.state, self.context, inputs.text_rows, *inputs.gating),)
        assert self.op in ("fused", "ranges", "pieces")
        return (run(sk.slowfast_cross_attention, *inputs.fused, **self.selection),)

    def refill(self) -> None:
        """New numbers, new text rows and new sequence lengths of the same totals, in place."""
        other = make_inputs(self.shape, self.target.dtype, self.device, self.generator)
        for name, new in vars(other).items():
            if name != "cu_slow":
                getattr(self.inputs, name).copy_(new)
        for name, new in self.new_selection().items():
            self.selection[name].copy_(new)
        # Tokens, or pieces, move from the second sequence to the first.
        self.inputs.cu_slow[1] = (self.inputs.cu_slow[1] + self.inputs.cu_slow[2]) // 2
        self.frames.copy_(make_frames(VIDEO, self.target.dtype, self.device, self.generator))
        self.context.normal_(generator=self.generator)


def same(found, expected) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(x, y) if x.dtype == torch.int32 else reference.same_bits(x, y) for x, y in pairs)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", OPS)
@SHAPES
def test_a_captured_graph_replays_on_new_data(target, op, shape, rng):
    call = Call(target, op, shape, rng(target.device))
    call()  # compiles, uploads tables
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        call.refill()
        graph.replay()
        assert same(captured, call())


def leaves_of(call: Call) -> list[torch.Tensor]:
    """What a training step of ``call`` differentiates; the call's own tensors from here on."""
    call.frames.requires_grad_()
    call.context.requires_grad_()
    for x in (call.inputs.state, call.inputs.q, call.inputs.slow_kv, *call.inputs.gating):
        x.requires_grad_()
    inputs = call.inputs
    return {
        "pool": [call.frames],
        "attention": [inputs.q, inputs.slow_kv],
        "mix": [inputs.state, call.context, *inputs.gating],
    }.get(call.op, [inputs.state, inputs.q, inputs.slow_kv, *inputs.gating])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_a_captured_training_step_replays_on_new_data(target, op, rng):
    call = Call(target, op, RAGGED, rng(target.device))
    leaves = leaves_of(call)

    def step() -> tuple[torch.Tensor, ...]:
        results = [x for x in call() if x.requires_grad]
        return *results, *torch.autograd.grad(results, leaves, [torch.ones_like(x) for x in results])

    side = torch.cuda.Stream(target.device)
    side.wait_stream(torch.cuda.current_stream(target.device))
    with torch.cuda.stream(side):
        step()  # compiles, uploads tables
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            call.refill()
        graph.replay()
        assert same([x.detach() for x in captured], [x.detach() for x in step()])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_a_backward_pass_never_makes_the_host_wait(target, op, rng):
    call = Call(target, op, RAGGED, rng(target.device))
    leaves = leaves_of(call)

    def step() -> None:
        results = [x for x in call() if x.requires_grad]
        torch.autograd.grad(results, leaves, [torch.ones_like(x) for x in results])

    step()
    with no_sync():
        step()


@pytest.mark.parametrize("target", TARGETS)
def test_a_whole_layer_and_many_calls_fit_in_one_graph(target, rng):
    calls = [Call(target, op, RAGGED, rng(target.device)) for op in OPS]
    expected = [call() for call in calls]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [call() for call in calls for _ in range(3)]
    graph.replay()
    for i, found in enumerate(captured):
        assert same(found, expected[i // 3])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_work_is_queued_on_the_current_stream(target, op, rng):
    call = Call(target, op, RAGGED, rng(target.device))
    call.refill()
    expected = call()
    inputs = call.inputs
    memory = (inputs.state, inputs.q, inputs.slow_kv, inputs.gate_weight, call.frames, call.context)
    late = [x.clone() for x in memory]
    for x in memory:
        x.zero_()
    side = torch.cuda.Stream(target.device)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # about 10 ms: a launch on any other stream would read the zeros
        for x, new in zip(memory, late, strict=True):
            x.copy_(new)
        found = call()
    side.synchronize()
    assert same(found, expected)


@contextmanager
def no_sync():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", OPS)
@SHAPES
def test_a_call_never_makes_the_host_wait(target, op, shape, rng):
    call = Call(target, op, shape, rng(target.device))
    call()
    with no_sync():
        call()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_the_registered_op_never_makes_the_host_wait_either(target, op, rng):
    call = Call(target, op, RAGGED, rng(target.device))
    for x in (call.frames, call.inputs.q, call.inputs.state):
        x.requires_grad_()
    call()
    with no_sync():
        out = call()
    assert out[0].requires_grad


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_a_second_gpu_is_used_where_the_tensors_are(target, op, rng):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    first = Call(target, op, RAGGED, rng("cuda:0"), torch.device("cuda:0"))
    second = Call(target, op, RAGGED, rng("cuda:0"), torch.device("cuda:0"))  # the same numbers
    second.inputs = type(first.inputs)(**{name: x.to("cuda:1") for name, x in vars(first.inputs).items()})
    second.selection = {name: x.to("cuda:1") for name, x in first.selection.items()}
    second.frames, second.context = first.frames.to("cuda:1"), first.context.to("cuda:1")
    with torch.cuda.device(0):
        expected, found = first(), second()
    assert all(x.device == torch.device("cuda:1") for x in found)
    torch.cuda.synchronize(1)
    assert same([x.to("cuda:0") for x in found], expected)


@pytest.mark.parametrize("target", TARGETS)
def test_compiled_with_inductor_and_cuda_graphs(target, rng):
    inputs = make_inputs(DECODE, target.dtype, target.device, rng(target.device))

    def decode(*arguments):
        return sk.slowfast_cross_attention(*arguments, backend=target.backend) * 2

    expected = target.run(sk.slowfast_cross_attention, *inputs.fused) * 2
    compiled = torch.compile(decode, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        found = compiled(*inputs.fused).clone()
    assert reference.same_bits(found, expected)
