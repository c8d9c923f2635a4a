"""Measurements; a package by this file, since a dependency installs another `benchmarks`."""
