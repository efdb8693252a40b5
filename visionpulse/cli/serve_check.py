"""`visionpulse serve-check`: whether a serving engine can run it, and what it would do."""

import sys
from collections.abc import Sequence

from ..serving.vllm import checked
from .parser import parser_of


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan of `vllm serve MODEL ...`, or the refusals."""
    parser = parser_of(
        "serve-check",
        "Check a model and flags of `vllm serve` before its weights load, and print the plan.",
        "visionpulse serve-check Qwen/Qwen3-VL-8B-Thinking --tensor-parallel-size 2",
    )
    parser.add_argument("model", help="as `vllm serve` takes it")
    parser.add_argument("flags", nargs="...", help="flags of `vllm serve`, as they will be")
    parsed = parser.parse_args(sys.argv[2:] if argv is None else argv)
    print("\n".join(checked(parsed.model, parsed.flags)))
    return 0
