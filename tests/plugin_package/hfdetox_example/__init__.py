"""A package of its own with one defense, one trigger and one attack for hfdetox: for the tests."""
