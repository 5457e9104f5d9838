"""Arithmetic, comparisons and conversions as the table names them."""

from lora_kernels.ptxsim.emitter import TABLE, Emitter
from lora_kernels.ptxsim.text import WIDTH, Kernel

BITWISE = ("mov", "selp", "shl", "not", "and", "or", "xor", "cnot", "ld", "st")
APPROXIMATE = ("ex2", "lg2", "rsqrt", "rcp", "sqrt", "sin", "cos", "tanh", "div")
INTEGERS = {"u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"}
ONES = {"f16": 0x3C00, "bf16": 0x3F80, "f32": 0x3F800000}


class Values(Emitter):
    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.carry: int | None = None

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

    def _setp(self, parts: list[str], operands: list[str]) -> None:
        """setp.cmp{.bool}.type p{|q}, a, b{, c}: p = (a cmp b) bool c, q = not (a cmp b) bool c; of
        two halves q is that of the upper ones."""
        joins = [each for each in parts[2:-1] if each in ("and", "or", "xor")]
        targets, guard, values = operands[0].split("|"), self.guard, []
        if len(operands) != 3 + len(joins):
            raise self.unsupported(f"the instruction {'.'.join(parts)} with {len(operands)} operands")
        found = self.compared(parts[1], [each for each in parts[2:] if each not in joins], operands[1:3])
        if len(found) < len(targets):
            found = [found[0], self.inverse(found[0])]
        for target, value in zip(targets, found, strict=False):
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

    def compared(self, compare: str, how: list[str], operands: list[str]) -> list[int]:
        """The predicates of a comparison: one, or of numbers that lie two in a register those of
        the lower and upper."""
        kind = how[-1]
        unsigned = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
        kind = f"u{WIDTH[kind]}" if kind in ("b16", "b32", "b64") else kind
        name = ".".join(["setp", unsigned.get(compare, compare), *how[:-1], kind.removesuffix("x2")])
        if name not in TABLE:
            raise self.unsupported(f"the comparison {compare}.{'.'.join(how)}")
        places = [self.slot(operand, WIDTH[kind]) for operand in operands]
        found = []
        for part in range(2 if kind.endswith("x2") else 1):
            found.append(self.place(1))
            self.emit(name, [found[-1], *(self.half(each, part) if kind.endswith("x2") else each for each in places)], [])
        return found

    def half(self, place: int, part: int) -> int:
        """The lower or upper 16 bits of a register."""
        half = self.place(16)
        self.emit("part.b16.b32", [half, place], [part])
        return half

    def _set(self, parts: list[str], operands: list[str]) -> None:
        """set.cmp.to.type d, a, b: 1 or 0 as a float, else all bits or none."""
        to, kind = parts[-2:]
        found = self.compared(parts[1], [*parts[2:-2], kind], operands[1:])
        width = WIDTH[to] // len(found)
        yes = ONES.get(to.removesuffix("x2"), (1 << width) - 1)
        places = [self.place(width) for _ in found] if len(found) > 1 else [self.slot(operands[0], width)]
        for place, predicate in zip(places, found, strict=True):
            self.emit(f"selp.b{width}", [place, self.constant(width, yes), self.constant(width, 0), predicate], [])
        if len(found) > 1:
            self.emit("pack.b32.b16", [self.slot(operands[0], 32), *places], [])

    def with_carry(self, parts: list[str], operands: list[str]) -> None:
        """add.cc, addc, sub.cc, subc, mad.cc, madc: the carry is a predicate that nothing else
        names. PTX ISA 9.7.2."""
        base, kind = parts[0], parts[-1]
        takes = base in ("addc", "subc", "madc")
        which = [base[:3], *(each for each in parts[1:-1] if each != "cc")]
        if kind[0] == "s" and which[-1] == "hi":
            raise self.unsupported(".".join(parts))
        if self.carry is None:
            self.carry = self.place(1)
        given = self.carry if takes else self.constant(1, int(base == "sub"))
        to, *sources = [self.slot(each, WIDTH[kind]) for each in operands]
        name = f"{'.'.join(which)}.carry.u{WIDTH[kind]}"
        if name not in TABLE or len(operands) != (4 if which[0] == "mad" else 3):
            raise self.unsupported(f"{'.'.join(parts)} with {len(operands)} operands")
        self.emit(name, [to, self.carry if "cc" in parts else self.place(1), *sources, given], [])

    _addc = _subc = _madc = with_carry

    def _add(self, parts: list[str], operands: list[str]) -> None:
        if "cc" in parts:
            return self.with_carry(parts, operands)
        self.plain(self.meaning(parts), operands)

    _sub = _mad = _add

    def _cvt(self, parts: list[str], operands: list[str]) -> None:
        *how, to, source = parts[1:]
        if to.endswith("x2"):
            return self.plain(".".join(parts), operands)
        if source in INTEGERS and to not in INTEGERS:
            # an integer is never so small
            how = [each for each in how if each not in ("rn", "ftz")]
        if to in INTEGERS and source not in INTEGERS:  # which saturates in any case
            how = [each for each in how if each != "sat"]
        if to == source and to not in INTEGERS and not how:
            return self.plain(f"mov.b{WIDTH[to]}", operands)
        name = ".".join(["cvt", *how, to, source])
        given = self.width(operands[1])
        place, source_width = None, WIDTH[source]
        if source in INTEGERS and given is not None and given != source_width:
            # a register that is wider than the type, always so for 8 bits
            place = self.slot(operands[1], given)
            narrow = self.place(max(16, source_width) if source_width > 8 else 32)
            self.emit(f"cvt.{source}.u{given}", [narrow, place], [])
            place = narrow
            if source_width == 8:
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

    def _max(self, parts: list[str], operands: list[str]) -> None:
        name = self.meaning(parts)
        self.plain(name.replace(parts[0], f"{parts[0]}3", 1) if len(operands) == 4 else name, operands)

    _min = _max
