"""One file a family of models, as data."""
