"""The test Hub by its earlier address, for scripts that start it from a clone."""

from tests.hub_server.server import HubServer

__all__ = ["HubServer"]
