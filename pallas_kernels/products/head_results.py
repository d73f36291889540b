"""Where q, k and v go that are finished in the launch of their products (`products.append`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pallas_kernels import ptx
from pallas_kernels.products.append import AppendForm
from pallas_kernels.products.sums import Product, Results, Sums, rounded
from pallas_kernels.ptx import V, i32
from pallas_kernels.rope_append.steps import rotated, slot_of


@dataclasses.dataclass(frozen=True)
class _Token:
    """Of a row of activations: its number, its sequence, its slot in the buffer and whether that is
    written, its row in the tables of angles."""

    row: V
    sequence: V
    slot: V
    kept: V
    table_row: V


class Tokens:
    """Those of a thread's quads."""

    def __init__(self, sums: Sums, form: AppendForm, starts: V, firsts: V, mine: Sequence[V]):
        """mine: the quads."""
        tokens = sums.rows // form.batch

        def position(array: V, sequence: V) -> V:
            return ptx.load(array + sequence.to_i64() * 4)[0]

        alone = [position(array, i32(0)) for array in (starts, firsts)] if form.batch == 1 else None
        self.of_quads = []
        for index in mine:
            row = ptx.minimum(index, sums.quads - 1) // (sums.outputs // 4)
            sequence, token = (i32(0), row) if alone else (row // tokens, row % tokens)
            start, first = alone or [position(x, sequence) for x in (starts, firsts)]
            slot, kept = slot_of(start, token, form.slots, form.half)
            table_row = sequence * form.table_rows + token + (start - first)
            self.of_quads.append(_Token(row, sequence, slot, kept, table_row))


@dataclasses.dataclass(frozen=True)
class _Due:
    """What a quad of pairs is finished with: the biases of both channels, cos and sin; and where
    the first channel of the first one goes, if it is there."""

    biases: list[list[V]]
    cosines: list[V]
    sines: list[V]
    place: V
    inside: V


class HeadResults(Results):
    """The quads of a block, or a cluster: the pairs `first` … of q, k or v, those below `end`."""

    def __init__(
        self,
        sums: Sums,
        form: AppendForm,
        product: Product,
        tables: Sequence[V],
        tokens: Tokens,
        first: V,
        end: V,
    ):
        super().__init__(sums)
        self.append, self.product = form, product
        self.is_query, self.is_value = product.number.equals(0), product.number.equals(2)
        self.tables, self.tokens, self.first, self.end = tables, tokens, first, end

    def ahead(self, mine: Sequence[tuple[V, V]]) -> list[_Due]:
        return [
            self._due(index, token)
            for (index, _), token in zip(mine, self.tokens.of_quads, strict=True)
        ]

    def _due(self, index: V, token: _Token) -> _Due:
        form, product = self.append, self.product
        channels, half = form.channels, form.channels // 2
        pair = self.first + index % (self.sums.outputs // 4) * 4
        inside = pair < self.end
        pair = ptx.minimum(pair, self.end - 4)
        head, channel = pair // half, pair % half
        output = head * channels + channel
        biases: list[list[V]] = []
        if product.bias is not None:
            at = product.bias + (output * 2).to_i64()
            biases = [ptx.unpack_bf16s(ptx.load(at + x, 2)) for x in (0, channels)]
        at = ((token.table_row * channels + channel) * 4).to_i64()
        cosines, sines = (ptx.load(table + at, 4, "f32") for table in self.tables)
        query = token.row.to_i64() * product.outputs.to_i64() + output.to_i64()
        kv_heads = product.outputs // channels
        row = (token.sequence * kv_heads + head).to_i64() * form.slots + token.slot.to_i64()
        place = ptx.select(self.is_query, query, row * channels + channel.to_i64())
        here = ptx.select(self.is_query, inside, ptx.both(inside, token.kept))
        return _Due(biases, cosines, sines, product.result + place * 2, here)

    def write(self, index: V, parts: list[list[V]], added: _Due) -> None:
        del index
        if added.biases:
            parts = [
                [x + y for x, y in zip(part, bias, strict=True)]
                for part, bias in zip(parts, added.biases, strict=True)
            ]
        first, second = (rounded(part) for part in parts)
        turned = rotated(first, second, added.cosines, added.sines)
        words = [
            ptx.pack_bf16s([ptx.select(self.is_value, x, y) for x, y in zip(*both, strict=True)])
            for both in zip((first, second), turned, strict=True)
        ]

        def store() -> None:
            for half, pair in enumerate(words):
                ptx.store(added.place + self.append.channels * half, pair)

        ptx.when(added.inside, store)
