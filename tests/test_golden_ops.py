"""Every backend reproduces the released code's operator outputs and gradients (arXiv 2504.01328) in float32."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import accumulate

import golden_data
import pytest
import torch
import torch.nn.functional as F
from targets import FLOAT32
from torch import Tensor

import slowfast_kernels as sk
from slowfast_kernels.pool_plan import make_pool_plan, sample_fast_frames

OUTPUT = {"atol": 1e-5, "rtol": 0}
GRADIENT = {"atol": 1e-4, "rtol": 1e-4}
PROMPT, RESPONSE, VISUAL, PADDING = 1, 2, 3, 4


# ---------------------------------------------------------------------------------------- cross-attention


@dataclass
class Layer:
    """One recorded call of the released cross-attention, brought to the ops' packed arguments."""

    tensors: dict[str, Tensor]
    config: dict
    device: torch.device

    @classmethod
    def load(cls, name: str, device: torch.device) -> Layer:
        tensors, sidecar = golden_data.load(name)
        return cls({key: x.to(device) for key, x in tensors.items()}, sidecar["config"], device)

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def rows(self, key: str) -> Tensor:
        """A recorded [B, L, ...] tensor as rows [B * L, ...]; the all-to-media form is recorded as [L, B, ...]."""
        x = self[key]
        return (x.transpose(0, 1) if self.all_to_media else x).flatten(0, 1)

    @property
    def all_to_media(self) -> bool:
        return self.config["impl"] == "vanilla"

    def is_text(self) -> Tensor:
        """[B, L]: the rows that cross-attention updates."""
        types = self["in.token_type"]
        if self.all_to_media:
            return torch.ones_like(types, dtype=torch.bool)
        is_text = (types == PROMPT) | (types == RESPONSE)
        if self.config["impl"].endswith("masksystem"):
            has_visual = (types == VISUAL).any(1, keepdim=True)
            is_text &= ((types == VISUAL).cumsum(1) > 0) | ~has_visual
        return is_text

    def text(self) -> tuple[Tensor, Tensor]:
        """text_rows, cu_text."""
        is_text = self.is_text()
        return is_text.flatten().nonzero().flatten().int(), self._prefix_sums(is_text.sum(1).tolist())

    def slow(self, features: Tensor, only_with_visual: bool) -> tuple[Tensor, Tensor]:
        """Packed slow tokens, cu_slow. In the released code a sample without a visual token has its context zeroed."""
        mask = self["in.cross_attn_mask"].bool()
        if only_with_visual:
            mask = mask & self["in.all_text_mask"].bool()[:, None]
        return features[mask], self._prefix_sums(mask.sum(1).tolist())

    def kv(self, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(tokens, weight, bias).view(-1, self.config["kv_heads"], 2, self.config["head_dim"])

    def _prefix_sums(self, counts: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=self.device)


LAYERS = golden_data.names("cross_attn")
KV = [f"weight.cross_attn_kv_proj.{x}" for x in ("weight", "bias")]
GATE = [f"weight.cross_attn_gate_proj.0.{x}" for x in ("weight", "bias")] + ["weight.cross_attn_warm_up_gate"]
INPUTS = ["text_state", "text_query", "vision_features"]


def test_every_recorded_call_is_covered():
    impls = {json.loads((golden_data.GOLDEN / f"{name}.json").read_text())["config"]["impl"] for name in LAYERS}
    assert len(LAYERS) == 11
    assert {"vanilla", "text-only-vanilla", "text-only-vanilla-masksystem"} <= impls


@pytest.mark.parametrize("target", FLOAT32)
@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients(target, name):
    layer = Layer.load(name, target.device)
    inputs = {key: layer[f"in.{key}"].requires_grad_() for key in INPUTS}
    weights = {key: layer[key].requires_grad_() for key in KV + GATE if key in layer.tensors}
    features, cu_slow = layer.slow(inputs["vision_features"], only_with_visual=True)
    text_rows, cu_text = layer.text()
    out = target.run(
        sk.slowfast_cross_attention,
        layer.rows("in.text_state"),
        layer.rows("in.text_query"),
        layer.kv(features, *(weights[key] for key in KV)),
        cu_slow,
        text_rows,
        cu_text,
        *(weights.get(key) for key in GATE),
        warm_up_tanh=not layer.all_to_media,
    )
    torch.testing.assert_close(out, layer.rows("out.out"), **OUTPUT)
    (out * layer.rows("in.grad_out")).sum().backward()
    for key, x in (inputs | weights).items():
        torch.testing.assert_close(x.grad, layer[f"out.grad.{key}"], **GRADIENT, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("target", FLOAT32)
@pytest.mark.parametrize("name", LAYERS)
def test_fused_output_without_gradients(target, name):
    layer = Layer.load(name, target.device)
    features, cu_slow = layer.slow(layer["in.vision_features"], only_with_visual=True)
    text_rows, cu_text = layer.text()
    kv = layer.kv(features, *(layer[key] for key in KV))
    gating = [layer.tensors.get(key) for key in GATE]
    arguments = (layer.rows("in.text_state"), layer.rows("in.text_query"), kv, cu_slow, text_rows, cu_text, *gating)
    out = target.run(sk.slowfast_cross_attention, *arguments, warm_up_tanh=not layer.all_to_media)
    torch.testing.assert_close(out, layer.rows("out.out"), **OUTPUT)


@pytest.mark.parametrize("target", FLOAT32)
@pytest.mark.parametrize("name", LAYERS)
def test_context(target, name):
    layer = Layer.load(name, target.device)
    features, cu_slow = layer.slow(layer["in.vision_features"], only_with_visual=False)
    text_rows, cu_text = layer.text()
    kv = layer.kv(features, *(layer[key] for key in KV))
    context = target.run(sk.text_cross_attention, layer.rows("in.text_query"), kv, cu_slow, text_rows, cu_text)
    counts = cu_text.diff().tolist()
    recorded = torch.cat([rows[:count] for rows, count in zip(layer["out.context_core"], counts, strict=True)])
    torch.testing.assert_close(context.flatten(1), recorded, **OUTPUT)


@pytest.mark.parametrize("target", FLOAT32)
@pytest.mark.parametrize("name", LAYERS)
def test_gate(target, name):
    layer = Layer.load(name, target.device)
    rows = layer.text()[0]
    state = layer.rows("in.text_state")
    weight, bias = (layer[key] for key in GATE[:2])
    ones = torch.ones(len(rows), state.shape[1], device=target.device)
    added = target.run(sk.gated_residual_mix, state, ones, rows, weight, bias, None) - state
    recorded = layer.rows("out.gate_proj_out") if layer.all_to_media else layer["out.gate_proj_out"]
    torch.testing.assert_close(added[rows.long()], recorded.expand_as(ones), **OUTPUT)


# ------------------------------------------------------------------------------------------------ pooling


def _pooling_cases() -> list:
    params = []
    for name in golden_data.names("pooling"):
        cases = json.loads((golden_data.GOLDEN / f"{name}.json").read_text())["cases"]
        params += [pytest.param(name, case, id=f"{name}-{case['id']}") for case in cases if "videos" in case]
    return params


def _pool(target, frames: Tensor, counts: list[int], grid: tuple[int, int], case: dict) -> sk.PooledTokens:
    return target.run(
        sk.slowfast_pool,
        frames,
        counts,
        grid,
        pool_stride=case.get("mm_video_pooling_stride", 1),
        sampling_stride=case["temporal_sampling_stride"],
        temporal_stride=case["temporal_stride"],
        spatial_stride=case["spatial_stride"],
        min_fast_frames=case["min_fast_frames"],
    )


def _check_tokens(pooled: sk.PooledTokens, slow: list[Tensor], fast: list[Tensor]) -> None:
    assert pooled.cu_slow.tolist() == [0, *accumulate(map(len, slow))]
    assert pooled.cu_fast.tolist() == [0, *accumulate(map(len, fast))]
    torch.testing.assert_close(pooled.slow, torch.cat(slow), **OUTPUT)
    torch.testing.assert_close(pooled.fast, torch.cat(fast), **OUTPUT)


@pytest.mark.parametrize("target", FLOAT32)
@pytest.mark.parametrize(("name", "case"), _pooling_cases())
def test_slow_and_fast_tokens(target, name, case):
    tensors, _ = golden_data.load(name)

    def recorded(kind: str, i: int) -> Tensor:
        return tensors[f"{case['id']}.{kind}.{i}"].to(target.device)

    if case.get("as_tensor"):  # a plain tensor of images: every frame is an image of its own
        frames, count = recorded("in", 0), case["videos"][0][0]
        grid = (case["videos"][0][1],) * 2
        slow, fast = (recorded(kind, 0).reshape(-1, frames.shape[-1]) for kind in ("slow", "fast"))
        pooled = _pool(target, frames, [1] * count, grid, case)
        _check_tokens(pooled, list(slow.chunk(count)), list(fast.chunk(count)))
        return
    sides = [side for _, side in case["videos"]]
    for side in sorted(set(sides)):  # one call takes one grid
        mine = [i for i, s in enumerate(sides) if s == side]
        frames, slow = [], []
        for i in mine:
            x = recorded("in", i)
            if name == "pooling_prepool":  # before the spatial pooling: [T, C, H, W], or [C, H, W] of an image
                x = x.reshape(-1, *x.shape[-3:]).flatten(2).transpose(1, 2).contiguous()
            frames.append(x)
            slow.append(recorded("pre" if name == "pooling_prepool" else "slow", i).flatten(0, -2))
        fast = [recorded("fast", i) for i in mine]
        pooled = _pool(target, torch.cat(frames), [len(x) for x in frames], (side, side), case)
        _check_tokens(pooled, slow, fast)


@pytest.mark.parametrize(("name", "case"), _pooling_cases())
def test_temporal_branch_and_sampled_frames(name, case):
    for i, (frames, branch) in enumerate(zip(case.get("frame_indices", []), case.get("path", []), strict=True)):
        count, side = case["videos"][i]
        keys = ("temporal_sampling_stride", "temporal_stride", "spatial_stride", "min_fast_frames")
        strides = [case[key] for key in keys]
        windows = make_pool_plan((count,), (side, side), 1, *strides).videos[0].windows
        if branch == "image:spatial-only":
            assert windows == ((0,),)
            continue
        assert sample_fast_frames(count, strides[0], strides[3]) == frames
        if branch == "no-temporal-pool":
            assert windows == tuple((t,) for t in frames)
        if branch == "avg_pool3d":
            assert {len(window) for window in windows} == {strides[1]}
        if branch == "adaptive_avg_pool3d":
            assert len(windows) == min(len(frames), strides[3])


SAMPLING = json.loads((golden_data.GOLDEN / "pooling_sample_fast_frames.json").read_text())["rows"]


def test_sampled_frames_equal_the_released_table():
    assert len(SAMPLING) > 100
    for frames, stride, minimum, indices in SAMPLING:
        assert sample_fast_frames(frames, stride, minimum) == indices, (frames, stride, minimum)


def test_sampling_steps_in_floating_point_as_released():
    assert sample_fast_frames(164, 8, 1)[15] == 122 != 15 * 164 // 20
