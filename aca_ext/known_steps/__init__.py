"""Solutions along steps that are known: replayed as a function of their inputs."""
