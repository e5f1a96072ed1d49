"""Shapes of requests and replies, as OpenAPI shows them.

Our own routes refuse unknown keys, so that a typo is not silently ignored; routes in the shape of
others' APIs ignore what they have no use for, as those do, and refuse what would change the answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

# What the document says of texts; that they hold is checked where the message can say which.
TEXT = {"type": "string", "pattern": r"[^\s\x1c-\x1f\x85]"}  # what str.strip calls space
TEXTS = {"type": "array", "items": TEXT, "minItems": 1}
ALONE = {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 1}

FIRST = Field(fail_fast=True)
"""Ends at the first wrong item: each makes an error of a kilobyte, and a body has a million."""
Strings = Annotated[list[str], FIRST]
Integers = Annotated[list[int], FIRST]

Inputs = Annotated[str | Strings, WithJsonSchema({"anyOf": [TEXT, TEXTS]})]
Listed = Annotated[Strings, WithJsonSchema(TEXTS)]
Blanks = Annotated[str | Strings, Field(json_schema_extra={"minItems": 1})]
"""Texts that may be blank."""
Singles = Annotated[
    str | Strings | Annotated[list[Strings], FIRST],
    WithJsonSchema({"anyOf": [TEXT, TEXTS, {"type": "array", "items": ALONE, "minItems": 1}]}),
]
TextsOrTokens = Annotated[
    str | Strings | Integers | Annotated[list[Integers], FIRST],
    WithJsonSchema({"anyOf": [TEXT, TEXTS]}),
]
"""Token ids are read only to say why they are refused."""


def whole(value: Any) -> Any:
    """8.0 is an integer in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Right = Literal["right", "Right"] | None
"""Where texts are cut; from the left is refused, not ignored."""
Strategy = Literal["none", "simple", "first", "average", "max"]
"""How the pipeline groups tokens."""
Count = Annotated[int, Field(ge=1), BeforeValidator(whole)]


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Lenient(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class PredictRequest(Strict):
    inputs: Inputs = Field(examples=["Maria Lopez loved the food in Lisbon."])
    tasks: Strings | None = Field(
        default=None,
        description="Tasks to answer; all when absent.",
        json_schema_extra={"minItems": 1},
    )
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


class OpenAIError(BaseModel):
    message: str
    type: str
    param: None
    code: None


class OpenAIErrorReply(BaseModel):
    error: OpenAIError
    error_type: str


class UsageReply(BaseModel):
    tokens: int


class PredictReply(BaseModel):
    results: list[dict[str, LabelReply | LabelsReply | list[EntityReply]]]
    embeddings: list[list[float]] | None = None
    errors: dict[str, ErrorReply] | None = Field(
        default=None, description="Tasks that could not be answered, while others were."
    )
    truncated: list[int] | None = Field(
        default=None,
        description="Inputs, counted from 0, whose labels and vectors are of their beginning; "
        "entities are of the whole text.",
    )
    model: str
    usage: UsageReply


class SimilarityRequest(Strict):
    inputs: Listed = Field(examples=[["The food was delicious.", "I loved the meal."]])
    truncate: bool = False


class SimilarityReply(BaseModel):
    similarities: list[list[float]]
    truncated: list[int] | None = Field(
        default=None, description="Inputs, counted from 0, whose vectors are of their beginning."
    )
    model: str


class EmbeddingsRequest(Lenient):
    input: TextsOrTokens = Field(examples=["The food was delicious."])
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Count | None = Field(
        default=None, description="The first so many, of the dimension that /info tells."
    )
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
    truncation_direction: Right = None
    prompt_name: None = None
    dimensions: Count | None = Field(
        default=None, description="The first so many, of the dimension that /info tells."
    )


class ClassifyRequest(Lenient):
    inputs: Singles = Field(examples=["The food was delicious."])
    raw_scores: Literal[False] = False
    truncate: bool | None = False
    truncation_direction: Right = None


class ScoredLabel(BaseModel):
    label: str
    score: float


class TokenizeRequest(Lenient):
    inputs: Blanks = Field(examples=["The food was delicious."])
    add_special_tokens: bool = True
    prompt_name: None = None


class TokenReply(BaseModel):
    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class PipelineParameters(Lenient):
    aggregation_strategy: Strategy = "simple"
    ignore_labels: Strings | None = None
    top_k: Count | None = None
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
    model_type: dict[str, dict[str, str]]
    tasks: dict[str, TaskReply]
    dimension: int
    max_input_length: int
    max_concurrent_requests: int
    max_client_batch_size: int
    max_batch_tokens: int
    encoder: dict[str, Any]


class HealthReply(BaseModel):
    status: str
