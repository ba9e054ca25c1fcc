"""CURVE keys: who a server is, and which clients it serves. Files are ZMQ certificates, as `zmq.auth` reads them.

DIR/server.key          public, for the clients
DIR/server.key_secret   the server's alone
DIR/clients/NAME.key    public keys of the clients that are served
DIR/NAME.key_secret     a client's, to be given to it
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import zmq
import zmq.auth

_HEADER = "#   {what} of {name}, a ZMQ CURVE certificate for rollout-server\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerKeys:
    """A server's own keys and the public keys of its clients, in ZMQ's Z85 form."""

    public: bytes
    secret: bytes
    clients: frozenset[bytes]

    @classmethod
    def load(cls, folder: str | Path) -> ServerKeys:
        """From a folder that `write_keys` filled. Raises ValueError where a file is missing or no certificate."""
        folder = Path(folder)
        public, secret = load_certificate(folder / "server.key_secret", secret=True)
        clients = [load_certificate(path)[0] for path in sorted((folder / "clients").glob("*.key"))]
        if not clients:
            raise ValueError(f"keys: {folder / 'clients'} has no key of a client: nobody could connect")
        return cls(public=public, secret=secret, clients=frozenset(clients))


def load_certificate(path: str | os.PathLike[str], *, secret: bool = False) -> tuple[bytes, bytes]:
    """(public key, secret key or b""). Raises ValueError for a file that is missing or lacks what is asked for."""
    try:
        public, private = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"keys: cannot read {path}: {error}") from None
    if secret and private is None:
        raise ValueError(f"keys: {path} holds no secret key")
    return public, private or b""


def write_keys(folder: str | Path, clients: Iterable[str]) -> list[Path]:
    """Make keys of the server, if there are none yet, and of these clients; returns the files written.

    Raises ValueError for a name that is no plain file name or is taken: keys are never overwritten.
    """
    folder = Path(folder)
    names = list(clients)
    for name in names:
        if not name or name in ("server", ".", "..") or "/" in name:
            raise ValueError(f"client must be a plain file name other than 'server', got {name!r}")
        if (folder / f"{name}.key_secret").exists():
            raise ValueError(f"client {name!r} has keys in {folder} already")
    (folder / "clients").mkdir(parents=True, exist_ok=True)
    written = []
    if not (folder / "server.key_secret").exists():
        written += _write_pair(folder, folder, "server")
    for name in names:
        written += _write_pair(folder, folder / "clients", name)
    return written


def _write_pair(folder: Path, public_folder: Path, name: str) -> list[Path]:
    public, secret = zmq.curve_keypair()
    files = [public_folder / f"{name}.key", folder / f"{name}.key_secret"]
    _write(files[0], _HEADER.format(what="Public key", name=name), [("public-key", public)], 0o644)
    pairs = [("public-key", public), ("secret-key", secret)]
    _write(files[1], _HEADER.format(what="SECRET key", name=name), pairs, 0o600)
    return files


def _write(path: Path, header: str, keys: list[tuple[str, bytes]], mode: int) -> None:
    lines = [header, "\nmetadata\ncurve\n", *(f'    {name} = "{key.decode()}"\n' for name, key in keys)]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write("".join(lines))


def check_endpoint(endpoint: str, *, has_keys: bool) -> None:
    """Raise ValueError unless `endpoint` is tcp://ADDRESS:PORT or ipc://PATH, and there are keys where it needs them.

    Loopback addresses need none, nor does ipc, whose file permissions are its protection.
    """
    scheme, _, rest = endpoint.partition("://")
    if scheme == "ipc" and rest:
        return
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if scheme != "tcp" or not host or port is None:
        raise ValueError(f"endpoint must be tcp://ADDRESS:PORT or ipc://PATH, got {endpoint!r}")
    if not has_keys and not is_loopback(host):
        raise ValueError(
            f"endpoint {endpoint!r} is reachable from other machines, and anyone there could act: make keys with "
            "`rollout-server keygen` and pass them, or bind 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
