"""The schema of every config file, one file per section; imports no jax."""
