"""The everyday concepts of the starter corpus and what the corpus says about each of them.

One row per concept. The same facts are stated in the stage-0 sentences and asked for in the text questions, so the
corpus is a small closed world: an answer is right when it agrees with this table.
"""

from dataclasses import dataclass

CATEGORIES = ("animal", "food", "vehicle", "object", "nature")
PLURAL_WORDS = frozenset({"grapes", "cherries", "scissors", "glasses"})
UNIQUE_WORDS = frozenset({"sun", "moon"})
UNCOUNTABLE_WORDS = frozenset({"corn", "bread", "cheese"})


@dataclass(frozen=True)
class Concept:
    """One everyday thing.

    Args:
        word: the label, also the answer to "What is in the picture?".
        category: one of `CATEGORIES`.
        colour: its typical colour.
        size: "big" or "small".
        place: where it is found, with the preposition ("on a farm").
        detail: for animals the number of legs, for food the taste, for vehicles the number of wheels, for objects
            the use ("cutting paper"), for nature when or how it is met ("at night").
        deed: what it does, as a verb phrase in the third person ("chases mice").
        icons: names of the icons that show it, best first (hyphens and trailing numbers do not matter).
    """

    word: str
    category: str
    colour: str
    size: str
    place: str
    detail: str
    deed: str
    icons: tuple[str, ...]

    @property
    def is_plural(self) -> bool:
        """Whether the word takes a plural verb ("the scissors are")."""
        return self.word in PLURAL_WORDS

    @property
    def phrase(self) -> str:
        """The word with its article: "a cat", "an elephant", "the sun", "grapes", "bread"."""
        if self.word in PLURAL_WORDS or self.word in UNCOUNTABLE_WORDS:
            return self.word
        if self.word in UNIQUE_WORDS:
            return f"the {self.word}"
        return f"{article(self.word)} {self.word}"

    @property
    def be(self) -> str:
        """ "is" or "are"."""
        return "are" if self.is_plural else "is"

    @property
    def do(self) -> str:
        """ "does" or "do"."""
        return "do" if self.is_plural else "does"


def article(noun: str) -> str:
    """The indefinite article for `noun`."""
    return "an" if noun[0] in "aeiou" else "a"


# word | colour | size | place | detail | deed | icons
_TABLE = {
    "animal": """
cat | grey | small | in the house | four | chases mice | cat, cat-face
dog | brown | small | in the house | four | barks at strangers | dog, dog-face
horse | brown | big | on a farm | four | runs fast | horse, horse-face
cow | white | big | on a farm | four | gives milk | cow, cow-face
pig | pink | big | on a farm | four | rolls in the mud | pig, pig-face
sheep | white | big | on a farm | four | gives wool | ewe, sheep
rabbit | grey | small | in the garden | four | hops around | rabbit, rabbit-face
mouse | grey | small | in the house | four | eats crumbs | mouse, mouse-face
monkey | brown | small | in the jungle | two | climbs trees | monkey, monkey-face
chicken | white | small | on a farm | two | lays eggs | chicken, rooster
frog | green | small | in the pond | four | jumps into the water | frog, frog-face
snake | green | small | in the grass | zero | slides over the ground | snake
turtle | green | small | in the pond | four | walks very slowly | turtle
fish | blue | small | in the sea | zero | swims in the water | fish, tropical-fish
whale | blue | big | in the sea | zero | sings under water | whale, spouting-whale
elephant | grey | big | in the jungle | four | drinks with its trunk | elephant
penguin | black | small | on the ice | two | slides over the ice | penguin
snail | brown | small | in the garden | zero | carries its house | snail
bee | yellow | small | in the garden | six | makes honey | honeybee, bee
octopus | red | big | in the sea | eight | hides under rocks | octopus
""",
    "food": """
banana | yellow | small | in the kitchen | sweet | grows on a plant | banana
strawberry | red | small | in the garden | sweet | grows near the ground | strawberry
watermelon | green | big | on the market | sweet | is full of water | watermelon
grapes | purple | small | on the market | sweet | grow in bunches | grapes
cherries | red | small | on the market | sweet | hang in pairs | cherries
peach | orange | small | on the market | sweet | has a soft skin | peach
apple | red | small | in the kitchen | sweet | falls from the tree | red-apple
lemon | yellow | small | in the kitchen | sour | makes a sour drink | lemon
pineapple | brown | big | on the market | sweet | has green leaves | pineapple
tomato | red | small | in the garden | fresh | makes a red sauce | tomato
eggplant | purple | big | in the garden | bitter | grows in warm places | eggplant, aubergine
corn | yellow | big | in the field | sweet | grows very tall | ear-of-corn, ear-of-maize
bread | brown | big | at the bakery | salty | comes from the oven | bread
cheese | yellow | small | in the fridge | salty | is made of milk | cheese-wedge
hamburger | brown | small | at the restaurant | salty | fills the stomach | hamburger
pizza | red | big | at the restaurant | salty | comes from the oven | pizza, slice-of-pizza
doughnut | pink | small | at the bakery | sweet | has a hole | doughnut
cookie | brown | small | at the bakery | sweet | breaks into crumbs | cookie
""",
    "vehicle": """
bicycle | blue | small | on the road | two | goes without a motor | bicycle
bus | yellow | big | on the road | four | carries many people | bus, oncoming-bus
car | red | small | on the road | four | carries a family | automobile, oncoming-automobile
tractor | green | big | in the field | four | pulls the plough | tractor
airplane | white | big | in the air | three | flies over the clouds | airplane, small-airplane
rocket | white | big | in space | zero | flies to the moon | rocket
ship | grey | big | on the sea | zero | crosses the ocean | ship, passenger-ship
sailboat | white | small | on the lake | zero | needs the wind | sailboat
helicopter | red | small | in the air | zero | flies without wings | helicopter
train | black | big | on the rails | many | stops at the station | locomotive, steam-locomotive
ambulance | white | big | at the hospital | four | brings sick people | ambulance
""",
    "object": """
key | gold | small | in the pocket | opening doors | opens the door | key, old-key
hammer | grey | small | in the workshop | hitting nails | hits nails | hammer
scissors | red | small | in the drawer | cutting paper | cut paper | scissors, black-scissors
clock | gold | small | on the wall | telling the time | shows the time | mantelpiece-clock, alarm-clock
umbrella | purple | small | in the rain | staying dry | keeps people dry | umbrella-with-rain-drops, umbrella, closed-umbrella
book | red | small | in the library | reading stories | tells a story | closed-book, green-book
guitar | brown | big | on the stage | playing songs | makes music | guitar
violin | brown | small | on the stage | playing songs | makes music | violin
trumpet | gold | small | on the stage | playing songs | makes loud music | trumpet
telephone | red | small | in the office | calling friends | rings loudly | telephone, black-telephone
camera | black | small | in the bag | taking pictures | takes pictures | camera
balloon | red | small | at the party | having a party | floats up | balloon
bell | gold | small | in the church | calling people | rings loudly | bell
crown | gold | small | in the palace | showing a king | sits on the head of a king | crown
glasses | black | small | on the nose | seeing better | help the eyes | glasses, eyeglasses
""",
    "nature": """
sun | yellow | big | in the sky | in the day | shines warmly | sun, sun-with-face, sun-with-rays, black-sun-with-rays
moon | white | big | in the sky | at night | shines softly | crescent-moon, full-moon, last-quarter-moon
star | gold | small | in the sky | at night | shines softly | star, glowing-star, white-medium-star
cloud | white | big | in the sky | before the rain | brings rain | cloud
rainbow | red | big | in the sky | after the rain | has many colours | rainbow
snowflake | white | small | on the window | in winter | melts in the sun | snowflake
cactus | green | big | in the desert | in dry places | needs little water | cactus
mushroom | red | small | in the forest | in autumn | grows under trees | mushroom
fire | orange | big | in the camp | in the camp at night | burns wood | fire
tulip | pink | small | in the garden | in spring | opens in spring | tulip
rose | red | small | in the garden | in summer | smells sweet | rose
""",
}


def _parse_table() -> tuple[Concept, ...]:
    concepts = []
    for category, rows in _TABLE.items():
        for row in rows.strip().splitlines():
            word, colour, size, place, detail, deed, icons = (field.strip() for field in row.split("|"))
            names = tuple(name.strip() for name in icons.split(","))
            concepts.append(Concept(word, category, colour, size, place, detail, deed, names))
    return tuple(concepts)


CONCEPTS: tuple[Concept, ...] = _parse_table()

# Every question about these is held out; their facts appear in the stage-0 sentences only. A fifth of each category.
HELDOUT_TEXT_WORDS = frozenset(
    {
        "horse",
        "frog",
        "whale",
        "bee",
        "strawberry",
        "lemon",
        "bread",
        "doughnut",
        "tractor",
        "ship",
        "scissors",
        "trumpet",
        "telephone",
        "cloud",
        "tulip",
    }
)
