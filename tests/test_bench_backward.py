"""Benchmarks of gradients: every competitor gives the reference's, and rows say what a call takes and if it varies."""

from __future__ import annotations

import sys
import types
from functools import partial

import pytest
import torch
from bench_cases import CPU

from bench import __main__ as cli
from bench import attention_backward, backward, backward_peers, backward_tables, inputs, mix, plots, pool, report
from bench.backward import BACKWARD, PARTS, STEP, Choice
from bench.backward_peers import GRADIENT_PEERS
from bench.runner import Row
from bench.shapes import AttentionShape, Cost, Heads
from slowfast_kernels import eager
from slowfast_kernels.calls import AttentionTensors

HEADS = Heads(4, 2, 16)
EVEN = AttentionShape.even(2, 3, 40, HEADS)
PEERS = {peer.name: peer for peer in GRADIENT_PEERS}


@pytest.fixture
def attention():
    """(input sets, gradients of their contexts, the reference's answer on the first)"""
    sets = inputs.make_inputs(EVEN, "float32", CPU, 0)
    upstream = [torch.randn_like(x.q) for x in sets]
    return sets, upstream, inputs.reference_gradients(sets[0], upstream[0])


def errors(competitor, part, reference):
    """Of each of its ways, by label."""
    contender = backward._contender(competitor, part, reference, Cost(1, 1, 0))
    return {variant.label: variant.build()[1]() for variant in contender.variants}


@pytest.mark.parametrize("shape", [EVEN, AttentionShape((3, 70, 5), (40, 17, 33), HEADS)], ids=["even", "ragged"])
def test_the_reference_is_the_eager_formula_in_float64(shape):
    (x, *_) = inputs.make_inputs(shape, "float32", CPU, 0)
    grad = torch.randn_like(x.q)
    found = inputs.reference_gradients(x, grad)
    tensors = AttentionTensors(x.q.double(), x.slow_kv.double(), x.cu_slow, x.text_rows, x.cu_text)
    want = eager.text_cross_attention_backward(tensors, grad.double(), None, 16**-0.5)
    torch.testing.assert_close(found.context, eager.text_cross_attention(tensors, 16**-0.5)[0])
    torch.testing.assert_close(found.q, want.q)
    torch.testing.assert_close(torch.stack((found.keys, found.values), 2), want.slow_kv)


# ------------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("grouping", ["gqa", "packed"])
def test_every_way_to_differentiate_sdpa_gives_the_reference(attention, part, deterministic, grouping):
    sets, upstream, reference = attention
    peer = PEERS["torch"]._replace(has_mode=True)
    competitor = backward_peers.competitors(peer, sets, upstream)[2 * (grouping == "packed") + deterministic]
    found = errors(competitor, part, reference)
    assert set(found) == {f"{grouping} {layout}" for layout in ("hnd", "nhd")}
    assert max(found.values()) < 1e-5


def test_a_peer_gets_k_and_v_apart_and_contiguous_and_gives_gradients_of_both(attention):
    sets, upstream, _ = attention
    for way in PEERS["torch"].ways(sets[0], STEP, False):
        q, k, v = backward_peers._passes(way, sets[0], upstream[0]).leaves
        for x in (q, k, v):
            assert x.is_leaf
            assert x.requires_grad
            assert (x if way.layout == "hnd" else x.transpose(1, 2)).is_contiguous()
        assert k.shape == v.shape == (2, 2, 40, 16)
        assert k.data_ptr() != sets[0].slow_kv.data_ptr() != v.data_ptr()


def test_a_deterministic_mode_is_a_peer_of_its_own_that_pytorch_is_asked_for_in_both_passes(attention):
    sets, upstream, _ = attention
    seen = []

    def attend(q, k, v, enable_gqa):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=enable_gqa)

    def ways(inputs, part, deterministic):
        for way in backward_peers._sdpa_ways(inputs, part, deterministic, None):
            yield way._replace(attend=partial(attend, **way.attend.keywords))

    peer = PEERS["sdpa-flash"]._replace(ways=ways)
    found = backward_peers.competitors(peer, sets, upstream)
    assert [(competitor.who, competitor.facts) for competitor in found] == [
        ("sdpa-flash", {}),
        ("sdpa-flash deterministic", {"deterministic": True}),
        ("sdpa-flash packed", {"packed": True}),
        ("sdpa-flash packed deterministic", {"deterministic": True, "packed": True}),
    ]
    for competitor, want in zip(found, (False, True) * 2, strict=True):
        way = next(iter(competitor.ways(STEP)))
        (passes, *_), _ = way.build(STEP)
        _, (kept,) = passes.forward()
        kept.register_hook(lambda grad: seen.append(torch.are_deterministic_algorithms_enabled()))
        passes.backward((kept,), again=False)
        assert seen == [want, want]
        seen.clear()
    assert not torch.are_deterministic_algorithms_enabled()


def test_pytorch_s_deterministic_mode_fills_no_memory_and_ends():
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with backward.deterministic_algorithms():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch.utils.deterministic.fill_uninitialized_memory is filled
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def package(monkeypatch):
    """A FlashAttention package [B, length, H, D] that notes its options, under every name."""
    made = types.ModuleType("fake")
    made.asked = []

    def flash_attn_func(q, k, v, num_splits=1, deterministic=False):
        made.asked.append((num_splits, deterministic))
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, enable_gqa=True)
        return out.transpose(1, 2), None

    made.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    for name in ("flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, made)
    return made


@pytest.mark.parametrize("name", ["fa3", "fa4"])
def test_flash_attention_packages_are_differentiated_their_own_way(attention, package, name):
    sets, upstream, reference = attention
    for competitor in backward_peers.competitors(PEERS[name], sets, upstream):
        package.asked.clear()
        found = errors(competitor, STEP, reference)
        assert max(found.values()) < 1e-5
        grouping = "packed" if competitor.facts.get("packed") else "gqa"
        assert {grouping, f"{grouping} num_splits=33", f"{grouping} num_splits=0"} < set(found)
        assert all(label.startswith(grouping) for label in found)
        deterministic = competitor.facts.get("deterministic", False)
        assert {asked for _, asked in package.asked[1:]} == {deterministic}  # the first asks whether keys are split
        assert set(errors(competitor, BACKWARD, reference)) == {grouping}  # splits are of the forward pass


def test_a_release_without_a_deterministic_mode_says_so(attention, package, run):
    sets, upstream, reference = attention
    attend = package.flash_attn_func
    package.flash_attn_func = lambda q, k, v: attend(q, k, v)
    plain, mode, *_ = backward_peers.competitors(PEERS["fa4"], sets, upstream)
    costs = dict.fromkeys(PARTS, Cost(1, 1, 0))
    rows = backward.compare(run, "attention", "shape", "float32", [plain, mode], reference, costs)
    assert [(row.op, row.who, row.status.split(":")[-1].strip()) for row in rows] == [
        (f"attention-{part}", who, status)
        for part in PARTS
        for who, status in (("fa4", "ok"), ("fa4 deterministic", "this release has no deterministic mode"))
    ]


def test_peers_of_gradients_have_names_that_a_run_can_be_asked_for():
    from bench.peers import PEER_NAMES

    assert set(PEERS) <= set(PEER_NAMES)
    assert {"sdpa-flash", "sdpa-cudnn", "fa3", "fa4"} <= set(PEERS)


# ------------------------------------------------------------------------------------------------- calls


class Counted:
    """Passes that note themselves."""

    def __init__(self, *answers):
        self.log, self.answers = [], iter(answers)

    def forward(self):
        self.log.append("forward")
        return [torch.ones(1)], "kept"

    def backward(self, kept, again):
        self.log.append((kept, again))
        return [torch.full((2,), next(self.answers, 0.0))]


def test_a_step_makes_both_passes_and_gives_results_and_gradients():
    passes = Counted()
    call = backward.call_of(passes, STEP)
    assert [x.numel() for x in call()] == [x.numel() for x in call()] == [1, 2]
    assert passes.log == ["forward", ("kept", False)] * 2


def test_the_backward_pass_alone_is_made_again_and_again_of_one_forward_pass():
    passes = Counted()
    call = backward.call_of(passes, BACKWARD)
    assert [x.numel() for x in call()] == [x.numel() for x in call()] == [2]
    assert passes.log == ["forward", ("kept", True), ("kept", True)]


def test_on_another_stream_the_forward_pass_is_made_anew(monkeypatch):
    streams = iter(["own", "captured", "captured"])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: next(streams))
    passes = Counted()
    call = backward.call_of(passes, BACKWARD)
    for _ in range(3):
        call()
    assert passes.log == ["forward", ("kept", True), "forward", ("kept", True), ("kept", True)]


def test_calls_that_give_other_bits_are_seen():
    for answers, same in (((1.0, 1.0, 1.0, 1.0), True), ((1.0, 1.0, 1.0, 2.0), False), ((0.0, -0.0), False)):
        call = backward.call_of(Counted(*answers), BACKWARD)
        assert backward.observe(call, CPU) == {"result_bytes": 8, "same_bits": same}


def test_peak_memory_is_what_a_call_adds_at_most(monkeypatch):
    memory = types.SimpleNamespace(now=100, peak=10**9)

    def call():
        memory.now += 30
        memory.peak = max(memory.peak, memory.now + 25)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(memory, "peak", memory.now))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: memory.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory.peak)
    assert backward.peak_bytes(call) == 55


@pytest.mark.parametrize(("part", "donates"), [(STEP, True), (BACKWARD, False)])
def test_a_compiled_forward_pass_keeps_its_buffers_where_its_gradients_are_taken_again(monkeypatch, part, donates):
    from torch._functorch import config

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    before = config.donated_buffer
    assert backward.compiled(lambda *, wanted: (config.donated_buffer, wanted), part)(wanted=3) == (donates, 3)
    assert config.donated_buffer is before


# -------------------------------------------------------------------------------------------------- ours


def test_ours_is_the_automatic_choice_and_then_what_is_not_the_same(attention):
    (x, *_), _, _ = attention
    auto, *others = attention_backward.choices(x, ["cpu", "eager"])
    assert (auto.who, auto.backend) == ("auto", None)
    assert len({(choice.forward, choice.backward) for choice in (auto, *others)}) == len(others) + 1
    assert ("eager", "eager", "eager") in {(c.backend, c.forward, c.backward) for c in others}


def test_a_backend_that_refuses_the_call_is_asked_all_the_same_so_that_its_row_says_why(attention):
    (x, *_), _, _ = attention
    found = attention_backward.choices(x, ["cuda", "eager"])
    assert Choice("cuda", "cuda", "cuda", "cuda") in found


@pytest.mark.parametrize(
    ("auto", "triton", "both"),
    [
        (("cuda", "cuda"), ("triton", "triton"), True),
        (("cuda", "triton"), ("triton", "triton"), False),  # what is automatic already
        (("triton", "eager"), ("triton", "triton"), False),
        (("cuda", "eager"), ("triton", "eager"), False),  # no backward pass of Triton's
    ],
)
def test_triton_s_backward_pass_is_measured_behind_the_automatic_forward_pass_too(monkeypatch, auto, triton, both):
    made = [Choice("auto", None, *auto), Choice("triton", "triton", *triton)]
    monkeypatch.setattr(backward, "choices", lambda *_: list(made))
    found = attention_backward.choices(inputs.make_inputs(EVEN, "float32", CPU, 0)[0], [])
    parts = Choice(attention_backward.IN_PARTS, None, auto[0], "triton")
    assert found == ([made[0], parts, made[1]] if both else made)


@pytest.mark.parametrize("part", PARTS)
def test_passes_on_backends_of_their_own_give_the_reference(attention, part, monkeypatch):
    sets, upstream, reference = attention
    op, asked = attention_backward.OPS[attention_backward.NAME], []
    for name in ("run", "run_backward"):
        made = getattr(op, name)
        monkeypatch.setattr(
            op, name, lambda x, options, *needs, made=made: asked.append(options) or made(x, options, *needs)
        )
    choice = Choice(attention_backward.IN_PARTS, "cpu", "cpu", "eager")
    (error,) = errors(attention_backward.ours(choice, sets, upstream), part, reference).values()
    assert error < 1e-5
    assert [(options.backend, options.return_lse) for options in asked] == [("cpu", True), ("eager", True)]


# ------------------------------------------------------------------------------------------------- runs


def rows_of(run, op):
    return {row.who: row for row in run.journal.rows if row.op == op and row.shape != "all"}


@pytest.mark.parametrize(
    ("measure", "op", "text"),
    [
        (attention_backward.run, "attention", "2x3x40@4/2/16"),
        (pool.run_backward, "pool", "4x4x4"),
        (mix.run_backward, "mix", "2of3@8"),
        (mix.run_backward, "mix", "3of3@8"),
    ],
    ids=["attention", "pool", "mix", "mix of all rows"],
)
def test_gradients_run_on_a_cpu_against_pytorch_s_own_and_not_twice(run, measure, op, text):
    run.shapes = [text]
    with torch.no_grad():
        measure(run)
    for part in PARTS:
        rows = rows_of(run, f"{op}-{part}")
        assert {"auto", "eager", "torch"} <= set(rows)
        assert all(row.ok and row.error < 1e-5 for row in rows.values())
        assert all(row.extra["same_bits"] and row.extra["result_bytes"] for row in rows.values())
        assert not any("peak_bytes" in row.extra for row in rows.values())
    assert rows_of(run, f"{op}-{STEP}")["auto"].floor_us > rows_of(run, f"{op}-{BACKWARD}")["auto"].floor_us
    before = len(run.journal.rows)
    with torch.no_grad():
        measure(run)
    assert len(run.journal.rows) == before


def test_absent_peers_of_gradients_are_named(run):
    run.shapes = ["1x2x9@4/2/16"]
    attention_backward.run(run)
    absent = {row.who for row in run.journal.rows if row.shape == "all"}
    assert {"cuda", "triton", "sdpa-flash", "sdpa-cudnn", "fa4", "fa3", "fa2"} == absent


def test_pooling_s_gradients_are_measured_with_the_norm_and_without(run):
    run.shapes = ["2x4x4"]
    pool.run_backward(run)
    assert {row.shape for row in run.journal.rows if row.shape != "all"} == {
        "2x4x4/p2/t4@3584",
        "2x4x4/p2/t4@3584 normed",
    }


def test_a_wrong_gradient_is_not_timed_though_the_result_is_right(run, monkeypatch):
    def loses_a_gradient(state, *rest):
        return mix.copied_rows(state.detach(), *rest) + 0 * state

    monkeypatch.setattr(mix, "_ways", lambda shape: [loses_a_gradient])
    run.shapes = ["2of3@8"]
    mix.run_backward(run)
    assert rows_of(run, "mix-step")["torch"].status.startswith("wrong")


# ---------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--backward"], "--backward: got it for train, want one of attention, pool, mix or all"),
        (["model", "--backward"], "--backward: got it for model"),
        (["attention", "--backward", "--shapes", "ragged"], "--shapes: got 'ragged'"),
        (["all", "--backward", "--shapes", "4x256x128f"], "--shapes: got '4x256x128f'"),
    ],
    ids=" ".join,
)
def test_gradients_of_what_has_none_are_refused_in_one_line(capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_the_worker_measures_gradients_when_it_is_asked_for_them(monkeypatch, tmp_path, journal):
    measured = []
    for module, name in ((attention_backward, "run"), (pool, "run_backward"), (mix, "run_backward")):
        monkeypatch.setattr(module, name, lambda runner, name=f"{module.__name__}.{name}": measured.append(name))
    args = cli.parser().parse_args(["all", "--backward", "--device", "cpu", "--worker", str(journal.path)])
    was_enabled = torch.is_grad_enabled()
    try:
        assert cli.worker(args, pytest.fail) == 0
    finally:
        torch.set_grad_enabled(was_enabled)
    assert measured == ["bench.attention_backward.run", "bench.pool.run_backward", "bench.mix.run_backward"]


def test_a_run_in_which_ours_gave_other_bits_fails(journal, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_draw", lambda *_: True)
    args = cli.parser().parse_args(["mix", "--backward", "--json", str(tmp_path / "x.json")])
    made = partial(Row, "mix-step", "2of3@8", "float32", median_us=1.0)
    for kind, same, code in (("ours", False, 1), ("ours", True, 0), ("peer", False, 0)):
        assert cli.finish(args, dict(journal.meta), [made(who="x", kind=kind, extra={"same_bits": same})], []) == code
    assert "FAILED: mix-step 2of3@8 float32 x: ok, other bits again" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- tables, plots


@pytest.fixture
def rows():
    """Of an H100, as far as shape and columns go: ours ahead, one mode refused."""
    made = []
    for op in ("attention-step", "attention-backward"):
        for who, kind, us, mib in (
            ("auto", "ours", 100.0, 30),
            ("eager", "ours", 2000.0, 900),
            ("sdpa-flash", "peer", 330.0, 60),
            ("fa4", "peer", 250.0, 50),
            ("fa4 deterministic", "peer", 400.0, 50),
        ):
            extra = {"peak_bytes": mib << 20, "result_bytes": 20 << 20, "same_bits": kind == "ours"}
            extra |= {"deterministic": True} if who.endswith("deterministic") else {}
            row = Row(op, "1x64x10368@28/4/128", "bfloat16", who, kind, median_us=us, floor_us=46.0, percent=46.0)
            row.error, row.variant, row.extra = 2e-3, "gqa", extra
            made.append(row)
    refused = {"status": "failed: no kernel: cuDNN SDPA is not deterministic.", "extra": {"deterministic": True}}
    made.append(Row("attention-step", "1x64x10368@28/4/128", "bfloat16", "sdpa-cudnn deterministic", "peer", **refused))
    for op in ("pool-backward", "mix-backward"):
        for who, kind, percent in (("auto", "ours", 88.0), ("torch", "peer", 40.0)):
            timed = {"median_us": 900.0 / percent, "floor_us": 9.0, "percent": percent, "extra": {"same_bits": True}}
            made.append(Row(op, "shape", "bfloat16", who, kind, **timed))
    return made


def cells_of(table):
    header, *lines = table
    return [dict(zip(header, line, strict=True)) for line in lines]


def test_the_brief_table_holds_the_automatic_choice_against_the_best_peer_and_the_best_deterministic_one(rows):
    (cells,) = cells_of(backward_tables.gradients_table(rows, "attention-step", brief=True))
    assert (cells["auto us"], cells["eager us"], cells["floor us"], cells["% of ceiling"]) == (
        "100.0",
        "2000",
        "46.0",
        "46%",
    )
    assert (cells["best peer"], cells["peer us"], cells["best peer / auto"]) == ("fa4", "250.0", "2.50x")
    assert (cells["deterministic peer"], cells["its us"]) == ("fa4 deterministic", "400.0")
    assert (cells["auto MiB"], cells["allowed MiB"], cells["peer MiB"]) == ("30", "87", "50")
    assert cells["ours: same bits"] == "yes"


def test_the_brief_table_names_the_best_peer_whose_heads_are_not_packed_too(rows):
    next(row for row in rows if row.who == "fa4").extra["packed"] = True
    (cells,) = cells_of(backward_tables.gradients_table(rows, "attention-step", brief=True))
    assert (cells["best peer"], cells["peer us"]) == ("fa4", "250.0")
    assert (cells["unpacked peer"], cells["unpacked us"]) == ("sdpa-flash", "330.0")


def test_the_brief_table_says_if_any_of_ours_gave_other_bits(rows):
    rows[1].extra["same_bits"] = False
    (cells,) = cells_of(backward_tables.gradients_table(rows, "attention-step", brief=True))
    assert cells["ours: same bits"] == "no"


def test_without_modes_and_peaks_the_brief_table_has_no_columns_for_them(rows):
    (cells,) = cells_of(backward_tables.gradients_table(rows, "pool-backward", brief=True))
    assert not {"deterministic peer", "auto MiB"} & set(cells)
    assert (cells["% of ceiling"], cells["best peer / auto"]) == ("88%", "2.20x")


def test_the_full_table_gives_every_competitor_a_line(rows):
    lines = cells_of(backward_tables.gradients_table(rows, "attention-step", brief=False))
    assert [line["who"] for line in lines] == [row.who for row in rows if row.op == "attention-step"]
    assert (lines[0]["peak MiB"], lines[0]["results MiB"], lines[0]["same bits"], lines[0]["error"]) == (
        "30",
        "20",
        "yes",
        "2.0e-03",
    )
    assert (lines[3]["same bits"], lines[-1]["us"], lines[-1]["same bits"]) == ("no", "failed", "")


@pytest.mark.parametrize("brief", [False, True])
def test_reports_print_gradients_with_what_their_memory_is_held_to(rows, journal, brief):
    for text in (report.markdown(journal.meta, rows, brief), report.terminal(journal.meta, rows)):
        for op in ("attention-step", "attention-backward", "pool-backward", "mix-backward"):
            assert report.OP_TITLES[op] in text
        assert text.count(backward_tables.PEAK) == 2  # pool's and mix's rows have no memory here
        assert "sdpa-cudnn deterministic failed: no kernel: cuDNN SDPA is not deterministic." in text


def test_every_op_of_gradients_has_a_title_and_a_table():
    for ops in backward.OPS_OF.values():
        assert all(op in report.OP_TITLES and op in backward_tables.TABLES for op in ops)


def test_plots_of_gradients_are_drawn_over_ours(rows, journal, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    written = plots.plot(tmp_path, journal.meta, rows)
    assert [path.name for path in written] == ["attention_backward.png", "pool_mix_backward.png"]
    figure = plots._plot_gradients(plt, rows)
    for axis in figure.axes:
        widths = {bars.get_label(): bars[0].get_width() for bars in axis.containers}
        assert widths == {"auto": 1, "eager": 20, "sdpa-flash": 3.3, "fa4": 2.5, "fa4 deterministic": 4}
    plt.close(figure)
