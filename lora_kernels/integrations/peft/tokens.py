"""A LoRA layer over `trainable_token_indices`, as PEFT makes the head that is tied to an embedding.

PEFT writes the trained rows into a copy of W in each call, and its backward makes the gradient of
all of W. Here the kernels take W as it is, and the outputs of the trained tokens are corrected:

    y[:, tokens] += x (trained rows - W[tokens])ᵀ                                                (1)
"""

from typing import Any

import peft
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.integrations.peft.hooks import has_hooks
from lora_kernels.integrations.peft.linear import WAYS, Way, input_refusal
from lora_kernels.integrations.peft.state import ARGUMENTS, PLAIN, read_state, type_name
from lora_kernels.ops import lora_linear

try:
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.utils.other import TrainableTokensWrapper
except ImportError as error:
    raise ImportError(f"lora_kernels cannot fuse the layers of peft {peft.__version__}: {error}") from error

OVER_TOKENS = f"base_layer is {TrainableTokensWrapper.__name__}"  # as `read_state` says


def run_over_tokens(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of a call, or why PEFT must run it."""
    if args or kwargs or torch.compiler.is_compiling():
        return ARGUMENTS if args or kwargs else OVER_TOKENS
    found = _read(layer)
    if type(found) is str:
        return found
    state, trained, indices = found
    if reason := input_refusal(layer, x, state):
        return reason
    w, bias, a, b, scale, dropout, _ = state
    # what is changed in place must be no view, or backward copies its whole gradient
    rows = x.reshape(-1, x.shape[-1])
    y = lora_linear(rows, w, a, b, scale, bias, None, dropout)
    if indices:
        tokens = torch.tensor(indices, device=w.device)
        difference = trained.to(w.dtype) - w[tokens]
        y.index_add_(1, tokens, F.linear(rows, difference.to(x.dtype)).to(y.dtype))
    return y.view(*x.shape[:-1], y.shape[1])


def read_over_tokens(layer: Any) -> Any:
    """The state of the call of `lora_linear`, or a reason."""
    found = _read(layer)
    return found if type(found) is str else found[0]


def _read(layer: Any) -> Any:
    """(the state over W, the trained rows, their tokens), or why PEFT must run the call."""
    wrapper = layer._modules["base_layer"]
    tokens = wrapper._modules["token_adapter"]
    if type(tokens) is not TrainableTokensLayer or has_hooks(tokens):
        return f"token_adapter is {type_name(tokens)}, or a hook waits for its call"
    # a layer of the same adapters over W itself
    over_w = layer.__class__.__new__(layer.__class__)
    vars(over_w).update(vars(layer), _modules={**layer._modules, "base_layer": tokens._modules["base_layer"]})
    state: Any = read_state(over_w)
    if type(state) is str:
        # the ways of other reasons know nothing of trained tokens
        return f"{state}, over trainable tokens" if state in WAYS else state
    if state[-1] is not None:
        return "DoRA over trainable tokens"
    if tokens._disable_adapters or tokens.merged_adapters:
        return "the trained tokens are merged or disabled"
    if state[1] is not None:
        return "a bias beside trainable tokens"
    names = tokens.active_adapters
    if len(names) != 1 or names[0] not in tokens.trainable_tokens_delta:
        return f"trained tokens of {len(names)} adapters are active"
    trained, indices = tokens.trainable_tokens_delta[names[0]], tokens.token_indices[names[0]]
    if type(trained) not in PLAIN or trained.is_meta:
        return f"the trained tokens are {type_name(trained)}"
    return (state, trained, indices) if len({*indices}) == len(indices) else "a token is trained twice"


WAYS[OVER_TOKENS] = Way(run_over_tokens, read_over_tokens)
