"""Where each operand of a kernel lies among a warp's registers: registers, constants, special
registers, addresses."""

import re
import struct

from lora_kernels.ptxsim.text import Kernel, Unsupported

SPECIAL = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"] + ["%laneid", "%warpid"]
PARAMETER_WINDOW = 0x7D << 56  # generic addresses of the parameters, as in csrc/ptxsim/block.h
LANE_MASKS = {
    "%lanemask_eq": lambda lane: 1 << lane, "%lanemask_lt": lambda lane: (1 << lane) - 1,
    "%lanemask_le": lambda lane: (2 << lane) - 1, "%lanemask_gt": lambda lane: -2 << lane,
    "%lanemask_ge": lambda lane: -1 << lane,
}  # fmt: skip

# the only block of its cluster, on the only multiprocessor
FIXED = {"%smid": 0, "%nsmid": 1, "%cluster_ctarank": 0, "%cluster_nctarank": 1, "%is_explicit_cluster": 0}
FIXED |= {f"%cluster_ctaid.{axis}": 0 for axis in "xyz"} | {f"%cluster_nctaid.{axis}": 1 for axis in "xyz"}
ALIASES = {f"%{n}clusterid.{axis}": f"%{n}ctaid.{axis}" for n in ("", "n") for axis in "xyz"}


class Places:
    """The registers of a warp at its start, `image`, and what lies where in it; all lanes of a
    register side by side."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.image = bytearray()
        self.slots: dict[str, int] = {}
        self.constants: dict[tuple[int, int], int] = {}
        self.line = 0

    def unsupported(self, what: str) -> Unsupported:
        return Unsupported(f"ptxsim: line {self.line}: {what}")

    def place(self, width: int, value: int = 0) -> int:
        """A new register of all lanes."""
        self.image += bytes(-len(self.image) % 64)
        at = len(self.image)
        self.image += struct.pack("<I", -value & 0xFFFFFFFF) if width == 1 else value.to_bytes(width // 8, "little") * 32
        return at

    def constant(self, width: int, value: int) -> int:
        value &= (1 << width) - 1
        if (width, value) not in self.constants:
            self.constants[width, value] = self.place(width, value)
        return self.constants[width, value]

    def width(self, operand: str) -> int | None:
        """The width of a register; None for anything else."""
        return 32 if operand in SPECIAL else self.kernel.registers.get(operand)

    def slot(self, operand: str, width: int) -> int:
        """The place of a register, of a constant, or of an address known beforehand."""
        operand = ALIASES.get(operand, operand)
        if operand in FIXED:
            return self.constant(width, FIXED[operand])
        known = self.width(operand)
        if known is not None:
            if known != width:
                raise self.unsupported(f"{operand} has {known} bits where {width} are wanted")
            if operand not in self.slots:
                self.slots[operand] = self.place(width)
            return self.slots[operand]
        if operand in LANE_MASKS and width == 32:
            if operand not in self.slots:
                self.slots[operand] = self.place(32)
                masks = [LANE_MASKS[operand](lane) & 0xFFFFFFFF for lane in range(32)]
                struct.pack_into("<32I", self.image, self.slots[operand], *masks)
            return self.slots[operand]
        if operand == "_":
            return self.place(width)
        return self.constant(width, self.value(operand, width))

    def value(self, operand: str, width: int) -> int:
        single, double = re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand), re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", operand)
        if single and width == 64:
            return int.from_bytes(struct.pack("<d", struct.unpack("<f", bytes.fromhex(single[1])[::-1])[0]), "little")
        if single or double:
            bits = int((single or double)[1], 16)  # type: ignore[index]
            if double and width == 32:
                return int.from_bytes(struct.pack("<f", struct.unpack("<d", bits.to_bytes(8, "little"))[0]), "little")
            return bits
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            return int(operand.rstrip("U"), 0)
        if operand == "WARP_SZ":
            return 32
        name, _, offset = operand.partition("+")
        for parameter in self.kernel.parameters:
            if parameter.name == name.strip():
                return PARAMETER_WINDOW + parameter.offset + int(offset or "0", 0)
        for variables in (self.kernel.shared, self.kernel.local):
            if name.strip() in variables:
                return variables[name.strip()] + int(offset or "0", 0)
        if name.strip() in self.kernel.variables:
            return self.kernel.variables[name.strip()].address + int(offset or "0", 0)
        raise self.unsupported(f"the operand {operand}")

    def address(self, operand: str) -> tuple[int, int, int]:
        """(place of the register, offset, its bytes) of `[%rd1+16]`; without a register all is
        offset."""
        found = re.fullmatch(r"\[\s*([%\w$.@]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if not found:
            raise self.unsupported(f"the address {operand}")
        base, offset = found[1], int(found[2] or "0", 0)
        width = self.width(base)
        if width is None:
            return self.constant(64, 0), self.value(base, 64) + offset, 0
        return self.slot(base, width), offset, width // 8
