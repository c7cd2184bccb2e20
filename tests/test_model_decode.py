"""A decode step whose linear layers are GEMV kernels: when it is taken, what is left out, and what it computes.

The interpreted tests run in the child process of test_triton.py; those that need a GPU are in test_gpu_decode.py.
"""

from __future__ import annotations

import pytest
import reference
import torch
from fused_cases import answered
from model_cases import TINY, VIDEO, features, one_thread, tiny_model  # noqa: F401
from plain_model import PlainModel
from targets import interpreted
from test_model_variants import DEFAULT
from torch import Tensor, nn

import slowfast_kernels as sk
from slowfast_model import DecodeSession, SlowFastForCausalLM, kernels
from slowfast_model.decode import cublas_pays, gemv_limit, has_plain_weights

PROMPT, CLIP = [3, VIDEO, 4], (3, 2)
# No width is a multiple of a block; the first layer is hybrid, the second is not.
SMALL = {
    "vocab_size": 23,
    "hidden_size": 20,
    "intermediate_size": 19,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "mm_video_pooling_stride": 1,
}

# ---------------------------------------------------------------------------------- when a step takes the kernels


@torch.no_grad()
def test_a_step_of_few_rows_by_triton_is_not_limited(with_triton):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert gemv_limit(torch.zeros(32, 8, dtype=dtype), "triton") is None


@torch.no_grad()
@pytest.mark.parametrize("name", ["eager", "cpu", "cuda"])
def test_another_backend_by_name_has_no_such_kernels(name, with_triton, monkeypatch):
    expected = f"got backend '{name}', want 'triton' or None (automatic)"
    assert gemv_limit(torch.zeros(1, 8), name) == expected
    with sk.use_backend(name):
        assert gemv_limit(torch.zeros(1, 8), None) == expected
    monkeypatch.setenv("SLOWFAST_BACKEND", name)
    assert gemv_limit(torch.zeros(1, 8), None) == expected


@torch.no_grad()
def test_nothing_runs_under_the_interpreter_unasked(with_triton):
    assert gemv_limit(torch.zeros(1, 8), None).startswith("got a model on cpu, want a GPU")


@torch.no_grad()
def test_a_machine_without_triton_says_why(monkeypatch):
    monkeypatch.setattr(kernels, "unavailable_reason", lambda name, device: f"no {name} on {device}")
    assert gemv_limit(torch.zeros(1, 8), "triton") == "got no Triton kernels (no triton on cpu)"


@torch.no_grad()
@pytest.mark.parametrize(
    ("x", "limit"),
    [
        (torch.zeros(1, 8, dtype=torch.float64), "got torch.float64, want torch.float32"),
        (torch.zeros(33, 8), "got a batch of 33, want at most 32"),
        (torch.zeros(1, 8, device="meta"), "got torch.compile, a trace, a dispatch mode or a tensor subclass"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(x, limit, with_triton):
    assert gemv_limit(x, "triton").startswith(limit)


@torch.no_grad()
def test_a_step_under_autocast_is_left_to_autocast(with_triton):
    with torch.autocast("cpu", torch.bfloat16):
        assert gemv_limit(torch.zeros(1, 8), "triton").startswith("got a call under autocast")
        assert gemv_limit(torch.zeros(1, 8, dtype=torch.bfloat16), "triton") is None


def test_a_step_that_gradients_follow_is_left_to_autograd(with_triton):
    x = torch.zeros(1, 8, requires_grad=True)
    assert gemv_limit(x, "triton").startswith("got a call that gradients follow, want it under torch.no_grad()")
    with torch.no_grad():
        assert gemv_limit(x, "triton") is None


def test_a_larger_batch_is_left_to_cublas_unless_the_kernels_are_asked_for(with_triton):
    three = torch.zeros(3, 8)
    assert cublas_pays(three[:2]) is None
    assert cublas_pays(three).startswith("got a batch of 3, for which cuBLAS is faster (from 3 on)")
    assert cublas_pays(torch.zeros(32, 8, dtype=torch.bfloat16)) is None, "on tensor cores"
    ids = torch.ones(3, 2, dtype=torch.int64)
    model = tiny_model("triton", **SMALL | {"cross_attn_every_n_layers": None})
    model.backend = "cpu"  # of the prefill
    sessions = [DecodeSession(model, ids[:n], max_new_tokens=1, gemv=None) for n in (2, 3)]
    model.backend = "triton"
    assert [session.gemv_limit() for session in sessions] == [None, cublas_pays(three)]
    sessions[1]._gemv = True
    assert sessions[1].gemv_limit() is None


def test_a_session_says_what_keeps_it_from_the_kernels(monkeypatch):
    monkeypatch.delenv("SLOWFAST_BACKEND", raising=False)
    ids, model = torch.tensor([[1, 2]]), tiny_model("eager")
    session = DecodeSession(model, ids, max_new_tokens=1, gemv=None)
    assert session.gemv_limit() == "got backend 'eager', want 'triton' or None (automatic)"
    off = DecodeSession(model, ids, max_new_tokens=1, gemv=False)
    assert off.gemv_limit() == "got gemv=False, want None or True"
    with pytest.raises(ValueError, match=r"^gemv: got backend 'eager', want 'triton' or None \(automatic\), or gemv="):
        DecodeSession(model, ids, max_new_tokens=1, gemv=True)
    with pytest.raises(TypeError, match="gemv: got"):
        DecodeSession(model, ids, max_new_tokens=1, gemv="yes")


# --------------------------------------------------------------------------------------- which layers it takes


class Adapted(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.weight, self.bias = linear, linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 1


def adapted(layer) -> None:
    layer.self_attn.v_proj = Adapted(layer.self_attn.v_proj)


def hooked(layer) -> None:
    layer.mlp.up_proj.register_forward_hook(lambda *_: None)


def hooked_norm(layer) -> None:
    layer.post_attention_layernorm.register_forward_pre_hook(lambda *_: None)


def hooked_mlp(layer) -> None:
    layer.mlp.register_forward_hook(lambda *_: None)


def replaced_attention(layer) -> None:
    layer.self_attn.forward = lambda *_: None


def subclassed_attention(layer) -> None:
    layer.self_attn.__class__ = type("Other", (type(layer.self_attn),), {})


def in_another_dtype(layer) -> None:
    layer.mlp.down_proj.to(torch.float64)


def norm_in_another_dtype(layer) -> None:
    layer.input_layernorm.to(torch.float64)


def offloaded(layer) -> None:
    layer.self_attn.o_proj.to("meta")


def without_one_bias(layer) -> None:
    layer.self_attn.k_proj.bias = None


def with_a_gate_bias(layer) -> None:
    layer.mlp.gate_proj.bias = nn.Parameter(torch.ones(TINY["intermediate_size"]))


def with_an_up_bias(layer) -> None:
    layer.mlp.up_proj.bias = nn.Parameter(torch.ones(TINY["intermediate_size"]))


CHANGES = [
    adapted,
    hooked,
    hooked_norm,
    hooked_mlp,
    replaced_attention,
    subclassed_attention,
    in_another_dtype,
    norm_in_another_dtype,
    offloaded,
    without_one_bias,
    with_a_gate_bias,
    with_an_up_bias,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_layer_with_a_module_that_is_more_than_its_weights_is_called(change):
    model, x = tiny_model(), torch.zeros(1, 1, TINY["hidden_size"])
    assert all(has_plain_weights(layer, x) for layer in model.model.layers)
    for layer in model.model.layers[:2]:  # one hybrid, one not
        change(layer)
    assert [has_plain_weights(layer, x) for layer in model.model.layers] == [False, False, True]


def test_biases_of_all_three_projections_or_of_none_will_do():
    layer, x = tiny_model().model.layers[0], torch.zeros(1, 1, TINY["hidden_size"])
    for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        projection.bias = None
    assert has_plain_weights(layer, x)


# ------------------------------------------------------------------------------------------- what it chooses


def test_the_most_likely_ids_are_those_of_the_newest_logits():
    session = DecodeSession(tiny_model("eager"), torch.tensor([[1, 2], [3, 4]]), max_new_tokens=3)
    for _ in range(2):
        assert torch.equal(session.most_likely, session.logits.argmax(-1))
        session.step(session.most_likely)
    session._most_likely = torch.tensor([60, 60])  # what a graph found
    session.extend(torch.tensor([[5], [6]]))
    assert torch.equal(session.most_likely, session.logits.argmax(-1))


# ------------------------------------------------------------------------------------------- interpreter


def small_model(backend: str) -> SlowFastForCausalLM:
    return tiny_model(backend, **SMALL)


def session_of(model, samples: int = 1, **options) -> DecodeSession:
    prompt = torch.tensor([PROMPT] * samples)
    return DecodeSession(model, prompt, features(CLIP) * samples, max_new_tokens=4, **options)


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Names of the kernels' entry points, as they are called."""
    from slowfast_kernels.triton import gemv

    return answered(monkeypatch, gemv, ("rotated_qkv", "linear", "gated_up"))


LAYER = ["rotated_qkv", "linear", "gated_up", "linear"]
HEAD = ["linear"]


def by_plain_model(*tokens: int) -> Tensor:
    """Logits of the last token, in float64, of a model written apart from this one."""
    plain = PlainModel(DEFAULT | SMALL, small_model("eager").state_dict())
    return plain.logits([*PROMPT, *tokens], features(CLIP))[-1:]


@interpreted
@torch.no_grad()
def test_a_step_is_four_launches_a_layer_and_one_for_the_head_and_right(launched):
    ours, eager = session_of(small_model("triton"), gemv=True), session_of(small_model("eager"))
    assert not launched, "a prefill is none of theirs"
    for token in (torch.tensor([9]), torch.tensor([2])):
        del launched[:]
        got, expected = ours.step(token), eager.step(token)
        assert launched == 2 * LAYER + HEAD
    assert ours.gemv_limit() is None
    scale = expected.abs().max()
    exact = by_plain_model(9, 2)
    reference.assert_accurate(got / scale, expected / scale, exact / scale)


@interpreted
@torch.no_grad()
def test_weights_are_read_at_every_step_and_a_changed_module_is_called(launched):
    model, eager_model = small_model("triton"), small_model("eager")
    ours, eager = session_of(model, samples=2, gemv=None), session_of(eager_model, samples=2)
    token = torch.tensor([5, 7])

    def assert_alike(kernels: list[str]) -> None:
        del launched[:]
        expected = eager.step(token)
        torch.testing.assert_close(ours.step(token), expected, atol=1e-4, rtol=1e-4)
        assert launched == kernels

    assert_alike(2 * LAYER + HEAD)
    for each in (model, eager_model):
        layers = each.model.layers
        layers[0].self_attn.k_proj.weight.data.mul_(-1.5)
        layers[1].mlp.up_proj.load_state_dict({"weight": layers[1].mlp.gate_proj.weight.clone()})
        layers[0].input_layernorm.weight.data.add_(1)
    assert_alike(2 * LAYER + HEAD)
    for each in (model, eager_model):
        each.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, inputs, output: output * 2)
        each.lm_head.register_forward_hook(lambda module, inputs, output: output + 1)
    assert_alike(LAYER)


@interpreted
@torch.no_grad()
def test_without_the_kernels_a_step_is_what_it_was(launched):
    session = session_of(small_model("triton"), gemv=False)
    session.step(torch.tensor([1]))
    assert not launched
