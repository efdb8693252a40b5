"""What transformers says to the same requests, dense or with `vp.patch`, one at a time."""

import torch
from asks import Ask

import visionpulse as vp
from visionpulse.data import tiny, trail


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
