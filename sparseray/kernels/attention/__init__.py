"""Full attention: decoding over paged caches; a backward pass in one order."""
