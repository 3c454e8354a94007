"""Renders parts of an expense line: dates and amounts in CLDR formats, slips, stated defaults."""

import re
from datetime import date, timedelta
from decimal import Decimal
from functools import cache
from random import Random

from babel import Locale
from babel.dates import format_date
from babel.numbers import format_decimal, get_currency_precision

# locale -> (language of words, home currency)
TRAIN_LOCALES = {
    "en_US": ("en", "USD"),
    "en_GB": ("en", "GBP"),
    "en_CA": ("en", "CAD"),
    "en_AU": ("en", "AUD"),
    "en_IN": ("en", "INR"),
    "de_DE": ("de", "EUR"),
    "de_CH": ("de", "CHF"),
    "fr_FR": ("fr", "EUR"),
    "fr_CA": ("fr", "CAD"),
    "es_ES": ("es", "EUR"),
    "es_MX": ("es", "MXN"),
    "it_IT": ("it", "EUR"),
    "pt_BR": ("pt", "BRL"),
    "pt_PT": ("pt", "EUR"),
    "nl_NL": ("nl", "EUR"),
    "sv_SE": ("sv", "SEK"),
    "ru_RU": ("ru", "RUB"),
    "el_GR": ("el", "EUR"),
    "ja_JP": ("ja", "JPY"),
    "ko_KR": ("ko", "KRW"),
    "zh_CN": ("zh", "CNY"),
}
NEW_LOCALES = {
    "ka_GE": ("ka", "GEL"),
    "hy_AM": ("hy", "AMD"),
    "bn_BD": ("bn", "BDT"),
    "am_ET": ("am", "ETB"),
    "ta_LK": ("ta", "LKR"),
    "km_KH": ("km", "KHR"),
    "lo_LA": ("lo", "LAK"),
}
# Written forms that name exactly one currency here. "$", "kr", "¥", "￥" and "元" name none. "£" is read as GBP, "R" as
# ZAR.
SYMBOLS = {
    "EUR": ["€", "€", "€", "euro"],
    "GBP": ["£", "£", "GBP"],
    "USD": ["US$", "US$", "USD"],
    "CAD": ["CA$", "CAD"],
    "AUD": ["A$", "AU$", "AUD"],
    "NZD": ["NZ$"],
    "HKD": ["HK$"],
    "TWD": ["NT$"],
    "SGD": ["S$", "SGD"],
    "MXN": ["MX$", "MXN"],
    "BRL": ["R$"],
    "ZAR": ["R"],
    "INR": ["₹"],
    "KRW": ["₩"],
    "ILS": ["₪"],
    "THB": ["฿"],
    "PLN": ["zł"],
    "CZK": ["Kč"],
    "HUF": ["Ft"],
    "TRY": ["₺"],
    "RUB": ["₽"],
    "UAH": ["₴"],
    "CHF": ["CHF"],
    "VND": ["₫"],
    "PHP": ["₱"],
    "JPY": ["円", "JP¥"],
    "CNY": ["CN¥", "RMB"],
    "GEL": ["₾"],
    "AMD": ["֏"],
    "BDT": ["৳"],
    "KHR": ["៛"],
    "LAK": ["₭"],
}
AMBIGUOUS = {
    **dict.fromkeys(["USD", "CAD", "AUD", "NZD", "HKD", "TWD", "SGD", "MXN"], ["$"]),
    **dict.fromkeys(["SEK", "NOK", "DKK", "ISK"], ["kr"]),
    "JPY": ["¥", "￥"],
    "CNY": ["¥", "￥"],
}
# Beside Japanese kana, "¥" and "￥" are JPY; beside simplified Chinese characters, these and "元" are CNY.
LANGUAGE_SIGNS = {"ja": ("JPY", ["¥", "￥", "￥"]), "zh": ("CNY", ["¥", "￥", "元", "元"])}
LANGUAGE_MARKS = {
    "ja": re.compile("[ぁ-んァ-ヶ]"),
    "zh": re.compile("[费购订账单户时间额书馆饭药买给还卡垫转请张财为]"),
}
# Every currency's code: no merchant is called so.
CODES = frozenset(Locale.parse("en").currencies)
# Currencies in English words, written after the number.
ENGLISH_WORDS = {
    "EUR": "euros",
    "USD": "US dollars",
    "GBP": "pounds",
    "JPY": "yen",
    "CNY": "yuan",
    "CAD": "Canadian dollars",
    "AUD": "Australian dollars",
    "NZD": "New Zealand dollars",
    "HKD": "Hong Kong dollars",
    "SGD": "Singapore dollars",
    "CHF": "Swiss francs",
    "SEK": "Swedish kronor",
    "NOK": "Norwegian kroner",
    "DKK": "Danish kroner",
    "KRW": "won",
    "INR": "Indian rupees",
    "MXN": "Mexican pesos",
    "BRL": "reais",
    "ZAR": "rand",
    "PLN": "zloty",
    "THB": "baht",
    "ILS": "shekels",
    "TRY": "Turkish lira",
    "CZK": "Czech koruna",
    "HUF": "forint",
}
LOCAL_WORDS = {
    ("ja", "JPY"): "円",
    ("ko", "KRW"): "원",
    ("zh", "CNY"): "人民币",
    ("th", "THB"): "บาท",
    ("he", "ILS"): 'ש"ח',
    ("el", "EUR"): "ευρώ",
    ("ru", "EUR"): "евро",
    ("zh", "JPY"): "日元",
    ("zh", "USD"): "美元",
    ("ja", "USD"): "米ドル",
    ("ja", "EUR"): "ユーロ",
}
# Currencies away from home. Those of the twenty most traded that are no locale's home come up twice as often.
FOREIGN = [
    *("NOK", "DKK", "NZD", "HKD", "SGD", "TWD", "ZAR", "PLN", "KWD") * 2,
    *("EUR", "USD", "GBP", "JPY", "CHF", "CAD", "MXN", "SEK", "CNY", "KRW", "INR", "BRL", "THB", "ILS", "TRY", "CZK"),
    *("HUF", "UAH", "VND", "PHP", "AED", "ISK"),
]
# Currencies whose merchants are named in a language that no locale of train speaks.
MERCHANT_LANGUAGES = {"PLN": "pl", "CZK": "cs", "TRY": "tr"}
# Units of the currency that buy about as much as one euro: the scale of amounts.
SCALE = {
    "INR": 80,
    "JPY": 100,
    "KRW": 1000,
    "RUB": 60,
    "THB": 30,
    "CZK": 20,
    "HUF": 300,
    "VND": 10000,
    "PHP": 50,
    "TWD": 30,
    "ISK": 100,
    "EGP": 20,
    "MXN": 10,
    "SEK": 8,
    "NOK": 8,
    "DKK": 7,
    "UAH": 30,
    "TRY": 10,
    "CNY": 5,
    "ZAR": 15,
    "PLN": 4,
    "ILS": 4,
    "HKD": 8,
    "KWD": 0.5,
    "AMD": 300,
    "BDT": 80,
    "ETB": 40,
    "LKR": 200,
    "KHR": 3000,
    "LAK": 10000,
}
ARABIC_DIGITS = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")
ARABIC_NUMBER = str.maketrans("0123456789.,", "٠١٢٣٤٥٦٧٨٩٫٬")
BIDI = dict.fromkeys(map(ord, "\u200e\u200f\u061c"))
LATIN_CASE = {"en", "de", "fr", "es", "it", "pt", "nl", "sv", "pl", "cs", "ru"}
# No stand-alone month names (LLLL): babel 2.18 lets them leak from one locale into another.
CUSTOM = ["d MMM y", "d-MMM-yy", "dd MMM yyyy", "d MMM ''yy", "d MMMM y"]
NUMERIC = ["dd/MM/yyyy", "d/M/yyyy", "MM/dd/yyyy", "dd.MM.yyyy", "d.M.yyyy", "dd-MM-yyyy", "yyyy/MM/dd", "yyyy.MM.dd"]


@cache
def date_patterns(locale: str, year: bool) -> dict[str, list[str]]:
    """CLDR date patterns of a locale, sorted by kind; `year` False leaves the year out."""
    data = Locale.parse(locale)
    skeletons = data.datetime_skeletons

    def of(*names: str) -> list[str]:
        return [skeletons[name].pattern for name in names if name in skeletons]

    if year:
        found = [data.date_formats[width].pattern for width in ("medium", "medium", "long", "long", "full", "short")]
        found += of("yMMMd", "yMMMd", "yMMMEd", "yMd")
        custom = CUSTOM if locale[:2] not in ("ja", "ko", "zh", "he", "ar", "hi", "th") else CUSTOM[:1]
        found += custom if locale[:2] not in ("ja", "ko", "zh") else []
    else:
        found = of("MMMd", "MMMMd", "MMMd", "MMMMd", "Md")
    named = [pattern for pattern in found if is_named(pattern)]
    numeric = [pattern for pattern in found if not is_named(pattern)]
    found = [re.sub("L+", lambda match: "M" * len(match[0]), pattern) for pattern in found]
    return {
        "named": named or numeric,
        "iso": ["yyyy-MM-dd"],
        "numeric": numeric + NUMERIC if year else numeric or named,
    }


def bare(pattern: str) -> str:
    """A CLDR pattern without its quoted words."""
    return re.sub(r"'[^']*'", "", pattern)


def is_named(pattern: str) -> bool:
    """Whether the pattern says the month in words, or marks it (年月日, 년월일)."""
    return bool(re.search(r"MMM|LLL|[年년月월]", bare(pattern)))


def date_order(pattern: str) -> str:
    """The order of the fields, such as "D/M/Y", or "D/M" without a year."""
    letters = re.findall(r"d+|[ML]+|y+", bare(pattern))
    return "/".join(dict.fromkeys({"d": "D", "M": "M", "L": "M", "y": "Y"}[letter[0]] for letter in letters))


def needs_order(pattern: str, day: date) -> bool:
    """Whether this date, so written, could be read in two ways without a stated order."""
    if is_named(pattern):
        return bool(re.search(r"[年년]", pattern)) and "yy" in pattern and "yyyy" not in pattern
    years = re.findall(r"y+", bare(pattern))
    if years and len(years[0]) == 2:
        return True
    return date_order(pattern) != "Y/M/D" and day.day <= 12 and day.day != day.month


def render_date(rng: Random, day: date, pattern: str, locale: str) -> str:
    """The date in words of the locale, with the capitals that people use."""
    text = format_date(day, pattern, locale).translate(BIDI).replace("\u202f", " ")
    if "-" in pattern:
        text = text.replace(".-", "-")
    draw = rng.random()
    if locale[:2] in LATIN_CASE and draw < 0.16:
        text = text.upper() if draw < 0.1 else text.lower()
    return text


def draw_amount(rng: Random, currency: str) -> Decimal:
    """An amount between 0.50 and 5,000 (times the currency's scale), with CLDR's digits."""
    digits = get_currency_precision(currency)
    value = 0.5 * (10000 ** rng.uniform(0.12, 1)) * SCALE.get(currency, 1)
    if digits == 0:
        step = 10 if value > 2000 and rng.random() < 0.6 else 1
        return Decimal(max(step, int(value) // step * step))
    if rng.random() < 0.15:
        value = max(1, round(value))
    return Decimal(str(round(value, digits))).quantize(Decimal(1).scaleb(-digits))


def render_number(
    rng: Random, amount: Decimal, currency: str, locale: str, tight: bool, fractions: bool = False
) -> str:
    """The number in the locale's format. A whole amount of at most three digits may drop its decimals."""
    digits = get_currency_precision(currency)
    grouping = amount >= 1000 and rng.random() < 0.7
    pattern = ("#,##,##0" if locale[-2:] == "IN" else "#,##0") if grouping else "0"
    if (
        not (digits == 2 and not fractions and amount == int(amount) and amount < 1000 and rng.random() < 0.6)
        and digits
    ):
        pattern += "." + "0" * digits
    text = format_decimal(amount, pattern, locale, group_separator=grouping, numbering_system="latn")
    if re.search(r"[\s\u202f\u00a0]", text):
        text = re.sub(r"\s", "" if tight else rng.choice(["\u00a0", " ", "\u202f"]), text)
    return text


def render_amount(
    rng: Random, amount: Decimal, currency: str, locale: str, language: str, tight: bool, marked: bool = False
) -> tuple[str, bool]:
    """Number and currency as written; True when the currency must be stated elsewhere.

    `marked` says that the line shows its language, which `LANGUAGE_SIGNS` asks for.
    """
    symbols = SYMBOLS.get(currency, [currency])
    draw = rng.random()
    vague = currency in AMBIGUOUS
    stated = draw < 0.1 or (vague and draw < (0.45 if "kr" in AMBIGUOUS[currency] else 0.3))
    if stated and (not vague or draw < 0.04) and not tight:
        return render_number(rng, amount, currency, locale, tight, fractions=True), True
    stated = stated and vague
    sign_currency, signs = LANGUAGE_SIGNS.get(language, ("", []))
    if marked and currency == sign_currency and draw < 0.45:
        mark, stated = rng.choice(signs), stated and draw < 0.15
    elif stated:
        mark = rng.choice(AMBIGUOUS[currency])
    elif language == "en" and currency in ENGLISH_WORDS and rng.random() < 0.1:
        return f"{render_number(rng, amount, currency, locale, tight)} {ENGLISH_WORDS[currency]}", False
    elif (language, currency) in LOCAL_WORDS and draw < 0.6:
        mark = LOCAL_WORDS[language, currency]
    else:
        mark = currency if draw > 0.72 else rng.choice(symbols)
    return place(rng, render_number(rng, amount, currency, locale, tight), mark, currency, language), stated


def place(rng: Random, number: str, mark: str, currency: str, language: str) -> str:
    """The number with its currency's mark before or after it."""
    local = (language, currency) in LOCAL_WORDS and mark in LOCAL_WORDS.values() and mark != "人民币"
    english = language in ("en", "zh", "ja", "ko", "th", "hi") or (currency == "BRL" and language == "pt")
    after = local or mark in ("円", "원", "元", "kr", "zł", "Kč", "Ft", "euro", "RMB")
    if after or (mark not in ("R", "￥") and rng.random() < (0.15 if english else 0.8)):
        gap = "" if mark in ("円", "원", "元", "人民币") else rng.choice(["", " ", " ", "\u00a0"])
        return number + (" " if mark.isalpha() and mark.isascii() and not gap else gap) + mark
    if mark == "R":
        return mark + rng.choice(["", " ", "\u00a0"]) + number
    gap = rng.choice([" ", " ", "\u00a0"]) if mark[-1].isalpha() else rng.choice(["", "", " "])
    return mark + gap + number


def state_defaults(rng: Random, currency: str | None, order: str | None) -> str:
    """A bracketed note that states the default currency, the date order, or both."""
    if currency and order:
        forms = [
            "[default {c}, {o}]",
            "[default currency {c}, date order {o}]",
            "({c}, {o})",
            "[{c}; dates {o}]",
        ]
    elif currency:
        forms = ["[default {c}]", "[default currency {c}]", "(currency: {c})", "[amounts in {c}]"]
    else:
        forms = ["[dates {o}]", "[date order {o}]", "({o})", "[default {o}]"]
    return rng.choice(forms).format(c=currency, o=order)


def slip(rng: Random, text: str) -> str:
    """Puts one or two OCR slips among digits: O for 0, l or I for 1. A digit stays beside it, and no letter does."""
    for _ in range(rng.choice([1, 1, 2])):
        spots = [match.start() for match in re.finditer(r"(?<=\d)[01](?![^\W\d_])|(?<![^\W\d_])[01](?=\d)", text)]
        if spots:
            spot = rng.choice(spots)
            text = text[:spot] + ("O" if text[spot] == "0" else rng.choice("lI")) + text[spot + 1 :]
    return text


def reference_after(rng: Random, day: date) -> date:
    """A day on which `day`, without its year, is the most recent such day: 0 to 364 days later, half within a month."""
    return day + timedelta(days=int(364 * rng.random() ** 4))
