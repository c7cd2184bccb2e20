"""The files of a checkpoint: config.json, and safetensors in one file or in shards with an index.

Whatever cannot be read is named by its path, with the likely cause. A save replaces an older one as a whole: all new
files are written beside it first, and between the old checkpoint's end and the new one's last file the directory holds
no index and no single file, so that a crash never leaves old and new weights together.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from slowfast_kernels.messages import describe
from slowfast_kernels.numbers import as_int

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
ALIGNMENT = 64  # bytes; what torch allocates by
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
UNITS = {"": 1, "B": 1, **{f"{p}B": 10 ** (3 * i) for i, p in enumerate("KMGT", 1)}}
UNITS |= {f"{p}IB": 2 ** (10 * i) for i, p in enumerate("KMGT", 1)}


def directory_path(directory: str | bytes | PathLike) -> Path:
    """The name of a directory, there or not.

    Raises:
        TypeError: no name.
    """
    try:
        return Path(os.fsdecode(directory))
    except TypeError:
        raise TypeError(f"directory: got {describe(directory)}, want a name (str, bytes or os.PathLike)") from None


def raise_on_keys(name: str, missing: set[str], unexpected: set[str], misshapen: list[str], hint: str = "") -> None:
    """A ValueError with the keys by name, if there are any."""
    problems = []
    for what, keys in (
        ("missing", sorted(missing)),
        ("unexpected", sorted(unexpected)),
        ("of another shape", misshapen),
    ):
        if keys:
            problems.append(f"{len(keys)} keys {what}: {listed(keys)}")
    if problems:
        raise ValueError(f"{name}: got " + "; ".join(problems) + hint)


def listed(keys: list[str]) -> str:
    return ", ".join(keys[:20]) + (f" and {len(keys) - 20} more" if len(keys) > 20 else "")


# ------------------------------------------------------------------------------------------ reading


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: anything else is in it.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # of the encoding or of the syntax
        raise ValueError(f"{path}: got no JSON{_likely_cause(path)} ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got a JSON {type(content).__name__}, want an object")
    return content


def read_safetensors(path: str | PathLike, *, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """State dict of a .safetensors file, an index of shards, or a directory that holds either.

    Of a directory with both the single file is read, as transformers does.

    Raises:
        FileNotFoundError: no checkpoint at ``path``, or a shard that the index names is missing.
        ValueError: a file that is not what its name says (cut off, a git-lfs pointer), by its path; an index that is
            none; shards that do not hold the keys that the index promises.
    """
    return _read(Path(path), partial(_read_file, device=str(device)))


def read_shapes(path: str | PathLike) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that ``read_safetensors`` would read, from the heads of the files.

    Raises:
        FileNotFoundError, ValueError: as ``read_safetensors``.
    """
    return _read(Path(path), _read_head)


def _read(path: Path, read: Callable[[Path], dict]) -> dict:
    if path.is_dir():
        path = _weights_in(path)
    if not path.exists():
        raise FileNotFoundError(f"path: no such checkpoint: {path}")
    return _read_shards(path, read) if path.suffix == ".json" else read(path)


def _weights_in(directory: Path) -> Path:
    for name in (SINGLE, INDEX):
        if (directory / name).exists():
            return directory / name
    others = sorted(file.name for file in directory.iterdir() if file.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    but = f", but with {listed(others)}" if others else ""
    if any(SHARD.fullmatch(name) for name in others):
        but += " (shards are read by their index)"
    elif others:
        but += f" (convert it: only safetensors files of the whole model are read, under the name {SINGLE})"
    raise FileNotFoundError(f"path: got {directory} with neither {INDEX} nor {SINGLE}{but}")


def _read_shards(index: Path, read: Callable[[Path], dict]) -> dict:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index}: got no weight_map, want an object of file names by key")
    members: dict[str, set[str]] = {}
    for key, shard in weight_map.items():
        members.setdefault(shard, set()).add(key)
    state_dict: dict = {}
    for shard, keys in sorted(members.items()):
        path = index.parent / shard
        if Path(shard).name != shard:
            raise ValueError(f"{index}: got the shard {shard!r}, want the name of a file beside the index")
        if not path.exists():
            raise FileNotFoundError(f"path: {index.name} names {shard}, which is not in {index.parent}")
        tensors = read(path)
        raise_on_keys(str(path), keys - set(tensors), set(tensors) - keys, [], f" (by {index.name})")
        state_dict |= tensors
    return state_dict


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("checkpoints need safetensors: pip install safetensors") from error
    return safetensors


@contextmanager
def _named_by_path(path: Path) -> Iterator[None]:
    """What safetensors cannot read, by its path and with the likely cause."""
    try:
        yield
    except (_safetensors().SafetensorError, OSError) as error:
        cause = _likely_cause(path) or f": {path.stat().st_size} bytes, is the download complete?"
        raise ValueError(f"{path}: got no readable safetensors file{cause} ({error})") from error


def _read_head(path: Path) -> dict[str, tuple[int, ...]]:
    with _named_by_path(path), _safetensors().safe_open(path, "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)


def _read_file(path: Path, device: str) -> dict[str, Tensor]:
    with _named_by_path(path):
        tensors = _safetensors().torch.load_file(path, device=device)
    # In a mapped file a tensor may start at any element, and a GEMM's last bits depend on where its operands do.
    return {key: x if x.data_ptr() % ALIGNMENT == 0 else x.clone() for key, x in tensors.items()}


def _likely_cause(path: Path) -> str:
    if path.is_dir():
        return ": a directory"
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return ": an empty file"
    if start.startswith(b"version https://git-lfs"):
        return ": a git-lfs pointer instead of the file (git lfs pull fetches it)"
    if start.lstrip().startswith((b"<!", b"<html")):
        return ": a web page instead of the file"
    return ""


# ------------------------------------------------------------------------------------------ writing


def shard_bytes(max_shard_size: int | str) -> int:
    """Bytes of "5GB", "200 MB", "1.5GiB" or an integer.

    Raises:
        TypeError: neither an integer nor a string.
        ValueError: a string that is no size, or less than one byte.
    """
    want = "bytes or a string like '5GB', '200MB' or '1GiB'"
    size = max_shard_size
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size, re.ASCII)
        if not match or match[2].upper() not in UNITS:
            raise ValueError(f"max_shard_size: got {max_shard_size!r}, want {want}")
        size = int(Fraction(match[1]) * UNITS[match[2].upper()])
    return as_int("max_shard_size", size, 1, want)


def split_into_shards(state_dict: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Keys of each shard, in order, at most ``limit`` bytes; a larger tensor is alone in its shard."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, value in state_dict.items():
        if shards[-1] and size + value.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += value.nbytes
    return shards


def write_checkpoint(directory: Path, config: Mapping, state_dict: Mapping[str, Tensor], max_shard_size: int) -> None:
    """Write config.json and the weights, and remove what an older save left of its own.

    Raises:
        NotADirectoryError: ``directory`` is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"directory: got {directory}, which is a file")
    directory.mkdir(parents=True, exist_ok=True)
    shards = split_into_shards(state_dict, max_shard_size)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as scratch:
        _write_json(Path(scratch, CONFIG), config)
        for name, keys in zip(names, shards, strict=True):
            _write_file(Path(scratch, name), {key: state_dict[key] for key in keys})
            shutil.copymode(Path(scratch, CONFIG), Path(scratch, name))  # safetensors leaves it to the owner alone
        if len(shards) > 1:
            weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
            total = sum(value.nbytes for value in state_dict.values())
            _write_json(Path(scratch, INDEX), {"metadata": {"total_size": total}, "weight_map": weight_map})
            names.append(INDEX)
        for name in (INDEX, SINGLE):
            (directory / name).unlink(missing_ok=True)
        for old in directory.iterdir():
            if SHARD.fullmatch(old.name):
                old.unlink()
        for name in (CONFIG, *names):  # what makes it a checkpoint, the index or the single file, is last
            os.replace(Path(scratch, name), directory / name)


def _write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    plain, seen = {}, set()
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        # save_file refuses tensors that share memory
        if value.untyped_storage().nbytes() != value.nbytes or value.data_ptr() in seen:
            value = value.clone()
        seen.add(value.data_ptr())
        plain[key] = value
    _safetensors().torch.save_file(plain, path, metadata={"format": "pt"})


def _write_json(path: Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
