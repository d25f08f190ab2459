"""What probes know of words: edits, WordNet, a sentence embedder, paraphrases."""
