"""Cache layers of 8 bits hold what was written, by the scales of the prompt, whatever is done."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from visionpulse.float8 import FLOAT8
from visionpulse.models import float8_layers, kv_layers
from visionpulse.models.conversation import Conversation
from visionpulse.testing.draw import Draws

SLOTS = 640


def growing():
    return kv_layers.mixed(float8_layers.Float8Growing, DynamicLayer)()


def static():
    return kv_layers.mixed(float8_layers.Float8Static, StaticLayer)(SLOTS)


KINDS = pytest.mark.parametrize("make", [growing, static], ids=lambda make: make.__name__)


def counting(make):
    layer = make()
    layer.clamped = float8_layers.Clamped()
    return layer


def states(n, rows=2, seed=0, size=1.0, dtype=torch.float32):
    draws, shape = Draws(seed), (rows, 2, n, 8)
    # heads of other sizes, so that a scale of the wrong one shows
    sizes = size * torch.tensor([1.0, 20.0])[:, None, None]
    return [(draws.normal(*shape) * sizes * factor).to(dtype) for factor in (1, 0.01)]


def step(layer, *new):
    layer.serves_step = True
    return layer.update(*new)


def held(layer, dtype=torch.float64):
    return layer.read_back(dtype, int(layer.get_seq_length()))


def assert_near(read, written):
    """Within half a step of 3 bits, and of the smallest step that the scale has."""
    for got, wanted in zip(read, written, strict=True):
        got, wanted = got.double(), wanted.double()
        finest = wanted.abs().amax((0, 2, 3), keepdim=True) * 2.0**-15
        assert ((got - wanted).abs() <= wanted.abs() / 16 + finest).all()


@KINDS
def test_a_prefill_attends_to_what_it_computed_and_a_step_to_what_is_stored(make):
    layer, first, one = make(), states(30), states(1, seed=1)
    for got, wanted in zip(layer.update(*first), first, strict=True):
        assert torch.equal(got[:, :, :30], wanted)
    got = step(layer, *one)
    assert all(part.dtype == FLOAT8 for part in got)
    assert_near(held(layer), [torch.cat(pair, 2) for pair in zip(first, one, strict=True)])
    more, before = states(7, seed=2), held(layer, torch.float32)
    for got, old, new in zip(layer.update(*more), before, more, strict=True):
        assert torch.equal(got[:, :, :31], old)
        assert torch.equal(got[:, :, 31:38], new)


@KINDS
def test_an_announced_step_is_announced_once(make):
    layer = make()
    layer.update(*states(5))
    assert step(layer, *states(1))[0].dtype == FLOAT8
    assert layer.update(*states(1))[0].dtype == torch.float32


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_powers_of_two_that_leave_room(make, dtype):
    layer, new = make(), states(30, dtype=dtype)
    layer.update(*new)
    for scale, part in ((layer.k_scale, new[0]), (layer.v_scale, new[1])):
        largest = part.abs().amax((0, 2, 3)).float()
        assert (scale.log2() == scale.log2().round()).all()
        assert (448 * scale >= 3.5 * largest).all()
        assert (448 * scale <= 7 * largest).all()
    # so they are read back in 16 bits as in 64
    for narrow, wide in zip(held(layer, dtype), held(layer), strict=True):
        assert torch.equal(narrow.double(), wide)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, 1e-45])
def test_a_head_without_a_usable_size_has_scale_one(value):
    layer, (k, v) = growing(), states(5)
    k[:, 0] = value
    layer.update(k, v)
    assert layer.k_scale[0] == 1 and layer.k_scale[1] != 1
    assert torch.equal(held(layer)[0][:, 0].isnan(), k[:, 0].isnan())


@KINDS
def test_a_later_chunk_of_a_prompt_raises_the_scales(make):
    layer, first, larger = counting(make), states(30), states(20, seed=1, size=50)
    layer.update(*first)
    before = layer.scales.clone()
    layer.update(*larger)
    assert (layer.scales > before).all()
    assert_near(held(layer), [torch.cat(pair, 2) for pair in zip(first, larger, strict=True)])
    assert layer.clamped.total() == 0
    layer.update(*first)  # smaller ones change nothing
    assert torch.equal(layer.scales, float8_layers.scales_for(torch.cat(larger, 1)))


@KINDS
def test_what_a_step_cannot_hold_is_clamped_and_counted(make):
    layer, first = counting(make), states(30)
    layer.update(*first)
    before = layer.scales.clone()
    k, v = states(1, seed=1)
    k[0, 0, 0, :3] = torch.tensor([1e6, -1e6, torch.nan])
    v[1, 1, 0, 4] = 1e6
    step(layer, k, v)
    assert torch.equal(layer.scales, before)
    assert layer.clamped.total() == 3
    read_k, read_v = held(layer)
    assert read_k[0, 0, 30, :2].tolist() == [448 * before[0], -448 * before[0]]
    assert read_k[0, 0, 30, 2].isnan()
    assert read_v[1, 1, 30, 4] == 448 * before[3]
    twin = copy.deepcopy(layer)
    step(twin, k, v)
    assert layer.clamped.total() == 6  # copies count together
    layer.clamped.reset()
    assert twin.clamped.total() == 0


ACTIONS = {
    "crop": (lambda layer: layer.crop(-3), lambda t: t[:, :, :-3]),
    "reorder": (lambda layer: layer.reorder_cache(torch.tensor([1, 0])), lambda t: t[[1, 0]]),
    "repeat": (lambda layer: layer.batch_repeat_interleave(2), lambda t: t.repeat_interleave(2, 0)),
    "select": (lambda layer: layer.batch_select_indices(torch.tensor([-1])), lambda t: t[[-1]]),
    "offload": (lambda layer: (layer.offload(), layer.prefetch()), lambda t: t),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("in_inference_mode", [False, True])
def test_rows_and_tokens_move_as_in_a_dynamic_layer(action, in_inference_mode):
    layer, (act, same) = growing(), ACTIONS[action]
    written = None
    for seed, n in enumerate((30, 1, 1, 300, 1)):
        new = states(n, rows=2 if written is None else written[0].shape[0], seed=seed)
        with torch.inference_mode(in_inference_mode and seed % 2 == 0):
            (step if n == 1 else type(layer).update)(layer, *new)
        pairs = new if written is None else zip(written, new, strict=True)
        written = [p if written is None else torch.cat(p, 2) for p in pairs]
        act(layer)
        written = [same(part) for part in written]
        assert layer.get_seq_length() == written[0].shape[2]
        assert_near(held(layer), written)


def test_rows_of_a_static_layer_can_be_reordered():
    layer, new = static(), states(9)
    layer.update(*new)
    layer.reorder_cache(torch.tensor([1, 0]))
    assert_near(held(layer), [part[[1, 0]] for part in new])


@KINDS
def test_a_reset_layer_takes_the_scales_of_the_next_prompt(make):
    layer = make()
    layer.update(*states(20, size=100))
    layer.reset()
    if make is growing and layer.is_initialized:  # transformers before 5.18 zeroes
        layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
    new = states(7, seed=1)
    layer.update(*new)
    assert torch.equal(layer.scales, float8_layers.scales_for(torch.cat(new, 1)))
    assert_near(held(layer), new)


@KINDS
def test_copies_are_apart(make):
    layer = make()
    layer.update(*states(20))
    before = held(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for a, b in zip(held(twin), before, strict=True):
            assert torch.equal(a, b)
        step(twin, *states(1, seed=5))
        assert twin.get_seq_length() == 21 and layer.get_seq_length() == 20
        for a, b in zip(held(layer), before, strict=True):
            assert torch.equal(a, b)


def test_steps_write_in_place_and_memory_is_bounded():
    layer = growing()
    layer.update(*states(8192, rows=1))
    place, held_bytes = layer.keys.data_ptr(), layer.keys.untyped_storage().nbytes()
    assert held_bytes <= 1.02 * 8192 * 2 * 8
    for seed in range(100):
        step(layer, *states(1, rows=1, seed=seed))
    assert layer.keys.data_ptr() == place


def test_keys_and_values_of_two_shapes_are_refused():
    k, v = states(3)
    with pytest.raises(ValueError, match="one shape"):
        growing().update(k, v[..., :4])


def test_a_gradient_to_stored_tokens_is_refused():
    layer, (k, v) = growing(), states(5)
    k.requires_grad_()
    assert layer.update(k, v)[0] is k  # in its own forward it has one
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        layer.update(k[:, :, :1], v[:, :, :1])


def llama(**changes):
    from transformers import LlamaConfig

    return LlamaConfig(num_hidden_layers=2, **changes)


def fit(cache, in_8_bits=True, full=(True, True)):
    kv_layers.swap_layers(cache, len(full))
    float8_layers.fit_layers(cache, full, in_8_bits, float8_layers.Clamped())
    return [type(layer).__name__ for layer in cache.layers]


def test_what_lies_in_a_cache_is_stored_anew():
    cache, new = DynamicCache(), states(9)
    for i in range(2):
        cache.update(*new, i)
    carried = Conversation()
    kv_layers.attach(cache, 0, carried)
    assert fit(cache) == ["CarrierFloat8GrowingDynamicLayer", "Float8GrowingDynamicLayer"]
    assert kv_layers.conversation_of(cache, 0) is carried
    for layer in cache.layers:
        assert_near(held(layer), new)
    assert fit(cache, in_8_bits=False)[1] == "Float8GrowingDynamicLayer"  # it has tokens


def test_what_lies_in_a_static_cache_is_stored_anew_and_an_empty_one_changes_back():
    cache, new = StaticCache(config=llama(), max_cache_len=SLOTS), states(9)
    for i in range(2):
        cache.update(*new, i)
    assert fit(cache) == ["Float8StaticStaticLayer"] * 2
    for layer in cache.layers:
        assert_near(held(layer), new)
    cache.reset()
    assert fit(cache, in_8_bits=False) == ["StaticLayer"] * 2


def test_layers_without_full_attention_stay():
    assert fit(DynamicCache(), full=(False, True)) == [
        "GrowingDynamicLayer", "Float8GrowingDynamicLayer",
    ]  # fmt: skip


def test_a_cache_that_cannot_store_8_bits_is_refused():
    class Own(DynamicLayer):
        pass

    cache = DynamicCache(config=llama())
    cache.layers[1] = Own()
    with pytest.raises(TypeError, match=r"a dynamic or a static cache, got a Own"):
        fit(cache)
    cache = DynamicCache(config=llama())
    cache.offloading = True
    with pytest.raises(TypeError, match="an offloaded cache"):
        fit(cache)
