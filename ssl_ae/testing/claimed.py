"""Checks of what components claim of their inside: slices, ranges, gradients, noise, convexity; and of what any part shows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributions import Distribution

from ssl_ae import pictures as drawable
from ssl_ae.components import Decoder, Encoder
from ssl_ae.model import CODE, Model, frozen
from ssl_ae.objective import supervised
from ssl_ae.randomness import seed_draws
from ssl_ae.testing.check import Check, Finding, check, require
from ssl_ae.testing.mapped import alike, condition_of, distribution
from ssl_ae.testing.world import Subject, World
from ssl_ae.trace import Batch, Need, Pass, Trace, matches

STEPS = (0, 1_000, 1_000_000)  # noise may come or go with the steps
SCALES = (1.0, 1e3, -1e3)  # of inputs: layers that lie in [0, 1] do so for any


def _alone(subject: Subject) -> Iterator[tuple[World, Model]]:
    """Every world with a model of which encoder and decoder alone act."""
    for world in subject.worlds:
        yield world, world.model()


def _pass(model: Model, x: Tensor, seed: int = 0, **options: object) -> dict[str, Tensor]:
    """The layers of one walk through the encoder, and the code's mean."""
    seed_draws(seed)
    run = Pass(model.decoder, **options)
    q = model.encoder(run.tap(x, "input"), run)
    return {**run.taps, CODE: q.mean}


@check(
    "encoder",
    "decoder",
    rule="slices() are encoders (decoders) in the order of the pass, `parts(config)` many, and one after another they are the "
    "whole: each takes what the one before returns, and the mean of the last is the mean of all. No two share a parameter.",
    cure="build each slice of layers of the whole with its own Shapes(x, latent); override the classmethod `parts` beside it.",
)
def slices(subject: Subject) -> None:
    base = Encoder if subject.kind == "encoder" else Decoder
    for world, model in _alone(subject):
        component, shapes = world.part(model), world.resolved.shapes
        found = list(component.slices())
        config = world.resolved.encoder.config if base is Encoder else world.resolved.decoder.config
        said = subject.cls.parts(config)
        require(said == (len(found) or 1), f"{world.name}: parts(config) = {said}, but slices() gave {len(found)}.")
        strangers = [type(part).__name__ for part in found if not isinstance(part, base)]
        require(not strangers, f"{world.name}: slices() gave {', '.join(strangers)}, which is no {base.__name__}.")
        if not found:
            continue
        _chain(world, found, base)
        owners = [parameter for part in found for parameter in part.parameters()]
        require(len(owners) == len(set(owners)), f"{world.name}: two slices share a parameter.")
        foreign = set(owners) - set(component.parameters())
        require(not foreign, f"{world.name}: {len(foreign)} parameters of its slices are not its own.")
        with frozen(model), torch.no_grad():
            sample = world.sample()
            expected = distribution(world, model, sample).mean
            value = sample.x if base is Encoder else sample.z
            for k, part in enumerate(found, start=1):
                with frozen(part):
                    answer = part(value, Pass(model.decoder))
                value = (answer if base is Encoder else answer[0]).mean
                shape = (len(sample), part.shapes.latent) if base is Encoder else (len(sample), *part.shapes.x)
                require(value.shape == shape, f"{world.name}: slice {k} gave {tuple(value.shape)}, expected {shape}.")
        require(alike(value, expected), f"{world.name}: its slices one after another give another mean than it does as a whole.")
        require(value.shape[1:] == ((shapes.latent,) if base is Encoder else shapes.x), f"{world.name}: they end elsewhere.")


def _chain(world: World, found: list, base: type) -> None:
    """What one slice returns, flat, is what the next one takes; the ends are the whole's."""
    shapes = world.resolved.shapes
    given = [(part.shapes.x, (part.shapes.latent,)) for part in found]
    links = given if base is Encoder else [(latent, x) for x, latent in given]
    ends = (shapes.x, (shapes.latent,)) if base is Encoder else ((shapes.latent,), shapes.x)
    require((links[0][0], links[-1][1]) == ends, f"{world.name}: its slices go {links}, from {ends[0]} to {ends[1]} is expected.")
    broken = [f"{before[1]} to {after[0]}" for before, after in itertools.pairwise(links) if before[1] != after[0]]
    require(not broken, f"{world.name}: slices do not fit one another: {', '.join(broken)}.")


@check(
    "encoder",
    rule="the layers that `unit_interval(config)` names are tapped (or the code), and lie in [0, 1] for any input.",
    cure="name layers that end in a sigmoid, a hard sigmoid or a softmax, as patterns of what forward taps; leave others out.",
)
def unit_interval(subject: Subject) -> None:
    for world, model in _alone(subject):
        patterns = subject.cls.unit_interval(world.resolved.encoder.config)
        x = world.sample().x
        for train, scale in itertools.product((False, True), SCALES if patterns else ()):
            model.train(train)
            with torch.no_grad():
                layers = _pass(model, scale * x, step=torch.tensor(0) if train else None, learn=False)
            for pattern in patterns:
                found = {name: h for name, h in layers.items() if matches(name, (pattern,))}
                require(bool(found), f"{world.name}: it names {pattern!r}, but has the layers {', '.join(layers)}.")
                outside = [name for name, h in found.items() if not bool(((h >= 0) & (h <= 1)).all())]
                ends = [f"[{found[name].min():.3g}, {found[name].max():.3g}]" for name in outside]
                require(
                    not outside, f"{world.name}: {', '.join(outside)} reached {', '.join(ends)} for inputs up to {abs(scale):g}."
                )


@check(
    "encoder",
    rule="squared_jacobian(layers), where it is not None, is |dE[z|x]/dx|_F^2 of each row, (B,), as autograd finds it.",
    cure="compare with the sum over k of the squared gradient of E[z_k|x]; return None for options without a closed form.",
)
def squared_jacobian(subject: Subject) -> None:
    for world, model in _alone(subject):
        model.double()
        x = world.sample().x.double()
        with frozen(model):
            trace = model(Batch(x=x), frozenset({Need.CLEAN, Need.INPUT_GRAD}))
            value = model.encoder.squared_jacobian(trace.clean)
            if value is None:
                continue
            require(value.shape == (len(x),), f"{world.name}: {len(x)} rows gave shape {tuple(value.shape)}.")
            wanted = torch.zeros(len(x), dtype=x.dtype)
            for column in trace.q.mean.unbind(1):
                (slope,) = torch.autograd.grad(column.sum(), trace.batch.x, retain_graph=True)
                wanted += slope.flatten(1).square().sum(1)
        off = float(((value - wanted).abs() / wanted.clamp_min(1e-12)).max().detach())
        require(off < 1e-4, f"{world.name}: {value[0]:.6g} in the first row, autograd says {wanted[0]:.6g}; off by {off:.2g}.")


@check(
    "encoder",
    rule="`differentiable` says whether E[z|x] carries a gradient to x.",
    cure="set `differentiable = False` where the code is found without gradients (an inner minimisation); else do not detach.",
)
def differentiable(subject: Subject) -> None:
    for world, model in _alone(subject):
        x = world.sample().x.requires_grad_()
        with frozen(model):
            mean = model.posterior(x).mean
        value = (mean * torch.randn(mean.shape)).sum()  # a sum alone is constant for codes that add up to 1
        slope = torch.autograd.grad(value, x, allow_unused=True)[0] if value.requires_grad else None
        reaches = slope is not None and bool(slope.any())
        said = subject.cls.differentiable
        require(reaches == said, f"{world.name}: differentiable = {said}, but {'a' if reaches else 'no'} gradient reached x.")


@check(
    "encoder",
    rule="an encoder that is not `noisy` gives the same layers in each training pass over the same rows, and one that is does so "
    "where run.step is None: that is how the undisturbed layers are found.",
    cure="set `noisy = True` and draw only where run.step is given; or leave noise to the posterior or a regularizer.",
)
def noisy(subject: Subject) -> None:
    for world, model in _alone(subject):
        model.train()
        x = world.sample().x
        for step in (None, *(() if subject.cls.noisy else STEPS)):
            given = None if step is None else torch.tensor(step)
            with torch.no_grad():
                first, second = (_pass(model, x, seed, learn=False, step=given) for seed in (1, 2))
            changed = [name for name in first if not torch.equal(first[name], second[name])]
            require(
                not changed,
                f"{world.name}: noisy = {subject.cls.noisy}, but two training passes with run.step = {step} differ in "
                f"{', '.join(changed)}.",
            )


@check(
    "encoder",
    rule="`reads_decoder` says whether E[z|x] depends on the decoder's parameters, through run.decoder.",
    cure="set `reads_decoder = True` where forward uses run.decoder, so that what trains the encoder trains the decoder.",
)
def reads_decoder(subject: Subject) -> None:
    for world, model in _alone(subject):
        parameters = list(model.decoder.parameters())
        with frozen(model), torch.no_grad():
            before = model.features(world.sample().x)
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter))
            changed = not torch.equal(before, model.features(world.sample().x))
        said = subject.cls.reads_decoder
        verb = "changed" if changed else "did not change"
        require(not parameters or changed == said, f"{world.name}: reads_decoder = {said}, but another decoder {verb} the code.")


@check(
    "decoder",
    rule="`reads_layers` says whether p(x|z) needs the encoder's layers in run.taps; a decoder without it decodes a code alone, "
    "and as it does after the encoder's pass.",
    cure="set `reads_layers = True` where forward reads run.taps: such a model reconstructs samples, but decodes no code.",
)
def reads_layers(subject: Subject) -> None:
    for world, model in _alone(subject):
        sample, said = world.sample(), subject.cls.reads_layers
        with frozen(model), torch.no_grad():
            after = distribution(world, model, sample).mean
            try:
                alone = model.decoder(sample.z, Pass(model.decoder, condition=condition_of(model, sample)))[0].mean
            except Exception as error:
                require(said, f"{world.name}: reads_layers = False, but a code alone raised {type(error).__name__}: {error}.")
                continue
        reads = not alike(alone, after)
        require(
            reads == said, f"{world.name}: reads_layers = {said}, but layers {'change' if reads else 'do not change'} p(x|z)."
        )


@check(
    "encoder",
    "decoder",
    rule="what `run.norm(h, name, moments)` divides out is a mean and a positive standard deviation of the layer, and running "
    "statistics stay as they are in a pass that may not learn (run.learn = False).",
    cure="keep an ssl_ae.BatchMoments a layer and hand it to run.norm; it does both.",
)
def statistics(subject: Subject) -> None:
    for world, model in _alone(subject):
        model.train()
        component = world.part(model)
        before = {name: value.clone() for name, value in component.named_buffers()}
        run = Pass(model.decoder, learn=False)
        with torch.no_grad():
            distribution(world, model, world.sample(), run)
        for layer, (mean, std) in run.stats.items():
            right = bool(mean.isfinite().all()) and bool((std > 0).all()) and bool(std.isfinite().all())
            require(right, f"{world.name}: layer {layer!r} was divided by a deviation that is not positive, or not finite.")
        moved = [name for name, value in component.named_buffers() if not torch.equal(value, before[name])]
        require(not (run.stats and moved), f"{world.name}: a pass that may not learn changed {', '.join(moved)}.")


@check(
    "encoder",
    "decoder",
    "regularizer",
    rule="pictures(trace) gives ssl_ae.Tiles, Histogram or Lines of finite numbers, in evaluation mode and without gradients, "
    "and leaves the model as it was.",
    cure="yield ssl_ae.Tiles(name, title, weights (n, C, H, W)); take weights and trace as they are, change neither.",
)
def pictures(subject: Subject) -> None:
    for world, model in _alone(subject):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with frozen(model), torch.no_grad():
            trace = model(world.sample().batch(), frozenset({Need.RECONSTRUCTION, Need.CLEAN}))
            for picture in world.part(model).pictures(trace):
                try:
                    drawable.check(picture)
                except ValueError as error:
                    raise Finding(f"{world.name}: {error}") from error
            awake = any(module.training for module in model.modules())
        require(not awake, f"{world.name}: it put the model into training mode.")
        moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        require(not moved, f"{world.name}: it changed {', '.join(moved)}.")


@check(
    "head",
    rule="where convex(config) is true, p(y|z) is output(W z + b), affine() holds W, b and no other parameter is trained, l_Y is "
    "convex in W z + b, and gradient(p_y, batch) is its derivative there, with the weights of the rows.",
    cure="give `affine`, `output` and `gradient` of the same formula as `forward`, or leave `convex` out.",
)
def convex(subject: Subject) -> None:
    for world, model in _alone(subject):
        head, sample = model.head, world.sample()
        if not subject.cls.convex(head.config):
            continue
        affine, y = head.affine(), sample.y.clone()
        others = [name for name, p in head.named_parameters() if p is not affine.weight and p is not affine.bias]
        require(not others, f"{world.name}: it also trains {', '.join(others)}.")
        if y.dim() == 2:
            y[0, 0] = torch.nan
        batch = Batch(x=sample.z, y=y, weight_y=torch.linspace(0, 2, len(y)))

        def l_y(p_y: Distribution, batch: Batch = batch) -> Tensor:
            return supervised(Trace(model=None, batch=batch, p_y=p_y))

        same = torch.allclose(l_y(head(sample.z)), l_y(head.output(affine(sample.z))), rtol=1e-4, atol=1e-4)
        require(same, f"{world.name}: output(W z + b) is not what it predicts.")
        a, b = 3 * torch.randn(2, len(y), affine.out_features)
        between, ends = l_y(head.output((a + b) / 2)), (l_y(head.output(a)) + l_y(head.output(b))) / 2
        require(
            bool((between <= ends + 1e-3).all()), f"{world.name}: l_Y half-way between two values of W z + b is above theirs."
        )
        a.requires_grad_()
        (expected,) = torch.autograd.grad(l_y(head.output(a)).sum(), a)
        right = torch.allclose(head.gradient(head.output(a.detach()), batch), expected, rtol=1e-3, atol=1e-4)
        require(right, f"{world.name}: gradient is not what autograd finds.")


CHECKS: tuple[Check, ...] = (
    slices,
    unit_interval,
    squared_jacobian,
    differentiable,
    noisy,
    reads_decoder,
    reads_layers,
    statistics,
    pictures,
    convex,
)
