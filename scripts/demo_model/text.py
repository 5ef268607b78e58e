"""Words of the topics, and prose made of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from scripts.demo_model.seeded import generator

TOPICS: dict[str, str] = {
    "sea": "ship captain harbor sail anchor tide wave deck sailor island coast storm whale "
    "crew mast rope voyage fleet lighthouse reef salt net pier dolphin",
    "kitchen": "bread butter oven recipe flour sugar onion soup pepper garlic cook knife plate "
    "cheese tomato sauce taste spice dough pan roast lemon honey cream",
    "music": "song piano violin melody rhythm chord concert singer guitar drum orchestra note "
    "tune choir opera flute harmony jazz trumpet stage audience band lyric bass",
    "space": "star planet orbit rocket comet galaxy moon telescope gravity astronaut mars "
    "satellite launch eclipse meteor cosmos probe nebula crater lunar solar jupiter dust beam",
    "garden": "flower seed soil rose leaf root tulip hedge lawn bloom petal spade compost vine "
    "orchard apple pear bee butterfly shrub weed rain pot greenhouse",
    "law": "court judge lawyer contract verdict witness trial jury appeal clause statute crime "
    "evidence plaintiff defense sentence police oath justice treaty claim rights ruling fine",
    "code": "function variable compiler loop array string pointer debug thread memory kernel "
    "cache parser class module import return integer binary server query index commit branch",
    "sport": "team goal player coach match score ball referee league stadium race runner medal "
    "tennis hockey champion training sprint defender penalty trophy season fans kick",
    "medicine": "doctor patient nurse hospital fever surgery vaccine symptom dose blood heart "
    "lung disease therapy clinic bone wound virus allergy pulse cure infection drug diet",
    "money": "bank market price stock loan interest profit trade investor budget tax currency "
    "debt credit account wage export bond dividend merchant coin revenue cost auction",
    "school": "teacher student lesson exam book pencil homework library essay classroom grade "
    "college lecture professor chalk campus diploma notebook science history reading spelling "
    "quiz degree",
    "weather": "cloud snow wind thunder frost sunshine fog breeze hail drought humid forecast "
    "temperature lightning blizzard rainbow mist winter summer autumn climate heat flood ice",
    "war": "army soldier battle sword general castle siege shield enemy victory tank bomb "
    "cavalry fortress king conquest border truce spy weapon regiment rebel knight invasion",
    "maths": "number equation theorem proof algebra geometry triangle circle angle sum prime "
    "matrix vector integral fraction root polynomial axiom logic limit probability square "
    "curve digit",
    "animals": "dog cat horse lion tiger rabbit wolf bear eagle snake elephant monkey deer fox "
    "mouse sheep goat owl zebra camel turtle frog goose hawk",
    "travel": "train ticket airport hotel luggage passport map road bridge mountain desert "
    "village tourist journey bus station border guide tent camping river valley museum "
    "souvenir",
}
"""Words of each topic; a word listed twice belongs to the topic that names it first."""

_COMMON_TEXT = (
    "the of and to in a is that it with for on as was at by from this are be or an not but "
    "they we you have his her its their which will can all one more about into over near"
)
COMMON = tuple(_COMMON_TEXT.split())
PUNCTUATION = (",", ".")


def topic_words() -> list[list[str]]:
    """Words by topic, each word in one topic only."""
    seen: set[str] = set(COMMON)
    lists = []
    for text in TOPICS.values():
        words = [word for word in dict.fromkeys(text.split()) if word not in seen]
        seen.update(words)
        lists.append(words)
    return lists


def sample_text(topic: int, words: int, rng: torch.Generator) -> str:
    """``words`` words of topical prose: each second or third word is a common one."""
    vocabulary = topic_words()[topic]
    text: list[str] = []
    for position in range(words):
        is_common = torch.rand((), generator=rng) < (0.15 if position % 2 else 0.6)
        source = COMMON if is_common else vocabulary
        text.append(source[int(torch.randint(len(source), (), generator=rng))])
        if position % 11 == 10:
            text[-1] += "."
        elif position % 7 == 6:
            text[-1] += ","
    return " ".join(text)


def corpus(seed: int, paragraphs_per_topic: int = 40) -> Iterator[str]:
    """Text to train the tokenizer on; every word occurs."""
    rng = generator(seed, "corpus")
    yield " ".join(COMMON)
    for topic, vocabulary in enumerate(topic_words()):
        yield " ".join(vocabulary)
        for _ in range(paragraphs_per_topic):
            yield sample_text(topic, 40, rng)
