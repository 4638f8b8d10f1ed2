"""Derive seeds from names, so that random tensors, batches and routings do not depend on rank or process."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Map `parts` to a 63-bit seed.

    The result depends on the parts only, not on a global generator, `PYTHONHASHSEED` or the rank. A weight drawn from
    `derive_seed(seed, name, expert)` is therefore the same at every expert-parallel degree.

    Args:
        parts: integers and strings; their order matters, and `1` differs from `"1"`.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
