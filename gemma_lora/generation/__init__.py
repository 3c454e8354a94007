"""Answers: batched generation with a cache, and scores of answers."""

from gemma_lora.base.lazy import lazy_names

_MODULES: dict[str, list[str]] = {
    "chat": ["Chat"],
    "engine": ["generate", "generate_tokens"],
    "evaluation": [
        "parse_object",
        "is_match",
        "exact_match",
        "field_scores",
        "Scores",
        "evaluate",
        "score",
        "TeacherForced",
        "teacher_forced",
        "few_shot_template",
        "english_text",
        "perplexity",
    ],
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
