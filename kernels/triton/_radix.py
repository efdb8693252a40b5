"""The K-th largest of int32 sort codes, exactly, and the positions of the K largest, ascending.

Every program counts its chunk's codes by their top 11 bits, adds the counts to the row's histogram,
and lists the largest codes of the chunk, the chunk's top list. One program then selects. The
histogram says which bucket holds the K-th code. The chunk's counts say how many of its codes are in
that bucket or above, so where they go in one list for the row. A warp copies a chunk from its top
list, without a scan across warps; a chunk that has more in the bucket and above is read whole. The
other 11 and 10 bits, and the positions, come from the row's list, about K long: no sort.
"""

import triton
import triton.language as tl

# int32 that order as the scores do; below every number come NaN, and slots without a candidate
ABSENT: tl.constexpr = tl.constexpr(-(2**31))
_NAN: tl.constexpr = tl.constexpr(-(2**31) + 1)
# an entry without a candidate
_NO_ENTRY: tl.constexpr = tl.constexpr(-(2**63))
# the first digit has 11 bits; the others, of 11 and 10, use the same histogram
BUCKETS: tl.constexpr = tl.constexpr(2048)
LOW_BITS: tl.constexpr = tl.constexpr(21)
LOW_SPAN: tl.constexpr = tl.constexpr(1 << 21)


@triton.jit
def sort_code(score):
    """int32 that orders as the score does; NaN first, -0.0 equal to +0.0."""
    # integers throughout: a comparison of floats may flush subnormals
    bits = score.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    code = tl.where(size == 0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(size > 0x7F800000, _NAN, code)


@triton.jit
def take_counts(histogram_ptr, BINS: tl.constexpr):
    """Read the counts of a histogram and reset them to zero."""
    # between this program's additions before and after
    tl.debug_barrier()
    zeros = tl.zeros([BINS], dtype=tl.int32)
    # an atomic, since a cache may hold an older count than the additions made; an exchange would
    # do too, but AMD's buffers have none
    counts = tl.atomic_and(histogram_ptr + tl.arange(0, BINS), zeros, sem="relaxed")
    tl.debug_barrier()
    return counts


@triton.jit
def _digit(counts, want, BINS: tl.constexpr):
    """Bin that holds the want-th largest, and how many of that bin are wanted."""
    bins = tl.arange(0, BINS)
    above = tl.sum(counts) - tl.cumsum(counts, 0)
    digit = tl.sum((above >= want).to(tl.int32))
    return digit, want - tl.sum(tl.where(bins > digit, counts, 0))


@triton.jit
def _entry(code, n):
    """A code and its position in one integer that orders as the code does."""
    return (code.to(tl.int64) << 32) | n.to(tl.uint32).to(tl.int64)


@triton.jit
def list_top(
    codes_ptr, counts_from_ptr, top_ptr, top_bin_ptr, start, CHUNK: tl.constexpr, TOP: tl.constexpr
):  # fmt: skip
    """List the largest codes of a chunk, in order: whole bins, at most TOP; store the last bin.

    `counts_from` [BUCKETS] counts the chunk's codes in a bin and above. Counts and codes are read
    back from memory: held in registers they would spill.
    """
    counts_from = tl.load(counts_from_ptr + tl.arange(0, BUCKETS))
    top_bin = tl.sum((counts_from > TOP).to(tl.int32))
    n = start + tl.arange(0, CHUNK)
    code = tl.load(codes_ptr + n)
    is_top = (code > ABSENT) & ((code >> LOW_BITS) + BUCKETS // 2 >= top_bin)
    flags = is_top.to(tl.int32)
    tl.store(top_ptr + tl.cumsum(flags, 0) - flags, _entry(code, n), mask=is_top)
    offs = tl.arange(0, TOP)
    tl.store(top_ptr + offs, _NO_ENTRY, mask=offs >= tl.sum(flags))
    tl.store(top_bin_ptr, top_bin)


@triton.jit
def _place_chunks(
    counts_from_ptr, top_bin_ptr, offset_ptr, by_top_ptr, whole_ptr, first, last, bucket,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """Store where each chunk goes in the list of codes in `bucket` or above; return its length.

    `counts_from` is [chunks, BUCKETS]. Chunks whose top list reaches down to the bucket are listed
    in `by_top`, the others in `whole`.
    """
    listed = first * 0
    n_by_top = first * 0
    n_whole = first * 0
    offs = tl.arange(0, CHUNKS)
    for at in range(first, last, CHUNKS):
        chunk = at + offs
        inside = chunk < last
        here = tl.load(counts_from_ptr + chunk * BUCKETS + bucket, mask=inside, other=0)
        top_bin = tl.load(top_bin_ptr + chunk, mask=inside, other=0)
        is_by_top = (inside & (top_bin <= bucket)).to(tl.int32)
        is_whole = (inside & (top_bin > bucket)).to(tl.int32)
        # two counts of at most CHUNKS in one sum
        both = is_by_top + (is_whole << 16)
        before = tl.cumsum(both, 0) - both
        total = tl.sum(both)
        tl.store(offset_ptr + chunk, listed + tl.cumsum(here, 0) - here, mask=inside)
        tl.store(by_top_ptr + n_by_top + (before & 0xFFFF), chunk, mask=is_by_top > 0)
        tl.store(whole_ptr + n_whole + (before >> 16), chunk, mask=is_whole > 0)
        listed += tl.sum(here)
        n_by_top += total & 0xFFFF
        n_whole += total >> 16
    return listed, n_by_top, n_whole


@triton.jit
def _load_four(ptr, at, inside, LINE: tl.constexpr, IS_ENTRY: tl.constexpr):
    """Four lines of codes or entries from `at` [LINES]: [LINES, LINE] each, one a thread."""
    ptr += at[:, None] + tl.arange(0, LINE)[None, :]
    inside = inside[:, None]
    NONE: tl.constexpr = _NO_ENTRY if IS_ENTRY else ABSENT
    one = tl.load(ptr, mask=inside, other=NONE)
    two = tl.load(ptr + LINE, mask=inside, other=NONE)
    three = tl.load(ptr + 2 * LINE, mask=inside, other=NONE)
    four = tl.load(ptr + 3 * LINE, mask=inside, other=NONE)
    return one, two, three, four


@triton.jit
def _flags(code, least, IS_ENTRY: tl.constexpr):
    """1 where a code, or that of an entry, is at least `least`."""
    if IS_ENTRY:
        code = (code >> 32).to(tl.int32)
    return (code >= least).to(tl.int32)


@triton.jit
def _list_line(list_ptr, offset, before, code, n, least, IS_ENTRY: tl.constexpr):
    """Store the codes of a line that are at least `least` in the list, with their positions."""
    # flat: for scattered addresses the compiler would lay the second axis across warps
    at = tl.ravel(offset[:, None] + (before & 0xFF))
    code, n = tl.ravel(code), tl.ravel(n)
    entry = code if IS_ENTRY else _entry(code, n)
    tl.store(list_ptr + at, entry, mask=_flags(code, least, IS_ENTRY) > 0)


@triton.jit
def _list_four(
    list_ptr, offset, one, two, three, four, n, least, LINE: tl.constexpr, IS_ENTRY: tl.constexpr
):  # fmt: skip
    """List four lines of at most 32 codes, by one scan; return the offset behind them."""
    # a byte for each line: together they count at most 128
    flags = _flags(one, least, IS_ENTRY) + (_flags(two, least, IS_ENTRY) << 8)
    flags += (_flags(three, least, IS_ENTRY) << 16) + (_flags(four, least, IS_ENTRY) << 24)
    here = tl.sum(flags, axis=1)
    # before a code in its line, and in the lines before
    before = tl.cumsum(flags, 1) - flags + (here * 0x01010100)[:, None]
    _list_line(list_ptr, offset, before, one, n, least, IS_ENTRY)
    _list_line(list_ptr, offset, before >> 8, two, n + LINE, least, IS_ENTRY)
    _list_line(list_ptr, offset, before >> 16, three, n + 2 * LINE, least, IS_ENTRY)
    _list_line(list_ptr, offset, before >> 24, four, n + 3 * LINE, least, IS_ENTRY)
    return offset + (((here * 0x01010101) >> 24) & 0xFF)


@triton.jit
def _list_chunks(
    ptr, chunks_ptr, n_chunks, offset_ptr, list_ptr, least,
    WIDTH: tl.constexpr, LINE: tl.constexpr, LINES: tl.constexpr, IS_ENTRY: tl.constexpr,
):  # fmt: skip
    """List what is at least `least` of the chunks in `chunks`, WIDTH codes each, in order.

    A warp has a chunk of its own and scans lines of 32 codes, so no warp waits for another.
    """
    STEPS: tl.constexpr = WIDTH // (8 * LINE)
    lines = tl.arange(0, LINES)
    offs = tl.arange(0, LINE)[None, :]
    offset = tl.zeros([LINES], dtype=tl.int32)
    # codes are loaded one step ahead, their chunk's number two steps
    chunk = tl.load(chunks_ptr + lines, mask=lines < n_chunks, other=-1)
    at = chunk * WIDTH
    start = tl.load(offset_ptr + chunk, mask=chunk >= 0, other=0)
    a, b, c, d = _load_four(ptr, at, chunk >= 0, LINE, IS_ENTRY)
    e, f, g, h = _load_four(ptr + 4 * LINE, at, chunk >= 0, LINE, IS_ENTRY)
    i = 1 // STEPS * LINES + lines
    chunk = tl.load(chunks_ptr + i, mask=i < n_chunks, other=-1)
    for step in range(0, (n_chunks + LINES - 1) // LINES * STEPS):
        offset = tl.where(step % STEPS == 0, start, offset)
        n = at[:, None] + offs
        ahead = step + 1
        at = chunk * WIDTH + ahead % STEPS * (8 * LINE)
        start = tl.load(offset_ptr + chunk, mask=chunk >= 0, other=0)
        next_a, next_b, next_c, next_d = _load_four(ptr, at, chunk >= 0, LINE, IS_ENTRY)
        next_e, next_f, next_g, next_h = _load_four(ptr + 4 * LINE, at, chunk >= 0, LINE, IS_ENTRY)
        i = (ahead + 1) // STEPS * LINES + lines
        chunk = tl.load(chunks_ptr + i, mask=i < n_chunks, other=-1)
        offset = _list_four(list_ptr, offset, a, b, c, d, n, least, LINE, IS_ENTRY)
        offset = _list_four(list_ptr, offset, e, f, g, h, n + 4 * LINE, least, LINE, IS_ENTRY)
        a, b, c, d = next_a, next_b, next_c, next_d
        e, f, g, h = next_e, next_f, next_g, next_h


@triton.jit
def _tile_offs(at, LINE: tl.constexpr, TILE: tl.constexpr):
    """Offsets of a tile, in lines: each is scanned by one thread or two, then the lines' sums."""
    lines = tl.arange(0, TILE // LINE)
    return at + (lines[:, None] * LINE + tl.arange(0, LINE)[None, :])


@triton.jit
def _before(flags):
    """How many flags lie before each of a tile in its order, and how many there are."""
    lines = tl.sum(flags, axis=1)
    earlier = tl.cumsum(lines, 0) - lines
    return earlier[:, None] + tl.cumsum(flags, 1) - flags, tl.sum(lines)


@triton.jit
def _list_bucket(list_ptr, low_ptr, listed, bucket, TILE: tl.constexpr):
    """Store the low bits of the bucket's codes; return how many there are."""
    n_low = listed * 0
    for at in tl.range(0, listed, TILE, num_stages=2):
        i = _tile_offs(at, 8, TILE)
        code = (tl.load(list_ptr + i) >> 32).to(tl.int32)
        in_bucket = ((code >> LOW_BITS) == bucket) & (i < listed)
        before, here = _before(in_bucket.to(tl.int32))
        tl.store(low_ptr + n_low + before, code & (LOW_SPAN - 1), mask=in_bucket)
        n_low += here
    return n_low


@triton.jit
def _next_digit(
    low_ptr, histogram_ptr, n_low, prefix, want,
    SHIFT: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Extend `prefix`, the first low bits of the want-th largest, by BITS; return what it wants.

    The row's histogram is zero before and after.
    """
    offs = tl.arange(0, TILE)
    for at in tl.range(0, n_low, TILE):
        inside = at + offs < n_low
        bits = tl.load(low_ptr + at + offs, mask=inside, other=0) >> SHIFT
        has_prefix = inside & ((bits >> BITS) == prefix)
        tl.atomic_add(histogram_ptr + (bits & ((1 << BITS) - 1)), 1, mask=has_prefix, sem="relaxed")
    digit, want = _digit(take_counts(histogram_ptr, 1 << BITS), want, 1 << BITS)
    return (prefix << BITS) + digit, want


@triton.jit
def _write_kept(
    list_ptr, indices_ptr, at, listed, pivot, ties, n_above, n_equal, k_max, TILE: tl.constexpr
):  # fmt: skip
    """Write the kept positions of a tile of the list; `n_above`, `n_equal` lie before it."""
    i = _tile_offs(at, 16, TILE)
    entry = tl.load(list_ptr + i)
    code, n = (entry >> 32).to(tl.int32), entry.to(tl.int32)
    above = ((code > pivot) & (i < listed)).to(tl.int32)
    equal = ((code == pivot) & (i < listed)).to(tl.int32)
    before, here = _before(above + (equal << 16))
    n_equal_here = n_equal + (before >> 16)
    # ties go to the lowest positions; the list ascends, so a kept one goes behind those before it
    kept = (above > 0) | ((equal > 0) & (n_equal_here < ties))
    to = n_above + (before & 0xFFFF) + tl.minimum(n_equal_here, ties)
    tl.store(indices_ptr + to, n, mask=kept & (to < k_max))
    return n_above + (here & 0xFFFF), n_equal + (here >> 16)


@triton.jit
def select_largest(
    codes_ptr, top_ptr, top_bin_ptr, counts_from_ptr, offset_ptr, by_top_ptr, whole_ptr,
    list_ptr, low_ptr, histogram_ptr, indices_ptr, first, last, k, counts, k_max,
    CHUNK: tl.constexpr, TOP: tl.constexpr, LINES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Find the K-th code of one row among chunks [first, last), and write the kept positions."""
    bucket, want = _digit(counts, k, BUCKETS)
    # a row that keeps nothing has nothing to list
    last = tl.where(k > 0, last, first)
    listed, n_by_top, n_whole = _place_chunks(
        counts_from_ptr, top_bin_ptr, offset_ptr, by_top_ptr, whole_ptr, first, last, bucket,
        LINES * 4,
    )  # fmt: skip
    bucket -= BUCKETS // 2  # codes are signed
    # other threads read what is written here, and below
    tl.debug_barrier()
    least = tl.maximum(bucket * LOW_SPAN, ABSENT + 1)
    LINE: tl.constexpr = TOP // 8
    _list_chunks(top_ptr, by_top_ptr, n_by_top, offset_ptr, list_ptr, least, TOP, LINE, LINES, True)
    _list_chunks(
        codes_ptr, whole_ptr, n_whole, offset_ptr, list_ptr, least, CHUNK, LINE, LINES, False
    )
    tl.debug_barrier()
    n_low = _list_bucket(list_ptr, low_ptr, listed, bucket, TILE)
    tl.debug_barrier()
    low, ties = _next_digit(low_ptr, histogram_ptr, n_low, first * 0, want, 10, 11, TILE)
    low, ties = _next_digit(low_ptr, histogram_ptr, n_low, low, ties, 0, 10, TILE)
    pivot = bucket * LOW_SPAN + low
    n_above = first * 0
    n_equal = first * 0
    for at in tl.range(0, listed, TILE, num_stages=2):
        n_above, n_equal = _write_kept(
            list_ptr, indices_ptr, at, listed, pivot, ties, n_above, n_equal, k_max, TILE
        )
    offs = tl.arange(0, TILE)
    for at in range(k, k_max, TILE):
        tl.store(indices_ptr + at + offs, -1, mask=at + offs < k_max)
