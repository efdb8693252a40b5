"""The weights of a benchmark's model: fewer distinct layers than it has, and in 8 or 4 bits.

A decode step at batch 1 reads every weight once, so it depends on how many bytes they take and not
on their values. Layers may share weights in turn, as long as those of a whole turn fit no cache.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

GROUP = 128  # inputs with one scale, of 4-bit weights


def repeat_layers(model: nn.Module, layers: int) -> None:
    """Give the decoder `layers` layers: those it has, in turn, with the same parameters."""
    decoder = model.get_decoder()
    distinct = list(decoder.layers)
    for index in range(len(distinct), layers):
        source = distinct[index % len(distinct)]
        # a layer reads its attention implementation from the config: one config, one switch
        shared = (*source.parameters(), decoder.config)
        layer = copy.deepcopy(source, {id(one): one for one in shared})
        layer.self_attn.layer_idx = index
        decoder.layers.append(layer)
    decoder.config.num_hidden_layers = layers
    decoder.config.layer_types = ["full_attention"] * layers


class Packed(nn.Module):
    """A linear layer whose weights torch's own CPU kernel reads in 8 or 4 bits."""

    def __init__(self, product: Callable[[Tensor], Tensor], packed_bytes: int) -> None:
        super().__init__()
        self.product, self.packed_bytes = product, packed_bytes

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def int8(weight: Tensor) -> Packed:
    """One scale per output."""
    scale = (weight.abs().amax(1).float() / 127).clamp(min=1e-8)
    packed = (weight.float() / scale[:, None]).round().to(torch.int8)
    scale = scale.to(weight.dtype)
    return Packed(lambda x: torch._weight_int8pack_mm(x, packed, scale), packed.nbytes)


def int4(weight: Tensor) -> Packed:
    """One scale and zero per output and `GROUP` inputs."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-8)
    whole = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(whole.flatten(1), 1)
    # the kernel takes (w - 8) * scale + zero, for each group of inputs
    about = torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).contiguous().to(weight.dtype)
    return Packed(
        lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, GROUP, about), packed.nbytes
    )


PACKINGS = {"int8": int8, "int4": int4}


def pack(models: tuple[nn.Module, ...], packing: str) -> None:
    """Replace the linear layers of the decoder and the head, the same in all `models`."""
    made: dict[int, Packed] = {}  # by the weight, which layers share
    for model in models:
        places = [(model, "lm_head")]
        for module in model.get_decoder().layers.modules():
            places += [
                (module, name)
                for name, child in module.named_children()
                if isinstance(child, nn.Linear)
            ]
        for module, name in places:
            weight = getattr(module, name).weight.detach()
            if weight.data_ptr() not in made:
                made[weight.data_ptr()] = PACKINGS[packing](weight)
            setattr(module, name, made[weight.data_ptr()])
