"""The batch of an optimizer step: its growth, and its micro-batches."""

from dataclasses import dataclass

from nlgmoe.validation import SettingError, require_at_least


@dataclass(frozen=True)
class BatchRampUp:
    """Small batches first: the global batch grows in equal steps up to `global_batch_size` (`--rampup-batch-size`).

    A step keeps its number of micro-batches, which are smaller at first: `start` and `increment` are multiples of
    `global_batch_size / micro_batch_size`.

    Attributes:
        start: sequences of the first optimizer steps, over all ranks.
        increment: sequences by which the batch grows each time.
        tokens: the batch reaches `global_batch_size` after this many tokens, counted as sequences times `seq_len`.
    """

    start: int
    increment: int
    tokens: int

    def __post_init__(self) -> None:
        require_at_least(1, self, "start", "increment", "tokens")


def batch_size_after(samples: int, seq_len: int, global_batch_size: int, ramp_up: BatchRampUp | None) -> int:
    """Return the sequences of the optimizer step that follows the first `samples` sequences, over all ranks."""
    if ramp_up is None or samples * seq_len >= ramp_up.tokens:
        return global_batch_size
    increments = (global_batch_size - ramp_up.start) // ramp_up.increment
    return ramp_up.start + ramp_up.increment * (samples * seq_len * increments // ramp_up.tokens)


def check_ramp_up(ramp_up: BatchRampUp, global_batch_size: int | None, micro_batch_size: int) -> None:
    """Check that every batch of the ramp-up can be made, on any number of ranks."""
    if global_batch_size is None:
        raise SettingError("global_batch_size=null: batch_ramp_up has no batch to grow to; set it")
    growth = global_batch_size - ramp_up.start
    if growth < 0:
        raise SettingError(f"start={ramp_up.start} is above global_batch_size={global_batch_size}; lower it")
    if growth % ramp_up.increment:
        raise SettingError(
            f"start={ramp_up.start} does not reach global_batch_size={global_batch_size} by increment={ramp_up.increment}; "
            "change one of them"
        )
    if global_batch_size % micro_batch_size:
        return  # `micro_batches_per_step` reports that
    unit = global_batch_size // micro_batch_size
    for setting in ("start", "increment"):
        if (value := getattr(ramp_up, setting)) % unit:
            raise SettingError(
                f"{setting}={value} must be a multiple of the {unit} micro-batches that make up global_batch_size="
                f"{global_batch_size} with micro_batch_size={micro_batch_size}; change one of them"
            )


def micro_batches_per_step(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return the micro-batches of each of the data-parallel ranks in an optimizer step (`--global-batch-size` of Megatron)."""
    per_round = micro_batch_size * world_size
    count, rest = divmod(global_batch_size, per_round)
    if rest == 0:
        return count
    ranks = "1 rank feeds" if world_size == 1 else f"{world_size} ranks feed"
    nearest = " or ".join(str(value) for value in (count * per_round, (count + 1) * per_round) if value > 0)
    raise SettingError(
        f"data.global_batch_size={global_batch_size} is not a multiple of the {per_round} sequences that {ranks} at a "
        f"time with data.micro_batch_size={micro_batch_size}; set it to {nearest}, or another size"
    )
