"""The console commands: `swarm`, `swarm-server`, `swarm-dht`. Nothing heavy is imported here."""

from swarm.cli.main import dht_main, main, server_main

__all__ = ["dht_main", "main", "server_main"]
