"""finetune.solver: a linear head on stored latents at its minimum, and where that is refused."""

import csv
import json

import numpy as np
import pyarrow.dataset
import pytest
from command_line import call, one_line, snapshot, spawn
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression

DECAY = 1e-3
SOLVED = {
    "finetune.solver": {"name": "lbfgs", "tolerance": 1e-6},
    "finetune.optimizer": {"weight_decay": DECAY},
    "data.labels": "all",
}


def stage_of(run, answer):
    return run / "finetune" / answer["method"]


def stored(run, split):
    table = pyarrow.dataset.dataset(run / "latents" / split).to_table()
    return np.stack(table["latent"].to_numpy()).astype(np.float64), table["label"].to_numpy()


def test_the_head_is_scikit_learns(recipe, finetuned):
    answer = call("finetune", recipe(SOLVED), "--json")
    metrics, stage = answer.json["metrics"], stage_of(finetuned, answer.json)
    z, y = stored(finetuned, "train")
    theirs = LogisticRegression(C=1 / (len(y) * DECAY), tol=1e-8, max_iter=10_000).fit(z, y)
    weights = load_file(stage / "model.safetensors")
    theirs_l_y = -theirs.predict_log_proba(z)[np.arange(len(y)), y].mean()
    assert metrics["train/supervised"] == pytest.approx(theirs_l_y, abs=1e-5)
    np.testing.assert_allclose(weights["head.linear.weight"], theirs.coef_, atol=1e-3 * np.abs(theirs.coef_).max())
    assert metrics["train/gradient"] <= 1e-6
    # and the frozen rest is the pretrained one
    before = load_file(finetuned / "pretrain" / "model.safetensors")
    assert all(np.array_equal(weights[name], value) for name, value in before.items())
    found = call("evaluate", finetuned, "--split", "val", "--method", answer.json["method"], "--json").json["metrics"]
    z, y = stored(finetuned, "val")
    assert found["accuracy"] == pytest.approx(theirs.score(z, y), abs=1 / 144)  # one row at the edge
    assert found["accuracy"] == pytest.approx(metrics["val/accuracy"])


def test_every_pass_is_a_step_of_the_metrics(recipe, finetuned):
    answer = call("finetune", recipe(SOLVED), "--json")
    stage = stage_of(finetuned, answer.json)
    lines = [json.loads(line) for line in (stage / "journal" / "rank-0.jsonl").read_text().splitlines()]
    told = [(line["step"], line["values"]) for line in lines if "train/gradient" in line.get("values", {})]
    assert [step for step, _ in told] == list(range(1, len(told) + 1))
    assert told[0][1]["train/supervised"] == pytest.approx(np.log(10), rel=1e-6)
    assert {line["step"] for line in lines if "val/supervised" in line.get("values", {})} == {len(told)}
    assert f" after {len(told)} passes  val/supervised " in answer.stderr
    assert (stage / "figures" / "learning_curves.png").exists()


def test_it_depends_on_nothing_but_the_latents_and_labels(recipe, finetuned):
    """Neither epochs nor the learning rate; twice is the same to the bit; and what steps train is not touched by it."""
    before = snapshot(finetuned / "finetune" / "sequential")
    first = call("finetune", recipe(SOLVED), "--json").json
    again = {**SOLVED, "finetune.epochs": 1, "finetune.optimizer": {"lr": 0.5, "weight_decay": DECAY}}
    other = call("finetune", recipe(again), "--json").json
    assert first["method"] != other["method"]
    heads = [load_file(stage_of(finetuned, answer) / "model.safetensors") for answer in (first, other)]
    assert all(np.array_equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert snapshot(finetuned / "finetune" / "sequential") == before


def test_both_solvers_share_their_baselines(recipe, finetuned):
    before = snapshot(finetuned / "baselines")
    assert call("finetune", recipe({"finetune.solver": {"name": "lbfgs"}})).code == 0
    assert snapshot(finetuned / "baselines") == before


def test_few_labels_without_decay_have_no_minimum(recipe, finetuned):
    answer = call("finetune", recipe({"finetune.solver": {"name": "lbfgs"}, "data.labels": {"per_class": 1}}), "--json").json
    assert any("so l_Y has no minimum" in warning for warning in answer["warnings"])
    fields = {**SOLVED, "data.labels": {"per_class": 1}}
    answer = call("finetune", recipe(fields), "--json").json
    assert not any("minimum" in warning for warning in answer["warnings"])


def test_too_few_passes_are_told(recipe, finetuned):
    answer = call("finetune", recipe({**SOLVED, "finetune.solver": {"name": "lbfgs", "max_passes": 2}}), "--json").json
    (warning,) = [warning for warning in answer["warnings"] if "solver" in warning]
    assert warning.startswith("the solver stopped at a gradient of ")
    assert "Raise finetune.solver.max_passes" in warning


def test_weights_of_labels_count(recipe, finetuned, here):
    """Labels of weight 0 teach nothing: with some of them wrong, the head is that of the others, by scikit-learn."""
    keys = pyarrow.dataset.dataset(finetuned / "latents" / "train").to_table()["key"].to_pylist()
    z, y = stored(finetuned, "train")
    wrong = np.arange(len(y)) % 3 == 0
    with open(here / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "label", "weight"])
        names = [str((label + 1) % 10) if bad else str(label) for label, bad in zip(y, wrong, strict=True)]
        writer.writerows(zip(keys, names, np.where(wrong, 0.0, 1.5), strict=True))
    answer = call("finetune", recipe({**SOLVED, "data.labels": "labels.csv"}), "--json").json
    weights = load_file(stage_of(finetuned, answer) / "model.safetensors")
    theirs = LogisticRegression(C=1.5 / (len(y) * DECAY), tol=1e-8, max_iter=10_000).fit(z[~wrong], y[~wrong])
    np.testing.assert_allclose(weights["head.linear.weight"], theirs.coef_, atol=1e-3 * np.abs(theirs.coef_).max())


def test_two_ranks_solve_the_same_head(recipe, finetuned):
    fields = {**SOLVED, "finetune.baselines": False}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ssl_ae")
    two = spawn("finetune", recipe(fields), "--json", launcher=launcher).json
    head = load_file(stage_of(finetuned, two) / "model.safetensors")
    one = call("finetune", recipe(fields), "--restart", "--json").json
    assert one["metrics"]["val/accuracy"] == pytest.approx(two["metrics"]["val/accuracy"])
    again = load_file(stage_of(finetuned, one) / "model.safetensors")
    assert all(np.array_equal(head[name], again[name]) for name in head)


# --- where it is refused


@pytest.mark.parametrize("mode", ["joint", "alternate", "end-to-end"])
def test_modes_that_train_the_encoder(recipe, mode):
    path = recipe(SOLVED)
    assert one_line("finetune", path, f"--{mode}") == (
        f"{path}: finetune.solver.name = lbfgs: brings a head on stored latents to its minimum, so finetune.mode must be "
        f"sequential, not {mode}. Set finetune.mode: sequential, or finetune.solver.name: steps."
    )


def test_a_head_that_is_not_convex(recipe):
    path = recipe({**SOLVED, "model.head": {"name": "mlp"}})
    assert one_line("finetune", path) == (
        f"{path}: finetune.solver.name = lbfgs: needs a head for which l_Y is convex and linear in the code; builtins/mlp with "
        "these options is not. Take softmax, bernoulli, or gaussian with variance: unit; or set finetune.solver.name: steps."
    )


def test_a_table_head(recipe):
    message = one_line("finetune", recipe({**SOLVED, "model.head": {"name": "knn"}}))
    assert "head builtins/knn is fitted in a way of its own. Set finetune.solver.name: steps, its default." in message


def test_early_stopping(recipe):
    message = one_line("finetune", recipe({**SOLVED, "finetune.early_stopping": {"patience": 2}}))
    assert "a head at its minimum has no epochs to stop after" in message


def test_a_solver_that_does_not_exist(recipe):
    path = recipe({"finetune.solver": {"name": "lbfg"}})
    assert one_line("finetune", path) == (f'{path}: finetune.solver.name = "lbfg": expected steps or lbfgs. Did you mean lbfgs?')
