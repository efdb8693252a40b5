"""The K-th largest of int32 keys, exactly, and the positions of the K largest, ascending.

One program looks for it: the top 11 bits come from a histogram that many programs filled, the keys
of that bucket are copied out, and 3 x 7 bits are found among them alone. No sort, no atomics.
"""

import triton
import triton.language as tl

# int32 keys in the order of the scores; below every number stand NaN, and slots without candidate
ABSENT: tl.constexpr = tl.constexpr(-(2**31))
_NAN: tl.constexpr = tl.constexpr(-(2**31) + 1)
# the first digit has 11 bits, the other three 7 each
BUCKETS: tl.constexpr = tl.constexpr(2048)
LOW_BITS: tl.constexpr = tl.constexpr(21)
LOW_SPAN: tl.constexpr = tl.constexpr(1 << 21)


@triton.jit
def ordered_key(score):
    """int32 that orders as the score does; NaN first, -0.0 equal to +0.0."""
    # integers throughout: a comparison of floats may flush subnormals
    bits = score.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    key = tl.where(size == 0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(size > 0x7F800000, _NAN, key)


@triton.jit
def _digit(counts, want, BINS: tl.constexpr):
    """Bin that holds the want-th largest, and how many of it are wanted."""
    bins = tl.arange(0, BINS)
    above = tl.sum(counts) - tl.cumsum(counts, 0)
    digit = tl.sum((above >= want).to(tl.int32))
    return digit, want - tl.sum(tl.where(bins > digit, counts, 0))


@triton.jit
def _slots(at, TILE: tl.constexpr):
    """Slots of a tile [TILE / 16, 16]: a line is scanned by few threads, then the lines' sums."""
    lines = tl.arange(0, TILE // 16)
    return at + (lines[:, None] * 16 + tl.arange(0, 16)[None, :])


@triton.jit
def _before(flags):
    """How many lie before each slot of a tile in its order, and how many there are."""
    lines = tl.sum(flags, axis=1)
    earlier = tl.cumsum(lines, 0) - lines
    return earlier[:, None] + tl.cumsum(flags, 1) - flags, tl.sum(lines)


@triton.jit
def _filter(keys_ptr, candidates_ptr, prefix_ptr, first, last, bucket, TILE: tl.constexpr):
    """Copy the low bits of the bucket's keys out, in order of position; give their number.

    `prefix` gets, per tile, the keys above the bucket and those in it that lie before the tile.
    """
    n_in = first * 0
    n_above = first * 0
    for at in tl.range(first, last, TILE, num_stages=3):
        key = tl.load(keys_ptr + _slots(at, TILE))
        digit = key >> LOW_BITS
        tile = prefix_ptr + (at - first) // TILE * 2
        tl.store(tile, n_above)
        tl.store(tile + 1, n_in)
        # both counts in one scan: a tile has fewer than 2**15 keys
        chosen = (digit == bucket) & (key != ABSENT)
        before, here = _before(chosen.to(tl.int32) + ((digit > bucket).to(tl.int32) << 16))
        rank = n_in + (before & 0xFFFF)
        tl.store(candidates_ptr + rank, key & (LOW_SPAN - 1), mask=chosen)
        n_in += here & 0xFFFF
        n_above += here >> 16
    return n_in


@triton.jit
def _refine(candidates_ptr, n_in, want, TILE: tl.constexpr):
    """Low bits of the want-th largest candidate, and how many of its equals are wanted."""
    low = want * 0
    offs = tl.arange(0, TILE)
    for i in tl.static_range(3):
        counts = tl.zeros([128], dtype=tl.int32)
        for at in tl.range(0, n_in, TILE, num_stages=3):
            inside = at + offs < n_in
            bits = tl.load(candidates_ptr + at + offs, mask=inside, other=0) >> (14 - 7 * i)
            counts += tl.histogram(bits & 127, 128, mask=inside & ((bits >> 7) == low))
        digit, want = _digit(counts, want, 128)
        low = low * 128 + digit
    return low, want


@triton.jit
def write_tile(
    keys_ptr, indices_ptr, at, pivot, ties, n_above, n_equal, k_max, TILE: tl.constexpr
):  # fmt: skip
    """Write the kept positions of one tile; `n_above`, `n_equal` lie before it in the row."""
    n = _slots(at, TILE)
    key = tl.load(keys_ptr + n)
    above = (key > pivot).to(tl.int32)
    equal = (key == pivot).to(tl.int32)
    before, here = _before(above + (equal << 16))
    n_equal_here = n_equal + (before >> 16)
    # ties go to the lowest positions, and the list ascends: a key's place is what lies before it
    kept = (above > 0) | ((equal > 0) & (n_equal_here < ties))
    place = n_above + (before & 0xFFFF) + tl.minimum(n_equal_here, ties)
    tl.store(indices_ptr + place, n, mask=kept & (place < k_max))
    return n_above + (here & 0xFFFF), n_equal + (here >> 16)


@triton.jit
def keep_largest(
    keys_ptr, candidates_ptr, prefix_ptr, state_ptr, indices_ptr,
    first, last, k, counts, k_max, WRITE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Find the K-th key of one row among keys [first, last), and write what is kept."""
    bucket, want = _digit(counts, k, BUCKETS)
    bucket -= BUCKETS // 2  # keys are signed
    # the last tile may reach past the row's keys: nothing is there
    offs = tl.arange(0, TILE)
    tl.store(keys_ptr + last + offs, ABSENT, mask=offs < (TILE - (last - first) % TILE) % TILE)
    tl.debug_barrier()
    # a row that keeps nothing has nothing to look at
    last = tl.where(k > 0, last, first)
    n_in = _filter(keys_ptr, candidates_ptr, prefix_ptr, first, last, bucket, TILE)
    # other threads wrote these candidates
    tl.debug_barrier()
    low, ties = _refine(candidates_ptr, n_in, want, TILE)
    pivot = bucket * LOW_SPAN + low
    if WRITE:
        n_above = first * 0
        n_equal = first * 0
        for at in tl.range(first, last, TILE, num_stages=3):
            n_above, n_equal = write_tile(
                keys_ptr, indices_ptr, at, pivot, ties, n_above, n_equal, k_max, TILE
            )
    else:
        tl.store(state_ptr, pivot)
        tl.store(state_ptr + 1, ties)
        tl.store(state_ptr + 2, last)
    for at in range(k, k_max, TILE):
        tl.store(indices_ptr + at + offs, -1, mask=at + offs < k_max)
