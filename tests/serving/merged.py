"""A served model with two random adapters of all its linear layers, and the same model with each of
them merged, in float64."""

import copy

import torch

from lora_kernels.serving import Adapter, AdapterPool, Factors, serve


def serve_two(model, size=0.3, modules=None, **options):
    """(pool, {"a": merged, "b": merged, None: the base})."""
    model.eval().requires_grad_(False)
    models = {name: copy.deepcopy(model).double() for name in ("a", "b", None)}
    pool = AdapterPool(model, capacity_bytes=1 << 24, slots=4, max_rank=16, **options)
    for seed, name in enumerate(("a", "b")):
        draw = torch.Generator().manual_seed(seed)
        factors = {}
        for site_name, site in pool.sites.items():
            if modules is None or site_name.rpartition(".")[2] in modules:
                rows, columns = site.shape
                a, b = (torch.randn(shape, generator=draw) * size for shape in ((4, columns), (rows, 4)))
                factors[site_name] = Factors(a, b, 1.5)
                models[name].get_submodule(site_name).weight.data += 1.5 * b.double() @ a.double()
        pool.load(name, Adapter(factors))
    serve(model, pool)
    return pool, models


def assert_rows_are(y, names, models, *inputs, call=lambda model, *inputs: model(*inputs), tolerance=1e-4):
    """Row i is what the model of its name computes for the i-th sequence of the inputs alone."""
    for i, name in enumerate(names):
        alone = [x[i : i + 1].double() if x.is_floating_point() else x[i : i + 1] for x in inputs]
        wanted = call(models[name], *alone)[0]
        assert float((y[i].double() - wanted).abs().max()) <= tolerance * float(wanted.abs().max()), f"row {i} of {names}"
