"""The loss's gradient at the base's weights, as its leading singular triples, never two layers' gradients at a time.

A weight's gradient is as large as the weight. A hook takes each as soon as the backward pass has made it, keeps what is
needed and lets it go. For one batch that is its singular value decomposition (of a large one, its leading part). For
several batches ``G = sum_b G_b`` is never there as a whole; a randomised decomposition (Halko, Martinsson, Tropp 2011,
arXiv 0909.4061, alg. 4.4 and 5.1) needs only products with it, which are sums over the batches:

    Q = orth(sum_b G_b Omega)
    W = orth(sum_b G_b^T Q),  Q = orth(sum_b G_b W)         once for each power iteration
    Z = sum_b G_b^T Q = V S R^T,  U = Q R

The algebra is that of the same decomposition of the mean gradient; it takes ``2 + 2 iterations`` passes over the
batches and memory for ``q (d_out + d_in)`` numbers a layer, with ``q`` somewhat above the number of triples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorakit.errors import DataError, UnsupportedLayerError, bullet_list, quoted
from lorakit.inits.calibration import Calibration, undisturbed
from lorakit.inits.svd import Directions, all_directions, top_directions
from lorakit.layers import Site

EXACT_UP_TO = 1024
"""Smaller side up to which one batch's gradient is decomposed exactly; larger ones take seconds each."""

POWER_ITERATIONS = 2
LEAST_SKETCH, SKETCH_FACTOR = 16, 2


def gradient_directions(
    model: nn.Module,
    sites: Sequence[Site],
    counts: Mapping[str, int],
    calibration: Calibration,
    generator: torch.Generator,
    iterations: int = POWER_ITERATIONS,
) -> dict[str, Directions]:
    """Return the leading singular triples of the mean loss's gradient at each site's weight, by path, on the CPU.

    The largest entry of each left vector is positive. The mean over the batches is weighted as ``calibration`` says;
    the model runs in evaluation mode and is as before afterwards. A site that the loss does not depend on is left
    out; see :func:`refuse_zero`.

    Args:
        model: the bare base.
        sites: whose weights.
        counts: how many triples by path, at most the site's smaller side.
        calibration: the examples.
        generator: a CPU generator, for the sketches.
        iterations: power iterations, where there are several batches.

    Raises:
        DataError: no examples, or a loss or gradient that is not finite.
        UnsupportedLayerError: a weight whose gradient is not its own.
    """
    parameters = own_parameters(model, sites)
    batches = calibration.shares()
    sketches = {site.path: Sketch(site, counts[site.path], generator) for site in sites}
    if len(batches) == 1:
        found: dict[str, Directions] = {}

        def take(site: Site, G: Tensor) -> None:
            count, seed = sketches[site.path].count, sketches[site.path].seed
            large = min(G.shape[-2:]) > EXACT_UP_TO
            own = torch.Generator().manual_seed(seed)
            found[site.path] = top_directions(G, count, generator=own) if large else all_directions(G).first(count)

        _run(model, parameters, sites, batches, calibration, take)
    else:
        complete = all(sketch.complete for sketch in sketches.values())
        num_passes = 2 if complete else 2 + 2 * iterations
        for done in range(num_passes):
            _run(model, parameters, sites, batches, calibration, lambda site, G: sketches[site.path].add(G))
            if done == 0:
                sites = [site for site in sites if sketches[site.path].total is not None]
                for path in sketches.keys() - {site.path for site in sites}:
                    del sketches[path]
            if done < num_passes - 1:
                for sketch in sketches.values():
                    sketch.turn()
        found = {path: sketch.directions() for path, sketch in sketches.items()}
    signed = {path: _signed(directions) for path, directions in found.items()}
    return {path: Directions(d.left.cpu(), d.values.cpu(), d.right.cpu()) for path, d in signed.items()}


class Sketch:
    """A randomised decomposition of a sum of matrices that are seen one after another, pass by pass.

    Attributes:
        count: how many triples are wanted.
        complete: whether the sketch is as wide as the smaller side, so that the decomposition is exact.
    """

    def __init__(self, site: Site, count: int, generator: torch.Generator) -> None:
        self.count, self.site = count, site
        self.seed = int(torch.randint(2**62, (1,), generator=generator))  # whatever order the layers come in
        size = max(SKETCH_FACTOR * count, count + LEAST_SKETCH)
        self.size = min(size, site.d_out, site.d_in)
        self.complete = self.size == min(site.d_out, site.d_in)
        self.left: Tensor | None = None  # Q, an orthonormal basis of outputs
        self.right: Tensor | None = None  # Omega or W, of inputs
        self.total: Tensor | None = None

    def add(self, G: Tensor) -> None:
        """Add a matrix's product with what is known: ``G W`` or ``G^T Q``."""
        if self.left is None and self.right is None:
            shape = *self.site.stack, self.site.d_in, self.size
            self.right = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed)).to(G.device, G.dtype)
        product = G @ self.right if self.right is not None else G.mT @ self.left  # type: ignore[operator]
        self.total = product if self.total is None else self.total.add_(product)

    def turn(self) -> None:
        """Go to the next pass: orthonormalise what has been summed, and look from the other side."""
        assert self.total is not None
        basis = torch.linalg.qr(self.total)[0]
        self.left, self.right = (basis, None) if self.right is not None else (None, basis)
        self.total = None

    def directions(self) -> Directions:
        """Return the decomposition, after a pass over ``G^T Q``."""
        assert self.total is not None
        assert self.left is not None
        found = all_directions(self.total)
        return Directions(self.left @ found.right, found.values, found.left).first(self.count)


def refuse_zero(sites: Sequence[Site], found: Mapping[str, Directions]) -> None:
    """Refuse sites whose gradient is zero or never came, so that it has no direction to start in, all by name.

    Raises:
        DataError: there are some.
    """
    absent = [site.path for site in sites if site.path not in found]
    if absent:
        raise DataError(f"the loss does not depend on {quoted(absent)}: no gradient has come there. Exclude them.")
    flat = [path for path, directions in found.items() if not bool(directions.values.any())]
    if flat:
        raise DataError(
            f"the loss's gradient is zero at {quoted(flat)}, so that there is no direction to start in. Give examples "
            "on which these layers matter, or exclude them."
        )


def _signed(found: Directions) -> Directions:
    """Return the same with the signs that make the largest entry of each left vector positive."""
    largest = found.left.gather(-2, found.left.abs().argmax(dim=-2, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(found.left.dtype)
    return Directions(found.left * sign, found.values, found.right * sign)


def own_parameters(model: nn.Module, sites: Sequence[Site]) -> dict[str, nn.Parameter]:
    """Return the parameter of each site by path; parts of one weight have the same.

    Raises:
        UnsupportedLayerError: a weight that is computed anew in each forward, is not of floats, or is another layer's
            too, so that its gradient is the sum of both.
    """
    holders: dict[int, dict[int, str]] = {}  # names by holding module, of each parameter
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), {})[id(module)] = f"{path}.{name}" if path else name
    found: dict[str, nn.Parameter] = {}
    problems = []
    for site in sites:
        inner, _, name = site.ops.parameter.rpartition(".")
        parameter = site.layer.get_submodule(inner)._parameters.get(name)
        if parameter is None:
            problems.append(f"the weight of '{site.path}' is computed anew in each forward (a parametrization)")
        elif not parameter.is_floating_point():
            problems.append(f"the weight of '{site.path}' is stored as {parameter.dtype}, which has no gradient")
        elif len(names := holders.get(id(parameter), {})) > 1:
            problems.append(f"the weight of '{site.path}' is shared ({quoted(list(names.values()))})")
        else:
            found[site.path] = parameter
    if problems:
        raise UnsupportedLayerError(
            f"{bullet_list(problems)}. Its gradient is not this layer's own: exclude it, or take an init that does not "
            "look at gradients."
        )
    return found


def _run(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    sites: Sequence[Site],
    batches: Sequence[tuple[Mapping[str, object], float]],
    calibration: Calibration,
    take: Callable[[Site, Tensor], None],
) -> None:
    """Give ``take`` each site's part of each batch's gradient, times the batch's share; one at a time."""
    at: dict[int, list[Site]] = {}
    for site in sites:
        at.setdefault(id(parameters[site.path]), []).append(site)

    def hook(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        gradient = gradient.to_dense() if gradient.layout != torch.strided else gradient
        if not bool(gradient.isfinite().all()):
            raise DataError(f"the loss's gradient at '{at[id(parameter)][0].path}' is not finite on the examples.")
        wide = gradient.float()
        for site in at[id(parameter)]:
            take(site, site.ops.as_matrix(site.layer, wide))

    with undisturbed(model), torch.enable_grad():
        handles = []
        try:
            for parameter in {id(p): p for p in parameters.values()}.values():
                parameter.requires_grad_(True)
                handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
            for number, (batch, share) in enumerate(batches):
                loss = _checked(calibration.loss(model, batch), number)
                (loss * share).backward()  # type: ignore[no-untyped-call]
        finally:
            for handle in handles:
                handle.remove()


def _checked(loss: object, number: int) -> Tensor:
    """Return a loss that has a gradient.

    Raises:
        DataError: it is none.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise DataError(
            f"the examples give no loss (batch {number} gave {type(loss).__name__}): give the batches labels, or "
            "Calibration a function `loss`."
        )
    if not bool(loss.isfinite()):
        raise DataError(f"the loss on the examples is not finite: {float(loss.detach())} on batch {number}.")
    if not loss.requires_grad:
        raise DataError(f"the loss of batch {number} depends on none of the weights that are looked at.")
    return loss.reshape(())
