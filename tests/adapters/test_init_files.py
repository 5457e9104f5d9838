"""Files of adapters whose first values were taken out of the base weight: read on the base that
they belong to, or refused."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from torch import nn

from lora_kernels.adapters import AdapterError, LoraConfig, inject_adapter, load_adapter, save_adapter
from lora_kernels.nn import LoRALinear

CHANGED = ["pissa", "olora", "pissa_niter_4"]
SCALES = {
    "plain": {"lora_alpha": 16},
    "rslora": {"lora_alpha": 5, "use_rslora": True},
    "patterns": {"rank_pattern": {"2": 2}, "alpha_pattern": {"0": 12}, "use_rslora": True},
    "dora": {"use_dora": True},
}
X = torch.linspace(-1, 1, 60).reshape(5, 12)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8))


def injected(init, seed=5, **more):
    model = net()
    torch.manual_seed(seed)
    inject_adapter(model, LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=init, **more))
    return model


def trained(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def relative(one, other):
    with torch.no_grad():
        return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("scale", SCALES)
def test_a_drawn_start_is_saved_as_plain_lora_for_the_plain_base(scale, tmp_path):
    model = trained(injected("pissa_niter_4", **SCALES[scale]))
    assert relative(model(X), net()(X)) > 0.02
    save_adapter(model, tmp_path)
    plain = net()
    load_adapter(plain, tmp_path)
    assert relative(plain(X), model(X)) < 2e-6
    assert relative(peft.PeftModel.from_pretrained(net(), str(tmp_path))(X), model(X)) < 2e-6
    layered = net()
    torch.manual_seed(99)
    inject_adapter(layered, LoraConfig.from_pretrained(tmp_path))
    load_adapter(layered, tmp_path)
    assert relative(layered(X), model(X)) < 2e-6
    assert plain[0].scaling == pytest.approx(model[0].scaling, rel=1e-12)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 6


def test_a_drawn_start_beside_an_embedding_is_padded(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 10))

    model = net()
    inject_adapter(model, LoraConfig(r=3, target_modules=["0", "1"], init_lora_weights="pissa_niter_2"))
    trained(model)
    save_adapter(model, tmp_path)
    plain, ids = net(), torch.arange(9)
    load_adapter(plain, tmp_path)
    assert relative(plain(ids), model(ids)) < 2e-6


@pytest.mark.parametrize("init", CHANGED)
def test_a_state_dict_goes_on_where_it_was(init, tmp_path):
    model = trained(injected(init))
    other = injected(init, seed=99)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))
    save_adapter(other, tmp_path)
    plain = net() if "niter" in init else injected(init, seed=7)
    load_adapter(plain, tmp_path)
    assert relative(plain(X), model(X)) < 1e-5


SCRIPT = """
import sys, torch
from torch import nn
from lora_kernels.adapters import LoraConfig, inject_adapter, load_adapter
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8))
config = LoraConfig.from_pretrained(sys.argv[1])
if config.init_lora_weights is not True:
    inject_adapter(model, config)
load_adapter(model, sys.argv[1])
torch.save(model(torch.linspace(-1, 1, 60).reshape(5, 12)).detach(), sys.argv[2])
"""


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_another_process_reads_the_same_weights(init, tmp_path):
    model = trained(injected(init))
    save_adapter(model, tmp_path / "adapter")
    subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "adapter", tmp_path / "y"], check=True, timeout=120)
    assert relative(torch.load(tmp_path / "y"), model(X)) < 1e-5


@pytest.mark.parametrize("into", [True, *CHANGED])
@pytest.mark.parametrize("of", [True, *CHANGED])
def test_a_file_of_one_kind_is_not_taken_by_layers_of_another(of, into, tmp_path):
    save_adapter(trained(injected(of)), tmp_path)
    model = trained(injected(into, seed=5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if of == into and into != "pissa_niter_4":
        load_adapter(model, tmp_path)
        return
    with pytest.raises(AdapterError, match=r"init_lora_weights is|r is 6 for 0, in the model it is 3|belong to no file"):
        load_adapter(model, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("into", ["base", "layers"])
def test_a_drawn_file_of_peft_is_refused_with_the_way_that_works(into, tmp_path):
    torch.manual_seed(5)
    theirs = peft.get_peft_model(
        net(), peft.LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights="pissa_niter_4")
    )
    theirs.save_pretrained(tmp_path / "start")
    trained(theirs)
    theirs.save_pretrained(tmp_path / "drawn")
    model = net() if into == "base" else injected(True)
    with pytest.raises(AdapterError, match="draws random numbers, .*path_initial_model_for_weight_conversion"):
        load_adapter(model, tmp_path / "drawn")
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    other = net()
    load_adapter(other, tmp_path / "converted")
    assert relative(other(X), peft.PeftModel.from_pretrained(net(), str(tmp_path / "converted"))(X)) < 2e-6


def test_a_configuration_that_says_another_start_is_not_saved(tmp_path):
    model = net().requires_grad_(False)
    model[0] = LoRALinear.from_linear(model[0], r=2, init_lora_weights="pissa")
    with pytest.raises(AdapterError, match="init_lora_weights is plain for 0, in the model it is pissa"):
        save_adapter(model, tmp_path, LoraConfig(target_modules=["0"], r=2))
    save_adapter(model, tmp_path, LoraConfig(target_modules=["0"], r=2, init_lora_weights="pissa"))
