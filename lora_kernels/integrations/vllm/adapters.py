"""What vLLM's loader leaves out of an adapter: DoRA's magnitudes and lora_bias."""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from torch import Tensor
from vllm.config.lora import MaxLoRARanks
from vllm.lora import lora_model as theirs
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import parse_fine_tuned_lora_name

from lora_kernels.adapters.config import AdapterError
from lora_kernels.adapters.inject import first_names

MAGNITUDE, BIAS = ".lora_magnitude_vector", ".lora_B.bias"


@dataclasses.dataclass
class AdapterExtra:
    """Of one module of the adapter."""

    magnitude: Tensor | None = None
    """m [out]."""
    bias: Tensor | None = None
    """s · c [out]."""


def split_name(name: str) -> tuple[str, str] | None:
    """(the name that B has there, MAGNITUDE or BIAS), or None for a tensor that vLLM knows."""
    for suffix, kind in ((MAGNITUDE, MAGNITUDE), (MAGNITUDE + ".weight", MAGNITUDE), (BIAS, BIAS)):
        if name.endswith(suffix):
            return name.removesuffix(suffix) + ".lora_B.weight", kind
    return None


def parse_name(name: str, weights_mapper: Any = None) -> tuple[str, bool]:
    """vLLM's parse_fine_tuned_lora_name, which knows magnitudes and biases too: (module, whether it
    is A)."""
    found = split_name(name)
    return parse_fine_tuned_lora_name(name if found is None else found[0], weights_mapper)


def from_dict(cls: type[PEFTHelper], config: dict[str, Any]) -> PEFTHelper:
    """Around PEFTHelper.from_dict, which leaves out which parameters are adapted."""
    helper = _from_dict(cls, config)
    helper.target_parameters = tuple(config.get("target_parameters") or ())
    return helper


_from_dict = PEFTHelper.from_dict.__func__


def rank_and_scaling(self: PEFTHelper, module_name: str) -> tuple[int, float]:
    """Around PEFTHelper.get_rank_and_scaling: the patterns are for the name of a parameter, where
    PEFT adapts that."""
    full = f"{module_name}.weight"
    if any(full == name or full.endswith(f".{name}") for name in getattr(self, "target_parameters", ())):
        module_name = full
    return _rank_and_scaling(self, module_name)


_rank_and_scaling = PEFTHelper.get_rank_and_scaling


def unsupported_features(self: PEFTHelper) -> list[str]:
    """In place of PEFTHelper._validate_features: all that it finds but DoRA and lora_bias."""
    return _features(dataclasses.replace(self, use_dora=False, lora_bias=False))


_features = PEFTHelper._validate_features


def flag_for_rank(rank: int) -> str:
    """How a server is started that takes an adapter of that rank."""
    enough = [most for most in get_args(MaxLoRARanks) if most >= rank]
    return f"--max-lora-rank {min(enough)} raises it" if enough else f"--max-lora-rank goes to {max(get_args(MaxLoRARanks))}"


def check_rank(self: PEFTHelper, lora_config: Any) -> None:
    """Around PEFTHelper.validate_legal: what it says of the rank, and which flag that is."""
    rank = max([self.r, *self.rank_pattern.values()])
    if rank > lora_config.max_lora_rank:
        raise AdapterError(f"its rank {rank} is greater than max_lora_rank {lora_config.max_lora_rank}; {flag_for_rank(rank)}")
    _legal(self, lora_config)


_legal = PEFTHelper.validate_legal


class Model(LoRAModel):
    """vLLM's adapter with `extras`, by the names of its modules in vLLM's model, before packing."""

    extras: Mapping[str, AdapterExtra] = {}
    path: str | None = None
    """Where it was read from."""
    helper: PEFTHelper | None = None
    """Its configuration."""
    names: Mapping[str, str] = {}
    """What its files call each module."""

    @classmethod
    def from_lora_tensors(
        cls, lora_model_id: int, tensors: dict[str, Tensor], peft_helper: PEFTHelper, *args: Any, **kwargs: Any
    ) -> "Model":
        """As vLLM's; a tensor that is missing or has a wrong rank is an AdapterError.

        What DoRA and lora_bias add is taken out first, since vLLM raises for it.
        """
        own: dict[str, Tensor] = {}
        rest: dict[str, Tensor] = {}
        skipped = kwargs.get("skip_prefixes") or []
        for name, tensor in tensors.items():
            if not cls._should_skip_module(name, skipped):
                (own if split_name(name) else rest)[name] = tensor
        model = super().from_lora_tensors(lora_model_id, rest, peft_helper, *args, **kwargs)
        for name, lora in model.loras.items():
            if lora.lora_a is None or lora.lora_b is None:
                raise AdapterError(f"{name}: {'A' if lora.lora_a is None else 'B'} is missing")
            if lora.lora_a.dim() == lora.lora_b.dim() == 2 and lora.lora_a.shape[0] != lora.lora_b.shape[1]:
                found = f"{list(lora.lora_a.shape)} and {list(lora.lora_b.shape)}"
                raise AdapterError(f"{name}: A and B must be [r, in] and [out, r], found {found}")
            if lora.lora_a.dim() == 2 and len(lora.lora_a) != lora.rank and not is_of_all_experts(name):
                rows = len(lora.lora_a)
                raise AdapterError(f"{name}: A must have {lora.rank} rows, the rank of its configuration, found {rows}")
        if not model.loras:
            raise AdapterError("the adapter changes no module")
        extras = {name: AdapterExtra() for name in model.loras}
        mapper = kwargs.get("weights_mapper")
        model.helper = peft_helper
        model.names = {parse_fine_tuned_lora_name(name, mapper)[0]: parse_fine_tuned_lora_name(name)[0] for name in rest}
        for name, tensor in own.items():
            plain, kind = split_name(name) or ("", "")
            module, _ = parse_fine_tuned_lora_name(plain, mapper)
            if module not in extras:
                raise AdapterError(f"{name}: the module has no A and B")
            vector = tensor.float().flatten()
            if kind == MAGNITUDE:
                extras[module].magnitude = vector
            else:
                extras[module].bias = vector * model.loras[module].scaling
        for kind, asked in (("magnitude", peft_helper.use_dora), ("bias", peft_helper.lora_bias)):
            having = {name for name, extra in extras.items() if getattr(extra, kind) is not None}
            if asked and having != extras.keys():
                raise AdapterError(f"the {kind} is missing of {first_names(sorted(extras.keys() - having))}")
            if having and not asked:
                raise AdapterError(f"the config does not say that {first_names(sorted(having))} has a {kind}")
        model.extras = {name: e for name, e in extras.items() if e.magnitude is not None or e.bias is not None}
        return model


def is_of_all_experts(name: str) -> bool:
    """Whether a module of an adapter holds the factors of all experts, as PEFT's
    `target_parameters` has them."""
    return name.removesuffix(".base_layer").endswith(".experts")


def install_loader() -> None:
    theirs.parse_fine_tuned_lora_name = parse_name
    PEFTHelper.from_dict = classmethod(from_dict)
    PEFTHelper.get_rank_and_scaling = rank_and_scaling
    PEFTHelper._validate_features = unsupported_features
    PEFTHelper.validate_legal = check_rank
