"""The released checkpoints (``model_type`` "llava_qwen_slow_fast") as models, configurations and processors of this package.

Interface, by the names that others call:

- ``SlowFastVLForConditionalGeneration.from_pretrained(directory, dtype=None, device_map=None, vision_tower=None, **kwargs)``:
  float16 where no dtype is named. ``vision_tower``: None: as config.json says, with weights from the checkpoint; a
  directory of transformers with a SigLIP's or CLIP's weights; (name, settings) of ``towers.TOWERS``; False: no tower,
  ``video_features`` are given.
- ``SlowFastVLConfig.from_pretrained(directory)``, ``SlowFastVLProcessor.from_pretrained(directory, num_frames=None)``:
  tokenizer of the directory, ChatML template (qwen_1_5), placeholder "<image>" (added behind the vocabulary, never
  generated), num_frames of the training (temporal stride * sampling stride * min_fast_frames: 64, 96, 128).
- ``AutoModelForImageTextToText``, ``AutoProcessor``, ``AutoConfig`` on such a directory, after ``import slowfast_model.hf``.
- ``PRESETS["demo"]``, ``PRESETS["evaluation"]``: ``.frames`` (of the processor: fps) and ``.generate``.
"""
