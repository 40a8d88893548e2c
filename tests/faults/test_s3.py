"""Data sets in S3, against moto's server on this machine."""

import logging
import os

import numpy as np
import pytest
from command_line import call, one_line, write_yaml
from faults.shard_kit import ROWS, change, flip, packed, pictures, read_all, write_tar

from ssl_ae.data import remote
from ssl_ae.data.damage import Tolerance
from ssl_ae.data.dataset import DataSet
from ssl_ae.errors import DataError

moto = pytest.importorskip("moto.server", reason="moto is not installed")
pytest.importorskip("s3fs", reason="the extra s3 is not installed")

pytestmark = pytest.mark.slow  # seconds to import moto and boto3

KEYS = {"AWS_ACCESS_KEY_ID": "moto", "AWS_SECRET_ACCESS_KEY": "moto", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def endpoint():
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in KEYS.items():
            patch.setenv(name, value)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        server.start()
        try:
            patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
            yield os.environ["AWS_ENDPOINT_URL"]
        finally:
            server.stop()


@pytest.fixture
def bucket(endpoint, tmp_path_factory, monkeypatch):
    """Uploads a folder: `bucket(folder)` -> its URL."""
    import boto3
    import s3fs

    monkeypatch.setenv("SSL_AE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")

    def upload(folder) -> str:
        for path in folder.iterdir():
            client.upload_file(str(path), "bucket", f"some/place/{path.name}")
        return "s3://bucket/some/place"

    yield upload
    for entry in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        client.delete_object(Bucket="bucket", Key=entry["Key"])
    client.delete_bucket(Bucket="bucket")


def test_a_set_in_s3_is_read_and_trains_as_its_folder_does(bucket, here):
    folder = packed(here / "set")
    url = bucket(folder)
    local, there = read_all(DataSet.open(folder)), read_all(DataSet.open(url))
    for name, (keys, x) in local.items():
        assert there[name][0] == keys
        np.testing.assert_array_equal(there[name][1], x)
    model = {"latent_dim": 2, "encoder": {"name": "mlp", "widths": [5]}, "decoder": {"name": "mlp", "likelihood": "gaussian"}}
    tree = {"name": "r", "model": model, "pretrain": {"epochs": 1, "batch_size": 8}, "device": "cpu"}
    weights = []
    for place in (url, folder):
        path = write_yaml(here / "r.yaml", tree | {"data": {"path": str(place), "residency": "stream"}})
        assert call("pretrain", path, "--out", f"runs/{len(weights)}").code == 0
        weights.append((here / f"runs/{len(weights)}/pretrain/model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_damage_in_s3_is_named_or_left_out(bucket, here):
    folder = packed(here / "set")
    change(folder / "train-000002.tar", flip(3_000))
    url = bucket(folder)
    with pytest.raises(DataError, match=rf"{url}/train-000002\.tar is damaged"):
        read_all(DataSet.open(url))
    data = DataSet.open(url, tolerance=Tolerance(skip=True, limit=0.4))
    assert data.split("train").keys.tolist() == [f"train-{row}" for row in range(28)]
    assert f"left out {ROWS - 28} of {ROWS} samples of train" in data.losses[0]


def test_shards_of_other_makers_in_s3(bucket, here):
    (here / "set").mkdir()
    write_tar(here / "set" / "a.tar", pictures(range(20)))
    data = DataSet.open(bucket(here / "set"))
    assert sorted([*data.split("train").keys, *data.split("val").keys]) == [f"{row:03d}" for row in range(20)]


def test_what_is_not_there_is_explained(bucket, here):
    bucket(packed(here / "set"))
    for url in ("s3://bucket/other/place", "s3://nobucket/some/place"):
        recipe = write_yaml(here / "r.yaml", {"name": "r", "data": {"path": url}})
        assert one_line("pretrain", recipe).startswith(f"there is no {url}, or it cannot be listed.")
