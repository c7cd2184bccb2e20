"""What a forward pass computes, family by family: the base model's answers, a dense mask's, padding, packing."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
import transformers
from families import (
    FAMILIES,
    GRID,
    HYBRID,
    STRIDES,
    VIDEO,
    WIDTH,
    batch,
    close,
    language_model,
    open_gates,
    prompt,
    slow_fast_model,
    twin,
    video,
)

from slowfast_model.config import GATING_TYPES, IMPLEMENTATIONS
from slowfast_model.hf import add_slow_fast
from slowfast_model.vision import project_and_pool


def attentions():
    """Each family with what it can attend by; Gemma 2 has no sdpa since 5.x."""
    return [(family, kind) for family in FAMILIES for kind in ("sdpa", "eager") if (family, kind) != ("gemma2", "sdpa")]


every_family = pytest.mark.parametrize("family", FAMILIES)


# ------------------------------------------------------------------------------------------------ the base model


@pytest.mark.parametrize(("family", "attention"), attentions())
def test_with_a_closed_gate_logits_are_the_base_models_bit_for_bit(family, attention):
    lm = language_model(family)
    lm.set_attn_implementation(attention)
    base = twin(lm)
    model = add_slow_fast(lm, WIDTH, HYBRID, video_token_id=VIDEO, **STRIDES)
    assert model.config._attn_implementation == attention
    features = video()
    inputs = batch([prompt(model, 3, features, 4), prompt(model, 5)])
    with torch.no_grad():
        got = model(**inputs, video_features=[features]).logits
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        _, fast, _ = project_and_pool(model.mm_projector, [features], model.slow_fast, None, None)
        embeddings[inputs["input_ids"] == VIDEO] = fast / model._factor_like(fast)
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        want = base(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], position_ids=positions).logits
    assert torch.equal(got, want)


@pytest.mark.parametrize(("family", "attention"), attentions())
def test_text_alone_is_the_base_models_bit_for_bit_with_open_gates_too(family, attention):
    lm = language_model(family)
    lm.set_attn_implementation(attention)
    base = twin(lm)
    model = slow_fast_model(lm=lm)
    ids = torch.tensor([prompt(model, 9)])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)


@pytest.mark.parametrize("family", [*FAMILIES, "granite"])
def test_fast_tokens_enter_the_first_layer_as_the_projector_gives_them(family):
    """Though Gemma 2's decoder (4.57) and Granite's multiply what they are given."""
    if family == "granite":
        config = transformers.GraniteConfig(**FAMILIES["llama"][1], embedding_multiplier=3.0)
        model = slow_fast_model(lm=transformers.AutoModelForCausalLM.from_config(config).eval())
    else:
        model = slow_fast_model(family)
    features, entered = video(), []

    def see(module, args, kwargs):
        entered.append(args[0] if args else kwargs["hidden_states"])

    model.get_decoder().layers[0].register_forward_pre_hook(see, with_kwargs=True)
    ids = torch.tensor([prompt(model, 3, features, 4)])
    with torch.no_grad():
        model(ids, video_features=[features])
        _, fast, _ = project_and_pool(model.mm_projector, [features], model.slow_fast, None, None)
    close(entered[0][ids == VIDEO], fast, 1e-6)


@every_family
def test_kv_starts_as_the_layers_own(family):
    lm = language_model(family)
    model = add_slow_fast(lm, WIDTH, HYBRID, video_token_id=VIDEO)
    for attention in model.hybrid_attentions():
        x = torch.randn(5, lm.config.hidden_size)
        k, v = attention.cross_attn_kv_proj(x).view(5, -1, 2, attention.head_dim).unbind(2)
        close(k.flatten(1), attention.k_proj(x), 1e-6)
        close(v.flatten(1), attention.v_proj(x), 1e-6)
        assert not attention.cross_attn_warm_up_gate.any()
        assert not attention.cross_attn_gate_proj[0].bias.any()


def test_a_fused_projection_of_q_k_and_v_gives_k_and_v():
    sizes = FAMILIES["llama"][1] | {"original_max_position_embeddings": 256}
    lm = transformers.AutoModelForCausalLM.from_config(transformers.Phi3Config(**sizes)).eval()
    base = twin(lm)
    model = add_slow_fast(lm, WIDTH, HYBRID, video_token_id=VIDEO, **STRIDES)
    for attention in model.hybrid_attentions():
        x = torch.randn(5, 64)
        kv = attention.cross_attn_kv_proj(x).view(5, 2, 2, 16).unbind(2)
        own = attention.qkv_proj(x)[:, 64:].view(5, 2, 2, 16).unbind(1)
        for got, want in zip(kv, own, strict=True):
            close(got, want, 1e-6)
    open_gates(model)
    assert_as_under_a_dense_mask(model, base)


def test_a_fresh_start_opens_the_gate_as_asked():
    lm = language_model()
    model = add_slow_fast(lm, WIDTH, HYBRID, kv_init="fresh", warm_up_init=2.0, gate_bias_init=1.0)
    for attention in model.hybrid_attentions():
        assert attention.cross_attn_warm_up_gate == 2
        assert attention.cross_attn_gate_proj[0].bias == 1
        assert not attention.cross_attn_kv_proj.bias.any()
        assert 0.01 < attention.cross_attn_kv_proj.weight.std() < 0.03


# ------------------------------------------------------------------------------------------------ a dense mask


def dense(model, base, inputs, features, owners):
    """Logits by the oracle; ``owners``: the sample of each video."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    slow, fast, counts = project_and_pool(model.mm_projector, features, model.slow_fast, None, None)
    embeddings = model.get_input_embeddings()(ids)
    embeddings[ids == VIDEO] = fast / model._factor_like(fast)
    config, visual = model.slow_fast, ids == VIDEO
    sees = torch.zeros(*ids.shape, len(slow), dtype=torch.bool)
    start = 0
    for sample in range(len(ids)):
        seen = 0
        for (num_fast, num_slow), owner in zip(counts, owners, strict=True):
            if owner != sample:
                continue
            seen += num_fast
            complete = visual[sample].cumsum(0) >= seen
            rows = complete if config.causal_slow_tokens else torch.ones_like(complete)
            sees[sample, rows, start : start + num_slow] = True
            start += num_slow
        rows = mask[sample].clone()
        if not config.updates_every_row:
            rows &= ~visual[sample]
            if config.masks_system_text:
                rows &= visual[sample].cumsum(0) > 0
        sees[sample, ~rows] = False
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    given = {"attention_mask": inputs["attention_mask"], "position_ids": positions}
    return oracle.logits(model, base, embeddings, slow, sees, **given)


def assert_as_under_a_dense_mask(model, base):
    """Of a ragged batch of videos."""
    inputs, features, owners = ragged(model, "left")
    with torch.no_grad():
        got = model(**inputs, video_features=features).logits
        want = dense(model, base, inputs, features, owners)
    valid = inputs["attention_mask"].bool()
    close(got[valid], want[valid], 5e-5)


def ragged(model, side):
    """Samples with one video, none, two and three, of several lengths and grids."""
    features = [video(8), video(1), video(5, 36), video(4), video(2), video(7)]
    rows = [
        prompt(model, 3, features[0], 4),
        prompt(model, 6),
        prompt(model, features[1], 2, features[2], 1),
        prompt(model, 1, features[3], features[4], 3, features[5]),
    ]
    return batch(rows, side), features, [0, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [False, True], ids=["all videos", "causal"])
@every_family
def test_slow_tokens_are_read_as_under_a_dense_mask(family, side, causal):
    lm = language_model(family)
    base = twin(lm)
    model = slow_fast_model(lm=lm, causal_slow_tokens=causal)
    inputs, features, owners = ragged(model, side)
    with torch.no_grad():
        got = model(**inputs, video_features=features).logits
        want = dense(model, base, inputs, features, owners)
        without = model(**{name: x[1:2, -6:] if side == "left" else x[1:2, :6] for name, x in inputs.items()}).logits
    valid = inputs["attention_mask"].bool()
    close(got[valid], want[valid], 5e-5)
    close(got[1][valid[1]], without[0])


VARIANTS = [(gating, "text-only-vanilla-flashattn") for gating in GATING_TYPES]
VARIANTS += [("whole-dynamic-tanh-warmup", implementation) for implementation in IMPLEMENTATIONS]


@pytest.mark.parametrize(("gating", "implementation"), VARIANTS)
@pytest.mark.parametrize("projector", ["mlp2x_gelu"])
def test_every_variant_reads_as_under_a_dense_mask(gating, implementation, projector):
    lm = language_model()
    base = twin(lm)
    names = {"cross_attn_gating_type": gating, "cross_attn_implementation": implementation}
    model = slow_fast_model(lm=lm, mm_projector_type=projector, **names)
    assert_as_under_a_dense_mask(model, base)


def test_a_tensor_of_features_is_a_list_of_videos():
    model = slow_fast_model()
    features = torch.randn(2, 8, GRID, WIDTH)
    inputs = batch([prompt(model, 3, features[0], 4), prompt(model, features[1], 2)])
    with torch.no_grad():
        got = model(**inputs, video_features=features).logits
        assert torch.equal(got, model(**inputs, video_features=list(features)).logits)


def test_features_of_another_float_type_are_cast():
    model = slow_fast_model()
    features = video()
    ids = torch.tensor([prompt(model, 3, features, 4)])
    with torch.no_grad():
        got = model(ids, video_features=[features.double()]).logits
        assert torch.equal(got, model(ids, video_features=[features]).logits)


@every_family
def test_embeddings_stand_for_ids(family):
    model = slow_fast_model(family)
    features = video()
    ids = torch.tensor([prompt(model, 3, features, 4)])
    embeddings = model.get_input_embeddings()(ids)
    with torch.no_grad():
        got = model(inputs_embeds=embeddings, video_features=[features]).logits
        assert torch.equal(got, model(ids, video_features=[features]).logits)


def test_labels_on_placeholders_are_ignored():
    model = slow_fast_model()
    features = video()
    ids = torch.tensor([prompt(model, 3, features, 4)])
    with torch.no_grad():
        loss = model(ids, video_features=[features], labels=ids).loss
        without = model(ids, video_features=[features], labels=ids.masked_fill(ids == VIDEO, -100)).loss
        plain = model(ids, video_features=[features]).logits[0, :-1]
    assert torch.equal(loss, without)
    targets = ids[0, 1:].masked_fill(ids[0, 1:] == VIDEO, -100)
    close(loss, torch.nn.functional.cross_entropy(plain, targets), 1e-6)


@pytest.mark.parametrize("causal", [False, True], ids=["all videos", "causal"])
@pytest.mark.parametrize("implementation", ["text-only-vanilla", "text-only-vanilla-masksystem", "vanilla"])
@every_family
def test_packed_samples_share_nothing(family, causal, implementation):
    if family not in ("qwen2", "mistral", "gemma3") and implementation != "text-only-vanilla":
        implementation = "vanilla-flashattn"
    model = slow_fast_model(family, causal_slow_tokens=causal, cross_attn_implementation=implementation)
    features = [video(8), video(4), video(1)]
    rows = [prompt(model, 3, features[0], 4), prompt(model, 5), prompt(model, 2, features[1], 1, features[2], 2)]
    ids = torch.tensor([[token for row in rows for token in row]])
    positions = torch.tensor([[i for row in rows for i in range(len(row))]])
    with torch.no_grad():
        got = model(ids, position_ids=positions, video_features=features).logits[0]
        masked = model(ids, torch.ones_like(ids), position_ids=positions, video_features=features).logits[0]
        own = zip(rows, (features[:1], None, features[1:]), strict=True)
        alone = [model(torch.tensor([row]), video_features=videos).logits[0] for row, videos in own]
    close(got, torch.cat(alone))
    assert torch.equal(got, masked)


# ------------------------------------------------------------------------------ the reference model of this package


def reference(model):
    """SlowFastForCausalLM with the weights of a Qwen2 under the plug-in."""
    from slowfast_model import SlowFastConfig, SlowFastForCausalLM

    text = model.config.text_config.to_dict()
    keys = {"cross_attn_every_n_layers": 2, "mm_hidden_size": WIDTH, **STRIDES}
    kept = ("mm_projector_type", "cross_attn_gating_type", "cross_attn_implementation", "causal_slow_tokens")
    keys |= {name: getattr(model.config, name) for name in kept}
    config = SlowFastConfig.from_official({**text, **keys})
    assert config.hybrid_layers == HYBRID
    other = SlowFastForCausalLM(config)
    state = {}
    for name, value in model.state_dict().items():
        name = name.removeprefix("language_model.")
        state[name if not name.startswith("mm_projector") else f"model.{name}"] = value
    other.load_official_state_dict(state)
    return other.eval()


@pytest.mark.parametrize("implementation", ["text-only-vanilla", "text-only-vanilla-masksystem", "vanilla"])
@pytest.mark.parametrize("causal", [False, True], ids=["all videos", "causal"])
def test_a_qwen2_has_the_reference_models_logits_and_gradients(implementation, causal):
    model = slow_fast_model(cross_attn_implementation=implementation, causal_slow_tokens=causal)
    other = reference(model)
    inputs, features, _ = ragged(model, "right")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    ours = model(**inputs, video_features=features)

    rows = []
    queue = list(features)
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        row, ids = [], ids[mask.bool()].tolist()
        while ids:
            if ids[0] != VIDEO:
                row.append(ids.pop(0))
                continue
            row.append(-200)
            ids = ids[model.config.num_fast_tokens(*queue.pop(0).shape[:2]) :]
        rows.append(row)
    given = batch(rows, "right")
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    theirs = other(given["input_ids"], features, given["attention_mask"], labels)
    valid = theirs.attention_mask
    close(ours.logits[:, : valid.shape[1]][valid], theirs.logits[valid])
    close(ours.loss, theirs.loss, 1e-5)

    # float32 itself is off by 1e-4 of a gradient in some draws: both are held to float64.
    exact = copy.deepcopy(other).double()
    videos = [x.double() for x in features]
    for loss in (ours.loss, theirs.loss, exact(given["input_ids"], videos, given["attention_mask"], labels).loss):
        loss.backward()
    gradients = {name.removeprefix("language_model."): p.grad for name, p in model.named_parameters()}
    wanted = dict(exact.named_parameters())
    for name, parameter in other.named_parameters():
        got, want = gradients[name.removeprefix("model.") if "mm_projector" in name else name], wanted[name].grad
        assert got.any(), name
        own_error = float((parameter.grad - want).abs().max())
        assert (got - want).abs().max() <= 2 * own_error + 2e-5 * max(1.0, float(want.abs().max())), name


def test_the_projection_of_slow_tokens_runs_once_a_forward():
    model = open_gates(slow_fast_model())
    counts = []
    for attention in model.hybrid_attentions():
        attention.cross_attn_kv_proj.register_forward_hook(lambda *_: counts.append(1))
    features = video()
    ids = torch.tensor([prompt(model, 3, features, 4)])
    model(ids, video_features=[features])
    assert len(counts) == len(HYBRID)
    model.generate(ids, video_features=[features], max_new_tokens=5)
    assert len(counts) == 2 * len(HYBRID)
