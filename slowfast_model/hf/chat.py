"""VideoChat: a conversation about videos, turn after turn on the caches of the turns before."""

from __future__ import annotations

import itertools
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor
from transformers import StaticCache, StoppingCriteria, StoppingCriteriaList, TextStreamer

from slowfast_kernels.numbers import as_int

from ..sdpa import without_cudnn_attention
from ..video import load_video
from ..weight_files import read_json
from ._versions import CACHE
from .config import SlowFastVLConfig
from .modeling import SlowFastVLForConditionalGeneration
from .processing import SlowFastVLProcessor
from .stopwatch import Stopwatch
from .videos import held_by

MAX_NEW_TOKENS = 512  # where neither the user nor the model's generation_config says how many


@dataclass(frozen=True)
class Answer:
    """An answer, and what it took.

    Attributes:
        text: without special tokens.
        ids: all of the new ids, the end's too.
        timings: seconds by stage: "decode_video" (of the files), "preprocess" (template, tokenizer, frames as the
            tower takes them), "tower", "pool" (projector and pooling), "kv" (K and V of slow tokens, all hybrid
            layers), "prefill" (what else passes until the first token is known) and "token" (each later one, the
            median). Beside them "tokens_per_second" of those later ones, and "peak_memory_bytes" of tensors on a GPU.
            None: not on a GPU, or one token alone.
        counts: "videos", "frames", "fast_tokens" and "slow_tokens" of this turn's videos; "cached_tokens" of the turns
            before, which were not read again; "prompt_tokens" that were, fast tokens among them; "new_tokens".
    """

    text: str
    ids: list[int]
    timings: dict[str, float | None]
    counts: dict[str, int]


class VideoChat:
    """A conversation about videos; a later turn reads its own words and videos alone, all else from the caches.

    The prompt is that of the processor's chat template. A turn's text is cut from the template's whole conversation,
    and what the model has answered stays in it id by id.

    A turn runs without cuDNN's attention, which makes a plan for every new length, but for steps over a static cache,
    whose shapes stay. PyTorch's flag for it is the process's: ``on_text`` and other threads find it off meanwhile
    (``slowfast_model.sdpa``).

    >>> chat = VideoChat.from_pretrained("my-model")  # doctest: +SKIP
    >>> chat.ask("What happens?", ["clip.mp4"]).text  # doctest: +SKIP
    >>> chat.ask("And then?", on_text=print)  # doctest: +SKIP

    Args:
        model: with a vision tower, if there are to be videos.
        processor: of the model.
        num_frames: frames taken of a video file; None: as the processor says.
        fps: frames a second to take, at most ``num_frames``, as ``load_video`` does; None: evenly over the clip.
        system: a system message; None: the template's own, if it has one.
        static_rows: tokens of a whole conversation, answers too, for which a static cache has room: on a GPU
            transformers then compiles the decode step, once, and runs it as a CUDA graph. None: the cache grows and
            nothing is compiled.
        options: of ``model.generate``, for every turn (``max_new_tokens=``, ``do_sample=``, ``temperature=``); where
            they say nothing, ``model.generation_config`` holds, and answers end after 512 tokens.

    Raises:
        TypeError: a model or processor of another class.
        ValueError: ``num_frames`` or ``static_rows`` < 1.
    """

    def __init__(
        self,
        model: SlowFastVLForConditionalGeneration,
        processor: SlowFastVLProcessor,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        system: str | None = None,
        static_rows: int | None = None,
        **options,
    ) -> None:
        for name, value, kind in (
            ("model", model, SlowFastVLForConditionalGeneration),
            ("processor", processor, SlowFastVLProcessor),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{name}: got {type(value).__name__}, want a {kind.__name__}")
        self.model, self.processor, self.fps, self.system = model, processor, fps, system
        self.num_frames = processor.num_frames if num_frames is None else as_int("num_frames", num_frames, 1)
        self.static_rows = None if static_rows is None else as_int("static_rows", static_rows, 1)
        self.options = dict(options)
        if model.generation_config.max_new_tokens is None:
            self.options.setdefault("max_new_tokens", MAX_NEW_TOKENS)
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        directory: str | PathLike,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        **settings,
    ) -> VideoChat:
        """A chat with the model and the processor of a directory.

        Args:
            directory: what ``save_pretrained`` of both wrote.
            device: where the model computes.
            dtype: what it computes in; None: as it was saved, or as the class chooses for what it did not save.
            settings: of ``VideoChat``.

        Raises:
            OSError, ValueError: a directory without a model, or without its processor.
        """
        named = {} if dtype is None else {"dtype": dtype}
        if (
            dtype is None
            and read_json(Path(directory) / "config.json").get("model_type") == SlowFastVLConfig.model_type
        ):
            named["dtype"] = "auto"
        model = SlowFastVLForConditionalGeneration.from_pretrained(directory, **named).to(device).eval()
        try:
            processor = SlowFastVLProcessor.from_pretrained(directory)
        except (KeyError, OSError, TypeError, ValueError) as error:
            message = f"directory: got {directory}, want a processor beside the model (processor.save_pretrained)"
            raise ValueError(f"{message}: {error}") from error
        return cls(model, processor, **settings)

    def reset(self) -> None:
        """Begin another conversation."""
        self._messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self._ids: Tensor | None = None  # [1, n] of the turns so far
        self._cache = None
        self._is_stopped = False

    def stop(self) -> None:
        """End the answer that is being made after its current token; the conversation goes on from what there is.

        For ``on_text``, another thread, or a signal's handler.
        """
        self._is_stopped = True

    def ask(
        self,
        question: str,
        videos: Sequence[str | bytes | PathLike | Tensor] = (),
        *,
        on_text: Callable[[str], object] | None = None,
        on_progress: Callable[[str, int, int], object] | None = None,
    ) -> Answer:
        """The next turn.

        An error before the model reads leaves the conversation as it was; one after it, which leaves the caches half
        filled, ends it (``reset``).

        Args:
            question: what the user says.
            videos: which videos come before it: names of files, or uint8 frames [T, height, width, 3].
            on_text: called with each piece of the answer as it is made; together they are its text.
            on_progress: called with the stage, what is done of it and all of it: "decode_video" (frames of a file) and
                "tower" (frames of all videos).

        Raises:
            FileNotFoundError, ValueError, ImportError: as ``load_video``.
            ValueError: videos for a model without a vision tower; in a later turn, for one without
                ``config.causal_slow_tokens``; a placeholder of a video in the question; a chat template that the
                tokenizer does not have; more tokens than ``static_rows``.
            TypeError: a question that is no string, one video in place of a list.
        """
        self._check(question, videos)
        watch = Stopwatch(self.model.device)
        with watch.stage("decode_video"):
            frames = [self._frames(video, on_progress) for video in videos]
        with watch.stage("preprocess"):
            message = self._message(question, len(frames))
            text = self._text(message)
            inputs = self.processor(text=[text], videos=frames or None, return_tensors="pt", add_special_tokens=False)
            new = inputs["input_ids"].to(self.model.device)
            self._check_room(new.shape[1])
        with watch.stage("tower"), without_cudnn_attention():
            features = self._features(inputs.get("pixel_values_videos", []), watch, on_progress)
        counts = {"videos": len(frames), "frames": sum(map(len, frames))}
        counts["fast_tokens"] = int((new == self.model.config.video_token_id).sum()) if frames else 0
        counts["slow_tokens"] = -self._num_slow()
        counts |= {"cached_tokens": self._length(), "prompt_tokens": new.shape[1]}
        try:
            answer, times = self._generate(new, features, watch, on_text)
        except BaseException:
            self.reset()
            raise
        counts["slow_tokens"] += self._num_slow()
        counts["new_tokens"] = len(answer)
        spoken = self.processor.decode(answer, skip_special_tokens=True)
        self._messages += [message, {"role": "assistant", "content": spoken}]
        return Answer(spoken, answer, _timings(watch, times), counts)

    def _check(self, question: str, videos: Sequence) -> None:
        if not isinstance(question, str):
            raise TypeError(f"question: got {type(question).__name__}, want a string")
        if isinstance(videos, str | bytes | PathLike | Tensor) or not isinstance(videos, Sequence):
            raise TypeError(f"videos: got {type(videos).__name__}, want a list of them")
        if videos and not hasattr(self.model, "vision_tower"):
            raise ValueError(
                "videos: got a video, want none: the model has no vision tower (model.generate takes video_features)"
            )
        if videos and self._length() and not self.model.config.causal_slow_tokens:
            raise ValueError(
                "videos: got one after the first turn, which a model without causal_slow_tokens in its config cannot "
                "add, want all videos in the first turn, or another conversation"
            )

    def _check_room(self, num_new: int) -> None:
        answer = self.options.get("max_new_tokens", self.model.generation_config.max_new_tokens)
        total = self._length() + num_new + answer
        if self.static_rows is not None and total > self.static_rows:
            raise ValueError(
                f"static_rows: got {self.static_rows}, want at least {total} ({self._length()} tokens of the turns "
                f"before, {num_new} of this one, and max_new_tokens={answer} of an answer), or another conversation"
            )

    def _frames(self, video, on_progress) -> Tensor:
        if not isinstance(video, str | bytes | PathLike):
            return video  # the processor checks them
        report = None if on_progress is None else lambda done, total: on_progress("decode_video", done, total)
        return load_video(video, self.num_frames, fps=self.fps, progress=report)

    def _message(self, question: str, num_videos: int) -> dict:
        parts = [{"type": "video", "video": None}] * num_videos  # frames are given apart
        return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}

    def _text(self, message: dict) -> str:
        """What the template writes of the conversation behind the last answer."""
        if not self._length():
            return self.processor.apply_chat_template([*self._messages, message], add_generation_prompt=True)
        mark = uuid.uuid4().hex  # in place of the last answer, where the text is cut
        messages = [*self._messages[:-1], self._messages[-1] | {"content": mark}, message]
        _, found, text = self.processor.apply_chat_template(messages, add_generation_prompt=True).partition(mark)
        if not found:
            raise ValueError("chat_template: got one that leaves out answers, want one that writes the conversation")
        return text

    def _features(self, pictures: list[Tensor], watch: Stopwatch, on_progress) -> list[Tensor]:
        if not pictures:
            return []
        tower, done, total = self.model.vision_tower, 0, sum(map(len, pictures))

        def report(module, arguments, features) -> None:
            nonlocal done
            done += len(features)
            on_progress("tower", done, total)

        with ExitStack() as parts:
            if getattr(tower, "preprocess", None) is not None:
                parts.enter_context(watch.method(tower, "preprocess", "preprocess"))
            if on_progress is not None:
                parts.callback(tower.register_forward_hook(report).remove)
            return self.model.encode_videos(pictures)

    def _length(self) -> int:
        return 0 if self._ids is None else self._ids.shape[1]

    def _num_slow(self) -> int:
        """Slow tokens that a new row sees."""
        held = held_by(self._cache)
        return 0 if held is None else int(held.total[0])

    def _generate(self, new: Tensor, features: list[Tensor], watch: Stopwatch, on_text):
        """The answer to ``new`` ids [1, n], and when the model began and each token was there."""
        ids = new if self._ids is None else torch.cat([self._ids, new], 1)
        cache = self._cache
        if cache is None and self.static_rows is not None:
            cache = StaticCache(config=self.model.config.text_config, max_cache_len=self.static_rows)
        given = {} if cache is None else {CACHE: cache}
        if features:
            given["video_features"] = features
        self._is_stopped = False
        with ExitStack() as whole, ExitStack() as parts:  # of the answer; those until its first token
            grows = self.static_rows is None
            (whole if grows else parts).enter_context(without_cudnn_attention())
            if features:
                parts.enter_context(watch.method(self.model, "_slow_and_fast", "pool"))
                for attention in self.model.hybrid_attentions():
                    parts.enter_context(watch.method(attention, "slow_kv", "kv"))
            listener = _Listener(self.processor.tokenizer, on_text, parts.close, watch.now())
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                use_cache=True,
                return_dict_in_generate=True,
                streamer=listener,
                stopping_criteria=StoppingCriteriaList([_Stopped(self)]),
                **given,
                **self.options,
            )
        self._cache = getattr(out, CACHE)
        answer = out.sequences[0, ids.shape[1] :].tolist()
        # The end is the template's to write: it is not cached yet, and what ends an answer may not be what ends a turn.
        kept = ids.shape[1] + len(answer) - (answer[-1] in self._ends())
        self._ids = out.sequences[:, :kept]
        return answer, listener.times

    def _ends(self) -> Sequence[int]:
        ends = self.options.get("eos_token_id", self.model.generation_config.eos_token_id)
        return [ends] if isinstance(ends, int) else ends or []


def _timings(watch: Stopwatch, times: list[float]) -> dict[str, float | None]:
    """``Answer.timings``; ``times``: when the model began, and when each token was there."""
    begin, first, *later = times
    steps = [after - before for before, after in itertools.pairwise([first, *later])]
    inside = {name: watch.seconds.get(name, 0.0) for name in ("pool", "kv")}
    last = {"prefill": first - begin - sum(inside.values()), "token": statistics.median(steps) if steps else None}
    timings = {name: watch.seconds[name] for name in ("decode_video", "preprocess", "tower")} | inside | last
    rate = len(steps) / sum(steps) if steps else None
    return timings | {"tokens_per_second": rate, "peak_memory_bytes": watch.peak_memory()}


class _Stopped(StoppingCriteria):
    """True once ``VideoChat.stop`` was called."""

    def __init__(self, chat: VideoChat) -> None:
        self.chat = chat

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        return torch.full((len(input_ids),), self.chat._is_stopped, dtype=torch.bool, device=input_ids.device)


class _Listener(TextStreamer):
    """Hands on the text of an answer and notes when each of its tokens came; generation waits for it to get one.

    Args:
        tokenizer: of the ids.
        on_text: called with text; None: no one listens.
        on_first: called at the first token.
        begin: when the model began.
    """

    def __init__(self, tokenizer, on_text, on_first: Callable[[], object], begin: float) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text, self.on_first, self.times = on_text, on_first, [begin]

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            if len(self.times) == 1:
                self.on_first()
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text and self.on_text is not None:
            self.on_text(text)
