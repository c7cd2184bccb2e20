"""text_cross_attention: text rows attend the slow tokens of their own sequence, straight from the slow KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _extension, eager
from ..calls import AttentionOptions, AttentionTensors, scale_of
from ..heuristics import OpCall
from . import checks
from .dispatch import check_backend_name, compute_capability
from .op import Op


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
    tensors = AttentionTensors(q, slow_kv, cu_slow, text_rows, cu_text)
    context, lse = _OP(tensors, AttentionOptions(softmax_scale, return_lse, num_splits, backend))
    return (context, lse) if return_lse else context


MAX_SPLITS = 65535  # what a CUDA grid has room for


def check_attention(tensors: AttentionTensors, softmax_scale: float | None, num_splits: int) -> None:
    """Everything but data."""
    q, slow_kv, cu_slow, text_rows, cu_text = tensors
    checks.check_tensor("q", q, 3, "[rows, Hq, D]")
    checks.check_float("q", q)
    checks.check_tensor("slow_kv", slow_kv, 4, "[Ns, Hkv, 2, D]")
    checks.check_like("slow_kv", slow_kv, "q", q)
    checks.check_index("cu_slow", cu_slow, "[B + 1]", "q", q)
    checks.check_index("text_rows", text_rows, "[Nt]", "q", q)
    checks.check_index("cu_text", cu_text, "[B + 1]", "q", q)
    num_q_heads, head_dim = q.shape[1:]
    if slow_kv.shape[2] != 2 or slow_kv.shape[3] != head_dim:
        hint = "; .transpose(1, 2) makes it of [Ns, 2, Hkv, D]" if slow_kv.shape[1] == 2 != slow_kv.shape[2] else ""
        checks.fail("slow_kv", slow_kv, f"shape [Ns, Hkv, 2, {head_dim}] (K and V interleaved, D of q{hint})")
    num_kv_heads = slow_kv.shape[1]
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


def check_attention_data(tensors: AttentionTensors) -> None:
    q, slow_kv, cu_slow, text_rows, cu_text = tensors
    if checks.reads_device_data(q):
        checks.check_prefix_sums("cu_slow", cu_slow, "slow tokens in slow_kv", slow_kv.shape[0])
        checks.check_prefix_sums("cu_text", cu_text, "entries of text_rows", text_rows.shape[0])
        checks.check_rows("text_rows", text_rows, "q", q.shape[0])


def attention_facts(op: str, tensors: AttentionTensors, softmax_scale: float | None, *vectors: Tensor) -> OpCall:
    """``vectors``: further tensors that a kernel would read 16 bytes at a time."""
    q = tensors.q
    return OpCall(
        op,
        q.device.type,
        q.dtype,
        compute_capability(q.device),
        head_dim=q.shape[2],
        aligned=all(map(_is_aligned, (q, tensors.slow_kv, *vectors))),
        positive_scale=scale_of(q, softmax_scale) > 0,
        has_sm90_kernels=q.device.type != "cuda" or "sm_90a" in _extension.cuda_archs(),
    )


def _is_aligned(x: Tensor) -> bool:
    """16-byte rows and base address, as TMA and vector loads need them."""
    unit = 16 // x.element_size()
    return x.data_ptr() % 16 == 0 and all(s > 0 and s % unit == 0 for s in x.stride()[:-1])


class _Attention(Op):
    name = torch_name = "text_cross_attention"
    tensors, options = AttentionTensors, AttentionOptions
    returns = "(Tensor, Tensor)"
    differentiable = ("q", "slow_kv")
    has_gradient = (0, 1)

    def check(self, tensors: AttentionTensors, options: AttentionOptions) -> None:
        check_attention(tensors, options.softmax_scale, options.num_splits)

    def check_data(self, tensors: AttentionTensors) -> None:
        check_attention_data(tensors)

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

    def gradients(self, grads, tensors: AttentionTensors, options: AttentionOptions) -> tuple[Tensor, Tensor]:
        grad_context, grad_lse = grads
        scale = scale_of(tensors.q, options.softmax_scale)
        return eager.text_cross_attention_backward(
            grad_context, grad_lse if options.return_lse else None, tensors, scale
        )


_OP = _Attention()
