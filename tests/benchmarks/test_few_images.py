"""The picture of accuracy against the number of images: what belongs to one curve, and that a file comes out."""

from __future__ import annotations

from pathlib import Path

from benchmarks.few_images import curves, draw

BLOCK = {"weight": "adaround", "images": "real", "image_count": "16", "top1": "80.0", "changes": "generator.steps=200"}
LAYER = BLOCK | {"changes": "reconstruction.drop=0.0 reconstruction.granularity=layer"}


def test_a_curve_is_one_method_on_one_kind_of_images_with_all_seeds():
    rows = [BLOCK | {"image_count": "64"}, BLOCK, BLOCK | {"top1": "82.0"}, LAYER, LAYER | {"images": "noise"}]

    found = curves(rows)

    assert list(found) == [("adaround, block", "real"), ("adaround, layer", "noise"), ("adaround, layer", "real")]
    assert found["adaround, block", "real"] == {16: [80.0, 82.0], 64: [80.0]}


def test_picture_is_written(tmp_path: Path):
    draw(curves([BLOCK, BLOCK | {"image_count": "64"}, LAYER]), tmp_path / "some.png", "title")

    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")
