"""What a launch of products is given, by name; and which of its products a block is of."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from pallas_kernels import ptx
from pallas_kernels.products.around import Form
from pallas_kernels.products.head_results import HeadResults, Tokens
from pallas_kernels.products.sums import Product, Results, RowResults, Sums
from pallas_kernels.ptx import V, i32


class Given:
    """Addresses of a launch's operands and results, in the order of `Around.operands`."""

    def __init__(self, form: Form, outputs: Sequence[int], addresses: Sequence[V]):
        self.form = form
        self.x, *rest = addresses
        self.norm = rest.pop(0) if form.norm else None
        self.residual = rest.pop(0) if form.residual else None
        self.peers = rest.pop(0) if form.devices > 1 else None
        biases: list[V | None] = [None] * len(outputs)
        if form.append:
            self.starts, self.firsts, *self.tables = (rest.pop(0) for _ in range(4))
            if form.append.biased:
                biases = [rest.pop(0) for _ in outputs]
        self.weights, results = rest[: len(outputs)], rest[len(outputs) :]
        if form.append:  # what is written in place comes before the results
            results = [results[-1], *results[:-1]]
        each = zip(self.weights, results, outputs, range(len(outputs)), biases, strict=False)
        self.products = [Product(w, y, i32(n), i32(i), bias) for w, y, n, i, bias in each]

    def chosen(self, blocks: Sequence[int], block: V) -> tuple[Product, V]:
        """The product that a block is of, and its number among that one's; `blocks`: how many each
        has."""
        (first, *others), before = self.products, 0
        found, start = first, i32(0)
        for other, here in zip(others, blocks, strict=False):
            before += here
            mine = block >= before
            found = _select(mine, other, found)
            start = ptx.select(mine, i32(before), start)
        return found, block - start


def _select(condition: V, yes: Product, no: Product) -> Product:
    pick = functools.partial(ptx.select, condition)
    bias = None if yes.bias is None or no.bias is None else pick(yes.bias, no.bias)
    return Product(
        pick(yes.weight, no.weight),
        pick(yes.result, no.result),
        pick(yes.outputs, no.outputs),
        pick(yes.number, no.number),
        bias,
    )


class Finish:
    """How a thread finishes its quads (`Sums.mine`) of any product.

    Made before the wait: positions that may be read there are.
    """

    def __init__(self, sums: Sums, given: Given, mine: Sequence[tuple[V, V]], out_bytes: int):
        self.sums, self.given, self.out_bytes = sums, given, out_bytes
        self.quads = [index for index, _ in mine]
        append = given.form.append
        self.early = self._tokens() if append and append.ahead else None

    def _tokens(self) -> Tokens:
        given, append = self.given, self.given.form.append
        assert append
        return Tokens(self.sums, append, given.starts, given.firsts, self.quads)

    def of(self, product: Product, first: V, end: V) -> Results:
        """Results first … end − 1 of a product; of q, k and v pairs."""
        given, append = self.given, self.given.form.append
        if append:
            tokens = self.early or self._tokens()
            return HeadResults(self.sums, append, product, given.tables, tokens, first, end)
        residual, size = given.residual, self.out_bytes
        return RowResults(self.sums, given.form, product, first, end, residual, size)
