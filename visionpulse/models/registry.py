"""Our two names in the registries of transformers, and the implementation behind them.

A config names its attention implementation. Models that share a config object share the name, so
the implementation behind ours is kept by config; our names leave the registries with the last
patched model.
"""

import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

NAME = "visionpulse"
FALLBACK = "sdpa"  # for a config that was copied while it carried our name


@dataclass
class _Entry:
    config: "weakref.ref[Any]"
    base: str  # the implementation behind our name
    users: int = 0


_entries: dict[int, _Entry] = {}  # by id(config)
_lock = threading.Lock()
# one attention layer of each patched model, and whom to call when it decodes past the hooks
_watchers: "weakref.WeakKeyDictionary[nn.Module, Callable[[], None]]" = weakref.WeakKeyDictionary()


def base_name(config: Any) -> str:
    """The implementation behind our name on this config."""
    entry = _entries.get(id(config))
    if entry is None or entry.config() is not config:
        name = config._attn_implementation
        return FALLBACK if name in (NAME, None) else str(name)
    return entry.base


def base_attention(module: nn.Module) -> Callable[..., Any]:
    """The attention function that an unpatched layer calls."""
    home = sys.modules[type(module).__module__]
    interface = home.ALL_ATTENTION_FUNCTIONS
    eager = getattr(home, "eager_attention_forward", None)
    function = interface.get_interface(base_name(module.config), eager)
    return function  # type: ignore[no-any-return]


def base_mask(*args: Any, **kwargs: Any) -> Any:
    """Build the mask that the implementation behind our name takes."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    make = ALL_MASK_ATTENTION_FUNCTIONS.get(base_name(kwargs["config"]))
    return None if make is None else make(*args, **kwargs)


def watch(layer: nn.Module, call: Callable[[], None] | None) -> None:
    """Call `call` whenever an attention layer decodes without a step; None ends it."""
    if call is None:
        _watchers.pop(layer, None)
    else:
        _watchers[layer] = call


def report_bypass(layer: nn.Module) -> None:
    """Call back for an attention layer that decodes without a step."""
    call = _watchers.get(layer)
    if call is not None:
        call()


def enter(decoder: nn.Module, attention: Callable[..., Any]) -> None:
    """Put our name on the decoder's config."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    config: Any = decoder.config
    with _lock:
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, base_mask)
        entry = _entries.get(id(config))
        if entry is None or entry.config() is not config:
            entry = _entries[id(config)] = _Entry(weakref.ref(config), base_name(config))
        entry.users += 1
        # the attribute behind the public setter, which would walk and check all submodules
        config._attn_implementation_internal = NAME


def leave(config_id: int) -> None:
    """Restore the name on a config that no patched model uses; also called by finalizers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    with _lock:
        entry = _entries.get(config_id)
        if entry is None:
            return
        entry.users -= 1
        if entry.users > 0:
            return
        del _entries[config_id]
        config = entry.config()
        if config is not None and config._attn_implementation_internal == NAME:
            config._attn_implementation_internal = entry.base
        if not _entries:
            AttentionInterface._global_mapping.pop(NAME, None)
            AttentionMaskInterface._global_mapping.pop(NAME, None)
