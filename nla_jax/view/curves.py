"""The drift curve: what RL logs of held-out rows, as tables for the charts of a page."""

# (title, expected course, lines (stage, metric, name)). A name that begins with "1 - " plots 1 - value.
DRIFT = (
    ("FVE on held-out rows while training", "should rise; another document's words should not",
     (("rl", "heldout_fve", "through text"), ("rl", "heldout_fve_frozen_target", "by the frozen target"),
      ("rl", "heldout_fve_warm_ar", "by the warm start's AR"),
      ("rl", "heldout_fve_paraphrase", "paraphrased"),
      ("rl", "heldout_fve_shuffled", "another document's words"),
      ("rl", "heldout_fve_words_shuffled", "words in random order"),
      ("rl", "heldout_fve_quotes_only", "quotes alone"), ("rl", "heldout_fve_prose_only", "prose alone"))),
    ("Truth on held-out rows while training", "should not fall; FVE rises whether they do or not",
     (("rl", "heldout_claim_precision", "claims that are true"),
      ("rl", "heldout_description_precision", "the same in the description"),
      ("rl", "heldout_last_word", "last word right"),
      ("rl", "heldout_same_document", "nearest to its own of five tokens"))),
    ("English while training", "should not fall",
     (("rl", "heldout_logp_target", "log-probability under the target (nats a token)"),)),
)
