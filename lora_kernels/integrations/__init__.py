"""Models of other libraries on our kernels. PEFT is imported only once a model may hold its
layers."""

import sys
from importlib.util import find_spec
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from lora_kernels.integrations.gathered import as_called, gathered_weights
from lora_kernels.integrations.report import FuseReport, Survey
from lora_kernels.integrations.warm_up import warm_up
from lora_kernels.nn import DoRALinear, LoRAEmbedding, LoRAExperts, LoRALinear
from lora_kernels.nn.passed_over import fast_paths, is_off_fast_path, leave_fast_path, reader_of, restore_fast_path

__all__ = ["FuseReport", "fuse", "refresh", "unfuse", "warm_up"]


_OURS = (LoRALinear, LoRAEmbedding, LoRAExperts)


def fuse(model: nn.Module, *, strict: bool = False, groups: bool = True) -> FuseReport:
    """Runs the LoRA layers of a PEFT model on our kernels, in place, and reports on every layer.

    Each peft.tuners.lora.layer.Linear, over nn.Linear or GPT-2's Conv1D, becomes a subclass that
    overrides `forward` alone. Parameters, names, hooks and PEFT's methods stay. Each call looks at
    the state it finds. LoRA, rsLoRA and DoRA adapters run on the kernels, one or several active,
    also with dropout, bias, lora_bias, autocast, or in another dtype than the base. Anything else
    runs in PEFT's own forward: merged or disabled adapters, hooks on the inner modules that do more
    than move their weights, other variants. `adapter_names` may name DoRA adapters, too, and
    aLoRA's tokens have theirs from the invocation on. The output has PEFT's dtype; dropout masks
    are drawn by us.

    On the CPU so does PEFT's layer over a 4-bit or 8-bit linear layer of bitsandbytes, in the
    base's compute dtype; W is read as codes, and of 8 bits x is not rounded.

    PEFT's Embedding and Conv1d, Conv2d, Conv3d become such subclasses, too. They run on torch's ops
    with fewer passes over the output, and keep DoRA's norm as the linear layers do. A LoRA head
    over `trainable_token_indices` runs without the copy of W. The projections of PEFT's
    MultiheadAttention run on the kernels, W + sBA is not formed, and torch attends between them.
    So does its ParamWrapper (`target_parameters`): over experts of transformers 5, Llama 4's and a
    matrix of nn.Linear, x goes through W, A and B, and no W + scale · BA is formed.

    Adapters added later to a fused layer are covered too. Modules that become LoRA layers later are
    PEFT's until `fuse` is called again; calling it twice does no harm. Layers of lora_kernels.nn
    are reported as fused. All or nothing: if anything raises, the model is as it was.

    A layer of which another module takes the weight without calling it has no effect there, in PEFT
    either. nn.TransformerEncoder(Layer) does so in eval mode, and is kept off that path until
    `unfuse`. Of others (Mamba's and WavLM's fused kernels) the report says so under `left`.

    Layers of one module that get the same tensor one after another (q, k and v; gate and up) become
    a group after two such calls of the module, on a GPU; on the CPU one op for all is not faster.
    The first layer's call then computes all of them. What is unlike the calls before runs alone. A
    module with a group gets two hooks, which drop what nobody called for. `report.groups()` names
    the groups, `report.alone()` counts what ran alone and why, and `groups=False` forms none.

    DoRA's gain is kept between calls that cannot have changed it. An edit of the base weight
    through `.data`, or through numpy, may not be seen: call `refresh(model)` after it.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: the model has no LoRA layers, or `strict` and PEFT's own forward would run at
            least one.
        ImportError: the model has no layers of lora_kernels.nn and PEFT is not installed.
    """
    _check_module("fuse", model)
    survey = Survey()
    _ask_about_ours(model, survey)
    peft = _peft_module()
    layers = peft.lora_layers(model) if peft else {}
    if peft:
        peft.survey_layers(model, layers, survey)
    for name in [*survey.fused, *survey.left]:
        if reader := reader_of(model, name):
            survey.fused.pop(name, None)
            survey.slow.pop(name, None)
            survey.left[name] = f"{reader} may compute with its weight without calling the layer"
    if not survey.fused and not survey.left:
        raise _no_layers()
    within = {*layers.values(), *(module for module in model.modules() if isinstance(module, _OURS))}
    if strict and survey.left:
        name, reason = next(iter(survey.left.items()))
        raise ValueError(
            "fuse: strict wants every LoRA layer on our kernels, found"
            f" {len(survey.left)} of {len(survey.left) + len(survey.fused)} left to PEFT; {name}: {reason}"
        )
    encoders = fast_paths(model, lambda module: module in within)
    changed = [encoder for encoder in encoders.values() if not is_off_fast_path(encoder)]
    try:
        for encoder in changed:
            leave_fast_path(encoder)
        if peft:
            peft.fuse_classes(layer for layer in layers.values() if peft.class_refusal(layer) is None)
    except BaseException:
        for encoder in changed:
            restore_fast_path(encoder)
        raise
    watched, siblings = WeakValueDictionary(layers), WeakValueDictionary[str, Any]()
    if peft and groups:
        siblings.update(peft.watch_siblings(model))
    elif peft:
        peft.forget_siblings(model)
    return FuseReport(
        survey.fused,
        survey.left,
        survey.slow,
        lambda: {name: counts for name, layer in watched.items() if (counts := peft.fallbacks(layer))},
        {name: f"{type(encoder).__name__} takes weights without calling the layers" for name, encoder in encoders.items()},
        lambda: {name: found for name, each in siblings.items() if (found := each.groups())},
        lambda: {name: counts for name, each in siblings.items() if (counts := each.alone())},
    )


def unfuse(model: nn.Module) -> None:
    """Gives every layer that `fuse` changed PEFT's own class back; does nothing where there is
    none.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: a fused layer's class was changed again since (fully_shard and parametrize do);
            undo that first.
    """
    _check_module("unfuse", model)
    peft = _peft_module()
    fused = {n: m for n, m in model.named_modules() if isinstance(m, peft.FUSED)} if peft else {}
    for name, layer in fused.items():
        if type(layer) not in peft.FUSED:
            wanted = next(cls.__name__ for cls in peft.FUSED if isinstance(layer, cls))
            raise ValueError(f"unfuse: {name} must be a {wanted}, found its subclass {type(layer).__name__}")
    if fused:
        peft.restore_classes(fused.values())
        peft.forget_siblings(model)
    for encoder in fast_paths(model, lambda _: True).values():
        # layers of lora_kernels.nn stay, and their encoders stay where they are right
        if not any(isinstance(module, _OURS) for module in encoder.modules()):
            restore_fast_path(encoder)


def refresh(model: nn.Module) -> None:
    """Forgets what is kept of DoRA layers, fused or of lora_kernels.nn: the next call computes ‖W‖
    and the gain anew.

        model.get_submodule("layers.0.q_proj").base_layer.weight.data[3] = row
        refresh(model)

    Wanted only after an edit of a base weight through `.data`, or through memory that it shares
    with numpy, of which torch tells nobody. The gain is kept under a sample of W, about 64 elements
    a matrix, beside its address and version. Edits of adapters, optimizers' steps, `copy_`,
    load_state_dict and moves are seen without it.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    _check_module("refresh", model)
    peft = _peft_module()
    for module in model.modules():
        if isinstance(module, DoRALinear):
            module._norm.clear()
        elif isinstance(module, LoRAExperts):
            module._clear_norms()
        elif peft and isinstance(module, peft.FUSED):
            peft.forget(module)


def _check_module(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, found {type(model).__name__}")


def _peft_module() -> Any:
    """Our PEFT half; None while nobody has imported PEFT, for then no model can hold its layers."""
    if "peft" not in sys.modules:
        return None
    from lora_kernels.integrations import peft

    return peft


def _ask_about_ours(model: nn.Module, survey: Survey) -> None:
    stand_ins = gathered_weights(model)
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            with as_called(layer, stand_ins):
                state = (layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling, layer.lora_dropout)
                survey.add_layer(name, *state, isinstance(layer, DoRALinear))
        elif isinstance(layer, LoRAEmbedding):
            survey.fused[name] = "torch"
        elif isinstance(layer, LoRAExperts):
            for parameter in layer.adapted:
                adapted = layer._adapted_matrix(parameter, layer._weight_in(parameter))
                survey.add_experts(name, adapted.w, adapted.bias, adapted.a, adapted.b, adapted.scale, layer._transposed)


def _no_layers() -> Exception:
    if find_spec("peft") is None:
        return ImportError(
            "fuse: the model has no layers of lora_kernels.nn, and peft, whose LoRA layers fuse takes over, is not"
            " installed; pip install peft"
        )
    return ValueError("fuse: model must have LoRA layers, of PEFT (peft.get_peft_model) or lora_kernels.nn, found none")
