"""Scales from data: observe, merge over ranks, freeze."""
