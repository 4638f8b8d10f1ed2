"""The clock of a run: seconds and FLOPs since its beginning, over all restarts. It is part of the module's state."""

import time
from typing import Any

SPANS = ("run", "steps", "validation")


class RunClock:
    """Seconds of a run by span, and the FLOPs of its finished steps.

    Attributes:
        flops: computed from the configuration (`model/counting.py`), over all ranks.

    Spans:
        run: from the start of training, with everything between steps.
        steps: training steps, without waiting for data and without callbacks.
        validation: validations of the fit.
    """

    def __init__(self) -> None:
        self.flops = 0
        self._seconds = dict.fromkeys(SPANS, 0.0)
        self._started: dict[str, float] = {}

    def start(self, span: str) -> None:
        """Start a span."""
        self._started[span] = time.perf_counter()

    def stop(self, span: str) -> None:
        """Stop a span, if it was started."""
        if (started := self._started.pop(span, None)) is not None:
            self._seconds[span] += time.perf_counter() - started

    def seconds(self, span: str) -> float:
        """Return the seconds of a span since the run began, up to now."""
        started = self._started.get(span)
        return self._seconds[span] + (0.0 if started is None else time.perf_counter() - started)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far."""
        return {"flops": self.flops, "seconds": {span: self.seconds(span) for span in SPANS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the sums of a checkpoint."""
        self.flops, self._seconds, self._started = state["flops"], dict(state["seconds"]), {}
