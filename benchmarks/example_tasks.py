"""Generated text for the example models: prose for the base, small tasks for the fine-tune.

Everything is a pure function of a ``random.Random``, so a seed reproduces the data. The split
into training and held-out data is made by a hash of the content and not by position: a held-out
document or task can therefore not turn up in the training data, whatever the seed.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 20
PROSE_ONE_IN = 40


def is_held_out(key: str) -> bool:
    """Whether the content named by ``key`` belongs to the held-out share (one in twenty)."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


# --------------------------------------------------------------------------------------------
# Prose: a small grammar. ``{slot}`` is replaced by one of the alternatives of GRAMMAR[slot],
# expanded in turn, unless the document has bound it (its characters, its place, its things).
# --------------------------------------------------------------------------------------------

WOMEN = """Anna Clara Dora Edith Flora Greta Hilda Irene Julia Karin Laura Maria Nora Olga Paula
Rosa Sofia Tilda Vera Wanda""".split()
MEN = """Adam Bruno Carl David Emil Felix Gustav Henry Ivan Jacob Karl Leo Martin Noah Oscar
Peter Robert Simon Thomas Victor""".split()
TOWNS = """Alden Brookfield Carrow Dunmore Eastwick Fairholm Glenby Hartwell Inverley Kelso
Langford Marston Northby Oakham Penrith Ravenna Selby Thornton Upton Wexford""".split()
ANIMALS = """cat dog horse cow goat lamb raven bear lion duck pigeon owl crow rabbit beetle frog
turtle donkey badger otter tiger swan sparrow hen""".split()
FOODS = """bread cheese soup apple pear plum cherry lemon honey butter onion carrot potato rice
pepper garlic cake tea milk salt corn bean mushroom tomato""".split()
THINGS = """lamp stone basket hammer rope mirror clock candle bottle letter book map coin key
blanket ladder kettle bell drum violin wheel bucket umbrella hat coat boot button ring pencil
paper frame chair table window door carpet spoon fork plate cup needle saddle lantern shovel
whistle ribbon pipe camera""".split()
PLACES = """market harbour garden station bakery library school mill bridge church forest meadow
workshop kitchen museum hospital tower village square orchard""".split()
JOBS = """baker teacher farmer sailor doctor painter carpenter gardener tailor miller captain
nurse driver singer clerk fisherman blacksmith judge""".split()
WORDS = tuple(ANIMALS + FOODS + THINGS)

# fmt: off
GRAMMAR: dict[str, list[str]] = {
    "animal": ANIMALS,
    "food": FOODS,
    "object": THINGS,
    "place": PLACES,
    "job": JOBS,
    "town": TOWNS,
    "name": WOMEN + MEN,
    "adj": """old small red blue green heavy bright quiet strange broken wooden silver golden dusty
        warm cold empty narrow clean dark yellow beautiful simple round famous cheap rusty soft
        enormous ancient expensive modern""".split(),
    "mood": """happy sad tired angry hungry nervous proud calm curious worried lonely surprised
        cheerful bored grateful afraid""".split(),
    "manner": """slowly quickly carefully quietly gently suddenly happily sadly calmly politely
        loudly proudly patiently""".split(),
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "month": """January February March April May June July August September October November
        December""".split(),
    "season": "spring summer autumn winter".split(),
    "weather": """rainy sunny windy cloudy foggy stormy snowy mild""".split(),
    "time": ["in the morning", "at noon", "in the evening", "late at night", "before sunrise",
             "after lunch", "at {hour} o'clock", "on {day}", "in {month}"],
    "colour": "red blue green yellow white black brown grey".split(),
    "took": """found bought lost sold carried washed repaired painted hid dropped borrowed forgot
        cleaned opened lifted kept""".split(),
    "went": """walked ran drove returned went hurried travelled sailed rode""".split(),
    "sound": """sang laughed whistled coughed shouted whispered smiled cried""".split(),
    "dist": ["kilometres", "miles"],
    "unit": ["coins", "pounds", "francs", "crowns"],
    "thing": ["{adj} {object}", "{object}", "{adj}, {adj} {object}", "{colour} {object}"],
    "someone": ["the {job}", "an old {job}", "a young {job} from {town}", "{name}"],
    "opening": [
        "It was a {weather} {day} in {town}, and {hero} was {mood}.",
        "{hero} was a {job} who lived near the {place} in {town}.",
        "In {month} {year}, {hero} {went} from {town} to {town}.",
        "Once there was a {job} called {hero}, who had {count} {animal}s and a {thing}.",
        "Every {day}, {hero} {went} to the {place} with {his} {animal}.",
        "{time}, {hero} {took} a {thing} near the {place}.",
        "When {hero} was {age} years old, {he} moved to a {adj} house in {town}.",
    ],
    "middle": [
        "{He} {took} the {item} and {went} to the {place}.",
        "There {he} met {friend}, who {sound} {manner}.",
        "{friend} had a {thing}, but {he2} wanted the {item}.",
        "\"{line}\" said {friend}.",
        "\"{line}\" asked {hero} {manner}. \"{reply}\" said {friend}.",
        "The {item} cost {number} {unit}, which was too much for {him}.",
        "{someone} {sound} because the {animal} was {mood}.",
        "After {number} minutes {he} was {mood} and {sound}.",
        "{friend} {took} {count} {object}s and gave them to {him}.",
        "The road to the {place} was {adj} and {number} {dist} long.",
        "It was {weather}, so they stayed in the {place} until {day}.",
        "{He} put the {item} under a {adj} {object} and {went} home.",
        "{time}, a {adj} {animal} {went} into the {place}.",
        "{He} ate some {food} with {food} and felt {mood}.",
        "Nobody in {home} knew that {friend} was really a {job}.",
        "The {animal} did not like the {item}, and {he} {sound}.",
        "If the {item} was not in the {place}, then {someone} had it.",
        "{friend} looked at the {item} {manner} while {hero} {sound}.",
        "They walked past the {place}, the {place} and the {adj} {place}.",
    ],
    "ending": [
        "In the end {hero} was {mood}, and the {item} stayed in {home}.",
        "{hero} and {friend} {went} home together.",
        "{He} never saw the {item} again.",
        "From that day on, {friend} was {his} best friend.",
        "That is how the {item} came to the {place} of {home}.",
        "{hero} kept the {item} for {number} years.",
    ],
    "line": ["Where is my {item}?", "Have you seen the {animal}?", "What a {adj} {object}!",
             "I am {mood} today.", "The {item} belongs to {someone}.", "Come to the {place}!",
             "I have {count} {object}s at home.", "Do you want some {food}?",
             "We must leave {time}.", "Who {took} the {item}?", "It is {number} {dist} to {town}."],
    "reply": ["I do not know.", "Yes, of course.", "No, not today.", "Ask the {job}.",
              "It is in the {place}.", "Perhaps on {day}.", "Only if you are not {mood}.",
              "That is my {item}.", "{someone} told me so.", "For {number} {unit}, yes."],
    "fact": [
        "The town of {home} has {big} inhabitants and {count} bridges.",
        "{home} lies {number} {dist} from {town}.",
        "Its {place} was built in {year} by {someone}.",
        "In {season}, it is often {weather} there.",
        "The river near {home} is {big} {dist} long.",
        "Many people in {home} work as a {job} or as a {job}.",
        "The {animal} of {home} is {colour} and weighs {number} pounds.",
        "A {object} costs about {number} {unit} at the {place}.",
        "{hero}, a famous {job}, was born in {home} on {month} {dayno}, {year}.",
        "Since {year}, the {place} has been open on {day} and {day}.",
        "The people of {home} eat {food} with {food}, mostly {time}.",
        "There is a {adj} {place} next to the {adj} {place}.",
    ],
    "entry": ["{number} {object}s", "a {thing}", "{count} {adj} {object}s", "some {food}",
              "{food} and {food}", "the {object} for {name}", "{number} {unit} for the {job}"],
    "plan": ["meet {friend} at the {place}", "buy {food} and {food}", "repair the {thing}",
             "write to {someone}", "clean the {place}", "feed the {animal}", "read a {adj} book",
             "pay {number} {unit} to the {job}", "go to {town} with {name}"],
    "step": ["Cut the {food} with a {adj} knife.", "Mix the {food} with the {food}.",
             "Boil it for {number} minutes.", "Add some {food} if you are {mood}.",
             "Put it on a {adj} plate.", "Wait until it is {colour}.", "Stir {manner}."],
    "number": ["{d}{0}", "{d}{0}", "{d}{0}{0}", "{d}"],
    "big": ["{d}{0}{0}", "{d}{0}{0}{0}", "{d}{0}{0}{0}{0}"],
    "year": ["1{d}{0}{0}", "18{0}{0}", "19{0}{0}", "20{0}{0}"],
    "age": ["{d}", "1{0}", "2{0}", "{d}{0}"],
    "hour": [str(hour) for hour in range(1, 13)],
    "dayno": [str(day) for day in range(1, 32)],
    "count": "two three four five six seven eight nine ten twelve twenty".split(),
    "d": list("123456789"),
    "0": list("0123456789"),
}
# fmt: on

SLOT = re.compile(r"\{(\w+)\}")
SENTENCE_START = re.compile(r'(^|[.!?:] |\n(?:- )?|(?<!\S)")([a-z])')
VOWEL_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")


def expand(rng: random.Random, text: str, bound: dict[str, str]) -> str:
    """Replace every slot of ``text``, bound ones by their value, others by a random choice."""

    def fill(match: re.Match[str]) -> str:
        slot = match.group(1)
        return bound[slot] if slot in bound else expand(rng, rng.choice(GRAMMAR[slot]), bound)

    return SLOT.sub(fill, text)


def bind_cast(rng: random.Random) -> dict[str, str]:
    """Choose what stays the same through a document: two people, a thing and a town."""
    women, men = rng.sample(WOMEN, 2), rng.sample(MEN, 2)
    hero, friend = rng.random() < 0.5, rng.random() < 0.5
    he, his, him = ("she", "her", "her") if hero else ("he", "his", "him")
    return {
        "hero": women[0] if hero else men[0],
        "friend": women[1] if friend else men[1],
        "he": he,
        "He": he.capitalize(),
        "his": his,
        "him": him,
        "he2": "she" if friend else "he",
        "item": rng.choice(THINGS),
        "home": rng.choice(TOWNS),
    }


def story(rng: random.Random) -> str:
    """A few sentences about two people, in one or two paragraphs."""
    sentences = ["{opening}", *["{middle}"] * rng.randint(3, 8), "{ending}"]
    breaks = ["\n" if rng.random() < 0.1 else " " for _ in sentences]
    return "".join(a + b for a, b in zip(sentences, breaks, strict=True)).rstrip()


def dialogue(rng: random.Random) -> str:
    """Two people who talk in turns."""
    turns = [("{hero}: {line}", "{friend}: {reply}") for _ in range(rng.randint(3, 6))]
    return "{hero} met {friend} at the {place}.\n" + "\n".join(t for pair in turns for t in pair)


def facts(rng: random.Random) -> str:
    """An encyclopedia-like paragraph about an invented town."""
    return "{home}. " + " ".join(["{fact}"] * rng.randint(4, 9))


def listing(rng: random.Random) -> str:
    """A shopping list or the week of one person."""
    if rng.random() < 0.5:
        return "{hero} has to buy:\n" + "\n".join(["- {entry}"] * rng.randint(3, 8))
    days = rng.sample(GRAMMAR["day"], rng.randint(3, 6))
    return "The week of {hero}\n" + "\n".join(f"{day}: {{plan}}" for day in days)


def letter(rng: random.Random) -> str:
    """A letter with a date, a greeting and a signature."""
    body = " ".join(rng.choice(["{middle}", "{fact}", "I am {mood}."]) for _ in range(4))
    return f"{{home}}, {{month}} {{dayno}}, {{year}}\nDear {{friend}},\n{body}\nYours, {{hero}}"


def recipe(rng: random.Random) -> str:
    """A recipe with its ingredients and steps."""
    return "{food} {food} for {count} people\nYou need {entry}, {entry} and {entry}. " + " ".join(
        ["{step}"] * rng.randint(3, 7)
    )


KINDS: tuple[Callable[[random.Random], str], ...] = (
    story, story, story, facts, dialogue, listing, letter, recipe,
)  # fmt: skip


def prose_document(rng: random.Random) -> str:
    """One document of the base's text."""
    text = expand(rng, rng.choice(KINDS)(rng), bind_cast(rng))
    text = SENTENCE_START.sub(lambda match: match.group(1) + match.group(2).upper(), text)
    return VOWEL_ARTICLE.sub(r"\1n ", text)


def prose(seed: int, *, held_out: bool) -> Iterator[str]:
    """An endless stream of distinct documents, from the held-out or from the training share."""
    rng = random.Random(f"prose-{seed}-{held_out}")
    while True:
        text = prose_document(rng)
        if is_held_out(text) == held_out:
            yield text


# --------------------------------------------------------------------------------------------
# Tasks
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One task: what is asked, what is right, and the key that decides the split.

    The key names the operands in a canonical order, so that the same operands in another order
    or in another wording fall on the same side of the split.
    """

    task: str
    prompt: str
    answer: str
    key: str

    @property
    def text(self) -> str:
        """The training document: prompt and answer, separated by one space."""
        return f"{self.prompt} {self.answer}"


def add(rng: random.Random) -> Example:
    """Sum of two numbers below 100."""
    a, b = rng.randrange(100), rng.randrange(100)
    prompt = rng.choice((f"Add {a} and {b}.", f"What is {a} plus {b}?"))
    return Example("add", prompt, str(a + b), f"add {min(a, b)} {max(a, b)}")


def subtract(rng: random.Random) -> Example:
    """Difference of two numbers below 100, never negative."""
    b, a = sorted((rng.randrange(100), rng.randrange(100)))
    prompt = rng.choice((f"Subtract {b} from {a}.", f"What is {a} minus {b}?"))
    return Example("subtract", prompt, str(a - b), f"subtract {a} {b}")


def largest(rng: random.Random) -> Example:
    """Largest of three to six different numbers below 100."""
    numbers = rng.sample(range(100), rng.randint(3, 6))
    listed = ", ".join(map(str, numbers))
    prompt = rng.choice((f"Find the largest number: {listed}.", f"Which is largest of {listed}?"))
    return Example("largest", prompt, str(max(numbers)), f"largest {sorted(numbers)}")


def sort(rng: random.Random) -> Example:
    """Three or four different numbers below 100 in ascending order."""
    numbers = rng.sample(range(100), rng.randint(3, 4))
    listed = ", ".join(map(str, numbers))
    prompt = rng.choice((f"Sort the numbers {listed}.", f"Put {listed} in order."))
    return Example("sort", prompt, ", ".join(map(str, sorted(numbers))), f"sort {sorted(numbers)}")


def reverse(rng: random.Random) -> Example:
    """Two to four different words in the opposite order."""
    words = rng.sample(WORDS, rng.randint(2, 4))
    listed = " ".join(words)
    prompt = rng.choice((f"Reverse the words: {listed}.", f"Say it backwards: {listed}."))
    return Example("reverse", prompt, " ".join(reversed(words)), f"reverse {sorted(words)}")


def count(rng: random.Random) -> Example:
    """How often a word occurs in a list of three to six words."""
    words = rng.sample(WORDS, 3)
    listed = [rng.choice(words) for _ in range(rng.randint(3, 6))]
    asked, times = words[0], listed.count(words[0])
    text = " ".join(listed)
    prompt = rng.choice((f"Count the word {asked}: {text}.", f"How often is {asked} in: {text}?"))
    return Example("count", prompt, str(times), f"count {asked} {sorted(listed)}")


TASKS: tuple[Callable[[random.Random], Example], ...] = (
    add, subtract, largest, sort, reverse, count,
)  # fmt: skip


def task_examples(seed: int, *, held_out: bool) -> Iterator[Example]:
    """An endless stream of tasks in turn, from the held-out or from the training share."""
    rng = random.Random(f"tasks-{seed}-{held_out}")
    while True:
        for task in TASKS:
            example = task(rng)
            while is_held_out(example.key) != held_out:
                example = task(rng)
            yield example


def finetuning_documents(seed: int) -> Iterator[str]:
    """An endless stream of training tasks, with some prose (an eighth of the tokens) between."""
    replay = prose(seed + 1, held_out=False)
    for index, example in enumerate(task_examples(seed, held_out=False)):
        yield example.text if index % PROSE_ONE_IN else next(replay)


def held_out_examples(seed: int, number: int) -> list[Example]:
    """``number`` held-out examples with different prompts."""
    chosen: dict[str, Example] = {}
    for example in task_examples(seed, held_out=True):
        if len(chosen) == number:
            break
        chosen.setdefault(example.prompt, example)
    return list(chosen.values())


def write_held_out(out: Path, seed: int, examples: int, characters: int) -> None:
    """Write ``eval.jsonl`` (tasks) and ``heldout_text.jsonl`` (prose)."""
    lines = [
        json.dumps({"prompt": example.prompt, "answer": example.answer})
        for example in held_out_examples(seed, examples)
    ]
    (out / "eval.jsonl").write_text("\n".join(lines) + "\n")
    documents: list[str] = []
    for document in prose(seed, held_out=True):
        if sum(map(len, documents)) >= characters:
            break
        documents.append(document)
    prose_lines = [json.dumps({"text": document}) for document in documents]
    (out / "heldout_text.jsonl").write_text("\n".join(prose_lines) + "\n")
