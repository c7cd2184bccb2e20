"""A hybrid decoder layer reproduces the released one: prefill, a cached decode step in both modes, gradients."""

from __future__ import annotations

from dataclasses import dataclass

import golden_data
import pytest
import torch
from model_cases import MODEL_TARGETS, one_thread  # noqa: F401
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from slowfast_model import SlowFastConfig
from slowfast_model.attention import DecoderLayer
from slowfast_model.cache import KVCache, LayerCache, SlowContext
from slowfast_model.layers import rope_at
from slowfast_model.tokens import attending_rows, decode_rows

NAMES = golden_data.names("hybrid_layer_")
WITH_DECODE = [name for name in NAMES if "decode_official" in str(golden_data.load(name)[1]["shapes"])]
OUTPUT = {"atol": 2e-5, "rtol": 0}
GRADIENT = {"atol": 1e-4, "rtol": 1e-4}

pytestmark = pytest.mark.parametrize("target", MODEL_TARGETS)


@dataclass
class Case:
    """A recorded call. Inputs padded on the left are moved to the right, as the model's layout has them."""

    layer: DecoderLayer
    tensors: dict[str, Tensor]
    config: SlowFastConfig
    backend: str

    @classmethod
    def load(cls, name: str, target) -> Case:
        tensors, sidecar = golden_data.load(name)
        tensors = {key: x.to(target.device) for key, x in tensors.items()}
        recorded = sidecar["config"]
        config = SlowFastConfig(
            hidden_size=recorded["heads"] * recorded["head_dim"],
            intermediate_size=recorded["inter"],
            num_hidden_layers=1,
            num_attention_heads=recorded["heads"],
            num_key_value_heads=recorded["kv_heads"],
            rms_norm_eps=recorded["eps"],
            rope_theta=recorded["rope_theta"],
            cross_attn_every_n_layers=1,
            cross_attn_gating_type=recorded["gating"],
            cross_attn_implementation=recorded["impl"],
        )
        layer = DecoderLayer(config, 0).to(target.device)
        layer.load_state_dict({k.removeprefix("weight."): x for k, x in tensors.items() if k.startswith("weight.")})
        return cls(layer, tensors, config, target.backend)

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    @property
    def valid(self) -> Tensor:
        return self["in.valid_rows"]

    def rows(self, x: Tensor) -> list[Tensor]:
        """The valid rows of each sample."""
        return [row[keep] for row, keep in zip(x, self.valid, strict=True)]

    def slow(self, tokens: Tensor | None = None) -> SlowContext:
        """The samples' slow tokens, packed; a sample without a visual token keeps them, and attends none."""
        device = self.valid.device
        packed = (self["in.slow_tokens"] if tokens is None else tokens)[self["in.cross_attn_mask"]]
        width = int(self.valid.sum(1).max())
        options = {"every_row": self.config.updates_every_row, "mask_system": self.config.masks_system_text}
        types = [x.cpu().numpy() for x in self.rows(self["in.token_type"])]
        attending = [torch.from_numpy(attending_rows(x, **options)) for x in types]
        text_rows = torch.cat([rows + b * width for b, rows in enumerate(attending)]).int()
        counts = torch.tensor([0, *map(len, attending)]).cumsum(0).int()
        lengths = self["in.cross_attn_mask"].sum(1)
        cu_slow = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        return SlowContext(cu_slow, text_rows.to(device), counts.to(device), tokens=packed)

    def rope(self, positions: Tensor):
        return rope_at(positions, self.config.head_dim, self.config.rope_theta, torch.float32)

    def prefill(self, x: Tensor, slow: SlowContext | None, cache: LayerCache | None = None) -> Tensor:
        """Outputs of the valid rows, [n, C]."""
        right = pad_sequence(self.rows(x), batch_first=True)
        rope = self.rope(torch.arange(right.shape[1], device=x.device))
        out = self.layer(right, rope, slow, cache, self.backend)
        return torch.cat([row[: int(keep.sum())] for row, keep in zip(out, self.valid, strict=True)])

    def recorded(self, key: str) -> Tensor:
        return torch.cat(self.rows(self[key]))


@pytest.mark.parametrize("name", NAMES)
def test_output(name, target):
    case = Case.load(name, target)
    torch.testing.assert_close(
        case.prefill(case["in.hidden_states"], case.slow()).detach(), case.recorded("out.out"), **OUTPUT
    )


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_output_with_slow_tokens_normalised_once_and_the_norm_folded_into_the_projection(name, target):
    case = Case.load(name, target)
    slow = case.slow()
    slow.tokens = torch.nn.functional.rms_norm(slow.tokens, slow.tokens.shape[-1:], eps=case.config.rms_norm_eps)
    slow.tokens_are_normalised = True
    torch.testing.assert_close(case.prefill(case["in.hidden_states"], slow), case.recorded("out.out"), **OUTPUT)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_closed_warm_up_gate_leaves_the_plain_layer_bitwise(name, target):
    case = Case.load(name, target)
    case.layer.self_attn.cross_attn_warm_up_gate.zero_()
    out = case.prefill(case["in.hidden_states"], case.slow())
    assert torch.equal(out, case.prefill(case["in.hidden_states"], None))
    torch.testing.assert_close(out, case.recorded("out.out_gate_zero"), **OUTPUT)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name, target):
    case = Case.load(name, target)
    x = case["in.hidden_states"].requires_grad_()
    tokens = case["in.slow_tokens"].requires_grad_()
    (case.prefill(x, case.slow(tokens)) * case.recorded("in.grad_out")).sum().backward()
    found = {"out.grad.hidden_states": x.grad, "out.grad.slow_tokens": tokens.grad}
    found |= {f"out.grad.weight.{key}": p.grad for key, p in case.layer.named_parameters()}
    recorded = [key for key in case.tensors if key.startswith("out.grad.")]
    assert len(recorded) >= 8
    for key in recorded:
        actual, expected = found[key], case[key]
        if key == "out.grad.hidden_states":
            actual, expected = actual[case.valid], expected[case.valid]
        torch.testing.assert_close(actual, expected, **GRADIENT, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("mode", ["attending", "official"])
@pytest.mark.parametrize("name", WITH_DECODE)
@torch.no_grad()
def test_a_cached_decode_step(name, mode, target):
    case = Case.load(name, target)
    lengths, heads = case.valid.sum(1), (case.config.num_key_value_heads, case.config.head_dim)
    capacity = int(lengths.max()) + 3
    cache = KVCache(1, len(lengths), capacity, *heads, dtype=torch.float32, device=target.device, backend=case.backend)
    slow = case.slow()
    case.prefill(case["in.hidden_states"], slow, cache.layers[0])
    assert torch.equal(case["in.decode_position_ids"][:, 0], lengths)

    text_rows, cu_text = decode_rows([1] * len(lengths), target.device)
    step = SlowContext(slow.cu_slow, text_rows, cu_text) if mode == "attending" else None
    cache.step.lay_out(len(lengths), target.device)
    cache.step.begin(lengths)
    out = case.layer(case["in.decode_hidden_states"], case.rope(lengths[:, None]), step, cache.layers[0], case.backend)
    torch.testing.assert_close(out, case[f"out.decode_{mode}"], **OUTPUT)
