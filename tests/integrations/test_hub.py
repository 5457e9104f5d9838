"""The repository for Hugging Face's `kernels`: its layout, its layer, and that it computes what
`fuse` does."""

import inspect
import json
import subprocess
import sys
from types import MethodType

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import nn

from lora_kernels import __version__, explain, fuse
from lora_kernels.integrations import hub
from lora_kernels.integrations.peft import fallbacks
from tests.integrations.fuse_helpers import llama

MISSING = "`make hub` installs kernels"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    (folder / "build" / "of an older one").mkdir(parents=True)
    hub.write_repository(folder)
    return folder


def model(use_dora=False, dropout=0.0):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", use_dora=use_dora, lora_dropout=dropout, init_lora_weights=False)
    return peft.get_peft_model(llama(), config)


def step(made):
    ids = torch.arange(10)[None]
    torch.manual_seed(1)
    loss = made(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in made.parameters() if p.grad is not None)]


def test_layout(repository):
    assert sorted(path.name for path in (repository / "build").iterdir()) == ["torch-cpu", "torch-cuda"]
    ids = set()
    for backend in hub.BACKENDS:
        variant = repository / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["name"] == "lora-kernels" and metadata["backend"] == {"type": backend} and metadata["version"] == 1
        assert metadata["id"].isidentifier() and metadata["license"] == "Apache-2.0"
        ids.add(metadata["id"])
        names = {path.name for path in (variant / "lora_kernels").iterdir()}
        assert {"ops", "nn", "integrations", "__init__.py"} <= names and not names & hub.LEFT_OUT
        assert not any(name.startswith("_ptxsim") for name in names)
        here = {path.name for path in hub.PACKAGE.glob("_c*.so") if backend == "cuda" or path.name.startswith("_cpu")}
        assert {name for name in names if name.endswith(".so")} == here and list((variant / "lora_kernels").rglob("*.json"))
    assert len(ids) == 2 and "library_name: kernels" in (repository / "README.md").read_text()


def test_the_layer_is_as_kernels_demands():
    """No constructor, no members beside what says what it can do, and the parameters of the forward
    that it replaces."""
    layer = hub.LoraLinear
    assert layer.__init__ is nn.Module.__init__
    members = {name for name, _ in inspect.getmembers(layer)} - {name for name, _ in inspect.getmembers(nn.Module)}
    assert members <= {"can_torch_compile", "has_backward"}
    ours, theirs = (inspect.signature(each.forward).parameters.values() for each in (layer, Linear))
    assert [p.kind for p in ours] == [p.kind for p in theirs]


def kernelized(made):
    """What `kernelize` does to each layer."""
    for module in made.modules():
        if isinstance(module, Linear):
            module.forward = MethodType(hub.LoraLinear.forward, module)
    return made


@pytest.mark.parametrize(("use_dora", "dropout"), [(False, 0.0), (True, 0.0), (False, 0.3)])
def test_it_computes_what_fuse_does(use_dora, dropout):
    fused, bound = model(use_dora, dropout), kernelized(model(use_dora, dropout))
    fuse(fused, strict=True)
    for one, other in zip(step(fused), step(bound), strict=True):
        assert one.equal(other)
    assert all(type(m) is Linear for m in bound.modules() if isinstance(m, Linear))
    ids = torch.arange(10)[None]
    ran = [[d.op for d in explain(m, input_ids=ids).decisions] for m in (fused, bound)]
    assert ran[0] == ran[1] and "lora_linear_forward" in ran[1]


def test_what_the_kernels_do_not_cover_is_pefts():
    plain, bound = model(), kernelized(model())
    x = torch.arange(10)[None]
    with plain.disable_adapter(), bound.disable_adapter():
        assert plain(input_ids=x).logits.equal(bound(input_ids=x).logits)
    layer = next(m for m in bound.modules() if isinstance(m, Linear))
    assert fallbacks(layer) == {"the adapters are disabled": 1}

    class Own(Linear):
        def forward(self, x, *args, **kwargs):
            return x

    x = torch.randn(1, layer.in_features)
    assert layer(x) is not x
    layer.__class__ = Own
    assert layer(x) is x


ALONE = """
import sys
sys.path[:] = [p for p in sys.path if p not in ("", {root!r})]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
import importlib.util
spec = importlib.util.spec_from_file_location("_of_the_hub", {file!r})
module = importlib.util.module_from_spec(spec)
sys.modules["_of_the_hub"] = module
spec.loader.exec_module(module)
import lora_kernels
print(lora_kernels.__file__, module.layers.LoraLinear.__module__)
"""


def test_it_brings_the_package_along(repository, tmp_path):
    """To a process that has no lora_kernels."""
    start = repository / "build" / "torch-cpu" / "__init__.py"
    code = ALONE.format(root=str(hub.PACKAGE.parent), file=str(start))
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, check=False)
    found = [str(start.parent / "lora_kernels" / "__init__.py"), "lora_kernels.integrations.hub"]
    assert done.stdout.split() == found, done.stderr


def test_another_version_that_is_there_is_told(tmp_path):
    code = hub.START.format(version="9.9")
    with pytest.raises(ImportError, match=f"lora_kernels {__version__} is there, and this is 9.9: one of both can be"):
        exec(compile(code, "start", "exec"), {"__name__": "start", "__file__": str(tmp_path / "__init__.py")})
    exec(compile(hub.START.format(version=__version__), "start", "exec"), found := {"__name__": "start", "__file__": "start"})
    assert found["layers"] is hub


@pytest.mark.parametrize("use_dora", [False, True])
def test_kernelize_loads_the_local_repository(repository, use_dora):
    kernels = pytest.importorskip("kernels", reason=MISSING)
    # a folder of another test on the path, which has that name
    if not hasattr(kernels, "LocalLayerRepository"):
        pytest.skip(MISSING)
    fused, bound = model(use_dora), model(use_dora)
    fuse(fused, strict=True)
    kernels.replace_kernel_forward_from_hub(Linear, "LoraLinear")
    try:
        local = kernels.LocalLayerRepository(repository, layer_name="LoraLinear")
        with kernels.use_kernel_mapping({"LoraLinear": {"cpu": local}}, inherit_mapping=False):
            mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
            assert kernels.kernelize(bound, mode=mode, device="cpu", use_fallback=False) is bound
    finally:
        del Linear.kernel_layer_name, Linear.kernel_condition
    assert all("forward" in m.__dict__ for m in bound.modules() if isinstance(m, Linear))
    for one, other in zip(step(fused), step(bound), strict=True):
        assert one.equal(other)
