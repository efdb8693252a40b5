"""What the scripts share: options, the interleaved run with its ceilings, the rows it makes."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from baselines import PLAIN, VLLM, VLLM_NAME, Form, check
from torch import Tensor

import visionpulse as vp
from visionpulse.backends import get, names
from visionpulse.bench import rows as rows_
from visionpulse.bench.ceilings import Ceilings, Limits
from visionpulse.bench.cold import can_evict
from visionpulse.bench.cost import Work
from visionpulse.bench.layers import Layers
from visionpulse.bench.progress import progress_bar
from visionpulse.bench.rows import DTYPES, Machine, Row
from visionpulse.bench.timing import Times, interleaved, per_layer
from visionpulse.call import Call

Variant = Callable[[int], object]
# Layers of a graph on a GPU, each with inputs of its own: what the graph costs by itself is told
# apart from a layer.
GRAPH_LAYERS = 9
ONE_THREAD = ":one-thread"  # behind the name of a variant: the same on one thread of several
SINGLE = " by itself"  # behind the name of a variant: its graph of one layer

# Pages of 2 MiB where the system grants them, for all that is compared: rows scattered over pages
# of 4 KiB wait for the page tables too, by as much as the pages that a run happens to get.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read at torch's first allocation


class Graphs(NamedTuple):
    """A layer as a graph of one and a graph of several, one behind the other."""

    one: Variant
    many: Variant
    layers: int

    def __call__(self, turn: int) -> object:
        return self.many(turn)


class Bench:
    """One script's run: its options, its machine, the rows so far."""

    def __init__(self, parser: argparse.ArgumentParser, *, shapes: str, dtypes: str) -> None:
        parser.add_argument("--shapes", default=shapes, help="names of shapes.py, by comma")
        parser.add_argument("--dtypes", default=dtypes, help=f"of {', '.join(DTYPES)}, by comma")
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        parser.add_argument("--backends", default="", help="ours, by comma; default all that run")
        parser.add_argument(
            "--baselines", default="default", help="names of baselines.py, all, default, or none"
        )
        parser.add_argument("--rounds", type=int, default=7)
        parser.add_argument("--threads", type=int, default=1, help="of the CPU")
        parser.add_argument("--budget", type=int, default=1024, help="MiB of caches per shape")
        parser.add_argument("--out", default="", help="file of rows to write or to add to")
        parser.add_argument("--quiet", action="store_true", help="no table, no progress")
        self.options = parser.parse_args()
        if self.options.baselines == "none":
            self.options.baselines = ""
        self.device = torch.device(self.options.device)
        torch.set_num_threads(self.options.threads)
        self.dtypes = [DTYPES[name] for name in self.options.dtypes.split(",")]
        self.machine = Machine.here(self.device)
        self.rows: list[Row] = []
        self.failed: list[str] = []
        self._pool: object = None
        self._in_part = False

    def say(self, text: str) -> None:
        if not self.options.quiet:
            print(text, file=sys.stderr)

    def backends(self, q: Tensor, kv: vp.KVCache, visual: vp.VisualTokens) -> Iterator[str]:
        """Our backends that serve these tensors; the reference has no speed to measure."""
        wanted = [name for name in self.options.backends.split(",") if name]
        call = Call(q, kv, vp.ops.numbers(q), visual)
        for name in wanted or names():
            backend = get(name)
            away = self.device.type not in (backend.auto_devices or ())
            reason = backend.unavailable() or backend.against(call)
            if name in wanted and reason:
                raise SystemExit(f"backend {name} cannot run here: {reason}")
            if name in wanted or not (away or reason):
                yield name

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the run that may fail without the others: what it made is kept, the rest runs.

        The exit code of `finish` counts the failures.
        """
        is_whole, self._in_part = not self._in_part, True
        if is_whole:
            self._pool = None  # graphs of the last part are gone, and their memory with them
        try:
            yield
        except Exception as error:
            self.failed.append(name)
            traceback.print_exc()
            print(f"FAILED {name}: {_first_line(error)}", file=sys.stderr)
        finally:
            self._in_part = not is_whole
            self._keep()

    def usable(self, forms: list[Form], dtype: torch.dtype) -> list[Form]:
        """The baselines whose answer is right in this dtype."""
        found = []
        for form in forms:
            with self._theirs(form.name):
                check(form.name, self.device.type, dtype)
                found.append(form)
        return found

    def baselines(
        self, variants: Mapping[str, Callable[[], Variant]]
    ) -> tuple[dict[str, Variant], set[str]]:
        """Make third-party variants, each called once: the ones that run, the others' names."""
        made = {}
        for name, make in variants.items():
            with self._theirs(name):
                variant = make()
                if self.device.type == "cuda":
                    variant(0)
                    torch.cuda.synchronize()
                made[name] = variant
        return made, set(variants) - set(made)

    @contextmanager
    def _theirs(self, name: str) -> Iterator[None]:
        """On a GPU third-party code that lacks a kernel or memory is left out, and named.

        A wrong answer is a failure, but one that leaves the rest of the run.
        """
        try:
            yield
        except Exception as error:
            if self.device.type != "cuda":
                raise
            print(f"without {name}: not available, {_first_line(error)}", file=sys.stderr)
            if isinstance(error, AssertionError):
                self.failed.append(name)
            torch.cuda.empty_cache()

    def captured(self, step: Callable[[], object]) -> Variant:
        """On a GPU the step as one CUDA graph, so that the host's pace is not what is timed."""
        if self.device.type != "cuda":
            return lambda turn: step()
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # compiles and allocates, which a capture cannot
            step()
            step()
        torch.cuda.synchronize()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()  # graphs never run at once: they share
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        torch.cuda.synchronize()
        return lambda turn: graph.replay()

    def captured_layers(self, layer: Variant, count: int, name: str = "") -> Variant:
        """The same for one layer, of which there are inputs for `count`: see `Graphs`."""
        if self.device.type != "cuda":
            return layer
        count, stream = min(count, GRAPH_LAYERS), torch.cuda.current_stream()

        def layers() -> None:
            for turn in range(count):
                layer(turn)

        try:
            return Graphs(self.captured(lambda: layer(0)), self.captured(layers), count)
        except torch.OutOfMemoryError:  # a graph is not to blame
            raise
        except RuntimeError as error:  # a third-party form that reads the device
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind
            torch.cuda.synchronize()
            self.say(f"{name} is timed without a graph: {_first_line(error)}")
            return layer

    def time(
        self,
        variants: Mapping[str, Variant],
        dtype: torch.dtype,
        row_bytes: int,
        layers: Layers | None = None,
        positions: Tensor | None = None,
        reads: Mapping[str, Callable[[int], Sequence[Tensor]]] | None = None,
        on_one_thread: Sequence[str] = (),
    ) -> tuple[dict[str, Times], Limits]:
        """Time all variants in one interleaved run, the ceilings among them.

        With `layers` the tensors of a turn's layer are cold, or those that `reads` gives a variant,
        and the gather reads `positions` [n] of them, as a follower does. Variants whose names begin
        as one of `on_one_thread` run on one thread too, by the same clock.
        """
        self.machine = Machine.here(self.device)  # with the load of now
        kv = None if layers is None else layers.kv[0]
        ceilings = Ceilings(self.device, dtype, row_bytes, kv, positions)
        rounds = self.options.rounds

        def memory(name: str, turn: int) -> Sequence[Tensor]:
            name = name.removesuffix(ONE_THREAD)
            own = ceilings.memory(name)
            if own is None and reads is not None and name in reads:
                own = reads[name](turn)
            if own is not None or layers is None:
                return own or []
            copy = VLLM.memory(layers.wide_at(turn)[1]) if VLLM_NAME in name else []
            return copy or layers.memory(turn)

        for name in variants if layers is not None else ():
            if VLLM_NAME in name:  # it copies a cache at its first call
                for turn in range(len(layers)):
                    variants[name](turn)
        tick = progress_bar(not self.options.quiet)
        single = {f"{name}{SINGLE}": v.one for name, v in variants.items() if isinstance(v, Graphs)}
        all_ = {**ceilings.variants(), **variants, **single}
        alone = {
            f"{name}{ONE_THREAD}": on_one(variant)
            for name, variant in all_.items()
            if name.startswith(tuple(on_one_thread))
        }
        times = interleaved(
            all_ | alone, rounds, device=self.device,
            on_round=lambda played: tick("rounds", played, rounds),
            cold=memory if can_evict(self.device) else None,
        )  # fmt: skip
        for name, of in variants.items():
            if not isinstance(of, Graphs):
                continue
            one, many = times.pop(f"{name}{SINGLE}"), times[name]
            try:
                times[name] = per_layer(one, many, of.layers)
            except ValueError as error:  # the row stays, with its share of the launch in it
                print(f"FAILED {name}: {error}", file=sys.stderr)
                self.failed.append(name)
                times[name] = Times(tuple(taken / of.layers for taken in many.seconds))
        return times, ceilings.limits({name: times[name] for name in all_ if name in times})

    def add(
        self,
        bench: str,
        shape: str,
        dtype: torch.dtype,
        times: Mapping[str, Times],
        ceilings: Limits,
        *,
        baseline: str = PLAIN,
        work: Mapping[str, Work] | None = None,
        **more: Any,
    ) -> list[Row]:
        """Make rows of a run, print them and keep them; the ceiling of each is of its own work."""
        made = rows_.rows_of(
            bench, shape, dtype, times, self.machine, baseline=baseline, ceiling=ceilings.read,
            ceilings={name: ceilings.of(one) for name, one in (work or {}).items()},
            bytes_={name: one.bytes for name, one in (work or {}).items()}, **more,
        )  # fmt: skip
        self.rows += made
        if not self.options.quiet:
            print(rows_.table(made))
            load = f"load {self.machine.load:g}, {self.machine.threads} thread(s)"
            limits = f"{ceilings.read.name} {ceilings.read.gb_s:.1f} GB/s, "
            limits += f"{ceilings.gather.name} {ceilings.gather.gb_s:.1f} GB/s"
            print(f"ceilings: {limits}; {load}\n")
        return made

    def finish(self) -> None:
        """Say what was made; leave with an error where a part failed."""
        self._keep()
        if self.options.out:
            self.say(f"{len(self.rows)} rows in {self.options.out}")
        if self.failed:
            raise SystemExit(f"failed: {', '.join(self.failed)}")

    def _keep(self) -> None:
        if self.options.out and self.rows:
            rows_.write(self.options.out, self.rows)


def on_one(variant: Variant) -> Variant:
    """The variant on one thread."""

    def run(turn: int) -> object:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return variant(turn)
        finally:
            torch.set_num_threads(threads)

    return run


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def launches_of(step: Callable[[], object], device: torch.device) -> int | None:
    """Kernels that a step launches; None where nothing is launched."""
    if device.type != "cuda":
        return None
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            step()
            torch.cuda.synchronize()
    except RuntimeError:  # no profiler on this machine: a row without the number
        return None
    on_device = torch.autograd.DeviceType.CUDA
    return sum(event.count for event in seen.key_averages() if event.device_type == on_device)
