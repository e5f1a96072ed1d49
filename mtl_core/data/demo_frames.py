"""Names and sentences of the demo corpus, each with a held-out share.

`[person]` in a sentence draws a name and `[Amazon|place]` is that very name. The grammar in demo.py
fills the braces: `{thing}`, an adjective `{x}` (and its opposite `{y}`), or parts `{a}` and `{b}`.
Organisations and products are invented. Several names are of two types, or are also common words
(Jordan, Orion, Reading, Mark), so only the context tells what they are.
"""

from __future__ import annotations

from typing import NamedTuple


class Pool(NamedTuple):
    "Choices for one slot; `held_out` is for the test split alone."

    seen: tuple[str, ...]
    held_out: tuple[str, ...] = ()


def choices(text: str) -> tuple[str, ...]:
    """The parts between semicolons, however the lines are broken."""
    return tuple(" ".join(part.split()) for part in text.split(";"))


def pool(seen: str, held_out: str) -> Pool:
    """A pool of two texts in the form that `choices` reads."""
    return Pool(choices(seen), choices(held_out))


FIRST_NAMES = pool(
    """Anna; José; Mei; Oluwaseun; Priya; Lars; Jordan; Paris; Florence; Austin; Victoria; Rose;
    Mark; Will; Fatima; Zoë; Dmitri; Siobhán; Kwame; Noor; Tomás; Hana; Ingrid; Rafael; Grace;
    Yusuf; Elif; Bill; Leila; André; Hope; May""",
    """Georgia; Lincoln; Sydney; Santiago; Iris; Björn; Chiara; Mateo; Aoife; Kofi; Ravi; Élodie;
    Sakura; Nikolai; Amara; Þóra; Emeka; Lucía; Pavel; Daisy; Frank; Jasmine; Malik; Ottilie;
    Søren; Xiang; Wanjiru; Hugo; Miriam; Robin""",
)
LAST_NAMES = pool(
    """Kowalska; García; Chen; Adeyemi; Raman; Lindqvist; Baker; Park; Müller; O'Neill; Okafor;
    Hughes; Petrov; Dubois; Haddad; Novák; Silva; Tanaka; Brooks; Nkosi; Rossi; Özdemir; Stone;
    West; Andersson; Ferreira""",
    """Wiśniewski; Núñez; Takahashi; Mensah; Banerjee; Halvorsen; Fisher; Marsh; Schröder; Byrne;
    Mwangi; Fontaine; Kaplan; Horák; Almeida; Nakamura; Rivers; Dlamini; Bianchi; Şahin; Fields;
    Winters; Eriksen; Sørensen; Quispe""",
)
NAMES = {
    "place": pool(
        """Paris; Jordan; Florence; Austin; Victoria; Phoenix; Nice; Reading; Bath; Cork; Zürich;
        Łódź; São Paulo; Kraków; Nairobi; Kyoto; Lagos; Lisbon; Tromsø; Montréal; Hanoi; Bergen;
        Porto; Cape Town; Valparaíso; Reykjavík; Accra; New York; Malmö; Seville; Jaipur;
        Tbilisi; Galway; Busan; Ghent""",
        """Georgia; Lincoln; Sydney; Santiago; Split; Mobile; Hull; Gdańsk; Málaga; Osaka;
        Mombasa; Göteborg; Antwerp; Buenos Aires; Salt Lake City; Ålesund; Medellín; Ljubljana;
        Kumasi; Chiang Mai; Besançon; Córdoba; Tartu; Mysore; Dakar; Rīga; Sapporo; Trieste;
        Windhoek; Plzeň; Dunedin; Oaxaca; Halifax; Bruges; Hobart""",
    ),
    "organisation": pool(
        """Halcyon; Orion; Lumen; Tidewell; Zenova; Solvik; Copperline; Northgate Foods; Vantor
        Systems; Blue Heron Books; Maple & Finch; Café Lumière; Brightwater Trust; Kestrel Air;
        Oakhurst University; Delphi Motors; Harbour Street Bakery; Pinecrest Clinic; Riverbend
        Council; Quartz Labs; Baltika Rail; Studio Mirador; Fernhill School; Amber Post; Granite
        Bank; Corvid Press; Aldermoor Hotel; Hotel Bellavista; Nordlys Energi""",
        """Osprey; Ember; Merriden; Tessaline; Zephyrine; Ironvale; Fjordbyte; Polaris Foods;
        Sable Robotics; Kite & Anchor; Café Ombra; Juniper Rail; Larkfield College; Marigold
        Health; Vesper Glass; Stonebridge Library; Redwood Savings; Iskra Motors; Hotel
        Miramonte; Linden Theatre; Cloudberry Games; Saltmarsh Museum; Kantele Records; Dunmore
        Council; Violet Post; Helix Water; Umber Studios; Paloma Air; Tern & Daughters; Auberge
        du Lac""",
    ),
    "product": pool(
        """Orion; Halcyon; Phoenix; Pixelon 4; AeroBrew; TrailMate; Nimbus X2; EchoPen; Solara
        Lamp; VoltBike 300; Quill Reader; CasaVac; Lumo Ring; Zenith Pro; Tempo Watch; BreadBox
        Mini; HushPods; Mango Phone; Stride 5; Kettleworks K1; Polar Flask; Glide Board;
        NoteLeaf; SkyTune; Arco Chair; Pico Drone; Mistral Fan; Cadenza Piano; Robo Mop S;
        FocusCam""",
        """Osprey; Ember; Marathon 12; Vega 9; CloudKettle; PathFinder Lite; Sonnet Speaker;
        GripCase; Luna Scale; Hexa Router; Bolt Scooter; Pageturn; DustFox; Mira Mirror; Apex
        Mini; Chrono Band; ToastMate; QuietBuds; Papaya Tab; Brewster B2; Ridge Bottle; Wave
        Deck; InkSlate; TuneBox; Nido Sofa; Wasp Copter; Sirocco Heater; Sonata Keys; Scrubby XL;
        SnapLens""",
    ),
}

NEWS = pool(
    """[person] joined [organisation] as head of design;
    [organisation] will open an office in [place] next spring;
    [person] moved from [place] to [place] in March;
    [organisation] announced the [product] at a fair in [place];
    the train from [place] to [place] leaves at nine;
    [person] and [person] met at [organisation] in [place];
    [product] owners can call [organisation] until Friday;
    according to [person], [organisation] has hired forty people in [place];
    the [product] was designed by [person] in [place];
    please send the [product] to [person], [place];
    [organisation] and [organisation] share a warehouse outside [place];
    Dr [surname] teaches chemistry at [organisation];
    flights to [place], [place] and [place] start in May;
    [person] asked [person] to bring the [product];
    a spokesman for [organisation], [person], answered questions in [place];
    [person], who grew up in [place], now runs [organisation];
    is [person] still working for [organisation]?;
    [organisation] sold twelve thousand units of the [product] last year;
    the mayor of [place] visited [organisation] on Monday;
    I left my [product] on the bus to [place];
    [organisation] ([place]) is looking for a driver;
    “The [product] is next,” said [person] of [organisation];
    the exhibition in [place] shows drawings by [person];
    update for [product]: version two is on the [organisation] website;
    Ms [surname] will be in [place] until Thursday;
    [person] prefers the [product] to the [product];
    [place] and [place] are an hour apart by train;
    will [person] be at the meeting in [place]?;
    they paddled down the [Amazon|place] with [person] for nine days;
    the parcel from [Amazon|organisation] is with [person] next door;
    rain is expected along the [Amazon|place] and in [place] this week;
    [Amazon|organisation] is looking for a warehouse near [place]""",
    """[person] has been elected chair of [organisation];
    tickets for [person]'s lecture in [place] go on sale tomorrow;
    [organisation] moved its head office from [place] to [place];
    we compared the [product] with the [product] in our lab;
    [place]: [organisation] to repair the bridge, says [person];
    who lent [person] the [product]?;
    the ferry between [place] and [place] is run by [organisation];
    [person] was born in [place] and studied in [place];
    the team at [organisation] tested every [product] twice;
    Professor [surname] wrote to [organisation] about the [product];
    a ship carried coffee from the [Amazon|place] to [place];
    [Amazon|organisation] stopped selling the [product] in June""",
)
NAMELESS = pool(
    """will the shop open on Monday?; rose petals covered the table; mark the page before you
    close the book; the bill came to thirty euros; a phoenix rises from its ashes in the old
    tale; put the cork back in the bottle; there is time for reading and a bath before dinner;
    grace is said before meals in some families; English and French are taught on Tuesdays; the
    mountain stream was cold in April; west of the stone wall there is a park; the baker on the
    corner sells bread until six; we may be late; the meeting is at ten; a glass jar is on the
    shelf; they hope to finish in May""",
    """turn your mobile phone off and split the list in two; the ship's hull needs paint; an
    ember glowed in the stove; an osprey flew over the lake; jasmine grows beside the gate; the
    marathon starts at ten; to be frank is not the same as to be right; a robin sat on the fence""",
)
"""Sentences without a name, many of them with a word that elsewhere is one."""

PREFIXES = pool(
    "honestly,; in short,; all in all,; to be fair,; this time; after a week or so,; for me,",
    "if you ask me,; long story short,",
)
NEGATIONS = pool(
    "not {x}; not {x} at all; never {x}; anything but {x}; not in the least {x}; far from {x}",
    "by no means {x}; the opposite of {x}",
)
"""Say the opposite of an adjective."""

CONTRASTS = pool(
    """{a}, but {b}; although {a}, {b}; {a}, and yet {b}; while {a}, {b}; true, {a}, but in the
    end {b}; {a} - still, {b}""",
    "granted, {a}, however {b}; {a}, which would matter more if it were not that {b}",
)
"""The last clause decides."""

REVERSALS = pool(
    """I expected {thing} to be {x} and was proved wrong; [person] told us that {thing} was {x},
    but we found nothing of the sort; everyone says {thing} was {x} and I could not disagree
    more; how could anyone call {thing} {x}?""",
    "whoever said {thing} was {x} must have meant something else; {x} is the last word for {thing}",
)
"""Deny an adjective without any negation next to it."""

QUESTIONS = pool(
    """I cannot say yet whether {thing} was {x}; [person] asked me if {thing} was {x} or {y}; was
    {thing} {x} or {y}?; the survey asks if {thing} was {x}; tell me on Monday whether {thing}
    was {x} or {y}""",
    "we will soon learn whether {thing} was {x}; nobody told [person] if {thing} was {x} or {y}",
)
"""Neutral although they hold words of opinion."""

HIGHLIGHT_FRAMES = pool(
    """{a} but {b}; {a} but {b} at [organisation]; {a} in [place] and then {b}; {a} for [person]
    but {b} for the rest of us; {a} at first, {b} in the end; from {a} to {b} at [organisation]
    in [place]""",
    "{a} at [organisation], yet {b} overall; what began with {a} in [place] ended with {b}",
)
"""Noun phrases; the last one decides."""
