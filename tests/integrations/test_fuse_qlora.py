"""Models over quantised layers as QLoRA scripts make, shard and train them."""

import peft
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lora_kernels import fuse
from tests.integrations.fuse_helpers import VOCABULARY, fused_copy, gradients, losses, tokens

pytest.importorskip("bitsandbytes")
from tests.integrations.bitsandbytes_helpers import inputs, model

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


def trained_llama(folder, kind, compute, reentrant, **lora):
    """As a QLoRA script makes it."""
    config = BitsAndBytesConfig(
        load_in_8bit=kind == "int8", load_in_4bit=kind != "int8", bnb_4bit_quant_type="nf4" if kind == "int8" else kind,
        bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute,
    )  # fmt: skip
    base = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu", dtype=compute)
    base = peft.prepare_model_for_kbit_training(
        base, use_gradient_checkpointing=reentrant is not None, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    base.enable_input_require_grads()
    torch.manual_seed(1)
    made = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **lora))
    return made.train()


@pytest.mark.parametrize(
    "kind,compute,reentrant,dora",
    [("nf4", F32, False, False), ("nf4", F32, True, True), ("fp4", BF16, None, False), ("int8", F32, True, False)],
)
def test_losses_of_a_quantised_llama(saved_llama, kind, compute, reentrant, dora):
    stock, fused = (trained_llama(saved_llama, kind, compute, reentrant, use_dora=dora) for _ in range(2))
    report = fuse(fused)
    assert len(report.fused) == 14 and not report.left
    wanted, found = losses(stock), losses(fused)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-3 if compute is BF16 else 1e-5, atol=0)
    assert found[2] < found[0] - 0.01 and report.fallbacks() == {}


def test_generation_of_a_quantised_llama(saved_llama):
    """Without gradients, in eval mode, where bitsandbytes would pack the weights."""
    fused = trained_llama(saved_llama, "nf4", F32, None, use_dora=True)
    report = fuse(fused.eval())
    ids = tokens()["input_ids"][:, :4]
    with torch.no_grad():
        wanted = fused(ids).logits[:, -1].argmax(-1)
    found = fused.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(found[:, 4], wanted) and report.fallbacks() == {}


@pytest.mark.parametrize("storage", [torch.uint8, BF16], ids=str)
def test_fully_shard(storage):
    """The gathered parameter has no quant_state; its module has."""
    sharded = model("nf4", BF16, storage=storage)
    wanted = gradients(fused_copy(sharded), inputs())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(sharded.base_model.model, mesh=init_device_mesh("cpu", (1,)))
        report = fuse(sharded)
        assert len(report.fused) == 2
        found = gradients(sharded, inputs())
        for name, value in found.items():
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            assert torch.equal(value, wanted[name]), name
        assert report.fallbacks() == {}
    finally:
        dist.destroy_process_group()
