"""Quantised weights for tests, made without the libraries that write them."""

import torch

from lora_kernels import QuantisedWeight

# of bitsandbytes' nf4 and fp4, whose values its own tests hold
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
KINDS = ("nibbles", "nested", "int8", "float8")


def make_quantised(kind, n_out, n_in, block=64, dtype=torch.float32, seed=0):
    """Random codes, every one of them, and scales of both signs of the size of a trained layer."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    numbers = n_out * n_in
    blocks = -(-numbers // block)
    size = n_in**-0.5
    scales = (uniform(blocks) + 0.5) * size
    if kind in ("nibbles", "nested"):
        codes = torch.randint(256, (-(-numbers // 2),), generator=generator).to(torch.uint8)
        table = torch.tensor(NF4)
        if kind == "nibbles":
            return QuantisedWeight(codes, (n_out, n_in), scales * 2, block, dtype, table)
        outer_table = (uniform(256) * 2 - 1).sort().values
        return QuantisedWeight(
            codes, (n_out, n_in), torch.randint(256, (blocks,), generator=generator).to(torch.uint8), block, dtype, table,
            outer=(uniform(-(-blocks // 256)) + 0.5) * size, outer_table=outer_table, offset=torch.tensor(1.5 * size),
        )  # fmt: skip
    codes = torch.randint(256, (n_out, n_in), generator=generator).to(torch.uint8)
    if kind == "int8":
        return QuantisedWeight(codes.view(torch.int8), (n_out, n_in), scales / 64, block, dtype)
    codes[codes & 127 == 127] = 0  # NaN has a test of its own
    return QuantisedWeight(codes.view(torch.float8_e4m3fn), (n_out, n_in), scales / 64, block, dtype)
