"""Uploads, by huggingface_hub's own client, to a server that takes what the hub takes."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

SECRET = "hf_" + "s" * 34


class Hub(http.server.BaseHTTPRequestHandler):
  """An upload's requests for small files (api/repos/create, validate-yaml, preupload, commit)."""

  def do_POST(self):
    request = self.rfile.read(int(self.headers["Content-Length"]))
    self.server.tokens.add(self.headers["Authorization"])
    if self.server.broken and "commit" in self.path:
      return self.answer(403, {"error": "not yours"})  # 5xx would be tried again for half a minute
    if self.path == "/api/repos/create":
      repo = json.loads(request)
      self.server.repo = f"{repo['organization']}/{repo['name']}"
      return self.answer(
        200, {"url": f"http://127.0.0.1:{self.server.server_port}/{self.server.repo}"}
      )
    if "preupload" in self.path:
      files = [
        file | {"uploadMode": "regular", "shouldIgnore": False}
        for file in json.loads(request)["files"]
      ]
      return self.answer(200, {"files": files})
    if "commit" in self.path:
      for line in map(json.loads, request.splitlines()):
        if line["key"] == "file":
          self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
      return self.answer(
        200,
        {
          "commitUrl": f"http://127.0.0.1:{self.server.server_port}/{self.server.repo}/commit/c",
          "commitOid": "c",
        },
      )
    self.answer(200, {"errors": [], "warnings": []})

  def do_GET(self):  # the branch, asked for before the commit
    self.answer(200, {"id": self.server.repo, "sha": "a" * 40, "siblings": []})

  def answer(self, status, content):
    body = json.dumps(content).encode()
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *_):
    pass


@pytest.fixture
def hub():
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
  server.files, server.tokens, server.broken, server.repo = {}, set(), False, None
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield server
  server.shutdown()
  server.server_close()


def export(folder, out, repo, hub, token=SECRET):
  settings = {
    "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
    "HF_HUB_OFFLINE": "0",
    "HF_HOME": str(out.parent / "h"),
  }
  settings |= {"HF_TOKEN": token} if token else {}
  command = [
    sys.executable,
    "-m",
    "jaxft.export",
    "--model",
    folder,
    "--out",
    out,
    "--push_to_hub",
    repo,
  ]
  return subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)


def test_push_uploads_all_files_and_hides_token(folder, tmp_path, hub):
  done = export(folder, tmp_path / "out", "someone/stories", hub)
  assert done.returncode == 0, done.stderr
  assert hub.repo == "someone/stories" and "someone/stories" in done.stdout
  assert hub.tokens == {f"Bearer {SECRET}"}
  written = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
  assert hub.files == written and "model.safetensors" in written
  assert SECRET not in done.stdout + done.stderr
  assert not any(SECRET.encode() in content for content in written.values())


@pytest.mark.slow
def test_failed_push_keeps_folder_and_gives_command(folder, tmp_path, hub):
  """A hub that fails leaves the folder, and the error says how to go on."""
  hub.broken = True
  done = export(folder, tmp_path / "out", "someone/stories", hub)
  assert done.returncode == 4 and "Traceback" not in done.stderr
  assert (
    f"hf upload someone/stories {tmp_path / 'out'}" in done.stderr and SECRET not in done.stderr
  )
  assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
  "repo, token, message", [("someone/stories", None, "hf auth login"), ("a/b/c", SECRET, "a/b/c")]
)
def test_invalid_push_is_refused_before_reading(folder, tmp_path, hub, repo, token, message):
  done = export(folder, tmp_path / "out", repo, hub, token)
  assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, (
    done.stderr
  )
  assert not (tmp_path / "out").exists() and not hub.files
