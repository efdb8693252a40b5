"""What an engine will do with a setting, in words."""

from ..schedule import Role
from .setting import Setting


def lines(setting: Setting, layer_bytes: int, facts: dict[str, str]) -> list[str]:
    """One line a fact; `layer_bytes` are those of one token's keys and values in a layer."""
    config, engine, roles = setting.config, setting.engine, setting.roles
    sparse = [i for i, role in enumerate(roles) if role in (Role.ANCHOR, Role.FOLLOWER)]
    dense = [i for i, role in enumerate(roles) if role is Role.DENSE]
    own = [i for i, role in enumerate(roles) if role is Role.MODEL]
    low, high = config.ratio
    budget = f"{config.budget}, {100 * low:g} to {100 * high:g} % of the visual tokens kept"
    said = {
        **facts,
        "schedule": config.schedule + (f", refresh {config.refresh}" if setting.looks_back else ""),
        "anchors": f"layer {_ranges(setting.anchors)} of {len(roles)}",
        "sparse layers": _ranges(sparse),
        "dense layers": _ranges(dense) or "none",
        "budget": budget,
        "memory": f"{layer_bytes * len(roles) / 1024:.0f} KiB of KV cache a token, as without us; "
        f"a follower reads at most {100 * high:g} % of the visual ones",
        "ranks": f"{engine.tensor_ranks} tensor, {len(engine.stages) or 1} pipeline",
        "stays dense": "prefill, requests without pictures or with visionpulse off"
        + (", the layers before the anchor" if dense else ""),
    }
    if own:
        said["left alone"] = f"layers {_ranges(own)}: no full attention"
    width = max(map(len, said))
    return [f"{name:<{width}}  {text}" for name, text in said.items()]


def _ranges(layers: tuple[int, ...] | list[int]) -> str:
    """2, 5 to 7."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in parts)
