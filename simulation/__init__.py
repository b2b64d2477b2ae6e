"""A swarm of thousands of machines in simulated time, decided by the real code: docs/scale.md."""
