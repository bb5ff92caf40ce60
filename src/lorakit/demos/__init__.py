"""Demonstrations on data that ships with the package; nothing is downloaded."""
