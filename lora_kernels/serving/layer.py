"""Layers that take another adapter for each sequence of a batch."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels.nn.quantised import is_quantised
from lora_kernels.nn.quantised_base import QuantisedBase
from lora_kernels.ops.multi_lora import Slots, multi_lora, multi_lora_add_
from lora_kernels.serving.base import is_plain
from lora_kernels.serving.compiled import outside
from lora_kernels.serving.frame import Layout
from lora_kernels.serving.scope import Scope
from lora_kernels.serving.site import EmbeddingSite

OWN = ("slots", "quantised", "_quantised", "site", "scope", "name", "layouts", "routed", "by_tokens")
"""What a served layer has beside the attributes of the layer that it replaces."""


class Served:
    """What both kinds of layers know of the rows that they see."""

    scope: Scope
    name: str
    layouts: dict[int, Layout]
    """By the number of dimensions of the rows, as far as it is known."""
    routed: bool
    """A router chooses its rows."""
    by_tokens: bool
    """It sees what the model makes of tokens, and of nothing else."""

    def is_changed(self, modules: frozenset[str]) -> bool:
        """Whether it is among the modules that an adapter changes."""
        return self.name in modules

    def learn_nothing(self, scope: Scope, name: str) -> None:
        self.__dict__.update(scope=scope, name=name, layouts={}, routed=False, by_tokens=False)


class MultiLoRALinear(nn.Linear, Served):
    """y = W x + bias, and for each row what the adapters of its request add
    (`lora_kernels.multi_lora`).

    It has the parameters of the layer that it replaces. Outside a batch, and where no row has an
    adapter, it is that layer. Inside, it serves: gradients flow only if tensors of `slots` require
    them.
    """

    slots: Slots
    quantised: bool
    """Whether the weight is multiplied by its own kernels, and the adapters are added after."""
    _quantised: QuantisedBase | None = None
    """Where the weight is kept as codes that the ops read: what says how."""

    @classmethod
    def around(cls, linear: nn.Linear, slots: Slots, scope: Scope, name: str) -> "MultiLoRALinear":
        layer = cls.__new__(cls)
        layer.__dict__.update(linear.__dict__)
        held = layer._quantised = QuantisedBase(linear) if is_quantised(linear) else None
        layer.slots, layer.quantised = slots, held is None and not is_plain(linear.weight)
        layer.learn_nothing(scope, name)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x [..., in] → [..., out].

        Raises:
            ValueError: it is not known whose the rows of x are.
        """
        scope = self.scope
        frame = scope.current.get()
        if frame is None:
            frame = scope.resolve() if scope.openings else None
            if frame is None:
                return self._base_output(x)
        elif scope.generators and not frame.bound:
            frame = scope.resolve() or frame
        if frame.all_base:
            if frame.seen is not None:
                frame.seen(self, x)
            return self._base_output(x)
        plan = frame.plans.get((self.layouts.get(x.dim() - 1), x.shape))
        if plan is None:
            plan = frame.plan_of(self, x, x.shape[:-1])
            if plan is None:
                return self._base_output(x)
        pool = frame.batch.pool
        if pool is not None:
            weight = self._parameters.get("weight")
            if torch.compiler.is_compiling():
                outside.call(pool.look_at_weight, self.name, weight, frame.modules)
            else:
                pool.look_at_weight(self.name, weight, frame.modules)
        if frame.routes is not None:
            return frame.routes.through(self, x, plan)
        return self.with_plan(x, plan)

    def _base_output(self, x: Tensor) -> Tensor:
        held = self._quantised
        return F.linear(x, self.weight, self.bias) if held is None else held.output(x, self.bias)

    def with_plan(self, x: Tensor, plan: Any) -> Tensor:
        s, held = self.slots, self._parameters
        # an attribute of a module costs ten times as much, and may be what parametrize put there
        weight: Any = self.weight if (found := held.get("weight")) is None else found
        bias = held["bias"] if "bias" in held else self.bias
        if self.quantised:
            with torch.no_grad():
                return multi_lora_add_(F.linear(x, weight, bias), x, s, plan, bias)
        if self._quantised is not None:
            wanted, dtype = x.dtype, self._quantised.compute_dtype(x)
            if x.device.type != "cpu":
                with torch.no_grad():
                    return multi_lora_add_(self._quantised.output(x, bias), x, s, plan, bias)
            x, weight = x if wanted is dtype else x.to(dtype), self._quantised.weight(dtype)
        trains = s.a.requires_grad or s.b.requires_grad or s.gain.requires_grad or s.bias.requires_grad
        if trains or not torch.is_grad_enabled():
            y = multi_lora(x, weight, s, plan, bias)
        else:
            with torch.set_grad_enabled(False):
                y = multi_lora(x, weight, s, plan, bias)
        return y if self._quantised is None else y.to(wanted)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._quantised is not None:
            self._quantised.save(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self._quantised is not None:
            *_, unexpected, errors = rest
            self._quantised.take(self._parameters)
            self._quantised.load(state_dict, prefix, unexpected, errors)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slots={len(self.slots.rank)}"


class MultiLoRAEmbedding(nn.Embedding, Served):
    """y = W[i], and for each row what the adapters of its request add: s · B A[:, i].

    It has the parameters of the embedding that it replaces, and serves as `MultiLoRALinear` does,
    without gradients.
    """

    site: EmbeddingSite

    @classmethod
    def around(cls, embedding: nn.Embedding, site: EmbeddingSite, scope: Scope, name: str) -> "MultiLoRAEmbedding":
        layer = cls.__new__(cls)
        layer.__dict__.update(embedding.__dict__, site=site)
        layer.learn_nothing(scope, name)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x [...], integers → [..., dim].

        Raises:
            ValueError: it is not known whose the entries of x are.
        """
        y, scope = super().forward(x), self.scope
        frame = scope.current.get()
        if scope.openings and (frame is None or (scope.generators and not frame.bound)):
            frame = scope.resolve()
        if frame is not None and frame.seen is not None:
            frame.seen(self, x[..., None])
        if frame is None or self.name not in frame.modules:
            return y
        plan = frame.plans.get((self.layouts.get(x.dim()), x.shape, "entries"))
        if plan is None:
            plan = frame.plan_of(self, x, x.shape)
            if plan is None:
                return y
        with torch.no_grad():
            y, entries, site = y.detach(), x.reshape(-1), self.site
            for each in frame.batch.columns(plan):
                columns = site.looked_up(each.ids[:, 0], entries)
                multi_lora_add_(y, columns.view(*x.shape, columns.shape[1]), site.slots, each)
        return y
