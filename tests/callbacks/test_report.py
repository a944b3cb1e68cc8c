"""What a run tells: when a float accuracy is worth a warning."""

from __future__ import annotations

import pytest

from callbacks.report import flag_float_accuracy


@pytest.mark.parametrize(
    ("stated", "flagged"), [(91.73, False), (91.45, False), (91.4, True), (92.1, True), (None, False)]
)
def test_a_float_accuracy_is_flagged_beyond_the_tolerance(
    stated: float | None, flagged: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    message = flag_float_accuracy(91.73, stated, 0.3)
    assert (message is not None) == flagged == ("warning" in capsys.readouterr().out)
    assert message is None or ("91.73" in message and f"{stated:.2f}" in message)
