"""From files to microbatches: reading, tokenizing, packing, ordering."""
