"""Benches and zoos: many runs, each a process of its own, compared in tables and pictures."""
