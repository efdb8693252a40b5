"""Run engines of vLLM, one after another, in this process: python engine.py SPEC.

SPEC is JSON: the model's folder, and for each run a name, what `vllm.LLM` takes, and what to do. A
line of JSON on stdout for each. A process of its own: vLLM's Python runs it, not that of the tests.
"""

import gc
import json
import os
import sys
from contextlib import contextmanager
from unittest import mock

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import asks
import torch

from visionpulse.float8 import stored

COMMON = {
    "dtype": "float32", "max_model_len": 2048, "max_num_seqs": 16, "enforce_eager": True,
    "limit_mm_per_prompt": {"image": 2, "video": 0}, "enable_prefix_caching": False, "seed": 0,
    "disable_log_stats": False,
}  # fmt: skip


def prompt_of(ask):
    from PIL import Image

    prompt = {"prompt_token_ids": ask.prompt}
    if ask.pictures:
        pictures = [Image.fromarray(picture.pixels) for picture in ask.pictures]
        prompt["multi_modal_data"] = {"image": pictures}
    return prompt


def classes(worker):
    """Who computes the attention of each layer."""
    layers = worker.model_runner.compilation_config.static_forward_context.values()
    return sorted(
        {f"{type(layer.impl).__module__}.{type(layer.impl).__name__}" for layer in layers}
    )


def sampling(tokens, extra):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra)


def scale(worker, scales):
    """Set the scales of K and V of all layers, as a checkpoint may bring them."""
    for layer in worker.model_runner.compilation_config.static_forward_context.values():
        for name, own in zip(("_k_scale", "_v_scale"), scales, strict=True):
            getattr(layer, name).fill_(own)
            setattr(layer, f"{name}_float", own)


@contextmanager
def rounding(how):
    """vLLM's kernel that stores 8 bits cuts off the digits that are too many, unless `nearest`."""
    from vllm import _custom_ops

    name = "cpu_attn_reshape_and_cache"
    write = getattr(_custom_ops, name)

    def rounded(key, value, *args, k_scale, v_scale, **kwargs):
        k, v = stored(key, torch.tensor(k_scale)), stored(value, torch.tensor(v_scale))
        write(k.to(key.dtype), v.to(key.dtype), *args, k_scale=1.0, v_scale=1.0, **kwargs)

    with mock.patch.object(_custom_ops, name, rounded if how == "nearest" else write):
        yield


def run(model, spec):
    """One engine: tokens of every round, and what it says about itself."""
    with rounding(spec.get("rounding")):
        return made_by(model, spec)


def made_by(model, spec):
    from vllm import LLM

    llm = LLM(model, **COMMON | spec.get("llm", {}))
    if scales := spec.get("scales"):
        llm.collective_rpc(scale, args=(scales,))
    made = asks.mixed()
    prompts = [prompt_of(ask) for ask in made] * spec.get("copies", 1)
    extras = spec.get("extras") or [None] * len(prompts)  # by request
    wanted = [sampling(spec.get("tokens", 36), extra) for extra in extras]
    rounds = []
    for _ in range(spec.get("rounds", 1)):
        outs = llm.generate(prompts, wanted, use_tqdm=False)
        rounds.append(
            {
                "tokens": [list(out.outputs[0].token_ids) for out in outs],
                "prompts": [len(out.prompt_token_ids) for out in outs],
                "cached": [out.num_cached_tokens for out in outs],
            }
        )
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    return {
        "rounds": rounds,
        "classes": llm.collective_rpc(classes)[0],
        "preemptions": metrics.get("vllm:num_preemptions", 0),
    }


def main(spec):
    for one in spec["runs"]:
        try:
            result = run(spec["model"], one)
        except Exception as error:
            if not one.get("may_fail"):
                raise
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"name": one["name"], **result}), flush=True)
        gc.collect()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
