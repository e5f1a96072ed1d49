"""How a forward pass of the encoder is executed: by torch, or on CPUs by OpenVINO.

Shapes: S sequences in a rectangle of n rows and W columns, H hidden units.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mtl_core.artifact import Manifest, encoder_hash, read_manifest
from mtl_core.encoder import Pooling, SentenceEncoder
from mtl_core.errors import ArtifactError, ConfigError, there_is
from mtl_core.folders import atomic_folder, cache_root, one_at_a_time
from mtl_core.model import MultiTaskModel
from mtl_core.packing import GPU_PASS_TOKENS, PASS_TOKENS, Layout, Sequences, pack, pad

RuntimeName = Literal[
    "auto", "torch-fp32", "torch-bf16", "openvino-fp32", "openvino-bf16", "openvino-int8"
]
INT8_FOLDER = "runtime/openvino-int8"
"""Where an artifact keeps the int8 encoder that `serve_app.optimize` made and checked."""

NUM_PACKED_INPUTS = 3
PACKING = {
    "bert": "zero",
    "electra": "zero",
    "roberta": "after padding",
    "xlm-roberta": "after padding",
    "camembert": "after padding",
}
"""Model types that take a position for each token and a mask for each pair of them, and where
their positions begin (RoBERTa's: at the padding id plus one). Others get a row a sequence."""
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of CPU time in each period of so many, or `max`."""
MASKED = -1e4
"""Added to the score of a pair that may not attend; bf16 and fp16 hold it."""

Float = NDArray[np.float32]


class Runtime(Protocol):
    """Executes the encoder; one thread at a time may use it."""

    name: str
    exact: bool
    """Whether it computes in fp32, so that states should travel in fp32 too."""

    streams: int
    """Layouts it computes at a time; 0 if each sequence needs a row of its own."""

    pass_tokens: int
    """What starting a pass costs, in tokens."""

    def __call__(self, layouts: Sequence[Layout]) -> Iterator[tuple[Float, Float]]:
        """Token states (n, W, H) and pooled vectors (S, H), not normalised, of each layout.

        The arrays may be overwritten when the next are asked for.
        """


def passes(
    runtime: Runtime, sequences: Sequences, pad_id: int, batch_tokens: int
) -> Iterator[tuple[Layout, Float, Float]]:
    """Each sequence through the encoder once, as many at a time as `batch_tokens` allows.

    Yields:
        Which they are, their states (n * W, H) to be read at `starts`, their vectors (S, H).
    """
    if runtime.streams:
        layouts = list(pack(sequences, pad_id, batch_tokens, runtime.streams))
    else:
        layouts = list(pad(sequences, pad_id, batch_tokens, runtime.pass_tokens))
    for layout, (states, pooled) in zip(layouts, runtime(layouts), strict=True):
        yield layout, states.reshape(-1, states.shape[-1]), pooled


class TorchRuntime:
    """The encoder as it is, on any device; on CPUs with so many threads, PyTorch's choice if 0."""

    streams = 0

    def __init__(
        self,
        encoder: SentenceEncoder,
        device: torch.device,
        bf16: bool = False,
        threads: int = 0,
    ) -> None:
        self.encoder = encoder.to(device).eval()
        self.device = device
        self.bf16 = bf16
        self.threads = threads
        self.pass_tokens = GPU_PASS_TOKENS if device.type == "cuda" else PASS_TOKENS
        self.exact = not bf16
        self.name = f"torch-{'bf16' if bf16 else 'fp32'}"
        bound_kernel_caches()

    def __call__(self, layouts: Sequence[Layout]) -> Iterator[tuple[Float, Float]]:
        return map(self._run, layouts)

    @torch.inference_mode()
    def _run(self, layout: Layout) -> tuple[Float, Float]:
        if self.threads:  # every time: OpenMP counts them for each thread that asks for them
            torch.set_num_threads(self.threads)
        ids = torch.from_numpy(layout.input_ids).to(self.device)
        mask = torch.from_numpy(layout.segments).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            states, pooled = self.encoder(ids, mask)
        return states.float().cpu().numpy(), pooled.float().cpu().numpy()


class OpenVinoRuntime:
    """The encoder compiled by OpenVINO for the CPU.

    One layout gets all threads. Several are computed side by side with a thread each: so no
    thread waits for the slowest one after every operation.

    Args:
        model: OpenVINO IR (.xml) that `convert` made.
        name: that of the runtime, one of RuntimeName.
        precision: "f32" or "bf16", for what is not already int8.
        pooling: how the vectors are made of the states.
        threads: CPU threads; all when 0.
    """

    pass_tokens = PASS_TOKENS

    def __init__(
        self, model: Path, name: str, precision: str, pooling: Pooling, threads: int = 0
    ) -> None:
        import openvino

        threads = threads or usable_cpus()
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            # Pinned threads would wait for whatever else the system runs on their cores.
            "ENABLE_CPU_PINNING": False,
        }
        core = openvino.Core()
        read = core.read_model(model)
        self.num_inputs = len(read.inputs)
        self.streams = threads if self.num_inputs == NUM_PACKED_INPUTS else 0
        compiled = [
            core.compile_model(read, "CPU", {**settings, "NUM_STREAMS": streams})
            for streams in sorted({1, self.streams or 1})
        ]
        self.alone = compiled[0].create_infer_request()
        self.beside = [compiled[-1].create_infer_request() for _ in range(self.streams)]
        self.pooling = pooling
        self.name = name
        self.exact = name == "openvino-fp32"

    def __call__(self, layouts: Sequence[Layout]) -> Iterator[tuple[Float, Float]]:
        requests = self.beside if len(layouts) > 1 and self.beside else [self.alone]
        waiting = iter(layouts)
        running: deque[tuple[Any, Layout]] = deque()
        try:
            for request, layout in zip(requests, waiting, strict=False):
                request.start_async(inputs(layout, self.num_inputs), share_inputs=True)
                running.append((request, layout))
            while running:
                request, layout = running[0]
                request.wait()
                states = request.get_output_tensor(0).data
                yield states, pool(states.reshape(-1, states.shape[-1]), layout, self.pooling)
                running.popleft()
                for following in islice(waiting, 1):
                    request.start_async(inputs(following, self.num_inputs), share_inputs=True)
                    running.append((request, following))
        finally:
            for request, _ in running:
                request.wait()


def use_bf16(precision: str, device: torch.device) -> bool:
    """`auto` takes bf16 on GPUs from Ampere on and on CPUs with bf16 dot products."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def bound_kernel_caches() -> None:
    """Have PyTorch keep the last 64 kernels for bf16 on CPUs, not 1,024; what the user set stays.

    oneDNN makes one for each shape of a product, and batches come in hundreds of shapes, so that a
    worker would grow with every step. Read at the first such product of a process.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def usable_cpus() -> int:
    """CPUs that this process may use, of those the machine has.

    What it is bound to, and in a container the share of their time that it is given.
    """
    bound = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text(encoding="ascii").split()
        return max(1, min(bound, int(quota) // int(period)))
    except (OSError, ValueError):  # no control groups of version 2, or "max"
        return bound


def inputs(layout: Layout, count: int) -> dict[int, NDArray[np.int64]]:
    """What a converted encoder takes: ids, segments and, if it packs, positions."""
    return dict(enumerate((layout.input_ids, layout.segments, layout.positions)[:count]))


def pool(states: Float, layout: Layout, pooling: Pooling) -> Float:
    """(n * W, H) states → (S, H), as `SentenceEncoder.pool`."""
    if pooling == "cls":
        return states[layout.starts]
    reduce = np.max if pooling == "max" else np.mean
    spans = zip(layout.starts, layout.starts + layout.lengths, strict=True)
    return np.stack([reduce(states[first:last], axis=0) for first, last in spans])


class RuntimeEncoder(SentenceEncoder):
    """A runtime in the encoder's place, so that `evaluate` scores what will be served."""

    def __init__(self, encoder: SentenceEncoder, runtime: Runtime) -> None:
        super().__init__(
            encoder.transformer, encoder.tokenizer, encoder.pooling, encoder.max_length
        )
        self.runtime = runtime

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        self.num_passes += 1
        mask = attention_mask.numpy().astype(bool)
        sequences = [row[real].tolist() for row, real in zip(input_ids.numpy(), mask, strict=True)]
        states = np.zeros((*mask.shape, self.hidden_size), dtype=np.float32)
        pooled = np.zeros((len(sequences), self.hidden_size), dtype=np.float32)
        for layout, found, vectors in passes(self.runtime, sequences, 0, input_ids.numel()):
            pooled[layout.numbers] = vectors
            for number, start, length in zip(
                layout.numbers, layout.starts, layout.lengths, strict=True
            ):
                states[number, mask[number]] = found[start : start + length]
        return torch.from_numpy(states), torch.from_numpy(pooled)


def with_runtime(model: MultiTaskModel, runtime: Runtime) -> MultiTaskModel:
    """A model whose encoder is executed by a runtime; for scoring, not for training."""
    return MultiTaskModel(RuntimeEncoder(model.encoder, runtime), dict(model.head_items)).eval()


def choose_runtime(artifact: Path | None, device: torch.device) -> RuntimeName:
    """The fastest runtime that loses nothing worth naming: what `auto` stands for.

    On CPUs int8 where the artifact holds an encoder that passed its checks, else OpenVINO in bf16
    where the hardware has it; torch where OpenVINO is not installed, and on GPUs. Without an
    artifact, what stands for one that holds no int8 encoder.
    """
    bf16 = use_bf16("auto", device)
    if device.type != "cpu" or importlib.util.find_spec("openvino") is None:
        return "torch-bf16" if bf16 and device.type != "cpu" else "torch-fp32"
    if artifact is not None and (artifact / INT8_FOLDER / "encoder.xml").is_file():
        return "openvino-int8"
    return "openvino-bf16" if bf16 else "openvino-fp32"


def load_runtime(
    name: RuntimeName,
    artifact: str | Path,
    manifest: Manifest,
    load_encoder: Callable[[], SentenceEncoder],
    device: torch.device,
    threads: int = 0,
) -> Runtime:
    """A runtime by its name.

    Args:
        name: one of RuntimeName.
        artifact: the folder the encoder comes from.
        manifest: the artifact's, read before anything else of it.
        load_encoder: loads it as a module, for what is not yet in the runtime's own form.
        device: for torch; OpenVINO runs on the CPU.
        threads: CPU threads; all when 0.

    Raises:
        ArtifactError: another one took the artifact's place since its manifest was read.
        ConfigError: there is no such runtime, or not for this artifact, device or installation.
    """
    folder = Path(artifact)
    if name not in get_args(RuntimeName):
        known = there_is(get_args(RuntimeName), name)
        raise ConfigError(f"runtime: unknown runtime {name!r}; {known}")
    if name == "auto":
        name = choose_runtime(folder, device)
    kind, precision = name.split("-")
    if kind == "torch":
        return TorchRuntime(load_encoder(), device, bf16=precision == "bf16", threads=threads)
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
        hint = "f32"
    else:
        model = converted(folder, manifest, load_encoder)
        hint = "bf16" if precision == "bf16" else "f32"
    return OpenVinoRuntime(model, name, hint, manifest.encoder["pooling"], threads)


def converted(
    artifact: Path, manifest: Manifest, load_encoder: Callable[[], SentenceEncoder]
) -> Path:
    """The encoder as OpenVINO IR in fp32, kept in the cache under the hash of its files.

    Raises:
        ArtifactError: another one took its place since its manifest was read.
    """
    import openvino

    version, wanted = openvino.__version__.split("-")[0], encoder_hash(manifest)
    folder = cache_root() / "openvino" / f"{wanted[:32]}-rows-{version}"
    path = folder / "encoder.xml"
    if path.is_file():
        return path
    with one_at_a_time(folder.with_name(f"{folder.name}.lock")):
        if path.is_file():  # another process was first
            return path
        encoder = load_encoder()
        if encoder_hash(read_manifest(artifact)) != wanted:
            raise ArtifactError(f"{artifact}: replaced while it was read; try again")
        model = convert(encoder)
        with atomic_folder(folder, replace=folder.exists()) as partial:  # it was damaged
            openvino.save_model(model, partial / "encoder.xml", compress_to_fp16=False)
    return path


def convert(encoder: SentenceEncoder) -> Any:
    """The transformer as an OpenVINO model: ids, segments and, if it packs, positions → states.

    All inputs are (n, W) of any size, as in `Layout`.
    """
    import openvino

    os.environ.setdefault("OPENVINO_TELEMETRY", "0")
    traced: nn.Module = _Padded(encoder)
    example = torch.ones((2, 8), dtype=torch.int64)
    count = 2
    if encoder.transformer.config.model_type in PACKING:
        traced, count = _Packed(encoder), NUM_PACKED_INPUTS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing notes each Python branch in transformers
        return openvino.convert_model(traced, example_input=(example,) * count)


class _Padded(nn.Module):
    """The encoder without its counter: a trace must not change its module."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        super().__init__()
        self.transformer = encoder.transformer

    def forward(self, input_ids: Tensor, segments: Tensor) -> Tensor:
        output = self.transformer(input_ids=input_ids, attention_mask=segments)
        states: Tensor = output.last_hidden_state
        return states


class _Packed(_Padded):
    """Attention within each segment only, positions of its own: as if it stood in a row alone."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        super().__init__(encoder)
        config = encoder.transformer.config
        self.first = config.pad_token_id + 1 if PACKING[config.model_type] == "after padding" else 0

    def forward(self, input_ids: Tensor, segments: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        same = segments[:, None, :, None] == segments[:, None, None, :]
        mask = torch.where(same, 0.0, MASKED)
        output = self.transformer(
            input_ids=input_ids, attention_mask=mask, position_ids=positions + self.first
        )
        states: Tensor = output.last_hidden_state
        return states
