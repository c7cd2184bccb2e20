"""The released checkpoints (``model_type`` "llava_qwen_slow_fast") under transformers: model, configuration, processor.

The stored keys, those of ``SlowFastForCausalLM`` and of the tower, become the plug-in's. A prompt's placeholder is
"<image>", a token behind those of the tokenizer: the released code puts -200 there, cuts the text at it and tokenises
the pieces apart, as a tokenizer does around an added token. The vocabulary is the tokenizer's, as in the released code,
and that token, which is never generated; so what is sampled from is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AddedToken, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, Qwen2Config

from slowfast_kernels.dtypes import OP_DTYPES

from ..config import SlowFastConfig
from ..official_config import RELEASED
from ..weight_files import CONFIG, listed, raise_on_keys, read_json, read_safetensors, read_shapes
from ._versions import OFFLOADS_STATE_DICTS
from .config import SLOW_FAST_KEYS, SlowFastVLConfig
from .released_towers import PREFIX, WAYS_OUT, ReleasedTower, released_tower

VIDEO_TOKEN = "<image>"
GENERATION = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# qwen_1_5 of the released code; each video is followed by a line break, be it there already or not.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] | replace('<image>\n', '<image>') | replace('<image>', '<image>\n') }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Fields of config.json that are the language model's in transformers alone.
_TEXT_KEYS = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache")


def is_released(directory: object) -> bool:
    """Whether this is a directory with a released checkpoint's config.json."""
    if not isinstance(directory, str | PathLike) or not (Path(directory) / CONFIG).is_file():
        return False
    return read_json(Path(directory) / CONFIG).get("model_type") == RELEASED


@dataclass(frozen=True)
class Released:
    """What the files of a released checkpoint say, before its weights are read."""

    directory: Path
    config: SlowFastVLConfig
    tokenizer: PreTrainedTokenizerBase | None  # with the placeholder
    tower: ReleasedTower | None
    shapes: Mapping[str, tuple[int, ...]]


def read_released(
    directory: str | PathLike, vision_tower: str | PathLike | tuple | bool | None = None, **tokenizer_options
) -> Released:
    """Read config.json, the tokenizer and the heads of the weights' files.

    Args:
        directory: with a released checkpoint.
        vision_tower: as in ``SlowFastVLForConditionalGeneration.from_pretrained``.
        tokenizer_options: of ``AutoTokenizer.from_pretrained``.

    Raises:
        FileNotFoundError: no weights.
        ValueError, TypeError: a setting that is not implemented, or of a wrong kind, by its key and the file.
    """
    directory = Path(directory)
    written, shapes = read_json(directory / CONFIG), read_shapes(directory)
    try:
        tower = released_tower(written, shapes, vision_tower)
        config = config_of(written, shapes, tower)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{directory / CONFIG}: {error}") from error
    text, tokenizer = config.text_config, None
    if any((directory / name).exists() for name in TOKENIZER_FILES):
        options = {"padding_side": "left"} | tokenizer_options  # to generate in a batch
        tokenizer = AutoTokenizer.from_pretrained(directory, config=text, **options)
        tokenizer.add_tokens([AddedToken(VIDEO_TOKEN, special=True, normalized=False)], special_tokens=True)
        config.video_token_id = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
        text.vocab_size = max(len(tokenizer), config.video_token_id + 1)
    else:
        config.video_token_id = text.vocab_size
        text.vocab_size += 1
    return Released(directory, config, tokenizer, tower, shapes)


def config_of(written: Mapping, shapes: Mapping[str, tuple[int, ...]], tower: ReleasedTower | None) -> SlowFastVLConfig:
    """Of config.json ``written``; the vocabulary is that of the stored embeddings, without a placeholder.

    Raises:
        ValueError, TypeError: a setting that is not implemented, or of a wrong kind, by its key.
    """
    if written.get("mm_use_im_start_end"):
        raise ValueError("mm_use_im_start_end: got True, want False (a video stands alone in its prompt)")
    known = SlowFastConfig.from_official(written)
    text = {
        "vocab_size": shapes.get(EMBEDDING, (known.vocab_size,))[0],
        "hidden_size": known.hidden_size,
        "intermediate_size": known.intermediate_size,
        "num_hidden_layers": known.num_hidden_layers,
        "num_attention_heads": known.num_attention_heads,
        "num_key_value_heads": known.num_key_value_heads,
        "rms_norm_eps": known.rms_norm_eps,
        "rope_theta": known.rope_theta,
        "tie_word_embeddings": known.tie_word_embeddings,
        "initializer_range": known.initializer_range,
    }
    if known.head_dim * known.num_attention_heads != known.hidden_size:
        text["head_dim"] = known.head_dim
    text |= {key: written[key] for key in _TEXT_KEYS if written.get(key) is not None}
    return SlowFastVLConfig(
        Qwen2Config(**text),
        mm_hidden_size=known.mm_hidden_size,
        hybrid_layers=known.hybrid_layers,
        vision_tower=None if tower is None else tower.config,
        dtype=written.get("dtype") or written.get("torch_dtype"),
        **{key: getattr(known, key) for key in SLOW_FAST_KEYS},
    )


def num_frames(config: SlowFastVLConfig) -> int:
    """How many frames of a video the released models were trained on: 64, 96 and 128."""
    strides = config.fast_token_temporal_stride * config.fast_token_temporal_sampling_stride
    return strides * config.min_fast_frames


class ReleasedConfig(SlowFastVLConfig):
    """Known to transformers' Auto classes by the released ``model_type``; what it makes is a ``SlowFastVLConfig``."""

    model_type = RELEASED

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], name_or_path: str = "", **kwargs):
        """That of the directory ``name_or_path``.

        Raises:
            ValueError: no directory of this machine; as ``read_released``.
        """
        written = read_released(name_or_path).config.to_dict() if is_released(name_or_path) else config_dict
        return SlowFastVLConfig.from_dict(written, **kwargs)


# ------------------------------------------------------------------------------------------------------ weights


def load_released(cls, directory: str | PathLike, vision_tower=None, config=None, **kwargs):
    """``cls.from_pretrained`` of a released checkpoint; see ``SlowFastVLForConditionalGeneration.from_pretrained``."""
    places = kwargs.get("device_map")
    if not OFFLOADS_STATE_DICTS and isinstance(places, Mapping) and "disk" in places.values():
        raise ValueError(
            "device_map: got 'disk', to which transformers 4 does not take a released checkpoint; save_pretrained it "
            "once, and load that"
        )
    released = read_released(directory, vision_tower)
    for key in SLOW_FAST_KEYS:
        if key in kwargs:
            setattr(released.config, key, kwargs.pop(key))
        elif config is not None:
            setattr(released.config, key, getattr(config, key))
    named = [x for x in (kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None)) if x is not None]
    kwargs["dtype"] = named[0] if named else torch.float16
    weights = _weights(cls, released)
    result = cls.from_pretrained(None, config=released.config, state_dict=weights, **kwargs)
    model = result[0] if isinstance(result, tuple) else result
    if (released.directory / GENERATION).exists():
        model.generation_config = GenerationConfig.from_pretrained(released.directory)
    return result


def _weights(cls, released: Released) -> dict[str, Tensor]:
    """The state dict of a ``cls`` of ``released.config``.

    Raises:
        ValueError: keys that are missing, that nothing reads, or that are of another shape, by their stored names;
            weights of the tower that are nowhere; what is no plain floating point.
    """
    with torch.device("meta"):
        own = cls(released.config).state_dict()
    names = {_stored_key(key, released.tower): key for key in own}
    shapes = dict(released.shapes)
    apart = released.tower is not None and not any(key.startswith(PREFIX) for key in shapes)
    if apart:
        shapes |= _shapes_apart(released.tower)
    read = {key for key in shapes if not _is_unused(key, released.tower)}
    missing = set(names) - read
    if released.config.tie_word_embeddings and len({EMBEDDING, HEAD} & missing) == 1:
        missing -= {EMBEDDING, HEAD}
    rows = {EMBEDDING, HEAD}  # of the vocabulary, which is the tokenizer's
    want = {stored: tuple(own[key].shape)[1 if stored in rows else 0 :] for stored, key in names.items()}
    misshapen = [
        f"{key} {list(shapes[key])} (want {list(own[names[key]].shape)})"
        for key in sorted(read & set(names))
        if shapes[key][1 if key in rows else 0 :] != want[key]
    ]
    raise_on_keys(f"{released.directory}", missing, read - set(names), misshapen)

    given = read_safetensors(released.directory)
    if apart:
        given |= _weights_apart(released.tower)
    given = {names[key]: value for key, value in given.items() if key in names}
    unusable = [f"{key} ({value.dtype})" for key, value in sorted(given.items()) if value.dtype not in OP_DTYPES]
    if unusable:
        raise ValueError(f"{released.directory}: got {listed(unusable)}, want floating point (dequantise it first)")
    for key in {names[stored] for stored in rows} & set(given):
        given[key] = _with_rows(given[key], len(own[key]))
    if released.config.tie_word_embeddings:  # 4.57 looks for the embedding's key alone
        for here, there in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
            if names[here] in given:
                given.setdefault(names[there], given[names[here]])
    return given


def _stored_key(key: str, tower: ReleasedTower | None) -> str:
    """In a released checkpoint, of a key of the plug-in's model."""
    part, _, rest = key.partition(".")
    if part == "language_model":
        return rest
    return tower.stored_key(rest) if part == "vision_tower" else f"model.{key}"


def _is_unused(key: str, tower: ReleasedTower | None) -> bool:
    if key.startswith("model.vision_tower."):
        return tower is None or (key.startswith(PREFIX) and tower.is_unused(key))
    return key.endswith("rotary_emb.inv_freq")  # recomputed


def _with_rows(weight: Tensor, rows: int) -> Tensor:
    """The first ``rows`` rows; those of tokens that the checkpoint does not know are the mean of all."""
    if rows <= len(weight):
        return weight[:rows]
    mean = weight.mean(0, keepdim=True, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])


def _of_vision_model(names: Mapping) -> dict:
    """By the stored names of a released checkpoint; a directory of a two-sided model has text too."""
    keys = {key: key if key.startswith("vision_model.") else f"vision_model.{key}" for key in names}
    text = ("text_model.", "logit_", "text_projection.", "visual_projection.")
    return {PREFIX + keys[key]: value for key, value in names.items() if not key.startswith(text)}


def _shapes_apart(tower: ReleasedTower) -> dict[str, tuple[int, ...]]:
    if tower.directory is None:
        raise ValueError(
            f"vision_tower: got no weights of the {tower.config['name']} tower in the checkpoint ({PREFIX}*), want "
            f"{WAYS_OUT}; nothing is downloaded by a name"
        )
    return _of_vision_model(read_shapes(tower.directory))


def _weights_apart(tower: ReleasedTower) -> dict[str, Tensor]:
    return _of_vision_model(read_safetensors(tower.directory))


# ---------------------------------------------------------------------------------------------------- processor


def load_released_processor(cls, directory: str | PathLike, vision_tower=None, **kwargs):
    """``cls.from_pretrained`` of a released checkpoint; ``kwargs``: arguments of ``cls``, and of the tokenizer.

    Raises:
        ValueError: no tokenizer in the directory; as ``read_released``.
    """
    own = {name: kwargs.pop(name) for name in signature(cls).parameters if name in kwargs}
    released = read_released(directory, vision_tower, **kwargs)
    if released.tokenizer is None:
        raise ValueError(f"{directory}: got no {' or '.join(TOKENIZER_FILES)}, want the tokenizer's files")
    options = {"num_frames": num_frames(released.config), "chat_template": CHAT_TEMPLATE}
    return cls(released.tokenizer, released.config, **options | own)
