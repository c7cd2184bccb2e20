"""What stands between a layer's products as kernels of one launch: when it does, and that a model's answers stay.

The interpreted tests run in the child process of test_triton.py; those that need a GPU are in test_gpu_prefill.py.
"""

from __future__ import annotations

import pytest
import reference
import torch
from fused_cases import FUSED, answered, unfused
from model_cases import PROMPT_VIDEOS, PROMPTS, features, one_thread, padded, tiny_model  # noqa: F401
from targets import interpreted
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import slowfast_kernels as sk
from slowfast_model import DecodeSession
from slowfast_model import model as model_module
from slowfast_model.kernels import add_and_normalise, fused_silu_mul, fuses, rotate_and_fill, scaled_columns
from slowfast_model.layers import RMSNorm, rope_at
from slowfast_model.prefill import use_order

HALF = torch.float16  # whose matrices Triton's interpreter multiplies

# ------------------------------------------------------------------------------------------- whether it is asked


@torch.no_grad()
def test_rows_of_an_inference_by_triton_are_fused_and_of_other_backends_not(with_triton):
    x = torch.zeros(2, 3, 8, dtype=HALF)
    assert fuses(x, "triton")
    assert not fuses(x, None), "nothing runs under the interpreter unasked"
    assert not any(fuses(x, name) for name in ("eager", "cpu", "cuda"))
    with sk.use_backend("eager"):
        assert not fuses(x, None)


def test_where_gradients_may_come_nothing_is_fused_whoever_has_them(with_triton):
    x = torch.zeros(2, 3, 8, dtype=HALF)
    assert not fuses(x, "triton"), "an adapter of a frozen model has them behind x"
    with torch.no_grad():
        assert fuses(x.requires_grad_(), "triton")


@torch.no_grad()
def test_transforms_autocast_and_modes_keep_pytorch_s_ops(with_triton):
    x, seen = torch.ones(8, dtype=HALF), []
    torch.func.jvp(lambda y: (seen.append(fuses(y, "triton")), y)[1], (x,), (x,))
    torch.vmap(lambda y: (seen.append(fuses(y, "triton")), y)[1])(x)
    assert seen == [False, False]
    with torch.autocast("cpu", torch.bfloat16):
        assert not fuses(x, "triton")
    with FlopCounterMode(display=False):
        assert not fuses(x, "triton")


def qkv(dtype: torch.dtype = HALF, batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, 5, n, 4, generator=generator).to(dtype) for n in (2, 1, 1))


class Refused(Exception):
    """A kernel would be launched."""


@pytest.fixture
def no_launch(monkeypatch):
    elementwise = pytest.importorskip("slowfast_kernels.triton.elementwise")

    def refuse(*_):
        raise Refused

    monkeypatch.setattr(elementwise.Launch, "__call__", refuse)


def test_tensors_that_a_kernel_does_not_take_are_left_to_pytorch(no_launch):
    q, k, v = qkv()
    rope = rope_at(torch.arange(5), 4, 1e4, HALF)
    with pytest.raises(Refused):
        rotate_and_fill(q, k, v, rope, None, fused=True)
    other = rope_at(torch.arange(5), 4, 1e4, torch.bfloat16)
    wide = rope_at(torch.arange(5), 4, 1e4, torch.float32)
    apart = tuple(torch.stack([x] * 2) for x in rope)  # of positions that a sample has for itself
    as_before = rotate_and_fill(q, k, v, rope, None, fused=False)
    for changed in (
        (q.float(), k.float(), v.float(), wide),
        (q.bfloat16(), k, v, rope),
        (q, k, v.float(), rope),
        (q, k, v, other),
        (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, rope),
        (q, k, v, apart),
    ):
        got = rotate_and_fill(*changed, None, fused=True)
        torch.testing.assert_close([x.float() for x in got], [x.float() for x in as_before], atol=0.05, rtol=0.05)


def test_sums_that_a_kernel_does_not_take_are_left_to_pytorch(no_launch):
    x, y, norm = torch.randn(2, 3, 4).to(HALF), torch.randn(2, 3, 4).to(HALF), RMSNorm(4, 1e-6).to(HALF)
    with pytest.raises(Refused):
        add_and_normalise(x, y, norm, fused=True)
    wide = RMSNorm(4, 1e-6)
    for a, b, of in ((x, y.float(), norm), (x.float(), y.float(), wide), (x, y, wide), (x, y[:1], norm), (x, y, None)):
        of = of or nn.LayerNorm(4, dtype=HALF)
        total, normed = add_and_normalise(a, b, of, fused=True)
        assert torch.equal(total, a + b)
        assert torch.equal(normed, of(a + b))
    assert torch.equal(add_and_normalise(x, y, norm, fused=False)[1], norm(x + y))


def test_products_that_a_kernel_does_not_take_are_left_to_pytorch(no_launch):
    a, b = torch.randn(4, 6).to(HALF), torch.randn(4, 6).to(HALF)
    for call in (lambda: fused_silu_mul(a, b), lambda: scaled_columns(a, b[0], fused=True)):
        with pytest.raises(Refused):
            call()
    for x, y in ((a.float(), b.float()), (a, b.bfloat16()), (a.t().contiguous().t(), b)):
        assert torch.equal(fused_silu_mul(x, y), nn.functional.silu(x) * y)
    assert torch.equal(scaled_columns(a, b[0], fused=False), a * b[0])
    assert torch.equal(scaled_columns(a, b[0].float(), fused=True), (a * b[0].float()).to(HALF))
    assert torch.equal(scaled_columns(a.float(), b[0].float(), fused=True), a.float() * b[0].float())
    into = torch.empty_like(a)
    assert scaled_columns(a, b[0], into, fused=False) is into
    assert torch.equal(into, a * b[0])


class Seen(nn.Module):
    """A wrapper that takes what a module of its kind took before, and no more."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.given = module, []

    def forward(self, *arguments) -> Tensor:
        self.given.append(len(arguments))
        return self.module(*arguments)


@torch.no_grad()
def test_wrappers_and_compiled_modules_are_not_told_of_kernels(no_launch, monkeypatch):
    """Nor is a layer whose rows are on a device of another type than the first layer's."""
    model, x = tiny_model().to(HALF), torch.randn(1, 3, 32).to(HALF)
    layers = model.model.layers
    rope = rope_at(torch.arange(3), layers[0].self_attn.head_dim, 1e4, HALF)
    expected = model.model(x, rope, None)
    monkeypatch.setattr(model_module, "fuses", lambda *_: True)
    with pytest.raises(Refused):
        model.model(x, rope, None)
    layers[0].compile(backend="eager", fullgraph=True)
    layers[1] = whole = Seen(layers[1])
    layers[2].register_forward_hook(lambda *_: None)
    assert torch.equal(model.model(x, rope, None), expected)
    assert whole.given == [5]

    layer = tiny_model().to(HALF).model.layers[1]
    expected = layer(x, rope)
    with pytest.raises(Refused):
        layer(x, rope, fused=True)
    layer.self_attn, layer.mlp = Seen(layer.self_attn), Seen(layer.mlp)
    layer.post_attention_layernorm.compile(backend="eager", fullgraph=True)
    assert torch.equal(layer(x, rope, fused=True), expected)
    assert layer.self_attn.given == [3]
    assert layer.mlp.given == [1]


@torch.no_grad()
def test_a_tangent_of_a_weight_is_followed(with_triton):
    x = torch.ones(8, dtype=HALF)
    with forward_ad.dual_level():
        assert not fuses(x, "triton"), "whatever x has"
    assert fuses(x, "triton")


@torch.no_grad()
def test_float32_asks_for_no_kernel(with_triton):
    assert not fuses(torch.ones(8), "triton")


# ------------------------------------------------------------------------------------------- interpreter


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Names of the kernels' entry points, as they are called."""
    from slowfast_kernels.triton import elementwise

    return answered(monkeypatch, elementwise, FUSED)


def half_model(backend: str | None = "triton"):
    return tiny_model(backend).to(HALF)


def batch() -> tuple:
    ids, mask = padded(PROMPTS)
    return ids, [x.to(HALF) for x in features(*PROMPT_VIDEOS)], mask


def prefilled(model) -> tuple[Tensor, ...]:
    """Logits of the prompt's rows and of its last tokens, and the caches that they leave."""
    session = DecodeSession(model, *batch(), max_new_tokens=3)
    held = [x for layer in session.cache.layers for x in (layer.kv, layer.slow_kv) if x is not None]
    return model(*batch()).logits, session.logits, *held


PLAIN = ["rotate", "add_rms_norm", "silu_mul"]
HYBRID = ["rotate", "scale_columns", "add_rms_norm", "silu_mul"]


@interpreted
@torch.no_grad()
def test_a_prefill_has_three_such_launches_a_layer_and_a_fourth_in_a_hybrid_one(launched, monkeypatch):
    model = half_model()
    got = prefilled(model)
    kinds = [HYBRID if layer.is_hybrid else PLAIN for layer in model.model.layers]
    assert HYBRID in kinds
    assert PLAIN in kinds
    assert launched == [name for kind in kinds for name in kind] * 2, "with a cache and without"
    del launched[:]
    with unfused(monkeypatch):
        before = prefilled(model)
    assert not launched
    for a, b in zip(got, before, strict=True):
        torch.testing.assert_close(a, b, atol=0.03, rtol=0.03)
    keys_and_values = 2  # of the first layer, which come before any SiLU
    assert reference.same_bits(got[keys_and_values], before[keys_and_values])


@interpreted
@torch.no_grad()
def test_one_product_of_all_layers_has_its_folds_in_a_launch_each(launched):
    model = half_model()
    hybrid = sum(layer.is_hybrid for layer in model.model.layers)
    with use_order(one_kv_product=True):
        model(*batch())
    assert launched[:hybrid] == ["scale_columns"] * hybrid, "before the layers"
    assert launched.count("scale_columns") == hybrid


@interpreted
@torch.no_grad()
def test_eager_and_float32_are_pytorch_s_ops(launched):
    prefilled(half_model("eager"))
    model = tiny_model("triton")
    ids, _, mask = batch()
    DecodeSession(model, ids, features(*PROMPT_VIDEOS), mask, max_new_tokens=3)
    assert not launched


@interpreted
def test_a_training_step_has_its_gradients(launched):
    model, ids = half_model(), torch.tensor([[3, 4, 5]])
    model(ids, labels=ids).loss.backward()
    assert not launched
    layer = model.model.layers[0]
    assert all(p.grad is not None for p in (layer.self_attn.q_proj.weight, layer.mlp.gate_proj.weight))


@interpreted
@torch.no_grad()
def test_a_turn_of_a_conversation_has_its_products_in_one_launch(launched):
    session = DecodeSession(half_model(), *batch(), max_new_tokens=9, gemv=False)
    del launched[:]
    text = torch.full((len(PROMPTS), 2), 5)
    session.extend(text)
    assert launched == ["add_rms_norm", "silu_mul"] * len(session.cache.layers)


@interpreted
@torch.no_grad()
def test_a_norm_or_mlp_that_is_more_than_its_weights_is_called_with_its_input_alone(launched):
    model, given = half_model(), []
    mlp = model.model.layers[1].mlp
    mlp.register_forward_pre_hook(lambda module, inputs: given.append(len(inputs)))
    model.model.layers[2].post_attention_layernorm.register_forward_hook(lambda *_: given.append("norm"))
    model(*batch())
    assert given == [1, "norm"]
    assert launched.count("silu_mul") == launched.count("add_rms_norm") == len(model.model.layers) - 1


@interpreted
@torch.no_grad()
def test_a_projection_that_answers_in_another_type_leaves_its_ops_to_pytorch(launched):
    model = half_model()
    wide = model.model.layers[1]
    wide.mlp.up_proj.register_forward_hook(lambda module, inputs, output: output.float())
    wide.mlp.gate_proj.register_forward_hook(lambda module, inputs, output: output.float())
    wide.mlp.down_proj.register_forward_pre_hook(lambda module, inputs: inputs[0].to(HALF))
    wide.self_attn.v_proj.register_forward_hook(lambda module, inputs, output: output.float().to(HALF).float())
    wide.self_attn.q_proj.register_forward_hook(lambda module, inputs, output: output.float())
    wide.self_attn.k_proj.register_forward_hook(lambda module, inputs, output: output.float())
    wide.self_attn.o_proj.register_forward_pre_hook(lambda module, inputs: inputs[0].to(HALF))
    model(*batch())
    assert launched.count("silu_mul") == launched.count("rotate") == len(model.model.layers) - 1
