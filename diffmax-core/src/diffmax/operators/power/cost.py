"""How long a chunk is, and whether there is one: by the multiplications that each way takes."""

from __future__ import annotations

from diffmax.operators.power.symmetric import expanded_dim

CHUNKS = (64, 128, 256, 512, 1024)
# Measured with the compiled CPU kernels, forward: for D = D_v = 16, 32 and 64 and p = 2 both ways take equally long at
# 400, 1000 and 4000 tokens; for D = 16, p = 4 and 4000 tokens the quadratic form takes 0.4 times as long.
# An entry of an expanded query or key, and a weight, cost as much as this many multiplications beside those that they are in.
ENTRY = 2
# An entry of the state costs as much as this many for each chunk, after which it is read and written.
STATE = 32


def quadratic_cost(length: int, many: int, size: int, value_size: int) -> float:
    """Multiplications for all pairs of a query and a key that it sees, for one head of queries."""
    seen = length * many - length * (length - 1) / 2
    return seen * (size + value_size + ENTRY)


def chunked_cost(
    many: int, chunk: int, size: int, value_size: int, degree: int, heads: float, length: int | None = None
) -> float:
    """Likewise, with `heads` heads of queries for one of keys; a state for every chunk. `length`: of queries, if not `many`."""
    length = many if length is None else length
    rows = expanded_dim(size, degree)
    through_state = rows * (value_size + 1 + ENTRY) * (length + many / heads)
    return length * chunk / 2 * (size + value_size + ENTRY) + through_state + rows * value_size * STATE * many / chunk / heads


def chosen_chunk(length: int, many: int, size: int, value_size: int, degree: int, heads: float = 1.0) -> int:
    """Tokens of a chunk; `many` where the quadratic form is cheaper.

    Args:
        length, many: Numbers of queries and keys.
        size, value_size: Of a head.
        heads: Query heads for one head of keys.
    """
    if many <= CHUNKS[0] or heads == 0:
        return max(many, 1)
    costs = {chunk: chunked_cost(many, chunk, size, value_size, degree, heads, length) for chunk in CHUNKS if chunk < many}
    best = min(costs, key=costs.__getitem__)
    return best if costs[best] < quadratic_cost(length, many, size, value_size) else many
