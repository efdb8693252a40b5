"""A trace as one self-contained page: a slider over steps, the kept tokens on the pictures."""

import base64
import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_text
from .layout import Pixels, RowLayout, Text, text_of

_MARK = "/*TRACE*/null"


def write_page(
    rows: Iterable[RowLayout],
    about: Mapping[str, Any],
    path: str | PathLike[str],
    *,
    tokenizer: Any = None,
    title: str = "VisionPulse",
    note: str = "",
    story: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page to `path`; it needs no network and no other file.

    `story` says in words what the page shows: `question`, `legend` (paragraphs), `answers` (words
    by name), `verdict`, and `times` (`title`, `about`, rows of a name and milliseconds).
    """
    sequences = [_sequence(row, text_of(tokenizer)) for row in rows]
    shown = {key: about.get(key) for key in ("model", "config", "anchors", "layers")}
    if str(shown["model"]).startswith("/"):  # a folder: its place on this machine stays private
        shown["model"] = Path(str(shown["model"])).name
    data = {"title": title, "note": note, "about": shown, "sequences": sequences}
    if story:
        data["story"] = dict(story)
    # a closing tag inside a string would end the script
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    template = resources.files("visionpulse.data").joinpath("page.html").read_text("utf-8")
    before, after = template.split(_MARK)
    return write_text(path, before + text + after)


def _sequence(row: RowLayout, text: Text) -> dict[str, Any]:
    return {
        "conversation": row.conversation,
        "row": row.row,
        "tokens": row.n_visual,
        "pictures": [
            {
                "rows": picture.rows,
                "columns": picture.columns,
                "name": picture.name,
                "png": None if picture.pixels is None else _base64(png(picture.pixels)),
                "size": None if picture.pixels is None else list(picture.pixels.shape[1::-1]),
            }
            for picture in row.pictures
        ],
        "layers": {
            layer: {
                "step": [step.step for step in steps],
                "text": [text(step.token) for step in steps],
                "mass": [round(step.mass, 5) for step in steps],
                "mean": [round(step.mass_mean, 5) for step in steps],
                "ends": np.cumsum([len(step.kept) for step in steps]).tolist(),
                # places of all steps, uint32, little endian
                "kept": _base64(np.concatenate([s.kept for s in steps]).astype("<u4").tobytes()),
            }
            for layer, steps in row.steps.items()
        },
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def png(pixels: Pixels) -> bytes:
    """Encode [height, width, 3] as PNG."""
    height, width, _ = pixels.shape
    lines = np.zeros((height, 1 + 3 * width), np.uint8)  # each starts with its filter, 0
    lines[:, 1:] = pixels.reshape(height, -1)

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(lines.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
