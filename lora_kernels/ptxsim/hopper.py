"""What came with sm_90: products of a warp group, barriers in shared memory that count, copies in
bulk, maps of tensors."""

import re

from lora_kernels.ptxsim.emitter import Emitter, pieces
from lora_kernels.ptxsim.text import WIDTH, split

FIELDS = [
    "global_address", "rank", "box_dim", "global_dim", "global_stride", "element_stride", "elemtype", "interleave_layout",
    "swizzle_mode", "fill_mode",
]  # fmt: skip
ORDINALS = {"box_dim": 5, "global_dim": 5, "global_stride": 4, "element_stride": 5}
HINTS = ("cta", "cluster", "release", "acquire", "relaxed", "shared", "shared::cta", "shared::cluster", "b64", "tile")


class Hopper(Emitter):
    def _wgmma(self, parts: list[str], operands: list[str]) -> None:
        if parts[1] != "mma_async":
            return self.plain(".".join(parts[:2]), operands)
        shape = re.fullmatch(r"m64n(\d+)k16", parts[4])
        if not shape or parts[5] != "f32" or parts[6] not in ("bf16", "f16") or len(parts) > 8:
            raise self.unsupported(".".join(parts))
        n, in_registers = int(shape[1]), operands[1].startswith("{")
        sums = split(operands[0][1:-1])
        a = [self.slot(each, 32 if in_registers else 64) for each in pieces(operands[1])]
        immediates = [self.value(each, 64) for each in operands[4:]]
        across = [0, *immediates[2:]] if in_registers else immediates[2:]
        fits = len(a) == (4 if in_registers else 1) and 8 <= n <= 256 and n % 8 == 0 and len(sums) == n // 2
        if not fits or len(across) != 2 or not {*immediates[:2]} <= {1, -1} or not {*across} <= {0, 1}:
            raise self.unsupported(f"{'.'.join(parts)} with these operands")
        added = self.place(1, operands[3] != "0") if self.width(operands[3]) is None else self.slot(operands[3], 1)
        places = [*(self.slot(each, 32) for each in sums), *a, self.slot(operands[2], 64), added]
        form = [n, int(parts[6] == "bf16"), int(in_registers), *immediates[:2], *across]
        self.emit("wgmma.mma_async", places, form)

    def _elect(self, parts: list[str], operands: list[str]) -> None:
        self.plain("elect.sync", [*operands[0].split("|"), operands[1]])

    def _setmaxnreg(self, parts: list[str], operands: list[str]) -> None:
        self.plain("setmaxnreg", operands)

    def _mbarrier(self, parts: list[str], operands: list[str]) -> None:
        action, rest = parts[1], [each for each in parts[2:] if each not in HINTS]
        at = next(i for i, operand in enumerate(operands) if operand.startswith("["))
        base, *form = self.address(operands[at])
        results, values = operands[:at], operands[at + 1 :]
        if action in ("init", "inval", "expect_tx", "complete_tx") and not rest and len(values) == int(action != "inval"):
            return self.emit(f"mbarrier.{action}", [base, *(self.slot(each, 32) for each in values)], form)
        if action == "arrive" and rest in ([], ["noComplete"], ["expect_tx"]):
            expects = "expect_tx" in rest
            count = "1" if expects or not values else values[0]
            state = self.slot(results[0] if results else "_", 64)
            places = [state, base, self.slot(count, 32), self.slot(values[0] if expects else "0", 32)]
            return self.emit("mbarrier.arrive", places, form)
        if action in ("test_wait", "try_wait") and rest in ([], ["parity"]):
            width = 32 if rest else 64
            # the time to wait at most is dropped
            places = [self.slot(results[0], 1), base, self.slot(values[0], width)]
            return self.emit(".".join(["mbarrier.wait", *rest]), places, form)
        raise self.unsupported(".".join(parts))

    def fence_proxy(self, parts: list[str], operands: list[str]) -> None:
        if "tensormap::generic" in parts:
            self.emit("fence.proxy.tensormap", [], [])
        elif "mbarrier_init" in parts or parts[-2:] == ["async", "global"]:
            self.emit("fence.cta", [], [])  # of shared memory neither shows what threads wrote
        elif "async" in parts:
            self.emit("fence.proxy.async", [], [])
        else:
            raise self.unsupported(".".join(parts))

    def _tensormap(self, parts: list[str], operands: list[str]) -> None:
        if parts[1] == "cp_fenceproxy":
            (to, *of_to), (source, *of_source) = self.address(operands[0]), self.address(operands[1])
            return self.emit("tensormap.cp_fenceproxy", [to, source], [*of_to, *of_source])
        base, *form = self.address(operands[0])
        field, width = FIELDS.index(parts[3]), WIDTH[parts[-1]]
        ordinals = ORDINALS.get(parts[3])
        if len(operands) != (3 if ordinals else 2):
            raise self.unsupported(f"{'.'.join(parts)} with {len(operands)} operands")
        ordinal = self.value(operands[1], 32) if ordinals else 0
        if ordinals and not 0 <= ordinal < ordinals:
            raise self.unsupported(f"{'.'.join(parts)} of dimension {ordinal}")
        value = self.slot(operands[-1], width)
        if width == 32:
            value, narrow = self.place(64), value
            self.emit("cvt.u64.u32", [value, narrow], [])
        self.emit("tensormap.replace", [base, value], [*form, field, ordinal, int("shared::cta" in parts)])

    def bulk(self, parts: list[str], operands: list[str]) -> None:
        """cp.async.bulk{.tensor}: [to], [from]{, size}{, [mbarrier]}; a tensor's side is [map,
        {coordinates}]."""
        rest = [each for each in parts[3:] if each not in HINTS and "cache_hint" not in each]
        if rest[:1] == ["commit_group"]:
            return self.emit("cp.async.bulk.commit_group", [], [])
        if rest[:1] == ["wait_group"]:
            return self.emit("cp.async.bulk.wait_group", [], [self.value(operands[0], 32)])
        if rest[:1] == ["prefetch"]:
            return None
        loads = rest[-1] == "mbarrier::complete_tx::bytes"
        if rest[-1] not in ("mbarrier::complete_tx::bytes", "bulk_group") or parts[-1].startswith("multicast"):
            raise self.unsupported(".".join(parts))
        rest = [each for each in rest[:-1] if each != "global"]
        inside, outside = operands[:2] if loads else (operands[1], operands[0])
        rank = 0
        if rest:
            found = re.fullmatch(r"tensor \dd", " ".join(rest))
            if not found:
                raise self.unsupported(".".join(parts))
            tensor, coordinates = split(outside[1:-1])
            outside, extra = f"[{tensor}]", [self.slot(each, 32) for each in pieces(coordinates)]
            rank = int(rest[1][0])
            if len(extra) != rank:
                raise self.unsupported(f"{'.'.join(parts)} with {len(extra)} coordinates")
        else:
            extra = [self.slot(operands[2], 32)]
        mbarrier = operands[2 if rank else 3] if loads else "[0]"
        places, form = [], []
        for address in (inside, outside, mbarrier):
            place, offset, size = self.address(address)
            places.append(place)
            form += [offset, size]
        self.emit(f"cp.async.bulk.{'load' if loads else 'store'}", [*places[: 3 if loads else 2], *extra], [*form, rank])

    def arrive_after_copies(self, parts: list[str], operands: list[str]) -> None:
        base, *form = self.address(operands[0])
        self.emit("cp.async.mbarrier.arrive", [base], [*form, int("noinc" in parts)])
