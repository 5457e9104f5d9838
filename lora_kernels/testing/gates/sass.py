"""A cubin read by cuobjdump and nvdisasm."""

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from lora_kernels.testing.gates.code import Code, Instruction

_USAGE = re.compile(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;")
_BRANCHES = {"BRA", "JMP"}
_RESERVED = 1024  # of the driver, counted in SHARED from sm_90 on where a kernel has any


def find_tool(name: str, folder: str = "bin") -> Path | None:
    """A tool or header of NVIDIA's: from triton's wheel, whose version is pinned, from CUDA_HOME or
    from PATH."""
    found = importlib.util.find_spec("triton")
    homes = [Path(place) / "backends" / "nvidia" for place in (found.submodule_search_locations or [] if found else [])]
    homes += [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    for home in homes:
        if (home / folder / name).is_file():
            return home / folder / name
    on_path = shutil.which(name) if folder == "bin" else None
    return Path(on_path) if on_path else None


def missing() -> str | None:
    """What is not here, in words."""
    gone = [name for name in ("cuobjdump", "nvdisasm") if find_tool(name) is None]
    return f"{' and '.join(gone)} in none of the wheel triton, CUDA_HOME and PATH" if gone else None


def read_cubin(cubin: bytes, kernel: str, arch: int) -> Code:
    """One kernel of a cubin for sm_`arch`.

    Raises:
        FileNotFoundError: cuobjdump or nvdisasm is not here.
        ValueError: there is no such kernel, or it branches where it computes.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run_tool("cuobjdump", "-res-usage", file.name)
        text = _run_tool("nvdisasm", "-c", file.name)
    known = {name: tuple(map(int, numbers)) for name, *numbers in _USAGE.findall(usage)}
    if kernel not in known:
        raise ValueError(f"no kernel {kernel} among {', '.join(sorted(known)) or 'none'}")
    registers, stack, shared, local = known[kernel]
    instructions, labels = _parse_disassembly(text, kernel)
    spills = sum(i.stem in ("LDL", "STL") for i in instructions)
    static = max(0, shared - _RESERVED) if arch >= 90 else shared
    return Code(registers, stack + local, spills, static, tuple(instructions), labels)


def _run_tool(tool: str, *arguments: str) -> str:
    path = find_tool(tool)
    if path is None:
        raise FileNotFoundError(missing())
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{tool}: {done.stderr.strip()}")
    return done.stdout


def _parse_disassembly(text: str, kernel: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    inside = False
    for line in text.splitlines():
        if line.lstrip().startswith(".section"):
            inside = False
        label = re.match(r"\s*([.$][^\s:]+):", line)
        if label and label[1].startswith(".text."):
            inside = label[1] == f".text.{kernel}"
        elif label and inside:
            labels[label[1]] = len(instructions)
        found = _LINE.match(line) if inside else None
        if found:
            instructions.append(_instruction(bool(found[1]), found[2], found[3]))
    return instructions, labels


def _instruction(guarded: bool, opcode: str, operands: str) -> Instruction:
    stem = opcode.split(".")[0]
    given = tuple(re.split(r",\s*", operands)) if operands else ()
    if stem in ("BRX", "JMX", "BRXU", "JMXU"):
        raise ValueError(f"{opcode}: where it branches to is computed, so that loops are not known")
    if stem in _BRANCHES:
        target = re.search(r"`\(([^)]+)\)", operands)
        # a predicate may also be the first operand
        last = not guarded and operands.startswith("`(")
        return Instruction(opcode, target[1] if target else None, last, given, guarded)
    return Instruction(opcode, None, stem in ("EXIT", "RET") and not guarded, given, guarded)
