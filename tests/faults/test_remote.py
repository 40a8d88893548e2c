"""Data sets by URL: the same samples as on this machine, whatever the network does on the way."""

import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
from command_line import call, one_line, write_yaml
from faults.shard_kit import ROWS, change, flip, packed, picture, pictures, read_all, values, write_tar

from ssl_ae.data import order as orders
from ssl_ae.data import remote
from ssl_ae.data.card import Card
from ssl_ae.data.damage import Tolerance
from ssl_ae.data.dataset import DataSet
from ssl_ae.data.order import Order
from ssl_ae.errors import DataError

pytest.importorskip("aiohttp", reason="the extra s3 is not installed")


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; `trouble(path, nth)` may answer instead: with a status, or with how many bytes arrive."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.trouble, self.asked = folder, lambda path, nth: None, []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def served(self, name: str) -> int:
        return self.asked.count(f"/{name}")


class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, request, address, server: Server) -> None:
        super().__init__(request, address, server, directory=str(server.folder))

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        wrong = self.server.trouble(self.path, self.server.asked.count(self.path))
        if wrong is None:
            super().do_GET()
        elif wrong >= 400:
            self.send_error(wrong)
        else:
            content = (self.server.folder / self.path[1:]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:wrong])
            self.close_connection = True


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_AE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    (tmp_path / "served").mkdir()
    with Server(tmp_path / "served") as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def cached(server) -> list[Path]:
    return sorted((server.folder.parent / "cache" / "shards").iterdir())


def same_as_local(server) -> None:
    here, there = read_all(DataSet.open(server.folder)), read_all(DataSet.open(server.url))
    for name, (keys, x) in here.items():
        assert there[name][0] == keys
        np.testing.assert_array_equal(there[name][1], x)


def test_the_samples_are_those_of_the_folder_and_are_fetched_once(server):
    packed(server.folder)
    same_as_local(server)
    same_as_local(server)
    assert [server.served(f"train-{index:06d}.tar") for index in range(3)] == [1, 1, 1]
    assert len(cached(server)) == 4
    assert DataSet.open(server.url).card == DataSet.open(server.folder).card


@pytest.mark.parametrize("wrong", [500, 503, 0, 3_000])
def test_a_transfer_that_breaks_off_is_taken_up_again(server, wrong):
    packed(server.folder)
    server.trouble = lambda path, nth: wrong if path == "/train-000001.tar" and nth <= 2 else None
    same_as_local(server)
    assert server.served("train-000001.tar") == 3


def test_a_shard_that_never_arrives_is_named(server):
    packed(server.folder)
    server.trouble = lambda path, nth: 3_000 if path == "/train-000001.tar" else None
    with pytest.raises(DataError, match=rf"{server.url}/train-000001\.tar could not be fetched in 4 attempts"):
        read_all(DataSet.open(server.url))
    assert not [path for path in cached(server) if path.name.startswith(".")]  # no half file, under any name
    with pytest.raises(DataError, match="could not be fetched"):  # a network that is down is no damage
        DataSet.open(server.url, tolerance=Tolerance(skip=True, limit=1))
    server.trouble = lambda path, nth: None
    same_as_local(server)


def test_a_server_that_is_gone_is_named(server, monkeypatch):
    packed(server.folder)
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match=rf"{server.url}/card\.json could not be fetched"):
        DataSet.open(server.url)


def test_a_flipped_bit_behind_a_url_is_found_and_can_be_left_out(server):
    packed(server.folder)
    change(server.folder / "train-000001.tar", flip(3_000))
    with pytest.raises(DataError, match=rf"{server.url}/train-000001\.tar is damaged: its sha256 is not the card's"):
        read_all(DataSet.open(server.url))
    assert server.served("train-000001.tar") == 2  # it may have been the transfer
    data = DataSet.open(server.url, tolerance=Tolerance(skip=True, limit=0.5))
    assert data.split("train").keys.tolist() == [f"train-{row}" for row in [*range(14), *range(28, ROWS)]]
    assert "left out 14 of 41 samples of train" in data.losses[0]
    assert data.card.fingerprint == DataSet.open(server.folder, tolerance=Tolerance(skip=True, limit=0.5)).card.fingerprint


def test_the_cache_stays_within_its_bound(server, monkeypatch):
    packed(server.folder)
    sizes = [path.stat().st_size for path in server.folder.glob("*.tar")]
    monkeypatch.setenv("SSL_AE_CACHE_GB", str(2 * max(sizes) / 1e9))
    train = DataSet.open(server.url).split("train")
    random = np.random.default_rng(0)
    for _ in range(20):
        rows = random.permutation(ROWS)[:9]
        np.testing.assert_array_equal(train.read(rows), values(ROWS)[rows])
        assert sum(path.stat().st_size for path in cached(server) if path.suffix == ".tar") <= 2 * max(sizes)
    assert server.served("train-000000.tar") > 1
    monkeypatch.setenv("SSL_AE_CACHE_GB", "0.000001")
    with pytest.raises(DataError, match="more than SSL_AE_CACHE_GB allows"):
        DataSet.open(server.url).split("val").read(np.arange(1))


def test_shards_are_there_before_they_are_read(server):
    """Training goes through the shards in an order of its own, and tells it a window ahead."""
    packed(server.folder)
    train = DataSet.open(server.url).split("train")
    assert train.block_starts.tolist() == [0, 14, 28]  # whole shards are shuffled: a block would cost a transfer
    train.expect(np.array([40, 0]))
    for thread in train._remote._fetchers:
        thread.join(10)
    assert [server.served(f"train-{index:06d}.tar") for index in range(3)] == [1, 0, 1]
    train.read(np.arange(3))  # in order: the next shard is the next to be read
    for thread in train._remote._fetchers:
        thread.join(10)
    assert server.served("train-000001.tar") == 1


def test_shards_of_other_makers_behind_a_url(server):
    write_tar(server.folder / "a.tar", pictures(range(20)))
    write_tar(server.folder / "b.tar", pictures(range(20, 30)))
    data = DataSet.open(server.url)
    found = {}
    for name in ("train", "val"):
        keys, x = data.split(name).keys, data.split(name).read(np.arange(data.split(name).rows))
        found |= dict(zip(keys.tolist(), x, strict=True))
    assert sorted(found) == [f"{row:03d}" for row in range(30)]
    for key, x in found.items():
        np.testing.assert_array_equal(x[0], picture(int(key)))
    asked = server.served("a.tar")
    assert DataSet.open(server.url).card == data.card
    assert server.served("a.tar") == asked


def test_a_url_without_data_is_explained(server):
    with pytest.raises(DataError, match=r"holds neither a card\.json nor \.tar shards"):
        DataSet.open(server.url)
    with pytest.raises(DataError, match=r"there is no .*/nowhere"):
        DataSet.open(f"{server.url}/nowhere")


@pytest.mark.parametrize(
    "place",
    [
        *("pipe:touch marker", "PIPE:touch marker", "ftp://host/x", "gs://bucket/x", "simplecache::http://host/x", "memory://x"),
        *("s3::file:///x", "github://a:b@main/", "ssh://host/x", "reference://x", "data:;base64,AAAA", "zip://a.tar::/x.zip"),
    ],
)
def test_every_other_scheme_is_refused(here, place):
    recipe = write_yaml(here / "r.yaml", {"name": "r", "data": {"path": place}})
    for words in (["pretrain", recipe], ["data", "inspect", place]):
        message = one_line(*words)
        assert message.startswith(f"{place}: data are read from folders and from URLs of file:, http:, https: and s3:")
    assert not (here / "marker").exists()


def test_file_urls_are_folders(here):
    packed(here / "set")
    assert DataSet.open(f"file://{here}/set").path == here / "set"
    with pytest.raises(DataError, match="expected file:///FOLDER"):
        DataSet.open("file://host/set")


def test_every_stage_reads_by_url(server, here):
    packed(server.folder)
    tree = {
        "name": "tiny",
        "data": {"path": server.url, "residency": "stream"},
        "model": {
            "latent_dim": 2,
            "encoder": {"name": "mlp", "widths": [5]},
            "decoder": {"name": "mlp", "likelihood": "gaussian"},
        },
        "pretrain": {"epochs": 2, "batch_size": 8},
        "device": "cpu",
    }
    there = call("pretrain", write_yaml(here / "there.yaml", tree), "--json").json
    tree["data"]["path"] = str(server.folder)
    local = call("pretrain", write_yaml(here / "local.yaml", tree), "--out", "runs/local", "--json").json
    assert Path(there["outputs"]["model"]).read_bytes() == Path(local["outputs"]["model"]).read_bytes()
    assert f"path: {server.url}" in (here / "runs/tiny/recipe.yaml").read_text()
    assert call("extract", "runs/tiny").code == 0
    assert call("data", "inspect", server.url).code == 0
    assert call("data", "pack", server.url, "copy").code == 0
    assert Card.load(here / "copy").splits["train"].rows == ROWS


def test_the_window_that_follows_is_told_in_time_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(orders, "WINDOW_ROWS", 10)
    told, starts = [], np.arange(0, 23, 4)
    plain, telling = Order(23, seed=5, block_starts=starts), Order(23, seed=5, block_starts=starts, ahead=told.append)
    for position in range(0, 92, 3):  # four epochs of three windows
        np.testing.assert_array_equal(telling.take(position, 3), plain.take(position, 3))
        epoch, offset = divmod(position, 23)
        nearest = plain.take(epoch * 23 + min(23, (offset // 10 + 1) * 10), 1)[0]
        assert nearest in told[-1] or nearest in told[-2]
    windows = [plain.take(epoch * 23 + 10 * index, min(10, 23 - 10 * index)) for epoch in range(5) for index in range(3)]
    assert len(told) == 13  # the last batch reaches into the fifth epoch
    for found, window in zip(told, windows[1:], strict=False):
        np.testing.assert_array_equal(found, window)
