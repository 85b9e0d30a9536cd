"""What other tools read in exported folders; needs transformers 4 and CTranslate2.

test_clients.py runs python clients.py FOLDER... < {"texts": [...], "prompts": [...]}, which prints
one JSON object a folder.
"""

import json
import sys
import tempfile
from pathlib import Path

import ctranslate2
import torch
import transformers

NEW = 24  # tokens


def padded(model, tokenizer, texts):
  if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
  batch = tokenizer(texts, padding=True, return_tensors="pt")
  return model(**batch).logits, batch["attention_mask"]


def writes(folder, asked):
  model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  single = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in asked["texts"]]
  logits, mask = padded(model, tokenizer, asked["texts"])
  pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
  how = dict(
    max_new_tokens=NEW, do_sample=False, return_full_text=False, pad_token_id=tokenizer.pad_token_id
  )
  return {
    "ids": [tokenizer(text)["input_ids"] for text in asked["texts"]],
    "logits": [rows.tolist() for rows in single],
    "padded": [rows[: int(m.sum())].tolist() for rows, m in zip(logits, mask, strict=True)],
    "generated": [pipe(prompt, **how)[0]["generated_text"] for prompt in asked["prompts"]],
  }


def classifies(folder, asked):
  model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
  found = pipe(asked["texts"], batch_size=len(asked["texts"]))
  return {
    "padded": padded(model, tokenizer, asked["texts"])[0].tolist(),
    "probabilities": [{each["label"]: each["score"] for each in one} for one in found],
  }


def converted(folder, asked):
  """What CTranslate2 writes, token by token, after it has converted the folder."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  with tempfile.TemporaryDirectory() as out:
    ctranslate2.converters.TransformersConverter(folder).convert(out, force=True)
    generator = ctranslate2.Generator(out, compute_type="float32")
    prompts = [
      tokenizer.convert_ids_to_tokens(tokenizer(prompt)["input_ids"]) for prompt in asked["prompts"]
    ]
    found = generator.generate_batch(
      prompts, max_length=NEW, sampling_topk=1, include_prompt_in_result=False
    )
    return [result.sequences_ids[0] for result in found]


def main():
  asked = json.load(sys.stdin)
  transformers.logging.set_verbosity_error()
  for folder in sys.argv[1:]:
    config = json.loads((Path(folder) / "config.json").read_text())
    with torch.no_grad():
      found = (classifies if "Classification" in config["architectures"][0] else writes)(
        folder, asked
      )
    # CTranslate2 knows no GPT-Neo
    if config["model_type"] in ("gpt2", "gptj") and "generated" in found:
      found["converted"] = converted(folder, asked)
    print(json.dumps(found | {"transformers": transformers.__version__}), flush=True)


if __name__ == "__main__":
  main()
