r"""Train a tokenizer, or add tokens to an existing model.

    python -m jaxft.tokenizer --data SOURCE [...] --vocab_size N --out FOLDER

writes tokenizer.json and a config.json without weights. Training from scratch
(`config.model.init=scratch`) begins with that folder.

    python -m jaxft.tokenizer --model PATH_OR_ID --add "<|title|>" "bos=<|start|>" "pad=[PAD]" \
      --out FOLDER

adds tokens, with or without a role.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

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
from jaxft.utils.files import write_failure, write_json
from jaxft.utils.types import Json

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
NUM_BYTES = 256  # the first tokens after the end token, so that any text can be encoded
# GPT-2 124M, as a starting point. n_positions limits config.data.sequence_length. Users may change
# n_embd, n_layer and n_head.
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
  """Train a byte-level BPE tokenizer like GPT-2's, and write it with a config.json.

  Args:
    texts: the training text.
    vocab_size: the largest number of tokens; the result has fewer if the text has too few pairs to
      merge.
    folder: where to write tokenizer.json and the config.json of a GPT-2.
    **sizes: keys of config.json that differ from GPT-2 124M.

  Returns:
    The tokenizer.

  Raises:
    RequestError: the vocabulary cannot hold all bytes.
    StorageError: the folder cannot be written.
  """
  if vocab_size <= NUM_BYTES:
    raise RequestError(
      f"--vocab_size={vocab_size}: must be at least {NUM_BYTES + 1}, "
      f"to hold {NUM_BYTES} bytes and the end token"
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
  from transformers import PreTrainedTokenizerFast  # takes most of a second to import

  config: Json = GPT2_CONFIG | {"vocab_size": tokenizer.get_vocab_size()} | sizes
  config |= {"n_ctx": config["n_positions"]}
  wrapped = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
  )
  try:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    save_tokenizer(wrapped, folder, folder, positions=config["n_positions"], pad_token_id=None)
  except OSError as error:
    raise StorageError(f"--out={str(folder)!r}: {write_failure(folder, error)}") from error
  return tokenizer


def main() -> None:
  """Run the command."""
  arguments = parsers.tokenizer().parse_args()
  out = Path(arguments.out)
  if bool(arguments.model) != bool(arguments.add):
    raise RequestError("--model and --add: use both, the model and the tokens to add to it")
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise RequestError(f"--out={arguments.out!r}: already exists; name a new folder")
  if arguments.model:
    configure_jax()
    require_device(None)
    source = repo.resolve(arguments.model, arguments.revision, torch_bin=arguments.torch_bin)
    tokenizer, ids, parity = added_tokens.add_tokens(source, arguments.add, out)
    names = ", ".join(f"{name} is {id}" for name, id in ids.items())
    print(f"{names}; {out}: {format_parity(parity)}")
    print(_describe_roles(tokenizer))
    return
  data = DataSection(
    train=tuple(arguments.data),
    text_column=arguments.text_column,
    encoding=arguments.encoding or "utf-8",
    on_bad_row=arguments.on_bad_row or "error",
  )
  if lines := sources.validate_sources(data):
    raise RequestError("\n".join(line.replace("config.data.train", "--data") for line in lines))
  unused = Counter()
  print_line = lambda line: print(line, file=sys.stderr)
  examples = read_examples(data.train, "train", data, unused, unused, print_line)
  texts = (example.text for example in examples)
  with parsers.data_flags():
    num_tokens = train_tokenizer(texts, arguments.vocab_size, out).get_vocab_size()
  print(
    f"{num_tokens:,} tokens in {out}/tokenizer.json; {out}/config.json is a GPT-2 124M with this "
    "vocabulary. For another size, edit its n_embd, n_layer, n_head and n_positions. Train with "
    f"--config.model.init=scratch --config.model.path={out}"
  )


def _describe_roles(tokenizer: "PreTrainedTokenizerBase") -> str:
  """Return a line about the effect of the tokens with a role."""
  line = f"in training, a text ends with {tokenizer.eos_token!r} and "
  if TokenizerInfo(tokenizer).bos_id is None:
    line += "the next text is predicted from it"
  else:
    line += f"begins with {tokenizer.bos_token!r}; begin prompts with it too"
  if tokenizer.pad_token is not None:
    line += f"; transformers pads with {tokenizer.pad_token!r}"
  return line


if __name__ == "__main__":
  run_command(main)
