"""ResNet with LARS, the paper's recipe for large batches of images. `python -m examples.resnet --help`"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from fused_legw import LARS, LEGW, Polynomial, param_groups
from fused_legw.demo import digits

from .application import Application, need
from .sweep import main


class Block(nn.Module):
    """Two convolutions with batch norm. A shortcut skips them; where the shape changes it is a convolution."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Sequential):
    """ResNet-8 for 8x8 images (He et al. 2016, section 4.2, n = 1)."""

    def __init__(self, width=8):
        super().__init__(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, digits.CLASSES),
        )  # fmt: skip


class ResNet(Application):
    name, title = "resnet", "ResNet (scikit-learn's digits)"
    metric, unit, tolerance, target = "accuracy", "%", 1.0, 97.0
    multiples = 1, 2, 4, 8, 16, 32
    lrs, warmups = (0.5, 1.0, 2.0, 4.0), (0.0625, 0.25)
    recipe = LEGW(1.0, 8, 0.0625, batch_size=8, dataset_size=1024, epochs=64, decay=Polynomial(power=2))
    folder = None

    def optimizer(self, model, schedule):
        # Biases and batch norm: no weight decay, no adaptation.
        return LARS(param_groups(model, weight_decay=1e-4), lr=schedule, momentum=0.9, trust_coefficient=0.001)

    def model(self):
        if self.folder is None:
            return SmallResNet()
        from torchvision.models import resnet50

        return resnet50(num_classes=len(self.folder["train"].classes))

    def loss(self, model, batch, state):
        images, labels = batch
        return F.cross_entropy(model(images), labels, label_smoothing=0.1), state

    def quality(self, model, split):
        right = total = 0
        for images, labels in self._evaluation(split):
            right += int((model(images).argmax(1) == labels).sum())
            total += len(labels)
        return 100 * right / total

    def _evaluation(self, split):
        if self.folder is None:
            return zip(*(part.split(256) for part in getattr(self, split)), strict=True)
        loader = torch.utils.data.DataLoader(self.folder["val"], 256, num_workers=8)
        return ((images.to(self.device), labels.to(self.device)) for images, labels in loader)

    def load(self, args):
        if args.data is not None:
            self._folders(Path(args.data))
            return
        data = digits.load_sklearn()
        self.train, self.validation, self.test = (
            (part.images[:, None], part.labels) for part in (data.train, data.validation, data.test)
        )

    def _folders(self, root):
        """ImageNet's layout, train/CLASS/*.JPEG and val/CLASS/*.JPEG, with the published recipe at batch 1024."""
        need("torchvision")
        from torchvision import transforms
        from torchvision.datasets import ImageFolder

        normalize = transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        train = transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()
        val = transforms.Resize(256), transforms.CenterCrop(224)
        self.folder = {}
        for part, steps in (("train", train), ("val", val)):
            try:
                self.folder[part] = ImageFolder(root / part, transforms.Compose([*steps, *normalize]))
            except (FileNotFoundError, OSError) as error:
                raise ValueError(f"--data: {root / part}: {error}") from error
        count = len(self.folder["train"])
        decay = Polynomial(power=2)
        self.recipe = LEGW(2**2.5, 1024, 0.3125, batch_size=1024, dataset_size=count, epochs=90, decay=decay)

    def samples(self):
        return super().samples() if self.folder is None else len(self.folder["train"])

    def batches(self, batch_size):
        if self.folder is None:
            return super().batches(batch_size)
        loader = torch.utils.data.DataLoader(
            self.folder["train"], batch_size, shuffle=True, drop_last=True, num_workers=8, pin_memory=True
        )
        return ((images.to(self.device), labels.to(self.device)) for images, labels in loader)


if __name__ == "__main__":
    main(ResNet())
