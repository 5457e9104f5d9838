"""A functional simulator of PTX: the real code of Triton and nvcc, run on CPU tensors, with
stricter checks than a GPU's.

    kernel = Kernel(ptx)
    run = kernel.launch(grid=(8, 8), block=(128,), args=[x, w, y, 512], writes=[y], shared=49152)
    run.counters["load_sectors"]
    with device(trace=True, seed=3) as sim: ...       # many launches
    sim.counters, sim.dram()

Found and raised, with the tensor's name and the line of the PTX: accesses out of bounds or
misaligned, of shared memory and of `poisoned` tensors that nobody wrote, races within a warp, a
block and between blocks, copies that were not waited for, barriers that not all reach. Not
modelled: time, the order of the sums inside a tensor core, SASS.
Source: PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution.
"""

from lora_kernels.ptxsim.device import Device, device
from lora_kernels.ptxsim.kernel import Kernel, Run, SimulationError
from lora_kernels.ptxsim.tensor_map import TensorMap
from lora_kernels.ptxsim.text import Unsupported

__all__ = ["Device", "Kernel", "Run", "SimulationError", "TensorMap", "Unsupported", "device"]
