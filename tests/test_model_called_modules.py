"""A module that is more than its weights is called, in training, in inference and in generation alike.

Hooks, parametrisations, other modules and other forwards, on each module whose weights a hybrid layer would otherwise
use directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from model_cases import PROMPT_VIDEOS, PROMPTS, features, one_thread, padded, tiny_model  # noqa: F401
from module_calls import CLOSE, MATTERS, assert_matters, assert_train_and_generate_agree, by_calling_modules, forward
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, parametrize, prune

from slowfast_model.layers import RMSNorm
from slowfast_model.plain import is_plain

# ------------------------------------------------------------------------------------------ what plain is


def test_the_modules_of_a_new_model_are_plain_and_their_weights_are_used_directly():
    layer = tiny_model().model.layers[0]
    attention = layer.self_attn
    assert layer.folds_norm
    weight, bias, warm_up, value = attention.gating(torch.zeros(2, 32), torch.arange(2, dtype=torch.int32))
    assert weight is attention.cross_attn_gate_proj[0].weight
    assert bias is attention.cross_attn_gate_proj[0].bias
    assert warm_up is attention.cross_attn_warm_up_gate
    assert value is None


@torch.no_grad()
def test_slow_tokens_are_normalised_once_only_where_every_hybrid_layer_can_fold_its_norm():
    model = tiny_model()
    call = (padded(PROMPTS)[0], features(*PROMPT_VIDEOS), padded(PROMPTS)[1], None)
    assert model.prepare(*call)[2].tokens_are_normalised
    handle = model.model.layers[2].self_attn.cross_attn_kv_proj.register_forward_hook(lambda *_: None)
    assert not model.prepare(*call)[2].tokens_are_normalised
    handle.remove()
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: None)
    assert model.prepare(*call)[2].tokens_are_normalised


@pytest.mark.parametrize(
    "module",
    [None, nn.Identity(), nn.Bilinear(2, 2, 1), nn.LazyLinear(3), nn.Linear(4, 4, device="meta"), nn.Sequential()],
    ids=str,
)
def test_any_other_module_is_no_plain_linear(module):
    assert not is_plain(module, nn.Linear)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("weight", ["sparse", "transposed", "integer", "subclass", "attribute"])
def test_a_weight_that_the_kernel_could_not_read_is_not_plain(weight):
    class Subclass(Tensor):
        pass

    linear = nn.Linear(4, 4, bias=False)
    del linear.weight
    linear.weight = {
        "attribute": lambda: torch.randn(4, 4),
        "sparse": lambda: nn.Parameter(torch.eye(4).to_sparse_csr()),
        "transposed": lambda: nn.Parameter(torch.randn(4, 4).t()),
        "integer": lambda: nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False),
        "subclass": lambda: nn.Parameter(torch.randn(4, 4).as_subclass(Subclass)),
    }[weight]()
    assert is_plain(nn.Linear(4, 4, bias=False), nn.Linear)
    assert not is_plain(linear, nn.Linear)


# ------------------------------------------------------------------------------------------ changes of one module


class Louder(nn.Module):
    """Another module around one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 1.7 * self.inner(x)


class Int8Linear(nn.Linear):
    """As quantisation libraries subclass Linear: ``weight`` holds integers, and forward knows their scale."""

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8Linear:
        self = cls(linear.in_features, linear.out_features)
        self.bias = linear.bias
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 3  # coarse, to be seen
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class Scaled(Tensor):
    """A weight that is another matrix than its memory holds, as a quantised tensor is."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, bias = (*args, *(kwargs or {}).values())
            return function(x, weight.as_subclass(Tensor) * 1.7, bias)
        return super().__torch_function__(function, types, args, kwargs or {})


class Scale(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.7 * weight


Change = Callable[[nn.Module, Callable[[nn.Module], None], pytest.MonkeyPatch], object]


def louder(*args: object) -> Tensor:
    """A forward hook, with keyword arguments or without."""
    return 1.7 * args[-1]


def tilted(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """A forward pre-hook whose change a norm does not undo."""
    return (args[0] + 0.7 * args[0].roll(1, -1),)


def forward_on_instance(module, *_):
    inner = module.forward
    module.forward = functools.update_wrapper(functools.partial(lambda _, x: 1.7 * inner(x), module), inner)


def forward_on_class(module, _replace, monkeypatch):
    inner = type(module).forward
    monkeypatch.setattr(
        type(module), "forward", lambda self, x: 1.7 * inner(self, x) if self is module else inner(self, x)
    )


def hook_on_all(register, hook):
    def change(module, _replace, monkeypatch):
        handle = register(lambda m, *args: hook(m, *args) if m is module else None)
        monkeypatch.callback(handle.remove)

    return change


def subclass(module, *_):
    kind = type(module)
    module.__class__ = type("Other", (kind,), {"forward": lambda self, x: 1.7 * kind.forward(self, x)})


def scaled(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(module.parameters()).mul_(1.7)
    return module


ON_ANY: dict[str, Change] = {
    "forward_hook": lambda m, *_: m.register_forward_hook(louder),
    "forward_hook_with_kwargs": lambda m, *_: m.register_forward_hook(louder, with_kwargs=True),
    "forward_pre_hook": lambda m, *_: m.register_forward_pre_hook(tilted),
    "forward_hook_on_all_modules": hook_on_all(nn_module.register_module_forward_hook, louder),
    "forward_pre_hook_on_all_modules": hook_on_all(nn_module.register_module_forward_pre_hook, tilted),
    "forward_on_the_instance": forward_on_instance,
    "forward_on_the_class": forward_on_class,
    "another_module_around": lambda m, replace, _: replace(Louder(m)),
    "subclass": subclass,
    "compiled_wrapper": lambda m, replace, _: replace(torch.compile(scaled(m), backend="eager")),
    "compiled_in_place": lambda m, *_: scaled(m).compile(backend="eager"),
}


def pruned(module, *_):
    prune.random_unstructured(module, "weight", 0.5)


def weight_normalised(normalise):
    def change(module, *_):
        normalise(module)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name.endswith(("weight_g", "original0")):
                    parameter.mul_(1.7)

    return change


def scaled_tensor(module, *_):
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Scaled))


ON_WEIGHT: dict[str, Change] = {
    "parametrisation": lambda m, *_: parametrize.register_parametrization(m, "weight", Scale()),
    "weight_norm": weight_normalised(parametrizations.weight_norm),
    "weight_norm_by_a_hook": weight_normalised(torch.nn.utils.weight_norm),
    "spectral_norm": lambda m, *_: parametrizations.spectral_norm(m.eval()),
    "spectral_norm_by_a_hook": lambda m, *_: torch.nn.utils.spectral_norm(m).eval(),
    "pruning": pruned,
    "int8_subclass": lambda m, replace, _: replace(Int8Linear.of(m)),
    "tensor_subclass": scaled_tensor,
    "with_another": lambda m, replace, _: replace(nn.Sequential(m, Scale())),
    "alone_in_a_sequential": lambda m, replace, _: replace(nn.Sequential(scaled(m))),
}
ON_SEQUENTIAL: dict[str, Change] = {
    "another_member": lambda m, *_: m.append(Scale()),
    "a_member_before": lambda m, replace, _: replace(nn.Sequential(Scale(), *m)),
    "no_bias": lambda m, replace, _: replace(nn.Sequential(nn.Linear(32, 1, bias=False))),
    "a_linear_alone": lambda m, replace, _: replace(scaled(m[0])),
    "a_norm": lambda m, replace, _: replace(nn.Sequential(RMSNorm(32, 1e-6), m[0])),
}
ON_NORM: dict[str, Change] = {
    "another_epsilon": lambda m, *_: setattr(m, "eps", 2.0),
    "in_a_sequential": lambda m, replace, _: replace(nn.Sequential(scaled(m))),
    "layer_norm": lambda m, replace, _: replace(nn.LayerNorm(32)),
    "parametrisation": ON_WEIGHT["parametrisation"],
}
PLACES = {
    "cross_attn_kv_proj": ("self_attn", "cross_attn_kv_proj", ON_ANY | ON_WEIGHT),
    "cross_attn_gate_proj.0": ("self_attn.cross_attn_gate_proj", "0", ON_ANY | ON_WEIGHT),
    "cross_attn_gate_proj": ("self_attn", "cross_attn_gate_proj", ON_ANY | ON_SEQUENTIAL),
    "input_layernorm": ("", "input_layernorm", ON_ANY | ON_NORM),
}


class Undo(pytest.MonkeyPatch):
    """A monkeypatch that also calls back."""

    def __init__(self) -> None:
        super().__init__()
        self.callbacks: list[Callable[[], None]] = []

    def callback(self, function: Callable[[], None]) -> None:
        self.callbacks.append(function)

    def undo(self) -> None:
        super().undo()
        for function in self.callbacks:
            function()


@pytest.fixture
def undo():
    patch = Undo()
    yield patch
    patch.undo()


@pytest.mark.parametrize(
    ("place", "kind"), [(place, kind) for place, (_, _, changes) in PLACES.items() for kind in changes]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_change_of_one_module_counts_in_training_and_generation(place, kind, undo):
    model = tiny_model()
    before = by_calling_modules(model)
    layer = model.model.layers[2]
    parent, name, changes = PLACES[place]
    parent = layer.get_submodule(parent)
    changes[kind](getattr(parent, name), lambda new: setattr(parent, name, new), undo)
    assert_matters(model, before)
    assert_train_and_generate_agree(model)


@torch.no_grad()
def test_a_module_that_was_compiled_in_place_runs_compiled():
    graphs = []
    model = tiny_model()
    for module in (model.model.layers[2].self_attn.cross_attn_kv_proj, model.model.layers[2].input_layernorm):
        module.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    forward(model)
    assert len(graphs) >= 2


def test_a_parametrised_warm_up_gate_counts_in_training_and_generation():
    model = tiny_model()
    before = by_calling_modules(model)
    parametrize.register_parametrization(model.model.layers[2].self_attn, "cross_attn_warm_up_gate", Scale())
    assert_matters(model, before)
    assert_train_and_generate_agree(model)


@pytest.mark.parametrize(
    "place", ["self_attn.cross_attn_kv_proj", "self_attn.cross_attn_gate_proj.0", "input_layernorm"]
)
@pytest.mark.filterwarnings("ignore:.*backward hook.*")
@pytest.mark.parametrize("kind", ["full_backward_hook", "backward_pre_hook", "backward_hook", "on_all_modules"])
def test_a_backward_hook_is_called(place, kind, undo):
    model = tiny_model()
    module, calls = model.model.layers[2].get_submodule(place), []
    hook = lambda m, *_: calls.append(m)  # noqa: E731
    handle = {
        "full_backward_hook": module.register_full_backward_hook,
        "backward_pre_hook": module.register_full_backward_pre_hook,
        "backward_hook": module.register_backward_hook,
        "on_all_modules": nn_module.register_module_full_backward_hook,
    }[kind](hook)
    undo.callback(handle.remove)
    ids, mask = padded(PROMPTS)
    model(ids, features(*PROMPT_VIDEOS), mask, ids.masked_fill(ids < 0, -100)).loss.backward()
    assert module in calls
    assert_train_and_generate_agree(model)


def test_a_backward_hook_on_the_sequential_of_the_gate_changes_the_gradient():
    def gate_gradient(model):
        ids, mask = padded(PROMPTS)
        model(ids, features(*PROMPT_VIDEOS), mask, ids.masked_fill(ids < 0, -100)).loss.backward()
        return model.model.layers[2].self_attn.cross_attn_gate_proj[0].weight.grad

    model = tiny_model()
    gate = model.model.layers[2].self_attn.cross_attn_gate_proj
    gate.register_full_backward_pre_hook(lambda _, grads: tuple(3 * grad for grad in grads))
    torch.testing.assert_close(gate_gradient(model), 3 * gate_gradient(tiny_model()), atol=1e-6, rtol=1e-4)


def test_gradients_through_a_called_gate_are_those_of_the_kernels_gate():
    def gradients(model):
        ids, mask = padded(PROMPTS)
        model(ids, features(*PROMPT_VIDEOS), mask, ids.masked_fill(ids < 0, -100)).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    model = tiny_model()
    for layer in model.config.hybrid_layers:
        model.model.layers[layer].self_attn.cross_attn_gate_proj.register_forward_hook(lambda *_: None)
    expected = gradients(tiny_model())
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("gating", ["whole-dynamic", "whole-dynamic-tanh", "whole-dynamic-warmup"])
@pytest.mark.parametrize("implementation", ["vanilla", "text-only-vanilla-masksystem"])
def test_a_called_gate_is_the_kernels_gate_in_every_variant(gating, implementation):
    variant = {"cross_attn_gating_type": gating, "cross_attn_implementation": implementation}
    model = tiny_model(**variant)
    for layer in model.config.hybrid_layers:
        model.model.layers[layer].self_attn.cross_attn_gate_proj.register_forward_hook(lambda *_: None)
    for a, b in zip(forward(model), forward(tiny_model(**variant)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


# ------------------------------------------------------------------------------------------ dtypes


@pytest.mark.parametrize("called", [False, True], ids=["plain", "hooked"])
@pytest.mark.parametrize("what", ["gate", "gate_and_warm_up", "warm_up"])
@torch.no_grad()
def test_gates_may_stay_in_float32_beside_a_bfloat16_model(what, called):
    """Their weights are representable in bfloat16 here, so that the model with bfloat16 gates answers the same."""
    half, mixed = (tiny_model().to(torch.bfloat16) for _ in range(2))
    for index in mixed.config.hybrid_layers:
        attention = mixed.model.layers[index].self_attn
        if "gate" in what:
            attention.cross_attn_gate_proj.float()
        if "warm_up" in what:
            attention.cross_attn_warm_up_gate.data = attention.cross_attn_warm_up_gate.data.float()
        if called:
            attention.cross_attn_gate_proj.register_forward_hook(lambda *_: None)
    ids, mask = padded(PROMPTS)
    videos = [x.bfloat16() for x in features(*PROMPT_VIDEOS)]
    a, b = (model(ids, videos, mask).logits.float() for model in (half, mixed))
    assert (a - b)[mask.bool().all(1)].abs().max() < 0.1 * a.std()
    assert mixed.generate(ids, videos, mask, max_new_tokens=2).shape == (3, 2)


@pytest.mark.parametrize("wide", ["cross_attn_gate_proj", "cross_attn_warm_up_gate"])
def test_gate_weights_reach_the_kernel_in_the_widest_of_their_types_without_losing_a_digit(wide):
    attention = tiny_model().to(torch.bfloat16).model.layers[0].self_attn
    for name, parameter in attention.named_parameters():
        if name.startswith(wide):
            parameter.data = torch.full_like(parameter, 0.1, dtype=torch.float32)  # no number of bfloat16
    weight, bias, warm_up, _ = attention.gating(torch.zeros(3, 32, dtype=torch.bfloat16), torch.arange(3))
    assert weight.dtype == bias.dtype == warm_up.dtype == torch.float32
    linear = attention.cross_attn_gate_proj[0]
    for given, kept in ((weight, linear.weight), (bias, linear.bias), (warm_up, attention.cross_attn_warm_up_gate)):
        assert torch.equal(given, kept.float())


def test_an_answer_in_another_floating_type_is_taken():
    """A projection and a gate that compute in float64 in a float32 model."""

    class Wide(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner.double()

        def forward(self, x):
            return self.inner(x.double())

    model = tiny_model()
    expected = forward(model)
    attention = model.model.layers[0].self_attn
    attention.cross_attn_kv_proj = Wide(attention.cross_attn_kv_proj)
    attention.cross_attn_gate_proj = Wide(attention.cross_attn_gate_proj)
    for a, b in zip(forward(model), expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_a_float64_model_folds_its_norm_in_float64():
    model = tiny_model().double()
    ids, mask = padded(PROMPTS)
    videos = [x.double() for x in features(*PROMPT_VIDEOS)]
    trained = model(ids, videos, mask).logits
    with torch.no_grad():
        torch.testing.assert_close(model(ids, videos, mask).logits, trained, atol=1e-10, rtol=1e-10)


# ------------------------------------------------------------------------------------------ substituted weights


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_functional_call_computes_with_the_weights_it_is_given(grad):
    model, other = tiny_model(), tiny_model()
    names = [n for n, _ in model.named_parameters() if ".cross_attn_" in n or n.endswith("input_layernorm.weight")]
    weights = {name: 1.5 * model.get_parameter(name).detach() for name in names}
    other.load_state_dict(weights, strict=False)
    ids, mask = padded(PROMPTS)
    call = (ids, features(*PROMPT_VIDEOS), mask)
    with torch.set_grad_enabled(grad):
        found = torch.func.functional_call(model, weights, call).logits
        assert (found - model(*call).logits).abs().max() > MATTERS
        assert torch.equal(found, other(*call).logits)
