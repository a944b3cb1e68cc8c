"""Pack the embedded sample of Fashion-MNIST: all test images and 1,024 training images, stratified by class.

    python -m benchmarks.pack_fashion_mnist --data <folder with the four IDX files, gzipped or not>

Xiao, Rasul and Vollgraf, arXiv 1708.07747; MIT licence. The same files come out on every machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.train_teacher import read_idx
from datamodules.selection import stratified

TRAIN_COUNT = 1024


def pack(data: Path, split: str, index: Tensor | None, output: Path) -> None:
    """Write `x` (N, 28, 28) uint8, `y` (N,) uint8 and `index` (N,) int64, positions in the original split."""
    images = read_idx(data, f"{split}-images-idx3-ubyte")
    labels = read_idx(data, f"{split}-labels-idx1-ubyte")
    index = torch.arange(len(labels)) if index is None else index
    np.savez_compressed(output, x=images[index].numpy(), y=labels[index].numpy(), index=index.numpy())
    print(f"{output}: {len(index)} images, {output.stat().st_size} bytes")


def main() -> None:
    """Parse the command line and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the Fashion-MNIST IDX files")
    parser.add_argument("--output", type=Path, default=Path("datamodules/fashion_mnist"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chosen = stratified(read_idx(options.data, "train-labels-idx1-ubyte").long(), TRAIN_COUNT, options.seed)
    pack(options.data, "t10k", None, options.output / "test.npz")
    pack(options.data, "train", chosen.sort().values, options.output / f"train_{TRAIN_COUNT}.npz")


if __name__ == "__main__":
    main()
