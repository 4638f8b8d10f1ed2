"""What benchmarks that train have in common."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Of a Trainer that is timed: endless data, and nothing is written or printed beside what is measured.
QUIET: dict[str, Any] = {
    "max_epochs": -1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
