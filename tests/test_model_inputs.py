"""What a model is called with: every wrong argument is refused by its name, whatever is right is taken as it is."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from model_cases import PROMPT_VIDEOS, PROMPTS, VIDEO, features, one_thread, padded, tiny_model  # noqa: F401
from torch import nn

from slowfast_model import PatchTower, encode_frames

VOCABULARY = 61


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


def forward(model, *, ids=None, videos="default", mask=None, labels=None):
    """A call with one video, some of its arguments replaced."""
    ids = torch.tensor([[1, VIDEO, 2, 3]]) if ids is None else ids
    return model(ids, features((4, 4)) if isinstance(videos, str) and videos == "default" else videos, mask, labels)


def ids_of(*rows: list[int], dtype=torch.int64) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype)


def sparse(x: torch.Tensor) -> torch.Tensor:
    return x.to_sparse()


def nested(x: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor(list(x), layout=torch.jagged)


# ------------------------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([[1, VIDEO, 2]], TypeError, r"input_ids: got list .*, want a tensor \[B, L\]"),
        (np.array([[1, 2]]), TypeError, "input_ids: got numpy int64"),
        (None, TypeError, "input_ids: got NoneType"),
        (ids_of([1, 2]).float(), TypeError, "input_ids: got torch.float32, want int64 or int32"),
        (ids_of([1, 1]).bool(), TypeError, "input_ids: got torch.bool"),
        (ids_of([1, 2], dtype=torch.uint8), TypeError, "input_ids: got torch.uint8"),
        (sparse(ids_of([1, 2])), TypeError, "input_ids: got a tensor of layout torch.sparse_coo"),
        (nested(ids_of([1, 2])), TypeError, "input_ids: got a nested tensor"),
        (torch.tensor(1), ValueError, r"input_ids: got shape \[\], want \[B, L\]"),
        (torch.tensor([1, 2]), ValueError, r"input_ids: got shape \[2\]"),
        (ids_of([1, 2])[None], ValueError, r"input_ids: got shape \[1, 1, 2\]"),
        (torch.zeros(0, 3, dtype=torch.int64), ValueError, r"input_ids: got shape \[0, 3\].*at least one token"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, r"input_ids: got shape \[2, 0\].*at least one token"),
        (ids_of([1, 2]).to("meta"), ValueError, "input_ids: got a tensor on meta, want cpu"),
        (ids_of([1, VOCABULARY]), ValueError, "input_ids: got 61, want 0..60 or -200"),
        (ids_of([1, -1]), ValueError, "input_ids: got -1"),
        (ids_of([1, -100]), ValueError, "input_ids: got -100"),
        (ids_of([1, 2**40]), ValueError, f"input_ids: got {2**40}"),
    ],
)
def test_wrong_ids_are_refused(model, ids, error, message):
    with pytest.raises(error, match=message):
        model(ids)


def test_ids_may_be_int32(model):
    assert torch.equal(forward(model).logits, forward(model, ids=ids_of([1, VIDEO, 2, 3], dtype=torch.int32)).logits)


# ------------------------------------------------------------------------------------------------------------ mask

MASK = [[0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([[0.0, 0.0, 0.0, float("-inf")]], TypeError, "attention_mask: got torch.float32.*additive"),
        ([[1.0, 1.0, 1.0, 0.0]], TypeError, "attention_mask: got torch.float32, want bool or integers"),
        ([[1, 1, 1, 2]], ValueError, "attention_mask: got 2, want 1 on tokens and 0 on padding"),
        ([[1, 1, 1, -1]], ValueError, "attention_mask: got -1"),
        ([[0, 0, 0, -10000]], ValueError, "attention_mask: got -10000"),
        ([[1, 1, 1]], ValueError, r"attention_mask: got shape \[1, 3\], want \[1, 4\]"),
        ([1, 1, 1, 1], ValueError, r"attention_mask: got shape \[4\]"),
        ([[[[1] * 4] * 4]], ValueError, r"attention_mask: got shape \[1, 1, 4, 4\]"),
        ([[0, 0, 0, 0]], ValueError, "attention_mask: got no selected token in row 0"),
    ],
)
def test_wrong_masks_are_refused(model, mask, error, message):
    with pytest.raises(error, match=message):
        forward(model, mask=torch.tensor(mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_a_mask_of_no_integers_is_refused_whatever_it_holds(model, dtype):
    with pytest.raises(TypeError, match=f"attention_mask: got {dtype}"):
        forward(model, mask=torch.tensor(MASK).to(dtype))


@pytest.mark.parametrize("make", [sparse, nested, torch.Tensor.tolist, torch.Tensor.numpy])
def test_a_mask_that_is_no_dense_tensor_is_refused(model, make):
    with pytest.raises(TypeError, match=r"attention_mask: got .*, want (a (dense )?tensor|torch.strided)"):
        forward(model, mask=make(torch.tensor(MASK)))


def test_a_mask_without_memory_is_refused(model):
    with pytest.raises(ValueError, match="attention_mask: got a tensor on meta"):
        forward(model, mask=torch.tensor(MASK, device="meta"))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_a_mask_may_be_bool_or_any_integers(model, dtype):
    expected = forward(model, ids=ids_of([VIDEO, 2, 3])).logits
    assert torch.equal(forward(model, mask=torch.tensor(MASK).to(dtype)).logits, expected)


def test_a_video_that_the_mask_hides_is_named(model):
    with pytest.raises(ValueError, match=r"frame_features: got 1 videos, want 0 .*that attention_mask selects"):
        forward(model, mask=torch.tensor([[1, 0, 1, 1]]))


# ---------------------------------------------------------------------------------------------------------- labels

LABELS = [[-100, -100, 2, 3]]


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([[-100, -100, 2, VOCABULARY]], ValueError, "labels: got 61, want 0..60 or -100"),
        ([[-100, -100, -1, 3]], ValueError, "labels: got -1, "),
        ([[-100, -100, -200, 3]], ValueError, "labels: got -200, "),
        ([[VOCABULARY, -100, 2, 3]], ValueError, "labels: got 61"),  # never a target, as it comes first
        ([[-100, -100, 2, 2**33]], ValueError, f"labels: got {2**33}"),
        ([[-100.0, -100.0, 2.5, 3.0]], TypeError, "labels: got torch.float32, want int64 or int32"),
        ([[-100.0, -100.0, 2.0, 3.0]], TypeError, "labels: got torch.float32"),
        ([[False, False, True, True]], TypeError, "labels: got torch.bool"),
        ([[2, 3]], ValueError, r"labels: got shape \[1, 2\], want \[1, 4\]"),
        ([-100, -100, 2, 3], ValueError, r"labels: got shape \[4\]"),
    ],
)
def test_wrong_labels_are_refused(model, labels, error, message):
    with pytest.raises(error, match=message):
        forward(model, labels=torch.tensor(labels))


@pytest.mark.parametrize("make", [sparse, nested, torch.Tensor.tolist, torch.Tensor.numpy])
def test_labels_that_are_no_dense_tensor_are_refused(model, make):
    with pytest.raises(TypeError, match=r"labels: got .*, want (a (dense )?tensor|torch.strided)"):
        forward(model, labels=make(torch.tensor(LABELS)))


def test_labels_without_memory_are_refused(model):
    with pytest.raises(ValueError, match="labels: got a tensor on meta"):
        forward(model, labels=torch.tensor(LABELS, device="meta"))


@pytest.mark.parametrize("labels", [[[-100, VIDEO, 2, 3]], [[-100, 5, 2, 3]], [[-100, VOCABULARY, 2, 3]]])
def test_labels_on_a_video_are_not_read(model, labels):
    """They are often a copy of the ids."""
    expected = forward(model, labels=torch.tensor(LABELS))
    out = forward(model, labels=torch.tensor(labels, dtype=torch.int32))
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.labels, expected.labels)


def test_labels_on_padding_are_not_read(model):
    labels, mask = torch.tensor([[2**40, *LABELS[0]]]), torch.tensor([[0, 1, 1, 1, 1]])
    out = forward(model, ids=ids_of([0, 1, VIDEO, 2, 3]), mask=mask, labels=labels)
    assert torch.equal(out.loss, forward(model, labels=torch.tensor(LABELS)).loss)


# -------------------------------------------------------------------------------------------------------- features


def clip(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(*(shape or (2, 16, 12)), **options)


@pytest.mark.parametrize(
    ("videos", "error", "message"),
    [
        ("video", TypeError, "frame_features: got str, want a list"),
        (b"video", TypeError, "frame_features: got bytes, want a list"),
        (clip(), TypeError, "frame_features: got Tensor, want a list"),
        (clip(1, 2, 16, 12), TypeError, "frame_features: got Tensor, want a list"),
        (np.zeros((1, 2, 16, 12), np.float32), TypeError, "frame_features: got ndarray, want a list"),
        ({"video": clip()}, TypeError, "frame_features: got dict, want a list"),
        ({1, 2}, TypeError, "frame_features: got set, want a list"),
        ((x for x in [clip()]), TypeError, "frame_features: got generator, want a list"),
        (4, TypeError, "frame_features: got int, want a list"),
        ([None], TypeError, r"frame_features\[0\]: got NoneType None, want a tensor \[T, H\*W, 12\]"),
        ([clip(), "video"], TypeError, r"frame_features\[1\]: got str 'video', want a tensor"),
        ([[clip()]], TypeError, r"frame_features\[0\]: got list .*, want a tensor .*one flat list"),
        ([clip().numpy()], TypeError, r"frame_features\[0\]: got numpy float32.*, want a tensor"),
        ([sparse(clip())], TypeError, r"frame_features\[0\]: got a tensor of layout torch.sparse_coo"),
        ([nested(clip())], TypeError, r"frame_features\[0\]: got a nested tensor"),
        ([clip(dtype=torch.int64)], TypeError, r"frame_features\[0\]: got torch.int64, want torch.float32"),
        ([clip(dtype=torch.uint8)], TypeError, r"frame_features\[0\]: got torch.uint8"),
        ([clip(dtype=torch.bfloat16)], TypeError, r"frame_features\[0\]: got torch.bfloat16, want torch.float32"),
        ([clip(dtype=torch.complex64)], TypeError, r"frame_features\[0\]: got torch.complex64"),
        ([clip(2, 12)], ValueError, r"frame_features\[0\]: got shape \[2, 12\], want \[T, H\*W, 12\]"),
        ([clip(1, 2, 16, 12)], ValueError, r"frame_features\[0\]: got shape \[1, 2, 16, 12\]"),
        ([clip(2, 16, 13)], ValueError, r"frame_features\[0\]: got shape \[2, 16, 13\], want \[T, H\*W, 12\]"),
        ([clip(2, 12, 16)], ValueError, r"frame_features\[0\]: got shape \[2, 12, 16\]"),
        ([clip(0, 16, 12)], ValueError, r"frame_features\[0\]: got no frames"),
        ([clip(2, 0, 12)], ValueError, r"frame_features\[0\]: got 0 tokens a frame, want a square number"),
        ([clip(2, 6, 12)], ValueError, r"frame_features\[0\]: got 6 tokens a frame, want a square number"),
        ([clip(1, 6, 12)], ValueError, r"frame_features\[0\]: got 6 tokens a frame, want a square number"),
        ([clip(2, 17, 12)], ValueError, r"frame_features\[0\]: got 17 tokens .*drop the tower's class token"),
        ([clip(device="meta")], ValueError, r"frame_features\[0\]: got a tensor on meta, want cpu"),
        ([clip(), clip()], ValueError, "frame_features: got 2 videos, want 1"),
        ([], ValueError, "frame_features: got 0 videos, want 1"),
        ((), ValueError, "frame_features: got 0 videos, want 1"),
        (None, ValueError, "frame_features: got 0 videos, want 1"),
    ],
)
def test_wrong_features_are_refused(model, videos, error, message):
    with pytest.raises(error, match=message):
        forward(model, videos=videos)


@pytest.mark.parametrize("empty", [None, [], ()])
def test_no_video_is_none_or_empty(model, empty):
    ids = ids_of([1, 2, 3])
    assert torch.equal(model(ids, empty).logits, model(ids).logits)


def test_features_may_come_as_a_tuple_and_not_contiguous(model):
    (video,) = features((4, 4))
    spread = video.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(forward(model, videos=(spread,)).logits, forward(model, videos=[video]).logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn])
def test_under_autocast_features_that_it_does_not_cast_are_refused(model, dtype):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=rf"frame_features\[0\]: got {dtype}"):
        forward(model, videos=[clip(dtype=dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_under_autocast_features_of_any_precision_are_taken(model, dtype):
    with torch.autocast("cpu", torch.bfloat16):
        assert forward(model, videos=[clip(dtype=dtype)]).logits.isfinite().all()


def test_nothing_that_is_passed_in_is_changed(model):
    ids, mask = padded(PROMPTS, "left")
    labels = ids.masked_fill((mask == 0) | (ids == VIDEO), -100)
    videos = features(*PROMPT_VIDEOS)
    before = [x.clone() for x in (ids, mask, labels, *videos)]
    model(ids, videos, mask, labels)
    model.generate(ids, videos, mask, max_new_tokens=2)
    assert len(videos) == len(PROMPT_VIDEOS)
    assert all(torch.equal(x, y) for x, y in zip((ids, mask, labels, *videos), before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1, 2]],), "input_ids: got list"),
        ((ids_of([1, 2]).float(),), "input_ids: got torch.float32"),
        ((ids_of([1, VIDEO]), clip()), "frame_features: got Tensor"),
        ((ids_of([1, 2]), None, torch.zeros(1, 2)), "attention_mask: got torch.float32"),
    ],
)
def test_generate_refuses_the_same(model, arguments, message):
    with pytest.raises(TypeError, match=message):
        model.generate(*arguments, max_new_tokens=2)


# -------------------------------------------------------------------------------------------------------- encoding


class Tower(nn.Module):
    """Without a weight: a frame's pixels are its features; ``result`` makes of them what is returned."""

    def __init__(self, result=lambda x: x) -> None:
        super().__init__()
        self.result = result
        self.sizes = []

    def forward(self, pixels):
        self.sizes.append(len(pixels))
        return self.result(pixels.flatten(2).transpose(1, 2))


FRAMES = torch.arange(5 * 4 * 4 * 3).remainder(256).to(torch.uint8).view(5, 4, 4, 3)


@pytest.mark.parametrize(
    "chunk", [2, np.int64(2), np.uint8(2), torch.tensor(2)], ids=["int", "numpy", "narrow", "tensor"]
)
def test_frames_are_encoded_a_chunk_at_a_time(chunk):
    tower = Tower()
    assert torch.equal(encode_frames(tower, FRAMES, chunk=chunk), FRAMES.flatten(1, 2) / 255)
    assert tower.sizes == [2, 2, 1]


@pytest.mark.parametrize(
    ("chunk", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        pytest.param(-(10**5000), ValueError, id="of more digits than Python prints"),
        *((wrong, TypeError) for wrong in (2.0, np.float32(2), True, np.True_, torch.tensor(True), "2", None, [2])),
        *((wrong, TypeError) for wrong in (np.array([2]), torch.tensor([2]), torch.tensor([2, 3]), torch.tensor(2.0))),
    ],
)
def test_a_chunk_that_is_no_count_is_refused(chunk, error):
    with pytest.raises(error, match=r"chunk: got .*, want a number of frames >= 1"):
        encode_frames(Tower(), FRAMES, chunk=chunk)


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (FRAMES.numpy(), TypeError, r"frames: got numpy uint8.*, want a tensor"),
        (list(FRAMES), TypeError, r"frames: got list .*, want a tensor"),
        (None, TypeError, "frames: got NoneType"),
        (sparse(FRAMES), TypeError, "frames: got a tensor of layout torch.sparse_coo"),
        (FRAMES.float(), TypeError, "frames: got torch.float32, want uint8"),
        (FRAMES.long(), TypeError, "frames: got torch.int64, want uint8"),
        (FRAMES[0], ValueError, r"frames: got shape \[4, 4, 3\]"),
        (FRAMES.permute(0, 3, 1, 2), ValueError, r"frames: got shape \[5, 3, 4, 4\]"),
        (FRAMES[:0], ValueError, r"frames: got shape \[0, 4, 4, 3\]"),
        (FRAMES[:, :0], ValueError, r"frames: got shape \[5, 0, 4, 3\]"),
    ],
)
def test_wrong_frames_are_refused(frames, error, message):
    with pytest.raises(error, match=message):
        encode_frames(Tower(), frames)


def test_frames_without_memory_are_refused():
    with pytest.raises(ValueError, match="frames: got a tensor on meta"):
        encode_frames(Tower(), FRAMES.to("meta"))


def test_a_chunk_may_be_larger_than_any_video():
    tower = Tower()
    encode_frames(tower, FRAMES, chunk=10**30)
    assert tower.sizes == [5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("grid", [2, 3], ids=["as_they_are", "resized"])
def test_a_tower_computes_in_the_dtype_of_its_weights(grid, dtype):
    tower = PatchTower(12, grid=grid, patch=2)
    expected = encode_frames(tower, FRAMES)
    features = encode_frames(tower.to(dtype), FRAMES)
    assert features.dtype == dtype
    torch.testing.assert_close(features.float(), expected, atol=0.1, rtol=0)


def test_a_tower_whose_grid_differs_between_frames_is_refused():
    tower = Tower(lambda x: x if len(x) == 2 else x[:, :9])
    with pytest.raises(ValueError, match=r"^tower: got features \(9, 3\) and \(16, 3\) a frame"):
        encode_frames(tower, FRAMES, chunk=2)


def test_a_towers_weights_may_begin_with_integers():
    tower = PatchTower(12, grid=2, patch=2)
    expected = encode_frames(tower, FRAMES)
    tower.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
    tower._parameters = {"scales": nn.Parameter(torch.ones(1, dtype=torch.int8), False)} | tower._parameters
    assert torch.equal(encode_frames(tower, FRAMES), expected)


def test_a_tower_of_buffers_alone_computes_in_their_dtype():
    tower = Tower()
    tower.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
    assert encode_frames(tower, FRAMES).dtype == torch.float64


def test_a_tower_is_frozen_unless_the_caller_asks():
    """Its parameters require gradients, as those of every new module, and gradients are enabled."""
    assert not encode_frames(PatchTower(12, grid=2, patch=2), FRAMES).requires_grad


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_reach_a_tower_that_keeps_its_graph_where_they_are_enabled(grad, frozen):
    tower = PatchTower(12, grid=2, patch=2).requires_grad_(not frozen)
    with torch.set_grad_enabled(grad):
        features = encode_frames(tower, FRAMES, chunk=2, keep_graph=True)
    assert features.requires_grad == (grad and not frozen)
    if features.requires_grad:
        features.square().sum().backward()
        assert all(weight.grad.abs().sum() > 0 for weight in tower.parameters())


@pytest.mark.parametrize(("keep_graph", "enabled"), [(False, True), (True, False), (False, False)])
def test_activations_do_not_outlive_their_chunk_where_no_graph_is_kept(keep_graph, enabled):
    alive = []
    tower = PatchTower(12, grid=2, patch=2)
    activations: list[weakref.ref] = []

    def count(module, arguments, output):
        alive.append(sum(x() is not None for x in activations))
        activations.append(weakref.ref(output))

    tower.mlp[1].register_forward_hook(count)
    with torch.set_grad_enabled(enabled):
        features = encode_frames(tower, FRAMES, chunk=2, keep_graph=keep_graph)
    assert alive == [0, 0, 0]
    assert features.grad_fn is None


@pytest.mark.parametrize("enabled", [True, False])
def test_encoding_leaves_the_callers_grad_mode_as_it_was(enabled):
    with torch.set_grad_enabled(enabled):
        encode_frames(Tower(), FRAMES)
        assert torch.is_grad_enabled() == enabled
        with pytest.raises(ValueError, match="tower"):
            encode_frames(Tower(lambda x: x[:1]), FRAMES)
        assert torch.is_grad_enabled() == enabled


@pytest.mark.parametrize("wrong", ["no", 2, None, 1.0])
def test_a_keep_graph_that_is_no_flag_is_refused(wrong):
    with pytest.raises(TypeError, match=r"^keep_graph: got .*, want True or False"):
        encode_frames(Tower(), FRAMES, keep_graph=wrong)


@pytest.mark.parametrize("tower", [lambda x: x, None, "siglip"])
def test_a_tower_that_is_no_module_is_refused(tower):
    with pytest.raises(TypeError, match=r"tower: got .*, want a torch.nn.Module"):
        encode_frames(tower, FRAMES)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda x: (x,), TypeError, "tower: got tuple as its result"),
        (lambda x: [x], TypeError, "tower: got list as its result"),
        (lambda x: {"last_hidden_state": x}, TypeError, "tower: got dict as its result.*hidden_states"),
        (lambda x: None, TypeError, "tower: got NoneType as its result"),
        (lambda x: x.numpy(), TypeError, "tower: got ndarray as its result"),
        (lambda x: x.mean(1), ValueError, r"tower: got shape \[5, 3\] as its result, want a tensor \[5, H\*W"),
        (lambda x: x[:1], ValueError, r"tower: got shape \[1, 16, 3\] as its result"),
        (lambda x: x.transpose(1, 2).unflatten(2, (4, 4)), ValueError, r"\[5, 3, 4, 4\] .*feature map"),
        (lambda x: x[:, :0], ValueError, r"tower: got shape \[5, 0, 3\] as its result"),
        (lambda x: x.int(), TypeError, "tower: got torch.int32 as its result.*floating point"),
        (lambda x: x.to_sparse(), TypeError, "tower: got a tensor of layout torch.sparse_coo"),
    ],
    ids=[
        "tuple",
        "list",
        "dict",
        "none",
        "array",
        "pooled",
        "fewer_frames",
        "feature_map",
        "no_tokens",
        "ids",
        "sparse",
    ],
)
def test_a_tower_that_does_not_return_features_is_refused(result, error, message):
    with pytest.raises(error, match=message):
        encode_frames(Tower(result), FRAMES)


def test_an_output_object_of_transformers_is_refused_by_name():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    tower = Tower(lambda x: outputs.BaseModelOutput(last_hidden_state=x, hidden_states=(x, x)))
    with pytest.raises(TypeError, match=r"tower: got BaseModelOutput as its result.*hidden_states\[-2\]"):
        encode_frames(tower, FRAMES)
