"""Hybrid attention in place: a decoder layer's own attention class, with slow tokens between attention and ``o_proj``.

A chosen layer's ``self_attn`` becomes an instance of a subclass of its own class. Its forward stays the model's, called
with a stand-in for the module whose configuration names our function of transformers' ``AttentionInterface``. That
function runs the attention that the user chose and then ``slowfast_cross_attention`` on the query after RoPE. A call
without slow tokens is the model's own, untouched.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import slowfast_kernels as sk

from ..attention import gate_arguments, project_folded
from ..checkpoint import interleave_kv
from ..config import SlowFastConfig
from ..kernels import fuses
from ..layers import weights_dtype, without_autocast
from ..plain import is_plain
from .norms import eps_of, factor, factor_offset, is_bare
from .videos import SlowReading

NAME = "slowfast"  # of our function in the AttentionInterface


class _NamingConfig:
    """A layer's configuration that names another attention function; everything else is the layer's."""

    def __init__(self, config, name: str) -> None:
        self._of_layer, self._attn_implementation = config, name

    def __getattr__(self, name: str):
        return getattr(self._of_layer, name)


class StandIn:
    """An attention module as its own forward sees it when function ``name`` is to attend. The module keeps nothing."""

    def __init__(self, module: nn.Module, name: str, reading: SlowReading | None = None) -> None:
        self._module, self._reading, self._has_attended = module, reading, False
        self.config = _NamingConfig(module.config, name)

    def forward(self, *args, **kwargs):
        """That of the module's own class.

        Raises:
            RuntimeError: the function was not called.
        """
        kind = self._module._plain_class
        result = kind.forward(self, *args, **kwargs)
        if not self._has_attended:
            raise RuntimeError(f"{kind.__name__} did not call the attention interface")
        return result

    def attend_as_chosen(self, *args, **kwargs):
        """By the function that the user chose."""
        self._has_attended = True
        module, chosen = self._module, self._module.config._attn_implementation
        own = type(module)._eager_attention if chosen in (None, "eager") else ALL_ATTENTION_FUNCTIONS[chosen]
        return own(module, *args, **kwargs)

    def __getattr__(self, name: str):
        module = self._module
        return module._modules[name] if name in module._modules else getattr(module, name)


class ReplacedAttention:
    """Mixed in before a model's own attention class by ``subclass_of``. Instances pickle, though the class does not."""

    _mixin: type[ReplacedAttention]
    _plain_class: type[nn.Module]
    _eager_attention = None  # what the model calls "eager", which is not in the interface

    def __reduce_ex__(self, protocol):
        return _new, (self._mixin, self._plain_class), self.__dict__


class HybridAttention(ReplacedAttention):
    """Attention that reads slow tokens too, where its forward is given any."""

    def forward(self, *args, slow_context: SlowReading | None = None, **kwargs):
        """The model's own; ``slow_context``: what the rows read."""
        if slow_context is None:
            return super().forward(*args, **kwargs)
        return StandIn(self, NAME, slow_context).forward(*args, **kwargs)

    def __setstate__(self, state: dict) -> None:
        """Copied, or unpickled in a process that has not seen the norm's class yet."""
        super().__setstate__(state)
        factor_offset(self._norm_class)

    def slow_kv(self, reading: SlowReading, like: Tensor) -> Tensor:
        """K and V [Ns, Hkv, 2, D] of all slow tokens, in the type and on the device of ``like``."""
        kv = reading.held.get(self.layer_idx)
        if kv is not None:
            kv = kv.to(like.device, like.dtype)  # autocast may have been on when they were made, and be off now
        if reading.tokens is not None:
            new = self._project(reading.tokens.to(like.device), reading.tokens_are_normalised)
            new = new.to(like.dtype).reshape(len(new), new.shape[-1] // (2 * self.head_dim), 2, self.head_dim)
            kv = new if kv is None else torch.cat([kv, new])
            if reading.keep is not None:
                reading.keep.kv[self.layer_idx] = kv
        return kv

    def _project(self, tokens: Tensor, are_normalised: bool) -> Tensor:
        """[Ns, 2 Hkv D]. What tokens that are normalised lack is the norm's factor, which the projection carries."""
        (layer,) = self._decoder_layer
        norm, projection = layer.input_layernorm, self.cross_attn_kv_proj
        if not are_normalised:
            return projection(norm(tokens))
        scale = factor(norm, self._norm_offset)
        if not is_plain(projection, nn.Linear):
            return projection((tokens * scale).to(tokens.dtype))
        return project_folded(tokens, projection, scale, fused=fuses(tokens, None))

    @property
    def bare_norm_eps(self) -> float | None:
        """That of the layer's norm, where tokens that are normalised without a weight do for this layer."""
        (layer,) = self._decoder_layer
        return eps_of(layer.input_layernorm) if is_bare(layer.input_layernorm, self._norm_offset) else None

    def read(self, state: Tensor, query: Tensor, reading: SlowReading, scale: float | None) -> Tensor:
        """``state`` [B, L, Hq, D] after self-attention, ``query`` [B, Hq, L, D] -> the state with slow tokens."""
        flat = state.reshape(-1, state.shape[-2] * state.shape[-1])
        places, selection = reading.on(flat.device)
        gate = (self.cross_attn_gate_proj, self.cross_attn_warm_up_gate, self._slow_gate)
        *gating, value = gate_arguments(*gate, flat, places[1])
        mixed = sk.slowfast_cross_attention(
            flat,
            query.transpose(1, 2).flatten(0, 1).to(flat.dtype),
            self.slow_kv(reading, flat),
            *places,
            *gating,
            **selection,
            softmax_scale=scale,
            gate=self._slow_gate,
            gate_value=value,
            warm_up_tanh=self._warm_up_tanh,
        )
        return mixed.view(state.shape)


def attend(module: StandIn, query, key, value, attention_mask, **kwargs):
    """Our function of the interface: the attention that the user chose, then the slow tokens."""
    state, weights = module.attend_as_chosen(query, key, value, attention_mask, **kwargs)
    return module._module.read(state, query, module._reading, kwargs.get("scaling")), weights


AttentionInterface.register(NAME, attend)


# ------------------------------------------------------------------------------------------------ classes and layers

_SUBCLASSES: dict[tuple[type, type], type[nn.Module]] = {}


def subclass_of(plain_class: type[nn.Module], mixin: type[ReplacedAttention]) -> type[nn.Module]:
    """The subclass of a model's attention class with ``mixin`` before it; the same one each time."""
    key = (mixin, plain_class)
    if key not in _SUBCLASSES:
        eager = getattr(sys.modules[plain_class.__module__], "eager_attention_forward", None)
        names = {"_mixin": mixin, "_plain_class": plain_class, "__doc__": plain_class.__doc__}
        names |= {"_eager_attention": eager and staticmethod(eager), "__module__": plain_class.__module__}
        _SUBCLASSES[key] = type(f"SlowFast{plain_class.__name__}", (mixin, plain_class), names)
    return _SUBCLASSES[key]


def _new(mixin: type[ReplacedAttention], plain_class: type[nn.Module]) -> nn.Module:
    made = subclass_of(plain_class, mixin)
    return made.__new__(made)


def _hands_on_keywords(module: nn.Module, to: str | None = None) -> bool:
    """Whether a module's forward gives the keyword arguments that it does not name to what it calls (``self.<to>``)."""
    forward = inspect.unwrap(type(module).forward)
    function = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    rest = function.args.kwarg
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    if to is not None:
        calls = [node for node in calls if ast.unparse(node.func) == f"self.{to}"]
    given = (word.value for node in calls for word in node.keywords if word.arg is None)
    return rest is not None and any(isinstance(value, ast.Name) and value.id == rest.arg for value in given)


def unsupported_reason(decoder: nn.Module, layer: nn.Module) -> str | None:
    """Why a layer of a decoder cannot be made hybrid; None: it can."""
    attention = getattr(layer, "self_attn", None)
    if not isinstance(attention, nn.Module):
        return "it has no self_attn"
    if isinstance(attention, HybridAttention):
        return "it attends slow tokens already"
    kind = type(attention)
    if "ALL_ATTENTION_FUNCTIONS" not in inspect.getsource(inspect.unwrap(kind.forward)):
        return f"{kind.__name__} does not go through transformers' AttentionInterface"
    parts = ("o_proj", "layer_idx", "head_dim") + (() if hasattr(attention, "qkv_proj") else ("k_proj", "v_proj"))
    missing = [name for name in parts if not hasattr(attention, name)]
    if missing:
        return f"{kind.__name__} has no {', '.join(missing)}"
    projections = [getattr(attention, name) for name in ("qkv_proj", "k_proj", "v_proj") if hasattr(attention, name)]
    if not all(hasattr(projection, "out_features") for projection in projections):
        return f"{kind.__name__} projects K and V by more than a linear layer"
    if len({projection.out_features for projection in projections}) > 1:
        return f"{kind.__name__} has heads of another size for V than for K"
    if not hasattr(layer, "input_layernorm"):
        return f"{type(layer).__name__} has no input_layernorm, which slow tokens would share"
    if not _hands_on_keywords(layer, "self_attn"):
        return f"{type(layer).__name__} hands no keyword arguments on to its attention"
    if not _hands_on_keywords(decoder):
        return f"{type(decoder).__name__} hands no keyword arguments on to its layers"
    return None


def make_hybrid(layer: nn.Module, config: SlowFastConfig) -> None:
    """Give a decoder layer's attention the projections and the gate that read slow tokens, uninitialised.

    They are of the sizes and the type of the layer's own, and on its device.
    """
    attention = layer.self_attn
    attention.__class__ = subclass_of(type(attention), HybridAttention)
    attention._decoder_layer = (layer,)  # in a tuple: no child of its child
    attention._slow_gate, attention._warm_up_tanh = config.gate, not config.updates_every_row
    attention._norm_class = type(layer.input_layernorm)
    attention._norm_offset = factor_offset(attention._norm_class)
    options = {"dtype": weights_dtype(attention), "device": device_of(attention.o_proj)}
    own = attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.k_proj
    attention.cross_attn_kv_proj = nn.Linear(own.in_features, 2 * _kv_width(attention), **options)
    attention.cross_attn_gate_proj = nn.Sequential(nn.Linear(attention.o_proj.in_features, 1, **options))
    attention.cross_attn_warm_up_gate = nn.Parameter(torch.zeros(1, **options)) if config.has_warm_up else None


def _kv_width(attention: nn.Module) -> int:
    """Hkv * D."""
    if hasattr(attention, "qkv_proj"):  # of Hq, Hkv and Hkv heads
        return (attention.qkv_proj.out_features - attention.o_proj.in_features) // 2
    return attention.k_proj.out_features


def _own_kv(attention: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of K's and of V's projection."""
    if not hasattr(attention, "qkv_proj"):
        return [_weight_and_bias(attention.k_proj), _weight_and_bias(attention.v_proj)]
    sizes = (attention.o_proj.in_features, _kv_width(attention), _kv_width(attention))
    weight, bias = (x.split(sizes)[1:] for x in _weight_and_bias(attention.qkv_proj))
    return list(zip(weight, bias, strict=True))


def warn_where_gates_stay_closed(attentions: Sequence[HybridAttention]) -> None:
    """Before training: every warm-up gate is exactly 0 and nothing trains one (where their values can be seen)."""
    gates = [attention.cross_attn_warm_up_gate for attention in attentions]
    if not gates or any(gate is None or gate.requires_grad or gate.is_meta or bool(gate.any()) for gate in gates):
        return
    warnings.warn(
        "cross_attn_warm_up_gate: every one is 0 and frozen, so training never opens the slow path (PEFT freezes it "
        "and has no adapter for it): start above 0 (add_slow_fast(..., warm_up_init=0.1)), or unfreeze it "
        "(requires_grad_()) and save it with the model",
        stacklevel=2,
    )


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: that of its weights, or, where they are offloaded, of the hook that fetches them."""
    device = next(module.parameters()).device
    hook = getattr(module, "_hf_hook", None)
    if device.type == "meta" and getattr(hook, "execution_device", None) is not None:
        return torch.device(hook.execution_device)
    return device


@torch.no_grad()
def start_from_own_kv(attention: HybridAttention) -> None:
    """``cross_attn_kv_proj`` becomes the layer's own projections of K and V, those of a head side by side.

    A missing bias is a zero bias.
    """
    projection = attention.cross_attn_kv_proj
    pairs = _own_kv(attention)
    heads = _kv_width(attention) // attention.head_dim
    for into, (k, v) in zip((projection.weight, projection.bias), zip(*pairs, strict=True), strict=True):
        into.copy_(interleave_kv(k, v, heads))


def _weight_and_bias(projection: nn.Module) -> tuple[Tensor, Tensor]:
    """Of a linear layer in any form: what is adapted, quantised or offloaded is asked for its products."""
    if is_plain(projection, nn.Linear):
        bias = projection.bias
        return projection.weight, projection.weight.new_zeros(len(projection.weight)) if bias is None else bias
    device, dtype = device_of(projection), weights_dtype(projection)
    one = torch.eye(projection.in_features, device=device, dtype=dtype)
    with without_autocast(device):
        bias = projection(torch.zeros_like(one[:1]))[0]
        return (projection(one) - bias).T, bias
