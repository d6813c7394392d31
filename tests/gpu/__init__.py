"""Everything for the minutes in which a GPU is there: see docs/development.md."""
