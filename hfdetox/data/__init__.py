"""Clean images: from a dataset of any kind to cached pixels in the model's label order."""
