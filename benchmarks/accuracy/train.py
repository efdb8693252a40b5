"""Train the tiny model on the glyph trail: `python benchmarks/accuracy/train.py --out DIR`.

One thread of one core, under 45 minutes, seeded. Several questions are packed behind one picture.
What the training is helped by, beside the answers:

- grids grow from 4 to 20 cells a side as the running accuracy passes a bar;
- up to side 8 the vision output is also asked for colour, mark, key and pointer of its cell
  (a stand-in for the caption alignment of large models; those heads are dropped afterwards);
- from side 8 on the mean attention that text positions pay to visual tokens is penalised, the same
  for all positions. Large models pay little in text steps by themselves; this one would not.

`--late W` weighs that penalty by W in the layers from the default anchor on, so that a model looks
things up before it: a layer profile on which other settings break.
"""

import argparse
import contextlib
import ctypes
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from model import LAYERS, WIDTH, make
from rows import ANCHOR
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from visionpulse.bench.progress import progress_bar
from visionpulse.data import trail
from visionpulse.files import write_text


class Stage(NamedTuple):
    """One size of grid: what a batch holds, and the most steps spent on it."""

    side: int
    pictures: int
    colours: tuple[int, int]
    most_steps: int


QUESTIONS = 5  # behind one picture
LENGTH = 3 + trail.LONGEST_ANSWER
STAGES = (
    Stage(4, 12, (1, 1), 2000),
    Stage(6, 10, (1, 2), 1000),
    Stage(8, 10, (2, 4), 600),
    Stage(12, 8, (3, 6), 600),
    Stage(16, 6, (6, 8), 600),
    Stage(20, 5, (7, 8), 10**9),
)
ALIGNED = 3  # stages with the alignment losses
PENALISED_FROM = 2  # first stage with the penalty on visual mass
READY = 0.90  # running accuracy of both visual steps at which the grid grows
LEARNING_RATE, WARMUP, LOWEST = 1.5e-3, 100, 0.03


class Packed:
    """Attention of a packed batch: the picture causally, each question to the picture and itself.

    Also keeps, per layer, the share of attention that text positions pay to visual tokens.
    """

    def __init__(self) -> None:
        self.before = 0  # tokens before the questions
        self.bias = torch.zeros(0)  # [before, before], causal
        self.own = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
        self.masses: list[torch.Tensor] = []  # [B, G, R, text] per layer

    def aim(self, side: int) -> None:
        self.before = side * side + 3
        self.bias = torch.full((self.before, self.before), -torch.inf).triu(1)
        self.masses.clear()

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        if not hasattr(module, "layer_idx"):  # the vision tower
            out = F.scaled_dot_product_attention(query, key, value, scale=scaling)
            return out.transpose(1, 2).contiguous(), None
        n, (batch, heads, tokens, dim), groups = self.before, query.shape, key.shape[1]
        # the heads of a group are rows of one product: [B, G, R, tokens, D]
        q = (query * scaling).reshape(batch, groups, heads // groups, tokens, dim)
        key_t = key[:, :, :n].transpose(2, 3)
        seen = (q[..., :n, :].flatten(2, 3) @ key_t).unflatten(2, (-1, n))
        picture = (seen + self.bias).softmax(-1).to(value.dtype).flatten(2, 3) @ value[:, :, :n]

        asked = q[..., n:, :]  # [B, G, R, QUESTIONS * LENGTH, D]
        rows = asked.shape[-2]
        to_picture = (asked.flatten(2, 3) @ key_t).unflatten(2, (-1, rows))
        key_own, value_own = (x[:, :, n:].unflatten(2, (QUESTIONS, LENGTH)) for x in (key, value))
        cut = asked.unflatten(3, (QUESTIONS, LENGTH)).transpose(2, 3).flatten(3, 4)
        to_own = (cut @ key_own.transpose(3, 4)).unflatten(3, (-1, LENGTH)).transpose(2, 3)
        scores = torch.cat([to_picture, (to_own + self.own).flatten(3, 4)], -1)
        share = scores.float().softmax(-1)
        self.masses.append(share[..., trail.FIRST_CELL : n - 1].sum(-1))
        share = share.to(value.dtype)
        from_own = share[..., n:].unflatten(3, (QUESTIONS, LENGTH)).transpose(2, 3).flatten(3, 4)
        from_own = (from_own @ value_own).unflatten(3, (-1, LENGTH)).transpose(2, 3)
        text = (share[..., :n].flatten(2, 3) @ value[:, :, :n]).unflatten(2, (-1, rows))
        out = torch.cat([picture.unflatten(2, (-1, n)), text + from_own.flatten(3, 4)], 3)
        return out.flatten(1, 2).transpose(1, 2).contiguous(), None


class Alignment(torch.nn.Module):
    """Asks the vision output what its cell shows, in terms of the token embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.colour = torch.nn.Linear(WIDTH, trail.COLOURS)
        self.mark = torch.nn.Linear(WIDTH, trail.MARKS)
        self.key = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.pointer = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, seen, cells, embedding):
        on = cells[:, 0] >= 0
        seen, (colour, key, pointer, mark) = seen.float()[on], cells[on].T
        glyphs = embedding[trail.GLYPH : trail.GLYPH + trail.GLYPHS]
        targets = torch.cat([glyphs, embedding[trail.STOP : trail.STOP + 1]])
        return (
            F.cross_entropy(self.colour(seen), colour)
            + F.cross_entropy(self.mark(seen), mark)
            + F.cross_entropy(10 * self.key(seen) @ glyphs.T, key)
            + F.cross_entropy(10 * self.pointer(seen) @ targets.T, pointer)
        )


def batch_of(rng, stage):
    """(pictures, tokens [B, QUESTIONS, LENGTH], labels of the same shape, -100 where none)."""
    shape = (stage.pictures, QUESTIONS, LENGTH)
    tokens, labels = np.full(shape, trail.PAD), np.full(shape, -100)
    pictures = []
    for b in range(stage.pictures):
        colours = int(rng.integers(stage.colours[0], stage.colours[1] + 1))
        per_colour = stage.side**2 // colours
        if rng.random() < 0.25:  # mostly empty
            colours = int(rng.integers(1, colours // 2 + 2))
            per_colour = int(rng.integers(min(8, per_colour), min(50, per_colour) + 1))
        pictures.append(trail.draw(rng, stage.side, colours, per_colour))
        for r in range(QUESTIONS):
            asked = trail.ask(rng, pictures[-1], int(rng.integers(1, trail.MOST_HOPS + 1)))
            text = asked.prompt + asked.answer
            tokens[b, r, : len(text)] = text
            labels[b, r, 2 : len(text) - 1] = asked.answer
    return pictures, torch.from_numpy(tokens), torch.from_numpy(labels)


def positions(model, side):
    """M-RoPE positions of the picture and the questions, [3, tokens], as the model counts them."""
    ids = torch.tensor([trail.prefix(side) + [trail.ASK] * LENGTH])
    kinds = (ids == trail.IMAGE).int()
    grid = torch.tensor([[1, side, side]])
    found, _ = model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)
    found, before = found[:, 0], side * side + 3
    return torch.cat([found[:, :before]] + [found[:, before:]] * QUESTIONS, 1)


class Trainer:
    def __init__(
        self,
        seed: int,
        steps: int,
        decay_from: int,
        penalty: float,
        late: float = 1.0,
        side: int = STAGES[-1].side,
    ) -> None:
        self.rng = np.random.default_rng([seed, 1])
        self.model = make(seed).train()
        self.align = Alignment()
        self.steps, self.decay_from, self.penalty = steps, decay_from, penalty
        self.weights = torch.tensor([1.0 if i < ANCHOR else late for i in range(LAYERS)])
        self.stages = [stage for stage in STAGES if stage.side <= side]
        self.packed = Packed()
        name = f"trail_packed_{id(self.packed)}"
        AttentionInterface.register(name, self.packed)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        self.model.set_attn_implementation(name)
        self.seen = torch.zeros(0)  # vision output of the last forward
        self.model.model.visual.register_forward_hook(self._look)
        named = dict(self.model.named_parameters())
        decayed = {n for n, p in named.items() if p.ndim >= 2 and "embed" not in n}
        rest = [p for n, p in named.items() if n not in decayed]
        self.optimizer = torch.optim.AdamW(
            [
                dict(params=[named[n] for n in sorted(decayed)], weight_decay=0.05),
                dict(params=[*rest, *self.align.parameters()], weight_decay=0.0),
            ],
            lr=LEARNING_RATE,
            betas=(0.9, 0.98),
        )
        self.at, self.since = 0, 0  # stage, steps in it
        self.running = {"marks": 0.0, "next": 0.0}
        self._enter()

    def _look(self, module, args, output):
        self.seen = output.pooler_output

    def _enter(self) -> None:
        self.packed.aim(self.stages[self.at].side)
        self.positions = positions(self.model, self.stages[self.at].side)

    def rate(self, step: int) -> float:
        if step < self.decay_from:
            return LEARNING_RATE * min(1, (step + 1) / WARMUP)
        part = (step - self.decay_from) / (self.steps - self.decay_from)
        return LEARNING_RATE * (LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * part)))

    def step(self, number: int) -> dict:
        stage = self.stages[self.at]
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(number)
        pictures, tokens, labels = batch_of(self.rng, stage)
        before = self.packed.before
        self.packed.masses.clear()
        front = torch.tensor(trail.prefix(stage.side)).expand(stage.pictures, -1)
        ids = torch.cat([front, tokens.flatten(1)], 1)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model.model(
                input_ids=ids,
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),  # Packed has its own
                position_ids=self.positions[:, None].expand(3, stage.pictures, -1),
                pixel_values=torch.from_numpy(trail.patches(pictures)),
                image_grid_thw=torch.tensor([[1, stage.side, stage.side]] * stage.pictures),
                use_cache=False,
            ).last_hidden_state[:, before:]
            asked = labels.flatten(1) >= 0
            logits = self.model.lm_head(hidden[asked]).float()
        wanted = labels.flatten(1)[asked]
        answers = F.cross_entropy(logits, wanted)
        real = tokens.flatten(1) != trail.PAD
        masses = torch.stack([m.mean((1, 2))[real].mean() for m in self.packed.masses])
        mass, penalised = masses.mean(), (masses * self.weights).mean()
        loss = answers + self.penalty * (self.at >= PENALISED_FROM) * penalised
        if self.at < ALIGNED:
            cells = torch.from_numpy(np.concatenate([p.cells for p in pictures]))
            embedding = self.model.get_input_embeddings().weight
            loss = loss + 0.3 * self.align(self.seen, cells, embedding)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        read = tokens.flatten(1)[asked]
        right = (logits.argmax(-1) == wanted).float()
        accuracy = {
            "marks": right[read == trail.HAS].mean().item(),
            "next": right[read == trail.TO].mean().item(),
            "sum": right[read == trail.SUM].mean().item(),
        }
        row = dict(side=stage.side, loss=answers.item(), mass=mass.item(), **accuracy)
        self._advance(accuracy)
        return row

    def _advance(self, accuracy: dict) -> None:
        self.since += 1
        for kind in self.running:
            self.running[kind] += 0.03 * (accuracy[kind] - self.running[kind])
        is_ready = (
            min(self.running.values()) > READY or self.since >= self.stages[self.at].most_steps
        )
        if is_ready and self.at + 1 < len(self.stages):
            self.at, self.since = self.at + 1, 0
            self.running = {kind: value / 2 for kind, value in self.running.items()}
            self._enter()

    def save(self, folder: Path, done: int) -> None:
        """Write a checkpoint of transformers, what `from_pretrained` reads, and the way on."""
        weights = {n: p.half() for n, p in self.model.state_dict().items()}
        self.model.save_pretrained(folder, state_dict=weights)
        parts = {name: getattr(self, name).state_dict() for name in ("model", "align", "optimizer")}
        state = dict(done=done, at=self.at, since=self.since, running=self.running, **parts)
        torch.save(dict(state, rng=self.rng.bit_generator.state), folder / "state.pt")

    def resume(self, folder: Path) -> int:
        state = torch.load(folder / "state.pt", weights_only=False)
        for name in ("model", "align", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.at, self.since, self.running = state["at"], state["since"], state["running"]
        self.rng.bit_generator.state = state["rng"]
        self._enter()
        return state["done"]


def keep_memory() -> None:
    """Let glibc keep freed blocks: returning them to the system doubles the time of a step."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3700)
    parser.add_argument("--decay-from", type=int, default=3000, help="step of the full rate's end")
    parser.add_argument("--penalty", type=float, default=0.05, help="weight of the visual mass")
    parser.add_argument("--late", type=float, default=1.0, help="its factor from the anchor on")
    parser.add_argument("--side", type=int, default=STAGES[-1].side, help="of the largest grids")
    parser.add_argument("--resume", type=Path, help="folder of a checkpoint to go on from")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args.seed, args.steps, args.decay_from, args.penalty, args.late, args.side)
    first, begun = trainer.resume(args.resume) if args.resume else 0, time.monotonic()
    tick = progress_bar()
    with open(args.out / "log.jsonl", "w") as log:
        for number in range(first, args.steps):
            row = trainer.step(number)
            if number % 25 == 24:
                seconds = round(time.monotonic() - begun)
                row = {k: round(v, 4) for k, v in row.items()}
                print(
                    json.dumps(dict(step=number + 1, seconds=seconds, **row)), file=log, flush=True
                )
                tick("steps", number + 1, args.steps)
            if number % 250 == 249:
                trainer.save(args.out, number + 1)
    trainer.save(args.out, args.steps)
    asked = {
        name: getattr(args, name)
        for name in ("seed", "steps", "decay_from", "penalty", "late", "side")
    }
    # of a run that was resumed, the seconds of its last part
    seconds = round(time.monotonic() - begun)
    about = asked | {"resumed": args.resume is not None, "seconds": seconds}
    write_text(args.out / "train.json", json.dumps(about) + "\n")


if __name__ == "__main__":
    main()
