"""The version of the package, where everything below the package's face can read it."""

__version__ = "0.2.0"
