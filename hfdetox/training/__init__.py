"""The one training loop, its phases, and what phases are built from."""
