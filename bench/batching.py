"""Fixed batches: B requests in flight, and the next group starts when all of the group have ended (pure).

This is what "batch size B" means in the protocol. A server that is kept at B by refilling (a concurrency) batches
differently and is another experiment, not this one.
"""

from collections.abc import Iterator


def groups(count: int, size: int) -> Iterator[range]:
    """Indices 0 … count-1 in consecutive groups of `size` (the last may be shorter); raises ValueError if size < 1."""
    if size < 1:
        raise ValueError(f"a batch holds at least one sample, not {size}")
    for first in range(0, count, size):
        yield range(first, min(first + size, count))
