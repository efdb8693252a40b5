"""A record of what every step kept, for a person to look at; saved as one .npz file."""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..files import one_line, replacing
from ..selection import Selection
from ..visual import VisualTokens
from . import page, plots
from .layout import Ints, Pictures, RowLayout, TraceRow, layouts

Floats = NDArray[np.float64]


class Entry(NamedTuple):
    """One selection as it was recorded: references to device tensors, nothing read."""

    selection: Selection
    visual: VisualTokens
    conversation: int
    step: int
    layer: int
    token: Tensor | None  # [B, 1], the token this step read


@dataclass(frozen=True, eq=False)
class Trace:
    """What every step of a session kept, a row per sequence and selection."""

    conversation: Ints  # [E], as are all up to mass_mean
    step: Ints
    layer: Ints
    row: Ints
    token: Ints
    n_visual: Ints
    mass: Floats
    mass_mean: Floats
    ends: Ints  # [E], where the positions of an entry end in `positions`
    positions: Ints  # [sum of K]
    spans: dict[tuple[int, int], list[tuple[int, int]]]  # by conversation and row
    about: dict[str, Any]  # model, config and anchors

    def __len__(self) -> int:
        return len(self.step)

    def __iter__(self) -> Iterator[TraceRow]:
        begins = np.concatenate(([0], self.ends[:-1])) if len(self) else self.ends
        for i in range(len(self)):
            yield TraceRow(
                int(self.conversation[i]),
                int(self.step[i]),
                int(self.layer[i]),
                int(self.row[i]),
                int(self.token[i]),
                int(self.n_visual[i]),
                float(self.mass[i]),
                float(self.mass_mean[i]),
                self.positions[int(begins[i]) : int(self.ends[i])],
            )

    def text(self, tokenizer: Any) -> list[str]:
        """The token that each entry read, as text."""
        return [tokenizer.decode([int(t)]) if t >= 0 else "" for t in self.token]

    def layouts(self, pictures: Pictures | None = None) -> Iterator[RowLayout]:
        """Lay out each row with its pictures. See trace.layout.layouts."""
        return layouts(self, self.spans, pictures)

    def plot(
        self, path: str | PathLike[str], *, pictures: Pictures | None = None, **options: Any
    ) -> Path:
        """Draw mass, K and the kept tokens to a file; needs matplotlib. See trace.plots.plot."""
        return plots.plot(self.layouts(pictures), path, **options)

    def to_html(
        self, path: str | PathLike[str], *, pictures: Pictures | None = None, **options: Any
    ) -> Path:
        """Write one page with a slider over the steps. See trace.page.write_page."""
        return page.write_page(self.layouts(pictures), self.about, path, **options)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the trace to `path`, as .npz."""
        spans = [[*key, *span] for key, row in self.spans.items() for span in row]
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays["spans"] = np.asarray(spans, np.int64).reshape(-1, 4)
        # savez would add a suffix to a name
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, about=np.asarray(json.dumps(self.about)), **arrays)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Trace":
        """Read a trace that `save` wrote."""
        try:
            return cls(**_read(path))
        except FileNotFoundError as error:
            raise ValueError(f"no file {path}; {_WAY_OUT}") from error
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
        except _BROKEN as error:
            what = one_line(error)
            if "pickle" in what:  # numpy's advice is to allow what could run a program
                what = "it holds Python objects"
            raise ValueError(f"{path} is no whole trace: {what}; {_WAY_OUT}") from error


_WAY_OUT = "trace.save(path) writes one, under patch(model, record=True)"
_ARRAYS = (
    "conversation", "step", "layer", "row", "token", "n_visual", "mass", "mass_mean", "ends",
    "positions",
)  # fmt: skip


# what zip files, their members and JSON raise where they are cut or changed
_BROKEN = (
    ValueError, KeyError, TypeError, EOFError, MemoryError, OverflowError, RecursionError,
    NotImplementedError, RuntimeError, BadZipFile, zlib.error, struct.error,
)  # fmt: skip


def _read(path: str | PathLike[str]) -> dict[str, Any]:
    """The fields of a trace file, checked: drawing trusts them."""
    with open(path, "rb") as opened:  # numpy would take another file for a pickle
        if opened.read(2) != b"PK":
            raise ValueError("it is no .npz file")
        opened.seek(0)
        with np.load(opened, allow_pickle=False) as file:
            missing = sorted({*_ARRAYS, "spans", "about"} - set(file.files))
            if missing:
                raise ValueError(f"it has no {', '.join(missing)}")
            held = {name: file[name] for name in (*_ARRAYS, "spans", "about")}
    about = json.loads(str(held.pop("about")))
    table = held.pop("spans")
    if table.ndim != 2 or table.shape[1] != 4 or table.dtype.kind != "i":
        raise ValueError(f"its spans must be integers [runs, 4], got {table.dtype} {table.shape}")
    if not isinstance(about, dict):
        raise ValueError(f"its 'about' must be an object, got {type(about).__name__}")
    for name in _ARRAYS:
        kind = "f" if name.startswith("mass") else "i"
        if held[name].ndim != 1 or held[name].dtype.kind != kind:
            raise ValueError(f"its {name} must be one row of numbers")
        if name != "positions" and len(held[name]) != len(held["step"]):
            raise ValueError(f"its {name} has {len(held[name])} entries, step {len(held['step'])}")
    ends = held["ends"]
    if (np.diff(ends, prepend=0) < 0).any() or (ends[-1] if len(ends) else 0) != len(
        held["positions"]
    ):
        raise ValueError("its ends do not cut its positions")
    spans: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for conversation, row, begin, end in table.tolist():
        if not 0 <= begin < end:
            raise ValueError(f"its spans hold {begin}..{end}")
        spans.setdefault((conversation, row), []).append((begin, end))
    if not set(zip(held["conversation"].tolist(), held["row"].tolist(), strict=True)) <= set(spans):
        raise ValueError("a row of it has no spans")
    return {**held, "spans": spans, "about": about}


def trace_of(entries: list[Entry], about: dict[str, Any]) -> Trace:
    """Read the recorded selections back; rows without visual tokens are left out."""
    spans: dict[tuple[int, int], list[tuple[int, int]]] = {}
    counts: dict[VisualTokens, list[int]] = {}
    columns: dict[str, list[Any]] = {name: [] for name in _ARRAYS[:8]}
    kept: list[NDArray[np.int32]] = []
    for entry in entries:
        if entry.visual not in counts:
            counts[entry.visual] = entry.visual.counts.cpu().numpy().tolist()
            for b, row in enumerate(entry.visual.spans.cpu().numpy()):  # [S, 2]
                runs = [(int(begin), int(end)) for begin, end in row if begin < end]
                if runs:
                    spans[entry.conversation, b] = runs
        chosen = entry.selection
        indices, k = chosen.indices.cpu().numpy(), chosen.counts.cpu().numpy()
        mass, mass_mean = chosen.mass.cpu().numpy(), chosen.mass_mean.cpu().numpy()
        tokens = None if entry.token is None else entry.token.cpu().numpy()
        for b, n_visual in enumerate(counts[entry.visual]):
            if not n_visual:
                continue
            token = -1 if tokens is None else int(tokens[b, -1])
            numbers = (entry.conversation, entry.step, entry.layer, b, token, n_visual)
            for name, value in zip(columns, (*numbers, mass[b], mass_mean[b]), strict=True):
                columns[name].append(value)
            kept.append(indices[b, : k[b]])
    ints: dict[str, Any] = {name: np.asarray(columns[name], np.int64) for name in _ARRAYS[:6]}
    floats: dict[str, Any] = {name: np.asarray(columns[name], np.float64) for name in _ARRAYS[6:8]}
    ends = np.cumsum([len(row) for row in kept], dtype=np.int64)
    positions = np.concatenate(kept).astype(np.int64) if kept else np.zeros(0, np.int64)
    return Trace(**ints, **floats, ends=ends, positions=positions, spans=spans, about=about)
