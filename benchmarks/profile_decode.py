"""One warmed decode step for a profiler, and the per-stage table of a profile.

    nsys profile --trace=cuda,nvtx --capture-range=cudaProfilerApi --capture-range-end=stop \\
        -o step python benchmarks/profile_decode.py --shape b8-16k
    nsys export --type sqlite -o step.sqlite step.nsys-rep
    python benchmarks/profile_decode.py --read step.sqlite
    python benchmarks/profile_decode.py --torch-profiler step.json      # where nsys is missing

benchmarks/PROFILING.md says how to read them, and has the command lines for ncu.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import profile_table
import torch
from profile_ranges import stage
from shapes import SHAPES, Layers

import visionpulse as vp
from visionpulse.bench.rows import DTYPES
from visionpulse.schedule import Role, roles


class Step:
    """A step with one range per layer, named by its role, and the stages' ranges inside."""

    def __init__(
        self, layers: Layers, count: int, config: vp.PulseConfig, backend: str, fused: bool
    ):
        self.layers, self.config, self.backend, self.fused = layers, config, backend, fused
        self.roles = roles(config, (True,) * count, 0)
        self.workspace = vp.Workspace()

    def __call__(self) -> None:
        selection = None
        common = {"workspace": self.workspace, "backend": self.backend}
        with stage("step"):
            for layer, role in enumerate(self.roles):
                q, kv = self.layers.at(layer)
                with stage(role.value):
                    if role is Role.ANCHOR:
                        selection = self.anchor(q, kv, common)
                    elif role is Role.FOLLOWER:
                        vp.attend(q, kv, self.layers.visual, selection, **common)
                    else:
                        vp.attend(q, kv, **common)

    def anchor(self, q: torch.Tensor, kv: vp.KVCache, common: dict) -> vp.Selection:
        visual, config = self.layers.visual, self.config
        if self.fused:
            return vp.decode(q, kv, visual, config, **common)[1]
        with stage("score"):
            scores, mass, mean = vp.score(q, kv, visual, config, **common)
        with stage("select"):
            selection = vp.select(scores, mass, visual, config, mass_mean=mean, **common)
        with stage("attend"):
            vp.attend(q, kv, visual, selection, **common)
        return selection


@contextmanager
def captured(device: torch.device) -> Iterator[None]:
    """The part that nsys and ncu record when they wait for the profiler API."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    try:
        yield
        torch.cuda.synchronize()
    finally:
        torch.cuda.profiler.stop()


def as_graph(step: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def recorded(step: Callable[[], None], device: torch.device, path: Path) -> None:
    """Write a Chrome trace of one step with torch's profiler."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as seen:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    seen.export_chrome_trace(str(path))


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--read", type=Path, help="print the table of an nsys sqlite export or a torch trace")
    add("--torch-profiler", type=Path, metavar="FILE", help="write a Chrome trace, print its table")
    add("--shape", default="b1-8k", help="a name of shapes.py")
    add("--dtype", default="bf16", choices=list(DTYPES))
    add("--layers", type=int, default=36)
    add("--schedule", default="paper", choices=["paper", "per_layer"])
    add("--backend", default="auto")
    add("--staged", action="store_true", help="the anchor as three calls: score, select, attend")
    add("--graph", action="store_true", help="the step as one CUDA graph")
    add("--warmup", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--budget", type=int, default=1024, help="MiB of caches")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> int:
    options = options_of()
    if options.read:
        print(profile_table.table(profile_table.stages(options.read)))
        return 0
    if options.shape not in SHAPES:
        raise SystemExit(f"no shape {options.shape}; known: {', '.join(SHAPES)}")
    device, shape = torch.device(options.device), SHAPES[options.shape]
    if options.graph and device.type != "cuda":
        raise SystemExit("--graph needs a GPU")
    torch.set_num_threads(options.threads)
    layers = Layers.make(shape, DTYPES[options.dtype], device, options.layers, options.budget << 20)
    config = shape.config(schedule=options.schedule)
    step: Callable[[], None] = Step(
        layers, options.layers, config, options.backend, not options.staged
    )
    for _ in range(options.warmup):
        step()
    if options.graph:
        step = as_graph(step)
        step()
    if options.torch_profiler:
        recorded(step, device, options.torch_profiler)
        print(profile_table.table(profile_table.stages(options.torch_profiler)))
        return 0
    with captured(device):
        step()
    if device.type != "cuda":
        print("no GPU, so nothing was captured: --torch-profiler FILE", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
