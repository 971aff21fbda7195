"""Operations of structured differences: what means the same is the same, numbers are compared softly."""

import asyncio

import pytest

from openkeye.common.checks import InputError
from openkeye.tasks.rewards.differences import DifferenceStructureReward
from openkeye.tasks.rewards.operations import canonical_formula, parse_operations, similarity
from openkeye.tasks.task import Example, Response


@pytest.mark.parametrize(
    ("domain", "one", "other", "is_same"),
    [
        ("geometry", "add segment(A, B)", "Add  segment(B,A)", True),
        ("geometry", "add segment(A, B)", "remove segment(A, B)", False),
        ("geometry", "set angle(A, B, C) = 60", "set angle(C, B, A) = 60°", True),
        ("geometry", "set angle(A, B, C) = 60", "set angle(B, A, C) = 60", False),
        ("geometry", "add polygon(A, B, C, D)", "add polygon(C, B, A, D)", True),
        ("geometry", "add polygon(A, B, C, D)", "add polygon(A, C, B, D)", False),
        ("geometry", "add parallel(AB, CD)", "add parallel(DC, BA)", True),
        ("coordinates", "add line(1, -1, 2)", "add line(-2, 2, -4)", True),
        ("coordinates", "add point(A, 1, 2)", "add point(A, 2, 1)", False),
        ("chemistry", "set formula(X) = H2SO4", "set formula(X) = SO4H2", True),
        ("chemistry", "set formula(X) = Ca(OH)2", "set formula(X) = CaO2H2", True),
        ("chemistry", "set formula(X) = CO", "set formula(X) = Co", False),
        ("chemistry", "set formula(X) = NH4^+", "set formula(X) = NH4", False),
        ("chemistry", "set bond(C1, C2) = double", "set bond(C2, C1) = 2", True),
        ("circuits", "set resistor(n1, n2) = 4.7k", "set resistor(n2, n1) = 4700 ohm", True),
        ("circuits", "add diode(n1, n2)", "add diode(n2, n1)", False),
        ("circuits", "set capacitor(n1, n2) = 10uF", "set capacitor(n1, n2) = 10 µF", True),
    ],
)
def test_canonical_forms(domain, one, other, is_same):
    (first,), (second,) = parse_operations(one, domain), parse_operations(other, domain)
    assert first is not None and second is not None
    assert (similarity(first, second, 1.0) > 0.999) is is_same


def test_coordinates_and_values_are_soft():
    def worth(one, other, domain="coordinates"):
        (first,), (second,) = parse_operations(one, domain), parse_operations(other, domain)
        return similarity(first, second, 2.0)

    assert worth("add point(A, 1, 2)", "add point(A, 1, 3)") == pytest.approx(0.5)
    assert worth("add point(A, 1, 2)", "add point(A, 1, 9)") == worth("add point(A, 1, 2)", "add point(B, 1, 2)") == 0.0
    assert worth("set length(A, B) = 100", "set length(A, B) = 95", "geometry") == pytest.approx(0.5)


def test_formulas():
    assert canonical_formula("C2H5OH") == canonical_formula("HOC2H5") == "C2H6O"
    assert canonical_formula("Fe2(SO4)3") == "Fe2O12S3" and canonical_formula("2H2O") == "2H2O"
    assert canonical_formula("2H2 + O2 -> 2H2O") == canonical_formula("O2+2H2→2OH2")
    for text in ("water", "H2)(", "(((", "((H)2", "2", ""):
        assert canonical_formula(text) == text


def scored(operations, said, domain="geometry"):
    facts = {"domain": domain, "operations": operations}
    example = Example("difference", 0, "image", ({"role": "user", "content": "?"},), facts=facts)
    return asyncio.run(DifferenceStructureReward()(example, Response(said)))["difference_structure"]


def test_sets_of_operations():
    truth = "add segment(A, B)\nremove circle(O)"
    assert scored(truth, "remove circle(O); add segment(B, A)") == 1.0
    assert scored(truth, "add segment(A, B)") == pytest.approx(0.5 * 2 / 3 + 0.5 / 2)
    assert scored(truth, "add segment(A, B)\nadd segment(B, A)\nremove circle(O)") == pytest.approx(0.9)
    assert scored(truth, "add segment(A, B)\nI see a circle\nremove circle(O)") == pytest.approx(0.5 * 4 / 5 + 0.5 * 2 / 3)
    assert scored("none", "None.") == 1.0 and scored("none", "add segment(A, B)") == 0.0
    assert scored("none", "") == scored("none", "I cannot say") == 0.0 and scored(truth, "none") == 0.0
    with pytest.raises(InputError, match="its own operations"):
        scored("what?", "none")
    with pytest.raises(ValueError, match="no domain"):
        scored(truth, truth, "music")
