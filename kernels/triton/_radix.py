"""The K-th largest of int32 keys, exactly, and the positions of the K largest, ascending.

One program looks for it. The top 11 bits come from a histogram that many programs filled. They
have also counted the bins of each chunk, so that every chunk has its place in a list of the keys
in that bucket and above it, and listed its largest keys. These short lists are passed once, a chunk
a warp, without a scan across warps; a chunk that has more in the bucket and above is passed whole.
The other 11 and 10 bits are found, and the positions written, from that list, about K long: no
sort.
"""

import triton
import triton.language as tl

# int32 keys in the order of the scores; below every number stand NaN, and slots without candidate
ABSENT: tl.constexpr = tl.constexpr(-(2**31))
_NAN: tl.constexpr = tl.constexpr(-(2**31) + 1)
# a key without candidate, and its position
_NOTHING: tl.constexpr = tl.constexpr(-(2**63))
# the first digit has 11 bits; the others, of 11 and 10, take the same histogram
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
def take_counts(histogram_ptr, BINS: tl.constexpr):
    """Counts of a histogram, which is left at zero."""
    # all that this program adds is added before, and what it adds next after
    tl.debug_barrier()
    zeros = tl.zeros([BINS], dtype=tl.int32)
    # taken where the additions are, since a cache may hold an older count; an exchange would do,
    # but has no form in AMD's buffers
    counts = tl.atomic_and(histogram_ptr + tl.arange(0, BINS), zeros, sem="relaxed")
    tl.debug_barrier()
    return counts


@triton.jit
def _digit(counts, want, BINS: tl.constexpr):
    """Bin that holds the want-th largest, and how many of it are wanted."""
    bins = tl.arange(0, BINS)
    above = tl.sum(counts) - tl.cumsum(counts, 0)
    digit = tl.sum((above >= want).to(tl.int32))
    return digit, want - tl.sum(tl.where(bins > digit, counts, 0))


@triton.jit
def _entry(key, n):
    """A key and its position in one integer that orders as the key does."""
    return (key.to(tl.int64) << 32) | n.to(tl.uint32).to(tl.int64)


@triton.jit
def shorten(
    keys_ptr, from_ptr, short_ptr, cut_ptr, start, CHUNK: tl.constexpr, SHORT: tl.constexpr
):  # fmt: skip
    """List the largest keys of a chunk, in order: of whole bins, at most SHORT; note the last bin.

    `from` [BUCKETS] has the keys of the chunk from a bin up. It and the keys are read back: held
    from before, they would spill.
    """
    cut = tl.sum((tl.load(from_ptr + tl.arange(0, BUCKETS)) > SHORT).to(tl.int32))
    n = start + tl.arange(0, CHUNK)
    key = tl.load(keys_ptr + n)
    chosen = (key > ABSENT) & ((key >> LOW_BITS) + BUCKETS // 2 >= cut)
    flags = chosen.to(tl.int32)
    tl.store(short_ptr + tl.cumsum(flags, 0) - flags, _entry(key, n), mask=chosen)
    rest = tl.arange(0, SHORT)
    tl.store(short_ptr + rest, _NOTHING, mask=rest >= tl.sum(flags))
    tl.store(cut_ptr, cut)


@triton.jit
def _place(
    from_ptr, cut_ptr, place_ptr, short_ids_ptr, long_ids_ptr, first, last, bucket,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """Give each chunk its place in the list of keys whose bin is at least `bucket`; its length.

    `from` [chunks, BUCKETS] has the keys of a chunk from a bin up. The chunks whose short list
    has all that is wanted are numbered from one side, the others from the other.
    """
    listed = first * 0
    n_short = first * 0
    n_long = first * 0
    offs = tl.arange(0, CHUNKS)
    for at in range(first, last, CHUNKS):
        chunk = at + offs
        inside = chunk < last
        here = tl.load(from_ptr + chunk * BUCKETS + bucket, mask=inside, other=0)
        cut = tl.load(cut_ptr + chunk, mask=inside, other=0)
        is_short = (inside & (cut <= bucket)).to(tl.int32)
        is_long = (inside & (cut > bucket)).to(tl.int32)
        # counts of at most CHUNKS travel in one sum
        both = is_short + (is_long << 16)
        before = tl.cumsum(both, 0) - both
        total = tl.sum(both)
        tl.store(place_ptr + chunk, listed + tl.cumsum(here, 0) - here, mask=inside)
        tl.store(short_ids_ptr + n_short + (before & 0xFFFF), chunk, mask=is_short > 0)
        tl.store(long_ids_ptr + n_long + (before >> 16), chunk, mask=is_long > 0)
        listed += tl.sum(here)
        n_short += total & 0xFFFF
        n_long += total >> 16
    return listed, n_short, n_long


@triton.jit
def _load_four(keys_ptr, at, inside, LINE: tl.constexpr, PACKED: tl.constexpr):
    """Four lines of keys from `at` [LINES], each [LINES, LINE]: a thread has one key of each."""
    keys_ptr += at[:, None] + tl.arange(0, LINE)[None, :]
    inside = inside[:, None]
    NONE: tl.constexpr = _NOTHING if PACKED else ABSENT
    one = tl.load(keys_ptr, mask=inside, other=NONE)
    two = tl.load(keys_ptr + LINE, mask=inside, other=NONE)
    three = tl.load(keys_ptr + 2 * LINE, mask=inside, other=NONE)
    four = tl.load(keys_ptr + 3 * LINE, mask=inside, other=NONE)
    return one, two, three, four


@triton.jit
def _flags(key, least, PACKED: tl.constexpr):
    """1 where a key, with its position if PACKED, is at least `least`."""
    if PACKED:
        key = (key >> 32).to(tl.int32)
    return (key >= least).to(tl.int32)


@triton.jit
def _list_line(list_ptr, place, before, key, n, least, PACKED: tl.constexpr):
    """Put what a line has of at least `least` at its place in the list, with its position."""
    # flat: of scattered addresses the compiler would lay the second axis across warps
    to = tl.ravel(place[:, None] + (before & 0xFF))
    key, n = tl.ravel(key), tl.ravel(n)
    entry = key if PACKED else _entry(key, n)
    tl.store(list_ptr + to, entry, mask=_flags(key, least, PACKED) > 0)


@triton.jit
def _list_four(
    list_ptr, place, one, two, three, four, n, least, LINE: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """List four lines of at most 32 keys, by one scan; give the place after them."""
    # a byte for each line: together they count at most 128
    flags = _flags(one, least, PACKED) + (_flags(two, least, PACKED) << 8)
    flags += (_flags(three, least, PACKED) << 16) + (_flags(four, least, PACKED) << 24)
    here = tl.sum(flags, axis=1)
    # before a key in its line, and in the lines before
    before = tl.cumsum(flags, 1) - flags + (here * 0x01010100)[:, None]
    _list_line(list_ptr, place, before, one, n, least, PACKED)
    _list_line(list_ptr, place, before >> 8, two, n + LINE, least, PACKED)
    _list_line(list_ptr, place, before >> 16, three, n + 2 * LINE, least, PACKED)
    _list_line(list_ptr, place, before >> 24, four, n + 3 * LINE, least, PACKED)
    return place + (((here * 0x01010101) >> 24) & 0xFF)


@triton.jit
def _gather(
    keys_ptr, ids_ptr, n_ids, place_ptr, list_ptr, least,
    WIDTH: tl.constexpr, LINE: tl.constexpr, LINES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """List what is at least `least` of the chunks in `ids`, WIDTH keys each, in order.

    A warp has a chunk of its own and scans lines of 32 keys, so no warp waits for another.
    """
    STEPS: tl.constexpr = WIDTH // (8 * LINE)
    lines = tl.arange(0, LINES)
    offs = tl.arange(0, LINE)[None, :]
    place = tl.zeros([LINES], dtype=tl.int32)
    # keys are loaded a step ahead, and the chunk that they are of two
    chunk = tl.load(ids_ptr + lines, mask=lines < n_ids, other=-1)
    at = chunk * WIDTH
    start = tl.load(place_ptr + chunk, mask=chunk >= 0, other=0)
    a, b, c, d = _load_four(keys_ptr, at, chunk >= 0, LINE, PACKED)
    e, f, g, h = _load_four(keys_ptr + 4 * LINE, at, chunk >= 0, LINE, PACKED)
    i = 1 // STEPS * LINES + lines
    chunk = tl.load(ids_ptr + i, mask=i < n_ids, other=-1)
    for step in range(0, (n_ids + LINES - 1) // LINES * STEPS):
        place = tl.where(step % STEPS == 0, start, place)
        n = at[:, None] + offs
        ahead = step + 1
        at = chunk * WIDTH + ahead % STEPS * (8 * LINE)
        start = tl.load(place_ptr + chunk, mask=chunk >= 0, other=0)
        next_a, next_b, next_c, next_d = _load_four(keys_ptr, at, chunk >= 0, LINE, PACKED)
        next_e, next_f, next_g, next_h = _load_four(
            keys_ptr + 4 * LINE, at, chunk >= 0, LINE, PACKED
        )
        i = (ahead + 1) // STEPS * LINES + lines
        chunk = tl.load(ids_ptr + i, mask=i < n_ids, other=-1)
        place = _list_four(list_ptr, place, a, b, c, d, n, least, LINE, PACKED)
        place = _list_four(list_ptr, place, e, f, g, h, n + 4 * LINE, least, LINE, PACKED)
        a, b, c, d = next_a, next_b, next_c, next_d
        e, f, g, h = next_e, next_f, next_g, next_h


@triton.jit
def _slots(at, LINE: tl.constexpr, TILE: tl.constexpr):
    """Slots of a tile, in lines: each is scanned by one thread or two, then the lines' sums."""
    lines = tl.arange(0, TILE // LINE)
    return at + (lines[:, None] * LINE + tl.arange(0, LINE)[None, :])


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
        n = _slots(at, 8, TILE)
        key = (tl.load(list_ptr + n) >> 32).to(tl.int32)
        chosen = ((key >> LOW_BITS) == bucket) & (n < listed)
        before, here = _before(chosen.to(tl.int32))
        tl.store(candidates_ptr + n_in + before, key & (LOW_SPAN - 1), mask=chosen)
        n_in += here
    return n_in


@triton.jit
def _refine(
    candidates_ptr, histogram_ptr, n_in, low, want,
    SHIFT: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Extend `low`, the first bits of the want-th largest candidate, by BITS; what is wanted there.

    The row's histogram is at zero, and is left so.
    """
    offs = tl.arange(0, TILE)
    for at in tl.range(0, n_in, TILE):
        inside = at + offs < n_in
        bits = tl.load(candidates_ptr + at + offs, mask=inside, other=0) >> SHIFT
        chosen = inside & ((bits >> BITS) == low)
        tl.atomic_add(histogram_ptr + (bits & ((1 << BITS) - 1)), 1, mask=chosen, sem="relaxed")
    digit, want = _digit(take_counts(histogram_ptr, 1 << BITS), want, 1 << BITS)
    return (low << BITS) + digit, want


@triton.jit
def _write(
    list_ptr, indices_ptr, at, listed, pivot, ties, n_above, n_equal, k_max, TILE: tl.constexpr
):  # fmt: skip
    """Write the kept positions of a tile of the list; `n_above`, `n_equal` lie before it."""
    i = _slots(at, 16, TILE)
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
    keys_ptr, short_ptr, cut_ptr, from_ptr, place_ptr, short_ids_ptr, long_ids_ptr,
    list_ptr, candidates_ptr, histogram_ptr, indices_ptr, first, last, k, counts, k_max,
    CHUNK: tl.constexpr, SHORT: tl.constexpr, LINES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Find the K-th key of one row among chunks [first, last), and write what is kept."""
    bucket, want = _digit(counts, k, BUCKETS)
    # a row that keeps nothing has nothing to look at
    last = tl.where(k > 0, last, first)
    listed, n_short, n_long = _place(
        from_ptr, cut_ptr, place_ptr, short_ids_ptr, long_ids_ptr, first, last, bucket, LINES * 4
    )
    bucket -= BUCKETS // 2  # keys are signed
    # other threads read what is written here, and below
    tl.debug_barrier()
    least = tl.maximum(bucket * LOW_SPAN, ABSENT + 1)
    LINE: tl.constexpr = SHORT // 8
    _gather(short_ptr, short_ids_ptr, n_short, place_ptr, list_ptr, least, SHORT, LINE, LINES, True)
    _gather(keys_ptr, long_ids_ptr, n_long, place_ptr, list_ptr, least, CHUNK, LINE, LINES, False)
    tl.debug_barrier()
    n_in = _filter(list_ptr, candidates_ptr, listed, bucket, TILE)
    tl.debug_barrier()
    low, ties = _refine(candidates_ptr, histogram_ptr, n_in, first * 0, want, 10, 11, TILE)
    low, ties = _refine(candidates_ptr, histogram_ptr, n_in, low, ties, 0, 10, TILE)
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
