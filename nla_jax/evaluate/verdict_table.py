"""The questions of the verdict, in one table: what each needs, and its sentence for each answer.

A question whose figures are missing gives no sentence.
"""

from nla_jax.evaluate import verdict_answers as A
from nla_jax.evaluate.verdict_answers import NOT_SHOWN, PARTLY, SHOWN, Question

_PRIVATE = "FVE {fve_frozen_target}; no private code can raise this, because the target is never trained."
_TEXT = "{fve}; the mean direction, the same for every h, has {fve_mean_direction:v}."
_ADD = "{description_gain} FVE beside the ending line, read by AR{frozen}."
_OTHER = "another document's explanation scores {fve_shuffled:v}."
_30 = "of the text: these give {fve_last_30:v} to the better of two readers, and the explanation adds "
_4 = "of the text: these give {fve_last_4:v} to the better of two readers, and the explanation adds "

QUESTIONS = (
    Question(
        ("fve_frozen_target", "fve_mean_direction"),
        A.reads("fve_frozen_target"),
        {
            SHOWN: "The frozen target can read the bare words: " + _PRIVATE,
            PARTLY: "The frozen target gets something from the bare words: " + _PRIVATE,
            NOT_SHOWN: "Not shown that the frozen target can read the bare words: " + _PRIVATE,
        },
    ),
    Question(
        ("fve", "fve_mean_direction"),
        A.reads("fve"),
        {
            SHOWN: "Words carry {fve:variance}; the mean direction, the same for every h, has "
            "{fve_mean_direction:v}.",
            PARTLY: "Words say something, FVE " + _TEXT,
            NOT_SHOWN: "Not shown that words carry anything: FVE " + _TEXT,
        },
    ),
    Question(
        ("fve", "fve_shuffled"),
        A.beats("fve", "fve_shuffled"),
        {
            SHOWN: "They are about this activation: " + _OTHER,
            NOT_SHOWN: "Not shown that they are about this activation: " + _OTHER,
        },
    ),
    Question(
        ("claim_precision", "claim_precision_shuffled"),
        A.beats("claim_precision", "claim_precision_shuffled"),
        {
            SHOWN: "Of their claims, {claim_precision:%} are true of the text by rules "
            "({claim_precision_shuffled:%} are true of another text).",
            NOT_SHOWN: "Not shown that their claims are true: {claim_precision:%} are true of the text "
            "by rules, "
            "and {claim_precision_shuffled:%} of another text.",
        },
    ),
    Question(
        ("claim_precision_judge", "claims_agree", "claims_kappa"),
        lambda f: SHOWN,
        {
            SHOWN: "An LLM that judges the claims finds {claim_precision_judge:%} true; it agrees with the "
            "rules on {claims_agree:%} (kappa {claims_kappa})."
        },
    ),
    Question(
        ("description_gain",),
        A.positive("description_gain"),
        {
            SHOWN: "The description lines add " + _ADD,
            NOT_SHOWN: "Not shown that the description lines add anything: " + _ADD,
        },
        A.description_fields,
    ),
    Question(
        ("token_path_gain",),
        A.positive("token_path_gain", A.SMALL),
        {
            SHOWN: "CHANNEL: the tokens carry {token_path_gain:v} more than their text; it hides in "
            "how words "
            "are cut.",
            NOT_SHOWN: "No hidden channel to speak of: the tokens carry {token_path_gain} more than "
            "their text.",
        },
    ),
    Question(
        ("fve", "fve_mean_direction"),
        A.stranger_answer,
        {
            SHOWN: "A stranger can read them: {told}, {share} of what their own AR has over the "
            "mean direction.",
            PARTLY: "A stranger can read them: {told}.",
            NOT_SHOWN: "Not shown that anyone but their own AR can read them: {told}.",
        },
        A.stranger_fields,
    ),
    *A.retrieval("embed", "a sentence embedder"),
    *A.retrieval("logp", "the target as a reader"),
    Question(
        ("beyond_last_4", "beyond_last_4_shuffled", "fve_last_4"),
        A.beyond,
        {
            SHOWN: "They say more than the last 30 words " + _30 + "{beyond_last_30:v}.",
            PARTLY: "They say more than the last 4 words " + _4 + "{beyond_last_4:v}.",
            NOT_SHOWN: "Not shown that they say more than a quotation of the last four words: those "
            "alone give "
            "{fve_last_4:v} to the better of two readers, and the explanation adds {beyond_last_4}.",
        },
    ),
    Question(
        ("fve", "fve_quotation_equal", "fve_quotation_equal_frozen"),
        A.equal_length,
        {
            SHOWN: "Of equal length they say more: {told}.",
            PARTLY: "Of equal length they say as much, or it is not shown: {told}.",
            NOT_SHOWN: "Of equal length they say less: {told}.",
            A.NO_RATIO: "Of equal length: {told}.",
        },
        A.best_quotation,
    ),
    Question(
        ("counterfactual_cos", "counterfactual_margin"),
        A.positive("counterfactual_margin"),
        {
            SHOWN: "With a word swapped in text and explanation alike AR moves where the target "
            "moves: cosine "
            "{counterfactual_cos:v}, {counterfactual_margin:v} more than for another word.",
            NOT_SHOWN: "Not shown that AR moves with the target when a word is swapped: margin "
            "{counterfactual_margin}.",
        },
    ),
    Question(
        ("opposite_margin",),
        A.positive("opposite_margin"),
        {
            SHOWN: "Turned into the opposite they lose {opposite_margin:small} more FVE than reworded at the "
            "same places.",
            NOT_SHOWN: "Not shown that AR tells a claim from its opposite: margin {opposite_margin}.",
        },
    ),
    Question(
        ("opposite_margin_frozen",),
        A.negative("opposite_margin_frozen"),
        {
            SHOWN: "OPPOSITES: reversed claims bring the frozen target nearer to h than reworded "
            "ones: margin "
            "{opposite_margin_frozen}. Read them with their sense turned round.",
        },
    ),
    Question(
        ("kl_recovered",),
        A.positive("kl_recovered"),
        {
            SHOWN: "With the reconstruction in place of h the target recovers {kl_recovered:%} of "
            "what the mean "
            "direction loses (KL of its next token).",
            NOT_SHOWN: "Not shown that the target agrees: share of KL recovered {kl_recovered}.",
        },
    ),
    Question(
        ("sae_kept_rare", "sae_kept_rare_shuffled"),
        A.beats("sae_kept_rare", "sae_kept_rare_shuffled"),
        {
            SHOWN: "A sparse autoencoder that no NLA had a part in agrees: the reconstruction keeps "
            "{sae_kept_rare:%} of the rare features of h ({sae_kept_rare_shuffled:%} with another document's "
            "words).",
            NOT_SHOWN: "Not shown that a sparse autoencoder agrees: the reconstruction keeps "
            "{sae_kept_rare:%} of the rare features of h, and {sae_kept_rare_shuffled:%} with another "
            "document's words.",
        },
    ),
    Question(
        ("copied",),
        A.at_least("copied", A.MUCH),
        {SHOWN: "COPIED: {copied:%} of the words are in passages of training texts."},
    ),
    Question(
        ("logp_target", "logp_target_written"),
        lambda f: SHOWN,
        {
            SHOWN: "As English they cost the target {logp_target:cost} nats a token, explanations by an LLM "
            "{logp_target_written:cost}."
        },
    ),
)
