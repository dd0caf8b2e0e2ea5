"""The vocabulary of the scenes: nouns, colours, backgrounds, and the little grammar that captions need."""

from __future__ import annotations

# Caption name -> emojibase label, where the two differ. A bare name is its own label.
_NOUNS = """
monkey=monkey face, dog=dog face, fox, cat=cat face, lion, tiger=tiger face, horse=horse face, unicorn, zebra,
cow=cow face, pig=pig face, sheep=ewe, camel, giraffe, elephant, mouse=mouse face, rabbit=rabbit face, hedgehog,
bat, bear, koala, panda, chicken, chick=hatching chick, penguin, duck, owl, flamingo, parrot, frog, crocodile,
turtle, snake, dragon=dragon face, whale=spouting whale, dolphin, fish=tropical fish, shark, octopus, shell=spiral
shell, crab, snail, butterfly, bee=honeybee, ladybug=lady beetle, spider, rose, sunflower, tulip, tree=deciduous
tree, palm tree, cactus, shamrock, maple leaf, mushroom, grapes, watermelon, tangerine, lemon, banana, pineapple,
apple=red apple, pear, peach, cherries, strawberry, kiwi=kiwi fruit, tomato, coconut, avocado, eggplant, carrot,
pepper=bell pepper, broccoli, croissant, cheese=cheese wedge, hamburger, pizza, hot dog, popcorn, rice ball,
doughnut, cookie, cake=birthday cake, cupcake, pie, candy, lollipop, teapot, wine glass, beer=beer mug, volcano,
house, castle, tent, train=bullet train, bus=oncoming bus, taxi, car=automobile, tractor, anchor, sailboat,
airplane, rocket, flying saucer, moon=crescent moon, sun, planet=ringed planet, star, cloud, rainbow, umbrella,
snowflake, snowman=snowman without snow, fire, droplet, pumpkin=jack-o-lantern, christmas tree=Christmas tree,
balloon, gift=wrapped gift, soccer ball, baseball, basketball, volleyball, boxing glove, crystal ball, game die,
puzzle piece, teddy bear, heart=heart suit, spade=spade suit, glasses, sunglasses, t-shirt, scarf, dress, backpack,
running shoe, high-heeled shoe, crown, top hat, ring, gem=gem stone, megaphone, bell, microphone,
headphones=headphone, saxophone, guitar, drum, telephone, battery, laptop, camera, television, candle, light bulb,
book=closed book, money bag, envelope, package, pencil, paintbrush, briefcase, scissors, key, hammer, bomb, shield,
wrench, gear, magnet, pill, door, chair, basket, bucket, soap, toothbrush
"""
NOUNS: dict[str, str] = {
    name.strip(): (label or name).strip()
    for name, _, label in (entry.partition("=") for entry in _NOUNS.replace("\n", " ").split(","))
}
OBJECTS: tuple[str, ...] = tuple(NOUNS)

# Object colours are hues (degrees): a one-hue sprite is turned until its dominant hue is this one.
COLOURS: dict[str, float] = {
    "red": 0.0,
    "orange": 28.0,
    "yellow": 52.0,
    "green": 125.0,
    "blue": 215.0,
    "purple": 272.0,
    "pink": 325.0,
}
COLOUR_NAMES: tuple[str, ...] = tuple(COLOURS)

# Sprites of mostly one hue, which may be recoloured, and the name of their own colour.
_OWN_COLOURS = {
    "red": "apple tomato heart balloon scarf backpack high-heeled_shoe boxing_glove telephone book magnet teapot "
    "octopus rose car",
    "orange": "crab fox tent fire pumpkin maple_leaf basketball carrot tangerine",
    "yellow": "star moon sun crown bell key lemon banana saxophone chick cheese taxi",
    "green": "frog snake cactus shamrock tree pear pepper puzzle_piece broccoli",
    "blue": "umbrella droplet dress bucket running_shoe dolphin t-shirt gem butterfly",
    "purple": "eggplant grapes",
    "pink": "flamingo tulip pig soap",
}
OWN_COLOUR: dict[str, str] = {
    name.replace("_", " "): colour for colour, names in _OWN_COLOURS.items() for name in names.split()
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (205, 65, 60),
    "orange": (238, 150, 62),
    "yellow": (246, 216, 88),
    "green": (96, 172, 92),
    "blue": (82, 134, 214),
    "purple": (142, 98, 190),
    "pink": (244, 164, 194),
    "white": (246, 246, 246),
    "gray": (150, 150, 154),
    "black": (36, 36, 40),
}
BACKGROUND_NAMES: tuple[str, ...] = tuple(BACKGROUNDS)

# How a background is filled; the first two are not textures.
FILLS: tuple[str, ...] = (
    "plain",
    "shaded",
    "striped",
    "checkered",
    "dotted",
    "wavy",
    "brick",
    "cloudy",
    "marbled",
    "speckled",
)

COUNT_WORDS: dict[int, str] = {2: "two", 3: "three", 4: "four"}

_IRREGULAR = {
    "mouse": "mice",
    "wolf": "wolves",
    "fish": "fish",
    "sheep": "sheep",
    "octopus": "octopuses",
    "maple leaf": "maple leaves",
    "game die": "game dice",
}
# Names that are plural or uncountable already take no article and stand as they are.
_PLURAL = {"grapes", "cherries", "glasses", "sunglasses", "headphones", "scissors"}
UNCOUNTED = _PLURAL | {"popcorn", "cheese", "broccoli", "soap", "fire"}


def article(phrase: str) -> str:
    """`apple` -> `an apple`; `blue scissors` -> `blue scissors`."""
    if any(phrase.endswith(word) for word in _PLURAL):
        return phrase
    vowel = phrase[0] in "aeiou" and not phrase.startswith(("uni", "eu"))
    return ("an " if vowel else "a ") + phrase


def plural(name: str) -> str:
    """`fox` -> `foxes`, `butterfly` -> `butterflies`."""
    if name in _IRREGULAR:
        return _IRREGULAR[name]
    if name in _PLURAL:
        return name
    if name.endswith(("s", "x", "ch", "sh", "tomato")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"
