"""vLLM's linear layers with LoRA, their adapters in pages and `multi_lora_add_` after the base
product.

Each class is one of vLLM's, from which it keeps what is said of shards:

    column parallel (q, k, v, gate, up)   W, B, m, c by rows of W;  A whole;     y = its rows
    row parallel (o, down)                W, A by columns of W;     B, m whole;  y = a part of a sum
                                          over the ranks
    replicated                            all whole

The gain of DoRA scales a row of W, so it may scale each part of that sum; the norm in it is that of
the whole row, for which the ranks add their squares once, when an adapter is put into a slot.
lora_bias and the bias of the base are added by rank 0.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.lora import layers as theirs
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

from lora_kernels.adapters.config import AdapterError
from lora_kernels.integrations.vllm.adapters import flag_for_rank
from lora_kernels.integrations.vllm.step import Step, step_of
from lora_kernels.ops import dora_gain, row_norm_squared, weight_norm
from lora_kernels.ops.lora_linear.op import FLOATS
from lora_kernels.ops.multi_lora import multi_lora_add_
from lora_kernels.ops.multi_lora.plan import BIAS, GAIN, rows_of
from lora_kernels.serving.site import Pages, Prepared, pages_of

Parts = Tensor | Sequence[Tensor | None]
"""A tensor of the whole layer, or one of each module that vLLM packed into it (None: the adapter
leaves that alone)."""
IDENTITY_ROWS = 256
"""Rows of the identity at a time, when W is asked for through its product."""


class OnMultiLora:
    """Before a class of vLLM's in the order of methods."""

    base_layer: Any
    n_slices: int
    input_size: int
    output_size: int
    output_slices: tuple[int, ...]
    tp_size: int
    tp_rank: int
    slice_lora_a: Any
    slice_lora_b: Any
    expand_packed_lora: Any

    def __init__(self, base_layer: Any) -> None:
        super().__init__(base_layer)  # type: ignore[call-arg]
        self._enable_aux_cuda_stream = False  # that path is for vLLM's own kernels
        self._squared: list[Tensor | None] = []
        self._pages: list[Pages] = []

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Only remembers; `set_mapping` follows, and knows the step whose generations the slots
        share."""
        self.lora_config, self._max_loras = lora_config, max_loras
        if self.n_slices == 1:
            self.output_slices = (self.output_size,)

    def set_mapping(self, punica_wrapper: Any) -> None:
        super().set_mapping(punica_wrapper)  # type: ignore[misc]
        self._step: Step = step_of(punica_wrapper)
        if self._pages:
            return
        most, dtype = self.lora_config.max_lora_rank, self.lora_config.lora_dtype
        self._pages = [
            Pages(size, self.input_size, dtype, self._step.generation, self._max_loras * pages_of(most), most, True)
            for size in self.output_slices
        ]
        self._slots = [pages.slots for pages in self._pages]
        self.forget_norms()
        # what vLLM reads shapes and dtype of when it makes adapters to warm up with
        self.lora_a_stacked = tuple(s.a[None, None] for s in self._slots)
        self.lora_b_stacked = tuple(s.b.T[None, None] for s in self._slots)

    def check_factors(self, name: str, lora_a: Parts, lora_b: Parts, magnitude: Parts | None, bias: Parts | None) -> None:
        """Raises AdapterError unless an adapter fits the layer and is finite. It sees all of it, so
        all ranks find the same."""
        for what, parts in (("A", lora_a), ("B", lora_b), ("magnitude", magnitude), ("bias", bias)):
            for t in [parts] if isinstance(parts, Tensor) else parts or ():
                if t is not None and not bool(t.to(self._slots[0].a.dtype).isfinite().all()):
                    raise AdapterError(f"{name}: {what} has values that are not finite as {self._slots[0].a.dtype}")
        most, n_in, whole = self.lora_config.max_lora_rank, self.base_layer.input_size, self._rows_of_slices()
        for a, b, size in zip(*self._factors_of_all_ranks(lora_a, lora_b, name), whole, strict=True):
            if a is None or b is None:
                continue
            wanted, found = ((len(a), n_in), (size, len(a))), (tuple(a.shape), tuple(b.shape))
            if wanted != found:
                raise AdapterError(f"{name}: A and B must be {wanted[0]} and {wanted[1]}, found {found[0]} and {found[1]}")
            if len(a) > most:
                raise AdapterError(f"{name}: the rank may be {most}, found {len(a)}; {flag_for_rank(len(a))}")
        for what, parts in (("magnitude", magnitude), ("bias", bias)):
            rows = [None] * len(whole) if parts is None else self._factors_of_all_ranks(None, _columns(parts), name)[1]
            for t, size in zip(rows, whole, strict=True):
                if t is not None and len(t) != size:
                    raise AdapterError(f"{name}: {what} must have {size} elements, found {len(t)}")

    def reset_lora(self, index: int) -> None:
        for pages in self._pages:
            pages.clear_slot(index)

    def set_lora(self, index: int, lora_a: Parts, lora_b: Parts) -> None:
        """Puts A and B, which vLLM has scaled, into a slot; `complete` follows for DoRA and
        lora_bias."""
        self.reset_lora(index)
        for pages, a, b in zip(self._pages, *self._factors_of_this_rank(lora_a, lora_b), strict=True):
            if a is not None and b is not None:
                a, b = (t.to(pages.slots.a.device, pages.slots.a.dtype, non_blocking=True) for t in (a, b))
                pages.put(index, Prepared(a, b.T, 1.0))

    def forget_norms(self) -> None:
        """The weight of the base has changed."""
        self._squared = [None] * len(self._pages)

    def complete(self, index: int, name: str, magnitude: Parts | None, bias: Parts | None) -> Exception | None:
        """Puts the gain of DoRA and s times lora_bias beside the factors of a slot. Returns what is
        wrong with the gain: each rank has its own part of it, and all must go through all
        layers."""
        wrong: Exception | None = None
        for i, m in enumerate(() if magnitude is None else self._factors_of_this_rank(None, _columns(magnitude))[1]):
            if m is not None:
                s = self._slots[i]
                try:
                    squared = self._norm_squared(i, *self._factors(i, index))
                except Exception as error:
                    wrong, squared = error, torch.zeros_like(s.gain[index])
                if self._is_row_parallel and self.tp_size > 1:
                    squared = tensor_model_parallel_all_reduce(squared)
                s.gain[index] = dora_gain(m[:, 0].to(s.gain.device, torch.float32), squared.sqrt())
                s.flags[index] |= GAIN
                if not bool(s.gain[index].isfinite().all()):
                    wrong = wrong or AdapterError(f"{name}: the gain of DoRA is not finite")
        for i, c in enumerate(
            () if bias is None or self._is_later_part else self._factors_of_this_rank(None, _columns(bias))[1]
        ):
            if c is not None:
                self._slots[i].bias[index] = c[:, 0]
                self._slots[i].flags[index] |= BIAS
        return wrong

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        """vLLM's hook after the base product, which is in `output` with its bias."""
        step = self._step
        if step.all_base and not torch.compiler.is_compiling() and not _capturing(x):
            return output
        rows = output if output.dim() == 2 else output.view(-1, output.shape[-1])
        # a router's output may be float32
        x = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).to(output.dtype)
        layer = self.base_layer
        bias = None if self._is_later_part or layer.skip_bias_add else layer.bias
        multi_lora_add_(rows, x, self._slots, step.plan(x.shape[0]), bias)
        return output

    @property
    def _is_later_part(self) -> bool:
        """Whether y is a part of a sum in which another rank adds the biases."""
        return self._is_row_parallel and self.tp_rank > 0

    @property
    def _is_row_parallel(self) -> bool:
        return isinstance(self.base_layer, RowParallelLinear)

    def _rows_of_slices(self) -> list[int]:
        """Rows of W of each slice, of all ranks together."""
        layer = self.base_layer
        # its own sizes count k and v once for each rank that has a copy
        if isinstance(layer, QKVParallelLinear):
            heads = (layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads)
            sizes = [count * layer.head_size for count in heads]
        else:
            sizes = [layer.output_size] if self.n_slices == 1 else list(layer.output_sizes)
        return sizes if len(sizes) == self.n_slices else [sum(sizes)]

    def _factors_of_all_ranks(
        self, lora_a: Parts | None, lora_b: Parts, name: str
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """A and B of each slice, of all ranks together; B is whatever has a row for each row of
        W."""
        try:
            if isinstance(lora_b, Tensor):
                parts = [lora_b] if self.n_slices == 1 else list(lora_b.split(self._rows_of_slices()))
                return [lora_a] * self.n_slices, parts  # type: ignore[list-item]
            a = [None] * len(lora_b) if lora_a is None else list(lora_a)
            if len(lora_b) == self.n_slices:
                return a, list(lora_b)
            return self.expand_packed_lora(a, list(lora_b))
        except (RuntimeError, ValueError) as error:
            raise AdapterError(f"{name}: its rows do not divide into {self._rows_of_slices()}: {error}") from error

    def _factors_of_this_rank(self, lora_a: Parts | None, lora_b: Parts) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """A and B of each slice of this rank, by vLLM's rules."""
        a, b = self._factors_of_all_ranks(lora_a, lora_b, type(self).__name__)
        if self.tp_size == 1:
            return a, b
        if self.n_slices > 1:
            return self.slice_lora_a(a), self.slice_lora_b(b)
        return [None if a[0] is None else self.slice_lora_a(a[0])], [self.slice_lora_b(b[0])]

    def _factors(self, i: int, index: int) -> tuple[Tensor, Tensor]:
        """A and B of a slot, in slice i."""
        s = self._slots[i]
        at = rows_of(s, index)
        return s.a[at], s.b[at].T

    def _norm_squared(self, i: int, a: Tensor, b: Tensor) -> Tensor:
        """‖W + BA‖² by row, of the columns of W that are here; float32."""
        start = sum(self.output_slices[:i])
        rows = slice(start, start + self.output_slices[i])
        w = self._plain_weight()
        if w is not None:
            if self._squared[i] is None:
                self._squared[i] = row_norm_squared(w[rows])
            return weight_norm(w[rows], a.to(w.dtype), b.to(w.dtype), 1.0, self._squared[i]).square().float()
        a, b = a.float(), b.float()
        squared, of_a = b.new_zeros(len(b)), b.new_zeros(len(a), len(b))
        for first, columns in self._columns_of_weight(rows):
            squared += columns.square().sum(0)
            of_a += a[:, first : first + len(columns)] @ columns  # A Wᵀ
        # ‖W + BA‖² = ‖W‖² + 2 diag(W Aᵀ Bᵀ) + diag(B A Aᵀ Bᵀ)
        return (squared + 2 * (b * of_a.T).sum(1) + ((b @ (a @ a.T)) * b).sum(1)).clamp_min(0)

    def _plain_weight(self) -> Tensor | None:
        """W [out, in] of this rank if the base layer has it as such: not quantised, nor packed."""
        w = getattr(self.base_layer, "weight", None)
        shape = (sum(self.output_slices), self.input_size)
        return w.detach() if isinstance(w, Tensor) and w.dtype in FLOATS and tuple(w.shape) == shape else None

    def _columns_of_weight(self, rows: slice) -> Iterator[tuple[int, Tensor]]:
        """Wᵀ, IDENTITY_ROWS of its rows at a time, and which is the first: the products of unit
        vectors.

        Raises:
            AdapterError: they do not grow as their inputs do: those are quantised with a scale of
                their own.
        """
        for first in range(0, self.input_size, IDENTITY_ROWS):
            units = torch.zeros(min(IDENTITY_ROWS, self.input_size - first), self.input_size)
            units[torch.arange(len(units)), first + torch.arange(len(units))] = 1
            columns = self._base_product(units)[:, rows].float()
            if first == 0 and not torch.allclose(
                2 * self._base_product(units / 2)[:, rows].float(), columns, rtol=1e-2, atol=1e-6
            ):
                kind = type(self.base_layer.quant_method).__name__
                raise AdapterError(f"DoRA needs the norm of W, which {kind} hides: it rounds its inputs to a fixed scale")
            yield first, columns

    def _base_product(self, x: Tensor) -> Tensor:
        x = x.to(self._slots[0].a.device, self.base_layer.params_dtype)
        return self.base_layer.quant_method.apply(self.base_layer, x, None)


def _columns(parts: Parts) -> Parts:
    """Vectors as matrices of one column, which vLLM's rules slice as they slice B."""
    if isinstance(parts, Tensor):
        return parts[:, None]
    return [None if part is None else part[:, None] for part in parts]


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


REPLACED = (
    theirs.ColumnParallelLinearWithLoRA, theirs.MergedColumnParallelLinearWithLoRA, theirs.QKVParallelLinearWithLoRA,
    theirs.MergedQKVParallelLinearWithLoRA, theirs.RowParallelLinearWithLoRA, theirs.ReplicatedLinearWithLoRA,
    theirs.MergedColumnParallelLinearVariableSliceWithLoRA,
)  # fmt: skip
CLASSES = {cls: type(cls.__name__, (OnMultiLora, cls), {"__module__": __name__}) for cls in REPLACED}
"""Ours for each of vLLM's. They keep the names, by which vLLM asks for some."""
