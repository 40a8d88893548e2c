"""The algebra: sums of terms, the one divisor, step means, and what is refused."""

import pytest
import torch
from engine_kit import cut, fresh, resolved, rows

from ssl_ae.errors import RecipeError
from ssl_ae.objective import RECONSTRUCTION, SUPERVISED, Objective, StepMeans, Term, Weight, count_rows
from ssl_ae.trace import Batch, Need, Over, Trace

STEP = torch.tensor(0)


def term(name="a", over=Over.ROWS, of=lambda trace: trace.batch.x[:, 0], **more):
    return Objective((Term(name, of, over, **more),))


def batch(x, **more):
    return Batch(x=torch.tensor(x, dtype=torch.float64).reshape(-1, 1), **more)


def flags(*values):
    return torch.tensor(values, dtype=torch.bool)


def total(objective, parts, step=STEP):
    """What the loop adds up over micro-batches."""
    counted = count_rows(parts)
    return float(sum(objective.weigh(objective.shares(Trace(model=None, batch=b), counted), step) for b in parts))


# --- algebra


def test_sums_and_multiples():
    b = batch([1.0, 2.0, 6.0])
    a, c = term("a"), term("c", of=lambda trace: trace.batch.x[:, 0] ** 2)
    assert total(a + 2.0 * (c + 0.5 * a), [b]) == pytest.approx(3.0 + 2 * (41 / 3 + 0.5 * 3.0), rel=1e-12)
    assert total(0.0 * a, [b]) == 0.0
    assert [t.weight.value for t in (3.0 * term(weight=Weight(0.5, 7))).terms] == [1.5]
    assert (3.0 * term(weight=Weight(0.5, 7))).terms[0].weight.warmup_steps == 7


def test_the_empty_objective_is_the_zero_of_the_algebra():
    a = term()
    assert (Objective() + a).terms == (a + Objective()).terms == a.terms
    assert total(Objective(), [batch([1.0])]) == 0.0


def test_terms_of_one_name_are_told_apart():
    assert [t.name for t in (term("a") + term("a") + term("b") + term("a")).terms] == ["a", "a-2", "b", "a-3"]


def test_needs_are_the_union():
    objective = term(needs=frozenset({Need.CLEAN})) + term(needs=frozenset({Need.VIEW})) + RECONSTRUCTION + SUPERVISED
    assert objective.needs == {Need.CLEAN, Need.VIEW, Need.RECONSTRUCTION, Need.LABEL_SUM, Need.PREDICTION}


def test_terms_of_parameters_are_apart():
    objective = term("a") + term("m", Over.MODEL) + term("s", Over.STEP)
    assert [t.name for t in objective.of_data.terms] == ["a", "s"]
    assert [t.name for t in objective.of_parameters.terms] == ["m"]


# --- the one divisor


def test_count_rows_over_uneven_parts():
    """Rows: 2 + 1 uniform of 5; labels: 0 + 2; two forward passes."""
    parts = [
        batch([1.0, 2.0, 3.0], uniform=flags(1, 1, 0), labeled=flags(0, 0, 0)),
        batch([4.0, 5.0], uniform=flags(0, 1), labeled=flags(1, 1)),
    ]
    counted = count_rows(parts)
    assert {over: int(value) for over, value in counted.items()} == {Over.ROWS: 3, Over.LABELED: 2, Over.STEP: 2, Over.MODEL: 1}


SPLITS = [[7], [1, 6], [3, 4], [1, 1, 5], [1] * 7]


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("over", [Over.ROWS, Over.LABELED])
def test_any_split_gives_the_mean_over_the_right_rows(sizes, over):
    x = torch.tensor([1.0, -2.0, 4.0, 8.0, 16.0, -32.0, 64.0], dtype=torch.float64)[:, None]
    uniform, labeled = flags(1, 1, 0, 1, 1, 1, 0), flags(0, 1, 1, 0, 0, 0, 1)
    whole = Batch(x=x, uniform=uniform, labeled=labeled)
    parts = cut(whole, torch.arange(7).split(sizes))
    mask = uniform if over is Over.ROWS else labeled
    assert total(term(over=over), parts) == pytest.approx(float(x[mask].mean()), rel=1e-12)


def test_a_step_term_is_the_mean_over_forward_passes():
    step = term(over=Over.STEP, of=lambda trace: trace.batch.x.sum())
    assert total(step, [batch([1.0, 2.0]), batch([9.0])]) == pytest.approx((3 + 9) / 2)


def test_a_batch_without_labels_gives_nothing_and_no_gradient():
    model = fresh(resolved())
    b = Batch(x=torch.from_numpy(rows(11)[0]))
    shares = SUPERVISED.shares(model(b, SUPERVISED.needs), count_rows([b]))
    assert shares.tolist() == [0.0]
    shares.sum().backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_what_is_not_a_number_outside_the_mask_is_left_out():
    b = batch([1.0, float("nan"), 3.0], labeled=flags(1, 0, 1))
    assert total(term(over=Over.LABELED), [b]) == 2.0


@pytest.mark.parametrize(
    ("over", "of"),
    [
        (Over.ROWS, lambda trace: trace.batch.x),
        (Over.ROWS, lambda trace: trace.batch.x.sum()),
        (Over.LABELED, lambda trace: trace.batch.x[:1, 0]),
        (Over.STEP, lambda trace: trace.batch.x[:, 0]),
        (Over.MODEL, lambda trace: trace.batch.x[:, 0]),
    ],
)
def test_a_term_of_the_wrong_shape_is_refused(over, of):
    with pytest.raises(RecipeError, match=f"term 'crooked' returned shape .* averaged over {over}"):
        total(term("crooked", over, of), [batch([1.0, 2.0, 3.0])])


def test_layers_that_no_pattern_fits_are_an_error():
    trace = Trace(model=None, taps={"input": torch.zeros(1), "h1": torch.zeros(1)})
    with pytest.raises(RecipeError, match=r"layers = \['g\*'\]: no layer of the model fits; it has input and h1"):
        trace.layers(["g*"])


# --- means over the whole step


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_a_function_of_the_mean_is_exact_in_value_and_gradient(sizes):
    """f(m) = (sum_j m_j^3) of the uniform rows' mean m; autograd of the bare formula over all rows is the reference."""
    torch.manual_seed(0)
    x = torch.randn(7, 2, dtype=torch.float64)
    uniform = flags(1, 1, 0, 1, 1, 1, 0)
    w = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    expected = (torch.tanh(x @ w)[uniform].mean(0) ** 3).sum()
    (gradient,) = torch.autograd.grad(expected, w)

    parts = [Batch(x=a, uniform=u) for a, u in zip(x.split(sizes), uniform.split(sizes), strict=True)]
    counted = count_rows(parts)
    means = StepMeans(counted, several=len(parts) > 1)

    def value(part):
        means.begin()
        return (means(torch.tanh(part.x @ w), part.uniform) ** 3).sum()

    if len(parts) > 1:
        means.collecting = True
        for part in parts:
            value(part)
        means.finish_collecting()
    found = sum(value(part) / counted[Over.STEP] for part in parts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found, w)[0], gradient, rtol=1e-10, atol=1e-14)
