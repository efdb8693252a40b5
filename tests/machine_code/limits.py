"""The most that the machine code of sm_90 may cost in serial steps, bfloat16, head dim 128.

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
    tile: int  # instructions of a warp for 16 keys, the taken path


def stream(step: str, kernel: str, visual: int = 16384, **of: int) -> Use:
    return Use(Step(step, 1, visual, **of), kernel)


STREAMS = {
    # lengths, q of two halves of a head | behind: arrival, states of 33 splits in two steps, and
    # their sums in five steps of eight, of which the first goes out with no state at hand
    "dense": Limit(stream("dense", "attend"), 3, 7, 9, 770),
    # 64 heads: each thread has two outputs, so the five steps come twice
    "dense, group 8": Limit(stream("dense", "attend", heads=64), 3, 12, 9, 770),
    # beside the dense trips the search for the first span: its begin, its end, the next begin
    "dense anchor": Limit(stream("anchor-dense", "score_bf16"), 6, 7, 9, 920),
    # the same search, which one trip of q hides; behind it the states alone
    "pruned scan": Limit(stream("anchor-pruned", "score_bf16"), 5, 2, 7, 630),
    # lengths, the visual tokens before the row's start and end, the count, q, the first index
    "pruned attend": Limit(stream("anchor-pruned", "attend"), 8, 5, 9, 620),
    "follower": Limit(stream("follower", "attend"), 8, 5, 9, 620),
    # each span that a search enters is read once more
    "follower, 9 spans": Limit(stream("follower", "attend", spans=9), 9, 5, 9, 620),
    # as long a list as a row of 32k has: 30 splits, so one more step of eight
    "follower, 32k": Limit(stream("follower", "attend", visual=32768), 8, 6, 9, 620),
}


class LoneLimit(NamedTuple):
    use: Use
    trips: int  # dependent, from start to end
    barriers: int  # of a block
    cluster_barriers: int
    fences: int  # each by every warp: a barrier of the cluster brings one along


ALONE = {
    # statistics, the row's range, its spans, and 32 heads of stored logits in steps of four
    "score finish": LoneLimit(Use(Step("anchor-pruned", 1, 16384), "finish"), 15, 1, 0, 0),
    # the row's range, its spans, one step of scores, the histograms and lists of the cluster
    "select 16k": LoneLimit(Use(Step("anchor-pruned", 1, 16384), "select"), 10, 13, 5, 5),
    # eight times the candidates of a warp
    "select 128k": LoneLimit(Use(Step("anchor-pruned", 1, 131072), "select"), 17, 13, 5, 5),
}

# Loads that a loop over what other blocks wrote keeps in flight: two steps of the row's states, and
# the steps of the sums. Eight cover the trip to L2, the remainder has up to seven.
MERGE_IN_FLIGHT = {"attend": (8, 7, 8), "score": (8, 7, 8)}
# Select reads the lists of other blocks entry by entry where they lie in global memory, which only
# rows beyond 128k candidates need.
SERIAL_BY_DESIGN = {"select": 3}
