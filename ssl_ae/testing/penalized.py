"""Checks of regularizers, verb by verb."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from ssl_ae.components import Regularizer
from ssl_ae.model import Model, frozen
from ssl_ae.objective import StepMeans, Term, count_rows
from ssl_ae.randomness import seed_draws
from ssl_ae.testing.check import Check, check, require
from ssl_ae.testing.mapped import alike
from ssl_ae.testing.world import Subject, World
from ssl_ae.trace import Batch, Need, Over, Pass, Trace, matches

A_ROW = (Over.ROWS, Over.LABELED)


def penalty_of(world: World, model: Model, batch: Batch) -> Tensor:
    """The component's penalty of a batch, by the passes it asks for."""
    regularizer: Regularizer = world.part(model)
    if regularizer.over is Over.MODEL:
        return regularizer.penalty(Trace(model=model))
    means = StepMeans(count_rows([batch]), several=False) if Need.STEP_MEAN in regularizer.needs else None
    teacher = copy.deepcopy(model) if Need.TEACHER in regularizer.needs else None
    term = Term(regularizer.name, regularizer.penalty, regularizer.over, needs=regularizer.needs)
    return term.value(model(batch, regularizer.needs, means, teacher))


@check(
    "regularizer",
    rule="penalty(trace) is finite: one value a row, (B,), where `over` is ROWS or LABELED; one value, (), where STEP or MODEL.",
    cure="sum over every axis but the first for ROWS, or declare the `over` that you return; the engine divides and weighs.",
)
def penalty(subject: Subject) -> None:
    if "penalty" not in subject.cls.verbs:
        return
    for world in subject.worlds:
        model, batch = world.model(), world.sample().batch()
        value = penalty_of(world, model.train(), batch)
        expected = (len(batch),) if subject.cls.over in A_ROW else ()
        require(isinstance(value, Tensor), f"{world.name}: penalty returned {type(value).__name__}.")
        require(
            value.shape == expected,
            f"{world.name}: over = {subject.cls.over}; {len(batch)} rows gave shape {tuple(value.shape)}, expected {expected}.",
        )
        require(bool(value.isfinite().all()), f"{world.name}: the penalty is not finite.")


@check(
    "regularizer",
    rule="a penalty over rows is of each row alone: penalty(a ++ b) = penalty(a) ++ penalty(b).",
    cure="take no mean over rows; a function of a mean over the step is `over = STEP` with Need.STEP_MEAN and trace.step_mean.",
)
def penalty_row_law(subject: Subject) -> None:
    cls = subject.cls
    if "penalty" not in cls.verbs or cls.over not in A_ROW or Need.STEP_MEAN in cls.needs:
        return
    for world in subject.worlds:
        model, sample, cut = world.model(), world.sample(), 8
        with frozen(model):
            whole, again = (penalty_of(world, model, sample.batch()) for _ in range(2))
            if not torch.equal(whole, again):
                continue  # it draws random numbers, and other rows draw others
            parts = [penalty_of(world, model, part.batch()) for part in (sample[:cut], sample[cut:])]
        require(alike(whole, torch.cat(parts)), f"{world.name}: a row's penalty depends on the other rows of the batch.")


@check(
    "regularizer",
    rule="the penalty is differentiable: its gradient is finite and reaches parameters of the model or of its own.",
    cure="compute with the tensors of the trace, without .detach(), .item() or numpy; keep roots and logarithms away from 0.",
)
def penalty_gradient(subject: Subject) -> None:
    if "penalty" not in subject.cls.verbs:
        return
    for world in subject.worlds:
        model = world.model().train()
        value = penalty_of(world, model, world.sample().batch()).sum()
        require(value.requires_grad, f"{world.name}: the penalty has no gradient.")
        value.backward()
        reached = [p.grad for p in model.parameters() if p.grad is not None]
        require(bool(reached), f"{world.name}: the gradient reached no parameter.")
        require(all(bool(g.isfinite().all()) for g in reached), f"{world.name}: the gradient is not finite.")


@check(
    "regularizer",
    rule="perturb(h, layer) returns a tensor of h's shape, dtype and device, finite, and leaves h itself as it was.",
    cure="return a new tensor, as `h + torch.randn_like(h)` is; nothing in place, because l_X compares with the clean x.",
)
def perturb(subject: Subject) -> None:
    if "perturb" not in subject.cls.verbs:
        return
    for world in subject.worlds:
        model = world.model().train()
        regularizer: Regularizer = world.part(model)
        run = Pass(model.decoder)
        with torch.no_grad():
            model.encoder(run.tap(world.sample().x, "input"), run)
        layers = {name: h for name, h in run.taps.items() if matches(name, regularizer.layers)} or run.taps
        for name, h in ((name, h.to(dtype)) for name, h in layers.items() for dtype in (torch.float32, torch.bfloat16)):
            before = h.clone()
            after = regularizer.perturb(h, name)
            same = isinstance(after, Tensor) and (after.shape, after.dtype, after.device) == (h.shape, h.dtype, h.device)
            given, returned = (f"{tuple(t.shape)} {t.dtype}" if isinstance(t, Tensor) else str(t) for t in (h, after))
            require(same, f"{world.name}: layer {name!r}, {given}, became {returned}.")
            require(torch.equal(h, before), f"{world.name}: it changed layer {name!r} in place.")
            require(bool(after.isfinite().all()), f"{world.name}: layer {name!r} is not finite afterwards.")


@check(
    "regularizer",
    rule="in evaluation mode features are deterministic and, unless `always` is set, those of a model without the regularizer.",
    cure="`always = True` is for a change of what the input is (grey instead of colour), never for noise; else leave it out.",
)
def evaluation(subject: Subject) -> None:
    for world in subject.worlds:
        model, x = world.model(), world.sample().x
        bare = Model(model.encoder, model.decoder, model.head, list(model.regularizers)[1:])
        with frozen(model), torch.no_grad():
            features, again, without = model.features(x), model.features(x), bare.features(x)
        require(torch.equal(features, again), f"{world.name}: two evaluations of the same rows differ.")
        require(subject.cls.always or torch.equal(features, without), f"{world.name}: it changed the features.")


@check(
    "regularizer",
    rule="transform(batch, generator) returns a Batch of the same rows (x, target and soft may change, in value), "
    "draws from the generator it is given, and leaves the batch it was given as it was.",
    cure="return dataclasses.replace(batch, x=...) of the same shape; draw with torch.rand(..., generator=generator).",
)
def transform(subject: Subject) -> None:
    if "transform" not in subject.cls.verbs:
        return
    for world in subject.worlds:
        regularizer: Regularizer = world.part(world.model().train())
        batch = world.sample().batch()
        given = replace(batch, x=batch.x.clone(), target=batch.x.clone())
        results = []
        for seed in (1, 2):  # torch's own generator differs, the one handed over does not
            seed_draws(seed)
            results.append(regularizer.transform(given, torch.Generator().manual_seed(5)))
        after = results[0]
        require(isinstance(after, Batch), f"{world.name}: returned {type(after).__name__}, not a Batch.")
        require(after.x.shape == batch.x.shape, f"{world.name}: x {tuple(batch.x.shape)} became {tuple(after.x.shape)}.")
        require(after.target.shape == batch.x.shape, f"{world.name}: target became {tuple(after.target.shape)}.")
        for name in ("row", "y", "labeled", "uniform"):
            same = torch.equal(getattr(after, name), getattr(batch, name))
            require(same, f"{world.name}: it changed {name}, which says who the rows are.")
        require(torch.equal(given.x, batch.x), f"{world.name}: it changed x in place.")
        require(torch.equal(after.x, results[1].x), f"{world.name}: one generator state gave two results.")


@check(
    "regularizer",
    rule="project(model) keeps the shapes of the parameters and is idempotent: a second call changes nothing.",
    cure="bring parameters onto the constraint itself, in place (p.copy_(...)), not a step towards it.",
)
def project(subject: Subject) -> None:
    if "project" not in subject.cls.verbs:
        return
    for world in subject.worlds:
        model = world.model().train()
        regularizer: Regularizer = world.part(model)
        before = {name: p.shape for name, p in model.named_parameters()}
        with torch.no_grad():
            regularizer.project(model)
            once = {name: p.clone() for name, p in model.named_parameters()}
            regularizer.project(model)
        require({name: p.shape for name, p in once.items()} == before, f"{world.name}: it changed the shape of a parameter.")
        wild = [name for name, p in once.items() if not p.isfinite().all()]
        require(not wild, f"{world.name}: {', '.join(wild)} is not finite afterwards.")
        moved = [name for name, p in model.named_parameters() if not alike(p, once[name])]
        require(not moved, f"{world.name}: a second call changed {', '.join(moved)}.")


CHECKS: tuple[Check, ...] = (
    penalty,
    penalty_row_law,
    penalty_gradient,
    perturb,
    evaluation,
    transform,
    project,
)
