"""Fitting adapters: data, tasks, the loop, and what a run leaves behind."""
