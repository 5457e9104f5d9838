"""What a product that runs asynchronously reads or writes, and is touched before it is waited for:
a walk of the flow graph.

On sm_90 HGMMA (wgmma) goes on while the warp does, until WARPGROUP.DEPBAR. No scoreboard guards its
registers: those of A, where A is in registers, and of the sums. ptxas before 13.3 gives registers
of A away too early in pipelined loops, whatever the PTX says
(https://github.com/triton-lang/triton/issues/9433). Operands in shared memory are read through the
asynchronous proxy, from sm_100 on by UTCHMMA (tcgen05): what cp.async wrote is there only after
FENCE.VIEW.ASYNC (fence.proxy.async; PTX ISA, "Async proxy"); bulk copies need none. Who reads what
threads store is not known here: that is the simulator's.
"""

import re
from collections.abc import Iterator

from lora_kernels.testing.gates.code import Code, Instruction

ASYNC_PRODUCT = re.compile(r"[HIQB]GMMA$")
READS_SHARED = re.compile(r"[HIQB]GMMA$|UTC[HIQO]MMA$")
_REGISTER = re.compile(r"R(\d+)(?:\.reuse|\.64)?$")
_SOURCES = re.compile(r"(?<![A-Z])R(\d+)\b")
# a register that comes first is read: threads of a barrier, a mask, where to go on
_NOTHING = {"BAR", "WARPSYNC", "NANOSLEEP", "RET", "CALL", "BRX", "JMX", "BMOV"}
# a predicate comes first, then the register that is written; elsewhere what follows a predicate is
# read
_AFTER_PREDICATE = {"SHFL", "ATOM", "ATOMG", "ATOMS", "LOP3", "MATCH", "VOTE"}
_WIDE = re.compile(r"(IMAD\.WIDE|IDP\.WIDE|D(ADD|MUL|FMA|SETP)\b|CS2R(?!\.32)|F2F\.F64|I2F\.F64|F2I\.[US]64|LEPC)")
MAX_GROUPS = 15  # groups that are told apart; no wait leaves so many

# a register as ("A", number) or ("sum", number): how many groups began since; 0: not in a group
# yet. Memory that cp.async writes as UNDER_WAY, and as COPIED once it is waited for until it is
# shown to the asynchronous proxy
State = dict[tuple[str, int], int]
UNDER_WAY, COPIED = ("under way", 0), ("copied", 0)


def hazards(code: Code) -> list[str]:
    """Each instruction, in words, that may touch what a product is still at, by whichever way it is
    reached.

    Raises:
        ValueError: a wait or a group of a kind that is not known.
    """
    if not any(READS_SHARED.match(i.stem) for i in code.instructions):
        return []
    found: dict[int, str] = {}
    follow = _flow_edges(code)
    leaders = {to for at, after in enumerate(follow) if after != [at + 1] for to in after}
    entry: dict[int, State] = {0: {}}
    todo = [0]
    while todo:
        at = todo.pop()
        state = dict(entry[at])
        while True:
            text = _apply_instruction(code.instructions[at], state)
            if text:
                found.setdefault(at, text)
            if follow[at] != [at + 1] or at + 1 in leaders:
                break
            at += 1
        for to in follow[at]:
            known = entry.get(to)
            if known is None or any(known.get(key, MAX_GROUPS + 1) > age for key, age in state.items()):
                least = known or {}
                entry[to] = least | {key: min(least.get(key, MAX_GROUPS), age) for key, age in state.items()}
                todo.append(to)
    return [found[at] for at in sorted(found)]


def _flow_edges(code: Code) -> list[list[int]]:
    """What may follow each instruction: of a call its function, and what it returns to."""
    follow = []
    for at, instruction in enumerate(code.instructions):
        after = [] if instruction.last or at + 1 == len(code.instructions) else [at + 1]
        called = re.search(r"`\(([^)]+)\)", " ".join(instruction.operands)) if instruction.stem == "CALL" else None
        target = called[1] if called else instruction.target
        if target is not None:
            if target not in code.labels:
                raise ValueError(f"{instruction.opcode}: no label {target}")
            after.append(code.labels[target])
        follow.append([to for to in after if to < len(code.instructions)])
    return follow


def _apply_instruction(i: Instruction, state: State) -> str | None:
    """Changes the state by one instruction; what it touches too early, in words."""
    if i.stem == "WARPGROUP" and ".DEPBAR" in i.opcode:
        _apply_wait(i, state)
        return None
    text = _early_access(i, state)
    if i.stem == "LDGSTS":
        state[UNDER_WAY] = 0
    elif i.stem == "DEPBAR" and i.operands[:1] == ("SB0",) and UNDER_WAY in state:
        state[COPIED] = 0
    elif i.opcode.startswith("FENCE.VIEW.ASYNC") and not i.guarded:
        state.pop(COPIED, None)
    elif ASYNC_PRODUCT.match(i.stem):
        sums, sources = _operands(i)
        for kind, numbers in (("sum", sums), ("A", sources)):
            for number in numbers:
                state[kind, number] = 0
        if i.operands[-1].startswith("gsb"):
            if i.operands[-1] != "gsb0":
                raise ValueError(f"{i.opcode}: {i.operands[-1]} is not known")
            for key in state:
                if key[0] in ("sum", "A"):
                    state[key] = min(state[key] + 1, MAX_GROUPS)
    return text


def _apply_wait(i: Instruction, state: State) -> None:
    if i.operands[0] != "gsb0" or not i.opcode.endswith(".LE"):
        raise ValueError(f"{i.opcode} {', '.join(i.operands)}: this wait is not known")
    left = int(i.operands[1], 0)
    for key in [] if i.guarded else [key for key, age in state.items() if key[0] in ("sum", "A") and age > left]:
        del state[key]


def _early_access(i: Instruction, state: State) -> str | None:
    sums, sources = _operands(i) if ASYNC_PRODUCT.match(i.stem) else ([], [])
    written = sums if sums else list(_written(i))
    for number in written:
        if ("A", number) in state:
            return f"{i.opcode} writes R{number}, of A, before the wait"
    used = sources if sums else [*written, *(int(n) for operand in i.operands for n in _SOURCES.findall(operand))]
    for number in used:
        if ("sum", number) in state:
            return f"{i.opcode} uses R{number}, of the sums, before the wait"
    if COPIED in state and READS_SHARED.match(i.stem) and any("gdesc" in operand for operand in i.operands):
        return f"{i.opcode} reads what was copied to shared memory, without a fence of the asynchronous proxy"
    return None


def _operands(i: Instruction) -> tuple[list[int], list[int]]:
    """The registers of the sums and of A."""
    _, shape, kind, *_ = [*i.opcode.split("."), "", ""]
    columns = int(shape.split("x")[1])
    to, a = _REGISTER.match(i.operands[0]), _REGISTER.match(i.operands[1])
    if to is None:
        raise ValueError(f"{i.opcode} {', '.join(i.operands)}: its sums are not in registers")
    return _register_range(to, columns // (4 if kind == "F16" else 2)), _register_range(a, 4) if a else []


def _register_range(first: re.Match[str], count: int) -> list[int]:
    return list(range(int(first[1]), int(first[1]) + count))


def _written(i: Instruction) -> Iterator[int]:
    """The registers that one instruction writes."""
    if i.stem in _NOTHING or not i.operands:
        return
    place = i.operands[0]
    if re.match(r"!?U?P[T\d]", place) and i.stem in _AFTER_PREDICATE and len(i.operands) > 1:
        place = i.operands[1]
    found = _REGISTER.match(place)
    if found:
        yield from _register_range(found, _registers_written(i))


def _registers_written(i: Instruction) -> int:
    if i.stem in ("LDSM", "MOVM"):
        return int(i.opcode[-1]) if i.opcode[-2:] in (".2", ".4") else 1
    if i.stem.endswith("MMA"):
        return 2 if i.stem == "HMMA" and i.opcode.endswith(".F16") else 4
    size = re.search(r"\.(64|128)\b", i.opcode)
    return int(size[1]) // 32 if size else 2 if _WIDE.match(i.opcode) else 1
