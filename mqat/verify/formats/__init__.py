"""Adapters: what each format's directory says of itself, written from the formats' descriptions."""
