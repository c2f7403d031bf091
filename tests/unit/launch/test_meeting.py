from __future__ import annotations

import os
import socket
import sys

import pytest

from zeroshard.errors import UsageError
from zeroshard.launch.meeting import check_address, reserve_port


def test_a_reserved_port_is_rank_0s_to_take_and_nobody_elses() -> None:
    with reserve_port(None) as holder, socket.socket() as stranger, socket.socket() as rank:
        port = holder.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            stranger.bind(("", port))
        rank.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        rank.bind(("", port))
        rank.listen()
        with reserve_port(None) as other:
            assert other.getsockname()[1] != port


@pytest.mark.parametrize("address", ["", "127.0.0.1"])
def test_a_port_in_use_is_refused_with_the_process_that_uses_it(address: str) -> None:
    with socket.socket() as taken:
        taken.bind((address, 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = f"port {port} .* in use by process {os.getpid()} "
        with pytest.raises(UsageError, match=found), reserve_port(port):
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="has no names outside of the file system")
def test_a_port_that_another_launch_keeps_is_in_use_before_anybody_listens() -> None:
    with reserve_port(None) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} of this host is in use"):
            reserve_port(port).__enter__()
    with reserve_port(port):
        pass


def test_a_port_that_is_free_is_kept_as_asked() -> None:
    with reserve_port(None) as probe:
        port = probe.getsockname()[1]
    with reserve_port(port) as holder:
        assert holder.getsockname()[1] == port


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1", "0.0.0.0"])
def test_addresses_of_this_host_pass(address: str) -> None:
    check_address(address)


def test_other_addresses_are_refused() -> None:
    with pytest.raises(UsageError, match=r"192\.0\.2\.1 is not an address of this host"):
        check_address("192.0.2.1")  # reserved for documents, so nobody's
    with pytest.raises(UsageError, match=r"host.invalid cannot be resolved"):
        check_address("host.invalid")
