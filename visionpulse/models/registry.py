"""Our two names in the registries of transformers, and which implementation they stand for.

The attention implementation is a name on a config. Models that share a config object share the
name, so what it stood for is kept per config; the names leave the registries with the last model.
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
    before: str  # the implementation that our name stands for
    users: int = 0


_entries: dict[int, _Entry] = {}  # by id(config)
_lock = threading.Lock()
# one attention layer of each patched model, and what to do when it decodes past the hooks
_watched: "weakref.WeakKeyDictionary[nn.Module, Callable[[], None]]" = weakref.WeakKeyDictionary()


def base_name(config: Any) -> str:
    """The implementation behind our name on this config."""
    entry = _entries.get(id(config))
    if entry is None or entry.config() is not config:
        name = config._attn_implementation
        return FALLBACK if name in (NAME, None) else str(name)
    return entry.before


def base_attention(module: nn.Module) -> Callable[..., Any]:
    """The attention function that this layer would call without us."""
    home = sys.modules[type(module).__module__]
    interface = home.ALL_ATTENTION_FUNCTIONS
    eager = getattr(home, "eager_attention_forward", None)
    function = interface.get_interface(base_name(module.config), eager)
    return function  # type: ignore[no-any-return]


def base_mask(*args: Any, **kwargs: Any) -> Any:
    """Build the mask of the implementation behind our name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    make = ALL_MASK_ATTENTION_FUNCTIONS.get(base_name(kwargs["config"]))
    return None if make is None else make(*args, **kwargs)


def watch(layer: nn.Module, call: Callable[[], None] | None) -> None:
    """Call `call` when this attention layer decodes without a step; None ends it."""
    if call is None:
        _watched.pop(layer, None)
    else:
        _watched[layer] = call


def report_bypass(layer: nn.Module) -> None:
    """Call back for an attention layer that decodes without a step."""
    call = _watched.get(layer)
    if call is not None:
        call()


def enter(decoder: nn.Module, attention: Callable[..., Any]) -> None:
    """Give the decoder's config our name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    config: Any = decoder.config
    with _lock:
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, base_mask)
        entry = _entries.get(id(config))
        if entry is None or entry.config() is not config:
            before = base_name(config)
            entry = _entries[id(config)] = _Entry(weakref.ref(config), before)
        entry.users += 1
        # The public setter walks all submodules and checks names we have checked; what it writes
        # for one config is this attribute.
        config._attn_implementation_internal = NAME


def leave(config_id: int) -> None:
    """Give a config its name back when no patched model uses it; also called by finalizers."""
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
            config._attn_implementation_internal = entry.before
        if not _entries:
            AttentionInterface._global_mapping.pop(NAME, None)
            AttentionMaskInterface._global_mapping.pop(NAME, None)
