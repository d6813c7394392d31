"""What a person reads afterwards: reports, cards, plots and galleries."""
