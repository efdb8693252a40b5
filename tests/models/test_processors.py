"""Pictures and conversations as a user has them, through each family's own processor."""

import importlib.util
from pathlib import Path

import pytest
import torch

import visionpulse as vp

_path = Path(__file__).with_name("processors.py")
_spec = importlib.util.spec_from_file_location("models_processors", _path)
processors = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(processors)

TOKENS = 8
SUPPRESSED = [processors.IMAGE, processors.VIDEO, processors.START, processors.END]


@pytest.fixture(scope="module", params=processors.FAMILIES)
def prepared(request):
    """A family's name, and the inputs of two conversations: one picture, and two."""
    family = processors.FAMILIES[request.param]
    wide, tall = processors.WIDE, processors.TALL
    inputs = processors.processor(family).apply_chat_template(
        [processors.conversation(wide), processors.conversation(wide, tall)],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    return request.param, dict(inputs)


def picture_slots(kind, inputs):
    """The slots of each row that hold the processor's token of a picture."""
    family = processors.FAMILIES[kind]
    token = processors.words(family).index(family.token)
    return [torch.nonzero(row == token).flatten().tolist() for row in inputs["input_ids"]]


@pytest.mark.deep
def test_a_processor_writes_as_many_tokens_as_its_pictures_have(prepared):
    kind, inputs = prepared
    one, first, second = processors.FAMILIES[kind].counts
    assert [len(slots) for slots in picture_slots(kind, inputs)] == [one, first + second]
    assert inputs["attention_mask"][0, 0] == 0  # the shorter one is padded on the left


@pytest.mark.deep
def test_the_visual_tokens_of_a_patched_model_are_those_of_the_processor(prepared, tiny):
    kind, inputs = prepared
    vlm, slots = tiny(kind), picture_slots(kind, inputs)
    with vp.patch(vlm.model, tau=0.5, ratio=(0.05, 0.4), record=True) as session:
        vlm.generate(inputs, TOKENS)
        trace = session.trace
    for row, expected in enumerate(slots):
        spans = trace.spans[0, row]
        assert [at for begin, end in spans for at in range(begin, end)] == expected
    for kept in trace:
        assert set(kept.kept.tolist()) < set(slots[kept.row]) and kept.n_visual == len(
            slots[kept.row]
        )


@pytest.mark.deep
def test_steps_are_sparse_and_with_everything_kept_the_answer_is_the_models_own(prepared, tiny):
    kind, inputs = prepared
    vlm = tiny(kind)
    own = vlm.generate(inputs, TOKENS)
    with vp.patch(vlm.model, ratio=(1.0, 1.0)) as session:
        assert torch.equal(vlm.generate(inputs, TOKENS), own)
        assert session.stats.retention.min == pytest.approx(1.0)
        assert session.stats.steps == TOKENS - 1
    with vp.patch(vlm.model, tau=0.5, ratio=(0.05, 0.4)) as session:
        vlm.generate(inputs, TOKENS)
        assert session.stats.steps == TOKENS - 1 and session.stats.retention.max < 0.5
        assert not session.stats.dense
    assert torch.equal(vlm.generate(inputs, TOKENS), own)


@pytest.mark.deep
def test_a_pipeline_prunes_when_the_model_inside_is_patched(tiny):
    from transformers import pipeline

    vlm, family = tiny("qwen3_vl"), processors.FAMILIES["qwen3_vl"]
    pipe = pipeline("image-text-to-text", model=vlm.model, processor=processors.processor(family))
    asked = processors.conversation(processors.WIDE, processors.TALL)

    def answer():
        options = {"max_new_tokens": TOKENS, "do_sample": False, "suppress_tokens": SUPPRESSED}
        return pipe(text=asked, generate_kwargs=options, return_full_text=False)

    own = answer()
    with pytest.raises(vp.UnsupportedModelError, match=r"pass its \.model"):
        vp.patch(pipe)
    with vp.patch(pipe.model, ratio=(1.0, 1.0)):
        assert answer() == own
    with vp.patch(pipe.model, tau=0.5, ratio=(0.05, 0.4)) as session:
        answer()
        assert session.stats.steps == TOKENS - 1 and session.stats.retention.max < 0.5
    assert answer() == own
