"""A frozen mixture of experts whose matrices have LoRA or DoRA adapters."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lora_kernels.nn.base import AdapterLayer, initial_scaling
from lora_kernels.nn.checks import check_flag, check_number, check_rank
from lora_kernels.nn.dora import keeping_magnitudes, widen
from lora_kernels.nn.expert_checks import check_parameters, check_routed, check_sorted, experts_refusal, for_each, peft_shape
from lora_kernels.nn.experts import Adapted, multiplies, run_routed, run_sorted
from lora_kernels.nn.flat_parameters import constant
from lora_kernels.nn.forms import ROUTED, Form, form_of
from lora_kernels.nn.init import expert_factors
from lora_kernels.nn.snapshot import changing, of_one_state
from lora_kernels.ops import ExpertNormCache, dora_gain, expert_weight_norm, merged_weight

INITS = (True, False, "gaussian")


class LoRAExperts(AdapterLayer):
    """The experts e = index[t, j] of each token, with adapters on both matrices, up and down:

        y[t] = Σ_j weights[t, j] · down[e](act(up[e](x[t])))
        up[e](x) = gain[e] ⊙ (W[e] x + scaling · B[e] A[e] x) + bias[e]

    by `lora_kernels.ops.expert_lora_linear`: no W + scaling · BA is formed, and experts without
    tokens are not read. With `use_dora` gain = m / ‖W + scaling·BA‖, one number per expert and
    output feature; else there is none.

    It stands in the place of a module of experts of transformers 5 or of Llama 4 (`nn.forms`). It
    has that module's parameters, modules, attributes and methods by their names, and is called as
    it is. An adapted parameter p [experts, out, in], or [experts, in, out] where the module has it
    so, gets lora_A_p A [experts, r, in], lora_B_p B [experts, out, r] and with DoRA
    lora_magnitude_vector_p m [experts, out]. A and B are float32, float64 if p is float64, m
    float32 whatever the layer is cast to, and begins as the norm.

    `parameters`: the names of those to adapt, all by default. `r`, `lora_alpha`: a number, or one
    for each name. `init_lora_weights`: True, False or "gaussian", of PEFT's draws. `detach_norm` as
    in DoRALinear. The gain is kept between calls without gradients, as DoRALinear's is.

    While merged, or with the adapter off, the module's own forward runs.

    Raises:
        TypeError: an option has the wrong type, or the module is not one of known experts.
        ValueError: an option is outside its range; the message names it. Nothing has changed.

    Sources: LoRA, arXiv:2106.09685, eq. 3; DoRA, arXiv:2402.09353, eq. 5 and §4.3.
    """

    r: dict[str, int]  # type: ignore[assignment]
    lora_alpha: dict[str, float]  # type: ignore[assignment]
    scaling: dict[str, float]  # type: ignore[assignment]
    adapted: tuple[str, ...]
    """The adapted parameters, in the order in which the module has them."""
    _unmerged: dict[str, nn.Parameter] | None  # type: ignore[assignment]

    def __init__(
        self,
        experts: nn.Module,
        parameters: Iterable[str] | None = None,
        *,
        r: int | Mapping[str, int] = 8,
        lora_alpha: float | Mapping[str, float] = 8,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        detach_norm: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if (reason := experts_refusal(experts)) is not None:
            raise TypeError(f"{name}: {reason}")
        form: Any = form_of(experts)
        self.adapted = check_parameters(name, experts, form, parameters)
        self.r = {p: check_rank(name, each) for p, each in for_each(name, "r", r, self.adapted)}
        alphas = for_each(name, "lora_alpha", lora_alpha, self.adapted)
        self.lora_alpha = {p: check_number(name, "lora_alpha", each) for p, each in alphas}
        self.use_rslora, self.use_dora, self.detach_norm = (
            check_flag(name, option, given)
            for option, given in (("use_rslora", use_rslora), ("use_dora", use_dora), ("detach_norm", detach_norm))
        )
        if not isinstance(init_lora_weights, bool) and init_lora_weights not in INITS[2:]:
            raise ValueError(f"{name}: init_lora_weights must be True, False or 'gaussian', found {init_lora_weights!r}")
        self.enabled, self._unmerged, self._init = True, None, init_lora_weights
        self.scaling = self._initial_scalings()
        self._take_over(experts)
        self._transposed = form.transposed
        self._norms = {p: ExpertNormCache(form.transposed) for p in self.adapted if use_dora}
        for each in experts.parameters():
            each.requires_grad_(False)
        for p in self.adapted:
            a, b = self._first_factors(p)
            self.register_parameter(f"lora_A_{p}", nn.Parameter(a))
            self.register_parameter(f"lora_B_{p}", nn.Parameter(b))
            if use_dora:
                self.register_parameter(f"lora_magnitude_vector_{p}", nn.Parameter(self._norm(p)))
        self.training = experts.training

    @classmethod
    def from_experts(cls, experts: nn.Module, *args: Any, **options: Any) -> Self:
        """A layer that shares the parameters of `experts`, which it freezes, and its train or eval
        mode; the same as the constructor."""
        return cls(experts, *args, **options)

    def _take_over(self, experts: nn.Module) -> None:
        """The module's attributes, parameters, buffers and modules, by their names."""
        plain = frozenset(vars(nn.Module()))
        self._origin = type(experts), {key: value for key, value in vars(experts).items() if key not in plain}
        vars(self).update(self._origin[1])
        self._origin_parameters = tuple(experts._parameters)
        self._trained = [name for name, p in experts._parameters.items() if p is not None and p.requires_grad]
        for name, parameter in experts._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in experts._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in experts._non_persistent_buffers_set)
        for name, module in experts._modules.items():
            self.add_module(name, module)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # what the forwards of experts call is the class's
            origin = self.__dict__.get("_origin")
            if origin is None or name.startswith("__"):
                raise
            for cls in origin[0].__mro__:
                if name in vars(cls):
                    found = vars(cls)[name]
                    return found.__get__(self, type(self)) if hasattr(found, "__get__") else found
            raise

    @torch.no_grad()
    def _first_factors(self, name: str) -> tuple[Tensor, Tensor]:
        weight, (experts, n_out, n_in) = self._parameters[name], peft_shape(self, name)
        assert weight is not None
        r = self.r[name]
        a, b = expert_factors(self._init, r, experts, n_in, n_out, weight)
        a, b = a.view(experts, r, n_in), b.view(n_out, r, experts).permute(2, 0, 1)
        return (b.mT.contiguous(), a.mT.contiguous()) if self._is_mirrored() else (a, b.contiguous())

    def _is_mirrored(self) -> bool:
        """Whether PEFT takes in for out: it adds BA to p as it lies unless the module says
        is_transposed, which Llama 4's does not."""
        return self._transposed and not getattr(self, "is_transposed", False)

    def peft_tensor(self, kind: str, name: str) -> Tensor:
        """What PEFT's files call `kind` of the parameter `name`, as a view: lora_A [experts · r,
        in] as [experts, r, in], lora_B [out, r · experts] as [out, r, experts]."""
        sides = {"lora_A": "B", "lora_B": "A"} if self._is_mirrored() else {"lora_A": "A", "lora_B": "B"}
        found = self._factor(sides.get(kind, "magnitude_vector"), name).detach()
        if kind not in sides:
            return found
        found = found.mT if self._is_mirrored() else found
        return found.permute(1, 2, 0) if kind == "lora_B" else found

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gives the adapters their first values. For layers made on the meta device: after
        `to_empty`, once the base weights are loaded.

        Raises:
            RuntimeError: the layer is merged.
        """
        if self.merged:
            raise RuntimeError(f"{self._class_name()}: reset_parameters() on a merged layer; call unmerge() first")
        with changing(self):
            for name in self.adapted:
                for side, first in zip("AB", self._first_factors(name), strict=True):
                    self._factor(side, name).copy_(first)
                if self.use_dora:
                    self._factor("magnitude_vector", name).copy_(self._norm(name))
            self._clear_norms()

    @of_one_state
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Called as the module that it replaced: (x [tokens, in], index [tokens, k], weights
        [tokens, k]), or Llama 4's, (x [experts · tokens, in]). Returns y [tokens, out].

        Raises:
            TypeError, ValueError: the tensors do not fit the experts.
            RuntimeError: the module's configuration chose an implementation that is not known.
        """
        if not self.enabled or self._unmerged is not None:
            return self._plain_forward(args, kwargs)
        if kwargs:
            args = inspect.signature(self._origin[0].forward).bind(self, *args, **kwargs).args[1:]
        form = form_of(self, self._origin[0])
        if isinstance(form, str):
            raise RuntimeError(f"{self._class_name()}: {form}")
        adapted = [self._adapted_matrix(name) for name in form.weights]
        if form.kind == ROUTED:
            x, index, weights = check_routed(self._class_name(), args, self, adapted[0].w.shape[0])
            self._check_dtype(x, form)
            return run_routed(self, form, adapted, x, index, weights)
        x = check_sorted(self._class_name(), args, adapted[0].w.shape[0], self.hidden_size)
        self._check_dtype(x, form)
        return run_sorted(self, form, adapted, x)

    def _plain_forward(self, args: Any, kwargs: Any) -> Tensor:
        """The module's own forward, with the weights as they stand, or the base's while the adapter
        is off."""
        module: Any = self
        if not self.enabled and self._unmerged is not None:
            module = self._empty_origin(None)
            held = vars(self)
            vars(module).update({key: held[key] for key in ("training", "_buffers", "_modules")})
            vars(module)["_parameters"] = {**self._parameters, **self._unmerged}
        y: Tensor = self._origin[0].forward(module, *args, **kwargs)
        return y

    def _adapted_matrix(self, name: str) -> Adapted:
        w = self._frozen(name)
        bias = getattr(self, f"{name}_bias", None)
        if name not in self.adapted:
            return Adapted(w, None, None, 1.0, bias)
        a, b, scale = self._factor("A", name), self._factor("B", name), self.scaling[name]
        return Adapted(w, a, b, scale, bias, self._gain(name, w, a, b) if self.use_dora else None)

    def _gain(self, name: str, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        magnitude, scale = self._factor("magnitude_vector", name), self.scaling[name]
        if self.detach_norm:
            return self._norms[name].gain(w, a, b, scale, magnitude)
        return dora_gain(magnitude, expert_weight_norm(w, a, b, scale, None, self._transposed))

    @torch.no_grad()
    def _norm(self, name: str) -> Tensor:
        w, a, b = self._frozen(name), self._factor("A", name), self._factor("B", name)
        return expert_weight_norm(w, a, b, self.scaling[name], None, self._transposed)

    def _frozen(self, name: str) -> Tensor:
        w: Tensor = getattr(self, name)
        return constant(self, name, w) if w.requires_grad else w

    def _factor(self, kind: str, name: str) -> Tensor:
        found: Tensor = getattr(self, f"lora_{kind}_{name}")
        return found

    def _check_dtype(self, x: Tensor, form: Form) -> None:
        w = getattr(self, self.adapted[0])
        if not multiplies(form, w, x):
            raise TypeError(f"{self._class_name()}: x must have the dtype of {self.adapted[0]}, {w.dtype}, found {x.dtype}")

    def _base_weights(self) -> list[nn.Parameter]:
        held: Any = self._parameters if self._unmerged is None else self._unmerged
        return [held[name] for name in self.adapted]

    def _base_weight(self) -> nn.Parameter:
        return self._base_weights()[0]

    def merge(self, safe: bool = False, *, dtype: torch.dtype | None = None, requantise: bool = False) -> None:
        """Puts the adapters into the weights, expert by expert: sums in float32 (float64 for
        float64), one rounding to the weight's dtype.

        As in AdapterLayer.merge, the merged weights are other parameters, the layer's own, and the
        base's come back bit for bit with `unmerge`. So a merged layer holds two tensors of each
        adapted weight; `merge_and_unload` lets the base's go, layer after layer.

        Raises:
            RuntimeError: the layer is merged already, or a weight is computed by pruning or a
                parametrization.
            TypeError, ValueError: as AdapterLayer.merge. Nothing has changed.
        """
        if self.merged:
            raise RuntimeError(f"{self._class_name()}: merge() on a merged layer; call unmerge() first")
        self._check_merge_options(safe, dtype, requantise)
        bases = {name: self._plain_weight("merge", name) for name in self.adapted}
        own = self._merged_weights(safe)
        with changing(self):
            self._unmerged = bases
            self._parameters.update(own)

    def check_merge(self, safe: bool = False, dtype: torch.dtype | None = None, requantise: bool = False) -> None:
        """Raises what `merge` would."""
        self._check_merge_options(safe, dtype, requantise)
        for name in self.adapted:
            self._plain_weight("merge", name)
            if safe and not self.merged:
                self._check_merged(name, self._merged(name))

    def _merged_weights(self, safe: bool) -> dict[str, nn.Parameter]:
        found = {}
        for name in self.adapted:
            found[name] = nn.Parameter(self._merged(name), requires_grad=False)
            if safe:
                self._check_merged(name, found[name])
        return found

    def _merged(self, name: str) -> Tensor:
        """gain ⊙ (W + scaling·BA) of all experts, as the parameter lies."""
        w, a, b, scale = self._frozen(name), self._factor("A", name), self._factor("B", name), self.scaling[name]
        # the merged tensor must be as the weight is: one made in inference mode could never be
        # trained through
        with torch.inference_mode(w.is_inference()), torch.no_grad():
            gain = dora_gain(self._factor("magnitude_vector", name), self._norm(name)) if self.use_dora else None
            merged = torch.empty_like(w)
            for e, (each, out) in enumerate(zip(w, merged, strict=True)):
                if self._transposed:
                    each, out = each.mT, out.mT
                merged_weight(each, a[e], b[e], scale, None if gain is None else gain[e], out=out)
        return merged

    def unmerge(self) -> None:
        """Takes the adapters out of the weights, which are then the parameters of before `merge`.

        Raises:
            RuntimeError: the layer is not merged, or a weight was pruned or parametrized since.
        """
        bases = self._unmerged
        if bases is None:
            raise RuntimeError(f"{self._class_name()}: unmerge() on a layer that is not merged")
        for name in bases:
            self._plain_weight("unmerge", name)
        with changing(self):
            self._parameters.update(bases)
            self._unmerged = None

    def plain_layer(self, merged: bool, safe: bool = False) -> nn.Module:
        """The module that this layer replaced, anew: with its class, attributes, hooks and mode,
        and with the merged weights or the base's.

        Raises:
            ValueError: as merge.
        """
        if merged:
            weights = {} if self.merged else self._merged_weights(safe)
        else:
            weights = self._unmerged or {}
        plain = self._furnished(None, weights)
        for name, module in self._modules.items():
            plain.add_module(name, module)
        return plain

    def _empty_origin(self, held: Any) -> nn.Module:
        plain = super()._empty_origin(held)
        vars(plain).update({key: vars(self)[key] for key in self._origin[1] if key in vars(self)})
        return plain

    def set_scale(self, factor: float) -> None:
        """As AdapterLayer.set_scale, of every adapted parameter."""
        name = self._class_name()
        factor = check_number(name, "set_scale: factor", factor)
        if self.merged:
            raise RuntimeError(f"{name}: set_scale() on a merged layer; call unmerge() first")
        with changing(self):
            self.scaling = {p: factor * first for p, first in self._initial_scalings().items()}

    def _initial_scalings(self) -> dict[str, float]:
        return {p: initial_scaling(self.lora_alpha[p], self.r[p], self.use_rslora) for p in self.adapted}

    def _is_rescaled(self) -> bool:
        return any(not math.isclose(self.scaling[p], s, rel_tol=1e-6) for p, s in self._initial_scalings().items())

    def _magnitudes(self) -> list[nn.Parameter]:
        found = (self._parameters.get(f"lora_magnitude_vector_{p}") for p in self.adapted)
        return [m for m in found if m is not None]

    def _clear_norms(self) -> None:
        for norm in self._norms.values():
            norm.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with changing(self):
            held = self._unmerged
            # as parameters: what is tied to one must stay so
            self._parameters.update({f"_unmerged_{name}": p for name, p in (held or {}).items()})
            try:
                return nn.Module._apply(self, keeping_magnitudes(fn, *self._magnitudes()), recurse)
            finally:
                if held is not None:
                    self._unmerged = {name: self._parameters.pop(f"_unmerged_{name}") for name in held}  # type: ignore[misc]
                self._clear_norms()

    def _load_from_state_dict(self, *args: Any) -> None:
        with changing(self):
            super()._load_from_state_dict(*args)
            for magnitude in self._magnitudes():
                widen(magnitude)
            self._clear_norms()

    def extra_repr(self) -> str:
        each = (f"{p}: r={self.r[p]}, lora_alpha={self.lora_alpha[p]:g}, scaling={self.scaling[p]:g}" for p in self.adapted)
        text = f"{self._origin[0].__name__}, {'; '.join(each)}{', use_dora=True' if self.use_dora else ''}"
        text += ", merged=True" if self.merged else ""
        return text if self.enabled else f"{text}, enabled=False"
