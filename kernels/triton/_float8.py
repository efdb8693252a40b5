"""A cache of float8_e4m3fn: conversions of its bytes, and what a dot takes in their place.

Bytes are read in pairs, columns 2j and 2j + 1 as one of 16 bits: loads of 16 bytes stay, and the
operands of a dot come from shared memory as any of 16 bits do. So the even columns make a dot, and
the odd ones. Each number is exact in float16, in which tensor cores take it, whatever q has: a
bfloat16 q is scaled by a power of two for each head. Beside a float32 q all is float32.
"""

import triton
import triton.language as tl

from . import tuning

# Weights are at most 1: so scaled, those down to 2**-38 are not lost in float16.
_LIFT: tl.constexpr = tl.constexpr(16384.0)

_CHIP: tl.constexpr = tl.constexpr(tuning.CHIP)
_PLAIN: tl.constexpr = tl.constexpr(tuning.PLAIN)
# Two pairs ($1) become two float16 ($0), of their even columns or of their odd ones.
_EVEN_BY_CHIP: tl.constexpr = tl.constexpr(
    """{
.reg .b32 x;
.reg .b16 low, high;
prmt.b32 x, $1, 0, 0x3120;
mov.b32 {low, high}, x;
cvt.rn.f16x2.e4m3x2 $0, low;
}"""
)
_ODD_BY_CHIP: tl.constexpr = tl.constexpr(
    """{
.reg .b32 x;
.reg .b16 low, high;
prmt.b32 x, $1, 0, 0x3120;
mov.b32 {low, high}, x;
cvt.rn.f16x2.e4m3x2 $0, high;
}"""
)
# For chips without that conversion: exponent and mantissa move into those of float16, whose bias is
# 8 more, so times 256. Adding 1 to the magnitude 0x7f, which is NaN, sets the sign bit of its byte;
# spread over 16 bits that is a NaN to add, elsewhere zero.
_EVEN_BY_INTEGERS: tl.constexpr = tl.constexpr(
    """{
.reg .b32 size, sign, nan, factor;
mov.b32 factor, 0x5c005c00;
shl.b32 size, $1, 7;
and.b32 size, size, 0x3f803f80;
shl.b32 sign, $1, 8;
and.b32 sign, sign, 0x80008000;
or.b32 size, size, sign;
and.b32 nan, $1, 0x7f7f7f7f;
add.u32 nan, nan, 0x01010101;
prmt.b32 nan, nan, 0, 0xaa88;
fma.rn.f16x2 $0, size, factor, nan;
}"""
)
_ODD_BY_INTEGERS: tl.constexpr = tl.constexpr(
    """{
.reg .b32 size, sign, nan, factor;
mov.b32 factor, 0x5c005c00;
shr.b32 size, $1, 1;
and.b32 size, size, 0x3f803f80;
and.b32 sign, $1, 0x80008000;
or.b32 size, size, sign;
and.b32 nan, $1, 0x7f7f7f7f;
add.u32 nan, nan, 0x01010101;
prmt.b32 nan, nan, 0, 0xbb99;
fma.rn.f16x2 $0, size, factor, nan;
}"""
)


@triton.jit
def _number(byte):
    """float16 of bytes of e4m3, by the arithmetic of `_BY_INTEGERS`."""
    size = byte & 0x7F
    bits = (size << 7) | ((byte & 0x80) << 8) | (((size + 1) & 0x80) << 7)
    return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def _columns(pair, dtype: tl.constexpr, FLOAT8: tl.constexpr):
    """Even and odd columns of pairs, in float16, or in float32 beside a q of it."""
    if FLOAT8 == _PLAIN:
        even, odd = _number(pair & 0xFF), _number(pair >> 8)
    else:
        EVEN: tl.constexpr = _EVEN_BY_CHIP if FLOAT8 == _CHIP else _EVEN_BY_INTEGERS
        ODD: tl.constexpr = _ODD_BY_CHIP if FLOAT8 == _CHIP else _ODD_BY_INTEGERS
        even = tl.inline_asm_elementwise(
            EVEN, "=r,r", [pair], dtype=tl.float16, is_pure=True, pack=2
        )
        odd = tl.inline_asm_elementwise(ODD, "=r,r", [pair], dtype=tl.float16, is_pure=True, pack=2)
    if dtype == tl.float32:
        even, odd = even.to(tl.float32), odd.to(tl.float32)
    return even, odd


@triton.jit
def load_columns(
    ptr, at, valid, dtype: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    FLOAT8: tl.constexpr,
):  # fmt: skip
    """Even and odd columns of K or V at `at` [BLOCK_N]: [BLOCK_N, BLOCK_D / 2] each."""
    d = tl.arange(0, BLOCK_D // 2)[None, :]
    valid = valid[:, None]
    if ptr.dtype.element_ty == tl.uint16:
        pair = tl.load(ptr + at[:, None] + d, mask=valid & (d < D // 2), other=0)
    else:
        # bytes that begin or end at odd addresses
        even = tl.load(ptr + at[:, None] + 2 * d, mask=valid & (2 * d < D), other=0)
        odd = tl.load(ptr + at[:, None] + 2 * d + 1, mask=valid & (2 * d + 1 < D), other=0)
        pair = even.to(tl.uint16) | (odd.to(tl.uint16) << 8)
    return _columns(pair, dtype, FLOAT8)


@triton.jit
def load_query(ptr, at, is_head, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Even and odd columns of q at `at` [BLOCK_H], and what they are to be multiplied by."""
    d = tl.arange(0, BLOCK_D // 2)[None, :]
    is_head = is_head[:, None]
    even = tl.load(ptr + at[:, None] + 2 * d, mask=is_head & (2 * d < D), other=0.0)
    odd = tl.load(ptr + at[:, None] + 2 * d + 1, mask=is_head & (2 * d + 1 < D), other=0.0)
    unit = tl.full([at.shape[0]], 1.0, dtype=tl.float32)
    if even.dtype == tl.bfloat16:
        # the largest becomes 2**14 to 2**15; what float16 then loses is below 2**-38 of it
        even, odd = even.to(tl.float32), odd.to(tl.float32)
        size = tl.maximum(
            tl.max(even.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1),
            tl.max(odd.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1),
        )
        exponent = tl.minimum(tl.maximum(size >> 23, 15), 254)
        unit = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
        factor = ((268 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
        even, odd = (even * factor).to(tl.float16), (odd * factor).to(tl.float16)
    return even, odd, unit


@triton.jit
def scale_of(ptr, g, stride):
    """The scale of KV head g; 1 where there is none."""
    if ptr is None:
        return 1.0
    else:
        return tl.load(ptr + g * stride)


@triton.jit
def weights_of(p, dtype: tl.constexpr):
    """Weights as a dot with V takes them."""
    return p if dtype == tl.float32 else (p * _LIFT).to(tl.float16)


@triton.jit
def lift_of(dtype: tl.constexpr):
    """What `weights_of` multiplied them by."""
    return 1.0 if dtype == tl.float32 else _LIFT
