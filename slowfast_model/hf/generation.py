"""transformers' ``generate`` with videos: checked once, read once, kept with the cache, in all of its modes."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.logits_process import SuppressTokensLogitsProcessor

from ._versions import CACHE, OTHER_CACHE
from .videos import cached_length, held_by

VIDEO_INPUTS = ("video_features", "pixel_values_videos", "video_repeats")


def _without_videos(kwargs: dict) -> dict:
    return {name: value for name, value in kwargs.items() if name not in VIDEO_INPUTS}


class VideoGeneration(GenerationMixin):
    """What generation asks of a model beside its forward, where that takes videos."""

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """transformers' ``generate``, with ``video_features`` or ``pixel_values_videos`` as in ``forward``.

        A later turn passes the cache of the last one (``past_key_values=`` or ``cache=``), the ids of the whole
        conversation, its mask, and the new videos alone. ``video_token_id`` is never generated.

        Args:
            inputs: the prompt's ids; ``input_ids=`` is the same.
            args, kwargs: what transformers' ``generate`` and ``forward`` take.

        Raises:
            ValueError: as ``forward``; a cache that does not hold the videos of the ids that it has.
        """
        if OTHER_CACHE in kwargs:
            kwargs[CACHE] = kwargs.pop(OTHER_CACHE)
        cache, settings = kwargs.get(CACHE), kwargs.get("generation_config", args[0] if args else None)
        is_draft = bool(getattr(settings, "is_assistant", False))
        if is_draft and held_by(cache) is not None:  # it is called every round with what the first was called with
            kwargs = _without_videos(kwargs)
        features = self._as_features(kwargs.pop("video_features", None), kwargs.pop("pixel_values_videos", None))
        if features:
            kwargs["video_features"] = [x.detach() for x in features]
            chunk = kwargs.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None)
            if chunk is not None:
                raise ValueError(f"prefill_chunk_size: got {chunk}, want None with videos, which are read whole")
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if ids is not None and kwargs.get("inputs_embeds") is None and not is_draft:  # whose model was asked
            self._check_prompt(ids, kwargs.get("attention_mask"), cache, bool(features))
        return super().generate(inputs, *args, **kwargs)

    def _check_prompt(self, ids: Tensor, mask: Tensor | None, cache, has_videos: bool) -> None:
        token, past_length = self.config.video_token_id, cached_length(cache)
        if token is None or not isinstance(ids, Tensor) or ids.dim() != 2:
            return
        placeholders = ids == token
        if mask is not None and mask.shape == ids.shape:
            placeholders = placeholders & (mask.to(ids.device) != 0)
        is_whole = ids.shape[1] > past_length if mask is None else mask.shape[1] == ids.shape[1]
        cached = past_length if is_whole else 0
        if held_by(cache) is None and bool(placeholders[:, :cached].any()):
            raise ValueError(
                f"{CACHE}: got a cache without the slow tokens of the video_token_id in input_ids, want the one that "
                "generation with these videos returned"
            )
        if not has_videos and bool(placeholders[:, cached:].any()):
            count = int(placeholders[:, cached:].sum())
            raise ValueError(f"video_features: got none, want the videos of the {count} video_token_id in input_ids")

    # ------------------------------------------------------------------------- what transformers calls

    def prepare_inputs_for_generation(self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs) -> dict:
        if kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length", 0) is None and inputs_embeds is None:
            positions = kwargs.get("position_ids")
            if positions is not None and positions.shape[-1] == input_ids.shape[1]:  # of the whole conversation
                # Assisted decoding of 5.24 would read the ids that a later turn's cache has a second time.
                kwargs["next_sequence_length"] = input_ids.shape[1] - cached_length(kwargs.get(CACHE))
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        ids, token = inputs.get("input_ids"), self.config.video_token_id
        # Ids that prompt lookup proposes may be placeholders, which are never accepted; no video comes with them.
        if token is not None and ids is not None and inputs.get("video_features") is None and ids.shape[1] > 1:
            inputs["input_ids"] = ids.masked_fill(ids == token, 0 if token else 1)
        return inputs

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs):
        ids, kwargs = super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        if kwargs.get("video_features") is not None and expand_size > 1:
            kwargs["video_repeats"] = expand_size
        return ids, kwargs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args, **kwargs):
        is_users = model_kwargs.get(CACHE) is not None
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE)
        if not is_users and held_by(cache) is not None:  # 4.57 keeps a static cache for the next call
            cache.videos = None
        return result

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs: dict, *args, **kwargs) -> dict:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        return model_kwargs if outputs.get(CACHE) is None else _without_videos(model_kwargs)

    def _get_logits_processor(self, *args, **kwargs):
        processors = super()._get_logits_processor(*args, **kwargs)
        token = self.config.video_token_id
        if token is not None:
            processors.insert(0, SuppressTokensLogitsProcessor([token], device=kwargs.get("device", "cpu")))
        return processors

    def _get_candidate_generator(self, *args, **kwargs):
        exits_early = kwargs["generation_config"].assistant_early_exit is not None  # the model is its own draft
        reads_videos = exits_early or isinstance(kwargs.get("assistant_model"), VideoGeneration)
        # A draft starts without a cache: in a later turn it has no video of the turns before, and proposes from text.
        if not reads_videos or held_by(kwargs["model_kwargs"].get(CACHE)) is not None:
            kwargs["model_kwargs"] = _without_videos(kwargs["model_kwargs"])
        return super()._get_candidate_generator(*args, **kwargs)
