"""slow_fast for lmms-eval: a ``SlowFastVLForConditionalGeneration`` that answers the messages of a task.

Without settings of the task it samples and decodes as the released evaluation: frames at 2 a second and, where these
are more than the processor takes, so many of them evenly; greedy; 256 new tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np
import torch
from accelerate import PartialState
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from slowfast_kernels.numbers import as_int

from ..hf import PRESETS, SlowFastVLForConditionalGeneration, SlowFastVLProcessor
from ..sdpa import without_cudnn_attention
from ..video import load_video

EVALUATION = PRESETS["evaluation"]
SAMPLING = ("temperature", "top_p", "top_k")


class SlowFast(lmms):
    """A chat model of lmms-eval: it answers tasks of output type generate_until and generate_until_multi_round.

    A video of a message is a file; a picture is a video of one frame. What a task says in ``until`` is not applied, as
    in the released evaluation: lmms-eval would end every answer at its first empty line.

    Args:
        pretrained: the directory of model and processor.
        device: None: a GPU if there is one. Of several processes (``accelerate launch``) each takes its own.
        dtype: of the weights, by name; None: what ``from_pretrained`` chooses.
        batch_size: prompts that are answered together.
        fps: frames per second that are taken of a video; 0: ``num_frames`` evenly over the clip, as the released demo.
        num_frames: frames that are taken of a video, with ``fps`` at most; None: the processor's.
        max_new_tokens: of an answer, where the task does not say.
        attn_implementation: transformers'; None: its choice.
        system_prompt: text, or a file with it; None: the chat template's.

    Raises:
        ValueError, TypeError: a number out of range or of another type; as ``from_pretrained``.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        fps: float = EVALUATION.frames["fps"],
        num_frames: int | None = None,
        max_new_tokens: int = EVALUATION.generate["max_new_tokens"],
        attn_implementation: str | None = None,
        system_prompt: str | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = _count("batch_size", batch_size)
        self.max_new_tokens = _count("max_new_tokens", max_new_tokens)
        self.fps = fps or None
        self.system_prompt = self._resolve_system_prompt(system_prompt)
        self.processor = SlowFastVLProcessor.from_pretrained(pretrained)
        self.processor.tokenizer.padding_side = "left"  # answers of a batch begin together
        self.num_frames = self.processor.num_frames if num_frames is None else _count("num_frames", num_frames)
        state = PartialState()
        here = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = state.device if state.num_processes > 1 else torch.device(here)
        chosen = {"dtype": dtype, "attn_implementation": attn_implementation}
        self.model = SlowFastVLForConditionalGeneration.from_pretrained(
            pretrained, **{name: value for name, value in chosen.items() if value is not None}
        )
        self.model.to(self.device).eval()

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """An answer to each request, in order. Those of a batch have the same settings.

        Raises:
            ValueError: audio, a part of a video, or a medium that no file holds; as ``load_video``.
        """
        batches = Collator([request.args for request in requests], _by_context, group_fn=_settings_of, grouping=True)
        answers: list[GenerationResult] = []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="slow_fast") as progress:
            for batch in batches.get_batched(n=self.batch_size):
                asked = [to_messages(self._document(where)) for _, to_messages, _, *where in batch]
                answers += self._answer(asked, _settings_of(batch[0]))
                progress.update(len(batch))
        return batches.get_original(answers)

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """The answers to each request, one a round: what a round asks, the task makes of the answers before it."""
        answers = []
        for request in tqdm(requests, disable=self.rank != 0, desc="slow_fast"):
            _, to_messages, settings, *where = request.args
            document = self._document(where)
            given: list[str] = []
            messages, is_over, info = to_messages(document), False, None
            while not is_over:
                given += [answer.text for answer in self._answer([messages], settings)]
                so_far = {"round_idx": len(given), "previous_output": list(given), "previous_round_info": info}
                messages, is_over, _, info = to_messages(document, **so_far)
            answers.append(given)
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """lmms-eval gives a chat model no such requests.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("loglikelihood: got requests for it, want tasks of output_type generate_until")

    def _document(self, where: Sequence) -> Mapping:
        number, task, split = where
        return self.task_dict[task][split][number]

    def _answer(self, conversations: Sequence[list[dict]], settings: Mapping) -> list[GenerationResult]:
        if self.system_prompt:
            conversations = [self._apply_system_prompt(list(c), self.system_prompt) for c in conversations]
        inputs = self.processor.apply_chat_template(
            [self._messages(conversation) for conversation in conversations],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            padding=True,
        ).to(self.device)
        tokenizer = self.processor.tokenizer
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        with torch.inference_mode(), without_cudnn_attention():  # prompts are of many lengths
            ids = self.model.generate(**inputs, **self._generation(settings), pad_token_id=padding)
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        counts = (new != padding).sum(1).tolist()
        return [GenerationResult(*pair) for pair in zip(texts, map(_output_tokens, counts), strict=True)]

    def _generation(self, settings: Mapping) -> dict:
        """Arguments of ``generate``: greedy but where the task asks for samples."""
        samples = settings.get("do_sample", (settings.get("temperature") or 0) > 0)
        chosen = {name: settings.get(name) if samples else None for name in SAMPLING}
        return {
            "do_sample": samples,
            "num_beams": settings.get("num_beams", 1),
            "max_new_tokens": settings.get("max_new_tokens", self.max_new_tokens),
            **chosen,
        }

    def _messages(self, conversation: Sequence[Mapping]) -> list[dict]:
        """As the processor takes them."""
        messages = ChatMessages(messages=conversation).messages
        return [{"role": m.role, "content": [self._part(content) for content in m.content]} for m in messages]

    def _part(self, content) -> dict:
        if content.type == "text":
            return {"type": "text", "text": content.text}
        if content.type == "video":
            return {"type": "video", "video": self._video(content)}
        if content.type == "image":
            return {"type": "video", "video": _picture(content.url)}
        raise ValueError(f"messages: got {content.type}, want text, videos or images")

    def _video(self, content) -> Tensor:
        if not isinstance(content.url, str | PathLike) or (content.start_time, content.end_time) != (None, None):
            raise ValueError(f"messages: got the video {content!r}, want the name of a file, all of which is taken")
        return load_video(content.url, self.num_frames, fps=self.fps)


def _count(name: str, value: int | str) -> int:
    """A number >= 1; lmms-eval's command line hands some on as text."""
    return as_int(name, int(value) if isinstance(value, str) and value.isdecimal() else value, 1)


def _picture(picture: Image.Image | str) -> np.ndarray:
    """uint8 [1, height, width, 3]."""
    opened = picture if isinstance(picture, Image.Image) else Image.open(picture)
    return np.array(opened.convert("RGB"))[None]


def _settings_of(arguments: Sequence) -> Mapping:
    return arguments[2]


def _by_context(arguments: Sequence) -> str:
    return arguments[0]


def _output_tokens(count: int) -> TokenCounts:
    return TokenCounts(output_tokens=count)
