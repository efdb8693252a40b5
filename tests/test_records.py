"""Visual sets from masks, spans and ids; caches and their views; workspaces."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visionpulse as vp
from visionpulse.visual import NO_SPAN

masks = st.integers(1, 3).flatmap(
    lambda rows: st.integers(1, 30).flatmap(
        lambda n: st.lists(
            st.lists(st.booleans(), min_size=n, max_size=n), min_size=rows, max_size=rows
        )
    )
)


@settings(max_examples=200, deadline=None)
@given(rows=masks, extra=st.sampled_from([None, 0, 5]))
def test_a_mask_comes_back_as_it_was(rows, extra):
    mask = torch.tensor(rows)
    capacity = None if extra is None else max(1, int(mask.sum(1).max()) + extra)
    visual = vp.VisualTokens.from_mask(mask, capacity)
    assert torch.equal(visual.mask(mask.shape[1]), mask)
    assert torch.equal(visual.mask(mask.shape[1] + 4)[:, -4:], torch.zeros(len(rows), 4).bool())
    assert torch.equal(visual.counts, mask.sum(1).int())
    assert visual.max_count == (capacity or int(mask.sum(1).max()))
    assert visual.size == mask.shape[1]
    begins, ends = visual.spans.unbind(2)
    real = begins != NO_SPAN
    assert (begins.diff(dim=1)[real[:, 1:]] > 0).all() and (ends > begins)[real].all()
    assert (begins[:, 1:] > ends[:, :-1])[real[:, 1:]].all(), "runs must be maximal"
    assert torch.equal(visual.offsets[:, 1:], (ends - begins).cumsum(1).int())


def test_spans_masks_and_ids_agree():
    spans = [[(7, 9), (2, 5), (5, 6)], []]
    ids = torch.zeros(2, 12, dtype=torch.long)
    ids[0, [2, 3, 4, 5]] = 77
    ids[0, [7, 8]] = 78
    sets = (
        vp.VisualTokens.from_spans(spans),
        vp.VisualTokens.from_ids(ids, [77, 78]),
        vp.VisualTokens.from_mask(ids > 0),
    )
    for visual in sets:
        assert torch.equal(visual.mask(12), ids > 0)
        assert visual.spans.tolist() == [[[2, 6], [7, 9]], [[NO_SPAN] * 2] * 2]
    assert [visual.size for visual in sets] == [9, 12, 12]


def test_a_capacity_fixes_every_shape():
    a = vp.VisualTokens.from_spans([[(0, 9)]], capacity=20)
    b = vp.VisualTokens.from_mask(torch.arange(40)[None] % 2 == 0, capacity=20)
    assert a.spans.shape == b.spans.shape == (1, 20, 2)
    assert a.offsets.shape == b.offsets.shape and a.max_count == b.max_count == 20


def test_visible_counts_cut_the_set():
    visual = vp.VisualTokens.from_spans([[(2, 10), (20, 30)], [(0, 40)]])
    starts = torch.tensor([4, 0], dtype=torch.int32)
    lengths = torch.tensor([25, 40], dtype=torch.int32)
    assert visual.visible_counts(40, None, None, 0).tolist() == [18, 40]
    assert visual.visible_counts(40, starts, lengths, 0).tolist() == [11, 40]
    assert visual.visible_counts(40, starts, lengths, 6).tolist() == [5, 6]


def test_records_are_frozen():
    visual = vp.VisualTokens.from_spans([[(0, 3)]])
    kv = vp.KVCache(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8))
    for thing, field in ((visual, "max_count"), (kv, "k")):
        with pytest.raises(AttributeError):
            setattr(thing, field, 1)
    assert "cpu" in repr(visual) and visual.to("cpu") is visual


def test_paged_layouts_share_one_reading():
    nhd = torch.zeros(5, 16, 2, 8)
    table = torch.zeros(3, 2, dtype=torch.int32)
    lengths = torch.zeros(3, dtype=torch.int32)
    a = vp.PagedKVCache(nhd, nhd, table, lengths)
    hnd = nhd.transpose(1, 2)
    b = vp.PagedKVCache(hnd, hnd, table, lengths, layout="HND")
    for kv in (a, b):
        sizes = (kv.batch, kv.kv_heads, kv.capacity, kv.head_dim, kv.page_size)
        assert sizes == (3, 2, 32, 8, 16)
        assert kv.k_strides == kv.v_strides == (256, 8, 16)


def test_page_ids_that_no_key_needs_may_be_anything():
    pages = torch.zeros(3, 4, 1, 8)
    table = torch.tensor([[-1, 2, 99]], dtype=torch.int32)
    seven, four = (torch.tensor([n], dtype=torch.int32) for n in (7, 4))
    vp.PagedKVCache(pages, pages, table, seven, starts=four).validate()
    with pytest.raises(ValueError, match="page ids"):
        vp.PagedKVCache(pages, pages, table, seven).validate()


def test_a_workspace_grows_and_stays():
    work = vp.Workspace()
    cpu = torch.device("cpu")
    a = work.take("a", 10, torch.float32, cpu)
    assert work.take("a", 5, torch.float32, cpu) is a
    assert work.take("b", 5, torch.float32, cpu) is not a
    assert work.take("a", 11, torch.float32, cpu).numel() >= 11
    assert (work.zeroed("c", 4, torch.int32, cpu) == 0).all()
    with torch.inference_mode():
        inside = work.take("d", 4, torch.float32, cpu)
    inside.fill_(1)  # would raise for a tensor made in inference mode


def test_two_threads_have_two_workspaces():
    from visionpulse.workspace import default

    found = [default(torch.device("cpu"))]
    thread = threading.Thread(target=lambda: found.append(default(torch.device("cpu"))))
    thread.start()
    thread.join()
    assert found[0] is not found[1] and default(torch.device("cpu")) is found[0]
