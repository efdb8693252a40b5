"""What a worker counts: sums that no step waits for."""

import threading
import time

import torch

import visionpulse as vp
from visionpulse.serving.stats import AT_ONCE, MASS, RETENTION, Counters, Publisher, Totals


def kept(counts, mass):
    counts = torch.tensor(counts, dtype=torch.int32)
    mass = torch.tensor(mass)
    return vp.Selection(torch.zeros(len(counts), 40, dtype=torch.int32), counts, mass, mass)


VISUAL = vp.VisualTokens.from_spans([[(0, 400)], [], [(3, 53), (60, 110)]])


def test_what_anchors_kept_is_summed_over_the_rows_that_have_visual_tokens():
    stats = Counters()
    stats.selected(kept([20, 0, 1], [0.4, 0.0, 0.005]), VISUAL)
    stats.selected(kept([400, 0, 2], [2.0, 0.0, float("nan")]), VISUAL)
    totals = stats.totals()
    assert (totals.visual, totals.kept) == (1000, 423)
    by_edge = dict(zip((*RETENTION, "above"), totals.retention.counts, strict=True))
    assert {edge: n for edge, n in by_edge.items() if n} == {0.05: 1, 0.01: 1, 1.0: 1, 0.02: 1}
    assert abs(totals.retention.sum - 1.08) < 1e-6
    by_edge = dict(zip((*MASS, "above"), totals.mass.counts, strict=True))
    assert {edge: n for edge, n in by_edge.items() if n} == {0.4: 1, 0.01: 2, "above": 1}


def test_rows_are_counted_by_the_reason_for_which_they_stayed_dense():
    stats = Counters()
    stats.step(3, {"no visual tokens": 1})
    stats.step(0, {"no visual tokens": 2, "opted out": 1, "none": 0})
    totals = stats.totals()
    assert totals.sparse_rows == 3
    assert totals.dense_rows == {"no visual tokens": 3, "opted out": 1}
    assert Counters().totals() == Totals()


def test_a_pipeline_stage_may_leave_the_rows_to_another():
    stats = Counters()
    stats.counts_rows = False
    stats.step(3, {"opted out": 1})
    stats.selected(kept([20, 0, 1], [0.4, 0.0, 0.005]), VISUAL)
    totals = stats.totals()
    assert (totals.sparse_rows, dict(totals.dense_rows), totals.kept) == (0, {}, 21)
    assert stats.steps == 1  # so that it is published


def test_a_step_in_inference_mode_adds_to_the_same_sums():
    stats = Counters()
    for _ in range(2):
        with torch.inference_mode():
            stats.selected(kept([20, 0, 1], [0.4, 0.0, 0.005]), VISUAL)
    assert stats.totals().kept == 42


def test_none_is_lost_of_many_selections_while_a_thread_reads_them():
    stats, ends = Counters(), threading.Event()

    def read():
        while not ends.is_set():
            stats.totals()

    reader = threading.Thread(target=read)
    reader.start()
    steps = 5 * AT_ONCE + 7
    for _ in range(steps):
        stats.selected(kept([20, 0, 1], [0.4, 0.0, 0.005]), VISUAL)
    ends.set()
    reader.join()
    totals = stats.totals()
    assert (totals.visual, totals.kept) == (500 * steps, 21 * steps)
    assert sum(totals.mass.counts) == 2 * steps


def test_totals_are_published_when_a_step_has_run_and_offered_again_until_they_are_taken():
    stats, got, came = Counters(), [], threading.Event()

    def take(totals):
        got.append(totals.sparse_rows)
        came.set()
        return len(got) > 1  # nobody reads the first

    publisher = Publisher(stats, take, period=0.001)
    stats.step(5, {})
    deadline = time.monotonic() + 60
    while len(got) < 2 and time.monotonic() < deadline:
        came.wait(0.01)
    publisher.close()
    assert got == [5, 5]
