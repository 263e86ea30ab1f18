"""A synthetic shop: items with believable titles and histories with structure, made from a seed alone.

Nothing here was observed: no shop, brand or person stands behind it, and a figure measured on it says that the
machinery works, not how a method fares on real data.
"""

import math
import random
from bisect import bisect_right
from itertools import accumulate

import polars as pl

from llmrec.data.columns import ITEM, TIMESTAMP, TITLE, USER
from llmrec.exceptions import DataError

SYNTHETIC_NOTICE = (
    "This sample is synthetic: items, users and histories come from a seeded generator. Figures measured on it show "
    "that the pipeline works; they are no benchmark."
)

# Per department: brands, and two lines of products, each in the order in which people come to need them.
_DEPARTMENTS: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "Photo & Video": (
        ("Norvik", "Lumenta", "Optera", "Kestrel", "Halden"),
        {
            "Cameras": ("Mirrorless Camera", "50mm Prime Lens", "Carbon Tripod", "Camera Bag", "ND Filter Set"),
            "Drones": ("Camera Drone", "Flight Battery", "Propeller Guard Set", "Landing Pad", "Drone Backpack"),
        },
    ),
    "Music": (
        ("Tonwerk", "Baxley", "Rivera & Sons", "Ostinato", "Greenroom"),
        {
            "Guitars": ("Electric Guitar", "Practice Amp", "Overdrive Pedal", "Guitar Strap", "Nickel String Set"),
            "Turntables": ("Turntable", "Phono Preamp", "Bookshelf Speakers", "Speaker Stands", "Record Cleaning Kit"),
        },
    ),
    "Kitchen": (
        ("Casa Verano", "Brewsmith", "Pellegrin", "Hearthline", "Oak & Iron"),
        {
            "Coffee": ("Espresso Machine", "Burr Grinder", "Tamper Set", "Milk Pitcher", "Descaling Tablets"),
            "Baking": ("Stand Mixer", "Mixing Bowl", "Springform Pan", "Piping Tip Set", "Vanilla Extract"),
        },
    ),
    "Cycling & Running": (
        ("Velora", "Strider", "Altimo", "Pacewell", "Redfern"),
        {
            "Cycling": ("Road Bike", "Bike Helmet", "Clipless Pedals", "Cycling Shoes", "Chain Lube"),
            "Running": ("Running Shoes", "Running Socks", "Hydration Vest", "Foam Roller", "Energy Gel Box"),
        },
    ),
    "Outdoors": (
        ("Fjellmark", "Cairn Works", "Wildhaven", "Tarnbrook", "Summitry"),
        {
            "Camping": ("Two-Person Tent", "Sleeping Bag", "Sleeping Pad", "Camp Stove", "Gas Canister"),
            "Climbing": ("Climbing Harness", "Climbing Shoes", "Belay Device", "Dynamic Rope", "Chalk Refill"),
        },
    ),
    "Beauty": (
        ("Aurelle", "Botanica Nine", "Sable & Rose", "Mirelle", "Purelane"),
        {
            "Skin Care": ("Gentle Cleanser", "Hydrating Toner", "Vitamin C Serum", "Night Cream", "Mineral Sunscreen"),
            "Hair Care": ("Ionic Hair Dryer", "Round Brush", "Heat Protectant", "Repair Hair Mask", "Argan Hair Oil"),
        },
    ),
    "Garden & Workshop": (
        ("Fernhollow", "Greenacre", "Torquemade", "Ironbark", "Handley"),
        {
            "Gardening": (
                "Raised Garden Bed",
                "Potting Soil",
                "Heirloom Seed Kit",
                "Drip Irrigation Kit",
                "Plant Food",
            ),
            "Power Tools": ("Cordless Drill", "Drill Bit Set", "Spare Battery", "Tool Belt", "Workbench Clamp Set"),
        },
    ),
    "Books & Games": (
        ("Larkspur Press", "Moonlit Harbor", "Foxglove House", "Meeple Forge", "Sixth Lantern"),
        {
            "Fantasy Novels": (
                "Novel, Book One",
                "Novel, Book Two",
                "Novel, Book Three",
                "Companion Atlas",
                "Art Book",
            ),
            "Board Games": ("Board Game", "Sea Expansion", "Frost Expansion", "Neoprene Playmat", "Card Sleeves"),
        },
    ),
    "Pets": (
        ("Pawsome Farm", "Wagwell", "Tailspin", "Biscuit Lane", "Mossy Paw"),
        {
            "Dogs": ("Puppy Kibble", "Training Treats", "Rope Chew Toy", "Orthopedic Dog Bed", "Grooming Brush"),
            "Cats": ("Kitten Food", "Clumping Litter", "Scratching Post", "Feather Wand", "Cat Carrier"),
        },
    ),
    "Computing": (
        ("Keystrom", "Nullpoint", "Vantaq", "Pixelforge", "Corvid Labs"),
        {
            "Desk Setup": ("Mechanical Keyboard", "Gaming Mouse", "Desk Mat", "Wrist Rest", "Keycap Set"),
            "Home Network": (
                "Mesh Wi-Fi Router",
                "Network Switch",
                "Ethernet Cable Set",
                "NAS Enclosure",
                "Rack Shelf",
            ),
        },
    ),
}
_SERIES = (
    "Halo", "Ember", "Summit", "Meadow", "Cobalt", "Juniper", "Atlas", "Willow", "Orbit", "Sierra",
    "Nimbus", "Canyon", "Velvet", "Harbor", "Lunar", "Copper", "Aspen", "Breeze", "Onyx", "Prairie",
)  # fmt: skip
_CHAIN = 5  # products per line
_START = 1_672_531_200  # 2023-01-01
_DAY = 86_400

# What a user does next; the rest of the probability is a fresh choice by taste.
_FOLLOW_UP, _COMPLEMENT, _NOISE = 0.22, 0.06, 0.12


def make_sample(seed: int = 0, num_items: int = 1000, num_users: int = 3000) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Makes a shop and its users' histories; the same arguments give the same frames.

    A *family* is a brand's series in a department, such as Norvik Halo: two lines of five products. A user has a
    taste for few departments and brands, and at each step takes the next product of a series begun lately (follow-up),
    or begins the same family's other line (complement), or something popular (noise), or, by taste, a product that is
    mostly the first of its line. Departments, brands and series are unequally popular (Zipf). Nobody takes an item
    twice. Histories have 5 to 40 items, 12 on average.

    Args:
        seed: any integer.
        num_items: N, at least 100. Beyond 1,000, further families come with numbered series.
        num_users: at least 1.

    Returns:
        The interactions (user_id, item_id, timestamp in unix seconds), sorted by time, and the N items (item_id,
        title, brand, category, subcategory, collection, description, price), in no telling order.

    Raises:
        DataError: if a count is too small.
    """
    if num_items < 100 or num_users < 1:
        raise DataError(
            f"A sample of {num_items} items and {num_users} users has no room for structure. "
            "Ask for at least 100 items and one user."
        )
    random_ = _Random(seed)
    shop = _Shop(num_items, random_)
    users, taken, times = [], [], []
    for user in range(num_users):
        length = min(40, 5 + int(-math.log(1.0 - random_.random()) * 3.7 - math.log(1.0 - random_.random()) * 3.7))
        history = _history(shop, min(length, num_items // 2), random_)
        time = _START + random_.random() * 540 * _DAY
        for item in history:
            users.append(f"U{user:05d}")
            taken.append(shop.ids[item])
            times.append(int(time))
            time += 60 - math.log(1.0 - random_.random()) * 9 * _DAY
    interactions = pl.DataFrame({USER: users, ITEM: taken, TIMESTAMP: times}).sort(TIMESTAMP, maintain_order=True)
    return interactions, shop.table().sort(ITEM)


class _Random:
    """Draws that depend on nothing but `random.Random.random`, whose stream Python guarantees."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def pick(self, cumulative: list[float]) -> int:
        """An index, drawn by weights of which `cumulative` has the running sums."""
        return min(bisect_right(cumulative, self.random() * cumulative[-1]), len(cumulative) - 1)

    def shuffled(self, n: int) -> list[int]:
        return sorted(range(n), key=[self.random() for _ in range(n)].__getitem__)


class _Shop:
    """Items by place; `chain[item]` and `step[item]` say where an item stands, `at` the reverse."""

    def __init__(self, num_items: int, random_: _Random) -> None:
        self.rows: list[dict[str, object]] = []
        self.chain: list[int] = []
        self.step: list[int] = []
        self.at: list[list[int]] = []  # per chain, its items in order
        self.twin: list[int] = []  # per chain, the same family's other line
        self.chains_of: list[list[list[int]]] = [[[] for _ in brands] for brands, _ in _DEPARTMENTS.values()]
        families = math.ceil(num_items / (2 * _CHAIN))
        names = [random_.shuffled(len(_SERIES)) for _ in _DEPARTMENTS]
        for family in range(families):
            department, rest = family % len(_DEPARTMENTS), family // len(_DEPARTMENTS)
            self._add_family(department, rest % 5, rest, names[department], num_items, random_)
        self.ids = [f"P{code:05d}" for code in random_.shuffled(len(self.rows))]
        weights = [1.0 / (1 + place) ** 0.8 for place in random_.shuffled(len(self.rows))]
        self.popular = list(accumulate(weights))

    def _add_family(
        self, department: int, brand: int, rest: int, names: list[int], num_items: int, random_: _Random
    ) -> None:
        category, (brands, lines) = list(_DEPARTMENTS.items())[department]
        name, round_ = _SERIES[names[rest % len(names)]], rest // len(names)
        series = name if round_ == 0 else f"{name} {round_ + 1}"
        first_chain = len(self.at)
        for offset, (subcategory, products) in enumerate(lines.items()):
            chain = len(self.at)
            self.at.append([])
            self.twin.append(first_chain + 1 - offset)
            for step, product in enumerate(products):
                if len(self.rows) == num_items:
                    break
                price = (180.0, 60.0, 35.0, 25.0, 12.0)[step] * (0.5 + random_.random())
                self.at[chain].append(len(self.rows))
                self.chain.append(chain)
                self.step.append(step)
                self.rows.append(
                    {
                        TITLE: f"{brands[brand]} {series} {product}",
                        "brand": brands[brand],
                        "category": category,
                        "subcategory": subcategory,
                        "collection": f"{brands[brand]} {series}",
                        "description": f"Goes with everything from the {brands[brand]} {series} collection.",
                        "price": math.floor(price) + 0.99,
                    }
                )
            if self.at[chain]:
                self.chains_of[department][brand].append(chain)

    def table(self) -> pl.DataFrame:
        return pl.DataFrame(self.rows).insert_column(0, pl.Series(ITEM, self.ids))


def _history(shop: _Shop, length: int, random_: _Random) -> list[int]:
    departments = list(range(len(_DEPARTMENTS)))
    # Departments differ in popularity, and a user cares for one to three of them.
    popularity = [1.0 / (1 + department) ** 0.3 for department in departments]
    favourites = [random_.pick(list(accumulate(popularity))) for _ in range(3)]
    taste = list(accumulate((12.0 * favourites.count(d) + 0.3) for d in departments))
    brands = {d: [1.0 / (1 + brand) for brand in range(5)] for d in departments}
    for department in departments:
        brands[department][random_.below(5)] += 3.0  # the one that this user trusts
    history: list[int] = []
    owned: set[int] = set()
    while len(history) < length:
        item = _next(shop, history, owned, taste, brands, random_)
        if item is not None and item not in owned:
            history.append(item)
            owned.add(item)
    return history


def _next(
    shop: _Shop,
    history: list[int],
    owned: set[int],
    taste: list[float],
    brands: dict[int, list[float]],
    random_: _Random,
) -> int | None:
    """A candidate for the next item, which the user may own already; None where a branch has nothing to offer."""
    draw = random_.random()
    if draw < _NOISE:
        return random_.pick(shop.popular)
    if history and draw < _NOISE + _FOLLOW_UP:
        recent = history[-1 - min(random_.below(3) * random_.below(2), len(history) - 1)]
        later = [item for item in shop.at[shop.chain[recent]][shop.step[recent] + 1 :] if item not in owned]
        return later[0] if later else None
    if history and draw < _NOISE + _FOLLOW_UP + _COMPLEMENT:
        twin = shop.twin[shop.chain[history[-1]]]
        fresh = [item for item in shop.at[twin] if item not in owned] if twin < len(shop.at) else []
        return fresh[0] if fresh else None
    department = random_.pick(taste)
    chains = shop.chains_of[department][random_.pick(list(accumulate(brands[department])))]
    if not chains:
        return None
    chain = chains[random_.pick(list(accumulate(1.0 / (1 + place) ** 0.7 for place in range(len(chains)))))]
    step = random_.pick([0.55, 0.7, 0.8, 0.9, 1.0])
    return shop.at[chain][min(step, len(shop.at[chain]) - 1)]
