"""Training: `FineTuner`, its callbacks and schedule, checkpoints, checks that a training trains what it should."""

from gemma_lora.base.lazy import lazy_names

_MODULES: dict[str, list[str]] = {
    "checkpoint": ["Checkpoint", "changed_settings"],
    "epochs": ["default_epochs"],
    "health": [
        "Batch",
        "Finding",
        "what_moves",
        "trains_what_it_should",
        "loss_and_gradient",
        "slope_ratio",
        "gradient_is_right",
        "overfits_one_batch",
        "evaluates_alike",
        "padding_is_free",
        "neighbours_are_unseen",
        "pieces",
        "read_back",
        "check",
    ],
    "accumulation": ["Accumulation"],
    "best": ["KeepBest"],
    "callbacks": ["TrainingLog"],
    "replay": ["with_replay", "default_share"],
    "schedule": ["WarmupCosine", "batches_per_epoch", "default_optimizer", "optimizer_steps"],
    "tuner": ["FineTuner"],
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
