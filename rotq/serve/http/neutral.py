"""Fields of OpenAI, vLLM, SGLang, llama.cpp and text-generation-webui that this server does not do.

Clients send many of them with every request, at the value that switches them off. That value is
taken, as it changes nothing; any other would have to be ignored, and is refused. A field whose
only harmless value is null is not listed (see ``Strict``), but for those that would switch
something on when they are empty.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from rotq.serve.http.strict import (
    EmptyList,
    EmptyObject,
    Integer,
    Nothing,
    Null,
    Off,
    On,
    One,
    Strict,
    Zero,
)

Name = Annotated[str, StringConstraints(max_length=256)]
"""Who asks, or what for: it may be recorded, and changes no answer."""

Ignored = Annotated[float, Field(ge=-1e9, le=1e9)]
"""Shapes something that another field switches on, which has to be off."""


class Neutral(Strict):
    """Values that change nothing, by what they would change."""

    # penalties of what has been said
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    repetition_penalty: One | None = None
    repeat_penalty: One | None = None
    rep_pen: One | None = None
    encoder_repetition_penalty: One | None = None
    length_penalty: One | None = None
    penalty_alpha: Zero | None = None
    no_repeat_ngram_size: Zero | None = None
    repeat_last_n: Ignored | None = None
    repetition_penalty_range: Ignored | None = None
    rep_pen_range: Ignored | None = None
    penalize_nl: bool | None = None
    dry_multiplier: Zero | None = None
    dry_base: Ignored | None = None
    dry_allowed_length: Ignored | None = None
    dry_penalty_last_n: Ignored | None = None
    dry_range: Ignored | None = None
    dry_sequence_breakers: Annotated[list[Name], Field(max_length=64)] | Name | None = None

    # which tokens may be chosen
    min_p: Zero | None = None
    top_a: Zero | None = None
    tfs: One | None = None
    tfs_z: One | None = None
    typical: One | None = None
    typical_p: One | None = None
    typ_p: One | None = None
    epsilon_cutoff: Zero | None = None
    eta_cutoff: Zero | None = None
    xtc_probability: Zero | None = None
    xtc_threshold: Ignored | None = None
    top_n_sigma: Annotated[float, Field(ge=-1e9, le=0)] | None = None
    min_keep: Zero | None = None
    logit_bias: Annotated[dict[str, Zero], Field(max_length=1024)] | None = None
    logits_processors: EmptyList | None = None
    bad_words: EmptyList | None = None
    banned_strings: EmptyList | None = None
    custom_token_bans: Nothing | None = None

    # how they are chosen
    do_sample: On | None = None
    use_beam_search: Off | None = None
    num_beams: One | None = None
    early_stopping: Off | None = None
    dynatemp_range: Zero | None = None
    dynatemp_exponent: Ignored | None = None
    dynamic_temperature: Off | None = None
    smoothing_factor: Zero | None = None
    smoothing_curve: Ignored | None = None
    mirostat: Zero | None = None
    mirostat_mode: Zero | None = None
    mirostat_tau: Ignored | None = None
    mirostat_eta: Ignored | None = None
    guidance_scale: One | None = None
    negative_prompt: Nothing | None = None

    # where a text ends, and what of it is told
    min_tokens: Zero | None = None
    min_length: Zero | None = None
    stop_token_ids: EmptyList | None = None
    stop_regex: EmptyList | None = None
    ban_eos_token: Off | None = None
    include_stop_str_in_output: Off | None = None
    no_stop_trim: Off | None = None
    skip_special_tokens: On | None = None
    spaces_between_special_tokens: bool | None = None
    truncation_side: Literal["left", "right"] | None = None
    n_keep: Zero | None = None
    n_discard: Zero | None = None
    n_indent: Zero | None = None
    t_max_predict_ms: Zero | None = None

    # what comes with it
    n_probs: Zero | None = None
    post_sampling_probs: Off | None = None
    return_tokens: Off | None = None
    return_token_ids: Off | None = None
    return_token_offsets: Off | None = None
    return_tokens_as_token_ids: Off | None = None
    return_prompt_text: Off | None = None
    return_progress: Off | None = None
    return_hidden_states: Off | None = None
    return_routed_experts: Off | None = None
    return_cached_tokens_details: Off | None = None
    timings_per_token: Off | None = None
    include_reasoning: On | None = None
    separate_reasoning: On | None = None
    stream_reasoning: On | None = None
    reasoning_format: Literal["none"] | None = None
    thinking_forced_open: Off | None = None
    stream_interval: One | None = None
    watermarking: Off | None = None
    thinking_token_budget: Annotated[int, Field(ge=-1, le=-1), Integer] | None = None

    # grammars; an empty schema would ask for JSON
    grammar: Nothing | None = None
    grammar_lazy: Off | None = None
    regex: Nothing | None = None
    ebnf: Nothing | None = None
    guided_regex: Nothing | None = None
    guided_grammar: Nothing | None = None
    guided_choice: EmptyList | None = None
    json_schema: Null = None
    guided_json: Null = None
    structured_outputs: Null = None

    # where and when it is computed
    priority: Zero | None = None
    cache_prompt: On | None = None
    n_cache_reuse: Zero | None = None
    backend_sampling: Off | None = None
    id_slot: Annotated[int, Field(ge=-1, le=-1), Integer] | None = None
    lora: EmptyList | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: Name | None = None
    prompt_cache_retention: Literal["in_memory"] | None = None

    # for the records of whoever serves
    store: Off | None = None
    metadata: Annotated[dict[Name, Name], Field(max_length=16)] | None = None
    safety_identifier: Name | None = None
    vllm_xargs: EmptyObject | None = None
    extra_body: EmptyObject | None = None
    custom_labels: EmptyObject | None = None


class NeutralChat(Neutral):
    """Those that only chats have."""

    echo: Off | None = None
    add_special_tokens: Off | None = None
    add_generation_prompt: On | None = None
    continue_final_message: Off | None = None
    chat_template_kwargs: EmptyObject | None = None
    media_io_kwargs: EmptyObject | None = None
    mm_processor_kwargs: EmptyObject | None = None
    documents: EmptyList | None = None
    tools: EmptyList | None = None
    functions: EmptyList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None
    # OpenAI's is on when it is empty
    web_search_options: Null = None


class NeutralCompletion(Neutral):
    """Those that only completions have."""

    suffix: Nothing | None = None
    add_special_tokens: On | None = None
    add_bos_token: On | None = None
