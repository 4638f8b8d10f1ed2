"""What tests of the cost model share."""

import pytest

from nlgmoe.layers.experts import Experts


@pytest.fixture
def biases_as_on_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the experts' biases as a product; a CPU gathers them, in fp32, and the cost model is of accelerators."""
    monkeypatch.setattr(Experts, "_gather_bias", Experts._multiply_bias)
