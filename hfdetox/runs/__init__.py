"""A run as it lies on the disk: its folder, its plan, its result, and how that is published."""
