"""What transformers says to the same requests, dense or with `vp.patch`, one at a time."""

from contextlib import contextmanager
from unittest import mock

import torch
from asks import Ask

import visionpulse as vp
from visionpulse.data import tiny, trail
from visionpulse.float8 import FLOAT8
from visionpulse.models import float8_layers


def inputs_of(ask: Ask) -> dict:
    ids = torch.tensor([ask.expanded])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if ask.pictures:
        pixels = [torch.from_numpy(trail.patches([picture])) for picture in ask.pictures]
        inputs["mm_token_type_ids"] = (ids == trail.IMAGE).int()
        inputs["pixel_values"] = torch.cat(pixels)
        inputs["image_grid_thw"] = torch.tensor([[1, p.side, p.side] for p in ask.pictures])
    return inputs


def tokens(asks: list[Ask], config: vp.PulseConfig | None, count: int) -> list[list[int]]:
    """Greedy tokens, END no reason to stop, as an engine makes them with `ignore_eos`."""
    model = tiny.load()
    model.generation_config.eos_token_id = None
    if config is not None:
        vp.patch(model, config)
    made = []
    for ask in asks:
        inputs = inputs_of(ask)
        out = model.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=0)
        made.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return made


@contextmanager
def stored_as_in_an_engine(k_scale=1.0, v_scale=1.0):
    """A cache of 8 bits as vLLM has it: one scale each, and a prefill reads what it stored."""
    layer = float8_layers.Float8Growing
    update = layer.update

    def read_back(self, key_states, *args, **kwargs):
        found = update(self, key_states, *args, **kwargs)
        if found[0].dtype == FLOAT8:  # a decode step
            return found
        return self.read_back(key_states.dtype, found[0].shape[2])

    def scales_for(x):  # of K and V side by side
        return torch.tensor([k_scale, v_scale]).repeat_interleave(x.shape[1] // 2)

    with (
        mock.patch.object(float8_layers, "scales_for", scales_for),
        mock.patch.object(layer, "update", read_back),
    ):
        yield
