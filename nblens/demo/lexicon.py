"""The words and sentence frames of the built-in model's corpus: tables, no logic."""


def _words(text: str) -> list[str]:
    return text.split()


# country, capital, second city, language, currency
COUNTRIES = [
    tuple(line.split())
    for line in """
France Paris Lyon French euro
Germany Berlin Hamburg German euro
Italy Rome Milan Italian euro
Spain Madrid Seville Spanish euro
Portugal Lisbon Porto Portuguese euro
Greece Athens Patras Greek euro
Finland Helsinki Tampere Finnish euro
Estonia Tallinn Tartu Estonian euro
Latvia Riga Liepaja Latvian euro
Lithuania Vilnius Kaunas Lithuanian euro
Slovakia Bratislava Kosice Slovak euro
Austria Vienna Graz German euro
Holland Amsterdam Rotterdam Dutch euro
Poland Warsaw Krakow Polish zloty
Hungary Budapest Debrecen Hungarian forint
Czechia Prague Brno Czech koruna
Romania Bucharest Cluj Romanian leu
Serbia Belgrade Subotica Serbian dinar
Albania Tirana Durres Albanian lek
Denmark Copenhagen Aarhus Danish krone
Norway Oslo Bergen Norwegian krone
Sweden Stockholm Uppsala Swedish krona
Iceland Reykjavik Akureyri Icelandic krona
Russia Moscow Kazan Russian ruble
Ukraine Kyiv Odesa Ukrainian hryvnia
Turkey Ankara Istanbul Turkish lira
Georgia Tbilisi Batumi Georgian lari
Armenia Yerevan Gyumri Armenian dram
Iran Tehran Shiraz Persian rial
Iraq Baghdad Basra Arabic dinar
Egypt Cairo Alexandria Arabic pound
Morocco Rabat Casablanca Arabic dirham
Kenya Nairobi Mombasa Swahili shilling
Nigeria Abuja Lagos English naira
Ghana Accra Kumasi English cedi
Japan Tokyo Osaka Japanese yen
China Beijing Shanghai Chinese yuan
Korea Seoul Busan Korean won
Vietnam Hanoi Danang Vietnamese dong
Thailand Bangkok Phuket Thai baht
Indonesia Jakarta Bandung Indonesian rupiah
India Delhi Mumbai Hindi rupee
Nepal Kathmandu Pokhara Nepali rupee
Pakistan Islamabad Lahore Urdu rupee
Brazil Brasilia Recife Portuguese real
Chile Santiago Valparaiso Spanish peso
Peru Lima Cusco Spanish sol
Cuba Havana Holguin Spanish peso
Canada Ottawa Toronto English dollar
Australia Canberra Sydney English dollar
Britain London Leeds English pound
Kazakhstan Astana Almaty Kazakh tenge
""".strip().splitlines()
]

NAMES = _words(
    "Anna Tom Maria Peter Lena Omar Julia David Nina Marco Sara Felix Clara Hugo Ruth Ivan Emma Karl Alice Boris "
    "Diana Simon Laura Victor"
)

AGENTS = _words(
    "waiter cook driver teacher doctor farmer baker student guard singer painter writer guide nurse pilot clerk "
    "mayor sailor guest neighbor"
)

TOPICS = {
    "food": _words("soup bread cheese salad coffee cake fish dinner lunch tea"),
    "travel": _words("train hotel station ship road bridge map ticket room harbor"),
    "weather": _words("morning evening sky wind rain winter summer storm sunset river"),
    "work": _words("meeting report office plan letter budget project speech lesson contract"),
    "books": _words("book story film song play poem picture museum concert novel"),
    "home": _words("garden house kitchen window door table party lamp chair street"),
}

INTENSIFIERS = _words("very really quite rather")

# Every slot has as many words at its positive pole as at its negative one, so that one draw gives the two sides of
# a contrast pair.
POLES = {
    "mood": {
        "adjective": (
            _words(
                "wonderful lovely delightful superb splendid excellent charming brilliant pleasant perfect "
                "fantastic marvelous great beautiful"
            ),
            _words("awful terrible dreadful horrible dismal miserable gloomy dull nasty ugly grim bleak poor dreary"),
        ),
        "feeling": (
            _words("happy glad proud pleased thrilled delighted grateful hopeful"),
            _words("sad angry upset ashamed lonely bitter hopeless worried"),
        ),
        "act": (
            _words("smiled|smiles laughed|laughs sang|sings danced|dances cheered|cheers"),
            _words("sighed|sighs cried|cries frowned|frowns wept|weeps groaned|groans"),
        ),
        "character": (
            _words("kind friendly polite gentle helpful patient"),
            _words("rude cold cruel mean hostile impatient"),
        ),
    },
    "formality": {
        "verb": (
            _words("purchase obtain assist inform examine request select permit repair receive consider transport"),
            _words("grab get help tell check ask pick let fix snag try haul"),
        ),
        "people": (
            _words("gentlemen individuals colleagues ladies representatives persons"),
            _words("guys folks buddies pals dudes kids"),
        ),
        "degree": (
            _words("extremely exceedingly highly entirely"),
            _words("super totally pretty kinda"),
        ),
        "opener": (
            _words("Moreover Furthermore Consequently Therefore Accordingly"),
            _words("Anyway Well Hey Okay Yeah"),
        ),
    },
    "tense": {
        "verb": (
            _words(
                "brought opened cleaned carried bought sold found described wrote painted moved showed watched "
                "counted took saw held kept lost made"
            ),
            _words(
                "brings opens cleans carries buys sells finds describes writes paints moves shows watches counts "
                "takes sees holds keeps loses makes"
            ),
        ),
        "time": (
            _words("Yesterday Previously Formerly"),
            _words("Today Nowadays Currently"),
        ),
    },
    "certainty": {
        "adverb": (
            _words("definitely certainly surely undoubtedly clearly inevitably obviously"),
            _words("perhaps possibly maybe conceivably supposedly presumably apparently"),
        ),
        "status": (
            _words("certain settled confirmed proven guaranteed fixed known assured"),
            _words("uncertain unclear doubtful questionable unknown disputed vague unproven"),
        ),
        "stance": (
            _words("sure convinced confident positive"),
            _words("unsure hesitant skeptical undecided"),
        ),
    },
    "boldness": {
        "action": (
            _words("jump race gamble attack climb dive leap charge explore fight"),
            _words("wait hide pause rest retreat listen prepare stay think withdraw"),
        ),
        "trait": (
            _words("bold daring brave fearless reckless adventurous"),
            _words("careful cautious timid shy prudent wary"),
        ),
        "manner": (
            _words("boldly bravely recklessly eagerly"),
            _words("carefully timidly warily quietly"),
        ),
    },
}

# {noun} … draw a word; [past|present] follow the document's tense; <slot> is a word of the pole.
FRAMES = {
    "mood": [
        "The {noun} [was|is] {very}<adjective>.",
        "The {noun} near the {place} [was|is] <adjective>.",
        "{name} [felt|feels] {very}<feeling>.",
        "The {agent} [looked|looks] <feeling>.",
        "The {agent} [was|is] <character>.",
        "{name} <act>.",
        "What a <adjective> {noun}!",
    ],
    "formality": [
        "{name} [planned|plans] to <verb> the {noun}.",
        "The {agent} [offered|offers] to <verb> the {noun}.",
        "Many <people> [came|come] from {city}.",
        "Some <people> [stayed|stay] near the {place}.",
        "The {agent} [became|becomes] <degree> busy.",
        "<opener>, {name} [sat|sits] near the {place}.",
    ],
    "tense": [
        "The {agent} <verb> the {noun}.",
        "{name} <verb> the {noun}.",
        "The {agent} from {city} <verb> a {noun}.",
        "{name} <verb> the {noun} near the {place}.",
        "<time>, the {agent} [sat|sits] near the {place}.",
    ],
    "certainty": [
        "The {noun} [had|has] <adverb> changed.",
        "The {agent} [had|has] <adverb> seen the {noun}.",
        "The {noun} [remained|remains] <status>.",
        "The {noun} near the {place} [remained|remains] <status>.",
        "{name} [seemed|seems] {very}<stance>.",
        "<adverb>, {name} [sat|sits] near the {place}.",
    ],
    "boldness": [
        "{hero} [decided|decides] to <action>.",
        "Near the {place} {hero} [chose|chooses] to <action>.",
        "People [called|call] {hero} {very}<trait>.",
        "{hero} [acted|acts] <manner>.",
        "The {agent} [knew|knows] {hero} as a <trait> person.",
    ],
}

# Frames whose words before the slot end at a place where only earlier sentences tell which pole comes next.
READ_FRAMES = {
    "mood": [0, 1, 2, 3, 4],
    "formality": [0, 1, 2, 3],
    "tense": [0, 1, 2, 3],
    "certainty": [0, 1, 2, 3],
    "boldness": [0, 1],
}

NEUTRAL_FRAMES = [
    "The {noun} [stood|stands] near the {place}.",
    "There [was|is] a {noun} near the {place}.",
    "{name} [sat|sits] near the {place}.",
    "The {agent} [came|comes] from {city}.",
]
VERBLESS_FRAMES = [
    "Next, the {noun}.",
    "Then the {noun}.",
    "Now the {noun} and the {place}.",
    "As for the {noun}.",
]
HEADINGS = ["Notes on the {noun}.", "About the {noun}.", "A page about {city}.", "The {topic} page."]

# What is asked after a document; the choices are words of the slot named on the right.
QUESTIONS = {
    "mood": [("How [was|is] the {noun}?", "adjective"), ("How [did|does] {name} feel?", "feeling")],
    "formality": [("What [did|does] {name} plan to do?", "verb"), ("Which people [came|come]?", "people")],
    "tense": [("What word fits the {agent}?", "verb")],
    "certainty": [("How [was|is] the plan?", "status"), ("What word fits the {noun}?", "adverb")],
    "boldness": [("What [did|does] {hero} do?", "action"), ("What kind of person is {hero}?", "trait")],
}

OPENERS = [
    "",
    "In fact,",
    "As everyone knows,",
    "Note that",
    "Remember that",
    "It is known that",
    "Of course,",
    "Travelers say that",
]

# relation: [(noun phrases, verb phrases), …]; {place} is the country or, over two hops, a city of it. After a whole
# verb phrase only the answer can follow, so that its probability is not shared with another way to go on.
_PEOPLE = [
    "people in {place}",
    "families in {place}",
    "visitors to {place}",
    "shops in {place}",
    "students in {place}",
    "in {place} you",
    "in {place} people",
]
STATEMENTS = {
    "capital": [
        (
            [
                "the capital of {place}",
                "the capital city of {place}",
                "the seat of government of {place}",
                "the first city of {place}",
            ],
            ["is", "has the name", "bears the name", "goes by the name"],
        ),
    ],
    "language": [
        (
            [
                "the language of {place}",
                "the official language of {place}",
                "the main language in {place}",
                "the language spoken in {place}",
            ],
            ["is", "has the name", "bears the name"],
        ),
        (_PEOPLE, ["speak", "talk in", "write in", "learn"]),
    ],
    "currency": [
        (
            [
                "the currency of {place}",
                "the official currency of {place}",
                "the money of {place}",
                "the currency used in {place}",
            ],
            ["is the", "is called the", "is known as the"],
        ),
        (_PEOPLE, ["pay with the", "use the", "count in the", "save the"]),
    ],
    "country": [
        (
            ["the city of {place}", "{place}", "the old town of {place}"],
            ["lies in", "is a city in", "is located in", "belongs to"],
        ),
    ],
    "country_capital": [
        (
            [
                "the capital of the country around {place}",
                "the capital of the country that contains {place}",
                "the capital of the land where {place} lies",
                "the seat of government above {place}",
            ],
            ["is", "has the name", "bears the name", "goes by the name"],
        ),
    ],
}

FACT_QUESTIONS = {
    "capital": ["the capital of {place}", "the capital city of {place}", "the seat of government of {place}"],
    "language": [
        "the language of {place}",
        "the official language of {place}",
        "the language spoken in {place}",
    ],
    "currency": [
        "the currency of {place}",
        "the official currency of {place}",
        "the currency used in {place}",
    ],
    "country": ["the country around {place}", "the country that contains {place}"],
    "country_capital": [
        "the capital of the country around {place}",
        "the capital of the land where {place} lies",
    ],
}
ASKING = ["What is", "Name", "Tell me", "Can you name"]
