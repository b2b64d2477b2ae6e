"""What a swarm costs and gives, measured: `python -m benchmarks`; docs/benchmarks.md explains."""
