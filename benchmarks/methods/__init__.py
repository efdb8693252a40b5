"""What the paper compares with, as policies over a model of transformers, and controls.

    with methods.apply(model, methods.FastV(ratio=0.10)) as run:
        model.generate(**inputs)
    print(run.retention)

FastV, VisionZip and LOOK-M choose visual tokens once, at prefill, and take the rest out of the
cache. They are for comparison: one prompt per cache, greedy or sampled decoding, full attention in
every layer; decode steps run on the same ops as VisionPulse.
"""

from visionpulse.calibration.method import Method, Run, apply
from visionpulse.calibration.prompt import Prompt

from .blocks import Blocks64
from .controls import Blind, NoneAfter, RandomTokens
from .fastv import FastV
from .lookm import LookM
from .visionzip import VisionZip

__all__ = [
    "Blind",
    "Blocks64",
    "FastV",
    "LookM",
    "Method",
    "NoneAfter",
    "Prompt",
    "RandomTokens",
    "Run",
    "VisionZip",
    "apply",
]
