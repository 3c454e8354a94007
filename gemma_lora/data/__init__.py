"""From a file to rows of tokens: formats, dataset, templates, encoding, packing, the mask."""

from gemma_lora.base.lazy import lazy_names

_MODULES: dict[str, list[str]] = {
    "dataset": ["Dataset", "load_dataset"],
    "encoding": ["Encoded", "encode", "encode_prompt", "batches"],
    "formats": ["Example", "Prompt", "BadLines", "read_examples", "read_jsonl", "from_records", "to_example"],
    "mask": ["MaskView", "show_mask"],
    "notices": ["Notices"],
    "packing": ["Batch", "pack"],
    "prompts": ["read_prompts"],
    "templates": ["CONTROL_TOKENS", "Template", "default_template", "find_template", "template_of", "template_reason"],
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
