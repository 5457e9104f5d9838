"""Bugs for tests to find: Triton's kernels over codes, from changed copies of their files."""

import importlib.util
import sys
from pathlib import Path

from lora_kernels.ops import launch, triton_quantised
from lora_kernels.ops.lora_linear import triton_codes, triton_quantised_backward
from lora_kernels.ops.lora_linear import triton_quantised as triton_quantised_forward

FILES = {
    "planted_numbers": triton_quantised,
    "planted_forward": triton_quantised_forward,
    "planted_backward": triton_quantised_backward,
}


def planted(monkeypatch, folder, old, new):
    """Puts `new` in the place of `old`, which stands once in these files, in what is launched."""
    monkeypatch.setattr(launch, "_tickets", {})  # a bug may leave them as they must not be
    texts = [Path(module.__file__).read_text() for module in FILES.values()]
    assert sum(text.count(old) for text in texts) == 1, old
    for name, text in zip(FILES, texts, strict=True):
        copy = folder / f"{name}.py"
        text = text.replace(f"from {triton_quantised.__name__} import", "from planted_numbers import")
        copy.write_text(text.replace(old, new))
        spec = importlib.util.spec_from_file_location(name, copy)
        changed = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, changed)
        spec.loader.exec_module(changed)
    monkeypatch.setattr(triton_quantised, "dequantise_kernel", sys.modules["planted_numbers"].dequantise_kernel)
    monkeypatch.setattr(triton_codes, "quantised_forward_kernel", sys.modules["planted_forward"].quantised_forward_kernel)
    for kernel in ("quantised_input_gradient_kernel", "quantised_rest_of_gradients_kernel"):
        monkeypatch.setattr(triton_codes, kernel, getattr(sys.modules["planted_backward"], kernel))
