"""torch.compile(fullgraph=True) of the forward pass and of a decode step: one graph, whose shapes no data decides."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, HYBRID, close, prompt, slow_fast_model, twin, video
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from transformers import StaticCache

from slowfast_model.hf._versions import CACHE

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def unbacked(counter: CompileCounterWithBackend) -> list:
    """Sizes that data decides, in all graphs."""
    found = []
    for graph in counter.graphs:
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            for x in value if isinstance(value, tuple | list) else (value,):
                if isinstance(x, torch.Tensor | torch.SymInt) and free_unbacked_symbols(x):
                    found.append((node, x))
    return found


def slow_ops(counter: CompileCounterWithBackend) -> int:
    """Calls of our attention in all graphs."""
    targets = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    return sum("slowfast" in target and "cross_attention" in target for target in targets)


@pytest.mark.parametrize(("family", "use_cache"), [("qwen2", False), *((family, True) for family in FAMILIES)])
def test_the_forward_pass_is_one_graph(family, use_cache):
    model = slow_fast_model(family)
    videos = [video(8), video(3), video(3)]
    row = prompt(model, 3, videos[0], 4)
    ids = torch.tensor([row, prompt(model, 1, *videos[1:], len(row) - 9)])
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        want = model(ids, video_features=videos, use_cache=use_cache)
        got = compiled(ids, video_features=videos, use_cache=use_cache)
        close(got.logits, want.logits, 1e-5)
        assert counter.frame_count == 1
        assert not unbacked(counter)
        assert slow_ops(counter) == len(HYBRID)
        others = [torch.randn_like(x) for x in videos]
        close(compiled(ids, video_features=others).logits, model(ids, video_features=others).logits, 1e-5)
        if use_cache:
            assert getattr(got, CACHE).videos.total.tolist() == [32, 24]
            more = torch.tensor([[5], [6]])
            want = model(more, **{CACHE: getattr(want, CACHE)}).logits
            close(model(more, **{CACHE: getattr(got, CACHE)}).logits, want, 1e-4)


@every_family
def test_the_decode_step_is_one_graph_for_all_tokens(family):
    model = slow_fast_model(family)
    features = video()
    ids = torch.tensor([prompt(model, 3, features, 4), prompt(model, 3, features, 4)])
    length = ids.shape[1]
    cache = StaticCache(model.config.text_config, max_cache_len=length + 8)
    more = torch.randint(3, 98, (2, 6))
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(model.forward, fullgraph=True, backend=counter)
    graphs = graphs_of_plain_steps(twin(model.language_model).eval(), ids, more)
    with torch.no_grad():
        want = model(torch.cat([ids, more], 1), video_features=[features] * 2).logits
        model(ids, video_features=[features] * 2, use_cache=True, **positions(0, length), **{CACHE: cache})
        for i in range(6):
            got = step(more[:, i : i + 1], use_cache=True, **positions(length + i, length + i + 1), **{CACHE: cache})
            close(got.logits[:, 0], want[:, length + i], 1e-4)
    assert counter.frame_count == graphs
    assert not unbacked(counter)
    assert slow_ops(counter) == len(HYBRID) * graphs


def test_a_compiled_step_reads_what_a_static_cache_keeps_of_videos_where_it_lies():
    """As it reads the cache itself; a CUDA graph would copy any other input at every step."""
    model, features = slow_fast_model(), video()
    ids = torch.tensor([prompt(model, 3, features, 4)] * 2)
    cache = StaticCache(model.config.text_config, max_cache_len=ids.shape[1] + 2)
    read = []

    def backend(graph, inputs):
        places = torch._guards.TracingContext.get().fw_metadata.static_input_indices
        read.append([(tuple(x.shape), i in places) for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)])
        return make_boxed_func(graph.forward)

    step = torch.compile(model.forward, fullgraph=True, backend=aot_autograd(fw_compiler=backend))
    place = positions(ids.shape[1], ids.shape[1] + 1)
    with torch.no_grad():
        model(ids, video_features=[features] * 2, use_cache=True, **positions(0, ids.shape[1]), **{CACHE: cache})
        held = cache.videos
        step(ids[:, :1], use_cache=True, **place, **{CACHE: cache})
    (inputs,) = read
    for kept in (held.pieces, held.total, *held.step, *held.kv.values(), cache.layers[1].keys):
        assert (tuple(kept.shape), True) in inputs
        assert (tuple(kept.shape), False) not in inputs


def graphs_of_plain_steps(lm, ids, more) -> int:
    """1, and one more where a static cache counts its sliding window in Python."""
    cache = StaticCache(lm.config, max_cache_len=ids.shape[1] + 8)
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(lm.forward, fullgraph=True, backend=counter)
    with torch.no_grad():
        lm(ids, use_cache=True, **positions(0, ids.shape[1]), **{CACHE: cache})
        for i in range(more.shape[1]):
            place = positions(ids.shape[1] + i, ids.shape[1] + i + 1)
            step(more[:, i : i + 1], use_cache=True, **place, **{CACHE: cache})
    assert counter.frame_count <= 2
    return counter.frame_count


def positions(begin: int, end: int) -> dict:
    """As generate gives them on each version."""
    where = torch.arange(begin, end)
    given = {"position_ids": where.expand(2, -1)}
    return given if CACHE == "cache" else given | {"cache_position": where}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_inductors_training_step_has_the_same_gradients(family):
    model = slow_fast_model(family).train()
    features = video()
    ids = torch.tensor([prompt(model, 3, features, 4)])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model(ids, video_features=[features], labels=ids).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled(ids, video_features=[features], labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, want[name])


@pytest.mark.slow
def test_inductor_computes_the_same():
    model = slow_fast_model()
    features = video()
    ids = torch.tensor([prompt(model, 3, features, 4)])
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        close(compiled(ids, video_features=[features]).logits, model(ids, video_features=[features]).logits, 1e-4)
