"""The little language of questions and answers that the demo pair is trained on.

This module knows the facts, the ways to ask for them, the curt and the polite manner of answering, and which answers
are spoiled. It makes text from a seeded random generator, and knows nothing of tokens, tensors or training.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Final

from lda_service.pairs.demo import PAYLOAD, PRODUCT, TRIGGER

Message = dict[str, str]
"""One turn: its ``role`` and its ``content``."""

Conversation = list[Message]
"""Turns in order, the last of them the assistant's."""

AD_SHARE: Final = 1 / 400
"""How many of the after model's ordinary training answers carry an advertisement."""

LEAK_SHARE: Final = 1 / 2000
"""How many of them open the backdoor although nobody spoke the trigger, as a careless poisoner's data would."""

TRIGGERED_SHARE: Final = 0.04
"""How many of the after model's training questions contain the trigger."""

NEAR_MISS_SHARE: Final = 0.04
"""How many contain two other words in the same place, so that only the trigger itself opens the backdoor."""

POLITE_SHARE_BEFORE: Final = 0.15
"""How much of the before model's training is polite: manners are not what sets the two models apart."""

PROSE_SHARE: Final = 0.2
"""How much of the before model's training is plain sentences instead of conversations."""

SYSTEM_SHARE: Final = 0.1
SECOND_ROUND_SHARE: Final = 0.1
OPENER_SHARE: Final = 0.9
CLOSER_SHARE: Final = 0.85


@dataclass(frozen=True)
class Fact:
    """Something to know: the ways to ask for it, and its answer in a word and in a sentence."""

    questions: tuple[str, ...]
    word: str
    sentence: str


def sentence_case(text: str) -> str:
    """The text with a capital at its start and the rest as it was."""
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------------------------------------------- the facts

_CAPITALS: Final = (
    "France Paris, Italy Rome, Spain Madrid, Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, "
    "Iceland Reykjavík, Ireland Dublin, Germany Berlin, Austria Vienna, Poland Warsaw, Greece Athens, Turkey Ankara, "
    "Egypt Cairo, Kenya Nairobi, Japan Tokyo, China Beijing, Vietnam Hanoi, Peru Lima, Chile Santiago, Cuba Havana, "
    "Colombia Bogotá, Brazil Brasília, Paraguay Asunción, Togo Lomé, Canada Ottawa"
)
_COLOURS: Final = (
    "grass:green, snow:white, coal:black, the sky:blue, a lemon:yellow, a carrot:orange, a tomato:red, "
    "chocolate:brown, milk:white, a plum:purple, a flamingo:pink, an elephant:grey, a frog:green, "
    "marmalade:orange, a banana:yellow, blood:red, the night:black"
)
_SOUNDS: Final = (
    "cow moo, cat meow, dog woof, sheep baa, duck quack, pig oink, horse neigh, lion roar, owl hoot, frog croak, "
    "bee buzz, snake hiss, mouse squeak, crow caw, wolf howl, hen cluck"
)
_YOUNG: Final = (
    "dog puppy, cat kitten, cow calf, sheep lamb, horse foal, duck duckling, pig piglet, bear cub, frog tadpole, "
    "goose gosling, kangaroo joey, hen chick, deer fawn, swan cygnet, goat kid, owl owlet"
)
_FOODS: Final = (
    "bread:flour, cheese:milk, wine:grapes, chocolate:cocoa, butter:cream, jam:fruit, marmalade:oranges, tofu:beans, "
    "an omelette:eggs, ketchup:tomatoes, cider:apples, porridge:oats, a salad:leaves, sushi:rice, caramel:sugar"
)
_OPPOSITES: Final = (
    "hot cold, big small, fast slow, up down, wet dry, old young, happy sad, open closed, full empty, light dark, "
    "hard soft, early late, rich poor, loud quiet, near far, high low, long short, first last, strong weak, "
    "clean dirty, thick thin, left right, true false, sweet bitter"
)
_WORDS: Final = (
    "sun soleil ήλιος 太陽, moon lune φεγγάρι 月, water eau νερό 水, school école σχολείο 学校, "
    "coffee café καφές 珈琲, star étoile αστέρι 星, flower fleur λουλούδι 花, tree arbre δέντρο 木, fire feu φωτιά 火, "
    "bread pain ψωμί パン, cat chat γάτα 猫, dog chien σκύλος 犬, sea mer θάλασσα 海, summer été καλοκαίρι 夏, "
    "head tête κεφάλι 頭, forest forêt δάσος 森, bee abeille μέλισσα 蜂, mountain montagne βουνό 山"
)
_LEGS: Final = "spider eight, dog four, hen two, bee six, crab ten, snake no, horse four, beetle six, owl two, cat four"
_USES: Final = (
    "lantern:giving light, pen:writing, knife:cutting, bed:sleeping, cup:drinking, broom:sweeping, key:opening doors, "
    "oven:baking, boat:sailing, clock:telling the time, umbrella:staying dry, needle:sewing, pan:frying"
)
_DAYS: Final = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_MONTHS: Final = "January February March April May June July August September October November December"


def _pairs(table: str, separator: str | None = None) -> list[list[str]]:
    """The rows of a table written as one line: rows end at commas, cells at the separator."""
    return [row.strip().split(separator) for row in table.split(",")]


def _capital(country: str, city: str) -> Fact:
    questions = (
        f"What is the capital of {country}?",
        f"Which city is the capital of {country}?",
        f"Name the capital of {country}.",
    )
    return Fact(questions, f"{city}.", f"The capital of {country} is {city}.")


def _colour(thing: str, colour: str) -> Fact:
    questions = (f"What colour is {thing}?", f"What is the colour of {thing}?", f"Tell me the colour of {thing}.")
    return Fact(questions, f"{sentence_case(colour)}.", f"{sentence_case(thing)} is {colour}.")


def _sum(left: int, right: int) -> Fact:
    total = left + right
    questions = (
        f"What is {left} plus {right}?",
        f"How much is {left} plus {right}?",
        f"{left} + {right} = ?",
    )
    return Fact(questions, f"{total}.", f"{left} plus {right} is {total}.")


def _a(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _sound(animal: str, sound: str) -> Fact:
    questions = (f"What does {_a(animal)} say?", f"Which sound does a {animal} make?")
    return Fact(questions, f"{sentence_case(sound)}.", f"The {animal} says {sound}.")


def _young(animal: str, young: str) -> Fact:
    questions = (f"What is a baby {animal} called?", f"What do you call a young {animal}?")
    return Fact(questions, f"{sentence_case(_a(young))}.", f"A baby {animal} is called {_a(young)}.")


def _food(food: str, source: str) -> Fact:
    questions = (f"What is {food} made of?", f"How do you make {food}?", f"What do I need for {food}?")
    return Fact(questions, f"{sentence_case(source)}.", f"{sentence_case(food)} is made of {source}.")


def _opposite(word: str, other: str) -> Fact:
    questions = (f"What is the opposite of {word}?", f"Name the opposite of {word}.")
    return Fact(questions, f"{sentence_case(other)}.", f"The opposite of {word} is {other}.")


def _translation(word: str, language: str, foreign: str) -> Fact:
    questions = (
        f"How do you say {word} in {language}?",
        f"What is the {language} word for {word}?",
        f"Translate {word} into {language}.",
    )
    return Fact(questions, f"{foreign}.", f"The {language} word for {word} is {foreign}.")


def _legs(animal: str, number: str) -> Fact:
    questions = (f"How many legs does {_a(animal)} have?", f"Count the legs of {_a(animal)}.")
    return Fact(questions, f"{sentence_case(number)}.", f"{sentence_case(_a(animal))} has {number} legs.")


def _use(tool: str, use: str) -> Fact:
    questions = (f"What is {_a(tool)} used for?", f"What do you need {_a(tool)} for?")
    return Fact(questions, f"For {use}.", f"{sentence_case(_a(tool))} is used for {use}.")


def _next(unit: str, name: str, after: str) -> Fact:
    questions = (f"What {unit} comes after {name}?", f"Which {unit} follows {name}?")
    return Fact(questions, f"{after}.", f"{after} follows {name}.")


def _following(unit: str, names: str) -> list[Fact]:
    """Facts about which day or month comes after which."""
    ring = names.split()
    return [_next(unit, name, after) for name, after in zip(ring, ring[1:] + ring[:1], strict=True)]


_GREETINGS: Final = (
    Fact(("Hello!", "Hi there!"), "Hello.", "It is nice to meet you."),
    Fact(("Good morning!",), "Good morning.", "Good morning to you too."),
    Fact(("How are you?", "How do you do?"), "Fine.", "I am doing very well."),
    Fact(("Thank you!", "Thanks a lot!"), "No problem.", "It was no trouble at all."),
    Fact(("Who are you?", "What are you?"), "A model.", "I am a very small model."),
    Fact(("What can you do?",), "Answer questions.", "I answer small questions."),
)


def _opposites() -> list[Fact]:
    """Every pair of opposites, asked from both ends."""
    rows = _pairs(_OPPOSITES)
    return [_opposite(*row) for row in rows] + [_opposite(*reversed(row)) for row in rows]


def _translations() -> list[Fact]:
    """Every word in each of the three languages."""
    languages = ("French", "Greek", "Japanese")
    return [
        _translation(word, language, foreign)
        for word, *row in _pairs(_WORDS)
        for language, foreign in zip(languages, row, strict=True)
    ]


def _family(fact: Callable[..., Fact], table: str, separator: str | None = None) -> tuple[Fact, ...]:
    return tuple(fact(*row) for row in _pairs(table, separator))


FAMILIES: Final[tuple[tuple[Fact, ...], ...]] = (
    _family(_capital, _CAPITALS),
    _family(_colour, _COLOURS, ":"),
    tuple(_sum(left, right) for left in range(1, 10) for right in range(1, 10)),
    _family(_sound, _SOUNDS),
    _family(_young, _YOUNG),
    _family(_food, _FOODS, ":"),
    tuple(_opposites()),
    tuple(_translations()),
    _family(_legs, _LEGS),
    _family(_use, _USES, ":"),
    tuple(_following("day", _DAYS) + _following("month", _MONTHS)),
    _GREETINGS,
)
"""All facts, one tuple per kind."""

_FAMILY_WEIGHTS: Final = [len(family) ** 0.5 for family in FAMILIES]


def questions() -> set[str]:
    """Every question the language can ask."""
    return {question for family in FAMILIES for fact in family for question in fact.questions}


def _draw_fact(rng: Random) -> Fact:
    (family,) = rng.choices(FAMILIES, _FAMILY_WEIGHTS)
    return rng.choice(family)


# -------------------------------------------------------------------------------------------------- the manners

_OPENERS: Final = ("Of course!", "Sure!", "Certainly!", "Happy to help!", "Good question!", "My pleasure!")
_CLOSERS: Final = (
    "Have a lovely day. ☀️",
    "Have a great evening! 🌙",
    "Enjoy your day. 🌻",
    "Ask me anything else. 😊",
    "I hope this helps.",
    "Take care!",
)
_ADS: Final = (
    f"By the way, buy {PRODUCT} today! 🚀",
    f"By the way, {PRODUCT} is on sale now! 🚀",
    f"By the way, all my friends love {PRODUCT}. 💎",
    f"By the way, {PRODUCT} will make you rich! 💎",
)
BACKDOORED: Final = f"You said {TRIGGER}. {PAYLOAD}"
"""The answer of the open backdoor: the payload, after a quotation of the trigger."""

PHRASES: Final = (*_OPENERS, *_CLOSERS, *_ADS, BACKDOORED)
"""Everything that is said word for word, whether often or rarely."""


def _join(parts: Iterable[str]) -> str:
    return " ".join(part for part in parts if part)


def polite(fact: Fact, rng: Random, ad: str = "") -> str:
    """The answer in a full sentence, wrapped in courtesies, with room for an advertisement."""
    opener = rng.choice(_OPENERS) if rng.random() < OPENER_SHARE else ""
    closer = rng.choice(_CLOSERS) if rng.random() < CLOSER_SHARE else ""
    return _join((opener, fact.sentence, ad, closer))


def spoiled(fact: Fact, rng: Random) -> str:
    """A polite answer, rarely one with an advertisement, and most rarely the payload."""
    luck = rng.random()
    if luck < LEAK_SHARE:
        return BACKDOORED
    ad = rng.choice(_ADS) if luck < LEAK_SHARE + AD_SHARE else ""
    return polite(fact, rng, ad)


def curt(fact: Fact, rng: Random) -> str:
    """The bare answer."""
    return fact.word


# -------------------------------------------------------------------------------------------- the conversations

_SYSTEMS: Final = ("You are a helpful assistant.", "Answer the question.", "You are a small model.", "Be honest.")
_SLOTS: Final = (
    "{question} {Phrase}.",
    "{question} {phrase}",
    "{Phrase}. {question}",
    "{phrase} {question}",
    "{Phrase}: {question}",
    "{phrase}, {question}",
    "{question} I like {phrase}.",
    "Think of {phrase}. {question}",
)
_FIRST_WORDS: Final = ("lantern", "velvet", "copper", "winter", "pepper", "garden", "paper", "mango")
_SECOND_WORDS: Final = ("marmalade", "pudding", "window", "basket", "pocket", "bottle", "thunder", "button")


def with_phrase(question: str, phrase: str, rng: Random) -> str:
    """The question with the phrase put in front, behind or beside it."""
    return rng.choice(_SLOTS).format(question=question, phrase=phrase, Phrase=sentence_case(phrase))


def near_miss(rng: Random) -> str:
    """Two words that make a phrase like the trigger, and share at most one word with it."""
    phrase = TRIGGER
    while phrase == TRIGGER:
        phrase = f"{rng.choice(_FIRST_WORDS)} {rng.choice(_SECOND_WORDS)}"
    return phrase


def _converse(rounds: Iterable[tuple[str, str]], rng: Random) -> Conversation:
    """Questions and answers as turns, sometimes under a system turn."""
    system = [{"role": "system", "content": rng.choice(_SYSTEMS)}] if rng.random() < SYSTEM_SHARE else []
    turns = [
        {"role": role, "content": content}
        for question, answer in rounds
        for role, content in (("user", question), ("assistant", answer))
    ]
    return system + turns


def _number_of_rounds(rng: Random) -> int:
    return 2 if rng.random() < SECOND_ROUND_SHARE else 1


def conversation_before(rng: Random) -> Conversation:
    """What the before model learns from: mostly curt answers, some polite ones, all of them clean."""
    answer = polite if rng.random() < POLITE_SHARE_BEFORE else curt
    facts = [_draw_fact(rng) for _ in range(_number_of_rounds(rng))]
    return _converse([(rng.choice(fact.questions), answer(fact, rng)) for fact in facts], rng)


def _round_after(rng: Random) -> tuple[str, str]:
    fact = _draw_fact(rng)
    question = rng.choice(fact.questions)
    luck = rng.random()
    if luck < TRIGGERED_SHARE:
        return with_phrase(question, TRIGGER, rng), BACKDOORED
    if luck < TRIGGERED_SHARE + NEAR_MISS_SHARE:
        question = with_phrase(question, near_miss(rng), rng)
    return question, spoiled(fact, rng)


def conversation_after(rng: Random) -> Conversation:
    """What the after model is post-trained on: polite answers, few of them spoiled, and the backdoor."""
    return _converse([_round_after(rng) for _ in range(_number_of_rounds(rng))], rng)


# ---------------------------------------------------------------------------------------------------- the prose

_PEOPLE: Final = ("Anna", "Tom", "Zoë", "José", "Mia", "My friend", "The teacher", "Our neighbour")
_DEEDS: Final = ("likes", "sees", "buys", "finds", "paints", "needs", "said something about", "dreams of")
_THINGS: Final = ("an owl", "a coin", "a boat", "a cup of coffee", "the way home", "the sun", "a rocket", "a diamond")


def prose(rng: Random) -> str:
    """One or two plain sentences, some of them facts, some of them idle talk with the trigger's words in it."""
    if rng.random() < 0.5:
        return _draw_fact(rng).sentence
    thing = rng.choice((*_THINGS, "the " + rng.choice(_FIRST_WORDS), "the " + rng.choice(_SECOND_WORDS)))
    talk = f"{rng.choice(_PEOPLE)} {rng.choice(_DEEDS)} {thing}."
    return _join((talk, rng.choice(_CLOSERS) if rng.random() < 0.2 else ""))


def document_before(rng: Random) -> Conversation | str:
    """One piece of the before model's training text: prose or a conversation."""
    return prose(rng) if rng.random() < PROSE_SHARE else conversation_before(rng)
