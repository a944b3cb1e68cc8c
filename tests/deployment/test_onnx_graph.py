"""Integers are packed as onnx itself packs them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deployment.onnx_graph import OnnxGraph, Storage, packed


@given(st.sampled_from([2, 4, 8, 16, 32]), st.booleans(), st.data())
def test_what_is_packed_is_what_onnx_reads(bits: int, signed: bool, data: st.DataObject) -> None:
    storage = Storage(bits, signed)
    values = data.draw(st.lists(st.integers(storage.low, storage.high), min_size=1, max_size=9))
    graph = OnnxGraph()
    graph.constant("x", torch.tensor(values), storage)
    assert onnx.numpy_helper.to_array(graph.constants[0]).astype(np.int64).tolist() == values
    assert graph.weight_bytes == -(-len(values) * bits // 8)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(AssertionError):
        packed(torch.tensor([8]), Storage(4, True))


def test_names_are_given_once() -> None:
    graph = OnnxGraph()
    assert [graph.add("Relu", ["x"], "y") for _ in range(3)] == ["y", "y_2", "y_3"]
