"""What FrameForge can draw and how it is called: sprites, colours, textures, sizes."""

COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 20),
    "yellow": (250, 224, 50),
    "green": (40, 170, 70),
    "blue": (40, 90, 220),
    "purple": (140, 60, 180),
    "pink": (250, 130, 190),
    "white": (245, 245, 245),
}
COLOUR_NAMES = tuple(COLOURS)
TEXTURES = ("plain", "striped", "dotted", "checked")
SIZES = ("small", "large")
HALF_SIZES = (0.085, 0.13)
# half of a sprite's height, as a share of the canvas
CAPTION_HALF_HEIGHT = 0.085

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
DIGITS = tuple("0123456789")
WORDS = (
    "apple", "bird", "boat", "book", "bread", "cake", "cat", "chair", "cloud", "corn", "dog", "door", "duck", "fish", "flag",
    "frog", "goat", "gold", "horse", "house", "king", "lamp", "leaf", "lion", "milk", "moon", "nest", "queen", "rain", "ship",
    "snow", "tree",
)  # fmt: skip
NUMBERS = tuple(str(number) for number in range(10, 100))

SPRITES = SHAPES + DIGITS + WORDS + NUMBERS
NUM_OBJECT_SPRITES = len(SHAPES) + len(DIGITS)
FIRST_WORD = NUM_OBJECT_SPRITES
FIRST_NUMBER = FIRST_WORD + len(WORDS)


def sprite_noun(sprite: int) -> str:
    """How a question calls an object sprite: `circle`, `digit 7`."""
    name = SPRITES[sprite]
    return f"digit {name}" if name in DIGITS else name
