"""`nrt-jax launch`: the files of launch/, filled in for a config and a topology."""
