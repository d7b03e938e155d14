"""Strict settings for every test: set before jax starts, no exceptions hidden."""

import os

# Read when the libraries are first imported, so they come before any other import.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: this halves the time of a compilation.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import socket

import jax
import pytest

VIRTUAL_DEVICES = 8

jax.config.update("jax_num_cpu_devices", VIRTUAL_DEVICES)
jax.config.update("jax_numpy_rank_promotion", "raise")

LOCAL_HOSTS = {"127.0.0.1", "::1", "localhost"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """No workers for a single file: `--dist loadfile` would use one of them."""
    files = {argument.split("::")[0] for argument in config.args}
    return 0 if len(files) == 1 and files.pop().endswith(".py") else None


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches for another machine fails at once, and says so."""
    connect = socket.socket.connect

    def connect_locally(self, address):
        if self.family != socket.AF_UNIX and address[0] not in LOCAL_HOSTS:
            raise RuntimeError(f"a test tried to connect to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)
