"""Tokens with a role: what `jaxft.tokenizer --add` writes, and what documents begin with."""

import hashlib
import json
import random
import shutil

import processes
import pytest
import tiny
from test_tokenizer import WORDPIECE, wordpiece
from tokenizers import processors
from transformers import AutoTokenizer

import jaxft
import jaxft.hf.tokenizer
from jaxft.config import DataSection
from jaxft.data import tokenize
from jaxft.data.dataset import build_dataset
from jaxft.data.formats import Example
from jaxft.data.packing import ConcatDataset, PackedDataset, SlidingWindowDataset
from jaxft.errors import RequestError
from jaxft.hf import added_tokens, repo
from jaxft.train import finetune

BEGIN, PAD, TITLE, END = "<|startoftext|>", "[PAD]", "<|title|>", tiny.EOS
BEGIN_ID, PAD_ID, TITLE_ID, END_ID = 293, 294, 295, 0
ADD = (f"bos={BEGIN}", f"pad={PAD}", TITLE)


@pytest.fixture(scope="module")
def roles_folder(folder, tmp_path_factory):
  """A model folder with a bos token, a padding token, and a token without a role."""
  out = tmp_path_factory.mktemp("models") / "roles"
  done = processes.run("jaxft.tokenizer", "--model", folder, "--add", *ADD, "--out", out)
  assert f"{BEGIN} is {BEGIN_ID}, {PAD} is {PAD_ID}, {TITLE} is {TITLE_ID}" in done.stdout
  assert (
    f"begins with {BEGIN!r}; begin prompts with it too; transformers pads with {PAD!r}"
    in done.stdout
  )
  return out


@pytest.fixture(scope="module")
def tokenizer(roles_folder):
  return jaxft.hf.tokenizer.load_tokenizer(roles_folder, 296)


def assert_roles(folder):
  """Checks each file with roles, and what transformers reads."""
  for name in ("config.json", "generation_config.json"):
    config = json.loads((folder / name).read_text())
    assert [config[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [
      BEGIN_ID,
      END_ID,
      PAD_ID,
    ], name
  for name in ("tokenizer_config.json", "special_tokens_map.json"):
    config = json.loads((folder / name).read_text())
    assert [config[f"{role}_token"] for role in ("bos", "eos", "pad")] == [BEGIN, END, PAD], name
  again = AutoTokenizer.from_pretrained(folder)
  assert (again.bos_token, again.eos_token, again.pad_token) == (BEGIN, END, PAD)
  assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (BEGIN_ID, END_ID, PAD_ID)
  return again


def test_token_roles_load_in_transformers(roles_folder):
  """The roles written by --add are what transformers reads."""
  assert_roles(roles_folder)


@pytest.mark.slow
def test_token_roles_survive_training_and_export(roles_folder, stories, tmp_path):
  config = tiny.config(roles_folder, stories)
  config.train.steps, config.train.eval_every, config.train.save_every, config.data.layout = (
    2,
    2,
    2,
    "pad",
  )
  config.train.sample_prompts, config.optim.warmup_steps = ("", f"{BEGIN}once"), 0
  run = finetune(config, tmp_path / "run")
  assert_roles(run.workdir / "run.model")
  again = assert_roles(run.export)

  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(run.export)
  assert theirs.get_input_embeddings().weight.shape[0] == 296
  again.padding_side = "left"
  prompts = [f"{BEGIN}the cat", f"{BEGIN}once upon a time the big dog"]
  batch = again(prompts, return_tensors="pt", padding=True)
  assert batch["input_ids"][0, 0] == PAD_ID and batch["input_ids"][1, 0] == BEGIN_ID
  with torch.no_grad():
    found = theirs.generate(**batch, max_new_tokens=9, do_sample=False)[
      :, batch["input_ids"].shape[1] :
    ]
    begun = theirs.generate(max_new_tokens=9, do_sample=False)[0]  # of no prompt
  texts = again.batch_decode(found, skip_special_tokens=True)
  ours = jaxft.load(run.export)
  assert [it.text for it in ours.generate(prompts, max_new_tokens=9, temperature=0)] == texts
  (empty,) = ours.generate([""], max_new_tokens=9, temperature=0)
  assert begun.tolist()[: 1 + len(empty.token_ids)] == [BEGIN_ID, *empty.token_ids]


def encode(tokenizer, text):
  return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def read(example, tokenizer):
  """Ids of one example, and how many of them are not learned."""
  found = tokenize.encode_in_memory([example], tokenizer, ["a", "b"])
  return found.ids.tolist(), int(found.prompts_N[0])


def test_documents_begin_with_bos_token(tokenizer):
  """A document begins with the bos token, where the tokenizer has its own."""
  text, asked = "the big cat sat", "where is it?"
  document = [BEGIN_ID, *encode(tokenizer, text), END_ID]
  assert read(Example(text), tokenizer) == (document, 1)
  assert read(Example(BEGIN + text), tokenizer) == (document, 1)  # not twice
  whole = [BEGIN_ID, *encode(tokenizer, asked), *encode(tokenizer, " red"), END_ID]
  assert read(Example(asked + " red", prompt_chars=len(asked)), tokenizer) == (
    whole,
    1 + len(encode(tokenizer, asked)),
  )
  begun = Example(BEGIN + asked + " red", prompt_chars=len(BEGIN + asked))
  assert read(begun, tokenizer) == (whole, 1 + len(encode(tokenizer, asked)))
  # A prompt of one blank ends inside this token.
  assert tokenizer.decode(encode(tokenizer, " the")[0]) == " t"
  assert read(Example(" the", prompt_chars=1), tokenizer) == (
    [BEGIN_ID, *encode(tokenizer, " the"), END_ID],
    1,
  )
  assert read(Example(text, label="a"), tokenizer) == (encode(tokenizer, text), 0)
  assert (
    tokenize.encode_prompt(tokenizer, text)
    == tokenizer(text)["input_ids"]
    == encode(tokenizer, text)
  )
  assert tokenize.encode_prompt(tokenizer, "") == [BEGIN_ID]
  assert tokenize.encode_text(tokenizer, "") == [END_ID]
  assert tokenize.token_byte_lengths(tokenizer)[[BEGIN_ID, END_ID]].tolist() == [0, 0]


def test_bos_token_is_not_added_twice(roles_folder):
  """A tokenizer that begins each text itself does not get a second bos token."""
  own = jaxft.hf.tokenizer.load_tokenizer(roles_folder, 296)
  own.backend_tokenizer.post_processor = processors.TemplateProcessing(
    single=f"{BEGIN} $A", special_tokens=[(BEGIN, BEGIN_ID)]
  )
  assert read(Example("the cat"), own) == ([BEGIN_ID, *encode(own, "the cat"), END_ID], 1)
  assert read(Example("the cat", label="a"), own) == ([BEGIN_ID, *encode(own, "the cat")], 0)
  assert (
    tokenize.encode_prompt(own, "the cat")
    == own("the cat")["input_ids"]
    == [BEGIN_ID, *encode(own, "the cat")]
  )
  # One that begins a text with another token: as its texts begin, and as before.
  own.backend_tokenizer.post_processor = processors.TemplateProcessing(
    single=f"{TITLE} $A", special_tokens=[(TITLE, TITLE_ID)]
  )
  assert read(Example("the cat"), own) == ([TITLE_ID, *encode(own, "the cat"), END_ID], 0)
  assert tokenize.encode_prompt(own, "") == [TITLE_ID]


def loss_pairs(rows):
  """(input, target) of each target that is learned, by row."""
  picked = [rows[i] for i in range(len(rows))]
  return [
    [(int(i), int(t)) for i, t, m in zip(r["ids"], r["targets"], r["mask"], strict=True) if m]
    for r in picked
  ]


@pytest.mark.parametrize("layout", ["concat", "pad", "pack"])
def test_bos_token_is_never_a_loss_target(tokenizer, layout):
  """The first token of a text is learned from the bos token, which is never a target."""
  texts = [
    "the cat",
    "once upon a time the dog sat on mat and ran to big red house",
    "small blue door",
  ]
  stored = tokenize.encode_in_memory(map(Example, texts), tokenizer)
  T = 7
  rows = build_dataset(stored, DataSection(layout=layout, sequence_length=T), END_ID)
  pairs, documents = loss_pairs(rows), [[*encode(tokenizer, text), END_ID] for text in texts]
  wanted = [list(zip([BEGIN_ID, *ids], ids, strict=False)) for ids in documents]
  if layout == "pad":  # one a row, cut short at T targets
    assert pairs == [of[:T] for of in wanted]
  else:  # every token of every text, once: a long one goes on in its next piece
    assert sorted(sum(pairs, [])) == sorted(sum(wanted, []))
  assert (
    rows.stats.eos_targets == sum(target == END_ID for _, target in sum(pairs, []))
    or layout == "pad"
  )
  assert rows.stats.filled + sum(rows.stats.dropped.values()) <= len(stored.ids)
  if layout == "concat":
    strided = loss_pairs(SlidingWindowDataset(stored, T, END_ID, 3))
    assert sorted(sum(strided, [])) == sorted(sum(wanted, []))


def test_tokenization_is_unchanged_without_bos(folder, tmp_path):
  """With a bos token that is the end token, or none; also where tokens are put around a text."""
  rng = random.Random(3)
  kinds = [
    jaxft.hf.tokenizer.load_tokenizer(folder, 293),
    jaxft.hf.tokenizer.load_tokenizer(wordpiece(tmp_path / "bert"), len(WORDPIECE)),
  ]
  none = jaxft.hf.tokenizer.load_tokenizer(folder, 293)
  none.bos_token = None
  for tokenizer, before in zip([*kinds, none], ([], [2], []), strict=True):
    end = tokenizer.eos_token_id
    for _ in range(60):
      text = tiny.story(rng)
      prompt = rng.choice([0, rng.randint(1, len(text) - 1)])
      found = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
      given = sum(stop <= prompt for _, stop in found.offsets) if prompt else 0
      ids = [*before, *found.ids, end]
      assert read(Example(text, prompt_chars=prompt), tokenizer) == (
        ids,
        given + len(before) if given else 0,
      )
      assert tokenize.encode_prompt(tokenizer, text) == ids[:-1]
    assert tokenize.encode_prompt(tokenizer, "") == before
    stored = tokenize.encode_in_memory([Example(tiny.story(rng)) for _ in range(30)], tokenizer)
    stream = [end, *stored.ids.tolist()]
    flat = sum(loss_pairs(ConcatDataset(stored, 13, end)), [])
    assert flat == list(zip(stream, stream[1:], strict=False))
    pieces = sum(loss_pairs(PackedDataset(stored, 13, end, pack=True, texts=True)), [])
    assert sorted(pieces) == sorted(flat)  # the token before a text is an end token there too


def test_parse_token_spec_roles_and_refusals():
  """A value of --add is a token, or a role with one."""
  assert added_tokens.parse_token_spec("<|title|>") == ("<|title|>", "")
  assert added_tokens.parse_token_spec("a=b") == ("a=b", "") and added_tokens.parse_token_spec(
    "=x"
  ) == ("=x", "")
  assert (
    added_tokens.parse_token_spec("bos=<s>")
    == added_tokens.parse_token_spec("bos_token=<s>")
    == ("<s>", "bos")
  )
  assert added_tokens.parse_token_spec("pad=a=b") == ("a=b", "pad")
  for role in ("unk", "sep", "cls", "mask"):
    with pytest.raises(
      RequestError, match=rf"--add '{role}=<x>': .* only bos, eos, pad; give '<x>' alone"
    ):
      added_tokens.parse_token_spec(f"{role}=<x>")
  for value in ("", "pad="):
    with pytest.raises(RequestError, match="must be TOKEN or ROLE=TOKEN"):
      added_tokens.parse_token_spec(value)


def test_role_of_existing_token_keeps_embeddings(roles_folder, folder, tmp_path):
  """For a token that exists only the role changes."""
  tokenizer, ids, _ = added_tokens.add_tokens(
    repo.resolve(str(roles_folder)), [f"pad={END}", f"eos={TITLE}"], tmp_path / "out"
  )
  assert ids == {END: END_ID, TITLE: TITLE_ID} and len(tokenizer) == 296
  weights = [(at / "model.safetensors").read_bytes() for at in (roles_folder, tmp_path / "out")]
  assert weights[0] == weights[1]
  for name in ("config.json", "generation_config.json"):
    config = json.loads((tmp_path / "out" / name).read_text())
    assert [config[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [
      BEGIN_ID,
      TITLE_ID,
      END_ID,
    ], name
  plain = repo.resolve(str(folder))
  for values, message in (
    (["pad=t"], "--add 'pad=t': an ordinary token"),
    (["eos=Ġt"], "--add 'eos=Ġt': an ordinary token"),
    (["pad=<a>", "pad=<b>"], "--add 'pad=<b>': the role pad is already given to '<a>'"),
    (["pad=<a>", "<a>"], "--add '<a>': the tokenizer already has this token"),
  ):
    with pytest.raises(RequestError, match=message):
      added_tokens.add_tokens(plain, values, tmp_path / "none")
  assert not (tmp_path / "none").exists()
  itself = repo.resolve(str(shutil.copytree(folder, tmp_path / "itself")))
  about = json.loads((itself.folder / "tokenizer.json").read_text())
  begins = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, END_ID)])
  about["post_processor"] = json.loads(begins.__getstate__())
  (itself.folder / "tokenizer.json").write_text(json.dumps(about))
  with pytest.raises(
    RequestError,
    match=r"--add 'bos=<x>': .* already begins each text with '<\|endoftext\|>'",
  ):
    added_tokens.add_tokens(itself, ["bos=<x>"], tmp_path / "none")
  both, ids, _ = added_tokens.add_tokens(plain, ["pad=<x>", "bos=<x>"], tmp_path / "both")
  assert (both.pad_token_id, both.bos_token_id, len(both)) == (293, 293, 294)


def test_tokenizer_fingerprint_covers_bos(tokenizer, folder):
  """Tokens from before documents began with the bos token are made again."""
  plain = jaxft.hf.tokenizer.load_tokenizer(folder, 293)

  def old_fingerprint(it):
    content = (
      json.dumps([jaxft.hf.tokenizer.bos_token_id(it), it.eos_token_id])
      + it.backend_tokenizer.to_str()
    )
    return hashlib.sha256(content.encode()).hexdigest()

  assert jaxft.hf.tokenizer.fingerprint(plain) == old_fingerprint(plain)
  assert jaxft.hf.tokenizer.fingerprint(tokenizer) != old_fingerprint(tokenizer)
