"""Training: recomputation, Trainer, PEFT, and what data-parallel ranks of text alone take part in."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import two_ranks
from families import (
    FAMILIES,
    HYBRID,
    STRIDES,
    VIDEO,
    WIDTH,
    batch,
    close,
    close_gates,
    language_model,
    prompt,
    slow_fast_model,
    video,
)
from parallel_worker import TRAINABLE, WRAPPERS, build, loss
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments
from two_ranks import assert_gradients, saved_by, train

from slowfast_model.hf import SlowFastVLForConditionalGeneration, add_slow_fast
from slowfast_model.hf._versions import CACHE

WORKER = Path(__file__).with_name("parallel_worker.py")
every_family = pytest.mark.parametrize("family", FAMILIES)


def a_batch(model):
    videos = [video(8), video(3), video(4)]
    rows = [prompt(model, 3, videos[0], 4), prompt(model, 5), prompt(model, 1, *videos[1:], 4)]
    inputs = batch(rows, "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs | {"video_features": videos, "labels": labels}


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_family
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_recomputation_gives_the_same_gradients(family, reentrant):
    model = slow_fast_model(family).train()
    inputs = a_batch(model)
    want = gradients(model, inputs)
    assert want.keys() == dict(model.named_parameters()).keys()
    calls = []
    for attention in model.hybrid_attentions():
        attention.cross_attn_kv_proj.register_forward_hook(lambda *_: calls.append(1))
    gradients(model, inputs)
    assert len(calls) == len(HYBRID)
    options = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    model.gradient_checkpointing_enable(**options)
    calls.clear()
    got = gradients(model, inputs)
    assert len(calls) == 2 * len(HYBRID)
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        close(gradient, want[name])
    again = gradients(model, inputs)  # nothing of the first pass is left
    assert all(torch.equal(again[name], gradient) for name, gradient in got.items())
    model.gradient_checkpointing_disable()
    calls.clear()
    gradients(model, inputs)
    assert len(calls) == len(HYBRID)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_under_a_frozen_language_model(reentrant):
    model = slow_fast_model().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("cross_attn_" in name or "mm_projector" in name)
    inputs = a_batch(model)
    want = gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    got = gradients(model, inputs)
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        close(gradient, want[name])


@every_family
def test_text_alone_trains_the_same_parameters(family):
    """With zeros where there is no video, so that data-parallel ranks agree on what takes part."""
    model = slow_fast_model(family).train()
    inputs = batch([prompt(model, 5)]) | {"labels": torch.tensor([prompt(model, 5)])}
    found = gradients(model, inputs)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, gradient in found.items():
        assert gradient.any() == ("cross_attn_" not in name and "mm_projector" not in name), name
    with torch.no_grad():
        loss = model(**inputs).loss
        close(model.eval()(**inputs).loss, loss, 1e-6)


def test_a_closed_gate_trains_the_warm_up_alone():
    model = slow_fast_model().train()
    close_gates(model)
    for name, gradient in gradients(model, a_batch(model)).items():
        if "cross_attn_" in name:
            assert gradient.any() == ("warm_up" in name), name


# --------------------------------------------------------------------------------------------------------- Trainer


class Clips(torch.utils.data.Dataset):
    """Eight samples; every other has a video, one has two."""

    def __init__(self, model):
        generator = torch.Generator().manual_seed(3)
        self.samples = []
        for i in range(8):
            videos = [torch.randn(4, 16, 12, generator=generator) for _ in range((i % 2) + (i == 3))]
            row = torch.randint(3, 98, (4,), generator=generator).tolist()
            for features in videos:
                row += [VIDEO] * model.config.num_fast_tokens(*features.shape[:2])
            row += torch.randint(3, 98, (3 + i % 3,), generator=generator).tolist()
            self.samples.append({"ids": row, "videos": videos})

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def collate(samples):
    inputs = batch([sample["ids"] for sample in samples], "right")
    is_target = (inputs["attention_mask"] != 0) & (inputs["input_ids"] != VIDEO)  # Trainer counts them
    is_target[:, 0] = False
    labels = inputs["input_ids"].masked_fill(~is_target, -100)
    return inputs | {"labels": labels, "video_features": [x for sample in samples for x in sample["videos"]]}


def trainer(model, folder, **settings) -> Trainer:
    common = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 2}
    common |= {"remove_unused_columns": False, "report_to": "none"}
    common |= {"logging_steps": 1, "seed": 1, "use_cpu": True, "dataloader_pin_memory": False, "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(folder), **common | {"max_steps": 20, "save_steps": 10} | settings)
    return Trainer(model=model, args=arguments, train_dataset=Clips(model), data_collator=collate)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_lowers_the_loss_and_resumes_as_if_it_had_not_stopped(checkpointing, tmp_path):
    model = slow_fast_model()
    start = copy.deepcopy(model)
    whole = trainer(model, tmp_path / "whole", gradient_checkpointing=checkpointing)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 20
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    checkpoint = tmp_path / "whole" / "checkpoint-10"
    resumed = trainer(copy.deepcopy(start), tmp_path / "resumed", gradient_checkpointing=checkpointing)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for (name, got), want in zip(resumed.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(got, want), name
    loaded = SlowFastVLForConditionalGeneration.from_pretrained(tmp_path / "whole" / "checkpoint-20")
    for (name, got), want in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(got, want), name


def test_trainer_evaluates(tmp_path):
    model = slow_fast_model()
    worker = trainer(model, tmp_path, max_steps=1, save_strategy="no", per_device_eval_batch_size=2)
    data = Clips(model)
    metrics = worker.evaluate(data)
    with torch.no_grad():
        inputs = [collate([data[i], data[i + 1]]) for i in range(0, 8, 2)]
        losses = [model.eval()(**x).loss for x in inputs]
    assert metrics["eval_loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


# ------------------------------------------------------------------------------------------------------------ PEFT


@every_family
def test_adapters_on_every_linear_layer(family, tmp_path):
    model = slow_fast_model(family)
    base = copy.deepcopy(model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    names = {name for name, _ in adapted.named_parameters() if "lora_A" in name}
    for part in ("cross_attn_kv_proj", "cross_attn_gate_proj.0", "mm_projector", "q_proj", "down_proj"):
        assert any(part in name for name in names), part
    assert adapted.get_nb_trainable_parameters()[0] > 0
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    inputs = a_batch(adapted.get_base_model())
    found = gradients(adapted.train(), inputs)
    assert names <= found.keys()
    assert all(found[name].any() for name in names)
    adapted.eval()

    ids, features = inputs["input_ids"][:1], inputs["video_features"][:1]
    call = {"video_features": features, "attention_mask": inputs["attention_mask"][:1]}
    with torch.no_grad():
        logits = adapted(input_ids=ids, **call).logits
        new = adapted.generate(input_ids=ids, **call, max_new_tokens=4, do_sample=False)
        assert (logits - base(ids, **call).logits).abs().max() > 1e-3
        close(adapted.train()(input_ids=ids, **call).logits, logits, 1e-6)
        adapted.eval().save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        close(loaded(input_ids=ids, **call).logits, logits, 1e-6)
        merged = adapted.merge_and_unload()
        assert isinstance(merged, SlowFastVLForConditionalGeneration)
        close(merged(ids, **call).logits, logits, 5e-5)
        assert torch.equal(merged.generate(ids, **call, max_new_tokens=4, do_sample=False), new)


def test_a_gate_that_is_saved_whole_beside_adapters(tmp_path):
    model = slow_fast_model()
    base = copy.deepcopy(model)
    settings = {"target_modules": ["q_proj", "cross_attn_kv_proj"], "modules_to_save": ["cross_attn_gate_proj"]}
    adapted = get_peft_model(model, LoraConfig(r=2, **settings))
    inputs = a_batch(adapted.get_base_model())
    found = gradients(adapted.train(), inputs)
    assert any("modules_to_save" in name and gradient.any() for name, gradient in found.items())
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        want = adapted.eval()(**inputs).logits
        adapted.save_pretrained(tmp_path)
        close(PeftModel.from_pretrained(base, tmp_path).eval()(**inputs).logits, want, 1e-6)


@pytest.mark.parametrize("start", [0.0, 0.1])
@pytest.mark.parametrize("unfrozen", [False, True])
def test_adapters_behind_closed_gates_are_warned_of(start, unfrozen):
    """PEFT freezes the warm-up gate: where that is 0, no adapter of the slow path ever gets a gradient."""
    model = add_slow_fast(language_model(), WIDTH, HYBRID, video_token_id=VIDEO, warm_up_init=start, **STRIDES)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).train()
    for attention in model.hybrid_attentions():
        attention.cross_attn_warm_up_gate.requires_grad_(unfrozen)
    inputs = a_batch(model)
    closed = start == 0 and not unfrozen
    for is_told in (closed, False):  # once
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = gradients(adapted, inputs)
        assert any("cross_attn_warm_up_gate" in str(warning.message) for warning in caught) == is_told
    opens = {n for n, g in found.items() if g.any() and ("cross_attn_gate_proj" in n or "warm_up" in n)}
    assert bool(opens) != closed


# ------------------------------------------------------------------------------------------------- data parallel


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two processes saved."""
    folder = tmp_path_factory.mktemp("parallel")
    train(WORKER, folder)
    return saved_by(folder)


@pytest.mark.slow
@pytest.mark.xdist_group("parallel")
def test_two_ranks_of_which_one_has_text_alone_have_the_gradients_of_one_process(ranks):
    for wrapper in WRAPPERS:
        for trainable in TRAINABLE:
            expected = two_ranks.gradients(build(trainable), loss, lambda step: (0, 1))
            for saved in ranks:
                assert_gradients(saved[wrapper, trainable], expected)


def test_the_cache_of_a_sharded_model_that_casts_its_inputs_has_the_videos():
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = slow_fast_model()
    features = video()
    inputs = batch([prompt(model, 3, features, 4)]) | {"video_features": [features]}
    options = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        settings = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
        for layer in model.get_decoder().layers:
            fully_shard(layer, **settings)
        fully_shard(model, **settings)
        out = model.generate(**inputs, **options)
        assert set(getattr(out, CACHE).videos.kv) == set(HYBRID)
    finally:
        torch.distributed.destroy_process_group()


def test_the_language_model_is_that_of_the_configuration():
    """A model from its configuration alone has the parts, random and closed."""
    config = slow_fast_model().config
    model = SlowFastVLForConditionalGeneration(copy.deepcopy(config))
    assert model.state_dict().keys() == slow_fast_model(lm=language_model()).state_dict().keys()
    assert all(not a.cross_attn_warm_up_gate.any() for a in model.hybrid_attentions())
