"""The flags of transformers' run_generation.py and generate() that differ from jaxft.generate's.

python -m jaxft.generate --model_type=gpt2 --model_name_or_path=finetuned --length 200
"""

from collections.abc import Mapping

# Their names -> the names in `jaxft.generate`.
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
# What run_generation.py gives to generate() by default; --model_type, which it requires, selects
# these.
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
# What always holds here: the opposite is refused.
FIXED = {
  "use_cache": (True, "keys and values of earlier tokens are always cached"),
  "jit": (True, "every step is compiled"),
  "early_stopping": (False, "beams go on until no better text can come"),
}
PAD_TOKEN = "pad_token_id", "accepted: padding never changes a text"
UNSUPPORTED = {"xlm_language": "XLM models are not read here; leave it out"}
# Flags that mean something else here than in run_generation.py, or that it alone has.
FLAG_NOTES = {
  "model_type": "asks for run_generation.py's defaults, above; must be the model_type of the "
  "model's config.json",
  "stop_token": "`--stop_strings`: the text ends with it, and run_generation.py leaves it out",
  "prefix": "text that the model reads before each prompt; it is not printed",
  "use_cpu": "computes on the CPU, as JAX_PLATFORMS=cpu does",
  "fp16": "computed in bfloat16 where the device has it (TPUs, NVIDIA GPUs from compute capability "
  "8.0), in float32 elsewhere",
  "do_sample": "`False`: `--temperature=0`; `True`: a text is drawn, whatever "
  "generation_config.json says",
  "max_length": "at most so many tokens of a prompt and its text; `--max_new_tokens` counts where "
  "both are given",
  "min_length": "at least so many tokens of a prompt and its text; `--min_new_tokens` counts where "
  "both are given",
  "min_new_tokens": "at least so many tokens of a text",
}


def missing_defaults(given: Mapping[str, object]) -> dict[str, float]:
  """Return the script's defaults of the flags that are not given."""
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
    rows[name] = f"`{value}`, always so: {why}; refused: `{not value}`"
  rows |= dict([PAD_TOKEN])
  rows |= {name: f"refused: {reason}" for name, reason in UNSUPPORTED.items()}
  lines = [f"| `--{name}` | {meaning} |" for name, meaning in rows.items()]
  return "\n".join(["| flag | here |", "|---|---|", *lines])


def format_defaults() -> str:
  """Return the defaults of run_generation.py as a part of a sentence."""
  return ", ".join(f"`--{name}={value}`" for name, value in SCRIPT_DEFAULTS.items())
