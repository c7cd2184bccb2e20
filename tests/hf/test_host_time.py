"""What a call with a video asks of the host beyond the language model's own: operations, counted, and waits for a GPU.

Operations are those of aten and of this package, views too. Bounds leave room for another torch to take a view more.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from families import language_model, prompt, slow_fast_model, twin, video
from functorch.compile import make_boxed_func
from operators import Operators
from pretend_gpu import gpu  # noqa: F401
from torch._dynamo.backends.common import aot_autograd
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, StaticCache

import slowfast_kernels as sk
from slowfast_model.hf._versions import CACHE


class Beside:
    """A model of some hybrid layers and its language model, on one prompt with a video and on as much text."""

    def __init__(self, hybrid_layers=(0, 2), layers: int = 4, **keys) -> None:
        lm = language_model(num_hidden_layers=layers)
        self.base = twin(lm).eval()
        self.model = slow_fast_model(lm=lm, hybrid_layers=hybrid_layers, **keys)
        self.features = video()
        self.ids = torch.tensor([prompt(self.model, 3, self.features, 4)])
        self.config = lm.config

    def cache(self, kind: str):
        return StaticCache(self.config, max_cache_len=40) if kind == "static" else DynamicCache(config=self.config)

    @torch.no_grad()
    def added(self, kind: str = "dynamic", mask: torch.Tensor | None = None) -> tuple[Counter, Counter]:
        """Operations of a prefill and of the step behind it that the language model alone has not."""
        sides = []
        text = torch.where(self.ids == self.model.config.video_token_id, 5, self.ids)
        for model, ids, inputs in ((self.model, self.ids, {"video_features": [self.features]}), (self.base, text, {})):
            cache, length = self.cache(kind), ids.shape[1]
            with Operators() as prefill:
                model(ids, attention_mask=mask, use_cache=True, **place(0, length), **inputs, **{CACHE: cache})
            longer = None if mask is None else torch.ones(1, length + 1, dtype=mask.dtype)
            with Operators() as step:
                given = place(length, length + 1)
                model(ids[:, :1], attention_mask=longer, use_cache=True, **given, **{CACHE: cache})
            sides.append((prefill.calls, step.calls))
        return tuple(ours - base for ours, base in zip(*sides, strict=True))


def place(begin: int, end: int) -> dict:
    where = torch.arange(begin, end)
    given = {"position_ids": where[None]}
    return given if CACHE == "cache" else given | {"cache_position": where}


def copies(found: Counter) -> int:
    """Of operations, those that a GPU has kernels for."""
    views = ("view", "slice", "select", "transpose", "unsqueeze", "expand", "split", "lift_fresh", "aten.t.", "detach")
    return sum(count for name, count in found.items() if not any(view in name for view in views))


# Before the layers: placeholders, pooling, one upload, indices, fast tokens in place; 35, of which 15 are no views.
# A hybrid layer: the norm's factor and the projection of K and V, the op, the shapes of its arguments; 9, of which 3.
PREFILL, PREFILL_KERNELS, LAYER, LAYER_KERNELS = 39, 16, 10, 3


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("hybrid_layers", [(0,), (0, 2), (0, 1, 2, 3)])
def test_a_prefill_with_a_video_adds_few_operations(kind, hybrid_layers):
    found, _ = Beside(hybrid_layers).added(kind)
    assert sum(found.values()) <= PREFILL + LAYER * len(hybrid_layers)
    assert copies(found) <= PREFILL_KERNELS + LAYER_KERNELS * len(hybrid_layers)


def test_padding_adds_few_operations_more():
    beside = Beside()
    found, _ = beside.added(mask=torch.ones_like(beside.ids))
    assert copies(found) <= PREFILL_KERNELS + LAYER_KERNELS * 2 + 5


def test_plain_layers_add_nothing():
    few, many = (Beside((0,), layers).added() for layers in (2, 6))
    assert few == many


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_step_adds_the_op_and_views_of_its_arguments(kind):
    _, found = Beside().added(kind)
    assert found["slowfast.cross_attention.default"] == 2
    assert copies(found) == 2
    assert sum(found.values()) <= 2 + 2 * 7


def test_a_step_with_a_mask_looks_at_its_last_column():
    beside = Beside()
    _, found = beside.added(mask=torch.ones_like(beside.ids))
    assert copies(found) <= 2 + 2


def test_a_compiled_step_adds_the_op_alone():
    beside = Beside()
    counts = []
    for model, inputs in ((beside.model, {"video_features": [beside.features]}), (beside.base, {})):
        ids = beside.ids if inputs else torch.full_like(beside.ids, 5)
        cache, length, graphs = beside.cache("static"), ids.shape[1], []

        def backend(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        torch.compiler.reset()
        with torch.no_grad():
            model(ids, use_cache=True, **place(0, length), **inputs, **{CACHE: cache})
            step = torch.compile(model.forward, fullgraph=True, backend=aot_autograd(fw_compiler=backend))
            step(ids[:, :1], use_cache=True, **place(length, length + 1), **{CACHE: cache})
        (graph,) = graphs
        counts.append(Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function"))
    ours, base = counts
    assert {name: n for name, n in (ours - base).items() if copies({name: n})} == {
        "slowfast.cross_attention.default": 2
    }


@torch.no_grad()
def test_before_the_language_model_a_gpu_is_waited_for_once_behind_the_pooling(gpu, monkeypatch):  # noqa: F811
    """For the placeholders, which it counts before it pools."""
    pool = sk.slowfast_pool
    monkeypatch.setattr(sk, "slowfast_pool", lambda *args, **options: gpu.run(pool, *args, **options))
    beside = Beside()
    model, ids, features = beside.model, beside.ids, [beside.features]
    monkeypatch.setattr(model.language_model, "forward", lambda **given: given)
    want = model(ids, video_features=features, use_cache=False)
    gpu.put([*model.parameters(), *model.buffers(), ids, *features])
    gpu.calls.clear()
    with gpu:
        got = model(ids, video_features=features, use_cache=False)
    assert gpu.calls.count("wait") == gpu.calls.count("download") == gpu.calls.count("upload") == 1
    order = [gpu.calls.index(name) for name in ("download", "slowfast_pool", "wait", "upload")]
    assert order == sorted(order)
    got["slow_context"], want["slow_context"] = (vars(given["slow_context"]) for given in (got, want))
    for found, wanted in zip(tree_leaves(got), tree_leaves(want), strict=True):
        if isinstance(wanted, torch.Tensor):
            assert gpu.has(found)
            torch.testing.assert_close(found, wanted)
