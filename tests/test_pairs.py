"""The kits' cases are chosen by pairs: every pair is there, and not their product."""

from itertools import combinations, product

import pytest

from diffmax.testing.attention.cases import CASES
from diffmax.testing.pairs import every_pair
from diffmax.testing.rows import cases
from diffmax.testing.rows.conformance import DTYPES, FORWARD_PAIRS, GRADIENT_PAIRS

FACTORS = {
    "two": [range(3), range(5)],
    "equal": [range(4)] * 5,
    "one of one": [range(7), range(1), range(2)],
    "the row kit's": [cases.ALPHAS, DTYPES, cases.SHAPES, cases.SIGMAS],
}


def pairs_in(rows):
    """Of ((factor, value), (factor, value))."""
    return {pair for row in rows for pair in combinations(enumerate(row), 2)}


@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
def test_every_pair_of_values_occurs(factors):
    assert pairs_in(every_pair(*factors)) == pairs_in(product(*factors))


@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
def test_there_are_few_rows_and_they_are_the_same_each_time(factors):
    first, second = sorted((len(values) for values in factors), reverse=True)[:2]
    rows = every_pair(*factors)
    assert first * second <= len(rows) <= 2 * first * second
    assert rows == every_pair(*factors)


@pytest.mark.parametrize(
    ("chosen", "shapes"), [(FORWARD_PAIRS, cases.SHAPES), (GRADIENT_PAIRS, cases.GRADIENT_SHAPES)], ids=["forward", "gradients"]
)
def test_the_row_kit_calls_every_pair_of_alpha_dtype_shape_and_spread(chosen, shapes):
    rows = [(*key, *rest) for key, values in chosen.items() for rest in values]
    assert pairs_in(rows) == pairs_in(product(cases.ALPHAS, DTYPES, shapes, cases.SIGMAS))
    assert set(chosen) == set(product(cases.ALPHAS, DTYPES))  # no test of an alpha and a dtype is empty


# a call has one attn_mask, of booleans or of numbers
APART = {("bias", "mask")}


def test_every_pair_of_features_of_attention_occurs_in_a_case():
    known = {feature for case in CASES.values() for feature in case.features()}
    together = {pair for case in CASES.values() for pair in combinations(sorted(case.features()), 2)}
    assert set(combinations(sorted(known), 2)) - together == APART
