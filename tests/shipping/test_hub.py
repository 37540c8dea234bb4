"""The folders that `export` writes: uploaded with `huggingface_hub`, and loaded by name, from a server like the Hub."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch

from lightning_calibft import export, set_gamma
from tests.helpers.runs import quiet
from tests.shipping.consumer import NUM_CLASSES
from tests.shipping.fine_tuned import SEEN

pytestmark = quiet

SCRIPT = """
import huggingface_hub, timm, torch
from transformers import AutoModelForImageClassification

for name in ("timm", "transformers"):
    huggingface_hub.create_repo(f"you/{name}")
    huggingface_hub.upload_folder(repo_id=f"you/{name}", folder_path=name)
x = torch.load("x.pt")
with torch.no_grad():
    of_timm = timm.create_model("hf-hub:you/timm", pretrained=True).eval()(x)
    of_transformers = AutoModelForImageClassification.from_pretrained("you/transformers")(x).logits
torch.save({"timm": of_timm, "transformers": of_transformers}, "found.pt")
"""
COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Keeps the files that are committed to repositories, and gives them back."""

    repositories: dict[str, dict[str, bytes]]

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        action, name = self.path.split("/")[-2], "/".join(self.path.split("/")[3:5])
        answer = {}
        if self.path == "/api/repos/create":
            name = "/".join(json.loads(body)[key] for key in ("organization", "name"))
            self.repositories[name] = {}
            answer = {"url": f"http://{self.headers['Host']}/{name}"}
        elif action == "preupload":
            files = json.loads(body)["files"]
            answer = {"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in files]}
        elif action == "commit":
            files = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
            self.repositories[name].update({file["path"]: base64.b64decode(file["content"]) for file in files})
            answer = {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
        self.answer(json.dumps(answer).encode())

    def do_GET(self):
        first, second, *rest = self.path.removeprefix("/api/models").strip("/").split("/")
        files = self.repositories[f"{first}/{second}"]
        if not rest:
            siblings = [{"rfilename": name} for name in files]
            self.answer(json.dumps({"id": f"{first}/{second}", "sha": COMMIT, "siblings": siblings}).encode())
        elif rest[-1] in files:
            self.answer(files[rest[-1]])
        else:
            self.answer(b"", 404, **{"X-Error-Code": "EntryNotFound"})

    def do_HEAD(self):
        self.do_GET()

    def answer(self, body, status=200, **headers):
        headers |= {"ETag": hashlib.sha1(body).hexdigest(), "X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Mine", (Hub,), {"repositories": {}}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_upload_and_load(hub, tmp_path):
    transformers = pytest.importorskip("transformers")
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=32, patch_size=16, num_labels=NUM_CLASSES, **tiny)
    torch.save(x := torch.randn(2, 3, 32, 32), tmp_path / "x.pt")
    expected = {}
    for name, model in (
        ("timm", timm.create_model("test_resnet", num_classes=NUM_CLASSES).eval()),
        ("transformers", transformers.ViTForImageClassification(config).eval()),
    ):
        export(set_gamma(model, 2.5, SEEN), tmp_path / name)
        output = model(x)
        expected[name] = output if isinstance(output, torch.Tensor) else output.logits
    of_hub = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": "hf_mine", "HF_HUB_DISABLE_XET": "1"}
    variables = {**os.environ, **of_hub, "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", SCRIPT]  # a new process, since the address is read when the library is imported
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "found.pt"), expected)
    (first, *_) = hub.RequestHandlerClass.repositories["you/timm"]["README.md"].decode().splitlines()
    assert first == "---"  # the model card is there, with its data
