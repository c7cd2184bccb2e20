"""The plug-in for transformers: prefill and decode of a Qwen2-7B with slow-fast layers, static cache, compiled step.

Three take turns (A B C A B C), all on one set of weights: the plug-in, the language model alone on as many rows of
text, and the plug-in with the cross-attention that a user would write in its place (``plain_attention``). What the
first and the last add to the language model is taken turn by turn. A prefill is the model's own eager call, as generate
makes it; a decode step on a GPU is compiled as generate compiles one for a static cache, and runs as a CUDA graph.
Answers are held to a pass over prompt and token without a cache, by the eager formulas. On a GPU the model has the
shape of Qwen2-7B, on a CPU a tiny one; weights are random in both.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import cache, partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .model import BUDGET_S, PAIRS, PROFILED, created_on
from .runner import Contender, Runner, Variant, relative_error
from .selection import model_shapes
from .shapes import Cost, ModelShape, language_model_keys, model_cost, pooling_keys
from .timing import Call, kernel_lane, wall_lane

BASE = "base LM"
ROOM = PAIRS + 20  # rows of a cache behind the prompt: of turns, checks, warming up, recording
# Relative, on the logits of a whole model: two ways through 28 layers of random weights in bfloat16 are 5 to 6 % apart.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 7e-2}


def why_absent() -> str | None:
    """Why transformers' models cannot be measured here."""
    try:
        import slowfast_model.hf  # noqa: F401
    except ImportError as problem:
        return str(problem)
    return None


def make_model(shape: ModelShape, dtype: str, device: torch.device):
    """A Qwen2 of random weights, made on the device, with slow-fast layers whose gates are open."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    from slowfast_model.hf import add_slow_fast

    config = Qwen2Config(**language_model_keys(shape), head_dim=shape.heads.dim, tie_word_embeddings=False)
    torch.manual_seed(0)
    with created_on(device, dtype):
        language_model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        return add_slow_fast(
            language_model,
            shape.hidden,
            range(0, shape.layers, shape.every),
            video_token_id=shape.vocab - 1,
            warm_up_init=0.9,
            gate_bias_init=0.5,
            mm_projector_type="identity",
            **pooling_keys(shape),
        ).eval()


def sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of its modules around the same tensors."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


class Prompted:
    """A model with its prompt and the static cache that its calls fill.

    Args:
        forward: of the model.
        ids: [1, L] of the prompt.
        inputs: what a prefill is given beside them.
        step_inputs: what a decode step is given beside a token.
        make_cache: for so many rows.
        reference: logits [1, V] behind ids [1, n], by a call that has no cache.
    """

    def __init__(
        self,
        forward: Callable,
        ids: Tensor,
        make_cache: Callable[[int], object],
        reference: Callable[[Tensor], Tensor],
        inputs: dict | None = None,
        step_inputs: dict | None = None,
    ) -> None:
        from slowfast_model.hf._versions import CACHE

        self.forward, self.ids, self.inputs, self.step_inputs = forward, ids, inputs or {}, step_inputs or {}
        self.cache = make_cache(ids.shape[1] + ROOM)
        self.kept = {CACHE: self.cache, "use_cache": True}
        self.reference, self.how = reference, "eager step"
        self.token, self.position = ids[:, :1].clone(), ids.new_zeros(1, 1)
        self.rows = 0  # in the cache
        self.call = forward

    def prefill(self) -> Tensor:
        self.cache.reset()
        self.rows = self.ids.shape[1]
        self.position.fill_(self.rows)
        return self.forward(self.ids, logits_to_keep=1, **self.inputs, **self.kept).logits[:, -1]

    def step(self) -> Tensor:
        """The same token again and again, each time one row further.

        Raises:
            RuntimeError: the cache is full.
        """
        if self.rows == self.ids.shape[1] + ROOM:
            raise RuntimeError(f"a cache with room for {ROOM} steps is full")
        torch.compiler.cudagraph_mark_step_begin()
        place = {"position_ids": self.position}
        if counts_cache_positions():
            place["cache_position"] = self.position[0]
        logits = self.call(self.token, **place, **self.step_inputs, **self.kept).logits[:, -1]
        self.position += 1
        self.rows += 1
        return logits

    def compile(self) -> None:
        """The step as transformers' generate compiles one for a static cache; once."""
        from torch._dynamo.utils import counters

        if self.call is not self.forward:
            return
        refused = counters["inductor"]["cudagraph_skips"]
        self.call = torch.compile(self.forward, mode="reduce-overhead", fullgraph=True)
        for _ in range(3):  # compiles, warms up, records
            self.step()
        refused = counters["inductor"]["cudagraph_skips"] - refused
        self.how = "torch.compile, " + (f"{refused} CUDA graphs refused" if refused else "CUDA graph")

    def prefill_error(self) -> float:
        return relative_error(self.prefill(), self.reference(self.ids))

    def step_error(self) -> float:
        """Of the first step behind the prompt."""
        self.prefill()
        return relative_error(self.step().clone(), self.reference(torch.cat([self.ids, self.token], 1)))


@cache
def counts_cache_positions() -> bool:
    """Whether models are told which rows of the cache a call fills (4.57), or see to it themselves."""
    from transformers import Qwen2ForCausalLM

    return "cache_position" in inspect.signature(Qwen2ForCausalLM.forward).parameters


class Side(NamedTuple):
    """A contender."""

    who: str
    kind: str
    make: Callable[[], Prompted]
    costs: dict[bool, Cost]  # by whether it is a decode step


def measure(runner: Runner, ops: str, shape: str, dtype: str, sides: list[Side], base: str, facts: dict) -> None:
    """Rows ``{ops}-prefill`` and ``{ops}-decode`` of all sides in turns, on a GPU with ``-gpu`` behind them too."""
    torch.compiler.reset()  # or this shape's sizes, beside those of the shape before, would be dynamic
    sides = [side for side in sides if side.kind != "peer" or runner.wants_peer(side.who)]
    made = {side.who: cache(side.make) for side in sides}
    points = [f"{ops}-prefill", f"{ops}-decode"]
    if runner.is_gpu:  # the profiler last: what it leaves behind slows no other row
        points += [f"{ops}-prefill-gpu", f"{ops}-decode-gpu"]
    short = 3 if runner.quick else 1
    wall = partial(wall_lane, device=runner.device, budget_s=BUDGET_S / short, most=PAIRS // short)
    for op in points:
        is_step = "-decode" in op
        build = partial(_build, is_step=is_step, compiles=runner.is_gpu)
        contenders = [
            Contender(
                side.who,
                [Variant("", partial(build, made[side.who]))],
                side.costs[is_step],
                side.kind,
                tolerance=TOLERANCE[dtype],
                facts=facts,
            )
            for side in sides
        ]
        lane = partial(kernel_lane, turns=PROFILED) if op.endswith("-gpu") else wall
        watch = (lambda call: {"how": call.__self__.how}) if is_step else None
        runner.compare(op, shape, dtype, contenders, base=base, lane=lane, observe=watch)


def _build(make: Callable[[], Prompted], is_step: bool, compiles: bool) -> tuple[list[Call], Callable[[], float]]:
    prompted = make()
    if not is_step:
        return [prompted.prefill], prompted.prefill_error
    prompted.prefill()
    if compiles:
        prompted.compile()
    return [prompted.step], prompted.step_error


# ------------------------------------------------------------------------------------------- slow-fast layers


def run(runner: Runner) -> None:
    reason = why_absent()
    if reason is not None:
        runner.absent("hf-prefill", "slow-fast", reason, kind="ours")
        return
    dtype, shapes = runner.dtypes[0], model_shapes(runner.shapes or [str(128)], not runner.is_gpu)
    if not shapes:
        return
    model = make_model(shapes[0], dtype, runner.device)
    for shape in shapes:
        measure(runner, "hf", shape.name, dtype, sides_of(model, shape, dtype), BASE, {"slow_tokens": shape.num_slow})


def sides_of(model, shape: ModelShape, dtype: str) -> list[Side]:
    """The plug-in, the language model, and attention in plain PyTorch, on one set of weights."""
    import slowfast_kernels as sk

    from .plain_attention import use_plain_attention

    rows, device = shape.text + shape.num_fast, model.device
    features = [torch.randn(shape.frames, (2 * shape.slow_side) ** 2, shape.hidden, device=device, dtype=model.dtype)]
    text = torch.randint(shape.vocab - 1, (1, rows), device=device)
    with_video = text.clone()
    with_video[:, 8 : 8 + shape.num_fast] = model.config.video_token_id

    def make_cache(length: int):
        from transformers import StaticCache

        return StaticCache(config=model.config.text_config, max_cache_len=length)

    def eager(which: Callable, ids: Tensor, **inputs) -> Tensor:
        with sk.use_backend("eager"):
            return which(ids, use_cache=False, logits_to_keep=1, **inputs).logits[:, -1]

    def with_slow_tokens(which: nn.Module) -> Prompted:
        reference = partial(eager, model, video_features=features)
        return Prompted(which.forward, with_video, make_cache, reference, {"video_features": features})

    def plain() -> Prompted:
        return with_slow_tokens(use_plain_attention(sharing_weights(model)))

    def alone() -> Prompted:
        language_model = model.language_model
        return Prompted(language_model.forward, text, make_cache, partial(eager, language_model))

    costs, base_costs = (
        {decode: model_cost(shape, dtype, rows, slow, decode) for decode in (False, True)}
        for slow in (shape.num_slow, 0)
    )
    return [
        Side("slow-fast", "ours", partial(with_slow_tokens, model), costs),
        Side(BASE, "base", alone, base_costs),
        Side("plain PyTorch", "peer", plain, costs),
    ]
