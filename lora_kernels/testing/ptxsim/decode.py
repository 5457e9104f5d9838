"""One kernel's PTX as the simulator's instructions: opcodes by their meaning, operands by their place in a warp's registers.

The simulator's table (csrc/ptxsim) gives the widths of most opcodes' operands. What PTX writes in many ways becomes one:
`mov.u32`, `mov.f32` and `mov.b32` are `mov.b32`; hints for caches and alignment are dropped. A rounding, a saturation or
a flush to zero that the table does not have is not dropped: it is `Unsupported`.
"""

import re
from typing import Any

from lora_kernels import _ptxsim
from lora_kernels.testing.ptxsim.emitter import TABLE, pieces
from lora_kernels.testing.ptxsim.hopper import Hopper
from lora_kernels.testing.ptxsim.places import SPECIAL
from lora_kernels.testing.ptxsim.text import WIDTH, Kernel, Statement, Unsupported, parse, split

GENERIC, GLOBAL, SHARED, LOCAL, PARAM = range(5)
SPACES = {"global": GLOBAL, "shared": SHARED, "shared::cta": SHARED, "local": LOCAL, "param": PARAM, "const": GLOBAL}
WEAK, RELAXED, ACQUIRE, RELEASE = 0, 1, 2, 4
ORDERS = {
    "weak": WEAK, "volatile": RELAXED, "relaxed": RELAXED, "acquire": ACQUIRE, "release": RELEASE, "acq_rel": ACQUIRE | RELEASE,
    "mmio": RELAXED,
}  # fmt: skip
BITWISE = ("mov", "selp", "shl", "not", "and", "or", "xor", "cnot", "ld", "st")
APPROXIMATE = ("ex2", "lg2", "rsqrt", "rcp", "sqrt", "sin", "cos", "tanh", "div")
ALONE = {"ret": "exit", "exit": "exit", "griddepcontrol": "griddepcontrol"}
NOTHING = ("prefetch", "prefetchu", "discard", "applypriority")
INTEGERS = {"u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"}


class Decoded:
    """A kernel that can be launched: `program` is the simulator's, `parameters` say where the arguments go."""

    def __init__(self, text: str, entry: str | None = None) -> None:
        self.kernel = parse(text, entry)
        self.parameters = self.kernel.parameters
        decoder = _Decoder(self.kernel)
        for statement in self.kernel.statements:
            decoder.starts.append(len(decoder.code))
            decoder.statement(statement)
        decoder.guard = (-1, False)
        decoder.emit("exit", [], [])  # a body may end without ret
        self.program = _ptxsim.Program(
            decoder.linked(), bytes(decoder.image), {name: decoder.slots[name] for name in SPECIAL if name in decoder.slots},
            self.kernel.shared_bytes, self.kernel.local_bytes,
        )  # fmt: skip


class _Decoder(Hopper):
    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.starts: list[int] = []
        self.jumps: list[tuple[int, str, int]] = []

    def linked(self) -> list[Any]:
        for index, label, line in self.jumps:
            if label not in self.kernel.labels:
                raise Unsupported(f"ptxsim: line {line}: there is no label {label}")
            target = self.kernel.labels[label]
            name, operands, _, *rest = self.code[index]
            self.code[index] = (
                name,
                operands,
                [self.starts[target] if target < len(self.starts) else len(self.code) - 1],
                *rest,
            )
        return self.code

    def statement(self, s: Statement) -> None:
        self.line = s.line
        self.guard = (-1, False) if s.guard is None else (self.slot(s.guard.lstrip("!"), 1), s.guard[0] == "!")
        parts = s.opcode.split(".")
        form = getattr(self, f"_{parts[0]}", None)
        if form is not None:
            try:
                form(parts, s.operands)
            except (ValueError, IndexError, KeyError, StopIteration) as error:
                raise self.unsupported(f"{s.opcode} {', '.join(s.operands)}") from error
        elif parts[0] in ALONE:
            self.emit(ALONE[parts[0]], [], [])
        elif parts[0] not in NOTHING:
            self.plain(self.meaning(parts), s.operands)

    def meaning(self, parts: list[str]) -> str:
        """The table's name of an opcode."""
        base, rest = parts[0], parts[1:]
        kind = rest[-1] if rest else ""
        dropped = {"rn"} if kind.startswith(("f", "bf")) else set()
        if base in APPROXIMATE:
            dropped |= {"approx", "full"}
        rest = [each for each in rest if each not in dropped and base != "nanosleep"]
        if base in BITWISE and kind in WIDTH and kind != "pred":
            rest[-1] = f"b{WIDTH[kind]}"
        if base == "shr" and kind in WIDTH:
            rest[-1] = kind.replace("b", "u")
        if base in ("brev", "popc", "clz", "prmt", "lop3", "shf", "bfi") and kind in WIDTH:
            rest[-1] = f"b{WIDTH[kind]}"
        if base in ("mul", "mad") and kind in INTEGERS and rest[0] not in ("lo", "hi", "wide"):
            raise self.unsupported(".".join(parts))
        if base == "mad" and kind in ("f32", "f64"):
            base = "fma"
        return ".".join([base, *rest])

    # forms of their own

    def _mov(self, parts: list[str], operands: list[str]) -> None:
        to, source = operands
        kind = parts[-1]
        if to.startswith("{"):
            width = WIDTH[kind] // len(pieces(to))
            for i, piece in enumerate(pieces(to)):
                if piece != "_":
                    place = self.slot(piece, width)
                    self.emit(f"part.b{width}.b{WIDTH[kind]}", [place, self.slot(source, WIDTH[kind])], [i])
        elif source.startswith("{"):
            width = WIDTH[kind] // len(pieces(source))
            places = [self.slot(piece, width) for piece in pieces(source)]
            self.emit(f"pack.b{WIDTH[kind]}.b{width}", [self.slot(to, WIDTH[kind]), *places], [])
        else:
            self.plain(self.meaning(parts), operands)

    def _setp(self, parts: list[str], operands: list[str]) -> None:
        """setp.cmp{.bool}.type p{|q}, a, b{, c}: p = (a cmp b) bool c, q = not (a cmp b) bool c."""
        compare, kind, joins = parts[1], parts[-1], [each for each in parts[2:-1] if each in ("and", "or", "xor")]
        flush = ".ftz" if "ftz" in parts else ""
        if [each for each in parts[2:-1] if each not in joins and each != "ftz"]:
            raise self.unsupported(".".join(parts))
        unsigned = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
        kind = f"u{WIDTH[kind]}" if kind in ("b16", "b32", "b64") else kind
        name = f"setp.{unsigned.get(compare, compare)}{flush}.{kind}"
        targets = operands[0].split("|")
        if name not in TABLE or len(operands) != 3 + len(joins):
            raise self.unsupported(f"the instruction {'.'.join(parts)} with {len(operands)} operands")
        found, guard, values = self.place(1), self.guard, []
        places = [self.slot(operand, WIDTH[kind]) for operand in operands[1:3]]
        self.emit(name, [found, *places], [])
        for target, inverted in zip(targets, (False, True), strict=False):
            value = self.inverse(found) if inverted else found
            if joins:
                joined, third = self.place(1), operands[3]
                other = self.slot(third.lstrip("!"), 1)
                if third.startswith("!"):
                    other = self.inverse(other)
                self.emit(f"{joins[0]}.pred", [joined, value, other], [])
                value = joined
            values.append((target, value))
        if len(values) > 1 and guard[0] >= 0:  # the guard may be the first target
            held = self.place(1)
            self.guard = (-1, False)
            self.emit("mov.pred", [held, guard[0]], [])
            self.guard = (held, guard[1])
        for target, value in values:
            if target != "_":
                self.emit("mov.pred", [self.slot(target, 1), value], [])

    def _cvt(self, parts: list[str], operands: list[str]) -> None:
        *how, to, source = parts[1:]
        if to in ("f16x2", "bf16x2"):
            return self.plain(".".join(parts), operands)
        if source in INTEGERS and to not in INTEGERS:
            how = [each for each in how if each != "rn"]
        if to == source and to not in INTEGERS and not how:
            return self.plain(f"mov.b{WIDTH[to]}", operands)
        name = ".".join(["cvt", *how, to, source])
        given = self.width(operands[1])
        place, kept = None, WIDTH[source]
        if source in INTEGERS and given is not None and given != kept:
            # a register that is wider than the type, always so for 8 bits
            place = self.slot(operands[1], given)
            narrow = self.place(max(16, kept) if kept > 8 else 32)
            self.emit(f"cvt.{source}.u{given}", [narrow, place], [])
            place = narrow
            if kept == 8:
                source = "s32" if source[0] == "s" else "u32"
            name = ".".join(["cvt", *how, to, source])
        place = self.slot(operands[1], WIDTH[source]) if place is None else place
        wanted = self.width(operands[0])
        if name not in TABLE:
            raise self.unsupported(f"the instruction {'.'.join(parts)}")
        made = 32 if WIDTH[to] == 8 else WIDTH[to]
        if wanted == made:
            return self.emit(name, [self.slot(operands[0], made), place], [])
        if wanted is None or to not in INTEGERS:
            raise self.unsupported(f"cvt to {to} into {operands[0]}")
        result = self.place(made)
        self.emit(name, [result, place], [])
        self.emit(f"cvt.{to[0]}{wanted}.{to[0]}{made}", [self.slot(operands[0], wanted), result], [])

    def _memory(self, parts: list[str]) -> tuple[int, str, int, int]:
        """(space, type, elements, order) of a load or store."""
        space, order, count = GENERIC, WEAK, 1
        for each in parts[1:-1]:
            if each in SPACES:
                space = SPACES[each]
            elif each in ORDERS:
                order = ORDERS[each]
            elif each in ("v2", "v4", "v8"):
                count = int(each[1])
            elif (
                each not in ("nc", "gpu", "sys", "cta", "cluster", "ca", "cg", "cs", "cv", "lu", "wb", "wt")
                and "::" not in each
            ):
                raise self.unsupported(".".join(parts))
        return space, parts[-1], count, order

    def _ld(self, parts: list[str], operands: list[str]) -> None:
        space, kind, count, order = self._memory(parts)
        targets = pieces(operands[0])
        width = next((self.width(each) for each in targets if each != "_"), WIDTH[kind]) or WIDTH[kind]
        places = [self.slot(each, width) for each in targets]
        if len(targets) != count:
            raise self.unsupported(f"{'.'.join(parts)} with {len(targets)} registers")
        if space == PARAM:
            found = re.fullmatch(r"\[\s*([\w$]+)\s*(?:\+\s*(\d+))?\s*\]", operands[1])
            offsets = {each.name: each.offset for each in self.kernel.parameters}
            if found and found[1] in offsets:
                base, offset, size = 0, offsets[found[1]] + int(found[2] or 0), 0
            else:
                space, (base, offset, size) = GENERIC, self.address(operands[1])
        else:
            base, offset, size = self.address(operands[1])
        form = [space, offset, size, WIDTH[kind] // 8, width // 8, int(kind[0] == "s"), order, count]
        self.emit("ld", [*places, base], form)

    def _st(self, parts: list[str], operands: list[str]) -> None:
        space, kind, count, order = self._memory(parts)
        sources = pieces(operands[1])
        width = next((self.width(each) for each in sources if self.width(each)), None) or max(16, WIDTH[kind])
        base, offset, size = self.address(operands[0])
        if len(sources) != count:
            raise self.unsupported(f"{'.'.join(parts)} with {len(sources)} registers")
        form = [space, offset, size, WIDTH[kind] // 8, width // 8, 0, order, count]
        self.emit("st", [base, *(self.slot(each, width) for each in sources)], form)

    def _atom(self, parts: list[str], operands: list[str]) -> None:
        space, order, rest = GENERIC, RELAXED, []
        for each in parts[1:]:
            if each in SPACES:
                space = SPACES[each]
            elif each in ORDERS:
                order = ORDERS[each]
            elif each not in ("gpu", "sys", "cta", "cluster", "noftz") and "::" not in each:
                rest.append(each)
        operation, kind = rest[0], rest[-1]
        if operation in ("exch", "cas", "and", "or", "xor"):
            kind = f"b{WIDTH[kind]}"
        name = ".".join([parts[0], operation, kind])
        has_result = parts[0] == "atom"
        if len(rest) != 2 or name not in TABLE or len(operands) != has_result + (3 if operation == "cas" else 2):
            raise self.unsupported(f"the instruction {'.'.join(parts)} with {len(operands)} operands")
        places = [self.slot(operands[0], WIDTH[kind])] if has_result else []
        address, *values = operands[has_result:]
        base, offset, size = self.address(address)
        form = [space, offset, size, WIDTH[kind] // 8, WIDTH[kind] // 8, 0, order, len(values)]
        self.emit(name, [*places, base, *(self.slot(each, WIDTH[kind]) for each in values)], form)

    _red = _atom

    def _cp(self, parts: list[str], operands: list[str]) -> None:
        if parts[1] != "async":
            raise self.unsupported(".".join(parts))
        if "bulk" in parts:
            return self.bulk(parts, operands)
        if "mbarrier" in parts:
            return self.arrive_after_copies(parts, operands)
        if parts[2] in ("commit_group", "wait_group", "wait_all"):
            return self.plain(".".join(parts[:3]), operands)
        to, to_offset, to_size = self.address(operands[0])
        source, source_offset, source_size = self.address(operands[1])
        hints = int("L2::cache_hint" in parts)
        if not 3 <= len(operands) - hints <= 4:
            raise self.unsupported(f"{'.'.join(parts)} with {len(operands)} operands")
        taken = [self.slot(operands[3], 32)] if len(operands) - hints == 4 else []
        size = self.value(operands[2], 32)
        if size not in ((16,) if "cg" in parts else (4, 8, 16)):
            raise self.unsupported(f"{'.'.join(parts)} of {size} bytes")
        form = [to_offset, source_offset, size, len(taken), to_size, source_size]
        self.emit("cp.async", [to, source, *taken], form)

    def _ldmatrix(self, parts: list[str], operands: list[str]) -> None:
        count = next(int(each[1]) for each in parts if each in ("x1", "x2", "x4"))
        if "m8n8" not in parts or parts[-1] != "b16":
            raise self.unsupported(".".join(parts))
        load = parts[0] == "ldmatrix"
        registers, address = operands if load else reversed(operands)
        base, offset, size = self.address(address)
        places = [self.slot(each, 32) for each in split(registers[1:-1])]
        if len(places) != count:
            raise self.unsupported(f"{'.'.join(parts)} with {len(places)} registers")
        self.emit(parts[0], [*places, base] if load else [base, *places], [offset, size, count, int("trans" in parts)])

    _stmatrix = _ldmatrix

    def _mma(self, parts: list[str], operands: list[str]) -> None:
        name = ".".join(["mma", *(each for each in parts[1:] if each not in ("sync", "aligned"))])
        self.plain(name, [each for operand in operands for each in pieces(operand)])

    def _shfl(self, parts: list[str], operands: list[str]) -> None:
        to = operands[0].split("|")
        self.plain(".".join(parts), [to[0], to[1] if len(to) > 1 else "_", *operands[1:]])

    def _bar(self, parts: list[str], operands: list[str]) -> None:
        if "warp" in parts:
            return self.plain("bar.warp.sync", operands)
        kind = next((each for each in parts[1:] if each in ("sync", "arrive")), None)
        if kind is None:
            raise self.unsupported(".".join(parts))
        places: list[int] = []
        numbers: list[int] = []
        for operand in (*operands, "0")[:2]:
            register = self.width(operand) is not None
            number = -1 if register else self.value(operand, 32)
            if not register and (number < 0 or (len(numbers) == 1 and number % 32)):
                raise self.unsupported(f"{'.'.join(parts)} {', '.join(operands)}")
            numbers.append(number)
            if register:
                places.append(self.slot(operand, 32))
        self.emit(f"bar.{kind}", places, numbers)

    _barrier = _bar

    def _bra(self, parts: list[str], operands: list[str]) -> None:
        self.jumps.append((len(self.code), operands[0], self.line))
        self.emit("bra", [], [0])

    def _fence(self, parts: list[str], operands: list[str]) -> None:
        if "proxy" in parts or "mbarrier_init" in parts:
            return self.fence_proxy(parts, operands)
        wide = any(each in ("gpu", "sys", "gl", "cluster") for each in parts)
        self.emit("fence" if wide else "fence.cta", [], [])

    _membar = _fence

    def _cvta(self, parts: list[str], operands: list[str]) -> None:
        space = next(each for each in parts[1:] if each in SPACES)
        name = (
            "mov.b64"
            if space in ("global", "param", "const")
            else f"cvta.{'to.' if 'to' in parts else ''}{space.split('::')[0]}"
        )
        self.plain(name, operands)

    def _createpolicy(self, parts: list[str], operands: list[str]) -> None:
        self.plain("mov.b64", [operands[0], "0"])

    def _max(self, parts: list[str], operands: list[str]) -> None:
        name = self.meaning(parts)
        self.plain(name.replace(parts[0], f"{parts[0]}3", 1) if len(operands) == 4 else name, operands)

    _min = _max
