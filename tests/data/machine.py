"""What tests need of a machine: a server, a disk that fills up, a user without rights."""

import contextlib
import hashlib
import http.server
import os
import pathlib
import resource
import shutil
import tempfile
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def serve(files: dict[str, bytes]) -> Iterator[str]:
  """Serves files by name until the end of the block; gives the address before the names.

  What is in `files` may be changed meanwhile: the length that is announced stays that of the start, so that less is a
  download that breaks off.
  """
  lengths = {name: len(content) for name, content in files.items()}

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      name = self.path.removeprefix("/")
      self.send_response(200 if name in files else 404)
      self.send_header("Content-Length", str(lengths.get(name, 0)))
      self.end_headers()
      if self.command == "GET":
        self.wfile.write(files.get(name, b""))

    do_HEAD = do_GET

    def log_message(self, *arguments):
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield f"http://127.0.0.1:{server.server_port}/"
  finally:
    server.shutdown()
    server.server_close()


def url_infos(files: dict[str, bytes], address: str) -> dict:
  """Size, checksum and name of files at that address, as TFDS keeps them."""
  import tensorflow_datasets as tfds

  return {
    address + name: tfds.download.checksums.UrlInfo(
      tfds.core.utils.Size(len(content)), hashlib.sha256(content).hexdigest(), name
    )
    for name, content in files.items()
  }


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
  """No file of this process may have more bytes: writing more fails in the middle, as on a full disk."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def plain_user() -> Iterator[None]:
  """File permissions count, also where tests run as root."""
  user = os.geteuid()
  if user == 0:
    os.seteuid(65534)
  try:
    yield
  finally:
    os.seteuid(user)


@contextlib.contextmanager
def open_folder() -> Iterator[pathlib.Path]:
  """An empty folder, removed at the end, that `plain_user` can reach and read, which he cannot with `tmp_path`."""
  path = pathlib.Path(tempfile.mkdtemp())
  path.chmod(0o755)
  try:
    yield path
  finally:
    for folder in (path, *path.rglob("*/")):
      folder.chmod(0o700)
    shutil.rmtree(path)
