"""A GPU for code that only a GPU runs: its tensors lie on the CPU and say that they do not.

`Tensor`s of the device `cuda:0` hold one of the CPU and compute there. What a real one refuses is
refused: operands on two devices, memory made while a graph is captured that is read on the host, a
look at the device in a capture or where `set_sync_debug_mode` forbids it. A captured graph notes
its operations, of torch and of the native module alike, and runs them at each replay.
"""

import contextlib
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
# What makes a host wait for the device, besides copies to it.
READS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.bincount.default,
    aten.equal.default, aten.masked_select.default,
}  # fmt: skip
# An index may lie on the CPU: it is copied.
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


class Gpu:
    """What the one device knows of itself."""

    def __init__(self):
        self.capturing = None  # the graph under way
        self.done = 0  # operations so far: its clock
        self.simulated = None  # native module, where it runs simulated kernels
        self.forbids_reads = False
        self.stream = Stream(0)

    def reads(self, what):
        if self.capturing is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        if self.forbids_reads:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")

    def does(self, work):
        """Note work for the graph under way."""
        self.done += 1
        if self.capturing is not None:
            self.capturing.work.append(work)


class Stream:
    """A stream: only its number matters, everything runs at once."""

    made = 0

    def __init__(self, number=None, **_):
        if number is None:
            Stream.made += 1
            number = 1000 + Stream.made
        self.cuda_stream, self.device_index, self.device = number, 0, CUDA

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


class Graph:
    """What was done while it was captured, to be done again."""

    def __init__(self):
        self.work, self.made = [], []

    def end(self):
        """A capture computes nothing: what it made holds no numbers until the first replay."""
        for tensor in self.made:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 77)
        self.made = []

    def replay(self):
        for work in self.work:
            work()
        gpu.done += len(self.work)


class Event:
    def __init__(self, enable_timing=False):
        self.at = None

    def record(self, stream=None):
        self.at = gpu.done

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 0.5 + 0.01 * (other.at - self.at)


class CudaTensor(torch.Tensor):
    """A tensor on the device; `held` is where its numbers are."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device="cpu",  # without CUDA torch cannot index another
        )  # fmt: skip
        made.held = held
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    def to(self, *args, **options):
        """As torch's, which would take the tensor for one of the CPU."""
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype)
        device, dtype, *_ = torch._C._nn._parse_to(*args, **options)
        made = self if dtype in (None, self.dtype) else aten._to_copy.default(self, dtype=dtype)
        return made if device is None or device.type == "cuda" else made.cpu()

    def cpu(self):
        gpu.reads("copy to the CPU")
        return self.held.clone()

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_):
        return f"CudaTensor({self.held!r})"

    def data_ptr(self):
        return self.held.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use .cpu()")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


gpu = Gpu()


def _is_large(value):
    return isinstance(value, torch.Tensor) and not isinstance(value, CudaTensor) and value.dim() > 0


def _is_pinned(value):
    return isinstance(value, torch.Tensor) and getattr(value, "pinned", False)


def _pin_memory(self, device=None):
    made = self.clone()
    made.pinned = True
    return made


def _held(value):
    if isinstance(value, CudaTensor):
        return value.held
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


def dispatch(func, args, kwargs):
    leaves = tree_leaves((args, kwargs))
    here = [leaf for leaf in leaves if isinstance(leaf, CudaTensor)]
    target = kwargs.get("device")
    # what C++ asks of the CPU is where it takes our tensors to be; `to` and `cpu` are ours
    if here and (target is None or func.__name__.startswith(("new_", "_to_copy", "to."))):
        target = CUDA
    on_gpu = target is not None and torch.device(target).type == "cuda"
    if func is aten.copy_.default:
        on_gpu = isinstance(args[0], CudaTensor)
        is_staged = on_gpu and _is_pinned(args[1]) and (*args[2:], kwargs.get("non_blocking"))[0]
        crosses = len(here) == 1 and _is_large(args[0] if not on_gpu else args[1])
        if crosses and (gpu.capturing is not None or not is_staged):
            gpu.reads("copy_ between devices")
    elif func.__name__.startswith(("_to_copy", "to.")):
        if on_gpu and not here:
            gpu.reads("copy from the CPU")
    elif here and func not in INDEXING and any(map(_is_large, leaves)):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    elif not here and on_gpu and any(map(_is_large, leaves)):
        raise RuntimeError(f"{func}: a CPU tensor is given to the GPU")
    if here and func in READS:
        gpu.reads(str(func))
    inner_args, inner_kwargs = tree_map(_held, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    if not (here or on_gpu):
        return out
    gpu.done += 1
    if gpu.capturing is not None and on_gpu:
        _note(func, inner_args, inner_kwargs, out)
    known = {id(leaf.held): leaf for leaf in here}

    def wrapped(value):
        if not isinstance(value, torch.Tensor) or not on_gpu:
            return value
        return known[id(value)] if id(value) in known else CudaTensor(value)

    return tree_map(wrapped, out)


def _note(func, args, kwargs, out):
    inputs = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs))
              if isinstance(leaf, torch.Tensor)}  # fmt: skip
    outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
    writes_inputs = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
    fresh = [o for o in outs if o.untyped_storage().data_ptr() not in inputs]
    if not writes_inputs and not fresh:
        return  # a view

    def again():
        redone = [leaf for leaf in tree_leaves(func(*args, **kwargs))
                  if isinstance(leaf, torch.Tensor)]  # fmt: skip
        if not writes_inputs:
            for old, new in zip(outs, redone, strict=True):
                old.copy_(new)

    gpu.does(again)
    if not writes_inputs:
        gpu.capturing.made += fresh


class Device(TorchDispatchMode):
    """Sees the operations that make a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def native(module):
    """Entries of the native module, that a graph notes and repeats; the rest as it is."""

    def entry(function):
        def call(*args):
            lacking = function(*args)
            if not lacking:
                gpu.does(lambda: function(*args))
            return lacking

        return call

    gpu.simulated = module
    names = ("attend", "score", "select", "decode")
    cuda = SimpleNamespace(unavailable=module.cuda.unavailable)
    for name in names:
        setattr(cuda, name, entry(getattr(module.cuda, name)))
    return SimpleNamespace(has_cuda=True, cuda=cuda)


@contextlib.contextmanager
def stream(given):
    before, gpu.stream = gpu.stream, given
    try:
        yield
    finally:
        gpu.stream = before


@contextlib.contextmanager
def graph(given, pool=None, stream=None):
    with globals()["stream"](Stream()):
        gpu.capturing = given
        if gpu.simulated:
            gpu.simulated.capture(1)
        try:
            yield
        finally:
            gpu.capturing = None
            if gpu.simulated:
                gpu.simulated.capture(0)
            given.end()


def set_stream(given):
    gpu.stream = given


def sync_debug(mode):
    gpu.forbids_reads = mode == "error"


def synchronize(device=None):
    gpu.reads("synchronize")


def plug_in():
    """Make torch find the device; for the rest of the process."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=4)
    fakes = {
        "is_available": lambda: True, "_lazy_init": lambda: None, "is_initialized": lambda: True,
        "current_device": lambda: 0, "device_count": lambda: 1, "synchronize": synchronize,
        "Stream": Stream, "stream": stream, "current_stream": lambda device=None: gpu.stream,
        "graph": graph, "CUDAGraph": Graph, "graph_pool_handle": lambda: (0, 1), "Event": Event,
        "is_current_stream_capturing": lambda: gpu.capturing is not None,
        "set_stream": set_stream,
        "set_sync_debug_mode": sync_debug, "get_device_name": lambda device=None: "a GPU",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "device": lambda device: contextlib.nullcontext(), "empty_cache": lambda: None,
    }  # fmt: skip
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)
    plain = torch.Generator

    class generator:  # a type: annotations name it
        def __new__(cls, device="cpu"):
            return plain()

    torch.Generator = generator
    tensor = torch.tensor

    def made_on(data, *, device=None, **options):
        made = tensor(data, **options)
        return made if device is None else made.to(device)

    torch.tensor = made_on
    to, cuda = torch.Tensor.to, torch.device("cuda")

    def indexed(value):
        return CUDA if value == "cuda" or value == cuda else value

    def to_indexed(self, *args, **options):
        """Without CUDA torch cannot say which index `cuda` alone has."""
        if args and isinstance(args[0], CudaTensor):
            args = (CUDA, args[0].dtype)
        return to(self, *map(indexed, args), **{k: indexed(v) for k, v in options.items()})

    torch.Tensor.to, torch.Tensor.pin_memory = to_indexed, _pin_memory
    attention = torch.nn.functional.scaled_dot_product_attention

    def on_either(*args, **kwargs):
        leaves = tree_leaves((args, kwargs))
        out = attention(*tree_map(_held, args), **tree_map(_held, kwargs))
        if not any(isinstance(leaf, CudaTensor) for leaf in leaves):
            return out
        if any(map(_is_large, leaves)):
            raise RuntimeError("attention: expected all tensors to be on the same device")
        held_args, held_kwargs = tree_map(_held, (args, kwargs))
        gpu.does(lambda: out.copy_(attention(*held_args, **held_kwargs)))
        return CudaTensor(out)

    torch.nn.functional.scaled_dot_product_attention = on_either
    pad = torch.nn.utils.rnn.pad_sequence  # torch fills a new tensor behind our back
    torch.nn.utils.rnn.pad_sequence = lambda rows, **how: (
        CudaTensor(pad([row.held for row in rows], **how))
        if isinstance(rows[0], CudaTensor)
        else pad(rows, **how)
    )
    # a tensor around another keeps no version of its own
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else contextlib.nullcontext()
    torch._C._set_only_lift_cpu_tensors(True)
    mode = Device()
    mode.__enter__()
    return gpu
