"""One kernel's PTX as the simulator's instructions: opcodes by their meaning, operands by their
place in a warp's registers.

The simulator's table (csrc/ptxsim) gives the widths of most opcodes' operands. What PTX writes in
many ways becomes one: `mov.u32`, `mov.f32` and `mov.b32` are `mov.b32`; hints for caches and
alignment are dropped. A rounding, a saturation or a flush to zero that the table does not have is
not dropped: it is `Unsupported`.
"""

import re
from typing import Any

from lora_kernels import _ptxsim
from lora_kernels.ptxsim.emitter import TABLE, pieces
from lora_kernels.ptxsim.hopper import Hopper
from lora_kernels.ptxsim.places import PARAMETER_WINDOW, SPECIAL
from lora_kernels.ptxsim.text import WIDTH, Kernel, Statement, Unsupported, parse, split
from lora_kernels.ptxsim.values import Values

GENERIC, GLOBAL, SHARED, LOCAL, PARAM, CONST = range(6)
SPACES = {
    "global": GLOBAL, "shared": SHARED, "shared::cta": SHARED, "shared::cluster": SHARED, "local": LOCAL, "param": PARAM,
    "param::entry": PARAM, "param::func": PARAM, "const": CONST,
}  # fmt: skip
WEAK, RELAXED, ACQUIRE, RELEASE = 0, 1, 2, 4
ORDERS = {
    "weak": WEAK, "volatile": RELAXED, "relaxed": RELAXED, "acquire": ACQUIRE, "release": RELEASE, "acq_rel": ACQUIRE | RELEASE,
    "mmio": RELAXED,
}  # fmt: skip
ALONE = {
    "ret": ["exit"], "exit": ["exit"], "trap": ["trap", "exit"], "brkpt": ["trap", "exit"],
}  # fmt: skip
CLOCKS = {"%clock": 32, "%clock64": 64, "%globaltimer": 64, "%globaltimer_lo": 32}
NOTHING = ("prefetch", "prefetchu", "discard", "applypriority")



class Decoded:
    """A kernel that can be launched: `program` is the simulator's, `parameters` say where the
    arguments go."""

    def __init__(self, text: str, entry: str | None = None) -> None:
        self.kernel = parse(text, entry)
        self.parameters = self.kernel.parameters
        decoder = _Decoder(self.kernel)
        for statement in self.kernel.statements:
            decoder.starts.append(len(decoder.code))
            decoder.statement(statement)
        decoder.guard = (-1, False)
        decoder.emit("exit", [], [])  # a body may end without ret
        self.variables = list(self.kernel.variables.values())
        self.program = _ptxsim.Program(
            decoder.linked(), bytes(decoder.image), {name: decoder.slots[name] for name in SPECIAL if name in decoder.slots},
            self.kernel.shared_bytes, self.kernel.local_bytes,
        )  # fmt: skip


class _Decoder(Hopper, Values):
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
            for name in ALONE[parts[0]]:
                self.emit(name, [], [])
        elif parts[0] not in NOTHING:
            self.plain(self.meaning(parts), s.operands)

    # forms of their own

    def _mov(self, parts: list[str], operands: list[str]) -> None:
        to, source = operands
        kind = parts[-1]
        if source in CLOCKS:
            self.emit(f"clock.b{CLOCKS[source]}", [self.slot(to, CLOCKS[source])], [])
        elif to.startswith("{"):
            width = WIDTH[kind] // len(pieces(to))
            for i, piece in enumerate(pieces(to)):
                if piece != "_":
                    place = self.slot(piece, max(width, 16))
                    self.emit(f"part.b{width}.b{WIDTH[kind]}", [place, self.slot(source, WIDTH[kind])], [i])
        elif source.startswith("{"):
            width = WIDTH[kind] // len(pieces(source))
            places = [self.slot(piece, max(width, 16)) for piece in pieces(source)]
            self.emit(f"pack.b{WIDTH[kind]}.b{width}", [self.slot(to, WIDTH[kind]), *places], [])
        else:
            self.plain(self.meaning(parts), operands)

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

    def in_local(self, space: int, operand: str) -> int:
        """A parameter of a function that was called is the caller's local memory."""
        name = re.match(r"\[\s*([\w$.@]+)", operand)
        return LOCAL if space == PARAM and name and name[1] in self.kernel.local else space

    def _ld(self, parts: list[str], operands: list[str]) -> None:
        space, kind, count, order = self._memory(parts)
        space = self.in_local(space, operands[1])
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

    _ldu = _ld

    def _st(self, parts: list[str], operands: list[str]) -> None:
        space, kind, count, order = self._memory(parts)
        space = self.in_local(space, operands[0])
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
        action = next((each for each in parts[1:] if each in ("sync", "arrive", "red")), None)
        if action is None or "cluster" in parts:
            raise self.unsupported(".".join(parts))
        places: list[int] = []
        numbers: list[int] = []
        made: list[int] = []
        if action == "red":
            operation = next(i for i, each in enumerate(("popc", "and", "or")) if each in parts)
            made, given = [operation], self.slot(operands[-1].lstrip("!"), 1)
            given = self.inverse(given) if operands[-1].startswith("!") else given
            places, operands = [self.slot(operands[0], 1 if operation else 32), given], operands[1:-1]
        for operand in (*operands, "0")[:2]:
            register = self.width(operand) is not None
            number = -1 if register else self.value(operand, 32)
            if not register and (number < 0 or (len(numbers) == 1 and number % 32)):
                raise self.unsupported(f"{'.'.join(parts)} {', '.join(operands)}")
            numbers.append(number)
            if register:
                places.append(self.slot(operand, 32))
        self.emit(f"bar.{action}", places, [*numbers, *made])

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
        if space == "param" and "to" not in parts:
            # Triton 3.9 takes a parameter's address in 32 bits, which leaves its place among the
            # parameters
            return self.plain("or.b64", [*operands, str(PARAMETER_WINDOW)])
        name = (
            "mov.b64"
            if space in ("global", "param", "const")
            else f"cvta.{'to.' if 'to' in parts else ''}{space.split('::')[0]}"
        )
        self.plain(name, operands)

    def _isspacep(self, parts: list[str], operands: list[str]) -> None:
        if parts[1] == "const":
            raise self.unsupported(".".join(parts))
        self.emit("isspacep", [self.slot(operands[0], 1), self.slot(operands[1], 64)], [SPACES[parts[1]]])

    def _griddepcontrol(self, parts: list[str], operands: list[str]) -> None:
        self.plain(".".join(parts), operands)

    def _mapa(self, parts: list[str], operands: list[str]) -> None:
        """A cluster is one block here: the address is its own."""
        width = WIDTH[parts[-1]]
        places = [self.slot(each, bits) for each, bits in zip(operands, (width, width, 32), strict=True)]
        self.emit(f"mapa.b{width}", places, [])

    def _match(self, parts: list[str], operands: list[str]) -> None:
        to = operands[0].split("|")
        self.plain(".".join(parts), [to[0], *(["_"] if "all" in parts and len(to) == 1 else to[1:]), *operands[1:]])

    def _call(self, parts: list[str], operands: list[str]) -> None:
        """Of functions without a body only the one that assertions end in."""
        if operands[0] != "__assertfail":
            raise self.unsupported(f"{'.'.join(parts)} {', '.join(operands)}")
        places = []
        for name, width in zip(split(operands[1][1:-1]), (64, 64, 32), strict=False):
            places.append(self.place(width))
            form = [LOCAL, self.kernel.local[name], 0, width // 8, width // 8, 0, WEAK, 1]
            self.emit("ld", [places[-1], self.constant(64, 0)], form)
        self.emit("assertfail", places, [])
        self.emit("exit", [], [])

    def _createpolicy(self, parts: list[str], operands: list[str]) -> None:
        self.plain("mov.b64", [operands[0], "0"])
