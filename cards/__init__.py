"""The templates of the model card (Jinja), read as package data of `hfdetox.cards`."""
