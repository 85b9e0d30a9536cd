"""Three hundred damaged or hostile folders: refused by name or harmless, none runs anything."""

import json
import os
import pickle
import shutil
import sys

import jax
import numpy as np
import pytest

from jaxft.errors import RequestError
from jaxft.hf import load_weights, repo, tokenizer
from jaxft.model.compute import ComputeConfig
from jaxft.model.decoder import abstract_model

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
CONFIG_VALUES = [
  None,
  -1,
  0,
  1,
  10**9,
  2**70,
  1.5,
  float("nan"),
  "x",
  "",
  [],
  {},
  [1],
  True,
  "../../etc/passwd",
]


class Payload:
  def __reduce__(self):
    return os.mkdir, (str(PLANTED["ran"]),)


PLANTED = {}


def safetensors(folder):
  content = (folder / "model.safetensors").read_bytes()
  size = int.from_bytes(content[:8], "little")
  return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_safetensors(folder, header, data, size=None):
  text = json.dumps(header).encode()
  (folder / "model.safetensors").write_bytes(
    (size or len(text)).to_bytes(8, "little") + text + data
  )


def truncated(folder, rng):
  content = (folder / "model.safetensors").read_bytes()
  (folder / "model.safetensors").write_bytes(content[: rng.integers(len(content))])


def flipped_header(folder, rng):
  content = bytearray((folder / "model.safetensors").read_bytes())
  content[rng.integers(2000)] ^= 1 << int(rng.integers(8))
  (folder / "model.safetensors").write_bytes(content)


def lying_header(folder, rng):
  header, data = safetensors(folder)
  entry = header[rng.choice([name for name in header if name != "__metadata__"])]
  lie = rng.integers(7)
  if lie == 0:
    entry["data_offsets"][0] -= 4  # overlaps the one before it
  elif lie == 1:
    entry["data_offsets"] = [0, 2**62]
  elif lie == 2:
    entry["shape"] = [2**40, 2**40]
  elif lie == 3:
    entry["dtype"] = str(rng.choice(["F16", "F64", "I64", "BOOL", "U8", "F8_E4M3", "NONSENSE"]))
  elif lie == 4:
    entry["shape"] = [*entry["shape"], 1]
  elif lie == 5:
    entry["shape"] = entry["shape"][::-1]
  write_safetensors(folder, header, data, size=2**62 if lie == 6 else None)


def lying_config(folder, rng):
  config = json.loads((folder / "config.json").read_text())
  config[str(rng.choice(list(config)))] = CONFIG_VALUES[rng.integers(len(CONFIG_VALUES))]
  (folder / "config.json").write_text(json.dumps(config))


def broken_json(folder, rng):
  name = str(rng.choice(["config.json", "tokenizer.json", "tokenizer_config.json"]))
  content = (folder / name).read_bytes()
  (folder / name).write_bytes(
    [content[: rng.integers(len(content))], b"[" * 100_000, b"\xff\xfe", b"null", b"{}"][
      rng.integers(5)
    ]
  )


def index_that_leads_out(folder, rng):
  (folder / "model.safetensors").unlink()
  names = [
    "../outside/model.safetensors",
    str(PLANTED["outside"] / "model.safetensors"),
    "..",
    "",
    "a\0b",
    7,
    None,
    "x" * 5000,
  ]
  name = names[rng.integers(len(names))]
  (folder / "model.safetensors.index.json").write_text(
    json.dumps({"weight_map": {"wte.weight": name}})
  )


def link_that_leads_out(folder, rng):
  name = "model.safetensors" if rng.integers(2) else "flax_model.msgpack"
  (folder / "model.safetensors").unlink()
  (folder / name).symlink_to(PLANTED["outside"] / "model.safetensors")


def pickled(folder, rng):
  payload = pickle.dumps(Payload())
  name = [
    "pytorch_model.bin",
    "model.safetensors",
    "flax_model.msgpack",
    "tokenizer.json",
    "config.json",
  ][rng.integers(5)]
  if name != "tokenizer.json" and name != "config.json":
    (folder / "model.safetensors").unlink()
  (folder / name).write_bytes(payload)


def remote_code(folder, rng):
  (folder / "evil.py").write_text(
    f"import os\nos.mkdir({str(PLANTED['ran'])!r})\nclass Evil: pass\n"
  )
  for file in ("config.json", "tokenizer_config.json"):
    config = json.loads((folder / file).read_text())
    config["auto_map"] = {
      "AutoConfig": "evil.Evil",
      "AutoModelForCausalLM": "evil.Evil",
      "AutoTokenizer": ["evil.Evil", None],
    }
    if rng.integers(2):
      config["tokenizer_class"] = "Evil"
    (folder / file).write_text(json.dumps(config))


KINDS = [truncated, flipped_header, lying_header, lying_config, broken_json, index_that_leads_out]
KINDS += [link_that_leads_out, pickled, remote_code]


@pytest.fixture(scope="module")
def watched(folder, tmp_path_factory):
  """A folder outside, and a record of everything opened in it or started."""
  home = tmp_path_factory.mktemp("hostile")
  shutil.copytree(folder, home / "outside")
  PLANTED.update(outside=home / "outside", ran=home / "ran")
  events = []

  def hook(event, arguments):
    if (
      event == "open"
      and str(home / "outside") in str(arguments[0])
      or event in ("subprocess.Popen", "os.system")
    ):
      events.append((event, arguments))

  sys.addaudithook(hook)
  return home, events


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_hostile_folders_are_refused_or_harmless(kind, folder, watched):
  home, events = watched
  refused, rng = 0, np.random.default_rng(KINDS.index(kind))
  for _ in range(34):
    shutil.rmtree(home / "m", ignore_errors=True)
    shutil.copytree(folder, home / "m")
    kind(home / "m", rng)
    try:
      checkpoint = repo.resolve(str(home / "m"))
      _, shapes, _ = abstract_model(checkpoint.cfg, ComputeConfig())
      params = load_weights.load_params(checkpoint, shapes, jax.tree.map(lambda _: HERE, shapes))
      assert all(
        a.shape == b.shape for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(shapes))
      )
      tokenizer.load_tokenizer(checkpoint.folder, checkpoint.cfg.V)
    except RequestError as error:
      refused += 1
      assert str(home / "m") in str(error) and len(str(error).splitlines()) == 1
  assert refused or kind in (remote_code,)
  assert not PLANTED["ran"].exists() and not events
