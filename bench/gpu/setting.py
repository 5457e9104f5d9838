"""Where the stages run, how large they are, and what a stage found."""

import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu.record import FAILED, NOT_RUN, PASSED, Record, add_to_stage, empty_stage
from lora_kernels import use_backend
from lora_kernels.ops import FallbackWarning, registry


@dataclass(frozen=True)
class Setting:
    """A GPU, or with `dry` the simulator of `arch` (90 is sm_90) and CPU tensors. `quick`: less of
    everything; `tiny`: only to see that it runs; `timed`: for minutes. `sizes`: tokens, in, out,
    rank where not the usual ones."""

    dry: bool = False
    quick: bool = False
    tiny: bool = False
    arch: int = 80
    timed: bool = False
    sizes: tuple[int, int, int, int] | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @contextmanager
    def backend(self, name: str = "triton") -> Iterator[None]:
        """Every op on this backend's kernels, in the backward pass too, or an error."""
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            if self.dry:
                stack.enter_context(_simulator(self.arch))
            stack.enter_context(use_backend(name, simulate=self.dry))
            # before torch 2.13 autograd's own thread, which runs a GPU's backward, would not see
            # what is forced here
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            warnings.simplefilter("error", FallbackWarning)
            yield

    @contextmanager
    def as_dispatched(self) -> Iterator[None]:
        """What dispatch chooses by itself, as in a user's program; in a dry run what it would
        choose on the simulated GPU. Who must not get the reference asks `backends_used`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            if not self.dry:
                yield
                return
            usual = registry.PREFERENCE["cpu"]
            with _simulator(self.arch), use_backend("triton", simulate=True):
                token = registry._forced.set(None)
                registry.PREFERENCE["cpu"] = registry.PREFERENCE["cuda"]
                try:
                    yield
                finally:
                    registry.PREFERENCE["cpu"] = usual
                    registry._forced.reset(token)


def _simulator(arch: int) -> Any:
    from lora_kernels.ptxsim import device

    return device(arch)


def backends_used(call: Callable[[], object]) -> tuple[list[str], list[str]]:
    """What ran in a call, its backward too: each op with its backend and candidate; and the ops
    that the reference ran, with why the others did not."""
    # autograd's own thread would not see who asks, before torch 2.13
    with torch.autograd.set_multithreading_enabled(False):
        decisions = registry.explain(call).decisions
    ran = [f"{d.op}: {d.chosen.split()[0]}" + (f", {d.plan.winner}" if d.plan else "") for d in decisions]
    slow = [
        f"{d.op} ran on the reference: " + "; ".join(f"{name}: {d.others.get(name)}" for name in registry.ON_GPU)
        for d in decisions if d.chosen.startswith("reference")
    ]  # fmt: skip
    return ran, slow


class GpuLostError(RuntimeError):
    """The process has lost its GPU, and only another one can go on."""


@dataclass
class StageFindings:
    """What a stage found. It passes if something was checked and nothing failed.

    With a `record` all of it also goes into the file at once. `until`, of time.monotonic, is when
    no further check begins; `process` says which of several this is: (i, n) takes each n-th check.
    `skipped` are those that another took.
    """

    record: Record | None = None
    name: str = ""
    until: float = float("inf")
    process: tuple[int, int] = (0, 1)
    skipped: frozenset[str] = frozenset()
    clock: Callable[[], float] = time.monotonic
    kept: dict[str, Any] = field(default_factory=empty_stage)
    rows: list[dict[str, Any]] = field(default_factory=list)
    met: int = 0

    def check(self, name: str, call: Callable[[], object]) -> None:
        """Counts a check, which fails by raising; the next one runs all the same. One that a
        backend refuses did not run."""
        i, n = self.process
        self.met += 1
        if (self.met - 1) % n != i or name in self.skipped:
            return
        if self.out_of_time():
            self.skip(f"{name}: time")
            return
        self._record_entry("started", [str(i), name])
        refused = None
        try:
            call()
        except Refused as refusal:
            refused = str(refusal)
        except Exception as error:
            self.fail(f"{name}: {type(error).__name__}: {str(error).strip() or last_line(error)}")
            self._record_entry("ended", str(i))
            raise_if_gpu_lost()
            return
        self._record_entry("ended", str(i))
        if refused is not None:
            self.skip(f"{name}: {refused}")
        else:
            self._add_result(PASSED, name)

    def out_of_time(self) -> bool:
        """Whether the time of the stage is spent."""
        return self.clock() >= self.until

    def fail(self, why: str) -> None:
        self._add_result(FAILED, why)
        print(f"    FAILED {why}", flush=True)

    def note(self, text: str) -> None:
        self._add_result("note", text)
        print(f"    {text}", flush=True)

    def skip(self, text: str) -> None:
        """Something that could not be tried here."""
        self._add_result(NOT_RUN, text)
        print(f"    not run: {text}", flush=True)

    def add_measurement(self, made: dict[str, Any]) -> None:
        """A measurement."""
        self.rows.append(made)
        self._record_entry("row", made)

    def _add_result(self, kind: str, value: str) -> None:
        add_to_stage(self.kept, kind, value)
        self._record_entry(kind, value)

    def _record_entry(self, kind: str, value: Any) -> None:
        if self.record is not None:
            self.record.add_entry(self.name, kind, value)

    checked = property(lambda self: self.kept["checked"])
    failures = property(lambda self: self.kept["failures"])
    status = property(lambda self: self.kept["status"])


class Refused(Exception):
    """A check that cannot be made here, with the reason."""


def raise_if_gpu_lost() -> None:
    """Raises if a kernel broke the context: whatever follows in this process would fail."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise GpuLostError(str(error)) from error


def compile_processes() -> int:
    """The processes that compile side by side."""
    return min(16, os.cpu_count() or 1)


def last_line(error: BaseException) -> str:
    """Where it was raised, for an assertion without words."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}: {frame.line}"


def element_bits(t: Tensor) -> Tensor:
    """The bits of each element: NaN is equal to itself there, and 0 is not -0."""
    return t.detach().contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def any_bit_differs(one: Iterable[Tensor], other: Iterable[Tensor]) -> Tensor:
    """Whether any bit differs, on the device: nobody waits for the answer."""
    return torch.stack([(element_bits(a) != element_bits(b)).any() for a, b in zip(one, other, strict=True)]).any()


def make_peft_layer(
    n_in: int, n_out: int, r: int, dtype: torch.dtype, device: str, dropout: float = 0.0, use_dora: bool = False,
    base: nn.Module | None = None,
) -> Any:  # fmt: skip
    """PEFT's LoRA layer over nn.Linear (`base` if given), in training mode, with random B."""
    import peft

    holder = nn.Sequential(base or nn.Linear(n_in, n_out, bias=False, device=device, dtype=dtype))
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"], use_dora=use_dora, lora_dropout=dropout)
    made = peft.get_peft_model(holder, config, autocast_adapter_dtype=False).base_model.model[0]
    nn.init.normal_(made.lora_B["default"].weight, std=0.02)
    return made.to(device, dtype)


def fuse_layer(layer: Any) -> Any:
    """The same layer on our kernels: what `fuse` does to it."""
    from lora_kernels.integrations.peft import FusedLinear

    layer.__class__ = FusedLinear
    return layer
