"""Where the stages run, how large they are, and what a stage found."""

import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import use_backend
from lora_kernels.ops import FallbackWarning

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
SHOWN = 30  # failures that are kept in words; the number counts all


@dataclass(frozen=True)
class Setting:
    """A GPU, or with `dry` the simulator and CPU tensors. `quick`: less of everything; `tiny`: only to see that it runs."""

    dry: bool = False
    quick: bool = False
    tiny: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @contextmanager
    def backend(self) -> Iterator[None]:
        """Every op on Triton's kernels, in the backward pass too, or an error."""
        with warnings.catch_warnings(), use_backend("triton", simulate=self.dry):
            # before torch 2.13 autograd's own thread, which runs a GPU's backward, would not see what is forced here
            with torch.autograd.set_multithreading_enabled(False):
                warnings.simplefilter("error", FallbackWarning)
                yield


@dataclass
class Found:
    """What a stage found. It passes if something was checked and nothing failed."""

    checked: int = 0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def check(self, name: str, call: Callable[[], object]) -> None:
        """Counts a check, which fails by raising; the next one runs all the same."""
        self.checked += 1
        try:
            call()
        except Exception as error:
            self.fail(f"{name}: {type(error).__name__}: {str(error).strip() or last_line(error)}")

    def fail(self, why: str) -> None:
        self.failures.append(why)
        print(f"    FAILED {why}", flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(f"    {text}", flush=True)

    def skip(self, text: str) -> None:
        """Something that could not be tried here."""
        self.not_run.append(text)
        print(f"    not run: {text}", flush=True)

    @property
    def status(self) -> str:
        return FAILED if self.failures else PASSED if self.checked else NOT_RUN

    def plain(self) -> dict[str, Any]:
        kept = [why[:1000] for why in self.failures[:SHOWN]]
        found = {"checked": self.checked, "failed": len(self.failures), "failures": kept, "notes": self.notes}
        return {"status": self.status, **found, "not_run": self.not_run, "rows": self.rows}


def last_line(error: BaseException) -> str:
    """Where it was raised, for an assertion without words."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}: {frame.line}"


def bits(t: Tensor) -> Tensor:
    """The bits of each element: NaN is equal to itself there, and 0 is not -0."""
    return t.detach().contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def differ(one: Iterable[Tensor], other: Iterable[Tensor]) -> Tensor:
    """Whether any bit differs, on the device: nobody waits for the answer."""
    return torch.stack([(bits(a) != bits(b)).any() for a, b in zip(one, other, strict=True)]).any()


def pefts(
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


def fused(layer: Any) -> Any:
    """The same layer on our kernels: what `fuse` does to it."""
    from lora_kernels.integrations.peft import FusedLinear

    layer.__class__ = FusedLinear
    return layer
