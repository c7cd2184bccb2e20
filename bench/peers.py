"""The attention peers: PyTorch SDPA's four backends, flex_attention, FlashAttention 2, 3 and 4.

Each gets Q, K and V in the layout and head grouping that it likes best, prepared outside the timed region, and
every option worth sweeping; the runner checks each variant's answer and reports the fastest right one. Peers run
attention alone: gate and mix are in our time and not in theirs. A peer that is not here says why.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .inputs import AttentionInputs, prefix_sums
from .runner import Runner, Variant, relative_error
from .shapes import QWEN2_7B

Sets = list[AttentionInputs]
FLEX_SLOW = (10368,)
# Whole waves decide, and 132 SMs over a shape's tiles are no power of two: 56 tiles in 33 splits are 14 even waves.
# 0 is a package's own choice.
SPLITS = (0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 33, 64)


@dataclass(frozen=True)
class Peer:
    """A competitor in attention. ``absent(device)`` says why it can't take part; ``variants`` gives its best ways."""

    name: str
    what: str
    absent: Callable[[torch.device], str | None]
    variants: Callable[[Sets, Tensor], Iterator[Variant]]


def peer_variant(label: str, sets: Sets, reference: Tensor, bind: Callable, to_context: Callable) -> Variant:
    """``bind(inputs)`` -> zero-argument call; ``to_context(raw output)`` -> [Nt, Hq, D]."""

    def build():
        calls = [bind(inputs) for inputs in sets]
        return calls, lambda: relative_error(to_context(calls[0]()), reference)

    return Variant(label, build)


def _needs_even(sets: Sets) -> None:
    if not sets[0].shape.is_even:
        raise NotImplementedError("takes sequences of one length only")


# --------------------------------------------------------------------------------------- scaled_dot_product


def _heads_per_kv(inputs: AttentionInputs) -> int:
    return inputs.shape.heads.num_q // inputs.shape.heads.num_kv


def _sequences(inputs: AttentionInputs) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """query [B, n, Hq, D], keys and values [B, N, Hkv, D]: one batch if the lengths allow, else one by one."""
    if inputs.shape.is_even:
        yield inputs.query, inputs.keys, inputs.values
        return
    pairs = zip(inputs.q.split(inputs.shape.text), inputs.slow_kv.split(inputs.shape.slow), strict=True)
    for query, kv in pairs:
        yield query[None], kv[None, :, :, 0], kv[None, :, :, 1]


def sdpa_inputs(query: Tensor, keys: Tensor, values: Tensor, grouping: str, layout: str) -> tuple[Tensor, ...]:
    """q, k, v as SDPA takes them, [B, H, length, D]; ``layout`` "hnd" or "nhd" is the order in memory.

    grouping "gqa": Hq and Hkv heads. "packed": the query heads of one KV head become query rows, so that K and V are
    read once for all of them. "repeated": K and V copied for each query head, for backends that know no groups.
    """
    heads_per_kv = query.shape[2] // keys.shape[2]
    match grouping:
        case "gqa":
            pass
        case "packed":
            query = query.unflatten(2, (-1, heads_per_kv)).transpose(2, 3).flatten(1, 2)  # [B, n * G, Hkv, D]
        case "repeated":
            keys, values = (x.repeat_interleave(heads_per_kv, 2) for x in (keys, values))
        case _:
            raise ValueError(f"grouping: got {grouping!r}, want gqa, packed or repeated")
    match layout:
        case "nhd":
            return tuple(x.contiguous().transpose(1, 2) for x in (query, keys, values))
        case "hnd":
            return tuple(x.transpose(1, 2).contiguous() for x in (query, keys, values))
    raise ValueError(f"layout: got {layout!r}, want hnd or nhd")


def sdpa_context(outs: list[Tensor], grouping: str, heads_per_kv: int) -> Tensor:
    """[B, H, rows, D] of each call -> [Nt, Hq, D]."""
    contexts = []
    for out in outs:
        out = out.transpose(1, 2)
        if grouping == "packed":
            out = out.unflatten(1, (-1, heads_per_kv)).transpose(2, 3).flatten(2, 3)
        contexts.append(out.flatten(0, 1))
    return torch.cat(contexts)


def _bind_sdpa(inputs: AttentionInputs, grouping: str, layout: str, backend: SDPBackend | None) -> Callable:
    """A call that returns one output, or one a sequence of a ragged batch."""
    arguments = [sdpa_inputs(*sequence, grouping, layout) for sequence in _sequences(inputs)]
    attend = partial(F.scaled_dot_product_attention, enable_gqa=grouping == "gqa")

    def call() -> list[Tensor]:
        return [attend(*qkv) for qkv in arguments]

    def call_on_backend() -> list[Tensor]:
        with sdpa_kernel(backend):
            return call()

    return call if backend is None else call_on_backend


def sdpa_variants(
    sets: Sets, reference: Tensor, backend: SDPBackend | None, ways: tuple[str, ...]
) -> Iterator[Variant]:
    """``ways``: "grouping layout"."""
    for way in ways:
        grouping, layout = way.split()
        bind = partial(_bind_sdpa, grouping=grouping, layout=layout, backend=backend)
        yield peer_variant(
            way, sets, reference, bind, partial(sdpa_context, grouping=grouping, heads_per_kv=_heads_per_kv(sets[0]))
        )


SDPA_WAYS = {
    SDPBackend.FLASH_ATTENTION: ("gqa hnd", "gqa nhd", "packed hnd", "packed nhd"),
    SDPBackend.CUDNN_ATTENTION: ("gqa hnd", "gqa nhd", "packed hnd", "packed nhd"),
    SDPBackend.EFFICIENT_ATTENTION: ("packed hnd", "packed nhd", "repeated hnd"),
    SDPBackend.MATH: ("packed hnd", "gqa hnd"),
}


# ---------------------------------------------------------------------------------------------- flex


def _flex_variants(sets: Sets, reference: Tensor) -> Iterator[Variant]:
    from torch.nn.attention.flex_attention import flex_attention

    def bind(inputs: AttentionInputs) -> Callable[[], Tensor]:
        if inputs.shape.heads != QWEN2_7B or inputs.shape.slow[0] not in FLEX_SLOW:
            raise NotImplementedError("compiled for the main shapes only, to spare minutes of compilation")
        _needs_even([inputs])
        q, k, v = sdpa_inputs(inputs.query, inputs.keys, inputs.values, "gqa", "hnd")
        return lambda: [compiled(q, k, v, enable_gqa=True)]

    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    yield peer_variant(
        "compiled", sets, reference, bind, partial(sdpa_context, grouping="gqa", heads_per_kv=_heads_per_kv(sets[0]))
    )


# -------------------------------------------------------------------------------------- FlashAttention


def accepted(function: Callable, **options) -> dict:
    """Options that this release of a package knows."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


def first_of(result) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _flash_call(module, inputs: AttentionInputs, **options) -> Callable[[], Tensor]:
    """``flash_attn_func`` on [B, length, H, D], or the varlen function on ragged batches."""
    shape = inputs.shape
    if shape.is_even:
        q, k, v = (x.contiguous() for x in (inputs.query, inputs.keys, inputs.values))
        function = module.flash_attn_func
        bound = partial(function, q, k, v, **accepted(function, **options))
        return lambda: first_of(bound()).flatten(0, 1)
    k, v = (x.contiguous() for x in inputs.slow_kv.unbind(2))
    function = module.flash_attn_varlen_func
    known = accepted(
        function,
        cu_seqlens_q=prefix_sums(shape.text, inputs.q.device),
        cu_seqlens_k=prefix_sums(shape.slow, inputs.q.device),
        max_seqlen_q=max(shape.text),
        max_seqlen_k=max(shape.slow),
        **options,
    )
    bound = partial(function, inputs.q, k, v, **known)
    return lambda: first_of(bound())


def _flash_cache_call(module, inputs: AttentionInputs, **options) -> Callable[[], Tensor]:
    """``flash_attn_with_kvcache``: the decoding entry point, which splits over the keys by its own choice."""
    _needs_even([inputs])
    q, k, v = (x.contiguous() for x in (inputs.query, inputs.keys, inputs.values))
    function = module.flash_attn_with_kvcache
    bound = partial(function, q, k, v, **accepted(function, **options))
    return lambda: first_of(bound()).flatten(0, 1)


def _fa2_variants(sets: Sets, reference: Tensor) -> Iterator[Variant]:
    module = importlib.import_module("flash_attn")
    yield peer_variant("func", sets, reference, partial(_flash_call, module), lambda out: out)
    for splits in SPLITS:
        bind = partial(_flash_cache_call, module, num_splits=splits)
        yield peer_variant(f"kvcache num_splits={splits}", sets, reference, bind, lambda out: out)


def _fa3_variants(sets: Sets, reference: Tensor) -> Iterator[Variant]:
    module = importlib.import_module("flash_attn_interface")
    for pack in (True, False) if sets[0].shape.heads == QWEN2_7B else (True,):
        for splits in SPLITS:
            bind = partial(_flash_call, module, num_splits=splits, pack_gqa=pack)
            yield peer_variant(f"num_splits={splits} pack_gqa={pack}", sets, reference, bind, lambda out: out)


def _fa4_variants(sets: Sets, reference: Tensor) -> Iterator[Variant]:
    module = importlib.import_module("flash_attn.cute")
    # each way to pack compiles for seconds, a number of splits doesn't
    ways = [(None, 1), (False, 1), (True, 0)] if sets[0].shape.heads == QWEN2_7B else [(None, 1)]
    if splits_keys(module, sets[0]):
        ways += [(None, splits) for splits in SPLITS if splits > 1]
    for pack, splits in ways:
        bind = partial(_flash_call, module, num_splits=splits, pack_gqa=pack)
        yield peer_variant(f"num_splits={splits} pack_gqa={pack}", sets, reference, bind, lambda out: out)


def splits_keys(module, inputs: AttentionInputs) -> bool:
    """Whether this release splits keys on this GPU: some refuse to, each time anew."""
    try:
        _flash_call(module, inputs, num_splits=2)()
    except Exception:
        return False
    return True


# ---------------------------------------------------------------------------------------------- registry


def _needs_gpu(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a GPU"


def _needs_package(module: str, attribute: str, package: str) -> Callable[[torch.device], str | None]:
    def absent(device: torch.device) -> str | None:
        if device.type != "cuda":
            return "needs a GPU"
        try:
            getattr(importlib.import_module(module), attribute)
        except Exception as error:  # a broken binary package can raise anything
            return f"{package}: {type(error).__name__}: {error}".splitlines()[0]
        return None

    return absent


def _on_cpu_only(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "on a GPU each SDPA backend is its own peer"


PEERS: tuple[Peer, ...] = (
    Peer(
        "torch",
        "best of SDPA's groupings and layouts, PyTorch's own choice of kernel",
        _on_cpu_only,
        partial(sdpa_variants, backend=None, ways=("gqa hnd", "packed hnd", "packed nhd")),
    ),
    *(
        Peer(
            f"sdpa-{name}",
            f"SDPA {backend.name}",
            _needs_gpu,
            partial(sdpa_variants, backend=backend, ways=SDPA_WAYS[backend]),
        )
        for name, backend in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
            ("math", SDPBackend.MATH),
        )
    ),
    Peer("flex", "torch.compile of flex_attention", _needs_gpu, _flex_variants),
    Peer(
        "fa4",
        "FlashAttention 4 (flash_attn.cute)",
        _needs_package("flash_attn.cute", "flash_attn_func", "flash-attn-4"),
        _fa4_variants,
    ),
    Peer(
        "fa3",
        "FlashAttention 3",
        _needs_package("flash_attn_interface", "flash_attn_func", "flash_attn_3"),
        _fa3_variants,
    ),
    Peer("fa2", "FlashAttention 2", _needs_package("flash_attn", "flash_attn_func", "flash-attn"), _fa2_variants),
)
OTHER_PEERS = {
    "torch": "the best plain PyTorch composition of pool and mix",
    "torch-compile": "torch.compile of that composition",
    "official": "the released code's sequence of operations for one hybrid layer, in eager PyTorch",
    "gpt-fast": "decode: a plain step with a static cache, compiled whole",
    "transformers": "decode: its Qwen2 with a static cache, compiled",
}


def compositions(runner: Runner, op: str) -> list[str]:
    """Names of the peers of pool and mix that take part; one row says why of each other."""
    names = [name for name in ("torch", "torch-compile") if runner.wants_peer(name)]
    if not runner.is_gpu and "torch-compile" in names:
        runner.absent(op, "torch-compile", "timed on a GPU only (its C++ compilation would outlast the run)")
        names.remove("torch-compile")
    return names


PEER_NAMES = tuple(dict.fromkeys([*(peer.name for peer in PEERS), *OTHER_PEERS]))
