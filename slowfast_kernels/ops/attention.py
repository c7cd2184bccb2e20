"""text_cross_attention: text rows attend the slow tokens of their own sequence, straight from the slow KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _extension, eager, flops
from ..calls import (
    AttentionOptions,
    AttentionTensors,
    BackwardTensors,
    FusedTensors,
    is_aligned,
    scale_of,
)
from ..heuristics.backends import OpCall
from ..heuristics.cuda import hopper_backward_drawback
from . import checks
from .dispatch import check_backend_name, compute_capability, follows_gradients
from .op import Op


def text_cross_attention(
    q: Tensor,
    slow_kv: Tensor | tuple[Tensor, Tensor],
    cu_slow: Tensor,
    text_rows: Tensor,
    cu_text: Tensor,
    *,
    slow_begin: Tensor | None = None,
    slow_end: Tensor | None = None,
    slow_pieces: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    num_splits: int = 0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softmax_scale * q K^T) V of each text row over the slow tokens of its sequence that it sees; GQA.

    A row sees all of them, or a range: a prefix that grows along the text, a window, nothing. They lie in one run of
    ``slow_kv``, or in pieces anywhere in it, which sequences may share.

    Args:
        q: queries of all rows [rows, Hq, D], after RoPE; float32, bfloat16 or float16. Only text rows are read.
        slow_kv: slow KV cache [Ns, Hkv, 2, D], K and V interleaved a head as ``cross_attn_kv_proj`` writes them; or
            (k, v), each [Ns, Hkv, D] with strides of its own.
        cu_slow: int32 [B + 1]; sequence b owns slow tokens cu_slow[b]..cu_slow[b + 1], or pieces of these numbers.
        text_rows: int32 [Nt], distinct rows of ``q``, grouped by sequence.
        cu_text: int32 [B + 1]; sequence b owns text_rows[cu_text[b]..cu_text[b + 1]].
        slow_begin, slow_end: int32 [Nt]; text row i sees the slow tokens slow_begin[i] <= j < slow_end[i] of its
            sequence, counted from the sequence's first (along its pieces) and clamped to what it has. None: from the
            first, to the last. Rows may come in any order; begin >= end: the row sees nothing. Tokens that no row sees
            may hold NaN.
        slow_pieces: int32 [P, 2], begin and end of pieces of ``slow_kv``. ``cu_slow`` then counts pieces, and a
            sequence reads its pieces one after the other. They may be empty, unordered, leave holes, overlap, repeat.
        softmax_scale: factor on q K^T; default 1 / sqrt(D).
        return_lse: also return the log-sum-exp of the scaled scores.
        num_splits: parts that each sequence's slow tokens are split into; 0: chosen from shapes. A fixed number
            makes a sequence's result independent of the rest of the batch.
        backend: "cuda", "triton", "cpu", "eager", or None (automatic).

    Returns:
        context [Nt, Hq, D] in q's dtype, and with ``return_lse`` lse [Nt, Hq] float32 (natural logarithm).
        A row that sees no slow token gets context 0 and lse -inf.

    Raises:
        ValueError: a wrong shape, device or stride; on the CPU (on a GPU under SLOWFAST_DEBUG=1) also prefix sums
            that do not match, pieces out of range, and row indices out of range or repeated.
        TypeError: a wrong dtype.
        NotImplementedError: the backend asked for cannot run this call.

    A cache [B, Hkv, S, D], as transformers' ``StaticCache`` keeps it, is read in place (inference: gradients of an
    overlapping view mean nothing). As virtual tokens of stride D, sequence b's begin at b * Hkv * S::

        tokens = (B - 1) * Hkv * S + S
        k, v = (x.as_strided((tokens, Hkv, D), (D, S * D, 1)) for x in (layer.keys, layer.values))
        starts = torch.arange(B) * Hkv * S
        slow_pieces = torch.stack((starts, starts + lengths), 1).int()  # cu_slow = 0, 1, ..., B
    """
    options = _by_value(softmax_scale, return_lse, num_splits, backend)
    keys, values = keys_and_values(slow_kv)
    tensors = AttentionTensors(q, keys, cu_slow, text_rows, cu_text, values, slow_begin, slow_end, slow_pieces)
    if not options.return_lse and follows_gradients(tensors):
        return _OP(tensors, AttentionOptions(options.softmax_scale, True, options.num_splits, backend))[0]
    context, lse = _OP(tensors, options)
    return (context, lse) if options.return_lse else context


def _by_value(softmax_scale: object, return_lse: object, num_splits: object, backend: str | None) -> AttentionOptions:
    softmax_scale = None if softmax_scale is None else checks.as_float("softmax_scale", softmax_scale)
    return_lse = checks.as_bool("return_lse", return_lse)
    num_splits = checks.as_int("num_splits", num_splits)
    check_backend_name(backend)
    return AttentionOptions(softmax_scale, return_lse, num_splits, backend)


def with_keys_and_values(given: dict[str, object]) -> dict[str, object]:
    """A public function's arguments by their names, with K and V as ``AttentionTensors`` names them."""
    keys, values = keys_and_values(given["slow_kv"])
    return given | {"slow_kv": keys, "slow_values": values}


def keys_and_values(slow_kv: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """As ``AttentionTensors`` holds them."""
    if not isinstance(slow_kv, (tuple, list)) or not any(isinstance(x, Tensor) for x in slow_kv):
        return slow_kv, None  # one tensor, or what the checks refuse
    if len(slow_kv) != 2 or not all(isinstance(x, Tensor) for x in slow_kv):
        got = ", ".join(map(checks.describe, slow_kv))
        raise TypeError(f"slow_kv: got ({got}), want a tensor [Ns, Hkv, 2, D] or a pair (k, v) of [Ns, Hkv, D]")
    return tuple(slow_kv)


MAX_SPLITS = 65535  # what a CUDA grid has room for


def check_attention(tensors: AttentionTensors, softmax_scale: float | None, num_splits: int) -> None:
    """Everything but data."""
    q, cu_slow, cu_text = tensors.q, tensors.cu_slow, tensors.cu_text
    checks.check_tensor("q", q, 3, "[rows, Hq, D]")
    checks.check_float("q", q)
    num_q_heads, head_dim = q.shape[1:]
    num_kv_heads = _check_slow_kv(tensors)
    checks.check_index("cu_slow", cu_slow, "[B + 1]", "q", q)
    checks.check_index("text_rows", tensors.text_rows, "[Nt]", "q", q)
    checks.check_index("cu_text", cu_text, "[B + 1]", "q", q)
    if num_kv_heads < 1 or num_q_heads < 1 or num_q_heads % num_kv_heads:
        checks.fail("q", q, f"a number of heads that is a multiple of slow_kv's {num_kv_heads}")
    if head_dim < 1:
        checks.fail("q", q, "a head dimension >= 1")
    if cu_slow.shape[0] < 1 or cu_slow.shape != cu_text.shape:
        checks.fail("cu_text", cu_text, f"as many entries as cu_slow, B + 1 >= 1 ({cu_slow.shape[0]})")
    if not 0 <= num_splits <= MAX_SPLITS:
        checks.fail("num_splits", num_splits, f"0 (automatic) to {MAX_SPLITS}")
    if softmax_scale is not None:
        checks.check_finite("softmax_scale", softmax_scale)
    for name in ("slow_begin", "slow_end"):
        if (x := getattr(tensors, name)) is not None:
            checks.check_index(name, x, "[Nt]", "q", q)
            if x.shape != tensors.text_rows.shape:
                checks.fail(name, x, f"shape [{tensors.text_rows.shape[0]}] (Nt of text_rows)")
    if (pieces := tensors.slow_pieces) is not None:
        checks.check_index("slow_pieces", pieces, "[P, 2]", "q", q, rank=2)
        if pieces.shape[1] != 2 or not pieces.is_contiguous():
            checks.fail("slow_pieces", pieces, "a contiguous tensor [P, 2], begin and end of each piece")


def _check_slow_kv(tensors: AttentionTensors) -> int:
    """Returns the number of KV heads."""
    q, slow_kv, head_dim = tensors.q, tensors.slow_kv, tensors.q.shape[2]
    if tensors.slow_values is not None:
        for name, x in (("slow_kv[0]", slow_kv), ("slow_kv[1]", tensors.slow_values)):
            checks.check_tensor(name, x, 3, "[Ns, Hkv, D]")
            checks.check_like(name, x, "q", q)
            if x.shape[2] != head_dim:
                checks.fail(name, x, f"shape [Ns, Hkv, {head_dim}] (D of q)")
        if tensors.slow_values.shape != slow_kv.shape:
            checks.fail("slow_kv[1]", tensors.slow_values, f"shape {list(slow_kv.shape)} (that of slow_kv[0])")
        return slow_kv.shape[1]
    checks.check_tensor("slow_kv", slow_kv, 4, "[Ns, Hkv, 2, D]")
    checks.check_like("slow_kv", slow_kv, "q", q)
    if slow_kv.shape[2] != 2 or slow_kv.shape[3] != head_dim:
        hint = "; .transpose(1, 2) makes it of [Ns, 2, Hkv, D]" if slow_kv.shape[1] == 2 != slow_kv.shape[2] else ""
        checks.fail("slow_kv", slow_kv, f"shape [Ns, Hkv, 2, {head_dim}] (K and V interleaved, D of q{hint})")
    return slow_kv.shape[1]


def attention_rules(tensors: AttentionTensors | FusedTensors) -> tuple[checks.DataRule, ...]:
    slow = ("slow tokens in slow_kv", tensors.slow_kv.shape[0])
    if tensors.slow_pieces is None:
        rules = (checks.DataRule("prefix_sums", "cu_slow", *slow),)
    else:
        num_pieces = tensors.slow_pieces.shape[0]
        pieces = checks.DataRule("prefix_sums", "cu_slow", "pieces in slow_pieces", num_pieces)
        rules = (pieces, checks.DataRule("pieces", "slow_pieces", *slow))
    return (
        *rules,
        checks.DataRule("prefix_sums", "cu_text", "entries of text_rows", tensors.text_rows.shape[0]),
        checks.DataRule("rows", "text_rows", "q", tensors.q.shape[0]),
    )


def pairs_of(shapes: AttentionTensors) -> int:
    """(text row, slow token) pairs that attend, of shapes alone: sequences are taken for even, of all slow tokens
    together, and their rows to see all of them. Ranges and pieces are data.
    """
    return flops.even_pairs(shapes.text_rows[0], shapes.slow_kv[0], shapes.cu_text[0] - 1)


def attention_facts(op: str, tensors: AttentionTensors, softmax_scale: float | None, *vectors: Tensor) -> OpCall:
    """``vectors``: further tensors that a kernel would read 16 bytes at a time."""
    q = tensors.q
    cache = (tensors.slow_kv,) if tensors.slow_values is None else (tensors.slow_kv, tensors.slow_values)
    return OpCall(
        op,
        q.device.type,
        q.dtype,
        compute_capability(q.device),
        head_dim=q.shape[2],
        aligned=all(map(is_aligned, (q, *cache, *vectors))),
        apart=tensors.slow_values is not None,
        positive_scale=scale_of(q, softmax_scale) > 0,
        has_sm90_kernels=q.device.type != "cuda" or "sm_90a" in _extension.cuda_archs(),
        backward_drawback=hopper_backward_drawback(
            tensors.text_rows.shape[0],
            tensors.slow_kv.shape[0],
            tensors.cu_text.shape[0] - 1,
            q.shape[1],
            tensors.slow_kv.shape[1],
            q.shape[2],
            in_pieces=tensors.slow_pieces is not None,
        ),
    )


class _Attention(Op):
    name = torch_name = "text_cross_attention"
    tensors, options = AttentionTensors, AttentionOptions
    returns = "(Tensor, Tensor)"
    differentiable = ("q", "slow_kv", "slow_values")
    has_gradient = saves = (0, 1)
    by_value = staticmethod(_by_value)

    def bind(self, given: dict[str, object]) -> tuple[AttentionTensors, AttentionOptions]:
        return super().bind(with_keys_and_values(given))

    def check(self, tensors: AttentionTensors, options: AttentionOptions) -> None:
        check_attention(tensors, options.softmax_scale, options.num_splits)

    def data_rules(self, tensors: AttentionTensors) -> tuple[checks.DataRule, ...]:
        return attention_rules(tensors)

    def facts(self, tensors: AttentionTensors, options: AttentionOptions) -> OpCall:
        return attention_facts(self.name, tensors, options.softmax_scale)

    def formula(self, tensors: AttentionTensors, options: AttentionOptions) -> tuple[Tensor, Tensor | None]:
        context, lse = eager.text_cross_attention(tensors, scale_of(tensors.q, options.softmax_scale))
        return context, lse if options.return_lse else None

    def fake(self, tensors: AttentionTensors, options: AttentionOptions) -> tuple[Tensor, Tensor]:
        q = tensors.q
        shape = (tensors.text_rows.shape[0], q.shape[1])
        lse = q.new_empty(shape if options.return_lse else 0, dtype=torch.float32)
        return q.new_empty(*shape, q.shape[2]), lse

    def run_backward(
        self, call: BackwardTensors, options: AttentionOptions, needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        if not options.return_lse:  # a call of the registered op that did not keep what this pass reads
            options = options._replace(return_lse=True)
            call = call._replace(grads=(call.grads[0], None), results=self.run(call.inputs, options))
        return super().run_backward(call, options, needs)

    def gradients(
        self, call: BackwardTensors, options: AttentionOptions, needs: tuple[bool, ...]
    ) -> eager.AttentionGradients:
        scale = scale_of(call.inputs.q, options.softmax_scale)
        return eager.text_cross_attention_backward(call.inputs, *call.grads, scale, needs)

    def flops(self, shapes: AttentionTensors, options: AttentionOptions) -> int:
        return flops.attention(pairs_of(shapes), *shapes.q[1:])

    def backward_flops(self, shapes: AttentionTensors, options: AttentionOptions) -> int:
        return flops.attention_backward(pairs_of(shapes), *shapes.q[1:])


_OP = _Attention()
