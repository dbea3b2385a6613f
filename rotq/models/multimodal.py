"""The text decoder inside a model of several parts, and what the other parts write into its stream.

A tower and a projector turn images into rows that are put in the place of some tokens' embeddings.
They are no part of what is quantized. Where R1 turns the residual stream, the tensors that write
those rows have to be turned as an embedding is:

    W <- R1^T W,  b <- b R1

which is exact where the last thing that happens to the rows is a linear layer. What is known of a
class stands here; of any other R1 is refused. What a second writer adds between the first blocks
(DeepStack) is turned in the same way: the sum of two turned vectors is the turned sum.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from rotq.models.task import is_multimodal

_LLAVA = r"model\.multi_modal_projector\.linear_2\.(weight|bias)"
_NEWLINE = rf"{_LLAVA}|model\.image_newline"
_IDEFICS = r"model\.connector\.modality_projection\.proj\.weight"
_QWEN2 = r"model\.visual\.merger\.mlp\.2\.(weight|bias)"
_QWEN3 = r"model\.visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc2\.(weight|bias)"
_GLM = r"model\.visual\.merger\.down_proj\.weight"

IMAGE_WRITERS = {
    "AyaVisionForConditionalGeneration": _LLAVA,
    "Cohere2VisionForConditionalGeneration": _LLAVA,
    "Glm4vMoeForConditionalGeneration": _GLM,
    "Idefics3ForConditionalGeneration": _IDEFICS,
    "InternVLForConditionalGeneration": _LLAVA,
    "Lfm2VlForConditionalGeneration": _LLAVA,
    "Llama4ForConditionalGeneration": r"multi_modal_projector\.linear_1\.weight",
    "LlavaForConditionalGeneration": _LLAVA,
    "LlavaNextForConditionalGeneration": _NEWLINE,
    "LlavaOnevisionForConditionalGeneration": _NEWLINE,
    "Mistral3ForConditionalGeneration": _LLAVA,
    "PaliGemmaForConditionalGeneration": (r"model\.multi_modal_projector\.linear\.(weight|bias)"),
    "Qwen2VLForConditionalGeneration": _QWEN2,
    "Qwen2_5_VLForConditionalGeneration": _QWEN2,
    "Qwen3VLForConditionalGeneration": _QWEN3,
    "Qwen3VLMoeForConditionalGeneration": _QWEN3,
    "Qwen3_5ForConditionalGeneration": _QWEN3,
    "Qwen3_5MoeForConditionalGeneration": _QWEN3,
    "SmolVLMForConditionalGeneration": _IDEFICS,
}
"""Class to the pattern of the tensors outside the decoder that write rows of its stream."""


def text_model(model: nn.Module) -> nn.Module:
    """The text decoder of a multimodal model, which may have a head; any other model itself."""
    if not is_multimodal(model.config):
        return model
    return cast(nn.Module, cast(Any, model).get_decoder())


def text_path(model: nn.Module) -> str:
    """Path of ``text_model``; empty where it is the model itself."""
    text = text_model(model)
    return next(name for name, module in model.named_modules() if module is text)
