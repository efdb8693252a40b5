"""The cores of a worker whose engine binds each of its threads to one.

A pool made by the main thread would inherit its one core. The cores of all bound threads are those
that the engine gave to the worker.
"""

import os
from pathlib import Path

from .. import cpu

TASKS = Path("/proc/self/task")


def bound_cores(tasks: Path = TASKS) -> set[int]:
    """The cores of the threads that are bound to one each."""
    cores = set()
    for status in tasks.glob("*/status"):
        try:
            lines = status.read_text().splitlines()
        except OSError:  # the thread has ended
            continue
        for line in lines:
            if line.startswith("Cpus_allowed_list:"):
                listed = line.split(":", 1)[1].strip()
                if listed.isdigit():
                    cores.add(int(listed))
    return cores


def spread_pool() -> set[int]:
    """Give the pool the cores of the worker, where its main thread is bound to one of them."""
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(os.getpid())) != 1:
        return set()  # the pool inherits all that the worker may use
    cores = bound_cores()
    if len(cores) > 1:
        cpu.set_affinity(cores)
    return cores
