"""Answers: batched generation with a cache, scores of answers, how likely answers are."""

from gemma_lora.base.lazy import lazy_names

_MODULES: dict[str, list[str]] = {
    "chat": ["Chat"],
    "engine": ["generate", "generate_tokens"],
    "matching": ["parse_object", "json_equal", "is_match", "exact_match", "field_scores"],
    "bootstrap": ["Estimate", "PerLine", "estimates", "differences"],
    "chrf": ["chrf_lines"],
    "classes": ["Confusion", "confusion", "macro_f1"],
    "metrics": ["Scores", "choose_metric", "score", "compare"],
    "likelihood": ["AnswerLoss", "answer_losses", "TeacherForced", "teacher_forced", "english_text", "perplexity"],
    "classify": ["classify"],
    "worked_examples": ["few_shot_template", "separator_of"],
    "evaluation": ["Answers", "answer", "evaluate", "tokens_needed"],
    "base_text": ["base_text"],
    "callbacks": ["ScoreAfterEpoch"],
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
