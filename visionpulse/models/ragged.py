"""`session.generate(...)`: lossless decoding of a batch, whose rows accept counts of their own.

No row waits for another: each ends at a place of its own in the cache, and what was rejected is
written over. A round reads the device once, at its end.
"""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..selection import Selection
from . import registry
from .arguments import cache_of_output
from .kv_layers import conversation_of
from .lossless import RunAhead
from .mode import Part
from .ragged_cache import RowPlaces, can_be_ragged, end_at, ragged
from .rounds import BatchRequest, batch_request_of
from .row_draws import RowDraws, refusal_of
from .row_ends import RowEnds


def generate(ahead: RunAhead, inputs: Tensor | None, options: dict[str, Any]) -> Any:
    """What `model.generate` returns, one row or many."""
    model = ahead.patched.anatomy.model
    config = copy.deepcopy(options.get("generation_config") or model.generation_config)
    config.update(**options)
    mode = config.get_generation_mode(options.get("assistant_model"))
    ids = options.get("input_ids", inputs)
    rows = 0 if ids is None else ids.shape[0] * (config.num_return_sequences or 1)
    if rows != 1:
        reason = _refusal_of_options(config, options, str(mode.value))
        if reason is None:
            loop = BatchLoop(ahead, options.get("streamer"))
            return model.generate(inputs, **options, custom_generate=loop)
        ahead.patched.notices.ragged(reason)
    return model.generate(inputs, **options)


def _refusal_of_options(config: Any, options: dict[str, Any], mode: str) -> str | None:
    """Why this call of `generate()` decodes one token at a time."""
    if mode not in ("greedy_search", "sample"):
        return f"{mode.replace('_', ' ')}, whose sequences meet"
    if config.cache_implementation not in (None, "dynamic") or config.use_cache is False:
        kind = config.cache_implementation if config.use_cache else None
        return f"a batch on a {kind} cache" if kind else "a batch without a cache"
    if config.output_attentions or config.output_hidden_states:
        return "attentions or hidden states in the output"
    if config.prefill_chunk_size is not None or options.get("inputs_embeds") is not None:
        return "a prompt in pieces or as embeddings"
    cache = cache_of_output(options)
    is_filled = cache is not None and int(cache.get_seq_length()) > 0
    return "a cache that is filled already" if is_filled else None


class BatchLoop:
    """The decoding loop of one `generate()`; transformers calls it with what it has prepared."""

    def __init__(self, ahead: RunAhead, streamer: Any) -> None:
        self._ahead = ahead
        self._streamer = streamer

    def __call__(
        self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any,
        generation_config: Any, synced_gpus: bool = False, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Decode from `input_ids` [B, n]."""
        patched = self._ahead.patched
        reason = refusal_of(logits_processor, stopping_criteria)
        cache = cache_of_output(kwargs)
        if cache is not None:
            patched.swap_layers(cache)
        if synced_gpus:
            reason = "a model split over processes"
        elif cache is None or not can_be_ragged(cache):
            kind = type(cache).__name__
            reason = f"a batch on a {kind}, in which no row can be rolled back"
        elif "chunked_attention" in (getattr(patched.anatomy.config, "layer_types", None) or ()):
            reason = "layers that attend within chunks"
        elif registry.base_name(patched.anatomy.config) not in ("sdpa", "eager"):
            reason = "an attention implementation that takes no mask of our own"
        if reason is None:
            ends = RowEnds(input_ids, stopping_criteria, generation_config, self._streamer)
            draws = RowDraws(logits_processor, generation_config.do_sample, input_ids)
            return _Batch(self._ahead, model, ends, draws, generation_config, kwargs).decode()
        patched.notices.ragged(reason)
        return model._sample(
            input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
            generation_config=generation_config, synced_gpus=synced_gpus, streamer=self._streamer,
            **kwargs,
        )  # fmt: skip


class _Batch:
    """A batch under way, from its prefill to its last token."""

    def __init__(
        self, ahead: RunAhead, model: Any, ends: RowEnds, draws: RowDraws, config: Any,
        kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        self._ahead, self._model, self._kwargs = ahead, model, kwargs
        self._ends, self._draws = ends, draws
        self._cache = cache_of_output(kwargs)
        self._config = config
        keeps = config.return_dict_in_generate
        self._scores: list[Tensor] | None = [] if keeps and config.output_scores else None
        self._logits: list[Tensor] | None = [] if keeps and config.output_logits else None

    def decode(self) -> Any:
        """Decode until every row has ended."""
        request = self._prefill()
        ends, cache = self._ends, self._cache
        try:
            with ragged(cache) as places:
                while ends.are_left:
                    self._round(request, places)
        finally:  # Ctrl-C too: as after the last step that every row has taken
            steps = ends.steps_taken
            lengths = [ends.width + min(count, steps) - 1 for count in ends.counts]
            end_at(cache, ends.width + steps - 1, request.rows_of(lengths))
            self._draws.end(steps)
        return self._output(ends.finish())

    def _prefill(self) -> BatchRequest:
        model, ends = self._model, self._ends
        given = model.prepare_inputs_for_generation(
            ends.prompt, is_first_iteration=True, **self._kwargs
        )
        output = model(**given, return_dict=True)
        logits = output.logits[:, -1:]
        said, scores = self._say(logits, ends.prompt[:, -1:], [0] * ends.rows)
        self._take(said.tolist(), logits, scores)
        kwargs = model._update_model_kwargs_for_generation(output, self._kwargs)
        ids = torch.cat((ends.prompt, said), dim=1)
        named = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)
        return batch_request_of(named, ends.width, self._ahead.patched.anatomy.config)

    def _round(self, request: BatchRequest, places: RowPlaces) -> None:
        """Draft and check."""
        ahead, ends = self._ahead, self._ends
        conversation = conversation_of(self._cache, ahead.patched.anatomy.first_full)
        can_draft = conversation is not None and conversation.visual is not None
        can_draft = can_draft and not conversation.has_holes  # type: ignore[union-attr]
        plan = ahead.plan()
        plan = plan if can_draft else plan._replace(tokens=0)
        draft, alive = plan.tokens, list(ends.left)
        counts = ends.counts
        steps = [c if left else ends.steps_taken for c, left in zip(counts, ends.left, strict=True)]
        block = request.rows_of([tokens[-1:] for tokens in ends.tokens])  # [B, 1]
        first = request.rows_of([count - 1 for count in counts])
        places.size = ends.width + max(counts) + draft
        selections: list[Any] = []
        marks = [ahead.mark(block.device)]
        with ahead.mode.of(Part.DRAFT, ahead.ways[plan.way]):
            for i in range(draft):
                named, places.slots = request.block(block[:, -1:], first + i, places.size)
                logits = ahead.plain(**named).logits[:, -1:]
                selections.append(conversation.selection)  # type: ignore[union-attr]
                said, *_ = self._say(logits, block, [step + i for step in steps])
                block = torch.cat((block, said), dim=1)
        named, places.slots = request.block(block, first, places.size)
        marks.append(ahead.mark(block.device))
        with ahead.mode.of(Part.CHECK):
            logits = ahead.plain(**named).logits  # [B, draft + 1, vocabulary]
        ahead.time(plan, [*marks, ahead.mark(block.device)])
        said, scores = self._say(logits, block, steps)
        agreed = (block[:, 1:] == said[:, :-1]).long().cumprod(1).sum(1)  # [B]
        host = torch.cat((said, agreed[:, None]), dim=1).tolist()  # the one read of the device
        ahead.policy.learn(
            plan, [(draft, row[-1]) for row, left in zip(host, alive, strict=True) if left]
        )
        taken = self._take([row[: row[-1] + 1] for row in host], logits, scores)
        self._draws.forget(min(ends.counts))
        left = sum(count > 0 for count in taken)
        ahead.patched.recorder.add_round(draft * left, checks=left)
        ahead.patched.recorder.add_accepted(sum(taken) - left)
        if selections and conversation is not None:
            conversation.steps += 1 - draft
            if selections[-1] is not None:
                conversation.selection = _by_row(selections, agreed)

    def _say(self, logits: Tensor, block: Tensor, steps: list[int]) -> tuple[Tensor, Tensor]:
        scores = self._draws.scores(logits, block)
        return self._draws.said(scores, steps), scores

    def _take(self, said: list[list[int]], logits: Tensor, scores: Tensor) -> list[int]:
        """Let each row say its tokens, up to its end; how many it took."""
        before = self._ends.counts
        taken = self._ends.take(said)
        for kept, values in ((self._scores, scores), (self._logits, logits)):
            if kept is None:
                continue
            for row, count in enumerate(taken):
                for i in range(count):
                    step = before[row] + i
                    if step == len(kept):
                        kept.append(values.new_zeros(values.shape[0], values.shape[2]).float())
                    kept[step][row] = values[row, i]
        for row, count in enumerate(taken):
            self._draws.add(row, said[row][:count])
        return taken

    def _output(self, sequences: Tensor) -> Any:
        if not self._config.return_dict_in_generate:
            return sequences
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        names = {field.name for field in dataclasses.fields(GenerateDecoderOnlyOutput)}
        about: dict[str, Any] = {
            "sequences": sequences,
            "scores": None if self._scores is None else tuple(self._scores),
            "logits": None if self._logits is None else tuple(self._logits),
            "cache" if "cache" in names else "past_key_values": self._cache,
        }
        return GenerateDecoderOnlyOutput(**about)


def _by_row(selections: list[Any], agreed: Tensor) -> Selection:
    """Of each row, the selection of its last accepted token."""
    last = agreed.clamp(max=len(selections) - 1)
    rows = torch.arange(len(last), device=last.device)

    def pick(name: str) -> Tensor:
        return torch.stack([getattr(each, name) for each in selections])[last, rows]

    return Selection(pick("indices"), pick("counts"), pick("mass"), pick("mass_mean"), trusted=True)
