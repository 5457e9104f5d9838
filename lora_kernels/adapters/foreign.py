"""Adapters in other forms than PEFT's files: which are read, and what to do with the rest."""

import re
from collections.abc import Container, Iterable
from pathlib import Path

from lora_kernels.adapters.storage import CONFIG_NAME, WEIGHTS_NAME

PREFIX = "base_model.model."

_FACTORS = r"(?:A|B|embedding_A|embedding_B|magnitude_vector)"
_NAMED = re.compile(rf"(.+\.lora_{_FACTORS})\.default((?:\.weight|\.bias)?)")
_ANY_NAME = re.compile(rf"\.lora_{_FACTORS}\.(?!weight$|bias$)([^.]+)(?:\.|$)")
_SAVE = "save it with PEFT's model.save_pretrained(directory)"


def our_key(key: str, slots: Container[str]) -> str | None:
    """The key among `slots` that a tensor of the file means; None if there is none.

    Read as PEFT's own are the keys of a state dict, which name the adapter
    ("lora_A.default.weight"), those of a compiled model ("_orig_mod."), and a magnitude that ends
    in ".weight".
    """
    plain = "".join(part for part in re.split(r"(?<=\.)", key) if part != "_orig_mod.")
    named = _NAMED.fullmatch(plain)
    plain = named[1] + named[2] if named else plain
    for found in (key, plain, plain.removesuffix(".weight") if plain.endswith("magnitude_vector.weight") else plain):
        if found in slots:
            return found
    return None


def what_they_are(keys: Iterable[str], slots: Container[str]) -> str:
    """What foreign keys look like and what to do, to end an error message with; "" if unknown."""
    keys = list(keys)
    has = lambda pattern: any(re.search(pattern, key) for key in keys)  # noqa: E731
    if has(r"\.(lora_down|lora_up)\.|^lora_(unet|te\d?|transformer)_"):
        said = "they are kohya's (lora_down, lora_up, alpha): load the file with diffusers (load_lora_weights), then"
        return f"; {said} {_SAVE}"
    if has(r"\.dora_scale$"):
        return "; dora_scale is kohya's magnitude: PEFT's is lora_magnitude_vector [out], with use_dora in the configuration"
    if has(r"\.alpha$"):
        return "; alpha is kohya's: in PEFT's files it stands in the configuration (lora_alpha, alpha_pattern)"
    if has(r"^(unet|text_encoder(_\d)?|transformer)\.") or has(r"\.(to_[qkv]|to_out)_lora\.|\.processor\."):
        return f"; they are diffusers' (a pipeline's): load each part's own into that model with PEFT, then {_SAVE}"
    if has(r"^module\."):
        return '; "module." is the prefix of DistributedDataParallel: take it off, or save model.module'
    if any(our_key(PREFIX + key, slots) for key in keys):
        return f"; the prefix {PREFIX!r} is missing: put it before each key, or {_SAVE}"
    names = sorted({found[1] for key in keys if (found := _ANY_NAME.search(key))})
    if names:
        return f"; the keys name the adapter {names[0][:64]!r}, as in a state dict: {_SAVE}"
    if has(r"\.(base_layer|original_module|modules_to_save)\."):
        return f"; they are those of a whole model's state dict: {_SAVE}"
    return ""


def what_is_there(folder: Path) -> str:
    """What a folder holds in the place of PEFT's two files, to end an error message with."""
    names = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).exists()]
    if not names:
        return ""
    if WEIGHTS_NAME in names:
        for pickle in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*")):
            return f" ({pickle.name}: is a pickle, which can run code when read; save the adapter as safetensors)"
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.name != WEIGHTS_NAME)
    if others:
        return (
            f" ({others[0]} alone is diffusers' or kohya's form: load it with diffusers (load_lora_weights), then {_SAVE})"
        )
    return ""
