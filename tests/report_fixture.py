"""A run's folder as design says it looks, written by hand: what the report is tested on."""

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

from PIL import Image

CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


FURTHER = {"balanced_accuracy": 0.99107, "auc": 0.99931}


def row(
    stage: str,
    index: int,
    accuracy: float,
    size: int,
    p50: float,
    *,
    parameters: int = 12345,
    drop: tuple[float, float, float] | None = (0.0008, -0.0006, 0.0022),
) -> dict[str, Any]:
    """A ledger row of the schema's shape."""
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / 10000)
    metric = {"name": "accuracy", "unit": "fraction", "value": accuracy}
    metric |= {"low": round(accuracy - half, 4), "high": round(accuracy + half, 4)}
    record: dict[str, Any] = {
        "stage": stage,
        "index": index,
        "metric": {**metric, "split": "test", "n": 10000, "further": dict(FURTHER)},
        "validation": {**metric, "split": "validation", "n": 6000},
        "agreement": 0.9961,
        "parameters": parameters,
        "nonzero": parameters // 2,
        "macs": 210000,
        "bundle": {
            "path": f"stages/{index:02d}-{stage}/bundle",
            "bytes": size,
            "files": [{"path": "model.onnx", "bytes": size}],
        },
        "latency": [
            {
                "runtime": "onnxruntime",
                "batch": 1,
                "threads": 1,
                "p50_ms": p50,
                "p90_ms": p50 * 1.09,
            }
        ],
        "memory_mb": 11.8,
        "parity": {"max_abs_diff": 0.0003, "agreement": 1.0, "n": 512},
        "seconds": 41.2,
    }
    record["latency"][0]["p90_ms"] = round(p50 * 1.09, 5)
    if drop:
        value, low, high = drop
        record["drop"] = {"value": value, "low": low, "high": high, "split": "test"}
        record["drop"] |= {"method": "paired Agresti-Min", "against": "teacher"}
    return record


def rows() -> list[dict[str, Any]]:
    teacher = row("teacher", 0, 0.9920, 1_745_612, 0.752, parameters=431080, drop=None)
    teacher["latency"][0]["runtime"] = "pytorch-eager"
    del teacher["agreement"], teacher["parity"]
    deploy = row("deploy", 5, 0.9912, 21_840, 0.061)
    deploy["graph"] = {"passes_on_p50_ms": 0.061, "passes_off_p50_ms": 0.083}
    return [
        teacher,
        row("exported", 0, 0.9920, 1_738_220, 0.241, parameters=431080, drop=(0, -0.0003, 0.0003)),
        row("plain-int8", 0, 0.9911, 452_870, 0.198, parameters=431080),
        row("distill", 1, 0.9925, 241_300, 0.118, parameters=58110, drop=(-0.0005, -0.002, 0.001)),
        row("prune", 2, 0.9917, 96_200, 0.092, drop=(0.0003, -0.0011, 0.0017)),
        row("share", 3, 0.9915, 96_200, 0.091, drop=(0.0005, -0.0009, 0.0019)),
        row("quantize", 4, 0.9912, 27_840, 0.064),
        deploy,
    ]


def ledger() -> dict[str, Any]:
    return {
        "schema": 1,
        "attar": "0.1.0",
        "task": "image-classification",
        "recipe": "mnist",
        "seed": 0,
        "environment": {
            "python": "3.11.9",
            "system": "Linux x86_64",
            "cpu": "AMD EPYC 7B13",
            "cores": 2,
            "memory_gb": 16.8,
            "packages": {"torch": "2.14.1", "onnxruntime": "1.32.0", "numpy": "2.3.1"},
        },
        "budget": {
            "max_drop": 0.005,
            "latency_ms": 0.2,
            "size": 50000,
            "memory": 20000000,
            "met": True,
            "certain": False,
            "figures": [
                limit("max_drop", 0.005, 0.0031, 0.0056),
                limit("latency_ms", 0.2, 0.061, 0.0665),
                limit("size", 50000, 21840, 21840),
                limit("memory", 20000000, 11800000, 11800000),
            ],
        },
        "rows": rows(),
        "speedup": {
            "total": {"value": 12.33, "low": 12.1, "high": 12.52},
            "runtime": {"value": 3.12, "low": 3.05, "high": 3.18},
            "compression": {"value": 3.95, "low": 3.88, "high": 4.02},
        },
    }


def limit(name: str, most: float, value: float, bound: float) -> dict[str, Any]:
    judged = {"met": value <= most, "certain": bound <= most}
    return {"name": name, "limit": most, "value": value, "bound": bound, **judged}


def events() -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = [{"event": "run", "recipe": "mnist", "folder": "runs/mnist"}]
    told.append({"event": "stage", "name": "teacher", "index": 0, "of": 5, "cached": False})
    told += epochs("teacher", 6, 0.98, {"task": 0.31})
    told.append({"event": "stage", "name": "distill", "index": 1, "of": 5, "cached": False})
    told += epochs("distill", 10, 0.985, {"task": 0.1, "kd": 0.9})
    told.append({"event": "stage", "name": "prune", "index": 2, "of": 5, "cached": False})
    told += epochs("recover", 3, 0.987, {"task": 0.08, "kd": 0.2})
    told.append({"event": "note", "text": "No validation split: a tenth of train was set aside."})
    return told


def epochs(label: str, count: int, best: float, terms: dict[str, float]) -> list[dict[str, Any]]:
    told = []
    for epoch in range(1, count + 1):
        now = {name: value * (0.25 + 1.4 / epoch) for name, value in terms.items()}
        value = best + 0.008 - 0.05 / epoch
        record = {"label": label, "epoch": epoch, "epochs": count, "loss": sum(now.values())}
        record |= {"terms": now, "metric": {"name": "accuracy", "value": value}, "lr": 0.002}
        told.append({"event": "epoch", **record, "seconds": 3.1, "eta_s": 9.0, "best": True})
    return told


def picture(seed: int) -> str:
    """A small grey picture as a data URI."""
    image = Image.new("L", (28, 28))
    for x in range(28):
        for y in range(28):
            ring = abs(math.hypot(x - 14, (y - 14) * (1 + seed % 3 / 4)) - 8) < 2.2
            stroke = abs(x - 14 - (y - 14) * (seed % 5 - 2) / 4) < 1.8
            image.putpixel((x, y), 255 if (ring if seed % 2 else stroke) else 0)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def details() -> dict[str, Any]:
    tried = [
        {"setting": "bits", "value": 4, "metric": 0.991, "drop": 0.001, "kept": True},
        {"setting": "bits", "value": 2, "metric": 0.961, "drop": 0.031, "kept": False},
        {"setting": "bits", "value": 3, "metric": 0.988, "drop": 0.004, "kept": True},
    ]
    layers = {
        f"features.{i}.weight": {
            "values": 8,
            "bits": 3,
            "weights": 288 * (i + 1),
            "distortion": 0.0312,
        }
        for i in range(3)
    }
    return {
        "classes": CLASSES,
        "per_class": {
            "teacher": [0.996, 0.998, 0.992, 0.993, 0.991, 0.989, 0.992, 0.990, 0.991, 0.987],
            "final": [0.996, 0.998, 0.990, 0.994, 0.990, 0.984, 0.992, 0.991, 0.985, 0.981],
            "n": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
        },
        "wrong": [
            {
                "index": 100 + i,
                "true": i % 10,
                "teacher": i % 10,
                "student": (i * 3 + 5) % 10,
                "image": picture(i),
                "confidence": 0.5 + i / 30,
            }
            for i in range(10)
        ],
        "found": {
            "01-distill": {
                "teacher": {
                    "form": "channels-last",
                    "seconds": {"original": 0.026, "channels-last": 0.02},
                    "views": 8,
                }
            },
            "02-prune": {"ratio": 0.5, "removed_channels": {"features.0": 16, "features.3": 32}},
            "03-share": {"tried": tried, "bits": 3, "distortion": 0.0312, "layers": layers},
            "04-quantize": {
                "stayed_float": ["classifier.3"],
                "why": "int8 was slower there",
                "int8_over_float": {
                    "ratio": 0.81,
                    "tried": [{"float_layers": "none", "ratio": 1.12}],
                },
            },
        },
        "notes": ["Mean and deviation were computed from the train split."],
        "operators": {"QLinearConv": 4, "QGemm": 2, "MaxPool": 2},
    }


RECIPE = """\
task: image-classification
data: {source: torchvision, name: MNIST, root: data}
teacher: {model: lenet-wide, train: {epochs: 6}}
student: {model: lenet-small}
stages:
  - distill: {criteria: [{kd: {temperature: 4, weight: 0.9}}], epochs: 10}
  - prune: {granularity: channel, ratio: 0.5, recover: {epochs: 3}}
  - share: {bits: auto}
  - quantize: {scheme: int8}
budget: {max_drop: 0.5%, latency_ms: 0.2, size: 50KB, memory: 20MB}
"""


def write_run(folder: Path, **parts: Any) -> Path:
    """A run's folder; `parts` replaces `ledger`, `events`, `details`, `recipe`; `None` omits it."""
    whole = {"ledger": ledger(), "events": events(), "details": details(), "recipe": RECIPE}
    whole |= parts
    (folder / "bundle").mkdir(parents=True, exist_ok=True)
    if whole["ledger"] is not None:
        (folder / "ledger.json").write_text(json.dumps(whole["ledger"]))
    if whole["details"] is not None:
        (folder / "details.json").write_text(json.dumps(whole["details"]))
    if whole["events"] is not None:
        lines = [json.dumps(event) for event in whole["events"]]
        (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    if whole["recipe"] is not None:
        (folder / "recipe.yaml").write_text(whole["recipe"])
    return folder
