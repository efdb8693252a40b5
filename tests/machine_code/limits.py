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


STREAMS = {
    # lengths and q | behind: the arrival, the states of 33 splits with the first step of
    # their sums, and two more steps of 16
    "dense": Limit(stream("dense", "attend"), 1, 4, 7, 770),
    # 64 heads: a thread has twice the outputs, so the two steps of 29 splits come twice
    "dense, group 8": Limit(stream("dense", "attend", heads=64), 1, 5, 7, 770),
    # 52 splits, in four steps, twice
    "dense, group 7 of 4 KV heads": Limit(
        stream("dense", "attend", heads=28, kv_heads=4), 1, 9, 7, 770
    ),
    # tiles of 16 heads: q is two loads of a thread; four outputs, of 29 splits again
    "dense, group 16": Limit(stream("dense", "attend", heads=128), 2, 9, 7, 850),
    # tiles of 32, shared by two warps, which meet at each of them: q is four loads, and of eight
    # outputs a thread has two steps. More than the 10 trips that are aimed at, as with few KV heads
    "dense, group 32": Limit(stream("dense", "attend", heads=256), 4, 18, 41, 1130),
    "dense, group 16 of 2 KV heads": Limit(
        stream("dense", "attend", heads=32, kv_heads=2), 2, 27, 7, 850
    ),
    "dense, group 32 of one KV head": Limit(
        stream("dense", "attend", heads=32, kv_heads=1), 4, 63, 17, 1130
    ),
    # but a list has few splits
    "follower, group 16": Limit(stream("follower", "attend", heads=128), 2, 5, 7, 810),
    "follower, group 32": Limit(stream("follower", "attend", heads=256), 4, 9, 15, 1140),
    # 32 heads: of eight outputs a thread has two steps of 16 splits, where 33 would be three
    "dense, 8 queries": Limit(stream("dense", "attend", queries=8), 1, 18, 43, 1120),
    # the spans come with them
    "dense anchor": Limit(stream("anchor-dense", "score_"), 1, 4, 7, 920),
    # behind the scan the states alone
    "pruned scan": Limit(stream("anchor-pruned", "score_"), 1, 2, 7, 630),
    # the count comes with the rest, and a block of the list reads its first index behind them. A
    # share is 128 keys, so this block is one of the list: it looks each key up, which a block of
    # text, 600 instructions a tile, need not. Each copy has its policy of L2 beside it
    "pruned attend": Limit(stream("anchor-pruned", "attend"), 2, 2, 7, 640),
    "follower": Limit(stream("follower", "attend"), 2, 2, 7, 725),
    "follower, 9 spans": Limit(stream("follower", "attend", spans=9), 2, 2, 7, 725),
    # more spans than a warp has lanes are searched for in memory
    "follower, 64 spans": Limit(stream("follower", "attend", spans=64), 6, 2, 7, 725),
    # as long a list as a row of 32k has: 15 splits, whose sums are one step
    "follower, 32k": Limit(stream("follower", "attend", visual=32768), 2, 2, 7, 725),
    # 8 bits: a tile has 32 keys, the bytes of 16, and each pair of numbers is widened. The scales
    # come with q, and the warps bring q to the range of float16 without one barrier more
    "float8: dense": Limit(stream("dense", "attend", float8=True), 1, 4, 7, 1010),
    "float8: dense anchor": Limit(stream("anchor-dense", "score_", float8=True), 1, 4, 7, 1260),
    "float8: pruned scan": Limit(stream("anchor-pruned", "score_", float8=True), 1, 2, 7, 830),
    "float8: pruned attend": Limit(stream("anchor-pruned", "attend", float8=True), 2, 2, 7, 920),
    "float8: follower": Limit(stream("follower", "attend", float8=True), 2, 2, 7, 910),
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

# Loads in flight in the loops over what the blocks of a row wrote: states, and 16 bytes of sums a
# thread, with which a block of 128 asks for as much as the path from L2 carries in a trip.
MERGE_IN_FLIGHT, SUMS_IN_FLIGHT = 4, 16


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
