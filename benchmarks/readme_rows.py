"""The committed rows as the figures of the README ask for them."""

import re
from pathlib import Path

from visionpulse.bench.rows import Row, read


class MissingRowError(LookupError):
    """A figure of the README has no row any more."""


class Results:
    """The committed rows of one machine."""

    def __init__(self, path: Path, rows: list[Row]) -> None:
        self.path = path
        self.rows = {row.key: row for row in rows}

    @classmethod
    def by_machine(cls, path: Path, bench: str, threads: int = 0) -> "list[Results]":
        """Those of each machine with rows of this benchmark, the newest last; 0: any threads."""
        machines: dict[tuple[str, str, int], list[Row]] = {}
        for row in read(path) if path.exists() else []:
            if row.bench == bench and threads in (0, row.machine["threads"]):
                machines.setdefault(row.where, []).append(row)
        return [cls(path, rows) for rows in machines.values()] or [cls(path, [])]

    def has(self, backend: str) -> bool:
        """Whether there is a row of it on any shape."""
        return any(row.backend == backend for row in self.rows.values())

    def row(self, *key: str) -> Row:
        if key not in self.rows:
            name = " ".join(key)
            raise MissingRowError(
                f"{self.path.name} has no row {name!r}, which the README shows; "
                "run its command again, or take the block out"
            )
        return self.rows[key]


def shapes_of(found: Results) -> list[str]:
    """The shapes of the rows, such as b8-16k: by visual tokens, then by rows of a batch."""

    def size(shape: str) -> tuple[int, int]:
        rows, visual = re.fullmatch(r"b(\d+)-(\d+)k", shape).groups()
        return int(visual), int(rows)

    return sorted({row.shape for row in found.rows.values()}, key=size)


def milliseconds(us: float) -> str:
    return f"{us / 1e3:.3g} ms" if us < 999_500 else f"{us / 1e6:.3g} s"


def source(row: Row) -> str:
    """Where the figures come from: machine, versions, commit, load."""
    machine = row.machine
    return (
        f"{machine['device']} ({machine['isa']}), {machine['threads']} thread, "
        f"torch {machine['versions']['torch']}, commit {machine['commit']}, "
        f"load {machine['load']:g} beside it,\nmemory ceiling {row.ceiling_gb_s:.1f} GB/s.\n"
    )
