"""search: what is nearest to a sample of the run or to a file, for real codes, bits and symbols; and precision by label."""

import json
import shutil

import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from command_line import call, one_line
from PIL import Image

from ssl_ae.data.dataset import DataSet

KINDS = {
    "real": {"name": "mlp", "widths": [17], "posterior": "diag"},
    "bits": {"name": "hash", "widths": [17], "noise": 1.0, "anneal_steps": 10},
    "drawn": {"name": "hash", "widths": [17], "sampling": "gumbel"},
    "symbols": {"name": "hash", "widths": [17], "sampling": "gumbel", "levels": 4},
}
K = 20


@pytest.fixture(scope="module")
def made(tmp_path_factory, digits):
    """A pretrained run of each kind of code, two epochs each."""
    folder = tmp_path_factory.mktemp("search")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_AE_TRACKING", "journal")
        patch.chdir(folder)
        for kind, encoder in KINDS.items():
            tree = {
                "name": kind,
                "data": {"path": str(digits)},
                "model": {"latent_dim": K, "encoder": encoder, "decoder": {"name": "mlp", "likelihood": "bernoulli"}},
                "pretrain": {"epochs": 2, "batch_size": 64},
                "device": "cpu",
            }
            (folder / f"{kind}.yaml").write_text(json.dumps(tree))  # JSON is YAML
            assert call("pretrain", f"{kind}.yaml").code == 0
            assert call("extract", f"runs/{kind}").code == 0
    return folder / "runs"


@pytest.fixture(params=list(KINDS))
def run(request, made, here):
    return shutil.copytree(made / request.param, here / "runs" / request.param)


@pytest.fixture
def bits(made, here):
    return shutil.copytree(made / "bits", here / "runs" / "bits")


def table(run, split):
    return pyarrow.dataset.dataset(run / "latents" / split).to_table().to_pydict()


def distances(run, z, codes):
    """(N,) as the kind of code compares, written out."""
    z, codes = np.array(z), np.array(codes)
    if run.name == "real":
        return np.sqrt(np.square(codes.astype(float) - z).sum(1))
    if run.name == "symbols":
        return (codes.reshape(-1, K // 4, 4).argmax(2) != z.reshape(K // 4, 4).argmax(1)).sum(1)
    return ((codes > 0.5) != (z > 0.5)).sum(1)


def test_codes_in_the_table(run):
    """Bits by threshold are exact and certain; of drawn codes the table holds probabilities and their deviation."""
    columns = pq.read_schema(run / "latents" / "val" / "part-00000.parquet").names
    assert ("latent_std" in columns) == (run.name != "bits")
    found = table(run, "val")
    z = np.array(found["latent"])
    if run.name == "bits":
        assert np.unique(z).tolist() == [0.0, 1.0]
    elif run.name != "real":
        np.testing.assert_allclose(np.array(found["latent_std"]) ** 2, z * (1 - z), atol=1e-6)
    if run.name == "symbols":
        np.testing.assert_allclose(z.reshape(len(z), -1, 4).sum(2), 1, atol=1e-5)


@pytest.mark.parametrize("split", ["train", "val"])
def test_neighbours_of_a_key_are_those_of_brute_force(run, split):
    """A validation sample among the train rows, and among its own split, where it is left out."""
    val, searched = table(run, "val"), table(run, split)
    answer = call("search", run, "--query", val["key"][5], "--top", 7, "--split", split, "--json").json
    (result,) = answer["results"]
    assert result["query"] == val["key"][5]
    expected = distances(run, val["latent"][5], searched["latent"]).astype(float)
    if split == "val":
        expected[5] = np.inf
    order = np.argsort(expected, kind="stable")[:7]
    assert [each["key"] for each in result["neighbours"]] == [searched["key"][row] for row in order]
    np.testing.assert_allclose([each["distance"] for each in result["neighbours"]], expected[order], rtol=1e-12)
    assert [each["label"] for each in result["neighbours"]] == [str(searched["label"][row]) for row in order]
    same = np.mean([searched["label"][row] == val["label"][5] for row in order])
    assert answer["metrics"] == {"precision@7": pytest.approx(same)}


def test_the_answer(bits):
    key = table(bits, "val")["key"][0]
    answer = call("search", bits, "--query", key, "--json").json
    assert answer.keys() == {"command", "run", "status", "outputs", "metrics", "mlflow_run_id", "warnings", "results"}
    assert (answer["command"], answer["run"], answer["status"]) == ("search", str(bits), "done")
    (result,) = answer["results"]
    assert result.keys() == {"query", "neighbours"}
    assert len(result["neighbours"]) == 10
    assert all(each.keys() == {"key", "distance", "label"} for each in result["neighbours"])
    assert all(isinstance(each["distance"], int) for each in result["neighbours"])  # bits are counted
    words = call("search", bits, "--query", key, "--top", 2).stdout.splitlines()
    assert words[0] == key
    first = result["neighbours"][0]
    assert words[1].split() == ["1", first["key"], str(first["distance"]), first["label"]]
    assert words[3].startswith("search: done")


def test_latents_are_made_where_they_are_missing(bits):
    key = table(bits, "val")["key"][0]
    before = call("search", bits, "--query", key, "--json").json
    shutil.rmtree(bits / "latents")
    answer = call("search", bits, "--query", key, "--json")
    assert answer.json["results"] == before["results"]
    assert "extract: 1,298 rows of train into" in answer.stderr
    assert "extract: 144 rows of val into" in answer.stderr


def test_every_sample_of_a_file_asks(run, digits, here):
    """Train samples in a file of their own find themselves: they are no rows of the run there."""
    train = DataSet.open(digits).split("train")
    (here / "new").mkdir()
    for row in (3, 8):
        # stored pixels end at 16, those of a PNG at 255: what the model sees is nearly the same, and for this test enough
        Image.fromarray(np.round(train.read(np.array([row]))[0, 0] * (255 / 16)).astype(np.uint8)).save(
            here / "new" / f"{row}.png"
        )
    answer = call("search", run, "--query", "new", "--top", 3, "--json").json
    assert [result["query"] for result in answer["results"]] == ["3", "8"]
    assert answer["metrics"] == {}  # nobody knows their labels
    np.savez(here / "same.npz", x=train.read(np.array([3, 8])))
    answer = call("search", run, "--query", "same.npz", "--top", 40, "--json").json
    for row, result in zip((3, 8), answer["results"], strict=True):
        nearest = result["neighbours"][0]["distance"]
        at_it = [each["key"] for each in result["neighbours"] if each["distance"] <= nearest + 1e-5]
        assert train.keys[row] in at_it


@pytest.mark.parametrize("query", ["key", "file"])
def test_a_picture(run, digits, here, query, rendered):
    train = DataSet.open(digits).split("train")
    np.savez(here / "new.npz", x=train.read(np.arange(13)))  # more queries than a picture shows
    asked = train.keys[0] if query == "key" else "new.npz"
    answer = call("search", run, "--query", asked, "--top", 12, "--out", "like.png", "--json").json
    assert answer["outputs"] == {"picture": "like.png"}
    with Image.open(here / "like.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 100


@pytest.mark.parametrize("split", ["train", "val"])
def test_precision_by_label(run, split):
    """The mean over validation rows, written out; rows of val do not find themselves in val."""
    val, searched = table(run, "val"), table(run, split)
    expected, labels = [], np.array(searched["label"])
    for row, z in enumerate(val["latent"]):
        away = distances(run, z, searched["latent"]).astype(float)
        if split == "val":
            away[row] = np.inf
        expected.append(np.mean(labels[np.argsort(away, kind="stable")[:10]] == val["label"][row]))
    answer = call("search", run, "--precision", "--split", split, "--json").json
    assert answer["metrics"]["precision@10"] == pytest.approx(np.mean(expected))
    chance = np.mean([np.mean(labels == label) for label in val["label"]])
    assert answer["metrics"]["chance"] == pytest.approx(chance)
    assert answer["metrics"]["queries"] == len(val["key"])
    assert answer["results"] == []
    assert json.loads((run / "search" / "metrics.json").read_text()) == {"split": split, **answer["metrics"]}


def test_precision_of_some_rows(bits):
    metrics = call("search", bits, "--precision", "--queries", 31, "--top", 3, "--json").json["metrics"]
    assert metrics.keys() == {"precision@3", "chance", "queries"}
    assert metrics["queries"] == 31


def test_samples_without_labels(unlabelled, here):
    (here / "r.yaml").write_text(
        "name: vectors\ndata: {path: vectors}\nmodel: {latent_dim: 3, encoder: {name: linear}, "
        "decoder: {name: linear}, head: {name: softmax}}\npretrain: {epochs: 1}\n"
    )
    assert call("pretrain", "r.yaml").code == 0
    key = DataSet.open(unlabelled).split("train").keys[0]
    answer = call("search", "runs/vectors", "--query", key, "--top", 99, "--out", "p.png", "--json").json
    (result,) = answer["results"]
    assert len(result["neighbours"]) == DataSet.open(unlabelled).split("train").rows - 1
    assert {each["label"] for each in result["neighbours"]} == {None}
    assert answer["metrics"] == {}
    told = call("search", "runs/vectors", "--precision")
    assert told.code == 2
    assert "--precision compares classes, and" in told.stderr


BAD = [
    ([], "search either for the like of a sample (--query KEY|FILE) or measure on validation rows (--precision)."),
    (["--query", "x", "--precision"], "search either for the like of a sample (--query KEY|FILE) or measure"),
    (["--query", "x", "--queries", "3"], "--queries 3: has no effect without --precision. Leave it out."),
    (["--precision", "--out", "p.png"], "--out, --key and --label are of a --query; with --precision they have no effect."),
    (["--query", "train-3", "--out", "p.pdf"], "--out p.pdf: the picture is a PNG file; give a name that ends in .png."),
    (["--query", "x", "--split", "tran"], "tran"),
    (["--precision", "--split", "tran"], "tran"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_what_is_asked_wrongly_is_refused(bits, words, message):
    assert message in one_line("search", bits, *words)


def test_a_key_that_is_not_there(bits):
    key = table(bits, "train")["key"][0]
    message = one_line("search", bits, "--query", key + "x")
    assert message.startswith(f"--query {key}x: no sample of ")
    assert "has this key, and there is no such file. Keys are like " in message
    assert message.endswith(f"Did you mean {key}?")


def test_a_run_that_is_none(here):
    assert "runs/none is no run folder" in one_line("search", "runs/none", "--query", "a")
