"""A tokenizer of your own text: python -m jaxft.tokenizer --data SOURCE [...] --vocab_size N --out FOLDER

The folder is what `config.model.init=scratch` begins with: tokenizer.json and a config.json, no weights. Or tokens of your own
in a model that is there: python -m jaxft.tokenizer --model PATH_OR_ID --add "<|title|>" "<|end|>" --out FOLDER
"""

import argparse
import collections
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxft import config as settings
from jaxft.backend import must_run_on, prepare_backend
from jaxft.data import sources
from jaxft.data.report import examples
from jaxft.errors import RequestError, StorageError, run_command
from jaxft.files import refused, write_whole
from jaxft.hf import added_tokens, repo
from jaxft.hf.verify import in_words

END = "<|endoftext|>"
BYTES = 256  # of which every text is made: the first tokens after the end token
# GPT-2 124M, whose sizes are a beginning: n_positions is the longest row, and n_embd, n_layer and n_head are free.
GPT2 = {
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


def write(texts: Iterable[str], vocab_size: int, folder: Path, **sizes: int | float) -> Tokenizer:
  """Writes a byte-level BPE tokenizer as GPT-2's, learned from `texts`, and the config.json of a GPT-2 with its vocabulary.

  Args:
    vocab_size: at most so many tokens; fewer where the text has fewer pairs to join.
    sizes: keys of config.json that differ from GPT-2 124M.

  Raises RequestError for a vocabulary that cannot hold all bytes, StorageError when the folder cannot be written.
  """
  if vocab_size <= BYTES:
    raise RequestError(f"--vocab_size={vocab_size}: must be at least {BYTES + 1}, for {BYTES} bytes and the end token")
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
  )
  tokenizer.train_from_iterator(texts, trainer)
  about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {
      "tokenizer.json": json.loads(tokenizer.to_str()),
      "tokenizer_config.json": about,
      "config.json": GPT2 | {"vocab_size": tokenizer.get_vocab_size()} | sizes,
    }.items():
      write_whole(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
  except OSError as error:
    raise StorageError(f"--out={str(folder)!r}: {refused(folder, error)}") from error
  return tokenizer


def main() -> None:
  parser = argparse.ArgumentParser(
    "python -m jaxft.tokenizer", description="A BPE tokenizer of your own text, or a model with tokens of your own."
  )
  begin = parser.add_mutually_exclusive_group(required=True)
  begin.add_argument("--data", nargs="+", metavar="SOURCE", help="file, glob, folder or hub:NAME[:SPLIT]")
  begin.add_argument("--model", metavar="PATH_OR_ID", help="model to add tokens to")
  parser.add_argument("--add", nargs="+", metavar="TOKEN", help="with --model: the special tokens to add")
  parser.add_argument("--text_column", default="text", help="column that holds the text (default: text)")
  parser.add_argument("--vocab_size", type=int, default=16384, help="tokens (default: 16384)")
  parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write; a new one")
  arguments = parser.parse_args()
  out = Path(arguments.out)
  if bool(arguments.model) != bool(arguments.add):
    raise RequestError("--model and --add go together: the model to add tokens to, and the tokens")
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise RequestError(f"--out={arguments.out!r}: it is there; name a new folder")
  if arguments.model:
    prepare_backend()
    must_run_on(None)
    ids, parity = added_tokens.write(repo.find(arguments.model), arguments.add, out)
    print(f"{', '.join(f'{name} is {id}' for name, id in ids.items())}; {out}: {in_words(parity)}")
    return
  if lines := sources.faults({"train": arguments.data}):
    raise RequestError("\n".join(line.replace("config.data.train", "--data") for line in lines))
  data = settings.default().data
  data.text_column = arguments.text_column
  nothing = collections.Counter()
  texts = (example.text for example in examples(tuple(arguments.data), "train", data, nothing, nothing))
  tokens = write(texts, arguments.vocab_size, out).get_vocab_size()
  print(
    f"{tokens:,} tokens in {out}/tokenizer.json, and {out}/config.json of a GPT-2 124M with them: change its n_embd, "
    f"n_layer, n_head and n_positions for another size, then --config.model.init=scratch --config.model.path={out}"
  )


if __name__ == "__main__":
  run_command(main)
