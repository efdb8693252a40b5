"""Tiny random models of every family, and the prompts and pictures that go with them."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import copy
import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from visionpulse.testing.draw import Draws

transformers = pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parent))  # of modules that several files import


def _load(name):
    """A module beside this file; tests have no package to import it from."""
    spec = importlib.util.spec_from_file_location(
        f"models_{name}", Path(__file__).with_name(f"{name}.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_families = _load("families")
FAMILIES, IMAGE, START, END = (
    _families.FAMILIES, _families.IMAGE, _families.START, _families.END
)  # fmt: skip
PAD, SUPPRESSED = _families.PAD, _families.SUPPRESSED
Oracle = _load("oracle").Oracle


class Tiny:
    """A tiny random model whose tokens depend on its attention, and inputs for it."""

    def __init__(self, family, **changes):
        settings, self._pictures, self.picture_tokens = FAMILIES[family]
        kind = "llava" if family == "pixtral" else family
        settings = copy.deepcopy(settings)
        settings["text_config"].update(changes)
        config = transformers.AutoConfig.for_model(kind, **settings)
        self.family = family
        self.model = transformers.AutoModelForImageTextToText.from_config(config).eval()
        self.model.generation_config.pad_token_id = PAD
        draws = Draws(0)
        draws.refill(self.model, 0.02)
        # the default init hardly lets attention speak
        tied = family in ("gemma3", "paligemma", "aya_vision")
        draws.refill(self.model.get_decoder(), 0.2, embedding=0.05 if tied else 0.5)

    def inputs(self, *rows, seed=0):
        """Inputs of a batch; a row is a list of text lengths and "i" for pictures."""
        rows = rows or ([5, "i", 7],)
        draws = Draws(seed)
        lists, pictures = [], []
        for row in rows:
            ids = []
            for part in row:
                if part == "i":
                    ids += [START] + [IMAGE] * self.picture_tokens + [END]
                else:
                    ids += draws.integers(3, 140, part).tolist()
            lists.append(ids)
            pictures.append(row.count("i"))
        width = max(map(len, lists))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in lists])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in lists])
        inputs = {"input_ids": ids, "attention_mask": mask}
        if sum(pictures):
            inputs |= self._batch(draws, pictures)
        if self._pictures is _families._grid:
            inputs["mm_token_type_ids"] = (ids == IMAGE).int()
        if self.family in ("gemma3", "paligemma"):
            inputs["token_type_ids"] = (ids == IMAGE).long()
        return inputs

    def _batch(self, draws, pictures):
        if self.family not in ("smolvlm", "idefics3"):
            return self._pictures(draws, sum(pictures))
        pixels = torch.zeros(len(pictures), max(pictures), 3, 32, 32)  # zeros are no picture
        for row, n in enumerate(pictures):
            if n:
                pixels[row, :n] = self._pictures(draws, n)["pixel_values"]
        return {"pixel_values": pixels}

    def generate(self, inputs, tokens=8, **options):
        """The generated ids, without sampling unless asked."""
        options = {"do_sample": False, "max_new_tokens": tokens} | options
        return self.model.generate(**inputs, suppress_tokens=SUPPRESSED, **options)


def pytest_report_header():
    return f"transformers: {transformers.__version__} ({os.path.dirname(transformers.__file__)})"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def _tiny(family):
    return Tiny(family)


@pytest.fixture
def oracle():
    """Give the class of the oracle."""
    return Oracle


@pytest.fixture(params=FAMILIES)
def family(request):
    """Each family in turn."""
    return request.param


@pytest.fixture
def tiny():
    """Give the tiny model of a family, unpatched at the end."""
    import visionpulse as vp

    used = []

    def make(family, **changes):
        vlm = Tiny(family, **changes) if changes else _tiny(family)
        used.append(vlm.model)
        return vlm

    make.forget = used.clear
    yield make
    from visionpulse.models import session_of

    for model in used:
        if session_of(model) is not None:
            vp.unpatch(model)
