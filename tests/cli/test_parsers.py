"""Flags of the commands without a config: hints for mistyped ones, aliases, and no guessing."""

import json
import random
import re
import shutil
import sys

import pytest

import jaxft.tokenizer
from jaxft.cli import parsers
from jaxft.errors import RequestError

COMMANDS = {
  "generate": ["--model", "gpt2"],
  "evaluate": ["--model", "gpt2"],
  "export": ["--model", "gpt2", "--out", "x"],
  "tokenizer": ["--data", "x", "--out", "y"],
  "report": ["runs/x"],
}


def flags(command):
  known = getattr(parsers, command)()._option_string_actions
  return [flag for flag in known if flag.startswith("--") and len(flag) > 3]


def mistyped(flag):
  """The flag without one letter, or with two neighbours swapped, unless that is a flag again."""
  name = flag[2:]
  dropped = {name[:i] + name[i + 1 :] for i in range(len(name))}
  swapped = {name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in range(len(name) - 1)}
  return {f"--{word}" for word in dropped | swapped if word.strip("-_")}


@pytest.mark.parametrize("command", COMMANDS)
def test_mistyped_flags_get_the_right_hint(command):
  """Every flag of every command, misspelt."""
  parser, known = getattr(parsers, command)(), set(flags(command)) | {"--k", "--p"}
  for flag in flags(command):
    for wrong in sorted(mistyped(flag) - known):
      for words in (
        [wrong, "1"],
        [f"{wrong}=1"],
        [*COMMANDS[command], wrong, "1"],
        [wrong.replace("_", "-")],
      ):
        with pytest.raises(RequestError) as refusal:
          parser.parse_args(words)
        said = str(refusal.value)
        assert (
          refusal.value.exit_code == 2
          and "\n" not in said
          and ": unknown flag; did you mean" in said
        )
        assert flag in said.removesuffix("?").split("did you mean ")[1].split(" or "), (wrong, said)


@pytest.mark.parametrize("command", COMMANDS)
def test_flag_prefixes_are_rejected(command):
  parser = getattr(parsers, command)()
  for flag in flags(command):
    for end in range(5, len(flag)):
      if flag[:end] not in parser._option_string_actions:
        with pytest.raises(RequestError, match=f"{flag[:end]}: unknown flag"):
          parser.parse_args([*COMMANDS[command], flag[:end], "1"])


@pytest.mark.parametrize(
  "words, message",
  [
    (["--modle", "x"], "--modle: unknown flag; did you mean --model?"),
    (["--num_samples", "3"], "--num_samples: unknown flag; did you mean --num_return_sequences?"),
    (["-model", "x"], "-model: unknown flag; did you mean --model?"),
    (["--top_", "3"], "--top_: unknown flag; did you mean --top_k or --top_p?"),
    (["--config.model.path=x"], "--config.model.path: unknown flag; --help lists all flags"),
    (["x", "y"], "'y': unexpected argument; use --prompt for text to complete"),
    (["x", "--top_k", "many"], "--top_k='many': must be a whole number"),
    (["x", "--do_sample=maybe"], "--do_sample: 'maybe': must be True or False"),
    (
      ["--prompt", "x"],
      "--model is missing; set it to a Hugging Face folder or hub id, or set --workdir to a run",
    ),
    (["x", "--workdir", "y"], "--model=x and --workdir=y: use only one of the two"),
    (["x", "--model=y"], "MODEL=x and --model=y set the same value; use only one of the two"),
    (
      ["--model_name_or_path=x", "--model", "y"],
      "--model_name_or_path=x and --model=y set the same value; use only one of",
    ),
    (
      ["x", "--length=3", "--max-new-tokens=4"],
      "--length=3 and --max_new_tokens=4 set the same value; use only one of the two",
    ),
    (
      ["x", "--k=3", "--top_k=4"],
      "--k=3 and --top_k=4 set the same value; use only one of the two",
    ),
    (
      ["x", "--p=.3", "--top_p=.4"],
      "--p=0.3 and --top_p=0.4 set the same value; use only one of the two",
    ),
    (
      ["x", "--stop_token=a", "--stop_strings", "b"],
      "--stop_token=a and --stop_strings=b set the same value",
    ),
    (["x", "--padding_text=a", "--prefix=b"], "--padding_text=a and --prefix=b set the same value"),
    (
      ["x", "--no_cuda", "--use_cpu=False"],
      "--no_cuda=True and --use_cpu=False set the same value",
    ),
  ],
)
def test_bad_arguments_are_rejected_in_one_line(words, message):
  with pytest.raises(RequestError) as refusal:
    parsers.generate().parse_args(words)
  assert str(refusal.value).startswith(message)


SPELLINGS = {
  "model": (
    ["x"],
    ["--model=x"],
    ["--model", "x"],
    ["--model-name-or-path", "x"],
    ["--model_name_or_path=x"],
  ),
  "max_new_tokens": (
    ["--length=7"],
    ["--length", "7"],
    ["--max-new-tokens=7"],
    ["--length=7", "--max_new_tokens=7"],
  ),
  "top_k": (["--k", "7"], ["--top-k=7"], ["--top_k=7"]),
  "top_p": (["--p", ".7"], ["--top-p=.7"], ["--top_p=.7"]),
  "stop_strings": (["--stop_token", "a b"], ["--stop-strings=a b"], ["--stop_strings", "a b"]),
  "prefix": (["--padding_text=a b"], ["--padding-text", "a b"], ["--prefix", "a b"]),
  "use_cpu": (["--no_cuda"], ["--use_cpu"], ["--no-cuda", "True"], ["--use-cpu=yes"]),
  "fp16": (["--half"], ["--fp16"], ["--fp16=True"], ["--half", "1"]),
  "do_sample": (["--do_sample"], ["--do-sample=true"], ["--do_sample", "True"]),
}


def parsed(*parts):
  arguments = vars(parsers.generate().parse_args([word for part in parts for word in part]))
  return {name: value for name, value in arguments.items() if name != "given_as"}


@pytest.mark.parametrize("name", SPELLINGS)
def test_flag_aliases_set_one_value(name):
  """In any order."""
  rng, model = random.Random(0), [] if name == "model" else ["--model=m"]
  plain = parsed(SPELLINGS[name][-1], model, ["--temperature=-1", "--json"])
  assert plain[name]
  for words in SPELLINGS[name]:
    for _ in range(5):
      parts = [words, ["--temperature", "-1"], ["--json"], model]
      rng.shuffle(parts)
      assert parsed(*parts) == plain


@pytest.mark.parametrize(
  "words",
  [
    "m --json --top_k 3",
    "--json m --top_k 3",
    "--top_k 3 m --json",
    "--top_k 3 --json m",
    "--top_k=3 --json -- m",
  ],
)
def test_positional_model_between_flags(words):
  assert parsed(words.split()) == parsed(["--model=m", "--json", "--top_k=3"])


def test_bool_flag_leaves_the_next_word():
  arguments = parsers.generate().parse_args(["--do_sample", "false", "--jit", "m"])
  assert (arguments.do_sample, arguments.jit, arguments.model) == (False, True, "m")


@pytest.mark.parametrize("command", ["generate", "evaluate", "export"])
def test_model_flag_accepts_a_workdir(command, tmp_path, capsys):
  """Whichever flag names it."""
  run, more = tmp_path / "run", COMMANDS[command][2:]
  (run / "checkpoints" / "12").mkdir(parents=True)
  (run / "config.json").write_text(json.dumps({"model": {}, "data": {}, "train": {}}))
  for words in ([run], ["--model", run], [f"--model_name_or_path={run}"]):
    found = getattr(parsers, command)().parse_args([*map(str, words), *more, "--step", "12"])
    assert (found.model, found.workdir, found.step) == (None, str(run), 12)
    assert capsys.readouterr().err == f"--model={run} is a run; using --workdir={run}\n"
  for change in (
    lambda it: (it / "model.safetensors").touch(),
    lambda it: (it / "config.json").write_text('{"model_type": "gpt2"}'),
    lambda it: (it / "config.json").write_text("["),
    lambda it: (it / "checkpoints" / "12").rmdir() or (it / "checkpoints").rmdir(),
  ):
    change(other := shutil.copytree(run, tmp_path / "other"))
    found = getattr(parsers, command)().parse_args([str(other), *more])
    assert (found.model, found.workdir) == (str(other), None) and capsys.readouterr().err == ""
    shutil.rmtree(other)


def test_errors_about_data_name_flags_that_exist(monkeypatch, tmp_path):
  """`evaluate` and `tokenizer` have no settings: their errors name their own flags."""
  file = tmp_path / "latin.txt"
  file.write_bytes("Zoë met a cat in the café.".encode("latin-1"))
  out = tmp_path / "tokenizer"
  argv = ["tokenizer", "--data", str(file), "--out", str(out), "--vocab_size", "300"]
  monkeypatch.setattr(sys, "argv", argv)
  with pytest.raises(RequestError) as error:
    jaxft.tokenizer.main()
  assert "config." not in str(error.value)
  named = set(re.findall(r"--\w+", str(error.value)))
  assert named == {"--encoding", "--on_bad_row"}
  for parser in (parsers.tokenizer(), parsers.evaluate()):
    assert named <= parser._option_string_actions.keys()
  monkeypatch.setattr(sys, "argv", [*argv, "--encoding", "latin-1"])
  jaxft.tokenizer.main()
  assert (out / "tokenizer.json").is_file()


def test_missing_argument_is_named():
  with pytest.raises(RequestError, match="^--out is missing"):
    parsers.export().parse_args(["--model", "x"])
