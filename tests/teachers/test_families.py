"""Every family of models is read as by its own forward pass, or refused in a line; docs/families.md says which."""

import os

import pytest
import torch
from conftest import ROOT
from families import COLUMNS, examine, largest_exponent, line, row
from familylist import FAMILIES

from pipeline.teachers.families import TESTED_FAMILIES

PAGE = (ROOT / "docs" / "families.md").read_text().splitlines()
ROWS = [text.removeprefix("| ").removesuffix(" |").split(" | ") for text in PAGE if text.startswith("| ")][2:]
DOCUMENTED = {cells[0]: cells for cells in ROWS}
# A quarter of the families, of every kind, and a third of those in the short suite; all of them with FAMILIES=all, and
# by make families.
TRIED = list(FAMILIES)[:: 1 if os.environ.get("FAMILIES") == "all" else 4]
WORSE = 1  # power of ten by which another machine may round differently


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny products take longest where threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_table_lists_the_families_that_are_tried():
    assert [len(cells) for cells in ROWS] == [len(COLUMNS)] * len(ROWS)
    assert list(DOCUMENTED) == list(FAMILIES)


def test_families_that_extraction_does_not_check_by_itself_are_read_rightly():
    for kind in TESTED_FAMILIES:
        cells = DOCUMENTED.get(kind) or DOCUMENTED[f"{kind}, with images"]
        assert all(cell.startswith("1e") for cell in cells[-2:]), kind


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.system] if place % 3 else []) for place, name in enumerate(TRIED)]
)
def test_a_family_is_read_as_by_its_own_pass_or_refused_as_the_table_says(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))  # where GGUF files are unpacked
    finding = examine(FAMILIES[name], tmp_path)
    assert finding.verdict in ("right", "refused"), line(finding)
    for found, told in zip(row(finding), DOCUMENTED[name], strict=True):
        allowed, error = largest_exponent(told), largest_exponent(found)
        if allowed is not None and error is not None:
            assert error <= allowed + WORSE, line(finding)
        else:
            assert found == told, line(finding)
