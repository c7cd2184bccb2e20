"""Ranges, pieces, K and V apart: a text row attends what it sees of its sequence's slow tokens, wherever they lie."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import reference
import torch
from cases import Inputs, Shape, make_inputs, poison
from hypothesis import given
from hypothesis import strategies as st
from targets import ALL, INTERPRETER, KERNELS, REPEATS
from torch import Tensor

import slowfast_kernels as sk

SHAPE = Shape(((5, 70), (0, 9), (3, 0), (9, 150), (1, 33)), (8, 2), 64, 2)
if INTERPRETER:  # slow, and its blocks are shorter
    SHAPE = Shape(((3, 37), (0, 3), (2, 0), (4, 50), (1, 17)), (2, 1), 16, 2)
LONGEST = 40 if INTERPRETER else 200

# What row i of n sees of N slow tokens: (begin, end), or None for a side that is not given.
RANGES = {
    "everything": lambda i, n, total, rng: (0, total),
    "growing prefix": lambda i, n, total, rng: (None, total * i // n),
    "shrinking suffix": lambda i, n, total, rng: (total * (i + 1) // n - 2, None),
    "window": lambda i, n, total, rng: (total * i // n - 3, total * i // n + 20),
    "one token": lambda i, n, total, rng: (total * i // n, total * i // n + 1),
    "every second row nothing": lambda i, n, total, rng: (5, 5) if i % 2 else (0, total),
    "nothing": lambda i, n, total, rng: (total, 0),
    "outside": lambda i, n, total, rng: (-(2**31), 2**31 - 1) if i % 2 else (total + 7, total + 9),
    "anything": lambda i, n, total, rng: (rng.randint(-5, total + 5), rng.randint(-5, total + 5)),
}


@dataclass
class Call:
    """A call that selects: inputs whose ``slow_kv`` may be a pair, and the options that say what rows see."""

    inputs: Inputs
    selection: dict[str, Tensor]

    @property
    def attention(self) -> tuple:
        return self.inputs.attention

    def check(self, target, **options) -> tuple[Tensor, Tensor]:
        """Context and lse, accurate by the 2x-eager rule; the fused op likewise, blind rows bit for bit."""
        inputs, selection = self.inputs, self.selection
        context, lse = target.run(sk.text_cross_attention, *self.attention, **selection, return_lse=True, **options)
        plain = sk.text_cross_attention(*self.attention, **selection, return_lse=True, backend="eager")
        exact = reference.visible_attention(*self.attention, **selection)
        reference.assert_accurate(context, plain[0], exact.context, exact.noise)
        reference.assert_lse_accurate(lse, plain[1], exact.lse)
        blind = exact.lse[:, 0] == -torch.inf
        assert not context[blind].any()

        mixed = target.run(sk.slowfast_cross_attention, *inputs.fused, **selection, **options)
        plain_mixed = sk.slowfast_cross_attention(*inputs.fused, **selection, backend="eager")
        rows, seeing = inputs.text_rows.long(), inputs.text_rows[~blind].long()
        exact_mixed = reference.gated_mix(inputs.state, exact.context[~blind], inputs.text_rows[~blind], *inputs.gating)
        reference.assert_accurate(mixed[seeing], plain_mixed[seeing], exact_mixed[seeing], exact.noise[~blind])
        for kept in (rows[blind], inputs.other_rows):
            assert reference.same_bits(mixed[kept], inputs.state[kept])
        return context, lse

    def check_gradients(self, target) -> None:
        """Those of context and lse to q and the cache, and zeros wherever nothing is seen."""
        q, slow_kv, *places = self.attention
        pair = isinstance(slow_kv, tuple)

        def run(op, q, *cache, **options):
            return op(q, cache if pair else cache[0], *places, **self.selection, **options)

        mine = [x.detach().requires_grad_() for x in (q, *(slow_kv if pair else (slow_kv,)))]
        context, lse = target.run(partial(run, sk.text_cross_attention, return_lse=True), *mine)
        wide = [x.detach().double().requires_grad_() for x in mine]
        exact = run(reference.visible_attention, *wide)
        up = torch.randn_like(exact.context).to(context.dtype).double()  # as the op will get it
        up_lse = torch.randn_like(exact.lse).to(lse.dtype).double()
        sees = exact.lse > -torch.inf
        grads = torch.autograd.grad((context.double() * up).sum() + (lse.double() * up_lse)[sees].sum(), mine)
        if not sees.any():
            assert not any(grad.any() for grad in grads)
            return
        wanted = torch.autograd.grad(
            (exact.context * up).sum() + (exact.lse * up_lse)[sees].sum(), wide, retain_graph=True
        )
        # A backward pass starts from the context as it was stored: what its rounding alone makes of each gradient.
        lost = (up * (exact.context - exact.context.to(context.dtype))).sum(-1).detach()
        unsure = torch.autograd.grad((exact.lse * lost)[sees].sum(), wide, allow_unused=True)
        for x, got, want, noise in zip(mine, grads, wanted, unsure, strict=True):
            assert got.dtype == x.dtype
            roundoff = reference.FLOAT32_TOLERANCE if x.dtype == torch.float32 else 2 * reference.unit_roundoff(x.dtype)
            allowed = roundoff * max(1.0, float(want.abs().max())) + (
                0.0 if noise is None else float(noise.abs().max())
            )
            assert (got.double() - want).abs().max() <= allowed
            assert not got[want == 0].any()  # exactly 0 where nothing looks


def ranges_of(inputs: Inputs, name: str, seed: int = 0, lengths: list[int] | None = None) -> dict[str, Tensor]:
    rng, made = random.Random(seed), []
    slow, text = inputs.cu_slow.tolist(), inputs.cu_text.tolist()
    for b in range(len(text) - 1):
        total = slow[b + 1] - slow[b] if lengths is None else lengths[b]
        made += [RANGES[name](i, text[b + 1] - text[b], total, rng) for i in range(text[b + 1] - text[b])]
    sides = zip(("slow_begin", "slow_end"), zip(*made, strict=True), strict=True)
    make = {"dtype": torch.int32, "device": inputs.q.device}
    return {side: torch.tensor(values, **make) for side, values in sides if None not in values}


def blinded(call: Call) -> Call:
    """Poison in every slow token that no row sees, and in q and state of every text row that sees nothing."""
    inputs, selection = call.inputs, call.selection
    keys = inputs.slow_kv[0] if isinstance(inputs.slow_kv, tuple) else inputs.slow_kv
    seen = torch.zeros(len(keys), dtype=torch.bool)
    slow, text = inputs.cu_slow.tolist(), inputs.cu_text.tolist()
    for b in range(len(slow) - 1):
        tokens = list(range(slow[b], slow[b + 1]))
        if "slow_pieces" in selection:
            pieces = selection["slow_pieces"][slow[b] : slow[b + 1]].tolist()
            tokens = [token for begin, end in pieces for token in range(begin, end)]
        for i in range(text[b], text[b + 1]):
            begin = max(int(selection["slow_begin"][i]), 0) if "slow_begin" in selection else 0
            end = max(int(selection["slow_end"][i]), 0) if "slow_end" in selection else len(tokens)
            seen[tokens[begin:end]] = True
            if not tokens[begin:end]:
                for x in (inputs.q, inputs.state):
                    poison(x[inputs.text_rows[i].long()])
    for x in inputs.slow_kv if isinstance(inputs.slow_kv, tuple) else (inputs.slow_kv,):
        hidden = (~seen).nonzero().flatten().to(x.device)
        x[hidden] = poison(x.new_zeros(len(hidden), *x.shape[1:]))
    return call


def apart(inputs: Inputs, layout: str) -> Inputs:
    """K and V as a pair, with strides of their own."""
    keys, values = (x.contiguous() for x in inputs.slow_kv.unbind(2))
    if layout == "heads first":
        keys, values = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (keys, values))
    elif layout == "unlike":
        wide = poison(values.new_zeros(len(values) + 1, values.shape[1], values.shape[2] + 8))
        wide[1:, :, 8:] = values
        keys, values = keys.transpose(0, 1).contiguous().transpose(0, 1), wide[1:, :, 8:]
    inputs.slow_kv = (keys, values)
    return inputs


def in_pieces(inputs: Inputs, way: str, seed: int = 0) -> tuple[Inputs, dict[str, Tensor], list[int]]:
    """The same batch with its slow tokens in pieces; also the length of each sequence along them."""
    rng, total = random.Random(seed), len(inputs.slow_kv)
    slow = inputs.cu_slow.tolist()
    pieces: list[tuple[int, int]] = []
    counts, lengths = [0], []
    for b in range(len(slow) - 1):
        begin, end = slow[b], slow[b + 1]
        if way == "one each":
            mine = [(begin, end)]
        elif way == "cut and shuffled, with holes and empty ones":
            cuts = sorted({begin, end, *(rng.randint(begin, end) for _ in range(4))})
            mine = [(low, max(low, high - 1)) for low, high in pairwise(cuts)] + [(begin, begin)]
            rng.shuffle(mine)
        elif way == "one token each":
            mine = [(token, token + 1) for token in range(begin, end)]
        elif way == "shared by all":
            mine = [(0, min(40, total)), (total // 2, total)]
        else:
            assert way == "repeated and overlapping"
            mine = [(begin, end), (begin, end), ((begin + end) // 2, end)]
        pieces += mine
        counts.append(len(pieces))
        lengths.append(sum(high - low for low, high in mine))
    make = {"dtype": torch.int32, "device": inputs.q.device}
    inputs.cu_slow = torch.tensor(counts, **make)
    return inputs, {"slow_pieces": torch.tensor(pieces, **make).reshape(-1, 2)}, lengths


PIECES = (
    "one each",
    "cut and shuffled, with holes and empty ones",
    "one token each",
    "shared by all",
    "repeated and overlapping",
)
PAIRS = ("contiguous", "heads first", "unlike")


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize("name", RANGES)
def test_a_row_attends_its_range_and_nothing_else(target, name, num_splits, rng):
    inputs = make_inputs(SHAPE, target.dtype, target.device, rng(target.device))
    blinded(Call(inputs, ranges_of(inputs, name))).check(target, num_splits=num_splits)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("way", PIECES)
@pytest.mark.parametrize("name", ["everything", "growing prefix", "anything"])
def test_a_sequence_reads_its_pieces_as_if_they_were_one(target, name, way, rng):
    inputs, pieces, lengths = in_pieces(make_inputs(SHAPE, target.dtype, target.device, rng(target.device)), way)
    call = Call(inputs, pieces | ranges_of(inputs, name, lengths=lengths))
    blinded(call).check(target, num_splits=2)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.parametrize("selects", [False, True])
def test_keys_and_values_may_lie_apart(target, layout, selects, rng):
    inputs = make_inputs(SHAPE, target.dtype, target.device, rng(target.device))
    selection, lengths = {}, None
    if selects:
        inputs, selection, lengths = in_pieces(inputs, PIECES[1])
        selection |= ranges_of(inputs, "anything", lengths=lengths)
    Call(apart(inputs, layout), selection).check(target)


@pytest.mark.parametrize("target", KERNELS)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 12), st.integers(0, LONGEST)), min_size=1, max_size=4).map(tuple),
    heads=st.sampled_from([(1, 1), (4, 2), (7, 1), (3, 3), (14, 2)]),
    name=st.sampled_from(sorted(RANGES)),
    way=st.sampled_from((None, *PIECES)),
    pair=st.sampled_from((None, *PAIRS)),
    num_splits=st.sampled_from([0, 1, 3]),
    seed=st.integers(0, 2**16),
)
def test_random_selections_are_accurate(target, rng, sequences, heads, name, way, pair, num_splits, seed):
    inputs = make_inputs(Shape(sequences, heads, 64, 1), target.dtype, target.device, rng(target.device))
    selection, lengths = {}, None
    if way is not None:
        inputs, selection, lengths = in_pieces(inputs, way, seed)
    if len(inputs.text_rows):
        selection |= ranges_of(inputs, name, seed, lengths)
    if pair is not None:
        inputs = apart(inputs, pair)
    blinded(Call(inputs, selection)).check(target, num_splits=num_splits)


@pytest.mark.parametrize("target", ALL)
def test_ranges_that_show_everything_change_nothing(target, rng):
    inputs = make_inputs(SHAPE, target.dtype, target.device, rng(target.device))
    context, lse = Call(inputs, ranges_of(inputs, "everything")).check(target, num_splits=2)
    plain = target.run(sk.text_cross_attention, *inputs.attention, return_lse=True, num_splits=2)
    reference.assert_accurate(context, plain[0], *reference.attention(*inputs.attention)[::2])
    assert torch.allclose(lse, plain[1], atol=1e-5)


@pytest.mark.parametrize("target", KERNELS)
def test_same_selection_same_bits(target, rng):
    inputs, pieces, lengths = in_pieces(make_inputs(SHAPE, target.dtype, target.device, rng(target.device)), PIECES[3])
    selection = pieces | ranges_of(inputs, "anything", lengths=lengths)
    first = target.run(sk.slowfast_cross_attention, *inputs.fused, **selection)
    for _ in range(REPEATS):
        assert reference.same_bits(first, target.run(sk.slowfast_cross_attention, *inputs.fused, **selection))


@pytest.mark.parametrize("target", KERNELS)
def test_with_fixed_splits_a_sequence_does_not_depend_on_its_batch(target, rng):
    inputs = make_inputs(SHAPE, target.dtype, target.device, rng(target.device))
    selection = ranges_of(inputs, "anything")
    together = target.run(sk.text_cross_attention, *inputs.attention, **selection, num_splits=3)
    text = inputs.cu_text.tolist()
    for b in range(len(SHAPE.sequences)):
        rows = slice(text[b], text[b + 1])
        alone = {side: values[rows] for side, values in selection.items()}
        found = target.run(sk.text_cross_attention, *inputs.sequence(b).attention, **alone, num_splits=3)
        assert reference.same_bits(found, together[rows])


# --------------------------------------------------------------------------------------------- gradients

SMALL = Shape(((3, 20), (0, 4), (2, 0), (4, 9)), (4, 2), 16)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("pair", [None, "heads first"])
@pytest.mark.parametrize("way", [None, "shared by all", "repeated and overlapping"])
def test_gradients_are_those_of_the_rows_that_see(target, way, pair, rng):
    inputs = make_inputs(SMALL, target.dtype, target.device, rng(target.device))
    selection, lengths = {}, None
    if way is not None:
        inputs, selection, lengths = in_pieces(inputs, way)
    selection |= ranges_of(inputs, "anything", 3, lengths)
    if pair is not None:
        inputs = apart(inputs, pair)
    blinded(Call(inputs, selection)).check_gradients(target)


@pytest.mark.parametrize("target", KERNELS)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 12), st.integers(0, LONGEST)), min_size=1, max_size=4).map(tuple),
    heads=st.sampled_from([(1, 1), (4, 2), (7, 1), (3, 3), (14, 2)]),
    name=st.sampled_from((None, *sorted(RANGES))),
    way=st.sampled_from((None, *PIECES)),
    pair=st.sampled_from((None, *PAIRS)),
    seed=st.integers(0, 2**16),
)
def test_random_selections_have_accurate_gradients(target, rng, sequences, heads, name, way, pair, seed):
    inputs = make_inputs(Shape(sequences, heads, 64, 1), target.dtype, target.device, rng(target.device))
    selection, lengths = {}, None
    if way is not None:
        inputs, selection, lengths = in_pieces(inputs, way, seed)
    if name is not None and len(inputs.text_rows):
        selection |= ranges_of(inputs, name, seed, lengths)
    if pair is not None:
        inputs = apart(inputs, pair)
    blinded(Call(inputs, selection)).check_gradients(target)


@pytest.mark.parametrize("target", ALL)
def test_the_fused_op_trains_with_blind_rows_full_of_poison(target, rng):
    inputs = make_inputs(SMALL, target.dtype, target.device, rng(target.device))
    selection = ranges_of(inputs, "every second row nothing")
    exact = reference.visible_attention(*inputs.attention, **selection)
    blinded(Call(inputs, selection))
    mine = [x.detach().requires_grad_() for x in (inputs.state, inputs.q, inputs.slow_kv, *inputs.gating)]
    out = target.run(sk.slowfast_cross_attention, *mine[:3], *inputs.attention[2:], *mine[3:], **selection)
    blind = inputs.text_rows[exact.lse[:, 0] == -torch.inf].long()
    assert reference.same_bits(out[blind], inputs.state[blind])
    seeing = inputs.text_rows[exact.lse[:, 0] > -torch.inf].long()
    grads = torch.autograd.grad(out[seeing].double().square().sum(), mine)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert not grads[1][blind].any()


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("registered", [False, True])
def test_poison_in_gradients_of_blind_rows_stays_there(target, registered, rng):
    inputs = make_inputs(SMALL, target.dtype, target.device, rng(target.device))
    selection = ranges_of(inputs, "every second row nothing")
    blind = inputs.text_rows[reference.visible_attention(*inputs.attention, **selection).lse[:, 0] == -torch.inf].long()
    mine = [x.detach().requires_grad_() for x in (inputs.state, inputs.q, inputs.slow_kv, *inputs.gating)]
    if registered:
        places = (*inputs.attention[2:], None, selection["slow_begin"], selection["slow_end"], None)
        call = partial(torch.ops.slowfast.cross_attention, *mine[:3], *places, *mine[3:], None, None, 0, "tanh", True)
        out = target.run(lambda backend: call(backend))
    else:
        out = target.run(sk.slowfast_cross_attention, *mine[:3], *inputs.attention[2:], *mine[3:], **selection)
    upstream = torch.ones_like(out)
    upstream[blind] = torch.nan
    state, q, slow_kv, *gating = torch.autograd.grad(out, mine, upstream)
    assert state[blind].isnan().all()
    state[blind] = 0
    assert all(grad.isfinite().all() for grad in (state, q, slow_kv, *gating))
    assert not q[blind].any()
    assert all(grad.any() for grad in gating)


# ------------------------------------------------------------------------------- what PyTorch does with it


@pytest.mark.parametrize("target", ALL)
def test_compiled_calls_select_too(target, rng):
    inputs, pieces, lengths = in_pieces(make_inputs(SMALL, torch.float32, target.device, rng(target.device)), PIECES[1])
    inputs = apart(inputs, "contiguous")
    selection = pieces | ranges_of(inputs, "anything", lengths=lengths)

    def layer(q, keys, values):
        places = inputs.attention[2:]
        return sk.text_cross_attention(q, (keys, values), *places, **selection, backend=target.backend) * 2

    try:
        expected = layer(inputs.q, *inputs.slow_kv)
    except NotImplementedError as limit:
        pytest.skip(str(limit))
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(inputs.q, *inputs.slow_kv)
    assert reference.same_bits(found, expected)


@pytest.mark.parametrize("target", ALL)
def test_opcheck(target, rng):
    inputs, pieces, lengths = in_pieces(make_inputs(SMALL, torch.float32, target.device, rng(target.device)), PIECES[1])
    selection = pieces | ranges_of(inputs, "anything", lengths=lengths)
    (keys, values), (begin, end) = apart(inputs, "contiguous").slow_kv, (selection["slow_begin"], selection["slow_end"])
    places = (inputs.cu_slow, inputs.text_rows, inputs.cu_text, values.requires_grad_(), begin, end)
    arguments = (inputs.q.nan_to_num(0, 0, 0).requires_grad_(), keys.requires_grad_(), *places, pieces["slow_pieces"])
    options = (None, False, 2, target.backend)
    try:
        torch.ops.slowfast.text_cross_attention(*arguments, *options)
    except NotImplementedError as limit:
        pytest.skip(str(limit))
    result = torch.library.opcheck(torch.ops.slowfast.text_cross_attention.default, (*arguments, *options))
    assert set(result.values()) == {"SUCCESS"}


# --------------------------------------------------------------------------------------------- bad input


REFUSED = [
    ("slow_begin", lambda i, o: o["slow_begin"].long(), TypeError, r"slow_begin: got torch.int64, want int32"),
    ("slow_begin", lambda i, o: [0] * 9, TypeError, "slow_begin: got list"),
    ("slow_end", lambda i, o: o["slow_end"][1:], ValueError, r"slow_end: .*want shape \[9\] \(Nt of text_rows\)"),
    ("slow_end", lambda i, o: o["slow_end"].to("meta"), ValueError, "slow_end: .*on meta, want cpu"),
    ("slow_pieces", lambda i, o: o["slow_pieces"].flatten(), ValueError, r"slow_pieces: .*want shape \[P, 2\]"),
    ("slow_pieces", lambda i, o: o["slow_pieces"].T.contiguous().T, ValueError, "slow_pieces: .*(stride|contiguous)"),
    ("slow_pieces", lambda i, o: o["slow_pieces"] + 30, ValueError, r"slow_pieces\[\d\]: got .* <= 33 \(slow"),
    ("slow_pieces", lambda i, o: o["slow_pieces"] - 1, ValueError, r"slow_pieces\[\d\]: got -1\.\."),
    ("slow_pieces", lambda i, o: o["slow_pieces"].flip(1), ValueError, r"slow_pieces\[0\]: got 20\.\.0"),
    ("slow_pieces", lambda i, o: o["slow_pieces"][1:], ValueError, r"cu_slow: .*want 0\.\.3 \(pieces in slow_pieces"),
    ("slow_kv", lambda i, o: (i.slow_kv[:, :, 0], i.slow_kv[1:, :, 1]), ValueError, r"slow_kv\[1\]: .*slow_kv\[0\]"),
    ("slow_kv", lambda i, o: (i.slow_kv[:, :, 0],), TypeError, r"slow_kv: .*pair \(k, v\)"),
    ("slow_kv", lambda i, o: (i.slow_kv, i.slow_kv), ValueError, r"slow_kv\[0\]: .*want shape \[Ns, Hkv, D\]"),
    ("slow_kv", lambda i, o: (i.slow_kv[:, :, 0], i.slow_kv[:, :, 1].half()), TypeError, r"slow_kv\[1\]: .*float16"),
]


@pytest.mark.parametrize(("name", "changed", "error", "words"), REFUSED)
@pytest.mark.parametrize("op", [sk.text_cross_attention, sk.slowfast_cross_attention], ids=["attention", "fused"])
def test_bad_selections_are_refused_by_name(op, name, changed, error, words, rng):
    inputs, options, lengths = in_pieces(make_inputs(SMALL, torch.float32, "cpu", rng()), "one each")
    options |= ranges_of(inputs, "anything", lengths=lengths)
    options |= {name: changed(inputs, options)}
    inputs.slow_kv = options.pop("slow_kv", inputs.slow_kv)
    arguments = inputs.attention if op is sk.text_cross_attention else inputs.fused
    with pytest.raises(error, match=words):
        op(*arguments, **options)
