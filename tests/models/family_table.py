"""Try every image-text-to-text type of the installed transformers, tiny.

    python tests/models/family_table.py            # the results of this version, and the page
    python tests/models/family_table.py --page     # the page alone, from the committed results

What was found stands in `families/VERSION.json`; docs/families.md is made from these files.
"""

import argparse
import importlib.util
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "families"
PAGE = HERE.parent.parent / "docs" / "families.md"
PICTURE, TOKENS = 16, 8  # visual tokens of a prompt, tokens of an answer
PICTURES = "pictures"
WORKS, DENSE, REFUSED, UNTRIED = "works", "dense", "refused", "not tried"


@dataclass(frozen=True)
class Found:
    """What became of a type: `because` says why it does not work, or what was tried."""

    outcome: str
    because: str = ""
    layers: str = ""  # full-attention ones of all


def kinds() -> list[str]:
    """The model types of this transformers."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES,
    )

    return sorted(NAMES)


def look(kind: str) -> Found:
    """Build a type tiny, patch it and decode; what fails before that counts as not tried."""
    from visionpulse.models.families import FAMILIES, UnsupportedModelError

    if (known := FAMILIES.get(kind)) and known.refused:
        return Found(REFUSED, known.refused)
    try:
        model, inputs = _made(kind)
    except UnsupportedModelError as refusal:
        return Found(REFUSED, str(refusal).removeprefix(f"{kind} cannot be pruned: "))
    except Exception as failure:  # whatever a config of strange widths runs into
        return Found(UNTRIED, _line("it could not be built tiny", failure))
    return _decoded(model, inputs)


def _line(what: str, failure: Exception) -> str:
    text = " ".join(str(failure).split())
    if "timm" in text:
        return "its vision tower comes from the package timm"
    return f"{what}: {type(failure).__name__}: {text[:120]}"


def _made(kind: str) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForImageTextToText

    from visionpulse.models.families import anatomy
    from visionpulse.testing.draw import Draws

    conftest = _module("conftest")
    if kind in conftest.FAMILIES:
        vlm = conftest.Tiny(kind)
        return vlm.model, vlm.inputs()
    shrink = _module("shrink")
    with torch.device("meta"):  # a refusal needs no weights
        anatomy(AutoModelForImageTextToText.from_config(shrink.shrunk(kind)))
    model = AutoModelForImageTextToText.from_config(shrink.shrunk(kind)).eval()
    model.generation_config.pad_token_id = 0
    draws = Draws(0)
    draws.refill(model, 0.02)
    draws.refill(model.get_decoder(), 0.2, embedding=0.5)  # else attention hardly speaks
    visual = anatomy(model).visual_ids[0]
    ids = torch.tensor([[7, 8, 9] + [visual] * PICTURE + [5, 6, 7, 8]])
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _decoded(model: Any, inputs: dict[str, Any]) -> Found:
    import visionpulse as vp

    shrink = _module("shrink")
    tried = PICTURES if "pixel_values" in inputs else "placeholder tokens"
    banned = [shrink.IMAGE, *range(shrink.IMAGE + 1, shrink.VOCABULARY)]

    def answer() -> torch.Tensor:
        return model.generate(
            **inputs, do_sample=False, max_new_tokens=TOKENS, suppress_tokens=banned
        )

    try:
        own = answer()
    except Exception as failure:  # its unpatched self
        return Found(UNTRIED, _line("its generate() fails unpatched", failure))
    with vp.patch(model, ratio=(1.0, 1.0)) as session:
        anatomy, everything = session.anatomy, answer()
        if anatomy.dense_because:
            return Found(DENSE, anatomy.dense_because)
        assert torch.equal(everything, own), "keeping everything changed tokens"
        assert session.stats.retention.min == 1.0 and session.stats.steps == TOKENS - 1
    with vp.patch(model, tau=0.5, ratio=(0.05, 0.4)) as session:
        answer()
        assert session.stats.steps == TOKENS - 1 and session.stats.retention.max < 0.5
    assert torch.equal(answer(), own), "the model was not restored"
    return Found(WORKS, tried, f"{sum(anatomy.full)} of {len(anatomy.full)}")


def results() -> dict[str, dict[str, Found]]:
    """What is committed, by version of transformers, the oldest first."""
    paths = sorted(RESULTS.glob("*.json"), key=lambda path: [int(n) for n in path.stem.split(".")])
    return {
        path.stem: {kind: Found(**row) for kind, row in json.loads(path.read_text()).items()}
        for path in paths
    }


def counts(found: dict[str, Found]) -> dict[str, int]:
    """How many types of a version had each outcome."""
    outcomes = [one.outcome for one in found.values()]
    return {name: outcomes.count(name) for name in (WORKS, DENSE, REFUSED, UNTRIED)}


def page() -> str:
    """docs/families.md."""
    by_version = results()
    of_all = "\n".join(
        f"| {version} | {len(found)} | " + " | ".join(map(str, counts(found).values())) + " |"
        for version, found in by_version.items()
    )
    kinds = sorted({kind for found in by_version.values() for kind in found})
    rows = "\n".join(
        f"| `{kind}` | "
        + " | ".join(_cell(found.get(kind)) for found in by_version.values())
        + " |"
        for kind in kinds
    )
    reasons = "\n".join(filter(None, (_reasons(kind, by_version) for kind in kinds)))
    names = " | ".join(by_version)
    return f"""# Model families

Every image-text-to-text type of transformers was built tiny, with random weights, and decoded.
It **works** if three things hold: with everything kept the tokens are those of the unpatched model;
pruned steps keep less than half of the visual tokens; unpatched it gives its first tokens again.
The figures behind it say how many layers have full attention; only these are pruned. Types marked
with * were given pictures, the others placeholder tokens alone: the method never sees the vision
tower. {len(_tested())} of them run every situation of the test matrix, too;
{len(_processed())} read pictures and chat templates through their own processors. A checkpoint may
differ from the defaults of its type: with the decoder of gpt-oss, whose attention has sinks, any of
them decodes dense, and a warning says so.

| transformers | types | {WORKS} | {DENSE} | {REFUSED} | {UNTRIED} |
|---|---|---|---|---|---|
{of_all}

| type | {names} |
|---|{"---|" * len(by_version)}
{rows}

## Why not

{reasons}

Made by `python tests/models/family_table.py`; a deep test tries all of them again.
"""


def _reasons(kind: str, by_version: dict[str, dict[str, Found]]) -> str:
    """Why a type does not work; with its version where versions differ."""
    rows = {version: found[kind] for version, found in by_version.items() if kind in found}
    texts = {version: one.because for version, one in rows.items() if one.outcome != WORKS}
    if len(texts) == len(rows) and len(set(texts.values())) == 1:
        return f"- `{kind}`: {next(iter(texts.values()))}"
    return "\n".join(f"- `{kind}` ({version}): {text}" for version, text in texts.items())


def _tested() -> tuple[str, ...]:
    from visionpulse.models.families import TESTED

    return TESTED


def _processed() -> tuple[str, ...]:
    return tuple(_module("processors").FAMILIES)


def _cell(found: Found | None) -> str:
    if found is None:
        return "no such type"
    mark = "*" if found.because == PICTURES else ""
    return f"works{mark}, {found.layers}" if found.outcome == WORKS else found.outcome


def _module(name: str) -> Any:
    """A module beside this file; tests have no package to import it from."""
    spec = importlib.util.spec_from_file_location(f"models_{name}", HERE / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", action="store_true", help="write the page alone")
    parser.add_argument("kinds", nargs="*", help="look at these, write nothing")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for kind in options.kinds:
        print(kind, look(kind))
    if not options.kinds and not options.page:
        import transformers

        found = {kind: asdict(look(kind)) for kind in kinds()}
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{transformers.__version__}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
    if not options.kinds:
        PAGE.write_text(page())


if __name__ == "__main__":
    main()
