"""Compiles a configuration for a chip, and says what is wrong with it."""

from typing import Any

from lora_kernels.ptxsim.nvcc import compile_cubin
from lora_kernels.testing.gates.amdgcn import read_amdgcn
from lora_kernels.testing.gates.code import LOAD, WIDE, Code, count_opcodes, main_loop
from lora_kernels.testing.gates.configuration import NVIDIA, Budget, Configuration, Cuda, Triton
from lora_kernels.testing.gates.hazards import hazards
from lora_kernels.testing.gates.occupancy import CHIPS, occupancy, occupancy_amd
from lora_kernels.testing.gates.sass import read_cubin

Row = dict[str, Any]


def measure(configuration: Configuration, arch: str) -> Row:
    """One row of the table; `error` alone where the compiler refuses.

    Raises:
        FileNotFoundError: a tool is not here; the message says which.
    """
    kernel = configuration.kernel_on(arch)
    gone = kernel.missing(arch)
    if gone:
        raise FileNotFoundError(gone)
    try:
        code, dynamic, columns = compiled(kernel, arch)
    except Exception as error:  # each compiler has its own; the row has the message, and is broken
        return {"error": f"{type(error).__name__}: {error}".strip()[:500]}
    if arch in NVIDIA:
        blocks, limit = occupancy(arch, code.registers, code.shared, dynamic, kernel.threads, columns)
    else:
        blocks, limit = occupancy_amd(arch, code.waves, code.shared + dynamic, kernel.warps)
    loop = main_loop(code)
    return {
        "registers": code.registers, **soundness(kernel, arch, code), "shared": code.shared + dynamic,
        "blocks": blocks, "warps": blocks * kernel.warps, "limit": limit,
        "unit": loop.unit, "units": loop.units, "instructions": loop.instructions, "copies": loop.copies,
        "wide": count_opcodes(code.instructions, WIDE), "loads": count_opcodes(code.instructions, LOAD),
    }  # fmt: skip


def compiled(kernel: Triton | Cuda, arch: str) -> tuple[Code, int, int]:
    """The code, its dynamic shared memory in bytes, and its columns of tensor memory."""
    return _compile_triton(kernel, arch) if isinstance(kernel, Triton) else _compile_cuda(kernel, arch)


def soundness(kernel: Triton | Cuda, arch: str, code: Code) -> Row:
    """The part of a row that every version of a compiler is held to."""
    found = hazards(code) if arch in NVIDIA else []
    row: Row = {"stack": code.stack, "spills": code.spills, "hazards": len(found)}
    row |= {"hazard": found[0]} if found else {}
    return row | ({"ptxas": kernel.assembler(arch)} if isinstance(kernel, Triton) and arch in NVIDIA else {})


def _compile_triton(kernel: Triton, arch: str) -> tuple[Code, int, int]:
    from lora_kernels.ptxsim.triton_ptx import compile_triton

    function = kernel.load()
    number = int(arch[3:]) if arch.startswith("sm_") else arch
    made = compile_triton(function, kernel.launch_arguments(), number, kernel.warps, kernel.stages, kernel.registers)
    if isinstance(number, int):
        return read_cubin(made.cubin, function.__name__, number), made.shared, made.columns
    return read_amdgcn(made.amdgcn), made.shared, 0


def _compile_cuda(kernel: Cuda, arch: str) -> tuple[Code, int, int]:
    cubin = compile_cubin(kernel.source, arch, *kernel.options)
    return read_cubin(cubin, kernel.kernel, int(arch[3:])), kernel.shared, 0


def instructions_per_unit(row: Row) -> float:
    """Instructions of the main loop for each matrix instruction or load."""
    return float(row["instructions"] / max(1, row["units"]))


def unsound(row: Row, spilled: int = 0) -> list[str]:
    """The gates that no version of a compiler may break, in words; what a row does not have is
    zero. `spilled`: so many loads and stores of spilled registers are accepted."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    found = []
    if row.get("spills", 0) > spilled or (row.get("stack") and not spilled):
        found.append(f"spills: {row.get('stack', 0)} bytes of stack, {row.get('spills', 0)} spilled")
    if row.get("hazards"):
        found.append(f"hazards: {row['hazards']} instructions, the first: {row['hazard']}")
    return found


def broken(row: Row, budget: Budget, arch: str) -> list[str]:
    """The gates that a row does not pass, in words."""
    found = unsound(row, budget.spilled)
    if "error" in row:
        return found
    chip, unit = CHIPS[arch], budget.matrix or "load"
    if row["shared"] > chip.shared_block:
        found.append(f"shared memory: {row['shared']} bytes, {chip.shared_block} there are")
    if row["blocks"] < budget.blocks:
        found.append(f"occupancy: {row['blocks']} blocks of the {budget.blocks} wanted, for {row['limit']}")
    if row["unit"] != unit:
        found.append(f"main loop: of {row['unit']}, where {unit} was wanted")
    if row["units"] < budget.units:
        found.append(f"main loop: {row['units']} {row['unit']} of the {budget.units} wanted, so it is not unrolled")
    if instructions_per_unit(row) > budget.per:
        found.append(f"main loop: {instructions_per_unit(row):.2f} instructions for each {row['unit']}, {budget.per} allowed")
    if row["copies"] > budget.copies:
        found.append(f"main loop: {row['copies']} loops in it touch memory, {budget.copies} allowed; not unrolled")
    if row["wide"] < budget.wide:
        found.append(f"16-byte loads: {row['wide']} of the {budget.wide} wanted")
    return found
