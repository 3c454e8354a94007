"""Fine-tuning as one job: settings in, a run's folder and its report out."""

from gemma_lora.base.lazy import lazy_names

_MODULES: dict[str, list[str]] = {
    "finetuning": [
        "BASE_SPLITS",
        "Settings",
        "finetune",
        "claim",
        "remove_run",
        "progress_bar",
        "versions",
        "report_table",
    ],
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
