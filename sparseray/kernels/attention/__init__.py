"""Full attention over paged caches: decoding."""
