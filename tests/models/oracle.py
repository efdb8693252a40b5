"""The oracle of the tests of models; loaded by conftest.py."""

import torch
import transformers


class Oracle:
    """The contract's decode step in plain torch, run inside the model's own attention interface.

    One softmax over a masked matrix per layer, in float32; it shares no line with the package.
    """

    NAME = "oracle"

    def __init__(self, tiny, config, *anchors):
        self.decoder = tiny.model.get_decoder()
        self.config, self.anchors = config, anchors
        text = self.decoder.config
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
        self.full = [kind == "full_attention" for kind in kinds]
        self.visual = None  # bool [B, N] of the prompt
        self.kept = self.before_last = None
        self.step = -1
        self.counts = []

    def __enter__(self):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

        self.base = sdpa_attention_forward
        transformers.AttentionInterface.register(self.NAME, self.attend)
        AttentionMaskInterface.register(self.NAME, sdpa_mask)
        self.before = self.decoder.config._attn_implementation
        self.decoder.config._attn_implementation_internal = self.NAME
        return self

    def __exit__(self, *_):
        from transformers.masking_utils import AttentionMaskInterface

        self.decoder.config._attn_implementation_internal = self.before
        transformers.AttentionInterface._global_mapping.pop(self.NAME)
        AttentionMaskInterface._global_mapping.pop(self.NAME)

    def attend(self, module, query, key, value, mask, scaling=None, **kwargs):
        layer = module.layer_idx
        if layer == self.full.index(True):
            self.step = -1 if query.shape[2] > 1 else self.step + 1
        refreshes = self.config.refresh and self.step % self.config.refresh == 0
        looks_back = self.config.schedule == "lookback" and self.step > 0 and not refreshes
        is_early = layer < self.anchors[0] and not looks_back
        if query.shape[2] != 1 or not self.full[layer] or is_early:
            return self.base(module, query, key, value, mask, scaling=scaling, **kwargs)
        rows, heads, size = query.shape[0], query.shape[1], key.shape[2]
        group = heads // key.shape[1]
        k, v = (t.repeat_interleave(group, 1) for t in (key, value))
        z = (query @ k.transpose(2, 3))[:, :, 0] * scaling  # [B, H, N]
        visible = torch.ones(rows, size, dtype=torch.bool)
        if mask is not None:
            visible = mask[:, 0, 0]
        z = z.masked_fill(~visible[:, None], -torch.inf)
        if layer in self.anchors:
            self.kept = self.select(z, visible)
        if self.kept.shape[1] < size:  # of the previous step: its own key was the last
            self.kept = torch.nn.functional.pad(self.kept, (0, size - self.kept.shape[1]))
            self.kept |= visible & (torch.arange(size) == size - 1)
        z = z.masked_fill(~self.kept[:, None], -torch.inf)
        return (z.softmax(-1)[:, :, None] @ v).transpose(1, 2), None

    def select(self, z, visible):
        """Which keys are attended: bool [B, N]."""
        rows, _, size = z.shape
        visual = torch.zeros(rows, size, dtype=torch.bool)
        known = self.visual.repeat_interleave(rows // len(self.visual), 0)
        visual[:, : known.shape[1]] = known
        visual &= visible
        attended = visible & ~visual
        mass = (z / self.config.tau).softmax(-1).masked_fill(~visual[:, None], 0).sum(-1).amax(1)
        scores = z.softmax(-1).mean(1)
        for b in range(rows):
            n = int(visual[b].sum())
            if n:
                count = int(mass[b].clamp(*self.config.ratio) * torch.tensor(float(n)))
                count = min(max(count, 1), n)
                places = visual[b].nonzero()[:, 0]
                best = scores[b, places].sort(descending=True, stable=True).indices[:count]
                attended[b, places[best]] = True
                self.counts.append(count)
        return attended
