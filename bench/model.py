"""`python -m bench.model`: a whole Llama-shaped model, random weights, every linear layer adapted:

    base        the model without an adapter
    merged      the adapter merged into a copy of the weights (decoding only)
    peft        PEFT's model
    ours        that after `fuse`

A training step is forward, loss, backward and AdamW over the adapters; base has no adapter to train
and goes back to its input embeddings. Decoding is eager, with a KV cache: one token for each row of
the batch. All but `merged` share one set of weights.

    --models, --kinds, --dtypes, --passes, --batches     choose rows; all if not given
    --seconds S      of each row (20); never under ten rounds
    --quick          a small model alone
    --out FILE       JSON; `python -m bench.model_table FILE` writes README's table from it
"""

import argparse
import copy
import os
from itertools import chain, product
from pathlib import Path

MODELS = {
    # hidden, layers, intermediate, heads, heads of keys and values, vocabulary
    "576 × 30": (576, 30, 1536, 9, 3, 49152),
    "2048 × 4": (2048, 4, 5632, 32, 4, 32000),
    "quick": (128, 2, 256, 4, 2, 500),
}
KINDS, DTYPES, PASSES, BATCHES = ("lora", "dora"), ("float32", "bfloat16"), ("training step", "decode"), (1, 8)
RANK, TRAINED, PROMPT, TOKENS = 16, 512, 32, 4
"""The adapters' rank, the tokens of a training step, those in the cache before a timed call, those
that the call decodes."""


def make_models(size, kind, dtype, merged):
    """The models by name, with one set of weights but for `merged`."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_kernels import fuse

    torch.manual_seed(0)
    hidden, layers, intermediate, heads, kv_heads, vocabulary = MODELS[size]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval().requires_grad_(False)
    wanted = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, use_dora=kind == "dora", target_modules="all-linear")
    stock = peft.get_peft_model(shared_copy(base), wanted)
    for name, parameter in stock.named_parameters():
        if "lora_B" in name:  # zero at first, which no training leaves it
            torch.nn.init.normal_(parameter, std=0.02)
    ours = shared_copy(stock)
    report = fuse(ours)
    if report.left:
        raise SystemExit(f"bench.model: {report}")
    models = {"base": base, "peft": stock, "ours": ours}
    if merged:
        models["merged"] = copy.deepcopy(stock).merge_and_unload()
    return models


def shared_copy(model):
    """A copy with the same frozen tensors and trained ones of its own."""
    shared = chain((p for p in model.parameters() if not p.requires_grad), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def training_calls(models, batch):
    """A training step of each model."""
    import torch

    vocabulary = models["base"].config.vocab_size
    ids = torch.randint(vocabulary, (batch, TRAINED // batch))

    def make_call(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)

        def step():
            inputs = {"input_ids": ids} if trained else {"inputs_embeds": embedded}
            loss = model(**inputs, labels=ids, use_cache=False).loss
            loss.backward()
            if optimizer is None:
                embedded.grad = None
            else:
                optimizer.step()
                optimizer.zero_grad()
            return loss.detach()

        return step

    for model in models.values():
        model.train()
    return {name: make_call(model) for name, model in models.items()}


def decode_calls(models, batch):
    """TOKENS steps of greedy decoding of each model, of which the cache then forgets."""
    import torch
    from transformers import DynamicCache

    vocabulary = models["base"].config.vocab_size
    prompt, ids = torch.randint(vocabulary, (batch, PROMPT)), torch.randint(vocabulary, (TOKENS, batch, 1))

    def make_call(model):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=prompt, past_key_values=cache, use_cache=True)

        def decode():
            with torch.no_grad():
                for each in ids:
                    logits = model(input_ids=each, past_key_values=cache, use_cache=True).logits
            cache.crop(-TOKENS)
            return logits

        return decode

    for model in models.values():
        model.eval()
    return {name: make_call(model) for name, model in models.items()}


def check_equal(calls, dtype):
    """Ours and PEFT's results agree, and the adapter changes something.

    Raises:
        SystemExit: they do not.
    """
    found = {name: call().float() for name, call in calls.items()}
    error, change = ((found[name] - found["peft"]).norm() / found["peft"].norm() for name in ("ours", "base"))
    if error > (1e-3 if dtype == "float32" else 5e-2) or change == 0:
        raise SystemExit(f"bench.model: ours is {error:.2g} from PEFT's result, base {change:.2g}")


def saved_bytes(model, batch):
    """What autograd keeps from the forward of a step for its backward, without the parameters."""
    import torch

    ids = torch.randint(model.config.vocab_size, (batch, TRAINED // batch))
    own = {p.untyped_storage().data_ptr() for p in chain(model.parameters(), model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, of a node's own output, would keep the graph for good

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    del loss
    return sum(size for pointer, size in kept.items() if pointer not in own)


def measure(size, kind, dtype, what, batch, seconds):
    """One row."""
    import torch

    from bench.paired import interleaved_medians, measurement_row

    training = what == "training step"
    models = make_models(size, kind, dtype, not training)
    more = {"saved_bytes": {name: saved_bytes(models[name], batch) for name in ("peft", "ours")}} if training else {}
    calls = (training_calls if training else decode_calls)(models, batch)
    check_equal(calls, dtype)
    taken = interleaved_medians(calls, rounds=101, seconds=seconds)
    taken = {name: value / (1 if training else TOKENS) for name, value in taken.items()}
    row = measurement_row("model", kind, getattr(torch, dtype), {"r": RANK}, taken, what=what, model=size, batch=batch, **more)
    row["ratios"]["peft / base"] = taken["peft"] / taken["base"]
    return row


def print_row(row):
    """One line."""
    name = f"{row['model']} {row['kind']} {row['dtype']} {row['what']} batch {row['batch']}"
    times = "  ".join(f"{key} {value * 1e3:.1f}" for key, value in row["seconds"].items())
    ratios = "  ".join(f"{key} {value:.3f}" for key, value in row["ratios"].items())
    saved = "".join(f"  {key} keeps {size / 2**20:.0f} MiB" for key, size in row.get("saved_bytes", {}).items())
    print(f"{name:50} ms: {times}   {ratios}{saved}", flush=True)


def main() -> None:
    """Prints every ratio; --out writes them with their circumstances."""
    parser = argparse.ArgumentParser(prog="bench.model")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[name for name in MODELS if name != "quick"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    import torch

    from bench.paired import machine_stamp, write_measured

    torch.set_num_threads(options.threads)
    stamp, found = machine_stamp() | {"load": os.getloadavg()[0]}, []
    models = ["quick"] if options.quick else options.models
    for case in product(models, options.kinds, options.dtypes, options.passes, options.batches):
        found.append(measure(*case, 0.0 if options.quick else options.seconds))
        print_row(found[-1])
        if options.out:
            write_measured(options.out, stamp, found)


if __name__ == "__main__":
    main()
