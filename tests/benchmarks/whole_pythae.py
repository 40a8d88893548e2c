"""The job of a user of pythae: IDX files to images, three epochs of a VAE, codes to Parquet, a classifier on the codes.

    python -m tests.benchmarks.whole_pythae FOLDER_WITH_THE_IDX_FILES OUT

What `ssl-ae run` does with 54,000 rows to train on and 6,000 to validate by, this does with the same rows.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pythae.data.datasets import BaseDataset
from pythae.models import VAE, VAEConfig
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from sklearn.linear_model import LogisticRegression

VALIDATION, EPOCHS, BATCH, EMBEDDED_AT_ONCE = 6_000, 3, 128, 1024


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: two zeros, the type, the number of dimensions, their sizes, the values."""
    content = path.read_bytes()
    shape = np.frombuffer(content, ">i4", content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def main(source: Path, out: Path) -> None:
    x, y = {}, {}
    for split, name in (("train", "train"), ("test", "t10k")):
        x[split] = torch.from_numpy(read_idx(source / f"{name}-images-idx3-ubyte")[:, None].astype(np.float32) / 255)
        y[split] = read_idx(source / f"{name}-labels-idx1-ubyte")
    learnt = len(x["train"]) - VALIDATION
    data = BaseDataset(x["train"], torch.from_numpy(y["train"].copy()))
    torch.manual_seed(0)
    model = VAE(VAEConfig(input_dim=(1, 28, 28), latent_dim=16, reconstruction_loss="bce"))
    options = BaseTrainerConfig(
        output_dir=str(out),
        num_epochs=EPOCHS,
        learning_rate=1e-3,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        no_cuda=True,
    )
    train, val = (BaseDataset(data.data[part], data.labels[part]) for part in (slice(learnt), slice(learnt, None)))
    BaseTrainer(model, train, val, training_config=options).train()
    model.eval()
    codes = {}
    with torch.no_grad():
        for split in x:
            codes[split] = torch.cat([model.embed(part) for part in x[split].split(EMBEDDED_AT_ONCE)]).numpy()
            column = pa.FixedSizeListArray.from_arrays(pa.array(codes[split].reshape(-1)), codes[split].shape[1])
            pq.write_table(pa.table({"label": y[split], "latent": column}), out / f"{split}.parquet")
    head = LogisticRegression(max_iter=1000).fit(codes["train"][:learnt], y["train"][:learnt])
    print(f"accuracy on validation: {head.score(codes['train'][learnt:], y['train'][learnt:]):.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
