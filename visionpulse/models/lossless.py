"""Lossless decoding: sparse steps draft tokens, one dense forward checks them.

The forward of a patched model runs ahead of its caller. Asked for one token it drafts some more,
checks all of them at once, and returns the dense logits of the first; the next calls are answered
from the check, as long as they bring the tokens that were drafted. So `generate()`, its streamers,
processors and stopping criteria see the logits of the dense model alone, one call at a time, and
draw their own dice; a draft draws with a copy of them. Nothing in a round reads the device.
"""

import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import Arguments
from .conversation import Conversation, DraftStart
from .draft_policy import FIRST, DraftPolicy, FixedDraft, Plan, ways_of
from .draws import TokenDraws
from .families import Anatomy, UnsupportedModelError
from .graph_parts import GraphParts
from .kv_layers import conversation_of
from .layer_ends import CommonEnd, Rewindable
from .layer_roles import LayerRoles
from .mode import Mode, Part
from .patched_model import PatchedModel
from .rounds import Request, request_of
from .static_ends import StaticEnd, is_static, slots_of, why_not
from .stopwatch import Stopwatch

AUTO = "auto"
REWINDABLE = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds of layers


class _Ahead(threading.local):
    """The checked tokens that nobody has asked for yet; of one cache at a time."""

    cache: "weakref.ref[Any] | None" = None
    end: CommonEnd | StaticEnd | None = None  # of that cache: the entries that the caller knows of
    checked: Any = None  # the output of the check
    logits: Sequence[Tensor] = ()  # of it, [1, 1, vocabulary] each
    # ids [1, n], and once somebody asked for another token the list of those behind the first
    drafted: list[int] | Tensor = ()  # type: ignore[assignment]
    places: list[DraftStart] = ()  # type: ignore[assignment]  # of each draft step
    plan: Plan = Plan(0, 0)
    served = 0  # drafted tokens that were asked for

    def drop(self) -> None:
        """Forget them."""
        self.cache = self.end = self.checked = None
        self.drafted, self.places, self.logits = [], [], ()
        self.plan, self.served = Plan(0, 0), 0


class RunAhead:
    """Stands before the forward of one model."""

    def __init__(self, patched: PatchedModel, mode: Mode, draft: int | str) -> None:
        model = patched.anatomy.model
        self.patched = patched
        self.mode = mode
        self._draft = draft
        self._stopwatch = Stopwatch()
        self.ways: list[LayerRoles] = []
        self.policy: DraftPolicy | FixedDraft = FixedDraft(0)
        self._asked: LayerRoles | None = None  # the roles that ways and policy were made for
        self._ahead = _Ahead()
        self._graphs: dict[str, GraphParts] = {}  # by the settings of the compiler
        self._arguments = Arguments(model)
        self._draws = TokenDraws(model)
        self._own = model.__dict__.get("forward")  # of accelerate, if any
        self.plain: Callable[..., Any] = model.forward
        model.forward = functools.wraps(self.plain)(lambda *a, **k: self.forward(*a, **k))

        if hasattr(model, "get_compiled_call"):
            model.get_compiled_call = self._compiled_call

    def remove(self) -> None:
        """Give the model its own forward back."""
        model = self.patched.anatomy.model
        model.__dict__.pop("get_compiled_call", None)
        self._draws.remove()
        if self._own is None:
            model.__dict__.pop("forward", None)
        else:
            model.forward = self._own

    def plan(self) -> Plan:
        """What the next round does; an update of the session begins anew."""
        if self._asked is not self.patched.layer_roles:
            self._asked = roles = self.patched.layer_roles
            anatomy = self.patched.anatomy
            if self._draft != AUTO:
                self.ways, self.policy = [roles], FixedDraft(int(self._draft))
            else:
                able = [i for i, is_full in enumerate(anatomy.full) if is_full][:-1]
                configs = ways_of(roles.config, roles.anchors, able)
                self.ways = [LayerRoles.of(config, anatomy) for config in configs]
                self.policy = DraftPolicy(len(self.ways))
        return self.policy.plan()

    @property
    def run(self) -> Callable[..., Any]:
        """The forward of a part: a graph of it, where the caller compiles."""
        return self.mode.graphs or self.plain

    def _compiled_call(self, config: Any) -> Callable[..., Any]:
        """What `generate()` calls where it compiles its steps: the parts of a round are graphs."""
        settings = (config or self.patched.anatomy.model._default_compile_config()).to_dict()
        name = repr(settings)
        if name not in self._graphs:
            self._graphs[name] = GraphParts(self.plain, self.mode, settings)

        def call(**named: Any) -> Any:
            self.patched.has_dense_kernel(named["input_ids"].device, 1)  # no graph finds it out
            with self.mode.through(self._graphs[name]):
                return self.forward(**named)

        return call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Answer one call of the model."""
        if torch.compiler.is_compiling() or self.patched.is_paused:
            return self.plain(*args, **kwargs)
        named = self._arguments.named(args, kwargs)
        request = self._request(named)
        if isinstance(request, str):
            self._ahead.drop()
            self.mode.refusal = request
            return self.run(**named)
        self.mode.refusal, self.mode.is_at_end = "", False
        if self._is_ahead(request):
            return self._serve(request)
        self._learn(request)
        self._ahead.drop()
        is_fixed = request.conversation.capacity is not None
        if not (is_fixed or all(map(_can_rewind, request.cache.layers))):
            self.mode.refusal = "a cache that cannot be rolled back"
            return self.run(**named)
        plan = self.plan()
        if is_fixed and plan.tokens:
            plan = self._fit(plan, slots_of(request.cache) - request.length - 1)
        return self._round(request, plan) if plan.tokens else self._plain_step(request, plan)

    def _fit(self, plan: Plan, left: int) -> Plan:
        """The plan where so many slots are left behind the token that was asked for."""
        tokens = min(plan.tokens, left)
        if self.mode.graphs is not None:  # its check has one width
            tokens = plan.tokens if self._draft != AUTO else FIRST
            tokens = tokens if tokens <= left else 0
        self.mode.is_at_end = tokens == 0
        return plan._replace(tokens=tokens)

    def _request(self, named: dict[str, Any]) -> Request | str:
        """The call as a step to run ahead of, or why it is none."""
        cache = self._arguments.cache((), named)
        conversation = conversation_of(cache, self.patched.anatomy.first_full)
        if cache is None or conversation is None or conversation.visual is None:
            return "no picture"
        if conversation.capacity is not None and not conversation.has_picture:
            return "no picture"  # the set of a static cache has one shape, with and without
        if conversation.capacity is not None and not is_static(cache):
            return "a cache that cannot be rolled back" + why_not(cache)
        if conversation.has_holes:
            return "a mask with holes"
        return request_of(named, cache, conversation)

    def _is_ahead(self, request: Request) -> bool:
        """Whether this call's token was drafted, checked, and its entry of the cache is there."""
        ahead, end = self._ahead, self._ahead.end
        if end is None or not self._is_cache(request.cache):
            return False
        if isinstance(ahead.drafted, Tensor):
            ahead.drafted = ahead.drafted.tolist()[0][1:]
        if ahead.served >= len(ahead.drafted) or not end.is_of(request.cache.layers):
            return False
        return int(request.token) == ahead.drafted[ahead.served]

    def _is_cache(self, cache: Any) -> bool:
        """Whether this is the cache that tokens were checked for."""
        known = self._ahead.cache
        return known is not None and known() is cache

    def _serve(self, request: Request) -> Any:
        ahead = self._ahead
        ahead.served += 1
        assert ahead.end is not None
        ahead.end.move(request.length + 1)
        _go_on(request.conversation, ahead.places, ahead.served)
        self.patched.recorder.add_accepted()
        return _answer(ahead.checked, ahead.logits[ahead.served])

    def _learn(self, request: Request) -> None:
        """Tell the policy how the drafts of the last round fared, if this is its next token."""
        ahead = self._ahead
        if ahead.end is None or not ahead.plan.tokens:
            return
        goes_on = self._is_cache(request.cache) and ahead.end.length == request.length
        drafted = ahead.plan.tokens if goes_on else ahead.served
        self.policy.learn(ahead.plan, [(drafted, ahead.served)] if drafted else [])

    def _plain_step(self, request: Request, plan: Plan) -> Any:
        """One dense step, where drafting would not pay."""
        begin = self.mark(request.token.device)
        out = self.run(**request.named)
        self.time(plan, [begin, begin, self.mark(request.token.device)])
        return out

    def time(self, plan: Plan, marks: list[Any]) -> None:
        """Tell the policy what a round cost, once it is known."""
        policy, graphs = self.policy, self.mode.graphs
        if graphs is not None and graphs.is_new:
            graphs.is_new = False
            return
        self._stopwatch.add(marks, lambda draft, check: policy.time(plan, draft, check))

    def mark(self, device: torch.device) -> Any:
        """This moment, for `time`."""
        return self._stopwatch.mark(device)

    def _round(self, request: Request, plan: Plan) -> Any:
        """Draft and check; leave the cache as after the one token that was asked for."""
        conversation, length = request.conversation, request.length
        run, roles, in_graph = self.run, self.ways[plan.way], self.mode.graphs is not None
        before = conversation.steps, conversation.place(in_graph)
        tokens, places = [request.token], []
        arguments = request.of_all(plan.tokens + 1)
        try:
            marks = [self.mark(request.token.device)]
            if in_graph:
                conversation.follow(roles)
            with self.mode.of(Part.DRAFT, roles), self._draws.of(length, request.token) as choose:
                for i in range(plan.tokens):
                    logits = run(**arguments.step(i, tokens[-1])).logits
                    places.append(conversation.place(in_graph))
                    tokens.append(choose(logits))
            _end(request, length)
            ids = torch.cat(tokens, dim=1)  # [1, draft + 1]
            marks.append(self.mark(request.token.device))
            with self.mode.of(Part.CHECK):
                checked = run(**arguments.check(ids))
            marks.append(self.mark(request.token.device))
            end = _end(request, length + 1)
        except BaseException:  # Ctrl-C too: as after the last token that the caller knows of
            _end(request, length)
            conversation.steps = before[0]
            conversation.go_to(before[1])
            self._ahead.drop()
            raise
        self.time(plan, marks)
        conversation.steps = before[0]
        _go_on(conversation, places, 0)
        ahead = self._ahead
        ahead.cache, ahead.end, ahead.checked = weakref.ref(request.cache), end, checked
        logits = checked.logits.clone() if in_graph else checked.logits  # the graph's own memory
        ahead.logits = logits.split(1, dim=1)
        ahead.drafted, ahead.places = ids, places
        ahead.served, ahead.plan = 0, plan
        self.patched.recorder.add_round(plan.tokens)
        return _answer(checked, ahead.logits[0])


def _go_on(conversation: Conversation, places: list[DraftStart], served: int) -> None:
    """Let the next draft start from the selection of the last accepted token."""
    place = places[min(served, len(places) - 1)]
    if place.buffers is None:  # a graph would be made anew for each number
        conversation.steps += 1
    conversation.go_to(place)


def _can_rewind(layer: Any) -> bool:
    return isinstance(layer, Rewindable) and layer.can_rewind


def _end(request: Request, length: int) -> CommonEnd | StaticEnd:
    """Let all layers end at `length`."""
    kind = CommonEnd if request.conversation.capacity is None else StaticEnd
    return kind(request.cache.layers, length)


def _answer(checked: Any, logits: Tensor) -> Any:
    """What the dense model says behind one token of a check."""
    kind: Any = type(checked)
    answer = kind.__new__(kind)  # past the checks of what was checked already
    answer.__dict__.update(checked.__dict__, logits=logits)
    for name, value in checked.items():
        OrderedDict.__setitem__(answer, name, value)
    OrderedDict.__setitem__(answer, "logits", logits)
    return answer


def _kinds(anatomy: Anatomy) -> set[str]:
    kinds = getattr(anatomy.config, "layer_types", None)
    return set(kinds) if kinds else {"full_attention"}


def refuse(anatomy: Anatomy) -> None:
    """Refuse a model whose rejected tokens could not be rolled back, or that drafts nothing."""
    if anatomy.dense_because:
        reason = anatomy.dense_because
    elif others := sorted(_kinds(anatomy) - REWINDABLE):
        reason = (
            f"it has layers of {', '.join(others)}, whose state cannot be rolled back "
            "behind a rejected token"
        )
    elif not hasattr(anatomy.model, "lm_head") and anatomy.model.get_output_embeddings() is None:
        reason = "it has no head that gives logits; patch the whole model"
    else:
        return
    raise UnsupportedModelError(
        f"{type(anatomy.model).__name__} cannot decode losslessly: {reason}. "
        "Without lossless=True it can be patched"
    )
