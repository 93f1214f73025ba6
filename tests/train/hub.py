"""A stand-in for the hub: the routes that huggingface_hub uploads a model through, on 127.0.0.1, with everything kept that came.

Large files come by git LFS, or by xet (hf_xet), which sends compressed pieces: of those the stand-in keeps what it got as it is, and
takes the sums that the commit names on trust.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in"


class Hub:
    """`files`: repository -> path -> content as committed; `fail`: a part of an address -> status that it is answered with."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.pieces: list[bytes] = []
        """What came by xet."""
        self.fail: dict[str, int] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def create(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = f"{body.get('organization') or 'me'}/{body['name']}"
        known = {"url": f"{self.url}/{name}", "name": name}
        if name.startswith("other/"):
            return 403, {"error": "You don't have the rights to create a model under the namespace 'other'"}
        if name in self.files:
            return 409, {**known, "error": "You already created this model repo"}
        self.files[name], self.private[name] = {}, body.get("visibility") == "private" or body.get("private") is True
        return 200, known

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        """All of it or nothing, as the hub does: an object that was never sent makes no commit."""
        new = dict(self.files[repo])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects and not self.pieces:
                    return 400, {"error": f"no object {value['oid']}"}
                new[value["path"]] = self.objects.get(value["oid"], f"sha256:{value['oid']}".encode())
            elif line["key"] == "deletedFile":
                del new[value["path"]]
        self.files[repo] = new
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        data = self._body()
        failing = [status for part, status in hub.fail.items() if part in path]
        stored = path.startswith(
            ("/lfs/", "/v1/", "/v2/")
        )  # the first are secrets themselves, the others have a token of their own
        if failing:
            return self._answer(failing[0], {"error": "the stand-in was told to refuse"})
        if not stored and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if path.startswith(("/v1/", "/v2/")):
            return self._xet(path, data)
        if stored:
            oid = path.rpartition("/")[2]
            if hashlib.sha256(data).hexdigest() != oid:
                return self._answer(400, {"error": "another object"})
            hub.objects[oid] = data
            return self._answer(200, {})
        status, answer = self._api(path, data)
        return self._answer(status, answer)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _xet(self, path: str, data: bytes) -> None:
        """The store of xet: no piece is known there yet, no other way to send one is offered, all are taken."""
        if "chunks" in path or "grants" in path:
            return self._answer(404, {})
        if "xorbs" in path:
            self.hub.pieces.append(data)
            return self._answer(200, {"was_inserted": True})
        return self._answer(200, {"type": "result", "result": 1})

    def _api(self, path: str, data: bytes) -> tuple[int, Any]:
        hub = self.hub
        if path == "/api/repos/create":
            return hub.create(json.loads(data))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if found := re.fullmatch(r"/(\w+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            return 200, {"objects": [self._upload(o) for o in json.loads(data)["objects"]]}
        found = re.fullmatch(r"/api/models/(\w+/[\w.-]+)(/.*)?", path)
        if found is None or found[1] not in hub.files:
            return 404, {"error": "Repository not found"}
        files, route = hub.files[found[1]], found[2] or ""
        if route == "/preupload/main":
            asked = [file["path"] for file in json.loads(data)["files"]]
            modes = [{"path": p, "uploadMode": self._mode(p), "shouldIgnore": False} for p in asked]
            return 200, {"files": modes}
        if route == "/xet-write-token/main":
            return 200, {"casUrl": hub.url, "accessToken": "of the store", "exp": 4102444800}
        if route == "/commit/main":
            return hub.commit(found[1], [json.loads(line) for line in data.splitlines()])
        if route.startswith("/tree/main"):
            return 200, [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files.items()]
        siblings = [{"rfilename": p} for p in files]
        return 200, {"id": found[1], "sha": "0" * 40, "private": True, "siblings": siblings}

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}

    @staticmethod
    def _mode(path: str) -> str:
        return "lfs" if path.endswith((".safetensors", "tokenizer.json")) else "regular"

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _handle
