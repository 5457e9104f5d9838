"""Where only the reference could run, a fused layer is PEFT's: in the report and in the call."""

from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn

from lora_kernels import fuse, use_backend
from lora_kernels.integrations.peft import FUSED, adapters, devices, fallbacks, linear

REASON = "there are no kernels for cpu: cpu: not built: no compiler"


@pytest.fixture
def without_kernels(monkeypatch):
    devices._refusal.cache_clear()
    monkeypatch.setattr(devices, "missing_backends", lambda: {"cpu": "not built: no compiler"})
    monkeypatch.setattr(adapters, "NO_CPU_KERNELS", True)
    monkeypatch.setattr(linear, "plain_call", None)
    yield
    devices._refusal.cache_clear()


def tensor(kind, **said):
    return SimpleNamespace(device=torch.device(kind), is_meta=kind == "meta", is_cuda=kind == "cuda", **said)


@pytest.mark.parametrize("kind", ["mps", "xpu", "hpu"])
def test_a_device_without_kernels(kind):
    assert devices.device_refusal(tensor(kind)) == f"there are no kernels for {kind}"
    with use_backend("reference"):
        assert devices.device_refusal(tensor(kind)) is None


def test_devices_with_kernels(monkeypatch):
    assert devices.device_refusal(tensor("cpu")) is None and devices.device_refusal(tensor("meta")) is None
    monkeypatch.setattr(devices, "refuse_device", lambda t: "its kernels need compute capability 8.0")
    assert devices.device_refusal(tensor("cuda")) == "its kernels need compute capability 8.0"


def test_a_gpu_without_triton(monkeypatch):
    missing = {"triton": "No module named 'triton'", "cuda": "not built: no nvcc"}
    monkeypatch.setattr(devices, "missing_backends", lambda: missing)
    devices._refusal.cache_clear()
    wanted = "there are no kernels for cuda: cuda: not built: no nvcc; triton: No module named 'triton'"
    assert devices.device_refusal(tensor("cuda")) == wanted
    devices._refusal.cache_clear()


def test_an_amd_gpu_without_triton(monkeypatch):
    """A CUDA C++ module that was built elsewhere does not help there."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(devices, "missing_backends", lambda: {"triton": "No module named 'triton'"})
    devices._refusal.cache_clear()
    assert devices.device_refusal(tensor("cuda")) == "there are no kernels for cuda: triton: No module named 'triton'"
    devices._refusal.cache_clear()


NETS = {
    "linear": (lambda: nn.Linear(24, 40), lambda: torch.randn(3, 24)),
    "embedding": (lambda: nn.Embedding(24, 40), lambda: torch.arange(5)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), lambda: torch.randn(2, 4, 5, 5)),
}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("net, an_input", NETS.values(), ids=NETS)
def test_the_layer_is_pefts(without_kernels, net, an_input, use_dora):
    def made():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["0"], use_dora=use_dora, init_lora_weights=False)
        return peft.get_peft_model(nn.Sequential(net()), config)

    stock, ours = made(), made()
    report = fuse(ours)
    assert not report.fused and list(report.left.values()) == [REASON] and not report.slow
    x = an_input()
    with torch.no_grad():
        assert torch.equal(ours(x), stock(x))
    [layer] = [module for module in ours.modules() if isinstance(module, FUSED)]
    assert fallbacks(layer) == {REASON: 1}
    with use_backend("reference"), torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x))
    assert fallbacks(layer) == {REASON: 1}, "a backend that was asked for runs"
