"""The range coder: what goes in comes out, at the cost of its probability, and a cut is told from a wrong byte."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_core.codec.entropy import RangeDecoder, RangeEncoder, decode_count, decode_flag, encode_count, encode_flag

# (start, size) in 2^16; sizes of 1 and nearly 2^16 make the interval as narrow and as wide as it gets.
PARTS = st.integers(0, 65535).flatmap(lambda start: st.tuples(st.just(start), st.integers(1, 65536 - start)))


@settings(max_examples=60, deadline=None)
@given(st.lists(PARTS, max_size=80))
def test_symbols_come_back_in_order_and_cost_their_probability(symbols: list[tuple[int, int]]) -> None:
    encoder = RangeEncoder()
    for start, size in symbols:
        encoder.encode(start, size, 16)
    data = encoder.finish()
    decoder = RangeDecoder(data)
    for start, size in symbols:
        assert start <= decoder.target(16) < start + size
        decoder.take(start, size, 16)
    assert not decoder.left_over
    ideal = sum(16 - math.log2(size) for _, size in symbols)
    # The interval never falls below 2^48: a symbol of 2^-16 loses 2^-32 of itself; the end takes up to two bytes.
    assert 8 * len(data) <= ideal + 16 + 1e-6 * len(symbols)
    assert encoder.bits == pytest.approx(ideal, abs=1e-6 * (len(symbols) + 1)) or not symbols


def test_a_carry_runs_through_bytes_of_255() -> None:
    """Parts around the middle keep the interval astride 1/2: 7f ff ff .. is written, until the last bit says 80 00 00."""
    encoder = RangeEncoder()
    for _ in range(5):
        encoder.encode(32767, 2, 16)
    encoder.uniform(1, 1)
    data = encoder.finish()
    assert data[:1] == b"\x80"
    decoder = RangeDecoder(data)
    for _ in range(5):
        assert 32767 <= decoder.target(16) < 32769
        decoder.take(32767, 2, 16)
    assert decoder.uniform(1) == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=12, max_size=40), st.data())
def test_a_prefix_decodes_as_many_symbols_as_it_determines(values: list[int], data: st.DataObject) -> None:
    """`needed` first bytes are enough, one byte fewer is not or says other symbols; a cut is told where it decided."""
    encoder = RangeEncoder()
    for value in values:
        encoder.uniform(value, 8)
    whole = encoder.finish()
    count = data.draw(st.integers(1, len(values)))

    def read(content: bytes) -> tuple[list[int], RangeDecoder]:
        decoder = RangeDecoder(content)
        return [decoder.uniform(8) for _ in range(count)], decoder

    symbols_read, decoder = read(whole)
    assert symbols_read == values[:count]
    assert read(whole[: decoder.needed])[0] == values[:count]
    if decoder.needed:
        assert read(whole[: decoder.needed - 1])[0] != values[:count]
    for length in range(len(whole)):
        symbols, short = read(whole[:length])
        assert symbols == values[:count] or short.cut


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 65535)), max_size=60),
    st.lists(st.integers(0, 9), max_size=20),
    st.integers(0, 2**40 - 1),
)
def test_flags_counts_and_numbers_come_back(flags: list[tuple[bool, int]], counts: list[int], number: int) -> None:
    encoder = RangeEncoder()
    for flag, chance in flags:
        encode_flag(encoder, flag, chance)
    for count in counts:
        encode_count(encoder, count, 20000)
    encoder.uniform(number, 40)
    decoder = RangeDecoder(encoder.finish())
    assert [decode_flag(decoder, chance) for _, chance in flags] == [flag for flag, _ in flags]
    assert [decode_count(decoder, 20000, 10) for _ in counts] == counts
    assert decoder.uniform(40) == number
