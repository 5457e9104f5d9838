"""Experts of codes in a batch: each sequence is its adapter's, on float64 of the codes' numbers."""

import copy

import peft
import pytest
import torch
from torch import nn

from lora_kernels.serving import AdapterPool, BaseChangedError, adapter_of, serve, unserve
from tests.nn.coded_experts import dense, fp8_of, no_numbers
from tests.serving.experts import (
    BOTH,
    KINDS,
    assert_rows,
    base,
    modules_of,
    pool_of,
    random_adapter,
    served,
    trained,
    with_adapter,
)  # fmt: skip
from tests.serving.served import tokens

parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
EXPERTS = "model.layers.0.mlp.experts"
NAMES = ["gate_up_proj", "down_proj"]
OPTIONS = {"nf4": {}, "nested": {"compress_statistics": True, "quant_type": "fp4"}}
CASES = [("mixtral", "nf4"), ("qwen3", "nested"), ("gpt_oss", "nf4"), ("qwen3", "fp8")]
cases = pytest.mark.parametrize(("kind", "codes"), CASES)


def coded(kind, codes, seed=0, dtype=torch.float32, only=NAMES):
    """A model whose experts are codes, and the same over their numbers."""
    model = base(kind, dtype)
    for path, experts in [(n, m) for n, m in model.named_modules() if n.endswith(".experts")]:
        for name in NAMES if seed else ():
            p = experts.get_parameter(name)
            p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        if codes == "fp8":
            values = {name: experts.get_parameter(name) for name in NAMES}
            experts = fp8_of(values, (4, 4), experts.config).eval().requires_grad_(False)
            model.set_submodule(path, experts)
            continue
        for name in only:
            parametrize.replace_parameter_4bit(experts, name, **OPTIONS[codes])
    return model, numbers_of(model, kind, dtype)


def numbers_of(model, kind, dtype=torch.float32):
    plain = base(kind, dtype)
    for path, experts in [(n, m) for n, m in plain.named_modules() if n.endswith(".experts")]:
        for name in NAMES:
            getattr(experts, name).data = dense(model.get_submodule(path), name, dtype)
    return plain


def of_kinds(pool, plain, dora=True):
    """Adapters by name, loaded, and what each sequence is to be."""
    adapters = {"lora": random_adapter(pool, 1, r=3), "down": random_adapter(pool, 2, r=11, modules=BOTH[1:])}
    if dora:
        adapters["dora"] = random_adapter(pool, 3, r=4, dora=True)
    for name, adapter in adapters.items():
        pool.load(name, adapter)
    return {None: copy.deepcopy(plain).double()} | {name: adapted(plain, a) for name, a in adapters.items()}


def adapted(plain, adapter):
    """As `with_adapter`, also of weights that are [in, out]."""
    turned = [m for m in plain.modules() if getattr(m, "is_transposed", False)]

    def turn(model):
        for m in model.modules():
            for name in NAMES if getattr(m, "is_transposed", False) else ():
                getattr(m, name).data = getattr(m, name).data.mT.contiguous()
        return model

    return turn(with_adapter(turn(copy.deepcopy(plain)), adapter)) if turned else with_adapter(plain, adapter)


@cases
def test_each_row_is_its_adapters(kind, codes):
    model, plain = coded(kind, codes)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    pool = pool_of(model)
    exact = of_kinds(pool, plain, dora=kind != "gpt_oss")
    names = ["lora", None, "down", "dora" if kind != "gpt_oss" else "lora", "lora"]
    x = tokens(len(names))
    serve(model, pool)
    y = model(x, adapters=names).logits
    assert_rows(y, names, exact, x)
    assert_rows(model(x).logits, [None] * len(names), exact, x)
    for row, name in enumerate(names):
        torch.testing.assert_close(model(x[row : row + 1], adapters=[name]).logits[0], y[row], rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in unserve(model).state_dict().items())
    serve(model, pool)
    assert torch.equal(model(x, adapters=names).logits, y)


@pytest.mark.parametrize("codes", ["nf4", "fp8"])
def test_16_bits(codes):
    model, plain = coded("qwen3", codes, dtype=torch.bfloat16)
    if codes == "fp8":
        for m in model.modules():
            if hasattr(m, "act_fn") and hasattr(m, "config"):
                m.config.dtype = torch.bfloat16
    pool = pool_of(model)
    assert pool.sites[f"{EXPERTS}.down_proj"].dtype is torch.bfloat16
    exact, names = of_kinds(pool, plain), ["lora", None, "down", "dora"]
    x = tokens(len(names))
    assert_rows(serve(model, pool)(x, adapters=names).logits, names, exact, x, 0.05)


@pytest.mark.parametrize("codes", ["nf4", "fp8"])
def test_no_numbers_of_all_experts(codes, monkeypatch):
    model, plain = coded("qwen3", codes)
    pool = pool_of(model)
    exact, names = of_kinds(pool, plain), ["lora", None, "dora"]
    serve(model, pool)
    no_numbers(monkeypatch)
    x = tokens(len(names))
    assert_rows(model(x, adapters=names).logits, names, exact, x)
    model(x)


@pytest.mark.parametrize("only", [NAMES[:1], NAMES[1:]], ids=str)
def test_one_matrix_of_codes(only):
    model, plain = coded("mixtral", "nf4", only=only)
    pool = pool_of(model)
    exact, names = of_kinds(pool, plain), ["lora", None, "down", "dora"]
    x = tokens(len(names))
    assert_rows(serve(model, pool)(x, adapters=names).logits, names, exact, x)


def test_files_and_tensors_of_peft(tmp_path):
    """Before and after `serve`; as PEFT lays its layers over numbers, and over codes."""
    for kind in ("experts", "all"):
        model, plain = coded("mixtral", "nf4")
        over = {"numbers": trained(plain, kind)}
        names = [f"{EXPERTS.replace('0', str(i))}.{name}" for i in range(2) for name in NAMES]
        values = KINDS[kind] | {"target_parameters": names}
        made = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**values)).eval()
        inner = {(n.replace(".base_layer", ""), m.parameter_name): m for n, m in over["numbers"].named_modules()
                 if hasattr(m, "parameter_name")}  # fmt: skip
        its = {
            (n.replace(".base_layer", ""), m.parameter_name): m for n, m in made.named_modules() if hasattr(m, "parameter_name")
        }
        assert its.keys() == inner.keys() and len(its) == 4
        for key, m in its.items():
            for factor in ("lora_A", "lora_B"):
                getattr(m, factor).load_state_dict(getattr(inner[key], factor).state_dict())
        with torch.no_grad():
            for n, p in over["numbers"].named_parameters():
                if "self_attn" in n and "lora_" in n:
                    made.get_parameter(n).copy_(p)
        over["codes"] = made
        pool = pool_of(model)
        exact = {name: over["numbers"].double() for name in over} | {"tensors": over["numbers"]}
        for name, each in over.items():
            each.save_pretrained(tmp_path / kind / name)
            pool.load(name, tmp_path / kind / name)
            serve(model, pool) if name == "numbers" else None
        pool.load("tensors", adapter_of(model, made.peft_config["default"], peft.get_peft_model_state_dict(made)))
        x, wanted = tokens(3), [*over, "tensors"]
        assert_rows(model(x, adapters=wanted).logits, wanted, exact, x)


@pytest.mark.parametrize("open_batch", [False, True])
@pytest.mark.parametrize("codes", ["nf4", "fp8"])
def test_gains_follow_the_codes(codes, open_batch):
    model, plain = coded("qwen3", codes)
    other, others_numbers = coded("qwen3", codes, seed=7)
    pool = pool_of(model)
    names, x = ["dora", None, "lora"], tokens(3)
    of_kinds(pool, plain)
    serve(model, pool)
    before = model(x, adapters=names).logits

    def change():
        mine, its = model.get_submodule(EXPERTS), other.get_submodule(EXPERTS)
        for name in NAMES:
            if codes == "fp8":
                for part in (name, f"{name}_scale_inv"):
                    setattr(mine, part, getattr(its, part))
            else:
                mine.parametrizations[name].original = its.parametrizations[name].original
                mine.parametrizations[name][0].quant_state = its.parametrizations[name][0].quant_state

    if open_batch:
        with pool.batch(names):
            model(x)
            change()
            y = model(x).logits
    else:
        change()
        y = model(x, adapters=names).logits
    numbers = numbers_of(unserve(model), "qwen3")
    assert torch.equal(numbers.get_parameter(f"{EXPERTS}.down_proj"), others_numbers.get_parameter(f"{EXPERTS}.down_proj"))
    exact = {None: numbers.double()}
    fresh = pool_of(model)
    exact |= {"lora": with_adapter(numbers, random_adapter(fresh, 1, r=3)),
              "dora": with_adapter(numbers, random_adapter(fresh, 3, r=4, dora=True))}  # fmt: skip
    assert not torch.allclose(y, before, rtol=1e-2)
    assert_rows(y, names, exact, x)


def test_codes_that_do_not_fit_any_more():
    model, plain = coded("qwen3", "nf4")
    pool = pool_of(model)
    exact = of_kinds(pool, plain)
    serve(model, pool)
    module, x = model.get_submodule(EXPERTS), tokens(1)
    held = module.parametrizations.down_proj
    state, original = held[0].quant_state, held.original

    def refused(says):
        for call in (lambda: model(x, adapters=["dora"]), lambda: pool.batch(["lora"])):
            with pytest.raises(BaseChangedError, match=f"at {EXPERTS}.down_proj: {says}"):
                call()

    held.original = nn.Parameter(original.data.clone(), requires_grad=False)
    state.packing_format_for_cpu = True
    refused("bitsandbytes has packed down_proj")
    held.original, state.packing_format_for_cpu = original, False
    assert_rows(model(x, adapters=["dora"]).logits, ["dora"], exact, x)
    held.original, state.shape = nn.Parameter(original.data.clone(), requires_grad=False), torch.Size((8, 12, 32))
    refused(r"the pages are for a weight \[8, 32, 12\], it is \[8, 12, 32\]")
    held.original, state.shape = original, torch.Size((8, 32, 12))
    nn.utils.parametrize.remove_parametrizations(module, "down_proj", leave_parametrized=False)
    refused("the Qwen3MoeExperts there has no codes of down_proj any more")


def test_numbers_that_become_codes():
    model = base("mixtral")
    pool = pool_of(model)
    pool.load("a", random_adapter(pool, 1))
    serve(model, pool)
    parametrize.replace_parameter_4bit(model.get_submodule(EXPERTS), "down_proj")
    with pytest.raises(BaseChangedError, match=f"at {EXPERTS}.down_proj: the MixtralExperts there has no down_proj of its"):
        model(tokens(1), adapters=["a"])


def test_a_matrix_that_becomes_codes_outside_a_batch():
    model, _ = coded("mixtral", "nf4", only=NAMES[:1])
    serve(model, pool_of(model))
    x = tokens(2)
    model(x)
    for path in (EXPERTS, EXPERTS.replace("0", "1")):
        parametrize.replace_parameter_4bit(model.get_submodule(path), "down_proj")
    assert_rows(model(x).logits, [None] * 2, {None: numbers_of(model, "mixtral").double()}, x)


def test_sizes_and_what_cannot_be_read():
    model, plain = coded("qwen3", "nf4")
    sizes = [AdapterPool.sizing(each, [8], slots=1, modules=[EXPERTS]) for each in (model, plain)]
    assert sizes[0] == sizes[1]
    experts = model.get_submodule(EXPERTS)
    experts.parametrizations.down_proj[0].quant_state = None
    with pytest.raises(
        TypeError, match="no adapter can be served on down_proj of Qwen3MoeExperts: the codes of down_proj have"
    ):
        AdapterPool(model, capacity_bytes=1 << 20, modules=modules_of(model))


def test_a_copy_serves_nobody():
    model, plain = coded("mixtral", "nf4")
    pool = pool_of(model)
    of_kinds(pool, plain)
    serve(model, pool)
    other, x = copy.deepcopy(model), tokens(2)
    with pool.batch(["lora", None]):
        torch.testing.assert_close(other(x).logits, plain(x).logits, rtol=1e-4, atol=1e-5)


def test_a_pool_over_numbers_and_files_after_serve(tmp_path):
    model, pool, exact = served(base("mixtral"), tmp_path, ["experts"])
    pool.load("again", tmp_path / "experts")
    x = tokens(2)
    assert_rows(model(x, adapters=["again", "experts"]).logits, ["experts"] * 2, exact, x)
