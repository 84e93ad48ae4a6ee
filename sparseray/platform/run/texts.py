"""Names of the small files beside a model's weights that came with it: an import keeps them, runs hand them on, an export has them."""

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
HUB_CONFIG = "hub_config.json"
"""What the model's own `config.json` is called in a checkpoint; an export keeps its other keys."""
HANDED_ON = (CHAT_TEMPLATE, "generation_config.json", "special_tokens_map.json", HUB_CONFIG)
"""What a run that begins with a model keeps as it is."""
TEXT_FILES = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "generation_config.json", CHAT_TEMPLATE)
"""What an import and an export keep as it is, where a model has it; the first it must have."""
