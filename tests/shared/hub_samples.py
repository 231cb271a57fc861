"""A hub on this machine: the Hugging Face hub's protocol, for files of models and for commits that add some."""

import base64
import functools
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import timm
import torch
from safetensors.torch import save

COMMIT = "0123456789abcdef0123456789abcdef01234567"
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}


class Hub:
    """Repositories by name, each a dictionary of files; ``seen`` are requests, ``gated`` repositories need consent."""

    def __init__(self):
        self.files, self.seen, self.tokens, self.gated, self.objects = {}, [], set(), set(), {}

    def put(self, repository, **files):
        self.files.setdefault(repository, {}).update({name.replace("__", "."): data for name, data in files.items()})


class _Handler(BaseHTTPRequestHandler):
    hub = None

    def log_message(self, *_):
        pass

    def _answer(self, status=200, body=b"", head=(), **more):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in [*head, *more.items()]:
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _wrong(self, status, code):
        self._answer(status, b"", X_Error_Code=code, X_Error_Message=code)

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _note(self):
        self.hub.seen.append((self.command, self.path))
        if token := self.headers.get("Authorization"):
            self.hub.tokens.add(token)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self._note()
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path.partition("?")[0])
        if found is None:
            return self._wrong(404, "RepoNotFound")
        repository, revision, name = found.groups()
        if repository not in self.hub.files:
            return self._wrong(404, "RepoNotFound")
        if repository in self.hub.gated:
            return self._wrong(403, "GatedRepo")
        if revision not in ("main", COMMIT):
            return self._wrong(404, "RevisionNotFound")
        if name not in self.hub.files[repository]:
            return self._wrong(404, "EntryNotFound")
        data = self.hub.files[repository][name]
        tag = f'"{hashlib.sha256(data).hexdigest()}"'
        return self._answer(200, data, ETag=tag, X_Repo_Commit=COMMIT, X_Linked_Etag=tag, X_Linked_Size=str(len(data)))

    def do_POST(self):
        self._note()
        body = self._body()
        address = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            if asked["name"] == "echo":  # an answer that gives away what it was asked with
                return self._answer(400, {"error": f"not with {self.headers['Authorization']}"})
            name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            if name in self.hub.files:
                return self._answer(409, {"error": "You already created this model repo", "url": f"{address}/{name}"})
            self.hub.put(name)
            return self._answer(200, {"url": f"{address}/{name}", "id": "0", "name": name})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path.partition("?")[0]):
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            kinds = [
                {"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                for f in files
            ]
            return self._answer(200, {"files": kinds})
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.path):
            objects = [
                {
                    **o,
                    "authenticated": True,
                    "actions": {"upload": {"href": f"{address}/upload/{o['oid']}", "header": {}}},
                }
                for o in json.loads(body)["objects"]
            ]
            return self._answer(
                200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json"
            )
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path.partition("?")[0]):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.hub.files[found[1]][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.hub.files[found[1]][value["path"]] = self.hub.objects[value["oid"]]
            url = f"{address}/{found[1]}/commit/{COMMIT}"
            return self._answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        return self._wrong(404, "RepoNotFound")

    def do_PUT(self):
        self._note()
        self.hub.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer(200)


@contextmanager
def local_hub(patch, cache):
    """The hub's server while the block lasts, with a cache of its own; yields it and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    patch.setenv("HF_ENDPOINT", address)
    patch.setenv("HF_HUB_CACHE", str(cache))
    patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # files are sent as LFS does
    # timm asks as the variables were when the library was imported.
    patch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    try:
        yield hub, address
    finally:
        server.shutdown()
        server.server_close()


def weights(name, seed=0, **options):
    """A timm model with random weights of a seed, in evaluation mode, and its file as the hub keeps it."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **options).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model, save(model.state_dict())


def narrow(patch, networks):
    """Let timm build these networks in these sizes, under their names and by its own functions."""
    entries = timm.models._registry._model_entrypoints
    for name, sizes in networks.items():
        patch.setitem(entries, name, _sized(entries[name], sizes))


def _sized(function, sizes):
    @functools.wraps(function)
    def build(**given):
        return function(**{**sizes, **given})

    return build
