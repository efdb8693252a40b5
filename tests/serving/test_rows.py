"""The visual tokens of batches whose rows come and go, and what each request kept."""

import random

import pytest
import torch

from visionpulse import Selection, VisualTokens
from visionpulse.serving.cores import bound_cores
from visionpulse.serving.lookback import Kept
from visionpulse.serving.rows import RequestRow, Requests, SpanTable, spans_of


def same(made, expected):
    size = expected.size
    assert torch.equal(made.mask(size), expected.mask(size))
    assert torch.equal(made.counts, expected.counts) and made.size == size
    assert made.max_count == expected.max_count
    runs = expected.spans.shape[1]
    assert torch.equal(made.offsets[:, : runs + 1], expected.offsets)


def test_runs_are_sorted_and_joined_where_they_touch():
    assert spans_of([(8, 9), (1, 3), (3, 5)]) == ((1, 5), (8, 9))
    assert spans_of([]) == ()


def test_rows_of_requests_go_when_the_engine_has_them_no_longer():
    """Their keys hold pictures: remembered longer, memory would grow with every request."""
    requests, present = Requests(), {}
    for number in range(100):
        name, pictures = f"r{number}", [number]
        present = {name: pictures, f"r{number - 1}": []}
        requests.forget_all_but(present)
        assert requests.get(name, pictures) is None
        row = requests.put(pictures, RequestRow(name, ((0, 4),)))
        assert requests.get(name, pictures) is row
        assert requests.get(name, [number]) is None  # another request of this name
        assert len(requests) <= 1 + len(present)


def test_a_table_says_what_fresh_visual_tokens_say_as_rows_come_and_go():
    draw = random.Random(3)
    table = SpanTable(6, max_runs=1)
    for _ in range(60):
        rows = []
        for _ in range(draw.randint(1, 6)):
            edges = sorted(draw.sample(range(200), 2 * draw.randint(0, 5)))
            rows.append(tuple(zip(edges[::2], edges[1::2], strict=True)))
        made = table.load(rows)
        assert (made is None) == (not any(rows))
        if made is not None:
            same(made, VisualTokens.from_spans(rows))
            assert table.load(list(rows)) is made


def test_a_fixed_table_says_which_requests_fit():
    table = SpanTable(2, max_runs=2, fixed=True)
    assert table.fits(((0, 1), (2, 3))) and not table.fits(((0, 1), (2, 3), (4, 5)))


def selection(*counts):
    indices = torch.arange(4, dtype=torch.int32).repeat(len(counts), 1)
    indices += 10 * torch.arange(len(counts), dtype=torch.int32)[:, None]
    mass = torch.zeros(len(counts))
    return Selection(indices, torch.tensor(counts, dtype=torch.int32), mass, mass, trusted=True)


def step(kept, requests, lengths, *counts):
    """One step: who follows, and what; then the anchor selects."""
    follows = kept.follows(requests, lengths)
    found = kept.selection(requests, follows)
    kept.keep(requests, lengths, selection(*counts))
    return follows, found


def test_the_first_step_and_every_refresh_are_dense():
    kept = Kept(refresh=3)
    seen = [step(kept, ["a"], [10 + i], 2)[0][0] for i in range(7)]
    assert seen == [False, True, True, False, True, True, False]
    never = Kept(refresh=0)
    assert [step(never, ["a"], [10 + i], 2)[0][0] for i in range(9)] == [False] + [True] * 8


def test_rows_follow_their_request_when_the_batch_changes():
    kept = Kept(refresh=0)
    step(kept, ["a", "b"], [5, 9], 1, 2)
    follows, found = step(kept, ["b", "c", "a"], [10, 3, 6], 1, 1, 1)
    assert follows == [True, False, True]
    assert found.counts.tolist() == [2, 0, 1]  # c is dense: it kept nothing
    assert found.indices[0].tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize("lengths", ([7], [4], [5]))
def test_a_length_that_did_not_grow_by_one_tells_of_another_prefill(lengths):
    kept = Kept(refresh=0)
    step(kept, ["a"], [5], 1)
    assert kept.follows(["a"], lengths) == [False]
    assert kept.follows(["a"], [6]) == [True]


def test_a_steady_batch_copies_nothing():
    kept = Kept(refresh=0)
    first = selection(1, 2)
    kept.keep(["a", "b"], [5, 9], first)
    assert kept.selection(["a", "b"], [True, True]) is first


def test_the_cores_of_bound_threads_are_those_of_the_worker(tmp_path):
    for thread, cores in {"1": "4", "2": "6", "3": "4", "4": "0-7"}.items():
        (tmp_path / thread).mkdir()
        status = f"Name:\tx\nCpus_allowed:\tff\nCpus_allowed_list:\t{cores}\n"
        (tmp_path / thread / "status").write_text(status)
    assert bound_cores(tmp_path) == {4, 6}
