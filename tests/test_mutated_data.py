"""A few of the damaged files of mutated_data.py, in this process; its campaign runs hundreds in one of their own."""

from __future__ import annotations

import mutated_data
import pytest


@pytest.mark.parametrize("kind", range(len(mutated_data.KINDS)))
def test_damaged_files_are_refused_or_work(kind: int, caplog: pytest.LogCaptureFixture) -> None:
    results = [mutated_data.run_case(number) for number in range(kind, 40, len(mutated_data.KINDS))]
    assert {name for name, _ in results} == {mutated_data.KINDS[kind].__name__}
    assert any("refused" in result or "anew" in result for _, result in results)


def test_the_campaign_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(mutated_data.Broken, match="an unclear message"):
        mutated_data.expect_clear(ValueError("no"))
    counts, wrong, peak = mutated_data.campaign(2)
    assert sum(counts.values()) == 2 and wrong == [] and peak > 20
