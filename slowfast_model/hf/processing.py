"""SlowFastVLProcessor: text with a placeholder for each video, and videos, as the model takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from slowfast_kernels.numbers import as_int

from ..video import load_video
from .config import SlowFastVLConfig
from .released import is_released, load_released_processor
from .towers import tokens_per_frame as tokens_of_tower

_TOKENIZER_OUTPUTS = ("input_ids", "attention_mask")
_CALL_ARGUMENTS = ("padding", "padding_side", "truncation", "max_length", "pad_to_multiple_of", "return_tensors")


class SlowFastVLProcessor(ProcessorMixin):
    """Tokenizer, chat template, video decoder, and the expansion of the placeholder of a video.

    The placeholder is the tokenizer's token of ``config.video_token_id``: once a video in text, once a fast token in
    input_ids. Frames are sampled evenly over a clip by ``load_video``.

    Args:
        tokenizer: of the language model.
        config: the model's; a dict is made one.
        num_frames: frames that are taken of a video file.
        tokens_per_frame: vision tokens of a frame; None: those of the configuration's vision tower.
        chat_template: None: the tokenizer's.

    Raises:
        TypeError: ``config`` or a number of another type.
        ValueError: a number < 1.
    """

    attributes = ["tokenizer"]  # noqa: RUF012
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer=None, config=None, num_frames=64, tokens_per_frame=None, chat_template=None) -> None:
        if isinstance(config, Mapping):
            config = SlowFastVLConfig.from_dict(dict(config))
        if not isinstance(config, SlowFastVLConfig):
            raise TypeError(f"config: got {type(config).__name__}, want a SlowFastVLConfig (model.config)")
        self.config = config
        self.num_frames = as_int("num_frames", num_frames, 1)
        self.tokens_per_frame = None if tokens_per_frame is None else as_int("tokens_per_frame", tokens_per_frame, 1)
        super().__init__(tokenizer, chat_template=chat_template or getattr(tokenizer, "chat_template", None))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """What ``save_pretrained`` wrote; or that of a directory with a released checkpoint.

        The latter has the directory's tokenizer with the placeholder "<image>" added, the ChatML prompt (qwen_1_5), and
        takes as many frames as the model was trained on.

        Args:
            pretrained_model_name_or_path: a directory.
            kwargs: of a released checkpoint: ``vision_tower`` as for the model, and the arguments of the class; else
                as transformers'.

        Raises:
            ValueError: a released checkpoint without a tokenizer, or with a config.json that is not implemented.
        """
        if is_released(pretrained_model_name_or_path):
            return load_released_processor(cls, pretrained_model_name_or_path, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def to_dict(self, *args, **kwargs) -> dict:
        """What ``save_pretrained`` writes."""
        return super().to_dict(*args, **kwargs) | {"config": self.config.to_dict()}

    @property
    def model_input_names(self) -> list[str]:
        return [*_TOKENIZER_OUTPUTS, "pixel_values_videos"]

    @property
    def video_token(self) -> str:
        """The placeholder.

        Raises:
            ValueError: the configuration has no ``video_token_id``, or the tokenizer no such token.
        """
        token_id = self.config.video_token_id
        token = None if token_id is None else self.tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            raise ValueError(f"config.video_token_id: got {token_id}, want the id of one of the tokenizer's tokens")
        return token

    def __call__(
        self,
        text: str | Sequence[str],
        videos: Sequence | None = None,
        return_tensors: str | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        **kwargs,
    ) -> BatchFeature:
        """input_ids and attention_mask, and with videos pixel_values_videos.

        Args:
            text: prompts, with the placeholder once for each of their videos.
            videos: of all prompts, in reading order: names of files, or uint8 frames [T, height, width, 3] (a tensor,
                an array, or a list of pictures).
            return_tensors: "pt" for tensors; prompts of different lengths are then padded, on the tokenizer's side.
            num_frames: frames taken of a file; None: the processor's.
            fps: frames a second to take of a file, at most ``num_frames``, as ``load_video`` does. None: ``num_frames``
                evenly over the clip. ``PRESETS`` has what the released code does.
            kwargs: the tokenizer's.

        Returns:
            ``pixel_values_videos`` is a list of uint8 tensors [T, height, width, 3], in reading order.

        Raises:
            ValueError: another number of placeholders than of videos; ``truncation`` that cuts placeholders; frames of
                different sizes; a tower whose tokens a frame are not known; as ``load_video``.
            TypeError: frames of another type.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        given = [] if videos is None else [videos] if isinstance(videos, str | bytes | PathLike) else list(videos)
        count = self.num_frames if num_frames is None else as_int("num_frames", num_frames, 1)
        frames = [_frames(video, count, fps, f"videos[{i}]") for i, video in enumerate(given)]
        kwargs.setdefault("padding", len(prompts) > 1 and return_tensors is not None)
        if frames or self.config.video_token_id is not None:
            prompts = self._expanded(prompts, frames)
        encoded = self.tokenizer(prompts, return_tensors=return_tensors, **kwargs)
        if frames and kwargs.get("truncation"):
            self._check_whole(encoded["input_ids"], frames)
        data = {name: encoded[name] for name in _TOKENIZER_OUTPUTS if name in encoded}
        return BatchFeature(data | ({"pixel_values_videos": frames} if frames else {}))

    def _expanded(self, prompts: list[str], frames: list[Tensor]) -> list[str]:
        token = self.video_token
        found = sum(prompt.count(token) for prompt in prompts)
        if found != len(frames):
            raise ValueError(f"videos: got {len(frames)}, want {found} (one for each {token} in text)")
        lengths = iter([self._num_fast(len(video)) for video in frames])
        expanded = []
        for prompt in prompts:
            first, *rest = prompt.split(token)
            expanded.append(first + "".join(token * next(lengths) + part for part in rest))
        return expanded

    def _check_whole(self, input_ids: Sequence, frames: list[Tensor]) -> None:
        found = sum(list(map(int, row)).count(self.config.video_token_id) for row in input_ids)
        wanted = sum(self._num_fast(len(video)) for video in frames)
        if found != wanted:
            raise ValueError(
                f"truncation: got a max_length that leaves {found} of {wanted} placeholders, want all of them: a "
                "longer max_length, fewer frames, or truncation_side on the side without videos"
            )

    def _num_fast(self, num_frames: int) -> int:
        tokens = self.tokens_per_frame or tokens_of_tower(self.config.vision_tower)
        if tokens is None:
            raise ValueError("tokens_per_frame: got None, want a number: the configuration has no vision tower")
        return self.config.num_fast_tokens(num_frames, tokens)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping] | Sequence[Sequence[Mapping]],
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        num_frames: int | None = None,
        fps: float | None = None,
        **kwargs,
    ) -> str | list | Tensor | BatchFeature:
        """The prompt of a conversation, or of several.

        Content is a string, or parts: ``{"type": "text", "text": ...}`` and ``{"type": "video", "path": ...}`` (or
        ``"video"`` in place of ``"path"``: a name or frames), each of which becomes the placeholder where it stands.

        Args:
            conversation: messages with ``role`` and ``content``, or a list of conversations.
            chat_template: another than the processor's.
            tokenize: whether ids are made of the text, and frames of the videos.
            return_dict: with ``tokenize``: everything that the model takes, and not input_ids alone.
            num_frames, fps: as in a call.
            kwargs: the template's (``add_generation_prompt=True``) and the tokenizer's.

        Raises:
            ValueError: content of another kind; as a call.
        """
        is_batch = bool(conversation) and not isinstance(conversation[0], Mapping)
        videos: list = []
        flat = [self._flat(messages, videos) for messages in (conversation if is_batch else [conversation])]
        arguments = {name: kwargs.pop(name) for name in _CALL_ARGUMENTS if name in kwargs}
        template = chat_template or self.chat_template
        prompts = [
            self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)
            for messages in flat
        ]
        if not tokenize:
            return prompts if is_batch else prompts[0]
        arguments.setdefault("add_special_tokens", False)  # the template has written them
        inputs = self(prompts, videos=videos or None, num_frames=num_frames, fps=fps, **arguments)
        return inputs if return_dict else inputs["input_ids"]

    def _flat(self, messages: Sequence[Mapping], videos: list) -> list[dict]:
        """Messages whose content is a string; their videos are appended to ``videos``."""
        return [{**message, "content": self._content(message.get("content"), videos)} for message in messages]

    def _content(self, content: str | Sequence[Mapping] | None, videos: list) -> str | None:
        if content is None or isinstance(content, str):
            return content
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text" and "text" in part:
                parts.append(part["text"])
            elif kind == "video" and ("path" in part or "video" in part):
                videos.append(part.get("path", part.get("video")))
                parts.append(self.video_token)
            else:
                raise ValueError(f"conversation: got {part!r}, want text, or a video with its path")
        return "".join(parts)

    def batch_decode(self, *args, **kwargs) -> list[str]:
        """The tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs) -> str:
        """The tokenizer's."""
        return self.tokenizer.decode(*args, **kwargs)


def _frames(video, num_frames: int, fps: float | None, name: str) -> Tensor:
    """uint8 [T, height, width, 3] of a file or of what holds pictures."""
    if isinstance(video, str | bytes | PathLike):
        return load_video(video, num_frames, fps=fps)
    if not isinstance(video, Tensor):
        try:
            pictures = video if isinstance(video, np.ndarray) else np.stack([np.asarray(picture) for picture in video])
            video = torch.from_numpy(pictures)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                f"{name}: got {type(video).__name__}, want the name of a file, or uint8 frames [T, height, width, 3] "
                f"as a tensor, an array or a list of pictures of one size ({error})"
            ) from error
    if video.dtype != torch.uint8:
        raise TypeError(f"{name}: got {video.dtype}, want uint8 frames or the name of a file")
    if video.dim() != 4 or video.shape[3] != 3 or not len(video):
        raise ValueError(f"{name}: got shape {list(video.shape)}, want [T, height, width, 3] with at least one frame")
    return video
