"""The assembly text that LLVM makes for AMD's chips."""

import re

from lora_kernels.testing.gates.code import Code, Instruction


def read_amdgcn(text: str) -> Code:
    """The only kernel of an assembly file.

    Raises:
        ValueError: no number of that name in the text.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.partition(".amdhsa_kernel")[0].splitlines():
        label = re.match(r"(\.L\w+):", line)
        found = re.match(r"\s+([a-z]\w+)(?:\s+(\.L\w+))?", line)
        if label:
            labels[label[1]] = len(instructions)
        elif found:
            opcode, target = found.groups()
            branch = opcode.startswith(("s_branch", "s_cbranch"))
            last = opcode in ("s_branch", "s_endpgm", "s_setpc_b64")
            instructions.append(Instruction(opcode, target if branch else None, last))
    return Code(
        registers=_metadata_number(text, ".vgpr_count"), stack=_metadata_number(text, ".private_segment_fixed_size"),
        spills=_metadata_number(text, ".vgpr_spill_count") + _metadata_number(text, ".sgpr_spill_count"),
        shared=_metadata_number(text, ".group_segment_fixed_size"), instructions=tuple(instructions), labels=labels,
        waves=_metadata_number(text, "; Occupancy"),
    )  # fmt: skip


def _metadata_number(text: str, name: str) -> int:
    found = re.search(rf"^\s*{re.escape(name)}:\s*(\d+)", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"amdgcn: no {name}")
    return int(found[1])
