"""The sweeps behind heuristics: what they try, and that a wrong answer stops them. They run on a GPU only."""

import json

import pytest
import torch

from bench import inputs, tune_backward, tune_cuda, tuning
from bench.selection import parse_attention
from slowfast_kernels.heuristics.cuda import HopperConfig

SHAPE = parse_attention("2x3x70@4/2/16")
CPU = torch.device("cpu")


def answers(error: dict[str, float]):
    """A fused op whose answer is off by ``error[config]``."""

    def fused(config, x):
        return inputs.reference_mixed(x, inputs.reference_context(x)) + error[config]

    return fused


def sweep(error: dict[str, float]) -> list:
    sets = inputs.make_inputs(SHAPE, "bfloat16", CPU, cache_bytes=0)
    return tuning.sweep(list(error), answers(error), sets, CPU, budget_s=1e-3)


def test_a_sweep_times_every_config_and_ranks_them():
    rows = sweep({"own": 0.0, "other": 1e-4, "third": -1e-4})
    assert {config for _, config in rows} == {"own", "other", "third"}
    assert [us for us, _ in rows] == sorted(us for us, _ in rows)
    assert rows[0][0] > 0


@pytest.mark.parametrize("error", [{"own": 0.5}, {"own": float("nan")}], ids=["off", "nan"])
def test_a_wrong_heuristic_stops_the_sweep(error):
    with pytest.raises(AssertionError, match="own is wrong"):
        sweep(error)


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_a_wrong_config_stops_the_sweep(wrong):
    with pytest.raises(AssertionError, match="other differs from own"):
        sweep({"own": 0.0, "other": wrong})


@pytest.mark.parametrize("name", tuning.TABLE)
def test_the_hopper_sweep_starts_from_the_heuristic_and_repeats_nothing(name):
    shape = parse_attention(name)
    configs = list(tune_cuda.candidates(shape))
    assert configs[0] == tune_cuda.own_config(shape)
    assert len(set(configs)) == len(configs) >= 5
    assert all(config.cluster_size * config.num_groups <= -(-max(shape.slow) // config.block_n) for config in configs)
    packed = sum(shape.text) * shape.heads.num_q // shape.heads.num_kv
    for config in configs:
        assert packed <= 64 * config.consumers * config.max_tiles
        assert (config.max_tiles == configs[0].max_tiles) == (config.consumers == configs[0].consumers) or packed <= 64


def test_the_hopper_sweep_tries_either_number_of_consumers_where_a_sequence_fills_no_tile():
    configs = tune_cuda.candidates(parse_attention("16x8x2048"))
    assert {config.consumers for config in configs} == {1, 2}


def test_a_report_names_the_heuristic_s_choice_among_the_ranked():
    configs = [HopperConfig(2, cluster, 1, 4) for cluster in (2, 4, 8)]
    found = tuning.report(list(zip([10.0, 11.0, 12.0], configs, strict=True)), own=configs[1])
    assert (found["heuristic"]["us"], found["heuristic"]["cluster_size"]) == (11.0, 4)
    assert (found["best"]["us"], found["best"]["cluster_size"]) == (10.0, 2)
    assert [row["us"] for row in found["all"]] == [10.0, 11.0, 12.0]


def test_a_sweep_without_a_gpu_ends_with_a_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["tune"])
    with pytest.raises(SystemExit):
        tuning.run("A sweep.", tune=None, show=None)
    assert capsys.readouterr().err.endswith("error: needs a GPU\n")


def test_what_a_sweep_found_so_far_is_written_where_it_was_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    tuning.write(None, CPU, launches=[])
    tuning.write(tmp_path / "out.json", CPU, launches=[{"us": 1.5}])
    assert json.loads((tmp_path / "out.json").read_text()) == {
        "gpu": "a GPU",
        "torch": torch.__version__,
        "launches": [{"us": 1.5}],
    }


def gradients(monkeypatch, name: str) -> dict:
    monkeypatch.setattr(tune_backward, "BACKENDS", ("cpu", "eager"))
    sets = inputs.make_inputs(parse_attention(name), "bfloat16", CPU, cache_bytes=0)
    return tune_backward.tune(sets, CPU, budget_s=1e-3)


def test_gradients_are_timed_in_every_layout(monkeypatch):
    found = gradients(monkeypatch, "2x3x170@4/2/16")
    assert list(found) == ["whole", "slabs", "one video"]
    assert all(row["chosen"] == "cpu" and row["cpu_us"] > 0 and row["eager_us"] > 0 for row in found.values())
    assert list(gradients(monkeypatch, "1x3x170@4/2/16")) == ["whole"]


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_wrong_gradients_stop_the_sweep(monkeypatch, backend):
    right = tune_backward.InParts.backward

    def backward(passes, kept, again):
        return [grad * (1.5 if passes.backward_backend == backend else 1.0) for grad in right(passes, kept, again)]

    monkeypatch.setattr(tune_backward.InParts, "backward", backward)
    with pytest.raises(AssertionError, match=f"{backend} is wrong"):
        gradients(monkeypatch, "2x3x170@4/2/16")


def test_the_sweep_of_gradients_takes_shapes_of_its_table():
    assert all(parse_attention(name) for name in tune_backward.TABLE)
