"""Measuring: accuracy, attack success, and what they allow to be said."""
