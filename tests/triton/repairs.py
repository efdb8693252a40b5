"""Repairs of Triton's interpreter, for a process that does nothing else."""

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def to_bf16(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def to_f32(x):
    return (x.astype(np.uint32) << 16).view(np.float32)


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle(to_f32(handle.data), tl.float32)


def keep_quiet():
    """Like a GPU, which raises no warning for exp of a masked slot's content."""
    np.seterr(all="ignore")


def patch_once():
    """Patch `tl` once, not at every call of a helper: it halves the time."""
    patch, done = interpreter._patch_lang, set()

    class Patched:
        def restore(self):
            pass

    def patch_lang(fn):
        if id(fn.__globals__) not in done:
            done.add(id(fn.__globals__))
            patch(fn)
        return Patched()

    interpreter._patch_lang = patch_lang


def remember_types():
    """Make each type and shape once: the interpreter makes new ones for every operation."""
    make_type, types = tl.block_type.__init__, {}
    make_tensor, shapes = tl.tensor.__init__, {}
    broadcast = TritonSemantic.broadcast_impl_value
    look_up, numpy_types = interpreter._get_np_dtype, {}

    def block_type(self, element_ty, shape):
        sizes = tuple(int(size) for size in shape)
        key = element_ty.name, sizes
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = self.__dict__
        self.__dict__ = types[key]

    def tensor(self, handle, type):
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in shapes:
            make_tensor(self, handle, type)
            shapes[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[sizes]

    def broadcast_impl_value(self, lhs, rhs):
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    def get_np_dtype(type):
        if type.name not in numpy_types:
            numpy_types[type.name] = look_up(type)
        return numpy_types[type.name]

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor
    interpreter._get_np_dtype = get_np_dtype
    TritonSemantic.broadcast_impl_value = broadcast_impl_value


def skip_dropped_checks():
    """Skip the checks of overflow: without `debug` the interpreter drops what they find."""
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda *of: None


def plain_dot(builder, a, b, d):
    """Add the products in the order of the inner axis, in every column alike, as a chip does.

    A BLAS does not: its edge columns take another path, so equal keys would get unequal logits.
    """
    columns = b.data.astype(np.float32)
    total = d.data.copy()
    for i, factor in enumerate(a.data.astype(np.float32).T):
        total += factor[:, None] * columns[i]
    return interpreter.TensorHandle(total, d.dtype.scalar)


def compute_dots():
    """Without this a bfloat16 dot is wrong, and the cast from float32 truncates.

    The interpreter stores bfloat16 as raw uint16. Here a dot takes float32 copies of its operands,
    and the cast from float32 rounds to nearest even.
    """
    builder = interpreter.InterpreterBuilder
    cast, resize = builder.cast_impl, builder.create_fp_to_fp

    def narrows(source, kind):
        return source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16

    def narrowed(source):
        return interpreter.TensorHandle(to_bf16(source.data), tl.bfloat16)

    def create_dot(self, a, b, d, *rest, **named):
        return plain_dot(self, _widened(a), _widened(b), d)

    def cast_impl(self, source, kind):
        return narrowed(source) if narrows(source, kind) else cast(self, source, kind)

    def create_fp_to_fp(self, source, kind, mode):
        return narrowed(source) if narrows(source, kind) else resize(self, source, kind, mode)

    builder.create_dot = create_dot
    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
