"""Opinions of the demo corpus: what reviews are about and what they say, with a held-out share.

Square brackets draw a name, as in demo_frames.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from mtl_core.data.demo_frames import Pool, choices, pool


@dataclass(frozen=True)
class Domain:
    """What a review can be about, and what can be said of it after "was".

    `adjectives` and `predicates` are by sentiment; only predicates have a neutral pool.
    """

    things: tuple[str, ...]
    named: tuple[str, ...]
    openers: Pool
    adjectives: dict[str, Pool]
    predicates: dict[str, Pool]


FOOD = Domain(
    choices("the soup; the coffee; the bread; the pasta; the breakfast; the fish"),
    choices("""the lunch at [organisation]; the coffee at [organisation]; the street food in
    [place]; [person]'s apple tart; the dinner [person] cooked; the soup at the café in [place]"""),
    pool(
        """we stopped in [place] for lunch; [person] had booked a table for six; this was my
        second meal at [organisation]; it was a long drive from [place]""",
        "we were in [place] for a wedding; a colleague from [organisation] suggested it",
    ),
    {
        "positive": pool(
            "fresh; delicious; fragrant; tender; superb", "scrumptious; flavourful; tasty"
        ),
        "negative": pool("bland; greasy; stale; overcooked; awful", "soggy; rubbery; tasteless"),
    },
    {
        "positive": pool(
            "cooked to perfection; full of flavour; the best in years; worth crossing town for",
            "seasoned with real care; so good that we ordered it twice",
        ),
        "negative": pool(
            "drowned in salt; barely edible; hardly worth the price; sent back to the kitchen",
            "burnt beyond recognition; so dry that nobody finished it",
        ),
        "neutral": pool(
            """served in a blue bowl; on the table at noon; on the second page of the menu; made
            without nuts""",
            "ordered by phone; shared between four of us",
        ),
    },
)
STAY = Domain(
    choices("the room; the balcony; the bed; the pool; the lobby; the hotel"),
    choices("""our room in [place]; the hotel in [place]; the flat [person] let to us in [place];
    the guest house near [place]; the spa at [organisation]; the hostel run by [organisation]"""),
    pool(
        """we flew to [place] in March; I booked through [organisation]; [person] and I shared a
        taxi from the airport; this was our third visit to [place]""",
        "the conference in [place] lasted four days; [organisation] arranged the trip",
    ),
    {
        "positive": pool(
            "spotless; cosy; comfortable; charming; lovely", "delightful; inviting; restful"
        ),
        "negative": pool("dirty; cramped; damp; gloomy; horrible", "shabby; musty; dingy"),
    },
    {
        "positive": pool(
            """a joy to come back to; not bad at all for the price; exactly what we needed; even
            better than the photos""",
            "hard to leave behind; as peaceful as anyone could wish",
        ),
        "negative": pool(
            """nothing like the photos; hardly worth the money; far too close to the road; in
            dire need of repair""",
            "falling apart at the seams; no place for a good night's sleep",
        ),
        "neutral": pool(
            "on the third floor; painted green; cleaned at eleven; next to the lift",
            "at the back of the building; reserved under my name",
        ),
    },
)
GADGET = Domain(
    choices("the battery; the screen; the camera; the keyboard; the handle; the charger"),
    choices("""the [product]; my [product]; the new [product] from [organisation]; the
    [organisation] [product]; the [product] that [person] lent me; the old [product]"""),
    pool(
        """[person] gave me the [product] for my birthday; I have owned it since April;
        [organisation] sent it to [place] by post; I bought two of them in [place]""",
        "it replaced my [product]; I ordered it from [organisation] last week",
    ),
    {
        "positive": pool(
            "reliable; sturdy; handy; clever; excellent", "dependable; well made; intuitive"
        ),
        "negative": pool(
            "flimsy; clumsy; unreliable; fragile; useless", "shoddy; glitchy; impractical"
        ),
    },
    {
        "positive": pool(
            "worth every penny; a pleasure to use; built to last; an improvement in every way",
            "a clear step up from my last one; ready to go straight out of the box",
        ),
        "negative": pool(
            "broken within a week; a waste of money; more trouble than it is worth; no use at all",
            "not fit for purpose; dead on arrival",
        ),
        "neutral": pool(
            "available in three colours; the same size as before; made abroad; in a plain box",
            "sold in pairs; listed under accessories",
        ),
    },
)
STORY = Domain(
    choices("the film; the book; the plot; the ending; the play; the second half"),
    choices("""[person]'s new novel; the film [person] made in [place]; the concert in [place];
    the play at [organisation]; the biography of [person]; the series about [place]"""),
    pool(
        """[person] and I went together; I saw it in [place] on Sunday; [organisation] published
        it in May; the tickets came from [organisation]""",
        "my neighbour [person] lent it to me; the queue in [place] went round the corner",
    ),
    {
        "positive": pool(
            "gripping; moving; funny; brilliant; wonderful", "touching; witty; enchanting"
        ),
        "negative": pool(
            "boring; predictable; confusing; dull; shallow", "tedious; muddled; lifeless"
        ),
    },
    {
        "positive": pool(
            """a triumph from start to finish; over far too soon; not dull for a single minute;
            one to remember for years""",
            "a quiet masterpiece; everything I had been promised and more",
        ),
        "negative": pool(
            """a chore from start to finish; two hours I will never get back; not half as clever
            as it thinks; best forgotten""",
            "a long road to nowhere; less fun than watching paint dry",
        ),
        "neutral": pool(
            "longer than the first one; in two parts; in Portuguese; mentioned in the programme",
            "interrupted by a short break; partly in Spanish",
        ),
    },
)
SERVICE = Domain(
    choices("the waiter; the driver; the guide; the receptionist; the nurse; the help desk"),
    choices("""the support team at [organisation]; [organisation]; [person] at the front desk;
    [person] from [organisation]; the [organisation] branch in [place]; our guide in [place]"""),
    pool(
        """I called [organisation] on Friday; my train to [place] was cancelled; [person] took
        the call; I needed a new part for the [product]""",
        "my [product] had to be returned; we asked at the desk in [place]",
    ),
    {
        "positive": pool(
            "helpful; friendly; patient; polite; attentive", "courteous; thoughtful; kind"
        ),
        "negative": pool(
            "rude; careless; unhelpful; impatient; hopeless", "dismissive; surly; sloppy"
        ),
    },
    {
        "positive": pool(
            """quick to put things right; a credit to the company; never too busy to help; on our
            side from the first call""",
            "happy to go the extra mile; good enough to call back the same day",
        ),
        "negative": pool(
            """nowhere to be found; slow to answer and quick to hang up; not interested in our
            problem; no help whatsoever""",
            "deaf to every complaint; unable to answer even a simple question",
        ),
        "neutral": pool(
            "available until five; not in on Monday; the same as last year; in touch by letter",
            "away until Thursday; contacted twice",
        ),
    },
)
DOMAINS = (FOOD, STAY, GADGET, STORY, SERVICE)

PREDICATES = {
    "positive": pool(
        """a delight; better than I dared hope; simply perfect; a nice surprise; not bad at all;
        hard to fault; just right""",
        "a breath of fresh air; second to none; nothing short of outstanding",
    ),
    "negative": pool(
        """a disappointment; not good enough; a letdown; far from acceptable; worse than I
        feared; just terrible; not what I paid for""",
        "a shambles; well below par; nothing to write home about",
    ),
}
CLAUSES = {
    "positive": pool(
        """I would recommend it to anyone; we went home with a smile; I have no complaints; I
        could not be happier; we will certainly be back""",
        "I keep telling my friends about it; it made my week; my whole family is thrilled",
    ),
    "negative": pool(
        """I want my money back; we will not be back; I would not wish it on anyone; we could not
        wait to leave; I regret every minute of it""",
        "I should have kept my money; it ruined our weekend; somebody ought to apologise",
    ),
    "neutral": pool(
        """I paid by card; a friend had mentioned it; the receipt is in the drawer; I have not
        made up my mind yet; we came on a Tuesday""",
        "the form asked for my address; it took about an hour",
    ),
}
HIGHLIGHTS = {
    "positive": pool(
        """a wonderful finish; a warm welcome; a fair price; a lovely surprise; superb food;
        great fun""",
        "a cracking finale; splendid company; a memorable evening",
    ),
    "negative": pool(
        """a slow start; a long queue; a weak opening; tiny portions; awful parking; a poor first
        hour""",
        "an endless wait; dreadful weather; a sneaky fee",
    ),
}
