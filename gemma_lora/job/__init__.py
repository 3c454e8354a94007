"""Fine-tuning as one job: settings in, a run's folder and its report out."""

from gemma_lora.base.lazy import lazy_names

_MODULES: dict[str, list[str]] = {
    "finetuning": ["Settings", "finetune", "check_inputs"],
    "folder": ["claim", "finished_metrics", "remove_run", "versions"],
    "report": ["progress_bar", "report_table"],
    "stages": ["BASE_SPLITS"],
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
