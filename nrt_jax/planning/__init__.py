"""`nrt-jax plan`: memory, operations, traffic and time of a run, on machines by their names."""
