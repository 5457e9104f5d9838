"""A model whose layers take another adapter for each sequence of a batch."""

import functools
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels.adapters.inject import uncompiled_model
from lora_kernels.ops.multi_lora import Slots, multi_lora, multi_lora_add_
from lora_kernels.serving.base import is_plain
from lora_kernels.serving.batch import Batch, current_batch
from lora_kernels.serving.pool import AdapterPool
from lora_kernels.serving.site import EmbeddingSite

Model = TypeVar("Model", bound=nn.Module)


class MultiLoRALinear(nn.Linear):
    """y = W x + bias, and for each row what the adapters of the current batch add
    (`lora_kernels.multi_lora`).

    It has the parameters of the layer that it replaces. Outside a batch, and where no row has an
    adapter, it is that layer. Inside, it serves: gradients flow only if tensors of `slots` require
    them.
    """

    slots: Slots
    quantised: bool
    """Whether the weight is multiplied by its own kernels, and the adapters are added after."""

    @classmethod
    def around(cls, linear: nn.Linear, slots: Slots) -> "MultiLoRALinear":
        layer = cls.__new__(cls)
        layer.__dict__.update(linear.__dict__)
        layer.slots, layer.quantised = slots, not is_plain(linear.weight)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x [..., in] → [..., out].

        Raises:
            ValueError: the rows of x are no multiple of the requests of the batch.
        """
        batch = current_batch()
        if batch is None or batch.all_base:
            return F.linear(x, self.weight, self.bias)
        plan, s = batch.plan(x.numel() // max(x.shape[-1], 1)), self.slots
        if self.quantised:
            with torch.no_grad():
                return multi_lora_add_(F.linear(x, self.weight, self.bias), x, s, plan, self.bias)
        trains = s.a.requires_grad or s.b.requires_grad or s.gain.requires_grad or s.bias.requires_grad
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            return multi_lora(x, self.weight, s, plan, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slots={len(self.slots.rank)}"


class MultiLoRAEmbedding(nn.Embedding):
    """y = W[i], and for each row what the adapters of the current batch add: s · B A[:, i].

    It has the parameters of the embedding that it replaces, and serves as `MultiLoRALinear` does,
    without gradients.
    """

    site: EmbeddingSite
    name: str

    @classmethod
    def around(cls, embedding: nn.Embedding, site: EmbeddingSite, name: str) -> "MultiLoRAEmbedding":
        layer = cls.__new__(cls)
        layer.__dict__.update(embedding.__dict__, site=site, name=name)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x [...], integers → [..., dim].

        Raises:
            ValueError: x has no multiple of the batch's requests as its first dimension.
        """
        y, batch = super().forward(x), current_batch()
        if batch is None or self.name not in batch.modules:
            return y
        if x.dim() > 1 and x.shape[0] % len(batch.ids):
            raise ValueError(
                f"adapters: {len(batch.ids)} were given, for {self.name} with an input of {list(x.shape)}; its first dimension"
                " must be a multiple (positions that all requests share are nobody's to adapt)"
            )
        with torch.no_grad():
            y, entries, site = y.detach(), x.reshape(-1), self.site
            for plan in batch.columns(entries.numel()):
                columns = site.looked_up(plan.ids[:, 0], entries)
                multi_lora_add_(y, columns.view(*x.shape, columns.shape[1]), site.slots, plan)
        return y


def serve(model: Model, pool: AdapterPool) -> Model:
    """Makes `model` take adapters by name, in place, and returns it:

        model(input_ids, adapters=["customer-7", None]);  model.generate(input_ids, adapters=[...])

    One entry for each sequence: a name of the pool, None for the base, or several names. Without
    `adapters`, or inside `pool.batch(...)`, nothing changes in how it is called. The layers are
    those of the pool; `unserve` puts the old ones back.

    Raises:
        ValueError: the pool is another model's, or the model is served already.
    """
    if uncompiled_model(model) is not pool.model:
        raise ValueError("serve: the pool was made for another model")
    if any(isinstance(m, MultiLoRALinear | MultiLoRAEmbedding) for m in model.modules()):
        raise ValueError("serve: the model is served already; unserve(model) first")
    for name, site in pool.sites.items():
        parent, _, child = name.rpartition(".")
        owner = pool.model.get_submodule(parent)
        if isinstance(site, EmbeddingSite):
            new: nn.Module = MultiLoRAEmbedding.around(getattr(owner, child), site, name)
        else:
            new = MultiLoRALinear.around(getattr(owner, child), site.slots)
        setattr(owner, child, new)
    for method in ("forward", "generate"):
        call = getattr(model, method, None)
        if call is not None:
            model.__dict__[method] = _with_adapters(call, pool)
    return model


def unserve(model: Model) -> Model:
    """Puts the layers back that `serve` replaced, and returns the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, MultiLoRALinear | MultiLoRAEmbedding):
            kind = nn.Linear if isinstance(module, MultiLoRALinear) else nn.Embedding
            parent, _, child = name.rpartition(".")
            plain = kind.__new__(kind)
            ours = ("slots", "quantised", "site", "name")
            plain.__dict__.update({key: value for key, value in module.__dict__.items() if key not in ours})
            setattr(model.get_submodule(parent), child, plain)
    for method in ("forward", "generate"):
        if hasattr(model.__dict__.get(method), "_lora_kernels"):
            del model.__dict__[method]
    return model


def _with_adapters(call: Any, pool: AdapterPool) -> Any:
    @functools.wraps(call)
    def call_in_batch(*args: Any, adapters: Any = None, adapter_weights: Any = None, **kwargs: Any) -> Any:
        if adapters is None:
            return call(*args, **kwargs)
        batch: Batch = pool.batch(adapters, adapter_weights)
        with torch.no_grad(), batch:
            return call(*args, **kwargs)

    call_in_batch._lora_kernels = True  # type: ignore[attr-defined]
    return call_in_batch
