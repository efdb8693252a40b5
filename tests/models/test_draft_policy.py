"""How many tokens are drafted, and by which schedule: what pays, from costs that are told."""

import pytest
import torch

import visionpulse as vp
from visionpulse.models.draft_policy import (
    FIRST,
    MOST,
    PLAIN,
    TRIES,
    DraftPolicy,
    ways_of,
)
from visionpulse.models.lossless import RunAhead
from visionpulse.models.stopwatch import Stopwatch


class Machine:
    """Tells a policy what rounds cost, and accepts each drafted token with one chance."""

    def __init__(self, accepts, step=0.1, check=1.0, more=0.0, seed=0):
        self.accepts, self.step, self.check, self.more = accepts, step, check, more
        self.policy = DraftPolicy(len(accepts))
        self.dice = torch.Generator().manual_seed(seed)

    def round(self):
        plan = self.policy.plan()
        drawn = torch.rand(max(plan.tokens, 1), generator=self.dice) < self.accepts[plan.way]
        accepted = int(drawn[: plan.tokens].long().cumprod(0).sum())
        self.policy.time(plan, plan.tokens * self.step, self.check + self.more * plan.tokens)
        self.policy.learn(plan, [(plan.tokens, accepted)])
        return plan

    def last(self, rounds=300):
        return [self.round() for _ in range(rounds)][-20:]


def test_each_way_is_tried_first_then_a_plain_step():
    machine = Machine([0.9, 0.5, 0.9])
    plans = [machine.round() for _ in range(3 * TRIES + 1)]
    assert [plan.way for plan in plans[:-1]] == [0, 1, 2] * TRIES
    assert {plan.tokens for plan in plans[:-1]} == {FIRST} and plans[-1].tokens == 0


@pytest.mark.parametrize("right", range(3))
def test_it_stays_with_the_way_that_is_accepted(right):
    accepts = [0.3, 0.3, 0.3]
    accepts[right] = 0.97
    assert {plan.way for plan in Machine(accepts).last()} == {right}


def test_it_drafts_more_where_more_is_accepted_and_drafts_are_cheap():
    few = Machine([0.5]).last()[-1].tokens
    many = Machine([0.98]).last()[-1].tokens
    dear = Machine([0.98], step=0.7).last()[-1].tokens
    assert 1 <= few < many <= MOST and dear < many


def test_where_nothing_pays_it_is_dense_and_comes_back():
    machine = Machine([0.1], step=0.8, more=0.3)
    plans = [machine.round() for _ in range(3000)]
    drafts = [i for i, plan in enumerate(plans) if plan.tokens]
    assert len(drafts) < 40  # of 3000 steps, most of them at the beginning
    assert drafts[-1] - drafts[-2] > 2 * PLAIN  # it waits longer each time
    machine.accepts, machine.step, machine.more = [1.0], 0.01, 0.0
    assert all(plan.tokens for plan in machine.last(3000))


def test_rows_of_a_batch_count_alike():
    one, two = DraftPolicy(1), DraftPolicy(1)
    plan = one.plan()
    one.learn(plan, [(4, 2)])
    two.learn(plan, [(4, 2)] * 8)
    assert one.about() == two.about()
    two.learn(plan, [])
    assert one.about() == two.about()


def test_what_is_tried_is_what_the_setting_leaves_open():
    base = vp.PulseConfig()
    ways = ways_of(base, (2,), (0, 1, 2, 3, 4))
    assert [(way.schedule, way.anchor) for way in ways] == [
        ("lookback", 2), ("lookback", 1), ("paper", (2, 4)), ("paper", None),
    ]  # fmt: skip
    asked = base.updated(schedule="lookback", anchor=2)
    assert ways_of(asked, (2,), (0, 1, 2, 3, 4)) == [asked]
    assert ways_of(base, (0,), (0,)) == [
        base.updated(schedule="lookback", refresh=0, anchor=0),
        base,
    ]


def test_a_stopwatch_tells_at_once_on_a_cpu():
    told, watch, cpu = [], Stopwatch(), torch.device("cpu")
    watch.add([watch.mark(cpu) for _ in range(3)], lambda *seconds: told.append(seconds))
    assert len(told) == 1 and min(told[0]) >= 0


SUPPRESSED = [150, 151, 152, 153]


def costs(monkeypatch, step, check):
    """Rounds cost this much, whatever the clock says."""

    def time(self, plan, marks):
        self.policy.time(plan, plan.tokens * step, check)

    monkeypatch.setattr(RunAhead, "time", time)


def generated(call, vlm, rows, **options):
    torch.manual_seed(3)
    options = {"max_new_tokens": 60, "do_sample": False, "suppress_tokens": SUPPRESSED} | options
    return call(**vlm.inputs(*rows), **options)


ONE, FOUR = ([9, "i", 6, "i", 3],), ([9, "i", 6], [3, "i", 2], [20, "i", 6, "i", 3], [4, "i", 9])


@pytest.mark.parametrize("sampled", (False, True))
@pytest.mark.parametrize("rows", (ONE, FOUR), ids=("one", "four"))
@pytest.mark.parametrize("step", (0.01, 2.0))
def test_an_automatic_session_says_what_the_unpatched_model_says(
    tiny, monkeypatch, step, rows, sampled
):
    """Where drafting pays and where it does not."""
    vlm = tiny("llava")
    wanted = generated(vlm.model.generate, vlm, rows, do_sample=sampled)
    costs(monkeypatch, step, 1.0)
    config = vp.PulseConfig(ratio=(1.0, 1.0))
    with vp.patch(vlm.model, config, lossless=True, draft="auto") as session:
        assert torch.equal(generated(session.generate, vlm, rows, do_sample=sampled), wanted)
        stats = session.stats
        ways = {tuple(roles.anchors) for roles in session._ahead.ways}
    assert ways == {(1,), (2,), (2, 4)} and stats.drafted
    if step > 1:  # the tries alone draft
        assert stats.drafted <= (4 * TRIES + 1) * FIRST * len(rows)
        assert len(rows) > 1 or sum(stats.dense.values()) + stats.checks == 59 - stats.accepted
    else:
        assert stats.tokens_per_check > 5


def test_an_update_begins_anew(tiny):
    vlm = tiny("llava")
    with vp.patch(vlm.model, lossless=True) as session:
        assert session.draft == "auto"
        generated(session.generate, vlm, ONE)
        first = session._ahead.policy
        session.update(schedule="lookback")
        generated(session.generate, vlm, ONE)
        assert session._ahead.policy is not first and len(session._ahead.ways) == 1
