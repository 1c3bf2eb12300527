import pytest

import qat_jax as qj
from qat_jax.hardware import AREA_40NM, BLOCKS, Design, Operand, Widths, block_sizes
from qat_jax.hardware.element import _adder_tree


def test_widths_by_hand():
    # 4 + 8 bits; 16 products add 4; 6 + 10; 16 + 16; 288 partial sums of 4,608 elements add 9.
    assert Design.from_notation("4/8/6/10").widths == Widths(12, 16, 16, 32, 41)
    assert Design.from_notation("8/8/-/-").widths == Widths(16, 20, 0, 20, 29)
    assert Design.from_notation("4/4/4/4", 6).widths == Widths(8, 12, 6, 18, 27)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_widths_are_the_papers(bits):
    widths = Design.from_notation(f"{bits}/{bits}/4/4").widths
    assert widths.product == 2 * bits
    assert widths.dot == 2 * bits + 4
    assert widths.partial_sum == 2 * bits + 4 + 8


def test_rounding_takes_no_more_bits_than_there_are():
    assert Design.from_notation("8/8/6/-", 8).widths.scale_product == 6


def test_block_formats_by_hand():
    nvfp4 = Design.of(qj.preset("nvfp4").rules[0])
    # Sign, hidden bit and mantissa bit; exponents 1 to 3; E4M3 scales.
    element = Operand(4, 3, 2, scale_bits=8, scale_significand=4, scale_exponent=4, vector_size=16)
    assert nvfp4.weights == nvfp4.activations == element
    assert nvfp4.widths == Widths(10, 14, 8, 22, 32)
    mxint8 = Design.of(qj.preset("mxint8").rules[0])
    assert mxint8.widths == Widths(16, 21, 0, 21, 32)  # vectors of 32


def test_blocks_by_hand():
    sizes = block_sizes(Design.from_notation("4/4/4/6"), AREA_40NM)
    bit2, bit = 6350 / 1024, 278 / 32
    tree = 8 * 9 + 4 * 10 + 2 * 11 + 1 * 12  # bits of adders
    rescaling = 12 * 10 * bit2 + 31 * (bit + 5.98)
    assert sizes["datapath"] == pytest.approx(16 * bit2 + (tree * bit + rescaling) / 16)
    assert sizes["scale_product"] == pytest.approx(24 * bit2 / 16)
    assert sizes["weight_buffer"] == 4 + 4 / 16  # the paper's 4.25 effective bits
    assert sizes["input_buffer"] == 4 + 6 / 16
    assert sizes["post_processing"] == pytest.approx(4 * 71 / 32)
    assert sizes.keys() == BLOCKS.keys()


def test_a_shifter_has_a_stage_for_each_bit_of_its_distance():
    assert AREA_40NM.shift(32, 31) == AREA_40NM.shifter
    assert AREA_40NM.shift(10, 4) == pytest.approx(250 / 160 * 10 * 3)
    assert AREA_40NM.shift(10, 0) == 0


def test_what_it_cannot_multiply_is_refused():
    with pytest.raises(ValueError, match="give integer bits"):
        Design.from_notation("4/4/fp32/6")
    weights = qj.Rule.from_notation(".*", "4/4/4/4", vector_size=8).weights
    activations = qj.Rule.from_notation(".*", "4/4/4/4").activations
    with pytest.raises(ValueError, match="cannot be paired"):
        Design.of(qj.Rule(".*", weights, activations))
    with pytest.raises(ValueError, match="must quantise weights and activations"):
        Design.of(qj.Rule(".*", weights, None))


@pytest.mark.parametrize("size", [*range(1, 20), 31, 32, 33, 255])
def test_a_tree_has_an_adder_less_than_terms(size):
    class Ones:
        """Each adder costs 1."""

        def add(self, bits):
            return 1

    rule = qj.Rule.from_notation(".*", "4/4/4/4", vector_size=size)
    levels = list(_adder_tree(Design.of(rule), Ones()))
    assert sum(levels) == size - 1
    assert len(levels) == Design.of(rule).widths.dot - 8


@pytest.mark.parametrize("bits", [0, -3])
def test_a_product_of_no_bits_is_refused(bits):
    with pytest.raises(ValueError, match=f"keeps 1 bit or more, not {bits}"):
        Design.from_notation("4/4/4/4", bits)
