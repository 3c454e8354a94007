"""What the commands of `gemma-lora` share, and those that take a model elsewhere."""
