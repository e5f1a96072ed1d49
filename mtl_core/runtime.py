"""How a forward pass of the encoder is executed: by torch, or on CPUs by OpenVINO.

Shapes: B windows, L tokens, H hidden units.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mtl_core.artifact import atomic_folder, read_manifest
from mtl_core.config import ConfigError
from mtl_core.data.cache import cache_root
from mtl_core.encoder import SentenceEncoder
from mtl_core.loop import bound_kernel_caches, use_bf16
from mtl_core.model import MultiTaskModel

RuntimeName = Literal[
    "auto", "torch-fp32", "torch-bf16", "openvino-fp32", "openvino-bf16", "openvino-int8"
]
INT8_FOLDER = "runtime/openvino-int8"
"""Where an artifact keeps the int8 encoder that `serve_app.optimize` made and checked."""

Float = NDArray[np.float32]


class Runtime(Protocol):
    """Executes the encoder; one thread at a time may use it."""

    name: str
    exact: bool
    """Whether it computes in fp32, so that states should travel in fp32 too."""

    def __call__(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]
    ) -> tuple[Float, Float]:
        """(B, L) ids and mask → token states (B, L, H) and pooled vectors (B, H), not normalised.

        The arrays may be overwritten by the next call.
        """


class TorchRuntime:
    """The encoder as it is, on any device."""

    def __init__(self, encoder: SentenceEncoder, device: torch.device, bf16: bool = False) -> None:
        self.encoder = encoder.to(device).eval()
        self.device = device
        self.bf16 = bf16
        self.exact = not bf16
        self.name = f"torch-{'bf16' if bf16 else 'fp32'}"
        bound_kernel_caches()

    @torch.inference_mode()
    def __call__(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]
    ) -> tuple[Float, Float]:
        ids = torch.from_numpy(input_ids).to(self.device)
        mask = torch.from_numpy(attention_mask).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            states, pooled = self.encoder(ids, mask)
        return states.float().cpu().numpy(), pooled.float().cpu().numpy()


class OpenVinoRuntime:
    """The encoder and its pooling compiled by OpenVINO for the CPU.

    Args:
        model: OpenVINO IR (.xml) that takes ids and mask.
        precision: "f32" or "bf16", for what is not already int8.
        threads: CPU threads; all when 0.
    """

    def __init__(self, model: Path, name: str, precision: str, threads: int = 0) -> None:
        import openvino

        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(model), "CPU", settings)
        self.request = compiled.create_infer_request()
        self.name = name
        self.exact = name == "openvino-fp32"

    def __call__(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]
    ) -> tuple[Float, Float]:
        inputs = {0: input_ids, 1: attention_mask}
        outputs = self.request.infer(inputs, share_inputs=True, share_outputs=True)
        return outputs[0], outputs[1]


class RuntimeEncoder(SentenceEncoder):
    """A runtime in the encoder's place, so that `evaluate` scores what will be served."""

    def __init__(self, encoder: SentenceEncoder, runtime: Runtime) -> None:
        super().__init__(
            encoder.transformer, encoder.tokenizer, encoder.pooling, encoder.max_length
        )
        self.runtime = runtime

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        self.num_passes += 1
        states, pooled = self.runtime(input_ids.numpy(), attention_mask.numpy())
        return torch.from_numpy(states).clone(), torch.from_numpy(pooled).clone()


def with_runtime(model: MultiTaskModel, runtime: Runtime) -> MultiTaskModel:
    """A model whose encoder is executed by a runtime; for scoring, not for training."""
    return MultiTaskModel(RuntimeEncoder(model.encoder, runtime), dict(model.head_items)).eval()


def choose_runtime(artifact: Path, device: torch.device) -> RuntimeName:
    """The fastest runtime that loses nothing worth naming: what `auto` stands for.

    On CPUs int8 where the artifact holds an encoder that passed its check, else OpenVINO in bf16
    where the hardware has it; torch where OpenVINO is not installed, and on GPUs.
    """
    bf16 = use_bf16("auto", device)
    if device.type != "cpu" or importlib.util.find_spec("openvino") is None:
        return "torch-bf16" if bf16 and device.type != "cpu" else "torch-fp32"
    if (artifact / INT8_FOLDER / "encoder.xml").is_file():
        return "openvino-int8"
    return "openvino-bf16" if bf16 else "openvino-fp32"


def load_runtime(
    name: RuntimeName,
    artifact: str | Path,
    load_encoder: Callable[[], SentenceEncoder],
    device: torch.device,
    threads: int = 0,
) -> Runtime:
    """A runtime by its name.

    Args:
        name: one of RuntimeName.
        artifact: the folder the encoder comes from.
        load_encoder: loads it as a module, for what is not yet in the runtime's own form.
        device: for torch; OpenVINO runs on the CPU.
        threads: CPU threads for OpenVINO; all when 0.

    Raises:
        ConfigError: there is no such runtime, or not for this artifact, device or installation.
    """
    folder = Path(artifact)
    if name not in get_args(RuntimeName):
        known = ", ".join(get_args(RuntimeName))
        raise ConfigError(f"runtime: unknown runtime {name!r}; known: {known}")
    if name == "auto":
        name = choose_runtime(folder, device)
    kind, precision = name.split("-")
    if kind == "torch":
        return TorchRuntime(load_encoder(), device, bf16=precision == "bf16")
    if importlib.util.find_spec("openvino") is None:
        raise ConfigError(f"runtime: {name} needs the package openvino: pip install openvino")
    if device.type != "cpu":
        raise ConfigError(f"runtime: {name} runs on CPUs; use torch-bf16 on {device.type}")
    if precision == "int8":
        model = folder / INT8_FOLDER / "encoder.xml"
        if not model.is_file():
            raise ConfigError(
                f"runtime: {folder} holds no int8 encoder; make and check one with "
                f"python -m serve_app.optimize --artifact {folder}"
            )
        return OpenVinoRuntime(model, name, "f32", threads)
    hint = "bf16" if precision == "bf16" else "f32"
    return OpenVinoRuntime(converted(folder, load_encoder), name, hint, threads)


def converted(artifact: Path, load_encoder: Callable[[], SentenceEncoder]) -> Path:
    """The encoder as OpenVINO IR in fp32, kept in the cache under its hash."""
    import openvino

    manifest = read_manifest(artifact, check_files=False).encoder
    version = openvino.__version__.split("-")[0]
    name = f"{manifest['sha256'][:16]}-{manifest['pooling']}-{version}"
    folder = cache_root() / "openvino" / name
    if not (folder / "encoder.xml").is_file():
        model = convert(load_encoder())
        try:
            with atomic_folder(folder) as partial:
                openvino.save_model(model, partial / "encoder.xml", compress_to_fp16=False)
        except OSError:
            if not (folder / "encoder.xml").is_file():  # else another process was first
                raise
    return folder / "encoder.xml"


def convert(encoder: SentenceEncoder) -> Any:
    """The encoder and its pooling as an OpenVINO model with inputs of any shape (B, L)."""
    import openvino

    os.environ.setdefault("OPENVINO_TELEMETRY", "0")
    example = torch.ones((2, 8), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing notes each Python branch in transformers
        return openvino.convert_model(_Traceable(encoder), example_input=(example, example))


class _Traceable(nn.Module):
    """The encoder without its counter: a trace must not change its module."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        output = self.encoder.transformer(input_ids=input_ids, attention_mask=attention_mask)
        states: Tensor = output.last_hidden_state
        return states, self.encoder.pool(states, attention_mask)
