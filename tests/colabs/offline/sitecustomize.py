"""On the path of a notebook's kernel: whatever reaches for another machine fails.

The kernel talks to the test through sockets that ZeroMQ opens by itself, not Python.
"""

import socket

LOCAL_HOSTS = {"127.0.0.1", "::1", "localhost"}


def _local_only(function):
    def connect(self, address):
        if self.family != socket.AF_UNIX and address[0] not in LOCAL_HOSTS:
            raise RuntimeError(f"a notebook tried to connect to {address}")
        return function(self, address)

    return connect


def _no_lookup(host, *_, **__):
    raise RuntimeError(f"a notebook tried to look up {host}")


socket.socket.connect = _local_only(socket.socket.connect)
socket.socket.connect_ex = _local_only(socket.socket.connect_ex)
socket.getaddrinfo = _no_lookup
