"""A growing layer holds what a dynamic one holds, and costs less; conversations go with a cache."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import visionpulse as vp
from visionpulse.models import kv_layers
from visionpulse.models.conversation import Conversation, visual_set
from visionpulse.models.layer_ends import CommonEnd
from visionpulse.models.sliding_layers import Sliding
from visionpulse.testing.draw import Draws


def growing():
    return kv_layers.mixed(kv_layers.Growing, DynamicLayer)()


def states(n, rows=2, seed=0, dtype=torch.float32):
    draws, shape = Draws(seed), (rows, 2, n, 8)
    return [draws.normal(*shape).to(dtype) for _ in range(2)]


def reset_all(layers):
    for layer in layers:
        layer.reset()
        if layer.is_initialized:  # transformers before 5.18 zeroes instead of forgetting
            layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]


ACTIONS = {
    "crop": lambda layer: layer.crop(-3),
    "crop-nothing": lambda layer: layer.crop(0),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([-1])),
    "offload": lambda layer: (layer.offload(), layer.prefetch()),
    "replace": lambda layer: setattr(layer, "keys", layer.keys.clone()),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("in_inference_mode", [False, True])
def test_growing_layer_holds_what_a_dynamic_layer_holds(action, in_inference_mode):
    pair = DynamicLayer(), growing()
    for seed, n in enumerate((30, 1, 1, 300, 1)):
        new = states(n, rows=pair[0].keys.shape[0] if seed else 2, seed=seed)
        with torch.inference_mode(in_inference_mode and seed % 2 == 0):
            out = [layer.update(*new) for layer in pair]
        for a, b in zip(*out, strict=True):
            assert torch.equal(a, b)
        assert pair[0].get_seq_length() == pair[1].get_seq_length()
        assert pair[0].get_mask_sizes(1) == pair[1].get_mask_sizes(1)
        for layer in pair:
            ACTIONS[action](layer)
        assert torch.equal(pair[0].keys, pair[1].keys)
        assert torch.equal(pair[0].values, pair[1].values)


def test_growing_layer_can_be_reset_and_filled_again():
    pair = DynamicLayer(), growing()
    for layer in pair:
        layer.update(*states(20))
    reset_all(pair)
    for n in (7, 1):
        out = [layer.update(*states(n, seed=n)) for layer in pair]
        assert torch.equal(out[0][0], out[1][0])
        assert torch.equal(out[0][1], out[1][1])


WINDOW = 12


def sliding():
    return kv_layers.mixed(Sliding, DynamicSlidingWindowLayer)(WINDOW)


REWINDABLE = {
    "growing": (growing, DynamicLayer),
    "sliding": (sliding, lambda: DynamicSlidingWindowLayer(WINDOW)),
}


def assert_alike(mine, theirs):
    assert mine.get_seq_length() == theirs.get_seq_length()
    assert mine.get_mask_sizes(3) == theirs.get_mask_sizes(3)
    assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)


@pytest.mark.parametrize("kind", REWINDABLE)
@pytest.mark.parametrize("prompt", (3, 11, 12, 40))
def test_a_layer_that_is_set_back_is_one_that_never_went_on(kind, prompt):
    """Over rounds of drafts, a check and accepted tokens; nobody looks, or somebody does."""
    made, plain = REWINDABLE[kind]
    draws = Draws(7)
    for looks in (False, True):
        layer, tokens = made(), [states(prompt)]
        layer.update(*tokens[0])

        def alone(tokens=tokens):
            other = plain()
            for new in tokens:
                other.update(*new)
            return other

        for seed in range(8):
            length, drafted = layer.get_seq_length(), 15 if seed == 3 else 4
            for i in range(drafted):
                layer.update(*states(1, seed=100 + i))
                if looks:
                    assert layer.keys.shape[2]
            end = CommonEnd([layer], length)
            assert end.is_of([layer])
            check = states(drafted + 1, seed=seed)
            out = layer.update(*check)
            other = alone()
            expected = other.update(*check)
            assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])
            end = CommonEnd([layer], length + 1)
            accepted = int(draws.integers(1, drafted + 2, 1))
            for count in range(1, accepted + 1):
                end.move(length + count)
                tokens.append([part[:, :, count - 1 : count] for part in check])
                if looks:
                    assert_alike(layer, alone())
            for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                assert_alike(twin, alone())
            assert end.is_of([layer])
    layer.reorder_cache(torch.tensor([1, 0]))
    assert not end.is_of([layer])
    other = alone()
    other.reorder_cache(torch.tensor([1, 0]))
    assert_alike(layer, other)
    new = states(2, seed=9)
    assert torch.equal(layer.update(*new)[0], other.update(*new)[0])
    assert_alike(layer, other)


def test_copies_are_apart():
    layer = growing()
    layer.update(*states(20))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        before = layer.keys.clone()
        new = states(1, seed=5)
        keys, _ = twin.update(*new)
        assert torch.equal(keys, torch.cat((before, new[0]), 2))
        other = states(1, seed=6)
        keys, _ = layer.update(*other)
        assert torch.equal(keys, torch.cat((before, other[0]), 2))
        layer.crop(-1)


def test_steps_write_in_place_and_views_stay_valid():
    layer = growing()
    keys, _ = layer.update(*states(300))
    kept, place = keys.clone(), keys.data_ptr()
    for seed in range(200):
        later, _ = layer.update(*states(1, seed=seed))
        assert later.data_ptr() == place
    assert torch.equal(keys, kept)


def test_memory_is_bounded():
    layer = growing()
    layer.update(*states(4096, rows=1))
    for seed in range(1200):
        layer.update(*states(1, rows=1, seed=seed))
        held = layer.keys.untyped_storage().nbytes() // (2 * 8 * 4)
        assert held <= 1.25 * layer.get_seq_length()
    layer.update(*states(4000, rows=1))
    layer.crop(-4500)
    tokens = layer.get_seq_length()
    assert tokens > 4096
    assert layer.keys.untyped_storage().nbytes() // (2 * 8 * 4) <= 1.25 * tokens


def test_gradients_flow_as_in_a_dynamic_layer():
    layer = growing()
    k, v = (t.requires_grad_() for t in states(5))
    layer.update(k, v)
    keys, values = layer.update(*states(1))
    (keys.sum() + values.sum()).backward()
    assert torch.equal(k.grad, torch.ones_like(k))


def test_only_untouched_dynamic_layers_are_swapped():
    class Own(DynamicLayer):
        pass

    cache = DynamicCache()
    cache.layer_class_to_replicate = Own
    kv_layers.swap_layers(cache, 3)
    assert cache.layers == []
    cache = DynamicCache()
    used = DynamicLayer()
    used.update(*states(3))
    cache.layers.extend([Own(), used])
    kv_layers.swap_layers(cache, 4)
    assert [type(layer).__name__ for layer in cache.layers] == [
        "Own",
        "DynamicLayer",
        "GrowingDynamicLayer",
        "GrowingDynamicLayer",
    ]


def carried(rows=3):
    mask = torch.zeros(rows, 12, dtype=torch.bool)
    for b in range(rows):
        mask[b, 2 : 4 + b] = True
    cache = DynamicCache()
    kv_layers.swap_layers(cache, 2)
    for i in range(2):
        cache.update(*states(12, rows=rows), i)
    conversation = Conversation()
    conversation.set_visual(visual_set(mask, None))
    kv_layers.attach(cache, 0, conversation)
    return cache, mask


def seen(cache, size=12):
    return kv_layers.conversation_of(cache, 0).visual.mask(size)


def test_a_conversation_is_cropped_and_its_rows_move_with_the_cache():
    cache, mask = carried()
    assert torch.equal(seen(cache), mask)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert torch.equal(seen(cache), mask[[2, 0, 1]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(seen(cache), mask[[2, 2, 0, 0, 1, 1]])
    cache.batch_select_indices(torch.tensor([1, 4]))
    assert torch.equal(seen(cache), mask[[2, 1]])
    assert torch.equal(kv_layers.conversation_of(cache, 0).inverse, torch.tensor([1 / 4, 1 / 3]))
    cache.crop(-8)
    assert torch.equal(seen(cache, 4), mask[[2, 1]][:, :4])
    cache.crop(-3)
    assert kv_layers.conversation_of(cache, 0).visual is None
    cache.reset()
    assert kv_layers.conversation_of(cache, 0) is None


def test_a_crop_keeps_the_shape_of_a_static_cache():
    mask = torch.zeros(1, 64, dtype=torch.bool)
    mask[0, 6:22] = True
    conversation = Conversation(capacity=64)
    conversation.set_visual(visual_set(mask, 64))
    conversation.prepare_lookback(None)
    buffers = conversation.lookback
    for length in (15, 4, 0):
        conversation.crop(length)
        assert torch.equal(conversation.visual.mask(length), mask[:, :length])
        assert (conversation.visual.size, conversation.visual.max_count) == (64, 64)
        assert conversation.lookback is buffers
        assert int(conversation.lookback.selection(0).indices.max()) == (
            length - 1 if length > 6 else -1
        )


def test_a_conversation_is_copied_with_the_cache():
    cache, mask = carried()
    twin = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert torch.equal(seen(twin), mask)
    assert torch.equal(seen(pickle.loads(pickle.dumps(twin))), mask)


def test_a_released_layer_has_its_own_class():
    cache = StaticCache(config=_config(), max_cache_len=16)
    kinds = [type(layer) for layer in cache.layers]
    kv_layers.attach(cache, 0, Conversation())
    assert type(cache.layers[0]) is not kinds[0]
    kv_layers.release(cache)
    assert [type(layer) for layer in cache.layers] == kinds
    assert not hasattr(cache.layers[0], "visionpulse")
    kv_layers.release(None)


def _config():
    from transformers import LlamaConfig

    return LlamaConfig(num_hidden_layers=2)


def test_a_generation_is_held_in_growing_layers(tiny):
    vlm = tiny("qwen3_5")
    cache = DynamicCache(config=vlm.model.config.get_text_config())
    with vp.patch(vlm.model):
        vlm.generate(vlm.inputs(), past_key_values=cache)
    names = [type(layer).__name__ for layer in cache.layers]
    assert names[3] == "CarrierGrowingDynamicLayer"
    assert names[7] == "GrowingDynamicLayer"
    assert set(names[:3]) == {"LinearAttentionLayer"}
