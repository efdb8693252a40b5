"""The K-th largest of int32 keys, exactly, and the positions of the K largest, ascending.

One program looks for it. The top 11 bits come from a histogram that many programs filled. They
have also counted the bins of each chunk, so that every chunk has its place in a list of the keys
in that bucket and above it, and the row is passed once, a chunk a warp, without a scan across
warps. The other 3 x 7 bits are found, and the positions written, from that list: about K long.
No sort, no atomics.
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
def _place(from_ptr, place_ptr, first, last, bucket, CHUNKS: tl.constexpr):
    """Give each chunk its place in the list of keys whose bin is at least `bucket`; its length.

    `from` [chunks, BUCKETS] has the keys of a chunk from a bin up.
    """
    listed = first * 0
    offs = tl.arange(0, CHUNKS)
    for at in range(first, last, CHUNKS):
        chunk = at + offs
        inside = chunk < last
        here = tl.load(from_ptr + chunk * BUCKETS + bucket, mask=inside, other=0)
        tl.store(place_ptr + chunk, listed + tl.cumsum(here, 0) - here, mask=inside)
        listed += tl.sum(here)
    return listed


@triton.jit
def _load_four(keys_ptr, at, inside, LINE: tl.constexpr):
    """Four lines of keys from `at` [LINES], each [LINES, LINE]: a thread has one key of each."""
    keys_ptr += at[:, None] + tl.arange(0, LINE)[None, :]
    inside = inside[:, None]
    one = tl.load(keys_ptr, mask=inside, other=ABSENT)
    two = tl.load(keys_ptr + LINE, mask=inside, other=ABSENT)
    three = tl.load(keys_ptr + 2 * LINE, mask=inside, other=ABSENT)
    four = tl.load(keys_ptr + 3 * LINE, mask=inside, other=ABSENT)
    return one, two, three, four


@triton.jit
def _list_line(list_ptr, place, before, key, n, least):
    """Put what a line has of at least `least` at its place in the list, with its position."""
    # flat: of scattered addresses the compiler would lay the second axis across warps
    to = tl.ravel(place[:, None] + (before & 0xFF))
    key, n = tl.ravel(key), tl.ravel(n)
    entry = (key.to(tl.int64) << 32) | n.to(tl.uint32).to(tl.int64)
    tl.store(list_ptr + to, entry, mask=key >= least)


@triton.jit
def _list_four(list_ptr, place, one, two, three, four, n, least, LINE: tl.constexpr):
    """List four lines of at most 32 keys, by one scan; give the place after them."""
    # a byte for each line: together they count at most 128
    flags = (one >= least).to(tl.int32) + ((two >= least).to(tl.int32) << 8)
    flags += ((three >= least).to(tl.int32) << 16) + ((four >= least).to(tl.int32) << 24)
    here = tl.sum(flags, axis=1)
    # before a key in its line, and in the lines before
    before = tl.cumsum(flags, 1) - flags + (here * 0x01010100)[:, None]
    _list_line(list_ptr, place, before, one, n, least)
    _list_line(list_ptr, place, before >> 8, two, n + LINE, least)
    _list_line(list_ptr, place, before >> 16, three, n + 2 * LINE, least)
    _list_line(list_ptr, place, before >> 24, four, n + 3 * LINE, least)
    return place + (((here * 0x01010101) >> 24) & 0xFF)


@triton.jit
def _gather(
    keys_ptr, list_ptr, place_ptr, first, last, least, CHUNK: tl.constexpr, LINES: tl.constexpr
):  # fmt: skip
    """List the keys of at least `least` in chunks [first, last), and their positions, in order.

    A warp has a chunk of its own and scans lines of 32 keys, so no warp waits for another.
    """
    LINE: tl.constexpr = 32 if CHUNK >= 256 else CHUNK // 8
    STEPS: tl.constexpr = CHUNK // (8 * LINE)
    lines = tl.arange(0, LINES)
    offs = tl.arange(0, LINE)[None, :]
    place = tl.zeros([LINES], dtype=tl.int32)
    # keys are loaded a step ahead
    chunk = first + lines
    at = chunk * CHUNK
    start = tl.load(place_ptr + chunk, mask=chunk < last, other=0)
    a, b, c, d = _load_four(keys_ptr, at, chunk < last, LINE)
    e, f, g, h = _load_four(keys_ptr + 4 * LINE, at, chunk < last, LINE)
    for step in range(0, (last - first + LINES - 1) // LINES * STEPS):
        place = tl.where(step % STEPS == 0, start, place)
        n = at[:, None] + offs
        ahead = step + 1
        chunk = first + ahead // STEPS * LINES + lines
        at = chunk * CHUNK + ahead % STEPS * (8 * LINE)
        start = tl.load(place_ptr + chunk, mask=chunk < last, other=0)
        next_a, next_b, next_c, next_d = _load_four(keys_ptr, at, chunk < last, LINE)
        next_e, next_f, next_g, next_h = _load_four(keys_ptr + 4 * LINE, at, chunk < last, LINE)
        place = _list_four(list_ptr, place, a, b, c, d, n, least, LINE)
        place = _list_four(list_ptr, place, e, f, g, h, n + 4 * LINE, least, LINE)
        a, b, c, d = next_a, next_b, next_c, next_d
        e, f, g, h = next_e, next_f, next_g, next_h


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
def _filter(list_ptr, candidates_ptr, listed, bucket, TILE: tl.constexpr):
    """Copy the low bits of the bucket's keys out; give their number."""
    n_in = listed * 0
    for at in tl.range(0, listed, TILE, num_stages=2):
        n = _slots(at, TILE)
        key = (tl.load(list_ptr + n) >> 32).to(tl.int32)
        chosen = ((key >> LOW_BITS) == bucket) & (n < listed)
        before, here = _before(chosen.to(tl.int32))
        tl.store(candidates_ptr + n_in + before, key & (LOW_SPAN - 1), mask=chosen)
        n_in += here
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
def _write(
    list_ptr, indices_ptr, at, listed, pivot, ties, n_above, n_equal, k_max, TILE: tl.constexpr
):  # fmt: skip
    """Write the kept positions of a tile of the list; `n_above`, `n_equal` lie before it."""
    i = _slots(at, TILE)
    entry = tl.load(list_ptr + i)
    key, n = (entry >> 32).to(tl.int32), entry.to(tl.int32)
    above = ((key > pivot) & (i < listed)).to(tl.int32)
    equal = ((key == pivot) & (i < listed)).to(tl.int32)
    before, here = _before(above + (equal << 16))
    n_equal_here = n_equal + (before >> 16)
    # ties go to the lowest positions, and the list ascends: a key's place is what lies before it
    kept = (above > 0) | ((equal > 0) & (n_equal_here < ties))
    place = n_above + (before & 0xFFFF) + tl.minimum(n_equal_here, ties)
    tl.store(indices_ptr + place, n, mask=kept & (place < k_max))
    return n_above + (here & 0xFFFF), n_equal + (here >> 16)


@triton.jit
def keep_largest(
    keys_ptr, list_ptr, candidates_ptr, from_ptr, place_ptr, indices_ptr,
    first, last, k, counts, k_max,
    CHUNK: tl.constexpr, LINES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Find the K-th key of one row among chunks [first, last), and write what is kept."""
    bucket, want = _digit(counts, k, BUCKETS)
    # a row that keeps nothing has nothing to look at
    last = tl.where(k > 0, last, first)
    listed = _place(from_ptr, place_ptr, first, last, bucket, LINES * 4)
    bucket -= BUCKETS // 2  # keys are signed
    # other threads read what is written here, and below
    tl.debug_barrier()
    least = tl.maximum(bucket * LOW_SPAN, ABSENT + 1)
    _gather(keys_ptr, list_ptr, place_ptr, first, last, least, CHUNK, LINES)
    tl.debug_barrier()
    n_in = _filter(list_ptr, candidates_ptr, listed, bucket, TILE)
    tl.debug_barrier()
    low, ties = _refine(candidates_ptr, n_in, want, TILE // 4)
    pivot = bucket * LOW_SPAN + low
    n_above = first * 0
    n_equal = first * 0
    for at in tl.range(0, listed, TILE, num_stages=2):
        n_above, n_equal = _write(
            list_ptr, indices_ptr, at, listed, pivot, ties, n_above, n_equal, k_max, TILE
        )
    offs = tl.arange(0, TILE)
    for at in range(k, k_max, TILE):
        tl.store(indices_ptr + at + offs, -1, mask=at + offs < k_max)
