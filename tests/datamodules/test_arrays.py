"""Small image sets: the embedded sample against the published files, CIFAR in both of its layouts, and bad files."""

from __future__ import annotations

import gzip
import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets

from datamodules.arrays import read_cifar, read_fashion_mnist
from datamodules.ledger import DataLedger

# Debian's dataset-fashion-mnist
IDX = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture
def ledger() -> DataLedger:
    return DataLedger(data_free=False)


def test_embedded_sample_has_the_promised_contents(ledger: DataLedger):
    test = read_fashion_mnist("test", "evaluation", ledger)
    assert test.pixels.shape == (10_000, 1, 28, 28)
    assert test.pixels.dtype == torch.uint8
    assert torch.equal(torch.bincount(test.labels), torch.full((10,), 1000))
    train = read_fashion_mnist("train", "calibration", ledger)
    assert train.pixels.shape == (1024, 1, 28, 28)
    assert set(torch.bincount(train.labels).tolist()) == {102, 103}
    assert len(train.index.unique()) == 1024
    assert int(train.index.max()) < 60_000


@pytest.mark.skipif(not IDX.is_dir(), reason=f"needs {IDX} (Debian: dataset-fashion-mnist)")
def test_embedded_sample_equals_the_published_files(ledger: DataLedger):
    for split, name in (("test", "t10k"), ("train", "train")):
        images = gzip.decompress((IDX / f"{name}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((IDX / f"{name}-labels-idx1-ubyte.gz").read_bytes())[8:]
        stored = read_fashion_mnist(split, "evaluation", ledger)  # type: ignore[arg-type]
        index = stored.index.numpy()
        expected = np.frombuffer(images, np.uint8).reshape(-1, 1, 28, 28)[index]
        assert np.array_equal(stored.pixels.numpy(), expected)
        assert np.array_equal(stored.labels.numpy(), np.frombuffer(labels, np.uint8)[index])


def write_npz(folder: Path, name: str = "test.npz", **arrays: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / name, **arrays)


def test_cifar_npz_is_read_channels_first(tmp_path: Path, ledger: DataLedger):
    x = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    write_npz(tmp_path / "cifar10", x=x, y=np.arange(6, dtype=np.uint8))
    stored = read_cifar(tmp_path, 10, "test", "evaluation", ledger)
    assert np.array_equal(stored.pixels.numpy(), x.transpose(0, 3, 1, 2))
    assert stored.labels.dtype == torch.int64
    assert stored.index.tolist() == list(range(6))


def test_cifar_in_torchvisions_layout(tmp_path: Path, ledger: DataLedger, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    x = np.random.default_rng(0).integers(0, 256, (5, 3072), dtype=np.uint8)
    (folder / "test_batch").write_bytes(pickle.dumps({"data": x, "labels": [3, 1, 4, 1, 5]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))

    def md5(path: Path) -> str:
        return hashlib.md5(path.read_bytes()).hexdigest()

    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5(folder / "test_batch")]])
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    stored = read_cifar(tmp_path, 10, "test", "evaluation", ledger)
    assert np.array_equal(stored.pixels.numpy(), x.reshape(5, 3, 32, 32))
    assert stored.labels.tolist() == [3, 1, 4, 1, 5]


def test_missing_files_are_named(tmp_path: Path, ledger: DataLedger):
    with pytest.raises(ValueError, match=r"cifar100/test\.npz.*CALIBRANT_DATA.*CIFAR100\(.*download=True\)"):
        read_cifar(tmp_path, 100, "test", "evaluation", ledger)
    with pytest.raises(ValueError, match="expected 10 or 100"):
        read_cifar(tmp_path, 1000, "test", "evaluation", ledger)


@pytest.mark.parametrize("content", ["empty", "text", "no labels", "pickled", "floats", "too few labels"])
def test_bad_files_are_named(tmp_path: Path, ledger: DataLedger, content: str):
    folder = tmp_path / "cifar10"
    x, y = np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2, np.uint8)
    write_npz(folder, x=x, y=y)
    if content in ("empty", "text"):
        (folder / "test.npz").write_bytes(b"" if content == "empty" else b"PK\x03\x04 and then nothing")
    elif content == "no labels":
        write_npz(folder, x=x)
    elif content == "pickled":
        write_npz(folder, x=np.array([None, {}], dtype=object), y=y)
    elif content == "floats":
        write_npz(folder, x=x.astype(np.float32), y=y)
    else:
        write_npz(folder, x=x, y=y[:1])
    with pytest.raises(ValueError, match=r"test\.npz: expected"):
        read_cifar(tmp_path, 10, "test", "evaluation", ledger)


@pytest.mark.data
def test_real_subset_is_balanced(data_root: Path, ledger: DataLedger):
    stored = read_cifar(data_root, 10, "train", "calibration", ledger)
    assert torch.equal(torch.bincount(stored.labels), torch.full((10,), 500))
    assert stored.pixels.shape == (5000, 3, 32, 32)
