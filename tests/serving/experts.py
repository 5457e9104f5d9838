"""Small mixtures of experts, adapters of their experts by PEFT, and pools for all of it."""

import copy

import peft
import torch
import transformers
from torch import nn

from lora_kernels.serving import Adapter, AdapterPool, Factors, serve, unserve
from tests.integrations.fuse_helpers import VOCABULARY
from tests.serving.served import randomised

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 64, "eos_token_id": None}  # fmt: skip
MODELS = {
    "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig,
                {"intermediate_size": 20, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3": (transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig,
              {"moe_intermediate_size": 12, "intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3,
               "head_dim": 16, "mlp_only_layers": [1]}),
    "gpt_oss": (transformers.GptOssForCausalLM, transformers.GptOssConfig,
                {"intermediate_size": 20, "num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 16}),
}  # fmt: skip
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
KINDS = {
    "experts": {"r": 5, "lora_alpha": 7, "target_modules": [], "target_parameters": BOTH},
    "all": {
        "r": 9, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj"], "target_parameters": BOTH,
        "rank_pattern": {"experts.down_proj": 3}, "alpha_pattern": {"experts.gate_up_proj": 6},
    },
    "down": {"r": 3, "lora_alpha": 9, "target_modules": [], "target_parameters": ["experts.down_proj"]},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["q_proj", "o_proj"]},
}  # fmt: skip


def base(kind, dtype=torch.float32, implementation="eager", layers=2):
    cls, config, values = MODELS[kind]
    torch.manual_seed(0)
    model = cls(config(**SMALL | {"num_hidden_layers": layers}, **values)).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if "experts" in name or name.endswith(("gate.weight", "router.weight")):
            nn.init.normal_(p, std=0.3)
    model.set_experts_implementation(implementation)
    return model.to(dtype)


def trained(model, kind, seed=1):
    """A PEFT model over a copy, with a random adapter of a kind."""
    with torch.random.fork_rng():
        made = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**KINDS[kind])).eval()
    return randomised(made, kind, seed)


def modules_of(model):
    """All linear layers and all experts."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) or name.endswith(".experts")]


def pool_of(model, **options):
    return AdapterPool(model, **{"capacity_bytes": 8 << 20, "slots": 6, "max_rank": 16, "modules": modules_of(model)} | options)


def served(model, folder, kinds=KINDS, **options):
    """(the model served, its pool, PEFT's models in float64)."""
    exact = {None: copy.deepcopy(model).double()}
    pool = pool_of(model, **options)
    for kind in kinds:
        of = trained(model, kind)
        of.save_pretrained(folder / kind)
        pool.load(kind, folder / kind)
        exact[kind] = of.double()
    return serve(model, pool), pool, exact


def assert_rows(logits, names, exact, x, rtol=1e-4):
    """Each row is what PEFT computes of its sequence alone, in float64."""
    for i, name in enumerate(names):
        wanted = exact[name](x[i : i + 1]).logits[0]
        error = float((logits[i].double() - wanted).norm() / wanted.norm())
        assert error <= rtol, f"row {i} of {names}: {error}"


def random_adapter(pool, seed=0, r=4, dora=False, size=0.3, modules=BOTH):
    draw = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(shape, generator=draw) * size  # noqa: E731
    factors = {}
    for name, site in pool.sites.items():
        if name.endswith(tuple(modules)):
            count, n_out, n_in = site.shape
            magnitude = new(count, n_out).abs() + 0.5 if dora else None
            factors[name] = Factors(new(count, r, n_in), new(count, n_out, r), 1.5, magnitude)
    return Adapter(factors)


def with_adapter(model, adapter):
    """The model in float64 with an adapter of experts in its weights, expert by expert."""
    exact = copy.deepcopy(model).double()
    for name, f in adapter.factors.items():
        w = exact.get_parameter(name).data
        for e in range(len(w)):
            adapted = w[e] + f.scale * f.b[e].double() @ f.a[e].double()
            gain = 1 if f.magnitude is None else f.magnitude[e].double() / adapted.norm(dim=1)
            w[e] = adapted if f.magnitude is None else gain[:, None] * adapted
    return exact


def unserved(model):
    """A copy that serves nobody."""
    return unserve(copy.deepcopy(model))
