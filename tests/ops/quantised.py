"""Quantised weights for tests, made without the libraries that write them."""

from dataclasses import replace

import torch

from lora_kernels import QuantisedWeight
from lora_kernels.ops.quantised.formula import dequantised
from lora_kernels.ops.quantised.weight import E2M1, HALVES, LOW_FIRST
from lora_kernels.testing import make_expert_problem

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


FORMATS = ("mxfp4", "int4 zeros", "hqq", "int8 zeros", "int8 tiles", "e4m3 tiles", "e5m2 rows", "e4m3 powers")


def make_format(name, n_out, n_in, dtype=torch.float32, block=32, block_rows=3, seed=0):
    """A weight of one of FORMATS with random codes. HALVES want an even count of numbers: where
    there is none, W gets one row more."""
    generator = torch.Generator().manual_seed(seed)
    n_out += name == "hqq" and n_out * n_in % 2

    def codes(*shape):
        return torch.randint(256, shape, generator=generator).to(torch.uint8)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    tiles = name.endswith("tiles")
    rows = {"hqq": 0, "e5m2 rows": 0}.get(name, block_rows if tiles else 1)
    block = n_in if name == "e5m2 rows" else block
    blocks = -(-n_out // rows) * -(-n_in // block) if rows else -(-n_out * n_in // block)
    scales = (uniform(blocks) + 0.5) * n_in**-0.5
    named = {"shape": (n_out, n_in), "block": block, "block_rows": rows, "dtype": dtype, "scales": scales}
    if name in ("mxfp4", "int4 zeros", "hqq"):
        named["codes"] = codes(-(-n_out * n_in // 2))
        named["order"] = HALVES if name == "hqq" else LOW_FIRST
        named["table"] = torch.tensor(E2M1) if name == "mxfp4" else torch.arange(16.0)
    elif name.startswith("int8"):
        named |= {"codes": codes(n_out, n_in).view(torch.int8), "scales": scales / 64}
    else:
        five = name.startswith("e5m2")
        random = codes(n_out, n_in)
        # beyond and NaN have a test of their own
        random[(random & 127) >= (0x78 if five else 0x7F)] = 0
        named["codes"] = random.view(torch.float8_e5m2 if five else torch.float8_e4m3fn)
        named["scales"] = scales / (4096 if five else 64)
    if "zeros" in name:
        named["zeros"] = torch.randint(16, (blocks,), generator=generator).float()
    if name == "hqq":
        named |= {"zeros": (uniform(blocks) * 15).to(dtype).float(), "zero_rounded": True}
    if name in ("mxfp4", "e4m3 powers"):
        named["scales"] = (codes(blocks) % 7 + (118 if name == "mxfp4" else 112)).view(torch.float8_e8m0fnu)
    return QuantisedWeight(**named)


def make_experts(name, experts, n_out, n_in, dtype=torch.float32, **options):
    """A weight [experts, n_out, n_in] of one of KINDS or FORMATS; an even count of numbers."""
    make = make_quantised if name in KINDS else make_format
    if not name.endswith("tiles"):
        return replace(make(name, experts * n_out, n_in, dtype=dtype, **options), shape=(experts, n_out, n_in))
    each = [make(name, n_out, n_in, dtype=dtype, seed=e, **options) for e in range(experts)]
    codes = torch.cat([w.codes.view(torch.uint8) for w in each]).view(each[0].codes.dtype)
    return replace(each[0], shape=(experts, n_out, n_in), codes=codes, scales=torch.cat([w.scales for w in each]))


def over_codes(w, sizes, n_in, n_out, transposed=False, **flags):
    """An `expert_lora_linear` problem whose W is w, and whose oracle knows its numbers."""
    numbers = dequantised(w)
    p = make_expert_problem(sizes, n_in, n_out, dtype=w.dtype, transposed=transposed, **flags)
    layers = [replace(e, w=of.T if transposed else of) for e, of in zip(p.experts, numbers, strict=True)]
    return replace(p, w=w, experts=layers)
