"""A served model gives each sequence of a batch what PEFT gives it alone."""

import warnings

import peft
import pytest
import torch
from torch import nn

from lora_kernels import explain, use_backend
from lora_kernels.adapters.config import AdapterError
from lora_kernels.serving import Adapter, AdapterPool, Factors, MultiLoRALinear, serve, unserve
from tests.integrations.fuse_helpers import llama
from tests.serving.served import KINDS, base, save_all, tokens


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def served(saved):
    model = base()
    pool = AdapterPool(model, capacity_bytes=8 << 20, slots=12)
    for kind, folder in saved[0].items():
        pool.load(kind, folder)
    return serve(model, pool), pool, saved[1]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_each_row_is_as_peft_computes_it(served, backend):
    model, _, peft_models = served
    names = [*KINDS, None, "lora", None, "dora"]
    x = tokens(len(names))
    with use_backend(backend):
        logits = model(x, adapters=names).logits
        alone = model(x).logits
    plain = base()
    for i, name in enumerate(names):
        wanted = (plain if name is None else peft_models[name])(x[i : i + 1]).logits[0]
        torch.testing.assert_close(logits[i], wanted, rtol=1e-4, atol=1e-5)
    assert alone.equal(plain(x).logits)


def test_greedy_tokens_are_those_of_peft(served):
    model, _, peft_models = served
    names = [None, *KINDS]
    x = tokens(len(names), 4)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = model.generate(x, adapters=names, **options)
    for i, name in enumerate(names):
        wanted = (base() if name is None else peft_models[name]).generate(input_ids=x[i : i + 1], **options)
        assert found[i].equal(wanted[0])


def test_beams(served):
    model, _, peft_models = served
    x = tokens(2, 4)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    found = model.generate(x, adapters=["dora", None], **options)
    assert found[0].equal(peft_models["dora"].generate(input_ids=x[:1], **options)[0])
    assert found[1].equal(base().generate(x[1:], **options)[0])


def test_several_adapters_for_one_sequence(served):
    """The sum of what each adds to each layer, weighted; as PEFT adds active adapters."""
    model, pool, _ = served
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(4, 32)
    with pool.batch(["lora", "rslora", "some", None]):
        lora, rslora, some, plain = (layer(x[:1].expand(4, 32))[i] for i in range(4))
    with pool.batch([["lora", "rslora"], "some", [], ["lora", "some", "rslora"]], [[0.5, 2.0], 3, [], [1, 1, 1]]):
        y = layer(x[:1].expand(4, 32))
    wanted = [0.5 * (lora - plain) + 2 * (rslora - plain), 3 * (some - plain), 0 * plain, lora + rslora + some - 3 * plain]
    torch.testing.assert_close(y, torch.stack([plain + each for each in wanted]), rtol=1e-4, atol=1e-5)


def test_16_bits(saved):
    model = base(torch.bfloat16)
    pool = AdapterPool(model, capacity_bytes=8 << 20, slots=12)
    names = list(KINDS)
    for kind in names:
        pool.load(kind, saved[0][kind])
    serve(model, pool)
    x = tokens(len(names))
    logits = model(x, adapters=names).logits
    for i, name in enumerate(names):
        wanted = saved[1][name](x[i : i + 1]).logits[0]
        assert (logits[i].float() - wanted).norm() <= 0.05 * wanted.norm()


def test_a_batch_for_several_calls_and_threads(served):
    model, pool, _ = served
    x = tokens(2)
    wanted = model(x, adapters=["lora", None]).logits
    with pool.batch(["lora", None]) as batch:
        assert model(x).logits.equal(wanted) and model(x).logits.equal(wanted)
    with pytest.raises(RuntimeError, match="Batch: it has ended"), batch:
        pass


def trained_embeddings():
    """PEFT models that adapt the embedding, one of them the head, too, and the same adapter without
    the embedding."""
    models = {}
    for i, (name, targets) in enumerate({"both": ["embed_tokens", "lm_head", "q_proj"], "embedding": ["embed_tokens"]}.items()):
        torch.manual_seed(0)
        model = peft.get_peft_model(llama(), peft.LoraConfig(r=3 + 8 * i, lora_alpha=9, target_modules=targets)).eval()
        generator = torch.Generator().manual_seed(i)
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        models[name] = model
    return models


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_embeddings(saved, tmp_path, backend):
    """Beside layers' adapters and the base; several for one sequence add up; exchanged, evicted,
    and back."""
    model, models = base(), trained_embeddings()
    modules = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    pool = AdapterPool(model, capacity_bytes=8 << 20, slots=4, max_rank=16, modules=modules)
    for name, each in models.items():
        each.save_pretrained(tmp_path / name)
        pool.load(name, tmp_path / name)
    pool.load("dora", saved[0]["dora"])
    serve(model, pool)
    x, names = tokens(5), ["both", None, "dora", "embedding", "both"]
    plain, wanted = base(), dict(models, dora=saved[1]["dora"])
    with use_backend(backend):
        for _ in range(2):
            logits = model(x, adapters=names).logits
            for i, name in enumerate(names):
                of = plain if name is None else wanted[name]
                torch.testing.assert_close(logits[i], of(x[i : i + 1]).logits[0], rtol=1e-4, atol=1e-5)
            pool.evict("both")
            pool.load("both", tmp_path / "both")
        embedding = model.model.embed_tokens
        with pool.batch([["both", "embedding"], "embedding", [], ["both", "dora"]], [[0.5, 2.0], 3, [], [1, 1]]):
            y = embedding(x[:4])
        parts = {name: each.base_model.model.model.embed_tokens(x) for name, each in models.items()}
        rows = plain.model.embed_tokens(x)
        both, alone = (parts[name] - rows for name in ("both", "embedding"))
        added = torch.stack([0.5 * both[0] + 2 * alone[0], 3 * alone[1], 0 * rows[2], both[3]])
        torch.testing.assert_close(y, rows[:4] + added, rtol=1e-4, atol=1e-5)
    assert type(unserve(model).model.embed_tokens) is nn.Embedding and model(x).logits.equal(plain(x).logits)


def test_embeddings_in_16_bits_and_stale_ids(tmp_path):
    model, models = base(torch.bfloat16), trained_embeddings()
    pool = AdapterPool(model, capacity_bytes=8 << 20, slots=2, max_rank=16, modules=["model.embed_tokens"])
    models["embedding"].save_pretrained(tmp_path)
    pool.load("embedding", tmp_path)
    layer, x = serve(model, pool).model.embed_tokens, tokens(2)
    with pool.batch(["embedding", None]):
        y = layer(x)
    wanted = models["embedding"].base_model.model.model.embed_tokens(x)
    torch.testing.assert_close(y[0].float(), wanted[0], rtol=1e-2, atol=1e-2)
    assert y[1].equal(layer(x)[1])
    batch = pool.batch(["embedding", None])
    batch.ids[0] += 1 << 32
    with pytest.raises(LookupError, match="out of range or stale"), batch:
        assert layer(x).equal(y[1:].new_tensor(layer.weight[x].tolist()))


def test_embeddings_by_whom_they_are_called(tmp_path):
    """Positions that all sequences share are refused where the batch adapts them, and else left
    alone; no tokens are none."""
    model = base()
    pool = AdapterPool(model, capacity_bytes=8 << 20, slots=2, max_rank=16, modules=["model.embed_tokens", "lm_head"])
    for name, each in trained_embeddings().items():
        each.save_pretrained(tmp_path / name)
    pool.load("embedding", tmp_path / "embedding")
    factors = Factors(torch.ones(2, 32), torch.ones(pool.sites["lm_head"].shape[0], 2), 1.0)
    pool.load("head", Adapter({"lm_head": factors}))
    layer, x = serve(model, pool).model.embed_tokens, tokens(1, 4)
    with pool.batch(["head", None]):
        assert layer(x).equal(layer.weight[x])
    with pool.batch(["embedding", None]):
        with pytest.raises(
            ValueError, match=r"model.embed_tokens with an input of \[1, 4\]: dimension 0 must be the 2 sequences"
        ):
            layer(x)
        assert layer(x[:, :0].expand(2, 0)).shape == (2, 0, 32) and layer(x[0, :2]).shape == (2, 32)


def test_an_adapter_for_other_embeddings(tmp_path):
    """PEFT writes the embedding beside its adapter; another base has another."""
    tuned = trained_embeddings()["embedding"]
    state = peft.get_peft_model_state_dict(tuned, save_embedding_layers=True)
    tuned.save_pretrained(tmp_path, save_embedding_layers=True)
    model = base()
    pool = AdapterPool(model, capacity_bytes=8 << 20, modules=["model.embed_tokens"])
    pool.load("same", tmp_path)
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 3] += 1
    with pytest.raises(AdapterError, match="embed_tokens.base_layer.weight differs from the base weight of the model"):
        pool.load("other", tmp_path)
    with pytest.raises(AdapterError, match="adapter_of: .* differs from the base weight of the model"):
        pool.load("other", (tuned.peft_config["default"], state))


def test_embeddings_that_a_batch_cannot_have(saved, tmp_path):
    model = base()
    layers = AdapterPool(model, capacity_bytes=8 << 20)
    trained_embeddings()["embedding"].save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="changes modules that the pool does not have: model.embed_tokens"):
        layers.load("embedding", tmp_path)
    config = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config.replace('"use_dora": false', '"use_dora": true'))
    with pytest.raises(AdapterError, match="it adapts model.embed_tokens with DoRA or lora_bias, and is an embedding"):
        layers.load("embedding", tmp_path)
    embeddings = AdapterPool(model, capacity_bytes=8 << 20, modules=["model.embed_tokens"])
    dora = Factors(torch.ones(2, embeddings.sites["model.embed_tokens"].shape[1]), torch.ones(32, 2), 1.0, torch.ones(32))
    with pytest.raises(AdapterError, match="an embedding has no DoRA and no lora_bias in a batch"):
        embeddings.load("dora", Adapter({"model.embed_tokens": dora}))
    with pytest.raises(TypeError, match="nn.Linear or nn.Embedding without max_norm of the model, found Embedding"):
        model.model.embed_tokens.max_norm = 1.0
        AdapterPool(model, capacity_bytes=8 << 20, modules=["model.embed_tokens"])


def test_what_does_not_fit(served):
    model, pool, _ = served
    x = tokens(3)
    with pytest.raises(LookupError, match="AdapterPool: no adapter is called 'lore'; there are dora, dora_rslora, head, lora"):
        model(x, adapters=["lora", "lore", None])
    with pytest.raises(ValueError, match=r"adapters: 2 were given, for 3 sequences \(argument 0 \[3, 7\]\)"):
        model(x, adapters=["lora", None])
    for wrong in ("lora", [3], [["lora", 3]], 5):
        with pytest.raises(TypeError, match="adapters"):
            model(x, adapters=wrong)
    for weights in ([1.0], [1.0, [1.0, 2.0], 0.0], [1.0, torch.inf, []]):
        with pytest.raises((ValueError, TypeError), match="weights must be"):
            model(x, adapters=["lora", "dora", None], adapter_weights=weights)
    assert pool.stats().in_use == 0
    with pytest.raises(ValueError, match="serve: the model is served already"):
        serve(model, pool)
    with pytest.raises(ValueError, match="serve: the pool was made for another model"):
        serve(base(), pool)


def test_serve_and_unserve_leave_a_model_as_it_was(saved):
    model = base()
    x, before = tokens(2), dict(model.named_modules())
    wanted, parameters = model(x).logits, {name: id(p) for name, p in model.named_parameters()}
    pool = AdapterPool(model, capacity_bytes=8 << 20)
    serve(model, pool)
    assert isinstance(model.lm_head, MultiLoRALinear) and "slots=64" in repr(model.lm_head)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert model.state_dict().keys() == before[""].state_dict().keys()
    unserve(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.values()]
    assert {name: id(p) for name, p in model.named_parameters()} == parameters and model(x).logits.equal(wanted)
    assert not {"forward", "generate"} & vars(model).keys()
    serve(model, pool)


def test_hooks_stay(saved):
    model = base()
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    pool = AdapterPool(model, capacity_bytes=8 << 20)
    serve(model, pool)
    model(tokens(1))
    assert seen == [1]


def test_explain_says_what_ran(served):
    model, *_ = served
    explanation = explain(model, tokens(2), adapters=["lora", None])
    assert {d.op for d in explanation.decisions} == {"multi_lora_forward"} and len(explanation.decisions) == 15
    assert {d.chosen for d in explanation.decisions} == {"cpu"}


def test_modules_that_cannot_be_pooled():
    class Mine(nn.Linear):
        def forward(self, x):
            return x

    net = nn.Sequential(nn.Linear(8, 8), Mine(8, 8))
    assert list(AdapterPool(net, capacity_bytes=1 << 20).sites) == ["0"]
    with pytest.raises(TypeError, match="AdapterPool: '1' must be a plain nn.Linear or .* of the model, found Mine"):
        AdapterPool(net, capacity_bytes=1 << 20, modules=["0", "1"])
    with pytest.raises(TypeError, match="AdapterPool: '7' must be a plain nn.Linear or .* of the model, found NoneType"):
        AdapterPool(net, capacity_bytes=1 << 20, modules=["7"])
    with pytest.raises(ValueError, match="AdapterPool: capacity_bytes must be at least .* for 64 slots and one page"):
        AdapterPool(net, capacity_bytes=1 << 10)
    with pytest.raises(ValueError, match="AdapterPool: Tanh has no linear layer"):
        AdapterPool(nn.Tanh(), capacity_bytes=1 << 10)
    with pytest.raises(ValueError, match="slots and max_rank must be at least 1, found 0 and 512"):
        AdapterPool(net, capacity_bytes=1 << 20, slots=0)


def test_a_compiled_model(saved):
    model = llama().eval()
    pool = AdapterPool(model, capacity_bytes=8 << 20)
    pool.load("lora", saved[0]["lora"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        served = serve(model, pool)
        compiled = torch.compile(served, backend="eager")
        x = tokens(2)
        with pool.batch(["lora", None]):
            torch.testing.assert_close(compiled(x).logits, served(x).logits)
