"""vLLM's LoRA layers on `multi_lora`, as a plugin: `pip install lora_kernels` beside vLLM is all,
vLLM finds `register`.

What changes: DoRA and lora_bias are served, beside LoRA, rsLoRA and patterns and mixed with them
and with base requests; an adapter is read as far as it has ranks, without padding to max_lora_rank
(for which memory is kept, as in vLLM); an adapter that is damaged or does not fit fails the request
that names it first, with the reason, before the engine has it in a batch. Each of vLLM's linear
layers keeps its base product, quantised or not, and `multi_lora_add_` corrects it in place. Shards
(tensor parallelism) follow vLLM's: see `layers`.

On the CPU, where vLLM's LoRA over a mixture of experts ends the engine, adapters on attention, the
router and the experts are served: see `experts`.

What does not: scheduling, the API, adapters on embeddings and the head, on experts on GPUs, and on
column and row parallel layers under fully_sharded_loras, which stay vLLM's own; DoRA or lora_bias
there is refused in words. `LORA_KERNELS_VLLM=0`, or VLLM_PLUGINS without our name, leaves vLLM as
it is.
"""

import logging
import os

TESTED = ("0.32",)
"""Versions of vLLM that the tests run."""

log = logging.getLogger("vllm.lora_kernels")  # vLLM shows what is said under its own name
_registered = False


def register() -> None:
    """Entry point `vllm.general_plugins`; vLLM calls it in each of its processes. A vLLM that is
    not one that we know stays as it is, and the log says why."""
    global _registered
    if _registered:
        return
    if os.environ.get("LORA_KERNELS_VLLM", "1") == "0":
        log.info("lora_kernels: LORA_KERNELS_VLLM=0, so vLLM's own LoRA layers run")
        return
    import vllm

    try:
        from lora_kernels.integrations.vllm import hooks

        hooks.check_vllm()
    except (ImportError, AttributeError, TypeError) as error:
        log.warning(
            "lora_kernels: vLLM %s is not supported (tested: %s), its own LoRA layers run: %s", vllm.__version__,
            ", ".join(TESTED), error,
        )  # fmt: skip
        return
    if not vllm.__version__.startswith(TESTED):
        log.warning("lora_kernels: vLLM %s has what the plugin needs; tested are %s", vllm.__version__, ", ".join(TESTED))
    hooks.install_hooks()
    _registered = True
