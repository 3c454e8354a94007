"""benchmarks/rare_rules.py: what it builds and what it counts."""

import json
from collections import Counter
from datetime import date

import pytest

from tests.data.test_expenses import dates_in, notes_of, plain, unslipped


@pytest.fixture
def script(benchmark_script):
    return benchmark_script("rare_rules")


@pytest.fixture
def lines(script):
    return script.half_rules(1200, set())


@pytest.mark.parametrize(
    ("prompt", "day", "kind"),
    [
        ("[today 2022-11-05] November 10 at Kickex: CAD 7.38", "2021-11-10", "no year: last year"),
        ("22 juin, Kickex, 3 € (today: 2022-11-05) [default CAD, D/M]", "2022-06-22", "no year: this year"),
        ("[ref. date 2026-06-22] 1/31 Kickex $3 [CAD; dates M/D]", "2026-01-31", "no year: this year"),
        ("[default CNY, D/M/Y] Kickex 06/02/2025 3 ¥", "2025-02-06", "day first"),
        ("Kickex 06/02/2025 3 € (M/D/Y)", "2025-06-02", "month first"),
        ("[default KRW, date order Y/M/D] 17. 11. 18. Kickex 3", "2017-11-18", "other"),
        ("Kickex, 6 Feb 2025, 3 €", "2025-02-06", "other"),
    ],
)
def test_a_line_is_of_one_kind(script, prompt, day, kind):
    assert script.kind_of(prompt, json.dumps({"date": day})) == kind


@pytest.mark.slow
def test_any_prefix_has_the_kinds_in_their_shares(script, lines):
    assert sum(script.SHARES.values()) == pytest.approx(1)
    for count in (300, 1200):
        found = Counter(script.kind_of(line["prompt"], line["response"]) for line in lines[:count])
        assert all(abs(found[kind] - share * count) < 2 for kind, share in script.SHARES.items()), found


@pytest.mark.slow
def test_the_answers_of_half_rules_follow_from_them(lines):
    for line in lines:
        answer = json.loads(line["response"])
        body, _, order, reference = notes_of(line["prompt"])
        rest = unslipped(plain(body.replace(answer["merchant"], " § ", 1)))
        assert date.fromisoformat(answer["date"]) in dates_in(rest, order, reference), line


@pytest.mark.slow
def test_no_line_is_one_that_is_scored(script, lines):
    without = {line["prompt"] for line in lines[:50]}
    prompts = {line["prompt"] for line in script.half_rules(300, without)}
    assert len(prompts) == 300 and not prompts & without
