"""The checks that every record and call shares: what was expected, what came, and the way out."""

from operator import mul

import torch
from torch import Tensor

MAX_POSITION = 2**31 - 2  # NO_SPAN, one more, lies behind every position


def tensor(name: str, value: object, rank: int, shape: str) -> Tensor:
    """Check that a value is a tensor of a rank; `shape` is what the message says it should be."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got {type(value).__name__}")
    if value.dim() != rank:
        raise ValueError(f"{name} must be {shape}, got shape {tuple(value.shape)}")
    return value


def same_device(name: str, value: Tensor, device: torch.device, of: str) -> None:
    """Check that a tensor lies where another does."""
    if value.device != device:
        raise ValueError(
            f"{name} is on {value.device} but {of} is on {device}; use .to({str(device)!r})"
        )


def unit_stride(name: str, value: Tensor) -> None:
    """Check that the last dimension is dense; all others may have any stride."""
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"the last dimension of {name} must have stride 1, got strides {value.stride()}; "
            "pass a view that is contiguous per token, or call .contiguous()"
        )


def have_memory(*tensors: Tensor) -> bool:
    """Whether each tensor's storage still reaches to its last element; reads host data only."""
    for value in tensors:
        reach = value.numel() if value.is_contiguous() else _reach(value)
        needed = (value.storage_offset() + reach) * value.itemsize
        if value.untyped_storage().nbytes() < needed and reach:
            return False
    return True


def _reach(value: Tensor) -> int:
    """Elements from the first to the last, both counted, of a tensor that has some."""
    strides = value.stride()
    last: int = sum(map(mul, value.shape, strides)) - sum(strides)
    return 1 + last


def has_storage(*tensors: tuple[str, Tensor | None]) -> None:
    """Check that no named tensor's memory was freed or cut under it."""
    if not is_eager():
        return
    for name, value in tensors:
        if value is not None and not have_memory(value):
            needed = (value.storage_offset() + _reach(value)) * value.itemsize
            raise ValueError(
                f"the storage of {name} holds {value.untyped_storage().nbytes()} bytes, its shape "
                f"and strides need {needed}; it was freed or resized: pass a tensor that owns its "
                "memory"
            )


def per_row(name: str, value: Tensor | None, rows: int, device: torch.device) -> None:
    """Check an optional int32 tensor with one number per row."""
    if value is None:
        return
    tensor(name, value, 1, "int32 [B]")
    if value.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {value.dtype}; use .to(torch.int32)")
    if value.shape[0] != rows:
        raise ValueError(f"{name} must hold one number per row, got {len(value)} for B={rows}")
    same_device(name, value, device, "the cache")
    if not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got stride {value.stride()}")


def in_range(name: str, values: Tensor, low: int, high: int, way_out: str) -> None:
    """Check the values of a tensor; reads the device."""
    smallest, largest = (int(value) for value in torch.aminmax(values))
    if smallest < low or largest > high:
        raise ValueError(f"{name} must lie in {low}..{high}, got {smallest}..{largest}; {way_out}")


def is_eager() -> bool:
    """Whether the call runs now; false while torch compiles it, when only shapes are known."""
    return not torch.compiler.is_compiling()


def are_readable(device: torch.device) -> bool:
    """Whether a call may look at the values in tensors: on the CPU, and never in a graph.

    On a GPU it would wait for the device; in a graph it would guard on one prompt's numbers, and
    the next prompt would compile anew.
    """
    return device.type == "cpu" and is_eager()
