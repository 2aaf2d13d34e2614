"""How long a chunk is, and whether there is one: by the multiplications that each way takes."""

from __future__ import annotations

from diffmax.operators.power.symmetric import expanded_dim

CHUNKS = (64, 128, 256, 512, 1024)
# An entry of an expanded query or key costs as much as this many multiplications, beside those of the state that it meets.
ENTRY = 8


def quadratic_cost(length: int, many: int, size: int, value_size: int) -> float:
    """Multiplications for all pairs of a query and a key that it sees, for one head of queries."""
    seen = length * many - length * (length - 1) / 2
    return seen * (size + value_size + ENTRY)


def chunked_cost(many: int, chunk: int, size: int, value_size: int, degree: int, heads: float) -> float:
    """Likewise, with `heads` heads of queries for one of keys; a state for every chunk."""
    through_state = expanded_dim(size, degree) * (value_size + 1 + ENTRY)
    return many * (chunk / 2 * (size + value_size + ENTRY) + through_state * (1 + 1 / heads))


def chosen_chunk(length: int, many: int, size: int, value_size: int, degree: int, heads: float = 1.0) -> int:
    """Tokens of a chunk; `many` where the quadratic form is cheaper.

    Args:
        length, many: Numbers of queries and keys.
        size, value_size: Of a head.
        heads: Query heads for one head of keys.
    """
    if many <= CHUNKS[0] or length < many:
        return max(many, 1)
    costs = {chunk: chunked_cost(many, chunk, size, value_size, degree, heads) for chunk in CHUNKS if chunk < many}
    best = min(costs, key=costs.__getitem__)
    return best if costs[best] < quadratic_cost(length, many, size, value_size) else many
