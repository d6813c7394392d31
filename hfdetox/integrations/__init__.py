"""hfdetox inside other libraries' loops: `transformers.Trainer`."""

from hfdetox.integrations.trainer import D3Callback, D3Trainer

__all__ = ["D3Callback", "D3Trainer"]
