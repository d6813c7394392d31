"""Classifiers of timm, transformers and plain PyTorch: loading, preprocessing, layers, saving."""
