"""The model under torch.compile: layers without a graph break, the whole model with one, a graph for every length.

Compiled by backends that trace and generate no code, except in one test: "aot_eager" traces the backward pass too.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from model_cases import PROMPT_VIDEOS, PROMPTS, VIDEO, features, one_thread, padded  # noqa: F401
from model_cases import tiny_model as three_layers
from torch._dynamo.utils import counters

from slowfast_model import DecodeSession
from slowfast_model.cache import KVCache, SlowContext
from slowfast_model.layers import rope_at
from slowfast_model.tokens import decode_rows

BATCHES = [
    (PROMPTS, PROMPT_VIDEOS),
    ([[3, VIDEO, 5], [6, 7, 8, 9], [VIDEO, 11, 12]], ((3, 4), (8, 4))),
    ([[3, VIDEO, 5, 9, 4], [6, VIDEO, 7, 8], [10, 11]], ((4, 4), (9, 4))),
]
both_modes = pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
HYBRID, PLAIN = 0, 1  # layers of tiny_model


def tiny_model(backend: str | None = None, num_hidden_layers: int = 2):
    """One hybrid and one plain layer: what is compiled costs a second a layer."""
    return three_layers(backend, num_hidden_layers=num_hidden_layers)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()


def new_counter(grad: bool):
    return torch._dynamo.testing.CompileCounterWithBackend("aot_eager" if grad else "eager")


def compiled(module, *, fullgraph: bool, grad: bool = False, dynamic: bool | None = None):
    counter = new_counter(grad)
    return torch.compile(module, fullgraph=fullgraph, dynamic=dynamic, backend=counter), counter


def batch(prompts, videos):
    ids, mask = padded(prompts)
    return ids, features(*videos), mask, ids.masked_fill((mask == 0) | (ids == VIDEO), -100)


def layer_inputs(model, prompts, videos):
    ids, clips, mask, _ = batch(prompts, videos)
    x, layout, slow = model.prepare(ids, clips, mask, None)
    return x.detach().requires_grad_(torch.is_grad_enabled()), model.rope(x.shape[1], x), layout, slow


def new_cache(model, x, backend=None):
    heads = (model.config.num_key_value_heads, model.config.head_dim)
    layers = model.config.num_hidden_layers
    return KVCache(layers, len(x), x.shape[1] + 4, *heads, dtype=x.dtype, device=x.device, backend=backend)


# ------------------------------------------------------------------------------------------ layers


@pytest.mark.parametrize(
    ("index", "grad", "dynamic"),
    [(HYBRID, True, None), (HYBRID, True, True), (HYBRID, False, None), (PLAIN, True, None)],
)
def test_a_layer_is_one_graph_for_batches_of_any_length(index, grad, dynamic):
    model = tiny_model()
    layer = model.model.layers[index]
    run, counter = compiled(layer, fullgraph=True, grad=grad, dynamic=dynamic)
    for prompts, videos in BATCHES:
        with torch.set_grad_enabled(grad):
            x, rope, layout, slow = layer_inputs(model, prompts, videos)
            found, expected = (call(x, rope, slow)[layout.attention_mask] for call in (run, layer))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        if grad:
            leaves = [x, *layer.parameters()]
            grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (found, expected)]
            for got, want in zip(*grads, strict=True):
                assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert counter.frame_count <= 2  # the first lengths, then symbolic ones; symbolic from the start compiles twice


@both_modes
def test_a_layer_is_one_graph_with_ranges_of_slow_tokens_and_without(grad):
    model = three_layers(None, num_hidden_layers=1, causal_slow_tokens=True, cross_attn_implementation="vanilla")
    layer = model.model.layers[HYBRID]
    run, _ = compiled(layer, fullgraph=True, grad=grad)
    found_ranges = []
    for prompts, videos in (BATCHES[2], BATCHES[0]):
        with torch.set_grad_enabled(grad):
            x, rope, layout, slow = layer_inputs(model, prompts, videos)
            found_ranges.append(slow.slow_end is not None)
            found, expected = (call(x, rope, slow)[layout.attention_mask] for call in (run, layer))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        if grad:
            leaves = [x, *layer.parameters()]
            grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (found, expected)]
            for got, want in zip(*grads, strict=True):
                assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert set(found_ranges) == {True, False}


@pytest.mark.parametrize(("index", "backend"), [(HYBRID, None), (HYBRID, "eager"), (PLAIN, None)])
@torch.no_grad()
def test_a_layer_is_one_graph_while_it_fills_the_caches_and_while_it_reads_them(index, backend):
    model = tiny_model(backend)
    layer = model.model.layers[index]
    run, _ = compiled(layer, fullgraph=True)
    for prompts, videos in BATCHES[:2]:
        answers = []
        for call in (run, layer):
            x, rope, layout, slow = layer_inputs(model, prompts, videos)
            caches = new_cache(model, x, backend)
            cache = caches.layers[index]
            prefill = call(x, rope, slow, cache, backend)
            assert (cache.slow_kv is not None) == layer.is_hybrid
            rows, cu_text = decode_rows(layout.slow_lengths, x.device)
            step = SlowContext(slow.cu_slow, rows, cu_text)
            position = torch.tensor(layout.lengths)
            caches.step.lay_out(len(x), x.device)
            caches.step.begin(position)
            rope = rope_at(position[:, None], model.config.head_dim, model.config.rope_theta, x.dtype)
            decoded = call(x[:, :1], rope, step, cache, backend)
            answers.append((prefill, decoded, cache.kv))
        for got, want in zip(*answers, strict=True):
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_layers_that_are_compiled_alone_share_their_graphs_in_generation():
    """A hybrid and a plain one each of: a prefill, a decode step, and both again for symbolic lengths."""
    model = tiny_model(num_hidden_layers=10)
    expected = [model.generate(*batch(*b)[:3], max_new_tokens=3) for b in BATCHES[:3]]
    counter = new_counter(False)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=counter)
    found = [model.generate(*batch(*b)[:3], max_new_tokens=3) for b in BATCHES[:3]]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert counter.frame_count <= 8


@both_modes
def test_hybrid_layers_share_one_graph_and_plain_layers_another(grad):
    model = tiny_model(num_hidden_layers=10)
    counter = new_counter(grad)
    with torch.set_grad_enabled(grad):
        x, rope, _, slow = layer_inputs(model, *BATCHES[0])
        for layer in model.model.layers:
            run = torch.compile(layer, fullgraph=True, backend=counter)
            torch.testing.assert_close(run(x, rope, slow), layer(x, rope, slow), atol=1e-6, rtol=1e-6)
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", ["cross_attn_kv_proj", "cross_attn_gate_proj.0"])
@torch.no_grad()
def test_a_compiled_layer_sees_a_forward_that_is_replaced_later(name):
    """As accelerate does it. (Hooks that are registered later dynamo sees in no module, as its documentation says.)"""
    model = tiny_model()
    layer = model.model.layers[0]
    x, rope, _, slow = layer_inputs(model, *BATCHES[0])
    run, _ = compiled(layer, fullgraph=True)
    before = run(x, rope, slow)
    module = layer.self_attn.get_submodule(name)
    inner = module.forward
    module.forward = lambda rows: 2 * inner(rows)
    expected = layer(x, rope, slow)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(run(x, rope, slow), expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_the_decode_step_is_one_graph_for_all_steps():
    model = tiny_model()
    sessions = [DecodeSession(model, *batch(*BATCHES[0])[:3], max_new_tokens=3) for _ in range(2)]
    sessions[0]._compute, counter = compiled(sessions[0]._compute, fullgraph=True, dynamic=False)
    for token in (5, 6, 7):
        found, expected = (session.step(torch.full((len(PROMPTS),), token)) for session in sessions)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert counter.frame_count == 1


# ------------------------------------------------------------------------------------------ the whole model


def assert_compiled_as_eager(model, run, call, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        found, expected = run(*call), model(*call)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.token_types, expected.token_types)
    if expected.loss is None:
        return
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-6, rtol=1e-6)
    if grad:
        grads = [torch.autograd.grad(out.loss, list(model.parameters())) for out in (found, expected)]
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("grad", "dynamic"), [(True, None), (True, True), (False, None)])
def test_the_model_answers_as_eager_for_every_length_and_compiles_once_a_batch_at_most(grad, dynamic):
    model = tiny_model()
    run, counter = compiled(model, fullgraph=False, grad=grad, dynamic=dynamic)
    for i, shape in enumerate(BATCHES):
        assert_compiled_as_eager(model, run, batch(*shape), grad)
        assert counter.frame_count <= (2 if dynamic else i + 1)
    graphs = counter.frame_count
    assert_compiled_as_eager(model, run, batch(*BATCHES[1]), grad)
    assert counter.frame_count == graphs


def test_laying_out_the_batch_is_the_models_only_graph_break():
    model = tiny_model()
    run, _ = compiled(model, fullgraph=False)
    run(*batch(*BATCHES[0]))
    assert sum(counters["graph_break"].values()) == 1
    assert "_start" in next(iter(counters["graph_break"]))


@both_modes
def test_a_compiled_model_takes_text_alone_and_batches_without_labels(grad):
    model = tiny_model()
    run, _ = compiled(model, fullgraph=False, grad=grad)
    for call in ((torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]),), batch(*BATCHES[0])[:3]):
        assert_compiled_as_eager(model, run, call, grad)


@both_modes
def test_a_gate_that_is_called_is_called_in_the_graph(grad):
    model = tiny_model()
    for index in model.config.hybrid_layers:
        attention = model.model.layers[index].self_attn
        attention.cross_attn_gate_proj.register_forward_hook(lambda *args: 2 * args[-1])
        attention.cross_attn_kv_proj.register_forward_hook(lambda *args: 2 * args[-1])
    run, counter = compiled(model, fullgraph=False, grad=grad)
    assert_compiled_as_eager(model, run, batch(*BATCHES[0]), grad)
    assert counter.frame_count == 1


def test_gradient_checkpointing_compiles():
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    run, _ = compiled(model, fullgraph=False, grad=True)
    assert_compiled_as_eager(model, run, batch(*BATCHES[0]), True)


@pytest.mark.slow
def test_generated_code_gives_the_same_answer():
    model = tiny_model(num_hidden_layers=1)
    run = torch.compile(model, backend="inductor")
    assert_compiled_as_eager(model, run, batch(*BATCHES[0]), False)


def test_inference_does_not_load_the_compiler():
    """Loading it takes seconds, that only who compiles should wait for."""
    program = (
        "import sys, torch\n"
        "sys.path.insert(1, 'tests')\n"
        "from model_cases import VIDEO, features, tiny_model\n"
        "tiny_model(None).generate(torch.tensor([[1, VIDEO, 2]]), features((4, 4)), max_new_tokens=2)\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
