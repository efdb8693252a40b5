"""The most that the machine code of sm_90 may cost in serial steps, q of bfloat16, head dim 128.

Trips and structure are pinned, never addresses or cycles: those are the compiler's. A trip is one
wait for memory that the next one depends on, 0.16 us from L2 and 0.65 us from DRAM.
"""

from typing import NamedTuple

from .facts import Use
from .launches import Step

PINNED = "13.0"  # the nvcc that the limits were read with; another one may need one trip more


class Limit(NamedTuple):
    use: Use
    before: int  # dependent trips before the first key is asked for
    behind: int  # behind the last tile, to the output
    barriers: int  # that a warp of the last block meets, from start to end
    tile: int  # instructions of a warp for a tile, the taken path


def stream(step: str, kernel: str, visual: int = 16384, **of: int) -> Use:
    return Use(Step(step, 1, visual, **of), kernel)


# Trips behind the last key that any group of 1 to 32 query heads may cost.
MOST_BEHIND = 10

STREAMS = {
    # lengths and q | behind: the arrival, and the states of 33 splits with all of their sums
    "dense": Limit(stream("dense", "attend"), 1, 2, 8, 770),
    # 64 heads: a thread has twice the outputs, and shared memory for three quarters of them
    "dense, group 8": Limit(stream("dense", "attend", heads=64), 1, 3, 8, 770),
    # 52 splits, in seven steps, twice: two batches are under way, of four that there are and a rest
    "dense, group 7 of 4 KV heads": Limit(
        stream("dense", "attend", heads=28, kv_heads=4), 1, 5, 8, 770
    ),
    # tiles of 16 heads; four outputs, of 29 splits again
    "dense, group 16": Limit(stream("dense", "attend", heads=128), 1, 5, 8, 850),
    # tiles of 32, shared by two warps, which meet at each of them: q comes in two trips. 31 splits
    # of eight outputs are merged by groups: two arrivals
    "dense, group 32": Limit(stream("dense", "attend", heads=256), 2, 6, 47, 1130),
    "dense, group 16 of 2 KV heads": Limit(
        stream("dense", "attend", heads=32, kv_heads=2), 1, 5, 13, 850
    ),
    "dense, group 32 of one KV head": Limit(
        stream("dense", "attend", heads=32, kv_heads=1), 2, 8, 23, 1130
    ),
    # a list has few splits
    "follower, group 16": Limit(stream("follower", "attend", heads=128), 2, 3, 8, 810),
    "follower, group 32": Limit(stream("follower", "attend", heads=256), 2, 5, 16, 1140),
    # 32 heads, by groups, and three blocks of a multiprocessor: each has less shared memory
    "dense, 8 queries": Limit(stream("dense", "attend", queries=8), 1, 10, 47, 1120),
    # the spans come with them
    "dense anchor": Limit(stream("anchor-dense", "score_"), 1, 2, 8, 920),
    # behind the scan the states alone
    "pruned scan": Limit(stream("anchor-pruned", "score_"), 1, 2, 8, 630),
    # the count comes with the rest, and a block of the list reads its first index behind them. A
    # share is 128 keys, so this block is one of the list: it looks each key up, which a block of
    # text, 600 instructions a tile, need not. Each copy has its policy of L2 beside it
    "pruned attend": Limit(stream("anchor-pruned", "attend"), 2, 2, 8, 640),
    "follower": Limit(stream("follower", "attend"), 2, 2, 8, 725),
    "follower, 9 spans": Limit(stream("follower", "attend", spans=9), 2, 2, 8, 725),
    # more spans than a warp has lanes are searched for in memory
    "follower, 64 spans": Limit(stream("follower", "attend", spans=64), 4, 2, 8, 725),
    # as long a list as a row of 32k has: 15 splits, whose sums are one batch
    "follower, 32k": Limit(stream("follower", "attend", visual=32768), 2, 2, 8, 725),
    # 8 bits: a tile has 32 keys, the bytes of 16, and each pair of numbers is widened. The scales
    # come with q, and the warps bring q to the range of float16 without one barrier more. Batches
    # are of two steps, since a block has less shared memory
    "float8: dense": Limit(stream("dense", "attend", float8=True), 1, 3, 8, 1010),
    "float8: dense anchor": Limit(stream("anchor-dense", "score_", float8=True), 1, 3, 8, 1260),
    "float8: pruned scan": Limit(stream("anchor-pruned", "score_", float8=True), 1, 2, 8, 830),
    "float8: pruned attend": Limit(stream("anchor-pruned", "attend", float8=True), 2, 2, 8, 920),
    "float8: follower": Limit(stream("follower", "attend", float8=True), 2, 2, 8, 910),
}


class LoneLimit(NamedTuple):
    use: Use
    trips: int  # dependent, from start to end
    barriers: int  # of a block
    cluster_barriers: int
    fences: int  # each by every warp: a barrier of the cluster brings one along


ALONE = {
    # the row's range with its spans, statistics, 32 heads of stored logits in steps of sixteen
    "score finish": LoneLimit(Use(Step("anchor-pruned", 1, 16384), "finish"), 4, 1, 0, 0),
    # the row's range with its spans and masses, one step of scores, the histograms of the cluster
    "select 16k": LoneLimit(Use(Step("anchor-pruned", 1, 16384), "select"), 4, 6, 5, 5),
    # eight times the candidates of a warp
    "select 128k": LoneLimit(Use(Step("anchor-pruned", 1, 131072), "select"), 11, 6, 5, 5),
}

# Copies that a step of the merge asks for together: sums of as many splits. A batch has several.
SUMS_TOGETHER = 8


class Loops(NamedTuple):
    serial: int  # loops in which every load waits for the one before, at most
    strong: int  # of them those that read what other blocks wrote


# A search over spans in memory is serial by its nature: 32 probes a step, each step the range of
# the next. Only rows of more than 32 spans take it, but each place that searches has a copy.
LOOPS = {
    # two searches of the row's range, one of the first key, spans entered one by one while tiles
    # are filled, and the loop of the tiles itself, which loads one page id or one index ahead
    "vp_attend_bf16_d128_h8": Loops(5, 0),
    "vp_score_bf16_d128_h8": Loops(3, 0),
    "vp_attend_fp8_d128_h8": Loops(5, 0),
    "vp_score_fp8_d128_h8": Loops(3, 0),
    "vp_attend_bf16_d128_h32": Loops(5, 0),
    "vp_score_bf16_d128_h32": Loops(3, 0),
    "vp_attend_bf16_d128_h64": Loops(5, 0),
    "vp_score_bf16_d128_h64": Loops(3, 0),
    # the same searches by position and by visual index, and the remainders of both sums
    "vp_score_finish": Loops(11, 0),
    # the searches, in each pass over the candidates; and the list of a row, where it does not fit
    # into shared memory
    "vp_select_cluster": Loops(12, 3),
    "vp_select_global": Loops(13, 3),
}
