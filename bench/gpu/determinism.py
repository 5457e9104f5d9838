"""The same call gives the same bits, and a row the same bits alone as in any batch (the
deterministic mode)."""

from functools import partial

import torch

from bench.gpu.cases import FLAGS, make_sized_problem, repeatable_cases
from bench.gpu.setting import Setting, StageFindings, any_bit_differs, element_bits
from lora_kernels import lora_linear


def run_stage(setting: Setting, found: StageFindings) -> None:
    times = 1 if setting.tiny else 3 if setting.dry else 50 if setting.quick else 1000
    with setting.backend():
        for name, case in repeatable_cases(setting).items():
            found.check(name, partial(assert_same_bits, case, times, setting.device))
        found.note(f"each of {found.checked} calls, forward and backward, {times} times more")
        for name in ["lora"] if setting.tiny else ["lora", "dora, bias"] if setting.dry else FLAGS:
            for dtype in [torch.bfloat16] if setting.dry else [torch.bfloat16, torch.float16, torch.float32]:
                if "dropout" not in FLAGS[name]:  # whose mask depends on the row's number
                    found.check(
                        f"rows of {name} {str(dtype)[6:]}", partial(check_batch_invariance, setting, dtype, FLAGS[name])
                    )


def assert_same_bits(case, times: int, device: str) -> None:
    """Compares on the device; the host looks once, at the end."""
    first = [t.clone() for t in case()]
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    junk = []
    for i in range(times):
        # what the call allocates lies elsewhere each time, and has held NaN
        junk = [torch.full((4096 + 512 * (i % 97),), torch.nan, device=device)] if i % 2 else []
        wrong += any_bit_differs(first, case())
    del junk
    count = int(wrong)
    assert not count, f"{count} of {times} repetitions gave other bits"


def check_batch_invariance(setting: Setting, dtype: torch.dtype, flags: dict) -> None:
    """y of some rows by themselves; under no_grad as a server would."""
    p = make_sized_problem(setting, dtype, **flags)
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.no_grad():
            whole, end = lora_linear(*p.arguments()), len(p.x)
            wrong = []
            for part in ((0, 1), (1, 3), (2, 4 + end // 3), (end - 1, end), (0, end - 1)):
                alone = lora_linear(p.x[slice(*part)], *p.arguments()[1:])
                if not torch.equal(element_bits(alone), element_bits(whole[slice(*part)])):
                    wrong.append(f"{part[0]} to {part[1]}")
    finally:
        torch.set_deterministic_debug_mode(before)
    assert not wrong, f"other bits than among {end} rows: rows {', '.join(wrong)}"
