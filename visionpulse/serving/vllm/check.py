"""All refusals in the front process, and the plan: what `visionpulse serve-check` prints."""

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
    config = vllm_config.model_config
    element = config.dtype.itemsize // facts.widened(vllm_config)
    said |= {"model": str(config.model), "engine": f"vLLM {compat.version()}, {compat.backend()}"}
    if setting.engine.has_drafts:
        said["drafts"] = facts.DRAFTS[setting.engine.device]
    heads = config.get_num_kv_heads(vllm_config.parallel_config)
    return plan.lines(setting, 2 * heads * config.get_head_size() * element, said)
