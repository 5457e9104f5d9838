"""Instructions of the simulator, as the decoder emits them one after another."""

from typing import Any

from lora_kernels import _ptxsim
from lora_kernels.ptxsim.places import Places
from lora_kernels.ptxsim.text import Kernel, split

TABLE: dict[str, str] = _ptxsim.table()


def pieces(operand: str) -> list[str]:
    """The registers of `{%r1, %r2}`, or the one that the operand is."""
    return split(operand[1:-1]) if operand.startswith("{") else [operand]


class Emitter(Places):
    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.code: list[Any] = []
        self.guard = (-1, False)

    def emit(self, name: str, operands: list[int], immediates: list[int]) -> None:
        if name not in TABLE:
            raise self.unsupported(f"the instruction {name}")
        self.code.append((name, operands, immediates, *self.guard, self.line))

    def inverse(self, predicate: int) -> int:
        """A new place that holds the opposite of a predicate."""
        place = self.place(1)
        self.emit("not.pred", [place, predicate], [])
        return place

    def plain(self, name: str, operands: list[str]) -> None:
        """An instruction whose operands have the widths that the table says."""
        widths = TABLE.get(name)
        if widths is None or widths == "*":
            raise self.unsupported(f"the instruction {name}")
        kinds = [each for side in widths.split("=") for each in side.split(",") if each]
        if len(kinds) != len(operands):
            raise self.unsupported(f"{name} with {len(operands)} operands, not {len(kinds)}")
        at, immediates = [], []
        for kind, operand in zip(kinds, operands, strict=True):
            if kind == "i":
                immediates.append(self.value(operand, 64))
            elif kind == "p" and operand.startswith("!"):
                at.append(self.inverse(self.slot(operand[1:], 1)))
            else:
                at.append(self.slot(operand, 1 if kind == "p" else int(kind)))
        self.emit(name, at, immediates)
