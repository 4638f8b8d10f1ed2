"""The part of a blend that a sample comes from: exact arithmetic on the sample's number, without tables.

Megatron writes part and number of each sample of the run into arrays before training, picking every time the part that
is furthest behind its share: 146 million entries for 300B tokens.
"""

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class _Fork:
    left: "int | _Fork"  # an integer is a part
    right: "int | _Fork"
    left_weight: int
    weight: int

    def count_left(self, samples: int) -> int:
        """Return how many of the first `samples` are the left branch's: its share, rounded half up."""
        return (2 * samples * self.left_weight + self.weight) // (2 * self.weight)


class Interleaving:
    """The part that each sample of a blend comes from, and the sample's number in it.

    The parts are the leaves of a binary tree. Of the first n samples of a node whose branches weigh l and r, the left
    branch has had n l / (l + r), rounded to the nearest whole number; a sample that raises this count is the left branch's.

    **At every point each part is within 1.68 samples of its share.** At a node that has had n samples, a branch with the
    fraction p of its weight has had n p + e, |e| <= 1/2, so its distance d from its share of all samples is p times the
    node's, plus e. From the root, which has none, down to a part of weight w: |d| <= (1 + w/a1 + w/a2 + ...) / 2, where a1,
    a2, ... are the weights of the nodes above it without the root. The tree is Huffman's, which joins the two lightest nodes
    at a time: what a node is joined with, from the second one above a part on, is no lighter than the node below it. So
    a1 > w, a2 >= a1 + w, a3 >= a2 + a1, ...: they grow as Fibonacci's numbers, and the sum is below 1 + 1 + 1/2 + 1/3 +
    1/5 + 1/8 + ... = 3.36.

    Huffman's tree is also the one with the fewest divisions a sample, on average at most log2 of the number of parts plus 1.
    Python's whole numbers have no limit, so the counts are exact for any number of samples.

    Args:
        weights: whole numbers above 0.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        number = itertools.count()  # decides between equal weights, so that nodes themselves are never compared
        queue: list[tuple[int, int, int | _Fork]] = [
            (weight, next(number), part) for part, weight in enumerate(weights)
        ]
        heapq.heapify(queue)
        while len(queue) > 1:
            left_weight, _, left = heapq.heappop(queue)
            right_weight, _, right = heapq.heappop(queue)
            total = left_weight + right_weight
            heapq.heappush(queue, (total, next(number), _Fork(left, right, left_weight, total)))
        self._root = queue[0][2]

    def place(self, index: int) -> tuple[int, int]:
        """Return the part that sample `index` comes from, and the sample's number there."""
        node = self._root
        while isinstance(node, _Fork):
            before = node.count_left(index)
            if node.count_left(index + 1) > before:
                node, index = node.left, before
            else:
                node, index = node.right, index - before
        return node, index


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Weights in the same ratio, as the smallest whole numbers; 0.1 is a tenth, not the nearest binary fraction."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    unit = Fraction(
        math.gcd(*(weight.numerator for weight in exact)), math.lcm(*(weight.denominator for weight in exact))
    )
    return [int(weight / unit) for weight in exact]
