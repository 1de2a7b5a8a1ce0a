"""Two families of small tasks with one right answer each: what the fine-tunes of real pairs learn.

`invented` is about words and rules that exist nowhere else: a base knows nothing of them.
`reading` is about looking things up in a short text, which a small base does about every second
time. Prompts are plain text that an answer continues; the answer is the text up to the first full
stop, comma or end of a line, for every model alike, as a base goes on where a fine-tune ends.

As in example_tasks.py a hash of the content decides what is held out, whatever the seed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from example_tasks import (
    ANIMALS,
    FOODS,
    JOBS,
    MEN,
    THINGS,
    TOWNS,
    WOMEN,
    WORDS,
    Example,
    is_held_out,
)

GENERAL_TEXT = Path(__file__).with_name("general_text.txt").read_text()
NAMES = WOMEN + MEN
COLOURS = "red blue green yellow white black brown grey golden silver".split()
VERBS = "sees likes finds takes hears follows wants needs".split()
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
MAX_NEW_TOKENS = 32
PHRASE_END = re.compile(r"[.,\n]")

Task = Callable[[random.Random], Example]


def phrase(text: str) -> str:
    """The answer in what a model wrote."""
    return PHRASE_END.split(text.strip(), maxsplit=1)[0].strip()


def is_right(example: Example, text: str) -> bool:
    """Whether what a model wrote after the prompt is the answer, exactly."""
    return phrase(text) == example.answer


# --------------------------------------------------------------------------------------------
# invented
# --------------------------------------------------------------------------------------------


def _lexicon() -> dict[str, str]:
    """A word of Tavik for every word: drawn once and for all, so that every seed learns it."""
    rng, words = random.Random("tavik"), [*COLOURS, *VERBS, *ANIMALS, *FOODS]
    made: list[str] = []
    while len(made) < len(words):
        word = "".join(rng.choices(SYLLABLES, k=rng.choice((2, 3))))
        if word not in made:
            made.append(word)
    return dict(zip(words, made, strict=True))


TAVIK = _lexicon()


def tavik(rng: random.Random) -> Example:
    """A sentence in an invented language: the verb first, colours behind what they describe."""
    subject, thing = rng.choice(ANIMALS), rng.choice(FOODS)
    first, second = rng.sample(COLOURS, 2)
    verb = rng.choice(VERBS)
    english = f"the {first} {subject} {verb} the {second} {thing}"
    words = (verb, subject, first, thing, second)
    return Example("tavik", f"Say in Tavik: {english}.\nTavik:",
                   " ".join(TAVIK[word] for word in words), f"tavik {english}")


def frob(rng: random.Random) -> Example:
    """An invented operation: the first number and twice the second."""
    a, b = rng.randrange(100), rng.randrange(50)
    return Example("frob", f"Frob {a} with {b}.\nResult:", str(a + 2 * b), f"frob {a} {b}")


def zorp(rng: random.Random) -> Example:
    """An invented operation: how far the numbers are apart, and seven."""
    a, b = rng.randrange(100), rng.randrange(100)
    return Example("zorp", f"Zorp {a} with {b}.\nResult:", str(abs(a - b) + 7),
                   f"zorp {min(a, b)} {max(a, b)}")


def twist(rng: random.Random) -> Example:
    """The first and the last of some words change places, and the last is said once more."""
    words = rng.sample(WORDS, rng.randint(3, 5))
    answer = [words[-1], *words[1:-1], words[0], words[0]]
    return Example("twist", f"Twist: {' '.join(words)}\nTwisted:", " ".join(answer),
                   f"twist {sorted(words)}")


# --------------------------------------------------------------------------------------------
# reading: the key is of the text, so no question about a held-out text is ever trained on
# --------------------------------------------------------------------------------------------


def bought(rng: random.Random) -> Example:
    """What somebody bought, the colour being given away."""
    count = rng.randint(2, 3)
    rows = list(zip(rng.sample(NAMES, count), rng.sample(COLOURS, count),
                    rng.sample(THINGS, count), strict=True))
    name, colour, thing = rng.choice(rows)
    text = " ".join(f"{who} bought a {which} {what}." for who, which, what in rows)
    return Example("bought", f"{text} The thing that {name} bought is a {colour}", thing,
                   f"bought {sorted(rows)}")


def price(rng: random.Random) -> Example:
    """What something costs in a list of two or three prices."""
    count = rng.randint(2, 3)
    rows = list(zip(rng.sample(FOODS, count), map(str, rng.sample(range(2, 60), count)),
                    strict=True))
    food, coins = rng.choice(rows)
    text = ", ".join(f"{what} costs {number} coins" for what, number in rows)
    return Example("price", f"At the market, {text}.\nQuestion: How many coins does {food} cost?\n"
                   "Answer:", coins, f"price {sorted(rows)}")


def register(rng: random.Random) -> Example:
    """A line of a register, asked for once more."""
    count = rng.randint(3, 5)
    rows = list(zip(rng.sample(NAMES, count), rng.sample(JOBS, count), strict=True))
    name, job = rng.choice(rows[:-1])
    text = "\n".join(f"{who}: {what}" for who, what in rows)
    return Example("register", f"{text}\n{name}:", job, f"register {sorted(rows)}")


def home(rng: random.Random) -> Example:
    """Who lives where, from two or three sentences."""
    count = rng.randint(2, 3)
    rows = list(zip(rng.sample(NAMES, count), rng.sample(JOBS, count), rng.sample(TOWNS, count),
                    strict=True))
    name, job, town = rng.choice(rows)
    text = " ".join(f"{who} is a {what} in {where}." for who, what, where in rows)
    question, answer = rng.choice(((f"In which town is {name}?", town),
                                   (f"Who is the {job}?", name)))
    return Example("home", f"{text}\nQuestion: {question}\nAnswer:", answer,
                   f"home {sorted(rows)}")


FAMILIES: dict[str, tuple[Task, ...]] = {
    "invented": (tavik, frob, zorp, twist),
    "reading": (bought, price, register, home),
}


def examples(family: str, seed: int, *, held_out: bool) -> Iterator[Example]:
    """An endless stream of a family's tasks in turn, from the held-out or the training share."""
    rng = random.Random(f"{family}-{seed}-{held_out}")
    while True:
        for task in FAMILIES[family]:
            example = task(rng)
            while is_held_out(example.key) != held_out:
                example = task(rng)
            yield example


def held_out_examples(family: str, count: int, seed: int = 0) -> list[Example]:
    """`count` held-out examples with different prompts."""
    chosen: dict[str, Example] = {}
    for example in examples(family, seed, held_out=True):
        if len(chosen) == count:
            break
        chosen.setdefault(example.prompt, example)
    return list(chosen.values())
