"""The passes around GEMMs, and the GEMMs themselves, by what a device is fast at."""
