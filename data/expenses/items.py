"""What people buy, and with whom: items {i}, persons {p} and company {w} of the lines that name them, by language.

As the words of merchants, each item and each person belongs to exactly one pool (train, validation_unseen or
test_unseen): every eighth word of a list, by its place, is one of an unseen pool. No person is named like a merchant.
"""

import re
from random import Random

from vocabulary import split_words

# "#" stands for a number from 2 to 4.
ITEMS = {
    "de": "Kaffee, # Kaffee, Zugticket, # Fahrkarten, Mittagessen, # Brezeln, Druckerpapier, Parken, Kugelschreiber, "
    "# Notizbücher, Ladekabel, Taxifahrt, # Bier, Frühstück, Diesel, Blumen, Briefmarken, # Pizzen, Schreibtischlampe, "
    "# Nächte, Abendessen, Hustensaft, # Kinokarten, Reinigungsmittel, Apfelkuchen, Kopfhörer, Autowäsche, Busticket, "
    "# Glühbirnen, USB-Stick, Snacks, Fachbuch",
    "fr": "# cafés, déjeuner, billet de train, # sandwichs, papier imprimante, parking, essence, # croissants, taxi, "
    "cahier, ticket de bus, # nuits, dîner, fleurs, câble USB, timbres, # bières, stylos, petit-déjeuner, # livres, "
    "lampe de bureau, médicaments, gâteau, # places de cinéma, lavage auto, chargeur, fournitures, # salades, péage, "
    "# ampoules, casque audio, pain",
    "es": "# cafés, almuerzo, billete de tren, # bocadillos, papel de impresora, aparcamiento, gasolina, # cuadernos, "
    "taxi, billete de autobús, cena, # noches, flores, cable USB, sellos, # cervezas, bolígrafos, desayuno, # libros, "
    "lámpara de mesa, medicinas, tarta, # entradas de cine, lavado del coche, cargador, # bombillas, peaje, # pizzas, "
    "auriculares, material de oficina, fruta, # tóners",
    "it": "# caffè, pranzo, biglietto del treno, # panini, carta per stampante, parcheggio, benzina, # quaderni, taxi, "
    "biglietto dell'autobus, cena, # notti, fiori, cavo USB, francobolli, # birre, penne, colazione, # libri, "
    "lampada da tavolo, medicine, torta, # biglietti del cinema, lavaggio auto, caricabatterie, # lampadine, pedaggio, "
    "# pizze, cuffie, cancelleria, gelato, # toner",
    "pt": "# cafés, almoço, bilhete de trem, # sanduíches, papel para impressora, estacionamento, gasolina, "
    "# cadernos, "
    "táxi, passagem de ônibus, jantar, # noites, flores, cabo USB, selos, # cervejas, canetas, "
    "café da manhã, # livros, "
    "luminária, remédios, bolo, # ingressos de cinema, lavagem do carro, carregador, # lâmpadas, pedágio, # pizzas, "
    "fones de ouvido, material de escritório, frutas, # toners",
    "nl": "# koffie, lunch, treinkaartje, # broodjes, printerpapier, parkeren, benzine, # schriften, taxirit, "
    "buskaartje, "
    "diner, # nachten, planten, USB-kabel, postzegels, # biertjes, pennen, ontbijt, # boeken, bureaulamp, medicijnen, "
    "appeltaart, # bioscoopkaartjes, autowas, oplader, # gloeilampen, tol, # pizza's, koptelefoon, kantoorspullen, "
    "fruit, # toners",
    "sv": "# kaffe, lunch, tågbiljett, # smörgåsar, skrivarpapper, parkering, bensin, # anteckningsböcker, taxiresa, "
    "bussbiljett, middag, # nätter, krukväxter, USB-kabel, frimärken, # öl, pennor, frukost, # böcker, "
    "skrivbordslampa, "
    "medicin, tårta, # biobiljetter, biltvätt, laddare, # glödlampor, vägtull, # pizzor, hörlurar, kontorsmaterial, "
    "frukt, # toner",
    "ru": "# кофе, обед, билет на поезд, # бутерброда, продукты, бензин, чай, # блокнота, ужин, билет на автобус, "
    "завтрак, торт, букет, кабель USB, канцтовары, # пива, хлеб, # билета в кино, учебник, # торта, лекарства, "
    "ноутбук, # салата, зарядник, принтер, # чая, дизель, # сока, наушники, картридж, мёд, # стула",
    "el": "# καφέδες, δείπνο, εισιτήριο τρένου, # σάντουιτς, χαρτί εκτυπωτή, πάρκινγκ, βενζίνη, # τετράδια, διόδια, "
    "εισιτήριο λεωφορείου, πρωινό, # διανυκτερεύσεις, λουλούδια, καλώδιο USB, γραμματόσημα, # μπύρες, στυλό, γλυκά, "
    "# βιβλία, λάμπα γραφείου, φάρμακα, τούρτα, # εισιτήρια σινεμά, ψώνια, # λάμπες, γραφική ύλη, # πίτσες, ακουστικά, "
    "φρούτα, # σαλάτες, μεσημεριανό, # μελάνια",
    "ja": "コーヒー#杯, ランチ, 電車の切符, サンドイッチ#つ, コピー用紙, 駐車場代, ガソリン, ノート#冊, "
    "タクシー代, バス代, 夕食, 宿泊#泊, 花束, USBケーブル, 切手, ビール#杯, ボールペン, 朝食, 本#冊, 電気スタンド, "
    "風邪薬, ケーキ, 映画の券#枚, 洗車, 充電器, 電球#個, 高速料金, お弁当#個, イヤホン, 文房具, 果物, トナー#本",
    "ko": "커피 #잔, 점심, 기차표, 샌드위치 #개, 복사 용지, 주차비, 휘발유, 노트 #권, 택시비, 버스표, 저녁, 숙박 #박, "
    "꽃다발, USB 케이블, 우표, 맥주 #병, 볼펜, 아침 식사, 책 #권, 책상 스탠드, 감기약, 케이크, 영화표 #장, 세차, "
    "충전기, 전구 #개, 통행료, 도시락 #개, 이어폰, 문구류, 과일, 토너 #개",
    "zh": "#杯咖啡, 午饭, 火车票, #个三明治, 打印纸, 停车费, 汽油, #本笔记本, 打车费, 公交卡, 晚饭, #晚住宿, 鲜花, "
    "数据线, 邮票, #瓶啤酒, 圆珠笔, 早餐, #本书, 台灯, 感冒药, 蛋糕, #张电影票, 洗车, 充电器, #个灯泡, 过路费, "
    "#份盒饭, 耳机, 办公用品, 水果, #盒墨粉",
}
# English items that are counted: one, and more than one.
COUNTED = split_words(
    "coffee/coffees, bus ticket/bus tickets, sandwich/sandwiches, printer cartridge/printer cartridges, "
    "notebook/notebooks, latte/lattes, bagel/bagels, train ticket/train tickets, beer/beers, pizza/pizzas, "
    "phone charger/phone chargers, light bulb/light bulbs, glass of wine/glasses of wine, "
    "museum ticket/museum tickets, "
    "book/books, box of paper/boxes of paper, keyboard/keyboards, muffin/muffins, USB cable/USB cables, "
    "cinema ticket/cinema tickets, bottle of water/bottles of water, desk lamp/desk lamps, day pass/day passes, "
    "taxi ride/taxi rides, battery/batteries, cappuccino/cappuccinos, stamp/stamps, ferry ticket/ferry tickets, "
    "umbrella/umbrellas, burger/burgers, headset/headsets, salad/salads, SIM card/SIM cards, "
    "birthday cake/birthday cakes, whiteboard marker/whiteboard markers, espresso/espressos, pen/pens, "
    "tram ticket/tram tickets, T-shirt/T-shirts, croissant/croissants, gift card/gift cards, mug/mugs, "
    "screwdriver/screwdrivers, folder/folders, room/rooms, webcam/webcams, pot of tea/pots of tea, parking permit/"
    "parking permits"
)
# English items that are not.
UNCOUNTED = split_words(
    "lunch, groceries, printer paper, parking, breakfast, diesel, dry cleaning, office chair, dinner, petrol, snacks, "
    "stationery, team lunch, car wash, flowers, cold medicine, drinks, bike hire, cleaning supplies, airport parking, "
    "client dinner, oil change, new tyres, paint, motorway toll, car rental, hotel room, haircut, fuel, phone repair, "
    "fruit for the meeting, tea, taxi to the airport, bus fare, catering, gas, three nights, a late dinner, software "
    "licence, cough syrup, garden tools, express shipping, one night, toner, room for one night, train fare, "
    "work shoes, printing"
)
NUMBER_WORDS = ("two", "three", "four")
AND = {
    "en": " and ",
    "de": " und ",
    "fr": " et ",
    "es": " y ",
    "it": " e ",
    "pt": " e ",
    "nl": " en ",
    "sv": " och ",
    "ru": " и ",
    "el": " και ",
    "ja": "と",
    "ko": " + ",
    "zh": "和",
}
PERSONS = {
    "en": "Anna, Tom, Priya, Sarah, James, Kate, Ben, Mike, Emma, Li Wei, Sofia, Ahmed, Laura, David, Nina, Chris, "
    "Fatima, Dan, Julia, Kenji, Rachel, Sam, Alice, Omar, Peter, Yuki, Marta, Steve, Lucy, Carlos, Jenny, Raj",
    "de": "Lena, Jonas, Frau Seidel, Lukas, Katrin, Herr Pohl, Stefan, Ute, Jürgen, Miriam, Felix, Heike, Tobias, "
    "Sabine, Uwe, Greta",
    "fr": "Camille, Julien, Amélie, Thomas, Léa, Hugo, Nathalie, Rémi, Sophie, Antoine, Chloé, Mathieu, Inès, Lucas, "
    "Valérie, Yann",
    "es": "Lucía, Pablo, Elena, Javier, Marta, Diego, Carmen, Raúl, Nuria, Sergio, Pilar, Iván, Beatriz, Hugo, Inés, "
    "Álvaro",
    "it": "Giulia, Luca, Chiara, Matteo, Francesca, Davide, Paola, Andrea, Silvia, Lorenzo, Elisa, Giorgio, Sara, "
    "Pietro, Marta, Enrico",
    "pt": "Mariana, João, Beatriz, Tiago, Camila, Rafael, Inês, Pedro, Letícia, Bruna, Diogo, Juliana, Gustavo, "
    "Renata, Caio, Sílvia",
    "nl": "Sanne, Daan, Lotte, Bram, Femke, Jeroen, Marieke, Thijs, Anouk, Sander, Esther, Wouter, Ilse, Ruben, "
    "Maartje, Koen",
    "sv": "Elin, Oskar, Maja, Johan, Sara, Emil, Karin, Gustav, Linnea, Anton, Ebba, Fredrik, Sofie, Axel, Åsa, Nils",
    "ru": "Аня, Сергей, Ольга, Дима, Марина, Павел, Катя, Игорь, Лена, Антон, Юля, Максим, Наташа, Олег, Ира, Костя",
    "el": "Μαρία, Ελένη, Σοφία, Κατερίνα, Άννα, Ειρήνη, Χριστίνα, Όλγα, Βασιλική, Αγγελική, Δέσποινα, Ιωάννα, "
    "Ευαγγελία, Αναστασία, Ζωή, Μαρίνα",
    "ja": "由美さん, 健さん, 美咲さん, 大輔さん, 直子さん, 翔太さん, 恵さん, 拓也さん, 部長, 彩さん, 誠さん, 真理さん, "
    "課長, 亮さん, 香織さん, 隆さん",
    "ko": "지훈 씨, 민지 씨, 서연 씨, 준호 씨, 수진 씨, 팀장님, 영희 씨, 현우 씨, 부장님, 지영 씨, 태민 씨, 은정 씨, "
    "과장님, 성민 씨, 혜진 씨, 동현 씨",
    "zh": "小张, 陈姐, 王经理, 刘洋, 赵敏, 老周, 孙丽, 林涛, 小吴, 财务部, 郑姐, 马超, 何经理, 小杨, 徐静, 冯总",
}
COMPANY = {
    "en": "with {p}, for the team, with {p} and {q}, for {p}'s birthday, for the office, with a client, "
    "for the workshop, for {p}, with my boss, for 4 people, with two colleagues",
    "de": "mit {p}, fürs Team, mit {p} und {q}, fürs Büro, für {p}",
    "fr": "avec {p}, pour l'équipe, avec {p} et {q}, pour le bureau, pour {p}",
    "es": "con {p}, para el equipo, con {p} y {q}, para la oficina, para {p}",
    "it": "con {p}, per il team, con {p} e {q}, per l'ufficio, per {p}",
    "pt": "com {p}, para a equipe, com {p} e {q}, para o escritório, para {p}",
    "nl": "met {p}, voor het team, met {p} en {q}, voor kantoor, voor {p}",
    "sv": "med {p}, till teamet, med {p} och {q}, till kontoret, till {p}",
    "ru": "для команды, для офиса, на двоих, для клиента",
    "el": "για την ομάδα, για το γραφείο, με πελάτη, για δύο",
    "ja": "{p}と, チーム用, 会社用, {p}の分",
    "ko": "{p}하고, 팀용, 사무실용, {p} 몫",
    "zh": "和{p}, 给团队, 办公室用, 给{p}",
}

# What people share: such items may be "with" somebody, the others only "for" somebody.
SHARED = {
    "en": "coffee|latte|sandwich|bagel|beer|pizza|wine|museum|muffin|cinema|taxi|cappuccino|ferry|burger|salad|cake|"
    "espresso|pots? of tea|croissant|lunch|breakfast|dinner|snack|drinks|catering|car rental",
    "de": "Kaffee|Mittag|Brezel|Bier|Früh|Pizz|Abend|kuchen|Kino",
    "fr": "café|déjeuner|sandwich|croissant|dîner|bière|gâteau|cinéma|salade",
    "es": "café|almuerzo|bocadillo|cena|cerveza|desayuno|tarta|cine|pizza",
    "it": "caffè|pranzo|panini|cena|birre|colazione|torta|cinema|pizze|gelato",
    "pt": "café|almoço|sanduíche|jantar|cerveja|bolo|cinema|pizza",
    "nl": "koffie|lunch|broodje|diner|biertje|ontbijt|taart|bioscoop|pizza",
    "sv": "kaffe|lunch|smörgås|middag|öl|frukost|tårta|bio|pizz",
    "ru": "кофе|обед|ужин|завтрак|торт|пива|кино|салат",
    "el": "καφέ|δείπνο|πρωινό|μπύρες|τούρτα|σινεμά|πίτσες|σαλάτες|μεσημεριανό",
    "ja": "コーヒー|ランチ|夕食|ビール|朝食|ケーキ|映画|弁当|サンド",
    "ko": "커피|점심|저녁|맥주|식사|케이크|영화|샌드",
    "zh": "咖啡|饭|啤酒|早餐|电影|蛋糕|三明治",
}
WITH = {"en": "with", "de": "mit", "fr": "avec", "es": "con", "it": "con", "pt": "com", "nl": "met", "sv": "med"}
WITH |= {"ru": "на двоих", "el": "με", "ja": "{p}と", "ko": "{p}하고", "zh": "和"}


def of_pool(words, pool: str) -> list[str]:
    """The words of a list that a pool may use: of every eight, the fourth and the seventh are of unseen pools."""
    places = {"validation_unseen": {3}, "test_unseen": {6}}.get(pool, {0, 1, 2, 4, 5, 7})
    return [word for place, word in enumerate(words) if place % 8 in places]


def english_item(rng: Random, pool: str) -> str:
    """One English item, such as "2 coffees", "a bus ticket" or "printer paper"."""
    if rng.random() < 0.4:
        return rng.choice(of_pool(UNCOUNTED, pool))
    one, more = rng.choice(of_pool(COUNTED, pool)).split("/")
    draw = rng.random()
    if draw < 0.35:
        return one
    if draw < 0.45:
        return ("an " if one[0] in "aeiou" else "a ") + one
    if draw < 0.55:
        return f"{rng.choice(NUMBER_WORDS)} {more}"
    if draw < 0.62:
        return f"{rng.randint(2, 6)}x {one}" if rng.random() < 0.5 else f"{rng.randint(2, 6)} x {one}"
    return f"{rng.choice((2, 2, 3, 4, 5, 6, 10, 12))} {more}"


def item(rng: Random, language: str, pool: str) -> str:
    """What was bought: one item, now and then two."""

    def one() -> str:
        if language == "en":
            return english_item(rng, pool)
        return rng.choice(of_pool(split_words(ITEMS[language]), pool)).replace("#", str(rng.randint(2, 4)))

    first = one()
    second = one() if rng.random() < 0.15 else first
    return first if second == first else first + AND[language] + second


def fill(rng: Random, pattern: str, language: str, pool: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Words for the slots i, w, p and q of a pattern, and the items and persons among them."""
    if not re.search(r"\{[ipw]\}", pattern):
        return {}, ()
    persons = rng.sample(of_pool(split_words(PERSONS[language]), pool), 2)
    words = dict(zip("pq", persons, strict=True))
    words["i"] = item(rng, language, pool)
    company = [
        text
        for text in split_words(COMPANY[language])
        if not text.startswith(WITH[language]) or re.search(SHARED[language], words["i"])
    ]
    words["w"] = re.sub(r"\{([pq])\}", lambda match: words[match[1]], rng.choice(company))
    return words, tuple(words[key] for key in "ip" if f"{{{key}}}" in pattern)
