"""Two files of rows side by side, and the gate on ratios.

    python benchmarks/compare.py old.jsonl new.jsonl            # new against old, with the noise
    python benchmarks/compare.py results/cpu.jsonl new.jsonl --gate 0.6
    python benchmarks/compare.py results/cpu.jsonl --gate 0.6 --attempts 3 --run "bench_layers.py"

The gate checks each row's ratio to its baseline, both bests of one interleaved run, against the one
committed for the same model of CPU. On another the baseline has other kernels, so its ratios say
nothing here. Times themselves are not gated: a neighbour changes them.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from visionpulse.bench.rows import Machine, Row, read

# A shorter op's time is mostly the caches that the variant before it left behind.
SHORTEST_US = 150.0
HERE = Path(__file__).resolve().parent


def pairs(old: list[Row], new: list[Row]) -> list[tuple[Row, Row]]:
    """Rows of both files with the same key, in the order of the first."""
    fresh = {row.key: row for row in new}
    return [(row, fresh[row.key]) for row in old if row.key in fresh]


def compared(old: Row, new: Row) -> tuple[str, ...]:
    """One line: times, their ratio, the noise of both, and what to make of it."""
    change = old.us_best / new.us_best
    noise = max(old.noise, new.noise)
    verdict = "within noise" if 1 / (1 + noise) <= change <= 1 + noise else "faster"
    if change < 1 / (1 + noise):
        verdict = "slower"
    ratios = [f"{row.ratio:.2f}x" if row.ratio else "-" for row in (old, new)]
    return (
        *old.key, f"{old.us_best:,.1f}", f"{new.us_best:,.1f}", f"{change:.2f}x",
        f"{100 * old.noise:.0f} %", f"{100 * new.noise:.0f} %", *ratios, verdict,
    )  # fmt: skip


HEADINGS = (
    "bench", "shape", "backend", "dtype", "old us", "new us", "speed-up", "noise", "noise", "ratio",
    "ratio", "",
)  # fmt: skip


def columns(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i < 4 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def gated(row: Row, machine: Machine) -> bool:
    """Ours, beside a baseline, on this model of CPU and its instruction set, and long enough."""
    if row.us_best < SHORTEST_US:
        return False
    has_ratio = row.ratio is not None and bool(row.baseline) and row.backend != row.baseline
    same = (row.machine["device"], row.machine["isa"]) == (machine.device, machine.isa)
    return has_ratio and same and row.backend.startswith(("cpu", "ours"))


def fallen(old: list[Row], best: dict[tuple[str, ...], float], share: float) -> list[str]:
    """What is below the gate, in words."""
    lines = []
    for row in old:
        got, wanted = best.get(row.key), share * (row.ratio or 0.0)
        if got is not None and got < wanted:
            lines.append(
                f"{' '.join(row.key)}: {got:.2f}x against {row.baseline}, "
                f"the gate is {wanted:.2f}x ({share:g} of the committed {row.ratio:.2f}x)"
            )
    return lines


def fresh_rows(command: str) -> list[Row]:
    """Run a script of this folder and read the rows that it makes."""
    script, *arguments = shlex.split(command)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        line = [sys.executable, str(HERE / script), *arguments, "--quiet", "--out", str(out)]
        subprocess.run(line, check=True)
        return read(out)


def gate(old: list[Row], share: float, attempts: int, give: "list[Row] | str") -> int:
    """Hold the best of up to `attempts` runs against the committed ratios."""
    machine = Machine.here()
    held = [row for row in old if gated(row, machine)]
    if not held:
        others = {f"{row.machine['device']} ({row.machine['isa']})" for row in old}
        print(
            f"no gate: no committed row of {SHORTEST_US:g} us or more is of this CPU, "
            f"{machine.device} ({machine.isa}); "
            f"the committed ones are of {'; '.join(sorted(others))}"
        )
        return 0
    best: dict[tuple[str, ...], float] = {}
    for attempt in range(1, attempts + 1):
        for row in fresh_rows(give) if isinstance(give, str) else give:
            best[row.key] = max(best.get(row.key, 0.0), row.ratio or 0.0)
        below = fallen(held, best, share)
        seen = sum(row.key in best for row in held)
        if not seen:
            print("the run made none of the committed rows: is it the right script?")
            return 2
        print(f"attempt {attempt}: {seen - len(below)} of {seen} ratios hold {share:g}x")
        if not below:
            return 0
        if not isinstance(give, str):
            break
    print("\n".join(below))
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path, nargs="?")
    parser.add_argument("--gate", type=float, metavar="SHARE", help="of each committed ratio")
    parser.add_argument("--attempts", type=int, default=3)
    parser.add_argument("--run", metavar="COMMAND", help="a script here that makes the new rows")
    options = parser.parse_args()
    if (options.new is None) == (options.run is None):
        parser.error("give either a second file or --run")
    old = read(options.old)
    if options.gate is not None:
        return gate(old, options.gate, options.attempts, options.run or read(options.new))
    new = fresh_rows(options.run) if options.run else read(options.new)
    found = pairs(old, new)
    if not found:
        print("the files have no row in common")
        return 1
    print(columns([HEADINGS, *(compared(*pair) for pair in found)]))
    devices = {rows[0].machine["device"] for rows in (old, new)}
    if len(devices) > 1:
        print(f"the machines differ: {'; '.join(sorted(devices))}; compare ratios, not times")
    return 0


if __name__ == "__main__":
    sys.exit(main())
