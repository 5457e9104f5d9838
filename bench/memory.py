"""Memory that one forward takes beyond its result: the peak of the process's resident memory, in a
fresh process each."""

import json
import subprocess
import sys

TOKENS, N_IN, N_OUT, R = 512, 4096, 4096, 16


def measurements():
    """DoRA in float32 under no_grad with its norm computed, ours and PEFT's, and nn.Linear alone
    (the GEMM's own scratch)."""
    found = {}
    for name in ("linear", "ours", "peft"):
        done = subprocess.run([sys.executable, "-m", "bench.memory", name], capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout)
    yield {
        "op": "lora_linear", "kind": "dora", "dtype": "float32", "what": "memory beyond y, forward",
        "M": TOKENS, "K": N_IN, "N": N_OUT, "r": R, "bytes": found,
    }  # fmt: skip


def measure(name):
    """The peak of a second forward beyond what was resident before it and the result itself, in
    bytes."""
    import torch

    from bench.lora_linear import make_peft_layer
    from lora_kernels.integrations import peft as integration

    module = make_peft_layer(N_IN, N_OUT, R, torch.float32, use_dora=True)
    if name == "ours":
        module.__class__ = integration.FusedLinear
    x = torch.randn(TOKENS, N_IN)
    with torch.no_grad():
        module(x[:100])  # libraries set up their own buffers on their first call
        module.lora_B["default"].weight.mul_(1.5)  # so that the norm is computed again
        taken, y = peak_of(lambda: (module.base_layer if name == "linear" else module)(x))
        return taken - y.nbytes


def peak_of(call):
    """(bytes at the peak of a call beyond what was resident before it, what it gives); the process
    should do nothing else."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")  # the peak starts anew
    before = process_status_bytes("VmRSS")
    found = call()
    return process_status_bytes("VmHWM") - before, found


def process_status_bytes(key):
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
