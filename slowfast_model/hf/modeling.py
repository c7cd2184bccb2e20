"""SlowFastVLForConditionalGeneration: any decoder-only language model of transformers, with slow and fast video tokens.

The language model is whole and its own: it is called with embeddings in which fast tokens stand at their placeholders,
and with what its hybrid layers read as a keyword argument (``videos.SlowReading``). Logits, loss, caches and outputs
are what it makes of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from slowfast_kernels.ops.checks import check_dense

from ..config import SlowFastConfig
from ..vision import PatchTower, build_projector, check_features, encode_frames, project_and_pool
from ._versions import CACHE, writing_renames
from .attention import HybridAttention, device_of, make_hybrid, warn_where_gates_stay_closed
from .config import SLOW_FAST_KEYS, SlowFastVLConfig
from .generation import VideoGeneration
from .released import is_released, load_released
from .towers import build_tower
from .videos import (
    Counting,
    DynamicVideoCache,
    HeldVideos,
    Keeper,
    NewVideos,
    SlowReading,
    cached_length,
    carry_videos,
    fix_addresses,
    held_by,
    packed,
    ranges,
)

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _HandOn(torch.autograd.Function):
    """``embeddings``, unchanged; its backward pass, the last below layer 0, hands ``tokens`` the gradient of ``leaf``.

    Reentrant checkpointing drops gradients of tensors that a layer takes in an object; but they add up in a leaf.
    """

    @staticmethod
    def forward(ctx, embeddings: Tensor, tokens: Tensor, leaf: Tensor) -> Tensor:
        ctx.leaf = leaf
        return embeddings.view_as(embeddings)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        of_tokens, ctx.leaf.grad = ctx.leaf.grad, None
        return gradient, of_tokens, None


class SlowFastVLForConditionalGeneration(VideoGeneration, PreTrainedModel, GenerationMixin):
    """A language model of transformers whose hybrid layers attend uncompressed slow tokens (arXiv 2504.01328).

    ``add_slow_fast`` makes one of a language model; ``from_pretrained`` reads what ``save_pretrained`` wrote.
    ``generate`` is transformers' own, in all of its modes.

    Args:
        config: its configuration.
        language_model: one to take over, of ``config.text_config``; None: a new one with random weights.
        vision_tower: one to take over; None: that of ``config.vision_tower``, if there is one.
    """

    config_class = SlowFastVLConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"
    input_modalities = ("video", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ("past_key_values", "cache")

    def __init__(
        self,
        config: SlowFastVLConfig,
        language_model: PreTrainedModel | None = None,
        vision_tower: nn.Module | None = None,
    ) -> None:
        super().__init__(config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        else:
            for module in language_model.modules():
                module._is_hf_initialized = True  # or transformers would initialise it again
        config.text_config = language_model.config
        self.language_model = language_model
        self.vocab_size = language_model.config.vocab_size
        device = device_of(language_model.get_input_embeddings())
        # Not the default device. 4.57 makes parameters on meta, and buffers, which no checkpoint holds, elsewhere.
        place = nullcontext() if device.type == "meta" else device
        if vision_tower is None and config.vision_tower is not None:
            with place:
                vision_tower = build_tower(config.vision_tower)
        if vision_tower is not None:  # no attribute without a tower, as tools look for one
            self.vision_tower = vision_tower
        slow_fast = config.slow_fast()
        with place:
            self.mm_projector = build_projector(slow_fast) if config.mm_hidden_size is not None else None
        if self.mm_projector is not None:
            self.mm_projector.to(device=device, dtype=self.get_input_embeddings().weight.dtype)
        layers = self.get_decoder().layers
        for index in config.hybrid_layers:
            make_hybrid(layers[index], slow_fast)
        self._embedding_factor = embedding_factor(language_model)
        self._has_looked_at_gates = False
        self._no_split_modules = list(language_model._no_split_modules or [])
        if vision_tower is not None:
            self._no_split_modules.append(type(vision_tower).__name__)
        if isinstance(language_model._tied_weights_keys, list):  # 4.57; later the language model's own are found
            self._tied_weights_keys = [f"language_model.{key}" for key in language_model._tied_weights_keys]
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, vision_tower=None, **kwargs):
        """What ``save_pretrained`` wrote, as transformers'; or a released checkpoint (``llava_qwen_slow_fast``).

        A released one is read whole, with its tower, in float16 where no ``dtype`` is named. Its vocabulary becomes the
        tokenizer's, if that lies beside it, and one token more: ``config.video_token_id``.

        Args:
            pretrained_model_name_or_path: a directory.
            args, kwargs: as transformers': ``dtype``, ``device_map``, ``attn_implementation`` and more.
            vision_tower: of a released checkpoint alone. None: as its config.json says. A directory: the SigLIP or CLIP
                to take the sizes from, and the weights where the checkpoint has none. (name, settings), of
                ``towers.TOWERS``. False: no tower, ``video_features`` are given.

        Raises:
            ValueError: a checkpoint with some of the weights that ``add_slow_fast`` adds (with none they start anew,
                closed). Of a released checkpoint: keys that are missing, that nothing reads, or of another shape, all
                by name; a tower that is not known or has no weights; a configuration that is not implemented.
            TypeError: a ``vision_tower`` of another type.
        """
        if is_released(pretrained_model_name_or_path):
            return load_released(cls, pretrained_model_name_or_path, vision_tower, **kwargs)
        if vision_tower is not None:
            raise TypeError("vision_tower: got one for a checkpoint that is not a released one, which has its own")
        wants_report = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        added = model.added_weights()
        missing = sorted(added & set(report["missing_keys"]))
        if missing and (len(missing) < len(added) or any("cross_attn_" in key for key in report["unexpected_keys"])):
            raise ValueError(
                f"pretrained_model_name_or_path: got a checkpoint without {', '.join(missing)}, want all weights that "
                "add_slow_fast added, or none, which starts them anew with closed gates"
            )
        return (model, report) if wants_report else model

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As transformers'; ``save_original_format`` is False where that format has no names for what was added."""
        if kwargs.get("save_original_format", True) and writing_renames(self, self.added_weights()):
            kwargs["save_original_format"] = False
        super().save_pretrained(save_directory, *args, **kwargs)

    def is_custom_code(self) -> bool:
        """As the language model: what that derives from its configuration, which no checkpoint holds, is derived again.

        transformers initialises no module of custom code that has no weights of its own.
        """
        return self.language_model.is_custom_code()

    def added_weights(self) -> set[str]:
        """Names of the parameters that the language model did not have, but for the tower's."""
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if "cross_attn_" in name or name.startswith("mm_projector.")}

    # -------------------------------------------------------------------------------------- what is inside

    def hybrid_attentions(self) -> list[HybridAttention]:
        """The attention modules of the hybrid layers, in order."""
        layers = self.get_decoder().layers  # which transformers searches for
        return [layers[index].self_attn for index in self.config.hybrid_layers]

    def get_decoder(self, *args, **kwargs) -> nn.Module:
        """The language model's stack of layers."""
        return self.language_model.get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """As transformers'; the vocabulary is the language model's."""
        embeddings = self.language_model.resize_token_embeddings(*args, **kwargs)
        self.vocab_size = self.config.text_config.vocab_size = embeddings.num_embeddings
        return embeddings

    @property
    def slow_fast(self) -> SlowFastConfig:
        """How videos are read, as the configuration says now."""
        own = vars(self.config)  # a configuration's own lookup of a name takes longer
        says = [own[key] for key in SLOW_FAST_KEYS]
        read = self.__dict__.get("_slow_fast_read")
        if read is None or read[0] != says:
            read = self.__dict__["_slow_fast_read"] = (says, self.config.slow_fast())
        return read[1]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PatchTower):
            nn.init.normal_(module.position, std=0.02)
        if "position_ids" in module._buffers:  # of SigLIP's and CLIP's embeddings: no checkpoint holds them
            places = module.position_ids
            places.copy_(torch.arange(places.shape[-1], device=places.device))

    def initialize_weights(self) -> None:
        """As transformers'; a warm-up gate that a checkpoint did not have starts at 0."""
        gates = [(a, a.cross_attn_warm_up_gate) for a in self.hybrid_attentions()]
        new = [g for a, g in gates if g is not None and not _is_initialised(a) and not _is_initialised(g)]
        super().initialize_weights()
        with torch.no_grad():
            for gate in new:
                gate.zero_()

    # ------------------------------------------------------------------------------------ recomputation

    def _with_default(self, options: dict | None) -> dict:
        return {"use_reentrant": False} | (options or {})

    if hasattr(PreTrainedModel, "activation_checkpointing_enable"):

        def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs):
            """As transformers', without reentrance unless it is asked for."""
            options = self._with_default(activation_checkpointing_kwargs)
            return super().activation_checkpointing_enable(activation_checkpointing_kwargs=options, **kwargs)

    else:

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None):
            """As transformers', without reentrance unless it is asked for."""
            options = self._with_default(gradient_checkpointing_kwargs)
            return super().gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    def _recomputes(self) -> bool:
        if not self.training:
            return False
        decoder = self.get_decoder()
        return any(getattr(module, "gradient_checkpointing", False) for module in (decoder.layers[0], decoder))

    def _is_reentrant(self) -> bool:
        function = getattr(self.get_decoder().layers[0], "_gradient_checkpointing_func", None)
        return getattr(function, "keywords", {}).get("use_reentrant", False)

    # ------------------------------------------------------------------------------------------- inputs

    def encode_videos(self, pixel_values_videos: Sequence[Tensor] | Tensor) -> list[Tensor]:
        """``video_features``, by the model's tower, of ``pixel_values_videos``: uint8 [T, height, width, 3] a video.

        Raises:
            ValueError: ``pixel_values_videos`` for a model without a tower; as ``encode_frames``.
        """
        if not hasattr(self, "vision_tower"):
            raise ValueError("pixel_values_videos: got frames, want video_features: the model has no vision tower")
        return [encode_frames(self.vision_tower, frames) for frames in pixel_values_videos]

    def _as_features(self, video_features, pixel_values_videos) -> list[Tensor]:
        if pixel_values_videos is not None:
            if video_features is not None:
                raise ValueError("pixel_values_videos: got frames beside video_features, want one of them")
            video_features = self.encode_videos(pixel_values_videos)
        if isinstance(video_features, Tensor):
            if video_features.dim() != 4:
                width, shape = self.config.mm_hidden_size, list(video_features.shape)
                raise ValueError(f"video_features: got shape {shape}, want [V, T, H*W, {width}] or a list of videos")
            video_features = list(video_features.unbind())
        features = [] if video_features is None else video_features
        if not torch.compiler.is_compiling():
            check_features(features, self.config.mm_hidden_size, FEATURE_DTYPES, None, "video_features")
        if features and self.config.video_token_id is None:
            raise ValueError("video_features: got videos, want none: config.video_token_id is None")
        return list(features)

    def _placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor, may_have: bool) -> Tensor:
        """[B, L] bool: rows that a fast token takes. ``may_have``: embeddings alone are looked at for them."""
        token = self.config.video_token_id
        if token is not None and input_ids is not None:
            return input_ids == token
        if token is not None and may_have:
            marker = self.get_input_embeddings()(torch.tensor([token], device=inputs_embeds.device))
            return (inputs_embeds == marker.to(inputs_embeds)).all(-1)
        return torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)

    def _slow_and_fast(
        self, features: list[Tensor], like: Tensor, slow_fast: SlowFastConfig, norm_eps: float | None
    ) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        if not features:
            nothing = like.new_zeros(0, self.config.mm_hidden_size)
            tokens = self.mm_projector(nothing).to(like.device)
            return tokens, tokens, []
        features = [x.to(like.device, like.dtype) for x in features]
        slow, fast, counts = project_and_pool(self.mm_projector, features, slow_fast, norm_eps, None)
        return slow.to(like.device), fast.to(like.device), counts

    def _shared_norm_eps(self) -> float | None:
        """Of the hybrid layers' norms, where slow tokens are normalised once for all of them; in training none are."""
        if torch.is_grad_enabled():
            return None
        found = [attention.bare_norm_eps for attention in self.hybrid_attentions()]
        return found[0] if found and all(eps == found[0] for eps in found) else None

    # -------------------------------------------------------------------------------------------- calls

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        video_features: Sequence[Tensor] | Tensor | None = None,
        pixel_values_videos: Sequence[Tensor] | Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        cache=None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        video_repeats: int = 1,
        **kwargs,
    ):
        """What the language model returns: logits [B, L, V], the loss, the cache, and what else is asked for.

        Args:
            input_ids: [B, L] int64; ``config.video_token_id`` stands for one fast token, so often for a video as
                ``config.num_fast_tokens`` says.
            attention_mask: [B, L] (with a cache: of all its rows too), 1 on tokens and 0 on padding, on either side;
                or a mask that transformers has prepared.
            video_features: vision features before the projector, in reading order over the batch: a list of
                [T, H*W, mm_hidden] a video, or one tensor [V, T, H*W, mm_hidden]. Another float type is cast. With a
                cache that holds videos: the new ones alone.
            pixel_values_videos: uint8 frames [T, height, width, 3] of each video instead, for the model's tower.
            labels: [B, L] int64, -100 where there is no target; not read on placeholders (but Trainer counts
                targets itself: -100 is right there).
            inputs_embeds: [B, L, C] instead of input_ids; rows equal to the embedding of ``video_token_id`` are
                placeholders.
            position_ids: [B, L]. None: counted along the mask. Without padding and cache, where they do not go on
                by 1 another packed sample begins, which shares nothing with the one before it.
            past_key_values, cache: a cache of transformers, which carries the slow tokens' K and V along; two names.
            use_cache: whether a cache is filled and returned. None: as the language model's configuration says.
            logits_to_keep: as in transformers.
            video_repeats: every sample stands so many times in a row (beams) and its videos are given once.
            kwargs: what else the language model takes.

        Raises:
            ValueError: placeholders that are not those of the videos; a video of another width, without frames or on
                no square grid; videos without placeholders or placeholders without videos; a new video behind a cache
                without ``config.causal_slow_tokens``; frames without a tower.
            TypeError: features of another type.
        """
        past = past_key_values if past_key_values is not None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: got both or neither of input_ids and inputs_embeds, want one of them")
        eager = not torch.compiler.is_compiling()
        features = self._as_features(video_features, pixel_values_videos)
        if inputs_embeds is None:
            if eager:
                check_dense("input_ids", input_ids, "[B, L]")
                if input_ids.dim() != 2:
                    raise ValueError(f"input_ids: got shape {list(input_ids.shape)}, want [B, L] (a prompt is [1, L])")
            inputs_embeds = self.get_input_embeddings()(input_ids)
        length = inputs_embeds.shape[1]
        valid = restarts = None
        has_mask = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2
        if has_mask:
            valid = attention_mask[:, -length:].to(inputs_embeds.device) != 0
        if position_ids is not None and past is None:
            restarts, attention_mask, use_cache = packed(
                position_ids, attention_mask, valid, use_cache, like=inputs_embeds
            )
        elif position_ids is None and has_mask:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]

        held = held_by(past)
        # A decode step does not ask, as a cache that counts on its device would be waited for.
        past_length = cached_length(past) if eager and (features or (held is None and length > 1)) else 0
        starts = past is None or (eager and held is None and length > 1 and past_length == 0)
        placeholders = None
        if features or starts or length > 1 or labels is not None:
            placeholders = self._placeholders(input_ids, inputs_embeds, bool(features) or (eager and starts))
            placeholders = placeholders if valid is None else placeholders & valid
        if eager and not features and (starts or length > 1) and bool(placeholders.any()):
            raise ValueError(
                f"video_features: got none, want the videos of the {int(placeholders.sum())} video_token_id in "
                "input_ids"
            )

        keeps = use_cache
        if keeps is None:
            keeps = getattr(self.language_model.config, "use_cache", True)
        keeps = keeps and not self._recomputes()
        trains = self.training and torch.is_grad_enabled() and self.mm_projector is not None
        if eager and trains and features and not self._has_looked_at_gates:
            self._has_looked_at_gates = True
            warn_where_gates_stay_closed(self.hybrid_attentions())
        reading = None
        if features or (trains and past is None):
            rows = (placeholders, valid, restarts)
            inputs_embeds, reading, after = self._read(inputs_embeds, features, rows, video_repeats, held, past_length)
            if features and keeps:
                reading.keep = Keeper(after.kv)
                past = self._with_videos(past, after)
        elif held is not None:
            end = held.total[:, None]
            end = end.expand(-1, length) if valid is None else end * valid
            reading = SlowReading.of(held, None, end, held=held.kv)

        if not self.config.hybrid_layers:
            reading = None
        if labels is not None:
            labels = labels.masked_fill(placeholders.to(labels.device), -100)
        passed = {CACHE: past, "use_cache": use_cache, "slow_context": reading}
        kwargs |= {name: value for name, value in passed.items() if value is not None}
        output = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        if eager and features and keeps and past.is_compileable:
            fix_addresses(past.videos)
        return output

    def _read(
        self,
        embeddings: Tensor,
        features: list[Tensor],
        rows: tuple[Tensor, Tensor | None, Tensor | None],
        repeats: int,
        held: HeldVideos | None,
        past_length: int,
    ) -> tuple[Tensor, SlowReading, HeldVideos]:
        """Embeddings with fast tokens in place, what the hybrid layers read, what a cache then holds (but K and V).

        Text alone, in training, has no tokens instead of no video: every module runs, and every parameter gets a
        gradient, so that data-parallel ranks agree.
        """
        placeholders, valid, restarts = rows
        counting = Counting(placeholders, repeats)
        slow_fast, norm_eps = self.slow_fast, self._shared_norm_eps()
        slow, fast, counts = self._slow_and_fast(features, embeddings, slow_fast, norm_eps)
        new = NewVideos.of(counting, counts)
        if features:
            self._check_turn(past_length)
            if self._embedding_factor != 1.0:
                fast = fast / self._factor_like(fast)
            tokens = fast[new.fast].to(embeddings.dtype)
            embeddings = torch.where(placeholders[..., None], tokens, embeddings)
        else:
            embeddings = embeddings + fast.sum().to(embeddings.dtype)
        if self._recomputes() and self._is_reentrant() and torch.is_grad_enabled() and slow.requires_grad:
            leaf = slow.detach().requires_grad_()
            embeddings, slow = _HandOn.apply(embeddings, slow, leaf), leaf
        after = HeldVideos.after(held, new, past_length)
        before = None if held is None else held.total
        begin, end = ranges(slow_fast, new.seen, before, valid, placeholders, restarts)
        older = {} if held is None else held.kv
        read = {"tokens": slow, "tokens_are_normalised": norm_eps is not None, "held": older}
        reading = SlowReading.of(after, begin, end, **read)
        after.step = reading.places.of_one_row()
        return embeddings, reading, after

    def _factor_like(self, x: Tensor) -> Tensor:
        return torch.tensor(self._embedding_factor, dtype=x.dtype, device=x.device)

    def _check_turn(self, past_length: int) -> None:
        if past_length and not self.config.causal_slow_tokens:
            raise ValueError(
                "video_features: got a video behind a cache, want text alone: what came before would have to attend "
                "it too (but for a model with causal_slow_tokens=True in its config)"
            )

    def _with_videos(self, past, videos: HeldVideos):
        """The cache of this call, carrying ``videos``."""
        if past is None:
            past = DynamicVideoCache(config=self.language_model.config)
        else:
            carry_videos(past)
        past.videos = videos
        return past


def embedding_factor(language_model: PreTrainedModel) -> float:
    """What its decoder multiplies embeddings by before the first layer."""
    source = inspect.getsource(inspect.unwrap(type(language_model.get_decoder()).forward))
    if "normalizer" in source:  # Gemma and Gemma 2 in 4.57; later the embedding does
        return language_model.config.hidden_size**0.5
    return getattr(language_model.config, "embedding_multiplier", 1.0) if "embedding_multiplier" in source else 1.0


def _is_initialised(x: nn.Module | Tensor) -> bool:
    return getattr(x, "_is_hf_initialized", False)
