"""A model whose layers take another adapter for each sequence of a batch."""

from typing import Any, TypeVar

from torch import nn

from lora_kernels.adapters.inject import uncompiled_model
from lora_kernels.nn.quantised_base import BESIDE_CODES
from lora_kernels.serving.door import close_doors, open_doors, replace_method
from lora_kernels.serving.experts import KEY
from lora_kernels.serving.experts_layer import ServedExperts
from lora_kernels.serving.experts_site import ExpertsSite
from lora_kernels.serving.frame import Frame
from lora_kernels.serving.layer import OWN, MultiLoRAEmbedding, MultiLoRALinear
from lora_kernels.serving.pool import AdapterPool
from lora_kernels.serving.probe import carry_rows, probe_call, probe_tokens, undisturbed
from lora_kernels.serving.site import EmbeddingSite

Model = TypeVar("Model", bound=nn.Module)


def serve(model: Model, pool: AdapterPool) -> Model:
    """Makes `model` take adapters by name, in place, and returns it:

        model(input_ids, adapters=["customer-7", None]);  model.generate(input_ids, adapters=[...])

    One entry for each sequence: a name of the pool, None for the base, or several names. Without
    `adapters`, or inside `pool.batch(...)`, nothing changes in how it is called. The layers are
    those of the pool; `unserve` puts the old ones back. A model of tokens runs on a few of them
    here, so that it is known where its layers see sequences; another one on the first batch with
    different adapters.

    Raises:
        ValueError: the pool is another model's, or the model is served already.
    """
    inner = uncompiled_model(model)
    if inner is not pool.model:
        raise ValueError("serve: the pool was made for another model")
    if any(isinstance(m, MultiLoRALinear | MultiLoRAEmbedding) or KEY in vars(m) for m in model.modules()):
        raise ValueError("serve: the model is served already; unserve(model) first")
    scope, layers = pool.scope, []
    scope.block = None
    experts: dict[str, dict[str, ExpertsSite]] = {}
    for name, site in pool.sites.items():
        if isinstance(site, ExpertsSite):
            path, _, parameter = name.rpartition(".")
            experts.setdefault(path, {})[parameter] = site
            continue
        parent, _, child = name.rpartition(".")
        owner = pool.model.get_submodule(parent)
        if isinstance(site, EmbeddingSite):
            new: Any = MultiLoRAEmbedding.around(getattr(owner, child), site, scope, name)
        else:
            new = MultiLoRALinear.around(getattr(owner, child), site.slots, scope, name)
        setattr(owner, child, new)
        layers.append(new)
    linear = list(layers)
    for path, sites in experts.items():
        module = pool.model.get_submodule(path)
        module.__dict__[KEY] = served = ServedExperts(sites, scope, path)
        replace_method(module, "forward", ServedExperts.wrap)
        layers.append(served)
    forward = type(inner).forward
    blocks: list[Any] = []

    def learn(probe: Any) -> bool:
        """Once more where there are routers: for the inputs of their blocks."""
        known = probe(layers)
        if known and not blocks:
            blocks.extend(carry_rows(inner, scope, linear, replace_method))
            known = not blocks or probe(blocks)
        return bool(known)

    own = inner.__dict__.get("forward")
    call = forward if own is None else lambda _, *args, **kwargs: own(*args, **kwargs)
    with undisturbed(inner):
        learned = learn(lambda of: probe_tokens(inner, call, scope, of))
    tried: set[Any] = set()

    def known() -> bool:
        return all(layer.layouts or layer.routed for layer in layers)

    scope.unsure = not (learned and known())

    def probe(inner: nn.Module, call: Any, args: Any, kwargs: Any, frame: Frame) -> None:
        kinds = len(args), tuple(name for name, value in kwargs.items() if value is not None)
        if kinds not in tried:
            tried.add(kinds)
            unknown = lambda of: [each for each in of if not each.layouts and not each.routed]  # noqa: E731
            learn(lambda of: probe_call(inner, call, scope, unknown(of), args, kwargs, frame))
            scope.unsure = not known()

    open_doors(inner, pool, scope, probe)
    return model


def unserve(model: Model) -> Model:
    """Puts the layers back that `serve` replaced, and returns the model."""
    inner = uncompiled_model(model)
    for name, module in list(inner.named_modules()):
        if isinstance(module, MultiLoRALinear | MultiLoRAEmbedding):
            kind: Any = nn.Linear if isinstance(module, MultiLoRALinear) else nn.Embedding
            parent, _, child = name.rpartition(".")
            own = {key: value for key, value in module.__dict__.items() if key not in OWN}
            if isinstance(module, MultiLoRALinear) and module._quantised is not None:
                # its weight knows the module, and loading may have given it another state
                plain = module._quantised.module
                own = {key: value for key, value in own.items() if key not in BESIDE_CODES}
            else:
                plain = kind.__new__(kind)
            plain.__dict__.update(own)
            setattr(inner.get_submodule(parent), child, plain)
    close_doors(inner)
    for module in inner.modules():
        module.__dict__.pop(KEY, None)
    return model
