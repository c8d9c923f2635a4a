"""Figures, tables and the report of finished runs, from their saved records alone."""
