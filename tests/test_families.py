"""Every family of models is read as by its own forward pass, or refused in a line; docs/families.md says which."""

import re

import pytest
from conftest import ROOT
from families import COLUMNS, examine, exponent, line, row
from familylist import FAMILIES

PAGE = ROOT / "docs" / "families.md"
DOCUMENTED = {
    cells[0]: cells
    for cells in (text.strip("| ").split(" | ") for text in PAGE.read_text().splitlines() if text.startswith("| "))
    if len(cells) == len(COLUMNS) and cells[0] in FAMILIES
}


def verdict(cell):
    return re.match(r"refused|the same|$", cell)[0] if not cell.startswith("10^") and cell != "0" else "right"


def test_the_table_lists_the_families_that_are_tried():
    assert list(DOCUMENTED) == list(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_read_as_by_its_own_pass_or_refused_as_the_table_says(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    finding = examine(FAMILIES[name], tmp_path)
    assert finding.verdict in ("right", "refused"), line(finding)
    found, documented = row(finding), DOCUMENTED[name]
    assert found[:4] == documented[:4], line(finding)
    for ours, told in zip(found[4:], documented[4:], strict=True):
        if ours.startswith("10^"):
            assert exponent(ours) <= exponent(told) + 1, line(finding)
        else:
            assert ours == told, line(finding)
