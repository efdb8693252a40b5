"""Where the layers of a cache end, while tokens are checked ahead of its owner.

Behind a round every token that the owner asks for moves the end of all layers by one. So keys and
values are made when somebody looks at them, and one number is the end of all layers.
"""

import weakref
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

NOTHING = (None, None)  # made yet


class CommonEnd:
    """The end of all layers of one cache."""

    def __init__(self, layers: Iterable[Any], length: int) -> None:
        self.length = length
        self._shown: list[weakref.ref[Any]] = []  # layers that made their keys or values for it
        for layer in layers:
            own = layer.__dict__
            if own.get("_views") is NOTHING and "keys" not in own and "values" not in own:
                own["_end"] = self
            else:
                layer.end_with(self)

    def move(self, length: int) -> None:
        """Let all layers end at `length`."""
        self.length = length
        for shown in self._shown:
            layer = shown()
            if layer is not None and layer._end is self and layer.is_as_left:
                layer.hide()
        self._shown.clear()

    def show(self, layer: Any) -> None:
        """Remember that a layer made its keys or values."""
        self._shown.append(weakref.ref(layer))

    def __getstate__(self) -> dict[str, Any]:
        return {"length": self.length, "_shown": []}  # the layers of a copy are others

    def is_of(self, layers: Iterable[Any]) -> bool:
        """Whether nobody has updated, cropped or reordered one of the layers since."""
        for layer in layers:
            own = layer.__dict__
            if own.get("_end") is not self:
                return False
            if ("keys" in own or "values" in own) and not layer.is_as_left:
                return False
        return True


class Rewindable:
    """Mixin over a layer that can end earlier, or later again over entries that were written.

    Not a crop: the conversation stays, because drafted tokens change nothing in its picture.
    """

    _end: ClassVar[int | CommonEnd] = 0  # holds while the layer is as left
    # keys and values as they were last made; None in its place: not made for this end yet
    _views: ClassVar[tuple[Tensor | None, Tensor | None] | None] = None
    # keys and values are made when somebody looks: of a cache that tokens are checked ahead for
    stays_hidden: ClassVar[bool] = False

    @property
    def can_rewind(self) -> bool:
        """Whether it can end earlier now."""
        return True

    @property
    def is_as_left(self: Any) -> bool:
        """Whether nobody has replaced keys and values since they were made here."""
        views, own = self._views, self.__dict__
        return (
            views is not None
            and own.get("keys", views[0]) is views[0]
            and own.get("values", views[1]) is views[1]
        )

    @property
    def end(self) -> int:
        """Where a layer ends that is as left."""
        end = self._end
        return end if isinstance(end, int) else end.length

    def __getattr__(self, name: str) -> Any:
        """Keys or values, which were not made for this end yet."""
        views = self.__dict__.get("_views")
        if views is None or name not in ("keys", "values"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        part = 0 if name == "keys" else 1
        made: Tensor = self.view(part)
        self.__dict__[name] = made
        self.__dict__["_views"] = (made, views[1]) if part == 0 else (views[0], made)
        if not isinstance(self._end, int):
            self._end.show(self)
        return made

    def hide(self) -> None:
        """Let keys and values be made anew when somebody looks at them."""
        own = self.__dict__
        own.pop("keys", None)
        own.pop("values", None)
        own.pop("cumulative_length", None)  # of a sliding window
        own["_views"] = NOTHING

    def get_seq_length(self: Any) -> int:
        """The tokens of the layer."""
        if torch.compiler.is_compiling() or "keys" in self.__dict__:
            return int(super().get_seq_length())  # type: ignore[misc]
        length: int = self.end
        return length

    def end_with(self: Any, end: int | CommonEnd) -> None:
        """Let the layer end somewhere else, or where all of its cache end."""
        if self.is_as_left:
            self.__dict__["_end"] = end
            self.__dict__["stays_hidden"] = True
            self.hide()
            return
        length = end if isinstance(end, int) else end.length
        if self.is_initialized and self.keys.dim() == 4 and self.keys.shape[2] > length:
            self.keys = self.keys.narrow(2, 0, length)
            self.values = self.values.narrow(2, 0, length)
            self._views = None  # the next update takes them over
