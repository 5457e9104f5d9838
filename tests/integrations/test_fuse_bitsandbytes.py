"""fuse over bitsandbytes' 4-bit and 8-bit layers: what PEFT gives, and what float64 of the
dequantised W gives."""

import copy
import weakref

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from lora_kernels import explain, fuse, refresh, unfuse, warm_up
from lora_kernels.integrations.peft import linear
from lora_kernels.integrations.peft import quantised as over_quantised
from lora_kernels.nn.quantised import quantised_weight
from tests.integrations.fuse_helpers import check_masks, errs_as_stock, fused_copy, gradients, quietly, randomise, worst_error

bnb = pytest.importorskip("bitsandbytes")
from tests.integrations.bitsandbytes_helpers import KINDS, edits, exact, inputs, model, numbers, quantised_linear  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
A = "base_model.model.a"


def layer_a(made):
    return made.get_submodule(A)


def compare(stock, x, times=2):
    """The fused model errs no more than stock PEFT, against float64; gives its values."""
    fused, true = fused_copy(stock), exact(stock)
    found, theirs = gradients(fused, x), gradients(copy.deepcopy(stock), x)
    errs_as_stock(found, theirs, gradients(true, x.double()), times)
    assert linear.fallbacks(layer_a(fused)) == {}
    return found


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_numbers_are_the_librarys_4bit(kind, nested, dtype):
    """Bit for bit, by its kernel where its blocks end with rows, else by its formula."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    for n_out, n_in, block in ((64, 128, 64), (32, 256, 128), (33, 1024, 512), (5, 100, 64), (64, 128, 256), (3, 33, 64)):
        base = quantised_linear(kind, n_in, n_out, compute=dtype, nested=nested)
        base.weight.blocksize = block
        base.to("cpu")
        state = base.weight.quant_state
        assert state.blocksize == block
        found = quantised_weight(base, dtype).dequantise()
        absmax = state.absmax
        if nested:
            absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
        with torch.compiler.set_stance("force_eager"):  # else each shape is compiled
            formula = _dequantize_4bit_compute(base.weight.data.reshape(-1), absmax, state.code, block, state.shape, dtype)
        assert torch.equal(found, formula), (n_out, n_in, block)
        if n_in % block == 0:
            assert torch.equal(found, numbers(base, dtype)), (n_out, n_in, block)


def test_numbers_are_the_librarys_8bit():
    base = quantised_linear("int8", 100, 33).to("cpu")
    rows = base.weight.SCB[:, None].mul(1.0 / 127.0)
    assert torch.equal(quantised_weight(base, F32).dequantise(), base.weight.data.to(F32).mul_(rows))
    library = bnb.functional.int8_vectorwise_dequant(base.weight.data, base.weight.SCB)
    torch.testing.assert_close(quantised_weight(base, F32).dequantise(), library, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("x_dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("kind,compute", [("nf4", F32), ("nf4", BF16), ("fp4", F32), ("fp4", BF16), ("int8", None)])
def test_outputs_and_gradients(kind, compute, x_dtype):
    """An 8-bit base computes in the dtype of x."""
    found = compare(model(kind, compute, nested=kind == "nf4"), inputs(x_dtype))
    assert found["y"].dtype is x_dtype


@pytest.mark.parametrize("compute", [F32, BF16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}], ids=lambda v: next(iter(v)))
def test_variants(kind, lora, compute):
    stock = model(kind, compute, **lora)
    compare(stock, inputs(compute if kind == "int8" else F32))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_that_of_plain_layers(kind, dora):
    """The masks of one seed are those of a fused layer over the dequantised W."""
    lora = {"use_dora": dora, "lora_dropout": 0.4}
    fused = fused_copy(model(kind, **lora)).train()
    plain = exact(fused).float()
    fuse(plain.train())
    check_masks(fused, plain, inputs())


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_leaves_the_codes_alone(kind):
    """bitsandbytes packs 4-bit weights anew in eval mode, its scales rounded to bf16, and rounds x
    to int8 for an 8-bit one. Neither happens."""
    stock = model(kind, BF16).eval()
    fused, true, x = fused_copy(stock), exact(stock).eval(), inputs(BF16)
    codes = layer_a(fused).base_layer.weight.data.clone()
    with torch.no_grad():
        ours, y = ({"y": m(x.to(d))} for m, d in ((fused, BF16), (true, torch.float64)))
        theirs = {"y": stock(x)}
    assert worst_error(ours, y) < min(2.0**-8, worst_error(theirs, y))
    assert torch.equal(layer_a(fused).base_layer.weight.data, codes)


@pytest.mark.parametrize("first", [F32, BF16, F16], ids=str)
def test_the_first_input_sets_the_compute_dtype(first):
    stock = model("nf4", None)
    fused = fused_copy(stock)
    for dtype in (first, F32, BF16):
        x = inputs(dtype)
        y, wanted = fused(x), stock(x)
        assert y.dtype is wanted.dtype
        torch.testing.assert_close(y.float(), wanted.float(), rtol=2e-2, atol=2e-2)
        for made in (fused, stock):
            base = layer_a(made).base_layer
            assert base.compute_dtype is (None if first is F16 else first) and base.compute_type_is_set


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, dora, training):
    stock = model(kind, F32, use_dora=dora).train(training)
    fused, x = fused_copy(stock), inputs()
    for dtype in (F32, BF16, F16):
        found, wanted = [], copy.deepcopy(stock)  # whose second call raises over int8 with DoRA
        with torch.autocast("cpu", BF16):
            found += [fused(x.to(dtype).requires_grad_()), wanted(x.to(dtype).requires_grad_())]
        assert found[0].dtype is found[1].dtype, dtype
        torch.testing.assert_close(*(y.float() for y in found), rtol=3e-2, atol=6e-2)
    assert linear.fallbacks(layer_a(fused)) == {}


def test_several_adapters():
    stock = model("nf4", r=4)
    stock.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=5, target_modules=["a"], use_dora=True))
    randomise(stock, 4)
    stock.base_model.set_adapter(["default", "other"])
    fused, x = fused_copy(stock), inputs()
    found = [gradients(m, x) for m in (fused, stock)]
    assert worst_error(*found) < 1e-5
    assert linear.fallbacks(layer_a(fused)) == {}


def test_dropout_of_a_second_dora():
    """Its base product is that of W dequantised."""
    stock = model("nf4", lora_dropout=0.5, use_dora=True)
    stock.add_adapter("other", peft.LoraConfig(r=3, target_modules=["a"], use_dora=True, lora_dropout=0.5))
    stock.base_model.set_adapter(["default", "other"])
    fused = fused_copy(stock).train()
    assert fused(inputs()).isfinite().all()
    assert linear.fallbacks(layer_a(fused)) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_unmerged(kind):
    """PEFT quantises anew, and the next call computes with what it wrote."""
    stock = model(kind)
    fused, x = fused_copy(stock), inputs().requires_grad_()
    before = fused(x)
    for made in (stock, fused):
        quietly(made.merge_adapter)
    torch.testing.assert_close(fused(x), stock(x))
    assert linear.fallbacks(layer_a(fused)) == {"an adapter is merged into the base weight": 1}
    for made in (stock, fused):
        quietly(made.unmerge_adapter)
    torch.testing.assert_close(fused(x), stock(x), rtol=1e-5, atol=1e-5)
    assert not torch.equal(fused(x), before) and sum(linear.fallbacks(layer_a(fused)).values()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_disabled(kind):
    stock = model(kind)
    fused, x = fused_copy(stock), inputs()
    with stock.disable_adapter(), fused.disable_adapter():
        torch.testing.assert_close(fused(x), stock(x), rtol=1e-5, atol=1e-5)
        found = [gradients(one, x)["x"] for one in (fused, stock)]
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
        with torch.no_grad():  # where bitsandbytes would pack the codes
            fused.eval()(x)
    torch.testing.assert_close(fused.train()(x), stock(x), rtol=1e-5, atol=1e-5)
    assert linear.fallbacks(layer_a(fused)) == {}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind,nested", [("nf4", False), ("nf4", True), ("int8", False)])
@torch.no_grad()
def test_edits_of_the_base_are_seen(kind, nested, dora):
    x = inputs()
    names = [name for name, _ in edits(layer_a(model(kind, nested=nested)).base_layer)]
    for name in names:
        fused = fused_copy(model(kind, nested=nested, use_dora=dora))
        before = fused(x)
        assert torch.equal(fused(x), before)
        dict(edits(layer_a(fused).base_layer))[name]()
        after = fused(x)
        assert worst_error({"y": after.double()}, {"y": exact(fused)(x.double())}) < 1e-5, name
        assert not torch.equal(after, before), name


@torch.no_grad()
def test_edits_of_an_adapter_are_seen():
    fused, x = fused_copy(model("nf4", use_dora=True)), inputs()
    fused(x)
    for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
        getattr(layer_a(fused), name)["default"].weight.data[0] *= 3  # without a new version
        assert worst_error({"y": fused(x)}, {"y": exact(fused)(x.double())}) < 1e-5, name


@torch.no_grad()
def test_what_is_kept():
    """The weight is read once and DoRA's norm computed once; a weight that PEFT replaced goes."""
    fused, x = fused_copy(model("nf4", use_dora=True)), inputs()
    fused(x)
    layer = layer_a(fused)
    kept, cache = linear.kept_weights[layer], linear._norms[layer]
    first, gain = kept(layer.base_layer, F32), cache._gain
    fused(x)
    assert kept(layer.base_layer, F32) is first and cache._gain is gain and gain[1] is not None
    refresh(fused)
    assert layer not in linear.kept_weights and layer not in linear._norms
    fused(x)
    w = weakref.ref(linear.kept_weights[layer](layer.base_layer, F32))
    quietly(fused.merge_adapter)
    fused(x)
    del first
    assert w() is None


def test_report_classes_and_copies():
    made = model("nf4", use_dora=True)
    stock = type(layer_a(made))
    report = fuse(made)
    assert set(report.fused.values()) == {"cpu"} and not report.left and not report.slow
    assert fuse(made, strict=True).fused == report.fused
    assert isinstance(layer_a(made), stock) and type(layer_a(made)) is not stock
    x = inputs()
    assert "cpu" in str(explain(x, layer_a(made))) and warm_up(made, 4) == []
    y = made(x)
    twin = copy.deepcopy(made)
    assert torch.equal(twin(x), y) and torch.equal(made.to("cpu")(x), y)
    with torch.no_grad():
        layer_a(twin).base_layer.weight.quant_state.code.mul_(2)
    assert not torch.equal(twin(x), y) and torch.equal(made(x), y)
    unfuse(made)
    assert type(layer_a(made)) is stock
    torch.testing.assert_close(made(x), y, rtol=1e-5, atol=1e-5)


def test_state_dict(tmp_path):
    """The quant_state's entries among them, and adapters to another model."""
    fused, x = fused_copy(model("nf4")), inputs()
    y = fused(x)
    names = set(fused.state_dict())
    assert names == set(model("nf4").state_dict())
    torch.save(fused.state_dict(), tmp_path / "all.pt")
    assert names == set(torch.load(tmp_path / "all.pt"))
    fused.save_pretrained(tmp_path)
    other = fused_copy(model("nf4"))
    randomise(other, 9)
    assert not torch.equal(other(x), y)
    other.load_adapter(tmp_path, "default")
    assert torch.equal(other(x), y)


def test_hooks_of_inner_modules():
    stock = model("nf4")
    fused, x, seen = fused_copy(stock), inputs(), []
    for made in (stock, fused):
        layer_a(made).base_layer.register_forward_hook(lambda module, args, y: seen.append(1) or y * 2)
    torch.testing.assert_close(fused(x), stock(x))
    assert len(seen) == 2 and sum(linear.fallbacks(layer_a(fused)).values()) == 1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_hooks_that_move_weights(kind):
    """As accelerate's `device_map` hangs them on each module; what is kept is kept."""
    stock = model(kind, BF16, use_dora=True)
    fused, plain, x = fused_copy(stock), fused_copy(stock), inputs(BF16)
    layer = layer_a(fused)
    for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert torch.equal(fused(x), plain(x))
    w, gain = linear.kept_weights[layer](layer.base_layer, BF16), linear._norms[layer]._gain
    assert torch.equal(fused(x), plain(x)) and linear.fallbacks(layer) == {}
    assert linear.kept_weights[layer](layer.base_layer, BF16) is w and linear._norms[layer]._gain is gain


@pytest.mark.parametrize("storage", [torch.uint8, BF16], ids=str)
def test_a_parameter_that_lost_its_state(storage):
    """As FSDP2 makes it: the module still has it; without one PEFT raises its own error."""
    fused, x = fused_copy(model("nf4", storage=storage)), inputs()
    y, base = fused(x), layer_a(fused).base_layer
    base.quant_state = base.weight.quant_state
    base.weight = nn.Parameter(base.weight.data.as_subclass(torch.Tensor), requires_grad=False)
    assert torch.equal(fused(x), y) and linear.fallbacks(layer_a(fused)) == {}
    base.quant_state = None
    with pytest.raises(ValueError, match="quant_state is required"):
        fused(x)
    assert "quant_state" in next(iter(linear.fallbacks(layer_a(fused))))


def test_left_to_peft():
    """Weights that are not quantised, or packed for the library's own inference."""
    unready = quantised_linear("nf4", 128, 64)
    assert "not quantised yet" in quantised_weight(unready, F32)
    half = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=True)
    assert "16 bits" in quantised_weight(half, F32)
    fused = fused_copy(model("nf4", BF16))
    layer_a(fused).base_layer.weight.quant_state.packing_format_for_cpu = True
    assert "packed" in fuse(fused).left[A]


def test_uncast_inputs():
    stock = model("nf4", BF16)
    fused = fused_copy(stock)
    for made in (stock, fused):
        for name in ("a", "b"):
            made.get_submodule(f"base_model.model.{name}").cast_input_dtype_enabled = False
    torch.testing.assert_close(fused(inputs()), stock(inputs()))
    assert over_quantised.UNCAST in linear.fallbacks(layer_a(fused))


def test_outliers_are_exact():
    """A threshold of LLM.int8() names columns of x that are not rounded; here none is."""
    fused = fused_copy(model("int8")).eval()
    x = inputs()
    x[:, 5] *= 100
    y = fused(x)
    layer_a(fused).base_layer.state.threshold = 6.0
    assert torch.equal(fused(x), y)
    layer = layer_a(fused)
    lora = exact(fused).base_model.model.a
    assert worst_error({"y": layer(x)}, {"y": lora(x.double())}) < 1e-5
