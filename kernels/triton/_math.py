"""What the kernels share: visible range, span search, page lookup, softmax, arrival, merge."""

import triton
import triton.language as tl


@triton.jit
def visible_range(starts_ptr, lengths_ptr, b, n_slots, window):
    """Positions [begin, end) that row b may see; lengths are clamped to the slots there are."""
    end = n_slots
    if lengths_ptr is not None:
        end = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), n_slots)
    begin = end * 0
    if starts_ptr is not None:
        begin = tl.maximum(tl.load(starts_ptr + b), 0)
    # n > length - 1 - window, the query's own key counted
    if window > 0:
        begin = tl.maximum(begin, end - window)
    return tl.minimum(begin, end), end


@triton.jit
def visible_to(
    query, starts_ptr, lengths_ptr, q_counts_ptr, b, n_slots, window, n_queries
):  # fmt: skip
    """Positions [begin, end) that queries of row b may see, any shape; begin may lie behind end.

    The last of `n_queries` has the row's last key; one that is not real sees none.
    """
    length = n_slots
    if lengths_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), n_slots)
    end = tl.maximum(length - n_queries + 1 + query, 0)
    if q_counts_ptr is not None:
        end = tl.where(query >= n_queries - tl.load(q_counts_ptr + b), end, 0)
    begin = tl.zeros_like(end)
    if starts_ptr is not None:
        begin += tl.maximum(tl.load(starts_ptr + b), 0)
    if window > 0:
        begin = tl.maximum(begin, end - window)
    return begin, end


@triton.jit
def range_of_row(
    row, starts_ptr, lengths_ptr, q_counts_ptr, n_slots, window, n_queries, SEVERAL: tl.constexpr
):  # fmt: skip
    """The row of the cache, the query in it, and the visible range, of a row of queries."""
    if SEVERAL:
        narrow = row.to(tl.int32)  # a division of 64 bits is slow
        query = narrow % n_queries
        b = (narrow // n_queries).to(tl.int64)
        begin, end = visible_to(
            query, starts_ptr, lengths_ptr, q_counts_ptr, b, n_slots, window, n_queries
        )
        begin = tl.minimum(begin, end)
    else:
        query = 0
        b = row
        begin, end = visible_range(starts_ptr, lengths_ptr, b, n_slots, window)
    return b, query, begin, end


@triton.jit
def spans_begun(n, spans_ptr, n_spans, STEPS: tl.constexpr):
    """How many spans of the row begin at or before n; any shape. 2**STEPS must exceed n_spans."""
    count = tl.zeros_like(n)
    for i in tl.static_range(STEPS):
        probe = count + (1 << (STEPS - 1 - i))
        inside = probe <= n_spans
        begin = tl.load(spans_ptr + 2 * (probe - 1).to(tl.int64), mask=inside, other=0)
        count = tl.where(inside & (begin <= n), probe, count)
    return count


@triton.jit
def is_visual(n, spans_ptr, n_spans, STEPS: tl.constexpr):
    """Whether positions n lie in a span of the row."""
    count = spans_begun(n, spans_ptr, n_spans, STEPS)
    end = tl.load(spans_ptr + 2 * (count - 1).to(tl.int64) + 1, mask=count > 0, other=0)
    return n < end


@triton.jit
def visual_before(n, spans_ptr, offsets_ptr, n_spans, STEPS: tl.constexpr):
    """How many visual tokens of the row lie before position n."""
    count = spans_begun(n, spans_ptr, n_spans, STEPS)
    any_span = count > 0
    last = (count - 1).to(tl.int64)
    begin = tl.load(spans_ptr + 2 * last, mask=any_span, other=0)
    end = tl.load(spans_ptr + 2 * last + 1, mask=any_span, other=0)
    before = tl.load(offsets_ptr + last, mask=any_span, other=0)
    return before + tl.minimum(n, end) - begin


@triton.jit
def text_position(t, spans_ptr, offsets_ptr, n_spans, STEPS: tl.constexpr):
    """Position of the t-th text token of the row, counted from slot 0."""
    count = tl.zeros_like(t)
    for i in tl.static_range(STEPS):
        probe = count + (1 << (STEPS - 1 - i))
        inside = probe <= n_spans
        last = (probe - 1).to(tl.int64)
        begin = tl.load(spans_ptr + 2 * last, mask=inside, other=0)
        before = tl.load(offsets_ptr + last, mask=inside, other=0)
        # text tokens before the span: its begin less the visual tokens before it
        count = tl.where(inside & (begin - before <= t), probe, count)
    return t + tl.load(offsets_ptr + count.to(tl.int64))


@triton.jit
def locate(pos, mask, table_ptr, n_pages, PAGE: tl.constexpr):
    """Page and slot of positions, and which are valid: not those whose page id is out of range.

    In a contiguous cache the page is 0 and the slot the position.
    """
    if PAGE == 0:
        page = tl.zeros_like(pos)
        slot = pos
        valid = mask
    else:
        page = tl.load(table_ptr + pos // PAGE, mask=mask, other=-1)
        slot = pos % PAGE
        valid = mask & (page >= 0) & (page < n_pages)
        page = tl.where(valid, page, 0)
    return page.to(tl.int64), slot.to(tl.int64), valid


@triton.jit
def finish_logits(z, valid, scale, softcap, SOFTCAP: tl.constexpr):
    """Scale, cap, and mask; `valid` broadcasts against z."""
    z = z * scale
    if SOFTCAP:
        # tanh from one exp, correct where exp overflows or underflows; near 0 that form cancels,
        # so there the series, whose first omitted term is below half an ulp
        x = z / softcap
        t = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
        y = x * x
        near = x + x * y * (-1.0 / 3.0 + y * (2.0 / 15.0 - y * (17.0 / 315.0)))
        z = softcap * tl.where(tl.abs(x) < 0.2, near, tl.where(x < 0, -t, t))
    return tl.where(valid, z, float("-inf"))


@triton.jit
def block_max(m, z):
    """Running maximum [BLOCK_H] that ignores NaN: the sums propagate it."""
    return tl.maximum(m, tl.max(tl.where(z == z, z, float("-inf")), axis=1))


@triton.jit
def shift(m):
    """The maximum to subtract: 0 where no key was valid, so that exp(-inf - 0) is 0, not NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def split_of(total, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys per split, and splits of a row: by the row's own number of keys alone."""
    per_split = (total + MAX_SPLITS - 1) // MAX_SPLITS
    per_split = tl.maximum((per_split + BLOCK_N - 1) // BLOCK_N * BLOCK_N, MIN_SPLIT)
    return per_split, tl.maximum((total + per_split - 1) // per_split, 1)


@triton.jit
def is_last(counter_ptr, expected):
    """Whether this program arrives last of `expected`; the last resets the counter."""
    # the stores of all threads must be issued before the program's one releasing increment
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == expected - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def merge_sums(
    stats_ptr, n_splits, inv_tau, stride_split,
    BLOCK_H: tl.constexpr, SPLITS: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """Merge maximum and sums over the splits: m, sum at 1, sum at tau, mass, all [BLOCK_H]."""
    offs_h = tl.arange(0, BLOCK_H)
    offs_s = tl.arange(0, SPLITS)
    # [SPLITS, BLOCK_H]
    at = stats_ptr + offs_s[:, None].to(tl.int64) * stride_split + offs_h[None, :]
    inside = (offs_s < n_splits)[:, None]
    m_all = tl.load(at, mask=inside, other=float("-inf"))
    m = tl.max(m_all, axis=0)
    away = m_all - shift(m)[None, :]
    total = tl.sum(tl.exp(away) * tl.load(at + BLOCK_H, mask=inside, other=0.0), axis=0)
    total_tau = total
    mass = total
    if MASS:
        w = tl.exp(away * inv_tau)
        total_tau = tl.sum(w * tl.load(at + 2 * BLOCK_H, mask=inside, other=0.0), axis=0)
        visual = tl.sum(w * tl.load(at + 3 * BLOCK_H, mask=inside, other=0.0), axis=0)
        mass = tl.where(total_tau == 0, 0.0, visual / total_tau)
    return m, total, total_tau, mass


@triton.jit
def merge_values(
    stats_ptr, acc_ptr, m, n_splits, stride_split, is_head,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge the weighted values over the splits, in their order: [BLOCK_H, BLOCK_D]."""
    offs_h = tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    # loads of several splits in flight, in less shared memory than the key tiles take
    STAGES: tl.constexpr = 4 if BLOCK_H * BLOCK_D <= 2048 else 2 if BLOCK_H * BLOCK_D <= 4096 else 1
    for s in tl.range(0, n_splits, num_stages=STAGES):
        m_s = tl.load(stats_ptr + s * stride_split + offs_h)
        # [BLOCK_H, BLOCK_D]
        at = acc_ptr + (s * BLOCK_H + offs_h[:, None]) * BLOCK_D + offs_d[None, :]
        part = tl.load(at, mask=is_head[:, None], other=0.0)
        acc += tl.exp(m_s - shift(m))[:, None] * part
    return acc


@triton.jit
def store_out(
    out_ptr, at_head, acc, total, is_head, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Divide by the sum and store the heads of one KV head; zeros where no key was valid."""
    offs_d = tl.arange(0, BLOCK_D)
    out = acc / tl.where(total == 0, 1.0, total)[:, None]
    at = out_ptr + at_head[:, None] + offs_d[None, :]
    inside = is_head[:, None] & (offs_d < D)[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)
