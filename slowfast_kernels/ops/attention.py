"""text_cross_attention: text rows attend the slow tokens of their own sequence, straight from the slow KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _extension, eager
from ..heuristics import OpCall
from . import checks
from .dispatch import (
    SignatureCache,
    backend_for,
    check_backend_name,
    compute_capability,
    needs_formula,
    refuse_tangents,
    requested_backend,
    run_op,
    signature,
)


def text_cross_attention(
    q: Tensor,
    slow_kv: Tensor,
    cu_slow: Tensor,
    text_rows: Tensor,
    cu_text: Tensor,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    num_splits: int = 0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softmax_scale * q K^T) V of each text row over its sequence's slow tokens; no causal mask, GQA.

    Args:
        q: queries of all rows [rows, Hq, D], after RoPE; float32, bfloat16 or float16. Only text rows are read.
        slow_kv: slow KV cache [Ns, Hkv, 2, D], K and V interleaved a head as ``cross_attn_kv_proj`` writes them.
        cu_slow: int32 [B + 1]; sequence b owns slow tokens cu_slow[b]..cu_slow[b + 1].
        text_rows: int32 [Nt], distinct rows of ``q``, grouped by sequence.
        cu_text: int32 [B + 1]; sequence b owns text_rows[cu_text[b]..cu_text[b + 1]].
        softmax_scale: factor on q K^T; default 1 / sqrt(D).
        return_lse: also return the log-sum-exp of the scaled scores.
        num_splits: parts that each sequence's slow tokens are split into; 0: chosen from shapes. A fixed number
            makes a sequence's result independent of the rest of the batch.
        backend: "cuda", "triton", "cpu", "eager", or None (automatic).

    Returns:
        context [Nt, Hq, D] in q's dtype, and with ``return_lse`` lse [Nt, Hq] float32 (natural logarithm).
        A sequence with no slow token gets context 0 and lse -inf.

    Raises:
        ValueError: a wrong shape, device or stride; on the CPU (on a GPU under SLOWFAST_DEBUG=1) also prefix sums
            that do not match and row indices out of range or repeated.
        TypeError: a wrong dtype.
        NotImplementedError: the backend asked for cannot run this call.
    """
    softmax_scale = None if softmax_scale is None else checks.as_float("softmax_scale", softmax_scale)
    return_lse = checks.as_bool("return_lse", return_lse)
    num_splits = checks.as_int("num_splits", num_splits)
    check_backend_name(backend)
    tensors = (q, slow_kv, cu_slow, text_rows, cu_text)
    if needs_formula(*tensors):
        scale = check_attention(*tensors, softmax_scale, num_splits)
        check_attention_data(*tensors)
        context, lse = eager.text_cross_attention(*tensors, scale, return_lse, num_splits)
    else:
        options = (softmax_scale, return_lse, num_splits, backend)
        context, lse = run_op(torch.ops.slowfast.text_cross_attention, _run, _check, tensors, *options)
    return (context, lse) if return_lse else context


MAX_SPLITS = 65535  # what a CUDA grid has room for


def check_attention(q, slow_kv, cu_slow, text_rows, cu_text, softmax_scale, num_splits) -> float:
    """Everything but data; returns the softmax scale."""
    checks.check_tensor("q", q, 3, "[rows, Hq, D]")
    checks.check_float("q", q)
    checks.check_tensor("slow_kv", slow_kv, 4, "[Ns, Hkv, 2, D]")
    checks.check_like("slow_kv", slow_kv, "q", q)
    checks.check_index("cu_slow", cu_slow, "[B + 1]", "q", q)
    checks.check_index("text_rows", text_rows, "[Nt]", "q", q)
    checks.check_index("cu_text", cu_text, "[B + 1]", "q", q)
    num_q_heads, head_dim = q.shape[1:]
    if slow_kv.shape[2] != 2 or slow_kv.shape[3] != head_dim:
        checks.fail("slow_kv", slow_kv, f"shape [Ns, Hkv, 2, {head_dim}] (K and V interleaved, D of q)")
    num_kv_heads = slow_kv.shape[1]
    if num_kv_heads < 1 or num_q_heads < 1 or num_q_heads % num_kv_heads:
        checks.fail("q", q, f"a number of heads that is a multiple of slow_kv's {num_kv_heads}")
    if head_dim < 1:
        checks.fail("q", q, "a head dimension >= 1")
    if cu_slow.shape[0] < 1 or cu_slow.shape != cu_text.shape:
        checks.fail("cu_text", cu_text, f"as many entries as cu_slow, B + 1 >= 1 ({cu_slow.shape[0]})")
    if not 0 <= num_splits <= MAX_SPLITS:
        checks.fail("num_splits", num_splits, f"0 (automatic) to {MAX_SPLITS}")
    if softmax_scale is None:
        return head_dim**-0.5
    checks.check_finite("softmax_scale", softmax_scale)
    return softmax_scale


def _check(q, slow_kv, cu_slow, text_rows, cu_text, softmax_scale, return_lse, num_splits, backend) -> None:
    check_attention(q, slow_kv, cu_slow, text_rows, cu_text, softmax_scale, num_splits)


def check_attention_data(q, slow_kv, cu_slow, text_rows, cu_text) -> None:
    if checks.reads_device_data(q):
        checks.check_prefix_sums("cu_slow", cu_slow, "slow tokens in slow_kv", slow_kv.shape[0])
        checks.check_prefix_sums("cu_text", cu_text, "entries of text_rows", text_rows.shape[0])
        checks.check_rows("text_rows", text_rows, "q", q.shape[0])


def attention_call(
    op: str, q: Tensor, slow_kv: Tensor, text_rows: Tensor, batch: int, softmax_scale: float, *vectors: Tensor
) -> OpCall:
    """``vectors``: further tensors that a kernel would read 16 bytes at a time."""
    return OpCall(
        op,
        q.device.type,
        q.dtype,
        compute_capability(q.device),
        head_dim=q.shape[2],
        num_q_heads=q.shape[1],
        num_kv_heads=slow_kv.shape[1],
        num_text=text_rows.shape[0],
        num_slow=slow_kv.shape[0],
        batch=batch,
        aligned=all(map(_is_aligned, (q, slow_kv, *vectors))),
        positive_scale=softmax_scale > 0,
        has_sm90_kernels=q.device.type != "cuda" or "sm_90a" in _extension.cuda_archs(),
    )


def addresses_aligned(*tensors: Tensor) -> bool:
    """16-byte base addresses: the one thing besides a signature that dispatch looks at."""
    try:
        return all(x.data_ptr() % 16 == 0 for x in tensors)
    except (AttributeError, TypeError, RuntimeError):  # no tensor, or one without an address: the checks say so
        return False


def _is_aligned(x: Tensor) -> bool:
    """16-byte rows, as TMA and vector loads need them."""
    unit = 16 // x.element_size()
    return addresses_aligned(x) and all(s > 0 and s % unit == 0 for s in x.stride()[:-1])


_signatures = SignatureCache()


def _run(
    q: Tensor,
    slow_kv: Tensor,
    cu_slow: Tensor,
    text_rows: Tensor,
    cu_text: Tensor,
    softmax_scale: float | None,
    return_lse: bool,
    num_splits: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    tensors = (q, slow_kv, cu_slow, text_rows, cu_text)
    refuse_tangents(*tensors)
    options = (softmax_scale, num_splits, requested_backend(backend), addresses_aligned(q, slow_kv))
    key = (signature(*tensors), options)
    found = _signatures.get(key)
    if found is None:
        scale = check_attention(*tensors, softmax_scale, num_splits)
        call = attention_call("text_cross_attention", q, slow_kv, text_rows, cu_text.shape[0] - 1, scale)
        found = _signatures.remember(key, (scale, backend_for(call, q.device, backend)))
    scale, module = found
    check_attention_data(*tensors)
    context, lse = module.text_cross_attention(q, slow_kv, cu_slow, text_rows, cu_text, scale, return_lse, num_splits)
    return context, q.new_empty(0, dtype=torch.float32) if lse is None else lse


_attention_op = torch.library.custom_op("slowfast::text_cross_attention", _run, mutates_args=())


@_attention_op.register_fake
def _attention_fake(q, slow_kv, cu_slow, text_rows, cu_text, softmax_scale, return_lse, num_splits, backend):
    check_attention(q, slow_kv, cu_slow, text_rows, cu_text, softmax_scale, num_splits)
    shape = (text_rows.shape[0], q.shape[1])
    lse = q.new_empty(shape if return_lse else 0, dtype=torch.float32)
    return q.new_empty(*shape, q.shape[2]), lse


@torch.library.custom_op("slowfast::text_cross_attention_backward", mutates_args=())
def _attention_backward_op(
    grad_context: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    slow_kv: Tensor,
    cu_slow: Tensor,
    text_rows: Tensor,
    cu_text: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    refuse_tangents(grad_context, grad_lse, q, slow_kv)
    return eager.text_cross_attention_backward(
        grad_context, grad_lse, q, slow_kv, cu_slow, text_rows, cu_text, softmax_scale
    )


@_attention_backward_op.register_fake
def _(grad_context, grad_lse, q, slow_kv, cu_slow, text_rows, cu_text, softmax_scale):
    return q.new_empty(q.shape), slow_kv.new_empty(slow_kv.shape)


def _setup_context(ctx, inputs, output):
    q, slow_kv, cu_slow, text_rows, cu_text, softmax_scale, ctx.return_lse, _, _ = inputs
    ctx.softmax_scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    ctx.save_for_backward(q, slow_kv, cu_slow, text_rows, cu_text)


def _backward(ctx, grad_context, grad_lse):
    grad_lse = grad_lse if ctx.return_lse else None
    grads = torch.ops.slowfast.text_cross_attention_backward(
        grad_context, grad_lse, *ctx.saved_tensors, ctx.softmax_scale
    )
    return *grads, *[None] * 7


_attention_op.register_autograd(_backward, setup_context=_setup_context)
