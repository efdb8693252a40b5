"""All refusals in the front process, and the plan: what `visionpulse serve-check` prints."""

from typing import Any

from .. import plan
from ..setting import KEY, PRESET, setting_of
from . import compat, facts


def lines(model: str, flags: list[str]) -> list[str]:
    """The plan for `vllm serve MODEL ...`; raises what would refuse it."""
    vllm_config = compat.config_of_flags(model, flags)  # refuses here where the key is there
    setting, said = compat.setting(vllm_config), {}
    if setting is None:
        said[KEY] = f"not asked for in --additional-config; this is the plan of {PRESET!r}"
        setting = setting_of({}, compat.engine(vllm_config))
    config, element = vllm_config.model_config, vllm_config.model_config.dtype.itemsize
    said |= {"model": str(config.model), "engine": f"vLLM {compat.version()}, {compat.backend()}"}
    heads = config.get_num_kv_heads(vllm_config.parallel_config)
    said_lines = plan.lines(setting, 2 * heads * config.get_head_size() * element, said)
    return [*said_lines, *_drafts(vllm_config)]


def _drafts(vllm_config: Any) -> list[str]:
    if vllm_config.speculative_config is None:
        return []
    return [f"drafts: {facts.DRAFTS}"]
