"""Sentence patterns: where date {d}, amount {a} and merchant {m} stand in a line.

The patterns of train are built from parts (orders x separators, labels x languages) and from `SENTENCES`.
`VALIDATION_UNSEEN` and `TEST_UNSEEN` are written by hand; none is a pattern of train. A merchant's
edges always follow from the line: separators, words of a sentence, or the date and the amount.
"""

from itertools import permutations

SEPARATORS = [" ", ", ", " - ", " | ", "\t", " / ", "; ", " · ", " – ", " : ", "  ", " > "]

# Words for merchant, date and total in labelled forms.
LABELS = {
    "en": [
        ("Merchant", "Date", "Total"),
        ("Store", "Date", "Amount"),
        ("Vendor", "Dated", "Paid"),
        ("Where", "When", "How much"),
        ("payee", "date", "sum"),
        ("Shop", "Day", "Price"),
    ],
    "de": [("Händler", "Datum", "Betrag"), ("Laden", "Datum", "Summe"), ("Empfänger", "Tag", "Gesamt")],
    "fr": [("Commerçant", "Date", "Montant"), ("Magasin", "Le", "Total"), ("Lieu", "Date", "Payé")],
    "es": [("Comercio", "Fecha", "Importe"), ("Tienda", "Fecha", "Total"), ("Lugar", "Día", "Pagado")],
    "it": [("Esercente", "Data", "Importo"), ("Negozio", "Data", "Totale"), ("Dove", "Quando", "Quanto")],
    "pt": [("Loja", "Data", "Valor"), ("Estabelecimento", "Data", "Total"), ("Local", "Dia", "Pago")],
    "nl": [("Winkel", "Datum", "Bedrag"), ("Begunstigde", "Datum", "Totaal"), ("Waar", "Wanneer", "Hoeveel")],
    "sv": [("Butik", "Datum", "Belopp"), ("Mottagare", "Datum", "Summa"), ("Var", "När", "Totalt")],
    "pl": [("Sklep", "Data", "Kwota"), ("Odbiorca", "Data", "Razem"), ("Gdzie", "Kiedy", "Ile")],
    "cs": [("Obchod", "Datum", "Částka"), ("Příjemce", "Datum", "Celkem"), ("Kde", "Kdy", "Kolik")],
    "tr": [("Mağaza", "Tarih", "Tutar"), ("İşyeri", "Tarih", "Toplam"), ("Nerede", "Gün", "Ödenen")],
    "ru": [("Магазин", "Дата", "Сумма"), ("Получатель", "Дата", "Итого"), ("Где", "Когда", "Сколько")],
    "el": [("Κατάστημα", "Ημερομηνία", "Ποσό"), ("Πού", "Πότε", "Σύνολο")],
    "he": [("בית עסק", "תאריך", "סכום"), ("חנות", "תאריך", 'סה"כ')],
    "ar": [("المتجر", "التاريخ", "المبلغ"), ("التاجر", "اليوم", "الإجمالي")],
    "hi": [("दुकान", "तारीख", "राशि"), ("विक्रेता", "दिनांक", "कुल")],
    "th": [("ร้าน", "วันที่", "ยอดเงิน"), ("ร้านค้า", "วันที่", "รวม")],
    "ja": [("店名", "日付", "金額"), ("支払先", "利用日", "合計")],
    "ko": [("가맹점", "날짜", "금액"), ("사용처", "일자", "합계")],
    "zh": [("商户", "日期", "金额"), ("商家", "时间", "合计")],
}
LABEL_JOINS = [": ", "=", " = ", ":"]
LABEL_SEPARATORS = ["; ", ", ", " | ", " / ", " - "]

SENTENCES = {
    "en": [
        "Paid {a} at {m} on {d}",
        "Spent {a} at {m} on {d}",
        "{d}: paid {a} to {m}",
        "On {d} I paid {a} at {m}",
        "{m} on {d} for {a}",
        "{a} to {m} on {d}",
        "{m} charged {a} on {d}",
        "{d} - {m} - {a} paid",
        "Receipt from {m}, {d}, total {a}",
        "{m}, receipt: {a}, {d}",
        "Invoice from {m} dated {d} for {a}",
        "{d} CARD PURCHASE: {m} {a}",
        "POS {d} / {m} / {a}",
        "DEBIT {a} | {m} | {d}",
        "{d} | {m} | -{a}",
        "*** {m} *** {d} TOTAL {a}",
        "{m} ({d}) {a}",
        "{a} ({m}, {d})",
        "{d} ({m}): {a}",
        "[{m}] {d} {a}",
        "bought supplies from {m} on {d} for {a}",
        "dinner at {m}, {d}, {a}",
        "lunch @ {m}: {a} ({d})",
        "taxi with {m}, {d}: {a}",
        "{m}, total {a}, {d}",
        "Reimburse {a} for {m} ({d})",
        "expense: {a}, {m}, {d}",
        "I spent {a} on {d} at {m}",
        "Payment of {a} to {m}, {d}",
        "- {d}: {m}, {a}",
        "* {m}: {a} on {d}",
        '"{m}" {d} {a}',
        '{d} "{m}" {a}',
        "{a} -> {m}, {d}",
        "{m} => {a} [{d}]",
        'date {d}, store "{m}", sum {a}',
        "Order at {m} for {a}, placed {d}",
        "{m} // {d} // {a}",
        "{d};{m};{a}",
        "{m};{d};{a}",
        "{m};{a};{d}",
        "Your card was charged {a} by {m} on {d}",
        "{d} {m}: amount due {a}",
        "hotel: {m}, {d}, {a} paid",
        "{m}. {d}. {a}.",
        "Got groceries at {m} for {a} on {d}",
        "{d} at {m}: {a}",
    ],
    "de": [
        "Am {d} bei {m} {a} bezahlt",
        "{a} bei {m} am {d}",
        "Rechnung von {m} vom {d} über {a}",
        "{d}: {a} an {m}",
        "Kartenzahlung: {m} / {d} / {a}",
        "Beleg: {m}, {d}, Summe {a}",
    ],
    "fr": [
        "Payé {a} chez {m} le {d}",
        "Le {d}, {a} chez {m}",
        "Facture de {m} du {d} : {a}",
        "CB: {m} / {d} / {a}",
        "Reçu: {m}, {d}, total {a}",
        "{d} : {a} à {m}",
    ],
    "es": [
        "Pagué {a} en {m} el {d}",
        "El {d}, {a} en {m}",
        "Factura de {m} del {d}: {a}",
        "Compra en {m}, {d}, {a}",
        "Tarjeta: {m} / {a} / {d}",
        "{d}: {a} a {m}",
    ],
    "it": [
        "Pagato {a} da {m} il {d}",
        "Il {d}, {a} da {m}",
        "Fattura di {m} del {d}: {a}",
        "Scontrino: {m}, {d}, totale {a}",
        "POS: {m} / {a} / {d}",
    ],
    "pt": [
        "Paguei {a} em {m} em {d}",
        "Em {d}, {a} em {m}",
        "Nota de {m}, {d}: {a}",
        "Compra em {m}, {d}, {a}",
        "Cartão: {m} / {a} / {d}",
    ],
    "nl": [
        "{a} betaald bij {m} op {d}",
        "Op {d} {a} bij {m}",
        "Factuur van {m}, {d}: {a}",
        "Pin: {m} / {d} / {a}",
        "Bon: {m}, {d}, totaal {a}",
    ],
    "sv": [
        "Betalade {a} hos {m} den {d}",
        "{d}: {a} till {m}",
        "Faktura från {m}, {d}: {a}",
        "Kortköp: {m} / {d} / {a}",
        "Kvitto: {m}, {d}, summa {a}",
    ],
    "pl": [
        "Zapłacono {a} w: {m}, {d}",
        "{d}: {a} dla {m}",
        "Faktura: {m}, {d}, kwota {a}",
        "Karta: {m} / {d} / {a}",
        "Paragon: {m}, {d}, suma {a}",
    ],
    "cs": [
        "Zaplaceno {a}, {m}, dne {d}",
        "Dne {d}: {m}, {a}",
        "Faktura: {m}, {d}, celkem {a}",
        "Kartou: {m} / {d} / {a}",
    ],
    "tr": [
        "{d} tarihinde {m}: {a} ödendi",
        "{m}, {d}, toplam {a}",
        "Fatura: {m} / {d} / {a}",
        "Kart: {a} / {m} / {d}",
    ],
    "ru": [
        "Оплата {a}: {m}, {d}",
        "{d} оплачено {a}, {m}",
        "Чек: {m}, {d}, сумма {a}",
        "Покупка: {m} / {d} / {a}",
        "Счёт от {d}: {m}, {a}",
    ],
    "el": [
        "Πλήρωσα {a}, {m}, {d}",
        "Απόδειξη: {m}, {d}, σύνολο {a}",
        "Αγορά: {m} / {d} / {a}",
        "{d}: {a} - {m}",
    ],
    "he": ["שולם {a}, {m}, {d}", "קבלה: {m}, {d}, {a}", "רכישה: {m} / {d} / {a}"],
    "ar": ["دفعت {a} - {m} - {d}", "فاتورة: {m}، {d}، {a}", "شراء: {m} / {d} / {a}"],
    "hi": ["{d} को {m}: {a} दिए", "बिल: {m}, {d}, {a}", "भुगतान {a} / {m} / {d}"],
    "th": ["จ่าย {a} ที่ {m} เมื่อ {d}", "ใบเสร็จ: {m}, {d}, {a}", "ซื้อของ / {m} / {d} / {a}"],
    "ja": [
        "{d}に「{m}」で{a}支払い",
        "{d} {m}にて {a}",
        "領収書:{m} {d} {a}",
        "{d}、{m}、{a}",
        "カード利用: {m} / {d} / {a}",
    ],
    "ko": [
        "{d} {m}에서 {a} 결제",
        "영수증: {m}, {d}, {a}",
        "카드 승인 / {m} / {d} / {a}",
        "{d} / {m} / {a} 지출",
    ],
    "zh": ["{d}在{m}消费{a}", "{d}，{m}，{a}", "收据：{m}，{d}，{a}", "刷卡: {m} / {d} / {a}"],
}

TEST_UNSEEN = {
    "en": [
        "{m} billed me {a}, {d}",
        "We settled {a} with {m} on {d}",
        "{d}: {m} took {a} off my card",
        "Please refund {a}; vendor was {m}, day was {d}",
        "Statement line {d} <{m}> {a}",
        "From: {m} ~ {d} ~ {a}",
        "Cost {a}, purchased through {m}, {d}",
        "{d} -- {m} -- {a}",
        "{m} * {d} * {a}",
        "{{{m}}} {d} {a}",
        "Bill no. 88 from {m}, issued {d}, payable {a}",
        "Withdrawal of {a} in favour of {m} (booked {d})",
        "{a} went to {m} on {d}",
        "My {d} purchase from {m} came to {a}",
        "Ticket bought via {m} on {d}, fare {a}",
        "{d} + {m} + {a}",
        "{a} @ {m} @ {d}",
        'Claim: {d}, {a}, "{m}"',
        "<b>{m}</b> {d} {a}",
        "Stayed with {m} on {d} and owed {a}",
        "{d}: handed over {a} in cash at {m}.",
        "seller={m} & cost={a} & day={d}",
        "Supplier - {m} // Value - {a} // Issued - {d}",
        "Transaction of {d} with {m} worth {a}",
        "({d}) {a} \\ {m}",
        "Fuel stop, {m}, {d}, cost {a}",
        "{m} | paid {d} | {a}",
        "{d}_{m}_{a}",
    ],
    "de": [
        "{m} hat am {d} {a} abgebucht",
        "Kassenbon {d} / {m} / zu zahlen {a}",
        "Überweisung an {m}, {a}, {d}",
    ],
    "fr": ["{m} m'a facturé {a} le {d}", "Virement de {a} à {m}, {d}", "Note de frais : {m}, {d}, {a}"],
    "es": ["{m} me cobró {a} el {d}", "Recibo del {d}, {m}, a pagar {a}", "Gasto de {a} con {m}, {d}"],
    "it": ["{m} ha addebitato {a} il {d}", "Spesa del {d} presso {m}: {a}"],
    "pt": ["{m} cobrou {a} em {d}", "Despesa de {d} com {m}: {a}"],
    "nl": ["{m} schreef {a} af op {d}", "Uitgave {d} / {m} / {a}"],
    "sv": ["{m} drog {a} den {d}", "Utlägg {d}, {m}: {a}"],
    "pl": ["{m} pobrał {a} dnia {d}", "Wydatek z {d}: {m}, {a}"],
    "cs": ["Výdaj {d} / {m} / {a}", "Účet: {m}, {a}, ze dne {d}"],
    "tr": ["Harcama {d} / {m} / {a}", "{m} firmasına {a} ödedim, {d}"],
    "ru": ["Расход {d}: {m}, {a}", "Списание {a} в пользу {m}, {d}"],
    "el": ["Έξοδο {d}: {m}, {a}", "Χρέωση {a} από {m}, {d}"],
    "he": ["הוצאה {d}: {m}, {a}", "חיוב {a} / {m} / {d}"],
    "ar": ["مصروف {d}: {m} / {a}", "خصم {a} / {m} / {d}"],
    "hi": ["खर्च {d}: {m}, {a}", "रसीद {m} / {d} / {a}"],
    "th": ["ค่าใช้จ่าย {d}: {m}, {a}", "ชำระเงิน {a} / {m} / {d}"],
    "ja": ["経費 {d} / {m} / {a}", "{d}、「{m}」へ{a}"],
    "ko": ["지출 {d} / {m} / {a}", "{m}에 {a} 지불, {d}"],
    "zh": ["支出 {d} / {m} / {a}", "{d}付给{m}共{a}"],
}

VALIDATION_UNSEEN = {
    "en": [
        "{m} wants {a} for {d}",
        "Put {a} on the card at {m}, {d}",
        "{d} >> {m} >> {a}",
        "{m} ~ {a} ~ {d}",
        "Booked with {m}: {d}, fee {a}",
        "Checked out of {m} on {d} after paying {a}",
        "Tx {d} [{m}] {a}",
        "{d} = {m} = {a}",
        "when={d}&who={m}&what={a}",
        "{a}, courtesy of {m}, {d}",
        "Logged {d}: {a} owed to {m}",
        "'{m}' / {a} / {d}",
        "Petty cash {a} out to {m} ({d})",
        "The {d} bill from {m} was {a}",
        "Subscription renewed by {m} on {d}, price {a}",
        "Buyer's note: {m}; {a}; {d}",
        "{d} # {m} # {a}",
        "{m} - settled {a} - {d}",
        "Purchase made {d}, seller {m}, value {a}",
        "{a} left my account for {m} on {d}",
    ],
    "de": ["{a} gingen am {d} an {m}", "Ausgabe: {d}, {m}, {a}"],
    "fr": ["Dépense du {d} : {m}, {a}", "{a} versés à {m} le {d}"],
    "es": ["Abonado {a} a {m}, {d}", "Cargo de {m}: {a}, {d}"],
    "it": ["Versati {a} a {m} il {d}"],
    "pt": ["Débito de {a} para {m}, {d}"],
    "nl": ["Overgemaakt: {a} aan {m}, {d}"],
    "sv": ["Utgift: {d}, {m}, {a}"],
    "pl": ["Przelew {a} do {m}, {d}"],
    "cs": ["Platba {a} pro {m}, {d}"],
    "tr": ["Gider: {d}, {m}, {a}"],
    "ru": ["Перевод {a} / {m} / {d}"],
    "el": ["Πληρωμή {a} προς {m}, {d}"],
    "he": ["תשלום {a} / {m} / {d}"],
    "ar": ["دفعة {a} / {m} / {d}"],
    "hi": ["चुकाया {a} / {m} / {d}"],
    "th": ["โอนเงิน {a} / {m} / {d}"],
    "ja": ["出費 {d} / {m} / {a}"],
    "ko": ["비용 {d} / {m} / {a}"],
    "zh": ["报销 {d} / {m} / {a}"],
}


def bare_patterns() -> list[str]:
    """Every order of the three fields, joined by one separator."""
    return [sep.join(order) for sep in SEPARATORS for order in permutations(("{d}", "{a}", "{m}"))]


def labelled_patterns(language: str) -> list[str]:
    """Label-and-value forms of one language: orders x label sets, joins and separators taken in turn."""
    made = []
    for number, (merchant, date, amount) in enumerate(LABELS[language]):
        fields = (f"{merchant}{{j}}{{m}}", f"{date}{{j}}{{d}}", f"{amount}{{j}}{{a}}")
        for turn, order in enumerate(permutations(fields)):
            join = LABEL_JOINS[(turn + number) % len(LABEL_JOINS)]
            separator = LABEL_SEPARATORS[(turn + 2 * number) % len(LABEL_SEPARATORS)]
            made.append(separator.join(order).replace("{j}", join))
    return made


def train_patterns(language: str) -> dict[str, list[str]]:
    """The patterns of train for one language, by family: bare, labelled, sentence."""
    return {"bare": bare_patterns(), "labelled": labelled_patterns(language), "sentence": SENTENCES[language]}


def all_train_patterns() -> list[str]:
    """Every pattern that train may use, without repeats."""
    made = bare_patterns()
    for language in LABELS:
        made += labelled_patterns(language) + SENTENCES[language]
    return list(dict.fromkeys(made))
