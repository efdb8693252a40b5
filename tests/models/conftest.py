"""Tiny random models of every family, and the prompts and pictures that go with them."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import copy
import functools

import pytest
import torch

transformers = pytest.importorskip("transformers")

IMAGE, VIDEO, START, END, PAD = 150, 151, 152, 153, 0
SUPPRESSED = [IMAGE, VIDEO, START, END]
CONV = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TEXT = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CLIP = {"model_type": "clip_vision_model", "num_attention_heads": 2, "image_size": 32} | CONV
SIGLIP = {"model_type": "siglip_vision_model", "num_attention_heads": 2, "image_size": 32} | CONV
PIXTRAL = {"model_type": "pixtral", "num_attention_heads": 2, "image_size": 64} | CONV
LLAMA = {"model_type": "llama"} | TEXT
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2}
QWEN3_VISION = QWEN_VISION | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 3


def _square(n, size=32):
    return {"pixel_values": torch.randn(n, 3, size, size)}


def _patched(n):
    # a base view and one tile of the same size
    return {
        "pixel_values": torch.randn(n, 2, 3, 32, 32),
        "image_sizes": torch.tensor([[32, 32]] * n),
    }


def _sized(n):
    return {
        "pixel_values": torch.randn(n, 3, 32, 32),
        "image_sizes": torch.tensor([[32, 32]] * n),
    }


def _grid(n):
    return {
        "pixel_values": torch.randn(n * 64, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 8, 8]] * n),
    }


def _tiled(n):
    return _square(n)


# model type -> (config, what n pictures are, tokens of one picture)
FAMILIES = {
    "qwen2_vl": (
        {
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": QWEN_VISION | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        }
        | QWEN_IDS,
        _grid,
        16,
    ),
    "qwen2_5_vl": (
        {
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": QWEN_VISION
            | {
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": 64,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
        }
        | QWEN_IDS,
        _grid,
        16,
    ),
    "qwen3_vl": (
        {
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": QWEN3_VISION | {"deepstack_visual_indexes": [0, 1]},
        }
        | QWEN_IDS,
        _grid,
        16,
    ),
    "qwen3_vl_moe": (
        {
            "text_config": TEXT
            | {
                "rope_parameters": MROPE,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "decoder_sparse_step": 1,
            },
            "vision_config": QWEN3_VISION | {"deepstack_visual_indexes": [0, 1]},
        }
        | QWEN_IDS,
        _grid,
        16,
    ),
    "qwen3_5": (
        {
            "text_config": TEXT
            | {
                "num_hidden_layers": 8,
                "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
                "rope_parameters": MROPE
                | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
            },
            "vision_config": QWEN3_VISION,
        }
        | QWEN_IDS,
        _grid,
        16,
    ),
    "llava": (
        {
            "text_config": LLAMA,
            "vision_config": CLIP | {"patch_size": 8},
            "image_token_index": IMAGE,
        },
        _square,
        16,
    ),
    "llava_next": (
        {
            "text_config": LLAMA,
            "vision_config": CLIP | {"patch_size": 8},
            "image_token_index": IMAGE,
            "image_grid_pinpoints": [[32, 32]],
        },
        _patched,
        36,
    ),
    "llava_next_video": (
        {
            "text_config": LLAMA,
            "vision_config": CLIP | {"patch_size": 8},
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "image_grid_pinpoints": [[32, 32]],
        },
        _patched,
        36,
    ),
    "llava_onevision": (
        {
            "text_config": LLAMA | {"model_type": "qwen2"},
            "vision_config": SIGLIP | {"patch_size": 8, "vision_use_head": False},
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "image_grid_pinpoints": [[32, 32]],
        },
        _patched,
        36,
    ),
    "internvl": (
        {
            "text_config": LLAMA | {"model_type": "qwen2"},
            "vision_config": CONV
            | {"num_attention_heads": 2, "image_size": [64, 64], "patch_size": [8, 8]},
            "image_token_id": IMAGE,
            "image_seq_length": 16,
        },
        functools.partial(_square, size=64),
        16,
    ),
    "gemma3": (
        {
            "text_config": TEXT
            | {"layer_types": ALTERNATING, "sliding_window": 16, "query_pre_attn_scalar": 16},
            "vision_config": SIGLIP | {"image_size": 64, "patch_size": 8, "vision_use_head": False},
            "mm_tokens_per_image": 16,
            "image_token_index": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": END,
        },
        functools.partial(_square, size=64),
        16,
    ),
    "mistral3": (
        {
            "text_config": LLAMA | {"model_type": "mistral", "sliding_window": None},
            "vision_config": PIXTRAL | {"patch_size": 4},
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
        },
        _sized,
        16,
    ),
    "pixtral": (
        {
            "text_config": LLAMA | {"model_type": "mistral", "sliding_window": None},
            "vision_config": PIXTRAL | {"patch_size": 8},
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        _sized,
        16,
    ),
    "smolvlm": (
        {
            "text_config": LLAMA,
            "vision_config": CONV | {"num_attention_heads": 2, "image_size": 32, "patch_size": 4},
            "image_token_id": IMAGE,
            "scale_factor": 2,
            "pad_token_id": PAD,
        },
        _tiled,
        16,
    ),
    "idefics3": (
        {
            "text_config": LLAMA,
            "vision_config": CONV | {"num_attention_heads": 2, "image_size": 32, "patch_size": 4},
            "image_token_id": IMAGE,
            "scale_factor": 2,
            "pad_token_id": PAD,
        },
        _tiled,
        16,
    ),
    "paligemma": (
        {
            "text_config": LLAMA | {"model_type": "gemma"},
            "vision_config": SIGLIP | {"patch_size": 8, "projection_dim": 64},
            "image_token_index": IMAGE,
            "projection_dim": 64,
            "hidden_size": 64,
        },
        _square,
        16,
    ),
    "glm4v": (
        {
            "text_config": TEXT
            | {
                "rope_parameters": MROPE
                | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
            },
            "vision_config": QWEN_VISION
            | {
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": 64,
                "image_size": 32,
            },
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "image_start_token_id": START,
            "image_end_token_id": END,
            "video_start_token_id": 154,
            "video_end_token_id": 155,
        },
        _grid,
        16,
    ),
    "aya_vision": (
        {
            "text_config": LLAMA
            | {"model_type": "cohere2", "layer_types": ALTERNATING, "sliding_window": 16},
            "vision_config": SIGLIP | {"patch_size": 4, "vision_use_head": False},
            "image_token_index": IMAGE,
            "downsample_factor": 2,
        },
        _square,
        16,
    ),
}


class Tiny:
    """A tiny random model whose tokens depend on its attention, and inputs for it."""

    def __init__(self, family, **changes):
        torch.manual_seed(0)
        settings, self._pictures, self.picture_tokens = FAMILIES[family]
        kind = "llava" if family == "pixtral" else family
        settings = copy.deepcopy(settings)
        settings["text_config"].update(changes)
        config = transformers.AutoConfig.for_model(kind, **settings)
        self.family = family
        self.model = transformers.AutoModelForImageTextToText.from_config(config).eval()
        self.model.generation_config.pad_token_id = PAD
        with torch.no_grad():
            for name, weight in self.model.get_decoder().named_parameters():
                if weight.dim() >= 2:  # the default init hardly lets attention speak
                    tied = family in ("gemma3", "paligemma", "aya_vision")
                    weight.normal_(std=(0.05 if tied else 0.5) if "embed" in name else 0.2)

    def inputs(self, *rows, seed=0):
        """Inputs of a batch; a row is a list of text lengths and "i" for pictures."""
        rows = rows or ([5, "i", 7],)
        random = torch.Generator().manual_seed(seed)
        lists, pictures = [], []
        for row in rows:
            ids = []
            for part in row:
                if part == "i":
                    ids += [START] + [IMAGE] * self.picture_tokens + [END]
                else:
                    ids += torch.randint(3, 140, (part,), generator=random).tolist()
            lists.append(ids)
            pictures.append(row.count("i"))
        width = max(map(len, lists))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in lists])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in lists])
        given = {"input_ids": ids, "attention_mask": mask}
        if sum(pictures):
            torch.manual_seed(seed)
            given |= self._batch(pictures)
        if self._pictures is _grid:
            given["mm_token_type_ids"] = (ids == IMAGE).int()
        if self.family in ("gemma3", "paligemma"):
            given["token_type_ids"] = (ids == IMAGE).long()
        return given

    def _batch(self, pictures):
        if self.family not in ("smolvlm", "idefics3"):
            return self._pictures(sum(pictures))
        pixels = torch.zeros(len(pictures), max(pictures), 3, 32, 32)  # zeros are no picture
        for row, n in enumerate(pictures):
            if n:
                pixels[row, :n] = self._pictures(n)["pixel_values"]
        return {"pixel_values": pixels}

    def generate(self, given, tokens=8, **options):
        """The generated ids, without sampling unless asked."""
        options = {"do_sample": False, "max_new_tokens": tokens} | options
        return self.model.generate(**given, suppress_tokens=SUPPRESSED, **options)


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


def pytest_report_header():
    return f"transformers: {transformers.__version__} ({os.path.dirname(transformers.__file__)})"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def _tiny(family):
    return Tiny(family)


@pytest.fixture
def oracle():
    """Give the class of the oracle."""
    return Oracle


@pytest.fixture(params=FAMILIES)
def family(request):
    """Each family in turn."""
    return request.param


@pytest.fixture
def tiny():
    """Give the tiny model of a family, unpatched at the end."""
    import visionpulse as vp

    used = []

    def make(family, **changes):
        made = Tiny(family, **changes) if changes else _tiny(family)
        used.append(made.model)
        return made

    make.forget = used.clear
    yield make
    from visionpulse.models import session_of

    for model in used:
        if session_of(model) is not None:
            vp.unpatch(model)
