"""Where the threads of the CPU kernels run.

The kernels run on a pool of threads of their own beside the calling thread. A thread inherits the
cores of the one that makes it: in a process that binds its main thread to one core, as workers of
serving engines do, the whole pool would share that core. `set_affinity` says where it may run.
"""

import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import _native

_NODES = Path("/sys/devices/system/node")


class Place(NamedTuple):
    """Where a thread of the pool runs."""

    node: int  # 0, 1, ... of the memory nodes in use
    cores: list[int]


def set_affinity(cores: Iterable[int] | None, *, pin: bool = False) -> None:
    """Run the pool's threads on these cores, in this process and its later children.

    The threads spread over the cores' memory nodes, each at home on all given cores of its node;
    with `pin` each has one core of its own while there are enough. The calling thread stays where
    it is: a core that it alone is bound to is given away last. With more than one node the parts
    of a row go to threads of one node. `None` undoes it: the threads run where the one that made
    them may.
    """
    if cores is None:
        _native.module().cpu.set_places([])
        return
    wanted = sorted(set(cores))
    if not wanted:
        raise ValueError("set_affinity needs at least one core, or None to bind no thread")
    if not hasattr(os, "sched_setaffinity"):
        raise OSError("this system does not let a thread choose its cores; only Linux does")
    refused = _refused(wanted)
    if refused:
        raise ValueError(
            f"this process may not run on core(s) {', '.join(map(str, refused))}; "
            f"the machine has {os.cpu_count()}, and a container may have fewer: see nproc"
        )
    own = os.sched_getaffinity(0)
    caller = next(iter(own)) if len(own) == 1 else None
    _native.module().cpu.set_places(places(wanted, nodes_of(wanted), pin=pin, caller=caller))


def places(
    cores: Sequence[int], nodes: Sequence[int], *, pin: bool, caller: int | None
) -> list[Place]:
    """The place of each thread of the pool in turn; thread i takes number i modulo the count.

    `nodes[i]` is the memory node of `cores[i]`, `caller` the one core of the calling thread.
    Neighbours in the list lie on different nodes, so that a few threads use all of them.
    """
    numbers = {node: i for i, node in enumerate(sorted(set(nodes)))}
    by_node: list[list[int]] = [[] for _ in numbers]
    for core, node in zip(cores, nodes, strict=True):
        by_node[numbers[node]].append(core)
    turns = [
        (rank, node, core)
        for node, own in enumerate(by_node)
        for rank, core in enumerate(sorted(own, key=lambda core: core == caller))
    ]
    ordered = sorted(turns, key=lambda turn: (turn[2] == caller, turn))
    return [Place(node, [core] if pin else by_node[node]) for _, node, core in ordered]


def nodes_of(cores: Iterable[int], folder: Path = _NODES) -> list[int]:
    """The memory node of each core, as Linux lists them; 0 where it lists none."""
    found: dict[int, int] = {}
    for listed in folder.glob("node[0-9]*/cpulist"):
        node = int(listed.parent.name.removeprefix("node"))
        found |= dict.fromkeys(_listed(listed.read_text()), node)
    return [found.get(core, 0) for core in cores]


def _listed(text: str) -> list[int]:
    """The numbers of a list such as 0-3,8,10-11."""
    ranges = [part.split("-") for part in text.strip().split(",") if part]
    return [core for ends in ranges for core in range(int(ends[0]), int(ends[-1]) + 1)]


def _refused(cores: Sequence[int]) -> list[int]:
    """The cores that the system does not let this process use; a thread of its own asks."""
    refused = []

    def ask() -> None:
        for core in cores:
            try:
                os.sched_setaffinity(0, {core})
            except OSError:
                refused.append(core)

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join()
    return refused
