"""Flags of transformers' run_generation.py and generate() that differ in jaxft.generate.

python -m jaxft.generate --model_type=gpt2 --model_name_or_path=finetuned --length 200
"""

from collections.abc import Mapping

# Names in transformers -> names in `jaxft.generate`.
ALIASES = {
  "model_name_or_path": "model",
  "length": "max_new_tokens",
  "k": "top_k",
  "p": "top_p",
  "stop_token": "stop_strings",
  "padding_text": "prefix",
  "no_cuda": "use_cpu",
  "half": "fp16",
}
# Values of --model_type -> model_type in the config.json of the model.
MODEL_TYPES = {"gpt2": "gpt2", "gpt_neo": "gpt_neo", "gpt-neo": "gpt_neo"}
MODEL_TYPES |= {"gptj": "gptj", "gpt-j": "gptj"}
# Defaults that run_generation.py passes to generate(). The script requires --model_type, so here
# that flag selects them.
SCRIPT_DEFAULTS = {
  "max_new_tokens": 20,
  "temperature": 1.0,
  "top_k": 0,
  "top_p": 0.9,
  "repetition_penalty": 1.0,
  "num_return_sequences": 1,
  "do_sample": True,
  "seed": 42,
}
# Flags with only one allowed value: the opposite is refused.
FIXED = {
  "use_cache": (True, "keys and values of earlier tokens are always cached"),
  "jit": (True, "every step is compiled"),
  "early_stopping": (False, "beam search continues until no better text is possible"),
}
PAD_TOKEN = "pad_token_id", "no effect: padding never changes a text"
UNSUPPORTED = {"xlm_language": "XLM models are not supported; leave it out"}
# Flags that differ from run_generation.py, or that only run_generation.py has.
FLAG_NOTES = {
  "model_type": "selects the defaults of run_generation.py, above; must match model_type in the "
  "model's config.json",
  "stop_token": "`--stop_strings`: the text includes it; run_generation.py cuts it off",
  "prefix": "text that the model reads before each prompt; it is not printed",
  "use_cpu": "computes on the CPU, like JAX_PLATFORMS=cpu",
  "fp16": "computes in bfloat16 if the device supports it (TPUs, NVIDIA GPUs from compute "
  "capability 8.0), else in float32",
  "do_sample": "`False`: `--temperature=0`; `True`: sample, despite generation_config.json",
  "max_length": "maximum number of tokens, including the prompt; `--max_new_tokens` overrides it",
  "min_length": "minimum number of tokens, including the prompt; `--min_new_tokens` overrides it",
  "min_new_tokens": "minimum number of new tokens",
}


def missing_defaults(given: Mapping[str, object]) -> dict[str, float]:
  """Return the defaults of run_generation.py for all flags that are not given.

  Args:
    given: values of the given flags.
  """
  excluded = {*given}
  if given.get("max_length"):
    excluded.add("max_new_tokens")
  is_greedy = given.get("temperature") == 0 or given.get("do_sample") is False
  if is_greedy or isinstance(beams := given.get("num_beams"), int) and beams > 1:
    excluded |= {"temperature", "do_sample"}
  return {name: value for name, value in SCRIPT_DEFAULTS.items() if name not in excluded}


def markdown_table() -> str:
  """Return all flags as a Markdown table, for docs/recipes/run_generation.md."""
  rows = {name: f"`--{other}`" for name, other in ALIASES.items()} | FLAG_NOTES
  for name, (value, why) in FIXED.items():
    rows[name] = f"always `{value}`: {why}; `{not value}` is refused"
  rows |= dict([PAD_TOKEN])
  rows |= {name: f"refused: {reason}" for name, reason in UNSUPPORTED.items()}
  lines = [f"| `--{name}` | {meaning} |" for name, meaning in rows.items()]
  return "\n".join(["| flag | here |", "|---|---|", *lines])


def format_defaults() -> str:
  """Return the defaults of run_generation.py as a Markdown list in one line."""
  return ", ".join(f"`--{name}={value}`" for name, value in SCRIPT_DEFAULTS.items())
