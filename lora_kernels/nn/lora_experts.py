"""A frozen mixture of experts whose matrices have LoRA or DoRA adapters."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lora_kernels.nn.base import initial_scaling, keeping_codes
from lora_kernels.nn.checks import check_flag, check_number, check_rank
from lora_kernels.nn.dora import keeping_magnitudes, widen
from lora_kernels.nn.expert_checks import check_parameters, check_routed, check_sorted, experts_refusal, for_each, peft_shape
from lora_kernels.nn.experts import Adapted, multiplies, run_routed, run_sorted
from lora_kernels.nn.forms import ROUTED, Form, form_of
from lora_kernels.nn.init import expert_factors
from lora_kernels.nn.quantised_experts_base import QuantisedExperts
from lora_kernels.nn.snapshot import changing, of_one_state
from lora_kernels.nn.stand_in import StandIn
from lora_kernels.ops import ExpertNormCache, dora_gain, expert_weight_norm, merged_weight
from lora_kernels.ops.quantised import QuantisedWeight

INITS = (True, False, "gaussian")


class LoRAExperts(StandIn):
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

    A matrix may be of codes: FP8Experts, or one that `bitsandbytes.nn.parametrize` made nf4 or fp4,
    whose codes then stand under its name, in `state_dict` as the library has it. Every product is
    from the codes, with numbers of the dtype of x, or of the module where it casts x; none are made
    of all experts. On other devices than the CPU the library runs while the adapter is off.

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
        self._quantised = QuantisedExperts.of(experts, form.weights)
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

    @torch.no_grad()
    def _first_factors(self, name: str) -> tuple[Tensor, Tensor]:
        (experts, n_out, n_in), r = peft_shape(self, name), self.r[name]
        weight = self._like(name)
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
        held, is_plain = self._quantised, not self.enabled or self._unmerged is not None
        if is_plain and held is None:
            return self._plain_forward(args, kwargs)
        if kwargs:
            args = inspect.signature(self._origin[0].forward).bind(self, *args, **kwargs).args[1:]
        form = form_of(self, self._origin[0])
        if isinstance(form, str):
            raise RuntimeError(f"{self._class_name()}: {form}")
        name, count = self._class_name(), self._count(form.weights[0])
        routing: Any = None
        if form.kind == ROUTED:
            x, *routing = check_routed(name, args, self, count)
        else:
            x = check_sorted(name, args, count, self.hidden_size)
        if held is not None and not self.enabled and x.device.type != "cpu":
            return held.output(args)
        self._check_dtype(x, form)
        adapted = [self._adapted_matrix(name, self._matrix(name, x, form)) for name in form.weights]
        return run_sorted(self, form, adapted, x) if routing is None else run_routed(self, form, adapted, x, *routing)

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

    def _adapted_matrix(self, name: str, w: Tensor | QuantisedWeight) -> Adapted:
        """What a product computes with: no adapter where there is none, or it is off or merged,
        which is so here over codes alone."""
        bias = getattr(self, f"{name}_bias", None)
        if name not in self.adapted or not self.enabled or self._unmerged is not None:
            return Adapted(w, None, None, 1.0, bias)
        a, b, scale = self._factor("A", name), self._factor("B", name), self.scaling[name]
        return Adapted(w, a, b, scale, bias, self._gain(name, w, a, b) if self.use_dora else None)

    def _matrix(self, name: str, x: Tensor, form: Form) -> Tensor | QuantisedWeight:
        held, merged = self._quantised, self._unmerged or {}
        of_codes = held is not None and name in held.names
        if name in merged and self.enabled:
            held = self._requantised
            of_codes = of_codes and held is not None
        elif name in merged and not of_codes:
            return merged[name]
        return held.weight(name, held.dtype_for(form, x)) if held is not None and of_codes else self._frozen(name)

    def _gain(self, name: str, w: Any, a: Tensor, b: Tensor) -> Tensor:
        magnitude, scale = self._factor("magnitude_vector", name), self.scaling[name]
        if self.detach_norm:
            return self._norms[name].gain(w, a, b, scale, magnitude)
        return dora_gain(magnitude, expert_weight_norm(w, a, b, scale, None, self._transposed))

    @torch.no_grad()
    def _norm(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        w, a, b = self._weight_in(name, dtype), self._factor("A", name), self._factor("B", name)
        return expert_weight_norm(w, a, b, self.scaling[name], None, self._transposed)

    def _factor(self, kind: str, name: str) -> Tensor:
        found: Tensor = getattr(self, f"lora_{kind}_{name}")
        return found

    def _check_dtype(self, x: Tensor, form: Form) -> None:
        held = self._quantised
        w: Any = getattr(self, self.adapted[0]) if held is None else held
        if not (multiplies(form, w, x) if held is None else held.takes(form, x)):
            raise TypeError(f"{self._class_name()}: x must have the dtype of {self.adapted[0]}, {w.dtype}, found {x.dtype}")

    def _base_weights(self) -> list[nn.Parameter]:
        held: Any = self._parameters if self._unmerged is None else self._unmerged
        return [held[name] for name in self.adapted]

    def _base_weight(self) -> nn.Parameter:
        return self._base_weights()[0]

    def merge(self, safe: bool = False, *, dtype: torch.dtype | None = None, requantise: bool = False) -> float | None:
        """Puts the adapters into the weights, expert by expert: sums in float32 (float64 for
        float64), one rounding to the weight's dtype.

        As in AdapterLayer.merge, the merged weights are other parameters, the layer's own, and the
        base's come back bit for bit with `unmerge`. So a merged layer holds two tensors of each
        adapted weight; `merge_and_unload` lets the base's go, layer after layer. Of codes the
        merged weight is floating, of `dtype` or what it was in before, or with `requantise` codes
        of the same form; then the largest relative error of a matrix is returned.

        Raises:
            NotImplementedError: FP8Experts without `requantise`: they have no floating form.
            RuntimeError: the layer is merged already, or a weight is computed by pruning or a
                parametrization.
            TypeError, ValueError: as AdapterLayer.merge. Nothing has changed.
        """
        if self.merged:
            raise RuntimeError(f"{self._class_name()}: merge() on a merged layer; call unmerge() first")
        self._check_merge_options(safe, dtype, requantise)
        for name in self.adapted:
            self._plain_weight("merge", name)
        own: dict[str, Any] = self._merged_weights(safe or requantise, torch.float32 if requantise else dtype)
        again = error = None
        if requantise and self._quantised is not None:
            again, error = self._quantised.requantised(own)
            own = {name: p for name, p in again.parameters().items() if p is not self._parameters[name]}
        with changing(self):
            self._unmerged = {name: self._plain_weight("merge", name) for name in own}
            self._requantised = again
            self._parameters.update(own)
        return error

    def check_merge(self, safe: bool = False, dtype: torch.dtype | None = None, requantise: bool = False) -> None:
        """Raises what `merge` would."""
        self._check_merge_options(safe, dtype, requantise)
        for name in self.adapted:
            self._plain_weight("merge", name)
            if safe and not self.merged:
                self._check_merged(name, self._merged(name, dtype))

    def _check_merge_options(self, safe: bool, dtype: torch.dtype | None, requantise: bool) -> None:
        super()._check_merge_options(safe, dtype, requantise)
        if self._quantised is not None and (reason := self._quantised.merge_refusal(requantise)) is not None:
            raise NotImplementedError(f"{self._class_name()}: merge: {reason}")

    def _merged_as(self) -> tuple[bool, torch.dtype]:
        return self._requantised is not None, getattr(self, self.adapted[0]).dtype

    def _merged_weights(self, safe: bool, dtype: torch.dtype | None = None) -> dict[str, nn.Parameter]:
        found = {}
        for name in self.adapted:
            found[name] = nn.Parameter(self._merged(name, dtype), requires_grad=False)
            if safe:
                self._check_merged(name, found[name])
        return found

    def _merged(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """gain ⊙ (W + scaling·BA) of all experts, as the parameter lies; over codes in a dtype."""
        a, b, scale = self._factor("A", name), self._factor("B", name), self.scaling[name]
        # the merged tensor must be as the weight is: one made in inference mode could never be
        # trained through
        with torch.inference_mode(getattr(self, name).is_inference()), torch.no_grad():
            w = self._weight_in(name, dtype)
            gain = dora_gain(self._factor("magnitude_vector", name), self._norm(name, dtype)) if self.use_dora else None
            merged = w.dequantise() if isinstance(w, QuantisedWeight) else torch.empty_like(w)
            for e, out in enumerate(merged):
                out = out.mT if self._transposed else out
                each = out  # the numbers of codes, which are changed in place
                if not isinstance(w, QuantisedWeight):
                    each = w[e].mT if self._transposed else w[e]
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
            self._unmerged = self._requantised = None

    def plain_layer(self, merged: bool, safe: bool = False) -> nn.Module:
        """The module that this layer replaced, anew: with its class, attributes, hooks and mode,
        and with the merged weights or the base's.

        Raises:
            ValueError: as merge.
        """
        if merged and not self.merged:
            self._check_merge_options(safe, None, False)
        if merged:
            weights = {} if self.merged else self._merged_weights(safe)
        else:
            weights = self._unmerged or {}
        return self._plain_module(weights)

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
            if self._quantised is not None:
                fn = keeping_codes(fn, self._quantised, self._requantised)
            # as parameters: what is tied to one must stay so
            self._parameters.update({f"_unmerged_{name}": p for name, p in (held or {}).items()})
            try:
                return nn.Module._apply(self, keeping_magnitudes(fn, *self._magnitudes()), recurse)
            finally:
                if held is not None:
                    self._unmerged = {name: self._parameters.pop(f"_unmerged_{name}") for name in held}  # type: ignore[misc]
                self._share_parameters()
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
