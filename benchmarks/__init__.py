"""Benchmarks of aca_ext against its peers: ``python -m benchmarks`` in the repository's root, one file per question."""
