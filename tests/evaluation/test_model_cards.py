"""The figures of the model cards, as data: all of them, each from its card."""

import collections

import pytest

from recurrentgemma.evaluation.model_cards import cards, figures


def test_all_figures_are_there():
    found = figures()
    assert len(found) == 205
    count = collections.Counter(figure.card for figure in found)
    assert count.keys() == cards().keys()
    assert count["recurrentgemma-2b"] == count["recurrentgemma-9b"] == 29
    assert count["gemma-2b"] == 19 and count["gemma2-27b-it"] == 9
    assert len({(f.card, f.benchmark) for f in found}) == 205
    for card in cards().values():
        assert (
            card["source"]["url"].startswith("https://") and card["source"]["language"]
        )
    for figure in found:
        assert 0 < figure.value < 100 and figure.category in ("quality", "safety")
        assert bool(figure.task) == bool(figure.metric) or figure.match == "none"


def test_figures_agree_with_the_cards_own_averages():
    """Gemma 1's printed averages are older than its rows, and the data say so."""
    for card, mean in (("recurrentgemma-2b", 44.58), ("recurrentgemma-9b", 56.13)):
        quality = [f for f in figures(card) if f.category == "quality"]
        *rows, average = quality
        assert average.benchmark == "Average" and len(rows) == 18
        found = sum(figure.value for figure in rows) / 18
        assert found == pytest.approx(mean, abs=0.005)
        assert average.value == pytest.approx(found, abs=0.05)
    [average] = [f for f in figures("gemma-7b") if f.benchmark == "Average"]
    assert "56.86" in average.remark


def test_what_is_measured_and_why_the_rest_is_not():
    by_name = {figure.benchmark: figure for figure in figures("recurrentgemma-2b")}

    def reason(name, **allowed):
        asked = {"assumed": False, "run_generated_code": False} | allowed
        return by_name[name].reason_not_to_run(**asked)

    assert reason("MMLU") == ""
    assert by_name["MMLU"].num_fewshot == 5 and by_name["MMLU"].value == 38.4
    assert "number of shots not on the card" in reason("WinoGrande")
    assert reason("WinoGrande", assumed=True) == ""
    assert "--run-generated-code" in reason("HumanEval")
    assert reason("HumanEval", run_generated_code=True) == ""
    for name in ("BOLD", "CrowS-Pairs", "ToxiGen", "RealToxicity", "WinoBias 1_2"):
        assert len(reason(name, assumed=True, run_generated_code=True)) > 5
    assert by_name["MATH"].packages and not by_name["MMLU"].packages
    bbq = {f.card: f for f in figures() if f.benchmark == "BBQ Ambig"}
    assert bbq["gemma-2b-it"].fewshot_split == "test", "one split, and an example"
    assert bbq["recurrentgemma-2b"].fewshot_split is None


def test_an_unknown_card_is_told():
    with pytest.raises(ValueError, match="card: expected one of recurrentgemma-2b"):
        figures("gpt-2")
