"""The launches whose machine code is checked: the public launchers, run on meta tensors."""

from contextlib import contextmanager
from importlib import import_module
from typing import NamedTuple

import torch
import visionpulse._triton as kernels
from visionpulse._triton import tuning

from visionpulse.cache import KVCache, PagedKVCache
from visionpulse.call import Call, Params, new_selection
from visionpulse.visual import VisualTokens
from visionpulse.workspace import Workspace

# Multiprocessors, by which a row's largest number of splits follows. No sm_86 has as many: with
# the number of sm_89 one PTX serves both, see aot.py, and more splits take more registers, if any.
SMS = {"sm_80": 108, "sm_86": 142, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 188}
# by module, since the package's own attributes of these names are the launchers
PLACES = {
    name: import_module(f"visionpulse._triton.{module}")
    for name, module in (
        ("_score_kernel", "score"),
        ("_select_kernel", "select"),
        ("_attend_kernel", "attend"),
    )
}


class Launch(NamedTuple):
    """One launch: the kernel, its arguments by name, and the compiler's options."""

    kernel: object
    arguments: dict
    options: dict


class _Recorder:
    def __init__(self, kernel, found):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        def launch(*args, **named):
            asked = ("num_warps", "num_stages", "maxnreg")
            options = {k: named.pop(k) for k in asked if k in named}
            arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | named
            assert set(arguments) == set(self.kernel.arg_names)
            self.found.append(Launch(self.kernel, arguments, options))

        return launch


@contextmanager
def recorded(target):
    """Collect the launches made inside, as they would be made for this target."""
    found, originals, target_of = [], {}, tuning.target_of
    tuning.target_of = lambda device: (target, SMS.get(target, 304))
    for name, place in PLACES.items():
        originals[name] = getattr(place, name)
        setattr(place, name, _Recorder(originals[name], found))
    try:
        yield found
    finally:
        tuning.target_of = target_of
        for name, place in PLACES.items():
            setattr(place, name, originals[name])


class Shape(NamedTuple):
    """What a launch is specialised for."""

    group: int = 4
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    page: int = 0
    softcap: float = 0.0
    spans: int = 3
    capacity: int = 4096
    cut: bool = True  # starts and lengths are given
    float8: bool = False  # K and V of float8_e4m3fn, with a scale for each KV head
    queries: int = 1  # of a row; where there are several, q_counts are given


def _inputs(shape):
    rows, kv_heads = 2, 8
    meta = {"dtype": shape.dtype, "device": "meta"}
    per_row = {"dtype": torch.int32, "device": "meta"}
    several = (shape.queries,) if shape.queries > 1 else ()
    q = torch.empty(rows, *several, kv_heads * shape.group, shape.head_dim, **meta)
    q_counts = torch.empty(rows, **per_row) if several else None
    starts = lengths = None
    if shape.cut:
        starts, lengths = (torch.empty(rows, **per_row) for _ in range(2))
    scales = {}
    if shape.float8:
        meta["dtype"] = torch.float8_e4m3fn
        scale = torch.empty(kv_heads, device="meta")
        scales = {"k_scale": scale, "v_scale": scale}
    if shape.page:
        pool = torch.empty(64, shape.page, kv_heads, shape.head_dim, **meta)
        table = torch.empty(rows, shape.capacity // shape.page, **per_row)
        kv = PagedKVCache(pool, pool, table, lengths, starts, **scales)
    else:
        k = torch.empty(rows, kv_heads, shape.capacity, shape.head_dim, **meta)
        kv = KVCache(k, k, lengths, starts, **scales)
    visual = VisualTokens(
        torch.empty(rows, shape.spans, 2, **per_row), torch.empty(rows, shape.spans + 1, **per_row),
        torch.empty(rows, **per_row), shape.capacity, shape.capacity,
    )  # fmt: skip
    return q, kv, visual, q_counts


def dense(shape):
    q, kv, _, q_counts = _inputs(shape)
    params = Params(scale=0.1, softcap=shape.softcap)
    kernels.dense(q, kv, params, out=torch.empty_like(q), workspace=Workspace(), q_counts=q_counts)


def decode(shape, *, score, output):
    """The launches of a decode step, as the backend makes them."""
    from visionpulse.backends.triton import TritonBackend

    q, kv, visual, q_counts = _inputs(shape)
    params = Params(
        scale=0.1, softcap=shape.softcap, score=score, anchor_output=output, k_max=400, tau=0.4
    )
    call = Call(q, kv, params, visual, workspace=Workspace(), q_counts=q_counts)
    TritonBackend().decode(call)


def follow(shape):
    q, kv, visual, q_counts = _inputs(shape)
    params = Params(scale=0.1, softcap=shape.softcap)
    rows = 2 * shape.queries
    indices = torch.empty(rows, 400, dtype=torch.int32, device="meta")
    kernels.attend(
        q, kv, visual, indices, torch.empty(rows, dtype=torch.int32, device="meta"), params,
        stored_logits=None, out=torch.empty_like(q), workspace=Workspace(), q_counts=q_counts,
    )  # fmt: skip


def select(shape):
    scores = torch.empty(2, shape.capacity, device="meta")
    masses = torch.empty(2, device="meta"), torch.empty(2, device="meta")
    visual = _inputs(shape)[2]
    params = Params(scale=1.0, k_max=400)
    kernels.select(
        scores, new_selection(params.k_max, *masses), visual, params,
        starts=None, lengths=None, workspace=Workspace(),
    )  # fmt: skip


def score(shape):
    from visionpulse.backends.triton import TritonBackend

    q, kv, visual, q_counts = _inputs(shape)
    TritonBackend().score(
        Call(q, kv, Params(scale=0.1), visual, workspace=Workspace(), q_counts=q_counts)
    )
