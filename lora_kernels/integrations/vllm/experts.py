"""vLLM's mixture of experts with LoRA on the CPU, where vLLM has no kernels for it.

vLLM wraps the experts of a model when LoRA is enabled, whether an adapter changes them or not. On
the CPU it then chooses kernels for GPUs, and the first request ends the engine. Here the experts
compute as without LoRA, by vLLM's own kernel, but for the tokens whose adapters change them:

    y[t] = Σ_j weights[t, j] · down(act(gate(x[t]), up(x[t])))    with the matrices of e(t, j)

of which each is `expert_lora_linear` without an adapter, corrected in place by `multi_lora_add_`.
Its slots are pairs of adapter and expert, so ranks may differ from expert to expert.

Tensor parallelism is vLLM's: gate and up have rows of W, B, m on each rank; down has columns of W
and A, and its y is a part of a sum.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.model_executor.custom_op import maybe_get_oot_by_class
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from lora_kernels.adapters.config import AdapterError
from lora_kernels.integrations.vllm.adapters import flag_for_rank
from lora_kernels.integrations.vllm.step import Step, step_of
from lora_kernels.nn.experts import Routing, combine_choices, sort_choices
from lora_kernels.ops import dora_gain, expert_lora_linear, expert_weight_norm
from lora_kernels.ops.lora_linear.op import FLOATS
from lora_kernels.ops.multi_lora import multi_lora_add_
from lora_kernels.ops.multi_lora.plan import GAIN, BatchPlan, rows_of, slots_of
from lora_kernels.serving.site import Pages, Prepared, pages_of

Factors = Sequence[Tensor | None]
"""One tensor of each matrix, expert by expert, each expert's in the order of PARTS; None where the
adapter leaves the matrix alone."""
PARTS = ("gate", "up", "down")
ACTIVATIONS = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)


class ExpertsOnMultiLora(BaseLayerWithLoRA):
    """In the place of vLLM's FusedMoEWithLoRA and FusedMoE3DWithLoRA."""

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._routed.lora_base_layer_prefix = "base_layer."
        config = base_layer.moe_config
        self.experts: int = config.num_experts
        self.hidden, self.intermediate = config.hidden_dim, config.intermediate_size
        self.refusal = _refusal(base_layer)
        """Why adapters cannot change these experts."""
        self._tp_size, self._tp_rank = config.tp_size, config.tp_rank
        self._local = config.intermediate_size_per_partition
        self._plain: tuple[Tensor, Tensor] | None = None
        self._pages: list[Pages] = []
        self._held: set[int] = set()
        """The slots whose adapters change these experts; `_holds` says the same by slot."""
        if self.refusal is None:
            self._own_forward = self._routed.forward_modular
            self._routed.forward_modular = self.run

    @classmethod
    def can_replace_layer(
        cls, source_layer: Any, lora_config: Any, packed_modules_list: list[Any], model_config: Any = None
    ) -> bool:
        return isinstance(source_layer, maybe_get_oot_by_class(MoERunner))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)

    @property
    def quant_method(self) -> Any:
        return self.base_layer._quant_method

    @property
    def _shared_experts(self) -> Any:
        """Where vLLM looks for what it gives LoRA to."""
        return self.base_layer._shared_experts

    @property
    def _routed(self) -> Any:
        return self.base_layer.routed_experts

    def names_of_parts(self, name: str) -> list[str]:
        """What files with a module for each expert call the matrices, in the order of `Factors`;
        `name` is that of the layer."""
        routed = self._routed
        own = (routed.ckpt_gate_proj_name, routed.ckpt_up_proj_name, routed.ckpt_down_proj_name)
        return [f"{name}.{expert}.{part}" for expert in range(self.experts) for part in own]

    def parameter_shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of what files with a parameter of all experts hold."""
        return {"gate_up_proj": (2 * self.intermediate, self.hidden), "down_proj": (self.hidden, self.intermediate)}

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Only remembers; `set_mapping` follows. vLLM reads shapes and dtype of the rest when it
        makes adapters to warm up with."""
        self.lora_config, self._max_loras = lora_config, max_loras
        self.n_slices = len(PARTS) * self.experts
        rows, columns = self._shapes()
        empty = [
            torch.empty(1, 1, n, m, dtype=lora_config.lora_dtype, device="meta") for n, m in zip(rows, columns, strict=True)
        ]
        self.lora_a_stacked = self.lora_b_stacked = empty * self.experts

    def _shapes(self) -> tuple[list[int], list[int]]:
        """Rows and columns of W of each part, of all ranks together."""
        return [self.intermediate, self.intermediate, self.hidden], [self.hidden, self.hidden, self.intermediate]

    def set_mapping(self, punica_wrapper: Any) -> None:
        super().set_mapping(punica_wrapper)
        if self._pages or self.refusal is not None:
            return
        self._step: Step = step_of(punica_wrapper)
        most, dtype, count = self.lora_config.max_lora_rank, self.lora_config.lora_dtype, self._max_loras * self.experts
        # an id of a step is checked before it becomes that of a pair, so a pair's is never stale
        generation = torch.zeros(count, dtype=torch.int32)
        wide, hidden = self._routed.w13_weight.shape[1] // 2, self.hidden
        self._pages = [
            Pages(n_out, n_in, dtype, generation, count * pages_of(most), most, True)
            for n_out, n_in in ((wide, hidden), (wide, hidden), (hidden, wide))
        ]
        self._slots = [pages.slots for pages in self._pages]
        self._holds = torch.zeros(self._max_loras, dtype=torch.bool)

    def check_factors(
        self, name: str, lora_a: Factors, lora_b: Factors, magnitude: Factors | None, bias: Factors | None
    ) -> None:
        """Raises AdapterError unless an adapter fits the experts and is finite."""
        if self.refusal is not None:
            raise AdapterError(f"{name}: {self.refusal}")
        if bias is not None:
            raise AdapterError(f"{name}: lora_bias is not served on experts")
        if magnitude is not None and hasattr(self._routed, "w13_bias"):
            raise AdapterError(f"{name}: DoRA is not served on experts with a bias")
        rows, columns = self._shapes()
        most, dtype = self.lora_config.max_lora_rank, self.lora_config.lora_dtype
        for i, part in enumerate(self.names_of_parts(name)):
            a, b, n_out, n_in = lora_a[i], lora_b[i], rows[i % 3], columns[i % 3]
            m = None if magnitude is None else magnitude[i]
            for what, t in (("A", a), ("B", b), ("magnitude", m)):
                if t is not None and not bool(t.to(dtype).isfinite().all()):
                    raise AdapterError(f"{part}: {what} has values that are not finite as {dtype}")
            if a is None or b is None:
                continue
            wanted, found = ((len(a), n_in), (n_out, len(a))), (tuple(a.shape), tuple(b.shape))
            if wanted != found:
                raise AdapterError(f"{part}: A and B must be {wanted[0]} and {wanted[1]}, found {found[0]} and {found[1]}")
            if len(a) > most:
                raise AdapterError(f"{part}: the rank may be {most}, found {len(a)}; {flag_for_rank(len(a))}")
            if m is not None and len(m) != n_out:
                raise AdapterError(f"{part}: magnitude must have {n_out} elements, found {len(m)}")

    def reset_lora(self, index: int) -> None:
        for pages in self._pages if index in self._held else ():
            for slot in range(index * self.experts, (index + 1) * self.experts):
                if slot in pages.held:
                    pages.clear_slot(slot)
        if index in self._held:
            self._held.remove(index)
            self._holds[index] = False

    def set_lora(self, index: int, lora_a: Tensor | Factors, lora_b: Tensor | Factors) -> None:
        """Puts A and B, which vLLM has scaled, into a slot."""
        self.reset_lora(index)
        # vLLM's adapters to warm up with are zeros, and bring no weight of experts into memory
        # twice
        if isinstance(lora_a, Tensor) or not any(a is not None and bool(a.any()) for a in lora_a):
            return
        self._unpack()
        self._held.add(index)
        self._holds[index] = True
        for i, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
            if a is not None and b is not None:
                expert, part = divmod(i, len(PARTS))
                a, b = self._of_this_rank(part, a), self._of_this_rank(part, b, True)
                self._pages[part].put(index * self.experts + expert, Prepared(a, b.T, 1.0))

    def _of_this_rank(self, part: int, t: Tensor, rows: bool = False) -> Tensor:
        """A, or what has a row for each row of W, in the form of this rank's W, which may have
        zeros at the end."""
        dim = 0 if rows else 1
        if (part == 2) is rows:
            return t
        t = t.narrow(dim, self._tp_rank * self._local, self._local) if self._tp_size > 1 else t
        missing = self._routed.w13_weight.shape[1] // 2 - self._local
        return F.pad(t, (0, missing) if dim else (0, 0, 0, missing)) if missing else t

    def _unpack(self) -> None:
        """The weights as [experts, out, in]: a copy, once an adapter changes experts."""
        if self._plain is None:
            experts = self._routed.quant_method.moe_kernel.fused_experts
            weights = (self._routed.w13_weight.detach(), self._routed.w2_weight.detach())
            isa = None if experts._use_zentorch else experts.isa
            self._plain = unpacked(weights[0], isa), unpacked(weights[1], isa)

    def forget_norms(self) -> None:
        """The weights of the base have changed."""
        self._plain = None

    def complete(self, index: int, name: str, magnitude: Factors | None, bias: Any) -> Exception | None:
        """Puts the gains of DoRA beside the factors of a slot, of which experts may have some.
        Returns what is wrong; each rank has its own part of a gain, and all must go through all
        layers."""
        wrong: Exception | None = None
        for part, pages in enumerate(self._pages):
            there = [(e, m) for e in range(self.experts) if (m := magnitude[e * 3 + part]) is not None] if magnitude else []
            if not there:
                continue
            try:
                squared = self._norm_squared(part, index)
            except Exception as error:
                wrong, squared = error, torch.zeros(self.experts, pages.slots.b.shape[1])
            if part == 2 and self._tp_size > 1:
                squared = tensor_model_parallel_all_reduce(squared)
            for expert, m in there:
                slot, norm = index * self.experts + expert, squared[expert].sqrt()
                gain = dora_gain(self._of_this_rank(part, m[:, None].float(), True)[:, 0], norm)
                pages.slots.gain[slot] = gain
                pages.slots.flags[slot] |= GAIN
                if not bool(gain.isfinite().all()):
                    wrong = wrong or AdapterError(f"{name}: the gain of DoRA is not finite")
        return wrong

    def _norm_squared(self, part: int, index: int) -> Tensor:
        """‖W + BA‖² by expert and row, of the columns of W that are here; float32."""
        if self._plain is None:
            raise AdapterError("DoRA on experts needs an A that is not zero")
        wide, s = self._routed.w13_weight.shape[1] // 2, self._slots[part]
        w = self._plain[1] if part == 2 else self._plain[0][:, part * wide : (part + 1) * wide]
        first = index * self.experts
        most = max(1, int(s.rank[first : first + self.experts].max()))
        a, b = w.new_zeros(self.experts, most, w.shape[2]), w.new_zeros(self.experts, w.shape[1], most)
        for expert in range(self.experts):
            at = rows_of(s, first + expert)
            a[expert, : len(at)], b[expert, :, : len(at)] = s.a[at], s.b[at].T
        return expert_weight_norm(w, a, b).square().float()

    def run(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *shared: Any, **named: Any) -> Any:
        """In place of RoutedExperts.forward_modular: x [tokens, hidden], weights and ids [tokens,
        k]. On the CPU the runner computes shared experts itself."""
        if not self._held or self._step.all_base:
            return self._own_forward(x, topk_weights, topk_ids, *shared, **named)
        slot = self._slots_of_tokens(len(x))
        ours = torch.nonzero(slot >= 0)[:, 0]
        if not len(ours):
            return self._own_forward(x, topk_weights, topk_ids, *shared, **named)
        if len(ours) == len(x):
            return self._run_adapted(slot, x, topk_weights, topk_ids)
        # so that what a token without adapter gets hangs on no other
        rest, y = torch.nonzero(slot < 0)[:, 0], torch.empty_like(x)
        y[rest] = self._own_forward(x[rest], topk_weights[rest], topk_ids[rest])
        y[ours] = self._run_adapted(slot[ours], x[ours], topk_weights[ours], topk_ids[ours])
        return y

    def _slots_of_tokens(self, tokens: int) -> Tensor:
        """The slot of each token's adapter; -1 where it changes none of these experts."""
        ids = self._step.plan(tokens).ids[:, 0]
        slot, known = slots_of(ids, self._step.generation)
        return torch.where(known & self._holds[slot], slot, -1)

    def _run_adapted(self, slot: Tensor, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Of tokens whose adapters change these experts."""
        if self._routed.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        assert self._plain is not None
        (w13, w2), (gate, up, down) = self._plain, self._slots
        routing = sort_choices(topk_ids.long(), self.experts)
        plan = self._plan(slot, topk_ids, routing)
        bias13, bias2 = getattr(self._routed, "w13_bias", None), getattr(self._routed, "w2_bias", None)
        rows = x.index_select(0, routing.tokens)
        h = expert_lora_linear(rows, routing.ends, w13, None, None, bias=bias13)
        multi_lora_add_(h, rows, [gate, up], plan)
        rows = h.new_empty(len(h), h.shape[1] // 2)
        apply_moe_activation(self._routed.activation, rows, h)
        y = expert_lora_linear(rows, routing.ends, w2, None, None, bias=bias2)
        multi_lora_add_(y, rows, down, plan)
        return combine_choices(y, topk_weights, routing).to(x.dtype)

    def _plan(self, slot: Tensor, topk_ids: Tensor, routing: Routing) -> BatchPlan:
        """The pair of each row."""
        expert = topk_ids.reshape(-1).index_select(0, routing.choices)
        pairs = slot.index_select(0, routing.tokens) * self.experts + expert
        return BatchPlan.build(pairs, self._max_loras * self.experts)


def _refusal(runner: Any) -> str | None:
    """Why adapters cannot change the experts of a runner."""
    config, routed = runner.moe_config, runner.routed_experts
    method = routed.quant_method
    experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
    if not isinstance(method, UnquantizedFusedMoEMethod) or not isinstance(experts, CPUUnquantizedExperts):
        return f"adapters on experts are served over floating weights, these are of {type(method).__name__}"
    if routed.w13_weight.dtype not in FLOATS or routed.w13_weight.shape[2] != config.hidden_dim_unpadded:
        return f"adapters are not served on experts of {routed.w13_weight.dtype} and {list(routed.w13_weight.shape)}"
    if config.activation not in ACTIVATIONS or experts.activation_config.clamp_limit is not None:
        return f"adapters are not served on experts with the activation {config.activation.value}, or with a clamp"
    if config.moe_parallel_config.use_ep or config.dp_size > 1 or config.is_sequence_parallel or config.pcp_size > 1:
        return "adapters on experts are served under tensor parallelism alone"
    return None


def unpacked(w: Tensor, isa: str | None) -> Tensor:
    """A weight [experts, out, in] that vLLM has packed for one of its kernels; of None it has not.

    Raises:
        AdapterError: packing did more than to change the order.
    """
    if isa is None:
        return w
    plain, places = torch.empty_like(w), _packed_places(tuple(w.shape[1:]), w.dtype, isa)
    for packed, one in zip(w, plain, strict=True):
        one.view(-1)[places] = packed.reshape(-1)
    if not torch.equal(cpu_prepack_moe_weight(plain[:1], isa), w[:1]):
        raise AdapterError(f"adapters are not served on experts that vLLM has packed for {isa}")
    return plain


@lru_cache(maxsize=2)
def _packed_places(shape: tuple[int, int], dtype: torch.dtype, isa: str) -> Tensor:
    """Of which element of a matrix each element of the packed one is a copy: numbers are packed,
    some bits at a time."""
    count, integers = shape[0] * shape[1], {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = 8 * dtype.itemsize - 1
    numbers, places = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    for first in range(0, count.bit_length(), bits):
        some = ((numbers >> first) & ((1 << bits) - 1)).to(integers).view(dtype).view(1, *shape)
        places += cpu_prepack_moe_weight(some, isa).view(-1).view(integers).long() << first
    if not torch.equal(places.sort().values, numbers):
        raise AdapterError(f"adapters are not served on experts that vLLM has packed for {isa}")
    return places
