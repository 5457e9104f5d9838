import pytest


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A group of one process."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('one')}/f", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def as_gpu(monkeypatch):
    """The CPU is a device with Triton's kernels alone, in the interpreter, and no backend is
    forced."""
    from lora_kernels.integrations.peft import devices, quantised
    from lora_kernels.ops import registry
    from lora_kernels.ptxsim import triton_ptx
    from lora_kernels.testing.triton_interpreter import interpret

    monkeypatch.setitem(registry.PREFERENCE, "cpu", ("triton", "reference"))
    monkeypatch.setattr(quantised, "_EVERY_FORMAT", ("meta",))
    monkeypatch.setattr(triton_ptx, "simulate_triton", lambda *launch, **_: interpret(*launch))
    devices._refusal.cache_clear()
    token = registry._simulated.set(True)
    yield
    registry._simulated.reset(token)
    devices._refusal.cache_clear()
