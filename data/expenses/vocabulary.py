"""Words that merchants are made of, by language.

`WORDS` holds distinctive words (names, places, things); each belongs to exactly one pool (train,
validation_unseen or test_unseen, see `prepare.pool_of`). `TYPES` holds generic words for a shop, shared
by all pools. `SHAPES` says how a merchant is put together: W, V and U are distinctive words, T is a type.
"""


def split_words(text: str) -> list[str]:
    """Splits a comma-separated list, keeping the order and dropping repeats."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


WORDS = {
    "en": split_words(
        "Abbott, Acorn, Alder, Anchor, Archer, Ashford, Aster, Badger, Bailey, Barker, Barlow, Beacon, "
        "Bennett, Birch, Blackwood, Bluebird, Bramble, Brighton, Brook, Cardinal, Carver, Cedar, Chandler, "
        "Chester, Clover, Copper, Coral, Cotton, Cricket, Crown, Daisy, Dalton, Denver, Dolphin, Drake, "
        "Eagle, Eastgate, Elm, Ember, Emerald, Fairview, Falcon, Fern, Finch, Fletcher, Foster, Fox, "
        "Franklin, Garnet, Ginger, Goldfinch, Granite, Greenfield, Hadley, Harbor, Harper, Hawthorn, "
        "Hazel, "
        "Heron, Hickory, Highland, Holly, Hudson, Hunter, Indigo, Iron, Ivory, Ivy, Jasper, Juniper, "
        "Kestrel, Kingston, Lantern, Larkin, Laurel, Lavender, Lighthouse, Lilac, Linden, Lionheart, "
        "Magnolia, Maple, Marigold, Marlow, Mason, Meadow, Mercer, Midtown, Milton, Monroe, Moonlight, "
        "Morgan, Mulberry, Newport, Nightingale, Northside, Nutmeg, Oakley, Olive, Orchard, Oxford, "
        "Parker, "
        "Pebble, Pelican, Pepper, Pickle, Pinewood, Poppy, Porter, Quarry, Quill, Rabbit, Raven, Redwood, "
        "Ridge, River, Robin, Rosewood, Rusty, Saddle, Saffron, Sage, Sawyer, Seaside, Shepherd, Silver, "
        "Sparrow, Spruce, Stanton, Sterling, Stonebridge, Summit, Sunny, Swan, Sycamore, Tanner, Thatcher, "
        "Thistle, Thornton, Tucker, Turner, Valley, Velvet, Violet, Walnut, Warren, Waverly, Weaver, "
        "Westfield, Wheeler, Whistler, Wildflower, Willow, Winston, Woodland, Wren, Yardley, Yellowstone, "
        "Zephyr"
    ),
    "de": split_words(
        "Adler, Ahorn, Albrecht, Bauer, Becker, Bergmann, Birke, Brandt, Bremen, Brunnen, Dietrich, "
        "Drossel, Eiche, Engel, Falke, Fischer, Forelle, Frankfurt, Friedrich, Fuchs, Gärtner, Goldene, "
        "Grüner, Hahn, Hartmann, Heidelberg, Hirsch, Hoffmann, Holzmann, Huber, Jäger, Kaiser, Kastanie, "
        "Keller, Kirsche, Klein, Koch, Köhler, König, Krämer, Kranich, Krüger, Lange, Lehmann, Leipzig, "
        "Lerche, Linde, Löwe, Maier, Möller, Mühlbach, Müller, Neumann, Nordlicht, Pfeiffer, Rathaus, "
        "Richter, Rosen, Rössl, Sauer, Schäfer, Schiller, Schmidt, Schneider, Schubert, Schulze, Schwarz, "
        "Sonnenhof, Stein, Storch, Talblick, Tanne, Ulmer, Vogel, Wagner, Waldmann, Weber, Winkler, Wolff, "
        "Ziegler, Zimmermann"
    ),
    "fr": split_words(
        "Abeille, Alouette, Amandier, Ancre, Beaumont, Bellevue, Bernard, Bertrand, Blanchard, Bordeaux, "
        "Cerise, Chabrol, Charbonnier, Chevalier, Cigale, Cigogne, Clémence, Colombe, Coquelicot, "
        "Delacroix, Dubois, Duchamp, Dupont, Étoile, Fontaine, Fournier, Garance, Gaspard, Girard, "
        "Hirondelle, Horloge, Jasmin, Lafayette, Lambert, Lavande, Leclair, Lefèvre, Lilas, Lumière, Lyon, "
        "Marchand, Margaux, Martin, Mercier, Mésange, Mimosa, Mirabelle, Montmartre, Moreau, Moulin, "
        "Muguet, Nantes, Noisette, Olivier, Perrin, Petit, Pivoine, Rivoli, Rousseau, Roussel, "
        "Sainte-Anne, "
        "Séverine, Soleil, Tilleul, Toulouse, Tournesol, Trois Rivières, Vallon, Verger, Vigneron, "
        "Violette, Voltaire"
    ),
    "es": split_words(
        "Acacia, Aguilar, Alameda, Alhambra, Almendro, Alonso, Azahar, Azucena, Benítez, Bilbao, "
        "Buenavista, Caballero, Cabrera, Campos, Cantera, Carmona, Castaño, Castillo, Cigüeña, Clavel, "
        "Colibrí, Córdoba, Delgado, Domínguez, Encina, Escobar, Esperanza, Estrella, Fernández, Fuente, "
        "Gallego, García, Girasol, Golondrina, Gómez, Granada, Herrera, Hidalgo, Iglesias, Jacaranda, "
        "Jiménez, Laguna, Limonero, Lozano, Lucero, Luna, Málaga, Manzano, Mariposa, Márquez, Mirador, "
        "Molino, Montero, Naranjo, Navarro, Núñez, Ortega, Palmera, Paloma, Peña, Pescador, Puebla, "
        "Quintana, Ramírez, Ribera, Romero, Rosales, Salamanca, Sandoval, Serrano, Toledo, Triana, Vargas, "
        "Zaragoza"
    ),
    "it": split_words(
        "Airone, Allegri, Amalfi, Aquila, Arancio, Barbieri, Bellini, Benedetti, Bianchi, Brera, Bruno, "
        "Cannella, Capri, Caruso, Castello, Cedro, Ciliegio, Colombo, Conti, Cortina, De Luca, Delfino, "
        "Esposito, Fabbri, Farfalla, Ferrara, Fiorentino, Fontana, Gallo, Gatti, Ginestra, Girasole, "
        "Grillo, Leone, Limone, Lombardi, Luna, Mancini, Marconi, Mariani, Martini, Melograno, Moretti, "
        "Navona, Oliva, Orlandi, Orso, Pavone, Pellegrini, Portofino, Quercia, Ricci, Rinaldi, Romano, "
        "Rondine, Rosmarino, Rossi, Sorrento, Stella, Taormina, Testa, Tiziano, Trastevere, Vecchio, "
        "Verdi, "
        "Villani, Zanetti"
    ),
    "pt": split_words(
        "Almeida, Andorinha, Araújo, Azulejo, Barbosa, Beija-Flor, Bonfim, Cajueiro, Cardoso, Carvalho, "
        "Coelho, Copacabana, Cravo, Curitiba, Estrela, Fazenda, Ferreira, Figueira, Fonseca, Gaivota, "
        "Goiabeira, Guimarães, Ipanema, Ipê, Jangada, Lapa, Laranjeira, Leblon, Lima, Macedo, Magalhães, "
        "Mangueira, Martins, Mineiro, Monteiro, Nogueira, Oliveira, Paineira, Palmares, Pereira, Pinheiro, "
        "Pitanga, Rocha, Sabiá, Salvador, Santana, Silveira, Sousa, Tavares, Teixeira, Tucano, Vieira, "
        "Vila "
        "Nova, Xavier"
    ),
    "nl": split_words(
        "Aalbers, Bakker, Beukenhof, Boerderij, Bosch, Brouwer, Buitenhof, De Boer, De Graaf, De Haan, De "
        "Wit, Delft, Dijkstra, Duinzicht, Eekhoorn, Gouden, Groenewoud, Haarlem, Hendriks, Hofman, "
        "Ijsvogel, Jansen, Kastanje, Kikker, Kok, Korenbloem, Kuiper, Leeuwerik, Linden, Maas, Meijer, "
        "Merel, Molenaar, Mulder, Ooievaar, Peters, Postma, Prins, Reiger, Schipper, Smits, Tulp, Utrecht, "
        "Van Dam, Van Dijk, Van Leeuwen, Veldhuis, Vermeer, Visser, Vlinder, Vos, Willems, Zonnebloem, "
        "Zwaan"
    ),
    "sv": split_words(
        "Andersson, Backa, Berglund, Björken, Blåsippan, Dahlberg, Ekström, Eriksson, Fjällräven, "
        "Forsberg, "
        "Göteborg, Granen, Gustafsson, Gyllene, Hallon, Hammar, Hedlund, Holmgren, Hägern, Jansson, "
        "Karlsson, Klövern, Kungsholmen, Lärkan, Liljan, Lindqvist, Ljungberg, Lundgren, Malmö, Måsen, "
        "Nilsson, Norrland, Nyström, Olsson, Persson, Rönnen, Sandberg, Sjöberg, Skogsbacken, Smultron, "
        "Stenberg, Strömmen, Svalan, Södermalm, Tranan, Uggla, Uppsala, Vasa, Wallin, Åkesson, Älgen, Öberg"
    ),
    "pl": split_words(
        "Adamski, Bażant, Bieszczady, Bocian, Brzozowa, Chmielna, Czarny, Dąbrowski, Dębowa, Gdańsk, "
        "Górski, Grabowski, Jabłonka, Jankowski, Jaskółka, Jastrząb, Kalina, Kamińska, Kasztan, Kowalczyk, "
        "Kowalski, Kozłowski, Krakus, Krawczyk, Kwiatkowska, Lewandowski, Lipowa, Łoś, Malina, Mazurek, "
        "Michalak, Modrzew, Nowak, Orzeł, Pawlak, Piotrowski, Poziomka, Rybak, Sobótka, Sokołowski, Sosna, "
        "Szymański, Toruń, Wierzba, Wilczek, Wiśniewski, Wójcik, Wrocław, Zakopane, Zając, Zieliński, Żubr"
    ),
    "cs": split_words(
        "Beneš, Brno, Bříza, Čapek, Čermák, Černý, Doležal, Dvořák, Fiala, Havránek, Holub, Horák, "
        "Hradčany, Jelínek, Kadlec, Karlín, Kolář, Kovář, Králík, Kratochvíl, Krejčí, Kučera, Labuť, Lípa, "
        "Marek, Modrá, Moravec, Němec, Novák, Novotný, Olomouc, Pivoňka, Pokorný, Pospíšil, Procházka, "
        "Růžička, Sedláček, Skřivan, Slavík, Smrček, Sokol, Svoboda, Šípek, Šťastný, Urban, Veselý, "
        "Vinohrady, Vlček, Vltava, Zelený, Zeman, Žižkov"
    ),
    "tr": split_words(
        "Akdeniz, Aksoy, Anadolu, Arslan, Aydın, Bahar, Balıkçı, Beyaz, Boğaziçi, Bozkurt, Bursa, Çelik, "
        "Çınar, Demir, Doğan, Erdem, Galata, Gökçe, Gül, Güneş, Hanımeli, İncir, Kadıköy, Kapadokya, Kara, "
        "Kardeşler, Kaya, Kılıç, Kırlangıç, Koç, Lale, Leylak, Martı, Mavi, Menekşe, Nar, Öztürk, Papatya, "
        "Şahin, Selvi, Şimşek, Sultan, Taş, Tekin, Toros, Turna, Uludağ, Ünal, Yakamoz, Yalçın, Yıldız, "
        "Zeytin"
    ),
    "ru": split_words(
        "Аврора, Айсберг, Акация, Алёнка, Андреев, Арбат, Аист, Байкал, Берёзка, Богатырь, Василёк, "
        "Виктория, Волга, Восход, Гагарин, Горизонт, Гранат, Дельфин, Дубрава, Ермак, Жар-птица, Журавль, "
        "Заря, Звезда, Ивушка, Ирбис, Калинка, Каскад, Кедр, Ключ, Ковалёв, Колосок, Кристалл, Кузнецов, "
        "Ласточка, Лотос, Люкс, Магнолия, Маяк, Медведь, Мельница, Метелица, Морозко, Невский, Океан, "
        "Орион, Парус, Петров, Подсолнух, Радуга, Рассвет, Ромашка, Рябина, Самовар, Север, Сирень, "
        "Смирнов, Сокол, Соловей, Соколов, Тайга, Тройка, Урал, Факел, Фортуна, Хуторок, Чайка, Эдельвейс, "
        "Юность, Яблоня"
    ),
    "el": split_words(
        "Αίολος, Ακρόπολη, Αλκυόνη, Αμυγδαλιά, Απόλλων, Αργώ, Αρχοντικό, Αστέρι, Αύρα, Βασιλικός, "
        "Γεωργίου, "
        "Γλάρος, Δάφνη, Δελφίνι, Δημητρίου, Δρυάδα, Ελαία, Ερμής, Ζέφυρος, Ηλιάδης, Θάλασσα, Θεοδώρου, "
        "Ιθάκη, Ιωάννου, Καλλιόπη, Καραβέλα, Κοχύλι, Κυκλάδες, Κύμα, Λεμονιά, Λευκός, Λωτός, Μακρής, "
        "Μέλισσα, Μύλος, Νικολάου, Ολυμπία, Ορφέας, Παπαδόπουλος, Πλάτανος, Ποσειδών, Ροδιά, Σαντορίνη, "
        "Σταθμός, Τριανταφυλλιά, Φάρος, Φεγγάρι, Χελιδόνι, Χρυσός, Ωκεανός"
    ),
    "he": split_words(
        "אביב, אדום, אורן, אלון, ארז, אשכול, ברוש, ברק, גולן, גורדון, גליל, גפן, דולב, דקל, הדס, הדר, "
        "הזית, "
        "הירקון, הכרמל, זהב, חרמון, יהלום, יונה, ים, כהן, כוכב, כנרת, לביא, לוי, מזרחי, מעיין, נופר, נחל, "
        "סביון, ספיר, ענבר, פרץ, צבר, רותם, רימון, שקד, שקמה, שרון, תבור, תמר, תפוז"
    ),
    "ar": split_words(
        "الأمل, الأمير, الأندلس, الأهرام, البحر, البدر, البستان, الجزيرة, الجوهرة, الحديقة, الخليج, "
        "الديوان, الربيع, الروضة, الريحان, الزهراء, الزيتون, السلام, السندباد, الشرق, الشروق, الصفا, "
        "العاصمة, العائلة, العنبر, الفردوس, الفيروز, القصر, القمر, الكرم, الكوثر, اللؤلؤة, المدينة, "
        "المرجان, الميدان, النخيل, النسيم, النور, النيل, الهدى, الواحة, الورد, الياسمين, بغداد, دمشق, "
        "سمير, "
        "شهرزاد, غرناطة, فاروق, قرطاج, كنوز, لبنان, منصور, نفرتيتي"
    ),
    "hi": split_words(
        "अमृत, अन्नपूर्णा, अशोक, आनंद, आकाश, उदय, कमल, कावेरी, किसान, कृष्णा, गंगा, गणेश, गुप्ता, गुलमोहर, "
        "चंदन, चंद्रिका, जगदंबा, जयपुर, तुलसी, दिल्ली, दीपक, नटराज, नवरंग, नीलकमल, पंजाब, प्रकाश, प्रिया, "
        "बजरंग, बनारस, भारत, मधुबन, महालक्ष्मी, मिलन, मोहन, यमुना, रजत, राजधानी, राधिका, रामदेव, लखनऊ, "
        "विजय, वृंदावन, शर्मा, शांति, श्रीनाथ, संगम, सागर, सूर्या, स्वागत, हिमालय"
    ),
    "th": split_words(
        "กรุงทอง, กุหลาบ, แก้วตา, ขวัญใจ, คชสาร, จันทรา, จำปี, ชบา, ชัยมงคล, เชียงใหม่, ดวงดาว, ดอกคูน, "
        "ต้นไม้, ทองคำ, ทะเลใส, ธาราทิพย์, นกยูง, นครชัย, นางนวล, บัวหลวง, บางกอก, บ้านสวน, ใบเตย, ปลาทอง, "
        "เพชรบุรี, พลอยงาม, ฟ้าใส, ภูผา, มะลิ, มิตรภาพ, รวงข้าว, รุ่งเรือง, ลำดวน, วังน้ำ, ศรีไทย, "
        "สมบูรณ์, "
        "สยาม, สายรุ้ง, สุขใจ, แสงจันทร์, อรุณ, อยุธยา, เอราวัณ"
    ),
    "ja": split_words(
        "青山, 赤坂, 浅草, あさひ, 朝日屋, 石川, 稲荷, 上野, 梅田, 大久保, 岡本, かえで, 鎌倉, 川崎, "
        "菊池, 北野, 木村, 銀座, 黒田, こまち, 桜井, さくら, 佐藤, "
        "四季, 渋谷, 白樺, 新宿, 鈴木, すみれ, 千鳥, 大黒, 高橋, 竹中, 田中, たんぽぽ, 月見, つばめ, "
        "鶴亀, 富山, 長崎, 中村, なごみ, 西川, 萩原, 花園, 早川, "
        "ひまわり, 広瀬, 藤本, ほたる, 松葉, まるや, 三浦, みどり, 宮本, 森田, 山本, やまびこ, 吉野, 若松"
    ),
    "ko": split_words(
        "가온, 강남, 개나리, 경복, 고려, 광장, 금강, 나무, 남산, 누리, 다온, 달빛, 대한, 도토리, 동백, "
        "두루미, 들꽃, 라온, 마루, 명동, 모란, 무지개, 미소, "
        "민들레, 바다, 백두, 별빛, 보름달, 부산, 사랑방, 산들, 새벽, 서울, 소나무, 솔잎, 수원, 시골집, "
        "신촌, 아리랑, 아침, 여름, 연꽃, 예솔, 우리, 은하, 이슬, "
        "장미, 제주, 종로, 진달래, 청솔, 초록, 하늘, 한강, 한솔, 해바라기, 행복, 홍대"
    ),
    "zh": split_words(
        "白云, 百合, 宝山, 碧海, 长安, 长江, 长城, 翠竹, 大唐, 东方, 东湖, 凤凰, 福满, 富贵, 光明, 桂花, "
        "和平, 黑土, 红梅, 红叶, 湖滨, 华夏, 黄河, 吉祥, "
        "江南, 金龙, 金沙, 锦绣, 静安, 九州, 康乐, 昆仑, 兰亭, 老王, 蓝天, 丽都, 绿洲, 梅园, 牡丹, 南山, "
        "秦淮, 青松, 清泉, 三江, 盛世, 蜀香, 松鹤, 泰山, "
        "天府, 同福, 万家, 西湖, 喜乐, 湘江, 小李, 新月, 星河, 杏花, 雅居, 燕京, 一品, 永安, 悦来, 云海, "
        "珍珠, 紫荆"
    ),
    "ka": split_words("ალაზანი, არაგვი, ბაზალეთი, იბერია, კოლხეთი, მტკვარი, რუსთაველი, სვანეთი, შატილი, ჯვარი"),
    "hy": split_words("Արարատ, Արագած, Գառնի, Երևան, Կիլիկիա, Մասիս, Նարեկ, Նոյ, Սևան, Տաթև"),
    "bn": split_words("আলো, কর্ণফুলী, কুসুম, ঢাকা, নবান্ন, পদ্মা, বনানী, মেঘনা, শাপলা, সোনালী"),
    "am": split_words("ሀበሻ, ላሊበላ, ሐረር, ሰላም, ሸገር, ባሌ, አክሱም, አዋሽ, ዓባይ, ጣና"),
    "ta": split_words("அன்பு, அருவி, காவேரி, குமரன், செல்வி, தமிழ், தாமரை, மல்லிகை, முல்லை, யாழ்"),
    "km": split_words("អង្គរ, ចម្ប៉ា, បាយ័ន, បុប្ផា, ផ្កាឈូក, ភ្នំពេញ, មេគង្គ, រំដួល, សុរិយា, សៀមរាប"),
    "lo": split_words("ຈຳປາ, ດາວເຮືອງ, ທ່າແຂກ, ນ້ຳງື່ມ, ປາກເຊ, ພູສີ, ລາວທອງ, ວຽງຈັນ, ສະຫວັນ, ຫຼວງພະບາງ"),
}

TYPES = {
    "en": split_words(
        "Bakery, Books, Café, Cafe, Cleaners, Coffee, Coffee House, Deli, Diner, Drugstore, Electronics, "
        "Florist, Garage, Grill, Grocery, Hardware, Hotel, Inn, Kitchen, Laundry, Market, Motel, Noodle "
        "Bar, Office Supplies, Parking, Pharmacy, Pizza, Print Shop, Pub, Rail, Restaurant, Sandwich Co., "
        "Stationers, Steakhouse, Supplies Ltd, Taxi, Tavern, Tea Room, Tools, Travel, Wine Bar, Dry "
        "Cleaning, Auto Repair, Fish & Chips, Bike Rental, Garden Centre, Camera Store"
    ),
    "de": split_words(
        "Apotheke, Bäckerei, Baumarkt, Biergarten, Blumenhaus, Buchhandlung, Café, Drogerie, Eisdiele, "
        "Gasthof, Gasthaus, Hotel, Imbiss, Konditorei, Metzgerei, Reinigung, Restaurant, Schreibwaren, "
        "Tankstelle, Weinstube, Werkstatt"
    ),
    "fr": split_words(
        "Auberge, Boucherie, Boulangerie, Brasserie, Bistrot, Café, Crêperie, Épicerie, Fleuriste, "
        "Fromagerie, Garage, Hôtel, Librairie, Papeterie, Pâtisserie, Pharmacie, Pressing, Restaurant, "
        "Taxi, Traiteur"
    ),
    "es": split_words(
        "Bar, Cafetería, Carnicería, Farmacia, Ferretería, Floristería, Frutería, Gasolinera, Heladería, "
        "Hostal, Hotel, Librería, Mesón, Panadería, Papelería, Pastelería, Restaurante, Taberna, Taller, "
        "Taquería, Zapatería"
    ),
    "it": split_words(
        "Albergo, Bar, Caffè, Cartoleria, Enoteca, Farmacia, Ferramenta, Forno, Gelateria, Libreria, "
        "Lavanderia, Osteria, Panificio, Pasticceria, Pizzeria, Ristorante, Salumeria, Trattoria"
    ),
    "pt": split_words(
        "Açougue, Bar, Cafeteria, Churrascaria, Confeitaria, Farmácia, Floricultura, Hotel, Lanchonete, "
        "Lavanderia, Livraria, Mercado, Oficina, Padaria, Papelaria, Pastelaria, Pousada, Restaurante, "
        "Sorveteria"
    ),
    "nl": split_words(
        "Apotheek, Bakkerij, Bloemen, Boekhandel, Café, Drogist, Eetcafé, Fietsen, Garage, Grand Café, "
        "Hotel, Kaashandel, Restaurant, Slagerij, Snackbar, Supermarkt, Viswinkel"
    ),
    "sv": split_words(
        "Apotek, Bageri, Blommor, Bokhandel, Café, Cykel, Färghandel, Hotell, Järnhandel, Kiosk, "
        "Konditori, "
        "Krog, Kvarterskrog, Pizzeria, Restaurang, Taxi, Värdshus"
    ),
    "pl": split_words(
        "Apteka, Bar Mleczny, Cukiernia, Delikatesy, Drogeria, Hotel, Kawiarnia, Karczma, Księgarnia, "
        "Kwiaciarnia, Lodziarnia, Piekarnia, Pizzeria, Pralnia, Restauracja, Sklep, Warsztat"
    ),
    "cs": split_words(
        "Cukrárna, Drogerie, Hospoda, Hotel, Kavárna, Knihkupectví, Květiny, Lékárna, Papírnictví, "
        "Pekárna, "
        "Penzion, Pivnice, Potraviny, Restaurace, Řeznictví, Vinárna"
    ),
    "tr": split_words(
        "Berber, Büfe, Çiçekçilik, Eczanesi, Fırını, Kafe, Kahvesi, Kebap, Kırtasiye, Kitabevi, Köfte, "
        "Lokantası, Market, Otel, Pastanesi, Pide Salonu, Restoran, Taksi"
    ),
    "ru": split_words(
        "Аптека, Бар, Булочная, Гостиница, Кафе, Книги, Кондитерская, Кофейня, Магазин, Пекарня, Пиццерия, "
        "Ресторан, Столовая, Такси, Цветы, Чайная, Автосервис"
    ),
    "el": split_words(
        "Αρτοποιείο, Βιβλιοπωλείο, Εστιατόριο, Ζαχαροπλαστείο, Καφέ, Καφενείο, Κρεοπωλείο, Μεζεδοπωλείο, "
        "Ξενοδοχείο, Ουζερί, Παντοπωλείο, Πιτσαρία, Ταβέρνα, Φαρμακείο, Φούρνος"
    ),
    "he": split_words(
        "בית קפה, חומוס, מאפיית, מלון, מסעדת, מכולת, מרכול, סופר, פיצה, פלאפל, קפה, קונדיטוריה, בית מרקחת"
    ),
    "ar": split_words("أسواق, بقالة, حلويات, صيدلية, فندق, كافيه, مخبز, مطعم, مغسلة, مقهى, مكتبة, ورشة, محل"),
    "hi": split_words(
        "कैफ़े, किराना स्टोर, ज्वेलर्स, टी स्टॉल, ढाबा, बुक डिपो, भोजनालय, मिष्ठान भंडार, मेडिकल, रेस्टोरेंट, स्टोर्स, स्वीट्स, होटल"
    ),
    "th": split_words("กาแฟ, ก๋วยเตี๋ยว, ข้าวแกง, คาเฟ่, เบเกอรี่, ร้านขนม, ร้านยา, ร้านหนังสือ, ร้านอาหาร, โรงแรม, ครัว, ซักรีด"),
    "ja": split_words(
        "カフェ, クリニック, コーヒー, 酒店, 書店, 食堂, 寿司, そば, タクシー, とんかつ, パン工房, "
        "ベーカリー, ホテル, 薬局, ラーメン, 旅館, 居酒屋, 文具店, うどん, "
        "珈琲店"
    ),
    "ko": split_words(
        "갈비, 국밥, 김밥, 꽃집, 냉면, 마트, 문구, 베이커리, 분식, 서점, 세탁소, 식당, 약국, 주유소, "
        "치킨, 카페, 커피, 호텔, 한의원"
    ),
    "zh": split_words(
        "包子铺, 宾馆, 餐厅, 茶馆, 超市, 饭店, 火锅, 酒店, 咖啡馆, 面馆, 书店, 水果店, 文具店, 小吃店, "
        "药房, 烘焙坊, 洗衣店, 烤鸭店"
    ),
    "ka": split_words("კაფე, რესტორანი, სასტუმრო, აფთიაქი"),
    "hy": split_words("Սրճարան, Ռեստորան, Հյուրանոց, Դեղատուն"),
    "bn": split_words("রেস্তোরাঁ, ক্যাফে, ফার্মেসি, হোটেল"),
    "am": split_words("ካፌ, ሆቴል, ምግብ ቤት, ፋርማሲ"),
    "ta": split_words("உணவகம், கடை, ஹோட்டல், மருந்தகம்"),
    "km": split_words("ហាងកាហ្វេ, ភោជនីយដ្ឋាន, សណ្ឋាគារ"),
    "lo": split_words("ຮ້ານອາຫານ, ໂຮງແຮມ, ຮ້ານກາເຟ"),
}

SHAPES = {
    "en": split_words(
        "W T, W T, W V, W & V T, W V T, The W T, The W & V, W's T, W's, W & V, W & Sons T, W Street T, Old W T, "
        "W Brothers, T at W V, W-V T, W T No. 5, W V & U T, Little W T, W T of V, W and V T, W T No. 12, T "
        "24 W, 7 W T, W Hill T & Co."
    ),
    "de": split_words(
        "T W, T W, W T, T W & V, T am W, T Zum W, Zum W, T W & Söhne, W-V T, Alte T W, W GmbH, T W GmbH, W "
        "& V KG, T W V"
    ),
    "fr": split_words(
        "T W, T W, T du W, Le W, La W, Chez W, T W & V, T W et Fils, Au W V, Le Petit W, L'atelier W, T de "
        "la W V, T W V"
    ),
    "es": split_words(
        "T W, T W, T El W, T La W, Casa W, El W, T W y V, T Hermanos W, La W de V, T Los W, T W V, Nueva T W"
    ),
    "it": split_words(
        "T W, T W, T da W, T Al W, Da W, T W & V, T La W, Antica T W, Il W, L'W, T W dal 1957, T del W V, Fratelli W"
    ),
    "pt": split_words(
        "T W, T W, T do W, T da W, Casa W, T W & V, T W e V, Bar do W, T São W, Empório W, T Irmãos W, T W V Ltda"
    ),
    "nl": split_words("T W, T W, T De W, W T, De W, 't W, T W & Zn., Het W, T W & V, W en V, T W B.V., T W-V"),
    "sv": split_words("T W, W T, W T, W & V, Ws T, Gamla W T, W V T, W & Söner T, T W AB, W T 1902, T W & V"),
    "pl": split_words("T W, T W, T Pod W, T U W, T W i V, W T, T W sp. z o.o., T W & V, Stara T W, T W V"),
    "cs": split_words("T W, T W, U W, T U W, T W a V, T Na W, T W s.r.o., W & V, Stará T W, T W V"),
    "tr": split_words("W T, W T, W V T, T W, Tarihi W T, W & V T, Meşhur W T, W Usta, Hacı W T, W Ticaret"),
    "ru": split_words("T W, T W, T «W», W, ООО W, T W и V, W Маркет, T у W, T W-V, W V, ИП W"),
    "el": split_words("T W, T W, W, T ο W, T W & V, W T, Το W, T W V, Αφοί W"),
    "he": split_words("T W, T W, W, T W ו-V, T W V, קבוצת W, T של W"),
    "ar": split_words("T W, T W, T W الجديد, T W و V, شركة W, T بيت W, T W V"),
    "hi": split_words("W T, W T, W V T, न्यू W T, श्री W T, W एंड संस, W T"),
    "th": split_words("TW, T W, W T, WT, T W V, บ้าน W, TW V"),
    "ja": split_words("WT, TW, W T, T W, W本店, W堂, WT 駅前店, T W V店, WマートV店, WV T"),
    "ko": split_words("WT, W T, T W, W V T, W T V점, WT V점, 원조 W T, W상회"),
    "zh": split_words("WT, WVT, WT, 老W T, WT（V店）, WTV店, W商行, 新WT, W V T"),
    "ka": split_words("T W, W, T W V"),
    "hy": split_words("T W, W T, W"),
    "bn": split_words("W T, W, W V T"),
    "am": split_words("W T, W V T"),
    "ta": split_words("W T, W V T"),
    "km": split_words("T W, TW"),
    "lo": split_words("T W, TW"),
}

INITIALS = "BCDFGHKLMNPRSTVWZ"
ONSETS = split_words(
    "B, Br, C, Cl, D, Dr, F, Fl, G, Gr, H, J, K, Kl, L, M, N, P, Pr, Qu, R, S, Sk, St, T, Tr, V, W, X, Y, Z"
)
VOWELS = split_words("a, e, i, o, u, ea, io, oo, y")
CODAS = split_words("l, n, r, s, t, x, v, m, nd, rk, lt, zz, ck, d, p")
ENDINGS = split_words("a, ia, o, on, ex, ify, ly, io, ora, is, ium, us, ara, ent, oo, eo, et, ana")
BRAND_TAILS = split_words(
    ", Mart, Foods, Air, Telecom, Mobile, Fuel, Energy, Cloud, Software, Rent-a-Car, Logistics, "
    "Fitness, Labs, Group, Sports, Home, Pharma, Bikes, Studio, Express, Online, Optik, Media, 24, "
    "Bank, Cinemas, Airlines, Cargo, Toys"
) + ["", "", ""]
