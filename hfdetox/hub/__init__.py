"""The Hub: requests, downloads that are checked, uploads that are checked."""
