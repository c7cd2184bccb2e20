"""Between the pooling and the first layer a GPU waits for its host: few launches stand there, whatever the layers."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from model_cases import PROMPT_VIDEOS, PROMPTS, VIDEO, features, one_thread, padded, tiny_model  # noqa: F401
from operators import Operators
from pretend_gpu import GPU, PretendGPU, gpu  # noqa: F401

import slowfast_kernels as sk
from slowfast_kernels.bounded_cache import BoundedCache
from slowfast_model import DecodeSession, layers
from slowfast_model.cache import KVCache
from slowfast_model.layers import first_rope, rope_at
from slowfast_model.model import Decoder
from slowfast_model.prefill import use_order
from slowfast_model.transfer import upload

CPU = torch.device("cpu")
LAYERS = 28
NO_LAUNCHES = {"split", "view", "unflatten", "__getitem__"}
NO_LAUNCHES |= {"is_floating_point", "fill_"}  # of the suite's torch.empty


@pytest.fixture(autouse=True)
def no_tables(monkeypatch):
    """None are kept from other tests, nor for them."""
    monkeypatch.setattr(layers, "_first", BoundedCache(layers._first.max_bytes))


# ------------------------------------------------------------------------------------------ launches on a GPU


@pytest.fixture
def model(gpu, monkeypatch):  # noqa: F811
    """On the pretended GPU, where a pooling is one call."""
    op = sk.slowfast_pool
    monkeypatch.setattr(sk, "slowfast_pool", lambda *args, **options: gpu.run(op, *args, **options))
    model = tiny_model("cpu", num_hidden_layers=LAYERS)
    gpu.put(model.parameters())
    return model


class AtFirstLayer(Exception):
    """The decoder is about to call it."""


@pytest.fixture
def stopped(monkeypatch):
    """Calls end where the decoder begins."""

    def stop(*args, **options):
        raise AtFirstLayer

    monkeypatch.setattr(Decoder, "forward", stop)


def launches(gpu, call):  # noqa: F811
    """What ``call`` queues after the pooling, in order."""
    gpu.calls.clear()
    with gpu, use_order(pool_first=False), pytest.raises(AtFirstLayer):
        call()
    after = gpu.calls[gpu.calls.index("slowfast_pool") + 1 :]
    return [name for name in after if name not in NO_LAUNCHES]


def prompt(gpu, *, of_gpu=False):  # noqa: F811
    ids, videos = torch.tensor([[1, VIDEO, 2, 3]]), features((4, 4))
    gpu.put([*videos, ids] if of_gpu else videos)
    return ids, videos


ROTATION = ["float", "upload", "mul", "cos", "sin", "cat", "to", "neg", "cat", "to"]


@pytest.mark.parametrize("of_gpu", [False, True], ids=["prompt_of_the_cpu", "prompt_of_the_gpu"])
@pytest.mark.usefixtures("stopped")
def test_a_session_queues_one_upload_its_embeddings_and_one_fill_of_all_caches(gpu, model, of_gpu):  # noqa: F811
    call = prompt(gpu, of_gpu=of_gpu)
    queued = [*(["wait"] if of_gpu else []), "upload", "embedding", "cat", "embedding", "_foreach_zero_"]
    assert launches(gpu, lambda: DecodeSession(model, *call, max_new_tokens=3)) == queued + ROTATION
    for _ in range(2):  # tables are there
        assert launches(gpu, lambda: DecodeSession(model, *call, max_new_tokens=3)) == queued


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.usefixtures("stopped")
def test_a_forward_pass_queues_one_upload_and_its_embeddings(gpu, model, training):  # noqa: F811
    ids, videos = prompt(gpu)
    queued = ["upload", "embedding", "cat", "embedding"]
    model.train(training)
    with torch.set_grad_enabled(training):
        assert launches(gpu, lambda: model(ids, videos, None, ids.clamp(min=0))) == queued + ROTATION
        assert launches(gpu, lambda: model(ids, videos, None, ids.clamp(min=0))) == queued


@pytest.mark.usefixtures("stopped")
def test_a_batch_with_padding_queues_a_row_of_zeros_too(gpu, model):  # noqa: F811
    ids, mask = padded([[1, VIDEO, 2, 3], [4]])
    videos = features((4, 4))
    gpu.put(videos)
    queued = ["upload", "embedding", "new_zeros", "cat", "embedding", *ROTATION]
    assert launches(gpu, lambda: model(ids, videos, mask)) == queued


@pytest.mark.parametrize("kind", ["session", "forward"])
@pytest.mark.usefixtures("stopped")
@torch.no_grad()
def test_a_prompt_of_many_videos_takes_no_more_operators_of_the_host_than_one(kind):
    """Of 28 layers: 30 and 17 when this was written, the projector's and the pooling's too, caches' memory not."""
    model = tiny_model("cpu", num_hidden_layers=LAYERS)
    run = model if kind == "forward" else partial(DecodeSession, model, max_new_tokens=3)
    counts = []
    for _ in range(2):  # the first makes tables
        for videos in (1, 4):
            ids, videos = torch.tensor([[1, *[VIDEO, 2] * videos]]), features(*[(4, 4)] * videos)
            with Operators() as operators, use_order(pool_first=False), pytest.raises(AtFirstLayer):
                run(ids, videos)
            memory = ("aten.empty.memory_format", "aten.fill_.Scalar")  # the suite fills it
            counts.append(sum(operators.calls.values()) - sum(operators.calls[name] for name in memory))
    one, many = counts[2:]
    assert one <= 40
    assert many <= one + 8  # their features, put together, and its views


# ------------------------------------------------------------------------------------------ one upload


def test_tensors_of_one_upload_are_what_they_would_be_alone(gpu):  # noqa: F811
    arrays = [
        np.arange(3, dtype=np.int64),
        np.arange(5, dtype=np.int32),
        None,
        np.array([], np.int32),
        np.arange(6, dtype=np.int32).reshape(2, 3),
        np.arange(4, dtype=np.int64).reshape(4, 1) - 2**40,
    ]
    with gpu:
        there = upload(arrays, GPU)
        assert gpu.calls.count("upload") == 1
    here = upload(arrays, CPU)
    for array, far, near in zip(arrays, there, here, strict=True):
        if array is None:
            assert far is near is None
            continue
        assert gpu.has(far)
        assert not gpu.has(near)
        for x in (far, near):
            assert x.dtype == torch.from_numpy(array).dtype
            assert x.is_contiguous()
            assert x.tolist() == array.tolist()
        assert far.data_ptr() % 16 == 0


def test_what_is_written_to_a_tensor_of_an_upload_leaves_the_others_to_autograd(gpu):  # noqa: F811
    with gpu:
        rows, labels = upload([np.array([1, 0]), np.array([3, 4])], GPU)
    x = torch.randn(2, 3, requires_grad=True)
    y = torch.nn.functional.embedding(rows, x)
    labels.fill_(-100)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 3))
    assert rows.tolist() == [1, 0]


@torch.no_grad()
def test_labels_that_come_back_are_not_the_caller_s():
    ids = torch.tensor([[1, 2, 3]])
    output = tiny_model("eager")(ids, None, None, ids)
    output.labels.fill_(-100)
    output.token_types.fill_(0)
    assert ids.tolist() == [[1, 2, 3]]


def test_a_function_transform_s_prompt_is_read():
    model, ids = tiny_model("eager"), torch.tensor([[1, VIDEO, 3]])
    videos = features((4, 4))
    weights = {name: x.detach() for name, x in model.named_parameters()}

    def loss(weights, ids):
        return torch.func.functional_call(model, weights, (ids, videos, None, ids.clamp(min=0))).loss

    found = torch.func.grad(loss)(weights, ids)
    model(ids, videos, None, ids.clamp(min=0)).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------ caches


def test_each_layer_s_cache_is_zeros_of_its_own():
    shape = {"num_layers": 5, "batch": 2, "capacity": 7, "num_kv_heads": 3, "head_dim": 4}
    cache = KVCache(**shape, dtype=torch.float32, device=CPU)
    kvs = [layer.kv for layer in cache.layers]
    assert len({kv.untyped_storage().data_ptr() for kv in kvs}) == 5
    for i, kv in enumerate(kvs):
        assert kv.shape == (2, 7, 3, 2, 4)
        assert kv.is_contiguous()
        assert not kv.count_nonzero()
        cache.layers[i].fill(*torch.full((2, 2, 7, 3, 4), 1.0 + i))
        assert [float(x.max()) for x in kvs] == [1.0 + j if j <= i else 0.0 for j in range(5)]
        assert float(kv.min()) == 1.0 + i


# ------------------------------------------------------------------------------------------ rotary tables

ARGUMENTS = (24, 1e4, torch.float32, CPU)


def same_memory(a, b):
    return all(x.data_ptr() == y.data_ptr() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("head_dim", "theta"), [(24, 1e4), (24, 1e6), (128, 1e6)])
def test_tables_of_the_first_positions_are_those_of_any(dtype, head_dim, theta):
    for length in (1, 2, 3, 5, 31, 32, 33, 1000, 4097):
        found = first_rope(length, head_dim, theta, dtype, CPU)
        for table, wanted in zip(found, rope_at(torch.arange(length), head_dim, theta, dtype), strict=True):
            assert table.dtype == dtype
            assert torch.equal(table, wanted)


def test_tables_of_other_types_heads_and_angles_are_others():
    kinds = list(product((24, 64), (1e4, 1e6), (torch.float32, torch.float16)))
    for _ in range(2):  # the second time they are there
        for dim, theta, dtype in kinds:
            found, wanted = first_rope(5, dim, theta, dtype, CPU), rope_at(torch.arange(5), dim, theta, dtype)
            for table, like in zip(found, wanted, strict=True):
                assert table.dtype == dtype
                assert torch.equal(table, like)
    assert len(layers._first) == len(kinds)


def test_tables_are_kept_for_lengths_that_round_to_one():
    long = first_rope(8, *ARGUMENTS)
    assert same_memory(long, first_rope(5, *ARGUMENTS))
    assert not same_memory(long, first_rope(9, *ARGUMENTS))
    assert len(layers._first) == 2


def test_tables_stay_within_a_bound():
    for i in range(20):
        first_rope(2**14, 128, 1e4 + i, torch.float32, CPU)  # 16 MiB
    assert len(layers._first) == 4
    assert layers._first.num_bytes == layers._first.max_bytes == 2**26


def test_tables_that_would_fill_the_bound_alone_are_not_kept(monkeypatch):
    size = 2 * 64 * 24 * 4
    for max_bytes, kept in ((size, 1), (size - 1, 0)):
        monkeypatch.setattr(layers, "_first", BoundedCache(max_bytes))
        found = first_rope(60, *ARGUMENTS)
        assert len(layers._first) == kept
        for table, wanted in zip(found, rope_at(torch.arange(60), *ARGUMENTS[:-1]), strict=True):
            assert torch.equal(table, wanted)


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.device("meta"), Operators])
def test_tables_first_made_in_a_mode_serve_outside_it(mode):
    with mode():
        inside = first_rope(5, *ARGUMENTS)
    outside = first_rope(5, *ARGUMENTS)
    assert same_memory(inside, outside)
    x = torch.randn(1, 5, 2, 24, requires_grad=True)
    layers.apply_rope(x, outside).sum().backward()
    for table, wanted in zip(outside, rope_at(torch.arange(5), *ARGUMENTS[:-1]), strict=True):
        assert type(table) is torch.Tensor
        assert not table.is_inference()
        assert not table.requires_grad
        assert torch.equal(table, wanted)


def test_tables_first_made_under_a_function_transform_serve_outside_it():
    x = torch.randn(5, 2, 24)
    torch.func.grad(lambda x: layers.apply_rope(x[None], first_rope(5, *ARGUMENTS)).sum())(x)
    assert first_rope(5, *ARGUMENTS)[0].tolist() == rope_at(torch.arange(5), *ARGUMENTS[:-1])[0].tolist()


def test_threads_get_the_same_tables():
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: first_rope(300, *ARGUMENTS), range(32)))
    wanted = rope_at(torch.arange(300), *ARGUMENTS[:-1])
    assert all(torch.equal(x, y) for tables in found for x, y in zip(tables, wanted, strict=True))
    assert len(layers._first) == 1


def test_each_stream_has_tables_of_its_own(gpu, monkeypatch):  # noqa: F811
    arguments = (*ARGUMENTS[:-1], GPU)
    other = PretendGPU()
    with gpu:
        mine = first_rope(5, *arguments)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: other)
        assert not same_memory(mine, first_rope(5, *arguments))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: gpu)
        assert same_memory(mine, first_rope(5, *arguments))


def test_a_graph_keeps_no_tables_and_reads_none_that_may_go(gpu, monkeypatch):  # noqa: F811
    arguments = (*ARGUMENTS[:-1], GPU)
    with gpu:
        kept = first_rope(5, *arguments)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        first, second = first_rope(5, *arguments), first_rope(5, *arguments)
        assert not same_memory(first, kept)
        assert not same_memory(first, second)
        first_rope(100, *arguments)
    assert len(layers._first) == 1
    for table, wanted in zip(first, rope_at(torch.arange(5), *ARGUMENTS[:-1]), strict=True):
        assert table.tolist() == wanted.tolist()


@torch.no_grad()
def test_tables_are_no_part_of_a_model():
    model, ids = tiny_model("eager"), torch.tensor([[1, 2, 3]])
    names, before = list(model.state_dict()), len(pickle.dumps(model))
    expected = model(ids).logits
    assert list(model.state_dict()) == names
    assert len(pickle.dumps(model)) == before
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, expected)
    assert len(layers._first) == 1


@torch.no_grad()
def test_models_of_other_rotations_do_not_share():
    ids = torch.tensor([[1, 2, 3, 4]])
    slow, fast = tiny_model("eager", rope_theta=1e6), tiny_model("eager", rope_theta=10.0)
    first = slow(ids).logits
    assert not torch.equal(fast(ids).logits, first)
    assert torch.equal(slow(ids).logits, first)


def test_a_session_in_inference_mode_and_training_after_it_share_tables():
    model, (ids, mask) = tiny_model("eager"), padded(PROMPTS)
    with torch.inference_mode():
        session = DecodeSession(model, ids, features(*PROMPT_VIDEOS), mask, max_new_tokens=3)
        session.step(session.most_likely)
    output = model.train()(ids, features(*PROMPT_VIDEOS), mask, ids.clamp(min=0))
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
