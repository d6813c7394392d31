"""hfdetox in other libraries' training loops."""
