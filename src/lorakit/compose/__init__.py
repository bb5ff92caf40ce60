"""Saved adapters to saved adapters: pure functions on ``AdapterState`` that see no model."""
