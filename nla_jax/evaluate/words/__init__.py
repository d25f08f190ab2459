"""Edit and compare words for the probes: edits, WordNet, a sentence embedder, paraphrases."""
