"""What instructions compute for the lanes of a warp; of unknown sources the result is unknown."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .lanes import LANES, PREDICATE, WORD, Lanes, Value, bits_of, following, same
from .sass import Instruction

Operation = Callable[[Lanes, Instruction], None]


def parts_of(i: Instruction) -> tuple[str, list[str], list[str], list[str]]:
    """Result, predicates written behind it, sources, predicates read."""
    result, *rest = i.operands
    written, read = [], []
    while rest and PREDICATE.match(rest[0]):
        written.append(rest.pop(0))
    while rest and PREDICATE.match(rest[-1]):
        read.insert(0, rest.pop())
    return result, written, rest, read


def plain(of: Callable[..., Any], real: bool = False) -> Operation:
    """An operation of whole sources into one result; `of` may take the name as well."""

    def run(w: Lanes, i: Instruction) -> None:
        result, _, sources, _ = parts_of(i)
        values = [w.real(s) if real else w.read(s) for s in sources]
        known = np.logical_and.reduce([v.known for v in values])
        w.write(result, Value(of(i.name, *values), known))

    return run


def move(w: Lanes, i: Instruction) -> None:
    wide = i.name.endswith(".64") or i.base == "CS2R"
    source = i.operands[-1] if i.base != "MOV" else i.operands[1]
    w.write(i.operands[0], w.read(source.replace("SRZ", "RZ"), wide), wide)


def special(w: Lanes, i: Instruction) -> None:
    value = w.special.get(i.operands[1])
    known = value is not None
    w.write(
        i.operands[0],
        Value(
            np.broadcast_to(value if known else 0, LANES).astype(np.int64), np.full(LANES, known)
        ),
    )


def carry_in(w: Lanes, i: Instruction, read: list[str]) -> Value:
    if ".X" not in i.name or not read:
        return same(0)
    values = [w.read(p) for p in read]
    known = np.logical_and.reduce([v.known for v in values])
    return Value(sum(v.bits for v in values), known)


def add(w: Lanes, i: Instruction) -> None:
    result, written, sources, read = parts_of(i)
    values = [*map(w.read, sources), carry_in(w, i, read)]
    total = Value(sum(v.bits for v in values), np.logical_and.reduce([v.known for v in values]))
    for n, predicate in enumerate(written):
        w.write(predicate, Value((total.bits >> 32 > n).astype(np.int64), total.known))
    w.write(result, total)


def multiply(w: Lanes, i: Instruction) -> None:
    if ".MOV" in i.name:
        return move(w, i)
    result, written, (a, b, c), read = parts_of(i)
    wide, high = ".WIDE" in i.name, ".HI" in i.name
    x, y, z = w.read(a), w.read(b), w.read(c, wide or high)
    extra = carry_in(w, i, read)
    known = x.known & y.known & z.known & extra.known
    if not (wide or high):
        return w.write(result, Value(x.bits * y.bits + z.bits + extra.bits, known))
    pick = "unsigned" if ".U32" in i.name else "signed"
    rows = zip(getattr(x, pick), getattr(y, pick), z.bits, strict=True)
    full = [int(p) * int(q) + (int(r) & (1 << 64) - 1) for p, q, r in rows]
    if written:
        w.write(written[0], Value(np.array([v >> 64 & 1 for v in full]), known))
    halves = np.array([v & WORD for v in full]), np.array([v >> 32 & WORD for v in full])
    if high:
        return w.write(result, Value(halves[1], known))
    w.write(result, Value(halves[0], known))
    w.write(following(result), Value(halves[1], known))


def shifted_add(w: Lanes, i: Instruction) -> None:
    result, written, sources, read = parts_of(i)
    shift = int(sources[-1], 0)
    x, y, extra = w.read(sources[0]), w.read(sources[1]), carry_in(w, i, read)
    known = x.known & y.known & extra.known
    if ".HI" in i.name:
        whole = x.signed
        if ".SX32" not in i.name:
            upper = w.read(sources[2])
            whole, known = x.unsigned | upper.signed << 32, known & upper.known
        total = (whole >> (32 - shift)) + y.bits + extra.bits
    else:
        total = (x.bits << shift & WORD) + y.bits
    for predicate in written[:1]:
        w.write(predicate, Value((total >> 32 > 0).astype(np.int64), known))
    w.write(result, Value(total, known))


def looked_up(table: int, *sources: Any) -> Any:
    found = np.zeros_like(sources[0])
    for n in range(8):
        if table >> n & 1:
            row = [s if n >> 2 - at & 1 else ~s for at, s in enumerate(sources)]
            found |= row[0] & row[1] & row[2]
    return found


def logic(w: Lanes, i: Instruction) -> None:
    operands = list(i.operands)
    predicate = operands.pop(0) if PREDICATE.match(operands[0]) else None
    values = [w.read(o) for o in operands[1:4]]
    table = int(operands[4], 0)
    known = np.logical_and.reduce([v.known for v in values])
    if table == 0xC0:  # and: a known zero decides
        for v in values[:2]:
            known = known | (v.known & (v.unsigned == 0))
    result = Value(looked_up(table, *(v.unsigned for v in values)) & WORD, known)
    if predicate:
        w.write(predicate, Value((result.bits != 0).astype(np.int64), known))
    w.write(operands[0], result)


def logic_of_predicates(w: Lanes, i: Instruction) -> None:
    values = [w.read(o) for o in i.operands[2:5]]
    sources = [v.bits.astype(bool) for v in values]
    for result, table in zip(i.operands[:2], i.operands[5:7], strict=True):
        # known if no unknown source changes the outcome
        outcome = looked_up(int(table, 0), *sources)
        known = np.full(LANES, True)
        for flips in range(1, 8):
            flipped = [
                s ^ (~v.known if flips >> n & 1 else False)
                for n, (s, v) in enumerate(zip(sources, values, strict=True))
            ]
            known &= looked_up(int(table, 0), *flipped) == outcome
        w.write(result, Value(outcome.astype(np.int64), known))


def shift(w: Lanes, i: Instruction) -> None:
    low, by, high = (w.read(o) for o in i.operands[1:4])
    n = by.unsigned & 31 if ".W" in i.name else np.minimum(by.unsigned, 32)
    known = low.known & by.known & high.known
    upper = high.signed if ".S32" in i.name else high.unsigned
    if ".R" in i.name:
        value = upper >> n if ".HI" in i.name else low.unsigned >> n | upper << (32 - n)
    else:
        value = (
            high.unsigned << n | low.unsigned >> (32 - n) if ".HI" in i.name else low.unsigned << n
        )
    w.write(i.operands[0], Value(value, known))


COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal,
    "NE": np.not_equal,
}  # fmt: skip


def compare(w: Lanes, i: Instruction) -> None:
    names = i.name.split(".")
    result, other, a, b, also, *low = i.operands
    real = i.base == "FSETP"
    x, y = (w.real(a), w.real(b)) if real else (w.read(a), w.read(b))
    pick = "real" if real else "unsigned" if "U32" in names else "signed"
    left, right = getattr(x, pick), getattr(y, pick)
    name = next(n for n in names[1:] if n.rstrip("U") in COMPARE or n in ("NAN", "NUM", "MAX"))
    known = x.known & y.known
    if name.rstrip("U") not in COMPARE:
        known, outcome = known & False, left == right
    else:
        outcome = COMPARE[name.rstrip("U") if real else name](left, right)
    if low:  # the upper words decide unless they are equal
        of_low = w.read(low[0])
        outcome = np.where(left == right, of_low.bits != 0, outcome)
        known = known & (of_low.known | (left != right))
    more = w.read(also)
    join, decides = (np.logical_or, 1) if "OR" in names else (np.logical_and, 0)
    settled = (more.known & (more.bits == decides)) | (known & (outcome == decides))
    both = (known & more.known) | settled
    w.write(result, Value(join(outcome, more.bits != 0).astype(np.int64), both))
    w.write(other, Value(join(~outcome, more.bits != 0).astype(np.int64), known & more.known))


def choose(w: Lanes, i: Instruction) -> None:
    x, y, which = w.read(i.operands[1]), w.read(i.operands[2]), w.read(i.operands[3])
    first = which.bits != 0
    known = which.known & np.where(first, x.known, y.known)
    w.write(i.operands[0], Value(np.where(first, x.bits, y.bits), known))


def least_or_most(w: Lanes, i: Instruction) -> None:
    result, _, sources, read = parts_of(i)
    values, least = [w.read(s) for s in sources], w.read(read[-1])
    pick = "unsigned" if "U32" in i.name else "signed"
    *first, last = values
    x = getattr(Value(sum(v.bits for v in first), values[0].known), pick)
    y = getattr(last, pick)
    bits = np.where(least.bits != 0, np.minimum(x, y), np.maximum(x, y))
    known = np.logical_and.reduce([least.known, *(v.known for v in values)])
    w.write(result, Value(np.maximum(bits, 0) if "RELU" in i.name else bits, known))


def vote(w: Lanes, i: Instruction) -> None:
    operands = list(i.operands)
    source = w.read(operands.pop())
    known = bool(source.known[w.on].all())
    if not PREDICATE.match(operands[0]):
        ballot = sum(1 << n for n in range(LANES) if w.on[n] and source.bits[n])
        w.write(operands.pop(0), same(ballot, known))
    yes = (source.bits != 0) & w.on
    if ".ANY" in i.name:
        # of what is not known no lane has need: warps vote on rare work, such as a new maximum
        w.write(operands[0], same(bool((yes & source.known).any())))
    elif ".ALL" in i.name:
        sure = bool((~yes & w.on & source.known).any())
        w.write(operands[0], same(bool((yes | ~w.on).all()), known or sure))
    else:
        w.write(operands[0], same(0, known=False))


def shuffle(w: Lanes, i: Instruction) -> None:
    source, by = w.read(i.operands[2]), w.read(i.operands[3])
    lane, n = np.arange(LANES), by.unsigned
    way = i.name.split(".")[1]
    at = {
        "IDX": n % 32, "BFLY": (lane ^ n) % 32, "UP": np.where(lane >= n, lane - n, lane),
        "DOWN": np.where(lane + n < 32, lane + n, lane),
    }[way]  # fmt: skip
    inside = {"UP": lane >= n, "DOWN": lane + n < 32}.get(way, np.full(LANES, True))
    w.write(i.operands[0], Value(inside.astype(np.int64), by.known))
    w.write(i.operands[1], Value(source.bits[at], source.known[at] & by.known))


def first_lane(w: Lanes, i: Instruction) -> None:
    value, lane = w.read(i.operands[1]), int(np.argmax(w.on))
    w.write(i.operands[0], same(int(value.bits[lane]), bool(value.known[lane])))


def to_real(name: str, x: Value) -> Any:
    exact = (x.unsigned if ".U32" in name else x.signed).astype(np.float64)
    near = exact.astype(np.float32)
    if ".RP" in name:
        near = np.where(near < exact, np.nextafter(near, np.float32(np.inf)), near)
    return bits_of(near)


def to_integer(name: str, x: Value) -> Any:
    value = np.nan_to_num(x.real.astype(np.float64))
    value = (
        np.floor(value)
        if ".FLOOR" in name
        else np.ceil(value)
        if ".CEIL" in name
        else np.trunc(value)
    )
    low, high = (0, WORD) if ".U32" in name else (-(1 << 31), (1 << 31) - 1)
    return np.clip(value, low, high).astype(np.int64) & WORD


def transcendental(name: str, x: Value) -> Any:
    functions: dict[str, Callable[[Any], Any]] = {
        "RCP": np.reciprocal, "EX2": np.exp2, "LG2": np.log2, "RSQ": lambda y: 1 / np.sqrt(y),
    }  # fmt: skip
    with np.errstate(all="ignore"):
        return bits_of(functions[name.split(".")[1]](x.real))


def arithmetic(of: Callable[..., Any]) -> Operation:
    def run(_: str, *values: Value) -> Any:
        with np.errstate(all="ignore"):
            return bits_of(of(*(v.real.astype(np.float64) for v in values)))

    return plain(run, real=True)


def packed_predicates(w: Lanes, i: Instruction) -> None:
    mask, value = int(i.operands[-1], 0), w.read(i.operands[2])
    bits, known = value.unsigned & ~mask, value.known
    for n in range(7):
        if mask >> n & 1:
            p = w.read(f"P{n}")
            bits, known = bits | p.bits << n, known & p.known
    w.write(i.operands[0], Value(bits, known))


def permuted_bytes(w: Lanes, i: Instruction) -> None:
    low, selector, high = (w.read(o) for o in i.operands[1:4])
    both, bits = low.unsigned | high.unsigned << 32, np.zeros(LANES, np.int64)
    for n in range(4):
        pick = selector.unsigned >> 4 * n & 15
        byte = both >> 8 * (pick & 7) & 255
        bits |= np.where(pick & 8, np.where(byte & 128, 255, 0), byte) << 8 * n
    w.write(i.operands[0], Value(bits, low.known & selector.known & high.known))


OPERATIONS: dict[str, Operation] = {
    "MOV": move, "LDC": move, "CS2R": move, "S2R": special, "S2UR": special, "IADD3": add,
    "VIADD": add, "IMAD": multiply, "LEA": shifted_add, "LOP3": logic, "PLOP3": logic_of_predicates,
    "SHF": shift, "ISETP": compare, "FSETP": compare, "SEL": choose, "FSEL": choose,
    "VIMNMX": least_or_most, "VIADDMNMX": least_or_most, "VOTE": vote, "SHFL": shuffle,
    "R2UR": first_lane, "I2F": plain(to_real), "I2FP": plain(to_real),
    "F2I": plain(to_integer, real=True), "MUFU": plain(transcendental, real=True),
    "FADD": arithmetic(np.add), "FMUL": arithmetic(np.multiply),
    "FFMA": arithmetic(lambda a, b, c: a * b + c), "P2R": packed_predicates, "PRMT": permuted_bytes,
    "IABS": plain(lambda _, x: np.abs(x.signed)),
    "POPC": plain(lambda _, x: np.array([int(v).bit_count() for v in x.unsigned])),
    "FLO": plain(lambda _, x: np.array([int(v).bit_length() - 1 for v in x.unsigned])),
    # the slow path of a division is for quotients that are hardly ever met
    "FCHK": lambda w, i: w.write(i.operands[0], same(0)),
}  # fmt: skip


def compute(w: Lanes, i: Instruction) -> None:
    """Run what lies in the table; what another instruction writes is unknown."""
    operation = OPERATIONS.get(i.base) or OPERATIONS.get(i.base.removeprefix("U"))
    if operation is None:
        w.forget(i)
    else:
        operation(w, i)
