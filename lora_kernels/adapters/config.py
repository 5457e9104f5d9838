"""The configuration of a LoRA adapter, in the words and the JSON of PEFT (adapter_config.json)."""

import json
import math
import operator
import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, fields
from io import BufferedReader
from pathlib import Path
from typing import Any

from lora_kernels.adapters.storage import CONFIG_NAME, AdapterError, open_together, write_together

MAX_RANK = 4096
"""Above any rank in use; a mistyped one must not allocate gigabytes."""

_MAX_CONFIG_BYTES = 1 << 20
_MAX_JSON_DEPTH = 32
_BIAS = ("none", "all", "lora_only")
_TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_INITS = ("gaussian", "pissa", "olora", "orthogonal", "eva", "corda", "loftq", "lora_ga", "mica")
_PISSA_NITER = re.compile(r"pissa_niter_[0-9]{1,6}")

# keys that say nothing about the maths of the adapter, or act only while its first weights are
# drawn
_KEPT = (
    "auto_mapping",
    "corda_config",
    "eva_config",
    "inference_mode",
    "lora_ga_config",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
)
_DROPPED = ("peft_type", "runtime_config")


@dataclass(kw_only=True)
class LoraConfig:
    """What to adapt and how: PEFT's `LoraConfig`, limited to what these layers compute.

    Layer by layer, with r and lora_alpha after rank_pattern and alpha_pattern:

        scale = lora_alpha / r,  or lora_alpha / √r with use_rslora

    `target_modules`, `exclude_modules`: a list of names (the whole name of a module, or its end
    after a dot), or one regular expression for whole names; `target_modules="all-linear"` is every
    linear layer but the output head. `target_parameters`: parameters to adapt by their names, whole
    or their ends after a dot: the matrices of a module of experts (`nn.LoRAExperts`), or the weight
    of an nn.Linear. There lora_dropout must be 0, as in PEFT; rank_pattern and alpha_pattern are
    matched with the names of the parameters. `layers_to_transform`, `layers_pattern`: keep only
    these layer numbers of what a list of targets selects. `rank_pattern`, `alpha_pattern`: regular
    expression for the end of a module's name → its r or lora_alpha; the first that matches wins.
    `bias`: which biases of the base are trained and saved: "none", "all", or "lora_only", those of
    adapted layers. `modules_to_save`: modules that are copied, trained in full and saved with the
    adapter. `fan_in_fan_out` only tells how transformers' Conv1D stores its weight; nn.Linear and
    nn.Embedding ignore it. `extra` keeps the keys of PEFT's file that have no effect here, so that
    they are written back.

    Raises:
        TypeError: a field has the wrong type.
        AdapterError: a field has a value outside its range (a ValueError).

    Sources: LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732; DoRA, arXiv:2402.09353.
    """

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: float = 0.0
    init_lora_weights: bool | str = True
    bias: str = "none"
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.r = _check_rank("r", self.r)
        self.lora_alpha = _check_alpha("lora_alpha", self.lora_alpha)
        self.lora_dropout = _check_finite("lora_dropout", self.lora_dropout)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise AdapterError(f"LoraConfig: lora_dropout must be in [0, 1), found {short_repr(self.lora_dropout)}")
        for flag in ("use_rslora", "use_dora", "fan_in_fan_out"):
            if not isinstance(getattr(self, flag), bool):
                raise TypeError(f"LoraConfig: {flag} must be True or False, found {short_repr(getattr(self, flag))}")
        self._check_init()
        _check_choice("bias", self.bias, _BIAS)
        self.target_modules = _check_names("target_modules", self.target_modules, one=True)
        parameters = _check_names("target_parameters", self.target_parameters, one=False)
        self.target_parameters = parameters if isinstance(parameters, list) else None
        if self.target_parameters and (self.lora_dropout or self.fan_in_fan_out):
            field, found = ("lora_dropout", self.lora_dropout) if self.lora_dropout else ("fan_in_fan_out", True)
            raise AdapterError(
                f"LoraConfig: {field} must be {'0' if self.lora_dropout else 'False'} with target_parameters, found {found}"
            )
        self.exclude_modules = _check_names("exclude_modules", self.exclude_modules, one=True)
        self.layers_pattern = _check_names("layers_pattern", self.layers_pattern, one=True)
        saved = _check_names("modules_to_save", self.modules_to_save, one=False)
        self.modules_to_save = saved if isinstance(saved, list) else None
        ranks = _pattern_items("rank_pattern", self.rank_pattern)
        self.rank_pattern = {k: _check_rank(f"rank_pattern[{short_repr(k)}]", v) for k, v in ranks}
        alphas = _pattern_items("alpha_pattern", self.alpha_pattern)
        self.alpha_pattern = {k: _check_alpha(f"alpha_pattern[{short_repr(k)}]", v) for k, v in alphas}
        self._check_layers()
        if self.task_type is not None:
            self.task_type = str(getattr(self.task_type, "value", self.task_type))
            _check_choice("task_type", self.task_type, _TASK_TYPES)
        name = self.base_model_name_or_path
        if name is not None and not isinstance(name, str):
            raise TypeError(f"LoraConfig: base_model_name_or_path must be a string or None, found {short_repr(name)}")

    def _check_init(self) -> None:
        init = self.init_lora_weights
        if isinstance(init, bool):
            return
        if not isinstance(init, str):
            raise TypeError(f"LoraConfig: init_lora_weights must be True, False or a name, found {short_repr(init)}")
        self.init_lora_weights = init = init.lower()
        if not _PISSA_NITER.fullmatch(init):
            _check_choice("init_lora_weights", init, ("True", "False", "pissa_niter_[number]", *_INITS))

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is not None:
            numbers = list(layers) if isinstance(layers, list | tuple | set) else [layers]
            if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
                raise TypeError(f"LoraConfig: layers_to_transform must hold layer numbers ≥ 0, found {short_repr(layers)}")
            self.layers_to_transform = numbers if isinstance(layers, list | tuple | set) else layers
            if isinstance(self.target_modules, str):
                raise AdapterError("LoraConfig: layers_to_transform needs a list of target_modules, found a string")
        elif self.layers_pattern:
            raise AdapterError("LoraConfig: layers_pattern has no effect without layers_to_transform")

    def to_dict(self) -> dict[str, Any]:
        """The keys of adapter_config.json."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return {"peft_type": "LORA", **self.extra, **own}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], also: Container[str] = ()) -> "LoraConfig":
        """Reads the keys of adapter_config.json; also takes `peft.LoraConfig(...).to_dict()`. Those
        in `also` are kept in `extra`: the caller does what they ask for.

        Raises:
            TypeError: a field has the wrong type.
            AdapterError: it is not a LoRA adapter, a value is outside its range, or a key asks for
                a computation that these layers do not do; the message names the key.
        """
        peft_type = values.get("peft_type", "LORA")
        if str(getattr(peft_type, "value", peft_type)) != "LORA":
            raise AdapterError(f"LoraConfig: peft_type must be 'LORA', found {short_repr(peft_type)}")
        own = {f.name for f in fields(cls)} - {"extra"}
        known, extra = {}, {}
        for key, value in values.items():
            if key in own:
                known[key] = value
            elif key in _KEPT or key in also or not value:
                extra[key] = value
            elif key not in _DROPPED:
                raise AdapterError(
                    f"LoraConfig: {short_key(key)}={short_repr(value)} asks for something these layers do not do"
                    " (if it does not change what the adapter computes, remove the key)"
                )
        return cls(**known, extra=extra)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], also: Container[str] = ()) -> "LoraConfig":
        """Reads adapter_config.json of a local directory; nothing is downloaded. `also` as in
        from_dict.

        Raises:
            AdapterError: the file is missing, too large, not JSON, or its content is refused; the
                message names it.
        """
        with open_together(Path(directory), [CONFIG_NAME]) as [(file, size)]:
            return cls.from_file(file, size, Path(directory) / CONFIG_NAME, also)

    @classmethod
    def from_file(cls, file: BufferedReader, size: int, path: Path, also: Container[str] = ()) -> "LoraConfig":
        """Reads an open adapter_config.json of `size` bytes, which errors call `path`; as
        from_pretrained."""
        if size > _MAX_CONFIG_BYTES:
            raise AdapterError(f"{path}: must be at most {_MAX_CONFIG_BYTES} bytes, found {size}")
        values = parse_object(file.read(size), path)
        _check_depth(values, path)
        try:
            return cls.from_dict(values, also)
        except (TypeError, ValueError) as error:
            raise AdapterError(f"{path}: {error}") from error

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes adapter_config.json, in one step, so that a reader never sees half a file."""
        write_together(Path(directory), {CONFIG_NAME: self.to_json()})

    def to_json(self) -> bytes:
        # keys of the patterns keep their order, which decides between two that match
        return (json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n").encode()


def parse_object(text: bytes, path: Path) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN or infinity."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise AdapterError(f"{path}: the key {short_repr(twice)} appears twice")
        return found

    def refuse_constant(constant: str) -> None:
        raise AdapterError(f"{path}: {constant} is not JSON")

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise AdapterError(f"{path}: {short_key(number)} is beyond the range of numbers")
        return value

    try:
        values = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=refuse_duplicates,
            parse_constant=refuse_constant,
            parse_float=finite,
        )
    except RecursionError as error:
        raise AdapterError(f"{path}: JSON is nested too deeply") from error
    except AdapterError:
        raise
    except ValueError as error:
        raise AdapterError(f"{path}: is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path}: must hold a JSON object, found {short_repr(values)}")
    return values


def short_repr(value: Any) -> str:
    """A repr for error messages, of bounded length."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def short_key(key: Any) -> str:
    """A key for error messages: as it is, if it is a plain and short one."""
    return key if isinstance(key, str) and len(key) <= 60 and key.isascii() and key.isprintable() else short_repr(key)


def _check_depth(values: Any, path: Path) -> None:
    level = [values]
    for _ in range(_MAX_JSON_DEPTH):
        level = [
            inner for v in level if isinstance(v, dict | list) for inner in (v.values() if isinstance(v, dict) else v)
        ]
        if not level:
            return
    raise AdapterError(f"{path}: JSON is nested deeper than {_MAX_JSON_DEPTH}")


def _check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise AdapterError(f"LoraConfig: {name} must be one of {', '.join(allowed)}, found {short_repr(value)}")


def _check_finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"LoraConfig: {name} must be a number, found {short_repr(value)}")
    if not -1e300 < value < 1e300:
        raise AdapterError(f"LoraConfig: {name} must be finite, found {short_repr(value)}")
    return value


def _check_alpha(name: str, value: Any) -> float:
    value = _check_finite(name, value)
    if not 0 < value <= 1e9:
        raise AdapterError(f"LoraConfig: {name} must be in (0, 1e9], found {short_repr(value)}")
    return value


def _check_rank(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"LoraConfig: {name} must be an integer, found {short_repr(value)}")
    value = operator.index(value)
    if not 1 <= value <= MAX_RANK:
        raise AdapterError(f"LoraConfig: {name} must be in [1, {MAX_RANK}], found {short_repr(value)}")
    return value


def _check_names(name: str, value: Any, *, one: bool) -> list[str] | str | None:
    if value is None or (one and isinstance(value, str) and value):
        return value
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if not isinstance(value, list | tuple) or any(not isinstance(v, str) or not v for v in value):
        allowed = "a list of names or one regular expression" if one else "a list of names"
        raise TypeError(f"LoraConfig: {name} must be {allowed}, found {short_repr(value)}")
    return list(value)


def _pattern_items(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    if value is None:
        return ()
    if not isinstance(value, Mapping) or any(not isinstance(k, str) or not k for k in value):
        raise TypeError(f"LoraConfig: {name} must map regular expressions to numbers, found {short_repr(value)}")
    return value.items()
