"""The layer for Hugging Face's `kernels` library, and the repository that it loads.

    python -m lora_kernels.integrations.hub FOLDER

writes FOLDER/build/torch-{cpu,cuda}/, each with this package and what `kernels` reads. Then,
without a class of one's own,

    from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub,
    use_kernel_mapping from peft.tuners.lora.layer import Linear

    replace_kernel_forward_from_hub(Linear, "LoraLinear")
    repository = LocalLayerRepository(FOLDER, layer_name="LoraLinear")
    with use_kernel_mapping({"LoraLinear": {"cpu": repository, "cuda": repository}}):
        kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE)

computes as `lora_kernels.fuse(model)` does.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_kernels._version import __version__
from lora_kernels.integrations.peft import Linear, run_fused

BACKENDS = ("cpu", "cuda")
PACKAGE = Path(__file__).parents[1]
# what no layer needs
LEFT_OUT = {"commands", "testing", "vllm", "__main__.py", "__pycache__", "_cuda.pyi", "_ptxsim.pyi"}
START = '''"""LoRA and DoRA layers of PEFT on fused kernels: `layers.LoraLinear`, for peft.tuners.lora.layer.Linear."""

import sys
from pathlib import Path

try:
    import lora_kernels
except ModuleNotFoundError:  # torch registers the ops of a process once, so an installed package comes first
    sys.path.append(str(Path(__file__).parent))
    import lora_kernels

if lora_kernels.__version__ != "{version}":
    told = f"lora_kernels {{lora_kernels.__version__}} is there, and this is {version}"
    raise ImportError(f"{{told}}: one of both can be in a process")

from lora_kernels.integrations import hub as layers

__all__ = ["layers"]
'''
CARD = """---
library_name: kernels
license: apache-2.0
tags: [kernel, lora, dora, peft]
---

# lora_kernels {version}

`LoraLinear`, a stateless layer for `peft.tuners.lora.layer.Linear`: LoRA, rsLoRA and DoRA on fused kernels with their own
backward; whatever they do not cover runs in PEFT's forward.

```python
from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping
from peft.tuners.lora.layer import Linear

replace_kernel_forward_from_hub(Linear, "LoraLinear")
repository = LocalLayerRepository("path/to/this", layer_name="LoraLinear")
with use_kernel_mapping({{"LoraLinear": {{"cpu": repository, "cuda": repository}}}}):
    kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE)
```

Triton's kernels run on any GPU that they support. The C++ modules are those of the machine that wrote this ({modules});
with another Python or system Triton's kernels or the reference run instead of them.
"""


class LoraLinear(nn.Module):
    """The forward of `fuse` for a layer that stays PEFT's. `kernels` binds it to the layer; it has
    no state, as it demands."""

    can_torch_compile = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's Linear.forward; subclasses of that run their own."""
        layer: Any = self
        y = run_fused(layer, x, args, kwargs) if type(layer) is Linear else None
        return type(layer).forward(layer, x, *args, **kwargs) if y is None else y


def write_repository(folder: Path) -> list[Path]:
    """Writes the repository, in place of what was in its `build`; the folders of the variants."""
    shutil.rmtree(folder / "build", ignore_errors=True)
    variants = [folder / "build" / f"torch-{backend}" for backend in BACKENDS]
    for backend, variant in zip(BACKENDS, variants, strict=True):
        shutil.copytree(PACKAGE, variant / "lora_kernels", ignore=_left_out(backend))
        (variant / "__init__.py").write_text(START.format(version=__version__), encoding="utf-8")
        metadata = {
            "id": f"_lora_kernels_{backend}_{_content_digest(variant)}", "name": "lora-kernels", "version": 1,
            "license": "Apache-2.0", "python-depends": [], "backend": {"type": backend},
        }  # fmt: skip
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    modules = ", ".join(sorted(path.name for path in PACKAGE.glob("_c*.so") if path.is_file())) or "none"
    (folder / "README.md").write_text(CARD.format(version=__version__, modules=modules), encoding="utf-8")
    return variants


def _left_out(backend: str) -> Callable[[str, list[str]], set[str]]:
    modules = ("_ptxsim.",) if backend == "cuda" else ("_ptxsim.", "_cuda.")

    def chosen(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if name in LEFT_OUT or name.startswith(modules) or name.endswith("_build_error.txt")}

    return chosen


def _content_digest(variant: Path) -> str:
    """Of all files: another content is another module, and both can be loaded."""
    found = hashlib.sha256()
    for path in sorted(path for path in variant.rglob("*") if path.is_file()):
        found.update(str(path.relative_to(variant)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m lora_kernels.integrations.hub FOLDER")
    print(*write_repository(Path(sys.argv[1])), sep="\n")
