"""Adapters: what a directory of each export format says about itself."""
