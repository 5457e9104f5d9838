"""Files of before transformers 5, when each expert had layers of its own: as PEFT reads them."""

import json

import peft
import pytest
import torch
from safetensors.torch import save_file

from lora_kernels import merge_and_unload
from lora_kernels.adapters import AdapterError, LoraConfig, inject_adapter, load_adapter, save_adapter
from tests.adapters.test_expert_adapters import tiny, trained
from tests.adapters.test_files import CONFIG, WEIGHTS, Snapshot

OLD = {
    "Mixtral": ("block_sparse_moe", {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}),
    "Qwen3Moe": ("mlp", {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}),
}


def of_before(kind, folder, r=3, use_dora=False):
    """Files as PEFT wrote them when each expert had layers of its own."""
    block, parameters = OLD[kind]
    names = [name for parts in parameters.values() for name in parts]
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 6, "target_modules": [*names, "q_proj"], "use_dora": use_dora}
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    experts, tensors = tiny(kind).model.layers[0].mlp.experts, {}
    shapes = {f"{block}.experts.{e}.{name}": (len(parts), experts.get_parameter(p).shape[1:]) for p, parts in parameters.items()
              for name in parts for e in range(4)} | {"self_attn.q_proj": (1, (32, 32))}  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    for name, (count, (n_out, n_in)) in shapes.items():
        sizes = {"lora_A.weight": (r, n_in), "lora_B.weight": (n_out // count, r)}
        sizes |= {"lora_magnitude_vector": (n_out // count,)} if use_dora else {}
        for key, shape in sizes.items():
            tensors[f"base_model.model.model.layers.0.{name}.{key}"] = torch.randn(shape, generator=generator)
    save_file(tensors, folder / WEIGHTS)
    return tensors


@pytest.mark.parametrize("kind", OLD)
def test_files_with_a_layer_for_each_expert(kind, tmp_path):
    of_before(kind, tmp_path / "old")
    theirs = peft.PeftModel.from_pretrained(tiny(kind), str(tmp_path / "old")).eval()
    ids = torch.arange(18).reshape(2, 9)
    plain = tiny(kind)
    load_adapter(plain, tmp_path / "old")
    # into layers that hold another adapter
    layered = tiny(kind)
    config = LoraConfig.from_pretrained(tmp_path / "old")
    assert inject_adapter(layered, config) and config.target_parameters is None
    trained(layered)
    load_adapter(layered, tmp_path / "old")
    for ours in (plain, layered):
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
        assert ours.model.layers[0].mlp.experts.scaling == {"gate_up_proj": 2.0, "down_proj": 2.0}
    save_adapter(plain, tmp_path / "new")
    back = peft.PeftModel.from_pretrained(tiny(kind), str(tmp_path / "new")).eval()
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, theirs(ids).logits)


def test_dora_of_a_layer_for_each_expert(tmp_path):
    """PEFT has no DoRA on fused experts; each row's norm is that of the layer of before."""
    tensors = of_before("Qwen3Moe", tmp_path, use_dora=True)
    ours = tiny("Qwen3Moe")
    base = tiny("Qwen3Moe").model.layers[0].mlp.experts
    load_adapter(ours, tmp_path)
    merge_and_unload(ours)
    for e in range(4):
        merged = ours.model.layers[0].mlp.experts.gate_up_proj[e]
        for part, name in enumerate(("gate_proj", "up_proj")):
            a, b, m = (tensors[f"base_model.model.model.layers.0.mlp.experts.{e}.{name}.lora_{kind}"].double()
                       for kind in ("A.weight", "B.weight", "magnitude_vector"))  # fmt: skip
            sums = base.gate_up_proj[e].chunk(2)[part] + 2 * b @ a
            torch.testing.assert_close(merged.chunk(2)[part], m[:, None] * sums / sums.norm(dim=1, keepdim=True))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"target_modules": ["gate_proj"]}, "gate_proj needs up_proj beside it: they are one gate_up_proj now"),
        ({"target_modules": ["gate_proj", "up_proj"], "use_rslora": True}, "use_rslora over gate_proj, up_proj"),
        ({"target_modules": ["gate"]}, "gate.weight: the forward of Qwen3MoeTopKRouter is not known"),
        ({"target_modules": ["gate_proj", "up_proj"], "lora_dropout": 0.1}, "lora_dropout must be 0 with target_parameters"),
    ],
)
def test_layers_of_before_that_have_no_place(values, says):
    model = tiny("Qwen3Moe")
    unchanged = Snapshot(model)
    with pytest.raises(AdapterError, match=says):
        inject_adapter(model, LoraConfig(**values))
    unchanged.check(model)
