"""A compact, well-tuned CIFAR-10 network for CPUs: airbench94 (Jordan 2024, arXiv:2404.00498), narrower.

Kept of it: the frozen whitening layer over 2x2 patches, identity-like initial convolutions, batch norm
without gains and with fast biases, GELU, logits divided by nine. Left out: alternating flips, lookahead,
test-time augmentation. The momentum of batch norm is scaled to the batch: airbench's own, at a batch of 32,
makes running statistics of some eighty samples, whose noise in evaluation hides what a rule does.
"""

import numpy as np
import torch
from beds import Settings, ast
from torch import Tensor, nn

MOMENTUM = 0.85
NORM_MOMENTUM = 0.4 / 1024  # a sample, airbench's: of the running statistics, which evaluation uses
FAST_BIAS = 64  # factor on the learning rate of batch-norm biases


class Group(nn.Module):
    """Conv, pool, norm, GELU, conv, norm, GELU: halves the side."""

    def __init__(self, inputs: int, outputs: int, momentum: float):
        super().__init__()
        first, second = identity_like(inputs, outputs), identity_like(outputs, outputs)
        norms = norm(outputs, momentum), norm(outputs, momentum)
        self.body = nn.Sequential(first, nn.MaxPool2d(2), norms[0], nn.GELU(), second, norms[1], nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def identity_like(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3x3 convolution whose first outputs begin as copies of its inputs."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:inputs])
    return conv


def norm(width: int, momentum: float) -> nn.BatchNorm2d:
    batch_norm = nn.BatchNorm2d(width, momentum=momentum)
    batch_norm.weight.requires_grad_(False)
    return batch_norm


class Scaled(nn.Module):
    """Divides logits by nine."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits / 9


def compact(
    classes: int, images: np.ndarray, batch_size: int, widths: tuple[int, int, int] = (32, 64, 64)
) -> nn.Module:
    """The network; its first layer whitens `images` uint8 [N, H, W, 3]; `batch_size` samples make a step."""
    momentum = min(1.0, NORM_MOMENTUM * batch_size)
    blocks: list[nn.Module] = [whitening(images), nn.GELU()]
    for inputs, outputs in zip((24, *widths), widths, strict=False):
        blocks.append(Group(inputs, outputs, momentum))
    blocks += [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes, bias=False), Scaled()]
    return nn.Sequential(*blocks).to(memory_format=torch.channels_last)


def whitening(images: np.ndarray) -> nn.Conv2d:
    """A frozen 2x2 convolution onto the principal directions of patches, of unit variance each, and their
    negatives."""
    some = ast.plain_view(torch.as_tensor(np.asarray(images[:: max(1, len(images) // 5000)])))
    patches = some.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12).double()
    patches = patches[:: max(1, len(patches) // 500_000)]
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values + 5e-4).sqrt()).T.float().reshape(12, 3, 2, 2)
    conv = nn.Conv2d(3, 24, 2, bias=True)
    conv.weight.data.copy_(torch.cat([filters, -filters]))
    conv.weight.requires_grad_(False)
    nn.init.zeros_(conv.bias)
    return conv


def recipe(settings: Settings, model: nn.Module) -> tuple[torch.optim.Optimizer, nn.Module]:
    """SGD with Nesterov momentum; the biases of norms learn faster."""
    biases = [
        p for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias") and "body" in n
    ]
    rest = [p for p in model.parameters() if p.requires_grad and all(p is not b for b in biases)]
    lr, decay = settings.lr, settings.weight_decay
    groups = [
        {"params": rest, "lr": lr, "weight_decay": decay},
        {"params": biases, "lr": FAST_BIAS * lr, "weight_decay": decay / FAST_BIAS},
    ]
    optimizer = torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True, fused=True)
    return optimizer, nn.CrossEntropyLoss(reduction="none", label_smoothing=settings.label_smoothing)
