"""The table of the plugin: what an engine of vLLM says is what transformers says, bit by bit.

Greedy tokens of nine requests in one batch (three sizes of picture, two pictures, none), in engines
of one process each. The oracle is the patch for transformers, which the other tests hold.
"""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import visionpulse as vp
from visionpulse.config import resolve

sys.path.insert(0, str(Path(__file__).parent))
import asks
import environment
import oracle

pytestmark = pytest.mark.deep
ROOT = Path(__file__).resolve().parents[2]
TOKENS = 36
SMALL = {"tau": 0.1, "ratio": [0.01, 0.05]}  # differs from dense in half of the rows
SETTINGS = {
    "10pct": {"preset": "10pct"},
    "5pct": {"preset": "5pct"},
    "per_layer": SMALL | {"schedule": "per_layer"},
    "lookback": SMALL | {"schedule": "lookback"},
    "two anchors": SMALL | {"ratio": [0.01, 0.02], "anchor": [1, 3], "score": "logit"},
    "top_k": {"preset": "5pct", "budget": "top_k:9"},
}


def engine(name, setting=None, tokens=TOKENS, rounds=1, extras=None, more=None, **llm):
    """A run of engine.py."""
    asked = {"additional_config": {"visionpulse": setting}} if setting is not None else {}
    own = {"name": name, "llm": asked | llm, "tokens": tokens, "rounds": rounds, "extras": extras}
    return own | (more or {})


PRUNED = SETTINGS["5pct"]
# Chunks of 96 tokens: prompts of 6 to 406 tokens come in up to five, beside the decode rows.
CHUNKED = {"max_num_batched_tokens": 96, "enable_chunked_prefill": True, "max_num_seqs": 9}
# 41 blocks of 32 tokens hold not all nine requests at once.
FEW_BLOCKS = {"num_gpu_blocks_override": 41, "block_size": 32, "max_model_len": 1024}
CACHED = {"enable_prefix_caching": True}
EIGHT = {"kv_cache_dtype": "fp8"}  # vLLM itself asks for AVX-512 or AMX
SCALES = (0.3, 1.7)  # of K and V: products with them are rounded
SCALED, NEAREST = {"scales": SCALES}, {"rounding": "nearest"}
GROUPS = (  # a process each
    [
        engine("stock"),
        engine("keep all", {"ratio": [1.0, 1.0]}),
        *(engine(name, setting) for name, setting in SETTINGS.items()),
    ],
    [
        engine("chunked stock", **CHUNKED),
        engine("chunked", PRUNED, **CHUNKED),
        engine("prefix cache", PRUNED, rounds=2, **CACHED),
        engine("preemption", PRUNED, **FEW_BLOCKS),
        engine("lookback, preemption", SETTINGS["lookback"], **FEW_BLOCKS),
        engine("small blocks", PRUNED, block_size=32),
    ],
    [
        engine("8 bits", PRUNED, **EIGHT),
        engine("8 bits, chunked", PRUNED, **EIGHT, **CHUNKED),
        engine("8 bits, scaled", PRUNED, more=SCALED, **EIGHT, **CHUNKED),
        engine("8 bits, keep all", {"ratio": [1.0, 1.0]}, more=SCALED, **EIGHT),
        engine("8 bits, stock", more=SCALED, **EIGHT),
        engine("8 bits, stock rounding to nearest", more=SCALED | NEAREST, **EIGHT),
    ],
)


def model():
    """The folder of the tiny model."""
    sys.path.insert(0, str(ROOT / "examples" / "serving"))
    import tiny_model

    return tiny_model.main(ROOT / "build" / "tiny-vllm")


def made(runs, env=None):
    """What engines made, one after the other in one process."""
    command = [str(environment.python()), str(Path(__file__).with_name("engine.py"))]
    spec = json.dumps({"model": str(model()), "runs": runs})
    done = subprocess.run([*command, spec], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr[-6000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {one["name"]: one for one in found}


@cache
def results(group):
    """What the runs of a group made."""
    return made(GROUPS[group])


def result(name):
    group = next(i for i, runs in enumerate(GROUPS) if name in [run["name"] for run in runs])
    return results(group)[name]


def tokens_of(name, turn=0):
    return result(name)["rounds"][turn]["tokens"]


@cache
def expected(name):
    """Tokens of transformers: dense, or patched with a setting."""
    if name == "dense":
        return oracle.tokens(asks.mixed(), None, TOKENS)
    if name in ("8 bits", "8 bits, scaled"):
        with oracle.stored_as_in_an_engine(*(SCALES if name == "8 bits, scaled" else ())):
            config = resolve("5pct").updated(cache="fp8")
            return oracle.tokens(asks.mixed(), config, TOKENS)
    fields = dict(SETTINGS[name])
    config = resolve(fields.pop("preset", "10pct")).updated(
        **{key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    )
    return oracle.tokens(asks.mixed(), config, TOKENS)


def test_stock_vllm_says_what_dense_transformers_says():
    assert tokens_of("stock") == expected("dense")


def test_right_answers_are_known_and_stock_vllm_gives_them():
    known = [
        (a.answer, t) for a, t in zip(asks.mixed(), tokens_of("stock"), strict=True) if a.answer
    ]
    right = [answer == tokens[: len(answer)] for answer, tokens in known if len(answer) <= TOKENS]
    assert len(right) >= 5 and all(right)


def test_keeping_all_says_what_stock_vllm_says():
    assert tokens_of("keep all") == tokens_of("stock")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_says_what_the_patched_model_says(name):
    assert tokens_of(name) == expected(name)
    assert tokens_of(name) != expected("dense")  # so that a setting which did nothing would fail


@pytest.mark.parametrize("name", ("chunked", "preemption", "small blocks"))
def test_how_vllm_schedules_changes_nothing(name):
    assert tokens_of(name) == expected("5pct")


def test_preemption_took_place():
    assert result("preemption")["preemptions"] > 0
    assert result("lookback, preemption")["preemptions"] > 0


def test_stock_vllm_in_chunks_is_dense_too():
    assert tokens_of("chunked stock") == expected("dense")


def test_a_prefix_from_the_cache_changes_nothing():
    assert tokens_of("prefix cache") == tokens_of("prefix cache", 1) == expected("5pct")
    assert max(result("prefix cache")["rounds"][1]["cached"]) >= 128


@pytest.mark.parametrize("name", ("8 bits", "8 bits, chunked"))
def test_a_cache_of_8_bits_says_what_the_patched_model_says_with_one(name):
    assert tokens_of(name) == expected("8 bits")
    assert tokens_of(name) != expected("5pct")


def test_a_cache_of_8_bits_and_scales_says_what_the_patched_model_says_with_one():
    assert tokens_of("8 bits, scaled") == expected("8 bits, scaled")
    assert tokens_of("8 bits, scaled") != expected("8 bits")


def test_keeping_all_in_8_bits_says_what_vllm_says_once_it_rounds_to_nearest():
    """Stock vLLM cuts digits off where it stores 8 bits on a CPU, so it says other words."""
    assert tokens_of("8 bits, keep all") == tokens_of("8 bits, stock rounding to nearest")
    assert tokens_of("8 bits, keep all") != tokens_of("8 bits, stock")


def test_an_engine_without_our_key_has_vllms_own_classes():
    assert all(one.startswith("vllm.") for one in result("stock")["classes"])
    assert all(one.startswith("visionpulse.") for one in result("5pct")["classes"])


def test_presets_are_those_of_the_package():
    assert {"10pct", "5pct"} <= set(vp.PRESETS)
