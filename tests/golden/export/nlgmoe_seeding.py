# nlgmoe/seeding.py of nlgmoe 0.1.0, copied by `nlgmoe export`; only its imports are others.
# SPDX-License-Identifier: Apache-2.0
"""Seeds as pure functions of names: the same tensor, batch or routing draw is random in the same way wherever it is computed."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Map `parts` to a 63-bit seed.

    The result depends on every part and on nothing else (no global generator, no `PYTHONHASHSEED`, no rank), so a
    weight drawn from `derive_seed(seed, name, expert)` is the same at every expert-parallel degree.

    Args:
        parts: integers and strings; their order matters, and `1` differs from `"1"`.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
