"""Where the ranks of a job meet: an address of this host, and a port nobody else gets."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
from collections.abc import Generator

import psutil

from zeroshard.errors import UsageError, compose

__all__ = ["check_address", "reserve_port"]


def check_address(address: str) -> None:
    """Refuse an address that the ranks of this host could not listen at."""
    try:
        found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(
            compose(
                f"--master_addr {address} cannot be resolved: {error.strerror}.",
                hint="leave it out on one host; the ranks then meet at 127.0.0.1.",
            )
        ) from error
    for family, kind, protocol, _, place in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(place)
            return
    raise UsageError(
        compose(
            f"--master_addr {address} is not an address of this host ({socket.gethostname()}), "
            "where rank 0 runs.",
            hint="leave it out on one host; the ranks then meet at 127.0.0.1.",
        )
    )


@contextlib.contextmanager
def reserve_port(port: int | None) -> Generator[socket.socket, None, None]:
    """Keep a port for rank 0 to listen at, and yield the socket; None takes one that is free.

    A bound socket with SO_REUSEADDR that does not listen stops the kernel from giving the port to
    anybody who asks for a free one, but not rank 0, who asks for this one. So no other job can
    come between choosing the port and using it, however long the ranks take to start.

    Another launcher that asks for this very port meanwhile could bind it just as well. A second
    socket keeps it out: a name that only one process can have.

    Raises:
        UsageError: the port is in use, or not ours to use.
    """
    with _any_address() as holder, socket.socket(socket.AF_UNIX) as name:
        try:
            holder.bind(("", port or 0))
            if sys.platform == "linux":  # names outside of the file system end with their owner
                name.bind(f"\0zeroshard-port-{holder.getsockname()[1]}")
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                fact = f"port {port} of this host is in use{_user_of(port)}."
            else:
                fact = f"port {port} of this host cannot be used: {error.strerror}."
            raise UsageError(
                compose(fact, hint="leave --master_port out to take a port that is free.")
            ) from error
        yield holder


def _any_address() -> socket.socket:
    """Return a socket for every address of this host, of both kinds where the host has both."""
    if socket.has_dualstack_ipv6():
        holder = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    else:
        holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return holder


def _user_of(port: int | None) -> str:
    """Name the process that listens at a port, as far as this user may see it."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            at_port = connection.laddr and connection.laddr.port == port
            if at_port and connection.status == psutil.CONN_LISTEN and connection.pid:
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f" by process {connection.pid} ({command[:80]})"
    return ""
