"""The factors of experts, of the tensors in a file."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lora_kernels.adapters.config import AdapterError
from lora_kernels.adapters.targets import Target
from lora_kernels.adapters.weights import Slot
from lora_kernels.nn.expert_checks import MAGNITUDE
from lora_kernels.serving.experts import Experts, experts_at


def experts_of(modules: Mapping[str, nn.Module], targets: Sequence[Target]) -> dict[str, Experts]:
    """The weights of experts among what an adapter changes, by the pool's names. The weight of a
    linear layer is none of them: it is served as that layer.

    Raises:
        AdapterError: a parameter is of neither.
    """
    found: dict[str, Experts] = {}
    for target in targets:
        module = modules[target.name]
        if target.parameter is None or (isinstance(module, nn.Linear) and target.parameter == "weight"):
            continue
        experts = experts_at(modules, target.key)
        if not isinstance(experts, dict):
            what = f"a parameter of {type(module).__name__}" if experts is None else experts
            known = "of parameters a batch changes those of experts and linear layers"
            raise AdapterError(f"it adapts {target.key}, {what}; {known}")
        found |= experts
        if found[target.key].count == 1 and found[target.key].form.transposed:
            raise AdapterError(f"it adapts {target.key}, of one expert, whose [in, out] PEFT takes for [out, in]")
    return found


def expert_factors(
    experts: Experts, target: Target, slots: Mapping[str, Slot], tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A [experts, r, in], B [experts, out, r] and the magnitude [experts, out], if there is one.

    A file has A as [experts · r, in] and B as [out, r · experts], the experts side by side for each
    rank; or the factors of each expert's own layers, of which several may be one matrix now: they
    are blocks, those of B on the diagonal.
    """
    of = target.name, target.parameter
    own = [(slot, tensors[key]) for key, slot in slots.items() if (slot.owner, slot.parameter) == of]
    count, (n_out, n_in) = experts.count, experts.matrix
    shapes = {"lora_A": (count, target.r, n_in), "lora_B": (n_out, target.r, count), MAGNITUDE: (count, n_out)}
    whole: dict[str, Tensor] = {}
    for slot, value in own:
        if slot.part is None:
            whole[slot.name] = value.view(shapes[slot.name])
            continue
        to = whole.setdefault(slot.name, value.new_zeros(shapes[slot.name]))
        expert, i, parts = slot.part
        if slot.name == "lora_B":
            to[..., expert].chunk(parts)[i].chunk(parts, 1)[i].copy_(value)
        else:
            to[expert].chunk(parts)[i].copy_(value)
    return whole["lora_A"], whole["lora_B"].permute(2, 0, 1), whole.get(MAGNITUDE)
