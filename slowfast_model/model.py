"""SlowFastForCausalLM: a Qwen2 decoder whose hybrid layers attend uncompressed slow tokens (arXiv 2504.01328).

Module names are the released checkpoint's, so state dicts load by their own keys. Nothing of a call is kept on layers:
what they attend travels as an argument. Inference normalises the slow tokens once, while pooling, for all hybrid
layers; training keeps norm and projection apart, for their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
import torch.utils.checkpoint as recomputation
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from slowfast_kernels.dtypes import KERNEL_DTYPES
from slowfast_kernels.heuristics.backends import BACKENDS
from slowfast_kernels.ops.checks import check_dense

from . import checkpoint
from .attention import DecoderLayer, project_slow_at_once
from .cache import KVCache, SlowContext
from .config import SlowFastConfig
from .generate import GenerationMixin
from .kernels import fuses
from .layers import RMSNorm, Rope, compute_dtype, first_rope, weights_dtype, without_autocast
from .plain import is_plain
from .tokens import IGNORE_INDEX, Layout, Prompts, splice
from .vision import build_projector, check_features, project_and_pool


@dataclass
class SlowFastOutput:
    """logits [B, L', V] and, on the same expanded, right-padded rows, what they belong to.

    A pytree node: wrappers that look for the tensors of an output, as DistributedDataParallel's and FSDP's hooks do,
    find them.
    """

    logits: Tensor
    loss: Tensor | None
    attention_mask: Tensor  # [B, L'] bool
    token_types: Tensor  # [B, L'] 1 prompt, 2 response, 3 visual, 4 padding
    labels: Tensor | None  # [B, L']


pytree.register_pytree_node(
    SlowFastOutput,
    lambda output: ([getattr(output, field.name) for field in fields(output)], None),
    lambda values, _: SlowFastOutput(*values),
    serialized_type_name="slowfast_model.SlowFastOutput",
)


class Decoder(nn.Module):
    """Embedding, decoder layers, final norm, and the projector, under the official name ``model``."""

    def __init__(self, config: SlowFastConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.mm_hidden_size is not None:
            self.mm_projector = build_projector(config)
        self.gradient_checkpointing = False

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        slow: SlowContext | None,
        cache: KVCache | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """x [B, L, C] embeddings -> hidden states after the final norm."""
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled() and cache is None
        caches = [None] * len(self.layers) if cache is None else cache.layers
        made = [None] * len(self.layers)
        fused_on = x.device.type if fuses(x, backend) else None
        if slow is not None and slow.tokens is not None and slow.tokens_are_normalised:
            made = project_slow_at_once(self.layers, slow.tokens, fused=fused_on == slow.tokens.device.type)
        for layer, layer_cache, slow_kv in zip(self.layers, caches, made, strict=True):
            fused = fused_on == x.device.type and is_plain(layer, DecoderLayer)
            mine = slow if slow_kv is None else replace(slow, tokens=None, kv=slow_kv)
            arguments = (x, rope, mine, layer_cache, backend)
            if recompute:
                x = recomputation.checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments, **({"fused": True} if fused else {}))
        return self.norm(x)


class SlowFastForCausalLM(GenerationMixin, nn.Module):
    """The whole model of arXiv 2504.01328 (``LlavaQwenSlowFastForCausalLM`` of the release), with random weights.

    Args:
        config: its shapes and variants.
        backend: the kernels of every layer ("cuda", "triton", "cpu", "eager": plain PyTorch); None chooses per call. An
            attribute too, which may be changed between calls.

    Raises:
        TypeError: ``config`` is no SlowFastConfig.
        ValueError: a ``backend`` that does not exist.
    """

    def __init__(self, config: SlowFastConfig, *, backend: str | None = None) -> None:
        if not isinstance(config, SlowFastConfig):
            raise TypeError(
                f"config: got {type(config).__name__}, want a SlowFastConfig "
                "(SlowFastConfig.from_official makes one of what a config.json holds)"
            )
        super().__init__()
        self.config = config
        self.backend = backend
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._initialise)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def backend(self) -> str | None:
        return self._backend

    @backend.setter
    def backend(self, name: str | None) -> None:
        if name is not None and name not in BACKENDS:
            raise ValueError(f"backend: got {name!r}, want one of {', '.join(BACKENDS)} or None (automatic)")
        self._backend = name

    def gradient_checkpointing_enable(self) -> None:
        """Recompute every layer in the backward pass (in training mode) instead of keeping its activations.

        Memory of one layer's activations instead of all, for one more forward pass; the same gradients.

        >>> model.gradient_checkpointing_enable()
        >>> model.train()(input_ids, [features], labels=input_ids).loss.backward()
        """
        self.model.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.model.gradient_checkpointing = False

    # -------------------------------------------------------------------------------------- inputs

    def prepare(
        self,
        input_ids: Tensor,
        frame_features: Sequence[Tensor] | None,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        *,
        run_every_module: bool = False,
        held: Sequence[int] | None = None,
    ) -> tuple[Tensor, Layout, SlowContext | None]:
        """Embeddings [B, L', C] with fast tokens spliced in, the layout, and the slow tokens (None: none attended).

        ``input_ids``, ``frame_features``, ``attention_mask`` and ``labels`` are those of ``forward``.

        ``run_every_module``: text alone has no slow and fast tokens instead of no video, so that every module still
        runs, in the order of a batch with videos. So every parameter gets a gradient (zeros), and the ranks of a
        data-parallel job, which gather weights as modules run, agree.

        ``held``: the prompts go on from ones with so many slow tokens a sample; the layout's ``slow_end`` counts from
        there. The context has what is new alone.
        """
        normalise = not torch.is_grad_enabled() and self._folds_norms()
        videos = [] if frame_features is None else frame_features
        device = self._check_inputs(input_ids, videos)
        # Before the projector is queued, which their way then overlaps with.
        prompts = Prompts(input_ids, attention_mask, labels, device)
        slow, fast, counts = None, None, []
        if videos:
            slow, fast, counts = self._slow_and_fast(videos, self.config.rms_norm_eps if normalise else None)
        elif run_every_module:
            slow = fast = self._no_tokens(device)
        layout = splice(
            prompts,
            counts,
            vocab_size=self.config.vocab_size,
            every_row=self.config.updates_every_row,
            mask_system=self.config.masks_system_text,
            causal=self.config.causal_slow_tokens,
            held=held,
        )
        text = self.model.embed_tokens(layout.text_ids)
        parts = [text] if fast is None else [text, fast]
        if min(layout.lengths) < layout.source.shape[1]:  # which is padding's row
            parts.append(text.new_zeros(1, text.shape[1]))
        with without_autocast(text.device):  # in which tensors of the other half type are not put together
            rows = torch.cat(parts)
        context = None
        if self.config.hybrid_layers and slow is not None:
            context = SlowContext(
                layout.cu_slow,
                layout.text_rows,
                layout.cu_text,
                tokens=slow,
                tokens_are_normalised=normalise,
                slow_end=layout.slow_end,
            )
        return F.embedding(layout.source, rows), layout, context

    def _check_inputs(self, input_ids: Tensor, frame_features: Sequence[Tensor]) -> torch.device:
        """Features are where the weights are, and in their dtype; ids too, or on the CPU; values are ``splice``'s.

        Returns where the model computes.
        """
        check_dense("input_ids", input_ids, "[B, L]")
        device, dtypes = input_ids.device, (weights_dtype(self),)
        weight = next(self.model.embed_tokens.parameters(), None)
        if weight is not None and type(weight) not in (Tensor, nn.Parameter):
            dtypes = KERNEL_DTYPES  # sharded: not yet what it computes with, so the model casts them itself
        elif weight is not None and not weight.is_meta:  # on meta: offloaded
            device = weight.device
        if compute_dtype(dtypes[0], device) != dtypes[0]:
            dtypes = KERNEL_DTYPES  # autocast
        if input_ids.device not in (device, torch.device("cpu")):
            raise ValueError(
                f"input_ids: got a tensor on {input_ids.device}, want {device} (the model's device) or the CPU"
            )
        check_features(frame_features, self.config.mm_hidden_size, dtypes, device)
        return device

    def _folds_norms(self) -> bool:
        """Whether one normalisation of the slow tokens serves hybrid layers, and all. A wrapper that hides one: no."""
        hybrid = [self.model.layers[i] for i in self.config.hybrid_layers]
        return bool(hybrid) and all(getattr(layer, "folds_norm", False) for layer in hybrid)

    def _slow_and_fast(self, frame_features: Sequence[Tensor], norm_eps: float | None):
        """Slow [Ns, C] and fast [Nf, C] tokens and the (fast, slow) counts of each video."""
        return project_and_pool(self.model.mm_projector, frame_features, self.config, norm_eps, self.backend)

    def _no_tokens(self, device: torch.device) -> Tensor:
        """The projector's [0, C]."""
        width = self.config.mm_hidden_size
        if width is None:
            return torch.zeros(0, self.config.hidden_size, dtype=weights_dtype(self), device=device)
        dtype = weights_dtype(self.model.mm_projector, self)
        return self.model.mm_projector(torch.zeros(0, width, dtype=dtype, device=device))

    def rope(self, length: int, x: Tensor) -> Rope:
        """Rotary tables at positions 0..length - 1, in the type that the layers compute in, given embeddings ``x``."""
        dtype = compute_dtype(x.dtype, x.device)
        return first_rope(length, self.config.head_dim, self.config.rope_theta, dtype, x.device)

    # -------------------------------------------------------------------------------------- calls

    def _start(self, *inputs) -> tuple[Tensor, Rope, Layout, SlowContext | None]:
        """What comes before the layers: Python over lengths, and tables that are the same bits in every run."""
        training = self.training and torch.is_grad_enabled()
        x, layout, slow = self.prepare(*inputs, run_every_module=training)
        return x, self.rope(x.shape[1], x), layout, slow

    # The one graph break of torch.compile(model), on purpose: a batch is laid out by its values. This form of
    # torch.compiler.disable, which torch's optimizers use, does not import the compiler (seconds) before it is needed.
    _start_uncompiled = _disable_dynamo(_start)

    def forward(
        self,
        input_ids: Tensor,
        frame_features: Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SlowFastOutput:
        """Logits and loss of a batch of prompts.

        In training mode every trainable parameter takes part in every batch: what text alone does not reach gets a
        gradient of zeros.

        Args:
            input_ids: [B, L] int64 or int32, on the model's device or on the CPU; -200 stands for a video (or an image:
                a video of one frame). They are laid out on the host: those of a GPU come in a copy that overlaps with
                the projector and the pooling.
            frame_features: vision features before the projector, [T, H*W, mm_hidden] of each video, in the model's
                dtype, in reading order over the batch; grids may differ between videos. None or []: text alone.
            attention_mask: [B, L] bool or integers, 1 on tokens and 0 on padding, on either side.
            labels: [B, L] int64 or int32 token ids, -100 where there is no target.

        >>> labels = torch.tensor([[-100, -100, -100, 3, 4]])  # the answer alone
        >>> output = model(input_ids, [features], labels=labels)
        >>> output.logits.shape  # 4 text rows and 2 fast frames of 2 x 2 tokens
        torch.Size([1, 12, 100])
        >>> output.token_types.tolist()
        [[1, 1, 3, 3, 3, 3, 3, 3, 3, 3, 2, 2]]
        >>> output.loss.backward()

        Returns:
            SlowFastOutput; rows are the expanded prompts, right-padded. ``loss`` is the mean cross-entropy of the next
            token over the targets (0 if there is none), None without labels.

        Raises:
            ValueError, TypeError: as ``tokens.splice`` and ``vision.check_features`` say.
        """
        start = self._start_uncompiled if torch.compiler.is_compiling() else self._start
        x, rope, layout, slow = start(input_ids, frame_features, attention_mask, labels)
        logits = self.lm_head(self.model(x, rope, slow, backend=self.backend))
        loss = None if labels is None else self._loss(logits, layout.labels)
        return SlowFastOutput(logits, loss, layout.attention_mask, layout.token_types, layout.labels)

    @staticmethod
    def _loss(logits: Tensor, labels: Tensor) -> Tensor:
        targets = labels[:, 1:].flatten()
        predictions = logits[:, :-1].flatten(0, 1).float()
        total = F.cross_entropy(predictions, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        return total / (targets != IGNORE_INDEX).sum().clamp(min=1)

    # -------------------------------------------------------------------------------------- weights

    def load_official_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a released checkpoint's ``state_dict`` by its own keys. See ``checkpoint.load_official_state_dict``.

        Raises:
            ValueError, TypeError: keys or tensors that do not fit, by name. Nothing is loaded then.
        """
        checkpoint.load_official_state_dict(self, state_dict)

    def load_qwen2_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a Qwen2 language model's ``state_dict`` and start the slow path from it.

        The model then computes what the language model does, until training opens the warm-up gates. See
        ``checkpoint.load_qwen2_state_dict``.

        >>> from transformers import Qwen2Config, Qwen2ForCausalLM
        >>> language_model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
        >>> model.load_qwen2_state_dict(language_model.state_dict())
        >>> text = torch.tensor([[1, 2, 3]])
        >>> torch.allclose(model(text).logits, language_model.eval()(text).logits, atol=1e-4)
        True

        Raises:
            ValueError, TypeError: keys or tensors that do not fit, by name. Nothing is loaded then.
        """
        checkpoint.load_qwen2_state_dict(self, state_dict)

    @classmethod
    def from_pretrained(cls, directory: str | PathLike, **options) -> SlowFastForCausalLM:
        """A model from a ``directory`` with config.json and safetensors, released, Qwen2's or saved by this package.

        ``options``: ``device`` ("cpu"), ``dtype`` (None: that of the tensors, "auto": that of config.json, or one to
        cast to) and the constructor's. See ``checkpoint.from_pretrained``.

        >>> model.save_pretrained("saved")
        >>> again = SlowFastForCausalLM.from_pretrained("saved", dtype="bfloat16")
        >>> again.lm_head.weight.dtype, again.config == config
        (torch.bfloat16, True)

        Raises:
            FileNotFoundError, NotADirectoryError: nothing to read there.
            ValueError, TypeError: what is there does not fit, by file and key.
        """
        return checkpoint.from_pretrained(cls, directory, **options)

    def save_pretrained(self, directory: str | PathLike, *, max_shard_size: int | str = "5GB") -> None:
        """Write what ``from_pretrained`` reads into ``directory``, in files of at most ``max_shard_size``.

        See ``checkpoint.save_pretrained``.

        >>> import os
        >>> model.save_pretrained("in shards", max_shard_size="20KB")
        >>> sorted(name for name in os.listdir("in shards") if name.endswith(".json"))
        ['config.json', 'model.safetensors.index.json']

        Raises:
            ValueError, TypeError: a model that is not all there or has other parameters, or a wrong size.
            NotADirectoryError: ``directory`` is a file.
        """
        checkpoint.save_pretrained(self, directory, max_shard_size=max_shard_size)
