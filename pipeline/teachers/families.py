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


# Model types of transformers whose extraction the tests compare with the plain pass, as docs/families.md has it. Of the
# shared ones prompts run together, as attention alone mixes their tokens; of the others each runs whole.
TREE_FAMILIES = frozenset(
    """
    apertus arcee aria aria_text aya_vision beam biogpt bitnet cohere cohere2 cohere2_moe cohere2_vision
    cohere_compass_text ctrl cwm dbrx deepseek_vl dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint
    fuyu gemma gemma2 gemma3 gemma3_text gemma4_text gemma4_unified gemma4_unified_text glm glm4 glm4_moe glm4v
    gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoeshared
    helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax idefics2 idefics3 internlm3 internvl iquestcoder
    jais2 kolibri1 laguna lfm2_vl llama llava llava_next llava_onevision mellum mimo_v2_flash minimax_m2
    minimax_m3_vl_text ministral ministral3 mistral mistral3 mixtral modernbert-decoder moss_transcribe_diarize
    nanochat nemotron olmo olmo2 olmo3 olmoe opt ovis2 persimmon phi phi3 phi4_multimodal qwen2
    qwen2_5_omni_thinker qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_moe qwen3_vl seed_oss smollm3 smolvlm
    solar_open stablelm starcoder2 vaultgemma video_llava whisper
    """.split()  # noqa: SIM905 (reads better)
)
SINK_FAMILIES = frozenset({"flint", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"})  # attention sinks
TESTED_FAMILIES = TREE_FAMILIES.union(
    """
    afmoe axk1 axk2 bailing_hybrid bamba bart bigbird_pegasus blenderbot blenderbot-small bloom codegen
    deepseek_v2 deepseek_v3 deepseek_v32 diffllama doge dots3_note dots3_note_text falcon falcon_h1 falcon_mamba
    gemma4 git glm4_moe_lite glm_moe_dsa got_ocr2 gpt_neo gpt_neox_japanese gptj granitemoehybrid
    inkling_text jamba jetmoe kimi_k25 kimi_linear lfm2 lfm2_moe lfm3 llama4 llama4_text mamba mamba2 marian
    mbart minicpm3 minicpmv4_6 minimax moshi mpt mvp nemotron_h olmo_hybrid openai-gpt pegasus phimoe plbart
    qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen3_vl_moe recurrent_gemma rwkv trocr xglm
    xlstm youtu zamba zamba2 zaya
    """.split()  # noqa: SIM905 (reads better)
)
