"""The expense lines: same bytes when rebuilt, disjoint splits, and every answer follows from its line.

The check of the answers is apart from the generator: it knows the line, the answer and CLDR.
"""

import hashlib
import json
import re
import sys
import unicodedata
from collections import Counter
from datetime import date, timedelta
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("babel")
from babel import Locale
from babel.numbers import get_currency_precision

FOLDER = Path(__file__).resolve().parents[2] / "data" / "expenses"
COUNTS = {
    "train": 6000,
    "validation": 300,
    "validation_unseen": 150,
    "test": 200,
    "test_unseen": 200,
    "test_new_locales": 100,
}
ISO_CODE = re.compile(r"(?<![A-Za-z])[A-Z]{3}(?![A-Za-z])")
SIGNS = {
    "US$": "USD",
    "CA$": "CAD",
    "AU$": "AUD",
    "A$": "AUD",
    "NZ$": "NZD",
    "HK$": "HKD",
    "NT$": "TWD",
    "S$": "SGD",
    "MX$": "MXN",
    "R$": "BRL",
    "JP¥": "JPY",
    "CN¥": "CNY",
    "€": "EUR",
    "£": "GBP",
    "₹": "INR",
    "₩": "KRW",
    "₪": "ILS",
    "฿": "THB",
    "₺": "TRY",
    "₽": "RUB",
    "₴": "UAH",
    "₫": "VND",
    "₱": "PHP",
    "zł": "PLN",
    "Kč": "CZK",
    "Ft": "HUF",
    "₾": "GEL",
    "֏": "AMD",
    "৳": "BDT",
    "៛": "KHR",
    "₭": "LAK",
    "米ドル": "USD",
    "ユーロ": "EUR",
    "美元": "USD",
    "日元": "JPY",
    "人民币": "CNY",
    "RMB": "CNY",
    "円": "JPY",
    "원": "KRW",
    "บาท": "THB",
    'ש"ח': "ILS",
    "ευρώ": "EUR",
    "евро": "EUR",
    "euro": "EUR",
    "euros": "EUR",
    "pounds": "GBP",
    "yen": "JPY",
    "yuan": "CNY",
    "won": "KRW",
    "reais": "BRL",
    "rand": "ZAR",
    "zloty": "PLN",
    "baht": "THB",
    "shekels": "ILS",
    "forint": "HUF",
    "US dollars": "USD",
    "Canadian dollars": "CAD",
    "Australian dollars": "AUD",
    "New Zealand dollars": "NZD",
    "Hong Kong dollars": "HKD",
    "Singapore dollars": "SGD",
    "Swiss francs": "CHF",
    "Swedish kronor": "SEK",
    "Norwegian kroner": "NOK",
    "Danish kroner": "DKK",
    "Indian rupees": "INR",
    "Mexican pesos": "MXN",
    "Turkish lira": "TRY",
    "Czech koruna": "CZK",
    "R": "ZAR",
}
VAGUE = {
    "$": {"USD", "CAD", "AUD", "NZD", "HKD", "TWD", "SGD", "MXN"},
    "kr": {"SEK", "NOK", "DKK", "ISK"},
    "¥": {"JPY", "CNY"},
    "￥": {"JPY", "CNY"},
    "元": {"CNY"},
}
# Letters that only Japanese, or only Chinese as written in China, uses.
JAPANESE = re.compile("[ぁ-ゖァ-ヺ]")
CHINESE = re.compile("[费购订账单户时间额书馆饭药买给还卡垫转请张财为]")
# The twenty currencies most traded (BIS Triennial Survey 2022), PLN, and how each is signed; CHF has its code alone.
TRADED = {
    **{"USD": "US$ $", "EUR": "€", "JPY": "¥ ￥ 円", "GBP": "£", "CNY": "¥ ￥ 元", "AUD": "A$ $", "CAD": "CA$ $"},
    **{
        "CHF": "CHF",
        "HKD": "HK$ $",
        "SGD": "S$ $",
        "SEK": "kr",
        "KRW": "₩ 원",
        "NOK": "kr",
        "NZD": "NZ$ $",
        "INR": "₹",
    },
    **{"MXN": "MX$ $", "TWD": "NT$ $", "ZAR": "R", "BRL": "R$", "DKK": "kr", "PLN": "zł"},
}
NOTE = re.compile(
    r"[\[(](?:default |currency: |amounts in |dates? (?:order )?[DMY]/|today:? |ref\. date "
    r"|[A-Z]{3}[,;] (?:dates )?[DMY]/|[DMY]/[DMY])[^\])]*[\])]"
)
NUMBER = re.compile(r"\d[\d.,'’ \u00a0\u202f]*\d|\d")


def has_sign(sign, text):
    """Whether the text has the sign, not as a part of a longer sign or word."""
    if sign == "R":
        return re.search(r"(?<![A-Za-z])R[ \u00a0]?\d", text) is not None
    end = "(?![A-Za-zčł])" if sign.replace(" ", "").isalpha() and sign.isascii() else ""
    return re.search(r"(?<![A-Za-z美日])" + re.escape(sign) + end, text) is not None


@pytest.fixture(scope="module")
def prepare():
    """The generator, imported from its folder."""
    sys.path.insert(0, str(FOLDER))
    try:
        import prepare as module
    finally:
        sys.path.remove(str(FOLDER))
    return module


@pytest.fixture(scope="module")
def built(prepare):
    """All lines, made anew, with what they were made of."""
    return prepare.build()


def stored(split):
    """The lines of a stored split, as (prompt, answer)."""
    rows = [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text("utf-8").splitlines()]
    return [(row["prompt"], json.loads(row["response"])) for row in rows]


def plain(text):
    """Western digits for native ones."""
    return (
        "".join(
            str(unicodedata.digit(char)) if char.isdigit() and unicodedata.digit(char, None) is not None else char
            for char in text
        )
        .replace("٫", ".")
        .replace("٬", ",")
    )


def unslipped(text):
    """Digits for OCR's letters O, l and I that touch a digit (or another slip)."""
    for _ in range(3):
        text = re.sub(
            r"(?<=\d)[OlI](?=[OlI]|(?![A-Za-z]))|(?<=\d[.,/-])[OlI](?=\d)|(?<![A-Za-z])[OlI](?=[.,]?\d)",
            lambda match: "0" if match[0] == "O" else "1",
            text,
        )
    return text


def readings(written, digits):
    """The decimal numbers a written number can mean for a currency with so many digits."""
    bare = re.sub(r"['’\s]", "", written)
    parts = re.split(r"[.,]", bare)
    if len(parts) == 1:
        return {bare + ("." + "0" * digits if digits else "")}
    last = parts[-1]
    if len(last) == digits and digits:
        return {"".join(parts[:-1]) + "." + last}
    return {"".join(parts)} if digits == 0 and len(last) == 3 else set()


def amounts(text, digits):
    """Every amount that a run of digits in the text can be, also starting after a blank inside the run."""
    found = set()
    for match in NUMBER.finditer(text):
        words = re.split(r"\s", match[0])
        for start in range(len(words)):
            for stop in range(start + 1, len(words) + 1):
                found |= readings("".join(words[start:stop]).strip(".,"), digits)
    return found


@cache
def month_names():
    """Casefolded month names and abbreviations of the locales used, with their months, longest first."""
    codes = [
        "en",
        "de",
        "fr",
        "es",
        "it",
        "pt",
        "nl",
        "sv",
        "pl",
        "cs",
        "tr",
        "ru",
        "el",
        "he",
        "ar_EG",
        "hi",
        "th",
        "ka",
        "hy",
        "bn",
        "am",
        "ta",
        "km",
        "lo",
        "en_AU",
        "en_CA",
        "en_GB",
        "en_IN",
        "es_MX",
        "de_CH",
        "ta_LK",
        "bn_BD",
    ]
    names = {}
    for code in codes:
        for width in ("abbreviated", "wide"):
            for month, name in Locale.parse(code).months["format"][width].items():
                names.setdefault(name.casefold().strip("."), set()).add(month)
    buckets = {}
    for name in sorted(names, key=len, reverse=True):
        buckets.setdefault(name[0], []).append((name, names[name]))
    return buckets


def months_in(text):
    """Every (start, stop, months) where the casefolded text has the longest month name that begins there."""
    buckets = month_names()
    for start, char in enumerate(text):
        for name, months in buckets.get(char, ()):
            if text.startswith(name, start):
                yield start, start + len(name), months
                break


def dates_in(text, order, reference):
    """Every date the text can mean, given the stated order and the reference date."""
    found = set()

    def add(year, month, day):
        year = 2000 + year if year < 100 else year
        try:
            found.add(date(year, month, day))
        except ValueError:
            pass

    for y, m, d in re.findall(r"(\d{4})\s?[-./年년]\s?(\d{1,2})\s?[-./月월]\s?(\d{1,2})(?!\d)", text):
        add(int(y), int(m), int(d))
    for match in re.finditer(r"(?<!\d)(\d{1,4})([-./]) ?(\d{1,2})\2 ?(\d{4}|\d{1,2})(?!\d)", text):
        numbers = [int(match[n]) for n in (1, 3, 4)]
        orders = [order] if order and len(order) == 3 else ["DMY", "MDY"] if len(match[4]) == 4 else []
        for fields in orders:
            part = dict(zip(fields, numbers, strict=True))
            add(part["Y"], part["M"], part["D"])
    folded = text.casefold()
    for start, stop, months in months_in(folded):
        before, after = folded[max(0, start - 14) : start], folded[stop : stop + 22]
        days = re.findall(r"\d+", before)[-1:] + re.findall(r"\d+", after)[:1]
        years = re.findall(r"\d{4}|(?<=['-])\d{2}", before + "#" + after)
        for month in months:
            for day in (int(day) for day in days if int(day) <= 31):
                for year in years if reference is None else [reference.year, reference.year - 1]:
                    add(int(year), month, day)
    if reference is not None:
        pairs = re.findall(r"(?<!\d)(?=(\d{1,2})(?:[-/]|\. ?|[月월] ?)(\d{1,2})(?!\d))", text)
        for first, second in pairs:
            orders = [order] if order else ["DM", "MD"]
            for fields in orders:
                part = dict(zip(fields, (int(first), int(second)), strict=False))
                for year in (reference.year, reference.year - 1):
                    if "D" in part and "M" in part:
                        add(year, part["M"], part["D"])
        found = {day for day in found if reference - timedelta(days=365) < day <= reference}
    return found


def notes_of(prompt):
    """The line without its bracketed notes, the stated currency, the stated order and the reference date."""
    notes = [match[0] for match in NOTE.finditer(prompt)]
    joined = " ".join(notes)
    order = re.search(r"[DMY](?:/[DMY]){1,2}", joined)
    currency = ISO_CODE.search(re.sub(r"D/M|M/D|Y/", "", joined))
    reference = re.search(r"(?:today:?|ref\. date) (\d{4}-\d{2}-\d{2})", joined)
    body = prompt
    for note in notes:
        body = body.replace(note, " ")
    return (
        body,
        currency and currency[0],
        order and order[0].replace("/", ""),
        reference and date.fromisoformat(reference[1]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("split", COUNTS)
def test_each_answer_follows_from_its_line(split):
    problems = []
    for prompt, answer in stored(split):
        assert list(answer) == ["date", "amount", "currency", "merchant"]
        assert answer["merchant"] in prompt and answer["merchant"] == answer["merchant"].strip()
        body, stated, order, reference = notes_of(prompt)
        rest = unslipped(plain(body.replace(answer["merchant"], " § ", 1)))
        digits = get_currency_precision(answer["currency"])
        assert re.fullmatch(r"\d+" + (rf"\.\d{{{digits}}}" if digits else ""), answer["amount"])
        if answer["amount"] not in amounts(rest, digits):
            problems.append(("amount", prompt, answer))
        if date.fromisoformat(answer["date"]) not in dates_in(rest, order, reference):
            problems.append(("date", prompt, answer))
        named = {code for sign, code in SIGNS.items() if has_sign(sign, rest)}
        if not stated and any(sign in rest for sign in "¥￥元") and not named:
            named = {"JPY"} if JAPANESE.search(body) else {"CNY"} if CHINESE.search(body) else set()
        named |= {code for code in ISO_CODE.findall(rest) if code == answer["currency"]}
        if (named or {stated}) != {answer["currency"]}:
            problems.append(("currency", prompt, answer, named))
    assert not problems, f"{len(problems)} of {COUNTS[split]}: {problems[:8]}"


@pytest.mark.parametrize("split", COUNTS)
def test_dates_are_read_in_one_way(split):
    """Without a stated order a numeric date has one reading; two-digit years always have an order."""
    for prompt, answer in stored(split):
        body, _, order, reference = notes_of(prompt)
        rest = unslipped(plain(body.replace(answer["merchant"], " § ", 1)))
        numeric = re.search(r"(?<![\d.,-])\d{1,2}([-./]) ?\d{1,2}\1 ?(\d{4}|\d{2})(?![\d,])", rest)
        if numeric and not order:
            assert len(dates_in(numeric[0], None, None)) == 1, prompt
        if reference:
            day = date.fromisoformat(answer["date"])
            assert timedelta(0) <= reference - day < timedelta(days=366) and (day.month, day.day) != (
                2,
                29,
            ), prompt


def test_vague_signs_stand_beside_a_stated_currency_or_the_language_that_names_one():
    for split in COUNTS:
        for prompt, answer in stored(split):
            body, stated, _, _ = notes_of(prompt)
            rest = body.replace(answer["merchant"], " § ", 1)
            for sign, group in VAGUE.items():
                if not re.search(rf"(?<![A-Za-z美日]){re.escape(sign)}(?![A-Za-zč])", rest):
                    continue
                if stated or sign in ("$", "kr"):
                    assert stated == answer["currency"] and stated in group, prompt
                else:
                    written = "JPY" if JAPANESE.search(body) else "CNY" if CHINESE.search(body) else None
                    assert written == answer["currency"] and written in group, prompt


@pytest.mark.slow
def test_rebuilding_gives_the_stored_bytes(prepare, built):
    sums = dict(reversed(line.split()) for line in (FOLDER / "SHA256SUMS").read_text().splitlines())
    readme = (FOLDER / "README.md").read_text("utf-8")
    assert {split: len(kept) for split, kept in built.items()} == COUNTS
    for split, kept in built.items():
        content = (FOLDER / f"{split}.jsonl").read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        assert content == prepare.task_files.to_jsonl([line.record for line in kept])
        assert digest == sums[f"{split}.jsonl"]
        assert f"| `{split}.jsonl` | {len(kept):,} | `{digest}` |" in readme


def test_babel_state_does_not_change_the_lines(prepare, built):
    """babel 2.18 lets stand-alone month names leak from one locale into others; no pattern may use them."""
    for code in prepare.ln.TRAIN_LOCALES:
        list(Locale.parse(code).months["stand-alone"]["wide"].items())
    maker = prepare.Maker("train")
    assert [maker.make().prompt for _ in range(300)] == [line.prompt for line in built["train"][:300]]


@pytest.mark.slow
def test_check_finds_a_changed_file(prepare, tmp_path, capsys):
    assert prepare.main(["--output", str(tmp_path)]) == 0
    with (tmp_path / "test.jsonl").open("a") as stream:
        stream.write("\n")
    assert prepare.main(["--check", "--output", str(tmp_path)]) == 1
    assert "differs: test.jsonl" in capsys.readouterr().out


def test_splits_share_no_line(built):
    """Nor one that differs in capitals or blanks alone."""
    prompts = [" ".join(line.prompt.casefold().split()) for kept in built.values() for line in kept]
    assert len(set(prompts)) == len(prompts)


def test_every_family_of_line_occurs_in_every_language_of_train(prepare, built):
    first = built["train"][:2200]
    counts = Counter(line.family for line in first)
    for family, share in prepare.FAMILIES.items():
        assert counts[family] >= 0.7 * share * len(first), counts
    pairs = {(line.language, line.family) for line in first}
    languages = {language for language, _ in prepare.ln.TRAIN_LOCALES.values()}
    assert pairs == {(language, family) for language in languages for family in prepare.FAMILIES}
    for split in ("test", "validation"):
        assert {line.family for line in built[split]} == set(prepare.FAMILIES), split
    for split in ("test_unseen", "validation_unseen"):
        assert {line.family for line in built[split]} == {"sentence", "bought", "addressed"}, split


@pytest.mark.parametrize("code", TRADED)
def test_train_shows_the_signs_of_the_currencies_most_traded(built, code):
    prompts = [line.prompt for line in built["train"][:2200] if line.answer["currency"] == code]
    counts = {sign: sum(has_sign(sign, prompt) for prompt in prompts) for sign in TRADED[code].split()}
    assert min(counts.values()) >= 3 and sum(counts.values()) >= 10, counts


def test_what_is_bought_is_never_the_merchant(prepare, built):
    words = {word.casefold() for line in built["train"] for word in line.words}
    for kept in built.values():
        for line in kept:
            merchant = line.answer["merchant"].casefold()
            for bought in line.bought:
                assert bought.casefold() not in words | {merchant}, line.prompt
                assert bought.casefold() in line.prompt.casefold()
            assert line.prompt.count(line.answer["merchant"]) == 1, line.prompt
    distinctive = {word.casefold() for words in prepare.vo.WORDS.values() for word in words}
    persons = {name.casefold() for names in prepare.it.PERSONS.values() for name in prepare.vo.split_words(names)}
    assert not persons & distinctive


@pytest.mark.parametrize("split", ["test_unseen", "validation_unseen"])
def test_items_and_persons_of_an_unseen_split_occur_nowhere_else(prepare, split):
    """In any of the words that a pool may use, singulars and plurals apart, so that no draw can mix them."""
    it, vo = prepare.it, prepare.vo
    lists = [vo.split_words(words) for words in (*it.ITEMS.values(), *it.PERSONS.values())]
    lists += [it.COUNTED, it.UNCOUNTED]
    for words in lists:
        assert len(set(words)) == len(words)
        own = set(it.of_pool(words, split))
        others = {word for pool in COUNTS if pool != split for word in it.of_pool(words, pool)}
        assert len(own) >= 2 and not own & others


def test_three_capitals_never_stand_beside_the_amount(built):
    seen = 0
    for line in built["train"]:
        if re.fullmatch("[A-Z]{3}", line.answer["merchant"]):
            seen += 1
            assert not re.search(r"\{m\}\W*\{a\}|\{a\}\W*\{m\}", line.pattern), line.prompt
    assert seen > 60


@pytest.mark.parametrize("split", ["test_unseen", "validation_unseen"])
def test_unseen_merchants_and_patterns_occur_nowhere_else(prepare, built, split):
    others = [line for name, kept in built.items() if name != split for line in kept]
    merchants = {line.answer["merchant"].casefold() for line in others}
    words = {word.casefold() for line in others for word in line.words}
    tokens = {token for merchant in merchants for token in re.findall(r"[\w]+", merchant)}
    patterns = {line.pattern for line in others} | set(prepare.pt.all_train_patterns())
    for line in built[split]:
        assert line.answer["merchant"].casefold() not in merchants
        assert line.words and not words & {word.casefold() for word in line.words}
        assert not any(word.casefold() in tokens for word in line.words), line.words
        assert line.pattern not in patterns


def test_a_third_of_the_lines_is_noisy(prepare, built):
    for split, kept in built.items():
        assert abs(sum(bool(line.noise) for line in kept) / len(kept) - 1 / 3) <= 0.04, split
    counts = Counter(kind for line in built["train"] for kind in line.noise)
    assert set(counts) == set(prepare.NOISE) and min(counts.values()) >= 300


def test_train_is_broad_and_even(prepare, built):
    train = built["train"]
    first = train[:2400]
    locales = {line.locale for line in train}
    assert len(locales) >= 20
    assert {(line.locale, line.month) for line in first} == {
        (locale, month) for locale in locales for month in range(1, 13)
    }
    counts = Counter(line.answer["currency"] for line in first)
    assert set(counts) == {
        line.answer["currency"] for split in ("train", "validation", "test", "test_unseen") for line in built[split]
    }
    assert min(counts.values()) >= 20
    assert len({line.answer["merchant"] for line in train}) >= 3000 and len({line.pattern for line in train}) >= 150
    assert max(len(line.prompt) for line in train) <= 160 and sum(len(line.prompt) for line in train) / len(train) <= 70


def scripts(text):
    """The scripts of the letters in a text, by the first word of their Unicode names."""
    return {unicodedata.name(char, "?").split()[0] for char in text if char.isalpha()}


def test_new_locales_show_scripts_months_and_currencies_that_train_never_shows(built):
    train_scripts = set().union(*(scripts(line.prompt) for line in built["train"]))
    assert {"LATIN", "CYRILLIC", "GREEK", "CJK", "HIRAGANA", "KATAKANA", "HANGUL"} <= train_scripts
    new = built["test_new_locales"]
    shown = set().union(*(scripts(line.prompt) for line in new))
    assert len({line.locale for line in new}) >= 6 and len(shown - train_scripts) >= 3
    text = "\n".join(line.prompt.casefold() for line in built["train"])
    for code in {line.locale for line in new}:
        months = Locale.parse(code).months["format"]
        assert not [name for width in ("wide", "abbreviated") for name in months[width].values() if name in text], code
    assert not {line.answer["currency"] for line in new} & {line.answer["currency"] for line in built["train"]}
