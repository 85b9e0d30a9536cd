"""The story grammar: stories read back to the nats they were written with, and read well."""

import functools
import math
import random
import re
import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from story_grammar import GENRES, Teller, read, write

BOTH = pytest.mark.parametrize("genre", list(GENRES))


@functools.cache
def stories(genre):
  return [write(genre, seed) for seed in range(500)]


def vocabulary(genre):
  return {word for story in stories(genre) for word in re.findall(r"[a-z']+", story.text.lower())}


@BOTH
def test_story_is_a_function_of_genre_and_seed(genre):
  random.seed(1)
  assert [write(genre, seed) for seed in range(20)] == stories(genre)[:20]


@BOTH
def test_parser_recovers_nats_of_writer(genre):
  for story in stories(genre)[:300]:
    assert read(genre, story.text) == pytest.approx(story.nats, abs=1e-9)


@BOTH
def test_options_are_unambiguous(genre):
  """No word can be taken for another option."""
  text = stories(genre)[0].text
  for word in re.finditer(r"\w+", text):
    with pytest.raises(ValueError, match="position"):
      read(genre, f"{text[: word.start()]}xylophone{text[word.end() :]}")


@BOTH
def test_one_changed_name_is_detected(genre):
  text = stories(genre)[0].text
  name = re.search(r"named (\w+)" if genre == "village" else r"Captain (\w+)", text)[1]
  other = {"village": ["Mia", "Tom"], "sea": ["Hale", "Vane"]}[genre][name in ("Mia", "Hale")]
  with pytest.raises(ValueError, match="position"):
    read(genre, text.replace(name, other, 1))


@BOTH
def test_spaces_and_newlines_matter(genre):
  text = stories(genre)[0].text
  other = next(g for g in GENRES if g != genre)
  for changed in (text[:-1], text + "\n", " " + text, text.replace("\n", " ", 1), ""):
    with pytest.raises(ValueError, match="position"):
      read(genre, changed)
  with pytest.raises(ValueError, match="position 0"):
    read(other, text)


def test_swapped_pick_changes_nats_by_its_odds():
  # Kinds of hero weigh 5 or 1, and a rabbit may bear twice as many names as a girl.
  story = next(s for s in stories("village") if re.search(r"girl named", s.text))
  rabbit = read("village", story.text.replace("girl named", "rabbit named", 1))
  assert rabbit - story.nats == pytest.approx(math.log(5) + math.log(2), abs=1e-9)


def test_picks_follow_their_weights():
  odds = {"calm": 1, "gale": 3}
  nats = {}
  for text in odds:
    teller = Teller(text)
    assert teller.pick(odds) == text
    nats[text] = teller.nats
  assert sum(math.exp(-n) for n in nats.values()) == pytest.approx(1)
  assert nats["gale"] == pytest.approx(-math.log(3 / 4))

  rng = random.Random(0)
  drawn = [Teller(rng).pick(odds) for _ in range(2000)]
  assert drawn.count("gale") / 2000 == pytest.approx(3 / 4, abs=0.03)


@pytest.mark.parametrize("source", [random.Random(0), "oak tree"])
@pytest.mark.parametrize("options", [["oak", "elm", "oak tree"], ["oak", "oak"], ["", "oak"]])
def test_ambiguous_options_are_rejected(source, options):
  with pytest.raises(ValueError, match="begins option"):
    Teller(source).pick(options)


def test_passage_picks_and_recalls():
  """And does not repeat itself."""
  teller = Teller("a red hat, a blue hat;\na red bow.")
  teller.memory["COLORS"] = ["red", "blue", "green"]
  teller.narrate(
    "a [first: COLORS] [thing: hat|\n  cap], a [COLORS] {thing}; / a {first} [bow|tie]."
  )
  assert teller.text == teller.source
  assert teller.nats == pytest.approx(math.log(3 * 2 * 2 * 2))

  again = Teller("a red hat, a red hat;")
  again.memory["COLORS"] = ["red", "blue", "green"]
  with pytest.raises(ValueError, match="position 13"):
    again.narrate("a [first: COLORS] hat, a [COLORS] hat;")


@BOTH
def test_stories_have_45_to_80_nats(genre):
  """And differ."""
  nats = [story.nats for story in stories(genre)]
  assert 45 < statistics.fmean(nats) < 80
  assert min(nats) > 40
  assert len({story.text for story in stories(genre)}) >= 0.95 * len(nats)
  # Not just in the details: hardly any two begin their second paragraph alike.
  seconds = [story.text.split("\n")[1][:40] for story in stories(genre)]
  assert len(set(seconds)) > 0.8 * len(seconds)


@BOTH
def test_stories_are_short_and_plain(genre):
  for story in stories(genre):
    assert 50 <= len(story.text.split()) <= 160
    assert story.text.isascii()
    assert story.text.count("\n") == 3
    assert not re.search(r"[\[\]{}|/]|  | \n|\n |MEET|CHEER", story.text)


@BOTH
def test_capitals_and_articles_agree(genre):
  for story in stories(genre):
    assert not re.search(r"(^|\n|\. )[a-z]", story.text)
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", story.text, re.IGNORECASE)
    assert story.text.count('"') % 2 == 0


def test_hero_keeps_name_and_pronouns():
  for story in stories("village"):
    name, pronoun = re.search(r"named (\w+) who .*? (She|He) ", story.text).groups()
    assert story.text.count(name) >= 3
    wrong = {"She": r"\b(he|him|himself)\b", "He": r"\b(she|herself)\b"}[pronoun]
    assert not re.search(wrong, story.text, re.IGNORECASE)


def test_genres_have_distinct_vocabularies():
  sea, village = vocabulary("sea"), vocabulary("village")
  assert min(len(sea), len(village)) > 250
  assert len(sea & village) / len(sea | village) < 0.6
