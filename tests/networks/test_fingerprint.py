"""The fingerprint of tensors: what changes it and what does not."""

from __future__ import annotations

import hashlib

import torch

from networks.fingerprint import fingerprint


def test_equals_the_hash_written_out_by_hand():
    expected = hashlib.sha256(b"a:torch.float32:(2,);" + b"\x00\x00\x80\x3f\x00\x00\x00\x40").hexdigest()[:16]
    assert fingerprint({"a": torch.tensor([1.0, 2.0])}) == expected


def test_order_and_layout_do_not_matter_but_contents_do():
    x = torch.arange(12.0).view(3, 4)
    base = fingerprint({"x": x, "n": torch.tensor(3)})
    assert base == fingerprint({"n": torch.tensor(3), "x": x.t().contiguous().t()})
    changed = x.clone()
    changed[0, 0] = 1e-30
    others = [{"x": changed}, {"x": x.view(4, 3)}, {"x": x.double()}, {"y": x}]
    digests = [fingerprint({"n": torch.tensor(3), **other}) for other in others]
    assert len({base, *digests}) == 5
