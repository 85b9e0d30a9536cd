"""A seeded grammar of small stories that knows how much each story says, in nats.

Each genre is a program that picks words as it goes.  The text of every pick lands in the story
where the pick is made, and no option of a pick begins another, so the same program run over a
finished story recovers its picks: no two runs tell the same story in different ways, and
-log p(text) is exactly the sum of -log p over the picks.  Its mean over many stories estimates
the entropy of the genre, the loss below which no language model can go.

  python scripts/story_grammar.py village 1 2 3
"""

from __future__ import annotations

import math
import random
import re
import sys
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any, NamedTuple


class Story(NamedTuple):
  """A story and its information content, -log p(text), in nats."""

  text: str
  nats: float


class Teller:
  """Tells a story by the luck of a generator, or retells a finished one and checks every word.

  Attributes:
    text: the story so far.
    nats: what its picks say so far, -log p(text), in nats.
    memory: what a later passage can recall or pick from, by name.
  """

  def __init__(self, source: random.Random | str):
    self.source = source
    self.text = ""
    self.nats = 0.0
    self.memory: dict[str, Any] = {}

  def pick(self, options: Collection[Any] | Mapping[Any, float]) -> Any:
    """Append one option's text and return that option; a mapping gives weights, else equal."""
    # Sorted, all that lies between a text and a longer one it begins starts with it as well, so
    # neighbors are enough to compare.  Equal texts count: a reader could not tell them apart.
    for text, following in pairwise(sorted(map(str, options))):
      if following.startswith(text):
        raise ValueError(f"option {text!r} begins option {following!r}")
    weights = options if isinstance(options, Mapping) else dict.fromkeys(options, 1)
    if isinstance(self.source, str):
      at = len(self.text)
      fits = [option for option in weights if self.source.startswith(str(option), at)]
      if len(fits) != 1:
        wanted = " or ".join(repr(str(option)) for option in weights)
        raise ValueError(f"position {at}: {self.source[at : at + 20]!r} where {wanted} belongs")
      choice = fits[0]
    else:
      choice = self.source.choices(list(weights), list(weights.values()))[0]
    self.text += str(choice)
    self.nats -= math.log(weights[choice] / sum(weights.values()))
    return choice

  def say(self, text: str) -> None:
    """Append fixed text: a pick with one option, which costs 0 nats."""
    self.pick([text])

  def narrate(self, passage: str) -> None:
    """Append a passage in which some words are picked and others recalled.

    [red|blue] picks; [coat: red|blue] also remembers the pick, for {coat} to recall.  [coat:
    COLORS] picks from the list remembered as COLORS, less what is used already, so that two ports
    of one story are two.  White space counts as one space; a slash starts a paragraph.
    """
    flat = re.sub(r" ?/ ?", "\n", re.sub(r"\s+", " ", passage))
    for part in re.split(r"(\[.*?\])", flat):
      if slot := re.fullmatch(r"\[(?:(\w+): )?(.*)\]", part):
        name, options = slot.groups()
        if options in self.memory:
          used = list(self.memory.values())
          choice = self.pick([option for option in self.memory[options] if option not in used])
        else:
          choice = self.pick(
            [option.strip().format(**self.memory) for option in options.split("|")]
          )
        if name:
          self.memory[name] = choice
      else:
        self.say(part.format(**self.memory))


def pools(listing: str) -> dict[str, list[str]]:
  """The lists of "FRUITS: plum|pear COLORS: red|blue", by name."""
  fields = re.split(r"\s*([A-Z]+): ", listing.strip())[1:]
  return {
    name: [option.strip() for option in options.split("|")]
    for name, options in zip(fields[::2], fields[1::2], strict=True)
  }


# ---- village: warm, in the past tense, with talk in quotes and a moral ----


class Character(NamedTuple):
  """A villager, introduced as "Bruno the bear" and called by name from then on."""

  name: str
  he: str
  He: str
  him: str
  his: str
  role: str = ""

  def __str__(self) -> str:
    return f"{self.name} the {self.role}" if self.role else self.name


def people(listed: str, he: str, him: str, his: str) -> list[Character]:
  """The characters listed as "Granny Fern|Bruno the bear"."""
  split = [entry.partition(" the ") for entry in listed.split("|")]
  return [Character(name, he, he.capitalize(), him, his, role) for name, _, role in split]


SHE, HE = ("she", "her", "her"), ("he", "him", "his")
GIRLS = people("Mia|Rosa|Elsie|Nell|Tilly|Ivy|Poppy|Clara|Hattie|June|Dora|Maud|Lena|Greta", *SHE)
BOYS = people("Tom|Ned|Oscar|Felix|Jasper|Hugo|Milo|Arlo|Walter|Bertie|Finn|Sam|Leo|Otis", *HE)
HELPERS = [
  *people("Mrs. Plum the baker|Miss Wren the teacher|Granny Fern|Aunt Sorrel the weaver", *SHE),
  *people("Hazel the owl|Juniper the goat|Martha the goose|Old Bess the horse", *SHE),
  *people("Mr. Finch the postman|Uncle Bram the miller|Tobias the shepherd|Grandpa Reed", *HE),
  *people("Bruno the bear|Barnaby the badger|Rufus the dog|Mayor Bell", *HE),
]
# Children lead most stories; an animal may bear any name.
KINDS = {"girl": 5, "boy": 5, "rabbit": 1, "hedgehog": 1, "mouse": 1, "fox": 1, "squirrel": 1}

# Lists that passages share, so that a small model meets each word often and in many places.
VILLAGE = {
  "HELPERS": HELPERS,
  **pools("""
  WHEN: On Monday|On Tuesday|On Wednesday|On Thursday|On Friday|On Saturday|On Sunday|At dawn|
    At noon|After lunch|One morning|One afternoon|One evening|Before breakfast
  TOWNS: Appleby|Mossbrook|Fernhill|Honeywell|Marlow|Willowmere|Larkfield|Puddleton|Goosefield|
    Cloverton|Five Elms|Dunmore
  PLACES: mill|barn|church|school|bakery|bridge|oak tree|inn|tower|well|haystack|stable|hill|gate|
    garden wall|market
  TOOLS: ladder|rope|broom|lantern|basket|spoon|blanket|bucket|drum|hat|wagon|kettle|fiddle|net|
    stick|pillow|teapot|barrel
  FOODS: bread|honey|soup|jam|cheese|toast|cocoa|plums|nuts|pancakes|porridge|cookies|carrots|
    berries|pears|dumplings
  JOYS: songs|puddles|stars|frogs|buttons|snow|riddles|drums|secrets|feathers|clouds|maps|marbles|
    rain|bees|hats
  COLORS: red|yellow|green|blue|purple|pink|striped|spotted|silver|white
  FAIRS: spring|harvest|winter|summer|cheese|turnip
  BEASTS: cat|dog|goose|cow|pig|hen|frog|mole|crow|goat|snail|duck|bat|lamb|puppy|toad
  MANNERS: greedy|sly|fat|sleepy|rude|muddy|grumpy|noisy|tiny|clumsy|fluffy|bold
  COUNTS: two|three|four|five|six|seven|eight|nine|ten
  MOODS: sad|cross|tired|worried|lonely|glum|upset|puzzled|gloomy|pale
  SIGHED: sighed|sobbed|said|whispered|cried|sniffed|groaned|mumbled|wailed|muttered
  SADLY: sadly|softly|bitterly|glumly|crossly|nervously|sulkily|gloomily|weakly|miserably
  SMILED: said|laughed|smiled|sang|replied|grinned|chuckled|answered
  KINDLY: kindly|warmly|gently|brightly|cheerfully|merrily|wisely|calmly|happily|proudly
  """),
}

LIVED = """[Once upon a time|Long ago|One winter|One summer|One spring|One autumn] in [town: TOWNS]
  there lived a [little|cheerful|curious|shy|clever|merry|stubborn|gentle|bouncy|dreamy|brave] """
WISHED = """ who loved [treat: FOODS], [joy: JOYS] and [JOYS]. {hero.He} [wanted|wished|hoped|
  longed|meant] to """
MEET = """[Just then|Soon|Before long|A moment later|By luck|At last] [helper: HELPERS] came by
  with a [COLORS] [tool: TOOLS]. "Why so [MOODS], {hero}?" /"""
CHEER = """/ [That night|Later|Then|Afterward|To celebrate,] they [shared|enjoyed|had|feasted on]
  {treat} by the [PLACES], and {hero} [knew|learned|saw|never forgot|told everyone] that"""

# What the hero wants is the shape of the plot, and its first words name the plot.
WISHES = {
  "fly a ": """[color: COLORS] kite over the [PLACES]. / [WHEN] a [wild|strong|naughty|cold|silly|
  sudden] wind hung the {color} kite on the [perch: PLACES]. {hero} [jumped|shouted|hopped|waved|
  pulled|whistled|stamped] [SADLY], but it stayed there. MEET "My kite is on the {perch}," {hero}
  [SIGHED]. "[Then up we go|I love to climb|Leave it to me|We can reach it|Hold on tight]!"
  [SMILED] {helper.name} [KINDLY]. With the {tool} and [COUNTS] [big|tall|mighty|wobbly] [jumps|
  pokes|tugs|hops], they got it down. CHEER [asking for help is brave|nobody is tall enough alone|
  two friends reach higher than one|trouble shrinks when you share it|even the wind can be
  beaten].""",
  "bake a ": """[fruit: plum|cherry|pear|peach|blackberry|pumpkin|mulberry|lemon] [dish: pie|tart|
  cake|pudding] for [guest: Grandma|the mayor|the twins|the teacher|Cousin Lily|Doctor Moss|the new
  neighbor]. / [WHEN] {hero.he} mixed the [butter|flour|sugar|milk|dough|eggs], but a [MANNERS]
  [BEASTS] had eaten every {fruit}! {hero} [sat|stood|waited|sulked|shivered] [SADLY] behind the
  [PLACES]. MEET "I have not one {fruit} for the {dish}," {hero} [SIGHED]. "[Take some of mine|I
  picked too many|Follow me|Dry your eyes]!" [SMILED] {helper.name} [KINDLY]. With the {tool} they
  [picked|found|gathered|fetched] more in {helper.his} [garden|orchard|cellar|yard], and soon
  {guest} had [COUNTS] slices. CHEER [a shared {dish} tastes sweeter|there is plenty when everyone
  gives|a good friend is better than a full pantry|sharing fills more than the belly|giving is the
  best spice].""",
  "grow the ": """[biggest|finest|grandest|proudest|loveliest|tallest] [plant: sunflower|pumpkin|
  cabbage|rosebush|turnip|beanstalk|cherry tree] in {town}. / [WHEN] {hero.he} put a seed by the
  [spot: PLACES] and [sang|read|talked|whistled|bowed] to it [KINDLY]. But up came only a [rusty|
  broken|muddy|tiny|wet|bent] [TOOLS]. MEET "My seed is [broken|lazy|asleep|lost|late|bored],"
  {hero} [SIGHED] [SADLY]. "[Roots come first|Good things are slow|It is busy underground|Seeds
  have no clocks]," [SMILED] {helper.name}, and hung the {tool} on a [COLORS] [pole|post|fence] to
  scare the [crow|goat|slug|cow|hen]. After [COUNTS] weeks the {plant} grew [past|over|around|
  above] the {spot}! CHEER [good things take time|patience is a kind of sunshine|small seeds keep
  big secrets|waiting is also work|every giant was once small].""",
  "spend a night ": """[by|behind|near|beside] the [spot: PLACES]. / [WHEN] {hero.he} packed a
  [COLORS] [tent|pillow|blanket|candle] and some [FOODS]. In the dark something went [noise:
  scritch scratch|thump thump|rustle rustle|tap tap|hoo hoo|drip drop|squeak squeak]. "A [monster|
  ghost|giant|dragon|wolf|witch|troll]!" {hero} [SIGHED]. MEET "Something went {noise}," {hero}
  said [SADLY]. "[Let us look|We shall say hello|Hold my sleeve|Two are braver than one]," [SMILED]
  {helper.name}. They [crept|tiptoed|crawled|marched] past the {spot} with the {tool} and found a
  [MANNERS] [guest: BEASTS] [with hiccups|in a scarf|chewing straw|dancing alone|stuck in a pot].
  CHEER [most monsters are only lonely|friends chase fear away|brave hearts may tremble|the dark is
  just a {guest} away from funny|nights are short with a friend].""",
  "find a ": """[true|new|best|real|good] friend. / [day: WHEN] {hero.he} heard a voice by the
  [spot: PLACES]. "[Help|Oh dear|Hello|Bother|Ouch]!" It was [friend: Bramble|Button|Pepper|Nutmeg|
  Biscuit|Dumpling|Pickle|Tansy], a [MANNERS] [beast: BEASTS] stuck under a [tool: TOOLS]. {hero}
  pulled the {beast} out [KINDLY]. "[One day I will help you|I never forget a kindness|I owe you
  one|You are as good as honey]!" [SMILED] {friend}. / [WHEN] {hero} got lost near the [PLACES] and
  [SIGHED] [SADLY]. Then came a [rattle|song|tap|shout|whistle]. "[This way|Follow me|Here I am|
  Look up]!" It was {friend} with the {tool}! The {beast} led {hero.him} back to the {spot}. CHEER
  [kindness finds its way back|the smallest friend can be the biggest help|to find a friend you
  must be one|a {beast} can be a hero].""",
  "win the ": """[race: cart|sled|raft|wagon|pony|donkey|sack] race at the [FAIRS] fair. /
  {hero.He} trained for [COUNTS] weeks [behind|around|near] the [PLACES] in a [COLORS] cap. Then a
  [MANNERS] [BEASTS] [ate|hid|stole|sat on|chewed] {hero.his} [lucky: boots|gloves|socks|goggles|
  mittens]. MEET "I cannot win without my {lucky}," {hero} [SIGHED] [SADLY]. "[Then win with my|
  Borrow my|You only need a|Luck lives in this] {tool}!" [SMILED] {helper.name} [KINDLY]. So,
  {tool} and all, {hero} [bumped|bounced|wobbled|flew|rolled] past the [PLACES] and came in
  [second|third|fourth|last]. How {town} cheered! CHEER [finishing is also winning|the best prize
  is a friend|laughing beats being first|it is fine to lose when you try|luck is only courage in a
  hat].""",
  "learn to ": """[skill: whistle|skate|swim|juggle|dance|yodel|sing|cartwheel]. / [WHEN] {hero.he}
  tried by the [PLACES] and [scared|woke|bumped|splashed|upset|flattened] a [MANNERS] [BEASTS]. "I
  will never {skill}!" {hero} [SIGHED] [SADLY]. MEET {hero} told the [whole|sad|short|silly|long]
  story. "[I fell a hundred times|My own start was worse|Mistakes are just steps|Nobody begins at
  the end]," [SMILED] {helper.name} [KINDLY]. With the {tool} to keep time, they practiced for
  [COUNTS] [days|nights|weeks|Sundays]. At the [FAIRS] fair {hero} could {skill} so well that a
  [COLORS] [BEASTS] [clapped|bowed|joined in|wept|fainted]. CHEER [every master was once a
  beginner|practice is slow magic|falling is part of learning|a kind teacher is worth gold|it is
  never too late to {skill}].""",
}


def village(t: Teller) -> None:
  """A wish, a trouble, a helper, a mend and a moral."""
  t.memory |= VILLAGE
  t.narrate(LIVED)
  names = {"girl": GIRLS, "boy": BOYS}.get(t.pick(KINDS), GIRLS + BOYS)
  t.say(" named ")
  t.memory["hero"] = t.pick(names)
  t.narrate(WISHED)
  wish = t.pick(list(WISHES))
  t.narrate(WISHES[wish].replace("MEET", MEET).replace("CHEER", CHEER))


# ---- sea: a ship's log, terse and dated, in fragments and semicolons ----

# Winds by the compass, mostly westerly.
WINDS = {"NW": 4, "WNW": 3, "WSW": 3, "SW": 4, "SSW": 2, "NNW": 2, "NE": 1, "ENE": 1, "SE": 1}
SEA = pools("""
  RIGS: Brig|Schooner|Barque|Cutter|Ketch|Sloop|Whaler
  SHIPS: Petrel|Halcyon|Resolve|Black Swan|Mercury|Sea Otter|Constance|Wanderer|Thetis|Osprey|
    Fortune|Good Intent
  NAMES: Hale|Crowe|Vane|Ashby|Drummond|Teague|Lund|Rook|Pike|Tull|Mudge|Larsen|Quill|Sorley|
    Jessop|Bligh
  PORTS: Bristol|Lisbon|Cadiz|Bergen|Boston|Havana|Madeira|Tangier|Dublin|Riga|Naples|Salem
  GOODS: salt|tar|wool|copper|tea|cork|brandy|rope|sugar|iron|barley|candles|pepper|indigo|tin|
    silk
  STORES: biscuit|pork|peas|rum|limes|onions|flour|beans|pickles|ale|mustard|oatmeal|beef|suet
  PARTS: anchor|rudder|foremast|bowsprit|stove|bell|compass|pump|mainsail|topsail|jib|longboat|
    wheel|lantern|capstan|flag
  SKIES: rain|hail|haze|sleet|drizzle|thunder|clear|overcast|cold|squalls
  MONTHS: March|April|May|June|July|August|September|October
  RANKS: cook|bosun|gunner|carpenter|surgeon|cooper|mate|purser|pilot|sailmaker
  HOURS: dawn|noon|dusk|midnight|two bells|four bells|six bells|slack water
  POINTS: north|south|east|west|to larboard|to starboard|ahead|astern
  COUNTS: two|three|four|five|six|seven|nine|ten|twelve
  COLORS: black|gray|white|brown|green|speckled|crimson|tawny
  STATES: dry|damp|whole|sound|unclaimed|moldy|sold dear|half melted|warm
  BARGAINS: too small|too dear|stolen, we think|painted blue|made of cheese
  FATES: paid off|promoted|asleep|in love|in jail|drunk|bound home|hoarse|much admired|unrepentant
""")

CLEARED = """[RIGS] [ship: SHIPS], Captain [master: NAMES]. [home: PORTS] to [bound: PORTS] with
  [cargo: GOODS] and [rest: GOODS]. / """
SAILED = """, [COUNTS] knots, [SKIES]. [Weighed|Sailed|Warped out|Slipped cable|Cleared the mole]
  at [HOURS]. New [RANKS] [hand: NAMES] [owns a parrot|fears cats|cannot swim|writes verses|claims
  to smell land|prays loudly|was twice struck by lightning|whistles at table]. / """
RAISED = """Raised {bound}. """
CLOSED = """ {hand} [FATES]; {ship} [leaks but swims|wants paint|lies easy|for sale|smells of
  {cargo}]. [Log ends|God keep all such ships|Nothing further|Hands paid]."""

# Each trouble opens its entry by name; the second passage is what came of it in port.
TROUBLES = {
  "Gale. ": (
    """Carried away [first: PARTS], [second: PARTS] and [COUNTS] [hens|goats|sheep|pigs|ducks].
    Seas [green over|breaking at|higher than|swallowing] the [PARTS]. {hand} [lashed himself to|
    sang hymns to|swore at|would not leave|slept against] the [PARTS] till [HOURS]. {master} gave
    the {cargo} to the sea; {ship} [rose like a cork|steadied|shook herself|answered|groaned] and
    [lived|ran on|came about].""",
    """Landed {rest}, [STATES]; {cargo} lost. Bought new {first}, [BARGAINS], and second-hand
    {second}.""",
  ),
  "Sail astern. ": (
    """[Lugger|Frigate|Galley|Xebec|Corsair], [COLORS], [COUNTS] guns, no flag, gaining. Threw over
    [first: PARTS] and all [STORES] to run light. {hand} [tied|nailed|hung|lashed] a lamp to [a
    raft|a hen coop|a spare mast|a cask of {cargo}|the captain's bathtub] and set it adrift; turned
    [north|south|east|west|inshore|seaward], all dark, [no man to sneeze|pipes forbidden|goat
    muffled|praying]. By [HOURS] [enemy aground|horizon empty|enemy hull down|gunfire far off].
    {master} [laughed|slept|prayed|danced|shook every hand].""",
    """Landed {cargo} and {rest}, [STATES]. Lamp [charged to {hand}|not recovered|sorely missed|
    seen in a tavern]. Bought new {first}, [BARGAINS].""",
  ),
  "Smoke ashore. ": (
    """Island [POINTS], shaped like a [boot|pear|fist|hat|pig|bell]. Sent {hand} with [first:
    STORES]. Found one [guest: fiddler|botanist|schoolmaster|bishop|barber|poet|tailor|clockmaker],
    [COUNTS] years alone, [bearded to the knees|dressed in goatskin|brown as rope|polite as ever|
    talking to a crab]. Traded {cargo} for [sweet water|a pearl|a turtle|his hat|a chart]; he
    [wept|sang|ate the {first}|asked who is king|kissed the deck]. Named it [Hope|{master}|{hand}|
    Goat|Crab] Island.""",
    """Landed {guest} and {rest}, both [STATES]. [His sister fainted|Crowd cheered|Own tombstone
    much admired|Wife remarried|Nobody knew him].""",
  ),
  "Fog. ": (
    """Thick as [STORES]; lost sight of [PARTS] and [PARTS]. At [HOURS] heard a [sound: fiddle|dog|
    choir|flute|drum|baby|hymn] [POINTS]. {hand} [hailed|knelt|spat|sang back|loaded the gun|shut
    his eyes]: no answer. Sounded [COUNTS] fathoms, [mud|sand|shell|clay|coral|weed]. The {sound}
    [nearer|louder|all round|below us]. Then [sun|a breeze|stars|one clear minute], and close
    aboard a [ferry|wedding barge|lightship|herring fleet|royal yacht|church on a rock]. Traded
    {cargo} for [STORES].""",
    """Landed {rest}, [STATES], and the last of the {cargo}. Still hear the {sound} at [HOURS].""",
  ),
  "Cat missing. ": (
    """[cat: Admiral|Mustard|Old Tib|Duchess|Grapnel|Pudding], [COUNTS] years aboard. Searched
    [first: PARTS], [PARTS] and {master}'s [hat|boots|bunk|wig]: nothing. Rats ate the [STORES].
    {hand} blamed [the moon|a comet|the Dutch|the rum|Friday]. {master} offered [a guinea|double
    rum|his bunk|his sword]. At [HOURS] [mewing|purring|sneezing] behind the {cargo}: {cat} and
    [COUNTS] kittens, all [COLORS]. Three cheers. Smallest named [{master}|{hand}|Ballast|Bosun|
    Neptune].""",
    """Landed {cargo} and {rest}, [STATES] but [hairy|scratched|purring]. Kittens [sold to the
    governor|signed as crew|refuse to land|own the {first}].""",
  ),
  "Great shape below. ": (
    """[Whale|Eel|Squid|Serpent|Turtle], [COLORS], [COUNTS] fathoms long. {hand} swore it was [the
    devil|his uncle|a drowned island|an old friend|only weed]. It [blew|sang|sighed|rolled|winked]
    and broke the [first: PARTS]. Guns [damp|useless|forgotten|too small]. Fed it {cargo}, [STORES]
    and [STORES]; it [belched|smiled|wept|slept|begged for more]. Towed us [COUNTS] miles [north|
    south|east|west]. Named it [Susan|Old Hungry|Parliament|Bess|{hand}].""",
    """Landed {rest}, [STATES]; {cargo} eaten, {first} [in splinters|missing|never found]. Harbor
    master [laughed|fled|refused to write it down]. Beast [waits|waved|sings] off the bar.""",
  ),
}


def sea(t: Teller) -> None:
  """Three dated entries: sailing, a trouble, and what came of it in port."""
  t.memory |= SEA
  t.narrate(CLEARED)
  # Days run from 2 to 28: every month has them, and no day on offer begins another, as 1 does 12.
  day = t.pick(range(2, 13))
  t.narrate(" [month: MONTHS]. Wind ")
  t.pick(WINDS)
  t.narrate(SAILED)
  day = t.pick(range(day + 2, day + 7))
  t.narrate(" {month}. ")
  at_sea, in_port = TROUBLES[t.pick(list(TROUBLES))]
  t.narrate(at_sea + "/")
  t.pick(range(day + 5, day + 11))
  t.narrate(" {month}. " + RAISED + in_port + CLOSED)


GENRES = {"sea": sea, "village": village}


def write(genre: str, seed: int) -> Story:
  """The story of a genre and a seed, and its -log p(text) in nats: the same on every call."""
  teller = Teller(random.Random(f"{genre} {seed}"))
  GENRES[genre](teller)
  return Story(teller.text, teller.nats)


def read(genre: str, text: str) -> float:
  """-log p(text) in nats under a genre; ValueError where the text is no story of that genre."""
  teller = Teller(text)
  GENRES[genre](teller)
  if len(teller.text) < len(text):
    raise ValueError(f"position {len(teller.text)}: the story has ended, the text goes on")
  return teller.nats


if __name__ == "__main__":
  for seed in sys.argv[2:]:
    story = write(sys.argv[1], int(seed))
    print(f"{story.text}\n({story.nats:.1f} nats)\n")
