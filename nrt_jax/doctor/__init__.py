"""`nrt-jax doctor`: what this machine has, how fast it is, and the first thing that is wrong."""
