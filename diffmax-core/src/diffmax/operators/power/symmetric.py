"""Symmetric powers of vectors: the monomials of degree p, and the order in which a state holds them.

For x of d entries there is one monomial x_i1 ... x_ip for each i1 <= ... <= ip, P = C(d + p - 1, p) of them, in lexicographic
order of the indices. Those that begin at index a or behind are the last C(d - a + p - 1, p), so the monomials of degree p that
begin with x_a are x_a times the end of those of degree p - 1: expansion is products of contiguous runs.

(q . k)^p = sum over the monomials of c_i q_i1 ... q_ip k_i1 ... k_ip, with c the multinomial coefficient (Eq. 31). It stands on
the queries' side; a state holds the plain monomials of keys.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def expanded_dim(size: int, degree: int) -> int:
    """P, the number of monomials of this degree in `size` variables."""
    if isinstance(size, torch.SymInt) or torch.compiler.is_compiling():  # math.comb takes no symbols
        found = 1
        for done in range(degree):
            found = found * (size + done) // (done + 1)
        return found
    return math.comb(size + degree - 1, degree)


def first_of(size: int, degree: int, index: int) -> int:
    """Where the monomials that begin with variable `index` start."""
    return expanded_dim(size, degree) - expanded_dim(size - index, degree)


@lru_cache(maxsize=32)
def _indices(size: int, degree: int) -> Tensor:
    if degree == 1:
        return torch.arange(size).unsqueeze(0)
    rest = _indices(size, degree - 1)
    runs = []
    for index in range(size):
        tail = rest[:, first_of(size, degree - 1, index) :]
        runs.append(torch.cat([torch.full((1, tail.shape[1]), index), tail]))
    return torch.cat(runs, 1)


def indices(size: int, degree: int) -> Tensor:
    """(p, P), int64 on the CPU: the variables of each monomial, ascending. Not to be changed."""
    return _indices(size, degree)


@lru_cache(maxsize=32)
def multiplicities(size: int, degree: int) -> Tensor:
    """(P,), float64 on the CPU: c, p! / the product of the factorials of how often each variable occurs. Not to be changed."""
    which = indices(size, degree)
    runs, divisors = torch.ones(which.shape[1], dtype=torch.float64), torch.ones(which.shape[1], dtype=torch.float64)
    for place in range(1, degree):  # in a sorted index, run lengths 1, 2, .. n multiply to n!
        runs = torch.where(which[place] == which[place - 1], runs + 1, 1.0)
        divisors *= runs
    return math.factorial(degree) / divisors


def coefficients(size: int, degree: int, like: Tensor) -> Tensor:
    """`multiplicities` in the dtype and on the device of a tensor."""
    return _constant(size, degree).to(like.dtype).to(like.device)


def _constant(size: int, degree: int) -> Tensor:
    return multiplicities(size, degree)


# What torch.compiler.assume_constant_result sets, without importing the compiler: it cannot trace a cached function.
_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def monomials(x: Tensor, degree: int) -> Tensor:
    """(..., d) -> (..., P), differentiable any number of times, in x's dtype."""
    found = x
    for done in range(1, degree):
        found = monomials_up(x, found, done)
    return found


def monomials_backward(x: Tensor, grad: Tensor, degree: int) -> Tensor:
    """The gradient for x of `monomials`, from that for its result; itself differentiable."""
    size, levels = x.shape[-1], [x]
    for done in range(1, degree - 1):
        levels.append(monomials_up(x, levels[-1], done))
    total = torch.zeros_like(x)
    for done in range(degree - 1, 0, -1):
        below, columns, of_below = levels[done - 1], [], torch.zeros_like(levels[done - 1])
        for index in range(size):
            start, first = first_of(size, done, index), first_of(size, done + 1, index)
            run = grad[..., first : first + below.shape[-1] - start]
            columns.append((run * below[..., start:]).sum(-1))
            of_below = of_below + torch.nn.functional.pad(run * x[..., index : index + 1], (start, 0))
        total = total + torch.stack(columns, -1)
        grad = of_below
    return total + grad


def monomials_up(x: Tensor, found: Tensor, degree: int) -> Tensor:
    """The monomials of degree + 1 from those of `degree`."""
    size = x.shape[-1]
    return torch.cat([x[..., index : index + 1] * found[..., first_of(size, degree, index) :] for index in range(size)], -1)


def even_power(t: Tensor, degree: int) -> Tensor:
    """t^p by multiplications."""
    square = t * t
    found = square
    for _ in range(degree // 2 - 1):
        found = found * square
    return found
