"""What tests share: a quiet environment, tiny encoders of nine architectures, the default one."""

from __future__ import annotations

import gc
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Read by libraries when they are imported, so set before any test module is.
# One thread: a sum over tiny tensors is faster so, and always in the same order.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)  # of commands that tests start, too
gc.set_threshold(100_000, 50, 50)  # else it goes through all that libraries hold, again and again
_SESSION_CACHE = tempfile.TemporaryDirectory(prefix="mtl-cache-")
os.environ["MTL_CACHE"] = _SESSION_CACHE.name

LONGEST = (
    *("test_jobs.py", "test_train.py", "test_tune.py", "test_autoscaling.py", "test_cluster.py"),
    *("test_sweep_job.py", "test_environment.py", "test_real_server.py"),
    *("train_jobs/test_predict.py", "train_jobs/test_shards.py", "test_faults.py"),
    *("test_terminal.py", "test_loop_distributed.py", "test_bench_train.py", "test_bench_serve.py"),
)
"""Files of minutes. Where files run beside each other, none of them must be the last to begin."""
HIDDEN_SIZE = 32
NUM_LAYERS = 3
POSITIONS = 130
SENTENCES = (
    "Maria Lopez waited two hours in Berlin and the food was cold.",
    "The staff at the Grand Hotel in Lisbon were wonderful!",
    "Acme Corp shipped a phone that broke within a week; nobody answered.",
    "book a table for 7 people at a café near the station tomorrow",
    "play the newest song by Zoë on my Friday-night playlist, please",
    "what's the weather in São Paulo next week?",
    "東京 は とても 楽しい 町 です 日本語",
    "Привет мир, это очень хороший фильм",
    "naïve résumé coöperate Ångström cafe\u0301 🙂 👍🏽 🚀",
)
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((i for i, file in enumerate(LONGEST) if path.endswith(file)), len(LONGEST))

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def _session_cache() -> Iterator[None]:
    yield
    _SESSION_CACHE.cleanup()


@pytest.fixture(scope="session", autouse=True)
def _quiet_progress_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name → folder of a random three-layer model (dropout 0.1) with a tokenizer of its kind."""
    makers: dict[str, Callable[[], tuple[Any, Any]]] = {
        "bert": _bert,
        "distilbert": _distilbert,
        "roberta": _roberta,
        "deberta-v2": _deberta,
        "mpnet": _mpnet,
    }
    root = tmp_path_factory.mktemp("encoders")
    return {name: _write(root / name, *make()) for name, make in makers.items()}


@pytest.fixture(scope="session")
def tiny_deberta_conv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeBERTa-v2 with the convolution that its large checkpoints have behind the first layer."""
    return _write(tmp_path_factory.mktemp("encoders") / "conv", *_deberta(conv_kernel_size=3))


@pytest.fixture(scope="session")
def unusual_encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As `tiny_encoders`: one layer run three times, a norm above all layers, a table that scales
    what it looks up (and such a norm, too), weights in each layer that nothing depends on."""
    makers: dict[str, Callable[[], tuple[Any, Any]]] = {
        "albert": _albert,
        "modernbert": _modernbert,
        "gemma3": _gemma3,
        "longformer": _longformer,
    }
    root = tmp_path_factory.mktemp("encoders")
    return {name: _write(root / name, *make()) for name, make in makers.items()}


@pytest.fixture(scope="session")
def minilm() -> str:
    """The default model, which comes with the project's dependencies."""
    return "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="session")
def mtl_data() -> Path:
    """The folder of public benchmark data."""
    if not os.environ.get("MTL_DATA"):
        pytest.skip("MTL_DATA is not set")
    return Path(os.environ["MTL_DATA"])


def _write(folder: Path, tokenizer: Any, config: Any) -> Path:
    """Save a random model; biases and norms are random too, so that none can be lost unnoticed."""
    import torch
    from transformers import AutoModel

    state = torch.get_rng_state()
    torch.manual_seed(len(folder.name))
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.set_rng_state(state)
    model.save_pretrained(folder)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)
    return folder


def _trained(like: Any, model: Any, trainer: Any) -> dict[str, Any]:
    """A tokenizer model fitted to SENTENCES, normalised and split as `like` does: its JSON."""
    from tokenizers import Tokenizer

    scratch = Tokenizer(model)
    if like.backend_tokenizer.normalizer is not None:
        scratch.normalizer = like.backend_tokenizer.normalizer
    scratch.pre_tokenizer = like.backend_tokenizer.pre_tokenizer
    scratch.train_from_iterator(SENTENCES, trainer)
    fitted: dict[str, Any] = json.loads(scratch.to_str())["model"]
    return fitted


def _wordpiece(specials: list[str], like: Any) -> dict[str, int]:
    """Short words whole, long ones in two, and each character: the same pieces in every process.

    A trained vocabulary is another one each time, since the trainer goes by hashes of strings.
    """
    backend = like.backend_tokenizer
    words = {
        word
        for sentence in SENTENCES
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(
            backend.normalizer.normalize_str(sentence)
        )
    }
    characters = {character for word in words for character in word}
    pieces = {word[:4] for word in words} | {f"##{word[4:]}" for word in words if word[4:]}
    pieces |= characters | {f"##{character}" for character in characters}
    return {piece: number for number, piece in enumerate([*specials, *sorted(pieces)])}


def _bert() -> tuple[Any, Any]:
    from transformers import BertConfig, BertTokenizerFast

    vocab = _wordpiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], BertTokenizerFast())
    config = BertConfig(vocab_size=len(vocab), max_position_embeddings=POSITIONS, **SIZES)
    return BertTokenizerFast(vocab=vocab), config


def _distilbert() -> tuple[Any, Any]:
    from transformers import DistilBertConfig, DistilBertTokenizerFast

    vocab = _wordpiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], DistilBertTokenizerFast())
    config = DistilBertConfig(
        vocab_size=len(vocab),
        dim=HIDDEN_SIZE,
        n_layers=NUM_LAYERS,
        n_heads=2,
        hidden_dim=48,
        max_position_embeddings=POSITIONS,
    )
    return DistilBertTokenizerFast(vocab=vocab), config


def _roberta() -> tuple[Any, Any]:
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import RobertaConfig, RobertaTokenizerFast

    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    fitted = _trained(RobertaTokenizerFast(), BPE(), trainer)
    vocab, merges = fitted["vocab"], [tuple(pair) for pair in fitted["merges"]]
    config = RobertaConfig(vocab_size=len(vocab), max_position_embeddings=POSITIONS, **SIZES)
    return RobertaTokenizerFast(vocab=vocab, merges=merges), config


def _deberta(conv_kernel_size: int = 0) -> tuple[Any, Any]:
    from tokenizers.models import Unigram
    from tokenizers.trainers import UnigramTrainer
    from transformers import DebertaV2Config, DebertaV2TokenizerFast

    trainer = UnigramTrainer(
        vocab_size=260,
        special_tokens=["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"],
        unk_token="[UNK]",
        show_progress=False,
    )
    fitted = _trained(DebertaV2TokenizerFast(), Unigram(), trainer)
    vocab = [(piece, score) for piece, score in fitted["vocab"]]
    config = DebertaV2Config(
        vocab_size=len(vocab),
        max_position_embeddings=POSITIONS,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["c2p", "p2c"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        conv_kernel_size=conv_kernel_size,
        conv_act="gelu",
        type_vocab_size=0,
        **SIZES,
    )
    return DebertaV2TokenizerFast(vocab=vocab, unk_id=3), config


def _mpnet() -> tuple[Any, Any]:
    from transformers import MPNetConfig, MPNetTokenizerFast

    vocab = _wordpiece(["<s>", "<pad>", "</s>", "[UNK]", "<mask>"], MPNetTokenizerFast())
    config = MPNetConfig(vocab_size=len(vocab), max_position_embeddings=POSITIONS, **SIZES)
    return MPNetTokenizerFast(vocab=vocab), config


def _albert() -> tuple[Any, Any]:
    from transformers import AlbertConfig

    tokenizer, config = _bert()
    drop = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    sizes = {"vocab_size": config.vocab_size, "embedding_size": 16, **SIZES}
    return tokenizer, AlbertConfig(max_position_embeddings=POSITIONS, **drop, **sizes)


def _modernbert() -> tuple[Any, Any]:
    from transformers import ModernBertConfig

    tokenizer, config = _bert()
    parts = ("attention", "embedding", "mlp")
    drop = {f"{part}_dropout": 0.1 for part in parts}
    ids = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    positions = {"max_position_embeddings": POSITIONS, "local_attention": 8}
    return tokenizer, ModernBertConfig(
        vocab_size=config.vocab_size, **positions, **drop, **ids, **SIZES
    )


def _gemma3() -> tuple[Any, Any]:
    from transformers import Gemma3TextConfig

    tokenizer, config = _bert()
    return tokenizer, Gemma3TextConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=POSITIONS,
        num_key_value_heads=1,
        head_dim=16,
        use_bidirectional_attention=True,
        attention_dropout=0.1,
        **SIZES,
    )


def _longformer() -> tuple[Any, Any]:
    from transformers import LongformerConfig

    tokenizer, config = _bert()
    sizes = {"vocab_size": config.vocab_size, "max_position_embeddings": POSITIONS, **SIZES}
    return tokenizer, LongformerConfig(attention_window=8, pad_token_id=0, **sizes)
