"""Scratch memory that lives across steps, so that a decode step allocates nothing of its own."""

import threading
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

_Key: TypeAlias = tuple[str, torch.dtype, torch.device]
GROWTH = 4  # a buffer that grows takes a quarter more than it had: a cache grows by one key a step


class Workspace:
    """Named buffers that only grow. Their contents are undefined: a kernel must not trust them.

    One workspace serves one stream of calls at a time; two threads or two CUDA streams that work
    at once need one each. A captured graph may be replayed at any time later: a buffer that it was
    given is never let go, and one that was lacking in the capture is the graph's own.
    """

    def __init__(self) -> None:
        self._buffers: dict[_Key, Tensor] = {}
        self._in_graphs: dict[_Key, list[Tensor]] = {}  # given in a capture, outgrown ones as well

    def take(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Give a flat buffer of at least `numel` elements with undefined contents."""
        return self._give((name, dtype, device), numel, torch.empty)

    def zeroed(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Give a buffer that was zero when it was made: for counters that re-arm themselves."""
        return self._give((name, dtype, device), numel, torch.zeros)

    def _give(self, key: _Key, numel: int, make: Callable[..., Tensor]) -> Tensor:
        _, dtype, device = key
        buffer = self._buffers.get(key)
        captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if buffer is not None and buffer.numel() >= numel:
            if captured:
                self._hold(key, buffer)
            return buffer
        had = 0 if buffer is None else buffer.numel()
        with torch.inference_mode(False):  # made inside, it could not be written outside later
            made = make(max(numel, had + had // GROWTH, 1), dtype=dtype, device=device)
        if not captured:  # else its zeros are written by the graph alone, at every replay
            self._buffers[key] = made
        return made

    def _hold(self, key: _Key, buffer: Tensor) -> None:
        held = self._in_graphs.setdefault(key, [])
        if not any(buffer is one for one in held):
            held.append(buffer)

    def clear(self) -> None:
        """Let all buffers go; no graph that was captured with them may be replayed any more."""
        self._buffers.clear()
        self._in_graphs.clear()


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
