"""Builds the sales messages: a message from a customer -> the lead's record as JSON.

Deterministic: the standard library's generator with fixed seeds gives the same bytes.
"""

import json
import re
import sys
import unicodedata
from datetime import date, timedelta
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import task_files
import vocabulary as vo

FOLDER = Path(__file__).resolve().parent
SPLITS = {"train": 1200, "validation": 150, "test": 150, "test_unseen": 150}
FIELDS = ("name", "company", "product", "quantity", "budget", "currency", "deadline", "contact")


def plain(text: str) -> str:
    """Text for an e-mail address: ASCII letters only."""
    folded = unicodedata.normalize("NFKD", text.replace("ł", "l").replace("ø", "o"))
    return re.sub("[^a-z]", "", folded.encode("ascii", "ignore").decode().lower())


def grouped(amount: int, rng: Random) -> str:
    """The amount as people write it: 12000, 12,000 or 12k."""
    if amount % 1000 == 0 and amount < 100_000 and rng.random() < 0.25:
        return f"{amount // 1000}k"
    return f"{amount:,}" if rng.random() < 0.6 else str(amount)


class Maker:
    """Makes the messages of one split."""

    def __init__(self, split: str):
        self.rng = Random(f"sales {split}")
        self.pool = "test_unseen" if split == "test_unseen" else "train"
        self.parts = vo.PARTS[self.pool]
        self.several = ""

    def say(self, part: str, **fields: str) -> str:
        """One phrase for a part of the message."""
        return self.rng.choice(self.parts[part]).format(**fields)

    def make(self) -> dict[str, str]:
        """The next line: its prompt and its response."""
        rng = self.rng
        first, last = rng.choice(vo.PEOPLE[self.pool])
        name = f"{first} {last}"
        company = f"{rng.choice(vo.COMPANIES[self.pool])} {rng.choice(vo.COMPANY_ENDS)}".strip()
        record: dict[str, object] = dict.fromkeys(FIELDS)
        if rng.random() < 0.14:
            text = self.form(record, name, company)
        else:
            text = self.message(record, name, company)
        return {"prompt": text, "response": json.dumps(record, ensure_ascii=False)}

    def message(self, record: dict, name: str, company: str) -> str:
        """A message in sentences, which fills the record."""
        rng, first = self.rng, name.split()[0]
        who, draw = [], rng.random()
        if draw < 0.6:
            who, record["name"], record["company"] = [self.say("name_company", n=name, c=company)], name, company
        elif draw < 0.8:
            who, record["name"] = [self.say("name", n=name)], name
        elif draw < 0.92:
            who, record["company"] = [self.say("company", c=company)], company
        what = [self.say("product", **self.product(record))]
        if record["quantity"] is None:
            what = [self.say("product_alone", p=self.several)]
        more = []
        if rng.random() < 0.6:
            more.append(self.say("budget", b=self.budget(record)))
        if rng.random() < 0.6:
            more.append(self.say("deadline", d=self.deadline(record)))
        if rng.random() < 0.65:
            more.append(self.say("contact", x=self.contact(record, name, company)))
        if rng.random() < 0.5:
            more.append(self.say("chatter"))
        rng.shuffle(more)
        body = who + what + more if rng.random() < 0.75 else what + who + more
        closing = self.say("closing", f=first) if record["name"] else rng.choice(["Thanks!", "Best regards", ""])
        text = " ".join(part for part in (self.say("greeting"), *body, closing) if part).replace("..", ".")
        draw = rng.random()
        if draw < 0.12:
            return text.replace(". ", ".\n", 1)
        if draw < 0.2:  # typed in a hurry: no greeting's comma, no full stop at the end
            return text.replace(",", "", 1).rstrip(".!") if text.startswith(("Hi,", "Hello,")) else text.rstrip(".!")
        return text

    def form(self, record: dict, name: str, company: str) -> str:
        """A form with labels, which fills the record; a field that was not filled in is left out or says so."""
        rng = self.rng
        parts = self.product(record)
        wanted = rng.choice([record["product"], self.several])
        if rng.random() < 0.8:
            record["name"] = name
        if rng.random() < 0.7:
            record["company"] = company
        money = self.budget(record) if rng.random() < 0.6 else None
        day = self.deadline(record) if rng.random() < 0.6 else None
        contact = self.contact(record, name, company) if rng.random() < 0.7 else None
        number = str(record["quantity"]) if parts and record["quantity"] else None
        values = (record["name"], record["company"], wanted, number, money, day, contact)
        join, separator = rng.choice(vo.FORM_JOINS[self.pool])
        rows = []
        for label, value in zip(rng.choice(vo.FORMS[self.pool]), values, strict=True):
            if value is None and rng.random() < 0.5:
                continue
            rows.append(f"{label}{join}{rng.choice(['-', 'open', 'n/a']) if value is None else value}")
        return separator.join(rows)

    def product(self, record: dict) -> dict[str, str]:
        """What is wanted; the record has the product in the singular and the quantity as a number, if one is given."""
        rng = self.rng
        one, self.several = rng.choice(vo.PRODUCTS[self.pool])
        record["product"] = one
        number = rng.choice([1, *vo.NUMBERS, 7, 14, 24, 25, 30, 36, 40, 48, 60, 75, 100, 120, 150, 250])
        record["quantity"] = None if rng.random() < 0.2 else number
        if number == 1:
            wanted = ("an " if one[0] in "aeio" else "a ") + one if rng.random() < 0.6 else f"1 {one}"
        else:
            words = vo.NUMBERS.get(number) if rng.random() < 0.5 else None
            wanted = f"{words or number} {self.several}" if rng.random() < 0.85 else f"{number} x {one}"
        return {"q": wanted, "p": self.several}

    def budget(self, record: dict) -> str:
        """How much may be spent, with its currency."""
        rng = self.rng
        currency = rng.choice(list(vo.MONEY))
        amount = rng.choice([300, 450, 800, 1200, 1500, 2000, 2500, 3000, 4000, 5000, 7500, 8000, 12000, 15000, 20000])
        amount *= vo.SCALE.get(currency, 1)
        record["budget"], record["currency"] = amount, currency
        return rng.choice(vo.MONEY[currency]).format(a=grouped(amount, rng))

    def deadline(self, record: dict) -> str:
        """The day by which it must be there, always with its year and with the month in words or ISO 8601."""
        rng = self.rng
        day = date(2025, 1, 1) + timedelta(days=rng.randrange(1000))
        record["deadline"] = day.isoformat()
        month = vo.MONTHS[day.month - 1]
        forms = [
            f"{day.day} {month} {day.year}",
            f"{month} {day.day}, {day.year}",
            f"{day.day} {month[:3]} {day.year}",
            day.isoformat(),
        ]
        return rng.choice(forms)

    def contact(self, record: dict, name: str, company: str) -> str:
        """An e-mail address or a telephone number, as written."""
        rng = self.rng
        first, last = plain(name.split()[0]), plain(name.split(maxsplit=1)[1])
        if rng.random() < 0.65:
            host = f"{plain(company)}.example" if record["company"] else rng.choice(["mail.example", "post.example"])
            user = rng.choice([first, f"{first[0]}.{last}"]) if record["name"] else "office"
            contact = f"{user}@{host}"
        else:
            country = rng.choice(["+44", "+49", "+33", "+91", "+81", "+1", "+46", "+55", "+27", "+34"])
            contact = f"{country} 555 {rng.randint(100, 999)} {rng.randint(1000, 9999)}"
        record["contact"] = contact
        return contact


def build() -> dict[str, list[dict[str, str]]]:
    """All splits; no message occurs twice."""
    seen: set[str] = set()
    made: dict[str, list[dict[str, str]]] = {}
    for split, count in SPLITS.items():
        maker, kept = Maker(split), []
        while len(kept) < count:
            line = maker.make()
            if line["prompt"] not in seen:
                seen.add(line["prompt"])
                kept.append(line)
        made[split] = kept
    return made


def main(arguments: list[str] | None = None) -> int:
    """Builds or checks the files; returns the exit status."""
    return task_files.main(build, FOLDER, "Build the sales messages.", arguments)


if __name__ == "__main__":
    sys.exit(main())
