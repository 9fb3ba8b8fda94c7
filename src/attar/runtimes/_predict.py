"""Answers with the model in this folder. Needs numpy, Pillow for images, and the runtime that
`manifest.json` names: onnxruntime, openvino or executorch (whose package brings PyTorch).

    python predict.py picture.png [more.png ...] [--top 3]   class names and probabilities
    python predict.py input.npy                              an input that is prepared already
    python predict.py --bench [--threads 1] [--batch 1]      replay stored answers, time, as JSON
    python predict.py --bench --out bench.json               the same, for `attar report --bench`

This file is copied into every bundle and imports nothing of Attar. `manifest.json` beside it also
says what the model's input wants. Exit code: 0 done, 1 failed or answers differ, 2 wrong usage.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
SCHEMA = 1
FLOAT_DIFFERENCE, QUANTIZED_DIFFERENCE = 1e-3, 0.05
"""How far another machine's answers may be, as shares of their scale."""


Answers = Callable[[list[np.ndarray]], list[np.ndarray]]
"""Inputs to outputs, in the model's order."""


class Problem(Exception):
    """Something the person can act on, in one sentence."""


class Model(NamedTuple):
    """A loaded model: what answers, and the runtime's name and version."""

    run: Answers
    runtime: str
    version: str


def main() -> int:
    options = parse()
    try:
        manifest = read_manifest()
        if options.bench:
            import_quietly(manifest["runtime"]["name"])  # its own memory is not the model's
            before = resident_mb()
        model = load(manifest, options.threads)
        if options.bench:
            options.memory_mb = memory_added(manifest, model, before)
            return bench(manifest, model, options)
        for name in options.inputs:
            answer(manifest, model, name, options)
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Answers with the model in this folder.",
        epilog="No PyTorch is needed, unless the model's runtime is executorch.",
    )
    parser.add_argument("inputs", nargs="*", help="images, or .npy files of prepared inputs")
    parser.add_argument("--top", type=int, default=3, help="how many classes to show (default 3)")
    parser.add_argument("--json", action="store_true", help="print a JSON object per input")
    parser.add_argument("--bench", action="store_true", help="check the stored answers and time")
    parser.add_argument("--out", help="a file for what --bench finds, for `attar report --bench`")
    parser.add_argument("--threads", type=int, default=1, help="threads of one call (default 1)")
    parser.add_argument("--batch", type=int, default=1, help="examples a timed call (default 1)")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to time (default 2)")
    options = parser.parse_args()
    if bool(options.inputs) == options.bench:
        parser.error("give inputs to answer, or --bench")
    if min(options.threads, options.batch, options.top) < 1 or not options.seconds > 0:
        parser.error("--threads, --batch, --top and --seconds must be positive")
    return options


def read_manifest() -> dict[str, Any]:
    path = HERE / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schema = manifest["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Problem(f"{path} can't be read ({error}): copy the whole bundle folder") from None
    if schema > SCHEMA:
        raise Problem(f"{path} has schema {schema}; this predict.py reads up to {SCHEMA}")
    return manifest


def load(manifest: dict[str, Any], threads: int) -> Model:
    for entry in [*manifest["files"], manifest["golden"]]:
        verify(entry)
    path = HERE / manifest["files"][0]["path"]
    if manifest["runtime"]["name"] == "openvino":
        return load_openvino(path, manifest["runtime"], threads)
    if manifest["runtime"]["name"] == "executorch":
        return load_executorch(path, manifest, threads)
    return load_onnxruntime(path, manifest["runtime"], threads)


def import_quietly(runtime: str) -> None:
    """Imports the runtime's package where it is there; loading tells where it isn't."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    names = {"executorch": ["torch", "executorch.extension.pybindings._C"]}.get(runtime, [runtime])
    with contextlib.suppress(ImportError), silenced():
        for name in names:
            importlib.import_module(name)


def load_onnxruntime(path: Path, wanted: dict[str, Any], threads: int) -> Model:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise Problem(f"onnxruntime is missing: pip install onnxruntime ({error})") from None
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    config = dict(wanted.get("config", {}))
    if lacks_vnni():
        config |= wanted.get("config_without_vnni", {})
    for key, value in config.items():
        settings.add_session_config_entry(key, value)
    try:
        session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class
        said = too_old(str(error)) or str(error)
        raise Problem(f"onnxruntime {ort.__version__} can't load {path}: {said}") from None
    names = [i.name for i in session.get_inputs()]

    def run(inputs: list[np.ndarray]) -> list[np.ndarray]:
        return session.run(None, dict(zip(names, inputs, strict=True)))

    return Model(run, "onnxruntime", ort.__version__)


def too_old(error: str) -> str:
    """What to do where the runtime is older than the file; "" where that isn't the reason."""
    known = re.search(r"till opset (\d+)|max supported (IR version: \d+)", error)
    if known is None:
        return ""
    limit = f"opset {known[1]}" if known[1] else known[2]
    return f"it is too old, knowing ONNX up to {limit}: pip install --upgrade onnxruntime"


def load_openvino(path: Path, wanted: dict[str, Any], threads: int) -> Model:
    # Without this part, OpenVINO doesn't report its use to Intel over the network.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise Problem(f"openvino is missing: pip install openvino ({error})") from None
    config = {**wanted.get("config", {}), "INFERENCE_NUM_THREADS": str(threads)}
    release = openvino.__version__.partition("-")[0]
    core = openvino.Core()
    try:
        model = core.read_model(str(path))
    except RuntimeError as error:
        raise Problem(f"openvino {release} can't load {path}: {last_line(error)}") from None
    compiled: dict[Any, Answers] = {}

    def run(inputs: list[np.ndarray]) -> list[np.ndarray]:
        shapes = tuple(x.shape for x in inputs)
        if shapes not in compiled:  # fixed shapes are faster, and there are few here
            compiled[shapes] = compile_openvino(core, model, shapes, config)
        return compiled[shapes](inputs)

    return Model(run, "openvino", release)


def compile_openvino(core: Any, model: Any, shapes: Any, config: dict[str, str]) -> Answers:
    for taken, shape in zip(model.inputs, shapes, strict=True):
        fits = len(taken.partial_shape) == len(shape) and all(
            wanted.is_dynamic or wanted.get_length() == size
            for wanted, size in zip(taken.partial_shape, shape, strict=True)
        )
        if not fits:
            raise ValueError(f"an input has the shape {list(shape)}, not {taken.partial_shape}")
    fixed = model.clone()
    fixed.reshape({i: list(shape) for i, shape in enumerate(shapes)})
    request = core.compile_model(fixed, "CPU", config).create_infer_request()
    places = [request.get_input_tensor(i).data for i in range(len(shapes))]
    outputs = range(len(fixed.outputs))

    def run(inputs: list[np.ndarray]) -> list[np.ndarray]:
        for place, given in zip(places, inputs, strict=True):
            np.copyto(place, given)
        request.infer(share_outputs=True)
        return [request.get_output_tensor(i).data.copy() for i in outputs]

    return run


def load_executorch(path: Path, manifest: dict[str, Any], threads: int) -> Model:
    try:
        import torch

        with silenced():  # it writes what it reads of the processor
            from executorch.extension.pybindings import _C as library

            library._unsafe_reset_threadpool(threads)
    except ImportError as error:
        raise Problem(f"executorch is missing: pip install executorch ({error})") from None
    try:
        with silenced():
            forward = library._load_program(str(path)).load_method("forward")
    except RuntimeError as error:
        raise Problem(f"executorch can't load {path}: {last_line(error)}") from None
    most = manifest["runtime"]["largest_batch"]

    def run(inputs: list[np.ndarray]) -> list[np.ndarray]:
        for taken, given in zip(manifest["inputs"], inputs, strict=True):
            refuse_other_shape(given, taken["shape"])
        count = len(inputs[0])
        parts = []
        for start in range(0, count, most or count):
            rows = slice(start, start + (most or count))
            feed = [torch.from_numpy(np.require(x[rows], requirements=["C", "W"])) for x in inputs]
            parts.append([output.numpy() for output in forward.call(feed)])
        if len(parts) == 1:
            return parts[0]
        return [np.concatenate(each) for each in zip(*parts, strict=True)]

    return Model(run, "executorch", version("executorch"))


def refuse_other_shape(given: np.ndarray, wanted: list[int | str]) -> None:
    fits = len(given.shape) == len(wanted) and all(
        size and (isinstance(expected, str) or size == expected)
        for size, expected in zip(given.shape, wanted, strict=True)
    )
    if not fits:
        raise ValueError(f"an input has the shape {list(given.shape)}, not {wanted}")


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """What C++ writes to the process's standard error meanwhile is dropped."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def lacks_vnni() -> bool:
    """Whether this is an x86 whose 8-bit products may overflow, or one that can't be asked."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    try:
        known = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return True
    return not {"avx512_vnni", "avx_vnni", "avx10"} & set(known)


def verify(entry: dict[str, Any]) -> None:
    path = HERE / entry["path"]
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        raise Problem(f"{path} is missing: copy the whole bundle folder") from None
    if digest != entry["sha256"]:
        raise Problem(f"{path} is damaged or was changed: copy the bundle again")


def answer(manifest: dict[str, Any], model: Model, name: str, options: argparse.Namespace) -> None:
    inputs = read(Path(name), manifest["inputs"])
    try:
        outputs = model.run(inputs)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise Problem(f"the model does not take {name}: {reason}") from None
    meaning = manifest["outputs"][0]
    ranked = rank(outputs[0][0], meaning.get("classes"))[: options.top]
    if options.json:
        top = [{"class": label, "probability": round(p, 6)} for label, p in ranked]
        print(json.dumps({"input": name, "answers": top}, ensure_ascii=False))
        return
    if len(options.inputs) > 1:
        print(f"{name}:")
    for label, probability in ranked:
        print(f"{label:<20} {probability:7.2%}")


def read(path: Path, inputs: list[dict[str, Any]]) -> list[np.ndarray]:
    if path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise Problem(f"can't read {path}: {error}") from None
        return [array.astype(inputs[0]["dtype"])]
    if "color" not in inputs[0]:
        raise Problem(f"this model takes no images: give its prepared input as .npy, not {path}")
    return [read_image(path, inputs[0])]


def read_image(path: Path, wanted: dict[str, Any]) -> np.ndarray:
    """Pixels 0-255, times `scale`, minus `mean`, over `std`; a batch of one."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise Problem(f"Pillow is missing: pip install pillow ({error})") from None
    try:
        image: Image.Image = Image.open(path)
        image.load()
    except Exception as error:  # codecs raise whatever they like at damaged files
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise Problem(f"can't read the image {path}: {reason}") from None
    if image.mode[0] in "IF":
        raise Problem(f"the image {path} has more than 8 bits a channel: save it with 8")
    image = image.convert({"gray": "L", "rgb": "RGB"}[wanted["color"]])
    if resize := wanted.get("resize"):
        size = (resize["width"], resize["height"])
        if resize.get("fit") == "crop":
            image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
        else:
            image = image.resize(size, Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, -1)
    mean = np.asarray(wanted["mean"], dtype=np.float32)
    std = np.asarray(wanted["std"], dtype=np.float32)
    prepared = (pixels * np.float32(wanted["scale"]) - mean) / std
    if wanted["layout"] == "NCHW":
        prepared = prepared.transpose(2, 0, 1)
    return np.ascontiguousarray(prepared[None])


def rank(logits: np.ndarray, classes: list[str] | None) -> list[tuple[str, float]]:
    """Class names with probabilities, best first; a single logit is that of the second class."""
    flat = np.asarray(logits, dtype=np.float64).reshape(-1)
    if flat.size == 1:
        flat = np.array([0.0, flat[0]])
    odds = np.exp(flat - flat.max())
    probabilities = odds / odds.sum()
    labels = classes or [str(i) for i in range(flat.size)]
    return [(labels[i], float(probabilities[i])) for i in np.argsort(-probabilities)]


def bench(manifest: dict[str, Any], model: Model, options: argparse.Namespace) -> int:
    with np.load(HERE / manifest["golden"]["path"], allow_pickle=False) as arrays:
        inputs = [arrays[n] for n in sorted(arrays.files) if n.startswith("input_")]
        expected = [arrays[n] for n in sorted(arrays.files) if n.startswith("output_")]
    found = model.run(inputs)
    apart = [float(np.abs(a - b).max()) for a, b in zip(expected, found, strict=True)]
    scales = [max(1.0, float(np.abs(a).max())) for a in expected]
    rounds = manifest.get("quantization", {"rounds": "nothing"}).get("rounds", "activations")
    limit = QUANTIZED_DIFFERENCE if rounds == "activations" else FLOAT_DIFFERENCE
    agrees = all(d <= limit * s for d, s in zip(apart, scales, strict=True))
    rows = np.arange(options.batch) % len(inputs[0])
    feed = [x[rows] for x in inputs]
    times = time_calls(lambda: model.run(feed), options.seconds)
    report = {
        "attar_bench": 1,
        "model_sha256": manifest["files"][0]["sha256"],
        "golden": {"agrees": agrees, "max_abs_diff": max(apart), "n": len(inputs[0])},
        "latency": {
            "runtime": model.runtime,
            "batch": options.batch,
            "threads": options.threads,
            "p50_ms": round(float(np.percentile(times, 50)), 4),
            "p90_ms": round(float(np.percentile(times, 90)), 4),
        },
        "memory_mb": options.memory_mb,
        "bytes": sum(entry["bytes"] for entry in manifest["files"]),
        "environment": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": processor(),
            "cores": os.cpu_count(),
            "packages": {model.runtime: model.version, "numpy": np.__version__},
        },
    }
    text = json.dumps(report, indent=2)
    if options.out:
        Path(options.out).write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if agrees else 1


def time_calls(call: Any, seconds: float) -> list[float]:
    """Milliseconds of each call, after a warm-up of a tenth of the time."""
    stop = time.perf_counter() + seconds / 10
    while time.perf_counter() < stop:
        call()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or not times:
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e6)
    return times


def memory_added(manifest: dict[str, Any], model: Model, before: float | None) -> float | None:
    """What the loaded model adds to this process when it answers one example at a time, in 10^6
    bytes."""
    with np.load(HERE / manifest["golden"]["path"], allow_pickle=False) as arrays:
        one = [arrays[n][:1] for n in sorted(arrays.files) if n.startswith("input_")]
    for _ in range(10):
        model.run(one)
    after = resident_mb()
    return None if before is None or after is None else round(after - before, 2)


def resident_mb() -> float | None:
    """The memory that this process holds now, in 10^6 bytes; known on Linux only."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (named or [platform.processor() or platform.machine()])[0]


if __name__ == "__main__":
    sys.exit(main())
