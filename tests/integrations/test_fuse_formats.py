"""fuse over the quantised layers of torchao and HQQ: what PEFT gives, and what float64 of the
dequantised W gives. What it leaves to PEFT, and why."""

import copy

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import explain, fuse, unfuse, warm_up
from lora_kernels.integrations.peft import linear
from lora_kernels.integrations.peft import quantised as over_quantised
from tests.integrations.formats_helpers import (
    BF16,
    F16,
    F32,
    KINDS,
    exact,
    inputs,
    layer,
    model,
    numbers,
    torchao_config,
)
from tests.integrations.fuse_helpers import (
    VOCABULARY,
    check_masks,
    errs_as_stock,
    fused_copy,
    gradients,
    losses,
    quietly,
    randomise,
    worst_error,
)


def reasons(made):
    return linear.fallbacks(layer(made))


def compare(stock, x, times=2, **lora):
    """The fused model errs no more than stock PEFT, against float64."""
    fused, true = fused_copy(stock), exact(stock, **lora)
    found, theirs = gradients(fused, x), gradients(copy.deepcopy(stock), x)
    errs_as_stock(found, theirs, gradients(true, x.double()), times)
    assert reasons(fused) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind):
    for dtype in (F32, BF16, F16):
        compare(model(kind, dtype), inputs(dtype))
    compare(model(kind, BF16, use_dora=True), inputs(BF16, 70), use_dora=True)
    for lora in ({"use_dora": True}, {"use_rslora": True}):
        compare(model(kind, **lora), inputs()[None], **lora)


@pytest.mark.parametrize("kind", ["int8 rows", "float8 groups", "hqq"])
def test_dropout_is_that_of_plain_layers(kind):
    """The masks of one seed are those of a fused layer over the dequantised W."""
    for dora in (False, True):
        lora = {"use_dora": dora, "lora_dropout": 0.4}
        fused = fused_copy(model(kind, **lora)).train()
        plain = exact(fused, **lora).float()
        fuse(plain.train())
        check_masks(fused, plain, inputs())


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    """Values and dtypes of the stock layers; float8 adds a bias of any dtype, and answers in the
    wider one."""
    for dtype in (F32, BF16):
        stock = model(kind, dtype, use_dora=dtype is F32)
        fused, x = fused_copy(stock), inputs(dtype)
        with torch.autocast("cpu", BF16):
            y, wanted = layer(fused)(x.requires_grad_()), layer(stock)(x)
            found, theirs = fused(x), stock(x)
        assert y.dtype is wanted.dtype and found.dtype is theirs.dtype, (kind, dtype)
        for one, other in ((y, wanted), (found, theirs)):
            torch.testing.assert_close(one.float(), other.float(), rtol=3e-2, atol=6e-2)
        assert reasons(fused) == {}
        found.float().sum().backward()


def test_inputs_of_another_dtype():
    """Rows of int8 are scaled after the product, and take any input; W of the others is of the
    dtype that it had."""
    stock = model("int8 rows", BF16)
    compare(stock, inputs(F32))
    fused = fused_copy(stock)
    torch.testing.assert_close(fused(inputs().double()), stock(inputs().double()))
    assert list(reasons(fused)) == ["the input is torch.float64, and torchao's Int8Tensor was torch.bfloat16"]
    for kind, reason in (
        ("int8 groups", "the input is torch.float32, and torchao's Int8Tensor was torch.bfloat16"),
        ("float8 rows", "the input is torch.float32, and torchao's Float8Tensor was torch.bfloat16"),
        ("hqq", "the input is torch.float32, and HQQ computes in torch.bfloat16"),
    ):
        stock = model(kind, BF16)
        fused, found = fused_copy(stock), []
        for made in (stock, fused):
            try:
                found.append(made(inputs()))
            except RuntimeError as error:
                found.append(str(error))
        assert found[0] == found[1] if isinstance(found[0], str) else torch.equal(*found)
        assert list(reasons(fused)) == [reason]


def test_zero_points_that_torchao_leaves_out():
    """Of rows of int8 its own product takes them for zeros, so that this is no W of which a
    gradient or a norm would tell."""
    q = pytest.importorskip("torchao.quantization")
    stock = model("int8 rows")
    base = layer(stock).base_layer
    with torch.no_grad():
        w = numbers(base) + 0.1
    kept = q.Int8Tensor.from_hp(w, q.PerRow(), mapping_type=q.MappingType.ASYMMETRIC)
    base.weight = nn.Parameter(kept, requires_grad=False)
    assert not torch.allclose(base(inputs()), nn.functional.linear(inputs(), numbers(base), base.bias), rtol=0.1)
    fused = fused_copy(stock)
    assert torch.equal(layer(fused)(inputs()), layer(stock)(inputs()))
    assert list(reasons(fused)) == [over_quantised.UNZEROED]


def test_steps_that_peft_makes_faster():
    for kind in ("int8 rows", "int4 groups"):
        for change, faster in (({}, True), ({"use_dora": True}, False), ({"lora_dropout": 0.1}, False)):
            stock = model(kind, **change)
            fused, x = fused_copy(stock), inputs(rows=7)
            found, wanted = layer(fused)(x), layer(stock)(x)
            assert torch.equal(found, wanted) or not faster
            with torch.no_grad():
                layer(fused)(x)
            layer(fused)(x[:0]), layer(fused)(inputs())
            assert reasons(fused) == ({over_quantised.FEW: 2} if faster else {})


def test_layers_that_change_their_inputs():
    stock = model("int8 inputs")
    fused = copy.deepcopy(stock)
    report = fuse(fused)
    assert all(reason.startswith("torchao changes the input of this layer, too") for reason in report.left.values())
    assert len(report.left) == 2 and torch.equal(fused(inputs()), stock(inputs()))


@pytest.mark.parametrize("kind", ["int8 rows", "int4 zeros", "hqq"])
def test_merged_and_unmerged(kind):
    """PEFT quantises anew, and the next call computes with what it wrote."""
    stock = model(kind)
    fused, x = fused_copy(stock), inputs()
    before = fused(x)
    for made in (stock, fused):
        quietly(made.merge_adapter)
    torch.testing.assert_close(fused(x), stock(x))
    assert reasons(fused) == {"an adapter is merged into the base weight": 1}
    for made in (stock, fused):
        quietly(made.unmerge_adapter)
    torch.testing.assert_close(fused(x), stock(x), rtol=1e-5, atol=1e-5)
    assert not torch.equal(fused(x), before) and sum(reasons(fused).values()) == 1
    with stock.disable_adapter(), fused.disable_adapter():
        torch.testing.assert_close(fused(x), stock(x))


def _edits(base):
    """What a loader or a user may do to a base, by name."""
    if hasattr(base, "W_q"):
        yield "codes", lambda: base.W_q.copy_(base.W_q.flip(0))
        yield "other codes", lambda: setattr(base, "W_q", nn.Parameter(base.W_q.flip(0), requires_grad=False))
        yield "scales", lambda: base.meta["scale"].mul_(2)
        yield "other zeros", lambda: base.meta.update(zero=base.meta["zero"] + 1)
        return
    w = base.weight
    yield "codes", lambda: w.qdata.copy_(w.qdata.flip(0))
    yield "other codes", lambda: setattr(w, "qdata", w.qdata.flip(0))
    yield "scales", lambda: w.scale.mul_(2)
    yield "a copy", lambda: w.copy_(_doubled(w))
    yield "other scales", lambda: setattr(w, "scale", w.scale * 2)
    yield "another weight", lambda: setattr(base, "weight", nn.Parameter(_doubled(w), requires_grad=False))


def _doubled(weight):
    weight = copy.deepcopy(weight)
    weight.scale.mul_(2)
    return weight


@pytest.mark.parametrize("kind", ["int8 rows", "int4 zeros", "hqq"])
@torch.no_grad()
def test_edits_of_the_base_are_seen(kind):
    x = inputs()
    for name in [name for name, _ in _edits(layer(model(kind)).base_layer)]:
        fused = fused_copy(model(kind, BF16 if kind == "int4 zeros" else F32, use_dora=True))
        x = inputs(BF16 if kind == "int4 zeros" else F32)
        before = fused(x)
        kept = linear.kept_weights[layer(fused)]
        first = kept(layer(fused).base_layer, x.dtype)
        assert torch.equal(fused(x), before) and kept(layer(fused).base_layer, x.dtype) is first
        dict(_edits(layer(fused).base_layer))[name]()
        after = fused(x)
        bound = 2e-2 if x.dtype is BF16 else 1e-5
        assert worst_error({"y": after.double()}, {"y": exact(fused, use_dora=True)(x.double())}) < bound, name
        assert not torch.equal(after, before), name


@pytest.mark.parametrize("kind", ["int8 rows", "float8 rows", "hqq"])
def test_reports_copies_and_files(kind, tmp_path):
    made = model(kind, use_dora=True)
    stock, x = type(layer(made)), inputs()
    report = fuse(made, strict=True)
    assert set(report.fused.values()) == {"cpu"} and not report.left
    assert "cpu" in str(explain(x, layer(made))) and warm_up(made, 4) == []
    y = made(x)
    twin = copy.deepcopy(made)
    assert torch.equal(twin(x), y) and torch.equal(made.to("cpu")(x), y)
    made.save_pretrained(tmp_path)
    other = fused_copy(model(kind, use_dora=True))
    randomise(other, 9)
    assert not torch.equal(other(x), y)
    other.load_adapter(tmp_path, "default")
    assert torch.equal(other(x), y)
    z = checkpoint(made, x, use_reentrant=False)
    assert torch.equal(z, y)
    found = gradients(made, x)
    made.zero_grad()
    (z * torch.randn(z.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    for name, p in made.named_parameters():
        assert p.grad is None or torch.equal(p.grad, found[name])
    made.add_adapter("other", peft.LoraConfig(r=3, target_modules=["a"]))
    made.base_model.set_adapter(["default", "other"])
    made(x)
    assert reasons(made) == {}
    unfuse(made)
    assert type(layer(made)) is stock


def test_a_base_that_is_quantised_below_its_layer():
    """Whose class PEFT had chosen by what it was."""
    q = pytest.importorskip("torchao.quantization")
    from tests.integrations import fuse_helpers

    stock, fused = fuse_helpers.pair()
    for made in (stock, fused):
        q.quantize_(layer(made).base_layer, torchao_config("int8 rows"))
    x = fuse_helpers.inputs()
    assert torch.equal(layer(fused)(x), layer(stock)(x))
    assert list(reasons(fused)) == ["base_layer was quantised after PEFT had made a FusedLinear of it"]


@torch.no_grad()
def test_hooks_that_move_weights():
    """As accelerate's `device_map` hangs them on each module; what is kept is kept."""
    fused, x = fused_copy(model("int8 rows", BF16, use_dora=True)), inputs(BF16)
    y = fused(x)
    for name in ("a", "b"):
        add_hook_to_module(layer(fused, name).base_layer, AlignDevicesHook(execution_device="cpu"))
    assert torch.equal(fused(x), y) and torch.equal(fused(x), y)
    assert reasons(fused) == {}


@pytest.mark.parametrize("dora", [False, True])
def test_losses_of_a_quantised_llama(dora, tmp_path):
    """As transformers loads it, and as a script trains it."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **sizes)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)

    def trained():
        how = transformers.TorchAoConfig(torchao_config("int8 rows"))
        base = transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=how, device_map="cpu")
        base = peft.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=dora)
        return peft.get_peft_model(base, lora).train()

    stock, fused = trained(), trained()
    report = fuse(fused)
    assert len(report.fused) == 14 and not report.left
    wanted, found = losses(stock), losses(fused)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=0)
    assert found[2] < found[0] - 0.01 and report.fallbacks() == {}


def test_compressed_tensors():
    """PEFT runs the layers while the library rounds in them; once they are decompressed, each is a
    plain one to the kernels."""
    library = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors.base")
    from tests.integrations import fuse_helpers

    stock = fuse_helpers.model()
    fused, x = fused_copy(stock), fuse_helpers.inputs()
    bases = [layer(made, name).base_layer for made in (stock, fused) for name in ("a", "b")]
    weights = library.QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
    for base in bases:
        library.initialize_module_for_quantization(base, library.QuantizationScheme(targets=["Linear"], weights=weights))
        base.weight_scale.data = base.weight.data.abs().amax(1, keepdim=True) / 127
        base.quantization_status = library.QuantizationStatus.FROZEN
    assert torch.equal(fused(x), stock(x))
    assert list(reasons(fused)) == ["compressed-tensors rounds the weight at each call"]
    for base in bases:
        compressors.compress_module(base)
    assert "has yet to decompress the weight" in next(iter(fuse(fused).left.values()))
    for base in bases:
        compressors.decompress_module(base)
    torch.testing.assert_close(fused(x), stock(x), rtol=1e-5, atol=1e-5)
    assert sum(reasons(fused).values()) == 1
    scheme = bases[2].quantization_scheme
    scheme.input_activations = library.QuantizationArgs(num_bits=8, dynamic=True, strategy="token")
    fused(x)
    assert "compressed-tensors rounds the input or the output" in reasons(fused)


def test_fp8_linear():
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")

    class Float8(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = fp8.FP8Linear(64, 48, (32, 32))

        def forward(self, x):
            return self.a(x)

    made = peft.get_peft_model(Float8(), peft.LoraConfig(target_modules=["a"]))
    report = fuse(made)
    assert report.left == {"base_model.model.a": "base_layer is FP8Linear, which rounds each input to float8, and so y"}
