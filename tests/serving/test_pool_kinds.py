"""Which weights a pool serves: quantised ones as they are, and what it refuses when it is made."""

import pytest
import torch
from torch import Tensor, nn

from lora_kernels.adapters import AdapterError
from lora_kernels.serving import Adapter, AdapterPool, BaseChangedError, serve, unserve
from lora_kernels.serving.layer import MultiLoRALinear
from tests.nn.format_modules import module
from tests.serving.pools import SIZES, alone, net, pool_of, random_adapter
from tests.serving.test_pool_base import dora, served_net


class Halved(Tensor):
    """Stands for a weight that is quantised: of a kind of its own, with kernels of its own."""

    @staticmethod
    def __new__(cls, whole, **_):
        return Tensor._make_wrapper_subclass(cls, whole.shape, dtype=whole.dtype)

    def __init__(self, whole, opaque=False, broken=False):
        self.half, self.opaque, self.broken = whole.half(), opaque, broken

    def dequantize(self):
        if self.opaque:
            raise NotImplementedError("it is packed")
        return self.half.to(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            one = args[0]
            return Halved(one.half.to(one.dtype), opaque=one.opaque, broken=one.broken)
        raise NotImplementedError(f"Halved cannot {func}")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear and not args[1].broken:
            x, w, *bias = args
            return nn.functional.linear(x, w.half.to(x.dtype), *bias)
        return super().__torch_function__(func, types, args, kwargs or {})


def quantised(**options):
    model = net()
    for name in SIZES:
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(Halved(layer.weight.data, **options), requires_grad=False)
    return model


def assert_served_as(plain, model):
    """Serves a batch of DoRA, LoRA and base rows; each is that of the plain model. Gives the
    input."""
    pool = pool_of(model)
    pool.load("dora", dora(0)), pool.load("lora", random_adapter(1))
    x = torch.randn(3, 24)
    y = serve(model, pool)(x, adapters=["dora", "lora", None])
    for row, adapter in zip((0, 1, 2), (dora(0), random_adapter(1), None), strict=True):
        torch.testing.assert_close(y[row], alone(plain, adapter, x)[row], rtol=1e-4, atol=1e-4)
    return x


def test_a_quantised_base_is_served():
    """Its own product first, and the adapters' part added; DoRA's norm of what it dequantises
    to."""
    model, plain = quantised(), net().half().float()
    x = assert_served_as(plain, model)
    torch.testing.assert_close(unserve(model)(x), alone(plain, None, x), rtol=1e-4, atol=1e-4)


def test_a_quantised_base_that_hides_its_weight():
    model = quantised(opaque=True)
    pool = pool_of(model)
    with pytest.raises(AdapterError, match="DoRA needs the norm of W, which Halved hides: it is packed"):
        pool.load("dora", dora(0))
    pool.load("lora", random_adapter(1))
    x = torch.randn(1, 24)
    plain = net().half().float()
    y = serve(model, pool)(x, adapters=["lora"])
    torch.testing.assert_close(y, alone(plain, random_adapter(1), x), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_served_is_said_when_the_pool_is_made():
    with pytest.raises(TypeError, match="AdapterPool: 0: the weight is a Halved, which no adapter can be served on: "):
        pool_of(quantised(broken=True))

    class Linear4bit(nn.Linear):
        """As that of bitsandbytes: bytes, and a forward of its own."""

        def __init__(self):
            super().__init__(24, 40)
            self.weight = nn.Parameter(torch.zeros(480, 1, dtype=torch.uint8), requires_grad=False)

    model = nn.Sequential(Linear4bit(), nn.Linear(40, 16))
    with pytest.raises(TypeError, match="AdapterPool: 0: Linear4bit holds its weight as torch.uint8"):
        AdapterPool(model, capacity_bytes=1 << 20)
    assert list(AdapterPool(model, capacity_bytes=1 << 20, modules=["1"]).sites) == ["1"]


def test_a_base_that_is_quantised_below_its_pool():
    model, pool = served_net()
    model[0].weight = nn.Parameter(Halved(model[0].weight.data), requires_grad=False)
    with pytest.raises(BaseChangedError, match="at 0: its weight was a Parameter, and is a"):
        model(torch.randn(1, 24), adapters=["dora"])


@pytest.mark.parametrize("kind", ["int8 rows", "float8 rows", "fp8", "fp8 powers"])
def test_codes_of_other_libraries(kind):
    """Base and adapters in one op, from the codes; also of a layer whose own forward has no CPU."""
    model, plain = net(), net()
    for i, name in enumerate(SIZES):
        coded, w = module(kind, *SIZES[name], bias=name == "0", seed=i)
        if name == "0":
            coded.bias = plain[0].bias
        model[int(name)] = coded
        with torch.no_grad():
            plain.get_submodule(name).weight.copy_(w)
    x = assert_served_as(plain, model)
    assert isinstance(model[0], MultiLoRALinear) and model[0]._quantised is not None
    kind_of_base = type(model[0]._quantised.module)
    unserve(model)
    assert type(model[0]) is kind_of_base
    if kind_of_base is nn.Linear:
        torch.testing.assert_close(model(x), alone(plain, None, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("open_batch", [False, True])
def test_gains_follow_the_codes_of_torchao(open_batch):
    """A load writes into the tensors that the weight holds, which stays the same object."""
    model, other = net(), net()
    for i, name in enumerate(SIZES):
        for seed, each in ((0, model), (5, other)):
            each[int(name)] = module("int8 rows", *SIZES[name], bias=name == "0", seed=seed + i)[0]
    pool = pool_of(model)
    pool.load("dora", dora(0)), pool.load("lora", random_adapter(1))
    x, names = torch.randn(2, 24), ["dora", "lora"]
    serve(model, pool)
    with torch.no_grad():
        before = model(x, adapters=names)
        if open_batch:
            with pool.batch(names):
                model(x)
                model.load_state_dict(other.state_dict())
                y = model(x)
        else:
            model.load_state_dict(other.state_dict())
            y = model(x, adapters=names)
    plain = net()
    for name in SIZES:
        plain[int(name)] = nn.Linear(*SIZES[name], bias=name == "0")
        plain[int(name)].weight.data = other[int(name)].weight.dequantize()
    plain[0].bias = other[0].bias
    assert not torch.allclose(y, before, rtol=1e-2)
    for row, adapter in enumerate((dora(0), random_adapter(1))):
        torch.testing.assert_close(y[row], alone(plain, adapter, x)[row], rtol=1e-4, atol=1e-4)


def test_torchao_with_inputs_of_int8():
    """Its own product, and the adapters' part added."""
    quantization = pytest.importorskip("torchao.quantization")
    model = net()
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    pool = pool_of(model)
    pool.load("lora", random_adapter(1))
    x = torch.randn(2, 24)
    wanted, y = model(x), serve(model, pool)(x, adapters=["lora", None])
    assert model[0].quantised and not torch.allclose(y[0], wanted[0], rtol=1e-2)
    torch.testing.assert_close(y[1], wanted[1])


class Reader(nn.Sequential):
    """As Mamba's mixers, whose kernels take the weight."""

    def forward(self, x):
        return nn.functional.linear(self[0](x).tanh(), self.last.weight)


def test_a_weight_that_is_read_past_its_layer():
    model = Reader(nn.Linear(24, 40))
    model.last = nn.Linear(40, 16)
    pool = AdapterPool(model, capacity_bytes=1 << 20, slots=4)
    with pytest.raises(AdapterError, match="AdapterPool: last: Reader may compute with its weight without calling"):
        pool.load("both", Adapter({"0": random_adapter(1).factors["0"], "last": random_adapter(1).factors["2"]}))
    pool.load("first", random_adapter(1, modules=["0"]))
