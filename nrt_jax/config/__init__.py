"""The schema of every config file, one file a section; free of jax."""
