"""Shapes of requests and replies, as OpenAPI shows them.

Our own routes refuse unknown keys, so that a typo is not silently ignored; routes in the shape of
others' APIs ignore what they have no use for, as those do.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Inputs = str | list[str]


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Lenient(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class PredictRequest(Strict):
    inputs: Inputs = Field(examples=["Maria Lopez loved the food in Lisbon."])
    tasks: list[str] | None = Field(default=None, description="Tasks to answer; all when absent.")
    return_embeddings: bool = False
    return_scores: bool = Field(default=False, description="Give the probability of every label.")
    truncate: bool = Field(default=False, description="Label long texts by their beginning.")


class EntityReply(BaseModel):
    entity_group: str
    score: float
    word: str
    start: int
    end: int


class LabelReply(BaseModel):
    label: str
    score: float
    scores: dict[str, float] | None = None


class LabelsReply(BaseModel):
    labels: list[str]
    scores: dict[str, float] | None = None


class ErrorReply(BaseModel):
    error: str
    error_type: str


class UsageReply(BaseModel):
    tokens: int


class PredictReply(BaseModel):
    results: list[dict[str, LabelReply | LabelsReply | list[EntityReply]]]
    embeddings: list[list[float]] | None = None
    errors: dict[str, ErrorReply] | None = Field(
        default=None, description="Tasks that could not be answered, while others were."
    )
    model: str
    usage: UsageReply


class SimilarityRequest(Strict):
    inputs: list[str] = Field(examples=[["The food was delicious.", "I loved the meal."]])
    truncate: bool = False


class SimilarityReply(BaseModel):
    similarities: list[list[float]]
    model: str


class EmbeddingsRequest(Lenient):
    input: Inputs | list[int] | list[list[int]] = Field(examples=["The food was delicious."])
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)
    user: str | None = None
    truncate: bool = False


class EmbeddingItem(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsReply(BaseModel):
    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingsUsage


class EmbedRequest(Lenient):
    inputs: Inputs = Field(examples=["The food was delicious."])
    normalize: bool = True
    truncate: bool | None = False
    dimensions: int | None = Field(default=None, ge=1)


class ClassifyRequest(Lenient):
    inputs: str | list[str] | list[list[str]] = Field(examples=["The food was delicious."])
    raw_scores: bool = False
    truncate: bool | None = False


class ScoredLabel(BaseModel):
    label: str
    score: float


class TokenizeRequest(Lenient):
    inputs: Inputs = Field(examples=["The food was delicious."])
    add_special_tokens: bool = True


class TokenReply(BaseModel):
    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class PipelineParameters(Lenient):
    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = "simple"
    ignore_labels: list[str] | None = None
    top_k: int | None = Field(default=None, ge=1)
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    truncation: bool = False


class PipelineRequest(Lenient):
    inputs: Inputs = Field(examples=["Maria Lopez loved the food in Lisbon."])
    parameters: PipelineParameters | None = None


class TaskReply(BaseModel):
    kind: str
    labels: list[str]


class InfoReply(BaseModel):
    model_id: str
    version: str
    runtime: str
    tasks: dict[str, TaskReply]
    dimension: int
    max_input_length: int
    max_client_batch_size: int
    max_batch_tokens: int
    encoder: dict[str, Any]


class HealthReply(BaseModel):
    status: str
