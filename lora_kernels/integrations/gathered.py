"""Weights that a layer's call will find and that are elsewhere until then: sharded or offloaded.

`fuse` may come after `fully_shard`, FSDP, ZeRO-3 or accelerate's offloading. Its report then asks
with empty tensors of the shape, dtype and device that the call will see.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

StandIns = Mapping[nn.Module, Mapping[str, Callable[[], Tensor]]]


def gathered_weights(model: nn.Module) -> StandIns:
    """For each module some of whose parameters are elsewhere, by their names, what makes a tensor
    as its call will find."""
    found: dict[nn.Module, dict[str, Callable[[], Tensor]]] = {}

    def add(module: nn.Module, name: str, shape: Any, dtype: torch.dtype, device: Any, learns: bool) -> None:
        found.setdefault(module, {})[name] = lambda: nn.Parameter(torch.empty(shape, dtype=dtype, device=device), learns)

    for module in model.modules():
        _add_fsdp2(module, add)
        _add_fsdp1(module, add)
        _add_offloaded(module, add)
        for name, p in module._parameters.items():
            if p is not None and hasattr(p, "ds_shape"):
                add(module, name, p.ds_shape, p.dtype, p.device, p.requires_grad)
    return found


@contextmanager
def as_called(layer: nn.Module, stand_ins: StandIns) -> Iterator[None]:
    """Inside it the layer's modules have the parameters that its call will find; nothing may be
    computed with them."""
    held = [(m, dict(m._parameters)) for m in layer.modules() if m in stand_ins]
    for module, _ in held:
        module._parameters.update({name: make() for name, make in stand_ins[module].items()})  # type: ignore[misc]
    try:
        yield
    finally:
        for module, parameters in held:
            module._parameters.clear()
            module._parameters.update(parameters)


def _add_fsdp2(module: Any, add: Callable[..., None]) -> None:
    if not any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
        return
    state = module._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    for each in [each for group in groups if group is not None for each in group.fsdp_params]:
        if each.is_dtensor:  # it stays one of tensor parallelism
            continue
        p, info, shape = each.sharded_param, each._module_info, each._orig_size
        dtype = state._mp_policy.param_dtype if p.is_floating_point() else None
        names = (info.param_name, *info.shared_param_names)
        for owner, name in zip((info.module, *info.shared_modules), names, strict=True):
            add(owner, name, shape, dtype or p.dtype, each.device, p.requires_grad)


def _add_fsdp1(module: Any, add: Callable[..., None]) -> None:
    handle = getattr(module, "_handle", None) if type(module).__name__ == "FullyShardedDataParallel" else None
    if handle is None:
        return
    flat = handle.flat_param
    for i, (info, shape) in enumerate(zip(flat._param_infos, flat._shapes, strict=True)):
        learns = flat._params[i].requires_grad if handle._use_orig_params else flat.requires_grad
        dtype = handle._fwd_bwd_param_dtype or handle._orig_param_dtype
        add(info.module, info.param_name, shape, dtype, handle.device, learns)


def _add_offloaded(module: Any, add: Callable[..., None]) -> None:
    hook: Any = vars(module).get("_hf_hook")
    for each in getattr(hook, "hooks", [hook]):
        if getattr(each, "offload", False) and each.execution_device is not None:
            for name, p in module._parameters.items():
                if p is not None:
                    add(module, name, p.shape, p.dtype, execution_device(each), p.requires_grad)


def execution_device(hook: Any, accelerator: str = "cuda") -> torch.device:
    """Where an AlignDevicesHook runs its module, with an index if the device has one."""
    device = hook.execution_device
    device = torch.device(accelerator, device) if isinstance(device, int) else torch.device(device)
    index: int | None = device.index  # torch's stubs know no device without
    if index is None and device.type not in ("cpu", "meta"):
        device = torch.device(device.type, torch.get_device_module(device).current_device())
    return device
