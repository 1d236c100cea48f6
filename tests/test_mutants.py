"""The mutants of tests/mutants.py: each is what it says, and, where asked for (`-m long`), each is killed."""

from __future__ import annotations

from collections import Counter

import pytest
from mutants import MUTANTS, ROOT, main


def test_every_law_has_mutants_and_each_of_them_a_place_and_tests() -> None:
    """What is renamed or rewritten takes its mutants along."""
    assert min(Counter(mutant.law for mutant in MUTANTS).values()) >= 4
    assert {mutant.law for mutant in MUTANTS} == {"loss mask", "verdict", "learning rate", "packing", "resume"}
    for mutant in MUTANTS:
        assert mutant.old != mutant.new, mutant
        assert (ROOT / "phased_ift_jax" / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1, mutant
        for file, test in (one.split("::") for one in mutant.tests.split()):
            assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), mutant


@pytest.mark.long
def test_every_mutant_is_killed() -> None:
    assert main([]) == 0
