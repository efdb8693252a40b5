"""Every file of examples/ runs on a tiny model, with a stand-in for its processor."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import BatchFeature

from visionpulse.models import session_of

EXAMPLES = Path(__file__).parents[2] / "examples"


class Processor:
    """Makes prompts of the right shape from messages, as a processor would."""

    def __init__(self, tiny):
        self.tiny = tiny

    def apply_chat_template(self, messages, padding=False, padding_side=None, **options):
        assert options == {
            "add_generation_prompt": True,
            "tokenize": True,
            "return_dict": True,
            "return_tensors": "pt",
        }
        rows = messages if padding else [messages]
        assert not padding or padding_side == "left"
        parts = []
        for talk in rows:
            row = [4]
            for message in talk:
                for piece in message["content"]:
                    row.append("i" if piece["type"] != "text" else 3 + len(piece["text"]) % 7)
            parts.append(row)
        return BatchFeature(self.tiny.inputs(*parts))

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids.tolist()))


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parts(tiny):
    vlm = tiny("llava")
    before = vlm.model.generation_config.suppress_tokens
    vlm.model.generation_config.suppress_tokens = [150, 151, 152, 153]
    yield vlm, Processor(vlm)
    vlm.model.generation_config.suppress_tokens = before
    assert session_of(vlm.model) is None


def test_every_example_is_run_here():
    tested = {name[5:] for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested


def test_single_picture(parts, capsys):
    vlm, processor = parts
    out = load("single_picture").main(vlm.model, processor, "photo.jpg", tokens=6)
    assert out.shape[0] == 1
    assert "5 sparse decode steps" in capsys.readouterr().out


def test_batch(parts, capsys):
    vlm, processor = parts
    out = load("batch").main(vlm.model, processor, "one.jpg", "two.jpg", tokens=6)
    assert len(out) == 3
    assert "5 sparse decode steps" in capsys.readouterr().out


def test_video(parts):
    vlm, processor = parts
    pruned, dense = load("video").main(vlm.model, processor, "clip.mp4", tokens=6)
    assert pruned.shape == dense.shape


def test_multi_turn(parts, capsys):
    vlm, _ = parts

    class Growing(Processor):
        """A chat template renders the whole talk; its earlier turns must render alike."""

        def apply_chat_template(self, messages, **options):
            parts = {"user": ["i", 12], "assistant": [6]}
            row = [part for message in messages for part in parts[message["role"]]]
            return BatchFeature(self.tiny.inputs([4, *row]))

    answers = load("multi_turn").main(vlm.model, Growing(vlm), "a.jpg", "b.jpg", tokens=6)
    assert len(answers) == 2
    assert capsys.readouterr().out.count("5 sparse decode steps") == 2


def test_static_cache(parts):
    vlm, processor = parts
    outs = load("static_cache").main(
        vlm.model, processor, "photo.jpg", "One?", "And a longer one?",
        tokens=6, length=64, disable_compile=True,
    )  # fmt: skip
    assert len(outs) == 2


def test_trace_and_plot(parts, tmp_path):
    vlm, processor = parts
    trace = load("trace_and_plot").main(
        vlm.model, processor, "photo.jpg", folder=tmp_path, tokens=6
    )
    assert len(trace) == 5
    assert (tmp_path / "trace.npz").stat().st_size > 0
    assert (tmp_path / "trace.html").stat().st_size > 0
    assert torch.tensor(trace.ends[-1]) == len(trace.positions)
