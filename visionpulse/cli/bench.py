"""`visionpulse bench`: what would VisionPulse gain on this machine, for this model?

Measures the three kinds of layer and torch's two forms of the dense one at several contexts, the
machine's ceilings in the same run, and adds up decode steps. Attention is measured; the time of
the weights is predicted from the ceiling, and marked so.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bench import cost, plots, torch_forms
from ..bench import rows as rows_
from ..bench.ceilings import Ceilings
from ..bench.check import check_output
from ..bench.cold import can_evict
from ..bench.layers import Layers, Shape
from ..bench.progress import Tick, progress_bar
from ..bench.report import CHECK, CHECKED, PLAIN, TODAY, VLLM, WIDE, GainReport, Measured
from ..bench.timing import OncePerStep, interleaved
from ..bench.vllm_form import PAGE, VllmForm, missing
from ..config import PulseConfig
from ..files import check_writable, write_text
from ..layer_ops import LayerOps
from ..ops import attend, explain
from ..selection import Selection
from ..workspace import Workspace
from .parser import PRUNING, add_cache, add_preset, at_least, failure, parser_of, pruning

MOST_ROUNDS, LEAST_ROUNDS = 15, 3


def main(argv: Sequence[str]) -> int:
    """Run the verb."""
    options = _options(argv)
    try:
        decoder = cost.decoder_of(options.model)
        preset = pruning(options.preset)
        cache = preset.cache if options.cache is None else options.cache
        config = preset.updated(schedule=options.schedule, cache=cache)
        shapes = _shapes(options, decoder, config)
        folder = Path(options.out)
        folder.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written fails first
        check_writable(folder)
    except ValueError as error:
        return failure("bench", error, 2)
    threads = options.threads or threads_of(rows_.Machine.here().load)
    torch.set_num_threads(threads)
    device, dtype = torch.device(options.device), rows_.DTYPES[options.dtype]
    tick = progress_bar(options.progress)
    machine = rows_.Machine.here(device)
    measured = []
    for shape in shapes:
        seconds = options.seconds / len(shapes)
        measured.append(_measure(shape, dtype, device, config, seconds, tick))
    report = GainReport(decoder, config, dtype, machine, measured, options)
    print(report.text())
    written = [write_text(folder / "bench.json", json.dumps(report.data(), indent=1) + "\n")]
    if options.plots:
        try:
            written += report.plots(folder)
        except ImportError as error:
            print(f"\nno plots: {error}")
    print("\nwritten:", *(f"  {path}" for path in written), sep="\n")
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    about = "Measure on this machine what a model would gain; about a minute."
    example = "visionpulse bench --model qwen3-vl-4b --contexts 8k,32k --seconds 30"
    parser = parser_of("bench", about, example)
    add = parser.add_argument
    known = ", ".join(cost.KNOWN)
    add("--model", default="qwen3-vl-4b", help=f"{known}, or a path to a config.json")
    add("--contexts", default="4k,8k,16k,32k", help="visual tokens, by comma; k is 1024")
    add("--text", type=at_least(0), default=256, help="text tokens in the context")
    add("--batch", type=at_least(1), default=1, help="rows that decode together")
    add("--dtype", default="bf16", choices=list(rows_.DTYPES), help="of the model and its cache")
    add_preset(parser, "10pct", "the setting to measure", names=PRUNING)
    add_cache(parser)
    add("--schedule", default="paper", help="paper, lookback or per_layer")
    add("--retention", type=float, help="share kept; by default the largest that the preset allows")
    add("--seconds", type=float, default=60, help="about how long to measure")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help=f"of torch (default: {device})")
    add(
        "--threads",
        type=at_least(0),
        default=0,
        help="of torch; default: as it has, 1 on a busy machine",
    )
    add("--out", default="visionpulse-bench", help="folder for bench.json and the plots")
    add("--no-plots", dest="plots", action="store_false", help="write bench.json alone")
    add("--no-progress", dest="progress", action="store_false", help="draw no bar")
    return parser.parse_args(argv)


def threads_of(load: float) -> int:
    """All of torch's threads on an idle machine; one on a busy one, on its own CPU time.

    OpenMP waits for its slowest thread, so beside busy neighbours torch would look slower than it
    is, and we faster.
    """
    return torch.get_num_threads() if load < 0.5 else 1


def _tokens(text: str) -> int:
    number = text.strip().lower().removesuffix("k")
    if not number.isdigit() or int(number) < 1:
        raise ValueError(f"a context is a number of tokens such as 8k or 5000, got {text!r}")
    return int(number) * (1024 if text.strip().lower().endswith("k") else 1)


def _shapes(options: argparse.Namespace, decoder: cost.Decoder, config: PulseConfig) -> list[Shape]:
    retention = config.ratio[1] if options.retention is None else options.retention
    if not 0 < retention <= 1:
        raise ValueError(f"--retention must be above 0 and at most 1, got {retention}")
    suffix = "" if config.cache == "model" else f"-{config.cache}"
    contexts = sorted({_tokens(text) for text in options.contexts.split(",")})
    return [
        Shape(
            f"b{options.batch}-{plots.short(visual)}{suffix}", options.batch, visual, options.text,
            decoder.heads, decoder.kv_heads, decoder.head_dim, retention, config.cache,
        )
        for visual in contexts
    ]  # fmt: skip


def _measure(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    config: PulseConfig,
    seconds: float,
    tick: Tick,
) -> Measured:
    """Time the kinds of layer in one interleaved run of about `seconds`, inputs included."""
    begin = time.perf_counter()
    layers = Layers.make(shape, dtype, device, layers=8)
    exactly = config.updated(ratio=(shape.retention, shape.retention), anchor=None)
    variants, selection = _variants(layers, exactly)
    _check(layers, selection)
    kept = ~layers.visual.mask(shape.keys)[0]
    kept[selection.indices[0, : shape.kept].long()] = True
    positions = kept.nonzero()[:, 0]
    row_bytes = shape.head_dim * layers.kv[0].dtype.itemsize
    ceilings = Ceilings(device, dtype, row_bytes, layers.kv[0], positions)
    variants |= ceilings.variants()
    vllm = _vllm(layers, device)
    if vllm is not None:
        variants[VLLM] = lambda turn: vllm(*layers.wide_at(turn))

    def memory(name: str, turn: int) -> Sequence[Tensor]:
        """What a variant must not find in a cache."""
        own = ceilings.memory(name)
        if own is None and name == VLLM and vllm is not None:
            own = vllm.memory(layers.wide_at(turn)[1])
        return own or layers.memory(turn)

    cold = memory if can_evict(device) else None
    once = time.perf_counter()
    interleaved(variants, 1, warmup=0, device=device, cold=cold)
    round_ = time.perf_counter() - once
    left = seconds - (time.perf_counter() - begin)
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(left / round_) - 1))
    what = f"{plots.short(shape.visual)} visual tokens"
    times = interleaved(
        variants, rounds, device=device, cold=cold,
        on_round=lambda n: tick(what, n + 1, rounds + 1),
    )  # fmt: skip
    return Measured(shape, times, ceilings.limits(times))


def _vllm(layers: Layers, device: torch.device) -> VllmForm | None:
    """The kernel of vLLM, where it is installed, serves this shape and agrees with ours."""
    if device.type != "cpu" or missing() is not None or layers.shape.keys % PAGE:
        return None
    form, (q, kv) = VllmForm(), layers.wide_at(0)
    tolerance = 1e-4 if q.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(form(q, kv), attend(q, kv), rtol=tolerance, atol=tolerance)
    for turn in range(len(layers)):  # it copies a cache at its first call
        form(*layers.wide_at(turn))
    return form


def _variants(
    layers: Layers, config: PulseConfig
) -> tuple[dict[str, Callable[[int], object]], Selection]:
    visual, workspace = layers.visual, Workspace()
    ops = LayerOps(*layers.at(0), visual, config)  # as the layers of a patched model
    _, selection = ops.decode(*layers.at(0), visual, workspace)

    def dense(of: LayerOps, q: Tensor, kv: Any) -> Tensor:
        return of.attend(q, kv, None, None, workspace)

    shape, is_wide = layers.shape, layers.kv is layers.wide
    several = [  # a check of drafted tokens
        torch.randn(shape.rows, CHECKED, shape.heads, shape.head_dim).to(q.device, q.dtype)
        for q in [layers.at(0)[0]] * 2
    ]
    # lossless decoding, for which a check is timed, refuses a cache of 8 bits
    q, kv = (several[0], layers.kv[0]) if is_wide else layers.wide_at(0)
    beside = LayerOps(q, kv, None, config)
    more: dict[str, Callable[[int], object]] = (
        {CHECK: lambda turn: dense(beside, several[turn % len(several)], layers.at(turn)[1])}
        if is_wide
        else {WIDE: lambda turn: dense(beside, *layers.wide_at(turn))}
    )
    return {
        TODAY: lambda turn: torch_forms.per_head(*layers.wide_at(turn)),
        PLAIN: lambda turn: torch_forms.grouped(*layers.wide_at(turn)),
        "dense": lambda turn: dense(ops, *layers.at(turn)),
        "anchor": OncePerStep(
            lambda turn: ops.decode(*layers.at(turn), visual, workspace), workspace
        ),
        "follower": lambda turn: ops.attend(*layers.at(turn), visual, selection, workspace),
        **more,
    }, selection


def _check(layers: Layers, selection: Selection) -> None:
    """Check our dense layer and a follower before anything is timed."""
    q, kv = layers.at(1)
    backend = str(explain(q, kv, layers.visual).name)
    follower = attend(q, kv, layers.visual, selection)
    for kind, out, chosen in (("dense", attend(q, kv), None), ("follower", follower, selection)):
        try:
            check_output(layers, 1, out, chosen, backend)
        except AssertionError as error:
            raise RuntimeError(
                f"our {kind} {error}; timings of a wrong answer are worth nothing: "
                "please report this"
            ) from error
