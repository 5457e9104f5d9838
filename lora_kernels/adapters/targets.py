"""Which modules and parameters of a model a LoraConfig adapts, and with which r and lora_alpha:
PEFT's rules."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_kernels.adapters.config import AdapterError, LoraConfig, short_repr
from lora_kernels.adapters.patterns import Budget, NamePattern, suffix_starts
from lora_kernels.nn import LoRALinear
from lora_kernels.nn.forms import Form, form_of
from lora_kernels.nn.quantised_experts import parameter_names

# what PEFT adapts when target_modules is None, by model_type
_DEFAULTS = {
    "q_proj v_proj": "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3",
    "query value": "bert roberta xlm-roberta electra layoutlm",
    "query_key_value": "bloom gpt_neox chatglm falcon RefinedWeb RefinedWebModel",
    "q v": "t5 mt5",
    "query_proj value_proj": "deberta-v2",
    "q_proj v_proj fc1 fc2": "phi",
    "q_proj k_proj v_proj o_proj": "nemotron_h",
}
# those of which PEFT knows others, or none beside target_parameters
_OTHER_DEFAULTS = "gpt2 blip-2 deberta gpt_bigcode mpt btlm codegen gemma4 rwkv rwkv7".split()
_NONE_BESIDE_PARAMETERS = ("mixtral",)
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True)
class Target:
    """One module to adapt, or one parameter of a module."""

    name: str
    """Of the module."""
    r: int
    lora_alpha: float
    parameter: str | None = None

    @property
    def key(self) -> str:
        """The name of what is adapted, which rank_pattern and alpha_pattern are matched with."""
        return self.name if self.parameter is None else f"{self.name}.{self.parameter}"


@dataclass(frozen=True)
class Selection:
    """What a configuration selects in one model."""

    targets: list[Target]
    """Modules, then parameters, each in the order of the model."""
    saved: list[str]
    """The modules to copy, train in full and save."""
    saving: tuple[str, ...]
    """The names that selected them: modules_to_save and the heads of the task."""
    target_modules: list[str] | str
    """The target_modules to write to a file: "all-linear" and None depend on the model, this does
    not."""

    def by_module(self) -> dict[str, list[Target]]:
        """The targets of each module: one, or its parameters."""
        found: dict[str, list[Target]] = {}
        for target in self.targets:
            found.setdefault(target.name, []).append(target)
        return found

    def names(self) -> list[str]:
        """The adapted modules."""
        return list(self.by_module())


def select_targets(model: nn.Module, config: LoraConfig, *, strict: bool = True) -> Selection:
    """Finds the modules and parameters that `config` adapts in `model`, as PEFT does: names in
    target_parameters are those of parameters, whole or their ends after a dot, and exclude_modules
    and layers_to_transform do not act on them.

    Raises:
        AdapterError: nothing is selected, a pattern is refused, or, if `strict`, some name or
            pattern matches no module (PEFT ignores it); the message lists near names.
    """
    names = [name for name, _ in model.named_modules() if name]
    wanted = _target_modules(model, config)
    heads = _HEADS.get(config.task_type or "", ())
    saving = tuple(dict.fromkeys((*(config.modules_to_save or ()), *heads)))
    saving_names, budget = _Ends(saving), Budget()
    for name in names:
        budget.add_name(name)
    saved = _outermost([n for n, _ in model.named_modules(remove_duplicate=False) if n and saving_names.end(n)])
    targeted = _Matcher(wanted, "target_modules", budget)
    excluded = _Matcher(config.exclude_modules or [], "exclude_modules", budget)
    layers = _Layers(config, budget)
    found = [
        name
        for name in names
        if targeted(name)
        and (targeted.is_full_name(name) or layers(name))
        and not excluded(name)
        and not saving_names.are_part_of(name)
    ]
    owners = _find_parameters(model, config.target_parameters or [], strict)
    if not found and not owners:
        raise AdapterError(
            f"target_modules={short_repr(wanted)} selects no module of {type(model).__name__}"
            f" (target_parameters={short_repr(config.target_parameters)}, exclude_modules="
            f"{short_repr(config.exclude_modules)}, layers_to_transform={short_repr(config.layers_to_transform)});"
            f" {_near_names(wanted, names)}{_parameter_hint(model, wanted)}"
        )
    ranks, alphas = (
        [(NamePattern(key, field, budget), value) for key, value in patterns.items()]
        for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern))
    )
    if strict:
        _check_all_match("target_modules", wanted, names, hint=lambda missed: _parameter_hint(model, missed))
        _check_all_match("exclude_modules", config.exclude_modules or [], names)
        ends = {name[i:] for name in names for i in range(len(name))}
        for module in saving:
            if module not in heads and module not in ends:
                raise AdapterError(f"modules_to_save: {short_repr(module)} matches no module; {_near_names([module], names)}")
        for pattern, _ in ranks + alphas:
            if not any(map(pattern.matches_end, [*found, *owners])):
                what = "module or parameter" if owners else "module"
                near = _near_names(pattern.text, [*found, *owners])
                raise AdapterError(f"{pattern.where}: matches no adapted {what}; {near}")
    parameters: dict[str, tuple[str, str | None]] = {**{name: (name, None) for name in found}, **owners}
    targets = [
        Target(name, _first_match(ranks, key, config.r), _first_match(alphas, key, config.lora_alpha), parameter)
        for key, (name, parameter) in parameters.items()
    ]
    return Selection(targets, saved, saving, wanted)


def _find_parameters(model: nn.Module, wanted: list[str], strict: bool) -> dict[str, tuple[str, str]]:
    """The parameters that target_parameters names, with their modules and their names there."""
    if not wanted:
        return {}
    matches, keys = _Matcher(wanted, "target_parameters"), _parameters_of(model)
    if strict:
        _check_all_match("target_parameters", wanted, list(keys), "parameter")
    found = {key: owner for key, owner in keys.items() if matches(key)}
    if top := [parameter for name, parameter in found.values() if not name]:
        raise AdapterError(f"target_parameters: {top[0]} is a parameter of the model itself; only those of its modules can be")
    return found


def _parameters_of(model: nn.Module) -> dict[str, tuple[str, str]]:
    """The module and the last name of each parameter, by its name; those that a parametrization
    computes count, too."""
    found = {}
    for name, module in model.named_modules():
        held = [parameter for parameter, tensor in module._parameters.items() if tensor is not None]
        computed: Any = module._modules.get("parametrizations") or ()
        if computed and isinstance(form := form_of(module), Form):
            held = [each for each in parameter_names(module, form.weights) if each in computed or each in held]
        found.update({f"{name}.{parameter}": (name, parameter) for parameter in (*held, *computed)})
    return found


def _parameter_hint(model: nn.Module, wanted: list[str] | str) -> str:
    matches = _Matcher(wanted, "target_modules") if isinstance(wanted, list) else None
    found = next(filter(matches, _parameters_of(model)), None) if matches else None
    return f"; {found} is a parameter, which target_parameters may name" if found else ""


class _Ends:
    """Names that select the modules whose own ends with one of them, character by character."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names, self._lengths = frozenset(names), sorted({len(name) for name in names})

    def end(self, name: str) -> bool:
        return any(name[-length:] in self._names for length in self._lengths if length <= len(name))

    def are_part_of(self, name: str) -> bool:
        """Whether one of them is some parts of `name`, between its dots."""
        parts = name.split(".")
        return any(".".join(parts[i:j]) in self._names for j in range(len(parts) + 1) for i in range(j))


class _Matcher:
    """A list of names, each a whole name or its end after a dot; or one regular expression for
    whole names."""

    def __init__(self, wanted: list[str] | str, field: str, budget: Budget | None = None) -> None:
        self._pattern = NamePattern(wanted, field, budget) if isinstance(wanted, str) else None
        self._names = frozenset(() if isinstance(wanted, str) else wanted)

    def __call__(self, name: str) -> bool:
        if self._pattern is not None:
            return self._pattern.fullmatch(name)
        parts = name.split(".")
        return any(".".join(parts[i:]) in self._names for i in range(len(parts)))

    def is_full_name(self, name: str) -> bool:
        """Whether the name is given in full, which PEFT adapts whatever the layer number."""
        return name in self._names


class _Layers:
    """PEFT's layers_to_transform: the number after the first name in layers_pattern, or the first
    numbered part."""

    def __init__(self, config: LoraConfig, budget: Budget) -> None:
        layers, patterns = config.layers_to_transform, config.layers_pattern
        self._wanted = {layers} if isinstance(layers, int) else set(layers or ())
        patterns = [patterns] if isinstance(patterns, str) else patterns or []
        self._patterns = [NamePattern(pattern, "layers_pattern", budget) for pattern in patterns]

    def __call__(self, name: str) -> bool:
        if not self._wanted:
            return True
        for pattern in self._patterns:
            number = self._number_after(pattern, name)
            if number is not None:
                return number in self._wanted
        if self._patterns:
            return False
        # PEFT wants two names before the number
        numbers = [int(part) for part in name.split(".")[2:-1] if part.isdecimal()]
        return bool(numbers) and numbers[0] in self._wanted

    def _number_after(self, pattern: NamePattern, name: str) -> int | None:
        begins = suffix_starts(name)
        for start in range(len(name)):
            for end in reversed(pattern.match_ends(name, start) if begins >> start & 1 else []):
                parts = name[end:].split(".")
                if len(parts) > 2 and not parts[0] and parts[1].isdecimal():
                    return int(parts[1])
        return None


def _target_modules(model: nn.Module, config: LoraConfig) -> list[str] | str:
    wanted = config.target_modules
    if wanted is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        wanted = next((names.split() for names, kinds in _DEFAULTS.items() if kind in kinds.split()), None)
        if config.target_parameters and (kind in _NONE_BESIDE_PARAMETERS or (wanted is None and kind not in _OTHER_DEFAULTS)):
            return []
        if wanted is None:
            raise AdapterError('target_modules: must be given for this model, for example "all-linear"')
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        return _all_linear(model, config)
    return wanted


def _all_linear(model: nn.Module, config: LoraConfig) -> list[str] | str:
    modules = {name: module for name, module in model.named_modules() if name}
    head = _output_head(model, config)
    wanted = [name for name, module in modules.items() if is_linear(module) and module is not head]
    if not wanted:
        raise AdapterError(f'target_modules="all-linear": {type(model).__name__} has no linear layer')
    matches = _Matcher(wanted, "target_modules")
    if [name for name in modules if matches(name)] == wanted:
        return wanted
    # some name is also the end of another module's, as in nested nn.Sequential
    return "|".join(name.replace(".", r"\.") for name in wanted)


def is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" includes this module: nn.Linear, our layers, and transformers'
    Conv1D."""
    return isinstance(module, nn.Linear | LoRALinear) or _is_named(module, "Conv1D", "transformers.")


def _output_head(model: Any, config: LoraConfig) -> nn.Module | None:
    if not _is_named(model, "PreTrainedModel", "transformers."):
        return None
    head: nn.Module | None = model.get_output_embeddings()
    if head is None and config.task_type == "SEQ_CLS":
        head = getattr(model, "score", None) or getattr(model, "classifier", None)
    return head


def _is_named(module: nn.Module, name: str, package: str) -> bool:
    return any(c.__name__ == name and c.__module__.startswith(package) for c in type(module).__mro__)


def _first_match(patterns: list[tuple[NamePattern, Any]], name: str, default: Any) -> Any:
    return next((value for pattern, value in patterns if pattern.matches_end(name)), default)


def _check_all_match(
    field: str,
    wanted: list[str] | str,
    names: list[str],
    what: str = "module",
    hint: Callable[[list[str]], str] = lambda missed: "",
) -> None:
    if isinstance(wanted, str):
        missed = [] if any(map(_Matcher(wanted, field), names)) else [wanted]
    else:
        ends = {".".join(parts[i:]) for parts in (name.split(".") for name in names) for i in range(len(parts))}
        missed = [name for name in wanted if name not in ends]
    if missed:
        near = f"{_near_names(missed[:1], names)}{hint(missed)}"
        raise AdapterError(f"{field}: {short_repr(missed[0])} matches no {what}; {near}")


def _outermost(names: list[str]) -> list[str]:
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _near_names(wanted: list[str] | str, names: list[str]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdecimal()})
    asked = [wanted] if isinstance(wanted, str) else wanted[:8]
    near = [n for w in asked for n in difflib.get_close_matches(w.rpartition(".")[2][:64], ends, n=4, cutoff=0.5)]
    return f"near names: {', '.join(dict.fromkeys(near))}" if near else f"the modules end in: {', '.join(ends[:16])}"
