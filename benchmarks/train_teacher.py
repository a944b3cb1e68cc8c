"""Train the embedded teachers: ResNet-20 on Fashion-MNIST, with BatchNorm (the default) and without (Fixup).

    python benchmarks/train_teacher.py --data <folder with the four IDX files, gzipped or not>

The embedded weights: this command, 94.93 % top-1 on the 10,000 test images; seed 0, 60 epochs, 1 thread of an AMD EPYC,
torch 2.15, 95 minutes, 2026-11-24.

    python benchmarks/train_teacher.py --network fixup_resnet20 --epochs 16 --lr 0.05 --clip 1 \\
        --output fixup_resnet20.safetensors --data <folder>

The embedded network without BatchNorm: 91.19 %; seed 0, 1 thread of an AMD EPYC, torch 2.15, 28 minutes, 2026-11-24.

SGD with Nesterov momentum under one cycle of the learning rate; forward and backward in bfloat16 under autocast; random
flips and crops, and random erasing (Zhong et al., AAAI 2020, arXiv 1708.04896) but for the last tenth of the epochs, so
that the stored BatchNorm statistics are those of whole images; the last epoch is the result, no checkpoint is picked.
Bitwise repeatable on the same machine, versions and number of threads.
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from deployment.whole_file import whole_file
from networks.cifar_resnet import CifarResNet
from networks.fixup_resnet import FixupResNet, add_branch_multipliers, fold_branch_multipliers

MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images
CROP_PADDING = 2
NETWORKS: dict[str, type[CifarResNet] | type[FixupResNet]] = {"resnet20": CifarResNet, "fixup_resnet20": FixupResNet}


def read_idx(folder: Path, name: str) -> Tensor:
    """Read one IDX file of unsigned bytes as a tensor; `ValueError` names the file that is missing."""
    for path, opener in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if path.exists():
            with opener(path, "rb") as file:
                raw = file.read()
            dims = raw[3]
            shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
            return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape).copy())
    raise ValueError(f"--data: expected {name} or {name}.gz in {folder}; Debian: dataset-fashion-mnist")


def load_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images, normalised, (N, 1, 28, 28), and labels, (N,)."""
    images = read_idx(folder, f"{split}-images-idx3-ubyte").unsqueeze(1).float().div_(255)
    return images.sub_(MEAN).div_(STD), read_idx(folder, f"{split}-labels-idx1-ubyte").long()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random horizontal flip and random crop from an image padded by two pixels, one draw per image."""
    n, _, height, width = images.shape
    padded = F.pad(images, (CROP_PADDING,) * 4, value=-MEAN / STD)
    top, left = torch.randint(0, 2 * CROP_PADDING + 1, (2, n), generator=generator)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    flipped = torch.rand(n, generator=generator) < 0.5
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def erase(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blank a rectangle of 2 to 25 % of the area, aspect ratio 0.5 to 2, in half of the images; in place."""
    n, _, height, width = images.shape
    draw = torch.rand(5, n, generator=generator)
    area, aspect = (0.02 + 0.23 * draw[0]) * height * width, 2 ** (2 * draw[1] - 1)
    h, w = (area * aspect).sqrt().clamp(max=height), (area / aspect).sqrt().clamp(max=width)
    top, left = draw[2] * (height - h), draw[3] * (width - w)
    y, x = torch.arange(height), torch.arange(width)
    rows = (y >= top[:, None]) & (y < (top + h)[:, None])
    columns = (x >= left[:, None]) & (x < (left + w)[:, None])
    blank = rows[:, :, None] & columns[:, None, :] & (draw[4] < 0.5)[:, None, None]
    return images.masked_fill_(blank.unsqueeze(1), 0.0)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 in per cent."""
    model.eval()
    hits = sum(
        (model(x).argmax(1) == y).sum().item() for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return 100 * hits / len(labels)


def parameter_groups(model: nn.Module, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Weights with decay, biases and norms without; multipliers of residual branches at a tenth of the rate (Fixup)."""
    scales = add_branch_multipliers(model) if isinstance(model, FixupResNet) else []
    slow = {id(scale) for scale in scales}
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1 and id(p) not in slow]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay, "lr": options.lr},
        {"params": plain, "weight_decay": 0.0, "lr": options.lr * (0.1 if scales else 1.0)},
        {"params": scales, "weight_decay": 0.0, "lr": options.lr * 0.1},
    ]
    return [group for group in groups if group["params"]]


def train(options: argparse.Namespace) -> None:
    """Train, print one line an epoch, and write the weights of the last epoch."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    generator = torch.Generator().manual_seed(options.seed)
    images, labels = load_split(options.data, "train")
    test_images, test_labels = load_split(options.data, "t10k")
    model = NETWORKS[options.network](20, num_classes=10, in_channels=1).to(memory_format=torch.channels_last)
    groups = parameter_groups(model, options)
    optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=0.9, nesterov=True)
    steps = len(images) // options.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in groups],
        total_steps=steps * options.epochs,
        pct_start=0.2,
        cycle_momentum=False,
    )
    for epoch in range(options.epochs):
        started, total = time.time(), 0.0
        model.train()
        order = torch.randperm(len(images), generator=generator)[: steps * options.batch_size]
        for index in order.split(options.batch_size):
            batch = augment(images[index], generator)
            if epoch < options.epochs - options.epochs // 10:
                erase(batch, generator)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels[index])
            optimizer.zero_grad()
            loss.backward()
            if options.clip:
                nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(
            f"epoch {epoch + 1}/{options.epochs}  loss {total / steps:.4f}  {time.time() - started:.0f} s", flush=True
        )
    if isinstance(model, FixupResNet):
        fold_branch_multipliers(model)
    print(f"test top-1 {accuracy(model, test_images, test_labels):.2f} %")
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    with whole_file(options.output) as temporary:
        save_file(state, temporary, metadata={"network": f"{type(model).__name__}(20, 10, 1)", "data": "Fashion-MNIST"})


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the Fashion-MNIST IDX files")
    parser.add_argument("--output", type=Path, default=Path("fashion_resnet20.safetensors"))
    parser.add_argument("--network", choices=NETWORKS, default="resnet20", help="fixup_resnet20: without BatchNorm")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--clip", type=float, default=0.0, help="largest norm of the gradient; 0: not clipped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
