"""BERT and what is built like it: AntiBERTy, ProtBERT.

The norm comes after the sum with the residual stream, and its output with its gain is the next
stream. A gain does not commute with a rotation, so R1 cannot be fused; R2 and R4 lie inside the
branches.
"""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="BERT",
    architectures=("BertForMaskedLM",),
    embedding="bert.embeddings.word_embeddings",
    blocks="bert.encoder.layer",
    final_norm="",
    head="cls.predictions.decoder",
    tied_biases=(("cls.predictions.decoder.bias", "cls.predictions.bias"),),
    layer_norm=True,
    attention_norm="",
    mlp_norm="",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    mlp="",
    mlp_inputs=("intermediate.dense",),
    mlp_output="output.dense",
    residual_rotation=False,
)
