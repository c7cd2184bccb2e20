"""Loader of the golden vectors: outputs of the released code (arXiv 2504.01328), stored losslessly under tests/golden.

``load(name)`` gives every tensor under its original name, bit for bit, and the sidecar. Random normal numbers do not
compress, so inputs and weights are stored as where they came from (seed, offset, scale) plus a correction in units of
the last place: 11 MB become 5. tests/golden/README.md describes the sets.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def names(prefix: str = "") -> list[str]:
    """Names of the stored sets that start with ``prefix``, sorted."""
    return sorted(path.stem for path in GOLDEN.glob(f"{prefix}*.npz"))


@lru_cache(maxsize=2)
def _uniform(seed: int) -> np.ndarray:
    """The first numbers of MT19937 as the released run consumed them: 24 bits each."""
    words = np.random.RandomState(seed).randint(0, 2**32, size=400_000, dtype=np.uint32)
    return (words & 0xFFFFFF).astype(np.float64) * 2.0**-24


def draw(seed: int, offset: int, count: int, scale: float) -> np.ndarray:
    """``count`` >= 16 normal numbers: Box-Muller over blocks of 16, the last (overlapping) block drawn afresh."""
    uniform = _uniform(seed)[offset:]
    whole = count // 16 * 16
    blocks = [uniform[:whole].reshape(-1, 16)]
    if count % 16:
        blocks.append(uniform[count : count + 16].reshape(1, 16))
    u = np.concatenate(blocks)
    radius, angle = np.sqrt(-2 * np.log1p(-u[:, :8])), 2 * np.pi * u[:, 8:]
    z = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32)
    if count % 16:
        z = np.concatenate([z[:-1].reshape(-1)[: count - 16], z[-1]])
    return z.reshape(-1) * np.float32(scale)


def _float32(stored: np.ndarray) -> np.ndarray:
    """Byte planes of words rotated left by one bit, so that the exponents share a plane and compress."""
    words = np.ascontiguousarray(stored.T).view(np.uint32).reshape(-1)
    return ((words >> np.uint32(1)) | (words << np.uint32(31))).view(np.float32)


@lru_cache(maxsize=4)
def _read(name: str) -> tuple[dict[str, Tensor], dict]:
    sidecar = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = {}
    with np.load(GOLDEN / f"{name}.npz") as archive:
        for key, shape in sidecar["shapes"].items():
            stored = archive[key]
            if key in sidecar["drawn"]:
                offset, scale = sidecar["drawn"][key]
                words = draw(sidecar["seed"], offset, stored.size, scale).view(np.int32)
                words = (words + stored.astype(np.int32)).view(np.uint32)
                if f"{key}@at" in archive:
                    words[archive[f"{key}@at"]] = archive[f"{key}@bits"]
                stored = words.view(np.float32)
            elif stored.dtype == np.uint8:
                stored = _float32(stored)
            elif stored.dtype == np.int16:
                stored = stored.astype(np.int64)
            tensors[key] = torch.from_numpy(stored.copy()).reshape(shape)
    return tensors, sidecar


def load(name: str) -> tuple[dict[str, Tensor], dict]:
    """Fresh copies of the tensors of ``name``, and its sidecar (config, checks, cases, shapes)."""
    tensors, sidecar = _read(name)
    return {key: tensor.clone() for key, tensor in tensors.items()}, sidecar
