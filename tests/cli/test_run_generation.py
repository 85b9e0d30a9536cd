"""Flags of run_generation.py and run_generate_neo.py, prompts in a pipe, and the page's table."""

import json
import re
import sys
from pathlib import Path

import pytest

from jaxft import generate, pretrained
from jaxft.cli import parsers, run_generation
from jaxft.errors import RequestError
from jaxft.generation.sampling_config import Sampling
from jaxft.hf.weight_map import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "recipes" / "run_generation.md"


@pytest.fixture(scope="module")
def ready(folder):
  return pretrained.load(folder)


@pytest.fixture
def run(ready, folder, monkeypatch, tmp_path, capsys):
  """`run(words, piped)`: what the command prints, on both streams, with a model that is open."""
  monkeypatch.setattr(generate, "load_model", lambda arguments: ready)

  def run(*words, piped=b"", model=True):
    (tmp_path / "piped").write_bytes(piped)
    with (tmp_path / "piped").open() as stream:
      monkeypatch.setattr(sys, "stdin", stream)
      monkeypatch.setattr(
        sys, "argv", ["generate", *([f"--model={folder}"] if model else []), *map(str, words)]
      )
      generate.main()
    return capsys.readouterr()

  return run


def completions(output):
  return json.loads(output.out)["completions"]


def given(*words):
  return generate.sampling_args(parsers.generate().parse_args(["m", *words]))


def test_run_generation_command_is_translated(run, folder, ready):
  words = f"--model_type=gpt2 --model_name_or_path={folder} --length 9 --k 5 --p 0.8".split()
  words += ["--json", "--half", "--no_cuda"]
  output = run(
    *words,
    "--use_cache",
    "--jit",
    "--pad_token_id=0",
    "--xlm_language=",
    "--prompt",
    "Once upon",
    model=False,
  )
  how = dict(max_new_tokens=9, top_k=5, top_p=0.8, temperature=1.0, seed=42)
  assert completions(output) == [it._asdict() for it in ready.generate(["Once upon"], **how)]
  first, second = output.err.splitlines()
  defaults = (
    "temperature=1.0, repetition_penalty=1.0, num_return_sequences=1, do_sample=True, seed=42"
  )
  assert first == f"--model_type=gpt2: defaults of run_generation.py: {defaults}"
  assert second.startswith("--half: computes in bfloat16 if")


@pytest.mark.parametrize(
  "words, changed",
  [
    ("", {}),
    ("--length 200", dict(max_new_tokens=200)),
    ("--max_length 50", dict(max_new_tokens=None, max_length=50)),
    ("--temperature 0", dict(temperature=0.0, do_sample=None)),
    ("--do_sample False", dict(temperature=None, do_sample=False)),
    ("--num_beams 4", dict(temperature=None, do_sample=None, num_beams=4)),
    ("--k 3 --seed 1", dict(top_k=3, seed=1)),
  ],
)
def test_model_type_selects_script_defaults(words, changed):
  wanted = run_generation.SCRIPT_DEFAULTS | changed
  assert given("--model_type", "gpt2", *words.split()) == {
    name: it for name, it in wanted.items() if it is not None
  }
  output = given(*words.split())
  assert output == {name: it for name, it in changed.items() if it is not None}


def test_model_types_are_the_families(run):
  assert set(run_generation.MODEL_TYPES.values()) == set(FAMILIES)
  for name in ("GPT-Neo", "gpt_neo", "gptj", "gpt-j"):
    family = run_generation.MODEL_TYPES[name.lower()]
    assert parsers.generate().parse_args(["m", "--model_type", name]).model_type == name.lower()
    with pytest.raises(
      RequestError,
      match=f"--model_type={name.lower()}: .*config.json has gpt2; set --model_type=gpt2",
    ):
      run("--model_type", name, "--prompt=x")
    assert family != "gpt2"


def test_documented_flags_exist():
  known = {flag.removeprefix("--") for flag in parsers.generate()._option_string_actions}
  named = [
    *run_generation.ALIASES,
    *run_generation.ALIASES.values(),
    *run_generation.FLAG_NOTES,
    *run_generation.FIXED,
  ]
  assert {*named, *run_generation.UNSUPPORTED, run_generation.PAD_TOKEN[0], "model_type"} <= known
  assert set(run_generation.SCRIPT_DEFAULTS) <= {*Sampling._fields, "do_sample"}


@pytest.mark.parametrize(
  "words, message",
  [
    ("--early_stopping", "--early_stopping=True: beam search continues until"),
    ("--use_cache=False", "--use_cache=False: keys and values"),
    ("--jit False", "--jit=False: every step is compiled"),
    ("--xlm_language en", "--xlm_language=en: XLM models"),
    ("--no_cuda --require gpu", "--use_cpu and --require=gpu"),
    ("--max_new_tokens=-1", "--max_new_tokens=-1: must be at least 1"),
    ("--k=-1", "--k=-1: must be 0"),
    ("--do_sample --temperature=0", "--do_sample=True: --temperature=0"),
    ("--min_length=9 --max_length=8", "--min_length=9: more than --max_length=8"),
  ],
)
def test_unsupported_flags_fail_before_loading(run, monkeypatch, words, message):
  """With the reason, before a model is read."""
  monkeypatch.setattr(generate, "load_model", lambda arguments: pytest.fail("read a model"))
  with pytest.raises(RequestError, match=re.escape(message)):
    run(*words.split(), "--prompt=x")


def test_prompts_from_a_pipe(run, ready):
  lines = b"\xef\xbb\xbfthe cat\r\n\r\n  \nthe caf\xc3\xa9\x0cr\ran\na cat"
  output = run("--json", "--temperature=0", "--max_new_tokens=4", piped=lines)
  wanted = ready.generate(["the cat", "the café\fr\ran", "a cat"], temperature=0, max_new_tokens=4)
  assert completions(output) == [it._asdict() for it in wanted] and output.err == ""
  assert (
    run("--temperature=0", "--max_new_tokens=4", piped=b"the cat\n").out
    == "the cat" + wanted[0].text + "\n"
  )
  alone = run(
    "--json",
    "--max_new_tokens=4",
    "--temperature=0",
    "--prompt",
    "the cat",
    piped=b"\xff, not read",
  )
  assert completions(alone) == [wanted[0]._asdict()]


@pytest.mark.parametrize(
  "piped, message",
  [(b"", "--prompt is missing; "), (b" \n\n", "--prompt is missing; "), (b"\xff", "UTF-8|utf-8")],
)
def test_empty_pipe_is_rejected(run, piped, message):
  with pytest.raises(RequestError, match=message) as refusal:
    run("--json", piped=piped)
  assert "\n" not in str(refusal.value) and str(refusal.value).startswith("--prompt is missing")


def test_empty_prompt_file_is_rejected(run, tmp_path):
  (tmp_path / "none.txt").write_text(" \n\n")
  with pytest.raises(RequestError, match="--prompt_file='.*none.txt': contains no prompts"):
    run("--prompt_file", tmp_path / "none.txt", piped=b"a cat")


def test_prefix_is_not_printed(run, ready):
  how = ("--temperature=0", "--max_new_tokens=4", "--padding_text", "the dog and ")
  (wanted,) = ready.generate(["the dog and the cat"], temperature=0, max_new_tokens=4)
  assert completions(run(*how, "--json", "--prompt=the cat")) == [
    wanted._replace(prompt="the cat")._asdict()
  ]
  assert run(*how, piped=b"the cat").out == "the cat" + wanted.text + "\n"


def test_stop_token_is_a_stop_string(run, ready):
  """And prints how it differs."""
  how = dict(temperature=0, max_new_tokens=30)
  (whole,) = ready.generate(["Once upon"], **how)
  stop = whole.text[len(whole.text) // 2 :][:3]
  output = run(
    "--json", "--temperature=0", "--max_new_tokens=30", f"--stop_token={stop}", "--prompt=Once upon"
  )
  assert completions(output) == [
    it._asdict() for it in ready.generate(["Once upon"], stop_strings=[stop], **how)
  ]
  assert (
    output.err.startswith("--stop_token: same as --stop_strings: the text ends with it")
    and output.err.count("\n") == 1
  )


@pytest.mark.parametrize(
  "words, asked", [(["--no_cuda"], [("jax_platforms", "cpu")]), (["--use_cpu=False"], [])]
)
def test_use_cpu_is_set_before_loading(run, ready, monkeypatch, words, asked):
  seen = []
  monkeypatch.setattr(generate.jax.config, "update", lambda *setting: seen.append(setting))
  monkeypatch.setattr(
    generate, "load_model", lambda _: ready if seen == asked else pytest.fail(str(seen))
  )
  assert completions(run("--json", "--max_new_tokens=2", "--prompt=x", *words))


def test_text_ends_at_the_last_position(run, ready):
  (wanted,) = ready.generate(["the cat"], temperature=0, max_new_tokens=1000)
  how = ("--json", "--temperature=0", "--prompt=the cat", "--stop_token=")
  output = run(*how, "--length=-1")
  assert completions(output) == [wanted._asdict()] and len(output.err.splitlines()) == 1
  output = run(*how, "--length=1000")
  assert completions(output) == [wanted._asdict()]
  assert (
    f"--max_new_tokens=1000: texts end at the model's {ready.source.cfg.P} positions\n"
    in output.err
  )


def test_overruled_length_is_noted_once(run):
  output = run("--json", "--max_length=30", "--max_new_tokens=3", "--prompt=x")
  assert output.err == "--max_length=30: ignored, because --max_new_tokens=3 is given\n"


def test_docs_have_the_generated_table():
  page = PAGE.read_text()
  assert run_generation.markdown_table() in page and run_generation.format_defaults() in page
