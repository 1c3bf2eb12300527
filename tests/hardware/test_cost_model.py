import itertools
import json

import pytest

from qat_jax import hardware
from qat_jax.hardware import AREA_40NM, ENERGY_40NM, Design, published

AREA, ENERGY = hardware.area_model(), hardware.energy_model()
AREA_FIT = published.areas(), AREA_40NM, hardware.AREA_BLOCKS
ENERGY_FIT = published.energies(), ENERGY_40NM, hardware.ENERGY_BLOCKS
BITS, SCALES = (3, 4, 6, 8), ("-", 3, 4, 6, 8, 10)


def left_out_errors(fit):
    return {n: abs(value / fit[0][n] - 1) for n, value in hardware.leave_one_out(*fit).items()}


def test_the_reference_is_exactly_one():
    for model in (AREA, ENERGY):
        assert model(Design.from_notation("8/8/-/-")) == 1.0


def test_parameters_are_not_negative_and_have_a_meaning():
    for model in (AREA, ENERGY):
        assert min(model.parameters.values()) >= 0
        assert model.parameters.keys() <= hardware.BLOCKS.keys()


def test_left_out_areas_are_predicted_within_a_per_cent():
    errors = left_out_errors(AREA_FIT)
    assert len(errors) == 16
    assert sum(errors.values()) / len(errors) < 0.0065
    assert max(errors.values()) < 0.02


def test_left_out_energies_are_predicted_within_eight_per_cent():
    errors = left_out_errors(ENERGY_FIT)
    assert len(errors) == 20
    assert sum(errors.values()) / len(errors) < 0.07
    worst = max(errors, key=errors.get)
    assert worst == "6/4/-/6"
    assert sorted(errors.values())[-2] < 0.17


def test_leaving_a_point_out_does_not_look_at_it():
    points = dict(published.areas())
    points["4/4/4/6"] *= 2
    altered = hardware.leave_one_out(points, *AREA_FIT[1:])
    assert altered["4/4/4/6"] == hardware.leave_one_out(*AREA_FIT)["4/4/4/6"]


def test_headline_claims():
    saved = {
        n: [100 * (1 - model(Design.from_notation(n))) for model in (AREA, ENERGY)]
        for n in ("4/4/4/6", "4/8/6/10", "4/6/4/-")
    }
    assert saved["4/4/4/6"] == pytest.approx([37, 24], abs=0.5)
    assert saved["4/8/6/10"][0] == pytest.approx(26, abs=1)
    assert saved["4/8/6/10"][1] == pytest.approx(-34, abs=6)
    assert saved["4/6/4/-"][0] == pytest.approx(36, abs=0.5)
    assert saved["4/6/4/-"][1] == pytest.approx(43, abs=3)


def test_more_bits_never_cost_less():
    designs = list(itertools.product(BITS, BITS, SCALES, SCALES))
    for model in (AREA, ENERGY):
        cost = {d: model(Design.from_notation("/".join(map(str, d)))) for d in designs}
        for design in designs:
            for place, choices in enumerate((BITS, BITS, SCALES, SCALES)):
                index = choices.index(design[place])
                if index + 1 < len(choices):
                    wider = (*design[:place], choices[index + 1], *design[place + 1 :])
                    assert cost[wider] >= cost[design], (design, wider)


def test_gating_and_rounding_save_energy():
    full, rounded = (Design.from_notation("4/4/4/4", bits) for bits in (None, 4))
    assert ENERGY(rounded) < ENERGY(full)
    assert ENERGY(full, 1.0) < ENERGY(full, 0.5) < ENERGY(full)
    kept = ENERGY.blocks(full, 1.0)
    assert kept["datapath"] == 0 < kept["fixed"]


def test_published_points_are_the_papers(shared_data):
    path = shared_data.parent / "reference" / "vsquant_results.json"
    if not path.is_file():
        pytest.skip(f"no published figures at {path}")
    paper = json.loads(path.read_text())["hardware"]
    figure3 = dict(paper["fig3_energy"])
    assert dict(published.PER_CHANNEL_ENERGY) == figure3.pop("per_channel")
    assert figure3.pop("per_vector_columns") == ["4b product", "6b product", "full product"]
    assert {n: list(e.values()) for n, e in published.ROUNDED_ENERGY.items()} == figure3
    assert all(list(e) == [4, 6, None] for e in published.ROUNDED_ENERGY.values())
    assert {n: list(c) for n, c in published.DESIGNS.items()} == paper["fig4_6_energy_and_area"]
    unit = paper["unit_costs_40nm"]
    for costs, key in [(AREA_40NM, "um2"), (ENERGY_40NM, "pj")]:
        assert costs.multiplier == unit["multiplier_32x32"][key]
        assert costs.adder == unit["adder_32b"][key]
        assert costs.register == unit["register_per_bit"][key]
        assert costs.shifter == unit["shifter_32b"][key]
        assert costs.comparator == unit["comparator_32b"][key]


def test_what_is_skipped_is_a_share():
    design = Design.from_notation("4/4/4/4")
    energy = hardware.energy_model()
    blocks, skipped = energy.blocks(design), energy.blocks(design, 1.0)
    # The product of scales has been multiplied by then.
    assert skipped == blocks | {"datapath": 0.0}
    with pytest.raises(ValueError, match="gated is a share of 0 to 1, not 2"):
        energy(design, 2)
