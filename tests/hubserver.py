"""A small stand-in for the Hugging Face Hub: standard library only, in memory, on the loopback interface.

It speaks the part of the Hub's HTTP API that `huggingface_hub` uses to create and describe model repositories, to
commit to them and to download from them. Large and binary files go through Git LFS, on a port of their own as the
Hub's go to another host; there is no Xet storage, so clients need HF_HUB_DISABLE_XET=1.

    with HubServer() as hub:
        env = {**os.environ, **hub.environment(cache)}  # for the client process, before it imports huggingface_hub
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.npz", "*.zip", "*.gz")
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
DATE = "2026-01-01T00:00:00.000Z"
BASE_MODEL = re.compile(r"^base_model: *(.*?)\r?$", re.MULTILINE)
REPO_ID = re.compile(r"([\w.-]+/)?[\w.-]+")


class HubError(Exception):
    """An answer that is an error, with the code that tells the client which exception to raise."""

    def __init__(self, status, code, message):
        super().__init__(message)
        self.status = status
        self.code = code


class File(NamedTuple):
    """A file in a commit; `lfs` is the SHA-256 of its content if that is kept outside of git."""

    data: bytes
    lfs: str | None = None

    @property
    def pointer(self):
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.lfs}\nsize {len(self.data)}\n".encode()

    @property
    def oid(self):
        blob = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    def describe(self, path):
        info = {"type": "file", "path": path, "oid": self.oid, "size": len(self.data)}
        if self.lfs:
            info["lfs"] = {"oid": self.lfs, "size": len(self.data), "pointerSize": len(self.pointer)}
        return info


class Commit(NamedTuple):
    sha: str
    parent: str | None
    title: str
    description: str
    files: dict[str, File]


@dataclass
class Repository:
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch, files, title, description=""):
        parent = self.branches.get(branch)
        content = [
            self.name,
            parent,
            title,
            len(self.commits),
            sorted((path, file.oid) for path, file in files.items()),
        ]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, description, files)
        self.branches[branch] = sha
        return sha

    def at(self, revision):
        """The commit of a branch, a tag, or a possibly shortened hash."""
        for names in (self.branches, self.tags):
            if revision in names:
                return self.commits[names[revision]]
        for sha, commit in self.commits.items():
            if len(revision) >= 7 and sha.startswith(revision):
                return commit
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def history(self, revision="main"):
        """The commits up to a revision, newest first."""
        found = [self.at(revision)]
        while found[-1].parent:
            found.append(self.commits[found[-1].parent])
        return found


class HubServer:
    """The server; `repositories` by name, and `requests` as a list of method and path, are for tests to look at.

    Whoever sends `token` is `user` and may do everything; everybody else may only read what is public.
    """

    def __init__(self, user="tester", token="hf_test"):
        self.user = user
        self.token = token
        self.repositories = {}
        self.objects = {}  # content by SHA-256
        self.requests = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        # Two origins: within one, the client follows redirects and misses the headers of the answer that redirects.
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self):
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error):
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, cache):
        """Variables for a client process that is not logged in."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.body = self._read_body()
        try:
            with self.hub.lock:
                self.hub.requests.append((self.command, url.path))
                self._route(url.path)
        except HubError as error:
            headers = {"X-Error-Code": error.code} if error.code else {}
            self.reply({"error": str(error)}, error.status, {"X-Error-Message": str(error), **headers})

    do_HEAD = do_GET  # noqa: N815
    do_POST = do_GET  # noqa: N815
    do_PUT = do_GET  # noqa: N815

    def log_message(self, *args):
        pass

    def _read_body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self, path):
        for methods, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, path)
            if self.command in methods.split() and found:
                answer(self, **{name: value and unquote(value) for name, value in found.groupdict().items()})
                return
        raise HubError(404, None, f"This stand-in has no route for {self.command} {path}")

    def reply(self, content=b"", status=200, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header(
            "Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json"
        )
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self):
        return json.loads(self.body or b"{}")

    def is_known(self):
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def readable(self, repo):
        """A repository, which those who may not read it cannot tell from one that does not exist."""
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not self.is_known()):
            raise HubError(404 if self.is_known() else 401, "RepoNotFound", "Repository not found")
        return found

    def writable(self, repo):
        self.check_known()
        return self.readable(repo)

    def check_known(self):
        if not self.is_known():
            raise HubError(401, None, "Invalid username or password.")

    # Account and repositories

    def who_am_i(self):
        self.check_known()
        self.reply({"type": "user", "id": "1", "name": self.hub.user, "fullname": self.hub.user, "orgs": []})

    def validate_yaml(self):
        """As the Hub, refuse a card whose base model is a path."""
        found = BASE_MODEL.search(self.json()["content"].split("\n---", 1)[0])
        if found and not REPO_ID.fullmatch(found[1].strip("'\"")):
            message = f'"base_model" with value "{found[1]}" is not valid. Use a model id from https://hf.co/models.'
            self.reply({"errors": [{"message": message}], "warnings": []}, 400)
        else:
            self.reply({"errors": [], "warnings": []})

    def create(self):
        self.check_known()
        wanted = self.json()
        name = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            self.reply({"error": "You already created this model repo", "url": url}, 409)
            return
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repository = self.hub.repositories[name] = Repository(name, private)
        repository.commit("main", {".gitattributes": File(GIT_ATTRIBUTES)}, "initial commit")
        self.reply({"url": url, "name": name, "id": name})

    def info(self, repo, revision=None):
        repository = self.readable(repo)
        commit = repository.at(revision or "main")
        self.reply(
            {
                "_id": "0",
                "id": repo,
                "modelId": repo,
                "sha": commit.sha,
                "private": repository.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "createdAt": DATE,
                "lastModified": DATE,
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
                "spaces": [],
            }
        )

    def tree(self, repo, revision, folder=None):
        files = self.readable(repo).at(revision).files
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        inside = {path: file for path, file in sorted(files.items()) if path.startswith(prefix)}
        if folder and not inside:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist")
        folders = {path[: path.index("/", len(prefix))] for path in inside if "/" in path[len(prefix) :]}
        found = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)]
        whole = self.query.get("recursive", "").lower() in ("true", "1")
        found += [file.describe(path) for path, file in inside.items() if whole or "/" not in path[len(prefix) :]]
        self.reply(found)

    def paths_info(self, repo, revision):
        files = self.readable(repo).at(revision).files
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = self.json()["paths"] if is_json else parse_qs(self.body.decode()).get("paths", [])
        self.reply([files[path].describe(path) for path in paths if path in files])

    def refs(self, repo):
        repository = self.readable(repo)
        kinds = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
        found = {
            kind: [{"name": name, "ref": f"refs/{part}/{name}", "targetCommit": sha} for name, sha in names.items()]
            for kind, (part, names) in kinds.items()
        }
        self.reply({**found, "converts": [], "pullRequests": []})

    def commits(self, repo, revision):
        history = self.readable(repo).history(revision)
        self.reply(
            [
                {"id": commit.sha, "title": commit.title, "message": "", "date": DATE, "authors": [{"user": "tester"}]}
                for commit in history
            ]
        )

    def create_branch(self, repo, name):
        repository = self.writable(repo)
        if name in repository.branches:
            raise HubError(409, None, "Reference already exists")
        repository.branches[name] = repository.at(self.json().get("startingPoint") or "main").sha
        self.reply({})

    def create_tag(self, repo, revision):
        repository = self.writable(repo)
        repository.tags[self.json()["tag"]] = repository.at(revision).sha
        self.reply({})

    # Upload

    def preupload(self, repo, revision):
        commit = self.writable(repo).at(revision)
        answers = []
        for wanted in self.json()["files"]:
            name = wanted["path"].rpartition("/")[2]
            is_binary = b"\0" in base64.b64decode(wanted["sample"])
            is_large = is_binary or any(fnmatch.fnmatch(name, pattern) for pattern in LFS_PATTERNS)
            old = commit.files.get(wanted["path"])
            answers.append(
                {
                    "path": wanted["path"],
                    "uploadMode": "lfs" if is_large else "regular",
                    "shouldIgnore": False,
                    "oid": old and (old.lfs or old.oid),
                }
            )
        self.reply({"files": answers, "commitOid": commit.sha})

    def lfs_batch(self, repo):
        self.writable(repo)
        answers = []
        for wanted in self.json()["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if wanted["oid"] not in self.hub.objects:  # else the client has nothing to do
                upload = {"href": f"{self.hub.storage_url}/lfs-storage/{wanted['oid']}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs-verify"}}
            answers.append(answer)
        self.reply({"transfer": "basic", "objects": answers})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, None, "The content has another SHA-256 than was announced")
        self.hub.objects[oid] = self.body
        self.reply()

    def lfs_verify(self):
        wanted = self.json()
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, None, "The object is missing")
        self.reply({})

    def commit(self, repo, revision):
        repository = self.writable(repo)
        head = repository.at(revision)
        if revision not in repository.branches:
            raise HubError(404, "RevisionNotFound", f"Not a branch: {revision}")
        files, header = dict(head.files), {}
        for line in filter(None, self.body.splitlines()):
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
                if not head.sha.startswith(value.get("parentCommit") or ""):
                    raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
            else:
                self._change(files, key, value)
        answer = {}
        if "create_pr" in self.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.branches)
            revision = f"refs/pr/{number}"
            repository.branches[revision] = head.sha
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        sha = repository.commit(revision, files, header["summary"], header.get("description", ""))
        url = f"{self.hub.url}/{repo}/commit/{sha}"
        self.reply({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": "", **answer})

    def _change(self, files, key, value):
        if key == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]))
        elif key == "lfsFile" and value["oid"] in self.hub.objects:
            files[value["path"]] = File(self.hub.objects[value["oid"]], value["oid"])
        elif key == "deletedFile" and value["path"] in files:
            del files[value["path"]]
        else:
            raise HubError(400, None, f"Cannot carry out {key} of {value.get('path')}")

    # Download

    def resolve(self, repo, revision, path):
        commit = self.readable(repo).at(revision)
        file = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.sha}
        if file is None:
            code = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self.reply({"error": "Entry not found"}, 404, {**headers, **code})
        elif file.lfs:
            headers["X-Linked-Size"] = str(len(file.data))
            headers["X-Linked-Etag"] = f'"{file.lfs}"'
            self.reply(b"", 302, {**headers, "Location": f"{self.hub.storage_url}/lfs-storage/{file.lfs}"})
        else:
            self.reply(file.data, 200, {**headers, "ETag": f'"{file.oid}"'})

    def lfs_get(self, oid):
        if oid not in self.hub.objects:
            raise HubError(404, "EntryNotFound", "There is no such object")
        self.reply(self.hub.objects[oid], 200, {"ETag": f'"{oid}"'})


MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
REVISION = r"/(?P<revision>[^/]+)"
OBJECT = r"/lfs-storage/(?P<oid>[0-9a-f]{64})"
ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.who_am_i),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", r"/api/repos/create", _Handler.create),
    ("GET HEAD", MODEL, _Handler.info),
    ("GET HEAD", rf"{MODEL}/revision{REVISION}", _Handler.info),
    ("GET", rf"{MODEL}/tree{REVISION}(?:/(?P<folder>.+))?", _Handler.tree),
    ("POST", rf"{MODEL}/paths-info{REVISION}", _Handler.paths_info),
    ("GET", rf"{MODEL}/refs", _Handler.refs),
    ("GET", rf"{MODEL}/commits{REVISION}", _Handler.commits),
    ("POST", rf"{MODEL}/branch/(?P<name>[^/]+)", _Handler.create_branch),
    ("POST", rf"{MODEL}/tag{REVISION}", _Handler.create_tag),
    ("POST", rf"{MODEL}/preupload{REVISION}", _Handler.preupload),
    ("POST", rf"{MODEL}/commit{REVISION}", _Handler.commit),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", OBJECT, _Handler.lfs_put),
    ("GET HEAD", OBJECT, _Handler.lfs_get),
    ("POST", r"/lfs-verify", _Handler.lfs_verify),
    ("GET HEAD", rf"/(?P<repo>[^/]+/[^/]+)/resolve{REVISION}/(?P<path>.+)", _Handler.resolve),
]
