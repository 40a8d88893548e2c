"""Files made to do harm: nothing of them is run, nothing is written outside the folders that were asked for."""

import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call, one_line, refused, snapshot, write_yaml
from faults.shard_kit import npy, packed, picture, png, read_all, values, write_tar

from ssl_ae import checkpoint, files
from ssl_ae import recipe as recipes
from ssl_ae.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ssl_ae.data.card import Card
from ssl_ae.data.dataset import DataSet
from ssl_ae.errors import CheckpointError, DataError, RecipeError

MODEL = {"latent_dim": 2, "encoder": {"name": "mlp", "widths": [5]}, "decoder": {"name": "mlp", "likelihood": "gaussian"}}


class Bomb:
    """Unpickled, it makes the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def told(*words: object) -> str:
    """The message of a command that refuses its input."""
    answer = call(*words)
    assert (answer.code, answer.stdout) == (2, ""), answer
    assert "Traceback" not in answer.stderr
    return answer.stderr


@pytest.fixture
def marker(tmp_path) -> Iterator[Path]:
    """A folder that nobody may make. It lies outside the current folder of `here`-like tests: in its parent."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


def test_the_bomb_goes_off_where_it_is_unpickled(tmp_path):
    """Else the tests below would show nothing."""
    content = pickle.dumps(Bomb(tmp_path / "went off"))
    pickle.loads(content)
    assert (tmp_path / "went off").is_dir()


def objects(marker: Path) -> np.ndarray:
    array = np.empty(1, dtype=object)
    array[0] = Bomb(marker)
    return array


# --- shards

EXTENSIONS = [
    "pyd",
    "pkl",
    "pickle",
    "pth",
    "pt",
    "pt2",
    "npz",
    "npy",
    "x.npy",
    "cls",
    "json",
    "txt",
    "png",
    "jpg",
    "ten",
    "cbor",
    "mp",
]


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("beside", [True, False])
def test_pickles_under_every_extension(tmp_path, marker, extension, beside):
    """Where a sound image lies beside the pickle, the pickle is passed over or refused; it is never loaded."""
    good = {"0.png": png(picture(0)), "0.cls": b"1"} if beside else {}
    members = {name: content for name, content in good.items() if name != f"0.{extension}"}
    write_tar(
        tmp_path / "train.tar", [*members.items(), (f"0.{extension}", pickle.dumps(Bomb(marker))), ("1.png", png(picture(1)))]
    )
    with contextlib.suppress(DataError) if beside else pytest.raises(DataError, match=r"train\.tar"):
        read_all(DataSet.open(tmp_path))


@pytest.mark.parametrize("name", ["0.npy", "0.x.npy"])
def test_arrays_of_objects(tmp_path, marker, name):
    write_tar(
        tmp_path / "train.tar",
        {name: npy(objects(marker)), "0.key.json": b'["a"]'} if "x" in name else {name: npy(objects(marker))},
    )
    with pytest.raises(DataError, match=r"never unpickled|expected rows of"):
        read_all(DataSet.open(tmp_path))


HOSTILE_NAMES = {
    "upwards": "../../escaped.png",
    "far upwards": "../" * 40 + "tmp/escaped.png",
    "absolute": "/tmp/escaped.png",
    "in the middle": "a/../../../escaped.png",
    "windows": "..\\..\\escaped.png",
    "ten thousand characters": "d/" * 4_999 + "escaped.png",
    "a line feed and a colour": "a\n\x1b[31mb.png",
}


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_of_members_are_only_ever_keys(here, name):
    """A shard is read where it lies, so a name leads nowhere; it is a key that comes back in the table of latents."""
    (here / "set").mkdir()
    members = [(HOSTILE_NAMES[name], png(picture(0)))] + [(f"{row:02d}.png", png(picture(row))) for row in range(1, 12)]
    write_tar(here / "set" / "train.tar", members)
    before = set(here.parent.iterdir()), set(Path("/tmp").glob("escaped*")), set(here.rglob("escaped*"))
    keys = {key for found, _ in read_all(DataSet.open(here / "set")).values() for key in found}
    assert (HOSTILE_NAMES[name].removesuffix(".png") in keys) == (name != "windows")  # whose key is empty: a hidden file
    assert call("data", "pack", "set", "packed").code == 0
    packed_keys = {key for found, _ in read_all(DataSet.open(here / "packed")).values() for key in found}
    assert packed_keys == keys
    assert (set(here.parent.iterdir()), set(Path("/tmp").glob("escaped*")), set(here.rglob("escaped*"))) == before


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
)
def test_links_and_devices_in_a_tar_hold_no_sample(tmp_path, kind):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(picture(5)))
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        info = tarfile.TarInfo("1.png")
        info.type, info.linkname, info.size = kind, str(secret), 0
        tar.addfile(info)
        info = tarfile.TarInfo("0.png")
        info.size = len(png(picture(0)))
        tar.addfile(info, io.BytesIO(png(picture(0))))
    data = DataSet.open(tmp_path)
    assert data.split("train").keys.tolist() == ["0"]
    np.testing.assert_array_equal(data.split("train").read(np.array([0]))[0, 0], picture(0))


@pytest.mark.parametrize("file", ["../outside.tar", "/etc/outside.tar", "a/b.tar", "..\\x.tar", "outside", "a\0.tar", ""])
def test_a_card_names_no_file_elsewhere(tmp_path, file):
    packed(tmp_path / "set")
    card = json.loads((tmp_path / "set" / "card.json").read_text())
    card["splits"]["train"]["shards"][0]["file"] = file
    (tmp_path / "set" / "card.json").write_text(json.dumps(card))
    with pytest.raises(DataError, match=r"card\.json: splits\.train\.shards\.0\.file"):
        DataSet.open(tmp_path / "set")


@pytest.mark.parametrize(
    "name", ["../../escaped", "/tmp/escaped", "..", ".", "", "a/b", "a\0b", ".hidden", "_private", "x" * 300]
)
def test_the_name_of_other_data_is_no_way_out_of_the_run(here, finetuned, name):
    packed(here / "other")
    card = json.loads((here / "other" / "card.json").read_text())
    (here / "other" / "card.json").write_text(json.dumps(card | {"name": name}))
    before = snapshot(here)
    assert "expected a name without / and \\" in told("extract", finetuned, "--data", "other")
    assert snapshot(here) == before


# --- checkpoints


def saved(folder: Path, marker: Path) -> Path:
    """Two checkpoints; the state of the newer is a pickle that does harm, and its manifest vouches for it."""
    for step in (1, 2):
        save_checkpoint(folder, Checkpoint({"w": torch.ones(2)}, {"m": torch.full((2,), float(step))}, {"step": step}))
    newest = max(folder.glob("step-*"))
    torch.save({"m": Bomb(marker)}, newest / checkpoint.STATE)
    manifest = files.read_json(newest / checkpoint.MANIFEST)
    files.write_json(newest / checkpoint.MANIFEST, manifest | {checkpoint.STATE: files.sha256_of(newest / checkpoint.STATE)})
    return newest


@pytest.mark.parametrize("raw", [False, True])
def test_a_checkpoint_with_a_pickle(tmp_path, marker, raw):
    newest = saved(tmp_path / "checkpoint", marker)
    if raw:  # no archive of torch's, but the pickle itself
        (newest / checkpoint.STATE).write_bytes(pickle.dumps(Bomb(marker)))
        manifest = files.read_json(newest / checkpoint.MANIFEST)
        files.write_json(newest / checkpoint.MANIFEST, manifest | {checkpoint.STATE: files.sha256_of(newest / checkpoint.STATE)})
    warnings: list[str] = []
    assert load_checkpoint(tmp_path / "checkpoint", warnings).progress["step"] == 1
    assert newest.name in warnings[0]
    shutil.rmtree(min((tmp_path / "checkpoint").glob("step-*")))
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        load_checkpoint(tmp_path / "checkpoint", [])


def test_weights_that_are_a_pickle(here, marker):
    packed(here / "set")
    recipe = write_yaml(
        here / "r.yaml", {"name": "r", "data": {"path": "set"}, "model": MODEL, "pretrain": {"epochs": 1}, "device": "cpu"}
    )
    assert call("pretrain", recipe).code == 0
    torch.save({"encoder": Bomb(marker)}, here / "runs/r/pretrain/model.safetensors")
    assert "model.safetensors" in told("extract", "runs/r")


# --- recipes and names

YAML_BOMBS = {
    "python object": "name: !!python/object/apply:os.mkdir ['{marker}']\ndata: {{path: x}}",
    "python name": "name: !!python/name:os.mkdir\ndata: {{path: x}}",
    "python module": "!!python/module:antigravity {{}}",
    "new object": "name: r\ndata: !!python/object/new:os.mkdir ['{marker}']",
    "a tag of its own": "name: !run ['{marker}']\ndata: {{path: x}}",
    "billions of laughs": "name: r\ndata: {{path: x}}\nmodel:\n  a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"  {new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)),
    "a list in itself": "name: r\ndata: {{path: x}}\nmodel: &a {{encoder: {{name: mlp, widths: [*a]}}}}",
    "nested without end": "name: " + "[" * 1_500,
    "mappings without end": "name: r\ndata: " + "{{a: " * 1_000,
    "a month 99": "name: 2001-99-99",
    "a number that is none": "name: !!int abc",
    "a long number": "name: r\nseed: " + "9" * 5_000,
    "another long number": "name: r\nseed: !!int 0x" + "f" * 5_000,
    "a mapping for a key": "{{a: b}}: c",
    "binary": "name: !!binary '@@@'",
    "control characters": "name: \x07",
    "two documents": "name: r\n---\nname: s",
}


@pytest.mark.parametrize("what", YAML_BOMBS)
def test_hostile_yaml_is_refused(here, marker, what):
    text = YAML_BOMBS[what].format(marker=marker)
    (here / "r.yaml").write_text(text)
    assert refused("pretrain", "r.yaml").startswith("r.yaml")
    if "\n" not in text:
        (here / "sound.yaml").write_text("name: r\ndata: {path: x}\n")
        value = text.removeprefix("name: ")
        assert refused("pretrain", "sound.yaml", "--set", f"model.latent_dim={value}").startswith(("--set ", "sound.yaml"))


@pytest.mark.parametrize("name", ["../r", "/tmp/r", "a/b", "..", "", ".r", "r\n", "r\0", "~", "$(touch x)", "r" * 300])
def test_names_of_runs_are_no_paths(here, name):
    with pytest.raises(RecipeError, match="name"):
        recipes.parse({"name": name, "data": {"path": "x"}})


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "evil/../..", "..", "x;touch y", "a" * 5_000])
def test_names_of_plugins_are_no_paths(here, name):
    for words in (["plugins", "new", name], ["plugins", "show", name], ["plugins", "check", name]):
        assert refused(*words)
    recipe = {"name": "r", "data": {"path": "set"}, "model": {"encoder": {"name": name}}, "device": "cpu"}
    packed(here / "set")
    assert refused("pretrain", write_yaml(here / "r.yaml", recipe))


@pytest.mark.parametrize("option", [["--method", "../../x"], ["--split", "../../x"]])
def test_names_on_the_command_line_are_no_paths(here, finetuned, option):
    assert refused("evaluate", finetuned, *option)
    assert told("extract", finetuned, "--layer", "../../../x")


# --- archives of numpy


@contextlib.contextmanager
def memory(extra: int) -> Iterator[None]:
    """So many bytes more than now, and what asks for more fails instead of taking the machine's."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def header(shape: tuple[int, ...], fortran: bool = False, descr: str = "|u1") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": fortran, "shape": shape})
    return out.getvalue()


def npz(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


ZEROS = bytes(50_000_000)  # 50 kB in the archive
NPZ_BOMBS = {
    "rows that are not there": {"x": header((10**12, 8)) + bytes(800)},
    "rows that are not there, by column": {"x": header((10**12, 8), fortran=True) + bytes(800)},
    "labels that are not there": {"x": header((100, 8)) + bytes(800), "y": header((100,), descr="<U1000000000") + bytes(400)},
    "labels by column": {"x": header((10, 8)) + bytes(80), "y": header((10, 10**12), True, "<f8") + bytes(800)},
    "one sample of a terabyte": {"x": header((1, 10**12)) + bytes(800)},
    "negative": {"x": header((-1, 8)) + bytes(800)},
    "no rows": {"x": header((0, 8))},
    "no columns": {"x": header((10, 0))},
    "overflow": {"x": header((2**62, 2**62)) + bytes(800)},
    "more than it says": {"x": header((100, 8)) + ZEROS},
    "objects": {"x": npy(np.array([{}] * 3, dtype=object))},
    "a header without end": {"x": b"\x93NUMPY\x01\x00" + (60_000).to_bytes(2, "little") + b"(" * 60_000},
    "a header of four gigabytes": {"x": b"\x93NUMPY\x02\x00" + (2**32 - 1).to_bytes(4, "little") + ZEROS},
    "no array": {"x": ZEROS},
    "one value a terabyte wide": {"x": header((1, 1), descr="<U250000000000") + bytes(800)},
}


@pytest.mark.parametrize("what", NPZ_BOMBS)
def test_zip_bombs(here, what):
    path = npz(here / "x.npz", **NPZ_BOMBS[what])
    with memory(2 * 2**30):
        assert "x.npz" in refused("data", "pack", path.name, "out")


def test_an_npz_with_pickles(here, marker):
    np.savez(here / "x.npz", x=objects(marker))
    assert "never unpickled" in one_line("data", "pack", "x.npz", "out")
    npz(here / "y.npz", x=npy(np.zeros((12, 3), np.float32)), y=npy(np.repeat(objects(marker), 12)))
    assert "never unpickled" in one_line("data", "pack", "y.npz", "out")
    with zipfile.ZipFile(here / "z.npz", "w") as archive:  # names that lead elsewhere are never unpacked
        archive.writestr("../../x.npy", npy(values(3)))
        archive.writestr("x.npy", npy(values(12)))
    assert call("data", "pack", "z.npz", "out").code == 0
    assert Card.load(here / "out").splits["train"].rows == 11


def test_codes_that_are_a_pickle(here, finetuned, marker):
    np.save(here / "z.npy", objects(marker), allow_pickle=True)
    assert "z.npy" in one_line("sample", finetuned, "--codes", "z.npy", "--out", "x.png")


def test_labels_that_are_a_pickle(here, finetuned, recipe, marker):
    for name in ("labels.pkl", "labels.csv", "labels.parquet"):
        (here / name).write_bytes(pickle.dumps(Bomb(marker)))
        assert name in told("finetune", recipe(), "--labels", name)
