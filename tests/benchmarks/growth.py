"""What grows with the data: time and memory of pack, pretrain (streamed) and extract at 60k, 600k and 6M rows, and of indexing.

    make bench-growth
    python -m tests.benchmarks.growth --rows 60000 600000 --files 100000

Images of 28 x 28 are repeated into IDX files, packed, trained on for one epoch and extracted, each in a process of its own.
Processor time is counted, after the imports. Peak memory is what the process has beyond its imports: `private` is what it
allocated itself; `resident` counts the pages of mapped shards too, which are the system's cache and make way for others. A
stage has costs before its first row (figures, checkpoints), so growth is told by each further row: its time from one size to
the next, which is to stay within a tenth of the first such time, and its memory.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from tests.benchmarks import kit
from tests.benchmarks import training_sides as sides

ROWS = (60_000, 600_000, 6_000_000)
FILES = (10_000, 100_000, 1_000_000)
BYTES_A_ROW = 2 * sides.PIXELS + 400  # source, shards, latents
BYTES_A_FILE = 2 * 2048  # a name in a folder, and a sample in a shard
SHARD_FILES = 10_000
LINKS = 50_000  # names that one file may have, below ext4's 65,000
SAMPLE_SECONDS = 0.01  # between two looks at the memory
RECIPE = """\
name: growth
data: {{path: {data}, labels: all, residency: stream}}
model:
  latent_dim: 16
  encoder: {{name: mlp, widths: [64], posterior: diag}}
  decoder: {{name: mlp, likelihood: bernoulli}}
  regularizers: [{{name: kl}}]
pretrain: {{epochs: 1, batch_size: 1024}}
device: cpu
"""


# --- what is measured, each in a process of its own


def pack(source: Path, data: Path) -> Callable[[], object]:
    from ssl_ae.data.pack import pack
    from ssl_ae.data.sources import PackOptions
    from ssl_ae.registry import Registry

    kinds = Registry.discover().sources()
    return lambda: pack(str(source), data, PackOptions(), kinds)


def pretrain(recipe: Path, run: Path) -> Callable[[], object]:
    return _stage(recipe, run, "pretrain")


def extract(recipe: Path, run: Path) -> Callable[[], object]:
    return _stage(recipe, run, "extract")


def _stage(recipe: Path, run: Path, name: str) -> Callable[[], object]:
    import ssl_ae.figures.map  # noqa: F401 what a stage imports on its way is no growth
    from ssl_ae import recipe as recipes
    from ssl_ae.progress import Reporter
    from ssl_ae.stages.extract import extract
    from ssl_ae.stages.pretrain import pretrain
    from ssl_ae.stages.workspace import open_workspace

    stage, loaded = {"pretrain": pretrain, "extract": extract}[name], recipes.load(recipe)

    def work() -> None:
        with open_workspace(loaded, run, reporter=Reporter(silent=True)) as workspace:
            stage(workspace)

    return work


def index_folder(folder: Path) -> Callable[[], object]:
    from ssl_ae.data.sources import PackOptions
    from ssl_ae.data.sources.images import Images

    return lambda: Images(str(folder), PackOptions()).keys("train")


def index_shards(folder: Path) -> Callable[[], object]:
    from ssl_ae.data.dataset import DataSet

    return lambda: DataSet.open(folder)


WORKS = {work.__name__: work for work in (pack, pretrain, extract, index_folder, index_shards)}


def measured_here(name: str, places: Sequence[str]) -> dict[str, float]:
    kit.pin()
    work = WORKS[name](*map(Path, places))
    started, before = kit.spent(), _private()
    resident = psutil.Process().memory_info().rss
    with _watching() as peaks:
        work()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    return {"seconds": kit.spent() - started, "private": max(peaks) - before, "resident": most - resident}


@contextmanager
def _watching() -> Iterator[list[int]]:
    """Private bytes of this process, again and again while the block runs."""
    seen, over = [_private()], threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_SECONDS):
            seen.append(max(seen.pop(), _private()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def _private() -> int:
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def measured(name: str, *places: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.growth", "--alone", name, *map(str, places)]
    print(f"{name} {places[0]} ...", file=sys.stderr, flush=True)
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


# --- what it is measured on


def write_idx(folder: Path, rows: int) -> Path:
    """MNIST's format with a label each, the images over and over."""
    images, part = sides.images(), sides.ROWS
    with open(folder / "train-images-idx3-ubyte", "wb") as x, open(folder / "train-labels-idx1-ubyte", "wb") as y:
        x.write(struct.pack(">4B3I", 0, 0, 8, 3, rows, sides.SIDE, sides.SIDE))
        y.write(struct.pack(">4BI", 0, 0, 8, 1, rows))
        for start in range(0, rows, part):
            count = min(part, rows - start)
            x.write(images[:count].tobytes())
            y.write((np.arange(start, start + count) % 10).astype(np.uint8).tobytes())
    return folder


def _png() -> bytes:
    content = io.BytesIO()
    Image.fromarray(sides.images()[0, 0]).save(content, "PNG")
    return content.getvalue()


def write_folder(folder: Path, files: int) -> Path:
    """So many names in ten folders, one a class; the files behind them are few, because only names are to be many."""
    content = _png()
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
    for row in range(files):
        path = folder / str(row % 10) / f"{row:08d}.png"
        if row % LINKS == 0:
            path.write_bytes(content)
            first = path
        else:
            path.hardlink_to(first)
    return folder


def write_shards(folder: Path, files: int) -> Path:
    """WebDataset shards of one PNG and one class a sample."""
    folder.mkdir()
    for shard, start in enumerate(range(0, files, SHARD_FILES)):
        with tarfile.open(folder / f"train-{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(start, min(start + SHARD_FILES, files)):
                for extension, content in (("cls", str(row % 10).encode()), ("png", _PNG)):
                    info = tarfile.TarInfo(f"{row:08d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


_PNG = _png()


def stages_at(rows: int, place: Path) -> dict[str, dict[str, float]]:
    """{stage: figures}; what lies in `place` is removed as soon as nobody needs it."""
    source, data, run, recipe = (place / name for name in ("source", "data", "run", "recipe.yaml"))
    source.mkdir()
    recipe.write_text(RECIPE.format(data=data))
    found = {"pack": measured("pack", write_idx(source, rows), data)}
    shutil.rmtree(source)
    for name in ("pretrain", "extract"):
        found[name] = measured(name, recipe, run)
    return found


def table(found: dict[int, dict[str, dict[str, float]]], unit: str) -> str:
    """A line for each work and size; time and private memory of each further row since the size before."""
    titles = (
        "work",
        unit,
        "seconds",
        f"each further of the {unit}",
        "to the first such",
        "private",
        "resident",
        "private a further one",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in next(iter(found.values())):
        before, slopes = None, []
        for many, each in found.items():
            figures = each[name]
            further = ["-"] * 3
            if before:
                fewer, base = before
                slopes.append((figures["seconds"] - base["seconds"]) / (many - fewer))
                held = (figures["private"] - base["private"]) / (many - fewer)
                further = [f"{1e6 * slopes[-1]:.2f} us", f"{slopes[-1] / slopes[0]:.2f}", f"{held:.0f} B"]
            memory = [f"{figures[kind] / 2**20:,.0f} MiB" for kind in ("private", "resident")]
            cells = [name, f"{many:,}", f"{figures['seconds']:.1f}", *further[:2], *memory, further[2]]
            lines.append(f"| {' | '.join(cells)} |")
            before = many, figures
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS, metavar="N", help="sizes of the data set")
    parser.add_argument("--files", type=int, nargs="*", default=FILES, metavar="N", help="files to index")
    parser.add_argument("--place", type=Path, help="where the data may lie for a while; the system's temporary folder")
    parser.add_argument("--alone", nargs="*", metavar="WORK PLACE", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        print(json.dumps(measured_here(given.alone[0], given.alone[1:])))
        return
    with tempfile.TemporaryDirectory(dir=given.place) as place:
        free = shutil.disk_usage(place).free
        stages, indices = {}, {}
        for rows in sorted(given.rows):
            if rows * BYTES_A_ROW > 0.9 * free:
                print(f"{rows:,} rows are left out: they need {rows * BYTES_A_ROW:,} bytes in {place}, where {free:,} are free")
                continue
            with tempfile.TemporaryDirectory(dir=place) as here:
                stages[rows] = stages_at(rows, Path(here))
        for files in sorted(given.files):
            if files * BYTES_A_FILE > 0.9 * free:
                print(f"{files:,} files are left out: they need {files * BYTES_A_FILE:,} bytes, and {free:,} are free")
                continue
            with tempfile.TemporaryDirectory(dir=place) as here:
                here = Path(here)
                indices[files] = {
                    "index_folder": measured("index_folder", write_folder(here / "folder", files)),
                    "index_shards": measured("index_shards", write_shards(here / "shards", files)),
                }
    for found, unit in ((stages, "rows"), (indices, "files")):
        if found:
            print(table(found, unit), end="\n\n")


if __name__ == "__main__":
    main()
