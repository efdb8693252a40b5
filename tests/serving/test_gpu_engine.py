"""The GPU classes of vLLM's plugin, in real engines of a CPU and against vLLM's own classes."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import asks
import drafter
import environment
import test_engine

pytestmark = pytest.mark.deep
HERE = Path(__file__).resolve().parent
SETTINGS = ("10pct", "5pct", "per_layer", "lookback", "two anchors", "top_k")
PRUNED = test_engine.PRUNED
RUNS = [
    *(test_engine.engine(name, test_engine.SETTINGS[name]) for name in SETTINGS),
    test_engine.engine("keep all", {"ratio": [1.0, 1.0]}),
    test_engine.engine("off", PRUNED, extras=[{"visionpulse": "off"}] * len(asks.mixed())),
    test_engine.engine("chunked", PRUNED, **test_engine.CHUNKED),
    test_engine.engine("preemption", PRUNED, **test_engine.FEW_BLOCKS),
    test_engine.engine(
        "8 bits, scaled",
        PRUNED,
        more=test_engine.SCALED,
        **test_engine.EIGHT,
        **test_engine.CHUNKED,
    ),
    test_engine.engine("drafts", PRUNED, speculative_config=drafter.CONFIG),
]


@cache
def results():
    """What the engines made, all in one process."""
    model = test_engine.model()
    drafter.write(model)
    spec = json.dumps({"model": str(model), "runs": RUNS})
    command = [str(environment.python()), str(HERE / "gpu_engine.py"), spec]
    done = subprocess.run(command, capture_output=True, text=True, cwd=environment.ROOT)
    assert done.returncode == 0, done.stderr[-6000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {one["name"]: one for one in found}


def tokens_of(name):
    return results()[name]["rounds"][0]["tokens"]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_says_what_the_patched_model_says(name):
    assert tokens_of(name) == test_engine.expected(name)
    assert tokens_of(name) != test_engine.expected("dense")


@pytest.mark.parametrize("name", ("keep all", "off"))
def test_nothing_pruned_says_what_the_dense_model_says(name):
    assert tokens_of(name) == test_engine.expected("dense")


@pytest.mark.parametrize("name", ("chunked", "preemption", "drafts"))
def test_how_vllm_schedules_changes_nothing(name):
    assert tokens_of(name) == test_engine.expected("5pct")


def test_a_cache_of_8_bits_says_what_the_patched_model_says_with_one():
    """In chunks: steps have decode rows, which are ours, beside rows that are vLLM's."""
    assert tokens_of("8 bits, scaled") == test_engine.expected("8 bits, scaled")


def test_the_classes_are_those_of_a_gpu_and_preemption_took_place():
    assert results()["5pct"]["classes"] == ["__main__.TestImpl"]
    assert results()["preemption"]["preemptions"] > 0


def test_vllms_own_classes_have_what_ours_stand_over():
    """Names and signatures, asked of vLLM itself: run by its Python."""
    command = [str(environment.python()), str(HERE / "gpu_contract.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=environment.ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "holds" in done.stdout
