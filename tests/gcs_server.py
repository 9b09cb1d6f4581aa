"""A server of the part of Cloud Storage's JSON API that TensorStore and gcsfs use, with faults on demand.

The emulators on PyPI ignore `ifGenerationMatch`, so two writers of one object would both succeed there. This server
keeps objects in memory and honours generations, ranges, resumable uploads, prefixes, delimiters and page tokens. A
request that it does not know gets status 501 and is kept in `unknown`.
"""

import base64
import hashlib
import http.server
import itertools
import json
import os
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

PAGE = 50  # results on a page, fewer than a client asks for, as the real service may return
WRITES = ("POST", "PUT", "DELETE", "PATCH")


class ApiError(Exception):
    """An answer other than success: (status, reason)."""

    def __init__(self, status: int, reason: str):
        super().__init__(status, reason)
        self.status, self.reason = status, reason


@dataclass
class Fault:
    """Answers with `status` those requests whose "METHOD bucket/object" matches, `times` times (None: always)."""

    pattern: str
    status: int
    times: int | None = None
    seen: int = 0


@dataclass(frozen=True)
class Stored:
    content: bytes
    generation: int
    updated: float


@dataclass
class Store:
    """Objects by bucket and name, and the faults of the server that shows them."""

    buckets: dict[str, dict[str, Stored]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # "METHOD bucket/object" of every request
    before: Callable[[str], object] | None = None  # called with each request, before it is answered
    write_interval: float = 0.0  # seconds between writes of one object, below which the answer is 429

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.uploads: dict[str, tuple[str, str, dict[str, str], bytearray]] = {}
        self.count = itertools.count(time.time_ns() // 1000)

    def objects(self, bucket: str) -> dict[str, Stored]:
        if bucket not in self.buckets:
            raise ApiError(404, "The specified bucket does not exist.")
        return self.buckets[bucket]

    def find(self, bucket: str, name: str, query: dict[str, str]) -> Stored:
        found = self.objects(bucket).get(name)
        if found is None:
            raise ApiError(404, f"No such object: {bucket}/{name}")
        if query.get("ifGenerationNotMatch") == str(found.generation):
            raise ApiError(304, "Not Modified")
        self.check(found, query)
        return found

    def check(self, found: Stored | None, query: dict[str, str]) -> None:
        wanted = query.get("ifGenerationMatch")
        if wanted is not None and int(wanted) != (found.generation if found else 0):
            raise ApiError(412, "At least one of the pre-conditions you specified did not hold.")

    def put(self, bucket: str, name: str, content: bytes, query: dict[str, str]) -> dict[str, Any]:
        objects = self.objects(bucket)
        self.check(objects.get(name), query)
        if (old := objects.get(name)) and time.time() - old.updated < self.write_interval:
            raise ApiError(429, "The object exceeded the rate limit for object mutation operations.")
        objects[name] = Stored(content, next(self.count), time.time())
        return self.describe(bucket, name)

    def describe(self, bucket: str, name: str) -> dict[str, Any]:
        found = self.buckets[bucket][name]
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(found.updated))
        path = f"b/{bucket}/o/{urllib.parse.quote(name, safe='')}"
        return {
            "kind": "storage#object", "id": f"{bucket}/{name}/{found.generation}", "name": name, "bucket": bucket,
            "generation": str(found.generation), "metageneration": "1", "size": str(len(found.content)),
            "timeCreated": stamp, "updated": stamp, "storageClass": "STANDARD",
            "contentType": "application/octet-stream", "mediaLink": f"/download/storage/v1/{path}?alt=media",
            "md5Hash": base64.b64encode(hashlib.md5(found.content).digest()).decode(),
        }  # fmt: skip

    def listing(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        """Return one page of the names and prefixes, in order."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        entries: dict[str, str] = {}  # what is shown -> the kind of it
        for name in self.objects(bucket):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if "endOffset" in query and name >= query["endOffset"]:
                continue
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            entries[name if cut < 0 else name[: cut + len(delimiter)]] = "items" if cut < 0 else "prefixes"
        names = sorted(name for name in entries if name > query.get("pageToken", ""))
        most = min(PAGE, int(query.get("maxResults", PAGE)))
        page: dict[str, Any] = {"kind": "storage#objects"}
        for name in names[:most]:
            shown = self.describe(bucket, name) if entries[name] == "items" else name
            page.setdefault(entries[name], []).append(shown)
        return page | ({"nextPageToken": names[most - 1]} if len(names) > most else {})


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet per answer; several wait 40 ms for each other
    store: Store

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(address.query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        form = r"(?P<upload>/upload|/download)?/storage/v1/b/(?P<bucket>[^/]+)(?P<objects>/o(?:/(?P<name>[^/]*))?)?"
        form += r"(?:/(?P<change>moveTo|rewriteTo/b/(?P<to_bucket>[^/]+))/o/(?P<to_name>[^/]*))?"
        match = re.fullmatch(form, address.path)
        parts = match.groupdict() if match else {}
        name = urllib.parse.unquote(parts.get("name") or query.get("name", ""))
        shown = f"{self.command} {parts.get('bucket', address.path)}/{name}"
        if self.store.before is not None:
            self.store.before(shown)
        try:
            with self.store.lock:
                self.store.requests.append(shown)
                self.fail_on_demand(shown)
                if not match:
                    raise ApiError(501, "unknown")
                answer = self.answer(parts, name, query, body)
            status, headers, content = answer
        except ApiError as error:
            if error.status == 501:
                self.store.unknown.append(f"{self.command} {self.path}")
            status, headers = error.status, {}
            content = json.dumps({"error": {"code": error.status, "message": error.reason}}).encode()
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content if status != 304 else b"")

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any

    def fail_on_demand(self, shown: str) -> None:
        for fault in self.store.faults:
            if re.search(fault.pattern, shown) and fault.times != 0:
                fault.seen += 1
                fault.times = None if fault.times is None else fault.times - 1
                raise ApiError(fault.status, {403: "The caller does not have permission"}.get(fault.status, "injected"))

    def answer(
        self, parts: dict[str, str | None], name: str, query: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        store, bucket, method = self.store, parts["bucket"] or "", self.command
        as_json = lambda value: (200, {"Content-Type": "application/json"}, json.dumps(value).encode())
        if parts["upload"] == "/upload":
            return self.upload(bucket, name, query, body)
        if not parts["objects"]:
            store.objects(bucket)
            return as_json({"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US"})
        if method == "GET" and not name:
            return as_json(store.listing(bucket, query))
        if method == "GET":
            found = store.find(bucket, name, query)
            return self.media(found) if query.get("alt") == "media" else as_json(store.describe(bucket, name))
        if method == "POST" and parts["to_name"]:
            target = parts["to_bucket"] or bucket, urllib.parse.unquote(parts["to_name"])
            copy = store.put(*target, store.find(bucket, name, {}).content, query)
            if parts["change"] != "moveTo":
                return as_json({"kind": "storage#rewriteResponse", "done": True, "resource": copy})
            del store.objects(bucket)[name]
            return as_json(copy)
        if method == "DELETE" and name:
            store.find(bucket, name, query)
            del store.objects(bucket)[name]
            return 204, {}, b""
        raise ApiError(501, "unknown")

    def media(self, found: Stored) -> tuple[int, dict[str, str], bytes]:
        content, size = found.content, len(found.content)
        headers = {"Content-Type": "application/octet-stream", "x-goog-generation": str(found.generation)}
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            first, last = match.groups()
            start = int(first) if first else max(0, size - int(last))
            end = min(size, int(last) + 1) if first and last else size
            if start >= size:
                raise ApiError(416, "The requested range cannot be satisfied.")
            return 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{size}"}, content[start:end]
        return 200, headers, content

    def upload(self, bucket: str, name: str, query: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        store, kind = self.store, query.get("uploadType")
        store.objects(bucket)
        if "upload_id" in query:
            return self.chunk(query["upload_id"], body)
        if kind == "resumable":
            name = name or json.loads(body)["name"]
            upload = f"upload-{next(store.count)}"
            store.uploads[upload] = (bucket, name, query, bytearray())
            host, address = self.headers["Host"], f"/upload/storage/v1/b/{bucket}/o?uploadType=resumable"
            return 200, {"Location": f"http://{host}{address}&upload_id={upload}"}, b""
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"] or "")
            assert boundary is not None
            _, meta, content, _ = body.split(b"--" + boundary[1].encode(), 3)
            name = json.loads(meta.partition(b"\n\n")[2])["name"]
            self.fail_on_demand(f"{self.command} {bucket}/{name}")
            body = content.partition(b"\n\n")[2][:-1]
        elif kind != "media":
            raise ApiError(501, "unknown")
        return 200, {"Content-Type": "application/json"}, json.dumps(store.put(bucket, name, body, query)).encode()

    def chunk(self, upload: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Add to a resumable upload; the object appears with the last chunk."""
        bucket, name, query, received = self.store.uploads[upload]
        if self.command == "DELETE":
            del self.store.uploads[upload]
            return 499, {}, b""
        match = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range") or "")
        if match is None or int(match[1] or len(received)) != len(received):
            raise ApiError(400, "Invalid Content-Range")
        received += body
        if match[3] == "*" or int(match[3]) > len(received):
            return 308, {"Range": f"bytes=0-{len(received) - 1}"} if received else {}, b""
        stored = self.store.put(bucket, name, bytes(received), query)
        return 200, {"Content-Type": "application/json"}, json.dumps(stored).encode()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def client_environment(port: int) -> dict[str, str]:
    """Return the variables that lead TensorStore and gcsfs to the server, without a search for credentials."""
    url = f"http://127.0.0.1:{port}"
    return {
        "TENSORSTORE_GCS_HTTP_URL": url, "STORAGE_EMULATOR_HOST": url, "FSSPEC_GS_TOKEN": "anon",
        "GCE_METADATA_ROOT": "127.0.0.1:1", "CLOUDSDK_CONFIG": os.devnull,
    }  # fmt: skip


@contextmanager
def serve_bucket(store: Store | None = None, port: int = 0) -> Iterator[tuple[Store, int]]:
    """Serve a store with one empty bucket, "bucket", on a port of this machine. Yield (store, port)."""
    store = store or Store({"bucket": {}})
    with _Server(("127.0.0.1", port), type("BoundHandler", (Handler,), {"store": store})) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield store, server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
