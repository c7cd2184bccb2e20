"""bench released: each stage of a released model on what the one before it made, from a file to an answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench_cases import CPU
from torch.backends import cuda

from bench import __main__ as cli
from bench import released, report, selection
from bench.model import find_video
from bench.released_shapes import RELEASED, RELEASED_ON_CPU
from bench.runner import Row

(SHAPE,) = RELEASED_ON_CPU
needs_transformers = pytest.mark.skipif(released.why_absent(SHAPE) is not None, reason=str(released.why_absent(SHAPE)))


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def a_pipeline(video: Path | None) -> released.Pipeline:
    return released.Pipeline(SHAPE, released.make_model(SHAPE, "float32", CPU), video)


@pytest.fixture
def measured(run, monkeypatch):
    monkeypatch.setattr(released, "find_video", lambda: None)
    released.run(run, None)
    return run


def test_a_full_run_takes_the_three_released_models():
    assert [shape.name for shape in selection.released_shapes([], on_cpu=False)] == ["64-s1t4", "96-s1t6", "128-s2t4"]
    for shape in RELEASED:
        assert shape.sampling * shape.temporal * shape.model.fast_frames == shape.frames
        assert (shape.tower, shape.tower_width) == ("convnext", 3072)
    (longer,) = selection.released_shapes(["256-s4t4"], on_cpu=False)
    assert (longer.frames, longer.sampling, longer.model.hidden) == (256, 4, 3584)
    assert selection.released_shapes(["64-s1t4"], on_cpu=True)[0].model.hidden == SHAPE.model.hidden
    with pytest.raises(ValueError, match=r"0-s1t4.* want "):
        selection.check_shapes(["0-s1t4"], ["released"])


@needs_transformers
def test_without_a_file_the_other_stages_are_measured_all_the_same(measured):
    rows = {row.who: row for row in measured.journal.rows}
    stages = ["preprocess", "tower", "project and pool", "K and V", "prefill", "a token", "frames to 16 tokens"]
    assert list(rows) == ["decode", *stages]
    assert rows["decode"].status.startswith("absent: no video")
    for stage in stages:
        assert rows[stage].ok
        assert rows[stage].method == "wall"
    side = 56 // 14 // 2
    rows_of_prompt = released.BEFORE + released.AFTER + 4 * side**2
    assert rows["prefill"].extra == {"rows": rows_of_prompt, "slow_tokens": 8 * side**2}


@needs_transformers
def test_a_file_is_decoded_and_answered_about(run):
    video = find_video()
    if video is None:
        pytest.skip("no sample video")
    pipeline = a_pipeline(Path(video))
    stages = {stage.who: stage for stage in pipeline.stages()}
    whole = f"file to {released.ANSWER} tokens"
    assert next(iter(stages)) == f"decode {video.name}"
    assert list(stages)[-1] == whole
    for who in (f"decode {video.name}", whole):
        assert stages[who].is_right(stages[who].call())


@needs_transformers
def test_what_attends_runs_as_in_ask_whatever_lengths_came_before():
    pipeline, seen = a_pipeline(None), []
    assert len(pipeline.features) == SHAPE.frames  # made before they are asked for
    for module in (pipeline.model.vision_tower, pipeline.model.language_model):
        module.register_forward_pre_hook(lambda *given: seen.append(cuda.cudnn_sdp_enabled()))
    for stage in pipeline.stages():
        seen.clear()
        stage.call()
        assert bool(seen) == (stage.who in ("tower", "prefill", "a token", "frames to 16 tokens"))
        assert not any(seen)
        assert cuda.cudnn_sdp_enabled()


@needs_transformers
def test_a_wrong_answer_is_seen():
    pipeline = a_pipeline(None)
    right = {stage.who: stage.is_right for stage in pipeline.stages()}
    nothing = torch.tensor([float("nan")])
    assert not right["tower"]([nothing])
    assert not right["project and pool"]((nothing, torch.zeros(1), []))
    assert not right["frames to 16 tokens"](torch.zeros(1, 3))


@needs_transformers
def test_a_token_follows_the_prompt_in_its_cache():
    pipeline = a_pipeline(None)
    want = pipeline.model(
        torch.cat([pipeline.ids, pipeline.ids[:, -1:]], 1), video_features=[pipeline.features], logits_to_keep=1
    ).logits
    torch.testing.assert_close(pipeline.step(pipeline.cache), want, atol=1e-4, rtol=1e-4)
    layers = pipeline.keys_and_values()
    assert [len(kv) for kv in layers] == [len(pipeline.slow)] * 2


@needs_transformers
def test_one_model_takes_the_strides_of_each_shape(run, monkeypatch):
    prompts, make = [], released.make_model
    models = []
    monkeypatch.setattr(released, "make_model", lambda *given: models.append(make(*given)) or models[-1])
    monkeypatch.setattr(released.Pipeline, "stages", lambda self: prompts.append(self.ids.shape[1]) or [])
    run.shapes = ["8-s1t2", "8-s1t1", "8-s2t1"]
    released.run(run, None)
    side, text = 56 // 14 // 2, released.BEFORE + released.AFTER
    assert prompts == [text + fast_frames * side**2 for fast_frames in (4, 8, 4)]
    assert len(models) == 1


def test_what_is_missing_is_a_row(run, monkeypatch):
    monkeypatch.setattr(released, "why_absent", lambda shape: "no timm here")
    released.run(run, None)
    (row,) = run.journal.rows
    assert row.status == "absent: no timm here"


@pytest.mark.parametrize("memory", [True, False])
def test_the_table_has_a_line_a_stage_with_its_memory_where_it_was_measured(memory):
    extra = {"held_bytes": 17 << 30, "peak_bytes": 3 << 29} if memory else {}
    rows = [
        Row("released", "64-s1t4", "float16", who, "ours", median_us=ms * 1e3, p20_us=900, p80_us=2e3, extra=extra)
        for who, ms in (("tower", 812.5), ("a token", 1.5))
    ]
    header, first, second = report.stages_table(rows)
    assert header[:5] == ["shape", "dtype", "stage", "ms", "p20 .. p80"]
    assert first[2:5] == ["tower", "812.5", "0.9000 .. 2.000"]
    assert second[2] == "a token"
    assert first[5:] == (["17.00", "1.50"] if memory else [])


def test_all_leaves_it_out_and_it_runs_by_its_name():
    names = cli.parser().parse_args([]), cli.parser().parse_args(["released"])
    assert "released" not in cli._chosen(names[0])
    assert cli._chosen(names[1]) == ("released",)
