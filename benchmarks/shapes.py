"""The shapes that benchmarks run, by name."""

from dataclasses import replace

from visionpulse.bench.layers import Layers, Shape

CONTEXTS = {
    "1k": 1024, "2k": 2048, "4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768, "64k": 65536,
    "128k": 131072,
}  # fmt: skip
BATCHES = (1, 2, 4, 8, 16, 32)
GOAL_TEXT = 512  # of the shapes whose ratios the CPU engine must hold

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(f"b{rows}-{name}", rows, visual)
        for rows in BATCHES
        for name, visual in CONTEXTS.items()
    )
}
GOAL_SHAPES = {
    shape.name: shape
    for shape in (
        Shape(f"b1-{name}-t{GOAL_TEXT}", 1, CONTEXTS[name] - GOAL_TEXT, GOAL_TEXT)
        for name in ("8k", "32k", "128k")
    )
}
SHAPES |= GOAL_SHAPES
# the same with a cache of 8 bits, beside one of the numbers in the dtype of q
SHAPES |= {
    f"{name}-fp8": replace(shape, name=f"{name}-fp8", cache="fp8") for name, shape in SHAPES.items()
}

__all__ = ["BATCHES", "CONTEXTS", "GOAL_SHAPES", "SHAPES", "Layers", "Shape"]
