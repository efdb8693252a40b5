"""The cache is found under any name, old, new or unknown, and by its position."""

import inspect

import pytest
import torch
import transformers
from torch import nn
from transformers import Cache, DynamicCache

import visionpulse as vp
from visionpulse.models.arguments import Arguments, cache_of_output


class _Old(nn.Module):
    def forward(self, inputs_embeds=None, past_key_values=None, use_cache=None):
        pass


class _New(nn.Module):
    def forward(self, inputs_embeds=None, cache=None, use_cache=None, **kwargs):
        pass


class _Typed(nn.Module):
    def forward(self, inputs_embeds=None, memory: Cache | None = None):
        pass


class _Unknown(nn.Module):
    def forward(self, inputs_embeds=None, **kwargs):
        pass


@pytest.mark.parametrize(
    "module, name",
    [(_Old, "past_key_values"), (_New, "cache"), (_New, "past_key_values"), (_Typed, "memory"),
     (_Unknown, "memory")],
)  # fmt: skip
def test_the_cache_is_found_by_name_by_place_and_by_kind(module, name):
    arguments, cache = Arguments(module()), DynamicCache()
    assert arguments.cache((), {name: cache, "use_cache": True}) is cache
    assert arguments.cache((torch.zeros(1), cache), {}) is cache
    assert arguments.cache((torch.zeros(1),), {"use_cache": True}) is None


def test_a_cache_of_another_kind_is_found_by_its_name():
    pairs = ((torch.zeros(1), torch.zeros(1)),)
    assert Arguments(_Old()).cache((), {"past_key_values": pairs}) is pairs
    assert Arguments(_Typed()).cache((), {"memory": pairs}) is pairs


def test_the_cache_of_an_output_is_found():
    cache, hidden = DynamicCache(), torch.zeros(1)
    output = transformers.modeling_outputs.BaseModelOutputWithPast(hidden, cache)
    assert cache_of_output(output) is cache
    assert cache_of_output((hidden, cache)) is cache
    assert cache_of_output((hidden,)) is None
    assert cache_of_output(hidden) is None


def test_a_decoder_whose_cache_is_renamed_is_pruned_as_before(tiny, monkeypatch):
    vlm = tiny("llava")
    decoder = vlm.model.get_decoder()
    inner = decoder.forward

    name = next(n for n in ("cache", "past_key_values") if n in inspect.signature(inner).parameters)

    def renamed(self, memory=None, **kwargs):
        return inner(**{name: memory}, **kwargs)

    def rename(module, args, kwargs):
        for name in ("cache", "past_key_values"):
            if name in kwargs:
                kwargs["memory"] = kwargs.pop(name)
        return args, kwargs

    with vp.patch(vlm.model):
        expected = vlm.generate(vlm.inputs())
    handle = decoder.register_forward_pre_hook(rename, with_kwargs=True)
    monkeypatch.setattr(decoder, "forward", renamed.__get__(decoder))
    with vp.patch(vlm.model) as session:
        assert torch.equal(vlm.generate(vlm.inputs()), expected)
        assert session.stats.steps == 7
    handle.remove()
