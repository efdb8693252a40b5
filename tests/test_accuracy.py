"""The glyph trail, its shipped model, and how answers are counted."""

import contextlib
import importlib.util
import sys
from itertools import pairwise
from pathlib import Path

import methods
import numpy as np
import pytest
import torch

import visionpulse as vp
from visionpulse.data import tiny, trail
from visionpulse.testing.draw import Draws

ACCURACY = Path(__file__).resolve().parent.parent / "benchmarks" / "accuracy"


def script(name):
    """A module of benchmarks/accuracy, which is a folder of scripts."""
    sys.path.insert(0, str(ACCURACY))
    try:
        spec = importlib.util.spec_from_file_location(f"accuracy_{name}", ACCURACY / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ACCURACY))
        others = ("measure", "rows", "model", "table", "correlate", "claims", "float8")
        for other in (*others, "acceptance", "lossless"):
            sys.modules.pop(other, None)


@pytest.fixture(scope="module")
def measure():
    pytest.importorskip("transformers")
    return script("measure")


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("transformers")
    return tiny.load()


def solve(cells, prompt):
    """The answer, from what is drawn alone: cells [n, 4], and the question."""
    colour, glyph = prompt[1] - trail.COLOUR, prompt[2] - trail.GLYPH
    said, total = [], 0
    while True:
        copies = cells[(cells[:, 0] == colour) & (cells[:, 1] == glyph)]
        assert len(copies) and (copies[:, 2] == copies[0, 2]).all()
        marks = set(copies[:, 3].tolist())
        total = (total + len(marks)) % 10
        last = copies[0, 2] == trail.GLYPHS
        then = trail.STOP if last else trail.GLYPH + int(copies[0, 2])
        mask = sum(1 << mark for mark in marks)
        said += [trail.HAS, trail.MARKSET + mask, trail.SUM, trail.DIGIT + total, trail.TO, then]
        if last:
            return [*said, trail.ANSWER, trail.DIGIT + total, trail.END]
        glyph = int(copies[0, 2])


@pytest.mark.parametrize("crowd", trail.CROWDS)
def test_the_picture_holds_the_answer_and_needs_are_what_it_reads(crowd):
    for picture, question in trail.test_set(3, 20, 20, crowd):
        assert solve(picture.cells, question.prompt) == question.answer
        assert len(question.kinds) == len(question.needs) == len(question.answer)
        for token, kind, needs in zip(question.answer, question.kinds, question.needs, strict=True):
            assert (len(needs) > 0) == (kind in ("marks", "next"))
            if kind != "marks":
                continue
            # every mark of the set is on the cells that are needed, and no other is
            marks = set(picture.cells[needs, 3].tolist())
            assert token == trail.MARKSET + sum(1 << mark for mark in marks)


def test_steps_need_from_one_to_twenty_tokens_that_differ():
    sizes, moves = set(), 0
    for _, question in trail.test_set(5, 60, 20, "crowded"):
        needs = [
            tuple(n) for n, k in zip(question.needs, question.kinds, strict=True) if k == "marks"
        ]
        sizes |= {len(n) for n in needs}
        moves += sum(not set(a) & set(b) for a, b in pairwise(needs))
    assert sizes == set(range(1, 21))
    assert moves > 60


def test_pictures_of_another_seed_are_other_pictures():
    def drawn(seed):
        return {p.cells.tobytes() for p, _ in trail.test_set(seed, 30, 20, "crowded")}

    assert len(drawn(1)) == 30 and not drawn(1) & drawn(2)
    assert drawn(1) == drawn(1)


def test_training_draws_from_other_streams(measure):
    train, table = script("train"), script("table")
    trainer = train.Trainer(0, 10, 5, 0.05)
    pictures, tokens, labels = train.batch_of(trainer.rng, train.STAGES[-1])
    tested = {p.cells.tobytes() for p, _ in trail.test_set(table.SEED, 50, 20, "crowded")}
    assert not tested & {p.cells.tobytes() for p in pictures}
    for b, r in ((0, 0), (4, 4)):
        text = [t for t in tokens[b, r].tolist() if t != trail.PAD]
        assert solve_part(pictures[b].cells, text)
        # the label of a position is the token that follows it
        asked = labels[b, r] >= 0
        assert labels[b, r][asked].tolist() == text[3:]
        assert asked.nonzero()[0] == 2


def solve_part(cells, text):
    return solve(cells, text[:3]) == text[3:]


def test_packed_attention_is_a_masked_softmax(measure):
    train = script("train")
    packed = train.Packed()
    packed.aim(4)
    n, length = packed.before, train.LENGTH
    size = n + train.QUESTIONS * length
    draws = Draws(0)
    q = draws.normal(2, 4, size, 16)
    k, v = draws.normal(2, 2, size, 16), draws.normal(2, 2, size, 16)

    class Layer:
        layer_idx = 0

    out, _ = packed(Layer(), q, k, v, None, scaling=0.25)
    seen = torch.zeros(size, size, dtype=torch.bool)
    seen[:n, :n] = torch.ones(n, n).tril().bool()
    for begin in range(n, size, length):
        seen[begin : begin + length, :n] = True
        own = torch.ones(length, length).tril().bool()
        seen[begin : begin + length, begin : begin + length] = own
    wide_k, wide_v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    share = (0.25 * q @ wide_k.transpose(2, 3)).masked_fill(~seen, -torch.inf).softmax(-1)
    torch.testing.assert_close(out, (share @ wide_v).transpose(1, 2))
    mass = share[:, :, n:, trail.FIRST_CELL : n - 1].sum(-1)
    torch.testing.assert_close(packed.masses[0].flatten(1, 2), mass)


def test_a_training_step_changes_every_weight_and_can_go_on(measure, tmp_path):
    train = script("train")
    trainer = train.Trainer(0, 4, 2, 0.05)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    first = trainer.step(0)
    assert first["side"] == 4 and np.isfinite(list(first.values())).all()
    same = [n for n, p in trainer.model.named_parameters() if torch.equal(p, before[n])]
    assert not same
    trainer.save(tmp_path, 1)
    other = train.Trainer(1, 4, 2, 0.05)
    assert other.resume(tmp_path) == 1
    assert other.step(1) == trainer.step(1)
    layers = tiny.load(tmp_path).config.text_config.num_hidden_layers
    assert layers == script("model").LAYERS


def test_hops_count_up_to_the_first_wrong_token(measure):
    answer = list(range(6 * 3 + 3))
    assert measure.hops_right(answer, answer) == (3, 3)
    assert measure.hops_right([*answer[:11], 99, *answer[12:]], answer) == (1, 3)
    assert measure.hops_right(answer[:12], answer) == (2, 3)
    assert measure.hops_right([99], answer) == (0, 3)


def test_wilson_is_the_known_interval(measure):
    # from the formula's textbook case: 9 of 10 gives 59.6 % to 98.2 %
    low, high = measure.wilson(9, 10)
    assert (round(low, 3), round(high, 3)) == (0.596, 0.982)
    assert measure.wilson(0, 5)[0] == 0.0 and measure.wilson(5, 5)[1] == 1.0


def test_one_prefill_serves_several_settings(measure, model):
    """Answers from a copied cache are those of a generate() of its own."""
    drawn = trail.test_set(21, 5, tiny.SIDE, "crowded")
    settings = {
        "full": None,
        "5pct": vp.PRESETS["5pct"],
        "one": vp.PulseConfig(budget=vp.TopK(1)),
        "lookback": vp.PRESETS["5pct"].updated(schedule="lookback"),
        "full again": None,
    }
    made, given = measure.answer(model, drawn, settings), tiny.inputs_of(drawn)
    for name, config in settings.items():
        with contextlib.ExitStack() as stack:
            if config is not None:
                stack.enter_context(vp.patch(model, config))
            out = model.generate(**given, do_sample=False, max_new_tokens=measure.MOST_TOKENS)
        alone = [tiny.until_end(row) for row in out[:, given["input_ids"].shape[1] :].tolist()]
        assert made[name].tokens == alone, name
    assert made["one"].tokens != made["full"].tokens


def test_retention_counts_the_steps_of_the_answer_alone(measure, model):
    """Rows of a batch end at different steps; what a finished row does is not counted."""
    drawn = trail.test_set(21, 6, tiny.SIDE, "crowded")
    settings = {
        "eleven": vp.PulseConfig(budget=vp.TopK(11)),
        "fastv": lambda: methods.FastV(0.1),
        "full": None,
    }
    made = measure.answer(model, drawn, settings)
    eleven = made["eleven"]
    assert len({len(said) for said in eleven.tokens}) > 1
    for said, shares in zip(eleven.tokens, eleven.shares, strict=True):
        assert len(shares) == len(said) - 1
        assert set(shares) == {11 / 400}
    kept = {share for shares in made["fastv"].shares for share in shares}
    assert kept == {float(np.float32(0.1))}
    assert measure.summary([q for _, q in drawn], made["full"])["retention"] is None


def test_rows_measured_anew_take_the_places_of_the_old(measure):
    def row(name, n):
        return {"bench": "accuracy", "set": "crowded", "name": name, "n": n}

    table, run = script("table"), {"bench": "accuracy-training", "seconds": 1}
    old, new = [row("a", 1), row("b", 1), run], [row("b", 2), row("c", 2), run | {"seconds": 2}]
    assert table.merged(old, new) == [
        row("a", 1), row("b", 2), run | {"seconds": 2}, row("c", 2)
    ]  # fmt: skip


def test_a_table_of_other_weights_says_how_they_were_trained(measure, tmp_path):
    train, table = script("train"), script("table")
    assert table.training(tmp_path) == []
    with pytest.MonkeyPatch.context() as patch:
        options = ["--out", str(tmp_path), "--seed", "7", "--steps", "1", "--decay-from", "1"]
        patch.setattr(sys, "argv", ["train.py", *options])
        train.main()
    (row,) = table.training(tmp_path)
    assert (row["bench"], row["seed"], row["steps"]) == ("accuracy-training", 7, 1)
    assert row["resumed"] is False and row["seconds"] >= 0


def test_the_table_says_what_was_lost_and_won_on_the_same_pictures(measure):
    table = script("table")
    common = {
        "bench": "accuracy", "set": "crowded", "visual_tokens": 400, "length_wanted": 20.0,
        "exact": 0.5, "exact_low": 0.4, "exact_high": 0.6, "hops": 0.5, "length": 21.0,
        "step_ms_p50": 3.0,
    }  # fmt: skip
    full = common | {"name": "full attention", "n": 5, "right": "11010", "retention": None}
    other = common | {"name": "other", "n": 3, "right": "101", "retention": 0.0225}
    lines = table.printed([full, other]).splitlines()
    assert lines[-1] == "| other | 3 | 50.0 (40.0..60.0) | 50.0 | 21.0 | 2.25 | 3.0 | -1 +1 |"
    assert lines[-2].endswith("|  |")


def test_the_tables_of_the_pages_are_the_committed_rows(measure):
    write = script("write_docs")
    pages = "".join(page.read_text() for page in write.PAGES)
    assert write.filled(pages) == pages
    assert all(f"<!-- {mark} -->" in pages for mark in write.PARTS)
    digest = script("table").about(tiny.FOLDER)["weights"]
    for files, _ in write.PARTS.values():
        for file in files[:1]:  # a table of arithmetic has none
            assert f'"weights": "{digest}"' in (write.RESULTS / file).read_text()


def test_reuse_is_counted_on_the_right_part_of_answers(measure, model):
    walk = script("reuse")
    drawn = trail.test_set(21, 4, tiny.SIDE, "crowded")
    walked = walk.walk(model, drawn, vp.PRESETS["5pct"])
    rows = {row["kind"]: row for row in walk.rows_of("5pct", "crowded", [walked])}
    asked = sum(len(question.answer) for _, question in drawn)
    # the first token comes from prefill; a row's first step has none before it
    assert 0 < rows["all"]["steps"] <= asked - 2 * len(drawn)
    assert rows["all"]["steps"] == sum(rows[kind]["steps"] for kind in walk.KINDS)
    assert rows["marks"]["kept"] > rows["sum"]["kept"]
    for row in rows.values():
        assert row["hits"] == sorted(row["hits"])  # a larger cache holds what a smaller one holds


def test_the_weights_are_small_and_only_read_when_asked():
    files = list(tiny.FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) <= 5e6
    assert (tiny.FOLDER / "model.safetensors").exists()


@pytest.mark.parametrize("pictures", (8, pytest.param(60, marks=pytest.mark.deep)))
def test_the_claims_hold_on_a_sample(measure, model, pictures):
    """The table in small: full and dynamic read the picture, static choices do not."""
    drawn = trail.test_set(77, pictures, tiny.SIDE, "crowded")

    settings = {
        "full": None,
        "5pct": vp.PRESETS["5pct"],
        "fastv": lambda: methods.FastV(0.1),
        "lookm": lambda: methods.LookM(0.1),
        "visionzip": lambda: methods.VisionZip(0.1),
        "blind": methods.Blind,
    }
    made = measure.answer(model, drawn, settings)
    questions = [question for _, question in drawn]
    exact = {n: measure.summary(questions, found)["exact"] for n, found in made.items()}
    assert exact["full"] > 0.9 and exact["5pct"] >= exact["full"] - 0.05
    for static in ("fastv", "lookm", "visionzip"):
        assert exact[static] < exact["full"] - 0.3, static
    assert exact["blind"] < 0.05


def kept(*rows):
    """A trace of one row and layer, from the tokens that each step kept."""
    n, positions = len(rows), [token for row in rows for token in row]
    return vp.Trace(
        conversation=np.zeros(n, np.int64), step=np.arange(n), layer=np.full(n, 2),
        row=np.zeros(n, np.int64), token=np.arange(n), n_visual=np.full(n, 12),
        mass=np.full(n, 0.5), mass_mean=np.full(n, 0.2), ends=np.cumsum([len(r) for r in rows]),
        positions=np.array(positions), spans={(0, 0): [(0, 12)]}, about={},
    )  # fmt: skip


def test_selections_are_compared_as_long_as_both_runs_say_the_same():
    pytest.importorskip("transformers")
    traces = kept([1, 2], [3, 4], [5, 6]), kept([1, 2], [3, 9], [5, 6])
    overlaps = script("float8").overlaps
    assert overlaps(traces, ([[7, 8, 9, 4]], [[7, 8, 9, 4]])) == [1.0, 0.5, 1.0]
    assert overlaps(traces, ([[7, 8, 9, 4]], [[7, 8, 1, 4]])) == [1.0, 0.5]
    assert overlaps(traces, ([[7]], [[7]])) == [1.0]  # steps behind the end of an answer
    shorter = kept([1, 2], [3, 4], [5, 6]), kept([1, 2], [3, 9])  # its whole batch ended there
    assert overlaps(shorter, ([[7, 8, 9]], [[7, 8, 9]])) == [1.0, 0.5]


def test_larger_logits_are_taken_back(model):
    before = [weight.clone() for weight in model.parameters()]
    with script("float8").larger_logits(model, 16):
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for a, b in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, b)  # the factor's root is a power of two
