"""PTX text as statements: registers, memory, parameters, labels and instructions of one kernel. PTX
ISA §4 and §5."""

import re
from dataclasses import dataclass, field

from lora_kernels.ptxsim.module import WIDTH, Function, Unsupported, Variable, functions, variables

__all__ = ["WIDTH", "Kernel", "Parameter", "Statement", "Unsupported", "parse", "split"]

@dataclass
class Statement:
    """One instruction: `@!%p add.s32 %r1, %r2, 3` is guard "!%p", opcode "add.s32" and three
    operands."""

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
    """Width in bits of each register; one of 8 bits has 16."""
    shared: dict[str, int] = field(default_factory=dict)
    """Offset of each shared variable; one of dynamic size lies after all others."""
    shared_bytes: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    most_threads: int | None = None
    """Of a block, by .maxntid or .reqntid."""
    variables: dict[str, Variable] = field(default_factory=dict)
    """Of the module, as far as the kernel may name them."""
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
    called = functions(clean)
    body = clean[head.end() : end] + "".join(clean[each.begin :].split("\n}", 1)[0] for each in called.values())
    kernel.variables = variables(clean, body)
    for found in re.finditer(
        r"(?m)^\s*(?:\.(?:visible|weak|extern|common)\s+)*(\.shared\b[^;]*);", clean[: head.start()]
    ):
        name = re.search(r"([\w$.]+)(?:\[\d*\])*\s*$", found.group(1))
        # others are another kernel's
        if name and re.search(rf"(?<![\w$.]){re.escape(name[1])}(?![\w$])", body):
            _variable(kernel, found.group(1), dynamic, clean.count("\n", 0, found.start(1)) + 1)
    limit = re.search(r"\.(?:max|req)ntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", head.group(3))
    if limit:
        kernel.most_threads = int(limit[1]) * int(limit[2] or 1) * int(limit[3] or 1)
    clusters = re.search(r"\.reqnctapercluster\s+([\d,\s]+)", head.group(3))
    if clusters and {int(each) for each in re.findall(r"\d+", clusters[1])} != {1}:
        raise Unsupported(f"ptxsim: line {clean.count(chr(10), 0, head.start()) + 1}: clusters of several blocks")
    _Body(kernel, dynamic, clean, called).read(head.end())
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
    """The statements between the braces of a kernel. Inner braces make a scope: its registers get
    names of their own."""

    def __init__(self, kernel: Kernel, dynamic: list[str], text: str, called: dict[str, Function]) -> None:
        self.kernel, self.dynamic, self.text, self.called = kernel, dynamic, text, called
        self.scopes: list[dict[str, str]] = [{}]
        self.inner = 0
        self.inside: list[str] = []  # of which functions
        self.ends: list[str] = []  # the labels behind their calls

    def read(self, at: int) -> None:
        """The scope that has just begun, to its end."""
        text, outer = self.text, len(self.scopes) - 1
        line = text.count("\n", 0, at) + 1
        token = re.compile(
            r"\s*(?:(\{|\})|([\w$%.]+)\s*:(?!:)|(\.(?:loc|file)\b[^\n;]*;?|\.pragma\b[^\n;]*;)|((?:[^;{}]+|\{[^{}]*\})*;))",
            re.S,
        )
        while len(self.scopes) > outer:
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
        elif text.startswith(".param"):
            self._argument(text, line)
        elif text.startswith("."):
            raise Unsupported(f"ptxsim: line {line}: {text}")
        else:
            found = re.fullmatch(r"(?:@(!?[%\w$]+)\s+)?([\w.:]+)\s*(.*)", text)
            if not found:
                raise Unsupported(f"ptxsim: line {line}: {text}")
            guard, opcode, operands = found[1] and self._renamed(found[1]), found[2], split(found[3])
            function = next((each for each in operands if each in self.called), "")
            if opcode in ("call", "call.uni") and function:
                return self._call(line, guard, function, [self._renamed(each) for each in operands if each != function])
            if opcode in ("ret", "ret.uni") and self.ends:
                opcode, operands = "bra", [self.ends[-1]]
            self.kernel.statements.append(Statement(line, guard, opcode, [self._renamed(each) for each in operands]))

    def _call(self, line: int, guard: str | None, name: str, given: list[str]) -> None:
        """The function's body in place of its call, PTX ISA §7.1: its parameters are the caller's
        memory for them."""
        function, given = self.called[name], [each for part in given for each in split(part[1:-1])]
        wanted = [*function.results, *function.parameters]
        if name in self.inside or len(given) != len(wanted) or not set(given) <= set(self.kernel.local):
            raise Unsupported(f"ptxsim: line {line}: the call of {name}, {', '.join(given)}")
        self.inner += 1
        end = f"{name}@{self.inner}"
        if guard:
            skip = guard[1:] if guard[0] == "!" else f"!{guard}"
            self.kernel.statements.append(Statement(line, skip, "bra", [end]))
        self.inside.append(name)
        self.ends.append(end)
        self.scopes.append({**self._labels_of(self.text, function.begin), **dict(zip(wanted, given, strict=True))})
        self.read(function.begin)
        self.inside.pop()
        self.kernel.labels[self.ends.pop()] = len(self.kernel.statements)

    def _argument(self, text: str, line: int) -> None:
        """`.param` in a body is memory of the thread for a call."""
        found = re.fullmatch(r"\.param(?:\s+\.align\s+(\d+))?\s+\.(\w+)\s+([\w$]+)((?:\[\d+\])?)", text)
        if not found:
            raise Unsupported(f"ptxsim: line {line}: {text}")
        self.inner += 1
        align, kind, name, count = found.groups()
        own = self.scopes[-1][name] = f"{name}@{self.inner}"
        _variable(self.kernel, f".local .align {align or WIDTH[kind] // 8} .{kind} {name}{count}", [], line)
        self.kernel.local[own] = self.kernel.local.pop(name)

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
                self.kernel.registers[own] = 16 if WIDTH[kind] == 8 else WIDTH[kind]

    def _renamed(self, operand: str) -> str:
        if len(self.scopes) == 1:
            return operand

        def own(found: re.Match[str]) -> str:
            for scope in reversed(self.scopes):
                if found.group() in scope:
                    return scope[found.group()]
            return found.group()

        return re.sub(r"[%\w$]+", own, operand)
