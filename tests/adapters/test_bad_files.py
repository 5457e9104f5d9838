"""A file that is damaged, foreign or does not fit is refused by name, and the model is bitwise as
it was."""

import json
import os
import pickle
import struct

import hypothesis
import hypothesis.strategies as st
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels.adapters import AdapterError, LoraConfig, inject_adapter, load_adapter, save_adapter
from lora_kernels.nn import DoRALinear, LoRALinear

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
A, B = "base_model.model.body.0.q.lora_A.weight", "base_model.model.body.0.q.lora_B.weight"
LORA = {"target_modules": ["q", "o"], "r": 4, "lora_alpha": 6}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(13, 12)
        self.body = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(12, 20), "o": nn.Linear(20, 12, bias=False), "norm": nn.LayerNorm(12)})
            for _ in range(2)
        )
        self.head = nn.Linear(12, 5)

    def forward(self, ids):
        x = self.table(ids)
        for block in self.body:
            x = block["norm"](x + block["o"](torch.tanh(block["q"](x))))
        return self.head(x)


def net():
    torch.manual_seed(0)
    return Net().eval()


def injected(values):
    model = net()
    inject_adapter(model, LoraConfig(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


class Snapshot:
    """Everything of a model that a failed call must leave as it was."""

    def __init__(self, model):
        self.before = self.snapshot(model)

    @staticmethod
    def snapshot(model):
        modules = {n: (id(m), type(m), m.training, set(vars(m))) for n, m in model.named_modules()}
        tensors = {
            name: (
                id(t),
                t.data_ptr(),
                t.dtype,
                t.requires_grad,
                bytes(t.detach().view(torch.uint8).flatten().tolist()),
            )
            for name, t in [*model.named_parameters(), *model.named_buffers()]
        }
        return modules, tensors, getattr(model, "_lora_config", None), torch.get_rng_state().tolist()

    def check(self, model):
        assert self.snapshot(model) == self.before


def edit(folder, **changes):
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **changes}))


def tensors(change):
    def apply(folder):
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return apply


def header(change):
    def apply(folder):
        content = (folder / WEIGHTS).read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0]
        values = json.loads(content[8:end])
        text = change(values)
        text = text if isinstance(text, bytes) else json.dumps(values).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[end:])

    return apply


def content(change):
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def swap(name, **changes):
    return header(lambda values: values[name].update(changes))


def poison(value, count):
    def change(found):
        found[B].view(-1)[:count] = value

    return tensors(change)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def only_pickle(folder):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload()))


BAD = {
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "cannot be read: No such file"),
    "no config": (lambda d: (d / CONFIG).unlink(), "adapter_config.json: cannot be read"),
    "a pickle": (only_pickle, "adapter_model.bin: is a pickle"),
    "a pickle renamed": (content(lambda _: pickle.dumps(Payload())), "truncated or not safetensors"),
    "empty": (content(lambda c: b""), "truncated or not safetensors"),
    "short": (content(lambda c: c[:6]), "truncated or not safetensors"),
    "cut in the header": (content(lambda c: c[:100]), "truncated or not safetensors"),
    "cut in the data": (content(lambda c: c[:-4]), "truncated or damaged: the tensors take"),
    "something appended": (content(lambda c: c + b"\0" * 8), "truncated or damaged"),
    "terabytes of nothing": (lambda d: os.truncate(d / WEIGHTS, 1 << 40), "truncated or damaged: the tensors take"),
    "a huge header": (content(lambda c: struct.pack("<Q", 1 << 62) + c[8:]), "truncated or not safetensors"),
    "long metadata": (
        header(lambda v: v.update(__metadata__={"x": "y" * (1 << 20)})),
        "the header may take 1048576 bytes, found",
    ),
    "metadata of numbers": (header(lambda v: v.update(__metadata__={"x": 1})), "__metadata__ must map"),
    "header of lists": (header(lambda v: b"[]      "), "must hold a JSON object"),
    "header nested": (header(lambda v: b'{"a":' * 50_000), "nested too deeply|is not JSON"),
    "header not JSON": (header(lambda v: b"{....}  "), "is not JSON"),
    "a key twice": (header(lambda v: b'{"a": {}, "a": {}}'), "'a' appears twice"),
    "an entry of numbers": (header(lambda v: v.update({A: 3})), "q.lora_A.weight must have dtype, shape"),
    "an entry with more": (swap(A, more=1), "must have dtype, shape and data_offsets"),
    "an unknown dtype": (swap(A, dtype="F8_E4M3"), "has the dtype 'F8_E4M3'"),
    "a dtype of numbers": (swap(A, dtype=3), "has the dtype 3"),
    "a negative shape": (swap(A, shape=[-4, -12]), "damaged entry"),
    "a shape that overflows": (swap(A, shape=[1 << 62, 1 << 62]), "q.lora_A.weight with F32 .* takes"),
    "a shape of floats": (swap(A, shape=[4.0, 12]), "damaged entry"),
    "offsets of three": (swap(A, data_offsets=[0, 1, 2]), "damaged entry"),
    "offsets backwards": (swap(A, data_offsets=[192, 0]), "data_offsets give -192"),
    "tensors that overlap": (
        header(lambda v: v[B].update(data_offsets=[i - 4 for i in v[B]["data_offsets"]])),
        "overlaps",
    ),
    "offsets past the end": (swap(A, data_offsets=[1 << 40, (1 << 40) + 192]), "leaves a gap|overlaps"),
    "integers": (tensors(lambda t: t.update({A: t[A].to(torch.int8)})), "q.lora_A.weight must be floating, found"),
    "another rank": (tensors(lambda t: t.update({A: t[A][:2].clone()})), r"must have shape \[4, 12\], found \[2, 12\]"),
    "transposed": (tensors(lambda t: t.update({B: t[B].t().contiguous()})), r"shape \[20, 4\], found \[4, 20\]"),
    "one dimension": (tensors(lambda t: t.update({A: t[A].flatten()})), r"must have shape \[4, 12\], found \[48\]"),
    "half of a pair": (tensors(lambda t: t.pop(B)), "1 tensors are missing: base_model.model.body.0.q.lora_B"),
    "a module missing": (tensors(lambda t: (t.pop(A), t.pop(B))), "2 tensors are missing"),
    "a base weight": (
        tensors(lambda t: t.update({"base_model.model.head.weight": torch.ones(5, 12)})),
        "1 tensors do not belong to this adapter: 'base_model.model.head.weight'",
    ),
    "a key with another prefix": (tensors(lambda t: t.update({"../../x": t[A].clone()})), "do not belong"),
    "NaN": (poison(float("nan"), 3), "q.lora_B.weight has 3 of 80 values that are not finite"),
    "infinity": (poison(float("-inf"), 1), "q.lora_B.weight has 1 of 80 values that are not finite"),
    "another r": (lambda d: edit(d, r=8), r"must have shape \[8, 12\], found \[4, 12\]|r is 8"),
    "more targets": (lambda d: edit(d, target_modules=["q", "o", "head"]), "2 tensors are missing|no adapter at head"),
    "fewer targets": (lambda d: edit(d, target_modules=["q"]), "do not belong|also has one at body.0.o"),
    "no target": (lambda d: edit(d, target_modules=["k"]), r"target_modules=\['k'\] selects no module"),
    "a norm as target": (lambda d: edit(d, target_modules=["q", "norm"]), "LayerNorm|has no adapter"),
    "bias": (lambda d: edit(d, bias="all"), "tensors are missing: .*bias|bias is all"),
    "dora": (lambda d: edit(d, use_dora=True), "lora_magnitude_vector|use_dora is True"),
    "a module to save": (
        lambda d: edit(d, modules_to_save=["head"]),
        "missing: base_model.model.head.bias|modules_to_save is {'head'}",
    ),
    "a rank of text": (lambda d: edit(d, r="4"), "adapter_config.json: LoraConfig: r must be an integer"),
    "a huge rank": (lambda d: edit(d, r=10_000_000), "r must be in"),
    "another method": (lambda d: edit(d, peft_type="IA3"), "peft_type must be 'LORA'"),
    "layer_replication": (lambda d: edit(d, layer_replication=[[0, 2]]), "layer_replication"),
    "megatron": (lambda d: edit(d, megatron_config={"a": 1}), "megatron_config"),
    "pissa": (lambda d: edit(d, init_lora_weights="pissa", r=8), "init_lora_weights='pissa' means|r is 8"),
    "a pattern that hangs": (lambda d: edit(d, target_modules="(.*)*(?=(?=.*)*.*)*" * 9 + "!"), "target_modules="),
}


@pytest.mark.parametrize("into_layers", [False, True], ids=["plain", "injected"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_and_changes_nothing(case, into_layers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "adapter"
    save_adapter(injected(LORA), folder)
    change, says = BAD[case]
    change(folder)
    model = injected({**LORA, "lora_dropout": 0.1}).train() if into_layers else net()
    unchanged = Snapshot(model)
    with pytest.raises(AdapterError, match=says) as caught:
        load_adapter(model, folder)
    unchanged.check(model)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 800
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("change", [{"lora_alpha": 7}, {"use_rslora": True}, {"rank_pattern": {"o": 4}, "r": 5}])
def test_weights_are_not_loaded_under_another_scale(change, tmp_path):
    save_adapter(injected(LORA), tmp_path)
    edit(tmp_path, **change)
    model = injected(LORA)
    unchanged = Snapshot(model)
    with pytest.raises(AdapterError, match=r"(lora_alpha|use_rslora|r) is \w+ for body\.0\.q, in the model it is"):
        load_adapter(model, tmp_path)
    unchanged.check(model)


def test_a_value_that_overflows_the_dtype_of_the_model_is_refused(tmp_path):
    save_adapter(injected(LORA), tmp_path)
    poison(1e30, 2)(tmp_path)
    model = injected(LORA).half()
    unchanged = Snapshot(model)
    with pytest.raises(AdapterError, match=r"as torch\.float16: .*lora_B\.weight has 2 of 80 values"):
        load_adapter(model, tmp_path)
    unchanged.check(model)


@pytest.mark.parametrize("more", [{"bias": "all"}, {"modules_to_save": ["head"]}], ids=str)
def test_what_the_model_was_not_prepared_for_is_not_loaded_into_its_base(more, tmp_path):
    save_adapter(injected({**LORA, **more}), tmp_path)
    model = injected(LORA)
    unchanged = Snapshot(model)
    with pytest.raises(AdapterError, match=r"(bias is all|modules_to_save is {'head'}), in the model it is [nN]one"):
        load_adapter(model, tmp_path)
    unchanged.check(model)


def test_a_merged_model_is_refused(tmp_path):
    model = injected(LORA)
    save_adapter(model, tmp_path)
    model.body[1]["o"].merge()
    unchanged = Snapshot(model)
    with pytest.raises(AdapterError, match=r"call unmerge\(\) first for body\.1\.o"):
        load_adapter(model, tmp_path)
    unchanged.check(model)
    model.body[1]["o"].unmerge()
    load_adapter(model, tmp_path)


@pytest.mark.parametrize("where", ["nowhere", "a/file", "org/model"])
def test_only_a_local_directory_is_read(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("a")
    (tmp_path / "a" / "file").write_text("")
    with pytest.raises(AdapterError, match=r"is not a directory .*never downloaded"):
        load_adapter(net(), where)


def test_pefts_model_is_refused(tmp_path):
    save_adapter(injected(LORA), tmp_path)
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**LORA))
    with pytest.raises(AdapterError, match="fuse"):
        load_adapter(theirs, tmp_path)
    with pytest.raises(AdapterError, match="fuse"):
        save_adapter(theirs, tmp_path)


@pytest.mark.parametrize("values", [{}, {"use_dora": True}, {"modules_to_save": ["head"], "bias": "all"}], ids=str)
def test_a_failure_while_building_is_undone(values, tmp_path, monkeypatch):
    save_adapter(injected({**LORA, **values}), tmp_path)
    model = net().train()
    model.head.weight.requires_grad_(False)
    unchanged = Snapshot(model)
    layer = DoRALinear if values.get("use_dora") else LoRALinear
    original, calls = layer.from_linear.__func__, []

    def second_fails(cls, linear, **options):
        calls.append(linear)
        if len(calls) == 2:
            raise MemoryError("out of memory")
        return original(cls, linear, **options)

    monkeypatch.setattr(layer, "from_linear", classmethod(second_fails))
    with pytest.raises(MemoryError):
        load_adapter(model, tmp_path)
    assert len(calls) == 2
    unchanged.check(model)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(data=st.data())
def test_a_damaged_file_is_refused_or_loads_finite_weights(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    if not folder.exists():
        save_adapter(injected({**LORA, "bias": "all", "use_dora": True}), folder)
        (folder / "good").write_bytes((folder / WEIGHTS).read_bytes())
    good = (folder / "good").read_bytes()
    damaged = bytearray(good)
    start = 8 + struct.unpack("<Q", good[:8])[0]
    places = st.one_of(st.integers(0, 7), st.integers(8, start - 1), st.integers(start, len(good) - 1))
    for _ in range(data.draw(st.integers(1, 3))):
        place = min(data.draw(places), len(damaged))
        new = data.draw(st.one_of(st.binary(min_size=1, max_size=4), st.sampled_from([b'"', b"0", b"9", b"\x7f\x80"])))
        match data.draw(st.sampled_from(["flip", "insert", "cut", "end"])):
            case "flip":
                damaged[place : place + len(new)] = new
            case "insert":
                damaged[place:place] = new
            case "cut":
                del damaged[place : place + len(new)]
            case "end":
                del damaged[place:]
    (folder / WEIGHTS).write_bytes(damaged)
    model = net()
    unchanged = Snapshot(model)
    try:
        load_adapter(model, folder)
    except AdapterError as error:
        assert str(folder / WEIGHTS) in str(error)
        unchanged.check(model)
    else:
        assert all(p.isfinite().all() for p in model.parameters())
