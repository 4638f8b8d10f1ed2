"""From the batch of an optimizer step to the micro-batches that make it up."""


def micro_batches_per_step(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """How many micro-batches every rank feeds in an optimizer step (`--global-batch-size` of Megatron-DeepSpeed).

    Args:
        global_batch_size: sequences per optimizer step, over all ranks.
        micro_batch_size: sequences per rank and forward pass.
        world_size: number of data-parallel ranks.

    Raises:
        ValueError: whole micro-batches do not add up to the global batch; names the nearest values that do.
    """
    per_round = micro_batch_size * world_size
    count, rest = divmod(global_batch_size, per_round)
    if rest == 0:
        return count
    batches = [value for value in (count * per_round, (count + 1) * per_round) if value > 0]
    remedies = [f"data.global_batch_size to {' or '.join(map(str, batches))}"]
    share, uneven = divmod(global_batch_size, world_size)
    if not uneven:
        divisors = [size for size in range(1, share + 1) if share % size == 0]
        below = [size for size in divisors if size < micro_batch_size][-1:]
        above = [size for size in divisors if size > micro_batch_size][:1]
        remedies.append(f"data.micro_batch_size to {' or '.join(map(str, below + above))}")
    ranks = "1 rank feeds" if world_size == 1 else f"{world_size} ranks feed"
    raise ValueError(
        f"data.global_batch_size {global_batch_size} is not a multiple of the {per_round} sequences that {ranks} at a "
        f"time with data.micro_batch_size {micro_batch_size}: set {', or '.join(remedies)}."
    )
