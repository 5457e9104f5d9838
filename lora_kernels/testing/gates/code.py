"""What a compiler made of a kernel, and its main loop."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

# tensor cores: warp-wide, warp-group-wide, tcgen05; then AMD's
MATRIX = re.compile(r"[HIQOBD]MMA$|[HIQ]GMMA$|UTC[HIQO]MMA$|v_(mfma|smfmac)_")
LOAD = re.compile(r"LDG$|LDGSTS$|UTMALDG$|UBLKCP$|(global|buffer)_load_")
WIDE = re.compile(r"(LDG|LDGSTS)\.(\w+\.)*(128|256)\b|UTMALDG|UBLKCP|(global|buffer)_load_(lds_)?dwordx4")
MEMORY = re.compile(r"LD[GSM]?$|LDGSTS$|LDSM$|ST[GS]?$|STSM$|ATOM[GS]?$|RED[GS]?$|UTMALDG$|UBLKCP$|(global|buffer|ds|flat)_")


@dataclass(frozen=True)
class Instruction:
    opcode: str
    """With its suffixes, as in LDG.E.128."""
    target: str | None = None
    """The label of a branch."""
    last: bool = False
    """The next instruction does not follow."""
    operands: tuple[str, ...] = ()
    """Of SASS, without the predicate before it."""
    guarded: bool = False
    """It may do nothing."""

    @property
    def stem(self) -> str:
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Code:
    """One kernel's code for one chip."""

    registers: int
    stack: int
    """Bytes of local memory for each thread."""
    spills: int
    """Loads and stores of local memory; AMD: spilled registers."""
    shared: int
    """Static shared memory in bytes."""
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    """The index of the instruction after each label."""
    waves: int = 0
    """AMD: the waves on a SIMD that the registers allow."""


@dataclass(frozen=True)
class MainLoop:
    """The innermost loop with the most matrix instructions, or global loads where a kernel has none
    of those.

    A kernel without such a loop counts as a whole.
    """

    unit: str
    """What is counted: the matrix instruction, or "load"."""
    units: int
    instructions: int
    copies: int
    """Loops inside it that touch memory, which are copies that were not unrolled: they run several
    times each round."""


def count_opcodes(instructions: Iterable[Instruction], what: re.Pattern[str]) -> int:
    """How many opcodes match, with or without their suffixes."""
    return sum(bool(what.match(i.opcode) or what.match(i.stem)) for i in instructions)


def main_loop(code: Code) -> MainLoop:
    """Finds the main loop among the natural loops of the flow graph."""
    unit = MATRIX if count_opcodes(code.instructions, MATRIX) else LOAD
    bodies = natural_loops(code)
    inside = {header: [code.instructions[i] for i in body] for header, body in bodies.items()}
    units = {header: count_opcodes(body, unit) for header, body in inside.items()}
    busy = [h for h in bodies if units[h] and not any(bodies[o] < bodies[h] and units[o] for o in bodies)]
    if not busy:
        return _summary([code.instructions[i] for i in reachable(successors(code))], 0)
    # without matrix instructions it is the longest: of a product on plain lanes, not of a sum of a
    # few parts
    best = max(busy, key=lambda h: (units[h] if unit is MATRIX else 0, len(bodies[h])))
    return _summary(inside[best], sum(bodies[o] < bodies[best] and count_opcodes(inside[o], MEMORY) > 0 for o in bodies))


def _summary(body: list[Instruction], copies: int) -> MainLoop:
    matrix = [_short_opcode(i) for i in body if MATRIX.match(i.stem)]
    if not matrix:
        return MainLoop("load", count_opcodes(body, LOAD), len(body), copies)
    most = max(sorted(set(matrix)), key=matrix.count)
    return MainLoop(most, matrix.count(most), len(body), copies)


def _short_opcode(instruction: Instruction) -> str:
    """Without AMD's shapes: v_mfma_f32_32x32x8_bf16 is v_mfma."""
    return "_".join(instruction.stem.split("_")[:2])


def successors(code: Code) -> list[list[int]]:
    """The instructions that may follow each one.

    Raises:
        ValueError: a branch to nowhere in this code.
    """
    follow = []
    for at, instruction in enumerate(code.instructions):
        after = [] if instruction.last or at + 1 == len(code.instructions) else [at + 1]
        if instruction.target is not None:
            if instruction.target not in code.labels:
                raise ValueError(f"{instruction.opcode}: no label {instruction.target}")
            after.append(code.labels[instruction.target])
        follow.append(after)
    return follow


def reachable(follow: list[list[int]]) -> list[int]:
    """The instructions that the first one leads to, in order."""
    seen, todo = set(), [0]
    while todo:
        at = todo.pop()
        if at not in seen and at < len(follow):
            seen.add(at)
            todo += follow[at]
    return sorted(seen)


def natural_loops(code: Code) -> dict[int, frozenset[int]]:
    """The natural loops: for each header the instructions from which a branch back to it is
    reached.

    A branch is one back only if its target dominates it: compilers put the waiting of a loop behind
    it and jump back into the middle.
    """
    follow = successors(code)
    alive = reachable(follow)
    before: dict[int, list[int]] = {at: [] for at in alive}
    for at in alive:
        for after in follow[at]:
            before[after].append(at)
    every = (1 << len(follow)) - 1  # sets of instructions as bits
    dominators = dict.fromkeys(alive, every) | {0: 1}
    changed = True
    while changed:
        changed = False
        for at in alive[1:]:
            new = every
            for previous in before[at]:
                new &= dominators[previous]
            new |= 1 << at
            changed |= new != dominators[at]
            dominators[at] = new
    found: dict[int, frozenset[int]] = {}
    for at in alive:
        for header in follow[at]:
            if dominators[at] >> header & 1:
                body, todo = {header}, [at]
                while todo:
                    inner = todo.pop()
                    if inner not in body:
                        body.add(inner)
                        todo += before[inner]
                found[header] = found.get(header, frozenset()) | body
    return found
