"""Who serves what, and whether to believe it: signed records in a Kademlia table.

Importing `hivemind.dht` would also run `hivemind/__init__.py`, which imports trainers, optimizers
and scipy (a third of a second, 28 MB). So here `hivemind` becomes the package that it is, except
that this file of it runs when somebody first wants a name that it defines.
"""

import sys
from importlib.util import find_spec, module_from_spec


def _make_hivemind_lazy() -> None:
    spec = find_spec("hivemind")
    if spec is None or (loader := spec.loader) is None:
        return  # `swarm.dht.node` will say so
    package = module_from_spec(spec)

    def find(name: str) -> object:
        if submodule := sys.modules.get(f"hivemind.{name}"):  # half imported, as in a circle
            return submodule
        if name == "DHT" and (dht := sys.modules.get("hivemind.dht")):
            return dht.DHT  # which its own modules ask for while they are imported
        if package.__dict__.pop("__getattr__", None):
            loader.exec_module(package)
        return getattr(package, name)

    package.__dict__["__getattr__"] = find  # PEP 562
    sys.modules["hivemind"] = package


if "hivemind" not in sys.modules:
    _make_hivemind_lazy()
