"""What the model computes beyond the recorded runs: batching, padding, several videos, text alone, dtypes, backends."""

from __future__ import annotations

import pytest
import torch
from model_cases import MODEL_TARGETS, PROMPT_VIDEOS, PROMPTS, TINY, VIDEO, features, one_thread, padded, tiny_model  # noqa: F401

import slowfast_kernels as sk

every_target = pytest.mark.parametrize("target", MODEL_TARGETS)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def logits_of(model, prompts, videos, side="right"):
    """Logits of each sample's valid rows."""
    device = model.lm_head.weight.device
    ids, mask = (x.to(device) for x in padded(prompts, side))
    out = model(ids, features(*videos, device=device) if videos else None, mask)
    return [row[keep] for row, keep in zip(out.logits, out.attention_mask, strict=True)]


def without_cross_attention(model):
    """The same language model and projector, built without hybrid layers."""
    plain = tiny_model(model.backend, model.lm_head.weight.device, cross_attn_every_n_layers=0)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".cross_attn_" not in k})
    return plain


# ------------------------------------------------------------------------------------------ batching and padding


@every_target
@pytest.mark.parametrize("grad", [True, False], ids=["training_path", "inference_path"])
def test_a_batch_equals_its_samples_one_by_one(grad, target):
    model = tiny_model(target.backend, target.device)
    with torch.set_grad_enabled(grad):
        videos = features(*PROMPT_VIDEOS, device=target.device)
        ids, mask = (x.to(target.device) for x in padded(PROMPTS))
        out = model(ids, videos, mask)
        for b, (prompt, mine) in enumerate(zip(PROMPTS, (videos[:2], [], videos[2:]), strict=True)):
            alone = model(torch.tensor([prompt], device=target.device), mine).logits[0]
            torch.testing.assert_close(out.logits[b, : len(alone)], alone, **CLOSE)


@every_target
@torch.no_grad()
def test_left_padding_equals_right_padding(target):
    model = tiny_model(target.backend, target.device)
    right, left = (logits_of(model, PROMPTS, PROMPT_VIDEOS, side) for side in ("right", "left"))
    for a, b in zip(right, left, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_what_padding_holds_does_not_matter():
    model = tiny_model()
    ids, mask = padded(PROMPTS)
    other = ids.masked_fill(mask == 0, 50)
    videos = features(*PROMPT_VIDEOS)
    assert torch.equal(model(ids, videos, mask).logits, model(other, videos, mask).logits)


@every_target
@torch.no_grad()
def test_a_video_of_nan_stays_in_its_sample(target):
    model = tiny_model(target.backend, target.device)
    ids, mask = (x.to(target.device) for x in padded(PROMPTS))
    videos = features(*PROMPT_VIDEOS, device=target.device)
    expected = model(ids, videos, mask)
    out = model(ids, [videos[0], videos[1].fill_(float("nan")), videos[2]], mask)
    for b in (1, 2):
        keep = out.attention_mask[b]
        assert torch.equal(out.logits[b, keep], expected.logits[b, keep])
    assert out.logits[0].isnan().any()


# ------------------------------------------------------------------------------------------ videos and images


@torch.no_grad()
def test_two_videos_of_a_sample_attend_as_one_run_of_slow_tokens():
    model = tiny_model()
    clips = features((4, 4), (6, 4))
    _, _, slow = model.prepare(torch.tensor([[1, VIDEO, 2, VIDEO, 3]]), clips, None, None)
    parts = [model.prepare(torch.tensor([[1, VIDEO]]), [clip], None, None)[2].tokens for clip in clips]
    assert torch.equal(slow.tokens, torch.cat(parts))
    assert slow.cu_slow.tolist() == [0, sum(map(len, parts))]


@torch.no_grad()
def test_both_videos_of_a_sample_matter():
    model = tiny_model()
    first, second, other = features((4, 4), (4, 4), (4, 4))
    ids = torch.tensor([[1, VIDEO, 2, VIDEO, 3]])
    last = [model(ids, clips).logits[0, -1] for clips in ((first, second), (other, second), (first, other))]
    assert (last[0] - last[1]).abs().max() > 1e-2
    assert (last[0] - last[2]).abs().max() > 1e-2


@torch.no_grad()
def test_videos_on_different_grids_keep_their_order():
    model = tiny_model()
    clips = features((4, 4), (4, 6), (2, 4))
    ids = torch.tensor([[1, VIDEO, 2], [3, VIDEO, VIDEO]])
    _, _, slow = model.prepare(ids, clips, None, None)
    parts = [model.prepare(torch.tensor([[VIDEO]]), [clip], None, None)[2].tokens for clip in clips]
    torch.testing.assert_close(slow.tokens, torch.cat(parts))


@torch.no_grad()
def test_an_image_is_a_video_of_one_frame_without_the_first_pooling():
    model = tiny_model()
    _, layout, _ = model.prepare(torch.tensor([[1, VIDEO, 2]]), features((1, 6)), None, None)
    assert layout.slow_lengths == [36]


@torch.no_grad()
def test_slow_tokens_change_only_text_rows_in_the_first_hybrid_layer():
    model = tiny_model()
    ids = torch.tensor([[1, VIDEO, 2, 3]])
    x, layout, slow = model.prepare(ids, features((4, 4)), None, None)
    layer, rope = model.model.layers[0], model.rope(x.shape[1], x)
    changed = (layer(x, rope, slow, None, "eager") != layer(x, rope)).any(-1)
    assert torch.equal(changed, layout.token_types != 3)


# ------------------------------------------------------------------------------------------ text alone


@every_target
def test_text_alone_is_the_plain_language_model(target):
    model = tiny_model(target.backend, target.device)
    plain = without_cross_attention(model)
    ids = torch.tensor([[5, 6, 7, 8]], device=target.device)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert torch.equal(model(ids, []).logits, plain(ids, None).logits)


@torch.no_grad()
def test_a_call_leaves_nothing_behind():
    model = tiny_model()
    text, video = torch.tensor([[5, 6, 7]]), torch.tensor([[5, VIDEO, 7]])
    before = model(text).logits
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    model(video, features((4, 4)))
    model.generate(video, features((4, 4)), max_new_tokens=2)
    assert torch.equal(model(text).logits, before)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not [m for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]


# ------------------------------------------------------------------------------------------ the language model


@pytest.fixture(scope="module")
def qwen2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    config = transformers.Qwen2Config(
        **{key: TINY[key] for key in (*shared, "num_attention_heads", "num_key_value_heads")},
        rope_theta=TINY["rope_theta"],
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    reference = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.3)
    return reference


@every_target
@torch.no_grad()
def test_with_closed_warm_up_gates_the_model_is_transformers_qwen2(qwen2, target):
    model = tiny_model(target.backend, target.device)
    model.load_qwen2_state_dict(qwen2.state_dict())
    ids, mask = (x.to(target.device) for x in padded(PROMPTS))
    videos = features(*PROMPT_VIDEOS, device=target.device)
    x, layout, _ = model.prepare(ids, videos, mask, None)
    expected = qwen2.to(target.device)(inputs_embeds=x, attention_mask=layout.attention_mask.long()).logits
    valid = layout.attention_mask
    torch.testing.assert_close(model(ids, videos, mask).logits[valid], expected[valid], atol=2e-5, rtol=1e-5)


@every_target
@torch.no_grad()
def test_closed_warm_up_gates_give_the_model_without_cross_attention_bitwise(target):
    model = tiny_model(target.backend, target.device)
    for layer in model.config.hybrid_layers:
        model.model.layers[layer].self_attn.cross_attn_warm_up_gate.zero_()
    plain = without_cross_attention(model)
    for a, b in zip(*(logits_of(m, PROMPTS, PROMPT_VIDEOS) for m in (model, plain)), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------ dtypes


@every_target
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_near_float32(dtype, target):
    if target.backend == "triton" and target.device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter is wrong in bfloat16")
    model = tiny_model(target.backend, target.device)
    ids, mask = (x.to(target.device) for x in padded(PROMPTS))
    videos = features(*PROMPT_VIDEOS, device=target.device)
    exact = model(ids, videos, mask)
    half = model.to(dtype)(ids, [x.to(dtype) for x in videos], mask)
    assert half.logits.dtype == dtype
    error = (half.logits.float() - exact.logits)[exact.attention_mask].abs().max()
    assert error < (0.05 if dtype == torch.float16 else 0.4) * exact.logits.std()


@torch.no_grad()
def test_float32_parameters_run_under_autocast():
    model = tiny_model()
    ids, mask = padded(PROMPTS)
    videos = features(*PROMPT_VIDEOS)
    exact = model(ids, videos, mask)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(ids, videos, mask)
        ids_mixed = model.generate(ids, videos, mask, max_new_tokens=3)
    assert mixed.logits.dtype == torch.bfloat16
    assert (mixed.logits.float() - exact.logits)[exact.attention_mask].abs().max() < 0.4 * exact.logits.std()
    assert ids_mixed.shape == (3, 3)


@torch.no_grad()
def test_tied_embeddings_share_one_weight():
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(torch.tensor([[1, 2]])).logits.isfinite().all()


# ------------------------------------------------------------------------------------------ backends


@pytest.fixture
def recorded_backends(monkeypatch):
    """The backend= of every op call, by op."""
    calls: dict[str, list] = {}
    for name in ("slowfast_pool", "slowfast_cross_attention", "text_cross_attention"):
        op = getattr(sk, name)

        def record(*args, name=name, op=op, **options):
            calls.setdefault(name, []).append(options["backend"])
            return op(*args, **options)

        monkeypatch.setattr(sk, name, record)
    return calls


@torch.no_grad()
def test_the_backend_reaches_every_layer_and_eager_generates_without_a_kernel(recorded_backends):
    model = tiny_model("eager")
    model.generate(torch.tensor([[1, VIDEO, 2]]), features((4, 4)), max_new_tokens=3)
    hybrid = len(model.config.hybrid_layers)
    assert {backend for calls in recorded_backends.values() for backend in calls} == {"eager"}
    assert set(recorded_backends) == {"slowfast_pool", "slowfast_cross_attention"}
    assert len(recorded_backends["slowfast_cross_attention"]) == hybrid * 3


@torch.no_grad()
def test_without_a_backend_every_op_chooses(recorded_backends):
    tiny_model(None).generate(torch.tensor([[1, VIDEO, 2]]), features((4, 4)), max_new_tokens=2)
    assert {backend for calls in recorded_backends.values() for backend in calls} == {None}
    assert len(recorded_backends["text_cross_attention"]) == 3  # one decode step of three layers


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend"):
        tiny_model("fast")


# ------------------------------------------------------------------------------------------ bad input

ONE_VIDEO = torch.tensor([[1, VIDEO, 2]])


@pytest.mark.parametrize(
    ("clips", "error", "message"),
    [
        (torch.zeros(2, 16, 12), TypeError, "want a list"),
        ([torch.zeros(2, 16)], ValueError, r"frame_features\[0\].*want \[T, H\*W, 12\]"),
        ([torch.zeros(2, 16, 11)], ValueError, r"want \[T, H\*W, 12\]"),
        ([torch.zeros(0, 16, 12)], ValueError, "no frames"),
        ([torch.zeros(2, 15, 12)], ValueError, "square"),
        ([torch.zeros(2, 1, 12)], ValueError, "pool_stride"),
        ([torch.zeros(2, 16, 12, dtype=torch.float64)], TypeError, "float64"),
        ([torch.zeros(2, 16, 12)] * 2, ValueError, "got 2 videos, want 1"),
        (None, ValueError, "got 0 videos, want 1"),
    ],
)
def test_features_that_do_not_fit_are_refused(clips, error, message):
    with pytest.raises(error, match=message):
        tiny_model()(ONE_VIDEO, clips)


def test_a_model_without_projector_refuses_videos():
    model = tiny_model(mm_hidden_size=None)
    with pytest.raises(ValueError, match="no projector"):
        model(ONE_VIDEO, features((2, 4)))
