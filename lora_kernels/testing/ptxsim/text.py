"""PTX text as statements: registers, memory, parameters, labels and instructions of one kernel. PTX ISA §4 and §5."""

import re
from dataclasses import dataclass, field

WIDTH = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32, "u32": 32,
    "s32": 32, "f32": 32, "tf32": 32, "f16x2": 32, "bf16x2": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64,
}  # fmt: skip


class Unsupported(NotImplementedError):
    """The text holds something that the simulator does not know; the message names the line."""


@dataclass
class Statement:
    """One instruction: `@!%p add.s32 %r1, %r2, 3` is guard "!%p", opcode "add.s32" and three operands."""

    line: int
    guard: str | None
    opcode: str
    operands: list[str]


@dataclass
class Parameter:
    name: str
    offset: int
    bytes: int
    type: str


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)
    """Width in bits of each register."""
    shared: dict[str, int] = field(default_factory=dict)
    """Offset of each shared variable; one of dynamic size lies after all others."""
    shared_bytes: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    most_threads: int | None = None
    """Of a block, by .maxntid or .reqntid."""
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    """The index of the statement that follows each label."""


def parse(text: str, entry: str | None = None) -> Kernel:
    """The kernel of that name (or part of it); the first one if none is given."""
    clean = _without_comments(text)
    heads = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{;]*)\{", clean))
    wanted = [head for head in heads if head.group(1) == entry]
    wanted = wanted or [head for head in heads if entry is None or entry in head.group(1)]
    if not wanted:
        raise ValueError(f"ptxsim: the text has no kernel {entry or ''}; it has {[head.group(1) for head in heads]}")
    head = wanted[0]
    kernel = Kernel(head.group(1))
    _parameters(kernel, head.group(2))
    dynamic: list[str] = []
    end = min((other.start() for other in heads if other.start() > head.start()), default=len(clean))
    body = clean[head.end() : end]
    for found in re.finditer(
        r"(?m)^\s*(?:\.(?:visible|weak|extern|common)\s+)*(\.shared\b[^;]*);", clean[: head.start()]
    ):
        name = re.search(r"([\w$.]+)(?:\[\d*\])*\s*$", found.group(1))
        if name and re.search(rf"(?<![\w$.]){re.escape(name[1])}(?![\w$])", body):  # others are another kernel's
            _variable(kernel, found.group(1), dynamic, clean.count("\n", 0, found.start(1)) + 1)
    limit = re.search(r"\.(?:max|req)ntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", head.group(3))
    if limit:
        kernel.most_threads = int(limit[1]) * int(limit[2] or 1) * int(limit[3] or 1)
    _Body(kernel, dynamic).read(clean, head.end())
    kernel.shared_bytes = -(-kernel.shared_bytes // 128) * 128
    kernel.shared.update(dict.fromkeys(dynamic, kernel.shared_bytes))
    return kernel


def split(operands: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth, part = [], 0, ""
    for character in operands:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += character
    return [*parts, part.strip()] if part.strip() else parts


def _without_comments(text: str) -> str:
    """The same lines without comments and debug sections."""
    text = re.sub(r"/\*.*?\*/", lambda found: "\n" * found.group().count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    section = re.search(r"(?m)^\s*\.section\b", text)
    return text[: section.start()] if section else text


def _parameters(kernel: Kernel, text: str) -> None:
    offset = 0
    for declared in split(text):
        found = re.fullmatch(
            r"\.param(?:\s+\.align\s+(\d+))?\s+\.(\w+)(?:\s+\.ptr(?:\s+\.\w+)?(?:\s+\.align\s+\d+)?)?\s+([\w$]+)(?:\[(\d+)\])?",
            declared,
        )
        if not found:
            raise Unsupported(f"ptxsim: the parameter {declared}")
        align, kind, name, count = found.groups()
        size = WIDTH[kind] // 8 * int(count or 1)
        step = int(align or min(size, 8))
        offset = -(-offset // step) * step
        kernel.parameters.append(Parameter(name, offset, size, kind))
        offset += size


def _variable(kernel: Kernel, text: str, dynamic: list[str], line: int) -> None:
    found = re.fullmatch(r"\.(\w+)(?:\s+\.align\s+(\d+))?\s+\.(\w+)\s+([\w$.]+)((?:\[\d*\])*)", text.strip())
    if not found or found.group(1) not in ("shared", "local"):
        raise Unsupported(f"ptxsim: line {line}: the variable {text.strip()}")
    space, align, kind, name, sizes = found.groups()
    if sizes == "[]":
        if name not in dynamic:
            dynamic.append(name)
        return
    size = WIDTH[kind] // 8
    for count in re.findall(r"\d+", sizes):
        size *= int(count)
    step = int(align or WIDTH[kind] // 8)
    if space == "shared":
        kernel.shared[name] = -(-kernel.shared_bytes // step) * step
        kernel.shared_bytes = kernel.shared[name] + size
    else:
        kernel.local[name] = -(-kernel.local_bytes // step) * step
        kernel.local_bytes = -(-(kernel.local[name] + size) // 16) * 16


class _Body:
    """The statements between the braces of a kernel. Inner braces make a scope: its registers get names of their own."""

    def __init__(self, kernel: Kernel, dynamic: list[str]) -> None:
        self.kernel, self.dynamic = kernel, dynamic
        self.scopes: list[dict[str, str]] = [{}]
        self.inner = 0

    def read(self, text: str, at: int) -> None:
        line = text.count("\n", 0, at) + 1
        token = re.compile(
            r"\s*(?:(\{|\})|([\w$%.]+)\s*:(?!:)|(\.(?:loc|file)\b[^\n;]*;?|\.pragma\b[^\n;]*;)|((?:[^;{}]+|\{[^{}]*\})*;))",
            re.S,
        )
        while self.scopes:
            found = token.match(text, at)
            if not found:
                raise Unsupported(f"ptxsim: line {line}: {text[at : at + 60].strip()!r}")
            brace, label, _, statement = found.groups()
            begin = line + text.count("\n", at, at + len(found.group()) - len(found.group().lstrip()))
            line += text.count("\n", at, found.end())
            at = found.end()
            if brace == "{":
                self.scopes.append(self._labels_of(text, at))
            elif brace == "}":
                self.scopes.pop()
            elif label:
                self.kernel.labels[self._renamed(label)] = len(self.kernel.statements)
            elif statement and statement.strip(" \n\t;"):
                self._statement(" ".join(statement.strip()[:-1].split()), begin)

    def _labels_of(self, text: str, at: int) -> dict[str, str]:
        """The labels of the scope that begins there, which branches may name before they come."""
        depth, end = 1, at
        while depth and end < len(text):
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        found = re.findall(r"(?:^|[\s;{}])([A-Za-z$%_][\w$%.]*)\s*:(?!:)", text[at:end])
        self.inner += bool(found)
        return {label: f"{label}@{self.inner}" for label in found}

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self._registers(text, line)
        elif text.startswith((".shared", ".local")):
            _variable(self.kernel, text, self.dynamic, line)
        elif text.startswith(".pragma"):
            pass
        elif text.startswith("."):
            raise Unsupported(f"ptxsim: line {line}: {text}")
        else:
            guard, opcode, operands = re.fullmatch(r"(?:@(!?[%\w$]+)\s+)?([\w.:]+)\s*(.*)", text).groups()  # type: ignore[union-attr]
            self.kernel.statements.append(
                Statement(line, guard and self._renamed(guard), opcode, [self._renamed(each) for each in split(operands)])
            )

    def _registers(self, text: str, line: int) -> None:
        found = re.fullmatch(r"\.reg\s*\.(\w+)\s+(.*)", text)
        if not found or found[1] not in WIDTH:
            raise Unsupported(f"ptxsim: line {line}: {text}")
        kind, names = found.groups()
        for name in split(names):
            many = re.fullmatch(r"(.+)<(\d+)>", name)
            for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                own = each
                if len(self.scopes) > 1:
                    self.inner += 1
                    own = f"{each}@{self.inner}"
                self.scopes[-1][each] = own
                self.kernel.registers[own] = WIDTH[kind]

    def _renamed(self, operand: str) -> str:
        if len(self.scopes) == 1:
            return operand

        def own(found: re.Match[str]) -> str:
            for scope in reversed(self.scopes):
                if found.group() in scope:
                    return scope[found.group()]
            return found.group()

        return re.sub(r"[%\w$]+", own, operand)
