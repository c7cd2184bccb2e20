"""A long video is projected and pooled in runs of frames: the same tokens, hidden layers of bounded bytes."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from model_cases import PROMPT_VIDEOS, PROMPTS, features, one_thread, padded, tiny_model  # noqa: F401
from prefill_cases import MIXED, assert_as_exact, either_order, every_target, tokens
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slowfast_model.prefill import rows_at_once, use_order
from slowfast_model.vision import _runs

# Windows of these cross every place where runs could be cut, or leave frames out.
WINDOWS = {
    "released": {"min_fast_frames": 3, "fast_token_temporal_stride": 2**20},  # 7 frames to 3 windows, which overlap
    "one_window": {"fast_token_temporal_stride": 2**20},
    "strides": {"fast_token_temporal_stride": 3},
    "sampled": {"fast_token_temporal_sampling_stride": 2, "fast_token_temporal_stride": 2},
    "fast_spatial_stride": {"fast_token_spatial_stride": 2},
    "not_pooled": {"mm_video_pooling_stride": 1},
}
PROJECTORS = {
    "linear": {"mm_projector_type": "linear"},
    "two_layers": {},
    "three_layers": {"mm_projector_type": "mlp3x_gelu"},
    "stride_3": {"mm_video_pooling_stride": 3},
    "not_pooled": {"mm_video_pooling_stride": 1},
}
WIDTH = 32  # of the tiny model's projector


def working(rows: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes in which so many feature tokens are projected at a time."""
    return rows * 2 * WIDTH * dtype.itemsize


@pytest.fixture
def projected(monkeypatch):
    """Rows of each product of the projector."""
    rows = []
    linear, addmm = nn.functional.linear, torch.addmm
    monkeypatch.setattr(nn.functional, "linear", lambda x, *more: rows.append(len(x)) or linear(x, *more))
    monkeypatch.setattr(torch, "addmm", lambda b, x, *more, **out: rows.append(len(x)) or addmm(b, x, *more, **out))
    return rows


def of_integers(model, videos):
    """Weights and features whose sums and averages by 2 x 2 are exact, however they are ordered."""
    for x in (*model.model.mm_projector.parameters(), *videos):
        x.copy_((4 * x).round())


# ------------------------------------------------------------------------------------------ the same tokens


@every_target
@either_order
@pytest.mark.parametrize("changes", WINDOWS.values(), ids=WINDOWS)
@torch.no_grad()
def test_runs_give_the_same_bits_where_products_are_exact(changes, first, target):
    model = tiny_model(target.backend, target.device, mm_projector_type="linear", **changes)
    videos = features(*MIXED, device=target.device)
    of_integers(model, videos)
    whole = tokens(model, videos, pool_first=first)
    for rows in (1, 40, 100):
        in_runs = tokens(model, videos, pool_first=first, working_bytes=working(rows))
        assert torch.equal(in_runs[0], whole[0])
        assert torch.equal(in_runs[1], whole[1])
        assert in_runs[2] == whole[2]


@either_order
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", PROJECTORS.values(), ids=PROJECTORS)
@torch.no_grad()
def test_runs_are_as_exact_as_all_frames_at_once(changes, dtype, first):
    """Errors against float64 from the same numbers, as norms: at most 2 times those of projecting all frames first."""
    model, videos = tiny_model(**changes).to(dtype), [x.to(dtype) for x in features(*MIXED)]
    found = tokens(model, videos, pool_first=first, working_bytes=working(50, dtype))
    whole = tokens(model, videos, pool_first=False)
    exact = tokens(model.double(), [x.double() for x in videos], pool_first=False)
    assert_as_exact(found, whole, exact, dtype)


@every_target
@either_order
@torch.no_grad()
def test_runs_give_the_models_logits(first, target):
    model = tiny_model(target.backend, target.device)
    ids, mask = (x.to(target.device) for x in padded(PROMPTS))
    videos = features(*PROMPT_VIDEOS, device=target.device)
    with use_order(pool_first=first, working_bytes=working(60)):
        found = model(ids, videos, mask).logits
    model.backend = "eager"
    torch.testing.assert_close(found, model(ids, videos, mask).logits, atol=1e-4, rtol=1e-4)


@either_order
@torch.no_grad()
def test_under_autocast_tokens_have_its_type(first):
    model, videos = tiny_model("cpu"), features((7, 4))
    with torch.autocast("cpu", torch.bfloat16):
        in_runs = tokens(model, videos, pool_first=first, working_bytes=working(50))
        whole = tokens(model, videos, pool_first=first)
    for a, b in zip(in_runs[:2], whole[:2], strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, atol=0.1, rtol=0.1)


@torch.no_grad()
def test_a_last_layer_without_a_bias_is_projected_in_runs_too(projected):
    model, videos = tiny_model(), features((6, 4))
    model.model.mm_projector[-1].bias = None
    whole = tokens(model, videos)
    projected.clear()
    for a, b in zip(tokens(model, videos, working_bytes=working(48))[:2], whole[:2], strict=True):
        torch.testing.assert_close(a, b)
    assert projected == [48, 12, 48, 12]


# ------------------------------------------------------------------------------------------ what is a run


@pytest.mark.parametrize("most", [1, 30, 64, 100, 10**6])
def test_runs_have_all_frames_in_order_and_no_more_tokens_than_asked_for(most):
    videos = [(11, 16), (1, 16), (1, 9), (2, 64), (7, 9), (3, 4), (4, 100)]
    runs = _runs(videos, most)
    assert [(i, t) for run in runs for i, first, last in run for t in range(first, last)] == [
        (i, t) for i, (frames, _) in enumerate(videos) for t in range(frames)
    ]
    for run in runs:
        assert len(run) == 1 or sum((last - first) * videos[i][1] for i, first, last in run) <= most
        for i, first, last in run:
            frames, area = videos[i]
            assert last - first > 1 or frames == 1  # an image is not pooled
            assert last - first <= max(3, most // area)
    for a, b in pairwise(runs):  # no run could have taken in the next one's first piece
        assert sum((last - first) * videos[i][1] for i, first, last in [*a, b[0]]) > most


def test_a_long_video_of_the_7b_model_is_cut_into_equal_runs():
    x = SimpleNamespace(device=torch.device("cuda"), element_size=lambda: 2)
    with torch.no_grad():
        most = rows_at_once(3584, x)
    assert most // 256 == 146  # frames
    sizes = {last - first for run in _runs([(1536, 256)], most) for _, first, last in run}
    assert sizes == {139, 140}
    assert len(_runs([(128, 256)], most)) == 1


@either_order
@torch.no_grad()
def test_each_run_is_projected_for_itself(first, projected):
    order = {"pool_first": first, "working_bytes": working(64)}
    tokens(tiny_model(), features((8, 4), (1, 4)), **order)
    assert projected == [64, 16 if first else 64] * 2 + [16, 16]  # the image is not pooled


def _hooked(projector):
    projector[0].register_forward_hook(lambda *_: None)


def _wrapped(projector):
    projector[-1] = nn.Sequential(projector[-1])


def _hooked_whole(projector):
    projector.register_forward_hook(lambda *_: None)


def _another_activation(projector):
    projector[1] = nn.ReLU()


def _ends_with_another_layer(projector):
    projector.append(nn.GELU())


@pytest.mark.parametrize("change", [_hooked, _wrapped, _hooked_whole, _another_activation, _ends_with_another_layer])
@torch.no_grad()
def test_a_projector_that_is_more_than_its_weights_is_called_once_a_batch(change, projected):
    model = tiny_model()
    change(model.model.mm_projector)
    tokens(model, features((8, 4)), pool_first=False, working_bytes=working(64))
    assert projected == [128, 128]


def test_training_projects_all_frames_at_once_for_the_same_gradients(projected):
    def gradients(**order):
        model = tiny_model().double()
        videos = [x.double().requires_grad_() for x in features(*MIXED)]
        slow, fast, _ = tokens(model, videos, norm_eps=None, pool_first=True, **order)
        (slow.pow(2).sum() + fast.pow(3).sum()).backward()
        return [x.grad for x in (*model.model.mm_projector.parameters(), *videos)]

    in_runs = gradients(working_bytes=working(20))
    assert projected[0] == sum(frames * side**2 for frames, side in MIXED)
    assert all(torch.equal(a, b) for a, b in zip(in_runs, gradients(), strict=True))


def test_a_compiled_model_projects_all_frames_at_once(monkeypatch):
    with torch.no_grad(), use_order(working_bytes=1 << 20):
        assert rows_at_once(WIDTH, torch.zeros(1)) == (1 << 20) // (2 * WIDTH * 4)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert rows_at_once(WIDTH, torch.zeros(1)) is None


@pytest.mark.parametrize(("given", "error"), [(-1, ValueError), (True, TypeError), (2.5, TypeError)])
def test_bytes_to_work_in_are_a_number(given, error):
    with pytest.raises(error, match="working_bytes: got"), use_order(working_bytes=given):
        pass


# ------------------------------------------------------------------------------------------ memory


class Memory(TorchDispatchMode):
    """Bytes of the tensors that were made in the block: at most at a time, and of the largest."""

    def __init__(self):
        super().__init__()
        self.peak = self.largest = 0
        self._known: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self._known[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        self._known = {storage: size for storage, size in self._known.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self._known.values()))
        return made


@either_order
@torch.no_grad()
def test_memory_over_the_slow_tokens_does_not_grow_with_the_video(first):
    model, most = tiny_model("cpu"), working(256)

    def measured(frames, **order):
        with Memory() as memory:
            slow, fast, _ = tokens(model, features((frames, 8)), pool_first=first, **order)
        return memory, slow.nbytes, fast.nbytes

    for frames in (64, 512):
        memory, slow, fast = measured(frames, working_bytes=most)
        features_bytes = frames * 64 * 12 * 4  # made in the block too
        kept = features_bytes + 2 * slow + fast  # before and after the norm
        assert memory.peak <= kept + most + 4096
        assert memory.largest == max(slow, features_bytes)
        whole, *_ = measured(frames, working_bytes=2**40)
        assert whole.peak >= features_bytes + 8 * slow  # both hidden layers of all frames
