"""The pictures of README's gallery, from real runs: `make gallery`.

Runs the recipes (what is done is skipped), draws what the commands draw, and writes small copies to .github/images/gallery/.
Needs MNIST, packed: ssl-ae data pack FOLDER_WITH_THE_IDX_FILES data/mnist.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
WIDTH = 640  # pixels of a picture in README
COLOURS = 128  # of its palette: pictures stay small, and no eye sees the difference
MOST_BYTES = 1_000_000  # of the whole gallery


@dataclass(frozen=True)
class Shown:
    """One picture: the recipe that makes the run, and where the picture comes from."""

    name: str
    recipe: str
    figure: str = ""  # in pretrain/figures of the run
    command: tuple[str, ...] = ()  # or what draws it, after `ssl-ae`; RUN and PNG are replaced


GALLERY = (
    Shown("components", "mnist_linear", figure="components.png"),
    Shown("loadings", "digits_factor_analysis", figure="loadings.png"),
    Shown("atoms", "digits_sparse_coding", figure="atoms.png"),
    Shown("stacked", "digits_stacked", figure="learning_curves.png"),
    Shown("jacobian", "digits_contractive", figure="jacobian.png"),
    Shown("denoising", "mnist_denoising", figure="reconstructions.png"),
    Shown("colourisation", "photos_colourisation", figure="reconstructions.png"),
    Shown("samples", "mnist_vae_fc", command=("sample", "RUN", "--n", "40", "--out", "PNG")),
    Shown("plane", "digits_vae_2d", command=("sample", "RUN", "--grid", "--out", "PNG")),
    Shown("traversal", "mnist_vae_fc", command=("sample", "RUN", "--traverse", "3", "--out", "PNG")),
    Shown("mixture", "mnist_conv", command=("sample", "RUN", "--prior", "mixture", "--n", "40", "--out", "PNG")),
    Shown("search", "mnist_hashing", command=("search", "RUN", "--query", "test-00000000", "--out", "PNG")),
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, default=ROOT / ".github" / "images" / "gallery", help="where the small copies go")
    options.add_argument("--only", nargs="*", choices=[shown.name for shown in GALLERY], help="these pictures alone")
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for shown in GALLERY:
        if not given.only or shown.name in given.only:
            small_copy(picture_of(shown), given.out / f"{shown.name}.png")
    total = sum(path.stat().st_size for path in given.out.glob("*.png"))
    print(f"{total:,} bytes in {given.out}")
    if total > MOST_BYTES:
        sys.exit(f"more than {MOST_BYTES:,}: lower WIDTH or COLOURS")


def picture_of(shown: Shown) -> Path:
    """The picture in full size, made where it is not there yet."""
    recipe = ROOT / "pipelines" / f"{shown.recipe}.yaml"
    run = Path("runs") / shown.recipe.replace("_", "-")
    ssl_ae("pretrain", str(recipe))
    if shown.figure:
        return run / "pretrain" / "figures" / shown.figure
    png = run / f"{shown.name}.png"
    ssl_ae(*({"RUN": str(run), "PNG": str(png)}.get(word, word) for word in shown.command))
    return png


def ssl_ae(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "ssl_ae", *words], check=True)


def small_copy(source: Path, target: Path) -> None:
    image = Image.open(source).convert("RGB")
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    image.quantize(COLOURS).save(target, optimize=True)


if __name__ == "__main__":
    main()
