"""label-curve: the same draws for everyone, cells that are what the ordinary commands make, and nothing made twice."""

import itertools
import json
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from command_line import call, one_line, spawn, start, with_fields, write_yaml
from conftest import TINY
from matplotlib.figure import Figure
from PIL import Image
from sklearn.decomposition import PCA
from ssl_ae_builtins.image_spreading import ImageLabelSpreading
from ssl_ae_builtins.label_spreading import LabelSpreading

from ssl_ae.data.dataset import DataSet
from ssl_ae.errors import NonFiniteError
from ssl_ae.stages import label_curve
from ssl_ae.stages.labels import labels_of
from ssl_ae.stages.workspace import open_workspace
from ssl_ae.trace import Shapes

NOISY = {"model.regularizers": [{"name": "kl"}, {"name": "gaussian_noise", "scale": 0.1}]}
CONTROLS = ["labels-only", "labels-only-augmented", "pca-logistic", "pca-label_spreading"]
FIGURES = ["accuracy", "error", "nll", "ece"]
ASKED = ("--labels", "20,10", "--seeds", "2", "--jobs", "1")


@pytest.fixture(scope="module")
def finished_curve(tmp_path_factory, digits, quick_pictures) -> Path:
    """A folder in which TINY with noise has its curve, rendered: 2 numbers of labels, 2 draws, 5 lines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", quick_pictures)
        patch.setenv("SSL_AE_TRACKING", "journal")
        folder = tmp_path_factory.mktemp("curve")
        patch.chdir(folder)
        path = write_yaml(folder / "recipe.yaml", with_fields(TINY, {"data.path": str(digits), **NOISY}))
        answer = call("label-curve", path, *ASKED, "--json")
        (folder / "answer.json").write_text(json.dumps(answer.json))
        (folder / "stderr.txt").write_text(answer.stderr)
    return folder


@pytest.fixture
def curve(finished_curve, here) -> Path:
    """A copy of its run under the current folder, and the recipe beside it."""
    shutil.copy(finished_curve / "recipe.yaml", here / "recipe.yaml")
    return shutil.copytree(finished_curve / "runs" / "tiny", here / "runs" / "tiny")


def table_of(run: Path) -> dict[tuple, dict[str, float]]:
    """{(labels, seed, method): figures}, without the time they took."""
    rows = pq.read_table(run / "label_curve.parquet").to_pylist()
    return {(row["labels"], row["seed"], row["method"]): {name: row[name] for name in FIGURES} for row in rows}


def test_the_table(finished_curve):
    table = pq.read_table(finished_curve / "runs/tiny/label_curve.parquet")
    assert table.column_names == ["labels", "seed", "method", "split", "rows", *FIGURES, "seconds"]
    assert {row["split"] for row in table.to_pylist()} == {"val"}
    assert {row["rows"] for row in table.to_pylist()} == {144}
    assert list(table_of(finished_curve / "runs/tiny")) == [
        (labels, seed, method) for method in ("sequential", *CONTROLS) for labels in (10, 20) for seed in (0, 1)
    ]
    for row in table.to_pylist():
        assert row["error"] == pytest.approx(1 - row["accuracy"])
        assert row["seconds"] > 0


def test_the_answer(finished_curve):
    answer, stderr = json.loads((finished_curve / "answer.json").read_text()), (finished_curve / "stderr.txt").read_text()
    found = table_of(finished_curve / "runs/tiny")
    assert (answer["status"], answer["split"], answer["rows"], answer["cells"]) == ("done", "val", 144, 20)
    assert (answer["methods"], answer["controls"]) == (["sequential"], CONTROLS)
    ours = {n: [found[n, seed, "sequential"]["accuracy"] for seed in (0, 1)] for n in (10, 20)}
    assert answer["metrics"]["sequential/labels-20/accuracy"] == pytest.approx(np.mean(ours[20]))
    for comparison in answer["comparisons"]:
        theirs = [found[comparison["labels"], seed, comparison["control"]]["accuracy"] for seed in (0, 1)]
        differences = np.subtract(ours[comparison["labels"]], theirs)
        assert comparison["difference"]["mean"] == pytest.approx(differences.mean())
        assert comparison["difference"]["sd"] == pytest.approx(differences.std(ddof=1))
    # the code of 2 epochs is worth little, and the user is told so in a sentence
    best = max(CONTROLS, key=lambda name: np.mean([found[20, seed, name]["accuracy"] for seed in (0, 1)]))
    assert best == "pca-label_spreading"
    assert any("sequential is" in told and f"than {best}, which has no network" in told for told in answer["warnings"])
    assert any(told.startswith("the unlabelled data did not help sequential at") for told in answer["warnings"])
    assert f"{100 * np.mean(ours[10]):.1f} ± {100 * np.std(ours[10], ddof=1):.1f}" in stderr
    markdown = Path(finished_curve / answer["outputs"]["text"]).read_text()
    assert "| labels-only-augmented (control) |" in markdown
    assert all(told in markdown for told in answer["warnings"])
    with Image.open(finished_curve / answer["outputs"]["figure"]) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 100


def test_a_log_loss_that_is_infinite_is_no_text(curve):
    """A class that no label showed has probability 0: JSON keeps that as null."""
    cell = next((curve / "cells/pca-logistic").glob("labels-10-seed-0-*.json"))
    record = json.loads(cell.read_text())
    record["scores"]["nll"] = None
    cell.write_text(json.dumps(record))
    assert call("label-curve", "recipe.yaml", *ASKED).code == 0
    table = pq.read_table(curve / "label_curve.parquet")
    assert str(table.schema.field("nll").type) == "double"
    found = table_of(curve)
    assert np.isnan(found[10, 0, "pca-logistic"]["nll"])
    assert np.isfinite(found[10, 1, "pca-logistic"]["nll"])


def test_mlflow_hears_of_the_curve_and_not_of_its_cells(finished_curve):
    run = finished_curve / "runs/tiny"
    assert {path.parent.parent.name for path in run.rglob("rank-0.jsonl")} == {"tiny", "pretrain", "latents", "label_curve"}
    events = [json.loads(line) for line in (run / "label_curve/journal/rank-0.jsonl").read_text().splitlines()]
    metrics = {(name, e["step"]): value for e in events if e["event"] == "metrics" for name, value in e["values"].items()}
    found = table_of(run)
    assert metrics["val/pca-logistic/nll/draw-1", 20] == found[20, 1, "pca-logistic"]["nll"]
    ours = [found[10, seed, "sequential"]["accuracy"] for seed in (0, 1)]
    assert metrics["val/sequential/accuracy", 10] == pytest.approx(np.mean(ours))
    assert metrics["val/sequential/accuracy_sd", 10] == pytest.approx(np.std(ours, ddof=1))
    artifacts = [e["path"] for e in events if e["event"] == "artifact"]
    assert artifacts[-3:] == ["label_curve.parquet", "label_curve.png", "label_curve.md"]


def test_cells_are_what_the_commands_make(curve, here):
    """`finetune` with the same labels: its model, its labels-only networks and its PCA have the figures of the cells."""
    assert call("finetune", "recipe.yaml", "--labels", 20, "--set", "data.labels.seed=1", "--json").code == 0
    found = table_of(curve)
    metrics = json.loads((curve / "finetune/sequential/metrics.json").read_text())
    for name in FIGURES:
        assert found[20, 1, "sequential"][name] == metrics[f"val/{name}"]
        for control in CONTROLS[:3]:
            assert found[20, 1, control][name] == metrics[f"val/{control}/{name}"], control


def test_label_spreading_on_pca(curve, digits):
    """Against scikit-learn's components, up to a row that rounding moves."""
    data = DataSet.open(digits)
    x = {split: data.split(split).read(np.arange(data.split(split).rows)).reshape(-1, 64) / 16 for split in ("train", "val")}
    pca = PCA(5, svd_solver="full").fit(x["train"])
    with open_labels(20, 0) as ws:
        y = torch.from_numpy(labels_of(ws).y)
    head = LabelSpreading(LabelSpreading.Config(), Shapes(x=(5,), latent=5, classes=10, targets=None))
    head.fit(torch.from_numpy(pca.transform(x["train"])).float(), y)
    right = head.predict(torch.from_numpy(pca.transform(x["val"])).float()).probs.argmax(1).numpy() == data.labels("val")
    assert table_of(curve)[20, 0, "pca-label_spreading"]["accuracy"] == pytest.approx(right.mean(), abs=1.01 / 144)


def open_labels(total, seed):
    from ssl_ae import recipe as recipes
    from ssl_ae.progress import Reporter

    chosen = recipes.with_fields(recipes.load("recipe.yaml"), {"data.labels": {"total": total, "seed": seed}})
    return open_workspace(chosen, Path("runs/labels"), reporter=Reporter(silent=True))


def test_what_is_made_is_not_made_again(curve):
    before = table_of(curve)
    cells = {path: path.stat().st_mtime_ns for path in (curve / "cells").rglob("*.json")}
    again = call("label-curve", "recipe.yaml", *ASKED, "--json")
    assert again.json["status"] == "skipped"
    lost = sorted(cells)[::7]
    for path in lost:
        path.unlink()
    lost[0].with_suffix("").mkdir()  # a cell that was under way
    sorted(cells)[1].write_text("{")  # and one whose file somebody damaged
    (curve / "label_curve.parquet").unlink()
    answer = call("label-curve", "recipe.yaml", *ASKED, "--json")
    assert answer.json["status"] == "done"
    assert f"label-curve: 20 cells, {len(lost) + 1} to make" in answer.stderr
    assert table_of(curve) == before
    assert not [path for path in (curve / "cells").glob("*/*") if path.is_dir()]
    untouched = set(cells) - {*lost, sorted(cells)[1]}
    assert all(path.stat().st_mtime_ns == cells[path] for path in untouched)


def test_other_options_are_other_cells(curve):
    """Fewer and more of what was asked; and where an option changes, what does not read it stays."""
    fewer = call("label-curve", "recipe.yaml", "--labels", "10", "--seeds", "1-1", "--jobs", "1", "--json")
    assert (fewer.json["status"], fewer.json["cells"]) == ("skipped", 5)
    assert {key[:2] for key in table_of(curve)} == {(10, 1)}
    words = ["--labels", "10", "--seeds", "1-1", "--jobs", "1", "--set", "finetune.epochs=1"]
    changed = call("label-curve", "recipe.yaml", *words, "--json")
    assert "label-curve: 5 cells, 3 to make" in changed.stderr  # not those on PCA
    refused = call("label-curve", "recipe.yaml", *ASKED, "--set", "pretrain.epochs=1")
    assert refused.code == 2
    assert "pretrain.epochs: 2 -> 1" in refused.stderr


def test_controls_may_come_later(curve):
    words = ["--labels", "10,20", "--seeds", 2, "--jobs", 1]
    alone = call("label-curve", "recipe.yaml", *words, "--no-controls", "--json")
    assert (alone.json["controls"], alone.json["cells"]) == ([], 4)
    assert "method less control" not in alone.stderr
    assert call("label-curve", "recipe.yaml", *words, "--json").json["cells"] == 20


def test_side_by_side_is_the_same_as_one_after_another(curve, here):
    before = table_of(curve)
    for cell in (curve / "cells").glob("*/labels-20-seed-1-*.json"):
        cell.unlink()
    answer = call("label-curve", "recipe.yaml", "--labels", "10,20", "--seeds", 2, "--jobs", 2, "--json")
    assert "5 to make, 2 at a time" in answer.stderr
    assert table_of(curve) == before  # every bit


def test_modes_and_the_test_split_by_name(curve):
    words = ["--labels", "20", "--seeds", "1", "--jobs", "1", "--methods", "joint-alpha0.1,sequential-knn", "--split", "test"]
    answer = call("label-curve", "recipe.yaml", *words, "--json").json
    assert (answer["methods"], answer["rows"], answer["split"]) == (["joint-alpha0.1", "sequential-knn"], 355, "test")
    assert call("finetune", "recipe.yaml", "--labels", 20, "--joint", "--alpha", 0.1).code == 0
    theirs = call("evaluate", "runs/tiny", "--split", "test", "--json").json
    found = {key[2]: value for key, value in table_of(curve).items()}
    assert found["joint-alpha0.1"] == pytest.approx(theirs["metrics"], abs=0)
    assert found["pca-logistic"] == pytest.approx(theirs["baselines"]["pca-logistic"], abs=0)


def test_stages_that_build_on_one_another_are_one_method(curve, here, digits):
    """All of the recipe, as `run` makes it, judged by what is finetuned last."""
    stages = [
        "pretrain", "extract", {"stage": "finetune", "set": {"finetune.mode": "joint"}}, "extract",
        {"stage": "finetune", "set": {"model.head": {"name": "knn"}}}, "evaluate",
    ]  # fmt: skip
    path = write_yaml(here / "rounds.yaml", with_fields(TINY, {"data.path": str(digits), **NOISY, "stages": stages}))
    answer = call("label-curve", path, "--labels", "20", "--seeds", "1", "--jobs", "1", "--json").json
    assert answer["methods"] == ["recipe"]
    ran = call("run", path, "--set", "data.labels={total: 20, seed: 0}", "--json").json
    assert ran["method"] == "sequential"
    metrics = json.loads((curve / "finetune/sequential/metrics.json").read_text())
    assert answer["metrics"]["recipe/labels-20/accuracy"] == metrics["val/accuracy"]


def test_a_head_that_is_fitted_at_once(curve, here):
    """Its own options on PCA; the labels-only networks take the default head and train as long as the autoencoder."""
    words = ["--labels", "20", "--seeds", "1", "--jobs", "1", "--set", "model.head={name: label_spreading, k: 3}"]
    answer = call("label-curve", "recipe.yaml", *words, "--json").json
    assert (answer["methods"], answer["controls"]) == (["sequential"], CONTROLS)
    other = call("label-curve", "recipe.yaml", "--labels", "20", "--seeds", "1", "--jobs", "1", "--json").json["metrics"]
    name = "labels-only/labels-20/accuracy"  # pretrain and finetune have the same epochs and batches here
    assert answer["metrics"][name] == other[name]
    assert answer["metrics"]["pca-label_spreading/labels-20/accuracy"] != other["pca-label_spreading/labels-20/accuracy"]
    assert "must be sequential" in one_line("label-curve", "recipe.yaml", *words, "--methods", "joint")


def test_a_head_that_compares_samples_does_so_on_components_too(curve, here, digits):
    """It is its own control; as another recipe's, it would ask for memory that nobody spoke of."""
    words = ["--labels", "20", "--seeds", "1", "--jobs", "1", "--set", "model.head={name: image_label_spreading, candidates: 11}"]
    answer = call("label-curve", "recipe.yaml", *words, "--json").json
    assert answer["controls"] == [*CONTROLS, "pca-image_label_spreading"]
    data = DataSet.open(digits)
    x = {split: data.split(split).read(np.arange(data.split(split).rows)).reshape(-1, 64) / 16 for split in ("train", "val")}
    z = {split: torch.from_numpy(PCA(5, svd_solver="full").fit(x["train"]).transform(x[split])).float() for split in x}
    with open_labels(20, 0) as ws:
        y = torch.from_numpy(labels_of(ws).y)
    shapes = Shapes(x=(1, 8, 8), latent=5, classes=10, targets=None)
    head = ImageLabelSpreading(ImageLabelSpreading.Config(candidates=11), shapes)
    head.fit(z["train"], y, torch.from_numpy(x["train"]).float())
    right = head.predict(z["val"]).probs.argmax(1).numpy() == data.labels("val")
    assert answer["metrics"]["pca-image_label_spreading/labels-20/accuracy"] == pytest.approx(right.mean(), abs=1.01 / 144)


# --- labels, and what is refused


@dataclass(frozen=True)
class Probe:
    """A method that learns nothing and remembers which rows it could have learned from."""

    name: str = "probe"
    control = False
    stages = ()

    def fields(self, ws):
        return {}

    def scores(self, curve, recipe, folder):
        with open_workspace(recipe, folder, published=False) as ws:
            labels = labels_of(ws)
            seen = np.flatnonzero(labels.known)
            with open("seen.txt", "a") as file:
                file.write(json.dumps([recipe.data.labels.total, recipe.data.labels.seed, seen.tolist()]) + "\n")
            counts = np.bincount(labels.y[seen], minlength=10)
            if Path("ask").exists() and len(Path("seen.txt").read_text().splitlines()) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            if Path("fail").exists():
                raise NonFiniteError("no number.")
            return {"accuracy": counts.min() / counts.max(), "error": 0.0}


@pytest.fixture
def probe(monkeypatch, curve):
    """A curve of the probe alone, on the run that is pretrained."""
    monkeypatch.setattr(label_curve, "methods_of", lambda recipe, wanted, registry: [Probe()])
    monkeypatch.setattr(label_curve, "controls_of", lambda resolved, registry, source: [])
    return lambda *words: call("label-curve", "recipe.yaml", "--jobs", "1", *words)


def drawn() -> dict[tuple[int, int], set[int]]:
    found = map(json.loads, Path("seen.txt").read_text().splitlines())
    return {(total, seed): set(rows) for total, seed, rows in found}


def test_draws_are_balanced_nested_and_the_same_for_all(probe, finished_curve):
    answer = probe("--labels", "10,20,50", "--seeds", "2", "--json").json
    seen = drawn()
    for seed in (0, 1):
        for few, more in itertools.pairwise((10, 20, 50)):
            assert len(seen[few, seed]) == few
            assert seen[few, seed] < seen[more, seed]
    assert seen[50, 0] != seen[50, 1]
    assert {value for name, value in answer["metrics"].items()} == {1.0}  # as many of each class


def test_fewer_labels_than_classes_are_allowed_aloud(probe):
    answer = probe("--labels", "7,20", "--seeds", "1", "--json")
    assert "7 labels for 10 classes: some classes have no label in such a draw" in answer.json["warnings"][0]
    assert len(drawn()[7, 0]) == 7


def test_asked_to_stop_it_says_how_to_go_on(probe):
    Path("ask").touch()
    stopped = probe("--labels", "10,20", "--seeds", "4")
    assert stopped.code == 75
    assert "stopped; 3 of 8 cells are made. Run the same command to go on." in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert probe("--labels", "10,20", "--seeds", "4", "--json").json["status"] == "done"
    seen = [line[:2] for line in map(json.loads, Path("seen.txt").read_text().splitlines())]
    assert sorted(seen) == [[total, seed] for total in (10, 20) for seed in range(4)]  # each once


def test_a_cell_that_fails_is_named_and_what_is_made_stays(probe):
    words = ("--labels", "10,20", "--seeds", "1")
    assert probe("--labels", "10", "--seeds", "1").code == 0
    Path("fail").touch()
    failed = probe(*words)
    assert (failed.code, failed.stderr.splitlines()[-1]) == (1, "error: probe on 20 labels, draw 0: no number.")
    Path("fail").unlink()
    assert "2 cells, 1 to make" in probe(*words).stderr
    assert "1 cells, 1 to make" in probe("--labels", "10", "--seeds", "1", "--restart").stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels", "10,ten"], "--labels 10,ten: 'ten' is no whole number of at least 1; give some, as in --labels 10,30,100."),
        (["--labels", "0,10"], "--labels 0,10: '0' is no whole number of at least 1"),
        (["--labels", "-5"], "--labels -5: '-5' is no whole number"),
        (["--labels", ","], "--labels ,: ',' is no whole number"),
        (["--labels", "1e3"], "'1e3' is no whole number"),
        (["--labels", "10", "--seeds", "0"], "--seeds 0: expected how many draws, at least 1, or a range such as 20-29."),
        (["--labels", "10", "--seeds", "7-3"], "--seeds 7-3: expected how many draws"),
        (["--labels", "10", "--seeds", "many"], "--seeds many: expected how many draws"),
        (["--labels", "10", "--split", "train"], "--split train: expected val or test."),
        (["--labels", "10", "--methods", "jiont"], "--methods jiont: expected some of sequential, joint, alternate, end-to-end"),
        (["--labels", "10", "--methods", "sequential-nkn"], "sequential-HEAD for another head"),
        (["--labels", "10", "--methods", "alternate-alpha1"], "--methods alternate-alpha1: expected"),
        (["--labels", "10", "--methods", "joint-knn"], "finetune.mode must be sequential, not joint"),
        (["--labels", "10", "--methods", ","], "--methods ',': expected names of modes"),
        (["--labels", "10,90000"], "class '0' has 130 labels in the train split, but 9000 are asked"),
        (["--labels", "10", "--set", "stages=[pretrain]"], "stages: the recipe has no finetune stage"),
        (
            ["--labels", "10", "--set", "stages=[{stage: finetune, set: {data.labels: {total: 7}}}]"],
            "stages: finetune sets data.labels, and a label curve draws the labels itself",
        ),
        (["--labels", "10", "--set", "model.head.name=knn", "--methods", "joint"], "finetune.mode must be sequential, not joint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_before_anything_is_trained(recipe, here, words, message):
    assert message in one_line("label-curve", recipe(), *words)


def test_data_without_labels_is_refused(recipe, here, unlabelled):
    path = recipe({"data.path": "vectors", "model.decoder.likelihood": "gaussian", "data.labels": "all"})
    assert "vectors has no labels to draw from" in one_line("label-curve", path, "--labels", "10")


# --- stopped and killed


LONG = {**NOISY, "finetune.epochs": 40, "finetune.mode": "joint"}
CELLS = 15  # three draws of one number of labels


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_workers_and_all_it_goes_on_to_the_same_table(recipe, here, number):
    """Each cell is made once, the one that was under way goes on, and no worker outlives its parent."""
    path = recipe(LONG)
    words = ["label-curve", path, "--labels", "20", "--seeds", "3", "--jobs", "2"]
    with start(*words) as process:
        end = time.monotonic() + 120
        while len(list(here.glob("runs/tiny/cells/*/*.json"))) < 4 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == (-number if number is signal.SIGKILL else 75)
    assert "Traceback" not in stderr
    assert len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=10)[1]
    made = {path: path.stat().st_mtime_ns for path in here.glob("runs/tiny/cells/*/*.json")}
    assert 4 <= len(made) < CELLS
    if number is not signal.SIGKILL:
        assert f"of {CELLS} cells are made. Run the same command to go on." in stderr
    assert spawn(*words).code == 0
    assert all(path.stat().st_mtime_ns == before for path, before in made.items())
    shutil.copytree(here / "runs/tiny", here / "once", ignore=shutil.ignore_patterns("cells", "label_curve*"))
    assert call("label-curve", path, "--labels", "20", "--seeds", "3", "--jobs", "1", "--out", "once").code == 0
    assert table_of(here / "runs/tiny") == table_of(here / "once")


@pytest.mark.slow
def test_ranks_share_the_cells(recipe, here):
    words = ["--labels", "10,20", "--seeds", "2"]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ssl_ae")
    answer = spawn("label-curve", recipe(NOISY), *words, "--jobs", "1", "--json", launcher=launcher)
    assert answer.json["cells"] == 20
    shutil.copytree(here / "runs/tiny", here / "once", ignore=shutil.ignore_patterns("cells", "label_curve*"))
    assert call("label-curve", recipe(NOISY), *words, "--jobs", "1", "--out", "once").code == 0
    assert table_of(here / "runs/tiny") == table_of(here / "once")


@pytest.mark.slow
def test_in_mlflow(recipe, here, monkeypatch):
    """One run for the curve, under the run folder's, with the cells as metrics over the number of labels."""
    from mlflow import MlflowClient

    monkeypatch.delenv("SSL_AE_TRACKING")
    answer = spawn("label-curve", recipe(NOISY), "--labels", "10,20", "--seeds", "1", "--jobs", "1", "--json").json
    client = MlflowClient(f"sqlite:///{here}/runs/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"tiny", "pretrain", "extract", "label-curve"}
    ours = runs["label-curve"]
    assert ours.info.run_id == answer["mlflow_run_id"]
    assert ours.data.tags["mlflow.parentRunId"] == runs["tiny"].info.run_id
    history = client.get_metric_history(ours.info.run_id, "val/pca-logistic/accuracy")
    found = table_of(here / "runs/tiny")
    assert {(m.step, m.value) for m in history} == {(n, found[n, 0, "pca-logistic"]["accuracy"]) for n in (10, 20)}
    names = {artifact.path for artifact in client.list_artifacts(ours.info.run_id)}
    assert names >= {"label_curve.parquet", "label_curve.png", "label_curve.md"}
