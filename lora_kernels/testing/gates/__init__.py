"""Gates that a kernel's code passes without a GPU: see README.md.

    python -m lora_kernels.testing.gates            compiles all configurations, writes
                                                    tests/gates/table.json
    python -m lora_kernels.testing.gates --show     prints it
"""

from lora_kernels.testing.gates.configuration import Budget, Change, Configuration, Cuda, Triton
from lora_kernels.testing.gates.measure import broken, measure
from lora_kernels.testing.gates.table import Table, current, differences, recompute

__all__ = [
    "Budget", "Change", "Configuration", "Cuda", "Table", "Triton", "broken", "current", "differences", "measure", "recompute",
]  # fmt: skip
