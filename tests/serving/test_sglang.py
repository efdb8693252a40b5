"""The backend of SGLang's plugin over a stand-in for SGLang's own; and its contract with that."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import visionpulse as vp
from visionpulse.schedule import Role
from visionpulse.serving import sglang
from visionpulse.serving.setting import Engine
from visionpulse.testing.draw import Draws

sys.path.insert(0, str(Path(__file__).parent))
import environment

LAYERS, HEADS, KV_HEADS, DIM, LONGEST, REQUESTS = 4, 8, 2, 64, 96, 5
PICTURES = {"a": [(3, 39)], "b": [(0, 7), (20, 59)], "c": [(5, 89)], "text": None}


class Theirs:
    """What SGLang's backend is to ours; its attention gives sevens."""

    def __init__(self, runner):
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.begun = 0

    def init_cuda_graph_state(self, max_bs, max_num_tokens):
        pass

    def init_forward_metadata(self, forward_batch):
        self.begun += 1

    def init_forward_metadata_out_graph(self, forward_batch, in_capture=False):
        self.begun += 1

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **more):
        return torch.full_like(q, 7)


class Pool:
    """Keys and values by token."""

    def __init__(self, draws):
        size = (REQUESTS * LONGEST, KV_HEADS, DIM)
        self.k = [draws.normal(*size) for _ in range(LAYERS)]
        self.v = [draws.normal(*size) for _ in range(LAYERS)]

    def get_key_buffer(self, layer):
        return self.k[layer]

    def get_value_buffer(self, layer):
        return self.v[layer]

    def set_kv_buffer(self, layer, loc, k, v, k_scale, v_scale):
        self.k[layer.layer_id][loc], self.v[layer.layer_id][loc] = k, v


@pytest.fixture
def made(monkeypatch):
    """A backend of ours, its pool, and queries."""
    monkeypatch.setenv("VISIONPULSE_SERVING", '{"ratio": [0.1, 0.5], "anchor": 1}')
    facts = Engine(full=(True,) * LAYERS, heads=HEADS, device="cuda", has_graphs=True)
    monkeypatch.setattr(sglang, "engine_of", lambda runner: facts)
    monkeypatch.setattr(sglang, "_write_loc", lambda batch: batch.out_cache_loc)
    draws = Draws(4)
    slots = draws.permutation(REQUESTS * LONGEST).view(REQUESTS, LONGEST).int()
    runner = SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_to_token=slots), token_to_kv_pool=Pool(draws)
    )
    backend = type("Ours", (sglang.Decode, Theirs), {})(runner)
    return backend, runner.token_to_kv_pool, draws.normal(REQUESTS, HEADS, DIM), slots


def modality(name="IMAGE"):
    return SimpleNamespace(name=name)


def batch_of(names, at, lengths, pictures=PICTURES, **changes):
    """A decode batch as SGLang shows it."""
    known = []
    for name in names:
        items = [SimpleNamespace(modality=modality(), offsets=pictures[name])]
        items += [SimpleNamespace(modality=modality("AUDIO"), offsets=[(60, 70)])]
        known.append(None if pictures[name] is None else SimpleNamespace(mm_items=items))
    fields = {
        "batch_size": len(at), "forward_mode": SimpleNamespace(is_decode=lambda: True),
        "req_pool_indices": torch.tensor(at), "seq_lens": torch.tensor(lengths),
        "rids": list(names), "mm_inputs": known, "out_cache_loc": None,
    }  # fmt: skip
    return SimpleNamespace(**fields | changes)


def layer_of(number):
    return SimpleNamespace(
        layer_id=number, tp_q_head_num=HEADS, qk_head_dim=DIM, scaling=DIM**-0.5, logit_cap=0.0,
        k_scale=None, v_scale=None,
    )  # fmt: skip


def run(backend, batch, q, number, k=None, v=None, **more):
    n = len(batch.req_pool_indices)
    q = q[:n].flatten(1)
    got = backend.forward_decode(q, k, v, layer_of(number), batch, k is not None, **more)
    return got.view(n, HEADS, DIM)


def expected(pool, slots, batch, q, number, selection=None):
    """What the ops say to the same rows, as contiguous caches."""
    rows = batch.req_pool_indices
    k, v = (buffer[number][slots[rows].long()].transpose(1, 2) for buffer in (pool.k, pool.v))
    kv = vp.KVCache(k, v, batch.seq_lens.int())
    spans = [[(a, b + 1) for a, b in PICTURES.get(name) or ()] for name in batch.rids]
    spans += [[]] * (len(rows) - len(spans))
    visual = vp.VisualTokens.from_spans(spans)
    config = vp.PulseConfig(ratio=(0.1, 0.5), anchor=1)
    if selection is None:
        return vp.decode(q[: len(rows)], kv, visual, config)
    return vp.attend(q[: len(rows)], kv, visual, selection), None


@pytest.mark.parametrize("begin", ("eager", "replay"))
def test_rows_are_those_of_the_ops_whoever_comes_and_goes(made, begin):
    backend, pool, q, slots = made
    backend.init_cuda_graph_state(REQUESTS, REQUESTS)
    memory = set()
    for names, at, lengths in (
        (("a", "text", "b"), [2, 0, 4], [60, 9, 70]),
        (("b", "c"), [4, 1], [71, 95]),
        (("c", "a", "b"), [1, 2, 4, 3, 3], [96, 62, 73, 1, 1]),  # two rows of padding
    ):
        batch = batch_of(names, at, lengths)
        if begin == "eager":
            backend.init_forward_metadata(batch)
        else:
            backend.init_forward_metadata_out_graph(batch)
            step = backend.step
            memory |= {step.block_table.data_ptr(), step.lengths.data_ptr()}
        out, selection = expected(pool, slots, batch, q, 1)
        torch.testing.assert_close(run(backend, batch, q, 1), out, rtol=1e-5, atol=1e-6)
        follower, _ = expected(pool, slots, batch, q, 3, selection)
        torch.testing.assert_close(run(backend, batch, q, 3), follower, rtol=1e-5, atol=1e-6)
        assert (run(backend, batch, q, 0) == 7).all()  # before the anchor
    assert len(memory) == (2 if begin == "replay" else 0)  # a graph reads what stays


def test_new_keys_and_values_are_written_first(made):
    backend, pool, q, slots = made
    batch = batch_of(("a",), [2], [50], out_cache_loc=slots[2, 49:50].long())
    backend.init_forward_metadata(batch)
    k, v = torch.ones(1, KV_HEADS, DIM), torch.ones(1, KV_HEADS, DIM)
    out = run(backend, batch, q, 1, k, v)
    assert (pool.k[1][slots[2, 49].long()] == 1).all()
    torch.testing.assert_close(out, expected(pool, slots, batch, q, 1)[0], rtol=1e-5, atol=1e-6)


def test_what_is_no_decode_step_is_sglangs(made):
    backend, _, q, _ = made
    mode = SimpleNamespace(is_decode=lambda: False)
    batch = batch_of(("a",), [2], [50], forward_mode=mode)
    backend.init_forward_metadata(batch)
    assert (run(backend, batch, q, 1) == 7).all() and backend.begun == 1


def test_a_step_without_pictures_is_sglangs(made):
    backend, _, q, _ = made
    batch = batch_of(("text",), [2], [50])
    backend.init_forward_metadata(batch)
    assert (run(backend, batch, q, 1) == 7).all()


def test_what_the_kernels_do_not_add_is_refused(made):
    backend, _, q, _ = made
    batch = batch_of(("a",), [2], [50])
    backend.init_forward_metadata(batch)
    with pytest.raises(ValueError, match=r"sinks.*--decode-attention-backend"):
        run(backend, batch, q, 1, sinks=torch.zeros(HEADS))


def test_a_graph_is_replayed_with_the_pictures_of_its_rows():
    batch = batch_of(("a",), [2], [50])
    for call in (((batch, None), {}), ((), {"forward_batch": batch})):
        view = sglang.with_pictures(SimpleNamespace(), *call[0], **call[1])
        assert view.mm_inputs is batch.mm_inputs and view.rids == ["a"]


def test_layers_follow_the_schedule(made):
    assert made[0].setting.roles == (Role.DENSE, Role.ANCHOR, Role.FOLLOWER, Role.FOLLOWER)


@pytest.mark.deep
def test_sglangs_own_classes_have_what_ours_stands_over():
    """In vLLM's Python, which has most of what SGLang imports; the proof brings the rest."""
    command = [str(environment.python()), str(Path(__file__).with_name("sglang_contract.py"))]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "holds" in done.stdout
