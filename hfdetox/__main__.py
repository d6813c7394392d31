"""`python -m hfdetox`, also as the module that torchrun and accelerate start."""

from hfdetox.cli.app import main

if __name__ == "__main__":
    main()
