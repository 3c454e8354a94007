"""Builds the expense lines: one line as people write them -> JSON with date, amount, currency, merchant.

Deterministic: the same babel version gives the same bytes.
"""

import hashlib
import json
import re
import sys
from dataclasses import dataclass, field
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import items as it
import lines as ln
import patterns as pt
import purchases as pu
import task_files
import vocabulary as vo

FOLDER = Path(__file__).resolve().parent
SPLITS = {
    "train": 6000,
    "validation": 300,
    "validation_unseen": 150,
    "test": 200,
    "test_unseen": 200,
    "test_new_locales": 100,
}
POOLS = {
    "validation_unseen": "validation_unseen",
    "test_unseen": "test_unseen",
    "test_new_locales": "test_new_locales",
}
UNSPACED = ("ja", "ko", "zh", "th", "km", "lo")
NOISE = ("ocr", "abbreviation", "tips_taxes", "missing_year", "extra_words")
KINDS = ["named"] * 7 + ["iso"] + ["numeric"] * 2
# What is hard to learn stands in train more often than it is tested: a model sees about a thousand lines of it.
TRAIN_NOISE = (*NOISE, "missing_year")
TRAIN_KINDS = KINDS + ["named", "numeric"]
# How often a line's pattern is of a family: the three fields alone, with labels, in a sentence; with what was bought in
# a sentence, or as a fourth field; addressed to a person, or about paying back. An unseen split has sentences instead
# of the plain kinds.
FAMILIES = {"bare": 0.2, "labelled": 0.13, "sentence": 0.35, "bought": 0.15, "fields": 0.07, "addressed": 0.1}
SENTENCE_OF = {"bare": "sentence", "labelled": "sentence", "fields": "bought"}
CARDS = [
    "Visa ••1234",
    "MC *{n}",
    "card ending {n}",
    "paid by card",
    "paid cash",
    "contactless",
    "Amex x{n}",
    "auth ok",
    "thanks!",
]
LEADS = [
    "lunch w/ Anna",
    "Table {t}",
    "client dinner",
    "team offsite",
    "trip to HQ",
    "with 3 colleagues",
    "urgent",
    "FYI",
    "2 pers.",
]
LEADS_LOCAL = {
    "de": "mit Kollegen",
    "fr": "repas d'affaires",
    "es": "con clientes",
    "it": "pranzo di lavoro",
    "pt": "almoço com cliente",
    "nl": "met klant",
    "sv": "med kund",
    "pl": "z klientem",
    "cs": "s klientem",
    "ru": "с клиентом",
    "tr": "müşteri ile",
    "ja": "会議費",
    "ko": "회식",
    "zh": "客户餐",
    "he": "עם לקוח",
    "ar": "مع عميل",
    "hi": "ग्राहक के साथ",
    "th": "กับลูกค้า",
    "el": "με πελάτη",
}
SHORT_TOTALS = ["amt {a}", "tot. {a}", "ttl {a}", "amt. {a}", "TOT {a}", "pd {a}"]
SHORT_LEADS = [
    "rcpt: {l}",
    "inv.: {l}",
    "rcpt #{n}: {l}",
    "inv. {n} | {l}",
    "exp. / {l}",
    "re: {l}",
    "pmt | {l}",
    "trx: {l}",
]
TAXES = {
    "en": ("Subtotal", ("Tax", "VAT", "Tip", "Service"), "TOTAL"),
    "de": ("Zwischensumme", ("MwSt", "Trinkgeld"), "Summe"),
    "fr": ("Sous-total", ("TVA", "Pourboire"), "TOTAL"),
    "es": ("Subtotal", ("IVA", "Propina"), "Total"),
    "it": ("Subtotale", ("IVA", "Mancia"), "Totale"),
    "pt": ("Subtotal", ("Imposto", "Gorjeta"), "Total"),
    "nl": ("Subtotaal", ("BTW", "Fooi"), "Totaal"),
    "sv": ("Delsumma", ("Moms", "Dricks"), "Summa"),
    "pl": ("Netto", ("VAT", "Napiwek"), "Razem"),
    "cs": ("Mezisoučet", ("DPH", "Spropitné"), "Celkem"),
    "tr": ("Ara toplam", ("KDV", "Bahşiş"), "Toplam"),
    "ru": ("Без НДС", ("НДС", "Чаевые"), "Итого"),
    "el": ("Υποσύνολο", ("ΦΠΑ",), "Σύνολο"),
    "he": ("ביניים", ('מע"מ', "טיפ"), 'סה"כ'),
    "ja": ("小計", ("税", "消費税"), "合計"),
    "ko": ("소계", ("부가세", "봉사료"), "합계"),
    "zh": ("小计", ("税", "小费"), "合计"),
}


@dataclass
class Line:
    """One line with its answer and what it was made of."""

    prompt: str
    answer: dict[str, str]
    locale: str
    language: str
    pattern: str
    noise: tuple[str, ...]
    words: tuple[str, ...]
    month: int
    family: str
    bought: tuple[str, ...]
    record: dict[str, str] = field(init=False)

    def __post_init__(self):
        self.record = {"prompt": self.prompt, "response": json.dumps(self.answer, ensure_ascii=False)}


class Deck:
    """Deals shuffled items over and over, so that every prefix of the deal is even."""

    def __init__(self, items, rng: Random):
        self.items, self.rng, self.left = list(items), rng, []

    def deal(self):
        """The next item."""
        if not self.left:
            self.left = self.rng.sample(self.items, len(self.items))
        return self.left.pop()


def pool_of(word: str) -> str:
    """The only pool that may use a word: train (74 %), validation_unseen or test_unseen (13 % each)."""
    draw = int(hashlib.sha256(word.casefold().encode()).hexdigest(), 16) % 100
    return "validation_unseen" if draw < 13 else "test_unseen" if draw < 26 else "train"


def words_of(language: str, pool: str) -> list[str]:
    """The distinctive words of one language that a pool may use."""
    if pool == "test_new_locales":
        return vo.WORDS[language]
    return [word for word in vo.WORDS[language] if pool_of(word) == pool]


def brand(rng: Random, pool: str) -> tuple[str, tuple[str, ...]]:
    """An invented brand such as "Zorvella", "Kintex Foods" or "MBT", drawn again until it falls into the pool."""
    initials = rng.random() < 0.2
    while True:
        if initials:
            name = "".join(rng.sample(vo.INITIALS, 3))
        else:
            name = rng.choice(vo.ONSETS) + rng.choice(vo.VOWELS) + rng.choice(vo.CODAS) + rng.choice(vo.ENDINGS)
        if pool_of(name) == pool and name not in ln.CODES:
            break
    tail = "" if initials else rng.choice(vo.BRAND_TAILS)
    return f"{name} {tail}".strip(), (name,)


def merchant(rng: Random, language: str, pool: str) -> tuple[str, tuple[str, ...]]:
    """A merchant and its distinctive words."""
    if pool != "test_new_locales" and rng.random() < 0.16:
        name, used = brand(rng, pool)
    else:
        words = words_of(language, pool)
        picked = rng.sample(words, 3)
        shape = rng.choice(vo.SHAPES[language])
        fill = {"W": picked[0], "V": picked[1], "U": picked[2], "T": rng.choice(vo.TYPES[language])}
        slots = r"[WVUT]" if language in UNSPACED else r"(?<![A-Za-z])[WVUT](?![A-Za-z])|W(?=s )"
        keys = re.findall(slots, shape)
        name = re.sub(slots, lambda match: fill[match[0]], shape)
        used = tuple(fill[key] for key in dict.fromkeys(keys) if key != "T")
    draw = rng.random()
    if language in ln.LATIN_CASE and draw < 0.17:
        name = name.upper() if draw < 0.11 or is_initials(name) else name.lower()
    return name, used


def is_initials(name: str) -> bool:
    """Whether a merchant is three capitals, which beside a number would look like a currency."""
    return re.fullmatch("[A-Z]{3}", name) is not None


def families_of(language: str, pool: str) -> dict[str, list[str]]:
    """The patterns of one language that a pool may use, by family."""
    if pool in ("validation_unseen", "test_unseen"):
        unseen = pool == "validation_unseen"
        purchases = (pu.VALIDATION_UNSEEN if unseen else pu.TEST_UNSEEN).get(language, [])
        return {
            "sentence": (pt.VALIDATION_UNSEEN if unseen else pt.TEST_UNSEEN)[language],
            "bought": [pattern for pattern in purchases if "{p}" not in pattern],
            "addressed": [pattern for pattern in purchases if "{p}" in pattern],
        }
    families = pt.train_patterns(language)
    if pool != "test_new_locales":
        families |= {"bought": pu.BOUGHT[language], "fields": pu.FOUR_FIELDS, "addressed": pu.ADDRESSED[language]}
    return families


def choose_pattern(rng: Random, language: str, pool: str, avoid) -> tuple[str, str, str]:
    """The family, the pattern and its language; a third of the local lines have English words."""
    while True:
        family = rng.choices(list(FAMILIES), list(FAMILIES.values()))[0]
        english = 0.3 if family in ("bare", "labelled", "sentence") else 0.4
        spoken = "en" if language not in pt.LABELS or rng.random() < english else language
        families = families_of(spoken, pool)
        family = family if family in families else SENTENCE_OF.get(family)
        patterns = families.get(family)
        if patterns and not avoid(pattern := rng.choice(patterns), family):
            return family, pattern, spoken


def must_avoid(name: str, noise: tuple[str, ...]):
    """A test for patterns in which this merchant or noise would leave the line undecidable."""
    edge_digit = name[0].isdigit() or name[-1].isdigit()
    first = re.escape(name.split()[0])

    def avoid(pattern: str, family: str) -> bool:
        if family == "addressed" and {"abbreviation", "extra_words"} & set(noise):
            return True
        if family == "fields" and name.islower():
            return True
        if is_initials(name) and re.search(r"\{m\}\W*\{a\}|\{a\}\W*\{m\}", pattern):
            return True
        if edge_digit and re.search(r"\{[ad]\}\s+\{m\}|\{m\}\s+\{[ad]\}", pattern):
            return True
        if re.search(rf"\b{first} \{{m\}}", pattern, re.I) or ("&" in name and "&" in pattern):
            return True
        if name[-1] == "." and "{m}." in pattern:
            return True
        if "missing_year" in noise and re.search(r"\{d\}\W*\{a\}", pattern.replace("_", " ")):
            return True
        spaced = re.search(r"\{m\} +\{a\}|\{a\} +\{m\}|\{[ad]\} +\{[ad]\}", pattern)
        return "tips_taxes" in noise and bool(spaced)

    return avoid


def with_taxes(
    rng: Random, total: Decimal, text: str, currency: str, locale: str, language: str, sentence: bool
) -> tuple[str, str]:
    """The total beside its parts: (the amount's text, a note at the end of the line)."""
    subtotal_word, taxes, total_word = vo_taxes(rng, language)
    digits = ln.get_currency_precision(currency)
    part = (total * Decimal(rng.randint(4, 18)) / 100).quantize(Decimal(1).scaleb(-digits))
    part = min(max(part, Decimal(1).scaleb(-digits)), total)
    tax = rng.choice(taxes)
    small = ln.render_number(rng, part, currency, locale, True, fractions=True)
    rest = ln.render_number(rng, total - part, currency, locale, True, fractions=True)
    if sentence:
        return text, rng.choice([f" (incl. {tax} {small})", f" ({tax} {small} incl.)", f", incl. {tax} {small}"])
    if total == part or rng.random() < 0.4:
        return f"{tax} {small} {total_word} {text}", ""
    return f"{subtotal_word} {rest} {tax} {small} {total_word} {text}", ""


def vo_taxes(rng: Random, language: str) -> tuple[str, tuple[str, ...], str]:
    """Words for subtotal, tax and total: the line's language, or English."""
    return TAXES.get(language if rng.random() < 0.6 else "en", TAXES["en"])


def informal(rng: Random, pattern: str, fields: dict[str, str]) -> str:
    """Now and then a capital for an item that begins a line, or none for a greeting."""
    if pattern.startswith("{i}") and rng.random() < 0.4:
        fields["i"] = fields["i"][0].upper() + fields["i"][1:]
    if re.match(r"(Hi|Hey|Hello|Dear) ", pattern) and rng.random() < 0.25:
        if "p" in fields and rng.random() < 0.6:
            fields["p"] = fields["p"].lower()
        return pattern[0].lower() + pattern[1:]
    return pattern


def add_words(rng: Random, line: str, language: str, bought: bool) -> str:
    """Words that say nothing about the answer, kept apart by a separator; `bought`: the line says what was bought."""
    number = f"{rng.randint(1000, 9999)}"
    if bought or rng.random() < 0.55:
        note = rng.choice(CARDS).format(n=number)
        return line + rng.choice([" - {x}", ", {x}", " | {x}", " ({x})"]).format(x=note)
    leads = LEADS + [LEADS_LOCAL[language]] * 3 if language in LEADS_LOCAL else LEADS
    return (
        rng.choice(["{x}: ", "{x} - ", "{x} | ", "{x} / "]).format(x=rng.choice(leads).format(t=rng.randint(2, 40)))
        + line
    )


def draw_date(rng: Random, month: int, noise: tuple[str, ...]) -> date:
    """A day of the given month between 2015 and 2026; 29 February is left out where the year is missing."""
    while True:
        day = date(rng.randint(2015, 2026), month, 1) + timedelta(days=rng.randint(0, 30))
        if day.month == month and not ("missing_year" in noise and (day.month, day.day) == (2, 29)):
            return day


class Maker:
    """Makes the lines of one split; decks keep locales, months, currencies and noise even."""

    def __init__(self, split: str):
        self.rng = Random(f"expenses {split}")
        self.pool = POOLS.get(split, "train")
        self.locales = ln.NEW_LOCALES if split == "test_new_locales" else ln.TRAIN_LOCALES
        self.locale_deck = Deck(self.locales, self.rng)
        self.months = {locale: Deck(range(1, 13), self.rng) for locale in self.locales}
        train = split == "train"
        self.kinds = {locale: Deck(TRAIN_KINDS if train else KINDS, self.rng) for locale in self.locales}
        self.noisy = Deck([True, False, False], self.rng)
        self.noises = Deck(TRAIN_NOISE if train else NOISE, self.rng)
        self.foreign = Deck(ln.FOREIGN, self.rng)

    def make(self) -> Line:
        """The next line."""
        rng, locale = self.rng, self.locale_deck.deal()
        language, home = self.locales[locale]
        noise = (self.noises.deal(),) if self.noisy.deal() else ()
        if noise and rng.random() < 0.12 and self.pool != "test_new_locales":
            noise = tuple(dict.fromkeys((*noise, rng.choice(["ocr", "extra_words"]))))
        currency = home if self.pool == "test_new_locales" or rng.random() < 0.6 else self.foreign.deal()
        spoken = "en" if rng.random() < 0.2 and self.pool != "test_new_locales" else language
        if currency in ln.MERCHANT_LANGUAGES and rng.random() < 0.5:
            spoken = ln.MERCHANT_LANGUAGES[currency]
        name, words = merchant(rng, spoken, self.pool)
        family, pattern, spoken = choose_pattern(rng, language, self.pool, must_avoid(name, noise))
        fields, bought = it.fill(rng, pattern, spoken, self.pool)
        month = self.months[locale].deal()
        day = draw_date(rng, month, noise)
        while (
            written := self.write(locale, language, home, currency, noise, {"m": name, **fields}, pattern, day)
        ) is None:
            pass
        text, amount = written
        answer = {"date": day.isoformat(), "amount": str(amount), "currency": currency, "merchant": name}
        return Line(text, answer, locale, language, pattern, noise, words, month, family, bought)

    def write(self, locale, language, home, currency, noise, fields, pattern, day) -> tuple[str, Decimal] | None:
        """The line's text and amount, or None where an OCR slip found no digit to take."""
        rng = self.rng
        kind = self.kinds[locale].deal()
        kind = "named" if "missing_year" in noise and kind == "iso" else kind
        form = rng.choice(self.date_forms(locale, kind, "missing_year" not in noise))
        when = ln.render_date(rng, day, form, locale)
        amount = ln.draw_amount(rng, currency)
        tight = bool(re.search(r"\{[admi]\}\W*\{[ad]\}|\{[ad]\}\W*\{[admi]\}", pattern)) or "tips_taxes" in noise
        marks = ln.LANGUAGE_MARKS.get(language)
        shown = re.sub(r"\{([miwpq])\}", lambda match: fields[match[1]], pattern)
        marked = bool(marks and marks.search(shown))
        money, unstated = ln.render_amount(rng, amount, currency, locale, language, tight, marked)
        if language == "ar" and rng.random() < 0.35 and not noise:
            money, when = money.translate(ln.ARABIC_NUMBER), when.translate(ln.ARABIC_DIGITS)
        if "ocr" in noise:
            at_money = rng.random() < 0.7
            slipped = ln.slip(rng, money if at_money else when)
            if slipped == (money if at_money else when):
                return None
            money, when = (slipped, when) if at_money else (money, slipped)
        note = ""
        if "tips_taxes" in noise:
            sentence = pattern not in pt.bare_patterns()
            money, note = with_taxes(rng, amount, money, currency, locale, language, sentence)
        order = ln.date_order(form) if ln.needs_order(form, day) else None
        text = self.assemble(pattern, {**fields, "d": when, "a": money}, noise, language) + note
        return self.frame(text, home if order and not unstated else currency, order, unstated, noise, day), amount

    def date_forms(self, locale: str, kind: str, year: bool) -> list[str]:
        """The date patterns that a line of this kind draws from."""
        return ln.date_patterns(locale, year)[kind]

    def reference(self, day: date) -> date:
        """The day on which a line without a year was written."""
        return ln.reference_after(self.rng, day)

    def assemble(self, pattern: str, fields: dict[str, str], noise, language: str) -> str:
        """Fills the pattern and adds abbreviations and extra words."""
        rng = self.rng
        lead = "{l}"
        if "abbreviation" in noise:
            plain = pattern in pt.bare_patterns() and not re.search(r"\{m\} +\{a\}|\{[ad]\} +\{[ad]\}", pattern)
            if plain and rng.random() < 0.6:
                fields["a"] = rng.choice(SHORT_TOTALS).format(a=fields["a"])
            else:
                lead = rng.choice(SHORT_LEADS)
        pattern = informal(rng, pattern, fields)
        text = re.sub(r"\{([damiwpq])\}", lambda match: fields[match[1]], pattern)
        text = lead.replace("{l}", text).replace("{n}", str(rng.randint(1000, 9999)))
        return add_words(rng, text, language, "{i}" in pattern) if "extra_words" in noise else text

    def frame(self, text: str, currency: str, order: str | None, unstated: bool, noise, day: date) -> str:
        """States the default currency, the date order and the reference date, before or after the line."""
        rng = self.rng
        notes = []
        if unstated or order:
            both = order and (unstated or rng.random() < 0.4)
            notes.append(ln.state_defaults(rng, currency if unstated or both else None, order))
        if "missing_year" in noise:
            notes.append(
                rng.choice(["[today {r}]", "[today {r}]", "(today: {r})", "[ref. date {r}]"]).format(
                    r=self.reference(day).isoformat()
                )
            )
        for note in notes:
            text = f"{note} {text}" if rng.random() < 0.6 else f"{text} {note}"
        return text


def build() -> dict[str, list[Line]]:
    """All splits; no prompt occurs twice, and no merchant of an unseen split occurs in another."""
    seen: set[str] = set()
    made: dict[str, list[Line]] = {}
    for split, count in SPLITS.items():
        maker, kept = Maker(split), []
        while len(kept) < count:
            line = maker.make()
            if line.prompt in seen or len(line.prompt) > 160:
                continue
            seen.add(line.prompt)
            kept.append(line)
        made[split] = kept
    return made


def records() -> dict[str, list[dict[str, str]]]:
    """All splits as they are stored."""
    return {split: [line.record for line in kept] for split, kept in build().items()}


def main(arguments: list[str] | None = None) -> int:
    """Builds or checks the files; returns the exit status."""
    return task_files.main(records, FOLDER, "Build the expense lines.", arguments)


if __name__ == "__main__":
    sys.exit(main())
