"""Scratch memory that lives across steps, so that a decode step allocates nothing of its own."""

import threading

import torch
from torch import Tensor


class Workspace:
    """Named buffers that only grow. Their contents are undefined: a kernel must not trust them.

    One workspace serves one stream of calls at a time; two threads or two CUDA streams that work
    at once need one each.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Give a flat buffer of at least `numel` elements with undefined contents."""
        key = (name, dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            with torch.inference_mode(False):  # made inside, it could not be written outside later
                buffer = torch.empty(max(numel, 1), dtype=dtype, device=device)
            self._buffers[key] = buffer
        return buffer

    def zeroed(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Give a buffer that was zero when it was made: for counters that re-arm themselves."""
        key = (name, dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            with torch.inference_mode(False):
                buffer = torch.zeros(max(numel, 1), dtype=dtype, device=device)
            self._buffers[key] = buffer
        return buffer

    def clear(self) -> None:
        """Let all buffers go."""
        self._buffers.clear()


class _Default(threading.local):
    def __init__(self) -> None:
        self.by_stream: dict[int, Workspace] = {}


_default = _Default()


def default(device: torch.device) -> Workspace:
    """The workspace of this thread and, on a GPU, of its current stream."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    workspace = _default.by_stream.get(stream)
    if workspace is None:
        workspace = _default.by_stream[stream] = Workspace()
    return workspace
