"""A trace as one self-contained page: a slider over steps, the kept tokens on the pictures."""

import base64
import json
import struct
import zlib
from collections.abc import Sequence
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from .layout import Pixels, Shown, Text, Told, sequences, text_of
from .record import Trace

_MARK = "/*TRACE*/null"


def to_html(
    trace: Trace,
    path: str | PathLike[str],
    *,
    pictures: "Sequence[Shown] | dict[tuple[int, int], Sequence[Shown]] | None" = None,
    tokenizer: Any = None,
    title: str = "VisionPulse",
    note: str = "",
) -> Path:
    """Write the page to `path`; it needs no network and no other file."""
    told = [_told(sequence, text_of(tokenizer)) for sequence in sequences(trace, pictures)]
    about = {key: trace.about.get(key) for key in ("model", "config", "anchors", "layers")}
    if str(about["model"]).startswith("/"):  # a folder: where it lies is nobody's business
        about["model"] = Path(str(about["model"])).name
    data = {"title": title, "note": note, "about": about, "sequences": told}
    # a closing tag inside a string would end the script
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    template = resources.files("visionpulse.data").joinpath("page.html").read_text("utf-8")
    before, after = template.split(_MARK)
    out = Path(path)
    out.write_text(before + text + after, encoding="utf-8")
    return out


def _told(told: Told, text: Text) -> dict[str, Any]:
    return {
        "conversation": told.conversation,
        "row": told.row,
        "tokens": told.n_visual,
        "pictures": [
            {
                "rows": shown.rows,
                "columns": shown.columns,
                "name": shown.name,
                "png": None if shown.pixels is None else _base64(png(shown.pixels)),
                "size": None if shown.pixels is None else list(shown.pixels.shape[1::-1]),
            }
            for shown in told.shown
        ],
        "layers": {
            layer: {
                "step": [frame.step for frame in frames],
                "text": [text(frame.token) for frame in frames],
                "mass": [round(frame.mass, 5) for frame in frames],
                "mean": [round(frame.mass_mean, 5) for frame in frames],
                "ends": np.cumsum([len(frame.kept) for frame in frames]).tolist(),
                # places of all frames, uint32, little endian
                "kept": _base64(np.concatenate([f.kept for f in frames]).astype("<u4").tobytes()),
            }
            for layer, frames in told.frames.items()
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
