"""From vision features to slow and fast tokens: the projector, the pooling call, and a small patch tower.

The model takes the features of a tower; the released ones (ConvNeXt, SigLIP, CLIP) are in ``hf.vision_towers``.
``PatchTower`` is a patch embedding that turns real frames into features of the right shape where no tower is at hand.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from math import isqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slowfast_kernels as sk
from slowfast_kernels.numbers import as_bool, as_int
from slowfast_kernels.ops.checks import check_dense
from slowfast_kernels.pool_plan import PoolOptions, token_counts

from .config import SlowFastConfig
from .layers import compute_dtype
from .plain import is_plain
from .prefill import pools_first, rows_at_once


def build_projector(config: SlowFastConfig) -> nn.Module:
    """mm_hidden_size -> hidden_size: ``linear``, ``mlpNx_gelu`` (N linear layers) or ``identity``."""
    if config.mm_projector_type == "identity":
        return nn.Identity()
    first = nn.Linear(config.mm_hidden_size, config.hidden_size)
    if config.mm_projector_type == "linear":
        return first
    if not config.projector_depth:
        raise ValueError(f"mm_projector_type: got {config.mm_projector_type!r}, want linear, mlpNx_gelu or identity")
    layers: list[nn.Module] = [first]
    for _ in range(config.projector_depth - 1):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)


def _grid(name: str, tokens: int) -> tuple[int, int]:
    side = isqrt(tokens)
    if side * side != tokens or not side:
        hint = ""
        if tokens > 1 and isqrt(tokens - 1) ** 2 == tokens - 1:
            hint = f"; {tokens} is one more than a square: drop the tower's class token"
        raise ValueError(f"{name}: got {tokens} tokens a frame, want a square number (H * W, H = W){hint}")
    return side, side


def check_features(
    frame_features: Sequence[Tensor],
    width: int | None,
    dtypes: Collection[torch.dtype],
    device: torch.device | None,
    argument: str = "frame_features",
) -> None:
    """A list of [T, H*W, width] in one of ``dtypes`` and on ``device``, the model's (None: anywhere).

    ``argument``: what the caller's users call it.

    Raises:
        TypeError: not a list of dense tensors, another dtype.
        ValueError: another shape or device, no frame, tokens that are no square grid, videos for a model without a
            projector (``width`` None).
    """
    if isinstance(frame_features, str | bytes) or not isinstance(frame_features, Sequence):
        raise TypeError(f"{argument}: got {type(frame_features).__name__}, want a list with a tensor for each video")
    if width is None and frame_features:
        raise ValueError(f"{argument}: got videos, want none: the configuration has no mm_hidden_size (no projector)")
    for i, x in enumerate(frame_features):
        name = f"{argument}[{i}]"
        check_dense(name, x, f"[T, H*W, {width}] (one flat list over the videos of the batch)")
        if x.dim() != 3 or x.shape[2] != width:
            raise ValueError(f"{name}: got shape {list(x.shape)}, want [T, H*W, {width}]")
        if not x.shape[0]:
            raise ValueError(f"{name}: got no frames, want at least one")
        _grid(name, x.shape[1])
        if device is not None and x.device != device:
            raise ValueError(f"{name}: got a tensor on {x.device}, want {device} (the model's device)")
        if x.dtype not in dtypes:
            want = " or ".join(str(dtype) for dtype in dtypes)
            raise TypeError(f"{name}: got {x.dtype}, want {want} (what the model computes in)")


def project_and_pool(
    projector: nn.Module,
    frame_features: Sequence[Tensor],
    config: SlowFastConfig,
    norm_eps: float | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Features [T, H*W, mm_hidden] of each video -> slow [Ns, C], fast [Nf, C], (fast, slow) counts of each video.

    A linear layer and an average commute: where that is faster (``prefill.pools_first``), frames are pooled to slow
    tokens before the projector's last linear layer. What is more than a linear layer, or is none, is called as it is.

    In inference the projector's hidden layers are those of a run of frames at a time (``prefill.rows_at_once``), if it
    is nothing but its weights. What is kept of all frames are the slow tokens before their norm: fast tokens are made
    of them at the end, by the one call that normalises, so that no temporal window is cut.
    """
    videos = [(len(x), x.shape[1]) for x in frame_features]
    options = PoolOptions(
        pool_stride=config.mm_video_pooling_stride,
        sampling_stride=config.fast_token_temporal_sampling_stride,
        temporal_stride=config.fast_token_temporal_stride,
        spatial_stride=config.fast_token_spatial_stride,
        min_fast_frames=config.min_fast_frames,
    )
    parts = _parts_to_pool_between(projector, videos, options.pool_stride, frame_features[0])
    most = rows_at_once(config.hidden_size, frame_features[0])
    if most is not None and sum(frames * area for frames, area in videos) > most and _is_all_weights(projector):
        runs = _runs(videos, most)
        x = _project_runs(projector, frame_features, runs, options.pool_stride, parts is not None, backend)
        return _pool(x, _pooled(videos, options.pool_stride), options._replace(pool_stride=1), norm_eps, backend)
    x = _flat(frame_features)
    if parts is None:
        return _pool(projector(x), videos, options, norm_eps, backend)
    before, last = parts
    for module in before:
        x = module(x)
    x = _pool_spatially(x, videos, options.pool_stride, backend)
    return _pool(last(x), _pooled(videos, options.pool_stride), options._replace(pool_stride=1), norm_eps, backend)


def _flat(frames: Sequence[Tensor]) -> Tensor:
    """[T, n, C] of each -> [sum of T * n, C]."""
    flat = [x.flatten(0, 1) for x in frames]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _pooled(videos: Sequence[tuple[int, int]], pool_stride: int) -> list[tuple[int, int]]:
    """(frames, tokens a frame) after spatial pooling, which leaves images alone."""
    options = PoolOptions(pool_stride=pool_stride)
    return [(frames, token_counts(frames, _grid("", area), options)[0] // frames) for frames, area in videos]


def _pool_spatially(x: Tensor, videos: Sequence[tuple[int, int]], pool_stride: int, backend: str | None) -> Tensor:
    return _pool(x, videos, _SLOW_ALONE._replace(pool_stride=pool_stride), None, backend)[0]


# Fast tokens are written too, whatever they are: one frame in so many, and one of each video.
_SLOW_ALONE = PoolOptions(sampling_stride=2**20)


def _parts_to_pool_between(
    projector: nn.Module, videos: Sequence[tuple[int, int]], pool_stride: int, x: Tensor
) -> tuple[Sequence[nn.Module], nn.Linear] | None:
    """The modules of a projector before and from its last linear layer on; None where it is called whole."""
    before, last = (), projector
    if is_plain(projector, nn.Sequential) and len(projector):
        *before, last = projector
    if pool_stride == 1 or not is_plain(last, nn.Linear) or all(frames == 1 for frames, _ in videos):
        return None
    return (before, last) if pools_first(last.in_features, last.out_features, pool_stride, x) else None


class _Piece(NamedTuple):
    """The frames ``first`` <= t < ``last`` of a video."""

    video: int
    first: int
    last: int


def _runs(videos: Sequence[tuple[int, int]], most: int) -> list[list[_Piece]]:
    """The frames of ``videos`` in order, in runs of at most ``most`` tokens.

    A piece of a video is of two frames or more, as a single one would be taken for an image; so a run of three frames
    may have more tokens.
    """
    runs: list[list[_Piece]] = []
    room = 0
    for i, (frames, area) in enumerate(videos):
        pieces = -(-frames // max(most // area, 3))
        for first, last in pairwise(frames * j // pieces for j in range(pieces + 1)):
            rows = (last - first) * area
            if not runs or rows > room:
                runs.append([])
                room = most
            runs[-1].append(_Piece(i, first, last))
            room -= rows
    return runs


def _layers(projector: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(projector) if isinstance(projector, nn.Sequential) else (projector,)


def _is_all_weights(projector: nn.Module) -> bool:
    """Whether a projector that ends with a linear layer may be called as often as there are runs.

    One with hooks or wrappers in it is called once a batch: sharded, all ranks gather its weights as often.
    """
    *before, last = _layers(projector) or (None,)
    if isinstance(projector, nn.Sequential) and not is_plain(projector, nn.Sequential):
        return False
    return is_plain(last, nn.Linear) and all(is_plain(x, nn.Linear) or is_plain(x, nn.GELU) for x in before)


def _project_runs(
    projector: nn.Module,
    frame_features: Sequence[Tensor],
    runs: Sequence[Sequence[_Piece]],
    pool_stride: int,
    pool_first: bool,
    backend: str | None,
) -> Tensor:
    """Slow tokens [Ns, C] of all videos, not normalised, computed a run at a time."""
    *before, last = _layers(projector)
    areas = [x.shape[1] for x in frame_features]
    pooled = [area for _, area in _pooled([(len(x), x.shape[1]) for x in frame_features], pool_stride)]
    sizes = [sum((piece.last - piece.first) * pooled[piece.video] for piece in run) for run in runs]
    like = frame_features[0]
    slow = like.new_empty(sum(sizes), last.out_features, dtype=compute_dtype(like.dtype, like.device))
    for run, part in zip(runs, slow.split(sizes), strict=True):
        of_run = [(piece.last - piece.first, areas[piece.video]) for piece in run]
        x = _flat([frame_features[piece.video][piece.first : piece.last] for piece in run])
        for module in before:
            x = module(x)
        if pool_first:
            x = _pool_spatially(x, of_run, pool_stride, backend)
        if pool_first or pooled == areas:
            _project_into(part, last, x)
        else:
            x = last(x)
            part.copy_(_pool_spatially(x, of_run, pool_stride, backend))
    return slow


def _project_into(out: Tensor, layer: nn.Linear, x: Tensor) -> None:
    """The product is written where it stays, without a copy, if its type is that of the operands."""
    if layer.bias is None or not out.dtype == x.dtype == layer.weight.dtype == layer.bias.dtype:
        out.copy_(layer(x))
    else:
        torch.addmm(layer.bias, x, layer.weight.t(), out=out)


def _pool(
    tokens: Tensor,
    videos: Sequence[tuple[int, int]],
    options: PoolOptions,
    norm_eps: float | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """tokens [n, C] of ``videos`` (frames, tokens a frame) -> as ``project_and_pool``.

    Videos on one grid are pooled in one call, whose output is already in reading order.
    """
    by_grid: dict[tuple[int, int], list[int]] = {}
    for i, (_, area) in enumerate(videos):
        by_grid.setdefault(_grid(f"frame_features[{i}]", area), []).append(i)
    counts = [token_counts(frames, _grid("", area), options)[::-1] for frames, area in videos]
    apart = tokens.split([frames * area for frames, area in videos]) if len(by_grid) > 1 else ()
    slow, fast = [None] * len(videos), [None] * len(videos)
    for grid, members in by_grid.items():
        mine = tokens
        if apart:
            mine = apart[members[0]] if len(members) == 1 else torch.cat([apart[i] for i in members])
        frames = mine.unflatten(0, (-1, grid[0] * grid[1]))
        frame_counts = [videos[i][0] for i in members]
        pooled = sk.slowfast_pool(frames, frame_counts, grid, **options._asdict(), norm_eps=norm_eps, backend=backend)
        if not apart:
            return pooled.slow, pooled.fast, counts
        for i, part in zip(members, pooled.slow.split([counts[i][1] for i in members]), strict=True):
            slow[i] = part
        for i, part in zip(members, pooled.fast.split([counts[i][0] for i in members]), strict=True):
            fast[i] = part
    return torch.cat(slow), torch.cat(fast), counts


class PatchTower(nn.Module):
    """Frames -> features [T, grid * grid, width]: resize, normalise, one patch embedding, a residual MLP, LayerNorm.

    ``width`` channels, a square ``grid`` of patches, each of ``patch`` x ``patch`` pixels. Random weights: it stands in
    for a trained tower.
    """

    def __init__(self, width: int, grid: int = 16, patch: int = 14) -> None:
        super().__init__()
        self.settings = {"width": width, "grid": grid, "patch": patch}
        self.size = grid * patch
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(torch.randn(grid * grid, width) * 0.02)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [T, 3, height, width] in 0..1, the tower's dtype."""
        # torch does not resize in half precision on a CPU
        wide = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
        resized = F.interpolate(wide, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        x = self.embed((resized * 2 - 1).to(pixels.dtype)).flatten(2).transpose(1, 2) + self.position
        return self.norm(x + self.mlp(x))


def encode_frames(tower: nn.Module, frames: Tensor, *, chunk: int = 32, keep_graph: bool = False) -> Tensor:
    """Features of a video: uint8 frames [T, height, width, 3] through ``tower``, ``chunk`` frames at a time.

    The tower is called with pixels [n, 3, height, width] in 0..1, in the dtype and on the device of its weights
    (without any: float32, where the frames are), and returns a tensor [n, H*W, mm_hidden]. A tower that returns more
    than that, as those of transformers do, is wrapped in a module that normalises the pixels as it was trained and
    picks the layer, without a class token. If a tower has a ``preprocess``, that makes its pixels: a function of uint8
    frames [n, height, width, 3] on the tower's device.

    The tower is frozen, as in the released code: the features carry no graph, whatever the tower's parameters require,
    and a chunk's activations are gone before the next one comes. ``keep_graph=True`` trains the tower with the model:
    gradients reach it then where they are enabled, at the price of the activations of all frames.

    >>> from slowfast_model import PatchTower, encode_frames
    >>> frames = torch.randint(256, (8, 90, 160, 3), dtype=torch.uint8)
    >>> encode_frames(PatchTower(12, grid=4), frames).shape
    torch.Size([8, 16, 12])

    Returns:
        [T, H*W, mm_hidden] on the tower's device and in its dtype, ready for ``frame_features``.

    Raises:
        ValueError: frames of another shape, or none; chunk < 1; a tower whose result has another shape.
        TypeError: frames that are not uint8 or no tensor; a chunk that is no integer; ``keep_graph`` that is no flag; a
            tower that is no module or returns no tensor.
    """
    if not isinstance(tower, nn.Module):
        raise TypeError(f"tower: got {type(tower).__name__}, want a torch.nn.Module")
    check_dense("frames", frames, "[T, height, width, 3]")
    if frames.dim() != 4 or frames.shape[3] != 3 or not frames.numel():
        raise ValueError(f"frames: got shape {list(frames.shape)}, want [T, height, width, 3] with at least one frame")
    if frames.dtype != torch.uint8:
        raise TypeError(f"frames: got {frames.dtype}, want uint8")
    if frames.is_meta:
        raise ValueError("frames: got a tensor on meta, want one that holds frames")
    chunk = min(as_int("chunk", chunk, 1, "a number of frames >= 1"), len(frames))
    keep_graph = as_bool("keep_graph", keep_graph)
    weights = (x for x in (*tower.parameters(), *tower.buffers()) if x.is_floating_point())
    like = next(weights, torch.empty(0, device=frames.device, dtype=torch.float32))
    device = frames.device if like.is_meta else like.device  # on meta: offloaded, and fetched when the tower is called
    parts = (_pixels(tower, part.to(device), like.dtype) for part in frames.split(chunk))
    with torch.set_grad_enabled(keep_graph and torch.is_grad_enabled()):
        features = [_features(tower(part), len(part)) for part in parts]
    shapes = sorted({tuple(x.shape[1:]) for x in features})
    if len(shapes) > 1:
        raise ValueError(f"tower: got features {' and '.join(map(str, shapes))} a frame, want the same of every frame")
    return torch.cat(features)


def _pixels(tower: nn.Module, frames: Tensor, dtype: torch.dtype) -> Tensor:
    preprocess = getattr(tower, "preprocess", None)
    return frames.permute(0, 3, 1, 2).to(dtype) / 255 if preprocess is None else preprocess(frames).to(dtype)


def _features(result: object, num_frames: int) -> Tensor:
    """What a tower returned for so many frames, if it is their features."""
    want = f"a tensor [{num_frames}, H*W, mm_hidden] for {num_frames} frames"
    if not isinstance(result, Tensor):
        raise TypeError(
            f"tower: got {type(result).__name__} as its result, want {want}; wrap the tower in a module that returns "
            "the layer that the model was trained on (such as hidden_states[-2]), without a class token"
        )
    check_dense("tower", result, "[n, H*W, mm_hidden] as its result")
    if not result.is_floating_point():
        raise TypeError(f"tower: got {result.dtype} as its result, want {want} of floating point")
    if result.dim() != 3 or result.shape[0] != num_frames or not result.numel():
        hint = "; a feature map [T, C, H, W] needs .flatten(2).transpose(1, 2)" if result.dim() == 4 else ""
        raise ValueError(f"tower: got shape {list(result.shape)} as its result, want {want}{hint}")
    return result
