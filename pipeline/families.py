"""Teachers by their short names, their licences, and the families that are tested: no library is loaded for it."""

UNSTATED = "unstated"
HUB_IDS = {
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "gemma-3-270m": "google/gemma-3-270m",
    "gemma-3-1b": "google/gemma-3-1b-pt",
}
# As their model cards on the hub state it.
LICENCES = {
    "Qwen/Qwen3": "apache-2.0",
    "openai-community/gpt2": "mit",
    "HuggingFaceTB/SmolLM2": "apache-2.0",
    "meta-llama/Llama-3.2": "llama3.2",
    "google/gemma-3": "gemma",
}


def licence_of(name: str) -> str:
    """The licence of a teacher by its short name or hub id; "unstated" where the program does not know it."""
    hub_id = HUB_IDS.get(name, name)
    return next((licence for family, licence in LICENCES.items() if hub_id.startswith(family)), UNSTATED)


# Model types of transformers whose extraction the suite compares with the plain pass; docs/families.md has the figures.
# Of the shared ones prompts run together, as attention alone mixes their tokens; of the others each runs whole.
SHARED = frozenset({"gemma3_text", "gpt2", "gpt_neox", "llama", "qwen3"})
TESTED = SHARED | {"bloom", "mamba"}
