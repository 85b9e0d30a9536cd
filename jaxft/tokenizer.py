"""Trains a tokenizer: python -m jaxft.tokenizer --data SOURCE [...] --vocab_size N --out FOLDER

`config.model.init=scratch` begins with that folder: tokenizer.json and a config.json, no weights.
Or adds tokens of your own to an existing model, with a role or without one:
python -m jaxft.tokenizer --model PATH_OR_ID --add "<|title|>" "bos=<|start|>" "pad=[PAD]" \\
  --out FOLDER
"""

import collections
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxft.cli import parsers
from jaxft.config import DataSection
from jaxft.data import sources
from jaxft.data.dataset import read_examples
from jaxft.data.tokenize import TokenizerInfo
from jaxft.errors import RequestError, StorageError, run_command
from jaxft.hf import added_tokens, repo
from jaxft.hf.tokenizer import save_tokenizer
from jaxft.hf.verify import format_parity
from jaxft.utils.backend import configure_jax, require_device
from jaxft.utils.files import atomic_write, write_failure

END_OF_TEXT = "<|endoftext|>"
NUM_BYTES = 256  # of which every text is made: the first tokens after the end token
# GPT-2 124M, as a beginning: n_positions is the longest row; n_embd, n_layer and n_head are free.
GPT2_CONFIG = {
  "model_type": "gpt2",
  "architectures": ["GPT2LMHeadModel"],
  "n_positions": 1024,
  "n_embd": 768,
  "n_layer": 12,
  "n_head": 12,
  "activation_function": "gelu_new",
  "layer_norm_epsilon": 1e-5,
  "initializer_range": 0.02,
  "embd_pdrop": 0.0,
  "attn_pdrop": 0.0,
  "resid_pdrop": 0.0,
  "bos_token_id": 0,
  "eos_token_id": 0,
  "tie_word_embeddings": True,
}


def train_tokenizer(
  texts: Iterable[str], vocab_size: int, folder: Path, **sizes: int | float
) -> Tokenizer:
  """Writes a byte-level BPE tokenizer as GPT-2's, learned from `texts`, and a GPT-2's config.json.

  Args:
    vocab_size: the largest number of tokens; fewer where the text has fewer pairs to join.
    sizes: keys of config.json that differ from GPT-2 124M.

  Raises:
    RequestError: the vocabulary cannot hold all bytes.
    StorageError: the folder cannot be written.
  """
  if vocab_size <= NUM_BYTES:
    raise RequestError(
      f"--vocab_size={vocab_size}: must be at least {NUM_BYTES + 1}, "
      f"for {NUM_BYTES} bytes and the end token"
    )
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END_OF_TEXT],
    initial_alphabet=alphabet,
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  from transformers import PreTrainedTokenizerFast  # most of a second to import

  config = GPT2_CONFIG | {"vocab_size": tokenizer.get_vocab_size()} | sizes
  config |= {"n_ctx": config["n_positions"]}
  wrapped = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
  )
  try:
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "config.json", json.dumps(config, indent=2) + "\n")
    save_tokenizer(wrapped, folder, folder, positions=config["n_positions"], pad_token_id=None)
  except OSError as error:
    raise StorageError(f"--out={str(folder)!r}: {write_failure(folder, error)}") from error
  return tokenizer


def main() -> None:
  arguments = parsers.tokenizer().parse_args()
  out = Path(arguments.out)
  if bool(arguments.model) != bool(arguments.add):
    raise RequestError("--model and --add go together: the model to add tokens to, and the tokens")
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise RequestError(f"--out={arguments.out!r}: it is there; name a new folder")
  if arguments.model:
    configure_jax()
    require_device(None)
    source = repo.resolve(arguments.model, arguments.revision, torch_bin=arguments.torch_bin)
    tokenizer, ids, parity = added_tokens.add_tokens(source, arguments.add, out)
    names = ", ".join(f"{name} is {id}" for name, id in ids.items())
    print(f"{names}; {out}: {format_parity(parity)}")
    print(_describe_roles(tokenizer))
    return
  data = DataSection(train=tuple(arguments.data), text_column=arguments.text_column)
  if lines := sources.validate_sources(data):
    raise RequestError("\n".join(line.replace("config.data.train", "--data") for line in lines))
  unused = collections.Counter()
  print_line = lambda line: print(line, file=sys.stderr)
  examples = read_examples(data.train, "train", data, unused, unused, print_line)
  texts = (example.text for example in examples)
  num_tokens = train_tokenizer(texts, arguments.vocab_size, out).get_vocab_size()
  print(
    f"{num_tokens:,} tokens in {out}/tokenizer.json, and {out}/config.json of a GPT-2 124M with "
    "them: change its n_embd, n_layer, n_head and n_positions for another size, then "
    f"--config.model.init=scratch --config.model.path={out}"
  )


def _describe_roles(tokenizer: Any) -> str:
  """Says what the tokens with a role do from now on."""
  line = f"a text ends with {tokenizer.eos_token!r} in training, and "
  if TokenizerInfo(tokenizer).bos_id is None:
    line += "the next one is learned from it"
  else:
    line += f"begins with {tokenizer.bos_token!r}, as a prompt then should"
  if tokenizer.pad_token is not None:
    line += f"; transformers pads with {tokenizer.pad_token!r}"
  return line


if __name__ == "__main__":
  run_command(main)
